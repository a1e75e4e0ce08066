"""The negative binomial and its zero-inflated form in torch operations, stable for any mean and dispersion.

mu = e^a, theta = e^b (variance mu + mu^2 / theta), w = a - b:

    log p(x) = lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) - theta softplus(w) - x softplus(-w)

For theta >= 32 the first two terms are x b + D with D by Stirling's series, so that the Poisson limit is reached
without cancellation; below, lgamma(theta) = lgamma(1 + theta) - b.
"""

from __future__ import annotations

import math

import torch

__all__ = ["negative_binomial", "zero_inflated"]

Tensor = torch.Tensor

_LOG_LARGE = math.log(32.0)


def _series(v: Tensor, coefficients: list[float], bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """(where v < bound, the polynomial there, v elsewhere and the bound there)."""
    small = v < bound
    near = torch.where(small, v, 0.0)
    total = torch.zeros_like(near)
    for c in reversed(coefficients):
        total = total * near + c
    return small, total, torch.where(small, bound, v)


def _log1p_ratio_minus(u: Tensor) -> Tensor:
    """log(1 + u) / u - 1 for u >= 0."""
    small, series, far = _series(u, [0.0] + [(-1.0) ** n / (n + 1) for n in range(1, 16)], 0.125)
    return torch.where(small, series, torch.log1p(far) / far - 1.0)


def _excess(v: Tensor) -> Tensor:
    """(v / (1 + v) - log(1 + v)) / v^2 for v in [0, 1]."""
    small, series, far = _series(v, [(-1.0) ** (n + 1) * (n + 1) / (n + 2) for n in range(18)], 0.125)
    return torch.where(small, series, (far / (1.0 + far) - torch.log1p(far)) / (far * far))


def _softplus(x: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(-x)


def _exp_at_most(x: Tensor, chosen: Tensor) -> Tensor:
    """e^x where chosen; elsewhere 1, without an infinity that a derivative would meet."""
    return torch.exp(torch.where(chosen, x, 0.0))


def _lgamma_tail(h: Tensor) -> Tensor:
    """lgamma(1 / h) - ((1 / h - 1/2) log(1 / h) - 1 / h + log(2 pi) / 2)."""
    s = h * h
    return h * (1 / 12 - s * (1 / 360 - s * (1 / 1260 - s / 1680)))


def _digamma_tail(h: Tensor) -> Tensor:
    """(log(1 / h) - h / 2 - digamma(1 / h)) / h."""
    s = h * h
    return h * (1 / 12 - s * (1 / 120 - s * (1 / 252 - s / 240)))


def negative_binomial(a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """log p(x) and its derivatives by a = log mean and b = log inverse dispersion."""
    a, b, x = torch.broadcast_tensors(a, b, x)
    w = a - b
    below = w < 0  # the mean is below theta
    v = _exp_at_most(w, below)
    # theta softplus(w) and theta sigmoid(w)
    mean, theta_above = _exp_at_most(a, below), _exp_at_most(b, ~below)
    w_above = torch.where(below, 0.0, w)
    loss = torch.where(below, mean * (1.0 + _log1p_ratio_minus(v)), theta_above * _softplus(w_above))
    slope = torch.where(below, mean * torch.sigmoid(-w), theta_above * torch.sigmoid(w_above))
    bent = torch.where(
        below, _exp_at_most(a + w, below) * _excess(v), theta_above * (torch.sigmoid(w_above) - _softplus(w_above))
    )

    large, some = b >= _LOG_LARGE, x > 0
    # theta >= 32, with h = 1 / theta and k = 1 / (x + theta)
    h = _exp_at_most(-b, large)
    u = torch.where(large, x, 0.0) * h
    k = h / (1.0 + u)
    log1p_u = torch.log1p(u)
    ratio = _log1p_ratio_minus(u)
    rising = x * ratio + (x - 0.5) * log1p_u + _lgamma_tail(k) - _lgamma_tail(h)
    lowered = torch.minimum(a, b) - torch.log1p(torch.exp(-w.abs()))  # a + b - log(mu + theta)
    rise_large = rising + x * lowered
    turn_large = x * (1.0 + ratio) + 0.5 * x * k + _digamma_tail(h) - _digamma_tail(k) / (1.0 + u)
    # theta < 32
    near = ~large & some
    theta = _exp_at_most(b, near)
    count = torch.where(near, x, 1.0)
    rise_small = torch.lgamma(count + theta) - torch.lgamma(1.0 + theta) + b - x * _softplus(-w)
    turn_small = theta * (torch.digamma(count + theta) - torch.digamma(1.0 + theta)) + 1.0

    rise = torch.where(some, torch.where(large, rise_large, rise_small), 0.0)
    turn = torch.where(some, torch.where(large, turn_large, turn_small), 0.0)
    drawn = x * torch.sigmoid(-w)
    value = rise - torch.lgamma(x + 1.0) - loss
    return value, (drawn - slope, bent + (turn - drawn))


def zero_inflated(a: Tensor, b: Tensor, logit: Tensor, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The same where x is 0 with probability sigmoid(logit) whatever the mean; derivatives by a, b and logit."""
    value, (to_a, to_b) = negative_binomial(a, b, x)
    zero = x.expand_as(value) <= 0
    at_zero = torch.where(zero, value, 0.0)
    counted = torch.sigmoid(at_zero - logit)  # the share of a zero that the counts explain
    none = logit - torch.nn.functional.logsigmoid(logit - at_zero)
    weight = torch.where(zero, counted, 1.0)
    inflation = torch.sigmoid(logit)
    gone = weight == 0
    to_a, to_b = (torch.where(gone, 0.0, weight * torch.where(gone, 0.0, to)) for to in (to_a, to_b))
    total = torch.where(zero, none, value) - _softplus(logit)
    return total, (to_a, to_b, torch.where(zero, (1.0 - counted) - inflation, -inflation))
