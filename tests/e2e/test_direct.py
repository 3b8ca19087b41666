"""Direct mode: pages mapped into the worker, read-only; and what a hostile worker gets from that."""
import array
import ctypes
import fcntl
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import time

import grpc
import numpy as np
import pytest

from conftest import DIRECT, EMULATED, Rpc, at_some_pace, layout, kv
from test_death import wait_for
from test_grpc import KV, LAYERS, append, code_of, random_kv, tensor

EXTENT, REVOKE, ROTATIONS = 1, 2, 3
NO_PAGE = 2**32 - 1


def emulated_long(*values):
    return pytest.param(*values, marks=pytest.mark.long_emulated)


@pytest.mark.parametrize("codec,step,steps", [("bf16", 1, 120), ("bf16", 4, 60), emulated_long("bf16", 16, 20), ("int2", 1, 150),
                                              ("int2", 5, 60), ("int2c", 1, 90), ("int2-lm", 4, 40), ("turboquant-3", 1, 90), ("tc2", 1, 90),
                                              emulated_long("tc2.5", 5, 40), emulated_long("int4", 1, 60),
                                              emulated_long("k=int4,v=int2", 4, 40), emulated_long("k=tc2,v=bf16", 1, 40)])
def test_outputs(kvd, codec, step, steps):
    """On a GPU in a captured graph too."""
    steps = min(steps, 28 if step == 1 else 14) if EMULATED else steps
    for how in ([], ["graph"])[EMULATED:1 + kvd.on_gpu()]:
        r = subprocess.run([DIRECT, kvd.address, codec, str(step), str(steps), *how], capture_output=True, text=True, timeout=240)
        assert r.returncode == 0, r.stdout + r.stderr
        assert kvd.metric('kvd_pool_bytes{state="used"}') == 0


