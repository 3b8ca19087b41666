#!/usr/bin/env bash
# Runs tests/bench/bench_decoder.py on this machine's GPU with the kvd and libkvd of a bundle (deploy/bundle.sh). Needs python3
# with PyTorch. usage: tests/gpu/decoder.sh BUNDLE.tar.gz [ARGUMENT of bench_decoder.py...]
set -euo pipefail
bundle=$(realpath "${1:?usage: tests/gpu/decoder.sh BUNDLE.tar.gz [ARGUMENT of bench_decoder.py...]}")
shift
cd "$(dirname "$0")/../.."
work=$(mktemp -d /tmp/kvd-decoder.XXXXXX)
trap 'rm -rf "$work"' EXIT
source tests/gpu/unpack.sh
unpack "$bundle" "$work"
LD_LIBRARY_PATH="$library_path" KVD_LIBRARY="$work/lib/libkvd.so.0" PYTHONPATH=client/python \
    python3 tests/bench/bench_decoder.py --kvd "$work/kvd/bin/kvd" "$@"
