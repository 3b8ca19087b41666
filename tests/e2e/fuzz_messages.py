"""Random requests: any message by its descriptor, requests that are nearly right, and damage to their bytes."""
import collections
import random
import struct

from google.protobuf.descriptor import FieldDescriptor as F

from conftest import admin, health, kv


def repeated(field):
    """Releases of protobuf from 4.x on have `is_repeated`, later ones no `label` any more."""
    return field.is_repeated if hasattr(field, "is_repeated") else field.label == F.LABEL_REPEATED


# A layer's heads, and the values of a vector of each: of K, V, q and o.
Shape = collections.namedtuple("Shape", "q_heads kv_heads k v q o")
Q_HEADS, KV_HEADS, DIM = 4, 2, 64
PLAIN = [Shape(Q_HEADS, KV_HEADS, DIM, DIM, DIM, DIM)] * 2


def shapes_of(layout):
    """Of each layer of a session, from its reply."""
    layers = {}
    for p in layout.planes:
        q, o = (p.head_dim_k + p.head_dim_v, p.head_dim_v) if p.latent else (p.head_dim_k, p.head_dim_v)
        layers |= {layer: Shape(p.q_heads, p.kv_heads, p.head_dim_k, p.head_dim_v, q, o) for layer in p.layers}
    return [layers[layer] for layer in sorted(layers)]


