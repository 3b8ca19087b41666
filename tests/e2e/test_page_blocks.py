"""Pages in an engine's own blocks, which are registered: kvd reads and writes them itself, and refuses what reaches beyond them. Requests
that libkvd would never send are written here by hand."""
import ctypes
import mmap
import os
import signal
import threading
import time

import grpc
import numpy as np
import pytest

import kvd as package
from conftest import BUILD, EMULATED, layout
from conftest import kv as messages
from kvd import _library as lib
from kvd.pages import ENCODED, EXACT, MISSING
from test_death import FdSocket, memfd
from test_keep import kill
from test_page_queue import drain
from test_pages import DIM, HEADS, LAYERS, ORDERS, Engine, connect, keys_of, kv, wait_until

pytestmark = pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")


class OnGpu:
    """A tensor of PyTorch on the emulated GPU, as far as kvd.Paged looks at it. Its memory is this process's, and `array` of it."""

    dtype = "torch.bfloat16"

    class device(str):
        type = "cuda"

    def __init__(self, x):
        at = ctypes.c_void_p()
        assert lib.library().cudaMalloc(ctypes.byref(at), ctypes.c_size_t(x.nbytes)) == 0
        self.array = np.frombuffer((ctypes.c_uint8 * x.nbytes).from_address(at.value), x.dtype).reshape(x.shape)
        self.shape, self.device = x.shape, OnGpu.device("cuda:0")

    def data_ptr(self):
        return self.array.ctypes.data

    def stride(self):
        return [n // 2 for n in self.array.strides]


class Registered(Engine):
    """An engine whose KV is memory that kvd can have: of a client's making or, where kvd has a GPU, that one's."""

    def __init__(self, pages, *args, register=True, memory=OnGpu, **options):
        super().__init__(*args, **options)
        self.pages, self.gpu = pages, pages.client.on_gpu
        if self.gpu and not EMULATED:  # tests/bench/bench_pages.py and tests/gpu/engine.py register it
            pytest.skip("a real GPU's memory cannot be looked into from here")
        self.tensors = [[memory(x) if self.gpu else pages.client.tensor(*x.shape) for x in side] for side in (self.k, self.v)]
        for side, tensors in zip((self.k, self.v), self.tensors):
            for i, t in enumerate(tensors):
                t.array[:] = side[i]
                side[i] = np.asarray(t.array)
        if register:
            pages.register(self.paged([]))

    def paged(self, blocks, **options):
        if not self.gpu:
            return super().paged(blocks, **options)
        return package.Paged(*self.tensors, blocks, order=self.orders[0], v_order=self.orders[1], **options)

    def free(self):
        if self.gpu:
            return self.pages.unregister()
        for side in self.tensors:
            for t in side:
                t.free()


def counted(kvd, namespace="default"):
    """Pages that were put and got in registered memory."""
    text = kvd.kvctl("metrics").stdout
    return tuple(int(text.split(f'kvd_pages_{x}_registered_total{{namespace="{namespace}"}} ')[1].split()[0]) for x in ("put", "got"))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [16, 64, 128])
