"""`python -m clipkit`, which is what torchrun and accelerate launch."""

import sys

from clipkit.cli import main

# Workers started by spawn import this module again; only the process that was asked runs the command.
if __name__ == "__main__":
    sys.exit(main())
