"""Prompts whose blocks others go on from: two workers compute one prompt once, and what must never be shared is not."""
import base64
import json
import os
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest

import kvd as package
from conftest import BUILD, SOURCE, Rpc, admin, best_of_three, calls, kv, layout
from test_memory import eventually

os.environ.setdefault("KVD_LIBRARY", str(BUILD / "client/libkvd.so.0"))
LAYERS, Q_HEADS, KV_HEADS, DIM = 2, 4, 2, 64


def connect(kvd, **options):
    return package.Client(**{"layers": range(LAYERS), "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "codec": "int2",
                             "address": kvd.address, **options})


def tokens_of(seed, n):
    return np.random.default_rng(seed).integers(0, 50000, n).astype(np.uint32)


def kv_of(tokens, begin, end):
    """K, V and q of positions [begin, end), by the tokens and nothing else, as a model's first layer has them."""
    def rows(salt, heads):
        return np.stack([np.random.default_rng([salt, int(t), begin + i]).standard_normal((LAYERS, heads, DIM), np.float32)
                         for i, t in enumerate(tokens[begin:end])], axis=1)
    return rows(1, KV_HEADS), rows(2, KV_HEADS), rows(3, Q_HEADS)


def step(client, s, tokens, end):
    """Computes the tokens up to `end`; what attention gave for them."""
    k, v, q = kv_of(tokens, s.length, end)
    t = []
    for x in (q, k, v, q):
        t.append(client.tensor(*x.shape))
        t[-1].array[:] = package.to_bf16(x)
    s.step(t[0], t[1], t[2], t[3])
    out = np.array(t[3].array)
    for x in t:
        x.free()
    return out


def never_interrupted(kvd, tokens, cuts):
    with connect(kvd) as c:
        s = c.create()
        return [step(c, s, tokens, n) for n in cuts][-1]


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, kvd as package, test_prefix as t
class Daemon: address = sys.argv[2]
tokens, rest = t.tokens_of(7, 1100), t.tokens_of(8, 60)
with t.connect(Daemon) as c:
    m = c.match([package.Prompt(np.concatenate([tokens, rest]))])[0]
    print(m.blocks, m.end)
    s = c.adopt(m)
    all = np.concatenate([tokens, rest])
    t.step(c, s, all, 1100)
    np.save(sys.argv[3], t.step(c, s, all, 1160))
