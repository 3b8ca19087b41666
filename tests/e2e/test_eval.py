"""kvctl calib eval and fit --fit-clips against attention over quantized tokens, written out in NumPy."""
import json
import re
import subprocess

import numpy as np
import pytest

from conftest import KVCTL
from dumps import SMOLLM2, activations, read, write

CONTEXT, QUERIES = 640, 32


def quantized(x, rotation, ratio):
    """int2 as DESIGN.md has it, by rows; scale and min in fp16."""
    y = x.astype(np.float64) @ rotation.astype(np.float64)
    n = y.shape[-1]
    if ratio < 1:
        limit = np.sort(np.abs(y), axis=-1)[..., int(np.float32(ratio) * np.float64(n)), None]
        y = np.clip(y, -limit, limit)
    low, high = y.min(axis=-1, keepdims=True), y.max(axis=-1, keepdims=True)
    scale = (high - low) / 3
    codes = np.floor((y - low) / np.where(scale > 0, scale, 1) + 0.5)
    return (codes * scale.astype(np.float16) + low.astype(np.float16)) @ rotation.astype(np.float64).T


def fitted(x, rotation, scales):
    """int2 with scales that are fitted to the row (kernels/README.md)."""
    y = x.astype(np.float64) @ rotation.astype(np.float64)
    mean = y.mean(axis=-1, keepdims=True)
    scale = 0.9957 * y.std(axis=-1, keepdims=True)
    low = mean - 1.5 * scale
    for refit in range(3):
        codes = np.clip(np.floor((y - low) / scale + 0.5), 0, 3)
        centre = codes.mean(axis=-1, keepdims=True)
        products = np.sum((codes - centre) * (y - mean), axis=-1, keepdims=True)
        if refit < 2:
            scale = products / np.sum((codes - centre) ** 2, axis=-1, keepdims=True)
            low = mean - scale * centre
    if scales == "unbiased":
        scale = np.sum((y - mean) ** 2, axis=-1, keepdims=True) / products
        low = mean - scale * centre
    return (codes * scale.astype(np.float16) + low.astype(np.float16)) @ rotation.astype(np.float64).T


def visible(tokens, positions, window):
    """[positions, tokens]: which of all tokens the last positions see."""
    back = tokens - positions + np.arange(positions)[:, None] - np.arange(tokens)[None, :]
    return (back >= 0) & (back < (window or tokens))


