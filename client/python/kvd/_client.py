"""Client, tensors and sequences."""
from __future__ import annotations

import ctypes as c
import dataclasses
import os
import threading
from typing import Any, Iterable, Iterator, Literal, NamedTuple, Optional, Union

import numpy as np

from . import _check
from . import _library as lib
from . import _prompts
from ._cuda import DeviceTensor, share
from ._tensor import Tensor, new_tensor

Codec = Union[Literal["bf16", "int2", "int2c", "int2-lm", "turboquant-2", "turboquant-3", "turboquant-4", "int4", "tc2", "tc2.5"], str]  # or "k=int2-lm,v=int2"
HeadDim = Union[int, tuple[int, int]]
_LATENT = (64, 512)  # of the rope part and the latent
_EVENTS = ("opened", "evicted", "draining", "lost", "published", "stored", "removed", "cleared", "moved")


@dataclasses.dataclass(frozen=True)
class PlaneTokens:
    """Where a sequence's tokens are in the layers of one plane, in the order of their positions: together, its length."""

    sink: int  # in bf16
    freed: int  # gone: the plane has a window, which is past them
    history: int  # compressed
    recent: int  # in bf16


@dataclasses.dataclass(frozen=True)
class SequenceInfo:
    """What the daemon holds of a sequence. `planes` has where its tokens are, for each plane of the layout; where layers are all
    alike there is one, `planes[0]`."""

    id: int
    length: int
    planes: tuple[PlaneTokens, ...]
    pending_length: int
    pending_layers: int
    bytes: int
    holders: int
    name: str
    holds: int  # of this client; each goes by a free()


def _info(s: lib.SequenceStruct) -> SequenceInfo:
    planes = tuple(PlaneTokens(p.sink, p.freed, p.history, p.recent) for p in s.planes[:s.n_planes])
    return SequenceInfo(s.sequence, s.length, planes, s.pending_length,
                        s.pending_layers, s.bytes, s.holders, s.name.decode(), s.holds)


@dataclasses.dataclass(frozen=True)
class Event:
    """opened, evicted (a published sequence), draining, lost (so many events were dropped), published; of blocks of prompts: stored
    (each behind the one before it), removed, cleared (all that nobody uses, or what a tier had), moved (a tier has copies of them)."""

    kind: str
    sequence: int
    count: int
    name: str
    keys: tuple[bytes, ...] = ()  # kvd's own, of the blocks
    parent: Optional[bytes] = None  # key of the block before the first
    tokens: int = 0  # in each block
    miss: str = "none"  # why they are gone
    tier: str = ""  # which has copies of them, or was cleared
    number: int = 0  # ascending by one in the namespace, as long as none is lost


AnyTensor = Union[Tensor, DeviceTensor]
_BF16, _F32, _BOTH = ("bf16",), ("f32",), ("bf16", "f32")
_KINDS = {"k": _BF16, "v": _BF16, "q": _BOTH, "o": _BOTH, "lse": _F32}
_Rows = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]  # names and sizes of a tensor's last dimensions
_NEEDS = {"append": "kv", "attend": "qo", "step": "kvqo"}


