"""Records queries, keys and values of a model on texts, for `kvctl calib fit` and `calib eval`.

    python3 -m kvd.record MODEL --text book.txt --out recorded/
    python3 -m kvd.record MODEL --text book.txt --out asked/ --asked 10     # prompts that end by asking, for calib fit --sensitive

MODEL is a folder or name that transformers loads, or a GGUF file; its attention must be what kvd serves. The model runs over each
text, a context at a time, and what its attention gets (after RoPE) goes into OUT, a safetensors file for each context, layer by
layer as it is computed. With --asked, what the answers' loss (its gradient) asks of every layer goes with it.

Contexts begin at positions spread evenly over --reach, all that the model was made for if it is not given: RoPE turns keys by their
positions, and a set that was fitted to keys of the first 2,048 keeps nothing of those far behind them.
"""
from __future__ import annotations

import argparse
import itertools
import json
import math
import pathlib
import random
import re
import struct
import sys
from typing import Any, BinaryIO, Iterator, Optional

try:
    import torch
    import transformers
    from tqdm import tqdm
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    from . import _transformers as checks
except ImportError as e:  # said when the command runs
    MISSING: Optional[ImportError] = e
else:
    MISSING = None

_NAME, _SIDES, _GRADIENTS = "kvd_record", "qkv", "g"


class Shard:
    """One safetensors file, `layers.<id>.<q, k or v>` of [tokens, heads, head_dim] in bf16, written as layers come, and `graded`
    `layers.<id>.g` of q's heads and v's head_dim: how a loss grows with what attention puts out. It has its name when it is whole."""

    def __init__(self, path: pathlib.Path, shape: "checks.Geometry", layers: list[int], tokens: int, metadata: dict[str, str],
                 graded: bool = False):
        self.path, self._part, self._at = path, path.with_suffix(".part"), {}
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for layer in layers:
            for side, heads, dim in zip(_SIDES + _GRADIENTS * graded, (shape.q_heads, shape.kv_heads, shape.kv_heads, shape.q_heads),
                                        (shape.head_dim[0], shape.head_dim[0], shape.head_dim[1], shape.head_dim[1])):
                size = tokens * heads * dim * 2
                name = f"layers.{layer}.{side}"
                header[name] = {"dtype": "BF16", "shape": [tokens, heads, dim], "data_offsets": [end, end + size]}
                self._at[name], end = (end, size), end + size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file: BinaryIO = open(self._part, "wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._begin, self._left, self.graded = 8 + len(text), set(self._at), graded

    def add(self, layer: int, side: str, x: "torch.Tensor") -> None:
        """x: [1, heads, tokens, head_dim]."""
        name = f"layers.{layer}.{side}"
        if name not in self._left:
            raise ValueError(f"layer {layer} attended twice" if name in self._at else f"there is no layer {layer}")
        at, size = self._at[name]
        x = x[0].transpose(0, 1).to(torch.bfloat16).contiguous()
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"layer {layer}: {side} holds NaN or Inf in bf16")
        raw = x.view(torch.int16).cpu().numpy().tobytes()
        if len(raw) != size:
            raise ValueError(f"layer {layer}: {side} has {len(raw)} bytes, and its config says {size}")
        self._file.seek(self._begin + at)
        self._file.write(raw)
        self._left.discard(name)

    def end(self) -> None:
        if self._left:
            raise ValueError(f"{', '.join(sorted(self._left)[:3])} did not come: the model skipped layers")
        self._file.close()
        self._part.rename(self.path)

    def drop(self) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)


