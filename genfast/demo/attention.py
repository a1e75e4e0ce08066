"""The demo's attention: its derivatives beside those of PyTorch's fused attention and of the plain formula."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from genfast.ops import attention

__all__ = ["print_table"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
NAMES = ("genfast", "PyTorch, fused", "PyTorch, plain formula")


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q * q.shape[3] ** -0.5) @ k.mT, -1) @ v


ATTENTIONS: tuple[Attention, ...] = (attention, scaled_dot_product_attention, _plain)


def _forward(call: Attention, qkv: tuple[Tensor, ...], moves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (call(*qkv),)


def _backward(call: Attention, qkv: tuple[Tensor, ...], moves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().requires_grad_() for x in qkv)
    return torch.autograd.grad(call(*leaves), leaves, moves[0])


def _penalty(call: Attention, qkv: tuple[Tensor, ...], moves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradient of a squared gradient, as in R1 and WGAN-GP."""
    leaves = tuple(x.detach().requires_grad_() for x in qkv)
    slopes = torch.autograd.grad(call(*leaves), leaves, moves[0], create_graph=True)
    return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), leaves)  # type: ignore[arg-type]


def _derivative(call: Attention, qkv: tuple[Tensor, ...], moves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The derivative along a direction, as in MeanFlow."""
    return torch.func.jvp(call, qkv, moves)


TASKS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "forward": _forward,
    "gradient": _backward,
    "gradient of a squared gradient": _penalty,
    "derivative along a direction": _derivative,
}


def calls(shape: tuple[int, ...], task: str) -> dict[str, Callable[[], Any] | None]:
    """Name to call, None where PyTorch refuses; those whose values are wrong are left out.

    Args:
        shape: (batch, heads, positions, head dim).
        task: of ``TASKS``.
    """
    tensors = torch.randn(6, *shape)
    qkv, moves = tuple(tensors[:3]), tuple(tensors[3:])
    work = TASKS[task]
    exact = work(_plain, tuple(x.double() for x in qkv), tuple(x.double() for x in moves))
    found: dict[str, Callable[[], Any] | None] = {}
    for name, attend in zip(NAMES, ATTENTIONS, strict=True):
        try:
            values = work(attend, qkv, moves)
        except RuntimeError:  # of PyTorch, which has no such derivative
            found[name] = None
            continue
        if all((value - right).norm() <= 1e-5 * right.norm() for value, right in zip(values, exact, strict=True)):
            found[name] = lambda attend=attend: work(attend, qkv, moves)  # type: ignore[misc]
    return found


def print_table(quick: bool, console: Console) -> None:
    """Median times of each task, and genfast's speed-up over each contender: below 1 (red) it is slower."""
    from genfast.benchmarks import harness, report

    torch.manual_seed(0)
    shape = (1, 2, 64, 16) if quick else (4, 8, 256, 64)
    table = Table(title=f"attention and its derivatives, {' x '.join(map(str, shape))} float32", title_justify="left")
    table.add_column("task")
    for name in NAMES:
        table.add_column(name, justify="right")
    with console.status("timing attention"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task in TASKS:
            some = calls(shape, task)
            runs = {name: call for name, call in some.items() if call is not None}
            times = harness.time_interleaved(runs, torch.device("cpu"), 0.05 if quick else 0.6)
            medians = {name: statistics.median(samples) * 1e6 for name, samples in times.items()}
            table.add_row(task, *(_cell(name, some, medians, report.show_time) for name in NAMES))
    console.print(table)


def _cell(name: str, some: dict[str, Any], medians: dict[str, float], show: Callable[[float], str]) -> str:
    if name not in medians:
        return "refuses" if name in some else "-"
    if name == NAMES[0] or NAMES[0] not in medians:
        return show(medians[name])
    ratio = medians[name] / medians[NAMES[0]]
    return f"{show(medians[name])}\n[{'green' if ratio >= 1 else 'bold red'}]{ratio:.2f}x[/]"
