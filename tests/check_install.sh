#!/usr/bin/env bash
# Installs into a folder and uses what landed there: a program built with pkg-config against the shared library, the
# man pages, units and completion where Debian expects them.
set -eu
cd "$(dirname "$0")/.."
build=$1
root=$(mktemp -d /tmp/kvd-install.XXXXXX)
other=$(mktemp -d /tmp/kvd-install.XXXXXX)
trap 'rm -rf "$root" "$other"' EXIT
DESTDIR="$root" meson install -C "$build" --no-rebuild >/dev/null
for f in usr/sbin/kvd usr/sbin/kvd-keeper usr/bin/kvctl usr/bin/kvctl-calib usr/include/kvd/kvd.h usr/include/kvd/pages.h usr/include/kvd/prompts.h usr/share/man/man8/kvd.8 usr/share/man/man1/kvctl.1 \
    usr/share/man/man5/kvd.conf.5 usr/share/bash-completion/completions/kvctl etc/kvd/kvd.conf; do
    [ -s "$root/$f" ] || { echo "missing: $f"; exit 1; }
done
if command -v doxygen >/dev/null; then
    [ -s "$root/usr/share/man/man3/kvd_open.3" ] && [ -s "$root/usr/share/doc/libkvd-dev/html/kvd_8h.html" ] || { echo "missing: pages of kvd.h"; exit 1; }
fi
unit=$(find "$root" -name 'kvd@.service')
[ -n "$unit" ] || { echo "missing: kvd@.service"; exit 1; }
# Paths in the unit are those of the prefix, and systemd finds no fault with it.
meson setup "$other" -Dprefix=/usr/local -Dcuda=disabled -Dtests=false >/dev/null
grep -q '^ExecStart=/usr/local/sbin/kvd --config /usr/local/etc/kvd/kvd.conf' "$other/deploy/kvd@.service" &&
    grep -q '^ExecReload=/usr/local/bin/kvctl' "$other/deploy/kvd@.service" &&
    ! grep -E '=/usr/s?bin|=/etc' "$other/deploy/kvd@.service" || { echo "the unit of another prefix has other paths"; exit 1; }
if command -v systemd-analyze >/dev/null; then
    sed -e "s|/usr/s\?bin/kv[a-z]*|/bin/true|" "$unit" >"$root/kvd@.service" # the programs are not installed here
    said=$(systemd-analyze verify "$root/kvd@.service" 2>&1 | grep 'kvd@' | grep -v -i 'man ' || true)
    [ -z "$said" ] || { echo "$said"; exit 1; }
fi
pc=$(dirname "$(find "$root" -name kvd.pc)")
lib=$(dirname "$(find "$root" -name 'libkvd.so' | head -n 1)")
[ -e "$lib/libkvd.a" ] || { echo "missing: libkvd.a"; exit 1; }
printf '#include <kvd/kvd.h>\n#include <stdio.h>\nint main(void) { puts(kvd_version()); return 0; }\n' >"$root/t.c"
# A fresh build's kvd.pc says where it lies itself, and nothing of the machine that built it.
grep -q '^prefix=${pcfiledir}/' "$other/meson-private/kvd.pc" && ! grep -E "$PWD|$HOME/|/tmp/" "$other/meson-private/kvd.pc" ||
    { echo "kvd.pc has paths of the build machine"; exit 1; }
if grep -q '^prefix=${pcfiledir}/' "$pc/kvd.pc"; then
    export PKG_CONFIG_PATH=$pc
else # a build folder from before it was so
    export PKG_CONFIG_PATH=$pc PKG_CONFIG_SYSROOT_DIR=$root
fi
# shellcheck disable=SC2046
gcc -std=c99 -Wall -Werror "$root/t.c" -o "$root/t" $(pkg-config --cflags --libs kvd)
LD_LIBRARY_PATH=$lib "$root/t"
# Only the public API is visible.
public=$(grep -ohE '\bkvd_[a-z0-9_]+\(' client/include/kvd/*.h | tr -d '(' | sort -u)
extra=$(nm -D --defined-only "$lib/libkvd.so" | awk '{print $3}' | sort -u | comm -13 <(echo "$public") -)
[ -z "$extra" ] || { echo "private symbols are visible: $extra"; exit 1; }
# There is one copy of the kernels, in a private library that programs and libkvd find; libkvd.a has its own.
kernels=$(find "$root" -name 'libkvd_kernels*.so*')
[ "$kernels" = "$(echo "$lib"/kvd/libkvd_kernels-*.so)" ] || { echo "not one private library of kernels: $kernels"; exit 1; }
for f in "$lib/libkvd.so" "$root"/usr/sbin/kvd "$root"/usr/bin/kvctl "$root"/usr/bin/kvctl-calib; do
    [ "$(basename "$f")" = kvctl ] || readelf -d "$f" | grep -q "NEEDED.*\[$(basename "$kernels")\]" || { echo "$f does not want $kernels"; exit 1; }
    ! nm "$f" | grep -E ' [TtDdRr] (kvd_cpu_attend|kvd_row_quantize)$' || { echo "$f has kernels of its own"; exit 1; }
done
readelf -d "$root/usr/sbin/kvd" | grep -q "RUNPATH.*\[${lib#"$root"}/kvd\]" || { echo "kvd does not look for its kernels where they are"; exit 1; }
toolkit=
if grep -q cudart "$pc/kvd.pc"; then
    toolkit=-L$(kernels/cuda/home.sh)/lib64
fi
gcc -std=c99 "$root/t.c" -I"$root/usr/include" -o "$root/static" "$lib/libkvd.a" $toolkit $(pkg-config --libs-only-l --libs-only-other --static kvd | sed 's/-lkvd//')
! ldd "$root/static" | grep kvd && "$root/static"
exit 0
