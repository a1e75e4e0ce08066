"""Upsampling, leaky ReLU and downsampling of images, the tangent of that and its transpose, in one pass.

    FORWARD    out = D act(U (v + v_bias))        act(a) = clamp(gain (a > 0 ? a : slope a), -limit, limit)
    TANGENT    out = D (m . U (v + v_bias))       m = act'(U (gate + gate_bias))
    TRANSPOSE  out = U' (m . D' v)                U', D' the transposes

In all three, with two filters g and h (turned by 180 degrees unless they correlate) and their paddings,

    mid[m] = scale sum_p g[UP p + pad - m] v[p]        out[i] = out_scale sum_m h[m - STEP i + pad] act(mid[m])

along either axis; for the transpose g is the filter of the downsampling, UP its factor, and STEP that of upsampling.

Floor: the bytes, v (and the gate) in and out out. The upsampled image is never in memory.

Tiling: a program owns rows x columns outputs of one plane and walks down its rows of the upsampled image MID_Y at a
time. It loads the pixels that they depend on (a halo of taps / up on each side) and multiplies with banded matrices of
filter taps: two products make MID_Y rows of the upsampled image, one adds them, filtered and decimated, to the sums of
the output rows, and a last one filters those along themselves. Tensor cores run them, each product in float32 by three
of TF32. A matrix has an entry for every pair of rows, most of them zero, so that the arithmetic is several times that
of the filters; ``tile_of`` takes the tile with the least of it. Zero times what is not finite is NaN: a pixel that is
not finite may spoil all outputs of its tile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

FORWARD, TANGENT, TRANSPOSE = (tl.constexpr(i) for i in range(3))
LARGEST = 64  # columns of a tile
TALLEST = 32  # rows of a chunk
MOST_ROWS = 16  # of outputs of a tile
OVERHEAD = 8192  # multiplications that a chunk costs besides its own


@triton.jit
def _product(a, b, total=None):
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def _weights(f_ptr, k, TAPS: tl.constexpr, CORRELATE: tl.constexpr):
    """Taps k of a filter, zero where it has none."""
    known = (k >= 0) & (k < TAPS)
    if not CORRELATE:
        k = TAPS - 1 - k
    return tl.load(f_ptr + k, mask=known, other=0.0)


@triton.jit
def _start(mid, pad, UP: tl.constexpr):
    """(the first sample that row ``mid`` of the upsampled image may meet, its tap)."""
    at = pad - mid
    tap = (at % UP + UP) % UP
    return (tap - at) // UP, tap.to(tl.int32)  # exact


@triton.jit
def _pixels(ptr, bias, row, column, height, width, row_stride, column_stride):
    """A tile of one plane, zero outside the image."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    x = tl.load(ptr + row * row_stride + column * column_stride, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, x + bias, 0.0)


@triton.jit
def _slope(a, gain, slope, limit, CLAMPED: tl.constexpr):
    """act'(a)."""
    factor = tl.where(a > 0.0, gain, gain * slope)
    if CLAMPED:
        factor = tl.where(tl.abs(a * factor) > limit, 0.0, factor)
    return factor


