"""What kvd.transformers takes of a model, and what it refuses by name: configs, attention modules, masks, arguments.

Attention in kvd is softmax(scale q k, capped softly if asked) v, causal, over all tokens or a sliding window, padding left
out. A model that wants anything else must not run with it, so everything that is not known to be that is refused.
"""
from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from typing import Any, Iterator, NamedTuple, Optional

import torch
from transformers import masking_utils

from . import _latent
from ._check import dims


class Geometry(NamedTuple):
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: tuple[int, int]
    windows: tuple[int, ...] = ()  # of each layer, 0: all tokens
    latent: bool = False  # K and V of head_dim are the rope part and the latent

    @property
    def dim_q(self) -> int:
        return sum(self.head_dim) if self.latent else self.head_dim[0]


def _refuse(what: str) -> None:
    raise ValueError(f"kvd cannot serve this model's attention: {what}")


# -- configs -----------------------------------------------------------------------------------------------------------

_LAYERS = {"full_attention", "sliding_attention"}
_CONFIG = {  # what a config says if its attention is of another kind
    "is_encoder_decoder": "it is an encoder-decoder", "add_cross_attention": "it has cross-attention",
    "use_bidirectional_attention": "it is bidirectional", "num_kv_shared_layers": "layers share K and V of other layers",
    "attention_chunk_size": "it is chunked", "kv_lora_rank": "its K and V are latent (MLA)", "alibi": "it has ALiBi biases",
    "use_alibi": "it has ALiBi biases", "scale_attn_by_inverse_layer_idx": "its scale depends on the layer",
}


_LATENT = {"deepseek_v2", "deepseek_v3", "youtu", "glm4_moe_lite", "axk1"}  # MLA as _latent.py has it
_SINKS = {"gpt_oss", "flint", "granite_swa", "granitemoe_swa"}  # whose sinks are logits of one more token
_SLIDING = {"mistral", "mixtral", "phi3", "phimoe", "starcoder2"}  # whose layers all have the config's window


def _windows(c: Any) -> tuple[int, ...]:
    """The sliding window of each layer, as far as the config tells it: a layer of which it does not keeps all tokens. Calls are
    checked against their masks all the same."""
    window, n = getattr(c, "sliding_window", None), c.num_hidden_layers
    if type(window) is not int or window < 1 or getattr(c, "use_sliding_window", True) is False:
        return (0,) * n
    types = getattr(c, "layer_types", None)
    if types is None:
        return (window if getattr(c, "model_type", None) in _SLIDING else 0,) * n
    return tuple(window if t == "sliding_attention" else 0 for t in types) if len(types) == n else (0,) * n


