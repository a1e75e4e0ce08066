"""Checks of direct calls of attention's raw ops: what the kernels must not see."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast._checks import check_float_tensor, check_seed, shape_of, wide
from genfast.ops._attention_arguments import UNBOUNDED
from genfast.ops._attention_tensors import Extent, Packed, broadcastable, checked_qkv

__all__ = ["check_backward", "check_forward", "check_second", "check_starts", "check_tangent", "longest_of"]

Tensor = torch.Tensor


def _expect(op: str, name: str, x: Tensor | None, shape: Any, dtype: torch.dtype, device: torch.device) -> None:
    if x is not None and (tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device):
        raise ValueError(
            f"{op}: {name} must be {dtype} of shape {tuple(shape)} on {device}, got {x.dtype} of {shape_of(x)} on "
            f"{x.device}"
        )


def check_forward(  # type: ignore[no-untyped-def]
    q, k, v, bias, table, sinks, mask, q_index, k_index, q_starts, k_starts, seed, scale, softcap, dropout_p, left,
    right, shift, bottom_right, batch_offset,
):  # fmt: skip
    """What a direct call of a raw op must keep to; see ``genfast._op.Op``."""
    op = "genfast::attention"
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float_tensor(op, name, x)
    _expect(op, "k", k, k.shape, q.dtype, q.device)
    _expect(op, "v", v, v.shape, q.dtype, q.device)
    checked_qkv(op, q, k, v)
    dtype = wide(q.dtype)
    packed = _packed(op, q, k, q_starts, k_starts, table is not None and q_index is None)
    extent = Extent.of(q, k, packed)
    if bias is not None:
        _expect(op, "bias", bias, broadcastable(op, "bias", bias, q, extent).shape, q.dtype, q.device)
    if mask is not None:
        _expect(op, "mask", mask, broadcastable(op, "mask", mask, q, extent).shape, torch.bool, q.device)
    _expect(op, "sinks", sinks, (q.shape[1],), dtype, q.device)
    if table is not None:
        _check_table(op, table, q, k, q_index, k_index, packed, dtype)
    check_seed(op, seed)
    if dropout_p > 0.0 and seed is None:
        raise ValueError(f"{op}: dropout needs a seed, got None")
    if not (0.0 <= dropout_p <= 1.0 and 0.0 <= softcap < math.inf and math.isfinite(scale)):
        raise ValueError(
            f"{op}: needs 0 <= dropout_p <= 1, 0 <= softcap and finite values, got dropout_p {dropout_p}, "
            f"softcap {softcap}, scale {scale}"
        )
    if not (-1 <= left < UNBOUNDED and -1 <= right < UNBOUNDED and abs(shift) < UNBOUNDED):
        raise ValueError(f"{op}: left and right must be at least -1, got {left} and {right} at shift {shift}")
    if not 0 <= batch_offset < UNBOUNDED:
        raise ValueError(f"{op}: batch_offset must be in [0, 2^30), got {batch_offset}")


def check_starts(op: str, name: str, starts: Tensor, rows: int) -> None:
    """Where packed sequences begin must not decrease, from 0 to at most ``rows``; looks at the values."""
    values = starts.tolist()
    if values[0] != 0 or values[-1] > rows or values != sorted(values):
        shown = str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:6]))}, ...]"
        raise ValueError(f"{op}: {name} must rise from 0 to at most the {rows} rows there are, got {shown}")


def longest_of(starts: Tensor) -> int:
    """Rows of the longest sequence."""
    return int(starts.diff().max()) if starts.shape[0] > 1 else 0


def _packed(op: str, q: Tensor, k: Tensor, q_starts: Any, k_starts: Any, unindexed: bool) -> Packed | None:
    if q_starts is None and k_starts is None:
        return None
    for name, starts in (("q_starts", q_starts), ("k_starts", k_starts)):
        if starts is None or starts.dtype != torch.int64 or starts.dim() != 1 or starts.shape[0] < 1:
            raise ValueError(f"{op}: q_starts and k_starts go together and must be int64 of 1 dimension")
        _expect(op, name, starts, q_starts.shape, torch.int64, q.device)
    if q.shape[0] != 1 or k.shape[0] != 1 or unindexed:
        raise ValueError(f"{op}: packed sequences lie in a batch of 1, and tables need q_index and k_index")
    if not q.is_cpu:  # looking would wait for the device
        return Packed(q_starts, k_starts, (0, 0), (0, 0))
    check_starts(op, "q_starts", q_starts, q.shape[2])
    check_starts(op, "k_starts", k_starts, k.shape[2])
    longest = longest_of(q_starts), longest_of(k_starts)
    return Packed(q_starts, k_starts, longest, longest)


def _check_table(op, table, q, k, q_index, k_index, packed, dtype):  # type: ignore[no-untyped-def]
    queries, keys = q.shape[2], k.shape[2]
    batch = q.shape[0] if packed is None else packed.q_starts.shape[0] - 1
    if table.dim() != 3:
        raise ValueError(f"{op}: table must have 3 dimensions, got shape {shape_of(table)}")
    length = table.shape[2]
    if (q_index is None) != (k_index is None):
        raise ValueError(f"{op}: q_index and k_index go together, got one of them")
    if q_index is None:
        length = max(queries + keys - 1, 0)
    shape = (1 if table.shape[0] == 1 else batch, 1 if table.shape[1] == 1 else q.shape[1], length)
    _expect(op, "table", table, shape, dtype, q.device)
    if q_index is not None:
        _expect(op, "q_index", q_index, (queries,), torch.int32, q.device)
        _expect(op, "k_index", k_index, (keys,), torch.int32, q.device)
        if q.is_cpu:  # elsewhere the values are on the device: looking would wait for it
            rows, columns = (queries,), (keys,)
            if packed is not None:
                rows, columns = packed.q_starts.diff().tolist(), packed.k_starts.diff().tolist()
            q_parts, k_parts = (x[: sum(n)].split(list(n)) for x, n in ((q_index, rows), (k_index, columns)))
            for part in zip(q_parts, k_parts, strict=True):
                _check_entries(op, *part, length)


def _check_entries(op: str, q_index: Tensor, k_index: Tensor, length: int) -> None:
    if q_index.shape[0] and k_index.shape[0]:
        low, high = int(q_index.min() - k_index.max()), int(q_index.max() - k_index.min())
        if low < 0 or high >= length:
            raise ValueError(f"{op}: indices into the table must be in [0, {length}), got {low} to {high}")


def _check_outputs(op: str, q: Tensor, v: Tensor, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if "lse" in name:
            _expect(op, name, x, q.shape[:3], wide(q.dtype), q.device)
        else:
            _expect(op, name, x, (*q.shape[:3], v.shape[3]), q.dtype, q.device)


def _check_tangents(op: str, primals: Any, tangents: Any) -> None:
    for name, primal, x in zip(("q", "k", "v", "bias", "table", "sinks"), primals, tangents, strict=True):
        if x is not None and primal is None:
            raise ValueError(f"{op}: {name}_t needs {name}, which is None")
        if x is not None:
            _expect(op, f"{name}_t", x, primal.shape, primal.dtype, primal.device)


def check_backward(dout, dlse, q, k, v, bias, table, sinks, out, lse, *rest):  # type: ignore[no-untyped-def]
    check_forward(q, k, v, bias, table, sinks, *rest[:-2])
    _check_outputs("genfast::attention_backward", q, v, dout=dout, dlse=dlse, out=out, lse=lse)


def check_tangent(q, k, v, bias, table, sinks, *rest):  # type: ignore[no-untyped-def]
    op = "genfast::attention_tangent"
    check_forward(q, k, v, bias, table, sinks, *rest[8:])
    _check_tangents(op, (q, k, v, bias, table, sinks), rest[:6])
    _check_outputs(op, q, v, out=rest[6], lse=rest[7])


def check_second(dout, dlse, q, k, v, bias, table, sinks, *rest):  # type: ignore[no-untyped-def]
    op = "genfast::attention_second"
    check_forward(q, k, v, bias, table, sinks, *rest[10:-2])
    _check_tangents(op, (q, k, v, bias, table, sinks), rest[:6])
    out, lse, out_t, lse_t = rest[6:10]
    _check_outputs(op, q, v, dout=dout, dlse=dlse, out=out, lse=lse, out_t=out_t, lse_t=lse_t)
