#!/usr/bin/env python3
"""What Python costs a worker: steps of one token, layer by layer and all layers in one call, and the part of it that libkvd's calls
take, which a worker in C pays too.

usage: bench_python.py [BUILD]    (default: build; starts a kvd of its own). Needs: numpy.
"""
import os
import pathlib
import subprocess
import sys
import time

SOURCE = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "build").resolve()
os.environ.setdefault("KVD_LIBRARY", str(BUILD / "client/libkvd.so.0"))
sys.path.insert(0, str(SOURCE / "client/python"))
import numpy as np  # noqa: E402
import scratch  # noqa: E402

import kvd  # noqa: E402
from kvd import _library  # noqa: E402

LAYERS, Q_HEADS, KV_HEADS, DIM, STORED, STEPS = 30, 9, 3, 64, 1024, 40


def measure(client, name, per_call):
    inside = [0.0]
    plain = _library.call

    def timed(function, *arguments):
        began = time.perf_counter()
        plain(function, *arguments)
        inside[0] += time.perf_counter() - began

    s = client.create()
    fill = [client.tensor(LAYERS, STORED, KV_HEADS, DIM) for _ in range(2)]
    for t in fill:
        t.array[:] = kvd.to_bf16(np.random.default_rng(1).normal(size=t.shape))
    s.append(*fill)
    q, o = (client.tensor(LAYERS, 1, Q_HEADS, DIM, dtype="f32") for _ in range(2))
    k, v = (client.tensor(LAYERS, 1, KV_HEADS, DIM) for _ in range(2))
    _library.call = timed
    began = time.perf_counter()
    for _ in range(STEPS):
        for layer in range(0, LAYERS, per_call):
            part = np.s_[layer:layer + per_call]
            s.step(q[part], k[part], v[part], o[part], layer=layer)
    took = time.perf_counter() - began
    _library.call = plain
    n, calls = STEPS * LAYERS, STEPS * LAYERS // per_call
    print(f"{name:28} {took / n * 1e6:7.1f} us a layer and token, {inside[0] / n * 1e6:7.1f} of it in libkvd; "
          f"Python {(took - inside[0]) / calls * 1e6:5.1f} us a call")


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
        with kvd.Client(layers=range(LAYERS), q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=DIM, address=address) as client:
            print(f"{LAYERS} layers, {Q_HEADS}/{KV_HEADS} heads of {DIM}, {STORED} tokens stored, one token a step")
            measure(client, "a call for each layer", 1)
            measure(client, "one call for all layers", LAYERS)
    finally:
        daemon.terminate()
        daemon.wait()
    scratch.remove(work)


if __name__ == "__main__":
    main()
