"""SNGAN: residual networks with spectral normalization, conditional by projection."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from genfast._checks import check_count
from genfast.models._gan_layers import ConditionalBatchNorm2d, Conv, Dense, activate, levels, spectral
from genfast.models.gan import GAN

__all__ = ["SNGAN", "SNGANDiscriminator", "SNGANGenerator"]


def _initialize(module: nn.Module) -> None:
    """Xavier weights, with gain sqrt 2 where an activation follows or precedes in a block, and biases 0."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            wide = isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1)
            nn.init.xavier_uniform_(part.weight, 2**0.5 if wide else 1.0)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class UpBlock(nn.Module):
    """Twice the resolution: norm, relu, upsample, conv, norm, relu, conv, beside an upsampled 1 x 1 convolution."""

    def __init__(self, inputs: int, outputs: int, classes: int | None, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = ConditionalBatchNorm2d(inputs, classes), ConditionalBatchNorm2d(outputs, classes)
        self.conv1, self.conv2 = Conv(inputs, outputs, 3, 1, 1), Conv(outputs, outputs, 3, 1, 1)
        self.skip = Conv(inputs, outputs, 1)
        self.fused = fused

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        out = activate(self.norm1(x, labels), None, "relu", self.fused)
        out = self.conv1(functional.interpolate(out, scale_factor=2))
        out = self.conv2(activate(self.norm2(out, labels), None, "relu", self.fused))
        return out + functional.interpolate(self.skip(x), scale_factor=2)


class DownBlock(nn.Module):
    """relu, conv, relu, conv, beside a 1 x 1 convolution; where ``down``, means of 2 x 2 after both.

    ``first``: on an image, without the first relu, and the mean before the 1 x 1 convolution, which is the same.
    """

    def __init__(self, inputs: int, outputs: int, down: bool, first: bool, fused: bool) -> None:
        super().__init__()
        self.conv1 = Conv(inputs, outputs, 3, 1, 1, "relu", fused=fused)
        self.conv2 = Conv(outputs, outputs, 3, 1, 1)
        self.skip = Conv(inputs, outputs, 1) if down or inputs != outputs else None
        self.down, self.first, self.fused = down, first, fused

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x if self.first else activate(x, None, "relu", self.fused)))
        if self.down:
            x, out = functional.avg_pool2d(x, 2), functional.avg_pool2d(out, 2)
        return out + (x if self.skip is None else self.skip(x))


class SNGANGenerator(nn.Module):
    """Residual blocks, each of which doubles the resolution; with classes, conditional batch normalization.

    Args:
        shape: (channels, height, width); the sides are divisible by 2^len(channels).
        channels: widths of the levels, the finest first.
        latent: size of z.
        classes: number of classes, or None.
        fused: genfast's ops; False: plain PyTorch.

    Raises:
        ValueError: for a shape that cannot be halved that often.

    Examples:
        >>> import torch
        >>> SNGANGenerator((3, 8, 8), [8], latent=4)(torch.zeros(2, 4)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self, shape: Sequence[int], channels: Sequence[int] = (64, 64), latent: int = 128, *,
        classes: int | None = None, fused: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        height, width = levels("SNGANGenerator", shape, len(channels))
        widths = [channels[-1], *reversed(channels)]
        self.first = Dense(latent, widths[0] * height * width)
        self.start = (widths[0], height, width)
        self.blocks = nn.ModuleList(
            UpBlock(narrow, wide, classes, fused) for narrow, wide in itertools.pairwise(widths)
        )
        self.norm = nn.BatchNorm2d(channels[0])
        self.last = Conv(channels[0], shape[0], 3, 1, 1, "tanh", fused=fused)
        self.fused = fused
        _initialize(self)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """z [B, latent] to images [B, channels, height, width] in [-1, 1]."""
        x = self.first(z).view(-1, *self.start)
        for block in self.blocks:
            x = block(x, labels)
        out: Tensor = self.last(activate(self.norm(x), None, "relu", self.fused))
        return out


class SNGANDiscriminator(nn.Module):
    """Residual blocks, the first of which halve the resolution, sums over positions, and a logit.

    With classes, the inner product of the sums with the class's vector is added to the logit. All weights are divided
    by their spectral norms.

    Args:
        shape: (channels, height, width); the sides are divisible by 2^len(channels).
        channels: widths of the halving blocks, the finest first; two more blocks of the last width follow.
        classes: number of classes, or None.
        fused: genfast's ops; False: plain PyTorch.

    Raises:
        ValueError: for a shape that cannot be halved that often.

    Examples:
        >>> import torch
        >>> SNGANDiscriminator((3, 8, 8), [8])(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2])
    """

    independent = True

    def __init__(
        self, shape: Sequence[int], channels: Sequence[int] = (64, 64), *, classes: int | None = None,
        fused: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        levels("SNGANDiscriminator", shape, len(channels))
        widths = [shape[0], *channels, channels[-1], channels[-1]]
        self.blocks = nn.Sequential(
            *(DownBlock(widths[i], widths[i + 1], i < len(channels), i == 0, fused) for i in range(len(widths) - 1))
        )
        self.last = Dense(channels[-1], 1)
        self.classes = None if classes is None else nn.Embedding(classes, channels[-1])
        self.fused = fused
        _initialize(self)
        if self.classes is not None:
            nn.init.xavier_uniform_(self.classes.weight)
        spectral(self, fused)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images [B, channels, height, width] to logits [B]."""
        sums = activate(self.blocks(x), None, "relu", self.fused).sum((2, 3))
        logits: Tensor = self.last(sums).squeeze(1)
        if self.classes is not None:
            logits = logits + (self.classes(labels) * sums).sum(1)
        return logits


class SNGAN(GAN):
    """Residual networks with spectral normalization; with classes, conditional on them.

    The generator's batch normalization and the discriminator's inner product take the classes. Its usual loss is
    ``"hinge"``, with Adam's betas (0, 0.9) and several steps of the discriminator to one of the generator.

    Args:
        shape: (channels, height, width); the sides are divisible by 2^len(channels).
        channels: widths of the levels, the finest first, of both networks.
        latent: size of z.
        classes: number of classes, or None.
        fused: genfast's ops; False: plain PyTorch, with the same ``state_dict``.

    Raises:
        ValueError: for a shape that cannot be halved that often, or classes below 1.

    Source: Miyato et al., "Spectral normalization for generative adversarial networks", ICLR 2018; Miyato and Koyama,
    "cGANs with projection discriminator", ICLR 2018.

    Examples:
        >>> import torch
        >>> gan = SNGAN((3, 8, 8), channels=[8], latent=4, classes=10)
        >>> gan.sample(2, seed=0, labels=torch.tensor([3, 7])).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self, shape: Sequence[int] = (1, 28, 28), channels: Sequence[int] = (64, 64), latent: int = 128, *,
        classes: int | None = None, fused: bool = True,
    ) -> None:  # fmt: skip
        if classes is not None:
            check_count("SNGAN", "classes", classes, 1)
        super().__init__(
            SNGANGenerator(shape, channels, latent, classes=classes, fused=fused),
            SNGANDiscriminator(shape, channels, classes=classes, fused=fused),
            latent,
            classes=classes,
        )
