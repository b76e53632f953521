#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""dev itself: what it installs or asks for, what it refuses, what it starts, what it installs.

usage: test-dev.py

A copy of dev runs in a temporary folder with stand-ins first in PATH: dpkg-query knows what a test
says is installed, id says who runs it, and apt-get, meson and ninja note how they were called.
Installing is real, from a copy of the tree, but without optimization.
"""
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ("client", "deploy", "kernels", "proto", "server", "tests", "meson.build",
           "meson_options.txt")
USER, SUPERUSER = 1000, 0
ASK = "dev: some packages are missing. Run this, then try again:"
APT = "apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0"
STANDINS = {
    "dpkg-query": r"""
        [[ $1 == -W && $2 == -f && $3 == '${db:Status-Status}:${Package} ' ]] || exit 2
        rc=0
        for name in "${@:4}"; do
                if grep -qx "$name" "$D/installed"; then
                        printf 'installed:%s ' "$name"
                elif grep -qx "$name" "$D/removed"; then
                        printf 'config-files:%s ' "$name"
                else
                        echo "dpkg-query: no packages found matching $name" >&2
                        rc=1
                fi
        done
        exit "$rc" """,
    "id": '[[ $* == -u ]] && cat "$D/uid"',
    "apt-get": r"""
        echo "apt-get $*" >>"$D/calls"
        [[ $DEBIAN_FRONTEND == noninteractive ]] || exit 3
        echo "the words of apt-get"
        ! grep -qwf "$D/fails" <<<"$*" """,
    "meson": r"""
        echo "${CC+CC=$CC }meson $*" >>"$D/calls"
        [[ $1 == setup ]] && mkdir -p "$2" && touch "$2/build.ninja" """,
    "ninja": 'echo "ninja $*" >>"$D/calls"',
}


def packages(*arrays):
    """What dev's own lists name, where one of several does the first."""
    text = (ROOT / "dev").read_text(encoding="utf-8")
    names = []
    for array in arrays:
        body = re.search(rf"^{array}_packages=\((.*?)\)$", text, re.M | re.S)[1]
        names += [word.strip("'").split("|")[0] for word in body.split()]
    return names


