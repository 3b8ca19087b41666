"""What bench_model.py asks of a model, and what the answers come to. NumPy alone: no model, no kvd.

A record is what one text, or one question, said of every row (a codec with its set), as a dictionary that JSON takes. Rows
are compared pairwise, record by record, with the first of them: what a text is like, and which facts are hard, is the same for all.
"""
import collections
import json
import math
import os
import pathlib

import numpy as np

# What is told, and what it is called in the question.
KINDS = {"digits": "magic number", "words": "secret phrase"}
SAME = ("what", "model", "context", "about", "number", "seed")  # of records of one question
PIECE = 8  # steps of a text whose losses are summed in one figure


def words_of(model):
    """Common words: those that are a token each, with a space in front."""
    return sorted(t[1:] for t in model.tokenizer.get_vocab() if t[0] in "\u0120\u2581" and 4 <= len(t) <= 8 and t[1:].isascii() and t[1:].islower()
                  and t[1:].isalpha())


def draw(kind, rng, words):
    if kind == "digits":
        return "".join(str(d) for d in rng.integers(0, 10, 7))
    return " ".join(words[i] for i in rng.integers(0, len(words), 4))


class Trial:
    """A prompt in which one fact of each kind is told, and a question for each. What a trial is depends on its number and the seed alone.

    `body` are the tokens before the questions. `asked` has of each kind the question's tokens, the answer's, and how many tokens before
    the body's end it was told; `open` the fact, and the question alone, without the answer's beginning. Facts lie past the sink and before the recent window, so that they have been compressed.
    """

    def __init__(self, model, fillers, number, seed, context, words):
        rng = np.random.default_rng([seed, number])
        self.filler = list(fillers)[number % len(fillers)]
        text, marks = fillers[self.filler], model.marks
        start = int(rng.integers(0, len(text) - context))
        text, told = text[start:start + context], {}
        begin, end = 100, context - 400
        for kind in KINDS:
            told[kind] = (int(rng.integers(begin, end)), draw(kind, rng, words))
        self.body, at, self.asked, self.open = model.encode(marks.first + marks.user), 0, {}, {}
        for kind, (where, fact) in sorted(told.items(), key=lambda x: x[1][0]):
            name = KINDS[kind]
            self.body += text[at:where] + model.encode(f'\n\nRemember this: the {name} is "{fact}". I will ask for it later.\n\n')
            at = where
            question = model.encode(f'\n\nWhat is the {name}?{marks.answer}The {name} is "')
            self.asked[kind] = [question, model.encode(fact), len(self.body)]
            self.open[kind] = fact, model.encode(f"\n\nWhat is the {name}?{marks.answer}")
        self.body += text[at:]
        for a in self.asked.values():
            a[2] = len(self.body) - a[2]


def records_of(path):
    """Those of a log; a line that was cut off is none."""
    records = []
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            pass
    return records


class Log:
    """Records, one a line of a file, so that a run may be stopped and gone on with, and runs summed. What the logs `others` have is
    not done again either."""

    def __init__(self, path=None, others=()):
        self.records, self._file = records_of(path) if path and os.path.exists(path) else [], None
        if path:
            self._file = open(path, "a+")
            self._file.seek(0)
            self._file.write("" if self._file.read()[-1:] in ("", "\n") else "\n")
        self._done = {self._key(r) for r in [*self.records, *(r for other in others for r in records_of(other))]}

    @staticmethod
    def _key(r):
        return json.dumps([r[k] for k in SAME] + [sorted(r["rows"])])

    def has(self, **record):
        return self._key({**record, "rows": dict.fromkeys(record["rows"])}) in self._done

    def add(self, **record):
        self.records.append(record)
        self._done.add(self._key(record))
        if self._file:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


def mean_and_error(x):
    """The mean, and its standard error."""
    x = np.asarray(x, np.float64)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def merged(records):
    """Records of the same question are one, with the rows of all of them; of a row that is there twice the first counts."""
    out = {}
    for r in records:
        key = tuple(r[k] for k in SAME)
        if key not in out:
            out[key] = {**r, "rows": {}, "errors": {}}
        out[key]["rows"] = {**r["rows"], **out[key]["rows"]}
        out[key]["errors"] = {**r.get("errors", {}), **out[key]["errors"]}
    return list(out.values())


