"""genfast's noise in numpy: Philox4x32-10, uniforms, normals (float64), independent of every backend."""

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)


def philox(c0, c1, c2, c3, seed: int) -> list[np.ndarray]:
    c = list(np.broadcast_arrays(*(np.asarray(x, dtype=np.uint64) & _LOW for x in (c0, c1, c2, c3))))
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & _LOW,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def normals_of_words(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    radius = np.sqrt(-2 * np.where(a > 2**31, np.log1p((a + 1 - 2.0**32) * 2.0**-32), np.log((a + 1) * 2.0**-32)))
    angle = 2 * np.pi * 2.0**-32 * b
    return radius * np.cos(angle), radius * np.sin(angle)


def tensor_normals(index: np.ndarray, step: int, seed: int) -> np.ndarray:
    group = index.astype(np.uint64) // np.uint64(4)
    w = philox(group & _LOW, group >> np.uint64(32), step, 1, seed)
    n = np.stack([*normals_of_words(w[0], w[1]), *normals_of_words(w[2], w[3])])
    return np.take_along_axis(n, (index % 4)[None].astype(np.int64), 0)[0]


def rbm_uniforms(rows: int, columns: int, row_offset: int, col_offset: int, step: int, seed: int) -> np.ndarray:
    unit = col_offset + np.arange(columns, dtype=np.int64)
    chain = (row_offset + np.arange(rows, dtype=np.int64))[:, None]
    w = np.stack(philox(unit[None] // 4, chain, step, 3, seed))
    word = np.take_along_axis(w, np.broadcast_to(unit % 4, (1, rows, columns)), 0)[0]
    return (word >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
