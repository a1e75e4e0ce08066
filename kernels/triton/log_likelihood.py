"""log p(x | parameters) of each row and its gradient, in one pass; docs/kernels/log_likelihood.md has the mathematics.

params are [rows, planes, size], x [x_rows, targets, size], and row r has the target of row r % x_rows. Gradients are
those of a row's own value times ``factor``. A target outside of the likelihood's set makes the row's value NaN.

Floor: the bytes, parameters and targets in, the gradient out.

Tiling: a program owns N positions of one row and leaves one partial sum, [rows, chunks], added by torch: no atomics.
Classes and components are walked twice, first for the sum over them, then for the gradient; the second reading comes
from the second cache. scale_kernel leaves rows alone whose cotangent is the one that was expected.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from genfast.kernels.triton import noise
from genfast.kernels.triton._count_likelihood import count_kernel

WARPS = 4
NAMES = ("bernoulli", "continuous_bernoulli", "gaussian", "categorical", "discretized_logistic",
         "discretized_logistic_mixture", "negative_binomial", "zero_inflated_negative_binomial")  # fmt: skip
MOST = {3: 256, 5: 128, 6: 128, 7: 128}  # positions of a program, 1,024 where nothing is said
HALF_BIN = tl.constexpr(1.0 / 255.0)
LOG_BIN = tl.constexpr(-4.8481163)
COTH = tl.constexpr((1.0 / 12, -1.0 / 720, 1.0 / 30240, -1.0 / 1209600, 1.0 / 47900160, -5.284190e-10))


@triton.jit
def _log1p_unit(y):
    """log(1 + y) for y in [0, 1]."""
    low = y < 0.41421354
    s = tl.where(low, y, (y - 1.0) * 0.5)
    log = (s * s) * (s * noise.horner(s, noise.LOG1P, 9) - 0.5) + s
    return log + tl.where(low, 0.0, noise.LN2)


@triton.jit
def _exp(x):
    """e^x of x limited to [-87, 88]."""
    return noise.exp(noise.clamp(x, -87.0, 88.0))


@triton.jit
def _decay(d, y):
    """(1 - e^-d) / d for d >= 0, given y = e^-d."""
    near = 1.0 - d * noise.horner(-d, noise.EXPM1_MINUS_X, 9)
    return tl.where(d < 1.0, near, (1.0 - y) / tl.where(d < 1.0, 1.0, d))


@triton.jit
def _levels(x, UNIT: tl.constexpr):
    """(8-bit levels, whether they are none)."""
    if UNIT:
        x = x * 255.0
    level = tl.floor(x + 0.5)
    return level, (level < 0.0) | (level > 255.0) | (tl.abs(x - level) > 0.125)


@triton.jit
def _logistic_bin(level, mean, log_scale):
    """(log mass of the level's bin, its derivatives by mean and log scale)."""
    bottom, top = level < 0.5, level > 254.5
    outer = bottom | top
    clamped = tl.maximum(log_scale, -7.0, propagate_nan=tl.PropagateNan.ALL)
    inverse = _exp(-clamped)
    from_mean = level * (2.0 / 255.0) - 1.0 - noise.clamp(mean, -1e30, 1e30)
    plus, minus = inverse * (from_mean + HALF_BIN), inverse * (from_mean - HALF_BIN)
    y_plus, y_minus = _exp(-tl.abs(plus)), _exp(-tl.abs(minus))
    r_plus, r_minus = 1.0 / (1.0 + y_plus), 1.0 / (1.0 + y_minus)
    width = inverse * (2.0 / 255.0)
    y = _exp(-width)
    f = _decay(width, y)
    left = tl.where(top, 0.0, tl.where(plus > 0.0, y_plus * r_plus, r_plus))
    right = tl.where(bottom, 0.0, tl.where(minus > 0.0, r_minus, y_minus * r_minus))
    slope = minus * right - plus * left - tl.where(outer, 0.0, y / f)
    product = tl.where(top, 1.0, r_plus) * tl.where(bottom, 1.0, r_minus) * tl.where(outer, 1.0, f)
    lost = tl.where(top, 0.0, tl.maximum(-plus, 0.0)) + tl.where(bottom, 0.0, tl.maximum(minus, 0.0))
    value = tl.log(product) + tl.where(outer, 0.0, LOG_BIN - clamped) - lost
    return value, inverse * (right - left), tl.where(log_scale < -7.0, 0.0, slope)


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, at, mask, value):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _place(size, chunks, x_rows, N: tl.constexpr):
    """(row, its target's row, positions, mask)."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks) * N + tl.arange(0, N)
    return row, row % x_rows, column, column < size


@triton.jit(do_not_specialize=["logvar", "factor"])
def element_kernel(
    params_ptr,
    shared_ptr,
    x_ptr,
    value_ptr,
    to_params_ptr,
    to_shared_ptr,
    size,
    chunks,
    x_rows,
    shared_rows,
    logvar,
    factor,
    KIND: tl.constexpr,
    PLANES: tl.constexpr,
    UNIT: tl.constexpr,
    N: tl.constexpr,
):
    row, x_row, column, mask = _place(size, chunks, x_rows, N)
    at = row * PLANES * size + column
    first = _load(params_ptr, at, mask)
    x = _load(x_ptr, x_row * size + column, mask)
    factor = tl.full((1,), factor, tl.float32)
    second = first
    bad = x != x
    if KIND == 0 or KIND == 1:
        bad = (x < 0.0) | (x > 1.0)
        size_of = tl.abs(first)
        larger = tl.maximum(first, 0.0, propagate_nan=tl.PropagateNan.ALL) - x * first
        if KIND == 0:
            y = _exp(-size_of)
            term = -(larger + _log1p_unit(y))
            r = 1.0 / (1.0 + y)
            to_first = x - tl.where(first < 0.0, y * r, r)
        else:
            size_of = tl.minimum(size_of, 1e37, propagate_nan=tl.PropagateNan.ALL)
            y = _exp(-size_of)
            term = -larger - tl.log(_decay(size_of, y))
            small = size_of < 1.5
            short = tl.where(small, first, 0.0)
            near = 0.5 + short * noise.horner(short * short, COTH, 6)
            inverse = 1.0 / tl.where(small, 1.0, size_of)
            spread = 1.0 / tl.where(small, 1.0, 1.0 - y)
            far = tl.where(first < 0.0, inverse - y * spread, spread - inverse)
            to_first = x - tl.where(small, near, far)
        to_second = to_first
    elif KIND == 2:
        if PLANES == 2:
            second = _load(params_ptr, at + size, mask)
        elif shared_ptr is not None:
            second = _load(shared_ptr, tl.where(shared_rows == 1, 0, x_row) * size + column, mask)
        else:
            second = tl.full((N,), logvar, tl.float32)
        root = _exp(second * -0.25)
        z = (x - first) * root * root
        term = -0.5 * (z * z + second + 1.8378770664)
        to_first = z * root * root
        to_second = 0.5 * (z * z - 1.0)
    else:
        second = _load(params_ptr, at + size, mask)
        level, bad = _levels(x, UNIT)
        term, to_first, to_second = _logistic_bin(level, first, second)
    if KIND != 2:
        term = tl.where(bad, float("nan"), term)
    tl.store(value_ptr + tl.program_id(0), tl.sum(tl.where(mask, term, 0.0), axis=0))
    if to_params_ptr is not None:
        _store(to_params_ptr, at, mask, factor * to_first)
        if PLANES == 2:
            _store(to_params_ptr, at + size, mask, factor * to_second)
    if to_shared_ptr is not None:
        _store(to_shared_ptr, row * size + column, mask, factor * to_second)


@triton.jit(do_not_specialize=["factor", "planes"])
def categorical_kernel(
    params_ptr, x_ptr, value_ptr, to_params_ptr, size, chunks, x_rows, planes, factor, N: tl.constexpr
):
    row, x_row, column, mask = _place(size, chunks, x_rows, N)
    at = row * planes * size + column
    x = tl.load(x_ptr + x_row * size + column, mask=mask, other=0)
    bad = (x < 0) | (x >= planes)
    factor = tl.full((1,), factor, tl.float32)
    most = tl.full((N,), float("-inf"), tl.float32)
    total, chosen = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32)
    for q in range(0, planes):
        logit = _load(params_ptr, at + q * noise.as_int64(size), mask)
        higher = tl.maximum(most, logit, propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp(most - higher) + tl.exp(logit - higher)
        most = higher
        chosen = tl.where(x == q, logit, chosen)
    term = tl.where(bad, float("nan"), (chosen - most) - tl.log(total))
    tl.store(value_ptr + tl.program_id(0), tl.sum(tl.where(mask, term, 0.0), axis=0))
    if to_params_ptr is not None:
        for q in range(0, planes):
            place = at + q * noise.as_int64(size)
            p = tl.exp(_load(params_ptr, place, mask) - most) / total
            _store(to_params_ptr, place, mask, factor * (tl.where(x == q, 1.0, 0.0) - p))


@triton.jit
def _tanh(x):
    """(tanh, its derivative)."""
    y = _exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + y)
    size = (1.0 - y) * r
    return tl.where(x < 0.0, -size, size), 4.0 * y * r * r


@triton.jit
def _component(params_ptr, at, size, components, m, mask, red, green, blue, CHANNELS: tl.constexpr):
    """One component: (log mass, then by channel the derivatives by mean and log scale, then the couplings' slopes)."""
    groups: tl.constexpr = 2 if CHANNELS == 1 else 3
    plane = at + (components + m) * noise.as_int64(size)
    step = components * noise.as_int64(size)
    log_p, m0, s0 = _logistic_bin(red, _load(params_ptr, plane, mask), _load(params_ptr, plane + step, mask))
    m1, s1, m2, s2 = m0, s0, m0, s0
    d0, d1, d2 = m0, m0, m0
    if CHANNELS == 3:
        x0, x1 = red * (2.0 / 255.0) - 1.0, green * (2.0 / 255.0) - 1.0
        t0, d0 = _tanh(_load(params_ptr, plane + 2 * step, mask))
        t1, d1 = _tanh(_load(params_ptr, plane + (groups + 2) * step, mask))
        t2, d2 = _tanh(_load(params_ptr, plane + (2 * groups + 2) * step, mask))
        mean = _load(params_ptr, plane + groups * step, mask) + t0 * x0
        one, m1, s1 = _logistic_bin(green, mean, _load(params_ptr, plane + (groups + 1) * step, mask))
        mean = _load(params_ptr, plane + 2 * groups * step, mask) + t1 * x0 + t2 * x1
        two, m2, s2 = _logistic_bin(blue, mean, _load(params_ptr, plane + (2 * groups + 1) * step, mask))
        log_p += one + two
        d0, d1, d2 = m1 * x0 * d0, m2 * x0 * d1, m2 * x1 * d2
    return log_p, m0, s0, d0, m1, s1, d1, m2, s2, d2


@triton.jit(do_not_specialize=["factor", "components"])
def mixture_kernel(
    params_ptr,
    x_ptr,
    value_ptr,
    to_params_ptr,
    size,
    chunks,
    x_rows,
    components,
    factor,
    CHANNELS: tl.constexpr,
    UNIT: tl.constexpr,
    N: tl.constexpr,
):
    row, x_row, column, mask = _place(size, chunks, x_rows, N)
    at = row * components * (3 if CHANNELS == 1 else 10) * size + column
    x_at = x_row * CHANNELS * size + column
    factor = tl.full((1,), factor, tl.float32)
    red, bad = _levels(_load(x_ptr, x_at, mask), UNIT)
    green, blue = red, red
    if CHANNELS == 3:
        green, bad_green = _levels(_load(x_ptr, x_at + size, mask), UNIT)
        blue, bad_blue = _levels(_load(x_ptr, x_at + 2 * noise.as_int64(size), mask), UNIT)
        bad = bad | bad_green | bad_blue
    step = components * noise.as_int64(size)
    heaviest = tl.full((N,), float("-inf"), tl.float32)
    most = heaviest
    weights, total = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32)
    for m in range(0, components):
        weight = _load(params_ptr, at + m * noise.as_int64(size), mask)
        log_p, _m0, _s0, _d0, _m1, _s1, _d1, _m2, _s2, _d2 = _component(
            params_ptr, at, size, components, m, mask, red, green, blue, CHANNELS
        )
        joint = weight + log_p
        higher = tl.maximum(heaviest, weight, propagate_nan=tl.PropagateNan.ALL)
        weights = weights * tl.exp(heaviest - higher) + tl.exp(weight - higher)
        heaviest = higher
        higher = tl.maximum(most, joint, propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp(most - higher) + tl.exp(joint - higher)
        most = higher
    term = tl.where(bad, float("nan"), (most - heaviest) + (tl.log(total) - tl.log(weights)))
    tl.store(value_ptr + tl.program_id(0), tl.sum(tl.where(mask, term, 0.0), axis=0))
    if to_params_ptr is not None:
        for m in range(0, components):
            place = at + m * noise.as_int64(size)
            weight = _load(params_ptr, place, mask)
            log_p, m0, s0, d0, m1, s1, d1, m2, s2, d2 = _component(
                params_ptr, at, size, components, m, mask, red, green, blue, CHANNELS
            )
            share = factor * tl.exp(weight + log_p - most) / total
            _store(to_params_ptr, place, mask, share - factor * tl.exp(weight - heaviest) / weights)
            _store(to_params_ptr, place + step, mask, share * m0)
            _store(to_params_ptr, place + 2 * step, mask, share * s0)
            if CHANNELS == 3:
                _store(to_params_ptr, place + 3 * step, mask, share * d0)
                _store(to_params_ptr, place + 4 * step, mask, share * m1)
                _store(to_params_ptr, place + 5 * step, mask, share * s1)
                _store(to_params_ptr, place + 6 * step, mask, share * d1)
                _store(to_params_ptr, place + 7 * step, mask, share * m2)
                _store(to_params_ptr, place + 8 * step, mask, share * s2)
                _store(to_params_ptr, place + 9 * step, mask, share * d2)


@triton.jit(do_not_specialize=["held"])
def scale_kernel(values_ptr, cotangent_ptr, event, chunks, held, N: tl.constexpr):
    row = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks) * N + tl.arange(0, N)
    cotangent = tl.load(cotangent_ptr + row).to(tl.float32)
    ratio = cotangent / held
    # One rounding away from what was expected counts as it: 1 / n is rounded in more than one way.
    if tl.abs(ratio - 1.0) > 1.2e-7 or ratio != ratio:
        at, mask = row * event + column, column < event
        value = _load(values_ptr, at, mask)
        _store(values_ptr, at, mask, tl.where(cotangent == 0.0, 0.0, value * ratio))


