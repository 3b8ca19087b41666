"""What Prometheus sees: names in rules and panels exist, alerts fire when they should, and every panel has data."""
import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request

import grpc
import pytest

from conftest import SOURCE, Daemon, Rpc, best_of_three, free_port, layout, kv
from test_death import wait_for

RULES = SOURCE / "deploy/prometheus/kvd.rules.yml"
DASHBOARD = json.loads((SOURCE / "deploy/grafana/kvd.json").read_text())
EXPRESSIONS = [t["expr"] for p in DASHBOARD["panels"] for t in p["targets"]]
prometheus = pytest.mark.skipif(not shutil.which("promtool"), reason="prometheus is not installed")


def get(url):
    with urllib.request.urlopen(url, timeout=10) as r:
        return r.read().decode()


def append(rpc, session, seq, tokens, at=0):
    """head_dim 64, two layers and two kv heads, as layout() has them."""
    data = b"\x80\x3f" * (2 * tokens * 2 * 64)
    item = kv.AppendItem(sequence=seq, position=at, tokens=tokens, k=kv.TensorRef(inline_data=data), v=kv.TensorRef(inline_data=data))
    rpc.kv("Append", session=session, items=[item])


def warm(kvd, name="warm"):
    """Fills the pool with published sequences that nobody holds, until the first are evicted."""
    rpc = Rpc(kvd.address)
    s = rpc.kv("OpenSession", layout=layout(codec="bf16"), client_name=name).session
    for i in range(40):
        seq = rpc.kv("CreateSequences", session=s, request_id=10 + i, count=1).sequences[0]
        append(rpc, s, seq, 1000)
        rpc.kv("PublishSequence", session=s, sequence=seq, name=f"p{i}")
        rpc.kv("FreeSequences", session=s, sequences=[seq])
    return rpc


def fill(kvd):
    """Fills the pool with sequences in use, until it refuses. Returns a function that is refused once more."""
    rpc = Rpc(kvd.address)
    s = rpc.kv("OpenSession", layout=layout(codec="bf16")).session
    seqs = rpc.kv("CreateSequences", session=s, request_id=1, count=50).sequences
    with pytest.raises(grpc.RpcError) as e:
        for seq in seqs:
            append(rpc, s, seq, 500)
    assert e.value.code().name == "RESOURCE_EXHAUSTED"
    for seq in seqs:  # and the last crumbs
        for tokens in (64, 16):
            try:
                append(rpc, s, rpc.kv("CreateSequences", session=s, request_id=1000 + seq % 10**9 + tokens, count=1).sequences[0], tokens)
            except grpc.RpcError:
                break

    def again():
        with pytest.raises(grpc.RpcError):
            append(rpc, s, seqs[-1], 500)

    return again


SMALL = ("--pool-size", "8MiB", "--extent-size", "2MiB")
TIER = "[kvd]\ntier-host = 64MiB\n"  # panels show it


def test_evictable_and_refusals_are_told(start):
    kvd = start(*SMALL)
    warm(kvd)
    size = kvd.metric("kvd_pool_size_bytes")
    assert kvd.metric('kvd_pool_bytes{state="used"}') > 0.6 * size and kvd.metric("kvd_pool_evictions_total") > 0
    assert wait_for(lambda: kvd.metric("kvd_pool_evictable_bytes") == kvd.metric('kvd_pool_bytes{state="used"}'))  # it may be a second old
    assert kvd.metric('kvd_namespace_evictable_bytes{namespace="default"}') == kvd.metric("kvd_pool_evictable_bytes")
    assert kvd.metric('kvd_refused_calls_total{reason="pool"}') == 0
    again = fill(kvd)
    again()
    assert kvd.metric('kvd_refused_calls_total{reason="pool"}') >= 2
    assert wait_for(lambda: kvd.metric("kvd_pool_evictable_bytes") == 0)
    status = json.loads(kvd.kvctl("--json", "status").stdout)
    assert int(status["refused_calls"]) >= 2 and int(status["evictions"]) > 0 and status["evictable_bytes"] == "0"


