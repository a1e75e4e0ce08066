"""The plain formulas of attention in torch operations: the oracle of every backend and derivative.

Every function takes the arguments of the raw op of its name and computes what it needs from q, k, v, bias, table and
sinks alone, so that autograd differentiates it to every order. Memory grows with queries times keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from genfast import random
from genfast._checks import wide
from genfast._op import Backend, Op
from genfast.ops import _attention_packing as packing

__all__ = [
    "laid_out",
    "reference_backward",
    "reference_forward",
    "reference_second",
    "reference_tangent",
    "reference_tangent_change",
]

Tensor = torch.Tensor

_keep_op = Op(
    "philox_attention_keep(Tensor seed, SymInt batch, SymInt heads, SymInt queries, SymInt keys, float dropout_p, "
    "SymInt batch_offset) -> Tensor",
    {"reference": Backend(lambda seed, b, h, i, j, p, offset: random.attention_keep(b, h, i, j, seed, p, offset))},
    lambda seed, batch, heads, queries, keys, *_: seed.new_empty((batch, heads, queries, keys), dtype=torch.bool),
    internal=True,
)


_SCALE = 6  # among the options of a raw op


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x [B, H, S, D] in memory as ``like``: heads inside rows, or contiguous."""
    if like.stride(1) < like.stride(2):
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous()


class _Weights(NamedTuple):
    """What the derivatives share; tensors [B, Hq, Sq, Skv] unless said otherwise, in the arithmetic's dtype."""

    q: Tensor  # [B, Hq, Sq, D]
    k: Tensor  # [B, Hq, Skv, D]
    v: Tensor  # [B, Hq, Skv, Dv]
    P: Tensor  # softmax weights, 0 where invisible
    P_sink: Tensor | None  # [B, Hq, Sq, 1]
    L: Tensor  # [B, Hq, Sq, 1]
    tanh: Tensor | None  # tanh(Z / softcap)
    M: Tensor | None  # dropout factors
    entry: Tensor | None  # of the table, flat [Sq * Skv]
    packing: Any  # of packed sequences, or None


def _over_heads(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B, Hkv, S, D] as [B, Hq, S, D]: each head serves a group of query heads."""
    x = x.to(dtype)
    if x.shape[1] == heads:
        return x
    return x.unsqueeze(2).expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)


def _over_groups(x: Tensor, like: Tensor) -> Tensor:
    """The gradient [B, Hq, S, D] summed over the query heads of each head of ``like``, in its dtype and layout."""
    if x.shape[1] != like.shape[1]:
        x = x.unflatten(1, (like.shape[1], -1)).sum(2)
    return laid_out(x.to(like.dtype), like)


def _sum_to(x: Tensor, shape: Any) -> Tensor:
    """The sum over the dimensions that ``shape`` broadcasts."""
    dims = [d for d in range(x.dim()) if shape[d] == 1 and x.shape[d] != 1]
    return x.sum(dims, keepdim=True) if dims else x


def _table_index(q: Tensor, k: Tensor, q_index: Tensor | None, k_index: Tensor | None) -> Tensor:
    """The flat indices [Sq * Skv] into the table's last dimension."""
    if q_index is not None and k_index is not None:
        rows, columns = q_index.to(torch.int64), k_index.to(torch.int64)
    else:
        rows = torch.arange(q.shape[2], device=q.device) + (k.shape[2] - 1)
        columns = torch.arange(k.shape[2], device=q.device)
    return (rows.unsqueeze(1) - columns).reshape(-1)


def _looked_up(table: Tensor, index: Any, like: Tensor) -> Tensor:
    """A table [B or 1, Hq or 1, L] at its indices: [B or 1, Hq or 1, Sq, Skv]."""
    return table.to(like.dtype).index_select(2, index).unflatten(2, like.shape[2:])


