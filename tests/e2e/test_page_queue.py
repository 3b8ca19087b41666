"""Queues of page calls from Python, beside a kvd: tickets, the descriptor, and what becomes of them when something ends. tests/e2e/client_queue.c
has what C programs and sanitizers see."""
import asyncio
import os
import select
import signal
import time

import numpy as np
import pytest

import kvd as package
from conftest import BUILD, at_some_pace
from kvd.pages import ENCODED, EXACT
from test_keep import kill
from test_pages import Engine, connect, keys_of, kv
from test_python_processes import forked

pytestmark = pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")


def drain(queue, n, seconds=20):
    """The next n that end, as an event loop waits for them."""
    ended, until = [], time.monotonic() + seconds
    while len(ended) < n:
        assert select.select([queue], [], [], until - time.monotonic())[0], f"{len(ended)} of {n} have ended"
        ended += queue.poll()
    assert len(ended) == n and queue.poll() == [] and not select.select([queue], [], [], 0)[0]
    return ended


def test_a_get_behind_a_put_finds_it(kvd):
    given, keys, e, into = kv(1, 4), keys_of("behind", 4), Engine(16), Engine(16)
    e.write(range(16), given)
    with connect(kvd) as p, p.queue() as q:
        assert q.poll() == [] and not select.select([q], [], [], 0)[0]
        described = e.paged([])
        assert q.put(keys, described.with_blocks(np.arange(16)), exact=[True, False, True, True]) == 1
        assert q.get(keys, into.paged(range(16))) == 2
        ended = drain(q, 2)
        kinds = bytes([EXACT, ENCODED, EXACT, EXACT])
        assert [(x.ticket, x.kinds, x.error) for x in ended] == [(1, kinds, None), (2, kinds, None)] and ended[1].seconds > 0
        got = into.read(range(16))
        assert np.array_equal(got[:, :, :64], given[:, :, :64]) and np.array_equal(got[:, :, 128:], given[:, :, 128:])
        q.get(keys_of("nowhere", 1), into.paged(range(4)))
        (failed,) = drain(q, 1)
        assert isinstance(failed.error, package.NotFoundError) and failed.kinds == b"" and q.wait(3, 0)


def test_what_is_wrong_is_said_at_once(kvd):
    e, keys = Engine(16), keys_of("wrong", 2)
    with connect(kvd) as p, p.queue(2) as q:
        for wrong in (lambda: q.put(keys, e.paged(range(4))), lambda: q.get([b"short"], e.paged(range(4))), lambda: q.wait(1, 0),
                      lambda: q.cancel(7), lambda: p.queue(4097), lambda: p.queue(0)):
            with pytest.raises(package.InvalidError):
                wrong()
        with pytest.raises(TypeError):
            q.put(keys, e.k)
        for _ in range(2):
            q.put(keys, e.paged(range(8)))
        with pytest.raises(package.ExhaustedError, match="2 tickets"):
            q.put(keys, e.paged(range(8)))
        assert [x.error for x in drain(q, 2)] == [None, None] and q.put(keys, e.paged(range(8))) == 3
    for closed in (q.poll, q.fileno, lambda: q.get(keys, e.paged(range(8)))):
        with pytest.raises(package.InvalidError, match="closed"):
            closed()


def test_gets_do_not_wait_for_puts_and_puts_that_wait_are_taken_back(kvd):
    """A quarter of a gigabyte is put, in parts; a get in another queue is over long before, and the rest of it is taken back."""
    e, small, n = Engine(256, 64, dim=128, layers=4, heads=8), Engine(4, 64, dim=128, layers=4, heads=8), 8
    for x in e.k + e.v:
        x[...] = 0x3f80
    keys = keys_of("long", 32 * n)
    options = {"layers": range(4), "kv_heads": 8, "head_dim": 128}
    with connect(kvd, **options) as a, connect(kvd, **options) as b, a.queue() as puts, b.queue() as gets:
        a.put(keys[:4], e.paged(range(4)), exact=[True] * 4)
        for i in range(1, 32):
            assert puts.put(keys[n * i:n * (i + 1)], e.paged(range(n * i, n * (i + 1)))) == i
        gets.get(keys[:4], small.paged(range(4)))
        assert [x.error for x in drain(gets, 1)] == [None]
        back = [i for i in range(31, 0, -1) if puts.cancel(i)]
        assert len(back) > 10 and back == list(range(31, 31 - len(back), -1))
        assert not any(puts.cancel(i) for i in back) and all(puts.wait(i, 20) for i in range(1, 32))
        assert [x.ticket for x in drain(puts, 31 - len(back))] == list(range(1, 32 - len(back)))
        found = a.lookup([keys[n * i:n * (i + 1)] for i in range(1, 32)], lease_ms=0)
        assert [f.pages for f in found] == [n] * (31 - len(back)) + [0] * len(back)


