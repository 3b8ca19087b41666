"""Connections over TLS: kvd ends it itself, so what bounds those in the clear bounds these, and handshakes are few."""
import os
import resource
import select
import signal
import socket
import ssl
import subprocess
import threading
import time

import grpc
import numpy as np
import pytest

from conftest import Rpc, certificates, free_port, layout
from h2 import Connection
from test_death import wait_for
from test_grpc import append, open_session, random_kv
from test_limits import SANITIZER, status


@pytest.fixture
def tls(start, folder):
    """Starts kvd with a listener that has TLS; returns it, the port and a client's context for Python's ssl."""
    def begin(more="", ca=False):
        certificates(folder, server="IP:127.0.0.1", worker="DNS:worker")
        port = free_port()
        kvd = start("--listen", f"127.0.0.1:{port}", config=f"{more}\n[tls]\ncert = {folder}/server.pem\nkey = {folder}/server.key\n"
                    + (f"client-ca = {folder}/ca.pem\n" if ca else ""))
        context = ssl.create_default_context(cafile=folder / "ca.pem")
        context.set_alpn_protocols(["h2"])
        return kvd, port, context
    return begin


def raw(port, source="127.0.0.1"):
    return socket.create_connection(("127.0.0.1", port), 20, (source, 0))


def shaken(port, context, source="127.0.0.1"):
    return context.wrap_socket(raw(port, source), server_hostname="127.0.0.1")


def ended(sock, seconds=20):
    """Whether the other end hangs up, ever."""
    sock.settimeout(seconds)
    try:
        while sock.recv(4096):
            continue
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def test_a_tls_listener_outlives_a_shortage_of_descriptors(start, folder):
    run = lambda *a: subprocess.run(["openssl", *a], check=True, capture_output=True, cwd=folder)
    run("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "key", "-out", "cert", "-days", "2",
        "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    port = free_port()
    kvd = start("--listen", f"127.0.0.1:{port}", config=f"[tls]\ncert = {folder}/cert\nkey = {folder}/key\n")
    pid = kvd.process.pid
    old = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + 4, old[1]))
    held = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(12)]
    assert wait_for(lambda: "Too many open files" in kvd.text())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, old)
    for s in held:
        s.close()
    credentials = grpc.ssl_channel_credentials((folder / "cert").read_bytes())
    assert wait_for(lambda: answers(f"127.0.0.1:{port}", credentials))


def test_connections_over_tls_are_bounded_by_address_and_in_all(start, folder):
    certificates(folder, server="IP:127.0.0.1")
    port = free_port()
    kvd = start("--listen", f"127.0.0.1:{port}", config=f"""
[kvd]
max-connections = 16
[tls]
cert = {folder}/server.pem
key = {folder}/server.key
""")

    def connect(source, n, most):
        """Those of n connections that stay."""
        held = [socket.create_connection(("127.0.0.1", port), 20, (source, 0)) for _ in range(n)]
        assert wait_for(lambda: len(staying(held)) <= most)
        kvd.kvctl("ping", 1)  # has been served since
        stay = staying(held)
        for s in held:
            if s not in stay:
                s.close()
        return stay

    def staying(held):
        return [s for s in held if not select.select([s], [], [], 0)[0]]  # the others were hung up on

    held = connect("127.0.0.1", 9, 6)
    assert len(held) == 6  # half of three quarters of 16
    held += connect("127.0.0.2", 5, 5)
    held += connect("127.0.0.3", 5, 12 - len(held))
    assert len(held) == 12
    assert "127.0.0.1 has 6" in kvd.text()
    kvd.kvctl("ping", 1)  # the unix socket's are others
    for s in held:
        s.close()
    credentials = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes())
    assert wait_for(lambda: answers(f"127.0.0.1:{port}", credentials))


