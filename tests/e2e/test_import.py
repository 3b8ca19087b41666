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
