"""Queues of a worker process: loads and stores run in threads of their own, so that neither waits for the other or holds up the engine."""
from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from typing import Callable, Collection, Optional

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Done:
    job: int
    ok: bool
    bytes: int  # moved; 0 where it failed
    seconds: float
    load: bool


class _Queue:
    """One thread. Guarded by the lock of its `Transfers`."""

    def __init__(self, owner: "Transfers", load: bool):
        self.jobs: "collections.OrderedDict[int, Callable[[], Optional[int]]]" = collections.OrderedDict()
        self.thread = threading.Thread(target=owner._run, args=(self, load), daemon=True, name="kvd-load" if load else "kvd-store")


class Transfers:
    """Jobs are functions that return how many bytes they moved, or None if they failed. Each is reported once by `finished`."""

    def __init__(self, most_stores: int = 256, start: Callable[[], None] = lambda: None):
        """most_stores: queued ones; more fail at once, which only means that pages are not kept. start: called in each thread first."""
        self._changed = threading.Condition()
        self._done: list[Done] = []
        self._open: set[int] = set()
        self._closing = False
        self._most_stores, self._start = most_stores, start
        self._loads, self._stores = _Queue(self, True), _Queue(self, False)
        for q in (self._loads, self._stores):
            q.thread.start()

    def load(self, job: int, work: Callable[[], Optional[int]]) -> None:
        with self._changed:
            self._add(self._loads, job, work)

    def store(self, job: int, work: Callable[[], Optional[int]]) -> None:
        with self._changed:
            if len(self._stores.jobs) >= self._most_stores:
                self._done.append(Done(job, False, 0, 0.0, False))
            else:
                self._add(self._stores, job, work)

    def _add(self, q: _Queue, job: int, work: Callable[[], Optional[int]]) -> None:
        self._open.add(job)
        q.jobs[job] = work
        self._changed.notify_all()

    def finished(self) -> list[Done]:
        with self._changed:
            done, self._done = self._done, []
            return done

    def wait(self, jobs: Collection[int], patience: float = 1.0) -> None:
        """Until none of them touches the engine's blocks any more. Stores that have not begun after `patience` seconds are given up: the
        engine waits for its blocks."""
        with self._changed:
            if self._changed.wait_for(lambda: self._open.isdisjoint(jobs), patience):
                return
            for job in jobs:
                if self._stores.jobs.pop(job, None) is not None:
                    self._end(Done(job, False, 0, 0.0, False))
            self._changed.wait_for(lambda: self._open.isdisjoint(jobs))

    def rest(self, seconds: float) -> None:
        """For an engine that has nothing else to do while jobs are under way: until one has ended, and so long at most. Otherwise it would
        ask again at once, and these threads would wait for the interpreter's lock."""
        with self._changed:
            if self._open:
                self._changed.wait_for(lambda: self._done or not self._open, seconds)

    def close(self, seconds: float = 10.0) -> None:
        """Stores that wait are given up, and what runs is waited for."""
        with self._changed:
            self._closing = True
            self._stores.jobs.clear()
            self._changed.notify_all()
        for q in (self._loads, self._stores):
            q.thread.join(seconds)

    def _end(self, done: Done) -> None:
        self._open.discard(done.job)
        self._done.append(done)
        self._changed.notify_all()

    def _run(self, q: _Queue, load: bool) -> None:
        self._start()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: q.jobs or self._closing)
                if not q.jobs:
                    return
                job, work = q.jobs.popitem(last=False)
            began, moved = time.monotonic(), None
            try:
                moved = work()
            except Exception:  # the engine goes on whatever happens here
                logger.exception("kvd: a %s failed", "load" if load else "store")
            with self._changed:
                self._end(Done(job, moved is not None, moved or 0, time.monotonic() - began, load))
