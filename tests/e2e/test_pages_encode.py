"""Exact pages of chains that have gone on: kvd encodes them itself, and nobody finds less than what was promised meanwhile. KVD_KILLS
sets how often kvd is killed amid that."""
import json
import os
import random
import threading
import time

import numpy as np
import pytest

import kvd as package
from conftest import EMULATED
from kvd.pages import ENCODED, EXACT, MISSING
from test_keep import kill
from test_pages import Engine, connect, keys_of, kv, pytestmark, wait_until  # noqa: F401
from test_scrub import SMALL, spoil_at_work

TAIL = 4


def counter(kvd, name, namespace="default"):
    text = f'{name}{{namespace="{namespace}"}} '
    return next(float(line.split()[-1]) for line in kvd.kvctl("metrics").stdout.splitlines() if line.startswith(text))


def used(kvd):
    """Bytes of pages that the index has."""
    return counter(kvd, "kvd_prefix_bytes")


def kinds(p, keys):
    return p.lookup([keys], lease_ms=0)[0].kinds


def flags(n, end=None):
    """Exact: a prompt's first page and its last ones."""
    end = n if end is None else end
    return [i == 0 or end - TAIL <= i < end for i in range(n)]


def tail(pages):
    return bytes([EXACT] + [ENCODED] * (pages - TAIL - 1) + [EXACT] * TAIL)


def put(p, e, keys, begin, end, exact=None):
    """Pages [begin, end) of a chain that ends there."""
    p.put(keys[begin:end], e.paged(range(begin, end)), after=keys[begin - 1] if begin else None, exact=exact or flags(end)[begin:])


def goes_on(p, keys, was, end):
    """What a connector tells when a chain of `was` pages has `end` by now."""
    return p.encode(keys[max(1, was - TAIL - 1):min(end, was + TAIL)])


@pytest.mark.parametrize("codec, dim", [("int2", 64), ("tc2", 128), ("tc2.5", 64), ("int4", (192, 128)), ("int2", 128)])
def test_what_is_encoded_is_what_a_put_would_have_encoded(start, codec, dim):
    """Bit for bit, of all layers and heads; and its exact page's memory is free."""
    if EMULATED and dim != 64:
        pytest.skip("the emulated GPU has no kernels for it")
    kvd = start()
    widths = dim if isinstance(dim, tuple) else (dim, dim)
    n, shape = 14, {"codec": codec, "head_dim": dim}
    keys, plain = keys_of("a chain", n), keys_of("put encoded", n)
    given = [kv(3, n, w)[i] for i, w in enumerate(widths)]
    k, v = ([np.ascontiguousarray(x).reshape(n, 64, *x.shape[1:]) for x in side] for side in given)
    into = [[np.zeros_like(x) for x in side] for side in (k, v)]
    with connect(kvd, **shape) as p:
        p.put(keys[:8], package.Paged(k, v, range(8), order="bthd"), exact=flags(8))
        before = used(kvd)
        p.put(keys[8:], package.Paged(k, v, range(8, 14), order="bthd"), after=keys[7], exact=flags(14)[8:])
        p.put(plain, package.Paged(k, v, range(14), order="bthd"))
        assert kinds(p, keys) == bytes([2, 1, 1, 1, 2, 2, 2, 2, 1, 1, 2, 2, 2, 2])
        had = used(kvd)
        assert goes_on(p, keys, 8, 14) == 4
        assert kinds(p, keys) == tail(14)
        assert goes_on(p, keys, 8, 14) == 0  # again
        freed = had - used(kvd)
        assert freed > 0 and counter(kvd, "kvd_pages_encoded_total") == 4
        assert counter(kvd, "kvd_pages_encoded_freed_bytes_total") > freed  # as encoded ones came
        p.get(plain[4:8], package.Paged(*into, range(4, 8), order="bthd"))
        wanted = [np.array([x[4:8] for x in side]) for side in into]
        p.get(keys[4:8], package.Paged(*into, range(4), order="bthd"))
        for side, there in zip(into, wanted):
            assert np.array_equal(np.array([x[:4] for x in side]), there)
        assert used(kvd) > before
    kvd.kvctl("verify")


