"""Fixtures: a real kvd process per test (or shared per module), spoken to over real sockets.

Environment: KVD_BUILD (the build folder), KVD_SOURCE (the checkout), KVD_PROGRAM (another kvd than the build's). Every process started here is stopped by its pid.
"""
import contextlib
import importlib
import inspect
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

import pytest

SOURCE = pathlib.Path(os.environ.get("KVD_SOURCE", pathlib.Path(__file__).parents[2])).resolve()
BUILD = pathlib.Path(os.environ.get("KVD_BUILD", SOURCE / "build")).resolve()
KVD = pathlib.Path(os.environ.get("KVD_PROGRAM", BUILD / "daemon/kvd")).absolute()
KVCTL, WORKER = BUILD / "client/kvctl", BUILD / "tests/e2e_worker"
EMULATED = KVD.name.startswith("kvd_emulated")  # kvd's GPU is one that the processor plays, and workers' libkvd has such a one too
DIRECT = KVD.with_name(KVD.name.replace("kvd_emulated", "e2e_direct_emulated")) if EMULATED else BUILD / "tests/e2e_direct"
if EMULATED:
    os.environ.setdefault("KVD_LIBRARY", str(KVD.with_name(f"lib{KVD.name}.so")))


MODULES = ("kvd.v1.kvd_pb2", "kvd.v1.admin_pb2", "kvd_health_pb2")


def _stubs():
    if "KVD_STUBS" in os.environ:  # made elsewhere, for a machine without protoc
        sys.path.insert(0, os.environ["KVD_STUBS"])
        return [importlib.import_module(m) for m in MODULES]
    out = pathlib.Path(tempfile.mkdtemp(prefix="kvd-stubs."))
    protos = ["kvd/v1/kvd.proto", "kvd/v1/admin.proto", "grpc/health/v1/health.proto"]
    subprocess.run(["protoc", f"-I{SOURCE}/proto", f"--python_out={out}", *protos], check=True, cwd=SOURCE / "proto")
    # grpcio has a package named grpc too: the health stubs move out of its way.
    shutil.move(out / "grpc/health/v1/health_pb2.py", out / "kvd_health_pb2.py")
    sys.path.insert(0, str(out))
    modules = [importlib.import_module(m) for m in MODULES]
    shutil.rmtree(out)
    return modules


sys.path.insert(0, str(SOURCE / "client/python"))  # the package kvd: stubs are modules kvd.v1.* of it
kv, admin, health = _stubs()


