"""What kvd should hold and compute, in NumPy: contents, lengths and windows of sequences, attention in float64.

The truth of attention is float64 over the tokens as they are stored. Sink and recent window are the bf16 values that were
put in. History is what ReadTokens gives of it: it has to be near the original, and the same bits at every reading, in every
fork and at every holder.
"""
import numpy as np

CHUNK, PAGE, RING_SLACK = 16, 64, 64
CODECS = ("bf16", "int2", "int2c", "int2-lm", "turboquant-2", "turboquant-3", "turboquant-4")
CPU_CODECS = ("tc2", "tc2.5")  # that the CUDA backend has not
# Relative error of normal rows: of many together, at least and at most, and of any single one. That of another row is 1.4.
ERRORS = {"bf16": (0, 0, 0), "int2": (0.25, 0.62, 1.05), "int2c": (0.25, 0.66, 1.05), "int2-lm": (0.2, 0.45, 0.8),
          "turboquant-2": (0.2, 0.45, 0.8), "turboquant-3": (0.1, 0.27, 0.5), "turboquant-4": (0.05, 0.16, 0.3),
          "tc2": (0.2, 0.47, 0.85), "tc2.5": (0.15, 0.47, 0.85)}


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


class Layout:
    def __init__(self, layers, kv_heads, group, dims, codec, sink, recent, rotation_set):
        self.layers, self.kv_heads, self.group, self.dims = layers, kv_heads, group, dims
        self.codec, self.sink, self.recent, self.rotation_set = codec, sink, recent, rotation_set
        self.q_heads = kv_heads * group
        self.ring = -(-(recent + RING_SLACK) // PAGE) * PAGE

    def __str__(self):
        return (f"{self.layers} layers, {self.q_heads} q heads, {self.kv_heads} kv heads, dims {self.dims[0]} and {self.dims[1]}, "
                f"{self.codec}, {self.rotation_set or 'default'}, sink {self.sink}, recent {self.recent}")

    def demoted(self, hist_end, length):
        keep = self.sink + self.recent
        return hist_end if length <= keep else max(hist_end, self.sink + (length - keep) // CHUNK * CHUNK)


def random_layout(rng, on_gpu):
    codecs = CODECS if on_gpu else CODECS + CPU_CODECS
    while True:
        dims = [int(rng.choice([64, 64, 128, 128, 256])) for _ in range(2)]
        if rng.random() < 0.3:
            dims = [(80,), (96,), (112,), (192,), (192, 128)][int(rng.integers(5))]
        g = Layout(layers=int(rng.integers(1, 4)), kv_heads=int(rng.integers(1, 5)), group=int(rng.integers(1, 13)),
                     dims=list(dims) if len(dims) == 2 and rng.random() < 0.3 else [dims[0]] * 2, codec=str(rng.choice(codecs)),
                     sink=int(rng.choice([0, 16, 32, 64, 80, 144])), recent=int(rng.choice([0, 0, 16, 48, 64, 112, 256])),
                     rotation_set=str(rng.choice(["", "hadamard", "random", "identity"])))
        if g.layers * g.kv_heads * sum(g.dims) <= 1536 and g.q_heads * max(g.dims) <= 4096:
            return g


class Attention:
    """Parameters of one attention."""

    def __init__(self, rng, g):
        self.scale = float(np.float32(rng.uniform(0.02, 0.3))) if rng.random() < 0.3 else 0
        self.softcap = float(np.float32(rng.uniform(1, 20))) if rng.random() < 0.3 else 0
        self.window = int(rng.choice([1, 7, 64, 100, 333])) if rng.random() < 0.35 else 0
        self.lse = bool(rng.random() < 0.5)

    def __str__(self):
        return f"scale {self.scale:g} softcap {self.softcap:g} window {self.window}{' lse' if self.lse else ''}"

    def truth(self, g, q, k, v):
        """q [L, n, H, D] at the last n positions, k and v [L, T, KV, D]; float64. Returns o and lse."""
        layers, n, total = q.shape[0], q.shape[1], k.shape[1]
        q, k, v = (x.astype(np.float64) for x in (q, k, v))
        position = np.arange(total - n, total)[:, None]
        at = np.arange(total)[None, :]
        hidden = at > position
        if self.window:
            hidden |= at <= position - self.window
        o, lse = np.empty((layers, n, g.q_heads, g.dims[1])), np.empty((layers, n, g.q_heads))
        for l in range(layers):
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


class Last:
    """The last that appended to a sequence: what a repeat of it is recognized by, and what it should get."""

    def __init__(self, session, request_id, method, position, begin, sides, hist_end, attention):
        self.session, self.request_id, self.method, self.position = session, request_id, method, position
        self.begin, self.sides, self.hist_end, self.attention = begin, sides, hist_end, attention
        self.layers, self.tokens = sides[0].shape[:2]
        self.truncated = False

    def repeats(self, g):
        """Whether a repeat by its session should succeed: a Step wants the tokens that it attended to, uncompressed."""
        kept = self.position + self.tokens <= self.hist_end + g.ring or g.codec == "bf16"
        return bool(self.request_id and not self.truncated and (kept or self.method == "Append"))


class Sequence:
    """Tokens that kvd should have. Arrays are [layers, tokens, kv_heads, head_dim]; `history` is what was read, where known."""

    def __init__(self, g, id):  # noqa: A002
        self.g, self.id = g, id
        self.data = [np.zeros((g.layers, 0, g.kv_heads, d), "<u2") for d in g.dims]
        self.history = [np.zeros((g.layers, 0, g.kv_heads, d), np.float32) for d in g.dims]
        self.known = np.zeros((g.layers, 0), bool)
        self.length, self.hist_end = 0, g.sink
        self.pending_layers = self.pending_length = self.pending_hist_end = 0
        self.holders, self.name = set(), ""
        self.last = None  # the Append or Step that came last

    def fork(self, id):  # noqa: A002
        child = Sequence(self.g, id)
        child.data, child.history, child.known = self.data, self.history, self.known
        child.length, child.hist_end = self.length, self.hist_end
        return child

    def view(self, begin, count):
        """(length, hist_end) that such layers have, or None if an append in progress divides them."""
        if begin + count <= self.pending_layers:
            return self.pending_length, self.pending_hist_end
        return None if begin < self.pending_layers else (self.length, self.hist_end)

    def append(self, begin, k, v):
        """Tokens of layers [begin, ...): what Append should have done."""
        g, tokens, layers = self.g, k.shape[1], k.shape[0]
        if self.pending_layers == 0:
            def longer(a):
                return np.concatenate([a[:, :self.length], np.zeros((g.layers, tokens, *a.shape[2:]), a.dtype)], axis=1)
            self.data = [longer(a) for a in self.data]
            self.history = [longer(a) for a in self.history]
            self.known = longer(self.known)
            self.pending_length = self.length + tokens
            self.pending_hist_end = g.demoted(self.hist_end, self.pending_length)
        for a, new in zip(self.data, (k, v)):
            a[begin:begin + layers, self.length:] = new
        self.pending_layers = begin + layers
        if self.pending_layers == g.layers:
            self.length, self.hist_end, self.pending_layers = self.pending_length, self.pending_hist_end, 0

    def damaged(self, keep):
        """Whether a truncation to `keep` would want tokens that an unfinished append has overwritten."""
        return bool(self.pending_layers and self.pending_length > self.g.ring + self.hist_end and keep > self.hist_end
                    and self.length > self.hist_end)

    def truncate(self, length):
        if self.last and (self.pending_layers or length < self.length):
            self.last.truncated = True
        self.pending_layers = 0
        if length < self.hist_end:
            self.hist_end = max(length, self.g.sink)
        self.length = length
        self.data = [a[:, :length] for a in self.data]
        self.history = [a[:, :length] for a in self.history]
        self.known = self.known[:, :length]

    def unknown(self, begin, count):
        """The range of history tokens of these layers that was not read yet."""
        _, hist_end = self.view(begin, count)
        missing = np.flatnonzero(~self.known[begin:begin + count, self.g.sink:hist_end].all(axis=0)) + self.g.sink
        return (int(missing[0]), int(missing[-1]) + 1) if missing.size else None

    def learn(self, begin, at, got):
        """What ReadTokens gave as K and V (either may be None) of tokens from `at` on: checked, and remembered."""
        layers, tokens = next(x.shape[:2] for x in got if x is not None)
        length, hist_end = self.view(begin, layers)
        end = at + tokens
        low, high = max(at, self.g.sink), max(min(end, hist_end), max(at, self.g.sink))
        rows = slice(begin, begin + layers)
        for side, x in enumerate(got):
            if x is None:
                continue
            put = widen(self.data[side][rows, at:end])
            for part in (slice(0, min(low, end) - at), slice(high - at, tokens)):
                if part.start < part.stop and not np.array_equal(x[:, part], put[:, part]):
                    bad = np.argwhere((x[:, part] != put[:, part]).any(axis=(2, 3)))[0]
                    raise Mismatch(f"{'kv'[side]} of sequence {self.id}, layer {begin + bad[0]}, token {at + part.start + bad[1]} "
                                   f"is not the bf16 that was put in (length {length}, history to {hist_end})")
            if low >= end or low >= high:
                continue
            here, known = x[:, low - at:high - at], self.known[rows, low:high]
            same = (here == self.history[side][rows, low:high]).all(axis=(2, 3)) | ~known
            if not same.all():
                bad = np.argwhere(~same)[0]
                raise Mismatch(f"{'kv'[side]} of sequence {self.id}, layer {begin + bad[0]}, token {low + bad[1]} reads otherwise "
                               "than before")
            self._near(begin, low, side, here, put[:, low - at:high - at])
        if low < high and all(x is not None for x in got):
            for side, x in enumerate(got):
                self.history[side] = self.history[side].copy()
                self.history[side][rows, low:high] = x[:, low - at:high - at]
            self.known = self.known.copy()
            self.known[rows, low:high] = True

    def _near(self, begin, at, side, got, put):
        least, most, any_row = ERRORS[self.g.codec]
        lost = np.linalg.norm(got - put, axis=3) / np.linalg.norm(put, axis=3)
        where = f"{'kv'[side]} of sequence {self.id}, {self.g.codec}"
        if lost.max() > any_row:
            bad = np.unravel_index(lost.argmax(), lost.shape)
            raise Mismatch(f"{where}: layer {begin + bad[0]}, token {at + bad[1]}, kv head {bad[2]} is {lost.max():.3f} off")
        if lost.size >= 64 and not least <= lost.mean() <= most:
            raise Mismatch(f"{where}: tokens from {at} on are {lost.mean():.3f} off on average, not {least} to {most}")

    def stored(self, begin, count, view=None):
        """K and V of layers as kvd has them, float32. The history has to be known."""
        length, hist_end = view or self.view(begin, count)
        rows, out = slice(begin, begin + count), []
        for data, history in zip(self.data, self.history):
            x = widen(data[rows, :length])
            x[:, self.g.sink:hist_end] = history[rows, self.g.sink:hist_end]
            out.append(x)
        assert self.known[rows, self.g.sink:hist_end].all()
        return out

    def check(self, info):
        """SequenceInfo against the model."""
        where, sink = f"sequence {self.id}", self.g.sink
        agree(f"{where}, length", info.length, self.length)
        [tokens] = info.planes
        agree(f"{where}, sink tokens", tokens.sink, min(self.length, sink))
        agree(f"{where}, freed tokens", tokens.freed, 0)
        agree(f"{where}, history tokens", tokens.history, self.hist_end - sink)
        agree(f"{where}, recent tokens", tokens.recent, max(0, self.length - self.hist_end))
        agree(f"{where}, pending layers", info.pending_layers, self.pending_layers)
        agree(f"{where}, pending length", info.pending_length, self.pending_length if self.pending_layers else self.length)
        agree(f"{where}, name", info.name, self.name)
        agree(f"{where}, holders", info.holders, len(self.holders))
        end = self.pending_hist_end if self.pending_layers else self.hist_end
        agree(f"{where}, pages of history", info.codec_pages, -(-(end - sink) // PAGE))
