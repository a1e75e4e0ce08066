"""The training loop of RBMs, and of DBNs layer by layer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genfast.data import binarize
from genfast.nn import RBM
from genfast.ops._rbm_units import BERNOULLI, GAUSSIAN
from genfast.training.rbm_run import RBMOptions, RBMRun
from genfast.training.run import Progress, Split, batches, generator

__all__ = ["RBMMeasures", "train"]

_MOST_ROWS = 1000  # that measures are taken on
_MOST_FLIPS = 1e8  # rows * units * hidden units of a pseudo-likelihood: about a second on a CPU


class RBMMeasures(NamedTuple):
    """Of one layer after an epoch, on held-out rows."""

    layer: int
    epoch: int
    seconds: float  # that the epoch took, without these measures
    pseudo_likelihood: float | None  # mean over rows, nats; None where the rows are not 0 and 1
    free_energy_gap: float  # mean F of held-out rows less that of as many training rows, nats: grows by overfitting
    reconstruction_error: float  # mean over rows of the squared distance to E[v | a draw of h given v]


def train(run: RBMRun, split: Split, progress: Progress | None = None) -> Iterator[RBMMeasures]:
    """Trains the layers in turn; see ``training.train``."""
    options = run.options
    while True:
        rbm = run.layers[run.layer]
        train_inputs, held_out = _Inputs(run, split.train), _Inputs(run, split.held_out)
        if run.epoch == 0:
            rbm.init_visible_bias(train_inputs.mean())
        optimizer = _optimizer(rbm, options, run.optimizer)
        while run.epoch < options.epochs:
            started = time.perf_counter()
            try:
                _epoch(run, rbm, optimizer, train_inputs, progress)
                finite = all(bool(torch.isfinite(parameter).all()) for parameter in rbm.parameters())
            except ValueError as error:
                if "NaN" not in str(error):
                    raise
                finite = False
            if not finite:
                raise ValueError(f"training diverged in epoch {run.epoch + 1}; lower the learning rate")
            seconds = time.perf_counter() - started
            run.epoch += 1
            run.optimizer = _momentum(rbm, optimizer)
            yield _measure(run, rbm, train_inputs, held_out, seconds)
        if run.layer + 1 == len(run.layers):
            return
        run.layer, run.epoch, run.optimizer = run.layer + 1, 0, {}


class _Inputs:
    """The rows as the layer in training sees them: means of the units below."""

    def __init__(self, run: RBMRun, rows: Tensor) -> None:
        self.run, self.rows = run, rows
        self.sampled = run.options.binarize == "sample" and run.options.binary

    def take(self, chosen: Tensor | slice, noise: torch.Generator | None) -> Tensor:
        """Visible states; with ``noise`` rows of probabilities are sampled."""
        rows = self.rows[chosen]
        if self.sampled and noise is not None:
            rows = binarize(rows, "sample", noise)
        return self._up(rows, None)

    def states(self, count: int, seed: int) -> Tensor:
        """The first rows, as draws of the layer's units: 0 and 1 wherever the units are."""
        rows = self.rows[:count]
        if self.sampled:
            rows = binarize(rows, "sample", generator("measure", seed))
        return self._up(rows, seed)

    @torch.no_grad()
    def _up(self, rows: Tensor, seed: int | None) -> Tensor:
        model = self.run.model
        if isinstance(model, RBM):
            return rows
        return model.transform(rows, self.run.layer, sample=seed is not None, seed=seed)

    def mean(self) -> Tensor:
        total = sum(self.take(slice(i, i + 4096), None).double().sum(0) for i in range(0, len(self.rows), 4096))
        assert isinstance(total, Tensor)
        return total / len(self.rows)


def _optimizer(rbm: RBM, options: RBMOptions, momentum: dict[str, Tensor]) -> torch.optim.Optimizer:
    others = [parameter for name, parameter in rbm.named_parameters() if name != "W"]
    groups: list[dict[str, Any]] = [{"params": [rbm.W], "weight_decay": options.weight_decay}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)
    if options.momentum:
        for name, parameter in rbm.named_parameters():
            if name in momentum:
                optimizer.state[parameter]["momentum_buffer"] = momentum[name].to(parameter)
    return optimizer


def _momentum(rbm: RBM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {name: optimizer.state[p].get("momentum_buffer") for name, p in rbm.named_parameters()}
    return {name: buffer for name, buffer in found.items() if buffer is not None}


def _epoch(run: RBMRun, rbm: RBM, optimizer: torch.optim.Optimizer, inputs: _Inputs, progress: Progress | None) -> None:
    options = run.options
    noise = generator("epoch", options.seed, run.layer, run.epoch)
    persistent = options.method != "cd"
    tempering = torch.linspace(0, 1, options.temperatures).tolist() if options.method == "pt" else None
    fast_rate = options.lr if options.method == "fpcd" else None
    order = batches(options, len(inputs.rows), noise)
    for index, chosen in enumerate(order.to(inputs.rows.device), 1):
        v = inputs.take(chosen, noise)
        starts = not persistent or len(rbm.chains) == 0
        seed = int(torch.randint(2**63 - 1, (), generator=noise)) if starts else None
        optimizer.zero_grad()
        rbm.contrastive_divergence(
            v, options.k, persistent, fast_rate=fast_rate, tempering=tempering, seed=seed
        ).backward()
        optimizer.step()
        if progress is not None:
            progress(index / len(order))


@torch.no_grad()
def _measure(run: RBMRun, rbm: RBM, train_inputs: _Inputs, held_out: _Inputs, seconds: float) -> RBMMeasures:
    seed = run.options.seed
    count = min(_MOST_ROWS, len(held_out.rows), len(train_inputs.rows))
    rows, seen = held_out.states(count, seed), train_inputs.states(count, seed)
    kind = rbm._visible_kind
    likelihood = None
    if kind.kind != GAUSSIAN and (kind.kind != BERNOULLI or bool(((rows == 0) | (rows == 1)).all())):
        flips = rbm.visible // kind.categories
        allowed = max(1, int(_MOST_FLIPS / (count * rbm.hidden * kind.categories)))
        units = None if allowed >= flips else allowed
        likelihood = rbm.pseudo_likelihood(rows, units, seed=seed).item()
    gap = (rbm.free_energy(rows).mean() - rbm.free_energy(seen).mean()).item()
    rebuilt = rbm.visible_mean(rbm.sample_hidden(rows, seed=seed))
    error = (rows - rebuilt).square().sum(-1).mean().item()
    return RBMMeasures(run.layer, run.epoch, seconds, likelihood, gap, error)
