"""Latent planes (MLA) through daemon, libkvd and Python: attention against NumPy, forks, prefixes, direct mode, and what is refused."""
import os

import grpc
import numpy as np
import pytest

import kvd as package
from conftest import BUILD, EMULATED, Rpc, layout
from on_device import one_step
from test_death import wait_for
from test_grpc import code_of
from test_keep import kill

os.environ.setdefault("KVD_LIBRARY", str(BUILD / "client/libkvd.so.0"))
LAYERS, HEADS, ROPE, LATENT = 2, 16, 64, 512
SCALE = 192 ** -0.5
pytestmark = pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")


@pytest.fixture
def kvd(start):
    daemon = start()
    daemon.near = 1e-3 if daemon.on_gpu() else 1e-5  # to attention over what is read back
    try:
        connect(daemon).close()
    except package.Error as e:
        assert daemon.on_gpu() and "latent planes (MLA): the CUDA backend's kernels for them" in str(e)
        pytest.skip("the CUDA backend refuses latent planes")
    return daemon


def connect(kvd, **options):
    return package.Client(**{"layers": range(LAYERS), "q_heads": HEADS, "latent": True, "address": kvd.address, **options})


def values(seed, *shape):
    return package.from_bf16(package.to_bf16(np.random.default_rng(seed).normal(size=shape)))


def fill(client, x):
    t = client.tensor(*x.shape)
    t.array[:] = package.to_bf16(x)
    return t


def append(client, s, seed, tokens):
    k, v = values(seed, LAYERS, tokens, 1, ROPE), values(seed + 1, LAYERS, tokens, 1, LATENT)
    s.append(fill(client, k), fill(client, v))
    return k[:, :, 0], v[:, :, 0]


def stored(client, s):
    k, v = (client.tensor(LAYERS, s.length, 1, d, dtype="f32") for d in (ROPE, LATENT))
    s.read(0, s.length, k=k, v=v)
    return k.array[:, :, 0].astype(np.float64), v.array[:, :, 0].astype(np.float64)


def attention(q, k, v, window=0):
    """One layer: q [n, heads, 576], the last n positions; k [t, 64], v [t, 512]."""
    n, t = len(q), len(k)
    logits = (q[..., :LATENT].astype(np.float64) @ v.T + q[..., LATENT:].astype(np.float64) @ k.T) * SCALE
    at, of = np.arange(t)[None, :], t - n + np.arange(n)[:, None]
    seen = (at <= of) & ((at > of - window) if window else True)
    w = np.where(seen[:, None, :], np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
    return (w / w.sum(axis=-1, keepdims=True)) @ v, np.log(w.sum(axis=-1)) + logits.max(axis=-1)


def attend(client, s, q, **options):
    x, o = client.tensor(*q.shape, dtype="f32"), client.tensor(*q.shape[:3], LATENT, dtype="f32")
    lse = client.tensor(*q.shape[:3], dtype="f32")
    x.array[:] = q
    s.attend(x, o, lse=lse, scale=SCALE, **options)
    return o.array.copy(), lse.array.copy()


def close(got, want, limit):
    assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)


# What the codec makes of normal values, about.
@pytest.mark.parametrize("codec, most", [("bf16", 0), ("int2", 0.4), ("int4", 0.12), ("turboquant-3", 0.2), ("k=bf16,v=int2-lm", 0.38)])
def test_attention_is_that_over_what_is_read(kvd, codec, most):
    with connect(kvd, codec=codec) as client:
        s = client.create()
        k, v = append(client, s, 1, 650)
        read_k, read_v = stored(client, s)
        assert (read_k == k).all()  # the rope part is in bf16 everywhere
        assert (read_v[:, :64] == v[:, :64]).all() and (read_v[:, -256:] == v[:, -256:]).all()
        close(read_v, v, most)
        q = values(3, LAYERS, 3, HEADS, LATENT + ROPE)
        o, lse = attend(client, s, q)
        for l in range(LAYERS):
            want, want_lse = attention(q[l], read_k[l], read_v[l])
            close(o[l], want, kvd.near)
            np.testing.assert_allclose(lse[l], want_lse, atol=kvd.near)
        # The new tokens' own K and V in a step, then what they leave.
        x = client.tensor(LAYERS, 2, HEADS, LATENT + ROPE, dtype="f32")
        x.array[:] = q[:, :2]
        new = values(5, LAYERS, 2, 1, ROPE), values(6, LAYERS, 2, 1, LATENT)
        stepped = client.tensor(LAYERS, 2, HEADS, LATENT, dtype="f32")
        s.step(x, *(fill(client, n) for n in new), stepped, scale=SCALE)
        for l in range(LAYERS):
            want, _ = attention(q[l, :2], np.concatenate([read_k[l], new[0][l, :, 0]]), np.concatenate([read_v[l], new[1][l, :, 0]]))
            close(stepped.array[l], want, kvd.near)
        assert s.length == 652 and s.describe().planes[0].history > 0


