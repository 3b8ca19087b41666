"""Direct mode over layouts of several planes, as Gemma 3 has them: five of six layers see a window only."""
import grpc
import numpy as np
import pytest

import kvd as package
from conftest import BUILD, kv
from scenario_direct import aligned
from test_direct import EXTENT, NO_PAGE, ROTATIONS, Raw, wants_memfds
from test_grpc import append, code_of, random_kv
from test_python import attention, close, connect, fill, values

LAYERS, Q_HEADS, KV_HEADS, DIM, SLOTS = 6, 4, 2, 64, 3


def open_client(kvd, window, **options):
    client = connect(kvd, layers=range(LAYERS), q_heads=Q_HEADS, windows=[window] * (LAYERS - 1) + [0], **options)
    if client.on_gpu:
        pytest.skip("kvd runs on a GPU, where direct mode is for layouts of one plane")
    return client


class Slot:
    """A sequence that is decoded, and what its layers hold."""

    def __init__(self, client, tokens, seed):
        self.client, self.window = client, client.windows
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
            close(o[layer], attention(q[layer], k[layer], v[layer], self.window[layer])[0], 1e-5)

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


def step(direct, q, k, v, keep):
    """Its outputs. Each slot keeps so many of the new tokens."""
    o = np.zeros_like(q)
    direct.begin()
    for layer in range(LAYERS):
        out = aligned(o[layer])
        direct.store(layer, aligned(k[layer]), aligned(v[layer]))
        direct.attend(layer, aligned(q[layer]), out)
        o[layer] = out
    direct.end(keep)
    return o


def decode(rng, direct, slots, n, count, exact):
    """Steps of n tokens, of which some are taken back; the first is compared with the daemon's, which has all tokens then."""
    for i in range(count):
        keep = [int(x) for x in rng.integers(0 if rng.random() < 0.3 else n, n + 1, SLOTS)]
        q, k, v = inputs(rng, n)
        new = [package.from_bf16(x) for x in (k, v)]
        truth = {at: s.daemon(q[:, at], [x[:, at] for x in new]) for at, s in slots.items() if i == 0}
        o = step(direct, q, k, v, keep)
        for at, s in slots.items():
            mine = [x[:, at] for x in new]
            if at in truth:
                close(o[:, at], truth[at], 1e-5)
            if exact:
                s.agree(q[:, at], o[:, at], mine)
            s.add([x[:, :keep[at]] for x in mine])


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
@pytest.mark.parametrize("codec,window,seed", [("bf16", 30, 1), ("bf16", 300, 2), ("int2", 100, 3), ("turboquant-3", 150, 4)])
def test_steps_agree_with_the_daemon_and_float64(kvd, codec, window, seed):
    rng = np.random.default_rng(seed)
    with open_client(kvd, window, codec=codec, recent=int(rng.choice([32, 64, 256]))) as client:
        n = int(rng.integers(1, 7))
        slots = {at: Slot(client, int(tokens), seed + 10 * at) for at, tokens in zip((2, 0), rng.integers(1, 600, 2))}
        with package.Direct(client, slots=SLOTS, step_tokens=n, max_tokens=2000) as direct:
            for _ in range(3):
                for at, s in slots.items():
                    direct.bind(at, s.sequence)
                for _ in range(3):
                    decode(rng, direct, slots, n, int(rng.integers(1, 30 // n)), codec == "bf16")
                    direct.flush()
                for at, s in slots.items():
                    direct.bind(at, None)
                    assert s.sequence.describe().length == s.sequence.length == s.kv[0].shape[1]
                    s.sequence.truncate(max(0, s.sequence.length - int(rng.integers(0, 50))))
                    s.cut(s.sequence.length)


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

