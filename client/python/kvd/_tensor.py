"""Tensors in memory shared with the daemon, and bf16, which NumPy does not have."""
from __future__ import annotations

import ctypes as c
import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _check
from . import _library as lib

if TYPE_CHECKING:
    from ._client import Client


def to_bf16(x: Any) -> np.ndarray:
    """Floats as bf16 bits (uint16), rounded to nearest, ties to even. NaN stays NaN."""
    x = np.asarray(x)
    if x.dtype.kind not in "fiu" or x.dtype == np.uint16:
        raise TypeError(f"numbers to be rounded to bf16 are wanted, not {x.dtype}"
                        + (", which holds bf16 bits already" if x.dtype == np.uint16 else ""))
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(np.shape(x))


def from_bf16(bits: Any) -> np.ndarray:
    """bf16 bits (uint16) as float32."""
    bits = np.asarray(bits)
    if bits.dtype != np.uint16:
        raise TypeError(f"bf16 bits are uint16, not {bits.dtype}")
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))


class Bf16Array(np.ndarray):
    """bf16 bits in an array of uint16. Floats assigned to it are rounded to bf16; uint16 is taken as bits.

    NumPy would compute with the bits as if they were integers: only comparing and bit operations are let through. `floats()`
    and `astype` give the numbers.
    """

    def floats(self) -> np.ndarray:
        """A copy as float32."""
        return from_bf16(self)

    def __setitem__(self, index: Any, x: Any) -> None:
        x = np.asarray(x)
        if x.dtype != np.uint16:
            if x.dtype.kind != "f" and np.any(x):
                raise TypeError(f"{x.dtype} into bf16: give floats, or the bits as uint16 (kvd.to_bf16)")
            x = to_bf16(x)
        self.view(np.ndarray)[index] = x

    def fill(self, x: Any) -> None:
        self[...] = x

    def view(self, *args: Any, **kwargs: Any) -> np.ndarray:  # type: ignore[override]
        """Of the bits: a plain array."""
        plain = super().view(np.ndarray)
        return plain.view(*args, **kwargs) if args or kwargs else plain

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> np.ndarray:  # type: ignore[override]
        """To a float type: the numbers. To uint16: the bits."""
        if np.dtype(dtype).kind == "f":
            return self.floats().astype(dtype, *args, **kwargs)
        if np.dtype(dtype) != np.uint16:
            raise TypeError(f"bf16 to {np.dtype(dtype)}: say floats() for the numbers, view() for the bits")
        return self.view().astype(dtype, *args, **kwargs)

    _BITS = {np.equal, np.not_equal, np.logical_and, np.logical_or, np.logical_not, np.bitwise_and, np.bitwise_or, np.bitwise_xor,
             np.invert, np.left_shift, np.right_shift}

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        operands = [*inputs, *kwargs.get("out", ())]
        numbers = any(not isinstance(x, Bf16Array) and np.asarray(x).dtype.kind == "f" for x in operands)
        if ufunc not in self._BITS or numbers:
            raise TypeError(f"{ufunc.__name__} of bf16 bits: compute with array.floats(), and assign what comes out")
        plain = [x.view() if isinstance(x, Bf16Array) else x for x in inputs]
        if "out" in kwargs:
            kwargs["out"] = tuple(x.view() if isinstance(x, Bf16Array) else x for x in kwargs["out"])
        return getattr(ufunc, method)(*plain, **kwargs)

    def __eq__(self, x: Any) -> Any:  # type: ignore[override]
        return np.equal(self, x)  # ndarray's own may swallow what is raised

    def __ne__(self, x: Any) -> Any:  # type: ignore[override]
        return np.not_equal(self, x)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Bf16Array({np.array2string(self.floats(), separator=', ', prefix='Bf16Array(')})"

    def __str__(self) -> str:
        return str(self.floats())

    def __format__(self, spec: str) -> str:
        return format(self.floats()[()], spec)