@dataclasses.dataclass
class Item:
    """One sequence's part of a batch.

    k and v: [layers, tokens, kv_heads, head_dim] bf16; q and o: [layers, tokens, q_heads, head_dim]; lse (natural log,
    f32): [layers, tokens, q_heads]. `layers` are those of the call.

    An append or step whose answer was lost (TimeoutError, UnavailableError) may or may not have been applied. Called again with the
    same Item and the same data it is recognized by `request`, a number that the first call gives the Item and a call that
    succeeds takes back, and nothing is stored twice.
    """

    sequence: "Sequence"
    k: Optional[AnyTensor] = None
    v: Optional[AnyTensor] = None
    q: Optional[AnyTensor] = None
    o: Optional[AnyTensor] = None
    lse: Optional[AnyTensor] = None
    request: int = 0

    def _struct(self, client: "Client", call: str, at: str, rows: _Rows, layers: Union[int, str]) -> tuple[lib.ItemStruct, int]:
        """Checked: of so many layers, or as many as the first tensor has. Returns that number too."""
        sequence = _check.sequence(at + "sequence", self.sequence, client, Sequence)
        s = lib.ItemStruct(sequence=sequence.id, position=sequence.length)
        needs, tokens = _NEEDS[call], None
        for name in ("k", "v", "q", "o", "lse"):
            t = getattr(self, name)
            if t is None:
                if name in needs:
                    raise lib.InvalidError(f"{at}{name} is wanted")
                continue
            if name not in needs and (name != "lse" or "o" not in needs):
                raise lib.InvalidError(f"{call} takes no {at}{name}")
            names, sizes = rows[name]
            wanted = (layers, "tokens" if tokens is None else tokens, *sizes)
            f = _check.facts(at + name, t, client)
            _check.same_shape(at + name, f.shape, wanted, ("layers", "tokens", *names))
            setattr(s, name, _check.reference(at + name, f, _KINDS[name]))
            layers, tokens = f.shape[:2]
        s.tokens = tokens
        if call != "attend":
            self.request = _check.integer(at + "request", self.request, 0, _check.U64) or lib.library().kvd_request_new(client._open())
            s.request = self.request
        return s, layers  # type: ignore[return-value]


def _replayed(structs: Any, n: int) -> Any:
    """Has libkvd write whether each item had been applied before. What is returned must live until it has."""
    flags = (c.c_bool * n)()
    for i in range(n):
        structs[i].replayed = c.cast(c.addressof(flags) + i, c.POINTER(c.c_bool))
    return flags


class Sequence(lib.OfProcess):
    """Tokens of all layers. Made by `Client.create`, `Client.attach` or `fork`.

    `length` is where the next tokens go; it grows when a call has reached the last layer.
    """

    def __init__(self, client: "Client", id: int, length: int = 0):  # noqa: A002
        super().__init__()
        self.client = client
        self.id = _check.integer("id", id, 0, _check.U64)
        self.length = _check.integer("length", length, 0, _check.U64)

    def __repr__(self) -> str:
        return f"<kvd.Sequence {self.id}, {self.length} tokens>"

    def append(self, k: AnyTensor, v: AnyTensor, *, layer: int = 0) -> None:
        """Appends k's tokens, to as many layers as it has, from `layer` on (a position in the client's list). To be able
        to repeat it after a lost answer, make an `Item` and call `Client.append`."""
        self.client.append([Item(self, k, v)], layer=layer)

    def attend(self, q: AnyTensor, o: AnyTensor, *, lse: Optional[AnyTensor] = None, layer: int = 0, **attention: Any) -> None:
        """o = attention of the sequence's last positions, causal among them. scale, softcap, window as `Client.attend`."""
        self.client.attend([Item(self, q=q, o=o, lse=lse)], layer=layer, **attention)

    def step(self, q: AnyTensor, k: AnyTensor, v: AnyTensor, o: AnyTensor, *, lse: Optional[AnyTensor] = None, layer: int = 0,
             **attention: Any) -> None:
        """Attends over what is stored and the new tokens, then appends these."""
        self.client.step([Item(self, k, v, q, o, lse)], layer=layer, **attention)

    def read(self, begin: int, count: int, *, k: Optional[AnyTensor] = None, v: Optional[AnyTensor] = None,
             layer: int = 0) -> None:
        """Writes tokens [begin, begin + count) into k and v, dequantized and un-rotated."""
        count, refs = _check.integer("count", count, 1), {}
        layers: Union[int, str] = "layers"
        rows = self.client._rows(layer)
        for name, t in (("k", k), ("v", v)):
            if t is not None:
                names, sizes = rows[name]
                refs[name] = _check.tensor(name, t, self.client, (layers, count, *sizes), ("layers", "tokens", *names), _BOTH)
                layers = t.shape[0]
        if not refs:
            raise lib.InvalidError("k or v is wanted")
        lib.call("kvd_read_tokens", self.client._open(), self.client._layers(layer, layers), self.id,
                 _check.integer("begin", begin, 0, _check.U64), count,
                 c.byref(refs["k"]) if k is not None else None, c.byref(refs["v"]) if v is not None else None)

    def fork(self, count: int = 1) -> list["Sequence"]:
        """Copy-on-write children."""
        count = _check.integer("count", count, 1, lib.MAX_CALL_SEQUENCES)
        ids = (c.c_uint64 * count)()
        lib.call("kvd_sequence_fork", self.client._open(), self.id, count, ids)
        return [Sequence(self.client, i, self.length) for i in ids]

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        length = _check.integer("length", length, 0, _check.U64)
        lib.call("kvd_sequence_truncate", self.client._open(), self.id, length)
        self.length = length

    def publish(self, name: str, *, replace: bool = False) -> None:
        """Names it in the namespace: it outlives this client until it is unpublished or evicted."""
        lib.call("kvd_sequence_publish", self.client._open(), self.id, _check.text("name", name), _check.flag("replace", replace))

    def publish_blocks(self, prompt: _prompts.Prompt, *, end: bool = False) -> _prompts.Published:
        """Gives its blocks to others, as far as they are whole and behind the recent window. May be called again while it grows.
        `end`: up to the last whole block, with the recent window there as it is; whoever adopts there goes on with the same bits."""
        return _prompts.publish(self.client, self.id, prompt, end)

    def describe(self) -> SequenceInfo:
        s = lib.SequenceStruct()
        lib.call("kvd_sequence_describe", self.client._open(), self.id, c.byref(s))
        return _info(s)

    def free(self, *, unpublish: bool = False) -> None:
        """Lets go of it. Published ones stay, unless `unpublish`."""
        ids = (c.c_uint64 * 1)(self.id)
        lib.call("kvd_sequences_free", self.client._open(), ids, 1, _check.flag("unpublish", unpublish))


