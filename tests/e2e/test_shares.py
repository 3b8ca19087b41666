"""One client uses up all that it can of every table; others still open, create and publish, and all is back afterwards."""
import itertools
import signal
import time

import grpc
import pytest

from conftest import Rpc, admin, free_port, layout, kv
from h2 import Connection
from test_death import FdSocket
from test_grpc import append, code_of, open_session, random_kv


def until_refused(call, most=20000):
    """Results of a call that is made until it is refused, and what it was told."""
    got = []
    for i in range(most):
        try:
            got.append(call(i))
        except grpc.RpcError as e:
            assert e.code().name == "RESOURCE_EXHAUSTED", e
            return got, e.details()
    return got, None


def create(rpc, session, n=1, request_id=0):
    return rpc.kv("CreateSequences", session=session, request_id=request_id, count=n).sequences


def works(rpc, namespace="victim", **kw):
    """A worker of another namespace, from its opening to its end."""
    s = open_session(rpc, namespace_name=namespace, **kw)
    seq = create(rpc, s)[0]
    k, v = random_kv(100)
    append(rpc, s, seq, 0, k, v)
    rpc.kv("PublishSequence", session=s, sequence=seq, name="mine", replace=True)
    assert rpc.kv("AttachSequence", session=s, name="mine").sequence.length == 100
    fork = rpc.kv("ForkSequence", session=s, sequence=seq).sequences[0]
    rpc.kv("FreeSequences", session=s, sequences=[fork, seq, seq], unpublish=True)
    rpc.kv("CloseSession", session=s)


def names(rpc):
    return {n.name for n in rpc.admin("ListNamespaces").namespaces}


def test_namespaces_by_opening_and_closing(rpc, kvd):
    for i in range(1100):  # of 1,024
        rpc.kv("CloseSession", session=open_session(rpc, namespace_name=f"n{i}"))
    assert names(rpc) == set()
    assert "namespace=" not in kvd.kvctl("metrics").stdout.replace('namespace=""', "")
    works(rpc)
    works(rpc, "default")


def test_namespaces_by_publishing_and_by_sessions(rpc, kvd):
    for i in range(800):
        s = open_session(rpc, namespace_name=f"n{i}")
        rpc.kv("PublishSequence", session=s, sequence=create(rpc, s)[0], name="x")
        rpc.kv("CloseSession", session=s)
    works(rpc)
    s, told = until_refused(lambda i: open_session(rpc, namespace_name=f"s{i}"))
    assert len(s) == 768 and "768 are possible" in told  # three quarters for one user
    works(rpc, "s0")
    rpc.kv("CloseSession", session=s[0])
    works(rpc)
    for x in s[1:]:
        rpc.kv("CloseSession", session=x)
    kvd.kvctl("evict", "--all", "--yes")
    assert names(rpc) == set() and kvd.metric("kvd_sequences") == 0


def test_making_room_for_a_namespace_holds_up_nobody(start, folder):
    """The table is full, and what goes has many sequences: quotas, sessions and reloads clear it in pieces."""
    kvd = start("--log-level", "debug", config="[kvd]\n")
    rpc = Rpc(kvd.address)
    def many(call, requests, **kw):
        """As many at a time as one connection may have."""
        calls = []
        for request in requests:
            calls.append(call.future(request, timeout=60, **kw))
            if len(calls) == 50:
                [c.result() for c in calls]
                calls.clear()
        [c.result() for c in calls]

    publish = rpc.channel.unary_unary("/kvd.v1.KvCache/PublishSequence", request_serializer=kv.PublishSequenceRequest.SerializeToString)
    for i, n in enumerate((3000, 3000, 10)):
        s = open_session(rpc, namespace_name=f"idle{i}")
        many(publish, [kv.PublishSequenceRequest(session=s, sequence=seq, name=str(seq)) for seq in create(rpc, s, n)])
        rpc.kv("CloseSession", session=s)
    quota = lambda name: admin.SetQuotaRequest(namespace_name=name, quota_bytes=1 << 20, create=True)
    set_quota = rpc.channel.unary_unary("/kvd.v1.Admin/SetQuota", request_serializer=admin.SetQuotaRequest.SerializeToString)
    for i in range(0, 1021, 100):
        operator = FdSocket(kvd)  # is good for ten seconds
        many(set_quota, [quota(f"n{j}") for j in range(i, min(i + 100, 1021))], metadata=(("kvd-ticket", operator.ticket),))
    operator = FdSocket(kvd)
    token = (("kvd-ticket", operator.ticket),)
    pings = [Connection(kvd.socket, "/kvd.v1.Admin/Ping") for _ in range(8)]
    opening = rpc.channel.unary_unary("/kvd.v1.KvCache/OpenSession", request_serializer=kv.OpenSessionRequest.SerializeToString,
                                      response_deserializer=kv.OpenSessionReply.FromString)
    for name, call in (("SetQuota", lambda: set_quota.future(quota("more"), timeout=60, metadata=token)),
                       ("OpenSession", lambda: opening.future(kv.OpenSessionRequest(namespace_name="other", layout=layout()), timeout=60))):
        before = len(kvd.text())
        kvd.process.send_signal(signal.SIGSTOP)
        late = call()
        time.sleep(0.1)
        for c in pings:
            c.s.sendall(c.headers() + c.message(b""))
        kvd.process.send_signal(signal.SIGCONT)
        late.result()
        order = [line.split("method=")[1] for line in kvd.text()[before:].splitlines() if "method=" in line]
        assert "Ping" in order[0], order
    assert {"more", "other", "idle2"} <= names(rpc) and not names(rpc) & {"idle0", "idle1"}
    with open(folder / "kvd.conf", "a") as f:
        f.write("[namespace configured]\n")
    kvd.kvctl("reload")
    assert "configured" in names(rpc) and "idle2" not in names(rpc) and kvd.metric("kvd_sequences") == 0
    with open(folder / "kvd.conf", "a") as f:
        f.write("[namespace another]\n")
    r = kvd.kvctl("reload", check=False)
    assert r.returncode and "all 1024 namespaces are in use" in r.stdout + r.stderr, r


