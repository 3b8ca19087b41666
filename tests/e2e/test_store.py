"""Rotation sets over file:// and HTTP, with servers that work and servers that do not."""
import functools
import http.server
import json
import os
import pathlib
import shutil
import socket
import subprocess
import threading
import time

import grpc
import pytest

from conftest import KVCTL, Rpc, admin, calls, free_port, layout, kv
from test_death import wait_for

REF = "m/demo@v1"


@pytest.fixture
def store(folder):
    path = folder / "store"
    r = subprocess.run([KVCTL, "--store", path, "--json", "calib", "hadamard", REF, "0-3", "64"], capture_output=True,
                       text=True, check=True)
    return path, json.loads(r.stdout)["digest"]


class Server:
    """Debian's nginx on a folder."""

    def __init__(self, folder, root):
        self.port = free_port()
        conf = folder / "nginx.conf"
        conf.write_text(f"""
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.err;
events {{ worker_connections 64; }}
http {{ access_log {folder}/access.log; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/c;
  server {{ listen 127.0.0.1:{self.port}; root {root};
    location /loop {{ return 302 /loop$request_uri; }} }} }}
""")
        os.chmod(folder, 0o755)
        self.process = subprocess.Popen([shutil.which("nginx") or "/usr/sbin/nginx", "-c", str(conf)],
                                        stderr=subprocess.DEVNULL)
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self):
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
def nginx(folder, store):
    if not (shutil.which("nginx") or os.path.exists("/usr/sbin/nginx")):
        pytest.skip("nginx is not installed")
    s = Server(folder, store[0])
    yield s
    s.stop()


def open_with(kvd, ref=REF):
    rpc = Rpc(kvd.address)
    try:
        return rpc.kv("OpenSession", layout=layout(rotation_set=ref), timeout=30)
    finally:
        rpc.channel.close()


def refused(kvd, code, words, ref=REF):
    with pytest.raises(grpc.RpcError) as e:
        open_with(kvd, ref)
    assert e.value.code().name == code and words in e.value.details(), e.value


def test_over_http_then_offline(start, nginx, store):
    kvd = start("--store", nginx.url)
    assert open_with(kvd).layout.rotation_set == store[1]
    assert "cached" in kvd.kvctl("calib", "ls").stdout or "loaded" in kvd.kvctl("calib", "ls").stdout
    nginx.stop()
    assert open_with(kvd).layout.rotation_set == store[1]  # by tag, from the cached manifest
    assert open_with(kvd, store[1]).layout.rotation_set == store[1]
    refused(kvd, "UNAVAILABLE", "127.0.0.1", "m/other@v1")
    assert kvd.metric('kvd_rotation_set_requests_total{source="store"}') == 1
    assert kvd.metric('kvd_rotation_set_requests_total{source="cache"}') == 2
    assert kvd.metric('kvd_rotation_set_requests_total{source="failed"}') == 1


def test_a_folder_that_is_not_there_is_told_at_start(start, tmp_path):
    """It may still be mounted, so kvd starts; but who has mistyped it is told before a worker's session fails."""
    kvd = start("--store", tmp_path / "nowhere")
    assert f"the store {tmp_path}/nowhere is not there" in kvd.text()


def test_names_that_are_not_there(start, nginx):
    kvd = start("--store", nginx.url)
    refused(kvd, "NOT_FOUND", "no model", "m/none@v1")
    refused(kvd, "NOT_FOUND", "no tag", "m/demo@v9")
    refused(kvd, "NOT_FOUND", "does not exist", "sha256:" + "0" * 64)
    refused(kvd, "INVALID_ARGUMENT", "model@tag", "../../etc/passwd@x")
    refused(kvd, "INVALID_ARGUMENT", "model@tag", "/etc/passwd")


def test_a_set_that_does_not_fit_the_layout(start, store):
    kvd = start("--store", f"file://{store[0]}")
    rpc = Rpc(kvd.address)
    for g, words in ((layout(rotation_set=REF, layers=[2, 3, 4]), "has no layer 4"),
                     (layout(rotation_set=REF, head_dim_k=128), "head_dim 64/64")):
        with pytest.raises(grpc.RpcError) as e:
            rpc.kv("OpenSession", layout=g)
        assert e.value.code().name == "FAILED_PRECONDITION" and words in e.value.details()


