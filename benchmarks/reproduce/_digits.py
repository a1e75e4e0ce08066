"""What the reproductions of GANs on digits share: images of a size, a classifier of them, its features, training.

The classifier is plain PyTorch and the same for every run of a script: two 3 x 3 convolutions of 16 and 32 channels
with relu and 2 x 2 maxima, a hidden layer of 64 relu units, ten logits; Adam at a rate that rises to 3e-3 and falls to
zero. Features are the 64 values before the relu, which have no ties at zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from genfast.models import GAN
from genfast.training import GANTrainer

__all__ = ["Classifier", "Sizes", "accuracy", "fit", "images_of", "in_parts", "same_weights", "train_classifier"]

FEATURES = 64
ROWS = 2000  # images that pass a network at once


def images_of(rows: Tensor, side: int) -> Tensor:
    """Rows of grey values in [0, 1] as images [N, 1, side, side] in [-1, 1].

    Other sizes come from means of 2 x 2 pixels, after as many black ones around that sides are even halves.

    Raises:
        ValueError: for a side above the half of the padded image or below the half of the image.
    """
    x = rows.view(len(rows), 1, round(rows.shape[1] ** 0.5), -1)
    if side != x.shape[-1]:
        border, odd = divmod(2 * side - x.shape[-1], 2)
        if odd or not 0 <= border <= x.shape[-1] // 4:
            raise ValueError(f"images of {x.shape[-1]} x {x.shape[-1]} have no means of {side} x {side}")
        x = functional.avg_pool2d(functional.pad(x, (border,) * 4), 2)
    return x * 2 - 1


class Sizes(NamedTuple):
    """Of the images and of a run; ``epochs`` are the classifier's."""

    side: int
    channels: tuple[int, ...]
    latent: int
    steps: int
    samples: int
    epochs: int


class Classifier(nn.Module):
    """Logits of the ten digits for images [N, 1, side, side] in [-1, 1]."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * (side // 4) ** 2, FEATURES),
        )  # fmt: skip
        self.last = nn.Linear(FEATURES, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(functional.relu(self.body(x)))
        return out


def train_classifier(x: Tensor, y: Tensor, epochs: int, seed: int = 0, batch: int = 64) -> Classifier:
    """A classifier of the images x and labels y; torch's own generator is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(x.shape[-1])
        optimizer = torch.optim.Adam(classifier.parameters())
        steps = epochs * -(-len(x) // batch)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(epochs):
            for part in torch.randperm(len(x)).split(batch):
                optimizer.zero_grad(set_to_none=True)
                functional.cross_entropy(classifier(x[part]), y[part]).backward()
                optimizer.step()
                rate.step()
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), ``ROWS`` rows at a time."""
    return torch.cat([function(part) for part in x.split(ROWS)])


def accuracy(classifier: Classifier, x: Tensor, y: Tensor) -> float:
    """Share of the images whose largest logit is their label's."""
    return (in_parts(classifier, x).argmax(1) == y).double().mean().item()


# ---- runs --------------------------------------------------------------------------------------------------------


def same_weights(build: Callable[..., GAN], seed: int, fused: bool) -> GAN:
    """``build(fused=...)`` with weights and power iterations that do not depend on ``fused``."""
    torch.manual_seed(seed)
    gan = build(fused=True)
    if fused:
        return gan
    plain = build(fused=False)
    plain.load_state_dict(gan.state_dict())
    return plain


def fit(trainer: GANTrainer, draw: Callable[[], Tensor], steps: int, advance: Callable[[], None]) -> None:
    """So many steps of the discriminator on batches by ``draw``; rates fall to zero in the second half."""
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in trainer.optimizers.items()}
    for step in range(steps):
        for name, optimizer in trainer.optimizers.items():
            optimizer.param_groups[0]["lr"] = rates[name] * min(1.0, 2 * (1 - step / steps))
        trainer.step(draw())
        advance()