def test_forks_and_prefixes_share_pages(kvd):
    q = values(9, LAYERS, 1, HEADS, LATENT + ROPE)
    with connect(kvd, codec="int2", sink=0, recent=64) as client:
        s = client.create()
        append(client, s, 1, 500)
        child = s.fork()[0]
        child.truncate(300)
        close(attend(client, child, q)[0][0], attention(q[0], *(x[0] for x in stored(client, child)))[0], kvd.near)
        append(client, child, 11, 100)
        before = attend(client, s, q)[0]
        k, v = stored(client, child)
        close(attend(client, child, q)[0][1], attention(q[1], k[1], v[1])[0], kvd.near)
        assert (attend(client, s, q)[0] == before).all()  # what the child wrote is its own
        prompt = package.Prompt(tokens=list(range(500)))
        assert s.publish_blocks(prompt).blocks == 6
        s.publish("conversation")
        with connect(kvd, codec="int2", sink=0, recent=64) as other:
            match = other.match([prompt])[0]
            adopted = other.adopt(match)
            assert adopted.length == 6 * 64
            s.truncate(6 * 64)
            np.testing.assert_array_equal(stored(other, adopted)[1], stored(client, s)[1])
            assert other.attach("conversation").length == 6 * 64
        with connect(kvd, codec="int4", sink=0, recent=64) as another:  # of another layout
            assert another.match([prompt])[0].blocks == 0
            assert another.info["layout_digest"] != client.info["layout_digest"]


def test_pages_outlive_kvd_and_come_back_from_tiers(start, folder):
    keeper = start("--keep", "--backend", "cpu", config=f"[kvd]\ntier-directory = {folder}/blocks 1GiB\n")
    options = {"codec": "int4", "sink": 0, "recent": 0}
    q, prompt = values(9, LAYERS, 1, HEADS, LATENT + ROPE), package.Prompt(tokens=list(range(256)))
    with connect(keeper, **options) as client:
        s = client.create()
        append(client, s, 1, 256)
        s.publish_blocks(prompt)
        s.publish("conversation")
        before = attend(client, s, q)[0]
    kill(keeper)
    with connect(keeper, **options) as client:
        assert (attend(client, client.attach("conversation"), q)[0] == before).all()
        assert client.match([prompt])[0].blocks == 4  # the index of an earlier kvd is sound
        assert wait_for(lambda: keeper.metric("kvd_demotion_waiting_blocks") == 0)
    keeper.kvctl("evict", "--namespace", "default")  # the sequence too, which nobody holds
    with connect(keeper, **options) as client:
        assert client.match([prompt])[0].blocks == 0
        match = client.match([prompt], restore=10)[0]
        assert (match.blocks, match.restored) == (4, 4)
        assert (attend(client, client.adopt(match), q)[0] == before).all()


def test_pages_of_an_engine_that_keeps_both_parts_in_one_tensor(kvd):
    with package.Pages(space=b"an engine", layers=range(LAYERS), kv_heads=1, head_dim=(ROPE, LATENT), codec="int4", latent=True,
                       address=kvd.address) as pages:
        blocks = [package.to_bf16(values(l, 16, 16, 1, LATENT + ROPE)) for l in range(LAYERS)]  # [block, token, head, both parts]

        def paged(some):
            return package.Paged([b[..., LATENT:] for b in blocks], [b[..., :LATENT] for b in blocks], some, order="bthd")

        keys = [bytes([i]) * 32 for i in range(2)]
        assert pages.put(keys, paged(range(8)), exact=[True, False]) == bytes([2, 1])
        assert pages.get(keys, paged(range(8, 16))) == bytes([2, 1])
        for b in blocks:
            assert (b[8:12] == b[:4]).all() and (b[12:, ..., LATENT:] == b[4:8, ..., LATENT:]).all()
            close(package.from_bf16(b[12:]), package.from_bf16(b[4:8]), 0.12)
        with pytest.raises(package.NotFoundError):
            pages.get([b"x" * 32], paged(range(4)))


def test_values_are_turned_and_keys_have_nothing_that_turns_them(kvd):
    with connect(kvd, codec="int2") as client:
        x = client.tensor(LAYERS, 5, 1, LATENT, dtype="f32")
        x.array[:] = values(1, *x.shape)
        y, back = (client.tensor(*x.shape, dtype="f32") for _ in range(2))
        client.rotate(x, y, side="v")
        client.rotate(y, back, side="v", inverse=True)
        close(np.linalg.norm(y.array, axis=-1), np.linalg.norm(x.array, axis=-1), 1e-5)
        close(back.array, x.array, 1e-5)
        k = client.tensor(LAYERS, 5, 1, ROPE, dtype="f32")
        with pytest.raises(package.PreconditionError, match="codec bf16 of K has no rotations"):
            client.rotate(k, k, side="k")


