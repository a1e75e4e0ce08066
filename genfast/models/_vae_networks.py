"""Encoders and decoders that the builders of the VAE family put together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

__all__ = [
    "Residual",
    "conv_decoder",
    "conv_encoder",
    "image_levels",
    "perceptron",
    "residual_decoder",
    "residual_encoder",
]


def perceptron(widths: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these widths with an activation between them."""
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Linear(narrow, wide), activation()]
    return nn.Sequential(*layers[:-1])


def image_levels(what: str, shape: Sequence[int], channels: Sequence[int]) -> tuple[int, int]:
    """(height, width) after len(channels) halvings; ``ValueError`` where there are none."""
    scale = 2 ** len(channels)
    if len(shape) != 3 or not channels or shape[1] % scale or shape[2] % scale:
        raise ValueError(
            f"{what}: shape must be (channels, height, width) with sides divisible by 2^{len(channels)} "
            f"for {len(channels)} levels, got {tuple(shape)}"
        )
    return shape[1] // scale, shape[2] // scale


def conv_encoder(inputs: int, channels: Sequence[int]) -> list[nn.Module]:
    """One 4 x 4 convolution of stride 2 a level."""
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise([inputs, *channels]):
        layers += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.ReLU()]
    return layers


def conv_decoder(outputs: int, channels: Sequence[int]) -> list[nn.Module]:
    """``conv_encoder`` mirrored by transposed convolutions; linear at the end."""
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise([*reversed(channels), outputs]):
        layers += [nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1), nn.ReLU()]
    return layers[:-1]


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))), 3 x 3 then 1 x 1.

    Source: van den Oord et al., "Neural discrete representation learning", NeurIPS 2017, whose networks have these.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


def residual_encoder(inputs: int, channels: Sequence[int], blocks: int) -> list[nn.Module]:
    """As ``conv_encoder``, with ``blocks`` residual blocks after the last level."""
    return [*conv_encoder(inputs, channels)[:-1], *(Residual(channels[-1]) for _ in range(blocks)), nn.ReLU()]


def residual_decoder(outputs: int, channels: Sequence[int], blocks: int) -> list[nn.Module]:
    """As ``conv_decoder``, with ``blocks`` residual blocks before the first level."""
    return [*(Residual(channels[-1]) for _ in range(blocks)), nn.ReLU(), *conv_decoder(outputs, channels)]
