"""Hugging Face transformers with the whole KV cache in kvd: `generate()` works as ever.

    from kvd.transformers import KvdCache, connect, use_kvd

    use_kvd(model)                                    # attention is kvd's from now on
    with connect(model, rotation_set="SmolLM2@v1") as client:
        cache = KvdCache(client)
        model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), cache=cache)

For decoders whose attention is causal softmax over all tokens or a sliding window, with a soft cap and attention sinks or without
(Llama, Qwen, Mistral, Gemma, Phi, gpt-oss, ...), or latent (MLA: DeepSeek V2 and V3, ...), where kvd runs on the CPU. Layers with a sliding window keep what it reaches, and 64 tokens more. What wants
anything else, such as chunked or linear attention, biases, or layers that share K and V, is refused by name: by `connect` and
`use_kvd` where config and modules show it, else by the call, which then changes nothing. Prompts of different lengths are padded on
the left, and padding is not stored. Beams are copy-on-write forks. A cache may be passed to generate again for another turn. Releases
of transformers before 5.2x call the argument `past_key_values`. K and V are stored in bf16, or compressed, whatever the model's
dtype.

A model on the GPU that kvd runs on hands its tensors over where they are, in the order of PyTorch's current stream; with another
GPU, or kvd on the CPU, they are copied through shared memory. With `KvdCache(client, direct=True)` the steps of one token run in
this process, in direct mode; prompts, beams and cropping go through the daemon as before.
"""
from __future__ import annotations

import contextlib
from typing import Any, Iterator, NamedTuple, Optional

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

from . import _latent
from . import _transformers as checks
from ._client import AnyTensor, Client, Item, Sequence
from ._direct import Direct
from ._library import Error

_NAME = "kvd"


class _Shared(NamedTuple):
    """Memory that both sides see."""

    kvd: AnyTensor
    torch: torch.Tensor


def connect(model: Any, **options: Any) -> Client:
    """A client with the layout of a model, or of its config; attention sinks are the model's only, as they are weights. options:
    those of kvd.Client that do not follow from it, and windows and sinks where others are wanted: windows=None keeps all tokens of
    all layers. Refuses, with ValueError, what has attention that is not what kvd computes."""
    config = getattr(model, "config", model)
    g = checks.check_config(config)
    own = checks.sinks_of(model) if hasattr(model, "modules") else {}
    if not own and "sinks" not in options and checks.wants_sinks(config):
        raise ValueError("the model has attention sinks, which are weights: pass the model and not its config, or sinks")
    if own and "sinks" not in options:
        none = np.full(g.q_heads, -np.inf, np.float32)
        options["sinks"] = [own[i].detach().float().cpu().numpy() if i in own else none for i in range(g.layers)]
    options.setdefault("windows", g.windows)
    return Client(layers=range(g.layers), q_heads=g.q_heads, kv_heads=g.kv_heads, head_dim=g.head_dim, latent=g.latent, **options)


def use_kvd(model: Any) -> None:
    """Makes the model attend in kvd. It then wants a KvdCache in every call. Refuses, with ValueError and changing nothing, a
    model whose attention is not what kvd computes."""
    shape = checks.check_model(model)
    for module in checks.latents(model) if shape.latent else ():
        _latent.hand_on(module)
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, checks.make_mask)
    model.set_attn_implementation(_NAME)


def _attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: Optional[torch.Tensor], scaling: Optional[float] = None, dropout: float = 0.0,
               sliding_window: Optional[int] = None, softcap: Optional[float] = None, is_causal: Optional[bool] = None,
               s_aux: Optional[torch.Tensor] = None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    layer = getattr(key, "kvd_layer", None)
    if layer is None or getattr(value, "kvd_layer", None) is not layer:
        raise ValueError("attention in kvd wants a KvdCache: pass it to generate() or forward()")
    with layer.cache._step():
        if not layer.waits or getattr(module, "layer_idx", layer.index) != layer.index:
            raise ValueError(f"layer {getattr(module, 'layer_idx', '?')} attends to K and V of layer {layer.index}: layers that share "
                             "them are not supported")
        kind = query.dtype
        if layer.cache._geometry.latent:  # what the cache was given, and so gave, is the latent and the rope part
            query, key, value = _latent.absorb(module, query), value, key
        checks.check_call(module, query, key, value, dropout, is_causal, kwargs, layer.cache._geometry)
        layer.check_sinks(s_aux)
        o = layer.cache._attend(layer, query, key, value, attention_mask, sliding_window, scale=scaling or 0, softcap=softcap or 0)
        if layer.cache._geometry.latent:
            o = _latent.values(module, o).to(kind)
    return o, None


