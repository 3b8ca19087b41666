"""Everything at once for as long as one likes: mixed operations, kvd killed and workers killed at random, memory and descriptors that
run out, and on the emulated GPU (KVD_PROGRAM) faults that end its kvd. Nothing that was acknowledged is lost, invariants hold, and memory
stays flat. KVD_SOAK_SECONDS sets how long, KVD_SOAK_EVERY how long a kvd lives at most."""
import os
import random
import resource
import signal
import subprocess
import time

import pytest

import kvd as package
from conftest import BUILD, WORKER
from test_death import wait_for
from test_fault import EMULATED, ended_with_70
from test_keep import kill, pid_of
from test_survive import Decoding, Mixed, end

SECONDS = float(os.environ.get("KVD_SOAK_SECONDS", 4))
LIFE = float(os.environ.get("KVD_SOAK_EVERY", 20))


class Patient(Mixed):
    """Is refused now and then, and finds everything as it was."""

    refused = 0

    def step(self):
        try:
            super().step()
        except (package.ExhaustedError, package.InternalError):
            self.refused += 1

    def end(self):
        assert all(e[0].describe().length == e[1] for e in self.known)
        super().end()


class PatientDecoding(Decoding):
    """Hears of appends in the background that were refused, and goes on: they are made again."""

    refused = 0

    def patiently(self, call):
        while True:
            try:
                return call()
            except (package.ExhaustedError, package.InternalError):
                self.refused += 1
                time.sleep(0.01)

    def step(self):
        self.patiently(super().step)

    def end(self):
        self.patiently(self.direct.flush)
        super().end()


class Quick:
    """A process that does what Mixed does, in C: most of the operations are its."""

    def __init__(self, keeper, codec, seed):
        self.process = subprocess.Popen([BUILD / "tests/e2e_mixed", keeper.address, codec, str(seed)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"
        self.done = self.refused = 0

    @property
    def failure(self):
        return None if self.process.poll() is None else f"a process ended with {self.process.returncode}"

    def end(self):
        out, err = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, err
        self.done, self.refused = map(int, out.split())


def anonymous_kib(pid):
    with open(f"/proc/{pid}/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon:"))


class Trouble:
    """What goes wrong, at random, with the kvd of a keeper."""

    def __init__(self, keeper, flag, rng):
        self.keeper, self.flag, self.rng, self.victims, self.counts = keeper, flag, rng, [], {}

    def some(self):
        what = self.rng.choice(["worker", "worker", "memory", "descriptors"] * 10 + ["fault"] * EMULATED)
        self.counts[what] = self.counts.get(what, 0) + 1
        getattr(self, what)()
        time.sleep(self.rng.uniform(0.01, 0.2))

    def worker(self):
        self.victims.append(subprocess.Popen([WORKER, self.keeper.address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        if len(self.victims) > self.rng.randrange(3):
            self.end_one()

    def end_one(self):
        v = self.victims.pop(0)
        v.send_signal(signal.SIGKILL)
        v.wait()

    def memory(self):
        self.flag.touch()
        time.sleep(self.rng.uniform(0.001, 0.05))
        self.flag.unlink()

    def fault(self):
        """The GPU is lost to kvd, which ends by itself, and is started again by its keeper."""
        self.keeper.lives = self.keeper.text().count("ready version") + 1
        (self.keeper.folder / "fault").touch()
        self.keeper.wait_ready()

    def descriptors(self):
        pid = pid_of(self.keeper)
        old = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), old[1]))
        time.sleep(self.rng.uniform(0.001, 0.05))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, old)


@pytest.mark.skipif("san" in BUILD.name, reason="Python is not instrumented; sanitizers have an allocator of their own")
def test_soak(start, folder):
    flag = folder / "short"
    keeper = start("--keep", "--backend", "cuda" if EMULATED else "cpu", "--pool-size", "256MiB", env={
        "LD_PRELOAD": str(BUILD / "tests/short_memory.so"), "SHORT_MEMORY": str(flag), "EMULATED_FAULT": str(folder / "fault")})
    seed = int(os.environ.get("KVD_TEST_SEED", time.time_ns() & 0xffffffff))
    print(f"KVD_TEST_SEED={seed}")
    rng = random.Random(seed)
    trouble = Trouble(keeper, flag, rng)
    workers = [Patient(keeper, rng.getrandbits(30)) for _ in range(3)]
    workers += [] if EMULATED else [PatientDecoding(keeper, rng.getrandbits(30))]
    for w in workers:
        w.start()
    quick = [Quick(keeper, codec, rng.getrandbits(30)) for codec in ("bf16", "int2", "int2")]
    until, kills, growth = time.time() + SECONDS, 0, [0]
    while time.time() < until:
        life = time.time() + min(rng.uniform(1.2, LIFE), max(SECONDS / 2, 1.2))
        settled = 0
        while time.time() < life:
            trouble.some()
            failed = [w.failure for w in workers + quick if w.failure]
            assert not failed, (failed, [q.process.stderr.read() for q in quick if q.failure], keeper.text()[-6000:])
            if life - time.time() < LIFE / 2:
                settled = settled or anonymous_kib(pid_of(keeper))
        growth.append(anonymous_kib(pid_of(keeper)) - settled if settled else 0)
        kill(keeper, rng.choice([signal.SIGKILL, signal.SIGTERM]))
        kills += 1
    while trouble.victims:
        trouble.end_one()
    for q in quick:
        q.end()
    end(workers)
    assert ended_with_70(keeper) == trouble.counts.get("fault", 0)
    assert 'kvd_lost_total{what="sequences"} 0' in keeper.kvctl("metrics").stdout, keeper.text()[-3000:]
    # Those of workers that were killed while kvd was away wait for resume-time.
    assert wait_for(lambda: keeper.metric("kvd_sessions") == keeper.metric("kvd_sessions_waiting"))
    assert "0 damaged" in keeper.kvctl("verify").stdout
    operations, refused = (sum(getattr(w, what) for w in workers + quick) for what in ("done", "refused"))
    print(f"{operations} operations, of which {refused} were refused for want of memory or descriptors; kvd killed {kills} times; "
          f"{trouble.counts}; private memory of a kvd grew by {max(growth)} KiB at most in the second half of its life")
    assert max(growth) < 48 << 10
