#!/usr/bin/env python3
"""What codecs and rotation sets cost a real model: perplexity on texts, and recall of a number from far back.

Every token past the sink attends to compressed history as in serving: texts are fed 16 tokens at a time. Recall: a number is
told early in a context, and asked for at its end; the prompt's keys and values are the same for all codecs.

usage: bench_model.py MODEL.gguf --text prose=FILE code=FILE ... [--sets fitted=FILE ...] [--tokens N] [--trials N]
Starts a kvd of its own from --build. Needs: numpy, gguf, tokenizers (kvd_worker's).
"""
import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

SOURCE = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCE / "client/python"))


def pairs(words):
    return [w.split("=", 1) for w in words]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("--text", nargs="+", default=[], metavar="KIND=FILE")
    ap.add_argument("--sets", nargs="*", default=[], metavar="NAME=FILE", help="rotation sets besides hadamard and identity")
    ap.add_argument("--tokens", type=int, default=4096, help="of each text")
    ap.add_argument("--context", type=int, default=2048)
    ap.add_argument("--trials", type=int, default=20)
    ap.add_argument("--build", default="build")
    args = ap.parse_args()
    os.environ.setdefault("KVD_LIBRARY", str(pathlib.Path(args.build, "client/libkvd.so.0").resolve()))
    import numpy as np

    import kvd
    from kvd_worker import KvdCache, LocalCache, Model, generate, loss

    work = pathlib.Path(tempfile.mkdtemp(prefix="kvd-bench."))
    address = f"unix:{work}/s"
    (work / "store").mkdir()
    for name, path in pairs(args.sets):
        subprocess.run([f"{args.build}/client/kvctl", "--store", work / "store", "calib", "publish", path, f"model@{name}"],
                       check=True, stdout=subprocess.DEVNULL)
    daemon = subprocess.Popen([f"{args.build}/daemon/kvd", "--listen", address, "--metrics", "", "--pool-size", "2GiB",
                               "--store", work / "store", "--cache", work / "cache"], stderr=open(work / "log", "w"))
    try:
        while "ready" not in (work / "log").read_text():
            if daemon.poll() is not None:
                sys.exit((work / "log").read_text())
            time.sleep(0.05)
        model = Model(args.model)
        kinds = [("bf16", "bf16", "identity"), ("int2 hadamard", "int2", "hadamard"), ("int2 without rotation", "int2", "identity")]
        kinds += [(f"{codec} {n}", codec, f"model@{n}") for n, _ in pairs(args.sets) for codec in ("int2", "int2c", "int2-lm")]
        kinds += [(f"turboquant-{bits}", f"turboquant-{bits}", "random") for bits in (2, 3, 4)]
        clients = {name: kvd.Client(layers=range(model.layers), q_heads=model.q_heads, kv_heads=model.kv_heads,
                                    head_dim=model.head_dim, codec=codec, rotation_set=rotation, address=address)
                   for name, codec, rotation in kinds}
        print(f"# {model.name}, contexts of {args.context} tokens, sink 64, recent 256", flush=True)
        for kind, path in pairs(args.text):
            ids = model.encode(pathlib.Path(path).read_text(encoding="utf-8", errors="replace"))[: args.tokens]
            for name, client in clients.items():
                total, n, began = 0.0, 0, time.monotonic()
                for at in range(0, len(ids) - args.context + 1, args.context):
                    sequence = client.create()
                    a, b = loss(model, KvdCache(client, [sequence]), ids[at:at + args.context])
                    total, n = total + a, n + b
                    sequence.free()
                print(f"perplexity  {kind:10} {name:24} {np.exp(total / n):8.3f}  ({n} tokens, {time.monotonic() - began:.0f} s)",
                      flush=True)
        recall(args, model, clients, KvdCache, LocalCache, generate, np)
        for c in clients.values():
            c.close()
    finally:
        daemon.terminate()
        daemon.wait()


def recall(args, model, clients, KvdCache, LocalCache, generate, np):
    rng = np.random.default_rng(11)
    filler = model.encode(pathlib.Path(pairs(args.text)[0][1]).read_text(encoding="utf-8", errors="replace"))
    good = dict.fromkeys(clients, 0)
    digits = dict.fromkeys(clients, 0)
    for trial in range(args.trials):
        number = "".join(str(d) for d in rng.integers(0, 10, 7))
        start = int(rng.integers(0, len(filler) - args.context))
        head = model.encode(f"<|im_start|>user\nRemember this: the magic number is {number}. I will ask for it later.\n\n")
        # Past the sink, so that what is asked for has been compressed.
        before, after = filler[start:start + 100], filler[start + 100:start + args.context - 200]
        tail = model.encode("\n\nWhat is the magic number?<|im_end|>\n<|im_start|>assistant\nThe magic number is")
        prompt = model.encode("<|im_start|>user\n") + before + head[2:] + after + tail
        local = LocalCache(1)
        model.forward([prompt[:-1]], local)
        k, v = local.keys_and_values(0)
        want = model.encode(" " + number)
        for name, client in clients.items():
            sequence = client.create()
            tk, tv = client.tensor(*k.shape), client.tensor(*v.shape)
            tk.array[:], tv.array[:] = k, v
            sequence.append(tk, tv)
            tk.free(), tv.free()
            answer = generate(model, KvdCache(client, [sequence]), [prompt[-1:]], len(want))[0]
            good[name] += answer == want
            digits[name] += sum(a == b for a, b in zip(answer, want)) / len(want)
            sequence.free()
    for name in clients:
        print(f"recall      {name:35} {good[name]} of {args.trials} numbers, {100 * digits[name] / args.trials:.0f} % of their tokens",
              flush=True)


if __name__ == "__main__":
    main()
