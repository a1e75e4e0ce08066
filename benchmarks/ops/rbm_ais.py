"""Annealed importance sampling of log Z: times are those of one temperature.

Floor: the two products of V x H x chains, 4 V H chains floating-point operations a temperature.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

import genfast
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Settings

__all__ = ["cases", "check", "plain", "run"]

TEMPERATURES = 100


def _ours(W: Tensor, b: Tensor, c: Tensor, chains: int, temperatures: int) -> Tensor:
    return genfast.ops.rbm_ais(W, b, c, betas=temperatures, chains=chains).log_weights


def _step(
    v: Tensor, log_weights: Tensor, W: Tensor, b: Tensor, c: Tensor, last: Tensor, beta: Tensor
) -> tuple[Tensor, ...]:
    x = v @ W + c
    log_weights = log_weights + (softplus(beta * x) - softplus(last * x)).sum(1) + (beta - last) * (v @ b)
    p = torch.sigmoid(beta * x)
    h = (torch.rand_like(p) < p).to(p.dtype)
    p = torch.sigmoid(beta * (h @ W.T + b))
    return (torch.rand_like(p) < p).to(p.dtype), log_weights


def plain(
    W: Tensor, b: Tensor, c: Tensor, chains: int, temperatures: int, step: Callable[..., tuple[Tensor, ...]] = _step
) -> Tensor:
    """Log weights as a PyTorch user computes them, all in W's dtype."""
    v = (torch.rand(chains, len(b), device=W.device, dtype=W.dtype) < 0.5).to(W.dtype)
    log_weights = v.new_zeros(chains)
    betas = torch.linspace(0, 1, temperatures + 1, device=W.device, dtype=W.dtype)
    for last, beta in itertools.pairwise(betas):
        v, log_weights = step(v, log_weights, W, b, c, last, beta)
    return log_weights


def check(inputs: tuple[Tensor, ...], log_weights: Tensor, temperatures: int) -> str | None:
    """Mean (to 6 sigma) and spread of the log weights against those of 200 chains of the plain formula in float64."""
    wanted = plain(*(x.double() for x in inputs), 200, temperatures)
    found = log_weights.double()
    if not bool(torch.isfinite(found).all()):
        return "some log weights are not finite"
    sigma = (wanted.var() * (1 / len(wanted) + 1 / len(found))).sqrt()
    off = ((found.mean() - wanted.mean()).abs() / sigma).item()
    if not off < 6:
        return f"the mean log weight is {off:.1f} sigma off"
    spread = (found.std() / wanted.std()).item()
    return None if 0.6 < spread < 1.6 else f"the log weights spread {spread:.2f} times as far as they should"


def _case(visible: int, hidden: int, chains: int, temperatures: int, settings: Settings, compiled: bool) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        W = torch.randn(visible, hidden, device=settings.device) * (1.5 / (visible + hidden) ** 0.5)
        return W, *(torch.randn(size, device=settings.device) * 0.5 for size in (visible, hidden))

    contenders: dict[str, Callable[..., Any]] = {
        "genfast": lambda W, b, c: _ours(W, b, c, chains, temperatures),
        "eager": lambda W, b, c: plain(W, b, c, chains, temperatures),
    }
    if compiled and settings.compiled:
        step = torch.compile(_step, dynamic=False)
        contenders["compiled"] = lambda W, b, c: plain(W, b, c, chains, temperatures, step)
    on_cpu = torch.device(settings.device).type == "cpu"
    return Case(
        op="rbm_ais",
        variant=f"a temperature, {chains} chains",
        shape=(visible, hidden),
        dtype=torch.float32,
        inputs=inputs,
        contenders=contenders,
        check=lambda given, output: check(given, output, temperatures),
        floor_bytes=0,
        floor_flops=4 * visible * hidden * chains * temperatures,
        groups={"PyTorch's best": ("eager", "compiled")},
        targets={"default": {"PyTorch's best": 3.0}} if on_cpu else {},
        items=temperatures,
    )


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` anneals over fewer temperatures."""
    if settings.quick:
        return [_case(784, 500, 100, 10, settings, compiled=False)]
    found = [_case(784, 500, 100, TEMPERATURES, settings, compiled=True)]
    if torch.device(settings.device).type == "cuda":
        found.append(_case(784, 500, 4096, TEMPERATURES, settings, compiled=True))
    return found


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "rbm_ais", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "rbm_ais", *sys.argv[1:]])
