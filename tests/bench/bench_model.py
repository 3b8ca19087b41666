#!/usr/bin/env python3
"""What codecs, rotation sets and scales cost a real model: perplexity on texts and the divergence (KL, nats) of the next token from
bf16's; and recall of facts from far back, with what became of their keys.

Every token past the sink attends to compressed history as in serving: texts are fed 16 tokens at a time. Recall: seven digits
and four words are told in a prompt, and each asked for in a fork of it; the prompt's keys and values are the same for all
codecs, the question's are each codec's own. A fact is recalled if every token of it is the likeliest; `nll` is that of the whole
answer. The same questions are then left to the model, which answers with the likeliest tokens (--generate of them at most): how many
answers have the fact, how long they are and how many end. `bias` is the mean error of a query's logit at the compressed key that it looks for most, over all layers and heads;
`logit error` the root mean square over all compressed keys; both of the first prompts' last token.

usage: bench_model.py MODEL.gguf --text prose=FILE code=FILE ... [--fillers NAME=FILE ...] [--sets fitted=FILE ...] [--codecs LIST]
                      [--scales K,V ...] [--tokens N] [--trials N] [--log FILE] [--jobs N]
       bench_model.py --sum FILE...      what the logs of runs say together
Starts a kvd of its own from --build, on the CPU. With --jobs N, N processes share the work, each with a kvd, a log (FILE.0, FILE.1
...) and an N-th of the machine's cores. Needs: numpy, gguf, tokenizers (kvd_worker's); with PyTorch it is several times as fast.
"""
import argparse
import glob
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import scratch
from model_trials import PIECE, Log, Trial, records_of, report, words_of

SOURCE = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCE / "client/python"))
READ_BACK = 6  # prompts whose keys are looked at
ASKED = 192  # tokens that facts, questions and their answers take beside a prompt's text, at most
STEP = 16  # tokens of a text that are fed at a time


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


def with_torch(model, device="cpu"):
    """PyTorch's decoder in place of NumPy's, where it is: several times as fast."""
    try:
        import model_torch
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise
        return model
    model.forward = model_torch.Decoder(model, device).forward
    return model


def prefill(model, ids, LocalCache):
    """Keys and values of a prompt, as stock attention has them."""
    if "model_torch" in sys.modules:
        prompt = sys.modules["model_torch"].Prompt(model.windows)
        model.forward([ids], prompt)
        return prompt.keys_and_values()
    local = LocalCache(1, windows=model.windows)
    model.forward([ids], local)
    return local.keys_and_values(0)


