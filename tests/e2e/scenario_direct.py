"""Direct mode in a random scenario: decoding over mapped pages in this process, with tokens that are taken back."""
import numpy as np

from on_device import place, values
from scenario_model import Attention, Mismatch, View, agree, bf16, widen

AHEAD = 160  # tokens that kernels may be ahead of what the daemon has, and more


class Step:
    """What one step put in and got of one slot, to be compared when all of the history can be read."""

    def __init__(self, sequence, length, stored, reach, q, k, v, o, lse):
        self.sequence, self.length, self.stored, self.reach = sequence, length, stored, reach
        self.q, self.new, self.o, self.lse = q, (k, v), o, lse

    def verify(self, scenario, a):
        """History may have reached any chunk between where it was and where it could be: one of them has to fit."""
        from scenarios import compare

        s, g, off = self.sequence, scenario.g, None
        first, hist_end = self.reach[0]
        ends = {g.planes[0].demoted(hist_end, n) for n in range(max(self.stored, self.length - AHEAD), self.length + 1)}
        for end in sorted(ends, reverse=True):
            stored = s.stored(0, g.layers, View(self.length, [(first, end)]))
            k, v = (np.concatenate([x, widen(new)], axis=1) for x, new in zip(stored, self.new))
            o, lse = a.truth(g, 0, widen(self.q) if self.q.dtype != np.float32 else self.q, k, v)
            try:
                what = f"direct mode over {self.length} tokens of {s.id}"
                compare(what, self.o, o, 1 if self.o.dtype == np.float32 else 0, scenario.errors)
                scenario.compare_lse(what, self.lse, lse)
                return
            except Mismatch as e:
                off = off or e
        raise off


def decode(scenario):
    """Some sequences of a session, published and attached by a client of libkvd, are decoded, shortened and decoded again."""
    rng, g, package = scenario.rng, scenario.g, scenario.direct_mode
    session = scenario.pick([s for s in scenario.sessions if scenario.held(s)])
    chosen = [s for s in scenario.held(session) if not s.pending_layers and scenario.room(s)][:2]
    for i, s in enumerate(chosen):
        if not s.name:
            name = f"{scenario.names}-direct-{len(scenario.log)}-{i}"
            agree("PublishSequence", session.call("PublishSequence", sequence=s.id, name=name)[0], "OK")
            s.name = name
    a = Attention(rng, g)
    options = dict(slots=len(chosen) + int(rng.integers(0, 2)), step_tokens=int(rng.integers(1, 5)), max_tokens=2000,
                   dtype="f32" if rng.random() < 0.7 else "bf16", scale=a.scale, softcap=a.softcap, window=a.window)
    if not chosen:
        return
    with package.Client(layers=[2 * i + 1 for i in range(g.layers)], q_heads=g.q_heads, kv_heads=g.kv_heads,
                        head_dim=tuple(g.dims), codec=g.planes[0].codec, rotation_set=g.rotation_set or None, sink=g.planes[0].sink,
                        recent=g.planes[0].recent, latent=g.latent, address=scenario.address) as client:
        bound = [client.attach(s.name) for s in chosen]
        for s in chosen:
            s.holders.add(client)
        with package.Direct(client, **options) as direct:
            for _ in range(int(rng.integers(1, 3))):
                for slot, sequence in enumerate(bound):
                    direct.bind(slot, sequence)
                steps = decode_steps(scenario, direct, client.on_gpu, chosen, options, int(rng.integers(1, 30)))
                direct.flush()
                for s in chosen:
                    scenario.learn(session, s, 0, g.layers)
                for step in steps:
                    step.verify(scenario, a)
                scenario.describe(session)
                for slot in range(len(bound)):
                    direct.bind(slot, None)
                for s, sequence in zip(chosen, bound):
                    keep = max(0, s.length - int(rng.integers(0, 60)))
                    scenario.say("truncate", f"direct mode: {s.id} from {s.length} back to {keep}")
                    sequence.truncate(keep)
                    s.truncate(keep)
    for s in chosen:
        s.holders.discard(client)


def decode_steps(scenario, direct, on_gpu, chosen, options, count):
    """Steps of random tokens of which some stay. The model follows."""
    rng, g, steps = scenario.rng, scenario.g, []
    slots, n = options["slots"], options["step_tokens"]
    scenario.say("direct", f"direct mode: {count} steps of {n} tokens, {options}, of {[(s.id, s.length) for s in chosen]}")
    first = [(s.length, s.reach) for s in chosen]
    for _ in range(count):
        q = rng.standard_normal((g.layers, slots, n, g.q_heads, g.dim_q), np.float32)
        q = q if options["dtype"] == "f32" else bf16(q)
        k, v = (bf16(rng.standard_normal((g.layers, slots, n, g.kv_heads, d), np.float32)) for d in g.dims)
        o = np.zeros((g.layers, slots, n, g.q_heads, g.dims[1]), q.dtype)
        lse = np.zeros((g.layers, slots, n, g.q_heads), np.float32)
        direct.begin()
        for layer in range(g.layers):
            placed, outputs = place(on_gpu, k[layer], v[layer], q[layer]), place(on_gpu, o[layer], lse[layer])
            direct.store(layer, *placed[:2])
            direct.attend(layer, placed[2], *outputs)
            o[layer], lse[layer] = map(values, outputs)
        kept = [int(rng.integers(0, n + 1)) if rng.random() < 0.4 else n for _ in range(slots)]
        direct.end(None if all(x == n for x in kept) else kept)
        for slot, s in enumerate(chosen):
            steps.append(Step(s, s.length, *first[slot], *(x[:, slot].copy() for x in (q, k, v, o, lse))))
            if kept[slot]:
                s.append(0, k[:, slot, :kept[slot]], v[:, slot, :kept[slot]])
                s.last = None
    return steps
