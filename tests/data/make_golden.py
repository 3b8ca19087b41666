#!/usr/bin/env python3
"""Writes tests/data/golden_codecs.bin: tiles of every codec, made here in NumPy float64 from the words of kernels/README.md
alone.

For each case: uint32 dim_k, uint32 dim_v, float32 x_k [64][dim_k], float32 x_v [64][dim_v] (rotated rows), then a tile of each
codec, int2, int2c, int2-lm, turboquant-2, -3, -4, int4: three tiles, with published, least-squares and unbiased scales. Clip ratios are 0.96 for K and
0.92 for V, gains 1 and 0.95. Then, for tc2 and tc2.5, a tile without a set's terms, and float32 sigma [dim_k], float32 bits [dim_k / 16]
and a tile with them.

And tests/data/golden_latent.bin, a page of a latent plane: bf16 rope [64][64], float16 latents [64][512] (rotated rows), then a tile of
each codec of the latent, with clip ratio 0.92 and gain 0.95, of scales least-squares, unbiased, published, and so on in turn.
"""
import struct
import sys

import numpy as np

CODECS = ("int2", "int2c", "int2-lm", "turboquant-2", "turboquant-3", "turboquant-4", "int4")
BITS = dict(zip(CODECS, (2, 2, 2, 2, 3, 4, 4)))
# Centroids of a normal variable's Lloyd-Max quantizers.
MAGNITUDES = {2: [0.452780035, 1.510417608],
              3: [0.245094179, 0.756005281, 1.343909279, 2.151945705],
              4: [0.128395030, 0.388048299, 0.656759119, 0.942340456, 1.256231197, 1.618046386, 2.069017227, 2.732589571]}


def signed_codes(z, bits):
    m = np.array(MAGNITUDES[bits])
    index = np.searchsorted((m[1:] + m[:-1]) / 2, np.abs(z))
    return index + (z < 0) * 2 ** (bits - 1)


def half(x):
    return np.float16(x).tobytes()


def unbiased(x, levels, about_zero=False):
    """Scale and min for which <y - m, x - m> = |x - m|^2, y what is read back, about the mean m of both."""
    m, c = (0, 0) if about_zero else (x.mean(), levels.mean())
    scale = np.sum((x - m) ** 2) / np.sum((levels - c) * (x - m))
    return scale, m - scale * c


def least_squares(x, levels):
    """Scale and min of least squared error for these levels."""
    scale = np.sum((levels - levels.mean()) * (x - x.mean())) / np.sum((levels - levels.mean()) ** 2)
    return scale, x.mean() - scale * levels.mean()


def evenly(x, ratio, gain, codec, kind):
    limit = np.sort(np.abs(x))[int(np.floor(ratio * len(x)))]
    c = np.clip(x, -limit, limit)
    top = 2 ** BITS[codec] - 1
    scale, low = (c.max() - c.min()) / top, c.min()
    if kind != "published":
        c, gain, scale = x, 1, (0.3352 if codec == "int4" else 0.9957) * x.std()
        low = x.mean() - top / 2 * scale
        for refit in range(2):
            scale, low = least_squares(x, np.clip(np.floor((x - low) / scale + 0.5), 0, top))
    codes, drawn, centre = np.clip(np.floor((c - low) / scale + 0.5), 0, top).astype(int), scale * gain, low + top / 2 * scale
    if kind == "unbiased":
        drawn, least = unbiased(x, codes)
        gain, centre = drawn / scale, least + top / 2 * drawn
    if codec in ("int2", "int4"):
        return codes, half(drawn) + half(centre - top / 2 * drawn)
    drawn = max(drawn, abs(centre) * 8 / 127)
    n = int(np.clip(np.rint(8 * np.log2(drawn)) + 128, 1, 255))
    drawn = 2.0 ** ((n - 128) / 8)
    eighths = int(np.clip(np.rint(centre * 8 / drawn), -127, 127))
    scale = drawn / gain
    low = drawn * eighths / 8 - 1.5 * scale
    codes = np.clip(np.floor((c - low) / scale + 0.5), 0, 3).astype(int)
    if kind != "published":
        eighths = int(np.clip(np.rint((x.mean() - drawn * (codes.mean() - 1.5)) * 8 / drawn), -127, 127))
    return codes, bytes([n, eighths & 255])


