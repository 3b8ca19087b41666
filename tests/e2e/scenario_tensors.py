"""How tensors of a random scenario travel: inline or in registered memory, dense or with strides and garbage in between."""
import numpy as np

from scenario_model import Mismatch

DTYPES = {0: np.dtype("<u2"), 1: np.dtype("<f4")}


class Tensors:
    """Those of one call of one session. Outputs that are written beyond their elements are a mismatch."""

    def __init__(self, session, rng, taken=0):
        self.session, self.rng, self.taken = session, rng, taken
        self.kv = session.kv
        self.memory = np.frombuffer(session.memory, np.uint8) if session.memory else None

    def _layout(self, shape, size):
        """Strides of layers, tokens and heads in any order and with gaps, and where it begins and ends."""
        row, offset = shape[3] * size, int(self.rng.integers(0, 9)) * size
        strides, inner = [0, 0, 0], row
        for axis in self.rng.permutation(3):
            inner += int(self.rng.integers(0, 6)) * size
            strides[axis] = inner
            inner *= shape[axis]
        return strides, offset, offset + sum((n - 1) * s for n, s in zip(shape, strides)) + row

    def _choose(self, shape, size, inline_strides):
        """(in registered memory, strides or None for dense, offset, bytes)."""
        buffer = self.memory is not None and self.rng.random() < 0.6
        if self.rng.random() < 0.5 or not (buffer or inline_strides):
            return buffer, None, 0, int(np.prod(shape)) * size
        return (buffer, *self._layout(shape, size))

    def _room(self, size):
        """Registered memory for so many bytes, at an address that 64 divides or, for any alignment of elements, 4."""
        self.taken = -(-self.taken // 64) * 64 + 4 * int(self.rng.integers(0, 3))
        at, self.taken = self.taken, self.taken + size
        assert self.taken <= self.memory.size, "the scenario needs more registered memory"
        return at, self.memory[at:at + size]

    @staticmethod
    def _view(room, offset, strides, shape, dtype):
        if strides is None:
            return room.view(dtype).reshape(shape)
        flat = np.ndarray((room.size - offset) // dtype.itemsize, dtype, room, offset)
        return np.lib.stride_tricks.as_strided(flat, shape, (*strides, dtype.itemsize))

    def give(self, x):
        """A TensorRef of an input [layers, tokens, heads, dim]: bf16 as uint16, or float32."""
        kind = 1 if x.dtype == np.float32 else 0
        buffer, strides, offset, size = self._choose(x.shape, x.itemsize, True)
        at, room = self._room(size) if buffer else (0, np.empty(size, np.uint8))
        room[:] = 0xFF  # gaps are NaN
        self._view(room, offset, strides, x.shape, DTYPES[kind])[:] = x
        layer, token, head = strides or (0, 0, 0)
        return self.kv.TensorRef(buffer=self.session.buffer if buffer else 0, offset=at + offset, layer_stride=layer,
                                 token_stride=token, head_stride=head, dtype=kind,
                                 inline_data=b"" if buffer else room.tobytes())

    def want(self, shape, kind):
        """A TensorRef of an output, and a function that takes the reply's bytes and returns the array."""
        dtype = DTYPES[kind]
        buffer, strides, offset, size = self._choose(shape, dtype.itemsize, False)
        if not buffer:
            return self.kv.TensorRef(dtype=kind), lambda data: self._inline(data, shape, dtype)
        at, room = self._room(size)
        room[:] = 0xA5
        view = self._view(room, offset, strides, shape, dtype)

        def fetch(data):
            if data:
                raise Mismatch("an output came in the reply as well as in the buffer")
            got = view.copy()
            view[:] = np.ndarray(1, dtype, np.full(4, 0xA5, np.uint8))[0]
            if not (room == 0xA5).all():
                raise Mismatch("memory around an output was written")
            return got

        layer, token, head = strides or (0, 0, 0)
        return self.kv.TensorRef(buffer=self.session.buffer, offset=at + offset, layer_stride=layer, token_stride=token,
                                 head_stride=head, dtype=kind), fetch

    @staticmethod
    def _inline(data, shape, dtype):
        if len(data) != int(np.prod(shape)) * dtype.itemsize:
            raise Mismatch(f"an output of {len(data)} bytes instead of {shape} of {dtype.itemsize}")
        return np.frombuffer(data, dtype).reshape(shape)
