"""The Python package over libkvd, against attention in NumPy."""
import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import kvd as package
from conftest import BUILD, EMULATED, SOURCE, certificates, free_port
from on_device import aligned

os.environ.setdefault("KVD_LIBRARY", str(BUILD / "client/libkvd.so.0"))
LAYERS, Q_HEADS, KV_HEADS, DIM = 3, 6, 2, 64


@pytest.fixture
def client(kvd):
    with connect(kvd) as c:
        yield c


def connect(kvd, **options):
    return package.Client(**{"layers": range(LAYERS), "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "head_dim": DIM,
                             "address": kvd.address, **options})


def values(seed, *shape):
    """As the daemon will see them."""
    return package.from_bf16(package.to_bf16(np.random.default_rng(seed).normal(size=shape)))


def fill(client, x):
    t = client.tensor(*x.shape)
    t.array[:] = package.to_bf16(x)
    return t


def attention(q, k, v, window=0):
    """One layer: q [n, H_q, D], the last n positions; k, v [t, H, D]."""
    n, t, group = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    logits = np.einsum("nhd,thd->nht", q.astype(np.float64), k) / np.sqrt(q.shape[2])
    at, of = np.arange(t)[None, :], t - n + np.arange(n)[:, None]
    seen = (at <= of) & ((at > of - window) if window else True)
    w = np.where(seen[:, None, :], np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
    return np.einsum("nht,thd->nhd", w / w.sum(axis=-1, keepdims=True), v), \
        np.log(w.sum(axis=-1)) + logits.max(axis=-1)


def close(got, want, limit):
    assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)


def test_bf16_conversion():
    x = np.array([0, 1, -1.5, 3.0e38, 1e-40, np.inf, -np.inf, 1 + 2 ** -8, 1 + 3 * 2 ** -8], np.float32)
    want = np.array([0, 1, -1.5, 3.0e38, 1e-40, np.inf, -np.inf, 1, 1 + 2 ** -6], np.float32)
    got = package.from_bf16(package.to_bf16(x))
    np.testing.assert_allclose(got, want, rtol=2 ** -9, atol=1e-41)
    assert got[7] == 1 and got[8] == np.float32(1 + 2 ** -6)  # ties to even
    assert np.isnan(package.from_bf16(package.to_bf16(np.array([np.nan, -np.nan], np.float32)))).all()
    assert package.to_bf16(np.ones((2, 3))[:, ::2]).shape == (2, 2)


@pytest.mark.parametrize("codec,limit", [("bf16", 5e-3), ("int2", 0.7), ("int2c", 0.7), ("int2-lm", 0.65), ("turboquant-2", 0.65),
                                         ("turboquant-3", 0.35), ("turboquant-4", 0.2)])
