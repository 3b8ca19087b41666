"""Direct mode: attention by libkvd's kernels in this process, over pages mapped from the daemon."""
from __future__ import annotations

import ctypes as c
import math
from typing import Any, Literal, Optional, Sequence as Seq

import numpy as np

from . import _check
from . import _library as lib
from ._client import Client, Sequence
from ._cuda import DeviceTensor, View, view
from ._tensor import Tensor

_KINDS = {"<u2": "bf16", "<f4": "f32"}  # of NumPy's dtypes: uint16 holds bf16


def _pointer(what: str, x: Any, shape: tuple[int, ...], names: tuple[str, ...], kind: str, *, on_gpu: bool,
             written: bool) -> tuple[int, int]:
    """Address and bytes of a dense array: NumPy's or PyTorch's on the CPU, PyTorch's or CuPy's on a GPU. Of its dimensions the last are
    those of `shape` but for the first two, slots and tokens, which may come as any that hold as many rows."""
    if isinstance(x, (Tensor, DeviceTensor)):
        x = x.array
    if isinstance(x, np.ndarray):
        v = View(x.ctypes.data, x.shape, x.strides, x.itemsize, _KINDS.get(x.dtype.str, str(x.dtype)), False)
        if written and not x.flags.writeable:
            raise lib.InvalidError(f"{what} is read-only")
    elif hasattr(x, "data_ptr") or hasattr(x, "__cuda_array_interface__"):
        v = view(x)
    else:
        raise TypeError(f"{what} is a {_check.describe(x)}: a NumPy array, a PyTorch tensor or a CuPy array is wanted")
    if v.on_gpu != on_gpu:
        raise lib.InvalidError(f"{what} is in {'the GPU' if v.on_gpu else 'host'} memory, and kvd runs on "
                               f"{'a GPU' if on_gpu else 'the CPU'}")
    last = shape[2:]
    if v.shape[-len(last):] != last or math.prod(v.shape[:-len(last)]) != shape[0] * shape[1]:
        raise lib.InvalidError(f"{what} is {_check.dims(v.shape)}, and {_check.dims(shape)} is wanted: {_check.dims(names)}")
    if v.kind != kind:
        raise lib.InvalidError(f"{what} is {v.kind}, and {kind} is wanted")
    step = v.itemsize
    for n, stride in zip(reversed(v.shape), reversed(v.strides)):
        if n > 1 and stride != step:
            raise lib.InvalidError(f"{what} is not dense: make it contiguous")
        step *= n
    if v.address % 16:
        raise lib.InvalidError(f"{what} is at address {v.address:#x}, which 16 does not divide")
    return v.address, math.prod(v.shape) * v.itemsize


