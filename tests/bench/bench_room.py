#!/usr/bin/env python3
"""What others notice while blocks are published, and while a full pool makes room for another layout: latencies of a client that looks
up a block all the time.

Usage: bench_room.py --kvd PROGRAM --kvctl PROGRAM [--blocks 100000] [--extents 6]
Starts a kvd of its own and fills it with so many blocks of one namespace. Another namespace then appends to sequences of another layout
until an extent had to be emptied for it so many times, which looks at every block several times over, in steps. A client in a process of
its own looks up one block a thousand times a second, alone, during the one and during the other. Says what it had to wait, what those who
wanted room had to, and how long the longest step was. A million blocks take 18 GiB.
Wants the package kvd (PYTHONPATH=client/python, KVD_LIBRARY=...).
"""
import argparse
import multiprocessing
import pathlib
import signal
import subprocess
import time

import numpy as np
import scratch

import kvd

TOKENS, AT_ONCE, PART = 4096, 64, 256  # of a prompt; prompts that are computed at once, and how much of each in a call
LAYERS, DIM = 4, 128  # and one kv head
PAGE = LAYERS * 4608  # of a block, in int2; the index has room for a block per 16 KiB of the pool, so with less it is full before that


def percentiles(seconds):
    if not seconds:
        return "none"
    s = sorted(seconds)
    at = lambda part: f"{s[min(int(len(s) * part), len(s) - 1)] * 1e3:.2f}"
    return f"p50 {at(0.5)}  p99 {at(0.99)}  longest {s[-1] * 1e3:.2f} ms of {len(s)}"


def ask(address, pipe):
    """Looks up a block that is not there, a thousand times a second, until told to end; then tells when each began and what it took."""
    took, prompt = [], kvd.Prompt(np.zeros(64, np.uint32))
    with kvd.Client(layers=range(1), q_heads=1, kv_heads=1, head_dim=64, codec="int2", address=address, namespace="asks") as c:
        pipe.send("ready")
        while not pipe.poll():
            began = time.perf_counter()
            c.match([prompt], lease=0)
            took.append((began, time.perf_counter() - began))
            time.sleep(0.001)
    pipe.send(took)


def fill(client, blocks):
    """As many workers leave them: the blocks of a prompt lie among others' that are nearer to their prompts' ends, or farther, so that
    no extent is empty when some prompts have gone."""
    k, v, rng = client.tensor(LAYERS, PART, 1, DIM), client.tensor(LAYERS, PART, 1, DIM), np.random.default_rng(1)
    for _ in range(-(-blocks * 64 // TOKENS // AT_ONCE)):
        sequences = [client.create() for _ in range(AT_ONCE)]
        left = {s: TOKENS // PART for s in sequences}
        while left:
            some = rng.choice(np.array(list(left), object), max(len(left) // 2, 1), replace=False)
            client.append([kvd.Item(s, k, v) for s in some])
            left = {s: n - (s in some) for s, n in left.items() if n > (s in some)}
        for s in sequences:
            s.publish_blocks(kvd.Prompt(rng.integers(0, 50000, TOKENS).astype(np.uint32)))
            s.free()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--kvd", required=True)
    p.add_argument("--kvctl", required=True)
    p.add_argument("--blocks", type=int, default=100000)
    p.add_argument("--extents", type=int, default=6)
    args = p.parse_args()
    folder = scratch.folder("kvd-bench-room.")
    address = f"unix:{folder}/s"
    size = max(-(-args.blocks * PAGE // (4 << 20)), 8) * 4
    daemon = subprocess.Popen([args.kvd, "--listen", address, "--backend", "cpu", "--pool-size", f"{size}MiB", "--extent-size", "4MiB",
                               "--cache", folder / "cache", "--metrics", "127.0.0.1:0"], stderr=open(folder / "log", "w"))

    def metric(name):
        text = subprocess.run([args.kvctl, "--address", address, "metrics"], capture_output=True, text=True, check=True).stdout
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.split(" ")[0].split("{")[0] == name)

    try:
        end = time.monotonic() + 30
        while "ready version" not in (folder / "log").read_text() and time.monotonic() < end:
            time.sleep(0.05)
        options = dict(q_heads=1, kv_heads=1, head_dim=DIM, codec="int2", address=address, sink=0, recent=64)
        with kvd.Client(layers=range(LAYERS), namespace="fills", **options) as a, kvd.Client(layers=range(2 * LAYERS), namespace="wants", **options) as b:
            pipe, end = multiprocessing.Pipe()
            asker = multiprocessing.get_context("spawn").Process(target=ask, args=(address, end), daemon=True)
            asker.start()
            pipe.recv()
            times = [time.perf_counter()]
            time.sleep(3)
            times.append(time.perf_counter())
            fill(a, args.blocks)
            times.append(time.perf_counter())
            filled, seconds = metric("kvd_prefix_blocks"), times[2] - times[1]
            print(f"{filled:.0f} blocks in {size} MiB, computed and published in {seconds:.0f} s")
            k, v, held, waits = b.tensor(2 * LAYERS, 2048, 1, DIM), b.tensor(2 * LAYERS, 2048, 1, DIM), [], []
            before = metric("kvd_room_waits_total")
            while len(waits) < args.extents and len(held) < 2000:
                held.append(b.create())
                began = time.perf_counter()
                held[-1].append(k, v)
                ended, now = time.perf_counter(), metric("kvd_room_waits_total")
                if now > before:
                    waits.append((began, ended))
                before = now
            pipe.send("end")
            asked = pipe.recv()
            asker.join()

            def within(begin, end):
                return [took for at, took in asked if begin <= at < end]

            print("another client, alone:               ", percentiles(within(*times[:2])))
            print("while blocks are published:          ", percentiles(within(*times[1:3])))
            print("while room is made:                  ", percentiles([x for w in waits for x in within(*w)]))
            print("appends that waited for room:        ", percentiles([end - begin for begin, end in waits]))
            print(f"longest step {metric('kvd_room_longest_piece_seconds') * 1e3:.2f} ms")
    finally:
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()
    scratch.remove(folder)


if __name__ == "__main__":
    main()
