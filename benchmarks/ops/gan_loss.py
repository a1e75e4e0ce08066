"""The losses of a GAN from logits: a discriminator's and a generator's, forward and backward.

Floor: logits in, gradients out; at these sizes calls are what costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

import genfast
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Settings

__all__ = ["cases", "run"]

KINDS = ("nonsaturating", "hinge", "relativistic", "relativistic_average")
EAGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nonsaturating": lambda r, f: softplus(-r).mean() + softplus(f).mean(),
    "hinge": lambda r, f: relu(1 - r).mean() + relu(1 + f).mean(),
    "relativistic": lambda r, f: softplus(f - r).mean(),
    "relativistic_average": lambda r, f: softplus(f.mean() - r).mean() + softplus(f - r.mean()).mean(),
}


def with_backward(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def call(real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
        value = loss(real, fake)
        return value, *torch.autograd.grad(value, (real, fake))

    return call


def checker(kind: str) -> Callable[[tuple[Tensor, ...], Any], str | None]:
    def check(inputs: tuple[Tensor, ...], output: Any) -> str | None:
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        want = with_backward(EAGER[kind])(*doubles)
        for name, got, right in zip(("the loss", "the gradient of real", "that of fake"), output, want, strict=True):
            error = float((got.detach().double() - right.detach()).norm() / right.detach().norm())
            if not error < 1e-5:
                return f"{name} is off by {error:.2g} in norm"
        return None

    return check


def _case(kind: str, shape: tuple[int, ...], settings: Settings) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape, device=settings.device).requires_grad_() for _ in range(2))

    contenders: dict[str, Callable[..., Any]] = {
        "genfast": with_backward(lambda r, f: genfast.ops.gan_loss(r, f, kind, "discriminator")),
        "eager": with_backward(EAGER[kind]),
    }
    if settings.compiled:
        contenders["compiled"] = with_backward(torch.compile(EAGER[kind], dynamic=False))
    elements = torch.Size(shape).numel()
    return Case(
        op="gan_loss",
        variant=f"forward+backward {kind}",
        shape=shape,
        dtype=torch.float32,
        inputs=inputs,
        contenders=contenders,
        check=checker(kind),
        floor_bytes=16 * elements,
    )


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` leaves out the patch discriminator's."""
    found = [_case(kind, (64, 1), settings) for kind in KINDS]
    if not settings.quick:
        found += [_case(kind, (16, 1, 30, 30), settings) for kind in KINDS]
    return found


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "gan_loss", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "gan_loss", *sys.argv[1:]])
