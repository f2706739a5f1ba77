"""Turns images and captions that lie on this disk into shards: clipkit data make-shards.

python data_scripts/make_shards.py catalogue/pairs.csv --out shards/catalogue
"""

import sys

from clipkit.cli.data import script

sys.exit(script("make-shards"))
