"""Pages of an engine that keeps KV of its own: put by one process, found and got by others, and by nobody else."""
import base64
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest

import kvd as package
from conftest import BUILD, SOURCE, kv as messages, layout
from kvd import _library as lib
from kvd.pages import ENCODED, EXACT, MISSING

os.environ.setdefault("KVD_LIBRARY", str(BUILD / "client/libkvd.so.0"))
pytestmark = pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
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


def wait_until(done, timeout=20):
    end = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


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


def test_watchers_hear_of_pages(kvd):
    keys, e = keys_of("events", 5), Engine(20)
    e.write(range(20), kv(1, 5))
    with connect(kvd) as p:
        assert p.client.next_event(20).kind == "opened"
        p.put(keys[:3], e.paged(range(12)))
        p.put(keys, e.paged(range(20)))
        first, second = p.client.next_event(20), p.client.next_event(20)
        assert [(x.kind, len(x.keys)) for x in (first, second)] == [("stored", 3), ("stored", 2)]
        assert first.parent is None and second.parent == first.keys[-1]
        kvd.kvctl("evict", "--namespace", "default")
        gone = p.client.next_event(20)
        assert gone.kind == "removed" and set(gone.keys) == set(first.keys + second.keys)


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_a_gpu(kvd, order):
    """On a stream of the engine's, behind what it has there; exact bit for bit, encoded as from the host's memory."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or not kvd.on_gpu():
        pytest.skip("kvd or PyTorch has no GPU")
    given, keys, blocks = kv(9, 4), keys_of(order, 4), np.random.default_rng(3).permutation(40)
    e, stream = Engine(40, 16, order), torch.cuda.Stream()
    e.write(blocks[:16], given)

    def on_gpu(sides):
        return [[torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).cuda() for x in side] for side in sides]

    def paged(sides, blocks):
        return package.Paged(*sides, blocks, order=e.orders[0], v_order=e.orders[1], stream=stream.cuda_stream)

    hidden, source = on_gpu([e.k, e.v]), on_gpu([[np.zeros_like(x) for x in side] for side in (e.k, e.v)])
    target = on_gpu([[np.full_like(x, 0x4141) for x in side] for side in (e.k, e.v)])
    torch.cuda.synchronize()
    with connect(kvd) as p:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            for to, have in zip(source[0] + source[1], hidden[0] + hidden[1]):
                to.copy_(have)
        p.put(keys, paged(source, blocks[:16]), exact=[True, True, True, False])
        p.get(keys, paged(target, blocks[16:32]))
        with pytest.raises(package.InvalidError, match="one device"):
            package.Paged(target[0], e.v, blocks[:4], order=e.orders[0], v_order=e.orders[1])
        torch.cuda.synchronize()
        back = Engine(40, 16, order)
        for side, got in ((back.k, target[0]), (back.v, target[1])):
            for x, t in zip(side, got):
                x[...] = t.view(torch.int16).cpu().numpy().view(np.uint16)
        got = back.read(blocks[16:32])
        assert np.array_equal(got[:, :, :192], given[:, :, :192])
        assert 0.05 < error(got[:, :, 192:], given[:, :, 192:]) < 0.6
        assert (back.read(np.concatenate([blocks[:16], blocks[32:]])) == 0x4141).all()
        # The encoded page is the very one that the host's memory gives.
        p.put(keys_of("host", 1), e.paged(blocks[12:16]), exact=[False])
        host, other = Engine(4, 16, order), Engine(4, 16, order)
        p.get(keys_of("host", 1), host.paged(range(4)))
        p.get(keys[3:], other.paged(range(4)))
        assert np.array_equal(host.read(range(4)), other.read(range(4)))


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


def test_other_blocks_of_tensors_that_were_described(kvd):
    given, keys = kv(3, 2), keys_of("again", 2)
    source, target = Engine(4, 64), Engine(4, 64, "hnd")
    source.write([3, 1], given)
    described = source.paged([])
    with connect(kvd) as p:
        first, second = described.with_blocks([3]), described.with_blocks([1])  # what one has, the other does not change
        assert (described.pages, first.pages, second.pages) == (0, 1, 1)
        p.put(keys[:1], first, exact=[True])
        p.put(keys[1:], second, exact=[True], after=keys[0])
        p.get(keys, target.paged([0]).with_blocks([2, 0]))
        assert np.array_equal(target.read([2, 0]), given)
        for wrong in ([4], [-1]):
            with pytest.raises(package.InvalidError, match="blocks are 0 to 3"):
                described.with_blocks(wrong)
        with pytest.raises(TypeError):
            described.with_blocks([1.5])


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


def test_a_lease_keeps_pages_until_it_ends(start):
    """Where memory is short: what is leased stays, what is not gives way, a get says so and writes nothing."""
    kvd = start("--pool-size", "8MiB", "--extent-size", "2MiB")
    shape = {"layers": range(4), "kv_heads": 8, "head_dim": 128}
    e = Engine(64, 64, dim=128, layers=4, heads=8)  # an exact page has 1 MiB
    leased, others = keys_of("leased", 2), keys_of("others", 40)
    e.write(range(64), np.tile(kv(8, 1, 128, 4, 8), (1, 1, 64, 1, 1)))
    with connect(kvd, **shape) as p:
        p.put(leased, e.paged(range(2)), exact=[True] * 2)
        found = p.lookup([leased], lease_ms=60000)[0]
        assert found.pages == 2 and found.lease
        for i in range(0, 40, 2):
            p.put(others[i:i + 2], e.paged(range(2 + i, 4 + i)), exact=[True] * 2)
        assert p.lookup([leased], lease_ms=0)[0].pages == 2
        before = p.lookup([others[:2]], lease_ms=0)[0]
        assert before.pages == 0
        was = e.read(range(64))
        with pytest.raises(package.NotFoundError):  # evicted between the lookup that found it and the get
            p.get(others[:2], e.paged(range(60, 62)))
        assert np.array_equal(e.read(range(64)), was)
        p.release([found.lease])
        for i in range(0, 40, 2):
            p.put(others[i:i + 2], e.paged(range(2 + i, 4 + i)), exact=[True] * 2)
        assert p.lookup([leased], lease_ms=0)[0].pages == 0
        # A lease ends with its time, and with its session.
        p.put(leased, e.paged(range(2)), exact=[True] * 2)
        assert p.lookup([leased], lease_ms=50)[0].lease
        with connect(kvd, **shape) as other:
            other.lookup([leased], lease_ms=60000)
        wait_until(lambda: kvd.metric("kvd_prefix_leases") == 0)
    kvd.kvctl("verify")


def test_hints_of_pages(start, folder):
    """Kept beyond the session, first to go, of a priority, brought back meanwhile."""
    kvd = start("--pool-size", "8MiB", "--extent-size", "2MiB", config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\n")
    keys, e = keys_of("hints", 24), Engine(24, 64)
    e.write(range(24), kv(8, 24))

    def there(p):
        return [f.pages for f in p.lookup([keys[6 * i:6 * i + 6] for i in range(4)], lease_ms=0)]

    with connect(kvd) as p:
        for i in range(4):
            p.put(keys[6 * i:6 * i + 6], e.paged(range(6 * i, 6 * i + 6)), exact=[True] + [False] * 5)
        wait_until(lambda: json.loads(kvd.kvctl("--json", "tier", "status").stdout)["tiers"][0]["blocks"] in ("24", 24))
        assert p.hint([keys[:6], [], keys_of("none", 3)], "retain", 60) == [6, 0, 0]
    with connect(kvd) as p:
        kvd.kvctl("evict", "--namespace", "default")
        assert there(p) == [6, 0, 0, 0] and kvd.metric("kvd_prefix_leases") == 1
        assert p.hint([keys], "prefetch", 60) == [6]
        wait_until(lambda: there(p) == [6] * 4)
        kvd.kvctl("evict", "--namespace", "default")
        assert there(p) == [6] * 4  # what came is retained
        assert p.hint([keys], "retain", 0) == [24]
        assert p.hint([keys[:6]], "retain", 0) == [6]
        wait_until(lambda: kvd.metric("kvd_prefix_leases") <= 1)
    kvd.kvctl("verify")


@pytest.mark.parametrize("expire", [False, True])
def test_drop_of_a_page_that_is_retained_with_others(kvd, expire):
    """A page goes when an operator says so, whichever key the hint is remembered by; and so does no other's."""
    keys, e = keys_of("alone", 5), Engine(20)
    e.write(range(20), kv(1, 5))
    with connect(kvd) as p:
        for i in range(5):
            p.put(keys[i:i + 1], e.paged(range(4 * i, 4 * i + 4)))
        p.hint([keys[:3]], "retain", 600, expire=expire)
        p.hint([keys[3:]], "retain", 600)
        listed = [base64.b64decode(r["key"]).hex() for page in json.loads(kvd.kvctl("--json", "prefix", "ls", "default").stdout)
                  for r in page["prefixes"]]
        assert len(listed) == 5 and kvd.metric("kvd_prefix_leases") == 2
        for i, key in enumerate(listed):
            assert "dropped 1" in kvd.kvctl("prefix", "drop", "default", key).stdout
            if i == 0:
                assert kvd.metric("kvd_prefix_leases") == 1
        assert p.lookup([keys], lease_ms=0)[0].kinds == bytes(5) and kvd.metric("kvd_prefix_leases") == 0
    kvd.kvctl("verify")


