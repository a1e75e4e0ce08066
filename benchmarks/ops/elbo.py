"""The ELBO of a VAE, forward and backward: Bernoulli logits, and a mixture of ten discretized logistics.

Floor in element transfers: the parameters and the targets are read once and the gradient is written once, in the
forward pass. The latents are small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

import genfast
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Settings

__all__ = ["cases", "run"]

LATENTS = 32


def _kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def bernoulli(out: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """What a PyTorch user writes."""
    return (binary_cross_entropy_with_logits(out, x, reduction="sum") + _kl(mu, logvar)) / len(x)


def mixture(out: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """The same for three channels of 8-bit levels: every component's bin of every pixel, then logsumexp."""
    batch, planes, *size = out.shape
    m = planes // 10
    weights, rest = out[:, :m], out[:, m:].reshape(batch, 3, 3 * m, *size)
    means, log_scales, coupling = rest.split(m, 2)
    coupling = coupling.tanh()
    levels = (x.float() * (2 / 255) - 1).unsqueeze(2)
    red, green = levels[:, 0], levels[:, 1]
    means = torch.stack(
        (means[:, 0], means[:, 1] + coupling[:, 0] * red, means[:, 2] + coupling[:, 1] * red + coupling[:, 2] * green),
        1,
    )
    log_scales = log_scales.clamp(min=-7)
    inverse = torch.exp(-log_scales)
    centred = levels - means
    plus, minus = inverse * (centred + 1 / 255), inverse * (centred - 1 / 255)
    width = inverse * (2 / 255)
    inside = logsigmoid(plus) - softplus(minus) + torch.log(-torch.expm1(-width))
    # As PixelCNN++: the density at the bin's middle where the bin's mass has no digits left.
    log_p = torch.where(levels < -0.999, logsigmoid(plus), torch.where(levels > 0.999, -softplus(minus), inside))
    joint = log_p.sum(1) + weights.log_softmax(1)
    return (_kl(mu, logvar) - joint.logsumexp(1).sum()) / batch


PLAIN: dict[str, Callable[..., Tensor]] = {"bernoulli": bernoulli, "discretized_logistic_mixture": mixture}


def _fused(likelihood: str) -> Callable[..., Tensor]:
    return lambda out, x, mu, logvar: genfast.ops.elbo(out, x, mu, logvar, likelihood=likelihood).loss


def with_backward(forward: Callable[..., Tensor]) -> Callable[..., Any]:
    def call(out: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        loss = forward(out, x, mu, logvar)
        return loss.detach(), *torch.autograd.grad(loss, (out, mu, logvar))

    return call


def checker(likelihood: str) -> Callable[..., str | None]:
    """The loss and the gradients against the plain formula in float64."""

    def check(inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> str | None:
        wide = [
            t.detach().double().requires_grad_(i != 1) if i != 1 or likelihood == "bernoulli" else t
            for i, t in enumerate(inputs)
        ]
        exact = with_backward(PLAIN[likelihood])(*wide)
        names = ("loss", "gradient of decoder_out", "gradient of mu", "gradient of logvar")
        bound = 2e-2 if inputs[0].dtype in (torch.bfloat16, torch.float16) else 1e-4
        for name, got, want in zip(names, output, exact, strict=True):
            if not (got.double() - want).norm() <= bound * want.norm():
                return f"the {name} differs from the formula in float64"
        return None

    return check


def _case(likelihood: str, shape: tuple[int, ...], dtype: torch.dtype, settings: Settings, compiled: bool) -> Case:
    device, batch = settings.device, shape[0]
    plain = PLAIN[likelihood]

    def inputs() -> tuple[Tensor, ...]:
        mu, logvar = (torch.randn(batch, LATENTS, device=device).to(dtype).requires_grad_() for _ in range(2))
        if likelihood == "bernoulli":
            out, x = torch.randn(shape, device=device), torch.rand(shape, device=device).to(dtype)
        else:
            out = torch.randn(batch, 100, *shape[2:], device=device)
            out[:, 10:] *= 0.5
            x = torch.randint(256, shape, dtype=torch.uint8, device=device)
        return out.to(dtype).requires_grad_(), x, mu, logvar

    contenders: dict[str, Callable[..., Any]] = {"genfast": _fused(likelihood), "eager": plain}
    if compiled and settings.compiled:
        contenders["compiled"] = torch.compile(plain, dynamic=False)
    elements = 1
    for n in shape:
        elements *= n
    if likelihood == "bernoulli":
        floor = 3 * elements * dtype.itemsize
    else:
        floor = 2 * (elements // 3 * 100) * dtype.itemsize + elements
    targets: dict[str, dict[str, float]] = {}
    if settings.device == "cpu" and dtype == torch.float32 and compiled:
        large = elements > 1 << 20
        aims = {"eager": 5.5, "compiled": 2.2} if large else {"eager": 3.7, "compiled": 2.4}
        aims = aims if likelihood == "bernoulli" else {"eager": 5.0, "compiled": 2.0}
        targets = {"default": aims, "kept": aims}
    return Case(
        op="elbo",
        variant=f"{likelihood}, forward+backward",
        shape=shape,
        dtype=dtype,
        inputs=inputs,
        contenders={name: with_backward(call) for name, call in contenders.items()},
        check=checker(likelihood),
        floor_bytes=floor,
        targets=targets,
    )


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` leaves out the large ones."""
    logistics = "discretized_logistic_mixture"
    if settings.quick:
        return [
            _case("bernoulli", (128, 784), torch.float32, settings, compiled=False),
            _case(logistics, (2, 3, 16, 16), torch.float32, settings, compiled=False),
        ]
    return [
        _case("bernoulli", (256, 3, 64, 64), torch.float32, settings, compiled=True),
        _case("bernoulli", (1024, 784), torch.float32, settings, compiled=True),
        _case("bernoulli", (1024, 784), torch.bfloat16, settings, compiled=True),
        _case(logistics, (32, 3, 32, 32), torch.float32, settings, compiled=True),
    ]


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    # The gradient is a fresh tensor in each step; from a megabyte on, faults of its pages cost as much as the kernel.
    settings = dataclasses.replace(settings, large_bytes=min(settings.large_bytes, 2**20))
    return harness.run_cases(cases, settings, "elbo", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "elbo", *sys.argv[1:]])
