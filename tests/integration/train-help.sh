#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ./dev train --help lists every option of moe-lm as moe-lm itself does, also where nothing is built.
# usage: train-help.sh DEV OPTIONS_H MOE_LM
set -eu

dev=$1
table=$2
lm=$3
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
mkdir -p "$dir/client/examples/moe-lm"
cp "$dev" "$dir/dev"
cp "$table" "$dir/client/examples/moe-lm/options.h"

"$dir/dev" train --help >"$dir/all"
grep -E '^  --(nodes|workers) ' "$dir/all" >"$dir/own" || true
grep '^  --' "$dir/all" | grep -vxFf "$dir/own" >"$dir/got"
"$lm" --help | grep '^  --' >"$dir/expected"
echo "$(wc -l <"$dir/expected") options of moe-lm, $(wc -l <"$dir/own") of ./dev train"
diff "$dir/expected" "$dir/got"
(($(wc -l <"$dir/own") == 2 && $(wc -l <"$dir/expected") > 20))
[[ ! -e $dir/build ]]
