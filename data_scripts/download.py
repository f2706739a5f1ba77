"""Lists of addresses and captions -> shards, by img2dataset in an environment of its own.

The same as `clipkit data download`; `--help` lists the options.
"""

from __future__ import annotations

import sys

from clipkit.cli.data import script

if __name__ == "__main__":
    sys.exit(script("download"))
