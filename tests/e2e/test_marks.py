"""Layers that a set marks as sensitive: kvd gives them planes and codecs of their own, in every call, as if they had been asked for."""
import json
import os
import re
import subprocess

import grpc
import numpy as np
import pytest

import kvd as package
from conftest import BUILD, KVCTL, calls, kv, layout
from dumps import SMOLLM2, read, write
from on_device import one_step
from test_grpc import append, bf16, code_of, exact, error, tensor, widen

os.environ.setdefault("KVD_LIBRARY", str(BUILD / "client/libkvd.so.0"))
Q_HEADS, KV_HEADS, DIM, TOKENS = 9, 3, 64, 640
IDS = [0, 9, 19, 29]  # of the model, in the recording
MARKS = {"none": None, "one": "19=int4", "two": "9=tc2.5+19=int4", "exact": "19=bf16"}


def kvctl(*arguments, code=0):
    r = subprocess.run([KVCTL, *map(str, arguments)], capture_output=True, text=True, timeout=100)
    assert r.returncode == code, r.stdout + r.stderr
    return r.stdout + r.stderr


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Sets of transforms for tc2, m@none to m@exact, and rotations with a mark, m@rotations."""
    folder = tmp_path_factory.mktemp("marks")
    (folder / "store").mkdir()
    for name, marks in MARKS.items():
        kvctl("calib", "fit", SMOLLM2, folder / name, "--codec", "tc2", *(["--marks", marks] if marks else []))
        kvctl("--store", folder / "store", "calib", "publish", folder / name, f"m@{name}")
    kvctl("calib", "fit", SMOLLM2, folder / "rotations", "--marks", "0=int4+29=bf16")
    kvctl("--store", folder / "store", "calib", "publish", folder / "rotations", "m@rotations")
    return folder


@pytest.fixture(scope="module")
def recorded():
    x, _ = read(SMOLLM2)
    return [x[side][:, :TOKENS] for side in "qkv"]


@pytest.fixture
def served(start, store):
    return start("--store", str(store / "store"))


def shape(name, codec="tc2", planes=()):
    return layout(layers=[] if planes else IDS, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim_k=DIM, head_dim_v=DIM, codec=codec,
                  rotation_set=f"m@{name}", planes=[kv.Plane(layers=layers, codec=own) for layers, own in planes])


def planes_of(opened):
    return [(list(p.layers), p.codec) for p in opened.layout.planes]


def everything(rpc, opened, recorded):
    """What a session reads back and attends to, after an append and a step by layers."""
    q, k, v = recorded
    session = opened.session
    sequence = rpc.kv("CreateSequences", session=session, request_id=1, count=1).sequences[0]
    append(rpc, session, sequence, 0, bf16(k[:, :-8]), bf16(v[:, :-8]))
    out = b""
    for layer in range(len(IDS)):
        one = slice(layer, layer + 1)
        item = kv.StepItem(sequence=sequence, request_id=2 + layer, position=TOKENS - 8, tokens=8, k=tensor(bf16(k[one, -8:])), v=tensor(bf16(v[one, -8:])),
                           q=tensor(q[one, -8:].astype(np.float32)), o=kv.TensorRef(dtype=1))
        out += rpc.kv("Step", session=session, layer_begin=layer, layer_count=1, items=[item]).results[0].o
    r = rpc.kv("ReadTokens", session=session, sequence=sequence, begin=0, tokens=TOKENS, k=kv.TensorRef(dtype=1), v=kv.TensorRef(dtype=1))
    o = rpc.kv("Attend", session=session, items=[kv.AttendItem(sequence=sequence, q_len=3, q=tensor(q[:, -3:].astype(np.float32)),
                                                               o=kv.TensorRef(dtype=1))]).results[0].o
    return sequence, out, r.k, r.v, o


@pytest.mark.parametrize("name, planes", [("one", [([0, 9, 29], "tc2"), ([19], "int4")]), ("exact", [([0, 9, 29], "tc2"), ([19], "bf16")]),
                                          ("two", [([0, 29], "tc2"), ([9], "tc2.5"), ([19], "int4")])])
def test_marks_are_planes_bit_by_bit(served, recorded, name, planes):
    with calls(served) as rpc:
        marked = rpc.kv("OpenSession", layout=shape(name))
        assert planes_of(marked) == planes
        explicit = rpc.kv("OpenSession", layout=shape(name, planes=planes))
        assert marked.layout_digest == explicit.layout_digest
        got, want = everything(rpc, marked, recorded), everything(rpc, explicit, recorded)
        assert got[1:] == want[1:] and len(got[1]) and len(got[4])
        # What one publishes the other adopts: they are one layout.
        rpc.kv("PublishSequence", session=marked.session, sequence=got[0], name="told")
        assert rpc.kv("AttachSequence", session=explicit.session, name="told").sequence.length == TOKENS
        # Attention over what was read back, in float64.
        q, k, v = recorded
        k2, v2 = (np.frombuffer(x, np.float32).reshape(k.shape).astype(np.float64) for x in got[2:4])
        o, _ = exact(q[:, -3:].astype(np.float64), k2, v2, Q_HEADS // KV_HEADS)
        assert error(np.frombuffer(got[4], np.float32).reshape(o.shape), o) < (2e-3 if served.on_gpu() else 1e-4)
        # The marked layer is nearer to what was appended than the same set without marks has it, the others are as there.
        _, _, plain, plain_v, _ = everything(rpc, rpc.kv("OpenSession", layout=shape("none")), recorded)
        for x, kept, less in ((k, k2, plain), (v, v2, plain_v)):
            x = widen(bf16(x))
            less = np.frombuffer(less, np.float32).reshape(x.shape)
            assert (kept[[0, 3]] == less[[0, 3]]).all()
            lost = error(kept[2], x[2]) / error(less[2], x[2])
            assert lost == 0 if name == "exact" else lost < 0.5


def test_blocks_of_marked_and_unmarked_sets_differ(served, recorded):
    q, k, v = recorded
    keys = kv.PrefixKeys(tokens=np.arange(TOKENS, dtype=np.uint32).tobytes())
    with calls(served) as rpc:
        sessions = {name: rpc.kv("OpenSession", layout=shape(name)) for name in MARKS}
        assert len({s.layout_digest for s in sessions.values()}) == len(MARKS)
        again = {name: rpc.kv("OpenSession", layout=shape(name)) for name in MARKS}
        for name, s in sessions.items():
            def match(of):
                return rpc.kv("MatchPrefix", session=of.session, requests=[keys]).matches[0].blocks
            assert match(s) == 0  # whatever the others have published
            sequence = rpc.kv("CreateSequences", session=s.session, request_id=1, count=1).sequences[0]
            append(rpc, s.session, sequence, 0, bf16(k), bf16(v))
            rpc.kv("PublishBlocks", session=s.session, items=[kv.PublishItem(sequence=sequence, keys=keys)])
            assert match(s) == match(again[name]) > 0


def test_what_was_named_stays(served, store):
    """A codec that is named for a plane is its own; a mark never takes bits away; rotations serve any codec."""
    with calls(served) as rpc:
        def opened(*a, **kw):
            return planes_of(rpc.kv("OpenSession", layout=shape(*a, **kw)))

        assert opened("none") == [(IDS, "tc2")]
        assert opened("rotations", "int2") == [([9, 19], "int2"), ([0], "int4"), ([29], "bf16")]
        assert opened("rotations", "int4") == [([0, 9, 19], "int4"), ([29], "bf16")]
        assert opened("rotations", "bf16") == [(IDS, "bf16")]
        assert opened("rotations", "int2", planes=[([0, 9], ""), ([19, 29], "int2")]) == [([9], "int2"), ([19, 29], "int2"), ([0], "int4")]
        for planes, why in (([(IDS, "tc2")], "marks layer 19 for codec int4, and the layout has it in tc2"),
                            ([([0, 9], "tc2"), ([19, 29], "int4")], "transforms for codec tc2")):
            with pytest.raises(grpc.RpcError) as e:
                opened("one", planes=planes)
            assert code_of(e) == "FAILED_PRECONDITION" and why in e.value.details()


def test_resumed_and_kept_exact(served):
    """A session that goes on has the planes that it had, and pages that are kept exact have as many."""
    with calls(served) as rpc:
        asked = shape("one")
        asked.windows.sink = asked.windows.recent = 0
        asked.windows.SetInParent()
        opened = rpc.kv("OpenSession", layout=asked, pages=True)
        parted = shape("one", planes=[([0, 9, 29], "tc2"), ([19], "int4")])
        parted.windows.CopyFrom(asked.windows)
        explicit = rpc.kv("OpenSession", layout=parted, pages=True)
        assert opened.exact_layout_digest == explicit.exact_layout_digest != ""
        resumed = rpc.kv("OpenSession", layout=asked, pages=True, resume=opened.session)
        assert resumed.resumed and resumed.layout_digest == opened.layout_digest
        with pytest.raises(grpc.RpcError) as e:
            other = shape("none")
            other.windows.CopyFrom(asked.windows)
            rpc.kv("OpenSession", layout=other, pages=True, resume=resumed.session)
        assert code_of(e) == "FAILED_PRECONDITION" and "another layout" in e.value.details()


@pytest.mark.skipif("asan" in str(BUILD) or "tsan" in str(BUILD), reason="Python is not instrumented")
def test_direct_mode_takes_the_planes_too(served, recorded):
    """Its outputs are those of calls, on a GPU bit for bit: one sequence, with the same kernels and lengths."""
    q, k, v = (x.astype(np.float32) for x in recorded)
    n = TOKENS - 100
    kw = dict(q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=DIM, codec="tc2", rotation_set="m@one", address=served.address)
    with package.Client(layers=IDS, **kw) as c, package.Client(planes=[package.Plane(IDS[:2]), package.Plane(IDS[2:])], **kw) as parted:
        assert [len(x.info["planes"]) for x in (c, parted)] == [2, 3]  # planes that name no codec are parted as well
        def tokens(begin, end):
            tensors = [c.tensor(len(IDS), end - begin, KV_HEADS, DIM) for _ in range(2)]
            for t, x in zip(tensors, (k, v)):
                t.array[:] = package.to_bf16(x[:, begin:end])
            return tensors

        s = c.create()
        s.append(*tokens(0, n))
        twin = s.fork()[0]
        queries, outputs = (c.tensor(len(IDS), 1, Q_HEADS, DIM, dtype="f32") for _ in range(2))
        queries.array[:] = q[:, n:n + 1]
        twin.step(queries, *tokens(n, n + 1), outputs)
        with package.Direct(c, slots=1, max_tokens=TOKENS) as direct:
            direct.bind(0, s)
            one = slice(n, n + 1)
            o = one_step(c, direct, q[:, None, one], *(package.to_bf16(x[:, None, one]) for x in (k, v)))
        o = o.reshape(outputs.array.shape)
        assert np.array_equal(o, outputs.array) if c.on_gpu else error(o, outputs.array) < 1e-4


def test_fit_marks_what_moves_the_loss_most(store, tmp_path):
    """--sensitive takes the layers whose errors move the answers' loss most, by eval's figures over the last 64 positions, however much
    of their outputs others lose."""
    x, _ = read(SMOLLM2)
    asked = tmp_path / "asked"
    asked.mkdir()
    rng, sizes = np.random.default_rng(5), {0: 0.1, 9: 3.0, 19: 0.01, 29: 1.0}
    for file in (0, 1):
        tensors = {f"layers.{n}.{side}": ("F32", y[i, 256 * file:256 * file + 768]) for i, n in enumerate(IDS) for side, y in x.items()}
        tensors |= {f"layers.{n}.g": ("F32", (size * rng.standard_normal((768, Q_HEADS, DIM))).astype(np.float32)) for n, size in sizes.items()}
        write(asked / f"{file}.safetensors", tensors, {})
    figures = json.loads(subprocess.run([KVCTL, "--json", "calib", "eval", asked, store / "none", "--codecs", "tc2", "-c", "768", "-q", "64"],
                                        capture_output=True, text=True, timeout=100, check=True).stdout)["sets"][0]["windows"]["layers"]
    worst = sorted(sorted(figures, key=lambda i: -figures[i]["moved"])[:2], key=int)
    assert worst == ["9", "29"] and worst != sorted(sorted(figures, key=lambda i: -figures[i]["output_error"])[:2], key=int)
    out = kvctl("calib", "fit", SMOLLM2, tmp_path / "set", "--codec", "tc2", "--sensitive", "2=int4", "--asked", asked)
    moved = {n: float(x) for n, x in re.findall(r"layer (\d+) moves the answers' loss by ([\d.]+)", out)}  # of a fit that knows what is asked
    assert "marks 9=int4+29=int4" in out and 0.5 * figures["9"]["moved"] < moved["9"] < figures["9"]["moved"]
    assert "marks          9=int4+29=int4" in kvctl("calib", "show", tmp_path / "set")
    # Marked layers alone are fitted again, and come to what a fit that knew the marks has made of all.
    kvctl("calib", "fit", SMOLLM2, tmp_path / "known", "--codec", "tc2", "--marks", "9=int4+29=int4", "--asked", asked)
    assert (tmp_path / "set").read_bytes() == (tmp_path / "known").read_bytes()
    write(asked / "0.safetensors", {k: t for k, t in tensors.items() if not k.endswith("g")}, {})
    (asked / "1.safetensors").unlink()
    assert "no gradients of the answers' loss" in kvctl("calib", "fit", SMOLLM2, tmp_path / "no", "--codec", "tc2", "--sensitive", "1=int4",
                                                         "--asked", asked, code=1)
    for arguments, why in ((["--sensitive", "1=int4"], "goes with --asked"),
                           (["--sensitive", "1=int4", "--asked", asked, "--marks", "0=int4"], "not with --marks"),
                           (["--sensitive", "0=int4", "--asked", asked], "a number of layers and a codec"),
                           (["--sensitive", "1=int5", "--asked", asked], "a number of layers and a codec")):
        assert why in kvctl("calib", "fit", SMOLLM2, tmp_path / "no", "--codec", "tc2", *arguments, code=2)
    assert "--asked alone with --codec" in kvctl("calib", "fit", SMOLLM2, tmp_path / "no", "--asked", asked, code=2)
    for marks, why in (("3=int4", "no layer 3"), ("9=tc2", "no more bits than tc2"), ("9=int5", "is not LAYER=CODEC"),
                       ("19=int4+9=int4", "not ascending")):
        assert why in kvctl("calib", "fit", SMOLLM2, tmp_path / "no", "--codec", "tc2", "--marks", marks, code=1)


def test_eval_knows_marks(store):
    """A layer that is exact has no error; the bits are those of all layers together."""
    sets = [store / name for name in ("none", "exact", "one")]
    told = json.loads(subprocess.run([KVCTL, "--json", "calib", "eval", SMOLLM2, *sets, "--codecs", "tc2", "-c", "1024"],
                                     capture_output=True, text=True, timeout=100, check=True).stdout)["sets"]
    error_of = [s["windows"]["layers"]["19"]["output_error"] for s in told]
    assert error_of[1] < 1e-6 and error_of[2] < 0.8 * error_of[0]
    assert [s["bits"] for s in told] == [2.25, (3 * 2.25 + 16) / 4, (3 * 2.25 + 4.5) / 4]
    assert [s["windows"]["layers"]["9"] for s in told][1:] == [told[0]["windows"]["layers"]["9"]] * 2
