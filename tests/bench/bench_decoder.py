#!/usr/bin/env python3
"""A decode step of a whole model, with its KV in kvd and in PyTorch: a decoder of Qwen3-8B's shape with random weights, from the
embedding of the last tokens to the argmax of the next ones, in a CUDA graph that is replayed.

usage: bench_decoder.py --kvd PROGRAM [--quick] [--backend cuda|cpu] [--shapes 32x8192 256x4096] [--variants kvd bf16 fp8]
                        [--layers 36] [--codec int2] [--card 80] [--runs 3] [--steps 48] [--limit 40] [--total 0]
Wants PyTorch and the package kvd (PYTHONPATH=client/python, KVD_LIBRARY=...); tests/gpu/decoder.sh runs it from a bundle.

A row is printed as soon as it is measured:
  none  the step without attention: what the weights take. Its output goes where attention's would.
  kvd   direct mode. Every step's tokens are stored, and appended to kvd 16 at a time, while steps go on; that is in the time.
        Attention of one layer is compared with a dense one over the tokens that kvd gives back, and these with what was
        stored; if either is wrong, the row has no figures.
  bf16  the fastest of PyTorch's attentions over a contiguous cache that was made before. All are measured over one layer first.
  fp8   no kernel: the step without attention, and a read of an fp8 cache's bytes at the bandwidth that was measured. A bound
        that no kernel reaches.
First at the given shapes (batch x context), then at the largest batch of each variant with which weights, KV and 3 GB for all else
fit a card of --card GB. A shape that this GPU has no room for says so. --limit is how many seconds a row may take, --total when no
more rows are begun (0: never). --quick: 2 narrow layers and short contexts, on the CPU too, to try the program itself.
"""
import argparse
import contextlib
import dataclasses
import functools
import gc
import os
import pathlib
import signal
import subprocess
import sys
import time
import warnings

import scratch
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvd

HEADS, KV_HEADS, DIM = 32, 8, 128
GROUP = HEADS // KV_HEADS
PIECE = 2048  # tokens of a sequence in a call that fills it
BATCH = 32  # sequences in such a call
OTHER = 3e9  # contexts, activations, scratch


class Wrong(Exception):
    """A figure that must not be printed."""


@dataclasses.dataclass
class Shape:
    layers: int
    hidden: int = 4096
    inner: int = 12288
    words: int = 151936


# -- the decoder --------------------------------------------------------------------------------


def norm(x, weight):
    f = x.float()
    return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def add_norm(x, y, weight):
    x = x + y
    return x, norm(x, weight)


