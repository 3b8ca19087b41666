#!/usr/bin/env python3
"""What codecs, rotation sets and scales cost a real model: perplexity on texts and the divergence (KL, nats) of the next token from
bf16's; and recall of a number from far back, with what became of its keys.

Every token past the sink attends to compressed history as in serving: texts are fed 16 tokens at a time. Recall: a number is
told early in a context, and asked for at its end; the prompt's keys and values are the same for all codecs. `bias` is the mean
error of a query's logit at the compressed key that it looks for most, over all layers and heads; `logit error` the root mean square
over all compressed keys; both of a prompt's last token, over the first prompts.

usage: bench_model.py MODEL.gguf --text prose=FILE code=FILE ... [--sets fitted=FILE ...] [--codecs LIST] [--scales K,V ...]
                      [--tokens N] [--trials N]
Starts a kvd of its own from --build. Needs: numpy, gguf, tokenizers (kvd_worker's).
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

SOURCE = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCE / "client/python"))
READ_BACK = 6  # prompts whose keys are looked at


def pairs(words):
    return [w.split("=", 1) for w in words]


def metadata_of(path):
    raw = pathlib.Path(path).read_bytes()
    return json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])["__metadata__"]


def of_transforms(codec):
    """Whether its scales are no choice."""
    return codec.startswith("tc")


def with_scales(source, to, scales):
    """A copy of a rotation set with other scales (calib/README.md)."""
    raw = pathlib.Path(source).read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + n])
    k, v = scales.split(",")
    meta = {**header["__metadata__"], "format": "kvd-rotation-set/2", "k.scale": k, "v.scale": v}
    text = json.dumps({**header, "__metadata__": meta}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    to.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n:])


class Cases:
    """A cache for kvd_worker's model in which every sequence belongs to a client of its own: the same tokens with every codec."""

    def __init__(self, clients, KvdCache):
        self.caches = [KvdCache(c, [c.create()]) for c in clients]
        self.asked = []  # queries by layer

    @property
    def lengths(self):
        return [c.sequences[0].length for c in self.caches]

    def attend(self, layer, q, k, v, counts):
        import numpy as np

        out, at = np.empty_like(q), 0
        for cache, n in zip(self.caches, counts):
            part = np.s_[at:at + n]
            out[part] = cache.attend(layer, q[part], k[part], v[part], [n])
            at += n
        self.asked.append(q[0].copy()) if layer == len(self.asked) else None
        return out

    def free(self):
        for cache in self.caches:
            cache.sequences[0].free()
            for tensors in cache._tensors.values():
                for t in tensors:
                    t.free()


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model")
    ap.add_argument("--text", nargs="+", required=True, metavar="KIND=FILE", help="recall's filler is from the first")
    ap.add_argument("--sets", nargs="*", default=[], metavar="NAME=FILE", help="sets besides hadamard and identity")
    ap.add_argument("--codecs", default="int2,int2c,int2-lm,turboquant-2,turboquant-3,turboquant-4,tc2,tc2.5")
    ap.add_argument("--scales", nargs="*", default=[], metavar="K,V",
                    help="published, least-squares or unbiased: every set with each of these, not with its own")
    ap.add_argument("--tokens", type=int, default=4096, help="of each text; 0: no perplexity")
    ap.add_argument("--context", type=int, default=2048)
    ap.add_argument("--trials", type=int, default=20)
    ap.add_argument("--seed", type=int, default=11)
    ap.add_argument("--build", default="build")
    args = ap.parse_args()
    os.environ.setdefault("KVD_LIBRARY", str(pathlib.Path(args.build, "client/libkvd.so.0").resolve()))
    import numpy as np

    import kvd
    from kvd_worker import KvdCache, LocalCache, Model

    work = pathlib.Path(tempfile.mkdtemp(prefix="kvd-bench."))
    address = f"unix:{work}/s"
    (work / "store").mkdir()
    model = Model(args.model)
    kinds = [("bf16", "bf16", "identity")] + sets_of(args, work, model)
    daemon = subprocess.Popen([f"{args.build}/daemon/kvd", "--listen", address, "--metrics", "", "--pool-size", f"{2 + len(kinds) // 6}GiB",
                               "--store", work / "store", "--cache", work / "cache"], stderr=open(work / "log", "w"))
    try:
        while "ready" not in (work / "log").read_text():
            if daemon.poll() is not None:
                sys.exit((work / "log").read_text())
            time.sleep(0.05)
        clients = {name: kvd.Client(layers=range(model.layers), q_heads=model.q_heads, kv_heads=model.kv_heads,
                                    head_dim=model.head_dim, codec=codec, rotation_set=rotation, address=address)
                   for name, codec, rotation in kinds}
        print(f"# {model.name}, contexts of {args.context} tokens, sink 64, recent 256", flush=True)
        for kind, path in pairs(args.text):
            ids = model.encode(pathlib.Path(path).read_text(encoding="utf-8", errors="replace"))[: args.tokens]
            if len(ids) >= args.context:
                perplexity(args, model, kind, ids, clients, KvdCache, np)
        if args.trials:
            recall(args, model, clients, KvdCache, LocalCache, np)
        for c in clients.values():
            c.close()
    finally:
        daemon.terminate()
        daemon.wait()