def about_mean(x, kind):
    levels = np.float16(MAGNITUDES[2] + [-m for m in MAGNITUDES[2]]).astype(float)
    mean, scale = x.mean(), x.std()
    for refit in range(3):
        codes = signed_codes((x - mean) / scale, 2)
        if refit < 2:
            scale, mean = least_squares(x, levels[codes])
    if kind == "unbiased":
        scale, mean = unbiased(x, levels[codes])
    return codes, half(scale) + half(mean)


def quantize(x, ratio, gain, codec, kind):
    x = x.astype(np.float64)
    if codec in ("int2", "int2c", "int4"):
        return evenly(x, ratio, gain, codec, kind)
    if codec == "int2-lm":
        return about_mean(x, kind)
    scale = np.linalg.norm(x) / np.sqrt(len(x))
    codes = signed_codes(x / scale, BITS[codec])
    m = np.float16(MAGNITUDES[BITS[codec]]).astype(float)
    levels = np.concatenate([m, -m])[codes]
    if kind == "unbiased":
        scale = unbiased(x, levels, True)[0]
    elif kind == "least-squares":
        scale = np.sum(levels * x) / np.sum(levels ** 2)
    return codes, half(scale)


def piece(dim, width, tile):
    """First channel tile, bytes a lane and place in its chunk of the piece that a channel tile is in."""
    first = at = 0
    for size in (16, 8, 4, 2, 1):
        while first + size // width <= dim // 16 and size >= width:
            if tile < first + size // width:
                return first, size, at
            first += size // width
            at += 32 * size
    raise ValueError(tile)


