"""The pool's memory on the host: given back when it is idle, and no more of it than there is."""
import os
import subprocess
import time

from conftest import KVD, Rpc, layout
from test_grpc import append, open_session, random_kv


def shared_mib(kvd):
    """Resident memory of memfds, which is what extents are."""
    with open(f"/proc/{kvd.process.pid}/status") as f:
        return int(next(l for l in f if l.startswith("RssShmem")).split()[1]) / 1024


def fill(rpc, session, request_id, count=8):
    seqs = rpc.kv("CreateSequences", session=session, request_id=request_id, count=count).sequences
    k, v = random_kv(4000)
    for seq in seqs:
        append(rpc, session, seq, 0, k, v)
    return seqs


def eventually(what, timeout=15):
    end = time.time() + timeout
    while not what() and time.time() < end:
        time.sleep(0.05)
    assert what()


def test_idle_memory_goes_back(start):
    kvd = start("--extent-size", "2MiB", config="[kvd]\nidle-memory-timeout = 500ms\n")
    if kvd.on_gpu():
        return  # memory-floor decides there
    rpc = Rpc(kvd.address)
    s = open_session(rpc, layout=layout(codec="bf16"))
    before = shared_mib(kvd)
    seqs = fill(rpc, s, 1)
    used = kvd.metric('kvd_pool_bytes{state="used"}') / 2**20
    assert used > 20 and shared_mib(kvd) - before > 0.9 * used
    rpc.kv("FreeSequences", session=s, sequences=seqs)
    eventually(lambda: shared_mib(kvd) - before < 1)
    assert kvd.metric("kvd_pool_memory_bytes") == 0
    seqs = fill(rpc, s, 2)  # and comes again; what is in use stays
    time.sleep(1.8)
    assert shared_mib(kvd) - before > 0.9 * used
    (kvd.folder / "kvd.conf").write_text("[kvd]\nidle-memory-timeout = 0\n")
    kvd.kvctl("reload")
    rpc.kv("FreeSequences", session=s, sequences=seqs)
    time.sleep(1.8)
    assert shared_mib(kvd) - before > 0.5 * used  # 0 keeps it


def test_a_pool_beyond_memory(folder, start):
    size = (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 2 >> 20 << 20)
    config = folder / "big.conf"
    config.write_text(f"[kvd]\nbackend = cpu\nlisten = unix:{folder}/s\nmetrics =\npool-size = {size}\n")
    for args in (["--check-config"], []):
        r = subprocess.run([KVD, "--config", config, *args], capture_output=True, text=True, timeout=20)
        assert r.returncode != 0, args
        assert "big.conf:5: pool-size:" in r.stderr + r.stdout and "overcommit-memory" in r.stderr + r.stdout, r
    config.write_text(config.read_text() + "overcommit-memory = yes\n")
    r = subprocess.run([KVD, "--config", config, "--check-config"], capture_output=True, text=True, timeout=20)
    assert r.returncode == 0, r
    kvd = start("--pool-size", str(size), config="[kvd]\nbackend = cpu\novercommit-memory = yes\n")
    rpc = Rpc(kvd.address)
    fill(rpc, open_session(rpc), 1, 1)
