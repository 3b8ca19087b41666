"""kvd under random requests. KVD_FUZZ_SECONDS=N takes longer than the usual 4; KVD_FUZZ_SEED repeats a run, but for its timing."""
import os
import random
import re

import pytest

from conftest import kv
from fuzz_daemon import Fuzz
from scenario_holder import Here
from scenarios import CPU_ERRORS, GPU_ERRORS, Scenario

pytestmark = pytest.mark.filterwarnings("ignore:Unexpected end-group tag")  # damaged requests are read here too
SECONDS = float(os.environ.get("KVD_FUZZ_SECONDS", "4"))
SANITIZERS = {"ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":quarantine_size_mb=8"}  # memory in use, not in quarantine


def run(kvd, seed, **options):
    """Random requests, then what is left of them, and whether it computes as before."""
    fuzz = Fuzz(kvd, seed, SECONDS, **options)
    fuzz.run()
    print(fuzz.table())
    assert kvd.process.poll() is None, kvd.text()[-6000:]
    fuzz.clean()
    print(f"{sum(fuzz.counts.values())} calls and pieces of garbage; resident memory " + ", ".join(
        f"{fuzz.resident[len(fuzz.resident) * i // 5 - (i == 5)] >> 20}" for i in range(6)) + f", then {fuzz.rss() >> 20} MiB")
    fuzz.known.tickets.clear()
    kvd.kvctl("quota", "set", "default", "none", "--create")  # requests of an operator's may have set one
    here = Here(kvd.address)
    for i in range(5):
        Scenario(kv, kvd.address, [here], seed + i, errors=GPU_ERRORS if kvd.on_gpu() else CPU_ERRORS, keeps=fuzz.kills).run()
    here.close()


def new_seed():
    seed = int(os.environ.get("KVD_FUZZ_SEED", random.SystemRandom().randrange(1 << 30)))
    print(f"KVD_FUZZ_SEED={seed}")
    return seed


def test_random_requests(start):
    run(start("--extent-size", "2MiB", "--log-level", "notice", env=SANITIZERS), new_seed())


def test_random_requests_while_kvd_is_killed(start, folder):
    """Whatever is under way: the next kvd takes the pool over, finds it sound (KVD_VERIFY_POOL: when it ends itself), and ends when it is told to only."""
    keeper = start("--keep", "--extent-size", "2MiB", "--log-level", "notice", env=SANITIZERS,
                   config=f"[kvd]\nresume-time = 1s\ntier-host = 16MiB\ntier-directory = {folder}/blocks 64MiB\n")
    run(keeper, new_seed(), kills=True)
    lives = re.findall("kvd ended [(](.*)[)]", keeper.text())
    assert len(lives) > 1 and set(lives) <= {"signal 9", "code 0"}, keeper.text()[-6000:]
    assert keeper.text().count("took over sequences=") == len(lives)
