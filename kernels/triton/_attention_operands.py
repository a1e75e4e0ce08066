"""What the attention kernels are given, and the part of it that a program works on: a block of queries or keys of a
head, of a dense call or of one packed sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from genfast.kernels.triton import noise


class Matrix(NamedTuple):
    """A tensor [B, H, S, D] of unit last stride; of packed sequences [1, H, rows, D]."""

    pointer: torch.Tensor
    batch: int
    head: int
    row: int


class Pairs(NamedTuple):
    """A tensor [B, Hq, Sq, Skv]; the stride of a dimension that broadcasts is None. Packed sequences may be longer
    than ``rows`` and ``columns``, where the caller's bound was wrong, and then read the last ones."""

    pointer: torch.Tensor
    batch: int | None
    head: int | None
    row: int | None
    column: int | None
    rows: int | None = None
    columns: int | None = None


class Table(NamedTuple):
    """A table [B, Hq, L] of unit last stride; the stride of a dimension that broadcasts is None. ``entries``, L, keeps
    the indices of packed sequences inside."""

    pointer: torch.Tensor
    batch: int | None
    head: int | None
    entries: int | None = None


class Starts(NamedTuple):
    """Where each of packed sequences begins, and the last one ends: [sequences + 1], int64."""

    q: torch.Tensor
    k: torch.Tensor
    sequences: int
    bottom_right: int | None  # 1 where a sequence's last query sees its last key at a shift of 0


class Place(NamedTuple):
    """A sequence among the packed ones: its first query and key, and how many there are of all."""

    q: int
    k: int
    q_rows: int
    k_rows: int


class Scores(NamedTuple):
    """What makes scores of products, None where an option is not used. Key j is visible to query i where
    lower <= j - i <= upper. The launcher describes packed sequences as one, with ``starts``; ``query_block``,
    ``key_block`` and ``sequence`` make the scores of one of them, whose rows lie in its ``place``."""

    q_len: int
    k_len: int
    heads: int
    scale: float
    softcap: float | None
    lower: int | None
    upper: int | None
    mask: Pairs | None
    bias: Pairs | None
    table: Table | None
    q_index: torch.Tensor | None
    k_index: torch.Tensor | None
    seed: torch.Tensor | None  # [] int64, on the device
    first_matrix: int | None  # batch * heads + head of the call's first, in the batch that dropout counts
    threshold: int | None
    factor: float | None
    starts: Starts | None = None
    place: Place | None = None


class Direction(NamedTuple):
    """Tangents of q, k, v, bias, table and sinks."""

    q: Matrix
    k: Matrix
    v: Matrix
    bias: Pairs | None
    table: Table | None
    sinks: torch.Tensor | None


class Rows(NamedTuple):
    """Statistics of rows [B, Hq, Sq], float32: L, delta - l, and for the second order mu and r."""

    lse: torch.Tensor
    shift: torch.Tensor
    mean: torch.Tensor | None
    r: torch.Tensor | None


@triton.jit
def span(starts, n, sequences, rows):
    """(first row, rows) of sequence n; after the last one comes what is left of ``rows``. Stays inside them."""
    first = tl.load(starts + n).to(tl.int32)
    end = tl.load(starts + tl.minimum(n + 1, sequences)).to(tl.int32)
    end = tl.where(n == sequences, rows, end)
    first = tl.minimum(tl.maximum(first, 0), rows)
    return first, tl.minimum(tl.maximum(end, first), rows) - first