def attention(q, k, v, window):
    """q [positions, group, D] are the last positions. Logits, probabilities, outputs."""
    logits = np.einsum("pgd,td->pgt", q, k) / np.sqrt(k.shape[1])
    seen = visible(len(k), len(q), window)
    logits = np.where(seen[:, None, :], logits, -np.inf)
    w = np.where(seen[:, None, :], np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
    p = w / w.sum(axis=-1, keepdims=True)
    return logits, p, np.einsum("pgt,td->pgd", p, v)


STEPS = np.array([0, 1.5958, 0.9957, 0.5860, 0.3352], np.float32).astype(np.float64)


def transformed(x, sets, i, h, side):
    """Codecs tc2 and tc2.5 as calib/transforms.h has them."""
    t = {name: value[i, h].astype(np.float64) for name, value in sets.items() if name.startswith(side)}
    y = (x - t[f"{side}.mean"]) @ t[f"{side}.transform"]
    dim = y.shape[1]
    sigma = t["k.sigma"] if side == "k" else np.ones(dim)
    bits = np.repeat(t["k.bits"], 16).astype(int) if side == "k" else np.full(dim, 2)
    step, top, coded = STEPS[bits], 2.0 ** bits - 1, bits > 0
    scale, c = np.sqrt(np.mean((y / sigma)[:, coded] ** 2, axis=1, keepdims=True)), y
    for refit in range(2 if side == "k" else 3):
        if refit:
            scale = np.sum(c * y, axis=1, keepdims=True) / np.sum(c * c, axis=1, keepdims=True)
        codes = np.clip(np.ceil(y / (sigma * scale) / np.where(coded, step, 1) + top / 2 - 0.5), 0, top)
        c = np.where(coded, sigma * step * (codes - top / 2), 0)
    scale = np.sum(y[:, coded] ** 2, axis=1, keepdims=True) / np.sum(c * y, axis=1, keepdims=True)
    return c * scale.astype(np.float16) @ t[f"{side}.inverse"] + t[f"{side}.mean"]


def figures(x, sets, i, sink, recent, scales=("published", "published"), window=0):
    """Of layer i of the model's tensors, over all whole contexts."""
    def through(rows, side, m, kind):
        if "k.transform" in sets:
            return transformed(rows, sets, i, m, side)
        r = sets[f"{side}.rotation"][i, m]
        return quantized(rows, r, sets[f"{side}.clip"][i, m]) if kind == "published" else fitted(rows, r, kind)

    q, k, v = (x[s][i].astype(np.float64) for s in "qkv")
    group, begin = q.shape[1] // k.shape[1], sink
    end = sink + (CONTEXT - sink - max(recent, QUERIES)) // 16 * 16
    difference, norm, logit, bias, kl, moved = [], [], [], [], [], np.zeros((len(k) // CONTEXT, QUERIES))
    for h in range(k.shape[1]):
        d = n = 0
        for at in range(0, len(k) - CONTEXT + 1, CONTEXT):
            keys, values = k[at:at + CONTEXT, h], v[at:at + CONTEXT, h]
            asks = q[at + CONTEXT - QUERIES:at + CONTEXT, h * group:(h + 1) * group]
            keys2, values2 = keys.copy(), values.copy()
            m = h if next(iter(sets.values())).shape[1] > 1 else 0
            keys2[begin:end] = through(keys[begin:end], "k", m, scales[0])
            values2[begin:end] = through(values[begin:end], "v", m, scales[1])
            logits, p, o = attention(asks, keys, values, window)
            logits2, p2, o2 = attention(asks, keys2, values2, window)
            d, n = d + np.sum((o2 - o) ** 2), n + np.sum(o ** 2)
            if "g" in x:
                g = x["g"][i][at + CONTEXT - QUERIES:at + CONTEXT, h * group:(h + 1) * group]
                moved[at // CONTEXT] += np.sum(g * (o2 - o), axis=(1, 2))
            seen = visible(len(keys), QUERIES, window)[:, begin:end]
            asking = seen.any(axis=-1)  # the queries that see history at all
            error = np.where(seen[:, None, :], (asks[:, :, None, :] * (keys2 - keys)[None, None, begin:end]).sum(axis=-1), 0) / np.sqrt(keys.shape[1])
            if asking.any():
                logit.append((np.sum(error ** 2), seen.sum() * group))
                strongest = logits[asking][..., begin:end].argmax(axis=-1)[..., None]
                bias += list(np.take_along_axis(error[asking], strongest, axis=-1).ravel())
            with np.errstate(divide="ignore", invalid="ignore"):
                kl.append(np.where(p > 0, p * np.log(p / p2), 0).sum(axis=-1).mean())
        difference.append(d), norm.append(n)
    squares, of = np.sum(logit, axis=0) if logit else (0, 1)
    return {"output_error": np.sqrt(sum(difference) / sum(norm)), "logit_error": np.sqrt(squares / of),
            "worst_head": np.sqrt(np.max(np.array(difference) / norm)), "bias": np.mean(bias or [0]),
            "kl": np.mean(kl), **({"moved": np.sqrt(np.sum(moved ** 2, axis=1)).mean()} if "g" in x else {})}


def kvctl(*arguments, code=0):
    r = subprocess.run([KVCTL, "calib", *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert r.returncode == code, r.stdout + r.stderr
    return r.stderr if code else r.stdout


PER_HEAD = ("-k", "ktk", "-v", "vtv", "--compose", "top_h", "--scales", "published,published")


@pytest.mark.parametrize("codec,bits,average", [("tc2", "greedy", 2.25), ("tc2.5", "quarters", 2.5)])
def test_figures_of_transforms_agree_with_numpy(tmp_path, codec, bits, average):
    kvctl("fit", SMOLLM2, tmp_path / "set", "--codec", codec, "--bits", bits)
    report = json.loads(kvctl("eval", SMOLLM2, tmp_path / "set", "--json", "-c", CONTEXT, "-q", QUERIES, "--sink", 16,
                              "--recent", 100, "--codecs", f"{codec},bf16", "--html", tmp_path / "page.html"))
    got, bf16 = report["sets"]
    assert (got["name"], got["codec"], got["bits"], got["activations"]) == (f"set {codec}", codec, average, "fitted")
    assert bf16["codec"] == "bf16" and f"set {codec}" in (tmp_path / "page.html").read_text()
    x, _ = read(SMOLLM2)
    sets, _ = read(tmp_path / "set")
    for mode, sink, recent in (("windows", 16, 100), ("no_windows", 0, 0)):
        for i, layer in enumerate(("0", "9", "19", "29")):
            for name, want in figures(x, sets, i, sink, recent).items():
                assert got[mode]["layers"][layer][name] == pytest.approx(want, rel=5e-3, abs=5e-4), (mode, layer, name)


@pytest.mark.parametrize("options", [("--published",), (*PER_HEAD, "--clip", "0.93,0.88")])
def test_figures_agree_with_numpy(tmp_path, options):
    kvctl("fit", SMOLLM2, tmp_path / "set", *options)
    report = json.loads(kvctl("eval", SMOLLM2, tmp_path / "set", "--json", "-c", CONTEXT, "-q", QUERIES,
                              "--sink", 16, "--recent", 100, "--html", tmp_path / "page.html"))
    assert [s["name"] for s in report["sets"]] == [
        "naive", "hadamard", "set", "set int2c", "set int2-lm", *(["set 0.96/0.92"] if "--clip" in options else []), "turboquant-2",
        "turboquant-3", "turboquant-4", "bf16"]
    bits = {s["codec"]: s["bits"] for s in report["sets"]}  # head_dim 64: 32 or 16 bits of parameters for 64 codes
    assert bits == {"int2": 2.5, "int2c": 2.25, "int2-lm": 2.5, "turboquant-2": 2.25, "turboquant-3": 3.25,
                    "turboquant-4": 4.25, "bf16": 16}
    error = {s["name"]: s["windows"]["output_error"] for s in report["sets"]}
    assert error["bf16"] < 1e-6 < error["turboquant-4"] < error["turboquant-3"] < error["turboquant-2"] < error["naive"]
    assert error["set int2c"] == pytest.approx(error["set"], rel=0.15)
    x, _ = read(SMOLLM2)
    sets, _ = read(tmp_path / "set")
    for mode, sink, recent in (("windows", 16, 100), ("no_windows", 0, 0)):
        got = report["sets"][2][mode]["layers"]
        for i, layer in enumerate(("0", "9", "19", "29")):
            for name, want in figures(x, sets, i, sink, recent).items():
                assert got[layer][name] == pytest.approx(want, rel=2e-3, abs=1e-4), (mode, layer, name)
        errors = [layer["output_error"] for layer in got.values()]
        assert report["sets"][2][mode]["output_error"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    naive, fitted = (report["sets"][i]["windows"]["output_error"] for i in (0, 2))
    assert fitted < naive / 3
    page = (tmp_path / "page.html").read_text()
    assert f"<td>{fitted:.4f}" in page and page.count("<svg") == page.count("</svg>") == 5
    assert "http" not in page and "nan" not in page


def test_queries_see_what_sliding_windows_let_them(tmp_path):
    x, metadata = read(SMOLLM2)
    windows = {"0": 300, "9": 0, "19": 48, "29": 110}  # of the third layer no query sees history, of the last some do
    write(tmp_path / "dump", {s: ("BF16", x[s]) for s in "qkv"}, {**metadata, "windows": ",".join(map(str, windows.values()))})
    kvctl("fit", tmp_path / "dump", tmp_path / "set", *PER_HEAD)
    report = json.loads(kvctl("eval", tmp_path / "dump", tmp_path / "set", "--json", "-c", CONTEXT, "-q", QUERIES,
                              "--sink", 16, "--recent", 100, "--codecs", "int2"))
    got = next(s for s in report["sets"] if s["name"] == "set")
    sets, _ = read(tmp_path / "set")
    for mode, sink, recent in (("windows", 16, 100), ("no_windows", 0, 0)):
        for i, (layer, window) in enumerate(windows.items()):
            for name, want in figures(x, sets, i, sink, recent, window=window).items():
                assert got[mode]["layers"][layer][name] == pytest.approx(want, rel=3e-3, abs=3e-4), (mode, layer, name)
    assert set(got["windows"]["layers"]["19"].values()) == {0}


def graded(x, layers, rng):
    """Tensors of layers by their ids, with gradients, and these as one of all layers."""
    g = rng.standard_normal(x["q"].shape).astype(np.float32) * np.exp2(rng.integers(-8, 3, (len(layers), 1, x["q"].shape[2], 1)))
    return {f"layers.{n}.{s}": ("F32", y[i]) for i, n in enumerate(layers) for s, y in {**x, "g": g}.items()}, g


def test_by_how_much_a_loss_is_moved(tmp_path):
    """The errors of outputs by the loss's gradients, over all heads of a position: against NumPy."""
    x, _ = read(SMOLLM2)
    layers = (0, 9, 19, 29)
    tensors, x["g"] = graded(x, layers, np.random.default_rng(3))
    write(tmp_path / "dump", tensors, {})
    kvctl("fit", SMOLLM2, tmp_path / "set", "--codec", "tc2")
    got, bf16 = json.loads(kvctl("eval", tmp_path / "dump", tmp_path / "set", "--json", "-c", CONTEXT, "-q", QUERIES, "--sink", 16,
                                 "--recent", 100, "--codecs", "tc2,bf16"))["sets"]
    sets, _ = read(tmp_path / "set")
    for mode, sink, recent in (("windows", 16, 100), ("no_windows", 0, 0)):
        by_layer = got[mode]["layers"]
        for i, layer in enumerate(layers):
            assert by_layer[str(layer)]["moved"] == pytest.approx(figures(x, sets, i, sink, recent)["moved"], rel=5e-3)
            assert bf16[mode]["layers"][str(layer)].get("moved", 0) < 1e-4 * by_layer[str(layer)]["moved"]
        assert got[mode]["moved"] == pytest.approx(np.sqrt(sum(y["moved"] ** 2 for y in by_layer.values())))
    plain = json.loads(kvctl("eval", SMOLLM2, tmp_path / "set", "--json", "-c", CONTEXT, "--codecs", "tc2"))["sets"][0]["windows"]
    assert "moved" not in plain and "moved" not in plain["layers"]["9"]


@pytest.mark.parametrize("change,says", [
    (lambda t: t.pop("layers.9.g"), "layer 9 has no gradients, unlike those before"),
    (lambda t: t.pop("layers.0.g"), "layer 9 has gradients, unlike those before"),
    (lambda t: t.update({"layers.9.g": ("F32", t["layers.9.g"][1][:-1])}), "layer 9: g is not F16, BF16 or F32 [tokens, heads of q, head_dim of v]"),
    (lambda t: t.update({"layers.9.g": ("F32", t["layers.9.v"][1])}), "layer 9: g is not F16, BF16 or F32 [tokens, heads of q, head_dim of v]"),
    (lambda t: t["layers.9.g"][1].__setitem__((630, 2, 5), np.inf), "NaN or Inf")])
def test_gradients_that_are_refused(tmp_path, change, says):
    x, _ = read(SMOLLM2)
    tensors, _ = graded({s: y[:2] for s, y in x.items()}, (0, 9), np.random.default_rng(3))
    kvctl("fit", SMOLLM2, tmp_path / "set", "--codec", "tc2")
    change(tensors)
    write(tmp_path / "dump", tensors, {})
    assert says in kvctl("eval", tmp_path / "dump", tmp_path / "set", "-c", CONTEXT, "-q", QUERIES, code=1)


def test_windows_are_a_number_for_each_layer(tmp_path):
    """Layers are named in any order; their windows are in that of their ids."""
    side = {layer: activations(layer, 600, 2, 1, 64, 64, [layer])[layer] for layer in (4, 10, 2)}
    tensors = {f"layers.{n}.{s}": ("F32", x) for n, of in side.items() for s, x in zip("qkv", of)}
    (tmp_path / "dump").mkdir()
    write(tmp_path / "dump/0.safetensors", tensors, {"windows": "32,0,300"})
    kvctl("fit", tmp_path / "dump", tmp_path / "set")
    asked = ("eval", tmp_path / "dump", tmp_path / "set", "--json", "-c", 600, "-q", 8, "--sink", 0, "--recent", 64)
    figures_of = next(s for s in json.loads(kvctl(*asked))["sets"] if s["name"] == "set")["windows"]["layers"]
    assert figures_of["2"]["kl"] == 0 and figures_of["4"]["kl"] > 0 and figures_of["10"]["kl"] > 0
    write(tmp_path / "dump/1.safetensors", tensors, {"windows": "32,0,301"})
    assert "layer 10: a window of 301, but 300 in the files before" in kvctl(*asked, code=1)
    (tmp_path / "dump/1.safetensors").unlink()
    for windows in ("32,0", "32,0,300,1", "32,,300", "32,0,-1", "32,0,99999999999", "a", "32, 0,300", "32,0,300,"):
        write(tmp_path / "dump/0.safetensors", tensors, {"windows": windows})
        assert f"metadata windows is '{windows}', not a number for each of the file's 3 layers" in kvctl(*asked, code=1)


@pytest.mark.long
def test_scales(tmp_path):
    """A set's scales are used, and --scales compares kinds: against NumPy; unbiased keys are seen as strong as they are."""
    for name, options in (("plain", ("--published",)), ("set", ("--published", "--scales", "unbiased,least-squares"))):
        kvctl("fit", SMOLLM2, tmp_path / name, *options)
    common = ("--json", "-c", CONTEXT, "-q", QUERIES, "--sink", 16, "--recent", 100, "--codecs", "int2,int2-lm,turboquant-2")
    report = {s["name"]: s for s in json.loads(kvctl("eval", SMOLLM2, tmp_path / "set", *common))["sets"]}
    assert (report["set"]["scale_k"], report["set"]["scale_v"]) == ("unbiased", "least-squares")
    for name, want in (("set 0.96/0.92", "published"), ("naive", "published"), ("turboquant-2", "published"), ("hadamard", "unbiased")):
        assert report[name]["scale_k"] == want and report[name]["scale_v"] == want.replace("unbiased", "least-squares"), name
    both = {s["name"]: s for s in json.loads(kvctl("eval", SMOLLM2, tmp_path / "plain", *common, "--scales"))["sets"]}
    kinds = ("published/published", "least-squares/least-squares", "unbiased/least-squares", "unbiased/unbiased")
    assert set(both) == {f"{n}, {k}" for n in ("naive", "hadamard", "plain", "plain int2-lm", "turboquant-2") for k in kinds}
    many = [tmp_path / "plain"] * 6  # more cases than a table had columns
    printed = kvctl("eval", SMOLLM2, *many, "-c", CONTEXT, "-q", 8, "--contexts", 1, "--codecs", "int2,int2-lm,turboquant-2")
    assert printed.count("plain int2-lm") == 3 * 6
    assert both["plain, unbiased/least-squares"]["windows"] == report["set"]["windows"]
    x, _ = read(SMOLLM2)
    sets, _ = read(tmp_path / "plain")
    for kind in kinds[1:]:
        got = both[f"plain, {kind}"]["no_windows"]["layers"]
        for i, layer in ((0, "0"), (2, "19")):
            for name, want in figures(x, sets, i, 0, 0, kind.split("/")).items():
                assert got[layer][name] == pytest.approx(want, rel=2e-3, abs=2e-4), (kind, layer, name)
    for name in ("plain", "plain int2-lm", "turboquant-2"):
        least, fair = (both[f"{name}, {k}"]["no_windows"]["bias"] for k in (kinds[1], kinds[3]))
        assert least < -0.2 and abs(fair) < abs(least) / 3, name
    lm, even = (both[f"{n}, least-squares/least-squares"]["windows"]["output_error"] for n in ("plain int2-lm", "plain"))
    assert even < 1.05 * lm
    assert "it wants scales of K and V" in kvctl("fit", SMOLLM2, tmp_path / "set", "--scales", "unbiased", code=2)
    shown = kvctl("show", tmp_path / "set")
    assert "K unbiased, V least-squares" in shown


def test_less_error_with_a_worse_bias_is_said(tmp_path):
    """By fit of scales that are known for it, by eval of what it finds; nothing of sets as they are recommended."""
    def run(*arguments):
        return subprocess.run([KVCTL, "calib", *map(str, arguments)], check=True, capture_output=True, text=True, timeout=300)

    assert run("fit", SMOLLM2, tmp_path / "set").stderr == "" == run("fit", SMOLLM2, tmp_path / "tc", "--codec", "tc2").stderr
    for options, kind in ((("--scales", "least-squares,least-squares"), "least-squares"), (("--published",), "published")):
        assert f"warning: K's scales are {kind}: queries see" in run("fit", SMOLLM2, tmp_path / "other", *options).stderr
    common = ("-c", CONTEXT, "-q", QUERIES, "--sink", 16, "--recent", 100, "--codecs", "int2,bf16", "--json")
    assert "bias" not in run("eval", SMOLLM2, tmp_path / "set", *common).stderr
    r = run("eval", SMOLLM2, tmp_path / "set", *common, "--scales")
    sets = {x["name"]: x["windows"] for x in json.loads(r.stdout)["sets"]}
    found = re.findall(r"warning: (.*) has less error than (.*) and a worse bias \((.*), (.*)\): it may lose facts", r.stderr)
    assert "set, least-squares/least-squares" in [f[0] for f in found]
    for worse, better, bias, others in found:
        assert sets[worse]["output_error"] < sets[better]["output_error"] and abs(sets[worse]["bias"]) > abs(sets[better]["bias"]) + 0.1
        assert (bias, others) == tuple(f"{sets[x]['bias']:+.3f}" for x in (worse, better))


def test_contexts_longer_than_a_set_was_fitted_to(tmp_path):
    for name, tokens in (("short", 700), ("long", 1400)):
        write(tmp_path / f"{name}.safetensors", {f"layers.0.{s}": ("F32", x) for s, x in zip("qkv", activations(3, tokens, 2, 1, 64, 64, [0])[0])})
    for options in ((), ("--codec", "tc2")):
        kvctl("fit", tmp_path / "short.safetensors", tmp_path / "set", *options)
        assert json.loads(kvctl("show", "--json", tmp_path / "set"))["fitted_length"] == 700
        assert "to contexts of up to 700 tokens" in kvctl("show", tmp_path / "set")
        for context, warned in ((1400, True), (640, False)):
            r = subprocess.run([KVCTL, "calib", "eval", tmp_path / "long.safetensors", tmp_path / "set", "-c", str(context)], capture_output=True, text=True)
            assert r.returncode == 0 and r.stderr.count("was fitted to contexts of up to 700 tokens, and these have 1400") == (2 if not options else 1) * warned
    raw = (tmp_path / "set").read_bytes()
    for text in ("70x", "-70", "", " 70", "1" * 20):
        n = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:8 + n])
        header["__metadata__"]["fitted_length"] = text
        new = json.dumps(header).encode()
        (tmp_path / "bad").write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + n:])
        assert "fitted_length is no number of tokens" in kvctl("show", tmp_path / "bad", code=1)


def test_what_is_recorded_at_later_positions_counts_as_that_far(tmp_path):
    """Files say which position they begin at; the set that is fitted to them was to that far."""
    data = {f"layers.0.{s}": ("F32", x) for s, x in zip("qkv", activations(3, 700, 2, 1, 64, 64, [0])[0])}
    (tmp_path / "dump").mkdir()
    for name, first in (("0", None), ("1", "7492")):
        write(tmp_path / f"dump/{name}.safetensors", data, {"first": first} if first else None)
    kvctl("fit", tmp_path / "dump", tmp_path / "set", "--codec", "tc2")
    assert json.loads(kvctl("show", "--json", tmp_path / "set"))["fitted_length"] == 8192
    for first in ("", "-1", " 1", "1x", "9" * 16):
        write(tmp_path / "dump/1.safetensors", data, {"first": first})
        assert f"metadata first is '{first}', no position" in kvctl("fit", tmp_path / "dump", tmp_path / "set", code=1)


def test_it_says_what_sets_were_fitted_to(tmp_path):
    data, dump = activations(3, 700, 2, 1, 64, 64, [0])[0], tmp_path / "dump"
    dump.mkdir()
    for name, factor in (("a", 1), ("b", 2), ("c", 3)):
        write(tmp_path / f"{name}.safetensors", {f"layers.0.{s}": ("F32", x * np.float32(factor)) for s, x in zip("qkv", data)})
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    (dump / "other-name.safetensors").write_bytes(a.read_bytes())  # one of two shards, by another name
    (dump / "more.safetensors").write_bytes(c.read_bytes())
    fitted, old = tmp_path / "fitted", tmp_path / "old"
    kvctl("fit", a, fitted, "--published", "--fit-clips", b, "--context", CONTEXT)
    for on, want, words in ((a, "fitted", "was fitted to these"), (dump, "fitted", "was fitted to these"),
                            (b, "clips-fitted", "has clip ratios fitted to these"), (c, "held-out", "was not fitted to these")):
        page = tmp_path / "page.html"
        report = json.loads(kvctl("eval", on, fitted, "--json", "-c", CONTEXT, "--codecs", "int2", "--html", page))
        assert {s["name"]: s["activations"] for s in report["sets"][:3]} == {"naive": "none", "hadamard": "none", "fitted": want}
        assert f"</b> {words}" in page.read_text() and "held-out" not in page.read_text()
    assert "fitted was fitted to these" in kvctl("eval", a, fitted, "-c", CONTEXT, "--codecs", "int2")
    # A set of before that was recorded.
    raw = fitted.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + n])
    del header["__metadata__"]["fitted_to"], header["__metadata__"]["clips_fitted_to"]
    old.write_bytes(raw[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(n) + raw[8 + n:])
    report = json.loads(kvctl("eval", a, old, "--json", "-c", CONTEXT, "--codecs", "int2"))
    assert report["sets"][2]["activations"] == "unknown"


def test_names_are_no_markup_in_the_report(tmp_path):
    evil = tmp_path / "<script>alert(1)<&\"set"
    kvctl("fit", SMOLLM2, evil)
    kvctl("eval", SMOLLM2, evil, "-c", CONTEXT, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "&#60;script&#62;alert(1)&#60;&#38;&#34;set" in page


def test_texts_of_files_do_nothing_to_a_terminal(tmp_path):
    """What a file calls itself is shown, whatever bytes it has: in tables, lines and errors."""
    evil = "a\x1b]0;x\x07\x9bb\x7f|c\u00fc"
    kvctl("fit", SMOLLM2, tmp_path / "set", "--model", evil, "--layers", "0")
    shown = kvctl("show", tmp_path / "set")
    assert "model          a\\x1b]0;x\\x07\\xc2\\x9bb\\x7f|c\u00fc\n" in shown
    assert json.loads(kvctl("show", tmp_path / "set", "--json"))["model"] == evil
    q, k, v = activations(1, 700, 2, 1, 64, 64, [0])[0]
    dump = tmp_path / "dump"
    dump.mkdir()
    for name, model in (("a", "m"), ("b", evil)):
        write(dump / f"{name}.safetensors", {f"layers.0.{s}": ("F32", x) for s, x in zip("qkv", (q, k, v))}, {"model": model})
    said = kvctl("fit", dump, tmp_path / "other", code=1)
    assert "of model a\\x1b]0;x" in said
    (tmp_path / "set").rename(tmp_path / "b|\x1b[2J")
    printed = kvctl("eval", SMOLLM2, tmp_path / "b|\x1b[2J", "-c", CONTEXT, "--codecs", "int2")
    assert "b_\\x1b[2J" in printed
    for text in (shown, said, printed):
        assert not [c for c in text if c != "\n" and (c < " " or "\x7f" <= c < "\xa0")]


def test_a_report_goes_into_the_manifest(tmp_path):
    for name, clip in (("set", "0.96,0.92"), ("other", "0.9,0.9")):
        kvctl("fit", SMOLLM2, tmp_path / name, "--published", "--model", "m", "--clip", clip)
    report, store = tmp_path / "report.json", tmp_path / "store"
    report.write_text(kvctl("eval", SMOLLM2, tmp_path / "set", "--json", "-c", CONTEXT))
    r = subprocess.run([KVCTL, "--store", store, "calib", "publish", tmp_path / "set", "m@v1", report])
    assert r.returncode == 0
    entry = json.loads((store / "models/m.json").read_text())["tags"]["v1"]
    figures = json.loads(report.read_text())["sets"][2]["windows"]
    del figures["layers"]
    assert entry["evaluation"]["windows"] == figures and entry["evaluation"]["context"] == CONTEXT
    assert entry["evaluation"]["activations"] == "fitted"
    assert "1280 tokens" in entry["provenance"]
    listed = subprocess.run([KVCTL, "--json", "--store", store, "--cache", tmp_path / "cache", "calib", "ls"],
                            capture_output=True, text=True)
    assert json.loads(listed.stdout)["sets"][0]["error"] == pytest.approx(figures["output_error"])
    plain = subprocess.run([KVCTL, "--store", store, "--cache", tmp_path / "cache", "calib", "ls"], capture_output=True, text=True)
    assert f" {figures['output_error']:.3f} " in plain.stdout
    r = subprocess.run([KVCTL, "--store", store, "calib", "publish", tmp_path / "other", "m@v2", report],
                       capture_output=True, text=True)
    assert r.returncode == 1 and "says nothing of the set sha256:" in r.stderr
    assert "v2" not in json.loads((store / "models/m.json").read_text())["tags"]
    kvctl("fit", SMOLLM2, tmp_path / "tc2", "--codec", "tc2", "--model", "m")
    report.write_text(kvctl("eval", SMOLLM2, tmp_path / "tc2", "--json", "-c", CONTEXT, "--codecs", "tc2,int2"))
    subprocess.run([KVCTL, "--store", store, "calib", "publish", tmp_path / "tc2", "m@tc2", report], check=True)
    entry = json.loads((store / "models/m.json").read_text())["tags"]["tc2"]["evaluation"]
    of = next(s for s in json.loads(report.read_text())["sets"] if s["name"] == "tc2 tc2")
    assert entry["bits"] == 2.25 and entry["windows"]["output_error"] == of["windows"]["output_error"]


@pytest.mark.long
def test_fitted_clips_are_the_best_of_their_list(tmp_path):
    kvctl("fit", SMOLLM2, tmp_path / "a", "--published", "--fit-clips", SMOLLM2, "--context", CONTEXT)
    sets, meta = read(tmp_path / "a")
    assert meta["objective"].endswith("clips fitted")
    x, _ = read(SMOLLM2)
    ratios = [1, .99, .98, .97, .96, .95, .94, .93, .92, .91, .90, .88, .86, .84]
    group = 3
    for i in (0, 2):
        q, k, v = (x[s][i].astype(np.float64) for s in "qkv")
        error = {"k": np.zeros(len(ratios)), "v": np.zeros(len(ratios))}
        end = (CONTEXT - 64) // 16 * 16
        for at in range(0, len(k) - CONTEXT + 1, CONTEXT):
            for h in range(k.shape[1]):
                keys, values = k[at:at + CONTEXT, h], v[at:at + CONTEXT, h]
                asks = q[at + CONTEXT - 64:at + CONTEXT, h * group:(h + 1) * group]
                _, p, o = attention(asks, keys, values, 0)
                for r, ratio in enumerate(ratios):
                    k2, v2 = keys.copy(), values.copy()
                    k2[:end] = quantized(keys[:end], sets["k.rotation"][i, 0], ratio)
                    v2[:end] = quantized(values[:end], sets["v.rotation"][i, 0], ratio)
                    error["k"][r] += np.sum((attention(asks, k2, values, 0)[2] - o) ** 2)
                    error["v"][r] += np.sum((np.einsum("pgt,td->pgd", p, v2) - o) ** 2)
        for side in "kv":
            chosen = ratios.index(round(float(sets[f"{side}.clip"][i, 0]), 2))
            assert error[side][chosen] <= error[side].min() * 1.001


def test_fitted_gains(tmp_path):
    """--fit-clips chooses gains too: of no more error on what they were fitted to, in files of their own kind."""
    kvctl("fit", SMOLLM2, tmp_path / "plain", "--published")
    kvctl("fit", SMOLLM2, tmp_path / "fitted", *PER_HEAD, "--fit-clips", SMOLLM2, "--context", CONTEXT)
    plain, _ = read(tmp_path / "plain")
    fitted, _ = read(tmp_path / "fitted")
    assert "k.gain" not in plain  # files without gains stay what they were
    gains = np.concatenate([fitted["k.gain"].ravel(), fitted["v.gain"].ravel()])
    assert (gains != 1).any() and gains.min() > 0.8 and gains.max() < 1.1
    assert "gain" in kvctl("show", tmp_path / "fitted")
    # The same file with gains that no one fits is refused.
    raw = (tmp_path / "fitted").read_bytes()
    broken = raw.replace(fitted["k.gain"].astype("<f4").tobytes(), np.full(fitted["k.gain"].size, 9, "<f4").tobytes())
    (tmp_path / "broken").write_bytes(broken)
    assert "digest" in kvctl("show", tmp_path / "broken", code=1)


def test_codecs_are_chosen(tmp_path):
    report = json.loads(kvctl("eval", SMOLLM2, "--json", "-c", CONTEXT, "--codecs", "int2,turboquant-3"))
    assert [s["name"] for s in report["sets"]] == ["naive", "hadamard", "turboquant-3"]
    assert "there is no codec int7; known are bf16, int2," in kvctl("eval", SMOLLM2, "--codecs", "int7", code=2)


def test_what_cannot_be_evaluated(tmp_path):
    kvctl("fit", SMOLLM2, tmp_path / "set")
    assert "no layer of the set has 2048 tokens in one file" in kvctl("eval", SMOLLM2, tmp_path / "set", code=1)
    assert "leaves no history" in kvctl("eval", SMOLLM2, "-c", 300, code=1)
    assert "No such file" in kvctl("eval", tmp_path / "none", code=1)
    assert "No such file" in kvctl("eval", SMOLLM2, tmp_path / "none", "-c", 640, code=1)
    (tmp_path / "prose.txt").write_text("It was the best of times, it was the worst of times.")
    for line in (("eval", tmp_path / "prose.txt"), ("fit", tmp_path / "prose.txt", tmp_path / "none")):
        assert "no safetensors file" in kvctl(*line, code=1)
    refused = kvctl("--store", tmp_path / "store", "publish", tmp_path / "set", "m@v1", tmp_path / "prose.txt", code=1)
    assert "prose.txt: no report of calib eval --json: " in refused and "line 1" in refused
    other = tmp_path / "other.safetensors"
    for layer, dims in ((0, (128, 128)), (5, (64, 64))):
        q, k, v = activations(1, 700, 2, 1, *dims, [layer])[layer]
        write(other, {f"layers.{layer}.{s}": ("F32", t) for s, t in zip("qkv", (q, k, v))})
        want = "head_dim" if layer == 0 else "no layer"
        assert want in kvctl("eval", other, tmp_path / "set", "-c", 640, code=1)
