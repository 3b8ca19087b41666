#!/usr/bin/env bash
# clang-tidy (.clang-tidy) over our C files. usage: tests/check_tidy.sh BUILD
set -u
cd "$(dirname "$0")/.."
tests/list_files.sh 'proto/*.c' 'pool/*.c' 'kernels/*.c' 'calib/*.c' 'daemon/*.c' 'client/*.c' |
    xargs -r -P"$(nproc)" -n4 clang-tidy -p "$1" --quiet 2>/dev/null
