"""The training loop of autoencoders."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from genfast import ops
from genfast.data import binarize
from genfast.models import IWAE, VAE, VQVAE
from genfast.training.run import Progress, Split, batches, generator
from genfast.training.vae_run import AutoencoderRun, VAEOptions

__all__ = ["IWAEMeasures", "VAEMeasures", "VQVAEMeasures", "sample", "train"]

_MOST_ROWS = 1000  # that measures are taken on
_MOST_VALUES = 2**23  # of x decoded at a time in measures
_SAMPLED_ROWS = 256  # decoded at a time


class VAEMeasures(NamedTuple):
    """After an epoch, on held-out rows; nats a row."""

    epoch: int
    seconds: float  # that the epoch took, without these measures
    training_loss: float  # mean of the objective over the epoch's batches
    elbo: float  # a bound on log p(x) from below, with one draw of z a row
    reconstruction: float  # mean of log p(x|z)
    kl: float  # mean of KL(q(z|x) || p(z)): the ELBO is the reconstruction less this


class IWAEMeasures(NamedTuple):
    """After an epoch, on held-out rows; nats a row."""

    epoch: int
    seconds: float
    training_loss: float
    bound: float  # the importance-weighted bound of K draws a row
    elbo: float
    reconstruction: float
    kl: float


class VQVAEMeasures(NamedTuple):
    """After an epoch, on held-out rows."""

    epoch: int
    seconds: float
    training_loss: float  # nats a row
    reconstruction: float  # mean of log p(x|codes), nats a row
    quantizer_loss: float  # mean squared distance of an encoder's output to its code, a value
    perplexity: float  # of the distribution of codes: how many are evenly in use
    codes_used: int


Measures = VAEMeasures | IWAEMeasures | VQVAEMeasures


def train(run: AutoencoderRun, split: Split, progress: Progress | None = None) -> Iterator[Measures]:
    """Trains; a VQ-VAE's prior over codes is fitted after the last epoch. See ``training.train``."""
    options, model = run.options, run.model
    if run.finished:
        return
    if isinstance(model, VQVAE):
        model.prior_counts = None  # of an earlier end
    if isinstance(model, IWAE):
        model.samples, model.gradient = options.samples, options.gradient
    optimizer = _optimizer(run)
    while not run.finished:
        started = time.perf_counter()
        model.train()
        try:
            loss = _epoch(run, optimizer, split.train, progress)
            finite = math.isfinite(loss) and all(bool(torch.isfinite(p).all()) for p in model.parameters())
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            finite = False
        if not finite:
            raise ValueError(f"training diverged in epoch {run.epoch + 1}; lower the learning rate")
        seconds = time.perf_counter() - started
        run.epoch += 1
        run.optimizer = _state(run, optimizer)
        model.eval()
        if run.finished and isinstance(model, VQVAE):
            model.fit_prior(run.batch(_states(run, split.train, generator("prior", options.seed))))
        yield _measure(run, split.held_out, seconds, loss)


def _optimizer(run: AutoencoderRun) -> torch.optim.Optimizer:
    options, kept = run.options, run.optimizer
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True)
    for name, parameter in run.model.named_parameters():
        state = {key: kept[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "step") if f"{name}.{key}" in kept}
        if state:
            optimizer.state[parameter] = {key: tensor.to(parameter.device).clone() for key, tensor in state.items()}
    return optimizer


def _state(run: AutoencoderRun, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, parameter in run.model.named_parameters()
        for key, tensor in optimizer.state[parameter].items()
    }


def _states(run: AutoencoderRun, rows: Tensor, noise: torch.Generator) -> Tensor:
    """Rows of probabilities as draws, others as they are."""
    sampled = run.options.binary and run.options.binarize == "sample"
    return binarize(rows, "sample", noise) if sampled else rows


