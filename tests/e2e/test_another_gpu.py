"""A worker whose memory is on another GPU than its kvd: it is refused by the names of both, before anything has been done, whatever the
memory is for. On emulated GPUs, of which each process can have another."""
import numpy as np
import pytest

import kvd as package
from conftest import EMULATED
from test_page_blocks import OnGpu, Registered, counted
from test_pages import Engine, connect, keys_of, kv, wait_until
from test_python import KV_HEADS, LAYERS
from test_python import connect as connect_client

pytestmark = pytest.mark.skipif(not EMULATED, reason="there are not two GPUs here")
OURS, THEIRS = (f"GPU-656d756c-6174-6564-2047-50552030{ord(n):02x}00" for n in "01")
ANOTHER = {"EMULATED_GPU": "1"}


class Shared(OnGpu):
    """The same as far as kvd.Client.share looks at it."""

    is_cuda = True

    def element_size(self):
        return 2


def served(call):
    """False: the session was still that of the kvd before."""
    try:
        return call() is not None
    except package.LostError:
        return False


def test_nothing_of_it_is_shared(start):
    kvd = start(env=ANOTHER)
    with connect_client(kvd) as c:
        assert c.info["device_uuid"] == THEIRS
        with pytest.raises(package.PreconditionError, match=f"on CUDA device 0, {OURS}, and kvd runs on {THEIRS}: a kvd is wanted there"):
            c.share(Shared(np.zeros((LAYERS, 1, KV_HEADS, 64), np.uint16)))
        with pytest.raises(package.PreconditionError, match=f"the current CUDA device is {OURS}, and kvd runs on {THEIRS}"):
            package.Direct(c, slots=1, max_tokens=128)
        assert c.create().length == 0  # the session is as good as it was
    assert kvd.metric('kvd_share_used{share="mappings"}') == 0


def test_pages_are_neither_put_nor_got(start):
    kvd = start(env=ANOTHER)
    with connect(kvd) as p:
        e, keys = Registered(p, 8, 16, register=False), keys_of("elsewhere", 2)
        for act in (lambda: p.register(e.paged([])), lambda: p.put(keys, e.paged(range(8))), lambda: p.get(keys, e.paged(range(8)))):
            with pytest.raises(package.PreconditionError, match=f"{OURS}, and kvd runs on {THEIRS}"):
                act()
        assert counted(kvd) == (0, 0) and p.lookup([keys])[0].kinds == bytes(2)
        host = Engine(8, 16)  # of the host's memory they are, whatever GPU kvd has
        host.write(range(8), kv(1, 2))
        p.put(keys, host.paged(range(8)))
        assert all(p.lookup([keys])[0].kinds)


def test_a_kvd_that_comes_back_on_another_gpu(start):
    kvd = start()
    with connect(kvd, timeout=5.0) as p:
        e, keys = Registered(p, 8, 16), keys_of("moved", 2)
        e.write(range(8), kv(1, 2))
        p.put(keys, e.paged(range(8)))
        for uuid, env in ((THEIRS, ANOTHER), (OURS, {"EMULATED_GPU": "0"})):
            kvd.process.kill()
            kvd.process.wait()
            kvd.env.update(env)
            kvd.start()
            if uuid == THEIRS:
                for _ in range(2):
                    with pytest.raises(package.PreconditionError, match=f"{OURS}, and kvd runs on {THEIRS}"):
                        p.lookup([keys])
        wait_until(lambda: served(lambda: p.put(keys, e.paged(range(8)), had=bytes(2))))
        assert counted(kvd) == (2, 0)
