#!/usr/bin/env bash
# clang-tidy (.clang-tidy) over our C files. usage: tests/check_tidy.sh BUILD
# The analyzer looks at KVD_TIDY_NODES states of a function (default: 30000, a minute in all; its own default of 225000 takes four
# and finds what no test reaches: run that after larger changes).
set -u
cd "$(dirname "$0")/.."
nodes=()
for word in -Xclang -analyzer-config -Xclang "max-nodes=${KVD_TIDY_NODES:-30000}"; do nodes+=("-extra-arg=$word"); done
tests/list_files.sh 'proto/*.c' 'pool/*.c' 'kernels/*.c' 'calib/*.c' 'daemon/*.c' 'client/*.c' |
    xargs -r -P"$(nproc)" -n4 clang-tidy -p "$1" --quiet "${nodes[@]}" 2>/dev/null
