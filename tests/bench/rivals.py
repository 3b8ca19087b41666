#!/usr/bin/env python3
"""What others take on this GPU for what `tests/gpu/run.sh bench` measures of kvd: PyTorch's attention over K and V in bf16 (flash,
cuDNN, FlexAttention), and BitDecoding where its package is installed (its 2 and 4 bits, fp16). Needs PyTorch only.

Each call is replayed as a CUDA graph with cold caches; the median of 12. A row that cannot run says why. Outputs are compared with
products in fp32 first, and a row of PyTorch's that is wrong has no time. K and V are white noise, of which codes keep little: what
BitDecoding's outputs are off by says that they are near, and nothing of what it keeps of a model.

usage: rivals.py [PART OF A ROW'S NAME]
"""
import math
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as attention

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
GROUP = Q_HEADS // KV_HEADS


def milliseconds(call, flush):
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(12):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def exact(q, k, v):
    """The last query of the first sequence's first head, in fp32."""
    p = torch.softmax(k[0, 0].float() @ q[0, 0, -1].float() / math.sqrt(DIM), 0)
    return p @ v[0, 0].float()


def by_sdpa(backend, causal):
    def call(q, k, v):
        with sdpa_kernel(backend):
            if causal:
                return attention(q, k, v, causal_lower_right(q.shape[2], k.shape[2]), enable_gqa=q.shape[1] != k.shape[1])
            return attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

    return call


def by_flex():
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def row(name, call, operands, expected, limit, flops, bytes_read, flush):
    try:
        o = call(*operands)
        error = ((o[0, 0, -1].float() - expected).norm() / expected.norm()).item()
        if not error < limit:
            print(f"{name:58} wrong: relative error {error:.3g}")
            return
        ms = milliseconds(lambda: call(*operands), flush)
        print(f"{name:58} {ms:9.4f} ms  {flops / ms / 1e9:5.0f} TFLOP/s  {bytes_read / ms / 1e9:6.3f} TB/s  error {error:.1e}", flush=True)
    except Exception as e:  # a rival that does not run is a row, too
        print(f"{name:58} does not run: {str(e).splitlines()[0][:120]}", flush=True)


def of_bf16(n, q_len, tokens, causal, flush, wanted):
    """PyTorch's kernels, queries of a group side by side where nothing is masked: so each key is read once."""
    name = f"{n} x {tokens:,}, {q_len} quer{'y' if q_len == 1 else 'ies'}{', causal' if causal else ''}"
    if wanted not in name:
        return
    k, v = (torch.randn(n, KV_HEADS, tokens, DIM, device="cuda").bfloat16() for _ in "kv")
    heads, rows = (Q_HEADS, q_len) if causal else (KV_HEADS, q_len * GROUP)
    q = torch.randn(n, heads, rows, DIM, device="cuda").bfloat16()
    seen = tokens - (q_len - 1) / 2 if causal else tokens
    flops = 4 * n * Q_HEADS * q_len * seen * DIM
    expected = exact(q, k, v)
    rivals = [("flash", by_sdpa(SDPBackend.FLASH_ATTENTION, causal)), ("cuDNN", by_sdpa(SDPBackend.CUDNN_ATTENTION, causal))]
    if causal:
        rivals.append(("cuDNN without a mask", by_sdpa(SDPBackend.CUDNN_ATTENTION, False)))
    else:
        rivals.append(("FlexAttention", by_flex()))
    for rival, call in rivals:
        row(f"{name}, bf16, {rival}", call, (q, k, v), expected, 0.02, flops, k.nbytes + v.nbytes, flush)


def of_bit_decoding(n, q_len, tokens, bits, flush, wanted):
    name = f"{n} x {tokens:,}, {q_len} quer{'y' if q_len == 1 else 'ies'}, BitDecoding {bits} bits"
    if wanted not in name:
        return
    try:
        from bit_decode import fwd_kvcache_int, kvcache_pack_int
    except ImportError as e:
        print(f"{name:58} not installed: {e}")
        return
    q = torch.randn(n, q_len, Q_HEADS, DIM, device="cuda").half()
    k, v = (torch.randn(n, tokens, KV_HEADS, DIM, device="cuda").half() for _ in "kv")
    pack, group = 16 // bits, 128
    k_pack = torch.zeros(n, tokens // pack, KV_HEADS, DIM, dtype=torch.uint16, device="cuda")
    k_params = torch.zeros(n, tokens // group, KV_HEADS, DIM, dtype=torch.float32, device="cuda")
    v_pack = torch.zeros(n, tokens, KV_HEADS, DIM // pack, dtype=torch.uint16, device="cuda")
    v_params = torch.zeros(n, DIM // group, KV_HEADS, tokens, dtype=torch.float32, device="cuda")
    lengths = torch.arange(0, (n + 1) * tokens, tokens, dtype=torch.int32, device="cuda")
    kvcache_pack_int(k, k_pack, k_params, v, v_pack, v_params, None, lengths, tokens, "k-channel", group, bits)
    expected = exact(*(x.transpose(1, 2) for x in (q, k, v)))
    del k, v

    def call(q):
        return fwd_kvcache_int(q, k_pack, k_params, v_pack, v_params, None, 1 / math.sqrt(DIM), "k-channel", group, bits).transpose(1, 2)

    bytes_read = sum(x.nbytes for x in (k_pack, k_params, v_pack, v_params))
    row(name, call, (q,), expected, math.inf, 4 * n * Q_HEADS * q_len * tokens * DIM, bytes_read, flush)


def main():
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    torch.manual_seed(0)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}; {Q_HEADS} q heads, {KV_HEADS} kv heads, head_dim {DIM}")
    for n, q_len, tokens in (1, 2048, 32768 + 2048), (1, 512, 131072 + 512):
        of_bf16(n, q_len, tokens, True, flush, wanted)
    for n, q_len, tokens in (32, 16, 32768), (1, 16, 32768), (32, 4, 32768), (32, 1, 32768), (256, 1, 4096), (1, 1, 32768):
        of_bf16(n, q_len, tokens, False, flush, wanted)
    for n, tokens in (32, 32768), (256, 4096), (1, 32768):
        for bits in 2, 4:
            of_bit_decoding(n, 1, tokens, bits, flush, wanted)


if __name__ == "__main__":
    main()
