"""Sessions of random scenarios: here, or in a process of their own (this file as a program).

A session has a ticket and 20 MiB of registered memory, or is leased and has inline data only. Calls are made of bytes, so
that the other process only hands on what it is given.
"""
import array
import fcntl
import mmap
import os
import pickle
import socket
import struct
import subprocess
import sys

import grpc

MAGIC, VERSION, MEMORY = 0x0144766B, 1, 20 << 20


def new_memory(size=MEMORY):
    fd = os.memfd_create("scenario", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.posix_fallocate(fd, 0, size)
    fcntl.fcntl(fd, 1033, 0x2)  # F_ADD_SEALS, F_SEAL_SHRINK
    return fd


class Here:
    """Connections of this process."""

    def __init__(self, address, memory=None):
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1),
                   ("grpc.use_local_subchannel_pool", 1)]
        self.address = address
        self.channel = grpc.insecure_channel(address, options=options)
        self.sockets, self.memory = {}, memory if memory is not None else [new_memory() for _ in range(3)]

    def connect(self, fd):
        """A connection to the fd socket over which `fd` was sent, under key 1. Returns its ticket."""
        s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        s.connect(self.address.removeprefix("unix:") + ".fd")
        ticket = s.recv(64)[8:40].decode()
        s.sendmsg([struct.pack("<IIQ", MAGIC, VERSION, 1)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        self.sockets[ticket] = s
        return ticket

    def hang_up(self, ticket):
        if ticket in self.sockets:
            self.sockets.pop(ticket).close()

    def call(self, method, data):
        """(status code's name, details or reply)."""
        try:
            return "OK", self.channel.unary_unary(method)(data, timeout=30)
        except grpc.RpcError as e:
            return e.code().name, e.details()

    def close(self):
        for s in self.sockets.values():
            s.close()
        for fd in self.memory:
            os.close(fd)
        self.channel.close()


class Elsewhere:
    """The same in another process."""

    def __init__(self, address):
        self.memory = [new_memory() for _ in range(3)]
        self.process = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        pass_fds=self.memory)

    def _ask(self, *question):
        pickle.dump(question, self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)

    def connect(self, fd):
        return self._ask("connect", fd)

    def hang_up(self, ticket):
        return self._ask("hang_up", ticket)

    def call(self, method, data):
        return self._ask("call", method, data)

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()
        for fd in self.memory:
            os.close(fd)


class Session:
    """One session and its memory. `where`: Here or Elsewhere; `memory`: a descriptor that it has too, or None to be leased."""

    def __init__(self, kv, where, layout, memory, label):
        self.kv, self.where, self.label, self.requests, self.descriptor = kv, where, label, 0, memory
        self.ticket = where.connect(memory) if memory is not None else ""
        self.memory = mmap.mmap(memory, MEMORY) if memory is not None else None
        code, reply = self.call("OpenSession", layout=layout, ticket=self.ticket, client_name="scenario")
        assert code == "OK", reply
        self.id = reply.session
        self.buffer = 0
        if memory is not None:
            code, reply = self.call("RegisterBuffer", key=1, size=MEMORY)
            assert code == "OK", reply
            self.buffer = reply.buffer

    def call(self, method, **fields):
        """(status code's name, reply or details)."""
        if method != "OpenSession":
            fields["session"] = self.id
        request = getattr(self.kv, method + "Request")(**fields)
        code, data = self.where.call(f"/kvd.v1.KvCache/{method}", request.SerializeToString())
        replies = {"CreateSequences": "SequencesReply", "ForkSequence": "SequencesReply", "Step": "AttendReply"}
        return code, getattr(self.kv, replies.get(method, method + "Reply")).FromString(data) if code == "OK" else data

    def request_id(self):
        self.requests += 1
        return self.requests

    def end(self, hang_up):
        if hang_up and self.ticket:
            self.where.hang_up(self.ticket)
        else:
            self.call("CloseSession")
            if self.ticket:
                self.where.hang_up(self.ticket)


def main():
    here = Here(sys.argv[1], memory=[])  # the other process's: they have the same numbers here
    while True:
        try:
            name, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        pickle.dump(getattr(here, name)(*arguments), sys.stdout.buffer)
        sys.stdout.buffer.flush()
    here.close()


if __name__ == "__main__":
    main()
