"""What a call uses stays there until it is done, whatever ends meanwhile."""
import threading
import time

import grpc

from conftest import Rpc, layout, kv


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
                         which=kv.RotateRequest.K)
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
