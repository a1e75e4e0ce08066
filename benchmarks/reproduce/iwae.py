"""Table 1 of the IWAE paper: how the test log-likelihood of one-layer VAEs and IWAEs depends on K.

python -m genfast.benchmarks.reproduce.iwae [--data DIR] [--quick] [--full] [--seeds 0-9] [--out DIR]

One stochastic layer of 50 units between two of 200 tanh units on each side; Adam; pixels are drawn from the grey values
anew in each epoch; the rate falls by 10 over the run in eight steps of the published lengths 3^i. log p of the test
images is estimated from 5,000 samples each. ``--kernels off`` trains the same networks by plain PyTorch formulas:
torch.randn, densities written out, logsumexp.

Published (Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016): 60,000 images, batches of
20, 3,280 epochs. ``--full`` has that schedule; the default is far shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from torch import Tensor, nn

from genfast.benchmarks.reproduce import _common as common
from genfast.models import IWAE

LATENT, HIDDEN = 50, (200, 200)
PUBLISHED = {("vae", 1): 86.76, ("vae", 5): 86.47, ("vae", 50): 86.35, ("iwae", 5): 85.54, ("iwae", 50): 84.78}
EPOCHS, BATCH, FULL_EPOCHS, FULL_BATCH = 30, 100, 3280, 20
STEPS = 8  # of the learning rate, of 3^0 ... 3^7 parts
SAMPLES = 5000
KERNELS = ("on", "off", "both")


def rate(progress: float) -> float:
    """The learning rate after a fraction of the run, 1e-3 at first and 1e-4 at last."""
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


def fit(
    model: IWAE, grey: Tensor, epochs: int, batch: int, seed: int, plain: bool, advance: Callable[[], None]
) -> None:
    mean = grey.mean(0).clamp(1e-3, 1 - 1e-3)
    with torch.no_grad():
        model.decoder[-1].bias.copy_(torch.logit(mean))  # type: ignore[index,union-attr,operator]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-4)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = rate(epoch / epochs)
        x = torch.bernoulli(grey, generator=order)
        for chosen in torch.randperm(len(x), generator=order).split(batch):
            optimizer.zero_grad(set_to_none=True)
            rows = x[chosen]
            loss = -plain_bound(model, rows).mean() if plain else model.loss(rows)
            loss.backward()
            optimizer.step()
        advance()


def settings(quick: bool) -> list[tuple[str, int]]:
    return [("vae", 1), ("iwae", 3)] if quick else list(PUBLISHED)


def run(
    digits: common.Digits, seed: int, plain: bool, quick: bool, full: bool, advance: Callable[[], None]
) -> list[dict[str, Any]]:
    """One row a setting: log p of the test images in nats."""
    hidden, latent = ((24,), 6) if quick else (HIDDEN, LATENT)
    epochs, batch = (3, 100) if quick else (FULL_EPOCHS, FULL_BATCH) if full else (EPOCHS, BATCH)
    test = torch.bernoulli(digits.test, generator=torch.Generator().manual_seed(0))
    rows = []
    for gradient, samples in settings(quick):
        torch.manual_seed(seed)
        model = make_model(digits.train.shape[1], gradient, samples, hidden, latent)
        fit(model, digits.train, epochs, batch, seed, plain, advance)
        found = model.log_likelihood(test, 50 if quick else SAMPLES, seed=0)
        with torch.no_grad():
            bound = model.loss(test, samples=samples, seed=0).item()
        rows.append(
            {
                "kernels": "off" if plain else "on", "gradient": gradient, "samples": samples, "seed": seed,
                "negative_log_likelihood": -found.mean().item(), "negative_bound": bound,
                "active_units": active_units(model, test),
            }
        )  # fmt: skip
    return rows


@torch.no_grad()
def active_units(model: IWAE, x: Tensor) -> int:
    """Latent dimensions whose posterior mean varies by more than 0.01 over the images."""
    return int((model.encode(x)[0].var(0) > 0.01).sum())


def table(rows: list[dict[str, Any]]) -> list[common.Line]:
    lines = []
    for kernels in dict.fromkeys(row["kernels"] for row in rows):
        for gradient, samples in dict.fromkeys((row["gradient"], row["samples"]) for row in rows):
            chosen = [
                row for row in rows
                if (row["kernels"], row["gradient"], row["samples"]) == (kernels, gradient, samples)
            ]  # fmt: skip
            published = PUBLISHED.get((gradient, samples))
            lines.append(
                common.Line(
                    f"{gradient.upper()}, k = {samples}, kernels {kernels}",
                    [row["negative_log_likelihood"] for row in chosen],
                    published,
                    "Burda et al. 2016: 60,000 images, 3,280 epochs" if published else "",
                )
            )
    return lines


def equivalence(rows: list[dict[str, Any]]) -> str:
    """Difference of the means with and without kernels, setting by setting."""
    found = []
    for gradient, samples in dict.fromkeys((row["gradient"], row["samples"]) for row in rows):
        sides = [
            [row["negative_log_likelihood"] for row in rows
             if (row["kernels"], row["gradient"], row["samples"]) == (kernels, gradient, samples)]
            for kernels in ("on", "off")
        ]  # fmt: skip
        if all(sides):
            (on, on_error), (off, off_error) = (common.mean_and_error(side) for side in sides)
            found.append(f"{gradient} {samples}: {on - off:+.2f} +- {math.hypot(on_error, off_error):.2f}")
    return "; kernels on - off: " + ", ".join(found) if found else ""


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
    kernels: Annotated[str, typer.Option("--kernels", help="on, off (plain PyTorch) or both.")] = "both",
    seeds: common.SeedsOption = "0-1",
    threads: common.ThreadsOption = None,
) -> None:
    """Trains VAEs and IWAEs on MNIST and estimates their test log-likelihood."""
    if kernels not in KERNELS:
        raise typer.BadParameter(f"--kernels must be one of {', '.join(KERNELS)}, got {kernels}")
    chosen = common.start(threads, seeds, quick)
    digits = common.load_digits(data, quick)
    sides = [False, True] if kernels == "both" else [kernels == "off"]
    rows: list[dict[str, Any]] = []
    epochs = 3 if quick else FULL_EPOCHS if full else EPOCHS
    with Progress(transient=True) as progress:
        task = progress.add_task("IWAE", total=len(chosen) * len(sides) * epochs * len(settings(quick)))
        for seed in chosen:
            for plain in sides:
                rows += run(digits, seed, plain, quick, full, partial(progress.advance, task))
    batch = FULL_BATCH if full else BATCH
    folder = common.finish(
        "iwae", "-log p of MNIST's test images, nats", table(rows), {"runs": rows}, out=out, quick=quick, seeds=chosen,
        note=f"{digits.note}. {epochs} epochs of batches of {batch}{equivalence(rows)}",
    )  # fmt: skip
    draw(folder / "likelihood.png", rows)


if __name__ == "__main__":
    typer.run(main)
