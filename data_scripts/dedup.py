"""Remove duplicates and evaluation images from shards: `clipkit data dedup`."""

import sys

from clipkit.cli.data import script

if __name__ == "__main__":
    sys.exit(script("dedup"))
