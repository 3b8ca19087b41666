#!/usr/bin/env bash
# Makes a bundle and uses it as a node without packages would: unpacked elsewhere, with an environment that knows nothing of
# the build. usage: tests/check_bundle.sh BUILD
set -eu
cd "$(dirname "$0")/.."
build=$1 pid=
work=$(mktemp -d /tmp/kvd-bundle.XXXXXX)
cleanup() {
    [ -z "$pid" ] || { kill "$pid" && wait "$pid"; } 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
BUILD="$build" deploy/bundle.sh "$work/b.tar.gz" >/dev/null
mkdir "$work/opt"
tar -C "$work/opt" -xzf "$work/b.tar.gz"
kvd=$work/opt/kvd
bare() { env -i PATH=/usr/bin:/bin HOME="$work" "$@"; }

env -i PATH=/usr/bin:/bin HOME="$work" "$kvd/bin/kvd" --listen "unix:$work/s" --metrics '' --pool-size 64MiB --cache "$work/cache" 2>"$work/log" &
pid=$!
for _ in $(seq 300); do
    [ -S "$work/s.fd" ] && break
    sleep 0.1
done
bare "$kvd/bin/kvctl" --address "unix:$work/s" status >/dev/null
bare "$kvd/bin/e2e_worker" "unix:$work/s" >/dev/null
# What runs maps nothing from the build, and libraries of the system's only if they are glibc's.
foreign=$(awk '$6 ~ /\.so/ {print $6}' "/proc/$pid/maps" | sort -u | grep -v "^$kvd/lib/" |
    grep -vE '/(ld-linux[^/]*|libc|libm|libdl|librt|libpthread|libresolv|libnss_[a-z]+)\.so' || true)
[ -z "$foreign" ] || { echo "from outside of the bundle: $foreign"; exit 1; }
grep -q "$kvd/lib/libkvd_kernels-" "/proc/$pid/maps" || { echo "the bundle's kernels are not used"; exit 1; }
kill "$pid" && wait "$pid" && pid=
# One copy of the kernels.
[ "$(find "$kvd" -name 'libkvd_kernels-*.so' | wc -l)" = 1 ] || { echo "not one library of kernels"; exit 1; }
text='cannot reserve addresses for %u extents' # of the kernels
for f in "$kvd"/lib/libkvd* "$kvd"/libexec/*; do
    case $f in *libkvd_kernels-*) grep -qF "$text" "$f" ;; *) ! grep -qF "$text" "$f" ;; esac || { echo "$f: not one copy of the kernels"; exit 1; }
done

for f in share/man/man8/kvd.8 share/man/man1/kvctl.1 share/man/man5/kvd.conf.5 share/bash-completion/completions/kvctl \
    share/kvd/kvd.rules.yml share/kvd/kvd.json kvd.conf include/kvd/kvd.h include/kvd/pages.h include/kvd/prompts.h README licenses/kvd; do
    [ -s "$kvd/$f" ] || { echo "missing: $f"; exit 1; }
done
# Every library's package tells its terms, and every licence that these refer to is there.
for lib in "$kvd"/lib/*; do
    case $(basename "$lib") in libkvd*) continue ;; esac
    file=$(realpath "$(ldconfig -p | awk -v n="$(basename "$lib")" '$1 == n {print $NF; exit}')")
    package=$({ dpkg -S "$file" || dpkg -S "${file#/usr}"; } 2>/dev/null | head -n 1 | cut -d: -f1)
    [ -s "$kvd/licenses/$package" ] || { echo "no terms of $(basename "$lib") ($package)"; exit 1; }
done
for text in $(grep -rohE '/usr/share/common-licenses/[A-Za-z0-9.-]*[A-Za-z0-9]' "$kvd/licenses" | sort -u); do
    [ -s "$kvd/licenses/$(basename "$text")" ] || { echo "missing: $text"; exit 1; }
done

# The service: paths are those of the folder, and systemd finds no fault with the unit.
if [ "$(id -u)" = 0 ]; then
    "$kvd/install-service.sh" "$work" >/dev/null
    unit=$work/etc/systemd/system/kvd@.service
    grep -qx 'ExecStart=/opt/kvd/bin/kvd --config /etc/kvd/kvd.conf --instance %i' "$unit"
    grep -qx 'ExecReload=/opt/kvd/bin/kvctl --instance %i reload' "$unit"
    ! grep -n '@[a-z]*@' "$unit"
    cmp -s deploy/kvd.conf "$work/etc/kvd/kvd.conf"
    echo "# mine" >"$work/etc/kvd/kvd.conf"
    "$kvd/install-service.sh" "$work" >/dev/null # again: nothing of the operator's is lost
    grep -qx '# mine' "$work/etc/kvd/kvd.conf"
    ! "$kvd/install-service.sh" 2>"$work/said" # a place that the service would not see
    grep -q 'put the folder elsewhere' "$work/said"
    if command -v systemd-analyze >/dev/null; then
        sed -i 's|=/opt/kvd/bin/kv[a-z]*|=/bin/true|' "$unit"
        said=$(systemd-analyze verify "$unit" 2>&1 | grep 'kvd@' | grep -v -i 'man ' || true)
        [ -z "$said" ] || { echo "$said"; exit 1; }
    fi
fi