def heads(qkv, weight, cos, sin):
    """q, k and v, each contiguous: norms of q and k, then RoPE."""
    x = qkv.view(-1, HEADS + 2 * KV_HEADS, DIM)
    a, b = norm(x[:, :HEADS + KV_HEADS], weight).float().chunk(2, -1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(qkv.dtype)
    return turned[:, :HEADS].contiguous(), turned[:, HEADS:].contiguous(), x[:, HEADS + KV_HEADS:].contiguous()


def gate(x):
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


class Decoder:
    """Random weights in bf16, of each layer its own: all are read in every step."""

    def __init__(self, shape, device):
        self.shape, self.device = shape, device
        h, q, kv = shape.hidden, HEADS * DIM, KV_HEADS * DIM
        generator = torch.Generator(device).manual_seed(7)

        def weight(*size):
            return torch.empty(*size, dtype=torch.bfloat16, device=device).normal_(std=0.02, generator=generator)

        def ones(*size):
            return torch.ones(*size, dtype=torch.bfloat16, device=device)

        self.embedding, self.head, self.first = weight(shape.words, h), weight(shape.words, h), ones(h)
        self.layers = [(weight(q + 2 * kv, h), ones(HEADS + KV_HEADS, DIM), weight(h, q), ones(h), weight(2 * shape.inner, h),
                        weight(h, shape.inner), ones(h)) for _ in range(shape.layers)]
        angle = torch.arange(65536, device=device)[:, None] / 1e6 ** (torch.arange(0, DIM, 2, device=device) / DIM)
        self.cos, self.sin = angle.cos()[:, None], angle.sin()[:, None]
        self.parts = [norm, add_norm, heads, gate]

    def bytes(self):
        tensors = [self.embedding, self.head, self.first, *(w for layer in self.layers for w in layer)]
        return sum(t.nbytes for t in tensors)

    def fuse(self):
        """What lies between products as one kernel each."""
        self.parts = [torch.compile(part) for part in self.parts]

    def step(self, tokens, position, attend):
        normed, add_normed, heads_of, gated = self.parts
        x = self.embedding[tokens]
        cos, sin = self.cos[position], self.sin[position]
        h = normed(x, self.first)
        for i, (qkv, qk_norm, out, middle, up, down, following) in enumerate(self.layers):
            o = attend(i, *heads_of(F.linear(h, qkv), qk_norm, cos, sin))
            x, h = add_normed(x, F.linear(o.view(-1, HEADS * DIM), out), middle)
            x, h = add_normed(x, F.linear(gated(F.linear(h, up)), down), following)
        return F.linear(h, self.head).argmax(-1)


# -- PyTorch's attention ------------------------------------------------------------------------


def by_products(q, k, v):
    rows = q.view(-1, KV_HEADS, GROUP, DIM)
    return torch.softmax((rows @ k.transpose(2, 3)).float() * DIM ** -0.5, -1).to(v.dtype) @ v


def by_backend(backend, rows, q, k, v):
    """rows: the q heads of a kv head are queries of one head, as nothing is causal here. Otherwise PyTorch shares heads."""
    with sdpa_kernel(backend):
        if rows:
            return F.scaled_dot_product_attention(q.view(-1, KV_HEADS, GROUP, DIM), k, v)
        return F.scaled_dot_product_attention(q.view(-1, HEADS, 1, DIM), k, v, enable_gqa=True)


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=False)


def by_flex(q, k, v):
    return compiled_flex()(q.view(-1, HEADS, 1, DIM), k, v, enable_gqa=True)


