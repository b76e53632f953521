#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A free training run over daemons: it learns, two runs of one record are equal, the loss follows the
# reference in one process to 1e-4 over 100 steps, and nothing is left behind.
# usage: train.sh AUTOEP_RUN MOE_LM
set -u

run=$1
lm=$2
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
export TMPDIR=$dir/tmp XDG_RUNTIME_DIR=
mkdir "$TMPDIR"

model=(--layers 2 --dim 64 --heads 2 --experts 4 --expert-dim 64 --seq 64 --batch 2 --steps 100
        --warmup 10 --weights fp32 --quiet --sample 40)
failed=0

fail()
{
        echo "FAIL $*"
        failed=1
}

# The number after a word of the summary's loss line: loss X at the start, Y at the end ..., Z held out.
losses()
{
        sed -n 's/^loss *\([0-9.]*\) at the start, \([0-9.]*\) at the end.* \([0-9.]*\) held out/\1 \2 \3/p' "$1"
}

over_daemons()
{
        timeout 90 "$run" --nodes 2 --workers 2 --transport "$1" -- "$lm" "${model[@]}" \
                --svg "$dir/$2.svg" >"$dir/$2.log" 2>&1 || {
                tail -n 20 "$dir/$2.log"
                fail "training over $1"
        }
}

over_daemons tcp first
over_daemons shm second
timeout 90 "$lm" --reference --world 4 --sum-group 2 --ep-size 2 "${model[@]}" >"$dir/third.log" 2>&1 ||
        fail "the reference"

read -r start end held < <(losses "$dir/first.log")
read -r _ ref_end ref_held < <(losses "$dir/third.log")
echo "losses over daemons: start $start, end $end, held out $held; reference: $ref_end, $ref_held"
awk -v s="$start" -v e="$end" 'BEGIN { exit !(e > 0 && e < s - 1.5) }' || fail "it did not learn"
awk -v a="$end" -v b="$ref_end" 'BEGIN { d = a - b; exit !(a > 0 && d < 2e-4 && d > -2e-4) }' ||
        fail "the loss left the reference"
awk -v a="$held" -v b="$ref_held" 'BEGIN { d = a - b; exit !(a > 0 && d < 2e-4 && d > -2e-4) }' ||
        fail "the held-out loss left the reference"
# A gradient crosses once; weights of a version or two more than were gathered are on their way.
read -r got least sent sent_least < <(sed -n 's/^ .*: \([0-9.]*\) MB of weights received, least '\
'\([0-9.]*\); \([0-9.]*\) MB of gradients sent, least \([0-9.]*\);.*/\1 \2 \3 \4/p' "$dir/first.log")
echo "MB received $got of $least, sent $sent of $sent_least"
awk -v a="$got" -v b="$least" 'BEGIN { exit !(b > 1 && a >= b && a <= 1.05 * b) }' ||
        fail "weights received"
[[ $sent == "$sent_least" ]] || fail "gradients sent"
cmp "$dir/first.svg" "$dir/second.svg" || fail "two runs of one record differ"
left=$(ls -A "$TMPDIR")
[[ -z $left ]] || fail "left in the temporary directory: $left"
exit "$failed"