def _decoder(config: Any) -> Any:
    """What a config says of the model's text decoder."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def wants_sinks(config: Any) -> bool:
    return getattr(_decoder(config), "model_type", None) in _SINKS


def _refuse_mixed(c: Any) -> None:
    """Some configs (Gemma 4) have values by layer: reading one that differs from the config as a whole would raise."""
    own = getattr(c, "per_layer_config", None)
    if own is None:
        return
    for name in ("head_dim", "num_key_value_heads", "num_attention_heads", "v_head_dim"):
        values = {getattr(own[i], name, None) for i in range(c.num_hidden_layers)}
        if len(values) > 1:
            _refuse(f"layers of different shapes ({name} = {' and '.join(sorted(map(str, values)))})")


def check_config(config: Any) -> Geometry:
    """A config that says what kvd does not do is refused; returns the shape of the KV cache."""
    c = _decoder(config)
    latent = getattr(c, "model_type", None) in _LATENT
    for name, why in _CONFIG.items():
        if (getattr(config, name, None) or getattr(c, name, None)) and not (latent and name == "kv_lora_rank"):
            _refuse(f"{why} ({name} = {getattr(config, name, None) or getattr(c, name)!r})")
    _refuse_mixed(c)
    if getattr(c, "is_causal", True) is False:
        _refuse("it is bidirectional (is_causal = False)")
    if getattr(c, "position_embedding_type", None) == "alibi":
        _refuse("it has ALiBi biases (position_embedding_type)")
    strange = sorted(set(getattr(c, "layer_types", None) or ()) - _LAYERS)
    if strange:
        _refuse(f"layers of type {', '.join(strange)} (layer_types)")
    q_heads = getattr(c, "num_attention_heads", None)
    kv_heads = getattr(c, "num_key_value_heads", None) or q_heads
    if not isinstance(q_heads, int) or not isinstance(kv_heads, int):
        _refuse(f"heads of {q_heads!r} and {kv_heads!r} (num_attention_heads, num_key_value_heads)")
    if latent:
        sizes = getattr(c, "qk_rope_head_dim", None), getattr(c, "kv_lora_rank", None)
        if sizes != _latent.SIZES:
            _refuse(f"its K and V are latent (MLA), of {sizes[1]} with a rope part of {sizes[0]} (kv_lora_rank, qk_rope_head_dim), and kvd "
                    f"has {_latent.SIZES[1]} and {_latent.SIZES[0]}")
        return Geometry(c.num_hidden_layers, q_heads, 1, _latent.SIZES, _windows(c), True)
    if getattr(c, "multi_query", False) and not getattr(c, "num_key_value_heads", None):
        kv_heads = 1
    dim = getattr(c, "head_dim", None) or c.hidden_size // q_heads
    for name in ("global_head_dim", "num_global_key_value_heads"):
        other = getattr(c, name, None)
        if other is not None and other != (dim if name == "global_head_dim" else kv_heads):
            _refuse(f"layers of different shapes ({name} = {other})")
    return Geometry(c.num_hidden_layers, q_heads, kv_heads, (dim, getattr(c, "v_head_dim", None) or dim), _windows(c))


# -- modules -----------------------------------------------------------------------------------------------------------

_KNOWN = {"scaling", "dropout", "sliding_window", "softcap", "is_causal", "attention_mask"}
# Arguments that come along and say nothing about attention.
_IDLE = {"position_ids", "cache_position", "use_cache", "output_hidden_states", "return_dict", "output_router_logits",
         "num_items_in_batch", "logits_to_keep"}


@functools.lru_cache(None)
def _calls_of(kind: type) -> list[ast.Call]:
    """How a module's class calls transformers' attention interface."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError, AttributeError):
        return []
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", None) == "attention_interface"]


def check_model(model: Any, with_sinks: bool = True, with_latents: bool = True) -> Geometry:
    """Each layer must attend once, through the interface, and its own eager attention must be what kvd computes. Returns the
    shape of the KV cache."""
    shape = check_config(model.config)
    if shape.latent and not with_latents:
        _refuse("its K and V are latent (MLA)")
    found: dict[int, str] = {}
    sinks = sinks_of(model)
    if sinks and not with_sinks:
        _refuse("it has attention sinks (s_aux)")
    if sinks and not wants_sinks(model.config):
        _refuse(f"it has attention sinks (s_aux), and those of {', '.join(sorted(_SINKS))} alone are known")
    for name, module in model.named_modules():
        calls = _calls_of(type(module))
        if not calls:
            continue
        layer, call = getattr(module, "layer_idx", None), calls[0]
        if len(calls) > 1:
            _refuse(f"{name} ({type(module).__name__}) attends {len(calls)} times")
        if not isinstance(layer, int):
            _refuse(f"{name} ({type(module).__name__}) is no layer of a decoder (it has no layer_idx)")
        if layer in found:
            _refuse(f"layer {layer} attends twice, in {found[layer]} and {name}")
        found[layer] = name
        if getattr(module, "is_causal", True) is False:
            _refuse(f"{name} is bidirectional (is_causal = False)")
        for k in call.keywords:
            given = k.arg and (getattr(module, k.value.attr, True) if isinstance(k.value, ast.Attribute) and
                               getattr(k.value.value, "id", None) == "self" else True)
            if k.arg == "s_aux" and given is sinks.get(layer, True):
                continue
            if given is not None and k.arg is not None and k.arg not in _KNOWN | _IDLE:
                _refuse(f"{name} ({type(module).__name__}) passes '{k.arg}'")
        masks = [k.value for k in call.keywords if k.arg == "attention_mask"] or call.args[4:5]
        if getattr(masks[0] if masks else None, "id", None) != "attention_mask":
            _refuse(f"{name} ({type(module).__name__}) makes a mask of its own")
        _probe(name, module, shape, sinks.get(layer))
    missing = sorted(set(range(shape.layers)) - set(found))
    if missing or len(found) != shape.layers:
        _refuse(f"layers {', '.join(map(str, missing)) or max(found)} of {type(model).__name__} do not attend through transformers' "
                "attention interface, or are none of the config")
    return shape


