"""The demo's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from genfast.demo.anomaly import LEFT_OUT, Anomalies
from genfast.demo.gan import GANResult
from genfast.demo.train import SIDE, Digits, Run
from genfast.models import GAN, VAE
from genfast.nn import RBM

matplotlib.use("Agg")
from matplotlib import pyplot

__all__ = ["NAMES", "draw_all"]

NAMES = (
    "vae_samples.png", "vae_reconstructions.png", "vae_interpolations.png", "vae_anomalies.png", "rbm_fantasies.png",
    "rbm_filters.png", "learning_curves.png", "gan_samples.png", "gan_interpolations.png",
)  # fmt: skip
BLUE, ORANGE = "#2a78d6", "#d97706"


def _tile(images: Tensor, columns: int, gap: int = 1, background: float = 0.1) -> Tensor:
    """[N, 64] images as one picture, ``columns`` a row, with gaps between."""
    rows = -(-len(images) // columns)
    size = SIDE + gap
    picture = torch.full((rows * size + gap, columns * size + gap), background)
    for index, image in enumerate(images):
        top, left = gap + index // columns * size, gap + index % columns * size
        picture[top : top + SIDE, left : left + SIDE] = image.view(SIDE, SIDE)
    return picture


def _save(picture: Tensor, path: Path, title: str, labels: list[str] | None = None, **options: Any) -> None:
    height, width = picture.shape
    figure, axes = pyplot.subplots(figsize=(width / 13, height / 13 + 0.4), layout="constrained")
    axes.imshow(picture.numpy(), interpolation="nearest", **options)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    if labels:
        places = [1 + (SIDE - 1) / 2 + index * (SIDE + 1) for index in range(len(labels))]
        axes.set_yticks(places, labels, fontsize=8)
        axes.tick_params(length=0)
    else:
        axes.set_yticks([])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


@torch.no_grad()
def _fantasies(rbm: RBM, count: int, gibbs_steps: int) -> Tensor:
    """Visible probabilities of chains that started at noise."""
    start = (torch.rand(count, rbm.visible, generator=torch.Generator().manual_seed(3)) < 0.5).float()
    v = rbm.gibbs(start, gibbs_steps, seed=4)
    h = rbm.sample_hidden(v, seed=4, step=2 * gibbs_steps)
    return rbm.visible_mean(h)


def _curves(path: Path, vae_run: Run[VAE], rbm_run: Run[RBM]) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, run, title, color in (
        (left, vae_run, "VAE: ELBO", BLUE),
        (right, rbm_run, "RBM: pseudo-likelihood", ORANGE),
    ):
        axes.plot(run.epochs, run.held_out, color=color, linewidth=2)
        axes.annotate(
            f"{run.held_out[-1]:.2f}",
            (run.epochs[-1], run.held_out[-1]),
            (0, -14),
            textcoords="offset points",
            ha="right",
        )
        axes.set_title(f"{title}, nats a held-out digit", fontsize=10, loc="left")
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_all(
    out: Path, digits: Digits, vae_run: Run[VAE], found: Anomalies, rbm_run: Run[RBM], gan_run: GANResult,
    gibbs_steps: int,
) -> None:  # fmt: skip
    """Writes every picture of ``NAMES`` into ``out``."""
    ink: dict[str, Any] = {"cmap": "gray_r", "vmin": 0.0, "vmax": 1.0}
    vae, rbm = vae_run.model, rbm_run.model
    _save(_tile(vae.sample(60, seed=2), 12), out / NAMES[0], "VAE: drawn from the prior (pixel probabilities)", **ink)

    originals = digits.test[:14]
    pair = torch.cat((originals, vae.reconstruct(originals)))
    labels = ["held-out", "rebuilt"]
    _save(_tile(pair, 14), out / NAMES[1], "VAE: held-out digits and their reconstructions", labels, **ink)

    between = vae.interpolate(digits.test[:6], digits.test[6:12], 14)
    title = "VAE: on the line between two held-out digits"
    _save(_tile(between.movedim(1, 0).flatten(0, 1), 14), out / NAMES[2], title, **ink)

    order = found.scores.argsort(descending=True)
    pair = digits.test[torch.cat((order[:14], order.flip(0)[:14]))]
    title = f"VAE trained without {LEFT_OUT}s: held-out digits by its anomaly score"
    _save(_tile(pair, 14), out / NAMES[3], title, ["highest", "lowest"], **ink)

    fantasies = _fantasies(rbm, 60, gibbs_steps)
    _save(
        _tile(fantasies, 12), out / NAMES[4], f"RBM: {gibbs_steps} Gibbs steps from noise (pixel probabilities)", **ink
    )

    strongest = rbm.W.detach().norm(dim=0).argsort(descending=True)[:60]
    filters = rbm.W.detach().T[strongest]
    filters = filters / filters.abs().amax(1, keepdim=True)
    colors: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -1.0, "vmax": 1.0}
    _save(_tile(filters, 12), out / NAMES[5], "RBM: the 60 strongest filters, each to its own scale", **colors)
    _curves(out / NAMES[6], vae_run, rbm_run)

    trainer = gan_run.trainer
    samples = (trainer.sample(60, seed=2) + 1) / 2
    _save(_tile(samples, 12), out / NAMES[7], "GAN: samples of the generator's moving average", **ink)
    gan = GAN(trainer.average, trainer.gan.discriminator, trainer.gan.latent)
    z = gan.noise(12, seed=2)
    between = (gan.interpolate(z[:6], z[6:], 14) + 1) / 2
    _save(
        _tile(between.movedim(1, 0).flatten(0, 1), 14), out / NAMES[8], "GAN: between two draws of z", **ink
    )  # fmt: skip
