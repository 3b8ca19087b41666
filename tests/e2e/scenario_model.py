"""What kvd should hold and compute, in NumPy: contents, lengths and windows of sequences, attention in float64.

The truth of attention is float64 over the tokens as they are stored. Sink and recent window are the bf16 values that were
put in. History is what ReadTokens gives of it: it has to be near the original, and the same bits at every reading, in every
fork and at every holder.
"""
import collections

import numpy as np

CHUNK, PAGE, RING_SLACK, WINDOW_SLACK = 16, 64, 64, 64
CODECS = ("bf16", "int2", "int2c", "int2-lm", "turboquant-2", "turboquant-3", "turboquant-4", "int4", "tc2", "tc2.5")
# Relative error of normal rows: of many together, at least and at most, and of any single one. That of another row is 1.4.
ERRORS = {"bf16": (0, 0, 0), "int2": (0.25, 0.62, 1.05), "int2c": (0.25, 0.66, 1.05), "int2-lm": (0.2, 0.45, 0.8),
          "turboquant-2": (0.2, 0.45, 0.8), "turboquant-3": (0.1, 0.27, 0.5), "turboquant-4": (0.05, 0.16, 0.3),
          "int4": (0.03, 0.2, 0.5), "tc2": (0.2, 0.47, 0.85), "tc2.5": (0.15, 0.47, 0.85)}


def bf16(x):
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2")


def widen(b):
    return (b.astype(np.uint32) << 16).view(np.float32)


class Mismatch(AssertionError):
    """kvd and the model differ."""


def agree(what, got, want):
    if got != want:
        raise Mismatch(f"{what}: kvd has {got!r}, the model {want!r}")