def sinks_of(model: Any) -> dict[int, torch.Tensor]:
    """The attention sinks of the layers that have some: what they pass as `s_aux`, of their own, one for each q head."""
    found: dict[int, torch.Tensor] = {}
    for module in model.modules():
        layer, calls = getattr(module, "layer_idx", None), _calls_of(type(module))
        for k in calls[0].keywords if calls and isinstance(layer, int) else ():
            own = k.arg == "s_aux" and isinstance(k.value, ast.Attribute) and getattr(k.value.value, "id", None) == "self"
            value = getattr(module, k.value.attr, None) if own else None  # type: ignore[attr-defined]
            if isinstance(value, torch.Tensor):
                found[layer] = value
    return found


@torch.no_grad()
def _probe(name: str, module: Any, shape: Geometry, sinks: Optional[torch.Tensor]) -> None:
    """Computes a little attention with the model's own eager function, and here: biases and other additions show."""
    if shape.latent:
        _probe_latent(name, module)
        return
    if sinks is not None and (tuple(sinks.shape) != (shape.q_heads,) or not bool(sinks.isfinite().all())):
        _refuse(f"{name} ({type(module).__name__}) has sinks {dims(tuple(sinks.shape))}, and {dims((shape.q_heads,))} finite ones are "
                "wanted")
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        _refuse(f"{name} ({type(module).__name__}) has no eager_attention_forward to compare with")
    weight = next(module.parameters(), None)
    device = weight.device if weight is not None and weight.device.type != "meta" else torch.device("cpu")
    generator, group = torch.Generator().manual_seed(1), shape.q_heads // shape.kv_heads
    q, k, v = (torch.randn(1, heads, tokens, dim, generator=generator).to(device) for heads, tokens, dim in (
        (shape.q_heads, 2, shape.head_dim[0]), (shape.kv_heads, 4, shape.head_dim[0]), (shape.kv_heads, 4, shape.head_dim[1])))
    mask = torch.zeros(1, 1, 2, 4, device=device).masked_fill(torch.ones(2, 4, dtype=torch.bool, device=device).triu(3), -1e9)
    scale = shape.head_dim[0] ** -0.5
    was_training = module.training
    try:
        module.training = False
        more = {} if sinks is None else {"s_aux": sinks}
        got = eager(module, q, k, v, mask, scaling=scale, dropout=0.0, **more)[0].float()
    except Exception as e:  # whatever it wants that kvd would not give
        _refuse(f"{name} ({type(module).__name__}) does not run alone: {e}")
    finally:
        module.training = was_training
    logits = q @ k.repeat_interleave(group, 1).transpose(2, 3) * scale + mask
    if sinks is not None:  # one more token, whose value is zero
        logits = torch.cat([logits, sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], 3)
    want = (logits.softmax(-1)[..., :4] @ v.repeat_interleave(group, 1)).transpose(1, 2)
    if got.shape != want.shape or not torch.allclose(got, want, atol=1e-3):
        _refuse(f"{name} ({type(module).__name__}) computes something else, such as a bias")


def _probe_latent(name: str, module: Any) -> None:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    wrong = "has no eager_attention_forward to compare with" if eager is None else ""
    wrong = wrong or ("has " + _latent.lacks(module) if _latent.lacks(module) else _latent.differs(module, eager, 192 ** -0.5))
    if wrong:
        _refuse(f"{name} ({type(module).__name__}) {wrong}")


def latents(model: Any) -> Iterator[Any]:
    """Its attention modules, which are MLA's."""
    return (m for m in model.modules() if _calls_of(type(m)))


# -- masks -------------------------------------------------------------------------------------------------------------


class Mask(NamedTuple):
    """What a mask of `make_mask` stands for, beside the padding that it holds."""

    window: int  # 0: none
    given: bool  # whether the caller gave a mask


