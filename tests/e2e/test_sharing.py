"""Several holders of one sequence: repeats after lost replies, and holds."""
import grpc
import numpy as np
import pytest

from conftest import layout, kv
from test_grpc import DIM, HEADS, KV, LAYERS, append, bf16, code_of, open_session, random_kv, rng, tensor


def shared(rpc, n, **kw):
    """Two sessions that hold one sequence of n tokens."""
    a, b = open_session(rpc, **kw), open_session(rpc, **kw)
    seq = rpc.kv("CreateSequences", session=a, request_id=1, count=1).sequences[0]
    k, v = random_kv(n)
    append(rpc, a, seq, 0, k, v)
    rpc.kv("PublishSequence", session=a, sequence=seq, name="p")
    rpc.kv("AttachSequence", session=b, name="p")
    return a, b, seq


def step_item(seq, position, n, request_id, value=None):
    k, v = random_kv(n)
    if value is not None:
        k[:], v[:] = bf16(np.float32(value)), bf16(np.float32(value))
    q = rng.normal(size=(LAYERS, n, HEADS, DIM)).astype(np.float32)
    return kv.StepItem(sequence=seq, position=position, tokens=n, k=tensor(k), v=tensor(v), q=tensor(q),
                       o=kv.TensorRef(dtype=1), request_id=request_id)


def refused(code, call, *args, **kw):
    with pytest.raises(grpc.RpcError) as e:
        call(*args, **kw)
    assert code_of(e) == code, e.value
    return e.value.details()


def test_a_step_is_not_answered_with_anothers_tokens(rpc):
    a, b, seq = shared(rpc, 4)
    for one, two in ((1, 1), (2, 3), (0, 0)):
        at = rpc.kv("DescribeSequences", session=a).sequences[0].length
        ours, theirs = step_item(seq, at, 1, one, 10), step_item(seq, at, 1, two, 50)
        assert not rpc.kv("Step", session=a, items=[ours]).results[0].replayed
        assert "length" in refused("FAILED_PRECONDITION", rpc.kv, "Step", session=b, items=[theirs])
        back = rpc.kv("ReadTokens", session=b, sequence=seq, begin=at, tokens=1)
        assert set(np.frombuffer(back.k, "<u2")) == {*bf16(np.float32([10])).tolist()}
        if one:
            assert rpc.kv("Step", session=a, items=[ours]).results[0].replayed
        else:
            refused("FAILED_PRECONDITION", rpc.kv, "Step", session=a, items=[ours])
    # The holder whose step is the last may repeat it, nobody else theirs.
    rpc.kv("Step", session=b, items=[step_item(seq, 7, 1, 9)])
    refused("FAILED_PRECONDITION", rpc.kv, "Step", session=a, items=[ours])


def test_a_layer_sent_again_with_other_data_is_refused(rpc):
    a, b, seq = shared(rpc, 4)
    k, v = random_kv(3)
    part = lambda session, layer, kk, request: rpc.kv(
        "Append", session=session, layer_begin=layer, layer_count=1,
        items=[kv.AppendItem(sequence=seq, position=4, tokens=3, k=tensor(kk), v=tensor(v[:1]), request_id=request)])
    assert not part(a, 0, k[:1], 1).replayed[0]
    assert part(a, 0, k[:1], 1).replayed[0]
    for session, request in ((a, 2), (a, 0), (b, 1)):
        refused("FAILED_PRECONDITION", part, session, 0, k[1:], request)
    assert part(a, 1, k[1:], 2).lengths == [7] and part(a, 1, k[1:], 2).replayed[0]
    back = rpc.kv("ReadTokens", session=b, sequence=seq, begin=4, tokens=3)
    assert back.k == k.tobytes()


@pytest.mark.parametrize("codec", ["int2", "bf16", "turboquant-4"])
def test_a_repeated_step_gives_the_same_outputs(rpc, codec):
    s = open_session(rpc, layout=layout(codec=codec))
    seqs = rpc.kv("CreateSequences", session=s, request_id=1, count=2).sequences
    at = 335  # a window of 271: any step compresses part of it
    k, v = random_kv(at)
    for seq in seqs:
        append(rpc, s, seq, 0, k, v)
    for request, n in enumerate((1, 16, 49, 48, 300), 1):
        items = [step_item(seq, at, n, request) for seq in seqs]
        call = lambda: rpc.kv("Step", session=s, items=items, params=kv.AttentionParams(return_lse=True)).results
        first = call()
        if n == 300 and codec != "bf16":
            assert "computed again" in refused("FAILED_PRECONDITION", call)
        else:
            again = call()
            assert [r.replayed for r in again] == [True, True]
            for x, y in zip(first, again):
                assert x.length == y.length == at + n
                for i, j in ((x.o, y.o), (x.lse, y.lse)):
                    i, j = np.frombuffer(i, np.float32), np.frombuffer(j, np.float32)
                    assert np.abs(i - j).max() < 3e-6 * np.abs(i).max()
        at += n
    assert {i.length for i in rpc.kv("DescribeSequences", session=s).sequences} == {at}