def sets_of(args, work, model):
    """(name, codec, rotation set) of all that is compared, published in the store."""
    codecs, kinds = args.codecs.split(","), []
    kvctl = [f"{args.build}/client/kvctl", "--store", work / "store", "calib"]

    def publish(name, of, rotation, path):
        for i, scales in enumerate((not any(of_transforms(c) for c in of) and args.scales) or [None]):
            if scales:
                with_scales(path, work / "scaled", scales)
            tag = f"model@{name}-{i}"
            subprocess.run([*kvctl, "publish", work / "scaled" if scales else path, tag], check=True, stdout=subprocess.DEVNULL)
            kinds.extend((f"{codec} {name}{' ' + scales if scales else ''}", codec, tag) for codec in of if codec in codecs)

    def built_in(matrix, *of):
        made = subprocess.run([*kvctl, "hadamard", f"model@{matrix}", f"0-{model.layers - 1}", str(model.head_dim), "--matrix", matrix],
                              check=True, capture_output=True, text=True).stdout
        publish(matrix, of, matrix, work / f"store/objects/sha256/{made.split(':')[-1].strip()}.safetensors")

    built_in("identity", "int2")
    built_in("hadamard", "int2")
    for name, path in pairs(args.sets):
        own = metadata_of(path).get("codec")  # a set of transforms is for one
        publish(name, (own,) if own else ("int2", "int2c", "int2-lm"), name, path)
    built_in("random", "turboquant-2", "turboquant-3", "turboquant-4")
    return kinds


def log_softmax(z, np):
    z = z.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def perplexity(args, model, kind, ids, clients, KvdCache, np):
    nll, kl, n = np.zeros(len(clients)), np.zeros(len(clients)), 0
    for at in range(0, len(ids) - args.context + 1, args.context):
        cases = Cases(clients.values(), KvdCache)
        for a in range(at, at + args.context - 1, 16):
            new = list(ids[a:min(a + 16, at + args.context - 1)])
            logits = model.forward([new] * len(clients), cases, every=True).reshape(len(clients), len(new), -1)
            bf16, targets = log_softmax(logits[0], np), np.asarray(ids[a + 1:a + 1 + len(new)])
            for i, case in enumerate(logits):
                p = log_softmax(case, np) if i else bf16
                nll[i] -= p[np.arange(len(new)), targets].sum()
                kl[i] += (np.exp(bf16) * (bf16 - p)).sum()
            n += len(new)
        cases.free()
    for i, name in enumerate(clients):
        print(f"perplexity  {kind:10} {name:44} {np.exp(nll[i] / n):8.3f} ({100 * np.expm1((nll[i] - nll[0]) / n):+5.1f} %)  "
              f"KL {kl[i] / n:.4f}  ({n} tokens)", flush=True)


def recall(args, model, clients, KvdCache, LocalCache, np):
    rng = np.random.default_rng(args.seed)
    filler = model.encode(pathlib.Path(pairs(args.text)[0][1]).read_text(encoding="utf-8", errors="replace"))
    good, answers = np.zeros((args.trials, len(clients)), bool), np.zeros((args.trials, len(clients)))
    bias, square = np.zeros(len(clients)), np.zeros(len(clients))
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
        cases = Cases(clients.values(), KvdCache)
        for cache in cases.caches:
            tk, tv = cache.client.tensor(*k.shape), cache.client.tensor(*v.shape)
            tk.array[:], tv.array[:] = k, v
            cache.sequences[0].append(tk, tv)
            tk.free(), tv.free()
        # The answer is fed along: greedy decoding finds it where it is the likeliest throughout.
        feed = [prompt[-1], *want[:-1]]
        p = log_softmax(model.forward([feed] * len(clients), cases, every=True).reshape(len(clients), len(want), -1), np)
        good[trial] = (p.argmax(axis=-1) == want).all(axis=-1)
        answers[trial] = -p[:, np.arange(len(want)), want].sum(axis=-1)
        if trial < READ_BACK:
            for i, (b, s) in enumerate(key_errors(cases, k, np)):
                bias[i], square[i] = bias[i] + b, square[i] + s
        cases.free()
        if sys.stderr.isatty():
            print(f"\r{trial + 1} of {args.trials}", end="", file=sys.stderr, flush=True)
    seen = min(READ_BACK, args.trials)
    for i, name in enumerate(clients):
        print(f"recall      {name:44} {good[:, i].sum():3} of {args.trials}  nll {answers[:, i].mean():6.3f}  "
              f"bias {bias[i] / seen:+.3f}  logit error {np.sqrt(square[i] / seen):.3f}", flush=True)


def key_errors(cases, k, np):
    """Per case: the mean error of the logits at the strongest compressed keys, and the mean squared one at all of them."""
    import kvd

    sink, end = 64, (k.shape[1] - 256) // 16 * 16
    history, group = kvd.from_bf16(k[:, sink:end]), cases.asked[0].shape[0] // k.shape[2]
    for cache in cases.caches:
        back = cache.client.tensor(*history.shape, dtype="f32")
        cache.sequences[0].read(sink, end - sink, k=back)
        bias, square = [], []
        for layer, q in enumerate(cases.asked):
            for h, row in enumerate(q / np.sqrt(q.shape[-1])):
                logits, got = history[layer, :, h // group] @ row, back.array[layer, :, h // group] @ row
                bias.append((got - logits)[logits.argmax()])
                square.append(np.mean((got - logits) ** 2))
        back.free()
        yield np.mean(bias), np.mean(square)


if __name__ == "__main__":
    main()
