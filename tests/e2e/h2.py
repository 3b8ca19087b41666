"""HTTP/2 by hand, for what no client library would send."""
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

    def __init__(self, path, method, timeout=10):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.settimeout(timeout)
        self.s.connect(str(path))
        self.method, self.stream, self.known = method.encode(), 1, False
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

    def close(self):
        self.s.close()