def _table_gradient(x: Tensor, table: Tensor, w: _Weights) -> Tensor:
    """[B, Hq, Sq, Skv] summed into the table's entries; the same bits on every run."""
    if w.packing is not None and table.shape[0] > 1:
        flat = _table_gradient(x, packing.flat_table(table, w.packing), w._replace(packing=None))
        return flat.view(table.shape[1], table.shape[0], -1).transpose(0, 1).contiguous()
    index: Any = w.entry
    x = _sum_to(x, (*table.shape[:2], -1, -1)).flatten(2)
    total = torch.zeros(table.shape, dtype=x.dtype, device=x.device)
    if x.is_cuda:  # sorts, where scatter_add would use atomics
        rows = total.flatten(0, 1).T.index_put((index,), x.flatten(0, 1).T, accumulate=True)
        return rows.T.unflatten(0, table.shape[:2]).to(table.dtype).contiguous()
    return total.scatter_add(2, index.expand(x.shape), x).to(table.dtype)


def _visible(
    q: Tensor, k: Tensor, mask: Tensor | None, left: Any, right: Any, shift: Any, packed: Any
) -> Tensor | None:
    visible = mask
    if packed is not None:
        visible = packing.visible(packed)
        if mask is not None:
            visible = visible & packing.over_pairs(mask, packed)
    if left >= 0 or right >= 0:
        if packed is None:
            rows, columns = torch.arange(q.shape[2], device=q.device), torch.arange(k.shape[2], device=q.device)
        else:
            rows, columns = packed.q_position, packed.k_position
        distance = columns - (rows.unsqueeze(1) + packing.shifts(packed, shift))
        band = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            band = band & (distance >= -left)
        if right >= 0:
            band = band & (distance <= right)
        visible = band if visible is None else visible & band
    return visible