@dataclasses.dataclass(frozen=True)
class Plane:
    """Layers of a model that are alike, where not all of them are: their ids, ascending. None: as the client says. window: tokens of
    a sliding window, 0: all; what lies behind the last window + 64 tokens is freed, and such a plane has no sink. latent: as
    `Client`'s, if that is not True for all of them."""

    layers: Iterable[int]
    q_heads: Optional[int] = None
    kv_heads: Optional[int] = None
    head_dim: Optional[HeadDim] = None
    codec: Optional[Codec] = None
    window: int = 0
    sink: Optional[int] = None
    recent: Optional[int] = None
    latent: bool = False


class Shape(NamedTuple):
    """Of a layer's tensors."""

    q_heads: int
    kv_heads: int
    head_dim: tuple[int, int]  # of q and K, of V and o; over a latent q has both together
    latent: bool = False

    def rows(self) -> _Rows:
        kv, q = ("kv_heads", "head_dim"), ("q_heads", "head_dim")
        of_q = sum(self.head_dim) if self.latent else self.head_dim[0]
        return {"k": (kv, (self.kv_heads, self.head_dim[0])), "v": (kv, (self.kv_heads, self.head_dim[1])),
                "q": (q, (self.q_heads, of_q)), "o": (q, (self.q_heads, self.head_dim[1])),
                "lse": (q[:1], (self.q_heads,))}


