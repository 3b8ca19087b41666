"""The wheel: what it carries, and that it works alone."""
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile

import pytest

import kvd as package
from conftest import BUILD, SOURCE

VERSION = re.search(r'#define KVD_VERSION "(.+)"', (SOURCE / "proto/kvd_limits.h").read_text())[1]
USE = """
import sys, kvd, kvd._library
assert kvd.__file__.startswith(sys.argv[2]), kvd.__file__
with kvd.Client(layers=[0], q_heads=1, kv_heads=1, head_dim=64, address=sys.argv[1]) as client:
    print(kvd.__version__, kvd.version(), client.info["version"], kvd._library.library()._name)
    print({line.split()[-1] for line in open("/proc/self/maps") if "libkvd_kernels" in line}.pop())
"""


def test_version_of_a_checkout():
    assert package.__version__ == VERSION
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        package.nonsense


@pytest.mark.parametrize("library", [True, False])
def test_wheel(kvd, folder, library):
    """Made from a copy of the sources, unpacked, used without anything else on the path."""
    if not all(importlib.util.find_spec(m) for m in ("setuptools", "wheel", "pip")):
        pytest.skip("there is no pip, setuptools or wheel")
    source = folder / "source/client/python"
    shutil.copytree(SOURCE / "client/python", source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    (folder / "source/proto").mkdir()
    for name in ("kvd_limits.h", "version.sh"):
        shutil.copy(SOURCE / "proto" / name, folder / "source/proto")
    env = {k: v for k, v in os.environ.items() if k not in ("KVD_LIBRARY", "PYTHONPATH")}
    built = {"KVD_LIBRARY": str(BUILD / "client/libkvd.so.0")}
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder / "wheels",
                    source], check=True, capture_output=True, timeout=100, env={**env, **(built if library else {})})
    wheel, = (folder / "wheels").iterdir()
    assert re.fullmatch(rf"kvd-{re.escape(VERSION)}-py3-none-{'linux_[a-z0-9_]+' if library else 'any'}\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        assert {"kvd/py.typed", "kvd/_version.py", "kvd/transformers.py", "kvd/engines/__init__.py", "kvd_worker/__main__.py"} <= set(names)
        assert ("kvd/libkvd.so.0" in names) == library == any(n.startswith("kvd/libkvd_kernels-") for n in names)
        licence, = (n for n in names if n.endswith("/LICENSE"))
        assert z.read(licence) == (SOURCE / "LICENSE").read_bytes()
        assert f"\nVersion: {VERSION}\n" in z.read(f"kvd-{VERSION}.dist-info/METADATA").decode()
        assert "kvd-worker" in z.read(f"kvd-{VERSION}.dist-info/entry_points.txt").decode()
        z.extractall(folder / "site")
    site = str(folder / "site")
    (folder / "site/kvd/libkvd.so.0").exists() and os.chmod(folder / "site/kvd/libkvd.so.0", stat.S_IRWXU)
    r = subprocess.run([sys.executable, "-c", USE, kvd.address, site], capture_output=True, text=True, timeout=30, cwd=folder,
                       env={**env, "PYTHONPATH": site, **({} if library else {"LD_LIBRARY_PATH": str(BUILD / "client")})})
    own = f"{site}/kvd/libkvd.so.0" if library else "libkvd.so.0"
    of_wheel, of_library, of_daemon, loaded, kernels = r.stdout.split()
    assert of_wheel == VERSION and of_library == of_daemon and loaded == own, r.stdout + r.stderr  # the build tells its commit too
    assert kernels.startswith(site + "/kvd/") == library, kernels


def test_a_wheel_of_a_missing_library(folder):
    if not (importlib.util.find_spec("setuptools") and importlib.util.find_spec("wheel")):
        pytest.skip("there are no setuptools and wheel")
    r = subprocess.run([sys.executable, SOURCE / "client/python/setup.py", "--version"], capture_output=True, text=True, cwd=folder, timeout=30,
                       env={**os.environ, "KVD_LIBRARY": "/nonexistent/libkvd.so.0"})
    assert r.returncode != 0 and "there is no such file" in r.stderr
