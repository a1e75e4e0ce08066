"""Centered against plain RBMs, on MNIST and on MNIST with black and white exchanged; 16 hidden units, exact likelihood.

python -m genfast.benchmarks.reproduce.centering [--data DIR] [--quick] [--seeds 0-9] [--updates 30000] [--out DIR]

Melchior, Fischer and Wiskott, "How to center deep Boltzmann machines" (JMLR 2016): the centered gradient does not
change when 0 and 1 change places, the plain one does, and trains worse on both. Published figures: PyDeep's tutorial on
small RBMs, one run each, PCD-1 at rate 0.01 over 50 epochs of 60,000 images: 30,000 updates of 100 images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from genfast.benchmarks.reproduce import _common as common
from genfast.benchmarks.reproduce.mnist_rbm import BATCH, train

HIDDEN, RATE = 16, 0.01
PUBLISHED = {
    ("centered", "MNIST"): (-142.56, -143.15),
    ("plain", "MNIST"): (-149.05, -149.61),
    ("centered", "1 - MNIST"): (-142.09, -142.81),
    ("plain", "1 - MNIST"): (-183.36, -183.26),
}
COLORS = {"centered": "#2a78d6", "plain": "#d1495b"}


def run(
    grey: torch.Tensor, test: torch.Tensor, seed: int, kind: str, data: str, updates: int, checks: int
) -> list[dict[str, Any]]:
    """Exact figures while one RBM trains, at ``checks`` numbers of updates that double up to ``updates``."""
    v, held_out = common.binarize(grey), common.binarize(test)
    if data == "1 - MNIST":
        v, held_out = 1 - v, 1 - held_out
    when = {updates >> shift for shift in range(checks)}
    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {"rate": RATE, "updates": updates, "falling": False, "seed": seed}
    for update, rbm in train(v, HIDDEN, 1, True, centered=kind == "centered", **options):
        if update in when:
            log_z, on_train, on_test = common.exact_log_likelihood(rbm, v, held_out)
            row = {"model": kind, "data": data, "seed": seed, "updates": update}
            rows.append({**row, "log_z": log_z, "train": on_train, "test": on_test})
    return rows


def table(rows: list[dict[str, Any]]) -> list[common.Line]:
    """The lines of the table from the rows at the last update."""
    last = max(row["updates"] for row in rows)
    ends = {(row["model"], row["data"], row["seed"]): row for row in rows if row["updates"] == last}
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for (kind, data), (on_test, on_train) in PUBLISHED.items():
        for key, published in (("test", on_test), ("train", on_train)):
            values = [ends[kind, data, seed][key] for seed in seeds]
            lines.append(common.Line(f"{kind}, {data}: log p({key})", values, published, "PyDeep, one run"))

    def gap(a: tuple[str, str], b: tuple[str, str]) -> list[float]:
        return [ends[(*a, seed)]["test"] - ends[(*b, seed)]["test"] for seed in seeds]

    def published(a: tuple[str, str], b: tuple[str, str]) -> float:
        return PUBLISHED[a][0] - PUBLISHED[b][0]

    for quantity, a, b in (
        ("centered - plain, MNIST: test", ("centered", "MNIST"), ("plain", "MNIST")),
        ("centered - plain, 1 - MNIST: test", ("centered", "1 - MNIST"), ("plain", "1 - MNIST")),
        ("centered, what exchanging 0 and 1 changes: test", ("centered", "1 - MNIST"), ("centered", "MNIST")),
        ("plain, what exchanging 0 and 1 changes: test", ("plain", "1 - MNIST"), ("plain", "MNIST")),
    ):
        lines.append(common.Line(quantity, gap(a, b), published(a, b), "PyDeep, difference of the above"))
    return lines


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Mean log p(test) by update with its standard error."""
    plot = common.pyplot()
    figure, axis = plot.subplots(figsize=(6.4, 4), layout="constrained")
    for kind, data in PUBLISHED:
        found = [row for row in rows if (row["model"], row["data"]) == (kind, data)]
        when = sorted({row["updates"] for row in found})
        pairs = [common.mean_and_error([row["test"] for row in found if row["updates"] == at]) for at in when]
        means, errors = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        style = "-" if data == "MNIST" else "--"
        axis.errorbar(when, means, errors, color=COLORS[kind], linestyle=style, capsize=2, label=f"{kind}, {data}")
    axis.set(xlabel="updates", ylabel="log p(test), nats", xscale="log")
    axis.set_title("16 hidden units, PCD-1, exact; mean and standard error over seeds", fontsize=9)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plot.close(figure)


def main(
    data: common.DataOption = None,
    out: common.OutOption = None,
    quick: common.QuickOption = False,
    seeds: common.SeedsOption = "0-9",
    updates: Annotated[int, typer.Option(min=16, help="Updates of each RBM; published: 30,000.")] = 30_000,
    threads: common.ThreadsOption = None,
) -> None:
    """Trains centered and plain RBMs on MNIST and its negative and compares their exact likelihoods."""
    chosen = common.start(threads, seeds, quick)
    digits = common.load_digits(data, quick)
    updates = min(updates, 256) if quick else updates
    rows: list[dict[str, Any]] = []
    for seed in track(chosen, "seeds", transient=True):
        for kind, which in PUBLISHED:
            rows += run(digits.train, digits.test, seed, kind, which, updates, 5)
    folder = common.finish(
        "centering", "Centered and plain RBMs, exact log-likelihood, nats", table(rows), {"curve": rows},
        out=out, quick=quick, seeds=chosen,
        note=f"{digits.note}. {updates:,} updates of {BATCH} images; published: 30,000",
    )  # fmt: skip
    draw(folder / "curve.png", rows)


if __name__ == "__main__":
    typer.run(main)
