"""bias_act in plain PyTorch: activations and their derivatives, the memory order of a tensor, and packed signs."""

from __future__ import annotations

import math

import torch

from genfast._checks import wide

__all__ = [
    "ACTIVATIONS", "PIECEWISE", "SELU", "bits_shape", "derivative", "dims_of", "geometry", "in_order", "like_order",
    "memory_order", "out_of_order", "over_channels", "pack", "planes_of", "reference", "shifted", "slope",
    "to_channels", "unpack",
]  # fmt: skip

Tensor = torch.Tensor

#: name: (gain, alpha) where the call names none.
ACTIVATIONS = {
    "linear": (1.0, 0.0),
    "relu": (math.sqrt(2.0), 0.0),
    "lrelu": (math.sqrt(2.0), 0.2),
    "tanh": (1.0, 0.0),
    "sigmoid": (1.0, 0.0),
    "elu": (1.0, 1.0),
    "selu": (1.0, 0.0),
    "softplus": (1.0, 0.0),
    "swish": (math.sqrt(2.0), 0.0),
    "gelu": (1.0, 0.0),
}
PIECEWISE = frozenset(("linear", "relu", "lrelu"))
#: (scale, alpha) of selu, Klambauer et al., 2017.
SELU = (1.0507009873554804934193349852946, 1.6732632423543772848170429916717)
SHORTEST = 32  # kShortest of csrc/gan/bias_act.h


# ---- activations; a derivative counts the left side at 0 ----


def _logistic(z: Tensor, order: int) -> Tensor:
    """The ``order``-th derivative of 1 / (1 + e^-z)."""
    p = torch.sigmoid(z)
    if order == 0:
        return p
    rest = torch.sigmoid(-z)
    slope = p * rest
    if order == 1:
        return slope
    return slope * (rest - p) if order == 2 else slope * ((rest - p) ** 2 - 2.0 * slope)


def _tanh(z: Tensor, order: int) -> Tensor:
    t = torch.tanh(z)
    if order == 0:
        return t
    slope = 4.0 * _logistic(2.0 * z, 1)
    if order == 1:
        return slope
    return -2.0 * t * slope if order == 2 else slope * (4.0 * t * t - 2.0 * slope)


def _elu(z: Tensor, order: int, alpha: float) -> Tensor:
    low = z.clamp(max=0.0)
    if order == 0:
        return torch.where(z > 0, z, alpha * torch.expm1(low))
    return torch.where(z > 0, 1.0 if order == 1 else 0.0, alpha * torch.exp(low))


def _swish(z: Tensor, order: int) -> Tensor:
    z = z.clamp(min=-800.0) if order == 0 else z.clamp(-800.0, 800.0)  # zero times infinity
    if order == 0:
        return z * _logistic(z, 0)
    return order * _logistic(z, order - 1) + z * _logistic(z, order)


def _gelu(z: Tensor, order: int) -> Tensor:
    near = z.clamp(-40.0, 40.0)
    if order <= 1:
        cdf = 0.5 * torch.special.erfc(-math.sqrt(0.5) * near)
        if order == 0:
            return z.clamp(min=-40.0) * cdf
    density = torch.exp(-0.5 * near * near) / math.sqrt(2.0 * math.pi)
    if order == 1:
        return cdf + near * density
    return density * (2.0 - near * near) if order == 2 else density * near * (near * near - 4.0)


def derivative(z: Tensor, act: str, alpha: float, order: int) -> Tensor:
    """The ``order``-th derivative of the activation, 0 to 3, in differentiable torch operations."""
    if act in PIECEWISE:
        if order > 1:
            return torch.zeros_like(z)
        below = 1.0 if act == "linear" else alpha if act == "lrelu" else 0.0
        if order == 1:
            return torch.where(z > 0, 1.0, torch.full_like(z, below))
        return z if act == "linear" else torch.relu(z) if act == "relu" else torch.where(z > 0, z, below * z)
    if act == "tanh":
        return _tanh(z, order)
    if act == "sigmoid":
        return _logistic(z, order)
    if act == "elu":
        return _elu(z, order, alpha)
    if act == "selu":
        return SELU[0] * _elu(z, order, SELU[1])
    if act == "softplus":
        return torch.nn.functional.softplus(z, threshold=40.0) if order == 0 else _logistic(z, order - 1)
    return _swish(z, order) if act == "swish" else _gelu(z, order)


