#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""AdamW of autoep beside that of PyTorch and DeepSpeed, on the same processors.

usage: compare-adamw.py BENCH_JSON [--elements N] [--threads T] [--repeats R]

BENCH_JSON is what `autoep-bench kernels -o json` wrote on this machine. The others are timed here, on
as many elements and threads as one of its AdamW rows had: fp32 parameters, gradients and moments, and
once more with a bf16 copy of the parameters, which autoep's kernel writes in the same pass. It needs
PyTorch; DeepSpeed is timed where it is installed. Nothing is fetched or installed.
"""
import argparse
import json
import os
import re
import sys
import time

ROW_LEN_PER_ELEMENT = 18  # of the row's working set: parameter, moments, gradient, weight
MOVED_LEN_PER_ELEMENT = 30  # what its figure counts as read and written; client/bench/kernels.c
BLOCK = 4096  # the row's elements are a multiple of it
HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def fail(text):
    sys.exit(f"compare-adamw: {text}")


class Row:
    """An AdamW row of autoep-bench."""

    def __init__(self, row):
        self.threads = int(re.fullmatch(r"AdamW, (\d+) threads?", row["name"])[1])
        self.elements = row["len"] // ROW_LEN_PER_ELEMENT // BLOCK * BLOCK
        self.rate = row["figure"] * 1e9 / MOVED_LEN_PER_ELEMENT

    def __str__(self):
        return f"{self.elements} elements on {self.threads} threads"


def read_rows(path):
    try:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
    except (OSError, ValueError) as error:
        fail(f"cannot read {path}: {error}")
    if not isinstance(report, dict) or report.get("schema") != "autoep.bench/1":
        fail(f"{path} is no report of autoep-bench: write one with autoep-bench kernels -o json")
    rows = [Row(row) for row in report["rows"]
            if row["suite"] == "kernels" and row["name"].startswith("AdamW, ")]
    if not rows:
        fail(f"{path} has no row of AdamW: write one with autoep-bench kernels -o json")
    if report["machine"]["quick"]:
        print("compare-adamw: the report was made with --quick: its figures come from the caches",
              file=sys.stderr)
    return rows


def choose(rows, options):
    """The row with these threads, otherwise most; of several the one nearest in elements."""
    threads = options.threads or max(row.threads for row in rows)
    fitting = [row for row in rows if row.threads == threads]
    if not fitting:
        fail(f"the report has no row of AdamW with {threads} threads, but with "
             + ", ".join(sorted({str(row.threads) for row in rows}, key=int)))
    if options.elements:
        return min(fitting, key=lambda row: abs(row.elements - options.elements))
    return max(fitting, key=lambda row: row.elements)


def import_torch(threads):
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when it is loaded
    try:
        import torch
    except ImportError as error:
        fail(f"PyTorch is missing ({error}): this comparison needs it, autoep doesn't")
    torch.set_num_threads(threads)
    return torch


def torch_adamw(torch, parameter):
    return torch.optim.AdamW([parameter], fused=True, **HYPER)


def deepspeed_adamw(_, parameter):
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    return DeepSpeedCPUAdam([parameter], adamw_mode=True, **HYPER)


def version_of(name):
    return getattr(sys.modules.get(name), "__version__", "")


def best_seconds(step, repeats):
    step()  # makes the moments
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - begin)
    return best


def measure(torch, make, elements, repeats):
    """Elements a second without and with the bf16 copy."""
    parameter = torch.nn.Parameter(torch.full((elements,), 0.5, dtype=torch.float32))
    parameter.grad = torch.full((elements,), 1e-3, dtype=torch.float32)
    weight = torch.zeros(elements, dtype=torch.bfloat16)
    optimizer = make(torch, parameter)

    def step_and_copy():
        optimizer.step()
        with torch.no_grad():
            weight.copy_(parameter)

    return (elements / best_seconds(optimizer.step, repeats),
            elements / best_seconds(step_and_copy, repeats))


def print_row(name, rate, own):
    ahead = f"{own / rate:.2f}" if rate != own else ""
    print(f"{name:<52} {rate / 1e6:10.1f} {ahead:>12}")


def compare(torch, row, elements, repeats):
    print(f"AdamW, {elements} elements, {row.threads} threads, best of {repeats}")
    print(f"{'':<52} {'Melem/s':>10} {'autoep is':>12}")
    print_row("autoep, with bf16 weights", row.rate, row.rate)
    for name, make in (("torch", torch_adamw), ("deepspeed", deepspeed_adamw)):
        try:
            alone, copied = measure(torch, make, elements, repeats)
        except ImportError as error:
            print(f"{name}: not installed ({error})")
            continue
        except Exception as error:
            # DeepSpeed compiles its kernel at first use; fused=True needs a newer PyTorch.
            print(f"{name} {version_of(name)}: cannot be timed: {error}")
            continue
        title = {"torch": "AdamW(fused=True)", "deepspeed": "DeepSpeedCPUAdam"}[name]
        print_row(f"{name} {version_of(name)} {title}", alone, row.rate)
        print_row(f"{name} {version_of(name)} {title}, bf16 copy", copied, row.rate)


def positive(word):
    if not re.fullmatch(r"[1-9][0-9]{0,11}", word):
        raise argparse.ArgumentTypeError(f"'{word}' is not a positive number")
    return int(word)


def main():
    parser = argparse.ArgumentParser(prog="compare-adamw.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("report", metavar="BENCH_JSON",
                        help="what autoep-bench kernels -o json wrote on this machine")
    parser.add_argument("--elements", type=positive, help="default: those of the row")
    parser.add_argument("--threads", type=positive, help="default: the most that have a row")
    parser.add_argument("--repeats", type=positive, default=7, help="the best counts; default 7")
    options = parser.parse_args()
    row = choose(read_rows(options.report), options)
    elements = options.elements or row.elements
    if elements != row.elements:
        print(f"compare-adamw: autoep's row has {row}, the others get {elements}", file=sys.stderr)
    compare(import_torch(row.threads), row, elements, options.repeats)


if __name__ == "__main__":
    main()
