"""Gradients of biases and tables that sum many pairs into one entry, for attention_backward.py and attention_second.py.

The tile [BM, BN] of dA (first order) or of W (second order: with a direction x) is recomputed, 2 or 5 products, and

- ``bias_kernel``, for a bias [1 or B, 1 or Hq, Sq, Skv]: a program owns a tile of it and adds up the batch or heads;
- ``diagonals_kernel``, for a table looked up at i - j: a program owns the tiles of one block diagonal of a head, adds
  them up, and sums along the diagonals once, at the end;
- ``entries_kernel``, for a table looked up at q_index[i] - k_index[j]: a program owns E entries of a head's table and
  visits the tiles whose indices reach them.

Sums have a fixed order, there are no atomics, and memory is O(S) beside the gradient itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genfast.kernels.triton import _attention_tiles as tiles
from genfast.kernels.triton import noise


@triton.jit
def pair_gradient(
    q,
    k,
    v,
    dout,
    s,
    x,
    rows,
    b,
    h,
    group,
    row,
    column,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The gradient to the scores of rows [row, row + BM) and columns [column, column + BN); zeros outside."""
    at = row + tl.arange(0, BM)[:, None]
    cols = column + tl.arange(0, BN)[None, :]
    q_at = tiles.query_rows(q, s, b, h, row)
    k_at = tiles.key_rows(k, s, b, h // group, column)
    v_at = tiles.key_rows(v, s, b, h // group, column)
    do_at = tiles.query_rows(dout, s, b, h, row)
    q_tile = tiles.held_rows(q_at, BM, D, BD, True, STEP)
    k_tile = tiles.held_rows(k_at, BN, D, BD, True, STEP)
    v_tile = tiles.held_rows(v_at, BN, DV, BDV, True, STEP)
    do_tile = tiles.held_rows(do_at, BM, DV, BDV, True, STEP)
    kept = None
    if s.threshold is not None:
        kept = tiles.keep(s, b, h, row, column, BM, BN)
    log2_sum = tiles.log2_sums(rows.lse, s, b, h, row, BM)[:, None]
    shift = tiles.load_statistic(rows.shift, s, b, h, row, 0.0, BM)[:, None]
    z = tiles.row_products(q_tile, q_at, k_tile, k_at, None, BM, BN, D, BD, STEP)
    p, t = tiles.weights(z, log2_sum, s, b, h, at, cols, True, True)
    g = tiles.row_products(do_tile, do_at, v_tile, v_at, None, BM, BN, DV, BDV, STEP)
    e = tiles.dropped(g, kept, s) - shift
    if x is None:
        gradient = p * e
    else:
        q_change_at = tiles.query_rows(x.q, s, b, h, row)
        k_change_at = tiles.key_rows(x.k, s, b, h // group, column)
        v_change_at = tiles.key_rows(x.v, s, b, h // group, column)
        q_change = tiles.held_rows(q_change_at, BM, D, BD, True, STEP)
        k_change = tiles.held_rows(k_change_at, BN, D, BD, True, STEP)
        v_change = tiles.held_rows(v_change_at, BN, DV, BDV, True, STEP)
        mean = tiles.load_statistic(rows.mean, s, b, h, row, 0.0, BM)[:, None]
        r = tiles.load_statistic(rows.r, s, b, h, row, 0.0, BM)[:, None]
        z_t = tiles.row_products(q_change, q_change_at, k_tile, k_at, None, BM, BN, D, BD, STEP)
        z_t = tiles.row_products(q_tile, q_at, k_change, k_change_at, z_t, BM, BN, D, BD, STEP) * s.scale
        change = tiles.score_tangent(z_t, t, s, x, b, h, at, cols, True) - mean
        g_t = tiles.row_products(do_tile, do_at, v_change, v_change_at, None, BM, BN, DV, BDV, STEP)
        gradient = p * (change * e + tiles.dropped(g_t, kept, s) - r)
    return gradient


@triton.jit
def bias_kernel(
    q,
    k,
    v,
    dout,
    s,
    x,
    rows,
    dbias,
    batches,
    group,
    OVER_BATCH: tl.constexpr,
    OVER_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dbias summed over the batch, the heads, or both, and with stride 0 there."""
    column_blocks = tl.cdiv(s.k_len, BN)
    blocks = tl.cdiv(s.q_len, BM) * column_blocks
    program = tl.program_id(0)
    row = program % blocks // column_blocks * BM
    column = program % blocks % column_blocks * BN
    owner = program // blocks
    visible = row >= 0
    if s.upper is not None:
        visible = visible & (column - (row + BM - 1) <= s.upper)
    if s.lower is not None:
        visible = visible & (column + BN - 1 - row >= s.lower)
    if OVER_BATCH:
        b = owner * 0
        steps = b + batches
    else:
        b = owner
        steps = b * 0 + 1
    if OVER_HEADS:
        h = owner * 0
        heads = h + s.heads
    else:
        h = owner % s.heads
        heads = h * 0 + 1
    total = tl.zeros((BM, BN), tl.float32)
    if visible:
        for step in range(0, steps * heads):
            total += pair_gradient(
                q, k, v, dout, s, x, rows, b + step // heads, h + step % heads, group, row, column,
                D, DV, BD, BDV, STEP, BM, BN,
            )  # fmt: skip
    at = row + tl.arange(0, BM)[:, None]
    cols = column + tl.arange(0, BN)[None, :]
    tiles.store_pairs(dbias, s, b, h, at, cols, total)


@triton.jit
def diagonals_kernel(
    q,
    k,
    v,
    dout,
    s,
    x,
    rows,
    sums,
    group,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """sums [B, Hq, block diagonals, 2, BN]: diagonal i - j = (c - column blocks + 1) BN + n - (BN - 1), and n + 1."""
    row_blocks = tl.cdiv(s.q_len, BM)
    column_blocks = tl.cdiv(s.k_len, BN)
    diagonals = row_blocks + column_blocks - 1
    program = tl.program_id(0)
    diagonal = program % diagonals - (column_blocks - 1)
    b = program // diagonals // s.heads
    h = program // diagonals % s.heads
    begin = tl.maximum(diagonal, 0)
    end = tl.minimum(row_blocks, column_blocks + diagonal)
    if s.upper is not None:
        end = tl.where(-diagonal * BN - (BN - 1) > s.upper, begin, end)
    if s.lower is not None:
        end = tl.where(-diagonal * BN + (BN - 1) < s.lower, begin, end)
    total = tl.zeros((BM, BN), tl.float32)
    for block in range(begin, end):
        total += pair_gradient(
            q, k, v, dout, s, x, rows, b, h, group, block * BM, (block - diagonal) * BN, D, DV, BD, BDV, STEP, BM, BN
        )
    # Entry (m, n) of ``turned`` is that of row m on the diagonal n - (BN - 1) where n >= m, else n + 1.
    m = tl.arange(0, BM)[:, None]
    n = tl.arange(0, BN)[None, :]
    turned = tl.gather(total, (m + (2 * BN - 1) - n) % BN, 1)
    place = sums + noise.as_int64(program) * (2 * BN) + tl.arange(0, BN)
    tl.store(place, tl.sum(tl.where(n >= m, turned, 0.0), 0))
    tl.store(place + BN, tl.sum(tl.where(n < m, turned, 0.0), 0))


@triton.jit
def add_entries(
    total,
    q,
    k,
    v,
    dout,
    s,
    x,
    rows,
    b,
    h,
    first,
    group,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    STEP: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """total [E], to which the pairs of a head or of a packed sequence add what entries [first, first + E) get."""
    entry = tl.arange(0, E)
    for row in range(0, s.q_len, BM):
        at = tl.minimum(row + tl.arange(0, BM), s.q_len - 1)
        q_index = tl.load(s.q_index + at)
        bounds = tiles.key_range(s, row + first * 0, BM, BN)
        for column in range(bounds[0], bounds[3], BN):
            cols = tl.minimum(column + tl.arange(0, BN), s.k_len - 1)
            k_index = tl.load(s.k_index + cols)
            low = tl.maximum(tl.min(q_index, 0) - tl.max(k_index, 0), first)
            high = tl.minimum(tl.max(q_index, 0) - tl.min(k_index, 0), first + (E - 1))
            if low <= high:
                tile = pair_gradient(q, k, v, dout, s, x, rows, b, h, group, row, column, D, DV, BD, BDV, STEP, BM, BN)
                index = q_index[:, None] - k_index[None, :]
                for wanted in range(low, high + 1):
                    found = tl.sum(tl.sum(tl.where(index == wanted, tile, 0.0), 1), 0)
                    total += tl.where(entry == wanted - first, found, 0.0)
    return total


@triton.jit
def entries_kernel(
    q,
    k,
    v,
    dout,
    s,
    x,
    rows,
    sums,
    entries,
    group,
    OVER_SEQUENCES: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    STEP: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """sums [B, Hq, entries]; of packed sequences B is their number, or 1 if they share a table."""
    blocks = tl.cdiv(entries, E)
    program = tl.program_id(0)
    first = program % blocks * E
    b = program // blocks // s.heads
    h = program // blocks % s.heads
    total = tl.zeros((E,), tl.float32)
    if s.starts is None:
        total = add_entries(total, q, k, v, dout, s, x, rows, b, h, first, group, D, DV, BD, BDV, STEP, E, BM, BN)
    else:
        end = b + s.starts.sequences if OVER_SEQUENCES else b + 1
        for n in range(b, end):
            own = tiles.sequence(s, n)
            total = add_entries(total, q, k, v, dout, own, x, rows, n, h, first, group, D, DV, BD, BDV, STEP, E, BM, BN)
    place = sums + (noise.as_int64(b) * s.heads + h) * entries + first
    tl.store(place + tl.arange(0, E), total, mask=tl.arange(0, E) < entries - first)
