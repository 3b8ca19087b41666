"""A worker's side of kvd, the shared KV-cache memory daemon.

Tensors are [layers, tokens, heads, head_dim], head_dim contiguous, in memory shared with the daemon.
"""
import numpy as np

from ._client import Client, Event, Item, Sequence, SequenceInfo, Tensor
from ._cuda import DeviceTensor
from ._direct import Direct
from ._library import (CorruptError, DeniedError, Error, ExhaustedError, ExistsError, InternalError, InvalidError,
                       LostError, NotFoundError, PreconditionError, TimeoutError, UnavailableError, version)

__all__ = [
    "Client", "CorruptError", "DeniedError", "DeviceTensor", "Direct", "Error", "Event", "ExhaustedError", "ExistsError", "InternalError",
    "InvalidError", "Item", "LostError", "NotFoundError", "PreconditionError", "Sequence", "SequenceInfo", "Tensor",
    "TimeoutError", "UnavailableError", "from_bf16", "to_bf16", "version",
]


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Floats as bf16 bits (uint16), rounded to nearest, ties to even. NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(np.shape(x))


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) as float32."""
    return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))
