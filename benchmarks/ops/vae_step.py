"""A training step of the demo's VAE, 64-256-16, batch 128, Adam: so small that the number of calls sets the time.

``eager`` is the same network with the textbook loss: randn, exp, ``binary_cross_entropy_with_logits`` and the KL
divergence written out. All have PyTorch's fused Adam. The floor is that of the matrix products, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from genfast.benchmarks.harness import Case, Row, Settings
from genfast.benchmarks.ops import _attention as shared
from genfast.benchmarks.ops.encoder import Step, check
from genfast.models import VAE

__all__ = ["cases", "plain_loss", "run"]

FEATURES, HIDDEN, LATENT, BATCH = 64, 256, 16, 128


def plain_loss(model: VAE, x: Tensor) -> Tensor:
    """What a PyTorch user writes."""
    mu, logvar = model.encoder(x).chunk(2, -1)
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    reconstruction = binary_cross_entropy_with_logits(model.decoder(z), x, reduction="sum")
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (reconstruction + kl) / len(x)


def _loss(model: VAE, x: Tensor) -> Tensor:
    return model.loss(x)


class FusedStep(Step):
    """With PyTorch's fused Adam."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__(model, loss, autocast=False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0, fused=True)


def cases(settings: Settings) -> list[Case]:
    torch.manual_seed(settings.seed)
    model = VAE.mlp(FEATURES, [HIDDEN], LATENT).to(settings.device)
    weights = FEATURES * HIDDEN + HIDDEN * 2 * LATENT + LATENT * HIDDEN + HIDDEN * FEATURES
    contenders = {"genfast": FusedStep(model, _loss), "eager": FusedStep(model, plain_loss)}
    if settings.compiled:
        contenders["compiled"] = FusedStep(model, torch.compile(plain_loss))
        contenders["genfast compiled"] = FusedStep(model, torch.compile(_loss))
    return [
        Case(
            op="vae_step",
            variant="training step, Adam",
            shape=(BATCH, FEATURES, HIDDEN, LATENT),
            dtype=torch.float32,
            inputs=lambda: (torch.bernoulli(torch.full((BATCH, FEATURES), 0.4, device=settings.device)),),
            contenders=contenders,
            check=check(FusedStep(model, plain_loss), 1e-4, dropout=True),
            floor_bytes=0,
            floor_flops=6 * weights * BATCH,
            targets={"default": {"eager": 1.6, "compiled": 1.6}} if torch.device(settings.device).type == "cpu" else {},
        )
    ]


def run(settings: Settings, **options: Any) -> list[Row]:
    return shared.run_cases(cases(settings), settings, **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "vae_step", *sys.argv[1:]])
