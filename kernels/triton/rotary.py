"""Rotary position encoding: pairs of elements of a row turn by the angles of the row's position.

    out_a = x_a cos_i - x_b sin_i      out_b = x_b cos_i + x_a sin_i      i = 0 ... HALF - 1

(a, b) = (2 i, 2 i + 1) if INTERLEAVED, else (i, i + HALF); the other elements of a row are copied. INVERSE turns the
other way: the backward is this kernel. A row whose position is outside the tables becomes NaN.

Floor: the bytes, x in and out out; the tables are small, and read once for HEADS heads.

Tiling: a program owns ROWS rows of HEADS heads of one batch entry, and keeps cos and sin of its rows in registers over
the heads. Programs go over rows first, or over heads first (HEADS_INSIDE) where heads are neighbours in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

TILE = 2048  # elements of one head that a program turns at a time
WARPS = 4


@triton.jit
def _store_rest(x_ptr, out_ptr, x_at, out_at, inside, found, first, dim, REST: tl.constexpr):
    column = tl.arange(0, REST)[None, :]
    mask = inside[:, None] & (column < dim - first)
    rest = tl.load(x_ptr + x_at[:, None] + first + column, mask=mask)
    nan = tl.full(rest.shape, float("nan"), tl.float32).to(rest.dtype)
    tl.store(out_ptr + out_at[:, None] + first + column, tl.where(found[:, None], rest, nan), mask=mask)


@triton.jit(do_not_specialize=["offset"])
def rotary_kernel(
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    index_ptr,
    heads,
    rows,
    dim,
    half,
    positions,
    offset,
    x_batch,
    x_head,
    x_row,
    out_batch,
    out_head,
    out_row,
    cos_batch,
    cos_row,
    sin_batch,
    sin_row,
    index_batch,
    index_row,
    row_blocks,
    head_blocks,
    HAS_INDEX: tl.constexpr,
    STARTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS_INSIDE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    program = tl.program_id(0)
    batch = (program // (row_blocks * head_blocks)).to(tl.int64)
    block = program % (row_blocks * head_blocks)
    if HEADS_INSIDE:
        first_row = (block // head_blocks) * ROWS
        first_head = (block % head_blocks) * HEADS
    else:
        first_row = (block % row_blocks) * ROWS
        first_head = (block // row_blocks) * HEADS
    row = first_row + tl.arange(0, ROWS)
    inside = row < rows
    position = row.to(tl.int64) + offset
    if HAS_INDEX:
        if STARTS:
            position += tl.load(index_ptr + batch * index_batch)
        else:
            at = index_ptr + batch * index_batch + row.to(tl.int64) * index_row
            position = tl.load(at, mask=inside, other=0) + offset
    found = (position >= 0) & (position < positions)
    pair = tl.arange(0, HALF)[None, :]
    read = (inside & found)[:, None] & (pair < half)
    nan = float("nan")
    cos = tl.load(cos_ptr + batch * cos_batch + position[:, None] * cos_row + pair, mask=read, other=nan)
    sin = tl.load(sin_ptr + batch * sin_batch + position[:, None] * sin_row + pair, mask=read, other=nan)
    if INVERSE:
        sin = -sin
    for step in tl.static_range(HEADS):
        head = (first_head + step).to(tl.int64)
        here = row < tl.where(head < heads, rows, 0)
        x_at = batch * x_batch + head * x_head + row.to(tl.int64) * x_row
        out_at = batch * out_batch + head * out_head + row.to(tl.int64) * out_row
        mask = here[:, None] & (pair < half)
        if INTERLEAVED:
            element = tl.arange(0, 2 * HALF)[None, :]
            both = here[:, None] & (element < 2 * half)
            x = tl.load(x_ptr + x_at[:, None] + element, mask=both, other=0.0)
            a, b = tl.split(tl.reshape(x.to(tl.float32), (ROWS, HALF, 2)))
            out = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, 2 * HALF))
            tl.store(out_ptr + out_at[:, None] + element, out.to(out_ptr.dtype.element_ty), mask=both)
        else:
            a = tl.load(x_ptr + x_at[:, None] + pair, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(x_ptr + x_at[:, None] + half + pair, mask=mask, other=0.0).to(tl.float32)
            first, second = a * cos - b * sin, b * cos + a * sin
            tl.store(out_ptr + out_at[:, None] + pair, first.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(out_ptr + out_at[:, None] + half + pair, second.to(out_ptr.dtype.element_ty), mask=mask)
        if REST:
            _store_rest(x_ptr, out_ptr, x_at, out_at, here, found, 2 * half, dim, REST)


def run(
    x: torch.Tensor,
    out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    index: torch.Tensor | None,
    sizes: tuple[int, int, int, int],
    x_strides: tuple[int, int, int],
    out_strides: tuple[int, int, int],
    cos_strides: tuple[int, int],
    sin_strides: tuple[int, int],
    index_strides: tuple[int, int],
    offset: int,
    starts: bool,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Writes ``out``; sizes are batch, heads, rows, dim, and strides those of csrc/transformer/rotary.h."""
    batch, heads, rows, dim = sizes
    half = cos.shape[-1]
    width = triton.next_power_of_2(max(half, 1))
    rest = dim - 2 * half
    head_step = 4 if heads >= 4 else 2 if heads >= 2 else 1
    row_step = max(1, min(TILE // (2 * width), triton.next_power_of_2(rows)))
    row_blocks, head_blocks = triton.cdiv(rows, row_step), triton.cdiv(heads, head_step)
    rotary_kernel[(batch * row_blocks * head_blocks,)](
        x,
        out,
        cos,
        sin,
        index,
        heads,
        rows,
        dim,
        half,
        cos.shape[-2],
        offset,
        *x_strides,
        *out_strides,
        *cos_strides,
        *sin_strides,
        *index_strides,
        row_blocks,
        head_blocks,
        HAS_INDEX=index is not None,
        STARTS=starts,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        HEADS_INSIDE=heads > 1 and x_strides[1] < x_strides[2],
        HEADS=head_step,
        ROWS=row_step,
        HALF=width,
        REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=WARPS,
    )


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, num_warps, label) of shipped configurations, for test_aot.py."""
    names = rotary_kernel.arg_names
    even = {"dim", "half", "x_batch", "x_head", "x_row", "out_batch", "out_head", "out_row", "cos_row", "sin_row"}
    for dtype, half, rest, interleaved, index, label in (
        ("fp32", 32, 0, False, "none", "halves-aligned"),
        ("bf16", 64, 0, False, "none", "halves-aligned"),
        ("fp16", 32, 32, False, "starts", "partial"),
        ("fp32", 64, 0, True, "none", "interleaved-aligned"),
        ("bf16", 64, 0, True, "positions", "interleaved"),
        ("fp32", 128, 0, False, "none", "wide"),
    ):
        types = {name: "i32" for name in names if name.islower()}
        types |= {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
        types |= {"index_ptr": "*i64", "offset": "i64"}
        constexprs = {
            "HAS_INDEX": index != "none", "STARTS": index == "starts", "INTERLEAVED": interleaved, "INVERSE": True,
            "HEADS_INSIDE": index == "starts", "HEADS": 4, "ROWS": TILE // (2 * half), "HALF": half, "REST": rest,
        }  # fmt: skip
        attrs = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if n in even or types.get(n, "").startswith("*")
        }
        yield (
            rotary_kernel,
            {n: types.get(n, "constexpr") for n in names},
            constexprs,
            attrs,
            WARPS,
            f"rotary-{dtype}-{label}",
        )
