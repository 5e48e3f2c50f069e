#!/usr/bin/env bash
# Tests and measures everything on the GPU in one call of under ten minutes, without network.
#
#     bash benchmarks/gpu.sh [python] [--again | --dry-run]
#
# Runs from a bare checkout: kernels/, train/ and benchmarks/ are linked into an import folder under their names in the
# package. Needs torch with CUDA and Triton. Writes gpu.json and gpu-tests.txt to $OUT, or to benchmarks/results. Parts
# that have a result there are skipped: after a call that was cut off, make the same call.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=python3
if [[ $# -gt 0 && $1 != -* ]]; then
  PYTHON=$1
  shift
fi
SHADOW=$(mktemp -d) || exit 1
trap 'rm -rf "$SHADOW"' EXIT
mkdir "$SHADOW/bitnet"
for part in "$PWD"/bitnet/* "$PWD/kernels" "$PWD/train" "$PWD/benchmarks"; do ln -s "$part" "$SHADOW/bitnet/"; done
# With the safe path, `python -m pytest` puts no folder before the import folder: the checkout's bitnet/ has no kernels.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$SHADOW${PYTHONPATH:+:$PYTHONPATH}"
export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$SHADOW/cache}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$SHADOW/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$SHADOW/inductor}"
unset TRITON_INTERPRET BITNET_BACKEND BITNET_TUNE

"$PYTHON" benchmarks/gpu.py --out "${OUT:-benchmarks/results}" "$@"
