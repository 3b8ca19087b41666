#!/usr/bin/env python3
"""Pages that come back from a tier: how long, and in GB/s, against the limit of what they have to pass.

Usage: bench_restore.py --kvd PROGRAM --kvctl PROGRAM [--backend cpu|cuda] [--model tiny|smollm2|qwen3-8b] [--tokens 32768]
       [--codec int2] [--directory DIR] [--rounds 5]
Starts a kvd of its own whose tier is host memory, or DIR. Stores that many tokens' pages, waits until the tier has them, evicts all, and
looks them up with restore_ms, which brings them back. Says what of that time kvd looked for them in the tier, copied, and had nothing to
copy; the rest is the call itself, which is nearly all of it with tiny. And how many copies that were: pages that lie at equal distances
here and there are one. The limit: for a GPU, a copy of as many bytes from pinned memory (wants
PyTorch); otherwise a copy from memory to memory on one thread. Wants the package kvd (PYTHONPATH=client/python, KVD_LIBRARY=...).
"""
import argparse
import json
import pathlib
import re
import signal
import subprocess
import time

import numpy as np
import scratch

import kvd

MODELS = {"tiny": (1, 1, 64), "smollm2": (30, 3, 64), "qwen3-8b": (36, 8, 128)}


def wait_for(what, found, seconds=60):
    end = time.monotonic() + seconds
    while not found():
        if time.monotonic() > end:
            raise SystemExit(f"waited {seconds} s in vain: {what}")
        time.sleep(0.01)


def limit_of(backend, size):
    """Seconds of the best of some copies."""
    if backend == "cuda":
        import torch
        a, b = torch.empty(size, dtype=torch.uint8).pin_memory(), torch.empty(size, dtype=torch.uint8, device="cuda")
        copy, wait = (lambda: b.copy_(a, non_blocking=True)), torch.cuda.synchronize
    else:
        a, b = np.ones(size, np.uint8), np.ones(size, np.uint8)
        copy, wait = (lambda: np.copyto(b, a)), lambda: None
    best = 1e9
    for _ in range(5):
        wait()
        began = time.monotonic()
        copy()
        wait()
        best = min(best, time.monotonic() - began)
    return best


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--kvd", required=True)
    p.add_argument("--kvctl", required=True)
    p.add_argument("--backend", default="cpu")
    p.add_argument("--model", choices=MODELS, default="smollm2")
    p.add_argument("--tokens", type=int, default=32768)
    p.add_argument("--codec", default="int2")
    p.add_argument("--directory")
    p.add_argument("--rounds", type=int, default=5)
    a = p.parse_args()
    layers, heads, dim = MODELS[a.model]
    folder = scratch.folder()
    address = f"unix:{folder}/s"
    tier = f"tier-directory = {a.directory} 16GiB" if a.directory else "tier-host = 16GiB"
    (folder / "conf").write_text(f"[kvd]\ntier-rate = 0\n{tier}\n")
    with open(folder / "log", "w") as log:
        daemon = subprocess.Popen([a.kvd, "--config", folder / "conf", "--backend", a.backend, "--listen", address, "--metrics", "",
                                   "--pool-size", "4GiB"], stdout=log, stderr=log)
    try:
        wait_for(f"kvd to be ready; see {folder}/log", lambda: " ready" in (folder / "log").read_text() or daemon.poll() is not None)

        def kvctl(*args):
            return subprocess.run([a.kvctl, "--address", address, *args], check=True, capture_output=True, text=True).stdout

        pages = a.tokens // 64
        with kvd.Pages(space=b"bench", layers=range(layers), kv_heads=heads, head_dim=dim, codec=a.codec, address=address, timeout=600) as store:
            some = kvd.to_bf16(np.random.default_rng(1).standard_normal(1 << 20, np.float32))
            sides = [[np.resize(some, (64, 64, heads, dim)) for _ in range(layers)] for _ in "kv"]
            keys = [b"%032d" % i for i in range(pages)]
            for i in range(0, pages, 64):  # the same 64 pages of data under all keys
                n = min(64, pages - i)
                store.put(keys[i:i + n], kvd.Paged(*sides, range(n), order="bthd"))
            wait_for("the tier to have all", lambda: int(json.loads(kvctl("tier", "status", "--json"))["tiers"][0]["put"]) >= pages)

            def phases():
                text = kvctl("metrics")
                found = re.findall(r'kvd_restore_phase_seconds_total\{phase="(\w+)"\} (\S+)', text)
                return {name: 1e3 * float(seconds) for name, seconds in found}, int(re.search(r"kvd_restore_copies_total (\d+)", text)[1])

            size = pages * store.client.info["planes"][0]["codec_page_bytes"]
            took, spent = [], []
            for _ in range(a.rounds):
                kvctl("evict", "--namespace", "default")
                assert store.lookup([keys], lease_ms=0)[0].pages == 0
                before, copies = phases()
                began = time.monotonic()
                found = store.lookup([keys], lease_ms=0, restore_ms=60000)[0]
                took.append(time.monotonic() - began)
                after, made = phases()
                spent.append(({name: now - before[name] for name, now in after.items()}, made - copies))
                assert (found.pages, found.restored) == (pages, pages), found
        print(f"{a.model}, {pages} pages in {a.codec}, {size / 1e6:.1f} MB, from {a.directory or 'host memory'}")
        limit = limit_of(a.backend, size)
        for t, (of, copies) in zip(took, spent):
            parts = ", ".join(f"{name} {ms:.2f}" for name, ms in of.items())
            print(f"{t * 1e3:8.1f} ms  {size / t / 1e9:6.2f} GB/s  {100 * limit / t:5.1f} % of a copy ({limit * 1e3:.1f} ms, {size / limit / 1e9:.2f} GB/s); ms: {parts}; {copies} copies")
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(30)
    scratch.remove(folder)


if __name__ == "__main__":
    main()