NUMBERS = [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 255, 256, 1000, 4095, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1]
WIDE = NUMBERS + [2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
TEXTS = ["", "x", "default", "..", "/", "a b", "\0", "tenant\0x", "\n", "\x7f", "\x1b[2J", "ü", "x" * 64, "x" * 65, "y" * 129, "z" * 70000,
         "%s%n", "sha256:" + "0" * 64, "model@tag", "hadamard", "identity", "random", "bf16", "int2", "int2c", "int2-lm", "turboquant-4", "tc2", "tc2.5"]

CODECS = ["bf16", "int2", "int2-lm", "turboquant-2", "turboquant-4", "int4", "tc2", "tc2.5", "k=int4,v=int2", "k=bf16,v=int2"]

METHODS = {f"/kvd.v1.KvCache/{m.name}": (getattr(kv, m.input_type.name), False)
           for m in kv.DESCRIPTOR.services_by_name["KvCache"].methods}
METHODS |= {f"/kvd.v1.Admin/{m.name}": (getattr(admin, m.input_type.name), False)
            for m in admin.DESCRIPTOR.services_by_name["Admin"].methods}
METHODS["/grpc.health.v1.Health/Check"] = health.HealthCheckRequest, False
METHODS["/kvd.v1.KvCache/Watch"] = kv.WatchRequest, True
METHODS["/kvd.v1.KvCache/WatchNamespace"] = kv.WatchNamespaceRequest, True
METHODS["/grpc.health.v1.Health/Watch"] = health.HealthCheckRequest, True


class Known:
    """What requests may refer to, of all threads; some of it is gone already."""

    def __init__(self):
        self.sessions, self.sequences, self.buffers, self.names, self.tickets = ["0" * 32], [1], [1], ["shared"], [""]
        self.opened = []  # all sessions
        self.unused = []  # tickets without a session
        self.held = {}    # session: {sequence: length}
        self.memory = {}  # session: its buffers
        self.shapes = {}  # session: of its layers
        self.leases = {}  # session: of prefixes and pages
        self.paged = set()  # sessions of pages

    def add(self, kind, value):
        values = getattr(self, kind)
        values.append(value)
        del values[:-200]

    def leased(self, session, lease):
        if lease:
            self.leases[session] = [*self.leases.get(session, [])[-20:], lease]

    def took(self, session, sequence, length):
        self.add("sequences", sequence)
        held = self.held.setdefault(session, {})
        held[sequence] = length
        if len(held) > 30:
            held.pop(next(iter(held)), None)

    def over(self, session):
        """It is unknown, or closed."""
        if session in self.sessions[1:]:
            self.sessions = [s for s in self.sessions if s != session]

    def lives(self, r, filled, paged):
        """A session that seems to live, with a sequence of its own and its length; `filled`: of so many tokens, if it can be."""
        last = [s for s in self.sessions if (s in self.paged) == paged][-5:] or self.sessions[-5:]
        session = r.choice(not paged and r.random() < 0.9 and [s for s in last if self.held.get(s)] or last)
        held = list(self.held.get(session, {}).items())
        held = [x for x in held if x[1] >= filled] or held
        return session, *(r.choice(held) if held else (1, 0))


class Maker:
    def __init__(self, known, seed):
        self.known, self.r = known, random.Random(seed)

    def number(self, field):
        name = field.name
        if name in ("sequence", "sequences") and self.r.random() < 0.8:
            return self.r.choice(self.known.sequences)
        if name == "buffer" and self.r.random() < 0.8:
            return self.r.choice([0, 0, *self.known.buffers[-5:]])
        if name in ("layer_begin", "layer_count", "count", "tokens", "q_len", "rows", "heads") and self.r.random() < 0.8:
            return self.r.randrange(5)
        wide = field.type in (F.TYPE_UINT64, F.TYPE_INT64, F.TYPE_FIXED64)
        return self.r.choice(WIDE if wide else NUMBERS) if self.r.random() < 0.8 else self.r.getrandbits(64 if wide else 32)

    def text(self, field):
        if field.name == "session" and self.r.random() < 0.9:
            return self.r.choice(self.known.sessions)
        if field.name == "ticket" and self.r.random() < 0.7:
            return self.r.choice(self.known.tickets)
        if field.name in ("name", "namespace_name") and self.r.random() < 0.5:
            return self.r.choice(self.known.names)
        return self.r.choice(TEXTS)

    def value(self, field, depth):
        if field.type == F.TYPE_MESSAGE:
            return None
        if field.type == F.TYPE_STRING:
            return self.text(field)
        if field.type == F.TYPE_BYTES:
            return self.r.randbytes(self.r.choice([0, 1, 63, 64, 256, 1024, 8192]))
        if field.type == F.TYPE_BOOL:
            return self.r.random() < 0.5
        if field.type in (F.TYPE_FLOAT, F.TYPE_DOUBLE):
            return self.r.choice([0.0, 1.0, -1.0, 1e30, -1e30, float("inf"), float("nan"), 1e-40, self.r.random()])
        if field.type == F.TYPE_ENUM:
            return self.r.choice([0, 0, 1, 2, 3, 77])
        return self.number(field)

    def fill(self, message, depth=0):
        """Any fields, with anything in them."""
        for field in message.DESCRIPTOR.fields:
            if field.name in ("wait", "signal") and self.r.random() < 0.9 or self.r.random() < 0.15:
                continue
            if repeated(field):
                for _ in range(self.r.choice([0, 1, 1, 2, 3, 40])):
                    if field.type == F.TYPE_MESSAGE:
                        self.fill(getattr(message, field.name).add(), depth + 1)
                    else:
                        getattr(message, field.name).append(self.value(field, depth))
            elif field.type == F.TYPE_MESSAGE:
                self.fill(getattr(message, field.name), depth + 1)
                getattr(message, field.name).SetInParent()
            else:
                setattr(message, field.name, self.value(field, depth))
        return message

    def layout(self):
        r = self.r
        kind = r.choice(["plain"] * 6 + ["dims", "window", "planes", "shapes", "latent"])
        m = kv.Layout(q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim_k=DIM, head_dim_v=DIM, windows=kv.Windows(sink=r.choice([0, 0, 64, 16]), recent=16),
                      codec=r.choice(["int2"] * 6 + ["bf16", "int2c", "turboquant-3"] if kind == "plain" else CODECS))
        behind = {"window": r.choice([1, 64, 100]), "windows": kv.Windows(recent=16)}
        if kind == "planes":
            m.planes.extend([kv.Plane(layers=[0], **behind), kv.Plane(layers=[1], codec=r.choice(CODECS))])
        elif kind == "shapes":
            m.planes.extend([kv.Plane(layers=[0], **behind),
                             kv.Plane(layers=[1], kv_heads=1, head_dim_k=192, head_dim_v=128, codec=r.choice(["bf16", "int4"]))])
        else:
            m.layers.extend([0, 1])
        if kind == "dims":
            m.head_dim_k = m.head_dim_v = r.choice([80, 96, 128])
        elif kind == "window":
            m.MergeFrom(kv.Layout(**behind))
            m.windows.sink = 0
        elif kind == "latent":
            m.MergeFrom(kv.Layout(kv_heads=1, head_dim_v=512, latent=True, codec=r.choice(["bf16", "int2", "int4"])))
        return m

    def tensor(self, session, layers, heads, values, n, size=2):
        """`values`: of a head, by the name of the field of Shape."""
        buffers = self.known.memory.get(session)
        if buffers and self.r.random() < 0.5:
            return kv.TensorRef(buffer=self.r.choice(buffers), offset=self.r.choice([0, 64, 4096]), dtype=size // 4)
        total = sum(getattr(x, heads) * getattr(x, values) for x in layers)
        return kv.TensorRef(inline_data=b"\x00\x3f" * (n * total * size // 2), dtype=size // 4)

    def some_layers(self, session):
        """Which of them a call is for: layer_begin, layer_count, and their shapes. Those that differ want calls of their own."""
        shapes = self.known.shapes.get(session, PLAIN)
        if len(set(shapes)) > 1 and self.r.random() < 0.95:
            at = self.r.randrange(len(shapes))
            return at, 1, shapes[at:at + 1]
        count = self.r.choice([0, 0, 0, 0, 1, 2])
        return 0, count, shapes[:count or len(shapes)]

    def good(self, kind):
        """A request of this kind as a worker could send it."""
        n, (s, q, at) = self.r.choice([1, 1, 3, 20, 100, 130]), self.known.lives(
            self.r, {kv.AttendRequest: 1, kv.ReadTokensRequest: 1, kv.ForkSequenceRequest: 1, kv.TruncateSequenceRequest: 1,
                     kv.PublishBlocksRequest: 64}.get(kind, 0), self.r.random() < 0.95 if "Pages" in kind.DESCRIPTOR.name else self.r.random() < 0.2)
        if kind is kv.OpenSessionRequest:
            ticket = self.known.unused.pop() if self.known.unused else ""
            m = kind(ticket=ticket, layout=self.layout(), lease_ms=3000, namespace_name=self.r.choice(["", "", "fuzz"]))
            if self.r.random() < 0.2:
                m.resume = self.r.choice(self.known.sessions[-5:])
            if self.r.random() < 0.5:
                m.pages = True
                for x in (m.layout, *m.layout.planes):
                    x.windows.CopyFrom(kv.Windows())
            return m
        if kind is kv.CreateSequencesRequest:
            return kind(session=s, count=self.r.choice([1, 2, 5]), request_id=self.r.choice([0, 1, 2, self.r.getrandbits(40)]))
        if kind is kv.RegisterBufferRequest:
            return kind(session=s, key=self.r.randrange(4), size=1 << 16)
        if kind in (kv.AppendRequest, kv.StepRequest, kv.AttendRequest):
            k, (begin, count, layers) = dict(sequence=q), self.some_layers(s)
            if kind is not kv.AttendRequest:
                k |= dict(position=at, tokens=n, **{x: self.tensor(s, layers, "kv_heads", x, n) for x in "kv"})
            else:
                k |= dict(q_len=max(1, min(n, at)))
            if kind is kv.AttendRequest:
                n = k["q_len"]
            if kind is not kv.AppendRequest:
                k |= dict(q=self.tensor(s, layers, "q_heads", "q", n, self.r.choice([2, 4])))
            item = {kv.AppendRequest: kv.AppendItem, kv.StepRequest: kv.StepItem, kv.AttendRequest: kv.AttendItem}[kind](**k)
            m = kind(session=s, items=[item], layer_begin=begin, layer_count=count)
            if kind is not kv.AppendRequest and any(x.q != x.k for x in layers):
                m.params.scale = 0.1  # over a latent there is no default
            return m
        if kind is kv.ReadTokensRequest:
            begin, count, _ = self.some_layers(s)
            return kind(session=s, sequence=q, begin=self.r.choice([0, 0, 1]), tokens=max(1, min(n, at - 1)), layer_begin=begin, layer_count=count)
        if kind is kv.RotateRequest:
            return kind(session=s, rows=n, heads=Q_HEADS, x=self.tensor(s, PLAIN, "q_heads", "q", n))
        if kind is kv.MapSequencesRequest:
            return kind(session=s, items=[kv.MapItem(sequence=q)], again=self.r.random() < 0.2)
        if kind in (kv.PublishSequenceRequest, kv.AttachSequenceRequest):
            m = kind(session=s, name=self.r.choice(["shared", "a", "b"]))
            if kind is kv.PublishSequenceRequest:
                m.sequence, m.replace = q, True
            return m
        if kind is admin.SetQuotaRequest:
            return kind(namespace_name="fuzz", quota_bytes=self.r.choice([0, 0, 0, 1 << 20]))
        if kind is admin.FetchRotationSetRequest:
            return kind(name="nobody@none")
        if kind is kv.ForkSequenceRequest:
            return kind(session=s, sequence=q, count=2)
        if kind in (kv.LookupPagesRequest, kv.HintPagesRequest, kv.PutPagesRequest, kv.GetPagesRequest, kv.EncodePagesRequest):
            m = kind(session=s, space=self.r.choice([b"x", b"y"]), key_bytes=16)
            if kind is kv.LookupPagesRequest:
                m.requests.extend(self.keys() for _ in range(self.r.choice([1, 1, 3])))
                m.lease_ms = self.r.choice([0, 0, 50, 2000])
                return m
            if kind is kv.HintPagesRequest:
                m.requests.extend(self.keys() for _ in range(self.r.choice([1, 1, 3])))
                m.hint = self.r.choice([0, 1, 2, 3, 4, 5])
                m.ms = self.r.choice([0, 50, 2000, 3600000]) if m.hint in (0, 2) else 0
                m.expire = m.hint == 0 and m.ms > 0 and self.r.random() < 0.5
                return m
            m.keys = self.keys()
            if kind in (kv.PutPagesRequest, kv.GetPagesRequest) and self.known.memory.get(s) and self.r.random() < 0.5:
                m.paged.CopyFrom(self.blocks(s, len(m.keys) // 16))
                return m
            if kind is kv.PutPagesRequest:
                n = 64 * len(m.keys) // 16
                for x in "kv":
                    getattr(m, x).CopyFrom(self.tensor(s, self.known.shapes.get(s, PLAIN), "kv_heads", x, n))
                m.exact = self.r.choice([b"", bytes(n // 64), bytes([1]) * (n // 64)])
            return m
        if kind is kv.MatchPrefixRequest:
            m = kind(session=s, requests=[self.prompt() for _ in range(self.r.choice([1, 1, 4]))], lease_ms=self.r.choice([0, 50, 2000]),
                     tiers=self.r.random() < 0.2, restore_ms=self.r.choice([0, 0, 20]))
            m.wait_ms = self.r.choice([0, 0, 20]) if len(m.requests) == 1 else 0
            return m
        if kind is kv.HintPrefixRequest:
            hint = self.r.choice([0, 1, 2, 3, 4, 5])
            return kind(session=s, requests=[self.prompt()], hint=hint, ms=self.r.choice([0, 50, 2000, 3600000]) if hint in (0, 2) else 0)
        if kind is kv.PublishBlocksRequest:
            return kind(session=s, items=[kv.PublishItem(sequence=q, keys=self.prompt(at), end=self.r.random() < 0.5)])
        if kind is kv.AdoptPrefixRequest:
            s, lease = self.lease(s)
            return kind(session=s, request_id=self.r.getrandbits(40), items=[kv.AdoptItem(lease=lease, keep=self.r.random() < 0.3)])
        if kind is kv.ReleasePrefixRequest:
            s, lease = self.lease(s)
            return kind(session=s, leases=[lease, *(self.r.randrange(1, 200) for _ in range(self.r.choice([0, 4])))])
        if kind in (admin.ListPrefixesRequest, admin.DropPrefixRequest):
            return kind(namespace_name=self.r.choice(["default", "fuzz"]))
        if kind is kv.FreeSequencesRequest:
            return kind(session=s, sequences=[q], unpublish=True)
        if kind is kv.TruncateSequenceRequest:
            return kind(session=s, sequence=q, length=self.r.randrange(at + 1))
        return self.fill(kind())

    def lease(self, session):
        """One that seems to be there, and whose it is."""
        of = [s for s in self.known.sessions[-20:] if self.known.leases.get(s) and s not in self.known.paged]
        session = self.r.choice(of) if of else session
        return session, self.r.choice([*self.known.leases.get(session, [1])[-3:], self.r.randrange(1, 200)])

    def blocks(self, session, pages):
        """Of an engine that has room for one page, in buffers of 64 KiB; some of it may be wrong."""
        r, row = self.r, DIM * 2
        tokens = r.choice([16, 16, 64, 48])
        k, v = (kv.PagedRef.Side(buffers=[r.choice(self.known.memory[session])], offsets=[at, at + 2 * 64 * KV_HEADS * row],
                                 block_stride=tokens * KV_HEADS * row, head_stride=row, token_stride=KV_HEADS * row, dim_stride=2)
                for at in (0, 64 * KV_HEADS * row))
        out = kv.PagedRef(k=k, v=v, all_blocks=64 // tokens, block_tokens=tokens, first_token=r.choice([0, 0, 0, 1]),
                          blocks=[r.randrange(64 // tokens) if r.random() < 0.1 else i % (64 // tokens) for i in range(-(-64 * pages // tokens))])
        for side in (k, v) if r.random() < 0.3 else ():
            setattr(side, r.choice(["block_stride", "head_stride", "token_stride", "dim_stride"]), r.choice(WIDE) % 2 ** 64)
        return out

    def keys(self):
        """Of pages that others may have put, some of them twice."""
        return b"".join(bytes([self.r.randrange(12)]) * 16 for _ in range(self.r.choice([1, 2, 3, 9])))

    def prompt(self, length=0):
        """One that others may have published. `length`: of a sequence that may be published as this."""
        begin = self.r.randrange(2)
        n = length // 64 * 64 if length >= 64 and self.r.random() < 0.8 else self.r.choice([64, 128, 200])
        tokens = b"".join(struct.pack("<I", begin + i) for i in range(min(n, 1000)))
        return kv.PrefixKeys(tokens=tokens) if self.r.random() < 0.7 else kv.PrefixKeys(block_keys=self.keys(), key_bytes=16)

    # -- bytes ------------------------------------------------------------------------------------

    def varint(self, n):
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    def damage(self, data):
        r, data = self.r, bytearray(data)
        at = r.randrange(len(data) + 1)
        kind = r.randrange(10)
        if kind == 0:
            return bytes(data[:at])
        if kind == 1 and data:
            for _ in range(r.choice([1, 1, 4, 30])):
                data[r.randrange(len(data))] ^= 1 << r.randrange(8)
            return bytes(data)
        if kind == 2:
            return bytes(data[:at]) + r.randbytes(r.choice([1, 2, 9, 100])) + bytes(data[at:])
        if kind == 3:  # a length far beyond the end
            return bytes(data) + self.varint(r.randrange(1, 20) << 3 | 2) + self.varint(r.choice(WIDE))
        if kind == 4:  # fields that nobody knows, of every wire type
            return bytes(data) + b"".join(self.varint(r.getrandbits(29) << 3 | r.randrange(8)) + r.randbytes(r.randrange(12)) for _ in range(20))
        if kind == 5:  # messages in messages
            inner = b""
            for _ in range(r.choice([50, 500, 3000])):
                inner = self.varint(r.choice([2, 4, 5, 8]) << 3 | 2) + self.varint(len(inner)) + inner
            return bytes(data) + inner
        if kind == 6:  # one field very often
            count = r.choice([1000, 20000, 20000, 300000])
            return bytes(data) + (self.varint(r.randrange(1, 9) << 3 | r.choice([0, 2])) + b"\0") * count
        if kind == 7:  # text that is none
            bad = r.choice([b"\xff\xfe", b"\xc0\x80", b"a\0b", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"])
            return bytes(data) + self.varint(r.randrange(1, 6) << 3 | 2) + self.varint(len(bad)) + bad
        if kind == 8:  # an endless varint
            return bytes(data) + b"\x08" + b"\xff" * r.choice([9, 10, 11, 1000])
        return r.randbytes(r.choice([0, 1, 10, 1000, 100000]))

    def request(self, kind):
        """The bytes of a request of this kind."""
        p = self.r.random()
        if p < 0.45:
            return self.good(kind).SerializeToString()
        message = self.fill(kind()) if p < 0.7 else self.good(kind)
        if 0.7 <= p < 0.8:  # nearly right: one field is anything
            other = self.fill(kind())
            field = self.r.choice(kind.DESCRIPTOR.fields) if kind.DESCRIPTOR.fields else None
            if field:
                message.ClearField(field.name)
                keep = kind()
                keep.CopyFrom(other)
                for f in kind.DESCRIPTOR.fields:
                    if f.name != field.name:
                        keep.ClearField(f.name)
                message.MergeFrom(keep)
        data = message.SerializeToString()
        return self.damage(data) if p >= 0.8 else data