@pytest.mark.parametrize("method", ["/kvd.v1.Admin/Ping", "/no/such"])
def test_rapid_reset_is_bounded(tls, folder, method):
    """Hundreds of MiB, while gRPC alone saw what came over TLS."""
    kvd, port, context = tls()
    before, cut, begin = status(kvd, "VmRSS"), 0, time.time()

    def goes_on():
        return time.time() < begin + 1.5 or (cut < 8 and time.time() < begin + 30)

    def flood():
        nonlocal cut
        while goes_on():
            try:
                c = Connection(None, method, sock=shaken(port, context))
                while goes_on():
                    c.s.sendall(b"".join(c.headers() + c.reset() for _ in range(200)))
            except OSError:
                cut += 1
                time.sleep(0.02)

    threads = [threading.Thread(target=flood) for _ in range(8)]
    for t in threads:
        t.start()
    time.sleep(0.5)
    Rpc(kvd.address).admin("Ping")
    for t in threads:
        t.join()
    more = status(kvd, "VmHWM") - before
    print(f"rapid reset over TLS, {method}: {more / 1024:.0f} MiB more, cut off {cut} times")
    assert cut >= 8 and "resets calls" in kvd.text() and "address=127.0.0.1" in kvd.text()
    assert more < (64 * SANITIZER) << 10
    assert answers(f"127.0.0.1:{port}", grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes()))


def test_a_handshake_that_does_not_end(tls, folder):
    """Its connection makes room for the next; what has come through stays."""
    kvd, port, context = tls()
    credentials = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes())
    rpc = Rpc(f"127.0.0.1:{port}", credentials=credentials)
    rpc.admin("Ping")
    fds = len(os.listdir(f"/proc/{kvd.process.pid}/fd"))
    hello = bytes.fromhex("1603010200010001fc0303")  # of 512 bytes, of which some come
    silent = [raw(port) for _ in range(40)]
    for s in silent[:20]:
        s.sendall(hello)
    assert wait_for(lambda: sum(bool(select.select([s], [], [], 0)[0]) for s in silent) == 8)  # 32 are possible
    assert "are in their TLS handshake" in kvd.text()
    time.sleep(1)
    for i in range(5):  # each in place of the oldest
        assert answers(f"127.0.0.1:{port}", credentials)
    rpc.admin("Ping")
    assert ended(silent[0])
    for s in silent:
        s.close()
    assert wait_for(lambda: len(os.listdir(f"/proc/{kvd.process.pid}/fd")) <= fds + 8)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1")
