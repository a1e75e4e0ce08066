"""Modes that GANs recover of a ring of 8 and a grid of 25 Gaussians: plain, PacGAN, relativistic with R1 and R2.

python -m genfast.benchmarks.reproduce.ring_grid [--quick] [--data ring|grid|both] [--methods gan,pacgan2,...]
    [--kernels on|off|both] [--seeds 0-9] [--steps N] [--resume] [--threads 1] [--out DIR]

Ring: the unit circle, sigma 0.01. Grid: 5 x 5 from -2 to 2, sigma 0.05. The generator has two hidden layers of 400
relu units and z of 2 normals, the discriminator three of 200 maxout units of 5 pieces; Adam, beta1 0.8, batches of 100
logits (a packed one sees m samples each). Of 2,500 samples, those within 3 sigma of the nearest mode are of high
quality, and a mode is covered that has one (Lin et al., "PacGAN", NeurIPS 2018, section 4.1; Srivastava et al.,
"VEEGAN", NeurIPS 2017). The relativistic GAN (Huang et al., "The GAN is dead; long live the GAN!", NeurIPS 2024) has
R1 and R2, whose weight falls geometrically between the values of ``Data.penalty`` in the first three fifths of the
run, and its samples are those of the generator's moving average. The published runs have some 400,000 steps at a rate
of 1e-4; these have the few of ``Data.steps`` at 1e-3, which falls to zero in the last half.

``--kernels off`` trains the same networks from the same weights on the same batches and noise by plain PyTorch.
Each run is saved as it ends, and ``--resume`` does what the folder lacks.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.progress import Progress
from torch import Tensor

from genfast.benchmarks.reproduce import _common as common
from genfast.benchmarks.reproduce import _runs
from genfast.metrics import mode_coverage
from genfast.models import MLPGAN
from genfast.training import GANTrainer

BATCH, SAMPLES, SHOWN = 100, 2500, 500
HIDDEN, JUDGE, PIECES = (400, 400), (200, 200, 200), 5
RATE, BETAS = 1e-3, (0.8, 0.999)
ANNEALED = 0.6  # of the run, in which the weight of R1 and R2 falls
QUICK_STEPS = 60
MARGIN = {"modes": 0.5, "quality": 0.05}  # kernels on and off count as equal within it


class Data(NamedTuple):
    """A mixture of Gaussians of one deviation; the first and last weight of R1 and R2; the length of a run."""

    centers: Tensor
    sigma: float
    penalty: tuple[float, float]
    steps: int

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.centers), (count,), generator=generator)
        return self.centers[chosen] + self.sigma * torch.randn(count, 2, generator=generator)


def _ring() -> Tensor:
    angle = torch.arange(8) * (2 * math.pi / 8)
    return torch.stack((angle.cos(), angle.sin()), 1)


def _grid() -> Tensor:
    line = torch.arange(-2.0, 3.0)
    return torch.cartesian_prod(line, line)


DATA = {"ring": Data(_ring(), 0.01, (0.1, 1e-3), 2500), "grid": Data(_grid(), 0.05, (0.1, 1e-3), 8000)}
PACKS = {"gan": 1, "pacgan2": 2, "pacgan4": 4, "relativistic": 1}
NAMES = {"gan": "GAN", "pacgan2": "PacGAN2", "pacgan4": "PacGAN4", "relativistic": "relativistic + R1 + R2"}
PUBLISHED = {
    ("ring", "gan"): 6.3, ("ring", "pacgan2"): 7.9, ("ring", "pacgan4"): 7.8,
    ("grid", "gan"): 17.3, ("grid", "pacgan2"): 23.8, ("grid", "pacgan4"): 24.8,
}  # fmt: skip


class Run(NamedTuple):
    """One model to train."""

    kernels: str
    data: str
    method: str
    seed: int


def make(which: Run, quick: bool) -> GANTrainer:
    """The networks and their training."""
    fused, pack = which.kernels == "on", PACKS[which.method]
    hidden, judge = ((32, 32), (16, 16, 16)) if quick else (HIDDEN, JUDGE)
    torch.manual_seed(which.seed)
    gan = MLPGAN(
        (2,), 2, hidden, discriminator_hidden=judge, maxout=PIECES, output="linear", packed=pack, fused=fused
    )  # fmt: skip
    common_options: dict[str, Any] = {"betas": BETAS, "seed": which.seed, "fused": fused}
    if which.method == "relativistic":
        weight, _ = DATA[which.data].penalty
        return GANTrainer(gan, loss="relativistic", lr=RATE, r1=weight, r2=weight, ema=0.995, **common_options)
    return GANTrainer(gan, loss="nonsaturating", lr=RATE, ema=0.0, **common_options)


def fit(trainer: GANTrainer, which: Run, steps: int, advance: Callable[[], None]) -> None:
    data, order = DATA[which.data], torch.Generator().manual_seed(which.seed)
    count = BATCH * PACKS[which.method]
    first, last = data.penalty
    for step in range(steps):
        for optimizer in trainer.optimizers.values():
            optimizer.param_groups[0]["lr"] = RATE * min(1.0, 2 * (1 - step / steps))
        if which.method == "relativistic":
            trainer.r1 = trainer.r2 = first * (last / first) ** min(1.0, step / (ANNEALED * steps))
        trainer.step(data.draw(count, order))
        advance()


def run(which: Run, steps: int, quick: bool, advance: Callable[[], None]) -> tuple[dict[str, Any], Tensor]:
    """One row, and the samples that it measures."""
    trainer, started = make(which, quick), time.perf_counter()
    fit(trainer, which, steps, advance)
    data = DATA[which.data]
    samples = trainer.sample(SAMPLES, seed=which.seed)
    found = mode_coverage(samples, data.centers, data.sigma)
    row = {
        **which._asdict(), "steps": steps, "modes": found.modes, "quality": found.quality,
        "minutes": (time.perf_counter() - started) / 60,
    }  # fmt: skip
    return row, samples


def finished(path: Path, lengths: dict[str, int]) -> list[dict[str, Any]]:
    """The rows of an earlier run's file that have as many steps."""
    kinds: dict[str, Callable[[str], Any]] = {
        "kernels": str, "data": str, "method": str, "seed": int, "steps": int, "modes": int, "quality": float,
        "minutes": float,
    }  # fmt: skip
    return [row for row in _runs.kept(path, kinds, {}) if row["steps"] == lengths[row["data"]]]


