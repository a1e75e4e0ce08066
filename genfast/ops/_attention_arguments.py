"""Checks of attention's arguments, and the options as the raw ops take them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from genfast import random
from genfast._checks import check_count, check_float_tensor, shape_of
from genfast.ops._attention_reference import wide

__all__ = [
    "UNBOUNDED",
    "T5Bias",
    "WindowBias2d",
    "arguments",
    "broadcastable",
    "checked_qkv",
    "direction",
]

Tensor = torch.Tensor

UNBOUNDED = 2**30  # a window that wide hides nothing


@dataclass(eq=False)
class T5Bias:
    """A learned bias of each head for each bucket of relative positions, as in T5.

    Distances below half of the buckets (of each direction) have one each; the others share the rest, evenly in the
    logarithm, up to ``max_distance``.

    Args:
        table: [buckets, Hq], in q's dtype or float32; differentiable.
        bidirectional: half of the buckets are for keys after the query; False puts these in bucket 0.
        max_distance: from here on all distances share the last bucket; more than half of the buckets of a direction.

    Source: Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer",
    JMLR 2020, section 2.1.

    Examples:
        >>> import genfast
        >>> q = torch.zeros(1, 2, 3, 4)
        >>> table = torch.arange(8.0).view(4, 2)
        >>> values = torch.eye(3).expand(1, 2, 3, 3)
        >>> out = genfast.ops.attention(q, q, values, relative_bias=T5Bias(table))
        >>> bias = torch.tensor([[0.0, 6, 6], [2, 0, 6], [2, 2, 0]])  # of head 0
        >>> torch.allclose(out[0, 0], bias.softmax(-1))
        True
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128


@dataclass(eq=False)
class WindowBias2d:
    """A learned bias of each head for each offset inside a 2-D window, as in Swin transformers.

    Queries and keys are the window's Wy * Wx positions, row by row. The entry of a query at (yq, xq) and a key at
    (yk, xk) is (yq - yk + Wy - 1) * (2 Wx - 1) + (xq - xk + Wx - 1).

    Args:
        table: [(2 Wy - 1) * (2 Wx - 1), Hq], in q's dtype or float32; differentiable.
        window: (Wy, Wx).

    Source: Liu et al., "Swin transformer: hierarchical vision transformer using shifted windows", ICCV 2021.

    Examples:
        >>> import genfast
        >>> q = torch.zeros(1, 1, 4, 8)
        >>> table = torch.arange(9.0).view(9, 1)
        >>> out = genfast.ops.attention(q, q, torch.eye(4).view(1, 1, 4, 4), relative_bias=WindowBias2d(table, (2, 2)))
        >>> torch.allclose(out[0, 0, 0], torch.tensor([4.0, 3, 1, 0]).softmax(-1))
        True
    """

    table: Tensor
    window: tuple[int, int]


# The table is the only leaf, so that torch.func transforms take a bias as they take a tensor.
pytree.register_pytree_node(
    T5Bias,
    lambda b: ([b.table], (b.bidirectional, b.max_distance)),
    lambda leaves, rest: T5Bias(*leaves, *rest),
    serialized_type_name="genfast.ops.T5Bias",
)
pytree.register_pytree_node(
    WindowBias2d,
    lambda b: ([b.table], tuple(b.window)),
    lambda leaves, window: WindowBias2d(next(iter(leaves)), window),  # type: ignore[arg-type]
    serialized_type_name="genfast.ops.WindowBias2d",
)


# ---- q, k and v ----


