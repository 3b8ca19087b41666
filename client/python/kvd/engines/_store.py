"""Page stores as an engine may use them: whatever goes wrong is a miss, is counted, and opens a circuit breaker if it goes on."""
from __future__ import annotations

import collections
import functools
import logging
import threading
import time
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Optional, Sequence, TypeVar

from .. import _library as lib
from ._breaker import Breaker
from ._space import Refused

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_AWAY = (lib.TimeoutError, lib.UnavailableError, lib.LostError, lib.InternalError, OSError)  # kvd did not answer; other errors are answers
_LOOKUP_KEYS, _LOOKUP_REQUESTS, _LOOKUP_ALL = 4096, 256, 65536  # of a request, of a call, and keys of a call
_RESTORE_MOST = 60


def restore_seconds(extra: Mapping[str, Any], default: float) -> float:
    """What an engine's settings say about how long a lookup may wait for kvd's tiers."""
    seconds = extra.get("restore", default)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= _RESTORE_MOST:
        raise Refused(f"restore is {seconds!r}, and 0 to {_RESTORE_MOST} seconds are possible")
    return float(seconds)


class Counters:
    """Sums of any thread. `take` returns what has come since it was last called."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: "collections.Counter[str]" = collections.Counter()

    def add(self, **sums: int) -> None:
        with self._lock:
            self._sums.update(sums)

    def take(self) -> dict[str, int]:
        with self._lock:
            sums, self._sums = self._sums, collections.Counter()
        return {name: n for name, n in sums.items() if n}


class PageStore:
    """A `kvd.Pages` that is opened when it can be, and never raises after `start`. Of any thread."""

    def __init__(self, open_pages: Callable[[], Any], breaker: Optional[Breaker] = None, counters: Optional[Counters] = None):
        self._open_pages, self._lock = open_pages, threading.Lock()
        self._pages: Any = None
        self.breaker, self.counters = breaker or Breaker(), counters or Counters()

    def start(self) -> None:
        """Opens it. What kvd refuses is `Refused`: the engine must not start with it. A kvd that is away is waited for later on."""
        try:
            self._opened()
        except _AWAY as e:
            logger.warning("kvd is not there, so nothing is found until it is: %s", e)
        except (lib.Error, TypeError, ValueError) as e:
            raise Refused(f"kvd refuses this engine's pages: {e}") from e

    def _opened(self) -> Any:
        with self._lock:
            if self._pages is None:
                self._pages = self._open_pages()
            return self._pages

    def _call(self, what: str, call: Callable[[Any], _T]) -> Optional[_T]:
        if not self.breaker.allow():
            self.counters.add(skipped=1)
            return None
        try:
            result = call(self._opened())
        except _AWAY as e:
            before = self.breaker.opened
            self.breaker.fail()
            self.counters.add(errors=1)
            if self.breaker.opened != before:
                logger.warning("kvd: %s failed, and it is left alone for a while: %s", what, e)
            return None
        except lib.Error as e:
            self.breaker.succeed()
            self.counters.add(**{"gone" if isinstance(e, lib.NotFoundError) else "refusals": 1})
            logger.info("kvd: %s: %s", what, e)
            return None
        except BaseException:
            self.breaker.fail()
            raise
        if self.breaker.open:
            logger.warning("kvd answers again")
        self.breaker.succeed()
        return result

    def lookup(self, requests: Sequence[Sequence[bytes]], lease: float, restore: float = 0.0) -> Optional[list[Any]]:
        """What `kvd.Pages.lookup` says of each, or None. lease: seconds; restore: seconds in which tiers may give back what kvd's pool
        lacks, of all requests. Of long requests the first keys alone."""
        until = time.monotonic() + restore
        found: list[Any] = []
        for some in _calls(requests):
            left = max(0, int((until - time.monotonic()) * 1000)) if restore else 0
            answer = self._call("a lookup", lambda p, some=some, left=left: p.lookup(some, lease_ms=int(lease * 1000), restore_ms=left))
            if answer is None:
                self.release([f.lease for f in found if f.lease])
                return None
            found += answer
        return found

    def put(self, keys: Sequence[bytes], source: Any, after: Optional[bytes], exact: bytes, had: Optional[bytes] = None) -> Optional[bytes]:
        """had: kinds that a lookup has found of the keys, or MISSING; None: kvd is asked."""
        return self._call("a put", lambda p: p.put(keys, source, after=after, exact=exact if any(exact) else None, had=had))

    def encode(self, keys: Sequence[bytes]) -> Optional[int]:
        """Pages of a chain that has gone on, which were exact and are encoded now."""
        return self._call("an encoding", lambda p: p.encode(keys))

    def get(self, keys: Sequence[bytes], target: Any) -> Optional[bytes]:
        """None: what has been written can't be trusted."""
        return self._call("a get", lambda p: p.get(list(keys), target))

    def release(self, leases: Sequence[int]) -> None:
        if leases:
            self._call("a release", lambda p: p.release(list(leases)))

    def close(self) -> None:
        with self._lock:
            pages, self._pages = self._pages, None
        if pages is not None:
            for end in (pages.unregister, pages.close):  # the engine gives its memory back after this
                try:
                    end()
                except (lib.Error, OSError) as e:
                    logger.info("kvd: closing: %s", e)