class Stalling:
    """A worker that makes as many steps as it is told."""

    def __init__(self, kvd):
        self.p = subprocess.Popen([DIRECT, kvd.address, "stall"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True)
        assert self.p.stdout.readline() == "ready\n", self.p.stderr.read()

    def ask(self, steps):
        self.p.stdin.write(f"{steps}\n")
        self.p.stdin.flush()

    def done(self):
        words = self.p.stdout.readline().split()
        assert words and words[0] == "done", self.p.stderr.read()
        return int(words[1]), int(words[3])

    def steps(self, n):
        self.ask(n)
        return self.done()


def test_a_slow_daemon_is_waited_for_late(kvd):
    w = Stalling(kvd)
    length, stored = w.steps(90)
    assert length == 190 and stored >= length - 96  # the ring: how far a step may be ahead
    assert wait_for(lambda: w.steps(0)[1] > 190 - 16)  # the thread catches up: what is left is no page
    kvd.process.send_signal(signal.SIGSTOP)
    try:
        began = time.time()
        assert w.steps(64)[0] == 254  # with nobody at the other end
        assert time.time() - began < 20
        w.ask(100)
        time.sleep(1.5)
    finally:
        kvd.process.send_signal(signal.SIGCONT)
    length, stored = w.done()
    assert length == 354 and stored >= length - 96
    w.p.stdin.close()
    assert w.p.wait(30) == 0  # it flushed, and kvd has all tokens


def test_the_daemon_dies(start):
    d = start()
    w = Stalling(d)
    w.steps(20)
    d.stop(signal.SIGKILL)
    w.ask(500)
    assert w.p.stdout.readline() == ""
    assert w.p.wait(60) == 1
    assert "session" in w.p.stderr.read()


@pytest.mark.long_emulated
def test_a_killed_worker_leaves_what_is_stored(kvd):
    """The pages of a worker that dies are free at once; another worker is not disturbed."""
    other = Stalling(kvd)
    for _ in range(3):
        w = Stalling(kvd)
        w.steps(50)
        w.ask(100000)
        time.sleep(0.1)
        w.p.kill()
        w.p.wait()
        assert other.steps(10)
    other.p.stdin.close()
    assert other.p.wait(30) == 0
    end = time.time() + 10
    while kvd.metric('kvd_pool_bytes{state="used"}') and time.time() < end:
        time.sleep(0.05)
    assert kvd.metric('kvd_pool_bytes{state="used"}') == 0


# -- the protocol, by hand ----------------------------------------------------------------------


def wants_memfds(kvd):
    if kvd.on_gpu():
        pytest.skip("pages on a GPU cannot be mapped here: tests/gpu/processes.c")


class Raw:
    """A worker that speaks to both sockets itself, in a namespace of its own."""

    def __init__(self, kvd, namespace="default", resume="", **kw):
        self.memory = {}  # extent: the number of the memory that was lent last
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(f"{kvd.socket}.fd")
        self.ticket = self.sock.recv(64)[8:40].decode()
        self.rpc = Rpc(kvd.address)
        self.session = self.rpc.kv("OpenSession", ticket=self.ticket, namespace_name=namespace, resume=resume,
                                   layout=layout(**kw)).session

    def sequence(self, tokens=0):
        seq = self.rpc.kv("CreateSequences", session=self.session, count=1).sequences[0]
        k, v = random_kv(max(tokens, 1))
        if tokens:
            append(self.rpc, self.session, seq, 0, k, v)
        return seq, k, v

    def map(self, *sequences, **kw):
        return self.rpc.kv("MapSequences", session=self.session, items=[kv.MapItem(sequence=s) for s in sequences], **kw)

    def read(self):
        """What waits on the fd socket: (kind, extent, bytes, fd)."""
        out = []
        while True:
            try:
                data, ancillary, _, _ = self.sock.recvmsg(64, socket.CMSG_SPACE(4), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return out
            if not data:
                return out
            _, _, kind, extent, size, self.memory[extent] = struct.unpack("<IIIIQQ", data)
            fds = array.array("i")
            for _, _, d in ancillary:
                fds.frombytes(d[:4])
            out.append((kind, extent, size, fds[0] if fds else -1))

    def free(self, *sequences):
        self.rpc.kv("FreeSequences", session=self.session, sequences=sequences)


def page_of(number, extents, extent_bytes):
    at = number * 4096
    return extents[at // extent_bytes], at % extent_bytes


def test_pages_are_what_was_stored(kvd):
    wants_memfds(kvd)
    w = Raw(kvd)
    seq, k, _ = w.sequence(400)
    reply = w.map(seq)
    got = w.read()
    assert {g[0] for g in got} == {EXTENT, ROTATIONS}
    maps = {e: mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) for kind, e, size, fd in got if kind == EXTENT}
    p = reply.sequences[0]
    assert (p.length, p.hist_end) == (400, 64 + (400 - 320) // 16 * 16)
    assert len(p.codec_pages) == 2 and p.codec_from == 0
    m, at = page_of(p.bf16_pages[0], maps, reply.extent_bytes)
    tile = 64 * 2 * (64 + 64)  # K, then V, of a layer and kv head
    for layer in range(LAYERS):
        for head in range(KV):
            begin = at + (layer * KV + head) * tile
            stored = np.frombuffer(m, "<u2", 64 * 64, begin).reshape(64, 64)
            assert np.array_equal(stored, k[layer, :64, head])
    # Once more: the descriptors are sent once, and the pages that are known are left out.
    again = w.rpc.kv("MapSequences", session=w.session, items=[kv.MapItem(sequence=seq, codec_from=1)])
    assert w.read() == []
    assert again.sequences[0].codec_from == 1 and list(again.sequences[0].codec_pages) == list(p.codec_pages)[1:]
    assert len(w.rpc.kv("MapSequences", session=w.session, again=True).sequences) == 0
    assert [g[0] for g in w.read()] == [ROTATIONS]


def test_pages_cannot_be_written(kvd):
    wants_memfds(kvd)
    w = Raw(kvd)
    seq, _, _ = w.sequence(400)
    w.map(seq)
    for kind, _, size, fd in w.read():
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 4096)
        with pytest.raises(OSError):
            os.posix_fallocate(fd, 0, 2 * size)
        wide = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)  # its mode does not matter
        with pytest.raises(PermissionError):
            mmap.mmap(wide, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(wide)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        at = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        assert libc.mprotect(at, 4096, mmap.PROT_READ | mmap.PROT_WRITE) == -1
    append(w.rpc, w.session, seq, 400, *random_kv(30))  # the daemon still can


def test_only_its_own(kvd):
    a, b = Raw(kvd, "a"), Raw(kvd, "b")
    seq, _, _ = a.sequence(100)
    for s in (seq, 0, 2**63):
        with pytest.raises(grpc.RpcError) as e:
            b.map(s)
        assert code_of(e) == "NOT_FOUND"
    assert b.read() == []
    leased = Rpc(kvd.address)
    session = leased.kv("OpenSession", layout=layout()).session
    with pytest.raises(grpc.RpcError) as e:
        leased.kv("MapSequences", session=session)
    assert code_of(e) == "FAILED_PRECONDITION"


def test_an_extent_that_changes_hands(start):
    """Its old holder keeps what was its own, is told, and never sees the new one's data."""
    d = start("--pool-size", "4MiB", "--extent-size", "2MiB")
    wants_memfds(d)
    a, b = Raw(d, "a", codec="bf16"), Raw(d, "b", codec="bf16")
    seq, k, _ = a.sequence(64)
    reply = a.map(seq)
    [(kind, extent, size, fd)] = a.read()
    assert kind == EXTENT and size == 2 << 20
    m = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    before = bytes(m)
    assert k[0, 0, 0].tobytes() in before
    a.free(seq)
    assert a.read() == []
    theirs, k_b, _ = b.sequence(1200)  # wants both extents
    assert (REVOKE, extent) in [(g[0], g[1]) for g in a.read()]
    assert bytes(m) == before
    pages = b.map(theirs).sequences[0]
    extents = {e: mmap.mmap(f, n, mmap.MAP_SHARED, mmap.PROT_READ) for kind, e, n, f in b.read() if kind == EXTENT}
    assert extent in extents
    fresh, at = page_of(pages.bf16_pages[0], extents, 2 << 20)
    assert fresh[at:at + 128] == k_b[0, 0, 0].tobytes()
    assert k[0, 0, 0].tobytes() not in b"".join(bytes(x) for x in extents.values())
    del reply


def test_an_extent_that_gets_no_new_memory(start):
    """The call that wanted it fails, the daemon and the old holder go on, and when there is memory again so does the call."""
    d = start("--pool-size", "4MiB", "--extent-size", "2MiB")
    wants_memfds(d)
    a, b = Raw(d, "a", codec="bf16"), Raw(d, "b", codec="bf16")
    seq, k, v = a.sequence(1200)  # both extents
    a.map(seq)
    held = {e: mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) for _, e, size, fd in a.read()}
    assert len(held) == 2
    before = {e: bytes(m) for e, m in held.items()}
    a.free(seq)
    pid, limit = d.process.pid, resource.prlimit(d.process.pid, resource.RLIMIT_NOFILE)
    target = b.rpc.kv("CreateSequences", session=b.session, request_id=9, count=1).sequences[0]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limit[1]))  # those that are open stay
    for _ in range(3):
        with pytest.raises(grpc.RpcError) as e:
            append(b.rpc, b.session, target, 0, k, v)
        assert code_of(e) == "RESOURCE_EXHAUSTED", e.value
    assert {e: bytes(m) for e, m in held.items()} == before and a.read() == []
    mine, k2, _ = a.sequence(64)  # its own memory is as good as ever
    assert a.rpc.kv("ReadTokens", session=a.session, sequence=mine, begin=0, tokens=64).k == k2.tobytes()
    a.free(mine)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
    append(b.rpc, b.session, target, 0, k, v)
    assert b.rpc.kv("ReadTokens", session=b.session, sequence=target, begin=0, tokens=1200).k == k.tobytes()
    assert {g[0] for g in a.read()} == {REVOKE}


