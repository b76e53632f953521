#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""autoep-bench --quick through real daemons.

usage: test-bench.py AUTOEP_BENCH AUTOEP_RUN

Figures depend on the machine; what is checked is that each suite has its rows, that they are whole
and finite, and that exit codes and texts are those of autoep-bench(1).
"""
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

RUN = sys.argv.pop(2)
BENCH = sys.argv.pop(1)
COMPARE = pathlib.Path(__file__).resolve().parents[2] / "client" / "bench" / "compare-adamw.py"
DEADLINE = 60
FIELDS = {"suite", "name", "len", "unit", "figure", "floor", "floor_name", "ratio", "target",
          "target_of", "ok", "note"}


def bench(*args, **env):
    return subprocess.run([BENCH, *args], env={**os.environ, "AUTOEP_RUN": RUN, **env},
                          capture_output=True, text=True, timeout=DEADLINE)


def rows_of(*args):
    done = bench(*args, "--quick", "-o", "json")
    if done.returncode != 0:
        raise AssertionError(f"code {done.returncode}: {done.stderr}")
    report = json.loads(done.stdout)
    if report["schema"] != "autoep.bench/1":
        raise AssertionError(f"schema is {report['schema']}")
    return report["rows"]


class Bench(unittest.TestCase):
    def check(self, rows, suite, names):
        for row in rows:
            self.assertEqual(set(row), FIELDS)
            self.assertEqual(row["suite"], suite)
            for key in ("figure", "floor", "ratio"):
                self.assertTrue(math.isfinite(row[key]) and row[key] > 0, row)
            part = row["figure"] / row["floor"]
            if row["unit"] != "GB/s":
                part = 1 / part
            self.assertAlmostEqual(row["ratio"], part)
            self.assertEqual(row["ok"] is None, row["target"] is None)
        for name in names:
            self.assertTrue(any(row["name"].startswith(name) for row in rows),
                            f"no row '{name}' among {[row['name'] for row in rows]}")

    def test_kernels(self):
        self.check(rows_of("kernels"), "kernels", ["sum of 1, 1 thread", "sum of 16 kept, 1 thread",
                                                   "AdamW, 1 thread", "SGD", "fp32 to bf16",
                                                   "bf16 to fp32"])

    def test_gather(self):
        self.check(rows_of("gather"), "gather", [
            "view of a cached unit, p50", "view of a cached unit, p99", "miss, all asleep, p50",
            "gather into own memory", "miss, 2 nodes, tcp", "fetch, 2 x 1, tcp, one asks",
            "fetch, 2 x 1, tcp, all ask", "fetch, 2 x 1, tcp, far part",
            "fetch, 2 x 1, shm, one asks", "fetch, 2 x 2, tcp, one asks",
            "fetch, 2 x 2, shm, all ask"])

    def test_nodes_and_workers_that_ask_at_once(self):
        rows = rows_of("gather", "--nodes", "2,3", "--workers", "3", "--transport", "shm",
                       "--size", "3M")
        self.check(rows, "gather", ["miss, 2 nodes, shm", "miss, 3 nodes, shm"])
        # What came over the wire is one fetch of what others own, whoever asked.
        for nodes in (2, 3):
            for words in ("one asks", "all ask"):
                row, = [row for row in rows if row["name"] == f"fetch, {nodes} x 3, shm, {words}"]
                self.assertAlmostEqual(row["len"], 3 * 2**20 * (nodes - 1) / nodes,
                                       delta=300 * 2**10, msg=row["name"])
                self.assertIsNone(row["target"])
        self.assertFalse([row for row in rows if "1 x" in row["name"] or "view" in row["name"]])

    def test_scatter(self):
        rows = rows_of("scatter")
        self.check(rows, "scatter", ["1 x 1 ranks", "2 x 1 ranks, tcp", "2 x 1 ranks, shm"])
        for row in rows:
            self.assertIn("ring copy", row["note"])

    def test_sizes_and_workers(self):
        rows = rows_of("scatter", "--nodes", "1", "--workers", "2", "--size", "1M,3M")
        self.check(rows, "scatter", ["1 x 2 ranks"])
        self.assertEqual([row["len"] for row in rows], [1 << 20, 3 << 20])

    def test_table(self):
        done = bench("scatter", "--quick", "--nodes", "1")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("last-level cache", done.stdout)
        self.assertIn("1 x 1 ranks", done.stdout)
        self.assertLessEqual(max(map(len, done.stdout.splitlines())), 100)

    def test_usage(self):
        done = bench("weights")
        self.assertEqual(done.returncode, 2)
        self.assertIn("unknown suite 'weights'", done.stderr)

    def test_no_launcher(self):
        done = bench("scatter", "--quick", AUTOEP_RUN="/nonexistent/autoep-run")
        self.assertEqual(done.returncode, 1)
        self.assertIn("AUTOEP_RUN", done.stderr)


# What compare-adamw.py calls of PyTorch and DeepSpeed, with a known least time for each.
TORCH = """
import contextlib, os, sys, time
__version__ = "9.1"
float32, bfloat16 = "float32", "bfloat16"
class Tensor:
    def __init__(self, n, dtype): self.n, self.dtype = n, dtype
    def copy_(self, other):
        assert (self.dtype, other.dtype, self.n) == (bfloat16, float32, other.n)
        time.sleep(0.01)