@pytest.mark.parametrize("codec", ["int2", "bf16"])
def test_a_step_whose_tokens_are_compressed_at_once_can_be_repeated(rpc, codec):
    """Without a recent window every 16th token of a step never was in it."""
    s = open_session(rpc, layout=layout(codec=codec, windows=kv.Windows(sink=16)))
    seq, at = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0], 0
    for request, n in enumerate((5, 20, 1, 1, 1, 1, 1, 1, 1, 1, 40), 1):
        item = step_item(seq, at, n, request)
        first, again = (rpc.kv("Step", session=s, items=[item]).results[0] for _ in range(2))
        assert (first.replayed, again.replayed) == (False, True)
        x, y = np.frombuffer(first.o, np.float32), np.frombuffer(again.o, np.float32)
        assert np.abs(x - y).max() < 3e-6 * np.abs(x).max(), at
        at += n


def test_a_repeat_in_flight_and_mixed_with_new_items(rpc):
    s = open_session(rpc)
    seqs = rpc.kv("CreateSequences", session=s, request_id=1, count=2).sequences
    k, v = random_kv(2000)
    items = [kv.AppendItem(sequence=q, position=0, tokens=2000, k=tensor(k), v=tensor(v), request_id=1) for q in seqs]
    raw = rpc.channel.unary_unary("/kvd.v1.KvCache/Append", request_serializer=lambda m: m.SerializeToString(),
                                  response_deserializer=kv.AppendReply.FromString)
    calls = [raw.future(kv.AppendRequest(session=s, items=items[:1]), timeout=20) for _ in range(4)]
    assert sorted(c.result().replayed[0] for c in calls) == [False, True, True, True]
    both = rpc.kv("Append", session=s, items=items)
    assert list(both.replayed) == [True, False] and list(both.lengths) == [2000, 2000]


def test_every_attach_is_a_hold(rpc, kvd):
    a, b, seq = shared(rpc, 4)
    holds = lambda s: [(i.holders, i.holds) for i in rpc.kv("DescribeSequences", session=s).sequences]
    free = lambda s, *ids, **kw: rpc.kv("FreeSequences", session=s, sequences=ids, **kw)
    again = rpc.kv("AttachSequence", session=b, name="p", request_id=5).sequence
    assert (again.sequence, again.holders, again.holds) == (seq, 2, 2)
    assert rpc.kv("AttachSequence", session=b, name="p", request_id=5).sequence == again  # after a lost reply
    assert holds(b) == [(2, 2)]
    free(b, seq, request_id=6)
    free(b, seq, request_id=6)
    assert holds(b) == [(2, 1)]
    rpc.kv("Step", session=b, items=[step_item(seq, 4, 1, 1)])  # the other handle works
    # More mentions than holds: nothing is given up.
    assert "named 2 times" in refused("NOT_FOUND", free, b, seq, seq)
    child = rpc.kv("ForkSequence", session=b, request_id=7, sequence=seq).sequences[0]
    refused("NOT_FOUND", free, b, child, seq, child)
    assert sorted(holds(b)) == [(1, 1), (2, 1)]
    rpc.kv("AttachSequence", session=b, name="p")
    free(b, seq, child, seq)
    assert holds(b) == [] and holds(a) == [(1, 1)]
    refused("NOT_FOUND", free, b, seq)
    # Its maker may attach too; without its name it stays until the last hold is given up.
    rpc.kv("AttachSequence", session=a, name="p")
    free(a, seq, unpublish=True)
    refused("NOT_FOUND", rpc.kv, "AttachSequence", session=b, name="p")
    assert holds(a) == [(1, 1)]
    free(a, seq)
    assert kvd.metric("kvd_sequences") == 0
    # A session's end gives up all.
    a, b, seq = shared(rpc, 4)
    rpc.kv("AttachSequence", session=b, name="p")
    free(a, seq, unpublish=True)
    assert kvd.metric("kvd_sequences") == 1
    rpc.kv("CloseSession", session=b)
    assert kvd.metric("kvd_sequences") == 0


def test_two_request_ids_that_are_alike_free_twice(rpc):
    """What a hold remembers of who gave it up is shorter than an id."""
    s = open_session(rpc)
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
    rpc.kv("PublishSequence", session=s, sequence=seq, name="x")
    ids = ((1 << 32) | 7, (2 << 32) | 7, 7, 1 << 32, 2 << 32)
    for i in range(len(ids)):
        rpc.kv("AttachSequence", session=s, name="x", request_id=10 + i)
    holds = lambda: rpc.kv("DescribeSequences", session=s).sequences[0].holds
    for i, request in enumerate(ids):
        for _ in range(2):  # the second time its reply was lost
            rpc.kv("FreeSequences", session=s, sequences=[seq], request_id=request)
            assert holds() == len(ids) - i
