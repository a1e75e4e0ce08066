"""Steps of a GAN whose discriminator is fully connected with leaky relus: no graph, ``JudgedRows`` has the formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from genfast.training.gan_trainer import GANTrainer

__all__ = ["discriminator_step", "generator_step", "serves"]


def serves(trainer: GANTrainer) -> bool:
    """Whether the formulas cover the discriminator and what is asked of it."""
    discriminator = trainer.gan.discriminator
    return (
        getattr(discriminator, "bends", False)
        and not (trainer.gradient_penalty or trainer.consistency or trainer.latent_consistency)
        and trainer.penalty_method == "double_backward"
        and not discriminator._forward_hooks
        and not torch.is_autocast_enabled(next(discriminator.parameters()).device.type)
    )


def _by_logits(trainer: GANTrainer, side: str, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of the logits of real and generated samples, one below the other, and its gradient."""
    leaf = logits.detach().requires_grad_()
    loss = trainer.measure(side, *leaf.chunk(2))
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@torch.no_grad()
def discriminator_step(
    trainer: GANTrainer, samples: list[Tensor], weights: list[float]
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(loss, penalty, logits of real samples, of generated ones), after the optimizer's step.

    Args:
        trainer: whose discriminator it is.
        samples: real and generated ones.
        weights: of R1 and R2.
    """
    discriminator: Any = trainer.gan.discriminator
    count, penalty, moves = len(samples[0]), None, None
    rows = discriminator.judged(torch.cat(samples))
    with torch.enable_grad():
        loss, by_logits = _by_logits(trainer, "discriminator", rows.logits)
    if any(weights):
        slopes = rows.by_inputs()
        moves = slopes * (weights[0] / count)
        if weights[0] != weights[1]:
            moves[count:] = slopes[count:] * (weights[1] / count)
        penalty = 0.5 * torch.dot(slopes.flatten(), moves.flatten())
        if trainer.penalty_every != 1:
            moves = moves * trainer.penalty_every
    for parameter, gradient in zip(
        discriminator.parameters(), rows.by_parameters(by_logits, moves), strict=True
    ):  # fmt: skip
        parameter.grad = gradient
    trainer.optimizers["discriminator"].step()
    real, fake = rows.logits.chunk(2)
    return loss, penalty, real, fake


def generator_step(trainer: GANTrainer, x: Tensor, made: Tensor) -> Tensor:
    """Leaves the generator's gradients; returns the loss.

    Args:
        trainer: whose generator it is.
        x: real samples.
        made: generated ones, with their graph.
    """
    discriminator: Any = trainer.gan.discriminator
    needs_real = trainer.needs_real
    with torch.no_grad():
        rows = discriminator.judged(torch.cat((x, made)) if needs_real else made.detach())
    if needs_real:
        loss, by_logits = _by_logits(trainer, "generator", rows.logits)
        by_logits = by_logits[len(x) :]
    else:
        leaf = rows.logits.requires_grad_()
        loss = trainer.measure("generator", None, leaf)
        (by_logits,) = torch.autograd.grad(loss, leaf)
    with torch.no_grad():
        slopes = rows.by_inputs(slice(len(x) if needs_real else 0, None))
    made.backward((slopes * by_logits.unsqueeze(1)).view_as(made))
    return loss.detach()
