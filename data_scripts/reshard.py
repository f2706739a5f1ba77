"""Shuffles, merges, splits, chooses from and adds to shards: `clipkit data reshard` as a program.

    python data_scripts/reshard.py laion/ more/ --out mixed/ --workers 8
    python data_scripts/reshard.py pool/ --out best/ --subset datacomp_1b.npy
    python data_scripts/reshard.py catalogue/ --out parts/ --split 0.95/0.05 --group json.product_id

Exit codes: 0 done, 1 run-time failure, 2 usage, 3 data.
"""

from __future__ import annotations

import sys

from clipkit.cli.data import script

if __name__ == "__main__":
    sys.exit(script("reshard"))