class _Layer(CacheLayerMixin):
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: "KvdCache", index: int):
        super().__init__()
        self.cache, self.index, self.waits = cache, index, False
        self._sinks: Optional[tuple[torch.Tensor, int]] = None  # that were compared, and their version

    def check_sinks(self, given: Optional[torch.Tensor]) -> None:
        """A call's sinks must be those that the client was opened with."""
        held = self.cache.client.sinks
        own = np.full(self.cache.client.q_heads, -np.inf, np.float32) if held is None else held[self.index]
        if given is None:
            if not np.isneginf(own).all():
                raise ValueError(f"layer {self.index} attends without sinks, and the client was opened with some")
            return
        version = -1 if given.is_inference() else given._version  # such tensors count no versions: compared each time
        if self._sinks is not None and self._sinks[0] is given and self._sinks[1] == version >= 0:
            return
        if not np.array_equal(given.detach().float().cpu().numpy(), own):
            raise ValueError(f"layer {self.index} has attention sinks, 's_aux', that are not those of the client: open it with "
                             "connect(model)")
        self._sinks = given, version

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.cache._begin(self.index)
        self.waits = self.is_initialized = True
        # Objects of our own, to say whose they are. They keep the memory that the model gave.
        key_states, value_states = key_states.view_as(key_states), value_states.view_as(value_states)
        key_states.kvd_layer = value_states.kvd_layer = self
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.seen

    def get_max_length(self) -> int:
        return -1


