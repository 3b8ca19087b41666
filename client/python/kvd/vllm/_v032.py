"""vLLM 0.32: where its classes are, and what kvd does with what they keep to themselves."""
from __future__ import annotations

from typing import Any, Iterable

import torch
from vllm import _custom_ops as ops
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_offload.base import (CanonicalKVCaches, GPULoadStoreSpec, LoadStoreSpec, LookupResult, OffloadingCounterMetadata,
                                     OffloadingManager, OffloadingSpec, OffloadingWorker, PrepareStoreOutput, RequestOffloadingContext,
                                     TransferResult)
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

__all__ = ["CanonicalKVCaches", "FullAttentionSpec", "GPULoadStoreSpec", "KVConnectorRole", "KVConnectorTransferResults", "LoadStoreSpec",
           "LookupResult", "OffloadingConnector", "OffloadingConnectorStats", "OffloadingCounterMetadata", "OffloadingManager", "OffloadingSpec",
           "OffloadingSpecFactory", "OffloadingWorker", "PrepareStoreOutput", "RequestOffloadingContext", "TransferResult",
           "UniformTypeKVCacheSpecs", "current_platform", "extract_layer_index", "hash_facts", "loading", "restart_stores", "write_cpu"]


def hash_facts(algorithm: str) -> dict[str, Any]:
    """What decides about block hashes, beside the tokens."""
    return {"algorithm": algorithm, "seed": resolve_none_hash_seed(get_hash_fn_by_name(algorithm))}


def loading(connector: Any) -> dict[int, str]:
    """Requests whose loads the worker has not reported yet, by job."""
    return dict(connector.connector_worker._load_jobs)


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
