"""RBMs of 500 hidden units on MNIST: their likelihood between forward and reverse annealed importance sampling.

python -m genfast.benchmarks.reproduce.mnist_rbm_large [--data DIR] [--quick] [--full] [--seeds 0-1] [--out DIR]

Published: PyDeep's tutorial on big RBMs, of Melchior, Fischer and Wiskott's "How to center deep Boltzmann machines"
(JMLR 2016): centered, PCD-1, 200 epochs; and Salakhutdinov and Murray, "On the quantitative analysis of deep belief
networks" (ICML 2008), whose pixels were drawn once from the grey values and whose likelihoods are by forward AIS.

These RBMs get few updates, at a rate that falls to 0. ``--full`` trains for hours on a CPU: PCD-1 as published, CD-1,
CD-3 and CD-25 for 60,000 updates at a fixed rate, which is our choice. Reverse AIS starts at training rows after
``GIBBS`` Gibbs steps; where a model mixes slowly these are not yet its samples, and the upper bound of log Z is one in
name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from genfast.benchmarks.reproduce import _common as common
from genfast.benchmarks.reproduce.mnist_rbm import (
    AIS_CHAINS,
    BATCH,
    GIBBS,
    bracket,
    centered_log_z,
    draw_filters,
    train,
)
from genfast.nn import RBM

CHECKS, COARSE = 4, 500  # brackets on the way, of so many temperatures
PYDEEP, MURRAY = "PyDeep", "Salakhutdinov and Murray 2008"


@dataclass(frozen=True)
class Setting:
    """How one RBM is trained, and what was published for it: log Z and log p(test)."""

    name: str
    hidden: int
    k: int
    persistent: bool
    rate: float  # of a shortened run
    updates: int
    full_updates: int
    full_rate: float
    log_z: float
    test: float
    test_by_reverse: float | None
    source: str

    @property
    def drawn(self) -> bool:
        """Whether pixels are drawn once with their grey values as chances; else they are on from half the range."""
        return self.source == MURRAY


LARGE = (
    Setting("500 hidden, PCD-1", 500, 1, True, 0.05, 6000, 120_000, 0.01, 968.97, -84.86, -96.61, PYDEEP),
    Setting("500 hidden, CD-1", 500, 1, False, 0.05, 4000, 60_000, 0.05, 350.15, -125.53, None, MURRAY),
    Setting("500 hidden, CD-3", 500, 3, False, 0.05, 4000, 60_000, 0.05, 280.09, -105.50, None, MURRAY),
)
CD25 = Setting("500 hidden, CD-25", 500, 25, False, 0.05, 4000, 60_000, 0.05, 451.28, -86.34, None, MURRAY)


def run(
    data: common.Digits, setting: Setting, seeds: list[int], quick: bool, full: bool, tick: Any
) -> tuple[list[dict[str, Any]], RBM]:
    """The 500 hidden units: the bracket of each seed at the end (stage "end"), for the first one also on the way."""
    drawn = 0 if setting.drawn else None
    v, test = common.binarize(data.train, drawn), common.binarize(data.test, drawn)
    updates, rate = (setting.full_updates, setting.full_rate) if full else (setting.updates, setting.rate)
    coarse, fine, gibbs = COARSE, None, GIBBS
    if quick:
        updates, coarse, fine, gibbs = 60, 20, 50, 20
    rows: list[dict[str, Any]] = []
    first: RBM | None = None
    for seed in seeds:
        options = {"centered": setting.persistent, "rate": rate, "updates": updates, "falling": not full, "seed": seed}
        for update, rbm in train(v, setting.hidden, setting.k, setting.persistent, **options):
            tick(setting.k)
            head = {"setting": setting.name, "seed": seed, "updates": update, "epoch": update * BATCH / len(v)}
            if first is None and update < updates and update % (updates // (CHECKS + 1)) == 0:
                rows.append({**head, "stage": "by update", **bracket(rbm, v, test, coarse, gibbs, seed)})
        last = {**head, "stage": "end", **bracket(rbm, v, test, fine, gibbs, seed)}
        if setting.persistent:  # published for centered energies
            for side in ("forward", "reverse"):
                last[f"log_z_{side}_centered"] = centered_log_z(rbm, last[f"log_z_{side}"])
        rows.append(last)
        first = rbm if first is None else first
    assert first is not None
    return rows, first


def table(rows: list[dict[str, Any]], settings: tuple[Setting, ...]) -> list[common.Line]:
    """The lines of the table from the rows at the end of training."""
    lines = []
    for setting in settings:
        ends = [row for row in rows if row["setting"] == setting.name and row["stage"] == "end"]
        kind, suffix = (" of the centered energy", "_centered") if setting.persistent else ("", "")
        pairs = [(f"log_z_forward{suffix}", f"log Z{kind}, forward AIS", setting.log_z)]
        reverse = 980.72 if setting.test_by_reverse else None
        pairs += [(f"log_z_reverse{suffix}", f"log Z{kind}, reverse AIS", reverse)]
        pairs += [("test_forward", "log p(test), forward AIS", setting.test)]
        pairs += [("test_reverse", "log p(test), reverse AIS", setting.test_by_reverse)]
        pairs += [("train_forward", "log p(train), forward AIS", -82.58 if setting.test_by_reverse else None)]
        for key, label, published in pairs:
            source = f"{setting.source}, one run" if published is not None else ""
            lines.append(common.Line(f"{setting.name}: {label}", [row[key] for row in ends], published, source))
    return lines


def draw_bracket(path: Path, rows: list[dict[str, Any]], settings: tuple[Setting, ...]) -> None:
    """log p(test) between forward and reverse AIS by epoch, of the first seed."""
    plot = common.pyplot()
    figure, axes = plot.subplots(
        1, len(settings), figsize=(4 * len(settings), 3.6), layout="constrained", squeeze=False
    )
    for axis, setting in zip(axes[0], settings, strict=True):
        found = [row for row in rows if row["setting"] == setting.name and row["seed"] == rows[0]["seed"]]
        epochs = [row["epoch"] for row in found]
        high, low = ([row[f"test_{side}"] for row in found] for side in ("forward", "reverse"))
        axis.fill_between(epochs, low, high, color="#2a78d6", alpha=0.25)
        axis.plot(epochs, high, color="#2a78d6", marker="o", markersize=3, label="forward AIS")
        axis.plot(epochs, low, color="#d1495b", marker="o", markersize=3, label="reverse AIS")
        axis.axhline(setting.test, color="#333333", linestyle=":", linewidth=1, label=f"published {setting.test}")
        axis.set(title=setting.name, xlabel="epoch", ylabel="log p(test), nats")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plot.close(figure)


def main(
    data: common.DataOption = None,
    out: common.OutOption = None,
    quick: common.QuickOption = False,
    full: Annotated[bool, typer.Option("--full", help="Hours of training, and CD-25.")] = False,
    seeds: common.SeedsOption = "0-1",
    threads: common.ThreadsOption = None,
) -> None:
    """Trains RBMs of 500 hidden units on MNIST and brackets their likelihood."""
    chosen = common.start(threads, seeds, quick)
    digits = common.load_digits(data, quick)
    settings = (*LARGE, CD25) if full else LARGE
    rows: list[dict[str, Any]] = []
    rbms: dict[str, RBM] = {}
    with Progress(transient=True) as progress:
        for setting in settings:
            updates = 60 if quick else setting.full_updates if full else setting.updates
            task = progress.add_task(setting.name, total=len(chosen) * updates * setting.k)
            found, rbms[setting.name] = run(digits, setting, chosen, quick, full, partial(progress.advance, task))
            rows += found
    counts = [f"{s.name.split(', ')[1]} {s.full_updates if full else s.updates:,}" for s in settings]
    length = f"{'; '.join(counts)} updates of {BATCH} images (PyDeep's PCD-1: 120,000)"
    folder = common.finish(
        "mnist_rbm_large", "RBMs of 500 hidden units on MNIST, nats", table(rows, settings), {"runs": rows},
        out=out, quick=quick, seeds=chosen,
        note=f"{digits.note}. {length}. AIS: 14,500 intervals, {AIS_CHAINS} chains each way",
    )  # fmt: skip
    draw_bracket(folder / "bracket.png", rows, settings)
    draw_filters(folder, rbms, common.binarize(digits.train), 20 if quick else GIBBS)


if __name__ == "__main__":
    typer.run(main)
