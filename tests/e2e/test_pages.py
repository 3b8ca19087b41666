"""Pages of an engine that keeps KV of its own: put by one process, found and got by others, and by nobody else."""
import hashlib
import os
import threading

import numpy as np
import pytest

import kvd as package
from conftest import BUILD
from kvd.pages import ENCODED, EXACT, MISSING

os.environ.setdefault("KVD_LIBRARY", str(BUILD / "client/libkvd.so.0"))
LAYERS, HEADS, DIM = 3, 2, 64
# How engines lay their blocks out: NHD and HND on GPUs, and vLLM's CPU with K transposed.
ORDERS = {"nhd": ("bthd", "bthd"), "hnd": ("bhtd", "bhtd"), "vllm-cpu": ("bhdt", "bhtd")}


def connect(kvd, **options):
    return package.Pages(**{"space": b"a model", "layers": range(LAYERS), "kv_heads": HEADS, "head_dim": DIM, "address": kvd.address,
                            **options})


def keys_of(seed, n, size=32):
    return [hashlib.sha512(f"{seed} {i}".encode()).digest()[:size] for i in range(n)]


class Engine:
    """An engine's KV: `blocks` blocks of so many tokens in some order, filled with something that is not KV."""

    def __init__(self, blocks=64, tokens=16, order="nhd", dim=DIM, layers=LAYERS, heads=HEADS):
        self.orders = ORDERS[order]
        self.sizes = {"b": blocks, "h": heads, "t": tokens, "d": dim}
        self.k, self.v = ([np.full([self.sizes[a] for a in o], 0x4141, np.uint16) for _ in range(layers)] for o in self.orders)

    def paged(self, blocks, **options):
        return package.Paged(self.k, self.v, blocks, order=self.orders[0], v_order=self.orders[1], **options)

    def views(self):
        """[side][layer] as [block, token, head, dim]."""
        return [[x.transpose([o.index(a) for a in "bthd"]) for x in side] for side, o in zip((self.k, self.v), self.orders)]

    def write(self, blocks, kv):
        for side, given in zip(self.views(), kv):
            for layer, x in zip(side, given):
                layer[np.asarray(blocks)] = x.reshape(len(blocks), -1, *x.shape[1:])

    def read(self, blocks):
        return np.stack([[layer[np.asarray(blocks)].reshape(-1, *layer.shape[2:]) for layer in side] for side in self.views()])


def kv(seed, pages, dim=DIM, layers=LAYERS, heads=HEADS):
    """bf16 bits [K and V][layers][tokens][heads][dim]."""
    x = np.random.default_rng(seed).standard_normal((2, layers, pages * 64, heads, dim), np.float32)
    return np.asarray(package.to_bf16(x))


