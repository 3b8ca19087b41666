"""Random scenarios against NumPy in float64: scenarios.py says what they do, scenario_model.py what should come of it.

KVD_SCENARIOS=N runs N of them instead of 32, KVD_SCENARIO=SEED only that one. A failure prints its seed and the operations
that it needs.
"""
import collections
import importlib
import os
import random
import sys
import time

import pytest

from conftest import BUILD, SOURCE, kv
from scenario_holder import Elsewhere, Here
from scenario_model import Mismatch
from scenarios import CPU_ERRORS, GPU_ERRORS, Scenario, shorten

PARTS = 4  # that can run side by side; the last and smallest one on the scalar kernels
COUNT = int(os.environ.get("KVD_SCENARIOS", "32"))


def direct_package(kvd):
    """The package kvd, or None where direct mode cannot be in this process: on a GPU, or with a sanitizer's libkvd."""
    library = BUILD / "client/libkvd.so.0"
    if kvd.on_gpu() or not library.exists() or b"__asan_init" in (b := library.read_bytes()) or b"__tsan_init" in b:
        return None
    os.environ["KVD_LIBRARY"] = str(library)
    sys.path.insert(0, str(SOURCE / "client/python"))
    return importlib.import_module("kvd")


def seeds(part):
    if "KVD_SCENARIO" in os.environ:
        return [int(os.environ["KVD_SCENARIO"])] if part == 0 else []
    first = random.SystemRandom().randrange(1 << 40)
    scalar = -(-COUNT // 10)
    return [first + i for i in range(scalar if part == PARTS - 1 else (COUNT - scalar + part) // (PARTS - 1))]


def fail(make, seed, scenario, error):
    again = scenario
    try:
        without = shorten(make, 30, scenario.operations)
        shorter = make(without)
        shorter.run()  # if this ends well, it needs more than these
    except Mismatch as e:
        again, error = shorter, e
    except (AssertionError, OSError, RuntimeError):  # kvd has ended: a new session, or any call, says so in its own way
        error = f"{error}; kvd does not answer any more"
    log = "\n".join(again.log)
    pytest.fail(f"scenario {seed}, {scenario.g}:\n{log}\n{error}\nRepeat it: KVD_SCENARIO={seed}", pytrace=False)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_scenarios(start, part):
    kvd = start("--extent-size", "2MiB", *(["--isa", "scalar"] if part == PARTS - 1 else []))
    package, errors = direct_package(kvd), GPU_ERRORS if kvd.on_gpu() else CPU_ERRORS
    places, worst, done = [Here(kvd.address), Elsewhere(kvd.address)], 0.0, collections.Counter()
    began = time.monotonic()
    list_of_seeds = seeds(part)
    try:
        for seed in list_of_seeds:
            def make(without=()):
                return Scenario(kv, kvd.address, places, seed, without, package, errors)  # noqa: B023
            scenario = make()
            try:
                scenario.run()
            except Mismatch as e:
                fail(make, seed, scenario, e)
            except Exception:
                print("\n".join([f"scenario {seed}, {scenario.g}:", *scenario.log]))
                raise
            worst = max(worst, scenario.worst)
            done += scenario.done
            assert kvd.metric('kvd_pool_bytes{state="used"}') == 0, f"scenario {seed} left pages behind"
    finally:
        for place in places:
            place.close()
    if list_of_seeds:
        print(f"{len(list_of_seeds)} scenarios from {list_of_seeds[0]} on in {time.monotonic() - began:.1f} s, worst error in f32 "
              f"{worst:.1e}: {', '.join(f'{n} {name}' for name, n in done.most_common())}")
