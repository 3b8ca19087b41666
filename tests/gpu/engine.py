#!/usr/bin/env python3
"""vLLM beside kvd on this machine's GPU, with random weights of Qwen3-8B's shape: what a prefix costs that is loaded, against computing it
and against copying as many bytes; the time to the first token; whether the tokens are the same; and what kvd costs where nothing is found.

It prints tables and judges nothing. usage: engine.py KVD_FOLDER [OPTION...]; tests/gpu/engine.sh calls it with a bundle's.

All of it takes minutes; --parts and --phases choose. With --tensor-parallel 2 engines have two ranks, each on a GPU of its own and beside a
kvd of its own there. With --mps all that runs is a client of one MPS server, so that kernels of several processes run at once instead
of in turns.
"""
import argparse
import contextlib
import json
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
from engine_vllm import keep_stats  # noqa: E402

CHUNK = 8192  # tokens that an engine computes at once: lengths are multiples of it or smaller, and TAIL more
TAIL = 12  # what is computed behind a hit, by one that computed all too: the same numbers where the chunks before are whole
PAGE = 64
SHAPE = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
         "rope_theta": 1000000, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
         "bos_token_id": 151643, "eos_token_id": 151645}


# -- an engine, in a process of its own: a line of JSON in, a line of JSON out ------------------------------------------------------

def lively(model):
    """vLLM's own random weights are so small that no token depends on those before it."""
    import torch

    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0  # each has other parts of the weights
    g = torch.Generator(device=next(model.parameters()).device).manual_seed(1 + rank)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.fill_(1) if p.dim() == 1 else p.normal_(0, p.shape[-1] ** -0.5, generator=g)


def serve(options):
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints goes where its log goes
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # is compiled at run time, and greedy sampling has no use for it
    os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")  # wants NVLink multicast, which is not to be had everywhere
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # so does this
    began = time.monotonic()
    import prometheus_client
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    extra = options.pop("kvd")
    transfer = extra and KVTransferConfig(kv_connector="KvdConnector", kv_connector_module_path="kvd.vllm.connector", kv_role="kv_both",
                                          kv_load_failure_policy="recompute", kv_connector_extra_config=extra) or None
    llm = LLM(skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16", block_size=PAGE, max_num_batched_tokens=CHUNK, max_num_seqs=64,
              disable_log_stats=False, kv_transfer_config=transfer, **options)
    llm.apply_model(lively)
    keep_stats(llm)

    def generate(prompts, tokens, store=True):
        more = {} if store else {"extra_args": {"kv_transfer_params": {"max_offload_tokens": 0}}}
        began = time.monotonic()
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts],
                               SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, **more), use_tqdm=False)
        seconds = time.monotonic() - began
        return {"seconds": seconds, "tokens": [list(o.outputs[0].token_ids) for o in outputs], "cached": [o.num_cached_tokens for o in outputs]}

    def metrics():
        sums = {}  # get_metrics would have whole seconds
        for s in (s for m in prometheus_client.REGISTRY.collect() for s in m.samples):
            if not s.name.endswith("_created"):
                name = s.name.removesuffix("_total")
                sums[name] = sums.get(name, 0) + s.value
        return sums

    calls = {"generate": generate, "forget": llm.reset_prefix_cache, "metrics": metrics}
    print(json.dumps(time.monotonic() - began), file=out)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(calls[name](**arguments)), file=out)


class Engine:
    def __init__(self, name, folder, options):
        self.log = folder / f"{name}.log"
        with open(self.log, "w") as f:
            self.process = subprocess.Popen([sys.executable, __file__, "--engine", json.dumps(options)], text=True, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=f)

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(self.log.read_text()[-6000:] + "\nan engine has ended")
        return json.loads(line)

    def call(self, name, **arguments):
        print(json.dumps([name, arguments]), file=self.process.stdin, flush=True)
        return self.answer()

    def ask(self, prompt, tokens=1):
        r = self.call("generate", prompts=[prompt], tokens=tokens)
        return r["seconds"], r["cached"][0], r["tokens"][0]

    def settle(self):
        """Until nothing is under way. An engine that is driven by calls moves in calls alone."""
        last, still = None, 0
        while still < 5:
            self.ask([1, 2, 3])
            m = self.call("metrics")
            now = [m.get(f"vllm:{x}", 0) for x in ("kvd_stored_pages", "kv_offload_store_bytes", "kv_offload_load_bytes")]
            still = still + 1 if now == last else 0
            last = now
            time.sleep(0.02)
        return m

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# -- what is measured ---------------------------------------------------------------------------------------------------------------

