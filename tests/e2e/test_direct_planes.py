"""Direct mode over layouts of several planes, as Gemma 3 has them: five of six layers see a window only; in any codecs, with attention sinks."""
import os

import grpc
import numpy as np
import pytest

import kvd as package
from conftest import BUILD, EMULATED, kv
from on_device import one_step
from test_direct import EXTENT, NO_PAGE, ROTATIONS, Raw, wants_memfds
from test_grpc import append, code_of, random_kv
from test_planes import attention
from test_python import close, connect, fill, values

os.environ.setdefault("KVD_LIBRARY", str(BUILD / "client/libkvd.so.0"))
LAYERS, Q_HEADS, KV_HEADS, DIM, SLOTS = 6, 4, 2, 64, 3


def open_client(kvd, window, **options):
    return connect(kvd, layers=range(LAYERS), q_heads=Q_HEADS, windows=[window] * (LAYERS - 1) + [0], **options)


class Slot:
    """A sequence that is decoded, and what its layers hold."""

    def __init__(self, client, tokens, seed):
        self.client, self.window, self.sinks = client, client.windows, client.sinks or [None] * LAYERS
        self.kv = [values(seed + i, LAYERS, tokens, KV_HEADS, DIM) for i in (0, 1)]
        self.sequence = client.create()
        self.sequence.append(fill(client, self.kv[0]), fill(client, self.kv[1]))

    def add(self, kv):
        self.kv = [np.concatenate([x, new], axis=1) for x, new in zip(self.kv, kv)]

    def cut(self, tokens):
        self.kv = [x[:, :tokens] for x in self.kv]

    def agree(self, q, o, new):
        """Against float64: exact where pages are bf16."""
        k, v = (np.concatenate([x, n], axis=1) for x, n in zip(self.kv, new))
        for layer in range(LAYERS):
            close(o[layer], attention(q[layer].astype(np.float64), k[layer], v[layer], self.window[layer], self.sinks[layer]), 1e-5)

    def daemon(self, q, new):
        """What the daemon's own Step says of a twin, which has the same pages."""
        twin, o = self.sequence.fork()[0], self.client.tensor(*q.shape, dtype="f32")
        asked = self.client.tensor(*q.shape, dtype="f32")
        asked.array[:] = q
        assert twin.length == self.kv[0].shape[1]
        twin.step(asked, fill(self.client, new[0]), fill(self.client, new[1]), o)
        out = o.array.copy()
        twin.free()
        return out


def inputs(rng, n):
    """Of a step of n tokens, [layers][slots][n], K and V in bf16."""
    q = rng.standard_normal((LAYERS, SLOTS, n, Q_HEADS, DIM), np.float32)
    return q, *(package.to_bf16(rng.standard_normal((LAYERS, SLOTS, n, KV_HEADS, DIM), np.float32)) for _ in range(2))


def decode(rng, client, direct, slots, n, count, exact):
    """Steps of n tokens, of which some are taken back; the first is compared with the daemon's, which has all tokens then."""
    for i in range(count):
        keep = [int(x) for x in rng.integers(0 if rng.random() < 0.3 else n, n + 1, SLOTS)]
        q, k, v = inputs(rng, n)
        new = [package.from_bf16(x) for x in (k, v)]
        truth = {at: s.daemon(q[:, at], [x[:, at] for x in new]) for at, s in slots.items() if i == 0}
        o = one_step(client, direct, q, k, v, keep)
        for at, s in slots.items():
            mine = [x[:, at] for x in new]
            if at in truth:
                close(o[:, at], truth[at], 1e-3 if client.on_gpu else 1e-5)  # a GPU's plan is one for all slots
            if exact:
                s.agree(q[:, at], o[:, at], mine)
            s.add([x[:, :keep[at]] for x in mine])


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
@pytest.mark.parametrize("codec,window,seed", [("bf16", 30, 1), ("bf16", 300, 2), ("int2", 100, 3), ("turboquant-3", 150, 4),
                                               ("tc2", 80, 5), ("tc2.5", 200, 6), ("int4", 60, 7), ("k=int4,v=int2", 120, 8)])
