"""Writes what fuzzing starts from: small good inputs of every target. usage: seeds.py FOLDER (FOLDER/TARGET/NAME)"""
import collections
import io
import json
import pathlib
import pickle
import struct
import sys
import types

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "e2e"))
from conftest import admin, health, kv  # noqa: E402

out = pathlib.Path(sys.argv[1])


def write(target, name, data):
    folder = out / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


# -- pickles as torch.save writes them ------------------------------------------------------------

torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
STORAGES = ("FloatStorage", "HalfStorage", "BFloat16Storage", "DoubleStorage")
for kind in STORAGES:
    setattr(torch, kind, type(kind, (), {"__module__": "torch"}))
exec("def _rebuild_tensor_v2(*arguments): pass", utils.__dict__)
utils._rebuild_tensor_v2.__module__ = "torch._utils"
sys.modules.update({"torch": torch, "torch._utils": utils})


class Storage:
    def __init__(self, kind, key):
        self.kind, self.key = kind, key


class Tensor:
    def __init__(self, *shape, kind="FloatStorage", key="0", offset=0):
        self.shape, self.storage, self.offset = shape, Storage(kind, key), offset

    def __reduce__(self):
        strides = [1]
        for n in reversed(self.shape[1:]):
            strides.insert(0, strides[0] * n)
        return utils._rebuild_tensor_v2, (self.storage, self.offset, self.shape, tuple(strides), False, collections.OrderedDict())


def pickled(value, protocol):
    class Pickler(pickle.Pickler):
        def persistent_id(self, x):
            return ("storage", getattr(torch, x.kind), x.key, "cpu", 8192) if isinstance(x, Storage) else None

    data = io.BytesIO()
    Pickler(data, protocol=protocol).dump(value)
    return data.getvalue()


def layers(tensor, **more):
    return {"format_version": 1, "source_grouping": "layer", "layers": {i: {"layer_id": i, "rotation": tensor, **more} for i in (0, 2)}}


trees = {
    "v1": layers(Tensor(64, 64), eigenvalues=Tensor(64, key="1")),
    "v2": {**layers(Tensor(2, 64, 64)), "format_version": 2, "source_grouping": "per_kv_head"},
    "half": layers(Tensor(64, 64, kind="HalfStorage")),
    "bf16": layers(Tensor(64, 64, kind="BFloat16Storage", offset=64)),
    "double": {"layers": {"0": Tensor(64, 64, kind="DoubleStorage")}},
    "objective": {**layers(Tensor(64, 64)), "objective": "qqt_r_h_pbr", "note": [1.5, None, True, (1, 2), 1 << 40]},
    "list": [Tensor(64, 64), Tensor(64, 64, key="2")],
}
for name, tree in trees.items():
    for protocol in (2, 4, 5):
        write("pickle", f"{name}-{protocol}", pickled(tree, protocol))
    write("zoo", name, b"\1" + pickled(tree, 2))
write("zoo", "no-zip", b"\0PK\3\4")

# -- safetensors and sets -------------------------------------------------------------------------

shape = {"k.rotation": [1, 1, 64, 64], "v.rotation": [1, 1, 64, 64], "k.clip": [1, 1], "v.clip": [1, 1]}


def header(**more):
    tensors, at = {}, 0
    for name, dims in shape.items():
        size = 4 * 64 * 64 if len(dims) == 4 else 4
        tensors[name] = {"dtype": "F32", "shape": dims, "data_offsets": [at, at + size]}
        at += size
    return json.dumps({"__metadata__": {"format": "kvd-rotation-set/1", "model": "m", "layers": "0", "objective": "o",
                                        "provenance": "p", "payload": "@", **more}, **tensors}, separators=(",", ":")).encode()


marked = {"format": "kvd-rotation-set/4", "k.scale": "unbiased", "v.scale": "least-squares"}
for name, data in {"good": header(), "marked": header(**marked, marks="0=int4"), "sides": header(**marked, marks="0=k=bf16,v=int4"),
                   "elsewhere": header(**marked, marks="3=int4+4=tc2.5"), "twice": header(**marked, marks="0=int4+0=int4"),
                   "unmarked": header(**marked), "transforms": header(format="kvd-rotation-set/4", codec="tc2", marks="0=bf16"), "layers": header(layers="0-1"), "other": header(format="x"), "empty": b"{}"}.items():
    write("native", name, b"\1" + data)
    write("safetensors", name, struct.pack("<Q", len(data)) + data + bytes(64))
small = json.dumps({"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
                    "b": {"dtype": "I8", "shape": [], "data_offsets": [12, 13]}}).encode()
