"""What the engines' connectors have in common (client/python/kvd/engines), without an engine and without a daemon."""
import threading
import time

import pytest

import kvd
from kvd.engines import (COMPRESSED, EXACT, Adapters, Breaker, Lookups, PageStore, Policy, Ranks, Refused, Tails, Transfers, registered,
                         restore_seconds, space, split_key, weights_digest)


class Found:
    def __init__(self, kinds, lease):
        self.pages = len(kinds) if 0 not in kinds else kinds.index(0)
        self.kinds, self.lease = bytes(kinds), lease


class Pages:
    """Stands in for kvd.Pages where a test has to say what goes wrong, and when."""

    def __init__(self, held=None):
        self.held, self.error, self.calls, self.leases, self.released, self.restores = held or {}, None, [], 0, [], []
        self.gate = threading.Event()
        self.gate.set()

    def lookup(self, requests, lease_ms, restore_ms):
        self.calls.append(("lookup", len(requests)))
        self.restores.append(restore_ms)
        self.gate.wait(10)
        if self.error:
            raise self.error
        answers = []
        for keys in requests:
            kinds = [self.held.get(k, 0) for k in keys]
            self.leases += 1
            answers.append(Found(kinds, self.leases if kinds and kinds[0] else 0))
        return answers

    def put(self, keys, source, after, exact, had):
        self.calls.append(("put", len(keys)))
        if self.error:
            raise self.error
        for i, k in enumerate(keys):
            self.held.setdefault(k, EXACT if exact and exact[i] else COMPRESSED)
        return bytes(self.held[k] for k in keys)

    def release(self, leases):
        self.released += leases


def keys(n, name="k"):
    return [f"{name}{i:030}".encode() for i in range(n)]


def found(lookups, request, begin, wanted):
    end = time.monotonic() + 10
    while time.monotonic() < end:
        f = lookups.find(request, begin, wanted)
        if f is not None:
            return f
    raise AssertionError("no answer")


def test_first_and_last_pages_of_a_chain_are_exact():
    p = Policy()
    assert p.exact(0, 10, 10) == bytes([1, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    assert p.exact(3, 2, 10) == bytes(2) and p.exact(6, 2, 10) == bytes([1, 1])  # a chain may come in parts
    assert p.exact(0, 3, 3) == bytes([1, 1, 1])
    assert p.exact(9, 3, 10) == bytes([1, 0, 0])  # decoded ones follow
    assert p.exact(0, 10, 10) != Policy(lossy=False).exact(0, 10, 10) == bytes(10)


@pytest.mark.parametrize("kinds, begin, usable", [
    ([2, 1, 1, 2, 2, 2, 2], 0, 7),  # ends where a chain ended
    ([2, 1, 1, 1, 1, 1, 1, 1], 0, 4),  # departs from one: the last 256 tokens are computed
    ([2, 1, 1, 1, 2, 2, 2, 2, 1, 1], 0, 8),  # a shorter chain ended there
    ([2, 1, 1], 0, 1), ([2], 0, 1), ([1], 0, 1), ([], 0, 0),
    ([2, 2, 2, 2], 9, 4), ([2, 2], 9, 2), ([1, 2, 2], 9, 0), ([1, 2, 2, 2, 2], 9, 5)])
def test_the_end_of_a_hit_is_exact_or_computed(kinds, begin, usable):
    assert Policy().usable(bytes(kinds), begin) == usable
    assert Policy(lossy=False).usable(bytes(kinds), begin) == len(kinds)


def test_pages_that_a_chain_has_passed_are_told_of_three_times():
    """In runs with one before them and four behind them, as far as there are so many; those that nobody knows to be exact are not."""
    keys, tails = [bytes([i]) * 32 for i in range(60)], Tails(most=8)
    assert tails.passed(keys, 1, 56, 60) == []
    tails.note(keys[16:20])
    assert tails.passed(keys, 1, 16, 20) == []
    assert tails.passed(keys, 1, 18, 21) == [keys[15:21]]
    tails.note(keys[30:31])
    assert tails.passed(keys, 1, 36, 40) == [keys[15:24], keys[29:35]]
    assert tails.passed(keys, 18, 36, 40) == [keys[18:24], keys[29:35]]
    assert tails.passed(keys, 1, 56, 60) == [keys[15:24], keys[29:35]]
    assert tails.passed(keys, 1, 56, 60) == []
    tails.note(keys[40:50])  # more than are remembered
    assert tails.passed(keys, 1, 56, 60) == [keys[41:54]]
    tails.clear()
    assert tails.passed(keys, 1, 56, 60) == []


def test_keys_of_larger_chunks_are_split():
    assert split_key(b"x" * 32, 1) == [b"x" * 32]
    a, b = split_key(b"x" * 32, 2)
    assert len(a) == len(b) == 32 and len({a, b, *split_key(b"y" * 32, 2), *split_key(b"x" * 32, 4)}) == 8


def test_a_space_is_told_by_every_fact_and_by_names():
    base = dict(engine="x", weights="w", rope={"theta": 1e4}, rank=0, tp_size=1)
    assert len(space(**base)) == 32 and space(**base) == space(**dict(reversed(base.items())))
    others = [space(**{**base, k: v}) for k, v in dict(engine="y", weights="v", rope={"theta": 2e4}, rank=1, tp_size=2).items()]
    assert len({space(**base), *others}) == 6
    with pytest.raises(TypeError):
        space(weights=object())


def test_weights_are_told_by_content_and_not_by_name(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"1234")
        (folder / "notes.md").write_text(str(folder))
    assert weights_digest(str(a)) == weights_digest(str(b))
    (b / "model.safetensors").write_bytes(b"1235")
    assert weights_digest(str(a)) != weights_digest(str(b))
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    blob = blobs / ("0" * 64)
    blob.write_bytes(b"1234")
    (b / "model.safetensors").unlink()
    (b / "model.safetensors").symlink_to(blob)  # of a download cache: named by its content, and taken at its word
    cached = weights_digest(str(b))
    blob.write_bytes(b"")
    assert weights_digest(str(b)) == cached
    with pytest.raises(Refused, match="no folder or file here"):
        weights_digest("someone/something")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused):
        weights_digest(str(tmp_path / "empty"))


def test_adapters_of_one_name_and_other_content_are_told_apart(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "weights").write_bytes(b"one")
    ours, theirs = Adapters(), Adapters()
    one = ours.digest(1, str(adapter))
    assert one and ours.digest(1, str(adapter)) == one
    (adapter / "weights").write_bytes(b"other")
    assert theirs.digest(1, str(adapter)) not in (one, None)  # another engine loads what is there now
    assert ours.digest(1, str(adapter)) is None  # this one has the old content, or will load the new one: nobody knows
    (adapter / "weights").write_bytes(b"one")
    assert ours.digest(1, str(adapter)) is None  # for good
    assert ours.digest(2, str(adapter)) == one  # another number is loaded anew
    assert ours.digest(3, str(tmp_path / "none")) is None
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "weights").write_bytes(b"one")
    assert ours.digest(2, str(other)) is None  # the engine keeps what the number was first
    assert theirs.digest(7, str(other)) == one and theirs.digest(7, str(other), reload=True) is None and theirs.digest(7, str(other)) is None


