"""What bench_model.py asks and how it sums: trials that repeat, records that are not measured twice, differences in pairs."""
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import BUILD, KVCTL, SOURCE
from dumps import write

sys.path.insert(0, str(SOURCE / "tests/bench"))
import bench_model  # noqa: E402
from model_trials import Log, Trial, draw, merged, records_of, report, words_of  # noqa: E402


class Tokenizer:
    def get_vocab(self):
        return {w: i for i, w in enumerate(["\u0120river", "\u2581stone", "\u0120up", "\u0120Paris", "river", "\u0120a1b2c", "\u0120houses", "\u0120caf\u00e9s"])}


class Marks:
    first, user, answer = "^", "U:", "A:"


class Model:
    """Every character is a token."""

    tokenizer, marks = Tokenizer(), Marks

    def encode(self, text):
        return [ord(c) for c in text]


FILLERS = {"dots": [ord(".")] * 3000, "lines": [ord("-")] * 3000}


def test_trials_hide_a_fact_of_each_kind_in_what_is_compressed():
    model = Model()
    words = words_of(model)
    assert words == ["houses", "river", "stone"]  # one token with a space in front, of small ASCII letters, neither short nor long
    seen = set()
    for number in range(40):
        trial, again = (Trial(model, FILLERS, number, 5, 1024, words) for _ in range(2))
        assert (trial.body, trial.asked) == (again.body, again.asked)
        text = "".join(map(chr, trial.body))
        assert text.startswith("^U:") and trial.filler == ("dots", "lines")[number % 2]
        assert text.count("." if trial.filler == "dots" else "-") >= 1024
        for kind, name in (("digits", "magic number"), ("words", "secret phrase")):
            question, want, back = trial.asked[kind]
            fact = "".join(map(chr, want))
            at = len(text) - back  # where what follows the fact begins
            assert f'the {name} is "{fact}". I will ask for it later.\n\n' == text[:at][-len(f'the {name} is "{fact}". I will ask for it later.\n\n'):]
            assert "".join(map(chr, question)) == f'\n\nWhat is the {name}?A:The {name} is "'
            assert trial.open[kind] == (fact, question[:-len(f'The {name} is "')])
            assert back >= 400 and at - len(fact) > 100  # not in the recent window, not in the sink
            seen.add((kind, fact))
    assert len(seen) > 60  # of three words only some
    assert Trial(model, FILLERS, 1, 6, 1024, words).asked != Trial(model, FILLERS, 1, 5, 1024, words).asked
    assert len(draw("digits", np.random.default_rng(1), words)) == 7 and len(draw("words", np.random.default_rng(1), words).split()) == 4


def answer(number, rows, **more):
    return {"what": "recall", "model": "m", "context": 1024, "about": "digits", "number": number, "seed": 1, "filler": "dots", "back": 500 + number,
            "rows": rows, **more}


def test_what_a_log_has_is_not_done_again(tmp_path):
    path = tmp_path / "log"
    log = Log(path)
    record = answer(0, {"bf16": [1, 0.5], "int2": [0, 2.5]})
    assert not log.has(**record)
    log.add(**record)
    assert log.has(**record)
    with open(path, "a") as f:
        f.write('{"what": "recall", "cut o')
    log = Log(path)
    assert log.records == [record] and log.has(**record)
    assert not log.has(**{**record, "number": 1}) and not log.has(**{**record, "rows": ["bf16"]}) and not log.has(**{**record, "seed": 2})
    log.add(**answer(1, record["rows"]))
    assert [r["number"] for r in Log(path).records] == [0, 1]  # what was cut off is not in the way
    assert Log().records == []
    with pytest.raises(FileNotFoundError):
        records_of(tmp_path / "none")


def test_records_of_one_question_are_one():
    a, b = answer(0, {"bf16": [1, 0.5], "int2": [0, 2.5]}, errors={"int2": [-0.1, 0.2]}), answer(0, {"bf16": [1, 0.6], "tc2": [1, 0.7]})
    one, = merged([a, b])
    assert one["rows"] == {"bf16": [1, 0.5], "int2": [0, 2.5], "tc2": [1, 0.7]} and one["errors"] == {"int2": [-0.1, 0.2]}
    assert len(merged([a, answer(1, a["rows"])])) == 2