def _calls(requests: Sequence[Sequence[bytes]]) -> Iterator[list[list[bytes]]]:
    some: list[list[bytes]] = []
    for keys in requests:
        first = list(keys[:_LOOKUP_KEYS])
        if len(some) == _LOOKUP_REQUESTS or sum(map(len, some)) + len(first) > _LOOKUP_ALL:
            yield some
            some = []
        some.append(first)
    if some:
        yield some


def registered(pages: Any, memory: Any) -> Any:
    """The same `kvd.Pages`, with kvd reading and writing the engine's blocks itself, if it can have their memory. memory: a `kvd.Paged` of
    all of it. Where it cannot, the log says why, once, and libkvd copies."""
    try:
        pages.register(memory)
    except (lib.InvalidError, lib.PreconditionError, lib.ExhaustedError) as e:
        _say_once(f"kvd: the engine's KV is not registered, so that libkvd copies its pages, which is slower: {e}")
    return pages


@functools.lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    logger.warning("%s", text)


class Held(NamedTuple):
    """Leading pages that all ranks have."""

    kinds: bytes  # the poorer one where ranks differ
    leases: tuple[int, ...]  # of each rank; 0: none


class Ranks:
    """The stores of all ranks of an engine, as its scheduler asks them: a page is there if each rank has its part of it."""

    def __init__(self, stores: Sequence[PageStore]):
        self.stores = list(stores)

    def start(self) -> None:
        for s in self.stores:
            s.start()

    def lookup(self, requests: Sequence[Sequence[bytes]], lease: float, restore: float = 0.0) -> list[Held]:
        """restore: as PageStore's, of each rank."""
        answers: list[Sequence[Any]] = []
        for s in self.stores:
            found = s.lookup(requests, lease, restore)
            if found is None:
                for other, had in zip(self.stores, answers):
                    other.release([f.lease for f in had if f.lease])
                return [Held(b"", ())] * len(requests)
            answers.append(found)
        held = []
        for found in zip(*answers):
            n = min(f.pages for f in found)
            kinds = bytes(min(k) for k in zip(*(f.kinds[:n] for f in found)))
            h = Held(kinds, tuple(f.lease or 0 for f in found))
            if not n:
                self.release(h.leases)
                h = Held(b"", ())
            held.append(h)
        return held

    def release(self, leases: Sequence[int]) -> None:
        for s, lease in zip(self.stores, leases):
            s.release([lease] if lease else [])

    def close(self) -> None:
        for s in self.stores:
            s.close()
