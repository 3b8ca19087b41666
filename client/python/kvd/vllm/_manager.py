"""The scheduler's side: which chunks of a request are in kvd, and which are worth storing."""
from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import os
import time
from typing import Any, Collection, Iterable, Optional

from ..engines import COMPRESSED, EXACT, PAGE, Adapters, Counters, Lookups, PageStore, Ranks, Tails, split_key
from ._setup import Setup, compat

logger = logging.getLogger(__name__)
_REMEMBER = 1 << 17  # keys
_AGAIN = 60.0  # seconds after which a key that was stored may be offered again


@dataclasses.dataclass
class Load(compat.LoadStoreSpec):  # type: ignore[name-defined,misc]
    """What a worker is told to load: pages in the order of the blocks. They are held by leases of the scheduler's."""

    keys: list[bytes]


@dataclasses.dataclass
class Run:
    """Pages that follow each other in a chain."""

    keys: list[bytes]
    after: Optional[bytes]
    exact: bytes
    fresh: bool = False  # kvd had none of them when their request was looked up: it need not be asked again


@dataclasses.dataclass
class Store(compat.LoadStoreSpec):  # type: ignore[name-defined,misc]
    runs: list[Run]
    passed: list[list[bytes]] = dataclasses.field(default_factory=list)  # runs of pages for kvd to encode those that are exact


@dataclasses.dataclass
class _Request:
    hashes: Any  # vLLM's list of block hashes, which grows
    mixed: bytes  # into the keys; empty: nothing
    pages: int  # whole ones of the prompt
    stored: bool  # whether its chunks may be
    loaded: bool
    keys: list[bytes] = dataclasses.field(default_factory=list)  # of pages, as far as they were wanted
    chunks: dict[bytes, int] = dataclasses.field(default_factory=dict)  # of these keys, by the block hashes that name them
    begin: int = 0  # chunk where the last sweep began
    missing: Optional[int] = None  # from this chunk on nothing was there; None: not known
    passed: int = 0  # pages before that one are told of, if they are exact and the prompt has gone on
    usable: Optional[int] = 0  # chunks from there that may be loaded; None: not known yet


