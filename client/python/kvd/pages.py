"""Pages: blocks of 64 tokens of an engine that keeps KV of its own, in its own blocks and under its own keys."""
from __future__ import annotations

import ctypes as c
import dataclasses
from typing import TYPE_CHECKING, Any, Iterable, Optional, Sequence as Seq, Union

import numpy as np

from . import _check, _prompts
from . import _library as lib
from ._client import Client, Codec, HeadDim

if TYPE_CHECKING:
    from ._queue import PageQueue

TOKENS = 64
MISSING, ENCODED, EXACT = 0, 1, 2
_AXES = "bhtd"


@dataclasses.dataclass(frozen=True)
class Found:
    """What is there of one request's pages."""

    pages: int  # leading ones that are there
    kinds: bytes  # of each key: MISSING, ENCODED or EXACT, also behind the first that is missing
    lease: int  # for `Pages.release`; 0: none
    restored: int = 0  # pages that were brought back from tiers for this
    behind: dict[str, int] = dataclasses.field(default_factory=dict)  # pages that the pool lacked, by the farthest tier of each


def _memory(what: str, x: Any) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Address, shape and strides in bytes of a tensor of bf16: NumPy's (uint16 bits) or PyTorch's."""
    if isinstance(x, np.ndarray):
        if x.dtype != np.uint16:
            raise TypeError(f"{what} is an array of {x.dtype}: bf16 bits are uint16")
        return x.__array_interface__["data"][0], x.shape, x.strides
    if not hasattr(x, "data_ptr") or not hasattr(x, "stride"):
        raise TypeError(f"{what} is a {_check.describe(x)}, and a tensor of PyTorch or an array of NumPy is wanted")
    if str(x.dtype) != "torch.bfloat16":
        raise TypeError(f"{what} is a tensor of {x.dtype}, and bfloat16 is wanted")
    if x.device.type not in ("cpu", "cuda"):
        raise lib.InvalidError(f"{what} is on {x.device}: pages are read from and written to memory of the host or of a CUDA device")
    return x.data_ptr(), tuple(x.shape), tuple(2 * s for s in x.stride())


def _on_gpu(k: Any, v: Any) -> bool:
    """Whether the tensors are in GPU memory: all of them, or none."""
    devices = {str(getattr(t, "device", "cpu")) for x in (k, v) for t in (x if isinstance(x, (list, tuple)) else [x])}
    if len(devices) > 1:
        raise lib.InvalidError(f"k and v are on {' and '.join(sorted(devices))}: one device is wanted")
    return devices.pop().startswith("cuda")


def _layers(name: str, x: Any, order: str) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Of each layer: address, shape and strides, both in the order block, head, token, dim."""
    if sorted(order.replace("l", "", 1)) != sorted(_AXES):
        raise lib.InvalidError(f"{name}'s order is {order!r}: b(lock), h(ead), t(oken) and d(im) are wanted, once each, and l(ayer) "
                               "for one tensor of all layers")
    if "l" in order:
        at = order.index("l")
        if isinstance(x, (list, tuple)):
            raise lib.InvalidError(f"{name} is a list, and its order {order!r} has layers: one tensor is wanted")
        address, shape, strides = _memory(name, x)
        if len(shape) != 5:
            raise lib.InvalidError(f"{name} has {len(shape)} dimensions, and order {order!r} has 5")
        rest = order.replace("l", "")
        each = [(address + i * strides[at], shape[:at] + shape[at + 1:], strides[:at] + strides[at + 1:]) for i in range(shape[at])]
    else:
        each, rest = [_memory(f"{name}[{i}]", t) for i, t in enumerate(x)], order
    if not each or any(len(shape) != 4 for _, shape, _ in each):
        raise lib.InvalidError(f"{name}: a tensor of 4 dimensions {rest!r} is wanted for each layer")
    if len({(shape, strides) for _, shape, strides in each}) > 1:
        raise lib.InvalidError(f"{name}: the layers' tensors differ in shape or strides")
    axes = [rest.index(a) for a in _AXES]
    return [(address, tuple(shape[a] for a in axes), tuple(strides[a] for a in axes)) for address, shape, strides in each]


