"""The Python package and processes: forked children, multiprocessing, pickles; and what objects say of themselves."""
import copy
import inspect
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import traceback
import typing

import pytest

import kvd as package
from conftest import SOURCE, Daemon
from test_python import DIM, KV_HEADS, LAYERS, Q_HEADS, connect, fill, values


def forked(work):
    """Runs work in a child made by os.fork, which then exits as Python does. Its status: 0 if all was well."""
    pid = os.fork()
    if pid:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return "the child hangs"
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def refused(*calls):
    for call in calls:
        with pytest.raises(package.PreconditionError, match="belongs to process .*spawn"):
            call()


def test_fork(kvd):
    """A child is told that what it has is the parent's, and its end leaves the parent's session alone."""
    with connect(kvd, codec="bf16") as client:
        s = client.create()
        k = fill(client, values(1, LAYERS, 5, KV_HEADS, DIM))
        q, o = client.tensor(LAYERS, 5, Q_HEADS, DIM), client.tensor(LAYERS, 5, Q_HEADS, DIM, dtype="f32")
        s.append(k, k)
        direct = None if client.on_gpu else package.Direct(client, slots=1, max_tokens=100)
        objects = [client, s, k, q, o, direct]

        def child():
            refused(client.create, lambda: client.info, lambda: client.tensor(1, 1, 1, 64), lambda: s.append(k, k), s.describe,
                    lambda: s.attend(q, o), lambda: k.array, lambda: k[:1], lambda: client.next_event(0), lambda: client.attach("x"),
                    lambda: s.free(), lambda: s.fork())
            if direct:
                refused(direct.begin, lambda: direct.bind(0, s))
                direct.close()
            k.free()
            client.close()  # as at the end of a with block
            objects.clear()
            for x in (client, s, k):
                assert "kvd." in repr(x)

        assert forked(child) == 0
        p = multiprocessing.get_context("fork").Process(target=nothing)  # a child that ends as Python's programs do
        p.start()
        p.join(30)
        assert p.exitcode == 0
        if direct:
            direct.close()
        assert s.describe().length == 5 and s.describe().holders == 1
        s.append(k, k)
        s.attend(q, o)
        assert s.describe().length == 10
        assert kvd.metric("kvd_sessions") == 1


def nothing():
    pass


SPAWN = """
import multiprocessing, sys
import numpy as np
import kvd


def connect():
    return kvd.Client(layers=range(2), q_heads=4, kv_heads=2, head_dim=64, address=sys.argv[1], codec="bf16")


def tail_of(name, answer):
    with connect() as client:
        s = client.attach(name)
        k = client.tensor(2, 1, 2, 64)
        s.read(s.length - 1, 1, k=k)
        answer.send(k.array.floats())


if __name__ == "__main__":
    with connect() as client:
        s, k = client.create(), client.tensor(2, 8, 2, 64)
        k.array[:] = np.random.default_rng(1).normal(size=k.shape)
        s.append(k, k)
        s.publish("shared")
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        child = context.Process(target=tail_of, args=("shared", there))
        child.start()
        assert here.poll(20)
        assert np.array_equal(here.recv(), k.array[:, 7:].floats())
        child.join(20)
        assert child.exitcode == 0 and s.describe().length == 8
        print("shared")
"""


def test_spawned_processes_share_sequences(kvd, folder):
    """What is to be done instead: a client in each process."""
    (folder / "spawn.py").write_text(SPAWN)
    r = subprocess.run([sys.executable, folder / "spawn.py", kvd.address], capture_output=True, text=True, timeout=60,
                       env={**os.environ, "PYTHONPATH": str(SOURCE / "client/python")})
    assert r.stdout == "shared\n", r.stderr


def test_what_cannot_be_pickled(kvd):
    with connect(kvd) as client:
        for thing in (client, client.create(), client.tensor(1, 1, 1, 64)):
            for way in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match="belongs to its process"):
                    way(thing)


STUBS = """
import sys
for x in sys.argv[1].split(","):
    if x == "kvd":
        import kvd
        kvd.Client
    elif x == "stubs":
        import kvd.v1.kvd_pb2 as pb
        pb.AppendItem(position=1)
    else:
        sys.path.insert(0, x)
print(kvd.__name__, pb.__name__)
"""


