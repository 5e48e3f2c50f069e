"""`python -m bitnet.cli`, where the script `bitnet` is not to be had: under torchrun, in a checkout."""

import sys

from bitnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
