"""What workers tell of how prompts will be used, matches that leave the last window to be computed, and why a block is not there."""
import base64
import json
import re
import time

import grpc
import numpy as np
import pytest

import kvd as package
from conftest import BUILD, Rpc, kv, layout
from test_prefix import DIM, KV_HEADS, LAYERS, connect, refused, step, tokens_of
from test_tiers import tiers, until

pytestmark = pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")


def publish(client, tokens):
    """Stores zeros under a prompt's name; how many blocks of it are known."""
    k, v = (client.tensor(LAYERS, len(tokens), KV_HEADS, DIM) for _ in range(2))
    s = client.create()
    s.append(k, v)
    blocks = s.publish_blocks(package.Prompt(tokens)).blocks
    for x in (s, k, v):
        x.free()
    return blocks


def last_key(kvd, namespace="default"):
    return base64.b64decode(json.loads(kvd.kvctl("--json", "prefix", "ls", namespace).stdout)[0]["prefixes"][0]["key"]).hex()


def listed(kvd):
    return [base64.b64decode(p["key"]).hex() for page in json.loads(kvd.kvctl("--json", "prefix", "ls", "default").stdout) for p in page["prefixes"]]


def why(kvd, key, namespace="default"):
    return kvd.kvctl("why", namespace, key).stdout.splitlines()[0].split(",")[0]


def push_out(client, watcher):
    """Publishes prompts until blocks go; the key of the one that went last, as a small index remembers few, and why the watcher heard it went."""
    for i in range(1, 99):
        publish(client, tokens_of(i, 2048))
        events = list(iter(lambda: watcher.next_event(0.1), None))
        gone = [e for e in events if e.kind == "removed"]
        if gone:
            return gone[-1].keys[-1].hex(), gone[-1].miss
    raise AssertionError("there is room for all")


def test_retain_outlives_its_session_and_may_expire(kvd):
    tokens = [tokens_of(i, 640) for i in range(3)]
    prompts = [package.Prompt(t) for t in tokens]
    with connect(kvd) as c:
        for t in tokens:
            assert publish(c, t) == 6
        assert c.hint(prompts[:2], "retain", 60) == [6, 6]
        assert c.hint([package.Prompt(tokens_of(9, 640))], "retain", 60) == [0]
    with connect(kvd) as c:
        kvd.kvctl("evict", "--namespace", "default")
        assert [m.blocks for m in c.match(prompts, lease=0)] == [6, 6, 0]
        assert c.hint(prompts[:1], "retain", 0) == [6]  # no longer
        kvd.kvctl("evict", "--namespace", "default")
        assert [m.blocks for m in c.match(prompts, lease=0)] == [0, 6, 0]
        key = last_key(kvd)
        assert c.hint(prompts[1:2], "retain", 0.3, expire=True) == [6]
        until(lambda: c.match(prompts[1:2], lease=0, quiet=True)[0].miss, "expired")
        assert why(kvd, key) == "expired"
        assert kvd.metric("kvd_prefix_leases") == 0


def test_an_operator_drops_what_is_retained(kvd):
    """One prompt, or all; what he has pinned stays."""
    prompts, keys = [package.Prompt(tokens_of(i, 640)) for i in range(3)], []
    with connect(kvd) as c:
        for i in range(3):
            publish(c, tokens_of(i, 640))
            keys += [k for k in listed(kvd) if k not in keys]
        assert c.hint(prompts, "retain", 600) == [6, 6, 6]
    assert kvd.metric("kvd_prefix_leases") == 3
    kvd.kvctl("prefix", "pin", "default", keys[2], "600")
    assert "dropped 6 blocks" in kvd.kvctl("prefix", "drop", "default", keys[0]).stdout
    assert kvd.metric("kvd_prefix_leases") == 3
    assert "dropped 6 blocks" in kvd.kvctl("prefix", "drop", "default", "--yes").stdout
    assert listed(kvd) == keys[2:] and kvd.metric("kvd_prefix_leases") == 1


def test_drop_of_a_leaf_behind_what_is_retained(kvd):
    """Where an end keeps the window of a cut before it, what is retained is the end, under the key of the cut."""
    tokens = tokens_of(1, 640)
    with connect(kvd) as c:
        k, v = (c.tensor(LAYERS, 640, KV_HEADS, DIM) for _ in range(2))
        s = c.create()
        s.append(k, v)
        s.publish_blocks(package.Prompt(tokens), end=True)
        for x in (s, k, v):
            x.free()
        assert publish(c, tokens_of(2, 640)) == 6
        assert c.hint([package.Prompt(tokens[:512]), package.Prompt(tokens_of(2, 640))], "retain", 600) == [8, 6]
    (key,) = (base64.b64decode(p["key"]).hex() for page in json.loads(kvd.kvctl("--json", "prefix", "ls", "default").stdout)
              for p in page["prefixes"] if int(p["blocks"]) == 10)
    assert "dropped 10" in kvd.kvctl("prefix", "drop", "default", key).stdout
    assert len(listed(kvd)) == 1 and kvd.metric("kvd_prefix_leases") == 1


