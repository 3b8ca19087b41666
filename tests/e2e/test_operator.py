"""kvctl, metrics, Prometheus and TLS: what an operator meets."""
import json
import os
import pathlib
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import grpc
import pytest

from conftest import KVCTL, KVD, WORKER, Rpc, admin, certificates, free_port, layout


def get(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as r:
            return r.status, r.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def test_every_command_answers_people_and_scripts(kvd, rpc):
    s = rpc.kv("OpenSession", layout=layout(), client_name="somebody").session
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
    rpc.kv("PublishSequence", session=s, sequence=seq, name="a-name")
    for command, words in {
        "status": "ready", "workers": "somebody", "sequences": "a-name", "pool": "extents", "quota ls": "default",
        "ping 2": "avg", "version": "0.1.0", "top 0.1 2": "somebody", "metrics": "kvd_build_info",
        "calib ls": "no store is configured, and the cache has no sets", "quota set default 64MiB": "set", "log-level debug": "was info",
        "evict --all --yes": "evicted 0", "sequences default": "a-name", "doctor": "fd socket",
        "bench --tokens 600": "of limit",
    }.items():
        assert words in kvd.kvctl(*command.split()).stdout, command
        if not command.startswith("top"):
            json.loads(kvd.kvctl("--json", *command.split()).stdout)
    assert json.loads(kvd.kvctl("--json", "status").stdout)["sessions"] == 1
    status = json.loads(kvd.kvctl("--json", "status").stdout)
    doctor = kvd.kvctl("doctor").stdout
    assert (status["backend"] == "cpu") == bool(status["no_gpu"]) and status["no_gpu"] in doctor
    huge = pathlib.Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if huge.exists() and status["backend"] == "cpu":
        chosen = re.search(r"\[(.*)\]", huge.read_text())[1]
        assert f"{huge} is {chosen}" in doctor


def test_versions_are_one(kvd, rpc):
    version = subprocess.run([KVD, "--version"], capture_output=True, text=True).stdout.split()[1]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\+(\d+\.)?g[0-9a-f]{7,}(\.dirty)?)?", version), version
    assert json.loads(kvd.kvctl("--json", "version").stdout) == {"kvctl": version, "kvd": version}
    assert kvd.kvctl("--version").stdout == f"kvctl {version}\n"
    assert rpc.kv("OpenSession", layout=layout()).version == version
    assert f'kvd_build_info{{version="{version}",' in kvd.kvctl("metrics").stdout and f"version={version} " in kvd.text()


def test_exit_codes(kvd, folder):
    assert kvd.kvctl("nonsense", check=False).returncode == 2
    assert kvd.kvctl("quota", "set", "default", "many", check=False).returncode == 2
    assert kvd.kvctl("log-level", "loud", check=False).returncode == 2
    assert kvd.kvctl("evict", "--namespace", "none", check=False).returncode == 1
    r = subprocess.run([KVCTL, "--address", f"unix:{folder}/nobody", "status"], capture_output=True, text=True)
    assert r.returncode == 3 and "is kvd running there" in r.stderr
    assert subprocess.run([KVCTL], capture_output=True).returncode == 2
    help_text = subprocess.run([KVCTL, "--help"], capture_output=True, text=True)
    assert help_text.returncode == 0 and "log-level" in help_text.stdout


def test_evict_by_name_spares_the_living(kvd, rpc):
    s = rpc.kv("OpenSession", layout=layout()).session
    a, b = rpc.kv("CreateSequences", session=s, request_id=1, count=2).sequences
    rpc.kv("PublishSequence", session=s, sequence=a, name="a")
    rpc.kv("PublishSequence", session=s, sequence=b, name="b")
    rpc.kv("FreeSequences", session=s, sequences=[b])
    r = kvd.kvctl("evict", "--namespace", "default", "--name", "a", check=False)
    assert r.returncode == 1 and "live sequences are never evicted" in r.stderr
    assert "evicted 1" in kvd.kvctl("evict", "--namespace", "default", "--name", "b").stdout
    assert kvd.metric("kvd_sequences") == 1


def test_only_operators_steer(start):
    if os.getuid() != 0:
        pytest.skip("wants root, to be somebody else")
    kvd = start(config="[kvd]\nsocket-mode = 0666\n")
    os.chmod(kvd.folder, 0o755)
    su = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    run = lambda *a: subprocess.run([*su, KVCTL, "--address", kvd.address, *a], capture_output=True, text=True)
    if run("version").returncode != 0:
        pytest.skip("the build folder is closed to other users")
    assert run("status").returncode == 0
    for command in ("drain", "reload", "evict --all --yes", "quota set default 1MiB --create", "log-level debug"):
        r = run(*command.split())
        assert r.returncode == 4 and "for operators" in r.stderr, (command, r.stderr)
    with pytest.raises(grpc.RpcError) as e:  # and no ticket, no steering
        Rpc(kvd.address).admin("Drain")
    assert e.value.code().name == "PERMISSION_DENIED"


