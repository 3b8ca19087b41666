#!/usr/bin/env bash
# Runs tests/gpu/engine.py on this machine's GPU with the kvd and libkvd of a bundle (deploy/bundle.sh): vLLM beside kvd, measured.
# Needs python3 with vLLM 0.26 for CUDA. usage: tests/gpu/engine.sh BUNDLE.tar.gz [ARGUMENT of engine.py...]
set -euo pipefail
bundle=$(realpath "${1:?usage: tests/gpu/engine.sh BUNDLE.tar.gz [ARGUMENT of engine.py...]}")
shift
cd "$(dirname "$0")/../.."
work=$(mktemp -d /tmp/kvd-engine.XXXXXX)
trap 'rm -rf "$work"' EXIT
source tests/gpu/unpack.sh
unpack "$bundle" "$work"
LD_LIBRARY_PATH="$library_path" KVD_LIBRARY="$work/lib/libkvd.so.0" PYTHONPATH="$PWD/client/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONHASHSEED=0 \
    python3 tests/gpu/engine.py "$work/kvd" "$@"