def _shape(at: str, q_heads: Any, kv_heads: Any, head_dim: Any, latent: bool) -> Shape:
    if latent:
        kv_heads, head_dim = 1 if kv_heads is None else kv_heads, _LATENT if head_dim is None else head_dim
    for name, x in (("q_heads", q_heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        if x is None:
            raise lib.InvalidError(f"{at}{name} is wanted")
    pair = head_dim if isinstance(head_dim, (tuple, list)) else (head_dim, head_dim)
    if len(pair) != 2:
        raise lib.InvalidError(f"{at}head_dim is {head_dim!r}, and one number or a pair for K and V is wanted")
    dims = (_check.integer(f"{at}head_dim", pair[0]), _check.integer(f"{at}head_dim", pair[1]))
    return Shape(_check.integer(f"{at}q_heads", q_heads), _check.integer(f"{at}kv_heads", kv_heads), dims, latent)


def _ids(what: str, x: Iterable[int]) -> list[int]:
    try:
        iter(x)
    except TypeError:
        raise TypeError(f"{what} is {x!r}, and the ids of the model's layers are wanted, such as range(32)") from None
    return [_check.integer(f"{what}[{i}]", n) for i, n in enumerate(x)]


def _plane_struct(at: str, p: Plane, shape: Shape, ids: Any) -> lib.PlaneOptions:
    own = p.sink is not None or p.recent is not None  # else the client's
    sink = _check.integer(f"{at}sink", p.sink) if p.sink is not None else 0 if p.window else 64
    recent = _check.integer(f"{at}recent", p.recent) if p.recent is not None else 256
    return lib.PlaneOptions(
        layers=ids, n_layers=len(ids), q_heads=shape.q_heads, kv_heads=shape.kv_heads, head_dim_k=shape.head_dim[0],
        head_dim_v=shape.head_dim[1], codec=_check.text(f"{at}codec", p.codec) if p.codec is not None else None, window=p.window,
        sink=sink if own else 0, recent=recent if own else 0, no_windows=own and (sink, recent) == (0, 0), latent=shape.latent)


class Client(lib.OfProcess):
    """A session with a daemon, for one layout of a model's KV. A context manager.

    layers: ids of the model's layers that hold KV, ascending. head_dim: 64, 80, 96, 112, 128, 192 or 256, or a
            pair for K and V: two of 64, 128 and 256, or (192, 128).
    codec: one for K and V, or "k=int4,v=int2" for each its own. Layers that the set marks get their mark's, if it has more bits.
    rotation_set: "model@tag", "sha256:...", "hadamard", "random" or "identity"; None: what suits the codec. sink, recent:
    tokens kept in bf16; None: 64 and 256. windows: a sliding window for each layer, 0 where it sees all tokens; what lies
    behind the last w + 64 tokens is freed, and such a layer has no sink. sinks: attention sinks (gpt-oss's s_aux), [layers,
    q_heads] of float32: logits of one more token, whose value is zero; -inf: none for that head. planes: where layers differ in
    heads, head_dim, codec or window, instead of layers and windows; `layer` in calls counts over those of all planes in ascending
    order, and a call's layers have one of `shapes`. latent: multi-head latent attention (MLA: DeepSeek V2 and V3, Kimi, GLM-5) of up to
    128 q heads: k is the part of keys that RoPE turns, v the latent; kv_heads is 1 and head_dim (64, 512), and need not be given. A query
    is absorbed: 512 numbers for the latent, then 64 for the rope part; o has 512, and calls want `scale`. codec is the latent's, the
    rope part is in bf16. Not on CUDA. tp_rank, tp_size: which part of a model that tensor parallelism splits;
    q_heads and kv_heads are the rank's own, and of a rotation set it gets the matrices of its heads. address: "unix:/path" or "host:port"; None: $KVD_ADDRESS, or the
    one that listens under /run/kvd. pages: for `kvd.Pages`, which opens its own. timeout: seconds for each call. lease: seconds after which a session over TCP ends when
    its client is not heard of; None: 60. tls_ca, tls_cert, tls_key: PEM files for TCP; None: no TLS, no certificate of
    one's own. tls_server_name: if it differs from the address.
    """

    def __init__(self, *, layers: Optional[Iterable[int]] = None, q_heads: Optional[int] = None, kv_heads: Optional[int] = None,
                 head_dim: Optional[HeadDim] = None, codec: Codec = "int2", rotation_set: Optional[str] = None,
                 sink: Optional[int] = None, recent: Optional[int] = None, address: Optional[str] = None,
                 namespace: Optional[str] = None, name: Optional[str] = None, timeout: float = 30.0, lease: Optional[float] = None,
                 tls_ca: Optional[str] = None, tls_cert: Optional[str] = None, tls_key: Optional[str] = None,
                 tls_server_name: Optional[str] = None, windows: Optional[Iterable[int]] = None, sinks: Any = None,
                 planes: Optional[Iterable[Plane]] = None, tp_rank: int = 0, tp_size: int = 0,
                 pages: bool = False, latent: bool = False):
        super().__init__()
        if (layers is None) == (planes is None) or (planes is not None and windows is not None):
            raise lib.InvalidError("layers, with windows or without, or planes are wanted")
        parts = [Plane(layers)] if planes is None else list(planes)  # type: ignore[arg-type]
        by_id: dict[int, tuple[Shape, int]] = {}
        structs = (lib.PlaneOptions * len(parts))()
        keep = []  # what the structures point to
        for i, p in enumerate(parts):
            if not isinstance(p, Plane):
                raise TypeError(f"planes[{i}] is a {_check.describe(p)}, and a kvd.Plane is wanted")
            where = "" if planes is None else f"planes[{i}]."
            ids = _ids(f"{where}layers", p.layers)
            given = (p.q_heads or q_heads, p.kv_heads or kv_heads, head_dim if p.head_dim is None else p.head_dim)
            own = _check.flag(f"{where}latent", p.latent) or _check.flag("latent", latent)
            shape, window = _shape(where, *given, own), _check.integer(f"{where}window", p.window)
            for n in ids:
                if planes is not None and n in by_id:
                    raise lib.InvalidError(f"{where}layers has layer {n}, which is in another plane too, or twice")
                by_id[n] = shape, window
            keep.append((c.c_uint32 * len(ids))(*ids))
            structs[i] = _plane_struct(where, p, shape, keep[-1])
        kept = (64 if sink is None else _check.integer("sink", sink), 256 if recent is None else _check.integer("recent", recent))
        ids = _ids("layers", keep[0]) if planes is None else sorted(by_id)
        self.layers = ids
        self.shapes = [by_id[n][0] for n in ids]
        one = self.shapes[0] if self.shapes and len(set(self.shapes)) == 1 else Shape(0, 0, (0, 0))
        self.q_heads, self.kv_heads, self.head_dim, _ = one  # 0 where layers differ: see shapes
        names = {n: _check.text(n, x) if x is not None else None for n, x in (
            ("address", address), ("namespace", namespace), ("name", name), ("codec", codec), ("rotation_set", rotation_set),
            ("tls_ca", tls_ca), ("tls_cert", tls_cert), ("tls_key", tls_key), ("tls_server_name", tls_server_name))}
        self.codec = codec
        self.tp_rank, self.tp_size = _check.integer("tp_rank", tp_rank), _check.integer("tp_size", tp_size)
        self.address = address or os.environ.get("KVD_ADDRESS") or "the kvd of this host"
        sliding = _ids("windows", windows) if windows is not None else [by_id[n][1] for n in ids]
        if len(sliding) != len(ids):
            raise lib.InvalidError(f"windows has {len(sliding)} numbers, and one for each of the {len(ids)} layers is wanted")
        self.windows = tuple(sliding)
        logits = _check.sinks(sinks, [x.q_heads for x in self.shapes]) if sinks is not None else []
        at = np.cumsum([0] + [x.q_heads for x in self.shapes])
        self.sinks = [np.array(logits[a:b], np.float32) for a, b in zip(at, at[1:])] if logits else None  # by layer
        options = lib.Options(
            address=names["address"] or None, namespace_name=names["namespace"] or None, client_name=names["name"] or None,
            timeout_ms=max(1, _check.milliseconds("timeout", timeout)), codec=names["codec"],
            rotation_set=names["rotation_set"] or None, sink=kept[0], recent=kept[1], no_windows=kept == (0, 0),
            lease_ms=0 if lease is None else max(1, _check.milliseconds("lease", lease)), tls_ca=names["tls_ca"] or None,
            tls_cert=names["tls_cert"] or None, tls_key=names["tls_key"] or None, tls_server_name=names["tls_server_name"] or None,
            tp_rank=self.tp_rank, tp_size=self.tp_size, pages=_check.flag("pages", pages),
            sinks=(c.c_float * len(logits))(*logits) if logits else None, n_sinks=len(logits))
        if planes is None:
            options.layers, options.n_layers = keep[0], len(ids)
            options.q_heads, options.kv_heads = structs[0].q_heads, structs[0].kv_heads
            options.head_dim_k, options.head_dim_v = structs[0].head_dim_k, structs[0].head_dim_v
            options.latent = structs[0].latent
            options.windows = (c.c_uint32 * len(ids))(*sliding) if any(sliding) else None
        else:
            options.planes, options.n_planes = structs, len(parts)
        self._handle = c.c_void_p()
        self._dependents: set[Any] = set()  # what is closed before it
        self._buffers: set[Any] = set()
        self._replays: list[Any] = []  # flags of enqueued calls
        self._lock = threading.RLock()  # of buffers that come and go, and of closing
        lib.call("kvd_open", c.byref(options), c.byref(self._handle))

    def _rows(self, layer: Any) -> _Rows:
        """Of a call's tensors, whose first layer this is."""
        return self.shapes[_check.integer("layer", layer, 0, len(self.layers) - 1)].rows()

    def _open(self) -> c.c_void_p:
        self._check_process()
        if not self._handle:
            raise lib.InvalidError("the client was closed")
        return self._handle

    def close(self) -> None:
        """Ends the session and frees its tensors. Calls of other threads must have returned. In a forked child this does
        nothing: the session is the parent's."""
        if self._forked():
            return
        for d in list(self._dependents):
            d.close()
        with self._lock:
            handle, self._handle = self._handle, c.c_void_p()
            for b in list(self._buffers):
                b.free()
            if handle:
                lib.library().kvd_close(c.byref(handle))

    def __repr__(self) -> str:
        kinds = []
        for s in dict.fromkeys(self.shapes):
            dim = s.head_dim[0] if s.head_dim[0] == s.head_dim[1] else s.head_dim
            kv = "a latent" if s.latent else f"{s.kv_heads} kv heads"
            kinds.append(f"{self.shapes.count(s)} layers, {s.q_heads} q heads, {kv}, head_dim {dim}")
        return f"<kvd.Client {self.address} {self.codec}: {'; '.join(kinds)}{'' if self._handle else ', closed'}>"

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    @property
    def info(self) -> dict[str, Any]:
        """version, backend, instance, rotation_set (as resolved), layout_digest, device_uuid (of the GPU that kvd runs on, "GPU-..."
        as nvidia-smi -L has it; empty on the CPU); and planes, each with its sink, recent, bf16_page_bytes and codec_page_bytes (of a
        page of 64 tokens). Where layers are all alike there is one, planes[0]."""
        i = lib.Info()
        lib.call("kvd_get_info", self._open(), c.byref(i))
        texts = ("version", "backend", "instance", "rotation_set", "layout_digest", "device_uuid")
        planes = [{name: getattr(p, name) for name, _ in lib.PlaneInfoStruct._fields_} for p in i.planes[:i.n_planes]]
        return {name: (getattr(i, name) or b"").decode() for name in texts} | {"planes": planes}

    def tensor(self, *shape: int, dtype: Literal["bf16", "f32"] = "bf16") -> Tensor:
        """Zeroed shared memory for a tensor."""
        return new_tensor(self, shape, dtype)

    def share(self, x: Any) -> DeviceTensor:
        """A PyTorch tensor or CuPy array of the GPU that kvd runs on, bfloat16 (CuPy: uint16) or float32, for calls, without
        a copy."""
        return share(self, x)

    def create(self) -> Sequence:
        return next(self.create_many(1))

    def create_many(self, count: int) -> Iterator[Sequence]:
        count = _check.integer("count", count, 1, lib.MAX_CALL_SEQUENCES)
        ids = (c.c_uint64 * count)()
        lib.call("kvd_sequences_create", self._open(), count, ids)
        return iter([Sequence(self, i) for i in ids])

    def attach(self, name: str) -> Sequence:
        """A sequence that some worker published."""
        s = lib.SequenceStruct()
        lib.call("kvd_sequence_attach", self._open(), _check.text("name", name), c.byref(s))
        return Sequence(self, s.sequence, s.length)

    def match(self, prompts: list[_prompts.Prompt], *, lease: float = 10.0, restore: float = 0.0, wait: float = 0.0, tiers: bool = False,
              quiet: bool = False, recompute_window: bool = False) -> list[_prompts.Match]:
        """What is there of prompts, at most 256 in a call. It stays for `lease` seconds, at most 600; 0: it may go at once.

        restore: seconds, at most 600, for which blocks that tiers have are brought back first. wait: of a single prompt, so that
        several workers do not compute it at once: who misses a block has claimed the rest for so many seconds, at most 600, and is
        to compute and publish it; who finds it claimed waits as long. tiers: tell what tiers have. quiet: it does not count as used.
        recompute_window: matches end a recent window earlier, unless that is where a published end is: who computes those tokens has
        them in bf16.
        """
        return _prompts.match(self, prompts, lease, restore, wait, tiers, quiet, recompute_window)

    def hint(self, prompts: list[_prompts.Prompt], what: str, seconds: float = 0.0, *, expire: bool = False) -> list[int]:
        """Tells how prompts, at most 256 in a call, will be used. "retain": what is there of them stays for so many seconds, at most a
        day, also beyond this client; 0: no longer. With `expire` it is dropped afterwards, from tiers too. "demote": the last blocks
        will not be used again soon, and are the first to go. "prefetch": what tiers have is brought back meanwhile, and stays for so
        many seconds. "low", "normal", "high": of what priority the blocks are that are there: all low ones of the namespace go before
        any normal one, and these before any high one, whatever their use says; a block that others go on from gets no lower one. Returns
        the leading blocks of each that stay, or are there, and for "demote" and priorities how many are the first to go, or have it."""
        return _prompts.hint(self, prompts, what, seconds, expire)

    def adopt(self, match: _prompts.Match, blocks: Optional[int] = None) -> Sequence:
        """A sequence of a match's leading blocks; None: of all. It shares their pages until it writes there; its lease ends."""
        return Sequence(self, *_prompts.adopt(self, match, blocks))

    def _layers(self, begin: Any, count: Any) -> lib.Layers:
        begin = _check.integer("layer", begin, 0, len(self.layers) - 1)
        if begin + count > len(self.layers):
            raise lib.InvalidError(f"the tensors have {count} layers, and there are {len(self.layers) - begin} from layer {begin} on")
        return lib.Layers(begin, count)

    def _batch(self, call: str, items: list[Item], layer: int) -> tuple[lib.Layers, Any, int]:
        if not isinstance(items, (list, tuple)) or not all(isinstance(i, Item) for i in items):
            raise TypeError(f"items is a {_check.describe(items)}, and a list of kvd.Item is wanted")
        if not items:
            raise lib.InvalidError("no items")
        self._open()
        structs = (lib.ItemStruct * len(items))()
        layers: Union[int, str] = "layers"
        rows = self._rows(layer)
        for i, item in enumerate(items):
            structs[i], layers = item._struct(self, call, f"items[{i}]." if len(items) > 1 else "", rows, layers)
        return self._layers(layer, layers), structs, len(items)

    def _appended(self, items: list[Item], layers: lib.Layers) -> None:
        for i in items:
            i.request = 0
        if layers.begin + layers.count == len(self.layers):
            for i in items:
                i.sequence.length += i.k.shape[1]  # type: ignore[union-attr]

    def append(self, items: list[Item], *, layer: int = 0) -> list[bool]:
        """Appends the tokens of k and v; layers in ascending order. Safe to repeat with the same items when no answer came. The
        result says of each item whether its tokens had been applied before, so that nothing was added."""
        layers, structs, n = self._batch("append", items, layer)
        replayed = _replayed(structs, n)
        lib.call("kvd_append", self._open(), layers, structs, n)
        self._appended(items, layers)
        return list(replayed)

    def attend(self, items: list[Item], *, layer: int = 0, scale: float = 0, softcap: float = 0, window: int = 0) -> None:
        """scale 0: 1/sqrt(head_dim), refused over a latent. softcap 0: none. window 0: all tokens."""
        layers, structs, n = self._batch("attend", items, layer)
        lib.call("kvd_attend", self._open(), layers, c.byref(_check.attention(scale, softcap, window)), structs, n)

    def step(self, items: list[Item], *, layer: int = 0, scale: float = 0, softcap: float = 0, window: int = 0) -> list[bool]:
        """Attends over what is stored and the new tokens, then appends these. The result is that of `append`."""
        layers, structs, n = self._batch("step", items, layer)
        replayed = _replayed(structs, n)
        lib.call("kvd_step", self._open(), layers, c.byref(_check.attention(scale, softcap, window)), structs, n)
        self._appended(items, layers)
        return list(replayed)

    def enqueue(self, kind: Literal["append", "attend", "step"], items: list[Item], stream: int, *, layer: int = 0,
                scale: float = 0, softcap: float = 0, window: int = 0) -> None:
        """A call that takes its turn on a CUDA stream (PyTorch's stream.cuda_stream): it returns at once, starts when what was
        on the stream is done, and what comes after waits for its outputs. `enqueued` says whether such calls went well."""
        number = list(_NEEDS).index(_check.choice("kind", kind, *_NEEDS))
        stream = _check.integer("stream", stream, 0, _check.U64)
        layers, structs, n = self._batch(kind, items, layer)
        replayed = _replayed(structs, n if kind != "attend" else 0)
        lib.call("kvd_enqueue", self._open(), stream, number, layers, c.byref(_check.attention(scale, softcap, window)), structs, n)
        self._replays.append(replayed)  # libkvd writes to it until kvd_enqueued
        if kind != "attend":
            self._appended(items, layers)

    def enqueued(self) -> list[bool]:
        """Waits until all enqueued calls have been answered, and raises the first failure since it was last called. The result
        says of each item of each append and step, in order, whether its tokens had been applied before."""
        handle, replays = self._open(), self._replays
        self._replays = []
        lib.call("kvd_enqueued", handle)
        return [x for flags in replays for x in flags]

    @property
    def on_gpu(self) -> bool:
        """Whether the daemon runs on a GPU."""
        return str(self.info["backend"]).startswith("cuda")

    def rotate(self, x: AnyTensor, y: AnyTensor, *, side: Literal["k", "q", "v"] = "k", inverse: bool = False, layer: int = 0) -> None:
        """Turns keys or values to (x - mean) A as the session's set does, or queries to x A^-T, or back. Heads are kv_heads or
        q_heads; y may be x."""
        _check.choice("side", side, "k", "q", "v")
        inverse = _check.flag("inverse", inverse)
        f = _check.facts("x", x, self)
        shape = self.shapes[_check.integer("layer", layer, 0, len(self.layers) - 1)]
        heads = shape.q_heads if len(f.shape) == 4 and f.shape[2] == shape.q_heads else shape.kv_heads
        names = ("layers", "rows", "kv_heads or q_heads", "head_dim")
        _check.same_shape("x", f.shape, ("layers", "rows", heads, shape.head_dim[side == "v"]), names)
        refs = _check.reference("x", f, _BOTH), _check.tensor("y", y, self, f.shape, names, _BOTH)
        lib.call("kvd_rotate", self._open(), "kqv".index(side), inverse, self._layers(layer, f.shape[0]), f.shape[1], f.shape[2],
                 c.byref(refs[0]), c.byref(refs[1]))

    def next_event(self, timeout: float = 1.0) -> Optional[Event]:
        """The next event of the namespace, or None when the time is over. One thread at a time."""
        e = lib.EventStruct()
        lib.call("kvd_next_event", self._open(), _check.milliseconds("timeout", timeout), c.byref(e))
        if e.kind < 0:
            return None
        keys = c.string_at(e.keys, e.n_keys * 24) if e.n_keys else b""
        return Event(_EVENTS[e.kind], e.sequence, e.count, e.name.decode(), tuple(keys[i:i + 24] for i in range(0, len(keys), 24)),
                     c.string_at(e.parent, 24) if e.parent else None, e.tokens, _prompts.miss(e.miss),
                     e.tier.decode(), e.number)
