#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What is installed is whole and works from where it lies, with the page of C of README.md.

usage: test-install.py MESON BUILD_DIR

Installs into a temporary DESTDIR and looks at nothing else of the tree but README.md, autoep.h's
list of functions, and the lines for a shell that README.md shows.
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

BUILD = pathlib.Path(sys.argv.pop()).resolve()
MESON = sys.argv.pop()
ROOT = pathlib.Path(__file__).resolve().parents[2]
DEADLINE = 100
FILES = {
    "bin/autoep-bench", "bin/autoep-ctl", "bin/autoep-run", "bin/autoepd",
    "include/autoep.h",
    "LIB/libautoep.so", "LIB/libautoep.so.0", "LIB/libautoep.so.0.1.0", "LIB/pkgconfig/autoep.pc",
    "lib/systemd/system/autoepd.service", "lib/sysusers.d/autoep.conf",
    "share/bash-completion/completions/autoep-ctl.bash",
    "share/bash-completion/completions/autoep-run.bash",
    "share/doc/autoep/SCHEMA.md", "share/doc/autoep/autoepd.conf.example",
    "share/man/man1/autoep-bench.1", "share/man/man1/autoep-ctl.1", "share/man/man1/autoep-run.1",
    "share/man/man3/libautoep.3", "share/man/man8/autoepd.8",
}


def functions():
    """Those of autoep.h; each has a manual page."""
    text = (ROOT / "client" / "autoep.h").read_text(encoding="utf-8")
    return set(re.findall(r"^AUTOEP_API [^(]*?\b(autoep_\w+)\(", text, re.M))


def setting(name):
    done = subprocess.run([MESON, "introspect", "--buildoptions", str(BUILD)], check=True,
                          capture_output=True, text=True)
    found = re.search(rf'"name": "{name}", "value": "([^"]*)"', done.stdout)
    return found[1]


