"""Pictures of a trained autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfast.training.run import Split, generator
from genfast.training.sampling import write
from genfast.training.vae_loop import sample
from genfast.training.vae_run import AutoencoderRun

__all__ = ["draw", "figure_of", "saved"]

_ACROSS = 8  # pictures side by side
_MAP = 16  # pictures on a side of the latent map


@torch.no_grad()
def draw(
    run: AutoencoderRun, split: Split, log: list[dict[str, str]], shape: tuple[int, ...], folder: Path
) -> list[str]:
    """Draws reconstructions, samples, interpolations, the learning curve and, of a latent of size 2, its map.

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
    model = run.model.eval()

    x = run.batch(split.held_out[: 4 * _ACROSS])
    pairs = torch.stack((run.rows(x), run.rows(model.reconstruct(x))), 1)
    lines = [line for pair in pairs.split(_ACROSS) for line in pair.unbind(1)]  # originals, and theirs below them
    blank = [line.new_zeros(_ACROSS - len(line), line.shape[1]) for line in lines]
    originals = torch.cat([part for line in zip(lines, blank, strict=True) for part in line])
    write(originals, folder / "reconstructions.png", shape, _ACROSS)

    write(sample(run, _ACROSS**2, run.options.seed), folder / "samples.png", shape, _ACROSS)

    ends = split.held_out[torch.randperm(len(split.held_out), generator=generator("ends", run.options.seed))]
    half = min(_ACROSS, len(ends) // 2)
    names = ["reconstructions.png", "samples.png"]
    if half:
        between = model.interpolate(run.batch(ends[:half]), run.batch(ends[half : 2 * half]), _ACROSS)
        write(run.rows(between.movedim(1, 0).flatten(0, 1)), folder / "interpolations.png", shape, _ACROSS)
        names.append("interpolations.png")

    _curve(log, folder / "curve.png")
    names.append("curve.png")
    if getattr(model, "latent", None) == 2:
        _latent(run, split, folder / "latent.png")
        z = _grid_of_quantiles().to(run.device)
        write(run.rows(model._mean(model.decode(z))), folder / "latent_map.png", shape, _MAP)
        names += ["latent.png", "latent_map.png"]
    return names


def _grid_of_quantiles() -> Tensor:
    """z at evenly spaced quantiles of the prior: the second coordinate falls from line to line."""
    quantiles = torch.special.ndtri((torch.arange(_MAP) + 0.5) / _MAP)
    down, across = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return torch.stack((across, down), -1).view(-1, 2)


def figure_of(size: tuple[float, float]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")


def saved(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _curve(log: list[dict[str, str]], path: Path) -> None:
    """What training maximizes, on training rows, and the held-out bound."""
    figure, axes = figure_of((6, 3.6))
    epochs = [int(line["epoch"]) for line in log]
    lines = [("training objective", [-float(line["training_loss"]) for line in log])]
    bounds = {"bound": "held-out bound", "elbo": "held-out ELBO"}
    for name, title in bounds.items() if "elbo" in log[0] else (("reconstruction", "held-out log p(x|codes)"),):
        if name in log[0]:
            lines.append((title, [float(line[name]) for line in log]))
    for title, values in lines:
        axes.plot(epochs, values, label=title, linewidth=2)
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats an example")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    saved(figure, path)


def _latent(run: AutoencoderRun, split: Split, path: Path) -> None:
    """Where held-out rows lie: the means of their posteriors, and circles around 39%, 86% and 99% of the prior."""
    figure, axes = figure_of((4.6, 4.6))
    mu = run.model.encode(run.batch(split.held_out))[0].cpu()
    axes.scatter(mu[:, 0].numpy(), mu[:, 1].numpy(), s=6, linewidths=0, alpha=0.6)
    turn = torch.linspace(0, 2 * torch.pi, 200)
    for radius in (1, 2, 3):
        axes.plot((radius * turn.cos()).numpy(), (radius * turn.sin()).numpy(), color="grey", linewidth=0.7, alpha=0.6)
    axes.set_aspect("equal")
    axes.set_title("posterior means of held-out examples", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    saved(figure, path)
