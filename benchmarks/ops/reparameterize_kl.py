"""Reparameterized sampling with its KL divergence, forward and backward.

Floor in element transfers: forward reads mu and logvar and writes z; backward reads dz, mu and logvar and writes two
gradients (the noise is regenerated).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import genfast
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Settings

__all__ = ["cases", "run"]

_CHECKED_ELEMENTS = 2**20


def textbook(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """What a PyTorch user writes."""
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    return z, -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=-1)


def with_backward(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(mu: Tensor, logvar: Tensor, dz: Tensor, dkl: Tensor) -> tuple[Tensor, ...]:
        z, kl = forward(mu, logvar)
        dmu, dlogvar = torch.autograd.grad((z, kl), (mu, logvar), (dz, dkl.to(kl.dtype)))
        return z, kl, dmu, dlogvar

    return call


def check(inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> str | None:
    """kl against the formula in float64; z's noise against N(0, 1); the gradients against those that z implies."""
    stride = max(1, inputs[0].numel() // _CHECKED_ELEMENTS)
    mu, logvar, *cotangents = (tensor.detach()[::stride].double() for tensor in inputs)
    z, kl, *gradients = (tensor.detach()[::stride].double() for tensor in output)
    low_precision = inputs[0].dtype in (torch.bfloat16, torch.float16)
    bound = 3e-2 if low_precision else 1e-4
    exact = 0.5 * (mu * mu + torch.expm1(logvar) - logvar).sum(-1)
    if not _close(kl, exact, bound):
        return "kl differs from 0.5 sum(mu^2 + e^logvar - 1 - logvar)"
    noise = (z - mu) / torch.exp(0.5 * logvar)
    spread = 6 / noise.numel() ** 0.5 + (bound if low_precision else 0)
    if not (abs(noise.mean()) < spread and abs(noise.var() - 1) < 1.5 * spread):
        return f"the noise has mean {noise.mean():.4f} and variance {noise.var():.4f}"
    if gradients:
        dz, dkl = cotangents
        dmu = dz + dkl.unsqueeze(-1) * mu
        dlogvar = 0.5 * dz * (z - mu) + 0.5 * dkl.unsqueeze(-1) * torch.expm1(logvar)
        if not (_close(gradients[0], dmu, bound) and _close(gradients[1], dlogvar, bound)):
            return "the gradients are not those of z and kl"
    return None


def _close(value: Tensor, exact: Tensor, bound: float) -> bool:
    return bool((value - exact).norm() <= bound * exact.norm())


def _case(shape: tuple[int, int], dtype: torch.dtype, backward: bool, settings: Settings, compiled: bool) -> Case:
    device = settings.device

    def inputs() -> tuple[Tensor, ...]:
        mu, logvar = torch.randn(shape, device=device), torch.randn(shape, device=device) * 0.7
        mu, logvar = (tensor.to(dtype).requires_grad_(backward) for tensor in (mu, logvar))
        if not backward:
            return mu, logvar
        return mu, logvar, torch.randn(shape, device=device).to(dtype), torch.rand(shape[:-1], device=device)

    contenders: dict[str, Callable[..., Any]] = {"genfast": genfast.ops.reparameterize_kl, "eager": textbook}
    if compiled and settings.compiled:
        contenders["compiled"] = torch.compile(textbook, dynamic=False)
    targets: dict[str, dict[str, float]] = {}
    if settings.device == "cpu" and backward and dtype == torch.float32:
        aims = {(1024, 512): 5.0, (128, 20): 1.5}
        targets = {"default": {"eager": aims[shape]}} if shape in aims else {}
        if shape == (4096, 4096):
            targets = {"default": {"eager": 6.0}, "kept": {"eager": 4.5}}
    elements = shape[0] * shape[1]
    return Case(
        op="reparameterize_kl",
        variant="forward+backward" if backward else "forward",
        shape=shape,
        dtype=dtype,
        inputs=inputs,
        contenders={name: with_backward(call) for name, call in contenders.items()} if backward else contenders,
        check=check,
        floor_bytes=(8 if backward else 3) * elements * dtype.itemsize + 4 * shape[0],
        targets=targets,
    )


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` leaves out the large ones and most compiled contenders."""
    if settings.quick:
        return [
            _case((1024, 512), torch.float32, False, settings, compiled=False),
            _case((1024, 512), torch.float32, True, settings, compiled=True),
            _case((128, 20), torch.float32, True, settings, compiled=False),
        ]
    shapes = [(4096, 4096), (1024, 512), (128, 20)]
    if torch.device(settings.device).type == "cuda":
        shapes.insert(0, (16384, 4096))
    found = [_case(s, torch.float32, backward, settings, compiled=True) for s in shapes for backward in (False, True)]
    return found + [_case((1024, 512), torch.bfloat16, backward, settings, compiled=True) for backward in (False, True)]


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "reparameterize_kl", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "reparameterize_kl", *sys.argv[1:]])
