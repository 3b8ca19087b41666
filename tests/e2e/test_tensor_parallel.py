"""Workers that hold some heads of a model each: what they say together is what one worker says that holds all."""
import os
import subprocess

import grpc
import numpy as np
import pytest

from conftest import BUILD, KVCTL, Rpc, kv, layout
from dumps import activations, write
from test_grpc import bf16, code_of, tensor

os.environ.setdefault("KVD_LIBRARY", str(BUILD / "client/libkvd.so.0"))
import kvd as package  # noqa: E402

Q, KV, TOKENS = 8, 4, 700


@pytest.fixture
def split(folder, start):
    """A kvd with a rotation set of a matrix for each of 4 kv heads, and calls to it."""
    dump, made, store = folder / "dump.safetensors", folder / "set.safetensors", folder / "store"
    data = activations(3, 256, Q, KV, 64, 64, [0, 1])
    write(dump, {f"layers.{i}.{n}": ("F32", x) for i, t in data.items() for n, x in zip("qkv", t)})
    for command in (["fit", dump, made], ["publish", made, "m/split@v1"]):
        subprocess.run([KVCTL, "--store", store, "calib", *command], check=True, capture_output=True, timeout=60)
    kvd = start("--store", f"file://{store}")
    rpc = Rpc(kvd.address)
    rpc.tolerance = 5e-3 if kvd.on_gpu() else 1e-6
    yield rpc
    rpc.channel.close()


