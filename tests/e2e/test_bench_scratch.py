"""What benches leave behind: nothing when all went well, else a folder of which they tell."""
import os
import re
import subprocess
import sys

import pytest

from conftest import BUILD, SOURCE

pytestmark = pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
BENCHES = SOURCE / "tests/bench"


def run(tmp_path, build):
    return subprocess.run([sys.executable, BENCHES / "bench_windows.py", build, "2048"], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "TMPDIR": str(tmp_path), "KVD_LIBRARY": str(BUILD / "client/libkvd.so.0")})


def test_nothing_stays_when_all_went_well(tmp_path):
    r = run(tmp_path, BUILD)
    assert r.returncode == 0 and "2048 tokens" in r.stdout and not r.stderr, r.stderr
    assert not list(tmp_path.iterdir())


def test_what_stays_is_told(tmp_path):
    kvd = tmp_path / "build/daemon/kvd"
    kvd.parent.mkdir(parents=True)
    kvd.write_text("#!/bin/sh\necho why it does not start >&2\nexit 1\n")
    kvd.chmod(0o755)
    r = run(tmp_path, tmp_path / "build")
    said = re.search(r"^(\S+) stays", r.stderr, re.M)
    assert r.returncode and "why it does not start" in r.stderr and said, r.stderr
    assert "why it does not start" in open(f"{said[1]}/log").read()


def test_every_bench_does_so():
    for bench in BENCHES.glob("*.py"):
        text = bench.read_text()
        assert "tempfile" not in text or bench.name == "scratch.py", f"{bench}: folders are scratch.py's"
        assert text.count("scratch.folder(") <= text.count("scratch.remove("), bench
