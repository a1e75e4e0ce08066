"""Networks of image translation: CycleGAN's generator and the discriminator of patches."""

from __future__ import annotations

from torch import Tensor, nn

from genfast._checks import check_count
from genfast.models._gan_layers import Conv, ConvTranspose, InstanceNorm
from genfast.models.dcgan import initialize

__all__ = ["CycleGANGenerator", "PatchDiscriminator"]


class _Residual(nn.Module):
    """x + norm(conv(act(norm(conv(x))))), 3 x 3 on reflected borders."""

    def __init__(self, channels: int, fused: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1), Conv(channels, channels, 3, bias=False), InstanceNorm("relu", fused=fused),
            nn.ReflectionPad2d(1), Conv(channels, channels, 3, bias=False), InstanceNorm(fused=fused),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


class CycleGANGenerator(nn.Module):
    """Translates images: two halvings, residual blocks, two doublings, instance normalization.

    Args:
        channels: of the images.
        width: channels at full resolution; four times as many in the middle.
        blocks: residual blocks: 6 for 128 x 128 in the paper, 9 for 256 x 256.
        outputs: channels of the translated images; None for as many.
        fused: genfast's ops; False: plain PyTorch, with the same ``state_dict``.

    Raises:
        ValueError: for sizes below 1; in ``forward`` for sides that 4 does not divide.

    Source: Zhu, Park, Isola and Efros, "Unpaired image-to-image translation using cycle-consistent adversarial
    networks", ICCV 2017; Johnson, Alahi and Fei-Fei, "Perceptual losses for real-time style transfer and
    super-resolution", ECCV 2016.

    Examples:
        >>> import torch
        >>> CycleGANGenerator(width=4, blocks=1)(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 3, 16, 16])
    """

    def __init__(
        self, channels: int = 3, width: int = 64, blocks: int = 9, *, outputs: int | None = None, fused: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("width", width), ("blocks", blocks)):
            check_count("CycleGANGenerator", name, value, 1)
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(3), Conv(channels, width, 7, bias=False), InstanceNorm("relu", fused=fused),
            Conv(width, 2 * width, 3, 2, 1, bias=False), InstanceNorm("relu", fused=fused),
            Conv(2 * width, 4 * width, 3, 2, 1, bias=False), InstanceNorm("relu", fused=fused),
            *(_Residual(4 * width, fused) for _ in range(blocks)),
            ConvTranspose(4 * width, 2 * width, 3, 2, 1, output_padding=1, bias=False),
            InstanceNorm("relu", fused=fused),
            ConvTranspose(2 * width, width, 3, 2, 1, output_padding=1, bias=False),
            InstanceNorm("relu", fused=fused),
            nn.ReflectionPad2d(3), Conv(width, channels if outputs is None else outputs, 7, act="tanh", fused=fused),
        )  # fmt: skip
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, height, width] to images of the same size in [-1, 1]."""
        if x.shape[-1] % 4 or x.shape[-2] % 4:
            raise ValueError(f"CycleGANGenerator: the sides must be divisible by 4, got {tuple(x.shape)}")
        out: Tensor = self.layers(x)
        return out


class PatchDiscriminator(nn.Module):
    """A logit for each patch of an image: 4 x 4 convolutions, leaky relu, instance normalization.

    Args:
        channels: of the images.
        width: channels of the first layer; they double up to eight times as many.
        layers: convolutions of stride 2; with 3 a patch has 70 x 70 pixels.
        fused: genfast's ops; False: plain PyTorch, with the same ``state_dict``.

    Raises:
        ValueError: for sizes below 1.

    Source: Isola, Zhu, Zhou and Efros, "Image-to-image translation with conditional adversarial networks", CVPR 2017.

    Examples:
        >>> import torch
        >>> PatchDiscriminator(width=4)(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 1, 6, 6])
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3, *, fused: bool = True) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("width", width), ("layers", layers)):
            check_count("PatchDiscriminator", name, value, 1)
        parts: list[nn.Module] = [Conv(channels, width, 4, 2, 1, "lrelu", fused=fused)]
        narrow = width
        for level in range(1, layers + 1):
            wide = width * min(2**level, 8)
            parts += [
                Conv(narrow, wide, 4, 2 if level < layers else 1, 1, bias=False), InstanceNorm("lrelu", fused=fused)
            ]  # fmt: skip
            narrow = wide
        self.layers = nn.Sequential(*parts, Conv(narrow, 1, 4, 1, 1))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, height, width] to logits [B, 1, rows, columns]."""
        out: Tensor = self.layers(x)
        return out
