"""The nearest code of each row, without the matrix of distances, and the sums of each code's rows.

    index_n = the lowest k with the smallest ||z_n - c_k||^2          score = ||c_k||^2 / 2 - z_n . c_k

nearest_kernel screens: a program owns BM rows, walks the codes in tiles of BN and keeps, for each row, the two smallest
scores. Where these are further apart than twice the bound of their errors the row is decided, else its index is -1.
recheck_kernel measures the distances of such a row in float64. select_kernel writes distances and codes.

Products: operands of 16 bits meet in one tensor-core product. float32 is the sum of two bfloat16 parts and a rest below
2^-17, so four products are off by less than 2^-16 |z| |c|; sums of tensor cores count 2^-22 a term here.

sums_kernel: a program owns one code and BD columns; rows are sorted by code, so that no order depends on the grid.

Floor: 2 N K D FLOPs times the products; bytes z, the codebook and the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from genfast.kernels.triton.rbm_half_step import add_product

SPLIT_ERROR = tl.constexpr(2.0**-16)
ROUNDING = tl.constexpr(2.0**-22)
SMALLEST = tl.constexpr(2.0**-120)
ROWS, WARPS = 16, 4  # of select_kernel
SUM_ROWS = 32


@triton.jit
def nearest_kernel(
    z_ptr,
    codebook_ptr,
    half_norm_ptr,
    largest_ptr,
    index_ptr,
    rows,
    codes,
    dim,
    OPERAND: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    inside = (row < rows)[:, None]
    z_tile = z_ptr + row[:, None] * dim + k[None, :]
    x = tl.load(z_tile, mask=inside & (k < dim)[None, :], other=0)  # the row, or its first piece
    square = tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
    if not WHOLE:
        for start in range(BK, dim, BK):
            piece = tl.load(z_tile + start, mask=inside & (k < dim - start)[None, :], other=0).to(tl.float32)
            square += tl.sum(piece * piece, axis=1)
    best = tl.full((BM,), float("inf"), tl.float32)
    second = tl.full((BM,), float("inf"), tl.float32)
    index = tl.zeros((BM,), tl.int32)
    for first in range(0, codes, BN):
        code = first + tl.arange(0, BN)
        there = code < codes
        c_tile = codebook_ptr + code.to(tl.int64)[None, :] * dim + k[:, None]
        total = tl.zeros((BM, BN), tl.float32)
        if WHOLE:
            c = tl.load(c_tile, mask=there[None, :] & (k < dim)[:, None], other=0)
            total = add_product(total, x, c, PARTS, PARTS, OPERAND)
        else:
            for start in range(0, dim, BK):
                k_mask = k < dim - start
                piece = tl.load(z_tile + start, mask=inside & k_mask[None, :], other=0)
                c = tl.load(c_tile + start, mask=there[None, :] & k_mask[:, None], other=0)
                total = add_product(total, piece, c, PARTS, PARTS, OPERAND)
        score = tl.load(half_norm_ptr + code, mask=there, other=float("inf"))[None, :] - total
        score = tl.where(score == score, score, float("inf"))
        low, at = tl.min(score, axis=1, return_indices=True)
        other = tl.min(tl.where(tl.arange(0, BN)[None, :] == at[:, None], float("inf"), score), axis=1)
        second = tl.minimum(tl.maximum(best, low), tl.minimum(second, other))
        index = tl.where(low < best, first + at.to(tl.int32), index)
        best = tl.minimum(best, low)
    largest = tl.sqrt(2.0 * tl.load(largest_ptr))
    norm = tl.sqrt(square)
    relative = (dim + 16) * ROUNDING
    if PARTS > 1:
        relative += SPLIT_ERROR
    error = relative * (norm * largest + 0.5 * largest * largest) + dim * SMALLEST * (1.0 + norm + largest)
    decided = second - best > 2.2 * error  # false for NaN
    decided = decided & (norm * largest + largest * largest < 1e37)
    tl.store(index_ptr + row, tl.where(decided, index, -1).to(tl.int64), mask=row < rows)


@triton.jit
def recheck_kernel(z_ptr, codebook_ptr, index_ptr, codes, dim, BN: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(index_ptr + row) < 0:
        k = tl.arange(0, BK)
        best = tl.full((), float("inf"), tl.float64)
        index = tl.full((), 0, tl.int32)
        for first in range(0, codes, BN):
            code = first + tl.arange(0, BN)
            distance = tl.zeros((BN,), tl.float64)
            for start in range(0, dim, BK):
                k_mask = k < dim - start
                z = tl.load(z_ptr + row * dim + start + k, mask=k_mask, other=0).to(tl.float64)
                c_at = codebook_ptr + code.to(tl.int64)[:, None] * dim + start + k[None, :]
                c = tl.load(c_at, mask=(code < codes)[:, None] & k_mask[None, :], other=0).to(tl.float64)
                gap = c - z[None, :]
                distance += tl.sum(gap * gap, axis=1)
            distance = tl.where((code < codes) & (distance == distance), distance, float("inf"))
            low, at = tl.min(distance, axis=0, return_indices=True)
            index = tl.where(low < best, first + at.to(tl.int32), index)
            best = tl.minimum(best, low)
        tl.store(index_ptr + row, index.to(tl.int64))


@triton.jit
def select_kernel(z_ptr, codebook_ptr, index_ptr, distance_ptr, code_ptr, rows, dim, R: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < rows
    index = tl.load(index_ptr + row, mask=inside, other=0)
    total = tl.zeros((R,), tl.float32)
    for start in range(0, dim, BK):
        k = start + tl.arange(0, BK)
        mask = inside[:, None] & (k < dim)[None, :]
        c = tl.load(codebook_ptr + index[:, None] * dim + k[None, :], mask=mask, other=0)
        if code_ptr is not None:
            tl.store(code_ptr + row[:, None] * dim + k[None, :], c, mask=mask)
        if distance_ptr is not None:
            gap = tl.load(z_ptr + row[:, None] * dim + k[None, :], mask=mask, other=0).to(tl.float32) - c.to(tl.float32)
            total += tl.sum(gap * gap, axis=1)
    if distance_ptr is not None:
        tl.store(distance_ptr + row, total, mask=inside)


@triton.jit
def sums_kernel(x_ptr, order_ptr, first_ptr, last_ptr, sums_ptr, dim, BR: tl.constexpr, BD: tl.constexpr):
    code = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    first, last = tl.load(first_ptr + code), tl.load(last_ptr + code)
    total = tl.zeros((BD,), tl.float32)
    at = first
    while at < last:
        place = at + tl.arange(0, BR)
        row = tl.load(order_ptr + place, mask=place < last, other=0)
        mask = (place < last)[:, None] & (column < dim)[None, :]
        total += tl.sum(tl.load(x_ptr + row[:, None] * dim + column[None, :], mask=mask, other=0.0), axis=0)
        at += BR
    tl.store(sums_ptr + code * dim + column, total, mask=column < dim)


class Tile(NamedTuple):
    rows: int
    codes: int
    k: int
    whole: bool
    warps: int


_TL = {torch.float32: tl.bfloat16, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def tile_of(dtype: torch.dtype, dim: int) -> Tile:
    whole = dim <= (64 if dtype == torch.float32 else 128)
    k = max(16, triton.next_power_of_2(dim)) if whole else 32 if dtype == torch.float32 else 64
    return Tile(64, 64, k, whole, 4) if dtype == torch.float32 else Tile(128, 128, k, whole, 8)


def nearest(
    z: torch.Tensor, codebook: torch.Tensor, want_distances: bool, want_codes: bool, tile: Tile | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """(distances [N] float32, codes [N, D], indices [N]) of contiguous z [N, D] and codebook [K, D]."""
    rows, dim = z.shape
    codes = codebook.shape[0]
    index = z.new_empty(rows, dtype=torch.int64)
    distances = z.new_empty(rows, dtype=torch.float32) if want_distances else None
    selected = torch.empty_like(z) if want_codes else None
    if rows == 0:
        return distances, selected, index
    tile = tile_of(z.dtype, dim) if tile is None else tile
    half_norms = codebook.to(torch.float32).square().sum(1) * 0.5
    nearest_kernel[(triton.cdiv(rows, tile.rows),)](
        z, codebook, half_norms, half_norms.amax(), index, rows, codes, dim, OPERAND=_TL[z.dtype],
        PARTS=2 if z.dtype == torch.float32 else 1, WHOLE=tile.whole, BM=tile.rows, BN=tile.codes, BK=tile.k,
        num_warps=tile.warps, num_stages=3,
    )  # fmt: skip
    recheck_kernel[(rows,)](z, codebook, index, codes, dim, BN=64, BK=32, num_warps=4)
    if want_distances or want_codes:
        block = min(128, max(16, triton.next_power_of_2(dim)))
        select_kernel[(triton.cdiv(rows, ROWS),)](
            z, codebook, index, distances, selected, rows, dim, R=ROWS, BK=block, num_warps=WARPS
        )
    return distances, selected, index


def sums(x: torch.Tensor, indices: torch.Tensor, codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums [K, D] float32, counts [K]) of contiguous x [N, D] float32; indices outside [0, K) count nowhere."""
    dim = x.shape[1]
    sorted_indices, order = torch.sort(indices, stable=True)
    every = torch.arange(codes, device=x.device)
    first = torch.searchsorted(sorted_indices, every)
    last = torch.searchsorted(sorted_indices, every, right=True)
    total = x.new_empty((codes, dim))
    if dim:
        block = min(128, max(16, triton.next_power_of_2(dim)))
        sums_kernel[(codes, triton.cdiv(dim, block))](
            x, order, first, last, total, dim, BR=SUM_ROWS, BD=block, num_warps=WARPS
        )
    return total, last - first


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, warps, label) of shipped configurations, for test_vector_quantize.py."""

    def variant(kernel: Any, types: dict[str, str], constexprs: dict[str, Any], warps: int, label: str) -> Any:
        names = kernel.arg_names
        signature = {n: types.get(n, "constexpr") for n in names}
        attrs = {
            (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*") or n == "dim"
        }
        return kernel, signature, constexprs, attrs, warps, label

    lengths = {"rows": "i32", "codes": "i32", "dim": "i32"}
    short = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    for name, dim in (("fp32", 64), ("fp32", 300), ("bf16", 64), ("bf16", 128), ("fp16", 300)):
        tile, pointer = tile_of(short[name], dim), f"*{name}"
        types = {
            "z_ptr": pointer, "codebook_ptr": pointer, "half_norm_ptr": "*fp32", "largest_ptr": "*fp32",
            "index_ptr": "*i64", **lengths,
        }  # fmt: skip
        constexprs = {
            "OPERAND": _TL[short[name]], "PARTS": 2 if name == "fp32" else 1, "WHOLE": tile.whole, "BM": tile.rows,
            "BN": tile.codes, "BK": tile.k,
        }  # fmt: skip
        yield variant(nearest_kernel, types, constexprs, tile.warps, f"nearest-{name}-{dim}")
    types = {"z_ptr": "*fp32", "codebook_ptr": "*fp32", "index_ptr": "*i64", "codes": "i32", "dim": "i32"}
    yield variant(recheck_kernel, types, {"BN": 64, "BK": 32}, 4, "recheck-fp32")
    types = {
        "z_ptr": "*fp32", "codebook_ptr": "*fp32", "index_ptr": "*i64", "distance_ptr": "*fp32", "code_ptr": "*fp32",
        "rows": "i32", "dim": "i32",
    }  # fmt: skip
    yield variant(select_kernel, types, {"R": ROWS, "BK": 64}, WARPS, "select-fp32")
    types = {
        "x_ptr": "*fp32", "order_ptr": "*i64", "first_ptr": "*i64", "last_ptr": "*i64", "sums_ptr": "*fp32",
        "dim": "i32",
    }  # fmt: skip
    yield variant(sums_kernel, types, {"BR": SUM_ROWS, "BD": 64}, WARPS, "sums-fp32")