class Cases:
    """A cache for kvd_worker's model in which every sequence belongs to a client of its own: the same tokens with every codec."""

    def __init__(self, clients, KvdCache, sequences=None):
        self.caches = [KvdCache(c, [s]) for c, s in zip(clients, sequences or [c.create() for c in clients])]
        self.asked = []  # queries by layer

    @property
    def lengths(self):
        return [c.sequences[0].length for c in self.caches]

    def attend(self, layer, q, k, v, counts):
        import numpy as np

        out, at = np.empty_like(q), 0
        for cache, n in zip(self.caches, counts):
            part = np.s_[at:at + n]
            if n:
                out[part] = cache.attend(layer, q[part], k[part], v[part], [n])
            at += n
        self.asked.append(q[counts[0] - 1].copy()) if layer == len(self.asked) else None
        return out

    def append(self, k, v):
        """Whole layers at once."""
        for cache in self.caches:
            tk, tv = cache.client.tensor(*k.shape), cache.client.tensor(*v.shape)
            tk.array[:], tv.array[:] = k, v
            cache.sequences[0].append(tk, tv)
            tk.free(), tv.free()

    def fork(self, KvdCache):
        return Cases([c.client for c in self.caches], KvdCache, [c.sequences[0].fork()[0] for c in self.caches])

    def free(self):
        for cache in self.caches:
            cache.sequences[0].free()
            for tensors in cache._tensors.values():
                for t in tensors:
                    t.free()


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", nargs="?")
    ap.add_argument("--text", nargs="+", default=[], metavar="KIND=FILE")
    ap.add_argument("--fillers", nargs="+", default=[], metavar="KIND=FILE", help="texts around the facts, in turn (default: the texts)")
    ap.add_argument("--sets", nargs="*", default=[], metavar="NAME=FILE", help="sets besides hadamard and identity")
    ap.add_argument("--codecs", default="int2,int2c,int2-lm,turboquant-2,turboquant-3,turboquant-4,tc2,tc2.5")
    ap.add_argument("--rows", help="only these, by the names that are printed, with commas between; bf16 is always there")
    ap.add_argument("--scales", nargs="*", default=[], metavar="K,V",
                    help="published, least-squares or unbiased: every set with each of these, not with its own")
    ap.add_argument("--tokens", type=int, default=4096, help="of each text; 0: no perplexity")
    ap.add_argument("--context", type=int, default=2048)
    ap.add_argument("--trials", type=int, default=20, help="prompts, each with a fact of both kinds")
    ap.add_argument("--generate", type=int, default=48, metavar="TOKENS", help="of an answer at most; 0: no answers")
    ap.add_argument("--jobs", type=int, metavar="N", help="processes that share the work")
    ap.add_argument("--share", metavar="I/N", help="do only the I-th of N shares (0 is the first); --jobs gives them out")
    ap.add_argument("--threads", type=int, help="of kvd (default: one a core)")
    ap.add_argument("--device", default="cpu", help="where PyTorch has the model, such as cuda; kvd is on the CPU")
    ap.add_argument("--log", help="append what is measured to this file, and do not measure again what it has")
    ap.add_argument("--sum", nargs="+", metavar="FILE", help="only print what these logs say")
    ap.add_argument("--seed", type=int, default=11)
    ap.add_argument("--build", default="build")
    args = ap.parse_args()
    if args.sum:
        print("\n".join(report([r for file in args.sum for r in records_of(file)])))
        return
    if not args.model or not args.text + args.fillers:
        ap.error("a model and texts are wanted")
    end_all_on_sigterm()
    if args.jobs:
        work = None if args.log else scratch.folder()
        code = run_jobs(args.jobs, args.log or f"{work}/log")
        if work and code == 0:
            scratch.remove(work)
        sys.exit(code)
    args.share = tuple(map(int, (args.share or "0/1").split("/")))
    os.environ.setdefault("KVD_LIBRARY", str(pathlib.Path(args.build, "client/libkvd.so.0").resolve()))
    import numpy as np

    import kvd
    from kvd_worker import KvdCache, LocalCache, Model

    work = scratch.folder()
    address = f"unix:{work}/s"
    (work / "store").mkdir()
    log = Log(args.log, shares_of(args.log.rpartition(".")[0]) if args.log and args.share[1] > 1 else ())
    model = with_torch(Model(args.model), args.device)
    check_lengths(args, model)
    kinds = sets_of(args, work, model)
    if args.rows:
        unknown = set(args.rows.split(",")) - {name for name, _, _ in kinds}
        if unknown:
            sys.exit(f"no rows {', '.join(sorted(unknown))}; there are {', '.join(name for name, _, _ in kinds)}")
        kinds = [k for k in kinds if k[0] in args.rows.split(",")]
    kinds.insert(0, ("bf16", "bf16", "identity"))
    # Extents are small, as each set wants some of its own, and one with marks some for each plane.
    daemon = subprocess.Popen([f"{args.build}/daemon/kvd", "--backend", "cpu", "--listen", address, "--metrics", "", "--pool-size",
                               f"{2 + len(kinds) // 6}GiB", "--extent-size", "16MiB", "--store", work / "store", "--cache", work / "cache",
                               *(["--threads", str(args.threads)] if args.threads else [])], stderr=open(work / "log", "w"))
    try:
        while "ready" not in (work / "log").read_text():
            if daemon.poll() is not None:
                sys.exit((work / "log").read_text())
            time.sleep(0.05)
        clients = {name: kvd.Client(layers=range(model.layers), q_heads=model.q_heads, kv_heads=model.kv_heads, head_dim=model.head_dim,
                                    windows=model.windows, codec=codec, rotation_set=rotation, address=address)
                   for name, codec, rotation in kinds}

        def tokens(path):
            return model.encode(pathlib.Path(path).read_text(encoding="utf-8", errors="replace"))

        if args.trials:
            fillers = {kind: tokens(path) for kind, path in pairs(args.fillers or args.text)}
            recall(args, model, log, fillers, clients, KvdCache, LocalCache, np)
        before = 0
        for kind, path in pairs(args.text):
            before += perplexity(args, model, log, kind, tokens(path)[: args.tokens], clients, KvdCache, np, before)
        print("\n".join(report(log.records)))
        for c in clients.values():
            c.close()
    finally:
        daemon.terminate()
        daemon.wait()
    scratch.remove(work)


