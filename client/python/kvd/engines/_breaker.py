"""A circuit breaker: after failures in a row kvd is left alone for a while, so that an engine does not wait for timeouts."""
from __future__ import annotations

import threading
import time
from typing import Callable


class Breaker:
    """Closed: all calls are made. After `failures` in a row it is open for `pause` seconds, twice as long each time up to `longest`;
    then one call is let through, and its outcome decides. Of any thread."""

    def __init__(self, failures: int = 3, pause: float = 0.5, longest: float = 30.0, clock: Callable[[], float] = time.monotonic):
        self._limit, self._pause, self._longest, self._clock = failures, pause, longest, clock
        self._lock = threading.Lock()
        self._failed, self._next, self._until, self._trying = 0, pause, 0.0, False
        self.opened = 0  # times

    @property
    def open(self) -> bool:
        with self._lock:
            return self._failed >= self._limit

    def allow(self) -> bool:
        """Whether to make a call now. If so, `succeed` or `fail` has to follow."""
        with self._lock:
            if self._failed < self._limit:
                return True
            if self._trying or self._clock() < self._until:
                return False
            self._trying = True
            return True

    def succeed(self) -> None:
        with self._lock:
            self._failed, self._next, self._trying = 0, self._pause, False

    def fail(self) -> None:
        with self._lock:
            self._failed += 1
            if self._failed < self._limit or (self._failed > self._limit and not self._trying):
                return  # the latter: a call that had begun before it opened
            self.opened += self._failed == self._limit
            self._trying = False
            self._until = self._clock() + self._next
            self._next = min(2 * self._next, self._longest)