def test_how_old_what_went_was_is_told(start, folder):
    """By namespace, of what went for want of room, and by tier; not of what an operator or a worker dropped."""
    kvd = start(*SMALL, config=f"[kvd]\ntier-host = 1MiB\ntier-directory = {folder}/blocks 1GiB\n")

    rpc = Rpc(kvd.address)
    s = rpc.kv("OpenSession", layout=layout(codec="bf16")).session

    def publish(i):
        seq = rpc.kv("CreateSequences", session=s, request_id=10 + i, count=1).sequences[0]
        append(rpc, s, seq, 1024)
        rpc.kv("PublishBlocks", session=s, items=[kv.PublishItem(sequence=seq, keys=kv.PrefixKeys(tokens=i.to_bytes(4, "little") + bytes(4 * 1023)))])
        rpc.kv("FreeSequences", session=s, sequences=[seq])

    publish(0)
    kvd.kvctl("evict", "--namespace", "default")
    age = 'kvd_prefix_eviction_age_seconds_%s{namespace="default"%s}'
    assert kvd.metric(age % ("count", "")) == 0
    for i in range(1, 40):
        publish(i)
    went = kvd.metric(age % ("count", ""))
    assert went > 0
    assert went == sum(kvd.metric(f'kvd_prefix_removed_blocks_total{{namespace="default",reason="{r}"}}') for r in ("room", "quota", "index"))
    assert kvd.metric(age % ("bucket", ',le="300"')) == kvd.metric(age % ("bucket", ',le="+Inf"')) == went
    tier = 'kvd_tier_lost_blocks_total{tier="%s",reason="%s"}'
    assert wait_for(lambda: kvd.metric(tier % ("host", "room")) > 0)
    assert kvd.metric(tier % ("directory", "room")) == 0 and kvd.metric(tier % ("host", "expired")) == 0
    assert kvd.metric('kvd_tier_eviction_age_seconds_count{tier="host"}') > 0
    assert kvd.metric('kvd_tier_eviction_age_seconds_count{tier="directory"}') == 0


def test_top_tells_rates(start):
    kvd = start(*SMALL)
    stop = threading.Event()

    def work():
        rpc = Rpc(kvd.address)
        s = rpc.kv("OpenSession", layout=layout(codec="bf16")).session
        for i in range(10**6):
            if stop.is_set():
                return
            seq = rpc.kv("CreateSequences", session=s, request_id=10 + i, count=1).sequences[0]
            append(rpc, s, seq, 100)
            rpc.kv("FreeSequences", session=s, sequences=[seq])

    t = threading.Thread(target=work)
    t.start()

    def told():
        out = kvd.kvctl("top", "0.5", "3").stdout
        rates = re.findall(r"rates +([\d.]+) calls, ([\d.]+) tokens appended, ([\d.]+) queries attended", out)
        assert out.count("from the second look on") == 1 and len(rates) == 2
        assert all(float(calls) > 3 and float(tokens) > 100 for calls, tokens, _ in rates), out

    try:
        best_of_three(told)
    finally:
        stop.set()
        t.join()


def test_process_and_identity(start):
    kvd = start()
    page = get(f"http://127.0.0.1:{kvd.metrics_port()}/metrics")
    values = dict(re.findall(r"^(\w+) (\S+)$", page, re.M))
    status = open(f"/proc/{kvd.process.pid}/status").read()
    assert abs(float(values["process_start_time_seconds"]) - time.time()) < 120
    assert abs(float(values["process_open_fds"]) - len(os.listdir(f"/proc/{kvd.process.pid}/fd"))) <= 3
    assert float(values["process_max_fds"]) >= float(values["process_open_fds"])
    assert abs(float(values["process_resident_memory_bytes"]) / 1024 / int(re.search(r"VmRSS:\s+(\d+)", status)[1]) - 1) < 0.2
    assert float(values["process_virtual_memory_bytes"]) > float(values["process_resident_memory_bytes"])
    assert float(values["process_threads"]) >= 3 and float(values["process_cpu_seconds_total"]) > 0
    device = json.loads(kvd.kvctl("--json", "status").stdout)["device"]
    assert f'device="{device}"' in page and values["kvd_draining"] == "0"


def test_each_series_is_there_once_and_has_a_name(start):
    page = get(f"http://127.0.0.1:{start().metrics_port()}/metrics")
    series = [line.rsplit(" ", 1)[0] for line in page.splitlines() if not line.startswith("#")]
    assert "(null)" not in page and len(series) == len(set(series))
    assert 'kvd_share_used{share="sequences"}' in series


def names(expression):
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|on|without) \([^)]*\)", "", expression)
    return set(re.findall(r"\b((?:kvd|process)_[a-z_]+)", bare))


