"""What vLLM was started with: the pages that it has, and the space that they belong to; or why kvd does not serve it."""
from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any, Optional

from ..engines import PAGE, Policy, Refused, restore_seconds, space, weights_digest
from . import _compat

compat = _compat.module()
_LOSSLESS = ("bf16",)
_KEYS = {"address", "addresses", "namespace", "codec", "rotation_set", "weights", "timeout", "lease", "restore", "first_exact_pages", "last_exact_pages",
         "block_size", "spec_name", "offload_prompt_only"}
_CONNECTION = ("namespace", "timeout")
_LENGTH_SCALED = (None, "default", "linear", "llama3", "mrope")  # kinds of RoPE that do not depend on the longest length served


@dataclasses.dataclass(frozen=True)
class Setup:
    layers: tuple[int, ...]  # the model's numbers of the layers, ascending
    order: tuple[int, ...]  # of those, their places in the group
    kv_heads: int  # of this rank
    head_dim: int
    block_tokens: int  # of the engine's blocks
    chunk_tokens: int  # of what is stored and loaded as one: a page, or a block if that is larger
    rank: int
    tp_size: int
    codec: str
    policy: Policy
    lease: float
    restore: float
    extra: dict[str, Any]
    facts: dict[str, Any]

    @property
    def pages_per_chunk(self) -> int:
        return self.chunk_tokens // PAGE

    def open(self, rank: int, name: str) -> Any:
        """The page store of a rank; each has its own heads, hence its own space, and may have a kvd of its own."""
        from .. import Pages

        addresses = self.extra.get("addresses")
        more = {k: self.extra[k] for k in _CONNECTION if k in self.extra}
        return Pages(space=space(**self.facts, rank=rank), layers=self.layers, kv_heads=self.kv_heads, head_dim=self.head_dim, codec=self.codec,
                     rotation_set=self.extra.get("rotation_set"), exact=self.policy.lossy, tp_rank=rank, tp_size=self.tp_size,
                     address=addresses[rank] if addresses else self.extra.get("address"), name=f"{name}-{rank}", **more)


def _group(kv_cache_config: Any) -> Any:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise Refused(f"a model with {len(groups)} KV groups (sliding windows, recurrent states or drafts beside full attention) is not served")
    spec = groups[0].kv_cache_spec
    specs = list(spec.kv_cache_specs.values()) if isinstance(spec, compat.UniformTypeKVCacheSpecs) else [spec]
    for s in specs:
        if type(s) is not compat.FullAttentionSpec:
            raise Refused(f"KV of the kind {type(s).__name__} is not served, FullAttentionSpec alone is")
        if s.sliding_window is not None or s.attention_chunk_size is not None or s.non_causal:
            raise Refused("sliding windows, chunked attention and attention that is not causal are not served")
        if compat.packed(s):
            raise Refused("a quantized or packed KV cache is not served: start with --kv-cache-dtype auto")
        if s.head_size_v != s.head_size:
            raise Refused(f"heads of {s.head_size} for K and {s.head_size_v} for V are not served")
    if any(s != specs[0] for s in specs):
        raise Refused("layers of different shapes are not served")
    return groups[0], specs[0]