def test_what_expires_goes_from_tiers_too(start, folder):
    kvd = start(config=f"[kvd]\ntier-host = 64MiB\ntier-directory = {folder}/blocks 1GiB\n")
    tokens = tokens_of(1, 640)
    with connect(kvd) as c:
        assert publish(c, tokens) == 6
        until(lambda: [int(t["blocks"]) for t in tiers(kvd).values()], [6, 6])
        c.hint([package.Prompt(tokens)], "retain", 0.1, expire=True)
        until(lambda: [int(t["blocks"]) for t in tiers(kvd).values()], [0, 0])
        assert c.match([package.Prompt(tokens)], restore=5)[0].blocks == 0
        # So does what an operator drops, and not what he evicts.
        assert publish(c, tokens) == 6
        until(lambda: [int(t["blocks"]) for t in tiers(kvd).values()], [6, 6])
        kvd.kvctl("evict", "--namespace", "default")
        assert c.match([package.Prompt(tokens)], restore=20, lease=0)[0].restored == 6
        kvd.kvctl("prefix", "drop", "default", "--yes")
        until(lambda: [int(t["blocks"]) for t in tiers(kvd).values()], [0, 0])


def test_what_is_demoted_goes_first(start):
    """Of prompts that were used alike, also where the others are older; shared beginnings and what is used again are spared."""
    kvd = start("--pool-size", "8MiB", "--extent-size", "2MiB")
    with connect(kvd) as c:
        tokens = [tokens_of(i, 640) for i in range(4)]
        tokens[3] = np.concatenate([tokens[2][:320], tokens[3][:320]])
        prompts = [package.Prompt(t) for t in tokens]
        for t in tokens:
            publish(c, t)
        assert c.hint(prompts[:1] + prompts[2:3], "demote") == [6, 1]  # five blocks are the other's too
        assert c.hint(prompts[1:2], "demote") == [6]
        assert c.match(prompts[1:2], lease=0)[0].blocks == 6  # used again
        kvd.kvctl("evict", "--namespace", "default", "--bytes", "1")
        m = c.match(prompts, lease=0, quiet=True)
        assert sum(x.blocks for x in m) == 23 and m[1].blocks == 6 and m[3].blocks == 6
        while c.match(prompts[:1], lease=0, quiet=True)[0].blocks + c.match(prompts[2:3], lease=0, quiet=True)[0].blocks > 5:
            kvd.kvctl("evict", "--namespace", "default", "--bytes", "1")
        assert [x.blocks for x in c.match(prompts, lease=0, quiet=True)] == [0, 6, 5, 6]
        assert kvd.metric("kvd_hints_demoted_blocks_total") == 13


def test_priorities(start):
    """Low ones go before normal ones and these before high ones, whatever was used last; and no lower ones for what others go on from."""
    kvd = start("--pool-size", "8MiB", "--extent-size", "2MiB")
    with connect(kvd) as c:
        tokens = [tokens_of(i, 640) for i in range(4)]
        tokens[3] = np.concatenate([tokens[2][:320], tokens[3][:320]])
        prompts = [package.Prompt(t) for t in tokens]
        for t in tokens:
            publish(c, t)
        assert c.hint(prompts[:1], "low") == [6] and c.hint(prompts[1:2], "high") == [6]
        assert c.hint(prompts[2:3], "low") == [1]  # five blocks are the other's too
        c.match(prompts[:1] + prompts[2:3], lease=0)  # used, which does not end it
        order = []
        while sum(have := [m.blocks for m in c.match(prompts, lease=0, quiet=True)]):
            order.append(have)
            kvd.kvctl("evict", "--namespace", "default", "--bytes", "1")
        low = [i for i, have in enumerate(order) if have[0] or have[2] == 6]
        assert len(low) == 7 and all(order[i][1] == 6 and order[i][3] == 6 for i in low)
        assert all(have[1] == 6 for have in order if have[2])  # the normal ones go before any high one
        assert kvd.metric("kvd_hints_classified_blocks_total") == 13
        # What is raised is raised for all of the prompt, and what is normal again goes as others do.
        for t in tokens[2:]:
            publish(c, t)
        assert c.hint(prompts[2:3], "high") == [6] and c.hint(prompts[3:], "normal") == [1]
        assert c.hint(prompts[2:3], "normal") == [1]
        assert c.hint(prompts[3:], "demote") == [1]


