#!/usr/bin/env python3
"""Writes tests/data/golden_int2.bin: INT2 tiles made here, in NumPy float64, from the words of kernels/README.md alone.

For each case: uint32 dim_k, uint32 dim_v, float32 x_k [64][dim_k], float32 x_v [64][dim_v] (rotated rows), then the tile.
"""
import struct
import sys

import numpy as np


def quantize(row, ratio):
    limit = np.sort(np.abs(row))[int(np.floor(ratio * len(row)))]
    c = np.clip(row.astype(np.float64), -limit, limit)
    scale = (c.max() - c.min()) / 3
    return np.floor((c - c.min()) / scale + 0.5).astype(int), np.float16(scale), np.float16(c.min())


def side(x, ratio, is_v):
    """Codes and parameters of one side of a tile."""
    dim = x.shape[1]
    words = np.zeros(64 * dim // 16, np.uint32)
    params = np.zeros((64, 2), np.float16)
    for token in range(64):
        codes, scale, low = quantize(x[token], ratio)
        params[token // 16 * 16 + token % 8 * 2 + token % 16 // 8] = scale, low
        for channel in range(dim):
            chunk, tile = token // 16, channel // 16
            if dim == 64:
                unit, slot = chunk // 2, chunk % 2 * 4 + tile
            else:
                unit, slot = chunk * (dim // 128) + tile // 8, tile % 8
            row, col = (channel % 16, token % 16) if is_v else (token % 16, channel % 16)
            lane, register = row % 8 * 4 + col % 8 // 2, row // 8 + col // 8 * 2
            words[unit * 128 + lane * 4 + register] |= np.uint32(codes[channel] << (2 * slot + 16 * (col % 2)))
    return words.astype("<u4").tobytes(), params.astype("<f2").tobytes()


def main():
    rng = np.random.default_rng(20260517)
    out = b""
    for dk, dv in ((64, 64), (128, 128), (256, 256), (128, 64), (64, 256)):
        x = [rng.normal(size=(64, d)).astype(np.float32) * (1 + 4 * (np.arange(d) == 7)).astype(np.float32) for d in (dk, dv)]
        (kc, kp), (vc, vp) = side(x[0], 0.96, False), side(x[1], 0.92, True)
        out += struct.pack("<II", dk, dv) + x[0].astype("<f4").tobytes() + x[1].astype("<f4").tobytes() + kc + vc + kp + vp
    with open(sys.argv[1] if len(sys.argv) > 1 else "tests/data/golden_int2.bin", "wb") as f:
        f.write(out)


if __name__ == "__main__":
    main()
