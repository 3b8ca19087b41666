#!/bin/sh
# Prints the version that programs and packages tell: KVD_VERSION of kvd_limits.h and, in a checkout, where the sources are
# beside it: 0.1.0+5.g1a2b3c4 is five commits after the tag v0.1.0, and .dirty has changes that are not committed. Debian
# and Python sort and take such versions. $KVD_BUILD_VERSION stands for it where a copy without git is built.
cd "$(dirname "$0")/.." || exit 1
if [ -n "${KVD_BUILD_VERSION:-}" ]; then
    echo "$KVD_BUILD_VERSION"
    exit
fi
base=$(awk -F'"' '/define KVD_VERSION/ {print $2}' proto/kvd_limits.h)
if [ -e .git ] && commit=$(git rev-parse --short=7 HEAD 2>/dev/null); then
    since=$(git describe --match "v$base" --long --abbrev=7 2>/dev/null | sed -n "s/^v$base-\([0-9]*\)-g.*/\1/p")
    dirty=$(git status --porcelain --untracked-files=no 2>/dev/null | head -n 1)
    if [ "$since" != 0 ] || [ -n "$dirty" ]; then
        base="$base+${since:+$since.}g$commit${dirty:+.dirty}"
    fi
fi
echo "$base"
