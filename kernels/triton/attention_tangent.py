"""Forward-mode derivative of attention: out' and lse' along (q', k', v', bias', table', sinks'), in one pass.

    Z' = scale (q' k + q k')    A' = (1 - tanh^2) Z' + bias' + table'    mu = sum P A' + P_sink sink' = lse'
    out' = (M P A') v - mu out + (M P) v'

P comes from L, so nothing is rescaled and both products with values share an accumulator.

Floor: 5 products; bytes q, k, v and their tangents, out and out' once.

Tiling: a program owns BM queries of a head and walks its keys in steps of BN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genfast.kernels.triton import _attention_tiles as tiles
from genfast.kernels.triton._attention_tiles import LOG2E


@triton.jit
def tangent_kernel(
    q,
    k,
    v,
    s,
    sinks,
    x,
    out,
    lse,
    out_t,
    lse_t,
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
    rows = first + tl.arange(0, BM)[:, None]
    q_at = tiles.query_rows(q, s, b, h, first)
    q_change_at = tiles.query_rows(x.q, s, b, h, first)
    q_tile = tiles.held_rows(q_at, BM, D, BD, True, STEP)
    q_change = tiles.held_rows(q_change_at, BM, D, BD, True, STEP)
    log2_sum = tiles.log2_sums(lse, s, b, h, first, BM)
    mean = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BDV), tl.float32)
    bounds = tiles.key_range(s, first, BM, BN)
    for column in range(bounds[0], bounds[3], BN):
        cols = column + tl.arange(0, BN)[None, :]
        k_at = tiles.key_rows(k, s, b, h // group, column)
        k_change_at = tiles.key_rows(x.k, s, b, h // group, column)
        v_at = tiles.key_rows(v, s, b, h // group, column)
        v_change_at = tiles.key_rows(x.v, s, b, h // group, column)
        k_tile = tiles.held_rows(k_at, BN, D, BD, not EVEN, STEP)
        k_change = tiles.held_rows(k_change_at, BN, D, BD, not EVEN, STEP)
        z = tiles.row_products(q_tile, q_at, k_tile, k_at, None, BM, BN, D, BD, STEP)
        z_t = tiles.row_products(q_change, q_change_at, k_tile, k_at, None, BM, BN, D, BD, STEP)
        z_t = tiles.row_products(q_tile, q_at, k_change, k_change_at, z_t, BM, BN, D, BD, STEP)
        p, t = tiles.weights(z, log2_sum[:, None], s, b, h, rows, cols, True, not EVEN)
        moved = p * tiles.score_tangent(z_t * s.scale, t, s, x, b, h, rows, cols, not EVEN)
        mean += tl.sum(moved, 1)
        kept = None
        if s.threshold is not None:
            kept = tiles.keep(s, b, h, first, column, BM, BN)
        moved = tiles.dropped(moved, kept, s)
        p = tiles.dropped(p, kept, s)
        v_tile = tiles.held_rows(v_at, BN, DV, BDV, not EVEN, STEP)
        v_change = tiles.held_rows(v_change_at, BN, DV, BDV, not EVEN, STEP)
        acc = tiles.add_product(moved, v_tile, v_at, acc, BN, DV, BDV, not EVEN, STEP)
        acc = tiles.add_product(p, v_change, v_change_at, acc, BN, DV, BDV, not EVEN, STEP)

    if x.sinks is not None:
        weight = tl.exp2(tl.load(sinks + h) * LOG2E - log2_sum)
        mean += weight * tl.load(x.sinks + h)
    value = tiles.load_rows(tiles.query_rows(out, s, b, h, first), BM, DV, BDV, True).to(tl.float32)
    tiles.store_rows(tiles.query_rows(out_t, s, b, h, first), acc - mean[:, None] * value, BM, DV, BDV)
    tiles.store_statistic(lse_t, s, b, h, first, mean, BM)
