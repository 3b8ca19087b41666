#!/usr/bin/env bash
# No circle of files: in none of these folders does A use what B defines while B, by whatever way, uses what A defines.
# Looks at the object files of a build. Usage: check_circles.sh [BUILD]
set -u
cd "$(dirname "$0")/.."
build=${1:-build}
bad=0
circles() { # circles NAME OBJECT...
    local name=$1 loop
    shift
    [ -e "$1" ] || { echo "check_circles: $build has no objects of $name; build it first"; exit 1; }
    # Twice over the symbols: who defines what, then who wants it of another. tsort names the members of a circle.
    loop=$(nm -AP "$@" | awk -F '[ :]+' '
        { file = $1; sub(/.*\//, "", file); sub(/\.o$/, "", file) }
        $3 ~ /^[TDBRVW]$/ { of[$2] = file }
        $3 == "U" { wanted[file " " $2] }
        END { for (w in wanted) { split(w, p, " "); if (p[2] in of && of[p[2]] != p[1]) print p[1], of[p[2]] } }' |
        sort -u | tsort 2>&1 >/dev/null)
    [ -z "$loop" ] || { echo "$name has a circle of files:"; sed 's/^tsort: //' <<<"$loop"; bad=1; }
}
circles daemon "$build"/daemon/kvd.p/*.o
circles pool "$build"/pool/libkvd_pool.a.p/*.o
exit $bad
