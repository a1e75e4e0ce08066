"""genfast's counter-based noise and its elementary functions, as Triton device functions.

Layouts, uniforms and normals are those of ``csrc/common/philox.h``; polynomials are those of ``csrc/common/poly.h``
(e^r alone comes from the hardware's 2^r). Words and uniforms match every other backend bit for bit, normals match a
float64 evaluation to 1e-6. ``philox`` equals ``tl.philox`` on 32-bit counters; written with 64-bit products, a round
takes two wide multiplications instead of four.

One call gives the four words of a group, so kernels compute on [rows, groups] and ``interleave4`` spreads the results
to [rows, 4 * groups]; a thread then owns four neighbours, which is one 128-bit access in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

TENSOR_NORMAL = tl.constexpr(1)
TENSOR_UNIFORM = tl.constexpr(2)
RBM_UNIT = tl.constexpr(3)

LOG1P = tl.constexpr(
    (
        0.333333105,
        -0.249999866,
        0.200022265,
        -0.16669251,
        0.142186582,
        -0.123843484,
        0.118729763,
        -0.117898077,
        0.0691536814,
    )
)
SIN = tl.constexpr((6.28318548, -41.3416634, 81.5925522, -75.4020691))
COS = tl.constexpr((-19.7392082, 64.9393234, -85.4437408, 59.2459602))
EXPM1_MINUS_X = tl.constexpr(
    (
        0.5,
        0.166666672,
        0.0416666679,
        0.00833334494,
        0.0013888859,
        0.000198370486,
        2.48043689e-05,
        2.81230018e-06,
        2.77125224e-07,
    )
)
LOG2E = tl.constexpr(1.44269504)
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)
LN2 = tl.constexpr(0.693147181)
# 1.5 * 2^23 + 127: adding it rounds to an integer n and leaves n + 127, the exponent field of 2^n, in the low bits.
_ROUND = tl.constexpr(12583039.0)


@triton.jit
def horner(x, C: tl.constexpr, N: tl.constexpr):
    """The polynomial of the N coefficients ``C``, lowest order first."""
    total = x * C[N - 1] + C[N - 2]
    for i in tl.static_range(2, N):
        total = total * x + C[N - 1 - i]
    return total


@triton.jit
def as_int64(x):
    """An integer scalar as int64, whether the compiler sees a value, a constant or (interpreting) a Python int."""
    return tl.full((), 0, tl.int64) + x


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Philox4x32-10 of uint32 counters under the key (low, high) of the 64-bit ``seed``."""
    seed = seed.to(tl.uint64)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def tensor_words(group, step, STREAM: tl.constexpr, seed):
    """Words of the tensor layout; ``group`` is the 64-bit flat index // 4."""
    low = group.to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    return philox(low, high, tl.zeros_like(low) + as_int64(step).to(tl.uint32), tl.zeros_like(low) + STREAM, seed)


@triton.jit
def rbm_words(unit_group, chain, step, seed):
    """Words of the RBM layout; ``unit_group`` and ``chain`` broadcast against each other."""
    zero = tl.zeros_like(unit_group.to(tl.uint32) + chain.to(tl.uint32))
    return philox(
        zero + unit_group.to(tl.uint32),
        zero + chain.to(tl.uint32),
        zero + as_int64(step).to(tl.uint32),
        zero + RBM_UNIT,
        seed,
    )


@triton.jit
def interleave4(x0, x1, x2, x3):
    """Four [R, G] tiles to [R, 4 G]; element 4 g + w of a row is ``x<w>[g]``."""
    x = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.reshape(x, (x0.shape[0], 4 * x0.shape[1]))


@triton.jit
def uniform24(word):
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-8


@triton.jit
def clamp(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """``x`` limited to [LOW, HIGH]; NaN stays NaN."""
    x = tl.minimum(x, HIGH, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, LOW, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def power_of_two(t):
    return (t.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    """e^x for -87 <= x <= 88, relative error 2e-7."""
    t = x * LOG2E + _ROUND
    n = t - _ROUND
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    return tl.exp2(r * LOG2E) * power_of_two(t)


@triton.jit
def exp_quarter(x):
    """(e^(x/4) limited to e^88, hence finite, and e^x / 2, infinite only on overflow), relative error 3e-7."""
    x = clamp(x, -344.0, 352.0)
    t = x * (LOG2E * 0.25) + _ROUND
    n = t - _ROUND
    r = (x - n * (LN2_HIGH * 4.0)) - n * (LN2_LOW * 4.0)
    scale = power_of_two(t)
    square = scale * scale
    return tl.exp2(r * (LOG2E * 0.25)) * scale, (tl.exp2(r * LOG2E) * (square * 0.5)) * square


@triton.jit
def half_expm1_minus_x(x, half_exp):
    """(e^x - 1 - x) / 2 without cancellation; ``half_exp`` is e^x / 2."""
    half = x * 0.5
    return tl.where(tl.abs(x) <= 1.0, (half * x) * horner(x, EXPM1_MINUS_X, 9), half_exp - 0.5 - half)


@triton.jit
def half_expm1(x, half_exp):
    """(e^x - 1) / 2, likewise."""
    half = x * 0.5
    return tl.where(tl.abs(x) <= 1.0, (half * x) * horner(x, EXPM1_MINUS_X, 9) + half, half_exp - 0.5)


@triton.jit
def box_muller(a, b):
    """Two independent normals from two words; the radius is accurate at both ends of (0, 1]."""
    # ln u, u = (a + 1) 2^-32. From sqrt(1/2) up, s = u - 1 comes exactly from the complement.
    near_one = a >= 0xB504F334
    x = tl.where(near_one, a ^ 0xFFFFFFFF, a + 1).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000
    mantissa = (bits - exponent).to(tl.float32, bitcast=True)
    s = tl.where(near_one, x * -2.3283064365386963e-10, mantissa - 1.0)
    e = tl.where(near_one, 0.0, exponent.to(tl.float32) * 1.1920928955078125e-7 - 32.0)
    s2 = s * s
    log_u = e * LN2 + (s + s2 * (s * horner(s, LOG1P, 9) - 0.5))
    radius = tl.sqrt(log_u * -2.0)
    # Angle in turns: the nearest quarter, and the rest in [-1/8, 1/8].
    t = (b << 2).to(tl.int32, bitcast=True).to(tl.float32) * 5.820766091346741e-11
    t2 = t * t
    sine = t * horner(t2, SIN, 4)
    cosine = t2 * horner(t2, COS, 4) + 1.0
    quarter = b + 0x20000000
    swap = (quarter & 0x40000000) != 0
    sine, cosine = tl.where(swap, cosine, sine), tl.where(swap, sine, cosine)
    sine_sign = quarter & 0x80000000
    cosine_sign = (quarter + 0x40000000) & 0x80000000
    sine = (sine.to(tl.uint32, bitcast=True) ^ sine_sign).to(tl.float32, bitcast=True)
    cosine = (cosine.to(tl.uint32, bitcast=True) ^ cosine_sign).to(tl.float32, bitcast=True)
    return radius * cosine, radius * sine


@triton.jit
def tensor_normals(group, step, seed):
    """Standard normals [R, 4 G] at the groups [R, G] of the tensor layout."""
    w0, w1, w2, w3 = tensor_words(group, step, TENSOR_NORMAL, seed)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return interleave4(n0, n1, n2, n3)
