"""The space of an engine's pages: a digest of all that decides about K and V of given tokens. Pages are shared where it is equal only."""
from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib
from typing import Any, Callable, Optional

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
_BESIDE = (".json", ".py", ".model", ".txt")  # what else decides: the config, remote code, the tokenizer
_CHUNK = 1 << 22


class Refused(RuntimeError):
    """The engine was started with something that kvd does not serve. Says what, and what would be served."""


def space(**facts: Any) -> bytes:
    """32 bytes of named facts: what JSON can hold, and nothing that differs between processes that may share."""
    return hashlib.sha256(b"kvd engine space 1 " + json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).digest()


def _file(path: pathlib.Path) -> str:
    """Of a file's content. A download cache names files by that digest already: such a link is not read."""
    target = os.path.realpath(path)
    name = os.path.basename(target)
    if path.is_symlink() and len(name) == 64 and os.path.basename(os.path.dirname(target)) == "blobs" and not set(name) - set("0123456789abcdef"):
        return name
    digest = hashlib.sha256()
    with open(target, "rb", buffering=0) as f:
        while part := f.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()


def _folder(path: pathlib.Path, wanted: Callable[[pathlib.Path], bool]) -> str:
    files = sorted(p for p in path.rglob("*") if p.is_file() and wanted(p))
    if not files:
        raise Refused(f"{path} has no files that could be told from others")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_file, files))
    return space(files={str(p.relative_to(path)): d for p, d in zip(files, digests)}).hex()


def weights_digest(path: str) -> str:
    """Of a model's folder or file: the content of its weights, config and code. Reads all of it, unless it lies in a download cache."""
    p = pathlib.Path(path)
    if p.is_file():
        return _file(p)
    if not p.is_dir():
        raise Refused(f"model {path!r} is no folder or file here, so its weights can't be told from others: give a local path, or say "
                      'what they are with "weights" in the extra config (a revision that you vouch for)')
    return _folder(p, lambda f: f.suffix in _WEIGHTS + _BESIDE)


def _stamp(path: pathlib.Path) -> list[tuple[str, int, int, int]]:
    files = sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())
    return [(str(p), s.st_ino, s.st_size, s.st_mtime_ns) for p in files for s in [p.stat()]]


class Adapters:
    """Digests of LoRA adapters by content. An engine loads an adapter once and knows it by its number afterwards, so what the number
    stood for first counts; if its files have changed since, or it stands for other files now, nobody can say what the engine has, and
    the adapter's requests are left out from then on."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, Any, str]] = {}  # number: path, stamp, digest
        self._doubtful: set[int] = set()

    def digest(self, number: int, path: str, reload: bool = False) -> Optional[str]:
        """None: its requests are left out."""
        if reload:
            self._doubtful.add(number)
        if number in self._doubtful:
            return None
        try:
            stamp = _stamp(pathlib.Path(path))
            if number not in self._known:
                self._known[number] = (path, stamp, adapter_digest(path))
        except (OSError, Refused):
            self._doubtful.add(number)
            return None
        known = self._known[number]
        if known[:2] != (path, stamp):
            self._doubtful.add(number)
            return None
        return known[2]


def adapter_digest(path: str) -> str:
    """Of all files of a LoRA adapter's folder."""
    p = pathlib.Path(path)
    if not p.is_dir():
        raise Refused(f"adapter {path!r} is no folder here")
    return _folder(p, lambda f: True)
