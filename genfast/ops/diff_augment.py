"""Differentiable augmentation of images; docs/kernels/diff_augment.md has the mathematics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from genfast import random
from genfast._checks import check_count, check_float_tensor, check_seed, shape_of, wide
from genfast._op import Backend, Formula, Op, differentiable
from genfast.launch import diff_augment as native
from genfast.ops import _noise

__all__ = ["diff_augment", "reference"]

Tensor = torch.Tensor

POLICIES = {"color": 1, "translation": 2, "cutout": 4}
AFFINE, LINEAR, TRANSPOSED = range(3)


# ---- reference ----


class _Draws(NamedTuple):
    """Parameters of each image, [batch, 1, 1, 1] in float64."""

    brightness: Tensor
    saturation: Tensor
    contrast: Tensor
    row_shift: Tensor
    column_shift: Tensor
    cut_row: Tensor
    cut_column: Tensor


def _below(u: Tensor, count: Any) -> Tensor:
    return (u * count).floor().to(torch.int64)


def _shift(u: Tensor, size: Any) -> Tensor:
    most = (size + 4) // 8
    return _below(u, 2 * most + 1) - most


def _cut(u: Tensor, size: Any) -> Tensor:
    side = (size + 1) // 2
    return _below(u, size + 1 - side % 2) - side // 2


def _draws(x: Tensor, seed: Tensor, offset: Any) -> _Draws:
    u = _noise.uniform(seed, 8 * x.shape[0], 8 * offset, 0).to(x.device, torch.float64)
    u = u.view(-1, 8, 1, 1, 1).unbind(1)
    height, width = x.shape[2], x.shape[3]
    return _Draws(
        u[0] - 0.5, 2.0 * u[1], u[2] + 0.5, _shift(u[3], height), _shift(u[4], width), _cut(u[5], height),
        _cut(u[6], width),
    )  # fmt: skip


def _colored(x: Tensor, draws: _Draws, brightness: bool) -> Tensor:
    kept = x.dtype
    k, s = draws.contrast.to(kept), draws.saturation.to(kept)
    out = k * s * x + k * (1 - s) * x.mean(1, keepdim=True) + (1 - k) * x.mean((1, 2, 3), keepdim=True)
    return out + draws.brightness.to(kept) if brightness else out


def _moved(x: Tensor, row_shift: Tensor, column_shift: Tensor) -> Tensor:
    height, width = x.shape[2], x.shape[3]
    row = torch.arange(height, device=x.device).view(1, 1, -1, 1) - row_shift
    column = torch.arange(width, device=x.device).view(1, 1, 1, -1) - column_shift
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    image = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
    return torch.where(inside, x[image, channel, row.clamp(0, height - 1), column.clamp(0, width - 1)], 0.0)


def _masked(x: Tensor, draws: _Draws) -> Tensor:
    height, width = x.shape[2], x.shape[3]
    row = torch.arange(height, device=x.device).view(1, 1, -1, 1) - draws.cut_row
    column = torch.arange(width, device=x.device).view(1, 1, 1, -1) - draws.cut_column
    cut = (row >= 0) & (row < (height + 1) // 2) & (column >= 0) & (column < (width + 1) // 2)
    return torch.where(cut, 0.0, x)


def reference(x: Tensor, seed: Tensor, offset: int, policy: int, mode: int) -> Tensor:
    """The formula in plain PyTorch; differentiable."""
    if x.numel() == 0:
        return x.clone()
    draws, out = _draws(x, seed, offset), x.to(wide(x.dtype))
    if mode != TRANSPOSED:
        if policy & POLICIES["color"]:
            out = _colored(out, draws, mode == AFFINE)
        if policy & POLICIES["translation"]:
            out = _moved(out, draws.row_shift, draws.column_shift)
        return (_masked(out, draws) if policy & POLICIES["cutout"] else out).to(x.dtype)
    if policy & POLICIES["cutout"]:
        out = _masked(out, draws)
    if policy & POLICIES["translation"]:
        out = _moved(out, -draws.row_shift, -draws.column_shift)
    return (_colored(out, draws, False) if policy & POLICIES["color"] else out).to(x.dtype)


def _run_reference(x, seed, offset, policy, mode):  # type: ignore[no-untyped-def]
    return reference(x, seed, offset, policy, mode).contiguous()


# ---- the raw op ----


def _fake(x, seed, offset, policy, mode):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check_raw(x, seed, offset, policy, mode):  # type: ignore[no-untyped-def]
    """What a direct call of the raw op must keep to; see ``Op``."""
    op = "genfast::diff_augment"
    _check_images(op, x)
    check_seed(op, seed)
    check_count(op, "offset", offset, 0, 2**58)
    check_count(op, "policy", policy, 0, 8)
    check_count(op, "mode", mode, 0, 3)


def _no_triton(x, seed, offset, policy, mode):  # type: ignore[no-untyped-def]
    return "float64 runs on the cpp and reference backends" if x.dtype == torch.float64 else None


_op = Op(
    "diff_augment(Tensor x, Tensor seed, SymInt offset, int policy, int mode) -> Tensor",
    {
        "triton": Backend(native.triton, _no_triton),
        "cpp": Backend(native.cpp),
        "reference": Backend(_run_reference),
    },
    _fake,
    check=_check_raw,
)


# ---- derivative rules: affine in x ----


class _Augment(Formula):
    @staticmethod
    def forward(x, seed, offset, policy, mode):  # type: ignore[no-untyped-def]
        return _op(x, seed, offset, policy, mode)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, seed, *ctx.options, ctx.mode = inputs
        return (seed,)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        dx = None
        if dy is not None:
            dx = _call(dy, ctx.saved_tensors[0], *ctx.options, LINEAR if ctx.mode == TRANSPOSED else TRANSPOSED)
        return dx, None, None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):  # type: ignore[no-untyped-def]
        mode = TRANSPOSED if ctx.mode == TRANSPOSED else LINEAR
        return _call(tangent, ctx.saved_tensors[0], *ctx.options, mode)


_call = differentiable(_Augment, reference)
_op.tie = _call


# ---- public ----


def _check_images(op: str, x: Any) -> None:
    check_float_tensor(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be images [batch, channels, height, width], got shape {shape_of(x)}")


def policy_code(op: str, policy: Any) -> int:
    """The parts of a policy as bits."""
    if not isinstance(policy, str):
        raise TypeError(f"{op}: policy must be a string, got {type(policy).__name__}")
    code = 0
    for part in filter(None, (name.strip() for name in policy.split(","))):
        if part not in POLICIES:
            raise ValueError(f"{op}: unknown policy {part!r}; choose some of {', '.join(POLICIES)}")
        code |= POLICIES[part]
    return code


def diff_augment(
    x: Tensor, policy: str = "color,translation,cutout", *, seed: int | Tensor | None = None, offset: int = 0
) -> Tensor:
    """Random color, translation and cutout of each image, differentiable: augments real and generated images alike.

    =============== ====================================================================================
    ``color``       brightness + u - 1/2; saturation times 2 u; contrast times u + 1/2; u uniform in [0, 1)
    ``translation`` whole pixels, up to an eighth of the size each way; zeros enter
    ``cutout``      a rectangle of half the size, its center anywhere in the image, becomes zero
    =============== ====================================================================================

    Parts apply in this order, whatever the order of their names. The parameters of an image depend on the seed and the
    image's index in the whole batch alone: the same on every device and shard.

    Args:
        x: images [batch, channels, height, width]; float32, float64, bfloat16 or float16.
        policy: names of parts with commas between; ``""`` is the identity.
        seed: an int, a 0-d int64 tensor, or None to draw one: a discriminator's step must draw anew for real and
            generated images, or give both one seed.
        offset: index of the first image in the whole batch, under data parallelism.

    Returns:
        Images like x, contiguous. Affine in x, with derivatives of every order in reverse and forward mode.

    Raises:
        TypeError: for something else than floating-point images, or a policy that is no string.
        ValueError: for other shapes or unknown parts.

    Source: Zhao et al., "Differentiable augmentation for data-efficient GAN training", NeurIPS 2020.

    Examples:
        >>> x = torch.rand(4, 3, 16, 16)
        >>> whole = diff_augment(x, seed=1)
        >>> torch.equal(diff_augment(x[2:], seed=1, offset=2), whole[2:])
        True
    """
    _check_images("diff_augment", x)
    code = policy_code("diff_augment", policy)
    offset = check_count("diff_augment", "offset", offset, 0, 2**58)
    return _call(x, random.as_seed(seed, x.device), offset, code, AFFINE)
