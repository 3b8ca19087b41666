"""The wire API, used from a standard grpcio client with inline data."""
import json
import math
import signal
import time

import grpc
import numpy as np
import pytest

from conftest import Rpc, at_some_pace, layout, health, kv
from test_death import wait_for

LAYERS, HEADS, KV, DIM = 2, 4, 2, 64
rng = np.random.default_rng(7)


def bf16(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2")


def widen(b):
    return (b.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def tensor(x):
    return kv.TensorRef(inline_data=np.ascontiguousarray(x).tobytes(), dtype=1 if x.dtype == np.float32 else 0)


def random_kv(n):
    return [bf16(rng.normal(size=(LAYERS, n, KV, DIM))) for _ in range(2)]


def open_session(rpc, **kw):
    return rpc.kv("OpenSession", layout=kw.pop("layout", layout()), **kw).session


def append(rpc, session, seq, position, k, v, **kw):
    item = kv.AppendItem(sequence=seq, position=position, tokens=k.shape[1], k=tensor(k), v=tensor(v))
    return rpc.kv("Append", session=session, items=[item], **kw)


def exact(q, k, v, group=HEADS // KV):
    """q [L, n, H, D] at the last n positions, k and v [L, T, KV, D], float64."""
    out, lse = np.empty(q.shape), np.empty(q.shape[:3])
    n, total = q.shape[1], k.shape[1]
    for l in range(q.shape[0]):
        for i in range(n):
            pos = total - n + i + 1
            for h in range(q.shape[2]):
                s = k[l, :pos, h // group] @ q[l, i, h] / math.sqrt(q.shape[3])
                m = s.max()
                p = np.exp(s - m)
                out[l, i, h] = p @ v[l, :pos, h // group] / p.sum()
                lse[l, i, h] = m + np.log(p.sum())
    return out, lse


def error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def code_of(e):
    return e.value.code().name


@pytest.mark.parametrize("codec", ["int2", "bf16", "tc2", "tc2.5", "int4", "k=int4,v=int2", "k=bf16,v=turboquant-3"])
def test_attention_over_the_wire(kvd, rpc, codec):
    s = open_session(rpc, layout=layout(codec=codec))
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
    k, v = random_kv(700)
    assert append(rpc, s, seq, 0, k, v).lengths == [700]
    q = rng.normal(size=(LAYERS, 3, HEADS, DIM)).astype(np.float32)
    item = kv.AttendItem(sequence=seq, q_len=3, q=tensor(q), o=kv.TensorRef(dtype=1))
    r = rpc.kv("Attend", session=s, items=[item], params=kv.AttentionParams(return_lse=True)).results[0]
    o = np.frombuffer(r.o, np.float32).reshape(LAYERS, 3, HEADS, DIM)
    lse = np.frombuffer(r.lse, np.float32).reshape(LAYERS, 3, HEADS)
    back = rpc.kv("ReadTokens", session=s, sequence=seq, begin=0, tokens=700, k=kv.TensorRef(dtype=1),
                  v=kv.TensorRef(dtype=1))
    kk = np.frombuffer(back.k, np.float32).reshape(LAYERS, 700, KV, DIM).astype(np.float64)
    vv = np.frombuffer(back.v, np.float32).reshape(LAYERS, 700, KV, DIM).astype(np.float64)
    want, want_lse = exact(q.astype(np.float64), kk, vv)
    tolerance = 2e-3 if kvd.on_gpu() else 1e-4  # fp16 operands, or fp32
    assert error(o, want) < tolerance
    assert np.abs(lse - want_lse).max() < tolerance
    # The windows are exact; history is not, and not far off either.
    assert np.array_equal(kk[:, :64], widen(k[:, :64])) and np.array_equal(kk[:, -256:], widen(k[:, -256:]))
    lost = error(kk, widen(k))
    assert lost == 0 if "bf16" in codec else (0.01 if "int4" in codec else 0.1) < lost < 0.5


def test_a_codec_for_each_side(kvd, rpc):
    """K and V of "k=A,v=B" are what sessions with codec A and with codec B have."""
    k, v = random_kv(400)
    back, digests = {}, set()
    for codec in ("int2", "int2-lm", "k=int2-lm,v=int2", "v=int2-lm,k=int2", "k=bf16,v=int2", "int4", "tc2", "tc2.5", "k=int2,v=tc2"):
        opened = rpc.kv("OpenSession", layout=layout(codec=codec))
        assert opened.layout.codec == codec.replace("v=int2-lm,k=int2", "k=int2,v=int2-lm")
        digests.add(opened.layout_digest)
        seq = rpc.kv("CreateSequences", session=opened.session, request_id=1, count=1).sequences[0]
        append(rpc, opened.session, seq, 0, k, v)
        r = rpc.kv("ReadTokens", session=opened.session, sequence=seq, begin=0, tokens=400, k=kv.TensorRef(), v=kv.TensorRef())
        back[codec] = (r.k, r.v)
    assert len(digests) == len(back) and back["int2"][0] != back["int2-lm"][0] and back["int2"][1] != back["int2-lm"][1]
    assert back["k=int2-lm,v=int2"] == (back["int2-lm"][0], back["int2"][1])
    assert back["v=int2-lm,k=int2"] == (back["int2"][0], back["int2-lm"][1])
    lost = [error(widen(np.frombuffer(back[codec][0], "<u2")), widen(k).ravel()) for codec in ("int4", "int2")]
    assert 0 < lost[0] < lost[1] / 2
    assert back["tc2"][1] == back["tc2.5"][1] == back["k=int2,v=tc2"][1] and back["k=int2,v=tc2"][0] == back["int2"][0]
    lost = [error(widen(np.frombuffer(back[codec][0], "<u2")), widen(k).ravel()) for codec in ("tc2.5", "tc2")]
    assert 0 < lost[0] < lost[1] < 0.4
    assert back["k=bf16,v=int2"] == (k.tobytes(), back["int2"][1])
    assert rpc.kv("OpenSession", layout=layout(codec="k=int2,v=int2")).layout.codec == "int2"
    for codec, words in (("k=int2", "k=NAME,v=NAME"), ("k=int2,v=int3", "k=NAME,v=NAME"), ("int2,int2", "k=NAME"),
                         ("k=int2,k=int2", "k=NAME"), ("k=int2,v=int2,v=int2", "k=NAME"),
                         ("k=turboquant-2,v=int2", "of K and V, have different ones")):
        with pytest.raises(grpc.RpcError) as e:
            open_session(rpc, layout=layout(codec=codec))
        assert code_of(e) == "INVALID_ARGUMENT" and words in e.value.details()


def test_step_equals_attend_over_everything(rpc):
    s = open_session(rpc)
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
    k, v = random_kv(200)
    append(rpc, s, seq, 0, k[:, :150], v[:, :150])
    q = rng.normal(size=(LAYERS, 50, HEADS, DIM)).astype(np.float32)
    item = kv.StepItem(sequence=seq, position=150, tokens=50, k=tensor(k[:, 150:]), v=tensor(v[:, 150:]), q=tensor(q),
                       o=kv.TensorRef(dtype=1), request_id=1)
    first = rpc.kv("Step", session=s, items=[item])
    o = np.frombuffer(first.results[0].o, np.float32).reshape(LAYERS, 50, HEADS, DIM)
    assert error(o, exact(q.astype(np.float64), widen(k), widen(v))[0]) < 1e-5
    again = rpc.kv("Step", session=s, items=[item])  # as after a lost reply
    assert (first.results[0].replayed, again.results[0].replayed) == (False, True)
    assert error(np.frombuffer(again.results[0].o, np.float32), o.ravel()) < 1e-5
    assert rpc.kv("DescribeSequences", session=s).sequences[0].length == 200


def test_rotate_is_its_own_inverse_for_hadamard(rpc):
    s = open_session(rpc)
    x = rng.normal(size=(LAYERS, 3, HEADS, DIM)).astype(np.float32)
    y = rpc.kv("Rotate", session=s, rows=3, heads=HEADS, x=tensor(x), y=kv.TensorRef(dtype=1)).y
    y = np.frombuffer(y, np.float32).reshape(x.shape)
    h = np.array([[(-1) ** bin(i & j).count("1") for j in range(DIM)] for i in range(DIM)]) / 8
    assert error(y, x.astype(np.float64) @ h) < 1e-5
    with pytest.raises(grpc.RpcError) as e:
        rpc.kv("Rotate", session=s, rows=3, heads=HEADS, which=3, x=tensor(x), y=kv.TensorRef(dtype=1))
    assert code_of(e) == "INVALID_ARGUMENT" and "which is 3" in e.value.details()


def test_fork_publish_attach(rpc):
    a, b = open_session(rpc), open_session(rpc)
    other = open_session(rpc, namespace_name="elsewhere")
    k, v = random_kv(400)
    seq = rpc.kv("CreateSequences", session=a, request_id=1, count=1).sequences[0]
    append(rpc, a, seq, 0, k, v)
    rpc.kv("PublishSequence", session=a, sequence=seq, name="prompt")
    got = rpc.kv("AttachSequence", session=b, name="prompt").sequence
    assert (got.sequence, got.length, got.holders) == (seq, 400, 2)
    with pytest.raises(grpc.RpcError) as e:
        rpc.kv("AttachSequence", session=other, name="prompt")
    assert code_of(e) == "NOT_FOUND"  # another namespace does not see it
    rpc.kv("CloseSession", session=a)
    child = rpc.kv("ForkSequence", session=b, request_id=1, sequence=seq).sequences[0]
    append(rpc, b, child, 400, k[:, :5], v[:, :5])
    lengths = {i.sequence: i.length for i in rpc.kv("DescribeSequences", session=b).sequences}
    assert lengths == {seq: 400, child: 405}
    with pytest.raises(grpc.RpcError) as e:
        append(rpc, b, seq, 100, k[:, :5], v[:, :5])
    assert code_of(e) == "FAILED_PRECONDITION" and "length 400" in e.value.details()


def test_retries_do_not_act_twice(rpc):
    s = open_session(rpc)
    one = rpc.kv("CreateSequences", session=s, request_id=9, count=3).sequences
    assert list(rpc.kv("CreateSequences", session=s, request_id=9, count=3).sequences) == list(one)
    assert len(rpc.kv("DescribeSequences", session=s).sequences) == 3
    rpc.kv("FreeSequences", session=s, request_id=10, sequences=one)
    rpc.kv("FreeSequences", session=s, request_id=10, sequences=one)
    with pytest.raises(grpc.RpcError) as e:
        rpc.kv("FreeSequences", session=s, request_id=11, sequences=one)
    assert code_of(e) == "NOT_FOUND"


def test_layers_one_by_one(rpc):
    s = open_session(rpc)
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
    k, v = random_kv(30)
    append(rpc, s, seq, 0, k[:1], v[:1], layer_begin=0, layer_count=1)
    info = rpc.kv("DescribeSequences", session=s).sequences[0]
    assert (info.length, info.pending_length, info.pending_layers) == (0, 30, 1)
    q = rng.normal(size=(1, 1, HEADS, DIM)).astype(np.float32)
    item = kv.AttendItem(sequence=seq, q_len=1, q=tensor(q), o=kv.TensorRef(dtype=1))
    o = rpc.kv("Attend", session=s, layer_begin=0, layer_count=1, items=[item]).results[0]
    assert o.length == 30
    with pytest.raises(grpc.RpcError) as e:  # layer 1 has nothing yet
        rpc.kv("Attend", session=s, layer_begin=1, layer_count=1, items=[item])
    assert code_of(e) == "INVALID_ARGUMENT"
    append(rpc, s, seq, 0, k[1:], v[1:], layer_begin=1, layer_count=1)
    assert rpc.kv("DescribeSequences", session=s).sequences[0].length == 30


def test_events_and_health(rpc):
    s = open_session(rpc)
    events = rpc.stream("Watch", session=s)
    assert next(events).kind == kv.Event.OPENED
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
    rpc.kv("PublishSequence", session=s, sequence=seq, name="x")
    e = next(events)
    assert (e.kind, e.name, e.sequence) == (kv.Event.PUBLISHED, "x", seq)
    check = lambda name: rpc.call("grpc.health.v1.Health", "Check", health.HealthCheckRequest(service=name),
                                  health.HealthCheckResponse)
    assert check("").status == 1 and check("kvd.v1.KvCache").status == 1
    with pytest.raises(grpc.RpcError) as e:
        check("nobody")
    assert code_of(e) == "NOT_FOUND"
    rpc.kv("CloseSession", session=s)
    assert list(events) == []


def test_unknown_method_and_garbage(rpc):
    with pytest.raises(grpc.RpcError) as e:
        rpc.call("kvd.v1.KvCache", "Nonsense", kv.KeepAliveRequest(), kv.KeepAliveReply)
    assert code_of(e) == "UNIMPLEMENTED" and "Nonsense" in e.value.details()
    f = rpc.channel.unary_unary("/kvd.v1.KvCache/Append")
    for body in (b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", b"\x22\x00" * 1000000):
        with pytest.raises(grpc.RpcError) as e:
            f(body, timeout=20)
        assert code_of(e) in ("INVALID_ARGUMENT", "UNAUTHENTICATED")


def test_a_lease_runs_out(rpc, kvd):
    def runs_out(pace):
        s = open_session(rpc, lease_ms=1000 * pace)
        rpc.kv("CreateSequences", session=s, request_id=1, count=4)
        assert rpc.kv("KeepAlive", session=s).lease_ms == 1000 * pace
        assert wait_for(lambda: kvd.metric("kvd_sessions") == 0, 40)  # who looks at that renews nothing
        with pytest.raises(grpc.RpcError) as e:
            rpc.kv("KeepAlive", session=s)
        assert code_of(e) == "UNAUTHENTICATED"
        assert kvd.metric("kvd_sequences") == 0

    at_some_pace(runs_out)


def test_a_lease_does_not_run_out_while_kvd_is_stopped(rpc, kvd):
    """What renews it has come meanwhile, and is read before it is judged."""
    def renewed(pace):
        s = open_session(rpc, lease_ms=1000 * pace)
        keep = rpc.channel.unary_unary("/kvd.v1.KvCache/KeepAlive", request_serializer=kv.KeepAliveRequest.SerializeToString)
        kvd.process.send_signal(signal.SIGSTOP)
        try:
            renews = keep.future(kv.KeepAliveRequest(session=s), timeout=60)
            time.sleep(pace + 2)
        finally:
            kvd.process.send_signal(signal.SIGCONT)
        assert renews.result()
        rpc.kv("CloseSession", session=s)

    at_some_pace(renewed, (1, 5))


GEOMETRIES = {
    "layers": layout(layers=[]),
    "ascending": layout(layers=[3, 3]),
    "kv_heads": layout(kv_heads=0),
    "q_heads": layout(q_heads=5),
    "head_dim": layout(head_dim_k=96),
    "codec": layout(codec="int3"),
    "rotation_set": layout(rotation_set="../../etc/passwd"),
    "sink": layout(windows=kv.Windows(sink=17, recent=64)),
    "extent": layout(layers=list(range(500)), q_heads=256, kv_heads=256, head_dim_k=256, head_dim_v=256),
}


@pytest.mark.parametrize("word", GEOMETRIES)
def test_bad_layouts(rpc, word):
    with pytest.raises(grpc.RpcError) as e:
        rpc.kv("OpenSession", layout=GEOMETRIES[word])
    assert code_of(e) == "INVALID_ARGUMENT" and word in e.value.details()


def pool_of(kvd):
    pool = json.loads(kvd.kvctl("--json", "pool").stdout)
    del pool["extents_made"]  # on a GPU some are made ahead of need
    return pool


def test_bad_input_changes_nothing(rpc, kvd):
    s, foreign = open_session(rpc), open_session(rpc)
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
    alien = rpc.kv("CreateSequences", session=foreign, request_id=1, count=1).sequences[0]
    k, v = random_kv(20)
    append(rpc, s, seq, 0, k, v)
    before = pool_of(kvd)
    nan, inf = k.copy(), v.copy()
    nan[1, 7, 1, 3], inf[0, 0, 0, 0] = 0x7FC0, 0x7F80
    huge = 2**64 - 2

    def item(**kw):
        fields = dict(sequence=seq, position=20, tokens=20, k=tensor(k), v=tensor(v))
        fields.update(kw)
        return rpc.kv("Append", session=s, items=[kv.AppendItem(**fields)])

    cases = [
        (lambda: item(tokens=0), "INVALID_ARGUMENT", "0 tokens"),
        (lambda: item(tokens=2**31), "INVALID_ARGUMENT", "2147483648 tokens"),
        (lambda: item(k=tensor(nan)), "INVALID_ARGUMENT", "layer 1, token 7, head 1, channel 3"),
        (lambda: item(v=tensor(inf)), "INVALID_ARGUMENT", "items[0].v holds NaN or Inf"),
        (lambda: item(sequence=alien), "NOT_FOUND", "holds no sequence"),
        (lambda: item(sequence=seq + 1000), "NOT_FOUND", "holds no sequence"),
        (lambda: item(position=5), "FAILED_PRECONDITION", "length 20"),
        (lambda: item(k=kv.TensorRef()), "INVALID_ARGUMENT", "inline_data has 0"),
        (lambda: item(k=kv.TensorRef(buffer=3)), "NOT_FOUND", "no buffer 3"),
        (lambda: item(k=kv.TensorRef(offset=huge, inline_data=b"x" * 99)), "INVALID_ARGUMENT", "overflow"),
        (lambda: item(k=kv.TensorRef(layer_stride=2**63, token_stride=2**62, inline_data=b"xx")), "INVALID_ARGUMENT",
         "overflow"),
        (lambda: item(k=kv.TensorRef(offset=1, inline_data=b"x" * 100000)), "INVALID_ARGUMENT", "multiples"),
        (lambda: item(k=tensor(k.astype(np.float32))), "INVALID_ARGUMENT", "bf16"),
        (lambda: rpc.kv("Append", session=s, items=[]), "INVALID_ARGUMENT", "0 items"),
        (lambda: rpc.kv("Append", session="f" * 32, items=[]), "UNAUTHENTICATED", "open a new one"),
        (lambda: append(rpc, s, seq, 20, k, v, layer_begin=2), "INVALID_ARGUMENT", "layout's 2"),
        (lambda: rpc.kv("Append", session=s, items=[kv.AppendItem(sequence=seq, position=20, tokens=20, k=tensor(k),
                                                                  v=tensor(v))] * 2), "INVALID_ARGUMENT", "two items"),
        (lambda: rpc.kv("Attend", session=s, items=[kv.AttendItem(sequence=seq, q_len=21, q=tensor(
            np.zeros((2, 21, 4, 64), np.float32)))]), "INVALID_ARGUMENT", "20 tokens"),
        (lambda: rpc.kv("TruncateSequence", session=s, sequence=seq, length=21), "INVALID_ARGUMENT", "21"),
        (lambda: rpc.kv("CreateSequences", session=s, count=5000), "INVALID_ARGUMENT", "4096"),
        (lambda: rpc.kv("PublishSequence", session=s, sequence=seq, name="a b"), "INVALID_ARGUMENT", "name"),
        (lambda: rpc.kv("ReadTokens", session=s, sequence=seq, begin=2**63, tokens=1), "INVALID_ARGUMENT", "has 20"),
        (lambda: rpc.kv("RegisterBuffer", session=s, key=1, size=1), "FAILED_PRECONDITION", "leased"),
        (lambda: rpc.kv("OpenSession", layout=layout(), namespace_name="a b"), "INVALID_ARGUMENT", "namespace"),
        (lambda: rpc.kv("OpenSession", layout=layout(), ticket="0" * 32), "UNAUTHENTICATED", "ticket"),
    ]
    for run, code, text in cases:
        with pytest.raises(grpc.RpcError) as e:
            run()
        assert code_of(e) == code and text in e.value.details(), (code, text, e.value)
    assert pool_of(kvd) == before
    info = rpc.kv("DescribeSequences", session=s).sequences[0]
    assert (info.length, info.pending_layers) == (20, 0)
    back = rpc.kv("ReadTokens", session=s, sequence=seq, begin=0, tokens=20)
    assert back.k == k.tobytes() and back.v == v.tobytes()


def test_quota_and_a_full_pool(start):
    kvd = start("--pool-size", "8MiB", "--extent-size", "2MiB", config="[namespace small]\nquota = 200KiB\n")
    rpc = Rpc(kvd.address)
    s = open_session(rpc, namespace_name="small")
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
    k, v = random_kv(200)
    with pytest.raises(grpc.RpcError) as e:
        append(rpc, s, seq, 0, k, v)
    assert code_of(e) == "RESOURCE_EXHAUSTED" and "quota" in e.value.details()
    append(rpc, s, seq, 0, k[:, :64], v[:, :64])
    big = open_session(rpc)
    seqs = rpc.kv("CreateSequences", session=big, request_id=1, count=100).sequences
    with pytest.raises(grpc.RpcError) as e:
        for q in seqs:
            append(rpc, big, q, 0, k, v)
    assert code_of(e) == "RESOURCE_EXHAUSTED" and "pool" in e.value.details()
    assert rpc.kv("DescribeSequences", session=s).sequences[0].length == 64
    rpc.kv("FreeSequences", session=big, sequences=seqs)
    append(rpc, big, rpc.kv("CreateSequences", session=big, request_id=2, count=1).sequences[0], 0, k, v)


def test_layouts_are_recycled(rpc, kvd):
    """There are 64 slots: more shapes than that come and go, and what is in use stays."""
    keep = open_session(rpc)
    seq = rpc.kv("CreateSequences", session=keep, request_id=1, count=1).sequences[0]
    k, v = random_kv(100)
    append(rpc, keep, seq, 0, k, v)
    for i in range(150):
        s = open_session(rpc, layout=layout(windows=kv.Windows(sink=16 * (i % 100), recent=16 + 16 * i)))
        append(rpc, s, rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0], 0, k[:, :9], v[:, :9])
        rpc.kv("CloseSession", session=s)
    back = rpc.kv("ReadTokens", session=keep, sequence=seq, begin=0, tokens=100)
    assert back.k == k.tobytes()
    held = [open_session(rpc, layout=layout(windows=kv.Windows(sink=0, recent=16 + 16 * i))) for i in range(31)]
    with pytest.raises(grpc.RpcError) as e:
        open_session(rpc, layout=layout(windows=kv.Windows(sink=64, recent=0)))
    assert code_of(e) == "RESOURCE_EXHAUSTED" and "64 layouts" in e.value.details()
    open_session(rpc, namespace_name="other", layout=layout(windows=kv.Windows(sink=64, recent=0)))
    rpc.kv("CloseSession", session=held[0])
    open_session(rpc, layout=layout(windows=kv.Windows(sink=80, recent=0)))


def test_mutated_requests_hurt_nobody(rpc, kvd):
    """Valid requests with a few bytes changed, to every method: always an answer, and the pool stays consistent."""
    s = open_session(rpc)
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
    k, v = random_kv(4)
    t, o = tensor(k), kv.TensorRef(dtype=1)
    q = tensor(rng.normal(size=(LAYERS, 4, HEADS, DIM)).astype(np.float32))
    requests = {
        "Append": kv.AppendRequest(session=s, items=[kv.AppendItem(sequence=seq, tokens=4, k=t, v=tensor(v))]),
        "Step": kv.StepRequest(session=s, items=[kv.StepItem(sequence=seq, tokens=4, k=t, v=t, q=q, o=o)]),
        "Attend": kv.AttendRequest(session=s, items=[kv.AttendItem(sequence=seq, q_len=4, q=q, o=o)]),
        "ReadTokens": kv.ReadTokensRequest(session=s, sequence=seq, tokens=2),
        "Rotate": kv.RotateRequest(session=s, rows=2, heads=KV, x=t),
        "ForkSequence": kv.ForkSequenceRequest(session=s, sequence=seq, count=2),
        "TruncateSequence": kv.TruncateSequenceRequest(session=s, sequence=seq, length=1),
        "PublishSequence": kv.PublishSequenceRequest(session=s, sequence=seq, name="n"),
        "DescribeSequences": kv.DescribeSequencesRequest(session=s, sequences=[seq]),
        "OpenSession": kv.OpenSessionRequest(layout=layout(), lease_ms=2000),
    }
    r = np.random.default_rng(int.from_bytes(__import__("os").urandom(4), "little"))
    for i in range(2500):
        name = list(requests)[i % len(requests)]
        raw = bytearray(requests[name].SerializeToString())
        for _ in range(1 + i % 3):
            # Mostly the structure at both ends, rarely the data in the middle.
            at = int(r.integers(0, min(len(raw), 120))) if r.random() < 0.7 else int(r.integers(0, len(raw)))
            at = len(raw) - 1 - at if r.random() < 0.3 else at
            raw[at] = int(r.integers(0, 256))
        try:
            rpc.channel.unary_unary(f"/kvd.v1.KvCache/{name}")(bytes(raw), timeout=20)
        except grpc.RpcError as e:
            assert e.code().name not in ("UNAVAILABLE", "INTERNAL", "DEADLINE_EXCEEDED"), e
    assert kvd.process.poll() is None
    rpc.kv("CloseSession", session=s)
