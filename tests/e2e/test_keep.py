"""kvd that ends, by whatever signal, and what outlives it: kvd --keep. KVD_KILLS sets how often it is killed."""
import functools
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest

from conftest import BUILD, Rpc, kv, layout
from test_death import wait_for
from test_grpc import DIM, HEADS, LAYERS, append, open_session, random_kv, tensor

QUERY = np.random.default_rng(3).normal(size=(LAYERS, 1, HEADS, DIM)).astype(np.float32)


def pid_of(keeper):
    children = open(f"/proc/{keeper.process.pid}/task/{keeper.process.pid}/children").read().split()
    return int(children[0]) if children else 0


def kill(keeper, sig=signal.SIGKILL):
    """Ends kvd, not its keeper, and waits until the next one serves."""
    keeper.lives, pid = keeper.text().count("ready version") + 1, pid_of(keeper)
    assert pid, f"kvd is not there to be killed: {keeper.text()[-2000:]}"  # 0 would be this process and all of its group
    os.kill(pid, sig)
    keeper.wait_ready()


def attend(rpc, session, seq):
    item = kv.AttendItem(sequence=seq, q_len=1, q=tensor(QUERY), o=kv.TensorRef(dtype=1))
    return rpc.kv("Attend", session=session, items=[item]).results[0].o


