#!/usr/bin/env bash
# The checks of the sources see files that git does not know yet, and are not stopped by one that is gone.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d /tmp/kvd-lists.XXXXXX)
trap 'rm -rf "$work"' EXIT
mkdir "$work/tests" "$work/pool"
for d in daemon client proto kernels pool calib deploy tests; do
    mkdir -p "$work/$d"
    echo "# $d" >"$work/$d/README.md"
done
cp tests/list_files.sh tests/check_format.sh tests/check_source.sh tests/check_tidy.sh "$work/tests/"
cp .clang-format "$work/"
cd "$work"
git init -q
echo '*.ignored.c' >.gitignore
echo 'int gone;' >pool/gone.c
git add pool/gone.c
rm pool/gone.c
tests/check_format.sh && tests/check_source.sh || { echo "faults are found where there are none"; exit 1; }
printf 'int   a ;\n' | tee pool/new.c >pool/x.ignored.c
! tests/check_format.sh 2>/dev/null || { echo "check_format.sh does not see a new file"; exit 1; }
tests/check_format.sh --fix
[ "$(cat pool/new.c)" = 'int a;' ] || { echo "check_format.sh --fix does not see a new file"; exit 1; }
[ "$(cat pool/x.ignored.c)" = 'int   a ;' ] || { echo "check_format.sh --fix changes what git ignores"; exit 1; }
echo '// TO''DO' >>pool/new.c
! tests/check_source.sh >/dev/null || { echo "check_source.sh does not see a new file"; exit 1; }