class Paged:
    """An engine's KV in the host's or the GPU's memory, and the blocks of it that pages are read from or written to.

    k, v: a tensor for each layer, bf16, of four dimensions, or one tensor of all layers. `order` says which they are, outermost
    first: b(lock), h(ead), t(oken of a block), d(im), and l(ayer); it may differ for V (`v_order`). Views do: strides are taken
    from the tensors. Of t and d one at least must be contiguous. vLLM's CPU blocks have "bhdt" for K and "bhtd" for V.
    blocks: numbers of the blocks, in the order of their tokens, which count from token `first` of the first block on. A page of 64
    tokens may be four blocks of 16, or half of one of 128.
    stream: of tensors on the GPU, the CUDA stream (`torch.cuda.Stream.cuda_stream`) on which blocks are read and written, behind what is
    on it; calls wait for it. The tensors must live as long as this, and stay what they are.
    """

    def __init__(self, k: Any, v: Any, blocks: Any, *, order: str = "bhtd", v_order: Optional[str] = None, first: int = 0,
                 stream: int = 0):
        self._keep = (k, v)
        ks, vs = _layers("k", k, order), _layers("v", v, order if v_order is None else v_order)
        if len(ks) != len(vs) or ks[0][1][:3] != vs[0][1][:3]:
            raise lib.InvalidError(f"k and v have {len(ks)} and {len(vs)} layers of {ks[0][1][:3]} and {vs[0][1][:3]} blocks, heads and "
                                   "tokens of a block: they must be equal")
        self.layers, (self.all_blocks, self.heads, self.block_tokens) = len(ks), ks[0][1][:3]
        self.dims = ks[0][1][3], vs[0][1][3]
        self.blocks = self._numbers(blocks)
        self.first = _check.integer("first", first, 0, self.block_tokens - 1)
        self.on_gpu = _on_gpu(k, v)
        if stream and not self.on_gpu:
            raise lib.InvalidError("a stream is for tensors on the GPU")
        s = self._struct = lib.PagedStruct(
            on_gpu=self.on_gpu, stream=stream or None,
            block_tokens=self.block_tokens, all_blocks=self.all_blocks, n_blocks=self.blocks.size, first_token=self.first,
            blocks=c.cast(self.blocks.ctypes.data, c.POINTER(c.c_uint32)))
        for side, each in (("k", ks), ("v", vs)):
            _, shape, strides = each[0]
            if min(strides) < 0:
                raise lib.InvalidError(f"{side} has negative strides")
            setattr(s, side, (c.c_void_p * len(each))(*(address for address, _, _ in each)))
            setattr(s, side + "_bytes", sum((n - 1) * b for n, b in zip(shape, strides)) + 2)
            setattr(s, side + "_strides", lib.Strides(*strides))

    def _numbers(self, blocks: Any) -> "np.ndarray[Any, np.dtype[np.uint32]]":
        numbers = np.asarray(blocks)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise TypeError("blocks are integers, in one dimension")
        if numbers.size and (numbers.min() < 0 or numbers.max() >= self.all_blocks):
            raise lib.InvalidError(f"blocks are 0 to {self.all_blocks - 1}, and one is "
                                   f"{numbers.min() if numbers.min() < 0 else numbers.max()}")
        return np.ascontiguousarray(numbers, np.uint32)

    def with_blocks(self, blocks: Any) -> "Paged":
        """Other blocks of the same tensors. Tensors of many layers take half a millisecond to describe, and this a hundredth of it."""
        other = object.__new__(Paged)
        other.__dict__.update(self.__dict__)
        other._keep = (self, self)
        other.blocks = self._numbers(blocks)
        other._struct = lib.PagedStruct.from_buffer_copy(self._struct)
        other._struct.n_blocks = other.blocks.size
        other._struct.blocks = c.cast(other.blocks.ctypes.data, c.POINTER(c.c_uint32))
        return other

    @property
    def pages(self) -> int:
        """How many pages the blocks have room for."""
        return (self.blocks.size * self.block_tokens - self.first) // TOKENS


