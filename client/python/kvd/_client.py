"""Client, tensors and sequences."""
from __future__ import annotations

import ctypes as c
import dataclasses
import threading
import weakref
from typing import Any, Iterable, Iterator, Literal, Optional, Union

import numpy as np

from . import _library as lib
from ._cuda import DeviceTensor, share

Codec = Literal["bf16", "int2", "int2c", "int2-lm", "turboquant-2", "turboquant-3", "turboquant-4"]
_EVENTS = ("opened", "evicted", "draining", "lost", "published")


class Tensor:
    """[layers, tokens, heads, head_dim] (an lse: [layers, tokens, heads]) in memory shared with the daemon.

    `array` is a NumPy view of it: float32, or uint16 that holds bf16 (`kvd.to_bf16`, `kvd.from_bf16`). Slices of a
    tensor are tensors over the same memory, as long as head_dim stays whole. The daemon shares the memory until `free()`,
    the end of the client, or until no tensor and no array of it are left; arrays stay what they are.
    """

    def __init__(self, owner: "_Buffer", array: np.ndarray):
        self._owner = owner
        self._array = array

    @property
    def array(self) -> np.ndarray:
        if not self._owner.handle:
            raise ValueError("the tensor was freed, or its client closed")
        return self._array

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    def __getitem__(self, index: Any) -> "Tensor":
        view = self.array[index]
        if not isinstance(view, np.ndarray) or view.ndim != self._array.ndim or not np.may_share_memory(view, self._array):
            raise IndexError("a slice of a tensor keeps all dimensions: say t[2:3], not t[2]")
        return Tensor(self._owner, view)

    def free(self) -> None:
        """Ends the sharing, for all slices too. Arrays keep the memory."""
        self._owner.free()

    def _ref(self, what: str, dims: int) -> lib.TensorRef:
        a = self.array
        if a.ndim != dims:
            raise ValueError(f"{what} has {a.ndim} dimensions, not {dims}")
        if dims == 4 and a.shape[3] > 1 and a.strides[3] != a.itemsize:
            raise ValueError(f"{what}: head_dim must be contiguous")
        if any(s < 0 for s in a.strides):
            raise ValueError(f"{what} runs backwards")
        offset = a.__array_interface__["data"][0] - self._owner.address
        kind = lib.KVD_BF16 if a.dtype == np.uint16 else lib.KVD_F32
        return lib.TensorRef(self._owner.handle, offset, a.strides[0], a.strides[1], a.strides[2], kind)


class _Buffer:
    """A kvd_buffer. Its memory lives as long as an array over it, whatever becomes of the client."""

    def __init__(self, client: "Client", size: int):
        self.handle = c.c_void_p()
        lib.call("kvd_buffer_new", client._open(), size, c.byref(self.handle))
        self.address, self.size = lib.library().kvd_buffer_data(self.handle), size
        self._client = client
        client._buffers.add(self)

    def memory(self) -> Any:
        """Once: what arrays are views of."""
        memory = (c.c_uint8 * self.size).from_address(self.address)
        weakref.finalize(memory, self._unused).atexit = False
        return memory

    def _unused(self) -> None:
        self.free()
        lib.unmap(self.address, self.size)

    def free(self) -> None:
        """Unregisters it. Any thread: the last array may go anywhere."""
        with self._client._lock:
            self._client._buffers.discard(self)
            handle, self.handle = self.handle, c.c_void_p()
            if handle:
                lib.library().kvd_buffer_detach(c.byref(handle))


@dataclasses.dataclass(frozen=True)
class SequenceInfo:
    """What the daemon holds of a sequence. sink + history + recent tokens make its length; history is compressed."""

    id: int
    length: int
    sink_tokens: int
    history_tokens: int
    recent_tokens: int
    pending_length: int
    pending_layers: int
    bytes: int
    holders: int
    name: str


def _info(s: lib.SequenceStruct) -> SequenceInfo:
    return SequenceInfo(s.sequence, s.length, s.sink_tokens, s.history_tokens, s.recent_tokens, s.pending_length,
                        s.pending_layers, s.bytes, s.holders, s.name.decode())


@dataclasses.dataclass(frozen=True)
class Event:
    """opened, evicted (a published sequence), draining, lost (so many events were dropped) or published."""

    kind: str
    sequence: int
    count: int
    name: str


