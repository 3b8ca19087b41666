"""A worker's side of kvd, the shared KV-cache memory daemon.

Tensors are [layers, tokens, heads, head_dim], head_dim contiguous, in memory shared with the daemon.
"""
import pathlib
import re
from pkgutil import extend_path
from typing import Iterator

from ._client import Client, Event, Item, Plane, PlaneTokens, Sequence, SequenceInfo, Shape
from ._cuda import DeviceTensor
from ._direct import Direct
from ._library import (CorruptError, DeniedError, Error, ExhaustedError, ExistsError, InternalError, InvalidError,
                       LostError, NotFoundError, PreconditionError, TimeoutError, UnavailableError, version)
from ._prompts import Match, Prompt, Published
from ._queue import Ended, PageQueue
from .pages import Found, Paged, Pages
from ._tensor import Bf16Array, Tensor, from_bf16, to_bf16

__all__ = [
    "Bf16Array", "Client", "CorruptError", "DeniedError", "DeviceTensor", "Direct", "Ended", "Error", "Event", "ExhaustedError",
    "ExistsError", "Found", "InternalError", "InvalidError", "Item", "LostError", "Match", "NotFoundError", "PageQueue", "Paged", "Pages", "Plane", "PlaneTokens",
    "PreconditionError", "Prompt", "Published", "Sequence", "SequenceInfo",
    "Shape", "Tensor",
    "TimeoutError", "UnavailableError", "from_bf16", "to_bf16", "version",
]

__version__: str  # of this package; `version()` is libkvd's


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module 'kvd' has no attribute '{name}'")
    try:
        from ._version import VERSION  # of a wheel

        return VERSION
    except ImportError:
        pass
    header = pathlib.Path(__file__).resolve().parents[3] / "proto/kvd_limits.h"  # of a checkout
    found = re.search(r'#define KVD_VERSION "(.+)"', header.read_text()) if header.exists() else None
    return found[1] if found else version()  # of a Debian package, whose libkvd is of the same source


class _Path(list):
    """The package's folder, and folders named kvd elsewhere on the path: stubs that protoc makes of kvd/v1/*.proto are modules
    kvd.v1.*, and both are found, whichever comes first."""

    def __iter__(self) -> Iterator[str]:
        return iter(extend_path([*super().__iter__()], __name__))


__path__ = _Path(__path__)