def _inside(function: Any) -> dict[str, Any]:
    return dict(zip(function.__code__.co_freevars, (x.cell_contents for x in function.__closure__ or ())))


def _window(function: Any) -> int:
    """Of a mask function of transformers: 0 if it is just causal."""
    causal, window = masking_utils.causal_mask_function, masking_utils.sliding_window_overlay(1)
    both = masking_utils.sliding_window_causal_mask_function(1)
    if function is causal:
        return 0
    parts = _inside(function).get("mask_functions", ()) if getattr(function, "__code__", None) is both.__code__ else ()
    if len(parts) == 2 and parts[1] is causal and getattr(parts[0], "__code__", None) is window.__code__:
        return int(_inside(parts[0])["sliding_window"])
    name = getattr(parts[0] if parts else function, "__qualname__", repr(function)).split(".")[0]
    raise ValueError(f"attention in kvd is causal, with a sliding window or without, and padding on the left; the model asks for "
                     f"another mask ({name})")


def make_mask(*args: Any, batch_size: int, kv_length: int, mask_function: Any, kv_offset: int = 0,
              attention_mask: Optional[torch.Tensor] = None, device: Any = None, **kwargs: Any) -> torch.Tensor:
    """Instead of a mask: which tokens are none, [batch, tokens], marked with what else the mask would be."""
    window = _window(mask_function)
    if kv_offset:
        raise ValueError(f"attention in kvd sees all tokens, and the mask begins at token {kv_offset}")
    mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device) if attention_mask is None else attention_mask[:]
    mask.kvd = Mask(window, attention_mask is not None)  # type: ignore[attr-defined]
    return mask


def padding_of(mask: Optional[torch.Tensor], tokens: int) -> tuple[torch.Tensor, int, bool]:
    """Of a mask as attention gets it: which tokens are none ([batch, all tokens], on the CPU), the window, and whether the
    caller gave it. Masks that transformers did not make here are taken if they say nothing but causal and padding."""
    if mask is None:
        raise ValueError("attention in kvd got no mask, so it cannot know that the model means to be causal")
    facts = getattr(mask, "kvd", None)
    if facts is not None:
        return mask.bool().cpu(), facts.window, facts.given
    if mask.ndim != 4:
        raise ValueError(f"attention in kvd got a mask {dims(tuple(mask.shape))} that is not its own")
    seen = (mask if mask.dtype == torch.bool else mask == 0).cpu()
    other = ValueError(f"attention in kvd got a 4D mask {dims(tuple(mask.shape))} that is more than causal and padding on the left")
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask > -1e4)).any()):
        raise other
    total = seen.shape[3]
    valid = seen[:, 0, -1]
    at = torch.arange(total)
    want = valid[:, None] & (at[None] <= at[total - tokens:, None])[None]
    real = valid[:, total - tokens:]
    if seen.shape[2] != tokens or not bool((seen == want[:, None])[real[:, None].expand(seen.shape[:3])].all()):
        raise other
    return valid, 0, True


# -- calls -------------------------------------------------------------------------------------------------------------


def check_call(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, is_causal: Optional[bool],
               others: dict[str, Any], shape: Geometry) -> None:
    if dropout:
        raise ValueError("attention in kvd has no dropout: call model.eval()")
    if is_causal is False or (is_causal is None and getattr(module, "is_causal", True) is False):
        raise ValueError("attention in kvd is causal, and this layer is not")
    for name, x in others.items():
        if x is not None and x is not False and name not in _IDLE:
            raise ValueError(f"attention in kvd does not know the argument '{name}' of {type(module).__name__}")
    for name, x, heads, dim in (("q", q, shape.q_heads, shape.dim_q), ("k", k, shape.kv_heads, shape.head_dim[0]),
                                ("v", v, shape.kv_heads, shape.head_dim[1])):
        if x.ndim != 4 or tuple(x.shape) != (q.shape[0], heads, q.shape[2], dim):
            raise ValueError(f"{name} of {type(module).__name__} is {dims(tuple(x.shape))}, and the client was opened for "
                             f"{dims((q.shape[0], heads, q.shape[2], dim))}: [batch, heads, tokens, head_dim]")
