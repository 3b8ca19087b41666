"""Rotation files as torch.save writes them, in every kind that OSCAR's tools read: written here without PyTorch."""
import collections
import io
import json
import pickle
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest

import dumps
from conftest import KVCTL

DIM = 64
STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "float64": "DoubleStorage"}


@pytest.fixture(autouse=True)
def torch_names(monkeypatch):
    """What pickles of tensors name, so that pickle finds it when it writes them."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    exec("def _rebuild_tensor_v2(*arguments): pass", utils.__dict__)
    utils._rebuild_tensor_v2.__module__ = "torch._utils"
    torch._utils = utils
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


class Tensor:
    def __init__(self, values, dtype="float32"):
        self.values, self.dtype = values, dtype

    def __reduce__(self):
        strides = tuple(s // self.values.itemsize for s in self.values.strides)
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (Storage(self), 0, self.values.shape, strides, False,
                                                                collections.OrderedDict())

    def bytes(self):
        if self.dtype == "bfloat16":
            bits = self.values.astype(np.float32).view(np.uint32)
            return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()
        return self.values.astype(self.dtype).tobytes()


class Storage:
    def __init__(self, tensor):
        self.tensor = tensor


def save(path, value, protocol=2):
    """torch.save: a zip of one pickle, and a raw entry for each storage."""
    storages = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, x):
            if not isinstance(x, Storage):
                return None
            storages.append(x.tensor)
            return ("storage", getattr(sys.modules["torch"], STORAGES[x.tensor.dtype]), str(len(storages) - 1), "cpu",
                    x.tensor.values.size)

    out = io.BytesIO()
    Pickler(out, protocol=protocol).dump(value)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        z.writestr("archive/data.pkl", out.getvalue())
        for i, t in enumerate(storages):
            z.writestr(f"archive/data/{i}", t.bytes())
    return path


def rotations(rng, heads=None):
    """Of layers 0 and 2."""
    shape = (heads, DIM, DIM) if heads else (DIM, DIM)
    return {i: np.linalg.qr(rng.standard_normal(shape))[0] for i in (0, 2)}


def content(side, values, dtype="float32", version=True, keys=int):
    top = {"format_version": 2 if next(iter(values.values())).ndim == 3 else 1} if version else {}
    top |= {"objective": f"{side}_r_h_pbr", "source_grouping": "layer", "damping": 0.01, "trace": [1.5, [2, 3.25]], "seeds": [7],
            "layers": {keys(i): {"layer_id": i, "rotation": Tensor(r, dtype), "condition": float("1e300")}
                       for i, r in values.items()}}
    return top


def load(folder, k, v):
    """What kvctl makes of the two files: its digest and the rotations."""
    r = subprocess.run([KVCTL, "--store", folder / "store", "--json", "calib", "import", k, v, "m@v1"], capture_output=True, text=True)
    if r.returncode:
        return r.stderr
    digest = json.loads(r.stdout)["digest"].removeprefix("sha256:")
    data = (folder / "store" / "objects" / "sha256" / f"{digest}.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + n])
    result = {}
    for side in "kv":
        begin, end = header[f"{side}.rotation"]["data_offsets"]
        result[side] = np.frombuffer(data[8 + n + begin:8 + n + end], np.float32).reshape(header[f"{side}.rotation"]["shape"])
    return result


@pytest.mark.parametrize("protocol", (2, 3, 4, 5))
@pytest.mark.parametrize("dtype", STORAGES)
def test_every_kind_of_file(folder, protocol, dtype):
    rng = np.random.default_rng()
    heads = rng.choice([None, 3])
    version, keys = bool(rng.integers(2)), (int, str)[rng.integers(2)]
    k, v = rotations(rng, heads), rotations(rng, heads)
    got = load(folder, save(folder / "k.pt", content("qqt", k, dtype, version, keys), protocol),
               save(folder / "v.pt", content("sst", v, dtype, version, keys), protocol))
    assert isinstance(got, dict), got
    for side, values in (("k", k), ("v", v)):
        for i, layer in enumerate(values):
            r = got[side][i] if heads else got[side][i, 0]
            bound = {"float32": 1e-7, "float64": 1e-7, "float16": 1e-3, "bfloat16": 4e-3}[dtype]
            assert np.abs(r - values[layer]).max() < bound
            identity = r.astype(float) @ np.swapaxes(r, -1, -2)
            assert np.abs(identity - np.eye(DIM)).max() < 1e-6  # 16 bits too: made orthogonal again


def test_swapped_files_are_refused(folder):
    rng = np.random.default_rng()
    k = save(folder / "k.pt", content("qqt", rotations(rng)))
    v = save(folder / "v.pt", content("vtv", rotations(rng)))
    said = load(folder, v, k)
    assert "v.pt" in said and "vtv" in said and "K's file first" in said
    said = load(folder, k, k.with_name("k2.pt").write_bytes(k.read_bytes()) and k.with_name("k2.pt"))
    assert "k2.pt" in said and "qqt" in said
    assert not (folder / "store" / "index.json").exists()
    assert isinstance(load(folder, k, v), dict)


@pytest.mark.parametrize("change, said", [
    (lambda c: c.update(format_version=3), "neither 1 nor 2"),
    (lambda c: c.update(format_version=1.0), "neither 1 nor 2"),
    (lambda c: c.pop("layers"), "no layers"),
    (lambda c: c["layers"][0].update(rotation=[1, 2]), "no tensor"),
    (lambda c: c["layers"][0].update(rotation=Tensor(np.eye(DIM) * 1.1, "bfloat16")), "not orthogonal"),
    (lambda c: c["layers"][0].update(rotation=Tensor(np.full((DIM, DIM), np.nan), "float16")), "not orthogonal"),
    (lambda c: c["layers"][0].update(rotation=Tensor(np.eye(DIM) * 1.1, "float64")), "not orthogonal"),
    (lambda c: c.update(layers=[c["layers"]]), "no layers"),
])
def test_files_that_are_refused(folder, change, said):
    c = content("qqt", rotations(np.random.default_rng()))
    change(c)
    v = save(folder / "v.pt", content("sst", rotations(np.random.default_rng())))
    assert said in load(folder, save(folder / "k.pt", c, 4), v)


# -- recordings of OSCAR's server --------------------------------------------------------------------------------------

def record(folder, layers, dtype="bfloat16", warm=True):
    """layer_<id>/q/<n>.pt and so on, of two numbers; number 0 is what the server warms up with."""
    for layer, sides in layers.items():
        for side, x in zip("qkv", sides):
            at = folder / f"layer_{layer}" / side
            at.mkdir(parents=True)
            if warm:
                save(at / "0.pt", Tensor(np.full((6, *x.shape[1:]), 1e4, np.float32), dtype))
            for n, part in ((1, x[:700]), (10, x[700:])):  # by number, not by name
                save(at / f"{n}.pt", Tensor(part, dtype))
        (folder / f"layer_{layer}/seq_lens").mkdir()
    return folder


def rounded(x):
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def calib(*arguments):
    return subprocess.run([KVCTL, "calib", *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_a_set_is_fitted_to_a_recording_of_oscars(tmp_path):
    layers = {l: tuple(map(rounded, x)) for l, x in dumps.activations(5, 1500, 4, 2, 64, 64, (3, 11)).items()}
    oscar = record(tmp_path / "oscar", layers)
    own = tmp_path / "own"
    own.mkdir()
    for name, part in (("a", np.s_[:700]), ("b", np.s_[700:])):
        dumps.write(own / f"{name}.safetensors", {f"layers.{l}.{s}": ("BF16", x[part]) for l, qkv in layers.items() for s, x in zip("qkv", qkv)})
    sets = []
    for source in (oscar, own):
        out = tmp_path / f"{source.name}.set"
        r = calib("fit", source, out, "--published")
        assert r.returncode == 0, r.stderr
        sets.append(dumps.read(out)[0])
    assert set(sets[0]) == set(sets[1]) and all(np.array_equal(sets[0][n], sets[1][n]) for n in sets[0])
    # What it was fitted to is known by the files' contents, whatever their folder is called.
    oscar.rename(tmp_path / "moved")
    r = calib("--json", "eval", "-c", 512, tmp_path / "moved", tmp_path / "oscar.set")
    assert r.returncode == 0 and '"fitted"' in r.stdout, r.stdout + r.stderr
    r = calib("--json", "eval", "-c", 512, record(tmp_path / "other", {l: tuple(np.ascontiguousarray(x[::-1]) for x in s) for l, s in layers.items()}), tmp_path / "oscar.set")
    assert r.returncode == 0 and '"held-out"' in r.stdout and '"fitted"' not in r.stdout


@pytest.mark.parametrize("change,words", [
    ("missing", "2 files <n>.pt, and 3 of other numbers in q"), ("no side", "layer_3/v: No such file"), ("both", "one recording or the other"),
    ("rank", "not F16, BF16 or F32 [tokens, heads, head_dim]"), ("double", "not F16, BF16 or F32"), ("strides", "not dense"),
    ("short", "beyond its storage"), ("dictionary", "it is no tensor"), ("compressed", "is compressed"), ("tokens", "q has 700 tokens, v has 699"),
    ("nan", "layer 3, k: token 5, head 1 has NaN or Inf"), ("global", "layer_3/k/1.pt"),
])
def test_bad_recordings_of_oscars(tmp_path, change, words):
    layers = dumps.activations(6, 1500, 4, 2, 64, 64, (3,))
    oscar = record(tmp_path / "oscar", layers)
    at, x = oscar / "layer_3", layers[3][1][:700]
    if change == "missing":
        (at / "k/10.pt").unlink()
    elif change == "no side":
        (at / "v").rename(at / "w")
    elif change == "both":
        dumps.write(oscar / "a.safetensors", {f"layers.3.{s}": ("F32", y) for s, y in zip("qkv", layers[3])})
    elif change == "rank":
        save(at / "k/1.pt", Tensor(x.reshape(700, -1), "bfloat16"))
    elif change == "double":
        save(at / "k/1.pt", Tensor(x.astype(np.float64), "float64"))
    elif change == "strides":
        save(at / "k/1.pt", Tensor(np.asfortranarray(x)))
    elif change == "short":
        save(at / "k/1.pt", Tensor(np.lib.stride_tricks.as_strided(x[:600], (900, 2, 64))))
        with zipfile.ZipFile(at / "k/1.pt") as z:
            pickled = z.read("archive/data.pkl")
        with zipfile.ZipFile(at / "k/1.pt", "w") as z:
            z.writestr("archive/data.pkl", pickled)
            z.writestr("archive/data/0", bytes(1000))
    elif change == "dictionary":
        save(at / "k/1.pt", {"k": Tensor(x)})
    elif change == "compressed":
        with zipfile.ZipFile(at / "k/1.pt") as z:
            entries = {n: z.read(n) for n in z.namelist()}
        with zipfile.ZipFile(at / "k/1.pt", "w", zipfile.ZIP_DEFLATED) as z:
            for n, data in entries.items():
                z.writestr(n, data)
    elif change == "tokens":
        save(at / "v/1.pt", Tensor(layers[3][2][:699], "bfloat16"))
    elif change == "nan":
        x = x.copy()
        x[5, 1, 7] = np.nan
        save(at / "k/1.pt", Tensor(x))
    elif change == "global":
        (at / "k/1.pt").unlink()
        with zipfile.ZipFile(at / "k/1.pt", "w") as z:
            z.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    r = calib("fit", oscar, tmp_path / "set", "--published")
    assert r.returncode == 1 and words in r.stderr, r.stderr
    assert not (tmp_path / "set").exists()