def test_append_attend_read(kvd, codec, limit):
    tokens, queries = 700, 5
    k, v = values(1, LAYERS, tokens, KV_HEADS, DIM), values(2, LAYERS, tokens, KV_HEADS, DIM)
    q = values(3, LAYERS, queries, Q_HEADS, DIM)
    with connect(kvd, codec=codec, sink=16, recent=32) as client:
        assert client.info["planes"][0]["sink"] == 16 and client.info["version"] == package.version()
        assert re.fullmatch("GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if client.on_gpu else "", client.info["device_uuid"])
        s = client.create()
        kt, vt = fill(client, k), fill(client, v)
        s.append(kt[:, :300], vt[:, :300])  # slices have strides
        s.append(kt[:, 300:], vt[:, 300:])
        assert s.length == s.describe().length == tokens and s.describe().holders == 1
        qt, o = fill(client, q), client.tensor(LAYERS, queries, Q_HEADS, DIM, dtype="f32")
        lse = client.tensor(LAYERS, queries, Q_HEADS, dtype="f32")
        s.attend(qt, o, lse=lse)
        for layer in range(LAYERS):
            want, want_lse = attention(q[layer], k[layer], v[layer])
            close(o.array[layer], want, limit)
            if codec == "bf16":
                np.testing.assert_allclose(lse.array[layer], want_lse, atol=1e-2)
        s.attend(qt[1:2], o[1:2], layer=1, window=50)
        close(o.array[1], attention(q[1], k[1], v[1], window=50)[0], limit)
        back = client.tensor(LAYERS, 100, KV_HEADS, DIM)
        s.read(200, 100, k=back)
        if codec == "bf16":
            assert (back.array == kt.array[:, 200:300]).all()
        else:
            info = s.describe()
            assert info.planes[0].history > 600 and info.planes[0].sink == 16
            close(package.from_bf16(back.array), k[:, 200:300], 0.5)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_queries_that_are_not_finite(kvd, value):
    """Their o and lse are NaN, theirs alone: one sequence of a batch does not fail a step of all."""
    with connect(kvd, codec="int2", sink=16, recent=32) as client:
        s = client.create()
        s.append(fill(client, values(1, LAYERS, 100, KV_HEADS, DIM)), fill(client, values(2, LAYERS, 100, KV_HEADS, DIM)))
        q, o = fill(client, values(3, LAYERS, 2, Q_HEADS, DIM)), client.tensor(LAYERS, 2, Q_HEADS, DIM, dtype="f32")
        lse = client.tensor(LAYERS, 2, Q_HEADS, dtype="f32")
        s.attend(q, o, lse=lse)
        want, want_lse = o.array.copy(), lse.array.copy()
        q.array[1, 0, 1, 5] = package.to_bf16(np.array([value], np.float32))[0]
        s.attend(q, o, lse=lse)
        assert np.isnan(o.array[1, 0, 1]).all() and np.isnan(lse.array[1, 0, 1])
        o.array[1, 0, 1], lse.array[1, 0, 1] = want[1, 0, 1], want_lse[1, 0, 1]
        close(o.array, want, 2e-3)
        np.testing.assert_allclose(lse.array, want_lse, atol=1e-3)


def test_steps_layer_by_layer_in_a_batch(kvd):
    n = 40
    with connect(kvd, codec="bf16") as client:
        sequences = list(client.create_many(2))
        k, v = (values(i, 2, LAYERS, n, KV_HEADS, DIM) for i in (4, 5))
        q = values(6, 2, LAYERS, n, Q_HEADS, DIM)
        tensors = [[fill(client, x[i]) for x in (k, v, q)] for i in range(2)]
        outs = [client.tensor(LAYERS, n, Q_HEADS, DIM, dtype="f32") for _ in range(2)]
        for first, last in ((0, 30), (30, 31), (31, n)):
            for layer in range(LAYERS):
                cut = np.s_[layer:layer + 1, first:last]
                client.step([package.Item(s, k=t[0][cut], v=t[1][cut], q=t[2][cut], o=o[cut])
                             for s, t, o in zip(sequences, tensors, outs)], layer=layer)
                assert sequences[0].length == (last if layer == LAYERS - 1 else first)
        for i in range(2):
            for layer in range(LAYERS):
                close(outs[i].array[layer], attention(q[i, layer], k[i, layer], v[i, layer])[0], 5e-3)


def test_what_was_applied_before_is_said(client):
    """An append or step that is sent again, as after a lost answer, is known by its item's request; by its position never."""
    a, b = client.create_many(2)
    k, q = fill(client, values(1, LAYERS, 4, KV_HEADS, DIM)), fill(client, values(2, LAYERS, 4, Q_HEADS, DIM))
    o = client.tensor(LAYERS, 4, Q_HEADS, DIM, dtype="f32")

    def item(sequence, request=0, **more):
        return package.Item(sequence, k, k, request=request, **more)

    first = item(a, 701)
    assert client.append([first]) == [False] and first.request == 0
    a.length = 0
    with pytest.raises(package.PreconditionError):
        a.append(k, k)
    assert client.append([item(a, 701), item(b)]) == [True, False]
    assert [s.length for s in (a, b)] == [s.describe().length for s in (a, b)] == [4, 4]
    assert client.step([item(a, 702, q=q, o=o)]) == [False]
    said = o.array.copy()
    a.length = 4
    assert client.step([item(a, 702, q=q, o=o)]) == [True] and a.length == a.describe().length == 8
    np.testing.assert_allclose(o.array, said, atol=1e-5)
    a.length = 4
    client.enqueue("step", [item(a, 702, q=q, o=o)], 0)
    client.enqueue("append", [item(b)], 0)
    assert client.enqueued() == [True, False] and client.enqueued() == []
    lost = item(b)
    b.length = 3  # a call that fails leaves the item its number
    with pytest.raises(package.PreconditionError):
        client.append([lost])
    assert lost.request
    b.length = 8
    assert client.append([lost]) == [False] and lost.request == 0 and b.length == b.describe().length == 12


@pytest.mark.skipif(not EMULATED, reason="a real driver has stream memory operations")
def test_what_a_driver_lacks_is_said(client):
    a = client.create()
    k = fill(client, values(1, LAYERS, 4, KV_HEADS, DIM))
    with pytest.raises(package.Error, match="the CUDA driver has no stream memory operations"):
        client.enqueue("append", [package.Item(a, k, k)], 0)
    assert client.append([package.Item(a, k, k)]) == [False] and a.length == a.describe().length == 4


def test_each_plane_says_where_tokens_are(kvd):
    """Planes with other windows, codecs and sizes: what is compressed in one says nothing of another."""
    planes = [package.Plane(layers=[0, 2], window=100, recent=64), package.Plane(layers=[1], kv_heads=1, sink=16, recent=128)]
    with connect(kvd, layers=None, planes=planes) as client:
        windowed, whole = client.info["planes"]
        assert (windowed["sink"], windowed["recent"], whole["sink"], whole["recent"]) == (0, 64, 16, 128)
        assert windowed["bf16_page_bytes"] == 4 * whole["bf16_page_bytes"]  # twice the layers and heads
        s = client.create()
        for layer, heads in enumerate((KV_HEADS, 1, KV_HEADS)):
            k = client.tensor(1, 700, heads, DIM)
            s.append(k, k, layer=layer)
        first, second = (dataclasses.astuple(p) for p in s.describe().planes)
        assert first == (0, 512, 112, 76) and second == (16, 0, 544, 140)
        s.truncate(0)
        assert [dataclasses.astuple(p) for p in s.describe().planes] == [(0, 0, 0, 0)] * 2
    with connect(kvd) as client:
        assert len(client.info["planes"]) == 1
        s = client.create()
        s.append(fill(client, values(8, LAYERS, 50, KV_HEADS, DIM)), fill(client, values(9, LAYERS, 50, KV_HEADS, DIM)))
        assert [dataclasses.astuple(p) for p in s.describe().planes] == [(50, 0, 0, 0)]


def test_two_processes_share_a_sequence(kvd, tmp_path):
    writer = """
import sys, numpy as np, kvd
with kvd.Client(layers=range(3), q_heads=6, kv_heads=2, head_dim=64, address=sys.argv[1]) as client:
    k = client.tensor(3, 100, 2, 64)
    k.array[:] = kvd.to_bf16(np.random.default_rng(9).normal(size=k.shape))
    s = client.create()
    s.append(k, k)
    s.publish("prompt")
"""
    subprocess.run([sys.executable, "-c", writer, kvd.address], check=True,
                   env={**os.environ, "PYTHONPATH": str(SOURCE / "client/python")})
    with connect(kvd) as client:
        s = client.attach("prompt")
        assert s.length == 100 and s.describe().name == "prompt"
        child, other = s.fork(2)
        child.truncate(60)
        assert child.length == child.describe().length == 60 and other.describe().length == 100
        k = np.random.default_rng(9).normal(size=(3, 100, 2, 64))
        back = client.tensor(3, 100, 2, 64)
        s.read(0, 100, v=back)
        assert (back.array == package.to_bf16(k)).all()  # all of it is in sink and recent window
        with pytest.raises(package.ExistsError, match="prompt"):
            other.publish("prompt")
        other.publish("prompt", replace=True)
        other.free(unpublish=True)
        with pytest.raises(package.NotFoundError):
            client.attach("prompt")


def test_rotation_and_its_inverse(client):
    x, y = fill(client, values(7, LAYERS, 5, KV_HEADS, DIM)), client.tensor(LAYERS, 5, KV_HEADS, DIM, dtype="f32")
    client.rotate(x, y, side="v")
    h = np.array([[1.0]])
    while len(h) < DIM:
        h = np.block([[h, h], [h, -h]])
    close(y.array, package.from_bf16(x.array) @ h / 8, 1e-6)
    client.rotate(y, y, side="v", inverse=True)
    close(y.array, package.from_bf16(x.array), 1e-5)


def test_events(kvd):
    with connect(kvd) as client, connect(kvd) as other:
        while client.next_event(0.2):
            pass
        s = other.create()
        k = other.tensor(LAYERS, 1, KV_HEADS, DIM)
        s.append(k, k)
        s.publish("news")
        event = client.next_event(10)
        assert (event.kind, event.name) == ("published", "news")
        assert client.next_event(0.01) is None


def test_what_is_refused(kvd, client):
    s = client.create()
    k, q = client.tensor(LAYERS, 4, KV_HEADS, DIM), client.tensor(LAYERS, 4, Q_HEADS, DIM)
    for call, text in [
            (lambda: s.append(k, None), "v is wanted"),
            (lambda: s.attend(None, q), "q is wanted"),
            (lambda: client.append([]), "no items"),
            (lambda: s.read(0, 4), "k or v is wanted"),
            (lambda: s.attend(q, q), "")]:
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(IndexError, match="keeps all dimensions"):
        k[0]
    k.array[1, 2, 0, 5] = np.nan
    with pytest.raises(package.InvalidError, match="NaN"):
        s.append(k, k)
    assert s.length == 0 == s.describe().length
    with pytest.raises(package.NotFoundError, match="nobody"):
        client.attach("nobody")
    with pytest.raises(package.InvalidError, match="head_dim"):
        connect(kvd, head_dim=100)
    with pytest.raises(package.UnavailableError):
        connect(kvd, address="unix:/nonexistent/s", timeout=0.5)
    with pytest.raises(package.Error) as e:
        connect(kvd, rotation_set="no@set")
    assert isinstance(e.value, (package.NotFoundError, package.UnavailableError)) and "no" in str(e.value)


def test_after_the_end(kvd):
    client = connect(kvd)
    t, other = client.tensor(1, 1, 1, 64), client.tensor(1, 1, 1, 64)
    arrays = t.array, other.array[..., ::2]
    arrays[0][:] = np.uint16(7)
    s = client.create()
    t.free()
    with pytest.raises(ValueError, match="freed"):
        t.array
    client.close()
    assert (arrays[0] == 7).all() and not arrays[1].any()  # memory outlives the client
    client.close()
    for use in (lambda: other.array, lambda: s.describe(), lambda: client.create(), lambda: client.info):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_memory_goes_with_the_last_array(client):
    t = client.tensor(64, 64, 2, 64)
    begins = f"{t.array.ctypes.data:x}-"  # what other tests have left may go at any moment: only this mapping counts

    def mapped():
        return any(x.startswith(begins) and "memfd:kvd" in x for x in pathlib.Path("/proc/self/maps").read_text().splitlines())

    part = t[1:2].array[0, 0]
    assert mapped()
    del t
    assert mapped() and not part.any()
    del part
    assert not mapped()


def test_a_restarted_daemon(kvd):
    with connect(kvd) as client:
        s = client.create()
        k = client.tensor(LAYERS, 2, KV_HEADS, DIM)
        kvd.stop()
        kvd.start()
        with pytest.raises(package.LostError):
            s.append(k, k)
        with pytest.raises(package.NotFoundError):
            s.describe()
        s = client.create()
        s.append(k, k)
        assert s.describe().length == 2


@pytest.mark.parametrize("codec", ["bf16", "int2", "int2c", "turboquant-3"])
def test_direct_mode(kvd, codec):
    """Decoding over mapped pages: two sequences of three slots, against attention here or a twin's step."""
    with connect(kvd, codec=codec) as client:
        if client.on_gpu:
            pytest.skip("kvd runs on a GPU, and these arrays are in host memory; tests/gpu/model.sh has direct mode there")
        lengths, known = [70, 500], []
        sequences = list(client.create_many(2))
        for s, n in zip(sequences, lengths):
            known.append([values(n, LAYERS, n, KV_HEADS, DIM), values(n + 1, LAYERS, n, KV_HEADS, DIM)])
            s.append(fill(client, known[-1][0]), fill(client, known[-1][1]))
        twins = [s.fork()[0] for s in sequences]
        with package.Direct(client, slots=3, max_tokens=1000) as direct:
            direct.bind(0, sequences[0])
            direct.bind(2, sequences[1])
            for step in range(40):
                q = aligned(values(step, LAYERS, 3, Q_HEADS, DIM))
                k, v = (aligned(package.to_bf16(values(step + i, LAYERS, 3, KV_HEADS, DIM))) for i in (100, 200))
                o = aligned(np.zeros((LAYERS, 3, Q_HEADS, DIM), np.float32))
                direct.begin()
                for layer in range(LAYERS):
                    direct.store(layer, k[layer], v[layer])
                    direct.attend(layer, q[layer], o[layer])
                direct.end()
                for i, slot in enumerate((0, 2)):
                    kv = [np.concatenate([x, package.from_bf16(new[:, slot:slot + 1])], axis=1)
                          for x, new in zip(known[i], (k, v))]
                    known[i] = kv
                    if codec == "bf16":
                        for layer in range(LAYERS):
                            close(o[layer, slot], attention(q[layer, slot:slot + 1], kv[0][layer], kv[1][layer])[0][0], 1e-5)
            direct.flush()
            assert [s.describe().length for s in sequences] == [s.length for s in sequences] == [110, 540]
            class Device:  # as CuPy says where its memory is
                __cuda_array_interface__ = {"shape": k[0].shape, "typestr": "<u2", "data": (1 << 20, False), "version": 3}

            with pytest.raises(ValueError, match="in the GPU memory, and kvd runs on the CPU"):
                direct.store(0, Device(), v[0])
            with pytest.raises(package.Error, match="GPU|CUDA|CPU"):
                client.share(Device())
            with pytest.raises(TypeError, match="PyTorch tensor or a CuPy array"):
                client.share(k[0])
            for bad in (k[0, :2], k[0].astype(np.float32), k[:, 0], memoryview(b"x")):
                with pytest.raises((ValueError, TypeError)):
                    direct.store(0, bad, v[0])
            with pytest.raises(package.InvalidError):
                direct.store(LAYERS, k[0], v[0])
            with pytest.raises(package.PreconditionError):
                package.Direct(client, slots=1, max_tokens=10)
            with pytest.raises(package.NotFoundError):
                direct.bind(1, package.Sequence(client, 12345))
            direct.begin()  # a step that is not ended is none
            with pytest.raises(package.PreconditionError):
                direct.flush()
        assert [s.describe().length for s in sequences] == [110, 540]
        for i, (s, twin) in enumerate(zip(sequences, twins)):  # what kvd has is what a plain append makes of it
            twin.append(fill(client, known[i][0][:, lengths[i]:]), fill(client, known[i][1][:, lengths[i]:]))
            got, want = ([client.tensor(LAYERS, s.length, KV_HEADS, DIM, dtype="f32") for _ in range(2)] for _ in range(2))
            s.read(0, s.length, k=got[0], v=got[1])
            twin.read(0, twin.length, k=want[0], v=want[1])
            for a, b in zip(got, want):
                assert np.array_equal(a.array, b.array)


def test_a_client_over_mutual_tls(start, folder):
    """What C's options have, Python's have too."""
    certificates(folder, server="IP:127.0.0.1,DNS:kvd.test", worker="DNS:worker")
    port = free_port()
    kvd = start("--listen", f"127.0.0.1:{port}", config=f"""
[tls]
cert = {folder}/server.pem
key = {folder}/server.key
client-ca = {folder}/ca.pem
""")
    tls = {"tls_ca": f"{folder}/ca.pem", "tls_cert": f"{folder}/worker.pem", "tls_key": f"{folder}/worker.key"}
    address = f"127.0.0.1:{port}"
    x = values(1, LAYERS, 5, KV_HEADS, DIM)
    with connect(kvd, address=address, lease=60, **tls) as client:
        s = client.create()
        s.append(fill(client, x), fill(client, x))
        s.publish("tls")
        again = client.attach("tls")
        assert s.describe().holds == again.describe().holds == 2 and s.describe().length == 5
        again.free()
        assert s.describe().holds == 1
    with connect(kvd, address=address, tls_server_name="kvd.test", **tls):
        pass
    for wrong in ({"tls_server_name": "other.test"}, {"tls_cert": None, "tls_key": None}):
        with pytest.raises(package.Error):
            connect(kvd, address=address, timeout=2, **{**tls, **wrong})
    with pytest.raises(TypeError, match="lease"):
        connect(kvd, address=address, lease="long", **tls)