def test_what_is_no_handshake(tls, folder):
    kvd, port, _ = tls()
    for greeting in (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\xff\xff" + b"a" * 100):
        with raw(port) as s:
            s.sendall(greeting)
            assert ended(s), greeting
    assert wait_for(lambda: "http request" in kvd.text())
    plain = ssl.create_default_context(cafile=folder / "ca.pem")
    assert ended(shaken(port, plain))  # no word of HTTP/2
    plain.set_alpn_protocols(["http/1.1"])
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        shaken(port, plain)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        shaken(port, old)
    Rpc(kvd.address).admin("Ping")


def test_wrong_certificates(tls, folder):
    kvd, port, _ = tls("[namespace closed]\nallow-cn = worker\n", ca=True)
    run = lambda *a: subprocess.run(["openssl", *a], check=True, capture_output=True, cwd=folder)
    run("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "self.key", "-out", "self.pem", "-days", "2",
        "-subj", "/CN=worker")
    run("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "two.key", "-out", "two.csr", "-subj", "/CN=guest/CN=worker")
    run("x509", "-req", "-in", "two.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-out", "two.pem")
    run("x509", "-req", "-in", "worker.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "-1", "-out", "late.pem")
    read = lambda f: (folder / f).read_bytes()

    def opens(key, cert):
        """The code of an OpenSession in a namespace that is worker's."""
        own = (read(key), read(cert)) if cert else (None, None)
        try:
            Rpc(f"127.0.0.1:{port}", credentials=grpc.ssl_channel_credentials(read("ca.pem"), *own)).kv(
                "OpenSession", namespace_name="closed", layout=layout())
            return "OK"
        except grpc.RpcError as e:
            return e.code().name

    assert opens("worker.key", "worker.pem") == "OK"
    assert opens("self.key", "self.pem") == "UNAVAILABLE"  # of that name, but nobody vouches for it
    assert opens("worker.key", "late.pem") == "UNAVAILABLE"
    assert opens(None, None) == "UNAVAILABLE"
    assert opens("server.key", "server.pem") == "PERMISSION_DENIED"  # another name
    assert opens("two.key", "two.pem") == "PERMISSION_DENIED"  # two names are none
    assert opens("worker.key", "worker.pem") == "OK"
    assert "certificate" in kvd.text() and "address=127.0.0.1" in kvd.text()


def test_certificates_are_renewed_by_a_reload(tls, folder):
    """What lies under the configured names; connections that are open stay. What is wrong changes nothing."""
    kvd, port, context = tls(ca=True)
    context.load_cert_chain(folder / "worker.pem", folder / "worker.key")
    shown = lambda: shaken(port, context).getpeercert()["serialNumber"]
    until = lambda: kvd.metric("kvd_tls_certificate_not_after_timestamp_seconds")
    first, end = shown(), until()
    held = Rpc(f"127.0.0.1:{port}", credentials=grpc.ssl_channel_credentials(*((folder / f).read_bytes() for f in ("ca.pem", "worker.key", "worker.pem"))))
    held.admin("Ping")
    assert abs(end - time.time() - 2 * 86400) < 300
    assert "nothing has changed" in kvd.kvctl("reload").stdout
    good = (folder / "server.key").read_bytes()
    (folder / "server.key").write_bytes((folder / "worker.key").read_bytes())
    assert "is not the key of" in kvd.kvctl("reload", check=False).stderr and shown() == first
    (folder / "server.key").write_bytes(good)
    run = lambda *a: subprocess.run(["openssl", *a], check=True, capture_output=True, cwd=folder)
    (folder / "ext2").write_text("subjectAltName=IP:127.0.0.1\n")
    run("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "9", "-out", "server.pem", "-extfile", "ext2")
    kvd.process.send_signal(signal.SIGHUP)
    assert wait_for(lambda: shown() != first) and wait_for(lambda: "certificates are read anew" in kvd.text())
    assert until() - end > 6 * 86400
    held.admin("Ping")
    # Another authority: who has its certificate from the old one comes in no more.
    os.rename(folder / "ca.pem", folder / "old.pem")
    run("req", "-x509", "-key", "ca.key", "-out", "ca.pem", "-days", "3", "-subj", "/CN=another")
    assert "read anew" in kvd.kvctl("reload").stdout
    s = shaken(port, context)
    assert ended(s)
    held.admin("Ping")


def test_large_messages_both_ways(tls, folder):
    """Of many records, more than the sockets on the way hold. -s prints what TLS costs, against the unix socket."""
    kvd, port, _ = tls()
    rpc = Rpc(f"127.0.0.1:{port}", credentials=grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes()))
    s = open_session(rpc, layout=layout(codec="bf16"))
    seq = rpc.kv("CreateSequences", session=s, request_id=1, count=1).sequences[0]
    k, v = random_kv(8192)
    append(rpc, s, seq, 0, k, v)
    for name, client in (("TLS", rpc), ("in the clear", Rpc(kvd.address))):
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            got = client.kv("ReadTokens", session=s, sequence=seq, begin=0, tokens=8192, layer_begin=0, layer_count=2)
            best = min(best, time.perf_counter() - began)
            assert np.array_equal(np.frombuffer(got.k, np.uint16), k.ravel()) and np.array_equal(np.frombuffer(got.v, np.uint16), v.ravel())
        print(f"\nreplies of {2 * k.nbytes / 1e6:.1f} MB, {name}: {2 * k.nbytes / best / 1e6:.0f} MB/s")


def answers(address, credentials):
    try:
        return Rpc(address, credentials=credentials).admin("Ping") is not None
    except grpc.RpcError:
        return False
