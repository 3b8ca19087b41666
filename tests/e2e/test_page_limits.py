"""Calls that look things up, against who asks for too much: nobody waits for another's, and what they keep is bounded."""
import os
import random
import subprocess
import sys
import time

import grpc
import numpy as np
import pytest

from conftest import Rpc, kv, layout
from h2 import Connection
from test_death import wait_for
from test_limits import SANITIZER, status

KEYS = random.Random(1).randbytes(16 * 4096)
HERE = os.path.dirname(os.path.abspath(__file__))


def page_session(rpc, namespace, **shape):
    shape = layout(**{"layers": [0], "q_heads": 1, "kv_heads": 1, "windows": kv.Windows(), **shape})
    return rpc.kv("OpenSession", namespace_name=namespace, layout=shape, pages=True).session


def put(rpc, session, keys, bytes_of_token=128):
    data = kv.TensorRef(inline_data=bytes(len(keys) // 16 * 64 * bytes_of_token))
    rpc.kv("PutPages", session=session, space=b"x", keys=keys, key_bytes=16, k=data, v=data)


FLOOD = """
import sys; sys.path.insert(0, sys.argv[1])
from conftest import Rpc, admin, kv
from test_page_limits import KEYS
what, session = sys.argv[3:]
service = "Admin" if what.startswith("List") else "KvCache"
if what == "ListSequences":
    request = admin.ListSequencesRequest(limit=10000)
elif what == "ListSessions":
    request = admin.ListSessionsRequest()
elif what == "LookupPages":
    request = kv.LookupPagesRequest(session=session, space=b"x", requests=[KEYS] * 16, key_bytes=16)
else:
    request = kv.MatchPrefixRequest(session=session, requests=[kv.PrefixKeys(block_keys=KEYS, key_bytes=16)] * 16)
calls = [Rpc(sys.argv[2]).channel.unary_unary(f"/kvd.v1.{service}/{what}").future for _ in range(5)]
data = request.SerializeToString()
flight = [call(data) for call in calls for _ in range(40)]
print("ready", flush=True)
while True:
    for i in range(len(flight)):
        flight[i].result()
        flight[i] = calls[i % 5](data)
"""


@pytest.mark.parametrize("what, namespace", [("LookupPages", "quiet"), ("MatchPrefix", "hog"), ("ListSequences", "quiet"), ("ListSessions", "quiet")])
def test_lookups_do_not_wait_for_those_of_others(kvd, rpc, what, namespace):
    """200 calls of 65,536 keys each, or of all that there is, and one who asks for eight; in a namespace of its own, and in the same."""
    if what.startswith("List"):
        many = rpc.kv("OpenSession", namespace_name="many", layout=layout(layers=[0], q_heads=1, kv_heads=1)).session
        for i in range(4):
            rpc.kv("CreateSequences", session=many, request_id=i + 1, count=4096)
    hog, session = page_session(rpc, "hog"), page_session(rpc, namespace)
    put(rpc, session, KEYS[:128])

    def median(seconds):
        ms, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end or len(ms) < 9:
            began = time.perf_counter()
            rpc.kv("LookupPages", session=session, space=b"x", requests=[KEYS[:128]], key_bytes=16)
            ms.append((time.perf_counter() - began) * 1e3)
        return np.median(ms), len(ms)

    alone, _ = median(0.3)
    flood = subprocess.Popen([sys.executable, "-c", FLOOD, HERE, kvd.address, what, hog], stdout=subprocess.PIPE, text=True)
    try:
        assert flood.stdout.readline() == "ready\n"
        assert wait_for(lambda: kvd.metric('kvd_share_used{share="calls"}') > 150)
        now, n = median(0.7)
    finally:
        flood.kill()
        flood.wait()
    print(f"\n{what} beside a flood, namespace {namespace}: median {alone:.2f} ms alone, {now:.2f} ms meanwhile, {n} calls")
    assert now < max(10 * alone, 60 * SANITIZER)
    assert wait_for(lambda: kvd.metric('kvd_share_used{share="calls"}') <= 1)


def test_leases_are_bounded_by_user(kvd, rpc):
    """A namespace may have as many as are left, and so may the next one of the same user: together three quarters."""
    tokens = np.arange(64, dtype="<u4").tobytes()
    data = kv.TensorRef(inline_data=bytes(64 * 128))

    def session(namespace):
        return rpc.kv("OpenSession", namespace_name=namespace, layout=layout(layers=[0], q_heads=1, kv_heads=1, windows=kv.Windows())).session

    def lease(s, n=256):
        r = rpc.kv("MatchPrefix", session=s, lease_ms=60000, requests=[kv.PrefixKeys(tokens=tokens)] * n)
        assert all(m.lease for m in r.matches)

    sessions = [session(ns) for ns in "aabc"]
    for s in sessions[1:]:
        seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
        rpc.kv("Append", session=s, items=[kv.AppendItem(sequence=seq, position=0, tokens=64, k=data, v=data)])
        rpc.kv("PublishBlocks", session=s, items=[kv.PublishItem(sequence=seq, keys=kv.PrefixKeys(tokens=tokens))])
    for s in sessions[:3]:
        for _ in range(32):
            lease(s)
    assert kvd.metric('kvd_share_used{share="leases"}') == 24576
    with pytest.raises(grpc.RpcError) as e:
        lease(sessions[3], 1)
    assert e.value.code().name == "RESOURCE_EXHAUSTED" and "24577 leases of prefixes" in e.value.details(), e.value
    with pytest.raises(grpc.RpcError) as e:  # what is retained beyond the session is no way round it
        rpc.kv("HintPrefix", session=sessions[3], hint=kv.HintPrefixRequest.RETAIN, ms=60000, requests=[kv.PrefixKeys(tokens=tokens)])
    assert e.value.code().name == "RESOURCE_EXHAUSTED"
    rpc.kv("CloseSession", session=sessions[0])
    assert kvd.metric('kvd_share_used{share="leases"}') == 16384
    lease(sessions[3])
    rpc.kv("HintPrefix", session=sessions[3], hint=kv.HintPrefixRequest.RETAIN, ms=60000, requests=[kv.PrefixKeys(tokens=tokens)])
    for s in sessions[1:]:
        rpc.kv("CloseSession", session=s)
    assert kvd.metric('kvd_share_used{share="leases"}') == 1  # retained


def test_pages_that_nobody_reads(start):
    kvd = start(config="[kvd]\nmax-reply-bytes = 256MiB\nreply-timeout = 4s\n")
    rpc = Rpc(kvd.address)
    s = page_session(rpc, "hog", layers=range(4), kv_heads=2, q_heads=2)
    put(rpc, s, KEYS[:16 * 256], 1024)
    request = kv.GetPagesRequest(session=s, space=b"x", keys=KEYS[:16 * 256], key_bytes=16).SerializeToString()  # 32 MiB
    before, held = status(kvd, "VmRSS"), []
    for _ in range(4):
        c = Connection(kvd.socket, "/kvd.v1.KvCache/GetPages")
        c.unlimited()
        c.s.sendall(b"".join(c.headers() + c.message(request) for _ in range(10)))
        held.append(c)
    assert wait_for(lambda: kvd.metric('kvd_share_used{share="reply_bytes"}') > 100e6)
    time.sleep(0.5)
    assert kvd.metric('kvd_share_used{share="reply_bytes"}') <= 192 << 20  # a user's three quarters
    assert status(kvd, "VmHWM") - before < (400 << 10) * SANITIZER
    assert wait_for(lambda: "does not read its replies" in kvd.text(), 30)
    assert wait_for(lambda: kvd.metric('kvd_share_used{share="reply_bytes"}') == 0, 30)
    for c in held:
        c.close()
    assert len(rpc.kv("GetPages", session=s, space=b"x", keys=KEYS[:16], key_bytes=16).k) == 64 * 1024
