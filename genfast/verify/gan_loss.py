"""Checks of the GAN loss kernels: values, gradients and forward mode of every kind and side."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.functional import logsigmoid

from genfast import ops
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor

__all__ = ["CHECKS"]

CASES = tuple(
    (kind, side)
    for kind in (
        "minimax", "nonsaturating", "hinge", "least_squares", "wasserstein", "relativistic", "relativistic_average",
    )
    for side in ("discriminator", "generator")
)  # fmt: skip
SIZES = ((1, 1), (2, 7), (64, 33), (1023, 1024), (1025, 5), (4099, 2048))


def _softplus(x: Tensor) -> Tensor:
    return -logsigmoid(-x)


def _terms(r: Tensor, f: Tensor, kind: str, side: str) -> list[Tensor]:
    """The terms whose means make the loss, in float64."""
    critic = side == "discriminator"
    if kind in ("minimax", "nonsaturating"):
        if critic:
            return [_softplus(-r), _softplus(f)]
        return [-_softplus(f) if kind == "minimax" else _softplus(-f)]
    if kind == "hinge":
        return [torch.relu(1 - r), torch.relu(1 + f)] if critic else [-f]
    if kind == "least_squares":
        return [(r - 1) ** 2 / 2, f**2 / 2] if critic else [(f - 1) ** 2 / 2]
    if kind == "wasserstein":
        return [-r, f] if critic else [-f]
    if not critic:
        r, f = f, r
    if kind == "relativistic":
        return [_softplus(f - r)]
    return [_softplus(f.mean() - r), _softplus(f - r.mean())]


def _exact(r: Tensor, f: Tensor, kind: str, side: str) -> tuple[Tensor, Tensor]:
    """(loss, mean of the absolute terms), of float64 logits on the CPU; a mean of logits counts by its terms."""
    terms = _terms(r, f, kind, side)
    loss = sum((term.mean() for term in terms), torch.zeros((), dtype=torch.float64))
    scale = sum(float(term.detach().abs().mean()) for term in terms)
    if kind == "relativistic_average":
        scale += float(r.detach().abs().mean() + f.detach().abs().mean())
    return loss, torch.tensor(scale, dtype=torch.float64)


def _cpu(x: Tensor) -> Tensor:
    return x.detach().cpu().double().requires_grad_()


def _inputs(c: Context, kind: str, size: tuple[int, int], dtype: torch.dtype, scale: float = 3.0) -> list[Tensor]:
    reals, fakes = size
    reals = fakes if kind == "relativistic" else reals
    return [c.normal(n, dtype=dtype, scale=scale).requires_grad_() for n in (reals, fakes)]


def _cases(c: Context) -> Iterator[tuple[int, str, str, torch.dtype, tuple[int, int]]]:
    sizes = SIZES[:3] if c.size_class == "tiny" else SIZES
    for turn, (kind, side) in enumerate(CASES):
        for index, size in enumerate(sizes):
            for dtype in c.dtypes_of(turn + index):
                yield turn, kind, side, dtype, size


def values(c: Context) -> None:
    """Every kind and side, no gradients asked for."""
    for _, kind, side, dtype, size in _cases(c):
        real, fake = (x.detach() for x in _inputs(c, kind, size, dtype))
        want, scale = _exact(_cpu(real), _cpu(fake), kind, side)
        c.compare("loss", ops.gan_loss(real, fake, kind, side), want, scale, where=f"{kind}, {side}, {size}, {dtype}")
        c.ran(dtype, size, kind, side)


def gradients(c: Context) -> None:
    """Gradients of both sides, and of one side alone."""
    for turn, kind, side, dtype, size in _cases(c):
        inputs = _inputs(c, kind, size, dtype)
        if turn % 3:
            inputs[turn % 3 - 1] = inputs[turn % 3 - 1].detach()
        leaves = [x for x in inputs if x.requires_grad]
        loss = ops.gan_loss(inputs[0], inputs[1], kind, side)
        doubles = [_cpu(x) for x in inputs]
        want, scale = _exact(doubles[0], doubles[1], kind, side)
        where = f"{kind}, {side}, {size}, {dtype}"
        c.compare("loss", loss, want, scale, where=where)
        if not loss.requires_grad:
            continue
        got = torch.autograd.grad(1.5 * loss, leaves, allow_unused=True)
        kept = [d for d, x in zip(doubles, inputs, strict=True) if x.requires_grad]
        exact = torch.autograd.grad(1.5 * want, kept, allow_unused=True)
        for left, right in zip(got, exact, strict=True):
            c.require((left is None) == (right is None), f"a gradient is missing; {where}")
            if left is not None and right is not None:
                c.compare_norm("gradient", left, right, where=where)
        c.ran(dtype, size, "gradients")


def extremes(c: Context) -> None:
    """Logits of +-10,000 keep finite losses and gradients; NaN passes; an infinite logit saturates the hinge."""
    for dtype in c.dtypes:
        for kind, side in CASES:
            for size in (1e4, -1e4):
                real = torch.tensor([size, -size, 0.5, 0.0], device=c.device).to(dtype).requires_grad_()
                fake = torch.tensor([-size, size, size, 1.0], device=c.device).to(dtype).requires_grad_()
                want, scale = _exact(_cpu(real), _cpu(fake), kind, side)
                loss = ops.gan_loss(real, fake, kind, side)
                c.compare("loss of large logits", loss, want, scale + 1, where=f"{kind}, {side}, {dtype}")
                for gradient in torch.autograd.grad(loss, (real, fake), allow_unused=True):
                    if gradient is not None:
                        c.require(bool(torch.isfinite(gradient).all()), f"gradient not finite; {kind}, {side}, {size}")
                bad = fake.detach().clone()
                bad[1] = math.nan
                c.require(bool(ops.gan_loss(real, bad, kind, side).isnan()), f"NaN is lost; {kind}, {side}, {dtype}")
        c.ran(dtype, (4, 4), "extremes")


def layouts(c: Context) -> None:
    """Transposed, strided, expanded, misaligned and 0-d logits."""
    for dtype in c.main_dtypes:
        base = c.normal(12, 10, dtype=dtype)
        inputs = (base.T, base[::2, 1::3], base[:, :1].expand(12, 5), base.view(-1)[1:], base[0, 0])
        for fake in inputs:
            real = fake.flip(0) if fake.dim() else fake
            for kind, side in CASES:
                want, scale = _exact(_cpu(real), _cpu(fake), kind, side)
                got = ops.gan_loss(real, fake, kind, side)
                c.compare("loss", got, want, scale, where=f"{kind}, {side}, strides {fake.stride()}")
        c.ran(dtype, (12, 10), "layouts")


def second_order(c: Context) -> None:
    """Double backward."""
    for kind, side in CASES:
        for dtype in c.main_dtypes:
            inputs = _inputs(c, kind, (7, 5), dtype)
            doubles = [_cpu(x) for x in inputs]

            def second(leaves: list[Tensor], loss: Tensor) -> Tensor | None:
                (first,) = torch.autograd.grad(loss, leaves[1:], create_graph=True)
                if not first.requires_grad:
                    return None
                return torch.autograd.grad((first * first.detach().cos()).sum(), leaves[1:])[0]

            got = second(inputs, ops.gan_loss(inputs[0], inputs[1], kind, side))
            want = second(doubles, _exact(doubles[0], doubles[1], kind, side)[0])
            if got is not None and want is not None:
                c.compare_norm("second derivative", got, want, where=f"{kind}, {side}, {dtype}")
            else:
                c.require(want is None or not bool(want.any()), f"no second derivative of {kind}, {side}")
            c.ran(dtype, (7, 5), "double backward")


def jvp(c: Context) -> None:
    """Forward mode by torch.func.jvp and by dual numbers."""
    for kind, side in CASES:
        for dtype in c.main_dtypes:
            real, fake = (x.detach() for x in _inputs(c, kind, (9, 6), dtype))
            changes = tuple(c.normal(*x.shape, dtype=dtype) for x in (real, fake))

            def call(r: Tensor, f: Tensor) -> Tensor:
                return ops.gan_loss(r, f, kind, side)  # noqa: B023 - called in this turn

            got = torch.func.jvp(call, (real, fake), changes)[1]
            doubles = [_cpu(real), _cpu(fake)]
            first = torch.autograd.grad(_exact(doubles[0], doubles[1], kind, side)[0], doubles, allow_unused=True)
            parts = [(g * x.cpu().double()) for g, x in zip(first, changes, strict=True) if g is not None]
            total = torch.stack([part.sum() for part in parts]).sum()
            scale = torch.stack([part.abs().sum() for part in parts]).sum()
            c.compare("tangent", got, total, scale, bound=1e-12 if dtype == torch.float64 else 1e-5)
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(call(real, forward_ad.make_dual(fake, changes[1]))).tangent
            c.compare("tangent of dual numbers", dual, parts[-1].sum(), scale,
                      bound=1e-12 if dtype == torch.float64 else 1e-5)  # fmt: skip
            c.ran(dtype, (9, 6), "jvp")


def _call(first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    """Losses and gradients; nothing is drawn."""
    real, fake = first.detach().requires_grad_(), second.detach().requires_grad_()
    out: list[Tensor] = []
    for kind in ("nonsaturating", "relativistic", "relativistic_average"):
        loss = ops.gan_loss(real, fake, kind, "discriminator")
        out += [loss, *torch.autograd.grad(loss, (real, fake))]
    return tuple(out)


def determinism(c: Context) -> None:
    """Bit for bit the same on every run."""
    _gpu.repeats(c, (513, 7), (7, 20), _call)


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (130, 64), _call)


def graphs(c: Context) -> None:
    """CUDA-graph capture: replays follow new logits."""
    for dtype in c.dtypes:
        real, fake = c.normal(40, dtype=dtype), c.normal(40, dtype=dtype)
        side = torch.cuda.Stream(c.device)
        side.wait_stream(torch.cuda.current_stream(c.device))
        with torch.cuda.stream(side):
            ops.gan_loss(real, fake, "relativistic_average", "generator")
        torch.cuda.current_stream(c.device).wait_stream(side)
        torch.cuda.synchronize(c.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.gan_loss(real, fake, "relativistic_average", "generator")
        for turn in range(3):
            fake.copy_(c.normal(40, dtype=dtype))
            graph.replay()
            torch.cuda.synchronize(c.device)
            c.same_bits(f"replay {turn}", out, ops.gan_loss(real, fake, "relativistic_average", "generator"))
        c.ran(dtype, (40,), "CUDA graphs")


CHECKS = (
    Check("values", values),
    Check("gradients", gradients),
    Check("extremes", extremes),
    Check("layouts", layouts),
    Check("second order", second_order),
    Check("jvp", jvp),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
    Check("graphs", graphs, gpu_only=True),
)
