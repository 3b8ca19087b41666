"""Direct mode: attention by libkvd's kernels in this process, over pages mapped from the daemon."""
from __future__ import annotations

import ctypes as c
from typing import Any, Literal, Optional, Sequence as Seq

import numpy as np

from . import _library as lib
from ._client import Client, Sequence
from ._cuda import view


def _pointer(what: str, x: Any, elements: int, sizes: tuple[int, ...], on_gpu: bool) -> int:
    """Address of a dense array of so many elements: NumPy's or PyTorch's on the CPU, PyTorch's or CuPy's on a GPU."""
    if isinstance(x, np.ndarray):
        size, count, dense, at, there = x.itemsize, x.size, x.flags.c_contiguous, x.ctypes.data, False
    elif hasattr(x, "data_ptr") or hasattr(x, "__cuda_array_interface__"):
        v = view(x)
        step, dense = v.itemsize, True
        for n, s in zip(reversed(v.shape), reversed(v.strides)):
            dense, step = dense and (s == step or n == 1), step * n
        size, count, at, there = v.itemsize, step // v.itemsize, v.address, v.on_gpu
    else:
        raise TypeError(f"{what}: a NumPy array, a PyTorch tensor or a CuPy array is wanted")
    if there != on_gpu:
        raise ValueError(f"{what} is in {'the GPU' if there else 'host'} memory, and kvd runs on {'a GPU' if on_gpu else 'the CPU'}")
    if count != elements or size not in sizes or not dense or at % 16:
        raise ValueError(f"{what}: {elements} elements of {' or '.join(map(str, sizes))} bytes are wanted, dense and at an "
                         f"address that 16 divides; there are {count} of {size}")
    return at


class Direct:
    """Some slots that are decoded together, each bound to a sequence or empty. A context manager; one to a client.

    A step: `begin`; for each layer `store` and `attend`; `end`. New tokens go to the daemon in the background, 16 at a time;
    `flush` and `bind` bring what is left. Arrays are dense, [slots, step_tokens, heads, head_dim], bf16 for k and v and of
    `dtype` for q and o: in this process's memory if the daemon runs on the CPU, on the GPU if it does. There, calls queue
    work on `stream` (a cudaStream_t as an integer, such as PyTorch's stream.cuda_stream) and can be captured in a graph.
    """

    def __init__(self, client: Client, *, slots: int, max_tokens: int, step_tokens: int = 1,
                 dtype: Literal["bf16", "f32"] = "f32", scale: float = 0, softcap: float = 0, window: int = 0):
        self.slots, self.step_tokens = slots, step_tokens
        self._size = {"bf16": 2, "f32": 4}[dtype]
        self._client, self._on_gpu = client, client.on_gpu
        self._handle = c.c_void_p()
        options = lib.DirectOptions(slots, max_tokens, step_tokens, lib.Attention(scale, softcap, window),
                                    lib.KVD_BF16 if dtype == "bf16" else lib.KVD_F32)
        lib.call("kvd_direct_open", client._open(), c.byref(options), c.byref(self._handle))
        self._bound: list[Optional[Sequence]] = [None] * slots
        client._directs.add(self)

    def _open(self) -> c.c_void_p:
        if not self._handle:
            raise ValueError("direct mode was closed")
        return self._handle

    def close(self) -> None:
        """Brings what is left to the daemon."""
        handle, self._handle = self._handle, c.c_void_p()
        if handle:
            self._client._directs.discard(self)
            lib.library().kvd_direct_close(c.byref(handle))

    def __enter__(self) -> "Direct":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def bind(self, slot: int, sequence: Optional[Sequence]) -> None:
        """Puts a sequence into a slot, or None to empty it. While it is there, only this object may append to it."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} of {self.slots}")
        lib.call("kvd_direct_bind", self._open(), slot, sequence.id if sequence else 0)
        self._bound[slot] = sequence

    def sequence(self, slot: int) -> Optional[Sequence]:
        """What is bound there."""
        return self._bound[slot]

    def begin(self, stream: int = 0) -> None:
        """Starts a step: every bound slot gets `step_tokens` more positions. Waits only if the daemon is 64 tokens behind."""
        lib.call("kvd_direct_begin", self._open(), stream)

    def store(self, layer: int, k: Any, v: Any, stream: int = 0) -> None:
        """Stores K and V of the step's tokens of a layer."""
        rows, dims, gpu = self.slots * self.step_tokens * self._client.kv_heads, self._client.head_dim, self._on_gpu
        lib.call("kvd_store_enqueue", self._open(), stream, layer, _pointer("k", k, rows * dims[0], (2,), gpu),
                 _pointer("v", v, rows * dims[1], (2,), gpu))

    def attend(self, layer: int, q: Any, o: Any, lse: Any = None, stream: int = 0) -> None:
        """o = attention of the step's queries over all tokens. What empty slots get means nothing."""
        rows, dims, size = self.slots * self.step_tokens * self._client.q_heads, self._client.head_dim, (self._size,)
        gpu = self._on_gpu
        lib.call("kvd_attend_enqueue", self._open(), stream, layer, _pointer("q", q, rows * dims[0], size, gpu),
                 _pointer("o", o, rows * dims[1], size, gpu), _pointer("lse", lse, rows, (4,), gpu) if lse is not None else None)

    def end(self, tokens: Optional[Seq[int]] = None, stream: int = 0) -> None:
        """Ends a step. tokens: how many of each slot's new ones stay; None: all."""
        if tokens is not None and len(tokens) != self.slots:
            raise ValueError(f"tokens has {len(tokens)} numbers, there are {self.slots} slots")
        kept = (c.c_uint32 * self.slots)(*tokens) if tokens is not None else None
        lib.call("kvd_direct_end", self._open(), stream, kept)
        for slot, sequence in enumerate(self._bound):
            if sequence:
                sequence.length += self.step_tokens if tokens is None else tokens[slot]

    def flush(self) -> None:
        """Waits until the daemon has every token of every slot."""
        lib.call("kvd_direct_flush", self._open())
