"""Gradients of packed sequences one after the other, where a bias needs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["one_by_one"]

Tensor = torch.Tensor


def _part(x: Tensor | None, n: int, queries: int | None = None, keys: int | None = None) -> Tensor | None:
    """Sequence ``n`` of a bias, mask or table, as long as the sequence."""
    if x is None:
        return None
    x = x if x.shape[0] == 1 else x[n : n + 1]
    if queries is None:
        return x
    return x[:, :, : queries if x.shape[2] > 1 else 1, : keys if x.shape[3] > 1 else 1]


def _add(total: Tensor | None, own: Tensor | None, n: int) -> None:
    """Adds the gradient of ``_part`` to that of the whole."""
    if total is None or own is None:
        return
    to = total if total.shape[0] == 1 else total[n : n + 1]
    for dimension in range(2, own.dim()):
        to = to.narrow(dimension, 0, own.shape[dimension])
    to += own


def one_by_one(
    gradient: Callable[..., tuple[Tensor | None, ...]],
    cotangents: tuple[Tensor | None, ...],
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
    options: list[Any],
    need_table: bool,
) -> tuple[Tensor | None, ...]:
    """The six gradients of packed sequences from ``gradient``, the backward or second order of dense ones.

    ``inputs`` are (q, k, v, bias, table, sinks), once or with their tangents.
    """
    mask, q_index, k_index, q_starts, k_starts, *numbers = options
    *numbers, shift, bottom_right, batch_offset = numbers
    totals: list[Tensor | None] = [None if x is None else torch.zeros(x.shape, dtype=torch.float32) for x in inputs[:6]]
    if not need_table:
        totals[4] = None
    q_ends, k_ends = q_starts.tolist(), k_starts.tolist()
    for n in range(len(q_ends) - 1):
        rows, columns = slice(q_ends[n], q_ends[n + 1]), slice(k_ends[n], k_ends[n + 1])
        queries, keys = rows.stop - rows.start, columns.stop - columns.start
        if not queries or not keys:
            continue
        side = (rows, columns, columns)

        def own(tensors: tuple[Tensor | None, ...], n: int = n, side: Any = side) -> list[Tensor | None]:
            parts = [None if x is None else x[:, :, s] for x, s in zip(tensors[:3], side, strict=True)]
            length = side[0].stop - side[0].start, side[1].stop - side[1].start
            return [*parts, _part(tensors[3], n, *length), _part(tensors[4], n), tensors[5]]

        found = gradient(
            *(None if x is None else x[:, :, rows] for x in cotangents),
            *(x for first in range(0, len(inputs), 6) for x in own(inputs[first : first + 6])),
            *(None if x is None else x[:, :, rows] for x in outputs),
            _part(mask, n, queries, keys), None if q_index is None else q_index[rows],
            None if k_index is None else k_index[columns], None, None, *numbers,
            shift + (keys - queries if bottom_right else 0), False, batch_offset + n, True, need_table,
        )  # fmt: skip
        for i, s in enumerate(side):
            total, own_gradient = totals[i], found[i]
            if total is not None and own_gradient is not None:
                total[:, :, s] = own_gradient
        for i in (3, 4):
            _add(totals[i], found[i], n)
        if totals[5] is not None and found[5] is not None:
            totals[5] += found[5]
    pairs = zip(totals, inputs[:6], strict=True)
    return tuple(None if total is None or x is None else total.to(x.dtype) for total, x in pairs)
