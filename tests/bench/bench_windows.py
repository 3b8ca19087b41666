#!/usr/bin/env python3
"""Memory of one sequence of a Gemma-3-shaped model, with its layers' sliding windows and without.

usage: bench_windows.py [BUILD [TOKENS]]    (default: build 32768; starts a kvd of its own). Needs: numpy.
Gemma 3 270M: 18 layers, every sixth sees all tokens, the others 512; 4 q heads, 1 kv head, head_dim 256; int2.
"""
import os
import pathlib
import subprocess
import sys
import time

SOURCE = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "build").resolve()
TOKENS = int(sys.argv[2]) if len(sys.argv) > 2 else 32768
os.environ.setdefault("KVD_LIBRARY", str(BUILD / "client/libkvd.so.0"))
sys.path.insert(0, str(SOURCE / "client/python"))
import numpy as np  # noqa: E402
import scratch  # noqa: E402

import kvd  # noqa: E402

LAYERS, HEADS, DIM, WINDOW, STEP = 18, 4, 256, 512, 512
WINDOWS = [0 if i % 6 == 5 else WINDOW for i in range(LAYERS)]


def sequence_bytes(address, windows):
    with kvd.Client(layers=range(LAYERS), q_heads=HEADS, kv_heads=1, head_dim=DIM, windows=windows, address=address) as client:
        s = client.create()
        k, v = (client.tensor(LAYERS, STEP, 1, DIM) for _ in range(2))
        for x in (k, v):
            x.array[:] = kvd.to_bf16(np.random.default_rng(1).normal(size=x.shape))
        for _ in range(0, TOKENS, STEP):
            s.append(k, v)
        return s.describe().bytes


def main():
    work = scratch.folder()
    address, log = f"unix:{work}/s", work / "log"
    daemon = subprocess.Popen([BUILD / "daemon/kvd", "--backend", "cpu", "--listen", address, "--metrics", "", "--pool-size", "1GiB"],
                              stderr=open(log, "w"))
    try:
        while "ready" not in log.read_text():
            if daemon.poll() is not None:
                sys.exit(log.read_text())
            time.sleep(0.05)
        bf16 = TOKENS * LAYERS * DIM * 2 * 2
        everything, windowed = sequence_bytes(address, None), sequence_bytes(address, WINDOWS)
        print(f"{TOKENS} tokens: bf16 {bf16 / 2**20:.1f} MiB, all of it in int2 {everything / 2**20:.1f} MiB, "
              f"with windows {windowed / 2**20:.1f} MiB ({everything / windowed:.1f} times less)")
    finally:
        daemon.terminate()
        daemon.wait()
    scratch.remove(work)


if __name__ == "__main__":
    main()
