"""Upsampling, filtering and downsampling of images.

    out[i, j] = gain sum_{k, l} g[k, l] z[i DOWN_Y + k - pad_y, j DOWN_X + l - pad_x],   z[UP_Y p, UP_X q] = x[p, q]

g is the filter, turned by 180 degrees unless CORRELATE; SEPARABLE: g[k, l] = h[k] h[l]. Output (i, j) visits only the
taps that meet samples: k = k0 + UP_Y s with k0 = (pad_y - i DOWN_Y) mod UP_Y, and likewise along the row.

Floor: the bytes, x in and out out. The inputs that neighbouring outputs share come from the caches.

Tiling: a program owns FIRST rows by SECOND columns of one plane; channels last, FIRST columns of one row by SECOND
channels, so that the second dimension is the contiguous one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

TILE = 1024  # outputs of a program
UNROLLED = 36  # taps that are unrolled
WARPS = 4


@triton.jit
def _first_tap(at, UP: tl.constexpr):
    """The smallest k >= 0 for which at + k is a multiple of UP."""
    return ((-at) % UP + UP) % UP


@triton.jit
def _term(
    total, x_ptr, f_ptr, s, t, k0, l0, row0, column0, height, width, x_row, x_column, inside,
    UP_Y: tl.constexpr, UP_X: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, SEPARABLE: tl.constexpr,
    CORRELATE: tl.constexpr,
):  # fmt: skip
    k, row = k0 + UP_Y * s, row0 + s
    m, column = l0 + UP_X * t, column0 + t
    met = inside & (k < TAPS_Y) & (m < TAPS_X) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    if not CORRELATE:
        k = TAPS_Y - 1 - k
        m = TAPS_X - 1 - m
    if SEPARABLE:
        weight = tl.load(f_ptr + k, mask=(k >= 0) & (k < TAPS_Y), other=0.0)
        weight = weight * tl.load(f_ptr + m, mask=(m >= 0) & (m < TAPS_X), other=0.0)
    else:
        known = (k >= 0) & (k < TAPS_Y) & (m >= 0) & (m < TAPS_X)
        weight = tl.load(f_ptr + k * TAPS_X + m, mask=known, other=0.0)
    x = tl.load(x_ptr + row.to(tl.int64) * x_row + column.to(tl.int64) * x_column, mask=met, other=0.0)
    return total + weight * x.to(tl.float32)


@triton.jit(do_not_specialize=["pad_y", "pad_x"])
def upfirdn2d_kernel(
    x_ptr,
    f_ptr,
    out_ptr,
    channels,
    height,
    width,
    out_height,
    out_width,
    x_batch,
    x_channel,
    x_row,
    x_column,
    out_batch,
    out_channel,
    out_row,
    out_column,
    pad_y,
    pad_x,
    gain,
    first_blocks,
    second_blocks,
    UP_Y: tl.constexpr,
    UP_X: tl.constexpr,
    DOWN_Y: tl.constexpr,
    DOWN_X: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
    SEPARABLE: tl.constexpr,
    CORRELATE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNROLL: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    rest = program // (first_blocks * second_blocks)
    block = (program % (first_blocks * second_blocks)).to(tl.int32)
    first = (block // second_blocks) * FIRST + tl.arange(0, FIRST)[:, None]
    second = (block % second_blocks) * SECOND + tl.arange(0, SECOND)[None, :]
    if CHANNELS_LAST:
        batch = rest // out_height
        i = (rest % out_height).to(tl.int32) + tl.zeros((1, 1), tl.int32)
        j = first
        channel = second.to(tl.int64)
        inside = (first < out_width) & (second < channels)
    else:
        batch = rest // channels
        i = first
        j = second
        channel = rest % channels + tl.zeros((1, 1), tl.int64)
        inside = (first < out_height) & (second < out_width)
    x_ptr += batch * x_batch + channel * x_channel
    row_at = i * DOWN_Y - pad_y
    column_at = j * DOWN_X - pad_x
    k0 = _first_tap(row_at, UP_Y)
    l0 = _first_tap(column_at, UP_X)
    row0 = (row_at + k0) // UP_Y  # exact
    column0 = (column_at + l0) // UP_X
    steps_y: tl.constexpr = (TAPS_Y + UP_Y - 1) // UP_Y
    steps_x: tl.constexpr = (TAPS_X + UP_X - 1) // UP_X
    total = tl.zeros((FIRST, SECOND), tl.float32)
    if UNROLL:
        for s in tl.static_range(steps_y):
            for t in tl.static_range(steps_x):
                total = _term(
                    total, x_ptr, f_ptr, s, t, k0, l0, row0, column0, height, width, x_row, x_column, inside,
                    UP_Y, UP_X, TAPS_Y, TAPS_X, SEPARABLE, CORRELATE,
                )  # fmt: skip
    else:
        for s in range(steps_y):
            for t in range(steps_x):
                total = _term(
                    total, x_ptr, f_ptr, s, t, k0, l0, row0, column0, height, width, x_row, x_column, inside,
                    UP_Y, UP_X, TAPS_Y, TAPS_X, SEPARABLE, CORRELATE,
                )  # fmt: skip
    out_ptr += batch * out_batch + channel * out_channel
    out = (total * gain).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + i.to(tl.int64) * out_row + j.to(tl.int64) * out_column, out, mask=inside)


def run(
    x: torch.Tensor,
    f: torch.Tensor,
    out: torch.Tensor,
    up: tuple[int, int],
    down: tuple[int, int],
    pad: tuple[int, int],
    correlate: bool,
    gain: float,
) -> None:
    """Writes ``out``; pairs are (y, x)."""
    batch, channels, out_height, out_width = out.shape
    last = out.stride(1) == 1 and channels > 1
    extents = (out_width, channels) if last else (out_height, out_width)
    second = max(1, min(128, triton.next_power_of_2(extents[1])))
    first = max(1, min(TILE // second, triton.next_power_of_2(extents[0])))
    blocks = triton.cdiv(extents[0], first), triton.cdiv(extents[1], second)
    taps = (f.shape[0], f.shape[-1])
    steps = -(-taps[0] // up[0]) * -(-taps[1] // up[1])
    upfirdn2d_kernel[(batch * (out_height if last else channels) * blocks[0] * blocks[1],)](
        x,
        f,
        out,
        channels,
        x.shape[2],
        x.shape[3],
        out_height,
        out_width,
        *x.stride(),
        *out.stride(),
        *pad,
        gain,
        *blocks,
        UP_Y=up[0],
        UP_X=up[1],
        DOWN_Y=down[0],
        DOWN_X=down[1],
        TAPS_Y=taps[0],
        TAPS_X=taps[1],
        SEPARABLE=f.dim() == 1,
        CORRELATE=correlate,
        CHANNELS_LAST=last,
        UNROLL=steps <= UNROLLED,
        FIRST=first,
        SECOND=second,
        num_warps=WARPS,
    )


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, num_warps, label) of shipped configurations, for the tests."""
    names = upfirdn2d_kernel.arg_names
    strides = {f"{of}_{name}" for of in ("x", "out") for name in ("batch", "channel", "row")}
    for dtype, up, down, taps, separable, last, label in (
        ("fp32", 2, 1, 4, True, False, "up"),
        ("fp32", 1, 2, 4, True, False, "down"),
        ("bf16", 2, 1, 4, True, True, "up-channels-last"),
        ("fp16", 1, 2, 12, True, False, "down-12"),
        ("fp16", 2, 3, 5, False, False, "full"),
    ):
        types = {name: "i32" for name in names if name.islower()}
        types |= {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "f_ptr": "*fp32", "gain": "fp32"}
        constexprs = {
            "UP_Y": up, "UP_X": up, "DOWN_Y": down, "DOWN_X": down, "TAPS_Y": taps, "TAPS_X": taps,
            "SEPARABLE": separable, "CORRELATE": False, "CHANNELS_LAST": last,
            "UNROLL": (-(-taps // up)) ** 2 <= UNROLLED, "FIRST": 8, "SECOND": 128,
        }  # fmt: skip
        unit = "channel" if last else "column"
        types |= {f"{of}_{unit}": "constexpr" for of in ("x", "out")}
        constexprs |= {f"{of}_{unit}": 1 for of in ("x", "out")}
        even = (strides | {"x_column", "out_column"}) - {f"x_{unit}", f"out_{unit}"}
        attrs = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if n in even or types.get(n, "").startswith("*")
        }
        yield (
            upfirdn2d_kernel,
            {n: types.get(n, "constexpr") for n in names},
            constexprs,
            attrs,
            WARPS,
            f"upfirdn2d-{dtype}-{label}",
        )
