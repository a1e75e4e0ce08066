"""Table 1 of the IWAE paper: how the test log-likelihood of one-layer VAEs and IWAEs depends on K.

python -m genfast.benchmarks.reproduce.iwae [--data DIR] [--quick] [--full] [--seeds 0-9] [--samples 1,5,50] [--resume]
    [--kernels on|off|both] [--out DIR]

One stochastic layer of 50 units between two of 200 tanh units on each side; Adam, batches of 20; pixels are drawn from
the grey values anew in each epoch. log p of the test images is estimated from 5,000 samples each. ``--kernels off``
trains the same networks from the same weights on the same batches by plain PyTorch formulas: torch.randn, densities
written out, logsumexp.

Published (Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016): 60,000 images, 3,280 epochs;
the rate falls by 10 in eight steps of 3^i epochs. ``--full`` has that schedule. The default is far shorter, so it keeps
the rate at 1e-3 for three fifths of the run and then lets it fall by 10, and takes the first 500 test images.

Runs take minutes to hours: each is saved as it ends, and ``--resume`` does what the folder lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.progress import Progress
from torch import Tensor, nn

from genfast.benchmarks.reproduce import _common as common
from genfast.benchmarks.reproduce import _runs
from genfast.models import IWAE

LATENT, HIDDEN = 50, (200, 200)
QUICK = [("vae", 1), ("iwae", 3)]
PUBLISHED = {("vae", 1): 86.76, ("vae", 5): 86.47, ("vae", 50): 86.35, ("iwae", 5): 85.54, ("iwae", 50): 84.78}
EPOCHS, FULL_EPOCHS, BATCH = 20, 3280, 20
IMAGES = 500  # of the test set, but for --full
STEPS = 8  # of the published learning rate, of 3^0 ... 3^7 parts
SAMPLES = 5000
MARGIN = 0.5  # nats: kernels on and off count as equal within it


class Schedule(NamedTuple):
    """How long to train and how much to measure."""

    epochs: int
    batch: int
    images: int
    samples: int
    published: bool

    @classmethod
    def of(cls, quick: bool, full: bool) -> Schedule:
        if quick:
            return cls(3, 100, 200, 50, False)
        return cls(FULL_EPOCHS, BATCH, 10_000, SAMPLES, True) if full else cls(EPOCHS, BATCH, IMAGES, SAMPLES, False)


def rate(progress: float, published: bool) -> float:
    """The learning rate after a fraction of the run, 1e-3 at first and 1e-4 at last."""
    if not published:
        return 1e-3 * 10 ** -max(0.0, (progress - 0.6) / 0.4)
    parts = [3**i for i in range(STEPS)]
    step, passed = 0, 0.0
    while step < STEPS - 1 and progress >= (passed + parts[step]) / sum(parts):
        passed += parts[step]
        step += 1
    return 1e-3 * 10 ** (-step / (STEPS - 1))


def plain_bound(model: IWAE, x: Tensor) -> Tensor:
    """The bound by plain PyTorch formulas."""
    samples = model.samples
    mu, logvar = model.encode(x)
    z = mu + torch.exp(0.5 * logvar) * torch.randn(samples, *mu.shape)
    log_q = -0.5 * ((z - mu) ** 2 / logvar.exp() + logvar + math.log(2 * math.pi)).sum(-1)
    log_pz = -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)
    targets = x.expand(samples, *x.shape)
    log_px = -nn.functional.binary_cross_entropy_with_logits(model.decode(z), targets, reduction="none").sum(-1)
    log_weights = log_px + log_pz - log_q
    if model.gradient == "vae":
        return log_weights.mean(0)
    return torch.logsumexp(log_weights, 0) - math.log(samples)


def make_model(features: int, gradient: str, samples: int, hidden: tuple[int, ...], latent: int) -> IWAE:
    model: IWAE = IWAE.mlp(features, hidden, latent, activation=nn.Tanh, samples=samples, gradient=gradient)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def fit(model: IWAE, grey: Tensor, schedule: Schedule, seed: int, plain: bool, advance: Callable[[], None]) -> None:
    mean = grey.mean(0).clamp(1e-3, 1 - 1e-3)
    with torch.no_grad():
        model.decoder[-1].bias.copy_(torch.logit(mean))  # type: ignore[index,union-attr,operator]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-4)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(schedule.epochs):
        optimizer.param_groups[0]["lr"] = rate(epoch / schedule.epochs, schedule.published)
        x = torch.bernoulli(grey, generator=order)
        for chosen in torch.randperm(len(x), generator=order).split(schedule.batch):
            optimizer.zero_grad(set_to_none=True)
            rows = x[chosen]
            loss = -plain_bound(model, rows).mean() if plain else model.loss(rows)
            loss.backward()
            optimizer.step()
        advance()


class Run(NamedTuple):
    """One model to train."""

    kernels: str
    gradient: str
    samples: int
    seed: int


def run(
    digits: common.Digits, which: Run, schedule: Schedule, quick: bool, advance: Callable[[], None]
) -> dict[str, Any]:
    """One row: -log p of the test images in nats, the bound, latents in use."""
    hidden, latent = ((24,), 6) if quick else (HIDDEN, LATENT)
    test = torch.bernoulli(digits.test, generator=torch.Generator().manual_seed(0))[: schedule.images]
    torch.manual_seed(which.seed)
    model = make_model(digits.train.shape[1], which.gradient, which.samples, hidden, latent)
    fit(model, digits.train, schedule, which.seed, which.kernels == "off", advance)
    found = model.log_likelihood(test, schedule.samples, seed=0)
    with torch.no_grad():
        bound = model.loss(test, samples=which.samples, seed=0).item()
    return {
        **which._asdict(), "epochs": schedule.epochs, "images": len(test), "train": len(digits.train),
        "negative_log_likelihood": -found.mean().item(), "negative_bound": bound,
        "active_units": active_units(model, test),
    }  # fmt: skip


@torch.no_grad()
def active_units(model: IWAE, x: Tensor) -> int:
    """Latent dimensions whose posterior mean varies by more than 0.01 over the images."""
    return int((model.encode(x)[0].var(0) > 0.01).sum())


def finished(path: Path, schedule: Schedule, digits: common.Digits) -> list[dict[str, Any]]:
    """The rows of an earlier run's file that have this schedule and this much data."""
    whole, text = ("samples", "seed", "epochs", "images", "train", "active_units"), ("kernels", "gradient")
    numbers = ("negative_log_likelihood", "negative_bound")
    kinds = {**dict.fromkeys(text, str), **dict.fromkeys(whole, int), **dict.fromkeys(numbers, float)}
    images = min(schedule.images, len(digits.test))
    return _runs.kept(path, kinds, {"epochs": schedule.epochs, "images": images, "train": len(digits.train)})


