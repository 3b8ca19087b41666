"""kvd beside SGLang: prefixes that one SGLang computed are loaded by others, and by the same one later.

python -m sglang.launch_server --model-path MODEL --page-size 64 --enable-unified-cache-external-linker \\
    --unified-cache-external-linker-backend dynamic \\
    --unified-cache-external-linker-config '{"linker": "KvdLinker", "linker_module_path": "kvd.sglang"}'
"""
from typing import Any

__all__ = ["KvdLinker"]


def __getattr__(name: str) -> Any:
    if name == "KvdLinker":
        from .linker import KvdLinker

        return KvdLinker
    raise AttributeError(f"module 'kvd.sglang' has no attribute '{name}'")