def test_differences_are_in_pairs(tmp_path):
    rng = np.random.default_rng(3)
    records, good, nll = [], [], []
    for i in range(50):
        hard = float(rng.random())  # what the facts are like is the same for both, and no part of the difference
        good.append([int(hard < 0.8), int(hard < 0.6)])
        nll.append([10 * hard, 10 * hard + 1 + 0.1 * float(rng.normal())])
        records.append(answer(i, {"bf16": [good[-1][0], nll[-1][0]], "int2": [good[-1][1], nll[-1][1]]}))
    less = np.diff(np.array(good, float), axis=1)[:, 0]
    text = "\n".join(report(records))
    line = next(x for x in text.splitlines() if x.startswith("int2"))
    assert f"{sum(g[1] for g in good)} of 50 {100 * less.mean():+6.1f} ({100 * less.std(ddof=1) / math.sqrt(50):.1f}) %" in line
    worse = np.diff(np.array(nll), axis=1)[:, 0]
    assert f"{worse.mean():+.3f} ({worse.std(ddof=1) / math.sqrt(50):.3f})" in line and worse.std() < 0.2 < np.std([n[0] for n in nll])
    assert "500+" in line and line.count("/13") == 2 and line.count("/12") == 2  # quarters by distance
    # A row that only some records have is compared over those.
    records += [answer(i, {"bf16": records[i]["rows"]["bf16"], "tc2": [1, 0.0]}) for i in range(7)]
    line = next(x for x in report(records) if x.startswith("tc2"))
    assert f"   7 of 7 {100 * (7 - sum(g[0] for g in good[:7])) / 7:+6.1f}" in line
    log = tmp_path / "log"
    log.write_text("".join(json.dumps(r) + "\n" for r in records))
    printed = subprocess.run([sys.executable, SOURCE / "tests/bench/bench_model.py", "--sum", log], check=True, capture_output=True, text=True).stdout
    assert printed == "\n".join(report(Log(log).records)) + "\n"