def values(rows: list[dict[str, Any]], kernels: str, gradient: str, samples: int) -> dict[int, float]:
    """-log p by seed."""
    wanted = (kernels, gradient, samples)
    return {
        row["seed"]: row["negative_log_likelihood"]
        for row in rows
        if (row["kernels"], row["gradient"], row["samples"]) == wanted
    }


def table(rows: list[dict[str, Any]]) -> list[common.Line]:
    lines = []
    settings = sorted({(row["gradient"], row["samples"]) for row in rows}, key=lambda s: (s[0] == "iwae", s[1]))
    for kernels in ("on", "off"):
        for gradient, samples in settings:
            found = values(rows, kernels, gradient, samples)
            published = PUBLISHED.get((gradient, samples))
            source = "Burda et al. 2016: 60,000 images, 3,280 epochs" if published else ""
            if found:
                label = f"{gradient.upper()}, k = {samples}, kernels {kernels}"
                lines.append(common.Line(label, list(found.values()), published, source))
    for gradient, samples in settings:
        on, off = (values(rows, kernels, gradient, samples) for kernels in ("on", "off"))
        pairs = [on[seed] - off[seed] for seed in on if seed in off]
        if pairs:
            label = f"{gradient.upper()}, k = {samples}: kernels on - off"
            lines.append(common.Line(label, pairs, 0.0, f"equal within {MARGIN} nats"))
    return lines


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    plot = common.pyplot()
    figure, axis = plot.subplots(figsize=(6, 3.6), layout="constrained")
    for gradient, color in (("vae", "#d1495b"), ("iwae", "#2a78d6")):
        for kernels, style in (("on", "-"), ("off", "--")):
            points: dict[int, list[float]] = {}
            for row in rows:
                if row["kernels"] == kernels and (row["gradient"] == gradient or row["samples"] == 1):
                    points.setdefault(row["samples"], []).append(row["negative_log_likelihood"])
            if points:
                means = [common.mean_and_error(points[k]) for k in sorted(points)]
                errors = [0.0 if math.isnan(error) else error for _, error in means]
                axis.errorbar(
                    sorted(points), [mean for mean, _ in means], errors, color=color, linestyle=style, marker="o",
                    capsize=3, label=f"{gradient.upper()}, kernels {kernels}",
                )  # fmt: skip
    axis.set(xscale="log", xlabel="K", ylabel="-log p(test), nats")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plot.close(figure)


def main(
    data: common.DataOption = None,
    out: common.OutOption = None,
    quick: common.QuickOption = False,
    full: Annotated[bool, typer.Option("--full", help="The published schedule: days on a CPU.")] = False,
    kernels: _runs.KernelsOption = "both",
    samples: Annotated[str, typer.Option("--samples", help="K to train with, e.g. 1,5.")] = "1,5,50",
    resume: _runs.ResumeOption = False,
    seeds: common.SeedsOption = "0-9",
    threads: common.ThreadsOption = None,
) -> None:
    """Trains VAEs and IWAEs on MNIST and estimates their test log-likelihood."""
    sides = _runs.sides(kernels)
    known = sorted({str(k) for _, k in PUBLISHED}, key=int)
    if not set(samples.split(",")) <= set(known):
        raise typer.BadParameter(f"--samples must be of {', '.join(known)}, got {samples}")
    chosen = common.start(threads, seeds, quick)
    digits = common.load_digits(data, quick)
    schedule = Schedule.of(quick, full)
    settings = QUICK if quick else [s for s in PUBLISHED if str(s[1]) in samples.split(",")]
    runs = [Run(side, *setting, seed) for seed in chosen for setting in settings for side in sides]

    folder = common.output_folder("iwae", out, quick)
    rows = finished(folder / "runs.csv", schedule, digits) if resume else []
    done = {tuple(row[key] for key in Run._fields) for row in rows}
    runs = [which for which in runs if which not in done]
    with Progress(transient=True) as progress:
        task = progress.add_task("IWAE", total=len(runs) * schedule.epochs)
        for which in runs:
            rows.append(run(digits, which, schedule, quick, partial(progress.advance, task)))
            common.write_csv(folder / "runs.csv", rows, {})
    common.finish(
        "iwae", "-log p of MNIST's test images, nats", table(rows), {"runs": rows}, out=out, quick=quick,
        seeds=sorted({row["seed"] for row in rows}),
        note=f"{digits.note}. {schedule.epochs} epochs of batches of {schedule.batch}, "
        f"{schedule.samples} samples for each of {rows[0]['images'] if rows else 0} test images",
    )  # fmt: skip
    draw(folder / "likelihood.png", rows)


if __name__ == "__main__":
    typer.run(main)
