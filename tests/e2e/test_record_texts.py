"""What kvd.record makes contexts of: no model, and no PyTorch, is wanted for it."""
import pathlib

import pytest

from kvd import record


class Tokenizer:
    """Every byte is a token; special tokens come before and behind a text if asked for."""

    def __init__(self, before=(), behind=()):
        self.before, self.behind = list(before), list(behind)

    def __call__(self, text, add_special_tokens, verbose=False):
        ids = list(text.encode())
        return {"input_ids": self.before + ids + self.behind if add_special_tokens else ids}


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "a").write_text("abcdefgh")
    (tmp_path / "b").write_text("ABCDEFG")
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def words(tokenizer, texts, length, limit=None):
    return [(text[-1], bytes(ids).decode()) for text, ids in record.contexts(tokenizer, texts, length, limit)]


def test_prompts_that_ask(tmp_path):
    """Each is as long as asked, begins as texts do, and ends by asking for what it told, far from both ends, in other words each time."""
    for name in "ab":
        (tmp_path / name).write_text(" ".join(f"{name}{x}{y}word" for x in "qrstuvw" for y in "qrst") * 40)
    texts = [str(tmp_path / name) for name in "ab"]
    prompts = list(record.asked(Tokenizer(b"<"), texts, 1000, 12))
    assert prompts == list(record.asked(Tokenizer(b"<"), texts, 1000, 12)) and [text[-1] for text, _, _ in prompts] == list("aabbaabbaabb")
    facts, phrases = set(), set()
    for i, (_, ids, answer) in enumerate(prompts):
        said, fact = bytes(ids).decode(), bytes(answer).decode()
        tell, ask, names = record._PHRASES[(i // 4 + i // 2 % 2) % 3]
        told, question = tell.format(name=names[i % 2], fact=fact), ask.format(name=names[i % 2])
        assert len(ids) == 1000 and said[0] == "<" and said.count(told) == 1 and said.endswith(question + fact[:-1])
        assert len(fact) == 7 if i % 2 == 0 else len(fact.split()) == 4
        assert 100 <= said.index(told) - 1 and len(said) - len(question) - 400 >= said.index(told) + len(told)
        facts.add(fact), phrases.add((i // 2 % 2, question))
    assert len(facts) == len(phrases) == 12
    for length in (500, 100000):
        with pytest.raises(ValueError, match="give longer texts, or another --context"):
            list(record.asked(Tokenizer(), texts, length, 1))
    (tmp_path / "c").write_text("0123456789" * 500)
    with pytest.raises(ValueError, match="has 0 different words"):
        list(record.asked(Tokenizer(), [str(tmp_path / "c")], 1000, 2))


def test_prompts_are_not_worded_as_those_that_sets_are_judged_by():
    """What marks are chosen by must not be what they are measured with."""
    judged = (pathlib.Path(__file__).parents[1] / "bench/model_trials.py").read_text()
    for tell, ask, names in record._PHRASES:
        assert all(name not in judged for name in names)
        assert all(part not in judged for phrase in (tell, ask) for part in phrase.split("{name}") if len(part) > 12)


def test_contexts_are_spread_over_what_a_model_was_made_for():
    assert record.starts(4, 2048, 8192) == [0, 2048, 4096, 6144] and record.starts(3, 100, 100) == [0, 0, 0]
    assert record.starts(15, 2048, 8192)[::7] == [0, 3072, 6144] and record.starts(1, 2048, 8192) == [0] and record.starts(0, 1, 2) == []


def test_texts_in_pieces(texts):
    """In turn, so that a limit leaves out no text."""
    assert words(Tokenizer(), texts, 3) == [("a", "abc"), ("b", "ABC"), ("a", "def"), ("b", "DEF")]
    assert words(Tokenizer(), texts, 3, 8) == [("a", "abc"), ("b", "ABC")]
    assert words(Tokenizer(behind=b">"), texts, 4) == [("a", "abcd"), ("b", "ABCD"), ("a", "efgh")]
    assert words(Tokenizer(), texts, 9) == []


def test_every_context_begins_as_texts_do(texts):
    """Gemma and Llama see a first token before everything; without it their activations are others."""
    assert words(Tokenizer(b"<"), texts, 3) == [("a", "<ab"), ("b", "<AB"), ("a", "<cd"), ("b", "<CD"), ("a", "<ef"), ("b", "<EF"), ("a", "<gh")]
    assert words(Tokenizer(b"<<", b">"), texts, 5, 11) == [("a", "<<abc"), ("b", "<<ABC")]
    with pytest.raises(ValueError, match="no room beside .60, 60."):
        words(Tokenizer(b"<<"), texts, 2)
    changed = lambda text, add_special_tokens, verbose=False: {"input_ids": [1, 2] if add_special_tokens else [3]}  # noqa: E731
    with pytest.raises(ValueError, match="what a context begins with"):
        words(changed, texts, 3)
