#!/usr/bin/env python3
"""A Qwen3-8B-shaped decoder of a few layers, with random weights, whose KV cache lives in kvd on this machine's GPU: logits against
the stock attention's (on the GPU, and in float32 on the CPU), and what a token costs, by calls and in direct mode.

usage: model.py KVD_FOLDER    an unpacked deploy/bundle.sh; needs PyTorch and transformers. tests/gpu/model.sh calls it.
"""
import argparse
import copy
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import torch
import transformers
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "client/python"))
import kvd  # noqa: E402
from kvd.transformers import KvdCache, connect, use_kvd  # noqa: E402

GPU = torch.device("cuda")
# The argument's name depends on the release.
CACHE = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 20) else "past_key_values"
failed = 0


def say(ok, text):
    global failed
    failed += not ok
    print(f"{'ok    ' if ok else 'FAILED'} {text}", flush=True)


def decoder(layers, dtype):
    torch.manual_seed(7)
    config = Qwen3Config(hidden_size=4096, intermediate_size=12288, num_hidden_layers=layers, num_attention_heads=32,
                         num_key_value_heads=8, head_dim=128, vocab_size=32000, max_position_embeddings=65536)
    with GPU:
        model = Qwen3ForCausalLM(config).to(dtype).eval()
    return model, config


class Rounded(DynamicCache):
    """The stock cache with K and V in bf16, as kvd stores them."""

    def update(self, k, v, *args, **kwargs):
        return super().update(k.to(torch.bfloat16).to(k.dtype), v.to(torch.bfloat16).to(v.dtype), *args, **kwargs)


@torch.no_grad()
def follow(model, cache, prompts, mask, tokens, settle=lambda: None):
    """Logits after the prompt and after each of `tokens` [batch, steps], fed one at a time; `settle` is called behind each."""
    device = model.device
    mask, out = mask.to(device), []
    ids = prompts.to(device)
    for step in range(tokens.shape[1] + 1):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        out.append(model(input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: cache}).logits[:, -1].float().cpu())
        settle()
        if step < tokens.shape[1]:
            ids = tokens[:, step:step + 1].to(device)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.stack(out)


def ragged(lengths, vocabulary=32000):
    g = torch.Generator().manual_seed(3)
    width = max(lengths)
    ids = torch.randint(0, vocabulary, (len(lengths), width), generator=g)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    return ids, mask, torch.randint(0, vocabulary, (len(lengths), 40), generator=g)


def agree(name, got, want, most, mean):
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    say(float(error.max()) < most and float(error.mean()) < mean,
        f"{name}: logits differ by {float(error.max()):.1e} at most, {float(error.mean()):.1e} on average "
        f"(limits {most:.0e}, {mean:.0e})")


def equality(address):
    prompts, mask, tokens = ragged([90, 517, 33, 260])
    model, config = decoder(2, torch.float32)
    want = follow(copy.deepcopy(model).cpu(), Rounded(config=config), prompts, mask, tokens)
    stock = follow(model, Rounded(config=config), prompts, mask, tokens)
    agree("stock attention, float32, GPU against CPU", stock, want, 1e-2, 5e-3)
    use_kvd(model)
    for direct in (False, True):
        with connect(config, codec="bf16", address=address) as client:
            got = follow(model, KvdCache(client, direct=direct, max_tokens=1024), prompts, mask, tokens)
            agree(f"kvd, codec bf16, {'direct mode' if direct else 'calls'}, against the CPU", got, want, 3e-2, 1e-2)
    # In direct mode kvd may be some tokens behind, which are in bf16 until then: a row may differ by what they lose, unless each
    # step waits for kvd.
    results = []
    for direct, waits in ((False, False), (True, True), (True, False)):
        with connect(config, codec="int2-lm", address=address) as client:
            cache = KvdCache(client, direct=direct, max_tokens=1024)
            results.append(follow(model, cache, prompts, mask, tokens, cache.flush if waits else lambda: None))
            cache.flush()
            say([s.describe().length for s in cache.sequences] == [130, 557, 73, 300], "every token is in kvd")
    agree("codec int2-lm, direct mode that waits for kvd against calls", results[1], results[0], 1e-2, 1e-3)
    agree("codec int2-lm, direct mode against calls", results[2], results[0], 3e-1, 1e-2)


@torch.no_grad()
def cost(address, codecs, layers=4, batch=8, context=8192, steps=80):
    model, config = decoder(layers, torch.bfloat16)
    stock = model
    model = copy.deepcopy(model)
    use_kvd(model)
    ids = torch.randint(0, 32000, (batch, context), device=GPU)
    print(f"\n{layers} layers, 32/8 heads of 128, bf16, {batch} sequences of {context} tokens; {torch.cuda.get_device_name()}")

    def measure(name, net, cache):
        for at in range(0, context, 1024):
            net(input_ids=ids[:, at:at + 1024], position_ids=torch.arange(at, at + 1024, device=GPU)[None], **{CACHE: cache},
                logits_to_keep=1)
        token, took = ids[:, :1], []
        for i in range(steps):
            torch.cuda.synchronize()
            began = time.perf_counter()
            out = net(input_ids=token, position_ids=torch.full((batch, 1), context + i, device=GPU), **{CACHE: cache})
            token = out.logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            took.append(time.perf_counter() - began)
        took.sort()
        ms = took[steps // 2] * 1e3
        print(f"{name:34} {ms:7.2f} ms a step ({took[steps // 10] * 1e3:.2f} to {took[steps * 9 // 10] * 1e3:.2f}), "
              f"{batch / ms * 1e3:7.0f} tokens/s", flush=True)
        return ms

    base = measure("stock attention, bf16 cache", stock, DynamicCache(config=config))
    torch.cuda.empty_cache()
    for codec in codecs:
        for direct in (False, True):
            with connect(config, codec=codec, address=address) as client:
                cache = KvdCache(client, direct=direct, max_tokens=context + steps + 64)
                ms = measure(f"kvd, {codec}, {'direct mode' if direct else 'calls in the stream'}", model, cache)
                info = cache.sequences[0].describe()
                print(f"{'':34} {(ms - base) / layers * 1e3:+7.0f} us a layer over stock; {info.bytes / 2**20:.1f} MiB a sequence, bf16 "
                      f"{context * layers * 8 * 128 * 4 / 2**20:.1f}")
                cache.free()


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", type=pathlib.Path)
    ap.add_argument("--codecs", nargs="+", default=["bf16", "int2", "int2c", "int2-lm", "turboquant-3"])
    args = ap.parse_args()
    work = pathlib.Path(tempfile.mkdtemp(prefix="kvd-model."))
    address, log = f"unix:{work}/s", work / "log"
    daemon = subprocess.Popen([args.folder / "bin/kvd", "--backend", "cuda", "--pool-size", "12GiB", "--listen", address,
                               "--metrics", ""], stderr=open(log, "w"))
    try:
        while "ready" not in log.read_text():
            if daemon.poll() is not None:
                sys.exit(log.read_text())
            time.sleep(0.05)
        print(f"transformers {transformers.__version__}, torch {torch.__version__}, libkvd {kvd.version()}")
        torch.backends.cuda.matmul.allow_tf32 = False
        equality(address)
        cost(address, args.codecs)
    finally:
        daemon.terminate()
        ended = daemon.wait()
        if ended:
            print(log.read_text(), file=sys.stderr)
    if failed or ended:
        print(f"{work} stays, with kvd's log", file=sys.stderr)
    else:
        shutil.rmtree(work)
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
