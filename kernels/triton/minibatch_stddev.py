"""Standard deviations over groups of a batch, averaged over features: x is copied and reduced in one pass.

    sd = sqrt(var over the group + eps)      y[m, f] = mean of sd over feature f
    dx = dout + T[m, f] (x - mean) / (G P sd)      P elements a feature, T the sum of the cotangents of y[m, f]

Sample n is in group n % M, M = N / G.

Floor: forward reads x and writes out, backward reads x and dout and writes dx.

Tiling: a program owns BLOCK elements of one feature of one group and goes over the group's samples twice (backward
three times), the second time from the cache. Its sum of deviations goes to [groups, features, chunks], added by torch:
no atomics, always the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024
WARPS = 4


@triton.jit
def _at(chunks, features, elements, BLOCK: tl.constexpr):
    """(group, feature, element of the feature) of a program."""
    program = tl.program_id(0)
    element = (program % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return program // chunks // features, program // chunks % features, element


@triton.jit
def _moments(x_ptr, first, step, size, mask, BLOCK: tl.constexpr):
    """The first sample, the mean less it, and the variance."""
    shift = tl.load(x_ptr + first, mask=mask, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    for g in range(1, size):
        mean += tl.load(x_ptr + first + g * step, mask=mask, other=0.0).to(tl.float32) - shift
    mean = mean / size
    variance = mean * mean
    for g in range(1, size):
        deviation = (tl.load(x_ptr + first + g * step, mask=mask, other=0.0).to(tl.float32) - shift) - mean
        variance += deviation * deviation
    return shift, mean, variance / size


@triton.jit(do_not_specialize=["eps"])
def forward_kernel(
    x_ptr, out_ptr, sums_ptr, eps, groups, channels, spatial, size, features, elements, chunks, BLOCK: tl.constexpr
):  # fmt: skip
    group, feature, element = _at(chunks, features, elements, BLOCK)
    mask = element < elements
    group, groups, spatial = group.to(tl.int64), groups.to(tl.int64), spatial.to(tl.int64)
    at = feature.to(tl.int64) * elements + element
    first, step = group * channels * spatial + at, groups * channels * spatial
    _, _, variance = _moments(x_ptr, first, step, size, mask, BLOCK)
    sd = tl.where(mask, tl.sqrt((variance + eps).to(tl.float32)), 0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(sd, axis=0))
    wider = (channels + features) * spatial
    for g in range(size):
        x = tl.load(x_ptr + first + g * step, mask=mask)
        tl.store(out_ptr + (group + g * groups) * wider + at, x, mask=mask)


@triton.jit(do_not_specialize=["eps"])
def backward_kernel(
    dout_ptr, x_ptr, factors_ptr, dx_ptr, eps, groups, channels, spatial, size, features, elements, chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    group, feature, element = _at(chunks, features, elements, BLOCK)
    mask = element < elements
    factor = tl.load(factors_ptr + group * features + feature)
    group, groups, spatial = group.to(tl.int64), groups.to(tl.int64), spatial.to(tl.int64)
    at = feature.to(tl.int64) * elements + element
    first, step = group * channels * spatial + at, groups * channels * spatial
    shift, mean, variance = _moments(x_ptr, first, step, size, mask, BLOCK)
    slope = factor / tl.sqrt((variance + eps).to(tl.float32))
    wider = (channels + features) * spatial
    for g in range(size):
        x = tl.load(x_ptr + first + g * step, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + (group + g * groups) * wider + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(variance + eps == 0.0, float("nan"), dout + ((x - shift) - mean) * slope)
        tl.store(dx_ptr + first + g * step, value.to(dx_ptr.dtype.element_ty), mask=mask)


def _plan(sizes: tuple[int, int, int], size: int, features: int) -> tuple[int, int, int]:
    """(groups, elements of a feature, chunks of it)."""
    batch, channels, spatial = sizes
    elements = channels // features * spatial
    return batch // size, elements, triton.cdiv(elements, BLOCK)


def forward(
    x: torch.Tensor, sizes: tuple[int, int, int], size: int, features: int, eps: float, out: torch.Tensor
) -> None:
    """Fills ``out``; sizes are batch, channels, spatial."""
    groups, elements, chunks = _plan(sizes, size, features)
    sums = x.new_empty((groups, features, chunks), dtype=torch.float32)
    forward_kernel[(groups * features * chunks,)](
        x, out, sums, eps, groups, sizes[1], sizes[2], size, features, elements, chunks, BLOCK=BLOCK, num_warps=WARPS
    )
    y = (sums.sum(2) / elements).to(x.dtype).repeat(size, 1)
    out.view(sizes[0], sizes[1] + features, sizes[2])[:, sizes[1] :] = y.unsqueeze(2)


def backward(
    dout: torch.Tensor, x: torch.Tensor, sizes: tuple[int, int, int], size: int, features: int, eps: float,
    dx: torch.Tensor,
) -> None:  # fmt: skip
    """Fills ``dx``."""
    groups, elements, chunks = _plan(sizes, size, features)
    maps = dout.view(size, groups, sizes[1] + features, sizes[2])[:, :, sizes[1] :]
    factors = maps.sum((0, 3), dtype=torch.float32) / (size * elements)
    backward_kernel[(groups * features * chunks,)](
        dout, x, factors, dx, eps, groups, sizes[1], sizes[2], size, features, elements, chunks, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, num_warps, label) of shipped configurations, for test_aot.py."""
    for name, kernel in (("forward", forward_kernel), ("backward", backward_kernel)):
        names = kernel.arg_names
        for dtype in ("fp32", "bf16"):
            types = {n: f"*{dtype}" if n.endswith("_ptr") else "i32" for n in names if n.islower()}
            types |= {n: "*fp32" for n in ("sums_ptr", "factors_ptr") if n in names} | {"eps": "fp32"}
            aligned = ("channels", "spatial", "elements")
            attrs = {
                (i,): [["tt.divisibility", 16]]
                for i, n in enumerate(names)
                if types.get(n, "").startswith("*") or n in aligned
            }
            signature = {n: types.get(n, "constexpr") for n in names}
            yield kernel, signature, {"BLOCK": BLOCK}, attrs, WARPS, f"minibatch_stddev_{name}-{dtype}"
