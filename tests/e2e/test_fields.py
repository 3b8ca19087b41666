"""Every field of the wire: strings are text without control characters, and what is not known is refused, whatever the call."""
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


def number(field_number, value):
    return varint(field_number << 3) + varint(value)


def fields(descriptor, depth=0):
    """(its message, the field, path, what puts the field's bytes into a request) for every field, nested ones too; (its message,
    None, path, the same for bytes of the message) for every message."""
    yield descriptor, None, descriptor.name, lambda data: data
    for f in descriptor.fields:
        yield descriptor, f, f.name, lambda data: data
        if f.type == FieldDescriptor.TYPE_MESSAGE and depth < 3:
            for message, inner, path, put in fields(f.message_type, depth + 1):
                yield message, inner, f"{f.name}.{path}", lambda data, n=f.number, put=put: field(n, put(data))


def calls():
    """(method, its message, the field or None, path, what makes a request of its bytes)"""
    for module, service in ((kv, "KvCache"), (admin, "Admin")):
        for m in module.DESCRIPTOR.services_by_name[service].methods:
            for f in fields(m.input_type):
                yield f"/kvd.v1.{service}/{m.name}", *f
    for name in ("Check", "Watch"):
        for f in fields(health.HealthCheckRequest.DESCRIPTOR):
            yield f"/grpc.health.v1.Health/{name}", *f


def refused(rpc, method, request):
    """What kvd says to a request that it must not take."""
    raw = (rpc.channel.unary_stream if "/Watch" in method else rpc.channel.unary_unary)(method)
    with pytest.raises(grpc.RpcError) as e:
        list(raw(request, timeout=20))
    assert code_of(e) == "INVALID_ARGUMENT", (method, request, e.value)
    return e.value.details()


def test_every_string_of_every_call(rpc, kvd):
    seen = 0
    for method, _, f, path, put in calls():
        if not f or f.type != FieldDescriptor.TYPE_STRING:
            continue
        for bad in BAD:
            assert refused(rpc, method, put(field(f.number, bad))).startswith(f.name + " holds"), (method, path, bad)
        seen += 1
    assert seen > 30
    assert kvd.process.poll() is None


def test_fields_that_kvd_does_not_know(rpc, kvd):
    """Of every message of every call: a newer client learns that it is not understood."""
    methods, messages = set(), set()
    for method, message, f, path, put in calls():
        if f:
            continue
        unknown = 1 + max((known.number for known in message.fields), default=0)
        for at, bad in ((unknown, number(unknown, 1)), (1000, field(1000, b"text")), (1 << 28, varint(1 << 31 | 5) + b"four")):
            what = f"{message.full_name} has a field {at} that this kvd does not know"
            assert refused(rpc, method, put(bad)).startswith(what), (method, path, at)
        methods.add(method)
        messages.add(message.full_name)
    assert len(methods) > 45 and len(messages) > 55, (len(methods), len(messages))
    assert kvd.process.poll() is None


def test_numbers_that_would_be_cut_or_taken_for_others(rpc, kvd):
    seen = set()
    for method, message, f, path, put in calls():
        if f and f.type == FieldDescriptor.TYPE_ENUM:
            bad, what = len(f.enum_type.values), "which this kvd does not know"
        elif f and f.type == FieldDescriptor.TYPE_UINT32:
            bad, what = (1 << 32) + 1, "at most 32 bits are possible"
        else:
            continue
        said = refused(rpc, method, put(number(f.number, bad)))
        assert said.startswith(f"{f.name} is {bad}") and what in said, (method, path, said)
        seen.add((f.type, message.full_name, f.name))
    assert {kind for kind, *_ in seen} == {FieldDescriptor.TYPE_ENUM, FieldDescriptor.TYPE_UINT32} and len(seen) > 30, seen
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
