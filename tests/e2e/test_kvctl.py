"""kvctl's command line: every command of its table understands help, refuses what it does not know before anything is
sent, prints JSON as protobuf maps it, and finds the daemon."""
import inspect
import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import time

import pytest
from google.protobuf import json_format

from conftest import BUILD, KVCTL, Daemon, Rpc, admin, at_some_pace, layout
from test_death import wait_for

SAMPLES = {"NAMESPACE": "default", "SIZE|none": "1GiB", "SECONDS": "1", "COUNT": "1", "LEVEL": "info", "TIER": "host", "KEY": "0a" * 24, "PRIORITY": "low", "COMMAND": "quota",
           "VERB": "set", "SET": "a/b@c", "SET|FILE": "a/b@c", "K.pt": "k.pt", "V.pt": "v.pt", "MODEL@TAG": "a/b@c",
           "LAYERS": "0-3", "DIM": "64", "FILE": "f", "REPORT.json": "r.json", "DUMP": "d", "OUT": "o"}


def run(*arguments, env=None, **kw):
    kw.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run([KVCTL, *map(str, arguments)], capture_output=True, text=True, timeout=60,
                          env={**os.environ, **(env or {})}, **kw)


TABLE = json.loads(run("--json", "help").stdout)
COMMANDS = {c["command"]: c for c in TABLE["commands"]}


