"""Generation for several sequences at once, conversations, and the loss of a text."""
from __future__ import annotations

from typing import Callable, Optional, Sequence

import numpy as np

from .model import Cache, Model


class Sampler:
    """Chooses a token by its logits. temperature 0: the likeliest; else a random one, less so the lower it is, of the likeliest
    that have `top_p` of the probability together. The same seed makes the same choices."""

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: Optional[int] = None):
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}, and a number from 0 on is wanted")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}, and more than 0, at most 1 is wanted")
        self.temperature, self.top_p, self._random = temperature, top_p, np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> int:
        if self.temperature == 0:
            return int(np.argmax(logits))
        x = logits.astype(np.float64)
        p = np.exp((x - x.max()) / self.temperature)
        order = np.argsort(-p, kind="stable")
        total = np.cumsum(p[order]) / p.sum()
        order = order[: int(np.searchsorted(total, self.top_p * (1 - 1e-9))) + 1]
        return int(self._random.choice(order, p=p[order] / p[order].sum()))


def generate(model: Model, cache: Cache, prompts: Sequence[Sequence[int]], tokens: int, *,
             on_token: Optional[Callable[[int, int], None]] = None,
             on_logits: Optional[Callable[[np.ndarray], None]] = None, ignore_stop: bool = False,
             choose: Callable[[np.ndarray], int] = Sampler()) -> list[list[int]]:
    """Feeds each sequence its prompt, then up to `tokens` tokens of its own, as `choose` has them: the likeliest. Sequences that have
    stopped rest while the others go on. The last token of an answer is not fed: the next prompt may begin with it."""
    answers: list[list[int]] = [[] for _ in prompts]
    live = [i for i, p in enumerate(prompts) if p]
    feed: list[Sequence[int]] = list(prompts)
    for _ in range(tokens):
        if not live:
            break
        logits = model.forward(feed, cache)
        if on_logits:
            on_logits(logits)
        feed = [[] for _ in prompts]
        for row, i in enumerate(list(live)):
            token = choose(logits[row])
            answers[i].append(token)
            if on_token:
                on_token(i, token)
            if token in model.stop and not ignore_stop:
                live.remove(i)
            else:
                feed[i] = [token]
    return answers


class Conversation:
    """Turns of a chat with the model's marks; only new tokens are ever computed. A model without system turns has that text before
    the user's first."""

    def __init__(self, model: Model, system: str = "You are a helpful assistant."):
        self.model = model
        marks = self.marks = model.marks
        self._pending, self._before = marks.first + (marks.system.format(system) if marks.system else ""), "" if marks.system else f"{system}\n\n"
        self._last: list[int] = []  # an answer's last token, not fed yet

    def turn(self, text: str) -> list[int]:
        """What to feed for the user's next words."""
        ids = self._last + self.model.encode(f"{self._pending}{self.marks.user}{self._before}{text}{self.marks.answer}")
        self._before = ""
        return ids

    def rest(self) -> list[int]:
        """What is to be fed to end the latest turn, for another worker to begin the next."""
        ids, self._last, self._pending = self._last + self.model.encode(self._pending), [], ""
        return ids

    def resume(self) -> None:
        """The sequence holds turns already, the last of them ended."""
        self._pending = self._before = ""

    def answered(self, answer: Sequence[int]) -> str:
        """Notes the model's answer; returns its text."""
        ended = bool(answer) and answer[-1] in self.model.stop
        self._last = list(answer[-1:])
        self._pending = self.marks.after if ended else self.marks.end + self.marks.after
        return self.model.decode(answer[:-1] if ended else answer)


def loss(model: Model, cache: Cache, ids: Sequence[int], *, chunk: int = 16, skip: int = 0) -> tuple[float, int]:
    """Sum of the next-token losses (nats) of a text, fed `chunk` tokens at a time as in serving, and how many tokens that
    is; the first `skip` predictions do not count."""
    total, n = 0.0, 0
    for at in range(0, len(ids) - 1, chunk):
        new = list(ids[at:at + chunk])
        logits = model.forward([new], cache, every=True)
        targets = np.asarray(ids[at + 1:at + 1 + len(new)])
        logits = logits[: len(targets)].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(targets)), targets]
        counted = nll[max(0, skip - at):]
        total += float(counted.sum())
        n += len(counted)
    return total, n