BUILD = ("build",)
CLANG = ("build", "clang")
ALL = ("build", "clang", "lint")


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="test-dev."))
        self.addCleanup(shutil.rmtree, self.dir)
        self.tree = self.dir / "tree"
        self.tree.mkdir()
        shutil.copy2(ROOT / "dev", self.tree)
        self.bin = self.dir / "bin"
        self.bin.mkdir()
        for name, script in STANDINS.items():
            self.program(self.bin / name, script)
        self.path = f"{self.bin}:{os.environ['PATH']}"
        self.env = {}
        self.note("calls")
        self.note("removed")
        self.note("fails")
        self.world(USER, packages(*ALL))

    def program(self, path, script):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
        path.chmod(0o755)

    def note(self, name, *lines):
        (self.dir / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def calls(self):
        return (self.dir / "calls").read_text(encoding="utf-8").splitlines()

    def world(self, uid, installed):
        self.note("uid", uid)
        self.note("installed", *installed)

    def plain(self):
        """The environment, without what means something to dev, meson or autoep."""
        return {name: value for name, value in os.environ.items()
                if not name.startswith(("AUTOEP", "MESON", "DESTDIR", "DEBIAN", "CC", "CFLAGS",
                                        "NINJA"))}

    def dev(self, *words, code=0, cwd=None):
        done = subprocess.run([self.tree / "dev", *words], cwd=cwd or self.dir, text=True,
                              env={**self.plain(), "PATH": self.path, "D": str(self.dir), **self.env},
                              capture_output=True, stdin=subprocess.DEVNULL, check=False)
        self.assertEqual(done.returncode, code, f"dev {words}: {done.stdout}{done.stderr}")
        return done

    def assert_refused(self, words, last, start=""):
        done = self.dev(*words, code=1)
        self.assertEqual(done.stdout, "")
        self.assertEqual(done.stderr.splitlines()[-1], f"dev: {last}")
        self.assertTrue(done.stderr.startswith(start or f"dev: {last}"), done.stderr)
        self.assertEqual(self.calls(), [])


class Packages(Case):
    def assert_asks(self, words, names):
        done = self.dev(*words, code=1)
        self.assertEqual(done.stdout, "")
        self.assertEqual(done.stderr.splitlines(), [
            ASK, "sudo apt-get update && sudo apt-get install --no-install-recommends "
            + " ".join(names)])
        self.assertEqual(self.calls(), [])
        self.assertFalse((self.tree / "build").exists(), "nothing is begun")

    def test_a_user_is_shown_the_command(self):
        left = [name for name in packages(*ALL) if name not in ("meson", "scdoc")]
        self.world(USER, left)
        self.assert_asks(["build"], ["meson", "scdoc"])

    def test_what_each_command_needs(self):
        self.world(USER, [])
        for words, arrays in (("build", BUILD), ("build --release", BUILD), ("train", BUILD),
                              ("bench", BUILD), ("install out", BUILD), ("build --asan", CLANG),
                              ("build --tsan", CLANG), ("build --clang", CLANG),
                              ("fuzz --seconds 1", CLANG), ("test", ALL), ("test unit", ALL),
                              ("test --all", ALL), ("lint", ALL)):
            with self.subTest(words):
                if words.startswith("fuzz"):
                    (self.tree / "tests" / "fuzz").mkdir(parents=True)
                    (self.tree / "tests" / "fuzz" / "fuzz-x.c").touch()
                self.assert_asks(words.split(), packages(*arrays))

    def test_either_of_two_will_do(self):
        others = [name for name in packages(*BUILD) if name != "libopenblas-serial-dev"]
        self.world(USER, others)
        self.assert_asks(["build"], ["libopenblas-serial-dev"])
        self.world(USER, others + ["libopenblas-dev"])
        self.dev("build")

    def test_what_was_removed_is_missing(self):
        self.world(USER, [name for name in packages(*BUILD) if name != "gcc"])
        self.note("removed", "gcc")
        self.assert_asks(["build"], ["gcc"])

    def test_root_installs_and_goes_on(self):
        self.world(SUPERUSER, [])
        names = " ".join(packages(*BUILD))
        done = self.dev("build")
        self.assertIn(f"dev: installing {names}\n", done.stderr)
        self.assertEqual(self.calls(), [
            f"{APT} update", f"{APT} install -y --no-install-recommends {names}",
            "CC=gcc meson setup build/debug --buildtype=debugoptimized", "ninja -C build/debug"])

    def test_root_installs_only_what_is_missing(self):
        self.world(SUPERUSER, [name for name in packages(*CLANG) if name not in ("llvm", "gcc")])
        self.dev("build", "--clang")
        self.assertEqual(self.calls()[1], f"{APT} install -y --no-install-recommends gcc llvm")
        self.assertEqual(self.calls()[2],
                         "CC=clang meson setup build/clang --buildtype=debugoptimized")

    def test_a_dead_source_does_not_matter(self):
        self.world(SUPERUSER, [])
        self.note("fails", "update")
        self.dev("build")
        self.assertEqual(self.calls()[-1], "ninja -C build/debug")

    def test_installing_fails(self):
        self.world(SUPERUSER, [])
        self.note("fails", "install")
        done = self.dev("build", code=1)
        self.assertIn("the words of apt-get\n", done.stderr)
        self.assertEqual(done.stderr.splitlines()[-1], "dev: cannot install packages: the end of "
                         "build/packages.log is above")
        self.assertEqual(len(self.calls()), 2)

    def test_nothing_is_missing(self):
        for uid in (USER, SUPERUSER):
            self.world(uid, packages(*BUILD))
            self.note("calls")
            self.dev("build", "--release")
            self.assertEqual([call for call in self.calls() if "apt-get" in call], [])
            self.assertEqual(self.calls()[-1], "ninja -C build/release")

    def test_another_system(self):
        self.world(USER, [])
        (self.bin / "dpkg-query").unlink()
        for name in ("bash", "cat", "dirname", "env", "mkdir", "rm", "touch"):
            (self.bin / name).symlink_to(shutil.which(name))
        self.path = str(self.bin)
        done = self.dev("build")
        self.assertEqual(done.stderr.splitlines()[0],
                         "dev: this is not Debian: cannot check for packages, going on")
        self.assertEqual(self.calls()[-1], "ninja -C build/debug")


class Words(Case):
    def test_usage(self):
        for words in ((), ("help",), ("-h",), ("--help",)):
            done = self.dev(*words)
            self.assertTrue(done.stdout.startswith("usage: ./dev COMMAND\n"), done.stdout)
            self.assertEqual(done.stderr, "")
        known = set(re.findall(r"^  ([a-z]+)\b", done.stdout, re.M))
        text = (ROOT / "dev").read_text(encoding="utf-8")
        self.assertEqual(known, set(re.findall(r"^        ([a-z]+)\) (?:cmd_|rm)", text, re.M)))
        self.assertEqual(self.calls(), [])

    def test_unknown_words(self):
        self.world(SUPERUSER, [])
        self.assert_refused(["trains"], "unknown command 'trains'", "usage: ./dev COMMAND\n")
        self.assert_refused(["--fast"], "unknown command '--fast'", "usage: ./dev COMMAND\n")
        self.assert_refused(["build", "--fast"], "unknown option '--fast' of build: use --release, "
                            "--asan, --tsan or --clang")
        self.assert_refused(["fuzz", "--fast"], "unknown option '--fast' of fuzz: use --seconds N")
        self.assert_refused(["fuzz", "--seconds", "x"], "'x' is not a number of seconds")
        self.assert_refused(["fuzz", "nothing"], "there is no fuzz target 'nothing'")
        self.assert_refused(["test", "units"], "unknown suite 'units': suites are lint unit net sim "
                            "integration stress fuzz")
        for words in ((), ("",), ("a", "b"), ("--prefix",)):
            self.assert_refused(["install", *words], "install needs one PREFIX")

    def test_clean(self):
        (self.tree / "build" / "debug").mkdir(parents=True)
        self.dev("clean")
        self.assertEqual([path.name for path in self.tree.iterdir()], ["dev"])


class Train(Case):
    def setUp(self):
        super().setUp()
        release = self.tree / "build" / "release"
        self.run = release / "client" / "run" / "autoep-run"
        self.lm = release / "client" / "examples" / "moe-lm" / "moe-lm"

    def train(self, *words):
        """The words that autoep-run was given for these; dev runs in the temporary folder."""
        self.program(self.dir / "run", 'printf "%s\\n" "$PWD" "$@"')
        self.program(self.bin / "ninja", f"""{STANDINS["ninja"]}
            mkdir -p {self.run.parent} && cp "$D/run" {self.run}""")
        place, *given = self.dev("train", *words).stdout.splitlines()
        self.assertEqual(place, str(self.dir))
        return given

    def test_defaults(self):
        self.assertEqual(self.train(), ["--nodes", "2", "--workers", "2", "--", str(self.lm),
                                        "/usr/share/common-licenses"])
        self.assertEqual(self.calls(), [
            "CC=gcc meson setup build/release --buildtype=release",
            "ninja -C build/release server/autoepd client/run/autoep-run "
            "client/examples/moe-lm/moe-lm"])

    def test_options(self):
        (self.dir / "text").touch()
        self.assertEqual(
            self.train("text", "--nodes", "3", "--steps", "5", "--workers=1", "--svg", "a b.svg"),
            ["--nodes", "3", "--workers", "1", "--", str(self.lm), "text", "--steps", "5", "--svg",
             "a b.svg"])

    def test_refused(self):
        self.assert_refused(["train", "nowhere"], "cannot read 'nowhere'")
        self.assert_refused(["train", "--nodes"], "--nodes needs a number")
        self.assert_refused(["train", "--steps", "2", "--workers"], "--workers needs a number")

    def test_help(self):
        """What it lists is the test train-help's; here, that it needs neither packages nor a build."""
        self.world(SUPERUSER, [])
        options = pathlib.Path("client", "examples", "moe-lm", "options.h")
        (self.tree / options).parent.mkdir(parents=True)
        shutil.copy2(ROOT / options, self.tree / options)
        for word in ("--help", "-h"):
            done = self.dev("train", word)
            self.assertEqual(done.stderr, "")
            for part in ("usage: ./dev train", "--nodes N", "--workers M", "--steps 300"):
                self.assertIn(part, done.stdout)
        self.assertEqual(self.calls(), [])


class Install(Case):
    def setUp(self):
        super().setUp()
        for name in ("meson", "ninja", "id"):
            (self.bin / name).unlink()
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, self.tree / name)
        self.program(self.bin / "gcc", f'exec {shutil.which("gcc")} "$@" -O0')
        self.program(self.bin / "id", 'cat "$D/uid"')
        self.program(self.bin / "ldconfig", 'echo "ldconfig $*" >>"$D/calls"')

    def run_installed(self, prefix, command):
        env = {**self.plain(), "PATH": f"{prefix}/bin:{os.environ['PATH']}",
               "LD_LIBRARY_PATH": f"{prefix}/lib", "PKG_CONFIG_PATH": f"{prefix}/lib/pkgconfig"}
        done = subprocess.run(["bash", "-ec", command], cwd=self.dir, env=env, text=True,
                              capture_output=True, check=False)
        self.assertEqual((done.returncode, done.stderr), (0, ""), command)
        return done.stdout

    def test_install(self):
        # Below the folder where it was called, as a user; with what README.md says it works there.
        prefix = self.dir / "of a user" / "out"
        prefix.parent.mkdir()
        done = self.dev("install", "out", cwd=prefix.parent)
        self.assertIn(f"dev: to use what is below {prefix}, set PATH", done.stderr)
        self.assertEqual(sorted(path.name for path in prefix.iterdir()),
                         ["bin", "include", "lib", "share"])
        self.assertTrue((prefix / "lib" / "libautoep.so").exists())
        self.assertEqual(self.run_installed(
            prefix, "autoep-run --nodes 1 --workers 1 -- sh -c 'command -v autoepd'"),
            f"{prefix}/bin/autoepd\n")
        self.assertEqual(self.run_installed(
            prefix, "pkg-config --variable=prefix autoep").replace("\\ ", " "), f"{prefix}\n")
        self.assertEqual(self.calls(), [])

        # The same build, now for /usr/local below DESTDIR; then as root, without one.
        self.env["DESTDIR"] = "stage"
        done = self.dev("install", "/usr/local")
        self.assertNotIn("to use what is below", done.stderr)
        place = self.dir / "stage" / "usr" / "local"
        self.assertIn("prefix=/usr/local\n",
                      (place / "lib" / "pkgconfig" / "autoep.pc").read_text(encoding="utf-8"))
        self.assertEqual(self.calls(), [])
        del self.env["DESTDIR"]
        self.note("uid", SUPERUSER)
        self.dev("install", self.dir / "third")
        self.assertTrue((self.dir / "third" / "bin" / "autoepd").exists())
        self.assertEqual(self.calls(), ["ldconfig "])


if __name__ == "__main__":
    unittest.main()
