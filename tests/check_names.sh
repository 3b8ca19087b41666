#!/usr/bin/env bash
# No name in Python that nothing defines: it would be found only when its line is reached.
set -u
cd "$(dirname "$0")/.."
! tests/list_files.sh '*.py' | xargs /usr/bin/python3 -m pyflakes 2>&1 | grep 'undefined name'
