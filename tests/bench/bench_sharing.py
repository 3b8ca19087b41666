#!/usr/bin/env python3
"""What sharing prefixes saves: workers, each a process, serve requests over a few prompts; tokens that were computed and adopted.

Usage: bench_sharing.py KVD_ADDRESS [--workers 4] [--requests 200] [--prompts 8] [--tokens 1024] [--answer 64] [--seed 1]
Wants the package kvd (PYTHONPATH=client/python, KVD_LIBRARY=.../libkvd.so.0) and a kvd that serves at the address. A request is a
prompt and a question of its own; K and V are random, but the same for the same token at the same place.
"""
import argparse
import multiprocessing
import time

import numpy as np

import kvd

LAYERS, Q_HEADS, KV_HEADS, DIM, BLOCK = 2, 4, 2, 64, 64


def kv_of(tokens, begin, end):
    def rows(salt, heads):
        return np.stack([np.random.default_rng([salt, int(t), begin + i]).standard_normal((LAYERS, heads, DIM), np.float32)
                         for i, t in enumerate(tokens[begin:end])], axis=1)
    return rows(1, KV_HEADS), rows(2, KV_HEADS)


def append(client, s, tokens, end):
    computed = end - s.length
    if computed:
        k, v = (client.tensor(*x.shape) for x in kv_of(tokens, s.length, end))
        for t, x in zip((k, v), kv_of(tokens, s.length, end)):
            t.array[:] = kvd.to_bf16(x)
        s.append(k, v)
        k.free(), v.free()
    return computed


def prompt_of(a, i):
    return np.random.default_rng([a.seed, i]).integers(0, 50000, a.tokens).astype(np.uint32)


def serve(a, mine, out):
    """One computes a prompt that is not there, while the others that want it wait for it, in match."""
    prompts = adopted = rest = 0
    with kvd.Client(layers=range(LAYERS), q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=DIM, codec="int2", address=a.address) as c:
        for request, i in mine:
            tokens = np.concatenate([prompt_of(a, i), np.random.default_rng([a.seed, 7, request]).integers(0, 50000, a.answer).astype(np.uint32)])
            m = c.match([kvd.Prompt(tokens[:a.tokens])], wait=60)[0]
            s = c.adopt(m) if m.lease else c.create()
            adopted += s.length
            prompts += append(c, s, tokens, a.tokens)
            s.publish_blocks(kvd.Prompt(tokens[:a.tokens]), end=True)
            rest += append(c, s, tokens, len(tokens))
            s.free()
    out.put((prompts, adopted, rest))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("address")
    for name, value in {"workers": 4, "requests": 200, "prompts": 8, "tokens": 1024, "answer": 64, "seed": 1}.items():
        p.add_argument(f"--{name}", type=int, default=value)
    a = p.parse_args()
    spawn = multiprocessing.get_context("spawn")
    order = np.random.default_rng(a.seed).integers(0, a.prompts, a.requests)
    out = spawn.Queue()
    workers = [spawn.Process(target=serve, args=(a, [(r, int(i)) for r, i in enumerate(order)][w::a.workers], out)) for w in range(a.workers)]
    begin = time.time()
    for w in workers:
        w.start()
    prompts, adopted, rest = (sum(x) for x in zip(*(out.get() for _ in workers)))
    for w in workers:
        w.join()
    once = len(set(order.tolist())) * a.tokens
    print(f"{a.workers} workers, {a.requests} requests over {a.prompts} prompts of {a.tokens} tokens, {time.time() - begin:.1f} s")
    print(f"tokens of prompts computed {prompts}, each once: {once}; adopted {adopted}; of questions computed {rest}")
    return prompts != once


if __name__ == "__main__":
    raise SystemExit(main())
