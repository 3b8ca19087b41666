"""Starting, refusing, reloading, draining; and the worker library as a separate process."""
import os
import signal
import subprocess
import sys
import time

import grpc
import pytest

from conftest import KVCTL, KVD, WORKER, Daemon, Rpc, layout
from test_death import wait_for


@pytest.mark.parametrize("codec", ["int2", "bf16", "int2c", "int2-lm", "turboquant-2", "turboquant-3", "turboquant-4", "tc2", "tc2.5"])
def test_a_worker_through_libkvd(kvd, codec):
    r = subprocess.run([WORKER, kvd.address, codec], capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr + r.stdout
    assert kvd.metric("kvd_sequences") == 0


def test_several_workers_at_once(kvd):
    ps = [subprocess.Popen([WORKER, kvd.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for p in ps:
        out, err = p.communicate(timeout=180)
        assert p.returncode == 0, err


def test_scalar_kernels_serve_too(start):
    kvd = start("--backend", "cpu", "--isa", "scalar", "--threads", "1")
    assert "scalar" in kvd.kvctl("status").stdout
    assert subprocess.run([WORKER, kvd.address], timeout=300).returncode == 0


def test_a_second_daemon_is_refused_and_a_stale_socket_is_not_in_the_way(kvd, folder):
    r = subprocess.run([KVD, "--listen", kvd.address, "--metrics", ""], capture_output=True, text=True, timeout=20)
    assert r.returncode != 0 and "another kvd serves" in r.stderr
    kvd.kvctl("ping", 1)
    kvd.stop(signal.SIGKILL)
    assert kvd.socket.exists()
    kvd.start()
    kvd.kvctl("ping", 1)
    assert "removing stale socket" in kvd.text()
    assert kvd.stop() == 0 and not kvd.socket.exists()


def test_something_else_in_the_sockets_place_stays(folder):
    (folder / "s").write_text("precious")
    r = subprocess.run([KVD, "--listen", f"unix:{folder}/s", "--metrics", ""], capture_output=True, text=True, timeout=20)
    assert r.returncode != 0 and "not a socket" in r.stderr
    assert (folder / "s").read_text() == "precious"


def test_reload(start):
    kvd = start(config="[kvd]\nlog-level = info\n[namespace a]\nquota = 1MiB\n")
    (kvd.folder / "kvd.conf").write_text("[kvd]\nlog-level = debug\n[namespace a]\nquota = 2MiB\n")
    kvd.process.send_signal(signal.SIGHUP)
    assert wait_for(lambda: "configuration reloaded" in kvd.text())
    assert "2.00 MiB" in kvd.kvctl("quota", "ls").stdout
    assert "log level debug" in kvd.kvctl("status").stdout
    (kvd.folder / "kvd.conf").write_text("[kvd]\nlog-level = debug\nbroken\n")
    kvd.process.send_signal(signal.SIGHUP)
    assert wait_for(lambda: "the old configuration stays" in kvd.text())
    kvd.kvctl("ping", 1)


READS_NOTHING = """
import os, signal, sys
from conftest import Rpc, kv
from test_grpc import append, open_session, random_kv
rpc = Rpc(sys.argv[1])
session = open_session(rpc)
seq = rpc.kv("CreateSequences", session=session, count=1).sequences[0]
append(rpc, session, seq, 0, *random_kv(2000))
read = rpc.channel.unary_unary("/kvd.v1.KvCache/ReadTokens", request_serializer=kv.ReadTokensRequest.SerializeToString)
calls = [read.future(kv.ReadTokensRequest(session=session, sequence=seq, tokens=2000), timeout=60) for _ in range(30)]
calls[0].result()
print("read one", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_worker_that_is_stopped_does_not_hold_up_the_end(start):
    """It has asked for more than its socket holds, and reads none of it."""
    kvd = start()
    worker = subprocess.Popen([sys.executable, "-c", READS_NOTHING, kvd.address], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])})
    try:
        assert worker.stdout.readline() == "read one\n"
        began = time.time()
        assert kvd.stop() == 0
        assert time.time() - began < 15  # drain-timeout is 200 ms, reply-timeout 30 s
    finally:
        worker.kill()
        worker.wait()


def test_drain_waits_for_workers(start):
    kvd = start("--drain-timeout", "60s")
    rpc = Rpc(kvd.address)
    s = rpc.kv("OpenSession", layout=layout()).session
    events = rpc.stream("Watch", session=s)
    next(events)
    kvd.process.send_signal(signal.SIGTERM)
    assert next(events).kind == 2  # DRAINING
    with pytest.raises(grpc.RpcError) as e:
        rpc.kv("OpenSession", layout=layout())
    assert e.value.code().name == "UNAVAILABLE"
    rpc.kv("CreateSequences", session=s, request_id=1, count=1)  # an open session goes on
    time.sleep(1)  # longer than it would take to say farewell to nobody
    assert kvd.process.poll() is None
    rpc.kv("CloseSession", session=s)
    assert kvd.process.wait(30) == 0  # half of drain-timeout


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU")
def test_cuda_is_refused_honestly(folder):
    r = subprocess.run([KVD, "--backend", "cuda", "--listen", f"unix:{folder}/s"], capture_output=True, text=True)
    assert r.returncode != 0 and "cuda" in r.stderr and "backend cpu needs no GPU" in r.stderr


def test_sd_notify(folder):
    import socket

    if "systemd" not in subprocess.run(["ldd", KVD], capture_output=True, text=True).stdout:
        pytest.skip("built without libsystemd")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.bind(str(folder / "notify"))
        s.settimeout(10)
        kvd = Daemon(folder, env={"NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "400000"})
        assert b"READY=1" in s.recv(4096)
        assert s.recv(4096) == b"WATCHDOG=1" and s.recv(4096) == b"WATCHDOG=1"
        kvd.process.send_signal(signal.SIGTERM)
        while s.recv(4096) != b"STOPPING=1":
            pass
        assert kvd.process.wait(10) == 0


def test_clients_survive_a_restart(kvd, folder):
    """A worker that is in the middle of its work when the daemon is killed gets a clear error, not a hang."""
    p = subprocess.Popen([WORKER, kvd.address], stderr=subprocess.PIPE, text=True)
    while "session opened" not in kvd.text() and p.poll() is None:
        time.sleep(0.01)
    time.sleep(0.15)
    kvd.stop(signal.SIGKILL)
    kvd.start()
    _, err = p.communicate(timeout=60)
    assert p.returncode == 0 or "the session was lost" in err, err
    assert subprocess.run([WORKER, kvd.address], timeout=100).returncode == 0
    assert os.path.exists(KVCTL)
