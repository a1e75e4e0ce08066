"""Kinds of RBM units: their conditionals, energies and samples in plain PyTorch, the definition of every RBM kernel.

E(v, h) = E_v(v) + E_h(h) - (v / sigma^2)' W h, with sigma^2 = 1 except for Gaussian visible units, and per unit

    kind          E_v or E_h                 given input x (bias included)       log of the sum over states of e^(-E)
    bernoulli     -b v                       p(1) = sigmoid(beta x)              softplus(x)
    gaussian      (v - b)^2 / (2 sigma^2)    N(x, sigma^2 / beta)                (visible units only)
    gaussian      h^2 / 2 - c h              N(x, 1 / beta)                      x^2 / 2 + log(2 pi) / 2
    relu          h^2 / 2 - c h, h >= 0      N(x, 1 / beta) given h >= 0         the same + log Phi(x)
    softmax:K     -b v, one of K is 1        softmax(beta x)                     logsumexp over the K

Sources: Hinton, "A practical guide to training restricted Boltzmann machines", 2010; Cho, Ilin and Raiko, "Improved
learning of Gaussian-Bernoulli restricted Boltzmann machines", 2011 (Gaussian visible units); Tubiana and Monasson,
"Emergence of compositional representations in restricted Boltzmann machines", 2017 (rectified linear units with an
energy of their own, which Nair and Hinton's noisy rectified units approximate); Salakhutdinov, Mnih and Hinton,
"Restricted Boltzmann machines for collaborative filtering", 2007 (softmax units).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from genfast.ops import _noise as noise

Tensor = torch.Tensor

__all__ = [
    "BERNOULLI", "GAUSSIAN", "RELU", "SOFTMAX", "Units", "log_partition", "mean", "parse_units", "sample", "softplus",
    "visible_energy",
]  # fmt: skip

BERNOULLI, GAUSSIAN, SOFTMAX, RELU = range(4)
_KINDS = {"bernoulli": BERNOULLI, "gaussian": GAUSSIAN, "relu": RELU}
_LOG_2PI = math.log(2.0 * math.pi)


class Units(NamedTuple):
    """A kind of unit; ``categories`` is K of softmax:K, else 1."""

    kind: int
    categories: int


_BERNOULLI = Units(BERNOULLI, 1)


def parse_units(op: str, argument: str, name: str, count: Any) -> Units:
    """The kind that ``name`` names, for ``count`` units; ``TypeError`` or ``ValueError`` where it names none."""
    if name == "bernoulli":
        return _BERNOULLI
    if not isinstance(name, str):
        raise TypeError(f"{op}: {argument} must be a str, got {type(name).__name__}")
    if name in _KINDS:
        if argument == "visible" and name == "relu":
            raise ValueError(f"{op}: relu units are hidden units; visible may be bernoulli, gaussian or softmax:K")
        return Units(_KINDS[name], 1)
    head, _, tail = name.partition(":")
    if head == "softmax" and tail.isdecimal() and int(tail) > 1:
        if count % int(tail):
            raise ValueError(f"{op}: {count} {argument} units are not a multiple of the {tail} categories of {name!r}")
        return Units(SOFTMAX, int(tail))
    raise ValueError(
        f"{op}: {argument}={name!r} is unknown; choose bernoulli, gaussian, "
        + ("relu " if argument == "hidden" else "")
        + "or softmax:K with K > 1 categories"
    )


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), accurate and differentiable twice everywhere."""
    return functional.softplus(x, threshold=50.0)  # the default threshold, 20, is only right to 2e-9


def _log_normal_cdf(x: Tensor) -> Tensor:
    return torch.special.log_ndtr(x)