def test_a_breaker_opens_tries_again_and_closes():
    now = [0.0]
    b = Breaker(failures=3, pause=1, longest=3, clock=lambda: now[0])
    for _ in range(2):
        assert b.allow()
        b.fail()
    assert b.allow() and not b.open
    b.succeed()  # counts from zero again
    for _ in range(3):
        assert b.allow()
        b.fail()
    assert b.open and b.opened == 1 and not b.allow()
    b.fail()  # of a call that had begun before: the pause is not longer for that
    now[0] = 1.0
    assert b.allow() and not b.allow()  # one at a time
    b.fail()
    now[0] = 2.9
    assert not b.allow()
    now[0] = 3.0
    assert b.allow()
    b.fail()
    now[0] = 5.9
    assert not b.allow()  # 3 seconds is the longest
    now[0] = 6.0
    assert b.allow()
    b.succeed()
    assert not b.open and b.allow() and b.allow() and b.opened == 1


def test_a_store_turns_failures_into_misses_and_leaves_kvd_alone_after_some():
    pages, now = Pages({k: 2 for k in keys(3)}), [0.0]
    store = PageStore(lambda: pages, Breaker(failures=2, pause=1, clock=lambda: now[0]))
    store.start()
    assert store.lookup([keys(4)], 1)[0].pages == 3
    pages.error = kvd.NotFoundError("gone")
    for _ in range(5):  # an answer, whatever it says
        assert store.lookup([keys(1)], 1) is None
    pages.error = kvd.ExhaustedError("no room")
    assert store.put(keys(1), None, None, b"\0", b"\0") is None and not store.breaker.open
    pages.error = kvd.UnavailableError("away")
    for _ in range(4):
        assert store.lookup([keys(1)], 1) is None
    assert store.counters.take() == {"gone": 5, "refusals": 1, "errors": 2, "skipped": 2} and store.breaker.open
    pages.error, now[0] = None, 1.0
    assert store.lookup([keys(1)], 1)[0].pages == 1 and not store.breaker.open