def _bilinear(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return (left @ right.transpose(-1, -2)) * scale


def _weights(  # type: ignore[no-untyped-def]
    q, k, v, bias, table, sinks, mask, q_index, k_index, q_starts, k_starts, seed, scale, softcap, dropout_p, left,
    right, shift, bottom_right, batch_offset,
):  # fmt: skip
    dtype, heads = wide(q.dtype), q.shape[1]
    packed = packing.packing(q, k, q_starts, k_starts, bottom_right)
    if packed is None and bottom_right:
        shift = shift + k.shape[2] - q.shape[2]
    q, k, v = q.to(dtype), _over_heads(k, heads, dtype), _over_heads(v, heads, dtype)
    A = _bilinear(q, k, scale)
    tanh = None
    if softcap > 0.0:
        tanh = torch.tanh(A / softcap)
        A = softcap * tanh
    if bias is not None:
        A = A + packing.over_pairs(bias.to(dtype), packed)
    index = None
    if table is not None:
        if packed is None:
            index = _table_index(q, k, q_index, k_index)
        else:
            index = packing.entries(packed, table, q_index, k_index)
        A = A + _looked_up(packing.flat_table(table, packed), index, A)
    visible = _visible(q, k, mask, left, right, shift, packed)
    if visible is not None:
        A = torch.where(visible, A, -torch.inf)
    sink = None if sinks is None else sinks.to(dtype).view(-1, 1, 1)
    if sink is not None and packed is not None:  # rows after the last sequence have none
        sink = torch.where(packed.q_sequence.unsqueeze(1) == packed.sequences, -torch.inf, sink)
    with_sink = A if sink is None else torch.cat((A, sink.expand(*A.shape[:3], 1)), 3)
    if with_sink.shape[3]:
        top = with_sink.detach().amax(3, keepdim=True)
        top = torch.where(top == -torch.inf, 0.0, top)
    else:
        top = A.new_zeros((*A.shape[:3], 1))
    P = torch.exp(A - top)
    total = P.sum(3, keepdim=True)
    P_sink = None
    if sink is not None:
        P_sink = torch.exp(sink - top)
        total = total + P_sink
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    L = torch.where(empty, -torch.inf, top + torch.log(total))
    M = None
    if dropout_p > 0.0:
        seed = seed.to(q.device)
        if packed is None:
            keep = _keep_op(seed, *A.shape, dropout_p, batch_offset)
        else:
            keep = packing.keep(packed, heads, seed, dropout_p, batch_offset)
        M = keep.to(dtype) / (1.0 - dropout_p) if dropout_p < 1.0 else torch.zeros_like(A)
    return _Weights(q, k, v, P / total, None if P_sink is None else P_sink / total, L, tanh, M, index, packed)


def _dropped(x: Tensor, M: Tensor | None) -> Tensor:
    return x if M is None else x * M


def _slope(w: _Weights) -> Any:
    """tau, the derivative of the softcap."""
    return 1.0 if w.tanh is None else 1.0 - w.tanh.square()


def _rows(dlse: Tensor | None, w: _Weights) -> Any:
    """The cotangent of lse [B, Hq, Sq, 1]; rows that see nothing have no gradient."""
    return 0.0 if dlse is None else torch.where(w.L.isneginf(), 0.0, dlse.to(w.L.dtype).unsqueeze(3))


def _score_tangent(w: _Weights, q_t, k_t, bias_t, table_t, scale):  # type: ignore[no-untyped-def]
    """(Z', A') along a direction."""
    Z = _bilinear(q_t, w.k, scale) + _bilinear(w.q, k_t, scale)
    A = _slope(w) * Z
    if bias_t is not None:
        A = A + packing.over_pairs(bias_t.to(A.dtype), w.packing)
    if table_t is not None:
        A = A + _looked_up(packing.flat_table(table_t, w.packing), w.entry, A)
    return Z, A


def _sink_column(sinks_t: Tensor | None, w: _Weights) -> Any:
    return 0.0 if sinks_t is None else sinks_t.to(w.P.dtype).view(-1, 1, 1)


def _mean(w: _Weights, A: Tensor, sinks_t: Tensor | None) -> Tensor:
    """mu [B, Hq, Sq, 1], the mean of A' under the weights: the tangent of lse."""
    mean = (w.P * A).sum(3, keepdim=True)
    return mean if w.P_sink is None or sinks_t is None else mean + w.P_sink * _sink_column(sinks_t, w)


def reference_forward(q, k, v, bias, table, sinks, *fixed):  # type: ignore[no-untyped-def]
    w = _weights(q, k, v, bias, table, sinks, *fixed)
    return laid_out((_dropped(w.P, w.M) @ w.v).to(q.dtype), q), w.L.squeeze(3)


def reference_backward(dout, dlse, q, k, v, bias, table, sinks, out, lse, *rest):  # type: ignore[no-untyped-def]
    *fixed, need_bias, need_table = rest
    scale = fixed[_SCALE]
    w = _weights(q, k, v, bias, table, sinks, *fixed)
    dout = dout.to(w.P.dtype)
    G = _dropped(_bilinear(dout, w.v, 1.0), w.M)
    delta = (w.P * G).sum(3, keepdim=True)
    rows = _rows(dlse, w)
    dA = w.P * (G - delta + rows)
    dZ = _slope(w) * dA
    return (
        laid_out((scale * (dZ @ w.k)).to(q.dtype), q),
        _over_groups(scale * (dZ.transpose(2, 3) @ w.q), k),
        _over_groups(_dropped(w.P, w.M).transpose(2, 3) @ dout, v),
        *_parameter_gradients(w, dA, bias, table, sinks, rows - delta, need_bias, need_table),
    )


def _parameter_gradients(w, dA, bias, table, sinks, to_sink, need_bias, need_table):  # type: ignore[no-untyped-def]
    """Gradients to bias, table and sinks: of the scores, and ``to_sink`` [B, Hq, Sq, 1] times the sink's weight."""
    dbias = None
    if need_bias and bias is not None:
        dbias = _sum_to(dA, bias.shape) if w.packing is None else packing.pairs_gradient(dA, w.packing, bias)
        dbias = dbias.to(bias.dtype).contiguous()
    return (
        dbias,
        _table_gradient(dA, table, w) if need_table and table is not None else None,
        None if sinks is None else (w.P_sink * to_sink).sum((0, 2, 3)).to(sinks.dtype),
    )


def reference_tangent(q, k, v, bias, table, sinks, q_t, k_t, v_t, bias_t, table_t, sinks_t, out, lse, *fixed):  # type: ignore[no-untyped-def]
    w = _weights(q, k, v, bias, table, sinks, *fixed)
    dtype, heads = w.P.dtype, q.shape[1]
    q_t, k_t, v_t = q_t.to(dtype), _over_heads(k_t, heads, dtype), _over_heads(v_t, heads, dtype)
    _, A = _score_tangent(w, q_t, k_t, bias_t, table_t, fixed[_SCALE])
    mu = _mean(w, A, sinks_t)
    out_t = _dropped(w.P * (A - mu), w.M) @ w.v + _dropped(w.P, w.M) @ v_t
    return laid_out(out_t.to(q.dtype), q), mu.squeeze(3)


def reference_second(  # type: ignore[no-untyped-def]
    dout, dlse, q, k, v, bias, table, sinks, q_t, k_t, v_t, bias_t, table_t, sinks_t, out, lse, out_t, lse_t, *rest
):  # fmt: skip
    *fixed, need_bias, need_table = rest
    scale, softcap = fixed[_SCALE], fixed[_SCALE + 1]
    w = _weights(q, k, v, bias, table, sinks, *fixed)
    dtype, heads = w.P.dtype, q.shape[1]
    dout, q_t = dout.to(dtype), q_t.to(dtype)
    k_t, v_t = _over_heads(k_t, heads, dtype), _over_heads(v_t, heads, dtype)
    Z, A = _score_tangent(w, q_t, k_t, bias_t, table_t, scale)
    mu = _mean(w, A, sinks_t)
    G = _dropped(_bilinear(dout, w.v, 1.0), w.M)
    H = _dropped(_bilinear(dout, v_t, 1.0), w.M)
    delta = (w.P * G).sum(3, keepdim=True)
    r = (w.P * ((A - mu) * G + H)).sum(3, keepdim=True)
    rows = _rows(dlse, w)
    E = G - delta + rows
    W = w.P * ((A - mu) * E + H - r)
    slope = _slope(w)
    gZ, gZ_t = slope * W, slope * (w.P * E)
    if w.tanh is not None:
        gZ = gZ - gZ_t * Z * (2.0 / softcap) * w.tanh
    to_sink = (_sink_column(sinks_t, w) - mu) * (rows - delta) - r
    return (
        laid_out((scale * (gZ @ w.k + gZ_t @ k_t)).to(q.dtype), q),
        _over_groups(scale * (gZ.transpose(2, 3) @ w.q + gZ_t.transpose(2, 3) @ q_t), k),
        _over_groups(_dropped(w.P * (A - mu), w.M).transpose(2, 3) @ dout, v),
        *_parameter_gradients(w, W, bias, table, sinks, to_sink, need_bias, need_table),
    )


def reference_tangent_change(  # type: ignore[no-untyped-def]
    q, k, v, bias, table, sinks, q_t, k_t, v_t, bias_t, table_t, sinks_t, q_c, k_c, v_c, bias_c, table_c, sinks_c,
    *fixed,
):  # fmt: skip
    """The derivative of ``reference_tangent`` as q, k, v, bias, table and sinks move along the changes ``*_c``."""
    w = _weights(q, k, v, bias, table, sinks, *fixed)
    scale, softcap = fixed[_SCALE], fixed[_SCALE + 1]
    dtype, heads = w.P.dtype, q.shape[1]
    q_t, q_c = q_t.to(dtype), q_c.to(dtype)
    k_t, v_t, k_c, v_c = (_over_heads(x, heads, dtype) for x in (k_t, v_t, k_c, v_c))
    Z1, A1 = _score_tangent(w, q_t, k_t, bias_t, table_t, scale)
    Z2, A2 = _score_tangent(w, q_c, k_c, bias_c, table_c, scale)
    A12 = _slope(w) * (_bilinear(q_t, k_c, scale) + _bilinear(q_c, k_t, scale))
    if w.tanh is not None:
        A12 = A12 - (2.0 / softcap) * w.tanh * _slope(w) * Z1 * Z2
    mu1, mu2 = _mean(w, A1, sinks_t), _mean(w, A2, sinks_c)
    P1, P2 = w.P * (A1 - mu1), w.P * (A2 - mu2)
    mu12 = (P2 * A1 + w.P * A12).sum(3, keepdim=True)
    if w.P_sink is not None and sinks_t is not None:
        mu12 = mu12 + w.P_sink * (_sink_column(sinks_c, w) - mu2) * _sink_column(sinks_t, w)
    P12 = P2 * (A1 - mu1) + w.P * (A12 - mu12)
    change = _dropped(P12, w.M) @ w.v + _dropped(P1, w.M) @ v_c + _dropped(P2, w.M) @ v_t
    return laid_out(change.to(q.dtype), q), mu12.squeeze(3)