def checked_qkv(op: str, q: Any, k: Any, v: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_float_tensor(op, "q", q)
    check_float_tensor(op, "k", k)
    check_float_tensor(op, "v", v)
    device = q.device
    if k.device != device or v.device != device:
        raise ValueError(f"{op}: q is on {device}, k on {k.device}, v on {v.device}; move them to one device")
    if _autocasting(device):
        q, k, v = (_autocast(x, device.type) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"{op}: q is {q.dtype}, k {k.dtype}, v {v.dtype}; they must be equal outside autocast")
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(
            f"{op}: q, k and v must be [batch, heads, positions, head dim], got shapes "
            f"{shape_of(q)}, {shape_of(k)} and {shape_of(v)}"
        )
    batch, heads, _, width = q.shape
    k_batch, k_heads, keys, k_width = k.shape
    v_batch, v_heads, v_keys, v_width = v.shape
    if batch != k_batch or batch != v_batch:
        raise ValueError(f"{op}: the batch sizes of q, k and v must be equal, got {batch}, {k_batch} and {v_batch}")
    if k_heads != v_heads or keys != v_keys:
        raise ValueError(
            f"{op}: k and v must have the same heads and positions, got shapes {shape_of(k)} and {shape_of(v)}"
        )
    if width != k_width:
        raise ValueError(f"{op}: q and k must have the same head dim, got {width} and {k_width}")
    if width == 0 or v_width == 0:
        raise ValueError(f"{op}: head dims must be at least 1, got {width} of q and k and {v_width} of v")
    if heads != k_heads and (k_heads == 0 or heads % k_heads):
        raise ValueError(f"{op}: q's heads must be a multiple of k's and v's, got {heads} and {k_heads}")
    return q, k, v


def _autocasting(device: torch.device) -> bool:
    return torch._C._is_any_autocast_enabled() and device.type != "meta" and torch.is_autocast_enabled(device.type)


def _autocast(x: Tensor, device_type: str) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device_type))


# ---- options ----


def _number(op: str, name: str, value: Any) -> Any:
    if type(value) is float or isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value
    if isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    return float(value)


def _scale(op: str, scale: Any, width: Any) -> Any:
    if scale is None:
        return 1.0 / math.sqrt(width)
    scale = _number(op, "scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    return scale


def _softcap(op: str, softcap: Any) -> float:
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


def _band(op: str, causal: Any, window: Any) -> tuple[Any, Any]:
    """(left, right): how many keys before and after its own position a query sees, -1 for all."""
    left = right = -1
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"{op}: window must be a pair (left, right), got {window!r}")
        left = _side(op, "window's left side", window[0])
        right = _side(op, "window's right side", window[1])
    return left, 0 if causal else right


def broadcastable(op: str, name: str, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """``x`` as a 4-d view whose dimensions are full or 1."""
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if x.dim() > 4:
        raise ValueError(f"{op}: {name} of shape {shape_of(x)} does not broadcast to {tuple(full)}")
    if x.device != q.device:
        raise ValueError(f"{op}: {name} is on {x.device}, q on {q.device}; move them to one device")
    view = x if x.dim() == 4 else x[(None,) * (4 - x.dim())]
    for size, whole in zip(view.shape, full, strict=True):
        if size != whole and size != 1:
            raise ValueError(f"{op}: {name} of shape {shape_of(x)} does not broadcast to {tuple(full)}")
    return view


def _mask(op: str, mask: Any, q: Tensor, k: Tensor) -> Tensor:
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{op}: mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        hint = "pass what is added to the scores as bias" if mask.is_floating_point() else "convert it with .bool()"
        raise TypeError(f"{op}: mask must be bool (True keeps), got {mask.dtype}; {hint}")
    return broadcastable(op, "mask", mask, q, k)


def _parameter(op: str, name: str, x: Any, q: Tensor) -> Tensor:
    """A small learned tensor, in the dtype of the arithmetic."""
    check_float_tensor(op, name, x)
    dtype = wide(q.dtype)
    if x.device != q.device:
        raise ValueError(f"{op}: {name} is on {x.device}, q on {q.device}; move them to one device")
    if x.dtype != dtype:
        if x.dtype != q.dtype and not _autocasting(q.device):
            allowed = f"{dtype}" if dtype == q.dtype else f"{dtype} or {q.dtype}"
            raise TypeError(f"{op}: {name} must be {allowed} as q is {q.dtype}, got {x.dtype}")
        x = x.to(dtype)
    return x


def _bias(op: str, name: str, bias: Any, q: Tensor, k: Tensor) -> Tensor:
    check_float_tensor(op, name, bias)
    if bias.dtype != q.dtype:
        if not _autocasting(q.device):
            raise TypeError(f"{op}: {name} is {bias.dtype}, q {q.dtype}; they must be equal outside autocast")
        bias = bias.to(q.dtype)
    return broadcastable(op, name, bias, q, k)


def _sinks(op: str, name: str, sinks: Any, q: Tensor) -> Tensor:
    sinks = _parameter(op, name, sinks, q)
    if sinks.dim() != 1 or sinks.shape[0] != q.shape[1]:
        raise ValueError(f"{op}: {name} must have shape ({q.shape[1]},), one for each head of q, got {shape_of(sinks)}")
    return sinks


# ---- biases by relative position ----


def _offsets(q: Tensor, k: Tensor, shift: Any) -> Tensor:
    """Key position minus query position, for each entry of a table of all distances."""
    length = q.shape[2] + k.shape[2] - 1
    if q.shape[2] == 0 or k.shape[2] == 0:
        length = max(length, 0)
    return (k.shape[2] - 1 - shift) - torch.arange(length, device=q.device)


def _alibi_table(op: str, name: str, slopes: Any, q: Tensor, offsets: Tensor) -> Tensor:
    slopes = _parameter(op, name, slopes, q)
    batch, heads = q.shape[:2]
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"{op}: {name} must have shape ({heads},) or ({batch}, {heads}), heads or batch and heads of q, "
            f"got {shape_of(slopes)}"
        )
    slopes = slopes if slopes.dim() == 2 else slopes.unsqueeze(0)
    return slopes.unsqueeze(2) * offsets.abs().neg().to(slopes.dtype)


