#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Stands in for autoepd in test-run.py: says READY=1 and waits for SIGTERM.

What else it does is told by $STANDIN, words divided by blanks; "N:WORD" is for node N only:
  die        exits with 7 before it is ready
  mute       never says READY=1, only STATUS=
  clash      the first daemon of the run says that its address is taken, and exits
  clash-again  every daemon does
  lines      writes one log line of each level and one without
  crash      kills itself when the file $STANDIN_GO is there
  stubborn   ignores SIGTERM
  complain   exits with 9 at SIGTERM
Its arguments go to $STANDIN_ARGS.N, one a line.
"""
import os
import signal
import socket
import sys
import time


def option(name):
    return sys.argv[sys.argv.index(name) + 1]


def words(node):
    for word in os.environ.get("STANDIN", "").split():
        head, _, tail = word.rpartition(":")
        if head in ("", node):
            yield tail


def notify(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(text.encode(), os.environ["NOTIFY_SOCKET"])


def say(level, text):
    print(f"12:34:56.789 autoepd {level}: {text}", file=sys.stderr, flush=True)


def first_of_the_run():
    try:
        os.mkdir(os.environ["STANDIN_CLASHED"])
    except FileExistsError:
        return False
    return True


def write_lines():
    for level in ("error", "warn", "info", "debug"):
        say(level, f"a line of level {level}")
    print("a line without a level", flush=True)


def main():
    node = option("--node")
    todo = set(words(node))
    if "STANDIN_ARGS" in os.environ:
        with open(os.environ["STANDIN_ARGS"] + "." + node, "w", encoding="utf-8") as out:
            out.write("\n".join(sys.argv[1:]))
    signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in todo else
                  lambda *_: sys.exit(9 if "complain" in todo else 0))
    say("info", f"node {node} starts")
    if "die" in todo:
        sys.exit(7)
    if "clash-again" in todo or ("clash" in todo and first_of_the_run()):
        say("error", f"cannot listen on {option('--peers')}: address already in use")
        sys.exit(1)
    if "lines" in todo:
        write_lines()
    notify("STATUS=reading the tea leaves" if "mute" in todo else "READY=1")
    while True:
        time.sleep(0.01 if "crash" in todo else 60)
        if "crash" in todo and os.path.exists(os.environ["STANDIN_GO"]):
            os.kill(os.getpid(), signal.SIGSEGV)


main()