class Installed(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.work = pathlib.Path(tempfile.mkdtemp(prefix="test-install."))
        cls.prefix = setting("prefix")
        cls.libdir = setting("libdir")
        cls.place = cls.work / "dest" / cls.prefix.lstrip("/")
        subprocess.run([MESON, "install", "-C", str(BUILD), "--no-rebuild"], check=True,
                       capture_output=True, env={**os.environ, "DESTDIR": str(cls.work / "dest")})

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.work)

    def run_in(self, command, **more):
        """A line for the shell, as a user of the installed tree would have it."""
        pkgconfig = self.place / self.libdir / "pkgconfig"
        env = {**os.environ, "PATH": f"{self.place}/bin:{os.environ['PATH']}",
               "LD_LIBRARY_PATH": str(self.place / self.libdir), "PKG_CONFIG_LIBDIR": str(pkgconfig),
               "PKG_CONFIG_SYSROOT_DIR": str(self.work / "dest"),
               "PKG_CONFIG_ALLOW_SYSTEM_CFLAGS": "1", "PKG_CONFIG_ALLOW_SYSTEM_LIBS": "1",
               "MANPATH": str(self.place / "share" / "man"), **more}
        for name in [name for name in env if name.startswith("AUTOEP")]:
            del env[name]
        done = subprocess.run(["bash", "-ec", command], cwd=self.work, env=env, capture_output=True,
                              text=True, timeout=DEADLINE, check=False)
        self.assertEqual((done.returncode, done.stderr), (0, ""), command)
        return done.stdout

    def test_the_files(self):
        found = {str(path.relative_to(self.place)) for path in self.place.rglob("*")
                 if not path.is_dir()}
        wanted = {name.replace("LIB/", f"{self.libdir}/") for name in FILES}
        wanted |= {f"share/man/man3/{name}.3" for name in functions()}
        self.assertEqual(found, wanted)
        self.assertGreater(len(functions()), 20)
        self.assertEqual([path.name for path in (self.work / "dest").iterdir()],
                         [pathlib.PurePath(self.prefix).parts[1]], "all is below the prefix")

    def test_the_page_of_c(self):
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        program = re.search(r"^```c\n(.*?)^```$", readme, re.M | re.S)[1]
        line, = re.findall(r"^    (cc .* hello\.c .*pkg-config.*)$", readme, re.M)
        (self.work / "hello.c").write_text(program, encoding="utf-8")
        self.run_in(line.replace("cc ", "cc -Wall -Wextra -Werror ", 1))
        needed = self.run_in("readelf -d hello")
        self.assertRegex(needed, r"NEEDED.*\[libautoep\.so\.0\]")
        run, = re.findall(r"autoep-run --nodes 2 --workers 2 -- .*hello$", program, re.M)
        self.assertTrue(run.endswith("-- hello"))
        out = self.run_in("PATH=$PWD:$PATH; " + run)
        versions = re.findall(r"version (\d+): the weights are ([\d.]+)", out)
        self.assertEqual([int(version) for version, _ in versions], list(range(10)))
        self.assertAlmostEqual(float(versions[-1][1]), 1.5, delta=1.5 / 256)

    def test_a_c99_program_and_its_version(self):
        (self.work / "v.c").write_text(
            "#include <autoep.h>\n#include <stdio.h>\n"
            "int main(void) { return puts(autoep_strerror(AUTOEP_ELOST)) < 0; }\n",
            encoding="utf-8")
        self.run_in("cc -std=c99 -pedantic-errors -o v v.c $(pkg-config --cflags --libs autoep)")
        self.assertNotEqual(self.run_in("./v").strip(), "")
        version = self.run_in("pkg-config --modversion autoep").strip()
        for program in ("autoepd", "autoep-run", "autoep-ctl", "autoep-bench"):
            self.assertIn(version, self.run_in(f"{program} --version"))

    def test_the_service(self):
        if not shutil.which("systemd-analyze"):
            self.skipTest("systemd-analyze is not installed")
        unit = self.place / "lib" / "systemd" / "system" / "autoepd.service"
        text = unit.read_text(encoding="utf-8")
        self.assertIn(f"ExecStart={self.prefix}/bin/autoepd --config /etc/autoep/autoepd.conf\n",
                      text)
        self.assertNotIn("@bindir@", text)
        copy = self.work / "autoepd.service"
        copy.write_text(text.replace(f"={self.prefix}/bin", f"={self.place}/bin"), encoding="utf-8")
        self.assertEqual(self.run_in(
            f"systemd-analyze --man=no --recursive-errors=no verify {copy}"), "")
        self.run_in(f"systemd-sysusers --dry-run {self.place}/lib/sysusers.d/autoep.conf 2>&1")

    def test_the_example_configuration(self):
        example = self.place / "share" / "doc" / "autoep" / "autoepd.conf.example"
        text = example.read_text(encoding="utf-8")
        self.assertIn("# An example of /etc/autoep/autoepd.conf", text)
        peers = re.sub(r"^peers = .*$", "peers =", text, flags=re.M)
        (self.work / "autoepd.conf").write_text(
            f"{peers}\nsocket = {self.work}/s\nmemory = 64M\n", encoding="utf-8")
        daemon = subprocess.Popen([self.place / "bin" / "autoepd", "--config",
                                   self.work / "autoepd.conf"], stderr=subprocess.PIPE, text=True)
        self.addCleanup(daemon.wait)
        self.addCleanup(daemon.kill)
        for line in daemon.stderr:
            if " serves " in line:
                break
        else:
            self.fail(f"autoepd ended with {daemon.wait()}")
        status = self.run_in(f"autoep-ctl -s {self.work}/s status")
        daemon.terminate()
        daemon.stderr.close()
        self.assertEqual(daemon.wait(DEADLINE), 0)
        self.assertRegex(status, r"health +ok")

    def complete(self, file, *words):
        quoted = " ".join(f"'{word}'" for word in words)
        return self.run_in(f"source {self.place}/share/bash-completion/completions/{file}.bash\n"
                           f"COMP_WORDS=({file} {quoted}) COMP_CWORD={len(words)}\n"
                           f"_{file.replace('-', '_')}; echo ${{COMPREPLY[*]}}").split()

    def test_completion(self):
        self.assertIn("shards", self.complete("autoep-ctl", "sh"))
        self.assertEqual(self.complete("autoep-run", "--no"), ["--nodes"])
        self.assertEqual(self.complete("autoep-run", "--nodes", "2", "--transport", ""),
                         ["shm", "tcp"])
        self.assertEqual(self.complete("autoep-run", "--nodes=2", "--", "x", "--"), [])
        options = self.run_in("autoep-run --help")
        self.assertEqual(set(self.complete("autoep-run", "-")),
                         set(re.findall(r"^  (--[a-z-]+)", options, re.M)))


if __name__ == "__main__":
    unittest.main()