@triton.jit(do_not_specialize=["v_pad_y", "v_pad_x", "gate_pad_y", "gate_pad_x", "out_pad_y", "out_pad_x"])
def filtered_lrelu_kernel(
    v_ptr,
    v_bias_ptr,
    gate_ptr,
    gate_bias_ptr,
    v_filter_ptr,
    gate_filter_ptr,
    out_filter_ptr,
    out_ptr,
    channels,
    v_height,
    v_width,
    gate_height,
    gate_width,
    mid_height,
    mid_width,
    out_height,
    out_width,
    v_batch,
    v_channel,
    v_row,
    v_column,
    gate_batch,
    gate_channel,
    gate_row,
    gate_column_stride,
    out_batch,
    out_channel,
    out_row,
    out_column,
    v_pad_y,
    v_pad_x,
    gate_pad_y,
    gate_pad_x,
    out_pad_y,
    out_pad_x,
    v_scale,
    gate_scale,
    out_scale,
    gain,
    slope,
    limit,
    rows,
    columns,
    row_tiles,
    column_tiles,
    chunks,
    MODE: tl.constexpr,
    CORRELATE: tl.constexpr,
    CLAMPED: tl.constexpr,
    UP_Y: tl.constexpr,
    UP_X: tl.constexpr,
    V_TAPS: tl.constexpr,
    GATE_UP_Y: tl.constexpr,
    GATE_UP_X: tl.constexpr,
    GATE_TAPS: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    OUT_TAPS: tl.constexpr,
    V_Y: tl.constexpr,
    V_X: tl.constexpr,
    GATE_Y: tl.constexpr,
    GATE_X: tl.constexpr,
    MID_Y: tl.constexpr,
    MID_X: tl.constexpr,
    OUT_Y: tl.constexpr,
    OUT_X: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # channels first: their pixels are neighbours where channels come last
    channel = program % channels
    rest = program // channels
    first_column = rest % column_tiles * columns
    rest = rest // column_tiles
    first_row = rest % row_tiles * rows
    batch = rest // row_tiles
    v_ptr += batch * v_batch + channel * v_channel
    top = first_row * STEP_Y - out_pad_y  # of the tile of the upsampled image
    left = first_column * STEP_X - out_pad_x
    mid_y = tl.arange(0, MID_Y)
    mid_x = tl.arange(0, MID_X)
    out_y = tl.arange(0, OUT_Y)
    out_x = tl.arange(0, OUT_X)
    v_bias = tl.zeros((1, 1), tl.float32)
    if v_bias_ptr is not None:
        v_bias += tl.load(v_bias_ptr + channel)

    own_correlate: tl.constexpr = CORRELATE if MODE != TRANSPOSE else not CORRELATE
    begin_x, tap_x = _start(left, v_pad_x, UP_X)
    column = begin_x + tl.arange(0, V_X)[None, :]
    up_x = _weights(
        v_filter_ptr, tap_x + UP_X * tl.arange(0, V_X)[:, None] - mid_x[None, :], V_TAPS, own_correlate
    )  # fmt: skip
    gate_column = column
    gate_up_x = up_x
    gate_bias = v_bias
    if MODE != FORWARD:
        gate_ptr += batch * gate_batch + channel * gate_channel
        gate_bias = tl.zeros((1, 1), tl.float32)
        if gate_bias_ptr is not None:
            gate_bias += tl.load(gate_bias_ptr + channel)
    if MODE == TRANSPOSE:
        begin_x, tap_x = _start(left, gate_pad_x, GATE_UP_X)
        gate_column = begin_x + tl.arange(0, GATE_X)[None, :]
        gate_up_x = _weights(
            gate_filter_ptr, tap_x + GATE_UP_X * tl.arange(0, GATE_X)[:, None] - mid_x[None, :], GATE_TAPS, CORRELATE
        )  # fmt: skip
    filtered = tl.zeros((OUT_Y, MID_X), tl.float32)  # along columns
    for chunk in tl.range(chunks, num_stages=1):
        above = chunk * MID_Y
        begin_y, tap_y = _start(top + above, v_pad_y, UP_Y)
        row = begin_y + tl.arange(0, V_Y)[:, None]
        k_y = tap_y + UP_Y * tl.arange(0, V_Y)[None, :] - mid_y[:, None]
        up_y = _weights(v_filter_ptr, k_y, V_TAPS, own_correlate)
        v = _pixels(v_ptr, v_bias, row, column, v_height, v_width, v_row, v_column)
        a = _product(_product(up_y, v), up_x) * v_scale
        if MODE == FORWARD:
            a = tl.where(a > 0.0, a, a * slope) * gain
            if CLAMPED:
                a = tl.minimum(a, limit, propagate_nan=tl.PropagateNan.ALL)
                a = tl.maximum(a, -limit, propagate_nan=tl.PropagateNan.ALL)
        else:
            if MODE == TRANSPOSE:
                begin_y, tap_y = _start(top + above, gate_pad_y, GATE_UP_Y)
                row = begin_y + tl.arange(0, GATE_Y)[:, None]
                k_y = tap_y + GATE_UP_Y * tl.arange(0, GATE_Y)[None, :] - mid_y[:, None]
                up_y = _weights(gate_filter_ptr, k_y, GATE_TAPS, CORRELATE)
            g = _pixels(gate_ptr, gate_bias, row, gate_column, gate_height, gate_width, gate_row, gate_column_stride)
            g = _product(_product(up_y, g), gate_up_x) * gate_scale
            a *= _slope(g, gain, slope, limit, CLAMPED)
        place = top + above + mid_y
        k_y = tl.where((place >= 0) & (place < mid_height), above + mid_y, -1)[None, :] - STEP_Y * out_y[:, None]
        filtered = _product(_weights(out_filter_ptr, k_y, OUT_TAPS, own_correlate), a, filtered)
    k_x = tl.where((left + mid_x >= 0) & (left + mid_x < mid_width), mid_x, -1)[:, None] - STEP_X * out_x[None, :]
    out = _product(filtered, _weights(out_filter_ptr, k_x, OUT_TAPS, own_correlate)) * out_scale
    row = first_row + out_y[:, None]
    column = first_column + out_x[None, :]
    mask = (out_y[:, None] < rows) & (row < out_height) & (out_x[None, :] < columns) & (column < out_width)
    out_ptr += batch * out_batch + channel * out_channel
    tl.store(out_ptr + row * out_row + column * out_column, out.to(out_ptr.dtype.element_ty), mask=mask)


class Axis(NamedTuple):
    """A tile along one axis: how many outputs, chunks of the upsampled image, and the sizes of the products."""

    count: int
    chunks: int
    v: int
    gate: int
    mid: int
    out: int


def warps_of(y: Axis, x: Axis) -> int:
    """Enough that operands stay in registers."""
    return 4 if max(x.v, x.gate) * x.mid <= 1024 else 8


def _rounded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _axes(
    size: int, step: int, out_taps: int, up: int, taps: int, gate_up: int, gate_taps: int, mids: tuple[int, ...]
) -> list[Axis]:
    """What fits. gate_up 0: no gate of its own; mids: sizes of chunks, none: one chunk."""
    found: dict[tuple[int, ...], Axis] = {}
    limit = TALLEST if mids else LARGEST
    for count in range(1, min(size, MOST_ROWS if mids else limit) + 1):
        rows = (count - 1) * step + out_taps
        for mid in mids or (rows,):
            v = (mid + taps - 2) // up + 1
            gate = (mid + gate_taps - 2) // gate_up + 1 if gate_up else 1
            kind = triton.cdiv(rows, mid), _rounded(v), _rounded(gate), _rounded(mid), _rounded(count)
            if max(v, gate, mid) <= limit:
                found[kind] = Axis(count, *kind)  # the largest count of its kind
    return list(found.values())


@functools.lru_cache(maxsize=1024)
def tile_of(
    size: tuple[int, int], step: tuple[int, int], out_taps: int, up: tuple[int, int], taps: int,
    gate_up: tuple[int, int], gate_taps: int, same_up: bool,
) -> tuple[Axis, Axis]:  # fmt: skip
    """The tile (along y, along x) with the least arithmetic in all; pairs are (y, x). same_up: of the tangent."""

    def cost(y: Axis, x: Axis) -> float:
        tiles = triton.cdiv(size[0], y.count) * triton.cdiv(size[1], x.count)
        chunk = (y.mid * y.v * x.v + y.mid * x.v * x.mid) * (2 if same_up else 1) + y.out * y.mid * x.mid
        if gate_up[0]:
            chunk += y.mid * y.gate * x.gate + y.mid * x.gate * x.mid
        whole = y.chunks * (chunk + OVERHEAD) + y.out * x.mid * x.out + OVERHEAD
        return float(tiles * whole)

    rows, columns = (
        _axes(size[i], step[i], out_taps, up[i], taps, gate_up[i], gate_taps, mids)
        for i, mids in enumerate(((MOST_ROWS, TALLEST), ()))
    )
    return min(((y, x) for y in rows for x in columns), key=lambda pair: cost(*pair))


def run(
    v: torch.Tensor, v_bias: torch.Tensor | None, gate: torch.Tensor | None, gate_bias: torch.Tensor | None,
    fu: torch.Tensor, fd: torch.Tensor, out: torch.Tensor, mode: int, mid_size: tuple[int, int], up: tuple[int, int],
    down: tuple[int, int], pad: tuple[int, int], correlate: bool, gain: float, slope: float, limit: float,
) -> None:  # fmt: skip
    """Writes ``out``; pairs are (y, x), filters [taps] and contiguous."""
    batch, channels, height, width = out.shape
    scale = float(up[0] * up[1])
    if mode == TRANSPOSE.value:
        first, factors, steps, second = fd, down, up, fu
        pads = (fd.shape[0] - 1,) * 2, (fu.shape[0] - 1 - pad[0], fu.shape[0] - 1 - pad[1])
        scales, gate_up, gate_taps = (1.0, scale, scale), up, fu.shape[0]
    else:
        first, factors, steps, second = fu, up, down, fd
        pads = pad, (0, 0)
        scales, gate_up, gate_taps = (scale, scale, 1.0), (0, 0), 1
    same_up = mode == TANGENT.value
    taps, out_taps = first.shape[0], second.shape[0]
    y, x = tile_of((height, width), steps, out_taps, factors, taps, gate_up, gate_taps, same_up)
    tiles = triton.cdiv(height, y.count), triton.cdiv(width, x.count)
    filtered_lrelu_kernel[(batch * channels * tiles[0] * tiles[1],)](
        v,
        v_bias,
        gate,
        gate_bias,
        first,
        fu,
        second,
        out,
        channels,
        *v.shape[2:],
        *((0, 0) if gate is None else gate.shape[2:]),
        *mid_size,
        height,
        width,
        *v.stride(),
        *((0, 0, 0, 0) if gate is None else gate.stride()),
        *out.stride(),
        *pads[0],
        *pad,
        *pads[1],
        *scales,
        gain,
        slope,
        limit,
        y.count,
        x.count,
        *tiles,
        y.chunks,
        MODE=mode,
        CORRELATE=correlate,
        CLAMPED=limit != float("inf"),
        UP_Y=factors[0],
        UP_X=factors[1],
        V_TAPS=taps,
        GATE_UP_Y=up[0],
        GATE_UP_X=up[1],
        GATE_TAPS=fu.shape[0],
        STEP_Y=steps[0],
        STEP_X=steps[1],
        OUT_TAPS=out_taps,
        V_Y=y.v,
        V_X=x.v,
        GATE_Y=y.gate,
        GATE_X=x.gate,
        MID_Y=y.mid,
        MID_X=x.mid,
        OUT_Y=y.out,
        OUT_X=x.out,
        num_warps=warps_of(y, x),
    )


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, num_warps, label) of shipped configurations, for the tests."""
    names = filtered_lrelu_kernel.arg_names
    for dtype, mode, up, down, up_taps, down_taps, last in (
        ("fp32", 0, 2, 2, 12, 12, False),
        ("fp32", 1, 2, 2, 4, 4, False),
        ("fp32", 2, 2, 2, 12, 12, False),
        ("bf16", 0, 2, 2, 4, 4, True),
        ("fp16", 1, 2, 2, 12, 12, False),
        ("bf16", 2, 4, 2, 24, 12, False),
        ("fp32", 2, 1, 1, 8, 8, False),
        ("fp16", 0, 1, 4, 4, 32, True),
    ):
        back = mode == TRANSPOSE.value
        steps, factors = (up, down) if back else (down, up)
        taps, out_taps = (down_taps, up_taps) if back else (up_taps, down_taps)
        gate_up, gate_taps = ((up, up), up_taps) if back else ((0, 0), 1)
        y, x = tile_of(
            (512, 512), (steps, steps), out_taps, (factors, factors), taps, gate_up, gate_taps, mode == TANGENT.value
        )
        types = {name: "i32" for name in names if name.islower()}
        types |= dict.fromkeys(("v_ptr", "out_ptr", *(("gate_ptr",) if mode else ())), f"*{dtype}")
        types |= dict.fromkeys(("v_filter_ptr", "gate_filter_ptr", "out_filter_ptr"), "*fp32")
        types |= {("gate_bias_ptr" if mode else "v_bias_ptr"): "*fp32"}
        types |= dict.fromkeys(("v_scale", "gate_scale", "out_scale", "gain", "slope", "limit"), "fp32")
        constexprs: dict[str, Any] = {
            "MODE": mode, "CORRELATE": False, "CLAMPED": taps != 4, "UP_Y": factors, "UP_X": factors, "V_TAPS": taps,
            "GATE_UP_Y": up, "GATE_UP_X": up, "GATE_TAPS": up_taps, "STEP_Y": steps, "STEP_X": steps,
            "OUT_TAPS": out_taps,
            "V_Y": y.v, "V_X": x.v, "GATE_Y": y.gate, "GATE_X": x.gate, "MID_Y": y.mid, "MID_X": x.mid,
            "OUT_Y": y.out, "OUT_X": x.out,
        }  # fmt: skip
        units = (
            ("v_channel", "gate_channel", "out_channel") if last else ("v_column", "gate_column_stride", "out_column")
        )
        constexprs |= dict.fromkeys(units, 1)
        constexprs |= {n: None for n in names if n.endswith("_ptr") and types[n] == "i32"}
        types |= dict.fromkeys(constexprs, "constexpr")
        even = {f"{of}_{name}" for of in ("v", "gate", "out") for name in ("batch", "channel", "row", "column")}
        even.add("gate_column_stride")
        attrs = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if types.get(n, "").startswith("*") or (n in even and types[n] == "i32")
        }
        label = f"filtered_lrelu-{dtype}-{('forward', 'tangent', 'transpose')[mode]}-{up}-{down}-{up_taps}-{down_taps}"
        yield (
            filtered_lrelu_kernel,
            {n: types.get(n, "constexpr") for n in names},
            constexprs,
            attrs,
            warps_of(y, x),
            label,
        )