def test_a_worker_that_does_not_read(kvd):
    w = Raw(kvd)
    seq, _, _ = w.sequence(400)
    full = None
    for _ in range(5000):
        full = w.map(seq, again=True)
        if full.more:
            break
    assert full.more and len(full.sequences) == 0
    assert Raw(kvd).map().extents  # others go on
    for _, _, _, fd in w.read():
        os.close(fd)
    reply = w.map(seq)
    assert not reply.more and reply.sequences[0].length == 400
    assert w.read()


def test_unfinished_appends_are_not_mapped(kvd):
    w = Raw(kvd)
    seq, k, v = w.sequence(100)
    append(w.rpc, w.session, seq, 100, k[:1, :10], v[:1, :10], layer_begin=0, layer_count=1)
    with pytest.raises(grpc.RpcError) as e:
        w.map(seq)
    assert code_of(e) == "FAILED_PRECONDITION" and "truncate to 100" in e.value.details()


def test_gpu_memory_on_the_cpu_backend(kvd):
    wants_memfds(kvd)
    w = Raw(kvd)
    for memory, extra, code in ((1, {"cuda_ipc_handle": bytes(64)}, "UNIMPLEMENTED"),
                                (1, {"cuda_ipc_handle": bytes(63)}, "INVALID_ARGUMENT"),
                                (2, {}, "NOT_FOUND"), (3, {}, "INVALID_ARGUMENT"),
                                (-1, {}, "INVALID_ARGUMENT")):
        with pytest.raises(grpc.RpcError) as e:
            w.rpc.kv("RegisterBuffer", session=w.session, key=7, size=4096, memory=memory, **extra)
        assert code_of(e) == code, e.value.details()