def words(command):
    """Names of its arguments; "..." repeats the last."""
    return re.sub(r"[\[\]]", "", COMMANDS[command]["arguments"]).split()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A daemon with something to lose, for commands that must not reach it."""
    d = Daemon(tmp_path_factory.mktemp("kvctl"))
    rpc = Rpc(d.address)
    s = rpc.kv("OpenSession", layout=layout(), client_name="somebody").session
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
    rpc.kv("PublishSequence", session=s, sequence=seq, name="precious")
    rpc.kv("FreeSequences", session=s, sequences=[seq])
    yield d
    assert d.stop() == 0


def unharmed(d):
    status = json.loads(d.kvctl("--json", "status").stdout)
    assert status["state"] == "ready" and status["sequences"] == "1" and status["log_level"] == "info"
    assert d.process.poll() is None


def test_every_command_has_help_and_refuses_what_it_does_not_know(shared):
    address = ("--address", shared.address)
    for name, c in COMMANDS.items():
        command = name.split()
        for line in ([*command, "--help"], [*command, "-h"], ["help", *command]):
            r = run(*address, *line)
            assert r.returncode == 0 and r.stderr == "" and f"Usage: kvctl {name}" in r.stdout, (line, r.stderr)
        shown = r.stdout
        for o in c["options"] + TABLE["options"]:
            assert f"--{o['name']}" in shown, (name, o)
        names = words(name)
        good = [SAMPLES[n.removesuffix("...")] for n in names]
        wrong = [[*command, *good, "--no-such-option"], [*command, *good, "-Z"]]
        if not names or not names[-1].endswith("..."):
            wrong.append([*command, *good, "too-much"])
        if c["required"]:
            wrong.append([*command, *good[:c["required"] - 1]])
        if any(o["value"] for o in c["options"]):  # without its value
            wrong.append([*command, *good, "--" + next(o["name"] for o in c["options"] if o["value"])])
        for line in wrong:
            r = run(*address, *line)
            assert r.returncode == 2 and r.stdout == "" and r.stderr.startswith("kvctl"), (line, r.returncode, r.stderr)
    for group in ("quota", "calib"):
        assert f"Usage: kvctl {group}" in run(group, "--help").stdout
    unharmed(shared)


CALIBRATION = BUILD / "client/kvctl-calib"
WRONG_VALUES = """
drain abc | drain 5x | drain -1 | drain nan | drain inf | drain 1e3 | drain 4000 | drain "" | drain 1 2
top 0 | top 0.01 | top soon | top 1 0 | top 1 x | ping 0 | ping many | ping 1.5 | ping 0x10 | ping 9999999
quota set default many | quota set default -5 | quota set default 0 | quota set default "" | quota set "two words" 1GiB
quota set "" 1GiB | quota set default | quota lst | quota set default 1GiB 2GiB | quota set default 0x10 | sequences "a b"
evict | evict everything | evict --all --namespace default --yes | evict --name precious --yes | evict --all
evict --namespace default --bytes lots | evict --namespace "" | evict --namespace default --name ""
evict --namespace default --name precious --bytes 1 | evict --namespace default --bytes 0 | evict --yes
tier | tier flush | tier flush disk | tier flush "" | tier flush host redis | tier status host
log-level loud | log-level "" | log-level | log-level INFO | log-level info debug
calib | calib lss | calib show nonsense | calib fetch nonsense | calib pin nonsense | calib unpin @ | calib untag a/b | calib gc now
calib import a b c | calib hadamard a/b@c 3-1 64 | calib hadamard a/b@c 0-3 65 | calib hadamard ab 0-3 64
calib publish f nonsense | calib fit d | calib fit d o --threads none | calib fit d o --layers 9-1 | calib fit d o --clip x
calib fit d o --objective-k none | calib fit d o --compose none | calib eval | calib eval d --codecs int7 | calib eval d -c x
--timeout soon status | --timeout 0 status | --timeout -1 status | status --instance a/b | status --instance ""
help nonsense | help quota nonsense | help status x | nonsense | --nonsense | status --all | --all drain | --json | drain --all 1
--all quota set default 1MiB | top --all 1 1
"""


def test_values_are_checked_before_anything_is_sent(shared):
    for line in re.split(r"[|\n]", WRONG_VALUES.strip()):
        if line.strip() == "calib":
            continue  # calib ls
        if not CALIBRATION.exists() and re.match(r" *calib (fit|eval) ", line):
            continue  # a bundle has no tool for it
        r = run("--address", shared.address, *shlex.split(line))
        assert r.returncode == 2 and r.stderr and not r.stdout, (line, r.returncode, r.stdout, r.stderr)
    unharmed(shared)


def test_a_time_that_is_none_is_told_what_is_possible():
    assert "seconds from 0.001 to 1000000" in run("--timeout", "0", "status").stderr


def test_options_of_all_commands_go_anywhere(shared):
    a, t = ("--address", shared.address), ("--timeout", "20")
    want = run(*a, "--json", "quota", "ls").stdout
    for line in ([*a, "quota", "--json", "ls"], [*a, "quota", "ls", "--json"], ["quota", *a, "ls", "-j"],
                 ["quota", "ls", *t, "--json", *a], ["-j", "quota", *a], [*t, "quota", "ls", f"--address={shared.address}", "-j"]):
        r = run(*line)
        assert r.returncode == 0 and r.stdout == want, (line, r.stderr)
    assert run("sequences", "--json", "default", *a).stdout == run(*a, "sequences", "default", "--json").stdout


def test_evicting_everything_asks(shared, start):
    r = run("--address", shared.address, "evict", "--all")
    assert r.returncode == 2 and "--yes" in r.stderr
    for answer, code in (("n", 1), ("", 1)):
        master, slave = pty.openpty()
        os.write(master, answer.encode() + b"\n")
        r = run("--address", shared.address, "evict", "--all", stdin=slave)
        os.close(slave), os.close(master)
        assert r.returncode == code and "of all namespaces? [y/N]" in r.stderr and "nothing was done" in r.stderr
    unharmed(shared)
    kvd = start()
    master, slave = pty.openpty()
    os.write(master, b"y\n")
    r = run("--address", kvd.address, "evict", "--all", stdin=slave)
    os.close(slave), os.close(master)
    assert r.returncode == 0 and "evicted 0" in r.stdout
    assert "evicted 0" in kvd.kvctl("evict", "--all", "--yes", "--bytes", "1MiB").stdout


def test_a_quota_for_nobody_is_refused(start):
    kvd = start(config="[namespace known]\n")
    r = kvd.kvctl("quota", "set", "nosuch", "1MiB", check=False)
    assert r.returncode == 1 and "--create" in r.stderr
    assert "nosuch" not in kvd.kvctl("quota", "ls").stdout
    r = kvd.kvctl("quota", "set", "known", "1TiB", check=False)  # a configuration may not say that either
    assert r.returncode == 1 and "quota: 1.00 TiB for the namespace known are more than pool-size, " in r.stderr
    for name in ("known", "tiny"):  # nor this
        r = kvd.kvctl("quota", "set", name, "12", "--create", check=False)
        assert r.returncode == 1 and "quota: '12' is not possible" in r.stderr and "0 or from 4.00 KiB" in r.stderr, r.stderr
    assert "tiny" not in kvd.kvctl("quota", "ls").stdout
    kvd.kvctl("quota", "set", "known", "1MiB")
    kvd.kvctl("quota", "set", "nosuch", "1MiB", "--create")
    assert "nosuch" in kvd.kvctl("quota", "ls").stdout


# -- JSON -------------------------------------------------------------------------------------------------------------

MOVING = {"uptime_ms", "idle_ms", "age_ms", "rss_bytes", "text", "calls"}  # between two calls


def same(a, b, at=""):
    assert type(a) is type(b), (at, a, b)
    if isinstance(a, dict):
        assert list(a) == list(b), (at, list(a), list(b))
        for key in a:
            if key in MOVING:
                assert type(a[key]) is type(b[key]), (at, key)
            else:
                same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), at
        for x, y in zip(a, b):
            same(x, y, at + "[]")
    else:
        assert a == b, (at, a, b)


def as_protobuf(message):
    """A message in protobuf's JSON, with fields that have their default; releases from 5.26 on call the option otherwise."""
    new = "always_print_fields_with_no_presence" in inspect.signature(json_format.MessageToDict).parameters
    default = "always_print_fields_with_no_presence" if new else "including_default_value_fields"
    return json_format.MessageToDict(message, preserving_proto_field_name=True, **{default: True})