def test_pages_that_expire(start, folder):
    """After their time they go, exact and encoded, from tiers too; neither those before them nor what somebody keeps or has put behind them."""
    kvd = start(config=f"[kvd]\ntier-host = 64MiB\ntier-directory = {folder}/blocks 1GiB\n")
    keys, e = keys_of("expire", 12), Engine(24, 64)
    e.write(range(24), kv(8, 24))

    def behind():
        return [int(t["blocks"]) for t in json.loads(kvd.kvctl("--json", "tier", "status").stdout)["tiers"]]

    with connect(kvd) as p:
        p.put(keys, e.paged(range(12)))
        p.put(keys[8:9], e.paged([8]), exact=[True])  # there both ways
        other = keys_of("other", 2)
        p.put(other, e.paged(range(2)), after=keys[5])
        wait_until(lambda: behind() == [15, 15])
        kept = p.lookup([keys[:11]], lease_ms=60000)[0].lease
        for wrong in (("retain", 0.0), ("prefetch", 1.0), ("demote", 0.0)):
            with pytest.raises(package.InvalidError, match="expire goes with RETAIN and a time"):
                p.hint([keys], *wrong, expire=True)
        assert p.hint([keys[4:]], "retain", 0.2, expire=True) == [8]
        wait_until(lambda: kvd.metric("kvd_prefix_leases_expired_total") == 1)
        assert p.lookup([keys], lease_ms=0)[0].kinds == bytes([1] * 8 + [2] + [1] * 2 + [0])  # the rest is kept
        assert p.hint([keys[4:]], "retain", 0.2, expire=True) == [7]
        p.release([kept])
        wait_until(lambda: kvd.metric("kvd_prefix_leases_expired_total") == 2)
        assert [f.pages for f in p.lookup([keys, other], lease_ms=0)] == [6, 2]
        wait_until(lambda: behind() == [8, 8])
        assert p.lookup([keys[6:]], lease_ms=0, restore_ms=5000)[0].restored == 0
        assert p.hint([keys], "retain", 0.2) == [6]  # which does not expire
        wait_until(lambda: kvd.metric("kvd_prefix_leases") == 0)
        assert p.lookup([keys], lease_ms=0)[0].pages == 6
    kvd.kvctl("verify")


