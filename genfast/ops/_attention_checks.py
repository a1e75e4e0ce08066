"""Checks of direct calls of attention's raw ops: what the kernels must not see."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast._checks import check_float_tensor, check_seed, shape_of
from genfast.ops._attention_arguments import UNBOUNDED, broadcastable, checked_qkv
from genfast.ops._attention_reference import wide

__all__ = ["check_backward", "check_forward", "check_second", "check_tangent"]

Tensor = torch.Tensor


def _expect(op: str, name: str, x: Tensor | None, shape: Any, dtype: torch.dtype, device: torch.device) -> None:
    if x is not None and (tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device):
        raise ValueError(
            f"{op}: {name} must be {dtype} of shape {tuple(shape)} on {device}, got {x.dtype} of {shape_of(x)} on "
            f"{x.device}"
        )


def check_forward(  # type: ignore[no-untyped-def]
    q, k, v, bias, table, sinks, mask, q_index, k_index, seed, scale, softcap, dropout_p, left, right, shift
):  # fmt: skip
    """What a direct call of a raw op must keep to; see ``genfast._op.Op``."""
    op = "genfast::attention"
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float_tensor(op, name, x)
    _expect(op, "k", k, k.shape, q.dtype, q.device)
    _expect(op, "v", v, v.shape, q.dtype, q.device)
    checked_qkv(op, q, k, v)
    dtype = wide(q.dtype)
    if bias is not None:
        _expect(op, "bias", bias, broadcastable(op, "bias", bias, q, k).shape, q.dtype, q.device)
    if mask is not None:
        _expect(op, "mask", mask, broadcastable(op, "mask", mask, q, k).shape, torch.bool, q.device)
    _expect(op, "sinks", sinks, (q.shape[1],), dtype, q.device)
    if table is not None:
        _check_table(op, table, q, k, q_index, k_index, dtype)
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


def _check_table(op, table, q, k, q_index, k_index, dtype):  # type: ignore[no-untyped-def]
    queries, keys = q.shape[2], k.shape[2]
    if table.dim() != 3:
        raise ValueError(f"{op}: table must have 3 dimensions, got shape {shape_of(table)}")
    length = table.shape[2]
    if (q_index is None) != (k_index is None):
        raise ValueError(f"{op}: q_index and k_index go together, got one of them")
    if q_index is None:
        length = max(queries + keys - 1, 0)
    shape = (1 if table.shape[0] == 1 else q.shape[0], 1 if table.shape[1] == 1 else q.shape[1], length)
    _expect(op, "table", table, shape, dtype, q.device)
    if q_index is not None:
        _expect(op, "q_index", q_index, (queries,), torch.int32, q.device)
        _expect(op, "k_index", k_index, (keys,), torch.int32, q.device)
        if queries and keys and q.is_cpu:  # elsewhere the values are on the device: looking would wait for it
            low, high = q_index.min() - k_index.max(), q_index.max() - k_index.min()
            if int(low) < 0 or int(high) >= length:
                raise ValueError(
                    f"{op}: indices into the table must be in [0, {length}), got {int(low)} to {int(high)}"
                )


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
