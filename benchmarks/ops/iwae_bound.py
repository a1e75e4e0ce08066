"""Training an importance-weighted autoencoder: samples, log density ratios and the bound, forward and backward.

The likelihood is given (its gradient for z and itself are inputs), so that only what surrounds a decoder is timed.

Floor in element transfers, N elements of mu and K samples: forward writes z (NK), backward reads its gradient (NK); the
rest (mu, logvar and their gradients, and K log weights an example) is smaller by a factor of K or of the latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import genfast
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Settings

__all__ = ["cases", "run"]


def fused(mu: Tensor, logvar: Tensor, log_likelihood: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z, log_ratio = genfast.ops.reparameterize_log_ratio(mu, logvar, samples=len(log_likelihood))
    return z, log_ratio, genfast.ops.iwae_bound(log_likelihood + log_ratio)


def textbook(mu: Tensor, logvar: Tensor, log_likelihood: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a PyTorch user writes: the batch repeated, noise drawn and kept, both log densities."""
    samples, half_log_tau = len(log_likelihood), 0.5 * math.log(2 * math.pi)
    means, logvars = mu.repeat(samples, 1, 1), logvar.repeat(samples, 1, 1)
    z = means + torch.exp(0.5 * logvars) * torch.randn_like(means)
    log_q = (-0.5 * (z - means).square() * torch.exp(-logvars) - 0.5 * logvars - half_log_tau).sum(-1)
    log_p = (-0.5 * z.square() - half_log_tau).sum(-1)
    log_ratio = log_p - log_q
    return z, log_ratio, torch.logsumexp(log_likelihood + log_ratio, 0) - math.log(samples)


def with_backward(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(mu: Tensor, logvar: Tensor, log_likelihood: Tensor, dz: Tensor, dbound: Tensor) -> tuple[Tensor, ...]:
        z, log_ratio, bound = forward(mu, logvar, log_likelihood)
        return (
            z, log_ratio, bound, *torch.autograd.grad((z, bound), (mu, logvar, log_likelihood), (dz, dbound)),
        )  # fmt: skip

    return call


def check(inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> str | None:
    """Everything that z implies, in float64; and z's noise against N(0, 1)."""
    mu, logvar, log_likelihood, dz, dbound = (tensor.detach().double() for tensor in inputs)
    z, log_ratio, bound, *gradients = (tensor.detach().double() for tensor in output)
    noise = (z - mu) * torch.exp(-0.5 * logvar)
    spread = 6 / noise.numel() ** 0.5
    if not (abs(noise.mean()) < spread and abs(noise.var() - 1) < 1.5 * spread):
        return f"the noise has mean {noise.mean():.4f} and variance {noise.var():.4f}"
    exact = 0.5 * (noise.square() + logvar - z.square()).sum(-1)
    if not _close(log_ratio, exact):
        return "the ratio is not log p(z) - log q(z)"
    log_weights = log_likelihood + log_ratio
    if not _close(bound, torch.logsumexp(log_weights, 0) - math.log(len(z))):
        return "the bound is not the logarithm of the mean weight"
    weights = dbound * torch.softmax(log_weights, 0)
    grad = dz - weights.unsqueeze(-1) * z
    exact_gradients = (grad.sum(0), 0.5 * (grad * (z - mu)).sum(0) + 0.5 * dbound.unsqueeze(-1), weights)
    for name, got, want in zip(("mu", "logvar", "log_likelihood"), gradients, exact_gradients, strict=True):
        if not _close(got, want):
            return f"the gradient of {name} is not that of z and the bound"
    return None


def _close(value: Tensor, exact: Tensor) -> bool:
    return bool((value - exact).norm() <= 1e-4 * exact.norm())


def _case(samples: int, batch: int, latent: int, settings: Settings, compiled: bool) -> Case:
    device = settings.device

    def inputs() -> tuple[Tensor, ...]:
        mu, logvar = torch.randn(batch, latent, device=device), torch.randn(batch, latent, device=device) * 0.5
        log_likelihood = torch.randn(samples, batch, device=device) - 100
        dz, dbound = torch.randn(samples, batch, latent, device=device), torch.rand(batch, device=device)
        return mu.requires_grad_(), logvar.requires_grad_(), log_likelihood.requires_grad_(), dz, dbound

    contenders: dict[str, Callable[..., Any]] = {"genfast": fused, "eager": textbook}
    if compiled and settings.compiled:
        contenders["compiled"] = torch.compile(textbook, dynamic=False)
    target = device == "cpu" and (samples, batch, latent) == (50, 100, 50)
    return Case(
        op="iwae_bound",
        variant="forward+backward",
        shape=(samples, batch, latent),
        dtype=torch.float32,
        inputs=inputs,
        contenders={name: with_backward(call) for name, call in contenders.items()},
        check=check,
        floor_bytes=2 * samples * batch * latent * 4,
        targets={"default": {"eager": 3.0}} if target else {},
    )


def cases(settings: Settings) -> list[Case]:
    """The paper's size; ``quick`` leaves out the others."""
    found = [_case(50, 100, 50, settings, compiled=True)]
    if not settings.quick:
        found += [_case(5, 100, 50, settings, compiled=True), _case(50, 1000, 64, settings, compiled=True)]
    return found


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "iwae_bound", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "iwae_bound", *sys.argv[1:]])