def _t5_buckets(offsets: Tensor, buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    """The bucket of each offset (key position minus query position)."""
    first = torch.zeros_like(offsets)
    if bidirectional:
        buckets //= 2
        first = torch.where(offsets > 0, buckets, 0)
        distance = offsets.abs()
    else:
        distance = (-offsets).clamp(min=0)
    exact = buckets // 2
    # float32 and this order of operations: a distance on the edge of two buckets must fall as in published models
    growth = torch.log(distance.clamp(min=max(exact, 1)).to(torch.float32) / max(exact, 1))
    growth = growth / math.log(max_distance / max(exact, 1)) * (buckets - exact)
    far = (exact + growth.to(torch.int64)).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, far)


def _t5_table(op: str, bias: T5Bias, table: Tensor, offsets: Tensor) -> Tensor:
    buckets = table.shape[0]
    smallest = 4 if bias.bidirectional else 2
    if buckets < smallest or (bias.bidirectional and buckets % 2):
        raise ValueError(
            f"{op}: T5Bias needs at least {smallest} buckets"
            f"{', an even number for both directions' if bias.bidirectional else ''}, got {buckets}"
        )
    exact = buckets // 2 // (2 if bias.bidirectional else 1)
    max_distance = check_count(op, "T5Bias.max_distance", bias.max_distance, exact + 1)
    index = _t5_buckets(offsets, buckets, bool(bias.bidirectional), max_distance)
    return table.index_select(0, index).T.unsqueeze(0)


def _head_table(op: str, table: Any, q: Tensor, kind: str) -> Tensor:
    table = _parameter(op, f"{kind}.table", table, q)
    if table.dim() != 2 or table.shape[1] != q.shape[1]:
        raise ValueError(f"{op}: {kind}.table must have shape [entries, {q.shape[1]} heads], got {shape_of(table)}")
    return table


