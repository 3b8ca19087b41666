"""kvd under random requests. KVD_FUZZ_SECONDS=N takes longer than the usual 4; KVD_FUZZ_SEED repeats a run, but for its timing."""
import os
import random
import subprocess

import pytest

from conftest import SOURCE, kv
from fuzz_daemon import Fuzz
from scenario_holder import Here
from scenarios import CPU_ERRORS, GPU_ERRORS, Scenario

SECONDS = float(os.environ.get("KVD_FUZZ_SECONDS", "4"))
SANITIZERS = {"ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":quarantine_size_mb=8"}  # memory in use, not in quarantine


def test_random_requests(start):
    seed = int(os.environ.get("KVD_FUZZ_SEED", random.SystemRandom().randrange(1 << 30)))
    print(f"KVD_FUZZ_SEED={seed}")
    kvd = start("--extent-size", "2MiB", "--log-level", "notice", env=SANITIZERS)
    fuzz = Fuzz(kvd, seed, SECONDS)
    fuzz.run()
    print(fuzz.table())
    assert kvd.process.poll() is None, kvd.text()[-6000:]
    fuzz.clean()
    print(f"{sum(fuzz.counts.values())} calls and pieces of garbage; resident memory " + ", ".join(
        f"{fuzz.resident[len(fuzz.resident) * i // 5 - (i == 5)] >> 20}" for i in range(6)) + f", then {fuzz.rss() >> 20} MiB")
    fuzz.known.tickets.clear()
    kvd.kvctl("quota", "set", "default", "none", "--create")  # requests of an operator's may have set one
    here = Here(kvd.address)  # it computes as before
    for i in range(5):
        Scenario(kv, kvd.address, [here], seed + i, errors=GPU_ERRORS if kvd.on_gpu() else CPU_ERRORS).run()
    here.close()
