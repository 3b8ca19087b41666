#!/usr/bin/env python3
"""What a cut costs on a real model: the next tokens of a text after a sequence was adopted where no end was published, so that its
last tokens are compressed ones and its recent window is empty.

Per codec, over the first 64 and all of the next tokens: perplexity, and the divergence (KL, nats) from the sequence that was never
cut. `cut`: adopted there. `window computed again`: adopted 256 tokens before, which are then computed anew, so that the window is
as it was. bf16: the same sequence, nothing compressed.

usage: bench_cut.py MODEL.gguf --text FILE... [--codecs int2,int2c] [--cut 1024] [--next 256] [--cuts N] [--build build]
Starts a kvd of its own. Needs: numpy, gguf, tokenizers (kvd_worker's).
"""
import argparse
import os
import pathlib
import subprocess
import sys
import time

import scratch

SOURCE = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCE / "client/python"))
RECENT, FIRST = 256, 64


class Sum:
    def __init__(self, np):
        self.np, self.nll, self.kl = np, [], []

    def add(self, p, before, targets):
        n = self.np.arange(len(targets))
        self.nll.append(-p[n, targets])
        self.kl.append((self.np.exp(before) * (before - p)).sum(axis=-1))

    def line(self, cuts):
        nll, kl = (self.np.array(x).reshape(cuts, -1) for x in (self.nll, self.kl))
        return "  ".join(f"{n:4}: {self.np.exp(nll[:, :n].mean()):8.3f} KL {kl[:, :n].mean():.4f}" for n in (FIRST, nll.shape[1]))


def log_softmax(z, np):
    z = z.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def feed(model, cache, ids, begin, end, np, step=16):
    """Log-probabilities of what follows each token of ids[begin:end], fed as a decoder would."""
    return np.concatenate([log_softmax(model.forward([list(ids[a:min(a + step, end)])], cache, every=True), np)
                           for a in range(begin, end, step)])


def one_cut(args, model, kvd, KvdCache, clients, ids, sums, np):
    targets = np.asarray(ids[args.cut + 1:args.cut + args.next + 1])
    end = args.cut + args.next

    def after(client, s, begin, step):
        """Feeds from `begin` to the cut, and then what comes after it."""
        cache = KvdCache(client, [s])
        if begin < args.cut:
            feed(model, cache, ids, begin, args.cut, np, step)
        return feed(model, cache, ids, args.cut, end, np)

    for codec, c in clients.items():
        s = c.create()
        before = after(c, s, 0, 128)
        sums[codec, "never cut"].add(before, before, targets)
        if codec != "bf16":
            prompt = kvd.Prompt(np.asarray(ids[:args.cut], np.uint32), extra=os.urandom(8))
            s.publish_blocks(prompt)
            m = c.match([prompt])[0]
            assert (m.tokens, m.window_tokens) == (args.cut, 0), m
            for name, tokens in (("cut", args.cut), ("window computed again", args.cut - RECENT)):
                a = c.adopt(c.match([prompt])[0], tokens // 64)
                sums[codec, name].add(after(c, a, tokens, 128), before, targets)
                a.free()
        s.free()


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("--text", nargs="+", required=True)
    ap.add_argument("--codecs", default="int2,int2c")
    ap.add_argument("--cut", type=int, default=1024, help="a multiple of 64, at least 384")
    ap.add_argument("--next", type=int, default=256, help="tokens that are looked at, a multiple of 64, at least 256")
    ap.add_argument("--cuts", type=int, default=8, help="of each text, at most")
    ap.add_argument("--build", default="build")
    args = ap.parse_args()
    os.environ.setdefault("KVD_LIBRARY", str(pathlib.Path(args.build, "client/libkvd.so.0").resolve()))
    import numpy as np

    import kvd
    from kvd_worker import KvdCache, Model

    work = scratch.folder()
    model = Model(args.model)
    daemon = subprocess.Popen([f"{args.build}/daemon/kvd", "--listen", f"unix:{work}/s", "--metrics", "", "--pool-size", "1GiB",
                               "--cache", work / "cache"], stderr=open(work / "log", "w"))
    try:
        while "ready" not in (work / "log").read_text():
            if daemon.poll() is not None:
                sys.exit((work / "log").read_text())
            time.sleep(0.05)
        clients = {codec: kvd.Client(layers=range(model.layers), q_heads=model.q_heads, kv_heads=model.kv_heads, head_dim=model.head_dim,
                                     codec=codec, address=f"unix:{work}/s") for codec in ["bf16", *args.codecs.split(",")]}
        names = [(c, n) for c in clients for n in (["never cut"] if c == "bf16" else ["never cut", "cut", "window computed again"])]
        print(f"# {model.name}: {args.next} tokens after {args.cut}, window {RECENT}; perplexity and KL from never cut", flush=True)
        for path in args.text:
            ids = model.encode(pathlib.Path(path).read_text(encoding="utf-8", errors="replace"))
            starts = range(0, len(ids) - args.cut - args.next - 1, args.cut + args.next)[:args.cuts]
            sums = {name: Sum(np) for name in names}
            for at in starts:
                one_cut(args, model, kvd, KvdCache, clients, ids[at:], sums, np)
            for codec, name in names if len(starts) else []:
                print(f"{pathlib.Path(path).name:16} {codec:6} {name:22} {sums[codec, name].line(len(starts))}  ({len(starts)} cuts)", flush=True)
        for c in clients.values():
            c.close()
    finally:
        daemon.terminate()
        daemon.wait()
    scratch.remove(work)


if __name__ == "__main__":
    main()
