"""Prompts: blocks of 64 tokens that others have computed, or can use."""
from __future__ import annotations

import ctypes as c
import dataclasses
from typing import TYPE_CHECKING, Any, Iterable, Optional, Union

import numpy as np

from . import _check
from . import _library as lib

if TYPE_CHECKING:
    from ._client import Client

BLOCK = 64
TIERS = ("host", "directory", "redis")
_MISSES = ("none", "unknown", "evicted for room", "evicted for the quota", "evicted for the index", "dropped", "damaged",
           "other extra", "other layout", "evicted by an operator", "expired", "superseded")
HINTS = ("retain", "demote", "prefetch", "low", "normal", "high")


def miss(number: int) -> str:
    return _MISSES[number] if number < len(_MISSES) else "unknown"


class Prompt:
    """Names a prompt's blocks, from its first token on: by token ids, or by keys of the caller's own, one of 16 to 40 bytes for
    each 64 tokens. What is named one way is not found the other way.

    `extra`: what else decides about K and V, as bytes: the model's revision, a salt, adapters by content, digests of media. Only
    prompts of equal extras, in their order, share blocks; and only within the namespace, between clients of one layout.
    """

    def __init__(self, tokens: Any = None, *, block_keys: Optional[Iterable[bytes]] = None, extra: Union[bytes, Iterable[bytes]] = ()):
        if (tokens is None) == (block_keys is None):
            raise lib.InvalidError("a prompt has tokens or block_keys, and not both")
        extras = [extra] if isinstance(extra, bytes) else list(extra)
        if not all(isinstance(e, bytes) for e in extras):
            raise TypeError("extra is bytes, or several of them")
        self.extra = extras
        self.tokens = self.block_keys = None
        if tokens is not None:
            ids = np.asarray(tokens)
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise TypeError("tokens are integers, in one dimension")
            if ids.size and (ids.min() < 0 or ids.max() > _check.U32):
                raise lib.InvalidError(f"token ids are 0 to {_check.U32}")
            self.tokens = np.ascontiguousarray(ids, dtype="<u4")
        else:
            keys = list(block_keys or ())
            if not all(isinstance(k, bytes) and len(k) == len(keys[0]) for k in keys):
                raise lib.InvalidError("block_keys are bytes, all of one length")
            self.block_keys = keys

    def _struct(self) -> tuple[lib.PromptStruct, Any]:
        extras = (lib.Bytes * max(len(self.extra), 1))(*((e, len(e)) for e in self.extra))
        s = lib.PromptStruct(extras=extras, n_extras=len(self.extra))
        if self.tokens is not None:
            s.tokens = c.cast(self.tokens.ctypes.data if self.tokens.size else extras, c.POINTER(c.c_uint32))
            s.n_tokens = self.tokens.size
        else:
            keys = self.block_keys or []
            s.block_keys = b"".join(keys) or b"\0"
            s.key_bytes, s.blocks = len(keys[0]) if keys else 16, len(keys)
        return s, extras  # which must live as long


@dataclasses.dataclass
class Match:
    """What is there of a prompt, and kept for the time of the lease. To be used once: `Client.adopt`, or `release`."""

    client: "Client" = dataclasses.field(repr=False)
    blocks: int  # leading ones that a sequence can be made of
    known: int  # leading ones that are known; the pages of some may be gone
    window_tokens: int  # tokens before that cut that are in bf16 in all planes, sink apart
    end: bool  # the cut is where an end was published: going on there gives the bits of never having stopped
    lease: int  # 0: none
    miss: str  # why the first one that is not known is not; "none": all are
    missed: int  # when that went, in seconds of Unix time; 0: not known
    restored: int = 0  # blocks that were brought back from tiers for this
    # Blocks with which more leading ones could be had, and that the pool lacked, by the farthest tier that has part of each.
    behind: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.blocks * BLOCK

    def release(self) -> None:
        """Ends the lease."""
        if self.lease:
            lib.call("kvd_leases_release", self.client._open(), (c.c_uint64 * 1)(self.lease), 1)
            self.lease = 0


@dataclasses.dataclass(frozen=True)
class Published:
    """What was published of a prompt."""

    blocks: int  # leading ones that are known now
    known: int  # of those, before
    end: bool


def _prompt(what: str, x: Any) -> Prompt:
    if not isinstance(x, Prompt):
        raise TypeError(f"{what} is a {_check.describe(x)}, and a kvd.Prompt is wanted")
    return x


def match(client: "Client", prompts: Any, lease: float, restore: float, wait: float, tiers: Any, quiet: Any,
          recompute_window: Any) -> list[Match]:
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise TypeError("prompts is a list of kvd.Prompt, and not empty")
    made = [_prompt(f"prompts[{i}]", p)._struct() for i, p in enumerate(prompts)]
    structs = (lib.PromptStruct * len(made))(*(s for s, _ in made))
    out = (lib.MatchStruct * len(made))()
    for m in out:
        m.size = c.sizeof(lib.MatchStruct)
    options = lib.MatchOptions(lease_ms=_check.milliseconds("lease", lease), restore_ms=_check.milliseconds("restore", restore),
                               wait_ms=_check.milliseconds("wait", wait), tiers=_check.flag("tiers", tiers), quiet=_check.flag("quiet", quiet),
                               recompute_window=_check.flag("recompute_window", recompute_window))
    lib.call("kvd_prompts_match", client._open(), structs, len(made), c.byref(options), out)
    return [Match(client, m.blocks, m.known, m.window_tokens, m.end, m.lease, miss(m.miss), m.missed, m.restored,
                  {name: n for name, n in zip(TIERS, m.behind) if n}) for m in out]


def hint(client: "Client", prompts: Any, what: Any, seconds: float, expire: Any) -> list[int]:
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise TypeError("prompts is a list of kvd.Prompt, and not empty")
    _check.choice("what", what, *HINTS)
    made = [_prompt(f"prompts[{i}]", p)._struct() for i, p in enumerate(prompts)]
    structs = (lib.PromptStruct * len(made))(*(s for s, _ in made))
    blocks = (c.c_uint32 * len(made))()
    lib.call("kvd_prompts_hint", client._open(), structs, len(made), HINTS.index(what), _check.milliseconds("seconds", seconds),
             _check.flag("expire", expire), blocks)
    return list(blocks)


def adopt(client: "Client", m: Any, blocks: Optional[int]) -> tuple[int, int]:
    if not isinstance(m, Match):
        raise TypeError(f"match is a {_check.describe(m)}, and a kvd.Match is wanted")
    if m.client is not client:
        raise lib.InvalidError("the match is another client's")
    if not m.lease:
        raise lib.PreconditionError("the match has no lease: nothing was found, none was asked for, or it was used")
    n = 0 if blocks is None else _check.integer("blocks", blocks, 1)
    sequence, length = c.c_uint64(), c.c_uint64()
    lib.call("kvd_prompt_adopt", client._open(), m.lease, n, c.byref(sequence), c.byref(length))
    m.lease = 0
    return sequence.value, length.value


def publish(client: "Client", sequence: int, prompt: Any, end: Any) -> Published:
    s, _extras = _prompt("prompt", prompt)._struct()
    out = lib.PublishedStruct()
    lib.call("kvd_prompt_publish", client._open(), sequence, c.byref(s), _check.flag("end", end), c.byref(out))
    return Published(out.blocks, out.known, out.end)
