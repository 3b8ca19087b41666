"""A vLLM engine that a test drives: a line of JSON in, a line of JSON out. usage: engine_vllm.py MODEL OPTIONS"""
import json
import os
import sys
import time

os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")


def keep_stats(llm):
    """In 0.26, LLM drops the numbers of steps that answer no request, such as those in which stores end; vLLM's server does not."""
    import vllm

    if not vllm.__version__.startswith("0.26."):
        return
    engine = llm.llm_engine
    get = engine.engine_core.get_output

    def get_output():
        outputs = get()
        if outputs.scheduler_stats is not None and not outputs.outputs:
            engine.logger_manager.record(scheduler_stats=outputs.scheduler_stats, iteration_stats=None)
        return outputs

    engine.engine_core.get_output = get_output


def serve(model, options):
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints goes where its log goes
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(options.pop("processes", False)))
    ranks = options.get("tensor_parallel_size", 1)
    if ranks > 1:  # cores of each, as this machine's one NUMA node cannot be shared out by vLLM itself
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[r % len(cores)]) for r in range(ranks))
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.lora.request import LoRARequest

    extra = options.pop("kvd", None)
    transfer = extra is not None and KVTransferConfig(kv_connector="KvdConnector", kv_role="kv_both", kv_load_failure_policy="recompute",
                                                      kv_connector_extra_config=extra) or None
    llm = LLM(model, enforce_eager=True, kv_transfer_config=transfer, disable_log_stats=False, **options)
    keep_stats(llm)

    def generate(prompts, tokens=1, logprobs=None, lora=None, salt=None):
        request = LoRARequest(*lora) if lora else None
        began = time.monotonic()
        outputs = llm.generate([{"prompt_token_ids": p, **({"cache_salt": salt} if salt else {})} for p in prompts],
                               SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=logprobs), use_tqdm=False, lora_request=request)
        seconds = time.monotonic() - began
        return {"seconds": seconds, "outputs": [
            {"tokens": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens, "finish": o.outputs[0].finish_reason,
             "logprobs": [{str(t): p.logprob for t, p in at.items()} for at in o.outputs[0].logprobs or []]} for o in outputs]}

    def forget():
        return llm.reset_prefix_cache()

    def metrics():
        sums = {}
        for m in llm.get_metrics():
            sums[m.name] = sums.get(m.name, 0) + getattr(m, "value", 0)
        return sums

    calls = {"generate": generate, "forget": forget, "metrics": metrics}
    print(json.dumps("ready"), file=out)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(calls[name](**arguments)), file=out)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
