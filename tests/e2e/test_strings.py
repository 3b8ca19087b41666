"""Every string of the wire: text without control characters, or refused, whatever the call."""
import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor

from conftest import admin, health, kv
from test_grpc import code_of, layout, open_session

BAD = [b"tenant1\0x", b"\0", b"a\nb", b"a\x1b[2J", b"\x7f", b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82",
       "\u0085".encode()]


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes(out + bytes([n]))


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def strings(descriptor, depth=0):
    """(path, function that makes a message with that string) for every string of a message, nested ones too."""
    for f in descriptor.fields:
        if f.type == FieldDescriptor.TYPE_STRING:
            yield f.name, lambda data, n=f.number: field(n, data)
        elif f.type == FieldDescriptor.TYPE_MESSAGE and depth < 3:
            for path, make in strings(f.message_type, depth + 1):
                yield f"{f.name}.{path}", lambda data, n=f.number, m=make: field(n, m(data))


def calls():
    for module, service in ((kv, "KvCache"), (admin, "Admin")):
        for m in module.DESCRIPTOR.services_by_name[service].methods:
            for path, make in strings(m.input_type):
                yield f"/kvd.v1.{service}/{m.name}", path, make
    for path, make in strings(health.HealthCheckRequest.DESCRIPTOR):
        yield "/grpc.health.v1.Health/Check", path, make


def test_every_string_of_every_call(rpc, kvd):
    seen = 0
    for method, path, make in calls():
        raw = (rpc.channel.unary_stream if method.endswith("/Watch") else rpc.channel.unary_unary)(method)
        for bad in BAD:
            with pytest.raises(grpc.RpcError) as e:
                reply = raw(make(bad), timeout=20)
                list(reply)
            assert code_of(e) == "INVALID_ARGUMENT", (method, path, bad, e.value)
            assert e.value.details().startswith(path.split(".")[-1] + " holds"), (method, path, bad, e.value)
        seen += 1
    assert seen > 30
    assert kvd.process.poll() is None


def test_a_name_does_not_end_at_nul(rpc, kvd):
    good = kv.OpenSessionRequest(layout=layout(), namespace_name="tenant1").SerializeToString()
    assert rpc.channel.unary_unary("/kvd.v1.KvCache/OpenSession")(good, timeout=20)
    names = [n.name for n in rpc.admin("ListNamespaces").namespaces]
    bad = good.replace(b"\x07tenant1", b"\x09tenant1\0x")
    assert len(bad) == len(good) + 2
    with pytest.raises(grpc.RpcError) as e:
        rpc.channel.unary_unary("/kvd.v1.KvCache/OpenSession")(bad, timeout=20)
    assert code_of(e) == "INVALID_ARGUMENT" and "namespace_name" in e.value.details()
    assert [n.name for n in rpc.admin("ListNamespaces").namespaces] == names
    # Text beyond ASCII passes this check, and meets the field's own rules.
    with pytest.raises(grpc.RpcError) as e:
        open_session(rpc, namespace_name="m\u00fcnchen")
    assert "printable ASCII" in e.value.details()
