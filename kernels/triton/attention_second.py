"""Second order of attention: the gradient of <dO, out'> + <dlse, lse'> to q, k, v, bias, table and sinks.

    G = M (dO v^T)    H = M (dO v'^T)    E = G - delta + l    r = sum dO out'
    W = P ((A' - mu) E + H - r) = gradient to the bias
    gZ = tau W - P E Z' 2 tanh tau / softcap    gZ' = tau P E    tau = 1 - tanh^2
    gq = scale (gZ k + gZ' k')    gk = scale (gZ^T q + gZ'^T q')    gv = (M P (A' - mu))^T dO

As in attention_backward.py one kernel owns keys and one owns queries, so sums have a fixed order and memory is O(S).

Floor: 10 products; 15 with the five that both kernels compute. Bytes: every operand once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genfast.kernels.triton import _attention_parameters as parameters  # noqa: F401 - part of this pass
from genfast.kernels.triton import _attention_tiles as tiles


@triton.jit
def second_keys_kernel(
    q,
    k,
    v,
    dout,
    s,
    x,
    rows,
    gk,
    gv,
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
    k_change_at = tiles.key_rows(x.k, s, b, kv_head, first)
    v_at = tiles.key_rows(v, s, b, kv_head, first)
    v_change_at = tiles.key_rows(x.v, s, b, kv_head, first)
    k_tile = tiles.held_rows(k_at, BN, D, BD, True, STEP)
    k_change = tiles.held_rows(k_change_at, BN, D, BD, True, STEP)
    v_tile = tiles.held_rows(v_at, BN, DV, BDV, True, STEP)
    v_change = tiles.held_rows(v_change_at, BN, DV, BDV, True, STEP)
    TAIL: tl.constexpr = not EVEN and (s.mask is not None or s.bias is not None or s.table is not None)  # loads alone
    k_total = tl.zeros((BN, BD), tl.float32)
    v_total = tl.zeros((BN, BDV), tl.float32)
    bounds = tiles.query_range(s, first, BM, BN)
    for member in range(0, group):
        h = kv_head * group + member
        column_total = tl.zeros((BN,), tl.float32)
        for row in range(bounds[0], bounds[3], BM):
            at = row + tl.arange(0, BM)[None, :]
            q_at = tiles.query_rows(q, s, b, h, row)
            q_change_at = tiles.query_rows(x.q, s, b, h, row)
            do_at = tiles.query_rows(dout, s, b, h, row)
            q_tile = tiles.held_rows(q_at, BM, D, BD, not EVEN_ROWS, STEP)
            q_change = tiles.held_rows(q_change_at, BM, D, BD, not EVEN_ROWS, STEP)
            do_tile = tiles.held_rows(do_at, BM, DV, BDV, not EVEN_ROWS, STEP)
            z = tiles.row_products(k_tile, k_at, q_tile, q_at, None, BN, BM, D, BD, STEP)
            z_t = tiles.row_products(k_tile, k_at, q_change, q_change_at, None, BN, BM, D, BD, STEP)
            z_t = tiles.row_products(k_change, k_change_at, q_tile, q_at, z_t, BN, BM, D, BD, STEP) * s.scale
            log2_sum = tiles.log2_sums(rows.lse, s, b, h, row, BM)[None, :]
            p, t = tiles.weights(z, log2_sum, s, b, h, at, cols, True, TAIL)
            mean = tiles.load_statistic(rows.mean, s, b, h, row, 0.0, BM)[None, :]
            change = tiles.score_tangent(z_t, t, s, x, b, h, at, cols, TAIL) - mean
            kept = None
            if s.threshold is not None:
                kept = tl.trans(tiles.keep(s, b, h, row, first, BM, BN))
            moved = tiles.dropped(p * change, kept, s)
            v_total = tiles.add_product(moved, do_tile, do_at, v_total, BM, DV, BDV, not EVEN_ROWS, STEP)
            g = tiles.row_products(v_tile, v_at, do_tile, do_at, None, BN, BM, DV, BDV, STEP)
            shift = tiles.load_statistic(rows.shift, s, b, h, row, 0.0, BM)[None, :]
            e = tiles.dropped(g, kept, s) - shift
            gz_t = tiles.through_softcap(p * e, t, s)
            k_total = tiles.add_product(gz_t, q_change, q_change_at, k_total, BM, D, BD, not EVEN_ROWS, STEP)
            g_t = tiles.row_products(v_change, v_change_at, do_tile, do_at, None, BN, BM, DV, BDV, STEP)
            r = tiles.load_statistic(rows.r, s, b, h, row, 0.0, BM)[None, :]
            w = p * (change * e + tiles.dropped(g_t, kept, s) - r)
            gz = tiles.second_product_gradient(w, p * e, z_t, t, s)
            k_total = tiles.add_product(gz, q_tile, q_at, k_total, BM, D, BD, not EVEN_ROWS, STEP)
            if column_sums is not None:
                column_total += tl.sum(w, 1)
        if column_sums is not None:
            tiles.store_column_sums(column_sums, s, b, h, first, column_total, BN)
    tiles.store_rows(tiles.key_rows(gk, s, b, kv_head, first), k_total * s.scale, BN, D, BD)
    tiles.store_rows(tiles.key_rows(gv, s, b, kv_head, first), v_total, BN, DV, BDV)


@triton.jit
def second_queries_kernel(
    q,
    k,
    v,
    dout,
    s,
    x,
    rows,
    gq,
    gbias,
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
    q_change_at = tiles.query_rows(x.q, s, b, h, first)
    do_at = tiles.query_rows(dout, s, b, h, first)
    q_tile = tiles.held_rows(q_at, BM, D, BD, True, STEP)
    q_change = tiles.held_rows(q_change_at, BM, D, BD, True, STEP)
    do_tile = tiles.held_rows(do_at, BM, DV, BDV, True, STEP)
    log2_sum = tiles.log2_sums(rows.lse, s, b, h, first, BM)[:, None]
    shift = tiles.load_statistic(rows.shift, s, b, h, first, 0.0, BM)[:, None]
    mean = tiles.load_statistic(rows.mean, s, b, h, first, 0.0, BM)[:, None]
    r = tiles.load_statistic(rows.r, s, b, h, first, 0.0, BM)[:, None]
    q_total = tl.zeros((BM, BD), tl.float32)
    row_total = tl.zeros((BM,), tl.float32)
    bounds = tiles.key_range(s, first, BM, BN)
    for column in range(bounds[0], bounds[3], BN):
        cols = column + tl.arange(0, BN)[None, :]
        k_at = tiles.key_rows(k, s, b, h // group, column)
        k_change_at = tiles.key_rows(x.k, s, b, h // group, column)
        v_at = tiles.key_rows(v, s, b, h // group, column)
        v_change_at = tiles.key_rows(x.v, s, b, h // group, column)
        k_tile = tiles.held_rows(k_at, BN, D, BD, not EVEN, STEP)
        k_change = tiles.held_rows(k_change_at, BN, D, BD, not EVEN, STEP)
        v_tile = tiles.held_rows(v_at, BN, DV, BDV, not EVEN, STEP)
        v_change = tiles.held_rows(v_change_at, BN, DV, BDV, not EVEN, STEP)
        z = tiles.row_products(q_tile, q_at, k_tile, k_at, None, BM, BN, D, BD, STEP)
        z_t = tiles.row_products(q_change, q_change_at, k_tile, k_at, None, BM, BN, D, BD, STEP)
        z_t = tiles.row_products(q_tile, q_at, k_change, k_change_at, z_t, BM, BN, D, BD, STEP) * s.scale
        p, t = tiles.weights(z, log2_sum, s, b, h, at, cols, True, not EVEN)
        change = tiles.score_tangent(z_t, t, s, x, b, h, at, cols, not EVEN) - mean
        kept = None
        if s.threshold is not None:
            kept = tiles.keep(s, b, h, first, column, BM, BN)
        g = tiles.row_products(do_tile, do_at, v_tile, v_at, None, BM, BN, DV, BDV, STEP)
        e = tiles.dropped(g, kept, s) - shift
        gz_t = tiles.through_softcap(p * e, t, s)
        q_total = tiles.add_product(gz_t, k_change, k_change_at, q_total, BN, D, BD, not EVEN, STEP)
        g_t = tiles.row_products(do_tile, do_at, v_change, v_change_at, None, BM, BN, DV, BDV, STEP)
        w = p * (change * e + tiles.dropped(g_t, kept, s) - r)
        gz = tiles.second_product_gradient(w, p * e, z_t, t, s)
        q_total = tiles.add_product(gz, k_tile, k_at, q_total, BN, D, BD, not EVEN, STEP)
        if gbias is not None:
            tiles.store_pairs(gbias, s, b, h, at, cols, w)
        if row_sums is not None:
            row_total += tl.sum(w, 1)
    tiles.store_rows(tiles.query_rows(gq, s, b, h, first), q_total * s.scale, BM, D, BD)
    if row_sums is not None:
        tiles.store_statistic(row_sums, s, b, h, first, row_total, BM)
