"""Configuration files: what is wrong is said with its line, all of it at once, and the same by --check-config and by start."""
import os
import pathlib
import re
import shutil
import socket
import subprocess

import pytest

from conftest import KVD, SOURCE

LONG = "a" * 300
# text of the file (FOLDER is the test's), and for each error its line and words of it.
WRONG = [
    ("[kvd]\nbackend = tpu\n", [(2, "auto, cpu or cuda")]),
    ("[kvd]\nisa = sse\n", [(2, "scalar, avx2, avx512, vnni and amx")]),
    ("[kvd]\ndevice = 64\n", [(2, "0 to 63")]),
    ("[kvd]\nthreads = 99999999999\n", [(2, "0 to 1024")]),
    ("[kvd]\nthreads = -1\n", [(2, "a number")]),
    ("[kvd]\nthreads = 4x\n", [(2, "a number")]),
    ("[kvd]\npool-size = 1XB\n", [(2, "512MiB")]),
    ("[kvd]\npool-size = 0\n", [(2, "from 2.00 MiB to 8.00 TiB")]),
    ("[kvd]\nbackend = cpu\npool-size = 8191GiB\n", [(3, "memory")]),
    ("[kvd]\nextent-size = 3MiB\n", [(2, "multiple of 2 MiB")]),
    ("[kvd]\npool-size = 64MiB\nextent-size = 128MiB\n", [(3, "at most pool-size")]),
    ("[kvd]\nlisten = unix:relative\n", [(2, "unix:/absolute")]),
    ("[kvd]\nlisten = 127.0.0.1:99999\n", [(2, "0 to 65535")]),
    ("[kvd]\nlisten = 127.0.0.1\n", [(2, "host:port")]),
    ("[kvd]\nlisten = ::1:9000\n", [(2, "host:port")]),
    ("[kvd]\nlisten = 0.0.0.0:7070\n", [(2, "[tls]")]),
    ("[kvd]\nlisten = unix:FOLDER/s\nlisten = unix:FOLDER/s\n", [(3, "listed twice")]),
    ("[kvd]\nlisten = unix:FOLDER/c\n", [(2, "not a socket")]),
    ("[kvd]\nlisten = unix:FOLDER/c/s\n", [(2, "not a folder")]),
    ("[kvd]\nlisten = no-such-host.invalid:80\n[tls]\nclient-ca = /none\n", [(2, "no host"), (4, "cert and key too"),
                                                                            (4, "No such file")]),
    ("[kvd]\nsocket-mode = 0999\n", [(2, "octal")]),
    ("[kvd]\nsocket-group = no-such-group\n", [(2, "no group")]),
    ("[kvd]\nmetrics = 127.0.0.1:99999\n", [(2, "0 to 65535")]),
    ("[kvd]\nmetrics = 9464\n", [(2, "HOST:PORT")]),
    ("[kvd]\nmetrics = :9464\n", [(2, "has no host; say 127.0.0.1:9464, or 0.0.0.0:9464 for all")]),
    ("[kvd]\nlisten = 127.0.0.1:9999\nmetrics = 127.0.0.1:9999\n", [(3, "listen already")]),
    ("[kvd]\nstore = ftp://example.org/store\n", [(2, "http://")]),
    ("[kvd]\nstore = http://\n", [(2, "http://")]),
    ("[kvd]\nstore = URL\n", [(2, "/folder")]),
    ("[kvd]\nstore = file://folder\n", [(2, "/folder")]),
    ("[kvd]\nstore = FOLDER/c\n", [(2, "not a folder")]),
    ("[kvd]\ncache = FOLDER/c\n", [(2, "not a folder")]),
    ("[kvd]\nstore-public-key = FOLDER/none\n", [(2, "No such file")]),
    ("[kvd]\nstore-public-key = FOLDER\n", [(2, "key")]),
    ("[kvd]\ntier-host = 9000TiB\n", [(2, "size")]),
    ("[kvd]\ntier-host = 12\ntier-rate = 100\n", [(2, "0 or from 4.00 KiB"), (3, "0 or from 4.00 KiB")]),
    ("[namespace a]\nquota = 16\n", [(2, "0 or from 4.00 KiB")]),
    ("[kvd]\ntier-directory = /tmp/blocks\n", [(2, "/absolute/path SIZE")]),
    ("[kvd]\ntier-directory = blocks 1GiB\n", [(2, "/absolute/path SIZE")]),
    ("[kvd]\ntier-directory = /tmp/blocks 1MiB\n", [(2, "64MiB")]),
    ("[kvd]\ntier-directory = FOLDER/c 1GiB\n", [(2, "not a folder")]),
    ("[kvd]\ntier-directory = /tmp 1GiB\n", [(2, "tier-secret")]),
    ("[kvd]\ntier-redis = rediss://h\n", [(2, "TLS")]),
    ("[kvd]\ntier-redis = redis+cluster://h\n", [(2, "clusters")]),
    ("[kvd]\ntier-redis = redis://a,redis://b\n", [(2, "clusters")]),
    ("[kvd]\ntier-redis = redis://:password@h\n", [(2, "tier-redis-auth")]),
    ("[kvd]\ntier-redis = redis://h:0\n", [(2, "redis://HOST")]),
    ("[kvd]\ntier-redis = redis://h/x\n", [(2, "redis://HOST")]),
    ("[kvd]\ntier-redis-auth = FOLDER/none\n", [(2, "goes with tier-redis"), (2, "No such file")]),
    ("[kvd]\ntier-secret = FOLDER/none\n", [(2, "No such file")]),
    ("[kvd]\ntier-secret = FOLDER/c\n", [(2, "tier-secret")]),
    ("[kvd]\nstore-timeout = 1 hour\n", [(2, "500ms, 10s or 2m")]),
    ("[kvd]\n\nlog-level = loud\n", [(3, "error, warning")]),
    ("[kvd]\ndrain-timeout = -5s\n", [(2, "a time")]),
    ("[kvd]\nmax-sessions = 0\n", [(2, "1 to 100000")]),
    ("[kvd]\nadmin-uid = no-such-user\n", [(2, "admin-uid: there is no user 'no-such-user'")]),
    ("[kvd]\nadmin-uid = 4294967296\n", [(2, "user names or ids")]),  # not root
    ("[kvd]\nadmin-uid =\n", [(2, "user names or ids")]),
    ("[kvd]\nmax-queue = 1\nmax-queue = 2\n", [(3, "line 2")]),
    ("[kvd]\nstore = /tmp\n  cache = /tmp\n", [(3, "indented")]),  # it would go on with the one before
    ("[kvd]\n  cache = /tmp\n", [(2, "indented")]),
    ("[kvd]\nlisten = unix:FOLDER/s\n\tunix:FOLDER/t\n", [(3, "indented")]),
    ("[kvd]\nstore = " + LONG + "\n", [(2, "too long")]),
    ("[kvd]\nstore = /a\x01b\n", [(2, "control characters")]),
    ("[kvd]\nstore = /a\x00b\n", [(2, "control characters")]),
    ("[kvd]\nstore = /\udcff\n", [(2, "no UTF-8")]),  # the byte 0xff
    ("[kvd]\nstore = /\udcc0\udcaf\n", [(2, "no UTF-8")]),  # too long a form of a slash
    ("[kvd]\ncolour = blue\n", [(2, "unknown key 'colour'")]),
    ("[kvd]\nwhat is this\nand this\n", [(2, "key = value"), (3, "key = value")]),
    ("pool-size = 1GiB\n", [(1, "no section")]),
    ("[kvdd]\npool-size = 1GiB\n", [(1, "unknown section")]),
    ("[kvd\nbackend = cpu\n", [(1, "']'")]),
    ("[tsl]\n", [(1, "unknown section")]),
    ("[namespace]\nquota = 1GiB\n", [(1, "[namespace NAME]")]),
    ("[namespace two words]\n", [(1, "no namespace's name")]),
    ("[namespace " + "n" * 65 + "]\n", [(1, "no namespace's name")]),
    ("[namespace a]\nquota = 1MiB\n[namespace a]\nquota = 2MiB\n", [(3, "line 1")]),
    ("[kvd]\npool-size = 1GiB\n[namespace a]\nquota = 2GiB\n", [(4, "quota: 2.00 GiB for the namespace a are more than pool-size, 1.00 GiB")]),
    ("[namespace a]\nquota = much\n", [(2, "512MiB")]),
    ("[namespace a]\nborrow = yes\n", [(2, "no quota")]),
    ("[namespace a]\nquota = 1MiB\nborrow = much\n", [(3, "yes or no")]),
    ("[kvd]\npool-size = 1GiB\nfree-low = 64MiB\nfree-high = 32MiB\n", [(3, "at most that")]),
    ("[kvd]\npool-size = 1GiB\nfree-high = 32MiB\n", [(3, "goes with")]),
    ("[kvd]\npool-size = 1GiB\nfree-low = 1GiB\n", [(3, "free-low: 1.00 GiB is more than half of pool-size, 1.00 GiB")]),
    ("[namespace a]\nallow-uid =\n", [(2, "user names or ids")]),
    ("[namespace a]\nallow-gid = 0, no-such-group\n", [(2, "allow-gid: there is no group 'no-such-group'")]),
    ("[namespace a]\npool-size = 1GiB\n", [(2, "known: quota, borrow, allow-uid")]),
    ("[tls]\ncert = FOLDER/server.pem\n", [(2, "cert and key go together")]),
    ("[tls]\nkey = FOLDER/server.key\n", [(2, "cert and key go together")]),
    ("[tls]\ncert = FOLDER/none.pem\nkey = FOLDER/none.key\n", [(2, "No such file"), (3, "No such file")]),
    ("[tls]\ncert = FOLDER\nkey = FOLDER\n", [(2, "folder"), (3, "folder")]),
    ("[tls]\ncert = FOLDER/server.key\nkey = FOLDER/server.pem\n", [(2, "no certificate"), (3, "no private key")]),
    ("[tls]\ncert = FOLDER/server.pem\nkey = FOLDER/other.key\n", [(3, "is not the key of")]),
    ("[tls]\nclient-ca = FOLDER/server.pem\n", [(2, "cert and key too")]),
    ("[tls]\ncert = FOLDER/weak.pem\nkey = FOLDER/weak.key\n", [(2, "ee key too small")]),
    ("[tls]\ncert = FOLDER/server.pem\nkey = FOLDER/server.key\nclient-ca = FOLDER/broken.pem\n", [(4, "no certificate")]),
    ("[tls]\ncert = /dev/null\nkey = FOLDER/server.key\n", [(2, "wants a file")]),
]


