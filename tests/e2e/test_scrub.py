"""Blocks of history whose memory is spoiled behind kvd's back: found, quarantined, never served."""
import base64
import json
import os

import grpc
import pytest

import kvd as package
from conftest import BUILD, Rpc, kv
from test_death import wait_for
from test_grpc import append, open_session, random_kv
from test_keep import attend, kill, pid_of
from spoiled import spoil
from test_prefix import connect, step, tokens_of

EXTENT = 16 << 20
SMALL = ("--pool-size", "64MiB", "--extent-size", str(EXTENT))


def spoil_at_work(kvd):
    """Without --keep nobody has descriptors of a real GPU's memory."""
    if not spoil(kvd.process.pid):
        assert kvd.on_gpu() and "emulated" not in os.environ.get("KVD_PROGRAM", "")
        pytest.skip("nobody but kvd can write to the GPU's memory")


def refused(f):
    with pytest.raises(grpc.RpcError) as e:
        f()
    assert e.value.code().name == "DATA_LOSS" and "is damaged" in e.value.details(), e.value


@pytest.mark.skipif(os.getuid() != 0, reason="writing another process's memory wants root")
def test_what_is_damaged_is_not_served(start):
    keeper = start("--keep", *SMALL, config="[kvd]\nscrub-rate = 0\n")
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
    assert spoil(pid_of(keeper), EXTENT)
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
    kvd = start(*SMALL, config="[kvd]\nscrub-rate = 1GiB\n")
    rpc = Rpc(kvd.address)
    s = open_session(rpc)
    seq = rpc.kv("CreateSequences", session=s, count=1).sequences[0]
    append(rpc, s, seq, 0, *random_kv(700))
    assert wait_for(lambda: kvd.metric("kvd_blocks_sealed_total") > 3)
    assert attend(rpc, s, seq)
    spoil_at_work(kvd)
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


@pytest.mark.skipif(os.getuid() != 0, reason="writing another process's memory wants root")
@pytest.mark.parametrize("damaged", [False, True])
def test_what_an_earlier_kvd_has_left_is_looked_at_when_it_is_used(start, damaged):
    """The scrubber's pass has not come to it: without a rate there is none, but on a GPU, where there always is one after a restart."""
    keeper = start("--keep", *SMALL, config="[kvd]\nscrub-rate = 0\n")
    rpc = Rpc(keeper.address)
    s = open_session(rpc)
    seq, other = rpc.kv("CreateSequences", session=s, count=2).sequences
    append(rpc, s, seq, 0, *random_kv(700))
    append(rpc, s, other, 0, *random_kv(700))
    for name, which in ("p", seq), ("q", other):
        rpc.kv("PublishSequence", session=s, sequence=which, name=name)
    assert json.loads(keeper.kvctl("--json", "verify").stdout)["damaged"] in (0, "0")
    output = attend(rpc, s, seq)
    assert keeper.metric("kvd_first_use_checks_total") == 0
    rpc.channel.close()
    if damaged:
        assert spoil(pid_of(keeper), EXTENT)
    kill(keeper)
    rpc = Rpc(keeper.address)
    s = open_session(rpc)
    if keeper.on_gpu():
        assert wait_for(lambda: keeper.metric("kvd_scrub_passes_total") == 1) and "that an earlier kvd has left were looked at" in keeper.text()
        if damaged:
            for name in "p", "q":
                refused(lambda: rpc.kv("AttachSequence", session=s, name=name))
            assert f"sequence={seq} " in keeper.text() and f"sequence={other} " in keeper.text()
            rpc.channel.close()
            return
    assert rpc.kv("AttachSequence", session=s, name="p").sequence.sequence == seq
    assert rpc.kv("AttachSequence", session=s, name="q").sequence.sequence == other
    if damaged:
        refused(lambda: append(rpc, s, other, 700, *random_kv(1)))
        refused(lambda: attend(rpc, s, seq))
        assert keeper.metric("kvd_damaged_pages") == 2 and f"sequence={seq} " in keeper.text()
        refused(lambda: rpc.kv("ReadTokens", session=s, sequence=seq, begin=0, tokens=1))
    else:
        assert attend(rpc, s, seq) == output
        looked = keeper.metric("kvd_first_use_checks_total")
        assert looked >= 3 or keeper.on_gpu()
        assert attend(rpc, s, seq) == output and keeper.metric("kvd_first_use_checks_total") == looked
        append(rpc, s, seq, 700, *random_kv(100))
        append(rpc, s, other, 700, *random_kv(100))
        assert keeper.metric("kvd_first_use_checks_total") == 2 * looked
        assert json.loads(keeper.kvctl("--json", "verify").stdout)["damaged"] in (0, "0")
    rpc.channel.close()


@pytest.mark.skipif(os.getuid() != 0 or "san" in BUILD.name, reason="writing another process's memory wants root; Python is not instrumented")
def test_blocks_that_only_the_index_has(start):
    kvd = start(*SMALL, config="[kvd]\nscrub-rate = 0\n")
    tokens = tokens_of(7, 1088)

    def publish(client):
        s = client.create()
        step(client, s, tokens, 1088)
        published = s.publish_blocks(package.Prompt(tokens))
        s.free()
        return published

    with connect(kvd) as client:
        known = publish(client).blocks
        assert known > 10
        assert client.match([package.Prompt(tokens)])[0].blocks == known
        assert "0 damaged" in kvd.kvctl("verify").stdout and kvd.metric("kvd_blocks_sealed_total") > 10
        spoil_at_work(kvd)
        kvd.kvctl("verify", check=False)
        assert kvd.metric("kvd_damaged_prompt_blocks_total") > 10 and "a block of a prompt" in kvd.text()
        m = client.match([package.Prompt(tokens)])[0]  # the sink's page has no checksum
        assert m.blocks <= 1 and m.miss == "damaged" and kvd.metric("kvd_damaged_pages") == 0
        key = json.loads(kvd.kvctl("--json", "prefix", "ls", "default").stdout)[0]["prefixes"][0]["key"]
        assert kvd.kvctl("why", "default", base64.b64decode(key).hex()).stdout.startswith("damaged, 20")
        assert publish(client).blocks == known
        assert client.match([package.Prompt(tokens)])[0].blocks == known
        assert "0 damaged" in kvd.kvctl("verify").stdout
