"""Pairs as they lie on the disk, given where shards are expected: their shards are made once and kept.

Raw data is a table of pairs (CSV, TSV, Parquet) or a folder of images with same-stem captions. Its shards
lie in a folder named after what they were made from: changed data gets new shards, unchanged data none.
Loads no torch, but for `sharing`.
"""

from __future__ import annotations

from clipkit.data.raw.cache import Made, Rules, check_columns, made_shards
from clipkit.data.raw.reading import Raw, raw_of, raw_path

__all__ = ["Made", "Raw", "Rules", "check_columns", "made_shards", "raw_of", "raw_path"]
