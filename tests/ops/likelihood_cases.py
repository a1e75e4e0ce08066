"""Targets and parameters of every likelihood, for the tests."""

from __future__ import annotations

import torch

UNIT = ("bernoulli", "continuous_bernoulli")
LEVELS = ("discretized_logistic", "discretized_logistic_mixture")
COUNTS = ("negative_binomial", "zero_inflated_negative_binomial")
#: name: (parameters a channel, channels)
SIZES = {
    "bernoulli": 1, "continuous_bernoulli": 1, "gaussian": 2, "categorical": 5, "discretized_logistic": 2,
    "discretized_logistic_mixture": 10, "negative_binomial": 2, "zero_inflated_negative_binomial": 3,
}  # fmt: skip
LIKELIHOODS = tuple(SIZES)


def target(likelihood, shape, dtype=torch.float32):
    """x of the shape [B, C, ...]."""
    if likelihood in UNIT:
        return torch.rand(shape, dtype=torch.float64).to(dtype)
    if likelihood == "gaussian":
        return torch.randn(shape, dtype=torch.float64).to(dtype)
    if likelihood == "categorical":
        return torch.randint(5, shape)
    if likelihood in LEVELS:
        return torch.randint(-60, 316, shape).clamp(0, 255).to(torch.uint8)
    return torch.poisson(torch.full(shape, 2.0, dtype=torch.float64)).to(dtype)


def make(likelihood, shape, samples=None, dtype=torch.float32, scale=1.0, components=2):
    """(decoder_out, x) for x of the shape [B, C, ...] or, of one dimension, [B]."""
    x = target(likelihood, shape, dtype)
    if likelihood == "categorical":
        out = (shape[0], 5, *shape[1:])
    elif likelihood == "discretized_logistic_mixture":
        out = (shape[0], components * (3 if shape[1] == 1 else 10), *shape[2:])
    else:
        times = SIZES[likelihood]
        out = (shape[0], times * shape[1], *shape[2:]) if times > 1 else shape
    out = out if samples is None else (samples, *out)
    return (scale * torch.randn(out, dtype=torch.float64)).to(dtype), x


def planes(likelihood, out, x):
    """The decoder's parameters, each like x, in float64."""
    channel = 1 + out.dim() - x.dim()
    return [t.double() for t in out.chunk(SIZES[likelihood], channel)]