def test_blocks_are_registered_where_they_can_be_and_the_log_says_once_where_not(caplog):
    class Kvd(Pages):
        refusal, memory, ended = None, None, []

        def register(self, memory):
            if self.refusal:
                raise self.refusal
            self.memory = memory

        def unregister(self):
            self.ended.append("given back")

        def close(self):
            self.ended.append("closed")

    pages = Kvd()
    store = PageStore(lambda: registered(pages, "all of it"))
    store.start()
    assert pages.memory == "all of it" and not caplog.records
    store.close()
    store.close()
    assert pages.ended == ["given back", "closed"]
    for refusal in (kvd.InvalidError("no handle"), kvd.InvalidError("no handle"), kvd.ExhaustedError("1024 buffers")):
        pages.refusal = refusal
        PageStore(lambda: registered(pages, "all of it")).start()  # works on
    assert [r.getMessage().split(": ")[-1] for r in caplog.records] == ["no handle", "1024 buffers"]
    pages.refusal = kvd.UnavailableError("away")
    with pytest.raises(kvd.UnavailableError):
        registered(pages, "all of it")


def test_a_store_opens_later_what_was_away_and_refuses_what_is_wrong():
    tries = []

    def away_once():
        tries.append(1)
        if len(tries) == 1:
            raise kvd.UnavailableError("nobody listens")
        return Pages()

    store = PageStore(away_once)
    store.start()
    assert store.lookup([keys(1)], 1)[0].pages == 0 and len(tries) == 2

    def wrong():
        raise kvd.InvalidError("head_dim is 63")

    with pytest.raises(Refused, match="head_dim is 63"):
        PageStore(wrong).start()


def test_a_page_is_there_if_all_ranks_have_it():
    k = keys(5)
    a, b = Pages({x: EXACT for x in k}), Pages({x: COMPRESSED for x in k[:3]})
    ranks = Ranks([PageStore(lambda: a), PageStore(lambda: b)])
    ranks.start()
    held = ranks.lookup([k, k[3:]], 1)
    assert held[0].kinds == bytes([COMPRESSED] * 3) and all(held[0].leases)
    assert held[1].kinds == b"" and a.released and not b.released  # rank 0's lease of what rank 1 does not have
    before = len(a.released)
    b.error = kvd.UnavailableError("away")
    assert [h.kinds for h in ranks.lookup([k], 1)] == [b""] and len(a.released) == before + 1


def test_lookups_of_many_requests_go_in_one_call_and_never_hold_up_the_asker():
    k = keys(6)
    pages = Pages({x: EXACT for x in k[:4]})
    lookups = Lookups(Ranks([PageStore(lambda: pages)]), lease=30, patience=10)
    pages.gate.clear()
    assert lookups.find("a", 0, k) is None
    began = time.monotonic()
    for r in range(16):
        assert lookups.find(f"r{r}", 2, k[2:]) is None
    assert time.monotonic() - began < 5  # and not the ten seconds that an answer takes
    pages.gate.set()
    assert found(lookups, "a", 0, k).kinds == bytes([EXACT] * 4)
    assert all(found(lookups, f"r{r}", 2, k[2:]).kinds == bytes([EXACT] * 2) for r in range(16))
    assert sum(c == "lookup" for c, _ in pages.calls) <= 6
    taken = lookups.take("a")
    assert any(taken.leases) and lookups.take("a") is None
    lookups.forget("r0")
    lookups.release(taken.leases)
    end = time.monotonic() + 10
    while len(pages.released) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert taken.leases[0] in pages.released and len(pages.released) == 2
    assert found(lookups, "r1", 3, k[3:]).kinds == bytes([EXACT])  # from elsewhere: asked anew
    assert found(lookups, "none", 0, []).kinds == b""
    lookups.close()


def test_requests_that_come_at_once_wait_for_a_step_and_not_each_for_its_answer():
    """A hundredth of the asker's time goes into waiting, and what is saved is enough for a request that comes alone."""
    pages = Pages({})
    answer = pages.lookup
    pages.lookup = lambda *a, **k: (time.sleep(0.001), answer(*a, **k))[1]
    lookups = Lookups(Ranks([PageStore(lambda: pages)]), patience=10)
    wait, waits = lookups._changed.wait, []

    def timed(timeout=None):
        """Counts what was waited, without what a busy machine adds to it."""
        began = time.monotonic()
        try:
            return wait(timeout)
        finally:
            waits.append(min(time.monotonic() - began, timeout or 0))

    lookups._changed.wait = timed
    time.sleep(0.3)
    began, left = time.monotonic(), {f"r{i}" for i in range(400)}
    for step in range(200):
        left = {r for r in left if lookups.find(r, 0, keys(4)) is None}
        if not left:
            break
        time.sleep(0.01)
    assert not left and step < 190 and 0 < sum(waits) < 0.1 + (time.monotonic() - began) / 50, (step, sum(waits))
    assert sum(c == "lookup" for c, _ in pages.calls) < 50  # and not one for each
    lookups.close()


