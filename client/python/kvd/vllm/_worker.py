"""The worker's side: pages between the engine's blocks and kvd, in threads of their own."""
from __future__ import annotations

import logging
from typing import Any, Callable, Optional, Sequence

import numpy as np
import torch

from .. import Paged
from .. import _library as lib
from ..engines import EXACT, MISSING, PAGE, Breaker, Counters, PageStore, Refused, Transfers, registered
from ._blocks import BlockLayout, probe
from ._manager import Load, Run, Store, stats
from ._setup import Setup, compat

logger = logging.getLogger(__name__)
_PAGES, _STAGED = 1024, 64  # at once; where blocks have to be put in order first


class _Blocks:
    """The engine's KV in the host's memory: `paged(blocks)` says where pages lie, for kvd to read or write.

    Blocks whose tokens lie at regular distances are read and written where they are. Others, such as those of AMX, go through memory
    of this object's own, in order: by `fetch` before a put, and `store` after a get."""

    def __init__(self, setup: Setup, tensors: Sequence[torch.Tensor], layout: BlockLayout):
        self._setup, self._layout = setup, layout
        h, t, d = setup.kv_heads, setup.block_tokens, setup.head_dim
        self._caches = [x.view(torch.int16).numpy().view(np.uint16).reshape(x.shape[0], h, 2 * t * d) for x in tensors]
        self.most = max(1, (_PAGES if layout.regular else _STAGED) * PAGE // t)  # blocks at once
        if not layout.regular:
            shape = (len(tensors), self.most, h, t, d)
            self._k, self._v = np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)
            self._paged = Paged(list(self._k), list(self._v), [])
        else:
            self._paged = Paged(*([self._view(c, s) for c in self._caches] for s in (layout.strides_k, layout.strides_v)), [])

    def paged(self, blocks: np.ndarray) -> Any:
        return self._paged.with_blocks(blocks if self._layout.regular else np.arange(len(blocks)))

    def _view(self, cache: np.ndarray, strides: Any) -> np.ndarray:
        """[blocks, heads, tokens, dim] of K or V."""
        first, token, dim = strides
        shape = (*cache.shape[:2], self._setup.block_tokens, self._setup.head_dim)
        return np.lib.stride_tricks.as_strided(cache[:, :, first:], shape, (*cache.strides[:2], token * 2, dim * 2))

    def after(self) -> Callable[[], None]:
        return lambda: None

    def fetch(self, blocks: np.ndarray) -> None:
        if self._layout.regular:
            return
        n = len(blocks)
        for cache, k, v in zip(self._caches, self._k, self._v):
            page = cache[blocks]
            np.take(page, self._layout.k, axis=2, out=k[:n])
            np.take(page, self._layout.v, axis=2, out=v[:n])

    def store(self, blocks: np.ndarray) -> None:
        if self._layout.regular:
            return
        n = len(blocks)
        for cache, k, v in zip(self._caches, self._k, self._v):
            rows = (n, self._setup.kv_heads, -1)
            cache[blocks] = np.take(np.concatenate([k[:n].reshape(rows), v[:n].reshape(rows)], axis=2), self._layout.inverse, axis=2)


