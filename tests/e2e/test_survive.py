"""Workers that go on while kvd is killed, again and again: they see no error, and nothing is lost. KVD_KILLS sets how often, KVD_FILL_GIB
how much of the pool is in use beside what they do."""
import os
import random
import signal
import struct
import threading
import time

import grpc
import numpy as np
import pytest

import kvd as package
from conftest import BUILD, EMULATED, Rpc
from on_device import place
from test_death import FdSocket, wait_for
from test_keep import kill, pid_of
from test_python import DIM, KV_HEADS, LAYERS, Q_HEADS, connect, fill, values

KILLS, FILL_GIB = int(os.environ.get("KVD_KILLS", 6)), int(os.environ.get("KVD_FILL_GIB", 0))
PUBLISHED = 10


class Worker(threading.Thread):
    """Does something until it is told to stop; what it raises is the test's."""

    def __init__(self, keeper, seed):
        super().__init__(daemon=True)
        self.keeper, self.rng, self.stop, self.failure, self.done = keeper, random.Random(seed), False, None, 0
        self.client = connect(keeper, timeout=60)

    def run(self):
        try:
            while not self.stop:
                self.step()
                self.done += 1
            self.end()
        except BaseException as e:  # noqa: B036
            self.failure = e
        finally:
            self.client.close()

    def end(self):
        pass


class Mixed(Worker):
    """Sequences, published and not, that grow, shrink, fork, are attached and go; and what each of them must give."""

    def __init__(self, keeper, seed):
        super().__init__(keeper, seed)
        self.name = f"w{seed}"
        self.query = fill(self.client, values(seed, LAYERS, 1, Q_HEADS, DIM))
        self.out = self.client.tensor(LAYERS, 1, Q_HEADS, DIM, dtype="f32")
        self.k, self.v = (self.client.tensor(LAYERS, 300, KV_HEADS, DIM) for _ in "kv")
        self.known = []  # [sequence, length, output]
        self.published = 0

    def output(self, sequence):
        self.client.attend([package.Item(sequence, q=self.query, o=self.out)])
        return self.out.array.tobytes()

    def note(self, entry):
        entry[2] = None  # until it is known
        info = entry[0].describe()
        assert info.length == entry[0].length == entry[1], (info, entry[:2])
        entry[2] = self.output(entry[0]) if entry[1] else None

    def tokens(self):
        n = self.rng.choice([1, 1, 7, 40, 300])
        for t in (self.k, self.v):
            t.array[:, :n] = package.to_bf16(np.random.default_rng(self.rng.getrandbits(32)).normal(size=(LAYERS, n, KV_HEADS, DIM)))
        return self.k[:, :n], self.v[:, :n]

    def step(self):
        what = self.rng.choice(["create", "append", "append", "step", "fork", "truncate", "publish", "free", "check", "check", "evict"])
        if what == "create" or not self.known:
            entry = [self.client.create(), 0, None]
            self.known.append(entry)
        elif what == "evict":
            self.evict()
            return
        else:
            entry = self.rng.choice(self.known)
        sequence, length, output = entry
        if what == "append":
            k, v = self.tokens()
            sequence.append(k, v)
            entry[1] += k.array.shape[1]
        elif what == "step":
            k, v = self.tokens()
            sequence.step(self.query, k[:, :1], v[:, :1], self.out)
            entry[1] += 1
        elif what == "fork":
            entry = [sequence.fork()[0], length, output]
            self.known.append(entry)
        elif what == "truncate":
            to = self.rng.randrange(length + 1)
            sequence.truncate(to)
            entry[1] = to
        elif what == "publish":
            name = f"{self.name}.{self.rng.randrange(PUBLISHED)}"
            sequence.publish(name, replace=True)
            other = self.client.attach(name)
            assert other.id == sequence.id and other.length == length
            other.free()
        elif what == "check" and output:
            assert self.output(sequence) == output
            return
        if what == "free" or len(self.known) > 12:
            self.known.remove(entry)
            sequence.free() if what == "free" else entry[0].free()
            return
        self.note(entry)

    def evict(self):
        """What nobody holds; kvd may be away, and then it is somebody else's to evict."""
        rpc = Rpc(self.keeper.address)
        try:
            ticket = FdSocket(self.keeper)
            rpc.admin("Evict", metadata=(("kvd-ticket", ticket.ticket),), bytes=1)
            ticket.s.close()
        except (grpc.RpcError, OSError, struct.error, ValueError) as e:  # the last: a refusal in the ticket's place
            assert "PERMISSION" not in str(e), e
        rpc.channel.close()

    def end(self):
        for entry in self.known:
            assert entry[0].describe().length == entry[1]
            assert not entry[1] or entry[2] is None or self.output(entry[0]) == entry[2]
        held = sum(1 for _ in self.known)
        assert len({e[0].id for e in self.known}) == held


