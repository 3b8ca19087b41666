"""Tensors in a GPU's memory: PyTorch's and CuPy's, as they are, without a copy."""
from __future__ import annotations

import ctypes as c
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _library as lib

if TYPE_CHECKING:
    from ._client import Client


class _View(NamedTuple):
    """What a foreign array says of itself. Strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    kind: str  # "bf16", "f32" or the name of another dtype
    on_gpu: bool


def view(x: Any) -> _View:
    """Of a PyTorch tensor, or of whatever has __cuda_array_interface__ (uint16 there holds bf16)."""
    if hasattr(x, "data_ptr"):
        size = x.element_size()
        kind = {"torch.bfloat16": "bf16", "torch.float32": "f32"}.get(str(x.dtype), str(x.dtype))
        return _View(x.data_ptr(), tuple(x.shape), tuple(s * size for s in x.stride()), size, kind, x.is_cuda)
    if hasattr(x, "__cuda_array_interface__"):
        i = x.__cuda_array_interface__
        size, shape = int(i["typestr"][2:]), tuple(i["shape"])
        strides = i.get("strides")
        if strides is None:
            strides, step = (), size
            for n in reversed(shape):
                strides, step = (step, *strides), step * n
        kind = {"u2": "bf16", "f4": "f32"}.get(i["typestr"][1:], i["typestr"])
        return _View(i["data"][0], shape, tuple(strides), size, kind, True)
    raise TypeError(f"a PyTorch tensor or a CuPy array is wanted, not {type(x).__name__}")


class _DeviceBuffer:
    """A kvd_buffer over memory that `owner` keeps."""

    def __init__(self, client: "Client", address: int, size: int, owner: Any):
        self.handle, self.address, self.owner, self._client = c.c_void_p(), address, owner, client
        lib.call("kvd_buffer_cuda", client._open(), address, size, c.byref(self.handle))
        client._buffers.add(self)

    def free(self) -> None:
        with self._client._lock:
            self._client._buffers.discard(self)
            handle, self.handle = self.handle, c.c_void_p()
            if handle:
                lib.library().kvd_buffer_free(c.byref(handle))
        self.owner = None


class DeviceTensor:
    """[layers, tokens, heads, head_dim] (an lse: [layers, tokens, heads]) of the GPU, for calls as a `Tensor` is.

    Made by `Client.share`. `array` is what was shared: kvd reads and writes its memory. It is kept until `free()` or the end of
    the client. A call that waits (`Client.step` and the others) wants the work on it to have finished: synchronize its stream
    before; `Client.enqueue` takes its turn on the stream instead.
    """

    def __init__(self, buffer: _DeviceBuffer, array: Any):
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

    def _ref(self, what: str, dims: int) -> lib.TensorRef:
        v = view(self.array)
        if not self._buffer.handle:
            raise ValueError(f"{what} was freed, or its client closed")
        if len(v.shape) != dims:
            raise ValueError(f"{what} has {len(v.shape)} dimensions, not {dims}")
        if dims == 4 and v.shape[3] > 1 and v.strides[3] != v.itemsize:
            raise ValueError(f"{what}: head_dim must be contiguous")
        kind = lib.KVD_BF16 if v.kind == "bf16" else lib.KVD_F32
        return lib.TensorRef(self._buffer.handle, v.address - self._buffer.address, *v.strides[:3], kind)


def share(client: "Client", x: Any) -> DeviceTensor:
    v = view(x)
    if not v.on_gpu:
        raise ValueError("the tensor is not on a GPU: use Client.tensor for memory that kvd shares on the host")
    if v.kind not in ("bf16", "f32"):
        raise ValueError(f"a tensor of bfloat16 or float32 is wanted, not of {v.kind}")
    if any(n <= 0 for n in v.shape) or any(s < 0 for s in v.strides):
        raise ValueError(f"a tensor of shape {v.shape} and strides {v.strides}")
    size = sum((n - 1) * s for n, s in zip(v.shape, v.strides)) + v.itemsize
    return DeviceTensor(_DeviceBuffer(client, v.address, size, x), x)
