"""The free energy of visible states, F = E_v(v) - sum_j log Z_j(x_j), x = v W + c.

    E_v = -v b (0/1 states), (v - b)^2 / (2 sigma^2) (Gaussian)     log Z_j = softplus x_j, x_j^2 / 2 + log(2 pi) / 2

The product and its row sums are those of rbm_half_step.py, which leaves one partial sum per tile of hidden units; this
kernel adds E_v and the partial sums, in order, without atomics. Floor: the product's FLOPs; here bytes, v once more.

Tiling: a program owns R rows and walks the visible units in steps of C.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from genfast.kernels.triton import noise, rbm_half_step
from genfast.kernels.triton.rbm_half_step import BERNOULLI, GAUSSIAN, Tile

R, C, WARPS = 4, 256, 4


@triton.jit
def finish_kernel(
    v_ptr,
    b_ptr,
    precision_ptr,
    log_partition_ptr,
    out_ptr,
    rows,
    units,
    tiles,
    GAUSSIAN_UNITS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    energy = tl.zeros((R, C), tl.float32)
    for start in range(0, units, C):
        column = start + tl.arange(0, C)
        mask = (row < rows)[:, None] & (column < units)[None, :]
        v = tl.load(v_ptr + row[:, None] * units + column[None, :], mask=mask, other=0).to(tl.float32)
        b = tl.load(b_ptr + column, mask=column < units, other=0.0).to(tl.float32)[None, :]
        if GAUSSIAN_UNITS:
            gap = v - b
            term = gap * gap * 0.5
            if precision_ptr is not None:
                term *= tl.load(precision_ptr + column, mask=column < units, other=0.0)[None, :]
            energy += tl.where(mask, term, 0.0)
        else:
            energy -= v * b
    total = tl.zeros((R,), tl.float32)
    for tile in range(0, tiles):
        total += tl.load(log_partition_ptr + tile * noise.as_int64(rows) + row, mask=row < rows, other=0.0)
    tl.store(out_ptr + row, tl.sum(energy, axis=1) - total, mask=row < rows)


def finish(
    v: torch.Tensor, b: torch.Tensor, logvar: torch.Tensor | None, log_partition: torch.Tensor, gaussian: bool
) -> torch.Tensor:
    """F [rows] float32 of v [rows, V] and the partial sums [tiles, rows] of ``half_step``; contiguous tensors."""
    rows, units = v.shape
    out = v.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return out
    precision = torch.exp(-logvar.to(torch.float32)) if gaussian and logvar is not None else None
    finish_kernel[(triton.cdiv(rows, R),)](
        v.view(torch.uint8) if v.dtype == torch.bool else v, b, precision, log_partition, out,
        rows, units, log_partition.shape[0], GAUSSIAN_UNITS=gaussian, R=R, C=C, num_warps=WARPS,
    )  # fmt: skip
    return out


def forward(
    v: torch.Tensor, W: torch.Tensor, b: torch.Tensor, c: torch.Tensor, logvar: torch.Tensor | None,
    gaussian_visible: bool, gaussian_hidden: bool, precision: str = "fp32",
) -> torch.Tensor:  # fmt: skip
    """F [rows] float32, v [rows, V] contiguous."""
    sums = rbm_half_step.half_step(
        v, rbm_half_step.scaled(W, logvar), c, up=True, kind=GAUSSIAN if gaussian_hidden else BERNOULLI,
        precision=precision, want_log_partition=True,
    ).log_partition  # fmt: skip
    assert sums is not None
    return finish(v, b, logvar, sums, gaussian_visible)


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], Tile, str]]:
    """(kernel, signature, constexprs, attrs, tile, label) of shipped configurations, for test_rbm_aot.py."""
    names = finish_kernel.arg_names
    for v, gaussian, ones in (("bf16", False, 0), ("u8", False, 0), ("fp32", True, 0), ("fp32", False, 1)):
        types = {
            "v_ptr": f"*{v}", "b_ptr": "*fp32", "precision_ptr": "*fp32", "log_partition_ptr": "*fp32",
            "out_ptr": "*fp32", "rows": "i32", "units": "i32", "tiles": "i32",
        }  # fmt: skip
        constexprs = {"GAUSSIAN_UNITS": gaussian, "R": R, "C": C}
        if not gaussian:
            types["precision_ptr"], constexprs["precision_ptr"] = "constexpr", None
        if ones:  # lengths of 1 are constants to Triton
            types |= dict.fromkeys(("rows", "units", "tiles"), "constexpr")
            constexprs |= dict.fromkeys(("rows", "units", "tiles"), 1)
        signature = {n: types.get(n, "constexpr") for n in names}
        attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
        label = f"finish-{v}-{'gaussian' if gaussian else 'bernoulli'}{'-ones' if ones else ''}"
        yield finish_kernel, signature, constexprs, attrs, Tile(R, C, 0, WARPS, 3), label
