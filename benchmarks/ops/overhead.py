"""What a call costs beyond its arithmetic: microseconds on 4 x 4 tensors beside builtin ops, and the import time.

The budgets of genfast's differentiable ops: 8 without gradients, 15 forward with them, 50 forward and backward.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import genfast
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Row, Settings

__all__ = ["import_seconds", "run"]

BUDGETS = {"no grad": 8.0, "forward": 15.0, "forward+backward": 50.0}


def _calls(x: Tensor, y: Tensor, bias: Tensor) -> dict[str, Callable[[], Any]]:
    table = torch.rand(4, 2, device=x.device)
    return {
        "torch.exp": lambda: torch.exp(x),
        "torch softplus": lambda: torch.nn.functional.softplus(x),
        "textbook z and kl": lambda: _textbook(x, y),
        "torch.bernoulli(sigmoid)": lambda: torch.bernoulli(torch.sigmoid(x + bias)),
        "genfast.gaussian_kl": lambda: genfast.ops.gaussian_kl(x, y),
        "genfast.reparameterize": lambda: genfast.ops.reparameterize(x, y),
        "genfast.reparameterize_kl": lambda: genfast.ops.reparameterize_kl(x, y),
        "genfast.bernoulli_sample": lambda: genfast.ops.bernoulli_sample(x, bias),
        "genfast.rotary": lambda: genfast.ops.rotary(x, table, table),
    }


def _textbook(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    return z, -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=-1)


def _backward(call: Callable[[], Any], leaves: tuple[Tensor, ...]) -> Callable[[], Any]:
    cotangents = tuple(torch.randn_like(t) for t in _tuple(call()))

    def run_both() -> Any:
        return torch.autograd.grad(_tuple(call()), leaves, cotangents, allow_unused=True)

    return run_both


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def import_seconds(repeats: int = 3) -> float:
    """Median time of ``import genfast`` in a new process that has imported torch already."""
    code = "import time, torch; t = time.perf_counter(); import genfast; print(time.perf_counter() - t)"
    command = [sys.executable, "-c", code]
    return statistics.median(float(subprocess.check_output(command, text=True)) for _ in range(repeats))


def run(
    settings: Settings, bandwidth: float | None = None, progress: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Measures; ``bandwidth`` is not used, the floor is no matter of bytes here."""
    device = torch.device(settings.device)
    torch.manual_seed(settings.seed)
    rows: list[Row] = []
    for variant, budget in BUDGETS.items():
        progress(f"overhead, {variant}")
        x, y = (torch.randn(4, 4, device=device, requires_grad=variant != "no grad") for _ in range(2))
        calls = _calls(x, y, torch.randn(4, device=device))
        if variant == "forward+backward":
            calls = {name: _backward(call, (x, y)) for name, call in calls.items() if "bernoulli" not in name}
        elif variant == "forward":
            calls = {name: call for name, call in calls.items() if "bernoulli" not in name}
        times = harness.time_interleaved(calls, device, settings.seconds, rounds=20)
        for name, samples in times.items():
            low, median, high = (round(value * 1e6, 3) for value in statistics.quantiles(samples, n=4))
            row = Row("overhead", variant, "4x4", "float32", "default", name, rounds=len(samples), seed=settings.seed)
            row.low_us, row.median_us, row.high_us = low, median, high
            if name.startswith("genfast"):
                row.targets = f"budget {budget:g} µs: {'met' if median <= budget else 'MISSED'}"
            rows.append(row)
    progress("overhead, import time")
    seconds = import_seconds(1 if settings.quick else 3)
    row = Row("overhead", "import after torch", "", "", "default", "import genfast", seed=settings.seed)
    row.median_us = round(seconds * 1e6, 1)
    rows.append(row)
    return rows


if __name__ == "__main__":
    from genfast.cli import app

    app(["bench", "overhead", *sys.argv[1:]])
