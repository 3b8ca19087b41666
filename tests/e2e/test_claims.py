"""Several workers that want one prompt at once: one computes it, the others wait for that, and nobody waits for nothing."""
import os
import threading
import time

import grpc
import numpy as np
import pytest

from conftest import Rpc, kv, layout

RAW = np.zeros((2, 640, 2, 64), np.uint16).tobytes()


class Worker:
    def __init__(self, kvd):
        self.rpc = Rpc(kvd.address)
        self.session = self.rpc.kv("OpenSession", layout=layout()).session

    def match(self, keys, wait, **kw):
        began = time.time()
        m = self.rpc.kv("MatchPrefix", session=self.session, requests=[keys], wait_ms=int(wait * 1000), timeout=60, **kw).matches[0]
        return m.blocks, time.time() - began

    def later(self, keys, wait):
        """The same in the background; a function that gives the result."""
        out = []

        def call():
            try:
                out.append(self.match(keys, wait))
            except grpc.RpcError as e:
                out.append(e.code())
        t = threading.Thread(target=call)
        t.start()

        def result():
            t.join()
            return out[0]
        result.waits = t.is_alive
        return result

    def compute(self):
        seq = self.rpc.kv("CreateSequences", session=self.session, count=1).sequences[0]
        self.rpc.kv("Append", session=self.session, items=[kv.AppendItem(sequence=seq, tokens=640, k=kv.TensorRef(inline_data=RAW),
                                                                         v=kv.TensorRef(inline_data=RAW))])
        return seq

    def publish(self, seq, keys, end=True):
        return self.rpc.kv("PublishBlocks", session=self.session, items=[kv.PublishItem(sequence=seq, keys=keys, end=end)]).items[0].blocks


def prompt(blocks=10):
    return kv.PrefixKeys(block_keys=os.urandom(16 * blocks), key_bytes=16)


@pytest.fixture
def workers(kvd):
    them = [Worker(kvd) for _ in range(4)]
    yield them
    for w in them:
        w.rpc.channel.close()


def waiting(kvd, n):
    """Until so many calls have waited."""
    end = time.time() + 20
    while kvd.metric("kvd_prefix_waits_total") < n:
        assert time.time() < end
        time.sleep(0.02)


def test_one_computes_and_others_wait(kvd, workers):
    a, b, c, _ = workers
    keys = prompt()
    assert a.match(keys, 60)[0] == 0
    assert kvd.metric("kvd_prefix_claims") == 1
    others = [w.later(keys, 60) for w in (b, c)]
    waiting(kvd, 2)
    seq = a.compute()
    assert all(o.waits() for o in others)
    assert a.publish(seq, keys) == 10
    assert [o()[0] for o in others] == [10, 10]
    assert kvd.metric("kvd_prefix_claims") == 0
    assert b.match(keys, 60)[0] == 10
    # Without its end the last tokens are no blocks yet: what there is, is given, and the rest is the next one's.
    keys = prompt()
    assert a.match(keys, 60)[0] == 0
    other = b.later(keys, 60)
    waiting(kvd, 3)
    assert a.publish(seq, keys, end=False) == 6
    assert other()[0] == 6
    assert kvd.metric("kvd_prefix_claims") == 1
    # Another prompt that begins with the same blocks waits for those only.
    assert a.match(prompt(), 60)[0] == 0


def test_nobody_waits_for_nothing(kvd, workers):
    a, b, c, d = workers
    keys, other = prompt(), prompt()
    # The time of who waits, of who computes, and the end of its session.
    assert a.match(keys, 60)[0] == 0
    blocks, seconds = b.match(keys, 0.2)
    assert blocks == 0 and 0.1 < seconds < 20
    assert c.match(keys, 0)[1] < 20
    assert a.match(other, 0.2)[0] == 0
    assert c.match(other, 60)[1] < 20
    before = kvd.metric("kvd_prefix_waits_total")  # c has waited only if it came while a had time
    late = d.later(keys, 60)
    waiting(kvd, before + 1)
    for w in (b, a):
        w.rpc.kv("CloseSession", session=w.session)
    assert late()[0] == 0
    with pytest.raises(grpc.RpcError) as e:
        c.match(keys, 60, quiet=True, lease_ms=1, restore_ms=1 << 30)
    assert e.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    for fields in ({"wait_ms": 600001, "requests": [keys]}, {"wait_ms": 1, "requests": [keys, other]}):
        with pytest.raises(grpc.RpcError) as e:
            c.rpc.kv("MatchPrefix", session=c.session, **fields)
        assert e.value.code() == grpc.StatusCode.INVALID_ARGUMENT and "wait_ms" in e.value.details()


def test_no_circles(kvd, workers):
    a, b, _, _ = workers
    one, two = prompt(), prompt()
    assert a.match(one, 30)[0] == b.match(two, 30)[0] == 0
    waits = a.later(two, 30)
    waiting(kvd, 1)
    assert b.match(one, 30)[1] < 15 and waits.waits()
    assert b.publish(b.compute(), two) == 10
    assert waits()[0] == 10


def test_callers_that_go_away(kvd, workers):
    a, b, c, _ = workers
    keys = prompt()
    assert a.match(keys, 60)[0] == 0
    for _ in range(10):
        with pytest.raises(grpc.RpcError) as e:
            b.rpc.kv("MatchPrefix", session=b.session, requests=[keys], wait_ms=60000, timeout=0.05)
        assert e.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    before = kvd.metric("kvd_prefix_waits_total")
    waits = c.later(keys, 60)
    waiting(kvd, before + 1)
    assert kvd.stop() == 0
    assert waits() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE)
