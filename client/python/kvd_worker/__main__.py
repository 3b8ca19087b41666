"""Runs a language model with its KV cache in kvd: a chat in the terminal, or one prompt."""
from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import Iterator, Optional

import kvd

from . import Conversation, KvdCache, Model, Sampler, generate


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.1f} {unit}" if unit != "B" else f"{n:.0f} B"
        n /= 1024
    return ""


def _report(model: Model, sequence: kvd.Sequence, client: kvd.Client, tokens: int, seconds: float) -> None:
    s = sequence.describe()
    planes = "; ".join(f"{p.sink} sink, {p.history} compressed, {p.recent} recent" + (f", {p.freed} out of sight" if p.freed else "") for p in s.planes)
    bf16 = s.length * model.layers * model.kv_heads * model.head_dim * 2 * 2
    print(f"[{tokens / max(seconds, 1e-9):.1f} tokens/s; sequence {s.id} on {client.info['backend']}: {s.length} tokens "
          f"({planes}), {_size(s.bytes)} of pages, "
          f"{_size(bf16)} as bf16]", file=sys.stderr)


def _turns(prompt: Optional[str]) -> Iterator[str]:
    """One prompt, or what is typed: with a prompt in front, and editing, where a person sits."""
    if prompt is not None:
        yield prompt
    elif sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401: input() edits and remembers lines by it
        print("A line a turn; end with Ctrl-D.", file=sys.stderr)
        with contextlib.suppress(EOFError):
            while True:
                line = input("you> ")
                if line.strip():
                    yield line
        print(file=sys.stderr)
    else:
        for line in sys.stdin:
            yield line.rstrip("\n")


def _positive(text: str) -> int:
    n = int(text)
    if n < 1:
        raise argparse.ArgumentTypeError(f"{n} is not positive")
    return n


def _arguments() -> argparse.Namespace:
    ap = argparse.ArgumentParser(prog="kvd-worker", description=__doc__)
    ap.add_argument("model", help="a GGUF file, or a folder with config.json, tokenizer.json and safetensors")
    ap.add_argument("prompt", nargs="?", help="one prompt; without it, a chat: a line a turn, until end of file")
    ap.add_argument("--address", help="of kvd (default: $KVD_ADDRESS, or the one that listens under /run/kvd)")
    ap.add_argument("--codec", default="int2", help="bf16, int2 (default), int2c, int2-lm, turboquant-2, -3, -4, int4, tc2, tc2.5; k=NAME,v=NAME")
    ap.add_argument("--rotation-set", help="MODEL@TAG of the store, hadamard, random or identity (default: what suits the codec)")
    ap.add_argument("--tokens", type=_positive, default=200, help="of an answer, at most (default: 200)")
    ap.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest token; else a random one, more so the higher")
    ap.add_argument("--top-p", type=float, default=1.0, help="random ones only of the likeliest that have this much of the probability "
                    "together (default: 1, all)")
    ap.add_argument("--seed", type=int, help="the same seed makes the same choices (default: others each time)")
    ap.add_argument("--publish", metavar="NAME", help="name the sequence in kvd at the end, for another worker")
    ap.add_argument("--attach", metavar="NAME", help="go on with a sequence that a worker published")
    args = ap.parse_intermixed_args()  # options before, between and after the others
    try:
        args.choose = Sampler(args.temperature, args.top_p, args.seed)
    except ValueError as e:
        ap.error(str(e))
    return args


def main() -> int:
    args = _arguments()
    model = Model(args.model)
    print(f"{model.name}: {model.layers} layers, {model.q_heads} q heads, {model.kv_heads} kv heads, head_dim "
          f"{model.head_dim}", file=sys.stderr)
    with kvd.Client(layers=range(model.layers), q_heads=model.q_heads, kv_heads=model.kv_heads, head_dim=model.head_dim, windows=model.windows,
                    codec=args.codec, rotation_set=args.rotation_set, address=args.address, name="kvd-worker") as client:
        sequence = client.attach(args.attach) if args.attach else client.create()
        cache, chat = KvdCache(client, [sequence]), Conversation(model)
        if args.attach:
            chat.resume()
            print(f"attached {args.attach}: {sequence.length} tokens are there already", file=sys.stderr)
        for line in _turns(args.prompt):
            ids: list[int] = []
            shown = ""

            def show(_: int, token: int) -> None:
                nonlocal shown
                ids.append(token)
                text = model.decode([i for i in ids if i not in model.stop])
                if not text.endswith("\ufffd"):  # a character that is not whole yet
                    print(text[len(shown):], end="", flush=True)
                    shown = text

            began = time.monotonic()
            answer = generate(model, cache, [chat.turn(line)], args.tokens, on_token=show, choose=args.choose)[0]
            chat.answered(answer)
            print()
            _report(model, sequence, client, len(answer), time.monotonic() - began)
        if args.publish:
            model.forward([chat.rest()], cache)
            sequence.publish(args.publish, replace=True)
            print(f"published {args.publish}: attach it with --attach {args.publish}", file=sys.stderr)
    return 0


def run() -> None:
    try:
        sys.exit(main())
    except ModuleNotFoundError as e:
        sys.exit(f"kvd-worker: {e}: it wants gguf and tokenizers, and safetensors for a folder: pip install gguf tokenizers safetensors "
                 "(where pip refuses, in a venv that is made with --system-site-packages)")
    except (kvd.Error, ValueError, OSError, ImportError) as e:
        sys.exit(f"kvd-worker: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
