"""Describes a set of shards in a table and on a page: the same as `clipkit data stats`.

    python data_scripts/stats.py data/train --out stats --workers 8
    python data_scripts/stats.py data/train --model ViT-B-16-SigLIP --tokenizer tokenizer.json

Exit codes: 0 done, 2 usage, 3 data.
"""

import sys

from clipkit.cli.data import script

if __name__ == "__main__":
    sys.exit(script("stats"))
