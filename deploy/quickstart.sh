#!/usr/bin/env bash
# From a fresh Debian or Ubuntu machine to kvd at work: installs dependencies, builds, starts a daemon, fetches a
# rotation set from a calibration store, runs a writer and a reader as separate processes on recorded activations of a
# real model, and prints what came of it. Asks nothing; may be run again. usage: deploy/quickstart.sh [--with-cuda]
# CUDA kernels take minutes to compile: they are built where there is a GPU, for that GPU alone; with --with-cuda
# everywhere, for all that kvd knows. BUILD=DIR chooses the build folder.
set -euo pipefail
cd "$(dirname "$0")/.."
source deploy/deps.sh
build=${BUILD:-build}
case "${1:-}" in
"" | --with-cuda) ;;
*) echo "usage: deploy/quickstart.sh [--with-cuda]" >&2; exit 2 ;;
esac

# Toolkits are often installed beside the PATH.
if ! command -v nvcc >/dev/null && [ -x /usr/local/cuda/bin/nvcc ]; then PATH=$PATH:/usr/local/cuda/bin; fi
if [ "${1:-}" = --with-cuda ] && ! command -v nvcc >/dev/null; then
    echo "quickstart: --with-cuda wants nvcc, of the CUDA toolkit, on PATH or in /usr/local/cuda/bin" >&2
    exit 1
fi
if [ "${1:-}" = --with-cuda ] && [ -n "${BUILD:-}" ] && [ -e "$build/build.ninja" ]; then
    echo "quickstart: BUILD names $build, which is set up and stays as it is: name a new folder, or leave --with-cuda out" >&2
    exit 1
fi

began=$SECONDS
took() { # took WHAT: seconds since the last one
    echo "   ($1: $((SECONDS - began)) s)"
    began=$SECONDS
}

kvd_deps build
took dependencies

quietly() { # what a command prints is of interest when it fails
    local said
    said=$("$@" 2>&1) || { printf '%s\n' "$said" | tail -n 20 >&2; echo "quickstart: $1 failed" >&2; exit 1; }
}

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | grep -xE '[0-9]+\.[0-9]+' || true)
cuda=(-Dcuda=disabled) what="without CUDA kernels: there is no GPU of compute capability 8.0 or later"
if [ "${1:-}" = --with-cuda ]; then
    cuda=(-Dcuda=enabled -Dgpu_capability=all) what="with CUDA kernels for all GPUs"
elif [ -n "$capability" ] && [ "${capability%.*}" -ge 8 ]; then
    cuda=(-Dcuda=auto "-Dgpu_capability=$capability") what="with CUDA kernels for compute capability $capability, if nvcc is there"
fi
if [ -e "$build/build.ninja" ] && [ -n "${BUILD:-}" ]; then
    what="as $build was set up"
elif [ -e "$build/build.ninja" ]; then
    [ "$(cat "$build/quickstart.options" 2>/dev/null)" = "${cuda[*]}" ] || quietly meson configure "$build" "${cuda[@]}"
    echo "${cuda[*]}" >"$build/quickstart.options"
else
    quietly meson setup "$build" -Dtests=false "${cuda[@]}"
    echo "${cuda[*]}" >"$build/quickstart.options"
fi
echo "== build: $build, $what"
targets=(daemon/kvd daemon/kvd-keeper client/kvctl client/kvctl-calib client/kvd-demo client/kvd-compare)
export NINJA_STATUS='   [%f/%t, %e s] '
if [ -t 1 ]; then
    ninja -C "$build" "${targets[@]}" # one line that moves
else # a line now and then; everything if it fails
    ninja -C "$build" "${targets[@]}" | awk '$1 ~ /^\[/ {split($1, n, "[[/,]"); if (n[2] * 4 < n[3] * shown) next; shown++; print; next}
        {rest = rest $0 "\n"} /FAILED|ERROR/ {bad = 1} END {if (bad) printf "%s", rest}'
fi
took build

work=$(mktemp -d /tmp/kvd-quickstart.XXXXXX)
pid=
cleanup() {
    if [ -n "$pid" ]; then
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap cleanup EXIT

kvctl="$build/client/kvctl --address unix:$work/kvd.sock"
codec=tc2 set_name=SmolLM2-135M-Instruct@tc2 rotations=SmolLM2-135M-Instruct@rotations
echo "== calibration store: $work/store"
echo "   (transforms for codec tc2, and rotations for int2 beside them, fitted to 30,720 recorded tokens of this model:"
echo "   calib/README.md says how, and why tc2; a model without a set has int2 and the Hadamard matrix)"
"$build/client/kvctl" --store "$work/store" calib publish tests/data/smollm2-tc2.safetensors "$set_name"
"$build/client/kvctl" --store "$work/store" calib publish tests/data/smollm2-rotations.safetensors "$rotations"

echo "== daemon"
"$build/daemon/kvd" --listen "unix:$work/kvd.sock" --metrics 127.0.0.1:0 --store "file://$work/store" \
    --cache "$work/cache" --log-level notice 2>"$work/log" &
pid=$!
for _ in $(seq 300); do
    $kvctl ping 1 >/dev/null 2>&1 && break
    kill -0 "$pid" 2>/dev/null || { cat "$work/log"; exit 1; }
    sleep 0.1
done
cat "$work/log"
echo "== fetch the set"
$kvctl calib fetch "$set_name"
echo "== writer and reader, two processes"
"$build/client/kvd-demo" write "unix:$work/kvd.sock" tests/data/smollm2.safetensors "$set_name" "$codec"
"$build/client/kvd-demo" read "unix:$work/kvd.sock" tests/data/smollm2.safetensors "$set_name" "$codec"
echo
echo "== kvctl status"
$kvctl status
echo
echo "== some metrics"
$kvctl metrics | grep -E '^kvd_(pool_bytes|pages|namespace_tokens|compression_ratio|rotation_set_requests_total|sessions_opened_total)[{ ]'
echo
echo "== what it is worth"
"$build/client/kvd-compare" "unix:$work/kvd.sock" tests/data/smollm2.safetensors "$rotations" "$set_name"
took run
echo
echo "== done. To keep a daemon: $build/daemon/kvd --listen unix:\$HOME/kvd.sock. README.md says where to go on: 'Who does what'"