def cached(model, cache):
    """The argument that a cache is; its name depends on the release of transformers."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes more than ten seconds, and is skipped with KVD_NOT_LONG=1")
    config.addinivalue_line("markers", "long_emulated: the same on an emulated GPU")


def pytest_collection_modifyitems(items):
    if os.environ.get("KVD_NOT_LONG"):
        for item in items:
            if item.get_closest_marker("long") or (EMULATED and item.get_closest_marker("long_emulated")):
                item.add_marker(pytest.mark.skip(reason="takes long: tests/run.sh whole"))


class Daemon:
    """A kvd process on a unix socket in a folder of its own."""

    def __init__(self, folder, *args, config=None, wait=True, env=None, prefix=()):
        self.folder = pathlib.Path(folder)
        self.socket = self.folder / "s"
        self.address = f"unix:{self.socket}"
        self.log = self.folder / "log"
        command = [*prefix, str(KVD), "--listen", self.address, "--metrics", "127.0.0.1:0", "--cache",
                   str(self.folder / "cache"), "--pool-size", "256MiB",
                   "--drain-timeout", "200ms"]
        if config is not None:
            if "tier-" in config and "tier-timeout" not in config:  # one that is slow for a second hangs; here the machine may be
                config = config.replace("[kvd]\n", "[kvd]\ntier-timeout = 20s\n", 1)
            (self.folder / "kvd.conf").write_text(config)
            command += ["--config", str(self.folder / "kvd.conf")]
        self.command = command + list(args)
        self.env = {**os.environ, "KVD_VERIFY_POOL": "1", **(env or {})}
        self.process = None
        self.start(wait)

    def start(self, wait=True):
        self.lives = self.text().count("ready version") + 1
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stderr=log, stdout=log, env=self.env)
        if wait:
            self.wait_ready()

    def wait_ready(self, timeout=20):
        end = time.time() + timeout
        while time.time() < end:
            if self.text().count("ready version") >= self.lives:
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        raise AssertionError(f"kvd did not become ready: {self.text()}")

    def text(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def on_gpu(self):
        return "backend=cuda" in self.text()

    def metrics_port(self):
        line = [l for l in self.text().splitlines() if "ready version" in l][-1]
        return int(line.split("metrics=127.0.0.1:")[1].split()[0])

    def stop(self, sig=signal.SIGTERM, timeout=20):
        """ThreadSanitizer holds a signal back until its thread calls something that it knows, and gRPC's threads wait in system calls of
        their own. One of these gets the signal where the main thread has another to handle first, such as SIGCONT: so it is sent again."""
        patience = 3 if "tsan" in BUILD.name else timeout
        for _ in range(max(1, timeout // patience)):
            if self.process.poll() is None:
                self.process.send_signal(sig)
            try:
                return self.process.wait(patience)
            except subprocess.TimeoutExpired:
                pass
        threads = sorted((t / "wchan").read_text() or "runs" for t in pathlib.Path(f"/proc/{self.process.pid}/task").iterdir())
        state = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        self.process.kill()
        self.process.wait()
        raise AssertionError(f"kvd did not end within {timeout} s of signal {sig}; state {state}, threads {threads}: {self.text()[-3000:]}")

    def kvctl(self, *args, check=True, env=None):
        r = subprocess.run([str(KVCTL), "--address", self.address, "--timeout", "40", *map(str, args)],
                           capture_output=True, text=True, timeout=60, env={**os.environ, **(env or {})})
        if check:
            assert r.returncode == 0, r.stderr
        return r

    def metric(self, name):
        for line in self.kvctl("metrics").stdout.splitlines():
            if line.startswith(name + " "):
                return float(line.split()[-1])
        return None


@pytest.fixture
def folder():
    path = tempfile.mkdtemp(prefix="kvd-test.")
    yield pathlib.Path(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def start(folder):
    """start(*args, **kw) -> Daemon; a clean exit is part of every test that does not kill it."""
    daemons = []

    def make(*args, **kw):
        daemons.append(Daemon(folder, *args, **kw))
        return daemons[-1]

    yield make
    for d in daemons:
        if d.process.poll() is None:
            code = d.stop()
            assert code == 0, f"kvd exited with {code}: {d.text()[-3000:]}"
        assert "Sanitizer" not in d.text(), d.text()[-6000:]
        assert "leak" not in d.text(), d.text()[-3000:]


@pytest.fixture
def kvd(start):
    return start()


class Rpc:
    """Calls by name over a plain grpcio channel, as any gRPC client would."""

    def __init__(self, address, **kw):
        import grpc

        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1),
                   ("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(address, options=options) if not kw else grpc.secure_channel(
            address, kw["credentials"], options=options + kw.get("options", []))

    def call(self, service, method, request, reply, timeout=20, metadata=None):
        f = self.channel.unary_unary(f"/{service}/{method}", request_serializer=lambda m: m.SerializeToString(),
                                     response_deserializer=reply.FromString)
        return f(request, timeout=timeout, metadata=metadata)

    def kv(self, method, timeout=20, **fields):
        request = getattr(kv, REQUESTS.get(method, method + "Request"))(**fields)
        return self.call("kvd.v1.KvCache", method, request, getattr(kv, REPLIES.get(method, method + "Reply")), timeout)

    def admin(self, method, metadata=None, **fields):
        name = {"GetStatus": "Status"}.get(method, method)
        return self.call("kvd.v1.Admin", method, getattr(admin, name + "Request")(**fields),
                         getattr(admin, name + "Reply"), metadata=metadata)

    def stream(self, method, **fields):
        f = self.channel.unary_stream(f"/kvd.v1.KvCache/{method}", request_serializer=lambda m: m.SerializeToString(),
                                      response_deserializer=kv.Event.FromString)
        return f(getattr(kv, method + "Request")(**fields))


@contextlib.contextmanager
def calls(daemon):
    rpc = Rpc(daemon.address)
    try:
        yield rpc
    finally:
        rpc.channel.close()


REQUESTS = {}
REPLIES = {"CreateSequences": "SequencesReply", "ForkSequence": "SequencesReply", "Step": "AttendReply"}


@pytest.fixture
def rpc(kvd):
    r = Rpc(kvd.address)
    yield r
    r.channel.close()


def layout(**kw):
    g = dict(layers=[0, 1], q_heads=4, kv_heads=2, head_dim_k=64, head_dim_v=64, codec="int2")
    g.update(kw)
    return kv.Layout(**g)


_ports = []


def free_port():
    """One that nobody else gets before it is listened on: it is below those that the kernel hands out, and tests beside this one leave it
    alone, as a socket of its name is held until this process ends."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as f:
        end = max(int(f.read().split()[0]), 20000)
    while True:
        port, mark = random.SystemRandom().randrange(10000, end), socket.socket(socket.AF_UNIX)
        with socket.socket() as s, contextlib.suppress(OSError):
            mark.bind(f"\0kvd-test-port-{port}")
            s.bind(("127.0.0.1", port))
            _ports.append(mark)
            return port
        mark.close()


def at_some_pace(check, paces=(1, 5, 25)):
    """check(pace), with times that are so many times as long. For tests of what ends in time: where the machine is slower than that once, it
    is asked again at a slower pace, and what does not depend on the machine fails at each of them."""
    for pace in paces[:-1]:
        try:
            return check(pace)
        except (Exception, pytest.fail.Exception):
            traceback.print_exc()
    return check(paces[-1])


def best_of_three(check):
    """For tests of how long something takes beside something else: one stall of the machine makes it longer, what is wrong does so each time."""
    at_some_pace(lambda _: check(), (1, 1, 1))


def certificates(folder, **names):
    """ca.pem, and NAME.pem and NAME.key for each name, whose value is its subjectAltName."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")

    def openssl(*args):
        subprocess.run(["openssl", *args], check=True, capture_output=True, cwd=folder)

    curve = ("-pkeyopt", "ec_paramgen_curve:P-256")
    openssl("req", "-x509", "-newkey", "ec", *curve, "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=ca")
    for name, san in names.items():
        openssl("req", "-newkey", "ec", *curve, "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "ext").write_text(f"subjectAltName={san}\n")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
                "-out", f"{name}.pem", "-extfile", "ext")
