"""Layouts of several planes over the wire, against attention in float64: bf16 pages, so that all that is seen is exact."""
import os

import grpc
import numpy as np
import pytest

from conftest import BUILD, Rpc, free_port, kv, layout
from test_grpc import append, bf16, code_of, error, tensor, widen

os.environ.setdefault("KVD_LIBRARY", str(BUILD / "client/libkvd.so.0"))
import kvd as package  # noqa: E402

# Layers 0 and 2 see 100 tokens, 1 and 3 see all, 4 has other heads and another head_dim and sees 200.
PLANES = [dict(layers=[0, 2], window=100, windows=kv.Windows(recent=32)), dict(layers=[1, 3]),
          dict(layers=[4], q_heads=3, kv_heads=1, head_dim_k=128, head_dim_v=64, window=200)]
WINDOW = {0: 100, 1: 0, 2: 100, 3: 0, 4: 200}
SHAPES = {(0, 4): (4, 2, 64, 64), (4, 1): (3, 1, 128, 64)}  # by layers of a call: q heads, kv heads, head_dims


SINKS = np.random.default_rng(11).normal(size=19) * 4  # of four layers of 4 q heads, and one of 3
SINKS[5] = -np.inf


def open_planes(rpc, codec="bf16", planes=PLANES, sinks=()):
    return rpc.kv("OpenSession", layout=layout(layers=[], codec=codec, planes=[kv.Plane(**p) for p in planes]), sinks=sinks)


