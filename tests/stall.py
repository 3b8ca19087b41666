#!/usr/bin/env python3
"""Runs end-to-end tests while processes of theirs are stopped for a second or two, one after the other, as a busy machine does it to them:
what a test takes for granted between two of its lines shows then. A test that asks for less than such a stop may fail of that, and few
should.

usage: KVD_BUILD=$PWD/build tests/stall.py [ARGUMENT OF PYTEST...]      in the folder of the sources
  KVD_STALL_SECONDS=1,2.5   how long one is stopped, at least and at most
  KVD_STALL_EVERY=1.6       seconds from one to the next, on average
  KVD_STALL_ONLY=kvd,kvctl  programs that are stopped (default: all, pytest's too)
"""
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

LEAST, MOST = map(float, os.environ.get("KVD_STALL_SECONDS", "1,2.5").split(","))
EVERY = float(os.environ.get("KVD_STALL_EVERY", 1.6))
ONLY = set(filter(None, os.environ.get("KVD_STALL_ONLY", "").split(",")))
MARK = f"KVD_STALL_RUN={os.getpid()}"  # in the environment of all that the run starts


def running(pytest):
    """Its processes that are not stopped, by the names of their programs."""
    found = {}
    for process in pathlib.Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == pytest.pid:
            continue
        try:
            name, state = (process / "comm").read_text().strip(), (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if state not in "TtZX" and (not ONLY or name in ONLY) and MARK.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.setdefault(name, []).append(int(process.name))
        except (OSError, IndexError):  # it has ended meanwhile
            continue
    return found


def tell(process, sig):
    try:
        os.kill(process, sig)
    except ProcessLookupError:
        pass


def main():
    env = {**os.environ, "KVD_STALL_RUN": str(os.getpid())}
    pytest = subprocess.Popen([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *sys.argv[1:]], env=env,
                              cwd=pathlib.Path(__file__).parent / "e2e")
    stopped, n = {}, 0
    try:
        while pytest.poll() is None:
            for process in [p for p, end in stopped.items() if time.monotonic() >= end]:
                tell(process, signal.SIGCONT)
                del stopped[process]
            if programs := running(pytest):
                process = random.choice(random.choice(list(programs.values())))
                stopped[process], n = time.monotonic() + random.uniform(LEAST, MOST), n + 1
                tell(process, signal.SIGSTOP)
            time.sleep(random.uniform(0.2, 1.8) * EVERY)
    finally:
        for process in stopped:
            tell(process, signal.SIGCONT)
        pytest.terminate()
    print(f"{n} times a process was stopped")
    return pytest.wait()


if __name__ == "__main__":
    sys.exit(main())
