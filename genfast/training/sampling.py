"""Samples of a trained model, and the files that they are written to."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfast.data import parse_size
from genfast.training._png import grid, png
from genfast.training.families import family_of
from genfast.training.run import Run

__all__ = ["FORMATS", "image_shape", "sample", "write"]

FORMATS = (".png", ".csv", ".safetensors")


@torch.no_grad()
def sample(
    run: Run,
    n: int,
    steps: int | None = None,
    *,
    seed: int = 0,
    beta: float | None = None,
    clamp: Tensor | None = None,
    means: bool = False,
) -> Tensor:
    """Draws from the model, in the units of its data: of RBMs and DBNs by Gibbs sampling, of autoencoders the means of
    p(x|z) at draws of z from the prior, of GANs the samples of the generator's moving average.

    Args:
        run: of ``training.load``.
        n: number of independent draws.
        steps: Gibbs steps of each, from a state drawn from the visible biases alone; None for 1000.
        seed: of all noise.
        beta: inverse temperature of an RBM; None for 1.
        clamp: values that an RBM's visible units keep, in the units of the data, [1 or n, columns]; NaN for free ones.
        means: of RBMs and DBNs, the means of the visible units given the last hidden states in place of draws.

    Returns:
        [n, columns] float32 on the CPU, category numbers for softmax units; with ``means`` their probabilities
        [n, columns * K].

    Raises:
        ValueError: for options out of range, or that the model does not have.

    Examples:
        >>> from genfast.data import Rows
        >>> from genfast.training import RBMOptions, start
        >>> run = start(RBMOptions(hidden=(4,)), Rows(torch.ones(5, 3), None))
        >>> sample(run, 2, 10, clamp=torch.tensor([[1.0, 0.0, float("nan")]]))[:, :2]
        tensor([[1., 0.],
                [1., 0.]])
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    family = family_of(run.options.model)
    options = {"steps": steps, "beta": beta, "clamp": clamp}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in family.sample_options:
            raise ValueError(f"{name} is for an rbm or a dbn; this model is of the class {run.class_name}")
    return family.sample(run, n, seed, means=means, **given)


def image_shape(run: Run, columns: int, given: str | None = None) -> tuple[int, ...]:
    """(rows, columns) or (channels, rows, columns) of the picture of one example: as given, of the data, or a square.

    Raises:
        ValueError: where there is none, or ``given`` (``"28x28"``) is not of so many columns.
    """
    if given is not None:
        shape: tuple[int, ...] = parse_size(given, "the shape")
    elif run.shape is not None and (len(run.shape) == 2 or (len(run.shape) == 3 and run.shape[0] in (1, 3))):
        shape = run.shape
    else:
        side = math.isqrt(columns)
        shape = (side, side)
    if math.prod(shape) != columns or 0 in shape:
        raise ValueError(
            f"{columns} values an example are no picture of {' x '.join(map(str, shape))}; give its shape, or write a "
            "CSV"
        )
    return shape


def write(values: Tensor, path: Path, shape: tuple[int, ...] | None = None, across: int | None = None) -> None:
    """Writes rows as a PNG of pictures of ``shape``, a CSV, or a safetensors file with the tensor ``samples``.

    In a PNG, with ``across`` pictures side by side, [0, 1] is the range from white to black, of images with channels
    from black to white; values beyond widen it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        assert shape is not None
        low, high = min(0.0, values.min().item()), max(1.0, values.max().item())
        path.write_bytes(png(grid(((values - low) / (high - low)).view(-1, *shape), across)))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer: Any = csv.writer(file, lineterminator="\n")
            writer.writerow([f"v{index}" for index in range(values.shape[1])])
            writer.writerows([f"{value:.9g}" for value in row] for row in values.tolist())
    else:
        from safetensors.torch import save_file

        save_file({"samples": values.contiguous()}, path)
