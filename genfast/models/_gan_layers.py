"""Layers that the networks of GANs are made of: by genfast's ops (``fused``), or by plain PyTorch for comparison.

Both have the same parameters under the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from genfast import ops
from genfast.nn.utils import spectral_norm_network

__all__ = [
    "BatchNormAct", "ConditionalBatchNorm2d", "Conv", "ConvTranspose", "Dense", "InstanceNorm", "activate",
    "downsample", "levels", "minibatch_stddev", "modulated_conv2d", "normalized", "normals", "spectral", "upsample",
]  # fmt: skip

SLOPE = 0.2  # of leaky relus


def levels(what: str, shape: Sequence[int], count: int) -> tuple[int, int]:
    """(height, width) after ``count`` halvings; ``ValueError`` where there are none."""
    scale = 2**count
    if len(shape) != 3 or min(shape) < 1 or count < 1 or shape[1] % scale or shape[2] % scale:
        raise ValueError(
            f"{what}: shape must be (channels, height, width) with sides divisible by 2^{count} for {count} levels, "
            f"got {tuple(shape)}"
        )
    return shape[1] // scale, shape[2] // scale


def normals(shape: Sequence[int], like: Tensor, seed: int | Tensor | None) -> Tensor:
    """Standard normals by genfast's counters: the same on every device, in the dtype and on the device of ``like``."""
    zeros = like.new_zeros(()).expand(tuple(shape))
    return ops.reparameterize(zeros, zeros, seed=seed)


def normalized(z: Tensor) -> Tensor:
    """Rows of mean square 1."""
    return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)


def activate(x: Tensor, b: Tensor | None, act: str, fused: bool, gain: float = 1.0) -> Tensor:
    """act(x + b) * gain, b along dim 1; act is linear, relu, lrelu or tanh."""
    if fused:
        return ops.bias_act(x, b, act=act, alpha=SLOPE if act == "lrelu" else None, gain=gain)
    if b is not None:
        x = x + b.view(1, -1, *(1,) * (x.dim() - 2))
    if act == "relu":
        x = functional.relu(x)
    elif act == "lrelu":
        x = functional.leaky_relu(x, SLOPE)
    elif act == "tanh":
        x = torch.tanh(x)
    return x if gain == 1.0 else x * gain


class Dense(nn.Linear):
    """A linear layer and its activation."""

    def __init__(
        self, inputs: int, outputs: int, act: str = "linear", *, bias: bool = True, fused: bool = True
    ) -> None:
        super().__init__(inputs, outputs, bias)
        self.act, self.fused = act, fused

    def forward(self, x: Tensor) -> Tensor:
        if self.act == "linear":
            return super().forward(x)
        return activate(functional.linear(x, self.weight), self.bias, self.act, self.fused)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class Conv(nn.Conv2d):
    """A convolution and its activation."""

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int = 1, padding: int = 0, act: str = "linear", *,
        bias: bool = True, fused: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(inputs, outputs, size, stride, padding, bias=bias)
        self.act, self.fused = act, fused

    def forward(self, x: Tensor) -> Tensor:
        if self.act == "linear":
            return super().forward(x)
        out = functional.conv2d(x, self.weight, None, self.stride, self.padding)
        return activate(out, self.bias, self.act, self.fused)


class ConvTranspose(nn.ConvTranspose2d):
    """A transposed convolution and its activation."""

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int = 1, padding: int = 0, act: str = "linear", *,
        output_padding: int = 0, bias: bool = True, fused: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(inputs, outputs, size, stride, padding, output_padding, bias=bias)
        self.act, self.fused = act, fused

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        if self.act == "linear":
            return super().forward(x, output_size)
        out = functional.conv_transpose2d(x, self.weight, None, self.stride, self.padding, self.output_padding)  # type: ignore[arg-type]
        return activate(out, self.bias, self.act, self.fused)


