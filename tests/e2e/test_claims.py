"""Several workers that want one prompt at once: one computes it, the others wait for that, and nobody waits for nothing."""
import os
import socket
import threading
import time

import grpc
import numpy as np
import pytest

from conftest import BUILD, Rpc, kv, layout

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


def rss(kvd):
    return int(Rpc(kvd.address).admin("GetStatus").rss_bytes) >> 20


def flood(kvd, session, method, n, **fields):
    """n calls of a session that may wait, over some connections; how many had an answer when no more come, and those that wait."""
    channels = [Rpc(kvd.address) for _ in range(12)]
    reply = getattr(kv, f"{method}Reply")
    calls = [c.channel.unary_unary(f"/kvd.v1.KvCache/{method}", request_serializer=lambda m: m, response_deserializer=reply.FromString)
             for c in channels]
    raw = getattr(kv, f"{method}Request")(session=session, **fields).SerializeToString()
    futures = [calls[i % 12].future(raw, timeout=300) for i in range(n)]
    done, end = -1, time.time() + 60
    while (now := sum(f.done() for f in futures)) + (kvd.metric("kvd_lookups_waiting") or 0) < n or now != done:
        assert time.time() < end, f"{now} of {n} have an answer"
        done = now
        time.sleep(0.2)
    return done, futures, channels


LARGE = kv.PrefixKeys(tokens=bytes(4096 * 64 * 4))  # a MiB


def test_those_who_wait_take_a_bounded_share_of_memory(kvd):
    """Who does not fit is told what is known; other sessions and namespaces have room."""
    a, b, c = Worker(kvd), Worker(kvd), Worker(kvd)
    d = Rpc(kvd.address)
    other = [d.kv("OpenSession", layout=layout(), namespace_name="other").session for _ in range(2)]
    assert a.match(LARGE, 600)[0] == 0
    assert d.kv("MatchPrefix", session=other[0], requests=[LARGE], wait_ms=600000).matches[0].blocks == 0
    before = rss(kvd)
    done, futures, channels = flood(kvd, b.session, "MatchPrefix", 300, requests=[LARGE], wait_ms=600000)
    waits = 300 - done
    assert 90 < waits < 200 and kvd.metric("kvd_lookups_not_waiting_total") == done
    assert rss(kvd) - before < 350 or "san" in BUILD.name  # which keep what is freed
    assert all(f.result().matches[0].blocks == 0 for f in futures if f.done())
    more = [c.later(LARGE, 600)]
    again, held, there = flood(kvd, other[1], "MatchPrefix", 2, requests=[LARGE], wait_ms=600000)
    assert again == 0 and more[0].waits() and kvd.metric("kvd_lookups_waiting") == waits + 3
    for one in (a.session, other[0]):
        d.kv("CloseSession", session=one)  # then somebody has the claim, and waits no more
    for f in held[:1]:
        f.result()
    for channel in channels + there:
        channel.channel.close()
    for w in (b, c):
        w.rpc.kv("CloseSession", session=w.session)
    d.kv("CloseSession", session=other[1])
    more[0]()
    assert kvd.metric("kvd_lookups_waiting") == 0
    assert kvd.stop() == 0


@pytest.mark.parametrize("method", ["MatchPrefix", "LookupPages"])
def test_those_who_wait_for_a_tier_too(start, folder, method):
    server = socket.socket(socket.AF_UNIX)  # one that never says anything
    server.bind(str(folder / "redis.sock"))
    server.listen()
    kvd = start(config=f"[kvd]\ntier-redis = unix:{folder}/redis.sock\ntier-timeout = 60s\n")
    rpc = Rpc(kvd.address)
    if method == "MatchPrefix":
        session = rpc.kv("OpenSession", layout=layout()).session
        fields = {"requests": [LARGE]}
    else:
        session = rpc.kv("OpenSession", layout=layout(windows=kv.Windows()), pages=True).session
        fields = {"requests": [bytes(range(256)) * 512 for _ in range(8)], "key_bytes": 32, "space": b"s"}
    done, futures, channels = flood(kvd, session, method, 300, restore_ms=600000, **fields)
    assert 90 < 300 - done < 200 and kvd.metric("kvd_lookups_not_waiting_total") >= done
    for f in futures:
        if f.done():
            f.result()
    for channel in channels:
        channel.channel.close()
    rpc.channel.close()
    end = time.time() + 20
    while kvd.metric("kvd_lookups_waiting"):
        assert time.time() < end
        time.sleep(0.1)
    server.close()
