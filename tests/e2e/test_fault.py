"""A GPU that is lost to kvd after a fault. kvd ends with code 70 and is started again with its pool; workers without CUDA wait a while,
those whose context has gone with it start anew and find everything. KVD_FAULTS sets how often.

On the emulated GPU a fault comes when a file is made. On a real one another client of MPS makes it: that wants nvidia-cuda-mps-control,
PyTorch and Triton, and a GPU that nobody else uses."""
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import SOURCE
from test_death import wait_for
from test_keep import pid_of
from test_survive import Mixed, Probe, end

FAULTS = int(os.environ.get("KVD_FAULTS", 4))
EMULATED = "emulated" in os.environ.get("KVD_PROGRAM", "")
CONTROL = shutil.which("nvidia-cuda-mps-control")


def ended_with_70(keeper):
    return keeper.text().count("kvd ended (code 70)")


def all_is_well(keeper, workers):
    end(workers)
    assert 'kvd_lost_total{what="sequences"} 0' in keeper.kvctl("metrics").stdout, keeper.text()[-3000:]
    assert "0 damaged" in keeper.kvctl("verify").stdout


@pytest.mark.skipif(not EMULATED, reason="only the emulated GPU fails when it is told to")
def test_workers_go_on_after_faults(start, folder):
    flag = folder / "fault"
    keeper = start("--keep", "--backend", "cuda", env={"EMULATED_FAULT": str(flag)})
    rng = random.Random(int(os.environ.get("KVD_TEST_SEED", time.time_ns() & 0xffffffff)))
    workers = [Mixed(keeper, rng.getrandbits(30)) for _ in range(2)]
    for w in workers:
        w.start()
    for i in range(FAULTS):
        time.sleep(rng.uniform(0.1, 0.5))
        flag.touch()
        keeper.lives = i + 2
        keeper.wait_ready()
        assert ended_with_70(keeper) == i + 1
        done = [w.done for w in workers]
        assert wait_for(lambda: all(w.failure or w.done > n + 3 for w, n in zip(workers, done)), 20)
        assert not any(w.failure for w in workers), ([w.failure for w in workers], keeper.text()[-3000:])
    all_is_well(keeper, workers)


@pytest.mark.skipif(not EMULATED, reason="only the emulated GPU fails when it is told to")
def test_a_gpu_that_fails_for_a_while(start, folder):
    """As under MPS, where nobody gets a context before the last client has ended whose context was lost."""
    flag = folder / "fault"
    keeper = start("--keep", "--backend", "cuda", env={"EMULATED_FAULT": str(flag)})
    workers = [Mixed(keeper, 1), Mixed(keeper, 2), Probe(keeper, 3)]
    for w in workers:
        w.start()
    time.sleep(0.3)
    until = time.time() + 3
    while time.time() < until:
        flag.touch()
        time.sleep(0.02)
    flag.unlink(missing_ok=True)
    done = [w.done for w in workers]
    assert wait_for(lambda: all(w.failure or w.done > n + 3 for w, n in zip(workers, done)), 20), keeper.text()[-3000:]
    all_is_well(keeper, workers)


@pytest.mark.skipif(not EMULATED, reason="only the emulated GPU fails when it is told to")
def test_a_fault_is_noticed_while_nobody_asks(start, folder):
    flag = folder / "fault"
    keeper = start("--keep", "--backend", "cuda", env={"EMULATED_FAULT": str(flag)})
    flag.touch()
    assert wait_for(lambda: ended_with_70(keeper) == 1)
    keeper.lives = 2
    keeper.wait_ready()


@pytest.mark.skipif(not EMULATED, reason="only the emulated GPU fails when it is told to")
def test_a_pool_that_nobody_keeps_goes_with_the_gpu(start, folder):
    flag = folder / "fault"
    kvd = start(env={"EMULATED_FAULT": str(flag)})
    flag.touch()
    assert kvd.process.wait(10) == 70
    assert "the GPU is lost to this process after a fault" in kvd.text()