class Bench:
    def __init__(self, a, folder):
        self.a, self.folder, self.random = a, folder, random.Random(5)
        self.page_bytes = PAGE * a.layers * SHAPE["num_key_value_heads"] * SHAPE["head_dim"] * 4
        self.ranks = a.tensor_parallel
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": a.layers}))
        self.found = {}

    def prompt(self, n):
        return [self.random.randrange(1000, 150000) for _ in range(n)]

    def engine(self, name, kvd):
        a = self.a
        graphs = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}}
        return Engine(name, self.folder, {
            "model": str(self.model), "max_model_len": max(a.lengths) + 128, "kv_cache_memory_bytes": a.kv_gib << 30,
            "gpu_memory_utilization": a.utilization, "kvd": kvd, **({"enforce_eager": True} if a.eager else graphs),
            **({"tensor_parallel_size": self.ranks, "disable_custom_all_reduce": True} if self.ranks > 1 else {})})

    @contextlib.contextmanager
    def daemons(self):
        """One for each rank, on its GPU. They end with the block, and say what they have warned of."""
        addresses = [f"unix:{self.folder / f's{i}'}" for i in range(self.ranks)]
        self.where = {"addresses": addresses} if self.ranks > 1 else {"address": addresses[0]}
        logs, running = [self.folder / f"kvd-{i}.log" for i in range(self.ranks)], []
        try:
            for i, log in enumerate(logs):
                with open(log, "w") as f:
                    running.append(subprocess.Popen([str(pathlib.Path(self.a.kvd) / "bin/kvd"), "--backend", "cuda", "--device", str(i),
                                                     "--pool-size", self.a.pool, "--listen", addresses[i], "--metrics", ""], stdout=f, stderr=f))
            end = time.monotonic() + 60
            while not all("ready" in log.read_text() for log in logs):
                if any(p.poll() is not None for p in running) or time.monotonic() > end:
                    raise SystemExit("\n".join(log.read_text() for log in logs))
                time.sleep(0.1)
            yield
        finally:
            for p in running:
                p.terminate()
            for p, log in zip(running, logs):
                p.wait(30)
                for line in [x for x in log.read_text().splitlines() if " warning " in x or " error " in x][-10:]:
                    self.say(f"{log.name}: {line}")

    def say(self, text=""):
        print(f"[{time.monotonic() - BEGAN:6.1f}] {text}" if text else "", flush=True)

    def row(self, *cells):
        print("| " + " | ".join(str(c) for c in cells) + " |", flush=True)

    def prefixes(self, codec, first, second):
        """`first` computes and stores, `second` (which may be the same) loads."""
        for e in {first, second}:
            e.ask(self.prompt(max(self.a.lengths) + TAIL))  # warm: whole chunks, then what is left of one
            alone = statistics.median(e.ask(self.prompt(TAIL))[0] for _ in range(5))
        self.say(f"codec {codec}: {'two processes' if first is not second else 'one process, whose own cache forgets'}; a prompt of {TAIL} tokens "
                 f"alone takes {1e3 * alone:.1f} ms to its first token")
        self.row("tokens", "hit", "first token, computed (ms)", "first token, loaded (ms)", "load (ms)", "load (GB/s of bf16)", "16 tokens the same")
        for n in self.a.lengths:
            computed, loaded, loads, rates, same, hit = [], [], [], [], 0, 0
            for _ in range(self.a.repeat):
                prompt = self.prompt(n + TAIL)
                seconds, cached, _ = first.ask(prompt)
                computed.append(seconds)
                first.settle()
                first.call("forget")
                m = second.settle()
                seconds, cached, _ = second.ask(prompt)
                after = second.settle()
                second.call("forget")
                loaded.append(seconds)
                hit = max(hit, cached)
                moved, took = (after.get(f"vllm:kv_offload_load_{x}", 0) - m.get(f"vllm:kv_offload_load_{x}", 0) for x in ("bytes", "time"))
                took /= self.ranks  # they load at the same time, and the numbers are the sums of both
                if took:
                    loads.append(took)
                    rates.append(moved / took / 1e9)
            reference, answer = self.texts(first, second, n)
            same = sum(x == y for x, y in zip(reference, answer))
            ms = [1e3 * statistics.median(x) if x else float("nan") for x in (computed, loaded, loads)]
            rate = statistics.median(rates) if rates else float("nan")
            self.found[f"{codec} {n}"] = {"computed": computed, "loaded": loaded, "loads": loads, "rates": rates, "same": same, "hit": hit}
            self.row(n + TAIL, hit, *(f"{x:.1f}" for x in ms), f"{rate:.1f}", f"{same} of 16")

    def texts(self, first, second, n):
        """16 tokens after a prompt, of one that has computed it and of one that loaded it. Both compute the last tokens by themselves."""
        prompt = self.prompt(n + TAIL)
        first.ask(prompt[:n])
        _, _, reference = first.ask(prompt, 16)
        first.settle()
        first.call("forget")
        _, _, answer = second.ask(prompt, 16)
        second.call("forget")
        return reference, answer

    def sensitive(self, engine):
        """Whether tokens depend on the prefix at all."""
        n = min(self.a.lengths)
        prompt = self.prompt(n + TAIL)
        other = self.prompt(n // 2) + prompt[n // 2:]
        _, _, x = engine.ask(prompt, 16)
        _, _, y = engine.ask(other, 16)
        return sum(a == b for a, b in zip(x, y))

    def requests(self, engine, store=True):
        """Tokens per second of requests of which nothing is found."""
        prompts = [self.prompt(self.a.batch_tokens) for _ in range(self.a.batch)]
        r = engine.call("generate", prompts=prompts, tokens=self.a.batch_new, store=store)
        assert not any(r["cached"])
        return self.a.batch * (self.a.batch_tokens + self.a.batch_new) / r["seconds"]


def gpu_memory(ranks):
    """Name of the first GPU, and MiB that are taken of each that is used."""
    r = subprocess.run(["nvidia-smi", "--query-gpu=name,memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True)
    rows = [line.rsplit(",", 1) for line in r.stdout.splitlines()]
    if len(rows) < ranks:
        raise SystemExit(f"--tensor-parallel {ranks} wants as many GPUs, and this machine has {len(rows)}")
    return rows[0][0], [int(used) for _, used in rows[:ranks]]


def taken(ranks, before=None):
    """For people: MiB, of several GPUs one after the other."""
    now = gpu_memory(ranks)[1]
    return " and ".join(str(x - y) for x, y in zip(now, before or [0] * ranks))


@contextlib.contextmanager
def mps(folder):
    """An MPS server of our own: whatever is started within the block is its client."""
    control = shutil.which("nvidia-cuda-mps-control") or shutil.which("nvidia-cuda-mps-control", path="/usr/local/nvidia/bin:/usr/local/cuda/bin")
    if not control:
        raise SystemExit("--mps wants nvidia-cuda-mps-control, which comes with the driver, and it is not there")
    for what in ("PIPE", "LOG"):
        place = folder / f"mps-{what.lower()}"
        place.mkdir()
        os.environ[f"CUDA_MPS_{what}_DIRECTORY"] = str(place)
    subprocess.run([control, "-d"], check=True, timeout=30, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        servers = subprocess.run([control], input="get_server_list\n", text=True, timeout=30, capture_output=True).stdout.split()
        subprocess.run([control], input="quit -t 5\n", text=True, timeout=60, stdout=subprocess.DEVNULL)
        if not servers:
            print("no MPS server ran: nothing was a client of it", flush=True)


def copies(n):
    """Bytes per second of copying n bytes within the GPU's memory, in a process that ends."""
    code = f"""
import torch
x = torch.empty({n}, dtype=torch.uint8, device="cuda"); x.random_(); y = torch.empty_like(x)
times = []
for _ in range(8):
    a, b = torch.cuda.Event(True), torch.cuda.Event(True)
    a.record(); y.copy_(x); b.record(); b.synchronize(); times.append(a.elapsed_time(b))
print(sorted(times)[4])
"""
    return n / (float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) / 1e3)


def measure(a):
    with contextlib.ExitStack() as ends:
        b = Bench(a, pathlib.Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="kvd-engine."))))
        if a.mps:
            ends.enter_context(mps(b.folder))
        name, _ = gpu_memory(b.ranks)
        size = max(a.lengths) // PAGE * b.page_bytes // b.ranks
        rate = copies(size)
        before = gpu_memory(b.ranks)[1]  # an MPS server that has begun takes some too
        b.say(f"{name}, {b.ranks} of them{', with MPS' if a.mps else ''}; {max(a.lengths)} tokens are {size / 1e9:.2f} GB of bf16 on each; to copy "
              f"them takes {1e3 * size / rate:.1f} ms: {rate / 1e9:.0f} GB/s (as many bytes are read as are written)")
        cost, engines = {}, []
        try:
            with b.daemons():
                b.say(f"kvd with a pool of {a.pool} takes {taken(b.ranks, before)} MiB of a GPU's memory")
                try:
                    for phase in a.phases:
                        run(b, phase, cost, engines)
                        while engines:
                            engines.pop().close()
                    b.say(f"kvd takes {taken(b.ranks, before)} MiB after all engines have ended")
                finally:
                    for e in engines:
                        e.process.kill()
        finally:
            if a.out:
                out = pathlib.Path(a.out)
                for f in b.folder.glob("*.log"):
                    (out / f.name).write_bytes(f.read_bytes()[-400000:])
                found = {"gpu": name, "mps": a.mps, "ranks": b.ranks, "copy": rate, "cost": cost, **b.found}
                (out / "engine.json").write_text(json.dumps(found, indent=1))


