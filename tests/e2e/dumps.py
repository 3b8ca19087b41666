"""Recorded and made-up activations as safetensors files, read and written by hand: not by what is tested."""
import json
import struct

import numpy as np

from conftest import SOURCE

SMOLLM2 = SOURCE / "tests/data/smollm2.safetensors"


def write(path, tensors, metadata=None):
    header, blob = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, x) in tensors.items():
        if dtype == "BF16":
            data = (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            data = np.ascontiguousarray(x, {"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [len(blob), len(blob) + len(data)]}
        blob += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + blob)


def read(path):
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + n])
    out = {}
    for name, t in header.items():
        if name == "__metadata__":
            continue
        a, b = t["data_offsets"]
        data = raw[8 + n + a:8 + n + b]
        if t["dtype"] == "BF16":
            x = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            x = np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[t["dtype"]])
        out[name] = x.reshape(t["shape"])
    return out, header.get("__metadata__", {})


def activations(seed, tokens, q_heads, kv_heads, dim_k, dim_v, layers):
    """Correlated channels with an outlier, so that eigenvalues lie apart."""
    r = np.random.default_rng(seed)
    out = {}
    for layer in layers:
        def side(heads, dim):
            mix = r.normal(size=(dim, dim)) * np.exp(-3 * np.arange(dim) / dim)[:, None]
            x = r.normal(size=(tokens, heads, dim)) @ mix
            x[..., 3] *= 30
            return x.astype(np.float32)
        out[layer] = side(q_heads, dim_k), side(kv_heads, dim_k), side(kv_heads, dim_v)
    return out
