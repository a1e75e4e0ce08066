"""Color, translation and cutout of the images that a discriminator sees, forward and backward.

The rivals get the uniforms that genfast's op draws for its seed, so that all have one output; only genfast's draws are
timed.
Floor: forward reads x and writes out, backward reads the cotangent and writes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import genfast
from genfast import random
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Settings

__all__ = ["cases", "run"]

SEED = 7


def ours(x: Tensor, u: Tensor) -> Tensor:
    return genfast.ops.diff_augment(x, seed=SEED)


def eager(x: Tensor, u: Tensor) -> Tensor:
    """Part by part in plain PyTorch: three colors about their means, a gather from a padded image, a mask."""
    batch, _, height, width = x.shape
    u = u.view(batch, 8, 1, 1, 1)
    x = x + (u[:, 0] - 0.5).to(x.dtype)
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * (2 * u[:, 1]).to(x.dtype) + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (u[:, 2] + 0.5).to(x.dtype) + mean

    image = torch.arange(batch, device=x.device).view(-1, 1, 1)
    row = torch.arange(height, device=x.device).view(1, -1, 1)
    column = torch.arange(width, device=x.device).view(1, 1, -1)
    most = (height + 4) // 8, (width + 4) // 8
    down, across = (
        (uniform * (2 * m + 1)).floor().long().view(-1, 1, 1) - m
        for uniform, m in zip((u[:, 3], u[:, 4]), most, strict=True)
    )
    from_row = (row - down + 1).clamp(0, height + 1)
    from_column = (column - across + 1).clamp(0, width + 1)
    x = pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)[image, from_row, from_column].permute(0, 3, 1, 2)

    sides = (height + 1) // 2, (width + 1) // 2
    top, left = (
        (uniform * (size + 1 - side % 2)).floor().long().view(-1, 1, 1) - side // 2
        for uniform, size, side in zip((u[:, 5], u[:, 6]), (height, width), sides, strict=True)
    )
    cut = (row >= top) & (row < top + sides[0]) & (column >= left) & (column < left + sides[1])
    return x * (~cut).unsqueeze(1).to(x.dtype)


def with_backward(forward: Callable[..., Tensor]) -> Callable[..., Any]:
    def call(x: Tensor, u: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        out = forward(x, u)
        return out, torch.autograd.grad(out, x, dout)[0]

    return call


def check(inputs: tuple[Tensor, ...], output: Any) -> str | None:
    x, u, *dout = (tensor.detach().double() for tensor in inputs)
    outputs = output if isinstance(output, tuple) else (output,)
    leaf = x.requires_grad_()
    want = eager(leaf, u)
    wanted = [want.detach(), *(torch.autograd.grad(want, leaf, d)[0] for d in dout)]
    bound = 1e-5 if outputs[0].dtype == torch.float32 else 2e-2
    for name, got, right in zip(("out", "the gradient"), outputs, wanted, strict=False):
        if got.shape != right.shape:
            return f"{name} has shape {tuple(got.shape)}, not {tuple(right.shape)}"
        error = float((got.detach().double() - right).norm() / right.norm())
        if not error < bound:
            return f"{name} is off by {error:.2g} in norm"
    return None


def _case(shape: tuple[int, int, int, int], dtype: torch.dtype, backward: bool, settings: Settings) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        x, dout = (torch.randn(shape, device=settings.device).to(dtype) for _ in range(2))
        u = random.uniform(8 * shape[0], torch.tensor(SEED)).to(settings.device, torch.float64)
        return (x.requires_grad_(), u, dout) if backward else (x, u)

    contenders: dict[str, Callable[..., Any]] = {"genfast": ours, "eager": eager}
    if settings.compiled:
        contenders["compiled"] = torch.compile(eager, dynamic=False)
    batch, channels, height, width = shape
    return Case(
        op="diff_augment",
        variant="forward+backward" if backward else "forward",
        shape=shape,
        dtype=dtype,
        inputs=inputs,
        contenders={name: with_backward(call) for name, call in contenders.items()} if backward else contenders,
        check=check,
        floor_bytes=(4 if backward else 2) * batch * channels * height * width * dtype.itemsize,
        targets={},
    )


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` leaves out larger images and bfloat16."""
    float32, small = torch.float32, (64, 3, 32, 32)
    found = [_case(small, float32, backward, settings) for backward in (False, True)]
    if not settings.quick:
        found += [_case(shape, float32, True, settings) for shape in ((32, 3, 128, 128), (16, 3, 512, 512))]
        found.append(_case(small, torch.bfloat16, True, settings))
    return found


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "diff_augment", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "diff_augment", *sys.argv[1:]])
