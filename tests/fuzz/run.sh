#!/usr/bin/env bash
# Fuzzes every target for so many seconds. usage: tests/fuzz/run.sh [SECONDS] [TARGET...]   (BUILD: default build-fuzz)
# What is new goes to BUILD/corpus; with KEEP=1 the kept corpus is made anew from both, as small as covers the same.
# Prints executions and covered edges of each target, and says FAILED for those that found something. A target a core at a time (JOBS=N).
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
seconds=${1:-60}
shift || true
build=$(realpath -m "${BUILD:-build-fuzz}")
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(pickle zoo native safetensors config request fdsock region ledger)
clang=$(command -v clang-14 || command -v clang) || { echo "there is no clang"; exit 1; }
if [ ! -e "$build/build.ninja" ]; then
    CC=$clang meson setup "$build" -Dcuda=disabled -Dfuzz=true -Db_sanitize=address,undefined -Db_lundef=false \
        -Dbuildtype=debugoptimized >/dev/null || exit 1
fi
ninja -C "$build" "${targets[@]/#/tests/fuzz/fuzz_}" >"$build/ninja.log" 2>&1 || { tail -n 30 "$build/ninja.log"; exit 1; }
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 ASAN_OPTIONS=allocator_may_return_null=1:detect_leaks=1

fuzz() { # fuzz TARGET
    local target=$1 kept=tests/fuzz/corpus/$1 log=$build/$1.log
    mkdir -p "$build/corpus/$target" "$build/found"
    "$build/tests/fuzz/fuzz_$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -malloc_limit_mb=1024 -max_len=16384 \
        -print_final_stats=1 -artifact_prefix="$build/found/$target-" "$build/corpus/$target" "$kept" >"$log" 2>&1
    local rc=$?
    printf '%-12s %10s executions, %6s edges%s\n' "$target" "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")" \
        "$(grep -oE 'cov: [0-9]+' "$log" | tail -n 1 | grep -oE '[0-9]+')" "$([ $rc = 0 ] || echo "  FAILED: see $log")"
    if [ -n "${KEEP:-}" ] && [ $rc = 0 ]; then
        mkdir "$build/merged-$target"
        "$build/tests/fuzz/fuzz_$target" -merge=1 -use_counters=0 -max_len=4096 "$build/merged-$target" "$kept" "$build/corpus/$target" >>"$log" 2>&1 &&
            rm -rf "$kept" && mv "$build/merged-$target" "$kept"
    fi
    return $rc
}

export -f fuzz
export seconds build
printf '%s\n' "${targets[@]}" | xargs -P "${JOBS:-$(nproc)}" -I{} bash -c 'fuzz {}'
