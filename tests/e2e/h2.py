"""HTTP/2 by hand, for what no client library would send."""
import select
import socket
import struct


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name, value, indexed=True):
    """A header that enters the peer's table (or not)."""
    return bytes([0x40 if indexed else 0, len(name)]) + name + bytes([len(value)]) + value


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
RST, END_HEADERS, END_STREAM = 3, 4, 1


class Connection:
    """One connection that calls one method. The headers are sent in full once and by their numbers afterwards."""

    def __init__(self, path, method, timeout=10, sock=None):
        self.s = sock or socket.socket(socket.AF_UNIX)
        self.s.settimeout(timeout)
        if not sock:
            self.s.connect(str(path))
        self.method, self.stream, self.known, self.unread = method.encode(), 1, False, b""
        self.s.sendall(PREFACE)

    def headers(self, end=False):
        """A request's headers on a stream of its own."""
        block = bytes([0x83, 0x86])
        if self.known:
            block += bytes([0xBE + i for i in range(4)])
        else:
            block += literal(b":path", self.method) + literal(b":authority", b"x") + literal(
                b"content-type", b"application/grpc") + literal(b"te", b"trailers")
        self.known = True
        self.last = self.stream
        self.stream += 2
        return frame(1, END_HEADERS | (END_STREAM if end else 0), self.last, block)

    def message(self, payload, end=True, announce=None):
        size = len(payload) if announce is None else announce
        return frame(0, END_STREAM if end else 0, self.last, b"\0" + struct.pack(">I", size) + payload)

    def reset(self):
        return frame(RST, 0, self.last, struct.pack(">I", 8))

    def unlimited(self):
        """Lets everything come."""
        self.s.sendall(frame(8, 0, 0, struct.pack(">I", 0x7FFF0000 - 65535)))

    def answered(self, wait=True):
        """How many calls have been answered, by what can be read now; waits for something if nothing can."""
        if wait or select.select([self.s], [], [], 0)[0]:
            self.unread += self.s.recv(1 << 20)
        n = 0
        while len(self.unread) >= 9 and len(self.unread) >= 9 + (size := int.from_bytes(self.unread[:3], "big")):
            n += self.unread[3] == 1 and self.unread[4] & END_STREAM
            self.unread = self.unread[9 + size:]
        return n

    def wait_answered(self, n):
        while n > 0:
            n -= self.answered()
        assert n == 0

    def close(self):
        self.s.close()