def shares_of(log):
    """What the processes wrote that shared the work: FILE.0, FILE.1 ..."""
    return sorted(f for f in glob.glob(f"{glob.escape(log)}.*") if f[len(log) + 1:].isdigit())


def end_all_on_sigterm():
    """Who is told to end tells those whom it has started: kvd, and the processes that share the work."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def cores(limit="/sys/fs/cgroup/cpu.max"):
    """How many this process may keep busy: a container's limit is below what the machine has, and more threads than cores are slow."""
    mine = len(os.sched_getaffinity(0))
    try:
        quota, period = pathlib.Path(limit).read_text().split()
        return max(1, min(mine, int(quota) // int(period)))
    except (OSError, ValueError):  # none, or "max"
        return mine


def run_jobs(jobs, log):
    """This command again, `jobs` times, a share of the work each. An exit code."""
    threads = max(1, cores() // jobs)
    env = {**os.environ, **{f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "OPENBLAS", "MKL")}}
    running = [subprocess.Popen([sys.executable, *sys.argv, "--jobs", "0", "--share", f"{i}/{jobs}", "--log", f"{log}.{i}", "--threads",
                                 str(threads)], env=env, stdout=subprocess.DEVNULL) for i in range(jobs)]
    try:
        failed = [i for i, p in enumerate(running) if p.wait()]
    finally:
        for p in running:
            p.terminate()
            p.wait()
    print("\n".join(report([r for file in shares_of(log) for r in records_of(file)])))
    if failed:
        print(f"shares {', '.join(map(str, failed))} failed: run it again, and what the logs have is not done again", file=sys.stderr)
    return 1 if failed else 0


def check_lengths(args, model):
    """A model's own limit is an end; what a set was fitted to is none, but nobody has measured what lies beyond."""
    longest = args.context + (ASKED + args.generate if args.trials else 0)
    if model.limit and longest > model.limit:
        sys.exit(f"contexts of {args.context} tokens, with a question {longest}, are more than the {model.limit} that {model.name} was made for")
    for name, path in pairs(args.sets):
        fitted = int(metadata_of(path).get("fitted_length", 0))
        if 0 < fitted < args.context:
            print(f"warning: set {name} ({path}) was fitted to contexts of {fitted} tokens, and these have {args.context}", file=sys.stderr)


def sets_of(args, work, model):
    """(name, codec, rotation set) of all that is compared, published in the store."""
    codecs, kinds = args.codecs.split(","), []
    kvctl = [f"{args.build}/client/kvctl", "--store", work / "store", "calib"]

    def publish(name, of, rotation, path):
        for scales in (not any(of_transforms(c) for c in of) and args.scales) or [None]:
            if scales:
                with_scales(path, work / "scaled", scales)
            tag = f"model@{len(kinds)}"
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
    if "model_torch" in sys.modules:
        return z.double().log_softmax(-1).cpu().numpy()
    z = z.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def losses(logits, targets, np):
    """Of logits [rows, tokens, vocabulary]: each row's nll of the targets, and its KL from the first row, summed over tokens."""
    if "model_torch" in sys.modules:
        return sys.modules["model_torch"].losses(logits, targets)
    p = log_softmax(logits, np)
    nll, kl = -p[:, np.arange(len(targets)), targets].sum(axis=-1), (np.exp(p[0]) * (p[0] - p)).sum(axis=(-1, -2))
    return nll.tolist(), kl.tolist()


def perplexity(args, model, log, kind, ids, clients, KvdCache, np, before=0):
    """Of a text, context by context; those of the texts before it were `before`, so that shares go on taking turns. How many it has."""
    first = model.encode(model.marks.first)
    ids = [t for at in range(0, len(ids), args.context - len(first)) for t in first + ids[at:at + args.context - len(first)]]
    if len(ids) < args.context:
        return 0
    starts = range(0, len(ids) - args.context + 1, args.context)
    for at in starts:
        about = {"what": "text", "model": model.name, "context": args.context, "about": kind, "number": at // args.context, "seed": 0}
        if log.has(**about, rows=clients) or (before + about["number"]) % args.share[1] != args.share[0]:
            continue
        cases, sizes = Cases(clients.values(), KvdCache), []
        rows = {name: ([], []) for name in clients}
        for step, a in enumerate(range(at, at + args.context - 1, STEP)):
            new = list(ids[a:min(a + STEP, at + args.context - 1)])
            logits = model.forward([new] * len(clients), cases, every=True).reshape(len(clients), len(new), -1)
            if step % PIECE == 0:
                sizes.append(0)
                for sums in rows.values():
                    sums[0].append(0.0), sums[1].append(0.0)
            sizes[-1] += len(new)
            for (nll, kl), *more in zip(rows.values(), *losses(logits, ids[a + 1:a + 1 + len(new)], np)):
                nll[-1] += more[0]
                kl[-1] += more[1]
        cases.free()
        log.add(**about, tokens=sizes, rows=rows)
        progress(f"{kind}, context {about['number'] + 1}")
    return len(starts)


def recall(args, model, log, fillers, clients, KvdCache, LocalCache, np):
    words = words_of(model)
    for number in range(args.share[0], args.trials, args.share[1]):
        trial = Trial(model, fillers, number, args.seed, args.context, words)
        about = {"what": "recall", "model": model.name, "context": args.context, "number": number, "seed": args.seed}
        answers = {**about, "what": "answer", "filler": trial.filler}
        done = [log.has(**about, about=kind, rows=clients) for kind in trial.asked]
        answered = [not args.generate or log.has(**answers, about=kind, rows=clients) for kind in trial.asked]
        if all(done + answered):
            continue
        k, v = prefill(model, trial.body, LocalCache)
        body = Cases(clients.values(), KvdCache)
        body.append(k, v)
        for kind, (question, want, back) in trial.asked.items() if not all(done) else ():
            cases = body.fork(KvdCache)
            # The answer is fed along: greedy decoding finds it where it is the likeliest throughout.
            feed = [*question, *want[:-1]]
            logits = model.forward([feed] * len(clients), cases, every=True).reshape(len(clients), len(feed), -1)
            p = log_softmax(logits[:, len(question) - 1:], np)
            good, nll = (p.argmax(axis=-1) == want).all(axis=-1), -p[:, np.arange(len(want)), want].sum(axis=-1)
            more = {}
            if number < READ_BACK and not model.windows:
                more["errors"] = dict(zip(clients, key_errors(cases, k, np)))
            log.add(**about, about=kind, filler=trial.filler, back=back, rows={n: [int(g), float(x)] for n, g, x in zip(clients, good, nll)}, **more)
            cases.free()
        for kind, (fact, question) in trial.open.items() if not all(answered) else ():
            cases = body.fork(KvdCache)
            texts = generate(model, question, cases, args.generate, np)
            log.add(**answers, about=kind, rows={n: [int(fact in text), tokens, int(ended)] for n, (text, tokens, ended) in zip(clients, texts)})
            cases.free()
        body.free()
        progress(f"prompt {number + 1} of {args.trials}")


def generate(model, question, cases, most, np):
    """Of each case: its answer, how many tokens that has, and whether it ended by itself."""
    said, feed = [[] for _ in cases.caches], [question] * len(cases.caches)
    ended = [False] * len(said)
    while any(feed):
        live, best = [i for i, f in enumerate(feed) if f], model.forward(feed, cases).argmax(axis=-1)
        for i, token in zip(live, map(int, best)):
            ended[i] = token in model.stop
            if not ended[i]:
                said[i].append(token)
            feed[i] = [] if ended[i] or len(said[i]) == most else [token]
    return [(model.decode(ids), len(ids), end) for ids, end in zip(said, ended)]


def progress(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


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
        yield float(np.mean(bias)), float(np.mean(square))


if __name__ == "__main__":
    main()