# -- fences -------------------------------------------------------------------------------------


class Fenced(Raw):
    """A worker with two counters in a memfd: kvd waits for the first and writes the second."""

    def __init__(self, kvd):
        super().__init__(kvd)
        fd = os.memfd_create("words", os.MFD_ALLOW_SEALING)
        os.posix_fallocate(fd, 0, 4096)
        fcntl.fcntl(fd, 1033, 2)  # F_ADD_SEALS, F_SEAL_SHRINK
        self.words = mmap.mmap(fd, 4096)
        self.sock.sendmsg([struct.pack("<IIQ", 0x0144766B, 1, 9)],
                          [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        self.buffer = self.rpc.kv("RegisterBuffer", session=self.session, key=9, size=4096).buffer
        self.seq, _, _ = self.sequence(100)

    def fence(self, value, offset=0, **kw):
        return kv.Fence(buffer=kw.get("buffer", self.buffer), offset=offset, value=value)

    def write(self, value):
        self.words[0:4] = struct.pack("<I", value)

    def signalled(self):
        return struct.unpack("<I", self.words[64:68])[0]

    def append_later(self, at, value, timeout=20, **kw):
        """An append of 10 tokens that waits for `value`: a future."""
        k, v = random_kv(10)
        item = kv.AppendItem(sequence=self.seq, position=at, tokens=10, k=tensor(k), v=tensor(v))
        request = kv.AppendRequest(session=self.session, items=[item], wait=self.fence(value),
                                   signal=self.fence(value, 64), **kw)
        call = self.rpc.channel.unary_unary("/kvd.v1.KvCache/Append", request_serializer=lambda m: m.SerializeToString(),
                                            response_deserializer=kv.AppendReply.FromString)
        return call.future(request, timeout=timeout)

    def length(self):
        return self.rpc.kv("DescribeSequences", session=self.session, sequences=[self.seq]).sequences[0].length


def test_a_call_waits_for_its_fence(kvd):
    w = Fenced(kvd)
    w.write(2**32 - 1)  # it may wrap around
    later = w.append_later(110, 2)
    first = w.append_later(100, 1)
    time.sleep(0.3)
    assert not first.done() and not later.done() and w.length() == 100
    other = Stalling(kvd)  # nobody is held up
    assert other.steps(20)
    w.write(1)
    assert list(first.result().lengths) == [110] and w.signalled() == 1
    time.sleep(0.1)
    assert not later.done()
    w.write(2)
    assert list(later.result().lengths) == [120] and w.signalled() == 2
    w.write(50)
    assert list(w.append_later(120, 3).result().lengths) == [130] and w.signalled() == 3
    other.p.kill()
    other.p.wait()


def test_calls_of_a_stream_are_answered_one_after_the_other(kvd):
    """Each is signalled at once, and one that waits holds up no answer."""
    w = Fenced(kvd)
    for at in (0, 200):
        calls = [w.append_later(100 + at + 10 * i, at + i + 1) for i in range(20)]
        assert wait_for(lambda: kvd.metric("kvd_queued_calls") == 20)
        for i, call in enumerate(calls):
            w.write(at + i + 1)
            end = time.time() + 10
            while w.signalled() != at + i + 1:
                assert time.time() < end, i
        for i, call in enumerate(calls):
            assert list(call.result(timeout=5).lengths) == [110 + at + 10 * i]
    never = w.append_later(500, 1000)
    for i in range(5):
        k, v = random_kv(10)
        item = kv.AppendItem(sequence=w.sequence(10)[0], position=10, tokens=10, k=tensor(k), v=tensor(v))
        reply = w.rpc.kv("Append", session=w.session, items=[item], signal=w.fence(500 + i, 64))
        assert list(reply.lengths) == [20] and w.signalled() == 500 + i
    assert not never.done()
    w.sock.close()


def test_a_fence_that_is_never_passed(kvd):
    w = Fenced(kvd)

    def given_up(pace):  # if its time is over before kvd has it, kvd never hears of it
        with pytest.raises(grpc.RpcError):
            w.append_later(100, 4 + pace, timeout=0.5 * pace).result()
        assert wait_for(lambda: w.signalled() == 4 + pace)  # whoever waits for it goes on
        assert w.length() == 100

    at_some_pace(given_up, (1, 10))
    waiting = [w.append_later(100, 99) for _ in range(50)]
    assert wait_for(lambda: kvd.metric("kvd_queued_calls") == 50)
    w.sock.close()  # its session ends, and with it the calls
    for call in waiting:
        with pytest.raises(grpc.RpcError):
            call.result()
    assert kvd.kvctl("ping", 1).returncode == 0
    w = Fenced(kvd)
    waiting = w.append_later(100, 99)
    assert wait_for(lambda: kvd.metric("kvd_queued_calls") == 1)
    assert kvd.stop() == 0  # the daemon ends all the same
    with pytest.raises(grpc.RpcError):
        waiting.result()


def test_bad_fences(kvd):
    w = Fenced(kvd)
    k, v = random_kv(10)
    item = kv.AppendItem(sequence=w.seq, position=100, tokens=10, k=tensor(k), v=tensor(v))
    for fence, code in ((w.fence(1, 4096), "INVALID_ARGUMENT"), (w.fence(1, 2), "INVALID_ARGUMENT"),
                        (w.fence(1, 2**64 - 4), "INVALID_ARGUMENT"), (w.fence(1, buffer=12345), "NOT_FOUND")):
        for name in ("wait", "signal"):
            with pytest.raises(grpc.RpcError) as e:
                w.rpc.kv("Append", session=w.session, items=[item], **{name: fence})
            assert code_of(e) == code and e.value.details().startswith(name)
    assert w.length() == 100
