"""Checks of attention's arguments, and the options as the raw ops take them."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast import random
from genfast._checks import check_count, check_float_tensor, shape_of
from genfast.ops._attention_relative import T5Bias, WindowBias2d, relative_table
from genfast.ops._attention_tensors import Extent, autocast, autocasting, broadcastable, checked_qkv, parameter

__all__ = [
    "UNBOUNDED",
    "arguments",
    "checked_band",
    "checked_bias",
    "checked_mask",
    "checked_scale",
    "checked_sinks",
    "checked_softcap",
    "direction",
]

Tensor = torch.Tensor

UNBOUNDED = 2**30  # a window that wide hides nothing


# ---- options ----


def _number(op: str, name: str, value: Any) -> Any:
    if type(value) is float or isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value
    if isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    return float(value)


def checked_scale(op: str, scale: Any, width: Any) -> Any:
    if scale is None:
        return 1.0 / math.sqrt(width)
    scale = _number(op, "scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    return scale


def checked_softcap(op: str, softcap: Any) -> float:
    softcap = _number(op, "softcap", softcap)
    if not 0.0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap must be positive and finite, or None for no cap, got {softcap}")
    return softcap


def _dropout(op: str, dropout_p: Any) -> float:
    dropout_p = _number(op, "dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    return dropout_p


def _top_left(op: str, causal: Any) -> bool:
    if isinstance(causal, bool) or causal == "bottom_right":
        return False
    if causal == "top_left":
        return True
    kind = f"{causal!r}" if isinstance(causal, str) else type(causal).__name__
    error = ValueError if isinstance(causal, str) else TypeError
    raise error(f'{op}: causal must be True, False, "bottom_right" or "top_left", got {kind}')


def _side(op: str, name: str, side: Any) -> Any:
    if side is None:
        return -1
    if type(side) is not int:
        side = check_count(op, name, side, -1)
    if side < -1:
        raise ValueError(f"{op}: {name} must be at least 0, or None (or -1) for no bound, got {side}")
    return side if side < UNBOUNDED else -1


def checked_band(op: str, causal: Any, window: Any) -> tuple[Any, Any]:
    """(left, right): how many keys before and after its own position a query sees, -1 for all."""
    left = right = -1
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"{op}: window must be a pair (left, right), got {window!r}")
        left = _side(op, "window's left side", window[0])
        right = _side(op, "window's right side", window[1])
    return left, 0 if causal else right


def checked_mask(op: str, mask: Any, q: Tensor, extent: Extent) -> Tensor:
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{op}: mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        hint = "pass what is added to the scores as bias" if mask.is_floating_point() else "convert it with .bool()"
        raise TypeError(f"{op}: mask must be bool (True keeps), got {mask.dtype}; {hint}")
    return broadcastable(op, "mask", mask, q, extent)


def checked_bias(op: str, name: str, bias: Any, q: Tensor, extent: Extent) -> Tensor:
    check_float_tensor(op, name, bias)
    if bias.dtype != q.dtype:
        if not autocasting(q.device):
            raise TypeError(f"{op}: {name} is {bias.dtype}, q {q.dtype}; they must be equal outside autocast")
        bias = bias.to(q.dtype)
    return broadcastable(op, name, bias, q, extent)


def checked_sinks(op: str, name: str, sinks: Any, q: Tensor) -> Tensor:
    sinks = parameter(op, name, sinks, q)
    if sinks.dim() != 1 or sinks.shape[0] != q.shape[1]:
        raise ValueError(f"{op}: {name} must have shape ({q.shape[1]},), one for each head of q, got {shape_of(sinks)}")
    return sinks


def arguments(  # type: ignore[no-untyped-def]
    op, q, k, v, bias, mask, causal, window, alibi_slopes, relative_bias, softcap, sinks, dropout_p, scale, seed,
    batch_offset=0, packed=None,
):  # fmt: skip
    """The arguments of the raw op ``attention``, checked."""
    q, k, v = checked_qkv(op, q, k, v)
    scale = checked_scale(op, scale, q.shape[3])
    softcap = 0.0 if softcap is None else checked_softcap(op, softcap)
    relative = alibi_slopes is not None or relative_bias is not None
    extent: Any = None
    if bias is not None or mask is not None or relative:
        extent = Extent.of(q, k, packed)
        if bias is not None:
            bias = checked_bias(op, "bias", bias, q, extent)
        if mask is not None:
            mask = checked_mask(op, mask, q, extent)
    if sinks is not None:
        sinks = checked_sinks(op, "sinks", sinks, q)
    left = right = -1
    shift: Any = 0
    top_left = False if causal is False else _top_left(op, causal)
    if causal is not False or window is not None:
        left, right = checked_band(op, causal, window)
    if not top_left and (relative or left >= 0 or right >= 0):
        shift = k.shape[2] - q.shape[2] if packed is None else 1
    table = q_index = k_index = None
    if relative:
        table, q_index, k_index = relative_table(op, q, k, extent, shift, packed, alibi_slopes, relative_bias)
    if dropout_p != 0.0 or seed is not None:
        dropout_p = _dropout(op, dropout_p)
        seed = random.as_seed(seed, q.device)
    if batch_offset != 0:
        batch_offset = check_count(op, "batch_offset", batch_offset, 0, UNBOUNDED)
    starts = (None, None) if packed is None else packed[:2]
    bottom_right = packed is not None and shift != 0
    return (
        q, k, v, bias, table, sinks, mask, q_index, k_index, *starts, seed if dropout_p else None, scale, softcap,
        float(dropout_p), left, right, 0 if bottom_right else shift, bottom_right, batch_offset,
    )  # fmt: skip


def direction(op, args, dq, dk, dv, dbias, bias, dalibi_slopes, alibi_slopes, drelative_bias, relative_bias, dsinks):  # type: ignore[no-untyped-def]
    """The tangents (q_t, k_t, v_t, bias_t, table_t, sinks_t) of checked ``args``; None is a zero tangent."""
    q, k, v, _, _, sinks = args[:6]
    given = {"dbias": (dbias, bias), "dalibi_slopes": (dalibi_slopes, alibi_slopes), "dsinks": (dsinks, sinks)}
    for name, (change, primal) in given.items():
        if change is not None and primal is None:
            raise ValueError(f"{op}: {name} needs {name[1:]}, which is None")
    changes = []
    for name, change, primal in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        if change is None:
            change = torch.zeros_like(primal)
        else:
            check_float_tensor(op, name, change)
            _same_as(op, name, change, name[1:], primal)
            if change.dtype != primal.dtype and autocasting(q.device):
                change = autocast(change, q.device.type)
            if change.dtype != primal.dtype:
                raise TypeError(f"{op}: {name} is {change.dtype}, {name[1:]} {primal.dtype}; they must be equal")
        changes.append(change)
    bias_t = table_t = sinks_t = None
    if dbias is not None:
        bias_t = checked_bias(op, "dbias", dbias, q, Extent.of(q, k))
        _same_as(op, "dbias", dbias, "bias", bias)
    if dsinks is not None:
        sinks_t = checked_sinks(op, "dsinks", dsinks, q)
    if dalibi_slopes is not None or drelative_bias is not None:
        table_t = _table_direction(op, args, dalibi_slopes, alibi_slopes, drelative_bias, relative_bias)
    return *changes, bias_t, table_t, sinks_t


def _table_direction(op, args, dalibi_slopes, alibi_slopes, drelative_bias, relative_bias):  # type: ignore[no-untyped-def]
    q, k = args[:2]
    if drelative_bias is not None:
        if relative_bias is None:
            raise ValueError(f"{op}: drelative_bias needs relative_bias, which is None")
        check_float_tensor(op, "drelative_bias", drelative_bias)
        _same_as(op, "drelative_bias", drelative_bias, "relative_bias.table", relative_bias.table)
        if isinstance(relative_bias, T5Bias):
            drelative_bias = T5Bias(drelative_bias, relative_bias.bidirectional, relative_bias.max_distance)
        else:
            drelative_bias = WindowBias2d(drelative_bias, relative_bias.window)
    if dalibi_slopes is not None:
        check_float_tensor(op, "dalibi_slopes", dalibi_slopes)
        _same_as(op, "dalibi_slopes", dalibi_slopes, "alibi_slopes", alibi_slopes)
    shift = args[-3]
    return relative_table(op, q, k, Extent.of(q, k), shift, None, dalibi_slopes, drelative_bias)[0]


def _same_as(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(f"{op}: {name} has shape {shape_of(x)}, {other_name} {shape_of(other)}; they must be equal")
    if x.device != other.device:
        raise ValueError(f"{op}: {name} is on {x.device}, {other_name} on {other.device}; move them to one device")
