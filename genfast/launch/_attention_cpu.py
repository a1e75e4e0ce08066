"""Launches the C++ attention kernels; csrc/attention/attention.h holds the calling convention."""

from __future__ import annotations

from typing import Any

import torch

from genfast._native import DTYPE_CODES, C
from genfast.launch._attention_packed import one_by_one
from genfast.launch._common import heads_like, pointer

__all__ = [
    "backward", "backward_supports", "forward", "forward_supports", "second", "second_supports", "tangent",
    "repeating", "rows", "tangent_supports",
]  # fmt: skip

Tensor = torch.Tensor

_NO_ROWS = (0, 0, 0, 0)
_ELEMENTS, _REDUCED, _COLUMNS, _ROWS = 1, 2, 3, 4  # BiasGradient


def forward_supports(q: Tensor, *rest: Any) -> str | None:
    """Why the C++ kernels do not run these tensors."""
    return "float64 runs on the reference backend" if q.dtype is torch.float64 else None


def backward_supports(dout: Tensor, dlse: Tensor | None, q: Tensor, *rest: Any) -> str | None:
    return forward_supports(q)


tangent_supports = forward_supports
second_supports = backward_supports


def rows(x: Tensor) -> tuple[tuple[int, int, int, int], Tensor]:
    """Address and strides of ``x``, and what they belong to: a copy where its rows are not contiguous."""
    batch, head, row, column = x.stride()
    if column != 1 and x.shape[3] > 1:
        x = x.contiguous()
        batch, head, row, _ = x.stride()
    return (x.data_ptr(), batch, head, row), x


def repeating(x: Tensor | None) -> tuple[int, int, int, int]:
    """Strides, 0 along dimensions of size 1."""
    if x is None:
        return _NO_ROWS
    return tuple(0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))  # type: ignore[return-value]


class _Call:
    """The C++ view of a call, and the tensors that it points into."""

    __slots__ = ("bias", "kept", "shape", "starts", "table", "view")

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, table: Tensor | None, sinks: Tensor | None,
        out: Tensor, lse: Tensor | None, mask: Tensor | None, q_index: Tensor | None, k_index: Tensor | None,
        q_starts: Tensor | None, k_starts: Tensor | None, seed: Tensor | None, scale: float, softcap: float,
        dropout_p: float, left: int, right: int, shift: int, bottom_right: bool, batch_offset: int,
    ) -> None:  # fmt: skip
        (q_rows, q), (k_rows, k), (v_rows, v), (out_rows, out) = rows(q), rows(k), rows(v), rows(out)
        batch, heads, queries, depth = q.shape
        _, kv_heads, keys, value_depth = v.shape
        if q_starts is not None and k_starts is not None:
            q_starts, k_starts = q_starts.contiguous(), k_starts.contiguous()
            batch = q_starts.shape[0] - 1
        elif bottom_right:
            shift += keys - queries
        self.shape = (batch, heads, kv_heads, queries, keys, depth, value_depth)
        table_batch = table_head = table_length = threshold = key = 0
        factor = 1.0
        if lse is not None:
            lse = lse.contiguous()
        if sinks is not None:
            sinks = sinks.contiguous()
        if table is not None:
            table = table.contiguous()
            table_length = table.shape[2]
            table_batch, table_head = (0 if table.shape[i] == 1 else table.stride(i) for i in range(2))
        if q_index is not None and k_index is not None:
            q_index, k_index = q_index.contiguous(), k_index.contiguous()
        if dropout_p > 0.0 and seed is not None:
            threshold = round(dropout_p * 65536)
            factor = 0.0 if threshold >= 65536 else 1.0 / (1.0 - dropout_p)
            key = int(seed) & 0xFFFFFFFFFFFFFFFF
        self.bias, self.table = bias, table
        self.starts = None if q_starts is None or k_starts is None else (q_starts, k_starts)
        self.kept = (q, k, v, out, lse, sinks, mask, q_index, k_index)
        self.view = C.cpu.Attention(
            DTYPE_CODES[q.dtype], self.shape, q_rows, k_rows, v_rows, out_rows, pointer(lse), pointer(bias),
            repeating(bias), pointer(table), table_batch, table_head, table_length,
            pointer(q_index), pointer(k_index), pointer(mask), repeating(mask),
            pointer(sinks), scale, softcap, threshold, factor, key, left, right, shift, batch_offset,
            pointer(q_starts), pointer(k_starts), bottom_right,
        )  # fmt: skip