ATTENTIONS = {"two products": by_products}
for label, which in ("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION), ("efficient", SDPBackend.EFFICIENT_ATTENTION):
    ATTENTIONS[f"SDPA {label}, a group as rows"] = functools.partial(by_backend, which, True)
    ATTENTIONS[f"SDPA {label}, enable_gqa"] = functools.partial(by_backend, which, False)
ATTENTIONS["FlexAttention"] = by_flex


def error_of(got, want):
    return float((got.float() - want.float()).norm() / want.float().norm())


# -- variants -----------------------------------------------------------------------------------


class Nothing:
    """The step without attention."""

    kv_bytes, note = 0, "weights alone"

    def attend(self, layer, q, k, v):
        return q

    def begin(self):
        pass

    def end(self):
        pass

    def close(self):
        pass


def cache_of(batch, context, device):
    return tuple(torch.empty(batch, KV_HEADS, context, DIM, dtype=torch.bfloat16, device=device).normal_() for _ in "kv")


class Contiguous(Nothing):
    """A cache of PyTorch's, [batch, kv_heads, context, head_dim] for each layer; the step's token is the last."""

    def __init__(self, name, layers, batch, context, device):
        self.note, self.call = name, ATTENTIONS[name]
        self.layers = [cache_of(batch, context, device) for _ in range(layers)]
        self.kv_bytes = sum(x.nbytes for layer in self.layers for x in layer)

    def attend(self, layer, q, k, v):
        for cache, new in zip(self.layers[layer], (k, v)):
            cache[:, :, -1].copy_(new)
        return self.call(q, *self.layers[layer]).reshape(-1, HEADS, DIM)


class Daemon:
    """A kvd for one row, so that its pool is gone afterwards."""

    def __init__(self, program, backend, size):
        self.folder = scratch.folder("kvd-decoder.")
        self.address, self.log = f"unix:{self.folder}/s", self.folder / "log"
        command = [program, "--backend", backend, "--pool-size", str(size), "--listen", self.address, "--metrics", "", "--log-level", "notice"]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 20
        while " ready" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > until:
                self.close()
                raise RuntimeError("kvd did not start: " + " ".join(self.log.read_text().split("\n")[-3:]))
            time.sleep(0.02)

    def close(self):
        well = not sys.exc_info()[0]  # unless a row could not be measured
        self.process.terminate()
        try:
            well &= self.process.wait(20) == 0
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            well = False
        if well:
            scratch.remove(self.folder)


class Direct:
    """Sequences of random tokens in kvd, all bound to direct mode."""

    def __init__(self, bench, batch, context):
        self.bench, self.batch, self.close_later = bench, batch, contextlib.ExitStack()
        try:
            self._open(context)
        except BaseException:
            self.close()
            raise

    def _open(self, context):
        b, layers = self.bench, self.bench.shape.layers
        began = time.monotonic()
        daemon = Daemon(b.args.kvd, b.args.backend, b.pool_bytes())
        self.close_later.callback(daemon.close)
        self.client = self.close_later.enter_context(kvd.Client(
            layers=range(layers), q_heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, codec=b.args.codec, address=daemon.address, timeout=60))
        started = time.monotonic()
        # Each sequence begins elsewhere in the same tokens: there is one copy to store from, and none is taken for another's.
        self.tokens = [self.shared(layers, min(PIECE, context) + 64, KV_HEADS, DIM) for _ in "kv"]
        for _, x in self.tokens:
            x.normal_()
        b.wait()
        self.sequences = []
        if batch_limit := self.batch is None:
            self.fill(1, context)
            self.batch = b.largest(self.bytes_of_one())
        self.fill(self.batch, context)
        filled = time.monotonic()
        self.direct = self.close_later.enter_context(kvd.Direct(
            self.client, slots=self.batch, max_tokens=context + b.tokens_of_a_row(), dtype="bf16"))
        for slot, sequence in enumerate(self.sequences):
            self.direct.bind(slot, sequence)
        self.kv_bytes = self.batch * self.bytes_of_one()
        self.check(context)
        self.note = (f"{b.args.codec}, error {self.error:.1e}; {'start' if not batch_limit else 'start, room'} {started - began:.1f} s, "
                     f"filled in {filled - started:.1f} s, bound and checked in {time.monotonic() - filled:.1f} s")

    def shared(self, *shape):
        """A tensor in memory that kvd sees, and it as PyTorch's."""
        if self.client.on_gpu:
            array = torch.zeros(*shape, dtype=torch.bfloat16, device=self.bench.device)
            self.bench.wait()
            return self.client.share(array), array
        tensor = self.client.tensor(*shape)
        return tensor, torch.frombuffer(tensor.array.view(), dtype=torch.bfloat16).view(shape)

    def fill(self, count, context):
        """Makes it so many sequences."""
        new = list(self.client.create_many(count - len(self.sequences))) if count > len(self.sequences) else []
        (k, _), (v, _) = self.tokens
        for first in range(0, len(new), BATCH):
            for at in range(0, context, PIECE):
                n = min(PIECE, context - at)
                items = []
                for i, sequence in enumerate(new[first:first + BATCH], len(self.sequences) + first):
                    part = slice(i % 64, i % 64 + n)
                    items.append(kvd.Item(sequence, k[:, part], v[:, part]))
                self.client.append(items)
        self.sequences += new

    def bytes_of_one(self):
        """Pages, and the tail of its slot: 96 tokens (client/lib/direct.c, ring)."""
        return self.sequences[0].describe().bytes + 96 * 2 * KV_HEADS * DIM * 2 * self.bench.shape.layers

    def check(self, context):
        """One step of random queries. Attention of a layer against a dense one over what kvd gives back and the step's own token;
        what it gives back against what was stored."""
        b, layer, slots = self.bench, self.bench.shape.layers // 2, sorted({0, self.batch // 2, self.batch - 1})
        q = torch.randn(self.batch, 1, HEADS, DIM, device=b.device).bfloat16()
        new = [torch.randn(self.batch, 1, KV_HEADS, DIM, device=b.device).bfloat16() for _ in "kv"]
        o = torch.zeros_like(q)
        stored = [self.stored(slot, layer, context) for slot in slots]
        self.begin()
        for i in range(b.shape.layers):
            self.direct.store(i, *new, stream=b.stream)
        self.direct.attend(layer, q, o, stream=b.stream)
        self.end()
        b.wait()
        self.error = 0.0
        for slot, kept in zip(slots, stored):
            k, v = (torch.cat([old.float(), x[slot].float()]).permute(1, 0, 2) for old, x in zip(kept, new))
            want = by_products(q[slot].float(), k[None], v[None]).view(HEADS, DIM)
            self.error = max(self.error, error_of(o[slot, 0], want))
        if not self.error < 0.03:
            raise Wrong(f"attention of slot {slots} in layer {layer} is {self.error:.3f} of its norm from a dense one over the same tokens")

    def stored(self, slot, layer, context):
        """K and V of a layer as kvd gives them back, compared with what was put there: 2 bits are 0.3 to 0.5 away, windows not at all."""
        most = 1e-6 if self.bench.args.codec == "bf16" else 0.55
        got = [self.shared(1, context, KV_HEADS, DIM) for _ in "kv"]
        self.sequences[slot].read(0, context, k=got[0][0], v=got[1][0], layer=layer)
        out = []
        for (tensor, array), (_, tokens) in zip(got, self.tokens):
            out.append(array[0].clone())
            tensor.free()
            want = tokens[layer, slot % 64 + torch.arange(context, device=tokens.device) % PIECE]
            far, begin, end = error_of(out[-1], want), error_of(out[-1][:64], want[:64]), error_of(out[-1][-64:], want[-64:])
            if not far < most or max(begin, end) > 1e-6:
                raise Wrong(f"slot {slot} of layer {layer}: tokens are {far:.3f} of their norm from what was stored, those of the windows "
                            f"{begin:.3f} and {end:.3f}")
        return out

    def attend(self, layer, q, k, v):
        o = torch.empty_like(q)
        self.direct.store(layer, k, v, stream=self.bench.stream)
        self.direct.attend(layer, q, o, stream=self.bench.stream)
        return o

    def begin(self):
        self.direct.begin(self.bench.stream)

    def end(self):
        self.direct.end(stream=self.bench.stream)

    def close(self):
        self.close_later.close()


# -- measuring ----------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(seconds):
    """Raises TimeoutError in what takes longer. May be nested."""
    def late(*_):
        raise TimeoutError(f"not done in {seconds:g} s")

    before, began = signal.signal(signal.SIGALRM, late), time.monotonic()
    outer = signal.setitimer(signal.ITIMER_REAL, seconds)[0]
    if outer:
        signal.setitimer(signal.ITIMER_REAL, min(seconds, outer))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - began), 1e-3))