class Direct(lib.OfProcess):
    """Some slots that are decoded together, each bound to a sequence or empty. A context manager; one to a client.

    A step: `begin`; for each layer `store` and `attend`; `end`. New tokens go to the daemon in the background, 16 at a time;
    `flush` and `bind` bring what is left. Arrays are dense, [slots, step_tokens, heads, head_dim], bf16 for k and v and of
    `dtype` for q and o: in this process's memory if the daemon runs on the CPU, on the GPU if it does. There, calls queue
    work on `stream` (a cudaStream_t as an integer, such as PyTorch's stream.cuda_stream) and can be captured in a graph.

    `tail_tokens` (64 to 16,384) is how far the daemon may be behind before a step waits for it: steps go on for so
    many tokens while it is away.
    """

    def __init__(self, client: Client, *, slots: int, max_tokens: int, step_tokens: int = 1,
                 tail_tokens: int = 64, dtype: Literal["bf16", "f32"] = "f32", scale: float = 0, softcap: float = 0,
                 window: int = 0):
        super().__init__()
        if not isinstance(client, Client):
            raise TypeError(f"client is a {_check.describe(client)}, and a kvd.Client is wanted")
        self.slots, self.step_tokens = _check.integer("slots", slots, 1), _check.integer("step_tokens", step_tokens, 1)
        self._dtype = _check.choice("dtype", dtype, "bf16", "f32")
        self._client, self._on_gpu = client, client.on_gpu
        self._handle = c.c_void_p()
        options = lib.DirectOptions(self.slots, _check.integer("max_tokens", max_tokens, 1), self.step_tokens,
                                    lib.KVD_BF16 if dtype == "bf16" else lib.KVD_F32,
                                    c.pointer(_check.attention(scale, softcap, window)),
                                    _check.integer("tail_tokens", tail_tokens, 64))
        lib.call("kvd_direct_open", client._open(), c.byref(options), c.byref(self._handle))
        self._bound: list[Optional[Sequence]] = [None] * self.slots
        client._dependents.add(self)

    def _open(self) -> c.c_void_p:
        self._check_process()
        if not self._handle:
            raise lib.InvalidError("direct mode was closed")
        return self._handle

    def _array(self, name: str, x: Any) -> tuple[int, int]:
        names, sizes = self._client._rows(0)[name]
        kind = "bf16" if name in "kv" else "f32" if name == "lse" else self._dtype
        return _pointer(name, x, (self.slots, self.step_tokens, *sizes), ("slots", "step_tokens", *names), kind, on_gpu=self._on_gpu,
                        written=name in ("o", "lse"))

    def close(self) -> None:
        """Brings what is left to the daemon. In a forked child this does nothing."""
        if self._forked():
            return
        handle, self._handle = self._handle, c.c_void_p()
        if handle:
            self._client._dependents.discard(self)
            lib.library().kvd_direct_close(c.byref(handle))

    def __repr__(self) -> str:
        bound = sum(s is not None for s in self._bound)
        return f"<kvd.Direct {self.slots} slots, {bound} bound{'' if self._handle else ', closed'}>"

    def __enter__(self) -> "Direct":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def bind(self, slot: int, sequence: Optional[Sequence]) -> None:
        """Puts a sequence into a slot, or None to empty it. While it is there, only this object may append to it."""
        slot = _check.integer("slot", slot, 0, self.slots - 1)
        if sequence is not None:
            _check.sequence("sequence", sequence, self._client, Sequence)
        lib.call("kvd_direct_bind", self._open(), slot, sequence.id if sequence else 0)
        self._bound[slot] = sequence

    def sequence(self, slot: int) -> Optional[Sequence]:
        """What is bound there."""
        return self._bound[_check.integer("slot", slot, 0, self.slots - 1)]

    def begin(self, stream: int = 0) -> None:
        """Starts a step: every bound slot gets `step_tokens` more positions. Waits only if the daemon is `tail_tokens` behind."""
        lib.call("kvd_direct_begin", self._open(), _stream(stream))

    def store(self, layer: int, k: Any, v: Any, stream: int = 0) -> None:
        """Stores K and V of the step's tokens of a layer."""
        lib.call("kvd_store_enqueue", self._open(), _stream(stream), _check.integer("layer", layer), *self._array("k", k),
                 *self._array("v", v))

    def attend(self, layer: int, q: Any, o: Any, lse: Any = None, stream: int = 0) -> None:
        """o = attention of the step's queries over all tokens. What empty slots get means nothing."""
        lib.call("kvd_attend_enqueue", self._open(), _stream(stream), _check.integer("layer", layer), *self._array("q", q),
                 *self._array("o", o), *(self._array("lse", lse) if lse is not None else (None, 0)))

    def end(self, tokens: Optional[Seq[int]] = None, stream: int = 0) -> None:
        """Ends a step. tokens: how many of each slot's new ones stay; None: all."""
        kept = None
        if tokens is not None:
            kept = [_check.integer(f"tokens[{i}]", n, 0, self.step_tokens) for i, n in enumerate(tokens)]
            if len(kept) != self.slots:
                raise lib.InvalidError(f"tokens has {len(kept)} numbers, there are {self.slots} slots")
        lib.call("kvd_direct_end", self._open(), _stream(stream), (c.c_uint32 * self.slots)(*kept) if kept is not None else None)
        for slot, sequence in enumerate(self._bound):
            if sequence:
                sequence.length += self.step_tokens if kept is None else kept[slot]

    def flush(self) -> None:
        """Waits until the daemon has every token of every slot."""
        lib.call("kvd_direct_flush", self._open())


def _stream(stream: Any) -> int:
    return _check.integer("stream", stream, 0, _check.U64)