class Tensor(lib.OfProcess):
    """[layers, tokens, heads, head_dim] (an lse: [layers, tokens, heads]) in memory shared with the daemon.

    `array` is a NumPy view of it: float32, or a `Bf16Array`, which rounds the floats that are assigned to it. Slices of a
    tensor are tensors over the same memory. The daemon shares the memory until `free()`, the end of the client, or until no
    tensor and no array of it are left; arrays stay what they are.
    """

    def __init__(self, owner: "Buffer", array: np.ndarray):
        super().__init__()
        self._owner = owner
        self._array = array

    @property
    def array(self) -> np.ndarray:
        self._check_process()
        if not self._owner.handle:
            raise lib.InvalidError("the tensor was freed, or its client closed")
        return self._array

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> str:
        """"bf16" or "f32"."""
        return "bf16" if self._array.dtype == np.uint16 else "f32"

    def __getitem__(self, index: Any) -> "Tensor":
        view = self.array[index]
        if not isinstance(view, np.ndarray) or view.ndim != self._array.ndim or not np.may_share_memory(view, self._array):
            raise IndexError("a slice of a tensor keeps all dimensions: say t[2:3], not t[2]")
        return Tensor(self._owner, view)

    def __setitem__(self, index: Any, x: Any) -> None:
        self.array[index] = x

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError("a Tensor is no array: say tensor.array, and for bf16 tensor.array.floats()")

    def __repr__(self) -> str:
        state = "" if self._owner.handle else ", freed"
        return f"<kvd.Tensor {self.dtype} {_check.dims(self.shape)}{state}>"

    def free(self) -> None:
        """Ends the sharing, for all slices too. Arrays keep the memory."""
        self._owner.free()

    def _facts(self) -> _check.Facts:
        a, o = self._array, self._owner
        return _check.Facts(o, o.client, a.__array_interface__["data"][0], a.shape, a.strides, a.itemsize, self.dtype)


class Buffer:
    """A kvd_buffer. Its memory lives as long as an array over it, whatever becomes of the client."""

    def __init__(self, client: "Client", size: int):
        self.handle = c.c_void_p()
        lib.call("kvd_buffer_new", client._open(), size, c.byref(self.handle))
        self.address, self.size = lib.library().kvd_buffer_data(self.handle), size
        self.client = client
        client._buffers.add(self)

    def memory(self) -> Any:
        """Once: what arrays are views of."""
        memory = (c.c_uint8 * self.size).from_address(self.address)
        weakref.finalize(memory, self._unused).atexit = False
        return memory

    def _unused(self) -> None:
        self.free()
        lib.unmap(self.address, self.size)

    def free(self) -> None:
        """Unregisters it. Any thread: the last array may go anywhere. Not in a forked child, where it is the parent's."""
        if self.client._forked():
            return
        with self.client._lock:
            self.client._buffers.discard(self)
            handle, self.handle = self.handle, c.c_void_p()
            if handle:
                lib.library().kvd_buffer_detach(c.byref(handle))


def new_tensor(client: "Client", shape: tuple[int, ...], dtype: str) -> Tensor:
    sizes = tuple(_check.integer(f"shape[{i}]", n, 1, 1 << 40) for i, n in enumerate(shape))
    if len(sizes) not in (3, 4):
        raise lib.InvalidError(f"a tensor of shape {_check.dims(sizes)}: it is [layers, tokens, heads, head_dim], an lse "
                               "[layers, tokens, heads]")
    kind = np.dtype(np.uint16 if _check.choice("dtype", dtype, "bf16", "f32") == "bf16" else np.float32)
    buffer = Buffer(client, _check.integer("the tensor's size", math.prod(sizes) * kind.itemsize, 1, 1 << 47))
    array = np.frombuffer(buffer.memory(), kind).reshape(sizes)
    return Tensor(buffer, array.view(Bf16Array) if kind == np.uint16 else array)
