"""What the attention kernels share: tiles of q, k and v, their products, scores, visibility and dropout.

    A log2(e) = softcap tanh(Z / softcap) + bias + table (times log2 e), -inf where invisible; Z = scale q k

Tiles are [rows, columns] = [queries, keys], or [columns, rows] where a kernel owns keys: ``rows`` and ``cols`` are
index tensors of shapes [R, 1] and [1, C], or [1, R] and [C, 1], and everything else broadcasts. A dimension of a bias
or a mask that broadcasts has no stride (None), so its load is a row, a column or a number. Offsets within a tile are
32-bit, those of tiles 64-bit.

Operands of products keep the inputs' dtype and sums are float32. float32 operands multiply in float32 ("ieee", no tf32)
outside the tensor cores, whose substitute unrolls the whole inner dimension: there D is walked in steps of STEP, from
memory; with STEP = 0 tiles of whole rows are held.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genfast.kernels.triton import noise
from genfast.kernels.triton._attention_operands import (  # noqa: F401 - kernels and launchers find all of them here
    Direction,
    Matrix,
    Pairs,
    Place,
    Rows,
    Scores,
    Starts,
    Table,
    key_block,
    key_rows,
    query_block,
    query_rows,
    sequence,
)
from genfast.kernels.triton.attention_config import Tile as Tile  # so that a kernel's hash covers its tiles

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
TANH = tl.constexpr((-0.333323419, 0.133081749, -0.0519479029, 0.0151953707))  # (tanh x / x - 1) / x^2, |x| <= 0.625
ATTENTION_DROPOUT = tl.constexpr(4)


@triton.jit
def load_rows(at, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr):
    """R rows [R, BD]; zeros beyond D and, with TAIL, beyond the last row."""
    row = tl.arange(0, R)[:, None]
    d = tl.arange(0, BD)[None, :]
    pointers = at[0] + (row * at[1] + d)
    if TAIL and D < BD:
        x = tl.load(pointers, mask=(row < at[2]) & (d < D), other=0.0)
    elif TAIL:
        x = tl.load(pointers, mask=row < at[2], other=0.0)
    elif D < BD:
        x = tl.load(pointers, mask=d < D, other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def held_rows(at, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, STEP: tl.constexpr):
    """``load_rows``, or nothing where ``row_products`` and ``add_product`` read memory themselves."""
    return load_rows(at, R, D, BD, TAIL) if STEP == 0 else 0


@triton.jit
def load_part(at, start, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, STEP: tl.constexpr):
    """Columns [start, start + STEP) of R rows."""
    row = tl.arange(0, R)[:, None]
    d = tl.arange(0, STEP)[None, :]
    mask = row < at[2]
    if D < BD:
        mask = mask & (d < D - start)
    return tl.load(at[0] + start + (row * at[1] + d), mask=mask, other=0.0)


@triton.jit
def row_products(
    x, x_at, y, y_at, total, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, STEP: tl.constexpr
):
    """total + X Y^T [R, C] in float32 of the held rows x and y, or with STEP of those at x_at and y_at, read in steps
    of D. ``total`` may be None."""
    if STEP == 0:
        total = product(x, tl.trans(y), total)
    else:
        if total is None:
            total = tl.zeros((R, C), tl.float32)
        for start in range(0, BD, STEP):
            x_part = load_part(x_at, start, R, D, BD, STEP)
            y_part = load_part(y_at, start, C, D, BD, STEP)
            total = product(x_part, tl.trans(y_part), total)
    return total


@triton.jit
def add_product(
    x, y, y_at, total, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TAIL: tl.constexpr, STEP: tl.constexpr
):
    """total + x Y in float32, x in the dtype of Y: R held rows y, or with STEP those at y_at."""
    if STEP != 0:
        y = load_rows(y_at, R, D, BD, TAIL)
    total = product(x.to(y.dtype), y, total)
    if y.dtype == tl.float32 and not INTERPRETED:
        # Keeps LLVM from moving the multiplications past the products that follow, their operands held in registers.
        total = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [total], dtype=tl.float32, is_pure=False, pack=1)
    return total


@triton.jit
def store_rows(at, x, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    row = tl.arange(0, R)[:, None]
    d = tl.arange(0, BD)[None, :]
    tl.store(at[0] + (row * at[1] + d), x.to(at[0].dtype.element_ty), mask=(row < at[2]) & (d < D))


@triton.jit
def statistic(s, b, h, first):
    """Where the row statistic [B, Hq, Sq] of a query is."""
    if s.place is None:
        start = (noise.as_int64(b) * s.heads + h) * s.q_len + first
    else:
        start = noise.as_int64(h) * s.place.q_rows + s.place.q + first
    return start


@triton.jit
def load_statistic(pointer, s, b, h, first, other, R: tl.constexpr):
    """A row statistic [R] of [B, Hq, Sq]; ``other`` beyond the last row."""
    row = tl.arange(0, R)
    start = statistic(s, b, h, first)
    return tl.load(pointer + start + row, mask=row < s.q_len - first, other=other)


@triton.jit
def store_statistic(pointer, s, b, h, first, x, R: tl.constexpr):
    row = tl.arange(0, R)
    start = statistic(s, b, h, first)
    tl.store(pointer + start + row, x, mask=row < s.q_len - first)


@triton.jit
def log2_sums(pointer, s, b, h, first, R: tl.constexpr):
    """L log2(e) [R]; infinite, which makes every weight 0, for rows that see nothing and beyond the last one."""
    lse = load_statistic(pointer, s, b, h, first, INFINITY, R)
    return tl.where(lse == -INFINITY, INFINITY, lse * LOG2E)


@triton.jit
def product(a, b, total):
    """total + a @ b in float32; ``total`` may be None."""
    if INTERPRETED:  # it would multiply float16 operands in float16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def tanh(x):
    """tanh x, relative error 2e-7."""
    size = tl.minimum(tl.abs(x), 16.0)
    large = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    square = x * x
    small = x + x * (square * noise.horner(square, TANH, 4))
    return tl.where(size <= 0.625, small, tl.where(x < 0.0, -large, tl.where(x == x, large, x)))


@triton.jit
def load_pairs(m, b, h, rows, cols, length, TAIL: tl.constexpr):
    """The values of a ``Pairs`` at (rows, cols); TAIL: columns may lie beyond ``length``."""
    pointers = m.pointer
    if m.batch is not None:
        pointers += noise.as_int64(b) * m.batch
    if m.head is not None:
        pointers += noise.as_int64(h) * m.head
    at = cols
    if m.rows is not None:
        rows = tl.minimum(rows, m.rows - 1)
    if m.columns is not None:
        at = tl.minimum(cols, m.columns - 1)
    if m.row is not None:
        pointers = pointers + rows.to(tl.int64) * m.row
    if m.column is not None:
        pointers = pointers + at.to(tl.int64) * m.column
    return tl.load(pointers, mask=cols < length, other=0) if TAIL and m.column is not None else tl.load(pointers)


@triton.jit
def table_index(s, rows, cols, TAIL: tl.constexpr):
    """Where the pairs (rows, cols) find their entry of the table."""
    if s.q_index is None:
        index = rows - cols + (s.k_len - 1)
    elif TAIL:
        index = tl.load(s.q_index + rows) - tl.load(s.k_index + cols, mask=cols < s.k_len, other=0)
    else:
        index = tl.load(s.q_index + rows) - tl.load(s.k_index + cols)
    return index


@triton.jit
def load_table(table, s, b, h, rows, cols, TAIL: tl.constexpr):
    pointers = table.pointer
    if table.batch is not None:
        pointers += noise.as_int64(b) * table.batch
    if table.head is not None:
        pointers += noise.as_int64(h) * table.head
    index = table_index(s, rows, cols, TAIL)
    if table.entries is not None:
        index = tl.minimum(tl.maximum(index, 0), table.entries - 1)
    pointers = pointers + index
    return tl.load(pointers, mask=cols < s.k_len, other=0.0) if TAIL else tl.load(pointers)


@triton.jit
def added(bias, table, s, b, h, rows, cols, TAIL: tl.constexpr):
    """Bias plus table at (rows, cols); one of them is there."""
    rows = tl.minimum(rows, s.q_len - 1)
    if bias is None:
        x = load_table(table, s, b, h, rows, cols, TAIL).to(tl.float32)
    else:
        x = load_pairs(bias, b, h, rows, cols, s.k_len, TAIL).to(tl.float32)
        if table is not None:
            x += load_table(table, s, b, h, rows, cols, TAIL).to(tl.float32)
    return x


@triton.jit
def hidden(a, s, b, h, rows, cols, EDGE: tl.constexpr, TAIL: tl.constexpr):
    """Scores with -inf where invisible. EDGE: the tile may touch the edges of the window; TAIL: the last column."""
    if EDGE:
        if s.upper is not None:
            a = tl.where(rows >= cols - s.upper, a, -INFINITY)
        if s.lower is not None:
            a = tl.where(rows <= cols - s.lower, a, -INFINITY)
    if TAIL:
        a = tl.where(cols < s.k_len, a, -INFINITY)
    if s.mask is not None:
        keep = load_pairs(s.mask, b, h, tl.minimum(rows, s.q_len - 1), cols, s.k_len, TAIL)
        a = tl.where(keep != 0, a, -INFINITY)
    return a


@triton.jit
def scores(z, s, b, h, rows, cols, EDGE: tl.constexpr, TAIL: tl.constexpr):
    """(A log2(e), tanh(Z / softcap)) of the products z; without a softcap the second is meaningless."""
    t = z
    if s.softcap is None:
        a = z * (s.scale * LOG2E)
    else:
        t = tanh(z * (s.scale / s.softcap))
        a = t * (s.softcap * LOG2E)
    if s.bias is not None or s.table is not None:
        a += added(s.bias, s.table, s, b, h, rows, cols, TAIL) * LOG2E
    return hidden(a, s, b, h, rows, cols, EDGE, TAIL), t


@triton.jit
def keep(s, b, h, first_row, first_col, R: tl.constexpr, C: tl.constexpr):
    """Which of the weights [R, C] dropout keeps; first_col and C are multiples of 8."""
    group = (first_col // 8 + tl.arange(0, C // 8)).to(tl.uint32)[None, :]
    row = (first_row + tl.arange(0, R)).to(tl.uint32)[:, None]
    zero = tl.zeros_like(group + row)
    batch_head = (noise.as_int64(b) * s.heads + h + s.first_matrix).to(tl.uint32)
    w0, w1, w2, w3 = noise.philox(
        zero + group, zero + row, zero + batch_head, zero + ATTENTION_DROPOUT, tl.load(s.seed)
    )
    words = noise.interleave4(w0, w1, w2, w3)
    lanes = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (R, C))
    return lanes.to(tl.int32) >= s.threshold


@triton.jit
def key_range(s, first, R: tl.constexpr, C: tl.constexpr):
    """(begin, full, full_end, end): rows [first, first + R) see columns of [begin, end) only, and all of
    [full, full_end); all but ``end`` are multiples of C, and full <= full_end."""
    last = tl.minimum(first + R, s.q_len) - 1
    begin = first * 0
    full = begin
    end = begin + s.k_len
    full_end = end // C * C
    if s.lower is not None:
        begin = tl.maximum(first + s.lower, 0) // C * C
        full = (tl.maximum(last + s.lower, 0) + (C - 1)) // C * C
    if s.upper is not None:
        end = tl.minimum(end, tl.maximum(last + s.upper + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(first + s.upper + 1, 0) // C * C)
    return begin, full, tl.maximum(full_end, full), end


@triton.jit
def query_range(s, first, R: tl.constexpr, C: tl.constexpr):
    """Likewise for the rows that see columns [first, first + C); multiples of R."""
    last = tl.minimum(first + C, s.k_len) - 1
    begin = first * 0
    full = begin
    end = begin + s.q_len
    full_end = end // R * R
    if s.upper is not None:
        begin = tl.maximum(first - s.upper, 0) // R * R
        full = (tl.maximum(last - s.upper, 0) + (R - 1)) // R * R
    if s.lower is not None:
        end = tl.minimum(end, tl.maximum(last - s.lower + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(first - s.lower + 1, 0) // R * R)
    return begin, full, tl.maximum(full_end, full), end


@triton.jit
def part(bounds, PART: tl.constexpr):
    """The steps of one of three loops: the edge before the full tiles, the full tiles, and the edge after them."""
    if PART == 0:
        steps = bounds[0], tl.minimum(bounds[1], bounds[3])
    elif PART == 1:
        steps = bounds[1], bounds[2]
    else:
        steps = bounds[2], bounds[3]
    return steps


@triton.jit
def weights(z, log2_sum, s, b, h, rows, cols, EDGE: tl.constexpr, TAIL: tl.constexpr):
    """(P, tanh(Z / softcap)) of the products z = q k."""
    a, t = scores(z, s, b, h, rows, cols, EDGE, TAIL)
    return tl.exp2(a - log2_sum), t


@triton.jit
def dropped(x, kept, s):
    """M x; ``kept`` is None without dropout."""
    if s.threshold is not None:
        x = tl.where(kept, x * s.factor, 0.0)
    return x


@triton.jit
def through_softcap(x, t, s):
    if s.softcap is not None:
        x = x * (1.0 - t * t)
    return x


@triton.jit
def score_tangent(z_t, t, s, x, b, h, rows, cols, TAIL: tl.constexpr):
    """A' of the scaled z_t = scale (q' k + q k') along the direction x."""
    a_t = through_softcap(z_t, t, s)
    if x.bias is not None or x.table is not None:
        a_t += added(x.bias, x.table, s, b, h, rows, cols, TAIL)
    return a_t


@triton.jit
def second_product_gradient(w, da, z_t, t, s):
    """gZ of W, of dA and of the scaled z_t."""
    if s.softcap is not None:
        w = (1.0 - t * t) * (w - da * z_t * (t * (2.0 / s.softcap)))
    return w


@triton.jit
def store_column_sums(pointer, s, b, h, first, x, C: tl.constexpr):
    """x [C] into [B, Hq, Skv]."""
    column = tl.arange(0, C)
    start = (noise.as_int64(b) * s.heads + h) * s.k_len + first
    tl.store(pointer + start + column, x, mask=column < s.k_len - first)


@triton.jit
def store_pairs(m, s, b, h, rows, cols, x):
    """x into a ``Pairs`` that broadcasts nowhere."""
    pointers = m.pointer + (noise.as_int64(b) * m.batch + noise.as_int64(h) * m.head)
    pointers = pointers + rows.to(tl.int64) * m.row + cols.to(tl.int64) * m.column
    tl.store(pointers, x.to(m.pointer.dtype.element_ty), mask=(rows < s.q_len) & (cols < s.k_len))
