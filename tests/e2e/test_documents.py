"""Man pages, the shipped configuration and completion name what the programs have: no more and no less."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import KVCTL, KVD, SOURCE

MAN = SOURCE / "deploy/man"


def program(path, *arguments):
    r = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, timeout=30)
    assert r.returncode == 0, r.stderr
    return r.stdout


def sections(text, head):
    """{name: text} of what `head` finds."""
    parts = re.split(head, text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def keys_of(text):
    """{section: {key: value}} of a file as --print-config prints it."""
    found = {}
    for name, body in sections(text, r"^\[(\S+).*\]$").items():
        found[name] = {m[1]: m[2] for m in re.finditer(r"^(?:# )?([\w-]+) =(?: (.*))?$", body, re.M)}
    return found


def table(folder):
    file = folder / "some.conf"
    # [tls] is printed where there is a certificate.
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", folder / "k", "-out", folder / "c", "-days", "2", "-subj", "/CN=x"], check=True,
                   capture_output=True)
    file.write_text(f"[namespace a]\n[tls]\ncert = {folder}/c\nkey = {folder}/k\n")
    return keys_of(program(KVD, "--print-config", "--config", file))


def test_every_key_is_documented(folder):
    have = table(folder)
    assert set(have) == {"kvd", "tls", "namespace"} and len(have["kvd"]) > 20
    page = sections((MAN / "kvd.conf.5.scd").read_text(), r"^# \[(\w+).*\]$")
    shipped = sections((SOURCE / "deploy/kvd.conf").read_text(), r"^#? ?\[(\w+).*\]$")
    for section, keys in have.items():
        assert sorted(re.findall(r"^\*([\w-]+)\*$", page[section], re.M)) == sorted(keys), section
        assert set(re.findall(r"^# ([a-z][\w-]*) =", shipped[section], re.M)) == set(keys), section
    # The defaults that the shipped file tells are those of the program.
    for m in re.finditer(r"^# ([\w-]+) = ?(\S*)$", shipped["kvd"], re.M):
        if m[1] in ("extent-size", "cache", "store", "store-public-key", "admin-cn", "tier-directory", "tier-redis",
                    "tier-redis-auth", "tier-secret"):
            continue  # computed, or an example
        assert have["kvd"][m[1]] in (m[2], f"{m[2]}s", None if not m[2] else m[2]), m[0]


def test_every_reloaded_key_says_so():
    """As the table in the code has it."""
    rows = re.findall(r'\{\{"(\w+)", "([\w-]+)", (RELOADED|AT_START)\}', (SOURCE / "daemon/core/config.c").read_text())
    page = sections((MAN / "kvd.conf.5.scd").read_text(), r"^# \[(\w+).*\]$")
    assert len(rows) > 25
    for section, key, when in rows:
        said = re.search(rf"^\*{key}\*\n((?:\t.*\n)+)", page[section], re.M)[1]
        assert ("Reloaded." in said) == (when == "RELOADED"), key


def test_a_printed_configuration_says_the_same(folder):
    file, again = folder / "a.conf", folder / "b.conf"
    file.write_text(f"[kvd]\npool-size = 100MiB\nlisten = unix:{folder}/s\nlisten = 127.0.0.1:7001\nmax-queue = 9\n"
                    "store-timeout = 1500ms\nadmin-uid = 0, 5\nmetrics =\n[namespace n]\nquota = 3MiB\nallow-gid = 0\n[namespace m]\n")
    text = program(KVD, "--print-config", "--config", file)
    again.write_text(text)
    assert program(KVD, "--print-config", "--config", again) == text and "quota = 3MiB" in text


def test_kvds_options_are_documented():
    options = set(re.findall(r"--([a-z][a-z-]+)", program(KVD, "--help")))
    page = (MAN / "kvd.8.scd").read_text()
    assert options - set(re.findall(r"\*--([a-z-]+)\*", page)) <= {"help", "usage", "version"}
    for code in (0, 64, 69, 70, 71, 78):
        assert f"*{code}*\n" in page
    for signal in ("SIGTERM", "SIGINT", "SIGHUP"):
        assert signal in page


def test_the_chat_workers_options_are_documented():
    shown = subprocess.run([sys.executable, "-m", "kvd_worker", "--help"], capture_output=True, text=True, timeout=30,
                           env={**os.environ, "PYTHONPATH": str(SOURCE / "client/python"), "COLUMNS": "200"})
    assert shown.returncode == 0, shown.stderr
    page = (MAN / "kvd-worker.1.scd").read_text()
    options = set(re.findall(r"^  (?:-h, )?--([a-z-]+)", shown.stdout, re.M))
    assert len(options) > 8 and set(re.findall(r"^(?:\*-h\*, )?\*--([a-z-]+)\*", page, re.M)) == options
    for name, default in re.findall(r"^  --([a-z-]+) .*\(default: (\d+)\b", shown.stdout, re.M):
        assert f"Default: {default}" in sections(page, r"^\*--([a-z-]+)\*")[name], name


def test_every_command_is_documented():
    have = json.loads(program(KVCTL, "--json", "help"))
    page = (MAN / "kvctl.1.scd").read_text()
    entries = sections(sections(page, r"^# ([A-Z ]+)$")["COMMANDS"], r"^(\*[a-z].*)$")
    found = {re.match(r"\*([a-z- ]+)\*", head)[1]: head + body for head, body in entries.items()}
    assert list(found) == [c["command"] for c in have["commands"]]
    for c in have["commands"]:
        text = found[c["command"]]
        head = text.splitlines()[0]
        for name in re.findall(r"[A-Za-z@.]+", c["arguments"].replace("...", "").replace("none", "")):
            assert f"_{name}_" in head, (c["command"], name)
        for o in c["options"]:
            assert f"*--{o['name']}*" in text, (c["command"], o["name"])
            assert not o["letter"] or f"*-{o['letter']}*" in text, (c["command"], o["letter"])
        assert c["operators"] == ("(operator)" in text) or c["command"] == "calib fetch", c["command"]
    options = sections(page, r"^# ([A-Z ]+)$")["OPTIONS"]
    for o in have["options"]:
        assert f"*--{o['name']}*" in options and (not o["letter"] or f"*-{o['letter']}*" in options), o["name"]


def complete(*words):
    script = f"""source {SOURCE}/deploy/completion/kvctl
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _kvctl; printf '%s\\n' "${{COMPREPLY[@]}}" """
    r = subprocess.run(["bash", "-c", script, "bash", "kvctl", *words], capture_output=True, text=True, timeout=30,
                       env={**os.environ, "PATH": f"{KVCTL.parent}:{os.environ['PATH']}"})
    assert r.returncode == 0 and r.stderr == "", r.stderr
    return set(r.stdout.split())


def test_completion_knows_all_commands_and_options():
    have = json.loads(program(KVCTL, "--json", "help"))
    shared = {f"--{o['name']}" for o in have["options"]}
    names = [c["command"].split() for c in have["commands"]]
    assert complete("") == {n[0] for n in names} == complete("--json", "") == complete("-a", "unix:/x", "")
    assert complete("--") == shared
    for group in {n[0] for n in names if len(n) == 2}:
        assert complete(group, "") == {n[1] for n in names if n[0] == group}
    for c in have["commands"]:
        assert complete(*c["command"].split(), "--") == shared | {f"--{o['name']}" for o in c["options"]}, c["command"]
    assert complete("log-level", "") == {"error", "warning", "notice", "info", "debug"}
    assert complete("quota", "s") == {"set"} and complete("calib", "--json", "g") == {"gc"}


def test_commands_that_ask_all_daemons_are_named(folder):
    page = (SOURCE / "deploy/man/kvctl.1.scd").read_text()
    names = re.search(r"exits with 2\. ([^.]*) take \*--all\*", page.replace("\n", " "))[1]
    samples = {"LEVEL": "info", "NAMESPACE": "n", "TIER": "host", "KEY": "0a" * 24, "SET": "a/b@c", "SET|FILE": "a/b@c", "SIZE|none": "1GiB",
               "SECONDS": "1", "PRIORITY": "low"}
    takes = set()
    for c in json.loads(program(KVCTL, "--json", "help"))["commands"]:
        needed = re.sub(r"[\[\].]", "", c["arguments"]).split()[:c["required"]]
        if c["command"] in ("help", "events") or c["command"].startswith("calib ") or not all(n in samples for n in needed):
            continue
        r = subprocess.run([KVCTL, "--all", *c["command"].split(), *(samples[n] for n in needed)], capture_output=True, text=True,
                           stdin=subprocess.DEVNULL, env={**os.environ, "KVD_RUNTIME_DIR": str(folder), "KVD_ADDRESS": ""})
        assert r.returncode in (2, 3), (c, r.stderr)
        if r.returncode == 3:
            takes.add(c["command"])
    assert set(re.findall(r"\*([a-z -]+)\*", names)) == takes


def test_quickstart_says_no_more_than_it_did(folder):
    """A build folder that BUILD names is left as it is: nothing says that it was set up with CUDA."""
    for name, text in (("nvcc", "exit 0"), ("meson", "mkdir -p \"$2\""), ("ninja", "exit 1"), ("nvidia-smi", "exit 1"),
                       ("dpkg-query", 'for p in "$@"; do echo "$p installed"; done')):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        os.chmod(folder / name, 0o755)
    build = folder / "b"
    build.mkdir()
    (build / "build.ninja").write_text("")
    run = lambda *a, **env: subprocess.run(["bash", SOURCE / "deploy/quickstart.sh", *a], capture_output=True, text=True, timeout=60,
                                           env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **env})
    r = run("--with-cuda", BUILD=str(build))
    assert r.returncode == 1 and f"BUILD names {build}" in r.stderr and not r.stdout, (r.stdout, r.stderr)
    r = run(BUILD=str(build))
    assert r.returncode == 1 and f"as {build} was set up" in r.stdout and not (build / "quickstart.options").exists(), (r.stdout, r.stderr)
    r = run(BUILD=str(folder / "new"))
    assert r.returncode == 1 and "without CUDA kernels" in r.stdout, (r.stdout, r.stderr)


def test_a_bare_machine_gets_its_dependencies(folder):
    """dpkg-query fails where it does not know a package; quickstart.sh ends at what fails."""
    if not shutil.which("dpkg-query"):
        pytest.skip("no Debian")
    (folder / "deps.sh").write_text((SOURCE / "deploy/deps.sh").read_text().replace("libuv1-dev", "no-such-package libuv1-dev"))
    script = 'apt-get() { echo "apt-get $*" >&2; }; sudo() { "$@"; }; tee() { cat >/dev/null; }; chmod() { :; }; rm() { :; }\n' \
             f"source {folder}/deps.sh; kvd_deps build; echo done"
    r = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=60)
    assert r.returncode == 0 and r.stdout.endswith("done\n"), (r.stdout, r.stderr)
    assert "no-such-package" in r.stdout and re.search(r"apt-get install .*no-such-package", r.stderr)