def _clear_rest(call: _Call, side: int, *outputs: Tensor | float) -> None:
    """Fills the rows of ``outputs`` after the last packed sequence: what no sequence writes."""
    if call.starts is None:
        return
    end = int(call.starts[side][-1])
    value = outputs[-1] if isinstance(outputs[-1], float) else 0.0
    for x in outputs:
        if isinstance(x, Tensor) and end < x.shape[2]:
            x[:, :, end:] = value


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Any, table: Any, sinks: Any, *fixed: Any) -> tuple[Tensor, Tensor]:
    out = heads_like(q, v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    call = _Call(q, k, v, bias, table, sinks, out, None, *fixed)
    _clear_rest(call, 0, out)
    _clear_rest(call, 0, lse, -torch.inf)
    C.cpu.attention_forward(call.view, lse.data_ptr(), torch.get_num_threads())
    return out, lse


class _TangentCall:
    """The tangents of a call, likewise."""

    def __init__(
        self, call: _Call, q_t: Tensor, k_t: Tensor, v_t: Tensor, bias_t: Tensor | None, table_t: Tensor | None,
        sinks_t: Tensor | None, out_t: Tensor, lse_t: Tensor,
    ) -> None:  # fmt: skip
        (q_rows, q_t), (k_rows, k_t), (v_rows, v_t), (out_rows, out_t) = (rows(x) for x in (q_t, k_t, v_t, out_t))
        lse_t = lse_t.contiguous()
        table_t = None if table_t is None else table_t.contiguous()
        sinks_t = None if sinks_t is None else sinks_t.contiguous()
        self.kept = (call, q_t, k_t, v_t, bias_t, table_t, sinks_t, out_t, lse_t)
        self.view = C.cpu.AttentionTangent(
            call.view, q_rows, k_rows, v_rows, pointer(bias_t), repeating(bias_t),
            pointer(table_t), pointer(sinks_t), out_rows, lse_t.data_ptr(),
        )  # fmt: skip


def tangent(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, table: Any, sinks: Any, q_t: Tensor, k_t: Tensor, v_t: Tensor,
    bias_t: Any, table_t: Any, sinks_t: Any, out: Tensor, lse: Tensor, *fixed: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out_t = heads_like(q, v.shape[3])
    lse_t = torch.empty(q.shape[:3], dtype=torch.float32)
    call = _Call(q, k, v, bias, table, sinks, out, lse, *fixed)
    _clear_rest(call, 0, out_t, lse_t)
    moved = _TangentCall(call, q_t, k_t, v_t, bias_t, table_t, sinks_t, out_t, lse_t)
    C.cpu.attention_tangent(moved.view, torch.get_num_threads())
    return out_t, lse_t


class _BiasGradient:
    """Where the kernel leaves the gradient of a bias, and how it becomes that of the bias."""

    def __init__(self, bias: Tensor | None, shape: tuple[int, ...], splits: int) -> None:
        self.bias, self.kind, self.out = bias, 0, None
        self.leading = (1, 1)
        if bias is None:
            return
        batch, heads, _, queries, keys, *_ = shape
        if bias.shape[2] == queries and bias.shape[3] == keys:
            own = bias.shape[0] == batch and bias.shape[1] == heads
            self.kind = _ELEMENTS if own else _REDUCED
            self.leading = (bias.shape[0], bias.shape[1])
            self.out = bias.new_empty(bias.shape)
        elif bias.shape[3] == keys:
            self.kind = _COLUMNS
            self.out = bias.new_empty((batch, heads, 1, keys), dtype=torch.float32)
        else:
            self.kind = _ROWS
            self.out = bias.new_empty((splits, batch, heads, queries, 1), dtype=torch.float32)

    def finish(self) -> Tensor | None:
        if self.out is None or self.bias is None or self.kind in (_ELEMENTS, _REDUCED):
            return self.out
        total = self.out.sum(0) if self.kind == _ROWS else self.out
        return total.sum_to_size(self.bias.shape).to(self.bias.dtype)


def _gradient(
    dout: Tensor, dlse: Tensor | None, call: _Call, moved: _TangentCall | None, need_bias: bool, need_table: bool
) -> tuple[Tensor | None, ...]:
    batch, heads, kv_heads, queries, keys, depth, _ = shape = call.shape
    q, k, v, *_ = call.kept
    table = call.table
    dout_rows, dout = rows(dout)
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv = (heads_like(x) for x in (q, k, v))
    _clear_rest(call, 0, dq)
    _clear_rest(call, 1, dk, dv)
    if call.starts is None:
        splits = C.cpu.attention_splits(batch, kv_heads, queries, keys)
    else:
        lengths = zip(*(x.diff().tolist() for x in call.starts), strict=True)
        splits = max((C.cpu.attention_splits(1, kv_heads, *both) for both in lengths), default=1)
    partial = torch.empty((splits, len(q), heads, queries, depth)) if splits > 1 else None
    dbias = _BiasGradient(call.bias if need_bias else None, shape, splits)
    dtable = None
    if need_table and table is not None:
        dtable = torch.zeros((splits, batch, heads, table.shape[2]))  # not every packed sequence has all splits
    C.cpu.attention_gradient(
        call.view, dout_rows, pointer(dlse), rows(dq)[0], rows(dk)[0], rows(dv)[0], dbias.kind, pointer(dbias.out),
        *dbias.leading, pointer(dtable), pointer(partial), splits, None if moved is None else moved.view,
        torch.get_num_threads(),
    )  # fmt: skip
    to_table = None if dtable is None or table is None else dtable.sum(0).sum_to_size(table.shape)
    return dq, dk, dv, dbias.finish(), to_table


def _row_statistics(dout: Tensor, dlse: Tensor | None, out: Tensor, sinks: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """(P of the sink, dlse - delta), both [B, Hq, Sq]."""
    delta = (dout.float() * out.float()).sum(-1)
    p = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks.view(-1, 1) - lse))
    return p, (-delta if dlse is None else dlse - delta)


def _wide(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else x.float() for x in tensors)


def _rounded(gradients: tuple[Tensor | None, ...], *like: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(g if g is None or x is None else g.to(x.dtype) for g, x in zip(gradients, like, strict=True))


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Any, table: Any, sinks: Tensor | None,
    out: Tensor, lse: Tensor, *fixed: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    *options, need_bias, need_table = fixed
    if need_bias and options[3] is not None and bias is not None:
        return one_by_one(backward, (dout, dlse), (q, k, v, bias, table, sinks), (out, lse), options, need_table)
    if need_table and q.dtype is not torch.float32:
        # delta from a rounded out is off by the same for a whole row, and distances weigh that by thousands.
        primals = (*_wide(q, k, v, bias), table, sinks)
        gradients = backward(*_wide(dout), dlse, *primals, forward(*primals, *options)[0], lse, *fixed)
        return _rounded(gradients, q, k, v, bias, table, sinks)
    call = _Call(q, k, v, bias, table, sinks, out, lse, *options)
    gradients = _gradient(dout, dlse, call, None, need_bias, need_table)
    if sinks is None:
        return *gradients, None
    p, change = _row_statistics(dout, dlse, out, sinks, lse)
    return *gradients, (p * change).sum((0, 2))


def second(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Any, table: Any, sinks: Tensor | None,
    q_t: Tensor, k_t: Tensor, v_t: Tensor, bias_t: Any, table_t: Any, sinks_t: Tensor | None, out: Tensor,
    lse: Tensor, out_t: Tensor, lse_t: Tensor, *fixed: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    *options, need_bias, need_table = fixed
    if need_bias and options[3] is not None and bias is not None:
        primals, tangents = (q, k, v, bias, table, sinks), (q_t, k_t, v_t, bias_t, table_t, sinks_t)
        return one_by_one(second, (dout, dlse), (*primals, *tangents), (out, lse, out_t, lse_t), options, need_table)
    if need_table and q.dtype is not torch.float32:  # as in ``backward``
        primals, tangents = (*_wide(q, k, v, bias), table, sinks), (*_wide(q_t, k_t, v_t, bias_t), table_t, sinks_t)
        exact = forward(*primals, *options)[0]
        exact_t = tangent(*primals, *tangents, exact, lse, *options)[0]
        gradients = second(*_wide(dout), dlse, *primals, *tangents, exact, lse, exact_t, lse_t, *fixed)
        return _rounded(gradients, q, k, v, bias, table, sinks)
    call = _Call(q, k, v, bias, table, sinks, out, lse, *options)
    moved = _TangentCall(call, q_t, k_t, v_t, bias_t, table_t, sinks_t, out_t, lse_t)
    gradients = _gradient(dout, dlse, call, moved, need_bias, need_table)
    if sinks is None:
        return *gradients, None
    p, change = _row_statistics(dout, dlse, out, sinks, lse)
    centered = -lse_t if sinks_t is None else sinks_t.view(-1, 1) - lse_t
    dot = (dout.float() * out_t.float()).sum(-1)
    return *gradients, (p * (centered * change - dot)).sum((0, 2))