def error(got, wanted):
    a, b = package.from_bf16(got), package.from_bf16(wanted)
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b ** 2)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [16, 64, 128])
def test_what_was_put_is_got_whatever_the_blocks(kvd, order, tokens):
    """From blocks in one order and size into blocks of another engine's, exact bit for bit, encoded nearly; nothing else is touched."""
    rng = np.random.default_rng(tokens)
    given, keys = kv(1, 6), keys_of(f"{order} {tokens}", 6)
    source, target = Engine(48, tokens, order), Engine(40, 16, "vllm-cpu")
    blocks = rng.permutation(48)[:6 * 64 // tokens]
    source.write(blocks, given)
    exact = [True, False, False, True, False, True]
    with connect(kvd) as a, connect(kvd) as b:
        assert [f.pages for f in b.lookup([keys, []])] == [0, 0]
        kinds = bytes(EXACT if x else ENCODED for x in exact)
        assert a.put(keys, source.paged(blocks), exact=exact) == kinds
        found = b.lookup([keys, keys[3:4], [keys[2], b"x" * 32, keys[0]]])
        assert [(f.pages, f.kinds) for f in found] == [(6, kinds), (1, kinds[3:4]), (1, bytes([ENCODED, MISSING, EXACT]))]
        into = rng.permutation(40)[:24]
        before = [np.array(x) for x in target.k + target.v]
        assert b.get(keys, target.paged(into)) == kinds
        got = target.read(into)
        for i, e in enumerate(exact):
            at = np.s_[:, :, 64 * i:64 * (i + 1)]
            if e:
                assert np.array_equal(got[at], given[at])
            else:
                assert 0.05 < error(got[at], given[at]) < 0.6
        others = np.setdiff1d(np.arange(40), into)
        assert all(np.array_equal(x[others], y[others]) for x, y in zip(target.k + target.v, before))
        b.release([f.lease for f in found])


def test_half_a_block_is_a_page(kvd):
    given, keys = kv(2, 3), keys_of("half", 3)
    source, target = Engine(4, 128), Engine(4, 128, "hnd")
    source.write([2, 1], np.concatenate([given[:, :, :64], given], axis=2))  # page 0 is the second half of block 2
    with connect(kvd) as p:
        p.put(keys, source.paged([2, 1], first=64), exact=[True] * 3)
        assert p.get(keys[1:], target.paged([3, 0], first=64)) == bytes([EXACT] * 2)
        assert np.array_equal(target.read([3])[:, :, 64:], given[:, :, 64:128])
        assert np.array_equal(target.read([0])[:, :, :64], given[:, :, 128:])
        assert (target.read([3])[:, :, :64] == 0x4141).all() and (target.read([0])[:, :, 64:] == 0x4141).all()


def test_an_exact_page_is_not_replaced(kvd):
    given, other, keys = kv(3, 2), kv(4, 2), keys_of("exact", 2)
    e = Engine()
    with connect(kvd) as p:
        e.write(range(8), given)
        assert p.put(keys[:1], e.paged(range(4)), exact=[True]) == bytes([EXACT])
        e.write(range(8), other)
        assert p.put(keys, e.paged(range(8))) == bytes([EXACT, ENCODED])
        p.get(keys, e.paged(range(20, 28)))
        assert np.array_equal(e.read(range(20, 24)), given[:, :, :64])
        # One that is encoded may be put exactly, and is the better one then.
        assert p.put(keys, e.paged(range(8)), exact=[False, True]) == bytes([EXACT, EXACT])
        p.get(keys, e.paged(range(20, 28)))
        assert np.array_equal(e.read(range(24, 28)), other[:, :, 64:])


def test_a_page_that_is_gone_writes_nothing(kvd):
    given, keys = kv(5, 3), keys_of("gone", 3)
    e = Engine()
    with connect(kvd) as p:
        e.write(range(12), given)
        p.put(keys[:1] + keys[2:], e.paged([0, 1, 2, 3, 8, 9, 10, 11]))
        before = e.read(range(64))
        with pytest.raises(package.NotFoundError, match="page 1 of 3 is not there"):
            p.get(keys, e.paged(range(20, 32)))
        assert np.array_equal(e.read(range(64)), before)


def test_two_tenants_never_share_and_equal_spaces_always_do(kvd):
    """Of one user too: namespace and space alike decide, the codec does for what is encoded."""
    given, keys = kv(6, 2), keys_of("tenants", 2)
    e = Engine()
    e.write(range(8), given)
    with connect(kvd, namespace="one") as p, connect(kvd, namespace="one") as same, connect(kvd, namespace="two") as other, \
            connect(kvd, namespace="one", space=b"another model") as space, connect(kvd, namespace="one", codec="int2c") as codec, \
            connect(kvd, namespace="one", tp_rank=1, tp_size=2) as rank:
        p.put(keys, e.paged(range(8)), exact=[True, False])
        assert [x.lookup([keys])[0].kinds for x in (same, other, space, codec, rank)] == [
            bytes([EXACT, ENCODED]), bytes(2), bytes(2), bytes([EXACT, MISSING]), bytes(2)]
        for x in (other, space, rank):
            with pytest.raises(package.NotFoundError):
                x.get(keys[:1], e.paged(range(20, 24)))
        assert other.put(keys, e.paged(range(8, 16))) == bytes([ENCODED] * 2)  # its own
        same.get(keys[:1], e.paged(range(20, 24)))
        assert np.array_equal(e.read(range(20, 24)), given[:, :, :64])
        # A chained key, as prompts have them, is another's even if its bytes are a page's.
        with package.Client(layers=range(LAYERS), q_heads=HEADS, kv_heads=HEADS, head_dim=DIM, sink=0, recent=0, address=kvd.address,
                            namespace="one") as c:
            assert c.match([package.Prompt(block_keys=keys, extra=b"a model")])[0].known == 0


def test_of_two_puts_of_a_key_one_stays(kvd):
    """Many at once: each page is one of those that were put, whole, and only one copy of it is kept."""
    keys = keys_of("race", 8)
    given = [kv(100 + i, 8) for i in range(4)]
    start = threading.Barrier(4)

    def put(i):
        e = Engine()
        e.write(range(32), given[i])
        with connect(kvd) as p:
            start.wait()
            for n in range(8):
                at = (n + 2 * i) % 8
                p.put([keys[at]], e.paged(range(4 * at, 4 * at + 4)), exact=[True])

    threads = [threading.Thread(target=put, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    e = Engine()
    with connect(kvd) as p:
        assert p.get(keys, e.paged(range(32))) == bytes([EXACT] * 8)
        got = e.read(range(32))
        for i in range(8):
            at = np.s_[:, :, 64 * i:64 * (i + 1)]
            assert sum(np.array_equal(got[at], g[at]) for g in given) == 1
    metrics = kvd.kvctl("metrics").stdout
    assert 'kvd_pages_put_total{namespace="default"} 8\n' in metrics and 'kvd_prefix_blocks{namespace="default"} 8\n' in metrics
    kvd.kvctl("verify")