def test_sessions(start):
    kvd = start(config="[kvd]\nmax-sessions = 64\n")
    rpc = Rpc(kvd.address)
    s, told = until_refused(lambda i: open_session(rpc, namespace_name="attacker"))
    assert len(s) == 32 and "max-sessions" in told and "as many as are left" in told
    works(rpc)
    more, told = until_refused(lambda i: open_session(rpc, namespace_name=f"n{i}"))
    assert len(s + more) == 48 and "48 are possible" in told
    for x in s + more:
        rpc.kv("CloseSession", session=x)
    assert len(until_refused(lambda i: open_session(rpc, namespace_name="again"))[0]) == 32


def test_sequences(start):
    kvd = start(config="[kvd]\nmax-sequences = 1024\n")
    rpc = Rpc(kvd.address)
    a = open_session(rpc, namespace_name="attacker")
    # empty ones, published: they make room for one another, and for others
    for i in range(700):
        seq = create(rpc, a)[0]
        rpc.kv("PublishSequence", session=a, sequence=seq, name=f"x{i}")
        rpc.kv("FreeSequences", session=a, sequences=[seq])
    assert kvd.metric("kvd_sequences") == 512
    works(rpc)
    # held: half for a namespace
    held, told = until_refused(lambda i: create(rpc, a, 16))
    assert len(held) == 32 and "max-sequences" in told
    v = open_session(rpc, namespace_name="victim")
    kept = create(rpc, v, 64)
    works(rpc)
    # forks count alike
    with pytest.raises(grpc.RpcError) as e:
        rpc.kv("ForkSequence", session=a, sequence=held[0][0], count=1)
    assert code_of(e) == "RESOURCE_EXHAUSTED"
    rpc.kv("CloseSession", session=a)
    assert kvd.metric("kvd_sequences") == 64
    assert len(rpc.kv("DescribeSequences", session=v, sequences=kept).sequences) == 64


def test_one_user_with_many_namespaces(start):
    port = free_port()
    kvd = start("--listen", f"127.0.0.1:{port}", config="[kvd]\nmax-sequences = 1024\n")
    victim, attacker = Rpc(kvd.address), Rpc(f"127.0.0.1:{port}")
    space = itertools.count()

    def grab(i):
        s = open_session(attacker, namespace_name=f"n{next(space)}")
        return s, until_refused(lambda i: create(attacker, s, 8))

    grabs = [grab(i) for i in range(6)]
    assert 256 < kvd.metric("kvd_sequences") <= 768 and "768 are possible" in grabs[-1][1][1]
    shapes, told = until_refused(lambda i: open_session(attacker, namespace_name=f"g{i}", layout=layout(
        windows=kv.Windows(sink=0, recent=16 + 16 * i))))
    assert len(shapes) <= 48 and told
    works(victim)
    works(victim, layout=layout(codec="int2c"))
    for s in shapes + [g[0] for g in grabs]:
        attacker.kv("CloseSession", session=s)
    assert kvd.metric("kvd_sequences") == 0 and names(victim) == set()


def test_blocks_of_page_tables(start):
    kvd = start("--pool-size", "16MiB", "--extent-size", "2MiB", config="[kvd]\nmax-sequences = 256\n")
    rpc = Rpc(kvd.address)
    a = open_session(rpc, namespace_name="attacker")
    seq = create(rpc, a)[0]
    k, v = random_kv(8000)
    append(rpc, a, seq, 0, k, v)
    _, told = until_refused(lambda i: rpc.kv("ForkSequence", session=a, sequence=seq, count=1))
    assert "blocks" in told or "sequences" in told
    works(rpc)
    rpc.kv("CloseSession", session=a)
    works(rpc)


def test_only_listed_namespaces(start):
    kvd = start(config="[kvd]\nonly-listed-namespaces = yes\n[namespace mine]\n")
    rpc = Rpc(kvd.address)
    for name in ("default", "other", ""):
        with pytest.raises(grpc.RpcError) as e:
            open_session(rpc, namespace_name=name)
        assert code_of(e) == "PERMISSION_DENIED" and "only-listed-namespaces" in e.value.details()
    works(rpc, "mine")
    assert names(rpc) == {"mine"}  # it stays
    r = kvd.kvctl("quota", "set", "other", "1MiB", "--create", check=False)
    assert r.returncode != 0 and "only-listed-namespaces" in r.stderr
    (kvd.folder / "kvd.conf").write_text("[kvd]\nonly-listed-namespaces = no\n")
    kvd.kvctl("reload")
    works(rpc, "other")
    assert names(rpc) == set()