@triton.jit
def located(starts, sequences, slot, R: tl.constexpr):
    """(sequence, block in it) of a slot. Sequence n has the slots from starts[n] // R + n, at least as many as blocks
    of R rows, so a search finds it and no sums over lengths are needed; the rows // R + sequences + 1 slots end with
    the rows after the last sequence."""
    low = slot * 0
    high = low + sequences
    while low < high:
        middle = (low + high + 1) // 2
        before = (tl.load(starts + middle) // R).to(tl.int32) + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    block = slot - low - (tl.load(starts + low) // R).to(tl.int32)
    return low, tl.minimum(tl.maximum(block, 0), slot)


@triton.jit
def placed(s, q_first, q_len, k_first, k_len):
    """The scores of one packed sequence."""
    lower = s.lower
    upper = s.upper
    q_index = s.q_index
    k_index = s.k_index
    if s.starts.bottom_right is not None:
        if lower is not None:
            lower += k_len - q_len
        if upper is not None:
            upper += k_len - q_len
    if q_index is not None:
        q_index += q_first
        k_index += k_first
    return Scores(
        q_len,
        k_len,
        s.heads,
        s.scale,
        s.softcap,
        lower,
        upper,
        s.mask,
        s.bias,
        s.table,
        q_index,
        k_index,
        s.seed,
        s.first_matrix,
        s.threshold,
        s.factor,
        None,
        Place(q_first, k_first, s.q_len, s.k_len),
    )


@triton.jit
def sequence(s, n):
    """The scores of packed sequence n."""
    q_first, q_len = span(s.starts.q, n, s.starts.sequences, s.q_len)
    k_first, k_len = span(s.starts.k, n, s.starts.sequences, s.k_len)
    return placed(s, q_first, q_len, k_first, k_len)


@triton.jit
def query_block(s, R: tl.constexpr):
    """(s, b, h, first): this program's R queries, the last ones of all first. Of packed sequences b is the number and s
    what belongs to it; keys are none where there are no queries, or no sequence."""
    program = tl.program_id(0)
    if s.starts is None:
        blocks = tl.cdiv(s.q_len, R)
        first = (blocks - 1 - program % blocks) * R
        b = program // blocks // s.heads
        h = program // blocks % s.heads
    else:
        slots = s.q_len // R + s.starts.sequences + 1
        b, block = located(s.starts.q, s.starts.sequences, slots - 1 - program % slots, R)
        h = program // slots
        first = block * R
        q_first, q_len = span(s.starts.q, b, s.starts.sequences, s.q_len)
        k_first, k_len = span(s.starts.k, b, s.starts.sequences, s.k_len)
        k_len = tl.where((first < q_len) & (b < s.starts.sequences), k_len, 0)
        s = placed(s, q_first, q_len, k_first, k_len)
    return s, b, h, first


@triton.jit
def key_block(s, kv_heads, R: tl.constexpr):
    """(s, b, key head, first): likewise R keys, in their order; there queries are none."""
    program = tl.program_id(0)
    if s.starts is None:
        blocks = tl.cdiv(s.k_len, R)
        first = program % blocks * R
        b = program // blocks // kv_heads
        h = program // blocks % kv_heads
    else:
        slots = s.k_len // R + s.starts.sequences + 1
        b, block = located(s.starts.k, s.starts.sequences, program % slots, R)
        h = program // slots
        first = block * R
        q_first, q_len = span(s.starts.q, b, s.starts.sequences, s.q_len)
        k_first, k_len = span(s.starts.k, b, s.starts.sequences, s.k_len)
        q_len = tl.where((first < k_len) & (b < s.starts.sequences), q_len, 0)
        s = placed(s, q_first, q_len, k_first, k_len)
    return s, b, h, first


@triton.jit
def query_rows(m, s, b, h, first):
    """Queries ``first`` onwards of a head: (pointer, row stride, how many there are)."""
    start = noise.as_int64(b) * m.batch if s.place is None else noise.as_int64(s.place.q) * m.row
    start = start + noise.as_int64(h) * m.head + noise.as_int64(first) * m.row
    return m.pointer + start, m.row, s.q_len - first


@triton.jit
def key_rows(m, s, b, h, first):
    start = noise.as_int64(b) * m.batch if s.place is None else noise.as_int64(s.place.k) * m.row
    start = start + noise.as_int64(h) * m.head + noise.as_int64(first) * m.row
    return m.pointer + start, m.row, s.k_len - first
