#!/usr/bin/env bash
# From a fresh Debian or Ubuntu machine to kvd at work: installs dependencies, builds, starts a daemon, fetches a
# rotation set from a calibration store, runs a writer and a reader as separate processes on recorded activations of a
# real model, and prints what came of it. Asks nothing; may be run again. BUILD=DIR chooses the build folder.
set -euo pipefail
cd "$(dirname "$0")/.."
source deploy/deps.sh
build=${BUILD:-build}

kvd_deps build
echo "== build: $build"
[ -e "$build/build.ninja" ] || meson setup "$build" -Dtests=false >/dev/null
ninja -C "$build" daemon/kvd client/kvctl client/kvd-demo >/dev/null

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
set_name=SmolLM2-135M-Instruct@fitted
echo "== calibration store: $work/store"
echo "   (a rotation set fitted to 30,720 recorded tokens of this model; calib/README.md says how)"
"$build/client/kvctl" --store "$work/store" calib publish tests/data/smollm2-rotations.safetensors "$set_name"

echo "== daemon"
"$build/daemon/kvd" --listen "unix:$work/kvd.sock" --metrics 127.0.0.1:0 --store "file://$work/store" \
    --cache "$work/cache" --log-level notice 2>"$work/log" &
pid=$!
for _ in $(seq 100); do
    $kvctl ping 1 >/dev/null 2>&1 && break
    kill -0 "$pid" 2>/dev/null || { cat "$work/log"; exit 1; }
    sleep 0.1
done
cat "$work/log"
echo "== fetch the rotation set"
$kvctl calib fetch "$set_name"
echo "== writer and reader, two processes"
"$build/client/kvd-demo" write "unix:$work/kvd.sock" tests/data/smollm2.safetensors "$set_name"
"$build/client/kvd-demo" read "unix:$work/kvd.sock" tests/data/smollm2.safetensors "$set_name"
echo
echo "== kvctl status"
$kvctl status
echo
echo "== some metrics"
$kvctl metrics | grep -E '^kvd_(pool_bytes|namespace_tokens|compression_ratio|rotation_set_requests_total|sessions_opened_total|pages)'
echo
echo "== done. To keep a daemon: $build/daemon/kvd --listen unix:\$HOME/kvd.sock --store URL; then $build/client/kvctl --help"
