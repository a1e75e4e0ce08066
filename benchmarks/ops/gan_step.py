"""A whole training step of the demo's GAN: relativistic, R1 and R2, 64 values, 256-256 units, batch 128, Adam.

So small that the number of calls sets the time. ``eager`` is the same step as a PyTorch user writes it: separate passes
of real and generated samples, double backward for each penalty, softplus of the logits' differences, the moving
average by a loop over parameters. All have PyTorch's fused Adam with a rate of 0, so that every step does the same, and
all draw their noise anew. The floor is that of the matrix products.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from genfast.benchmarks.harness import Case, Row, Settings
from genfast.benchmarks.ops import _attention as shared
from genfast.demo.gan import BATCH, make_gan, make_trainer
from genfast.models import MLPGAN

__all__ = ["OurStep", "PlainStep", "cases", "run"]

R, DECAY = 0.1, 0.99


class OurStep:
    """``GANTrainer.step``: (discriminator's loss, generator's loss, penalty, discriminator's gradients)."""

    def __init__(self, gan: MLPGAN, fused: bool) -> None:
        own = make_gan(fused).to(next(gan.parameters()).device)
        own.load_state_dict(gan.state_dict())
        self.trainer = make_trainer(own, fused)
        for optimizer in self.trainer.optimizers.values():
            optimizer.param_groups[0]["lr"] = 0.0

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        found = self.trainer.step(x)
        gradients = [p.grad for p in self.trainer.gan.discriminator.parameters() if p.grad is not None]
        return found.discriminator, found.generator, found.penalty, *gradients


class PlainStep:
    """The same in plain PyTorch."""

    def __init__(self, gan: MLPGAN) -> None:
        own = make_gan(fused=False).to(next(gan.parameters()).device)
        own.load_state_dict(gan.state_dict())
        self.generator: nn.Module = own.generator
        self.discriminator: nn.Module = own.discriminator
        self.latent = own.latent
        self.average = copy.deepcopy(self.generator)
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=0.0, betas=(0.5, 0.99), fused=True)
            for network in (self.generator, self.discriminator)
        ]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        generator, discriminator = self.generator, self.discriminator
        for parameter in discriminator.parameters():
            parameter.requires_grad_(True)
        self.optimizers[1].zero_grad()
        real_x = x.clone().requires_grad_()
        fake_x = generator(torch.randn(len(x), self.latent, device=x.device)).detach().requires_grad_()
        real, fake = discriminator(real_x), discriminator(fake_x)
        loss = softplus(fake - real).mean()
        (by_real,) = torch.autograd.grad(real.sum(), real_x, create_graph=True)
        (by_fake,) = torch.autograd.grad(fake.sum(), fake_x, create_graph=True)
        penalty = R / 2 * (by_real.square().sum(1).mean() + by_fake.square().sum(1).mean())
        (loss + penalty).backward()
        gradients = [p.grad for p in discriminator.parameters() if p.grad is not None]
        self.optimizers[1].step()

        for parameter in discriminator.parameters():
            parameter.requires_grad_(False)
        self.optimizers[0].zero_grad()
        fake = discriminator(generator(torch.randn(len(x), self.latent, device=x.device)))
        made = softplus(discriminator(x) - fake).mean()
        made.backward()
        self.optimizers[0].step()
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), generator.parameters(), strict=True):
                mean.mul_(DECAY).add_(now, alpha=1 - DECAY)
        return loss.detach(), made.detach(), penalty.detach(), *gradients


def _check(exact: PlainStep) -> Callable[[tuple[Tensor, ...], Any], str | None]:
    """Losses and penalty within a tenth, and gradients that point the same way: the noise differs."""

    def compare(inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> str | None:
        wanted = exact(*inputs)
        for name, value, right in zip(("D loss", "G loss", "penalty"), output, wanted, strict=False):
            if not abs(value - right) < 0.1 * abs(right):
                return f"the {name} is {value:.4f}, not about {right:.4f}"
        ours, theirs = (torch.cat([x.flatten() for x in found[3:]]) for found in (output, wanted))
        cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item()
        return None if cosine > 0.9 else f"the gradient's cosine with the exact one is {cosine:.2f}"

    return compare


def cases(settings: Settings) -> list[Case]:
    gan = make_gan().to(settings.device)
    weights = [sum(p.numel() for p in network.parameters()) for network in (gan.generator, gan.discriminator)]
    contenders: dict[str, Callable[..., Any]] = {
        "genfast": OurStep(gan, True), "eager": PlainStep(gan), "genfast, plain layers": OurStep(gan, False)
    }  # fmt: skip
    features = next(iter(gan.discriminator.parameters())).shape[1]
    return [
        Case(
            op="gan_step",
            variant="training step, relativistic, R1 and R2, Adam",
            shape=(BATCH, features, 256, gan.latent),
            dtype=torch.float32,
            inputs=lambda: (torch.rand(BATCH, features, device=settings.device).round() * 2 - 1,),
            contenders=contenders,
            check=_check(PlainStep(gan)),
            floor_bytes=0,
            # generator: forward twice, backward; discriminator: logits, slopes, tangents and weights of both halves,
            # then logits of both and slopes of one
            floor_flops=2 * BATCH * (4 * weights[0] + (2 * 4 + 3) * weights[1]),
            targets={"default": {"eager": 1.6}} if torch.device(settings.device).type == "cpu" else {},
        )
    ]


def run(settings: Settings, **options: Any) -> list[Row]:
    return shared.run_cases(cases(settings), settings, **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "gan_step", *sys.argv[1:]])
