"""upfirdn2d in plain PyTorch: zero insertion, windows and convolutions; differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import conv2d, pad

from genfast._checks import wide

__all__ = ["filter_gradient", "outer", "reference", "spread"]

Tensor = torch.Tensor


def _window(z: Tensor, dim: int, start: Any, length: Any) -> Tensor:
    """Elements start ... start + length - 1 along a dimension, zeros where there are none."""
    size = z.shape[dim]
    low, high = min(max(start, 0), size), max(min(start + length, size), 0)
    low = min(low, high)
    z = z.narrow(dim, low, high - low)
    before = min(max(-start, 0), length)
    after = length - before - (high - low)
    return pad(z, (0, 0) * (z.dim() - 1 - dim) + (before, after))


def spread(
    x: Tensor, taps: tuple[Any, Any], out: tuple[Any, Any], up: tuple[int, int], down: tuple[int, int],
    start: tuple[Any, Any],
) -> Tensor:  # fmt: skip
    """x [N, C, H, W] with zeros between its samples, cut or padded to what the filter reads; pairs are (y, x)."""
    for dim in (2, 3):
        factor, size = up[dim - 2], x.shape[dim]
        if factor > 1:
            shape = [*x.shape[:dim], size * factor, *x.shape[dim + 1 :]]
            x = pad(x.unsqueeze(dim + 1), (0, 0) * (3 - dim) + (0, factor - 1)).reshape(shape)
        x = _window(x, dim, -start[dim - 2], (out[dim - 2] - 1) * down[dim - 2] + taps[dim - 2])
    return x


def outer(f: Tensor) -> Tensor:
    """The filter as [taps_y, taps_x]."""
    return f.unsqueeze(1) * f.unsqueeze(0) if f.dim() == 1 else f


def reference(
    x: Tensor, f: Tensor, out_h: int, out_w: int, up_x: int, up_y: int, down_x: int, down_y: int, pad_x: int,
    pad_y: int, correlate: bool, gain: float,
) -> Tensor:  # fmt: skip
    """The formula: zero insertion, padding, convolution, decimation; each separable axis on its own."""
    kind, batch, channels = x.dtype, x.shape[0], x.shape[1]
    taps = (f.shape[0], f.shape[-1])
    z = spread(x.to(wide(kind)), taps, (out_h, out_w), (up_y, up_x), (down_y, down_x), (pad_y, pad_x))
    if not correlate:
        f = f.flip(tuple(range(f.dim())))
    z = z.reshape(batch * channels, 1, z.shape[2], z.shape[3])
    if f.dim() == 2:
        z = conv2d(z, f[None, None], stride=(down_y, down_x))
    else:
        z = conv2d(z, f[None, None, :, None], stride=(down_y, 1))
        z = conv2d(z, f[None, None, None, :], stride=(1, down_x))
    return (z * gain).to(kind).reshape(batch, channels, out_h, out_w)


def filter_gradient(
    x: Tensor, dy: Tensor, f: Tensor, up_x: int, up_y: int, down_x: int, down_y: int, pad_x: int, pad_y: int,
    correlate: bool, gain: float,
) -> Tensor:  # fmt: skip
    """The cotangent of f: the correlation of what it reads with dy, summed over planes."""
    out = (dy.shape[2], dy.shape[3])
    z = spread(x.to(f.dtype), (f.shape[0], f.shape[-1]), out, (up_y, up_x), (down_y, down_x), (pad_y, pad_x))
    z = z.reshape(1, -1, z.shape[2], z.shape[3])
    dy = dy.to(f.dtype).reshape(1, -1, dy.shape[2], dy.shape[3])
    df = conv2d(z, dy, dilation=(down_y, down_x))[0, 0] * gain if dy.shape[1] else f.new_zeros(outer(f).shape)
    if not correlate:
        df = df.flip((0, 1))
    return df if f.dim() == 2 else torch.mv(df, f) + torch.mv(df.T, f)
