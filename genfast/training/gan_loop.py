"""The training loop of GANs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from genfast.metrics import label_coverage, nearest_labels, precision_recall
from genfast.training.gan_run import GANRun
from genfast.training.gan_trainer import GANStep, GANTrainer
from genfast.training.run import Progress, Split, batches, generator

__all__ = ["GANMeasures", "sample", "train"]

_MOST_ROWS = 1000  # that precision and recall are taken on, and labels
_NEIGHBORS = 5000  # training rows that samples have their labels of
_SAMPLED_ROWS = 256  # generated at a time


class GANMeasures(NamedTuple):
    """Means over an epoch's steps, and how samples of the moving average compare with held-out rows.

    None: what the epoch did not have.
    """

    epoch: int
    seconds: float  # that the epoch took, without precision and recall
    discriminator_loss: float
    generator_loss: float | None
    penalty: float | None  # added to the discriminator's loss
    path: float | None  # path lengths, added to the generator's loss
    real: float  # mean logit
    fake: float
    overfitting: float  # mean sign of the real logits, of relativistic losses of the differences
    ada_p: float | None  # probability of the augmentation at the end
    modes: int | None  # labels that samples have, by their nearest training rows; where the data have labels
    divergence: float | None  # KL of the shares of the samples' labels from the training rows', nats
    precision: float | None  # share of samples among held-out rows, by the 3 nearest neighbors in the data's space
    recall: float | None  # share of held-out rows among samples


def train(run: GANRun, split: Split, progress: Progress | None = None) -> Iterator[GANMeasures]:
    """Trains; see ``training.train``."""
    if run.finished:
        return
    trainer = run.trainer()
    while not run.finished:
        started = time.perf_counter()
        means = _epoch(run, trainer, split.train, progress)
        finite = all(value is None or math.isfinite(value) for value in means)
        if not finite or not all(bool(torch.isfinite(p).all()) for p in run.model.parameters()):
            raise ValueError(f"training diverged in epoch {run.epoch + 1}; lower the learning rate")
        seconds = time.perf_counter() - started
        run.epoch += 1
        run.keep(trainer)
        yield _measure(run, split, seconds, means, trainer)


def _epoch(run: GANRun, trainer: GANTrainer, rows: Tensor, progress: Progress | None) -> list[float | None]:
    """Means of ``GANStep``'s fields over the steps that have them."""
    order = batches(run.options, len(rows), generator("epoch", run.options.seed, run.epoch))
    if run.options.packed > 1 and order.shape[1] % run.options.packed:
        raise ValueError(f"packed = {run.options.packed} must divide the {order.shape[1]} training rows of a batch")
    sums = torch.zeros(2, len(GANStep._fields), dtype=torch.float64, device=rows.device)
    for index, chosen in enumerate(order.to(rows.device), 1):
        measured = torch.stack([part.double() for part in trainer.step(run.batch(rows[chosen]))])
        had = ~measured.isnan() | torch.tensor([True, False, False, False, True, True, True], device=rows.device)
        sums += torch.stack((torch.where(had, measured, 0.0), had.double()))
        if progress is not None:
            progress(index / len(order))
    return [total / count if count else None for total, count in sums.T.tolist()]


@torch.no_grad()
def _measure(run: GANRun, split: Split, seconds: float, means: list[float | None], trainer: GANTrainer) -> GANMeasures:
    loss, made, penalty, path, real, fake, overfitting = means
    rows = run.rows(split.held_out[:_MOST_ROWS])
    samples = sample(run, len(rows) if split.labels is None else _MOST_ROWS, run.options.seed)
    modes = divergence = precision = recall = None
    if split.labels is not None:
        labels = split.labels.cpu()
        found = nearest_labels(samples, run.rows(split.train[:_NEIGHBORS]), labels[:_NEIGHBORS])
        modes, divergence = label_coverage(found, int(labels.max()) + 1, labels)
    if len(rows) > 3:
        precision, recall = precision_recall(rows, samples[: len(rows)])
    assert loss is not None
    assert real is not None
    assert fake is not None
    assert overfitting is not None
    p = trainer.augmentation_probability
    return GANMeasures(
        run.epoch, seconds, loss, made, penalty, path, real, fake, overfitting, p, modes, divergence, precision, recall
    )  # fmt: skip


@torch.no_grad()
def sample(run: GANRun, n: int, seed: int, *, means: bool = True) -> Tensor:
    """Samples of the generator's moving average; see ``training.sample``."""
    model, parts, noise = run.trained, [], generator("sample", seed)
    for first in range(0, n, _SAMPLED_ROWS):
        count = min(_SAMPLED_ROWS, n - first)
        parts.append(run.rows(model.sample(count, seed=int(torch.randint(2**62, (), generator=noise)))))
    return torch.cat(parts)
