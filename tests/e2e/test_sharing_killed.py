"""Prompts that are computed once and used by all, while workers and kvd are killed at random: what comes out is what it would be without
sharing, bit by bit, and what is computed is what each kill cost and no more. KVD_SHARING_KILLS sets how often something is killed; from 12
on the size is 4 workers and 200 requests over 8 prompts."""
import hashlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import kvd as package
from conftest import BUILD, SOURCE
from test_death import wait_for
from test_keep import kill
from test_prefix import connect, never_interrupted, step, tokens_of

KILLS = int(os.environ.get("KVD_SHARING_KILLS", 3))
WORKERS, REQUESTS, PROMPTS, TOKENS = (4, 200, 8, 1024) if KILLS >= 12 else (3, 16, 2, 512)
QUESTIONS, QUESTION = 2, 40


def prompt_of(i):
    return tokens_of(1000 + i, TOKENS)


def whole_of(i, question):
    return np.concatenate([prompt_of(i), tokens_of(2000 + question, QUESTION)])


def digest(out):
    return hashlib.sha256(np.ascontiguousarray(out).tobytes()).hexdigest()


def answer(client, i, question):
    """What a worker does for a request: from where another has left off, if its window is there too, else all of it. Tokens of the prompt
    that were computed, and what came out."""
    prompt = package.Prompt(prompt_of(i))
    m = client.match([prompt], wait=60)[0]
    s = client.adopt(m) if m.lease and m.end and m.blocks == TOKENS // 64 else client.create()
    computed = TOKENS - s.length
    if computed:
        if m.lease:
            m.release()
        step(client, s, prompt_of(i), TOKENS)
        s.publish_blocks(prompt, end=True)
    out = digest(step(client, s, whole_of(i, question), TOKENS + QUESTION))
    s.free()
    return computed, out


def opened(address):
    """A client. Whoever opens one while kvd is away is told so at once, and may try again."""
    class Daemon:
        pass
    Daemon.address = address
    end = time.monotonic() + 60
    while True:
        try:
            return connect(Daemon, timeout=60)
        except package.UnavailableError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def serve(address):
    """A worker: reads requests, one a line, and answers them. What a kvd that was killed took with it is asked for anew."""
    with opened(address) as client:
        for line in sys.stdin:
            number, i, question = json.loads(line)
            for _ in range(20):
                try:
                    computed, out = answer(client, i, question)
                    break
                except package.NotFoundError:  # a lease, or a match, of the kvd before
                    continue
            print(json.dumps([number, computed, out]), flush=True)


class Worker:
    """The process, which has one request at a time."""

    def __init__(self, address, answers):
        env = {**os.environ, "PYTHONPATH": f"{SOURCE / 'client/python'}:{SOURCE / 'tests/e2e'}"}
        self.process = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.request = None
        self.reader = threading.Thread(target=self.read, args=(answers,), daemon=True)
        self.reader.start()

    def read(self, answers):
        for line in self.process.stdout:
            answers.put((self, json.loads(line)))
        answers.put((self, None))

    def ask(self, number, request):
        self.request = number
        self.process.stdin.write(json.dumps([number, *request]) + "\n")
        self.process.stdin.flush()


@pytest.mark.long
@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_sharing_while_workers_and_kvd_are_killed(start):
    keeper = start("--keep", "--pool-size", "1GiB")
    seed = int(os.environ.get("KVD_TEST_SEED", time.time_ns() & 0xffffffff))
    print(f"KVD_TEST_SEED={seed}")
    rng = random.Random(seed)
    requests = [(rng.randrange(PROMPTS), rng.randrange(QUESTIONS)) for _ in range(REQUESTS)]
    want = {r: digest(never_interrupted(keeper, whole_of(*r), (TOKENS, TOKENS + QUESTION))) for r in sorted(set(requests))}
    kills = sorted(rng.sample(range(1, REQUESTS), KILLS))  # after so many answers; of kvd each third one
    todo, done, answers, computed, of_kvd, of_workers = list(range(REQUESTS))[::-1], set(), queue.Queue(), 0, 0, 0
    workers = [Worker(keeper.address, answers) for _ in range(WORKERS)]
    for w in workers:
        w.ask(todo[-1], requests[todo.pop()])
    while len(done) < REQUESTS:
        worker, answered = answers.get(timeout=120)
        if answered is None:  # one that was killed: its request is another's
            assert worker not in workers, f"a worker ended by itself with {worker.process.wait()}"
            continue
        number, tokens, out = answered
        computed += tokens
        assert out == want[requests[number]], (number, requests[number], tokens)
        done.add(number)
        if worker in workers:
            worker.request = None
            if todo:
                worker.ask(todo[-1], requests[todo.pop()])
        if kills and len(done) >= kills[0]:
            kills.pop(0)
            time.sleep(rng.uniform(0, 0.05))
            if len(kills) % 3 == 0:
                kill(keeper, signal.SIGKILL)
                of_kvd += 1
                continue
            victim = rng.choice(workers)
            victim.process.send_signal(signal.SIGKILL)
            victim.process.wait()
            of_workers += 1
            workers.remove(victim)
            if victim.request is not None and victim.request not in done:
                todo.append(victim.request)
            workers.append(Worker(keeper.address, answers))
            if todo:
                workers[-1].ask(todo[-1], requests[todo.pop()])
    for w in workers:
        w.process.stdin.close()
        assert w.process.wait(30) == 0
    once = len({i for i, _ in requests}) * TOKENS
    # A kvd that is killed takes the windows of all ends with it, and the knowledge who computes what; a worker, at most what it was at.
    assert once <= computed + of_workers * TOKENS, (computed, once, of_workers)
    assert computed <= once * (1 + of_kvd) + (of_workers + of_kvd * WORKERS) * TOKENS, (computed, once, of_kvd, of_workers)
    assert wait_for(lambda: keeper.metric("kvd_sessions") == 0, 60)  # one that was killed while kvd was away is waited for
    keeper.kvctl("verify")
    print(f"{WORKERS} workers, {REQUESTS} requests over {PROMPTS} prompts of {TOKENS} tokens; kvd killed {of_kvd} times, workers {of_workers} times; "
          f"tokens of prompts computed {computed}, each once: {once}; {len(want)} outputs as without sharing")


if __name__ == "__main__":
    serve(sys.argv[1])