def test_head_dims_of_data_free_sets(tmp_path):
    for dim in ("72", "4294967376", "+80", ""):
        r = run("--store", tmp_path, "calib", "hadamard", "m@t", "0-3", dim)
        assert r.returncode and "one of 64, 80, 96, 112, 128, 192 and 256" in r.stderr
    assert run("--store", tmp_path, "calib", "hadamard", "m@t", "0-3", "80").returncode == 0


def test_json_is_what_protobuf_makes_of_the_reply(start, folder):
    store = folder / "store"
    assert run("--store", store, "calib", "hadamard", "m/m@t", "0-3", "64").returncode == 0
    kvd = start("--store", f"file://{store}")
    rpc = Rpc(kvd.address)
    s = rpc.kv("OpenSession", layout=layout(), client_name="somebody").session
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=2).sequences
    rpc.kv("PublishSequence", session=s, sequence=seq[0], name="a-name")

    def reply(method, **fields):
        return as_protobuf(rpc.admin(method, **fields))

    def operator(method, **fields):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as fd:
            fd.connect(f"{kvd.socket}.fd")
            ticket = fd.recv(4096)[8:40].decode()
            return as_protobuf(rpc.admin(method, metadata=(("kvd-ticket", ticket),), **fields))

    operator("SetQuota", namespace_name="none", quota_bytes=64 << 20, create=True)  # a namespace without sequences
    unknown = kvd.kvctl("sequences", "nobody", check=False)
    assert unknown.returncode != 0 and "there is no namespace 'nobody'" in unknown.stderr and not unknown.stdout
    for command, want in {
        "status": lambda: reply("GetStatus"), "workers": lambda: reply("ListSessions"),
        "sequences": lambda: reply("ListSequences"), "sequences none": lambda: reply("ListSequences", namespace_name="none"),
        "pool": lambda: reply("GetPool"), "quota ls": lambda: reply("ListNamespaces"),
        "tier status": lambda: reply("ListTiers"), "metrics": lambda: reply("GetMetrics"), "calib ls": lambda: reply("ListRotationSets"),
        "calib fetch m/m@t": lambda: operator("FetchRotationSet", name="m/m@t"),
        "quota set default 64MiB": lambda: operator("SetQuota", namespace_name="default", quota_bytes=64 << 20),
        "evict --namespace default": lambda: operator("Evict", namespace_name="default"),
        "log-level info": lambda: operator("SetLogLevel", level="info"), "reload": lambda: operator("Reload"),
    }.items():
        expected = want()  # once, so that what changes by being done has been done
        got = json.loads(kvd.kvctl("--json", *command.split()).stdout)
        expected = want()
        order = {key: expected[key] for key in got if key in expected}  # the order of fields is protobuf's affair
        assert set(got) == set(expected), command
        same(sort_fields(got), sort_fields(order), command)
    # Ids have all 64 bits: numbers of JSON would be rounded by JavaScript, jq and others, and signed ones are wrong.
    listed = json.loads(kvd.kvctl("--json", "sequences").stdout)["sequences"]
    assert {int(x["sequence"]) for x in listed} == set(seq) and all(isinstance(x["sequence"], str) for x in listed)


def sort_fields(x):
    if isinstance(x, dict):
        return {k: sort_fields(x[k]) for k in sorted(x)}
    return [sort_fields(y) for y in x] if isinstance(x, list) else x


# -- finding the daemon ------------------------------------------------------------------------------------------------

