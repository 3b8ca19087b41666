#!/usr/bin/env bash
# The project's files that match the patterns, one a line: those that git knows and those that it does not know yet, but
# none that it ignores or that are gone. Without git: all but those of builds. usage: tests/list_files.sh PATTERN...
set -u
if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files --cached --others --exclude-standard -- "$@" | while IFS= read -r f; do
        [ ! -e "$f" ] || printf '%s\n' "$f"
    done
else
    for pattern in "$@"; do
        find . -name 'build*' -type d -prune -o -type f -path "./$pattern" -printf '%P\n'
    done
fi
