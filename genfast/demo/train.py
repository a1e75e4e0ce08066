"""The demo's training: ordinary PyTorch around genfast's models."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from genfast.models import VAE
from genfast.nn import RBM

__all__ = ["Digits", "Run", "load_digits", "make_vae", "train_rbm", "train_vae"]

BATCH = 64
SIDE = 8
Model = TypeVar("Model", VAE, RBM)


class Digits(NamedTuple):
    """Binary 8 x 8 digits, flat: [1437, 64] and [360, 64], and which digits they are."""

    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor

    def without(self, digit: int) -> Tensor:
        """The training digits but one."""
        return self.train[self.train_labels != digit]


class Run(NamedTuple, Generic[Model]):
    """A trained model and its learning curve on held-out digits."""

    model: Model
    epochs: list[int]
    held_out: list[float]
    seconds: float


def load_digits() -> Digits:
    """scikit-learn's bundled digits, black where the ink is at least half, split with a fixed seed."""
    from sklearn import datasets

    found = datasets.load_digits()
    images = (torch.tensor(found.images).flatten(1) >= 8).float()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(found.target)[order]
    return Digits(images[:1437], images[1437:], labels[:1437], labels[1437:])


def _train(
    name: str,
    model: Model,
    data: Tensor,
    loss: Callable[[Tensor], Tensor],
    measure: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    epochs: int,
    console: Console,
) -> Run[Model]:
    """The loop; the learning rate rises over the first tenth and then falls to zero."""
    steps = epochs * (len(data) // BATCH)
    ramp = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / ramp, (steps - step) / max(1, steps - ramp))
    )
    start = time.perf_counter()
    measured: list[int] = []
    held_out: list[float] = []

    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TextColumn("epochs"))
    last = (TextColumn("{task.fields[held_out]:.2f} nats a held-out digit"), TimeElapsedColumn())
    with Progress(*columns, *last, console=console) as progress:
        task = progress.add_task(name, total=epochs, held_out=float("nan"))
        for epoch in range(epochs + 1):  # epoch 0 only measures
            if epoch > 0:
                for batch in torch.randperm(len(data))[: len(data) // BATCH * BATCH].view(-1, BATCH):
                    optimizer.zero_grad()
                    loss(data[batch]).backward()
                    optimizer.step()
                    schedule.step()
            if epoch == epochs or epoch % max(1, epochs // 25) == 0:
                with torch.no_grad():
                    held_out.append(measure().item())
                measured.append(epoch)
            progress.update(task, completed=epoch, held_out=held_out[-1])
    return Run(model, measured, held_out, time.perf_counter() - start)


def make_vae() -> VAE:
    """A VAE 64-256-128-12 and back, always the same."""
    torch.manual_seed(0)
    vae: VAE = VAE.mlp(SIDE * SIDE, hidden=[256, 128], latent=12)
    return vae


def train_vae(data: Tensor, test: Tensor, epochs: int, console: Console, name: str = "VAE") -> Run[VAE]:
    """Trains ``make_vae()``; measured by its ELBO with 16 samples a digit under a fixed seed."""
    vae = make_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, weight_decay=1e-2, fused=True)
    return _train(name, vae, data, vae.loss, lambda: -vae.loss(test, samples=16, seed=1), optimizer, epochs, console)


def train_rbm(digits: Digits, epochs: int, console: Console) -> Run[RBM]:
    """An RBM with 256 hidden units by persistent contrastive divergence; measured by its exact pseudo-likelihood."""
    torch.manual_seed(0)
    rbm = RBM(SIDE * SIDE, 256)
    optimizer = torch.optim.SGD(rbm.parameters(), lr=0.1)

    def loss(batch: Tensor) -> Tensor:
        return rbm.contrastive_divergence(batch, k=1, persistent=True)

    return _train(
        "RBM", rbm, digits.train, loss, lambda: rbm.pseudo_likelihood(digits.test), optimizer, epochs, console
    )