def mean(x: Tensor, units: Units, beta: Any = 1.0) -> Tensor:
    """E[unit | input x]: the probability of a bernoulli or softmax state. ``beta`` is broadcastable to x [..., N]."""
    if units.kind == BERNOULLI:
        return torch.sigmoid(beta * x)
    if units.kind == SOFTMAX:
        return torch.softmax((beta * x).unflatten(-1, (-1, units.categories)), -1).flatten(-2)
    if units.kind == RELU:
        scale = torch.as_tensor(beta, dtype=torch.float64, device=x.device).sqrt()
        scaled = scale * x.to(torch.float64)  # the two terms cancel where x is negative
        hazard = torch.exp(-0.5 * scaled.square() - 0.5 * _LOG_2PI - _log_normal_cdf(scaled))
        far = scaled < -100.0
        inverse = torch.where(far, scaled, -1.0).reciprocal()
        tail = -inverse + 2.0 * inverse**3 - 10.0 * inverse**5  # of the continued fraction; the next term is 74 / x^7
        return (torch.where(far, tail, scaled + hazard).clamp(min=0.0) / scale).to(x.dtype)
    return x


def sample(
    x: Tensor, units: Units, beta: Any, logvar: Tensor | None, seed: Tensor, row_offset: Any, step: Any
) -> tuple[Tensor, Tensor]:
    """(state, mean) of units with inputs x [rows, N] (float32 or float64), noise as csrc/common/philox.h has it.

    NaN inputs give NaN states.
    """
    rows, count = x.shape
    seed = seed.to(x.device)
    expected = mean(x, units, beta)
    if units.kind == GAUSSIAN:
        draws = noise.rbm_normal(seed, rows, count, row_offset, 0, step).to(x.dtype)
        if logvar is not None:
            draws = draws * torch.exp(0.5 * logvar.to(x.dtype))
        return x + draws / torch.as_tensor(beta, dtype=x.dtype, device=x.device).sqrt(), expected
    if units.kind == SOFTMAX:
        groups = count // units.categories
        uniforms = noise.rbm_uniform(seed, rows, groups, row_offset, 0, step).to(x.dtype).unsqueeze(-1)
        prob = expected.unflatten(-1, (groups, units.categories))
        chosen = (prob.cumsum(-1)[..., :-1] <= uniforms).sum(-1)
        state = functional.one_hot(chosen, units.categories).to(x.dtype).flatten(-2)
        bad = torch.isnan(prob).any(-1, keepdim=True).expand_as(prob).flatten(-2)
        return state.masked_fill(bad, math.nan), expected
    uniforms = noise.rbm_uniform(seed, rows, count, row_offset, 0, step)
    if units.kind == RELU:
        return _truncated_normal(x, beta, uniforms), expected
    state = (uniforms < expected).to(x.dtype)
    return state.masked_fill(torch.isnan(expected), math.nan), expected


def _truncated_normal(x: Tensor, beta: Any, uniforms: Tensor) -> Tensor:
    """N(x, 1 / beta) given that it is not negative, by inversion; computed in float64."""
    scale = torch.as_tensor(beta, dtype=torch.float64, device=x.device).sqrt()
    scaled = scale * x.to(torch.float64)
    left = 1.0 - uniforms.to(torch.float64)  # in (0, 1]
    inner = scaled - torch.special.ndtri(left * 0.5 * torch.special.erfc(-math.sqrt(0.5) * scaled))
    tail = -2.0 * torch.log(left) / ((scaled.square() - 2.0 * torch.log(left)).sqrt() - scaled)  # relative error 1/x^2
    return (torch.where(scaled < -30.0, tail, inner).clamp(min=0.0) / scale).to(x.dtype)


def log_partition(x: Tensor, units: Units, beta: Any = 1.0) -> Tensor:
    """log of the sum (or integral) over the states of e^(-beta E), given inputs x [..., N]: [...], differentiable."""
    if units.kind == BERNOULLI:
        return softplus(beta * x).sum(-1)
    if units.kind == SOFTMAX:
        return torch.logsumexp((beta * x).unflatten(-1, (-1, units.categories)), -1).sum(-1)
    beta = torch.as_tensor(beta, dtype=x.dtype, device=x.device)
    total = 0.5 * beta * x.square() + 0.5 * (_LOG_2PI - beta.log())
    if units.kind == RELU:
        total = total + _log_normal_cdf(beta.sqrt() * x)
    return total.sum(-1)


def visible_energy(v: Tensor, b: Tensor, units: Units, logvar: Tensor | None) -> Tensor:
    """E_v(v), [...]."""
    if units.kind == GAUSSIAN:
        squares = 0.5 * (v - b).square()
        return (squares if logvar is None else squares * torch.exp(-logvar)).sum(-1)
    return -(v @ b)
