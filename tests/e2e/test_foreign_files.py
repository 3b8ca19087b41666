"""Files that workers send may be any: closing one can take as long as its maker likes, and nobody but that worker waits for it."""
import array
import os
import platform
import resource
import signal
import socket
import struct
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
    stop()
    if how == "unread": u.sendmsg([b"nonsense"])
    u.sendmsg([b"nonsense"] if how == "malformed" else message(20), rights(*[s] * (20 if how == "twenty" else 1)))
s.close(); os.kill(kvd, signal.SIGCONT); time.sleep(0.3)
keep.clear()
if how != "refused": u.close()
print("sent", flush=True); time.sleep(seconds + 5)
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


def closing(kvd):
    with urllib.request.urlopen(f"http://127.0.0.1:{kvd.metrics_port()}/metrics", timeout=20) as r:
        return int(next(line for line in r.read().decode().splitlines() if line.startswith("kvd_descriptors_closing ")).split()[1])


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
        assert wait_for(lambda: closing(kvd) == (l.said == "sent"))
        began = time.monotonic()
        assert kvd.stop() == 0
        assert time.monotonic() - began < HANGS / 2
