#!/usr/bin/env python3
"""What storing costs an engine beside its copies: requests of a few pages that nothing has, as vLLM's worker stores them.

Usage: bench_stores.py KVD_ADDRESS [--requests 400] [--pages 16] [--model tiny|smollm2] [--ask]
Wants the package kvd (PYTHONPATH=client/python, KVD_LIBRARY=.../libkvd.so.0) and a kvd at the address. `tiny` has so little K and V that calls are all that
is seen. --ask: each request's pages are looked up before they are put, as of a prompt of which the scheduler has not asked. Prints of each
request the time it took, the processor's time of this process, and how often kvd was called.
"""
import argparse
import os
import time
import urllib.request

import numpy as np

import kvd
from kvd.engines import MISSING, PageStore

MODELS = {"tiny": (1, 1, 64), "smollm2": (30, 3, 64)}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("address")
    p.add_argument("--requests", type=int, default=400)
    p.add_argument("--pages", type=int, default=16)
    p.add_argument("--model", choices=MODELS, default="tiny")
    p.add_argument("--codec", default="int2")
    p.add_argument("--ask", action="store_true")
    p.add_argument("--metrics", help="kvd's, such as http://127.0.0.1:9464/metrics: counts its calls too")
    a = p.parse_args()
    layers, heads, dim = MODELS[a.model]
    k, v = ([np.full((a.pages, heads, 64, dim), 0x3f80, np.uint16) for _ in range(layers)] for _ in "kv")
    described = kvd.Paged(k, v, [], order="bhtd")
    exact = bytes([1] + [0] * (a.pages - 5) + [1] * 4)
    missing = bytes([MISSING] * a.pages)
    store = PageStore(lambda: kvd.Pages(space=b"bench", layers=range(layers), kv_heads=heads, head_dim=dim, codec=a.codec, address=a.address, timeout=600))
    store.start()

    def calls():
        if not a.metrics:
            return 0
        text = urllib.request.urlopen(a.metrics).read().decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("kvd_rpc_requests_total") and "Pages" in line)

    began_calls, began, cpu = calls(), time.monotonic(), time.process_time()
    for r in range(a.requests):
        keys = [f"{began} {r} {i}".encode().rjust(32)[-32:] for i in range(a.pages)]
        had = store.lookup([keys], 0)[0].kinds if a.ask else missing
        kinds = store.put(keys, described.with_blocks(np.arange(a.pages)), None, exact, had)
        assert MISSING not in kinds
    took, cpu = time.monotonic() - began, time.process_time() - cpu
    print(f"{a.model}, {a.pages} pages: {took / a.requests * 1e3:.2f} ms, {cpu / a.requests * 1e3:.2f} ms of this process, "
          f"{(calls() - began_calls) / a.requests:.1f} calls a request; {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
