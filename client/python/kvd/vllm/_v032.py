"""vLLM 0.32: where its classes are, and what kvd does with what they keep to themselves."""
from __future__ import annotations

from typing import Any, Callable, Iterable, Optional

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

__all__ = ["CanonicalKVCaches", "Connector", "DEVICES", "FullAttentionSpec", "GPULoadStoreSpec", "KVConnectorRole", "LoadStoreSpec",
           "LookupResult", "OffloadingConnectorStats", "OffloadingCounterMetadata", "OffloadingManager", "OffloadingSpec",
           "OffloadingSpecFactory", "OffloadingWorker", "PrepareStoreOutput", "RequestOffloadingContext", "TransferResult",
           "UniformTypeKVCacheSpecs", "current_platform", "extract_layer_index", "hash_facts", "hash_tokens", "packed", "restart_stores",
           "write_cpu", "writer"]
DEVICES = ("cpu",)  # on which it has been run


def hash_facts(algorithm: str) -> dict[str, Any]:
    """What decides about block hashes, beside the tokens."""
    return {"algorithm": algorithm, "seed": resolve_none_hash_seed(get_hash_fn_by_name(algorithm))}


def hash_tokens(vllm_config: Any, kv_cache_config: Any) -> Optional[int]:
    """Tokens of a block hash; None: those of a block."""
    return kv_cache_config.hash_block_size  # type: ignore[no-any-return]


def packed(spec: Any) -> bool:
    """Whether blocks hold anything but K and V in their dtype, a head's tokens one by one."""
    return bool(spec.kv_quant_mode != 0 or spec.state_content_bytes is not None or spec.num_head_slots is not None or spec.tokens_per_state != 1)


class Connector(OffloadingConnector):  # type: ignore[misc]
    """vLLM's, and how it is told that loads failed: by the names of requests."""

    def failed_requests(self, connector_output: Any) -> Iterable[str]:
        return connector_output.failed_recving  # type: ignore[no-any-return]

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        jobs = dict(self.connector_worker._load_jobs)  # requests whose loads the worker has not reported yet
        sent, received = self.get_finished(finished_req_ids)
        failed = {jobs[j] for j in self.connector_worker.worker.take_failed()}
        return KVConnectorTransferResults(finished_sending=sent, finished_recving=received, failed_recving=failed)


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
    """A function that writes tokens into a cache of two blocks as the engine does."""
    return lambda k, v, two, slots: write_cpu(k, v, two, slots, "auto")
