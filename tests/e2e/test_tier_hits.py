"""Blocks that come back from tiers: the same bits as were stored, over restarts, on another kvd, and nothing wrong or stuck
whatever happens to the tier."""
import concurrent.futures
import json
import os
import socket
import subprocess
import threading
import time

import grpc
import numpy as np
import pytest

import kvd as package
import test_pages as pages
from conftest import Daemon, Rpc, kv, layout
from test_keep import kill
from test_prefix import connect, step, tokens_of
from test_tiers import SERVERS, needs_libkvd, publish, serve, server, tiers, until  # noqa: F401

pytestmark = needs_libkvd
LAYOUTS = {  # as connect() and OpenSession say it
    "int2": ({}, {}), "int2c": ({}, {}), "int4": ({}, {}), "turboquant-3": ({}, {}), "bf16": ({}, {}), "k=int2-lm,v=int2": ({}, {}),
    "windows": ({"windows": [0, 512]}, {"layers": [], "planes": [kv.Plane(layers=[0], q_heads=4, kv_heads=2, head_dim_k=64, head_dim_v=64),
                                                                kv.Plane(layers=[1], q_heads=4, kv_heads=2, head_dim_k=64, head_dim_v=64, window=512)]}),
}


def match(kvd, tokens, restore=20.0, timeout=30, like="int2", namespace=""):
    """MatchPrefix of one prompt, and the names of the tiers."""
    rpc = Rpc(kvd.address)
    codec = "int2" if like == "windows" else like
    try:
        session = rpc.kv("OpenSession", namespace_name=namespace, layout=layout(codec=codec, **LAYOUTS[like][1])).session
        r = rpc.kv("MatchPrefix", timeout=timeout, session=session, requests=[kv.PrefixKeys(tokens=tokens.tobytes())],
                   restore_ms=int(restore * 1000), tiers=True)
        rpc.kv("CloseSession", session=session)
        return r.matches[0], list(r.tiers)
    finally:
        rpc.channel.close()


def go_on(client, tokens, blocks):
    """What attention gives for the 40 tokens after the first blocks, all of which are found."""
    m = client.match([package.Prompt(tokens[:64 * blocks])])[0]
    assert m.blocks == blocks
    s = client.adopt(m)
    out = step(client, s, tokens, 64 * blocks + 40)
    s.free()
    return out


def put(kvd, n, *names):
    until(lambda: [int(tiers(kvd)[name]["put"]) for name in names], [n] * len(names))


def evict(kvd):
    kvd.kvctl("evict", "--namespace", "default")


@pytest.mark.parametrize("like", LAYOUTS)
def test_the_same_bits_come_back(start, folder, server, like):  # noqa: F811
    """From each tier alone and from the nearest of all, in every codec, and with a plane that sees a window only."""
    kvd = start(config=f"[kvd]\ntier-host = 64MiB\ntier-directory = {folder}/blocks 1GiB\ntier-redis = unix:{server[1]}\n")
    tokens, options = tokens_of(1, 1024), dict(LAYOUTS[like][0], codec="int2" if like == "windows" else like)
    with connect(kvd, **options) as c:
        # A plane with a window has at no time all blocks that it will have had.
        assert publish(c, tokens, *((640, 832) if like == "windows" else ())) == 12
        want = go_on(c, tokens, 12)
        until(lambda: kvd.metric("kvd_demotion_waiting_blocks"), 0)
        until(lambda: len({t["put"] for t in tiers(kvd).values()}) == 1 and int(tiers(kvd)["redis"]["put"]) >= 12, True)
        for tier in range(3):
            evict(kvd)
            for nearer in ("host", "directory")[:tier]:
                kvd.kvctl("tier", "flush", nearer)
            m, names = match(kvd, tokens, restore=0, like=like)
            assert names == ["host", "directory", "redis"]
            assert (m.blocks, m.restored) == (0, 0)
            assert list(m.behind) == [12 * (i == tier) for i in range(3)], tier
            m, _ = match(kvd, tokens, like=like)
            assert (m.blocks, m.restored, list(m.behind)) == (12, 12, [12 * (i == tier) for i in range(3)])
            assert np.array_equal(go_on(c, tokens, 12), want)
            assert (match(kvd, tokens, like=like)[0].restored) == 0
            # Those in front got it too.
            evict(kvd)
            until(lambda: list(match(kvd, tokens, restore=0, like=like)[0].behind), [12, 0, 0])


