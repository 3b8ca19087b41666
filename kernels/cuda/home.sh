#!/bin/sh
# Prints the folder of the CUDA toolkit. nvcc says it itself: what stands on PATH may be a wrapper far away from it.
# usage: kernels/cuda/home.sh [NVCC]
set -eu
nvcc=${1:-nvcc}
top=$("$nvcc" --dryrun -x cu -c /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -n 1)
[ -n "$top" ] || { echo "home.sh: $nvcc does not say where its toolkit is" >&2; exit 1; }
realpath "$top"