@pytest.mark.parametrize("sinks", [False, True])
def test_steps_agree_with_the_daemon_and_float64(kvd, codec, window, seed, sinks):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(LAYERS, Q_HEADS)) * 3 if sinks else None
    with open_client(kvd, window, codec=codec, recent=int(rng.choice([32, 64, 256])), sinks=weights) as client:
        n = int(rng.integers(1, 7))
        slots = {at: Slot(client, int(tokens), seed + 10 * at) for at, tokens in zip((2, 0), rng.integers(1, 600, 2))}
        with package.Direct(client, slots=SLOTS, step_tokens=n, max_tokens=2000) as direct:
            for _ in range(1 if EMULATED else 3):
                for at, s in slots.items():
                    direct.bind(at, s.sequence)
                for _ in range(2 if EMULATED else 3):
                    decode(rng, client, direct, slots, n, int(rng.integers(1, 30 // n)), codec == "bf16")
                    direct.flush()
                for at, s in slots.items():
                    direct.bind(at, None)
                    assert s.sequence.describe().length == s.sequence.length == s.kv[0].shape[1]
                    s.sequence.truncate(max(0, s.sequence.length - int(rng.integers(0, 50))))
                    s.cut(s.sequence.length)


BY_PLANE = [package.Plane([0, 3], codec="tc2"), package.Plane([1], codec="int4", sink=32, recent=48), package.Plane([2, 5], codec="k=tc2.5,v=bf16"),
            package.Plane([4], codec="tc2", window=90)]


@pytest.mark.skipif("san" in BUILD.name, reason="Python is not instrumented")
@pytest.mark.parametrize("options", [{"codec": "tc2"}, {"codec": "tc2.5"}, {"codec": "int4"}, {"codec": "k=int4,v=int2"}, {"codec": "int2"},
                                     {"planes": BY_PLANE, "sinks": True}], ids=lambda x: x.get("codec", "planes"))
def test_a_slot_alone_is_a_call_bit_for_bit(kvd, options):
    """On a GPU, where the daemon has all tokens before: both have the same kernels, lengths and plan then."""
    rng = np.random.default_rng(11)
    options = {"layers": None if "planes" in options else range(LAYERS), **options}
    if options.get("sinks"):
        options["sinks"] = rng.normal(size=(LAYERS, Q_HEADS)) * 3
    with connect(kvd, q_heads=Q_HEADS, **options) as client, package.Direct(client, slots=1, step_tokens=2, max_tokens=1000) as direct:
        s = client.create()
        s.append(*(fill(client, values(i, LAYERS, 437, KV_HEADS, DIM)) for i in (1, 2)))
        direct.bind(0, s)
        for _ in range(2):
            for _ in range(9):
                q, k, v = (x[:, :1] for x in inputs(rng, 2))
                o = one_step(client, direct, q, k, v)
            direct.flush()
            twin = s.fork()[0]
            q, k, v = (x[:, :1] for x in inputs(rng, 2))
            asked, told = (client.tensor(LAYERS, 2, Q_HEADS, DIM, dtype="f32") for _ in range(2))
            asked.array[:] = q[:, 0]
            twin.step(asked, *(fill(client, package.from_bf16(x[:, 0])) for x in (k, v)), told)
            o = one_step(client, direct, q, k, v)
            close(o[:, 0], told.array, 1e-5)
            assert not client.on_gpu or np.array_equal(o[:, 0], told.array)


@pytest.mark.skipif("san" in BUILD.name, reason="Python is not instrumented")
def test_what_direct_mode_refuses_is_said(kvd):
    """Slots have one shape."""
    planes = [package.Plane([0]), package.Plane([1], q_heads=2, kv_heads=1)]
    with connect(kvd, layers=None, planes=planes) as client, pytest.raises(package.InvalidError, match="planes differ in heads or head_dim"):
        package.Direct(client, slots=1, max_tokens=100)


def test_page_tables_of_each_plane(kvd):
    wants_memfds(kvd)
    planes = [kv.Plane(layers=[0]), kv.Plane(layers=[1], window=100, windows=kv.Windows(recent=32)),
              kv.Plane(layers=[2], window=20, codec="turboquant-3")]
    w = Raw(kvd, layers=[], planes=planes, rotation_set="random")
    seq, _, _ = w.sequence()
    k, v = (np.concatenate([x, x])[:3] for x in random_kv(1000))
    append(w.rpc, w.session, seq, 0, k, v)
    p = w.map(seq).sequences[0]
    lent = [g[:2] for g in w.read()]
    assert sorted(plane for kind, plane in lent if kind == ROTATIONS) == [0, 1, 2] and EXTENT in [kind for kind, _ in lent]
    assert p.length == 1000 and p.first == 0 and len(p.others) == 2 and NO_PAGE not in p.codec_pages
    window, small = p.others
    # What lies behind the last 100 + 64 tokens is gone, by pages of 64.
    assert (window.length, window.first, window.hist_end) == (0, (1000 - 164) // 64 * 64, (1000 - 32) // 16 * 16)
    kept = [i for i, page in enumerate(window.codec_pages) if page != NO_PAGE]
    assert kept == list(range(window.first // 64, -(-window.hist_end // 64)))
    assert all(page == NO_PAGE for page in small.codec_pages) and small.hist_end >= small.first > 0
    item = kv.MapItem(sequence=seq, codec_from=2, other_codec_from=[14])
    p2 = w.rpc.kv("MapSequences", session=w.session, items=[item]).sequences[0]
    assert w.read() == []
    assert list(p2.codec_pages) == list(p.codec_pages)[2:] and p2.others[0].codec_from == 14
    assert list(p2.others[0].codec_pages) == list(window.codec_pages)[14:] and p2.others[1] == small
    for known in ([0, 0, 0], [0] * 8):
        with pytest.raises(grpc.RpcError) as e:
            w.rpc.kv("MapSequences", session=w.session, items=[kv.MapItem(sequence=seq, other_codec_from=known)])
        assert code_of(e) == "INVALID_ARGUMENT"
    one = Raw(kvd)
    seq, _, _ = one.sequence(1000)
    assert not one.map(seq).sequences[0].others

