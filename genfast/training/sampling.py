"""Fantasy particles of a trained model, and the files that they are written to."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfast import ops
from genfast.data import one_hot
from genfast.models import DBN
from genfast.ops._rbm_units import GAUSSIAN, SOFTMAX, mean
from genfast.training._png import grid, png
from genfast.training.run import Run

__all__ = ["FORMATS", "image_shape", "sample", "write"]

FORMATS = (".png", ".csv", ".safetensors")


@torch.no_grad()
def sample(
    run: Run,
    n: int,
    steps: int,
    *,
    seed: int = 0,
    beta: float = 1.0,
    clamp: Tensor | None = None,
    means: bool = False,
) -> Tensor:
    """Draws from the model by Gibbs sampling, in the units of its data.

    Args:
        run: of ``training.load``.
        n: number of independent chains.
        steps: Gibbs steps of each, from a state drawn from the visible biases alone.
        seed: of all noise.
        beta: inverse temperature, of an RBM.
        clamp: values that an RBM's visible units keep, in the units of the data, [1 or n, columns]; NaN for free ones.
        means: the means of the visible units given the last hidden states in place of draws.

    Returns:
        [n, columns] float32 on the CPU, category numbers for softmax units; with ``means`` their probabilities
        [n, columns * K].

    Raises:
        ValueError: for options out of range, or that the model does not have.

    Examples:
        >>> from genfast.data import Rows
        >>> from genfast.training import Options, start
        >>> run = start(Options(hidden=(4,)), Rows(torch.ones(5, 3), None))
        >>> sample(run, 2, 10, clamp=torch.tensor([[1.0, 0.0, float("nan")]]))[:, :2]
        tensor([[1., 0.],
                [1., 0.]])
    """
    if n < 1 or steps < 0:
        raise ValueError(f"n must be at least 1 and steps at least 0, got {n} and {steps}")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a finite number above 0, got {beta:g}")
    if isinstance(run.model, DBN):
        if beta != 1 or clamp is not None:
            raise ValueError("beta and clamp are for an rbm; this model is a dbn")
        return _decoded(run, run.model.sample(n, steps, seed=seed, mean=means), means)
    rbm, kind = run.model, run.model._visible_kind
    v = rbm.sample_visible(rbm.W.new_zeros(n, rbm.hidden), seed=seed)
    mask = None
    if clamp is not None:
        held = _encoded(run, clamp, n).to(v)
        mask = ~torch.isnan(held)
        v = torch.where(mask, held, v)
    v = rbm.gibbs(v, steps, seed=seed, step=2, beta=beta, clamp=mask)
    if means:
        h = ops.rbm_half_step(
            v, rbm.W, rbm.c, to="hidden", units=rbm.hidden_units, logvar=rbm.logvar, precision=rbm.precision,
            beta=beta, seed=seed, step=2 + 2 * steps,
        )  # fmt: skip
        assert isinstance(h, Tensor)
        expected = mean(h @ rbm.W.T + rbm.b, kind, beta)
        v = expected if mask is None else torch.where(mask, v, expected)
    return _decoded(run, v, means)


def _encoded(run: Run, values: Tensor, n: int) -> Tensor:
    """Data as visible states, NaN where they are free."""
    rbm = run.layers[0]
    kind = rbm._visible_kind
    columns = rbm.visible // kind.categories
    if values.dim() != 2 or values.shape[0] not in (1, n) or values.shape[1] != columns:
        raise ValueError(f"clamp must be 1 or {n} rows of {columns} columns, got {' x '.join(map(str, values.shape))}")
    if kind.kind == SOFTMAX:
        values = one_hot(values, kind.categories)
    elif kind.kind == GAUSSIAN:
        assert run.mean is not None
        assert run.std is not None
        values = (values - run.mean) / run.std
    elif bool(((values < 0) | (values > 1)).any()):
        raise ValueError("clamp must have values in [0, 1] for bernoulli units")
    return values.expand(n, -1)


def _decoded(run: Run, v: Tensor, means: bool) -> Tensor:
    kind = run.layers[0]._visible_kind
    v = v.float().cpu()
    if kind.kind == GAUSSIAN:
        assert run.mean is not None
        assert run.std is not None
        return v * run.std + run.mean
    if kind.kind == SOFTMAX and not means:
        return v.unflatten(1, (-1, kind.categories)).argmax(-1).float()
    return v


def image_shape(run: Run, columns: int, given: str | None = None) -> tuple[int, int]:
    """(rows, columns) of the picture of one example: as given, of the data, or a square.

    Raises:
        ValueError: where there is none, or ``given`` (``"28x28"``) is not of so many columns.
    """
    if given is not None:
        sides = given.lower().split("x")
        if len(sides) != 2 or not all(side.isdecimal() for side in sides):
            raise ValueError(f"the shape must be ROWSxCOLUMNS, as 28x28, got {given!r}")
        shape: tuple[int, ...] = (int(sides[0]), int(sides[1]))
    else:
        side = math.isqrt(columns)
        shape = run.shape if run.shape is not None and len(run.shape) == 2 else (side, side)
    if shape[0] * shape[1] != columns or 0 in shape:
        raise ValueError(
            f"{columns} values an example are no picture of {shape[0]} x {shape[1]}; give its shape, or write a CSV"
        )
    return shape[0], shape[1]


def write(values: Tensor, path: Path, shape: tuple[int, int] | None = None) -> None:
    """Writes rows as a PNG of pictures of ``shape``, a CSV, or a safetensors file with the tensor ``samples``.

    In a PNG the least and the greatest value are white and black, and [0, 1] at least.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        assert shape is not None
        low, high = min(0.0, values.min().item()), max(1.0, values.max().item())
        path.write_bytes(png(grid(((values - low) / (high - low)).view(-1, *shape))))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer: Any = csv.writer(file, lineterminator="\n")
            writer.writerow([f"v{index}" for index in range(values.shape[1])])
            writer.writerows([f"{value:.9g}" for value in row] for row in values.tolist())
    else:
        from safetensors.torch import save_file

        save_file({"samples": values.contiguous()}, path)