def drawn(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The samples of an earlier run's picture."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                point = {"data": row["data"], "method": row["method"], "x": float(row["x"]), "y": float(row["y"])}
                found.setdefault((row["data"], row["method"]), []).append(point)
    return found


def interval(values: list[float]) -> float:
    """Half the 95% interval of the mean, by Student's t; NaN for one value."""
    from scipy.stats import t

    _, error = common.mean_and_error(values)
    return math.nan if len(values) < 2 else float(t.ppf(0.975, len(values) - 1)) * error


def values(rows: list[dict[str, Any]], kernels: str, data: str, method: str, key: str) -> dict[int, float]:
    """A column by seed."""
    wanted = (kernels, data, method)
    return {row["seed"]: row[key] for row in rows if (row["kernels"], row["data"], row["method"]) == wanted}


def table(rows: list[dict[str, Any]]) -> tuple[list[common.Line], list[dict[str, Any]]]:
    """The printed lines, and the same with 95% intervals."""
    lines, intervals = [], []

    def add(label: str, found: list[float], published: float | None, source: str) -> None:
        half = interval(found)
        shown = "" if math.isnan(half) else f"95%: ± {half:.3f}"
        lines.append(common.Line(label, found, published, "; ".join(part for part in (shown, source) if part)))
        mean = common.mean_and_error(found)[0]
        intervals.append({"quantity": label, "mean": mean, "low": mean - half, "high": mean + half, "runs": len(found)})

    for data in DATA:
        for key, title in (("modes", f"modes of {len(DATA[data].centers)}"), ("quality", "high-quality share")):
            for method in PACKS:
                on, off = (values(rows, kernels, data, method, key) for kernels in ("on", "off"))
                for kernels, found in (("on", on), ("off", off)):
                    if found:
                        published = PUBLISHED.get((data, method)) if key == "modes" else None
                        source = "Lin et al. 2018" if published else ""
                        label = f"{data}, {NAMES[method]}, kernels {kernels}: {title}"
                        add(label, list(found.values()), published, source)
                pairs = [on[seed] - off[seed] for seed in on if seed in off]
                if pairs:
                    label = f"{data}, {NAMES[method]}, kernels on - off: {title}"
                    add(label, pairs, 0.0, f"equal within {MARGIN[key]}")
    return lines, intervals


def draw(path: Path, shown: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Samples of the first run of each method, over the modes."""
    plot = common.pyplot()
    kinds = list(dict.fromkeys(data for data, _ in shown))
    methods = [method for method in PACKS if any(method == found for _, found in shown)]
    figure, axes = plot.subplots(
        len(kinds), len(methods), figsize=(2.6 * len(methods), 2.7 * len(kinds)), layout="constrained", squeeze=False
    )
    for line, data in zip(axes, kinds, strict=True):
        for axis, method in zip(line, methods, strict=True):
            reach = DATA[data].centers.abs().max().item() + 0.5
            if (data, method) in shown:
                points = shown[data, method]
                axis.scatter(
                    [p["x"] for p in points], [p["y"] for p in points], s=1.5, color="#2a78d6", linewidths=0, alpha=0.5
                )
            axis.scatter(*DATA[data].centers.T.numpy(), s=12, color="#d1495b", marker="+", linewidths=0.7)
            axis.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")
            axis.set_title(NAMES[method], fontsize=8)
    figure.savefig(path, dpi=110)
    plot.close(figure)


def main(
    out: common.OutOption = None,
    quick: common.QuickOption = False,
    data: Annotated[str, typer.Option("--data", help="ring, grid or both.")] = "both",
    methods: Annotated[str, typer.Option("--methods", help="Of gan, pacgan2, pacgan4, relativistic.")] = "all",
    kernels: _runs.KernelsOption = "both",
    steps: Annotated[int | None, typer.Option("--steps", help="Of each run.")] = None,
    resume: _runs.ResumeOption = False,
    seeds: common.SeedsOption = "0-9",
    threads: common.ThreadsOption = None,
) -> None:
    """Trains GANs on mixtures of Gaussians and counts the modes that they reach."""
    sides = _runs.sides(kernels)
    kinds = _runs.chosen("--data", "all" if data == "both" else data, tuple(DATA))
    wanted = _runs.chosen("--methods", methods, tuple(PACKS))
    _runs.check_steps(steps)
    chosen = common.start(threads, seeds, quick)
    lengths = {kind: steps or (QUICK_STEPS if quick else DATA[kind].steps) for kind in DATA}
    runs = [Run(side, kind, way, seed) for seed in chosen for kind in kinds for way in wanted for side in sides]

    folder = common.output_folder("ring_grid", out, quick)
    rows = finished(folder / "runs.csv", lengths) if resume else []
    done = {tuple(row[key] for key in Run._fields) for row in rows}
    runs = [which for which in runs if which not in done]
    shown = drawn(folder / "samples.csv") if resume else {}
    with Progress(transient=True) as progress:
        task = progress.add_task("GAN", total=sum(lengths[which.data] for which in runs))
        for which in runs:
            row, samples = run(which, lengths[which.data], quick, partial(progress.advance, task))
            rows.append(row)
            if (which.data, which.method) not in shown:
                shown[which.data, which.method] = [
                    {"data": which.data, "method": which.method, "x": round(x, 4), "y": round(y, 4)}
                    for x, y in samples[:SHOWN].tolist()
                ]
                common.write_csv(folder / "samples.csv", [point for points in shown.values() for point in points], {})
            common.write_csv(folder / "runs.csv", rows, {})
    draw(folder / "samples.png", shown)
    lines, intervals = table(rows)
    common.finish(
        "ring_grid", "modes recovered", lines, {"runs": rows, "intervals": intervals}, out=out, quick=quick,
        seeds=sorted({row["seed"] for row in rows}),
        note=f"{lengths['ring']} steps on the ring and {lengths['grid']} on the grid, of {BATCH} logits; "
        f"{SAMPLES} samples; published runs have about 400,000 steps",
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
