"""What is checked before libkvd sees it: numbers, names, and tensors against the layout. Errors name the argument."""
from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

import numpy as np

from . import _library as lib

if TYPE_CHECKING:
    from ._client import Client

U32, U64 = (1 << 32) - 1, (1 << 64) - 1
_FLOAT_MAX = float(np.finfo(np.float32).max)
Dims = tuple[Union[int, str], ...]  # a name stands for a size that is free


def integer(what: str, x: Any, low: int = 0, high: int = U32) -> int:
    """x if it is a whole number of that range. True, 2.0 and "2" are none."""
    try:
        n = None if isinstance(x, (bool, np.bool_)) else operator.index(x)
    except TypeError:
        n = None
    if n is None:
        raise TypeError(f"{what} is {x!r}, and an integer is wanted")
    if not low <= n <= high:
        raise lib.InvalidError(f"{what} is {n}, and {low} to {high} is wanted")
    return n


def number(what: str, x: Any, low: float = -_FLOAT_MAX, high: float = _FLOAT_MAX) -> float:
    """x if it is a finite real number of that range."""
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, (int, float, np.integer, np.floating)):
        raise TypeError(f"{what} is {x!r}, and a number is wanted")
    if not low <= x <= high:  # NaN is in no range
        raise lib.InvalidError(f"{what} is {x}, and {low:g} to {high:g} is wanted")
    return float(x)


def milliseconds(what: str, seconds: Any) -> int:
    return math.ceil(number(what, seconds, 0, U32 // 1000) * 1000)


def flag(what: str, x: Any) -> bool:
    if not isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{what} is {x!r}, and True or False is wanted")
    return bool(x)


def choice(what: str, x: Any, *of: str) -> str:
    if not isinstance(x, str) or x not in of:
        raise lib.InvalidError(f"{what} is {x!r}, and {' or '.join(map(repr, of))} is wanted")
    return x


def text(what: str, x: Any) -> bytes:
    """A string for libkvd, which ends strings at NUL."""
    if not isinstance(x, str):
        raise TypeError(f"{what} is {x!r}, and a string is wanted")
    try:
        encoded = x.encode()
    except UnicodeEncodeError as e:
        raise lib.InvalidError(f"{what} is {x!r}, which is not UTF-8") from e
    if b"\0" in encoded:
        raise lib.InvalidError(f"{what} is {x!r}, and a name holds no NUL")
    return encoded


def sinks(x: Any, heads: list[int]) -> list[float]:
    """Attention sinks, those of all layers one after the other: x has a row for each layer, of so many heads."""
    rows = list(x)
    if len(rows) != len(heads):
        raise lib.InvalidError(f"sinks has {len(rows)} rows, and one for each of the {len(heads)} layers is wanted")
    out: list[float] = []
    for i, (row, n) in enumerate(zip(rows, heads)):
        try:
            a = np.asarray(row, dtype=np.float32)
        except (TypeError, ValueError) as e:
            raise TypeError(f"sinks[{i}] is {row!r}, and {n} numbers are wanted") from e
        if a.shape != (n,):
            raise lib.InvalidError(f"sinks[{i}] is {dims(a.shape)}, and {dims((n,))} is wanted: [q_heads]")
        if np.isnan(a).any() or np.isposinf(a).any():
            head = int(np.flatnonzero(np.isnan(a) | np.isposinf(a))[0])
            raise lib.InvalidError(f"sinks[{i}, {head}] is {a[head]}, and a number is wanted, or -inf for none")
        out += a.tolist()
    return out


def attention(scale: Any, softcap: Any, window: Any) -> lib.Attention:
    return lib.Attention(number("scale", scale), number("softcap", softcap, 0), integer("window", window))


class Facts(NamedTuple):
    """Of a tensor: where it is, and whether it still is. Strides are bytes."""

    buffer: Any  # has handle, address, size
    client: Any
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    kind: str  # "bf16" or "f32"


def describe(x: Any) -> str:
    """Of something that was given instead of a tensor."""
    name = f"{type(x).__module__}.{type(x).__qualname__}".replace("builtins.", "")
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    return name + (f" of shape {dims(shape)}" if isinstance(shape, tuple) else "") + (f" and {dtype}" if dtype is not None else "")


def dims(shape: Dims) -> str:
    return f"[{', '.join(map(str, shape))}]"


def facts(what: str, x: Any, client: "Client") -> Facts:
    """Of a tensor that this client shares with the daemon."""
    if not hasattr(x, "_facts"):
        raise TypeError(f"{what} is a {describe(x)}: calls want a tensor that the daemon shares, from Client.tensor or, on a GPU, "
                        "Client.share")
    x._check_process()
    f: Facts = x._facts()
    if not f.buffer.handle:
        raise lib.InvalidError(f"{what} was freed, or its client closed")
    if f.client is not client:
        raise lib.InvalidError(f"{what} is shared by another client than the call's")
    return f


def same_shape(what: str, shape: tuple[int, ...], wanted: Dims, names: Dims) -> None:
    """wanted: sizes, or names of those that are free; names: of all of them, for the error."""
    if shape == wanted:
        return
    if len(shape) != len(wanted) or any(isinstance(w, int) and n != w for n, w in zip(shape, wanted)):
        raise lib.InvalidError(f"{what} is {dims(shape)}, and {dims(wanted)} is wanted: {dims(names)}")


def reference(what: str, f: Facts, kinds: tuple[str, ...]) -> lib.TensorRef:
    """How libkvd is told where a tensor of the right shape lies."""
    if f.kind not in kinds:
        raise lib.InvalidError(f"{what} is {f.kind}, and {' or '.join(kinds)} is wanted")
    if len(f.shape) == 4 and f.shape[3] > 1 and f.strides[3] != f.itemsize:
        raise lib.InvalidError(f"{what} has steps of {f.strides[3]} bytes along head_dim, which must be contiguous")
    end, strides = f.address + f.itemsize, []
    for i, (n, stride) in enumerate(zip(f.shape, f.strides)):
        if n == 1:
            stride = 0  # whatever NumPy says; to libkvd 0 is "dense"
        elif stride <= 0:
            raise lib.InvalidError(f"{what} has steps of {stride} bytes along {('layers', 'tokens', 'heads', 'head_dim')[i]}: it runs "
                                   "backwards, or was expanded")
        strides.append(stride)
        end += (n - 1) * stride
    if f.address < f.buffer.address or end > f.buffer.address + f.buffer.size:
        raise lib.InvalidError(f"{what} lies outside the memory that is shared: it is a copy, not a slice")
    return lib.TensorRef(f.buffer.handle, f.address - f.buffer.address, strides[0], strides[1], strides[2],
                         lib.KVD_BF16 if f.kind == "bf16" else lib.KVD_F32)


def tensor(what: str, x: Any, client: "Client", wanted: Dims, names: Dims, kinds: tuple[str, ...]) -> lib.TensorRef:
    f = facts(what, x, client)
    same_shape(what, f.shape, wanted, names)
    return reference(what, f, kinds)


def sequence(what: str, x: Any, client: Optional["Client"], kind: type) -> Any:
    if not isinstance(x, kind):
        raise TypeError(f"{what} is a {describe(x)}, and a Sequence is wanted")
    if x.client is not client:
        raise lib.InvalidError(f"{what} belongs to another client than the call's: attach it by its name")
    return x