def test_the_daemon_is_found(start, folder):
    runtime = folder / "run"
    env = {"KVD_RUNTIME_DIR": str(runtime), "KVD_ADDRESS": ""}
    runtime.mkdir()
    r = run("status", env=env)
    assert r.returncode == 3 and "no kvd listens" in r.stderr and str(runtime) in r.stderr
    (runtime / "0").mkdir()
    (runtime / "1").mkdir()
    one = start("--listen", f"unix:{runtime}/0/kvd.sock")
    r = run("status", env=env)
    assert r.returncode == 0 and f"{runtime}/0/kvd.sock" in r.stdout
    # What nobody listens on any more is not in the way.
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(f"{runtime}/1/kvd.sock")
    assert run("status", env=env).returncode == 0
    os.unlink(runtime / "1/kvd.sock")
    (folder / "b").mkdir()
    two = Daemon(folder / "b", "--listen", f"unix:{runtime}/1/kvd.sock")
    try:
        r = run("status", env=env)
        assert r.returncode == 2 and f"{runtime}/0/kvd.sock" in r.stderr and "--instance 1" in r.stderr and not r.stdout
        assert r.stderr.count("\n") == 1 and "\\x" not in r.stderr and f"{runtime}/1/kvd.sock (--instance 1)" in r.stderr, r.stderr
        for command in ("version", "bench"):
            r = run(command, env=env)
            assert r.returncode == 2 and "there are 2 daemons" in r.stderr, (command, r.returncode, r.stderr)
        assert run("evict", "--all", "--yes", env=env).returncode == 2  # not at whichever comes first
        for name, d in (("0", one), ("1", two)):
            got = json.loads(run("--json", "status", "--instance", name, env=env).stdout)
            assert got["pid"] == d.process.pid
        assert run("status", "--instance", "2", env=env).returncode == 3
        assert run("status", "--instance", "1", "--address", one.address, env=env).returncode == 2
        both = json.loads(run("status", "--all", "--json", env=env).stdout)
        assert {x["instance"]: x["reply"]["pid"] for x in both} == {"0": one.process.pid, "1": two.process.pid}
        assert {x["address"] for x in both} == {f"unix:{runtime}/{n}/kvd.sock" for n in "01"}
        # One that does not answer is told, and the others are shown all the same.
        def told(pace):
            r = run("status", "--all", "--json", "--timeout", pace, env=env)
            assert r.returncode == 1 and {x["instance"]: x["reply"] is None for x in json.loads(r.stdout)} == {"": True, "0": False, "1": False}

        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(f"{runtime}/kvd.sock")
            silent.listen()
            at_some_pace(told)
        os.unlink(runtime / "kvd.sock")
        text = run("--all", "pool", env=env).stdout
        assert "== 0: unix:" in text and "== 1: unix:" in text and text.count("extents granted") == 2
        # An address that is named is taken without looking.
        assert run("status", env={**env, "KVD_ADDRESS": two.address}).returncode == 0
        # What steers goes to each of them, too.
        assert run("log-level", "info", "--all", env=env).stdout.count("info (was ") == 2
        assert [x["reply"]["applied"] for x in json.loads(run("reload", "--all", "--json", env=env).stdout)] == [True, True]
        r = run("drain", "1", "--all", env=env)
        assert r.returncode == 2 and "say --yes" in r.stderr and two.process.poll() is None
        assert run("drain", "1", "--all", "--yes", env=env).stdout.count("draining; 0 sessions") == 2
        assert one.process.wait(20) == two.process.wait(20) == 0
    finally:
        assert two.stop() == 0


# -- reload ------------------------------------------------------------------------------------------------------------

BEFORE = """[kvd]
drain-timeout = 5s
max-queue = 100
[namespace a]
quota = 10MiB
[namespace b]
quota = 20MiB
allow-uid = 0
"""


def quota(kvd, name):
    return {n["name"]: int(n["quota_bytes"]) >> 20 for n in json.loads(kvd.kvctl("--json", "quota", "ls").stdout)["namespaces"]}.get(name)


def hang_up(kvd):
    before, end = kvd.text().count("configuration reloaded"), time.time() + 20
    kvd.process.send_signal(signal.SIGHUP)
    while kvd.text().count("configuration reloaded") == before and time.time() < end:
        time.sleep(0.02)


def test_a_reload_without_a_file_says_so(shared):
    assert shared.kvctl("reload").stdout == "nothing has changed: kvd was started without --config, and has no file to read\n"


