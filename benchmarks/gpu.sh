#!/usr/bin/env bash
# Everything about the GPU in one call of under ten minutes, without network: tests on the device, then every figure.
#
#     bash benchmarks/gpu.sh [python]
#
# Runs from the tree: the folders kernels/ and train/ are linked into an import folder under their names in the package.
# Needs torch with CUDA and Triton; writes gpu.json and gpu-tests.txt to $OUT, or to benchmarks/results.
set -u
cd "$(dirname "$0")/.."
PYTHON=${1:-python3}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
SHADOW=$(mktemp -d)
trap 'rm -rf "$SHADOW"' EXIT
mkdir "$SHADOW/bitnet"
for part in "$PWD"/bitnet/* "$PWD/kernels" "$PWD/train"; do ln -s "$part" "$SHADOW/bitnet/"; done
export PYTHONPATH="$SHADOW${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$SHADOW/cache}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$SHADOW/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$SHADOW/inductor}"
unset TRITON_INTERPRET BITNET_BACKEND

# The floors need no GPU time: they are printed before anything is measured.
"$PYTHON" benchmarks/gpu.py --floors

if "$PYTHON" -c 'import pytest, hypothesis' 2>/dev/null; then
  WORKERS=$("$PYTHON" -c 'import xdist; print("-n 6")' 2>/dev/null || true)
  # Warnings of another torch's own code do not stop a measurement; in the ordinary tests they are errors.
  # shellcheck disable=SC2086
  timeout 120 "$PYTHON" -m pytest -q -o filterwarnings= -p no:cacheprovider $WORKERS tests/test_gpu.py \
    >"$OUT/gpu-tests.txt" 2>&1
  TESTS=$?
  tail -n 12 "$OUT/gpu-tests.txt"
else
  TESTS="pytest or hypothesis is not installed"
fi
"$PYTHON" benchmarks/gpu.py --out "$OUT" --tests "$TESTS"
