"""Upsampling, filtering and downsampling of images; docs/kernels/upfirdn2d.md has the mathematics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from genfast._checks import check_count, check_float_tensor, shape_of, wide
from genfast._op import Backend, Formula, Op, differentiable, transformed
from genfast.launch import upfirdn2d as native
from genfast.ops._upfirdn2d_reference import filter_gradient, outer, reference

__all__ = ["downsample2d", "reference", "setup_filter", "upfirdn2d", "upsample2d"]

Tensor = torch.Tensor

_FACTORS = 2**16  # bound of up and down
_SIZES = 2**40  # bound of paddings


def _run_reference(x, f, out_h, out_w, *options):  # type: ignore[no-untyped-def]
    out = native.empty_out(x, out_h, out_w)
    return out.copy_(reference(x, f, out_h, out_w, *options)) if out.numel() else out


# ---- the raw op ----


def _fake(x, f, out_h, out_w, *options):  # type: ignore[no-untyped-def]
    return native.empty_out(x, out_h, out_w)


def _check_raw(x, f, out_h, out_w, up_x, up_y, down_x, down_y, pad_x, pad_y, correlate, gain):  # type: ignore[no-untyped-def]
    """What a direct call of the raw op must keep to; see ``Op``."""
    op = "genfast::upfirdn2d"
    _check_image(op, x)
    _check_filter(op, f, x)
    if f.dtype != wide(x.dtype):
        raise TypeError(f"{op}: f must be {wide(x.dtype)} for x of {x.dtype}, got {f.dtype}")
    for name, value in (("out_h", out_h), ("out_w", out_w)):
        check_count(op, name, value, 0, _SIZES)
    for name, value in (("up_x", up_x), ("up_y", up_y), ("down_x", down_x), ("down_y", down_y)):
        check_count(op, name, value, 1, _FACTORS)
    for name, value in (("pad_x", pad_x), ("pad_y", pad_y)):
        check_count(op, name, value, -_SIZES, _SIZES)


def _check_image(op: str, x: Any) -> None:
    check_float_tensor(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be [N, C, H, W], got shape {shape_of(x)}")


def _check_filter(op: str, f: Any, x: Tensor, name: str = "f") -> None:
    check_float_tensor(op, name, f)
    if f.dim() not in (1, 2) or f.numel() == 0:
        raise ValueError(f"{op}: {name} must be [taps] or [taps_y, taps_x] with at least one tap, got {shape_of(f)}")
    if f.device != x.device:
        raise ValueError(f"{op}: {name} is on {f.device}, x on {x.device}; move them to one device")


def _no_triton(x, f, *rest):  # type: ignore[no-untyped-def]
    return "float64 runs on the cpp and reference backends" if x.dtype == torch.float64 else None


_op = Op(
    "upfirdn2d(Tensor x, Tensor f, SymInt out_h, SymInt out_w, int up_x, int up_y, int down_x, int down_y, "
    "SymInt pad_x, SymInt pad_y, bool correlate, float gain) -> Tensor",
    {
        "triton": Backend(native.triton, _no_triton),
        "cpp": Backend(native.cpp),
        "reference": Backend(_run_reference),
    },
    _fake,
    check=_check_raw,
)


# ---- derivative rules: linear in x, and linear (quadratic where separable) in the filter ----


def _run(x, f, *options):  # type: ignore[no-untyped-def]
    """The differentiable call; x is kept only where a derivative by the filter may be asked for."""
    return _call(x, f, *options, f.requires_grad or transformed())


class _Upfirdn2d(Formula):
    @staticmethod
    def forward(x, f, out_h, out_w, up_x, up_y, down_x, down_y, pad_x, pad_y, correlate, gain, keep):  # type: ignore[no-untyped-def]
        return _op(x, f, out_h, out_w, up_x, up_y, down_x, down_y, pad_x, pad_y, correlate, gain)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, f, *ctx.options, keep = inputs
        ctx.size = x.shape[2], x.shape[3]
        return x if keep else None, f

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        dx = df = None
        if dy is not None:
            x, f = ctx.saved_tensors
            _, _, up_x, up_y, down_x, down_y, pad_x, pad_y, correlate, gain = ctx.options
            if ctx.needs_input_grad[0]:
                turned = f.shape[-1] - 1 - pad_x, f.shape[0] - 1 - pad_y
                dx = _run(dy, f, *ctx.size, down_x, down_y, up_x, up_y, *turned, not correlate, gain)
            if ctx.needs_input_grad[1]:
                df = filter_gradient(x, dy, f, *ctx.options[2:])
        return dx, df, *(None,) * 11

    @staticmethod
    def jvp(ctx, x_tangent, f_tangent, *_):  # type: ignore[no-untyped-def]
        x, f = ctx.saved_tensors
        out = None if x_tangent is None else _run(x_tangent, f, *ctx.options)
        if f_tangent is None:
            return out
        if f.dim() == 1:
            f_tangent = f_tangent.unsqueeze(1) * f.unsqueeze(0) + f.unsqueeze(1) * f_tangent.unsqueeze(0)
        of_filter = _run(x, f_tangent, *ctx.options)
        return of_filter if out is None else out + of_filter


def _composite(x, f, *options):  # type: ignore[no-untyped-def]
    return reference(x, f, *options[:-1])


_call = differentiable(_Upfirdn2d, _composite)
_op.tie = _run  # gradients through torch.ops.genfast.upfirdn2d itself


# ---- arguments ----


def _pair(op: str, name: str, value: Any) -> tuple[int, int]:
    """(x, y) of a factor."""
    if type(value) is int and 1 <= value < _FACTORS:
        return value, value
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{op}: {name} must be an int or a pair (x, y), got {tuple(value)}")
        x, y = (check_count(op, name, item, 1, _FACTORS) for item in value)
        return x, y
    value = check_count(op, name, value, 1, _FACTORS)
    return value, value


def _padding(op: str, value: Any) -> tuple[int, int, int, int]:
    """(left, right, top, bottom)."""
    if not isinstance(value, (tuple, list)):
        value = check_count(op, "padding", value, -_SIZES, _SIZES)
        return value, value, value, value
    if len(value) not in (2, 4):
        raise ValueError(
            f"{op}: padding must be an int, (x, y) or (left, right, top, bottom), got {len(value)} numbers: "
            f"{tuple(value)}"
        )
    value = [check_count(op, "padding", item, -_SIZES, _SIZES) for item in value]
    left, right, top, bottom = value if len(value) == 4 else (value[0], value[0], value[1], value[1])
    return left, right, top, bottom


def _number(op: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return float(value)


def _out_size(op: str, axis: str, size: Any, up: int, down: int, before: int, after: int, taps: int) -> Any:
    padded = size * up + before + after
    if padded < taps:
        raise ValueError(
            f"{op}: a filter of {taps} taps is larger than the {axis} {size}, times {up}, plus padding {before} and "
            f"{after}: {padded}; the output would be smaller than 1"
        )
    return (padded - taps) // down + 1


def _filter_of(op: str, f: Any, x: Tensor, name: str = "f") -> Tensor:
    if f is None:
        return torch.ones(1, dtype=wide(x.dtype), device=x.device)
    _check_filter(op, f, x, name)
    return f if f.dtype == wide(x.dtype) else f.to(wide(x.dtype))


# ---- public ----


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    *,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Upsamples images by inserting zeros, pads them, filters them, and keeps every down-th pixel.

    Taps meet only pixels, never the inserted zeros; a separable filter runs in one pass over memory.

    Args:
        x: [N, C, H, W]; float32, float64, bfloat16 or float16. Any strides; read in place where rows are contiguous or
            the memory format is channels last with at least 8 channels. Sums are float32, float64 for float64.
        f: [taps], applied along both axes, or [taps_y, taps_x]; None: no filter. ``setup_filter`` makes one.
        up: factor, or (x, y); up - 1 zeros follow each pixel.
        down: factor, or (x, y).
        padding: zeros around the upsampled image, an int, (x, y) or (left, right, top, bottom); negative ones crop.
        flip_filter: correlate with f instead of convolving.
        gain: multiplies the output, once for both axes.

    Returns:
        [N, C, (H up_y + top + bottom - taps_y) // down_y + 1, likewise], of x's dtype, channels last where x is.
        Differentiable to every order, in reverse and forward mode, by x and by f.

    Raises:
        TypeError: for something else than floating-point tensors, integers and numbers.
        ValueError: for a filter larger than the padded image, factors below 1, other ranks, devices that differ.

    Source: Crochiere and Rabiner, "Multirate digital signal processing", 1983, section 3.3 (polyphase structures).

    Examples:
        >>> x = torch.arange(3.0).reshape(1, 1, 1, 3)
        >>> upfirdn2d(x, torch.tensor([[1.0, 1.0]]), up=(2, 1), padding=(1, 0, 0, 0))  # every pixel twice
        tensor([[[[0., 0., 1., 1., 2., 2.]]]])
        >>> upfirdn2d(x, torch.tensor([[0.5, 0.5]]), down=(2, 1), padding=(0, 1, 0, 0))  # means of pairs
        tensor([[[[0.5000, 1.0000]]]])
    """
    _check_image("upfirdn2d", x)
    return _upfirdn2d("upfirdn2d", x, _filter_of("upfirdn2d", f, x), up, down, padding, flip_filter, gain)