def test_windows_free_what_is_behind_them(kvd):
    q = values(9, LAYERS, 1, HEADS, LATENT + ROPE)
    with connect(kvd, codec="int4", windows=[256] * LAYERS, recent=64) as client:
        s = client.create()
        k, v = (np.concatenate(x, axis=1) for x in zip(*(append(client, s, 20 + 2 * i, 150) for i in range(6))))
        assert s.describe().planes[0].freed >= 512
        o, _ = attend(client, s, q)
        close(o[0], attention(q[0], k[0], v[0], 256)[0], 0.2)
        k, v = (client.tensor(LAYERS, 300, 1, d, dtype="f32") for d in (ROPE, LATENT))
        s.read(600, 300, k=k, v=v)
        close(o[0], attention(q[0], k.array[0, :, 0], v.array[0, :, 0], 256)[0], kvd.near)


@pytest.mark.long_emulated
def test_direct_mode(kvd):
    tokens = 90 if EMULATED else 150
    with connect(kvd, codec="int2", sink=16, recent=32) as client:
        s = client.create()
        with pytest.raises(package.InvalidError, match="over a latent there is no default"):
            package.Direct(client, slots=1, max_tokens=1000)
        with package.Direct(client, slots=1, max_tokens=1000, scale=SCALE) as direct:
            direct.bind(0, s)
            for i in range(tokens):
                k, v = values(2 * i, LAYERS, 1, 1, 1, ROPE), values(2 * i + 1, LAYERS, 1, 1, 1, LATENT)
                q = values(i, LAYERS, 1, 1, HEADS, LATENT + ROPE).astype(np.float32)
                o = one_step(client, direct, q, package.to_bf16(k), package.to_bf16(v))
            direct.flush()
        assert s.length == tokens
        k, v = stored(client, s)
        # Tokens were seen in bf16 for a little longer than they are kept so.
        close(o[1, 0], attention(q[1, 0], k[1], v[1])[0], 0.2)
        close(attend(client, s, q[:, 0])[0][1], attention(q[1, 0], k[1], v[1])[0], kvd.near)


def test_what_is_no_latent_layout_is_refused_by_name(kvd):
    for wrong, says in (
            ({"kv_heads": 2}, "kv_heads is 2; a latent is shared by all heads"),
            ({"q_heads": 129}, "q_heads is 129; over a latent 1 to 128"),
            ({"head_dim": (64, 256)}, "head_dim is 64 for K and 256 for V; of a latent plane"),
            ({"head_dim": 128}, "head_dim is 128 for K and 128 for V; of a latent plane"),
            ({"codec": "tc2"}, "codec of V is tc2"),
            ({"codec": "k=int2,v=int2"}, "the rope part of a latent plane is in bf16"),
            ({"latent": False, "kv_heads": 1, "head_dim": (64, 512)}, "head_dim is 64 for K and 512 for V; 64, 80")):
        with pytest.raises(package.InvalidError, match=says):
            connect(kvd, **wrong)


def test_calls_are_refused_by_name(kvd):
    with connect(kvd, codec="int4") as client:
        s = client.create()
        append(client, s, 1, 20)
        q, o = client.tensor(LAYERS, 1, HEADS, LATENT + ROPE, dtype="f32"), client.tensor(LAYERS, 1, HEADS, LATENT, dtype="f32")
        with pytest.raises(package.InvalidError, match="params.scale is missing: over a latent there is no default"):
            s.attend(q, o)
        short = client.tensor(LAYERS, 1, HEADS, LATENT, dtype="f32")
        with pytest.raises(package.InvalidError, match="q is .* and .*576"):
            s.attend(short, o, scale=SCALE)
        with pytest.raises(package.InvalidError, match="o is .* and .*512"):
            s.attend(q, q, scale=SCALE)
        assert s.length == 20


def test_planes_of_both_kinds_and_what_is_told_of_them(kvd):
    planes = [package.Plane([0, 2], q_heads=128, latent=True), package.Plane([1], q_heads=4, kv_heads=2, head_dim=64, codec="int2")]
    with package.Client(planes=planes, codec="int4", address=kvd.address) as client:
        assert [s.latent for s in client.shapes] == [True, False, True] and "128 q heads, a latent" in repr(client)
        out = kvd.kvctl("workers").stdout
        assert "latent k=bf16,v=int4 int2" in out
    rpc = Rpc(kvd.address)
    told = rpc.kv("OpenSession", layout=layout(layers=[0], q_heads=128, kv_heads=1, head_dim_k=64, head_dim_v=512, codec="int2",
                                               latent=True)).layout
    assert told.latent and told.planes[0].latent and told.codec == "k=bf16,v=int2"
    assert told.planes[0].codec_page_bytes == (64 * 260 + 4095) // 4096 * 4096
    with pytest.raises(grpc.RpcError) as e:
        rpc.kv("OpenSession", layout=layout(layers=[0], q_heads=128, kv_heads=1, head_dim_k=64, head_dim_v=512, codec="int2"))
    assert code_of(e) == "INVALID_ARGUMENT"
    rpc.channel.close()
