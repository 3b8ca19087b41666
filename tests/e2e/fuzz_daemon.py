"""Random requests, concurrent, cancelled and abandoned, against a running kvd; and garbage on its other sockets."""
import array
import collections
import contextlib
import json
import os
import random
import signal
import socket
import struct
import threading
import time

import grpc
from google.protobuf.message import DecodeError

from conftest import admin, kv
from fuzz_messages import METHODS, Known, Maker, shapes_of
from scenario_holder import MAGIC, VERSION, new_memory
from test_keep import kill, pid_of

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1),
           ("grpc.initial_reconnect_backoff_ms", 20), ("grpc.min_reconnect_backoff_ms", 5000), ("grpc.max_reconnect_backoff_ms", 100)]

def lasts(kind, data):
    """A session that would stay for longer than clean() waits if its reply, with its name, were lost."""
    if kind is not kv.OpenSessionRequest:
        return False
    with contextlib.suppress(DecodeError):
        return not 0 < kind.FromString(data).lease_ms < 10000
    return True


class Fuzz:
    """Some threads that call, and one that is rude on sockets, until the time is over."""

    def __init__(self, kvd, seed, seconds, threads=4, kills=False):
        self.kills = kills  # kvd has been started with --keep
        self.kvd, self.known, self.end = kvd, Known(), time.monotonic() + seconds
        self.counts, self.lock, self.failures = collections.Counter(), threading.Lock(), []
        self.workers = [threading.Thread(target=self.guard, args=(self.caller, f"{seed}-{i}")) for i in range(threads)]
        self.workers.append(threading.Thread(target=self.guard, args=(self.rude, f"{seed}-rude")))
        if kills:
            self.workers.append(threading.Thread(target=self.guard, args=(self.killer, f"{seed}-killer")))
        self.resident = []

    def guard(self, work, seed):
        try:
            work(seed)
        except Exception as e:  # noqa: BLE001
            self.failures.append(e)

    def count(self, method, code):
        with self.lock:
            self.counts[method, code] += 1

    def running(self):
        return time.monotonic() < self.end and not self.failures and self.kvd.process.poll() is None

    # -- calls --------------------------------------------------------------------------------------

    def caller(self, seed):
        maker = Maker(self.known, seed)
        r, methods = maker.r, list(METHODS)
        often = {"Append": 8, "Step": 6, "Attend": 6, "ReadTokens": 4, "OpenSession": 2, "CreateSequences": 2, "CloseSession": 0.3,
                 "PutPages": 3, "LookupPages": 3, "GetPages": 3, "EncodePages": 3, "MatchPrefix": 3, "PublishBlocks": 3, "AdoptPrefix": 2}
        weights = [often.get(m.split("/")[-1], 1) for m in methods]
        with contextlib.ExitStack() as stack:
            channel = stack.enter_context(grpc.insecure_channel(self.kvd.address, options=OPTIONS))
            sockets, waiting = [], []
            while self.running():
                method = r.choices(methods, weights)[0]
                kind, streams = METHODS[method]
                if r.random() < 0.04:
                    sockets = self.connections(sockets, r)
                data = maker.request(kind)
                if streams:
                    self.stream(channel, method, data, r)
                    continue
                patient = lasts(kind, data)
                timeout = 0.002 if r.random() < 0.03 and not patient else 5
                operator = ".Admin/" in method and "Drain" not in method and r.random() < 0.7  # an operator's Drain would end it
                metadata = [("kvd-ticket", r.choice(self.known.tickets[-40:]))] if operator else None
                future = channel.unary_unary(method).future(data, timeout=timeout, metadata=metadata, wait_for_ready=self.kills)
                waiting.append((method, kind, data, future))
                if r.random() < 0.02 and not patient:  # kvd cuts off who gives up 64 calls a second
                    future.cancel()
                while len(waiting) > (r.randrange(1, 8)):
                    self.settle(*waiting.pop(0))
            for w in waiting:
                self.settle(*w)
            for s in sockets:
                s.close()

    def settle(self, method, kind, data, future):
        try:
            reply, code = future.result(), "OK"
        except grpc.FutureCancelledError:
            reply, code = b"", "CANCELLED"
        except grpc.RpcError as e:
            reply, code = b"", e.code().name
            if code in ("INTERNAL", "UNKNOWN", "DATA_LOSS"):
                self.failures.append(AssertionError(f"{method}: {code} {e.details()}"))
        self.count(method, code)
        if code == "UNAUTHENTICATED" or code == "OK" and method.endswith("CloseSession"):
            with contextlib.suppress(DecodeError, AttributeError):
                self.known.over(kind.FromString(data).session)
        elif code == "OK":
            self.learn(method.rsplit("/", 1)[1], kind, data, reply)

    def learn(self, name, kind, data, reply):
        """What later requests can refer to."""
        try:
            request = kind.FromString(data)
        except DecodeError:
            return  # kvd's reading of damaged bytes may differ from Python's
        if name == "OpenSession":
            opened = kv.OpenSessionReply.FromString(reply)
            session = opened.session
            self.known.held[session] = {}
            self.known.shapes[session] = shapes_of(opened.layout)
            if request.pages:
                self.known.paged.add(session)
            self.known.add("sessions", session)
            self.known.opened.append(session)
        elif name in ("MatchPrefix", "LookupPages"):
            answer = getattr(kv, name + "Reply").FromString(reply)
            for found in answer.matches if name == "MatchPrefix" else answer.found:
                self.known.leased(request.session, found.lease)
        elif name == "AdoptPrefix":
            adopted = kv.AdoptPrefixReply.FromString(reply)
            for sequence, length in zip(adopted.sequences, adopted.lengths):
                self.known.took(request.session, sequence, length)
        elif name == "RegisterBuffer":
            buffer = kv.RegisterBufferReply.FromString(reply).buffer
            self.known.add("buffers", buffer)
            self.known.memory.setdefault(request.session, []).append(buffer)
        elif name == "AttachSequence":
            info = kv.AttachSequenceReply.FromString(reply).sequence
            self.known.took(request.session, info.sequence, info.length)
        elif name in ("CreateSequences", "ForkSequence"):
            for s in kv.SequencesReply.FromString(reply).sequences[:4]:
                self.known.took(request.session, s, self.known.held.get(request.session, {}).get(getattr(request, "sequence", 0), 0))
        elif name == "Append":
            for item, length in zip(request.items, kv.AppendReply.FromString(reply).lengths):
                self.known.took(request.session, item.sequence, length)
        elif name == "Step":
            for item, result in zip(request.items, kv.AttendReply.FromString(reply).results):
                self.known.took(request.session, item.sequence, result.length)
        elif name == "TruncateSequence":
            self.known.took(request.session, request.sequence, request.length)

    def stream(self, channel, method, data, r):
        call = channel.unary_stream(method)(data, timeout=2, wait_for_ready=self.kills)
        try:
            if r.random() < 0.7:
                next(call, None)
            code = "OK"
        except grpc.RpcError as e:
            code = e.code().name
        self.count(method, code)
        call.cancel()

    # -- the fd socket and the rest -----------------------------------------------------------------

    def connections(self, sockets, r):
        """One more connection with a ticket and some descriptors; old ones hang up."""
        while len(sockets) > 12:
            sockets.pop(r.randrange(len(sockets))).close()
        s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        s.settimeout(5)
        try:
            s.connect(f"{self.kvd.socket}.fd")
            hello = s.recv(64)
        except OSError:
            hello = b""
        if len(hello) < 40:
            s.close()
            return sockets
        self.known.add("tickets", hello[8:40].decode())
        self.known.add("unused", hello[8:40].decode())
        for key in range(3):
            fd = new_memory(1 << 16)
            with contextlib.suppress(OSError):
                s.sendmsg([struct.pack("<IIQ", MAGIC, VERSION, key)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
            os.close(fd)
        return [*sockets, s]

    def rude(self, seed):
        maker = Maker(self.known, seed)
        r, port = maker.r, self.kvd.metrics_port()
        fds = [os.open("/dev/null", os.O_RDWR), os.open("/", os.O_RDONLY), *os.pipe(), os.memfd_create("unsealed"), new_memory(1 << 16)]
        while self.running():
            kind = r.choice(["fd socket", "fd socket", "gRPC socket", "HTTP"])
            with contextlib.suppress(OSError):
                getattr(self, "rude_" + kind.replace(" ", "_").lower())(r, port, fds)
            self.count(kind, "garbage")
            time.sleep(0.002)
            if len(self.resident) < 10000:
                self.resident.append(self.rss())
        for fd in fds:
            os.close(fd)

    def rude_fd_socket(self, r, port, fds):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
            s.settimeout(2)
            s.connect(f"{self.kvd.socket}.fd")
            if r.random() < 0.5:
                s.recv(64)
            for _ in range(r.randrange(1, 80)):
                head = struct.pack("<IIQ", MAGIC if r.random() < 0.8 else 1, VERSION if r.random() < 0.9 else 2, r.randrange(5))
                data = r.choice([head, head, head, head[:r.randrange(17)], head + b"x", r.randbytes(r.choice([0, 1, 16, 4000]))])
                many = r.choice([1, 1, 1, 0, 2, 8, 9, 60])
                sent = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", r.choices(fds, k=many)))] if many else []
                s.sendmsg([data], sent, socket.MSG_DONTWAIT)

    def rude_grpc_socket(self, r, port, fds):
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if r.random() < 0.8 else r.randbytes(24)
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(1)
            s.connect(str(self.kvd.socket))
            s.sendall(preface)
            for _ in range(r.randrange(20)):
                body = r.randbytes(r.choice([0, 4, 8, 9, 100]))
                s.sendall(struct.pack(">I", len(body))[1:] + bytes([r.randrange(12), r.randrange(256)]) + struct.pack(">I", r.randrange(9)) + body)
            if r.random() < 0.3:
                s.recv(100)

    def rude_http(self, r, port, fds):
        with socket.create_connection(("127.0.0.1", port), 1) as s:
            s.sendall(r.choice([b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /healthz HTTP/1.0\r\n\r\n", r.randbytes(100), b"GET /", b"",
                                b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nx", b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n"]))
            if r.random() < 0.5:
                s.recv(1000)

    def killer(self, seed):
        r = random.Random(seed)
        while self.running():
            time.sleep(r.uniform(0.05, 1))
            kill(self.kvd, r.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))

    # -- the whole ----------------------------------------------------------------------------------

    def rss(self):
        assert self.kvd.process.poll() is None, self.kvd.text()[-6000:]
        try:
            with open(f"/proc/{pid_of(self.kvd) if self.kills else self.kvd.process.pid}/statm") as f:
                return int(f.read().split()[1]) * 4096
        except OSError:  # it is being started again
            return self.resident[-1] if self.resident else 0

    def run(self):
        for w in self.workers:
            w.start()
        for w in self.workers:
            w.join()
        if self.failures:
            raise self.failures[0]

    def clean(self):
        """Ends every session and takes every name back. What kvd holds then has to be nothing."""
        with grpc.insecure_channel(self.kvd.address, options=OPTIONS) as channel:
            close = channel.unary_unary("/kvd.v1.KvCache/CloseSession")
            for s in self.known.opened:
                close(kv.CloseSessionRequest(session=s).SerializeToString(), timeout=20)
        for _ in range(400):  # leased sessions whose replies were lost end by themselves
            for namespace in json.loads(self.kvd.kvctl("--json", "quota", "ls").stdout)["namespaces"]:
                self.kvd.kvctl("prefix", "drop", namespace["name"], "--yes", check=False)  # retained for up to a day
            self.kvd.kvctl("evict", "--all", "--yes")
            status = self.status()
            if status.sessions == 0 and status.pool_used_bytes == 0 and status.sequences == 0:
                return
            time.sleep(0.05)
        leases = [x for x in self.kvd.kvctl("metrics").stdout.splitlines() if x.startswith("kvd_prefix_leases")]
        raise AssertionError(f"left behind: {self.status()} {leases} " + self.kvd.kvctl("sessions", check=False).stdout)

    def status(self):
        with grpc.insecure_channel(self.kvd.address, options=OPTIONS) as channel:
            data = channel.unary_unary("/kvd.v1.Admin/GetStatus")(b"", timeout=20)
        return admin.StatusReply.FromString(data)

    def table(self):
        """Calls by method and status code."""
        lines = []
        for method in sorted({m for m, _ in self.counts}):
            codes = sorted(((n, c) for (m, c), n in self.counts.items() if m == method), reverse=True)
            lines.append(f"{method:36} {sum(n for n, _ in codes):8}  " + ", ".join(f"{c} {n}" for n, c in codes))
        return "\n".join(lines)
