"""Packed sequences in the plain formulas of attention: all pairs of rows, those of one sequence visible."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from genfast import random
from genfast._op import Backend, Op

__all__ = [
    "Packing",
    "entries",
    "flat_table",
    "keep",
    "over_pairs",
    "packing",
    "pairs_gradient",
    "placed",
    "shifts",
    "visible",
]

Tensor = torch.Tensor

_keep_op = Op(
    "philox_attention_keep_at(Tensor seed, Tensor rows, Tensor columns, Tensor matrices, float dropout_p) -> Tensor",
    {"reference": Backend(lambda seed, i, j, m, p: random.attention_keep_at(i, j, m, seed, p))},
    lambda seed, rows, columns, matrices, dropout_p: seed.new_empty(
        torch.broadcast_shapes(rows.shape, columns.shape, matrices.shape), dtype=torch.bool
    ),
    internal=True,
)


class Packing(NamedTuple):
    """Which sequence each row is of, and where in it; rows after the last sequence count as one of their own."""

    q_sequence: Tensor  # [rows of q], int64, as all
    q_position: Tensor
    k_sequence: Tensor
    k_position: Tensor
    q_shift: Tensor  # what bottom_right adds to the position of a query, 0 without
    sequences: Any


def placed(starts: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
    """(sequence, position in it) of each row."""
    starts = starts.to(torch.int64)
    row = torch.arange(rows, device=starts.device)
    sequence = torch.searchsorted(starts[1:].contiguous(), row, right=True)
    return sequence, row - starts.index_select(0, sequence)


def packing(q: Tensor, k: Tensor, q_starts: Tensor | None, k_starts: Tensor | None, bottom_right: bool) -> Any:
    """The ``Packing`` of q [1, Hq, rows, D] and k, or None."""
    if q_starts is None or k_starts is None:
        return None
    q_sequence, q_position = placed(q_starts.to(q.device), q.shape[2])
    k_sequence, k_position = placed(k_starts.to(q.device), k.shape[2])
    sequences = q_starts.shape[0] - 1
    shift = torch.zeros_like(q_position)
    if bottom_right:
        missing = (k_starts.diff() - q_starts.diff()).to(q.device, torch.int64)
        shift = torch.nn.functional.pad(missing, (0, 1)).index_select(0, q_sequence)
    k_sequence = torch.where(k_sequence == sequences, -1, k_sequence)  # seen by no query
    return Packing(q_sequence, q_position, k_sequence, k_position, shift, sequences)


def shifts(p: Any, shift: Any) -> Any:
    """What adds to the positions of queries, [rows of q, 1] or a number."""
    return shift if p is None else (p.q_shift + shift).unsqueeze(1)


def visible(p: Packing) -> Tensor:
    """Pairs of one sequence."""
    return p.q_sequence.unsqueeze(1) == p.k_sequence


def _index(p: Packing, shape: Any) -> Tensor:
    """The flat index [rows of q, rows of k] of each pair into [sequences, queries, keys], sizes of 1 repeating."""
    sequences, _, queries, keys = shape

    def clamped(x: Tensor, size: Any) -> Tensor:
        return torch.zeros_like(x) if size == 1 else x.clamp(0, size - 1)  # pairs of two sequences are hidden

    rows = clamped(p.q_sequence, sequences) * queries + clamped(p.q_position, queries)
    return (rows * keys).unsqueeze(1) + clamped(p.k_position, keys)


def over_pairs(x: Tensor, p: Any) -> Tensor:
    """A bias or mask [sequences, heads, queries, keys], or 1 in place of each, as [1, heads, rows of q, rows of k]."""
    if p is None:
        return x
    index = _index(p, x.shape)
    flat = x.transpose(0, 1).flatten(1)
    if not flat.shape[1]:
        return x.new_zeros((1, x.shape[1], *index.shape))
    return flat.index_select(1, index.flatten()).unflatten(1, index.shape).unsqueeze(0)


def _added(index: Tensor, x: Tensor, size: Any) -> Tensor:
    """x [heads, n] added up at index [n] of [heads, size]; the same bits on every run."""
    total = torch.zeros((x.shape[0], size), dtype=x.dtype, device=x.device)
    if x.is_cuda:  # sorts, where scatter_add would use atomics
        return total.T.index_put((index,), x.T, accumulate=True).T
    return total.scatter_add(1, index.expand(x.shape), x)


def pairs_gradient(x: Tensor, p: Packing, like: Tensor) -> Tensor:
    """The transpose of ``over_pairs``: x [1, heads, rows of q, rows of k] in the shape of ``like``."""
    sequences, heads, queries, keys = like.shape
    x = x.squeeze(0).flatten(1)
    if heads == 1:
        x = x.sum(0, keepdim=True)
    total = _added(_index(p, like.shape).flatten(), x, sequences * queries * keys)
    return total.view(heads, sequences, queries, keys).transpose(0, 1)


def flat_table(table: Tensor, p: Any) -> Tensor:
    """Tables [sequences, heads, L] in a row, [1, heads, sequences * L]."""
    return table if p is None or table.shape[0] == 1 else table.transpose(0, 1).flatten(1).unsqueeze(0)


def entries(p: Packing, table: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
    """Flat indices [rows of q * rows of k] into ``flat_table``."""
    length = table.shape[2]
    index = (q_index.to(torch.int64).unsqueeze(1) - k_index.to(torch.int64)).clamp(0, max(length - 1, 0))
    if table.shape[0] > 1:
        index = index + (p.q_sequence.clamp(max=table.shape[0] - 1) * length).unsqueeze(1)
    return index.flatten()


def keep(p: Packing, heads: Any, seed: Tensor, dropout_p: float, batch_offset: Any) -> Tensor:
    """Which weights dropout keeps, [1, heads, rows of q, rows of k]."""
    head = torch.arange(heads, device=seed.device).view(-1, 1, 1)
    matrices = (batch_offset + p.q_sequence.view(-1, 1)) * heads + head
    return _keep_op(seed, p.q_position.view(-1, 1), p.k_position, matrices, dropout_p).unsqueeze(0)