def _keys(what: str, keys: Iterable[bytes]) -> list[bytes]:
    found = list(keys)
    if not all(isinstance(k, bytes) for k in found):
        raise TypeError(f"{what} are bytes")
    if any(len(k) != len(found[0]) for k in found):
        raise lib.InvalidError(f"{what} have different lengths")
    return found


def _struct(keys: list[bytes], after: Optional[bytes] = None, had: Optional[bytes] = None) -> lib.PageKeys:
    if after is not None and (not isinstance(after, bytes) or (keys and len(after) != len(keys[0]))):
        raise lib.InvalidError("after is a key, of as many bytes as the others")
    if had is not None and (not isinstance(had, bytes) or len(had) != len(keys)):
        raise lib.InvalidError(f"had is what a lookup has found: bytes, one for each of {len(keys)} keys")
    return lib.PageKeys(keys=b"".join(keys) or b"\0", key_bytes=len(keys[0]) if keys else 16, pages=len(keys), after=after,
                        had=had)


def _structs(lists: list[list[bytes]]) -> Any:
    """Of requests of one call, whose keys have one length."""
    structs = (lib.PageKeys * len(lists))(*(_struct(k) for k in lists))
    some = next((k for k in lists if k), None)
    for keys, s in zip(lists, structs):
        s.key_bytes = len(some[0]) if some else 16
        if keys and len(keys[0]) != s.key_bytes:
            raise lib.InvalidError("keys of one call have one length")
    return structs


