"""Fantasy particles of RBMs and DBNs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfast import ops
from genfast.models import DBN
from genfast.ops._rbm_units import mean
from genfast.training.rbm_run import RBMRun

__all__ = ["sample"]


def sample(
    run: RBMRun,
    n: int,
    seed: int,
    *,
    steps: int | None = None,
    beta: float | None = None,
    clamp: Tensor | None = None,
    means: bool = False,
) -> Tensor:
    """Draws by Gibbs sampling; see ``training.sample``."""
    steps = 1000 if steps is None else steps
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if isinstance(run.model, DBN):
        if beta is not None or clamp is not None:
            raise ValueError("beta and clamp are for an rbm; this model is a dbn")
        return _decoded(run, run.model.sample(n, steps, seed=seed, mean=means), means)
    beta = 1.0 if beta is None else beta
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a finite number above 0, got {beta:g}")
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


def _encoded(run: RBMRun, values: Tensor, n: int) -> Tensor:
    """Data as visible states, NaN where they are free."""
    columns = run.columns
    if values.dim() != 2 or values.shape[0] not in (1, n) or values.shape[1] != columns:
        raise ValueError(f"clamp must be 1 or {n} rows of {columns} columns, got {' x '.join(map(str, values.shape))}")
    if run.options.bounded and bool(((values < 0) | (values > 1)).any()):
        raise ValueError("clamp must have values in [0, 1] for bernoulli units")
    return run.encode(values).expand(n, -1)


def _decoded(run: RBMRun, v: Tensor, means: bool) -> Tensor:
    v, categories = v.float().cpu(), run.options.categories
    if categories > 1:
        return v if means else v.unflatten(1, (-1, categories)).argmax(-1).float()
    return run.decode(v)