def plane(codes, is_v, width, shift):
    """Bits [shift, shift + width) of codes [64][dim]."""
    dim = codes.shape[1]
    out = bytearray(8 * dim * width)
    for token in range(64):
        for channel in range(dim):
            chunk, tile = token // 16, channel // 16
            row, col = (channel % 16, token % 16) if is_v else (token % 16, channel % 16)
            lane, register = row % 8 * 4 + col % 8 // 2, row // 8 + col // 8 * 2
            bits = int(codes[token, channel]) >> shift & (1 << width) - 1
            first, size, at = piece(dim, width, tile)
            if dim == 64 or (dim == 128 and width == 1):
                side_by_side = 16 // size
                byte = chunk // side_by_side * 512 + lane * 16 + register * 4
                bit = chunk % side_by_side * size + width * tile + 16 * (col % 2)
            else:
                word = min(32, 8 * size)
                at_bit = register * size + width * (tile - first)
                byte = chunk * 2 * width * dim + at + lane * size + at_bit // (word // 2) * word // 8
                bit = at_bit % (word // 2) + word // 2 * (col % 2)
            out[byte + bit // 8] |= bits << bit % 8
    return bytes(out)


def side(x, is_v, codec, kind):
    """Codes and parameters of one side of a tile."""
    codes, params = np.zeros(x.shape, int), [b""] * 64
    for token in range(64):
        codes[token], param = quantize(x[token], 0.92 if is_v else 0.96, 0.95 if is_v else 1.0, codec, kind)
        params[token // 16 * 16 + token % 8 * 2 + token % 16 // 8] = param
    planes = plane(codes, is_v, 2, 0)
    if BITS[codec] > 2:
        planes += plane(codes, is_v, BITS[codec] - 2, 2)
    return planes, b"".join(params)


STEPS = np.float32([0, 1.5958, 0.9957, 0.5860, 0.3352]).astype(float)


def transform_codes(x, sigma, bits, refits):
    """Codes and scale of a row whose channels have `bits` and deviations `sigma`."""
    coded, top = bits > 0, 2.0 ** bits - 1
    unit = np.where(coded, sigma * STEPS[bits], 1)
    scale = np.sqrt(np.mean((x / sigma)[coded] ** 2))
    for refit in range(refits + 1):
        codes = np.where(coded, np.clip(np.ceil(x / (unit * scale) + top / 2 - 0.5), 0, top), 0)
        c = np.where(coded, unit * (codes - top / 2), 0)
        scale = np.sum(c * x) / np.sum(c * c) if refit < refits else np.sum(x[coded] ** 2) / np.sum(c * x)
    return codes.astype(int), half(scale)


def stream(codes, bits):
    """K's codes [64][dim], `bits` of each 16-channel tile: what first and second elements of a register have, in pieces."""
    every = int(bits.sum())
    out = bytearray(128 * every)
    places, left = [], every  # of a stream's bits: the piece's size, and its first bit
    for size in (16, 8, 4, 2, 1):
        while left >= size:
            places += [(size, every - left)] * size
            left -= size
    for token in range(64):
        for channel in range(16):
            lane, register = token % 8 * 4 + channel % 8 // 2, token % 16 // 8 + channel // 8 * 2
            value, at = 0, 0
            for tile, b in enumerate(bits):
                value |= int(codes[token, 16 * tile + channel]) << at
                at += int(b)
            for i, (size, first) in enumerate(places):
                word = min(32, 8 * size)
                at_bit = register * size + i - first
                byte = token // 16 * 32 * every + 32 * first + lane * size + at_bit // (word // 2) * word // 8
                bit = at_bit % (word // 2) + word // 2 * (channel % 2)
                out[byte + bit // 8] |= (value >> i & 1) << bit % 8
    return bytes(out)


def transform_tile(x_k, x_v, sigma, bits):
    sides = []
    for x, s, b, refits in ((x_k, sigma, np.repeat(bits, 16), 1), (x_v, np.ones(x_v.shape[1]), np.full(x_v.shape[1], 2), 2)):
        codes, params = np.zeros(x.shape, int), [b""] * 64
        for token in range(64):
            codes[token], param = transform_codes(x[token].astype(float), s, b, refits)
            params[token // 16 * 16 + token % 8 * 2 + token % 16 // 8] = param
        sides.append((codes, b"".join(params)))
    return stream(sides[0][0], bits) + plane(sides[1][0], True, 2, 0) + sides[0][1] + sides[1][1]


def transform_tiles(x_k, x_v, rng):
    out, tiles = b"", x_k.shape[1] // 16
    for half_bits in (4, 5):
        every = half_bits * tiles // 2
        out += transform_tile(x_k, x_v, np.ones(16 * tiles), np.array([every // tiles + (i < every % tiles) for i in range(tiles)]))
        sigma, bits = np.exp(rng.uniform(-1, 1, 16 * tiles)).astype("<f4"), np.zeros(tiles, int)
        while bits.sum() < every:
            i = rng.integers(tiles)
            bits[i] += bits[i] < 4
        out += sigma.tobytes() + bits.astype("<f4").tobytes() + transform_tile(x_k, x_v, sigma.astype(float), bits)
    return out


def latent_tiles():
    rng = np.random.default_rng(512)
    rope = (rng.normal(size=(64, 64)).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    x = (rng.normal(size=(64, 512)) * (1 + 4 * (np.arange(512) == 300)) + rng.normal(size=(64, 1))).astype("<f2")
    out = rope + x.tobytes()
    for number, codec in enumerate(CODECS, 1):
        codes, params = side(x.astype(np.float64), True, codec, ("published", "least-squares", "unbiased")[number % 3])
        out += rope + codes + params
    return out


def main():
    terms = np.random.default_rng(22)
    rng = np.random.default_rng(20260517)
    out = b""
    for dk, dv in ((64, 64), (128, 128), (256, 256), (128, 64), (64, 256),
                   (80, 80), (96, 96), (112, 112), (192, 192), (192, 128)):
        x = [(rng.normal(size=(64, d)) * (1 + 4 * (np.arange(d) == 7)) + rng.normal(size=(64, 1)) * (np.arange(64) % 4 == 0)[:, None])
             .astype("<f4") for d in (dk, dv)]
        out += struct.pack("<II", dk, dv) + x[0].tobytes() + x[1].tobytes()
        for codec in CODECS:
            for kind in ("published", "least-squares", "unbiased"):
                (kc, kp), (vc, vp) = side(x[0], False, codec, kind), side(x[1], True, codec, kind)
                out += kc + vc + kp + vp
        out += transform_tiles(x[0], x[1], terms)
    with open(sys.argv[1] if len(sys.argv) > 1 else "tests/data/golden_codecs.bin", "wb") as f:
        f.write(out)
    with open(sys.argv[2] if len(sys.argv) > 2 else "tests/data/golden_latent.bin", "wb") as f:
        f.write(latent_tiles())


if __name__ == "__main__":
    main()