def test_bits_are_those_that_libkvd_copies(kvd, order, tokens):
    """What is put from registered blocks is what is put from others, and so is what is got; nothing else is touched."""
    rng = np.random.default_rng(tokens)
    given, exact = kv(1, 6), [True, False, False, True, False, True]
    kinds = bytes(EXACT if x else ENCODED for x in exact)
    keys = {way: keys_of(f"{order} {tokens} {way}", 6) for way in ("copied", "registered")}
    with connect(kvd) as p:
        blocks, into = rng.permutation(48)[:6 * 64 // tokens], rng.permutation(40)[:24]
        copied = Registered(p, 48, tokens, order, register=False) if p.client.on_gpu else Engine(48, tokens, order)
        for way, source in (("copied", copied), ("registered", Registered(p, 48, tokens, order))):
            source.write(blocks, given)
            assert p.put(keys[way], source.paged(blocks), exact=exact) == kinds
        p.register(source.paged([]))  # it is already
        got = []
        for way in keys:
            for target in (Engine(40, 16, "vllm-cpu"), Registered(p, 40, 16, "vllm-cpu"), Registered(p, 40, 16, order)):
                before = [np.array(x) for x in target.k + target.v]
                assert p.get(keys[way], target.paged(into)) == kinds
                got.append(target.read(into))
                others = np.setdiff1d(np.arange(40), into)
                for side, was in zip([v for view in target.views() for v in view], before):
                    assert np.all(side[others] == 0x4141)
        assert all(np.array_equal(x, got[0]) for x in got[1:])
        for i, e in enumerate(exact):
            at = np.s_[:, :, 64 * i:64 * (i + 1)]
            assert np.array_equal(got[0][at], given[at]) == e
        assert counted(kvd) == (6, 4 * 6)


@pytest.mark.parametrize("layers,heads,dim,n", [(4, 16, 64, 9), (24, 16, 64, 3), (1, 1, 64, 70)])
def test_what_is_taken_in_many_parts(kvd, layers, heads, dim, n):
    """More than kvd takes at once: some pages of all layers, some layers of a page, and all at once."""
    shape = {"dim": dim, "layers": layers, "heads": heads}
    given, keys = kv(2, n, **shape), keys_of(f"parts {layers}", n)
    exact = [i in (0, n - 2, n - 1) for i in range(n)]
    with connect(kvd, layers=range(layers), kv_heads=heads, head_dim=dim) as p:
        e, into, plain = Registered(p, n, 64, **shape), Registered(p, n, 64, **shape), Engine(n, 64, **shape)
        e.write(range(n), given)
        blocks = np.random.default_rng(n).permutation(n)
        kinds = p.put(keys, e.paged(range(n)), exact=exact)
        assert p.get(keys, into.paged(blocks)) == p.get(keys, plain.paged(blocks)) == kinds
        assert np.array_equal(into.read(blocks), plain.read(blocks))
        assert counted(kvd) == (n, n)


@pytest.mark.parametrize("tokens,first", [(16, 0), (64, 0), (128, 0), (128, 64), (48, 16), (100, 7), (1, 0)])
def test_pages_that_are_there_already_are_left_out(kvd, tokens, first):
    """So that those that are put do not follow each other, in blocks that are parts of pages or hold several."""
    n, keys = 8, keys_of(f"gaps {tokens} {first}", 8)
    blocks = -(-(first + n * 64) // tokens)
    with connect(kvd) as p:
        e, into = Registered(p, blocks, tokens), Registered(p, blocks, tokens)
        given = kv(3, n)
        for side, x in zip(e.views(), given):
            for layer, rows in zip(side, x):
                layer.reshape(-1, HEADS, DIM)[first:first + n * 64] = rows
        here = e.paged(range(blocks), first=first)
        p.put(keys[2:3], e.paged(here.blocks[(first + 128) // tokens:], first=(first + 128) % tokens),
              exact=[True])
        assert p.put([keys[5]], Engine(1, 64).paged([0]), exact=[True]) == bytes([EXACT])  # another one, which stays
        assert p.put(keys, here, exact=[True] * n) == bytes([EXACT] * n)
        p.get(keys, into.paged(range(blocks), first=first))
        for side, x in zip(into.views(), given):
            for layer, rows in zip(side, x):
                got = layer.reshape(-1, HEADS, DIM)[first:first + n * 64].reshape(n, 64, HEADS, DIM)
                same = [np.array_equal(a, b) for a, b in zip(got, rows.reshape(got.shape))]
                assert same == [i != 5 for i in range(n)]
        assert counted(kvd)[0] == 7


def test_nan_is_named_and_nothing_is_stored(kvd):
    with connect(kvd) as p:
        e, keys = Registered(p, 16), keys_of("nan", 4)
        e.write(range(16), kv(4, 4))
        e.views()[1][2][9, 3, 1, 5] = 0x7fc0
        with pytest.raises(package.InvalidError, match="v of page 2 holds NaN or Inf at layer 2, token 19, head 1, channel 5"):
            p.put(keys, e.paged(range(16)), exact=[False, True, True, False])
        assert p.lookup([keys], lease_ms=0)[0].kinds == bytes(4) and kvd.metric("kvd_sequences") == 0
        e.views()[1][2][9, 3, 1, 5] = 0
        assert p.put(keys, e.paged(range(16))) == bytes([ENCODED] * 4)


def test_memory_that_is_freed_is_copied_from_then_on(kvd):
    with connect(kvd) as p, p.queue() as q:
        e, keys = Registered(p, 16), keys_of("freed", 8)
        e.write(range(16), kv(5, 4))
        q.put(keys[:4], e.paged(range(16)))
        assert drain(q, 1)[0].kinds == bytes([ENCODED] * 4) and counted(kvd) == (4, 0)
        if p.client.on_gpu:
            e.free()
        else:
            e.tensors[1][2].free()  # of one layer of V; its array stays
        q.put(keys[4:], e.paged(range(16)))
        assert drain(q, 1)[0].kinds == bytes([ENCODED] * 4) and counted(kvd) == (4, 0)
        if p.client.on_gpu:
            p.register(e.paged([]))
            q.get(keys[:4], e.paged(range(16)))
            assert drain(q, 1)[0].error is None and counted(kvd) == (4, 4)
        else:
            with pytest.raises(package.InvalidError, match=r"v\[2\] is not memory of kvd_buffer_new"):
                p.register(e.paged([]))
        with pytest.raises(package.InvalidError, match="layers, kv_heads"):
            p.register(Engine(16, layers=2).paged([]))
        with pytest.raises(TypeError):
            p.register(e.k)
        p.unregister()


def test_memory_is_not_freed_under_a_call(kvd):
    with connect(kvd) as p:
        e, keys, over = Registered(p, 64), keys_of("under", 16), {}
        e.write(range(64), kv(6, 16))
        kvd.process.send_signal(signal.SIGSTOP)
        try:
            calls = [threading.Thread(target=lambda name=name, f=f: over.setdefault(name, f())) for name, f in
                     (("put", lambda: p.put(keys, e.paged(range(64)), had=bytes(16))), ("free", e.free))]
            for c in calls:
                c.start()
                time.sleep(0.3)
            assert not over
        finally:
            kvd.process.send_signal(signal.SIGCONT)
        for c in calls:
            c.join(20)
        assert over == {"put": bytes([ENCODED] * 16), "free": None} and counted(kvd) == (16, 0)


def killed_meanwhile(kvd, p, keep, keys, from_, into):
    """Kills kvd: kept, what is under way goes on; else what it had is lost and is put again, from the memory that it has again."""
    if keep:
        with p.queue() as q:
            for _ in range(20):
                q.get(keys, into)
            kill(kvd)
            assert [x.error for x in drain(q, 20)] == [None] * 20
        return
    kvd.process.kill()
    kvd.process.wait()
    kvd.start()
    with pytest.raises(package.LostError):
        p.get(keys, into)
    p.put(keys, from_, exact=[True] * len(keys))


@pytest.mark.parametrize("keep", [False, True])
def test_a_kvd_that_is_killed_has_the_memory_again(start, keep):
    kvd = start("--keep") if keep else start()
    keys, given = keys_of("killed", 8), kv(7, 8)
    with connect(kvd) as p:
        e, into = Registered(p, 32), Registered(p, 32)
        e.write(range(32), given)
        p.put(keys, e.paged(range(32)), exact=[True] * 8)
        killed_meanwhile(kvd, p, keep, keys, e.paged(range(32)), into.paged(range(32)))
        into.write(range(32), kv(8, 8))
        p.get(keys, into.paged(range(32)))
        assert np.array_equal(into.read(range(32)), given)
        assert counted(kvd)[1] >= 8


@pytest.mark.skipif(not EMULATED, reason="memory of a GPU is registered")
def test_memory_of_a_gpu_is_given_back(kvd):
    """One allocation for all layers, and one for each; not while calls use it, and at the client's end."""
    with connect(kvd) as p:
        e, keys, over = Registered(p, 64, register=False), keys_of("given back", 16), []
        one = OnGpu(np.zeros((LAYERS, 2, 64, 16, HEADS, DIM), np.uint16))
        view = [OnGpu.__new__(OnGpu) for _ in range(2)]
        for v, t in enumerate(view):
            t.array = one.array[:, v]
            t.shape, t.device = t.array.shape, one.device
        together = package.Paged(*view, range(64), order="lbthd")
        e.write(range(64), kv(9, 16))
        all_of_it = [*e.tensors[0], *e.tensors[1], one]
        assert mapped(kvd, all_of_it) == 0
        p.register(e.paged([]))
        p.register(together)
        p.register(together)
        assert mapped(kvd, all_of_it) == 2 * LAYERS + 1
        assert p.put(keys, e.paged(range(64)), exact=[True] * 16) == p.get(keys, together) == bytes([EXACT] * 16)
        for v, side in enumerate(e.views()):
            assert all(np.array_equal(x, one.array[i, v]) for i, x in enumerate(side))
        assert counted(kvd) == (16, 16)
        kvd.process.send_signal(signal.SIGSTOP)
        try:
            t = threading.Thread(target=lambda: over.append(p.get(keys, together)))
            t.start()
            time.sleep(0.3)
            with pytest.raises(package.TimeoutError, match="still use the engine's KV after 200 ms"):
                p.unregister(0.2)
        finally:
            kvd.process.send_signal(signal.SIGCONT)
        t.join(20)
        assert over and counted(kvd) == (16, 32) and mapped(kvd, all_of_it) == 2 * LAYERS + 1
        p.unregister()
        p.unregister()
        assert mapped(kvd, all_of_it) == 0
        with connect(kvd, timeout=1.0) as hangs:
            hangs.register(e.paged([]))
            kvd.process.send_signal(signal.SIGSTOP)
            began = time.monotonic()
            try:
                hangs.unregister()  # of several buffers: it is waited for once
                assert time.monotonic() - began < 4
            finally:
                kvd.process.send_signal(signal.SIGCONT)
        wait_until(lambda: mapped(kvd, all_of_it) == 0)
        assert p.get(keys, together) == bytes([EXACT] * 16) and counted(kvd) == (16, 32)  # libkvd copies again
        with pytest.raises(package.InvalidError, match="in memory of the host, and kvd runs on a GPU"):
            p.register(Engine(64).paged([]))
        p.register(together)
        assert mapped(kvd, all_of_it) == 1
    wait_until(lambda: mapped(kvd, all_of_it) == 0)


def mapped(kvd, tensors):
    """How many of the allocations that these begin kvd has mapped."""
    ours, theirs = ([x.split() for x in open(f"/proc/{pid}/maps")] for pid in ("self", kvd.process.pid))
    begins = {f"{t.data_ptr():x}" for t in tensors}
    inodes = {x[4] for x in ours if x[0].split("-")[0] in begins}
    assert len(inodes) == len(tensors)
    return len(inodes & {x[4] for x in theirs})


# -- the wire ------------------------------------------------------------------------------------

on_the_host = pytest.mark.skipif(EMULATED, reason="its memory is a memfd")
TOKENS, BLOCKS = 16, 8
ROW, BLOCK = 64 * 2, TOKENS * 2 * 64 * 2  # of a head of a token, and of a block
SIDE = BLOCK * BLOCKS  # of one layer's K
PAGE_KEYS = [b"%016d" % i for i in range(2)]


class Wire:
    """A session that holds a memfd, into which its blocks go: K and V of two layers, one after the other."""

    def __init__(self, kvd, rpc, size=4 * SIDE, shape=None):
        if kvd.on_gpu():
            pytest.skip("kvd's memory is a GPU's, and that of these requests is a memfd")
        self.rpc, self.socket, fd = rpc, FdSocket(kvd), memfd(size)
        shape = shape or layout(windows=messages.Windows())
        self.session = rpc.kv("OpenSession", ticket=self.socket.ticket, layout=shape, pages=True).session
        self.socket.send(1, fd)
        self.buffer = rpc.kv("RegisterBuffer", session=self.session, key=1, size=size).buffer
        self.socket.send(2, fd)
        self.again = rpc.kv("RegisterBuffer", session=self.session, key=2, size=size).buffer  # the same memory
        self.memory = np.frombuffer(mmap.mmap(fd, size), np.uint16)
        os.close(fd)

    def paged(self, **changed):
        k, v = ({"buffers": [self.buffer], "offsets": [at, at + 2 * SIDE], "block_stride": BLOCK, "head_stride": ROW,
                 "token_stride": 2 * ROW, "dim_stride": 2} for at in (0, SIDE))
        ref = {"k": k, "v": v, "all_blocks": BLOCKS, "block_tokens": TOKENS, "blocks": list(range(8))}
        for name, value in changed.items():
            if name[:2] in ("k_", "v_"):
                ref[name[0]][name[2:]] = value
            else:
                ref[name] = value
        for side in ("k", "v"):
            ref[side] = messages.PagedRef.Side(**ref[side]) if ref[side] is not None else None
        return messages.PagedRef(**ref)

    def request(self, **more):
        return {"session": self.session, "space": b"s", "key_bytes": 16, "keys": b"".join(PAGE_KEYS), **more}


def details(call):
    with pytest.raises(grpc.RpcError) as e:
        call()
    return e.value.code().name, e.value.details()


HUGE = 2 ** 64 - 2
WRONG = [  # what is changed, and what is said of it; of puts and gets
    ({"k": None}, "paged.k is missing"), ({"v": None}, "paged.v is missing"),
    ({"k_buffers": []}, "paged.k has 0 buffers and 2 offsets"), ({"v_offsets": [0]}, "paged.v has 1 buffers and 1 offsets"),
    ({"k_buffers": [1, 1, 1]}, "has 3 buffers"), ({"k_offsets": [0, 0, 0]}, "3 offsets"),
    ({"v_buffers": [10 ** 6]}, "paged.v[0]: this session has no buffer 1000000"),
    ({"k_offsets": [0, 4 * SIDE]}, "begins at byte"), ({"k_offsets": [HUGE, 0]}, "begins at byte"),
    ({"k_offsets": [0, 3 * SIDE + 2]}, "reach"), ({"k_offsets": [1, SIDE]}, "no address"),
    ({"block_tokens": 0}, "block_tokens"), ({"block_tokens": 1025}, "block_tokens"), ({"all_blocks": 0}, "all_blocks"),
    ({"all_blocks": 2 ** 32 - 1}, "reach"), ({"all_blocks": BLOCKS * 4}, "reach"), ({"all_blocks": 7}, "blocks[7] is 7"),
    ({"blocks": []}, "there are 0"), ({"blocks": list(range(7))}, "want 8 blocks"), ({"first_token": 1}, "want 9 blocks"),
    ({"first_token": 16}, "want"), ({"first_token": 2 ** 32 - 1}, "want"), ({"blocks": [*range(7), 2 ** 32 - 1]}, "blocks[7] is"),
    ({"k_block_stride": HUGE}, "beyond 2^64"), ({"v_head_stride": HUGE}, "reach"), ({"k_token_stride": 2 ** 63}, "beyond 2^64"),
    ({"k_block_stride": -BLOCK % 2 ** 64}, "beyond 2^64"), ({"k_head_stride": ROW + 1}, "multiples"), ({"k_dim_stride": 3}, "neither"),
    ({"k_dim_stride": 4, "k_token_stride": 2}, "share memory"), ({"k_token_stride": 0}, "share memory"),
    ({"k_block_stride": 0}, "share memory"), ({"v_dim_stride": 0}, "neither"), ({"k_head_stride": 2}, "share memory")]


@on_the_host
def test_a_reference_is_checked_and_nothing_has_changed(kvd, rpc):
    w, other = Wire(kvd, rpc), Wire(kvd, rpc)
    w.memory[:] = np.random.default_rng(1).integers(0x3f00, 0x4000, w.memory.size)
    before = np.array(w.memory)
    for method in ("PutPages", "GetPages"):
        for changed, text in [*WRONG, ({"k_buffers": [other.buffer]}, "no buffer" if other.buffer != w.buffer else "")]:
            if text:
                code, said = details(lambda: rpc.kv(method, **w.request(paged=w.paged(**changed))))
                assert code in ("INVALID_ARGUMENT", "NOT_FOUND") and text in said, (method, changed, said)
        for also in ({"k": messages.TensorRef()}, {"v": messages.TensorRef()}):
            assert "one is wanted" in details(lambda: rpc.kv(method, **w.request(paged=w.paged(), **also)))[1]
    found = rpc.kv("LookupPages", session=w.session, space=b"s", key_bytes=16, requests=[b"".join(PAGE_KEYS)]).found[0]
    assert found.kinds == bytes(2) and kvd.metric("kvd_sequences") == 0 and np.array_equal(w.memory, before)
    twice = w.paged(blocks=[0, 1, 2, 3, 4, 5, 6, 6])
    assert rpc.kv("PutPages", **w.request(paged=w.paged(), exact=b"\1\1")).stored == 2
    assert rpc.kv("PutPages", **w.request(keys=b"t" * 16 + b"u" * 16, paged=twice)).stored == 2  # nothing is written there
    w.memory[:] = 0
    for changed, text in (({"blocks": [0, 1, 2, 3, 4, 5, 6, 6]}, "block 6 is to be written twice"),
                          ({"k_offsets": [0, 0]}, "items[0].paged.k, which is written, shares memory with items[1].paged.k"),
                          ({"v_offsets": [0, 3 * SIDE]}, "shares memory"),
                          ({"v_offsets": [0, 3 * SIDE], "v_buffers": [w.again]}, "shares memory"), ({"v_offsets": [SIDE - 2, 3 * SIDE]}, "shares memory")):
        said = details(lambda: rpc.kv("GetPages", **w.request(paged=w.paged(**changed))))[1]
        assert text in said, (changed, said)
    assert not w.memory.any()
    rpc.kv("GetPages", **w.request(paged=w.paged(k_buffers=[w.buffer, w.again])))
    assert np.array_equal(w.memory, before)
    w.memory[:] = 0
    assert "page 0 of 2 is not there" in details(lambda: rpc.kv("GetPages", **w.request(space=b"other", paged=w.paged())))[1]
    assert not w.memory.any()


@on_the_host
def test_blocks_that_are_further_apart_than_they_are_long(kvd, rpc):
    """As K and V of one block lie side by side, and with room behind: what is between is not touched."""
    w = Wire(kvd, rpc, 8 * SIDE)
    w.memory[:] = np.random.default_rng(2).integers(0x3f00, 0x4000, w.memory.size)
    before = np.array(w.memory)
    mixed = {"k_offsets": [0, 4 * SIDE], "v_offsets": [BLOCK, 4 * SIDE + BLOCK], "k_block_stride": 3 * BLOCK, "v_block_stride": 3 * BLOCK}
    rpc.kv("PutPages", **w.request(paged=w.paged(**mixed), exact=b"\1\1"))
    w.memory[:] = 7
    rpc.kv("GetPages", **w.request(paged=w.paged(**mixed)))
    got, was = (x.reshape(2, -1)[:, :8 * 3 * BLOCK // 2].reshape(2, 8, 3, -1) for x in (w.memory, before))
    assert np.array_equal(got[:, :, :2], was[:, :, :2]) and (got[:, :, 2] == 7).all()


@on_the_host
def test_layers_of_several_codecs(kvd, rpc):
    """As a set makes them for layers that are sensitive: each of its kind wherever it lies among the others, by blocks as by tensors."""
    codecs = ["int2", "int4", "bf16", "int4", "int2"]
    planes = [messages.Plane(layers=[i for i, x in enumerate(codecs) if x == codec], codec=codec) for codec in ("int2", "int4", "bf16")]
    w = Wire(kvd, rpc, 10 * SIDE, layout(layers=[], planes=planes, windows=messages.Windows()))
    w.memory[:] = np.asarray(package.to_bf16(np.random.default_rng(3).standard_normal(w.memory.size, np.float32)))
    given = np.array(w.memory).reshape(5, 2, 128, 2, 64)
    mixed = {"k_offsets": [2 * SIDE * i for i in range(5)], "v_offsets": [2 * SIDE * i + SIDE for i in range(5)]}
    tensors = {side: messages.TensorRef(inline_data=given[:, i].tobytes()) for i, side in enumerate("kv")}
    assert rpc.kv("PutPages", **w.request(space=b"blocks", paged=w.paged(**mixed))).stored == 2
    assert rpc.kv("PutPages", **w.request(space=b"tensors", **tensors)).stored == 2
    all_of_it = []
    for of in (b"blocks", b"tensors"):
        got = rpc.kv("GetPages", **w.request(space=of))
        all_of_it.append(np.stack([np.frombuffer(x, np.uint16).reshape(5, 128, 2, 64) for x in (got.k, got.v)], axis=1))
        w.memory[:] = 0
        rpc.kv("GetPages", **w.request(space=of, paged=w.paged(**mixed)))
        all_of_it.append(np.array(w.memory).reshape(5, 2, 128, 2, 64))
    assert all(np.array_equal(x, all_of_it[0]) for x in all_of_it)
    errors = [np.sqrt(np.mean((package.from_bf16(a) - package.from_bf16(b)) ** 2)) for a, b in zip(all_of_it[0], given)]
    assert errors[2] == 0 and 0 < max(errors[1], errors[3]) < 0.2 < min(errors[0], errors[4])


@on_the_host
def test_a_release_is_answered_when_the_memory_is_free(kvd, rpc):
    """After the calls that use it, also where their callers have gone; who waits no longer is told so."""
    n = 512
    w = Wire(kvd, rpc, 4 * n * 4 * BLOCK)
    w.memory[:] = 0x3f80
    stride = n * 4 * BLOCK
    ref = w.paged(k_offsets=[0, 2 * stride], v_offsets=[stride, 3 * stride], all_blocks=4 * n, blocks=list(range(4 * n)))
    service = package_stub(rpc)
    put = service("PutPages", w.request(keys=b"".join(b"%016d" % i for i in range(n)), paged=ref))
    wait_until(lambda: kvd.metric("kvd_queued_calls") == 1 or put.done())
    released = service("ReleaseBuffer", {"session": w.session, "buffer": w.buffer})
    order = []
    put.add_done_callback(lambda f: order.append("put"))
    released.add_done_callback(lambda f: order.append("released"))
    assert put.result().stored == n and released.result() is not None
    wait_until(lambda: len(order) == 2)
    assert order == ["put", "released"]
    assert "no buffer" in details(lambda: rpc.kv("ReleaseBuffer", session=w.session, buffer=w.buffer))[1]


def package_stub(rpc):
    """Calls that are answered later."""
    def call(method, fields):
        kinds = [getattr(messages, method + x) for x in ("Request", "Reply")]
        return rpc.channel.unary_unary(f"/kvd.v1.KvCache/{method}", kinds[0].SerializeToString, kinds[1].FromString).future(
            kinds[0](**fields), timeout=20)
    return call