def attention(q, k, v, window, sinks=None):
    """q [n, H, D] at the last n positions of k and v [T, KV, D], float64; sinks [H] are logits of a token of value 0."""
    n, total, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    at, token = np.arange(total - n, total)[:, None], np.arange(total)[None]
    unseen = (token > at) | (token <= at - window if window else False)
    out = np.empty(q.shape[:2] + v.shape[2:])
    for h in range(q.shape[1]):
        s = q[:, h] @ k[:, h // group].T / np.sqrt(q.shape[2])
        s[unseen] = -np.inf
        sink = -np.inf if sinks is None else sinks[h]
        most = np.maximum(s.max(axis=1, keepdims=True), sink)
        p = np.exp(s - most)
        out[:, h] = p @ v[:, h // group] / (p.sum(axis=1, keepdims=True) + np.exp(sink - most))
    return out


class Model:
    """A sequence, and what each layer of it holds."""

    def __init__(self, rpc, session, sequence, seed, tolerance, sinks=None):
        self.rpc, self.session, self.sequence, self.tolerance = rpc, session, sequence, tolerance
        self.rng, self.length, self.request = np.random.default_rng(seed), 0, 0
        self.k, self.v = {}, {}
        self.sinks = None if sinks is None else np.split(sinks, [4, 8, 12, 16])  # by layer

    def fork(self, sequence):
        child = Model(self.rpc, self.session, sequence, 99, self.tolerance)
        child.length, child.k, child.v = self.length, dict(self.k), dict(self.v)
        return child

    def truncate(self, length):
        self.rpc.kv("TruncateSequence", session=self.session, sequence=self.sequence, length=length)
        self.length = length
        self.k = {a: x[:length] for a, x in self.k.items()}
        self.v = {a: x[:length] for a, x in self.v.items()}

    def agree(self, o, q, first):
        for i in range(q.shape[0]):
            want = attention(q[i].astype(np.float64), self.k[first + i], self.v[first + i], WINDOW[first + i],
                             self.sinks and self.sinks[first + i])
            assert error(o[i], want) < self.tolerance, f"layer {first + i} at {self.length}"

    def call(self, kind, n, layers, **item):
        begin, count = layers
        heads, _, dk, dv = SHAPES[layers]
        q = self.rng.normal(size=(count, n, heads, dk)).astype(np.float32)
        extra = dict(q=tensor(q), o=kv.TensorRef(dtype=1), **item)
        r = self.rpc.kv(kind, session=self.session, layer_begin=begin, layer_count=count,
                        items=[getattr(kv, kind + "Item")(sequence=self.sequence, **extra)]).results[0]
        return q, np.frombuffer(r.o, np.float32).reshape(count, n, heads, dv)

    def store(self, n, layers):
        begin, count = layers
        _, heads, dk, dv = SHAPES[layers]
        k, v = (bf16(self.rng.normal(size=(count, n, heads, d))) for d in (dk, dv))
        for i in range(count):
            old_k, old_v = self.k.get(begin + i), self.v.get(begin + i)
            self.k[begin + i] = widen(k[i]) if old_k is None else np.concatenate([old_k, widen(k[i])])
            self.v[begin + i] = widen(v[i]) if old_v is None else np.concatenate([old_v, widen(v[i])])
        return k, v

    def step(self, n):
        for layers in SHAPES:
            k, v = self.store(n, layers)
            self.request += 1
            q, o = self.call("Step", n, layers, position=self.length, tokens=n, k=tensor(k), v=tensor(v),
                             request_id=self.request)
            self.agree(o, q, layers[0])
        self.length += n

    def append(self, n):
        for layers in SHAPES:
            k, v = self.store(n, layers)
            item = kv.AppendItem(sequence=self.sequence, position=self.length, tokens=n, k=tensor(k), v=tensor(v))
            self.rpc.kv("Append", session=self.session, layer_begin=layers[0], layer_count=layers[1], items=[item])
        self.length += n

    def attend(self, n):
        for layers in SHAPES:
            q, o = self.call("Attend", n, layers, q_len=n)
            self.agree(o, q, layers[0])


def test_planes_agree_with_float64(kvd, rpc):
    opened = open_planes(rpc)
    assert len(opened.layout_digest) == 71 and opened.layout_digest == open_planes(rpc).layout_digest
    assert [(list(p.layers), p.window, p.windows.sink) for p in opened.layout.planes] == [
        ([0, 2], 100, 0), ([1, 3], 0, 64), ([4], 200, 0)]
    first, second = rpc.kv("CreateSequences", session=opened.session, request_id=1, count=2).sequences
    tolerance = 2e-3 if kvd.on_gpu() else 1e-5
    m = Model(rpc, opened.session, first, 5, tolerance)
    for n in (300, 1, 1, 63, 700, 1, 40, 16):  # prompts, decoding, speculation
        m.step(n)
        m.attend(min(n, 65))
    m.append(37)
    m.attend(20)
    child = m.fork(rpc.kv("ForkSequence", session=opened.session, request_id=2, sequence=first).sequences[0])
    child.step(90)
    m.step(5)
    m.truncate(m.length - 64)
    m.step(3)
    child.attend(9)
    with pytest.raises(grpc.RpcError) as e:
        m.truncate(500)
    assert code_of(e) == "FAILED_PRECONDITION" and "window has freed" in e.value.details()
    m.truncate(0)
    m.step(130)


def test_sinks_agree_with_float64(kvd, rpc):
    """Of layers in several planes: each run of layers gets its own."""
    opened = open_planes(rpc, sinks=SINKS)
    assert opened.sinks == len(SINKS) and open_planes(rpc).sinks == 0
    sequence = rpc.kv("CreateSequences", session=opened.session, request_id=1, count=1).sequences[0]
    m = Model(rpc, opened.session, sequence, 7, 2e-3 if kvd.on_gpu() else 1e-5, SINKS)
    for n in (1, 300, 1, 40):
        m.step(n)
        m.attend(min(n, 65))
    # One layer alone, and the sum that lse has: log(e^sink + e^0) of keys that are zero.
    q, params = np.zeros((1, 1, 4, 64), np.float32), kv.AttentionParams(return_lse=True)
    item = kv.AttendItem(sequence=sequence, q_len=1, q=tensor(q), o=kv.TensorRef(dtype=1))
    r = rpc.kv("Attend", session=opened.session, layer_begin=3, layer_count=1, items=[item], params=params).results[0]
    assert np.allclose(np.frombuffer(r.lse, np.float32), np.logaddexp(SINKS[12:16], np.log(342)), atol=1e-4)
    # A session without sinks attends to the same sequence as ever.
    rpc.kv("PublishSequence", session=opened.session, sequence=sequence, name="with-sinks")
    other = open_planes(rpc).session
    plain = Model(rpc, other, rpc.kv("AttachSequence", session=other, name="with-sinks").sequence.sequence, 8, m.tolerance)
    plain.k, plain.v, plain.length = m.k, m.v, m.length
    plain.attend(5)


@pytest.mark.parametrize("sinks, words", [
    (SINKS[:18], "sinks has 18 numbers; 19 are wanted"), ([0.0] * 20, "sinks has 20 numbers"),
    ([0.0] * 6 + [np.nan] + [0.0] * 12, "that of layer 1, q head 2 is nan"), ([0.0] * 18 + [np.inf], "that of layer 4, q head 2 is inf"),
])
def test_bad_sinks(rpc, sinks, words):
    with pytest.raises(grpc.RpcError) as e:
        open_planes(rpc, sinks=sinks)
    assert code_of(e) == "INVALID_ARGUMENT" and words in e.value.details()


def test_attention_over_the_wire_begins_behind_what_was_freed(rpc):
    """A token that the recent window let go unseen was never compressed, so the history ends amid a page that is not there. What is seen
    after a truncation begins in that page, but behind its history."""
    session = open_planes(rpc, "int2", [dict(layers=[0], window=16, windows=kv.Windows(recent=256))]).session
    sequence = rpc.kv("CreateSequences", session=session, request_id=1, count=1).sequences[0]
    rng = np.random.default_rng(3)
    k, v = (bf16(rng.normal(size=(1, 288, 2, 64))) for _ in range(2))
    append(rpc, session, sequence, 0, k[:, :256], v[:, :256])
    append(rpc, session, sequence, 256, k[:, 256:], v[:, 256:])
    for length in (100, 81, 60, 48):
        rpc.kv("TruncateSequence", session=session, sequence=sequence, length=length)
        q = rng.normal(size=(1, 3, 4, 64)).astype(np.float32)
        item = kv.AttendItem(sequence=sequence, q_len=min(3, length - 47), q=tensor(q[:, :min(3, length - 47)]), o=kv.TensorRef(dtype=1))
        o = np.frombuffer(rpc.kv("Attend", session=session, items=[item]).results[0].o, np.float32).reshape(-1, 4, 64)
        want = attention(q[0, :item.q_len].astype(np.float64), widen(k[0, :length]), widen(v[0, :length]), 16)
        assert error(o, want) < 5e-3, length


def test_what_windows_free_is_gone(rpc):
    opened = open_planes(rpc)
    s, sequence = opened.session, rpc.kv("CreateSequences", session=opened.session, request_id=1, count=1).sequences[0]
    m = Model(rpc, s, sequence, 6, 1e-2)
    m.step(1000)
    info = rpc.kv("DescribeSequences", session=s).sequences[0]
    full = rpc.kv("OpenSession", layout=layout(layers=[1, 3], codec="bf16")).session
    other = rpc.kv("CreateSequences", session=full, request_id=1, count=1).sequences[0]
    k, v = (bf16(np.zeros((2, 1000, 2, 64))) for _ in range(2))
    rpc.kv("Append", session=full, items=[kv.AppendItem(sequence=other, position=0, tokens=1000, k=tensor(k), v=tensor(v))])
    alone = rpc.kv("DescribeSequences", session=full).sequences[0]
    assert info.codec_pages - alone.codec_pages <= 2 * 3  # of 16 each that they would have
    back = dict(session=s, sequence=sequence, tokens=4, k=kv.TensorRef(dtype=1), v=kv.TensorRef(dtype=1), layer_count=1)
    assert rpc.kv("ReadTokens", begin=0, layer_begin=1, **back).k
    for fields, call in ((dict(begin=0, layer_begin=0), "ReadTokens"), (dict(begin=700, layer_begin=2), "ReadTokens")):
        with pytest.raises(grpc.RpcError) as e:
            rpc.kv(call, **fields, **back)
        assert code_of(e) == "FAILED_PRECONDITION" and "have freed" in e.value.details()
    with pytest.raises(grpc.RpcError) as e:
        m.call("Attend", 500, (0, 4), q_len=500)
    assert code_of(e) == "FAILED_PRECONDITION" and "use Step" in e.value.details()


def test_listings_tell_planes(kvd, rpc):
    planes = [dict(layers=[0, 2, 3], window=200, windows=kv.Windows(recent=64)), dict(layers=[1], codec="bf16")]
    opened = open_planes(rpc, "int2", planes)
    sequence = rpc.kv("CreateSequences", session=opened.session, request_id=1, count=1).sequences[0]
    k, v = (bf16(np.zeros((4, 900, 2, 64))) for _ in range(2))
    append(rpc, opened.session, sequence, 0, k, v)
    session = next(s for s in rpc.admin("ListSessions").sessions if s.layout_digest == opened.layout_digest)
    assert [(p.layers, p.codec, p.sink, p.recent, p.window, p.q_heads) for p in session.planes] == [
        (len(p.layers), p.codec, p.windows.sink, p.windows.recent, p.window, p.q_heads) for p in opened.layout.planes]
    listed = next(s for s in rpc.admin("ListSequences").sequences if s.sequence == sequence)
    assert listed.layout_digest == opened.layout_digest and [p.codec for p in listed.planes] == ["int2", "bf16"]
    info = rpc.kv("DescribeSequences", session=opened.session, sequences=[sequence]).sequences[0]
    assert [p.history_tokens for p in listed.planes] == [p.history for p in info.planes] and listed.planes[0].first % 64 == 0
    windowed, whole = info.planes
    assert windowed.freed == listed.planes[0].first > 0 == whole.freed == windowed.sink and whole.history > windowed.history > 0
    assert all(p.sink + p.freed + p.history + p.recent == 900 for p in info.planes)
    assert sum(p.bf16_pages for p in listed.planes) == info.bf16_pages and sum(p.codec_pages for p in listed.planes) == info.codec_pages
    groups = [g for g in rpc.admin("GetPool").groups if g.layout_digest == opened.layout_digest]
    assert sum(g.pages_used for g in groups) == info.bf16_pages + info.codec_pages and {g.plane for g in groups} == {0, 1}
    short = opened.layout_digest[7:19]
    workers = next(l for l in kvd.kvctl("workers").stdout.splitlines() if short in l)
    assert "3+1" in workers and "int2 bf16" in workers
    assert f"{windowed.history} {whole.history}" in next(l for l in kvd.kvctl("sequences").stdout.splitlines() if short in l)
    assert short in kvd.kvctl("pool").stdout and "codec=int2+bf16 " in kvd.text()


def test_compressed_planes(kvd, rpc):
    """Each plane with its codec: what int2 loses is lost in its layers only."""
    planes = [dict(layers=[0, 2], window=300), dict(layers=[1, 3], codec="bf16")]
    opened = open_planes(rpc, "int2", planes)
    sequence = rpc.kv("CreateSequences", session=opened.session, request_id=1, count=1).sequences[0]
    rng = np.random.default_rng(3)
    k, v = (bf16(rng.normal(size=(4, 900, 2, 64))) for _ in range(2))
    item = kv.AppendItem(sequence=sequence, position=0, tokens=900, k=tensor(k), v=tensor(v))
    rpc.kv("Append", session=opened.session, items=[item])
    back = rpc.kv("ReadTokens", session=opened.session, sequence=sequence, begin=600, tokens=300,
                  k=kv.TensorRef(dtype=1), v=kv.TensorRef(dtype=1))
    got = np.frombuffer(back.k, np.float32).reshape(4, 300, 2, 64)
    for layer in range(4):
        lost = error(got[layer, :40], widen(k[layer, 600:640]))
        assert 0.1 < lost < 0.5 if layer % 2 == 0 else lost == 0
        assert np.array_equal(got[layer, 45:], widen(k[layer, 645:]).astype(np.float32))


@pytest.mark.parametrize("planes, words", [
    ([dict(layers=[0, 1]), dict(layers=[1, 2])], "layer 1 is in planes 0 and 1"),
    ([dict(layers=[0]), dict(layers=[])], "layout.planes[1]: 0 layers"),
    ([dict(layers=[0], window=64, windows=kv.Windows(sink=64, recent=64))], "wants sink 0"),
    ([dict(layers=[i]) for i in range(9)], "at most 8"),
    ([dict(layers=[0], codec="int2"), dict(layers=[1], codec="turboquant-2")], "rotation_set is empty"),
    ([dict(layers=[0], codec="int5")], "int5"),
])
def test_bad_planes(rpc, planes, words):
    with pytest.raises(grpc.RpcError) as e:
        open_planes(rpc, planes=planes)
    assert code_of(e) == "INVALID_ARGUMENT" and words in e.value.details()


def test_layers_that_differ_want_calls_of_their_own(rpc):
    opened = open_planes(rpc)
    sequence = rpc.kv("CreateSequences", session=opened.session, request_id=1, count=1).sequences[0]
    k = tensor(bf16(np.zeros((5, 1, 2, 64))))
    with pytest.raises(grpc.RpcError) as e:
        rpc.kv("Append", session=opened.session, items=[kv.AppendItem(sequence=sequence, tokens=1, k=k, v=k)])
    assert code_of(e) == "INVALID_ARGUMENT" and "calls of their own" in e.value.details()


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_windows_in_python(kvd):
    """Windows by layer through libkvd: two planes, and calls over all layers."""
    windows, rng, sinks = [40, 0, 40, 40], np.random.default_rng(8), SINKS[:16].reshape(4, 4)
    with package.Client(layers=range(4), q_heads=4, kv_heads=2, head_dim=64, codec="bf16", recent=32, sink=32, windows=windows,
                        sinks=sinks, address=kvd.address) as client:
        s, held_k, held_v = client.create(), np.zeros((4, 0, 2, 64)), np.zeros((4, 0, 2, 64))
        for n in (150, 1, 30, 1, 200, 1):
            q, o = (client.tensor(4, n, 4, 64, dtype="f32") for _ in range(2))
            k, v = (client.tensor(4, n, 2, 64) for _ in range(2))
            q.array[:] = rng.normal(size=q.shape)
            for x in (k, v):
                x.array[:] = bf16(rng.normal(size=x.shape))
            s.step(q, k, v, o)
            held_k, held_v = (np.concatenate([a, x.array.floats().astype(np.float64)], 1) for a, x in ((held_k, k), (held_v, v)))
            for layer, window in enumerate(windows):
                want = attention(q.array[layer].astype(np.float64), held_k[layer], held_v[layer], window, sinks[layer])
                assert error(o.array[layer], want) < (2e-3 if kvd.on_gpu() else 1e-5), (layer, s.length)
        with pytest.raises(package.Error, match="freed tokens"):
            s.truncate(100)
        s.truncate(s.length - 60)
    with pytest.raises(package.Error, match="8 different"):
        package.Client(layers=range(9), q_heads=4, kv_heads=2, head_dim=64, windows=range(1, 10), address=kvd.address)
    with pytest.raises(package.Error, match="one for each"):
        package.Client(layers=range(4), q_heads=4, kv_heads=2, head_dim=64, windows=[1], address=kvd.address)
    for sinks, words in (([[0] * 4], "one for each of the 2 layers"), (np.zeros((2, 3)), r"sinks\[0\] is \[3\]"),
                         ([[0] * 4, [0, 0, np.nan, 0]], r"sinks\[1, 2\] is nan")):
        with pytest.raises(package.Error, match=words):
            package.Client(layers=range(2), q_heads=4, kv_heads=2, head_dim=64, sinks=sinks, address=kvd.address)


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
@pytest.mark.parametrize("where", ["unix", "tcp"])
def test_planes_in_python(start, where):
    """A model like Gemma 4: layers of a sliding window, head_dim 256, and one of all tokens with other heads and another head_dim,
    here with sinks too. Over TCP tensors travel with their calls."""
    rng, port = np.random.default_rng(9), free_port()
    kvd = start("--listen", f"127.0.0.1:{port}")
    planes = [package.Plane([7, 9], head_dim=256, window=48, sink=0, recent=32),
              package.Plane([8], q_heads=6, kv_heads=3, head_dim=(192, 128))]
    sinks = [rng.normal(size=n) * 3 for n in (4, 6, 4)]
    address = kvd.address if where == "unix" else f"127.0.0.1:{port}"
    with package.Client(planes=planes, q_heads=4, kv_heads=2, codec="bf16", sinks=sinks, address=address) as client:
        assert client.layers == [7, 8, 9] and client.windows == (48, 0, 48) and [x.q_heads for x in client.shapes] == [4, 6, 4]
        assert [x.tolist() for x in client.sinks] == [x.astype(np.float32).tolist() for x in sinks]
        assert "2 layers, 4 q heads" in repr(client) and "head_dim (192, 128)" in repr(client)
        s, held = client.create(), [[np.zeros((0, x.kv_heads, d)) for d in x.head_dim] for x in client.shapes]
        for n in (90, 1, 40):
            for layer, shape in enumerate(client.shapes):
                dk, dv = shape.head_dim
                q, o = client.tensor(1, n, shape.q_heads, dk, dtype="f32"), client.tensor(1, n, shape.q_heads, dv, dtype="f32")
                k, v = client.tensor(1, n, shape.kv_heads, dk), client.tensor(1, n, shape.kv_heads, dv)
                for x in (q, k, v):
                    x.array[:] = rng.normal(size=x.shape)
                s.step(q, k, v, o, layer=layer)
                held[layer] = [np.concatenate([a, x.array.floats()[0].astype(np.float64)]) for a, x in zip(held[layer], (k, v))]
                want = attention(q.array[0].astype(np.float64), *held[layer], client.windows[layer], sinks[layer])
                assert error(o.array[0], want) < (2e-3 if kvd.on_gpu() else 1e-5), (layer, s.length)
        k, v = client.tensor(1, 20, 3, 192), client.tensor(1, 20, 3, 128)
        s.read(60, 20, k=k, v=v, layer=1)
        assert np.array_equal(k.array.floats()[0], held[1][0][60:80]) and np.array_equal(v.array.floats()[0], held[1][1][60:80])
        k, v = client.tensor(2, 1, 2, 256), client.tensor(2, 1, 2, 256)
        with pytest.raises(package.InvalidError, match="layers 0 and 1 of the client differ"):
            s.append(k, v)
        with pytest.raises(package.InvalidError, match=r"k is \[1, 1, 2, 256\], and \[layers, tokens, 3, 192\] is wanted"):
            s.append(k[:1], v[:1], layer=1)
        with pytest.raises(package.Error, match="direct mode"):
            package.Direct(client, slots=1, max_tokens=100)


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_codecs_by_plane_in_python(kvd):
    planes = [package.Plane([0, 2], codec="bf16"), package.Plane([1], codec="int2", sink=0, recent=0)]
    with package.Client(planes=planes, q_heads=4, kv_heads=2, head_dim=64, address=kvd.address) as client:
        s, k, v = client.create(), client.tensor(3, 700, 2, 64), client.tensor(3, 700, 2, 64)
        k.array[:] = np.random.default_rng(4).normal(size=k.shape)
        s.append(k, v)
        back = client.tensor(3, 300, 2, 64, dtype="f32")
        s.read(100, 300, k=back)
        lost = [error(back.array[i], k.array.floats()[i, 100:400].astype(np.float64)) for i in range(3)]
        assert lost[0] == lost[2] == 0 and 0.1 < lost[1] < 0.5


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
@pytest.mark.parametrize("planes, words", [
    ([package.Plane([0], head_dim=256), package.Plane([1], head_dim=512)], r"planes\[1\].*512 for K.*are possible"),
    ([package.Plane([0]), package.Plane([1, 0])], "layer 0, which is in another plane"),
    ([package.Plane([1, 0])], "ascending"), ([package.Plane([0]), package.Plane([])], r"planes\[1\]: 0 layers"),
    ([package.Plane([i]) for i in range(9)], "n_planes 9"), ([], "n_planes 0; 1 to 8"),
    ([package.Plane([0], codec="int5")], "int5"), ([package.Plane([0], window=64, sink=64)], "wants sink 0"),
    ([package.Plane([0], kv_heads=3)], "multiple of kv_heads"),
])
def test_bad_planes_in_python(kvd, planes, words):
    with pytest.raises(package.Error, match=words):
        package.Client(planes=planes, q_heads=4, kv_heads=2, head_dim=64, address=kvd.address)


def test_what_has_no_kernels_of_its_own_is_told(start):
    """Of a GPU's, by plane: int2 has some whatever was compiled, int4 beside tc2 none."""
    kvd = start()
    rpc = Rpc(kvd.address)
    windows = kv.Windows(recent=16)
    open_planes(rpc, "int2", [dict(layers=[0], windows=windows), dict(layers=[1], codec="k=int4,v=tc2", head_dim_k=64, head_dim_v=128, windows=windows)])
    told = [line for line in kvd.text().splitlines() if "no kernels of its own" in line]
    assert len(told) == kvd.on_gpu(), told
    assert not told or " plane=1 codec=k=int4,v=tc2 head_dims=64,128: " in told[0]
    rpc.channel.close()
