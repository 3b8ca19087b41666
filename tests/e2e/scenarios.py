"""Random scenarios: operations of several workers on shared sequences, each compared with the model at once.

A scenario is its seed. Each operation draws what it does from a generator of its own, and from the state it finds, so that
any of them can be left out: that is how a failing scenario is made short.
"""
import collections
import itertools
import threading
import time

import numpy as np

import scenario_direct
from scenario_holder import Here, Session
from scenario_model import Attention, Last, Mismatch, Sequence, View, agree, bf16, random_layout, widen
from scenario_tensors import Tensors

MOST_TOKENS = 1100
CPU_ERRORS = {0: 4e-3, 1: 2e-5}  # relative error of outputs in bf16 and f32; that of lse is as f32
GPU_ERRORS = {0: 6e-3, 1: 2e-3}


runs = itertools.count()


def relative(got, want):
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def compare(what, got, want, kind, errors):
    """An output's error as a whole, and that of each row where it is not lost in the others' size."""
    got = widen(got) if kind == 0 else got
    if not np.isfinite(got).all():
        raise Mismatch(f"{what} is not finite")
    whole = relative(got, want)
    norms = np.linalg.norm(want, axis=-1)
    rows = np.linalg.norm(got - want, axis=-1) / np.maximum(norms, 0.1 * norms.mean())
    if whole > errors[kind] or rows.max() > 10 * errors[kind]:
        bad = np.unravel_index(rows.argmax(), rows.shape)
        raise Mismatch(f"{what} is {whole:.2e} off; layer {bad[0]}, query {bad[1]}, head {bad[2]}: {rows.max():.2e}")
    return whole


class Prepared:
    """A call, and what is to be checked when it has come back."""

    def __init__(self, session, method, fields, verify):
        self.session, self.method, self.fields, self.verify = session, method, fields, verify
        self.result = None

    def send(self):
        self.result = self.session.call(self.method, **self.fields)

    def finish(self):
        code, reply = self.result
        if code != "OK":
            raise Mismatch(f"{self.session.label}: {self.method} failed: {code} {reply}")
        self.verify(reply)

    def run(self):
        self.send()
        self.finish()


