"""kvctl calib fit against an independent transcription of the published method in NumPy, in double precision."""
import json
import pickle
import subprocess

import numpy as np
import pytest

from conftest import KVCTL
from dumps import SMOLLM2, activations, read, write

# -- the method -------------------------------------------------------------------------------------------------------

def covariances(q, k, v, objective_k, objective_v):
    """q [n, H_q, D], k and v [n, H, D]: per kv head, K's and V's matrices."""
    n, kv_heads = k.shape[:2]
    group = q.shape[1] // kv_heads
    out_k, out_v = [], []
    for h in range(kv_heads):
        rows = q[:, h * group:(h + 1) * group].reshape(-1, q.shape[2]).astype(np.float64)
        keys, values = k[:, h].astype(np.float64), v[:, h].astype(np.float64)
        qqt = rows.T @ rows / len(rows)
        out_k.append({"qqt": qqt, "ktk": keys.T @ keys / n}[objective_k])
        w = np.einsum("ti,ij,tj->t", keys, qqt, keys)
        w /= w.mean()
        out_v.append({"sst": (values * w[:, None]).T @ values / n, "vtv": values.T @ values / n}[objective_v])
    return np.array(out_k), np.array(out_v)


def paley(m):
    if m == 1:
        return np.array([[1.0]])
    q = 13 if m == 28 else m - 1
    chi = [0] + [1 if pow(a, (q - 1) // 2, q) == 1 else -1 for a in range(1, q)]
    residues = np.array([[chi[(i - j) % q] for j in range(q)] for i in range(q)], float)
    ones = np.ones((1, q))
    if m != 28:
        return np.eye(m) + np.block([[np.zeros((1, 1)), ones], [-ones.T, residues]])
    conference = np.block([[np.zeros((1, 1)), ones], [ones.T, residues]])
    h = np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(14), [[1, -1], [-1, -1]])
    return h * h[0]  # the first row is all ones


def hadamard(n):
    m = next(m for m in (1, 12, 20, 28) if n % m == 0 and n // m & (n // m - 1) == 0)
    h = np.array([[1.0]])
    while len(h) * m < n:
        h = np.block([[h, h], [h, -h]])
    return np.kron(h, paley(m)) / np.sqrt(n)


def permutation(n):
    bits = n.bit_length() - 1
    perm = np.zeros(n, int)
    for i in range(n):
        perm[int(format(i, f"0{bits}b")[::-1], 2)] = n - 1 - i  # eigenvalues ascend
    return perm


def eigenvectors_of(rotation, composition):
    """Undoes what comes after U."""
    n = len(rotation)
    u = rotation
    if composition == "r_h_pbr":
        back = np.empty_like(u)
        back[:, permutation(n)] = u
        u = back
    u = u @ hadamard(n).T if composition != "r" else u
    return u[:, ::-1] if composition == "top_h" else u


# -- running ----------------------------------------------------------------------------------------------------------

def fit(dump, out, *options, code=0):
    r = subprocess.run([KVCTL, "calib", "fit", dump, out, *options], capture_output=True, text=True, timeout=300)
    assert r.returncode == code, r.stdout + r.stderr
    return r.stderr if code else r


def check_parity(tmp_path, data, dump, objective_k, objective_v, composition, per_head, *options):
    spectrum = tmp_path / "spectrum.safetensors"
    if not per_head:
        options = (*options, "--per-layer")
    fit(dump, tmp_path / "set.safetensors", "-k", objective_k, "-v", objective_v, "--compose", composition,
        "--spectrum", spectrum, *options)
    got, meta = read(spectrum)
    sets, set_meta = read(tmp_path / "set.safetensors")
    assert meta["layers"] == set_meta["layers"] == ",".join(str(x) for x in sorted(data))
    for i, layer in enumerate(sorted(data)):
        for side, want in zip("kv", covariances(*data[layer], objective_k, objective_v)):
            if not per_head:
                want = want.mean(axis=0, keepdims=True)
            c = got[f"{side}.covariance"][i]
            assert c.shape == want.shape
            assert np.abs(c - want).max() <= 1e-10 * np.abs(want).max()
            for h, matrix in enumerate(want):
                values, vectors = np.linalg.eigh(matrix)
                assert np.abs(got[f"{side}.eigenvalues"][i, h] - values).max() <= 1e-10 * values[-1]
                rotation = got[f"{side}.rotation"][i, h]
                assert np.abs(rotation @ rotation.T - np.eye(len(rotation))).max() < 1e-12
                assert np.abs(sets[f"{side}.rotation"][i, h] - rotation).max() <= 2 ** -24
                u = eigenvectors_of(rotation, composition)
                # Rounding turns an eigenvector by as much as its eigenvalue is near to another.
                gap = np.diff(values, prepend=-np.inf, append=np.inf)
                gap = np.minimum(gap[:-1], gap[1:]) / values[-1]
                signs = np.sign(np.sum(u * vectors, axis=0))
                assert (np.abs(u - vectors * signs).max(axis=0) <= 1e-11 + 1e-13 / gap).all()
                top = np.abs(u).argmax(axis=0)
                assert (u[top, np.arange(len(top))] > 0).all()


@pytest.mark.parametrize("objective_k,objective_v,composition,per_head", [
    ("qqt", "sst", "r_h_pbr", False), ("qqt", "sst", "r_h_pbr", True), ("ktk", "vtv", "r_h", False),
    ("qqt", "vtv", "r", True), ("ktk", "vtv", "top_h", True)])
def test_parity_on_a_real_model(tmp_path, objective_k, objective_v, composition, per_head):
    x, meta = read(SMOLLM2)
    data = {int(layer): (x["q"][i], x["k"][i], x["v"][i]) for i, layer in enumerate(meta["layers"].split(","))}
    check_parity(tmp_path, data, SMOLLM2, objective_k, objective_v, composition, per_head)


@pytest.mark.parametrize("dtype,q_heads,kv_heads,dim_k,dim_v", [
    ("F32", 6, 2, 64, 128), ("F16", 3, 1, 128, 64), ("BF16", 4, 4, 64, 64), ("F32", 1, 1, 64, 64),
    ("F32", 2, 1, 256, 128)])
def test_parity_over_shards_layers_and_types(tmp_path, dtype, q_heads, kv_heads, dim_k, dim_v):
    data = activations(5, 1300, q_heads, kv_heads, dim_k, dim_v, [3, 7, 40])
    dump = tmp_path / "dump"
    dump.mkdir()
    # Unequal shards, both ways to name tensors, layers apart in some, and a stray file.
    (dump / "README.txt").write_text("not a shard")
    rounded = {}
    for i, (a, b) in enumerate([(0, 1), (1, 600), (600, 1300)]):
        if i == 1:
            for layer, x in data.items():
                write(dump / f"shard-1-{layer}.safetensors",
                      {f"layers.{layer}.{s}": (dtype, y[a:b]) for s, y in zip("qkv", x)}, {"model": "m"})
        else:
            write(dump / f"shard-{i}.safetensors",
                  {s: (dtype, np.stack([data[layer][k][a:b] for layer in data])) for k, s in enumerate("qkv")},
                  {"layers": "3,7,40", "model": "m"})
    for layer, x in data.items():
        if dtype == "F16":
            rounded[layer] = tuple(y.astype(np.float16).astype(np.float32) for y in x)
        elif dtype == "BF16":
            rounded[layer] = tuple((y.view(np.uint32) >> 16 << 16).view(np.float32) for y in x)
        else:
            rounded[layer] = x
    check_parity(tmp_path, rounded, dump, "qqt", "sst", "r_h_pbr", False)
    _, meta = read(tmp_path / "set.safetensors")
    assert meta["model"] == "m" and "1300 tokens in 5 files" in meta["provenance"]
    check_parity(tmp_path, {7: rounded[7]}, dump, "ktk", "vtv", "r_h_pbr", True, "--layers", "7")


@pytest.mark.parametrize("dim,composition", [(80, "r_h"), (96, "top_h"), (112, "r_h"), (192, "r")])
def test_head_dims_that_are_no_powers_of_two(tmp_path, dim, composition):
    data = activations(9, 400, 2, 1, dim, dim, [0])
    dump = tmp_path / "d.safetensors"
    write(dump, {f"layers.0.{s}": ("F32", y) for s, y in zip("qkv", data[0])})
    check_parity(tmp_path, data, dump, "qqt", "sst", composition, False)
    refused = fit(dump, tmp_path / "set", "--compose", "r_h_pbr", code=1)
    assert f"r_h_pbr is defined for head_dims that are powers of two, and K has {dim}: take r_h" in refused


def test_threads_and_resuming_change_nothing(tmp_path):
    data = activations(6, 900, 4, 2, 64, 64, range(6))
    dump, state = tmp_path / "dump.safetensors", tmp_path / "state"
    write(dump, {f"layers.{n}.{s}": ("F32", y) for n, x in data.items() for s, y in zip("qkv", x)})
    fit(dump, tmp_path / "one", "--threads", "1", "--state", state)
    fit(dump, tmp_path / "many", "--threads", "5")
    want = (tmp_path / "one").read_bytes()
    assert (tmp_path / "many").read_bytes() == want
    # A fit that was cut short: one layer is missing, one broken; a third comes from the state, as its change shows.
    (state / "layer-2.safetensors").unlink()
    broken = bytearray((state / "layer-4.safetensors").read_bytes())
    broken[-5] ^= 1
    (state / "layer-4.safetensors").write_bytes(broken)
    before = (state / "layer-1.safetensors").stat().st_mtime_ns
    fit(dump, tmp_path / "again", "--state", state)
    assert (tmp_path / "again").read_bytes() == want
    assert (state / "layer-1.safetensors").stat().st_mtime_ns == before
    assert (state / "layer-2.safetensors").exists()
    # Another dump under the same name: nothing of the state is taken.
    data[1][0][:] *= 1.5
    data[1][0][:, :, 5] += 1
    write(dump, {f"layers.{n}.{s}": ("F32", y) for n, x in data.items() for s, y in zip("qkv", x)})
    fit(dump, tmp_path / "other", "--state", state)
    fit(dump, tmp_path / "fresh")
    assert (tmp_path / "other").read_bytes() == (tmp_path / "fresh").read_bytes() != want


def test_directions_without_data_get_a_fixed_basis(tmp_path):
    data = activations(7, 2000, 2, 1, 64, 64, [0])
    q, k, v = data[0]
    q[:, :, 40:] = 0
    v[:, :, 50:] = v[:, :, :14]  # rank 50, not along the axes
    dump = tmp_path / "d.safetensors"
    write(dump, {"layers.0.q": ("F32", q), "layers.0.k": ("F32", k), "layers.0.v": ("F32", v)})
    r = fit(dump, tmp_path / "set", "--published", "--compose", "r", "--spectrum", tmp_path / "s")
    assert "K: the activations span 40 of 64" in r.stderr and "V: the activations span 50 of 64" in r.stderr
    s, _ = read(tmp_path / "s")
    u = s["k.rotation"][0, 0]
    assert np.abs(u @ u.T - np.eye(64)).max() < 1e-12
    # What has no data in K are the axes 40 to 63, in their order.
    assert np.abs(u[40:, :24] - np.eye(24)).max() < 1e-9
    # V's do not lie along the axes: the basis is that of a Gram-Schmidt process over the deepest unit vectors.
    u = s["v.rotation"][0, 0][:, :14]
    projector = np.linalg.eigh(s["v.covariance"][0, 0])[1][:, :14]
    projector = projector @ projector.T
    for j in range(14):
        depth = np.diag(projector)
        i = np.argmax(depth > depth.max() * (1 - 1e-6))
        x = projector[:, i] / np.sqrt(depth[i])
        projector = projector - np.outer(x, x)
        top = np.argmax(np.abs(x) > np.abs(x).max() * (1 - 1e-6))  # the first of equals
        assert np.abs(u[:, j] - x * np.sign(x[top])).max() < 1e-6


@pytest.mark.parametrize("change,text", [
    ("nan", "layer 0, k: token 77, head 1 has NaN or Inf"),
    ("constant", "span 1 of 64 dimensions"),
    ("zero", "all zeros"),
    ("few", "fewer than head_dim 64"),
    ("dims", "these files are not of one model"),
    ("tokens", "q has 1100 tokens, v has 1099"),
    ("truncated", "lies outside the file"),
    ("no_k", "k is missing"),
    ("model", "of model b, but the files before of a"),
    ("empty", "no *.safetensors files in it; a recording is a safetensors file"),
    ("zip", "tensors saved by PyTorch do not say which layer"),
    ("pickle", "python3 -m kvd.record MODEL makes one"),
    ("heads", "k and v want the same heads"),
    ("integers", "not F16, BF16 or F32"),
    ("overflow", "impossible shape"),
])
def test_bad_dumps_make_no_set(tmp_path, change, text):
    q, k, v = activations(8, 1100, 4, 2, 64, 64, [0])[0]
    dump = tmp_path / "dump"
    dump.mkdir()
    a, second = dump / "a.safetensors", dump / "b.safetensors"
    if change == "nan":
        k[77, 1, 5] = np.nan
    elif change == "constant":
        q[:] = q[0, 0]
    elif change == "zero":
        k[:] = 0
    elif change == "few":
        q, k, v = q[:50], k[:50], v[:50]
    elif change == "tokens":
        v = v[:-1]
    elif change == "heads":
        v = v[:, :1]
    tensors = {f"layers.0.{s}": ("F32", x) for s, x in zip("qkv", (q, k, v))}
    if change == "no_k":
        del tensors["layers.0.k"]
    if change != "empty":
        write(a, tensors, {"model": "a"})
    if change == "dims":
        write(second, {f"layers.1.{s}": ("F32", np.ones((100, 2, 128))) for s in "qkv"})
    elif change == "model":
        write(second, tensors, {"model": "b"})
    elif change == "truncated":
        a.write_bytes(a.read_bytes()[:-100])
    elif change == "zip":
        a.write_bytes(b"PK\3\4" + bytes(100))
    elif change == "pickle":
        a.write_bytes(pickle.dumps({"k": list(range(100))}, 4))
    elif change == "integers":
        a.write_bytes(a.read_bytes().replace(b'"F32"', b'"I32"'))
    elif change == "overflow":
        a.write_bytes(a.read_bytes().replace(b'[1100, 4, 64]', b'[-100, 4, 64]'))
    assert text in fit(dump, tmp_path / "set", "--published", code=1)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("options,text", [
    (["-k", "sst"], "qqt, ktk or hadamard for K"), (["-k", "nonsense"], "qqt, ktk"),
    (["--layers", "5"], "layer 5 is not in the dump"), (["--layers", "3-1"], "ascending"),
    (["--published", "--clip", "1.5,0.9"], "at most 1"), (["--published", "--clip", "0.9"], "two ratios"),
    (["--threads", "0"], "from 1"), (["--clip", "0.9,0.9"], "belong to published scales"),
    (["--fit-clips", SMOLLM2], "belong to published scales"), (["--scales", "published"], "it wants scales of K and V")])
def test_bad_options(tmp_path, options, text):
    r = subprocess.run([KVCTL, "calib", "fit", SMOLLM2, tmp_path / "set", *options], capture_output=True, text=True)
    assert r.returncode != 0 and text in r.stderr
    assert not (tmp_path / "set").exists()


def test_what_cannot_be_done_at_the_end_is_said_before_the_work(tmp_path):
    state, out = tmp_path / "state", tmp_path / "set"
    missing = tmp_path / "missing/set"
    (tmp_path / "file").write_text("")
    for where, says in ((missing, f"{missing} cannot be written: {missing.parent}: No such file or directory"),
                        (tmp_path / "file/set", "Not a directory"), (tmp_path, f"{tmp_path} is a folder, and the name of a file is wanted")):
        assert says in fit(SMOLLM2, where, "--state", state, code=1)
        assert says in fit(SMOLLM2, out, "--spectrum", where, "--state", state, code=1)
        assert says in fit(SMOLLM2, where, "--codec", "tc2", code=1)
        r = subprocess.run([KVCTL, "calib", "eval", SMOLLM2, tmp_path / "no set", "--html", where], capture_output=True, text=True, timeout=300)
        assert r.returncode == 1 and says in r.stderr
    assert f"{tmp_path / 'none'}: No such file" in fit(SMOLLM2, out, "--published", "--fit-clips", tmp_path / "none", "--state", state, code=1)
    assert not state.exists() and not out.exists()
    r = subprocess.run([KVCTL, "calib", "fit", SMOLLM2, "set", "--state", state], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0 and out.exists() and state.exists(), r.stderr


def test_a_fitted_set_goes_into_a_store_and_out(tmp_path):
    printed = fit(SMOLLM2, tmp_path / "set.safetensors").stdout.split()[-1]
    store = tmp_path / "store"
    said = subprocess.run([KVCTL, "--store", store, "calib", "publish", tmp_path / "set.safetensors", "Smol/LM@fitted"],
                          check=True, capture_output=True, text=True).stdout
    shown = json.loads(subprocess.run([KVCTL, "--json", "--store", f"file://{store}", "--cache", tmp_path / "cache",
                                       "calib", "show", "Smol/LM@fitted"], check=True, capture_output=True).stdout)
    assert shown["objective"] == "K ktk_top_h, V vtv_top_h, per kv head" and shown["digest"] in said
    assert shown["layers"] == "0,9,19,29" and shown["model"] == "Smol/LM"
    # It is published as it is, whatever the file calls its model.
    assert shown["digest"] == printed
    published = store / f"objects/sha256/{printed[7:]}.safetensors"
    assert published.read_bytes() == (tmp_path / "set.safetensors").read_bytes()
    assert json.loads((store / "models/Smol/LM.json").read_text())["model"] == "Smol/LM"


def test_the_recommended_settings_are_those_without_options(tmp_path):
    """And each can be turned off."""
    def said(*options):
        fit(SMOLLM2, tmp_path / "set", *options)
        tensors, meta = read(tmp_path / "set")
        heads = tensors["k.rotation"].shape[1]
        assert ("per kv head" in meta["objective"]) == (heads == 3) and heads in (1, 3)
        return meta["objective"].removesuffix(", per kv head"), heads, meta.get("k.scale"), meta.get("v.scale")

    best, published = ("K ktk_top_h, V vtv_top_h", 3, "unbiased", "least-squares"), ("K qqt_r_h_pbr, V sst_r_h_pbr", 1, None, None)
    assert said() == best
    assert said("-k", "ktk", "-v", "vtv", "--compose", "top_h", "--scales", "unbiased,least-squares") == best
    assert said("--published") == published
    assert said("-k", "qqt", "-v", "sst", "--compose", "r_h_pbr", "--per-layer", "--scales", "published,published") == published
    assert said("--per-layer", "--compose", "r_h") == ("K ktk_r_h, V vtv_r_h", 1, "unbiased", "least-squares")
    assert said("--published", "-k", "ktk", "--scales", "least-squares,published") == (
        "K ktk_r_h_pbr, V sst_r_h_pbr", 1, "least-squares", "published")


@pytest.mark.parametrize("name,options", [("rotations", ()), ("tc2", ("--codec", "tc2"))])
def test_the_sets_of_the_quickstart_are_made_as_recommended(tmp_path, name, options):
    fit(SMOLLM2, tmp_path / "set", *options)
    (ours, made), (shipped, told) = read(tmp_path / "set"), read(SMOLLM2.with_name(f"smollm2-{name}.safetensors"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in shipped.items()}
    same = ("format", "model", "objective", "layers", "k.scale", "v.scale", "codec")
    assert [made.get(key) for key in same] == [told.get(key) for key in same]
    assert int(told["fitted_length"]) == {"rotations": 2048, "tc2": 8192}[name]  # all that the model was made for


def test_hadamard_needs_no_data_of_its_side(tmp_path):
    fit(SMOLLM2, tmp_path / "set", "--per-layer", "-k", "hadamard", "-v", "hadamard")
    s, meta = read(tmp_path / "set")
    assert meta["objective"] == "K hadamard, V hadamard"
    assert np.abs(s["k.rotation"][2, 0] - hadamard(64)).max() < 1e-7


# -- transforms -------------------------------------------------------------------------------------------------------

QUARTERS = {"tc2": (4, 2, 1, 1), "tc2.5": (4, 3, 2, 1)}
DISTORTION = np.array([1, .363, .1175, .0345, .0095])


def floored(values, part):
    return np.maximum(values, part * values.max())


def bits_of_tiles(codec, values, greedy):
    tiles = len(values) // 16
    if not greedy and tiles % 4 == 0:
        return np.repeat(QUARTERS[codec], tiles // 4)
    bits, energy = np.zeros(tiles, int), values.reshape(tiles, 16).sum(axis=1)
    for _ in range({"tc2": 4, "tc2.5": 5}[codec] * tiles // 2):
        drop = np.where(bits < 4, energy * (DISTORTION[bits] - DISTORTION[np.minimum(bits + 1, 4)]), -1)
        bits[drop.argmax()] += 1
    return bits


def looked_at(q, keys, window):
    """What a recording's keys weigh: squares of the attention that 128 positions at most give them past a recent window and a sink."""
    tokens, weights = len(keys), np.full(len(keys), 1e-9)
    n = min(128, max(0, tokens - 320))
    for at in (320 + (i + 1) * (tokens - 320) // n - 1 for i in range(n)):
        begin = max(0, at + 1 - window) if window else 0
        p = q[at] @ keys[begin:at + 1].T / np.sqrt(keys.shape[1])
        p = np.exp(p - p.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        for t in range(max(64, begin), at + 1 - 256):
            weights[t] += np.sum(p[:, t - begin] ** 2)
    return weights


def moved_by(q, keys, values, g, window):
    """What a prompt's answers depend on: of each logit at its last 64 positions the square of what it does to the loss, for keys that are
    compressed; summed by key, and over q q^T."""
    tokens, weights, moments = len(keys), np.zeros(len(keys)), 0
    for at in range(max(0, tokens - 64), tokens):
        begin = max(0, at + 1 - window) if window else 0
        p = q[at] @ keys[begin:at + 1].T / np.sqrt(keys.shape[1])
        p = np.exp(p - p.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        moves = g[at] @ values[begin:at + 1].T
        squares = (p * (moves - np.sum(p * moves, axis=1, keepdims=True))) ** 2
        squares[:, :max(64 - begin, 0)] = 0
        squares[:, max(at + 1 - 256 - begin, 0):] = 0
        weights[begin:at + 1] += squares.sum(axis=0)
        moments = moments + (q[at].T * squares.sum(axis=1)) @ q[at]
    return weights, moments


def asked_of(prompts, window):
    """By layer and kv head: weights of each prompt's keys, and moments, where all prompts weigh alike."""
    out = {}
    for prompt in prompts:
        found = {}
        for layer, x in prompt.items():
            q, k, v, g = (y.astype(np.float64) for y in x)
            group = q.shape[1] // k.shape[1]
            for h in range(k.shape[1]):
                mine = slice(h * group, (h + 1) * group)
                found[layer, h] = k[:, h], *moved_by(q[:, mine], k[:, h], v[:, h], g[:, mine], window)
        total = sum(np.trace(moments) for _, _, moments in found.values())
        for at, (keys, weights, moments) in found.items():
            out.setdefault(at, []).append((keys, weights / total, moments / total))
    return out


def costs_of_gains(q, keys, cuts, x, sigma, window, asked=()):
    """Squares of errors, by gain of a channel's deviation: 0.8 to 2; of keys past each recording's sink, as they are looked at."""
    weights = np.concatenate([looked_at(q[a:b], keys[a:b], window)[64:] for a, b in cuts])
    keys = np.concatenate([keys[a + 64:b] for a, b in cuts])
    of_asked = sum(w[64:].sum() for _, w, _ in asked)
    costs = costs_of(weights / weights.sum(), keys, x, sigma)
    return costs + sum(costs_of(w[64:] / of_asked, k[64:], x, sigma) for k, w, _ in asked) if of_asked else costs


def costs_of(weights, keys, x, sigma):
    bits = np.repeat(x["k.bits"], 16).astype(int)
    step, top = np.array([1, 1.5958, 0.9957, 0.5860, 0.3352], np.float32).astype(float)[bits], 2.0 ** bits - 1
    y = (keys - x["k.mean"]) @ x["k.transform"] / sigma
    scale = np.sqrt(np.mean(y[:, bits > 0] ** 2, axis=1, keepdims=True))
    y, costs = y / scale, []
    for gain in np.arange(8, 21) / 10:
        e = y - gain * step * (np.clip(np.ceil(y / (gain * step) + top / 2 - 0.5), 0, top) - top / 2)
        costs.append(weights @ (e * scale) ** 2)
    return np.array(costs)


def check_transforms(data, sets, meta, codec, greedy, cuts=None, window=0, prompts=()):
    """The set in fp32 against the fit of each head in double precision."""
    asked = asked_of(prompts, window)
    assert meta["format"] == "kvd-rotation-set/3" and meta["codec"] == codec
    for i, layer in enumerate(sorted(data)):
        q, k, v = (x.astype(np.float64) for x in data[layer])
        group = q.shape[1] // k.shape[1]
        for h in range(k.shape[1]):
            x = {name: t[i, h].astype(np.float64) for name, t in sets.items()}
            rows, keys, values = q[:, h * group:(h + 1) * group].reshape(-1, q.shape[2]), k[:, h], v[:, h]
            dim = keys.shape[1]
            weight = rows.T @ rows
            weight *= dim / np.trace(weight)
            mine = asked.get((layer, h), ())
            moments = sum(m for _, _, m in mine)
            if np.any(moments):
                weight = weight / 2 + moments * dim / np.trace(moments) / 2
            of_weight, u = np.linalg.eigh(weight)
            of_weight = floored(of_weight, 1e-6)
            root, back = ((u * of_weight ** p) @ u.T for p in (.5, -.5))
            centred = keys - keys.mean(axis=0)
            variances, u = np.linalg.eigh(root @ (centred.T @ centred / len(keys)) @ root)
            variances, u = variances[::-1], u[:, ::-1]
            gap = -np.diff(variances, prepend=np.inf, append=-np.inf)
            variances = floored(variances, 1e-8)
            u = u * np.sign(u[np.abs(u).argmax(axis=0), np.arange(dim)])
            assert np.abs(x["k.mean"] - keys.mean(axis=0)).max() <= 1e-6 * np.abs(keys).max()
            assert (x["k.bits"] == bits_of_tiles(codec, variances, greedy)).all()
            gains = x["k.sigma"] / np.sqrt(variances)
            assert gains == pytest.approx(np.round(gains, 1), rel=1e-5)
            cost = costs_of_gains(q[:, h * group:(h + 1) * group], keys, [(0, len(keys))] if cuts is None else cuts, x, np.sqrt(variances), window,
                                  mine)
            chosen = np.take_along_axis(cost, np.round(gains * 10 - 8).astype(int)[None], axis=0)[0]
            assert (chosen <= cost.min(axis=0) * (1 + 1e-4)).all()
            assert (gains[np.repeat(x["k.bits"], 16) == 0] == pytest.approx(1)) and len(set(np.round(gains, 1))) > 2
            # Rounding turns an eigenvector by as much as its eigenvalue is near to another: some say nothing.
            slack = 1e-6 + 1e-13 * variances[0] / np.minimum(gap[:-1], gap[1:])
            sure = slack < 1e-3
            assert sure.sum() >= dim / 2
            assert (np.abs(x["k.transform"] - root @ u).max(axis=0) <= slack * np.abs(root).max())[sure].all()
            assert (np.abs(x["k.inverse"] - u.T @ back).max(axis=1) <= slack * np.abs(back).max())[sure].all()
            assert np.abs(x["k.transform"] @ x["k.transform"].T - root @ root).max() <= 1e-5 * (root @ root).max()
            assert np.abs(x["k.transform"] @ x["k.inverse"] - np.eye(dim)).max() < 1e-4
            assert np.abs(x["v.mean"] - values.mean(axis=0)).max() <= 1e-6 * np.abs(values).max()
            moments, u = np.linalg.eigh(values.T @ values / len(values))
            u = u * np.sign(u[np.abs(u).argmax(axis=0), np.arange(len(u))])
            gap = np.diff(moments, prepend=-np.inf, append=np.inf)
            slack = 1e-6 + 1e-13 * moments[-1] / np.minimum(gap[:-1], gap[1:])
            assert (np.abs(eigenvectors_of(x["v.transform"], "top_h") - u).max(axis=0) <= slack).all()
            assert (x["v.inverse"] == x["v.transform"].T).all()


@pytest.mark.parametrize("codec,bits", [("tc2", "quarters"), ("tc2.5", "greedy")])
def test_transforms_of_a_real_model(tmp_path, codec, bits):
    x, meta = read(SMOLLM2)
    data = {int(layer): (x["q"][i], x["k"][i], x["v"][i]) for i, layer in enumerate(meta["layers"].split(","))}
    fit(SMOLLM2, tmp_path / "set", "--codec", codec, "--bits", bits)
    check_transforms(data, *read(tmp_path / "set"), codec, bits == "greedy")


@pytest.mark.parametrize("codec,q_heads,kv_heads,dim_k,dim_v", [
    ("tc2", 3, 1, 80, 80), ("tc2.5", 2, 1, 128, 64), ("tc2.5", 1, 1, 112, 112)])
def test_transforms_over_shards_and_head_dims(tmp_path, codec, q_heads, kv_heads, dim_k, dim_v):
    data = activations(11, 300, q_heads, kv_heads, dim_k, dim_v, [2, 5])
    for layer in data:
        data[layer][1][:] += 20 * np.cos(np.arange(dim_k, dtype=np.float32))  # K's mean is most of it
    dump = tmp_path / "dump"
    dump.mkdir()
    for i, (a, b) in enumerate([(0, 100), (100, 300)]):
        write(dump / f"{i}.safetensors", {f"layers.{layer}.{s}": ("F32", y[a:b]) for layer, x in data.items()
                                          for s, y in zip("qkv", x)})
    said = fit(dump, tmp_path / "set", "--codec", codec, "--threads", "1").stderr
    assert "no file has more than 200 tokens" in said and "contexts of more than 320" in said
    fit(dump, tmp_path / "again", "--codec", codec, "--threads", "2")
    assert (tmp_path / "set").read_bytes() == (tmp_path / "again").read_bytes()
    check_transforms(data, *read(tmp_path / "set"), codec, True, [(0, 100), (100, 300)])
    assert "bits greedy" in read(tmp_path / "set")[1]["objective"]
    fit(dump, tmp_path / "part", "--codec", codec, "--layers", "5", "--bits", "quarters")
    check_transforms({5: data[5]}, *read(tmp_path / "part"), codec, False, [(0, 100), (100, 300)])


@pytest.mark.parametrize("window", [0, 300])
def test_deviations_are_fitted_to_what_queries_look_at(tmp_path, window):
    """Recordings of other lengths, one of which is too short for a history; and layers that see no more than a window."""
    data = activations(13, 1100, 4, 2, 64, 64, [3])
    cuts = [(0, 330), (330, 480), (480, 1100)]
    for q, k, _ in data.values():
        q *= 0.02  # logits of some units
        k[100:1000:50] *= 5
    dump = tmp_path / "dump"
    dump.mkdir()
    for i, (a, b) in enumerate(cuts):
        write(dump / f"{i}.safetensors", {f"layers.3.{s}": ("F32", y[a:b]) for s, y in zip("qkv", data[3])}, {"windows": str(window)})
    assert "no file has" not in fit(dump, tmp_path / "set", "--codec", "tc2").stderr
    sets, meta = read(tmp_path / "set")
    check_transforms(data, sets, meta, "tc2", True, cuts, window)
    with pytest.raises(AssertionError):
        check_transforms(data, sets, meta, "tc2", True, cuts, 0 if window else 300)


@pytest.mark.parametrize("window", [0, 300])
def test_half_of_what_decides_is_what_answers_depend_on(tmp_path, window):
    """Prompts whose gradients are large weigh no more than others; a head that no answer depends on is left to the recordings."""
    def dump_of(name, files):
        (tmp_path / name).mkdir()
        for i, data in enumerate(files):
            write(tmp_path / name / f"{i}.safetensors", {f"layers.{n}.{s}": ("F32", y) for n, x in data.items() for s, y in zip("qkvg", x)},
                  {"windows": ",".join([str(window)] * len(data))})
        return tmp_path / name

    rng, data, prompts = np.random.default_rng(3), activations(14, 700, 4, 2, 64, 64, [3, 8]), []
    for i in range(3):
        x = activations(20 + i, 500, 4, 2, 64, 64, [3, 8])
        g = {n: 100 ** i * rng.standard_normal((500, 4, 64)).astype(np.float32) for n in x}
        g[8][:, 2:] = 0  # the second kv head's
        prompts.append({n: (*x[n], g[n]) for n in x})
    for x in (data, *prompts):
        for q, *_ in x.values():
            q *= 0.02
    dump, asked = dump_of("dump", [data]), dump_of("asked", prompts)
    fit(dump, tmp_path / "set", "--codec", "tc2", "--asked", asked, "--threads", "1")
    fit(dump, tmp_path / "again", "--codec", "tc2", "--asked", asked, "--threads", "2")
    assert (tmp_path / "set").read_bytes() == (tmp_path / "again").read_bytes()
    sets, meta = read(tmp_path / "set")
    assert "K qqt, asked and ktk" in meta["objective"]
    check_transforms(data, sets, meta, "tc2", True, None, window, prompts)
    for others in ((), prompts[:2]):
        with pytest.raises(AssertionError):
            check_transforms(data, sets, meta, "tc2", True, None, window, others)
    fit(dump, tmp_path / "part", "--codec", "tc2", "--asked", asked, "--layers", "8")
    assert (read(tmp_path / "part")[0]["k.transform"][0] == sets["k.transform"][1]).all()  # whatever layers are wanted
    less = dump_of("less", [{n: x[:3] for n, x in prompts[0].items()}])
    of_one = dump_of("of_one", [{3: prompts[0][3]}])
    wider = {n: (np.repeat(q, 2, 1), k, v, np.repeat(g, 2, 1)) for n, (q, k, v, g) in prompts[0].items()}
    for name, why in ((less, "no gradients of the answers' loss"), (of_one, "layer 8 is not among those"),
                      (dump_of("wider", [wider]), "have 8 heads of 64 where the activations have 4 of 64")):
        assert why in fit(dump, tmp_path / "none", "--codec", "tc2", "--asked", name, code=1)
    assert not (tmp_path / "none").exists()


def test_queries_of_little_rank_make_no_transform_that_cannot_be_undone(tmp_path):
    data = activations(12, 300, 2, 1, 64, 64, [0])
    data[0][0][:, :, 33:] = 0
    data[0][0][:, :, 0] *= 1000
    dump = tmp_path / "d.safetensors"
    write(dump, {f"layers.0.{s}": ("F32", y) for s, y in zip("qkv", data[0])})
    said = fit(dump, tmp_path / "set", "--codec", "tc2").stderr
    assert "layer 0, kv head 0, q: the activations span" in said
    shown = json.loads(subprocess.run([KVCTL, "calib", "show", "--json", tmp_path / "set"], check=True, capture_output=True).stdout)
    assert shown["codec"] == "tc2" and shown["bits"] == 2.25 and shown["inverses"] < 1e-3
    data[0][0][:] = 0
    write(dump, {f"layers.0.{s}": ("F32", y) for s, y in zip("qkv", data[0])})
    assert "q is all zeros" in fit(dump, tmp_path / "none", "--codec", "tc2", code=1)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("options,text", [
    (["--codec", "int2"], "tc2 or tc2.5"), (["--codec", "tc2", "--bits", "some"], "quarters or greedy"),
    (["--bits", "greedy"], "goes with --codec"), (["--codec", "tc2", "--compose", "r"], "--compose is of rotations"),
    (["--codec", "tc2", "--layers", "5"], "layer 5 is not in the dump")])
def test_bad_options_of_transforms(tmp_path, options, text):
    test_bad_options(tmp_path, options, text)