class Recorder:
    """Makes a model's attention write what it gets into `shard`, and attend as ever."""

    def __init__(self, model: Any, layers: Optional[list[int]] = None):
        self.shape = checks.check_model(model, with_sinks=False, with_latents=False)
        self.layers = list(range(self.shape.layers)) if layers is None else layers
        wrong = [i for i in self.layers if not 0 <= i < self.shape.layers]
        if wrong or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers {self.layers}: the model has 0 to {self.shape.layers - 1}, each once")
        self.shard: Optional[Shard] = None
        stock = transformers.AttentionInterface()["sdpa"]

        def stock_attention(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
            if kwargs.get("softcap") is not None:  # which sdpa does not know
                eager = sys.modules[type(module).__module__].eager_attention_forward
                floats = None if mask is None else torch.where(mask, 0.0, torch.finfo(q.dtype).min) if mask.dtype == torch.bool else mask
                return eager(module, q, k, v, floats, **kwargs)
            return stock(module, q, k, v, mask, **kwargs)

        def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
            shard, layer = self.shard, module.layer_idx
            if not shard or layer not in self.layers:
                return stock_attention(module, q, k, v, mask, **kwargs)
            for side, x in zip(_SIDES, (q, k, v)):
                shard.add(layer, side, x.detach())
            out, *more = stock_attention(module, q, k, v, mask, **kwargs)
            if shard.graded:
                if not out.requires_grad:  # the first: no weight does
                    out = out.detach().requires_grad_()
                out.register_hook(lambda grad: shard.add(layer, _GRADIENTS, grad.transpose(1, 2)))
            return out, *more

        transformers.AttentionInterface.register(_NAME, attention)
        # Where sdpa would get no mask, eager attention still wants one.
        mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        transformers.AttentionMaskInterface.register(_NAME, lambda *a, **kw: mask(*a, **{**kw, "allow_is_causal_skip": False}))
        model.set_attn_implementation(_NAME)
        self.model = model.requires_grad_(False)

    def context(self, ids: "torch.Tensor", shard: Shard, first: int = 0, answer: Optional[list[int]] = None) -> float:
        """Runs the model over ids, as of positions `first` and on, and fills the shard; one with gradients gets those of the loss of
        `answer`, the tokens that the last positions are to predict. Returns the mean next-token loss, which tells whether the pass is right."""
        self.shard = shard
        try:
            positions = torch.arange(first, first + len(ids), device=ids.device)[None]
            with torch.set_grad_enabled(shard.graded):
                logits = self.model(input_ids=ids[None], position_ids=positions, use_cache=False).logits[0]
                if answer:
                    torch.nn.functional.cross_entropy(logits[-len(answer):].float(), torch.tensor(answer, device=ids.device), reduction="sum").backward()
            logits = logits.detach()
            shard.end()
        except BaseException:
            shard.drop()
            raise
        finally:
            self.shard = None
        total = sum(float(torch.nn.functional.cross_entropy(logits[i:i + 256][:len(ids) - 1 - i].float(), ids[i + 1:i + 257], reduction="sum"))
                    for i in range(0, len(ids) - 1, 256))
        return total / (len(ids) - 1)


def _first(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text. Models that were trained with a first token want it in every context: without it
    Gemma's activations are not those that it has when it serves."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for at in range(len(whole) - len(bare) + 1):
        if whole[at:at + len(bare)] == bare:
            return whole[:at]
    raise ValueError(f"the tokenizer makes {whole} of the tokens {bare}: what a context begins with is not told by that")


def contexts(tokenizer: Any, texts: list[str], length: int, limit: Optional[int]) -> Iterator[tuple[str, list[int]]]:
    """Pieces of `length` tokens, of each text in turn so that a limit leaves out none, each with what the tokenizer begins texts
    with; what is left at a text's end is left out."""
    first, of = _first(tokenizer), []
    own = length - len(first)
    if own < 1:
        raise ValueError(f"a context of {length} tokens has no room beside {first}, which every text begins with")
    for text in texts:
        with open(text, encoding="utf-8", errors="strict") as f:
            ids = tokenizer(f.read(), add_special_tokens=False, verbose=False)["input_ids"]
        of.append([(text, first + ids[at:at + own]) for at in range(0, len(ids) - own + 1, own)])
    in_turn = (piece for turn in itertools.zip_longest(*of) for piece in turn if piece)
    return itertools.islice(in_turn, None if limit is None else limit // length)


_BEFORE, _AFTER = 100, 400  # tokens of a prompt that a fact lies behind, and before: past every sink, before every recent window


# How facts are told, and asked for: in other words each time, so that what layers are ranked by is not one phrase. A fact follows its
# name, and a quotation mark, which no tokenizer joins to it.
_PHRASES = (
    ('\n\nThe {name} is "{fact}".\n\n', '\n\nThe {name} is "', ("code of the safe", "slogan of the party")),
    ('\n\n(The {name}, as agreed, reads "{fact}".)\n\n', '\n\nAs agreed, the {name} reads "', ("ticket number", "motto of the club")),
    ('\n\nI have a {name}, and it is "{fact}". Do not tell anybody.\n\n', '\n\nWhat {name} did I tell you? It is "', ("phone number", "password")),
)


def asked(tokenizer: Any, texts: list[str], length: int, count: int) -> Iterator[tuple[str, list[int], list[int]]]:
    """Prompts of `length` tokens, in each a fact amid a piece of a text, seven digits and four words in turn, and a question for it at the
    end with its answer, but for the last token: what the last queries look for is the fact. With each comes the answer, which the last
    positions are to predict. They are the same every time."""
    first, pieces = _first(tokenizer), []
    for text in texts:
        with open(text, encoding="utf-8", errors="strict") as f:
            said = f.read()
        pieces.append((text, tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"], sorted(set(re.findall(r"\b[a-z]{4,8}\b", said)))))

    def ids_of(words: str) -> list[int]:
        ids: list[int] = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    for i in range(count):
        again, piece = divmod(i // 2, len(pieces))
        text, ids, words = pieces[piece]
        rng, (tell, ask, names) = random.Random(i), _PHRASES[(again + piece) % len(_PHRASES)]  # each text with all of them
        if i % 2 and len(words) < 16:
            raise ValueError(f"{text} has {len(words)} different words of 4 to 8 small letters, and phrases are made of at least 16")
        fact = " ".join(rng.choice(words) for _ in range(4)) if i % 2 else f"{rng.randrange(10 ** 7):07}"
        told, answer = ids_of(tell.format(name=names[i % 2], fact=fact)), ids_of(fact)
        end = ids_of(ask.format(name=names[i % 2])) + answer[:-1]
        room = length - len(first) - len(told) - len(end)
        if room < _BEFORE + _AFTER or room > len(ids):
            raise ValueError(f"{text}: a prompt of {length} tokens wants {room} of its {len(ids)}, and at least {_BEFORE + _AFTER}: give longer texts, "
                             "or another --context")
        at, where = rng.randrange(len(ids) - room + 1), rng.randrange(_BEFORE, room - _AFTER + 1)
        yield text, [*first, *ids[at:at + where], *told, *ids[at + where:at + room], *end], answer


def starts(contexts: int, length: int, reach: int) -> list[int]:
    """Where contexts begin whose positions are to lie evenly below `reach`: the first at 0, and so that they end there."""
    last = max(0, reach - length)
    return [i * last // max(1, contexts - 1) for i in range(contexts)]


def _load(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    path, gguf = pathlib.Path(name), {}
    if path.suffix == ".gguf" and path.is_file():
        name, gguf = str(path.parent), {"gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **gguf)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype={"bf16": torch.bfloat16, "f32": torch.float32}[dtype], **gguf)
    return tokenizer, model.to(device).eval()


def _arguments(args: Optional[list[str]]) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return int(text)

    ap = argparse.ArgumentParser(prog="python3 -m kvd.record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", help="a folder or name that transformers loads, or a GGUF file")
    ap.add_argument("--text", nargs="+", required=True, metavar="FILE", help="texts in UTF-8, like those that the model will serve")
    ap.add_argument("--out", required=True, metavar="FOLDER", help="where the files go; it must not hold recordings")
    ap.add_argument("--context", type=positive, default=2048, help="tokens that the model sees at once (default: 2048)")
    ap.add_argument("--reach", type=positive, metavar="TOKENS",
                    help="contexts begin at positions spread below this (default: as many as the model was made for; --asked: --context)")
    ap.add_argument("--tokens", type=positive, help="record at most so many, of the texts in turn (default: all that fill contexts)")
    ap.add_argument("--asked", type=positive, metavar="N",
                    help="record N prompts in which a fact is told amid the texts and asked for at the end")
    ap.add_argument("--layers", default="all", help="such as 0,9,19 (default: all)")
    ap.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: auto, a GPU if there is one)")
    ap.add_argument("--dtype", default="auto", choices=["auto", "bf16", "f32"], help="of the model (default: bf16 on a GPU, else f32)")
    parsed = ap.parse_intermixed_args(args)
    try:
        parsed.layers = None if parsed.layers == "all" else [int(i) for i in parsed.layers.split(",")]
    except ValueError:
        ap.error(f"--layers {parsed.layers}: numbers with commas between are wanted, or all")
    return parsed


def main(arguments: Optional[list[str]] = None) -> int:
    args = _arguments(arguments)
    if MISSING:
        print(f"kvd.record wants PyTorch and transformers ({MISSING}): pip install 'client/python[transformers]'", file=sys.stderr)
        return 1
    try:
        return _record(args)
    except (ValueError, OSError) as e:
        print(f"kvd.record: {e}", file=sys.stderr)
        return 1


def _record(args: argparse.Namespace) -> int:
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if next(out.glob("*.safetensors"), None):
        raise ValueError(f"{out} holds recordings already, and calib fit would take them together: name another folder, or empty it")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = args.dtype if args.dtype != "auto" else "f32" if torch.device(device).type == "cpu" else "bf16"
    tokenizer, model = _load(args.model, device, dtype)
    recorder = Recorder(model, args.layers)
    if args.asked and args.tokens:
        raise ValueError("--tokens is of texts; --asked says how many prompts there are")
    pieces = list(asked(tokenizer, args.text, args.context, args.asked) if args.asked else
                  ((text, ids, None) for text, ids in contexts(tokenizer, args.text, args.context, args.tokens)))
    if not pieces:
        raise ValueError(f"no text fills a context of {args.context} tokens: give longer ones, or a smaller --context and --tokens")
    name, losses = pathlib.Path(args.model).stem or args.model, []
    limit = max(args.context, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0)
    reach = args.reach or (args.context if args.asked else limit)
    if not args.context <= reach <= limit:
        raise ValueError(f"--reach {reach}: a context has {args.context} tokens, and the model was made for {limit}")
    begins = starts(len(pieces), args.context, reach)
    metadata = {"model": name, "rope": "applied"}
    if any(recorder.shape.windows):  # of each recorded layer: what calib eval lets its queries see
        metadata["windows"] = ",".join(str(recorder.shape.windows[i]) for i in sorted(recorder.layers))
    with tqdm(total=len(pieces) * args.context, unit=" tokens", desc="recording") as bar:
        for i, (text, ids, answer) in enumerate(pieces):
            shard = Shard(out / f"{i:05}.safetensors", recorder.shape, recorder.layers, len(ids),
                          {**metadata, "text": pathlib.Path(text).name, **({"first": str(begins[i])} if begins[i] else {})}, bool(answer))
            losses.append(recorder.context(torch.tensor(ids, device=device), shard, begins[i], answer))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update(len(ids))
    loss = sum(losses) / len(losses)
    print(f"{out}: {len(pieces)} contexts of {args.context} tokens, {len(recorder.layers)} layers; next-token loss {loss:.3f} "
          f"(perplexity {math.exp(min(loss, 99)):.2f}). Next: kvctl calib fit "
          + (f"RECORDED SET --codec tc2 --sensitive 2=int4 --asked {out}" if args.asked else f"{out} set.safetensors"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
