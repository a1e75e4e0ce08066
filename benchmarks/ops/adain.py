"""Adaptive instance normalization of the feature maps of style transfer, forward and backward.

Floor: forward reads x and writes out, backward reads x and the cotangent and writes the gradient.
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


def eager(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The usual formula."""
    variance, center = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    return std[..., None, None] * (x - center) / (variance + 1e-5).sqrt() + mean[..., None, None]


def by_torch(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """PyTorch's instance norm, and the style's moments."""
    return torch.addcmul(mean[..., None, None], torch.nn.functional.instance_norm(x), std[..., None, None])


def with_backward(forward: Callable[..., Tensor]) -> Callable[..., Any]:
    def call(x: Tensor, mean: Tensor, std: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        out = forward(x, mean, std)
        return out, *torch.autograd.grad(out, (x, mean, std), dout)

    return call


def check(inputs: tuple[Tensor, ...], output: Any) -> str | None:
    x, mean, std, *dout = (tensor.detach().double().requires_grad_() for tensor in inputs)
    outputs = output if isinstance(output, tuple) else (output,)
    want = eager(x, mean, std)
    wanted = [want, *(g for d in dout for g in torch.autograd.grad(want, (x, mean, std), d))]
    names = ("out", "the gradient of x", "the gradient of the mean", "the gradient of std")
    for name, got, right in zip(names, outputs, wanted, strict=False):
        if got.shape != right.shape:
            return f"{name} has shape {tuple(got.shape)}, not {tuple(right.shape)}"
        error = float((got.detach().double() - right.detach()).norm() / right.detach().norm())
        if not error < 1e-5:
            return f"{name} is off by {error:.2g} in norm"
    return None


def _case(shape: tuple[int, int, int, int], backward: bool, settings: Settings) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        x, dout = (torch.randn(shape, device=settings.device) for _ in range(2))
        mean, std = (torch.randn(shape[:2], device=settings.device) for _ in range(2))
        leaves = tuple(t.requires_grad_(backward) for t in (x, mean, std))
        return (*leaves, dout) if backward else leaves

    contenders: dict[str, Callable[..., Any]] = {"genfast": genfast.ops.adain, "eager": eager, "torch norm": by_torch}
    if settings.compiled:
        contenders["compiled"] = torch.compile(eager, dynamic=False)
    batch, channels, height, width = shape
    elements = batch * channels * height * width
    return Case(
        op="adain",
        variant="forward+backward" if backward else "forward",
        shape=shape,
        dtype=torch.float32,
        inputs=inputs,
        contenders={name: with_backward(call) for name, call in contenders.items()} if backward else contenders,
        check=check,
        floor_bytes=4 * (5 if backward else 2) * elements,
        targets={},
    )


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` leaves out the large planes."""
    shapes = ((8, 512, 32, 32),) if settings.quick else ((8, 512, 32, 32), (4, 64, 256, 256))
    return [_case(shape, backward, settings) for shape in shapes for backward in (False, True)]


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "adain", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "adain", *sys.argv[1:]])