@pytest.mark.parametrize("kept", [False, True])
def test_what_a_lease_has_found_stays_exact_until_it_ends(start, kept):
    kvd = start("--keep") if kept else start()
    if kept:  # a pool that was taken over does as a new one
        kill(kvd)
    keys, e, back = keys_of("leased", 20), Engine(20, 64), Engine(20, 64)
    given = kv(5, 20)
    e.write(range(20), given)
    with connect(kvd) as p, connect(kvd) as reader, connect(kvd) as other:
        put(p, e, keys, 0, 9)
        # Held one by one, and each for itself: of pages that were put behind each other too.
        found = reader.lookup([keys[:9]], lease_ms=60000)[0]
        alone = other.lookup([keys[6:7]], lease_ms=60000)[0]
        assert found.kinds == tail(9)
        put(p, e, keys, 9, 20)
        assert goes_on(p, keys, 9, 20) == 4
        assert kinds(p, keys) == tail(20)
        assert kvd.metric("kvd_pages_superseded") == 4 and counter(kvd, "kvd_pages_encoded_freed_bytes_total") == 0
        assert reader.get(keys[:9], back.paged(range(9))) == tail(9)
        assert np.array_equal(back.read(range(5, 9)), given[:, :, 5 * 64:9 * 64])
        # A chain ends there again: they are exact for everybody.
        p.put(keys[7:9], e.paged(range(7, 9)), after=keys[6], exact=[True] * 2)
        assert kinds(p, keys[5:9]) == bytes([ENCODED, ENCODED, EXACT, EXACT])
        assert goes_on(p, keys, 9, 20) == 2
        reader.release([found.lease])
        wait_until(lambda: kvd.metric("kvd_pages_superseded") == 1)  # one has two leases
        assert other.get(keys[5:9], back.paged(range(5, 9))) == bytes([ENCODED, EXACT, ENCODED, ENCODED])
        other.release([alone.lease])
        wait_until(lambda: kvd.metric("kvd_pages_superseded") == 0)
        assert other.get(keys[5:9], back.paged(range(5, 9))) == bytes([ENCODED] * 4)
        assert counter(kvd, "kvd_pages_encoded_freed_bytes_total") > 0
        # What is retained is as well leased.
        assert p.hint([keys[16:]], "retain", 60) == [4]
        more = keys + keys_of("more", 8)
        p.put(more[20:], e.paged(range(8)), after=more[19], exact=[False] * 4 + [True] * 4)
        assert goes_on(p, more, 20, 28) == 4 and kvd.metric("kvd_pages_superseded") == 4
        assert p.hint([keys[16:]], "retain", 0) == [4]  # of the encoded ones: the lease goes on, as it was told by the exact ones
    kvd.kvctl("verify")


def test_a_leased_page_counts_again_where_the_encoded_one_has_gone(kvd):
    keys, e = keys_of("again", 20), Engine(20, 64)
    e.write(range(20), kv(5, 20))
    with connect(kvd) as p, connect(kvd) as reader:
        put(p, e, keys, 0, 9)
        found = reader.lookup([keys[5:9]], lease_ms=60000)[0]
        put(p, e, keys, 9, 20)
        assert goes_on(p, keys, 9, 20) == 4 and kinds(p, keys[5:9]) == bytes([ENCODED] * 4)
        kvd.kvctl("evict", "--namespace", "default")
        assert kinds(p, keys[5:9]) == bytes([EXACT] * 4)
        wait_until(lambda: kvd.metric("kvd_pages_superseded") == 0)
        reader.release([found.lease])
        # The first is exact too, and the others came behind it.
        assert kinds(p, keys) == bytes([EXACT] + [MISSING] * 4 + [EXACT] * 4 + [MISSING] * 11)
    kvd.kvctl("verify")


