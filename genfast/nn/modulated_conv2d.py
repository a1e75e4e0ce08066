"""The convolution of StyleGAN2's generator, with its styles and its noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genfast import random
from genfast._checks import check_count
from genfast.ops import _noise
from genfast.ops.modulated_conv2d import modulated_conv2d

__all__ = ["ModulatedConv2d"]


class ModulatedConv2d(nn.Module):
    """``modulated_conv2d`` with weights, the affine map from latents to styles, and noise of a learned strength.

    Weights start as standard normals and are divided by the square root of the fan-in at each call (equalized learning
    rate), those of the affine map likewise; its bias starts at 1, the noise's strength at 0.

    Args:
        in_channels: of x.
        out_channels: of the output.
        kernel_size: odd; the output keeps the size of x, up or down aside.
        latent_size: of the latents.
        up: upsampling factor.
        down: downsampling factor.
        resample_filter: taps [n] or [rows, columns] of the low-pass filter for up or down; a buffer.
        demodulate: False for layers to RGB.
        noise: whether noise is added.

    Shape:
        x [batch, in_channels, height, width], latents [batch, latent_size]; output [batch, out_channels, ...].

    Raises:
        TypeError, ValueError: for sizes that are no positive integers, or an even kernel.

    Examples:
        >>> layer = ModulatedConv2d(4, 6, 3, latent_size=8)
        >>> layer(torch.randn(2, 4, 16, 16), torch.randn(2, 8)).shape
        torch.Size([2, 6, 16, 16])
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        latent_size: int,
        *,
        up: int = 1,
        down: int = 1,
        resample_filter: Tensor | None = None,
        demodulate: bool = True,
        noise: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels), ("out_channels", out_channels), ("kernel_size", kernel_size),
            ("latent_size", latent_size), ("up", up), ("down", down),
        ):  # fmt: skip
            check_count("ModulatedConv2d", name, value, 1)
        if kernel_size % 2 == 0:
            raise ValueError(f"ModulatedConv2d: kernel_size must be odd, got {kernel_size}")
        self.up, self.down, self.demodulate, self.padding = up, down, demodulate, kernel_size // 2
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.affine_weight = nn.Parameter(torch.randn(in_channels, latent_size))
        self.affine_bias = nn.Parameter(torch.ones(in_channels))
        self.noise_strength = nn.Parameter(torch.zeros(())) if noise else None
        self.register_buffer("resample_filter", resample_filter)

    def forward(
        self,
        x: Tensor,
        latents: Tensor,
        *,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        """Convolves; ``noise`` [batch or 1, 1, height, width] replaces the noise drawn from ``seed``.

        ``offset`` is the index of the first image in the whole batch.
        """
        affine = self.affine_weight * (1.0 / math.sqrt(self.affine_weight.shape[1]))
        styles = nn.functional.linear(latents, affine, self.affine_bias)
        fan_in = math.prod(self.weight.shape[1:])
        if not self.demodulate:  # otherwise scales have no effect
            styles = styles * (1.0 / math.sqrt(fan_in))
        out = modulated_conv2d(
            x, self.weight, styles, up=self.up, down=self.down, padding=self.padding,
            resample_filter=self.resample_filter, demodulate=self.demodulate,
        )  # fmt: skip
        if self.noise_strength is None:
            return out
        if noise is None:
            each = out.shape[2] * out.shape[3]
            drawn = _noise.normal(random.as_seed(seed, x.device), out.shape[0] * each, offset * each, 0)
            noise = drawn.to(x.device, out.dtype).view(out.shape[0], 1, *out.shape[2:])
        return out + (noise * self.noise_strength).to(out.dtype)

    def extra_repr(self) -> str:
        out, inputs, size, _ = self.weight.shape
        return f"{inputs}, {out}, {size}, up={self.up}, down={self.down}, demodulate={self.demodulate}"
