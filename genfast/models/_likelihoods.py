"""What the VAE family knows of a likelihood: how wide a decoder must be, and the mean of p(x|z)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LIKELIHOODS", "check_likelihood", "mean", "parameters"]

#: Parameters a decoder gives for each value of x.
LIKELIHOODS = {"bernoulli": 1, "continuous_bernoulli": 1, "gaussian": 2, "discretized_logistic": 2}


def check_likelihood(op: str, likelihood: str) -> str:
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"{op}: likelihood must be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}; "
            "genfast.ops.elbo has the others"
        )
    return likelihood


def parameters(likelihood: str) -> int:
    return LIKELIHOODS[likelihood]


def mean(decoder_out: Tensor, likelihood: str, dim: int) -> Tensor:
    """The mean of p(x|z), in x's units; ``dim`` is that of the channels of x."""
    if likelihood == "bernoulli":
        return torch.sigmoid(decoder_out)
    if likelihood == "continuous_bernoulli":
        return _tilted(decoder_out)
    centre = decoder_out.chunk(2, dim)[0]
    return centre if likelihood == "gaussian" else ((centre + 1.0) / 2.0).clamp(0.0, 1.0)


def _tilted(logits: Tensor) -> Tensor:
    """The mean of the density proportional to e^(logits x) on [0, 1]."""
    small = logits.abs() < 1e-2
    far = torch.where(small, 1.0, logits)
    return torch.where(small, 0.5 + logits / 12.0, 0.5 + 0.5 / torch.tanh(0.5 * far) - 1.0 / far)
