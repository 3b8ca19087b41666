"""Folders for what a bench and its kvd write. One goes when the bench says that all went well; else it stays, and its name is told at the end."""
import atexit
import pathlib
import shutil
import sys
import tempfile


def folder(prefix="kvd-bench."):
    path = pathlib.Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(_tell, path)
    return path


def remove(path):
    shutil.rmtree(path)


def _tell(path):
    if path.exists():
        print(f"{path} stays, with what was written there", file=sys.stderr)
