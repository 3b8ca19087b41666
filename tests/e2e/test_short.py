"""Short sequences: what they take, that none has rows of another's, and that whoever maps one finds it where it was."""
import mmap
import random
import threading

import grpc
import numpy as np
import pytest

import kvd as package
from conftest import BUILD, Rpc, kv, layout
from test_direct import EXTENT, NO_PAGE, Raw, page_of, wants_memfds
from test_grpc import DIM, HEADS, KV, LAYERS, append, bf16, code_of, error, exact, open_session, random_kv, tensor, widen
from test_keep import kill
from test_python import attention, close, connect, fill, values

TOKEN = LAYERS * KV * 2 * DIM * 2  # bytes in bf16
TAKES = {1: 16, 16: 16, 17: 32, 25: 32, 33: 64, 64: 64, 65: 80, 100: 128, 129: 144, 200: 208, 320: 320}


def rows(n):
    """That n tokens take while the recent window is not full."""
    return n - n % 64 + next(r for r in (0, 16, 32, 64) if n % 64 <= r)


def info(rpc, session, seq):
    return rpc.kv("DescribeSequences", session=session, sequences=[seq]).sequences[0]


def read(rpc, session, seq, n):
    r = rpc.kv("ReadTokens", session=session, sequence=seq, begin=0, tokens=n, k=kv.TensorRef(), v=kv.TensorRef())
    return [np.frombuffer(x, "<u2").reshape(LAYERS, n, KV, DIM) for x in (r.k, r.v)]


class Known:
    """A sequence in bf16, and all that it has been given."""

    def __init__(self, seq, k=None, v=None):
        self.seq = seq
        self.k, self.v = (x if x is not None else np.zeros((LAYERS, 0, KV, DIM), "<u2") for x in (k, v))
        self.grown = 0 if k is None else -1  # the most tokens that it has had; -1: it shares pages

    @property
    def length(self):
        return self.k.shape[1]

    def take(self, k, v):
        self.k, self.v = np.concatenate([self.k, k], axis=1), np.concatenate([self.v, v], axis=1)
        self.grown = max(self.grown, self.length) if self.grown >= 0 else -1

    def check(self, rpc, session):
        described = info(rpc, session, self.seq)
        assert described.length == self.length
        if self.grown >= 0 and self.grown == self.length <= 320:
            assert described.bytes == rows(self.length) * TOKEN
        if self.length:
            k, v = read(rpc, session, self.seq, self.length)
            assert np.array_equal(k, self.k) and np.array_equal(v, self.v), self.length


class Neighbours:
    """Many that grow side by side, in all the ways there are."""

    def __init__(self, rpc, session, seed):
        self.rpc, self.session, self.rng, self.known = rpc, session, random.Random(seed), []

    def grow(self, s):
        n = self.rng.choice([1, 1, 3, 7, 15, 16, 20, 40])
        k, v = random_kv(n)
        how = self.rng.choice(["append", "layers", "step"])
        if how == "append":
            append(self.rpc, self.session, s.seq, s.length, k, v)
        for i in range(LAYERS if how == "layers" else 0):
            append(self.rpc, self.session, s.seq, s.length, k[i:i + 1], v[i:i + 1], layer_begin=i, layer_count=1)
        before = s.length
        s.take(k, v)
        if how == "step":
            q = np.random.default_rng(before).normal(size=(LAYERS, n, HEADS, DIM)).astype(np.float32)
            item = kv.StepItem(sequence=s.seq, position=before, tokens=n, q=tensor(q), k=tensor(k), v=tensor(v),
                               o=kv.TensorRef(dtype=1))
            o = self.rpc.kv("Step", session=self.session, items=[item]).results[0].o
            want, _ = exact(q.astype(np.float64), widen(s.k), widen(s.v))
            assert error(np.frombuffer(o, np.float32).reshape(want.shape), want) < 2e-3

    def step(self):
        what = self.rng.choice(["new"] + ["grow"] * 8 + ["fork", "truncate", "free"])
        if what == "new" and len(self.known) < 16 or not self.known:
            self.known.append(Known(self.rpc.kv("CreateSequences", session=self.session, count=1).sequences[0]))
            return
        s = self.rng.choice(self.known)
        if what == "fork" and len(self.known) < 16:
            child = self.rpc.kv("ForkSequence", session=self.session, sequence=s.seq, count=1).sequences[0]
            self.known.append(Known(child, s.k, s.v))
            s.grown = -1
        elif what == "truncate":
            n = self.rng.randrange(s.length + 1)
            self.rpc.kv("TruncateSequence", session=self.session, sequence=s.seq, length=n)
            s.k, s.v = s.k[:, :n], s.v[:, :n]
        elif what == "free" and len(self.known) > 4:
            self.rpc.kv("FreeSequences", session=self.session, sequences=[s.seq])
            self.known.remove(s)
        elif s.length < 500:
            self.grow(s)
        s.check(self.rpc, self.session) if s in self.known else None

    def check(self):
        for s in self.known:
            s.check(self.rpc, self.session)


