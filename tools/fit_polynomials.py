"""Fit the polynomials of the kernels and print them as C++ constants with their errors.

They are in ``csrc/common/poly.h``, ``kHazard`` in ``csrc/rbm/truncated_normal.h``.

Each polynomial is fitted here in float64 by iteratively reweighted least squares on Chebyshev nodes (close to minimax),
its coefficients rounded to float32, and its error measured with float32 Horner arithmetic. Run it to check or to change
a degree: ``python tools/fit_polynomials.py``. Triton keeps the numbers of ``poly.h`` in ``kernels/triton/noise.py``; a
test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Array = np.ndarray


def fit(
    target: Callable[[Array], Array], weight: Callable[[Array], Array], low: float, high: float, degree: int
) -> Array:
    """Coefficients (lowest order first) of a near-minimax fit of ``target`` with error weight ``weight``."""
    nodes = np.cos(np.pi * (np.arange(2000) + 0.5) / 2000)
    x = 0.5 * (high - low) * nodes + 0.5 * (high + low)
    x = x[np.abs(x) > 1e-9]
    y, w = target(x), weight(x)
    basis = np.vander(x, degree + 1, increasing=True)
    lawson = np.ones_like(x)
    for _ in range(60):
        scale = np.sqrt(lawson) * w
        coefficients = np.linalg.lstsq(basis * scale[:, None], y * scale, rcond=None)[0]
        error = np.abs((basis @ coefficients - y) * w)
        lawson = np.maximum(lawson * error / error.max(), 1e-9)
        lawson /= lawson.mean()
    return coefficients


def report(
    name: str,
    coefficients: Array,
    value: Callable[[Array, Array], Array],
    exact: Callable[[Array], Array],
    low: float,
    high: float,
) -> None:
    c = coefficients.astype(np.float32)
    x = np.linspace(low, high, 200_001).astype(np.float32)
    x = x[np.abs(x) > 1e-6]
    got = value(x, c).astype(np.float64)
    want = exact(x.astype(np.float64))
    print(f"// {name}: max relative error {np.max(np.abs(got / want - 1)):.2e} in float32 on [{low:.4f}, {high:.4f}]")
    print(f"constexpr float {name}[] = {{" + ", ".join(f"{float(v):.9g}f" for v in c) + "};")


def horner(x: Array, c: Array) -> Array:
    total = np.full_like(x, c[-1])
    for v in c[-2::-1]:
        total = total * x + v
    return total


def main() -> None:
    one = np.float32(1)
    half = 0.5 * np.log(2.0)
    # e^r = 1 + r + r^2 P(r)
    exp = fit(lambda r: (np.expm1(r) - r) / r**2, lambda r: r**2, -half, half, 4)
    report("kExp", exp, lambda r, c: one + (r + r * r * horner(r, c)), np.exp, -half, half)
    # log(1 + s) = s - s^2 / 2 + s^3 Q(s)
    low, high = np.sqrt(0.5) - 1, np.sqrt(2.0) - 1
    log = fit(lambda s: (np.log1p(s) - s + s**2 / 2) / s**3, lambda s: s**2, low, high, 8)
    report("kLog1p", log, lambda s, c: s + s * s * (s * horner(s, c) - np.float32(0.5)), np.log1p, low, high)
    # sin(2 pi t) = t S(t^2), cos(2 pi t) = 1 + t^2 C(t^2), t in turns
    sin = fit(lambda q: np.sin(2 * np.pi * np.sqrt(q)) / np.sqrt(q), lambda q: np.ones_like(q), 0.0, 1 / 64, 3)
    report("kSin", sin, lambda t, c: t * horner(t * t, c), lambda t: np.sin(2 * np.pi * t), -0.125, 0.125)
    cos = fit(lambda q: (np.cos(2 * np.pi * np.sqrt(q)) - 1) / q, lambda q: q, 0.0, 1 / 64, 3)
    report("kCos", cos, lambda t, c: one + t * t * horner(t * t, c), lambda t: np.cos(2 * np.pi * t), -0.125, 0.125)

    # e^x - 1 - x = x^2 G(x)
    def residual(x: Array) -> Array:
        total, term = np.zeros_like(x), np.full_like(x, 0.5)
        for n in range(3, 26):
            total, term = total + term, term * x / n
        return total

    expm1mx = fit(residual, lambda x: 1 / residual(x), -1.0, 1.0, 8)
    report("kExpm1MinusX", expm1mx, lambda x, c: x * x * horner(x, c), lambda x: x**2 * residual(x), -1.0, 1.0)

    # The standard normal's hazard beyond t: z P(z - 1/2), z = 3 / (t + 3)
    def excess(t: Array) -> Array:
        tail = np.zeros_like(t)
        for n in range(200, 0, -1):  # the continued fraction, for large t
            tail = n / (t + tail)
        erfc = np.vectorize(math.erfc, otypes=[float])(np.minimum(t, 5.0) * math.sqrt(0.5))
        hazard = np.exp(-0.5 * t * t) * math.sqrt(2.0 / math.pi) / erfc
        return np.where(t < 5.0, hazard - t, tail)

    def of_x(x: Array) -> Array:
        return excess(3.0 * (0.5 - x) / (x + 0.5))

    low = -0.5 + 1e-6
    hazard = fit(lambda x: of_x(x) / (x + 0.5), lambda x: (x + 0.5) / of_x(x), low, 0.5, 11)
    half_ = np.float32(0.5)
    report("kHazard", hazard, lambda x, c: (x + half_) * horner(x, c), of_x, low, 0.5)

    # The Mills ratio beyond a: w M(w - 1/2), w = 4 / (a + 4)
    def mills(x: Array) -> Array:
        a = 4.0 * (0.5 - x) / (x + 0.5)
        return 1.0 / (excess(a) + a)

    low = -0.5 + 1e-4
    ratio = fit(lambda x: mills(x) / (x + 0.5), lambda x: (x + 0.5) / mills(x), low, 0.5, 9)
    report("kMills", ratio, lambda x, c: (x + half_) * horner(x, c), mills, low, 0.5)


if __name__ == "__main__":
    main()
