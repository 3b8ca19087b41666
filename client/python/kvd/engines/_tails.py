"""Pages that were kept exact as a chain's last ones, and which of them are in its middle by now: kvd may encode those."""
from __future__ import annotations

import collections
from typing import Iterable, Sequence

_BEHIND = 4  # pages that kvd wants to see behind those that it encodes
_CALL = 512  # keys of a call
_TIMES = 3  # that a page is told of: another chain may end near it for a while, or kvd be away


class Tails:
    """Of one thread. It knows what this engine has put or found; after a restart what it has not found again stays exact."""

    def __init__(self, most: int = 1 << 17):
        self._most = most
        self._told: "collections.OrderedDict[bytes, int]" = collections.OrderedDict()  # exact pages, and how often they were told of

    def note(self, keys: Iterable[bytes]) -> None:
        """These are exact, and no chain's first ones."""
        for key in keys:
            self._told[key] = 0
            self._told.move_to_end(key)
            if len(self._told) > self._most:
                self._told.popitem(last=False)

    def passed(self, keys: Sequence[bytes], begin: int, end: int, there: int) -> list[list[bytes]]:
        """keys: of a chain's pages, of which the first `there` have been put. Of those from `begin` to `end` that are known to be exact,
        runs of keys to tell kvd of, with one before them and those behind them that it wants to see."""
        runs: list[tuple[int, int]] = []
        for i in range(begin, end):
            told = self._told.get(keys[i])
            if told is None:
                continue
            if told + 1 < _TIMES:
                self._told[keys[i]] = told + 1
            else:
                del self._told[keys[i]]
            first, last = max(begin, i - 1), min(there, i + 1 + _BEHIND)
            if runs and first <= runs[-1][1] and last - runs[-1][0] <= _CALL:
                runs[-1] = (runs[-1][0], last)
            else:
                runs.append((first, last))
        return [list(keys[first:last]) for first, last in runs]

    def clear(self) -> None:
        self._told.clear()