def test_pages_near_another_chains_end_stay_exact(kvd):
    """Two chains that part within 256 tokens of one's end; and one whose end was passed, but not by that much."""
    n, e = 24, Engine(40, 64)
    e.write(range(40), kv(6, 40))
    one = keys_of("one", n)
    two = one[:10] + keys_of("two", n - 10)  # parts from it after page 9
    with connect(kvd) as p:
        put(p, e, one, 0, 12)  # exact: 0, 8 to 11
        put(p, e, two, 10, 12)  # the other's: 10 and 11; 8 and 9 are both's
        put(p, e, one, 12, 14)  # which has gone on by two pages
        assert goes_on(p, one, 12, 14) == 0  # 8 and 9 are far enough from its end, and near the other's
        assert kinds(p, one[:14]) == bytes([2] + [1] * 7 + [2] * 6)
        put(p, e, one, 14, 24)
        assert goes_on(p, one, 12, 24) == 2  # 10 and 11
        assert p.encode(one[7:18]) == 2  # and 12 and 13
        assert kinds(p, one) == bytes([2] + [1] * 7 + [2] * 2 + [1] * 10 + [2] * 4)
        assert kinds(p, two[:12])[8:] == bytes([2] * 4)
        put(p, e, two, 12, 20)
        assert goes_on(p, two, 12, 20) == 4  # the last chain that ended there
        assert kinds(p, two[:20]) == tail(20) and kinds(p, one) == tail(24)
        # The last four of a call are never encoded, nor those behind which nothing has been put yet.
        assert p.encode(two[15:20]) == 0 and p.encode(two[15:]) == 0
        assert kinds(p, two[:20]) == tail(20)
        # The first page is like others: whoever wants it exact does not name it.
        assert p.encode(one[:12]) == 0  # from it those of the other chain go on
    kvd.kvctl("verify")


def test_a_key_that_is_named_twice_does_not_hide_another_chain(kvd):
    n, e = 12, Engine(24, 64)
    e.write(range(24), kv(6, 24))
    one = keys_of("one", n)
    two = one[:6] + keys_of("two", 6)
    with connect(kvd) as p:
        put(p, e, one, 0, 8)
        put(p, e, two, 6, 8)
        put(p, e, one, 8, 12)
        assert p.encode(one[4:8] + one[6:7] * 4 + one[8:12]) == 2  # 6 and 7, not 4 and 5
        assert kinds(p, two[:8])[4:] == bytes([2] * 4)
    kvd.kvctl("verify")


def test_a_page_that_is_there_both_ways_is_exact_until_its_chain_goes_on(kvd):
    """A short prompt within a longer one: its last pages had been encoded, and nothing is encoded twice."""
    keys, e = keys_of("both ways", 20), Engine(20, 64)
    e.write(range(20), kv(8, 20))
    with connect(kvd) as p:
        put(p, e, keys, 0, 16)
        p.put(keys[4:8], e.paged(range(4, 8)), after=keys[3], exact=[True] * 4)
        assert kinds(p, keys[:16])[4:8] == bytes([EXACT] * 4)
        had = used(kvd)
        assert goes_on(p, keys, 8, 16) == 4 and kinds(p, keys[:16]) == tail(16)
        assert had - used(kvd) == counter(kvd, "kvd_pages_encoded_freed_bytes_total")  # nothing new came
    kvd.kvctl("verify")


def test_a_conversation_that_grows_keeps_five_exact_pages(kvd):
    """Turn by turn, two conversations of one beginning: what is exact does not grow with them, and each finds all of its pages."""
    e, turns, step = Engine(160, 64), 12, 6
    e.write(range(160), kv(9, 160))
    shared = keys_of("system", 8)
    talks = [shared + keys_of(f"talk {i}", turns * step) for i in range(2)]
    exact_page = 2 * 3 * 64 * 2 * 64 * 2
    with connect(kvd) as p:
        put(p, e, shared, 0, 8)
        sizes = []
        for turn in range(turns):
            for keys in talks:
                was = 8 + turn * step
                put(p, e, keys, was, was + step)
                goes_on(p, keys, was, was + step)
                found = p.lookup([keys[:was + step]], lease_ms=0)[0]
                assert found.pages == was + step and found.kinds[-TAIL:] == bytes([EXACT] * TAIL)
            sizes.append(sum(kinds(p, k[:was + step]).count(EXACT) for k in talks))
        assert sizes == [2 * (1 + TAIL)] * turns
        pages = 8 + 2 * turns * step
        per = (used(kvd) - (1 + 2 * TAIL) * exact_page) / (pages - 1 - 2 * TAIL)
        assert per < exact_page / 3  # of an encoded one; all in bf16 of tails would be 97 exact ones
        assert counter(kvd, "kvd_pages_encoded_total") == 4 + 2 * (turns - 1) * TAIL
        # What goes first are the pages that others were put behind no more.
        kvd.kvctl("evict", "--namespace", "default", "--bytes", str(int(per)))
        assert sum(p.lookup([k], lease_ms=0)[0].pages for k in talks) >= 2 * len(talks[0]) - 2 * TAIL
    kvd.kvctl("verify")


