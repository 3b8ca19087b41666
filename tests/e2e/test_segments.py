"""An engine's memory that many segments of cuMemCreate are mapped side by side in, as PyTorch's expandable_segments do: registered once, as
one of cudaMalloc's is. On an emulated GPU, whose descriptors are memfds; tests/gpu/processes.c does it on a real one."""
import ctypes
import os
import signal
import socket
import threading
import time

import grpc
import numpy as np
import pytest

import kvd as package
from conftest import BUILD, EMULATED, layout
from conftest import kv as messages
from kvd import _library as lib
from kvd.pages import EXACT
from test_death import FdSocket
from test_page_blocks import OnGpu, Registered, counted, details, killed_meanwhile
from test_pages import DIM, HEADS, LAYERS, connect, keys_of, kv, wait_until

pytestmark = pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
on_a_gpu = pytest.mark.skipif(not EMULATED, reason="its descriptors are memfds")
MIB, UNIT, AT_ONCE = 1 << 20, 2 << 20, 32
SEGMENTS = messages.RegisterBufferRequest.CUDA_SEGMENTS
SHARE = 'kvd_share_used{share="%s"}'


class Prop(ctypes.Structure):  # CUmemAllocationProp, as far as the emulated driver has it
    _fields_ = [("type", ctypes.c_int), ("handles", ctypes.c_int), ("location", ctypes.c_int), ("device", ctypes.c_int)]


def driver(name, *arguments):
    """A call of the driver, as an allocator in this process makes it. All of its arguments are as wide as pointers."""
    f, found = ctypes.c_void_p(), ctypes.c_int()
    lib.library().cudaGetDriverEntryPointByVersion(name.encode(), ctypes.byref(f), 12000, ctypes.c_ulonglong(0), ctypes.byref(found))
    call = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * len(arguments))(f.value)
    rc = call(*[ctypes.c_void_p(x) if isinstance(x, int) else ctypes.cast(x, ctypes.c_void_p) for x in arguments])
    assert rc == 0, (name, rc)


