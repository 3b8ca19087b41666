"""How an engine's block holds its tokens: found by writing numbers through the engine's own kernel, so that no layout is guessed."""
from __future__ import annotations

from typing import Callable, Optional

import numpy as np
import torch

from ..engines import Refused

_Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


class BlockLayout:
    """Of a head's part of a block, 2 * tokens * dim elements: where K and V of each token and dim are.

    k, v: positions, [tokens, dim]. strides_k, strides_v: (first, token, dim) in elements where the positions are that regular.
    """

    def __init__(self, k: np.ndarray, v: np.ndarray):
        self.tokens, self.dim = k.shape
        self.k, self.v = k, v
        self.strides_k, self.strides_v = _regular(k), _regular(v)
        self.inverse = np.argsort(np.concatenate([k.ravel(), v.ravel()]))  # position: K's elements in order, then V's

    @property
    def regular(self) -> bool:
        return self.strides_k is not None and self.strides_v is not None


def _regular(x: np.ndarray) -> Optional[tuple[int, int, int]]:
    first, token, dim = int(x[0, 0]), int(x[1, 0] - x[0, 0]), int(x[0, 1] - x[0, 0])
    t, d = np.indices(x.shape)
    return (first, token, dim) if np.array_equal(x, first + t * token + d * dim) else None


def probe(write: _Write, heads: int, tokens: int, dim: int) -> BlockLayout:
    """write(k, v, cache, slots) puts tokens [n, heads, dim] into a cache [blocks, heads, tokens, 2 * dim]. Two blocks are made and the
    second one is written. Numbers of up to 256 are exact in bf16, so that an element's number is written as two digits."""
    n = tokens * dim
    if n > 1 << 16:
        raise Refused(f"blocks of {tokens} tokens with head_dim {dim} are not served: more than 65,536 elements a head")
    slots = torch.arange(tokens, 2 * tokens)
    number = torch.arange(n).view(tokens, 1, dim).expand(tokens, heads, dim)
    zero = torch.zeros(tokens, heads, dim, dtype=torch.bfloat16)

    def pages(k: torch.Tensor, v: torch.Tensor) -> np.ndarray:
        cache = torch.zeros(2, heads, tokens, 2 * dim, dtype=torch.bfloat16)
        write(k.to(torch.bfloat16).contiguous(), v.to(torch.bfloat16).contiguous(), cache, slots)
        if cache[0].any():
            raise Refused("the engine's kernel writes outside of the block that it is given")
        return cache[1].view(heads, 2 * n).float().numpy().astype(np.int64)

    def positions(place: Callable[[torch.Tensor], np.ndarray]) -> np.ndarray:
        low, high, head = place(number % 256 + 1), place(number // 256 + 1), place(torch.arange(heads).view(1, heads, 1).expand_as(number) + 1)
        there = head != 0
        found = np.where(there, (high - 1) * 256 + low - 1, -1)
        if not np.array_equal(head, there * (np.arange(heads)[:, None] + 1)) or not (found == found[0]).all():
            raise Refused("the engine's blocks are not head by head, as kvd wants them")
        at = np.full(n, -1)
        at[found[0][found[0] >= 0]] = np.flatnonzero(found[0] >= 0)
        if (at < 0).any() or there[0].sum() != n:
            raise Refused("the engine's blocks do not hold each element of K and V once")
        return at.reshape(tokens, dim)

    return BlockLayout(positions(lambda x: pages(x, zero)), positions(lambda x: pages(zero, x)))