def _window_indices(op: str, bias: WindowBias2d, entries: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    window = bias.window
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{op}: WindowBias2d.window must be a pair (Wy, Wx), got {window!r}")
    high, across = (check_count(op, "WindowBias2d.window", side, 1) for side in window)
    if q.shape[2] != high * across or k.shape[2] != high * across:
        raise ValueError(
            f"{op}: a {high} x {across} window has {high * across} positions, got {q.shape[2]} queries and "
            f"{k.shape[2]} keys"
        )
    if entries != (2 * high - 1) * (2 * across - 1):
        raise ValueError(
            f"{op}: WindowBias2d.table of a {high} x {across} window must have {(2 * high - 1) * (2 * across - 1)} "
            f"entries, got {entries}"
        )
    y = torch.arange(high, dtype=torch.int32, device=q.device).unsqueeze(1) * (2 * across - 1)
    k_index = (y + torch.arange(across, dtype=torch.int32, device=q.device)).flatten()
    return k_index + ((high - 1) * (2 * across - 1) + across - 1), k_index


def _relative(op, q, k, shift, alibi_slopes, relative_bias):  # type: ignore[no-untyped-def]
    """(table, q_index, k_index) of both relative biases together."""
    if relative_bias is not None and not isinstance(relative_bias, (T5Bias, WindowBias2d)):
        raise TypeError(f"{op}: relative_bias must be a T5Bias or a WindowBias2d, got {type(relative_bias).__name__}")
    table: Tensor | None = None
    if isinstance(relative_bias, WindowBias2d):
        if alibi_slopes is not None:
            raise ValueError(f"{op}: alibi_slopes with a WindowBias2d is not supported; add one of them as bias")
        table = _head_table(op, relative_bias.table, q, "WindowBias2d")
        q_index, k_index = _window_indices(op, relative_bias, table.shape[0], q, k)
        return table.T.unsqueeze(0), q_index, k_index
    offsets = _offsets(q, k, shift)
    if alibi_slopes is not None:
        table = _alibi_table(op, "alibi_slopes", alibi_slopes, q, offsets)
    if relative_bias is not None:
        buckets = _t5_table(op, relative_bias, _head_table(op, relative_bias.table, q, "T5Bias"), offsets)
        table = buckets if table is None else table + buckets
    return table, None, None


def arguments(  # type: ignore[no-untyped-def]
    op, q, k, v, bias, mask, causal, window, alibi_slopes, relative_bias, softcap, sinks, dropout_p, scale, seed
):  # fmt: skip
    """The arguments of the raw op ``attention``, checked."""
    q, k, v = checked_qkv(op, q, k, v)
    scale = _scale(op, scale, q.shape[3])
    softcap = 0.0 if softcap is None else _softcap(op, softcap)
    if bias is not None:
        bias = _bias(op, "bias", bias, q, k)
    if mask is not None:
        mask = _mask(op, mask, q, k)
    if sinks is not None:
        sinks = _sinks(op, "sinks", sinks, q)
    left = right = -1
    shift: Any = 0
    top_left = False if causal is False else _top_left(op, causal)
    if causal is not False or window is not None:
        left, right = _band(op, causal, window)
    relative = alibi_slopes is not None or relative_bias is not None
    if not top_left and (relative or left >= 0 or right >= 0):
        shift = k.shape[2] - q.shape[2]
    table = q_index = k_index = None
    if relative:
        table, q_index, k_index = _relative(op, q, k, shift, alibi_slopes, relative_bias)
    if dropout_p != 0.0 or seed is not None:
        dropout_p = _dropout(op, dropout_p)
        seed = random.as_seed(seed, q.device)
    return (
        q, k, v, bias, table, sinks, mask, q_index, k_index, seed if dropout_p else None, scale, softcap,
        float(dropout_p), left, right, shift,
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
            if change.dtype != primal.dtype and _autocasting(q.device):
                change = _autocast(change, q.device.type)
            if change.dtype != primal.dtype:
                raise TypeError(f"{op}: {name} is {change.dtype}, {name[1:]} {primal.dtype}; they must be equal")
        changes.append(change)
    bias_t = table_t = sinks_t = None
    if dbias is not None:
        bias_t = _bias(op, "dbias", dbias, q, k)
        _same_as(op, "dbias", dbias, "bias", bias)
    if dsinks is not None:
        sinks_t = _sinks(op, "dsinks", dsinks, q)
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
    shift = args[-1]
    return _relative(op, q, k, shift, dalibi_slopes, drelative_bias)[0]


def _same_as(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(f"{op}: {name} has shape {shape_of(x)}, {other_name} {shape_of(other)}; they must be equal")
    if x.device != other.device:
        raise ValueError(f"{op}: {name} is on {x.device}, {other_name} on {other.device}; move them to one device")