def full(size, value, dtype): return Tensor(size[0], dtype)
def zeros(n, dtype): return Tensor(n, dtype)
def set_num_threads(n):
    assert os.environ["OMP_NUM_THREADS"] == str(n)
    print("threads", n, file=sys.stderr)
no_grad = contextlib.nullcontext
class nn:
    def Parameter(tensor): return tensor
class optim:
    class AdamW:
        def __init__(self, parameters, fused, lr, betas, eps, weight_decay):
            assert fused and parameters[0].grad.n == parameters[0].n
        def step(self): time.sleep(0.02)
"""
DEEPSPEED = """
import time
class DeepSpeedCPUAdam:
    def __init__(self, parameters, adamw_mode, lr, betas, eps, weight_decay): assert adamw_mode
    def step(self): time.sleep(0.04)
"""


class Comparison(unittest.TestCase):
    """compare-adamw.py with the rows of this bench and stand-ins for what it compares with."""

    @classmethod
    def setUpClass(cls):
        cls.report = bench("kernels", "--quick", "--size", "2M", "-o", "json").stdout

    def setUp(self):
        work = tempfile.TemporaryDirectory(prefix="test-bench.")
        self.addCleanup(work.cleanup)
        self.dir = pathlib.Path(work.name)
        self.write("torch.py", TORCH)
        self.write("deepspeed/__init__.py", '__version__ = "9.2"')
        self.write("deepspeed/ops/__init__.py", "")
        self.write("deepspeed/ops/adam.py", DEEPSPEED)
        self.write("report", self.report)

    def write(self, name, text):
        path = self.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def compare(self, *words):
        return subprocess.run([sys.executable, COMPARE, self.dir / "report", *words], text=True,
                              env={**os.environ, "PYTHONPATH": str(self.dir)}, timeout=DEADLINE,
                              capture_output=True, check=False)

    def refused(self, text, *words):
        done = self.compare(*words)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn(text, done.stderr)

    def test_rates(self):
        done = self.compare("--threads", "1", "--repeats", "2")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("threads 1\n", done.stderr)
        self.assertIn("--quick", done.stderr)
        head, _, *lines = done.stdout.splitlines()
        n = 2 * 2**20 // 18 // 4096 * 4096
        self.assertEqual(head, f"AdamW, {n} elements, 1 threads, best of 2")
        row, = [row for row in json.loads(self.report)["rows"] if row["name"] == "AdamW, 1 thread"]
        own = row["figure"] * 1e9 / 30 / 1e6
        names = ["autoep, with bf16 weights", "torch 9.1 AdamW(fused=True)",
                 "torch 9.1 AdamW(fused=True), bf16 copy", "deepspeed 9.2 DeepSpeedCPUAdam",
                 "deepspeed 9.2 DeepSpeedCPUAdam, bf16 copy"]
        self.assertEqual([line[:52].strip() for line in lines], names)
        self.assertAlmostEqual(float(lines[0][52:]), own, delta=0.06)
        for line, least in zip(lines[1:], (0.02, 0.03, 0.04, 0.05)):
            rate, ahead = map(float, line[52:].split())
            self.assertLessEqual(rate, n / least / 1e6 + 0.06, line)
            self.assertGreater(rate, n / least / 1e6 / 20, line)
            self.assertAlmostEqual(ahead * rate, own, delta=own * 0.2)

    def test_elements(self):
        done = self.compare("--elements", "1000", "--repeats", "1")
        self.assertIn(" 1000 elements,", done.stdout)
        self.assertIn("the others get 1000", done.stderr)

    def test_without_the_others(self):
        self.write("deepspeed/ops/adam.py", 'raise ImportError("no kernels")')
        self.assertIn("deepspeed: not installed (no kernels)\n", self.compare().stdout)
        self.write("torch.py", 'raise ImportError("not here")')
        self.refused("PyTorch is missing (not here)")

    def test_reports_refused(self):
        self.refused("no row of AdamW with 999 threads", "--threads", "999")
        self.write("report", "{}")
        self.refused("is no report of autoep-bench")
        self.write("report", json.dumps({**json.loads(self.report), "rows": []}))
        self.refused("has no row of AdamW")
        (self.dir / "report").unlink()
        self.refused("cannot read")


if __name__ == "__main__":
    unittest.main()
