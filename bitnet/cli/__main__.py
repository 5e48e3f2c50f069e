"""`python -m bitnet.cli`: the same as `bitnet`, for what starts modules, such as torchrun."""

import sys

from bitnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
