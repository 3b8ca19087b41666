"""Tensors in a GPU's memory: PyTorch's and CuPy's, as they are, without a copy."""
from __future__ import annotations

import ctypes as c
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _check
from . import _library as lib

if TYPE_CHECKING:
    from ._client import Client


class View(NamedTuple):
    """What a foreign array says of itself. Strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    kind: str  # "bf16", "f32" or the name of another dtype
    on_gpu: bool


def view(x: Any) -> View:
    """Of a PyTorch tensor, or of whatever has __cuda_array_interface__ (uint16 there holds bf16)."""
    if hasattr(x, "data_ptr"):
        size = x.element_size()
        kind = {"torch.bfloat16": "bf16", "torch.float32": "f32"}.get(str(x.dtype), str(x.dtype))
        return View(x.data_ptr(), tuple(x.shape), tuple(s * size for s in x.stride()), size, kind, x.is_cuda)
    if hasattr(x, "__cuda_array_interface__"):
        i = x.__cuda_array_interface__
        size, shape = int(i["typestr"][2:]), tuple(i["shape"])
        strides = i.get("strides")
        if strides is None:
            strides, step = (), size
            for n in reversed(shape):
                strides, step = (step, *strides), step * n
        kind = {"u2": "bf16", "f4": "f32"}.get(i["typestr"][1:], i["typestr"])
        return View(i["data"][0], shape, tuple(strides), size, kind, True)
    raise TypeError(f"a PyTorch tensor or a CuPy array is wanted, not {type(x).__name__}")


class _DeviceBuffer:
    """A kvd_buffer over memory that `owner` keeps."""

    def __init__(self, client: "Client", address: int, size: int, owner: Any):
        self.handle, self.address, self.size, self.owner, self.client = c.c_void_p(), address, size, owner, client
        lib.call("kvd_buffer_cuda", client._open(), address, size, c.byref(self.handle))
        client._buffers.add(self)

    def free(self) -> None:
        if self.client._forked():
            return
        with self.client._lock:
            self.client._buffers.discard(self)
            handle, self.handle = self.handle, c.c_void_p()
            if handle:
                lib.library().kvd_buffer_free(c.byref(handle))
        self.owner = None


class DeviceTensor(lib.OfProcess):
    """[layers, tokens, heads, head_dim] (an lse: [layers, tokens, heads]) of the GPU, for calls as a `Tensor` is.

    Made by `Client.share`. `array` is what was shared: kvd reads and writes its memory. It is kept until `free()` or the end of
    the client. A call that waits (`Client.step` and the others) wants the work on it to have finished: synchronize its stream
    before; `Client.enqueue` takes its turn on the stream instead.
    """

    def __init__(self, buffer: _DeviceBuffer, array: Any):
        super().__init__()
        self._buffer, self.array = buffer, array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def __getitem__(self, index: Any) -> "DeviceTensor":
        part = self.array[index]
        if len(part.shape) != len(self.array.shape):
            raise IndexError("a slice of a tensor keeps all dimensions: say t[2:3], not t[2]")
        return DeviceTensor(self._buffer, part)

    def free(self) -> None:
        """Ends the sharing, for all slices too. Calls that use it must have returned, enqueued ones too."""
        self._buffer.free()

    def _facts(self) -> _check.Facts:
        v, b = view(self.array), self._buffer
        return _check.Facts(b, b.client, v.address, v.shape, v.strides, v.itemsize, v.kind)

    def __repr__(self) -> str:
        v = view(self.array)
        return f"<kvd.DeviceTensor {v.kind} {_check.dims(v.shape)}{'' if self._buffer.handle else ', freed'}>"


def share(client: "Client", x: Any) -> DeviceTensor:
    v = view(x)
    if not v.on_gpu:
        raise lib.InvalidError("the tensor is not on a GPU: use Client.tensor for memory that kvd shares on the host")
    if v.kind not in ("bf16", "f32"):
        raise lib.InvalidError(f"a tensor of bfloat16 or float32 is wanted, not of {v.kind}")
    if len(v.shape) not in (3, 4) or any(n <= 0 for n in v.shape) or any(s < 0 for s in v.strides):
        raise lib.InvalidError(f"a tensor of shape {_check.dims(v.shape)} and strides {v.strides} cannot be shared: it is "
                               "[layers, tokens, heads, head_dim], an lse [layers, tokens, heads]")
    size = sum((n - 1) * s for n, s in zip(v.shape, v.strides)) + v.itemsize
    return DeviceTensor(_DeviceBuffer(client, v.address, size, x), x)
