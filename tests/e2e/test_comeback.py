"""A worker that starts while kvd is being started again: it waits for a kvd that somebody will start, and for no other. Whoever starts it is
stopped here for as long as a test wants."""
import contextlib
import fcntl
import os
import signal
import socket
import stat
import struct
import subprocess
import threading
import time

import pytest

import kvd as package
from conftest import BUILD
from test_keep import kill, pid_of
from test_pages import connect, keys_of, wait_until

pytestmark = pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
OFD_GETLK, FLOCK = 36, "hhqqi4x"


@contextlib.contextmanager
def gone(keeper):
    """kvd has been killed, and is not started before the end of this."""
    was = pid_of(keeper)
    os.kill(keeper.process.pid, signal.SIGSTOP)
    try:
        os.kill(was, signal.SIGKILL)
        wait_until(lambda: refuses(keeper))
        keeper.lives = keeper.text().count("ready version") + 1
        yield
    finally:
        os.kill(keeper.process.pid, signal.SIGCONT)


def refuses(kvd):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        return s.connect_ex(f"{kvd.socket}.fd") != 0


def opened(kvd, **options):
    """How long it took to open a client, and what came of it."""
    began = time.monotonic()
    try:
        with connect(kvd, **options) as p:
            p.lookup([keys_of("any", 1)])
            return time.monotonic() - began, None
    except package.Error as e:
        return time.monotonic() - began, e


def marked(kvd):
    """As a worker asks for it."""
    with open(f"{kvd.socket}.kept", "rb") as f:
        return struct.unpack(FLOCK, fcntl.fcntl(f, OFD_GETLK, struct.pack(FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0)))[0] != fcntl.F_UNLCK


@pytest.mark.parametrize("keep", ["yes", "fresh"])
def test_who_opens_meanwhile_waits_for_the_next_kvd(start, keep):
    keeper = start(config=f"[kvd]\nkeep = {keep}\n")
    for _ in range(3):  # the mark is handed on
        took = []
        with gone(keeper):
            begins = threading.Event()
            t = threading.Thread(target=lambda: took.append((begins.set(), opened(keeper, timeout=20))[1]))
            t.start()
            begins.wait()
            time.sleep(0.7)
            assert not took
        t.join(20)
        assert took[0][1] is None
        keeper.wait_ready()
        assert marked(keeper)


def test_who_has_read_that_it_is_ready_may_count_on_the_next_one(start):
    """Its keeper starts a kvd again that has served, and knows of that before those who read the log do: here they run instead of kvd as
    soon as there is something to read."""
    first = start("--keep")
    first.stop()
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        with subprocess.Popen(["chrt", "--idle", "0", *first.command], stderr=subprocess.PIPE, text=True) as keeper:
            for wanted in ("ready version", "it is started again", "ready version"):
                line = next(line for line in keeper.stderr if wanted in line or "kvd-keeper" in line)
                assert wanted in line, line
                if wanted == "ready version":
                    os.kill(int(open(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read().split()[0]), signal.SIGKILL)
            keeper.terminate()
            keeper.stderr.read()
    finally:
        os.sched_setaffinity(0, cpus)


def test_no_longer_than_its_own_time(start):
    keeper = start("--keep")
    with gone(keeper):
        took, error = min((opened(keeper, timeout=0.6) for _ in range(3)), key=lambda x: x[0])
        assert isinstance(error, package.UnavailableError) and 0.59 <= took < 3, took  # libkvd counts whole milliseconds
        assert "is being started again, and 600 ms were not enough" in str(error) and str(keeper.socket) in str(error)
    keeper.wait_ready()
    assert opened(keeper)[1] is None


@pytest.mark.parametrize("how", ["not kept", "its keeper has gone too", "told to end"])
def test_where_nobody_starts_it_again_it_fails_at_once(start, how):
    kvd = start() if how == "not kept" else start("--keep")
    if how == "not kept":
        kvd.process.kill()
    elif how == "told to end":
        kvd.stop()
    else:
        with gone(kvd):
            os.kill(kvd.process.pid, signal.SIGKILL)
    kvd.process.wait()
    assert os.path.exists(f"{kvd.socket}.kept") == (how != "not kept")
    took, error = opened(kvd, timeout=20)
    assert isinstance(error, package.UnavailableError) and "is kvd running there?" in str(error) and took < 10, (took, error)  # half of its time
    assert "started again" not in str(error)
    kvd.start()
    assert opened(kvd)[1] is None and (how == "not kept" or marked(kvd))


def test_the_mark_is_anybodys_to_ask_for_and_nobodys_to_take(start, folder):
    """Who may look into the folder may ask. A lock that somebody else holds keeps no kvd from starting."""
    keeper = start("--keep")
    path = f"{keeper.socket}.kept"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o644 and os.stat(path).st_size == 0 and marked(keeper)
    with open(path, "rb") as f:
        with pytest.raises(BlockingIOError):  # an OFD lock of another's
            fcntl.fcntl(f, 37, struct.pack(FLOCK, fcntl.F_RDLCK, 0, 0, 0, 0))
    private = folder / "private"  # what its owner alone may read stays so, whatever name it is given
    private.touch(0o600)
    changes = (lambda: None, lambda: os.mkfifo(path), lambda: os.symlink(private, path), lambda: os.link(private, path))
    for i, change in enumerate(changes):
        os.unlink(path)
        change()
        kill(keeper)  # it starts all the same
        assert opened(keeper)[1] is None
        assert keeper.text().count("workers that start while kvd is started again will not wait for it") == i
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
    os.unlink(path)
    kill(keeper)
    assert marked(keeper)


def test_one_that_keeps_its_address_to_itself_is_found(start, folder):
    """Without an address: the one daemon of the host may be the one that is being started again, and then its socket may not be there."""
    runtime = folder / "run"
    (runtime / "a").mkdir(parents=True)
    keeper = start("--keep", "--listen", f"unix:{runtime}/a/kvd.sock")
    env = {**os.environ, "KVD_RUNTIME_DIR": str(runtime), "KVD_ADDRESS": ""}
    code = ("import sys, test_pages as t, kvd\nwith t.connect(type('K', (), {'address': None}), timeout=20) as p:\n    print(p.client.info['instance'])")
    where = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(package.__file__))])
    with gone(keeper):
        os.unlink(runtime / "a/kvd.sock")
        p = subprocess.Popen([os.sys.executable, "-c", code], env={**env, "PYTHONPATH": where}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(1)
        assert p.poll() is None, p.communicate()
    out, err = p.communicate(timeout=20)
    assert p.returncode == 0 and out.strip(), err


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_no_open_fails_however_often_kvd_ends(start, sig):
    """At whatever point of opening a session it ends."""
    keeper, over, failed, n = start("--keep"), threading.Event(), [], [0]

    def opens():
        while not over.is_set():
            error = opened(keeper, timeout=20)[1]
            n[0] += 1
            if error:
                failed.append(error)

    threads = [threading.Thread(target=opens) for _ in range(3)]
    for t in threads:
        t.start()
    for _ in range(int(os.environ.get("KVD_KILLS", "8"))):
        before = n[0]
        time.sleep(0.2)
        wait_until(lambda: n[0] > before + 2)
        kill(keeper, sig)
    over.set()
    for t in threads:
        t.join(30)
    assert not failed and n[0] > 20, failed
