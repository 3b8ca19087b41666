#!/usr/bin/env python3
"""What PyTorch takes for decoding over latents (MLA, absorbed queries) in bf16 on this GPU: the rival of the rows "latents" of
`tests/gpu/run.sh bench`. Two products and a softmax, eager and by torch.compile, as PyTorch's attention has no kernel for 576 and
512 dims. Each replayed as a CUDA graph, cold caches.

usage: rivals_mla.py [SEQUENCES x TOKENS ...]      default: 1x32768 8x32768 32x32768
"""
import sys

import torch
from rivals import milliseconds

HEADS, ROPE, LATENT = 128, 64, 512


def attend(q, kv):
    p = torch.softmax((q @ kv.transpose(1, 2)).float() * (192 ** -0.5), -1).to(kv.dtype)
    return p @ kv[..., :LATENT]


def main():
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    print(torch.cuda.get_device_name())
    for shape in sys.argv[1:] or ["1x32768", "8x32768", "32x32768"]:
        n, tokens = map(int, shape.split("x"))
        q = torch.randn(n, HEADS, ROPE + LATENT, device="cuda").bfloat16()
        kv = torch.randn(n, tokens, ROPE + LATENT, device="cuda").bfloat16()
        flops = 2 * n * HEADS * tokens * (ROPE + 2 * LATENT)
        for name, call in ("eager", attend), ("compiled", torch.compile(attend, dynamic=False)):
            ms = milliseconds(lambda: call(q, kv), flush)
            print(f"{n} x {tokens}, {HEADS} heads, bf16, {name}: {ms:.4f} ms, {flops / ms / 1e9:.0f} TFLOP/s, "
                  f"{kv.nbytes / ms / 1e6:.0f} GB/s of latents")


if __name__ == "__main__":
    main()