def test_what_short_sequences_take(kvd, rpc):
    s = open_session(rpc)
    used = 0
    for n, takes in TAKES.items():
        seq = rpc.kv("CreateSequences", session=s, count=1).sequences[0]
        append(rpc, s, seq, 0, *random_kv(n))
        assert takes == rows(n) and info(rpc, s, seq).bytes == takes * TOKEN
        used += takes * TOKEN
        assert kvd.metric('kvd_pool_bytes{state="used"}') == used
    listed = {i.length: i.bytes for i in rpc.admin("ListSequences").sequences}
    assert listed == {n: takes * TOKEN for n, takes in TAKES.items()}


def test_pages_are_whole_where_k_and_v_differ(kvd, rpc):
    s = open_session(rpc, layout=layout(head_dim_k=192, head_dim_v=128))
    seq = rpc.kv("CreateSequences", session=s, count=1).sequences[0]
    k, v = (bf16(np.random.default_rng(1).normal(size=(LAYERS, 5, KV, d))) for d in (192, 128))
    append(rpc, s, seq, 0, k, v)
    assert info(rpc, s, seq).bytes == 64 * LAYERS * KV * 2 * (192 + 128)


def test_neighbours(kvd, rpc):
    n = Neighbours(rpc, open_session(rpc, layout=layout(codec="bf16")), 5)
    for _ in range(400):
        n.step()
    n.check()
    rpc.kv("FreeSequences", session=n.session, sequences=[s.seq for s in n.known])
    assert kvd.metric('kvd_pool_bytes{state="used"}') == 0


def test_they_outlive_kvd(start):
    keeper = start("--keep")
    rpc = Rpc(keeper.address)
    n = Neighbours(rpc, open_session(rpc, layout=layout(codec="bf16")), 6)
    for _ in range(4):
        for _ in range(60):
            n.step()
        n.rpc.channel.close()
        kill(keeper)
        n.rpc = Rpc(keeper.address)
        n.session = n.rpc.kv("OpenSession", layout=layout(codec="bf16"), resume=n.session).session
        n.check()
    n.rpc.channel.close()


# -- direct mode --------------------------------------------------------------------------------


def tile_rows(memory, at, n):
    """Rows of K of the first n tokens of a page, [layer][token][head]."""
    tile = 64 * 2 * 2 * DIM
    heads = [[np.frombuffer(memory, "<u2", n * DIM, at + (l * KV + h) * tile).reshape(n, DIM) for h in range(KV)] for l in range(LAYERS)]
    return np.array(heads).transpose(0, 2, 1, 3)