write("safetensors", "small", struct.pack("<Q", len(small)) + small + bytes(13))
write("native", "cut", b"\0" + struct.pack("<Q", 1 << 40) + b"{")

# -- configuration --------------------------------------------------------------------------------

conf = (HERE.parents[1] / "deploy/kvd.conf").read_bytes()
write("config", "installed", conf)
write("config", "all", b"\n".join(line.lstrip(b"#; ") if b"=" in line else line for line in conf.splitlines()))
write("config", "two", b"[kvd]\npool-size = 1GiB\nlisten = unix:/run/x\n\0[namespace a]\nquota = 1GiB\nallow-uid = 0, 1\n")
write("config", "wrong", b"pool-size = 1\n[kvd]\nthreads = -1\nthreads = 5\n[namespace ]\n[tls]\ncert = /\n  indented\n" + b"x" * 300)

# -- requests -------------------------------------------------------------------------------------

ref = kv.TensorRef(buffer=1, offset=64, layer_stride=4096, token_stride=256, head_stride=128, dtype=1, inline_data=b"1234")
side = kv.PagedRef.Side(buffers=[1, 2], offsets=[0, 64], block_stride=4096, head_stride=128, token_stride=256, dim_stride=2)
paged = kv.PagedRef(k=side, v=side, all_blocks=8, block_tokens=16, first_token=3, blocks=range(9))
fence = kv.Fence(buffer=1, offset=4, value=9)
session = "0123456789abcdef" * 2
prefix = kv.PrefixKeys(extra=[b"lora"], tokens=bytes(256))
layout = kv.Layout(layers=range(5), q_heads=8, kv_heads=2, head_dim_k=64, head_dim_v=64, codec="int2",
                       rotation_set="hadamard", windows=kv.Windows(sink=64, recent=256))
params = kv.AttentionParams(scale=.5, softcap=30, window=100, return_lse=True)
both = dict(session=session, layer_begin=1, layer_count=2, wait=fence, signal=fence)
requests = [
    kv.OpenSessionRequest(request_id=1, namespace_name="n", ticket=session, client_name="c", layout=layout, lease_ms=1000),
    kv.CloseSessionRequest(session=session), kv.KeepAliveRequest(session=session),
    kv.RegisterBufferRequest(session=session, key=1, size=4096, memory=1, cuda_ipc_handle=bytes(64)),
    kv.RegisterBufferRequest(session=session, key=1, size=8 << 20, memory=3, mapped=2 << 20,
                             segments=[kv.RegisterBufferRequest.Segment(key=i, bytes=2 << 20) for i in (2, 3)]),
    kv.ReleaseBufferRequest(session=session, buffer=1), kv.CreateSequencesRequest(session=session, request_id=2, count=3),
    kv.ForkSequenceRequest(session=session, request_id=2, sequence=1 << 33, count=3),
    kv.TruncateSequenceRequest(session=session, sequence=1 << 33, length=5),
    kv.PublishSequenceRequest(session=session, sequence=1 << 33, name="n", replace=True),
    kv.AttachSequenceRequest(session=session, name="n"),
    kv.FreeSequencesRequest(session=session, request_id=4, sequences=[1 << 33, 2], unpublish=True),
    kv.DescribeSequencesRequest(session=session, sequences=[1, 2, 3]),
    kv.AppendRequest(items=[kv.AppendItem(sequence=5, position=6, tokens=7, k=ref, v=ref)] * 2, **both),
    kv.AttendRequest(items=[kv.AttendItem(sequence=5, q_len=6, q=ref, o=ref, lse=ref)] * 2, params=params, **both),
    kv.StepRequest(items=[kv.StepItem(sequence=5, position=6, tokens=7, k=ref, v=ref, q=ref, o=ref, lse=ref)] * 2, params=params, **both),
    kv.RotateRequest(session=session, which=1, inverse=True, layer_begin=1, layer_count=1, rows=2, heads=3, x=ref, y=ref),
    kv.ReadTokensRequest(session=session, sequence=5, begin=1, tokens=2, layer_begin=1, layer_count=1, k=ref, v=ref),
    kv.MapSequencesRequest(session=session, items=[kv.MapItem(sequence=1, codec_from=2, other_codec_from=[1])], again=True),
    kv.WatchRequest(session=session), admin.PingRequest(payload=b"x" * 20),
    admin.ListSequencesRequest(namespace_name="n", limit=4), admin.SetQuotaRequest(namespace_name="n", quota_bytes=1),
    admin.EvictRequest(namespace_name="n", name="x", bytes=1), admin.DrainRequest(timeout_ms=1),
    admin.SetLogLevelRequest(level="info"), admin.FetchRotationSetRequest(name="a@b"),
    kv.MatchPrefixRequest(session=session, requests=[prefix] * 2, lease_ms=9, quiet=True, restore_ms=8, tiers=True),
    kv.PublishBlocksRequest(session=session, items=[kv.PublishItem(sequence=5, keys=prefix, end=True)]),
    kv.AdoptPrefixRequest(session=session, request_id=1, items=[kv.AdoptItem(lease=7, blocks=2, keep=True)]),
    kv.ReleasePrefixRequest(session=session, leases=[1, 1 << 40]),
    kv.LookupPagesRequest(session=session, space=b"space", requests=[bytes(64), b""], key_bytes=16, lease_ms=9, quiet=True),
    kv.HintPagesRequest(session=session, space=b"space", requests=[bytes(64), b""], key_bytes=16, hint=5, ms=0),
    kv.HintPagesRequest(session=session, space=b"space", requests=[bytes(80)], key_bytes=40, hint=0, ms=9, expire=True),
    kv.HintPagesRequest(session=session, space=b"s", requests=[bytes(32), bytes(16)], key_bytes=16, hint=2, ms=60000),
    kv.PutPagesRequest(session=session, space=b"space", keys=bytes(40), key_bytes=20, after=bytes(20), exact=b"\0\1", k=ref, v=ref),
    kv.GetPagesRequest(session=session, space=b"space", keys=bytes(48), key_bytes=24, k=ref, v=ref),
    kv.PutPagesRequest(session=session, space=b"space", keys=bytes(40), key_bytes=20, paged=paged),
    kv.GetPagesRequest(session=session, space=b"space", keys=bytes(48), key_bytes=24, paged=paged),
    kv.EncodePagesRequest(session=session, space=b"space", keys=bytes(range(96)), key_bytes=16),
    admin.ListPrefixesRequest(namespace_name="n", limit=4), admin.ExplainPrefixRequest(namespace_name="n", key=bytes(24)),
    admin.PinPrefixRequest(namespace_name="n", key=bytes(24), seconds=9), admin.DropPrefixRequest(namespace_name="n"),
    admin.ClassifyPrefixRequest(namespace_name="n", key=bytes(24), priority="low"),
    health.HealthCheckRequest(service="kvd"),
]
services = [kv.DESCRIPTOR.services_by_name["KvCache"], admin.DESCRIPTOR.services_by_name["Admin"],
            health.DESCRIPTOR.services_by_name["Health"]]
