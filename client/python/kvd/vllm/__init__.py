"""kvd beside vLLM: prefixes that one vLLM computed are loaded by others, and by the same one later.

vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvdConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'
"""
from typing import Any

__all__ = ["KvdConnector", "KvdOffloadingSpec", "register"]


def register() -> None:
    """Entry point vllm.general_plugins: vLLM calls it in each of its processes. It only tells names, and imports nothing of vLLM that
    a server without kvd would not."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "KvdConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("KvdConnector", "kvd.vllm.connector", "KvdConnector")


def __getattr__(name: str) -> Any:
    if name in ("KvdConnector", "KvdOffloadingSpec"):
        from . import connector

        return getattr(connector, name)
    raise AttributeError(f"module 'kvd.vllm' has no attribute '{name}'")