class BatchNormAct(nn.Module):
    """Batch normalization of rows [B, C] or images [B, C, H, W], then an activation."""

    def __init__(self, channels: int, act: str, *, images: bool = True, fused: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if images else nn.BatchNorm1d(channels)
        self.act, self.fused = act, fused

    def forward(self, x: Tensor) -> Tensor:
        return activate(self.norm(x), None, self.act, self.fused)


class ConditionalBatchNorm2d(nn.Module):
    """Batch normalization whose gain and offset belong to a class; without classes, ordinary.

    Source: Dumoulin, Shlens and Kudlur, "A learned representation for artistic style", ICLR 2017; de Vries et al.,
    "Modulating early visual processing by language", NeurIPS 2017.
    """

    def __init__(self, channels: int, classes: int | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=classes is None)
        self.gain = self.offset = None
        if classes is not None:
            self.gain, self.offset = nn.Embedding(classes, channels), nn.Embedding(classes, channels)
            nn.init.ones_(self.gain.weight)
            nn.init.zeros_(self.offset.weight)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        x = self.norm(x)
        if self.gain is None or self.offset is None:
            return x
        return torch.addcmul(self.offset(labels)[:, :, None, None], x, self.gain(labels)[:, :, None, None])


class InstanceNorm(nn.Module):
    """Instance normalization of images without gain and offset, then an activation.

    Source: Ulyanov, Vedaldi and Lempitsky, "Instance normalization: the missing ingredient for fast stylization", 2016.
    """

    def __init__(self, act: str = "linear", eps: float = 1e-5, *, fused: bool = True) -> None:
        super().__init__()
        self.act, self.eps, self.fused = act, eps, fused

    def forward(self, x: Tensor) -> Tensor:
        x = ops.instance_norm(x, eps=self.eps) if self.fused else functional.instance_norm(x, eps=self.eps)
        return x if self.act == "linear" else activate(x, None, self.act, self.fused)


# ---- resampling, modulation and statistics of StyleGAN2 ----

_TAPS = (1.0, 3.0, 3.0, 1.0)


def _taps(x: Tensor) -> Tensor:
    """[4], of sum 1."""
    return torch.tensor(_TAPS, dtype=x.dtype, device=x.device) / sum(_TAPS)


def _kernels(x: Tensor, gain: float) -> Tensor:
    """The filter in two dimensions, once a channel."""
    taps = _taps(x)
    return (gain * taps[:, None] * taps).expand(x.shape[1], 1, -1, -1)


def upsample(x: Tensor, fused: bool) -> Tensor:
    """Twice the resolution, by the filter 1 3 3 1 in both directions."""
    if fused:
        return ops.upfirdn2d(x, _taps(x).float(), up=2, padding=(2, 1, 2, 1), gain=4.0)
    return functional.conv_transpose2d(x, _kernels(x, 4.0), stride=2, padding=1, groups=x.shape[1])


def downsample(x: Tensor, fused: bool, down: int = 2, more: int = 0) -> Tensor:
    """Every other position, with ``down`` 1 every one, of what the filter 1 3 3 1 leaves; ``more``: wider padding."""
    if fused:
        return ops.upfirdn2d(x, _taps(x).float(), down=down, padding=1 + more)
    return functional.conv2d(x, _kernels(x, 1.0), stride=down, padding=1 + more, groups=x.shape[1])


def modulated_conv2d(x: Tensor, weight: Tensor, styles: Tensor, demodulate: bool, fused: bool) -> Tensor:
    """A convolution of each image with weights that its styles scale; demodulated to norm 1 for each output channel.

    Source: Karras et al., "Analyzing and improving the image quality of StyleGAN", CVPR 2020, section 2.2.
    """
    if fused:
        return ops.modulated_conv2d(x, weight, styles, padding=weight.shape[2] // 2, demodulate=demodulate)
    batch, inputs, height, width = x.shape
    scaled = weight.unsqueeze(0) * styles.view(batch, 1, inputs, 1, 1)
    if demodulate:
        scaled = scaled * torch.rsqrt(scaled.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    joined = x.reshape(1, batch * inputs, height, width)
    out = functional.conv2d(joined, scaled.flatten(0, 1), padding=weight.shape[2] // 2, groups=batch)
    return out.view(batch, -1, height, width)


def minibatch_stddev(x: Tensor, group: int, fused: bool) -> Tensor:
    """x and one more channel: the mean deviation over groups of ``group`` samples, those of index equal mod B / group.

    Source: Karras et al., "Progressive growing of GANs", ICLR 2018, section 3.
    """
    if fused:
        return ops.minibatch_stddev(x, group_size=group)
    grouped = x.view(group, -1, *x.shape[1:])
    deviation = (grouped.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
    return torch.cat((x, deviation.repeat(group).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])), 1)


def spectral(network: nn.Module, fused: bool) -> None:
    """Divides the weights of all linear layers, convolutions and embeddings by their spectral norms, in place."""
    if fused:
        spectral_norm_network(network)
        return
    for part in network.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.utils.parametrizations.spectral_norm(part)