class Expandable:
    """An allocator's range of addresses that segments of these sizes are mapped into, side by side."""

    def __init__(self, sizes, shared=True):
        self.sizes, at = sizes, ctypes.c_uint64()
        driver("cuMemAddressReserve", ctypes.byref(at), sum(sizes), UNIT, 0, 0)
        self.begin = self.next = at.value
        self.places = [self.begin + sum(sizes[:i]) for i in range(len(sizes))]
        for place, size in zip(self.places, sizes):
            self.map(place, size, shared)

    def map(self, place, size, shared=True):
        handle, access = ctypes.c_uint64(), (ctypes.c_int * 3)(1, 0, 3)
        driver("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(Prop(1, int(shared), 1, 0)), 0)
        driver("cuMemMap", place, size, 0, handle.value, 0)
        driver("cuMemRelease", handle.value)  # the mapping keeps the memory
        driver("cuMemSetAccess", place, size, access, 1)

    def tensor(self, x, gap=512):
        """Of these values, behind the tensors that are there: it begins and ends wherever that is, within segments."""
        t = OnGpu.__new__(OnGpu)
        assert self.next + gap + x.nbytes <= self.begin + sum(self.sizes)
        t.array = np.frombuffer((ctypes.c_uint8 * x.nbytes).from_address(self.next + gap), x.dtype).reshape(x.shape)
        t.shape, t.device = x.shape, OnGpu.device("cuda:0")
        self.next += gap + x.nbytes
        return t

    @staticmethod
    def inodes(pid, places=None):
        """With their devices, of what a process has mapped, there or anywhere: a file of a disk may have the number of a memfd."""
        maps = [x.split() for x in open(f"/proc/{pid}/maps")]
        return {(x[3], int(x[4])) for x in maps if int(x[4]) and (places is None or int(x[0].split("-")[0], 16) in places)}

    def mapped(self, kvd):
        """How many of the segments kvd has mapped, in one place or several."""
        return len(self.inodes("self", self.places) & self.inodes(kvd.process.pid))

    def named(self, pid):
        """How many descriptors a process has of their memory. The emulated driver has one for each mapping."""
        ours = self.inodes("self", self.places)
        found = [os.stat(f"/proc/{pid}/fd/{x}") for x in os.listdir(f"/proc/{pid}/fd") if os.path.exists(f"/proc/{pid}/fd/{x}")]
        return sum((f"{os.major(s.st_dev):02x}:{os.minor(s.st_dev):02x}", s.st_ino) in ours for s in found)

    def free(self):
        for place, size in zip(self.places, self.sizes):
            driver("cuMemUnmap", place, size)
        driver("cuMemAddressFree", self.begin, sum(self.sizes))


@on_a_gpu
@pytest.mark.parametrize("gap", [512, 3 * UNIT])
def test_many_segments_are_registered_once(kvd, gap):
    """More than go in one call, of several sizes. Tensors begin and end within segments and share them, or are segments apart."""
    n, blocks = 4, 3000  # of 12 MB a layer and side
    near = gap == 512
    sizes = [UNIT] * 40 if near else [UNIT, 3 * UNIT, 10 * UNIT] * 5
    with connect(kvd) as p:
        memory = Expandable(sizes)
        e = Registered(p, blocks, 16, memory=lambda x: memory.tensor(x, gap), register=False)
        given, keys, at = kv(1, n), keys_of(f"segments {gap}", n), np.random.default_rng(1).permutation(blocks)[:4 * n]
        e.write(at, given)
        used = -(-(memory.next - memory.begin) // UNIT) if near else None
        assert memory.mapped(kvd) == 0
        p.register(e.paged([]))
        p.register(e.paged([]))  # it is already
        if near:  # all of it is one buffer
            assert memory.mapped(kvd) == used == kvd.metric(SHARE % "mappings") - 1
            assert kvd.metric(SHARE % "segment_bytes") == used * UNIT
        wait_until(lambda: memory.named(kvd.process.pid) == memory.mapped(kvd))  # the mappings' own: others are closed beside the loop
        assert memory.named("self") == len(sizes)
        assert kvd.metric(SHARE % "descriptors") == 0
        assert p.put(keys, e.paged(at), exact=[True] * n) == bytes([EXACT] * n)
        into = Registered(p, blocks, 16)
        assert p.get(keys, into.paged(at)) == bytes([EXACT] * n) and np.array_equal(into.read(at), given)
        e.write(at, kv(2, n))
        assert p.get(keys, e.paged(at)) == bytes([EXACT] * n) and np.array_equal(e.read(at), given)
        rest = np.setdiff1d(np.arange(blocks), at)
        assert all((x[rest] == 0x4141).all() for side in e.views() for x in side)
        assert counted(kvd) == (n, 2 * n)
        p.unregister()
        assert memory.mapped(kvd) == memory.named(kvd.process.pid) == 0
        assert [kvd.metric(SHARE % x) for x in ("mappings", "segment_bytes")] == [0, 0]
        assert p.get(keys, e.paged(at)) == bytes([EXACT] * n) and counted(kvd) == (n, 2 * n)  # libkvd copies again
        p.register(e.paged([]))
        assert memory.mapped(kvd) > 0
    wait_until(lambda: memory.mapped(kvd) == 0)
    memory.free()


@on_a_gpu
@pytest.mark.parametrize("keep", [False, True])
def test_a_kvd_that_is_killed_has_the_segments_again(start, keep):
    kvd = start("--keep") if keep else start()
    memory, keys, given = Expandable([UNIT] * 70), keys_of("killed", 4), kv(3, 4)
    with connect(kvd) as p:
        e = Registered(p, 5000, 16, memory=memory.tensor)
        e.write(range(16), given)
        p.put(keys, e.paged(range(16)), exact=[True] * 4)
        killed_meanwhile(kvd, p, keep, keys, e.paged(range(16)), e.paged(range(16)))
        e.write(range(16), kv(4, 4))
        p.get(keys, e.paged(range(16)))
        assert np.array_equal(e.read(range(16)), given) and counted(kvd)[1] >= 4
        assert kvd.metric(SHARE % "mappings") == 1 + -(-(memory.next - memory.begin) // UNIT)
        assert memory.named("self") == 70
    memory.free()


@on_a_gpu
def test_what_cannot_be_had_is_refused_by_name(kvd):
    """And nothing is left of it, neither here nor there."""
    alone, good = Expandable([UNIT] * 40, shared=False), Expandable([UNIT] * 40)
    half = Expandable([UNIT] * 40)
    driver("cuMemUnmap", half.places[34], UNIT)  # in the last part is one that no other process can have
    half.map(half.places[34], UNIT, shared=False)
    hole = Expandable([UNIT] * 4)
    driver("cuMemUnmap", hole.places[2], UNIT)
    with connect(kvd) as p:
        for memory, blocks, text in ((alone, 2000, "without CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR"), (half, 3000, "FILE_DESCRIPTOR"),
                                     (hole, 300, "is not GPU memory of this process")):
            ours = memory.named("self")
            t = [[OnGpu.__new__(OnGpu) for _ in range(LAYERS)] for _ in "kv"]
            for i, x in enumerate(t[0] + t[1]):  # what is not mapped is not looked into
                x.shape, x.device, x.at = (blocks, 16, HEADS, DIM), OnGpu.device("cuda:0"), memory.begin + i * blocks * 16 * HEADS * DIM * 2
                x.data_ptr, x.stride = lambda at=x.at: at, lambda: (16 * HEADS * DIM, HEADS * DIM, DIM, 1)
            with pytest.raises(package.InvalidError, match=text):
                p.register(package.Paged(*t, [], order="bthd"))
            assert memory.mapped(kvd) == memory.named(kvd.process.pid) == 0 and memory.named("self") == ours
            assert [kvd.metric(SHARE % x) for x in ("mappings", "segment_bytes", "descriptors")] == [0, 0, 0]
        e = Registered(p, 3000, 16, memory=good.tensor)
        e.write(range(4), kv(5, 1))
        p.put(keys_of("after", 1), e.paged(range(4)))
        assert counted(kvd) == (1, 0)


@on_a_gpu
def test_memory_that_is_not_as_it_was_is_not_given_to_the_next_kvd(start):
    """An allocator that has taken a segment away breaks its word: the session's next call says so."""
    kvd, memory = start(), Expandable([UNIT] * 40)
    with connect(kvd, timeout=5.0) as p:
        e = Registered(p, 3000, 16, memory=memory.tensor)
        driver("cuMemUnmap", memory.places[35], UNIT)
        kvd.process.kill()
        kvd.process.wait()
        kvd.start()
        with pytest.raises(package.InvalidError, match="not GPU memory of this process"):
            p.lookup([keys_of("gone", 1)])
        assert kvd.metric(SHARE % "segment_bytes") == 0
        memory.map(memory.places[35], UNIT)
        p.put(keys_of("back", 1), e.paged(range(4)), had=bytes(1))
        assert counted(kvd) == (1, 0)
        p.unregister()


# -- the wire ------------------------------------------------------------------------------------


class Wire:
    """A worker that sends descriptors as it likes."""

    def __init__(self, kvd, rpc):
        self.kvd, self.rpc, self.socket, self.key = kvd, rpc, FdSocket(kvd), 100
        self.session = rpc.kv("OpenSession", ticket=self.socket.ticket, layout=layout(windows=messages.Windows()), pages=True).session

    def send(self, *sizes):
        """Descriptors of so many bytes, as a call has them."""
        out = []
        for size in sizes:
            self.key += 1
            fd = os.memfd_create("segment", 0)
            os.truncate(fd, size)
            self.socket.send(self.key, fd)
            os.close(fd)
            out.append(messages.RegisterBufferRequest.Segment(key=self.key, bytes=size))
        return out

    def register(self, segments, size, mapped=0, key=1, **more):
        return self.rpc.kv("RegisterBuffer", session=self.session, key=key, size=size, memory=SEGMENTS, segments=segments, mapped=mapped, **more)

    def state(self):
        return [self.kvd.metric(SHARE % x) for x in ("mappings", "segment_bytes", "descriptors")]


@on_a_gpu
def test_a_part_that_is_refused_changes_nothing(kvd, rpc):
    w = Wire(kvd, rpc)
    kvd.metric("kvd_sequences")
    U, S = UNIT, messages.RegisterBufferRequest.Segment
    size, huge = 8 * U, 2 ** 64 - U

    def wrong(mapped, left):
        """Calls that are refused where so many bytes are mapped, and what is said of them."""
        yield [], {}, "there are no segments"
        yield [S(key=99, bytes=U)] * 33, {}, "segments has 33 items; at most 32 are possible"
        yield [S(key=99, bytes=U)], {}, "no descriptor was sent"
        one = w.send(U)
        yield one + one, {}, "segments[1]: no descriptor was sent"  # the same one twice
        for bytes_ in (0, 1, U - 1, U + 1, 3 * U // 2, 2 ** 64 - 1):
            s = w.send(U, U)
            s[1].bytes = bytes_
            yield s, {}, "segments[1] has"
        yield w.send(U, left), {}, "are left"
        for bytes_ in (huge, 2 ** 63):
            s = w.send(U, U)
            s[1].bytes = bytes_
            yield s, {}, "are left"
        yield w.send(U), {"mapped": size + U}, "mapped is"
        yield w.send(U), {"mapped": huge}, "mapped is"
        yield w.send(U), {"mapped": mapped + U}, "segments that follow"
        s = w.send(U, U)
        s[1].bytes = 2 * U
        yield s, {}, "segments[1]: the allocation is not one of"
        with open("/dev/null") as f:
            w.key += 1
            w.socket.send(w.key, f.fileno())
        yield [*w.send(U), S(key=w.key - 1, bytes=U)], {}, "segments[1]: the descriptor is not one of"
        yield w.send(U), {"cuda_ipc_handle": bytes(64)}, "of CUDA_IPC alone"
        yield w.send(U), {"memory": messages.RegisterBufferRequest.CUDA_FD}, "of CUDA_SEGMENTS alone"

    def all_refused(mapped, **more):
        for segments, changed, text in wrong(mapped, size - mapped):
            before = w.state()
            fields = {"session": w.session, "key": 1, "size": size, "memory": SEGMENTS, "segments": segments, "mapped": mapped, **changed, **more}
            _, said = details(lambda: rpc.kv("RegisterBuffer", **fields))
            assert text in said, (text, said)
            wait_until(lambda: w.state()[:2] == before[:2])
        return True

    for bad in (0, 1, U + 1, huge, 2 ** 64 - 1, 1 << 46):
        with pytest.raises(grpc.RpcError) as e:
            w.register(w.send(U), bad)
        assert e.value.code().name in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"), e.value.details()
    assert all_refused(0) and w.state()[:2] == [0, 0]
    b = w.register(w.send(U, U), size)
    assert b.buffer and b.mapped == 2 * U and w.state()[:2] == [3, size]
    assert w.register(w.send(U, U), size) == b == w.register(w.send(U), size, U)  # again, as after a lost reply
    assert all_refused(2 * U) and w.state()[:2] == [3, size]
    assert "segments that follow" in details(lambda: w.register(w.send(U, U), size, U))[1]
    ref = messages.TensorRef(buffer=b.buffer, dtype=1)
    code, said = details(lambda: rpc.kv("GetPages", session=w.session, space=b"s", key_bytes=16, keys=bytes(16), k=ref, v=ref))
    assert code == "FAILED_PRECONDITION" and f"has {2 * U} of its {size} bytes so far: register the rest" in said
    assert w.register(w.send(2 * U), size, 2 * U).mapped == 4 * U and w.register(w.send(4 * U), size, 4 * U).mapped == size
    assert w.register(w.send(U, U), size).mapped == size
    assert "so far" not in details(lambda: rpc.kv("GetPages", session=w.session, space=b"s", key_bytes=16, keys=bytes(16), k=ref, v=ref))[1]
    other = w.register(w.send(U), 2 * U, key=2)  # that will not be whole
    rpc.kv("ReleaseBuffer", session=w.session, buffer=other.buffer)
    assert w.state()[:2] == [5, size]
    rpc.kv("ReleaseBuffer", session=w.session, buffer=b.buffer)
    w.register(w.send(U), size)
    w.socket.s.shutdown(socket.SHUT_RDWR)  # a worker that dies in between
    wait_until(lambda: w.state()[:3] == [0, 0, 0])


@on_a_gpu
def test_addresses_and_segments_are_shares(kvd, rpc):
    """A user has no more addresses of segments than a few times the GPU's memory, however often the same is registered."""
    w = Wire(kvd, rpc)
    total = kvd.metric('kvd_share_limit{share="segment_bytes"}')
    assert total == 16 * (8 << 30)
    big = int(total) // 4 * 3
    code, said = details(lambda: w.register(w.send(UNIT), big + UNIT))
    assert code == "RESOURCE_EXHAUSTED" and "segments of GPU memory" in said
    half = w.register(w.send(UNIT), big // 2, key=1)
    w.register(w.send(UNIT), big - big // 2, key=2)
    assert details(lambda: w.register(w.send(UNIT), UNIT, key=3))[0] == "RESOURCE_EXHAUSTED"
    rpc.kv("ReleaseBuffer", session=w.session, buffer=half.buffer)
    assert w.register(w.send(UNIT), UNIT, key=3).mapped == UNIT


@pytest.mark.skipif(EMULATED, reason="kvd is to run on the CPU")
def test_segments_on_the_cpu_backend(kvd, rpc):
    if kvd.on_gpu():
        pytest.skip("kvd is to run on the CPU")
    w = Wire(kvd, rpc)
    for _ in range(100):  # no descriptor of theirs stays behind
        code, said = details(lambda: w.register(w.send(UNIT), UNIT))
        assert code == "UNIMPLEMENTED" and "kvd runs on the CPU" in said
    assert w.state()[:3] == [0, 0, 0]
    leased = rpc.kv("OpenSession", layout=layout()).session
    assert "leased" in details(lambda: rpc.kv("RegisterBuffer", session=leased, key=1, size=UNIT, memory=SEGMENTS))[1]


@on_a_gpu
def test_it_is_not_given_back_under_a_call(kvd):
    memory, over = Expandable([UNIT] * 40), []
    with connect(kvd) as p:
        e, keys = Registered(p, 3000, 16, memory=memory.tensor), keys_of("under", 4)
        e.write(range(16), kv(6, 4))
        kvd.process.send_signal(signal.SIGSTOP)
        try:
            t = threading.Thread(target=lambda: over.append(p.put(keys, e.paged(range(16)), had=bytes(4))))
            t.start()
            time.sleep(0.3)
            with pytest.raises(package.TimeoutError, match="still use the engine's KV"):
                p.unregister(0.2)
        finally:
            kvd.process.send_signal(signal.SIGCONT)
        t.join(20)
        assert over and counted(kvd) == (4, 0)
        p.unregister()
        assert memory.mapped(kvd) == 0
    memory.free()
