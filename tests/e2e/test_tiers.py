"""Tiers as an operator sees them: configured, looked at, flushed, and gone without harm."""
import json
import os
import shutil
import signal
import subprocess
import time

import pytest

import kvd as package
from conftest import BUILD, KVCTL
from test_prefix import connect, step, tokens_of

needs_libkvd = pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")

SERVERS = [p for p in ("/usr/bin/valkey-server", "/usr/bin/redis-server") if os.path.exists(p)]


def serve(folder):
    path = folder / "redis.sock"
    path.unlink(missing_ok=True)
    process = subprocess.Popen([SERVERS[0], "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 10
    while not path.exists() and time.time() < end:
        time.sleep(0.01)
    return process, path


@pytest.fixture
def server(folder):
    if not SERVERS:
        pytest.skip("neither valkey-server nor redis-server is installed")
    process, path = serve(folder)
    yield process, path
    process.kill()
    process.wait()


def tiers(kvd):
    return {t["name"]: t for t in json.loads(kvd.kvctl("--json", "tier", "status").stdout)["tiers"]}


def test_none_unless_configured(kvd):
    assert tiers(kvd) == {}
    assert "tier-host" in kvd.kvctl("tier", "status").stdout
    r = kvd.kvctl("tier", "flush", "redis", check=False)
    assert r.returncode and "no tier 'redis'" in r.stderr
    assert "kvd_tier" not in kvd.kvctl("metrics").stdout


def test_three_tiers(start, folder, server):
    process, path = server
    blocks = folder / "blocks"
    secret = folder / "secret"
    secret.write_bytes(os.urandom(32))
    secret.chmod(0o600)
    kvd = start(config=f"[kvd]\ntier-host = 64MiB\ntier-directory = {blocks} 1GiB\ntier-redis = unix:{path}\n"
                       f"tier-secret = {secret}\ntier-timeout = 20s\n")
    have = tiers(kvd)
    assert list(have) == ["host", "directory", "redis"]
    assert have["directory"]["limit_bytes"] == str(1 << 30) and have["directory"]["where"] == str(blocks)
    assert all(t["state"] == "ok" for t in have.values())
    for name in have:
        assert "flushed" in kvd.kvctl("tier", "flush", name).stdout
    page = kvd.kvctl("metrics").stdout
    for name in have:
        assert f'kvd_tier_up{{tier="{name}"}} 1' in page
        assert f'kvd_tier_operations_total{{tier="{name}",operation="flush",result="ok"}} 1' in page
    # A server that is stopped holds up nobody, not even the end of kvd.
    assert kvd.stop() == 0
    config = kvd.folder / "kvd.conf"
    config.write_text(config.read_text().replace("tier-timeout = 20s", "tier-timeout = 300ms"))
    kvd.start()
    process.send_signal(signal.SIGSTOP)
    flush = subprocess.Popen([str(KVCTL), "--address", kvd.address, "tier", "flush", "redis"],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    began = time.time()
    assert tiers(kvd)["redis"]["state"] in ("ok", "failing")
    out, err = flush.communicate(timeout=30)
    assert flush.returncode and "not flushed" in err
    assert kvd.stop() == 0
    assert time.time() - began < 25  # it would be stopped for ever
    process.send_signal(signal.SIGCONT)


def test_a_server_that_is_not_there(start, folder):
    kvd = start(config=f"[kvd]\ntier-redis = unix:{folder}/nothing\n")
    until(lambda: f"tier redis: unix:{folder}/nothing: No such file or directory: it misses until that is mended" in kvd.text(), True)
    have = tiers(kvd)["redis"]
    assert have["state"] == "failing" and "No such file" in have["reason"], have
    for _ in range(4):
        r = kvd.kvctl("tier", "flush", "redis", check=False)
        assert r.returncode and "not flushed" in r.stderr
    have = tiers(kvd)["redis"]
    assert have["state"] == "failing" and "No such file" in have["reason"], have
    assert "last failure" in kvd.kvctl("tier", "status").stdout
    assert 'kvd_tier_up{tier="redis"} 0' in kvd.kvctl("metrics").stdout


def until(what, wanted, timeout=20):
    end = time.time() + timeout
    while what() != wanted:
        assert time.time() < end, what()
        time.sleep(0.02)


def publish(client, tokens, *lengths):
    """Computes a prompt and publishes it, at those lengths and at its end; how many blocks of it are known."""
    s, blocks = client.create(), 0
    for n in (*lengths, len(tokens)):
        step(client, s, tokens, n)
        blocks = s.publish_blocks(package.Prompt(tokens)).blocks
    s.free()
    return blocks


@needs_libkvd
def test_what_is_published_goes_to_all_tiers(start, folder, server):
    """Once each, though it is published again; a namespace's to the same tiers under keys of their own."""
    kvd = start(config=f"[kvd]\ntier-host = 64MiB\ntier-directory = {folder}/blocks 1GiB\ntier-redis = unix:{server[1]}\n")
    with connect(kvd) as c, connect(kvd, namespace="another") as other:
        assert publish(c, tokens_of(1, 1024)) == publish(c, tokens_of(1, 1024)) == publish(other, tokens_of(1, 1024)) == 12
        until(lambda: {n: int(t["put"]) for n, t in tiers(kvd).items()}, {"host": 24, "directory": 24, "redis": 24})
        assert kvd.metric("kvd_demoted_blocks_total") == 24
        assert kvd.metric("kvd_demotion_waiting_blocks") == 0
        assert int(tiers(kvd)["directory"]["blocks"]) == 24


@needs_libkvd
def test_watchers_hear_where_blocks_are(start, folder):
    """Stored, copied to tiers, gone from the pool, back in it, and a tier that is flushed."""
    kvd = start(config=f"[kvd]\ntier-host = 64MiB\ntier-directory = {folder}/blocks 1GiB\n")
    tokens = tokens_of(1, 1024)
    with connect(kvd) as c, connect(kvd) as watcher, connect(kvd, namespace="another") as other:
        assert watcher.next_event(20).kind == other.next_event(20).kind == "opened"
        assert publish(c, tokens) == 12
        stored = watcher.next_event(20)
        assert (stored.kind, len(stored.keys)) == ("stored", 12)
        have = {"host": set(), "directory": set()}
        while any(len(keys) < 12 for keys in have.values()):
            e = watcher.next_event(20)
            assert e.kind == "moved" and e.tokens == 64
            have[e.tier] |= set(e.keys)
        assert have["host"] == have["directory"] == set(stored.keys)
        kvd.kvctl("evict", "--namespace", "default")
        assert watcher.next_event(20).kind == "removed"
        assert c.match([package.Prompt(tokens)], restore=20)[0].blocks == 12
        back = watcher.next_event(20)
        assert (back.kind, back.keys, back.parent) == ("stored", stored.keys, None)
        kvd.kvctl("tier", "flush", "host")
        for w in (watcher, other):
            e = w.next_event(20)
            assert (e.kind, e.tier, e.keys) == ("cleared", "host", ())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has files that kvd may not drop, as a kvd of another user")
@pytest.mark.parametrize("folders", [0o755, 0o700])
def test_a_flush_that_drops_nothing_says_so(start, folder, folders):
    """Of files that are somebody else's, whether their names can be read or not."""
    within = folder / "blocks/ab"
    within.mkdir(parents=True)
    (within / ("0" * 62)).write_bytes(bytes(8192))
    os.chmod(within, folders)
    for path in (folder, folder / "blocks"):
        os.chown(path, 65534, 65534)
    kvd = start(config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\n", prefix=("setpriv", "--reuid", "65534", "--clear-groups"))
    r = kvd.kvctl("tier", "flush", "directory", check=False)
    assert r.returncode and "not flushed" in r.stderr
    assert "tier is flushed" not in kvd.text() and "tier is not flushed" in kvd.text()
    assert "Permission denied" in tiers(kvd)["directory"]["reason"]
    (within / ("0" * 62)).unlink()
    within.rmdir()
    kvd.kvctl("tier", "flush", "directory")
    assert "tier is flushed" in kvd.text()


def test_a_directory_that_is_not_there(start, folder):
    """It is said at the start, and again when it has come."""
    kvd = start(config=f"[kvd]\ntier-directory = {folder}/nope/blocks 1GiB\n")
    until(lambda: f"tier directory: {folder}/nope is not there: it misses until it is" in kvd.text(), True)
    have = tiers(kvd)["directory"]
    assert have["state"] == "failing" and "No such file" in have["reason"]
    assert 'kvd_tier_up{tier="directory"} 0' in kvd.kvctl("metrics").stdout
    (folder / "nope").mkdir()
    kvd.kvctl("tier", "flush", "directory")
    assert tiers(kvd)["directory"]["state"] == "ok" and f"tier directory: {folder}/nope/blocks is there" in kvd.text()


@needs_libkvd
def test_a_directory_that_is_removed_and_made_again(start, folder):
    kvd = start(config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\n")
    with connect(kvd) as c:
        for i in (1, 2):
            assert publish(c, tokens_of(i, 640)) == 6
            until(lambda: int(tiers(kvd)["directory"]["put"]), 6 * i)
            assert len(list((folder / "blocks").glob("*/*"))) == 6
            shutil.rmtree(folder / "blocks")
            (folder / "blocks").mkdir()


@needs_libkvd
def test_no_namespace_hears_where_blocks_of_one_are_that_has_gone(start, folder):
    """Though it has its slot while copies wait for a slow tier."""
    kvd = start(config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\ntier-rate = 2MiB\n")
    with connect(kvd, namespace="secret") as c:
        k, v = (c.tensor(2, 8192, 2, 64) for _ in range(2))
        for i in range(6):
            s = c.create()
            s.append(k, v)
            assert s.publish_blocks(package.Prompt(tokens_of(i, 8192))).blocks
            s.free()
        until(lambda: kvd.metric("kvd_demoted_blocks_total") > 200, True)
    kvd.kvctl("evict", "--namespace", "secret")
    with connect(kvd, namespace="curious") as c:
        k, v = (c.tensor(2, 8192, 2, 64) for _ in range(2))
        assert int(tiers(kvd)["directory"]["waiting"]) > 100
        heard = []
        while int(tiers(kvd)["directory"]["waiting"]) or not heard:
            e = c.next_event(0.2)
            heard += [e.kind] if e else []
        assert heard == ["opened"]
        # What it publishes itself it hears of.
        assert publish(c, tokens_of(1, 1024)) == 12
        assert [c.next_event(20).kind for _ in range(2)] == ["stored", "moved"]
        s = c.create()
        s.append(k, v)
        s.publish_blocks(package.Prompt(tokens_of(9, 8192)))
        until(lambda: int(tiers(kvd)["directory"]["waiting"]) > 16, True)
    assert kvd.stop() == 0  # amid it


@needs_libkvd
def test_blocks_wait_for_a_server_that_is_away(start, folder):
    if not SERVERS:
        pytest.skip("neither valkey-server nor redis-server is installed")
    kvd = start(config=f"[kvd]\ntier-redis = unix:{folder}/redis.sock\n")
    with connect(kvd) as c:
        assert publish(c, tokens_of(1, 1024)) == 12
        until(lambda: tiers(kvd)["redis"]["state"], "failing")
        assert publish(c, tokens_of(2, 1024)) == 12
        until(lambda: kvd.metric("kvd_demotion_waiting_blocks"), 24)
        process, _ = serve(folder)
        try:
            until(lambda: int(tiers(kvd)["redis"]["put"]), 24)
            assert kvd.metric("kvd_demotion_waiting_blocks") == 0
        finally:
            process.kill()
            process.wait()