def test_eviction_takes_a_chain_from_its_end(start):
    """Also where its middle was encoded later than what is behind it."""
    kvd = start()
    keys, e = keys_of("order", 30), Engine(30, 64)
    e.write(range(30), kv(10, 30))
    with connect(kvd) as p:
        for begin, end in ((0, 10), (10, 20), (20, 30)):
            put(p, e, keys, begin, end)
            goes_on(p, keys, begin, end) if begin else None
        assert kinds(p, keys) == tail(30)
        while there := p.lookup([keys], lease_ms=0, quiet=True)[0].kinds:
            if there[1:].count(MISSING) == 29:
                break
            encoded = [k == ENCODED for k in there[1:26]]
            assert encoded == sorted(encoded, reverse=True), there  # no hole among them
            kvd.kvctl("evict", "--namespace", "default", "--bytes", "1")
    kvd.kvctl("verify")


def test_without_room_nothing_changes(start):
    """A namespace whose quota its leased pages fill."""
    kvd = start(config="[namespace small]\nquota = 1MiB\n")
    keys, e = keys_of("full", 40), Engine(40, 64)
    e.write(range(40), kv(11, 40))
    with connect(kvd, namespace="small") as p:
        put(p, e, keys, 0, 5, exact=[True] * 5)
        put(p, e, keys, 5, 10, exact=[False] + [True] * 4)
        lease = p.lookup([keys[:10]], lease_ms=60000)[0]
        assert lease.kinds == bytes([EXACT] * 5 + [ENCODED] + [EXACT] * 4)
        i = 10
        with pytest.raises(package.ExhaustedError):
            while i < 40:  # all that is left of the quota
                p.put(keys[i:i + 1], e.paged([i]), after=keys[i - 1])
                held = p.lookup([keys[i:i + 1]], lease_ms=60000)[0]
                assert held.lease
                i += 1
        have = kinds(p, keys[:10])
        with pytest.raises(package.ExhaustedError):
            p.encode(keys[:10])
        assert kinds(p, keys[:10]) == have == lease.kinds
        p.release([lease.lease])
        assert counter(kvd, "kvd_pages_encoded_total", "small") == 0
    kvd.kvctl("verify")


@pytest.mark.skipif(os.getuid() != 0, reason="writing another process's memory wants root")
def test_a_damaged_page_is_not_encoded(start):
    """It would get a checksum of its own then, and nobody would ever know."""
    kvd = start(*SMALL, config="[kvd]\nscrub-rate = 0\n")
    keys, e = keys_of("damaged", 16), Engine(16, 64)
    e.write(range(16), kv(14, 16))
    with connect(kvd) as p:
        put(p, e, keys, 0, 8)
        put(p, e, keys, 8, 16)
        assert "0 damaged" in kvd.kvctl("verify").stdout
        spoil_at_work(kvd)
        with pytest.raises(package.CorruptError, match="not what was stored"):
            goes_on(p, keys, 8, 16)
        assert counter(kvd, "kvd_pages_encoded_total") == 0 and kinds(p, keys)[4:8] == bytes([EXACT] * 4)
        kvd.kvctl("verify", check=False)  # which finds them
        assert kinds(p, keys)[4:8] == bytes(4)
        put(p, e, keys, 0, 8)
        put(p, e, keys, 8, 16)
        assert goes_on(p, keys, 8, 16) == 4 and kinds(p, keys) == tail(16)


