"""R1 of a convolutional discriminator: its parameters' gradients by double backward and by forward mode.

The textbook's double backward is the baseline. Forward mode computes the network once more than double backward, so
that arithmetic alone favours the latter; layers with a slow double backward turn it round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Settings
from genfast.nn import r1_penalty

__all__ = ["cases", "run"]


def discriminator(activation: nn.Module, device: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), activation]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 1)).to(device)


def textbook(network: nn.Module, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(network(leaf).sum(), leaf, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()


def step(network: nn.Module, penalty: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The penalty and its gradients by the weights; those of biases do not all exist."""
    weights = [p for p in network.parameters() if p.dim() > 1]

    def call(x: Tensor) -> tuple[Tensor, ...]:
        value = penalty(x)
        return value.detach(), *torch.autograd.grad(value, weights)

    return call


def checker(network: nn.Module) -> Callable[[tuple[Tensor, ...], Any], str | None]:
    def check(inputs: tuple[Tensor, ...], output: Any) -> str | None:
        for number, (got, want) in enumerate(
            zip(output, step(network, lambda x: textbook(network, x))(*inputs), strict=True)
        ):
            error = float((got - want).norm() / want.norm())
            if not error < 1e-4:
                return f"output {number} is off by {error:.2g} in norm"
        return None

    return check


def _case(name: str, activation: nn.Module, batch: int, settings: Settings) -> Case:
    network = discriminator(activation, settings.device)

    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(batch, 3, 32, 32, device=settings.device),)

    penalties: dict[str, Callable[[Tensor], Tensor]] = {
        "genfast": lambda x: r1_penalty(network, x, method="jvp"),
        "eager": lambda x: textbook(network, x),
        "genfast double backward": lambda x: r1_penalty(network, x),
    }
    if settings.compiled:
        penalties["genfast compiled"] = torch.compile(penalties["genfast"], dynamic=False)
        penalties["compiled double backward"] = torch.compile(penalties["genfast double backward"], dynamic=False)
    parameters = sum(p.numel() for p in network.parameters())
    return Case(
        op="gan_penalty",
        variant=f"R1 {name}",
        shape=(batch, 3, 32, 32),
        dtype=torch.float32,
        inputs=inputs,
        contenders={name: step(network, penalty) for name, penalty in penalties.items()},
        check=checker(network),
        floor_bytes=4 * (batch * 3 * 32 * 32 + 2 * parameters),
        targets={"default": {"eager": 1.2}},
    )


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` leaves out the larger batch."""
    found = [_case("silu", nn.SiLU(), 16, settings), _case("leaky relu", nn.LeakyReLU(0.2), 16, settings)]
    if not settings.quick:
        found += [_case("silu", nn.SiLU(), 64, settings)]
    return found


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "gan_penalty", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "gan_penalty", *sys.argv[1:]])
