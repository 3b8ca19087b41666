"""Arrays where kernels of direct mode want them: in this process's memory where kvd runs on the CPU, else in the GPU's.

A real GPU's memory is had by the driver alone, so that machines need no PyTorch for it; an emulated one's is the process's own, but said to be
the GPU's."""
import ctypes
import functools

import numpy as np

from conftest import EMULATED


def aligned(x):
    """The same values at an address that 64 divides."""
    memory = np.zeros(x.nbytes + 64, np.uint8)
    at = -memory.ctypes.data % 64
    out = memory[at:at + x.nbytes].view(x.dtype).reshape(x.shape)
    out[:] = x
    return out


@functools.cache
def driver():
    """libcuda, with the context that the runtime has too."""
    lib, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
    for rc in (lib.cuInit(0), lib.cuDeviceGet(ctypes.byref(device), 0), lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)):
        assert rc == 0
    return lib, context


def driven(name, *arguments):
    lib, context = driver()
    assert lib.cuCtxSetCurrent(context) == 0
    rc = getattr(lib, name)(*arguments)
    assert rc == 0, f"{name} gave {rc}"


class OnGpu:
    """As CuPy says where its memory is."""

    def __init__(self, x):
        x = np.ascontiguousarray(x)
        self.shape, self.dtype, self.nbytes, self._host, self._at = x.shape, x.dtype, x.nbytes, None, ctypes.c_uint64()
        if EMULATED:
            self._host = aligned(x)
            self._at.value = self._host.ctypes.data
            return
        driven("cuMemAlloc_v2", ctypes.byref(self._at), ctypes.c_size_t(x.nbytes))
        driven("cuMemcpyHtoD_v2", self._at, ctypes.c_void_p(x.ctypes.data), ctypes.c_size_t(x.nbytes))

    @property
    def __cuda_array_interface__(self):
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self._at.value, False), "version": 3}

    def values(self):
        """When all on the default stream is done."""
        if EMULATED:
            return self._host.copy()
        out = np.empty(self.shape, self.dtype)
        driven("cuMemcpyDtoH_v2", ctypes.c_void_p(out.ctypes.data), self._at, ctypes.c_size_t(out.nbytes))
        return out

    def __del__(self):
        if not EMULATED and self._at.value:
            driven("cuMemFree_v2", self._at)


def place(on_gpu, *arrays):
    """Each of them, for Direct's calls."""
    return [OnGpu(x) if on_gpu else aligned(x) for x in arrays]


def values(x):
    return x.values() if isinstance(x, OnGpu) else x


def one_step(client, direct, q, k, v, keep=None):
    """A step's outputs, [layers][slots][tokens][heads][dim]; k and v in bf16."""
    outputs = []
    direct.begin()
    for layer in range(len(q)):
        placed = place(client.on_gpu, k[layer], v[layer], q[layer])
        [o] = place(client.on_gpu, np.zeros((*q[layer].shape[:-1], client.shapes[layer].head_dim[1]), np.float32))
        direct.store(layer, *placed[:2])
        direct.attend(layer, placed[2], o)
        outputs.append(values(o))
    direct.end(keep)
    return np.array(outputs)
