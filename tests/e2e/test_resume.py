"""Sessions that go on after a restart of kvd, or elsewhere."""
import contextlib
import os
import resource
import signal
import threading
import time

import grpc
import pytest

from conftest import Rpc, at_some_pace, kv, layout
from test_death import FdSocket, memfd, refused, wait_for
from test_direct import Raw
from test_grpc import append, random_kv, tensor
from test_keep import attend, kill, pid_of
from test_python import DIM, KV_HEADS, LAYERS, connect, fill, package, values


def killed(keeper, rpc, sig=signal.SIGKILL):
    """A connection to the next kvd."""
    rpc.channel.close()
    kill(keeper, sig)
    return Rpc(keeper.address)


def open_(rpc, **fields):
    return rpc.kv("OpenSession", **{"layout": layout(), **fields})


def append_as(rpc, session, seq, position, k, v, request):
    item = kv.AppendItem(sequence=seq, position=position, tokens=k.shape[1], k=tensor(k), v=tensor(v), request_id=request)
    return rpc.kv("Append", session=session, items=[item]).replayed[0]


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_a_sessions_sequences_come_back(start, sig):
    """Their ids, tokens and holds; and every call that is repeated is known."""
    keeper = start("--keep")
    rpc = Rpc(keeper.address)
    s = open_(rpc, client_name="worker").session
    made = list(rpc.kv("CreateSequences", session=s, request_id=1, count=3).sequences)
    k, v = random_kv(100)
    assert not append_as(rpc, s, made[0], 0, k, v, 7)
    fork = rpc.kv("ForkSequence", session=s, request_id=2, sequence=made[0]).sequences[0]
    append(rpc, s, fork, 100, *random_kv(300))
    rpc.kv("PublishSequence", session=s, sequence=made[1], name="p")
    assert rpc.kv("AttachSequence", session=s, request_id=3, name="p").sequence.holds == 2
    rpc.kv("FreeSequences", session=s, request_id=4, sequences=[made[2]])
    outputs = [attend(rpc, s, q) for q in (made[0], fork)]
    rpc = killed(keeper, rpc, sig)
    refused(lambda: rpc.kv("DescribeSequences", session=s), "resume goes on with it")
    r = open_(rpc, resume=s, request_id=5)
    assert r.resumed and r.resume_ms == 30000 and r.session != s
    s = r.session
    infos = {i.sequence: i for i in rpc.kv("DescribeSequences", session=s).sequences}
    assert {q: (i.length, i.holds, i.holders, i.name) for q, i in infos.items()} == {
        made[0]: (100, 1, 1, ""), fork: (400, 1, 1, ""), made[1]: (0, 2, 1, "p")}
    assert [attend(rpc, s, q) for q in (made[0], fork)] == outputs
    assert list(rpc.kv("CreateSequences", session=s, request_id=1, count=3).sequences) == made
    assert list(rpc.kv("ForkSequence", session=s, request_id=2, sequence=made[0]).sequences) == [fork]
    assert rpc.kv("AttachSequence", session=s, request_id=3, name="p").sequence.holds == 2
    rpc.kv("FreeSequences", session=s, request_id=4, sequences=[made[2]])
    refused(lambda: rpc.kv("FreeSequences", session=s, request_id=6, sequences=[made[2]]), "holds no sequence")
    assert append_as(rpc, s, made[0], 0, k, v, 7)
    assert len(rpc.kv("DescribeSequences", session=s).sequences) == 3
    assert keeper.metric("kvd_sequences") == 3
    assert keeper.metric("kvd_restarts_survived_total") == 1 and keeper.metric("kvd_sessions_resumed_total") == 1
    status = rpc.admin("GetStatus")
    assert (status.sessions_taken_over, status.sequences_taken_over, status.sessions_lost, status.sequences_lost) == (1, 3, 0, 0)
    rpc.kv("CloseSession", session=s)
    assert keeper.metric("kvd_sequences") == 1  # what is published
    rpc.channel.close()