def test_priorities_are_a_namespaces_own(start):
    """Who says that all of its blocks are high loses as many as without: what each has decides who gives."""
    kvd = start("--pool-size", "8MiB", "--extent-size", "2MiB")

    def left(high):
        for ns in ("greedy", "quiet"):
            kvd.kvctl("evict", "--namespace", ns, check=False)  # it may have gone, as it was empty
        with connect(kvd, namespace="greedy") as greedy, connect(kvd, namespace="quiet") as quiet:
            for i in range(12):
                publish(greedy, tokens_of(i, 2048))
                if high:
                    greedy.hint([package.Prompt(tokens_of(i, 2048))], "high")
            for i in range(40):
                publish(quiet, tokens_of(100 + i, 2048))
            return tuple(sum(m.blocks for m in c.match([package.Prompt(tokens_of(first + i, 2048)) for i in range(n)], lease=0, quiet=True))
                         for c, first, n in ((greedy, 0, 12), (quiet, 100, 40)))

    with connect(kvd, namespace="greedy") as a, connect(kvd, namespace="quiet") as b:
        publish(a, tokens_of(0, 128)), publish(b, tokens_of(0, 128))
    without, high = left(False), left(True)
    assert abs(without[0] - high[0]) <= 32 and abs(without[1] - high[1]) <= 32, (without, high)


