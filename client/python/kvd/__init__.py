"""A worker's side of kvd, the shared KV-cache memory daemon.

Tensors are [layers, tokens, heads, head_dim], head_dim contiguous, in memory shared with the daemon.
"""
from pkgutil import extend_path

from ._client import Client, Event, Item, Sequence, SequenceInfo
from ._cuda import DeviceTensor
from ._direct import Direct
from ._library import (CorruptError, DeniedError, Error, ExhaustedError, ExistsError, InternalError, InvalidError,
                       LostError, NotFoundError, PreconditionError, TimeoutError, UnavailableError, version)
from ._tensor import Bf16Array, Tensor, from_bf16, to_bf16

__all__ = [
    "Bf16Array", "Client", "CorruptError", "DeniedError", "DeviceTensor", "Direct", "Error", "Event", "ExhaustedError",
    "ExistsError", "InternalError", "InvalidError", "Item", "LostError", "NotFoundError", "PreconditionError", "Sequence", "SequenceInfo", "Tensor",
    "TimeoutError", "UnavailableError", "from_bf16", "to_bf16", "version",
]

# Stubs that protoc makes of kvd/v1/*.proto are modules kvd.v1.*: those on the path when this is imported are found too.
__path__ = extend_path(__path__, __name__)