def write(path, text, folder):
    path.write_bytes(text.replace("FOLDER", str(folder)).encode(errors="surrogateescape"))


def run(*arguments):
    return subprocess.run([KVD, *map(str, arguments)], capture_output=True, text=True, timeout=30)


def errors(text):
    """(file, line) and text of each line of errors."""
    found = [re.fullmatch(r"kvd: (\S+?):(\d+): (.*)", line) for line in text.splitlines()]
    assert all(found), text
    return [(m[1], int(m[2]), m[3]) for m in found]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    for name in ("server", "other"):
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                        "-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2", "-subj", f"/CN={name}"],
                       check=True, capture_output=True, cwd=folder)
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:1024", "-nodes", "-keyout", "weak.key", "-out", "weak.pem", "-days", "2",
                    "-subj", "/CN=weak"], check=True, capture_output=True, cwd=folder)
    (folder / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    return folder


def names_are_resolved():
    try:
        socket.getaddrinfo("no-such-host.invalid", 80)
    except socket.gaierror as e:
        return e.errno != socket.EAI_AGAIN
    return True


def test_each_wrong_configuration_is_refused_with_its_lines(keys):
    file, resolved = keys / "c", names_are_resolved()
    for text, wanted in WRONG:
        if "no-such-host" in text and not resolved:  # may be there, for all that this machine knows
            continue
        write(file, text, keys)
        checked, started = run("--check-config", "--config", file), run("--config", file)
        assert checked.returncode == started.returncode == 78, (text, checked.stderr)
        assert checked.stderr == started.stderr and checked.stdout == started.stdout == "", text
        found = errors(checked.stderr)
        assert [(f, l) for f, l, _ in found] == [(str(file), line) for line, _ in wanted], (text, checked.stderr)
        assert all(words in said for (_, _, said), (_, words) in zip(found, wanted)), (text, checked.stderr)


def test_all_errors_at_once(keys):
    """The table's lines in one file: nothing hides what comes after it, and errors come in the order of the lines."""
    lines = {"kvd": [], "namespace a": []}
    for text, wanted in WRONG:
        head, *rest = text.splitlines()
        if len(wanted) == len(rest) == 1 and head.strip("[]") in lines and "=" in rest[0] and rest[0][0] != " ":
            key = rest[0].split()[0]
            if not any(l.split()[0] == key for l in lines[head.strip("[]")]):
                lines[head.strip("[]")].append(rest[0])
    text = "".join(f"[{section}]\n" + "".join(l + "\n" for l in rest) for section, rest in lines.items())
    file = keys / "c"
    write(file, text, keys)
    checked, started = run("--check-config", "--config", file), run("--config", file)
    assert checked.returncode == started.returncode == 78 and checked.stderr == started.stderr
    wrong = [i + 1 for i, line in enumerate(text.splitlines()) if line[0] != "["]
    assert len(wrong) > 20 and [l for _, l, _ in errors(checked.stderr)] == wrong, checked.stderr


@pytest.mark.parametrize("arguments,words", [
    (["--config", "/etc"], "is a folder"),
    (["--config", "/none.conf"], "No such file"),
    (["--pool-size", "much"], "command line: pool-size"),
    (["--metrics", "127.0.0.1:99999"], "command line: metrics"),
    (["--store", "ftp://x/"], "command line: store"),
    (["--instance", "../x"], "--instance"),
])
def test_what_is_wrong_on_the_command_line(arguments, words):
    checked, started = run("--check-config", *arguments), run(*arguments)
    assert checked.returncode == started.returncode == 78
    assert checked.stderr == started.stderr and words in checked.stderr


def test_an_address_that_cannot_be_had_is_told_with_what_to_do(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        r = run("--pool-size", "64MiB", "--metrics", "", "--listen", where)
        assert r.returncode != 0 and f"listen (choose another address with --listen): cannot listen on {where}" in r.stderr, r.stderr
    if os.getuid() != 0:
        pytest.skip("wants root, to be somebody else")
    os.chmod(folder, 0o755)
    su = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if subprocess.run([*su, KVD, "--version"], capture_output=True).returncode != 0:
        pytest.skip("the build folder is closed to other users")
    r = subprocess.run([*su, KVD, "--pool-size", "64MiB", "--metrics", "", "--listen", f"unix:{folder}/s"], capture_output=True, text=True, timeout=30)
    assert r.returncode != 0 and "choose a folder that this user may write in" in r.stderr, r.stderr


def test_a_pool_beyond_the_cgroups_limit_is_refused(folder):
    own = next((l.split(":")[2].strip() for l in open("/proc/self/cgroup") if ":memory:" in l), None)
    v2 = next(l.split(":")[2].strip() for l in open("/proc/self/cgroup") if l.startswith("0::"))
    group = pathlib.Path(f"/sys/fs/cgroup/memory{own}" if own else f"/sys/fs/cgroup{v2}") / f"kvd-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if own else "memory.max")).write_text(str(300 << 20))
        (group / "below").mkdir()
    except OSError:
        for g in (group / "below", group):
            if g.exists():
                g.rmdir()
        pytest.skip("cgroups cannot be made here")
    join = ["sh", "-c", 'echo $$ >"$0"/cgroup.procs && exec "$@"', str(group / "below")]
    try:
        for size, code in (("256MiB", 0), ("512MiB", 78)):
            r = subprocess.run([*join, KVD, "--check-config", "--backend", "cpu", "--pool-size", size], capture_output=True, text=True)
            assert r.returncode == code and (code == 0 or "cgroup (MemoryMax=), 300 MiB" in r.stderr), r.stderr
    finally:
        (group / "below").rmdir()
        group.rmdir()


def test_good_configurations(keys):
    file = keys / "c"
    for text in ("", "# nothing\n\n; at all\n", "\ufeff[kvd]\nthreads = 2\n", "[kvd]\nthreads=2", "[tls]\n[kvd]\n[namespace a]\n",
                 "[namespace " + "n" * 64 + "]\nquota = 1MiB\n", "[kvd]\nmetrics =\nstore =\n",
                 "[tls]\ncert = FOLDER/server.pem\nkey = FOLDER/server.key\nclient-ca = FOLDER/other.pem\n",
                 "[kvd]\nlisten = [::1]:7000\nlisten = localhost:7001\nlisten = unix:FOLDER/s\n",
                 "# " + LONG + "\n[kvd]\nthreads = 2\n", "[kvd]\nstore = /räume/間\n"):
        write(file, text, keys)
        r = run("--check-config", "--config", file)
        assert r.returncode == 0 and r.stderr == "", (text, r.stderr)
    assert run("--check-config", "--config", SOURCE / "deploy/kvd.conf").returncode == 0


def test_later_files_win(start, folder):
    """defaults < files in their order < command line; lists and listeners are replaced, not joined."""
    (folder / "a.conf").write_text("[kvd]\nmax-queue = 7\nmax-sessions = 7\nlog-level = warning\n[namespace n]\nquota = 1MiB\n")
    (folder / "a-gpu.conf").write_text("[kvd]\nmax-queue = 9\n[namespace n]\nquota = 2MiB\n[namespace m]\n")
    kvd = start("--config", folder / "a.conf", "--instance", "gpu", "--log-level", "notice")
    quotas = kvd.kvctl("quota", "ls").stdout
    assert "2.00 MiB" in quotas and "\nm " in quotas
    assert "log level notice" in kvd.kvctl("status").stdout
    # An error names the file it is in.
    (folder / "a-gpu.conf").write_text("[kvd]\nmax-queue = none\n")
    r = run("--check-config", "--config", folder / "a.conf", "--instance", "gpu")
    assert r.returncode == 78 and f"{folder}/a-gpu.conf:2: max-queue" in r.stderr


def test_instances_have_sockets_and_ports_of_their_own(folder):
    """Two instances over one file get along; what the file says goes for both."""
    (folder / "kvd.conf").write_text("[kvd]\npool-size = 64MiB\nlisten = 127.0.0.1:9466\n")
    for instance, code in (("0", 0), ("1", 0), ("2", 78)):  # 9464 + 2
        r = run("--check-config", "--config", folder / "kvd.conf", "--instance", instance)
        assert r.returncode == code, r.stderr
        assert code == 0 or "listen already" in r.stderr