def has_direct_mode(keeper):
    """An emulated GPU takes too long for thousands of steps."""
    return not EMULATED


class Decoding(Worker):
    """Direct mode: every step goes on, whatever kvd does."""

    TOKENS = 4000

    def __init__(self, keeper, seed, tail=1024):
        super().__init__(keeper, seed)
        self.sequence = self.client.create()
        self.direct = package.Direct(self.client, slots=1, max_tokens=self.TOKENS + 64, tail_tokens=tail)
        self.direct.bind(0, self.sequence)
        r = np.random.default_rng(seed)
        self.kv = [package.to_bf16(r.normal(size=(LAYERS, 64, KV_HEADS, DIM))) for _ in "kv"]
        self.queries = values(seed, LAYERS, 1, Q_HEADS, DIM)
        gpu = keeper.on_gpu()
        self.rows = [[place(gpu, *x[layer][:, None]) for layer in range(LAYERS)] for x in self.kv]
        self.q = place(gpu, *self.queries)
        self.o = place(gpu, *[np.zeros((1, Q_HEADS, DIM), np.float32)] * LAYERS)
        self.longest = 0

    def step(self):
        if self.done >= self.TOKENS:
            time.sleep(0.01)
            return
        time.sleep(0.002)
        begin = time.time()
        self.direct.begin()
        for layer in range(LAYERS):
            self.direct.store(layer, *(rows[layer][self.done % 64] for rows in self.rows))
            self.direct.attend(layer, self.q[layer], self.o[layer])
        self.direct.end()
        self.longest = max(self.longest, time.time() - begin)

    def end(self):
        """The same tokens, appended at once, give the same attention bit for bit."""
        self.direct.flush()
        n = min(self.done, self.TOKENS)
        assert self.sequence.describe().length == n
        self.direct.close()
        at = np.arange(n) % 64
        twin = self.client.create()
        for a in range(0, n, 512):
            k, v = (self.client.tensor(LAYERS, len(at[a:a + 512]), KV_HEADS, DIM) for _ in "kv")
            k.array[:], v.array[:] = (x[:, at[a:a + 512]] for x in self.kv)
            twin.append(k, v)
        q, outputs = fill(self.client, self.queries), []
        for s in (self.sequence, twin):
            o = self.client.tensor(LAYERS, 1, Q_HEADS, DIM, dtype="f32")
            self.client.attend([package.Item(s, q=q, o=o)])
            outputs.append(o.array.tobytes())
        assert outputs[0] == outputs[1]


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_direct_mode_decodes_on_while_kvd_is_away(start):
    """As far as its tail lasts, and then steps wait; none fails."""
    keeper = start("--keep")
    if not has_direct_mode(keeper):
        pytest.skip("an emulated GPU takes too long for thousands of steps")
    tail = 400
    worker = Decoding(keeper, 5, tail)
    for _ in range(100):
        worker.step()
        worker.done += 1
    os.kill(pid_of(keeper), signal.SIGSTOP)
    try:
        began, before = time.time(), worker.done
        worker.longest = 0
        while worker.done < before + tail - 100:  # a token in 7 ms
            worker.step()
            worker.done += 1
            time.sleep(max(0.0, began + 0.007 * (worker.done - before) - time.time()))
        print(f"decoded {worker.done - before} tokens in {time.time() - began:.1f} s while kvd was away; "
              f"longest step {worker.longest:.3f} s")
        worker.start()
        assert wait_for(lambda: worker.done > before + tail - 10 or worker.failure)
        stuck = -1
        while stuck != worker.done:
            stuck = worker.done
            time.sleep(0.3)
        assert stuck <= before + tail + 32 and not worker.failure  # it waits
    finally:
        kill(keeper)  # a stopped process too
    assert wait_for(lambda: worker.done > stuck + 50 or worker.failure), worker.failure
    worker.stop = True
    worker.join(30)
    assert not worker.is_alive() and not worker.failure, worker.failure


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
@pytest.mark.parametrize("tail", [63, 16385])
def test_tails_that_are_refused(kvd, tail):
    with connect(kvd) as client, pytest.raises(package.InvalidError) as e:
        package.Direct(client, slots=1, max_tokens=100, tail_tokens=tail)
    assert "tail_tokens" in str(e.value)


