"""bench_decoder.py: every row is measured on the CPU, and none is printed whose attention is wrong. Wants PyTorch (tests/transformers.sh)."""
import importlib.util
import os
import re
import sys

import pytest

from conftest import BUILD, KVD, SOURCE

os.environ["KVD_LIBRARY"] = str(BUILD / "client/libkvd.so.0")
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is missing; see tests/transformers.sh")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SOURCE / "tests/bench"))
    import bench_decoder
    import torch

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["bench_decoder.py", "--kvd", str(KVD), "--quick", "--backend", "cpu", "--runs", "1", "--shapes", "2x450", *more])
        with torch.no_grad():
            return bench_decoder.Bench(bench_decoder.arguments()).run()

    return run


def test_each_row_is_measured_at_the_shape_and_at_the_largest_batch(bench, capsys):
    assert bench() == 0
    rows = re.findall(r"^ +(\d+) x 450 +(\w+) +[\d.]+ ", capsys.readouterr().out, re.M)
    assert [name for batch, name in rows if batch == "2"] == ["none", "kvd", "bf16", "fp8"]
    largest = {name: int(batch) for batch, name in rows}  # the last of each
    # 40 MB: a sequence in bf16 is 450 x 8,192 bytes, 10 of them fit; in kvd most of it is in the windows and the tail.
    assert largest["bf16"] == 8 and largest["fp8"] == 16 and 4 <= largest["kvd"] <= 8


def test_a_row_whose_attention_is_wrong_has_no_figures(bench, capsys, monkeypatch):
    import kvd
    monkeypatch.setattr(kvd.Direct, "attend", lambda *args, **named: None)
    assert bench("--variants", "kvd", "fp8") == 1
    out = capsys.readouterr().out
    assert "2 x 450 kvd: FAILED, Wrong: attention of slot [0, 1] in layer 1 is 1.000 of its norm from a dense one" in out
    assert not re.search(r"x 450 +kvd +[\d.]+ ", out) and re.search(r"2 x 450 +fp8 +[\d.]+ ", out)


def test_a_row_that_takes_too_long_is_given_up_and_the_next_one_begun(bench, capsys):
    assert bench("--limit", "0.05", "--variants", "kvd", "fp8") == 1
    out = capsys.readouterr().out
    assert "2 x 450 kvd: FAILED, TimeoutError: not done in 0.05 s" in out and "# the largest batches" in out
