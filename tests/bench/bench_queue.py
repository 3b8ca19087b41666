#!/usr/bin/env python3
"""How long a load takes while stores are under way: in their queue, in a queue of its own, and of a session of its own.

Usage: bench_queue.py KVD_ADDRESS [--rounds 10] [--puts 8] [--pages 32]
Wants the package kvd (PYTHONPATH=client/python, KVD_LIBRARY=.../libkvd.so.0) and a kvd at the address whose pool has room for what is put. Each round queues
so many puts and then a get of four exact pages, and waits for all.
"""
import argparse
import time

import numpy as np

import kvd

LAYERS, HEADS, DIM = 4, 8, 128


def main():
    p = argparse.ArgumentParser()
    p.add_argument("address")
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--puts", type=int, default=8)
    p.add_argument("--pages", type=int, default=32, help="of each put")
    a = p.parse_args()

    def tensors(blocks, value):
        return ([np.full((blocks, HEADS, 64, DIM), value, np.uint16) for _ in range(LAYERS)] for _ in "kv")

    def pages():
        return kvd.Pages(space=b"bench", layers=range(LAYERS), kv_heads=HEADS, head_dim=DIM, address=a.address, timeout=600)

    source, target = kvd.Paged(*tensors(a.pages, 0x3f80), range(a.pages), order="bhtd"), kvd.Paged(*tensors(4, 0), range(4), order="bhtd")
    few = [f"{time.time_ns()} {i}".rjust(32).encode() for i in range(4)]
    with pages() as one, pages() as other:
        one.put(few, source.with_blocks(range(4)), exact=[True] * 4)
        both = one.queue()
        for what, puts, gets in (("in the stores' queue", both, both), ("in another", one.queue(), one.queue()),
                                 ("of another session", one.queue(), other.queue()), ("nothing is stored", None, other.queue())):
            took = []
            for _ in range(a.rounds):
                stores = []
                for _ in range(a.puts if puts else 0):
                    keys = [f"{time.time_ns()} {i}".rjust(32).encode() for i in range(a.pages)]
                    stores.append(puts.put(keys, source))
                began = time.monotonic()
                gets.wait(gets.get(few, target), 600)
                took.append(time.monotonic() - began)
                for ticket in stores:
                    puts.wait(ticket, 600)
                for queue in filter(None, {puts, gets}):
                    assert all(e.error is None for e in queue.poll())
            print(f"{what:22} a load: median {sorted(took)[len(took) // 2] * 1e3:8.1f} ms, longest {max(took) * 1e3:8.1f} ms")


if __name__ == "__main__":
    main()
