"""vLLM 0.26: where its classes are, and what kvd does with what they keep to themselves."""
from __future__ import annotations

import os
from typing import Any, Callable, Iterable, Optional

import torch
from vllm import _custom_ops as ops
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_offload.base import (CanonicalKVCaches, GPULoadStoreSpec, LoadStoreSpec, LookupResult, OffloadingCounterMetadata,
                                     OffloadingManager, OffloadingSpec, OffloadingWorker, PrepareStoreOutput, RequestOffloadingContext,
                                     TransferResult)
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from ..engines import Refused

__all__ = ["CanonicalKVCaches", "Connector", "DEVICES", "FullAttentionSpec", "GPULoadStoreSpec", "KVConnectorRole", "LoadStoreSpec",
           "LookupResult", "OffloadingConnectorStats", "OffloadingCounterMetadata", "OffloadingManager", "OffloadingSpec",
           "OffloadingSpecFactory", "OffloadingWorker", "PrepareStoreOutput", "RequestOffloadingContext", "TransferResult",
           "UniformTypeKVCacheSpecs", "current_platform", "extract_layer_index", "hash_facts", "hash_tokens", "packed", "restart_stores",
           "write_cpu", "writer"]
DEVICES = ("cpu", "cuda")  # on which it has been run


def hash_facts(algorithm: str) -> dict[str, Any]:
    """What decides about block hashes, beside the tokens. This release begins each process's hashes with random bytes of its own, unless
    it is given a seed."""
    seed = os.environ.get("PYTHONHASHSEED")
    if seed is None:
        raise Refused("this release of vLLM names blocks anew in each process unless PYTHONHASHSEED is set: start it with PYTHONHASHSEED=0, "
                      "and all that are to share with the same number")
    return {"algorithm": algorithm, "seed": seed}


def hash_tokens(vllm_config: Any, kv_cache_config: Any) -> Optional[int]:
    """Tokens of a block hash; None: those of a block."""
    return resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)[1]  # type: ignore[no-any-return]


def packed(spec: Any) -> bool:
    """Whether blocks hold anything but K and V in their dtype, a head's tokens one by one."""
    return bool(spec.kv_quant_mode != 0 or spec.page_size_padded is not None)


class Connector(OffloadingConnector):  # type: ignore[misc]
    """vLLM's, and how it is told that loads failed: by the numbers of blocks, which are those of one request each."""

    prefer_cross_layer_blocks = False  # a tensor for each layer

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        self._targets: dict[str, set[int]] = {}  # blocks that requests wait for
        super().__init__(vllm_config, role, kv_cache_config)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if num_external_tokens:
            self._targets[request.request_id] = {b.block_id for group in blocks.blocks for b in group}

    def failed_requests(self, connector_output: Any) -> Iterable[str]:
        failed = [r for r, blocks in self._targets.items() if not blocks.isdisjoint(connector_output.invalid_block_ids)]
        for r in connector_output.finished_recving or ():
            self._targets.pop(r, None)
        return failed

    def get_block_ids_with_load_errors(self) -> set[int]:
        return {int(b) for blocks in self.connector_worker.worker.take_failed().values() for b in blocks}


def restart_stores(connector: Any, requests: Iterable[str]) -> None:
    """After a load that failed all of a request's chunks are computed, and may be stored."""
    for r in requests:
        status = connector.connector_scheduler._req_status.get(r)
        for group in status.group_states if status else ():
            group.next_stored_chunk_idx = 0


def write_cpu(k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, dtype: str) -> None:
    """Writes tokens into a cache [blocks, heads, tokens, 2 * dim] as the CPU's attention does."""
    blocks, heads, tokens, width = cache.shape
    isa = _get_attn_isa(cache.dtype, tokens, width // 2, dtype)
    key, value = cache.view(blocks, heads, 2 * tokens, width // 2).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(k, v, key, value, slots, isa)


def writer(vllm_config: Any, name: str, cache: torch.Tensor, blocks: torch.Tensor) -> Callable[..., None]:
    """A function that writes tokens into a cache of two blocks as the engine does: the attention of layer `name` writes them into the
    first two of the layer's own blocks, `blocks` in bytes and `cache` as it sees them, from where they are copied. At start, when
    nothing is there yet."""
    layer = vllm_config.compilation_config.static_forward_context[name]
    if not hasattr(layer.impl, "do_kv_cache_update"):
        raise Refused(f"the attention backend {layer.impl.__class__.__name__} is not served: it does not write K and V by a call of its own")

    def write(k: torch.Tensor, v: torch.Tensor, two: torch.Tensor, slots: torch.Tensor) -> None:
        blocks[:2].zero_()
        layer.impl.do_kv_cache_update(layer, k.to(cache.device), v.to(cache.device), cache, slots.to(cache.device))
        two.copy_(blocks[:2].view(torch.bfloat16).view(two.shape))
        blocks[:2].zero_()

    return write
