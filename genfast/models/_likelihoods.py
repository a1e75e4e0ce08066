"""What the VAE family knows of a likelihood: how wide a decoder must be, and the mean of p(x|z)."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.ops._log_likelihood_reference import tilted_mean

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
        return tilted_mean(decoder_out)
    centre = decoder_out.chunk(2, dim)[0]
    return centre if likelihood == "gaussian" else ((centre + 1.0) / 2.0).clamp(0.0, 1.0)
