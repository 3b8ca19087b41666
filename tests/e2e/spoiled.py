"""Damage to pages behind kvd's back: on the CPU and the emulated GPU by its maps, on a real GPU by the descriptors of its extents, which
a kvd with --keep has open. Wants root."""
import ctypes
import os

FLIP = 0x40


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


def _by_maps(pid, names):
    found = 0
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "r+b", 0) as mem:
        for line in maps:
            if not any(f"/memfd:{name} " in line for name in names) or " rw-" not in line:
                continue
            a, b = (int(x, 16) for x in line.split()[0].split("-"))
            for at in range(a + 100, b, 4096):
                mem.seek(at)
                byte = mem.read(1)[0]
                mem.seek(at)
                mem.write(bytes([byte ^ FLIP]))
            found += 1
    return found


def _spoil_extent(cuda, fd, size):
    handle, at = ctypes.c_ulonglong(), ctypes.c_ulonglong()
    if cuda.cuMemImportFromShareableHandle(ctypes.byref(handle), ctypes.c_void_p(fd), 1):
        return 0  # another descriptor
    access = _Access(_Location(1, 0), 3)
    if cuda.cuMemAddressReserve(ctypes.byref(at), ctypes.c_size_t(size), ctypes.c_size_t(0), ctypes.c_ulonglong(0), ctypes.c_ulonglong(0)) \
            or cuda.cuMemMap(at, ctypes.c_size_t(size), ctypes.c_size_t(0), handle, ctypes.c_ulonglong(0)) \
            or cuda.cuMemSetAccess(at, ctypes.c_size_t(size), ctypes.byref(access), ctypes.c_size_t(1)):
        raise RuntimeError("an extent cannot be mapped")
    host = (ctypes.c_ubyte * size)()
    assert not cuda.cuMemcpyDtoH_v2(host, at, ctypes.c_size_t(size))
    for i in range(100, size, 4096):
        host[i] ^= FLIP
    assert not cuda.cuMemcpyHtoD_v2(at, host, ctypes.c_size_t(size)) and not cuda.cuCtxSynchronize()
    cuda.cuMemUnmap(at, ctypes.c_size_t(size))
    cuda.cuMemRelease(handle)
    return 1


def _by_descriptors(pid, size):
    cuda = ctypes.CDLL("libcuda.so.1")
    context = ctypes.c_void_p()
    assert not cuda.cuInit(0) and not cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) and not cuda.cuCtxSetCurrent(context)
    process, found = os.pidfd_open(pid), 0
    libc = ctypes.CDLL(None, use_errno=True)
    for n in sorted(map(int, os.listdir(f"/proc/{pid}/fd"))):
        fd = libc.syscall(438, process, n, 0)  # pidfd_getfd
        if fd >= 0:
            found += _spoil_extent(cuda, fd, size)
            os.close(fd)
    os.close(process)
    cuda.cuDevicePrimaryCtxRelease_v2(0)
    return found


def spoil(pid, extent_bytes=None):
    """Flips a bit of a byte of each 4 KiB of all extents of a process; how many. On a real GPU extents have `extent_bytes`."""
    found = _by_maps(pid, ("kvd-extent", "emulated GPU"))
    return found or (_by_descriptors(pid, extent_bytes) if extent_bytes else 0)
