"""`python -m bitnet.benchmarks.harness`."""

import sys

from bitnet.benchmarks.harness.adapter import main
from bitnet.errors import BitNetError

try:
    main()
except BitNetError as error:
    print(f"bitnet: error: {error}", file=sys.stderr)
    sys.exit(2)