def over_channels(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """[C] as a view that broadcasts to x, in the dtype of the arithmetic."""
    shape = [1] * x.dim()
    shape[dim] = -1
    return values.to(wide(x.dtype)).reshape(shape)


def to_channels(x: Tensor, dim: int) -> Tensor:
    """The transpose of ``over_channels``: sums to [C], in the dtype of the arithmetic."""
    return x.sum([i for i in range(x.dim()) if i != dim], dtype=wide(x.dtype)) if x.dim() > 1 else x.to(wide(x.dtype))


def shifted(x: Tensor, b: Tensor | None, dim: int) -> Tensor:
    z = x.to(wide(x.dtype))
    return z if b is None else z + over_channels(b, x, dim)


def slope(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None, order: int
) -> Tensor:
    """The ``order``-th derivative of the whole by x, in the dtype of the arithmetic; differentiable."""
    z = shifted(x, b, dim)
    found = gain * derivative(z, act, alpha, order)
    if clamp is None:
        return found
    inside = (gain * derivative(z.detach(), act, alpha, 0)).abs() <= clamp
    return torch.where(inside, found, 0.0)


def reference(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> Tensor:
    """The formula in plain PyTorch; differentiable."""
    y = gain * derivative(shifted(x, b, dim), act, alpha, 0)
    return (y if clamp is None else y.clamp(-clamp, clamp)).to(x.dtype)


# ---- memory ----
# An order is the dimensions from the outermost on, as "0,2,3,1" (torch.func would take a tuple apart); "" is that of a
# contiguous tensor.


def dims_of(order: str) -> tuple[int, ...]:
    return tuple(map(int, order.split(","))) if order else ()


def memory_order(x: Tensor) -> str:
    """The order of an output like x."""
    if x.is_contiguous():
        return ""
    if torch.compiler.is_compiling():  # strides may be symbols
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return "0,2,3,1"
        return "0,2,3,4,1" if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) else ""
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda i: (-strides[i], i))
    return "" if order == list(range(x.dim())) or 0 in strides else ",".join(map(str, order))


def in_order(x: Tensor, order: str) -> Tensor:
    """x dense in memory order, as a view permuted to it; copied only where it is not so already."""
    return (x.permute(dims_of(order)) if order else x).contiguous()


def out_of_order(x: Tensor, order: str) -> Tensor:
    """Undoes the permutation of ``in_order``."""
    if not order:
        return x
    dims = dims_of(order)
    return x.permute(sorted(range(len(dims)), key=dims.__getitem__))


def like_order(x: Tensor, order: str) -> Tensor:
    """An empty tensor of x's shape, dense in memory order."""
    shape = [x.shape[i] for i in dims_of(order)] if order else x.shape
    return out_of_order(x.new_empty(shape), order)


def geometry(shape: torch.Size, order: str, dim: int) -> tuple[int, int, int]:
    """(outer, channels, inner) of a dense tensor in memory order."""
    if not order:
        return math.prod(shape[:dim]), shape[dim] if shape else 1, math.prod(shape[dim + 1 :])
    dims = dims_of(order)
    at = dims.index(dim)
    return math.prod(shape[i] for i in dims[:at]), shape[dim], math.prod(shape[i] for i in dims[at + 1 :])


# ---- bits of a piecewise linear activation; the layout is that of csrc/gan/bias_act.h ----


def planes_of(act: str, clamp: float | None) -> int:
    """How many bits an element the gradient needs."""
    if act == "lrelu":
        return 1 if clamp is None else 2
    return 0 if act == "linear" and clamp is None else 1


def _line(outer: int, channels: int, inner: int) -> int:
    """Elements a line of bits."""
    return inner if channels != 1 and inner >= SHORTEST else outer * channels * inner


def bits_shape(outer: int, channels: int, inner: int, planes: int) -> tuple[int, int, int]:
    """(planes, lines, bytes a line)."""
    line = _line(outer, channels, inner)
    if isinstance(line, int) and line == 0:
        return planes, 0, 0
    return planes, outer * channels * inner // line, (line + 15) // 16 * 2


def pack(masks: list[Tensor], outer: int, channels: int, inner: int) -> Tensor:
    """Bits of dense masks in memory order."""
    shape = bits_shape(outer, channels, inner, len(masks))
    if not masks[0].numel():
        return masks[0].new_zeros(shape, dtype=torch.uint8)
    lines = torch.stack([mask.reshape(shape[1], -1) for mask in masks])
    lines = torch.nn.functional.pad(lines.to(torch.uint8), (0, shape[2] * 8 - lines.shape[-1]))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=lines.device)
    return (lines.unflatten(-1, (shape[2], 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, outer: int, channels: int, inner: int) -> list[Tensor]:
    """The masks of ``pack``, flat."""
    line = _line(outer, channels, inner)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    found = (bits.unsqueeze(-1) >> places & 1).flatten(-2)[..., :line] != 0
    return [plane.flatten() for plane in found]
