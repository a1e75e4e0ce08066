"""A small StyleGAN2: mapping network, modulated convolutions, noise, skips to images, residual discriminator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from genfast import random
from genfast._checks import check_count
from genfast.models._gan_layers import (
    activate,
    downsample,
    levels,
    minibatch_stddev,
    modulated_conv2d,
    normalized,
    normals,
    upsample,
)  # fmt: skip
from genfast.models.gan import GAN
from genfast.ops import _noise

__all__ = ["StyleGAN2", "StyleGAN2Discriminator", "StyleGAN2Generator"]

_ROOT2 = math.sqrt(2)
_AVERAGE = 0.995  # of the running mean of w


class EqualDense(nn.Module):
    """A linear layer whose stored weights have variance 1 (times 1 / rate^2) and are scaled in use, then lrelu or none.

    Source: Karras et al., "Progressive growing of GANs", ICLR 2018, section 4.1.
    """

    def __init__(
        self, inputs: int, outputs: int, act: str = "linear", *, bias: float = 0.0, rate: float = 1.0,
        fused: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self.scale, self.rate, self.act, self.fused = rate / math.sqrt(inputs), rate, act, fused

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.rate == 1.0 else self.bias * self.rate
        weight = self.weight * self.scale
        if self.act == "linear":
            return functional.linear(x, weight, bias)
        return activate(functional.linear(x, weight), bias, self.act, self.fused, _ROOT2)


class EqualConv(nn.Module):
    """A convolution with scaled weights, then lrelu or none; ``down``: on a blurred image, with stride 2."""

    def __init__(
        self, inputs: int, outputs: int, size: int, act: str = "linear", *, bias: bool = True, down: bool = False,
        fused: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale, self.act, self.down, self.fused = 1 / math.sqrt(inputs * size**2), act, down, fused

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.shape[2]
        if self.down:  # blur, then every other position
            x = downsample(x, self.fused, 1, size // 2)
        x = functional.conv2d(
            x, self.weight * self.scale, None, 2 if self.down else 1, 0 if self.down else size // 2
        )  # fmt: skip
        if self.act == "linear" and self.bias is None:
            return x
        return activate(x, self.bias, self.act, self.fused, 1.0 if self.act == "linear" else _ROOT2)


class StyledConv(nn.Module):
    """A convolution modulated by w, noise, bias and lrelu; ``up``: on an image of twice the resolution."""

    def __init__(self, inputs: int, outputs: int, style: int, *, up: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.style = EqualDense(style, inputs, bias=1.0, fused=fused)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale, self.up, self.fused = 1 / math.sqrt(9 * inputs), up, fused

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        x = modulated_conv2d(upsample(x, self.fused) if self.up else x, self.weight * self.scale, self.style(w), True,
                             self.fused)  # fmt: skip
        x = torch.addcmul(x, self.strength, noise)
        return activate(x, self.bias, "lrelu", self.fused, _ROOT2)


class ToImage(nn.Module):
    """A 1 x 1 convolution modulated by w, without demodulation."""

    def __init__(self, inputs: int, outputs: int, style: int, fused: bool) -> None:
        super().__init__()
        self.style = EqualDense(style, inputs, bias=1.0, fused=fused)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale, self.fused = 1 / math.sqrt(inputs), fused

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = modulated_conv2d(x, self.weight * self.scale, self.style(w), False, self.fused)
        return x + self.bias.view(1, -1, 1, 1)


class StyleGAN2Generator(nn.Module):
    """A mapping network from z to w, and a synthesis network that w modulates.

    Args:
        shape: (channels, height, width); the sides are divisible by 2^len(channels).
        channels: widths of the levels, the finest first; the constant input has the last.
        latent: size of z.
        style: size of w; None for that of z.
        mapping_layers: of the mapping network.
        classes: number of classes, or None.
        mixing: probability, in training mode, that a sample's layers from a random one on have the w of another z
            (style mixing).
        fused: genfast's ops; False: plain PyTorch.

    Raises:
        ValueError: for a shape that cannot be halved that often, sizes below 1, or a probability outside [0, 1].

    Examples:
        >>> generator = StyleGAN2Generator((3, 16, 16), [8, 16], latent=8)
        >>> w = generator.mapping(torch.ones(2, 8))
        >>> generator.synthesis(w, seed=0).shape
        torch.Size([2, 3, 16, 16])
    """

    noisy = True

    def __init__(
        self, shape: Sequence[int], channels: Sequence[int] = (64, 128), latent: int = 64, *, style: int | None = None,
        mapping_layers: int = 4, classes: int | None = None, mixing: float = 0.0, fused: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0.0 <= mixing <= 1.0:
            raise ValueError(f"StyleGAN2Generator: mixing must be a probability in [0, 1], got {mixing}")
        height, width = levels("StyleGAN2Generator", shape, len(channels))
        check_count("StyleGAN2Generator", "latent", latent, 1)
        check_count("StyleGAN2Generator", "mapping_layers", mapping_layers, 1)
        style = latent if style is None else style
        self.embedding = None if classes is None else nn.Embedding(classes, latent)
        sizes = [latent * (1 if classes is None else 2), *[style] * mapping_layers]
        self.layers = nn.Sequential(
            *(EqualDense(narrow, wide, "lrelu", rate=0.01, fused=fused) for narrow, wide in itertools.pairwise(sizes))
        )
        self.register_buffer("average", torch.zeros(style))
        self.average: Tensor
        widths = [channels[-1], *reversed(channels)]
        self.constant = nn.Parameter(torch.randn(widths[0], height, width))
        self.first = StyledConv(widths[0], widths[0], style, fused=fused)
        self.first_image = ToImage(widths[0], shape[0], style, fused)
        self.ups, self.convs, self.images = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for narrow, wide in itertools.pairwise(widths):
            self.ups.append(StyledConv(narrow, wide, style, up=True, fused=fused))
            self.convs.append(StyledConv(wide, wide, style, fused=fused))
            self.images.append(ToImage(wide, shape[0], style, fused))
        self.sizes = [(height, width), *((height << i, width << i) for i in range(1, len(widths)) for _ in range(2))]
        self.style, self.mixing, self.fused = style, float(mixing), fused

    def mapping(self, z: Tensor, labels: Tensor | None = None, truncation: float = 1.0) -> Tensor:
        """w [B, style] of z [B, latent]; ``truncation`` below 1 draws it to its running mean."""
        z = normalized(z)
        if self.embedding is not None:
            z = torch.cat((z, normalized(self.embedding(labels))), 1)
        w: Tensor = self.layers(z)
        if self.training:
            with torch.no_grad():
                self.average.lerp_(w.detach().mean(0).to(self.average.dtype), 1 - _AVERAGE)
        return w if truncation == 1.0 else torch.lerp(self.average.to(w.dtype), w, truncation)

    def mixed(self, z: Tensor, labels: Tensor | None = None, seed: int | Tensor | None = None) -> Tensor:
        """w [B, layers, style]: that of z, and with probability ``mixing`` from a random layer on that of another z.

        The layer is none of the first one's, so that every mixed sample has both; all draws depend on the seed and the
        sample's index.
        """
        count, layers = len(z), len(self.sizes)
        drawn = random.as_seed(seed, z.device)
        other = _noise.normal(drawn, z.numel(), 0, 1).to(z.device, z.dtype).view(z.shape)
        both = self.mapping(torch.cat((z, other)), None if labels is None else labels.repeat(2)).unsqueeze(1)
        u = _noise.uniform(drawn, 2 * count, 0, 1).to(z.device).view(count, 2)
        first = torch.where(u[:, 0] < self.mixing, 1 + (u[:, 1] * (layers - 1)).floor(), layers)
        own = torch.arange(layers, device=z.device) < first.unsqueeze(1)
        return torch.where(own.unsqueeze(2), both[:count], both[count:])

    def synthesis(self, w: Tensor, seed: int | Tensor | None = None) -> Tensor:
        """Images [B, channels, height, width] of w [B, style], or [B, layers, style] with one for each of the layers.

        Layers: one at the coarsest resolution, two at each other one. Each level's image has the w of its last layer.
        """
        if w.dim() == 2:
            w = w.unsqueeze(1).expand(-1, len(self.sizes), -1)
        areas = [height * width for height, width in self.sizes]
        parts = normals((len(w), sum(areas)), w, seed).split(areas, 1)
        noise = [part.view(-1, 1, *size) for part, size in zip(parts, self.sizes, strict=True)]
        x = self.first(self.constant.to(w.dtype).expand(len(w), -1, -1, -1), w[:, 0], noise[0])
        image: Tensor = self.first_image(x, w[:, 0])
        for level, (up, conv, to_image) in enumerate(zip(self.ups, self.convs, self.images, strict=True)):
            place = 2 * level + 1
            x = conv(up(x, w[:, place], noise[place]), w[:, place + 1], noise[place + 1])
            image = upsample(image, self.fused) + to_image(x, w[:, place + 1])
        return image

    def forward(
        self, z: Tensor, labels: Tensor | None = None, seed: int | Tensor | None = None, truncation: float = 1.0
    ) -> Tensor:
        """z [B, latent] to images [B, channels, height, width]; in training with ``mixing``."""
        if self.training and self.mixing > 0:
            seed = random.as_seed(seed, z.device)
            w = self.mixed(z, labels, seed)
            return self.synthesis(w if truncation == 1.0 else torch.lerp(self.average.to(w.dtype), w, truncation), seed)
        return self.synthesis(self.mapping(z, labels, truncation), seed)


class ResidualDown(nn.Module):
    """Half the resolution: conv, blurred conv of stride 2, beside a downsampled 1 x 1 convolution; variance kept."""

    def __init__(self, inputs: int, outputs: int, fused: bool) -> None:
        super().__init__()
        self.conv1 = EqualConv(inputs, inputs, 3, "lrelu", fused=fused)
        self.conv2 = EqualConv(inputs, outputs, 3, "lrelu", down=True, fused=fused)
        self.skip = EqualConv(inputs, outputs, 1, bias=False, fused=fused)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x)) + self.skip(downsample(x, self.fused))
        return out * (1 / _ROOT2)


class StyleGAN2Discriminator(nn.Module):
    """Residual blocks, the deviation over small groups as one more channel, and a logit.

    Args:
        shape: (channels, height, width); the sides are divisible by 2^len(channels).
        channels: widths of the levels, the finest first.
        group_size: samples whose deviation is taken; where it does not divide the batch, the largest number below.
        classes: number of classes, or None; the logit is then the inner product with the class's vector.
        fused: genfast's ops; False: plain PyTorch.

    Raises:
        ValueError: for a shape that cannot be halved that often.

    Examples:
        >>> StyleGAN2Discriminator((3, 16, 16), [8, 16])(torch.zeros(4, 3, 16, 16)).shape
        torch.Size([4])
    """

    def __init__(
        self, shape: Sequence[int], channels: Sequence[int] = (64, 128), *, group_size: int = 4,
        classes: int | None = None, fused: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        height, width = levels("StyleGAN2Discriminator", shape, len(channels))
        check_count("StyleGAN2Discriminator", "group_size", group_size, 1)
        last = channels[-1]
        self.first = EqualConv(shape[0], channels[0], 1, "lrelu", fused=fused)
        widths = [*channels, last]
        self.blocks = nn.Sequential(*(ResidualDown(narrow, wide, fused) for narrow, wide in itertools.pairwise(widths)))
        self.conv = EqualConv(last + 1, last, 3, "lrelu", fused=fused)
        self.dense = EqualDense(last * height * width, last, "lrelu", fused=fused)
        self.last = EqualDense(last, 1 if classes is None else last, fused=fused)
        self.classes = None if classes is None else nn.Embedding(classes, last)
        self.group_size, self.fused = group_size, fused

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images [B, channels, height, width] to logits [B]."""
        x = self.blocks(self.first(x))
        group = next((g for g in range(min(self.group_size, len(x)), 0, -1) if len(x) % g == 0), 1)
        x = self.conv(minibatch_stddev(x, group, self.fused))
        out: Tensor = self.last(self.dense(x.flatten(1)))
        if self.classes is None:
            return out.squeeze(1)
        return (out * normalized(self.classes(labels))).sum(1) / math.sqrt(out.shape[1])


