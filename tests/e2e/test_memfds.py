"""Memfds that cannot be buffers, and what a worker can do to one when it is."""
import ctypes
import fcntl
import mmap
import os
import re

import pytest

from conftest import layout, kv
from test_death import FdSocket, memfd, refused

MFD_HUGETLB, F_ADD_SEALS, F_SEAL_SHRINK = 0x4, 1033, 0x2
PUNCH_HOLE, KEEP_SIZE = 2, 1


def test_huge_pages_are_refused(kvd, rpc):
    """A hole that is punched later is a SIGBUS where no huge page is free, seal or no seal."""
    size = int(re.search(r"Hugepagesize:\s+(\d+)", open("/proc/meminfo").read())[1]) << 10
    try:
        fd = os.memfd_create("huge", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC | MFD_HUGETLB)
    except OSError as e:
        pytest.skip(f"memfd_create with MFD_HUGETLB: {e}")
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    w = FdSocket(kvd)
    s = rpc.kv("OpenSession", ticket=w.ticket, layout=layout()).session
    for key, bytes_ in ((1, 0), (2, size)):  # none of it needs a page that is there
        os.ftruncate(fd, bytes_)
        w.send(key, fd)
        refused(lambda: rpc.kv("RegisterBuffer", session=s, key=key, size=size), "make it without MFD_HUGETLB")
    w.send(3, memfd(4096))
    assert rpc.kv("RegisterBuffer", session=s, key=3, size=4096).buffer


def test_a_hole_that_is_punched_later_has_zeros(kvd, rpc):
    """The seal does not keep a worker from that; kvd reads zeros there, and what it writes has memory again."""
    n, row, o = 64, 4 * 64 * 2, 1 << 19
    fd = memfd(1 << 20)
    memory = mmap.mmap(fd, 1 << 20)
    memory[:] = b"\x3f" * (1 << 20)
    w = FdSocket(kvd)
    s = rpc.kv("OpenSession", ticket=w.ticket, layout=layout()).session
    w.send(1, fd)
    buffer = rpc.kv("RegisterBuffer", session=s, key=1, size=1 << 20).buffer
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]

    def at(offset):
        return kv.TensorRef(buffer=buffer, offset=offset)

    libc = ctypes.CDLL(None, use_errno=True)
    punched = libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(1 << 20))
    assert punched == 0, os.strerror(ctypes.get_errno())
    assert os.fstat(fd).st_blocks == 0
    rpc.kv("Append", session=s, items=[kv.AppendItem(sequence=seq, position=0, tokens=n, k=at(0), v=at(0), request_id=2)])
    rpc.kv("Attend", session=s, items=[kv.AttendItem(sequence=seq, q_len=n, q=at(0), o=at(o))])
    assert memory[o:o + 2 * n * row] == bytes(2 * n * row)
    assert kvd.process.poll() is None and os.fstat(fd).st_blocks > 0
