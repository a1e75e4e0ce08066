"""RBMs of 16 hidden units on MNIST, whose likelihood is exact, and the estimates of AIS beside it.

python -m genfast.benchmarks.reproduce.mnist_rbm [--data DIR] [--quick] [--seeds 0-9] [--out DIR]

Published: PyDeep's tutorial on small RBMs, of Melchior, Fischer and Wiskott's "How to center deep Boltzmann machines"
(JMLR 2016): centered, PCD-1, rate 0.01, 50 epochs of 60,000 images, which are 30,000 updates of 100. These RBMs get as
many updates. log Z is that of the energy in centered variables, as published. ``mnist_rbm_large`` has 500 hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import Progress
from torch import Tensor

from genfast import ops
from genfast.benchmarks.reproduce import _common as common
from genfast.nn import RBM

HIDDEN, RATE, UPDATES, BATCH = 16, 0.01, 30_000, 100
AIS_CHAINS, GIBBS = 100, 1000
PYDEEP = "PyDeep, one run"
PUBLISHED = {"log_z_centered": 310.184, "test": -142.564, "train": -143.150}
PUBLISHED_AIS = {"forward": 309.694, "reverse": 316.307}


def batches(v: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches without end, the rows in a new order each pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(v), generator=generator).split(size):
            if len(chosen) == size:
                yield v[chosen]


def train(
    v: Tensor, hidden: int, k: int, persistent: bool, *, centered: bool, rate: float, updates: int, falling: bool,
    seed: int, batch: int = BATCH, init_bias: bool = True,
) -> Iterator[tuple[int, RBM]]:  # fmt: skip
    """Trains an RBM on rows of 0 and 1; yields it with the number of updates after each of them."""
    torch.manual_seed(seed)
    rbm = RBM(v.shape[1], hidden, centered=centered)
    if init_bias:
        rbm.init_visible_bias(v.mean(0))
    optimizer = torch.optim.SGD(rbm.parameters(), lr=rate)
    for update, rows in zip(range(1, updates + 1), batches(v, batch, seed), strict=False):
        optimizer.zero_grad()
        rbm.contrastive_divergence(rows, k, persistent).backward()
        optimizer.step()
        if falling:
            optimizer.param_groups[0]["lr"] = rate * (1 - update / updates)
        yield update, rbm


@torch.no_grad()
def bracket(rbm: RBM, v: Tensor, test: Tensor, betas: int | None, gibbs: int, seed: int) -> dict[str, float]:
    """log Z and the mean log p(test) between forward and reverse AIS, in nats, with the errors of log Z."""
    base = torch.logit(v.mean(0).clamp(1e-3, 1 - 1e-3))
    rows = v[torch.randperm(len(v), generator=torch.Generator().manual_seed(seed))[:AIS_CHAINS]]
    start = rbm.gibbs(rows, gibbs, seed=seed)
    found = ops.rbm_ais_bracket(start, rbm.W, rbm.b, rbm.c, betas=betas, base_bias=base, seed=seed)
    on_test, on_train = common.mean_unnormalized(rbm, test), common.mean_unnormalized(rbm, v)
    return {
        "log_z_forward": found.lower.item(),
        "error_forward": found.lower_error.item(),
        "ess_forward": found.forward.effective_sample_size.item(),
        "log_z_reverse": found.upper.item(),
        "error_reverse": found.upper_error.item(),
        "ess_reverse": found.reverse.effective_sample_size.item(),
        "test_forward": on_test - found.lower.item(),
        "test_reverse": on_test - found.upper.item(),
        "train_forward": on_train - found.lower.item(),
        "train_reverse": on_train - found.upper.item(),
    }


@torch.no_grad()
def centered_log_z(rbm: RBM, log_z: float) -> float:
    """log Z of the energy -(v-m)'b' - (h-l)'c' - (v-m)'W(h-l), as PyDeep states it; p(v) is the same."""
    m, offset = rbm.visible_offset, rbm.hidden_offset
    assert m is not None
    assert offset is not None
    return log_z - (m @ rbm.b + offset @ rbm.c + m @ rbm.W @ offset).item()


