#!/usr/bin/env python3
"""Pages of an engine's own KV: GB/s of put and get, exact and encoded, against a copy of the same bytes in the same run.

Usage: bench_pages.py KVD_ADDRESS [--model smollm2|qwen3-8b] [--tokens 32768] [--codec int2] [--order nhd|vllm-cpu] [--block 16]
       [--device cpu|cuda]
Wants the package kvd (PYTHONPATH=client/python, KVD_LIBRARY=.../libkvd.so.0) and a kvd at the address whose pool has room for it. GB
are of the engine's bf16 K and V.
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
    source, target = (kvd.Paged(*x, rng.permutation(n), **orders) for x in (sides, out))
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
    with kvd.Pages(space=b"bench", layers=range(layers), kv_heads=heads, head_dim=dim, codec=a.codec, address=a.address, timeout=600) as p:
        for what, exact in (("exact", True), (a.codec, False)):
            keys = [f"{time.time_ns()} {what} {i}".encode().rjust(32) for i in range(pages)]
            keys = [k[-32:] for k in keys]
            timed(f"put {what}", lambda: p.put(keys, source, exact=[exact] * pages))
            for _ in range(2):
                timed(f"get {what}", lambda: p.get(keys, target))
            timed(f"look up {pages} keys", lambda: p.lookup([keys], lease_ms=0))


if __name__ == "__main__":
    main()