def test_what_is_prefetched_is_there_when_it_is_wanted(start, folder):
    kvd = start(config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\n")
    tokens = tokens_of(1, 1024)
    prompt = package.Prompt(tokens)
    with connect(kvd) as c:
        assert publish(c, tokens) == 12
        until(lambda: int(tiers(kvd)["directory"]["put"]), 12)
        kvd.kvctl("evict", "--namespace", "default")
        assert c.hint([prompt], "prefetch", 60) == [0]
        until(lambda: c.match([prompt], lease=0, quiet=True)[0].blocks, 12)
        until(lambda: kvd.metric("kvd_prefix_leases"), 1)
        kvd.kvctl("evict", "--namespace", "default")
        assert c.match([prompt], lease=0)[0].blocks == 12
        assert c.hint([prompt], "prefetch", 0) == [12]  # there is nothing to do
        c.hint([prompt], "retain", 0)
        kvd.kvctl("evict", "--namespace", "default")
        c.hint([prompt], "prefetch", 0)
    assert kvd.stop() == 0  # amid it


def test_hints_that_are_none(kvd, rpc):
    bad = grpc.StatusCode.INVALID_ARGUMENT
    session = rpc.kv("OpenSession", layout=layout()).session
    keys = kv.PrefixKeys(block_keys=bytes(160), key_bytes=16)
    most = kv.PrefixKeys(block_keys=bytes(16 * 4096), key_bytes=16)
    for wrong in ({}, {"requests": [keys] * 257}, {"requests": [most] * 17}, {"requests": [keys], "ms": 86400001}, {"requests": [keys], "hint": 6},
                  {"requests": [keys], "hint": 1, "ms": 1}, {"requests": [keys], "hint": 5, "ms": 1}, {"requests": [keys], "expire": True}, {"requests": [keys], "hint": 2, "ms": 1, "expire": True},
                  {"requests": [keys, kv.PrefixKeys(key_bytes=1)]}):
        refused(bad, rpc.kv, "HintPrefix", session=session, **wrong)
    refused(grpc.StatusCode.UNAUTHENTICATED, rpc.kv, "HintPrefix", session="1.1.x", requests=[keys])
    assert list(rpc.kv("HintPrefix", session=session, requests=[most] * 16).blocks) == [0] * 16
    with pytest.raises(grpc.RpcError):
        rpc.kv("HintPrefix", session=session, requests=[most] * 16, timeout=0.001)
    assert rpc.admin("Ping", payload=b"x").payload == b"x"


def test_a_match_may_leave_the_last_window(kvd):
    """So that it is computed again: what follows is nearer to what it would be without the cut; an end is as it is."""
    tokens = tokens_of(1, 1400)
    cut, prompt = 960, package.Prompt(tokens[:960])
    rpc = Rpc(kvd.address)
    session = rpc.kv("OpenSession", layout=layout()).session

    def matched(n):
        return rpc.kv("MatchPrefix", session=session, recompute_window=True,
                      requests=[kv.PrefixKeys(tokens=tokens[:64 * n].tobytes())]).matches[0].blocks

    with connect(kvd) as c:
        whole, s = c.create(), c.create()
        step(c, whole, tokens, cut)
        want = step(c, whole, tokens, cut + 64)
        step(c, s, tokens, 1400)
        assert s.publish_blocks(package.Prompt(tokens)).blocks >= 15
        outs = []
        for recompute in (False, True):
            m = c.match([prompt], recompute_window=recompute)[0]
            assert m.blocks == (11 if recompute else 15)
            a = c.adopt(m)
            if recompute:
                step(c, a, tokens, cut)
            outs.append(step(c, a, tokens, cut + 64))
        errors = [float(np.linalg.norm(package.from_bf16(o) - package.from_bf16(want))) for o in outs]
        assert errors[1] < errors[0] / 2, errors
        assert [matched(n) for n in (1, 2, 5, 6)] == [1, 1, 1, 2]  # the sink is bf16 anyway
        s.truncate(1344)
        s.publish_blocks(package.Prompt(tokens), end=True)
        assert matched(21) == 21 and matched(20) == 16
    with connect(kvd, codec="bf16") as c:
        assert publish(c, tokens[:960])
        m = c.match([prompt], recompute_window=True)[0]
        assert m.blocks == c.match([prompt])[0].blocks > 0
    rpc.channel.close()


def test_every_reason_is_told(start):
    """By kvctl why, where a key of kvd's is known, and by matches: never stored, evicted for room, for the quota and by an operator,
    dropped, other extras, another layout. Expired: above. Damaged: test_scrub. For the index: test_prefix.c."""
    kvd = start("--pool-size", "8MiB", "--extent-size", "2MiB", config="[namespace small]\nquota = 2MiB\n")
    with connect(kvd, namespace="small") as c:
        key, reason = push_out(c, c)
        assert why(kvd, key, "small") == reason == "evicted for the quota"
        kvd.kvctl("prefix", "drop", "small", "--yes")
    with connect(kvd) as c:
        assert why(kvd, "0" * 48) == "unknown"
        key, reason = push_out(c, c)
        assert why(kvd, key) == reason == "evicted for room"
        kvd.kvctl("prefix", "drop", "default", "--yes")
        publish(c, tokens_of(0, 640))
        kvd.kvctl("evict", "--namespace", "default")
        assert c.match([package.Prompt(tokens_of(0, 640))])[0].miss == "evicted by an operator"
        publish(c, tokens_of(0, 640))
        assert c.match([package.Prompt(tokens_of(0, 640), extra=b"salt")])[0].miss == "other extra"
        with connect(kvd, codec="int2c") as other:
            assert other.match([package.Prompt(tokens_of(0, 640))])[0].miss == "other layout"
        key = last_key(kvd)
        kvd.kvctl("prefix", "drop", "default", "--yes")
        assert why(kvd, key) == "dropped"


def test_an_operator_says_what_goes_first(start):
    """A prompt's last block names it, and those before it."""
    kvd = start("--pool-size", "8MiB", "--extent-size", "2MiB")
    with connect(kvd) as c:
        prompts, keys = [package.Prompt(tokens_of(i, 640)) for i in range(3)], []
        for i in range(3):
            assert publish(c, tokens_of(i, 640)) == 6
            keys += [k for k in listed(kvd) if k not in keys]
        assert "6 blocks are of priority high" in kvd.kvctl("prefix", "priority", "default", keys[0], "high").stdout
        assert json.loads(kvd.kvctl("--json", "prefix", "priority", "default", keys[2], "low").stdout) == {"blocks": 6}
        assert [re.search(r"priority +(\w+)", kvd.kvctl("prefix", "show", "default", k).stdout)[1] for k in keys] == ["high", "normal", "low"]
        c.match(prompts[2:], lease=0)  # used, which does not end it
        order = []
        while sum(have := [m.blocks for m in c.match(prompts, lease=0, quiet=True)]):
            order.append(have)
            kvd.kvctl("evict", "--namespace", "default", "--bytes", "1")
        assert all(have[1] == 6 for have in order if have[2]) and all(have[0] == 6 for have in order if have[1])
        publish(c, tokens_of(0, 640))
        kvd.kvctl("prefix", "priority", "default", keys[0], "demoted")
        assert "priority   demoted" in kvd.kvctl("prefix", "show", "default", keys[0]).stdout
        c.match(prompts[:1], lease=0)
        assert "priority   normal" in kvd.kvctl("prefix", "show", "default", keys[0]).stdout
        for wrong, why in ((("default", keys[0], "urgent"), "'urgent' is not known; demoted, low, normal and high are"), (("default", keys[1], "low"), "no such block"),
                           (("nobody", keys[0], "low"), "there is no namespace 'nobody'"), (("default", "12", "low"), "is no key of a block")):
            r = kvd.kvctl("prefix", "priority", *wrong, check=False)
            assert r.returncode and why in r.stderr, r.stderr
