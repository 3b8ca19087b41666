"""Files that workers send may be any: closing one can take as long as its maker likes, and nobody but that worker waits for it."""
import contextlib
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from conftest import Rpc, layout
from test_death import FdSocket, memfd, wait_for

HANGS = 12  # seconds that a close takes

LINGER = """
import array, os, signal, socket, struct, sys, time
path, seconds, how, kvd = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
def lingering():
    l = socket.create_server(("127.0.0.1", 0)); s = socket.create_connection(l.getsockname()); peer, _ = l.accept()
    s.setblocking(False)
    try:
        while True: s.send(bytes(1 << 16))          # nobody reads
    except BlockingIOError: pass
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
    peers.append(peer)
    return s
def rights(*sockets):
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [s.fileno() for s in sockets]))]
def connect():
    u = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); u.connect(path + ".fd"); u.recv(64)
    return u
def stop():                               # it is to find all that was sent, and nobody else with the socket
    os.kill(kvd, signal.SIGSTOP)
    while any(open(f"/proc/{kvd}/task/{t}/stat").read().rsplit(")", 1)[1].split()[0] != "T" for t in os.listdir(f"/proc/{kvd}/task")):
        time.sleep(0.01)
peers, keep = [], []
s = lingering()
message = lambda key: [struct.pack("<IIQ", 0x0144766B, 1, key)]
if how.startswith("grpc"):
    u = socket.socket(socket.AF_UNIX); u.connect(path); stop()
    if how == "grpc unread": u.sendmsg([b"no greeting of HTTP/2" * 1000])  # reason enough to hang up
    try: u.sendmsg([b"P"], rights(s))
    except PermissionError: os.kill(kvd, signal.SIGCONT); print("refused", flush=True); sys.exit()
elif how == "not accepted":               # there are too many connections already
    keep = [connect() for _ in range(11)]
    u = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); stop(); u.connect(path + ".fd"); u.sendmsg(message(1), rights(s))
else:
    u = connect()
    for key in range(12 if how == "refused" else 0): u.sendmsg(message(key), rights(sys.stdin))  # its share
    if how == "refused": time.sleep(0.5)
    if how != "fd": stop()                # a stop ends what hangs in kvd already
    if how == "unread": u.sendmsg([b"nonsense"])
    u.sendmsg([b"nonsense"] if how == "malformed" else message(20), rights(*[s] * (20 if how == "twenty" else 1)))
s.close(); os.kill(kvd, signal.SIGCONT); time.sleep(0.3)
keep.clear()
if how != "refused": u.close()
print("sent", flush=True); time.sleep(seconds + 5)
"""

# A file system of one file, whose FLUSH is never answered. Its server is a process of its own; when that ends all are answered.
FUSE = """
import array, ctypes, os, socket, struct, sys, time
path, folder = sys.argv[1:3]
libc = ctypes.CDLL(None, use_errno=True)
def check(rc):
    if rc: print("cannot:", os.strerror(ctypes.get_errno()), flush=True); sys.exit()
uid = os.getuid()
check(libc.unshare(0x20000 | (0x10000000 if uid else 0)))  # CLONE_NEWNS, CLONE_NEWUSER
if uid: open("/proc/self/uid_map", "w").write(f"0 {uid} 1")
check(libc.mount(b"none", b"/", None, 0x44000, None))      # MS_REC, MS_PRIVATE: nobody else sees it
try: dev = os.open("/dev/fuse", os.O_RDWR)
except OSError as e: print("cannot:", e, flush=True); sys.exit()
name = folder + "/fuse"
open(name, "w").close()
check(libc.mount(b"none", name.encode(), b"fuse", 0, f"fd={dev},rootmode=100644,user_id=0,group_id=0".encode()))
attr = struct.pack("<6Q10I", 1, 0, 0, 0, 0, 0, 0, 0, 0, 0o100644, 1, 0, 0, 0, 4096, 0)
answers = {26: struct.pack("<6I", 7, 31, 0, 0, 0, 4096) + bytes(40), 3: struct.pack("<QII", 1, 0, 0) + attr, 14: bytes(16), 18: b""}
server = os.fork()
if server == 0:
    while True:
        m = os.read(dev, 1 << 20)
        _, what, unique = struct.unpack_from("<IIQ", m)
        if what == 25: open(folder + "/flushed", "w").close()
        if what in (2, 25, 36): continue
        a = answers.get(what)
        os.write(dev, struct.pack("<IiQ", 16 + len(a or b""), 0 if a is not None else -38, unique) + (a or b""))
os.close(dev)
u = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); u.connect(path + ".fd"); u.recv(64)
fds = [os.open(name, os.O_RDWR) for _ in range(int(sys.argv[3]))]
for key, fd in enumerate(fds):
    u.sendmsg([struct.pack("<IIQ", 0x0144766B, 1, key)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
time.sleep(0.3); u.close()
print(server, flush=True)
time.sleep(100)
"""

# The kernel of who runs it knows no SO_PASSRIGHTS.
OLD_KERNEL = """
import ctypes, os, struct, sys
get, put = {"x86_64": (55, 54), "aarch64": (209, 208)}[os.uname().machine]
load = lambda at: struct.pack("<HBBI", 0x20, 0, 0, at)
equal = lambda value, yes, no: struct.pack("<HBBI", 0x15, yes, no, value)
program = b"".join([load(0), equal(get, 1, 0), equal(put, 0, 4), load(24), equal(1, 0, 2), load(32), equal(83, 1, 0),
                    struct.pack("<HBBI", 0x06, 0, 0, 0x7fff0000), struct.pack("<HBBI", 0x06, 0, 0, 0x00050000 | 92)])
libc = ctypes.CDLL(None, use_errno=True)
code = ctypes.create_string_buffer(program)
fprog = struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, fprog, 0, 0):
    sys.exit(f"seccomp: {os.strerror(ctypes.get_errno())}")
os.execv(sys.argv[1], sys.argv[1:])
"""


