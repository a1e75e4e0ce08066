"""Attention backward: dq, dk and dv, deterministic and without atomics; docs/kernels/attention_triton.md.

    G = M (dO v^T)    dA = P (G - delta + l)    dZ = (1 - tanh^2) dA    delta = sum dO out, l = dlse
    dq = scale dZ k    dk = scale dZ^T q    dv = (M P)^T dO    dbias = dA

``rows_kernel`` leaves delta - l per row. ``keys_kernel`` owns BN keys of a key head and walks the queries of every
query head of its group; ``queries_kernel`` owns BM queries and walks the keys. Both recompute P from L. Sums of dA over
queries, or over keys, for a bias that broadcasts there, come with them; see _attention_parameters.py for the others.

Floor: 5 products; 7 with P computed on both sides, which is the price of sums in a fixed order. Bytes: every operand
once, L and delta - l twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genfast.kernels.triton import _attention_parameters as parameters  # noqa: F401 - part of this pass
from genfast.kernels.triton import _attention_tiles as tiles
from genfast.kernels.triton._attention_tiles import INFINITY


@triton.jit
def rows_kernel(
    out,
    dout,
    out_t,
    dlse,
    lse,
    s,
    shift,
    r,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
):
    """delta - l, and with ``out_t`` also r = sum dO out'; zeros for rows that see nothing."""
    s, b, h, first = tiles.query_block(s, BM)
    empty = tiles.load_statistic(lse, s, b, h, first, 0.0, BM) == -INFINITY
    cotangent = tiles.load_rows(tiles.query_rows(dout, s, b, h, first), BM, DV, BDV, True).to(tl.float32)
    value = tiles.load_rows(tiles.query_rows(out, s, b, h, first), BM, DV, BDV, True).to(tl.float32)
    total = tl.sum(cotangent * value, 1)
    if dlse is not None:
        total -= tiles.load_statistic(dlse, s, b, h, first, 0.0, BM)
    tiles.store_statistic(shift, s, b, h, first, tl.where(empty, 0.0, total), BM)
    if out_t is not None:
        change = tiles.load_rows(tiles.query_rows(out_t, s, b, h, first), BM, DV, BDV, True).to(tl.float32)
        total = tl.sum(cotangent * change, 1)
        tiles.store_statistic(r, s, b, h, first, tl.where(empty, 0.0, total), BM)