@pytest.mark.skipif(not EMULATED, reason="only the emulated GPU fails when it is told to")
def test_kernels_for_another_gpu(start):
    kvd = start("--backend", "cuda", env={"EMULATED_CODE": "none"}, wait=False)
    assert kvd.process.wait(10) != 0
    assert "emulated GPU of compute capability 9.0, cannot run the kernels that were compiled: no kernel image is available" in kvd.text()
    assert "build kvd with -Dgpu_capability=9.0, or all" in kvd.text()


class Gpu:
    """A worker with CUDA, a process of its own."""

    def __init__(self, keeper, env):
        self.process = subprocess.Popen([sys.executable, str(pathlib.Path(__file__).with_name("mps_worker.py")), keeper.address,
                                         str(SOURCE / "client/python")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        stderr=open(keeper.folder / "gpu.log", "a"), env={**os.environ, **env})
        assert self.answer() == "ready", (keeper.folder / "gpu.log").read_text()

    def answer(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else EOFError

    def __call__(self, *command):
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return EOFError
        return self.answer()

    def end(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def mps(folder):
    """An MPS of this test's own."""
    env = {f"CUDA_MPS_{what}_DIRECTORY": str(folder / f"mps-{what.lower()}") for what in ("PIPE", "LOG")}
    for path in env.values():
        os.mkdir(path)
    control = subprocess.Popen([CONTROL, "-f"], env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert wait_for(lambda: control.poll() is not None or (folder / "mps-pipe/control").exists()) and control.poll() is None
    yield env
    subprocess.run([CONTROL], env={**os.environ, **env}, input="quit -t 1\n", text=True, timeout=60, stdout=subprocess.DEVNULL)
    control.terminate()
    control.wait(20)


@pytest.mark.skipif(EMULATED or not CONTROL or os.environ.get("KVD_BACKEND") == "cpu", reason="wants a GPU with MPS")
def test_a_fault_under_mps(mps, start):
    pytest.importorskip("torch").cuda.is_available() or pytest.skip("wants a GPU")
    keeper = start("--keep", "--backend", "cuda", env=mps)
    rng = random.Random(int(os.environ.get("KVD_TEST_SEED", time.time_ns() & 0xffffffff)))
    hosts = [Mixed(keeper, rng.getrandbits(30)), Mixed(keeper, rng.getrandbits(30)), Probe(keeper, rng.getrandbits(30))]
    for w in hosts:
        w.start()
    probe, away, whole, seeds = hosts[2], [], [], [1, 2, 3, 4, 5, 6, 7]
    engine = Gpu(keeper, mps)
    engine("made", "s0", seeds)
    for i in range(FAULTS):
        output = engine("output", f"s{i}")
        bad = Gpu(keeper, mps)
        engine("busy")
        probe.gaps.clear()
        began = time.time()
        assert bad("fault") is EOFError
        bad.end()
        assert engine("output", f"s{i}") is EOFError, "its context has gone too"
        engine.end()
        keeper.lives = i + 2
        keeper.wait_ready(60)
        assert ended_with_70(keeper) == i + 1, keeper.text()[-3000:]
        engine = Gpu(keeper, mps)
        assert engine("taken", f"s{i}") == 64 * len(seeds)
        assert engine("output", f"s{i}") == output
        whole.append(time.time() - began)
        failed = [w.failure for w in hosts if w.failure]
        assert not failed and wait_for(lambda: len(probe.gaps) > 10), (failed, whole, keeper.text()[-5000:])
        away.append(max(probe.gaps))
        seeds.append(10 + i)
        engine("made", f"s{i + 1}", seeds)
        engine("append", f"s{i}", seeds[-1])
        assert engine("output", f"s{i}") == engine("output", f"s{i + 1}"), "what goes on is as if nothing had been"
    engine.end()
    all_is_well(keeper, hosts)
    print(f"{FAULTS} faults; a worker without CUDA waited {np.median(away):.2f} s (at most {max(away):.2f}), {[w.done for w in hosts]} "
          f"operations; one with CUDA had its next output after {np.median(whole):.2f} s (at most {max(whole):.2f})")
