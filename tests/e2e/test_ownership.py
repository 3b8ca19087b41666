"""What a call uses stays there until it is done, whatever ends meanwhile, and what it writes is nothing that it reads."""
import array
import socket
import struct
import threading
import time

import grpc
import pytest

from conftest import Rpc, layout, kv
from scenario_holder import new_memory


def test_a_running_call_keeps_its_layout(kvd, rpc):
    def shape(i, dim=64):
        return layout(layers=[0], q_heads=1, kv_heads=1, head_dim_k=dim, head_dim_v=dim,
                        windows=kv.Windows(sink=64, recent=256 + 16 * i))

    last = rpc.kv("OpenSession", layout=shape(0, 256)).session
    for i in range(63):  # every slot of the table has been used: a new layout takes the first that nobody refers to
        rpc.kv("CloseSession", session=rpc.kv("OpenSession", layout=shape(i)).session)
    rows = 65536
    x = kv.TensorRef(inline_data=bytes(rows * 256 * 2))
    replies = []

    def rotate():
        try:
            r = other.kv("Rotate", session=last, layer_begin=0, layer_count=1, heads=1, rows=rows, x=x,
                         which=kv.RotateRequest.KEYS)
            replies.append(len(r.y))
        except grpc.RpcError as e:
            replies.append(e.code().name)

    other = Rpc(kvd.address)
    t = threading.Thread(target=rotate)
    t.start()
    while not replies and kvd.metric("kvd_queued_calls") != 1:
        time.sleep(0.005)
    rpc.kv("CloseSession", session=last)
    rpc.kv("OpenSession", layout=layout(layers=[0, 1], q_heads=1, kv_heads=1))
    t.join()
    other.channel.close()
    assert replies[0] in (rows * 256 * 2, "UNAUTHENTICATED", "NOT_FOUND")
    assert kvd.process.poll() is None


def test_outputs_lie_apart(kvd, rpc):
    """Overlapping outputs, whose results would depend on who writes last, and inputs that a call would write over."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(f"{kvd.socket}.fd")
    ticket = sock.recv(64)[8:40].decode()
    session = rpc.kv("OpenSession", layout=layout(), ticket=ticket).session
    fd = new_memory(1 << 20)
    buffers = []
    for key in (1, 2):  # the same memory twice
        sock.sendmsg([struct.pack("<IIQ", 0x0144766B, 1, key)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        buffers.append(rpc.kv("RegisterBuffer", session=session, key=key, size=1 << 20).buffer)
    seqs = rpc.kv("CreateSequences", session=session, request_id=1, count=2).sequences
    n, row = 4, 4 * 64 * 2  # tokens; bytes of a token's q or o

    def at(offset, buffer=0, **kw):
        return kv.TensorRef(buffer=buffers[buffer], offset=offset, **kw)

    def append(i):
        return kv.AppendItem(sequence=seqs[i], position=0, tokens=n, k=at(0), v=at(0), request_id=i + 10)

    rpc.kv("Append", session=session, items=[append(0), append(1)])

    def attend(*items, **kw):
        return rpc.kv("Attend", session=session, items=[kv.AttendItem(sequence=seqs[i], q_len=n, **t) for i, t in enumerate(items)],
                      params=kv.AttentionParams(return_lse=any("lse" in t for t in items)), **kw)

    def refused(what, call, *args, **kw):
        with pytest.raises(grpc.RpcError) as e:
            call(*args, **kw)
        assert e.value.code().name == "INVALID_ARGUMENT" and what in e.value.details(), e.value.details()

    o, size = 1 << 16, 2 * n * row
    # Of one batch [layers][tokens of all items]: bounds overlap, rows do not.
    batch = [dict(q=at(0), o=at(o + i * n * row, layer_stride=2 * n * row)) for i in range(2)]
    assert len(attend(*batch).results) == 2
    batch[1]["o"].offset -= 2
    refused("items[0].o, which is written, shares memory with items[1].o", attend, *batch)
    batch[1]["o"] = at(o + n * row - 2, 1, layer_stride=2 * n * row)
    refused("shares memory with", attend, *batch)
    batch[1]["o"] = at(o + n * row, 1, layer_stride=2 * n * row)
    attend(*batch)
    refused("items[0].lse", attend, dict(q=at(0), o=at(o), lse=at(o + size - 4)))
    attend(dict(q=at(0), o=at(o), lse=at(o + size)))
    refused("items[0].q", attend, dict(q=at(o), o=at(o)))
    refused("items[1].q", attend, dict(q=at(0), o=at(o)), dict(q=at(o + size - 2), o=at(2 * o)))
    refused("its own rows", attend, dict(q=at(0), o=at(o, token_stride=row - 2)))
    refused("signal", attend, dict(q=at(0), o=at(o)), signal=kv.Fence(buffer=buffers[0], offset=o + 8, value=1))
    attend(dict(q=at(0), o=at(o)), wait=kv.Fence(buffer=buffers[0], offset=o + size, value=0),
           signal=kv.Fence(buffer=buffers[0], offset=o + size, value=1))
    refused("items[0].k, which is written", rpc.kv, "ReadTokens", session=session, sequence=seqs[0], begin=0, tokens=n,
            k=at(o), v=at(o + 64))
    step = kv.StepItem(sequence=seqs[0], position=n, tokens=n, k=at(0), v=at(o), q=at(2 * o), o=at(o + 2), request_id=20)
    refused("items[0].v", rpc.kv, "Step", session=session, items=[step])

    def rotate(x, y):
        return rpc.kv("Rotate", session=session, which=kv.RotateRequest.KEYS, rows=n, heads=2, x=x, y=y)

    rotate(at(0), at(0))  # where it lies
    refused("items[0].x", rotate, at(0), at(2))
    refused("items[0].x", rotate, at(0), at(0, token_stride=512))
    for s in seqs:
        assert rpc.kv("DescribeSequences", session=session, sequences=[s]).sequences[0].length == n
    sock.close()
