"""kvd.record: what it writes is what the model's attention gets, and kvctl calib fit takes it.

PyTorch is too heavy for every run: tests/transformers.sh makes an environment that has it and runs this.
"""
import importlib.util
import json
import struct
import subprocess
import sys

import numpy as np
import pytest

from conftest import BUILD, KVCTL
from kvd import record

MISSING = [n for n in ("torch", "transformers", "tokenizers") if not importlib.util.find_spec(n)]
if MISSING:
    pytest.skip(f"packages are missing: {', '.join(MISSING)}; see tests/transformers.sh", allow_module_level=True)
import torch  # noqa: E402
import transformers  # noqa: E402
from test_transformers_models import WINDOW, MIXED, make  # noqa: E402


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("".join(map(chr, np.random.default_rng(1).integers(32, 127, 4000))))  # single bytes are tokens: many of them
    return file


def save(folder, name, **more):
    """A tiny model and a tokenizer of single bytes, as from_pretrained wants them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok).save_pretrained(folder)
    make(name, vocab_size=256, **more).save_pretrained(folder)
    return folder


def load(path):
    raw = path.read_bytes()
    n, = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + n])
    meta = header.pop("__metadata__")
    out = {}
    for name, t in header.items():
        bits = np.frombuffer(raw[8 + n:][slice(*t["data_offsets"])], np.uint16)
        out[name] = (bits.astype(np.uint32) << 16).view(np.float32).reshape(t["shape"])
    return out, meta


def test_texts_take_turns(folder, text, tmp_path):
    """So that --tokens leaves out no text, however long the first is."""
    short = tmp_path / "short.txt"
    short.write_text("".join(reversed(text.read_text()[:600])))
    model = save(folder / "model", "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    pieces = list(record.contexts(tokenizer, [str(text), str(short)], 256, 1100))
    assert [name for name, _ in pieces] == [str(text), str(short), str(text), str(short)]
    long, other = (tokenizer(f.read_text(), add_special_tokens=False)["input_ids"] for f in (text, short))
    assert [ids for _, ids in pieces] == [long[:256], other[:256], long[256:512], other[256:512]]
    everything = list(record.contexts(tokenizer, [str(text), str(short)], 256, None))
    assert len(everything) == len(long) // 256 + 2 and sum(name == str(short) for name, _ in everything) == 2


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_what_attention_gets(folder, text, kind, monkeypatch, capsys):
    more = {} if kind == "llama" else {**WINDOW, "layer_types": MIXED, "attn_logit_softcapping": 5.0}
    model = save(folder / "model", kind, **more)
    assert record.main([str(model), "--text", str(text), "--out", str(folder / "out"), "--context", "256", "--tokens", "800", "--device", "cpu",
                        "--layers", "0,2"]) == 0
    said = capsys.readouterr()
    shards = sorted((folder / "out").iterdir())
    assert [s.name for s in shards] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    assert "3 contexts of 256 tokens, 2 layers" in said.out and "768/768" in said.err
    # The same by the model's own eager attention.
    stock = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager", dtype=torch.float32).eval()
    module, kept = sys.modules[type(stock).__module__], {}
    eager = module.eager_attention_forward

    def attention(layer, q, k, v, *args, **kwargs):
        kept.update({f"layers.{layer.layer_idx}.{n}": x[0].transpose(0, 1) for n, x in zip("qkv", (q, k, v))})
        return eager(layer, q, k, v, *args, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", attention)
    ids = list(text.read_bytes())
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    losses = []
    for i, shard in enumerate(shards):
        got, meta = load(shard)
        assert meta == {"model": "model", "text": "words.txt", "rope": "applied", **({} if kind == "llama" else {"windows": "9,9"})} and len(got) == 6
        piece = torch.tensor([tokenizer(text.read_text())["input_ids"][256 * i:256 * (i + 1)]])
        assert len(ids) >= 768
        with torch.no_grad():
            losses.append(float(stock(input_ids=piece, labels=piece, use_cache=False).loss))
        for name, x in got.items():
            want = kept[name].float().numpy()
            assert x.shape == want.shape and np.abs(x - want).max() <= 2 ** -7 * np.abs(want).max(), name
    assert f"next-token loss {sum(losses) / 3:.3f}" in said.out


def test_contexts_lie_as_far_as_the_model_reaches(folder, text, capsys):
    """Keys are turned by the positions that they are said to have; what the model makes of a text does not depend on them."""
    model = save(folder / "model", "llama")
    options = [str(model), "--text", str(text), "--context", "64", "--tokens", "192", "--device", "cpu", "--out"]
    said = []
    for out, more in (("far", []), ("near", ["--reach", "64"])):
        assert record.main([*options, str(folder / out), *more]) == 0
        said.append(capsys.readouterr().out.split("loss ")[1].split(" ")[0])
    assert abs(float(said[0]) - float(said[1])) < 0.002
    far, near = ([load(x) for x in sorted((folder / out).iterdir())] for out in ("far", "near"))
    assert [meta.get("first") for _, meta in far] == [None, "96", "192"] and not any("first" in meta for _, meta in near)
    frequency = 10000.0 ** (-np.arange(32) / 32)
    for (a, meta), (b, _) in zip(far, near):
        cos, sin = np.cos(int(meta.get("first", 0)) * frequency), np.sin(int(meta.get("first", 0)) * frequency)
        for name in ("layers.1.q", "layers.1.k"):
            x, y = b[name][..., :32], b[name][..., 32:]
            turned = np.concatenate([x * cos - y * sin, x * sin + y * cos], -1)
            assert np.abs(a[name] - turned).max() <= 0.02 * np.abs(turned).max(), name
        assert np.abs(a["layers.1.v"] - b["layers.1.v"]).max() <= 0.02 * np.abs(b["layers.1.v"]).max()
    assert record.main([*options, str(folder / "new"), "--reach", "1000"]) == 1
    assert "--reach 1000: a context has 64 tokens, and the model was made for 256" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_gradients_of_what_is_asked(folder, kind, monkeypatch, capsys):
    """With prompts that ask goes by how much the answer's loss grows with each of attention's outputs; PyTorch's own say the same."""
    words = folder / "words.txt"
    words.write_text(" ".join(f"{a}{b}{c}word" for a in "abcdefgh" for b in "uvwxyz" for c in "qrst"))
    more = {} if kind == "llama" else {**WINDOW, "layer_types": MIXED, "attn_logit_softcapping": 5.0}
    model = save(folder / "model", kind, max_position_embeddings=1024, **more)
    assert record.main([str(model), "--text", str(words), "--out", str(folder / "out"), "--context", "700", "--asked", "2", "--device", "cpu",
                        "--layers", "0,2"]) == 0
    assert f"--sensitive 2=int4 --asked {folder / 'out'}" in capsys.readouterr().out
    stock = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager", dtype=torch.float32).eval()
    module, kept = sys.modules[type(stock).__module__], {}
    eager = module.eager_attention_forward

    def attention(layer, *args, **kwargs):
        out, weights = eager(layer, *args, **kwargs)
        out.retain_grad()
        kept[f"layers.{layer.layer_idx}.g"] = out
        return out, weights

    monkeypatch.setattr(module, "eager_attention_forward", attention)
    prompts = list(record.asked(transformers.AutoTokenizer.from_pretrained(model), [str(words)], 700, 2))
    for shard, (_, ids, answer) in zip(sorted((folder / "out").iterdir()), prompts):
        got, _ = load(shard)
        assert set(got) == {f"layers.{layer}.{side}" for layer in (0, 2) for side in "qkvg"}
        logits = stock(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(answer):]
        (-logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].sum()).backward()
        for name in ("layers.0.g", "layers.2.g"):
            want = kept[name].grad[0].numpy()
            assert got[name].shape == want.shape and np.abs(want).max() > 0
            assert np.abs(got[name] - want).max() <= 2 ** -7 * np.abs(want).max(), name