class Scenario:
    """One run. `kv` are the wire's messages, `places` where sessions may live: Here, and perhaps Elsewhere. `keeps`: kvd's pool
    is to outlive it."""

    OPERATIONS = (("append", 22), ("step", 20), ("attend", 18), ("read", 8), ("fork", 7), ("truncate", 7), ("publish", 5),
                  ("attach", 11), ("free", 4), ("wrong", 9), ("replay", 12), ("together", 5), ("replace", 3), ("create", 2),
                  ("direct", 2), ("unfinished", 5))

    def __init__(self, kv, address, places, seed, without=(), direct=None, errors=None, keeps=False):
        self.kv, self.address, self.places, self.seed, self.without = kv, address, places, seed, without
        self.direct_mode, self.errors, self.keeps = direct, errors or CPU_ERRORS, keeps
        self.rng = np.random.default_rng([seed])
        self.g = random_layout(self.rng, self.errors is GPU_ERRORS)
        self.operations = int(self.rng.integers(10, 30))
        self.n_sessions = int(self.rng.choice([1, 2, 2, 3, 3]))
        self.sessions, self.sequences, self.log = [], [], []
        self.names = f"{seed}-{next(runs)}"  # a run that failed leaves some behind
        self.worst, self.done = 0.0, collections.Counter()

    # -- helpers --------------------------------------------------------------------------------

    def layout(self):
        g, ids = self.g, [2 * i + 1 for i in range(self.g.layers)]
        common = dict(q_heads=g.q_heads, kv_heads=g.kv_heads, head_dim_k=g.dims[0], head_dim_v=g.dims[1], rotation_set=g.rotation_set,
                      latent=g.latent)

        def own(p):
            usual = (p.sink, p.recent) == (0 if p.window else 64, 256)
            return dict(codec=p.codec, window=p.window, windows=None if usual else self.kv.Windows(sink=p.sink, recent=p.recent))

        if len(g.planes) == 1:
            return self.kv.Layout(layers=ids, **own(g.planes[0]), **common)
        planes = [self.kv.Plane(layers=[i for i, of in zip(ids, g.of) if of == n], **own(p)) for n, p in enumerate(g.planes)]
        return self.kv.Layout(planes=planes, **common)

    def chance(self, p):
        return self.rng.random() < p

    def pick(self, things):
        return things[int(self.rng.integers(len(things)))]

    def open_session(self):
        number = len(self.log)
        where = self.pick(self.places)
        free = [m for m in where.memory if m not in [s.descriptor for s in self.sessions]]
        memory = None if self.chance(0.3) else free[0]
        label = f"s{number}({type(where).__name__}{'' if memory is not None else ', leased'})"
        self.sessions.append(Session(self.kv, where, self.layout(), memory, label))
        self.log.append(f"open {label}")
        return self.sessions[-1]

    def held(self, session, want=lambda s: True):
        return [s for s in self.sequences if session in s.holders and want(s)]

    def holder(self, want=lambda s: True):
        """(a session, a sequence it holds that is as wanted), appending to one if there is none."""
        able = [s for s in self.sessions if self.held(s, want)]
        if not able:
            self.append_to(self.pick(self.sessions), None, False)
            able = [s for s in self.sessions if self.held(s)]
        session = self.pick(able)
        return session, self.pick(self.held(session, want) or self.held(session))

    def say(self, kind, text):
        self.log.append(text)
        self.done[kind] += 1

    def new(self, session):
        code, reply = session.call("CreateSequences", request_id=session.request_id(), count=1)
        agree("CreateSequences", code, "OK")
        s = Sequence(self.g, reply.sequences[0])
        s.holders.add(session)
        self.sequences.append(s)
        self.say("create", f"{session.label} creates {s.id}")
        return s

    def drop_holder(self, session, s):
        s.holders.discard(session)
        self.bury(s)

    def bury(self, s):
        if not s.holders and not s.name:
            self.sequences.remove(s)

    def tokens(self, room):
        kind = self.rng.random()
        high = 2 if kind < 0.3 else 20 if kind < 0.6 else 130 if kind < 0.9 else 400
        return int(min(self.rng.integers(1, high), room, 2 * self.most_queries()))

    def rows(self, layers, tokens):
        """K and V of so many tokens, bf16; rows differ in size."""
        out = []
        for d in self.g.dims:
            x = self.rng.standard_normal((layers, tokens, self.g.kv_heads, d), np.float32)
            x *= np.exp2(self.rng.uniform(-1.5, 1.5, (layers, tokens, self.g.kv_heads, 1))).astype(np.float32)
            out.append(bf16(x))
        return out

    def layers(self):
        """A random range of layers, mostly all."""
        if self.chance(0.6):
            return 0, self.g.layers
        begin = int(self.rng.integers(self.g.layers))
        return begin, int(self.rng.integers(1, self.g.layers - begin + 1))

    def learn(self, session, s, begin, count):
        """Reads the history that is not known yet."""
        for layer, n, first, end in list(s.unknown(begin, count)):
            self.read(session, s, layer, n, first, end, both=True)

    def read(self, session, s, begin, count, at, end, both=False):
        tensors, kind = Tensors(session, self.rng), 1 if both or self.chance(0.7) else 0
        refs = [tensors.want((count, end - at, self.g.kv_heads, d), kind) for d in self.g.dims]

        def verify(reply):
            got = [fetch(data) for (_, fetch), data in zip(refs, (reply.k, reply.v))]
            if kind == 1:
                s.learn(begin, at, got)
            elif not list(s.unknown(begin, count)):
                for x, want in zip(got, s.stored(begin, count)):
                    if not np.array_equal(x, bf16(want[:, at:end])):
                        raise Mismatch(f"sequence {s.id} in bf16 is not what it is in f32, rounded")

        Prepared(session, "ReadTokens", dict(sequence=s.id, begin=at, tokens=end - at, layer_begin=begin, layer_count=count,
                                             k=refs[0][0], v=refs[1][0]), verify).run()

    def describe(self, session):
        code, reply = session.call("DescribeSequences")
        agree("DescribeSequences", code, "OK")
        infos = {i.sequence: i for i in reply.sequences}
        agree(f"what {session.label} holds", sorted(infos), sorted(s.id for s in self.held(session)))
        for s in self.held(session):
            s.check(infos[s.id])

    # -- calls that compute -----------------------------------------------------------------------

    def params(self):
        a = Attention(self.rng, self.g)
        return a, self.kv.AttentionParams(scale=a.scale, softcap=a.softcap, window=a.window, return_lse=a.lse)

    def queries(self, tensors, a, begin, layers, n):
        """Fields of an item that attends with n queries of layers from `begin` on, and what compares the result with attention over k and v."""
        g, kind = self.g, int(self.rng.integers(2))
        q = self.rng.standard_normal((layers, n, g.q_heads, g.dim_q), np.float32)
        q = q if self.chance(0.7) else bf16(q)
        o_ref, o_of = tensors.want((layers, n, g.q_heads, g.dims[1]), kind)
        fields = dict(q=tensors.give(q), o=o_ref)
        if a.lse:
            fields["lse"], lse_of = tensors.want((layers, n, g.q_heads, 1), 1)
        q = widen(q) if q.dtype != np.float32 else q

        def verify(what, result, k, v):
            o, lse = a.truth(g, begin, q, k, v)
            off = compare(what, o_of(result.o), o, kind, self.errors)
            self.worst = max(self.worst, off if kind else 0)
            if a.lse:
                self.compare_lse(what, lse_of(result.lse)[..., 0], lse)
            elif result.lse:
                raise Mismatch(f"{what}: an lse that nobody wanted")
        return fields, verify

    def compare_lse(self, what, got, want):
        off = (np.abs(got - want) / (1 + np.abs(want))).max()
        if not off < self.errors[1]:
            raise Mismatch(f"{what}: lse is {off:.2e} off")

    @staticmethod
    def replayed(reply):
        """Of each item, or what was wrong."""
        if isinstance(reply, str):
            return reply
        return [r.replayed for r in reply.results] if hasattr(reply, "results") else list(reply.replayed)

    def seen(self, s, begin, count, window):
        """How many of the last positions see all of their windows."""
        view = s.view(begin, count)
        most = view.length
        while any(self.g.planes[p].sees(view.length - most, window) < view.reach[p][0] for p in self.g.of_layers(begin, count)):
            most -= 1
        return most

    def most_queries(self):
        return max(1, 300_000 // (self.g.layers * self.g.q_heads * max(self.g.dims)))

    def writable(self, session, first):
        """`first`, and sometimes more that the session holds and that are as far with their layers."""
        others = [s for s in self.held(session) if s is not first and s.pending_layers == first.pending_layers]
        self.rng.shuffle(others)
        return [first] + others[:int(self.rng.integers(0, 3))] if self.chance(0.3) else [first]

    def prepare_append(self, session, sequences, step, count=None, tokens=None):
        """Append or Step to sequences that are as far with their layers; of so many layers and tokens, or as it comes."""
        begin = sequences[0].pending_layers
        left = self.g.layers - begin
        count = count or (left if self.chance(0.75) else int(self.rng.integers(1, left + 1)))
        a, params = self.params()
        for s in sequences if step else []:
            self.learn(session, s, begin, count)
        tensors, items, checks = Tensors(session, self.rng), [], []
        for s in sequences:
            n = s.pending_length - s.length if begin else tokens or self.tokens(MOST_TOKENS - s.length)
            k, v = self.rows(count, n)
            request_id = session.request_id() if self.chance(0.8) else 0
            fields = dict(sequence=s.id, position=s.length, tokens=n, k=tensors.give(k), v=tensors.give(v), request_id=request_id)
            verify = None
            if step:
                more, verify = self.queries(tensors, a, begin, count, n)
                fields.update(more)
            items.append((self.kv.StepItem if step else self.kv.AppendItem)(**fields))
            checks.append((s, n, k, v, verify))
        method = "Step" if step else "Append"
        fields = dict(items=items, layer_begin=begin, layer_count=0 if count == left and self.chance(0.5) else count)
        if step:
            fields["params"] = params
        text = f"{method} by {session.label}, layers {begin} to {begin + count - 1}, {a if step else ''}: " + ", ".join(
            f"{n} tokens to {s.id} at {s.length}" for s, n, *_ in checks)
        self.say(method.lower(), text)

        def done(reply):
            agree(f"{text}: replayed", self.replayed(reply), [False] * len(checks))
            for i, (s, n, k, v, verify) in enumerate(checks):
                if step:
                    stored = s.stored(begin, count, View(s.length, s.reach))
                    verify(f"{text}: item {i}", reply.results[i],
                           *(np.concatenate([x, widen(new)], axis=1) for x, new in zip(stored, (k, v))))
                s.last = Last(session, items[i].request_id, method, s.length, begin, (k, v), s.reach, a)
                s.append(begin, k, v)
                agree(f"{text}: length", reply.results[i].length if step else reply.lengths[i],
                      s.view(begin, count).length if step else s.length)

        return Prepared(session, method, fields, done)

    def prepare_attend(self, session, sequences):
        begin, count = self.layers()
        sequences = [s for s in sequences if s.view(begin, count) and s.view(begin, count).length]
        if not sequences:
            return None
        a, params = self.params()
        for s in sequences:
            self.learn(session, s, begin, count)
        tensors, items, checks = Tensors(session, self.rng), [], []
        for s in sequences:
            most = min(self.seen(s, begin, count, a.window), self.most_queries())
            n = int(self.rng.integers(1, most + 1)) if self.chance(0.4) else min(most, int(self.rng.integers(1, 5)))
            fields, verify = self.queries(tensors, a, begin, count, n)
            items.append(self.kv.AttendItem(sequence=s.id, q_len=n, **fields))
            checks.append((s, verify, s.stored(begin, count)))
        text = f"Attend by {session.label}, layers {begin} to {begin + count - 1}, {a}: " + ", ".join(
            f"{i.q_len} queries of {s.id}, length {s.view(begin, count)}" for i, s in zip(items, sequences))
        self.say("attend", text)

        def done(reply):
            for i, (s, verify, stored) in enumerate(checks):
                verify(f"{text}: item {i}", reply.results[i], *stored)
                agree(f"{text}: length", reply.results[i].length, stored[0].shape[1])

        return Prepared(session, "Attend", dict(items=items, layer_begin=begin, layer_count=count, params=params), done)

    # -- operations -------------------------------------------------------------------------------

    def room(self, s):
        return s.length < MOST_TOKENS

    def append_to(self, session, s, step):
        s = s or self.new(session)
        self.prepare_append(session, [x for x in self.writable(session, s) if self.room(x)], step).run()

    def do_append(self, step=False):
        session = self.pick(self.sessions)
        able = self.held(session, self.room)
        self.append_to(session, self.pick(able) if able else None, step)

    def do_step(self):
        self.do_append(step=True)

    def do_attend(self):
        session, s = self.holder(lambda s: s.length)
        more = [x for x in self.held(session) if x is not s][:int(self.rng.integers(0, 3))] if self.chance(0.3) else []
        call = self.prepare_attend(session, [s, *more])
        if call:
            call.run()

    def do_read(self):
        session, s = self.holder(lambda s: s.length)
        begin, count = self.layers()
        view = s.view(begin, count)
        if not view or not view.length:
            return
        first = max(view.reach[p][0] for p in self.g.of_layers(begin, count))
        at, end = sorted(int(x) for x in self.rng.integers(first, view.length + 1, 2))
        if at == end:
            at, end = first, view.length
        self.say("read", f"ReadTokens by {session.label} of {s.id}, {at} to {end - 1}, layers {begin} to {begin + count - 1}, "
                 f"{view}")
        self.read(session, s, begin, count, at, end)

    def do_create(self):
        self.new(self.pick(self.sessions))

    def do_fork(self):
        session, s = self.holder()
        fields = dict(request_id=session.request_id(), sequence=s.id, count=int(self.rng.integers(0, 4)))
        code, reply = session.call("ForkSequence", **fields)
        self.say("fork", f"ForkSequence by {session.label} of {s.id} at {s.length}: {code}")
        if s.pending_layers:
            agree("fork in the middle of an append", code, "FAILED_PRECONDITION")
            return
        agree("ForkSequence", (code, len(getattr(reply, "sequences", []))), ("OK", max(1, fields["count"])))
        if self.chance(0.3):
            agree("ForkSequence again", list(session.call("ForkSequence", **fields)[1].sequences), list(reply.sequences))
        for i in reply.sequences:
            child = s.fork(i)
            child.holders.add(session)
            self.sequences.append(child)
        self.log.append(f"  children {list(reply.sequences)}")

    def do_truncate(self):
        halfway = any(s.pending_layers and s.length for s in self.sequences) and self.chance(0.5)
        session, s = self.holder(lambda s: s.length and (s.pending_layers or not halfway))
        keep = s.length if self.chance(0.15) else int(self.rng.integers(0, s.length + 1))
        if self.chance(0.4):
            keep = max(0, s.length - int(self.rng.integers(0, 40)))
        self.truncate(session, s, keep)

    def do_unfinished(self):
        """An append of some layers that takes the window's first slots, or just does not, and then a truncation into the window."""
        p = int(self.rng.integers(len(self.g.planes)))
        session, s = self.holder(lambda s: s.length > s.reach[p][1] and not s.pending_layers)
        end = s.reach[p][1]
        tokens = end + self.g.planes[p].ring + int(self.rng.integers(-3, 10)) - s.length
        if s.pending_layers or self.g.layers == 1 or s.length <= end or not 0 < tokens <= MOST_TOKENS - s.length:
            return
        self.prepare_append(session, [s], False, int(self.rng.integers(1, self.g.layers)), tokens).run()
        self.truncate(session, s, int(self.rng.integers(end, s.length + 1)))

    def truncate(self, session, s, keep):
        self.say("truncate", f"TruncateSequence by {session.label} of {s.id} from {s.length} (history {s.reach}, "
                 f"{s.pending_layers} layers pending) to {keep}")
        code, reply = session.call("TruncateSequence", sequence=s.id, length=keep)
        if s.damaged(keep, undone=self.keeps):
            agree("truncation that an unfinished append or a window has damaged", code, "FAILED_PRECONDITION")
        else:
            agree("TruncateSequence", (code, getattr(reply, "length", reply)), ("OK", keep))
            s.truncate(keep)

    def do_publish(self):
        session, s = self.holder()
        self.publish(session, s, f"{self.names}-{int(self.rng.integers(3))}", self.chance(0.5))

    def publish(self, session, s, name, replace):
        old = next((x for x in self.sequences if x.name == name and x is not s), None)
        code, reply = session.call("PublishSequence", sequence=s.id, name=name, replace=replace)
        self.say("publish", f"PublishSequence by {session.label} of {s.id} as {name}, replace {replace}: {code}")
        if old and not replace:
            agree("a name that is taken", code, "ALREADY_EXISTS")
            return
        agree("PublishSequence", (code, reply if code != "OK" else ""), ("OK", ""))
        s.name = name
        if old:
            old.name = ""
            self.bury(old)

    def do_attach(self):
        session = self.pick(self.sessions)
        foreign = [s for s in self.sequences if session not in s.holders]
        if not foreign:
            agree("attach to nothing", session.call("AttachSequence", name="nothing")[0], "NOT_FOUND")
            return
        s = self.pick(foreign)
        if not s.name:
            self.publish(self.pick([x for x in self.sessions if x in s.holders]), s, f"{self.names}-{len(self.log)}", False)
        code, reply = session.call("AttachSequence", name=s.name)
        self.say("attach", f"AttachSequence by {session.label} of {s.name}, {s.id}: {code}")
        agree("AttachSequence", code, "OK")
        agree("attached", reply.sequence.sequence, s.id)
        s.holders.add(session)
        s.check(reply.sequence)

    def do_free(self):
        session, s = self.holder()
        unpublish = self.chance(0.3)
        self.say("free", f"FreeSequences by {session.label} of {s.id}, unpublish {unpublish}")
        agree("FreeSequences", session.call("FreeSequences", sequences=[s.id], unpublish=unpublish)[0], "OK")
        s.name = "" if unpublish else s.name
        self.drop_holder(session, s)

    def do_replace(self):
        """A session ends in one way or another, and another takes its place."""
        if len(self.sessions) < 2:
            return
        session, hang_up = self.sessions.pop(int(self.rng.integers(len(self.sessions)))), self.chance(0.5)
        self.say("replace", f"{session.label} {'hangs up' if hang_up else 'closes'}")
        session.end(hang_up)
        for s in self.held(session):
            self.drop_holder(session, s)
        self.wait_gone(session)
        self.open_session()

    @staticmethod
    def wait_gone(session):
        """A hang-up takes effect a little later."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            code, _ = session.call("DescribeSequences")
            if code == "UNAUTHENTICATED":
                return
            time.sleep(0.01)
        raise Mismatch(f"{session.label} still lives")

    def do_together(self):
        """Calls of several sessions at once: appends to some sequences, attention over others."""
        calls, used = [], set()
        for session in self.sessions:
            for s in self.held(session, lambda s: s.id not in used)[:3]:
                if not isinstance(session.where, Here) or any(c.session is session and session.memory for c in calls if c):
                    continue  # one process answers one at a time; one call at a time has the session's memory
                used.add(s.id)
                if self.chance(0.5) and self.room(s):
                    calls.append(self.prepare_append(session, [s], self.chance(0.5)))
                elif s.length:
                    calls.append(self.prepare_attend(session, [s]))
        calls = [c for c in calls if c]
        self.say("together", f"the last {len(calls)} at once")
        threads = [threading.Thread(target=c.send) for c in calls]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for c in calls:
            c.finish()

    def do_replay(self):
        """The last append to a sequence once more, as after a lost reply, or by whom it is not meant for."""
        able = [s for s in self.sequences if s.last and s.last.session in s.holders]
        if not able:
            return
        s = self.pick(able)
        last, others = s.last, [x for x in s.holders if x in self.sessions and x is not s.last.session]
        session = self.pick(others) if others and self.chance(0.4) else last.session
        self.learn(session, s, last.begin, last.layers)
        tensors, position, request_id = Tensors(session, self.rng), last.position, last.request_id
        good = session is last.session and last.repeats(s)
        if good and self.chance(0.15):
            position, good = s.length + 1, False
        elif good and self.chance(0.15):
            request_id, good = session.request_id(), False
        if (request_id != last.request_id or not request_id or session is not last.session) and position == s.length:
            return  # after a truncation: a new append, and maybe a good one
        fields = dict(sequence=s.id, position=position, tokens=last.tokens, k=tensors.give(last.sides[0]), v=tensors.give(last.sides[1]),
                      request_id=request_id)
        params = self.kv.AttentionParams(scale=last.attention.scale, softcap=last.attention.softcap, window=last.attention.window,
                                         return_lse=last.attention.lse)
        if last.method == "Step":
            more, check = self.queries(tensors, last.attention, last.begin, last.layers, last.tokens)
            call = dict(items=[self.kv.StepItem(**fields, **more)], params=params)
        else:
            call = dict(items=[self.kv.AppendItem(**fields)])
        self.say("replay", f"the last {last.method} to {s.id}, {last.tokens} tokens at {last.position}, layers {last.begin} to "
                 f"{last.begin + last.layers - 1}, by {last.session.label} with id {last.request_id}, again at {position} by {session.label} "
                 f"with id {request_id}: {'a repeat' if good else 'refused'}")
        code, reply = session.call(last.method, layer_begin=last.begin, layer_count=last.layers, **call)
        if not good:
            agree(f"what is no repeat ({reply if code != 'OK' else 'accepted'})", code, "FAILED_PRECONDITION")
            return
        agree("a repeat", (code, self.replayed(reply)), ("OK", [True]))
        if last.method == "Append":
            agree("a repeat: lengths", list(reply.lengths), [s.length])
        else:
            end = last.position + last.tokens
            agree("a repeat: length", reply.results[0].length, end)
            check("a repeat", reply.results[0], *s.stored(last.begin, last.layers, last.then(s)))

    def do_direct(self):
        plain = len(self.g.planes) == 1 and not self.g.planes[0].window
        if not self.direct_mode or not plain or not any(self.held(x) for x in self.sessions):
            return
        scenario_direct.decode(self)

    def do_wrong(self):
        """A call that must be refused, and then nothing has changed."""
        session, s = self.holder()
        faults, tensors, length = {}, Tensors(session, self.rng), s.view(0, 1).length

        def item(begin=0, tokens=1, **kw):
            k, v = self.rows(self.g.layers - begin, tokens)
            return self.kv.AppendItem(**{**dict(sequence=s.id, position=s.length, tokens=tokens, k=tensors.give(k),
                                                v=tensors.give(v)), **kw})

        def append(*items, **kw):
            return "Append", dict(items=items, **kw)

        def attend(n, sequence=s.id, **kw):
            q = self.rng.standard_normal((kw.get("layer_count", self.g.layers), n, self.g.q_heads, self.g.dim_q), np.float32)
            kw = {"params": self.kv.AttentionParams(scale=0.1), **kw}
            return "Attend", dict(items=[self.kv.AttendItem(sequence=sequence, q_len=n, q=tensors.give(q))], **kw)

        def read(at, n, layer=0):
            return "ReadTokens", dict(sequence=s.id, begin=at, tokens=n, layer_begin=layer, layer_count=1)

        def not_held():
            foreign = [x for x in self.sequences if session not in x.holders]
            other = self.pick(foreign).id if foreign and self.chance(0.7) else s.id + (2 << 32)
            return self.pick([
                append(item(sequence=other)), attend(1, sequence=other),
                ("TruncateSequence", dict(sequence=other, length=0)), ("ForkSequence", dict(sequence=other, count=1)),
                ("FreeSequences", dict(sequences=[s.id, other])), ("DescribeSequences", dict(sequences=[s.id, other])),
                ("PublishSequence", dict(sequence=other, name="foreign", replace=True))])

        def not_finite():
            sides, last = self.rows(self.g.layers, 2), ()
            self.pick(sides)[-1, self.rng.integers(2), -1, self.rng.integers(64)] = self.pick([0x7F80, 0xFF80, 0x7FC0])
            good = [x for x in self.held(session) if x is not s and not x.pending_layers and self.room(x)]
            if good:
                last = item(sequence=good[0].id, position=good[0].length),
            return append(*last, item(tokens=2, k=tensors.give(sides[0]), v=tensors.give(sides[1])))

        def too_short():
            short = item(tokens=3, k=self.kv.TensorRef(inline_data=bytes(2 * self.g.layers * 3 * self.g.kv_heads * self.g.dims[0] - 2)))
            return append(short)

        def stale():
            at = int(self.rng.integers(0, s.length - 1))
            return append(item(position=at, tokens=s.length - at + 1 if self.chance(0.5) else 1))

        pending, part = s.pending_layers, s.pending_length - s.length if s.pending_layers else 3
        faults["a position ahead"] = "FAILED_PRECONDITION", lambda: append(item(position=s.length + int(self.rng.integers(1, 50))))
        if s.length > 2:
            faults["a stale position"] = "FAILED_PRECONDITION", stale
        if pending + 1 < self.g.layers:
            faults["layers out of turn"] = "FAILED_PRECONDITION", lambda: append(
                item(begin=pending + 1, tokens=part), layer_begin=pending + 1)
        if pending:
            faults["other tokens than the first layers"] = "FAILED_PRECONDITION", lambda: append(
                item(begin=pending, tokens=part + 1), layer_begin=pending)
            faults["layers on both sides"] = "FAILED_PRECONDITION", lambda: attend(1)
        elif self.room(s):
            faults["values that are not finite"] = "INVALID_ARGUMENT", not_finite
        faults["too few bytes"] = "INVALID_ARGUMENT", too_short
        faults["more queries than tokens"] = "INVALID_ARGUMENT", lambda: attend(length + 1, layer_begin=0, layer_count=1)
        faults["tokens beyond the end"] = "INVALID_ARGUMENT", lambda: read(int(self.rng.integers(0, length + 1)), length + 1)
        gone = [(layer, view.reach[p][0], self.g.planes[p]) for layer, p in enumerate(self.g.of)
                if (view := s.view(layer, 1)).reach[p][0]]
        if gone:
            layer, first, plane = self.pick(gone)
            end = s.view(layer, 1).length
            faults["tokens that a window has freed"] = "FAILED_PRECONDITION", lambda: read(first - 1, 1, layer)
            if (n := end - (first + plane.window - 2)) <= self.most_queries():
                faults["queries that would see them"] = "FAILED_PRECONDITION", lambda: attend(n, layer_begin=layer, layer_count=1)
        faults["no tokens"] = "INVALID_ARGUMENT", lambda: read(0, 0)
        faults["a longer truncation"] = "INVALID_ARGUMENT", lambda: ("TruncateSequence", dict(sequence=s.id, length=s.length + 1))
        faults["twice in a call"] = "INVALID_ARGUMENT", lambda: append(item(), item())
        faults["layers beyond the last"] = "INVALID_ARGUMENT", lambda: attend(1, layer_begin=self.g.layers)
        faults["too many layers"] = "INVALID_ARGUMENT", lambda: attend(1, layer_begin=self.g.layers - 1, layer_count=2)
        faults["no items"] = "INVALID_ARGUMENT", append
        faults["no such sequence"] = "NOT_FOUND", not_held
        what = self.pick(sorted(faults))
        code, make = faults[what]
        method, fields = make()
        self.say("wrong", f"{what}: {method} by {session.label} of {s.id}, length {s.length}, {pending} layers pending")
        got, details = session.call(method, **fields)
        agree(f"{what} ({details if got != 'OK' else 'accepted'})", got, code)

    # -- the whole --------------------------------------------------------------------------------

    def run(self):
        """Raises Mismatch. `log` says what was done."""
        try:
            for _ in range(self.n_sessions):
                self.open_session()
            names, weights = zip(*self.OPERATIONS)
            weights = np.array(weights) / sum(weights)
            for i in range(self.operations):
                if i in self.without:
                    continue
                self.rng = np.random.default_rng([self.seed, i])
                name = str(self.rng.choice(names, p=weights)) if i else "append"
                getattr(self, "do_" + name)()
                if self.chance(0.5):
                    self.describe(self.pick(self.sessions))
            self.rng = np.random.default_rng([self.seed, self.operations])
            for session in self.sessions:
                self.describe(session)
                for s in self.held(session, lambda s: s.length and not s.pending_layers):
                    for p, layer, n in self.g.runs(0, self.g.layers):
                        self.read(session, s, layer, n, s.reach[p][0], s.length, both=True)
            self.leave()
        finally:
            for session in self.sessions:
                try:
                    session.end(False)
                except Exception:  # noqa: BLE001  the daemon may be dead: what failed first is raised
                    pass

    def leave(self):
        """Takes every name back, so that nothing stays."""
        for s in [s for s in self.sequences if s.name]:
            session = self.sessions[0]
            if session not in s.holders:
                agree("AttachSequence", session.call("AttachSequence", name=s.name)[0], "OK")
            agree("FreeSequences", session.call("FreeSequences", sequences=[s.id], unpublish=True)[0], "OK")


def shorten(make, seconds, operations):
    """The operations that a failing scenario needs: leaves out one after the other, as long as it fails and time is left."""
    end, without = time.monotonic() + seconds, set()
    for i in reversed(range(operations)):
        if time.monotonic() > end:
            break
        try:
            make(without | {i}).run()
        except Mismatch:
            without.add(i)
        except Exception:  # noqa: BLE001  fails otherwise: not this one
            pass
    return without
