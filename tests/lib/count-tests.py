#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Counts the tests in a meson test log (one JSON object a line).

usage: count-tests.py testlog.json

Prints "PASSED FAILED SKIPPED"; to stderr the reason of each skip, which meson doesn't show. A log
that isn't there counts as no tests: meson writes none when a suite is empty.
"""
import json
import sys

PASSED = {"OK", "EXPECTEDFAIL"}


def reason_of(test):
    text = (test.get("stdout") or "") + (test.get("stderr") or "")
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def main(path):
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    try:
        with open(path, encoding="utf-8", errors="replace") as log:
            tests = [json.loads(line) for line in log if line.strip()]
    except FileNotFoundError:
        tests = []
    for test in tests:
        if test["result"] in PASSED:
            counts["passed"] += 1
        elif test["result"] == "SKIP":
            counts["skipped"] += 1
            print(f"skipped {test['name']}: {reason_of(test)}", file=sys.stderr)
        else:
            counts["failed"] += 1
    print(counts["passed"], counts["failed"], counts["skipped"])


main(sys.argv[1])
