#!/usr/bin/env bash
# Builds the CUDA kernels and runs their tests and benchmark on this machine's GPU. Needs gcc and nvcc, no library.
# usage: tests/gpu/run.sh [test|bench|sanitize|build]...   (default: test bench)
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${GPU_BUILD:-build-gpu}
mkdir -p "$out"
cflags="-O3 -std=gnu17 -D_GNU_SOURCE -I. -fno-math-errno"
for f in proto/base.c kernels/geometry.c kernels/quantize.c kernels/cpu/append.c kernels/cpu/attend.c \
    kernels/cpu/backend.c kernels/cpu/scalar.c kernels/cpu/threads.c tests/gpu/cpu_side.c; do
    gcc $cflags -DKVD_X86 -c "$f" -o "$out/$(echo "$f" | tr / _).o"
done
gcc $cflags -mavx2 -mfma -c kernels/cpu/avx2.c -o "$out/avx2.o"
gcc $cflags -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -c kernels/cpu/avx512.c -o "$out/avx512.o"
nvcc -gencode arch=compute_90,code=sm_90 -O3 -std=c++17 -lineinfo -Xptxas -v -I. -c kernels/cuda/attend.cu -o "$out/attend.o" \
    2>&1 | grep -E 'error|registers|spill|Compiling' | sed -E 's/ptxas info *: //' || true
nvcc -gencode arch=compute_90,code=sm_90 -O3 -std=c++17 -I. tests/gpu/decode.cu "$out"/*.o -o "$out/decode" -lpthread -lm
for what in "${@:-test}" ; do
    case "$what" in
    build) ;;
    sanitize)
        for tool in memcheck racecheck initcheck synccheck; do
            echo "== compute-sanitizer $tool"
            compute-sanitizer --tool "$tool" "$out/decode" test 2>&1 | tail -n 3
        done
        ;;
    *) "$out/decode" "$what" ;;
    esac
done
