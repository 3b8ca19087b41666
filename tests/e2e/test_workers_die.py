"""Workers that are killed at random instants: what they held is back within a second, and those beside them see nothing of it.
KVD_WORKER_KILLS sets how many."""
import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest

from conftest import BUILD, WORKER
from test_death import wait_for
from test_survive import Mixed

KILLS = int(os.environ.get("KVD_WORKER_KILLS", 12))
DIRECT = BUILD / "tests/e2e_direct"


def resources(kvd):
    """What a kvd has open and mapped. Extents stay for a while, and gRPC's threads have their stacks."""
    pid = kvd.process.pid
    maps = [line for line in open(f"/proc/{pid}/maps") if "memfd:kvd-buffer" in line or "kvd-direct" in line]
    open_files = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
    return len([name for name in open_files if "kvd-extent" not in name]), len(maps)


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_workers_killed_at_random(start):
    kvd = start("--backend", "cpu", "--pool-size", "512MiB")
    seed = int(os.environ.get("KVD_TEST_SEED", time.time_ns() & 0xffffffff))
    print(f"KVD_TEST_SEED={seed}")
    rng = random.Random(seed)
    survivor = Mixed(kvd, rng.getrandbits(30))
    survivor.start()
    assert wait_for(lambda: survivor.done > 10 or survivor.failure)
    before = resources(kvd)
    killed, took = 0, []
    while killed < KILLS:
        n = min(rng.choice([1, 1, 2, 4, 8]), KILLS - killed)
        commands = ([WORKER, kvd.address], [DIRECT, kvd.address, "bf16", "2", "500"], [DIRECT, kvd.address, "int2", "1", "500"])
        victims = [subprocess.Popen(rng.choice(commands), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(n)]
        for v in victims:
            time.sleep(rng.uniform(0.001, 0.3 / n))
            v.send_signal(signal.SIGKILL)
        for v in victims:
            v.wait()
        killed += n
        begin = time.time()
        assert wait_for(lambda: kvd.metric("kvd_sessions") == 1 and kvd.metric("kvd_connections") == 1), (killed, kvd.text()[-2000:])
        took.append(time.time() - begin)
        assert not survivor.failure, (killed, survivor.failure)
    survivor.stop = True
    survivor.join(30)
    assert not survivor.is_alive() and not survivor.failure, survivor.failure
    assert wait_for(lambda: kvd.metric("kvd_sessions") == 0)
    assert wait_for(lambda: resources(kvd)[0] <= before[0] and resources(kvd)[1] <= before[1]), (before, resources(kvd))
    print(f"{killed} killed, {survivor.done} operations beside them; what they had is back after {np.median(took):.3f} s, "
          f"{np.percentile(took, 99):.3f} s at p99, {max(took):.3f} s at most")
