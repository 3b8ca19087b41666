#!/usr/bin/env bash
# Installs what the tests want, builds, and runs the tests. Asks nothing; may be run again.
# Ends with one line: N passed, N failed, N skipped.
# usage: tests/run.sh [whole]   whole, which CI runs: also the tests that take long (marked so), all random cases where else a
#                               third is chosen anew each time, most of it with sanitizers (the rest: sanitizers.sh), and fuzzing
#   BUILD=DIR      build folder (default: build-test; sanitizers use DIR-asan and DIR-tsan)
#   JOBS=N         end-to-end tests that run side by side (default: cores + 1, for they wait a lot)
#   SLOWEST=N      also says which N end-to-end tests of each run took longest
#   KVD_ROTATIONZOO=DIR  real rotation files, for the tests that can use them
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source deploy/deps.sh
source tests/suites.sh
case "$*" in
    "") whole=false; export KVD_TEST_SHARE=${KVD_TEST_SHARE:-3} KVD_NOT_LONG=1 ;;
    whole) whole=true ;;
    *) echo "usage: tests/run.sh [whole]" >&2; exit 2 ;;
esac
kvd_deps test || { echo "0 passed, 1 failed, 0 skipped"; exit 1; }

say "build"
plain_build

say "source rules"
check "include directions" tests/check_includes.sh
check "sizes and words" tests/check_source.sh
check "circles of files" tests/check_circles.sh "$build"
if /usr/bin/python3 -m pyflakes --version >/dev/null 2>&1; then
    check "names in Python" tests/check_names.sh
else
    echo "SKIP names in Python: python3-pyflakes is not installed"
    count "names in Python" 0 0 1
fi
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
find_units "$build"
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
        [ "$rc" = 0 ] || failing "$logs/emulated"
        count "CUDA kernels, emulated" "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}" 0
    else
        failing "$logs/emulated"
        count "CUDA kernels, emulated" 0 1 0
    fi
else
    echo "SKIP emulated GPU: it wants g++ and an x86-64 processor"
    count "CUDA kernels, emulated" 0 0 1
fi

corpora "" "$build"

find_model "$build"

say "end to end: real processes, real sockets"
pytests "end to end" "$build" .
if [ -x "$build/tests/emulator/kvd_emulated" ]; then
    ln -sf ../../daemon/kvd-keeper "$build/tests/emulator/kvd-keeper"
    KVD_PROGRAM=$PWD/$build/tests/emulator/kvd_emulated KVD_BACKEND=cuda pytests "end to end, emulated GPU" "$build" test_planes.py test_grpc.py test_python.py test_scrub.py test_spare.py::test_what_kvd_itself_has_refuses_nobody test_sharing.py test_tier_hits.py test_fairness.py test_resume.py test_survive.py test_fault.py test_soak.py test_short.py test_direct.py test_direct_planes.py test_marks.py test_tc.py test_latent.py test_page_blocks.py test_segments.py test_another_gpu.py test_libkvd.py::test_queued_calls_of_blocks_of_a_gpu \
        -k "queued_calls or lacks_is_said or attention_over_the_wire or step_equals or append_attend_read or windows_in_python or mutated or in_flight_and_mixed or (come_back and int2c) or given_up_leaves or resume or go_on_while or damaged_is or earlier_kvd or fault or nobody_keeps or soak or neighbours or outlive_kvd \
        or (test_outputs and not (bf16-4 or int2-5 or int2c or turboquant or int2-lm)) or leaves_what_is_stored or alone_is_a_call \
        or (steps_agree and True) or refuses_is_said or takes_the_planes_too or sets_terms or (test_latent and test_direct_mode) or test_segments or another_gpu or (test_page_blocks and (16-nhd or 64-vllm or given_back or killed or nan or many_parts or 48-16))"
else
    echo "SKIP end to end on an emulated GPU: it wants g++ and an x86-64 processor"
    count "end to end, emulated GPU" 0 0 1
fi
check "install" tests/check_install.sh "$build"
check "bundle" tests/check_bundle.sh "$build"
check "quickstart" env BUILD="$build" deploy/quickstart.sh
check "benchmarks run" tests/bench/run.sh --smoke "$build"

if [ $whole = true ]; then
    say "AddressSanitizer and UndefinedBehaviorSanitizer"
    address_sanitizer brief
    say "ThreadSanitizer"
    thread_sanitizer brief
    say "fuzzing"
    fuzzing
else
    echo "SKIP sanitizers and fuzzing: run.sh whole runs them"
    count "sanitizers" 0 0 2
    count "fuzzing" 0 0 1
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

summary
