"""Instance normalization of planes with a scale and a shift for each.

    z = (x - mean) r,  r = 1 / sqrt(var + eps)      out = scale z + shift
    dx = scale r (dout - mean(dout) - z mean(dout z))      dscale = sum dout z      dshift = sum dout

Floor: forward reads x and writes out, backward reads x and dout and writes dx. Planes beyond what the caches hold are
read again: three times forward, twice backward.

Tiling: a program owns ROWS planes, BLOCK positions at a time; small planes share a program. Sums are float32 over the
lanes of a block; of the mean its difference to the plane's first element is kept. No atomics: always the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

TILE = 2048
WARPS = 4


@triton.jit
def _tile(plane, first, planes, size, BLOCK: tl.constexpr):
    """(where the elements are, their mask)."""
    element = (first + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    return plane[:, None] * size + element, (plane[:, None] < planes) & (element < size)


@triton.jit(do_not_specialize=["eps"])
def forward_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, offset_ptr, rstd_ptr, eps, planes, size, HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = plane < planes
    start = tl.load(x_ptr + plane * size, mask=inside, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, size, BLOCK):
        at, mask = _tile(plane, first, planes, size, BLOCK)
        total += tl.where(mask, tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - start, 0.0)
    offset = tl.sum(total, axis=1) / size
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, size, BLOCK):
        at, mask = _tile(plane, first, planes, size, BLOCK)
        x = (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - start) - offset[:, None]
        total += tl.where(mask, x * x, 0.0)
    rstd = 1.0 / tl.sqrt((tl.sum(total, axis=1) / size + eps).to(tl.float32))
    tl.store(offset_ptr + plane, offset, mask=inside)
    tl.store(rstd_ptr + plane, rstd, mask=inside)
    factor = rstd
    if HAS_SCALE:
        factor = rstd * tl.load(scale_ptr + plane, mask=inside, other=0.0)
    for first in range(0, size, BLOCK):
        at, mask = _tile(plane, first, planes, size, BLOCK)
        x = (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - start) - offset[:, None]
        out = x * factor[:, None]
        if HAS_SHIFT:
            out += tl.load(shift_ptr + plane, mask=inside, other=0.0)[:, None]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dout_ptr, x_ptr, scale_ptr, offset_ptr, rstd_ptr, dx_ptr, dscale_ptr, dshift_ptr, planes, size,
    HAS_SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = plane < planes
    start = tl.load(x_ptr + plane * size, mask=inside, other=0.0).to(tl.float32)[:, None]
    offset = tl.load(offset_ptr + plane, mask=inside, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + plane, mask=inside, other=0.0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    along = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, size, BLOCK):
        at, mask = _tile(plane, first, planes, size, BLOCK)
        dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += dout
        along += dout * ((x - start) - offset)
    dshift = tl.sum(total, axis=1)
    dscale = tl.sum(along, axis=1) * rstd
    tl.store(dshift_ptr + plane, dshift, mask=inside)
    tl.store(dscale_ptr + plane, dscale, mask=inside)
    factor = rstd
    if HAS_SCALE:
        factor = rstd * tl.load(scale_ptr + plane, mask=inside, other=0.0)
    mean, slope = (dshift / size)[:, None], (dscale / size * rstd)[:, None]
    for first in range(0, size, BLOCK):
        at, mask = _tile(plane, first, planes, size, BLOCK)
        dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - start) - offset
        dx = ((dout - mean) - x * slope) * factor[:, None]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _plan(x: torch.Tensor) -> tuple[int, int, int, int]:
    """(planes, positions, ROWS, BLOCK)."""
    planes, size = x.shape[0] * x.shape[1], x.shape[2:].numel()
    block = min(TILE, triton.next_power_of_2(size))
    return planes, size, max(1, min(TILE // block, 16)), block


def forward(
    x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None, eps: float, out: torch.Tensor,
    offset: torch.Tensor, rstd: torch.Tensor,
) -> None:  # fmt: skip
    """Fills ``out``, ``offset`` and ``rstd``."""
    planes, size, rows, block = _plan(x)
    forward_kernel[(triton.cdiv(planes, rows),)](
        x, scale, shift, out, offset, rstd, eps, planes, size, HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None, ROWS=rows, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip


def backward(
    dout: torch.Tensor, x: torch.Tensor, scale: torch.Tensor | None, offset: torch.Tensor, rstd: torch.Tensor,
    dx: torch.Tensor, dscale: torch.Tensor, dshift: torch.Tensor,
) -> None:  # fmt: skip
    """Fills ``dx``, ``dscale`` and ``dshift``."""
    planes, size, rows, block = _plan(x)
    backward_kernel[(triton.cdiv(planes, rows),)](
        dout, x, scale, offset, rstd, dx, dscale, dshift, planes, size, HAS_SCALE=scale is not None, ROWS=rows,
        BLOCK=block, num_warps=WARPS,
    )  # fmt: skip


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, num_warps, label) of shipped configurations, for test_aot.py."""
    for name, kernel in (("forward", forward_kernel), ("backward", backward_kernel)):
        names = kernel.arg_names
        for dtype, rows in (("fp32", 1), ("bf16", 16)):
            types = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in names if n.islower()}
            types |= {n: f"*{dtype}" for n in ("x_ptr", "dout_ptr", "out_ptr", "dx_ptr") if n in names}
            types |= {"eps": "fp32"} if name == "forward" else {}
            flags = {n: True for n in names if n.startswith("HAS_")}
            attrs = {
                (i,): [["tt.divisibility", 16]]
                for i, n in enumerate(names)
                if types.get(n, "").startswith("*") or n == "size"
            }
            signature = {n: types.get(n, "constexpr") for n in names}
            yield (
                kernel,
                signature,
                {**flags, "ROWS": rows, "BLOCK": TILE // rows},
                attrs,
                WARPS,
                (f"adain_{name}-{dtype}"),
            )
