"""Checks of the augmentation kernels: values, the transpose, derivatives and shards, through the public op."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from genfast import ops
from genfast.ops.diff_augment import AFFINE, LINEAR, POLICIES, TRANSPOSED, reference
from genfast.verify import _gpu
from genfast.verify._core import OFFSETS, Check, Context, Tensor

__all__ = ["CHECKS"]

ALL = "color,translation,cutout"
NAMES = (ALL, *(",".join(names) for n in range(3) for names in itertools.combinations(POLICIES, n)))
#: Odd extents, one pixel, one channel, many channels, a row and a column.
SHAPES = ((3, 3, 16, 11), (2, 1, 7, 5), (4, 2, 1, 1), (2, 5, 3, 37), (2, 3, 24, 2), (1, 17, 9, 130))


def _code(policy: str) -> int:
    return sum(POLICIES[name] for name in policy.split(",") if name)


def _exact(x: Tensor, policy: str, seed: int, offset: int, mode: int) -> tuple[Tensor, Tensor]:
    """(values, sums of the absolute terms or more) in float64 on the CPU."""
    x = x.detach().cpu().double()
    size = x.abs().amax((1, 2, 3), keepdim=True) if x.numel() else x
    return reference(x, torch.tensor(seed), offset, _code(policy), mode), (4 * size + 0.5).expand_as(x)


def _cases(c: Context) -> Iterator[tuple[torch.dtype, Tensor, str, int, int]]:
    for turn, (shape, policy) in enumerate(itertools.product(SHAPES[: 3 if c.size_class == "tiny" else 6], NAMES)):
        for dtype in c.dtypes_of(turn):
            yield dtype, c.normal(*shape, dtype=dtype), policy, c.new_seed(), OFFSETS[turn % len(OFFSETS)]


def _compare(c: Context, what: str, got: Tensor, x: Tensor, policy: str, seed: int, offset: int, mode: int) -> None:
    where = f"x {tuple(x.shape)} {x.dtype}, strides {x.stride()}, {policy!r}, seed={seed}, offset={offset}"
    c.compare(what, got, *_exact(x, policy, seed, offset, mode), where=where)
    c.ran(x.dtype, tuple(x.shape), policy or "identity", f"mode={mode}")


def forward(c: Context) -> None:
    """All policies, sizes, dtypes and offsets."""
    for _, x, policy, seed, offset in _cases(c):
        out = ops.diff_augment(x, policy, seed=seed, offset=offset)
        c.require(out.is_contiguous(), f"out has strides {out.stride()}")
        _compare(c, "out", out, x, policy, seed, offset, AFFINE)


def gradients(c: Context) -> None:
    """The gradient is the transpose."""
    for dtype, x, policy, seed, offset in _cases(c):
        dy = c.normal(*x.shape, dtype=dtype)
        (got,) = torch.autograd.grad(ops.diff_augment(x.requires_grad_(), policy, seed=seed, offset=offset), x, dy)
        _compare(c, "gradient", got, dy, policy, seed, offset, TRANSPOSED)


def second_order(c: Context) -> None:
    """Double backward: the derivative of the gradient by its cotangent is the linear part; that by x is zero."""
    for dtype, x, policy, seed, offset in itertools.islice(_cases(c), 0, None, 3):
        dy, v = (c.normal(*x.shape, dtype=dtype) for _ in range(2))
        out = ops.diff_augment(x.requires_grad_(), policy, seed=seed, offset=offset)
        (dx,) = torch.autograd.grad(out, x, dy.requires_grad_(), create_graph=True)
        got, to_x = torch.autograd.grad(dx, (dy, x), v, allow_unused=True)
        c.require(to_x is None or not bool(to_x.any()), "a second derivative by x is not zero")
        _compare(c, "second derivative", got, v, policy, seed, offset, LINEAR)


def jvp(c: Context) -> None:
    """Forward mode by torch.func.jvp and by dual numbers."""
    for dtype, x, policy, seed, offset in itertools.islice(_cases(c), 1, None, 3):
        tangent = c.normal(*x.shape, dtype=dtype)

        def call(x: Tensor) -> Tensor:
            return ops.diff_augment(x, policy, seed=seed, offset=offset)  # noqa: B023 - called in this turn

        _compare(c, "tangent", torch.func.jvp(call, (x,), (tangent,))[1], tangent, policy, seed, offset, LINEAR)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent))).tangent
        assert dual is not None
        _compare(c, "tangent of dual numbers", dual, tangent, policy, seed, offset, LINEAR)


def layouts(c: Context) -> None:
    """Channels last, slices, transposes, expanded and misaligned images."""
    for dtype in c.main_dtypes:
        for x in (
            c.normal(2, 4, 12, 10, dtype=dtype).contiguous(memory_format=torch.channels_last),
            c.normal(2, 6, 12, 20, dtype=dtype)[:, 1::2, 2:, ::2],
            c.normal(2, 3, 9, 12, dtype=dtype).mT,
            c.normal(1, 3, 1, 10, dtype=dtype).expand(4, 3, 8, 10),
            c.normal(2 * 3 * 63 + 1, dtype=dtype)[1:].view(2, 3, 7, 9),
        ):
            seed = c.new_seed()
            _compare(c, "out", ops.diff_augment(x, ALL, seed=seed), x, ALL, seed, 0, AFFINE)
            dy = torch.ops.genfast.diff_augment(x, torch.tensor(seed, device=c.device), 0, _code(ALL), TRANSPOSED)
            _compare(c, "transpose", dy, x, ALL, seed, 0, TRANSPOSED)


def tiles(c: Context) -> None:
    """Images of several tiles and of several sums."""
    dtype = c.main_dtypes[0]
    for shape in (
        (c.scaled(2, 1), 3, c.scaled(300, 10), c.scaled(400, 140)),
        (1, c.scaled(40, 20), c.scaled(90, 9), 33),
    ):
        x, seed = c.normal(*shape, dtype=dtype), c.new_seed()
        _compare(c, "out", ops.diff_augment(x, ALL, seed=seed), x, ALL, seed, 0, AFFINE)
        (dx,) = torch.autograd.grad(ops.diff_augment(x.requires_grad_(), ALL, seed=seed), x, x.detach())
        _compare(c, "gradient", dx, x, ALL, seed, 0, TRANSPOSED)


def shards(c: Context) -> None:
    """Images of a shard are those of the whole, bit for bit."""
    for dtype in c.main_dtypes:
        x, seed = c.normal(7, 3, 8, 9, dtype=dtype), c.new_seed()
        for first in (0, 2**40 + 3):
            whole = ops.diff_augment(x, ALL, seed=seed, offset=first)
            parts = [
                ops.diff_augment(x[at : at + 3], ALL, seed=torch.tensor(seed, device=c.device), offset=first + at)
                for at in (0, 3, 6)
            ]
            c.same_bits("shards", torch.cat(parts), whole, where=f"offset={first}")
            c.ran(dtype, tuple(x.shape), "shards")


def zero_sizes(c: Context) -> None:
    """No images, channels, rows or columns."""
    for dtype in c.dtypes:
        for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)):
            x = torch.zeros(shape, dtype=dtype, device=c.device, requires_grad=True)
            out = ops.diff_augment(x, ALL, seed=1)
            (dx,) = torch.autograd.grad(out.sum(), x)
            c.require(out.shape == shape and dx.shape == shape, f"{shape} gives {tuple(out.shape)}")
            c.ran(dtype, shape, "zero sizes")


def _call(first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    """The op and its gradient of matrices [H, W]."""
    seed = 3 if seed is None else seed
    x = first.detach()[None, None].requires_grad_()
    out = ops.diff_augment(x, ALL, seed=seed)
    return out, *torch.autograd.grad(out, x, second[None, None])


def _drawing(first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    """The same, with a seed of its own where none is given."""
    x = first.detach()[None, None]
    return ops.diff_augment(x.expand(8, -1, -1, -1), ALL, seed=seed), ops.diff_augment(second[None, None], seed=seed)


def determinism(c: Context) -> None:
    """Bit for bit the same on every run."""
    _gpu.repeats(c, (513, 130), (7, 20), _call)


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (130, 64), _call)


def graphs(c: Context) -> None:
    """CUDA-graph capture: replays follow new inputs and draw new parameters."""
    _gpu.captured(c, (33, 20), _drawing)


def large(c: Context) -> None:
    """More than 2^31 elements: the last images are as the formulas have them. Skipped where memory is short."""
    shape = (130, 4, 2048, 2049)
    count = shape[0] * shape[1] * shape[2] * shape[3]
    if not _gpu.has_memory(c, count * 4):
        return
    x, seed = _gpu.random_large(c, count).view(shape), c.new_seed()
    out = ops.diff_augment(x, ALL, seed=seed)
    for image in (0, shape[0] - 1):
        part = x[image : image + 1]
        c.compare("out of a large tensor", out[image : image + 1], *_exact(part, ALL, seed, image, AFFINE))
    c.ran(x.dtype, shape, "over 2^31 elements")


CHECKS = (
    Check("forward", forward),
    Check("gradients", gradients),
    Check("second order", second_order),
    Check("jvp", jvp),
    Check("layouts", layouts),
    Check("tiles", tiles),
    Check("shards", shards),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
    Check("graphs", graphs, gpu_only=True),
    Check("large", large, gpu_only=True),
)
