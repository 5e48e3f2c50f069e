"""The adapter of lm-evaluation-harness has moved; this says where to."""

import sys

if __name__ == "__main__":
    print(
        "bitnet: error: got bitnet.train.harness, which has moved; run: python -m bitnet.benchmarks.harness",
        file=sys.stderr,
    )
    sys.exit(2)
