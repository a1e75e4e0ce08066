"""Spectral normalization: products of a weight with vectors, its scaling, and the gradient; one layer a call.

    t = W v      W^T t      out = W / sigma      dW = (dout - along u v^T) / sigma

A weight lies in memory as [outer, rows, inner] and has outer * inner columns; outer = 1 where the rows come first. All
sums are float32.

Floor: 2 n + 1 reads of W and a write for n iterations: unlike on the CPU a row does not stay near its program, so that
the two products of an iteration each read W. Backward: two reads of dout, one of W, a write.

Tiling: ``rows_kernel`` gives a program ROWS rows over all columns; ``columns_kernel`` COLUMNS columns over a share of
the rows, whose sums torch adds in order; the elementwise kernels ROWS x COLUMNS. The norms of vectors are torch's: they
stay on the device. No atomics: always the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 4, 512
SHARES = 16  # parts of the rows in columns_kernel, at most
WARPS = 4


@triton.jit
def _offsets(row, column, rows, inner):
    """Where W[row, column] lies."""
    outer = column // inner
    return (outer * rows + row[:, None]) * inner + column % inner


@triton.jit
def rows_kernel(
    weight_ptr, v_ptr, product_ptr, rows, columns, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, columns, COLUMNS):
        column = (first + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
        mask = (row[:, None] < rows) & (column < columns)
        weight = tl.load(weight_ptr + _offsets(row, column, rows, inner), mask=mask, other=0.0).to(tl.float32)
        total += weight * tl.load(v_ptr + column, mask=column < columns, other=0.0)
    tl.store(product_ptr + row, tl.sum(total, axis=1), mask=row < rows)


@triton.jit
def columns_kernel(
    weight_ptr, u_ptr, parts_ptr, rows, columns, inner, share, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    column = (tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, rows)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row[:, None] < end) & (column < columns)
        weight = tl.load(weight_ptr + _offsets(row, column, rows, inner), mask=mask, other=0.0).to(tl.float32)
        total += weight * tl.load(u_ptr + row, mask=row < end, other=0.0)[:, None]
    at = tl.program_id(1).to(tl.int64) * columns + column
    tl.store(parts_ptr + at, tl.sum(total, axis=0)[None, :], mask=column < columns)


@triton.jit
def scale_kernel(weight_ptr, out_ptr, sigma_ptr, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (weight / tl.load(sigma_ptr)).to(out_ptr.dtype.element_ty), mask=at < elements)


@triton.jit
def dot_kernel(weight_ptr, dout_ptr, parts_ptr, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(weight * dout, axis=0))


@triton.jit
def gradient_kernel(
    dout_ptr, u_ptr, v_ptr, along_ptr, sigma_ptr, out_ptr, rows, columns, inner, row_blocks, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = ((tl.program_id(0) // row_blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row[:, None] < rows) & (column < columns)
    at = _offsets(row, column, rows, inner)
    u = tl.load(u_ptr + row, mask=row < rows, other=0.0)[:, None] * tl.load(along_ptr)
    v = tl.load(v_ptr + column, mask=column < columns, other=0.0)
    dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, ((dout - u * v) / tl.load(sigma_ptr)).to(out_ptr.dtype.element_ty), mask=mask)


def _unit(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.linalg.vector_norm(x).clamp_min(eps)


def _times(weight: torch.Tensor, v: torch.Tensor, rows: int, columns: int, inner: int) -> torch.Tensor:
    product = v.new_empty(rows)
    rows_kernel[(triton.cdiv(rows, ROWS),)](
        weight, v, product, rows, columns, inner, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
    )
    return product


def _times_transposed(weight: torch.Tensor, u: torch.Tensor, rows: int, columns: int, inner: int) -> torch.Tensor:
    shares = max(1, min(SHARES, rows // 16))
    share = triton.cdiv(rows, shares)
    shares = triton.cdiv(rows, share)
    parts = u.new_empty((shares, columns))
    columns_kernel[(triton.cdiv(columns, COLUMNS), shares)](
        weight, u, parts, rows, columns, inner, share, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
    )
    return parts.sum(0)


def forward(
    weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor, sizes: tuple[int, int, int], iterations: int, eps: float,
    out: torch.Tensor, sigma: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Fills ``out`` and ``sigma`` [1] and returns the new vectors; sizes are rows, outer, inner."""
    rows, outer, inner = sizes
    columns = outer * inner
    if weight.numel() == 0:
        sigma.zero_()
        return (torch.zeros_like(u), torch.zeros_like(v)) if iterations else (u, v)
    for _ in range(iterations):
        u = _unit(_times(weight, v, rows, columns, inner), eps)
        v = _unit(_times_transposed(weight, u, rows, columns, inner), eps)
    sigma.copy_((u * _times(weight, v, rows, columns, inner)).sum())
    block = ROWS * COLUMNS
    scale_kernel[(triton.cdiv(weight.numel(), block),)](
        weight, out, sigma, weight.numel(), BLOCK=block, num_warps=WARPS
    )
    return u, v


def backward(
    dout: torch.Tensor, weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor,
    dsigma: torch.Tensor | None, sizes: tuple[int, int, int], out: torch.Tensor,
) -> None:  # fmt: skip
    """Fills ``out`` with the gradient of the weight."""
    rows, outer, inner = sizes
    if weight.numel() == 0:
        return
    columns, block = outer * inner, ROWS * COLUMNS
    programs = triton.cdiv(weight.numel(), block)
    parts = u.new_empty(programs)
    dot_kernel[(programs,)](weight, dout, parts, weight.numel(), BLOCK=block, num_warps=WARPS)
    along = parts.sum() / sigma
    if dsigma is not None:
        along = along - dsigma * sigma
    row_blocks = triton.cdiv(rows, ROWS)
    gradient_kernel[(row_blocks * triton.cdiv(columns, COLUMNS),)](
        dout, u, v, along, sigma, out, rows, columns, inner, row_blocks, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS
    )


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, num_warps, label) of shipped configurations, for test_aot.py."""
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    for name, kernel, constexprs in (
        ("rows", rows_kernel, tile),
        ("columns", columns_kernel, tile),
        ("scale", scale_kernel, {"BLOCK": ROWS * COLUMNS}),
        ("dot", dot_kernel, {"BLOCK": ROWS * COLUMNS}),
        ("gradient", gradient_kernel, tile),
    ):
        names = kernel.arg_names
        for dtype in ("fp32", "bf16"):
            types = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in names if n.islower()}
            types |= {n: f"*{dtype}" for n in ("weight_ptr", "dout_ptr") if n in names}
            if name in ("scale", "gradient"):
                types["out_ptr"] = f"*{dtype}"
            attrs = {
                (i,): [["tt.divisibility", 16]]
                for i, n in enumerate(names)
                if types.get(n, "").startswith("*") or n in ("inner", "columns", "elements")
            }
            signature = {n: types.get(n, "constexpr") for n in names}
            yield kernel, signature, constexprs, attrs, WARPS, f"spectral_normalize_{name}-{dtype}"