class Load:
    """Mixed operations on published sequences, and what must be there of each: what was acknowledged, or that and what was asked
    for last."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.known = {}  # name: (length, output of attention at that length or None)
        self.asked = {}  # name: the length that it may have instead
        self.done = 0

    def names(self, held):
        return [n for n in self.known if n in held]

    def step(self, rpc, session, held):
        rng, names = self.rng, self.names(held)
        what = rng.choice(["new", "append", "append", "append", "append", "fork", "truncate"])
        if not names or (what == "new" and len(names) < 12):
            self.publish(rpc, session, held, rpc.kv("CreateSequences", session=session, count=1).sequences[0], 0)
            return
        name = rng.choice(names)
        seq, (length, _) = held[name], self.known[name]
        if what == "fork" and len(names) < 16:
            child = rpc.kv("ForkSequence", session=session, sequence=seq, count=1).sequences[0]
            self.publish(rpc, session, held, child, length)
            return
        if what == "truncate":
            self.asked[name] = rng.randrange(length + 1)
            rpc.kv("TruncateSequence", session=session, sequence=seq, length=self.asked[name])
        else:
            n = rng.choice([1, 1, 7, 40, 300])
            self.asked[name] = length + n
            append(rpc, session, seq, length, *random_kv(n))
        self.settle(rpc, session, held, name)

    def publish(self, rpc, session, held, seq, length):
        name = f"s{len(self.known)}"
        rpc.kv("PublishSequence", session=session, sequence=seq, name=name)
        held[name], self.known[name] = seq, (length, None)
        self.asked[name] = length
        self.settle(rpc, session, held, name)

    def settle(self, rpc, session, held, name):
        length = self.asked.pop(name)
        self.known[name] = (length, None)
        self.known[name] = (length, attend(rpc, session, held[name]) if length else None)
        self.done += 1

    def run(self, rpc, session, held):
        try:
            while True:
                self.step(rpc, session, held)
        except grpc.RpcError as e:
            assert e.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED), e

    def check(self, rpc, session):
        """All that was acknowledged is there, and attention over it is the same bit for bit."""
        held = {}
        for name, (length, output) in list(self.known.items()):
            info = rpc.kv("AttachSequence", session=session, name=name).sequence
            assert info.length in (length, self.asked.get(name, length)), (name, info, length, self.asked.get(name))
            held[name] = info.sequence
            if info.length == length and output is not None:
                assert attend(rpc, session, info.sequence) == output, name
            self.asked[name] = info.length
            self.settle(rpc, session, held, name)
        return held


def test_a_keeper_holds_more_than_the_usual_limit_of_open_files(start):
    """Shells and containers give 1,024 unless they are asked for more, and a pool of 80 GiB has more extents."""
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, old[1]))
    try:
        keeper = start("--keep", "--backend", "cpu", "--extent-size", "2MiB", "--pool-size", "256MiB")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
    rpc = Rpc(keeper.address)
    session, sequences = open_session(rpc, layout=layout(codec="bf16")), []
    for i in range(60):
        sequences += rpc.kv("CreateSequences", session=session, count=1).sequences
        append(rpc, session, sequences[-1], 0, *random_kv(2000))  # an extent each
        rpc.kv("PublishSequence", session=session, sequence=sequences[-1], name=f"s{i}")
    assert wait_for(lambda: len(os.listdir(f"/proc/{keeper.process.pid}/fd")) > 64)  # it takes them when it has a turn
    before = [attend(rpc, session, s) for s in sequences[::7]]
    rpc.channel.close()
    kill(keeper)
    rpc = Rpc(keeper.address)
    session = open_session(rpc, layout=layout(codec="bf16"))
    after = [rpc.kv("AttachSequence", session=session, name=f"s{i}").sequence.sequence for i in range(60)]
    assert [attend(rpc, session, s) for s in after[::7]] == before
    rpc.channel.close()


def test_killed_at_random_under_load(start):
    keeper = start("--keep")
    load, times = Load(int(os.environ.get("KVD_TEST_SEED", time.time_ns()))), []
    for _ in range(int(os.environ.get("KVD_KILLS", 6))):
        rpc = Rpc(keeper.address)
        session = open_session(rpc)
        held = load.check(rpc, session)
        thread = threading.Thread(target=load.run, args=(rpc, session, held))
        thread.start()
        time.sleep(load.rng.uniform(0.02, 0.25))
        begin = time.time()
        kill(keeper)
        times.append(time.time() - begin)
        thread.join(20)
        assert not thread.is_alive()
        rpc.channel.close()
    rpc = Rpc(keeper.address)
    load.check(rpc, open_session(rpc))
    rpc.channel.close()
    assert "took over sequences" in keeper.text()
    print(f"{len(times)} kills, {load.done} operations, {len(load.known)} sequences; until it serves again: "
          f"p50 {np.median(times):.3f} s, most {max(times):.3f} s")


def test_what_is_not_published_ends_with_kvd_and_its_session(start):
    keeper = start("--keep", config="[kvd]\nresume-time = 0\n")
    rpc = Rpc(keeper.address)
    session = open_session(rpc)
    seq = rpc.kv("CreateSequences", session=session, count=2).sequences
    for s in seq:
        append(rpc, session, s, 0, *random_kv(100))
    rpc.kv("PublishSequence", session=session, sequence=seq[0], name="p")
    rpc.channel.close()
    kill(keeper)
    assert keeper.metric("kvd_sequences") == 1
    kill(keeper, signal.SIGTERM)  # as for an upgrade: it drains, and the next one takes over
    assert keeper.metric("kvd_sequences") == 1
    keeper.process.send_signal(signal.SIGHUP)
    assert wait_for(lambda: "reload" in keeper.text())
    assert keeper.stop() == 0
    assert keeper.text().count("ready version") == 3


def test_another_configuration_is_refused_until_it_is_back(start):
    keeper = start("--keep", config="[kvd]\nmax-sequences = 100\n")
    rpc = Rpc(keeper.address)
    session = open_session(rpc)
    seq = rpc.kv("CreateSequences", session=session, count=1).sequences[0]
    append(rpc, session, seq, 0, *random_kv(100))
    rpc.kv("PublishSequence", session=session, sequence=seq, name="p")
    before = attend(rpc, session, seq)
    rpc.channel.close()
    config = keeper.folder / "kvd.conf"
    config.write_text("[kvd]\nmax-sequences = 101\n")
    keeper.lives = keeper.text().count("ready version") + 1
    os.kill(pid_of(keeper), signal.SIGKILL)
    assert wait_for(lambda: "room for 100 sequences" in keeper.text())
    assert "keep = fresh drops it" in keeper.text()
    config.write_text("[kvd]\nmax-sequences = 100\n")
    keeper.wait_ready()
    rpc = Rpc(keeper.address)
    session = open_session(rpc)
    assert attend(rpc, session, rpc.kv("AttachSequence", session=session, name="p").sequence.sequence) == before
    rpc.channel.close()


class Systemd:
    """What systemd's descriptor store does: holds what kvd sends under names, and gives it to the next one."""

    def __init__(self, folder):
        self.path = folder / "notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))
        self.held, self.takes, self.lock, self.ends = {}, True, threading.Lock(), False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.ends:
            select.select([self.socket], [], [], 0.05)
            self.read()

    def read(self):
        with self.lock:
            while select.select([self.socket], [], [], 0)[0]:
                self.take(*socket.recv_fds(self.socket, 4096, 4)[:2])

    def take(self, text, fds):
        fields = dict(line.split("=", 1) for line in text.decode().splitlines() if "=" in line)
        if fields.get("FDNAME") in self.held:
            os.close(self.held.pop(fields["FDNAME"]))
        if "FDSTORE" in fields and self.takes:
            self.held[fields["FDNAME"]] = fds[0]
        else:
            for fd in fds:
                os.close(fd)

    def close(self):
        self.ends = True
        self.thread.join()
        for fd in self.held.values():
            os.close(fd)
        self.socket.close()

    def arguments(self):
        """Of a Daemon that gets what is held as descriptors 3 and on."""
        names, fds = list(self.held), list(self.held.values())
        moves = " ".join(f"{100 + i}<&{fd}" for i, fd in enumerate(fds)) + " " + " ".join(
            f"{3 + i}<&{100 + i}" for i in range(len(fds)))
        script = f'exec {moves}; export LISTEN_PID=$$; exec "$@"' if fds else 'exec "$@"'
        for fd in fds:
            os.set_inheritable(fd, True)
        return {"prefix": ("bash", "-c", script, "bash"), "env": {"NOTIFY_SOCKET": str(self.path), **({
            "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)} if fds else {})}}


def test_systemds_descriptor_store(start, folder, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", functools.partial(subprocess.Popen, close_fds=False))
    systemd = Systemd(folder)
    kvd = start("--keep", **systemd.arguments())
    commands = BUILD / "compile_commands.json"
    if not commands.exists() or "SYSTEMD" not in commands.read_text():
        pytest.skip("built without systemd")
    rpc = Rpc(kvd.address)
    session = open_session(rpc)
    seq = rpc.kv("CreateSequences", session=session, count=1).sequences[0]
    append(rpc, session, seq, 0, *random_kv(700))
    rpc.kv("PublishSequence", session=session, sequence=seq, name="p")
    before = attend(rpc, session, seq)
    rpc.channel.close()
    kvd.stop(signal.SIGKILL)
    systemd.read()
    assert "kvd-pool" in systemd.held and any(n.startswith("kvd-extent-") for n in systemd.held)
    kvd = start("--keep", **systemd.arguments())
    assert "took over sequences=1 tokens=700" in kvd.text()
    assert kvd.metric("kvd_keep_unheld") == 0 and "holds nothing" not in kvd.text()
    rpc = Rpc(kvd.address)
    session = open_session(rpc)
    assert attend(rpc, session, rpc.kv("AttachSequence", session=session, name="p").sequence.sequence) == before
    rpc.channel.close()
    kvd.stop(signal.SIGKILL)
    systemd.read()
    kvd = start("--keep=fresh", **systemd.arguments())
    assert kvd.metric("kvd_sequences") == 0
    assert kvd.stop() == 0
    systemd.read()
    # Of the new one, which on a GPU makes extents ahead of need.
    assert sorted(n for n in systemd.held if "extent-" not in n) == ["kvd-address-0", "kvd-extents", "kvd-pool", "kvd-probe", "kvd-sessions"]
    assert kvd.on_gpu() or not any("extent-" in n for n in systemd.held)
    systemd.close()


def test_who_takes_no_descriptors_is_told_of(start, folder):
    """As a container's NOTIFY_SOCKET, or a unit without FileDescriptorStoreMax."""
    commands = BUILD / "compile_commands.json"
    if not commands.exists() or "SYSTEMD" not in commands.read_text():
        pytest.skip("built without systemd")
    systemd = Systemd(folder)
    systemd.takes = False
    kvd = start("--keep", **systemd.arguments())
    assert wait_for(lambda: "keep holds nothing" in kvd.text())
    assert kvd.metric("kvd_keep_unheld") == 1
    assert kvd.stop() == 0
    systemd.close()


def test_a_first_kvd_that_cannot_start_ends_its_keeper(start, folder):
    keeper = start("--keep")
    r = subprocess.run([*keeper.command, "--metrics", ""], capture_output=True, text=True, timeout=20, env=keeper.env)
    assert r.returncode == 69 and "another kvd serves" in r.stdout + r.stderr, (r.returncode, r.stderr)
    r = subprocess.run([BUILD / "daemon/kvd-keeper"], capture_output=True, text=True, timeout=20)
    assert r.returncode == 64 and "usage" in r.stderr


def test_kvd_ends_with_its_keeper(start):
    keeper = start("--keep")
    pid = pid_of(keeper)
    keeper.process.kill()
    assert wait_for(lambda: not os.path.exists(f"/proc/{pid}"))
    keeper.process.wait(10)


def test_a_kvd_that_ends_soon_again_and_again_is_not_started_all_the_time(folder):
    """It serves and ends, each time: some 30 times at once, then with pauses of 0.05, 0.1, 0.2, 0.4 and 0.8 s. One that lives for a second,
    as where the machine is busy, begins anew."""

    def paused():
        times = [float(line) for line in starts.read_text().split()] if starts.exists() else []
        gaps = [b - a for a, b in zip(times, times[1:])]
        return [i for i in range(at_once, len(gaps) - 4) if all(gap >= 0.05 * 2 ** n for n, gap in enumerate(gaps[i:i + 5]))]

    starts, at_once = folder / "starts", 30
    fake = folder / "fake.py"
    fake.write_text(f"""#!{sys.executable} -S
import os, socket, struct, time
with open({str(starts)!r}, "a") as f:
    f.write(str(time.monotonic()) + "\\n")
keeper = socket.socket(fileno=int(os.environ["KVD_KEEPER"]))
keeper.send(struct.pack("II32s", 0x50454b4b, 4, b""))
""")
    fake.chmod(0o755)
    keeper = subprocess.Popen([BUILD / "daemon/kvd-keeper", fake], stderr=subprocess.DEVNULL)
    try:
        assert wait_for(paused, 60)
    finally:
        keeper.terminate()
        keeper.wait(10)


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_blocks_of_prompts_outlive_kvd(start):
    """Killed while prompts are published, found, adopted and evicted: what is found afterwards gives the bits that it gave before."""
    import kvd as package
    from test_prefix import connect, step, tokens_of

    keeper = start("--keep", "--pool-size", "8MiB", "--extent-size", "2MiB")
    prompts = [tokens_of(i, 448) for i in range(6)]  # 3 blocks each, and what comes after them
    rng, want, found, published = random.Random(int(os.environ.get("KVD_TEST_SEED", time.time_ns()))), {}, [], []

    def go_on(c, i):
        m = c.match([package.Prompt(prompts[i][:192])])[0]
        if m.blocks < 3:
            return False
        s = c.adopt(m)
        out = step(c, s, prompts[i], 200)
        s.free()
        assert np.array_equal(out, want.setdefault(i, out)), i
        return True

    def work(c, stop):
        try:
            while not stop.is_set():
                i = rng.randrange(len(prompts))
                if not go_on(c, i):
                    s = c.create()
                    step(c, s, prompts[i], 448)
                    published.append(s.publish_blocks(package.Prompt(prompts[i])))
                    s.free()
        except package.Error:
            pass

    for _ in range(int(os.environ.get("KVD_KILLS", 4))):
        with connect(keeper) as c:
            found.append(sum(go_on(c, i) for i in range(len(prompts))))
            stop = threading.Event()  # it may go on with its session, or be refused
            thread = threading.Thread(target=work, args=(c, stop))
            thread.start()
            time.sleep(rng.uniform(0.1, 0.6))
            assert wait_for(lambda: published, 30)
            kill(keeper)
            stop.set()
            thread.join(20)
            assert not thread.is_alive()
    with connect(keeper) as c:
        found.append(sum(go_on(c, i) for i in range(len(prompts))))
        assert found[0] == 0 and found[-1] > 0, found
        keeper.kvctl("prefix", "drop", "default", "--yes")
    kill(keeper)
    with connect(keeper) as c:
        assert not any(go_on(c, i) for i in range(len(prompts)))


def test_a_keeper_that_is_not_there(tmp_path):
    """keep without systemd wants kvd-keeper beside kvd: who has copied or built kvd alone is told so."""
    shutil.copy(BUILD / "daemon" / "kvd", tmp_path / "kvd")
    if (tmp_path / "kvd").read_bytes()[:2] == b"#!":
        pytest.skip("the kvd of a bundle, which has kvd-keeper beside it")
    r = subprocess.run([tmp_path / "kvd", "--keep", "--listen", f"unix:{tmp_path}/kvd.sock", "--metrics", ""], capture_output=True, text=True, timeout=60,
                       env={"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": f"{BUILD}/kernels"})
    assert r.returncode not in (0, 64) and f"cannot become {tmp_path}/kvd-keeper: No such file or directory; keep wants kvd-keeper beside kvd" in r.stderr
