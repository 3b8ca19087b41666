"""Queues of page calls: puts and gets that a thread of libkvd's does, without the interpreter."""
from __future__ import annotations

import ctypes as c
import dataclasses
import threading
from typing import Any, Iterable, Optional, Sequence as Seq, Union

from . import _check
from . import _library as lib
from .pages import Paged, Pages

_POLLED = 64  # at once


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a ticket ended."""

    ticket: int
    kinds: bytes  # of each key, as `Pages.put` and `Pages.get` return them; empty where it failed
    seconds: float  # from its beginning to its end; 0: it never began
    error: Optional[lib.Error]  # what those would have raised


class PageQueue(lib.OfProcess):
    """Puts and gets of one `Pages`, done in the order in which they were queued; `Pages.queue` makes it. Any thread may call. It waits for no
    other queue: with one for gets and one for puts, no get waits for a put. kvd gives sessions turns, so to be apart there too they want
    Pages each. An event loop may wait for it: `fileno` is readable while tickets have ended that were not polled.

    Until a ticket is polled or taken back its blocks are libkvd's: those of a get must not be used, those of a put not be written. On a GPU
    it begins behind what was on the stream of its `Paged` when it was queued; what is launched after it was polled is behind it. Where kvd is gone, all
    that wait end as the one that found out did.
    """

    def __init__(self, pages: Pages, tickets: int = 256):
        super().__init__()
        self.pages = pages
        self._handle = c.c_void_p()
        self._lock = threading.RLock()  # of what tickets keep; a ticket may end before it is noted there
        self._kept: dict[int, tuple[Any, Paged]] = {}  # room for kinds, and blocks
        lib.call("kvd_queue_new", pages.client._open(), _check.integer("tickets", tickets, 1), c.byref(self._handle))
        pages.client._dependents.add(self)

    def _open(self) -> c.c_void_p:
        self._check_process()
        if not self._handle:
            raise lib.InvalidError("the queue was closed")
        return self._handle

    def put(self, keys: Iterable[bytes], source: Paged, *, after: Optional[bytes] = None,
            exact: Optional[Union[bytes, Seq[bool]]] = None, had: Optional[bytes] = None) -> int:
        """Queues what `Pages.put` does. Its ticket, 1, 2, ... of this queue; ExhaustedError: there are as many as there may be."""
        return self._queue("kvd_queue_put", source, self.pages._put(keys, source, after, exact, had))

    def get(self, keys: Iterable[bytes], target: Paged) -> int:
        """The same of `Pages.get`."""
        return self._queue("kvd_queue_get", target, self.pages._get(keys, target))

    def _queue(self, function: str, paged: Paged, arguments: tuple[Any, ...]) -> int:
        ticket, handle = c.c_uint64(), self._open()
        with self._lock:
            lib.call(function, handle, *arguments, c.byref(ticket))
            self._kept[ticket.value] = (arguments[-1], paged)
        return ticket.value

    def poll(self) -> list[Ended]:
        """Which tickets have ended, each once, in the order in which they did. Waits for nothing."""
        ended: list[Ended] = []
        some, n, handle = (lib.EndedStruct * _POLLED)(), c.c_uint32(_POLLED), self._open()
        for e in some:
            e.size = c.sizeof(e)
        with self._lock:
            while n.value == _POLLED:
                lib.call("kvd_queue_poll", handle, some, _POLLED, c.byref(n))
                for e in some[:n.value]:
                    kinds, _ = self._kept.pop(e.ticket)
                    error = lib.error(e.result, e.failure) if e.result else None
                    ended.append(Ended(e.ticket, b"" if error else bytes(kinds), e.us / 1e6, error))
        return ended

    def wait(self, ticket: int, seconds: float) -> bool:
        """Whether a ticket touches nothing any more, after so many seconds at most; `poll` tells of it all the same."""
        try:
            lib.call("kvd_queue_wait", self._open(), _check.integer("ticket", ticket, 0, _check.U64), _check.milliseconds("seconds", seconds))
        except lib.TimeoutError:
            return False
        return True

    def cancel(self, ticket: int) -> bool:
        """Takes back a ticket that has not begun; `poll` does not tell of it then. False: it has, or is over."""
        handle = self._open()
        try:
            lib.call("kvd_queue_cancel", handle, _check.integer("ticket", ticket, 0, _check.U64))
        except lib.PreconditionError:
            return False
        with self._lock:
            self._kept.pop(ticket, None)
        return True

    def fileno(self) -> int:
        """The eventfd. Nobody may read or write it, or close it."""
        fd = c.c_int()
        lib.call("kvd_queue_fd", self._open(), c.byref(fd))
        return fd.value

    def close(self) -> None:
        """Gives up tickets that have not begun, and waits for one that has. Calls of other threads must have returned."""
        if self._forked():
            return
        self.pages.client._dependents.discard(self)
        handle, self._handle = self._handle, c.c_void_p()
        if handle:
            lib.library().kvd_queue_free(c.byref(handle))
        self._kept.clear()

    def __enter__(self) -> "PageQueue":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()
