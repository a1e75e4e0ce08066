"""MeanFlow on 8 x 8 digits: a transformer learns the mean velocity of a flow, and draws digits in one step.

python examples/meanflow_digits.py --steps 1500 --save samples.png

The target of the loss holds a derivative along the flow: a forward-mode derivative through attention. Of the other
attentions, plain holds every score in memory, and sdpa, PyTorch's fused one, has no such derivative.
Geng et al., "Mean flows for one-step generative modeling", 2025.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from genfast.nn.functional import scaled_dot_product_attention

PATCH, TOKENS, FREQUENCIES = 2, 16, 16


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "genfast": scaled_dot_product_attention,
    "plain": plain,
    "sdpa": functional.scaled_dot_product_attention,
}


class Block(nn.Module):
    """A transformer layer whose parts are scaled and shifted by the times."""

    def __init__(self, width: int, heads: int, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulate = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulate(times).unsqueeze(1).chunk(6, -1)
        h = self.qkv(self.norm(x) * (1 + scale1) + shift1)
        q, k, v = h.unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        x = x + gate1 * self.project(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class MeanVelocity(nn.Module):
    """u(z, r, t): the mean velocity between the times r and t of the flow that is at z at time t."""

    def __init__(self, width: int, layers: int, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(PATCH * PATCH, width), nn.Parameter(0.02 * torch.randn(TOKENS, width))
        self.times = nn.Sequential(nn.Linear(4 * FREQUENCIES, width), nn.SiLU())
        self.blocks = nn.ModuleList(Block(width, 4, attention) for _ in range(layers))
        self.head = nn.Linear(width, PATCH * PATCH)

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        x = z.unflatten(2, (4, 2)).unflatten(1, (4, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
        rates = math.pi * 2 ** torch.linspace(-1, 1, FREQUENCIES, dtype=z.dtype, device=z.device)
        angles = torch.stack((t, t - r), 1).unsqueeze(2) * rates
        times = self.times(torch.cat((angles.sin(), angles.cos()), 2).flatten(1))
        x = self.embed(x) + self.place
        for block in self.blocks:
            x = block(x, times)
        return self.head(x).unflatten(2, (2, 2)).unflatten(1, (4, 4)).transpose(2, 3).flatten(3).flatten(1, 2)


def meanflow_loss(model: nn.Module, data: Tensor, noise: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """Squared distance of u to v - (t - r) du/dt, which is u where u is the mean velocity."""
    z, v = torch.lerp(data, noise, t.view(-1, 1, 1)), noise - data
    u, change = torch.func.jvp(model, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    error = (u - (v - (t - r).view(-1, 1, 1) * change).detach()).square().sum((1, 2))
    weights = 1 / (error.detach() + 0.01)  # a few large errors must not drown the others
    return (weights * error).sum() / weights.sum()


def one_step(model: nn.Module, noise: Tensor) -> Tensor:
    return noise - model(noise, noise.new_zeros(len(noise)), noise.new_ones(len(noise)))


def energy_distance(x: Tensor, y: Tensor) -> float:
    between, in_x, in_y = (torch.cdist(a.flatten(1), b.flatten(1)).mean() for a, b in ((x, y), (x, x), (y, y)))
    return float(2 * between - in_x - in_y)


def digits(dtype: torch.dtype = torch.float32) -> Tensor:
    images = torch.tensor(load_digits().images, dtype=dtype) / 8 - 1
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def train(
    attention: Callable[..., Tensor], steps: int, *, width: int = 64, layers: int = 2, batch: int = 64,
    dtype: torch.dtype = torch.float32, device: str = "cpu", report: Callable[..., None] = lambda *_: None,
) -> tuple[list[float], nn.Module]:  # fmt: skip
    """The losses, one a step, and the model; runs with one seed differ by rounding alone."""
    torch.manual_seed(0)
    model = MeanVelocity(width, layers, attention).to(device, dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    images, losses = digits(dtype).to(device)[:1437], []
    for step in range(1, steps + 1):
        data = images[torch.randint(len(images), (batch,))]
        noise, both = torch.randn(batch, 8, 8).to(data), torch.sigmoid(torch.randn(2, batch) - 0.4).to(data)
        t = both.amax(0)
        r = torch.where(torch.arange(batch, device=device) % 2 == 0, t, both.amin(0))  # r = t: the flow's velocity
        optimizer.zero_grad()
        loss = meanflow_loss(model, data, noise, r, t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 1 or step % 250 == 0 or step == steps:
            report(step, loss.item(), model)
    return losses, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", choices=ATTENTIONS, default="genfast")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", help="draw samples here (needs matplotlib)")
    options = parser.parse_args()
    held_out, start = digits().to(options.device)[1437:], time.perf_counter()

    @torch.no_grad()
    def report(step: int, loss: float, model: nn.Module) -> None:
        distance = energy_distance(one_step(model, torch.randn(500, 8, 8).to(options.device)), held_out)
        taken = f"{time.perf_counter() - start:.0f} s"
        print(f"step {step:5d}   loss {loss:7.3f}   energy distance to held-out digits {distance:6.3f}   {taken}")

    _, model = train(ATTENTIONS[options.attention], options.steps, device=options.device, report=report)
    if options.save:
        from matplotlib import pyplot

        drawn = one_step(model, torch.randn(64, 8, 8).to(options.device)).detach().cpu().clamp(-1, 1)
        pyplot.imsave(options.save, drawn.unflatten(0, (8, 8)).transpose(1, 2).reshape(64, 64), cmap="gray_r")


if __name__ == "__main__":
    main()
