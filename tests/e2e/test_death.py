"""Workers that die, lie, flood or say nothing."""
import array
import fcntl
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time

import grpc
import pytest

from conftest import WORKER, Rpc, layout, kv

MAGIC, VERSION = 0x0144766B, 1


class FdSocket:
    def __init__(self, kvd, path=None):
        self.s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.s.connect(str(path or kvd.socket) + ".fd")
        hello = self.s.recv(64)
        assert struct.unpack("<II", hello[:8]) == (MAGIC, VERSION)
        self.ticket = hello[8:40].decode()
        if not self.ticket.isalnum():  # why there is none is in its place
            raise ValueError(repr(hello[8:]))

    def send(self, key, fd, magic=MAGIC):
        self.s.sendmsg([struct.pack("<IIQ", magic, VERSION, key)],
                       [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])


def memfd(size, seal=True):
    fd = os.memfd_create("t", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.posix_fallocate(fd, 0, size)
    if seal:
        fcntl.fcntl(fd, 1033, 0x2)  # F_ADD_SEALS, F_SEAL_SHRINK
    return fd


def wait_for(what, timeout=25):  # less than resume-time and a lease: what waits for those is wrong
    end = time.time() + timeout
    while time.time() < end:
        if what():
            return True
        time.sleep(0.05)
    return False


def refused(f, word):
    with pytest.raises(grpc.RpcError) as e:
        f()
    assert word in e.value.details(), e.value.details()


def test_every_unix_address_has_an_fd_socket(start, folder):
    second = folder / "second"
    kvd = start("--listen", f"unix:{second}")
    for path in (kvd.socket, second):
        w = FdSocket(kvd, path)
        rpc = Rpc(f"unix:{path}")
        s = rpc.kv("OpenSession", ticket=w.ticket, layout=layout()).session
        w.send(1, memfd(4096))
        assert rpc.kv("RegisterBuffer", session=s, key=1, size=4096).buffer
        w.s.close()
        rpc.channel.close()
    assert kvd.stop() == 0
    assert not [p for p in folder.iterdir() if p.name.endswith(".fd")]


def test_a_large_session_is_given_up_in_pieces(kvd, rpc):
    """Thousands of sequences, freed in one call or with their session; one call of it that is repeated finds it done."""
    s = rpc.kv("OpenSession", layout=layout()).session
    n = 4096
    ids = [rpc.kv("CreateSequences", session=s, request_id=i, count=n).sequences for i in (1, 2, 3)]
    rpc.kv("PublishSequence", session=s, sequence=ids[0][7], name="p")
    rpc.kv("FreeSequences", session=s, request_id=9, sequences=ids[0], unpublish=True)
    rpc.kv("FreeSequences", session=s, request_id=9, sequences=ids[0], unpublish=True)
    assert len(rpc.kv("DescribeSequences", session=s, sequences=ids[1]).sequences) == n
    refused(lambda: rpc.kv("AttachSequence", session=s, name="p"), "nothing is published")
    refused(lambda: rpc.kv("FreeSequences", session=s, request_id=10, sequences=[*ids[1][1:], ids[0][0]]), "holds no sequence")
    assert kvd.metric("kvd_sequences") == 2 * n
    rpc.kv("CloseSession", session=s)
    assert kvd.metric("kvd_sequences") == 0  # the reply comes when all is given up


def test_buffers_and_their_lies(kvd, rpc):
    w = FdSocket(kvd)
    s = rpc.kv("OpenSession", ticket=w.ticket, request_id=5, layout=layout()).session
    assert rpc.kv("OpenSession", ticket=w.ticket, request_id=5, layout=layout()).session == s
    fd = memfd(1 << 20)
    w.send(1, fd)
    b = rpc.kv("RegisterBuffer", session=s, key=1, size=1 << 20).buffer
    assert rpc.kv("RegisterBuffer", session=s, key=1, size=1 << 20).buffer == b
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
    row = 2 * 2 * 64 * 2

    def append(**kw):
        ref = kv.TensorRef(buffer=b, **kw)
        return rpc.kv("Append", session=s, items=[kv.AppendItem(sequence=seq, position=0, tokens=10, k=ref, v=ref)])

    refused(lambda: append(offset=(1 << 20) - 10 * row + 256), "reaches to byte")
    refused(lambda: append(layer_stride=(1 << 20)), "reaches to byte")
    refused(lambda: append(offset=2**64 - 256), "overflow")
    append(offset=(1 << 20) - 10 * row)
    refused(lambda: rpc.kv("RegisterBuffer", session=s, key=77, size=4096), "no descriptor was sent")
    w.send(2, memfd(4096, seal=False))
    refused(lambda: rpc.kv("RegisterBuffer", session=s, key=2, size=4096), "F_SEAL_SHRINK")
    w.send(3, memfd(4096))
    refused(lambda: rpc.kv("RegisterBuffer", session=s, key=3, size=8192), "has 4096 bytes")
    rpc.kv("ReleaseBuffer", session=s, buffer=b)
    refused(lambda: append(), "no buffer")


def test_hang_up_frees_everything_but_what_is_published(kvd, rpc):
    w = FdSocket(kvd)
    s = rpc.kv("OpenSession", ticket=w.ticket, layout=layout()).session
    a, b = rpc.kv("CreateSequences", session=s, request_id=1, count=2).sequences
    rpc.kv("PublishSequence", session=s, sequence=a, name="kept")
    w.s.close()
    assert wait_for(lambda: kvd.metric("kvd_sessions") == 0)
    assert kvd.metric("kvd_sequences") == 1
    assert "kept" in kvd.kvctl("sequences").stdout


@pytest.mark.parametrize("delay", [0.02, 0.1, 0.2, 0.3, 0.5])
def test_a_worker_killed_at_any_time(kvd, delay):
    p = subprocess.Popen([WORKER, kvd.address], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    time.sleep(delay)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert wait_for(lambda: kvd.metric("kvd_sessions") == 0)
    # A call that was running has its sequence until it ends.
    assert wait_for(lambda: kvd.metric("kvd_sequences") == 0 and kvd.metric('kvd_pool_bytes{state="used"}') == 0)


def test_garbage_on_both_sockets(kvd):
    for payload in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 4096, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 300):
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(kvd.socket))
            s.sendall(payload)
    w = FdSocket(kvd)
    w.s.send(b"nonsense")
    w = FdSocket(kvd)
    w.send(1, memfd(10), magic=7)
    w = FdSocket(kvd)
    w.s.send(struct.pack("<IIQ", MAGIC, VERSION, 1))  # no descriptor
    fds = len(os.listdir(f"/proc/{kvd.process.pid}/fd"))
    for _ in range(5):  # many descriptors at once must not stay with the daemon
        w = FdSocket(kvd)
        null = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
        w.s.sendmsg([struct.pack("<IIQ", MAGIC, VERSION, 1)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", null))])
        for fd in null:
            os.close(fd)
        w.s.close()
    assert wait_for(lambda: len(os.listdir(f"/proc/{kvd.process.pid}/fd")) <= fds + 2)
    kvd.kvctl("ping", 1)


def test_a_thousand_connections(kvd):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("the limit of open files is below 4096")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    fd = [FdSocket(kvd) for _ in range(1000)]
    raw = []
    for _ in range(1000):
        s = socket.socket(socket.AF_UNIX)
        s.connect(str(kvd.socket))
        s.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[:7])  # half a greeting, then silence
        raw.append(s)
    assert wait_for(lambda: kvd.metric("kvd_connections") >= 1000)
    assert subprocess.run([WORKER, kvd.address], timeout=120).returncode == 0
    for s in raw + [f.s for f in fd]:
        s.close()
    assert wait_for(lambda: kvd.metric("kvd_connections") <= 1)
    kvd.kvctl("ping", 1)


def test_who_says_nothing_is_dropped(kvd):
    w = FdSocket(kvd)
    w.s.settimeout(60)
    assert w.s.recv(10) == b""  # hung up on after ten seconds


def test_an_abandoned_call_and_a_stream_nobody_reads(kvd, rpc):
    s = rpc.kv("OpenSession", layout=layout()).session
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
    script = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
from conftest import Rpc
r = Rpc({kvd.address!r})
e = r.stream("Watch", session={s!r}); next(e); print("reading", flush=True)
import time; time.sleep(60)
"""
    p = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    p.stdout.readline()
    for i in range(3000):
        rpc.kv("PublishSequence", session=s, sequence=seq, name=f"{'n' * 100}{i}")
    p.send_signal(signal.SIGKILL)
    p.wait()
    rpc.kv("CloseSession", session=s)
    assert kvd.metric("kvd_sessions") == 0


def test_namespaces_keep_strangers_out(start):
    kvd = start(config="[namespace mine]\nallow-uid = 4242\n[namespace root]\nallow-uid = 0\n")
    rpc = Rpc(kvd.address)
    for ns, ok in (("mine", False), ("root", os.getuid() == 0), ("default", True)):
        ticket = FdSocket(kvd)
        try:
            rpc.kv("OpenSession", ticket=ticket.ticket, namespace_name=ns, layout=layout())
            assert ok, ns
        except grpc.RpcError as e:
            assert not ok and e.code().name == "PERMISSION_DENIED", e
    with pytest.raises(grpc.RpcError) as e:  # without a ticket nobody knows who that is
        rpc.kv("OpenSession", namespace_name="root", layout=layout())
    assert e.value.code().name == "PERMISSION_DENIED"


def test_freed_memory_is_not_readable_by_another_namespace(start):
    """A pool of one extent moves from one namespace to another: nothing of the first is left in it."""
    kvd = start("--backend", "cpu", "--pool-size", "4MiB", "--extent-size", "2MiB")
    rpc = Rpc(kvd.address)
    secret = bytes([0x21, 0x43]) * (2 * 64 * 2 * 64)

    def fill(ns, data):
        s = rpc.kv("OpenSession", namespace_name=ns, layout=layout(codec="bf16")).session
        seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
        ref = kv.TensorRef(inline_data=data)
        rpc.kv("Append", session=s, items=[kv.AppendItem(sequence=seq, position=0, tokens=64, k=ref, v=ref)])
        rpc.kv("CloseSession", session=s)

    fill("first", secret)
    pid = kvd.process.pid

    def extents_with(needle):
        found = 0
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as mem:
            for line in maps:
                a, b = (int(x, 16) for x in line.split()[0].split("-"))
                if b - a in (2 << 20, 4 << 20) and " rw-" in line:
                    mem.seek(a)
                    found += needle in mem.read(b - a)
        return found

    if os.getuid() != 0:
        pytest.skip("reading the daemon's memory wants root")
    assert extents_with(secret[:4096])
    fill("second", bytes([0x11, 0x22]) * (len(secret) // 2))
    # Both extents have been granted anew and zeroed before.
    fill("third", bytes([0x33, 0x22]) * (len(secret) // 2))
    assert not extents_with(secret[:4096])