def test_hits_survive_restarts_and_are_seen_elsewhere(start, folder, server, tmp_path):  # noqa: F811
    """A directory's and a server's: after SIGKILL, and by a second kvd that runs beside. Other namespaces see nothing."""
    config = f"[kvd]\ntier-directory = {folder}/blocks 1GiB\ntier-redis = unix:{server[1]}\n"
    kvd, tokens = start(config=config), tokens_of(1, 1024)
    with connect(kvd) as c:
        assert publish(c, tokens) == 12
        want = go_on(c, tokens, 12)
        put(kvd, 12, "directory", "redis")
        for tier in ("directory", "redis"):
            key, value = next((x for x in (("directory", f"{folder}/blocks 1GiB"), ("redis", f"unix:{server[1]}")) if x[0] == tier))
            (tmp_path / tier).mkdir()
            second = Daemon(tmp_path / tier, config=f"[kvd]\ntier-{key} = {value}\n")
            try:
                assert match(second, tokens[:640], restore=0)[0].behind == [10]
                assert match(second, tokens, namespace="another")[0].behind == [0]
                assert match(second, tokens)[0].restored == 12
                with connect(second) as other:
                    assert np.array_equal(go_on(other, tokens, 12), want)
            finally:
                assert second.stop() == 0
    kvd.stop(9)
    kvd.start()
    with connect(kvd) as c:
        assert match(kvd, tokens)[0].restored == 12
        assert np.array_equal(go_on(c, tokens, 12), want)
        assert 'kvd_prefix_restored_tokens_total{namespace="default"} 768' in kvd.kvctl("metrics").stdout


