"""RBMs of 500 hidden units on MNIST: their likelihood between forward and reverse annealed importance sampling.

python -m genfast.benchmarks.reproduce.mnist_rbm_large [--data DIR] [--quick] [--full] [--seeds 0-9] [--resume]
    [--threads 1] [--out DIR]

Published: PyDeep's tutorial on big RBMs, of Melchior, Fischer and Wiskott's "How to center deep Boltzmann machines"
(JMLR 2016): centered, PCD-1, 200 epochs; and Salakhutdinov and Murray, "On the quantitative analysis of deep belief
networks" (ICML 2008), whose pixels were drawn once from the grey values and whose likelihoods are by forward AIS.

These RBMs get few updates, at a rate that falls to 0. ``--full`` trains for hours on a CPU: PCD-1 as published, CD-1,
CD-3 and CD-25 for 60,000 updates at a fixed rate, which is our choice. Reverse AIS starts at training rows after
``GIBBS`` Gibbs steps; where a model mixes slowly these are not yet its samples, and the upper bound of log Z is one in
name. Each RBM's figures are saved as it ends, and ``--resume`` trains those that the folder lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.progress import Progress

from genfast.benchmarks.reproduce import _common as common
from genfast.benchmarks.reproduce import _runs
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

SIDES = ("forward", "reverse")
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


class Sizes(NamedTuple):
    """How long an RBM is trained and how finely its likelihood is estimated."""

    full: bool
    quick: bool

    def updates(self, setting: Setting) -> int:
        return 60 if self.quick else setting.full_updates if self.full else setting.updates

    @property
    def betas(self) -> tuple[int, int | None]:
        """Temperatures of a bracket on the way and of one at the end; None for the default."""
        return (20, 50) if self.quick else (COARSE, None)

    @property
    def gibbs(self) -> int:
        return 20 if self.quick else GIBBS


def epoch(setting: Setting, sizes: Sizes, data: common.Digits) -> float:
    """How often an RBM sees each image."""
    return sizes.updates(setting) * BATCH / len(data.train)


def run(
    data: common.Digits, setting: Setting, seed: int, sizes: Sizes, watched: bool, tick: Any
) -> tuple[list[dict[str, Any]], RBM]:
    """The bracket of one RBM at the end (stage "end"), where it is ``watched`` also on the way, and the RBM."""
    drawn = 0 if setting.drawn else None
    v, test = common.binarize(data.train, drawn), common.binarize(data.test, drawn)
    updates, (coarse, fine) = sizes.updates(setting), sizes.betas
    rate = setting.full_rate if sizes.full else setting.rate
    rows: list[dict[str, Any]] = []
    options = {"centered": setting.persistent, "rate": rate, "updates": updates, "falling": not sizes.full}
    for update, rbm in train(v, setting.hidden, setting.k, setting.persistent, seed=seed, **options):
        tick(setting.k)
        head = {"setting": setting.name, "seed": seed, "updates": update, "epoch": update * BATCH / len(v)}
        if watched and update < updates and update % (updates // (CHECKS + 1)) == 0:
            rows.append({**head, "stage": "by update", **bracket(rbm, v, test, coarse, sizes.gibbs, seed)})
    last = {**head, "stage": "end", **bracket(rbm, v, test, fine, sizes.gibbs, seed)}
    if setting.persistent:  # published for centered energies
        for side in SIDES:
            last[f"log_z_{side}_centered"] = centered_log_z(rbm, last[f"log_z_{side}"])
    return [*rows, last], rbm


def finished(
    path: Path, settings: tuple[Setting, ...], sizes: Sizes, data: common.Digits
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The rows of an earlier run's file by setting and seed, of RBMs of this training on as many images."""
    estimates = [f"{value}_{side}" for value in ("log_z", "error", "ess", "test", "train") for side in SIDES]
    numbers = ("epoch", *estimates, *(f"log_z_{side}_centered" for side in SIDES))
    kinds: dict[str, Callable[[str], Any]] = {
        "setting": str, "seed": int, "updates": int, "stage": str, **dict.fromkeys(numbers, float),
    }  # fmt: skip
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in _runs.kept(path, kinds, {}):
        found.setdefault((row["setting"], row["seed"]), []).append(row)
    whole = {(s.name, sizes.updates(s), f"{epoch(s, sizes, data):.6g}") for s in settings}  # digits of the file
    return {
        key: rows for key, rows in found.items()
        if rows[-1]["stage"] == "end"
        and (key[0], rows[-1]["updates"], f"{rows[-1]['epoch']:.6g}") in whole
    }  # fmt: skip


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


def in_order(done: dict[tuple[str, int], list[dict[str, Any]]], settings: tuple[Setting, ...]) -> list[dict[str, Any]]:
    """All rows, by setting and seed."""
    names = [setting.name for setting in settings]
    return [row for name in names for key in sorted(done) if key[0] == name for row in done[key]]


def draw_bracket(path: Path, rows: list[dict[str, Any]], settings: tuple[Setting, ...]) -> None:
    """log p(test) between forward and reverse AIS by epoch, of the first seed."""
    plot = common.pyplot()
    figure, axes = plot.subplots(
        1, len(settings), figsize=(4 * len(settings), 3.6), layout="constrained", squeeze=False
    )
    for axis, setting in zip(axes[0], settings, strict=True):
        found = [row for row in rows if row["setting"] == setting.name and row["seed"] == rows[0]["seed"]]
        epochs = [row["epoch"] for row in found]
        high, low = ([row[f"test_{side}"] for row in found] for side in SIDES)
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
    resume: _runs.ResumeOption = False,
    seeds: common.SeedsOption = "0-9",
    threads: common.ThreadsOption = None,
) -> None:
    """Trains RBMs of 500 hidden units on MNIST and brackets their likelihood."""
    chosen = common.start(threads, seeds, quick)
    digits, sizes = common.load_digits(data, quick), Sizes(full, quick)
    settings = (*LARGE, CD25) if full else LARGE
    folder = common.output_folder("mnist_rbm_large", out, quick)
    done = finished(folder / "runs.csv", settings, sizes, digits) if resume else {}
    wanted = [(setting, seed) for seed in chosen for setting in settings if (setting.name, seed) not in done]
    rbms: dict[str, RBM] = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("RBMs", total=sum(sizes.updates(setting) * setting.k for setting, _ in wanted))
        for setting, seed in wanted:
            first = seed == chosen[0]
            found, rbm = run(digits, setting, seed, sizes, first, partial(progress.advance, task))
            done[setting.name, seed] = found
            if first:
                rbms[setting.name] = rbm
            common.write_csv(folder / "runs.csv", in_order(done, settings), {})
    rows = in_order(done, settings)
    counts = [f"{s.name.split(', ')[1]} {sizes.updates(s):,}" for s in settings]
    length = f"{'; '.join(counts)} updates of {BATCH} images (PyDeep's PCD-1: 120,000)"
    common.finish(
        "mnist_rbm_large", "RBMs of 500 hidden units on MNIST, nats", table(rows, settings), {"runs": rows},
        out=out, quick=quick, seeds=sorted({row["seed"] for row in rows}),
        note=f"{digits.note}. {length}. AIS: 14,500 intervals, {AIS_CHAINS} chains each way",
    )  # fmt: skip
    draw_bracket(folder / "bracket.png", rows, settings)
    if len(rbms) == len(settings):  # else the pictures are those of an earlier call
        draw_filters(folder, rbms, common.binarize(digits.train), sizes.gibbs)


if __name__ == "__main__":
    typer.run(main)
