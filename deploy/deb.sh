#!/usr/bin/env bash
# Makes Debian packages: kvd, kvd-calib, libkvd0, libkvd-dev, python3-kvd. Asks nothing; may be run again.
# usage: deploy/deb.sh [--with-cuda] [OUT-DIRECTORY]   (default: build-deb)
#   --with-cuda  builds all CUDA kernels in, for Hopper and, by the driver, what else has 8.0 or later; wants nvcc, and ten minutes
set -euo pipefail
cd "$(dirname "$0")/.."
source deploy/deps.sh
cuda=disabled
if [ "${1:-}" = --with-cuda ]; then
    command -v nvcc >/dev/null || { echo "deb: --with-cuda wants nvcc on PATH" >&2; exit 1; }
    cuda=enabled
    shift
fi
out=$(realpath -m "${1:-build-deb}")

kvd_deps package
work=$(mktemp -d /tmp/kvd-deb.XXXXXX)
trap 'rm -rf "$work"' EXIT
version=$(proto/version.sh)
# A clean copy: what git tracks, as it is in the working tree; outside a checkout, what is there.
mkdir "$work/kvd"
if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard | xargs -0 -I{} sh -c '[ ! -e "$1" ] || printf "%s\0" "$1"' sh {} |
        tar --null -T - -cf - | tar -C "$work/kvd" -xf -
else
    tar --exclude='./build*' -cf - . | tar -C "$work/kvd" -xf -
fi
mv "$work/kvd/deploy/debian" "$work/kvd/debian"
cat >"$work/kvd/debian/changelog" <<C
kvd ($version) unstable; urgency=medium

  * Built from the sources of this version.

 -- kvd maintainers <kvd@localhost>  $(LC_ALL=C date -R -d "@${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y meson.build)}")
C
echo "== packages: kvd $version"
if ! (cd "$work/kvd" && KVD_BUILD_VERSION=$version KVD_CUDA=$cuda DEB_BUILD_OPTIONS="nocheck parallel=$(nproc)" dpkg-buildpackage -us -uc -b) >"$work/log" 2>&1; then
    tail -n 40 "$work/log"
    exit 1
fi
mkdir -p "$out"
rm -f "$out"/*.deb
cp "$work"/*.deb "$out/"
(cd "$out" && ls -1 *.deb)
