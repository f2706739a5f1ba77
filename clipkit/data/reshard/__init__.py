"""Shards from shards: shuffled as a whole, merged, split, chosen from, joined with tables. Loads no torch.

Every input shard is walked once (`select`), what is kept becomes one array on disk (`plan`), and every output
shard is written from random reads of the inputs (`write`): memory does not grow with the number of samples,
and no copy of the set lies anywhere meanwhile.
"""

from __future__ import annotations

from clipkit.data.reshard.job import Reshard, input_shards
from clipkit.data.reshard.plan import Plan
from clipkit.data.reshard.run import Resharding, Written

__all__ = ["Plan", "Reshard", "Resharding", "Written", "input_shards"]