def old_kernel():
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("the numbers of its system calls are not known")
    return (sys.executable, "-c", OLD_KERNEL)


def metric(kvd, name):
    """Over HTTP, as the user may have no connection left."""
    with urllib.request.urlopen(f"http://127.0.0.1:{kvd.metrics_port()}/metrics", timeout=20) as r:
        return int(next(line for line in r.read().decode().splitlines() if line.startswith(name + " ")).split()[1])


def closing(kvd):
    return metric(kvd, "kvd_descriptors_closing")


OTHER_USER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for _ in range(8):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.connect(sys.argv[1] + ".fd")
        hello = s.recv(1000)
        assert len(hello) == 48, hello
"""


class Linger:
    def __init__(self, kvd, how, seconds=HANGS):
        self.p = subprocess.Popen([sys.executable, "-c", LINGER, str(kvd.socket), str(seconds), how, str(kvd.process.pid)],
                                  stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        self.said = self.p.stdout.readline().strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.p.kill()
        self.p.wait()


FD = ("fd", "twenty", "malformed", "unread", "refused", "not accepted")


@pytest.mark.parametrize("how, old", [(how, False) for how in (*FD, "grpc", "grpc unread")] + [("grpc", True), ("grpc unread", True)])
def test_a_close_that_hangs_holds_nobody_up(start, how, old):
    kvd = start(config="[kvd]\nmax-connections = 16\n", prefix=old_kernel() if old else ())
    rpc = Rpc(kvd.address)
    rpc.admin("Ping")
    with Linger(kvd, how) as l:
        assert l.said == "sent" or (l.said == "refused" and how.startswith("grpc") and not old)
        for _ in range(5):
            began = time.monotonic()
            rpc.admin("Ping")
            assert time.monotonic() - began < HANGS / 2
        assert wait_for(lambda: closing(kvd) == 0, HANGS / 2)  # and it lingers no more
        began = time.monotonic()
        assert kvd.stop() == 0
        assert time.monotonic() - began < HANGS / 2


@contextlib.contextmanager
def never_flushed(kvd, n):
    """kvd has files of FUSE to close, and cannot."""
    p = subprocess.Popen([sys.executable, "-c", FUSE, str(kvd.socket), str(kvd.folder), str(n)], stdout=subprocess.PIPE, text=True)
    said = p.stdout.readline().strip()
    if said.startswith("cannot"):
        p.wait()
        pytest.skip(f"a file system of FUSE {said}")
    try:
        assert wait_for((kvd.folder / "flushed").exists)
        yield
    finally:
        os.kill(int(said), signal.SIGKILL)  # the server: only then the others can end
        p.kill()
        p.wait()
    assert wait_for(lambda: closing(kvd) == 0)


def test_a_flush_that_is_never_answered_holds_nobody_up(kvd, rpc):
    with never_flushed(kvd, 1):
        for _ in range(5):
            rpc.admin("Ping")
        assert closing(kvd) == 1
        w = FdSocket(kvd)  # the same user's, and all goes on
        s = rpc.kv("OpenSession", ticket=w.ticket, layout=layout()).session
        w.send(1, memfd(4 << 20))
        assert rpc.kv("RegisterBuffer", session=s, key=1, size=4 << 20).buffer
        w.s.close()
        assert wait_for(lambda: kvd.metric("kvd_sessions") == 0 and closing(kvd) == 1)


def test_what_hangs_counts_as_its_users(start):
    """A user has no more of kvd's descriptors by closing what cannot be closed, and another user has all of its own."""
    kvd = start(config="[kvd]\nmax-connections = 40\n")
    rpc = Rpc(kvd.address)
    rpc.admin("Ping")
    fds = len(os.listdir(f"/proc/{kvd.process.pid}/fd"))
    share = 'kvd_share_used{share="%s"}'
    with never_flushed(kvd, 9):  # one more than there are threads for it
        assert wait_for(lambda: closing(kvd) == 9)
        assert metric(kvd, share % "descriptors") == 9
        for _ in range(500):  # closing what brings nothing does not wait for that
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
                s.connect(f"{kvd.socket}.fd")
        assert wait_for(lambda: metric(kvd, share % "connections") <= 11)
        for _ in range(100):  # what could bring something does, and is its user's
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s, contextlib.suppress(OSError):
                s.connect(f"{kvd.socket}.fd")
                s.send(b"nonsense")
                s.send(b"nonsense")
        assert metric(kvd, share % "connections") <= 30
        assert len(os.listdir(f"/proc/{kvd.process.pid}/fd")) < fds + 9 + 30 + 100 + 10
        if os.getuid() == 0:
            os.chmod(kvd.folder, 0o755)
            os.chmod(f"{kvd.socket}.fd", 0o666)
            r = subprocess.run([sys.executable, "-c", OTHER_USER, str(kvd.socket)], timeout=20, capture_output=True, text=True)
            assert r.returncode == 0, r.stderr
    assert wait_for(lambda: metric(kvd, share % "descriptors") == 0)
