"""KvdLinker: SGLang's external linker, with kvd as the place that pages go to."""
from __future__ import annotations

import collections
import hashlib
import logging
import os
import time
from typing import Any, Optional

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from ..engines import COMPRESSED, MISSING, PAGE, Breaker, Counters, PageStore, Transfers
from ._setup import Setup, prepare

logger = logging.getLogger(__name__)
_REMEMBER = 1 << 17  # pages that were loaded with losses
_MOST_OFFLOADS = 256  # queued ones


class _Done:
    """Loads are over before a forward begins, so no layer has to be waited for."""

    def set_consumer(self, index: int) -> None:
        pass

    def wait_until(self, layer: int) -> None:
        pass


class KvdLinker(UnifiedCacheLinker):  # type: ignore[misc]
    """Called by the scheduler's thread alone.

    SGLang aborts a request whose load fails once its forward has begun. So pages are loaded when a load is queued: if that fails, SGLang
    takes its word back and computes them. Offloads are done in a thread.
    """

    def __init__(self, server_args: Any, params: Any, *, components: Any, extra_config: Optional[dict[str, Any]] = None, forward_stream: Any = None,
                 _setup: Optional[Setup] = None):
        setup = _setup or prepare(server_args, params, components, dict(extra_config or {}))
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        self.forward_stream, self.pools, self.layer_done_counter = forward_stream, {PoolName.KV: pool}, _Done()
        self._policy, self._lease, self._restore = setup.policy, setup.lease, setup.restore
        self._k, self._v = [_blocks(x) for x in pool.k_buffer], [_blocks(x) for x in pool.v_buffer]
        self.counters, breaker = Counters(), Breaker()
        self._asks, self._offloads = (PageStore(lambda name=name: setup.open(name), breaker, self.counters)
                                      for name in ("sglang-scheduler", "sglang-offload"))
        self._asks.start()
        self._offloads.start()
        self._transfers, self._job, self._queued = Transfers(most_stores=_MOST_OFFLOADS), 0, 0
        self._completed: "collections.deque[bool]" = collections.deque()
        self._found: dict[str, tuple[list[bytes], bytes, int, float]] = {}  # keys, kinds, lease, until
        self._decoded: "collections.OrderedDict[bytes, None]" = collections.OrderedDict()
        self._epoch, self._used = b"", False

    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        self._used = True
        keys, now = self._keys(transfers[0]), time.monotonic()
        had = self._found.get(rid)
        if had is None or had[0] != keys or now >= had[3]:
            self._drop(rid)
            answer = self._asks.lookup([keys], self._lease, self._restore)
            kinds = answer[0].kinds[:answer[0].pages] if answer else b""
            had = self._found[rid] = (keys, kinds, answer[0].lease if answer else 0, now + (self._lease / 2 if kinds else 1))
        for other in [r for r, f in self._found.items() if now >= f[3] and r != rid]:
            self._drop(other)
        # Where in its prompt the tail begins is not told, so that none of its pages is taken for the prompt's first one.
        n = self._policy.usable(had[1], self._policy.first)
        return [n] if n else []

    def load(self, rid: str, transfers: list[Any]) -> bool:
        keys, blocks = self._keys(transfers[0]), _pages(transfers[0].device_indices)
        kinds = None if blocks is None else self._asks.get(keys, self._paged(blocks))
        found = self._found.get(rid)
        self._drop(rid)
        if kinds is None or MISSING in kinds:
            self.counters.add(failed_loads=1)
            self._found[rid] = (found[0] if found else keys, b"", 0, time.monotonic() + self._lease)  # it is computed now
            return False
        for key, kind in zip(keys, kinds):
            if kind == COMPRESSED and self._policy.lossy:
                self._decoded[key] = None
                if len(self._decoded) > _REMEMBER:
                    self._decoded.popitem(last=False)
        self.counters.add(loaded_pages=len(keys))
        return True

    def start_layer_wise_loading(self) -> int:
        return -1

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        return True  # nothing writes any more

    def offload(self, transfers: list[Any], session_id: Optional[str] = None) -> bool:
        keys, blocks = self._keys(transfers[0]), _pages(transfers[0].device_indices)
        if blocks is None or self._queued >= _MOST_OFFLOADS or self._asks.breaker.open:
            return False
        self._used, self._job, self._queued = True, self._job + 1, self._queued + 1
        self._transfers.store(self._job, lambda: self._put(keys, blocks))
        return True

    def num_completed_offloads(self) -> int:
        done = self._transfers.finished()  # in the order in which they were queued, for one thread does them
        self._queued -= len(done)
        self._completed += [d.ok for d in done]
        return len(self._completed)

    def pop_completed_offload(self) -> bool:
        return self._completed.popleft()

    def reset(self) -> None:
        """SGLang's cache was flushed, perhaps because weights have changed: what was stored before is found no more by this engine, nor
        shared with any other, from now on."""
        self._transfers.wait(range(1, self._job + 1))
        self.num_completed_offloads()
        self._completed.clear()
        for rid in list(self._found):
            self._drop(rid)
        self._decoded.clear()
        if self._used:
            self._epoch = os.urandom(16)

    def close(self) -> None:
        self._transfers.close()
        self._asks.close()
        self._offloads.close()

    def _keys(self, transfer: Any) -> list[bytes]:
        keys = [bytes.fromhex(k) for k in transfer.keys]
        return [hashlib.sha256(b"kvd epoch " + self._epoch + k).digest() for k in keys] if self._epoch else keys

    def _paged(self, blocks: np.ndarray) -> Any:
        from .. import Paged

        return Paged(self._k, self._v, blocks, order="bthd")

    def _drop(self, rid: str) -> None:
        had = self._found.pop(rid, None)
        if had and had[2]:
            self._asks.release([had[2]])

    def _put(self, keys: list[bytes], blocks: np.ndarray) -> Optional[int]:
        """A node of SGLang's tree ends where a prompt ended, or where two departed: its last pages are exact, as a prompt's are. Its first
        one may be a prompt's first."""
        exact = self._policy.exact(0, len(keys), len(keys))
        there = self._offloads.lookup([keys], 0)
        if there is None:
            return None
        stored = 0
        wanted = [k == MISSING and key not in self._decoded for k, key in zip(there[0].kinds, keys)]
        for begin, end in _runs(wanted):
            kinds = self._offloads.put(keys[begin:end], self._paged(blocks[begin:end]), keys[begin - 1] if begin else None, exact[begin:end],
                                        bytes(end - begin))
            if kinds is None:
                return None
            stored += end - begin - kinds.count(MISSING)
        self.counters.add(stored_pages=stored)
        return stored


def _runs(wanted: list[bool]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for i, w in enumerate(wanted):
        if w and runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        elif w:
            runs.append((i, i + 1))
    return runs


def _blocks(buffer: torch.Tensor) -> torch.Tensor:
    """[slots, heads, dim] as [pages, tokens, heads, dim]."""
    n = buffer.shape[0] // PAGE
    return buffer[:n * PAGE].view(n, PAGE, *buffer.shape[1:])


def _pages(slots: torch.Tensor) -> Optional[np.ndarray]:
    """Numbers of the pages that these slots are, or None if they are not whole ones."""
    x = slots.cpu().numpy().reshape(-1, PAGE)
    whole = (x[:, 0] % PAGE == 0).all() and np.array_equal(x, x[:, :1] + np.arange(PAGE))
    return x[:, 0] // PAGE if whole else None
