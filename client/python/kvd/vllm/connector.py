"""KvdConnector: vLLM's OffloadingConnector, with kvd as the place that pages go to.

vLLM's scheduler does what it does for any offloading: it finds the chunks of a prompt, waits for loads, guards the blocks of stores
that are under way, flushes at preemption. What is added here: failed loads are computed instead of being an error, requests are told
apart by more than their tokens, and each side's numbers are in vLLM's metrics.
"""
from __future__ import annotations

import contextvars
from typing import Any, Optional

from ._manager import METRICS, KvdManager
from ._setup import Setup, chunk_size, compat, prepare
from ._worker import KvdWorker

_setup: "contextvars.ContextVar[Setup]" = contextvars.ContextVar("kvd_setup")  # from the connector to the spec that vLLM makes meanwhile
_SPEC = "KvdOffloadingSpec"
_REST = 0.001  # seconds


class KvdOffloadingSpec(compat.OffloadingSpec):  # type: ignore[name-defined,misc]
    def __init__(self, config: Any):
        super().__init__(config)
        self.setup = _setup.get()
        self._manager: Optional[KvdManager] = None
        self._worker: Optional[KvdWorker] = None
        self.engine: Optional[tuple[Any, dict[str, Any]]] = None  # its config and its layers' caches, once they are there

    def get_manager(self) -> KvdManager:
        if self._manager is None:
            self._manager = KvdManager(self.setup, self.setup.chunk_tokens // self.tokens_per_hash)
        return self._manager

    def get_worker(self, kv_caches: Any) -> KvdWorker:
        if self._worker is None:
            self._worker = KvdWorker(self.setup, kv_caches, engine=self.engine)
        return self._worker

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        return {f"vllm:kvd_{name}": compat.OffloadingCounterMetadata(documentation=text) for name, text in METRICS.items()}


if _SPEC not in compat.OffloadingSpecFactory._registry:
    compat.OffloadingSpecFactory.register_spec(_SPEC, __name__, _SPEC)


def _with_spec(vllm_config: Any) -> None:
    vllm_config.kv_transfer_config.kv_connector_extra_config["spec_name"] = _SPEC


class KvdConnector(compat.Connector):  # type: ignore[name-defined,misc]
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any):
        self._computes = False
        setup = prepare(vllm_config, kv_cache_config)
        _with_spec(vllm_config)
        chunk_size(vllm_config.kv_transfer_config.kv_connector_extra_config, setup.block_tokens)
        token = _setup.set(setup)
        try:
            super().__init__(vllm_config, role, kv_cache_config)
        finally:
            _setup.reset(token)

    # A step that computes nothing waits a little for what is moved: vLLM would begin the next one at once, and again.

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._computes = False
        super().start_load_kv(forward_context, **kwargs)

    def wait_for_save(self) -> None:
        self._computes = True
        super().wait_for_save()

    def get_finished(self, finished_req_ids: set[str]) -> Any:
        if not self._computes:
            self.connector_worker.worker.rest(_REST)
        return super().get_finished(finished_req_ids)

    def register_kv_caches(self, kv_caches: Any) -> None:
        self.connector_worker.spec.engine = (self._vllm_config, kv_caches)
        super().register_kv_caches(kv_caches)

    @property
    def _manager(self) -> KvdManager:
        return self.connector_scheduler.manager  # type: ignore[no-any-return]

    def on_new_request(self, request: Any) -> None:
        self._manager.admit(request)
        super().on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[Optional[int], bool]:
        self._manager.sweep(request.request_id, num_computed_tokens)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)
        failed = self.failed_requests(connector_output)
        if failed:
            self._manager.failed(failed)
            compat.restart_stores(self, failed)

    def get_kv_connector_stats(self) -> Any:
        if self.connector_worker is not None and self.connector_worker.worker is not None:
            return self.connector_worker.worker.get_stats()
        return super().get_kv_connector_stats()

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        _with_spec(vllm_config)
        return super().build_prom_metrics(vllm_config, *args, **kwargs)


__all__ = ["KvdConnector", "KvdOffloadingSpec"]