@pytest.mark.skipif(not (BUILD / "client/kvctl-calib").exists(), reason="there is no kvctl-calib")
def test_fit_takes_it(folder, text):
    model = save(folder / "model", "llama")
    r = subprocess.run([sys.executable, "-m", "kvd.record", model, "--out", folder / "out", "--context", "512", "--text", text],
                       capture_output=True, text=True, timeout=200, cwd=record.__file__.rsplit("/", 2)[0])
    assert r.returncode == 0, r.stderr
    fit = subprocess.run([KVCTL, "calib", "fit", folder / "out", folder / "set.safetensors"], capture_output=True, text=True, timeout=100)
    assert fit.returncode == 0 and (folder / "set.safetensors").exists(), fit.stderr


def test_contexts_begin_as_the_tokenizer_begins_texts(folder, text, capsys):
    from tokenizers import processors

    model = save(folder / "model", "gemma3_text", layer_types=["sliding_attention", "full_attention", "sliding_attention"], **WINDOW)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="! $A", special_tokens=[("!", 0)])
    tokenizer.save_pretrained(model)
    plain = transformers.AutoTokenizer.from_pretrained(model)(text.read_text(), add_special_tokens=False)["input_ids"]
    assert record.main([str(model), "--text", str(text), "--out", str(folder / "out"), "--context", "256", "--tokens", "600", "--device", "cpu"]) == 0
    seen = [x["layers.1.k"] for x, _ in map(load, sorted((folder / "out").iterdir()))]
    stock, recorder = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), []
    recorder = record.Recorder(stock)
    for i, got in enumerate(seen):
        ids = torch.tensor([0, *plain[255 * i:255 * (i + 1)]])
        recorder.context(ids, record.Shard(folder / "want.safetensors", recorder.shape, recorder.layers, 256, {}))
        assert np.array_equal(load(folder / "want.safetensors")[0]["layers.1.k"], got)
    assert len(seen) == 2 and load(sorted((folder / "out").iterdir())[0])[1]["windows"] == "9,0,9"


def test_what_is_refused(folder, text, capsys):
    model = save(folder / "model", "llama")
    base = [str(model), "--text", str(text), "--device", "cpu"]
    for more, says in ((["--context", "100000"], "no text fills a context"), (["--layers", "0,7"], "layers [0, 7]"), (["--layers", "0,0"], "each once")):
        assert record.main([*base, "--out", str(folder / "out"), *more]) == 1
        assert says in capsys.readouterr().err and not list((folder / "out").iterdir())
    (folder / "out/00000.safetensors").write_bytes(b"")
    assert record.main([*base, "--out", str(folder / "out")]) == 1 and "holds recordings already" in capsys.readouterr().err
    sinks = save(folder / "sinks", "gpt_oss", **WINDOW, num_experts=4, num_local_experts=4)
    assert record.main([str(sinks), *base[1:], "--out", str(folder / "new")]) == 1 and "kvd cannot serve" in capsys.readouterr().err
    model = transformers.AutoModelForCausalLM.from_pretrained(model)
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    recorder = record.Recorder(model)
    shard = record.Shard(folder / "x.safetensors", recorder.shape, recorder.layers, 8, {})
    with pytest.raises(ValueError, match="layer 1: k holds NaN"):
        recorder.context(torch.arange(8), shard)
    assert not list(folder.glob("x*"))