def run(b, phase, cost, started):
    """A phase is the codec, and what runs beside each other: bf16:2 (two processes), int2:1, none:0 (no kvd), joined by +. Engines are put
    into `started`, for the caller to end them."""
    engines = {}
    for part in phase.split("+"):
        codec, count = part.split(":")
        for i in range(max(1, int(count))):
            engines[codec, i] = b.engine(f"{codec}-{i}", {"codec": codec, **b.where} if codec != "none" else None)
            started.append(engines[codec, i])
    b.say(f"engines start within {max(e.answer() for e in engines.values()):.0f} s; {taken(b.ranks)} MiB of a GPU's memory are taken")
    for e in engines.values():
        for line in dict.fromkeys(x for x in e.log.read_text().splitlines() if "is not registered" in x):
            b.say(f"{e.log.name}: {line}")
    if "prefixes" in b.a.parts:
        for (codec, i), e in engines.items():
            if codec != "none" and i == 0:
                b.say(f"{b.sensitive(e)} of 16 tokens are the same where half of a prompt is another one")
                b.prefixes(codec, e, engines.get((codec, 1), e))
    if "cost" in b.a.parts:
        throughput(b, engines, cost)
    for (codec, i), e in engines.items():
        m = e.call("metrics")
        b.say(f"{codec}-{i}: " + ", ".join(f"{k[9:]} {v:.0f}" for k, v in sorted(m.items()) if k.startswith("vllm:kvd_")))