@pytest.mark.parametrize("order", ["{package},{stubs},kvd,stubs", "{stubs},{package},stubs,kvd", "{package},kvd,{stubs},stubs"])
def test_stubs_of_the_protocol_beside_the_package(folder, order):
    """protoc's modules for kvd/v1/*.proto and this package share the name kvd."""
    if not shutil.which("protoc"):
        pytest.skip("there is no protoc")
    subprocess.run(["protoc", f"-I{SOURCE}/proto", f"--python_out={folder}", "kvd/v1/kvd.proto"], check=True, cwd=SOURCE / "proto")
    order = order.format(package=SOURCE / "client/python", stubs=folder)
    r = subprocess.run([sys.executable, "-c", STUBS, order], capture_output=True, text=True, timeout=30, env={**os.environ, "PYTHONPATH": ""})
    assert r.stdout == "kvd kvd.v1.kvd_pb2\n", r.stderr


def test_type_hints_are_complete():
    """What py.typed promises: every public function and method has hints for all it takes and returns, and they name what exists."""
    public = [getattr(package, n) for n in package.__all__]
    functions = [f for f in public if inspect.isfunction(f)]
    for kind in (k for k in public if inspect.isclass(k)):
        functions += [f for n, f in vars(kind).items() if inspect.isfunction(f) and (not n.startswith("_") or n in ("__init__", "__getitem__"))]
        functions += [p.fget for p in vars(kind).values() if isinstance(p, property)]
    assert len(functions) > 40
    for f in functions:
        hints = typing.get_type_hints(f, {**vars(sys.modules[f.__module__]), **{n: getattr(package, n) for n in package.__all__}})
        wanted = {*inspect.signature(f).parameters, "return"} - {"self", "return" if f.__name__ == "__init__" else "self"}
        missing = sorted(wanted - set(hints))
        assert not missing, (f.__qualname__, missing)


def test_what_objects_say(kvd):
    client = connect(kvd, codec="int2")
    s, t = client.create(), client.tensor(1, 2, KV_HEADS, DIM)
    s.append(client.tensor(LAYERS, 7, KV_HEADS, DIM), client.tensor(LAYERS, 7, KV_HEADS, DIM))
    assert repr(client) == f"<kvd.Client {kvd.address} int2: 3 layers, 6 q heads, 2 kv heads, head_dim 64>"
    assert repr(s) == f"<kvd.Sequence {s.id}, 7 tokens>"
    assert repr(t) == "<kvd.Tensor bf16 [1, 2, 2, 64]>"
    t.array[:] = 1.5
    assert repr(t.array[0, 0, 0, :2]) == "Bf16Array([1.5, 1.5])" and str(t.array[0, 0, 0, :2]) == "[1.5 1.5]"
    if not client.on_gpu:
        with package.Direct(client, slots=3, max_tokens=100) as direct:
            direct.bind(1, s)
            assert repr(direct) == "<kvd.Direct 3 slots, 1 bound>"
        assert repr(direct) == "<kvd.Direct 3 slots, 1 bound, closed>"
    t.free()
    client.close()
    assert repr(t) == "<kvd.Tensor bf16 [1, 2, 2, 64], freed>" and repr(client).endswith(", closed>")


def test_the_daemon_is_found(start, folder):
    """Without an address: the one that listens under /run/kvd, where systemd's units do."""
    runtime = folder / "run"

    def listens(name, daemon):
        (runtime / name).mkdir(parents=True)
        for end in ("", ".fd"):
            (runtime / name / f"kvd.sock{end}").symlink_to(daemon.address[len("unix:"):] + end)
        return daemon

    def worker(**env):
        program = "import kvd\nwith kvd.Client(layers=[0], q_heads=1, kv_heads=1, head_dim=64) as c: print(c.info['instance'])"
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
                              env={**os.environ, "KVD_RUNTIME_DIR": str(runtime), "KVD_ADDRESS": "", "PYTHONPATH": str(SOURCE / "client/python"),
                                   **env})

    r = worker()
    assert "UnavailableError: no kvd listens under" in r.stderr and str(runtime) in r.stderr
    one = listens("0", start())
    r = worker()
    said = r.stdout
    assert said and said == worker(KVD_ADDRESS=one.address).stdout, r.stderr
    (folder / "b").mkdir()
    two = listens("1", Daemon(folder / "b"))
    try:
        r = worker()
        assert "InvalidError: there are 2 daemons" in r.stderr and f"unix:{runtime}/1/kvd.sock" in r.stderr
        assert worker(KVD_ADDRESS=one.address).stdout == said != worker(KVD_ADDRESS=two.address).stdout
    finally:
        assert two.stop() == 0