numbers = {m.input_type.full_name: i for i, m in reversed(list(enumerate(m for s in services for m in s.methods)))}
for i, message in enumerate(requests):  # some are there twice
    number = numbers[message.DESCRIPTOR.full_name]
    write("request", f"{message.DESCRIPTOR.name}{i}", bytes([number]) + message.SerializeToString())

# -- the fd socket: steps of four bytes (fuzz_fdsock.c) --------------------------------------------

CONNECT, SEND, RAW, HANG_UP, REGISTER, BIND, GRANT, GO_ROUND = range(8)


def steps(*of):
    """(operation, worker, bytes...) each; what a RAW sends comes behind it."""
    return b"".join(bytes([op | worker << 3, *more[:3]]).ljust(4, b"\0") + b"".join(more[3:]) for op, worker, *more in of)


good = struct.pack("<IIQ", 0x0144766B, 1, 2)
write("fdsock", "life", steps((CONNECT, 0), (SEND, 0, 1, 0), (BIND, 0), (REGISTER, 0, 1, 0, 16), (GO_ROUND, 0), (HANG_UP, 0), (GO_ROUND, 0)))
write("fdsock", "memory", steps((CONNECT, 0), *[(SEND, 0, k, k) for k in range(6)], *[(REGISTER, 0, k, 9, 1) for k in range(6)]))
write("fdsock", "raw", steps((CONNECT, 1), (RAW, 1, 16, 1, 0, good), (REGISTER, 1, 2, 0, 4), (RAW, 1, 16, 2, 0, good), (GO_ROUND, 1)))
write("fdsock", "malformed", steps((CONNECT, 2), (BIND, 2), (RAW, 2, 7, 3, 0, b"nothing"), (REGISTER, 2, 1), (SEND, 2, 1), (GO_ROUND, 2)))
write("fdsock", "many", steps((CONNECT, 3), (GRANT, 3, 3), (RAW, 3, 16, 15, 0, good), (CONNECT, 0), *[(SEND, 0, 1, 0)] * 30))
