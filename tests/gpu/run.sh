#!/usr/bin/env bash
# Builds the CUDA backend and runs its tests and benchmark on this machine's GPU. Needs gcc and nvcc, no library.
# usage: tests/gpu/run.sh [test|portable|bench|sanitize|build]...   (default: test; FILTER=TEXT: benches whose name has it;
#        SANITIZE=many: what of test_cuda sanitizers run, quick if it is not given; PORTABLE=quick: less of it, which takes ten minutes)
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${GPU_BUILD:-build-gpu}
mkdir -p "$out/bench"
cuda=$(kernels/cuda/home.sh)
cflags="-O3 -std=gnu17 -D_GNU_SOURCE -I. -I$cuda/include -fno-math-errno -DKVD_X86"
nvflags="-gencode arch=compute_90a,code=sm_90a -O3 -std=c++17 -lineinfo -Xptxas -v -I."

build() { # suffix, further flags of nvcc
    local suffix=$1 f pids=() p
    shift
    for f in proto/base.c proto/overlap.c kernels/*.c $(ls kernels/cpu/*.c | grep -v '/a[vm]x\|/vnni') kernels/cuda/*.c tests/gpu/test_cuda.c; do
        gcc $cflags -c "$f" -o "$out/$(echo "$f" | tr / _).o" & pids+=($!)
    done
    gcc $cflags -mavx2 -mfma -mf16c -c kernels/cpu/avx2.c -o "$out/avx2.o" & pids+=($!)
    gcc $cflags -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -c kernels/cpu/avx512.c -o "$out/avx512.o" & pids+=($!)
    gcc $cflags -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -c kernels/cpu/vnni.c -o "$out/vnni.o" & pids+=($!)
    gcc $cflags -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mgfni -mamx-tile -mamx-int8 -c kernels/cpu/amx.c -o "$out/amx.o" & pids+=($!)
    for f in kernels/cuda/*.cu; do
        nvcc $nvflags "$@" -c "$f" -o "$out/$(basename "$f").o" > "$out/$(basename "$f").log" 2>&1 & pids+=($!)
    done
    nvcc $nvflags -c tests/gpu/bench_cuda.cu -o "$out/bench/bench_cuda.o" > "$out/bench_cuda.log" 2>&1 & pids+=($!)
    for p in "${pids[@]}"; do
        wait "$p" || { grep -h error "$out"/*.log; exit 1; }
    done 2> /dev/null
    nvcc "$out"/*.o -o "$out/test_cuda$suffix" -lpthread -lm
    nvcc "$out"/bench/bench_cuda.o "$out"/{attend,paged,quantize,read,tail}*.cu.o "$out"/{kernels_format.c,kernels_quantize.c,kernels_tc.c,kernels_cuda_pack.c,kernels_cuda_transforms.c,proto_base.c}.o \
        -o "$out/bench_cuda"
    grep -h spill "$out"/*.log | sort | uniq -c | sort -rn | head -n 3 || true
}

built=
for what in "${@:-test}"; do
    if [ "$what" = portable ]; then # what other architectures get, on this one
        build _portable -DKVD_CUDA_PORTABLE
        "$out/test_cuda_portable" ${PORTABLE:+"$PORTABLE"}
        built=
        continue
    fi
    [ -n "$built" ] || build ""
    built=1
    case "$what" in
    build) ;;
    test) "$out/test_cuda" ;;
    bench) "$out/bench_cuda" ${FILTER:+"$FILTER"} ;;
    sanitize)
        for tool in memcheck racecheck initcheck synccheck; do
            echo "== compute-sanitizer $tool"
            compute-sanitizer --report-api-errors no --tool "$tool" "$out/test_cuda" "${SANITIZE:-quick}" 2>&1 | tail -n 3
        done
        ;;
    esac
done