def test_an_event_loop_waits_for_tickets(kvd):
    e, keys = Engine(64), keys_of("loop", 16)
    e.write(range(64), kv(2, 16))

    async def main():
        with connect(kvd) as p, p.queue() as q:
            over, ended = asyncio.Event(), []

            def told():
                ended.extend(q.poll())
                if len(ended) == 4:
                    over.set()

            asyncio.get_running_loop().add_reader(q, told)
            for i in range(4):
                q.put(keys[4 * i:4 * i + 4], e.paged(range(16 * i, 16 * i + 16)))
            await asyncio.wait_for(over.wait(), 20)
            asyncio.get_running_loop().remove_reader(q)
            assert [x.error for x in ended] == [None] * 4

    asyncio.run(main())


@pytest.mark.parametrize("keep", [False, True])
def test_a_kvd_that_is_killed_is_a_miss_and_the_next_one_is_found(start, keep):
    kvd = start("--keep") if keep else start()
    e, keys = Engine(64), keys_of("killed", 16)
    e.write(range(64), kv(3, 16))
    with connect(kvd, timeout=60) as p, p.queue() as q:
        q.put(keys[:8], e.paged(range(32)))
        drain(q, 1)
        if keep:  # the session goes on, and what is under way with it
            for i in range(20):
                q.get(keys[:8], e.paged(range(32)))
            kill(kvd)
            assert [x.error for x in drain(q, 20)] == [None] * 20
            return
        kvd.process.kill()
        kvd.process.wait()
        for i in range(20):
            q.get(keys[:8], e.paged(range(32)))
        assert all(isinstance(x.error, (package.UnavailableError, package.LostError)) for x in drain(q, 20))  # in a third of its time
        kvd.start()
        for _ in range(3):  # the session is lost, once, and the pages with it
            q.put(keys, e.paged(range(64)))
            (ended,) = drain(q, 1)
            if not ended.error:
                break
        assert ended.kinds == bytes([ENCODED] * 16)


def test_a_kvd_that_hangs_is_waited_for_once(kvd):
    e, keys = Engine(64), keys_of("hangs", 16)
    e.write(range(64), kv(3, 16))

    def once(pace):
        with connect(kvd, timeout=pace) as p, p.queue() as q:
            p.put(keys, e.paged(range(64)))
            kvd.process.send_signal(signal.SIGSTOP)
            try:
                for _ in range(10):
                    q.get(keys, e.paged(range(64)))
                began = time.monotonic()
                ended = drain(q, 10, 60)
                assert time.monotonic() - began < 4 * pace and all(isinstance(x.error, package.TimeoutError) for x in ended)
                assert [x.seconds > 0 for x in ended] == [True] + [False] * 9
            finally:
                kvd.process.send_signal(signal.SIGCONT)
            q.get(keys, e.paged(range(64)))
            assert drain(q, 1)[0].error is None

    at_some_pace(once, (1, 5))


def test_a_forked_child_leaves_its_parents_queue_alone(kvd):
    e, keys = Engine(64), keys_of("fork", 16)
    e.write(range(64), kv(4, 16))
    with connect(kvd) as p, p.queue() as q:
        q.put(keys, e.paged(range(64)))

        def child():
            for refused in (q.poll, q.fileno, lambda: q.put(keys, e.paged(range(64))), lambda: q.wait(1, 0), lambda: q.cancel(1), p.queue):
                with pytest.raises(package.PreconditionError, match="forked"):
                    refused()
            q.close()

        assert forked(child) == 0
        assert [x.error for x in drain(q, 1)] == [None]


def test_what_is_under_way_ends_with_its_pages(kvd):
    """Blocks, keys and room for kinds live until a ticket has ended, whatever the program lets go of."""
    p = connect(kvd)
    q = p.queue()
    for i in range(20):
        e = Engine(64)
        e.write(range(64), kv(i, 16))
        q.put(keys_of(f"closed {i}", 16), e.paged(range(64)))
        del e
    assert q.wait(1, 20) and os.fstat(q.fileno())
    p.close()
    with pytest.raises(package.InvalidError, match="closed"):
        q.poll()
    with connect(kvd) as other:
        assert other.lookup([keys_of("closed 0", 16)], lease_ms=0)[0].pages == 16