def _upfirdn2d(
    op: str, x: Tensor, f: Tensor, up: Any, down: Any, padding: Any, flip_filter: Any, gain: Any,
) -> Tensor:  # fmt: skip
    """As ``upfirdn2d`` of an x and a filter that were checked."""
    up_x, up_y = _pair(op, "up", up)
    down_x, down_y = _pair(op, "down", down)
    left, right, top, bottom = _padding(op, padding)
    gain = _number(op, "gain", gain)
    out_h = _out_size(op, "height", x.shape[2], up_y, down_y, top, bottom, f.shape[0])
    out_w = _out_size(op, "width", x.shape[3], up_x, down_x, left, right, f.shape[-1])
    return _run(x, f, out_h, out_w, up_x, up_y, down_x, down_y, left, top, bool(flip_filter), gain)


def _resampled(
    op: str, x: Tensor, f: Tensor | None, up: Any, down: Any, padding: Any, flip_filter: bool, gain: float
) -> Tensor:
    _check_image(op, x)
    f = _filter_of(op, f, x)
    up_x, up_y = _pair(op, "factor", up)
    down_x, down_y = _pair(op, "factor", down)
    found = []
    for taps, u, d in ((f.shape[-1], up_x, down_x), (f.shape[0], up_y, down_y)):
        # The sum is taps - 1 for upsampling and taps - d for downsampling; one of the factors is 1.
        found += [(taps + u - d) // 2, (taps - u - d + 1) // 2]
    padding = tuple(a + b for a, b in zip(found, _padding(op, padding), strict=True))
    return _upfirdn2d(op, x, f, (up_x, up_y), (down_x, down_y), padding, flip_filter, gain)


def upsample2d(
    x: Tensor,
    f: Tensor | None,
    *,
    factor: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Upsamples images: zeros inserted, then filtered, with gain factor_x factor_y; H, W become H factor_y, W factor_x.

    Args:
        x: [N, C, H, W].
        f: as of ``upfirdn2d``.
        factor: int or (x, y).
        padding: beyond what keeps the size, as of ``upfirdn2d``; negative ones crop the output.
        flip_filter: correlate instead of convolving.
        gain: on top of the factors'.

    Returns:
        [N, C, H factor_y, W factor_x], more or less by the padding. A symmetric filter with as many taps as suits the
        factor (taps - factor even) keeps the image centred. Differentiable as ``upfirdn2d``.

    Raises:
        TypeError: as ``upfirdn2d``.
        ValueError: as ``upfirdn2d``.

    Examples:
        >>> x = torch.tensor([[[[0.0, 4.0]]]])
        >>> upsample2d(x, setup_filter([1, 3, 3, 1]), factor=(2, 1))[0, 0]  # [1, 3, 3, 1] / 8 down the rows too
        tensor([[0.0000, 0.3750, 1.1250, 1.1250]])
    """
    up_x, up_y = _pair("upsample2d", "factor", factor)
    gain = _number("upsample2d", "gain", gain) * up_x * up_y
    return _resampled("upsample2d", x, f, (up_x, up_y), 1, padding, flip_filter, gain)


def downsample2d(
    x: Tensor,
    f: Tensor | None,
    *,
    factor: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Downsamples images: filtered, then every factor-th pixel; H, W become H // factor_y, W // factor_x.

    Args:
        x: [N, C, H, W].
        f: as of ``upfirdn2d``.
        factor: int or (x, y).
        padding: beyond what keeps the size, as of ``upfirdn2d``.
        flip_filter: correlate instead of convolving.
        gain: multiplies the output.

    Returns:
        [N, C, H // factor_y, W // factor_x], more or less by the padding. Differentiable as ``upfirdn2d``.

    Raises:
        TypeError: as ``upfirdn2d``.
        ValueError: as ``upfirdn2d``.

    Examples:
        >>> x = torch.arange(4.0).repeat(4, 1)[None, None]
        >>> downsample2d(x, setup_filter([1, 1]))
        tensor([[[[0.5000, 2.5000],
                  [0.5000, 2.5000]]]])
    """
    return _resampled("downsample2d", x, f, 1, factor, padding, flip_filter, gain)


def setup_filter(
    taps: Tensor | Sequence[Any] | float,
    *,
    normalize: bool = True,
    flip: bool = False,
    gain: float = 1.0,
    separable: bool | None = None,
) -> Tensor:
    """A filter for ``upfirdn2d``, from its taps.

    Args:
        taps: a number, [taps] or [taps_y, taps_x], a tensor or nested sequences.
        normalize: divide by the sum, so that constant images stay.
        flip: turn the filter by 180 degrees.
        gain: of the whole two-dimensional filter: one that stays [taps] is multiplied by its square root.
        separable: True or None: [taps] stays [taps] (one pass over memory; None takes 2-D taps too); False: 2-D.

    Returns:
        [taps] or [taps_y, taps_x], float32, or float64 where taps is a float64 tensor; on the device of a tensor, else
        on the default device.

    Raises:
        TypeError: for taps that are no numbers.
        ValueError: for other ranks, no taps, taps that sum to zero where they are normalized, a negative gain of a
            separable filter, and 2-D taps where separable is True.

    Examples:
        >>> setup_filter([1, 3, 3, 1])
        tensor([0.1250, 0.3750, 0.3750, 0.1250])
        >>> setup_filter([1, 1], separable=False)
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]])
    """
    try:
        given = taps if isinstance(taps, torch.Tensor) else torch.tensor(taps, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"setup_filter: taps must be numbers, got {taps!r}") from error
    if given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"setup_filter: taps must be real numbers, got {given.dtype}")
    keep = torch.float64 if isinstance(taps, torch.Tensor) and taps.dtype == torch.float64 else torch.float32
    f = given.to(torch.float64)
    f = f.reshape(1) if f.dim() == 0 else f
    if f.dim() > 2 or f.numel() == 0:
        raise ValueError(f"setup_filter: taps must be [taps] or [taps_y, taps_x], at least one, got {shape_of(f)}")
    gain = _number("setup_filter", "gain", gain)
    if f.dim() == 2 and separable:
        raise ValueError(f"setup_filter: a separable filter is [taps], got taps of shape {shape_of(f)}")
    if normalize:
        total = float(f.sum())
        if total == 0:
            raise ValueError("setup_filter: the taps sum to zero; pass normalize=False")
        f = f / total
    if f.dim() == 1 and separable is False:
        f = outer(f)
    if f.dim() == 1 and gain < 0:
        raise ValueError(f"setup_filter: a separable filter has no negative gain, got {gain}; pass separable=False")
    f = f * (math.sqrt(gain) if f.dim() == 1 else gain)
    device = taps.device if isinstance(taps, torch.Tensor) else torch.get_default_device()
    return (f.flip(tuple(range(f.dim()))) if flip else f).to(keep).to(device)