class KvdManager(compat.OffloadingManager):  # type: ignore[name-defined,misc]
    """Called by the scheduler's thread alone."""

    def __init__(self, setup: Setup, hashes_per_chunk: int, ranks: Optional[Ranks] = None):
        self._setup, self._per_chunk = setup, hashes_per_chunk
        self.counters = Counters()
        if ranks is None:
            ranks = Ranks([PageStore(lambda r=r: setup.open(r, "vllm-scheduler"), counters=self.counters) for r in range(setup.tp_size)])
        ranks.start()
        self._ranks, self._lookups = ranks, Lookups(ranks, lease=setup.lease, restore=setup.restore)
        self._requests: dict[str, _Request] = {}
        self._loading: dict[str, tuple[int, ...]] = {}  # leases
        self._adapters, self._tails = Adapters(), Tails()
        self._epoch = b""
        self._known: "collections.OrderedDict[bytes, float]" = collections.OrderedDict()  # chunks that are there, and since when
        self._decoded: "collections.OrderedDict[bytes, None]" = collections.OrderedDict()  # chunks that were loaded with losses
        self._said: set[str] = set()

    # What KvdConnector adds to vLLM's calls.

    def admit(self, request: Any) -> None:
        mixed, why = self._epoch, ""
        if request.mm_features or request.prompt_embeds is not None:
            why = "requests with media or prompt embeddings are left out: their keys may be names that a client chose"
        elif request.lora_request is not None:
            r = request.lora_request
            digest = self._adapters.digest(r.lora_int_id, r.lora_path, r.load_inplace)
            if digest is None:
                why = f"requests with the adapter {r.lora_name} are left out: what {r.lora_path} holds is not what it was, or can't be read"
            mixed += b"lora" + (digest or "").encode()
        if why and why not in self._said:
            self._said.add(why)
            logger.warning("kvd: %s", why)
        self._requests[request.request_id] = _Request(request.block_hashes, mixed, request.num_prompt_tokens // PAGE, not why, not why)
        if why:
            self.counters.add(left_out=1)

    def sweep(self, request_id: str, computed: int) -> None:
        """vLLM is about to look up the request's chunks behind its `computed` tokens. Where blocks are smaller than chunks and it has some
        of a chunk's, vLLM would load the others alone; pages are read whole, so nothing is found then."""
        r = self._requests.get(request_id)
        if r is None or not r.loaded:
            return
        if computed % self._setup.chunk_tokens:
            r.usable = 0
            return
        per, r.begin = self._setup.pages_per_chunk, computed // self._setup.chunk_tokens
        self._extend(r)
        found = self._lookups.find(request_id, r.begin * per, r.keys[r.begin * per:])
        r.usable = self._setup.policy.usable(found.kinds, r.begin * per) // per if found else None
        r.missing = r.begin + -(-len(found.kinds) // per) if found else None

    def failed(self, requests: Iterable[str]) -> None:
        """A load failed. These requests are computed, whatever kvd says of them later."""
        for request in requests:
            if request in self._requests:
                self._requests[request].loaded = False
            self.counters.add(failed_loads=1)

    # vLLM's own calls.

    def lookup(self, key: bytes, req_context: Any) -> Any:
        r = self._requests.get(req_context.req_id)
        if r is None or not r.loaded:
            return compat.LookupResult.MISS
        if r.usable is None:
            return compat.LookupResult.RETRY
        i = self._chunk(r, key)
        return compat.LookupResult.HIT if r.begin <= i < r.begin + r.usable else compat.LookupResult.MISS

    def prepare_load(self, keys: Collection[bytes], req_context: Any) -> Load:
        r, per = self._requests[req_context.req_id], self._setup.pages_per_chunk
        chunks = [self._chunk(r, k) for k in keys]
        pages = [r.keys[i * per + j] for i in chunks for j in range(per)]
        found = self._lookups.take(req_context.req_id)
        self._loading[req_context.req_id] = found.leases if found else ()
        for i in chunks:
            at = i * per - (found.begin if found else 0)
            if self._setup.policy.lossy and (not found or COMPRESSED in found.kinds[at:at + per]):
                _remember(self._decoded, r.keys[i * per], None)
            _remember(self._known, r.keys[i * per], time.monotonic())
        if found and self._setup.policy.lossy:
            kinds = zip(r.keys[found.begin:], found.kinds)
            self._tails.note([key for i, (key, kind) in enumerate(kinds, found.begin) if kind == EXACT and i >= self._setup.policy.first])
        self.counters.add(hit_pages=len(pages), hit_requests=1)
        return Load(pages)

    def complete_load(self, keys: Collection[bytes], req_context: Any) -> None:
        self._lookups.release(self._loading.pop(req_context.req_id, ()))

    def prepare_store(self, keys: Collection[bytes], req_context: Any) -> Any:
        r = self._requests.get(req_context.req_id)
        if r is None or not r.stored or any(s.breaker.open for s in self._ranks.stores):
            return compat.PrepareStoreOutput([], Store([]), [])
        self._extend(r)
        per, now = self._setup.pages_per_chunk, time.monotonic()
        new: dict[int, bytes] = {}
        for key in keys:
            i = self._chunk(r, key)
            first = r.keys[i * per]
            if first not in self._decoded and now - self._known.get(first, -_AGAIN) >= _AGAIN:
                new[i] = key
                _remember(self._known, first, now)
        policy = self._setup.policy
        runs: list[Run] = []
        last = None
        for i in sorted(new):
            pages = r.keys[i * per:(i + 1) * per]
            exact = policy.exact(i * per, per, r.pages)
            self._tails.note([key for j, key in enumerate(pages, i * per) if exact[j - i * per] and j >= policy.first])
            fresh = r.missing is not None and i >= r.missing
            if last is not None and i == last + 1 and runs[-1].fresh == fresh:
                runs[-1].keys += pages
                runs[-1].exact += exact
            else:
                runs.append(Run(pages, r.keys[i * per - 1] if i else None, exact, fresh))
            last = i
        return compat.PrepareStoreOutput([new[i] for i in sorted(new)], Store(runs, self._passed(r, last)), [])

    def _passed(self, r: _Request, chunk: Optional[int]) -> list[list[bytes]]:
        """What kvd may encode once the prompt's pages up to this chunk are there: exact pages that were the last ones of what it goes on
        from. Its own last ones, and what is decoded behind them, do not count."""
        if chunk is None:
            return []
        there, begin = (chunk + 1) * self._setup.pages_per_chunk, max(r.passed, self._setup.policy.first)
        r.passed = max(begin, min(there, r.pages) - self._setup.policy.last)
        return self._tails.passed(r.keys, begin, r.passed, there)

    def on_new_request(self, req_context: Any) -> Any:
        return compat.RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        self._lookups.forget(req_context.req_id)
        self._requests.pop(req_context.req_id, None)

    def reset_cache(self) -> None:
        """Weights may have changed: nothing that was stored before is found by this engine, nor shared with any other, from now on."""
        self._epoch = b"epoch" + os.urandom(16)
        self._known.clear()
        self._decoded.clear()
        self._tails.clear()
        for request, r in self._requests.items():
            self._lookups.forget(request)
            r.stored = r.loaded = False

    def get_stats(self) -> Any:
        return stats(self.counters)

    def shutdown(self) -> None:
        self._lookups.close()
        self._ranks.close()

    def _chunk(self, r: _Request, key: bytes) -> int:
        """Of vLLM's key, a block hash and the number of the KV group."""
        return r.chunks[key[:-4]]

    def _extend(self, r: _Request) -> None:
        """Keys of the chunks whose hashes there are by now."""
        per = self._setup.pages_per_chunk
        for i in range(len(r.keys) // per, len(r.hashes) // self._per_chunk):
            key = r.hashes[(i + 1) * self._per_chunk - 1]
            r.chunks[key] = i
            if r.mixed:
                key = hashlib.sha256(b"kvd mixed " + len(r.mixed).to_bytes(4, "big") + r.mixed + key).digest()
            r.keys += split_key(key, per)


def _remember(memory: "collections.OrderedDict[bytes, Any]", key: bytes, value: Any) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > _REMEMBER:
        memory.popitem(last=False)


METRICS = {
    "hit_requests": "Requests for which pages were loaded from kvd.",
    "hit_pages": "Pages of 64 tokens that were to be loaded from kvd.",
    "loaded_pages": "Pages that were loaded, by all ranks.",
    "stored_pages": "Pages that were stored, by all ranks, or that others had stored since their request was looked up.",
    "stored_exact_pages": "Of these, pages kept in bf16.",
    "encoded_pages": "Of those, pages that kvd has encoded, as their prompt had gone on.",
    "failed_loads": "Loads that failed, whose requests were computed.",
    "errors": "Calls that kvd did not answer.",
    "refusals": "Calls that kvd refused, such as stores without room.",
    "gone": "Calls whose pages were gone.",
    "skipped": "Calls that were not made because kvd had not answered before.",
    "left_out": "Requests that are never looked up or stored.",
}


def stats(counters: Counters) -> Any:
    """vLLM's form of them, or None if nothing has happened."""
    sums = counters.take()
    if not sums:
        return None
    s = compat.OffloadingConnectorStats()
    for name, n in sums.items():
        s.increase_counter(f"vllm:kvd_{name}", n)
    return s