def test_a_lookup_without_an_answer_is_a_miss_and_a_late_lease_is_given_back():
    k = keys(2)
    pages = Pages({x: EXACT for x in k})
    lookups = Lookups(Ranks([PageStore(lambda: pages)]), lease=30, patience=0.05)
    pages.gate.clear()
    assert found(lookups, "a", 0, k).kinds == b""
    pages.gate.set()
    end = time.monotonic() + 10
    while not pages.released and time.monotonic() < end:
        time.sleep(0.01)
    assert pages.released[0] == 1
    end = time.monotonic() + 10
    while not found(lookups, "a", 0, k).kinds and time.monotonic() < end:  # a miss is not for ever
        time.sleep(0.01)
    assert found(lookups, "a", 0, k).kinds == bytes([EXACT] * 2)
    lookups.close()


def test_loads_do_not_wait_for_stores_and_stores_that_wait_are_given_up():
    t, gate, ran = Transfers(most_stores=2), threading.Event(), []

    def slow():
        ran.append("slow")
        gate.wait(10)
        return 5

    t.store(1, slow)
    end = time.monotonic() + 10
    while not ran and time.monotonic() < end:
        time.sleep(0.005)
    t.store(2, lambda: ran.append("never") or 1)
    t.store(3, lambda: ran.append("later") or 1)
    t.store(4, lambda: ran.append("never") or 1)  # one too many
    t.load(5, lambda: 7)
    t.wait([5, 2], 0.01)
    gate.set()
    t.wait([1, 3, 5], 10)  # what can be done in time is done
    done = {d.job: (d.ok, d.bytes, d.load) for d in t.finished()}
    assert done == {1: (True, 5, False), 2: (False, 0, False), 3: (True, 1, False), 4: (False, 0, False), 5: (True, 7, True)}
    assert "never" not in ran and t.finished() == []
    t.load(6, lambda: None)
    t.load(7, lambda: 1 // 0)
    t.wait([6, 7])
    assert [(d.job, d.ok) for d in t.finished()] == [(6, False), (7, False)]
    t.close()


def test_an_engine_rests_while_something_is_under_way():
    t, gate = Transfers(), threading.Event()

    def seconds(longest):
        began = time.monotonic()
        t.rest(longest)
        return time.monotonic() - began

    assert seconds(60) < 20  # nothing is
    t.load(1, lambda: gate.wait(20) and 1)
    assert seconds(0.2) >= 0.19
    threading.Timer(0.2, gate.set).start()
    assert seconds(60) < 20  # it ends
    assert seconds(60) < 20  # and has not been asked for
    assert [d.job for d in t.finished()] == [1]
    t.close()


def test_lookups_wait_for_tiers_as_long_as_they_may():
    """All calls of a lookup together; the patience with a question is longer by that much, and a question without is as it was."""
    pages, k = Pages({x: EXACT for x in keys(2)}), keys(2)
    store = PageStore(lambda: pages)
    store.lookup([k], 0)
    store.lookup([k], 0, 40.0)
    assert pages.restores[0] == 0 and 30000 < pages.restores[1] <= 40000
    store.lookup([k] * 600, 0, 40.0)
    assert len(pages.restores) == 5 and 40000 >= pages.restores[2] >= pages.restores[3] >= pages.restores[4] > 0
    pages.gate.clear()
    threading.Timer(0.4, pages.gate.set).start()
    lookups = Lookups(Ranks([PageStore(lambda: pages)]), patience=0.05, restore=20.0)
    assert found(lookups, "a", 0, k).kinds == bytes([EXACT] * 2)  # and no miss after 0.05 s
    lookups.close()
    assert restore_seconds({}, 0.5) == 0.5 and restore_seconds({"restore": 3}, 0.5) == 3.0
    for wrong in (-1, 61, "1", True, None, float("nan")):
        with pytest.raises(Refused, match="restore is"):
            restore_seconds({"restore": wrong}, 0.5)


def test_lookups_keep_to_what_one_call_may_ask():
    k = keys(5000)
    pages = Pages({x: EXACT for x in k[:4500]})
    store = PageStore(lambda: pages)
    assert [f.pages for f in store.lookup([k[:2]] * 300, 0)] == [2] * 300
    assert [f.pages for f in store.lookup([k] * 17, 0)] == [4096] * 17  # of a longer request the first pages
    assert pages.calls == [("lookup", 256), ("lookup", 44), ("lookup", 16), ("lookup", 1)]