def _epoch(run: AutoencoderRun, optimizer: torch.optim.Optimizer, rows: Tensor, progress: Progress | None) -> float:
    """Returns the mean loss."""
    options, model = run.options, run.model
    noise = generator("epoch", options.seed, run.epoch)
    order = batches(options, len(rows), noise)
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for index, chosen in enumerate(order.to(rows.device), 1):
        x = run.batch(_states(run, rows[chosen], noise))
        seed = int(torch.randint(2**63 - 1, (), generator=noise))
        optimizer.zero_grad()
        if isinstance(options, VAEOptions):
            samples = None if options.samples == 1 else options.samples
            loss = model.loss(x, options.beta, samples, seed, free_bits=options.free_bits)
        else:
            loss = model.loss(x) if isinstance(model, VQVAE) else model.loss(x, seed=seed)
        loss.backward()
        optimizer.step()
        total += loss.detach()
        if progress is not None:
            progress(index / len(order))
    return total.item() / len(order)


@torch.no_grad()
def _measure(run: AutoencoderRun, held_out: Tensor, seconds: float, loss: float) -> Measures:
    model, seed = run.model, run.options.seed
    x = run.batch(held_out[:_MOST_ROWS])
    if isinstance(model, VQVAE):
        return _measure_codes(run, model, x, seconds, loss)
    draws = run.options.samples if isinstance(model, IWAE) else 1
    parts = x.split(max(1, _MOST_VALUES // (draws * run.visible)))
    sums = torch.zeros(3, dtype=torch.float64)
    for index, part in enumerate(parts):
        out = model(part, seed=seed + index)
        sums[0] += ops.log_likelihood(out.decoder_out, part, likelihood=model.likelihood).double().sum().cpu()
        sums[1] += out.kl.double().sum().cpu()
        if isinstance(model, IWAE):
            sums[2] += _bound(model, part, draws, seed + index).double().sum().cpu()
    reconstruction, kl, bound = (sums / len(x)).tolist()
    elbo = reconstruction - kl
    if isinstance(model, IWAE):
        return IWAEMeasures(run.epoch, seconds, loss, bound, elbo, reconstruction, kl)
    return VAEMeasures(run.epoch, seconds, loss, elbo, reconstruction, kl)


def _bound(model: VAE, x: Tensor, draws: int, seed: int) -> Tensor:
    """The importance-weighted bound of each row, whatever the gradient that training takes."""
    z, log_ratio = ops.reparameterize_log_ratio(*model.encode(x), samples=draws, seed=seed)
    return ops.iwae_bound(ops.log_likelihood(model.decode(z), x, likelihood=model.likelihood) + log_ratio)


def _measure_codes(run: AutoencoderRun, model: VQVAE, x: Tensor, seconds: float, loss: float) -> VQVAEMeasures:
    reconstruction, distance, found = 0.0, 0.0, []
    for part in x.split(max(1, _MOST_VALUES // run.visible)):
        z = model.encoder(part)
        quantized = model.quantizer(z)
        likelihood = ops.log_likelihood(model.decoder(quantized.z_q), part, likelihood=model.likelihood)
        reconstruction += likelihood.double().sum().item()
        distance += quantized.commitment_loss.item() * len(part)
        found.append(quantized.indices)
    counts, perplexity = ops.code_usage(torch.cat(found), model.quantizer.num_codes)
    used = int((counts > 0).sum())
    rows = len(x)
    return VQVAEMeasures(run.epoch, seconds, loss, reconstruction / rows, distance / rows, perplexity.item(), used)


@torch.no_grad()
def sample(run: AutoencoderRun, n: int, seed: int, *, means: bool = True) -> Tensor:
    """Means of p(x|z) at draws of z from the prior; see ``training.sample``."""
    model, parts = run.model.eval(), []
    if isinstance(model, VQVAE) and model.prior_counts is None:
        raise ValueError("its prior over codes is fitted at the end of training: go on with `genfast train --resume`")
    noise = generator("sample", seed)
    for first in range(0, n, _SAMPLED_ROWS):
        count = min(_SAMPLED_ROWS, n - first)
        parts.append(run.rows(model.sample(count, seed=int(torch.randint(2**63 - 1, (), generator=noise)))))
    return torch.cat(parts)
