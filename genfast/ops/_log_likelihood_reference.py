"""Log-likelihoods and their first derivatives as plain formulas in torch operations, differentiable themselves.

Canonical shapes: params [R, Q, S], Q parameters for each of S positions of a row; x [B, X, S] with R = K B (row r has
the target of row r % B); shared None, [1, S] or [B, S]. docs/kernels/log_likelihood.md has the mathematics.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from genfast._checks import wide
from genfast.ops._count_likelihood import negative_binomial, zero_inflated

__all__ = ["LIKELIHOODS", "Gradients", "reference", "reference_gradients", "tilted_mean"]

Tensor = torch.Tensor

#: In the order of csrc/vae/log_likelihood.h.
LIKELIHOODS = (
    "bernoulli",
    "continuous_bernoulli",
    "gaussian",
    "categorical",
    "discretized_logistic",
    "discretized_logistic_mixture",
    "negative_binomial",
    "zero_inflated_negative_binomial",
)
#: Log scales of discretized logistics below this act as this (Salimans et al. 2017).
LEAST_LOG_SCALE = -7.0
_LOG_TWO_PI = math.log(2.0 * math.pi)
_LARGEST_MEAN = 1e30


class Gradients(NamedTuple):
    """Of the rows' values: by params [R, Q, S], shared [R, S] and x [K, B, X, S]; None where there is none."""

    params: Tensor
    shared: Tensor | None
    x: Tensor | None


# ---- functions that keep their digits ----