def report(records):
    """Lines of text: tables of what the records say, row by row, each beside the first one over the records that have both."""
    groups = collections.defaultdict(list)
    for r in merged(records):
        groups[r["what"], r["model"], r["context"], r["about"]].append(r)
        if r["what"] == "recall":
            groups[r["what"], r["model"], r["context"], f"{r['about']} in {r['filler']}"].append(r)
    by_what = {"recall": recall_lines, "answer": answer_lines, "text": text_lines}
    for (what, model, context, about), of in groups.items():
        first = next(iter(of[0]["rows"]))
        yield f"# {what}, {about}: {model}, contexts of {context} tokens, seeds {sorted({r['seed'] for r in of})}; all less {first}'s, (standard error)"
        for row in dict.fromkeys(n for r in of for n in r["rows"]):
            yield f"{row:28} " + by_what[what]([r for r in of if row in r["rows"]], row, first)


def parts_of(of):
    """Into how many parts places are told apart: contexts that few models were trained on in eighths."""
    return 4 if of[0]["context"] < 4096 else 8


def recall_lines(of, row, first):
    """Counts, the answer's loss, and both less the first row's; counts by distance, a quarter (or eighth) of the trials each, the
    nearest first."""
    good, nll = (np.array([r["rows"][row][i] for r in of], np.float64) for i in (0, 1))
    base = [np.array([r["rows"][first][i] for r in of], np.float64) for i in (0, 1)]
    quarters = [q for q in np.array_split(np.argsort([r["back"] for r in of], kind="stable"), parts_of(of)) if len(q)]
    (less, se), (worse, nll_se) = mean_and_error(good - base[0]), mean_and_error(nll - base[1])
    line = (f"recalled {int(good.sum()):4} of {len(of)} {100 * less:+6.1f} ({100 * se:.1f}) %  nll {nll.mean():6.3f} {worse:+.3f} ({nll_se:.3f})  by tokens back: "
            + ", ".join(f"{min(of[i]['back'] for i in q)}+ {int(good[q].sum())}/{len(q)}" for q in quarters))
    seen = [r["errors"][row] for r in of if row in r["errors"]]
    if seen:
        line += f"  bias {np.mean([e[0] for e in seen]):+.3f}, logit error {math.sqrt(np.mean([e[1] for e in seen])):.3f}"
    return line


def answer_lines(of, row, first):
    """Of answers that the model wrote by itself, the likeliest token each time: how many have the fact, how many ended, and how long
    they are; less the first row's. Who repeats itself for ever has long answers, who has lost the thread may have short ones."""
    said, tokens, ended = (np.array([r["rows"][row][i] for r in of], np.float64) for i in range(3))
    base = [np.array([r["rows"][first][i] for r in of], np.float64) for i in range(3)]
    (less, se), (longer, tokens_se) = mean_and_error(said - base[0]), mean_and_error(tokens - base[1])
    return (f"said {int(said.sum()):4} of {len(of)} {100 * less:+6.1f} ({100 * se:.1f}) %  answers of {tokens.mean():5.1f} tokens "
            f"{longer:+.2f} ({tokens_se:.2f}), {int(tokens.min())} to {int(tokens.max())}  ended {int(ended.sum())} "
            f"({int((ended - base[2]).sum()):+})")


def text_lines(of, row, first):
    """Perplexity, by how much it is more than the first row's, and KL; both by quarter (or eighth) of the context."""
    sizes = np.concatenate([r["tokens"] for r in of]).astype(np.float64)
    nll, base, kl = (np.concatenate([r["rows"][n][i] for r in of]) for n, i in ((row, 0), (first, 0), (row, 1)))
    more = (nll.sum() - base.sum()) / sizes.sum()
    parts = parts_of(of)
    quarters = [np.array_split(np.array(r["rows"][row][1]) / r["tokens"], parts) for r in of]
    return (f"perplexity {math.exp(nll.sum() / sizes.sum()):8.3f} {100 * math.expm1(more):+6.2f} ({100 * mean_and_error((nll - base) / sizes)[1]:.2f}) %  "
            f"KL {kl.sum() / sizes.sum():.4f} ({mean_and_error(kl / sizes)[1]:.4f})  by {'quarter' if parts == 4 else 'eighth'} of the context: "
            + ", ".join(f"{np.mean([q[i].mean() for q in quarters if len(q[i])]):.4f}" for i in range(parts)) + f"  ({int(sizes.sum())} tokens)")