def test_priorities_of_pages(kvd):
    keys, e = keys_of("classes", 24), Engine(24, 64)
    e.write(range(24), kv(8, 24))
    with connect(kvd) as p:
        runs = [keys[6 * i:6 * i + 6] for i in range(4)]
        for i, run in enumerate(runs):
            p.put(run, e.paged(range(6 * i, 6 * i + 6)))
        other = keys_of("other", 3)
        p.put(other, e.paged(range(3)), after=runs[2][2])  # goes on from a run's third page
        assert p.hint(runs[:1], "high") == [6] and p.hint(runs[1:2], "low") == [6]
        assert p.hint(runs[2:3], "demote") == [3]  # the other three are another's too
        assert p.hint([runs[3][::-1]], "low") == [1]  # in no order in which they are behind each other: the last one alone
        assert p.hint(runs[3:], "low") == [6]
        lost = []
        while sum(have := [f.pages for f in p.lookup([*runs, other], lease_ms=0, quiet=True)]):
            lost.append(have)
            kvd.kvctl("evict", "--namespace", "default", "--bytes", "1")
        assert [have[2] for have in lost[:4]] == [6, 5, 4, 3]  # demoted ones first
        low = [have for have in lost[3:] if have[1] or have[3]]
        assert len(low) == 12 and all(have[0] == 6 and have[2] == 3 and have[4] == 3 for have in low)
        assert all(have[0] == 6 for have in lost if have[2] or have[4])
        with pytest.raises(ValueError):
            p.hint(runs, "often")
        for wrong in ((runs, "high", 1.0), (runs, "retain", 86401.0), ([[keys[0], keys[1][:16]]], "low", 0)):
            with pytest.raises(package.InvalidError):
                p.hint(*wrong)
    kvd.kvctl("verify")