def test_names_in_rules_and_panels_exist(start):
    kvd = start(*SMALL, config=TIER)
    kvd.kvctl("tier", "flush", "host")  # results of operations are there when there were some
    warm(kvd)
    page = get(f"http://127.0.0.1:{kvd.metrics_port()}/metrics")
    have = set(re.findall(r"^# TYPE (\S+) (?:counter|gauge)$", page, re.M))
    for name in re.findall(r"^# TYPE (\S+) histogram$", page, re.M):
        have |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    rules = re.findall(r"expr: (?:>-\n)?((?:.*\n)+?) +(?:for|labels):", RULES.read_text())
    assert len(rules) >= 10 and len(EXPRESSIONS) >= 20
    for expression in rules + EXPRESSIONS:
        found = names(expression)
        assert found <= have and (found or "up{" in expression), (expression, found - have)
    assert len({p["id"] for p in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@prometheus
def test_rules_fire_as_written():
    for what in (["check", "rules", RULES], ["check", "config", SOURCE / "deploy/prometheus/prometheus.yml"],
                 ["test", "rules", SOURCE / "tests/data/kvd.rules.test.yml"]):
        r = subprocess.run(["promtool", *what], capture_output=True, text=True, timeout=60)
        assert r.returncode == 0, r.stdout + r.stderr


@prometheus
def test_a_pool_that_refuses_fires_and_a_warm_cache_does_not(start, folder):
    """The shipped rules in a real Prometheus, with minutes made seconds; and every panel has data.

    KVD_ALERTS_AS_SHIPPED=1 leaves the rules as they are, which takes some 12 minutes; -s prints what fired."""
    as_shipped = bool(os.environ.get("KVD_ALERTS_AS_SHIPPED"))
    (folder / "full").mkdir()
    cache = start(*SMALL, config=TIER)
    full = Daemon(folder / "full", *SMALL)
    server, stop = None, threading.Event()
    try:
        again = fill(full)
        warm(cache)
        cache.kvctl("quota", "set", "default", "8MiB")  # a panel shows quotas

        def go_on():
            rpc = warm(cache, "more")
            s = rpc.kv("OpenSession", layout=layout(codec="bf16")).session
            while not stop.wait(0.2):
                again()
                seq = rpc.kv("AttachSequence", session=s, name="p39").sequence.sequence
                q = kv.TensorRef(inline_data=b"\x80\x3f" * (2 * 4 * 64))
                rpc.kv("Attend", session=s, items=[kv.AttendItem(sequence=seq, q_len=1, q=q)])
                rpc.kv("FreeSequences", session=s, sequences=[seq])

        worker = threading.Thread(target=go_on)
        worker.start()
        shrink = lambda text: text if as_shipped else re.sub(r"for: \d+m", "for: 1s", re.sub(r"\[\d+m\]", "[3s]", text))
        (folder / "rules.yml").write_text(shrink(RULES.read_text()))
        port, targets = free_port(), {f"127.0.0.1:{d.metrics_port()}": d for d in (cache, full)}
        (folder / "p.yml").write_text(f"""
global: {{scrape_interval: 500ms, evaluation_interval: 500ms}}
rule_files: [rules.yml]
scrape_configs: [{{job_name: kvd, static_configs: [{{targets: {json.dumps(list(targets))}}}]}}]
""")
        server = subprocess.Popen(["prometheus", f"--config.file={folder}/p.yml", f"--storage.tsdb.path={folder}/tsdb",
                                   f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL)

        def query(expression):
            url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(expression)}"
            return json.loads(get(url))["data"]["result"]

        def firing():
            return {(targets[a["metric"]["instance"]] is full, a["metric"]["alertname"])
                    for a in query('ALERTS{alertstate="firing"}')}

        wanted = {(True, "KvdRefuses"), (True, "KvdPoolFull")}
        missing, fired, end = EXPRESSIONS, set(), time.time() + (400 if as_shipped else 60)
        while time.time() < end and (missing or not wanted <= fired):
            time.sleep(0.5)
            try:
                fired = firing()
                missing = [e for e in missing if not query(shrink(e.replace("$instance", ".*")))]
            except OSError:
                continue  # it starts
        assert wanted <= fired, fired
        assert missing == []
        time.sleep(330 if as_shipped else 1.6)  # long enough for the same rules to fire for the other
        # Where the machine stalls, a call of that one waits too, and a second of it is ten minutes here: what is wrong goes on firing.
        wait_for(lambda: {name for is_full, name in firing() if not is_full} <= {"KvdEvictions"}, 30)
        fired = firing()
        print(f"\n{len(EXPRESSIONS)} expressions of {len(DASHBOARD['panels'])} panels have data; firing for the pool that refuses: "
              f"{sorted(n for is_full, n in fired if is_full)}, for the warm cache: {sorted(n for is_full, n in fired if not is_full)}")
        assert {name for is_full, name in fired if not is_full} <= {"KvdEvictions"}
        groups = json.loads(get(f"http://127.0.0.1:{port}/api/v1/rules"))["data"]["groups"]
        assert all(r.get("lastError", "") == "" for g in groups for r in g["rules"])
    finally:
        stop.set()
        if server:
            server.terminate()
            server.wait(20)
        worker.join()
        assert full.stop() == 0
