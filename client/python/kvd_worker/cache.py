"""Where keys and values live: in kvd, or in this process (the stock attention that kvd is compared with)."""
from __future__ import annotations

from typing import Optional, Sequence

import numpy as np

import kvd


class KvdCache:
    """The KV cache of some sequences, all of it in kvd: each layer of a step is one call for all sequences.

    Tensors of a step lie in memory that kvd shares; they are kept for the next step of the same size.
    """

    def __init__(self, client: kvd.Client, sequences: Sequence[kvd.Sequence]):
        self.client, self.sequences = client, list(sequences)
        self._tensors: dict[int, tuple[kvd.Tensor, ...]] = {}

    @property
    def lengths(self) -> list[int]:
        return [s.length for s in self.sequences]

    def _memory(self, tokens: int, q: np.ndarray, k: np.ndarray) -> tuple[kvd.Tensor, ...]:
        if tokens not in self._tensors:
            if len(self._tensors) > 8:
                for t in self._tensors.pop(next(iter(self._tensors))):
                    t.free()
            make = self.client.tensor
            self._tensors[tokens] = (make(1, tokens, *q.shape[1:], dtype="f32"), make(1, tokens, *k.shape[1:]),
                                     make(1, tokens, *k.shape[1:]), make(1, tokens, *q.shape[1:], dtype="f32"))
        return self._tensors[tokens]

    def attend(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        tq, tk, tv, to = self._memory(len(q), q, k)
        tq.array[0], tk.array[0], tv.array[0] = q, kvd.to_bf16(k), kvd.to_bf16(v)
        items, at = [], 0
        for s, n in zip(self.sequences, counts):
            if n:
                part = np.s_[:, at:at + n]
                items.append(kvd.Item(s, tk[part], tv[part], tq[part], to[part]))
            at += n
        self.client.step(items, layer=layer)
        return to.array[0]


class DirectCache(KvdCache):
    """The same with direct mode for steps of one token: attention runs in this process, over pages mapped from kvd."""

    def __init__(self, client: kvd.Client, sequences: Sequence[kvd.Sequence], *, max_tokens: int = 8192):
        super().__init__(client, sequences)
        self._direct = kvd.Direct(client, slots=len(self.sequences), max_tokens=max_tokens)
        self._bound = False

    def _bind(self, bound: bool) -> None:
        for slot, s in enumerate(self.sequences):
            if bound != self._bound:
                self._direct.bind(slot, s if bound else None)
        self._bound = bound

    def attend(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        if layer == 0:
            self._bind(max(counts) == 1)
        if not self._bound:
            return super().attend(layer, q, k, v, counts)
        # Slots of sequences that rest take a token too, and forget it.
        live = np.flatnonzero(counts)
        tq, tk, tv, to = self._memory(len(counts), q, k)
        tq.array[0, live], tk.array[0, live], tv.array[0, live] = q, kvd.to_bf16(k), kvd.to_bf16(v)
        if layer == 0:
            self._direct.begin()
        self._direct.store(layer, tk.array, tv.array)
        self._direct.attend(layer, tq.array, to.array)
        if layer + 1 == len(self.client.layers):
            self._direct.end(counts)
        return to.array[0, live]

    def close(self) -> None:
        """Brings the latest tokens to kvd."""
        self._direct.close()


class LocalCache:
    """Keys and values in this process, rounded to bf16 as kvd stores them, and plain attention in float32. `windows`: how many
    tokens each layer's queries see, 0 for all; None: all of all."""

    def __init__(self, sequences: int, windows: Optional[Sequence[int]] = None):
        self._windows = windows
        self._kv: list[dict[int, tuple[np.ndarray, np.ndarray]]] = [{} for _ in range(sequences)]

    @property
    def lengths(self) -> list[int]:
        # Layer 0 is first with the tokens of a step: positions are asked for before that.
        return [len(kv[0][0]) if kv else 0 for kv in self._kv]

    def keys_and_values(self, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """[layers, tokens, kv_heads, head_dim] each, as bf16 bits."""
        kv = self._kv[sequence]
        return tuple(np.stack([kvd.to_bf16(kv[layer][side]) for layer in sorted(kv)]) for side in (0, 1))  # type: ignore

    def attend(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        k, v = kvd.from_bf16(kvd.to_bf16(k)), kvd.from_bf16(kvd.to_bf16(v))
        out, at = np.empty_like(q), 0
        for kv, n in zip(self._kv, counts):
            if n == 0:
                continue
            part = np.s_[at:at + n]
            old = kv.get(layer)
            kv[layer] = (k[part], v[part]) if old is None else (np.concatenate([old[0], k[part]]),
                                                                np.concatenate([old[1], v[part]]))
            out[part] = _attention(q[part], *kv[layer], self._windows[layer] if self._windows else 0)
            at += n
        return out


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int) -> np.ndarray:
    """The last len(q) positions of k and v, causal; the last `window` of them for each, if that is not 0."""
    group, n, total = q.shape[1] // k.shape[1], len(q), len(k)
    ahead = np.arange(total)[None, :] - np.arange(total - n, total)[:, None]
    mask = np.where((ahead > 0) | (ahead <= (-window if window else -total)), np.float32(-np.inf), np.float32(0))
    out = np.empty_like(q)
    for h in range(q.shape[1]):
        s = q[:, h] @ k[:, h // group].T / np.float32(np.sqrt(q.shape[2])) + mask
        s = np.exp(s - s.max(axis=1, keepdims=True))
        out[:, h] = s / s.sum(axis=1, keepdims=True) @ v[:, h // group]
    return out
