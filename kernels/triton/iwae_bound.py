"""The importance-weighted bound of log weights l [K, columns] and its derivatives.

    forward   bound = log(sum_k e^l / K)
    backward  dl = dbound w        w = e^l / sum_k e^l
    jvp       bound' = sum_k w l'

Infinite log weights and NaN are a column's bound themselves; where all weights are zero, so is w. The sums are of
e^(l - largest), so that nothing overflows.

Floor: the bytes. Forward reads l once, backward reads it once and writes as much; a column is read twice, from a cache
the second time.

Tiling: a program owns C neighbouring columns and goes down them in blocks of B samples, twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from genfast.kernels.triton import noise

TILE = 1024
WARPS = 4


@triton.jit
def _tile(pointer, start, samples, columns, C: tl.constexpr, B: tl.constexpr, OTHER: tl.constexpr):
    """Block ``start`` of this program's columns [B, C] in float32, its addresses and mask."""
    k = start + tl.arange(0, B)[:, None]
    column = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    at = k.to(tl.int64) * columns + column
    mask = (k < samples) & (column < columns)
    return tl.load(pointer + at, mask=mask, other=OTHER).to(tl.float32), at, mask


@triton.jit
def _mass(x):
    """e^x of x <= 0; zero below -87."""
    return tl.where(x < -87.0, 0.0, noise.exp(noise.clamp(x, -87.0, 88.0)))


@triton.jit
def _column_sums(pointer, samples, columns, C: tl.constexpr, B: tl.constexpr):
    """(largest, what is subtracted, sum of e^(l - that)) of each column [C]."""
    largest = tl.full((C,), float("-inf"), tl.float32)
    for start in range(0, samples, B):
        x, _, _ = _tile(pointer, start, samples, columns, C, B, float("-inf"))
        largest = tl.maximum(largest, tl.max(x, axis=0))
    shift = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
    total = tl.zeros((C,), tl.float32)
    for start in range(0, samples, B):
        x, _, _ = _tile(pointer, start, samples, columns, C, B, float("-inf"))
        total += tl.sum(_mass(x - shift[None, :]), axis=0)
    return largest, shift, total


@triton.jit
def _inverse(largest, total):
    """1 / total; zero where all weights are zero, NaN where one is infinite."""
    inverse = tl.where(total < 0.5, 0.0, 1.0 / tl.where(total < 0.5, 1.0, total))
    return tl.where(largest == float("inf"), float("nan"), inverse)


@triton.jit(do_not_specialize=["samples"])
def forward_kernel(log_weights_ptr, bound_ptr, samples, columns, C: tl.constexpr, B: tl.constexpr):
    largest, shift, total = _column_sums(log_weights_ptr, samples, columns, C, B)
    bound = shift + (tl.log(total) - tl.log(noise.as_int64(samples).to(tl.float32)))
    bound = tl.where((tl.abs(largest) < float("inf")) | (total != total), bound, largest)
    column = tl.program_id(0) * C + tl.arange(0, C)
    tl.store(bound_ptr + column, bound, mask=column < columns)


@triton.jit(do_not_specialize=["samples"])
def backward_kernel(
    dbound_ptr, log_weights_ptr, out_ptr, samples, columns, HAS_DBOUND: tl.constexpr, C: tl.constexpr, B: tl.constexpr
):
    largest, shift, total = _column_sums(log_weights_ptr, samples, columns, C, B)
    factor = _inverse(largest, total)
    column = tl.program_id(0) * C + tl.arange(0, C)
    grad = tl.full((C,), 1.0, tl.float32)
    if HAS_DBOUND:
        grad = tl.load(dbound_ptr + column, mask=column < columns, other=0.0)
    for start in range(0, samples, B):
        x, at, mask = _tile(log_weights_ptr, start, samples, columns, C, B, 0.0)
        weights = _mass(x - shift[None, :]) * factor[None, :]
        tl.store(out_ptr + at, (weights * grad[None, :]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["samples"])
def jvp_kernel(tangent_ptr, log_weights_ptr, out_ptr, samples, columns, C: tl.constexpr, B: tl.constexpr):
    largest, shift, total = _column_sums(log_weights_ptr, samples, columns, C, B)
    factor = _inverse(largest, total)
    out = tl.zeros((C,), tl.float32)
    for start in range(0, samples, B):
        x, _, _ = _tile(log_weights_ptr, start, samples, columns, C, B, float("-inf"))
        tangent, _, _ = _tile(tangent_ptr, start, samples, columns, C, B, 0.0)
        out += tl.sum(_mass(x - shift[None, :]) * factor[None, :] * tangent, axis=0)
    column = tl.program_id(0) * C + tl.arange(0, C)
    tl.store(out_ptr + column, out, mask=column < columns)


def _plan(samples: int, columns: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the tile: few columns a program, so that small batches fill more of the GPU."""
    c = min(triton.next_power_of_2(columns), 32)
    b = max(1, min(triton.next_power_of_2(samples), TILE // c))
    return (triton.cdiv(columns, c),), {"C": c, "B": b}


def forward(log_weights: torch.Tensor, bound: torch.Tensor, sizes: tuple[int, int]) -> None:
    """Fills bound [columns]; sizes is (samples, columns)."""
    if sizes[1] == 0:
        return
    grid, tile = _plan(*sizes)
    forward_kernel[grid](log_weights, bound, *sizes, num_warps=WARPS, **tile)


def backward(dbound: torch.Tensor | None, log_weights: torch.Tensor, out: torch.Tensor, sizes: tuple[int, int]) -> None:
    """Fills the gradient [samples, columns]."""
    if sizes[1] == 0:
        return
    grid, tile = _plan(*sizes)
    backward_kernel[grid](dbound, log_weights, out, *sizes, HAS_DBOUND=dbound is not None, num_warps=WARPS, **tile)


def jvp(tangent: torch.Tensor, log_weights: torch.Tensor, out: torch.Tensor, sizes: tuple[int, int]) -> None:
    """Fills the tangent of the bound [columns]."""
    if sizes[1] == 0:
        return
    grid, tile = _plan(*sizes)
    jvp_kernel[grid](tangent, log_weights, out, *sizes, num_warps=WARPS, **tile)


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, num_warps, label) of shipped configurations, for test_aot.py."""
    kernels = (
        ("forward", forward_kernel, ("bound_ptr",)),
        ("backward", backward_kernel, ("dbound_ptr",)),
        ("jvp", jvp_kernel, ("out_ptr",)),
    )
    for name, kernel, floats in kernels:
        names = kernel.arg_names
        for dtype, tile in (("fp32", {"C": 32, "B": 32}), ("bf16", {"C": 32, "B": 32}), ("fp16", {"C": 1, "B": 1024})):
            types = {n: f"*{dtype}" if n.endswith("_ptr") else "i32" for n in names if n.islower()}
            types |= dict.fromkeys(floats, "*fp32")
            constexprs = {**tile, **({"HAS_DBOUND": True} if name == "backward" else {})}
            attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types.get(n, "").startswith("*")}
            signature = {n: types.get(n, "constexpr") for n in names}
            yield kernel, signature, constexprs, attrs, WARPS, f"iwae_bound_{name}-{dtype}-unaligned"
