#!/usr/bin/env bash
# Makes a relocatable tarball for nodes that have no packages: kvd, kvctl, the demo, libkvd, private copies of every library
# that they want but glibc's, with their licences, man pages, completion, the unit, alerts and a dashboard. Its README says
# how it is used. usage: deploy/bundle.sh [OUT.tar.gz]   (BUILD=DIR, default build)
set -euo pipefail
cd "$(dirname "$0")/.."
build=${BUILD:-build}
out=${1:-kvd-bundle.tar.gz}
[ -x "$build/daemon/kvd" ] || { echo "bundle: build first: deploy/quickstart.sh, or ninja -C $build" >&2; exit 1; }
if meson configure "$build" 2>/dev/null | grep -Eq '^ *quick_cuda +true'; then
    echo "bundle: $build was set up with quick_cuda: on a GPU its kernels are slow, and made anew at the start, which takes minutes" >&2
fi
work=$(mktemp -d /tmp/kvd-bundle.XXXXXX)
trap 'rm -rf "$work"' EXIT
root=$work/kvd
mkdir -p "$root"/{bin,lib,libexec,licenses,share/kvd,share/bash-completion/completions,share/man}
programs="$build/daemon/kvd $build/daemon/kvd-keeper $build/client/kvctl $build/client/kvd-demo"
for test in e2e_worker e2e_client e2e_direct gpu_processes bench_direct bench_rpc; do # with which a node can be tried
    [ -x "$build/tests/$test" ] && programs="$programs $build/tests/$test"
done
cp $programs "$root/libexec/"

licence() { # licence LIBRARY: what its package says, and the licences that this refers to
    local package file texts=/usr/share/common-licenses
    file=$(realpath "$1")
    package=$(dpkg -S "$file" 2>/dev/null || dpkg -S "${file#/usr}" 2>/dev/null) || true # packages may say /lib for /usr/lib
    package=$(head -n 1 <<<"$package" | cut -d: -f1)
    if [ -z "$package" ] || [ ! -e "/usr/share/doc/$package/copyright" ]; then
        echo "bundle: $1: no package tells its licence; a bundle with it may not be given away" >&2
        return 1
    fi
    cp -L "/usr/share/doc/$package/copyright" "$root/licenses/$package"
    { grep -ohE "$texts/[A-Za-z0-9.-]*[A-Za-z0-9]" "$root/licenses/$package" || true; } | sort -u | while read -r text; do
        cp -L "$text" "$root/licenses/"
    done
}
# glibc's own libraries and the loader come from the node: they must match its kernel and name services. The kernels are
# one library of kvd's, for all programs and libkvd.
ldd $programs | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | sort -u |
    grep -vE '/(ld-linux[^/]*|libc|libm|libdl|librt|libpthread|libresolv|libnss_[a-z]+)\.so' | while read -r lib; do
    cp -L "$lib" "$root/lib/"
    case $(basename "$lib") in libkvd*) ;; *) licence "$lib" ;; esac
done
cp -L "$build/client/libkvd.so.0" "$root/lib/"
cp LICENSE "$root/licenses/kvd"
licence /usr/include/uthash.h # compiled in
if [ -e "$build/kernels/attend.cuda.o" ]; then # cudart is in the kernels
    toolkit=$(kernels/cuda/home.sh)
    terms=$(ls "$toolkit"/EULA.txt "$toolkit"/dist-info/nvidia_cuda_runtime-*/*/License.txt "$toolkit"/dist-info/nvidia_cuda_runtime-*/License.txt \
        /usr/share/doc/nvidia-cuda-toolkit/copyright 2>/dev/null | head -n 1) || true
    [ -n "$terms" ] || { echo "bundle: the terms of cudart are not where they are looked for (EULA.txt of $toolkit)" >&2; exit 1; }
    cp -L "$terms" "$root/licenses/cudart"
fi

for page in "$build"/deploy/{kvd.8,kvd.conf.5,kvctl.1}; do
    [ -e "$page" ] || { echo "bundle: no man pages: scdoc was not there when $build was set up" >&2; exit 1; }
    install -D -m 644 "$page" "$root/share/man/man${page##*.}/$(basename "$page")"
done
cp deploy/completion/kvctl "$root/share/bash-completion/completions/"
cp deploy/prometheus/*.yml deploy/grafana/kvd.json "$root/share/kvd/"
cp deploy/systemd/kvd@.service.in deploy/systemd/kvd.*.conf "$root/share/kvd/"
cp deploy/kvd.conf "$root/"
install -D -m 644 -t "$root/include/kvd" client/include/kvd/*.h
install -m 755 deploy/systemd/install-service.sh "$root/"
for p in "$root"/libexec/*; do
    name=$(basename "$p")
    cat >"$root/bin/$name" <<'W'
#!/bin/sh
# Runs the program of this name with the libraries beside it.
here=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$here/libexec/$(basename -- "$0")" "$@"
W
    chmod +x "$root/bin/$name"
    strip --strip-unneeded "$root/libexec/$name" 2>/dev/null || true
done
strip --strip-unneeded "$root"/lib/libkvd*
cat >"$root/README" <<R
kvd $(proto/version.sh), for nodes without packages. Put this folder where you like, such as /opt/kvd.

    bin/kvd --listen unix:\$HOME/kvd.sock --pool-size 1GiB       runs it
    bin/kvctl --address unix:\$HOME/kvd.sock status
    sudo ./install-service.sh                                   makes it a service: user kvd, /etc/kvd/kvd.conf, kvd@.service
    sudo systemctl enable --now kvd@0

man -l share/man/man8/kvd.8 and the pages beside it are the reference. Workers find kvd/kvd.h in include and libkvd in lib; say
LD_LIBRARY_PATH. licenses has the terms of everything in lib, and kvd's own. An update: put the new folder in the old one's
place and restart the services.
R
tar -C "$work" -czf "$out" kvd
echo "$out: $(du -h "$out" | cut -f1), run kvd/bin/kvd after unpacking"
