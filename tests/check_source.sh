#!/usr/bin/env bash
# No file over 800 lines, no leftovers, no words of unfinished work, a README in every folder.
set -u
cd "$(dirname "$0")/.."
bad=0
files=$(tests/list_files.sh '*.c' '*.h' '*.cu' '*.cuh' '*.py' '*.sh' '*.proto')
for f in $files; do
    n=$(wc -l <"$f")
    [ "$n" -le 800 ] || { echo "$f has $n lines"; bad=1; }
done
if git grep --untracked -nE '\b(TODO|FIXME|XXX|HACK)\b' -- '*.c' '*.h' '*.cu' '*.py' '*.sh' '*.proto' ':!tests/check_source.sh' 2>/dev/null; then
    bad=1
fi
for d in daemon client proto kernels pool calib deploy tests; do
    [ -e "$d/README.md" ] || { echo "$d/README.md is missing"; bad=1; }
done
exit $bad
