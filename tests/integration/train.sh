#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A free training run over daemons: it learns, two runs of one record are equal in every bit, the loss
# of each of 100 steps follows the reference in one process to 1e-4, gradients cross once per step
# however many micro-batches it has, and nothing is left behind.
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
        local transport=$1 name=$2

        shift 2
        timeout 90 "$run" --nodes 2 --workers 2 --transport "$transport" -- "$lm" "${model[@]}" \
                --trace "$dir/$name.trace" "$@" >"$dir/$name.log" 2>&1 || {
                tail -n 20 "$dir/$name.log"
                fail "training over $transport ($name)"
        }
}

# moved LOG: of rank 0's node, in MB: weights received, the least; gradients sent, the least; exchanged.
moved()
{
        sed -n 's/^ .*: \([0-9.]*\) MB of weights received, least \([0-9.]*\); \([0-9.]*\) MB of '\
'gradients sent, least \([0-9.]*\); \([0-9.]*\) MB exchanged$/\1 \2 \3 \4 \5/p' "$1"
}

# follows A B: whether the losses of two traces of 100 steps differ by at most 1e-4 in each step.
follows()
{
        python3 - "$1" "$2" <<'END'
import sys

one, other = ([float.fromhex(words[3]) for words in map(str.split, open(path))
               if words[0] == "step"] for path in sys.argv[1:])
assert len(one) == len(other) == 100, (len(one), len(other))
far, step = max((abs(a - b), step) for step, (a, b) in enumerate(zip(one, other), 1))
print(f"losses differ from the reference's by at most {far:.1e}, in step {step}")
sys.exit(not far <= 1e-4)
END
}

over_daemons tcp first --svg "$dir/first.svg"
over_daemons shm second --svg "$dir/second.svg"
timeout 90 "$lm" --reference --world 4 --sum-group 2 --ep-size 2 "${model[@]}" \
        --trace "$dir/third.trace" >"$dir/third.log" 2>&1 ||
        fail "the reference"

read -r start end held < <(losses "$dir/first.log")
read -r _ ref_end ref_held < <(losses "$dir/third.log")
echo "losses over daemons: start $start, end $end, held out $held; reference: $ref_end, $ref_held"
awk -v s="$start" -v e="$end" 'BEGIN { exit !(e > 0 && e < s - 1.5) }' || fail "it did not learn"
follows "$dir/first.trace" "$dir/third.trace" || fail "the loss left the reference"
awk -v a="$held" -v b="$ref_held" 'BEGIN { d = a - b; exit !(a > 0 && d < 1.5e-4 && d > -1.5e-4) }' ||
        fail "the held-out loss left the reference"
# A gradient crosses once; weights of a version or two more than were gathered are on their way.
read -r got least sent sent_least _ < <(moved "$dir/first.log")
echo "MB received $got of $least, sent $sent of $sent_least"
awk -v a="$got" -v b="$least" 'BEGIN { exit !(b > 1 && a >= b && a <= 1.05 * b) }' ||
        fail "weights received"
[[ $sent == "$sent_least" ]] || fail "gradients sent"
cmp "$dir/first.trace" "$dir/second.trace" || fail "two runs of one record differ"
(($(grep -c '^master ' "$dir/first.trace") > 20)) || fail "the trace has no masters"
cmp "$dir/first.svg" "$dir/second.svg" || fail "the pictures of two equal runs differ"

# A step of three micro-batches sends what one of one does: its gradients once. With EP groups of one
# rank no token leaves a node, so what is exchanged is the experts' gradients and a few figures.
short=(--steps 10 --ep-size 1 --sample 0)
over_daemons tcp once "${short[@]}"
over_daemons tcp thrice "${short[@]}" --accumulate 3
read -r _ _ once once_least once_exchanged < <(moved "$dir/once.log")
read -r _ _ sent sent_least exchanged < <(moved "$dir/thrice.log")
echo "MB of gradients sent in 10 steps: $once, with 3 micro-batches $sent, least $sent_least;" \
        "exchanged: $once_exchanged, $exchanged"
awk -v a="$sent" -v b="$exchanged" 'BEGIN { exit !(a > 0.5 && b > 0.5) }' || fail "nothing was sent"
[[ "$once $sent" == "$once_least $sent_least" && $sent == "$once" ]] ||
        fail "gradients are sent again for each micro-batch"
[[ $exchanged == "$once_exchanged" ]] ||
        fail "the experts' gradients are added up again for each micro-batch"
cmp -s "$dir/once.trace" "$dir/thrice.trace" && fail "micro-batches change nothing"

# The core type of BLAS that fits the processor, though OpenBLAS may not know it; one thread.
has()
{
        local flag

        for flag in "$@"; do
                grep -qwm 1 "$flag" /proc/cpuinfo || return
        done
}
core='[A-Za-z0-9]*'
if [[ ${OPENBLAS_CORETYPE-} ]]; then
        core=$OPENBLAS_CORETYPE
elif has avx512f avx512bw avx512vl avx512dq; then
        core=SkylakeX
elif has avx2 fma; then
        core=Haswell
fi
head -n 1 "$dir/first.log"
head -n 1 "$dir/first.log" | grep -qi "^moe-lm: BLAS $core (threads: 1), " || fail "BLAS isn't $core"

# grep has no mark of its own.
left=$(env -u TMPDIR grep -lzsxF "TMPDIR=$TMPDIR" /proc/[0-9]*/environ)
[[ -z $left ]] || fail "left running: $left"
left=$(ls -A "$TMPDIR")
[[ -z $left ]] || fail "left in the temporary directory: $left"
exit "$failed"
