"""libkvd's promises that are not about numbers: structures of other ages, what is refused before anything is sent, forks,
deadlines. tests/e2e/client.c is the worker."""
import ctypes as c
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from conftest import BUILD, EMULATED, KVD, SOURCE, WORKER, at_some_pace, best_of_three, certificates, free_port
from test_death import wait_for
from test_keep import kill
from test_limits import SANITIZER

CLIENT = BUILD / "tests/e2e_client"


def run(*args, timeout=60):
    return subprocess.run([CLIENT, *map(str, args)], capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("what", ["sized", "replayed", "holds", "shapes", "fork", "queue"])
def test_promise(kvd, what):
    r = run(what, kvd.address)
    assert r.returncode == 0, r.stdout + r.stderr


def test_pythons_structures_are_the_compilers():
    spec = importlib.util.spec_from_file_location("kvd_library", SOURCE / "client/python/kvd/_library.py")
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    structs = {"kvd_failure": "Failure", "kvd_options": "Options", "kvd_plane_options": "PlaneOptions",
               "kvd_info": "Info", "kvd_tensor_ref": "TensorRef",
               "kvd_plane_info": "PlaneInfoStruct", "kvd_plane_tokens": "PlaneTokensStruct",
               "kvd_sequence_info": "SequenceStruct", "kvd_layers": "Layers", "kvd_item": "ItemStruct",
               "kvd_attention": "Attention", "kvd_direct_options": "DirectOptions", "kvd_event": "EventStruct",
               "kvd_bytes": "Bytes", "kvd_prompt": "PromptStruct", "kvd_match": "MatchStruct", "kvd_match_options": "MatchOptions",
               "kvd_published": "PublishedStruct",
               "kvd_page_keys": "PageKeys", "kvd_found": "FoundStruct", "kvd_strides": "Strides", "kvd_paged": "PagedStruct",
               "kvd_ended": "EndedStruct"}
    theirs = {}
    for line in run("layout").stdout.splitlines():
        name, field, offset, size = line.split()
        theirs.setdefault(name, {})[field] = (int(offset), int(size))
    ours = {}
    for name, python in structs.items():
        kind = getattr(library, python)
        ours[name] = {"-": (0, c.sizeof(kind))}
        for base in reversed(kind.__mro__):
            for field, *_ in getattr(base, "__dict__", {}).get("_fields_", []):
                ours[name][field] = (getattr(kind, field).offset, getattr(kind, field).size)
    assert ours == theirs
    # and there is no structure in the headers that was forgotten here
    header = "".join(h.read_text() for h in (SOURCE / "client/include/kvd").glob("*.h"))
    declared = set(re.findall(r"^typedef struct (kvd_\w+) \{", header, re.M))
    assert declared == set(structs)


@pytest.mark.skipif(not EMULATED, reason="the program asks the emulated GPU for memory")
def test_queued_calls_of_blocks_of_a_gpu(kvd):
    r = subprocess.run([KVD.with_name(KVD.name.replace("kvd_emulated", "e2e_client_emulated")), "queue_gpu", kvd.address], capture_output=True, text=True, timeout=60)
    assert r.returncode == 0, r.stdout + r.stderr


@pytest.mark.parametrize("keep", [False, True])
def test_queued_calls_of_a_kvd_that_is_killed_are_misses(start, keep):
    """All end, none waits for its own timeout, and those that come later find the next kvd."""
    kvd = start("--keep") if keep else start()
    with subprocess.Popen([CLIENT, "queue_killed", kvd.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        def go_on():
            p.stdin.write("\n")
            p.stdin.flush()

        try:
            assert p.stdout.readline() == "ready\n"
            if keep:  # the session goes on, so what is under way waits for the next kvd
                kill(kvd)
            else:
                kvd.process.kill()
                kvd.process.wait()
            began = time.monotonic()
            go_on()
            missed = int(p.stdout.readline())
            assert missed == 0 if keep else missed > 4 and time.monotonic() - began < 20
            if not keep:
                kvd.start()
            go_on()
            assert p.wait(60) == 0
        finally:
            p.kill()


@pytest.mark.parametrize("how", ["first", "after"])
def test_a_fork_around_clients(kvd, how):
    r = run("fork", kvd.address, how)
    assert r.returncode == 0, r.stdout + r.stderr


def test_a_child_does_not_keep_its_parents_session(kvd):
    p = subprocess.Popen([CLIENT, "fork", kvd.address, "outlived"], start_new_session=True)
    try:
        assert p.wait(20) == 0
        end = time.time() + 10
        while kvd.metric("kvd_sessions") != 0:
            assert time.time() < end, "the session lives as long as the child"
            time.sleep(0.05)
    finally:
        os.killpg(p.pid, signal.SIGKILL)  # the child


class Mute:
    """Accepts on a daemon's sockets and says nothing."""

    def __init__(self, path):
        self.sockets, self.taken = [], []
        for name, kind in ((path, socket.SOCK_STREAM), (f"{path}.fd", socket.SOCK_SEQPACKET)):
            if os.path.exists(name):
                os.unlink(name)
            s = socket.socket(socket.AF_UNIX, kind)
            s.bind(name)
            s.listen(64)
            self.sockets.append(s)
            threading.Thread(target=self.accept, args=(s,), daemon=True).start()

    def accept(self, s):
        while True:
            try:
                self.taken.append(s.accept()[0])
            except OSError:
                return

    def close(self):
        for s in self.sockets:
            s.shutdown(socket.SHUT_RDWR)
            s.close()


# What is answered at once when the daemon is dead; else everything may take the whole timeout, 1 s.
LATE = 1.0 + 0.8


def probed(kvd, daemon, **env):
    """What each function said, and after how many ms, of a daemon that is stopped, dead or mute: [(name, result, ms)]."""
    p = subprocess.Popen([CLIENT, "deadlines", kvd.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | env)
    assert p.stdout.readline() == "ready\n"
    mute = None
    if daemon == "stopped":
        kvd.process.send_signal(signal.SIGSTOP)
    else:
        kvd.stop(signal.SIGKILL)
    if daemon == "mute":
        mute = Mute(str(kvd.socket))
    try:
        out, _ = p.communicate("go\n", timeout=60)
    finally:
        kvd.process.send_signal(signal.SIGCONT)
        if mute:
            mute.close()
    assert p.returncode == 0
    rows = [(name, int(result), float(ms)) for name, result, ms in map(str.split, out.splitlines())]
    assert len(rows) >= 23
    ok = {name for name, result, _ in rows if result == 0}
    void = {"kvd_close", "kvd_buffer_free", "kvd_direct_close"}
    assert ok <= void | {"kvd_next_event"}, out  # nothing else may have gone well; that may say "none"
    return rows


@pytest.mark.parametrize("daemon", ["stopped", "dead", "mute"])
def test_deadlines(start, daemon):
    def rows_of(**env):
        kvd = start()
        if kvd.on_gpu():
            pytest.skip("first calls on a GPU that others use too take longer than the probes' second")
        try:
            return probed(kvd, daemon, **env)
        finally:
            assert kvd.stop(signal.SIGTERM if daemon == "stopped" else signal.SIGKILL) == (0 if daemon == "stopped" else -signal.SIGKILL)

    def in_time():
        rows = rows_of(**env)
        assert not [r for r in rows if r[2] > LATE * 1000], rows
        if daemon == "dead":
            assert not [r for r in rows if r[2] > 700 and r[0] != "kvd_next_event"], rows

    env = {}
    if "tsan" in BUILD.name:
        # Of gRPC, which it cannot see into, ThreadSanitizer looks up some 10,000 reports before it suppresses them, and a
        # call waits for tenths of a second meanwhile. How long calls take is asked where it looks for nothing.
        rows_of()
        env["TSAN_OPTIONS"] = "report_bugs=0"
    best_of_three(in_time)


def test_a_client_works_again_at_once(start):
    """However long kvd was away: gRPC's pauses would have grown with it, and the client waits for a small part of it."""
    kvd = start()

    def waits(pace):
        waited = []
        for _ in range(3):
            p = subprocess.Popen([CLIENT, "reconnect", kvd.address], stdout=subprocess.PIPE, text=True)
            assert p.stdout.readline() == "ready\n"
            kvd.stop(signal.SIGKILL)
            time.sleep(1.5 * pace)
            kvd.start(wait=False)
            while kvd.text().count("ready version") < kvd.lives:
                time.sleep(0.002)
            ready = time.time()
            out, _ = p.communicate(timeout=30)
            assert p.returncode == 0
            waited.append(float(out) - ready)
        assert min(waited) < (0.2 if SANITIZER == 1 else 1) * pace, waited  # of three, as machines that run tests are busy

    at_some_pace(waits, (1, 4))


FORKS = """
import multiprocessing as mp, os, sys
import numpy as np
import kvd

def client():
    return kvd.Client(layers=[0], q_heads=2, kv_heads=1, head_dim=64, address=sys.argv[1], timeout=10)

def use(c, s):
    for call in (s.describe, c.create, lambda: c.tensor(1, 1, 1, 64), lambda: c.next_event(0.1), client):
        try:
            call()
        except kvd.PreconditionError as e:
            assert "forked" in str(e), e
        else:
            sys.exit(f"a child could {call}")

def own(address):
    sys.argv[1] = address
    with client() as c:
        c.create().free()

if __name__ == "__main__":
    c = client()
    s, t = c.create(), c.tensor(1, 4, 1, 64)
    s.append(t, t)
    if os.fork() == 0:
        sys.exit(0)  # the interpreter's end closes what is left
    assert os.wait()[1] == 0 and s.describe().length == 4
    for how, target, arguments in (("fork", use, (c, s)), ("spawn", own, sys.argv[1:2])):
        p = mp.get_context(how).Process(target=target, args=arguments)
        p.start()
        p.join(20)
        assert p.exitcode == 0, (how, p.exitcode)
    s.append(t, t)
    assert s.describe().length == 8
"""


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_forks_of_python(kvd, folder):
    (folder / "forks.py").write_text(FORKS)
    env = {**os.environ, "PYTHONPATH": str(SOURCE / "client/python"), "KVD_LIBRARY": str(BUILD / "client/libkvd.so.0")}
    r = subprocess.run([sys.executable, folder / "forks.py", kvd.address], env=env, capture_output=True, text=True, timeout=60)
    assert r.returncode == 0, r.stderr


def test_a_worker_over_mutual_tls(start, folder):
    """The same numbers, with tensors that travel with their calls in a leased session."""
    certificates(folder, server="IP:127.0.0.1,DNS:kvd.test", worker="DNS:worker", other="DNS:other")
    port = free_port()
    kvd = start("--listen", f"127.0.0.1:{port}", config=f"""
[tls]
cert = {folder}/server.pem
key = {folder}/server.key
client-ca = {folder}/ca.pem
""")
    tls = {"KVD_TEST_CA": f"{folder}/ca.pem", "KVD_TEST_CERT": f"{folder}/worker.pem", "KVD_TEST_KEY": f"{folder}/worker.key"}

    def run(program, *args, **more):
        env = {**os.environ, **tls, **more}
        env = {k: v for k, v in env.items() if v}
        return subprocess.run([program, *args], env=env, capture_output=True, text=True, timeout=60)

    address = f"127.0.0.1:{port}"
    r = run(WORKER, address)
    assert r.returncode == 0, r.stdout + r.stderr
    def works(pace, **env):
        r = run(CLIENT, "remote", address, kvd.address, KVD_TEST_LEASE_MS=str(1000 * pace), **env)
        assert r.returncode == 0, r.stdout + r.stderr

    at_some_pace(works)
    at_some_pace(lambda pace: works(pace, KVD_TEST_SERVER="kvd.test"))
    for words, wrong in (("handshake|certificate|connect", {"KVD_TEST_SERVER": "other.test"}),
                         ("handshake|certificate|connect|closed|reset", {"KVD_TEST_CERT": "", "KVD_TEST_KEY": ""}),
                         ("tls_cert and tls_key", {"KVD_TEST_KEY": ""}), ("cannot read", {"KVD_TEST_CA": f"{folder}/none.pem"}),
                         ("TLS wants tls_ca", {"KVD_TEST_CA": ""})):
        r = run(CLIENT, "remote", address, kvd.address, **wrong)
        assert r.returncode == 1 and re.search(words, r.stderr), (wrong, r.stderr)
    assert wait_for(lambda: kvd.metric("kvd_sessions") == 0, 40)
