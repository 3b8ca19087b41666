"""An SGLang engine that a test drives: a line of JSON in, a line of JSON out. usage: engine_sglang.py MODEL OPTIONS"""
import json
import os
import pathlib
import sys
import time

os.environ.update(HF_HUB_OFFLINE="1", SGLANG_USE_CPU_ENGINE="1", CUDA_VISIBLE_DEVICES="",
                  PYTHONPATH=os.pathsep.join([str(pathlib.Path(__file__).parent / "sgl_kernel_stub"), os.environ.get("PYTHONPATH", "")]))
sys.path.insert(0, str(pathlib.Path(__file__).parent / "sgl_kernel_stub"))


def serve(model, options):
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what SGLang prints goes where its log goes
    if options.pop("retracts", False):  # a request, at every third step
        os.environ["SGLANG_TEST_RETRACT"] = "1"
    import sglang

    extra = options.pop("kvd", None)
    linker = {} if extra is None else {
        "enable_unified_cache_external_linker": True, "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {"linker": "KvdLinker", "linker_module_path": "kvd.sglang", "linker_extra_config": extra}}
    engine = sglang.Engine(model_path=model, device="cpu", dtype="bfloat16", attention_backend="torch_native", sampling_backend="pytorch",
                           disable_cuda_graph=True, disable_overlap_schedule=True, mem_fraction_static=0.2, page_size=64, context_length=4096,
                           **options, **linker)

    def generate(prompts, tokens=1, logprobs=0):
        began = time.monotonic()
        asked = {"return_logprob": True, "top_logprobs_num": logprobs, "logprob_start_len": -1} if logprobs else {}
        outputs = engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}, **asked)
        seconds = time.monotonic() - began
        return {"seconds": seconds, "outputs": [{
            "text": o["text"], "cached": o["meta_info"]["cached_tokens"], "finish": o["meta_info"]["finish_reason"]["type"],
            "retracted": o["meta_info"]["num_retractions"],
            "logprobs": [{x[1]: x[0] for x in of} for of in o["meta_info"].get("output_top_logprobs", [])]} for o in outputs]}

    calls = {"generate": generate}
    print(json.dumps("ready"), file=out)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(calls[name](**arguments)), file=out)
    engine.shutdown()


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