def test_who_is_mapped_stays_where_it_is(kvd):
    wants_memfds(kvd)
    w = Raw(kvd)
    seq, k, _ = w.sequence(20)
    other, _, _ = w.sequence(20)
    assert info(w.rpc, w.session, seq).bytes == 32 * TOKEN
    reply = w.map(seq, seq)  # by two slots, too
    assert info(w.rpc, w.session, seq).bytes == 64 * TOKEN and info(w.rpc, w.session, other).bytes == 32 * TOKEN
    maps = {e: mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) for kind, e, size, fd in w.read() if kind == EXTENT}
    assert list(reply.sequences[0].bf16_pages) == list(reply.sequences[1].bf16_pages)
    memory, at = page_of(reply.sequences[0].bf16_pages[0], maps, reply.extent_bytes)
    assert np.array_equal(tile_rows(memory, at, 20), k)
    # It goes on, others come and go, and an old view still has what it had.
    for i in range(8):
        more, _ = random_kv(9)
        k = np.concatenate([k, more], axis=1)
        append(w.rpc, w.session, seq, 20 + 9 * i, more, more)
        w.free(*[w.sequence(n)[0] for n in (5, 20, 40)])
        assert np.array_equal(tile_rows(memory, at, 20), k[:, :20])
    assert info(w.rpc, w.session, seq).bytes == 2 * 64 * TOKEN
    mapped = w.map(seq).sequences[0]
    assert mapped.bf16_pages[0] == reply.sequences[0].bf16_pages[0] and mapped.bf16_pages[1] != NO_PAGE
    assert np.array_equal(tile_rows(memory, at, 64), k[:, :64])
    # A fork of it is short again, until it is mapped itself.
    child = w.rpc.kv("ForkSequence", session=w.session, sequence=seq, count=1).sequences[0]
    w.rpc.kv("TruncateSequence", session=w.session, sequence=child, length=0)
    append(w.rpc, w.session, child, 0, *random_kv(3))
    assert info(w.rpc, w.session, child).bytes == 16 * TOKEN


def test_there_must_be_room_to_be_mapped(kvd):
    wants_memfds(kvd)
    w = Raw(kvd, namespace="tight")
    seq, k, _ = w.sequence(10)
    kvd.kvctl("quota", "set", "tight", str(40 * TOKEN))
    with pytest.raises(grpc.RpcError) as e:
        w.map(seq)
    assert code_of(e) == "RESOURCE_EXHAUSTED" and "quota" in e.value.details()
    assert info(w.rpc, w.session, seq).bytes == 16 * TOKEN and np.array_equal(read(w.rpc, w.session, seq, 10)[0], k)
    kvd.kvctl("quota", "set", "tight", str(80 * TOKEN))
    assert w.map(seq).sequences[0].length == 10


def test_mapped_sequences_outlive_kvd_as_such(start):
    keeper = start("--keep")
    wants_memfds(keeper)
    w = Raw(keeper)
    seq, k, _ = w.sequence(20)
    w.map(seq)
    w.rpc.channel.close()
    kill(keeper)
    again = Raw(keeper, resume=w.session)
    append(again.rpc, again.session, seq, 20, *random_kv(50))
    assert info(again.rpc, again.session, seq).bytes == 2 * 64 * TOKEN
    assert np.array_equal(read(again.rpc, again.session, seq, 20)[0], k)


@pytest.mark.skipif("san" in BUILD.name, reason="Python is not instrumented")
def test_direct_mode_begins_short(kvd):
    """A worker goes on with a short sequence in direct mode, while others use what is free."""
    wants_memfds(kvd)
    layers, heads, kv_heads, dim, first, steps = 3, 6, 2, 64, 21, 150
    k, v = (values(i, layers, first + steps, kv_heads, dim) for i in (1, 2))
    q = values(3, layers, steps, heads, dim)
    stop, failed = threading.Event(), []

    def churn():
        try:
            with connect(kvd, codec="bf16") as c:
                x = fill(c, values(9, layers, 20, kv_heads, dim))
                while not stop.is_set():
                    s = c.create()
                    s.append(x, x)
                    s.append(x, x)
                    s.free()
        except Exception as e:
            failed.append(e)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        with connect(kvd, codec="bf16") as client:
            s = client.create()
            s.append(fill(client, k[:, :first]), fill(client, v[:, :first]))
            with package.Direct(client, slots=1, max_tokens=1000) as direct:
                direct.bind(0, s)
                for i in range(steps):
                    direct.begin()
                    for l in range(layers):
                        o = np.zeros((1, 1, heads, dim), np.float32)
                        at = first + i
                        direct.store(l, package.to_bf16(k[l, at][None, None]), package.to_bf16(v[l, at][None, None]))
                        direct.attend(l, q[l, i][None, None].astype(np.float32), o)
                        close(o[0], attention(q[l, i:i + 1], k[l, :at + 1], v[l, :at + 1])[0], 5e-3)
                    direct.end()
    finally:
        stop.set()
        thread.join()
    assert not failed
