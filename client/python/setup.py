"""What pyproject.toml cannot say: the version is what proto/version.sh tells, as all parts of kvd have it, and the wheel carries libkvd.

The library is $KVD_LIBRARY, or that of a build in `build` at the top of the checkout; the kernels that it wants come with it. Without
one the wheel is Python alone and finds libkvd as the loader does, such as the one of the Debian package libkvd0.
"""
import os
import pathlib
import re
import shutil
import subprocess

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70
    from wheel.bdist_wheel import bdist_wheel

TOP = pathlib.Path(__file__).resolve().parents[2]
VERSION = subprocess.run(["sh", TOP / "proto/version.sh"], capture_output=True, text=True, check=True).stdout.strip()
LIBRARY = pathlib.Path(os.environ.get("KVD_LIBRARY") or TOP / "build/client/libkvd.so.0")
if "KVD_LIBRARY" in os.environ and not LIBRARY.exists():
    raise SystemExit(f"KVD_LIBRARY={LIBRARY}: there is no such file")


def kernels() -> pathlib.Path:
    """The private library of kernels that LIBRARY would load."""
    wanted = subprocess.run(["ldd", LIBRARY], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(libkvd_kernels-\S+) => (/\S+)", wanted)
    if not found:
        raise SystemExit(f"{LIBRARY}: its kernels (libkvd_kernels-....so) are not found from there")
    return pathlib.Path(found[2])


class Build(build_py):
    def run(self):
        super().run()
        package = pathlib.Path(self.build_lib, "kvd")
        (package / "_version.py").write_text(f'VERSION = "{VERSION}"\n')
        if LIBRARY.exists():
            shutil.copy(LIBRARY.resolve(), package / "libkvd.so.0")
            shutil.copy(kernels(), package)


class Wheel(bdist_wheel):
    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = not LIBRARY.exists()

    def get_tag(self):  # libkvd is called by ctypes: any Python will do
        return "py3", "none", super().get_tag()[2]


class Binary(Distribution):
    def has_ext_modules(self):
        return LIBRARY.exists()


setup(version=VERSION.replace("-", "+", 1), distclass=Binary, cmdclass={"build_py": Build, "bdist_wheel": Wheel})
