#!/usr/bin/env bash
# Makes a container image of kvd from its Debian packages, without a container daemon: an OCI archive that podman, skopeo,
# ctr and docker load. Asks nothing; may be run again. Wants root (mmdebstrap unpacks a system).
# usage: deploy/image.sh [--debs DIR | --with-cuda] [OUT.oci.tar [ROOT.tar]]   (default: build-image/kvd.oci.tar)
#   --debs DIR   packages that deploy/deb.sh made; otherwise it makes them
#   --with-cuda  kernels for GPUs: the driver's libraries come from the host (NVIDIA Container Toolkit)
#   ROOT.tar     also keeps the plain root, for systemd-nspawn or bubblewrap
set -euo pipefail
cd "$(dirname "$0")/.."
source deploy/deps.sh
debs= cuda=()
case "${1:-}" in
--debs) debs=$(realpath "$2") && shift 2 ;;
--with-cuda) cuda=(--with-cuda) && shift ;;
esac
out=$(realpath -m "${1:-build-image/kvd.oci.tar}")
keep=${2:+$(realpath -m "$2")}
[ "$(id -u)" = 0 ] || { echo "image: mmdebstrap unpacks a whole system here: run as root" >&2; exit 1; }

kvd_deps image
work=$(mktemp -d /tmp/kvd-image.XXXXXX)
trap 'rm -rf "$work"' EXIT
if [ -z "$debs" ]; then
    debs=$work/debs
    deploy/deb.sh ${cuda[@]+"${cuda[@]}"} "$debs"
fi
mkdir "$work/pkg"
cp "$debs"/kvd_*.deb "$debs"/libkvd0_*.deb "$work/pkg/"
version=$(dpkg-deb -f "$(echo "$work"/pkg/kvd_*.deb)" Version)

echo "== root"
# What dpkg and apt need to go on installing is of no use in an image that is replaced as a whole.
if ! mmdebstrap --variant=apt --include=ca-certificates \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --customize-hook="mkdir \"\$1/pkg\" && cp $work/pkg/*.deb \"\$1/pkg/\"" \
    --customize-hook='chroot "$1" sh -c "apt-get install -y --no-install-recommends /pkg/*.deb && systemd-sysusers && rm -rf /pkg && install -d -o kvd -g kvd /run/kvd /var/cache/kvd"' \
    --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1"/var/log/*' \
    bookworm "$work/root.tar" >"$work/log" 2>&1; then
    tail -n 30 "$work/log"
    exit 1
fi

echo "== image"
layout=$work/oci tag=${version//[^A-Za-z0-9_.-]/-}
umoci init --layout "$layout"
umoci new --image "$layout:$tag"
umoci raw add-layer --image "$layout:$tag" "$work/root.tar"
# The configuration is the packages' /etc/kvd/kvd.conf; the arguments make it one instance with its sockets in a folder
# to be shared with the workers' containers.
umoci config --image "$layout:$tag" --os linux --architecture "$(dpkg --print-architecture)" \
    --config.user kvd:kvd --config.entrypoint /usr/sbin/kvd --config.entrypoint --config --config.entrypoint /etc/kvd/kvd.conf \
    --config.cmd --listen --config.cmd unix:/run/kvd/kvd.sock --config.cmd --metrics --config.cmd 0.0.0.0:9464 \
    --config.env CACHE_DIRECTORY=/var/cache/kvd --config.env NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    --config.volume /run/kvd --config.volume /var/cache/kvd --config.exposedports 9464/tcp \
    --config.label org.opencontainers.image.title=kvd --config.label "org.opencontainers.image.version=$version" \
    --config.label org.opencontainers.image.licenses=Apache-2.0
mkdir -p "$(dirname "$out")"
tar -C "$layout" -cf "$out" .
if [ -n "$keep" ]; then
    mkdir -p "$(dirname "$keep")"
    cp "$work/root.tar" "$keep"
fi
echo "$out: $(du -h "$out" | cut -f1), tag $tag"
