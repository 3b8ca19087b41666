#!/usr/bin/env bash
# Runs tests/gpu/model.py on this machine's GPU with the kvd and libkvd of a bundle (deploy/bundle.sh). Needs python3 with
# PyTorch and transformers. usage: tests/gpu/model.sh BUNDLE.tar.gz [ARGUMENT of model.py...]
set -euo pipefail
bundle=$(realpath "${1:?usage: tests/gpu/model.sh BUNDLE.tar.gz [ARGUMENT of model.py...]}")
shift
cd "$(dirname "$0")/../.."
work=$(mktemp -d /tmp/kvd-model.XXXXXX)
trap 'rm -rf "$work"' EXIT
tar xzf "$bundle" -C "$work"
# Python and PyTorch bring a C++ runtime of their own, newer than the bundle's or the same.
mkdir "$work/lib"
cp -P "$work"/kvd/lib/* "$work/lib/"
rm -f "$work"/lib/libstdc++.so* "$work"/lib/libgcc_s.so*
LD_LIBRARY_PATH="$work/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" KVD_LIBRARY="$work/lib/libkvd.so.0" \
    python3 tests/gpu/model.py "$work/kvd" "$@"
