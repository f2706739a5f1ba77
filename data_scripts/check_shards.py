"""Finds every damage of a set of shards, and writes clean copies: the same as `clipkit data check-shards`.

    python data_scripts/check_shards.py data/train --out report.jsonl --workers 8
    python data_scripts/check_shards.py data/train --repair data/clean

Exit codes: 0 clean or repaired, 2 usage, 3 damage.
"""

import sys

from clipkit.cli.data import script

if __name__ == "__main__":
    sys.exit(script("check-shards"))