def test_perplexity_and_divergence_by_place():
    sizes, base = [128] * 8, np.arange(8) * 10.0
    rows = {"bf16": [list(base + 128), [0.0] * 8], "int2": [list(base + 128 + 1.28), [1.28 * (i // 2) for i in range(8)]]}
    text = {"what": "text", "model": "m", "context": 1024, "about": "prose", "number": 0, "seed": 0, "tokens": sizes, "rows": rows}
    line = next(x for x in report([text]) if x.startswith("int2"))
    assert f"{100 * math.expm1(0.01):+6.2f} (0.00) %" in line and "KL 0.0150" in line
    assert "by quarter of the context: 0.0000, 0.0100, 0.0200, 0.0300  (1024 tokens)" in line


def test_long_contexts_are_told_apart_in_eighths():
    rows = {"bf16": [[1.0] * 32, [0.0] * 32], "tc2": [[1.0] * 32, [128.0 * (i // 4) for i in range(32)]]}
    text = {"what": "text", "model": "m", "context": 4096, "about": "prose", "number": 0, "seed": 0, "tokens": [128] * 32, "rows": rows}
    line = next(x for x in report([text]) if x.startswith("tc2"))
    assert "by eighth of the context: 0.0000, 1.0000, 2.0000, 3.0000, 4.0000, 5.0000, 6.0000, 7.0000" in line
    far = [{**answer(i, {"bf16": [1, 0.0]}), "context": 8000} for i in range(16)]
    assert next(x for x in report(far) if x.startswith("bf16")).count("/2") == 8


def test_answers_are_counted_and_measured():
    rows = [{"bf16": [1, 10, 1], "tc2": [1, 12, 1]}, {"bf16": [1, 12, 1], "tc2": [0, 48, 0]}, {"bf16": [0, 20, 1], "tc2": [0, 20, 1]}]
    of = [{**answer(i, r), "what": "answer"} for i, r in enumerate(rows)]
    lines = {x.split()[0]: x for x in report(of) if not x.startswith("#")}
    assert "said    2 of 3" in lines["bf16"] and "answers of  14.0 tokens +0.00 (0.00), 10 to 20  ended 3 (+0)" in lines["bf16"]
    assert "said    1 of 3  -33.3 (33.3) %" in lines["tc2"] and "answers of  26.7 tokens +12.67 (11.68), 12 to 48  ended 2 (-1)" in lines["tc2"]


class Parrot:
    """Says what its case was given, token by token, and 0 behind it."""

    stop = {0}

    def __init__(self, *said):
        self.said, self.fed = [list(x) for x in said], []

    def forward(self, feed, cases):
        self.fed.append([list(f) for f in feed])
        return np.array([np.eye(9)[said.pop(0) if said else 0] for said, f in zip(self.said, feed) if f])

    def decode(self, ids):
        return "".join(map(str, ids))


def test_the_model_answers_until_it_ends():
    cases = type("Cases", (), {"caches": [1, 2, 3]})
    model = Parrot([1, 2], [3] * 9, [])
    assert bench_model.generate(model, [7, 7], cases, 4, np) == [("12", 2, True), ("3333", 4, False), ("", 0, True)]
    assert model.fed == [[[7, 7]] * 3, [[1], [3], []], [[2], [3], []], [[], [3], []]]  # who has ended is left alone


TINY = '''
import sys
sys.path[:0] = {paths!r}
import numpy as np
import kvd_worker
from kvd_worker.model import Marks


class Tiny(kvd_worker.Model):
    """Gemma 3's shape: head_dim 256, one kv head, a layer that sees a window and one that sees all. Characters are tokens."""

    def __init__(self, path):
        r = np.random.default_rng(1)
        self.name, self.layers, self.q_heads, self.kv_heads, self.head_dim, self.windows, self.limit = "tiny", 2, 2, 1, 256, [300, 0], 1024
        self.eps, self.theta, self._local_theta, self._embed_scale = 1e-6, 1e6, 1e4, np.float32(8)
        self.marks, self.stop, self.tokenizer = Marks(None, "U:", "A:", "", "", "^"), {{0}}, self
        self._act = lambda x: np.maximum(x, 0)

        def w(*shape):
            return (r.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

        self.top = {{"embed": w(256, 256), "norm": np.ones(256, np.float32), "head": w(256, 256)}}
        one = np.ones(256, np.float32)
        self.blocks = [{{"ln1": one, "q": 2 * w(512, 256), "k": 2 * w(256, 256), "v": w(256, 256), "o": w(256, 512), "ln2": one, "gate": w(128, 256),
                        "up": w(128, 256), "down": w(256, 128)}} for _ in range(2)]

    def get_vocab(self):
        return {{"\\u2581river": 1, "\\u2581stone": 2}}

    def encode(self, text):
        return [ord(c) % 256 for c in text]

    def decode(self, ids):
        return bytes(ids).decode("latin1")


kvd_worker.Model = Tiny
'''


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Recorded activations of that model, and a script that is bench_model.py with it."""
    monkeypatch.setenv("KVD_LIBRARY", str(BUILD / "client/libkvd.so.0"))
    text, script, names, kept = tmp_path / "text", tmp_path / "tiny.py", {}, {}
    text.write_text("".join(map(chr, np.random.default_rng(2).integers(0, 190, 4000) + 33)))
    code = TINY.format(paths=[str(SOURCE / p) for p in ("client/python", "tests/bench")])
    script.write_text(code + "import bench_model\nbench_model.main()\n")
    import kvd_worker

    monkeypatch.setattr(kvd_worker, "Model", kvd_worker.Model)  # is put back
    exec(compile(code, str(script), "exec"), names)

    class Recording(kvd_worker.LocalCache):
        def attend(self, layer, q, k, v, counts):
            kept.update({f"layers.{layer}.{s}": ("BF16", x.copy()) for s, x in zip("qkv", (q, k, v))})
            return super().attend(layer, q, k, v, counts)

    model = names["Tiny"]("")
    model.forward([model.encode("^" + text.read_text()[:1023])], Recording(1, windows=model.windows))
    (tmp_path / "dump").mkdir()
    write(tmp_path / "dump/0.safetensors", kept, {"model": "tiny", "windows": "300,0"})
    return tmp_path


@pytest.mark.long
@pytest.mark.skipif(not (BUILD / "client/kvctl-calib").exists(), reason="there is no kvctl-calib")
@pytest.mark.skipif("san" in BUILD.name, reason="Python is not instrumented")
def test_a_model_of_gemmas_shape_from_its_activations_to_the_table(tiny):
    """Recorded, fitted, evaluated and compared, by two processes that share the work."""
    sets = [tiny / "int2", tiny / "tc2"]
    for of, codec in zip(sets, ((), ("--codec", "tc2"))):
        subprocess.run([KVCTL, "calib", "fit", tiny / "dump", of, *codec], check=True, capture_output=True, timeout=300)
    figures = json.loads(subprocess.run([KVCTL, "calib", "eval", tiny / "dump", *sets, "-c", "1024", "--json"], check=True, capture_output=True,
                                        timeout=300).stdout)["sets"]
    error = {s["name"]: s["windows"]["output_error"] for s in figures}
    assert 0 < error["tc2 tc2"] < error["naive"] and 0 < error["int2"] < error["naive"], error

    def bench(*more, code=0):
        r = subprocess.run([sys.executable, tiny / "tiny.py", "tiny", "--build", BUILD, "--text", f"prose={tiny / 'text'}", "--sets",
                            *(f"fitted={s}" for s in sets), "--rows", "int2 fitted,tc2 fitted", *more], capture_output=True, text=True, timeout=300)
        assert r.returncode == code, r.stdout + r.stderr
        return r.stdout if code == 0 else r.stderr

    log = tiny / "log"
    shared = ("--context", "512", "--tokens", "2048", "--trials", "3", "--generate", "5", "--seed", "4", "--log", log, "--jobs", "2")
    printed = bench(*shared)
    records = [records_of(f"{log}.{i}") for i in range(2)]
    assert [{r["number"] for r in of if r["what"] == "recall"} for of in records] == [{0, 2}, {1}]
    assert [{r["number"] for r in of if r["what"] == "text"} for of in records] == [{0, 2}, {1, 3}]
    every = records[0] + records[1]
    assert len(every) == 3 * 2 * 2 + 4 and all(list(r["rows"]) == ["bf16", "int2 fitted", "tc2 fitted"] for r in every)
    assert all(row[1] <= 5 for r in every if r["what"] == "answer" for row in r["rows"].values())
    kl = {n: sum(sum(r["rows"][n][1]) for r in every if r["what"] == "text") for n in every[0]["rows"]}
    assert kl["bf16"] == 0 < min(kl["tc2 fitted"], kl["int2 fitted"])
    for line in ("# text, prose: tiny", "# recall, digits: tiny", "# answer, words: tiny"):
        assert line in printed
    (tiny / "log.out").write_text("1")  # is none of theirs
    assert bench(*shared) == printed and [records_of(f"{log}.{i}") for i in range(2)] == records  # nothing is done again
    assert bench(*shared[:-1], "3") == printed  # nor with other shares
    assert "with a question 1221, are more than the 1024 that tiny was made for" in bench("--context", "1000", "--generate", "29", code=1)


def test_cores_are_those_that_a_container_may_use(tmp_path):
    limit, mine = tmp_path / "cpu.max", len(os.sched_getaffinity(0))
    for text, want in (("100000 100000\n", 1), ("50000 100000\n", 1), ("max 100000\n", mine), ("99900000 100000\n", mine)):
        limit.write_text(text)
        assert bench_model.cores(limit) == want
    assert bench_model.cores(tmp_path / "none") == mine


@pytest.mark.parametrize("what", ["llama", "gemma"])
def test_pytorch_has_the_same_decoder(what, monkeypatch):
    """Prompts, single tokens and sequences that rest, with biases, norms of heads, windows and both RoPEs."""
    pytest.importorskip("torch")
    monkeypatch.setenv("KVD_LIBRARY", str(BUILD / "client/libkvd.so.0"))
    import kvd_worker.model as of
    from kvd_worker import LocalCache

    import model_torch

    r, gemma = np.random.default_rng(3), what == "gemma"
    model = object.__new__(of.Model)
    model.layers, model.q_heads, model.kv_heads, model.head_dim, model.windows = 3, 4, 2, 16, [8, 0, 8] if gemma else None
    model.eps, model.theta, model._local_theta, model._embed_scale = 1e-5, 1e5, 1e3 if gemma else 0.0, np.float32(3 if gemma else 1)
    model._act = of._gelu if gemma else of._silu

    def w(*shape):
        return (r.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    def block():
        b = {"ln1": w(1, 32)[0], "q": w(64, 32), "k": w(32, 32), "v": w(32, 32), "o": w(32, 64), "ln2": w(1, 32)[0], "gate": w(48, 32), "up": w(48, 32),
             "down": w(32, 48)}
        more = {"q_norm": 16, "k_norm": 16, "ln1_post": 32, "ln2_post": 32} if gemma else {"q.bias": 64, "k.bias": 32, "v.bias": 32}
        return {**b, **{name: w(1, n)[0] for name, n in more.items()}}

    model.blocks, model.top = [block() for _ in range(3)], {"embed": w(50, 32), "norm": w(1, 32)[0], "head": w(50, 32)}
    decoder = model_torch.Decoder(model, "cpu")
    steps = [[list(range(20)), [4, 5]], [[7], []], [[8, 9], [1]]]
    for every in (False, True):
        mine, its = LocalCache(2, windows=model.windows), LocalCache(2, windows=model.windows)
        for ids in steps:
            want, got = model.forward(ids, mine, every=every), decoder.forward(ids, its, every=every)
            assert np.abs(want - got.numpy()).max() < 0.02 * np.abs(want).max()  # keys and values are rounded to bf16, which may turn
    prompt, mine = model_torch.Prompt(model.windows), LocalCache(1, windows=model.windows)
    got, want = decoder.forward([steps[0][0]], prompt), model.forward([steps[0][0]], mine)
    assert np.abs(want - got.numpy()).max() < 0.02 * np.abs(want).max()
    for a, b in zip(prompt.keys_and_values(), mine.keys_and_values(0)):
        assert a.shape == b.shape and (a != b).mean() < 0.02
    logits = r.normal(size=(2, 5, 50)).astype(np.float32)
    monkeypatch.delitem(sys.modules, "model_torch")
    assert np.allclose(bench_model.losses(logits, [1, 2, 3, 4, 5], np), model_torch.losses(model_torch.torch.from_numpy(logits), [1, 2, 3, 4, 5]))


def test_who_is_told_to_end_ends_what_it_has_started(tmp_path):
    """Of shared work, the other processes; they, as one that works alone, end kvd on their way out (`finally`)."""
    script = tmp_path / "shared.py"
    script.write_text(f"""import os, pathlib, sys, time
sys.path.insert(0, {str(SOURCE / "tests/bench")!r})
import bench_model
bench_model.end_all_on_sigterm()
if "--share" not in sys.argv:
    bench_model.run_jobs(2, {str(tmp_path / "log")!r})
share = pathlib.Path({str(tmp_path)!r}, f"share{{sys.argv[sys.argv.index('--share') + 1][0]}}")
try:
    pathlib.Path(f"{{share}}.new").write_text(str(os.getpid()))
    os.rename(f"{{share}}.new", share)
    time.sleep(120)
finally:
    share.unlink()
""")
    bench, shares = subprocess.Popen([sys.executable, script]), [tmp_path / "share0", tmp_path / "share1"]
    try:
        end = time.time() + 60
        while not all(s.exists() for s in shares) and time.time() < end:
            time.sleep(0.05)
        pids = [int(s.read_text()) for s in shares]
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(60) == 128 + signal.SIGTERM
    finally:
        bench.kill()
    assert not any(s.exists() for s in shares)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_contexts_longer_than_a_set_was_fitted_to_are_said(tmp_path, capsys):
    write(tmp_path / "set", {}, {"fitted_length": "2048"})
    args = type("Args", (), {"context": 2048, "generate": 48, "trials": 0, "sets": [f"a={tmp_path / 'set'}"]})
    model = type("Model", (), {"limit": 8192, "name": "m"})
    bench_model.check_lengths(args, model)
    assert capsys.readouterr().err == ""
    args.context = 8192
    bench_model.check_lengths(args, model)
    assert f"warning: set a ({tmp_path / 'set'}) was fitted to contexts of 2048 tokens, and these have 8192" in capsys.readouterr().err
    args.trials = 1
    with pytest.raises(SystemExit, match="are more than the 8192 that m was made for"):
        bench_model.check_lengths(args, model)


def test_a_model_and_texts_are_wanted():
    r = subprocess.run([sys.executable, SOURCE / "tests/bench/bench_model.py"], capture_output=True, text=True)
    assert r.returncode == 2 and "a model and texts are wanted" in r.stderr