class Pages(lib.OfProcess):
    """Pages of a space, by the engine's own keys. A context manager; any thread may call.

    space: 1 to 1,024 bytes that say what decides about K and V beside the key, the namespace and the layout: a digest of the weights'
    revision, RoPE, adapters by content, the engine and how it hashes, its KV group. layers, kv_heads, head_dim, codec, rotation_set, tp_rank,
    tp_size and what follows: as `kvd.Client`'s. A key has 16 to 40 bytes and must name a page and all before it.
    exact: whether `put` may be told to keep pages in bf16.
    """

    def __init__(self, *, space: bytes, layers: Iterable[int], kv_heads: int, head_dim: HeadDim, codec: Codec = "int2",
                 rotation_set: Optional[str] = None, exact: bool = True, tp_rank: int = 0, tp_size: int = 0,
                 address: Optional[str] = None, namespace: Optional[str] = None, name: Optional[str] = None, timeout: float = 30.0,
                 latent: bool = False):
        super().__init__()
        if not isinstance(space, bytes):
            raise TypeError("space is bytes")
        self.space = space
        self.exact = _check.flag("exact", exact)
        self._bytes = lib.Bytes(space, len(space))
        self.client = Client(layers=layers, q_heads=kv_heads, kv_heads=kv_heads, head_dim=head_dim, codec=codec,
                             rotation_set=rotation_set, sink=0, recent=0, tp_rank=tp_rank, tp_size=tp_size, address=address,
                             namespace=namespace, name=name, timeout=timeout, pages=True, latent=latent)

    def lookup(self, requests: Seq[Iterable[bytes]], *, lease_ms: int = 30000, restore_ms: int = 0, tiers: bool = False,
               quiet: bool = False) -> list[Found]:
        """Which pages of each request are there, of up to 256 requests of up to 4,096 keys. They stay for lease_ms, at most 600,000; 0:
        they may go at once. restore_ms: for so long, what tiers have is brought back first. tiers: tells what tiers have. quiet: it does not count
        as used."""
        lists = [_keys(f"requests[{i}]", r) for i, r in enumerate(requests)]
        if not lists:
            return []
        structs = _structs(lists)
        out = (lib.FoundStruct * len(lists))()
        kinds = [(c.c_uint8 * max(len(k), 1))() for k in lists]
        for o, room in zip(out, kinds):
            o.size = c.sizeof(lib.FoundStruct)
            o.kinds = c.cast(room, c.POINTER(c.c_uint8))
        lib.call("kvd_pages_lookup", self.client._open(), c.byref(self._bytes), structs, len(lists),
                 c.byref(lib.MatchOptions(lease_ms=_check.integer("lease_ms", lease_ms), restore_ms=_check.integer("restore_ms", restore_ms),
                                          tiers=_check.flag("tiers", tiers), quiet=_check.flag("quiet", quiet))), out)
        return [Found(o.pages, bytes(room)[:len(k)], o.lease, o.restored, {name: n for name, n in zip(_prompts.TIERS, o.behind) if n})
                for k, o, room in zip(lists, out, kinds)]

    def hint(self, requests: Seq[Iterable[bytes]], what: str, seconds: float = 0.0, *, expire: bool = False) -> list[int]:
        """Tells how pages will be used, wherever they are in a request, of as many as `lookup` takes. "retain": what is there stays for so
        many seconds, at most a day, also beyond this object, instead of what was said of the last page that is there; 0: no longer.
        With `expire` it is dropped afterwards, from tiers too, unless somebody keeps it or others are behind it that are not of the request.
        "demote": they are the first to go, until they are looked up. "prefetch": what tiers have is brought back meanwhile, and stays
        for so many seconds. "low", "normal", "high": their priority, as `kvd.Client.hint` has it. A page that others were put behind, and
        not of this request, gets no lower one. Returns for each the pages that are there, and for "demote" and priorities how many are
        the first to go, or have it: there those count twice that are there both ways."""
        _check.choice("what", what, *_prompts.HINTS)
        lists = [_keys(f"requests[{i}]", r) for i, r in enumerate(requests)]
        if not lists:
            return []
        pages = (c.c_uint32 * len(lists))()
        lib.call("kvd_pages_hint", self.client._open(), c.byref(self._bytes), _structs(lists), len(lists), _prompts.HINTS.index(what),
                 _check.milliseconds("seconds", seconds), _check.flag("expire", expire), pages)
        return list(pages)

    def register(self, memory: Paged) -> None:
        """Registers an engine's KV with kvd, once: the allocations that the tensors lie in. From then on kvd itself reads and writes the
        pages of it that are put and got, by queues too, and nothing is copied in this process. On a GPU: memory of cudaMalloc or
        cuMemCreate, as PyTorch's with and without `expandable_segments`. Of the host: arrays of `client.tensor`, which are registered
        already. Raises where that cannot be; then libkvd copies, as it does with what is not registered. kvd has the memory mapped
        until `unregister` or `close`: it must not be given back, nor unmapped by a sleep mode, before."""
        self._check_memory("memory", memory)
        lib.call("kvd_pages_register", self.client._open(), c.byref(memory._struct))

    def unregister(self, timeout: float = 30.0) -> None:
        """Gives back all that was registered, once no put or get is under way in it; raises TimeoutError if some still are, and all stays
        registered. Those that begin later have libkvd copy."""
        lib.call("kvd_pages_unregister", self.client._open(), _check.milliseconds("timeout", timeout))

    def put(self, keys: Iterable[bytes], source: Paged, *, after: Optional[bytes] = None,
            exact: Optional[Union[bytes, Seq[bool]]] = None, had: Optional[bytes] = None) -> bytes:
        """Stores pages that are not there; each is seen whole or not at all. after: the key of the page before the first; eviction takes
        pages before those that they were put behind. exact: for each page, whether it is kept in bf16. had: the kinds that a lookup has found, or
        MISSING of each where it is likely, so that kvd is not asked first; what is there all the same is not stored again. What is there now
        of each."""
        return self._call("kvd_pages_put", *self._put(keys, source, after, exact, had))

    def queue(self, tickets: int = 256) -> "PageQueue":
        """A queue of puts and gets, which a thread of libkvd's does; of so many at once, those included that have ended and were not polled.
        It ends with these Pages."""
        from ._queue import PageQueue

        return PageQueue(self, tickets)

    def encode(self, keys: Iterable[bytes]) -> int:
        """Tells that a chain has gone on. keys: up to 512 pages of it that follow each other; those that are exact are encoded, as putting
        them so would have encoded them, but the last four, those behind which four are not there, and those from which exact pages that are
        not of the call go on within 256 tokens: another chain may end there. What a lease has found exact stays so until it ends, while
        lookups find it encoded. How many they find encoded now that they found exact before."""
        named, encoded = _keys("keys", keys), c.c_uint32()
        if named:
            lib.call("kvd_pages_encode", self.client._open(), c.byref(self._bytes), c.byref(_struct(named)), None, c.byref(encoded))
        return encoded.value

    def get(self, keys: Iterable[bytes], target: Paged) -> bytes:
        """Reads pages into blocks: all of them, or raises NotFoundError and has written nothing. What was read of each. After another
        error the blocks hold what they held, or part of the pages."""
        return self._call("kvd_pages_get", *self._get(keys, target))

    def _put(self, keys: Iterable[bytes], source: Paged, after: Optional[bytes], exact: Optional[Union[bytes, Seq[bool]]],
             had: Optional[bytes]) -> tuple[Any, ...]:
        named, flags = _keys("keys", keys), None
        if exact is not None:
            if len(exact) != len(named):
                raise lib.InvalidError(f"exact has {len(exact)} flags, and there are {len(named)} keys")
            if any(exact) and not self.exact:
                raise lib.InvalidError("exact: these Pages were made with exact=False")
            flags = (c.c_bool * max(len(named), 1))(*(bool(x) for x in exact))
        return self._arguments(named, "source", source, (flags,), after, had)

    def _get(self, keys: Iterable[bytes], target: Paged) -> tuple[Any, ...]:
        return self._arguments(_keys("keys", keys), "target", target, ())

    def _arguments(self, keys: list[bytes], what: str, paged: Any, more: tuple[Any, ...], after: Optional[bytes] = None,
                   had: Optional[bytes] = None) -> tuple[Any, ...]:
        """Of libkvd's functions, behind whose they are and before the failure; the last is room for kinds."""
        self._check_memory(what, paged)
        return (c.byref(self._bytes), c.byref(_struct(keys, after, had)), *more, c.byref(paged._struct), (c.c_uint8 * len(keys))())

    def _check_memory(self, what: str, paged: Any) -> None:
        if not isinstance(paged, Paged):
            raise TypeError(f"{what} is a {_check.describe(paged)}, and a kvd.Paged is wanted")
        wanted = (len(self.client.layers), self.client.kv_heads, self.client.head_dim)
        if (paged.layers, paged.heads, paged.dims) != wanted:
            raise lib.InvalidError(f"{what} has layers, kv_heads and head_dim {(paged.layers, paged.heads, paged.dims)}, and {wanted} are "
                                   "wanted")

    def _call(self, function: str, *arguments: Any) -> bytes:
        lib.call(function, self.client._open(), *arguments)
        return bytes(arguments[-1])

    def release(self, leases: Iterable[int]) -> None:
        """Ends leases; 0 and those that are over are passed over."""
        ids = [n for n in leases if n]
        for at in range(0, len(ids), lib.MAX_CALL_SEQUENCES):
            some = ids[at:at + lib.MAX_CALL_SEQUENCES]
            lib.call("kvd_leases_release", self.client._open(), (c.c_uint64 * len(some))(*some), len(some))

    def close(self) -> None:
        """Ends the session, and its leases; pages stay."""
        self.client.close()

    def __enter__(self) -> "Pages":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()