def throughput(b, engines, cost):
    """Of each kind of engine, in turns, so that none has the GPU at its best alone."""
    for e in engines.values():
        b.requests(e)
    for _ in range(b.a.rounds):
        for (codec, i), e in engines.items():
            if i == 0:
                cost.setdefault(codec, []).append(b.requests(e))
                if codec != "none":
                    cost.setdefault(f"{codec}, nothing stored", []).append(b.requests(e, store=False))
    without = statistics.median(cost["none"]) if "none" in cost else None
    for codec, rates in cost.items():
        more = ""
        if without and codec != "none":
            more = f"; {100 * (statistics.median(rates) / without - 1):+.1f}% of that without kvd"
            by_round = [100 * (rate / other - 1) for rate, other in zip(rates, cost["none"])]  # what drifts is in both
            if len(by_round) > 1:
                more += f", round by round {statistics.mean(by_round):+.2f} +- {statistics.stdev(by_round) / len(by_round) ** 0.5:.2f}%"
        b.say(f"{b.a.batch} requests of {b.a.batch_tokens} tokens, {b.a.batch_new} new ones each, nothing found, codec {codec}: "
              f"{statistics.median(rates):.0f} tokens/s (of {min(rates):.0f} to {max(rates):.0f}){more}")


if __name__ == "__main__":
    if sys.argv[1] == "--engine":
        serve(json.loads(sys.argv[2]))
        sys.exit()
    BEGAN = time.monotonic()
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("kvd", help="folder of an unpacked bundle")
    p.add_argument("--layers", type=int, default=36)
    p.add_argument("--lengths", type=lambda s: [int(x) for x in s.split(",")], default=[2048, 8192, 32768])
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--batch", type=int, default=48)
    p.add_argument("--batch-tokens", type=int, default=1000)
    p.add_argument("--batch-new", type=int, default=128)
    p.add_argument("--pool", default="16GiB")
    p.add_argument("--kv-gib", type=int, default=8)
    p.add_argument("--utilization", type=float, default=0.33)
    p.add_argument("--eager", action="store_true")
    p.add_argument("--phases", nargs="+", default=["bf16:2", "int2:1+none:0"])
    p.add_argument("--parts", nargs="+", choices=["prefixes", "cost"], default=["prefixes", "cost"],
                   help="what is measured: prefixes that are computed and loaded; throughput where nothing is found")
    p.add_argument("--tensor-parallel", type=int, default=1, metavar="RANKS", help="ranks of each engine, each on a GPU and beside a kvd of its own")
    p.add_argument("--mps", action="store_true", help="kvd and engines as clients of an MPS server, which is started and ended")
    p.add_argument("--out", help="a folder for logs and numbers")
    measure(p.parse_args())
