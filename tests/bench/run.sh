#!/usr/bin/env bash
# Prints every figure of the CPU side. usage: tests/bench/run.sh [--smoke] [BUILD]   (--smoke: short, for the tests)
# BUILD: a build folder (default: build, the quickstart's); what is missing there is built. Benchmarks report; nothing here
# judges a time.
set -euo pipefail
cd "$(dirname "$0")/../.."
smoke=
[ "${1:-}" = --smoke ] && { smoke=1; shift; }
build=${1:-build}
programs=(tests/bench_pool tests/bench_prefix tests/bench_evict tests/bench_tier tests/bench_attend tests/bench_fit tests/bench_rpc daemon/kvd client/kvctl client/kvd-demo)
for f in "${programs[@]}"; do
    [ ! -e "$build/$f" ] || continue
    source deploy/deps.sh
    kvd_deps bench
    if [ -e "$build/build.ninja" ]; then
        meson configure "$build" -Dtests=true >/dev/null
    else
        meson setup "$build" -Dcuda=disabled >/dev/null
    fi
    echo "== build: $build"
    ninja -C "$build" "${programs[@]}" >/dev/null # libkvd comes with kvd-demo
    break
done
tokens=32768 seconds=3 millions=1
[ -z "$smoke" ] || { tokens=2048 seconds=0.3 millions=0.1; }
if [ -z "${KVD_ROTATIONZOO:-}" ] && [ -d ../shared/data/rotationzoo ]; then
    export KVD_ROTATIONZOO=$(realpath ../shared/data/rotationzoo)
fi

if [ -z "${KVD_TRACES:-}" ] && [ -d ../shared/data/traces ]; then
    KVD_TRACES=$(realpath ../shared/data/traces)
fi

