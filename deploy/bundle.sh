#!/usr/bin/env bash
# Makes a relocatable tarball: kvd, kvctl, the demo, libkvd, and private copies of every library they want but glibc's,
# for nodes that have no packages. usage: deploy/bundle.sh [OUT.tar.gz]   (BUILD=DIR, default build)
set -euo pipefail
cd "$(dirname "$0")/.."
build=${BUILD:-build}
out=${1:-kvd-bundle.tar.gz}
[ -x "$build/daemon/kvd" ] || { echo "bundle: build first: deploy/quickstart.sh, or ninja -C $build" >&2; exit 1; }
root=$(mktemp -d /tmp/kvd-bundle.XXXXXX)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root/kvd/bin" "$root/kvd/lib" "$root/kvd/libexec"
programs="$build/daemon/kvd $build/client/kvctl $build/client/kvd-demo"
for test in e2e_worker e2e_direct gpu_processes bench_direct bench_rpc; do # with which a node can be tried
    [ -x "$build/tests/$test" ] && programs="$programs $build/tests/$test"
done
cp $programs "$root/kvd/libexec/"
# glibc's own libraries and the loader come from the node: they must match its kernel and name services.
ldd $programs | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | sort -u |
    grep -vE '/(ld-linux[^/]*|libc|libm|libdl|librt|libpthread|libresolv|libnss_[a-z]+)\.so' | while read -r lib; do
    cp -L "$lib" "$root/kvd/lib/"
done
cp -L "$build/client/libkvd.so.0" "$root/kvd/lib/"
cp deploy/kvd.conf client/include/kvd/kvd.h "$root/kvd/"
for p in "$root"/kvd/libexec/*; do
    name=$(basename "$p")
    cat >"$root/kvd/bin/$name" <<'W'
#!/bin/sh
# Runs the program of this name with the libraries beside it.
here=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$here/libexec/$(basename -- "$0")" "$@"
W
    chmod +x "$root/kvd/bin/$name"
    strip --strip-unneeded "$root/kvd/libexec/$name" 2>/dev/null || true
done
tar -C "$root" -czf "$out" kvd
echo "$out: $(du -h "$out" | cut -f1), run kvd/bin/kvd after unpacking"