KILLED = """
import itertools, sys
sys.path.insert(0, sys.argv[1])
import test_pages as t
class Daemon: address = sys.argv[2]
e = t.Engine(64, 64)
e.write(range(64), t.kv(1, 64))
with t.connect(Daemon) as p:
    for n in itertools.count():
        p.put(t.keys_of(f"killed {n}", 64), e.paged(range(64)))
        print(n, flush=True)
"""


def test_a_worker_that_is_killed_amid_a_put_leaves_whole_pages_or_nothing(kvd):
    """And no sequence, lease or buffer. What is there is what it put, without holes."""
    p = subprocess.Popen([sys.executable, "-c", KILLED, SOURCE / "tests/e2e", kvd.address], stdout=subprocess.PIPE, text=True,
                         env={**os.environ, "PYTHONPATH": str(SOURCE / "client/python")})
    assert p.stdout.readline() == "0\n"
    p.kill()
    last = int((["0"] + p.stdout.read().split())[-1])
    p.wait(20)
    given = kv(1, 64)
    with connect(kvd) as other:
        wait_until(lambda: kvd.metric("kvd_sessions") == 1 and kvd.metric("kvd_sequences") == 0)
        for n in range(last + 2):
            keys = keys_of(f"killed {n}", 64)
            found = other.lookup([keys], lease_ms=0)[0]
            assert found.kinds.count(ENCODED) == found.pages and (n > last or found.pages == 64)
            if found.pages:
                e = Engine(64, 64)
                other.get(keys[:found.pages], e.paged(range(64)))
                assert error(e.read(range(found.pages)), given[:, :, :64 * found.pages]) < 0.6
        assert kvd.metric("kvd_prefix_leases") == 0
    kvd.kvctl("verify")