work=$(mktemp -d /tmp/kvd-bench.XXXXXX)
pid=
cleanup() {
    [ -z "$pid" ] || { kill "$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true; }
    rm -rf "$work"
}
trap cleanup EXIT

echo "# machine: $(nproc) cores, $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1)"
"$build/tests/bench_pool" "$millions"
"$build/tests/bench_prefix" "$millions"
if [ -n "$smoke" ]; then
    "$build/tests/bench_evict" -q
else
    "$build/tests/bench_evict" -s 1 ${KVD_TRACES:+"$KVD_TRACES"}
fi

# Tiers, and what the server does by itself with values of that size. TIER_DIRECTORY: on which disk (default: that of /tmp).
count=400 value=$((36 * 8 * 4608))
[ -z "$smoke" ] || count=20
tier=$(mktemp -d "${TIER_DIRECTORY:-/tmp}/kvd-bench-tier.XXXXXX")
server=$(command -v valkey-server || command -v redis-server || true)
if [ -n "$server" ]; then
    "$server" --port 0 --unixsocket "$work/redis" --save "" --dir "$work" >/dev/null &
    pid=$!
    for _ in {1..400}; do [ -S "$work/redis" ] && break; sleep 0.05; done
fi
"$build/tests/bench_tier" -n "$count" "$tier" ${server:+"unix:$work/redis"}
if [ -n "$server" ]; then
    # With a key for each value, as the first puts have, and with one key, as those again.
    measure() { # measure WHAT OPTION..
        local what=$1
        shift
        "${server%-server}-benchmark" -s "$work/redis" -d "$value" -n "$count" -c 8 --csv "$@" |
            awk -F'"' -v value="$value" -v what="$what" 'NR > 1 {printf "%-34s %7.2f GB/s                      p99 %8.3f ms\n", "redis-benchmark, " $2 what, $4 * value / 1e9, $14}'
    }
    "${server%-server}-cli" -s "$work/redis" flushall >/dev/null
    measure ", new keys" -t set -r 1000000000
    measure ", one key" -t set,get
    kill "$pid"
    wait "$pid" || true
    pid=
else
    echo "no redis-server or valkey-server: its tier is left out"
fi
rm -rf "$tier"
if /usr/bin/python3 -c 'import numpy' 2>/dev/null; then
    echo "# pages that come back from a tier (bench_restore.py)"
    PYTHONPATH=client/python KVD_LIBRARY=$build/client/libkvd.so.0 /usr/bin/python3 tests/bench/bench_restore.py --kvd "$build/daemon/kvd" \
        --kvctl "$build/client/kvctl" --tokens "$((tokens / 4))" --rounds 3
    echo "# what others notice while a full pool makes room (bench_room.py)"
    PYTHONPATH=client/python KVD_LIBRARY=$build/client/libkvd.so.0 /usr/bin/python3 tests/bench/bench_room.py --kvd "$build/daemon/kvd" \
        --kvctl "$build/client/kvctl" --blocks "$([ -n "$smoke" ] && echo 10000 || echo 100000)"
fi

"$build/tests/bench_attend" "$tokens" tests/data/smollm2.safetensors

echo
"$build/tests/bench_fit" $([ -n "$smoke" ] && echo 2 1024 || echo 8 30000)

echo
echo "# daemon"
times=()
for _ in 1 2 3 4 5; do
    if [ -n "$pid" ]; then
        kill "$pid"
        wait "$pid" || true
    fi
    : >"$work/log"
    began=$(date +%s%N)
    "$build/daemon/kvd" --listen "unix:$work/s" --metrics 127.0.0.1:0 --cache "$work/cache" 2>"$work/log" &
    pid=$!
    until [[ $(<"$work/log") == *"ready version"* ]]; do :; done # no process is started meanwhile
    times+=($((($(date +%s%N) - began) / 1000000)))
done
echo "start to ready                       $(printf '%s\n' "${times[@]}" | sort -n | sed -n 3p) ms (median of ${times[*]}, seen from the shell)"
sleep 1
rss=$(awk '/^VmRSS/ {print $2}' /proc/$pid/status)
switches() { cat /proc/$pid/task/*/status | awk '/ctxt_switches/ {n += $2} END {print n}'; }
idle=$([ -n "$smoke" ] && echo 1 || echo 10)
a=$(switches)
sleep "$idle"
b=$(switches)
echo "idle resident memory                 $((rss / 1024)) MiB"
echo "idle context switches, all threads   $((b - a)) in $idle s"
for f in "$build"/daemon/kvd "$build"/client/kvctl "$build"/client/libkvd.so.0 "$build"/kernels/libkvd_kernels-*.so; do
    echo "size of $(basename "$f"), stripped     $(strip -o "$work/x" "$f" && stat -c %s "$work/x") bytes"
done

echo
echo "# gRPC unary round trip between processes (Admin.Ping)"
cpu() { awk '{print ($14 + $15) * 10000}' /proc/$pid/stat; }
for clients in 1 8; do
    a=$(cpu)
    line=$("$build/tests/bench_rpc" "unix:$work/s" "$seconds" "$clients")
    b=$(cpu)
    calls=$(sed -E 's/.* ([0-9]+) calls.*/\1/' <<<"$line")
    awk -v line="$line" -v us=$((b - a)) -v n="$calls" -v s="$seconds" 'BEGIN {printf "%s  daemon CPU %5.1f us a call\n", line, us / (n * (s + 0.3))}'
done
"$build/client/kvctl" --address "unix:$work/s" metrics | awk -F'[ {}]' '/^kvd_rpc_duration_seconds_(sum|count).*Ping/ {v[$1] = $NF}
    END {printf "inside the daemon, arrival to answer   %.1f us a call (mean)\n", v["kvd_rpc_duration_seconds_sum"] / v["kvd_rpc_duration_seconds_count"] * 1e6}'
if [ -z "$smoke" ] && /usr/bin/python3 -c 'import numpy' 2>/dev/null; then
    echo
    echo "# a worker in Python"
    /usr/bin/python3 tests/bench/bench_python.py "$build"
fi