def test_who_may_not_use_the_socket_is_told_so(start):
    if os.getuid() != 0:
        pytest.skip("wants root, to be somebody else")
    kvd = start()
    os.chmod(kvd.folder, 0o755)
    su = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    run = lambda *a: subprocess.run([*su, KVCTL, "--address", kvd.address, *a], capture_output=True, text=True)
    if subprocess.run([*su, KVCTL, "--version"], capture_output=True).returncode != 0:
        pytest.skip("the build folder is closed to other users")
    for command in ("status", "log-level info", "events default"):
        r = run(*command.split())
        assert r.returncode == 4 and "join the socket's group" in r.stderr and "is kvd running" not in r.stderr, (command, r.stderr)
    r = run("doctor")
    assert r.returncode == 1 and f"{kvd.socket}: you may not use it" in r.stdout and f"{kvd.socket}.fd: you may not use it" in r.stdout, r.stdout


def test_drain(kvd):
    assert "draining" in kvd.kvctl("drain", 1).stdout
    assert kvd.process.wait(20) == 0


def test_metrics_pages(kvd):
    assert subprocess.run([WORKER, kvd.address], timeout=120).returncode == 0
    port = kvd.metrics_port()
    status, page = get(port, "/metrics")
    assert status == 200 and 'kvd_rpc_requests_total{method="kvd.v1.KvCache/Append",code="OK"}' in page
    assert get(port, "/healthz") == (200, "ok\n") and get(port, "/readyz") == (200, "ready\n")
    assert get(port, "/other")[0] == 404
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed")
    r = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True)
    assert r.returncode == 0 and not r.stderr and not r.stdout, r.stderr


def test_metrics_for_many_at_once(kvd, rpc):
    """One page for all who ask within a while, and none that is older than its question."""
    ask = rpc.channel.unary_unary("/kvd.v1.Admin/GetMetrics", request_serializer=lambda m: m.SerializeToString(),
                                  response_deserializer=admin.GetMetricsReply.FromString)
    began = time.time()
    replies = [ask.future(admin.GetMetricsRequest(), timeout=20) for _ in range(100)]
    texts = {f.result().text for f in replies}
    assert len(texts) <= 3 + (time.time() - began) / 0.05  # else each says another number of calls
    gone = [ask.future(admin.GetMetricsRequest(), timeout=20) for _ in range(50)]
    for f in gone[::2]:
        f.cancel()
    for n in range(1, 6):
        rpc.kv("OpenSession", layout=layout())
        assert f"\nkvd_sessions {n}\n" in rpc.admin("GetMetrics").text
    assert all(f.result().text for f in gone[1::2])


def test_mutual_tls(start, folder):
    certificates(folder, server="IP:127.0.0.1", ops="DNS:ops", guest="DNS:guest")
    port = free_port()
    kvd = start("--listen", f"127.0.0.1:{port}", config=f"""
[kvd]
admin-cn = ops
[tls]
cert = {folder}/server.pem
key = {folder}/server.key
client-ca = {folder}/ca.pem
[namespace closed]
allow-cn = ops
""")
    base = [KVCTL, "--address", f"127.0.0.1:{port}", "--timeout", "20", "--tls-ca", f"{folder}/ca.pem"]
    as_ = lambda n: [*base, "--tls-cert", f"{folder}/{n}.pem", "--tls-key", f"{folder}/{n}.key"]
    run = lambda *a: subprocess.run([*map(str, a)], capture_output=True, text=True)
    assert run(*as_("guest"), "status").returncode == 0
    assert run(*as_("guest"), "log-level", "debug").returncode == 4
    assert run(*as_("ops"), "log-level", "debug").returncode == 0
    assert run(*base, "status").returncode == 3  # no certificate
    assert run(*base[:3], "--timeout", "2", "status").returncode in (1, 3)  # no TLS at all
    for command in ("status", "events default"):
        r = run(*base[:3], "--timeout", "20", *command.split())
        assert r.returncode == 3 and "if it speaks TLS, say --tls-ca, --tls-cert and --tls-key" in r.stderr, r.stderr

    def rpc(name):
        read = lambda f: (folder / f).read_bytes()
        return Rpc(f"127.0.0.1:{port}", credentials=grpc.ssl_channel_credentials(
            read("ca.pem"), read(f"{name}.key"), read(f"{name}.pem")))

    rpc("ops").kv("OpenSession", namespace_name="closed", layout=layout())
    with pytest.raises(grpc.RpcError) as e:
        rpc("guest").kv("OpenSession", namespace_name="closed", layout=layout())
    assert e.value.code().name == "PERMISSION_DENIED"
    assert isinstance(admin.PingReply(), object)