class Plane:
    """Layers that are alike: codecs of K and V, and windows. `window` 0: every query sees all."""

    def __init__(self, codecs, sink, recent, window):
        self.codecs, self.sink, self.recent, self.window = codecs, sink, recent, window
        self.ring = -(-(recent + RING_SLACK) // PAGE) * PAGE

    @property
    def codec(self):
        k, v = self.codecs
        return k if k == v else f"k={k},v={v}"

    def __str__(self):
        return f"{self.codec}, sink {self.sink}, recent {self.recent}" + (f", window {self.window}" if self.window else "")

    def demoted(self, hist_end, length):
        keep = self.sink + self.recent
        return hist_end if length <= keep else max(hist_end, self.sink + (length - keep) // CHUNK * CHUNK)

    def freed(self, first, length, hist_end):
        """The first token that stays when an append is true."""
        keep = self.window + WINDOW_SLACK
        if not self.window or length <= keep:
            return first
        return max(first, min((length - keep) // PAGE * PAGE, hist_end))

    def pages(self, first, end):
        """Those of history [first, end)."""
        return set(range(max(0, first - self.sink) // PAGE, -(-(end - self.sink) // PAGE))) if first < end else set()

    def sees(self, position, window):
        """The first token that a query there sees, which may have a window of its own."""
        w = min(self.window, window) if self.window and window else self.window or window
        return max(0, position - w + 1) if w else 0


class Layout:
    """`of` has the plane of each layer. latent: K is the rope part, V the latent, and queries are for the latent, then for the rope part."""

    def __init__(self, planes, of, kv_heads, group, dims, rotation_set, latent=False):
        self.planes, self.of, self.kv_heads, self.group, self.dims = planes, of, kv_heads, group, dims
        self.latent, self.dim_q = latent, sum(dims) if latent else dims[0]
        self.layers, self.rotation_set, self.q_heads = len(of), rotation_set, kv_heads * group

    def __str__(self):
        planes = "; ".join(f"layers {[i for i, p in enumerate(self.of) if p == n]}: {plane}" for n, plane in enumerate(self.planes))
        return (f"{self.q_heads} q heads, {'a latent' if self.latent else f'{self.kv_heads} kv heads'}, dims {self.dims[0]} and {self.dims[1]}, "
                f"{self.rotation_set or 'default'}; {planes}")

    def runs(self, begin, count):
        """(plane, first layer, layers) of consecutive layers of one plane."""
        end = begin + count
        while begin < end:
            n = 1
            while begin + n < end and self.of[begin + n] == self.of[begin]:
                n += 1
            yield self.of[begin], begin, n
            begin += n

    def of_layers(self, begin, count):
        return sorted(set(self.of[begin:begin + count]))


def random_plane(rng, several):
    k, v = (str(rng.choice(CODECS)) for _ in range(2))
    window = int(rng.choice([1, 16, 64, 100, 200, 333])) if rng.random() < (0.5 if several else 0.1) else 0
    return Plane((k, v) if rng.random() < 0.25 else (k, k), 0 if window else int(rng.choice([0, 16, 32, 64, 80, 144])),
                 int(rng.choice([0, 0, 16, 48, 64, 112, 256])), window)


def random_latent(rng):
    """A layout of a latent in what it can have, with the rope part in bf16."""
    plane = random_plane(rng, False)
    plane.codecs = "bf16", str(rng.choice([c for c in CODECS if not c.startswith("tc")]))
    return Layout([plane], [0] * int(rng.integers(1, 3)), kv_heads=1, group=int(rng.integers(1, 9)), dims=[64, 512],
                  rotation_set=str(rng.choice(["", "hadamard", "random", "identity"])), latent=True)


def random_layout(rng, on_gpu):
    if not on_gpu and rng.random() < 0.08:
        return random_latent(rng)
    while True:
        dims = [int(rng.choice([64, 64, 128, 128, 256])) for _ in range(2)]
        if rng.random() < 0.3:
            dims = [(80,), (96,), (112,), (192,), (192, 128)][int(rng.integers(5))]
        layers, several = int(rng.integers(1, 4)), rng.random() < 0.3
        layers += 2 * several
        count = int(rng.integers(2, min(layers, 3) + 1)) if several else 1
        of = [*range(count), *(int(rng.integers(count)) for _ in range(layers - count))]
        g = Layout([random_plane(rng, several) for _ in range(count)], [of[i] for i in rng.permutation(layers)],
                   kv_heads=int(rng.integers(1, 5)), group=int(rng.integers(1, 13)),
                   dims=list(dims) if len(dims) == 2 and rng.random() < 0.3 else [dims[0]] * 2,
                   rotation_set=str(rng.choice(["", "hadamard", "random", "identity"])))
        if len({c for p in g.planes for c in p.codecs}) > 1 and not g.rotation_set:
            g.rotation_set = "hadamard"  # codecs that want others by default have to be told
        if g.layers * g.kv_heads * sum(g.dims) <= (3072 if several else 1536) and g.q_heads * max(g.dims) <= 4096:
            return g


class Attention:
    """Parameters of one attention."""

    def __init__(self, rng, g):
        self.scale = float(np.float32(rng.uniform(0.02, 0.3))) if rng.random() < 0.3 or g.latent else 0
        self.softcap = float(np.float32(rng.uniform(1, 20))) if rng.random() < 0.3 else 0
        self.window = int(rng.choice([1, 7, 64, 100, 333])) if rng.random() < 0.35 else 0
        self.lse = bool(rng.random() < 0.5)

    def __str__(self):
        return f"scale {self.scale:g} softcap {self.softcap:g} window {self.window}{' lse' if self.lse else ''}"

    def truth(self, g, begin, q, k, v):
        """q [L, n, H, D] at the last n positions, k and v [L, T, KV, D] of layers from `begin` on; float64. Returns o and lse."""
        layers, n, total = q.shape[0], q.shape[1], k.shape[1]
        q, k, v = (x.astype(np.float64) for x in (q, k, v))
        if g.latent:
            k = np.concatenate([v, k], axis=3)
        position = np.arange(total - n, total)[:, None]
        at = np.arange(total)[None, :]
        o, lse = np.empty((layers, n, g.q_heads, g.dims[1])), np.empty((layers, n, g.q_heads))
        for l in range(layers):
            plane = g.planes[g.of[begin + l]]
            hidden = (at > position) | (at < np.array([[plane.sees(p, self.window)] for p in position[:, 0]]))
            for h in range(g.q_heads):
                s = q[l, :, h] @ k[l, :, h // g.group].T * (self.scale or g.dims[0] ** -0.5)
                if self.softcap:
                    s = self.softcap * np.tanh(s / self.softcap)
                s[hidden] = -np.inf
                most = s.max(axis=1, keepdims=True)
                p = np.exp(s - most)
                total_p = p.sum(axis=1, keepdims=True)
                o[l, :, h] = p @ v[l, :, h // g.group] / total_p
                lse[l, :, h] = (most + np.log(total_p))[:, 0]
        return o, lse


# What layers have: `reach` is (first, hist_end) by plane. Tokens [sink, hist_end) are history, of which those before first are
# freed.
View = collections.namedtuple("View", "length reach")


class Last:
    """The last that appended to a sequence: what a repeat of it is recognized by, and what it should get."""

    def __init__(self, session, request_id, method, position, begin, sides, reach, attention):
        self.session, self.request_id, self.method, self.position = session, request_id, method, position
        self.begin, self.sides, self.reach, self.attention = begin, sides, reach, attention
        self.layers, self.tokens = sides[0].shape[:2]
        self.truncated = False

    def repeats(self, s):
        """Whether a repeat by its session should succeed: a Step wants the tokens that it attended to, there and uncompressed."""
        for p in s.g.of_layers(self.begin, self.layers) if self.method == "Step" else []:
            g, end = s.g.planes[p], self.position + self.tokens
            if end > self.reach[p][1] + g.ring and g.codec != "bf16":
                return False
            if g.sees(self.position, self.attention.window) < s.reach[p][0]:
                return False
        return bool(self.request_id and not self.truncated)

    def then(self, s):
        """What the layers had before it, of what is still there."""
        return View(self.position + self.tokens, [(now[0], end) for now, (_, end) in zip(s.reach, self.reach)])


class Sequence:
    """Tokens that kvd should have. Arrays are [layers, tokens, kv_heads, head_dim]; `values` is what was read of history, where known."""

    def __init__(self, g, id):  # noqa: A002
        self.g, self.id = g, id
        self.data = [np.zeros((g.layers, 0, g.kv_heads, d), "<u2") for d in g.dims]
        self.values = [np.zeros((g.layers, 0, g.kv_heads, d), np.float32) for d in g.dims]
        self.known = np.zeros((g.layers, 0), bool)
        self.length, self.reach = 0, [(0, p.sink) for p in g.planes]
        self.pending_layers = self.pending_length = 0
        self.pending = self.reach
        self.holders, self.name = set(), ""
        self.last = None  # the Append or Step that came last

    def fork(self, id):  # noqa: A002
        child = Sequence(self.g, id)
        child.data, child.values, child.known = self.data, self.values, self.known
        child.length, child.reach = self.length, self.reach
        return child

    def view(self, begin, count):
        """What such layers have, or None if an append in progress divides them."""
        if begin + count <= self.pending_layers:
            return View(self.pending_length, self.pending)
        return None if begin < self.pending_layers else View(self.length, self.reach)

    def history(self, begin, count):
        """(first layer, layers, first token, end) of history that is there, of each run of layers."""
        view = self.view(begin, count)
        for p, at, n in self.g.runs(begin, count):
            first, end = view.reach[p]
            yield at, n, max(first, self.g.planes[p].sink), end

    def append(self, begin, k, v):
        """Tokens of layers [begin, ...): what Append should have done."""
        g, tokens, layers = self.g, k.shape[1], k.shape[0]
        if self.pending_layers == 0:
            def longer(a):
                return np.concatenate([a[:, :self.length], np.zeros((g.layers, tokens, *a.shape[2:]), a.dtype)], axis=1)
            self.data = [longer(a) for a in self.data]
            self.values = [longer(a) for a in self.values]
            self.known = longer(self.known)
            self.pending_length = self.length + tokens
            ends = [p.demoted(end, self.pending_length) for p, (_, end) in zip(g.planes, self.reach)]
            self.pending = [(p.freed(first, self.pending_length, end), end) for p, (first, _), end in zip(g.planes, self.reach, ends)]
        for a, new in zip(self.data, (k, v)):
            a[begin:begin + layers, self.length:] = new
        self.pending_layers = begin + layers
        if self.pending_layers == g.layers:
            self.length, self.reach, self.pending_layers = self.pending_length, self.pending, 0

    def damaged(self, keep, undone=False):
        """Whether a truncation to `keep` would want tokens that an unfinished append has overwritten, or windows have freed. `undone`: kvd
        has what it has overwritten, as a pool that is kept does."""
        for p, (first, end) in zip(self.g.planes, self.reach):
            if not undone and self.pending_layers and self.pending_length > p.ring + end and keep > end and self.length > end:
                return True
            if first and 0 < keep < first + p.window - 1:
                return True
        return False

    def truncate(self, length):
        if self.last and (self.pending_layers or length < self.length):
            self.last.truncated = True
        self.pending_layers = 0
        self.reach = [(first if length else 0, end if length >= end else max(length, p.sink))
                      for p, (first, end) in zip(self.g.planes, self.reach)]
        self.length = length
        self.data = [a[:, :length] for a in self.data]
        self.values = [a[:, :length] for a in self.values]
        self.known = self.known[:, :length]

    def unknown(self, begin, count):
        """The layers and tokens of history that were not read yet: (first layer, layers, first token, end) of each run."""
        for at, n, first, end in self.history(begin, count):
            missing = np.flatnonzero(~self.known[at:at + n, first:end].all(axis=0)) + first
            if missing.size:
                yield at, n, int(missing[0]), int(missing[-1]) + 1

    def learn(self, begin, at, got):
        """What ReadTokens gave as K and V (either may be None) of tokens from `at` on: checked, and remembered."""
        layers = next(x.shape[0] for x in got if x is not None)
        for layer, n, first, end in self.history(begin, layers):
            part = slice(layer - begin, layer - begin + n)
            self._learn(layer, at, [None if x is None else x[part] for x in got], first, end)

    def _learn(self, begin, at, got, first, hist_end):
        """The same of layers that have history [first, hist_end)."""
        layers, tokens = next(x.shape[:2] for x in got if x is not None)
        end = at + tokens
        low, high = max(at, first), max(min(end, hist_end), max(at, first))
        rows = slice(begin, begin + layers)
        for side, x in enumerate(got):
            if x is None:
                continue
            put = widen(self.data[side][rows, at:end])
            for part in (slice(0, min(low, end) - at), slice(high - at, tokens)):
                if part.start < part.stop and not np.array_equal(x[:, part], put[:, part]):
                    bad = np.argwhere((x[:, part] != put[:, part]).any(axis=(2, 3)))[0]
                    raise Mismatch(f"{'kv'[side]} of sequence {self.id}, layer {begin + bad[0]}, token {at + part.start + bad[1]} "
                                   f"is not the bf16 that was put in (history {first} to {hist_end})")
            if low >= end or low >= high:
                continue
            here, known = x[:, low - at:high - at], self.known[rows, low:high]
            same = (here == self.values[side][rows, low:high]).all(axis=(2, 3)) | ~known
            if not same.all():
                bad = np.argwhere(~same)[0]
                raise Mismatch(f"{'kv'[side]} of sequence {self.id}, layer {begin + bad[0]}, token {low + bad[1]} reads otherwise "
                               "than before")
            self._near(begin, low, side, here, put[:, low - at:high - at])
        if low < high and all(x is not None for x in got):
            for side, x in enumerate(got):
                self.values[side] = self.values[side].copy()
                self.values[side][rows, low:high] = x[:, low - at:high - at]
            self.known = self.known.copy()
            self.known[rows, low:high] = True

    def _near(self, begin, at, side, got, put):
        codec = self.g.planes[self.g.of[begin]].codecs[side]
        least, most, any_row = ERRORS[codec]
        lost = np.linalg.norm(got - put, axis=3) / np.linalg.norm(put, axis=3)
        where = f"{'kv'[side]} of sequence {self.id}, {codec}"
        if lost.max() > any_row:
            bad = np.unravel_index(lost.argmax(), lost.shape)
            raise Mismatch(f"{where}: layer {begin + bad[0]}, token {at + bad[1]}, kv head {bad[2]} is {lost.max():.3f} off")
        if lost.size >= 64 and not least <= lost.mean() <= most:
            raise Mismatch(f"{where}: tokens from {at} on are {lost.mean():.3f} off on average, not {least} to {most}")

    def stored(self, begin, count, view=None):
        """K and V of layers as kvd has them, float32. The history has to be known; what is freed of it does not matter."""
        view, out = view or self.view(begin, count), []
        for data, values in zip(self.data, self.values):
            x = widen(data[begin:begin + count, :view.length])
            for p, at, n in self.g.runs(begin, count):
                first, end = max(view.reach[p][0], self.g.planes[p].sink), view.reach[p][1]
                assert self.known[at:at + n, first:end].all()
                x[at - begin:at - begin + n, first:end] = values[at:at + n, first:end]
            out.append(x)
        return out

    def check(self, info):
        """SequenceInfo against the model."""
        where = f"sequence {self.id}"
        agree(f"{where}, length", info.length, self.length)
        agree(f"{where}, planes", len(info.planes), len(self.g.planes))
        for i, (tokens, p, (first, end)) in enumerate(zip(info.planes, self.g.planes, self.reach)):
            got, history = (tokens.sink, tokens.freed, tokens.history, tokens.recent), max(p.sink, first)
            agree(f"{where}, tokens of plane {i}", got, (min(self.length, p.sink), first, end - history, max(0, self.length - end)))
        agree(f"{where}, pending layers", info.pending_layers, self.pending_layers)
        agree(f"{where}, pending length", info.pending_length, self.pending_length if self.pending_layers else self.length)
        agree(f"{where}, name", info.name, self.name)
        agree(f"{where}, holders", info.holders, len(self.holders))
        pages = 0
        for p, (first, end), (pending_first, pending_end) in zip(self.g.planes, self.reach, self.pending):
            there, demote = p.pages(first, end), max(end, pending_first)
            pages += len(there | p.pages(demote, pending_end) if self.pending_layers else there)
        agree(f"{where}, pages of history", info.codec_pages, pages)