def end(workers):
    """Stops them all; none may have failed."""
    for w in workers:
        w.stop = True
    for w in workers:
        w.join(60)
        assert not w.is_alive()
    failed = [w.failure for w in workers if w.failure]
    if failed:
        raise failed[0]


class Probe(Worker):
    """Asks all the time: how long kvd is away for a worker."""

    def __init__(self, keeper, seed):
        super().__init__(keeper, seed)
        self.sequence, self.gaps, self.last = self.client.create(), [], time.time()

    def step(self):
        begin = time.time()
        self.sequence.describe()
        self.gaps.append(time.time() - begin)
        time.sleep(0.001)


class Much:
    """Much of the pool, which nobody touches meanwhile."""

    def __init__(self, keeper):
        layers, heads, dim, tokens = 8, 8, 128, 8192  # 256 MiB of bf16
        self.client = package.Client(address=keeper.address, layers=range(layers), q_heads=heads, kv_heads=heads, head_dim=dim, codec="bf16",
                                     timeout=60)
        k, v = (self.client.tensor(layers, tokens, heads, dim) for _ in "kv")
        for t, seed in ((k, 1), (v, 2)):
            t.array[:] = package.to_bf16(np.random.default_rng(seed).standard_normal(t.array.shape, np.float32))
        self.query = fill(self.client, values(3, layers, 1, heads, dim))
        self.out = self.client.tensor(layers, 1, heads, dim, dtype="f32")
        self.sequences = [self.client.create() for _ in range(4 * FILL_GIB)]
        for s in self.sequences:
            s.append(k, v)
        k.free(), v.free()
        self.outputs = [self.output(s) for s in self.sequences]

    def output(self, sequence):
        self.client.attend([package.Item(sequence, q=self.query, o=self.out)])
        return self.out.array.tobytes()

    def check(self):
        assert [self.output(s) for s in self.sequences] == self.outputs
        self.client.close()


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_workers_that_go_on_while_kvd_is_killed(start):
    keeper = start("--keep", "--pool-size", f"{512 + 1088 * FILL_GIB}MiB")
    much = Much(keeper) if FILL_GIB else None
    seed = int(os.environ.get("KVD_TEST_SEED", time.time_ns() & 0xffffffff))
    print(f"KVD_TEST_SEED={seed}")
    rng = random.Random(seed)
    workers = [Mixed(keeper, rng.getrandbits(30)), Mixed(keeper, rng.getrandbits(30)), Probe(keeper, rng.getrandbits(30))]
    if has_direct_mode(keeper):
        workers.append(Decoding(keeper, rng.getrandbits(30)))
    probe, away = workers[2], []
    for w in workers:
        w.start()
    for i in range(KILLS):
        # The keeper thinks its own of a kvd that ends within a second again and again.
        time.sleep(1.1 if i % 25 == 24 else rng.uniform(0.02, 0.4))
        probe.gaps.clear()
        kill(keeper, signal.SIGTERM if i % 10 == 9 else signal.SIGKILL)
        wait_for(lambda: probe.failure or (probe.gaps and max(probe.gaps) > 0.01), 20)
        away.append(max(probe.gaps, default=0))
        failed = [w.failure for w in workers if w.failure]
        assert not failed, (i, failed, keeper.text()[-2000:])
    if much:
        used = keeper.metric('kvd_pool_bytes{state="used"}')
        print(f"{used / 2**30:.1f} GiB in use")
        assert wait_for(lambda: keeper.metric("kvd_scrub_passes_total"), 60)
        print([line for line in keeper.text().splitlines() if "an earlier kvd has left were looked at" in line][-1:])
        much.check()
    end(workers)
    assert keeper.metric("kvd_restarts_survived_total") == KILLS
    assert 'kvd_lost_total{what="sequences"} 0' in keeper.kvctl("metrics").stdout, keeper.text()[-3000:]
    assert keeper.metric("kvd_sessions") == 0
    print(f"{KILLS} kills, {[w.done for w in workers]} operations; a worker waits p50 {np.median(away):.3f} s, "
          f"p99 {np.percentile(away, 99):.3f} s; longest direct step {getattr(workers[-1], 'longest', 0):.3f} s")