"""


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_a_second_process_computes_only_the_rest(kvd, folder):
    tokens = tokens_of(7, 1100)
    whole = np.concatenate([tokens, tokens_of(8, 60)])
    with connect(kvd) as c:
        s = c.create()
        step(c, s, tokens, 1088)  # 17 blocks
        assert s.publish_blocks(package.Prompt(tokens), end=True) == package.Published(17, 0, True)
        step(c, s, tokens, 1100)
        want = step(c, s, whole, 1160)
    env = {**os.environ, "PYTHONPATH": f"{SOURCE / 'client/python'}"}
    out = subprocess.run([sys.executable, "-c", CHILD, str(SOURCE / "tests/e2e"), kvd.address, str(folder / "o.npy")],
                         capture_output=True, text=True, timeout=60, env=env)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["17", "True"]
    assert np.array_equal(np.load(folder / "o.npy"), want)  # bit by bit
    text = kvd.kvctl("metrics").stdout
    assert 'kvd_prefix_hit_tokens_total{namespace="default"} 1088' in text
    assert 'kvd_prefix_lookup_tokens_total{namespace="default"} 1152' in text
    assert 'kvd_prefix_adopted_tokens_total{namespace="default"} 1088' in text
    assert kvd.metric("kvd_appended_tokens_total") == 1160 + 72


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_a_cut_elsewhere(kvd):
    """Within the window of an end it is what the sequence would be if it had been truncated there; before that, compressed."""
    tokens, other = tokens_of(1, 1024), tokens_of(2, 300)
    with connect(kvd) as c:
        s = c.create()
        step(c, s, tokens, 1024)
        p = package.Prompt(tokens)
        assert s.publish_blocks(p).blocks == 12  # 1024 - 256 = 768 are history
        assert s.publish_blocks(p, end=True).known == 12
        for blocks, window in ((15, 192), (12, 0), (5, 0)):
            asked = np.concatenate([tokens[:64 * blocks], other])
            m = c.match([package.Prompt(asked)])[0]
            assert (m.blocks, m.window_tokens, m.end, m.miss) == (blocks, window, False, "unknown")
            a = c.adopt(m)
            assert a.length == 64 * blocks
            cut = s.fork()[0]
            cut.truncate(64 * blocks)
            assert np.array_equal(step(c, a, asked, 64 * blocks + 40), step(c, cut, asked, 64 * blocks + 40))
            assert a.describe().planes[0].recent == 40 + window


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_what_is_never_shared(kvd):
    tokens = tokens_of(3, 640)
    p = package.Prompt(tokens)
    with connect(kvd) as c, connect(kvd, namespace="another") as other, connect(kvd, codec="int2c") as layout2:
        s = c.create()
        step(c, s, tokens, 640)
        assert s.publish_blocks(package.Prompt(tokens, extra=[b"salt", b"lora"]), end=True).blocks == 10
        for extra in ((), (b"salt",), (b"lora", b"salt"), (b"saltlora",), (b"salt", b"lor", b"a")):
            m = c.match([package.Prompt(tokens, extra=extra)])[0]
            assert (m.blocks, m.known, m.miss) == (0, 0, "other extra"), extra
        same = package.Prompt(tokens, extra=[b"salt", b"lora"])
        assert [m.blocks for m in c.match([same, p, same])] == [10, 0, 10]
        assert other.match([same])[0].miss == "unknown"
        assert layout2.match([same])[0].miss == "other layout"
        keys = [tokens[64 * i:64 * i + 4].tobytes() for i in range(10)]
        assert c.match([package.Prompt(block_keys=keys, extra=[b"salt", b"lora"])])[0].blocks == 0
        # Keys of the caller's own; the first that differs ends the match, whatever comes after.
        assert s.publish_blocks(package.Prompt(block_keys=keys)).blocks == 6
        assert c.match([package.Prompt(block_keys=keys[:3] + keys[4:])])[0].blocks == 3
        assert c.match([package.Prompt(block_keys=keys[1:])])[0].blocks == 0


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_leases(kvd):
    tokens = tokens_of(4, 640)
    p = package.Prompt(tokens)
    with connect(kvd) as c:
        s = c.create()
        step(c, s, tokens, 640)
        s.publish_blocks(p, end=True)
        s.free()
        kept, short, unwanted = (c.match([p], lease=t)[0] for t in (60, 0.05, 60))
        assert c.match([p], lease=0)[0].lease == 0
        unwanted.release()
        assert kvd.kvctl("evict", "--namespace", "default").stdout.startswith("evicted 0 sequences, 0 blocks")
        time.sleep(0.5)
        with pytest.raises(package.NotFoundError, match="its time may be over"):
            c.adopt(short)
        a = c.adopt(kept)
        assert a.length == 640
        a.free()
        with pytest.raises(package.PreconditionError):
            c.adopt(kept)
        assert "10 blocks" in kvd.kvctl("evict", "--namespace", "default").stdout
        assert (c.match([p])[0].blocks, c.match([p])[0].miss) == (0, "evicted by an operator")
    with connect(kvd) as c:  # leases end with their session
        s = c.create()
        step(c, s, tokens, 640)
        s.publish_blocks(p)
        c.match([p], lease=600)
    end = time.time() + 10
    while kvd.metric("kvd_prefix_leases") or kvd.metric("kvd_sequences"):
        assert time.time() < end
        time.sleep(0.05)
    assert "6 blocks" in kvd.kvctl("evict", "--namespace", "default").stdout


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_eviction_under_pressure(start):
    """Many prompts through a small pool: nothing is refused, the latest are there, and what went says why."""
    kvd = start("--pool-size", "8MiB", "--extent-size", "2MiB")
    with connect(kvd) as c:
        prompts = [tokens_of(100 + i, 1024) for i in range(24)]
        for tokens in prompts:
            s = c.create()
            step(c, s, tokens, 1024)
            s.publish_blocks(package.Prompt(tokens), end=True)
            s.free()
        found = c.match([package.Prompt(t) for t in prompts], lease=0)
        assert found[-1].blocks == 16 and found[-1].end
        gone = [m for m in found if m.blocks < 16]
        assert gone and {m.miss for m in gone} <= {"evicted for room", "none", "unknown"}
        assert "evicted for room" in {m.miss for m in gone}
        assert 'reason="room"} 0' not in kvd.kvctl("metrics").stdout


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_events(kvd):
    tokens = tokens_of(5, 640)
    with connect(kvd) as c, connect(kvd) as watcher, connect(kvd, namespace="another") as other:
        assert watcher.next_event(20).kind == other.next_event(20).kind == "opened"
        s = c.create()
        step(c, s, tokens, 640)
        s.publish_blocks(package.Prompt(tokens))
        s.publish_blocks(package.Prompt(tokens), end=True)
        first, second = watcher.next_event(20), watcher.next_event(20)
        assert (first.kind, len(first.keys), first.parent, first.tokens) == ("stored", 6, None, 64)
        assert (second.kind, len(second.keys), second.parent) == ("stored", 4, first.keys[-1])
        s.free()
        kvd.kvctl("evict", "--namespace", "default")
        gone = watcher.next_event(20)
        assert (gone.kind, gone.miss) == ("removed", "evicted by an operator")
        assert set(gone.keys) == set(first.keys + second.keys)
        assert [e.number - first.number for e in (first, second, gone)] == [0, 1, 2]
        assert other.next_event(0.05) is None
        # Whoever comes later goes on behind the last that it has seen, a session's or an operator's.
        rpc = Rpc(kvd.address)
        session = rpc.kv("OpenSession", layout=layout()).session

        def numbers(after, n):
            stream = rpc.stream("Watch", session=session, after=after)
            got = [next(stream) for _ in range(n)]
            stream.cancel()
            return [(kv.Event.Kind.Name(e.kind), e.number - first.number, e.count) for e in got]

        assert numbers(first.number, 3) == [("OPENED", 0, 0), ("BLOCKS_STORED", 1, 0), ("BLOCKS_REMOVED", 2, 0)]
        assert numbers(gone.number, 1) == [("OPENED", 2, 0)]
        for unknown in (1, gone.number + 9):  # of another life
            assert numbers(unknown, 2) == [("OPENED", 2, 0), ("LOST", 2, 0)]
        lines = kvd.kvctl("events", "default", "--after", str(first.number - 1), "--count", "4").stdout.splitlines()
        assert [line.split()[1] for line in lines] == ["opened", "stored", "stored", "removed"]
        assert f"4 blocks of 64 tokens, to {second.keys[-1].hex()} behind {first.keys[-1].hex()}" in lines[2]
        assert lines[3].endswith("(evicted by an operator)")
        line = json.loads(kvd.kvctl("--json", "events", "default", "--after", str(second.number), "--count", "2").stdout.splitlines()[1])
        assert (line["kind"], line["number"]) == ("BLOCKS_REMOVED", str(gone.number))
        for wrong, code in ((("nobody",), 1), (("default", "--after", "x"), 2)):
            assert kvd.kvctl("events", *wrong, check=False).returncode == code
        # More than are kept: the oldest are lost, and it is told how many.
        s = c.create()
        for i in range(4200):
            s.publish(f"name {i}".replace(" ", "-"), replace=True)
        got = numbers(gone.number, 3)
        assert got[0] == ("OPENED", 2, 0) and got[1][0] == "LOST" and got[1][2] > 100
        assert got[2][1] == 2 + got[1][2] + 1
        rpc.channel.close()


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_kvctl(kvd):
    tokens = tokens_of(6, 640)
    with connect(kvd) as c, connect(kvd) as watcher:
        watcher.next_event(20)
        s = c.create()
        step(c, s, tokens, 640)
        s.publish_blocks(package.Prompt(tokens), end=True)
        key = watcher.next_event(20).keys[-1].hex()
        s.free()
        rows = kvd.kvctl("prefix", "ls", "default").stdout
        assert key in rows and "10 of " in rows and " 640 " in rows
        assert json.loads(kvd.kvctl("--json", "prefix", "ls", "default").stdout)[0]["blocks"] == "10"
        assert "tokens     640" in kvd.kvctl("prefix", "show", "default", key).stdout
        assert kvd.kvctl("why", "default", key).stdout == "present\n"
        assert kvd.kvctl("why", "default", base64.b64encode(bytes.fromhex(key)).decode()).stdout == "present\n"  # as --json has it
        assert kvd.kvctl("why", "default", "0" * 48).stdout.startswith("unknown\nnever published")
        for wrong in ("", "00", "x" * 48, "=" * 32, "A" * 31):
            r = kvd.kvctl("why", "default", wrong, check=False)
            assert r.returncode == 2 and "kvctl why --help" in r.stderr
        assert kvd.kvctl("prefix", "pin", "default", "0" * 48, "60", check=False).returncode == 1
        assert "pinned" in kvd.kvctl("prefix", "pin", "default", key, "60").stdout
        assert "dropped 0 blocks" in kvd.kvctl("prefix", "drop", "default", "--yes").stdout
        assert "no longer" in kvd.kvctl("prefix", "unpin", "default", key).stdout
        assert kvd.kvctl("prefix", "unpin", "default", key, check=False).returncode == 1
        assert "dropped 10 blocks" in kvd.kvctl("prefix", "drop", "default", key).stdout
        assert kvd.kvctl("why", "default", key).stdout.startswith("dropped, 20")
        assert kvd.kvctl("prefix", "show", "default", key, check=False).returncode == 1
        kvd.kvctl("prefix", "drop", "default", "--yes")
        assert "no prefixes" in kvd.kvctl("prefix", "ls", "default").stdout
        kinds = [watcher.next_event(20).kind for _ in range(3)]
        assert sorted(kinds) == ["cleared", "cleared", "removed"]


def refused(code, f, *args, **kw):
    with pytest.raises(grpc.RpcError) as e:
        f(*args, **kw)
    assert e.value.code() == code, e.value
    return e.value.details()


def test_a_malicious_client(kvd, rpc):
    bad, missing = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
    session = rpc.kv("OpenSession", layout=layout()).session
    victim = rpc.kv("OpenSession", layout=layout()).session
    seq = rpc.kv("CreateSequences", session=session, count=1).sequences[0]
    raw = np.zeros((2, 640, 2, 64), np.uint16).tobytes()
    rpc.kv("Append", session=session, items=[kv.AppendItem(sequence=seq, tokens=640, k=kv.TensorRef(inline_data=raw),
                                                           v=kv.TensorRef(inline_data=raw))])
    keys = kv.PrefixKeys(block_keys=bytes(range(160)), key_bytes=16)

    def publish(k, s=session, q=seq):
        return rpc.kv("PublishBlocks", session=s, items=[kv.PublishItem(sequence=q, keys=k)])

    assert publish(keys).items[0].blocks == 6
    for wrong in (kv.PrefixKeys(block_keys=b"x" * 160, key_bytes=15), kv.PrefixKeys(block_keys=b"x" * 160, key_bytes=41),
                  kv.PrefixKeys(block_keys=b"x" * 161, key_bytes=16), kv.PrefixKeys(block_keys=b"x" * 160, key_bytes=0),
                  kv.PrefixKeys(key_bytes=1 << 31), kv.PrefixKeys(tokens=b"x" * 5), kv.PrefixKeys(tokens=b"x" * 4, block_keys=b"x" * 16, key_bytes=16),
                  kv.PrefixKeys(block_keys=b"x" * 16 * 4097, key_bytes=16), kv.PrefixKeys(tokens=bytes(4 * 64 * 4097)),
                  kv.PrefixKeys(block_keys=b"x" * 16, key_bytes=16, extra=[b"x"] * 17),
                  kv.PrefixKeys(block_keys=b"x" * 16, key_bytes=16, extra=[b"x" * 1025])):
        refused(bad, publish, wrong)
        refused(bad, rpc.kv, "MatchPrefix", session=session, requests=[keys, wrong])
    refused(bad, publish, None)
    refused(bad, rpc.kv, "MatchPrefix", session=session)
    refused(bad, rpc.kv, "MatchPrefix", session=session, requests=[keys] * 257)
    refused(bad, rpc.kv, "MatchPrefix", session=session, requests=[keys], lease_ms=600001)
    most = kv.PrefixKeys(block_keys=b"x" * 16 * 4096, key_bytes=16)
    refused(bad, rpc.kv, "MatchPrefix", session=session, requests=[most] * 17)
    assert len(rpc.kv("MatchPrefix", session=session, requests=[most] * 16).matches) == 16
    refused(bad, rpc.kv, "AdoptPrefix", session=session)
    refused(bad, rpc.kv, "AdoptPrefix", session=session, items=[kv.AdoptItem()] * 17)
    empty = kv.PrefixKeys(block_keys=keys.block_keys, key_bytes=16, extra=[b""])  # is some, and none of its bytes are read
    assert [m.blocks for m in rpc.kv("MatchPrefix", session=session, requests=[keys, empty]).matches] == [6, 0]
    refused(missing, publish, keys, s=victim)
    refused(missing, publish, keys, q=seq + 1)
    # Leases of others are nobody's.
    lease = rpc.kv("MatchPrefix", session=victim, requests=[keys], lease_ms=60000).matches[0].lease
    assert lease
    for other in (lease, lease + 1, 0, (1 << 64) - 1):
        refused(missing, rpc.kv, "AdoptPrefix", session=session, items=[kv.AdoptItem(lease=other)])
    assert rpc.kv("ReleasePrefix", session=session, leases=[lease, 0, 5]).released == 0
    refused(grpc.StatusCode.FAILED_PRECONDITION, rpc.kv, "AdoptPrefix", session=victim, items=[kv.AdoptItem(lease=lease, blocks=7)])
    # All or none: one of the items is not there.
    before = kvd.metric("kvd_sequences")
    refused(missing, rpc.kv, "AdoptPrefix", session=victim, items=[kv.AdoptItem(lease=lease), kv.AdoptItem(lease=lease + 7)])
    assert kvd.metric("kvd_sequences") == before
    got = rpc.kv("AdoptPrefix", session=victim, request_id=9, items=[kv.AdoptItem(lease=lease, blocks=2, keep=True)])
    again = rpc.kv("AdoptPrefix", session=victim, request_id=9, items=[kv.AdoptItem(lease=lease, blocks=2, keep=True)])
    assert got == again and list(got.lengths) == [128]
    # More leases than one may have.
    many = rpc.kv("MatchPrefix", session=session, requests=[keys] * 256, lease_ms=60000)
    refusals = 0
    for _ in range(40):
        try:
            rpc.kv("MatchPrefix", session=session, requests=[keys] * 256, lease_ms=60000)
        except grpc.RpcError as e:
            assert e.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            refusals += 1
    assert refusals and len(many.matches) == 256
    assert kvd.metric("kvd_prefix_leases") <= 8193


def test_callers_that_go_away(kvd, rpc):
    """Calls that are given up in the middle leave no lease behind, and others are served meanwhile."""
    session = rpc.kv("OpenSession", layout=layout()).session
    seq = rpc.kv("CreateSequences", session=session, count=1).sequences[0]
    raw = np.zeros((2, 640, 2, 64), np.uint16).tobytes()
    rpc.kv("Append", session=session, items=[kv.AppendItem(sequence=seq, tokens=640, k=kv.TensorRef(inline_data=raw),
                                                           v=kv.TensorRef(inline_data=raw))])
    first = b"k" * 16 * 6
    rpc.kv("PublishBlocks", session=session, items=[kv.PublishItem(sequence=seq, keys=kv.PrefixKeys(block_keys=first, key_bytes=16))])
    long = kv.PrefixKeys(block_keys=first + os.urandom(16 * 4000), key_bytes=16)
    stop, slowest = threading.Event(), [0.0]

    def ping():
        own = Rpc(kvd.address)
        while not stop.is_set():
            begin = time.time()
            own.admin("Ping")
            slowest[0] = max(slowest[0], time.time() - begin)
        own.channel.close()

    t = threading.Thread(target=ping)
    t.start()
    for i in range(40):
        own = Rpc(kvd.address)
        try:
            own.kv("MatchPrefix", session=session, requests=[long] * 16, lease_ms=600000, timeout=0.001 + 0.001 * (i % 8))
        except grpc.RpcError:
            pass
        own.channel.close()
    leases = sum(m.lease > 0 for m in rpc.kv("MatchPrefix", session=session, requests=[long] * 16, lease_ms=600000).matches)
    stop.set()
    t.join()
    assert leases == 16
    assert slowest[0] < 10
    rpc.kv("CloseSession", session=session)
    assert kvd.metric("kvd_prefix_leases") == 0


SMALL = layout(layers=[0], q_heads=1, kv_heads=1, windows=kv.Windows())
DEEP = 4096  # blocks of the longest prompt


def deep(rpc, session, leaves, depth=DEEP):
    """Prompts of so many blocks that differ in the last of them; their sequences are gone. The keys of one."""
    seq = rpc.kv("CreateSequences", session=session, count=1).sequences[0]
    base, end = os.urandom(16 * (depth - 1)), 64 * (depth - 1)

    def append(to, at, n):
        zeros = kv.TensorRef(inline_data=bytes(128 * n))
        rpc.kv("Append", session=session, items=[kv.AppendItem(sequence=to, position=at, tokens=n, k=zeros, v=zeros)])

    for at in range(0, end, 8192):
        append(seq, at, min(8192, end - at))
    for _ in range(leaves):
        fork = rpc.kv("ForkSequence", session=session, sequence=seq).sequences[0]
        append(fork, end, 64)
        keys = kv.PrefixKeys(block_keys=base + os.urandom(16), key_bytes=16)
        assert rpc.kv("PublishBlocks", session=session, items=[kv.PublishItem(sequence=fork, keys=keys)]).items[0].blocks == depth
        rpc.kv("FreeSequences", session=session, sequences=[fork])
    rpc.kv("FreeSequences", session=session, sequences=[seq])
    return keys


def pings_beside(kvd, call, seconds=1.5, threads=2):
    """Milliseconds that others' pings take while some threads make a call again and again: the median and the longest."""
    over, failed, ms = threading.Event(), [], []

    def run():
        with calls(kvd) as rpc:
            try:
                while not over.is_set():
                    call(rpc)
            except grpc.RpcError as e:
                failed.append(e)

    them = [threading.Thread(target=run) for _ in range(threads)]
    with calls(kvd) as rpc:
        rpc.admin("Ping")
        for t in them:
            t.start()
        end = time.time() + seconds
        while time.time() < end:
            began = time.perf_counter()
            rpc.admin("Ping")
            ms.append(1000 * (time.perf_counter() - began))
            time.sleep(0.002)
    over.set()
    for t in them:
        t.join()
    assert not failed, failed
    ms.sort()
    return ms[len(ms) // 2], ms[-1]


def test_listing_long_prompts_holds_up_nobody(kvd, rpc):
    """Finding one of 256 rows goes through the 4,096 blocks before it."""
    session = rpc.kv("OpenSession", layout=SMALL).session
    deep(rpc, session, 256)
    ask = lambda r: r.admin("ListPrefixes", namespace_name="default")
    all_of_them = ask(rpc)
    assert len(all_of_them.prefixes) == 256 and {p.blocks for p in all_of_them.prefixes} == {DEEP} and all_of_them.blocks == DEEP + 255

    def beside_them():
        median, _ = pings_beside(kvd, ask)
        assert median < 10

    best_of_three(beside_them)
    with pytest.raises(grpc.RpcError) as e:  # those who go away leave nothing
        rpc.call("kvd.v1.Admin", "ListPrefixes", admin.ListPrefixesRequest(namespace_name="default"), admin.ListPrefixesReply, timeout=0.005)
    assert e.value.code().name == "DEADLINE_EXCEEDED"


def test_what_expires_at_once_goes_in_pieces(start):
    """So others see some of it gone and some of it there."""
    kvd = start("--pool-size", "1GiB")
    rpc = Rpc(kvd.address)
    session = rpc.kv("OpenSession", layout=SMALL).session

    def between():
        prompts = [deep(rpc, session, 1) for _ in range(5)]
        first = [kv.PrefixKeys(block_keys=p.block_keys[:16], key_bytes=16) for p in prompts]
        hint = kv.HintPrefixRequest.Hint.Value("RETAIN")
        assert list(rpc.kv("HintPrefix", session=session, requests=prompts, hint=hint, ms=300, expire=True).blocks) == [DEEP] * 5
        seen, end = set(), time.time() + 20
        while 0 not in seen:
            assert time.time() < end
            seen.add(sum(m.known for m in rpc.kv("MatchPrefix", session=session, requests=first, quiet=True).matches))
        assert seen - {0, 5}, seen

    best_of_three(between)
    rpc.channel.close()


def test_many_are_adopted_one_after_the_other(kvd, rpc):
    """So others have their turn meanwhile; and all of them or none, whatever comes between."""
    session = rpc.kv("OpenSession", layout=SMALL).session
    prompt = deep(rpc, session, 1)
    lease = rpc.kv("MatchPrefix", session=session, requests=[prompt], lease_ms=600000).matches[0].lease
    items = [kv.AdoptItem(lease=lease, keep=True) for _ in range(16)]
    sequences = lambda: rpc.admin("GetStatus").sequences
    free = lambda ids: rpc.kv("FreeSequences", session=session, sequences=ids)
    adopt = rpc.channel.unary_unary("/kvd.v1.KvCache/AdoptPrefix", request_serializer=lambda m: m.SerializeToString(),
                                    response_deserializer=kv.AdoptPrefixReply.FromString)
    assert sequences() == 0

    def between():
        made = [adopt.future(kv.AdoptPrefixRequest(session=session, items=items), timeout=20) for _ in range(12)]
        seen = set()
        while not all(c.done() for c in made):
            seen.add(sequences())
        assert sequences() == 12 * 16
        for c in made:
            free(c.result().sequences)
        assert any(n % 16 for n in seen), seen

    best_of_three(between)
    # One call of a request id makes them, however often it is sent at once.
    for request in range(100, 105):
        twice = [adopt.future(kv.AdoptPrefixRequest(session=session, items=items, request_id=request), timeout=20) for _ in range(4)]
        (made,) = {tuple(c.result().sequences) for c in twice}
        assert sequences() == 16 == len(rpc.kv("DescribeSequences", session=session).sequences)
        free(made)
    # The last item is wrong, or the caller goes: nothing stays.
    wrong = [*items[:15], kv.AdoptItem(lease=lease + 1)]
    assert refused(grpc.StatusCode.NOT_FOUND, rpc.kv, "AdoptPrefix", session=session, items=wrong)
    assert sequences() == 0
    for ms in range(1, 12):
        try:
            free(adopt(kv.AdoptPrefixRequest(session=session, items=items), timeout=ms / 1000).sequences)
        except grpc.RpcError as e:
            assert e.code() == grpc.StatusCode.DEADLINE_EXCEEDED

    def nothing_stays():  # kvd may hear later than its caller that a call is over; of replies that came too late all are held
        held = [i.sequence for i in rpc.kv("DescribeSequences", session=session).sequences]
        if held:
            free(held)
        return sequences() == 0

    eventually(nothing_stays)
    # The session ends meanwhile.
    late = adopt.future(kv.AdoptPrefixRequest(session=session, items=items), timeout=20)
    rpc.kv("CloseSession", session=session)
    late.exception()
    assert sequences() == 0
    kvd.kvctl("verify")
