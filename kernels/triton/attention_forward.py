"""Attention forward: out = (M P) v and the rows' log-sums L, in one pass over the keys.

    Z = scale q k    A = softcap tanh(Z / softcap) + bias + table, -inf where invisible
    L = log(sum exp A + exp sink)    P = exp(A - L)    M = keep / (1 - dropout_p)

A running maximum m and sum l are kept per row; a new maximum rescales what has been summed. A sink starts them at
(sink, 1). Rows that see nothing give out = 0 and L = -inf.

Floor: 2 products, 2 Sq Skv (D + Dv) FLOPs a head, less where blocks are invisible; bytes q, k, v and out once.

Tiling: a program owns BM queries of a head and walks its keys in steps of BN; blocks beyond the window are not visited,
and only those on its edges or at the last column are compared with positions. Programs with the most keys under a
causal mask start first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genfast.kernels.triton import _attention_tiles as tiles
from genfast.kernels.triton._attention_tiles import INFINITY, LN2, LOG2E


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    s,
    sinks,
    out,
    lse,
    group,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    EVEN: tl.constexpr,
    PLAIN: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    sequences = None if s.starts is None else s.starts.sequences
    s, b, h, first = tiles.query_block(s, BM)
    rows = first + tl.arange(0, BM)[:, None]
    q_at = tiles.query_rows(q, s, b, h, first)
    q_tile = tiles.held_rows(q_at, BM, D, BD, True, STEP)
    top = tl.full((BM,), -INFINITY, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + h) * LOG2E
        if sequences is not None:  # rows after the last sequence have none
            sink = tl.where(b < sequences, sink, -INFINITY)
        top = tl.zeros((BM,), tl.float32) + sink
        total += tl.where(sink == -INFINITY, 0.0, 1.0)
    acc = tl.zeros((BM, BDV), tl.float32)
    unit = 1.0
    if PLAIN:  # a positive scale commutes with the maximum
        unit = s.scale * LOG2E
    bounds = tiles.key_range(s, first, BM, BN)
    for PART in tl.static_range(3):
        if PART == 1 or (PART == 0 and s.lower is not None) or (PART == 2 and (s.upper is not None or not EVEN)):
            start, end = tiles.part(bounds, PART)
            for column in range(start, end, BN):
                cols = column + tl.arange(0, BN)[None, :]
                k_at = tiles.key_rows(k, s, b, h // group, column)
                v_at = tiles.key_rows(v, s, b, h // group, column)
                k_tile = tiles.held_rows(k_at, BN, D, BD, PART != 1 and not EVEN, STEP)
                z = tiles.row_products(q_tile, q_at, k_tile, k_at, None, BM, BN, D, BD, STEP)
                if PLAIN:
                    a = tiles.hidden(z, s, b, h, rows, cols, PART != 1, PART != 1 and not EVEN)
                else:
                    a, _ = tiles.scores(z, s, b, h, rows, cols, PART != 1, PART != 1 and not EVEN)
                new_top = tl.maximum(top, tl.max(a, 1) * unit)
                finite = tl.where(new_top == -INFINITY, 0.0, new_top)
                p = tl.exp2(a * unit - finite[:, None])
                rescale = tl.exp2(top - finite)
                total = total * rescale + tl.sum(p, 1)
                top = new_top
                if s.threshold is not None:
                    p = tl.where(tiles.keep(s, b, h, first, column, BM, BN), p, 0.0)
                acc = acc * rescale[:, None]
                v_tile = tiles.held_rows(v_at, BN, DV, BDV, PART != 1 and not EVEN, STEP)
                acc = tiles.add_product(p, v_tile, v_at, acc, BN, DV, BDV, PART != 1 and not EVEN, STEP)

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    factor = 1.0 / total
    if s.threshold is not None:
        factor *= s.factor
    tiles.store_rows(tiles.query_rows(out, s, b, h, first), acc * factor[:, None], BM, DV, BDV)
    sums = tl.where(empty, -INFINITY, (top + tl.log2(total)) * LN2)
    tiles.store_statistic(lse, s, b, h, first, sums, BM)
