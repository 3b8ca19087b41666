"""Llama- and Qwen-style decoders, and Gemma 3's, in NumPy, float32: RMSNorm, RoPE, grouped-query attention, SwiGLU or GeGLU, and
layers with sliding windows.

Weights come from a GGUF file (any quantization that the `gguf` package can undo) or from a Hugging Face folder of
safetensors with config.json and tokenizer.json. The attention is the cache's: see cache.py.
"""
from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple, Optional, Protocol, Sequence

import numpy as np


class Cache(Protocol):
    """Where keys and values live, and where queries meet them."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""

    def attend(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """Stores k and v [tokens, kv_heads, head_dim] of the new tokens, counts[i] of sequence i one after the other, and
        returns the attention of q [tokens, q_heads, head_dim] over all tokens of their sequences, causal."""


_GGUF_LAYER = {"attn_norm": "ln1", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o", "ffn_norm": "ln2",
               "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down", "attn_q_norm": "q_norm", "attn_k_norm": "k_norm",
               "post_attention_norm": "ln1_post", "post_ffw_norm": "ln2_post"}
_HF_LAYER = {"input_layernorm": "ln1", "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
             "self_attn.o_proj": "o", "post_attention_layernorm": "ln2", "mlp.gate_proj": "gate", "mlp.up_proj": "up",
             "mlp.down_proj": "down", "self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
_TOP = {"token_embd.weight": "embed", "output_norm.weight": "norm", "output.weight": "head",
        "model.embed_tokens.weight": "embed", "model.norm.weight": "norm", "lm_head.weight": "head"}


# Gemma 3: every sixth layer sees all tokens; the others see a window, and turn by another RoPE. GGUF files do not say so.
_GEMMA_PATTERN, _GEMMA_LOCAL_THETA = 6, 10000.0


class Marks(NamedTuple):
    """What a chat has around its texts: system is None where there is no such turn."""

    system: Optional[str]  # with the text in place of {}
    user: str  # before what the user says
    answer: str  # after it
    end: str  # of an answer
    after: str  # between an answer that was ended and the next turn
    first: str = ""  # before everything


CHATML = Marks("<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "\n")
GEMMA = Marks(None, "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>", "\n", "<bos>")

# Names of what is no weight of the decoder, and may be there.
_NO_WEIGHTS = ("rotary_emb.inv_freq",)


def check_gguf(meta: dict[str, Any]) -> None:
    """Refuses a GGUF file whose model is more than this decoder: what is not understood would be left out in silence."""
    arch = meta.get("general.architecture")
    if arch not in ("llama", "qwen2", "qwen3", "gemma3"):
        raise ValueError(f"architecture {arch}: llama, qwen2, qwen3 and gemma3 are known")
    heads = meta[f"{arch}.attention.head_count"]
    dim = meta.get(f"{arch}.attention.key_length", meta[f"{arch}.embedding_length"] // heads)
    for name, right in (("rope.scaling.type", ("none", "")), ("attention.sliding_window", (0,)), ("expert_count", (0,)),
                        ("attn_logit_softcapping", (0.0,)), ("final_logit_softcapping", (0.0,)), ("rope.dimension_count", (dim,)),
                        ("attention.value_length", (dim,)), ("attention.scale", ()), ("logit_scale", (1.0,)), ("rope.scaling.factor", (1.0,)),
                        ("rope.scale_linear", (1.0,)), ("attention.causal", (True,))):
        x = meta.get(f"{arch}.{name}")
        if x is not None and x not in right and (arch, name) != ("gemma3", "attention.sliding_window"):
            raise ValueError(f"{arch}.{name} is {x}, which this decoder does not have")
    if arch == "gemma3" and not isinstance(meta.get("gemma3.attention.sliding_window"), int):
        raise ValueError("gemma3.attention.sliding_window is missing: one number is wanted")


def check_config(config: dict[str, Any]) -> None:
    """The same for a Hugging Face folder."""
    kind = config.get("model_type")
    if kind not in ("llama", "qwen2", "qwen3", "mistral"):
        raise ValueError(f"model_type {kind}: llama, qwen2, qwen3 and mistral are known")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if rope.get("rope_type", rope.get("type", "default")) != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"RoPE {rope}: the plain one is known")
    windows = config.get("sliding_window") is not None and (kind == "mistral" or config.get("use_sliding_window"))
    if windows or set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError("sliding windows (sliding_window, layer_types): attention over all tokens is known")
    for name, right in (("hidden_act", ("silu",)), ("partial_rotary_factor", (1, 1.0)), ("quantization_config", ()), ("attn_logit_softcapping", ())):
        x = config.get(name)
        if x is not None and x not in right:
            raise ValueError(f"{name} is {x}, which this decoder does not have")


def _rms(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * w


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)))


class Model:
    """`layers`, `q_heads`, `kv_heads`, `head_dim` and `windows` (of each layer, 0: it sees all tokens; None: all do) are the geometry
    that kvd wants, `limit` the longest context that the model was made for, if its file says. `encode` and `decode` are the tokenizer's,
    `stop` the ids that end an answer, `marks` those of its chats."""

    def __init__(self, path: str):
        p = pathlib.Path(path)
        self.top: dict[str, np.ndarray] = {}
        self.blocks: list[dict[str, np.ndarray]] = []
        self.windows: Optional[list[int]] = None
        self.marks, self._act, self._embed_scale, self._local_theta = CHATML, _silu, np.float32(1), 0.0
        self._unknown: list[str] = []
        if not p.exists():
            raise FileNotFoundError(f"{p}: there is no such file or folder")
        if p.is_dir():
            self._load_folder(p)
        elif p.suffix == ".gguf":
            self._load_gguf(p)
        else:
            raise ValueError(f"{path}: a .gguf file, or a folder with config.json and safetensors, is wanted")
        if self._unknown:
            raise ValueError(f"{path}: weights that this decoder does not have: {', '.join(sorted(self._unknown)[:5])}")
        for name in ("embed", "norm"):
            if name not in self.top:
                raise ValueError(f"{path}: no {name} weights; is it a Llama- or Qwen-style model?")
        for i, layer in enumerate(self.blocks):
            missing = {"ln1", "q", "k", "v", "o", "ln2", "gate", "up", "down"} - {n.split(".")[0] for n in layer}
            if missing:
                raise ValueError(f"{path}: layer {i} lacks {', '.join(sorted(missing))}")
        self.top.setdefault("head", self.top["embed"])
        self.layers = len(self.blocks)

    def _take(self, name: str, w: np.ndarray, prefix: str, layer_names: dict[str, str]) -> None:
        if name in _TOP:
            self.top[_TOP[name]] = w
            return
        number, _, rest = name[len(prefix):].partition(".")
        what, _, kind = rest.rpartition(".")
        if name.startswith(prefix) and number.isdigit() and what in layer_names:
            while len(self.blocks) <= int(number):
                self.blocks.append({})
            key = layer_names[what]
            self.blocks[int(number)][key if kind == "weight" else key + ".bias"] = w
        elif not name.endswith(_NO_WEIGHTS):
            self._unknown.append(name)

    def _load_gguf(self, path: pathlib.Path) -> None:
        import gguf

        reader = gguf.GGUFReader(str(path))
        meta = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
        arch = meta["general.architecture"]
        check_gguf(meta)
        for t in reader.tensors:
            self._take(t.name, gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32), "blk.", _GGUF_LAYER)
        self.name = meta.get("general.name", path.stem)
        self.limit: Optional[int] = meta.get(f"{arch}.context_length")
        self.q_heads = meta[f"{arch}.attention.head_count"]
        self.kv_heads = meta.get(f"{arch}.attention.head_count_kv", self.q_heads)
        self.head_dim = meta.get(f"{arch}.attention.key_length", meta[f"{arch}.embedding_length"] // self.q_heads)
        self.eps = meta[f"{arch}.attention.layer_norm_rms_epsilon"]
        self.theta = meta.get(f"{arch}.rope.freq_base", 10000.0)
        if arch == "llama":
            self._unpermute()
        if arch == "gemma3":
            self.marks, self._act, self._local_theta = GEMMA, _gelu, _GEMMA_LOCAL_THETA
            self._embed_scale = np.float32(np.sqrt(meta["gemma3.embedding_length"]))
            window = meta["gemma3.attention.sliding_window"]
            self.windows = [0 if (i + 1) % _GEMMA_PATTERN == 0 else window for i in range(len(self.blocks))]
        self.tokenizer = _gguf_tokenizer(meta)
        eos = meta.get("tokenizer.ggml.eos_token_id")
        self.stop = {i for i in (eos, self.tokenizer.token_to_id(self.marks.end), self.tokenizer.token_to_id("<|endoftext|>"))
                     if i is not None}

    def _unpermute(self) -> None:
        """GGUF has the rows of a llama's q and k in neighbouring pairs, all others in halves. Here they come in halves too: keys
        have one order of channels whatever read the weights, and a rotation set that was fitted to them fits everywhere."""
        for b in self.blocks:
            for name, heads in (("q", self.q_heads), ("k", self.kv_heads)):
                for key in (name, name + ".bias"):
                    if key in b:
                        w = b[key]
                        b[key] = np.ascontiguousarray(w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2)).reshape(w.shape)

    def _load_folder(self, folder: pathlib.Path) -> None:
        from safetensors import safe_open
        from tokenizers import Tokenizer

        config = json.loads((folder / "config.json").read_text())
        check_config(config)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder}: no *.safetensors")
        for file in files:
            with safe_open(str(file), framework="numpy") as f:
                for name in f.keys():
                    self._take(name, f.get_tensor(name).astype(np.float32), "model.layers.", _HF_LAYER)
        self.name = config.get("_name_or_path") or folder.name
        self.limit = config.get("max_position_embeddings")
        self.q_heads, self.kv_heads = config["num_attention_heads"], config.get("num_key_value_heads",
                                                                               config["num_attention_heads"])
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.q_heads
        self.eps, self.theta = config["rms_norm_eps"], (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        eos = config.get("eos_token_id")
        self.stop = set(eos if isinstance(eos, list) else [eos]) - {None}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def _rope(self, layer: int, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        d = x.shape[-1]
        theta = self._local_theta if self._local_theta and self.windows and self.windows[layer] else self.theta
        angle = positions[:, None] * theta ** (-np.arange(0, d, 2) / d)[None, :]
        cos, sin = np.cos(angle)[:, None, :].astype(np.float32), np.sin(angle)[:, None, :].astype(np.float32)
        a, b = x[..., : d // 2], x[..., d // 2:]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def _project(self, block: dict[str, np.ndarray], name: str, h: np.ndarray, heads: int) -> np.ndarray:
        y = h @ block[name].T
        if name + ".bias" in block:
            y = y + block[name + ".bias"]
        y = y.reshape(len(h), heads, -1)
        return _rms(y, block[name + "_norm"], self.eps) if name + "_norm" in block else y

    def forward(self, ids: Sequence[Sequence[int]], cache: Cache, *, every: bool = False) -> np.ndarray:
        """Runs the new tokens ids[i] of each sequence (none for some is fine). Returns logits: of the last new token of each
        sequence that has one, or with `every` of all tokens, [rows, vocabulary]."""
        counts = [len(s) for s in ids]
        flat = np.concatenate([np.asarray(s, np.int64) for s in ids])
        positions = np.concatenate([np.arange(c) + n for c, n in zip(counts, cache.lengths)]).astype(np.float64)
        x = self.top["embed"][flat] * self._embed_scale
        for i, b in enumerate(self.blocks):
            h = _rms(x, b["ln1"], self.eps)
            q = self._rope(i, self._project(b, "q", h, self.q_heads), positions)
            k = self._rope(i, self._project(b, "k", h, self.kv_heads), positions)
            v = self._project(b, "v", h, self.kv_heads)
            y = cache.attend(i, q, k, v, counts).reshape(len(flat), -1) @ b["o"].T
            x = x + (_rms(y, b["ln1_post"], self.eps) if "ln1_post" in b else y)
            h = _rms(x, b["ln2"], self.eps)
            y = (self._act(h @ b["gate"].T) * (h @ b["up"].T)) @ b["down"].T
            x = x + (_rms(y, b["ln2_post"], self.eps) if "ln2_post" in b else y)
        if not every:
            x = x[[e - 1 for c, e in zip(counts, np.cumsum(counts)) if c]]
        return _rms(x, self.top["norm"], self.eps) @ self.top["head"].T


def _gguf_tokenizer(meta: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind, tokens = meta.get("tokenizer.ggml.model"), meta["tokenizer.ggml.tokens"]
    if kind == "gpt2":
        merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
        tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tok.decoder = decoders.ByteLevel()
    elif kind == "llama" and meta["general.architecture"] == "gemma3" and not meta.get("tokenizer.ggml.add_space_prefix", True):
        vocab = {t: i for i, t in enumerate(tokens)}
        tok = Tokenizer(models.BPE(vocab=vocab, merges=_merges(vocab, meta["tokenizer.ggml.scores"]), byte_fallback=True, fuse_unk=True,
                                   unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]]))
        tok.normalizer = normalizers.Replace(" ", "\u2581")
        tok.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        raise ValueError("this GGUF file's tokenizer is not byte-level BPE, and not Gemma 3's; use a folder with tokenizer.json")
    types = meta["tokenizer.ggml.token_type"]
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, types) if kind == 3])
    tok.add_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, types) if kind == 4])
    return tok


def _merges(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose token has the highest score; as a list of pairs, the first first; of those of one
    token the one with the longer beginning."""
    pairs = []
    for token, i in vocab.items():
        for at in range(1, len(token)):
            if token[:at] in vocab and token[at:] in vocab:
                pairs.append((-scores[i], -at, token[:at], token[at:]))
    return [(a, b) for _, _, a, b in sorted(pairs)]
