"""Attention's biases by relative position: one table of entries, looked up inside the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from genfast._checks import check_count, shape_of
from genfast.ops._attention_packing import placed
from genfast.ops._attention_tensors import Extent, Packed, known, parameter

__all__ = ["T5Bias", "WindowBias2d", "bucket_of", "distance_table", "relative_table"]

Tensor = torch.Tensor


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


def _alibi_table(op: str, name: str, slopes: Any, q: Tensor, extent: Extent, offsets: Tensor) -> Tensor:
    slopes = parameter(op, name, slopes, q)
    batch, heads = extent.batch, extent.heads
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"{op}: {name} must have shape ({heads},) or ({batch}, {heads}), heads or batch and heads of q, "
            f"got {shape_of(slopes)}"
        )
    slopes = slopes if slopes.dim() == 2 else slopes.unsqueeze(0)
    return slopes.unsqueeze(2) * offsets.abs().neg().to(slopes.dtype)


def bucket_of(offsets: Tensor, buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
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
    index = bucket_of(offsets, buckets, bool(bias.bidirectional), max_distance)
    return table.index_select(0, index).T.unsqueeze(0)


def _head_table(op: str, table: Any, q: Tensor, kind: str) -> Tensor:
    table = parameter(op, f"{kind}.table", table, q)
    if table.dim() != 2 or table.shape[1] != q.shape[1]:
        raise ValueError(f"{op}: {kind}.table must have shape [entries, {q.shape[1]} heads], got {shape_of(table)}")
    return table


def _window_indices(
    op: str, bias: WindowBias2d, entries: Any, q: Tensor, k: Tensor, packed: Packed | None
) -> tuple[Tensor, Tensor]:
    window = bias.window
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{op}: WindowBias2d.window must be a pair (Wy, Wx), got {window!r}")
    high, across = (check_count(op, "WindowBias2d.window", side, 1) for side in window)
    positions = high * across
    if packed is None and (q.shape[2] != positions or k.shape[2] != positions):
        raise ValueError(
            f"{op}: a {high} x {across} window has {positions} positions, got {q.shape[2]} queries and "
            f"{k.shape[2]} keys"
        )
    if entries != (2 * high - 1) * (2 * across - 1):
        raise ValueError(
            f"{op}: WindowBias2d.table of a {high} x {across} window must have {(2 * high - 1) * (2 * across - 1)} "
            f"entries, got {entries}"
        )
    y = torch.arange(high, dtype=torch.int32, device=q.device).unsqueeze(1) * (2 * across - 1)
    k_index = (y + torch.arange(across, dtype=torch.int32, device=q.device)).flatten()
    q_index = k_index + ((high - 1) * (2 * across - 1) + across - 1)
    if packed is None:
        return q_index, k_index
    for name, starts in (("queries", packed.q_starts), ("keys", packed.k_starts)):
        lengths = starts.diff()
        if known(starts) and not bool(((lengths == positions) | (lengths == 0)).all()):
            raise ValueError(f"{op}: a {high} x {across} window has {positions} positions, a sequence has other {name}")
    q_position, k_position = _positions(packed, q, k)
    last = positions - 1
    return q_index.index_select(0, q_position.clamp(max=last)), k_index.index_select(0, k_position.clamp(max=last))


def _positions(packed: Packed, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of q and of k in its sequence."""
    return placed(packed.q_starts, q.shape[2])[1], placed(packed.k_starts, k.shape[2])[1]


def distance_table(op, q, extent, origin, alibi_slopes, relative_bias):  # type: ignore[no-untyped-def]
    """ALiBi and T5 biases of every distance: entry ``origin`` minus (key position minus query position)."""
    length = extent.queries + extent.keys - 1
    if extent.queries == 0 or extent.keys == 0:
        length = max(length, 0)
    offsets = origin - torch.arange(length, device=q.device)
    table: Tensor | None = None
    if alibi_slopes is not None:
        table = _alibi_table(op, "alibi_slopes", alibi_slopes, q, extent, offsets)
    if relative_bias is not None:
        buckets = _t5_table(op, relative_bias, _head_table(op, relative_bias.table, q, "T5Bias"), offsets)
        table = buckets if table is None else table + buckets
    return table


def relative_table(op, q, k, extent, shift, packed, alibi_slopes, relative_bias):  # type: ignore[no-untyped-def]
    """(table, q_index, k_index) of both relative biases together.

    Of packed sequences, ``shift`` says whether their last queries see their last keys.
    """
    if relative_bias is not None and not isinstance(relative_bias, (T5Bias, WindowBias2d)):
        raise TypeError(f"{op}: relative_bias must be a T5Bias or a WindowBias2d, got {type(relative_bias).__name__}")
    if isinstance(relative_bias, WindowBias2d):
        if alibi_slopes is not None:
            raise ValueError(f"{op}: alibi_slopes with a WindowBias2d is not supported; add one of them as bias")
        table = _head_table(op, relative_bias.table, q, "WindowBias2d")
        q_index, k_index = _window_indices(op, relative_bias, table.shape[0], q, k, packed)
        return table.T.unsqueeze(0), q_index, k_index
    if packed is None:
        return distance_table(op, q, extent, extent.keys - 1 - shift, alibi_slopes, relative_bias), None, None
    origin = (extent.queries if shift else extent.keys) - 1
    table = distance_table(op, q, extent, origin, alibi_slopes, relative_bias)
    q_position, k_position = _positions(packed, q, k)
    if shift:
        missing = torch.nn.functional.pad(packed.k_starts.diff() - packed.q_starts.diff(), (0, 1))
        q_position = q_position + missing.index_select(0, placed(packed.q_starts, q.shape[2])[0])
    return table, (q_position + origin).to(torch.int32), k_position.to(torch.int32)
