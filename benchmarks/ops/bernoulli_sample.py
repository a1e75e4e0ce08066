"""Bernoulli samples from logits and a bias, as an RBM's Gibbs step draws them.

Floor: read the logits, write the samples, in the same dtype.
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


def by_bernoulli(logits: Tensor, bias: Tensor) -> Tensor:
    return torch.bernoulli(torch.sigmoid(logits + bias))


def by_comparison(logits: Tensor, bias: Tensor) -> Tensor:
    """The usual faster form; its result is bool, a quarter of the bytes that the others write."""
    return torch.rand_like(logits) < torch.sigmoid(logits + bias)


def check(inputs: tuple[Tensor, ...], output: Tensor) -> str | None:
    """0/1 values whose mean agrees with the exact probabilities in each of eight bands of probability, to 6 sigma."""
    logits, bias = inputs
    if output.shape != logits.shape:
        return f"the shape is {tuple(output.shape)}, not {tuple(logits.shape)}"
    stride = max(1, logits.numel() // _CHECKED_ELEMENTS)
    prob = torch.sigmoid(logits[::stride].double() + bias.double()).flatten()
    sample = output[::stride].double().flatten()
    if not bool(((sample == 0) | (sample == 1)).all()):
        return "some values are neither 0 nor 1"
    band = (prob * 8).long()
    zeros = torch.zeros(8, dtype=torch.float64, device=prob.device)
    excess = zeros.index_add(0, band, sample - prob)
    variance = zeros.index_add(0, band, prob * (1 - prob))
    worst = (excess.abs() / (variance.sqrt() + 1)).max()
    return None if worst < 6 else f"the mean is {worst:.1f} sigma off"


def _case(shape: tuple[int, int], settings: Settings, compiled: tuple[str, ...]) -> Case:
    device = settings.device

    def inputs() -> tuple[Tensor, ...]:
        return torch.randn(shape, device=device) * 2, torch.randn(shape[1], device=device)

    contenders: dict[str, Callable[..., Any]] = {
        "genfast": genfast.ops.bernoulli_sample,
        "eager": by_bernoulli,
        "rand < p": by_comparison,
    }
    if settings.compiled:
        forms = {"compiled": by_bernoulli, "compiled rand < p": by_comparison}
        contenders |= {name: torch.compile(forms[name], dynamic=False) for name in compiled}
    elements = shape[0] * shape[1]
    large = elements >= 2**24 and settings.device == "cpu"
    aims = {"eager": 10.0, "rand < p": 5.0}
    return Case(
        op="bernoulli_sample",
        variant="forward",
        shape=shape,
        dtype=torch.float32,
        inputs=inputs,
        contenders=contenders,
        check=check,
        floor_bytes=8 * elements,
        targets={"default": aims, "kept": aims} if large else {},
    )


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` leaves out the large ones and most compiled contenders."""
    if settings.quick:
        return [_case((128, 500), settings, ("compiled rand < p",)), _case((2048, 1024), settings, ())]
    both = ("compiled", "compiled rand < p")
    shapes = [(16384, 1024), (128, 500)]
    if torch.device(settings.device).type == "cuda":
        shapes.insert(0, (65536, 1024))
    return [_case(shape, settings, both) for shape in shapes]


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "bernoulli_sample", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "bernoulli_sample", *sys.argv[1:]])
