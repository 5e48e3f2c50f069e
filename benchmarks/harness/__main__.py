"""`python -m bitnet.benchmarks.harness`."""

from bitnet.benchmarks.harness.adapter import main

main()
