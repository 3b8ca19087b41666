#!/usr/bin/env bash
# What run.sh runs with sanitizers, and what it leaves out there because it takes long: every codec, more random cases, floods.
# usage: tests/sanitizers.sh [address] [thread]   (default: both; takes BUILD, JOBS, SLOWEST and KVD_ROTATIONZOO as run.sh does)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source deploy/deps.sh
source tests/suites.sh
[ $# -gt 0 ] || set -- address thread
for which in "$@"; do
    case $which in address | thread) ;; *) echo "usage: tests/sanitizers.sh [address] [thread]" >&2; exit 2 ;; esac
done

kvd_deps test || { echo "0 passed, 1 failed, 0 skipped"; exit 1; }
say "build"
plain_build
find_units "$build"
find_model "$build"
for which in "$@"; do
    if [ "$which" = address ]; then
        say "AddressSanitizer and UndefinedBehaviorSanitizer"
        address_sanitizer whole
    else
        say "ThreadSanitizer"
        thread_sanitizer whole
    fi
done
summary