def _positions(size: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(max(size, 1))))


def run(
    params: torch.Tensor,
    shared: torch.Tensor | None,
    x: torch.Tensor,
    likelihood: str,
    logvar: float,
    factor: float,
    to_params: torch.Tensor | None,
    to_shared: torch.Tensor | None,
) -> torch.Tensor:
    """The rows' values; writes the gradients that are not None. params and x are contiguous and not empty."""
    rows, planes, size = params.shape
    kind, unit = NAMES.index(likelihood), x.dtype.is_floating_point
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    n = _positions(size, MOST.get(kind, 1024))
    chunks = triton.cdiv(size, n)
    partial = params.new_empty((rows, chunks), dtype=torch.float32)
    grid = (rows * chunks,)
    if kind == 3:
        categorical_kernel[grid](
            params, x, partial, to_params, size, chunks, x.shape[0], planes, factor, N=n, num_warps=WARPS
        )
    elif kind == 5:
        channels = x.shape[1]
        mixture_kernel[grid](
            params, x, partial, to_params, size, chunks, x.shape[0], planes // (3 if channels == 1 else 10), factor,
            CHANNELS=channels, UNIT=unit, N=n, num_warps=WARPS,
        )  # fmt: skip
    elif kind > 5:
        count_kernel[grid](
            params, shared, x, partial, to_params, to_shared, size, chunks, x.shape[0],
            1 if shared is None else shared.shape[0], factor, PLANES=planes, ZEROS=kind == 7, N=n, num_warps=WARPS,
        )  # fmt: skip
    else:
        element_kernel[grid](
            params, shared, x, partial, to_params, to_shared, size, chunks, x.shape[0],
            1 if shared is None else shared.shape[0], logvar, factor, KIND=kind, PLANES=planes, UNIT=unit, N=n,
            num_warps=WARPS,
        )  # fmt: skip
    return partial.view(rows) if chunks == 1 else partial.sum(1)


