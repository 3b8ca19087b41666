#!/usr/bin/env bash
# The quickstart as a newcomer meets it: on a bare Debian (mmdebstrap, systemd-nspawn), with what it prints and the seconds of
# each part, then once more. Wants root and Debian's archive. Some 2 minutes; not part of tests/run.sh.
# usage: tests/quickstart.sh [ARGUMENT of deploy/quickstart.sh...]     RUNS=2 how often
# Ends with one line: N passed, N failed, N skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
source deploy/deps.sh
[ "$(id -u)" = 0 ] || { echo "SKIP quickstart: another system's root wants root"; echo "0 passed, 0 failed, 1 skipped"; exit 0; }
kvd_deps container || { echo "0 passed, 1 failed, 0 skipped"; exit 1; }
work=$(mktemp -d /tmp/kvd-test-quickstart.XXXXXX) passed=0 failed=0
trap 'rm -rf "$work"' EXIT
check() { # check NAME COMMAND...
    local name=$1
    shift
    if "$@"; then passed=$((passed + 1)) && echo "ok      $name"; else failed=$((failed + 1)) && echo "FAILED  $name"; fi
}

if ! mmdebstrap --variant=minbase --include=ca-certificates bookworm "$work/root" >"$work/log" 2>&1; then
    tail -n 20 "$work/log"
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
fi
mkdir "$work/root/srv/kvd"
git ls-files -z --cached --others --exclude-standard | xargs -0 sh -c 'for f; do [ ! -e "$f" ] || printf "%s\0" "$f"; done' sh | tar --null -T - -cf - | tar -C "$work/root/srv/kvd" -xf -
run() { # run N: its output, with a line of what it took
    SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 systemd-nspawn -q -D "$work/root" --register=no --keep-unit --as-pid2 --resolv-conf=copy-host \
        --timezone=off --console=pipe bash -c 'TIMEFORMAT="== run '"$1"': %R s, of which the processors worked %U + %S s"
            time /srv/kvd/deploy/quickstart.sh "$@"' bash "${@:2}" </dev/null 2>&1
}
for n in $(seq "${RUNS:-2}"); do
    run "$n" "$@" | tee "$work/run$n"
    check "run $n" test "${PIPESTATUS[0]}" = 0
    # What the reader came for: beside the codec naive int2 and bf16, the saving in a sentence, and from where on.
    check "run $n: what it is worth" eval "grep -qE '^ *int2 ' $work/run$n && grep -q 'naive' $work/run$n && grep -qE '^ *bf16 ' $work/run$n &&
        grep -qE 'saves?|less' $work/run$n"
done
check "what OPERATOR.md starts is built" test -x "$work/root/srv/kvd/build/daemon/kvd-keeper"
nothing_left() { ! find "$work/root/tmp" -mindepth 1 | grep .; }
check "nothing is left behind in /tmp" nothing_left
took() { grep -oE "\($2: [0-9]+ s\)" "$work/run$1" | grep -oE '[0-9]+'; }
if [ -e "$work/run2" ]; then
    echo "first: dependencies $(took 1 dependencies) s, build $(took 1 build) s, run $(took 1 run) s; again: $(grep -oE 'run 2: [0-9.]+' "$work/run2" | cut -c 8-) s"
fi
echo
echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ]
