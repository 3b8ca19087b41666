"""Watermarks, and quotas that may be exceeded by what can be given back."""
import time

import pytest

import kvd as package
from conftest import BUILD
from test_direct import Raw
from test_hints import publish
from test_prefix import connect, tokens_of
from test_tiers import until

pytestmark = pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
MIB = 1 << 20


def value(kvd, line):
    found = [x for x in kvd.kvctl("metrics").stdout.splitlines() if x.startswith(line + " ")]
    assert found, line
    return float(found[0].split()[-1])


def used(kvd):
    return value(kvd, 'kvd_pool_bytes{state="used"}')


def test_enough_is_free_before_it_is_wanted(start):
    kvd = start("--pool-size", "16MiB", "--extent-size", "2MiB", config="[kvd]\nfree-low = 4MiB\nfree-high = 6MiB\n")
    with connect(kvd) as c:
        for i in range(99):
            publish(c, tokens_of(i, 2048))
            if value(kvd, "kvd_pool_relieved_blocks_total"):
                break
        until(lambda: used(kvd) <= 12 * MIB, True)
        assert used(kvd) > 8 * MIB  # and no more than that goes
        assert value(kvd, "kvd_pool_relieved_bytes_total") >= 1
        assert c.match([package.Prompt(tokens_of(i, 2048))], lease=0)[0].blocks == 28  # the latest is there
        # What workers hold stays, however little is free, and kvd goes on.
        held, k, v = [], c.tensor(2, 8192, 2, 64), c.tensor(2, 8192, 2, 64)
        while used(kvd) < 13 * MIB:
            held.append(c.create())
            held[-1].append(k, v)
        before = used(kvd)
        assert kvd.kvctl("ping").returncode == 0
        until(lambda: used(kvd), before)
        (kvd.folder / "kvd.conf").write_text("[kvd]\n")
        assert "free-low" in kvd.kvctl("reload").stdout


def test_what_is_borrowed_is_given_back(start):
    kvd = start("--pool-size", "32MiB", "--extent-size", "2MiB", config="[namespace a]\nquota = 6MiB\nborrow = yes\n[namespace b]\nquota = 16MiB\n")
    with connect(kvd, namespace="a") as a, connect(kvd, namespace="b") as b:
        borrowed = 'kvd_namespace_borrowed_bytes{namespace="a"}'
        end, i = time.time() + 60, 0
        while value(kvd, borrowed) <= 8 * MIB and time.time() < end:
            for i in range(i, i + 20):
                publish(a, tokens_of(i, 2048))
            i += 1
        assert value(kvd, borrowed) > 8 * MIB
        before = value(kvd, borrowed)
        # What workers hold does not go beyond the quota.
        k, v = a.tensor(2, 16384, 2, 64), a.tensor(2, 16384, 2, 64)
        with pytest.raises(package.ExhaustedError, match="of its quota"):
            held = [a.create() for _ in range(20)]
            for s in held:
                s.append(k, v)
        for s in held:  # extents that have a page of theirs do not go back
            s.free()
        k, v = b.tensor(2, 8192, 2, 64), b.tensor(2, 8192, 2, 64)
        while value(kvd, 'kvd_namespace_used_bytes{namespace="b"}') < 12 * MIB:
            b.create().append(k, v)
        assert value(kvd, borrowed) < before
        (kvd.folder / "kvd.conf").write_text("[namespace a]\nquota = 6MiB\n[namespace b]\nquota = 16MiB\n")
        assert "namespace a: borrow: yes, now no" in kvd.kvctl("reload").stdout


def test_who_stores_fast_keeps_what_is_borrowed(start):
    kvd = start("--pool-size", "32MiB", "--extent-size", "2MiB", config="[namespace a]\nquota = 1MiB\nborrow = yes\n[namespace b]\nquota = 16MiB\n")
    with connect(kvd, namespace="a") as a:
        k, v = a.tensor(2, 2048, 2, 64), a.tensor(2, 2048, 2, 64)
        borrowed = []
        for i in range(400):  # some 0.3 MiB each: three within 50 ms are a quota
            s = a.create()
            s.append(k, v)
            s.publish_blocks(package.Prompt(tokens_of(i, 2048)))
            s.free()
            if i >= 100 and i % 10 == 0:
                borrowed.append(value(kvd, 'kvd_namespace_borrowed_bytes{namespace="a"}') / MIB)
        assert min(borrowed) > 16, borrowed


@pytest.mark.parametrize("tier", ["", "[kvd]\ntier-host = 64MiB\n"])
def test_what_kvd_itself_has_refuses_nobody(start, tier):
    """Two sequences are more than the quota, so that each has to be gone when the next is stored, whether kvd looks at its blocks then, copies them, or not."""
    kvd = start("--pool-size", "32MiB", "--extent-size", "2MiB", config=f"{tier}[namespace a]\nquota = 1MiB\n")
    with connect(kvd, namespace="a") as a:
        k, v = a.tensor(2, 2048, 2, 64), a.tensor(2, 2048, 2, 64)
        for i in range(30):
            s = a.create()
            s.append(k, v)
            s.publish_blocks(package.Prompt(tokens_of(i, 2048)))
            s.free()


def test_an_extent_is_emptied_while_others_go_on(start):
    """Another layout's append waits for it, a piece at a time; whoever gives up waiting leaves nothing, and what is held stays."""
    kvd = start("--pool-size", "24MiB", "--extent-size", "2MiB")
    with connect(kvd, namespace="a") as a:
        held = tokens_of(1000, 2048)
        publish(a, held)
        a.match([package.Prompt(held)], lease=600)
        i = 0
        while value(kvd, 'kvd_pool_bytes{state="free"}') or i < 20:  # until all extents are given out, and some more
            publish(a, tokens_of(i, 2048))
            i += 1
        with connect(kvd, namespace="b", layers=range(8)) as b:
            k, v = b.tensor(8, 320, 2, 64), b.tensor(8, 320, 2, 64)
            others = [b.create() for _ in range(4)]
            for s in others:
                s.append(k, v)
            assert value(kvd, "kvd_room_waits_total") >= 1
            assert value(kvd, "kvd_room_longest_piece_seconds") > 0
            assert [s.length for s in others] == [320] * 4
        assert a.match([package.Prompt(held)], lease=0)[0].blocks == 28


def test_who_maps_parts_waits_for_an_extent_too(start):
    """Sequences with parts of pages are to have whole ones, for which another namespace's blocks go, a piece at a time."""
    kvd, many = start("--pool-size", "16MiB", "--extent-size", "2MiB"), 60
    with connect(kvd, namespace="a") as a:
        i = 0
        while value(kvd, 'kvd_pool_bytes{state="free"}') or i < 8:
            publish(a, tokens_of(i, 2048))
            i += 1
        w = Raw(kvd, "b")
        sequences = [w.sequence(1)[0] for _ in range(many)]
        before, of_a = value(kvd, "kvd_room_waits_total"), value(kvd, 'kvd_namespace_used_bytes{namespace="a"}')
        mapped = w.map(*sequences)
        assert [(s.length, len(s.bf16_pages)) for s in mapped.sequences] == [(1, 1)] * many
        assert len({s.bf16_pages[0] for s in mapped.sequences}) == many
        assert value(kvd, "kvd_room_waits_total") > before
        assert value(kvd, 'kvd_namespace_used_bytes{namespace="a"}') < of_a - MIB
        w.sock.close()