def test_the_wrong_bytes_are_refused_and_not_kept(start, store, folder):
    path, digest = store
    obj = path / f"objects/sha256/{digest[7:]}.safetensors"
    good = obj.read_bytes()
    kvd = start("--store", f"file://{path}")
    for bad in (good[:-4] + b"\0\0\0\1", good[: len(good) // 2], b"", b"<html>not found</html>"):
        obj.write_bytes(bad)
        refused(kvd, "DATA_LOSS", "digest")
        assert not list((folder / "cache/objects").rglob("*.*"))
    obj.write_bytes(good)
    open_with(kvd)
    # A cached copy that rots is fetched again.
    cached = next((folder / "cache/objects").rglob("*.safetensors"))
    cached.write_bytes(good[:1000])
    assert open_with(kvd).layout.rotation_set == digest


def test_redirects_without_end(start, nginx):
    kvd = start("--store", nginx.url + "/loop")
    refused(kvd, "UNAVAILABLE", "redirects more than 5 times")


class Bad(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        mode = self.server.mode
        if mode == "hang":
            self.server.hangs = True
            time.sleep(30)
        elif mode == "500":
            self.send_response(503)
            self.end_headers()
        elif mode == "endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b" " * 65536)
            except OSError:
                pass
        elif mode == "local":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
        elif mode == "html":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>log in</html>")

    def log_message(self, *args):
        self.server.hits += 1


@pytest.mark.parametrize("mode,code,words", [("hang", "UNAVAILABLE", "imeout"), ("500", "UNAVAILABLE", "503"),
                                             ("endless", "RESOURCE_EXHAUSTED", "larger than"),
                                             ("local", "INVALID_ARGUMENT", "file://"),
                                             ("html", "DATA_LOSS", "not kept")])
def test_bad_servers(start, mode, code, words):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bad)
    server.daemon_threads, server.mode, server.hits = True, mode, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    patience = "500ms" if mode == "hang" else "20s"  # all others answer
    kvd = start("--store", f"http://127.0.0.1:{server.server_port}", config=f"[kvd]\nstore-timeout = {patience}\n")
    began = time.time()
    wrong = []

    def is_refused():
        try:
            refused(kvd, code, words)
        except (AssertionError, pytest.fail.Exception) as e:
            wrong.append(e)

    thread = threading.Thread(target=is_refused)
    thread.start()
    time.sleep(0.2)
    kvd.kvctl("ping", 3)  # the daemon serves others meanwhile
    thread.join()
    assert not wrong, wrong
    assert time.time() - began < 25  # one that hangs does so for half a minute
    if mode == "500":
        assert server.hits >= 3  # tried again
    server.shutdown()
    server.server_close()


class Held(http.server.SimpleHTTPRequestHandler):
    """A store that is silent until it may answer."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.server.answers.wait(60) and not self.server.over:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def held(store):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Held, directory=store[0]))
    server.daemon_threads, server.asked, server.answers, server.over = True, [], threading.Event(), False
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.over = True
    server.answers.set()
    server.shutdown()
    server.server_close()


def listings(rpc, n, timeout):
    f = rpc.channel.unary_unary("/kvd.v1.Admin/ListRotationSets", request_serializer=lambda m: m.SerializeToString(),
                                response_deserializer=admin.ListRotationSetsReply.FromString)
    return [f.future(admin.ListRotationSetsRequest(), timeout=timeout) for _ in range(n)]


PATIENT = "[kvd]\nstore-timeout = 60s\n"


def test_those_who_list_a_store_that_hangs_hold_up_nobody(start, held):
    kvd = start("--store", held.url, config=PATIENT)
    with calls(kvd) as rpc:
        for f in listings(rpc, 40, 1):
            assert f.exception().code().name == "DEADLINE_EXCEEDED"
        assert len(held.asked) == 1
        began = time.time()
        kvd.kvctl("--timeout", 30, "reload")
        assert time.time() - began < 5  # nobody waits for the store any more
        wait = listings(rpc, 40, 40)
        fetches = [subprocess.Popen([KVCTL, "--address", kvd.address, "--timeout", "4", "calib", "fetch", f"m/demo@v{i}"],
                                    stderr=subprocess.DEVNULL) for i in range(8)]
        assert wait_for(lambda: len(held.asked) >= 4)
        began = time.time()
        kvd.kvctl("--timeout", 30, "reload")  # while they all wait
        assert time.time() - began < 3
        assert all(f.wait(20) for f in fetches)
        held.answers.set()
        assert {tuple((s.model, s.tag) for s in f.result().sets) for f in wait} == {(("m/demo", "v1"),)}
        assert held.asked.count("/index.json") == 2  # once for each forty
        assert len(held.asked) <= 2 + 1 + 8


def test_who_lists_after_a_reload_hears_of_the_store_that_is_meant(start, held, folder):
    kvd = start(config=PATIENT + f"store = {held.url}\n")
    with calls(kvd) as rpc:
        (first,) = listings(rpc, 1, 30)
        assert wait_for(lambda: held.asked)
        (folder / "kvd.conf").write_text(PATIENT)
        kvd.kvctl("reload")
        assert not listings(rpc, 1, 10)[0].result().sets and not first.done()
        held.answers.set()
        assert len(first.result().sets) == 1


def test_a_full_disk_under_the_cache(start, store, folder):
    cache = folder / "full"
    cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(cache)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs wants root")
    try:
        kvd = start("--store", f"file://{store[0]}", "--cache", str(cache))
        refused(kvd, "RESOURCE_EXHAUSTED", "No space left")
        assert not [p for p in cache.rglob("*") if "XXXXXX" in p.name or p.suffix == ".safetensors"]
        open_with(kvd, "hadamard")
        assert kvd.stop() == 0
    finally:
        subprocess.run(["umount", "-l", str(cache)], check=True)


def test_a_cache_serves_as_a_store(start, store, folder):
    """What is below stores/ in a cache is, with its link to the objects, that store as far as it was fetched."""
    kvd = start("--store", f"file://{store[0]}")
    kvd.kvctl("calib", "fetch", REF)
    kvd.kvctl("calib", "ls")
    (mirror,) = (folder / "cache/stores").iterdir()
    assert (mirror / "url").read_text() == str(store[0])
    r = subprocess.run([KVCTL, "--store", mirror, "--cache", folder / "c2", "calib", "verify", REF],
                       capture_output=True, text=True)
    assert r.returncode == 0 and store[1] in r.stdout, r.stderr


def test_stores_in_one_cache_do_not_mix(folder):
    """Tags are a store's own: another one that is down, or asked for something else, does not answer for it."""
    a, b, cache = folder / "store-a", folder / "store-b", folder / "shared-cache"

    def calib(store, *arguments, code=0):
        where = ["--store", store] if store else []
        r = subprocess.run([KVCTL, "--json", *where, "--cache", cache, "calib", *arguments], capture_output=True, text=True)
        assert r.returncode == code, r.stdout + r.stderr
        return json.loads(r.stdout) if code == 0 else r.stderr

    def publish(store, ref, layers):
        return calib(store, "hadamard", ref, layers, "64")["digest"]

    both = publish(a, "m/same@v1", "0")
    assert publish(b, "m/same@v1", "0") == both
    in_a, in_b, only_b = publish(a, REF, "0-1"), publish(b, REF, "0-2"), publish(b, "m/b@v1", "0-3")
    for store, want in ((a, in_a), (f"file://{b}/", in_b), (b, in_b), (a, in_a)):
        assert calib(store, "show", REF)["digest"] == want
    for ref in ("m/same@v1", "m/b@v1"):
        calib(b, "fetch", ref)
    calib(a, "fetch", "m/same@v1")
    assert len(list((cache / "stores").iterdir())) == 2
    # Objects are there once, whoever they came from.
    assert {p.name[:64] for p in (cache / "objects/sha256").iterdir()} == {d[7:] for d in (both, in_a, in_b, only_b)}
    # Of a store that is down, its own manifests answer.
    for store in (a, b):
        store.rename(f"{store}-away")
    assert calib(a, "show", REF)["digest"] == in_a and calib(b, "show", REF)["digest"] == in_b
    assert f"the store {a} is not there" in calib(a, "show", "m/b@v1", code=1)
    # Without a store all of them are asked, and must agree.
    assert calib(None, "show", "m/same@v1")["digest"] == both
    assert calib(None, "show", "m/b@v1")["digest"] == only_b
    said = calib(None, "show", REF, code=1)
    assert all(text in said for text in (str(a), str(b), in_a, in_b, "--store URL"))
    assert "no store is configured (--store URL)" in calib(None, "show", "m/none@v1", code=1)
    assert "no store is configured (--store URL)" in calib(None, "pin", "m/none@v1", code=1)
    # What any store's tag names stays.
    assert calib(None, "gc") == {"removed": 0, "freed": "0", "kept": 4, "dry": False}
    next((cache / "stores").rglob("b.json")).unlink()
    assert calib(None, "gc")["removed"] == 1 and "m/b" in calib(None, "show", "m/b@v1", code=1)
    next((cache / "stores").rglob("demo.json")).write_text("{")
    assert "demo.json" in calib(None, "show", REF, code=1) and "demo.json" in calib(None, "gc", code=1)


def test_a_cache_without_an_index_is_listed_too(folder, store):
    """What was fetched by name has a manifest in the cache, and no index."""
    cache = folder / "some-cache"
    run = lambda *a: subprocess.run([KVCTL, "--cache", cache, *a], capture_output=True, text=True)
    assert run("calib", "ls").stdout == "no store is configured, and the cache has no sets\n"
    (folder / "empty").mkdir()
    (folder / "empty/index.json").write_text('{"models": []}')
    assert run("--store", folder / "empty", "calib", "ls").stdout == "no rotation sets in the store or the cache\n"
    assert run("--store", store[0], "calib", "fetch", REF).returncode == 0
    assert not list(cache.rglob("stores/*/index.json")) or not any("m/demo" in p.read_text() for p in cache.rglob("index.json"))
    listed = json.loads(run("--json", "calib", "ls").stdout)["sets"]
    assert [(s["model"], s["tag"], s["digest"], s["state"]) for s in listed] == [("m/demo", "v1", store[1], "cached")]


def test_a_worker_is_told_where_a_store_is_configured(kvd, rpc):
    with pytest.raises(grpc.RpcError) as e:
        rpc.kv("OpenSession", layout=layout(rotation_set="m/none@v1"))
    assert "no store is configured (store in kvd.conf, or --store of kvd)" in e.value.details(), e.value.details()


def test_many_at_once_lose_nothing(folder):
    """Publishing, pinning and removal read, change and write the same files: in turns."""
    store, cache, n = folder / "busy-store", folder / "busy-cache", 24

    def at_once(*commands):
        running = [subprocess.Popen([KVCTL, "--store", store, "--cache", cache, "calib", *c], stderr=subprocess.PIPE) for c in commands]
        for r in running:
            _, said = r.communicate(timeout=60)
            assert r.returncode == 0, said

    at_once(*(("hadamard", f"m{i % 3}@t{i}", f"0-{i}", "64") for i in range(n)))
    tags = {p.stem: json.loads(p.read_text())["tags"] for p in (store / "models").iterdir()}
    assert {(m, t) for m, of in tags.items() for t in of} == {(f"m{i % 3}", f"t{i}") for i in range(n)}
    assert sorted(json.loads((store / "index.json").read_text())["models"]) == ["m0", "m1", "m2"]
    assert len(list((store / "objects/sha256").iterdir())) == n  # and nothing half-written
    at_once(*(("pin", f"m{i % 3}@t{i}") for i in range(n)), ("gc",), ("gc",))
    assert len(json.loads((cache / "pins.json").read_text())) == n
    at_once(*(("untag", f"m{i % 3}@t{i}") for i in range(0, n, 2)))
    left = {t for p in (store / "models").iterdir() for t in json.loads(p.read_text())["tags"]}
    assert left == {f"t{i}" for i in range(1, n, 2)}


def test_kvctl_on_files(store, folder):
    obj = next(pathlib.Path(store[0]).rglob("*.safetensors"))
    run = lambda *a: subprocess.run([KVCTL, *a], capture_output=True, text=True)
    shown = json.loads(run("--json", "calib", "show", str(obj)).stdout)
    assert shown["digest"] == store[1] and shown["layers"] == "0-3"
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes(obj.read_bytes()[:-1])
    r = run("calib", "verify", str(damaged))
    assert r.returncode == 1 and "truncated" in r.stderr
    assert run("calib", "verify", str(folder / "none.safetensors")).returncode == 1
    assert run("calib", "verify", "neither").returncode == 2  # neither a file nor a set


def tree(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_tag_moves_only_when_told_to(folder, store):
    path, digest = store

    def calib(*arguments, code=0):
        r = subprocess.run([KVCTL, "--store", path, "--json", "calib", *map(str, arguments)], capture_output=True, text=True)
        assert r.returncode == code, r.stdout + r.stderr
        return json.loads(r.stdout) if code == 0 else r.stderr

    other = folder / "other"
    r = subprocess.run([KVCTL, "--store", other, "--json", "calib", "hadamard", "m/other@v1", "0-2", "64"],
                       capture_output=True, check=True)
    digest2 = json.loads(r.stdout)["digest"]
    file = other / f"objects/sha256/{digest2[7:]}.safetensors"
    before = tree(path)
    for command in (("publish", file, REF), ("hadamard", REF, "0-2", "64")):
        said = calib(*command, code=1)
        assert f"{REF} names {digest} already" in said and "--replace" in said
        assert tree(path) == before
    assert calib("hadamard", REF, "0-3", "64")["digest"] == digest  # the same again
    assert tree(path) == before
    assert calib("publish", file, REF, "--replace") == {"set": REF, "digest": digest2}
    assert calib("publish", file, "m/demo@v2")["digest"] == digest2
    manifest = path / "models/m/demo.json"
    assert {t: e["digest"] for t, e in json.loads(manifest.read_text())["tags"].items()} == {"v1": digest2, "v2": digest2}

    assert calib("untag", REF) == {"set": REF, "digest": digest2}
    assert set(json.loads(manifest.read_text())["tags"]) == {"v2"}
    assert (path / f"objects/sha256/{digest2[7:]}.safetensors").exists()
    assert "no tag v1" in calib("untag", REF, code=1) and "no model m/none" in calib("untag", "m/none@v1", code=1)
    said = subprocess.run([KVCTL, "--store", path, "calib", "untag", "m/demo@v2"], capture_output=True, text=True).stdout
    assert digest2 in said and f"kvctl --cache {path} calib gc" in said
    subprocess.run([KVCTL, "--cache", path, "calib", "gc"], check=True, capture_output=True)
    assert not list(path.rglob("*.safetensors"))

    manifest.write_text("{")  # what cannot be read is not written over
    before = tree(path)
    assert "demo.json" in calib("hadamard", REF, "0-3", "64", code=1)
    assert "demo.json" in calib("untag", REF, code=1)
    assert tree(path) == before


def test_pins_and_removal(folder):
    store, cache = folder / "gc-store", folder / "gc-cache"
    objects = cache / "objects/sha256"

    def calib(*arguments, code=0):
        r = subprocess.run([KVCTL, "--json", "--store", f"file://{store}", "--cache", cache, "calib", *arguments],
                           capture_output=True, text=True)
        assert r.returncode == code, r.stdout + r.stderr
        return json.loads(r.stdout) if code == 0 else r.stderr

    def publish(tag, layers):
        r = subprocess.run([KVCTL, "--json", "--store", store, "calib", "hadamard", f"a/b@{tag}", layers, "64", "--replace"],
                           check=True, capture_output=True)
        calib("fetch", f"a/b@{tag}")
        return json.loads(r.stdout)["digest"]

    def names():
        return {f"sha256:{p.name[:64]}" for p in objects.iterdir()}

    old, pinned = publish("x", "0"), publish("y", "0-1")
    assert calib("pin", "a/b@y") == {"digest": pinned, "pinned": True, "cache": str(cache)}
    new, third = publish("x", "0-2"), publish("y", "0-3")
    assert names() == {old, pinned, new, third}
    assert calib("gc", "--dry-run") | {"freed": 0} == {"removed": 1, "freed": 0, "kept": 3, "dry": True}
    assert names() == {old, pinned, new, third}
    # A manifest that cannot be read, or names nothing: nothing is removed.
    (cache / "models").mkdir()  # of a cache that is a store itself
    (cache / "models/c.json").write_text("{")
    assert "c.json" in calib("gc", code=1)
    (cache / "models/c.json").write_text("[]")
    assert "without tags" in calib("gc", code=1)
    (cache / "models/c.json").unlink()
    stale, fresh = objects / "0.safetensors.AAAAAA", objects / "0.safetensors.BBBBBB"
    stale.write_text("x"), fresh.write_text("x")
    os.utime(stale, (1, 1))
    freed = (objects / f"{old[7:]}.safetensors").stat().st_size
    assert calib("gc") == {"removed": 1, "freed": str(freed + 1), "kept": 3, "dry": False}
    assert not stale.exists() and fresh.exists()
    fresh.unlink()
    assert names() == {pinned, new, third}
    assert calib("unpin", pinned) == {"digest": pinned, "pinned": False, "cache": str(cache)}
    assert calib("gc")["removed"] == 1 and names() == {new, third}
    assert "no tag z" in calib("pin", "a/b@z", code=1)


def test_signed_sets(start, folder, store):
    other = folder / "signed"
    keys = []
    for name in ("right", "wrong"):
        key, public = folder / f"{name}.pem", folder / f"{name}.pub"
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True, capture_output=True)
        subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
        keys += [key, public]
    right, right_public, _, wrong_public = keys

    def kvctl(*arguments):
        return subprocess.run([KVCTL, *map(str, arguments)], capture_output=True, text=True)

    r = kvctl("--json", "--store", other, "--sign", right, "calib", "hadamard", REF, "0-3", "64")
    assert r.returncode == 0, r.stderr
    digest = json.loads(r.stdout)["digest"]
    signature = other / f"objects/sha256/{digest[7:]}.sig"
    message = folder / "message"
    message.write_text(f"kvd-rotation-set/1 {digest}\n")
    subprocess.run(["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", right_public, "-in", message,
                    "-sigfile", signature], check=True, capture_output=True)

    # By kvctl: the right key, the wrong one, no signature, a signature of something else.
    def fetch(where, public, cache):
        return kvctl("--store", f"file://{where}", "--cache", folder / cache, "--public-key", public, "calib", "fetch", REF)

    assert fetch(other, right_public, "c1").returncode == 0
    assert "not of the key" in fetch(other, wrong_public, "c1").stderr
    assert fetch(other, right_public, "c1").returncode == 0
    assert "is not signed" in fetch(store[0], right_public, "c2").stderr
    assert "not an Ed25519 public key" in fetch(other, message, "c1").stderr
    good = signature.read_bytes()
    # A bad signature in the cache is fetched again; a bad one in the store is refused.
    (folder / f"c1/objects/sha256/{digest[7:]}.sig").write_bytes(bytes(64))
    assert fetch(other, right_public, "c1").returncode == 0
    signature.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "not of the key" in fetch(other, right_public, "c3").stderr
    signature.write_bytes(good + b"x")
    assert fetch(other, right_public, "c3").returncode == 1
    signature.write_bytes(good)
    # Without the store, what the cache has suffices.
    r = kvctl("--cache", folder / "c1", "--public-key", right_public, "calib", "fetch", REF)
    assert r.returncode == 0, r.stderr

    # By the daemon.
    kvd = start("--store", f"file://{other}", config=f"[kvd]\nstore-public-key = {right_public}\n")
    open_with(kvd)
    kvd.stop()
    kvd = start("--store", f"file://{store[0]}", config=f"[kvd]\nstore-public-key = {wrong_public}\n")
    refused(kvd, "PERMISSION_DENIED", "not")
    open_with(kvd, "hadamard")
    kvd.stop()
    bad = start(config=f"[kvd]\nstore-public-key = {folder}/none\n", wait=False)
    assert bad.process.wait(20) != 0 and "store-public-key" in bad.text()


def test_a_key_that_is_reloaded_is_for_what_comes_later(start, held, folder):
    """What is being fetched is judged by the key with which it began: none of it is signed."""
    key, public = folder / "key.pem", folder / "key.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    conf = PATIENT + f"store = {held.url}\n"
    kvd = start(config=conf + f"store-public-key = {public}\n")
    fetch = subprocess.Popen([KVCTL, "--address", kvd.address, "--timeout", "30", "calib", "fetch", REF], stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: held.asked)
    (kvd.folder / "kvd.conf").write_text(conf)
    assert "store-public-key" in kvd.kvctl("reload").stdout
    held.answers.set()
    said = fetch.communicate(timeout=30)[1]
    assert fetch.returncode and ".sig" in said, said
    open_with(kvd)


def test_kvctl_tells_a_store_that_is_gone_from_a_kvd_that_is(start, folder):
    kvd = start("--store", f"http://127.0.0.1:{free_port()}")
    r = kvd.kvctl("calib", "fetch", REF, check=False)
    assert r.returncode == 1 and "is kvd running" not in r.stderr and "/models/" in r.stderr, r.stderr
    kvd.stop()
    r = kvd.kvctl("calib", "fetch", REF, check=False)
    assert r.returncode == 3 and "is kvd running there" in r.stderr, r.stderr


def test_stopping_while_a_fetch_hangs(start):
    """The daemon must not wait for a dead store, nor answer a call that gRPC has let go of."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bad)
    server.daemon_threads, server.mode, server.hits, server.hangs = True, "hang", 0, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kvd = start("--store", f"http://127.0.0.1:{server.server_port}", config="[kvd]\nstore-timeout = 60s\n")
    answers = []

    def ask(f):
        try:
            f()
        except (grpc.RpcError, AssertionError) as e:
            answers.append(e)

    threads = [threading.Thread(target=ask, args=(lambda: open_with(kvd),)),
               threading.Thread(target=ask, args=(lambda: kvd.kvctl("calib", "ls"),))]
    for t in threads:
        t.start()
    assert wait_for(lambda: server.hangs)
    time.sleep(0.3)
    began = time.time()
    assert kvd.stop() == 0
    assert time.time() - began < 15  # and not a minute
    for t in threads:
        t.join()
    assert answers[0]
    server.shutdown()
    server.server_close()


def test_ids_of_another_instance_mean_nothing(start):
    """What a worker still holds from before a restart must not name what others made since."""
    from conftest import kv

    kvd = start()
    ids = []
    for _ in range(2):
        rpc = Rpc(kvd.address)
        s = rpc.kv("OpenSession", layout=layout()).session
        ids.append(set(rpc.kv("CreateSequences", session=s, request_id=1, count=50).sequences))
        rpc.channel.close()
        kvd.stop()
        kvd.start()
    assert not ids[0] & ids[1]


class Dripping(http.server.BaseHTTPRequestHandler):
    """A byte now and then, for ever."""

    def do_GET(self):
        self.server.hits += 1
        self.server.paths.append(self.path)
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b" ")
                time.sleep(0.2)
        except OSError:
            self.server.gone += 1

    def log_message(self, *args):
        pass


def test_downloads_hold_up_nothing_that_is_near(start, store):
    kvd = start("--store", f"file://{store[0]}")
    open_with(kvd, store[1])
    assert kvd.stop() == 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    server.daemon_threads, server.hits, server.gone, server.paths = True, 0, 0, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kvd = start("--store", f"http://127.0.0.1:{server.server_port}")
    rpc = Rpc(kvd.address)
    opens = rpc.channel.unary_unary("/kvd.v1.KvCache/OpenSession", request_serializer=lambda m: m.SerializeToString())
    waiting = [opens.future(kv.OpenSessionRequest(layout=layout(rotation_set=f"m/drip{i}@v1")), timeout=60)
               for i in range(8)]
    while server.hits < 2:
        time.sleep(0.02)
    began = time.time()
    open_with(kvd, store[1])  # cached
    open_with(kvd, "hadamard")
    assert time.time() - began < 15  # those go on for ever
    assert server.hits == 2  # of one user at once
    for path in server.paths:  # calls come in any order
        waiting[int(path.split("drip")[1].split(".")[0])].cancel()  # nobody waits for those that run: they make room
    end = time.time() + 20
    while (server.gone < 2 or server.hits < 4) and time.time() < end:
        time.sleep(0.05)
    assert server.gone >= 2 and server.hits == 4
    began = time.time()
    assert kvd.stop() == 0
    assert time.time() - began < 15  # for ever
    for call in waiting:
        with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
            call.result()
    rpc.channel.close()
    server.shutdown()
    server.server_close()
