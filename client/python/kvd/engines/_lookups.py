"""What is there of requests' prompts, asked in a thread: a scheduler asks again and again, and never waits long."""
from __future__ import annotations

import dataclasses
import logging
import threading
import time
from typing import Callable, Optional, Sequence

from ._store import Held, Ranks

logger = logging.getLogger(__name__)
_NOTHING = Held(b"", ())
_WAIT = 0.002  # seconds that an asker waits for its answer at most
_SHARE = 0.01  # of an asker's time that may go into waiting


@dataclasses.dataclass
class Finding:
    """An answer: kinds of the leading pages that are there, held by a lease of each rank."""

    begin: int  # the first page asked for
    kinds: bytes
    leases: tuple[int, ...]
    until: float  # when it is to be asked anew


@dataclasses.dataclass
class _Question:
    begin: int
    keys: Sequence[bytes]
    asked: float


class _Allowance:
    """How long may be waited now: a share of the time that goes by, which is saved up to the longest wait."""

    def __init__(self, share: float, most: float, clock: Callable[[], float]):
        self._share, self._most, self._clock = share, most, clock
        self._left, self._at = most, clock()

    def left(self) -> float:
        now = self._clock()
        self._left, self._at = min(self._most, self._left + self._share * (now - self._at)), now
        return self._left

    def spend(self, seconds: float) -> None:
        self._left -= seconds


class Lookups:
    """One thread that asks for all requests that wait, in one call. `lease`: seconds that what is found stays. Whoever asks waits a little
    for the answer, as it comes in half a millisecond, and would be wanted a step later otherwise; but not so for each of many requests
    that come at once: those wait for a step, and are asked for together."""

    def __init__(self, ranks: Ranks, lease: float = 30.0, patience: float = 1.0, clock: Callable[[], float] = time.monotonic, restore: float = 0.0):
        """patience: seconds after which a question that has no answer is a miss, tiers apart. restore: seconds that a call may wait for
        those, at each rank; a question waits for the call that is on its way, and for its own."""
        self._waits = _Allowance(_SHARE, _WAIT, time.monotonic)
        self._ranks, self._lease, self._patience, self._clock, self._restore = ranks, lease, patience, clock, restore
        self._longest = patience + 2 * restore * len(ranks.stores)
        self._changed = threading.Condition()
        self._questions: dict[str, _Question] = {}
        self._asked: dict[str, _Question] = {}  # on their way
        self._answers: dict[str, Finding] = {}
        self._leases: list[tuple[int, ...]] = []  # to be released
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="kvd-lookup")
        self._thread.start()

    def find(self, request: str, begin: int, keys: Sequence[bytes]) -> Optional[Finding]:
        """What is there of keys, which are those of the pages from `begin` on; None: ask again soon."""
        with self._changed:
            now = self._clock()
            had = self._answers.get(request)
            if had and had.begin == begin and now < had.until:
                return had
            pending = self._questions.get(request) or self._asked.get(request)
            if pending is None or pending.begin != begin:
                self._drop(request)
                if not keys:
                    return Finding(begin, b"", (), now)
                pending = self._questions[request] = _Question(begin, keys, now)
                self._changed.notify_all()
            if self._wait(lambda: request in self._answers):
                return self._answers[request]
            if now - pending.asked < self._longest:
                return None
            self._drop(request)
            had = self._answers[request] = Finding(begin, b"", (), now + self._patience)
            return had

    def _wait(self, over: Callable[[], bool]) -> bool:
        left = self._waits.left()
        if over() or left <= 0:
            return over()
        began = time.monotonic()
        self._changed.wait_for(over, left)
        self._waits.spend(time.monotonic() - began)
        return over()

    def take(self, request: str) -> Optional[Finding]:
        """The answer for the last time: its leases are the caller's."""
        with self._changed:
            return self._answers.pop(request, None)

    def forget(self, request: str) -> None:
        with self._changed:
            self._drop(request)

    def release(self, leases: tuple[int, ...]) -> None:
        if any(leases):
            with self._changed:
                self._leases.append(leases)
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(5)

    def _drop(self, request: str) -> None:
        self._questions.pop(request, None)
        self._asked.pop(request, None)  # its answer finds nobody, and its lease is released
        had = self._answers.pop(request, None)
        if had and any(had.leases):
            self._leases.append(had.leases)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._questions or self._leases or self._closing)
                if self._closing:
                    return
                self._asked, self._questions = self._questions, {}
                leases, self._leases = self._leases, []
                asked = dict(self._asked)
            for x in leases:
                self._ranks.release(x)
            if not asked:
                continue
            try:
                answers = self._ranks.lookup([q.keys for q in asked.values()], self._lease, self._restore)
            except Exception:  # the engine goes on whatever happens here
                logger.exception("kvd: a lookup failed")
                answers = [_NOTHING] * len(asked)
            with self._changed:
                now = self._clock()
                for (request, q), a in zip(asked.items(), answers):
                    if self._asked.get(request) is not q:
                        self._leases += [a.leases] if any(a.leases) else []
                        continue
                    self._answers[request] = Finding(q.begin, a.kinds, a.leases, now + (self._lease / 2 if a.kinds else self._patience))
                self._asked = {}
                self._changed.notify_all()
