#!/usr/bin/env bash
# test_cuda on an emulated GPU, with all head_dims, as Hopper runs the kernels and as others do. Takes minutes, wants no GPU
# and no CUDA. usage: tests/emulator/run.sh [brief|quick]   (default quick; BUILD=DIR, default build-emulator)
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${BUILD:-build-emulator}
[ -e "$build/build.ninja" ] || meson setup "$build" -Dcuda=disabled -Demulate_all=true
programs="tests/emulator/test_cuda_emulated tests/emulator/test_cuda_emulated_portable"
# shellcheck disable=SC2086
ninja -C "$build" $programs
failed=0 pids=()
for p in $programs; do
    "$build/$p" "${1:-quick}" >"$build/$(basename "$p").log" 2>&1 & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
for p in $programs; do
    echo "== $(basename "$p")"
    tail -n 30 "$build/$(basename "$p").log"
done
exit $failed