def test_what_a_tier_has_is_not_sent_again_by_the_next_kvd(start, folder):
    """With keep, blocks of the kvd before are asked for first, and only those that no tier has are copied."""
    keeper, tokens = start("--keep", "--backend", "cpu", config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\n"), tokens_of(1, 1024)
    with connect(keeper) as c:
        assert publish(c, tokens) == 12
        put(keeper, 12, "directory")
    lost = block_files(folder)[3]
    lost.unlink()
    kill(keeper)
    until(lambda: keeper.metric("kvd_demotion_known_blocks_total"), 11)
    until(lambda: keeper.metric("kvd_demotion_waiting_blocks"), 0)
    put(keeper, 1, "directory")
    assert lost.exists()


def block_files(folder):
    return sorted(p for p in (folder / "blocks").rglob("*") if p.is_file() and p.stat().st_size >= 4096)


def test_damaged_files_are_misses(start, folder):
    """A flipped bit and a torn file: noticed, dropped and counted; what is before them is used, and nothing wrong ever."""
    kvd, tokens = start(config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\n"), tokens_of(1, 1024)
    with connect(kvd) as c:
        assert publish(c, tokens) == 12
        want = go_on(c, tokens, 12)
        put(kvd, 12, "directory")
        files = block_files(folder)
        assert len(files) == 12
        flipped, torn = files[3], files[8]
        with open(flipped, "r+b") as f:
            f.seek(6000)
            byte = f.read(1)
            f.seek(6000)
            f.write(bytes([byte[0] ^ 4]))
        os.truncate(torn, 5000)
        blocks = []
        for _ in range(3):
            evict(kvd)
            m, _ = match(kvd, tokens)
            assert m.restored == m.blocks < 12
            blocks.append(m.blocks)
        assert blocks[0] <= blocks[1] == blocks[2]
        assert int(tiers(kvd)["directory"]["damaged"]) == 2
        assert kvd.metric("kvd_restore_missed_blocks_total") >= 1
        # Computed anew it is whole again.
        assert publish(c, tokens) == 12
        put(kvd, 24 - blocks[2], "directory")
        evict(kvd)
        assert match(kvd, tokens)[0].restored == 12
        assert np.array_equal(go_on(c, tokens, 12), want)


def test_a_full_disk_is_noticed(start, folder):
    """No file may grow beyond 8 KiB, which is what a full disk looks like to kvd."""
    kvd = start(config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\n")
    tokens = tokens_of(1, 1024)
    with connect(kvd) as c:
        s = c.create()
        step(c, s, tokens, 1024)
        subprocess.run(["prlimit", "--pid", str(kvd.process.pid), "--fsize=8192"], check=True)
        s.publish_blocks(package.Prompt(tokens))
        s.free()
        until(lambda: tiers(kvd)["directory"]["state"], "full")
        assert not block_files(folder)
        m, _ = match(kvd, tokens)
        assert (m.blocks, m.restored) == (12, 0)
        evict(kvd)
        assert match(kvd, tokens)[0].blocks == 0


def test_one_brings_back_what_several_want(start, folder):
    kvd, tokens = start(config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\n"), tokens_of(1, 2048)
    with connect(kvd) as c:
        assert publish(c, tokens) == 28
        put(kvd, 28, "directory")
        evict(kvd)
        got = []
        threads = [threading.Thread(target=lambda: got.append(match(kvd, tokens)[0])) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert {m.blocks for m in got} == {28}
        assert sum(m.restored for m in got) == 28
        assert int(tiers(kvd)["directory"]["hits"]) == 28


def test_a_tier_that_hangs_holds_up_nobody(start, folder, server):  # noqa: F811
    """Callers have their answers in time, those who give up leave nothing behind, others do not notice."""
    process, path = server
    kvd, tokens = start(config=f"[kvd]\ntier-redis = unix:{path}\ntier-timeout = 15s\n"), tokens_of(1, 1024)
    with connect(kvd) as c:
        publish(c, tokens)
        put(kvd, 12, "redis")
        evict(kvd)
        os.kill(process.pid, 19)
        try:
            began = time.time()
            m, _ = match(kvd, tokens, restore=0.3)
            assert (m.blocks, m.restored) == (0, 0) and time.time() - began < 12
            rpc, began = Rpc(kvd.address), time.time()  # the time is the call's, however many prompts it has
            rpc.kv("MatchPrefix", session=rpc.kv("OpenSession", layout=layout()).session, restore_ms=500,
                   requests=[kv.PrefixKeys(tokens=tokens.tobytes(), extra=[bytes([i])]) for i in range(30)])
            rpc.channel.close()
            assert time.time() - began < 12
            with pytest.raises(grpc.RpcError) as e:
                match(kvd, tokens, timeout=0.3)
            assert e.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            began = time.time()
            step(c, c.create(), tokens, 300)
            assert time.time() - began < 12
            until(lambda: kvd.metric("kvd_restores_running"), 0, 40)
        finally:
            os.kill(process.pid, 18)
        until(lambda: match(kvd, tokens)[0].blocks, 12)


def test_a_server_that_is_killed_amid_traffic(start, folder):
    """Killed and started again and again while prompts come and go: what is found is right, and all calls end."""
    if not SERVERS:
        pytest.skip("neither valkey-server nor redis-server is installed")
    kvd = start(config=f"[kvd]\ntier-redis = unix:{folder}/redis.sock\ntier-timeout = 500ms\n")
    prompts = [tokens_of(i, 640) for i in range(2)]
    with connect(kvd) as c:
        want = []
        for p in prompts:
            assert publish(c, p) == 6
            want.append(go_on(c, p, 6))
        def go_round(p, result):
            evict(kvd)
            m, _ = match(kvd, p, restore=1.0)
            if m.blocks < 6:
                publish(c, p)
            assert np.array_equal(go_on(c, p, 6), result)
            return m.restored

        end, process = time.time() + 2, None
        try:
            while time.time() < end:
                process = serve(folder)[0]
                for i in (0, 1, 0):
                    go_round(prompts[i], want[i])
                process.kill()
                process.wait()
                go_round(prompts[1], want[1])
            process = serve(folder)[0]
            until(lambda: go_round(prompts[0], want[0]), 6, timeout=60)
        finally:
            process.kill()
            process.wait()
        until(lambda: kvd.metric("kvd_restores_running"), 0)


def test_in_python(start, folder):
    """The same by Client.match, and one worker that waits for another."""
    kvd, tokens = start(config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\n"), tokens_of(1, 1024)
    prompt = package.Prompt(tokens)
    with connect(kvd) as c, connect(kvd) as other:
        assert publish(c, tokens) == 12
        put(kvd, 12, "directory")
        evict(kvd)
        m = c.match([prompt], tiers=True)[0]
        assert (m.blocks, m.restored, m.behind) == (0, 0, {"directory": 12})
        m = c.match([prompt], restore=20)[0]
        assert (m.blocks, m.restored, m.behind) == (12, 12, {"directory": 12})
        assert c.adopt(m).length == 768
        tokens = tokens_of(2, 640)
        assert c.match([package.Prompt(tokens)], wait=30)[0].blocks == 0
        got = []
        waits = threading.Thread(target=lambda: got.append(other.match([package.Prompt(tokens)], wait=30)[0]))
        waits.start()
        until(lambda: kvd.metric("kvd_prefix_waits_total"), 1)
        s = c.create()
        step(c, s, tokens, 640)
        s.publish_blocks(package.Prompt(tokens), end=True)
        waits.join()
        assert got[0].blocks == 10 and got[0].end
        for wrong in ({"restore": 601}, {"wait": -1}, {"lease": 1e9}):
            with pytest.raises(package.InvalidError):
                c.match([prompt], **wrong)


def test_what_is_refused(start, folder):
    kvd = start(config="[kvd]\ntier-host = 64MiB\n")
    with pytest.raises(grpc.RpcError) as e:
        match(kvd, tokens_of(1, 64), restore=601)
    assert e.value.code() == grpc.StatusCode.INVALID_ARGUMENT and "restore_ms" in e.value.details()
    m, names = match(kvd, tokens_of(1, 640))
    assert (m.blocks, list(m.behind), names) == (0, [0], ["host"])


def test_engines_find_what_tiers_have(start, folder):
    """As connectors ask, which say how long a lookup may wait for that: without, it is a miss."""
    from kvd.engines import Lookups, PageStore, Ranks

    kvd, keys = start(config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\n"), pages.keys_of("tiers", 12)
    source = pages.Engine(48)
    source.write(range(48), pages.kv(1, 12))
    store = PageStore(lambda: pages.connect(kvd))
    store.put(keys, source.paged(range(48)), None, bytes(12))
    until(lambda: int(tiers(kvd)["directory"]["put"]), 12)
    evict(kvd)
    assert store.lookup([keys], 1)[0].pages == 0
    lookups = Lookups(Ranks([store]), restore=20.0)
    until(lambda: getattr(lookups.find("a request", 0, keys), "kinds", b""), bytes([1]) * 12)
    lookups.close()
    assert kvd.metric('kvd_pages_restored_total{namespace="default"}') == 12
    store.close()


def test_pages_come_back(start, folder, tmp_path):
    """Pages of an engine, exact and encoded, each for itself: a damaged one is a miss, and those behind it are not."""
    config = f"[kvd]\ntier-host = 64MiB\ntier-directory = {folder}/blocks 1GiB\n"
    kvd, keys, given = start(config=config), pages.keys_of("tiers", 12), pages.kv(1, 12)
    source, target = pages.Engine(48), pages.Engine(48)
    source.write(range(48), given)
    with pages.connect(kvd) as p:
        kinds = p.put(keys, source.paged(range(48)), exact=[i % 3 == 0 for i in range(12)])
        until(lambda: int(tiers(kvd)["directory"]["put"]), 12)
        p.get(keys, target.paged(range(48)))
        want = target.read(range(48))
        evict(kvd)
        kvd.kvctl("tier", "flush", "host")
        found = p.lookup([keys, keys[3:5]], tiers=True)
        assert [(f.pages, f.restored, f.behind) for f in found] == [(0, 0, {"directory": 12}), (0, 0, {"directory": 2})]
        found = p.lookup([keys[4:6], keys], restore_ms=20000)
        assert [(f.pages, f.restored, f.behind) for f in found] == [(2, 2, {"directory": 2}), (12, 12 - 2, {"directory": 10})]
        assert found[1].kinds == kinds
        p.release([f.lease for f in found])
        assert p.lookup([keys], restore_ms=20000, lease_ms=0)[0].restored == 0
        p.get(keys, target.paged(range(48)))
        assert np.array_equal(target.read(range(48)), want)
        assert 'kvd_pages_restored_total{namespace="default"} 12' in kvd.kvctl("metrics").stdout
        evict(kvd)
        kvd.kvctl("tier", "flush", "host")
        os.truncate(block_files(folder)[4], 5000)
        f = p.lookup([keys], restore_ms=20000)[0]
        lost = f.kinds.index(0)
        assert f.restored == 11 and f.pages == lost and f.kinds == kinds[:lost] + b"\0" + kinds[lost + 1:]
    (tmp_path / "second").mkdir()
    second = Daemon(tmp_path / "second", config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\n")
    try:
        with pages.connect(second) as p, pages.connect(second, space=b"another") as other:
            assert p.lookup([keys], restore_ms=20000)[0].restored == 11
            assert other.lookup([keys], restore_ms=20000)[0].restored == 0
    finally:
        assert second.stop() == 0


def test_blocks_that_lie_side_by_side_are_copied_at_once(start):
    """To the tier, and on a GPU, for which the tier's memory is pinned by the chunk, back."""
    kvd, n = start(config="[kvd]\ntier-host = 64MiB\n"), 256
    keys, given = pages.keys_of("side by side", n), pages.kv(1, 64)
    source, target = pages.Engine(256), pages.Engine(4 * n)
    source.write(range(256), given)
    with pages.connect(kvd) as p:
        for i in range(0, n, 64):
            p.put(keys[i:i + 64], source.paged(range(256)))
        until(lambda: int(tiers(kvd)["host"]["put"]), n)
        p.get(keys, target.paged(range(4 * n)))
        want = target.read(range(4 * n))
        assert kvd.metric("kvd_demoted_blocks_total") == n
        assert kvd.metric("kvd_demotion_waits_total") < n / 4
        evict(kvd)
        assert p.lookup([keys], restore_ms=20000)[0].restored == n
        copies = kvd.metric("kvd_restore_copies_total")
        assert copies < n / 4 if kvd.on_gpu() else copies == n
        p.get(keys, target.paged(range(4 * n)))
        assert np.array_equal(target.read(range(4 * n)), want)


def test_pages_come_back_in_parts(start):
    """The first ones are copied while others are looked for; those of a part are behind those of the one before, so the last go first."""
    kvd, n = start(config="[kvd]\ntier-host = 64MiB\nscrub-rate = 0\n"), 256
    keys, source = pages.keys_of("parts", n), pages.Engine(256)
    source.write(range(256), pages.kv(1, 64))
    with pages.connect(kvd) as p:
        for i in range(0, n, 64):
            p.put(keys[i:i + 64], source.paged(range(256)), after=keys[i - 1] if i else None)
        until(lambda: int(tiers(kvd)["host"]["put"]), n)
        evict(kvd)
        assert [f.restored for f in p.lookup([keys[:1], keys, keys[3:9]], restore_ms=20000, lease_ms=0)] == [1, n - 1, 0]
        assert kvd.metric("kvd_restore_seconds_count") == 1 + 3  # one page; 64, 128 and 64
        assert kvd.metric("kvd_restores_running") == 0
        for _ in range(9):
            kvd.kvctl("evict", "--namespace", "default", "--bytes", "1")
        found = p.lookup([keys], lease_ms=0, quiet=True)[0]
        assert found.pages == n - 9 and found.kinds == bytes([1] * (n - 9) + [0] * 9)


class Late:
    """In front of a server: what it says comes so many seconds later."""

    def __init__(self, path, server, seconds):
        self.path, self.server, self.seconds, self.ends = path, str(server), seconds, []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client = self.listener.accept()[0]
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self.server)
            self.ends += [client, server]
            threading.Thread(target=self.relay, args=(client, server, 0), daemon=True).start()
            threading.Thread(target=self.relay, args=(server, client, self.seconds), daemon=True).start()

    @staticmethod
    def relay(source, target, seconds):
        try:
            while data := source.recv(1 << 20):
                time.sleep(seconds)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self):
        for s in (self.listener, *self.ends):
            s.close()


def test_a_part_that_comes_early_waits_for_those_before_it(start, folder, server):  # noqa: F811
    """The first 64 pages are on a slow server only, the next 128 in a directory. Each is behind the one before it all the same: of 192
    that came back, eviction takes the last 128, and those of a slow server are not the first to go."""
    late = Late(folder / "late.sock", server[1], 0.1)
    keys, source = pages.keys_of("early", 192), pages.Engine(512)
    source.write(range(256), pages.kv(1, 64))
    source.write(range(256, 512), pages.kv(2, 64))
    try:
        kvd = start(config=f"[kvd]\ntier-redis = unix:{server[1]}\n")
        with pages.connect(kvd) as p:
            p.put(keys[:64], source.paged(range(256)))
            put(kvd, 64, "redis")
        kvd.stop()
        (kvd.folder / "kvd.conf").write_text(f"[kvd]\ntier-directory = {folder}/blocks 1GiB\ntier-redis = unix:{late.path}\n"
                                               "tier-timeout = 20s\nscrub-rate = 0\n")  # a page that is looked at is not free when its block goes
        kvd.start()
        with pages.connect(kvd) as p:
            p.put(keys[64:], source.paged(range(512)))
            put(kvd, 128, "directory")
            until(lambda: kvd.metric("kvd_demotion_waiting_blocks"), 0)
            until(lambda: int(tiers(kvd)["redis"]["put"]), 128, 60)
            evict(kvd)
            found = p.lookup([keys], restore_ms=20000, lease_ms=0)[0]
            assert (found.restored, found.behind) == (192, {"directory": 128, "redis": 64})
            for _ in range(128):
                kvd.kvctl("evict", "--namespace", "default", "--bytes", "1")
            found = p.lookup([keys], lease_ms=0, quiet=True)[0]
            assert found.kinds == bytes([1] * 64 + [0] * 128)
    finally:
        late.close()


def test_calls_that_want_the_same_in_another_order(start, folder):
    """None waits for another that waits for it; and those that are given up leave nothing."""
    kvd = start(config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\n")
    keys, source = pages.keys_of("order", 192), pages.Engine(256)
    source.write(range(256), pages.kv(1, 64))
    with pages.connect(kvd) as p:
        for i in range(0, 192, 64):
            p.put(keys[i:i + 64], source.paged(range(256)))
        until(lambda: int(tiers(kvd)["directory"]["put"]), 192)

    def look(i, ms):
        turned = keys[64 * (i % 3):] + keys[:64 * (i % 3)]
        with pages.connect(kvd) as p:
            return p.lookup([turned], lease_ms=0, restore_ms=ms)[0].pages

    for ms in (60000, 3, 60000):
        kvd.kvctl("evict", "--namespace", "default", check=False)  # which goes when it is empty
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            found = list(pool.map(lambda i: look(i, ms), range(9)))
        assert ms == 3 or (found == [192] * 9 and time.monotonic() - began < 45)
    kvd.kvctl("evict", "--namespace", "default", check=False)
    until(lambda: int(json.loads(kvd.kvctl("--json", "status").stdout)["pool_used_bytes"]), 0)