def test_who_lost_a_session_cannot_write(kvd, rpc):
    """It is resumed elsewhere while its worker lives, is stopped, or thinks so."""
    a = FdSocket(kvd)
    old = open_(rpc, ticket=a.ticket).session
    seq = rpc.kv("CreateSequences", session=old, count=1).sequences[0]
    append(rpc, old, seq, 0, *random_kv(10))
    refused(lambda: open_(rpc, resume=old, namespace_name="other"), "no such session" if os.getuid() else "namespace default")
    b = FdSocket(kvd)
    r = open_(rpc, ticket=b.ticket, resume=old, request_id=9)
    assert r.resumed
    assert a.s.recv(10) == b""  # hung up on
    for call in (lambda: append(rpc, old, seq, 10, *random_kv(1)), lambda: rpc.kv("TruncateSequence", session=old, sequence=seq, length=0),
                 lambda: rpc.kv("MapSequences", session=old), lambda: open_(rpc, resume=old)):
        with pytest.raises(grpc.RpcError) as e:
            call()
        assert e.value.code().name == "UNAUTHENTICATED" and "was resumed elsewhere: that is its generation 2, this is 1" in e.value.details()
    append(rpc, r.session, seq, 10, *random_kv(1))
    c = FdSocket(kvd)  # the reply was lost, and the connection with it
    again = open_(rpc, ticket=c.ticket, resume=old, request_id=9)
    assert again.session == r.session
    for wrong in (old[:-1] + ("0" if old[-1] != "0" else "1"), old[:-1], "1.2", "1", "1.1.", "x", old + "0"):
        refused(lambda name=wrong: open_(rpc, resume=name), "no such session to resume")
        refused(lambda name=wrong: rpc.kv("DescribeSequences", session=name), "unknown session")
    refused(lambda: open_(rpc, resume=again.session, layout=layout(codec="int2c")), "another layout")
    assert rpc.kv("DescribeSequences", session=again.session).sequences[0].length == 11
    c.s.close()
    assert wait_for(lambda: kvd.metric("kvd_sessions") == 0)
    assert kvd.metric("kvd_sequences") == 0


def test_buffers_get_their_ids_again(start):
    keeper = start("--keep")
    rpc = Rpc(keeper.address)
    w = FdSocket(keeper)
    s = open_(rpc, ticket=w.ticket).session
    fd = memfd(1 << 16)
    w.send(1, fd)
    id = rpc.kv("RegisterBuffer", session=s, key=1, size=1 << 16).buffer
    rpc = killed(keeper, rpc)
    w = FdSocket(keeper)
    s = open_(rpc, ticket=w.ticket, resume=s).session
    w.send(2, fd)
    other = rpc.kv("RegisterBuffer", session=s, key=2, size=1 << 16).buffer
    w.send(1, fd)
    assert rpc.kv("RegisterBuffer", session=s, key=1, size=1 << 16, buffer=id).buffer == id
    w.send(3, fd)
    assert rpc.kv("RegisterBuffer", session=s, key=3, size=1 << 16, buffer=id).buffer not in (0, id, other)
    rpc.channel.close()


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextlib.contextmanager
def limited(pid, more):
    """That process gets so many descriptors more, and then none."""
    old = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors(pid) + more, old[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, old)


def test_a_buffer_that_finds_no_descriptor_free_ends_no_session(start):
    kvd = start()
    rpc = Rpc(kvd.address)
    w = FdSocket(kvd)
    s = open_(rpc, ticket=w.ticket).session
    made = list(rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences)
    fd = memfd(1 << 16)
    with limited(kvd.process.pid, 0):
        w.send(1, fd)
        refused(lambda: rpc.kv("RegisterBuffer", session=s, key=1, size=1 << 16), "no file descriptor free")
    for _ in range(200):  # that message is let go of beside the loop, and until then nobody knows what comes behind it
        with pytest.raises(grpc.RpcError) as e:
            rpc.kv("RegisterBuffer", session=s, key=2, size=1 << 16)
        if "no file descriptor free" not in e.value.details():
            break
        time.sleep(0.05)
    assert "no descriptor was sent" in e.value.details()
    w.send(1, fd)
    assert rpc.kv("RegisterBuffer", session=s, key=1, size=1 << 16).buffer
    assert [q.sequence for q in rpc.kv("DescribeSequences", session=s).sequences] == made
    rpc.channel.close()


