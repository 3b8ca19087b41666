"""Blocks of history whose memory is spoiled behind kvd's back: found, quarantined, never served."""
import json
import os

import grpc
import pytest

from conftest import Rpc, kv
from test_death import wait_for
from test_grpc import append, open_session, random_kv
from test_keep import attend, kill, pid_of


def spoil(pid, name="kvd-extent"):
    """A byte of each 4 KiB of all extents of a process; their addresses."""
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "r+b", 0) as mem:
        for line in maps:
            if name not in line or " rw-" not in line:
                continue
            a, b = (int(x, 16) for x in line.split()[0].split("-"))
            for at in range(a + 100, b, 4096):
                mem.seek(at)
                byte = mem.read(1)[0]
                mem.seek(at)
                mem.write(bytes([byte ^ 0x40]))
            found.append(a)
    return found


def refused(f):
    with pytest.raises(grpc.RpcError) as e:
        f()
    assert e.value.code().name == "DATA_LOSS" and "is damaged" in e.value.details(), e.value


@pytest.mark.skipif(os.getuid() != 0, reason="writing another process's memory wants root")
def test_what_is_damaged_is_not_served(start):
    keeper = start("--keep", "--backend", "cpu", config="[kvd]\nscrub-rate = 0\n")
    rpc = Rpc(keeper.address)
    s = open_session(rpc)
    old, short = rpc.kv("CreateSequences", session=s, count=2).sequences
    append(rpc, s, old, 0, *random_kv(700))
    append(rpc, s, short, 0, *random_kv(100))  # has no block that is complete
    rpc.kv("PublishSequence", session=s, sequence=old, name="p")
    fork = rpc.kv("ForkSequence", session=s, sequence=old).sequences[0]
    assert json.loads(keeper.kvctl("--json", "verify").stdout)["damaged"] in (0, "0")
    assert keeper.metric("kvd_blocks_sealed_total") > 3
    output = attend(rpc, s, old)
    assert "0 damaged" in keeper.kvctl("verify").stdout
    append(rpc, s, fork, 700, *random_kv(10))
    assert attend(rpc, s, old) == output
    assert spoil(pid_of(keeper))
    r = keeper.kvctl("verify", check=False)
    assert r.returncode == 1 and f" {old} " in r.stdout and f" {fork} " in r.stdout and f" {short} " not in r.stdout, r.stdout
    damaged = keeper.metric("kvd_damaged_pages")
    assert damaged > 3 and "damaged namespace=default" in keeper.text()
    refused(lambda: attend(rpc, s, old))
    refused(lambda: append(rpc, s, fork, 710, *random_kv(1)))
    refused(lambda: rpc.kv("AttachSequence", session=s, name="p"))
    attend(rpc, s, short)
    rpc.channel.close()
    kill(keeper)  # it stays known
    rpc = Rpc(keeper.address)
    s = open_session(rpc)
    refused(lambda: rpc.kv("AttachSequence", session=s, name="p"))
    assert keeper.metric("kvd_damaged_pages") == damaged
    rpc.channel.close()


@pytest.mark.skipif(os.getuid() != 0, reason="writing another process's memory wants root")
def test_the_scrubber_finds_it_by_itself(start):
    kvd = start("--backend", "cpu", config="[kvd]\nscrub-rate = 1GiB\n")
    rpc = Rpc(kvd.address)
    s = open_session(rpc)
    seq = rpc.kv("CreateSequences", session=s, count=1).sequences[0]
    append(rpc, s, seq, 0, *random_kv(700))
    assert wait_for(lambda: kvd.metric("kvd_blocks_sealed_total") > 3)
    assert attend(rpc, s, seq)
    assert spoil(kvd.process.pid)
    assert wait_for(lambda: kvd.metric("kvd_damaged_pages") > 3)
    refused(lambda: attend(rpc, s, seq))
    rpc.kv("FreeSequences", session=s, sequences=[seq])
    assert kvd.metric("kvd_damaged_pages") == 0
    seq = rpc.kv("CreateSequences", session=s, count=1).sequences[0]
    for at in range(0, 600, 100):  # while blocks are read
        append(rpc, s, seq, at, *random_kv(100))
        if at % 200 == 0:
            rpc.kv("TruncateSequence", session=s, sequence=seq, length=at + 70)
            append(rpc, s, seq, at + 70, *random_kv(30))
    assert attend(rpc, s, seq) and kvd.metric("kvd_damaged_pages") == 0
    rpc.channel.close()
