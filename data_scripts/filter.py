"""Keep the samples of shards that rules, scores and balance keep: `clipkit data filter`."""

import sys

from clipkit.cli.data import script

if __name__ == "__main__":
    sys.exit(script("filter"))
