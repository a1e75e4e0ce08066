"""Bias, activation, gain and clamp, their gradient and the gradient of that.

    z = x + b,  f(z) = gain act(z),  m(z) = 1 where |f(z)| <= high, else 0
    forward:  y = f(z) limited to [-high, high]
    ORDER 1:  out = dy m f'(z),  sums of out over a channel
    ORDER 2:  w = v + v_b,  out = w m f'(z),  to_x = dy w m f''(z),  sums of to_x over a channel

Tensors are dense, [outer, channels, inner] in memory order; csrc/gan/bias_act.h has the layout of the bits that the
forward pass of a piecewise linear activation leaves for ORDER 1.

Floor: the bytes. Forward x in and y out (and a bit an element); ORDER 1 dy and the bits (or x) in, out out; ORDER 2 x,
dy and v in, out and to_x out.

Tiling: a matrix [rows, columns] of which a program owns ROWS x COLUMNS. Where inner is at least 32 a row is a channel
(BY_ROW): its sums go along columns. Elsewhere a row has all channels, their sums go along rows, and a program takes
STEPS tiles one below the other. Every program leaves its partial sums, which torch adds: no atomics.
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
SHORTEST = 32  # kShortest of csrc/gan/bias_act.h

LINEAR, RELU, LEAKY_RELU, TANH, SIGMOID, ELU, SOFTPLUS, SWISH = (tl.constexpr(i) for i in range(8))
# kMills of csrc/common/poly.h.
MILLS = tl.constexpr(
    (
        0.473304749,
        0.761885107,
        0.970410824,
        0.935109138,
        0.605533481,
        0.150582299,
        -0.139263108,
        -0.125019744,
        0.0204089116,
        0.0495938286,
    )
)


@triton.jit
def _logistic(z):
    """(p, 1 - p, p (1 - p)) of p = 1 / (1 + e^-z), each with full relative accuracy."""
    size = tl.abs(z)
    y = tl.where(size > 87.0, 0.0, noise.exp(-noise.clamp(size, 0.0, 87.0)))
    r = 1.0 / (1.0 + y)
    return tl.where(z < 0.0, y * r, r), tl.where(z < 0.0, r, y * r), y * r * r


@triton.jit
def _log1p_unit(y):
    """log(1 + y) for y in [0, 1]."""
    low = y < 0.41421354
    s = tl.where(low, y, (y - 1.0) * 0.5)
    log = (s * s) * (s * noise.horner(s, noise.LOG1P, 9) - 0.5) + s
    return log + tl.where(low, 0.0, noise.LN2)


@triton.jit
def _normal(z):
    """(distribution function, density) of the standard normal."""
    a = noise.clamp(tl.abs(z), 0.0, 14.0)
    square = a * a
    density = noise.exp(noise.clamp(square * -0.5, -87.0, 0.0)) * 0.398942280
    density = tl.where(a > 13.0, 0.0, density + density * (tl.fma(a, a, -square) * -0.5))
    w = 4.0 / (a + 4.0)
    tail = density * w * noise.horner(w - 0.5, MILLS, 10)
    return tl.where(z < 0.0, tail, 1.0 - tail), density


@triton.jit
def _value(z, alpha, ACT: tl.constexpr):
    if ACT == LINEAR:
        return z
    elif ACT == RELU:
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == LEAKY_RELU:
        return tl.where(z > 0.0, z, alpha * z)
    elif ACT == TANH:
        y = noise.clamp(z + z, -40.0, 40.0)
        half = noise.half_expm1(y, noise.exp(y) * 0.5)
        return half / (half + 1.0)
    elif ACT == SIGMOID:
        p, _, _ = _logistic(z)
        return p
    elif ACT == ELU:
        low = tl.minimum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        near = noise.clamp(low, -87.0, 0.0)
        return tl.where(z > 0.0, z, alpha * (2.0 * noise.half_expm1(near, noise.exp(near) * 0.5)))
    elif ACT == SOFTPLUS:
        y = noise.exp(-noise.clamp(tl.abs(z), 0.0, 87.0))
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p_unit(y)
    elif ACT == SWISH:
        p, _, _ = _logistic(z)
        return tl.maximum(z, -100.0, propagate_nan=tl.PropagateNan.ALL) * p
    else:
        cdf, _ = _normal(z)
        return tl.maximum(z, -14.0, propagate_nan=tl.PropagateNan.ALL) * cdf


@triton.jit
def _slopes(z, alpha, ACT: tl.constexpr):
    """The first two derivatives."""
    zero = tl.zeros_like(z)
    if ACT == LINEAR:
        return zero + 1.0, zero
    elif ACT == RELU:
        return tl.where(z > 0.0, 1.0, zero), zero
    elif ACT == LEAKY_RELU:
        return tl.where(z > 0.0, 1.0, zero + alpha), zero
    elif ACT == ELU:
        e = alpha * noise.exp(noise.clamp(z, -87.0, 0.0))
        return tl.where(z > 0.0, 1.0, e), tl.where(z > 0.0, 0.0, e)
    elif ACT == TANH:
        p, rest, slope = _logistic(noise.clamp(z, -60.0, 60.0) * 2.0)
        return 4.0 * slope, -8.0 * (p - rest) * slope
    elif ACT == SIGMOID:
        p, rest, slope = _logistic(z)
        return slope, slope * (rest - p)
    elif ACT == SOFTPLUS:
        p, rest, slope = _logistic(z)
        return p, slope
    elif ACT == SWISH:
        p, rest, slope = _logistic(z)
        near = noise.clamp(z, -100.0, 100.0)
        return p + near * slope, slope * (2.0 + near * (rest - p))
    else:
        cdf, density = _normal(z)
        near = noise.clamp(z, -14.0, 14.0)
        return cdf + near * density, density * (2.0 - near * near)


@triton.jit
def _channel(row, first_column, column, channels, inner, BY_ROW: tl.constexpr):
    """The channel of each row or column; ``column`` counts from ``first_column``."""
    if BY_ROW:
        return row % channels
    else:
        return (((first_column % (channels * inner)).to(tl.int32) + column) // inner) % channels


@triton.jit
def _of_channels(values, row, column, channel, rows, first_column, columns, BY_ROW: tl.constexpr):
    """A vector [channels] as a tile."""
    if BY_ROW:
        return tl.load(values + channel, mask=row < rows, other=0.0)[:, None]
    else:
        return tl.load(values + channel, mask=first_column + column < columns, other=0.0)[None, :]


@triton.jit
def forward_kernel(
    x_ptr,
    b_ptr,
    out_ptr,
    bits_ptr,
    rows,
    columns,
    channels,
    inner,
    column_blocks,
    line_bytes,
    plane_bytes,
    alpha,
    gain,
    high,
    ACT: tl.constexpr,
    CLAMPED: tl.constexpr,
    PLANES: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = (program % column_blocks).to(tl.int64) * COLUMNS
    column = tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (first + column < columns)[None, :]
    at = row[:, None] * columns + first + column[None, :]
    z = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if b_ptr is not None:
        channel = _channel(row, first, column, channels, inner, BY_ROW)
        z += _of_channels(b_ptr, row, column, channel, rows, first, columns, BY_ROW)
    f = _value(z, alpha, ACT) * gain
    y = f
    if CLAMPED:
        y = tl.minimum(y, high, propagate_nan=tl.PropagateNan.ALL)
        y = tl.maximum(y, -high, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)
    if PLANES > 0:
        above = mask
        if ACT != LINEAR:
            above = above & (z > 0.0)
        inside = mask
        if CLAMPED:
            inside = inside & (tl.abs(f) <= high)
        byte = tl.arange(0, COLUMNS // 8)
        places = bits_ptr + row[:, None] * line_bytes + first // 8 + byte[None, :]
        held = (row < rows)[:, None] & (first // 8 + byte < line_bytes)[None, :]
        if PLANES == 1:
            above = above & inside
        else:
            tl.store(places + plane_bytes, _packed(inside, ROWS, COLUMNS), mask=held)
        tl.store(places, _packed(above, ROWS, COLUMNS), mask=held)


@triton.jit
def _packed(mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bits [ROWS, COLUMNS] to bytes [ROWS, COLUMNS / 8]."""
    bits = tl.reshape(mask.to(tl.int32), (ROWS, COLUMNS // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def gradient_kernel(
    x_ptr,
    b_ptr,
    dy_ptr,
    v_ptr,
    v_b_ptr,
    out_ptr,
    to_x_ptr,
    sums_ptr,
    bits_ptr,
    rows,
    columns,
    channels,
    inner,
    column_blocks,
    line_bytes,
    plane_bytes,
    alpha,
    gain,
    high,
    ORDER: tl.constexpr,
    ACT: tl.constexpr,
    CLAMPED: tl.constexpr,
    PLANES: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    program = tl.program_id(0)
    row_block = (program // column_blocks).to(tl.int64)
    first = (program % column_blocks).to(tl.int64) * COLUMNS
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(STEPS):
        row = (row_block * STEPS + step) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (first + column < columns)[None, :]
        at = row[:, None] * columns + first + column[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        channel = _channel(row, first, column, channels, inner, BY_ROW)
        if PLANES > 0:
            if BY_ROW:
                places = bits_ptr + row[:, None] * line_bytes + (first + column[None, :]) // 8
                shift = (column % 8)[None, :]
            else:
                places = bits_ptr + at // 8
                shift = (at % 8).to(tl.int32)
            above = ((tl.load(places, mask=mask, other=0).to(tl.int32) >> shift) & 1) != 0
            if ACT == LEAKY_RELU:
                result = tl.where(above, dy * gain, dy * (gain * alpha))
            else:
                result = tl.where(above, dy * gain, 0.0)
            if PLANES == 2:
                inside = ((tl.load(places + plane_bytes, mask=mask, other=0).to(tl.int32) >> shift) & 1) != 0
                result = tl.where(inside, result, 0.0)
        else:
            z = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if b_ptr is not None:
                z += _of_channels(b_ptr, row, column, channel, rows, first, columns, BY_ROW)
            slope, curvature = _slopes(z, alpha, ACT)
            factor = tl.zeros_like(z) + gain
            if CLAMPED:
                factor = tl.where(tl.abs(_value(z, alpha, ACT) * gain) > high, 0.0, factor)
            if ORDER == 1:
                result = tl.where(factor * slope == 0.0, 0.0, dy * (factor * slope))
            else:
                w = tl.zeros_like(z)
                if v_ptr is not None:
                    w = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
                if v_b_ptr is not None:
                    w += _of_channels(v_b_ptr, row, column, channel, rows, first, columns, BY_ROW)
                w = tl.where(factor == 0.0, 0.0, w * factor)
                if out_ptr is not None:
                    tl.store(out_ptr + at, (w * slope).to(out_ptr.dtype.element_ty), mask=mask)
                result = w * dy * curvature
                if to_x_ptr is not None:
                    tl.store(to_x_ptr + at, result.to(to_x_ptr.dtype.element_ty), mask=mask)
        if ORDER == 1 and out_ptr is not None:
            tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)
        if sums_ptr is not None:
            total += tl.where(mask, result, 0.0)
    if sums_ptr is not None:
        if BY_ROW:  # STEPS is 1
            line = row_block * ROWS + tl.arange(0, ROWS)
            place = sums_ptr + line * column_blocks + program % column_blocks
            tl.store(place, tl.sum(total, axis=1), mask=line < rows)
        else:
            place = sums_ptr + row_block * columns + first + column
            tl.store(place, tl.sum(total, axis=0), mask=first + column < columns)


def _layout(geometry: tuple[int, int, int]) -> tuple[tuple[int, int, int], bool, int, int]:
    """((outer, channels, inner), BY_ROW, bytes of a line of bits, bytes of a plane)."""
    outer, channels, inner = geometry
    if channels == 1:
        outer, inner = 1, outer * inner
    by_row = channels == 1 or inner >= SHORTEST
    line = inner if by_row else outer * channels * inner
    line_bytes = (line + 15) // 16 * 2
    return (outer, channels, inner), by_row, line_bytes, line_bytes * (outer * channels if by_row else 1)


def _row_tile(columns: int) -> tuple[int, int]:
    """(ROWS, COLUMNS) of a tile whose rows are channels."""
    width = max(SHORTEST, min(TILE, triton.next_power_of_2(columns)))
    return TILE // width, width


def forward(
    x: torch.Tensor, b: torch.Tensor | None, out: torch.Tensor, bits: torch.Tensor | None,
    geometry: tuple[int, int, int], act: int, alpha: float, gain: float, high: float, planes: int,
) -> None:  # fmt: skip
    """Writes ``out`` and, where wanted, ``bits``."""
    (outer, channels, inner), by_row, line_bytes, plane_bytes = _layout(geometry)
    rows, columns = (outer * channels, inner) if by_row else (1, outer * channels * inner)
    tile = _row_tile(columns) if by_row else (1, TILE)
    blocks = triton.cdiv(columns, tile[1])
    forward_kernel[(triton.cdiv(rows, tile[0]) * blocks,)](
        x, b, out, bits, rows, columns, channels, inner, blocks, line_bytes, plane_bytes, alpha, gain, high,
        ACT=act, CLAMPED=high != float("inf"), PLANES=planes, BY_ROW=by_row, ROWS=tile[0], COLUMNS=tile[1],
        num_warps=WARPS,
    )  # fmt: skip


def _gradient(
    x, b, dy, v, v_b, out, to_x, bits, geometry, act, alpha, gain, high, planes, want_sums, order
):  # type: ignore[no-untyped-def]  # fmt: skip
    (outer, channels, inner), by_row, line_bytes, plane_bytes = _layout(geometry)
    rows, columns = (outer * channels, inner) if by_row else (outer, channels * inner)
    if by_row:
        tile, steps = _row_tile(columns), 1
    else:
        width = min(128, triton.next_power_of_2(columns))
        tile, steps = (TILE // width, width), 8 if rows >= 64 * TILE // width else 1
    blocks, row_blocks = triton.cdiv(columns, tile[1]), triton.cdiv(rows, tile[0] * steps)
    sums = None
    if want_sums:
        shape = (outer, channels, blocks) if by_row else (row_blocks, channels, inner)
        sums = dy.new_empty(shape, dtype=torch.float32)
    gradient_kernel[(row_blocks * blocks,)](
        x, b, dy, v, v_b, out, to_x, sums, bits, rows, columns, channels, inner, blocks, line_bytes, plane_bytes,
        alpha, gain, high, ORDER=order, ACT=act, CLAMPED=high != float("inf"), PLANES=planes, BY_ROW=by_row,
        ROWS=tile[0], COLUMNS=tile[1], STEPS=steps, num_warps=WARPS,
    )  # fmt: skip
    return None if sums is None else sums.sum((0, 2))


def gradient(
    x: torch.Tensor | None, b: torch.Tensor | None, dy: torch.Tensor, dx: torch.Tensor | None,
    bits: torch.Tensor | None, geometry: tuple[int, int, int], act: int, alpha: float, gain: float, high: float,
    planes: int, want_sums: bool,
) -> torch.Tensor | None:  # fmt: skip
    """Writes ``dx`` where it is wanted, and returns its sums over channels."""
    return _gradient(x, b, dy, None, None, dx, None, bits, geometry, act, alpha, gain, high, planes, want_sums, 1)


def second(
    x: torch.Tensor, b: torch.Tensor | None, dy: torch.Tensor, v: torch.Tensor | None, v_b: torch.Tensor | None,
    to_dy: torch.Tensor | None, to_x: torch.Tensor | None, geometry: tuple[int, int, int], act: int, alpha: float,
    gain: float, high: float, want_sums: bool,
) -> torch.Tensor | None:  # fmt: skip
    """Writes ``to_dy`` and ``to_x`` where they are wanted, and returns the sums of the latter over channels."""
    return _gradient(x, b, dy, v, v_b, to_dy, to_x, None, geometry, act, alpha, gain, high, 0, want_sums, 2)


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, num_warps, label) of shipped configurations, for test_aot.py."""
    for dtype, act, order, planes, by_row in (
        ("fp32", 2, 0, 1, True), ("fp32", 2, 1, 1, True), ("bf16", 2, 0, 2, True), ("bf16", 2, 1, 2, False),
        ("fp32", 7, 1, 0, True), ("fp32", 8, 2, 0, True), ("fp16", 3, 2, 0, False), ("fp32", 6, 0, 0, False),
        ("fp16", 5, 1, 0, True), ("fp32", 8, 0, 0, True),
    ):  # fmt: skip
        kernel = gradient_kernel if order else forward_kernel
        types = dict.fromkeys(kernel.arg_names, "constexpr")
        types |= dict.fromkeys(("rows", "columns", "channels", "inner", "column_blocks", "line_bytes"), "i32")
        types |= {"plane_bytes": "i64", "alpha": "fp32", "gain": "fp32", "high": "fp32", "b_ptr": "*fp32"}
        given = (
            ["x_ptr", "out_ptr"] if order == 0 else ["dy_ptr", "out_ptr"] if planes else ["x_ptr", "dy_ptr", "out_ptr"]
        )
        given += ["v_ptr", "to_x_ptr"] if order == 2 else []
        types |= dict.fromkeys(given, f"*{dtype}")
        types |= {"sums_ptr": "*fp32"} if order else {}
        types |= {"bits_ptr": "*u8"} if planes else {}
        constexprs: dict[str, Any] = {
            "ACT": act, "CLAMPED": planes != 1, "PLANES": planes, "BY_ROW": by_row, "ROWS": 1, "COLUMNS": TILE,
        }  # fmt: skip
        if order:
            constexprs |= {"ORDER": order, "STEPS": 1 if by_row else 8}
            constexprs |= {} if by_row else {"ROWS": TILE // 128, "COLUMNS": 128}
        absent = {n: None for n in kernel.arg_names if n.endswith("_ptr") and types[n] == "constexpr"}
        aligned = {n for n in kernel.arg_names if types[n].startswith("*")} | {"columns", "line_bytes"}
        attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in aligned}
        label = f"bias_act-{dtype}-{('forward', 'gradient', 'second')[order]}-{act}-{planes}-aligned"
        yield kernel, types, constexprs | absent, attrs, WARPS, label