def run(data: common.Digits, seeds: list[int], quick: bool, tick: Any) -> tuple[list[dict[str, Any]], RBM]:
    """The 16 hidden units: exact figures of each seed; for the first seed the bracket beside them."""
    v, test = common.binarize(data.train), common.binarize(data.test)
    updates, betas, gibbs = (300, 50, 20) if quick else (UPDATES, None, GIBBS)
    rows: list[dict[str, Any]] = []
    first: RBM | None = None
    for seed in seeds:
        options = {"centered": True, "rate": RATE, "updates": updates, "falling": False, "seed": seed}
        for _, rbm in train(v, HIDDEN, 1, True, **options):  # noqa: B007
            tick(1)
        log_z, on_train, on_test = common.exact_log_likelihood(rbm, v, test)
        row = {"seed": seed, "updates": updates, "log_z": log_z, "train": on_train}
        row |= {
            "log_z_centered": centered_log_z(rbm, log_z),
            "test": on_test,
            "log_z_forward": None,
            "error_forward": None,
        }
        row |= {"log_z_reverse": None, "error_reverse": None}
        if first is None:
            first = rbm
            found = bracket(rbm, v, test, betas, gibbs, seed)
            row |= {key: found[key] for key in row if key in found}
        rows.append(row)
    assert first is not None
    return rows, first


def table(rows: list[dict[str, Any]]) -> list[common.Line]:
    """The lines of the table from the rows of all seeds."""
    lines = []
    for key, label in (
        ("log_z_centered", "log Z of the centered energy"),
        ("test", "log p(test)"),
        ("train", "log p(train)"),
    ):
        lines.append(
            common.Line(f"{HIDDEN} hidden, PCD-1: {label}", [row[key] for row in rows], PUBLISHED[key], PYDEEP)
        )
    for side, published in PUBLISHED_AIS.items():
        gap = [row[f"log_z_{side}"] - row["log_z"] for row in rows if row[f"log_z_{side}"] is not None]
        quantity = f"{HIDDEN} hidden, PCD-1: {side} AIS minus exact log Z"
        lines.append(common.Line(quantity, gap, published - PUBLISHED["log_z_centered"], PYDEEP))
    return lines


def draw_filters(folder: Path, rbms: dict[str, RBM], v: Tensor, gibbs: int) -> None:
    """Filters of each RBM (those of the busiest 100 units), and chains that start at training rows."""
    side = math.isqrt(v.shape[1])
    busiest = {name: rbm.hidden_mean(v[:1000]).mean(0).argsort(descending=True) for name, rbm in rbms.items()}
    filters = {name: rbm.W.detach().T[busiest[name][:100]] for name, rbm in rbms.items()}
    pictures = {name: common.tile(rows, side, math.isqrt(len(rows))) for name, rows in filters.items()}
    common.images(folder / "filters.png", pictures, symmetric=True)
    dreams = {}
    for name, rbm in rbms.items():
        with torch.no_grad():
            chains = rbm.visible_mean(rbm.sample_hidden(rbm.gibbs(v[:100], gibbs, seed=1), seed=2))
        dreams[f"{name}, after {gibbs} Gibbs steps"] = common.tile(chains, side, 10)
    common.images(folder / "fantasies.png", dreams)


def main(
    data: common.DataOption = None,
    out: common.OutOption = None,
    quick: common.QuickOption = False,
    seeds: common.SeedsOption = "0-9",
    threads: common.ThreadsOption = None,
) -> None:
    """Trains RBMs of 16 hidden units on MNIST and compares their exact likelihood with the published one."""
    chosen = common.start(threads, seeds, quick)
    digits = common.load_digits(data, quick)
    with Progress(transient=True) as progress:
        task = progress.add_task("updates", total=len(chosen) * (300 if quick else UPDATES))
        rows, rbm = run(digits, chosen, quick, partial(progress.advance, task))
    folder = common.finish(
        "mnist_rbm", "RBMs of 16 hidden units on MNIST, nats", table(rows), {"runs": rows},
        out=out, quick=quick, seeds=chosen,
        note=f"{digits.note}. AIS of the first seed: 14,500 intervals, {AIS_CHAINS} chains each way",
    )  # fmt: skip
    draw_filters(folder, {f"{HIDDEN} hidden units": rbm}, common.binarize(digits.train), 20 if quick else GIBBS)


if __name__ == "__main__":
    typer.run(main)