def open_rank(rpc, rank, size, kv_heads=None, **more):
    kv_heads = max(1, KV // max(1, size)) if kv_heads is None else kv_heads
    want = dict(q_heads=Q // max(1, size), kv_heads=kv_heads, tp_rank=rank, tp_size=size, rotation_set="m/split@v1")
    return rpc.kv("OpenSession", layout=layout(**{**want, **more}))


def attend(rpc, session, q, k, v):
    """o of a prompt's tokens and of a query at its end, [layers, tokens + 1, q heads, head_dim]."""
    seq = rpc.kv("CreateSequences", session=session, request_id=1, count=1).sequences[0]
    out = []
    for kind, item in (("Step", kv.StepItem(sequence=seq, position=0, tokens=TOKENS, k=tensor(k), v=tensor(v), q=tensor(q),
                                            o=kv.TensorRef(dtype=1), request_id=2)),
                       ("Attend", kv.AttendItem(sequence=seq, q_len=1, q=tensor(q[:, -1:]), o=kv.TensorRef(dtype=1)))):
        r = rpc.kv(kind, session=session, layer_begin=0, layer_count=2, items=[item]).results[0]
        out.append(np.frombuffer(r.o, np.float32).reshape(2, -1, *q.shape[2:]))
    return np.concatenate(out, 1)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_together_are_the_unsplit_model(split, size):
    """Of 8 ranks, two in a row hold the same kv head."""
    rng = np.random.default_rng(5)
    q = rng.normal(size=(2, TOKENS, Q, 64)).astype(np.float32)
    k, v = (bf16(rng.normal(size=(2, TOKENS, KV, 64))) for _ in range(2))
    whole = attend(split, open_rank(split, 0, 0).session, q, k, v)
    heads = max(1, KV // size)
    for rank in range(size):
        first, mine = rank * KV // size, slice(rank * Q // size, (rank + 1) * Q // size)
        part = [np.ascontiguousarray(x[:, :, first:first + heads]) for x in (k, v)]
        opened = open_rank(split, rank, size)
        got = attend(split, opened.session, np.ascontiguousarray(q[:, :, mine]), *part)
        assert (opened.layout.tp_rank, opened.layout.tp_size) == (rank, size)
        assert np.abs(got - whole[:, :, mine]).max() < split.tolerance, rank
        # Another rank's heads would not do: the set's matrices differ by head.
        other = open_rank(split, (rank + size // 2) % size, size)
        wrong = attend(split, other.session, np.ascontiguousarray(q[:, :, mine]), *part)
        assert np.abs(wrong - whole[:, :, mine]).max() > 0.02


def test_ranks_have_layouts_of_their_own(split):
    """A digest names one rank of one size, whatever the codec; and a rank attaches no other's sequence."""
    kinds = [(0, 0), (0, 2), (1, 2), (0, 4), (1, 4), (2, 4), (3, 4)]
    opened = {k: open_rank(split, *k, kv_heads=2, codec="bf16") for k in kinds}
    assert len({o.layout_digest for o in opened.values()}) == len(kinds)
    assert open_rank(split, 0, 1, kv_heads=2, q_heads=8, codec="bf16").layout_digest == opened[0, 0].layout_digest
    same = [layout(codec="bf16", tp_rank=r, tp_size=2) for r in range(2)]
    first, second = (split.kv("OpenSession", layout=g) for g in same)
    seq = split.kv("CreateSequences", session=first.session, request_id=1, count=1).sequences[0]
    split.kv("PublishSequence", session=first.session, sequence=seq, name="of-rank-0")
    with pytest.raises(grpc.RpcError) as e:
        split.kv("AttachSequence", session=second.session, name="of-rank-0")
    assert code_of(e) == "FAILED_PRECONDITION" and "tensor-parallel rank" in e.value.details()
    listed = split.admin("ListSessions").sessions
    assert sorted({(s.tp_rank, s.tp_size) for s in listed}) == sorted(kinds)
    assert {opened[k].layout_digest for k in kinds} <= {s.layout_digest for s in listed}


@pytest.mark.parametrize("rank, size, kv_heads, code, words", [
    (2, 2, 2, "INVALID_ARGUMENT", "tp_rank is 2 and tp_size 2"), (1, 0, 4, "INVALID_ARGUMENT", "tp_rank is 1 and tp_size 0"),
    (1, 1, 4, "INVALID_ARGUMENT", "tp_rank is 1 and tp_size 1"), (0, 1025, 1, "INVALID_ARGUMENT", "tp_size is 1025; at most 1024"),
    (0, 2, 4, "FAILED_PRECONDITION", "for 4 kv heads, of which rank 0 of 2 holds 2, and the layout has 4"),
    (1, 8, 2, "FAILED_PRECONDITION", "for 4 kv heads, of which rank 1 of 8 holds 1, and the layout has 2"),
    (1, 3, 1, "FAILED_PRECONDITION", "for 4 kv heads, and neither this nor tp_size, 3, divides the other"),
    (0, 6, 1, "FAILED_PRECONDITION", "neither this nor tp_size, 6"),
    (0, 0, 2, "FAILED_PRECONDITION", "for 4 kv heads, the layout has 2; a part of a model names its tp_rank"),
])
def test_ranks_that_are_refused(split, rank, size, kv_heads, code, words):
    with pytest.raises(grpc.RpcError) as e:
        open_rank(split, rank, size, kv_heads, q_heads=kv_heads)
    assert code_of(e) == code and words in e.value.details(), e.value.details()


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_ranks_in_python(kvd):
    shape = dict(layers=[0], q_heads=4, kv_heads=2, head_dim=64, address=kvd.address)
    clients = [package.Client(**shape, tp_rank=r, tp_size=n) for r, n in ((0, 2), (1, 2))] + [package.Client(**shape)]
    assert len({c.info["layout_digest"] for c in clients}) == 3
    assert [(c.tp_rank, c.tp_size) for c in clients] == [(0, 2), (1, 2), (0, 0)]
    clients[0].create().publish("mine")
    clients[0].attach("mine")
    with pytest.raises(package.Error, match="tensor-parallel rank"):
        clients[1].attach("mine")
    for c in clients:
        c.close()
    for wrong, words in ((dict(tp_rank=2, tp_size=2), "tp_rank is 2 and tp_size 2"), (dict(tp_rank=-1, tp_size=2), "tp_rank"),
                         (dict(tp_size=2.5), "tp_size")):
        with pytest.raises((package.Error, TypeError), match=words):
            package.Client(**shape, **wrong)
