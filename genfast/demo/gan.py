"""The demo's GAN: relativistic with R1 and R2, measured by a classifier of the digits."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional

from genfast.demo.train import SIDE, Digits
from genfast.metrics import label_coverage, precision_recall
from genfast.models import MLPGAN
from genfast.training import GANTrainer

__all__ = ["BATCH", "Found", "GANResult", "make_gan", "make_trainer", "run"]

BATCH = 128
SAMPLES = 1000
SURE = 0.8  # a digit counts where the classifier gives it this probability


class Found(NamedTuple):
    """Of ``SAMPLES`` samples.

    modes: digits among those that the classifier is sure of; sure: their share; divergence: KL of the digits' shares
    from the data's, nats; precision, recall: among held-out digits.
    """

    modes: int
    sure: float
    divergence: float
    precision: float
    recall: float


class GANResult(NamedTuple):
    """trainer: its moving average draws; accuracy: of the classifier on held-out digits; untrained and trained."""

    trainer: GANTrainer
    accuracy: float
    untrained: Found
    trained: Found
    seconds: float


def make_gan(fused: bool = True) -> MLPGAN:
    """A GAN of 32 - 256 - 256 - 64 and 64 - 256 - 256 - 1, always the same."""
    torch.manual_seed(0)
    return MLPGAN((SIDE * SIDE,), latent=32, hidden=(256, 256), fused=fused)


def make_trainer(gan: MLPGAN, fused: bool = True) -> GANTrainer:
    """Relativistic pairs, R1 and R2."""
    return GANTrainer(gan, loss="relativistic", lr=1e-3, betas=(0.5, 0.99), r1=0.1, r2=0.1, ema=0.99, fused=fused)


def _classifier(digits: Digits) -> nn.Module:
    """Of 64 - 128 - 10 units, trained on digits moved by up to one pixel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIDE * SIDE, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2, fused=True)
    for _ in range(40):
        for chosen in torch.randperm(len(digits.train)).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model(digits.train[chosen]), digits.train_labels[chosen]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def _measure(trainer: GANTrainer, classifier: nn.Module, digits: Digits) -> Found:
    samples = (trainer.sample(SAMPLES, seed=1) + 1) / 2
    chance, label = torch.softmax(classifier((samples >= 0.5).float()), 1).max(1)
    sure = label[chance >= SURE]
    modes = label_coverage(sure, 10)[0] if len(sure) else 0
    _, divergence = label_coverage(label, 10, digits.train_labels)
    near = precision_recall(digits.test, (samples[: len(digits.test)] >= 0.5).float())
    return Found(modes, len(sure) / SAMPLES, divergence, *near)


def run(digits: Digits, steps: int, console: Console) -> GANResult:
    """Trains ``make_gan()``; the learning rate falls to zero in the second half."""
    classifier = _classifier(digits)
    with torch.no_grad():
        accuracy = (classifier(digits.test).argmax(1) == digits.test_labels).double().mean().item()
    trainer = make_trainer(make_gan())
    before = _measure(trainer, classifier, digits)
    rate = trainer.optimizers["generator"].param_groups[0]["lr"]
    data: Tensor = digits.train * 2 - 1
    start = time.perf_counter()
    columns = (TextColumn("GAN"), BarColumn(30), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("GAN", total=steps)
        for step in range(steps):
            for optimizer in trainer.optimizers.values():
                optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps))
            trainer.step(data[torch.randint(len(data), (BATCH,))])
            progress.update(task, completed=step + 1)
    seconds = time.perf_counter() - start
    return GANResult(trainer, accuracy, before, _measure(trainer, classifier, digits), seconds)