def test_thousands_of_pages_in_a_call(kvd):
    """4,096 keys of small pages, in parts that are all read or none."""
    given, keys = kv(9, 4096, 64, 1, 1), keys_of("many", 4096, 16)
    e = Engine(8192, 64, layers=1, heads=1)
    e.write(range(4096), given)
    with connect(kvd, layers=[0], kv_heads=1) as p:
        assert p.put(keys, e.paged(range(4096)), exact=[i % 5 == 0 for i in range(4096)]).count(MISSING) == 0
        found = p.lookup([keys, keys[::-1], []])
        assert [f.pages for f in found] == [4096, 4096, 0] and found[0].kinds == found[1].kinds[::-1]
        p.get(keys, e.paged(range(4096, 8192)))
        got = e.read(range(4096, 8192))
        exact = np.repeat(np.arange(4096) % 5 == 0, 64)
        assert np.array_equal(got[:, :, exact], given[:, :, exact])
        assert error(got, given) < 0.6
        p.release([f.lease for f in found])
        with pytest.raises(package.NotFoundError, match="page 4095 of 4096"):
            p.get(keys[:-1] + [b"x" * 16], e.paged(range(4096)))
        assert np.array_equal(e.read(range(4096)), given)
        with pytest.raises(package.InvalidError, match="4096"):
            p.lookup([keys + keys[:1]])


