#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""autoep-ctl against daemons that run a job: every command, as JSON and as a table.

usage: test-ctl-live.py AUTOEP_RUN AUTOEPD AUTOEP_CTL CTL_WORKER

Two daemons with two ranks each; the ranks stop where ctl-worker.c says, so that what is asked for
stands still. The keys and their types are read from client/ctl/SCHEMA.md.
"""
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest

WORKER = sys.argv.pop()
CTL = sys.argv.pop()
AUTOEPD = sys.argv.pop()
RUN = sys.argv.pop()
ROOT = pathlib.Path(__file__).parents[2]
SCHEMA = ROOT / "client" / "ctl" / "SCHEMA.md"
VERSION = int(re.search(r"#define AE_WIRE_VERSION (\d+)",
                        (ROOT / "proto" / "wire" / "wire.h").read_text())[1])
DEADLINE = 60
WORLD = 4
FRAME = struct.Struct("<IHH") # struct ae_control_frame
CTL_REQUEST = 11
NEVER_NULL = {"schema", "name", "id", "rank", "node", "state"}
OF_ONE_JOB = ("workers", "units", "tensors", "shards", "experts", "groups")
COMMANDS = ("status", "nodes", "jobs", *OF_ONE_JOB, "stats")
INTEGER = (int,)
NAMES_TYPES = {"integer": INTEGER, "number": (int, float), "string": (str,), "boolean": (bool,),
               "array": (list,), "object": (dict,), "array of integers": (list,),
               "array of strings": (list,)}
# Keys beside the rows, as the text says. The table of "status" has all there is.
TOP_KEYS = {"nodes": set(), "jobs": set(), "workers": {"job"}, "units": {"job", "version"},
            "tensors": {"job"}, "shards": {"job", "version"}, "experts": {"job", "ep_size"},
            "groups": {"job", "world", "ep_size", "order"}, "stats": {"node"}}


def read_schema():
    """Command -> {key: (types, items' type or None, with --tensor only)}."""
    tables, command = {}, None
    for line in SCHEMA.read_text(encoding="utf-8").splitlines():
        head = re.match(r"## (\w+)$", line)
        row = re.match(r"\| `(\w+)` \| ([a-z ]+) \|(.*)\|$", line)
        if head:
            command = head[1]
            tables[command] = {}
        elif row:
            items = {"array of integers": INTEGER, "array of strings": (str,)}.get(row[2])
            tables[command][row[1]] = (NAMES_TYPES[row[2]], items, "with `tensor`" in row[3])
    return tables


TABLES = read_schema()


def wait_until(holds, what):
    end = time.monotonic() + DEADLINE
    while True:
        found = holds()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"{what} within {DEADLINE} s: it didn't happen")
        time.sleep(0.01)


def elements(row):
    """The elements of a tensor that a row of shards covers."""
    return range(row["first"], row["first"] + row["n"])


class Case(unittest.TestCase):
    maxDiff = None
    nodes, world = 2, WORLD

    def setUp(self):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="test-ctl."))
        self.run = None
        self.others = []
        self.log = (self.dir / "log").open("w+", encoding="utf-8")

    def tearDown(self):
        for other in self.others:
            other.kill()
            other.wait()
        if self.run and self.run.poll() is None:
            self.run.send_signal(signal.SIGTERM)
            self.run.wait(DEADLINE)
        self.log.close()
        shutil.rmtree(self.dir)

    # ---- the job

    def start(self, transport="shm", *options, **more):
        (self.dir / "tmp").mkdir()
        env = {**os.environ, "D": str(self.dir), "AUTOEP_AUTOEPD": AUTOEPD,
               "TMPDIR": str(self.dir / "tmp"), **more}
        for name in ("XDG_RUNTIME_DIR", "AUTOEP_SOCKET"):
            env.pop(name, None)
        self.run = subprocess.Popen(
            [RUN, "--nodes", str(self.nodes), "--workers", str(self.world // self.nodes), "--job",
             "moe", "--transport", transport, *options, "--", WORKER],
            env=env, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.sockets = [self.await_file(f"socket.{node}").read_text() for node in range(self.nodes)]

    def attach(self, job, world, **more):
        """Rank 0 of another job at node 0, with a directory of its own."""
        place = self.dir / job
        place.mkdir()
        (place / "join").touch()
        env = {**os.environ, "D": str(place), "AUTOEP_SOCKET": self.sockets[0], "AUTOEP_JOB": job,
               "AUTOEP_RANK": "0", "AUTOEP_WORLD": str(world), **more}
        env.pop("AUTOEP_LOCAL_RANK", None)
        self.others.append(subprocess.Popen([WORKER], env=env, stdin=subprocess.DEVNULL,
                                            stdout=self.log, stderr=self.log))

    def await_file(self, name):
        path = self.dir / name

        def there():
            self.assertIsNone(self.run.poll(), f"autoep-run ended early: {self.tail()}")
            return path.exists()
        wait_until(there, f"the ranks make {name}")
        return path

    def tail(self):
        return (self.dir / "log").read_text(encoding="utf-8")[-2000:]

    def tell(self, name):
        (self.dir / name).touch()

    def ready(self, *options, **more):
        """A job one micro-batch into round 2."""
        self.start(*options, **more)
        self.tell("join")
        for rank in range(self.world):
            self.await_file(f"ready.{rank}")

    def end(self):
        for name in ("step", "last", "early", "leave"):
            self.tell(name)
        self.assertEqual(self.run.wait(DEADLINE), 0, self.tail())

    # ---- asking

    def ctl(self, *words, node=0):
        return subprocess.run([CTL, "-s", self.sockets[node], "-T", str(DEADLINE), *words],
                              capture_output=True, text=True, timeout=2 * DEADLINE, check=False)

    def ask(self, *words, node=0, code=0):
        """The reply, checked against the schema."""
        done = self.ctl("-o", "json", *words, node=node)
        self.assertEqual((done.returncode, done.stderr), (code, ""), words)
        reply = json.loads(done.stdout)
        self.check(words[0], reply, "--tensor" in words)
        return reply

    def rows(self, *words, **more):
        return self.ask(*words, **more)[words[0]]

    def check(self, command, reply, tensor):
        self.assertEqual(next(iter(reply)), "schema")
        self.assertEqual(reply["schema"], f"autoep.{command}/1")
        if command == "status":
            self.check_keys("status", reply, reply.keys() - {"schema"}, tensor)
            for row in reply["jobs"]:
                self.check_keys("jobs", row, row.keys(), tensor)
            return
        top = TOP_KEYS[command] | ({"tensor"} if command == "shards" and tensor else set())
        self.assertEqual(reply.keys(), top | {"schema", command})
        for row in reply[command]:
            self.check_keys(command, row, row.keys(), tensor)

    def check_keys(self, table, row, keys, tensor):
        wanted = {key for key, (_, _, only) in TABLES[table].items() if tensor or not only}
        self.assertEqual(set(keys), wanted, table)
        for key in keys:
            types, items, _ = TABLES[table][key]
            if row[key] is None:
                self.assertNotIn(key, NEVER_NULL, f"{table}.{key}")
                continue
            self.assertIn(type(row[key]), types, f"{table}.{key}")
            for item in row[key] if items else ():
                self.assertIn(type(item), items, f"{table}.{key}")

    def say(self, command, version=VERSION):
        """A request that autoep-ctl wouldn't send: (status, text) of the answer."""
        body = b"\x08%c\x12%c%s" % (version, len(command), command.encode())
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(self.sockets[0])
            sock.sendall(FRAME.pack(len(body), CTL_REQUEST, 0) + body)
            head = sock.recv(FRAME.size, socket.MSG_WAITALL)
            text = sock.recv(FRAME.unpack(head)[0], socket.MSG_WAITALL)
        self.assertEqual(text[:1], b"\x08", "a status that isn't 0")
        end = next(i for i in range(1, len(text)) if text[i] < 0x80)
        status = sum((byte & 0x7f) << 7 * i for i, byte in enumerate(text[1:end + 1]))
        return status - (1 << 64 if status >> 63 else 0), text[end + 1:].decode(errors="replace")

    def refused(self, text, *words, node=0):
        done = self.ctl(*words, node=node)
        self.assertEqual((done.returncode, done.stdout), (1, ""), words)
        self.assertIn(text, done.stderr)


class Shards(Case):
    def expected(self):
        """What ae_layout says: slices in order, and where each tensor lies."""
        done = subprocess.run([WORKER, "layout", "2"], capture_output=True, text=True, check=True)
        lines = [line.split() for line in done.stdout.splitlines()]
        slices = [tuple(map(int, words[1:])) for words in lines if words[0] == "slice"]
        tensors = {words[1]: tuple(map(int, words[2:])) for words in lines if words[0] == "tensor"}
        return slices, tensors

    def check_tensor(self, tensor, slices, place):
        reply = self.ask("shards", "--tensor", tensor["name"])
        segment, begin, n = place
        self.assertEqual(reply["tensor"], tensor["alias_of"] or tensor["name"])
        self.assertEqual(n, tensor["n"])
        covered = [e for row in reply["shards"] for e in elements(row)]
        self.assertEqual(covered, [] if segment < 0 else list(range(n)), tensor["name"])
        cut = [(node, max(first, begin) - begin, min(first + m, begin + n) - max(first, begin))
               for node, at, first, m in slices
               if at == segment and first < begin + n and begin < first + m and n]
        self.assertEqual([(r["node"], r["first"], r["n"]) for r in reply["shards"]], cut)
        for row in reply["shards"]:
            ends = elements(row)
            for key, index in (("from", ends[0]), ("to", ends[-1])):
                flat = 0
                for place_in, size in zip(row[key], tensor["shape"], strict=True):
                    self.assertLess(place_in, size)
                    flat = flat * size + place_in
                self.assertEqual(flat, index, (tensor["name"], key))
        return reply["shards"]

    def test_every_element_has_one_owner(self):
        self.ready()
        slices, tensors = self.expected()
        rows = self.rows("shards")
        self.assertEqual([(r["node"], r["segment"], r["first"], r["n"]) for r in rows], slices)
        listed = self.rows("tensors")
        self.assertEqual([t["name"] for t in listed], list(tensors))
        found = {t["name"]: self.check_tensor(t, slices, tensors[t["name"]]) for t in listed}
        self.assertEqual(len(found["embed.weight"]), 2)
        self.assertEqual(found["head.weight"], found["embed.weight"])
        self.assertEqual(found["head.scale"][0]["from"], [])
        self.check_lens(rows)
        only = self.rows("shards", "--unit", "layer.0")
        self.assertEqual(only, [row for row in rows if row["unit"] == "layer.0"])
        self.assertEqual([row["kind"] for row in only if row["node"] == only[0]["node"]][0],
                         "trainable")
        self.check_both_nodes(rows)
        self.end()

    def check_lens(self, rows):
        for row in rows:
            size = {"fp32": 4, "bf16": 2}[row["dtype"]]
            state = 4 * row["n"] if row["kind"] == "trainable" else 0
            self.assertEqual(row["weight_len"], size * row["n"])
            for key in ("master_len", "moment1_len", "moment2_len", "sum_len"):
                self.assertEqual(row[key], state, (key, row))
            self.assertEqual(row["version"], 1 if row["node"] == 0 else None)
        self.assertEqual({row["kind"] for row in rows}, {"trainable", "frozen", "buffer"})

    def check_both_nodes(self, rows):
        """Both daemons say the same but for the versions, of which each knows its own."""
        other = self.rows("shards", node=1)
        self.assertEqual([row["version"] for row in other],
                         [1 if row["node"] == 1 else None for row in rows])
        self.assertEqual([{**row, "version": 0} for row in other],
                         [{**row, "version": 0} for row in rows])


class Looking(Case):
    def test_a_running_job(self):
        self.ready("tcp")
        for node in range(2):
            self.check_tables(node)
        self.check_status()
        self.check_nodes()
        self.check_job()
        self.check_workers()
        self.check_units()
        self.check_tensors()
        self.check_experts()
        self.check_groups()
        self.check_stats()
        self.check_refusals()
        self.end()

    def check_tables(self, node):
        for command in COMMANDS:
            self.ask(command, node=node)
            done = self.ctl(command, node=node)
            self.assertEqual((done.returncode, done.stderr), (0, ""), command)
            rows = self.rows(command if command != "status" else "jobs", node=node)
            self.assertGreaterEqual(len(done.stdout.splitlines()), len(rows) + 1, command)
        for command in OF_ONE_JOB:
            self.assertEqual(self.ask(command, node=node),
                             self.ask(command, "--job", "moe", node=node))

    def check_status(self):
        for node in range(2):
            status = self.ask("status", node=node)
            self.assertEqual((status["node"], status["n_nodes"], status["health"], status["why"],
                              status["transport"]), (node, 2, "ok", "", "tcp"))
            self.assertGreater(status["uptime_s"], 0)
            self.assertLessEqual(status["uptime_s"], DEADLINE)
            self.assertEqual(status["jobs"], self.rows("jobs", node=node))
            memory = status["memory"]
            self.assertEqual(memory["used"], status["jobs"][0]["memory_len"])
            self.assertTrue(0 < memory["used"] <= memory["limit"])
            self.assertTrue(0 < memory["tables"] < memory["used"])

    def check_nodes(self):
        lists = [self.rows("nodes", node=node) for node in range(2)]
        for node, rows in enumerate(lists):
            self.assertEqual([row["id"] for row in rows], [0, 1])
            self.assertEqual([row["state"] for row in rows],
                             ["self", "up"] if node == 0 else ["up", "self"])
        for key in ("incarnation", "address"):
            self.assertEqual([row[key] for row in lists[0]], [row[key] for row in lists[1]])
        for row in lists[0]:
            self.assertRegex(row["incarnation"], "^[0-9a-f]{16}$")
            self.assertRegex(row["address"], r"^127\.0\.0\.1:[1-9][0-9]*$")
        # the gradients of a step crossed, and the weights after it
        least = 4 * 333000 // 4
        for here, there in ((lists[0][1], lists[1][0]), (lists[1][0], lists[0][1])):
            self.assertGreater(here["sent_len"], least)
            self.assertEqual(here["sent_len"], there["received_len"])

    def check_job(self):
        job, = self.rows("jobs")
        other, = self.rows("jobs", node=1)
        for row in (job, other):
            self.assertEqual((row["name"], row["state"], row["why"], row["version"], row["world"],
                              row["waiting"]), ("moe", "running", "", 1, WORLD, ""))
        self.assertEqual((job["round"], job["epoch"]), (other["round"], other["epoch"]))
        self.assertEqual((job["ranks_present"], other["ranks_present"]), (WORLD, WORLD))
        self.assertLessEqual(job["memory_len"], job["budget_len"])

    def check_workers(self):
        rows = self.rows("workers")
        self.assertEqual([row["rank"] for row in rows], [0, 1, 2, 3, -1])
        self.assertEqual([row["node"] for row in rows], [0, 0, 1, 1, 0])
        self.assertEqual({row["state"] for row in rows}, {"running"})
        layer, = self.rows("units", "--unit", "layer.0")
        for row in rows:
            if row["node"] == 1:
                self.assertEqual((row["pid"], row["micro"], row["ring_len"]), (None,) * 3)
                continue
            self.assertTrue(os.path.exists(f"/proc/{row['pid']}"))
            self.assertEqual(row["uid"], os.getuid())
            self.assertEqual(row["held_len"], layer["len"] if row["rank"] == 0 else 0)
            self.assertLessEqual(row["held_len"], row["hold_len"] or math.inf)
            self.assertTrue(0 <= row["ring_used"] <= row["ring_len"])
            self.assertEqual(row["micro"], 0 if row["rank"] < 0 else 1)
        self.assertEqual(rows[0]["pid"], rows[4]["pid"])
        far = self.rows("workers", node=1)
        self.assertEqual([row["rank"] for row in far], [0, 1, 2, 3])
        self.assertEqual([row["pid"] is None for row in far], [True, True, False, False])

    def check_units(self):
        reply = self.ask("units")
        self.assertEqual((reply["job"], reply["version"]), ("moe", 1))
        units = {row["name"]: row for row in reply["units"]}
        self.assertEqual([row["id"] for row in reply["units"]], list(range(len(units))))
        self.assertEqual(list(units), ["embed", "layer.0", "layer.0.experts", "layer.1",
                                       "layer.1.experts", "head"])
        self.assertEqual(units["embed"]["len"], 666112)
        self.assertEqual([unit["segments"] for unit in units.values()], [1, 4, 0, 2, 0, 1])
        self.assertEqual((units["layer.0"]["version"], units["layer.0"]["cached"]), (1, True))
        for unit in units.values():
            self.assertTrue(0 <= unit["misses"] <= (2 if unit["name"] == "layer.0" else 0), unit)

    def check_tensors(self):
        rows = {row["name"]: row for row in self.rows("tensors")}
        w = {"id": 2, "name": "layer.0.w", "unit": "layer.0", "dtype": "bf16", "class": "dense",
             "shape": [30, 10, 700], "n": 210000, "group": 0, "flags": [], "alias_of": None}
        self.assertEqual(rows["layer.0.w"], w)
        self.assertEqual(rows["layer.0.table"]["flags"], ["frozen"])
        self.assertEqual((rows["layer.0.bias"]["class"], rows["layer.0.bias"]["group"]),
                         ("buffer", None))
        self.assertEqual(rows["layer.0.up"]["class"], "expert")
        self.assertEqual(rows["head.weight"]["alias_of"], "embed.weight")
        self.assertEqual((rows["head.scale"]["shape"], rows["head.scale"]["n"]), ([], 1))
        self.assertEqual(rows["head.none"]["n"], 0)
        self.assertEqual(self.rows("tensors", "--tensor", "layer.0.w"), [w])
        self.assertEqual([row["name"] for row in self.rows("tensors", "--unit", "head")],
                         ["head.scale", "head.weight", "head.none"])

    def check_experts(self):
        reply = self.ask("experts")
        self.assertEqual(reply["ep_size"], 2)
        self.assertEqual([(row["unit"], row["tensor"], row["expert"]) for row in reply["experts"]],
                         [("layer.0.experts", "layer.0.up", e) for e in range(4)] +
                         [("layer.1.experts", f"layer.1.experts.{e}.up", e) for e in range(4)])
        for row in reply["experts"]:
            self.assertEqual(row["ranks"], [0, 2] if row["expert"] < 2 else [1, 3])
            layer = int(row["unit"].split(".")[1])
            self.assertEqual(row["tokens"], WORLD * (100 * layer + 10 * row["expert"] + 1))
        self.assertEqual(self.rows("experts", node=1), reply["experts"])
        self.assertEqual(self.rows("experts", "--tensor", "layer.1.experts.2.up"),
                         [reply["experts"][6]])
        self.assertEqual(self.rows("experts", "--tensor", "embed.weight"), [])

    def check_groups(self):
        reply = self.ask("groups")
        self.assertEqual((reply["world"], reply["ep_size"], reply["order"]), (4, 2, "e+d"))
        self.assertEqual([(row["kind"], row["index"], row["ranks"]) for row in reply["groups"]],
                         [("ep", 0, [0, 1]), ("ep", 1, [2, 3]), ("edp", 0, [0, 2]),
                          ("edp", 1, [1, 3]), ("sum", 0, [0, 1]), ("sum", 1, [2, 3])])

    def check_stats(self):
        lists = [self.ask("stats", node=node) for node in range(2)]
        self.assertEqual([reply["node"] for reply in lists], [0, 1])
        stats = [{row["name"]: row["value"] for row in reply["stats"]} for reply in lists]
        for reply, values in zip(lists, stats, strict=True):
            self.assertEqual(len(values), len(reply["stats"]), "a name stands once")
            for row in reply["stats"]:
                self.assertIn(row["unit"], ("bytes", "seconds", "count"))
                self.assertRegex(row["help"], r"^[A-Z].*\.$")
        self.assertEqual([values["workers"] for values in stats], [3, 2])
        self.assertEqual([values["peers_up"] for values in stats], [1, 1])
        self.assertEqual([values["jobs"] for values in stats], [1, 1])
        self.assertEqual(stats[0]["put_bytes_sent"], stats[1]["put_bytes_received"])
        self.assertGreater(stats[0]["puts_sent"], 0)
        self.assertGreater(stats[0]["messages_sent"], 0)

    def check_refusals(self):
        self.refused("unknown job 'dense': node 0 has 'moe'", "jobs", "--job", "dense")
        self.refused("unknown job 'dense': node 1 has 'moe'", "shards", "--job", "dense", node=1)
        self.refused("unknown job 'dense'", "status", "--job", "dense")
        self.refused("unknown unit 'tail': job 'moe' has 'embed', 'layer.0'", "units", "--unit",
                     "tail")
        self.refused("unknown tensor 'w': job 'moe' has 'embed.weight'", "shards", "--tensor", "w")
        self.refused("unknown tensor 'layer.0.w': unit 'head' has 'head.scale', 'head.weight'",
                     "shards", "--tensor", "layer.0.w", "--unit", "head")


class ThreeNodes(Case):
    nodes, world = 3, 3

    def test_bytes_by_peer(self):
        self.ready("tcp")
        tables = [self.rows("nodes", node=node) for node in range(3)]
        stats = [{row["name"]: row["value"] for row in self.rows("stats", node=node)}
                 for node in range(3)]
        for here, table in enumerate(tables):
            self.assertEqual((table[here]["sent_len"], table[here]["received_len"]), (0, 0))
            for there in {0, 1, 2} - {here}:
                self.assertGreater(table[there]["sent_len"], 0)
                self.assertEqual(table[there]["sent_len"], tables[there][here]["received_len"])
            for key in ("sent", "received"):
                self.assertEqual(sum(row[f"{key}_len"] for row in table),
                                 stats[here][f"put_bytes_{key}"])
        self.end()


class OneNode(Case):
    nodes, world = 1, 2

    def test_nobody_to_speak_to(self):
        self.ready()
        self.assertEqual(self.ask("status")["transport"], "none")
        node, = self.rows("nodes")
        self.assertEqual((node["state"], node["transport"], node["sent_len"]), ("self", "none", 0))
        self.assertEqual(self.rows("jobs")[0]["ranks_present"], 2)
        self.end()


class Astray(unittest.TestCase):
    """What is asked for at a path where no daemon listens."""
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="test-ctl.")
        self.path = os.path.join(self.dir, "sock")

    def tearDown(self):
        shutil.rmtree(self.dir)

    def unreachable(self, text, path=None):
        path = path or self.path
        done = subprocess.run([CTL, "-s", path, "status"], capture_output=True, text=True,
                              timeout=DEADLINE, check=False)
        self.assertEqual((done.returncode, done.stdout), (5, ""))
        self.assertIn(path, done.stderr)
        self.assertIn(text, done.stderr)
        self.assertIn("try: ", done.stderr)

    def test_paths(self):
        self.unreachable("there is no socket")
        self.unreachable("is not a socket", self.dir)
        with open(self.path, "wb"):
            pass
        self.unreachable("is not a socket")
        os.unlink(self.path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.bind(self.path)
            sock.listen()
            self.unreachable("is not autoepd's socket for workers")
        os.unlink(self.path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.bind(self.path)
        self.unreachable("no daemon listens")


class Changing(Case):
    def test_from_joining_to_leaving(self):
        self.start()
        job = wait_until(lambda: [row for row in self.rows("jobs") if
                                  re.search(r"waits for rank 3\b", row["waiting"])],
                         "the job waits for rank 3 alone")[0]
        self.assertEqual((job["state"], job["ranks_present"]), ("joining", 3))
        wait_until(lambda: self.rows("jobs", node=1)[0]["ranks_present"] == 3,
                   "node 1 hears that three ranks have joined")
        rows = self.rows("workers")
        self.assertEqual([(row["node"], row["state"]) for row in rows],
                         [(0, "joining"), (0, "joining"), (1, "joining"), (-1, "missing")])
        for command in ("units", "tensors", "shards", "experts"):
            self.assertEqual(self.rows(command), [])
        self.assertIsNone(self.ask("groups")["ep_size"])
        self.refused("job 'moe' has no tensors yet", "shards", "--tensor", "embed.weight")
        self.tell("join")
        for rank in range(WORLD):
            self.await_file(f"ready.{rank}")
        self.tell("step")
        job = wait_until(lambda: [row for row in self.rows("jobs") if row["waiting"]],
                         "a step waits for rank 3")[0]
        self.assertEqual(job["state"], "stepping")
        self.assertRegex(job["waiting"], r"rank 3\b.*node 1")
        self.assertEqual([row["state"] for row in self.rows("workers")],
                         ["stepping"] * 3 + ["running"] * 2)
        self.tell("last")
        wait_until(lambda: self.rows("jobs")[0]["version"] == 2, "the step is applied")
        self.end()

    def check_pause(self, job, reason):
        self.assertRegex(job["waiting"], rf"\brank 3 pauses for 3[0-9]{{3}} s more: {reason}$")

    def test_a_rank_that_pauses(self):
        reason = "it writes a checkpoint"
        self.ready(PAUSE=reason)
        for node in range(2):
            wait_until(lambda n=node: self.rows("workers", node=n)[3]["state"] == "paused",
                       f"node {node} hears of the pause")
            rows = self.rows("workers", node=node)[:WORLD]
            self.assertEqual([row["state"] for row in rows], ["running"] * 3 + ["paused"])
            self.assertEqual([row["why"] for row in rows], [""] * 3 + [reason])
            self.assertEqual([row["pause_s"] for row in rows[:3]], [None] * 3)
            self.assertTrue(3600 - 10 * DEADLINE < rows[3]["pause_s"] <= 3600, rows[3])
            status = self.ask("status", node=node)
            self.assertEqual(status["jobs"][0]["state"], "running")
            self.check_pause(status["jobs"][0], reason)
            self.assertIn(reason, self.ctl("workers", node=node).stdout)
        self.tell("step")
        for node in range(2):
            self.check_pause(wait_until(lambda n=node: [
                row for row in self.rows("jobs", node=n) if "waits for rank 3 (node 1)"
                in row["waiting"]], f"node {node} hears who is waited for")[0], reason)
        self.tell("last")
        for node in range(2):
            wait_until(lambda n=node: self.rows("jobs", node=n)[0]["version"] == 2,
                       "the step is applied")
            self.assertEqual(self.rows("workers", node=node)[3]["pause_s"], None)
            self.assertEqual(self.rows("jobs", node=node)[0]["waiting"], "")
        self.end()

    def test_a_rank_that_leaves(self):
        self.ready()
        for name in ("step", "last", "early"):
            self.tell(name)
        for node in range(2):
            job = wait_until(lambda n=node: [row for row in self.rows("jobs", node=n)
                                             if row["ranks_present"] == 3],
                             f"node {node} hears that rank 3 has left")[0]
            self.assertEqual(job["state"], "leaving")
        self.end()

    def test_a_rank_that_dies(self):
        self.ready("shm", "--keep-going", "yes")
        pid = self.rows("workers", node=1)[3]["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: self.ctl("jobs").returncode == 3, "the job fails")
        job, = self.rows("jobs", code=3)
        self.assertEqual(job["state"], "failed")
        self.assertIn("rank 3", job["why"])
        self.assertIn(str(pid), job["why"])
        status = self.ask("status", code=3)
        self.assertEqual(status["health"], "degraded")
        self.assertRegex(status["why"], "^AEP_LOST: job 'moe' failed: rank 3")
        self.assertEqual(self.rows("workers", node=1, code=3)[3]["state"], "lost")
        self.assertIn("rank 3", self.ctl("jobs").stdout)
        self.tell("step")
        self.assertNotEqual(self.run.wait(DEADLINE), 0)

    def test_several_jobs(self):
        self.ready()
        self.attach("other", 2)
        wait_until(lambda: len(self.rows("jobs")) == 2, "the other job is there")
        for command in OF_ONE_JOB:
            self.refused("which job? node 0 has 2: 'moe', 'other'", command)
        self.assertEqual([row["name"] for row in self.rows("jobs", "--job", "other")], ["other"])
        self.assertEqual([row["name"] for row in self.ask("status", "--job", "moe")["jobs"]],
                         ["moe"])
        self.assertEqual(self.ask("workers", "--job", "other")["job"], "other")
        self.assertEqual([row["state"] for row in self.rows("workers", "--job", "other")],
                         ["joining", "missing"])
        self.assertEqual(len(self.rows("tensors", "--job", "moe", "--unit", "head")), 3)
        status, text = self.say("events")
        self.assertEqual(status, -16)
        self.assertIn("unknown command 'events': this daemon answers 'status', 'nodes'", text)
        self.assertEqual(self.say("status", version=VERSION + 1)[0], -7)
        self.end()

    def test_what_cannot_be_told(self):
        self.ready()
        self.attach("odd", 1, ODD="1")
        wait_until((self.dir / "odd" / "ready.0").exists, "the odd job is ready")
        odd, = self.rows("experts", "--job", "odd", "--tensor", "layer.1.odd")
        self.assertEqual((odd["expert"], odd["ranks"], odd["tokens"]), (None,) * 3)
        up = self.rows("experts", "--job", "odd", "--tensor", "layer.0.up")
        self.assertEqual([(row["expert"], row["ranks"], row["tokens"]) for row in up],
                         [(e, [0], None) for e in range(4)])
        for words in ((), ("--tensor", "huge.up")):
            self.refused("the answer to 'experts' is longer than", "experts", "--job", "odd", *words)
        self.assertEqual(len(self.rows("experts", "--job", "moe")), 8)
        self.end()


if __name__ == "__main__":
    unittest.main()