def test_what_tiers_have_of_it_comes_back_exact(start, folder):
    """And is encoded when it is named again, whether tiers have an encoded one or not."""
    kvd = start(config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\n")
    keys, e, back = keys_of("tiers", 16), Engine(16, 64), Engine(16, 64)
    given = kv(15, 16)
    e.write(range(16), given)

    def behind():
        return int(json.loads(kvd.kvctl("--json", "tier", "status").stdout)["tiers"][0]["blocks"])

    with connect(kvd) as p:
        put(p, e, keys, 0, 8)
        wait_until(lambda: behind() == 8)
        put(p, e, keys, 8, 16)
        assert goes_on(p, keys, 8, 16) == 4
        wait_until(lambda: behind() == 20)  # both kinds of four of them
        for _ in range(2):
            kvd.kvctl("evict", "--namespace", "default")
            assert kinds(p, keys) == bytes(16)
            found = p.lookup([keys], lease_ms=0, restore_ms=20000)[0]
            assert found.pages == 16 and found.kinds[4:8] == bytes([EXACT] * 4)
            p.get(keys, back.paged(range(16)))
            assert np.array_equal(back.read(range(4, 8)), given[:, :, 4 * 64:8 * 64])
            assert goes_on(p, keys, 8, 16) == 4 and kinds(p, keys) == tail(16)
    kvd.kvctl("verify")


def test_lossless_pages_are_left_alone(kvd):
    keys, e = keys_of("bf16", 12), Engine(12, 64)
    e.write(range(12), kv(12, 12))
    with connect(kvd, codec="bf16") as p:
        p.put(keys, e.paged(range(12)))
        assert p.encode(keys) == 0 and kinds(p, keys) == bytes([EXACT] * 12)


def test_a_lease_keeps_each_page_of_a_lossless_session(kvd):
    """Whose pages are the exact ones of the namespace's other sessions, which encode what has been passed."""
    keys, e, back, given = keys_of("leased", 20), Engine(20, 64), Engine(20, 64), kv(5, 20)
    e.write(range(20), given)
    with connect(kvd) as p, connect(kvd, codec="bf16") as a:
        put(p, e, keys, 0, 9, exact=[True] * 9)
        assert a.lookup([keys[:9]], lease_ms=60000)[0].pages == 9
        put(p, e, keys, 9, 20)
        assert p.encode(keys) > 0
        assert a.get(keys[:9], back.paged(range(9))) == bytes([EXACT] * 9)
        assert np.array_equal(back.read(range(9)), given[:, :, :9 * 64])


def test_what_a_lossless_session_lets_expire_is_what_it_named(kvd):
    """Though it has been encoded meanwhile, and other pages came."""
    keys, e = keys_of("leased", 20), Engine(40, 64)
    e.write(range(20), kv(5, 20))
    e.write(range(20, 28), kv(6, 8))
    with connect(kvd) as p, connect(kvd, codec="bf16") as a:
        put(p, e, keys, 0, 9, exact=[True] * 9)
        assert a.hint([keys[:9]], "retain", 3, expire=True) == [9]
        put(p, e, keys, 9, 20)
        p.encode(keys)
        other = keys_of("other", 8)
        p.put(other, e.paged(range(20, 28)), exact=[True] * 8)
        wait_until(lambda: kvd.metric("kvd_prefix_leases") == 0)
        assert kinds(p, other) == bytes([EXACT] * 8)
        assert EXACT not in kinds(a, keys[1:9])


def test_what_is_malformed_is_refused(kvd):
    keys = keys_of("bad", 513)
    with connect(kvd) as p:
        assert p.encode([]) == 0 and p.encode(keys[:512]) == 0
        with pytest.raises(package.InvalidError, match="513 pages"):
            p.encode(keys)
        with pytest.raises(package.InvalidError, match="different lengths"):
            p.encode(keys[:3] + [b"x" * 16])


def test_a_kvd_that_is_killed_meanwhile_loses_nothing(start):
    """Whenever it is killed, each page is there, exact ones bit for bit, and the next kvd goes on with what was left."""
    kvd = start("--keep")
    rng, turns, step = random.Random(7), 8, 8
    e, back = Engine(80, 64), Engine(80, 64)
    given = kv(13, 80)
    e.write(range(80), given)
    for life in range(int(os.environ.get("KVD_KILLS", "4"))):
        keys = keys_of(f"killed {life}", 8 + turns * step)
        with connect(kvd, timeout=30) as p:
            put(p, e, keys, 0, 8)
            stop = rng.randrange(1, turns)
            for turn in range(turns):
                was = 8 + turn * step
                put(p, e, keys, was, was + step)
                if turn == stop:
                    kill_soon(kvd, rng.random() * 0.004)
                try:
                    goes_on(p, keys, was, was + step)
                except package.Error:
                    pass
                if turn == stop:
                    kvd.wait_ready()
                end = was + step
                found = p.lookup([keys[:end]], lease_ms=0)[0]
                assert found.pages == end and found.kinds[-TAIL:] == bytes([EXACT] * TAIL)
                p.get(keys[end - TAIL:end], back.paged(range(TAIL)))
                assert np.array_equal(back.read(range(TAIL)), given[:, :, (end - TAIL) * 64:end * 64])
            # What was left exact is encoded when it is named again.
            p.encode(keys[1:end])
            assert kinds(p, keys[:end]) == tail(end)
        kvd.kvctl("verify")


def kill_soon(keeper, seconds):
    def soon():
        time.sleep(seconds)
        kill(keeper)

    threading.Thread(target=soon).start()
    time.sleep(seconds / 2)
