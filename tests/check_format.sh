#!/usr/bin/env bash
# C files are as clang-format (.clang-format) makes them. With --fix, makes them so.
set -u
cd "$(dirname "$0")/.."
command -v clang-format >/dev/null || { echo "clang-format is not installed"; exit 1; }
mode=(--dry-run -Werror)
[ "${1:-}" = --fix ] && mode=(-i)
tests/list_files.sh '*.c' '*.h' | xargs -r clang-format "${mode[@]}"