def test_reload_tells_what_it_did(start):
    kvd = start(config=BEFORE)
    file = kvd.folder / "kvd.conf"
    assert kvd.kvctl("reload").stdout == "nothing has changed\n" and json.loads(kvd.kvctl("--json", "reload").stdout)["files"] == [str(file)]
    assert kvd.metric("kvd_config_last_reload_successful") == 1
    stamp = kvd.metric("kvd_config_last_reload_success_timestamp_seconds")
    assert abs(stamp - time.time()) < 60

    # A broken file changes nothing, says every line, and fails.
    file.write_text("[kvd]\nmax-queue = none\nlog-level = loud\ndrain-timeout = 1s\n")
    r = kvd.kvctl("reload", check=False)
    assert r.returncode == 1 and f"{file}:2: max-queue" in r.stderr and f"{file}:3: log-level" in r.stderr
    assert "the old configuration stays" in r.stderr and quota(kvd, "a") == 10
    assert kvd.metric("kvd_config_last_reload_successful") == 0
    assert kvd.metric("kvd_config_last_reload_success_timestamp_seconds") == stamp
    got = kvd.kvctl("--json", "reload", check=False)
    assert got.returncode == 1 and json.loads(got.stdout)["applied"] is False and len(json.loads(got.stdout)["errors"]) == 2

    # A good one: what changed, and what wants a restart.
    file.write_text(BEFORE.replace("max-queue = 100", "max-queue = 50\nmax-sequences = 100").replace("10MiB", "11MiB")
                    .replace("allow-uid = 0", "allow-uid = 0, 7"))
    out = kvd.kvctl("reload").stdout
    assert "changed: max-queue: 100, now 50" in out and "wants a restart: max-sequences: 65536, now 100" in out
    assert "namespace a: quota: 10.0 MiB, now 11.0 MiB" in out and "namespace b: allow-uid: 0, now 0, 7" in out
    assert quota(kvd, "a") == 11 and kvd.metric("kvd_config_last_reload_successful") == 1
    assert "wants a restart" in kvd.kvctl("reload").stdout  # still

    # A namespace that is no longer named has no quota, and as it is empty it goes.
    file.write_text("[namespace a]\nquota = 11MiB\n")
    assert "namespace b: no longer configured" in kvd.kvctl("reload").stdout
    assert quota(kvd, "b") is None and quota(kvd, "a") == 11


def test_what_is_set_at_run_time_outlives_a_reload_until_the_file_says_otherwise(start):
    kvd = start(config=BEFORE)
    file = kvd.folder / "kvd.conf"
    kvd.kvctl("quota", "set", "a", "99MiB")
    kvd.kvctl("log-level", "debug")
    file.write_text(BEFORE.replace("max-queue = 100", "max-queue = 50"))
    out = kvd.kvctl("reload").stdout
    assert "kept: namespace a: a quota of 99.0 MiB was set at run time" in out and "kept: log-level: debug" in out
    assert quota(kvd, "a") == 99
    hang_up(kvd)  # the same by the signal
    assert quota(kvd, "a") == 99 and wait_for(lambda: "was set at run time and stays" in kvd.text())
    file.write_text(BEFORE.replace("10MiB", "12MiB").replace("[kvd]", "[kvd]\nlog-level = notice"))
    kvd.kvctl("reload")
    assert quota(kvd, "a") == 12 and "log level notice" in kvd.kvctl("status").stdout


def test_the_command_line_outlives_a_reload(start, folder):
    """The fixture says --drain-timeout 200ms; the store is said here."""
    kvd = start("--store", f"file://{folder}/mine", config="[kvd]\nstore = /file\ndrain-timeout = 60m\nmax-queue = 5\n")
    (kvd.folder / "kvd.conf").write_text("[kvd]\nstore = /other\ndrain-timeout = 30m\nmax-queue = 6\n")
    for how in ("signal", "call"):
        if how == "signal":
            hang_up(kvd)
        else:
            kvd.kvctl("reload")
        assert json.loads(kvd.kvctl("--json", "status").stdout)["store"] == f"file://{folder}/mine"
    rpc = Rpc(kvd.address)
    rpc.kv("OpenSession", layout=layout())
    begin = time.time()
    assert kvd.stop() == 0 and time.time() - begin < 15  # not half an hour


