#!/usr/bin/env python3
"""Pages of an engine's own KV: GB/s of put and get, exact and encoded, against a copy of the same bytes in the same run.

Usage: bench_pages.py KVD_ADDRESS [--model smollm2|qwen3-8b] [--tokens 32768] [--codec int2] [--order nhd|vllm-cpu] [--block 16]
       [--device cpu|cuda] [--registered]
Wants the package kvd (PYTHONPATH=client/python, KVD_LIBRARY=.../libkvd.so.0) and a kvd at the address whose pool has room for it. GB
are of the engine's bf16 K and V. --registered: the same once more with the engine's KV registered, so that kvd reads and writes it itself
and libkvd copies nothing; kvd must run on that device.
"""
import argparse
import time

import numpy as np

import kvd

MODELS = {"smollm2": (30, 3, 64), "qwen3-8b": (36, 8, 128)}
ORDERS = {"nhd": ("bthd", "bthd"), "vllm-cpu": ("bhdt", "bhtd")}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("address")
    p.add_argument("--model", choices=MODELS, default="smollm2")
    p.add_argument("--tokens", type=int, default=32768)
    p.add_argument("--codec", default="int2")
    p.add_argument("--order", choices=ORDERS, default="nhd")
    p.add_argument("--block", type=int, default=16)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the engine's blocks are; cuda wants PyTorch")
    p.add_argument("--registered", action="store_true", help="then the same with the blocks registered with kvd")
    a = p.parse_args()
    layers, heads, dim = MODELS[a.model]
    n, pages = a.tokens // a.block, a.tokens // 64
    sizes = {"b": n, "h": heads, "t": a.block, "d": dim}
    rng = np.random.default_rng(1)
    some = kvd.to_bf16(rng.standard_normal(1 << 20, np.float32))
    sides = [[np.resize(some, [sizes[x] for x in o]) for _ in range(layers)] for o in ORDERS[a.order]]
    out = [[np.zeros_like(x) for x in side] for side in sides]
    wait = lambda: None  # noqa: E731
    if a.device == "cuda":
        import torch
        sides, out = ([[torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).cuda() for x in side] for side in kv] for kv in (sides, out))
        wait = torch.cuda.synchronize
    orders = dict(zip(("order", "v_order"), ORDERS[a.order]))
    blocks = [rng.permutation(n) for _ in range(2)]
    size = 2 * layers * heads * dim * 2 * pages * 64

    def timed(what, run):
        wait()
        began = time.monotonic()
        run()
        wait()
        took = time.monotonic() - began
        print(f"{what:24} {took * 1e3:9.1f} ms {size / took / 1e9:7.2f} GB/s")

    print(f"{a.model}: {pages * 64} tokens, {size / 1e9:.2f} GB of bf16, blocks of {a.block}, {a.order}")
    for _ in range(2):
        timed("copy", lambda: [np.copyto(y, x) if a.device == "cpu" else y.copy_(x) for i in range(2) for x, y in zip(sides[i], out[i])])
    def shared(p, side):
        """The same in memory that kvd has too."""
        if a.device == "cuda":
            return side
        tensors = [p.client.tensor(*x.shape).array for x in side]
        for t, x in zip(tensors, side):
            t[...] = x
        return tensors

    with kvd.Pages(space=b"bench", layers=range(layers), kv_heads=heads, head_dim=dim, codec=a.codec, address=a.address, timeout=600) as p:
        for way in ("copied", "registered")[:1 + a.registered]:
            if way == "registered":
                sides, out = ([shared(p, side) for side in kv] for kv in (sides, out))
            source, target = (kvd.Paged(*x, b, **orders) for x, b in zip((sides, out), blocks))
            if way == "registered":
                timed("register", lambda: [p.register(x) for x in (source, target)])
            for what, exact in (("exact", True), (a.codec, False)):
                for _ in range(2):  # the first finds nothing warm
                    keys = [f"{time.time_ns()} {what} {i}".encode().rjust(32)[-32:] for i in range(pages)]
                    timed(f"put {what}, {way}", lambda: p.put(keys, source, exact=[exact] * pages))
                for _ in range(3):
                    timed(f"get {what}, {way}", lambda: p.get(keys, target))
                timed(f"look up {pages} keys", lambda: p.lookup([keys], lease_ms=0))
        if a.registered:
            timed("unregister", p.unregister)


if __name__ == "__main__":
    main()
