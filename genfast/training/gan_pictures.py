"""Pictures of a trained GAN."""

from __future__ import annotations

from pathlib import Path

import torch

from genfast.training.gan_loop import sample
from genfast.training.gan_run import GANRun
from genfast.training.run import Split
from genfast.training.sampling import write
from genfast.training.vae_pictures import figure_of, saved

__all__ = ["draw", "draw_epoch"]

_ACROSS = 8  # pictures side by side


def draw_epoch(run: GANRun, shape: tuple[int, ...], folder: Path) -> None:
    """A grid of samples of the moving average, of the same z in every epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    write(sample(run, _ACROSS**2, run.options.seed), folder / f"epoch_{run.epoch:04}.png", shape, _ACROSS)


@torch.no_grad()
def draw(run: GANRun, split: Split, log: list[dict[str, str]], shape: tuple[int, ...], folder: Path) -> list[str]:
    """Draws samples of the moving average, interpolations, held-out rows and the curves of training.

    Args:
        run: a finished run.
        split: its data.
        log: lines of its log.
        shape: of an example's picture.
        folder: for the files; made where it is missing.

    Returns:
        The names of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gan, seed = run.trained, run.options.seed
    write(sample(run, _ACROSS**2, seed), folder / "samples.png", shape, _ACROSS)
    write(run.rows(split.held_out[: _ACROSS**2]), folder / "held_out.png", shape, _ACROSS)
    z = gan.noise(2 * _ACROSS, seed)
    between = gan.interpolate(z[:_ACROSS], z[_ACROSS:], _ACROSS, seed=seed)
    write(run.rows(between.movedim(1, 0).flatten(0, 1)), folder / "interpolations.png", shape, _ACROSS)

    figure, axes = figure_of((6, 3.6))
    epochs = [int(line["epoch"]) for line in log]
    for name, title in (("discriminator_loss", "discriminator"), ("generator_loss", "generator"), ("recall", "recall")):
        points = [(epoch, float(line[name])) for epoch, line in zip(epochs, log, strict=True) if line[name]]
        if points:
            axes.plot(*zip(*points, strict=True), label=title, linewidth=2)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss; recall of held-out examples")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    saved(figure, folder / "curve.png")
    return ["samples.png", "held_out.png", "interpolations.png", "curve.png"]
