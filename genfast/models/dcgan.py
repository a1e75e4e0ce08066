"""DCGAN: strided convolutions and batch normalization."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from genfast._checks import check_count
from genfast.models._gan_layers import BatchNormAct, Conv, ConvTranspose, Dense, levels
from genfast.models.gan import GAN, PackedDiscriminator

__all__ = ["DCGAN", "DCGANDiscriminator", "DCGANGenerator"]


def initialize(module: nn.Module) -> None:
    """Weights from N(0, 0.02), of batch normalization from N(1, 0.02), as the paper has them."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(part.weight, 0.0, 0.02)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, 0.02)
        if getattr(part, "bias", None) is not None:
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]


class DCGANGenerator(nn.Module):
    """A linear layer, then one transposed 4 x 4 convolution of stride 2 a level, batch normalization and relu between.

    Args:
        shape: (channels, height, width); the sides are divisible by 2^len(channels).
        channels: widths of the levels, the finest first.
        latent: size of z.
        fused: genfast's ops; False: plain PyTorch.

    Raises:
        ValueError: for a shape that cannot be halved that often.

    Examples:
        >>> import torch
        >>> DCGANGenerator((1, 28, 28), [8, 16], latent=4)(torch.zeros(2, 4)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self, shape: Sequence[int], channels: Sequence[int] = (64, 128), latent: int = 100, *, fused: bool = True
    ) -> None:
        super().__init__()
        height, width = levels("DCGANGenerator", shape, len(channels))
        layers: list[nn.Module] = [
            Dense(latent, channels[-1] * height * width, bias=False),
            nn.Unflatten(1, (channels[-1], height, width)),
            BatchNormAct(channels[-1], "relu", fused=fused),
        ]
        for wide, narrow in itertools.pairwise([*reversed(channels)]):
            layers += [
                ConvTranspose(wide, narrow, 4, 2, 1, bias=False, fused=fused), BatchNormAct(narrow, "relu", fused=fused)
            ]  # fmt: skip
        self.layers = nn.Sequential(*layers, ConvTranspose(channels[0], shape[0], 4, 2, 1, "tanh", fused=fused))
        initialize(self)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, latent] to images [B, channels, height, width] in [-1, 1]."""
        out: Tensor = self.layers(z)
        return out


class DCGANDiscriminator(nn.Module):
    """One 4 x 4 convolution of stride 2 a level with leaky relu, batch normalization in all but the first, one logit.

    Args:
        shape: (channels, height, width); the sides are divisible by 2^len(channels).
        channels: widths of the levels, the finest first.
        batch_norm: as in the paper; penalties of single samples' gradients want it off.
        fused: genfast's ops; False: plain PyTorch.

    Raises:
        ValueError: for a shape that cannot be halved that often.

    Examples:
        >>> import torch
        >>> DCGANDiscriminator((1, 28, 28), [8, 16])(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2])
    """

    def __init__(
        self, shape: Sequence[int], channels: Sequence[int] = (64, 128), *, batch_norm: bool = True, fused: bool = True
    ) -> None:
        super().__init__()
        height, width = levels("DCGANDiscriminator", shape, len(channels))
        layers: list[nn.Module] = [Conv(shape[0], channels[0], 4, 2, 1, "lrelu", fused=fused)]
        for narrow, wide in itertools.pairwise(channels):
            if batch_norm:
                layers += [
                    Conv(narrow, wide, 4, 2, 1, bias=False, fused=fused), BatchNormAct(wide, "lrelu", fused=fused)
                ]  # fmt: skip
            else:
                layers.append(Conv(narrow, wide, 4, 2, 1, "lrelu", fused=fused))
        self.independent = not batch_norm
        self.layers = nn.Sequential(*layers, nn.Flatten(), Dense(channels[-1] * height * width, 1))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, height, width] to logits [B]."""
        out: Tensor = self.layers(x)
        return out.squeeze(1)


class DCGAN(GAN):
    """DCGAN for images whose sides can be halved once a level: 28 (two levels), 32 (three) or 64 (four).

    Args:
        shape: (channels, height, width); the sides are divisible by 2^len(channels).
        channels: widths of the levels, the finest first, of both networks.
        latent: size of z.
        batch_norm: of the discriminator, as in the paper.
        packed: samples that the discriminator judges at once, see ``PackedDiscriminator``.
        fused: genfast's ops; False: plain PyTorch, with the same ``state_dict``.

    Raises:
        ValueError: for a shape that cannot be halved that often.

    Source: Radford, Metz and Chintala, "Unsupervised representation learning with deep convolutional generative
    adversarial networks", ICLR 2016.

    Examples:
        >>> import torch
        >>> DCGAN((3, 32, 32), channels=[8, 16, 32], latent=4).sample(2, seed=0).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self, shape: Sequence[int] = (1, 28, 28), channels: Sequence[int] = (64, 128), latent: int = 100, *,
        batch_norm: bool = True, packed: int = 1, fused: bool = True,
    ) -> None:  # fmt: skip
        check_count("DCGAN", "packed", packed, 1)
        generator = DCGANGenerator(shape, channels, latent, fused=fused)
        discriminator: nn.Module = DCGANDiscriminator(
            (packed * shape[0], *shape[1:]), channels, batch_norm=batch_norm, fused=fused
        )
        super().__init__(generator, PackedDiscriminator(discriminator, packed) if packed > 1 else discriminator, latent)
