"""Convolution with weights modulated by styles; docs/kernels/modulated_conv2d.md has the mathematics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, pad

from genfast._checks import check_count, check_float_tensor, shape_of, wide

__all__ = ["modulated_conv2d"]

_OP = "modulated_conv2d"
_EPS = 1e-8


def _check(x: Any, weight: Any, styles: Any, noise: Any, up: Any, down: Any, padding: Any, resample: Any) -> None:
    for name, value in (("x", x), ("weight", weight), ("styles", styles)):
        check_float_tensor(_OP, name, value)
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != x.shape[1] or not weight[0:1].numel():
        raise ValueError(
            f"{_OP}: x must be [batch, channels, height, width] and weight [out, channels, rows, columns], got "
            f"{shape_of(x)} and {shape_of(weight)}"
        )
    if styles.shape != x.shape[:2]:
        raise ValueError(f"{_OP}: styles must be [batch, channels] = {tuple(x.shape[:2])}, got {shape_of(styles)}")
    for name, value in (("weight", weight), ("styles", styles), ("noise", noise), ("resample_filter", resample)):
        if value is not None and isinstance(value, Tensor) and value.device != x.device:
            raise ValueError(f"{_OP}: {name} is on {value.device}, x on {x.device}; move them to one device")
    up, down = check_count(_OP, "up", up, 1), check_count(_OP, "down", down, 1)
    check_count(_OP, "padding", padding, 0)
    if up > 1 and down > 1:
        raise ValueError(f"{_OP}: one of up and down must be 1, got {up} and {down}")
    if resample is not None:
        check_float_tensor(_OP, "resample_filter", resample)
        if resample.dim() not in (1, 2) or resample.numel() == 0:
            raise ValueError(
                f"{_OP}: resample_filter must be [taps] or [rows, columns] of at least one tap, got "
                f"{shape_of(resample)}"
            )
        if up == down == 1:
            raise ValueError(f"{_OP}: a resample_filter goes with up or down above 1")
    if noise is not None:
        check_float_tensor(_OP, "noise", noise)


def _scales(weight: Tensor, styles: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of two near the largest weight of each output, with the fan-in, and near the largest style of each image.

    Constants: what they divide is multiplied again, so that they change no derivative.
    """
    with torch.no_grad():
        largest = weight.abs().amax((1, 2, 3)) * math.sqrt(math.prod(weight.shape[1:]))
        return tuple(
            torch.exp2(torch.log2(torch.where((size > 0) & size.isfinite(), size, 1.0)).round().clamp(-60, 60))
            for size in (largest, styles.abs().amax(1))
        )  # type: ignore[return-value]


def _taps(resample: Tensor | None) -> tuple[int, int]:
    """Rows and columns."""
    if resample is None:
        return 1, 1
    return (resample.shape[0], resample.shape[-1])


def _resampled(x: Tensor, resample: Tensor | None, gain: float) -> Tensor:
    if resample is None:
        return x * gain if gain != 1 else x
    import genfast.ops

    ops: Any = genfast.ops  # where the op is made when this one is imported
    return ops.upfirdn2d(x, resample, gain=gain)


def _upsampled(x: Tensor, weight: Tensor, up: int, padding: int, resample: Tensor | None) -> Tensor:
    """Zeros inserted, convolved and then filtered, in the size that filtering first would leave."""
    rows, columns = weight.shape[2:]
    out = conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), stride=up)
    around = []
    for taps, size in reversed(tuple(zip(_taps(resample), (rows, columns), strict=True))):
        around += [padding + (taps + up - 1) // 2 - (size - 1), padding + (taps - up) // 2 - size + up]
    return _resampled(pad(out, around), resample, float(up * up))


def _downsampled(x: Tensor, weight: Tensor, down: int, padding: int, resample: Tensor | None) -> Tensor:
    around = []
    for taps in reversed(_taps(resample)):
        around += [padding + (taps - down + 1) // 2, padding + (taps - down) // 2]
    return conv2d(_resampled(pad(x, around), resample, 1.0), weight, stride=down)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    *,
    noise: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int = 0,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    flip_weight: bool = True,
) -> Tensor:
    """A convolution whose weights are scaled by each image's styles, and normalized (StyleGAN2).

    With s the styles of an image, w' = s_i w_oi modulates, and w'' = w' / sqrt(sum of w'^2 over i and taps + 1e-8)
    demodulates. The image is scaled by s and the output by the norm, so that all images share one convolution. In 16
    bits, weights and styles are divided by powers of two near their largest values, which demodulation takes out again:
    no product leaves the range for their sake.

    Made of PyTorch's convolution and ``upfirdn2d``: all derivatives exist that those have.

    Args:
        x: [batch, channels, height, width].
        weight: [out, channels, rows, columns]; converted to x's dtype.
        styles: [batch, channels].
        noise: added to the output, broadcast against it.
        up: factor by which zeros are inserted before the convolution, with gain up^2.
        down: factor by which the output is decimated.
        padding: zeros on each side of the image, after upsampling.
        resample_filter: taps [n] (separable) or [rows, columns] of the low-pass filter that goes with up or down; None:
            no filter. See ``upfirdn2d``.
        demodulate: divide by the norm.
        flip_weight: correlation, as ``torch.nn.functional.conv2d`` has it; False: convolution with flipped taps.

    Returns:
        [batch, out, up height + 2 padding - rows + 1, ...], in x's dtype; divided by down, rounded up.

    Raises:
        TypeError: for something else than floating-point tensors and integers.
        ValueError: for shapes that do not fit, up or down below 1 or both above it, a filter without either, tensors on
            several devices.

    Source: Karras et al., "Analyzing and improving the image quality of StyleGAN", CVPR 2020, eqs. 1 to 3.

    Examples:
        >>> x, weight, styles = torch.randn(2, 4, 8, 8), torch.randn(5, 4, 3, 3), torch.rand(2, 4) + 0.5
        >>> modulated_conv2d(x, weight, styles, padding=1).shape
        torch.Size([2, 5, 8, 8])
        >>> scaled = modulated_conv2d(x, 100 * weight, styles / 7, padding=1)  # demodulation takes scales out
        >>> torch.allclose(scaled, modulated_conv2d(x, weight, styles, padding=1), atol=1e-5)
        True
    """
    _check(x, weight, styles, noise, up, down, padding, resample_filter)
    kept, dtype = wide(x.dtype), x.dtype
    weight, styles = weight.to(kept), styles.to(kept)
    eps: Any = _EPS
    if demodulate and dtype in (torch.float16, torch.bfloat16):
        by_out, by_image = _scales(weight, styles)
        weight, styles = weight / by_out.view(-1, 1, 1, 1), styles / by_image.unsqueeze(1)
        eps = _EPS / (by_out * by_image.unsqueeze(1)).square()
    factors = None
    if demodulate:
        norms = styles.square() @ weight.square().sum((2, 3)).T
        factors = (norms + eps).rsqrt()
    taps = weight.to(dtype)
    taps = taps if flip_weight else taps.flip(2, 3)
    scaled = x * styles.to(dtype)[:, :, None, None]
    if up > 1:
        out = _upsampled(scaled, taps, up, padding, resample_filter)
    elif down > 1:
        out = _downsampled(scaled, taps, down, padding, resample_filter)
    else:
        out = conv2d(scaled, taps, padding=padding)
    if factors is not None:
        out = out * factors.to(out.dtype)[:, :, None, None]
    return out if noise is None else out + noise.to(out.dtype)
