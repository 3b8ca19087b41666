"""Hugging Face transformers with the whole KV cache in kvd: `generate()` works as ever.

    from kvd.transformers import KvdCache, connect, use_kvd

    use_kvd(model)                                    # attention is kvd's from now on
    with connect(model.config, rotation_set="SmolLM2@v1") as client:
        cache = KvdCache(client)
        model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), cache=cache)

For decoders with full or sliding-window attention and RoPE (Llama, Qwen, Mistral, ...). Prompts of different lengths are
padded on the left, and padding is not stored. Beams are copy-on-write forks. A cache may be passed to generate again for
another turn. Releases of transformers before 5.2x call the argument `past_key_values`. K and V are stored in bf16, or
compressed, whatever the model's dtype; tensors on a GPU are copied through shared memory.
"""
from __future__ import annotations

from typing import Any, Optional

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

from ._client import Client, Item, Sequence, Tensor

_NAME = "kvd"


def connect(config: Any, **options: Any) -> Client:
    """A client with the geometry of a model's config. options: those of kvd.Client that do not follow from it."""
    c = config.get_text_config() if hasattr(config, "get_text_config") else config
    q_heads = c.num_attention_heads
    return Client(layers=range(c.num_hidden_layers), q_heads=q_heads,
                  kv_heads=getattr(c, "num_key_value_heads", None) or q_heads,
                  head_dim=getattr(c, "head_dim", None) or c.hidden_size // q_heads, **options)


def use_kvd(model: Any) -> None:
    """Makes the model attend in kvd. It then wants a KvdCache in every call."""
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _padding)
    model.set_attn_implementation(_NAME)


def _padding(*args: Any, attention_mask: Optional[torch.Tensor] = None, **kwargs: Any) -> Optional[torch.Tensor]:
    """Instead of a mask: which tokens are none, [batch, tokens]. What is causal, and windows, kvd knows."""
    return attention_mask


def _attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: Optional[torch.Tensor], scaling: Optional[float] = None, dropout: float = 0.0,
               sliding_window: Optional[int] = None, softcap: Optional[float] = None,
               **kwargs: Any) -> tuple[torch.Tensor, None]:
    layer = getattr(key, "kvd_layer", None)
    if layer is None:
        raise ValueError("attention in kvd wants a KvdCache: pass it to generate() or forward()")
    if dropout:
        raise ValueError("attention in kvd has no dropout: call model.eval()")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError("attention in kvd takes a padding mask [batch, tokens], no other")
    o = layer.cache._attend(layer, query, key, value, attention_mask, scale=scaling or 0, softcap=softcap or 0,
                            window=sliding_window or 0)
    return o, None


class _Layer(CacheLayerMixin):
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: "KvdCache", index: int):
        super().__init__()
        self.cache, self.index, self.seen, self.waits = cache, index, 0, False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if any(x.waits for x in self.cache.layers):
            raise RuntimeError("the model does not attend in kvd: call kvd.transformers.use_kvd(model)")
        self.waits = self.is_initialized = True
        self.seen += key_states.shape[-2]
        key_states = key_states.view_as(key_states)  # an object of our own to say whose it is
        key_states.kvd_layer = self
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1


class KvdCache(Cache):
    """The KV cache of a batch, in kvd. `sequences` are those of the rows, once the first prompt is there; `reset` and
    `free` let go of them. sequences: some to go on with, such as those that another worker has published."""

    def __init__(self, client: Client, sequences: Optional[list[Sequence]] = None):
        super().__init__(layers=[_Layer(self, i) for i in range(len(client.layers))])
        self.client = client
        self.sequences = list(sequences or [])
        self._tensors: dict[int, tuple[Tensor, ...]] = {}
        for layer in self.layers:  # rows of different lengths count as padded on the left
            layer.seen = max((s.length for s in self.sequences), default=0)

    def _memory(self, tokens: int) -> tuple[Tensor, ...]:
        if tokens not in self._tensors:
            while len(self._tensors) >= 8:
                for t in self._tensors.pop(next(iter(self._tensors))):
                    t.free()
            t, c = self.client.tensor, self.client
            self._tensors[tokens] = (t(1, tokens, c.q_heads, c.head_dim[0], dtype="f32"),
                                     t(1, tokens, c.kv_heads, c.head_dim[0]), t(1, tokens, c.kv_heads, c.head_dim[1]),
                                     t(1, tokens, c.q_heads, c.head_dim[1], dtype="f32"))
        return self._tensors[tokens]

    def _valid(self, mask: Optional[torch.Tensor], batch: int, tokens: int) -> torch.Tensor:
        """[batch, tokens]: which of the new tokens are not padding."""
        if mask is None:
            return torch.ones(batch, tokens, dtype=torch.bool)
        valid = mask[:, -tokens:].bool().cpu()
        if tokens > 1 and bool((valid[:, :-1] & ~valid[:, 1:]).any()):
            raise ValueError("padding after tokens: set tokenizer.padding_side = 'left'")
        return valid

    def _attend(self, layer: _Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Optional[torch.Tensor],
                **attention: Any) -> torch.Tensor:
        batch, _, tokens, _ = q.shape
        if not self.sequences:
            self.sequences = list(self.client.create_many(batch))
        if len(self.sequences) != batch:
            raise ValueError(f"the cache has {len(self.sequences)} sequences, the batch {batch}")
        valid = self._valid(mask, batch, tokens)
        counts = valid.sum(1).tolist()
        tq, tk, tv, to = self._memory(sum(counts))
        rows = valid.to(q.device)
        torch.from_numpy(tq.array[0]).copy_(q.transpose(1, 2)[rows])
        for t, x in ((tk, k), (tv, v)):
            torch.from_numpy(t.array[0].view(np.int16)).view(torch.bfloat16).copy_(x.transpose(1, 2)[rows])
        items, at = [], 0
        for s, n in zip(self.sequences, counts):
            if n:
                part = np.s_[:, at:at + n]
                items.append(Item(s, tk[part], tv[part], tq[part], to[part]))
            at += n
        self.client.step(items, layer=layer.index, **attention)
        layer.waits = False
        out = q.new_zeros(batch, tokens, to.shape[2], to.shape[3])
        out[rows] = torch.from_numpy(to.array[0]).to(device=q.device, dtype=q.dtype)
        return out

    # -- what generate() asks of a cache -----------------------------------------------------------

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._take(torch.arange(len(self.sequences))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take([i for i in range(len(self.sequences)) for _ in range(repeats)])

    def _take(self, rows: list[int]) -> None:
        """The sequences of these rows; one that is wanted again is forked, one that is not wanted is freed."""
        old, used = self.sequences, set()
        fresh = []
        for r in rows:
            fresh.append(old[r].fork()[0] if r in used else old[r])
            used.add(r)
        self.sequences = fresh
        for i, s in enumerate(old):
            if i not in used:
                s.free()

    def crop(self, tokens_to_remove: int) -> None:
        for s in self.sequences:
            s.truncate(max(0, s.length - tokens_to_remove))
        for layer in self.layers:
            layer.seen = max(0, layer.seen - tokens_to_remove)

    @property
    def batch_size(self) -> int:
        return len(self.sequences) or -1

    def reset(self) -> None:
        """Forgets all tokens; the cache may be used again."""
        for s in self.sequences:
            s.free()
        self.sequences = []
        for layer in self.layers:
            layer.seen, layer.waits = 0, False

    free = reset
