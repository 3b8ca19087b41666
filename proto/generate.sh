#!/bin/sh
# generate.sh PROTOC_C ROOT FILE OUTDIR: protobuf-c code for one .proto, flat in OUTDIR.
# protoc-c writes into a tree like the .proto's; the build wants its outputs in one folder.
set -eu
protoc_c=$1 root=$2 file=$3 out=$4
name=$(basename "$file" .proto)
tmp=$(mktemp -d "$out/$name.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
file=$(realpath --relative-to="$root" "$file")
"$protoc_c" -I"$root" --c_out="$tmp" "$root/$file"
for ext in c h; do
    sed 's|#include "[a-z0-9/]*/\([a-z]*\.pb-c\.h\)"|#include "\1"|' "$tmp/${file%.proto}.pb-c.$ext" >"$out/$name.pb-c.$ext"
done