def scale_rows_(values: torch.Tensor, cotangent: torch.Tensor, held: float) -> None:
    """values [R, ...] times cotangent [R] / held, in place; contiguous and not empty."""
    rows = cotangent.shape[0]
    event = values.numel() // rows
    n = _positions(event, 1024)
    chunks = triton.cdiv(event, n)
    scale_kernel[(rows * chunks,)](values, cotangent, event, chunks, held, N=n, num_warps=WARPS)


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, num_warps, label) of shipped configurations, for the tests."""
    element = {"UNIT": True, "N": 1024, "shared_ptr": None, "to_shared_ptr": None}
    mixture = {"UNIT": False, "N": 128}
    count = {"N": 128, "PLANES": 2}
    own = {"shared_ptr": None, "to_shared_ptr": None}
    for kernel, dtype, x_type, constexprs, label in (
        (element_kernel, "fp32", "fp32", element | {"KIND": 0, "PLANES": 1}, "bernoulli"),
        (element_kernel, "bf16", "fp32", element | {"KIND": 0, "PLANES": 1}, "bernoulli"),
        (element_kernel, "fp32", "fp32", element | {"KIND": 1, "PLANES": 1}, "continuous"),
        (element_kernel, "fp32", "fp32", element | {"KIND": 2, "PLANES": 2}, "gaussian"),
        (element_kernel, "fp16", "u8", element | {"KIND": 4, "PLANES": 2, "UNIT": False}, "logistic"),
        (categorical_kernel, "fp32", "i64", {"N": 256}, "categorical"),
        (mixture_kernel, "fp32", "u8", mixture | {"CHANNELS": 3}, "mixture-3"),
        (mixture_kernel, "bf16", "u8", mixture | {"CHANNELS": 1}, "mixture-1"),
        (count_kernel, "fp32", "fp32", count | own | {"ZEROS": False}, "counts"),
        (count_kernel, "bf16", "u8", count | {"ZEROS": True}, "zero-inflated"),
        (scale_kernel, "fp32", "fp32", {"N": 1024}, "scale"),
    ):
        types = {"params_ptr": f"*{dtype}", "values_ptr": f"*{dtype}", "to_params_ptr": f"*{dtype}",
                 "x_ptr": f"*{x_type}", "value_ptr": "*fp32", "cotangent_ptr": "*fp32", "shared_ptr": "*fp32",
                 "to_shared_ptr": "*fp32"}  # fmt: skip
        numbers = {"logvar": "fp32", "factor": "fp32", "held": "fp32"}
        signature = {
            n: "constexpr" if n in constexprs else types.get(n, numbers.get(n, "i32")) for n in kernel.arg_names
        }
        attrs = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(kernel.arg_names)
            if signature[n].startswith("*") or n in ("size", "event")
        }
        yield kernel, signature, constexprs, attrs, WARPS, f"log_likelihood-{dtype}-{label}-aligned"
