#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The real-model layer of the numerics contract: moe-lm --check over topologies and options.

The rows are a covering array: every value of an axis meets every value of every other axis in some
row, except where that cannot be. This is counted before anything runs, and a gap is a failure.

usage: test-parity.py AUTOEP_RUN MOE_LM [ROW...]
"""
import itertools
import subprocess
import sys

AXES = {
    "nodes": ["1", "2", "3", "4"],
    "workers": ["one", "some", "uneven"],  # on a node
    "transport": ["tcp", "shm"],
    "ep-size": ["1", "2", "4"],
    "order": ["ed", "de"],
    "accumulate": ["1", "2", "3"],
    "optimizer": ["adamw", "sgd"],
    "grads": ["fp32", "bf16"],
    "weights": ["fp32", "bf16"],
    "router": ["softmax", "sigmoid"],
    "top-k": ["1", "2", "4"],  # of 4 experts
    "divide": ["micros", "tokens", "uneven"],  # by what; uneven: by tokens, which some ranks lack
    "max-norm": ["0", "0.05", "1"],
    "balance": ["0", "0.01"],
    "sum-group": ["0", "1"],  # 0: the ranks of a node
}
IMPOSSIBLE = [{("nodes", "1"), ("workers", "uneven")}]

#   nodes workers transport ep-size order accumulate optimizer grads weights router top-k divide
#   max-norm balance sum-group
ROWS = """
1 2       tcp 2 ed 1 sgd   fp32 bf16 softmax 4 tokens 0.05 0.01 1
2 1       shm 1 de 1 adamw bf16 fp32 sigmoid 1 uneven 0    0    0
3 1,2,1   tcp 4 ed 2 adamw bf16 fp32 sigmoid 2 micros 1    0.01 1
4 1       shm 4 de 3 sgd   fp32 bf16 softmax 2 micros 1    0    0
3 2       shm 2 de 3 adamw bf16 fp32 sigmoid 4 tokens 0.05 0    0
2 3,1     tcp 1 ed 3 sgd   fp32 bf16 softmax 1 uneven 0    0.01 1
4 1       tcp 2 ed 2 sgd   fp32 fp32 sigmoid 4 uneven 0.05 0    1
1 2       shm 1 de 2 adamw bf16 bf16 softmax 1 micros 0    0.01 0
1 4       tcp 4 de 1 adamw fp32 fp32 softmax 2 uneven 1    0    0
4 1,2,1,2 shm 1 de 1 sgd   bf16 bf16 sigmoid 4 tokens 0    0.01 1
3 1,2,1   shm 2 ed 1 sgd   fp32 bf16 softmax 1 micros 0.05 0    0
2 1       tcp 2 ed 2 sgd   bf16 bf16 sigmoid 2 tokens 1    0.01 1
2 2       shm 4 de 1 adamw bf16 bf16 softmax 4 micros 0.05 0.01 0
4 2       tcp 4 de 1 adamw fp32 fp32 softmax 1 tokens 0    0.01 0
1 1       shm 1 de 3 adamw fp32 bf16 sigmoid 2 tokens 0.05 0.01 1
3 1       tcp 1 de 1 adamw fp32 fp32 softmax 4 uneven 1    0    1
3 1,2,1   tcp 2 de 1 sgd   fp32 bf16 softmax 2 micros 0    0.01 1
1 1       tcp 1 ed 1 adamw fp32 fp32 sigmoid 1 tokens 1    0    0
"""

SMALL = ("--layers 2 --dim 64 --heads 2 --experts 4 --expert-dim 64 --seq 48 --batch 2 "
         "--sample 0 --quiet --lr 0.001").split()
LAUNCH = ["nodes", "workers", "transport"]


def rows_of(text):
    return [dict(zip(AXES, line.split(), strict=True)) for line in text.split("\n") if line]


def values_of(row):
    """The row's (axis, value) pairs; numbers of workers become a kind."""
    counts = set(row["workers"].split(","))
    kind = "uneven" if len(counts) > 1 else "one" if counts == {"1"} else "some"
    return list((row | {"workers": kind}).items())


def gaps_of(rows):
    wanted = {frozenset([(one, a), (other, b)]) for one, other in itertools.combinations(AXES, 2)
              for a in AXES[one] for b in AXES[other]} - {frozenset(pair) for pair in IMPOSSIBLE}
    met = {frozenset(pair) for row in rows for pair in itertools.combinations(values_of(row), 2)}
    assert met <= wanted, f"no values of the axes: {[sorted(pair) for pair in met - wanted]}"
    return sorted(sorted(pair) for pair in wanted - met)


def options_of(row):
    flag = {"micros": [], "tokens": ["--tokens"], "uneven": ["--uneven"]}[row["divide"]]
    named = [(f"--{axis}", value) for axis, value in row.items() if axis not in LAUNCH + ["divide"]]
    steps = "6" if row["nodes"] == "1" else "3"  # the most that are checked, where they are cheap
    return [*itertools.chain(*named), *flag, "--steps", steps]


def passes(run, lm, row):
    """Runs the check of a row; prints its output unless it passes."""
    command = [run, *(word for axis in LAUNCH for word in (f"--{axis}", row[axis])), "--",
               lm, "--check", *SMALL, *options_of(row)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=60)
    except subprocess.TimeoutExpired as late:
        print(f"{(late.stdout or b'').decode()[-2000:]}\nno end after 60 s")
        return False
    good = done.returncode == 0 and "\ncheck: passed" in done.stdout
    if not good:
        print(done.stdout[-4000:])
    return good


def main():
    run, lm, *wanted = sys.argv[1:]
    rows = rows_of(ROWS)
    gaps = gaps_of(rows)
    for one, other in gaps:
        print(f"FAIL no row has {' '.join(one)} with {' '.join(other)}")
    failed = len(gaps)
    for number, row in enumerate(rows, 1):
        if wanted and str(number) not in wanted:
            continue
        good = passes(run, lm, row)
        failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {number}: {' '.join(row.values())}", flush=True)
    print(f"{len(rows)} rows in the list, {len(gaps)} gaps, {failed} failed")
    return failed != 0


sys.exit(main())