AnyTensor = Union[Tensor, DeviceTensor]


@dataclasses.dataclass
class Item:
    """One sequence's part of a batch.

    k and v: [layers, tokens, kv_heads, head_dim] bf16; q and o: [layers, tokens, q_heads, head_dim]; lse (natural log,
    f32): [layers, tokens, q_heads]. `layers` are those of the call.
    """

    sequence: "Sequence"
    k: Optional[AnyTensor] = None
    v: Optional[AnyTensor] = None
    q: Optional[AnyTensor] = None
    o: Optional[AnyTensor] = None
    lse: Optional[AnyTensor] = None

    def _struct(self, needs: str, layers: int) -> lib.ItemStruct:
        s = lib.ItemStruct(sequence=self.sequence.id, position=self.sequence.length)
        tokens = None
        for name in ("k", "v", "q", "o", "lse"):
            t = getattr(self, name)
            if t is None:
                if name in needs:
                    raise ValueError(f"{name} is wanted")
                continue
            if t.shape[0] != layers:
                raise ValueError(f"{name} has {t.shape[0]} layers, the call {layers}")
            if tokens is not None and t.shape[1] != tokens:
                raise ValueError(f"{name} has {t.shape[1]} tokens, others {tokens}")
            tokens = t.shape[1]
            setattr(s, name, t._ref(name, 3 if name == "lse" else 4))
        s.tokens = tokens
        return s


class Sequence:
    """Tokens of all layers. Made by `Client.create`, `Client.attach` or `fork`.

    `length` is where the next tokens go; it grows when a call has reached the last layer.
    """

    def __init__(self, client: "Client", id: int, length: int = 0):  # noqa: A002
        self.client = client
        self.id = id
        self.length = length

    def append(self, k: Tensor, v: Tensor, *, layer: int = 0) -> None:
        """Appends k's tokens, to as many layers as it has, from `layer` on (a position in the client's list)."""
        self.client.append([Item(self, k, v)], layer=layer)

    def attend(self, q: Tensor, o: Tensor, *, lse: Optional[Tensor] = None, layer: int = 0, **attention: Any) -> None:
        """o = attention of the sequence's last positions, causal among them. scale, softcap, window as `Client.attend`."""
        self.client.attend([Item(self, q=q, o=o, lse=lse)], layer=layer, **attention)

    def step(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, *, lse: Optional[Tensor] = None, layer: int = 0,
             **attention: Any) -> None:
        """Attends over what is stored and the new tokens, then appends these."""
        self.client.step([Item(self, k, v, q, o, lse)], layer=layer, **attention)

    def read(self, begin: int, count: int, *, k: Optional[Tensor] = None, v: Optional[Tensor] = None, layer: int = 0) -> None:
        """Writes tokens [begin, begin + count) into k and v, dequantized and un-rotated."""
        given = [(n, t) for n, t in (("k", k), ("v", v)) if t is not None]
        if not given:
            raise ValueError("k or v is wanted")
        for name, t in given:
            if t.shape[0] != given[0][1].shape[0] or t.shape[1] != count:
                raise ValueError(f"{name} is not [layers, {count}, kv_heads, head_dim]")
        refs = {name: t._ref(name, 4) for name, t in given}
        lib.call("kvd_read_tokens", self.client._open(), lib.Layers(layer, given[0][1].shape[0]), self.id, begin, count,
                 c.byref(refs["k"]) if k is not None else None, c.byref(refs["v"]) if v is not None else None)

    def fork(self, count: int = 1) -> list["Sequence"]:
        """Copy-on-write children."""
        ids = (c.c_uint64 * count)()
        lib.call("kvd_sequence_fork", self.client._open(), self.id, count, ids)
        return [Sequence(self.client, i, self.length) for i in ids]

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        lib.call("kvd_sequence_truncate", self.client._open(), self.id, length)
        self.length = length

    def publish(self, name: str, *, replace: bool = False) -> None:
        """Names it in the namespace: it outlives this client until it is unpublished or evicted."""
        lib.call("kvd_sequence_publish", self.client._open(), self.id, name.encode(), replace)

    def describe(self) -> SequenceInfo:
        s = lib.SequenceStruct()
        lib.call("kvd_sequence_describe", self.client._open(), self.id, c.byref(s))
        return _info(s)

    def free(self, *, unpublish: bool = False) -> None:
        """Lets go of it. Published ones stay, unless `unpublish`."""
        ids = (c.c_uint64 * 1)(self.id)
        lib.call("kvd_sequences_free", self.client._open(), ids, 1, unpublish)