class StyleGAN2(GAN):
    """A StyleGAN2 for small images.

    Its usual training is ``"nonsaturating"`` with R1 every 16 steps, path lengths every 4, betas (0, 0.99) and a
    moving average of the generator; with few images, ADA.

    Args:
        shape: (channels, height, width); the sides are divisible by 2^len(channels).
        channels: widths of the levels, the finest first, of both networks.
        latent: size of z and w.
        mapping_layers: of the mapping network.
        classes: number of classes, or None.
        mixing: probability that samples in training mix the w of two z; 0.9 in the paper for faces.
        fused: genfast's ops; False: plain PyTorch, with the same ``state_dict``.

    Raises:
        ValueError: for a shape that cannot be halved that often, sizes below 1, or a probability outside [0, 1].

    Source: Karras et al., "Analyzing and improving the image quality of StyleGAN", CVPR 2020; Karras, Laine and Aila,
    "A style-based generator architecture for generative adversarial networks", CVPR 2019, section 3.1 (style mixing).
    Upsampled layers blur before the convolution here, not after it.

    Examples:
        >>> gan = StyleGAN2((1, 28, 28), channels=[8, 16], latent=8)
        >>> gan.sample(2, seed=0, truncation=0.7).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self, shape: Sequence[int] = (1, 28, 28), channels: Sequence[int] = (64, 128), latent: int = 64, *,
        mapping_layers: int = 4, classes: int | None = None, mixing: float = 0.0, fused: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(
            StyleGAN2Generator(
                shape, channels, latent, mapping_layers=mapping_layers, classes=classes, mixing=mixing, fused=fused
            ),
            StyleGAN2Discriminator(shape, channels, classes=classes, fused=fused),
            latent,
            classes=classes,
        )  # fmt: skip
