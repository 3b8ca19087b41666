#!/usr/bin/env bash
# test_cuda on an emulated GPU, with all head_dims, as Hopper runs the kernels and as others do; or the end-to-end tests with a
# kvd that has such a GPU. Takes minutes, wants no GPU and no CUDA.
# usage: tests/emulator/run.sh [brief|quick|e2e]   (default quick; BUILD=DIR, default build-emulator)
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${BUILD:-build-emulator} what=${1:-quick}
[ -e "$build/build.ninja" ] || meson setup "$build" -Dcuda=disabled -Demulate_all=true

if [ "$what" = e2e ]; then
    ninja -C "$build"
    ln -sf ../../daemon/kvd-keeper "$build/tests/emulator/kvd-keeper"
    export KVD_BUILD=$PWD/$build KVD_SOURCE=$PWD KVD_PROGRAM=$PWD/$build/tests/emulator/kvd_emulated KVD_BACKEND=cuda
    cd tests/e2e
    # Left out: workers that share GPU memory of PyTorch's, or order calls in streams, which are not emulated; and what counts on quick kernels.
    exec /usr/bin/python3 -m pytest -q -n "${JOBS:-3}" -p no:cacheprovider -rsfE -k "not (deadlines or replayed or shapes or fork or child
        or applied_before or slot or tokens or stream or running_call)" test_planes.py test_scenarios.py test_grpc.py test_libkvd.py \
        test_python.py test_memory.py test_sharing.py test_ownership.py test_python_arguments.py test_direct.py test_direct_planes.py test_marks.py test_tc.py test_shares.py test_latent.py test_tier_hits.py test_keep.py test_resume.py test_survive.py
fi
programs="tests/emulator/test_cuda_emulated tests/emulator/test_cuda_emulated_portable"
# shellcheck disable=SC2086
ninja -C "$build" $programs
failed=0 pids=()
for p in $programs; do
    "$build/$p" "$what" >"$build/$(basename "$p").log" 2>&1 & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
for p in $programs; do
    echo "== $(basename "$p")"
    tail -n 30 "$build/$(basename "$p").log"
done
exit $failed
