"""kvd_worker's decoder in PyTorch: everything but attention stays on the device, so that a layer is one trip there and one back.

NumPy's decoder makes seven such trips a layer if only its products are PyTorch's, and the roots and exponentials in between take
longer than they do. Nothing here is needed where PyTorch is not: bench_model.py then has NumPy's decoder.
"""
import functools

import numpy as np
import torch
from kvd_worker.model import _gelu, _silu

_ACTS = {_silu: torch.nn.functional.silu, _gelu: functools.partial(torch.nn.functional.gelu, approximate="tanh")}


def _rms(x, w, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w


class Decoder:
    """Does what `model.forward` does, with logits as a tensor of the device. A cache that has `attend_tensors` is given tensors, and
    returns them; all others have NumPy's arrays."""

    def __init__(self, model, device):
        def on_device(weights):
            return {name: torch.from_numpy(np.ascontiguousarray(w)).to(device) for name, w in weights.items()}

        self.model, self.device = model, device
        self.blocks, self.top = [on_device(b) for b in model.blocks], on_device(model.top)
        self._act = _ACTS[model._act]

    def _turns(self, layer, positions, known):
        """cos and sin of a layer's RoPE, made once a step."""
        m, half = self.model, self.model.head_dim // 2
        theta = m._local_theta if m._local_theta and m.windows and m.windows[layer] else m.theta
        if theta not in known:
            angle = positions[:, None] * theta ** (-torch.arange(half, device=self.device, dtype=torch.float64) / half)
            known[theta] = angle.cos().float()[:, None], angle.sin().float()[:, None]
        return known[theta]

    @staticmethod
    def _rope(x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def _project(self, block, name, h, heads):
        y = torch.nn.functional.linear(h, block[name], block.get(name + ".bias")).reshape(len(h), heads, -1)
        return _rms(y, block[name + "_norm"], self.model.eps) if name + "_norm" in block else y

    def _attend(self, cache, layer, q, k, v, counts):
        if hasattr(cache, "attend_tensors"):
            return cache.attend_tensors(layer, q, k, v)
        rows = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], 1).cpu().numpy()  # one copy
        ends = np.cumsum([q[0].numel(), k[0].numel()])
        parts = [np.ascontiguousarray(x).reshape(len(x), -1, q.shape[-1]) for x in np.split(rows, ends, axis=1)]
        return torch.from_numpy(cache.attend(layer, *parts, counts)).to(self.device)

    @torch.inference_mode()
    def forward(self, ids, cache, *, every=False):
        m, counts = self.model, [len(s) for s in ids]
        flat = [t for s in ids for t in s]
        positions = torch.tensor([n + i for c, n in zip(counts, cache.lengths) for i in range(c)], dtype=torch.float64, device=self.device)
        known = {}
        x = self.top["embed"][torch.tensor(flat, device=self.device)] * float(m._embed_scale)
        for i, b in enumerate(self.blocks):
            h = _rms(x, b["ln1"], m.eps)
            q, k, v = (self._project(b, name, h, heads) for name, heads in (("q", m.q_heads), ("k", m.kv_heads), ("v", m.kv_heads)))
            turn = self._turns(i, positions, known)
            y = self._attend(cache, i, self._rope(q, *turn), self._rope(k, *turn), v, counts)
            y = y.reshape(len(flat), -1) @ b["o"].T
            x = x + (_rms(y, b["ln1_post"], m.eps) if "ln1_post" in b else y)
            h = _rms(x, b["ln2"], m.eps)
            y = (self._act(h @ b["gate"].T) * (h @ b["up"].T)) @ b["down"].T
            x = x + (_rms(y, b["ln2_post"], m.eps) if "ln2_post" in b else y)
        if not every:
            ends = np.cumsum(counts)
            x = x[[int(e) - 1 for c, e in zip(counts, ends) if c]]
        return _rms(x, self.top["norm"], m.eps) @ self.top["head"].T


class Prompt:
    """A cache for one prompt from its beginning, whose keys and values are wanted: rounded to bf16, and stock attention over them."""

    lengths = [0]

    def __init__(self, windows):
        self._windows, self._kv = windows, []

    def attend_tensors(self, layer, q, k, v):
        k, v = k.bfloat16(), v.bfloat16()
        self._kv.append((k, v))
        window = self._windows[layer] if self._windows else 0
        mask = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).tril().triu(1 - window) if window else None
        heads = [x.float().transpose(0, 1)[None] for x in (q, k, v)]
        o = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return o[0].transpose(0, 1)

    def keys_and_values(self):
        """[layers, tokens, kv_heads, head_dim] each, as bf16 bits."""
        return tuple(torch.stack([kv[side] for kv in self._kv]).view(torch.int16).cpu().numpy().view(np.uint16) for side in (0, 1))


def losses(logits, targets):
    """Of logits [rows, tokens, vocabulary]: each row's nll of the targets, and its KL from the first row, summed over tokens."""
    p = logits.double().log_softmax(-1)
    first = p[:1]
    nll = -p[:, torch.arange(len(targets)), torch.as_tensor(targets)].sum(-1)
    return nll.tolist(), (first.exp() * (first - p)).sum((-1, -2)).tolist()