def _check(vllm_config: Any, extra: dict[str, Any]) -> None:
    c, p = vllm_config, vllm_config.parallel_config
    unknown = sorted(set(extra) - _KEYS)
    if unknown:
        may = ", ".join(sorted(_KEYS - {"spec_name", "block_size"}))
        raise Refused(f"kv_connector_extra_config has {', '.join(unknown)}, and {may} may be given")
    if c.kv_transfer_config.kv_load_failure_policy != "recompute":
        raise Refused('"kv_load_failure_policy": "recompute" is wanted in --kv-transfer-config: what kvd cannot give is computed')
    if c.kv_transfer_config.kv_role != "kv_both":
        raise Refused('"kv_role": "kv_both" is wanted in --kv-transfer-config')
    device = compat.current_platform.device_type
    if device not in compat.DEVICES:
        raise Refused(f"this release of vLLM on {device} is not served, on {' and '.join(compat.DEVICES)} it is")
    if device != "cpu" and p.world_size != 1 and "addresses" not in extra:
        raise Refused("with tensor parallelism each rank wants a kvd on its own GPU: give addresses in kv_connector_extra_config, in the order of "
                      "ranks")
    if device != "cpu" and len(set(extra.get("addresses", ()))) != len(extra.get("addresses", ())):
        raise Refused("addresses name a kvd twice: each rank wants one on its own GPU")
    if device != "cpu" and getattr(c.model_config, "enable_sleep_mode", False):
        raise Refused("sleep mode is not served: it takes away the memory that pages are read from and written to")
    if c.model_config.use_mla:
        raise Refused("latent attention (MLA) is not served")
    for name in ("pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(p, name, 1) != 1:
            raise Refused(f"{name} above 1 is not served")
    if p.world_size != p.tensor_parallel_size:
        raise Refused("ranks that are not those of tensor parallelism are not served")
    if c.speculative_config is not None and c.speculative_config.method != "ngram":
        raise Refused(f"speculative decoding by {c.speculative_config.method} is not served: drafts have KV of their own; ngram is")
    if c.cache_config.cache_dtype not in ("auto", "bfloat16"):
        raise Refused(f"--kv-cache-dtype {c.cache_config.cache_dtype} is not served, auto is")
    if str(c.model_config.dtype) != "torch.bfloat16":
        raise Refused(f"KV in {c.model_config.dtype} is not served: start with --dtype bfloat16")
    if c.cache_config.prefix_caching_hash_algo not in ("sha256", "sha256_cbor"):
        raise Refused(f"--prefix-caching-hash-algo {c.cache_config.prefix_caching_hash_algo} is not served: sha256 and sha256_cbor are")
    if "address" in extra and "addresses" in extra:
        raise Refused("address and addresses exclude each other")
    if "addresses" in extra and len(extra["addresses"]) != p.tensor_parallel_size:
        raise Refused(f"{len(extra['addresses'])} addresses are given for {p.tensor_parallel_size} ranks")


def _config_facts(model_config: Any) -> dict[str, Any]:
    config = json.loads(json.dumps(model_config.hf_config.to_dict(), sort_keys=True, default=str))
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    text = json.loads(json.dumps(model_config.hf_text_config.to_dict(), sort_keys=True, default=str))
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kinds = {v.get("rope_type", v.get("type")) for v in [rope, *(x for x in rope.values() if isinstance(x, dict))]}
    longest = None if kinds <= set(_LENGTH_SCALED) else model_config.max_model_len
    return {"config": config, "rope": rope, "longest": longest}


def prepare(vllm_config: Any, kv_cache_config: Any) -> Setup:
    """Raises `Refused`, which names what is not served."""
    extra = dict(vllm_config.kv_transfer_config.kv_connector_extra_config)
    _check(vllm_config, extra)
    group, spec = _group(kv_cache_config)
    block = spec.block_size
    if block % PAGE and PAGE % block:
        raise Refused(f"blocks of {block} tokens are not served: start with --block-size {PAGE}")
    numbers = [compat.extract_layer_index(n) for n in group.layer_names]
    if len(set(numbers)) != len(numbers):
        raise Refused("a model with several attentions in a layer is not served")
    order = tuple(sorted(range(len(numbers)), key=numbers.__getitem__))
    m, p, c = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    codec = extra.get("codec", "int2")
    algorithm = c.prefix_caching_hash_algo
    facts = {
        "engine": "vllm", "hash": compat.hash_facts(algorithm), "hash_tokens": compat.hash_tokens(vllm_config, kv_cache_config) or block,
        "python": list(sys.version_info[:2]) if algorithm == "sha256" else None,  # it pickles what it hashes
        "weights": extra.get("weights") or weights_digest(m.model), "load": str(vllm_config.load_config.load_format),
        "seed": m.seed if str(vllm_config.load_config.load_format) == "dummy" else None, "quantization": m.quantization, "dtype": str(m.dtype),
        **_config_facts(m), "layers": [group.layer_names[i] for i in order], "chunk": max(block, PAGE), "tp_size": p.tensor_parallel_size,
        "codec": codec, "rotation_set": extra.get("rotation_set"),  # what is computed behind pages with losses is no other codec's
    }
    policy = Policy(lossy=codec not in _LOSSLESS, first=int(extra.get("first_exact_pages", 1)), last=int(extra.get("last_exact_pages", 4)))
    return Setup(layers=tuple(numbers[i] for i in order), order=order, kv_heads=spec.num_kv_heads, head_dim=spec.head_size, block_tokens=block,
                 chunk_tokens=max(block, PAGE), rank=p.rank, tp_size=p.tensor_parallel_size, codec=codec, policy=policy,
                 lease=float(extra.get("lease", 30.0)), restore=restore_seconds(extra, 0.5), extra=extra, facts=facts)


def chunk_size(extra: dict[str, Any], block: Optional[int]) -> None:
    """Tells vLLM to hand over whole pages, if its blocks are smaller."""
    if "block_size" in extra and extra["block_size"] != max(block or 0, PAGE):
        raise Refused("block_size in kv_connector_extra_config is kvd's to say: leave it out")
    extra["block_size"] = max(block or 0, PAGE)


__all__ = ["Setup", "chunk_size", "compat", "prepare"]