@triton.jit
def keys_kernel(
    q,
    k,
    v,
    dout,
    s,
    rows,
    dk,
    dv,
    column_sums,
    group,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    s, b, kv_head, first = tiles.key_block(s, s.heads // group, BN)
    cols = first + tl.arange(0, BN)[:, None]
    k_at = tiles.key_rows(k, s, b, kv_head, first)
    v_at = tiles.key_rows(v, s, b, kv_head, first)
    k_tile = tiles.held_rows(k_at, BN, D, BD, True, STEP)
    v_tile = tiles.held_rows(v_at, BN, DV, BDV, True, STEP)
    # Keys beyond the last one have sums of their own, which are not stored; only loads must leave them out.
    TAIL: tl.constexpr = not EVEN and (s.mask is not None or s.bias is not None or s.table is not None)
    k_total = tl.zeros((BN, BD), tl.float32)
    v_total = tl.zeros((BN, BDV), tl.float32)
    bounds = tiles.query_range(s, first, BM, BN)
    for member in range(0, group):
        h = kv_head * group + member
        column_total = tl.zeros((BN,), tl.float32)
        for PART in tl.static_range(3):
            if (
                PART == 1
                or (PART == 0 and s.upper is not None)
                or (PART == 2 and (s.lower is not None or not EVEN_ROWS))
            ):
                start, end = tiles.part(bounds, PART)
                for row in range(start, end, BM):
                    at = row + tl.arange(0, BM)[None, :]
                    q_at = tiles.query_rows(q, s, b, h, row)
                    do_at = tiles.query_rows(dout, s, b, h, row)
                    q_tile = tiles.held_rows(q_at, BM, D, BD, PART != 1 and not EVEN_ROWS, STEP)
                    do_tile = tiles.held_rows(do_at, BM, DV, BDV, PART != 1 and not EVEN_ROWS, STEP)
                    z = tiles.row_products(k_tile, k_at, q_tile, q_at, None, BN, BM, D, BD, STEP)
                    log2_sum = tiles.log2_sums(rows.lse, s, b, h, row, BM)[None, :]
                    p, t = tiles.weights(z, log2_sum, s, b, h, at, cols, PART != 1, TAIL)
                    kept = None
                    if s.threshold is not None:
                        kept = tl.trans(tiles.keep(s, b, h, row, first, BM, BN))
                    v_total = tiles.add_product(
                        tiles.dropped(p, kept, s),
                        do_tile,
                        do_at,
                        v_total,
                        BM,
                        DV,
                        BDV,
                        PART != 1 and not EVEN_ROWS,
                        STEP,
                    )
                    g = tiles.row_products(v_tile, v_at, do_tile, do_at, None, BN, BM, DV, BDV, STEP)
                    shift = tiles.load_statistic(rows.shift, s, b, h, row, 0.0, BM)[None, :]
                    da = p * (tiles.dropped(g, kept, s) - shift)
                    dz = tiles.through_softcap(da, t, s)
                    k_total = tiles.add_product(dz, q_tile, q_at, k_total, BM, D, BD, PART != 1 and not EVEN_ROWS, STEP)
                    if column_sums is not None:
                        column_total += tl.sum(da, 1)
        if column_sums is not None:
            tiles.store_column_sums(column_sums, s, b, h, first, column_total, BN)
    tiles.store_rows(tiles.key_rows(dk, s, b, kv_head, first), k_total * s.scale, BN, D, BD)
    tiles.store_rows(tiles.key_rows(dv, s, b, kv_head, first), v_total, BN, DV, BDV)


@triton.jit
def queries_kernel(
    q,
    k,
    v,
    dout,
    s,
    rows,
    dq,
    dbias,
    row_sums,
    group,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    EVEN: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    s, b, h, first = tiles.query_block(s, BM)
    at = first + tl.arange(0, BM)[:, None]
    q_at = tiles.query_rows(q, s, b, h, first)
    do_at = tiles.query_rows(dout, s, b, h, first)
    q_tile = tiles.held_rows(q_at, BM, D, BD, True, STEP)
    do_tile = tiles.held_rows(do_at, BM, DV, BDV, True, STEP)
    log2_sum = tiles.log2_sums(rows.lse, s, b, h, first, BM)[:, None]
    shift = tiles.load_statistic(rows.shift, s, b, h, first, 0.0, BM)[:, None]
    q_total = tl.zeros((BM, BD), tl.float32)
    row_total = tl.zeros((BM,), tl.float32)
    bounds = tiles.key_range(s, first, BM, BN)
    for PART in tl.static_range(3):
        if PART == 1 or (PART == 0 and s.lower is not None) or (PART == 2 and (s.upper is not None or not EVEN)):
            start, end = tiles.part(bounds, PART)
            for column in range(start, end, BN):
                cols = column + tl.arange(0, BN)[None, :]
                k_at = tiles.key_rows(k, s, b, h // group, column)
                v_at = tiles.key_rows(v, s, b, h // group, column)
                k_tile = tiles.held_rows(k_at, BN, D, BD, PART != 1 and not EVEN, STEP)
                v_tile = tiles.held_rows(v_at, BN, DV, BDV, PART != 1 and not EVEN, STEP)
                z = tiles.row_products(q_tile, q_at, k_tile, k_at, None, BM, BN, D, BD, STEP)
                p, t = tiles.weights(z, log2_sum, s, b, h, at, cols, PART != 1, PART != 1 and not EVEN)
                kept = None
                if s.threshold is not None:
                    kept = tiles.keep(s, b, h, first, column, BM, BN)
                g = tiles.row_products(do_tile, do_at, v_tile, v_at, None, BM, BN, DV, BDV, STEP)
                da = p * (tiles.dropped(g, kept, s) - shift)
                dz = tiles.through_softcap(da, t, s)
                q_total = tiles.add_product(dz, k_tile, k_at, q_total, BN, D, BD, PART != 1 and not EVEN, STEP)
                if dbias is not None:
                    tiles.store_pairs(dbias, s, b, h, at, cols, da)
                if row_sums is not None:
                    row_total += tl.sum(da, 1)
    tiles.store_rows(tiles.query_rows(dq, s, b, h, first), q_total * s.scale, BM, D, BD)
    if row_sums is not None:
        tiles.store_statistic(row_sums, s, b, h, first, row_total, BM)