class Client:
    """A session with a daemon, for one model geometry. A context manager.

    layers: ids of the model's layers that hold KV, ascending. head_dim: 64, 128 or 256, or a pair for K and V.
    rotation_set: "model@tag", "sha256:...", "hadamard", "random" or "identity"; None: what suits the codec. sink, recent: tokens kept in bf16; None: 64 and
    256. address: "unix:/path" or "host:port"; None: $KVD_ADDRESS or unix:/run/kvd/kvd.sock. timeout: seconds for each
    call.
    """

    def __init__(self, *, layers: Iterable[int], q_heads: int, kv_heads: int, head_dim: Union[int, tuple[int, int]],
                 codec: Codec = "int2", rotation_set: Optional[str] = None, sink: Optional[int] = None,
                 recent: Optional[int] = None, address: Optional[str] = None, namespace: Optional[str] = None,
                 name: Optional[str] = None, timeout: float = 30.0):
        self.layers = list(layers)
        dims = (head_dim, head_dim) if isinstance(head_dim, int) else tuple(head_dim)
        windows = (64 if sink is None else sink, 256 if recent is None else recent)
        ids = (c.c_uint32 * len(self.layers))(*self.layers)
        options = lib.Options(
            address=address.encode() if address else None, namespace_name=namespace.encode() if namespace else None,
            client_name=name.encode() if name else None, timeout_ms=max(1, int(timeout * 1000)), layers=ids,
            n_layers=len(self.layers), q_heads=q_heads, kv_heads=kv_heads, head_dim_k=dims[0], head_dim_v=dims[1],
            codec=codec.encode(), rotation_set=rotation_set.encode() if rotation_set else None, sink=windows[0], recent=windows[1],
            no_windows=windows == (0, 0))
        self.q_heads, self.kv_heads, self.head_dim = q_heads, kv_heads, dims
        self._handle = c.c_void_p()
        self._directs: set[Any] = set()
        self._buffers: set[Any] = set()
        self._lock = threading.RLock()  # of buffers that come and go, and of closing
        lib.call("kvd_open", c.byref(options), c.byref(self._handle))

    def _open(self) -> c.c_void_p:
        if not self._handle:
            raise ValueError("the client was closed")
        return self._handle

    def close(self) -> None:
        """Ends the session and frees its tensors. Calls of other threads must have returned."""
        for d in list(self._directs):
            d.close()
        with self._lock:
            handle, self._handle = self._handle, c.c_void_p()
            for b in list(self._buffers):
                b.free()
            if handle:
                lib.library().kvd_close(c.byref(handle))

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    @property
    def info(self) -> dict[str, Any]:
        """version, backend, instance, rotation_set (as resolved), page sizes in bytes, sink and recent."""
        i = lib.Info()
        lib.library().kvd_get_info(self._open(), c.byref(i))
        values = {name: getattr(i, name) for name, _ in lib.Info._fields_}
        return {n: x.decode() if isinstance(x, bytes) else x for n, x in values.items()}

    def tensor(self, *shape: int, dtype: Literal["bf16", "f32"] = "bf16") -> Tensor:
        """Zeroed shared memory for a tensor."""
        kind = {"bf16": np.uint16, "f32": np.float32}[dtype]
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        if size <= 0 or min(shape) <= 0:
            raise ValueError(f"a tensor of shape {shape}")
        buffer = _Buffer(self, size)
        return Tensor(buffer, np.frombuffer(buffer.memory(), kind).reshape(shape))

    def share(self, x: Any) -> DeviceTensor:
        """A PyTorch tensor or CuPy array of the GPU that kvd runs on, bfloat16 (CuPy: uint16) or float32, for calls, without
        a copy."""
        return share(self, x)

    def create(self) -> Sequence:
        return next(self.create_many(1))

    def create_many(self, count: int) -> Iterator[Sequence]:
        ids = (c.c_uint64 * count)()
        lib.call("kvd_sequences_create", self._open(), count, ids)
        return iter([Sequence(self, i) for i in ids])

    def attach(self, name: str) -> Sequence:
        """A sequence that some worker published."""
        s = lib.SequenceStruct()
        lib.call("kvd_sequence_attach", self._open(), name.encode(), c.byref(s))
        return Sequence(self, s.sequence, s.length)

    def _batch(self, items: list[Item], needs: str, layer: int) -> tuple[lib.Layers, Any, int]:
        if not items:
            raise ValueError("no items")
        first = items[0].k if "k" in needs else items[0].q
        if first is None:
            raise ValueError(f"{needs[0]} is wanted")
        layers = first.shape[0]
        structs = (lib.ItemStruct * len(items))(*[i._struct(needs, layers) for i in items])
        return lib.Layers(layer, layers), structs, len(items)

    def _appended(self, items: list[Item], layers: lib.Layers) -> None:
        if layers.begin + layers.count == len(self.layers):
            for i in items:
                i.sequence.length += i.k.shape[1]  # type: ignore[union-attr]

    def append(self, items: list[Item], *, layer: int = 0) -> None:
        """Appends the tokens of k and v. Safe to repeat; layers in ascending order."""
        layers, structs, n = self._batch(items, "kv", layer)
        lib.call("kvd_append", self._open(), layers, structs, n)
        self._appended(items, layers)

    def attend(self, items: list[Item], *, layer: int = 0, scale: float = 0, softcap: float = 0, window: int = 0) -> None:
        """scale 0: 1/sqrt(head_dim). softcap 0: none. window 0: all tokens."""
        layers, structs, n = self._batch(items, "qo", layer)
        lib.call("kvd_attend", self._open(), layers, c.byref(lib.Attention(scale, softcap, window)), structs, n)

    def step(self, items: list[Item], *, layer: int = 0, scale: float = 0, softcap: float = 0, window: int = 0) -> None:
        """Attends over what is stored and the new tokens, then appends these."""
        layers, structs, n = self._batch(items, "kvqo", layer)
        lib.call("kvd_step", self._open(), layers, c.byref(lib.Attention(scale, softcap, window)), structs, n)
        self._appended(items, layers)

    def enqueue(self, kind: Literal["append", "attend", "step"], items: list[Item], stream: int, *, layer: int = 0,
                scale: float = 0, softcap: float = 0, window: int = 0) -> None:
        """A call that takes its turn on a CUDA stream (PyTorch's stream.cuda_stream): it returns at once, starts when what was
        on the stream is done, and what comes after waits for its outputs. `enqueued` says whether such calls went well."""
        needs, number = {"append": ("kv", 0), "attend": ("qo", 1), "step": ("kvqo", 2)}[kind]
        layers, structs, n = self._batch(items, needs, layer)
        lib.call("kvd_enqueue", self._open(), stream, number, layers, c.byref(lib.Attention(scale, softcap, window)), structs, n)
        if kind != "attend":
            self._appended(items, layers)

    def enqueued(self) -> None:
        """Waits until all enqueued calls have been answered, and raises the first failure since it was last called."""
        lib.call("kvd_enqueued", self._open())

    @property
    def on_gpu(self) -> bool:
        """Whether the daemon runs on a GPU."""
        return self.info["backend"].startswith("cuda")

    def rotate(self, x: Tensor, y: Tensor, *, side: Literal["k", "v"] = "k", inverse: bool = False, layer: int = 0) -> None:
        """y = x R of K's or V's rotations, or x R^T. Heads are kv_heads or q_heads; y may be x."""
        if x.shape != y.shape:
            raise ValueError(f"x is {x.shape}, y {y.shape}")
        lib.call("kvd_rotate", self._open(), side == "v", inverse, lib.Layers(layer, x.shape[0]), x.shape[1], x.shape[2],
                 c.byref(x._ref("x", 4)), c.byref(y._ref("y", 4)))

    def next_event(self, timeout: float = 1.0) -> Optional[Event]:
        """The next event of the namespace, or None when the time is over. One thread at a time."""
        e = lib.EventStruct()
        lib.call("kvd_next_event", self._open(), max(0, int(timeout * 1000)), c.byref(e))
        return None if e.kind < 0 else Event(_EVENTS[e.kind], e.sequence, e.count, e.name.decode())
