"""What bench_model.py asks and how it sums: trials that repeat, records that are not measured twice, differences in pairs."""
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from conftest import SOURCE

sys.path.insert(0, str(SOURCE / "tests/bench"))
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


def test_a_model_and_texts_are_wanted():
    r = subprocess.run([sys.executable, SOURCE / "tests/bench/bench_model.py"], capture_output=True, text=True)
    assert r.returncode == 2 and "a model and texts are wanted" in r.stderr