@pytest.mark.skipif("san" in os.environ.get("KVD_BUILD", ""), reason="Python is not instrumented")
def test_a_session_that_comes_back_to_few_descriptors_is_not_lost(start):
    """Connected again, but its buffers not all registered: the next call goes on there."""
    keeper = start("--keep")
    with connect(keeper, timeout=20) as client:
        kv_ = [fill(client, values(i, LAYERS, 100, KV_HEADS, DIM)) for i in range(2)]
        more = [client.tensor(LAYERS, 3000, KV_HEADS, DIM) for _ in range(6)]
        sequence = client.create()
        sequence.append(*kv_)
        kill(keeper, signal.SIGKILL)
        Rpc(keeper.address).channel.close()
        pid, done, seen, alive = pid_of(keeper), threading.Event(), set(), Rpc(keeper.address)
        alive.admin("Ping")
        free = descriptors(pid)
        old = resource.prlimit(pid, resource.RLIMIT_NOFILE)

        def one_more_at_a_time():
            for n in range(16):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (free + n, old[1]))
                done.wait(0.15)
                alive.admin("Ping")  # it has had time for what there is
            resource.prlimit(pid, resource.RLIMIT_NOFILE, old)

        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, old[1]))
        slowly = threading.Thread(target=one_more_at_a_time)
        slowly.start()
        while True:
            try:
                assert sequence.describe().length == 100
                break
            except package.ExhaustedError as e:
                seen.add(str(e))
        done.set()
        slowly.join()
        alive.channel.close()
        assert any("no file descriptor free" in e for e in seen), seen
        sequence.append(*kv_)
        assert sequence.describe().length == 200 and len(more) == 6


def test_what_was_lent(start):
    """On the CPU it is new memory after a restart. On a GPU it is the same, so a worker need not map it again, while its kernels
    read it; and it passes to no other namespace."""
    keeper = start("--keep", "--pool-size", "4MiB", "--extent-size", "2MiB")
    w = Raw(keeper)
    sequence, *_ = w.sequence(500)
    w.map(sequence)
    w.read()
    lent = dict(w.memory)
    assert lent and all(lent.values())
    for _ in range(2):
        killed(keeper, w.rpc)
        w = Raw(keeper, resume=w.session)
        w.map(sequence)
        w.read()
        assert set(w.memory) == set(lent) and (w.memory == lent) == keeper.on_gpu(), (lent, w.memory)
        lent = dict(w.memory)
    w.free(sequence)
    w.rpc.kv("CloseSession", session=w.session)
    other = Raw(keeper, namespace="other")
    sequence, *_ = other.sequence(500)
    other.map(sequence)
    other.read()
    assert set(other.memory) & set(lent) and not set(other.memory.values()) & set(lent.values())


def test_what_nobody_resumes_is_freed(start):
    def begun(pace):
        """A connection, and two sessions of a kvd that was killed: one was resumed, the other still may be."""
        nonlocal keeper
        if keeper:
            keeper.stop()
        keeper = start("--keep", config=f"[kvd]\nresume-time = {4 * pace}s\n")  # a GPU takes a second to start
        rpc = Rpc(keeper.address)
        a, b = open_(rpc).session, open_(rpc).session
        for s in (a, b):
            append(rpc, s, rpc.kv("CreateSequences", session=s, count=2).sequences[0], 0, *random_kv(100))
        rpc = killed(keeper, rpc)
        a = open_(rpc, resume=a).session
        assert keeper.metric("kvd_sessions_waiting") == 1 and keeper.metric("kvd_sequences") == 4
        return rpc, a, b

    keeper = None
    rpc, a, b = at_some_pace(begun, (1, 5))
    assert wait_for(lambda: keeper.metric("kvd_sequences") == 2, 40)
    refused(lambda: open_(rpc, resume=b), "within resume-time")
    assert 'kvd_lost_total{what="sequences"} 2' in keeper.kvctl("metrics").stdout
    assert "not resumed within resume-time" in keeper.text()
    assert len(rpc.kv("DescribeSequences", session=a).sequences) == 2
    (keeper.folder / "kvd.conf").write_text("[kvd]\nresume-time = 0\n")  # sessions end with kvd
    rpc = killed(keeper, rpc)
    refused(lambda: open_(rpc, resume=a), "no such session to resume")
    assert keeper.metric("kvd_sequences") == 0
    assert pid_of(keeper)
    rpc.channel.close()
