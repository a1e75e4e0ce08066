"""A GAN on 8 x 8 digits whose discriminator is a transformer with a gradient penalty: second derivatives of attention.

python examples/gan_transformer_gradient_penalty.py --penalty wgan-gp --save samples.png
python examples/gan_transformer_gradient_penalty.py --attention plain   # the same with every score held in memory

PyTorch's own fused attention (--attention sdpa) stops at the penalty: it has no second derivative.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from genfast.nn.functional import scaled_dot_product_attention

LATENT, PATCH, TOKENS = 32, 2, 16


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "genfast": scaled_dot_product_attention,
    "plain": plain,
    "sdpa": functional.scaled_dot_product_attention,
}


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        x = x + self.project(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Discriminator(nn.Module):
    """Patches of 2 x 2 pixels as tokens, and one number an image."""

    def __init__(self, width: int, layers: int, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(PATCH * PATCH, width), nn.Parameter(0.02 * torch.randn(TOKENS, width))
        self.blocks = nn.Sequential(*(Block(width, 4, attention) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(1, 2).flatten(2)
        return self.head(self.blocks(self.embed(patches) + self.place).mean(1)).squeeze(1)


def generator_of(hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(LATENT, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 64), nn.Tanh(), nn.Unflatten(1, (8, 8)),
    )  # fmt: skip


def discriminator_loss(discriminator: nn.Module, real: Tensor, fake: Tensor, penalty: str) -> Tensor:
    """The penalty is a squared gradient, so that the gradient of the loss is a second derivative of attention."""
    if penalty == "r1":
        at = real.detach().requires_grad_()
        scores = discriminator(at)
        (slope,) = torch.autograd.grad(scores.sum(), at, create_graph=True)
        loss = functional.softplus(discriminator(fake)).mean() + functional.softplus(-scores).mean()
        return loss + 0.5 * slope.square().sum((1, 2)).mean()
    at = torch.lerp(real, fake, torch.rand(len(real), 1, 1).to(real)).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(at).sum(), at, create_graph=True)
    excess = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    return discriminator(fake).mean() - discriminator(real).mean() + 10.0 * excess


def energy_distance(x: Tensor, y: Tensor) -> float:
    between, in_x, in_y = (torch.cdist(a.flatten(1), b.flatten(1)).mean() for a, b in ((x, y), (x, x), (y, y)))
    return float(2 * between - in_x - in_y)


def digits(dtype: torch.dtype = torch.float32) -> Tensor:
    images = torch.tensor(load_digits().images, dtype=dtype) / 8 - 1
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def train(
    attention: Callable[..., Tensor], penalty: str, steps: int, *, width: int = 32, layers: int = 2, batch: int = 64,
    dtype: torch.dtype = torch.float32, device: str = "cpu", report: Callable[..., None] = lambda *_: None,
) -> tuple[list[float], nn.Module]:  # fmt: skip
    """The discriminator's losses, one a step, and the generator; runs with one seed differ by rounding alone."""
    torch.manual_seed(0)
    discriminator = Discriminator(width, layers, attention).to(device, dtype)
    generator = generator_of(256).to(device, dtype)
    of_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    of_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    images, losses = digits(dtype).to(device)[:1437], []
    for step in range(1, steps + 1):
        real = images[torch.randint(len(images), (batch,))]
        fake = generator(torch.randn(batch, LATENT).to(device, dtype))
        of_d.zero_grad()
        loss = discriminator_loss(discriminator, real, fake.detach(), penalty)
        loss.backward()
        of_d.step()
        of_g.zero_grad()
        scores = discriminator(fake)
        (functional.softplus(-scores) if penalty == "r1" else -scores).mean().backward()
        of_g.step()
        losses.append(loss.item())
        if step == 1 or step % 100 == 0 or step == steps:
            report(step, loss.item(), generator)
    return losses, generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", choices=ATTENTIONS, default="genfast")
    parser.add_argument("--penalty", choices=("r1", "wgan-gp"), default="r1")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", help="draw samples here (needs matplotlib)")
    options = parser.parse_args()
    held_out, start = digits().to(options.device)[1437:], time.perf_counter()

    @torch.no_grad()
    def report(step: int, loss: float, generator: nn.Module) -> None:
        distance = energy_distance(generator(torch.randn(500, LATENT).to(options.device)), held_out)
        taken = f"{time.perf_counter() - start:.0f} s"
        print(f"step {step:5d}   loss {loss:7.3f}   energy distance to held-out digits {distance:6.3f}   {taken}")

    attention = ATTENTIONS[options.attention]
    _, generator = train(attention, options.penalty, options.steps, device=options.device, report=report)
    if options.save:
        from matplotlib import pyplot

        drawn = generator(torch.randn(64, LATENT).to(options.device)).detach().cpu()
        pyplot.imsave(options.save, drawn.unflatten(0, (8, 8)).transpose(1, 2).reshape(64, 64), cmap="gray_r")


if __name__ == "__main__":
    main()
