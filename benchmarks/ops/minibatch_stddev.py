"""Minibatch standard deviation of the maps of a discriminator, forward and backward.

Floor: forward reads x and writes it with one more map, backward reads x and the cotangent and writes the gradient.
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


def eager(x: Tensor) -> Tensor:
    """The usual formula, groups of four."""
    batch, channels, height, width = x.shape
    grouped = x.reshape(4, -1, channels, height, width)
    y = (grouped.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
    return torch.cat((x, y.repeat(4).reshape(-1, 1, 1, 1).expand(batch, 1, height, width)), 1)


def with_backward(forward: Callable[..., Tensor]) -> Callable[..., Any]:
    def call(x: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        out = forward(x)
        return out, torch.autograd.grad(out, x, dout)[0]

    return call


def check(inputs: tuple[Tensor, ...], output: Any) -> str | None:
    x, *dout = (tensor.detach().double() for tensor in inputs)
    outputs = output if isinstance(output, tuple) else (output,)
    leaf = x.requires_grad_()
    want = eager(leaf)
    wanted = [want.detach(), *(torch.autograd.grad(want, leaf, d)[0] for d in dout)]
    bound = 1e-5 if outputs[0].dtype == torch.float32 else 2e-2
    for name, got, right in zip(("out", "the gradient"), outputs, wanted, strict=False):
        if got.shape != right.shape:
            return f"{name} has shape {tuple(got.shape)}, not {tuple(right.shape)}"
        parts = [(got, right)] if name != "out" else [(got[:, :-1], right[:, :-1]), (got[:, -1:], right[:, -1:])]
        for part, exact in parts:
            error = float((part.detach().double() - exact).norm() / exact.norm())
            if not error < bound:
                return f"{name} is off by {error:.2g} in norm"
    return None


def _case(shape: tuple[int, int, int, int], dtype: torch.dtype, backward: bool, settings: Settings) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        x = torch.randn(shape, device=settings.device).to(dtype)
        dout = torch.randn(shape[0], shape[1] + 1, *shape[2:], device=settings.device).to(dtype)
        return (x.requires_grad_(), dout) if backward else (x,)

    contenders: dict[str, Callable[..., Any]] = {"genfast": genfast.ops.minibatch_stddev, "eager": eager}
    if settings.compiled:
        contenders["compiled"] = torch.compile(eager, dynamic=False)
    batch, channels, height, width = shape
    elements, more = batch * channels * height * width, batch * height * width
    aim = settings.device == "cpu" and backward and shape == (32, 512, 16, 16) and dtype == torch.float32
    return Case(
        op="minibatch_stddev",
        variant="forward+backward" if backward else "forward",
        shape=shape,
        dtype=dtype,
        inputs=inputs,
        contenders={name: with_backward(call) for name, call in contenders.items()} if backward else contenders,
        check=check,
        floor_bytes=((5 if backward else 2) * elements + (2 if backward else 1) * more) * dtype.itemsize,
        targets={"default": {"eager": 4.2}} if aim else {},
    )


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` leaves out the last layer's small maps and bfloat16."""
    float32, large = torch.float32, (32, 512, 16, 16)
    found = [_case(large, float32, backward, settings) for backward in (False, True)]
    if not settings.quick:
        found += [_case((32, 512, 4, 4), float32, True, settings), _case(large, torch.bfloat16, True, settings)]
    return found


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "minibatch_stddev", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "minibatch_stddev", *sys.argv[1:]])
