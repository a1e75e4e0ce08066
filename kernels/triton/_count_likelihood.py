"""The negative binomial, plain or zero-inflated, for log_likelihood.py: csrc/vae/count_likelihood.cpp has the formulas.

In float64 whatever the storage, because the terms are of size x log x and their sum is not. The loops of the C++ are
unrolled and masked here: log gamma and its derivative climb by fifteen steps from 1 to 16, the logarithm of the climbed
product and its derivative being taken once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from genfast.kernels.triton import noise

LOG_LARGE = tl.constexpr(3.4657359027997265)  # log 32
HALF_LOG_TWO_PI = tl.constexpr(0.91893853320467274178)


@triton.jit
def _log1p(u):
    """log(1 + u) for u >= 0."""
    w = 1.0 + u
    off = w - 1.0
    lost = off == 0.0
    return tl.where(lost, u, tl.log(w) * (u / tl.where(lost, 1.0, off)))


@triton.jit
def _sigmoid(x):
    y = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + y)
    return tl.where(x < 0.0, y * r, r)


@triton.jit
def _softplus(x):
    return tl.where(x > 0.0, x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _log1p_ratio_minus(u):
    """log(1 + u) / u - 1 for u >= 0."""
    near, total = tl.where(u > 0.125, 0.0, u), tl.zeros_like(u)
    for i in tl.static_range(15):
        total = total * -near + 1.0 / (16 - i)
    far = tl.where(u > 0.125, u, 1.0)
    return tl.where(u > 0.125, _log1p(far) / far - 1.0, -near * total)


@triton.jit
def _excess(v):
    """(v / (1 + v) - log(1 + v)) / v^2 for v in [0, 1]."""
    near, total = tl.where(v > 0.125, 0.0, v), tl.zeros_like(v)
    for i in tl.static_range(18):
        total = total * -near + (18.0 - i) / (19.0 - i)
    far = tl.where(v > 0.125, v, 1.0)
    return tl.where(v > 0.125, (far / (1.0 + far) - _log1p(far)) / (far * far), -total)


@triton.jit
def _lgamma_tail(h):
    s = h * h
    return h * (1.0 / 12 - s * (1.0 / 360 - s * (1.0 / 1260 - s / 1680.0)))


@triton.jit
def _digamma_tail(h):
    s = h * h
    return h * (1.0 / 12 - s * (1.0 / 120 - s * (1.0 / 252 - s / 240.0)))


@triton.jit
def _gammas(z):
    """(log gamma, its derivative) of z >= 1."""
    start = z
    product, slope = tl.full(z.shape, 1.0, tl.float64), tl.zeros_like(z)
    for _ in tl.static_range(15):
        low = z < 16.0
        slope = tl.where(low, slope * z + product, slope)
        product = tl.where(low, product * z, product)
        z = tl.where(low, z + 1.0, z)
    h, log = 1.0 / z, tl.log(z)
    value = (z - 0.5) * log - z + HALF_LOG_TWO_PI + _lgamma_tail(h) - tl.log(product)
    exact = (start == 1.0) | (start == 2.0)  # as for counts of 0 and 1
    return tl.where(exact, 0.0, value), log - h * (0.5 + _digamma_tail(h)) - slope / product


@triton.jit
def _negative_binomial(a, b, x):
    """(log p(x), its derivatives by a = log mean and b = log theta)."""
    w = a - b
    drawn = x * _sigmoid(-w)
    under = w < 0.0
    mean, theta = tl.exp(tl.where(under, a, 0.0)), tl.exp(tl.where(under, 0.0, b))
    v = tl.exp(tl.where(under, w, 0.0))
    soft, part = _softplus(w), _sigmoid(w)
    loss = tl.where(under, mean * (1.0 + _log1p_ratio_minus(v)), theta * soft)
    slope = tl.where(under, mean * _sigmoid(-w), theta * part)
    bent = tl.where(under, tl.exp(tl.where(under, a + w, 0.0)) * _excess(v), theta * (part - soft))

    large, some = b >= LOG_LARGE, x > 0.0
    h = tl.exp(-tl.where(large, b, 0.0))
    u = tl.where(large & some, x, 0.0) * h
    k = h / (1.0 + u)
    ratio = _log1p_ratio_minus(u)
    lowered = tl.where(under, a, b) - _log1p(tl.exp(-tl.abs(w)))
    rise_large = x * ratio + (x - 0.5) * _log1p(u) + _lgamma_tail(k) - _lgamma_tail(h) + x * lowered
    turn_large = x * (1.0 + ratio) + 0.5 * x * k + _digamma_tail(h) - _digamma_tail(k) / (1.0 + u)

    near = some & (b < LOG_LARGE)
    theta = tl.exp(tl.where(near, b, 0.0))
    total = tl.where(near, x, 1.0) + theta
    short = total < 1.0  # where a count is not whole
    z = tl.where(short, total + 1.0, total)
    lost = tl.where(short, total, 1.0)
    above, above_slope = _gammas(z)
    base, base_slope = _gammas(1.0 + theta)
    rise_near = (above - tl.log(lost)) - base + b - x * _softplus(-w)
    turn_near = theta * ((above_slope - tl.where(short, 1.0 / lost, 0.0)) - base_slope) + 1.0

    rise = tl.where(some, tl.where(large, rise_large, rise_near), 0.0)
    turn = tl.where(some, tl.where(large, turn_large, turn_near), 0.0)
    factorial, _slope = _gammas(tl.where(x > 0.0, x, tl.where(x == x, 0.0, x)) + 1.0)
    return rise - factorial - loss, drawn - slope, bent + (turn - drawn)


@triton.jit
def _zero_inflated(a, b, logit, x):
    """The same where x is 0 with probability sigmoid(logit) whatever the mean; derivatives by a, b and logit."""
    value, to_a, to_b = _negative_binomial(a, b, x)
    inflation, zero = _sigmoid(logit), x <= 0.0
    gap = tl.where(zero, value, 0.0) - logit
    share = tl.where(zero, _sigmoid(gap), 1.0)  # of a zero that the counts explain
    gone = share == 0.0
    to_a, to_b = tl.where(gone, 0.0, share * to_a), tl.where(gone, 0.0, share * to_b)
    value = tl.where(zero, logit + _softplus(gap), value) - _softplus(logit)
    return value, to_a, to_b, tl.where(zero, (1.0 - share) - inflation, -inflation)


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _store(pointer, at, mask, value):
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["factor"])
def count_kernel(
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
    factor,
    PLANES: tl.constexpr,
    ZEROS: tl.constexpr,
    N: tl.constexpr,
):
    """A program owns N positions of one row; the planes are log mean [, log theta] [, logit of the zeros]."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks) * N + tl.arange(0, N)
    mask, x_row = column < size, row % x_rows
    at = row * PLANES * size + column
    last = at + (PLANES - 1) * noise.as_int64(size)
    x = _load(x_ptr, x_row * size + column, mask)
    a = _load(params_ptr, at, mask)
    if shared_ptr is None:
        b = _load(params_ptr, at + size, mask)
    else:
        b = _load(shared_ptr, tl.where(shared_rows == 1, 0, x_row) * size + column, mask)
    if ZEROS:
        term, to_a, to_b, to_logit = _zero_inflated(a, b, _load(params_ptr, last, mask), x)
    else:
        term, to_a, to_b = _negative_binomial(a, b, x)
        to_logit = to_b
    term = tl.where((x < 0.0) | (x == float("inf")), float("nan"), term)
    tl.store(value_ptr + tl.program_id(0), tl.sum(tl.where(mask, term, 0.0), axis=0).to(tl.float32))
    if to_params_ptr is not None:
        _store(to_params_ptr, at, mask, factor * to_a)
        if shared_ptr is None:
            _store(to_params_ptr, at + size, mask, factor * to_b)
        if ZEROS:
            _store(to_params_ptr, last, mask, factor * to_logit)
    if to_shared_ptr is not None:
        _store(to_shared_ptr, row * size + column, mask, factor * to_b)
