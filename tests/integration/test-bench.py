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
import subprocess
import sys
import unittest

RUN = sys.argv.pop(2)
BENCH = sys.argv.pop(1)
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


if __name__ == "__main__":
    unittest.main()
