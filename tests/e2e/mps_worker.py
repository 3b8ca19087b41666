"""A worker with tensors on the GPU, of which test_fault.py runs several processes: reads commands, a JSON list a line, and answers each.

usage: mps_worker.py ADDRESS PACKAGE
"""
import json
import sys
import zlib

import torch
import triton
import triton.language as tl

sys.path.insert(0, sys.argv[2])
import kvd  # noqa: E402

LAYERS, Q_HEADS, KV_HEADS, DIM = 3, 6, 2, 64


@triton.jit
def beyond(p):
    tl.store(p + (1 << 42), 1)


class Worker:
    def __init__(self, address):
        self.client = kvd.Client(address=address, layers=range(LAYERS), q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=DIM, timeout=60)
        self.rows = torch.empty(LAYERS, 64, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
        generator = torch.Generator("cuda").manual_seed(1)
        self.q = torch.randn(LAYERS, 1, Q_HEADS, DIM, generator=generator, device="cuda").bfloat16()
        self.o = torch.zeros(LAYERS, 1, Q_HEADS, DIM, device="cuda")
        self.shared = [self.client.share(t) for t in (self.rows, self.q, self.o)]
        self.known = {}

    def made(self, name, seeds):
        self.known[name] = self.client.create()
        for seed in seeds:
            self.append(name, seed)
        self.known[name].publish(name)

    def taken(self, name):
        """What another process has published, to be gone on with."""
        self.known[name] = self.client.attach(name).fork()[0]
        return self.known[name].length

    def append(self, name, seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        self.rows.copy_(torch.randn(self.rows.shape, generator=generator, device="cuda"))
        torch.cuda.synchronize()
        self.known[name].append(self.shared[0], self.shared[0])
        return self.known[name].length

    def output(self, name):
        self.client.attend([kvd.Item(self.known[name], q=self.shared[1], o=self.shared[2])])
        return zlib.crc32(self.o.cpu().numpy().tobytes())

    def busy(self):
        """Kernels that are under way when this is answered."""
        x = torch.ones(4096, 4096, device="cuda")
        for _ in range(200):
            x = x @ x
            x /= x.max()

    def fault(self):
        """A write where nothing is mapped, which ends every context of this MPS server."""
        self.busy()
        beyond[(1,)](torch.zeros(1, device="cuda", dtype=torch.int64))
        torch.cuda.synchronize()


worker = Worker(sys.argv[1])
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    name, *arguments = json.loads(line)
    print(json.dumps(getattr(worker, name)(*arguments)), flush=True)
