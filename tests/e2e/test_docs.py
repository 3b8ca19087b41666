"""The pages for users say nothing that does not work: every command in them is run, one page after the other as a user would.

Blocks marked sh run here, a page in one shell, with kvd's programs on the PATH as if they were installed. Blocks marked console want a
booted system: tests/packages.sh runs the same lines there.
"""
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import dumps
from conftest import BUILD, SOURCE

PAGES = {"deploy/OPERATOR.md": False, "client/WORKER.md": True, "calib/CALIBRATE.md": False}  # whether it wants a daemon


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (SOURCE / page).read_text(), re.M | re.S)


@pytest.fixture
def installed(folder):
    """An environment in which kvd looks installed."""
    path, pc = folder / "bin", folder / "pkgconfig"
    path.mkdir()
    pc.mkdir()
    for program in ("daemon/kvd", "client/kvctl", "client/kvctl-calib", "client/kvd-demo"):
        (path / os.path.basename(program)).symlink_to(BUILD / program)
    (path / "python3").symlink_to(sys.executable)
    (pc / "kvd.pc").write_text(f"Name: kvd\nDescription: kvd\nVersion: 0\nCflags: -I{SOURCE}/client/include\n"
                               f"Libs: -L{BUILD}/client -Wl,-rpath,{BUILD}/client -lkvd\n")
    return {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", "PKG_CONFIG_PATH": str(pc), "KVD_SOURCE": str(SOURCE),
            "PYTHONPATH": str(SOURCE / "client/python"), "KVD_LIBRARY": str(BUILD / "client/libkvd.so.0"), "XDG_CACHE_HOME": str(folder)}


def record(folder):
    """Three recordings of a small model."""
    for i, name in enumerate(("recorded", "others", "held-out")):
        (folder / name).mkdir()
        layers = dumps.activations(np.random.SeedSequence().entropy % 2**32 + i, 2560, 4, 2, 64, 64, (0, 1))
        dumps.write(folder / name / "shard.safetensors",
                    {f"layers.{l}.{side}": ("BF16", x) for l, qkv in layers.items() for side, x in zip("qkv", qkv)})


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page(page, folder, installed, start):
    if page.startswith("calib"):
        record(folder)
    if PAGES[page]:
        installed["KVD_ADDRESS"] = start().address
    script = "".join(blocks(page, "sh"))
    assert script
    work = folder / "work"
    work.mkdir()
    for name in ("recorded", "others", "held-out"):
        if (folder / name).exists():
            (work / name).symlink_to(folder / name)
    r = subprocess.run(["bash", "-euxc", "trap 'rc=$?; kill $(jobs -p) 2>/dev/null || true; wait; exit $rc' EXIT\n" + script], cwd=work, env=installed,
                       capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, (r.stdout + r.stderr)[-4000:]


def test_a_worker_in_a_checkout_without_installing(folder):
    """The page's commands that come before, in a folder that looks like a checkout with its build."""
    for entry in SOURCE.iterdir():
        if not entry.name.startswith((".", "build")):
            (folder / entry.name).symlink_to(entry)
    (folder / "build").symlink_to(BUILD)
    script = "".join(blocks("client/WORKER.md", "bash") + blocks("client/WORKER.md", "sh")[:1])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("KVD_", "PKG_CONFIG"))}
    r = subprocess.run(["bash", "-euxc", "trap 'rc=$?; kill $(jobs -p); wait; exit $rc' EXIT\n" + script], cwd=folder, env=env,
                       capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, (r.stdout + r.stderr)[-4000:]


def test_what_the_demo_does_not_understand():
    demo = BUILD / "client/kvd-demo"
    r = subprocess.run([demo, "writes", "unix:/none", "/none", "hadamard"], capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.startswith("usage: ")
    r = subprocess.run([demo, "read", "unix:/none", "/none", "hadamard"], capture_output=True, text=True)
    assert r.returncode == 1 and "/none: No such file" in r.stderr


def test_commands_for_booted_systems_are_those_that_are_tested_there():
    tested = (SOURCE / "tests/packages.sh").read_text()
    for page in PAGES:
        for line in "".join(blocks(page, "console")).splitlines():
            assert line in tested, line