class KvdCache(Cache):
    """The KV cache of a batch, in kvd. `sequences` are those of the rows, once the first prompt is there; `reset` and
    `free` let go of them. sequences: some to go on with, such as those that another worker has published. direct: attend in
    this process when each row gets one token; then the daemon lags behind by up to 64 tokens until `flush`, and no sequence
    may grow beyond max_tokens."""

    def __init__(self, client: Client, sequences: Optional[list[Sequence]] = None, *, direct: bool = False,
                 max_tokens: int = 32768):
        super().__init__(layers=[_Layer(self, i) for i in range(len(client.layers))])
        if not client.q_heads:
            raise ValueError("the client's layers differ in heads or head_dim, and those of a KvdCache are alike")
        self.client = client
        self.sequences = list(sequences or [])
        self._tensors: dict[tuple, tuple[_Shared, ...]] = {}
        self._max_tokens = max_tokens if direct else 0
        self._direct: Optional[Direct] = None
        self._direct_terms: dict[str, Any] = {}
        self._on_gpu = client.on_gpu
        self._geometry = checks.Geometry(len(client.layers), client.q_heads, client.kv_heads, client.head_dim,
                                         latent=client.shapes[0].latent)
        self.seen = max((s.length for s in self.sequences), default=0)
        # [batch, seen]: which positions of a row are tokens, not padding.
        self._held = torch.arange(self.seen)[None] >= torch.tensor([self.seen - s.length for s in self.sequences])[:, None].long()
        self._made = not self.sequences
        self._next = 0  # the layer that comes next
        self._masks: dict[int, tuple[Any, torch.Tensor, int]] = {}  # of this step, by the id of the mask

    def _share(self, device: torch.device, dtype: torch.dtype, *shape: int) -> _Shared:
        if device.type == "cuda" and self._on_gpu:
            x = torch.zeros(shape, dtype=dtype, device=device)
            torch.cuda.current_stream(device).synchronize()
            return _Shared(self.client.share(x), x)
        t = self.client.tensor(*shape, dtype="f32" if dtype == torch.float32 else "bf16")
        x = torch.from_numpy(t.array if dtype == torch.float32 else t.array.view(np.int16))
        return _Shared(t, x if dtype == torch.float32 else x.view(torch.bfloat16))

    def _memory(self, tokens: int, q: torch.Tensor) -> tuple[_Shared, ...]:
        """Of q, k, v and o; kept for the next step of the same size."""
        dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        key = (tokens, q.device, dtype)
        if key not in self._tensors:
            while len(self._tensors) >= 8:
                for t in self._tensors.pop(next(iter(self._tensors))):
                    t.kvd.free()
            c = self.client
            self._tensors[key] = tuple(self._share(q.device, kind, 1, tokens, heads, dim) for kind, heads, dim in (
                (dtype, c.q_heads, self._geometry.dim_q), (torch.bfloat16, c.kv_heads, c.head_dim[0]),
                (torch.bfloat16, c.kv_heads, c.head_dim[1]), (dtype, c.q_heads, c.head_dim[1])))
        return self._tensors[key]

    # -- a step: every layer in turn ---------------------------------------------------------------

    def _begin(self, index: int) -> None:
        """A layer has new K and V."""
        if any(x.waits for x in self.layers):
            self._abandon()
            raise RuntimeError("the model does not attend in kvd, or was interrupted: call kvd.transformers.use_kvd(model)")
        if index == 0 and self._next:  # the last step was broken off
            self._abandon()
        if index != self._next:
            expected = self._next
            self._abandon()
            raise ValueError(f"layer {index} comes where layer {expected} is expected: a KvdCache wants every layer once, in order")

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Forgets what the step has brought to kvd."""
        for layer in self.layers:
            layer.waits = False
        self._next = 0
        self._masks.clear()
        with contextlib.suppress(Error):  # what is wrong has been said, or is said by the next call
            if self._direct:
                self._direct.close()
            self.client.enqueued()
        self._direct = None
        forget = self._made and self.seen == 0  # the next batch may be of another size
        for s in self.sequences:
            with contextlib.suppress(Error):
                if forget:
                    s.free()
                else:
                    s.truncate(s.length)
        if forget:
            self.sequences = []

    def _new_tokens(self, mask: Optional[torch.Tensor], batch: int, tokens: int) -> tuple[torch.Tensor, int]:
        """[batch, tokens]: which of the new tokens are not padding, and the window. What the mask says of older ones must be what
        kvd holds."""
        if id(mask) in self._masks:
            return self._masks[id(mask)][1:]
        shown, window, given = checks.padding_of(mask, tokens)
        if tuple(shown.shape) != (batch, self.seen + tokens):
            raise ValueError(f"the mask is for {shown.shape[0]} rows of {shown.shape[1]} tokens, and there are {batch} of "
                             f"{self.seen + tokens}: {self.seen} in kvd and {tokens} new")
        old, valid = shown[:, :self.seen], shown[:, self.seen:]
        if not bool((old == self._held).all()):
            raise ValueError("the mask hides tokens that kvd holds, or shows padding, which it does not hold" if given else
                             "rows are padded: pass attention_mask")
        if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
            raise ValueError("padding after tokens: set tokenizer.padding_side = 'left'")
        shown = torch.cat([self._held, valid], 1)
        if window and bool((shown[:, :-1] & ~shown[:, 1:]).any()):
            raise ValueError("padding between tokens, and a sliding window, which counts it: pad the first prompt only")
        self._masks[id(mask)] = (mask, valid, window)  # keeps the mask: its id stays its own
        return valid, window

    def _attend(self, layer: _Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Optional[torch.Tensor],
                sliding_window: Optional[int], **attention: Any) -> torch.Tensor:
        batch, _, tokens, _ = q.shape
        if self.sequences and len(self.sequences) != batch:
            raise ValueError(f"the cache has {len(self.sequences)} sequences, the batch {batch}")
        if not self.sequences:
            self._held = torch.ones(batch, 0, dtype=torch.bool)
        valid, window = self._new_tokens(mask, batch, tokens)
        if sliding_window is not None and sliding_window != window:
            raise ValueError(f"the layer has a sliding window of {sliding_window}, and its mask "
                             f"{f'one of {window}' if window else 'none'}")
        kept = self.client.windows[layer.index]
        if kept and (not window or window > kept):
            raise ValueError(f"the layer wants {f'a window of {window}' if window else 'all'} tokens, and the client was opened for a "
                             f"window of {kept}")
        attention["window"] = window
        if not self.sequences:
            self.sequences = list(self.client.create_many(batch))
        if tokens == 1 and self._max_tokens and bool(valid.all()) and (not q.is_cuda or self._on_gpu):
            o = self._attend_directly(layer.index, q, k, v, attention)
        else:
            o = self._attend_by_call(layer.index, q, k, v, valid, attention)
        layer.waits = False
        self._next += 1
        if self._next == len(self.layers):
            self._next = 0
            self.seen += tokens
            self._held = torch.cat([self._held, valid], 1)
            self._masks.clear()
        return o

    def _attend_by_call(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor,
                        attention: dict[str, Any]) -> torch.Tensor:
        self._unbind()
        counts = valid.sum(1).tolist()
        tq, tk, tv, to = self._memory(sum(counts), q)
        rows = valid.to(q.device)
        for t, x in ((tq, q), (tk, k), (tv, v)):
            t.torch[0].copy_(x.transpose(1, 2)[rows])
        items, at = [], 0
        for s, n in zip(self.sequences, counts):
            if n:
                part = np.s_[:, at:at + n]
                items.append(Item(s, tk.kvd[part], tv.kvd[part], tq.kvd[part], to.kvd[part]))
            at += n
        if tq.torch.is_cuda:
            self.client.enqueue("step", items, torch.cuda.current_stream(q.device).cuda_stream, layer=layer, **attention)
            if layer + 1 == len(self.layers):
                self.client.enqueued()
        else:
            self.client.step(items, layer=layer, **attention)
        out = q.new_zeros(len(counts), valid.shape[1], *to.torch.shape[2:])
        out[rows] = to.torch[0].to(device=q.device, dtype=q.dtype)
        return out

    # -- direct mode -------------------------------------------------------------------------------

    def _attend_directly(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                         attention: dict[str, Any]) -> torch.Tensor:
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
        dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        if attention["window"] == self.client.windows[layer]:  # which the layer has anyway
            attention = {**attention, "window": 0}
        if layer == 0:
            self._bind(dtype, attention)
            self._direct.begin(stream)
        if {**attention, "dtype": dtype} != self._direct_terms:
            raise ValueError("direct mode wants the same scale, softcap, window and dtype in all layers: pass direct=False")
        q, k, v = (x.transpose(1, 2).to(kind).contiguous() for x, kind in ((q, dtype), (k, torch.bfloat16), (v, torch.bfloat16)))
        o = torch.empty(*q.shape[:3], self.client.head_dim[1], dtype=dtype, device=q.device)
        self._direct.store(layer, k, v, stream)
        self._direct.attend(layer, q, o, stream=stream)
        if layer + 1 == len(self.layers):
            self._direct.end(stream=stream)
        return o

    def _bind(self, dtype: torch.dtype, attention: dict[str, Any]) -> None:
        terms = {**attention, "dtype": dtype}
        if self._direct and (self._direct.slots != len(self.sequences) or self._direct_terms != terms):
            self._direct.close()
            self._direct = None
        if not self._direct:
            self._direct = Direct(self.client, slots=len(self.sequences), max_tokens=self._max_tokens,
                                  dtype="bf16" if dtype == torch.bfloat16 else "f32", **attention)
            self._direct_terms = terms
        for slot, s in enumerate(self.sequences):
            if self._direct.sequence(slot) is not s:
                self._direct.bind(slot, s)

    def _unbind(self) -> None:
        """Brings the latest tokens to the daemon, which may work on the sequences from then on."""
        for slot in range(self._direct.slots if self._direct else 0):
            if self._direct.sequence(slot):
                self._direct.bind(slot, None)

    def flush(self) -> None:
        """Waits until the daemon has every token."""
        if self._direct:
            self._direct.flush()

    # -- what generate() asks of a cache -----------------------------------------------------------

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._take(torch.arange(len(self.sequences))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take([i for i in range(len(self.sequences)) for _ in range(repeats)])

    def _take(self, rows: list[int]) -> None:
        """The sequences of these rows; one that is wanted again is forked, one that is not wanted is freed."""
        if rows == list(range(len(self.sequences))):
            return
        self._unbind()
        self._held = self._held[rows]
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
        """Removes the last tokens of every row: -n removes n, as the caches of transformers have it."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): a negative number is wanted, of the tokens to remove")
        n = min(-tokens_to_remove, self.seen)
        if n == 0:
            return
        self._unbind()
        removed = self._held[:, self.seen - n:].sum(1).tolist()  # padding is not stored
        for s, tokens in zip(self.sequences, removed):
            s.truncate(s.length - tokens)
        self.seen -= n
        self._held = self._held[:, :self.seen]

    @property
    def batch_size(self) -> int:
        return len(self.sequences) or -1

    def reset(self) -> None:
        """Forgets all tokens; the cache may be used again."""
        if self._direct:
            self._direct.close()
            self._direct = None
        for s in self.sequences:
            s.free()
        self.sequences, self.seen, self._next, self._made = [], 0, 0, True
        self._masks.clear()
        for layer in self.layers:
            layer.waits = False

    free = reset
