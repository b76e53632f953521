#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The real-model layer of the numerics contract: moe-lm --check over a selection of topologies and
# options in which every pair of values of the main axes meets at least once.
# usage: parity.sh AUTOEP_RUN MOE_LM [FIRST LAST]
set -u

run=$1
lm=$2
first=${3-1}
last=${4-99}

small=(--layers 2 --dim 64 --heads 2 --experts 4 --expert-dim 64 --seq 48 --batch 2 --steps 4
        --sample 0 --quiet --lr 0.001)

# nodes; workers; transport; moe-lm options
cases=(
        '1;1;shm;--ep-size 1 --accumulate 3 --optimizer sgd --grads bf16'
        '2;1;tcp;--ep-size 2 --weights fp32 --uneven'
        '1;4;shm;--ep-size 2 --order de --accumulate 3 --router sigmoid'
        '2;2;tcp;--ep-size 4 --grads bf16 --accumulate 3 --balance 0.01'
        '2;2;shm;--ep-size 2 --order de --optimizer sgd --weights fp32 --max-norm 0.05'
        '3;1,2,1;tcp;--ep-size 4 --order de --uneven --accumulate 2'
        '3;1;shm;--ep-size 1 --grads bf16 --weights fp32 --max-norm 0 --balance 0'
        '4;1;tcp;--ep-size 2 --optimizer sgd --router sigmoid --tokens'
        '2;3,1;shm;--ep-size 1 --order de --weights fp32 --accumulate 3'
        '1;2;shm;--ep-size 2 --top-k 4 --tokens'
        '4;2,1,1,2;tcp;--ep-size 1 --top-k 1 --accumulate 2 --grads bf16'
        '2;2;tcp;--ep-size 4 --router sigmoid --order de --sum-group 1'
)

failed=0
n=0
for row in "${cases[@]}"; do
        n=$((n + 1))
        ((n < first || n > last)) && continue
        IFS=';' read -r nodes workers transport options <<<"$row"
        read -r -a words <<<"$options"
        if output=$(timeout 60 "$run" --nodes "$nodes" --workers "$workers" \
                --transport "$transport" -- "$lm" --check "${small[@]}" "${words[@]}" 2>&1) &&
                grep -q '^check: passed' <<<"$output"; then
                echo "ok   $n: $nodes nodes x $workers, $transport, $options"
        else
                echo "FAIL $n: $nodes nodes x $workers, $transport, $options"
                tail -n 20 <<<"$output"
                failed=$((failed + 1))
        fi
done
echo "$n cases in the list, $failed failed"
((failed == 0))