def _softplus(x: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(-x)


def _decay(d: Tensor) -> Tensor:
    """(1 - e^-d) / d for d >= 0, 1 at 0."""
    small = d < 0.5
    near = torch.where(small, d, 0.0)
    far = torch.where(small, 1.0, d)
    series = torch.zeros_like(near)
    for n in range(16, -1, -1):
        series = series * -near + 1.0 / math.factorial(n + 1)
    return torch.where(small, series, -torch.expm1(-far) / far)


def _bernoulli_numbers(count: int) -> list[Fraction]:
    numbers = [Fraction(1)]
    for m in range(1, count):
        numbers.append(-sum(math.comb(m + 1, k) * numbers[k] for k in range(m)) / Fraction(m + 1))
    return numbers


#: B_2n / (2n)!, from l / 2 coth(l / 2) = sum B_2n l^2n / (2n)!.
_COTH = tuple(float(b / math.factorial(2 * n)) for n, b in enumerate(_bernoulli_numbers(25)[::2]))[1:]


def tilted_mean(logits: Tensor) -> Tensor:
    """The mean of the density proportional to e^(l x) on [0, 1]: 1 / (1 - e^-l) - 1 / l."""
    small = logits.abs() < 0.75
    near = torch.where(small, logits, 0.0)
    far = torch.where(small, 1.0, logits)
    series = torch.zeros_like(near)
    for coefficient in reversed(_COTH):
        series = series * (near * near) + coefficient
    return torch.where(small, 0.5 + near * series, 0.5 + 0.5 / torch.tanh(0.5 * far) - 1.0 / far)


# ---- likelihoods: log p and its derivatives, element by element ----


def _bernoulli(logits: Tensor, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    larger = logits.clamp(min=0)
    value = -((larger - x * logits) + torch.log1p(torch.exp(-logits.abs())))
    return value, (x - torch.sigmoid(logits),), logits


def _continuous_bernoulli(logits: Tensor, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    size = torch.where(logits < 0, -logits, logits)  # its derivative at 0 is 1, abs's 0
    value = (x * logits - torch.where(logits < 0, 0.0, logits)) - torch.log(_decay(size))
    return value, (x - tilted_mean(logits),), logits


def _gaussian(mean: Tensor, logvar: Tensor, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    root = torch.exp((-0.25 * logvar).clamp(max=709.0 if mean.dtype == torch.float64 else 88.0))
    z = (x - mean) * root * root
    value = -0.5 * (z * z + logvar + _LOG_TWO_PI)
    to_mean = z * root * root
    return value, (to_mean, 0.5 * (z * z - 1.0)), -to_mean


def _logistic_bin(
    levels: Tensor, centre: Tensor, mean: Tensor, log_scale: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """log of the logistic's mass on the bin of an 8-bit level, the outer bins open to infinity."""
    bottom, top = levels <= 0, levels >= 255
    clamped = log_scale.clamp(min=LEAST_LOG_SCALE)
    inverse = torch.exp(-clamped)
    from_mean = centre - mean.clamp(-_LARGEST_MEAN, _LARGEST_MEAN)
    plus, minus = inverse * (from_mean + 1.0 / 255.0), inverse * (from_mean - 1.0 / 255.0)
    width = (2.0 / 255.0) * inverse
    decay = _decay(width)
    below = torch.where(top, 0.0, _softplus(-plus))
    above = torch.where(bottom, 0.0, _softplus(minus))
    inside = torch.where(bottom | top, 0.0, math.log(2.0 / 255.0) - clamped + torch.log(decay))
    left = torch.where(top, 0.0, torch.sigmoid(-plus))
    right = torch.where(bottom, 0.0, torch.sigmoid(minus))
    to_mean = inverse * (right - left)
    to_scale = minus * right - plus * left - torch.where(bottom | top, 0.0, torch.exp(-width) / decay)
    return inside - below - above, (to_mean, torch.where(log_scale < LEAST_LOG_SCALE, 0.0, to_scale))


def _levels(x: Tensor, unit: bool) -> Tensor:
    return torch.round(x * 255.0) if unit else x


def _discretized_logistic(
    mean: Tensor, log_scale: Tensor, x: Tensor, unit: bool
) -> tuple[Tensor, tuple[Tensor, Tensor], None]:
    levels = _levels(x, unit)
    return *_logistic_bin(levels, levels * (2.0 / 255.0) - 1.0, mean, log_scale), None


def _categorical(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits [K, B, Q, S] and x [B, 1, S]: values [K, B, 1, S] and gradients [K, B, Q, S]."""
    log_p = torch.log_softmax(logits, -2)
    index = x.unsqueeze(0).expand(logits.shape[0], *x.shape)
    chosen = torch.arange(logits.shape[-2], device=x.device).unsqueeze(-1) == index
    return torch.gather(log_p, -2, index), chosen.to(logits.dtype) - torch.exp(log_p)


def _mixture(params: Tensor, x: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
    """Of params [K, B, Q, S] and x [B, C, S]: values [K, B, S] and gradients [K, B, Q, S]."""
    channels, size = x.shape[-2:]
    groups = 2 if channels == 1 else 3
    components = params.shape[-2] // (1 + groups * channels)
    weights, rest = params[..., :components, :], params[..., components:, :]
    rest = rest.reshape(*params.shape[:-2], channels, groups, components, size)
    means, log_scales = rest[..., 0, :, :], rest[..., 1, :, :]
    levels = _levels(x, unit).unsqueeze(-2)  # [B, C, 1, S]
    centre = levels * (2.0 / 255.0) - 1.0
    if channels == 3:
        red, green = centre[:, 0], centre[:, 1]
        coupling = torch.tanh(rest[..., 2, :, :])
        shifts = (
            torch.zeros_like(coupling[..., 0, :, :]),
            coupling[..., 0, :, :] * red,
            coupling[..., 1, :, :] * red + coupling[..., 2, :, :] * green,
        )
        means = means + torch.stack(shifts, -3)
    log_bin, (to_mean, to_scale) = _logistic_bin(levels, centre, means, log_scales)
    joint = torch.log_softmax(weights, -2) + log_bin.sum(-3)
    value = torch.logsumexp(joint, -2)
    share = torch.softmax(joint, -2)
    parts = [share.unsqueeze(-3) * to_mean, share.unsqueeze(-3) * to_scale]
    if channels == 3:
        of = torch.stack(
            (parts[0][..., 1, :, :] * red, parts[0][..., 2, :, :] * red, parts[0][..., 2, :, :] * green), -3
        )
        parts.append(of * (1.0 - coupling * coupling))
    to_rest = torch.stack(parts, -3).reshape(*params.shape[:-2], channels * groups * components, size)
    return value, torch.cat((share - torch.softmax(weights, -2), to_rest), -2)


# ---- the whole ----


def _evaluate(
    params: Tensor, shared: Tensor | None, x: Tensor, likelihood: str, logvar: float
) -> tuple[Tensor, Gradients]:
    dtype = wide(params.dtype)
    batch = x.shape[0]
    rows, planes, size = params.shape
    samples = rows // batch if batch else 1
    p = params.to(dtype).reshape(samples, batch, planes, size)
    unit = x.dtype.is_floating_point
    if likelihood == "categorical":
        value, to_params = _categorical(p, x)
        return value.reshape(rows, -1).sum(-1), Gradients(to_params.reshape(params.shape), None, None)
    target = x.to(dtype)
    if likelihood == "discretized_logistic_mixture":
        value, to_params = _mixture(p, target, unit)
        return value.reshape(rows, -1).sum(-1), Gradients(to_params.reshape(params.shape), None, None)
    target = target.squeeze(1)
    own = [p[..., i, :] for i in range(planes)]
    second = None if shared is None else shared.to(dtype)
    to_x: Tensor | None = None
    to: Any
    if likelihood == "bernoulli":
        value, to, to_x = _bernoulli(own[0], target)
    elif likelihood == "continuous_bernoulli":
        value, to, to_x = _continuous_bernoulli(own[0], target)
    elif likelihood == "gaussian":
        if second is None:
            second = own[1] if planes == 2 else p.new_tensor(logvar)
        value, to, to_x = _gaussian(own[0], second, target)
    elif likelihood == "discretized_logistic":
        value, to, to_x = _discretized_logistic(own[0], own[1], target, unit)
    elif likelihood == "negative_binomial":
        value, to = negative_binomial(own[0], own[1] if second is None else second, target)
    else:
        value, to = zero_inflated(own[0], own[1] if second is None else second, own[-1], target)
    to = [t.expand_as(value) for t in to]
    to_shared = to.pop(1).reshape(rows, size) if shared is not None else None
    return value.reshape(rows, -1).sum(-1), Gradients(
        torch.stack(to[:planes], -2).reshape(params.shape), to_shared, None if to_x is None else to_x.unsqueeze(-2)
    )


def reference(params: Tensor, shared: Tensor | None, x: Tensor, likelihood: str, logvar: float = 0.0) -> Tensor:
    """log p of each row in float32 (float64 for float64), differentiable: the oracle of every backend."""
    return _evaluate(params, shared, x, likelihood, logvar)[0]


def reference_gradients(
    params: Tensor, shared: Tensor | None, x: Tensor, likelihood: str, logvar: float = 0.0
) -> Gradients:
    """The derivatives of each row's own value, in float32 (float64 for float64), differentiable."""
    return _evaluate(params, shared, x, likelihood, logvar)[1]