def middle(times):
    return sorted(times)[len(times) // 2]


class Bench:
    def __init__(self, args):
        self.args, self.gpu = args, args.backend == "cuda"
        self.device = torch.device("cuda" if self.gpu else "cpu")
        self.began, self.failed = time.monotonic(), 0
        self.shape = Shape(args.layers, 512, 1536, 8192) if args.quick else Shape(args.layers)
        self.other = 0 if args.quick else OTHER
        self.stream = 0
        if self.gpu:  # all is on one stream, which graphs can be captured from
            torch.cuda.set_stream(torch.cuda.Stream())
            self.stream = torch.cuda.current_stream().cuda_stream
        self.without, self.best, self.reached = {}, {}, {}
        self.decoder = Decoder(self.shape, self.device)
        self.card = self.decoder.bytes() + 40e6 if args.quick else args.card * 1e9

    def wait(self):
        if self.gpu:
            torch.cuda.synchronize()

    def tokens_of_a_row(self):
        return 8 + (self.args.runs + 1) * self.args.steps

    def pool_bytes(self):
        """All that there may be: a pool's memory is made as it is used."""
        if not self.gpu or self.args.quick:
            return 1 << 30
        return int(min(torch.cuda.mem_get_info()[1], self.card) - self.decoder.bytes()) >> 21 << 21

    def largest(self, each):
        """Sequences of so many bytes that fit the card of --card."""
        n = int((self.card - self.decoder.bytes() - self.other) / each)
        return n // 8 * 8 if n >= 8 else max(n, 1)

    def fits(self, kv_bytes):
        return kv_bytes + self.decoder.bytes() + self.other <= self.card

    def read_bandwidth(self):
        """GB/s of the fastest of some reductions."""
        n = (4 << 30 if self.gpu else 64 << 20) // 2
        x = torch.ones(n, dtype=torch.bfloat16, device=self.device)
        f, ones = x.view(torch.float32), torch.ones(8192, dtype=torch.bfloat16, device=self.device)
        best = 0.0
        for call in (f.sum, f.amax, lambda: torch.dot(f[:n // 4], f[n // 4:]), lambda: torch.mv(x.view(-1, 8192), ones)):
            times = [self.seconds(lambda: [call() for _ in range(8)]) / 8 for _ in range(4)]
            best = max(best, x.nbytes / min(times) / 1e9)
        return best

    def seconds(self, call):
        self.wait()
        began = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - began

    def captured(self, call):
        """The call as a graph; on the CPU the call itself. It has been made before, so that libraries have what they want."""
        if not self.gpu:
            return call
        graph = torch.cuda.CUDAGraph()
        # kvd's thread works on meanwhile, and may.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            call()
        return graph.replay

    def step_ms(self, variant, batch, context):
        """ms of a step, of each run."""
        tokens = torch.zeros(batch, dtype=torch.long, device=self.device)
        position = torch.full((batch,), context, device=self.device)

        def step():
            tokens.copy_(self.decoder.step(tokens, position, variant.attend))
            position.add_(1)

        for _ in range(2):  # compiles, and brings libraries' workspaces
            variant.begin()
            step()
            variant.end()
        self.wait()
        variant.begin()
        replay = self.captured(step)
        replay()
        variant.end()

        def run():
            for _ in range(self.args.steps):
                variant.begin()
                replay()
                variant.end()

        self.seconds(run)
        times = [self.seconds(run) / self.args.steps * 1e3 for _ in range(self.args.runs)]
        variant.begin()
        self.alone = self.seconds(lambda: [replay() for _ in range(self.args.steps)]) / self.args.steps * 1e3
        variant.end()
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.shape.words:
            raise Wrong("a token that is no word")
        return times

    # -- rows

    def attention(self, batch, context):
        """Name of the fastest attention over one layer of this shape; says what all take."""
        if (batch, context) in self.best:
            return self.best[batch, context]
        cache = cache_of(batch, context, self.device)
        q = torch.randn(batch, HEADS, DIM, device=self.device).bfloat16()
        want = by_products(q[:2].float(), *(x[:2].float() for x in cache)).reshape(2, -1)
        took = {}
        warnings.simplefilter("ignore")  # why PyTorch does not take a kernel: what fails says so
        for name, call in ATTENTIONS.items():
            # Compiling takes long: only where it may win, which the first shape tells.
            if name == "FlexAttention" and self.best and name not in self.best.values():
                continue
            if not self.gpu and name not in ("two products", "SDPA flash, a group as rows"):
                continue
            try:
                with limited(self.args.limit):
                    if not error_of(call(q, *cache)[:2].reshape(2, -1), want) < 0.02:
                        raise Wrong("wrong")
                    replay = self.captured(lambda: [call(q, *cache) for _ in range(4)])
                    took[name] = middle([self.seconds(replay) for _ in range(5)]) / 4
            except Exception as e:  # what a release or a device has no kernel for
                print(f"#   {name}: {str(e).splitlines()[0][:100] if str(e) else type(e).__name__}", flush=True)
        size = sum(x.nbytes for x in cache)
        print(f"#   a layer of {batch} x {context}, bf16: "
              + "; ".join(f"{name} {s * 1e3:.3f} ms, {size / s / 1e9:.0f} GB/s" for name, s in sorted(took.items(), key=lambda x: x[1])))
        self.best[batch, context] = min(took, key=took.get)
        return self.best[batch, context]

    def floor(self, batch, context):
        if batch not in self.without:
            self.without[batch] = self.step_ms(Nothing(), batch, context)
            self.say(batch, context, "none", self.without[batch], Nothing)
        return middle(self.without[batch])

    def say(self, batch, context, name, times, variant):
        ms, floor = middle(times), middle(self.without[batch])
        if self.fits(variant.kv_bytes):
            self.reached[name, batch, context] = batch / ms * 1e3
        print(f"{batch:5} x {context:<7} {name:5} {ms:9.3f} {min(times):9.3f} to {max(times):<9.3f} {batch / ms * 1e3:9.0f} "
              f"{variant.kv_bytes / 1e9:8.2f} {100 * max(0.0, 1 - floor / ms):6.1f} %   {variant.note}", flush=True)

    def kvd_row(self, batch, context):
        variant = Direct(self, batch, context)
        try:
            self.floor(variant.batch, context)
            times = self.step_ms(variant, variant.batch, context)
            variant.note += f"; the graph alone {self.alone:.3f} ms"
            self.say(variant.batch, context, "kvd", times, variant)
            variant.direct.flush()
            lengths = {s.describe().length for s in variant.sequences}
            if lengths != {variant.sequences[0].length}:
                raise Wrong(f"the figures above do not count: sequences have {lengths} tokens, not {variant.sequences[0].length}")
        finally:
            variant.close()

    def bf16_row(self, batch, context):
        each = 2 * context * KV_HEADS * DIM * 2 * self.shape.layers
        batch = batch or self.largest(each)
        if self.gpu and batch * each + OTHER > torch.cuda.mem_get_info()[0]:
            print(f"{batch:5} x {context:<7} bf16  does not fit: {batch * each / 1e9:.0f} GB of KV", flush=True)
            return
        name = self.attention(batch, context)
        self.floor(batch, context)
        variant = Contiguous(name, self.shape.layers, batch, context, self.device)
        self.say(batch, context, "bf16", self.step_ms(variant, batch, context), variant)

    def fp8_row(self, batch, context):
        each = 2 * context * KV_HEADS * DIM * self.shape.layers
        batch = batch or self.largest(each)
        self.floor(batch, context)
        variant = Nothing()
        variant.kv_bytes = batch * each
        read = variant.kv_bytes / self.bandwidth / 1e6
        variant.note = f"modelled: weights alone, and {read:.2f} ms of reading at {self.bandwidth:.0f} GB/s"
        if not self.fits(variant.kv_bytes):
            variant.note += f"; does not fit {self.card / 1e9:.0f} GB"
        self.say(batch, context, "fp8", [ms + read for ms in self.without[batch]], variant)

    def row(self, name, batch, context):
        if self.args.total and time.monotonic() - self.began > self.args.total:
            print(f"{batch or 'largest'} x {context} {name}: not begun, {self.args.total:.0f} s are over", flush=True)
            return
        try:
            with limited(self.args.limit):
                getattr(self, f"{name}_row")(batch, context)
        except Exception as e:  # the next one is another matter
            self.failed += 1
            print(f"{batch or 'largest'} x {context} {name}: FAILED, {type(e).__name__}: {str(e)[:300]}", flush=True)
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def prepare(self):
        if not self.gpu:
            return
        try:  # without a compiler PyTorch's own kernels do
            with limited(2 * self.args.limit):
                self.decoder.fuse()
                for batch in (40, 48):  # of the second on, kernels are for any batch
                    tokens = torch.zeros(batch, dtype=torch.long, device=self.device)
                    self.decoder.step(tokens, tokens, Nothing().attend)
                self.wait()
        except Exception as e:
            self.decoder.parts = [norm, add_norm, heads, gate]
            print(f"# not compiled, so slower between products: {type(e).__name__}: {str(e).splitlines()[0][:200]}")

    def run(self):
        name = torch.cuda.get_device_name() if self.gpu else "CPU"
        self.prepare()
        self.bandwidth = self.read_bandwidth()
        print(f"# {name}; torch {torch.__version__}, CUDA {torch.version.cuda}, libkvd {kvd.version()}; MPS: "
              f"{'yes' if os.environ.get('CUDA_MPS_PIPE_DIRECTORY') else 'no'}\n"
              f"# read bandwidth {self.bandwidth:.0f} GB/s; {self.shape.layers} layers, {HEADS}/{KV_HEADS} heads of {DIM}, hidden "
              f"{self.shape.hidden}, weights {self.decoder.bytes() / 1e9:.2f} GB; {self.args.steps} steps a run, {self.args.runs} runs; "
              f"ready after {time.monotonic() - self.began:.1f} s\n"
              f"# batch x context, attention, ms a step: median, range; tokens/s; GB of KV; attention's share of the step", flush=True)
        shapes = [tuple(map(int, shape.split("x"))) for shape in self.args.shapes]
        for batch, context in shapes:
            for variant in self.args.variants:
                self.row(variant, batch, context)
        print(f"# the largest batches that fit {self.card / 1e9:.2f} GB", flush=True)
        for context in dict.fromkeys(context for _, context in shapes):
            for variant in self.args.variants:
                self.row(variant, None, context)
            self.compare(context)
        print(f"# {time.monotonic() - self.began:.0f} s; {self.failed} rows failed")
        return self.failed != 0

    def compare(self, context):
        """Tokens/s at the best batches that fit the card."""
        best = {}
        for (name, batch, at), speed in self.reached.items():
            if at == context and name in self.args.variants:
                best[name] = max(best.get(name, (0, 0)), (speed, batch))
        for name in set(best) & {"bf16", "fp8"} if "kvd" in best else ():
            print(f"# {context} tokens, kvd at batch {best['kvd'][1]} against {name} at {best[name][1]}: {best['kvd'][0] / best[name][0]:.2f} "
                  "times the tokens/s")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kvd", help="the program; wanted for kvd's rows")
    p.add_argument("--backend", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--shapes", nargs="+")
    p.add_argument("--variants", nargs="+", choices=["kvd", "bf16", "fp8"], default=["kvd", "bf16", "fp8"])
    p.add_argument("--layers", type=int)
    p.add_argument("--codec", default="int2")
    p.add_argument("--card", type=float, default=80, help="GB")
    p.add_argument("--runs", type=int, default=3)
    p.add_argument("--steps", type=int)
    p.add_argument("--limit", type=float, default=40, help="seconds")
    p.add_argument("--total", type=float, default=0, help="seconds")
    a = p.parse_args()
    a.shapes = a.shapes or (["3x700", "2x1000"] if a.quick else ["32x8192", "256x4096"])
    a.layers, a.steps = a.layers or (2 if a.quick else 36), a.steps or (8 if a.quick else 48)
    if "kvd" in a.variants and not a.kvd:
        p.error("--kvd is wanted: the program")
    return a


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(Bench(arguments()).run())
