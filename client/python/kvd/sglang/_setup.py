"""What SGLang was started with: the pages that it has, and the space that they belong to; or why kvd does not serve it."""
from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any, Callable

from ..engines import PAGE, Policy, Refused, restore_seconds, space, weights_digest

RELEASES = ("0.5.23",)
_LOSSLESS = ("bf16",)
_KEYS = {"address", "namespace", "codec", "rotation_set", "weights", "timeout", "lease", "restore", "first_exact_pages", "last_exact_pages"}


@dataclasses.dataclass(frozen=True)
class Setup:
    policy: Policy
    lease: float
    restore: float
    open: Callable[[str], Any]  # a kvd.Pages, by its name


def _check(args: Any, params: Any, pool: Any, components: Any, extra: dict[str, Any]) -> None:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    version = importlib.metadata.version("sglang")
    if version not in RELEASES:
        raise Refused(f"SGLang {version} has not been tested with kvd; {', '.join(RELEASES)} has been")
    unknown = sorted(set(extra) - _KEYS)
    if unknown:
        raise Refused(f"linker_extra_config has {', '.join(unknown)}, and {', '.join(sorted(_KEYS))} may be given")
    names = sorted(getattr(c, "name", str(c)) for c in components)
    if names != ["FULL"]:
        raise Refused(f"a model with {', '.join(names)} is not served: sliding windows and recurrent states are not")
    if type(pool) is not MHATokenToKVPool:
        raise Refused(f"KV in a {type(pool).__name__} is not served: latent (MLA), quantized and hybrid pools are not")
    if pool.kv_cache_layout != "nhd":
        raise Refused(f"KV in the layout {pool.kv_cache_layout} is not served, nhd is")
    if str(pool.store_dtype) != "torch.bfloat16" or str(pool.dtype) != "torch.bfloat16":
        raise Refused(f"KV in {pool.dtype} is not served: start with --dtype bfloat16 and --kv-cache-dtype auto")
    if pool.v_head_dim != pool.head_dim:
        raise Refused(f"heads of {pool.head_dim} for K and {pool.v_head_dim} for V are not served")
    if str(pool.device) != "cpu":
        raise Refused(f"SGLang on {pool.device} is not served yet, with --device cpu it is")
    if params.page_size != PAGE:
        raise Refused(f"pages of {params.page_size} tokens are not served: start with --page-size {PAGE}")
    for name in ("tp_size", "pp_size", "dp_size", "attn_cp_size"):
        if getattr(args, name) != 1:
            raise Refused(f"{name} above 1 is not served")
    if args.enable_lora or args.lora_paths:
        raise Refused("LoRA is not served: SGLang's keys do not tell what an adapter holds")
    if args.speculative_algorithm not in (None, "NGRAM"):
        raise Refused(f"speculative decoding by {args.speculative_algorithm} is not served: drafts have KV of their own")
    if not args.disable_overlap_schedule:
        raise Refused("start with --disable-overlap-schedule: pages are read when the step that computed them is over")


def prepare(args: Any, params: Any, components: Any, extra: dict[str, Any]) -> Setup:
    """Raises `Refused`, which names what is not served."""
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    _check(args, params, pool, components, extra)
    codec, rotation_set = extra.get("codec", "int2"), extra.get("rotation_set")
    facts = {
        "engine": "sglang", "hash": "sha256, SGLang " + importlib.metadata.version("sglang"), "page": params.page_size,
        "weights": extra.get("weights") or weights_digest(args.model_path), "overrides": args.json_model_override_args,
        "context": args.context_length, "quantization": args.quantization, "dtype": str(pool.dtype), "load": str(args.load_format),
        "seed": args.random_seed if str(args.load_format).endswith("dummy") else None, "first_layer": pool.start_layer, "codec": codec,
        "rotation_set": rotation_set,
    }
    policy = Policy(lossy=codec not in _LOSSLESS, first=int(extra.get("first_exact_pages", 1)), last=int(extra.get("last_exact_pages", 4)))
    more = {"timeout": 5.0, **{k: extra[k] for k in ("address", "namespace", "timeout") if k in extra}}

    def open_pages(name: str) -> Any:
        from .. import Pages

        return Pages(space=space(**facts), layers=range(pool.start_layer, pool.start_layer + pool.layer_num), kv_heads=pool.head_num,
                     head_dim=pool.head_dim, codec=codec, rotation_set=rotation_set, exact=policy.lossy, name=name, **more)

    return Setup(policy, float(extra.get("lease", 30.0)), restore_seconds(extra, 0.0), open_pages)
