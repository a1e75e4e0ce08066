"""RBMs on bars and stripes, against the highest likelihood that any model can have; log Z is exact.

python -m genfast.benchmarks.reproduce.bars_and_stripes [--quick] [--seeds 0-9] [--out DIR]

The data are all 2^n images of n rows, each on or off, and all 2^n of n columns: 2^(n+1) rows, two of which (all on, all
off) come twice. No model's mean log-likelihood exceeds minus the entropy of these rows: -2.5993 nats a row at 3 x 3,
-3.3791 at 4 x 4 (-108.131 in all). Counted once each, 14 and 30 rows give -log 14 and -log 30.

A centered RBM trains on all rows at once, by parallel tempering and, for comparison, by as many steps of PCD-1.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import track
from torch import Tensor

from genfast.benchmarks.reproduce import _common as common
from genfast.nn import RBM

HIDDEN = {3: 16, 4: 32}
TEMPERATURES = {3: 5, 4: 8}
STEPS = {3: 3000, 4: 4000}
RATE = {"tempering": {3: 1.0, 4: 0.5}, "PCD-1": {3: 0.3, 4: 0.3}}
REPLICAS, CHAINS, CHECKS = 100, 512, 10


def bars_and_stripes(n: int) -> Tensor:
    """All 2^(n+1) rows, [2^(n+1), n * n]."""
    bits = (torch.arange(2**n).unsqueeze(1) >> torch.arange(n) & 1).float()
    stripes, bars = bits.unsqueeze(2).expand(-1, n, n), bits.unsqueeze(1).expand(-1, n, n)
    return torch.cat([stripes, bars]).reshape(-1, n * n)


def bound(v: Tensor) -> float:
    """Minus the entropy of the rows, in nats: what the mean log-likelihood of the best model is."""
    share = v.unique(dim=0, return_counts=True)[1].double() / len(v)
    return (share * share.log()).sum().item()


def train(n: int, method: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """Exact log-likelihoods while one RBM trains: rows of n, method, seed, step, log_likelihood a row."""
    torch.manual_seed(seed)
    v = bars_and_stripes(n)
    rbm = RBM(n * n, HIDDEN[n], centered=True)
    rbm.init_visible_bias(v.mean(0))
    count = REPLICAS if method == "tempering" else CHAINS
    rbm.start_chains(v[torch.arange(count) % len(v)], seed=seed)
    options = {"tempering": torch.linspace(0, 1, TEMPERATURES[n])} if method == "tempering" else {}
    optimizer = torch.optim.SGD(rbm.parameters(), lr=RATE[method][n])
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    found = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        rbm.contrastive_divergence(v, 1, persistent=True, **options).backward()
        optimizer.step()
        falling.step()
        if step % (steps // CHECKS) == 0:
            likelihood = common.exact_log_likelihood(rbm, v)[1]
            found.append({"n": n, "method": method, "seed": seed, "step": step, "log_likelihood": likelihood})
    return found


def draw(path: Path, curve: list[dict[str, Any]]) -> None:
    """Exact log-likelihood a row by step, each seed a line, with the bound."""
    plot = common.pyplot()
    figure, axes = plot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, n in zip(axes, (3, 4), strict=True):
        best = bound(bars_and_stripes(n))
        for method, color in (("PCD-1", "#d1495b"), ("tempering", "#2a78d6")):
            for seed in {row["seed"] for row in curve}:
                line = [row for row in curve if (row["n"], row["method"], row["seed"]) == (n, method, seed)]
                gaps = [best - row["log_likelihood"] for row in line]
                axis.plot([row["step"] for row in line], gaps, color=color, alpha=0.5, linewidth=1)
            axis.plot([], [], color=color, label=method)
        axis.axhline(0.05, color="#333333", linewidth=1, linestyle=":", label="0.05")
        axis.set(title=f"{n} x {n}", xlabel="step", ylabel="nats a row below the bound", yscale="log")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plot.close(figure)


def main(
    out: common.OutOption = None,
    quick: common.QuickOption = False,
    seeds: common.SeedsOption = "0-9",
    threads: common.ThreadsOption = None,
) -> None:
    """Trains RBMs on bars and stripes and compares their exact likelihood with the bound."""
    chosen = common.start(threads, seeds, quick)
    runs = [(n, method, seed) for n in (3, 4) for method in ("tempering", "PCD-1") for seed in chosen]
    curve: list[dict[str, Any]] = []
    for n, method, seed in track(runs, "bars and stripes", transient=True):
        curve += train(n, method, seed, STEPS[n] // 10 if quick else STEPS[n])
    ends = {(row["n"], row["method"], row["seed"]): row["log_likelihood"] for row in curve}
    lines = []
    for n in (3, 4):
        best, count = bound(bars_and_stripes(n)), 2 ** (n + 1)
        for method in ("tempering", "PCD-1"):
            values = [ends[n, method, seed] for seed in chosen]
            source = f"the bound; counted once each, {count - 2} rows: {-math.log(count - 2):.4f}"
            lines.append(common.Line(f"{n} x {n}, {method}: log p(v), mean of {count} rows", values, best, source))
        worst = [best - min(ends[n, "tempering", seed] for seed in chosen)]
        lines.append(common.Line(f"{n} x {n}, tempering: bound minus the worst seed", worst, None, "to be below 0.05"))
        total = [count * ends[n, "tempering", seed] for seed in chosen]
        lines.append(common.Line(f"{n} x {n}, tempering: log p(v), sum of {count} rows", total, best * count))
    folder = common.finish(
        "bars_and_stripes", "Bars and stripes: exact log-likelihood, nats", lines, {"curve": curve},
        out=out, quick=quick, seeds=chosen,
        note="bars and stripes, complete; centered RBMs of 16 and 32 hidden units, SGD with a linearly falling rate"
        + ("; quick: a tenth of the steps" if quick else ""),
    )  # fmt: skip
    draw(folder / "curve.png", curve)


if __name__ == "__main__":
    typer.run(main)