def test_reloads_side_by_side(start):
    """One at a time; of signals, the last finds the last file."""
    kvd = start(config="[namespace a]\nquota = 1MiB\n")
    for i in range(2, 12):
        (kvd.folder / "new").write_text(f"[namespace a]\nquota = {i}MiB\n")
        os.rename(kvd.folder / "new", kvd.folder / "kvd.conf")
        kvd.process.send_signal(signal.SIGHUP)
    calls = [subprocess.Popen([KVCTL, "--address", kvd.address, "reload"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
             for _ in range(6)]
    for c in calls:
        _, said = c.communicate(timeout=30)
        assert c.returncode == 0 or "another reload is under way" in said
    end = time.time() + 10
    while quota(kvd, "a") != 11 and time.time() < end:
        time.sleep(0.05)
    assert quota(kvd, "a") == 11


def test_only_operators_reload(start):
    kvd = start()
    with pytest.raises(Exception) as e:
        Rpc(kvd.address).admin("Reload")
    assert e.value.code().name == "PERMISSION_DENIED"


def test_words_that_are_nearly_commands(shared):
    """What is nearly a command is told of, and what is nothing like one is not guessed at."""
    for line, near in (("statsu", "status"), ("qouta", "quota"), ("quota st", "quota set"), ("drian", "drain"), ("xyzzy", None), ("x" * 99, None)):
        r = run(*line.split())
        assert r.returncode == 2 and (f"perhaps '{near}'" in r.stderr) == bool(near) and ("perhaps" in r.stderr) == bool(near), r.stderr
    assert run("evict").stderr.endswith("; see kvctl evict --help\n")


def test_addresses_that_are_none(shared):
    """They are refused before a resolver is asked, in words of kvd."""
    for wrong in ("", "unix:", "somewhere", "/run/kvd/kvd.sock", ":7000", "host:", "host:x", "host:0", "host:65536", "host:-1"):
        tries = [run("--address", wrong, "status")] + ([run("status", env={"KVD_ADDRESS": wrong})] if wrong else [])
        for r in tries:
            assert r.returncode == 2 and "unix:PATH or HOST:PORT is wanted" in r.stderr and len(r.stderr.splitlines()) == 1, (wrong, r.stderr)
    assert "perhaps unix:/run/kvd/kvd.sock" in run("--address", "/run/kvd/kvd.sock", "status").stderr
    assert run("--address", "[::1]:1", "status").returncode == 3
    long = "unix:/" + "x" * 95
    for r in (run("--address", long, "status"), run("status", env={"KVD_ADDRESS": long}), run("--address", long, "log-level", "info")):
        assert r.returncode == 2 and "unix:/absolute/path (at most 95 characters)" in r.stderr, r.stderr
    assert run("--address", long[:-1], "status").returncode == 3


def test_options_of_tls_that_do_not_go_together(shared):
    """They are refused, and nothing is said in the clear."""
    for options, words in (("--tls-ca x --tls-cert x", "tls_cert and tls_key"), ("--tls-ca x --tls-key x", "tls_cert and tls_key"),
                           ("--tls-cert x --tls-key x", "TLS wants tls_ca"), ("--tls-cert x", "tls_cert and tls_key")):
        for command in ("status", "log-level info"):
            r = run("--address", "127.0.0.1:1", *options.split(), *command.split())
            assert r.returncode == 2 and words in r.stderr, (options, r.returncode, r.stderr)
    for command in ("status", "log-level info", "version", "bench"):
        r = run("--address", shared.address, "--tls-ca", "x", *command.split())
        assert r.returncode == 2 and f"TLS is for host:port, not for {shared.address}" in r.stderr, r.stderr
    r = run("--address", "127.0.0.1:1", "status")
    assert r.returncode == 3 and "if it speaks TLS, say --tls-ca, --tls-cert and --tls-key" in r.stderr
    assert "TLS" not in run("--address", "unix:/none", "status").stderr


def test_what_bench_wants(shared):
    r = run("--address", "127.0.0.1:1", "bench")
    assert r.returncode == 2 and "unix: address" in r.stderr, r.stderr
    r = run("--address", shared.address, "bench", "--tokens", "64")
    assert r.returncode == 0 and r.stdout.count("64 tokens; bytes of bf16") == 2 and "512 tokens" not in r.stdout, r.stdout + r.stderr


def test_the_list_of_commands_is_a_table(shared):
    """No line of it begins at the edge because the one above was too long."""
    text = run("--help").stdout
    for line in text[text.index("Commands:"):text.index("kvctl help COMMAND")].splitlines()[1:]:
        assert len(line) < 80 and (not line or line.startswith("  ")), line