def test_what_is_malformed_is_refused_and_changes_nothing(kvd):
    keys = keys_of("bad", 2)
    e = Engine()
    e.write(range(8), kv(10, 2))
    with connect(kvd) as p:
        for bad in ([b"short", b"short"], [b"x" * 41] * 2, [b"x" * 16, b"y" * 17]):
            with pytest.raises(package.InvalidError):
                p.put(bad, e.paged(range(8)))
            with pytest.raises(package.InvalidError):
                p.lookup([bad])
        for blocks in ([0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 64], [-1, 1, 2, 3, 4, 5, 6, 7]):
            with pytest.raises(package.InvalidError):
                p.put(keys, e.paged(blocks))
        with pytest.raises(package.InvalidError, match="block 3 is to be written twice"):
            p.get(keys, e.paged([3, 1, 2, 3, 4, 5, 6, 7]))
        with pytest.raises(package.InvalidError, match="share"):  # K's memory is V's
            p.get(keys, package.Paged(e.k, e.k, range(8), order="bthd"))
        with pytest.raises(package.InvalidError):  # layers share memory
            p.get(keys, package.Paged([e.k[0]] * LAYERS, e.v, range(8), order="bthd"))
        with pytest.raises(package.InvalidError, match="share memory"):  # a block over the next one
            broad = np.lib.stride_tricks.as_strided(e.k[0], strides=(e.k[0].strides[0] // 2, *e.k[0].strides[1:]))
            p.get(keys, package.Paged([broad] * LAYERS, e.v, range(8), order="bthd"))
        with pytest.raises(package.InvalidError, match="layers, kv_heads and head_dim"):
            p.put(keys, Engine(dim=128).paged(range(8)))
        with pytest.raises(package.InvalidError):
            p.put(keys, e.paged(range(8)), exact=[True])
        e.k[1][2, 5] = 0x7F80  # Inf
        with pytest.raises(package.InvalidError, match="k of page 0 holds NaN or Inf at layer 1, token 37"):
            p.put(keys, e.paged(range(8)))
        assert p.lookup([keys])[0].kinds == bytes(2)
        for options in ({"space": b""}, {"space": b"x" * 1025}):
            with connect(kvd, **options) as other, pytest.raises(package.InvalidError, match="space"):
                other.lookup([keys])
    with pytest.raises(package.InvalidError, match="sink"):
        package.Client(layers=range(2), q_heads=2, kv_heads=2, head_dim=64, address=kvd.address, pages=True)
    with package.Client(layers=range(LAYERS), q_heads=HEADS, kv_heads=HEADS, head_dim=DIM, sink=0, recent=0, address=kvd.address) as c:
        with pytest.raises(package.PreconditionError, match="without pages"):
            space, key, out = lib.Bytes(b"s", 1), lib.PageKeys(keys=b"k" * 16, key_bytes=16, pages=1), lib.FoundStruct()
            lib.call("kvd_pages_lookup", c._open(), ctypes.byref(space), ctypes.byref(key), 1, None, ctypes.byref(out))


def test_the_wire_is_checked_too(kvd, rpc):
    """A worker need not be libkvd: what does not fit, keys of other sizes, and too many of them."""
    small = layout(layers=[0], q_heads=1, kv_heads=1, windows=messages.Windows())
    with pytest.raises(grpc.RpcError, match="recent window of 256"):
        rpc.kv("OpenSession", layout=layout(), pages=True)
    session = rpc.kv("OpenSession", layout=small, pages=True)
    assert session.exact_layout_digest != session.layout_digest
    plain = rpc.kv("OpenSession", layout=small).session
    tensors = [messages.TensorRef(inline_data=kv(1, 2, 64, 1, 1)[i].tobytes()) for i in range(2)]
    good = {"session": session.session, "space": b"s", "key_bytes": 16, "keys": b"k" * 16 + b"l" * 16, "k": tensors[0], "v": tensors[1]}
    for changed, text in (({"session": plain}, "without page calls"), ({"space": b""}, "space"), ({"space": b"x" * 1025}, "space"),
                          ({"key_bytes": 15}, "16 to 40"), ({"key_bytes": 41}, "16 to 40"), ({"key_bytes": 0}, "16 to 40"),
                          ({"keys": b"k" * 33}, "no keys of 16"), ({"keys": b""}, "no keys"), ({"keys": b"k" * 16 * 513}, "at most 512"),
                          ({"after": b"k"}, "after has 1"), ({"exact": b"\1"}, "exact has 1"), ({"exact": b"\1\2"}, "0 and 1"),
                          ({"k": messages.TensorRef(inline_data=b"x")}, "wants"), ({"k": messages.TensorRef(buffer=7)}, "no buffer"),
                          ({"k": messages.TensorRef(dtype=1)}, "bf16"), ({"keys": b"k" * 16 * 3}, "wants")):
        with pytest.raises(grpc.RpcError) as e:
            rpc.kv("PutPages", **{**good, **changed})
        assert text in e.value.details(), (changed, e.value.details())
    for changed, text in (({"requests": []}, "1 to 256"), ({"requests": [b"k" * 16] * 257}, "at most 256"),
                          ({"requests": [b"k" * 17]}, "no keys of 16"), ({"requests": [b"k" * 16 * 4097]}, "at most 4096"),
                          ({"requests": [b"k" * 16 * 4096] * 17}, "at most 65536"), ({"lease_ms": 600001}, "at most 600000")):
        with pytest.raises(grpc.RpcError) as e:
            rpc.kv("LookupPages", **{"session": session.session, "space": b"s", "key_bytes": 16, "requests": [b"k" * 16], **changed})
        assert text in e.value.details(), (changed, e.value.details())
    names = {n: good[n] for n in ("session", "space", "key_bytes", "keys")}
    with pytest.raises(grpc.RpcError, match="page 0 of 2 is not there"):
        rpc.kv("GetPages", **names)
    put = rpc.kv("PutPages", **good, exact=b"\1\0", after=b"z" * 16)
    assert (put.kinds, put.stored) == (bytes([EXACT, ENCODED]), 2)
    again = rpc.kv("PutPages", **good, exact=b"\1\0")
    assert (again.kinds, again.stored) == (bytes([EXACT, ENCODED]), 0)
    got = rpc.kv("GetPages", **names)
    assert got.kinds == put.kinds and got.k[:64 * 64 * 2] == tensors[0].inline_data[:64 * 64 * 2] and len(got.v) == 2 * 64 * 64 * 2


def test_nan_is_told_by_its_page_whatever_kinds_are_put(kvd):
    """All are looked at before any is stored, exact ones and others, in runs of either."""
    keys, exact = keys_of("nan", 6), [True, False, False, True, False, True]
    with connect(kvd) as p:
        for page in range(6):
            e, x = Engine(24), kv(1, 6)
            x[1, 2, 64 * page + 5, 1, 3] = 0x7fc0
            e.write(range(24), x)
            with pytest.raises(package.InvalidError, match=f"v of page {page} holds NaN or Inf at layer 2, token 5, head 1, channel 3; nothing"):
                p.put(keys, e.paged(range(24)), exact=exact)
            assert p.lookup([keys])[0].kinds == bytes(6)


def test_a_put_asks_once_or_not_at_all(kvd):
    """Whoever has looked pages up says what there was. What is there all the same is not stored again, and not changed."""
    e, other, target, keys = Engine(24), Engine(24), Engine(24), keys_of("had", 6)
    given = kv(1, 6)
    e.write(range(24), given)
    other.write(range(24), kv(2, 6))

    def asked():
        return kvd.metric('kvd_rpc_requests_total{method="kvd.v1.KvCache/LookupPages",code="OK"}')

    with connect(kvd) as p, p.queue() as q:
        p.put(keys[:2], e.paged(range(8)), exact=[True, False])
        (found,) = p.lookup([keys])
        before = asked()
        kinds = bytes([EXACT, ENCODED, EXACT, ENCODED, ENCODED, EXACT])
        assert p.put(keys[:4], e.paged(range(16)), exact=[k == EXACT for k in kinds[:4]], had=found.kinds[:4]) == kinds[:4]
        # Others thought that there was nothing: the pages of the first stay.
        assert p.put(keys[:4], other.paged(range(16)), exact=[k == EXACT for k in kinds[:4]], had=bytes(4)) == kinds[:4]
        q.put(keys, e.paged(range(24)), exact=[k == EXACT for k in kinds], had=kinds[:4] + bytes(2))
        assert q.wait(1, 20) and q.poll()[0].kinds == kinds and asked() == before
        assert p.get(keys, target.paged(range(24))) == kinds
        got = target.read(range(24))
        for i, kind in enumerate(kinds):
            at = np.s_[:, :, 64 * i:64 * (i + 1)]
            assert np.array_equal(got[at], given[at]) if kind == EXACT else error(got[at], given[at]) < 0.6
        # What is not there is not stored by saying that it is.
        assert p.put(keys_of("gone", 2), e.paged(range(8)), had=bytes([EXACT, MISSING])) == bytes([EXACT, ENCODED])
        assert p.lookup([keys_of("gone", 2)])[0].kinds == bytes([MISSING, ENCODED])
        for wrong, text in ((bytes(5), "one for each of 6"), ([0] * 6, "one for each of 6"), (bytes([0] * 5 + [3]), r"had\[5\] is 3")):
            with pytest.raises(package.InvalidError, match=text):
                p.put(keys, e.paged(range(24)), had=wrong)


def test_metrics_count_pages_and_bytes(kvd):
    e, keys = Engine(), keys_of("metrics", 4)
    e.write(range(16), kv(11, 4))
    size = 2 * LAYERS * 64 * HEADS * DIM * 2
    with connect(kvd, namespace="counted") as p:
        p.put(keys[:3], e.paged(range(12)), exact=[True, False, False])
        p.lookup([keys])
        p.put(keys[:1], e.paged(range(4)))  # libkvd asks first: nothing is sent
        p.get(keys[:2], e.paged(range(20, 28)))
        for name, value in (("looked_up", 4), ("found", 3), ("put", 3), ("put_bytes", 3 * size), ("got", 2), ("got_bytes", 2 * size)):
            assert f'kvd_pages_{name}_total{{namespace="counted"}} {value}\n' in kvd.kvctl("metrics").stdout, name
        assert 'kvd_kernel_duration_seconds_count{op="put"} 1' in kvd.kvctl("metrics").stdout
