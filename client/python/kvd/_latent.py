"""Multi-head latent attention (MLA) of transformers' models, for kvd.transformers.

Such a module gives its cache a latent and the rope part of a key for each token, both of one head, and makes keys and values of all heads of what
the cache returns, in `expand_kv`. With kvd nothing is expanded: `expand_kv` hands on what it is given, and attention takes the up-projection
of keys into the queries and that of values out of the result.
"""
from __future__ import annotations

import functools
from typing import Any

import torch

SIZES = (64, 512)  # of the rope part and the latent: what kvd has
_PARTS = ("kv_b_proj", "expand_kv", "qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank", "v_head_dim", "num_heads")


def lacks(module: Any) -> str:
    """What a module lacks of what is known of MLA; "" if nothing."""
    for name in _PARTS:
        if not hasattr(module, name):
            return f"no {name}"
    weight, heads = module.kv_b_proj.weight, module.num_heads
    if getattr(module.kv_b_proj, "bias", None) is not None or type(module.kv_b_proj) is not torch.nn.Linear:
        return f"a kv_b_proj that is more than a matrix ({type(module.kv_b_proj).__name__})"
    if weight.device.type == "meta":
        return "no weights yet (they are on the device meta)"
    if tuple(weight.shape) != (heads * (module.qk_nope_head_dim + module.v_head_dim), module.kv_lora_rank):
        return f"a kv_b_proj of {tuple(weight.shape)}"
    if (module.qk_rope_head_dim, module.kv_lora_rank) != SIZES:
        return f"{module.qk_rope_head_dim} for the rope part and {module.kv_lora_rank} for the latent, where kvd has {SIZES[0]} and {SIZES[1]}"
    return ""


def _projections(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of keys [heads, qk_nope_head_dim, latent] and of values [heads, v_head_dim, latent], float32."""
    both = module.kv_b_proj.weight.float().view(module.num_heads, -1, module.kv_lora_rank)
    return both[:, :module.qk_nope_head_dim], both[:, module.qk_nope_head_dim:]


def absorb(module: Any, q: torch.Tensor) -> torch.Tensor:
    """Queries [batch, heads, tokens, nope and rope] for a latent and a rope part, float32."""
    nope, rope = q.float().split([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
    return torch.cat([torch.einsum("bhtd,hdc->bhtc", nope, _projections(module)[0]), rope], -1)


def values(module: Any, o: torch.Tensor) -> torch.Tensor:
    """Sums of latents [batch, tokens, heads, latent] as sums of values."""
    return torch.einsum("bthc,hvc->bthv", o.float(), _projections(module)[1])


def _handed_on(module: Any, latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if getattr(latent, "kvd_layer", None) is None:  # another cache, or none
        return type(module).expand_kv(module, latent, rope)  # type: ignore[no-any-return]
    return latent, rope


def hand_on(module: Any) -> None:
    """From now on attention gets latents and rope parts where they come from a KvdCache."""
    module.expand_kv = functools.partial(_handed_on, module)


@torch.no_grad()
def differs(module: Any, eager: Any, scale: float) -> str:
    """Computes a little attention with the model's own functions, and as kvd would. What is wrong, or ""."""
    weight, generator = module.kv_b_proj.weight, torch.Generator().manual_seed(1)
    q, latent, rope = (torch.randn(1, heads, tokens, dim, generator=generator).to(weight) for heads, tokens, dim in (
        (module.num_heads, 2, module.qk_nope_head_dim + SIZES[0]), (1, 4, SIZES[1]), (1, 4, SIZES[0])))
    mask = torch.zeros(1, 1, 2, 4).masked_fill(torch.ones(2, 4, dtype=torch.bool).triu(3), -1e9).to(weight)
    was_training = module.training
    try:
        module.training = False
        k, v = type(module).expand_kv(module, latent, rope)
        got = eager(module, q, k, v, mask, scaling=scale, dropout=0.0)[0].float()
    except Exception as e:  # whatever it wants that kvd would not give
        return f"does not run alone: {e}"
    finally:
        module.training = was_training
    logits = absorb(module, q) @ torch.cat([latent, rope], -1).float().transpose(2, 3) * scale + mask
    want = values(module, (logits.softmax(-1) @ latent.float()).transpose(1, 2))
    near = 1e-3 if weight.dtype == torch.float32 else 3e-2
    if got.shape != want.shape or not torch.allclose(got, want, atol=near * float(want.abs().max())):
        return "computes something else than MLA"
    return ""
