"""What the Python package refuses before it reaches libkvd: shapes, dtypes, places and numbers, each by name."""
import numpy as np
import pytest

import kvd as package
from test_python import DIM, KV_HEADS, LAYERS, Q_HEADS, aligned, connect, fill, values

TOKENS = 5


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A client, its tensors by name, and another client; nothing here changes the daemon."""
    from conftest import Daemon

    daemon = Daemon(tmp_path_factory.mktemp("kvd"))

    class Shared:
        pass

    s = Shared()
    s.daemon = daemon
    s.client, s.other = connect(daemon, codec="bf16"), connect(daemon, codec="bf16")
    s.sequence = s.client.create()
    s.sequence.append(fill(s.client, values(1, LAYERS, TOKENS, KV_HEADS, DIM)), fill(s.client, values(2, LAYERS, TOKENS, KV_HEADS, DIM)))
    yield s
    s.client.close()
    s.other.close()
    assert daemon.stop() == 0


def tensors(client, **changed):
    """A right set, with some replaced: a shape, or (shape, dtype)."""
    shapes = {"k": (LAYERS, TOKENS, KV_HEADS, DIM), "v": (LAYERS, TOKENS, KV_HEADS, DIM), "q": (LAYERS, TOKENS, Q_HEADS, DIM),
              "o": (LAYERS, TOKENS, Q_HEADS, DIM), "lse": (LAYERS, TOKENS, Q_HEADS)}
    out = {}
    for name, shape in {**shapes, **changed}.items():
        dtype = "f32" if name in ("o", "lse") else "bf16"
        if shape and isinstance(shape[0], tuple):
            shape, dtype = shape
        out[name] = client.tensor(*shape, dtype=dtype)
    return out


SHAPES = [(LAYERS, TOKENS, KV_HEADS * 2, DIM), (LAYERS, TOKENS, KV_HEADS, DIM * 2), (LAYERS, TOKENS, 1, DIM),
          (LAYERS, TOKENS, KV_HEADS, DIM // 2), (LAYERS, TOKENS + 1, Q_HEADS, DIM), (1, TOKENS, Q_HEADS, DIM),
          (LAYERS, TOKENS, Q_HEADS + 1, DIM), (LAYERS, TOKENS, Q_HEADS, DIM * 2), (LAYERS, TOKENS, DIM), (LAYERS + 1, TOKENS, KV_HEADS, DIM),
          (LAYERS, TOKENS, DIM, KV_HEADS), (TOKENS, LAYERS, KV_HEADS, DIM)]


@pytest.mark.parametrize("call", ["append", "attend", "step", "enqueue"])
def test_wrong_shapes(shared, call):
    """Each tensor of a call in every wrong shape: refused with its name, its shape and the right one; nothing has changed."""
    client, s = shared.client, shared.sequence
    needs = {"append": ("k", "v"), "attend": ("q", "o", "lse")}.get(call, ("k", "v", "q", "o", "lse"))
    refused = 0
    for name in needs:
        right = tensors(client)[name].shape
        for shape in SHAPES:
            if shape[:1] + shape[2:] == right[:1] + right[2:] and name == needs[0]:
                continue  # the first tensor says how many tokens there are
            given = {n: t for n, t in tensors(client, **{name: (shape, "f32" if name in ("o", "lse") else "bf16")}).items() if n in needs}
            if shape == right:
                continue
            with pytest.raises(package.InvalidError) as e:
                if call == "enqueue":
                    client.enqueue("step", [package.Item(s, **given)], 0)
                else:
                    getattr(client, call)([package.Item(s, **given)])
            assert "wanted" in str(e.value) or "layers" in str(e.value), str(e.value)
            refused += 1
            for t in given.values():
                t.free()
    assert refused >= 10 * len(needs)
    assert s.length == s.describe().length == TOKENS and s.describe().pending_layers == 0


def test_layers_are_ids_and_an_address_is_one(shared):
    for wrong in (2, 2.5, object()):
        with pytest.raises(TypeError, match=r"layers is .*, and the ids of the model's layers are wanted, such as range\(32\)"):
            connect(shared.daemon, layers=wrong)
    for wrong, text in (("/run/kvd.sock", "perhaps unix:/run/kvd.sock"), ("somewhere", "'somewhere' is no address: unix:PATH or HOST:PORT is wanted")):
        with pytest.raises(package.InvalidError, match=text):
            package.Client(address=wrong, layers=range(2), q_heads=4, kv_heads=2, head_dim=64)


def test_the_error_says_what_and_how(shared):
    client, s = shared.client, shared.sequence
    t = tensors(client)
    wide = client.tensor(LAYERS, TOKENS, KV_HEADS * 2, DIM)
    for call, text in [
            (lambda: s.append(wide, t["v"]), r"k is \[3, 5, 4, 64\], and \[layers, tokens, 2, 64\] is wanted: "
                                             r"\[layers, tokens, kv_heads, head_dim\]"),
            (lambda: s.append(t["k"], t["v"][:, :2]), r"v is \[3, 2, 2, 64\], and \[3, 5, 2, 64\] is wanted"),
            (lambda: client.append([package.Item(s, t["k"], t["v"]), package.Item(client.create(), t["k"], t["v"][:1])]),
             r"items\[1\]\.v is \[1, 5, 2, 64\]"),
            (lambda: s.append(t["k"][..., ::2], t["v"]), r"k is \[3, 5, 2, 32\]"),
            (lambda: s.append(t["k"][..., ::-1], t["v"]), "k has steps of -2 bytes along head_dim"),
            (lambda: s.append(t["k"][:, ::-1], t["v"]), "along tokens: it runs backwards"),
            (lambda: s.append(t["k"][1:], t["v"][1:], layer=2), "the tensors have 2 layers, and there are 1 from layer 2"),
            (lambda: s.append(client.tensor(*t["k"].shape, dtype="f32"), t["v"]), "k is f32, and bf16 is wanted"),
            (lambda: s.attend(t["q"], t["o"], lse=client.tensor(LAYERS, TOKENS, Q_HEADS)), "lse is bf16, and f32 is wanted"),
            (lambda: client.attend([package.Item(s, q=t["q"], o=t["o"], k=t["k"])]), "attend takes no k"),
            (lambda: client.append([package.Item(s, t["k"], t["v"], lse=t["lse"])]), "append takes no lse"),
            (lambda: s.append(shared.other.tensor(*t["k"].shape), t["v"]), "k is shared by another client"),
            (lambda: client.append([package.Item(shared.other.create(), t["k"], t["v"])]), "sequence belongs to another client"),
            (lambda: s.read(0, 4, k=t["k"]), r"k is \[3, 5, 2, 64\], and \[layers, 4, 2, 64\] is wanted"),
            (lambda: s.read(0, 5, k=t["q"]), r"k is \[3, 5, 6, 64\]"),
            (lambda: s.read(0, 5, k=t["k"], v=t["v"][:2]), r"v is \[2, 5, 2, 64\], and \[3, 5, 2, 64\] is wanted"),
            (lambda: client.rotate(client.tensor(LAYERS, 4, 3, DIM), t["k"]), "kv_heads or q_heads"),
            (lambda: client.rotate(t["k"], t["q"]), r"y is \[3, 5, 6, 64\], and \[3, 5, 2, 64\] is wanted"),
            (lambda: client.tensor(0, 1, 1, 64), r"shape\[0\] is 0"),
            (lambda: client.tensor(1, 64), r"a tensor of shape \[1, 64\]"),
            (lambda: client.tensor(1 << 30, 1 << 30, 1, 64), "size"),
            (lambda: client.tensor(1, 1, 1, 64, dtype="fp16"), "dtype is 'fp16'")]:
        with pytest.raises(package.InvalidError, match=text):
            call()
    t["k"].free()
    with pytest.raises(package.InvalidError, match="k was freed"):
        s.append(t["k"], t["v"])


def test_what_is_no_tensor(shared):
    client, s = shared.client, shared.sequence
    t = tensors(client)
    a = np.zeros((LAYERS, TOKENS, KV_HEADS, DIM), np.uint16)
    for call, text in [
            (lambda: s.append(a, a), r"k is a numpy.ndarray of shape \[3, 5, 2, 64\] and uint16: calls want .* Client.tensor"),
            (lambda: s.append(t["k"].array, t["v"]), "k is a kvd.*Bf16Array"),
            (lambda: s.attend([1.0], t["o"]), "q is a list"),
            (lambda: s.read(0, 5, k=a), "k is a numpy.ndarray"),
            (lambda: client.rotate(a, t["k"]), "x is a numpy.ndarray"),
            (lambda: client.append(package.Item(s, t["k"], t["v"])), "a list of kvd.Item"),
            (lambda: client.append([package.Item(s.id, t["k"], t["v"])]), "sequence is a int"),
            (lambda: client.tensor((1, 1, 1, 64)), r"shape\[0\] is \(1, 1, 1, 64\)"),
            (lambda: np.asarray(t["k"]), "tensor.array"),
            (lambda: client.share(a), "PyTorch tensor or a CuPy array")]:
        with pytest.raises(TypeError, match=text):
            call()


BAD_INTEGERS = [-1, 1 << 32, 1 << 70, True, 1.0, "1", None, np.float32(1), np.bool_(True)]


@pytest.mark.parametrize("name", ["window", "layer", "begin", "count", "length", "fork", "create", "q_heads", "layers", "sink", "slots",
                                  "max_tokens", "slot", "tokens", "stream"])
def test_integers(shared, name):
    client, s = shared.client, shared.sequence
    t = tensors(client)
    calls = {"window": lambda x: s.attend(t["q"], t["o"], window=x), "layer": lambda x: s.append(t["k"], t["v"], layer=x),
             "begin": lambda x: s.read(x, TOKENS, k=t["k"]), "count": lambda x: s.read(0, x, k=t["k"]), "length": s.truncate,
             "fork": s.fork, "create": client.create_many, "q_heads": lambda x: connect(shared.daemon, q_heads=x),
             "layers": lambda x: connect(shared.daemon, layers=[x]), "sink": lambda x: connect(shared.daemon, sink=x, recent=0),
             "slots": lambda x: package.Direct(client, slots=x, max_tokens=10),
             "max_tokens": lambda x: package.Direct(client, slots=1, max_tokens=x)}
    word = {"fork": "count", "create": "count"}.get(name, name)
    if name in ("slot", "tokens", "stream"):
        with package.Direct(client, slots=1, max_tokens=100) as d:
            calls.update(slot=lambda x: d.bind(x, s), tokens=lambda x: d.end([x]), stream=d.begin)
            refused(calls[name], word, [x for x in BAD_INTEGERS if name != "stream" or x != 1 << 32])
    else:
        refused(calls[name], word, [x for x in BAD_INTEGERS if (name, x) not in (("sink", None), ("begin", 1 << 32), ("length", 1 << 32))])
    assert s.length == s.describe().length == TOKENS


def refused(call, word, bad):
    for x in bad:
        with pytest.raises((TypeError, package.InvalidError), match=rf"^{word}(\[0\])? is "):
            call(x)


def test_other_scalars(shared):
    client, s = shared.client, shared.sequence
    t = tensors(client)
    attend = lambda **kw: s.attend(t["q"], t["o"], **kw)  # noqa: E731
    refused(lambda x: attend(scale=x), "scale", [float("nan"), float("inf"), 1e39, "1", None, True])
    refused(lambda x: attend(softcap=x), "softcap", [-1.0, float("nan"), 1e39, [1.0]])
    refused(lambda x: connect(shared.daemon, timeout=x), "timeout", [-1, float("nan"), 1e7, "1"])
    refused(lambda x: client.next_event(x), "timeout", [-1, 1e10, None])
    refused(lambda x: client.rotate(t["k"], t["k"], side=x), "side", ["K", "", None, 1])
    refused(lambda x: client.rotate(t["k"], t["k"], inverse=x), "inverse", [1, None, "no"])
    refused(lambda x: s.publish("a", replace=x), "replace", [1, "no"])
    refused(lambda x: s.free(unpublish=x), "unpublish", [1, "no"])
    refused(lambda x: client.enqueue(x, [], 0), "kind", ["read", None])
    refused(lambda x: s.publish(x), "name", ["a\0b", b"a", None, "\udc80"])
    refused(lambda x: client.attach(x), "name", ["a\0b", 7])
    refused(lambda x: connect(shared.daemon, namespace=x), "namespace", ["tenant1\0x", 7])
    refused(lambda x: connect(shared.daemon, codec=x), "codec", ["int2\0", 2])
    refused(lambda x: connect(shared.daemon, rotation_set=x), "rotation_set", ["hadamard\0", 2])
    refused(lambda x: connect(shared.daemon, head_dim=x), "head_dim", [(64,), (64, -1), 64.0])
    attend(scale=np.float32(0.5), softcap=2, window=np.int64(3))  # NumPy's own are numbers
    assert s.length == s.describe().length == TOKENS


def test_direct_arrays(shared):
    """Direct mode's arrays: element counts that happen to fit are not enough."""
    client = shared.client
    if client.on_gpu:
        pytest.skip("host arrays")
    k, q = (aligned(np.zeros((2, 1, h, DIM), t)) for h, t in ((KV_HEADS, np.uint16), (Q_HEADS, np.float32)))
    lse, frozen = aligned(np.zeros((2, 1, Q_HEADS), np.float32)), q.copy()
    frozen.flags.writeable = False
    with package.Direct(client, slots=2, max_tokens=100) as d:
        d.bind(0, client.create())
        d.begin()
        for call, text in [
                (lambda: d.store(0, k.reshape(1, 1, 2 * KV_HEADS, DIM), k), r"k is \[1, 1, 4, 64\], and \[2, 1, 2, 64\] is wanted: "
                                                                           r"\[slots, step_tokens, kv_heads, head_dim\]"),
                (lambda: d.store(0, k, k.reshape(2, 1, DIM, KV_HEADS)), "v is"),
                (lambda: d.store(0, k.view(np.int16), k), "k is int16, and bf16 is wanted"),
                (lambda: d.store(0, k.view(np.float16), k), "k is float16, and bf16 is wanted"),
                (lambda: d.store(0, k[::-1], k), "k is not dense"),
                (lambda: d.attend(0, q.view(np.int32), q), "q is int32"),
                (lambda: d.attend(0, q, frozen), "o is read-only"),
                (lambda: d.attend(0, q, q.reshape(2, 1, DIM, Q_HEADS)), "o is"),
                (lambda: d.attend(0, q, q, lse.reshape(1, Q_HEADS, 2)), "lse is"),
                (lambda: d.attend(0, q, q), "o, which is written, shares memory with q"),
                (lambda: d.bind(1, shared.other.create()), "another client")]:
            with pytest.raises(package.InvalidError, match=text):
                call()
        with pytest.raises(TypeError, match="sequence is a int"):
            d.bind(1, 5)
        for layer in range(LAYERS):
            d.store(layer, k, k)
            d.attend(layer, q, np.empty_like(q), lse)
        d.end([1, 0])


