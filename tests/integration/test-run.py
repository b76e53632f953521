#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""autoep-run with stand-in daemons and shell workers.

usage: test-run.py AUTOEP_RUN

After every test nothing that it started may run any more, and its temporary directory must be as
empty as it was.
"""
import os
import pathlib
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import uuid

RUN = sys.argv.pop(1)
STANDIN = pathlib.Path(__file__).with_name("test-run-daemon.py")
DEADLINE = 20


def marked(mark):
    """Processes whose environment holds the mark: (pid, command line)."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():
                found.append((path.name, (path / "cmdline").read_bytes().replace(b"\0", b" ")))
        except OSError:
            continue
    return found


def wait_until(holds, what):
    end = time.monotonic() + DEADLINE
    while not holds():
        if time.monotonic() > end:
            raise AssertionError(f"{what} within {DEADLINE} s: it didn't happen")
        time.sleep(0.01)


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="test-run."))
        self.tmp = self.dir / "tmp"
        self.tmp.mkdir()
        self.mark = f"TEST_RUN_MARK={uuid.uuid4()}"
        name, value = self.mark.split("=")
        self.env = {key: value for key, value in os.environ.items()
                    if key not in ("XDG_RUNTIME_DIR", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        self.env.update({name: value, "TMPDIR": str(self.tmp), "AUTOEP_AUTOEPD": str(STANDIN),
                         "D": str(self.dir), "STANDIN_GO": str(self.dir / "go"),
                         "STANDIN_CLASHED": str(self.dir / "clashed")})

    def tearDown(self):
        try:
            wait_until(lambda: not marked(self.mark) and not any(self.tmp.iterdir()),
                       "nothing runs and nothing is left in the temporary directory")
        except AssertionError as error:
            left = [str(path) for path in self.tmp.rglob("*")]
            raise AssertionError(f"{error}: {marked(self.mark)} {left}") from None
        finally:
            for pid, _ in marked(self.mark):
                os.kill(int(pid), signal.SIGKILL)
            shutil.rmtree(self.dir)

    def start(self, options, script, **more):
        """Begins a run of `sh -c script`; the words of options stand in front."""
        return subprocess.Popen([RUN, *options.split(), "--", "sh", "-c", script], env=self.env,
                                stdin=more.pop("stdin", subprocess.DEVNULL),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)

    def end(self, process):
        process.out, process.err = process.communicate(timeout=DEADLINE)
        # By now, not only soon: the directory is gone before the launcher is.
        self.assertEqual(list(self.tmp.iterdir()), [])
        return process

    def run_it(self, options, script):
        return self.end(self.start(options, script))

    def assert_last(self, process, pattern):
        last = process.err.splitlines()[-1] if process.err else ""
        self.assertRegex(last, "^autoep-run: " + pattern + "$", process.err)

    def wait_for_file(self, name):
        wait_until((self.dir / name).exists, f"file {name} is there")


class Places(Case):
    """Who is where and is told what."""

    def test_uneven_workers_and_their_environment(self):
        names = ("AUTOEP_RANK AUTOEP_WORLD AUTOEP_NODE AUTOEP_LOCAL_RANK RANK WORLD_SIZE "
                 "LOCAL_RANK LOCAL_WORLD_SIZE AUTOEP_JOB OMP_NUM_THREADS OPENBLAS_NUM_THREADS")
        dump = " ".join("$" + name for name in names.split())
        self.env["OMP_NUM_THREADS"] = "5"
        self.env["NOTIFY_SOCKET"] = "/nowhere"
        done = self.run_it("--nodes 3 --workers 2,0,1 --job moe",
                           f'echo {dump} > $D/$RANK; echo "$AUTOEP_TOKEN ${{NOTIFY_SOCKET-none}} '
                           '$AUTOEP_SOCKET" > $D/s$RANK')
        self.assertEqual((done.returncode, done.err), (0, ""))
        got = [(self.dir / str(rank)).read_text().split() for rank in range(3)]
        self.assertEqual(got[0], "0 3 0 0 0 3 0 2 moe 5 1".split())
        self.assertEqual(got[1], "1 3 0 1 1 3 1 2 moe 5 1".split())
        self.assertEqual(got[2], "2 3 2 0 2 3 0 1 moe 5 1".split())
        secrets = [(self.dir / f"s{rank}").read_text().split() for rank in range(3)]
        self.assertRegex(secrets[0][0], "^[0-9a-f]{32}$")
        self.assertEqual({s[0] for s in secrets}, {secrets[0][0]})
        self.assertEqual({s[1] for s in secrets}, {"none"})
        self.assertEqual([os.path.basename(s[2]) for s in secrets],
                         ["node-0.sock", "node-0.sock", "node-2.sock"])

    def daemon_args(self, node):
        return (self.dir / f"args.{node}").read_text().split("\n")

    def test_daemon_command_line(self):
        self.env["STANDIN_ARGS"] = str(self.dir / "args")
        script = '[ $RANK = 1 ] || { echo $AUTOEP_SOCKET; stat -c %a ${AUTOEP_SOCKET%/*}; }'
        done = self.run_it("--nodes 2 --memory 3G", script)
        socket_of_0, mode = done.out.split()[:2]
        place = os.path.dirname(socket_of_0)
        self.assertEqual(mode, "700")
        self.assertEqual(os.path.dirname(place), str(self.tmp))
        for node in (0, 1):
            self.assertEqual(self.daemon_args(node), [
                "--dev", "--node", str(node), "--peers", f"{place}/peer-0.sock,{place}/peer-1.sock",
                "--socket", f"{place}/node-{node}.sock", "--transport", "shm",
                "--log-level", "info", "--memory", str(3 << 30)])

    def test_tcp_ports_differ(self):
        self.env["STANDIN_ARGS"] = str(self.dir / "args")
        self.assertEqual(self.run_it("--nodes 3 --transport tcp", ":").returncode, 0)
        peers = self.daemon_args(2)[4].split(",")
        self.assertEqual(len(set(peers)), 3)
        for peer in peers:
            self.assertRegex(peer, r"^127\.0\.0\.1:[1-9][0-9]+$")

    def test_a_taken_port_is_tried_again(self):
        self.env["STANDIN_ARGS"] = str(self.dir / "args")
        self.env["STANDIN"] = "clash"
        done = self.run_it("--nodes 2 --transport tcp", "echo fine")
        self.assertEqual(done.returncode, 0, done.err)
        self.assertIn("fine", done.out)
        taken = re.search(r"cannot listen on (\S+):", done.err).group(1)
        self.assertNotEqual(self.daemon_args(0)[4], taken)

    def test_ports_are_not_tried_for_ever(self):
        self.env["STANDIN"] = "clash-again"
        done = self.run_it("--transport tcp", "echo never")
        self.assertEqual((done.returncode, done.out), (1, ""))
        self.assertEqual(done.err.count("already in use"), 3)
        self.assert_last(done, r"the daemon of node 0 .* exited with 1 .*, before it was ready")


class Output(Case):
    """What is seen of whom."""

    def test_rank_0_is_untouched_and_others_are_prefixed(self):
        process = self.start("--workers 2", 'if [ $RANK = 0 ]; then printf "step 1\\rstep 2"; '
                             'touch $D/said; while [ ! -e $D/go ]; do sleep 0.01; done; echo; '
                             'else while [ ! -e $D/go ]; do sleep 0.01; done; '
                             'printf "one\\ntwo"; printf "xx\\rthree" >&2; fi')
        self.wait_for_file("said")
        # Here already, though no newline ended it.
        self.assertEqual(os.read(process.stdout.fileno(), 100), b"step 1\rstep 2")
        (self.dir / "go").touch()
        done = self.end(process)
        self.assertEqual((done.returncode, done.err), (0, "[1] three\n"))
        for line in ("[1] one\n", "[1] two\n"):
            self.assertIn(line, done.out)

    def test_lines_stay_whole(self):
        done = self.run_it("--workers 3", 'i=0; while [ $i -lt 50 ]; do i=$((i+1)); '
                           'printf "part $RANK " >&2; echo "$i end" >&2; done')
        lines = done.err.splitlines()
        self.assertEqual(len(lines), 150)
        for rank in range(3):
            mine = [line for line in lines if line.startswith(f"[{rank}] ")]
            self.assertEqual(mine, [f"[{rank}] part {rank} {i} end" for i in range(1, 51)])

    def test_one_rank_has_no_prefix(self):
        done = self.run_it("", "echo out; echo err >&2")
        self.assertEqual((done.out, done.err), ("out\n", "err\n"))

    def test_a_long_line_and_an_unfinished_one(self):
        done = self.run_it("--workers 2", 'test $RANK = 0 || { head -c 60000 /dev/zero | '
                           'tr "\\0" x; echo; printf end; }')
        self.assertEqual(done.out, "[1] " + 60000 * "x" + "\n[1] end\n")

    def test_what_a_tee_has_still_to_say(self):
        done = self.run_it("--workers 2", '[ $RANK = 0 ] || (sleep 0.2; echo late) & exit 0')
        self.assertEqual(done.out, "[1] late\n")

    def test_rank_0_reads_standard_input(self):
        process = self.start("--workers 2", "cat", stdin=subprocess.PIPE)
        process.stdin.write("hello\n")
        self.assertEqual(self.end(process).out, "hello\n")

    def test_rank_0_has_the_terminal(self):
        master, slave = pty.openpty()
        process = subprocess.Popen([RUN, "--workers", "2", "--", "sh", "-c",
                                    "test -t 1 && echo $RANK has a terminal; "
                                    "test -t 0 && echo but can not read it; :"],
                                   env=self.env, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.assertEqual(process.wait(timeout=DEADLINE), 0)
        seen = os.read(master, 4096).decode()
        os.close(master)
        self.assertIn("0 has a terminal\r\n", seen)
        self.assertNotIn("1 has", seen)
        self.assertNotIn("but", seen)

    def test_daemon_lines_by_level(self):
        self.env["STANDIN"] = "1:lines"
        shown = "[node 1] 12:34:56.789 autoepd {}: a line of level {}\n"
        quiet = self.run_it("--nodes 2", ":").err
        self.assertEqual(quiet.count("\n"), 3)
        self.assertIn(shown.format("error", "error"), quiet)
        self.assertIn(shown.format("warn", "warn"), quiet)
        self.assertIn("[node 1] a line without a level\n", quiet)
        loud = self.run_it("--nodes 2 --log-level info", ":").err
        self.assertIn(shown.format("info", "info"), loud)
        self.assertNotIn("level debug", loud)
        self.assertIn("[node 0] 12:34:56.789 autoepd info: node 0 starts\n", loud)


class Failures(Case):
    """The first failure ends all and is told last."""

    def test_an_exit_code(self):
        begin = time.monotonic()
        done = self.run_it("--workers 3", "test $RANK = 1 && exit 42; sleep 30")
        self.assertEqual(done.returncode, 42)
        self.assertLess(time.monotonic() - begin, 10)
        self.assert_last(done, r"rank 1 \(pid \d+\) exited with 42 after \d+\.\d s; "
                               "the others were stopped")

    def test_a_signal(self):
        done = self.run_it("--nodes 2 --workers 2",
                           'if [ $RANK = 3 ]; then kill -9 $$; fi; '
                           'trap "echo told >&2; exit 5" TERM; while :; do sleep 0.05; done')
        self.assertEqual(done.returncode, 137)
        self.assert_last(done, r"rank 3 \(pid \d+\) was killed by signal 9 \(Killed\) after "
                               r"\d+\.\d s; the others were stopped")

    def test_a_signal_before_an_exit_code(self):
        """Found ended at once: the one that was killed made the other one exit."""
        process = self.start("--workers 2", 'echo $$ > $D/half$RANK; mv $D/half$RANK $D/pid$RANK; '
                             'until [ -e $D/go ]; do sleep 0.05; done; '
                             '[ $RANK = 0 ] && exit 3; kill -9 $$')
        for rank in range(2):
            self.wait_for_file(f"pid{rank}")
        process.send_signal(signal.SIGSTOP)
        (self.dir / "go").touch()
        for rank in range(2):
            stat = pathlib.Path("/proc") / (self.dir / f"pid{rank}").read_text().strip() / "stat"
            wait_until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "Z",
                       f"rank {rank} has ended")
        process.send_signal(signal.SIGCONT)
        done = self.end(process)
        self.assertEqual(done.returncode, 137)
        self.assert_last(done, r"rank 1 \(pid \d+\) was killed by signal 9 \(Killed\) after .*")

    def test_alone(self):
        done = self.run_it("", "exit 3")
        self.assertEqual(done.returncode, 3)
        self.assert_last(done, r"rank 0 \(pid \d+\) exited with 3 after \d+\.\d s")

    def test_keep_going(self):
        done = self.run_it("--workers 2 --keep-going yes",
                           "test $RANK = 1 && exit 4; sleep 0.3; echo done")
        self.assertEqual((done.returncode, done.out), (4, "done\n"))
        self.assert_last(done, r"rank 1 .* exited with 4 .*; the others went on")

    def test_a_daemon_crashes(self):
        self.env["STANDIN"] = "1:crash"
        done = self.run_it("--nodes 2", "test $RANK = 0 && touch $D/go; sleep 30")
        self.assertEqual(done.returncode, 128 + signal.SIGSEGV)
        self.assertIn("[node 1] 12:34:56.789 autoepd info: node 1 starts\n", done.err)
        self.assertNotIn("[node 0]", done.err)
        self.assert_last(done, r"the daemon of node 1 \(pid \d+\) was killed by signal 11 "
                               r"\(Segmentation fault\) after \d+\.\d s; the others were stopped")

    def test_a_daemon_dies_early(self):
        self.env["STANDIN"] = "1:die"
        done = self.run_it("--nodes 2", "echo never")
        self.assertEqual((done.returncode, done.out), (7, ""))
        self.assertIn("[node 1] 12:34:56.789 autoepd info: node 1 starts\n", done.err)
        self.assert_last(done, r"the daemon of node 1 \(pid \d+\) exited with 7 after \d+\.\d s, "
                               "before it was ready")

    def test_a_daemon_is_never_ready(self):
        self.env["STANDIN"] = "1:mute"
        done = self.run_it("--nodes 2 --ready-timeout 0.7", "echo never")
        self.assertEqual((done.returncode, done.out), (1, ""))
        self.assert_last(done, r"the daemon of node 1 \(pid \d+\) was not ready within 0\.7 s; "
                               "its last word: reading the tea leaves")

    def test_a_daemon_complains_at_the_end(self):
        self.env["STANDIN"] = "0:complain"
        done = self.run_it("", ":")
        self.assertEqual(done.returncode, 9)
        self.assert_last(done, r"the daemon of node 0 .* exited with 9 .*, while it was stopping")

    def test_those_who_dont_listen(self):
        """A daemon and a worker that ignore SIGTERM, at the same time, for it takes 8 s."""
        self.env["STANDIN"] = "0:stubborn"
        daemon = self.start("", ":")
        del self.env["STANDIN"]
        begin = time.monotonic()
        worker = self.start("--workers 2", 'trap "" TERM; touch $D/deaf$RANK; test $RANK = 0 && '
                            'sleep 30; while [ ! -e $D/deaf0 ]; do sleep 0.01; done; exit 1')
        worker.out, worker.err = worker.communicate(timeout=DEADLINE)
        self.assertGreater(time.monotonic() - begin, 2.9)
        self.assertLess(time.monotonic() - begin, 10)
        self.assertEqual(worker.returncode, 1)
        self.end(daemon)
        self.assertEqual(daemon.returncode, 1)
        self.assert_last(daemon, r"the daemon of node 0 \(pid \d+\) did not end within 5 s of "
                                 "SIGTERM and was killed")

    def test_programs_that_cannot_run(self):
        for program, code, words in (("/nowhere/x", 127, "cannot start /nowhere/x: No such file"),
                                     ("/etc/passwd", 126, "cannot start /etc/passwd: Permission")):
            done = subprocess.run([RUN, program], env=self.env, capture_output=True, text=True,
                                  timeout=DEADLINE, check=False)
            self.assertEqual(done.returncode, code)
            self.assertTrue(done.stderr.startswith("autoep-run: " + words), done.stderr)
        self.env["AUTOEP_AUTOEPD"] = "/nowhere/autoepd"
        done = self.run_it("", ":")
        self.assertEqual(done.returncode, 127)
        self.assert_last(done, r"cannot run the daemon /nowhere/autoepd of \$AUTOEP_AUTOEPD: No.*")

    def test_usage(self):
        for options in ("", "--nodes 0 x", "--workers 1,2 x", "--frobnicate x", "--nodes"):
            done = subprocess.run([RUN, *options.split()], env=self.env, capture_output=True,
                                  text=True, timeout=DEADLINE, check=False)
            self.assertEqual(done.returncode, 2, options)
            self.assertRegex(done.stderr, "^autoep-run: .*\ntry: autoep-run --help\n$")


class Signals(Case):
    """The launcher is told to stop, or just dies."""

    def test_interrupt(self):
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            ready = self.dir / f"ready{number}"
            process = self.start("--workers 2", f'trap "echo got it >&2; exit 0" {int(number)}; '
                                 f'touch {ready}.$RANK; while :; do sleep 0.05; done')
            self.wait_for_file(ready.name + ".0")
            self.wait_for_file(ready.name + ".1")
            process.send_signal(number)
            done = self.end(process)
            self.assertEqual(done.returncode, code)
            # The shell may have words of its own about the sleep that died.
            said = {line for line in done.err.splitlines() if "got it" in line}
            self.assertEqual(said, {"[0] got it", "[1] got it"})
            self.assert_last(done, rf"stopped by signal {int(number)} \(.*\)")

    def test_second_interrupt_kills(self):
        process = self.start("", 'trap "touch $D/told" INT; touch $D/ready; '
                             'while :; do sleep 0.05; done')
        self.wait_for_file("ready")
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        self.wait_for_file("told")
        process.send_signal(signal.SIGINT)
        self.assertEqual(self.end(process).returncode, 130)
        self.assertLess(time.monotonic() - begin, 2.9)

    def test_interrupt_before_the_daemons_are_ready(self):
        self.env["STANDIN"] = "mute"
        self.env["STANDIN_ARGS"] = str(self.dir / "args")
        process = self.start("--nodes 2", "echo never")
        self.wait_for_file("args.0")
        process.send_signal(signal.SIGINT)
        done = self.end(process)
        self.assertEqual((done.returncode, done.out), (130, ""))

    def test_killed_launcher_leaves_nothing(self):
        process = self.start("--nodes 2 --workers 2",
                             'trap "" TERM HUP; sleep 60 & touch $D/ready$RANK; sleep 60')
        for rank in range(4):
            self.wait_for_file(f"ready{rank}")
        self.assertTrue(any(self.tmp.iterdir()))
        process.kill()
        process.communicate(timeout=DEADLINE)
        # tearDown() looks whether everything goes.

    def kill_guard(self):
        for pid, _ in marked(self.mark):
            try:
                name = pathlib.Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if name == "autoep-guard":
                os.kill(int(pid), signal.SIGKILL)
                return
        self.fail("no guard is there")

    def test_children_die_with_the_launcher_even_without_guard(self):
        process = self.start("--nodes 2 --workers 2",
                             'trap "" TERM HUP; touch $D/ready$RANK; exec sleep 60')
        for rank in range(4):
            self.wait_for_file(f"ready{rank}")
        self.kill_guard()
        process.kill()
        process.communicate(timeout=DEADLINE)
        wait_until(lambda: not marked(self.mark), "all children are gone")
        for place in self.tmp.iterdir():  # nobody is left to remove it
            shutil.rmtree(place)

    def test_killed_guard_is_made_up_for(self):
        process = self.start("", 'touch $D/ready; while [ ! -e $D/go ]; do sleep 0.01; done')
        self.wait_for_file("ready")
        self.kill_guard()
        (self.dir / "go").touch()
        self.assertEqual(self.end(process).returncode, 0)

    def test_what_workers_leave_behind(self):
        begin = time.monotonic()
        done = self.run_it("--workers 2", "sleep 60 & exit 0")
        self.assertEqual(done.returncode, 0)
        self.assertLess(time.monotonic() - begin, 10)


if __name__ == "__main__":
    unittest.main(verbosity=2)
