"""Add wrong captions to shards, for objectives with hard captions: `clipkit data hard-captions`."""

import sys

from clipkit.cli.data import script

if __name__ == "__main__":
    sys.exit(script("hard-captions"))