class _GpuBlocks:
    """The engine's KV in the GPU's memory: pages are read and written where they are, by a stream of this object's own, which waits for
    what the engine had given its own stream when `after` was called."""

    def __init__(self, setup: Setup, tensors: Sequence[torch.Tensor], layout: BlockLayout):
        if not layout.regular:
            raise Refused("blocks whose tokens lie at no regular distances are not served on a GPU")
        h, t, d = setup.kv_heads, setup.block_tokens, setup.head_dim
        self.most = max(1, _PAGES * PAGE // t)  # blocks at once
        self._stream = torch.cuda.Stream(tensors[0].device)
        k, v = ([torch.as_strided(x.view(torch.bfloat16), (x.shape[0], h, t, d), (h * 2 * t * d, 2 * t * d, token, dim), first)
                 for x in tensors] for first, token, dim in (layout.strides_k, layout.strides_v))  # type: ignore[misc]
        self._paged = Paged(k, v, [], stream=self._stream.cuda_stream)

    def after(self) -> Callable[[], None]:
        """Called by the engine's thread. What it returns is called by the one that moves pages, before it does."""
        event = torch.cuda.Event()
        event.record()
        return lambda: self._stream.wait_event(event)

    def paged(self, blocks: np.ndarray) -> Any:
        return self._paged.with_blocks(blocks)

    def fetch(self, blocks: np.ndarray) -> None:
        pass

    def store(self, blocks: np.ndarray) -> None:
        pass


def gpu_uuid(device: torch.device) -> str:
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def on_its_gpu(pages: Any, uuid: str, rank: int, ranks: int) -> Any:
    """The same, if its kvd runs on the rank's GPU: another could not read or write its memory, or only by way of both. Each call would be
    refused, and no page were ever found. An older kvd does not name its GPU, and is taken to be on it if there is one rank alone."""
    where = pages.client.info["device_uuid"] if pages.client.on_gpu else "the CPU"
    if where == uuid or not where and ranks == 1:
        return pages
    pages.close()
    raise lib.PreconditionError(f"it runs on {where or 'a GPU that it does not name, as older ones'}, and rank {rank} of the engine on {uuid}: a kvd is "
                                "wanted there (--backend cuda, --device), and its address; with tensor parallelism one for each rank, and addresses in "
                                "the order of ranks")


class KvdWorker(compat.OffloadingWorker):  # type: ignore[name-defined,misc]
    """Called by the worker's thread alone. vLLM takes every job for done well; those that were not are told by `take_failed`."""

    def __init__(self, setup: Setup, caches: Any, stores: Optional[tuple[PageStore, PageStore]] = None, layout: Optional[BlockLayout] = None,
                 engine: Optional[tuple[Any, dict[str, torch.Tensor]]] = None):
        """stores: for loads and for stores. engine: its config, and its layers' caches as its attention sees them."""
        refs = caches.group_data_refs[0]
        if len(caches.group_data_refs) != 1 or len(refs) != len(setup.layers) or len({r.tensor_idx for r in refs}) != len(refs):
            raise Refused("KV caches that are packed or shared between layers are not served")
        size = 4 * setup.block_tokens * setup.kv_heads * setup.head_dim
        tensors = [caches.tensors[refs[i].tensor_idx].tensor for i in setup.order]
        for t in tensors:
            if t.shape[1] != size or not t.is_contiguous():
                raise Refused(f"blocks of {t.shape[1]} bytes are not served where K and V take {size}")
        if layout is None:
            name = setup.facts["layers"][0] if engine else ""
            write = compat.writer(engine[0], name, engine[1][name], tensors[0]) if engine else (lambda *x: compat.write_cpu(*x, "auto"))
            layout = probe(write, setup.kv_heads, setup.block_tokens, setup.head_dim)
        self._setup, self.counters, breaker = setup, Counters(), Breaker()
        device = tensors[0].device

        blocks: Any = _GpuBlocks if device.type == "cuda" else _Blocks
        self._targets, self._sources = blocks(setup, tensors, layout), blocks(setup, tensors, layout)

        def opened() -> Any:
            pages = setup.open(setup.rank, "vllm-worker")
            if device.type != "cuda":
                return pages
            pages = on_its_gpu(pages, gpu_uuid(device), setup.rank, setup.tp_size)
            return registered(pages, self._sources.paged(np.zeros(0, np.int64)))

        self._in, self._out = stores or tuple(PageStore(opened, breaker, self.counters) for _ in range(2))
        for s in (self._in, self._out):
            s.start()
        self._transfers = Transfers(start=lambda: torch.cuda.set_device(device) if device.type == "cuda" else None)
        self._loads: dict[int, np.ndarray] = {}  # that are under way, and their blocks
        self._failed: dict[int, np.ndarray] = {}

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Store) -> bool:
        after = self._sources.after()

        def work() -> Optional[int]:
            after()
            moved = self._store(np.asarray(src_spec.block_ids, np.int64), dst_spec.runs)
            for keys in dst_spec.passed if moved is not None else []:
                self.counters.add(encoded_pages=self._out.encode(keys) or 0)
            return moved

        self._transfers.store(job_id, work)
        return True

    def submit_load(self, job_id: int, src_spec: Load, dst_spec: Any) -> bool:
        after, blocks = self._targets.after(), np.asarray(dst_spec.block_ids, np.int64)

        def work() -> Optional[int]:
            after()
            return self._load(blocks, src_spec)

        self._loads[job_id] = blocks
        self._transfers.load(job_id, work)
        return True

    def get_finished(self) -> list[Any]:
        done = self._transfers.finished()
        for d in done:
            blocks = self._loads.pop(d.job, None)
            if blocks is not None and not d.ok:
                self._failed[d.job] = blocks
        return [compat.TransferResult(d.job, True, d.bytes if d.ok else None, d.seconds if d.ok else None) for d in done]

    def take_failed(self) -> dict[int, np.ndarray]:
        """Loads among those that have finished, and the blocks that they were to fill."""
        failed, self._failed = self._failed, {}
        return failed

    def rest(self, seconds: float) -> None:
        self._transfers.rest(seconds)

    def wait(self, job_ids: set[int]) -> None:
        self._transfers.wait(job_ids)

    def get_stats(self) -> Any:
        return stats(self.counters)

    def shutdown(self) -> None:
        self._transfers.close()
        self._in.close()
        self._out.close()

    def _bytes(self, pages: int) -> int:
        return pages * PAGE * len(self._setup.layers) * self._setup.kv_heads * self._setup.head_dim * 4

    def _parts(self, blocks: np.ndarray, keys: Sequence[bytes], most: int) -> Any:
        """Pages with their blocks, of `most` blocks at most: (first page, keys, blocks)."""
        per_block, per_page = max(1, self._setup.block_tokens // PAGE), max(1, PAGE // self._setup.block_tokens)
        pages = most // per_page * per_block
        for i in range(0, len(keys), pages):
            part = keys[i:i + pages]
            yield i, part, blocks[i // per_block * per_page:(i + len(part) + per_block - 1) // per_block * per_page]

    def _store(self, blocks: np.ndarray, runs: Sequence[Run]) -> Optional[int]:
        stored, at = 0, 0
        per_block, per_page = max(1, self._setup.block_tokens // PAGE), max(1, PAGE // self._setup.block_tokens)
        for run in runs:
            n = len(run.keys) // per_block * per_page
            had = bytes(len(run.keys)) if run.fresh else self._kinds(run.keys)
            if had is None:
                return None
            for i, keys, part in self._parts(blocks[at:at + n], run.keys, self._sources.most):
                there = had[i:i + len(keys)]
                if MISSING not in there:
                    continue
                self._sources.fetch(part)
                after = run.keys[i - 1] if i else run.after
                kinds = self._out.put(keys, self._sources.paged(part), after, run.exact[i:i + len(keys)], there)
                if kinds is None:
                    return None
                new = [k for before, k in zip(there, kinds) if before == MISSING and k != MISSING]
                stored += len(new)
                self.counters.add(stored_pages=len(new), stored_exact_pages=new.count(EXACT))
            at += n
        return self._bytes(stored)

    def _kinds(self, keys: Sequence[bytes]) -> Optional[bytes]:
        found = self._out.lookup([keys], 0)
        return found[0].kinds if found else None

    def _load(self, blocks: np.ndarray, what: Load) -> Optional[int]:
        for _, keys, part in self._parts(blocks, what.keys, self._targets.most):
            kinds = self._in.get(keys, self._targets.paged(part))
            if kinds is None or MISSING in kinds:
                return None
            self._targets.store(part)
            self.counters.add(loaded_pages=len(keys))
        return self._bytes(len(what.keys))


