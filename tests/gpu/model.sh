#!/usr/bin/env bash
# Runs tests/gpu/model.py on this machine's GPU with the kvd and libkvd of a bundle (deploy/bundle.sh). Needs python3 with
# PyTorch and transformers. usage: tests/gpu/model.sh BUNDLE.tar.gz [ARGUMENT of model.py...]
set -euo pipefail
bundle=$(realpath "${1:?usage: tests/gpu/model.sh BUNDLE.tar.gz [ARGUMENT of model.py...]}")
shift
cd "$(dirname "$0")/../.."
work=$(mktemp -d /tmp/kvd-model.XXXXXX)
trap 'rm -rf "$work"' EXIT
source tests/gpu/unpack.sh
unpack "$bundle" "$work"
LD_LIBRARY_PATH="$library_path" KVD_LIBRARY="$work/lib/libkvd.so.0" \
    python3 tests/gpu/model.py "$work/kvd" "$@"