def test_floats_in_bf16_arrays(shared):
    """Floats become bf16 however they are put in; NumPy does not compute with bits."""
    x = np.random.default_rng(3).normal(size=(1, 4, 2, DIM))
    bits = package.to_bf16(x)
    for assign in (lambda a: a.__setitem__(np.s_[:], x), lambda a: a[0, 1:].__setitem__(slice(None), x[0, 1:]),
                   lambda a: a.__setitem__(np.s_[...], x.astype(np.float32)), lambda a: a.__setitem__(np.s_[:], bits),
                   lambda a: a.__setitem__(np.s_[:], x.tolist())):
        t = shared.client.tensor(1, 4, 2, DIM)
        assign(t.array)
        assert (t.array[0, 1:] == bits[0, 1:]).all()
    t[:] = x * 2
    assert (t.array == package.to_bf16(x * 2)).all() and t.array.floats().dtype == np.float32
    assert np.array_equal(t.array.astype(np.float64), package.from_bf16(package.to_bf16(x * 2)))
    t.array[0, 0, 0, 0], t.array[0, 0, 0, 1] = 1.5, np.float16(-2)
    assert t.array[0, 0, 0, :2].floats().tolist() == [1.5, -2]
    t.array.fill(0.25)
    assert (t.array.floats() == 0.25).all()
    t.array[:] = 0
    assert not t.array.any()
    for wrong in (lambda: t.array.__setitem__(0, 1), lambda: t.array.__setitem__(0, np.ones(DIM, np.int32)),
                  lambda: t.array.__setitem__(0, True), lambda: t.array + 1, lambda: np.add(t.array, 1, out=t.array),
                  lambda: t.array * 0.5, lambda: t.array == 0.25, lambda: t.array.max(), lambda: t.array.sum(), lambda: np.exp(t.array),
                  lambda: t.array.astype(np.int32), lambda: np.copyto(t.array, x), lambda: t.array.__iadd__(1.0),
                  lambda: package.to_bf16(bits), lambda: package.from_bf16(x), lambda: package.from_bf16(bits.view(np.int16))):
        with pytest.raises(TypeError):
            wrong()
    assert not t.array.any()
    assert t.array.view(np.int16).__class__ is np.ndarray
