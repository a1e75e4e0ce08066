"""Checks of the log-likelihood kernels, through the public op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from genfast import ops
from genfast.ops._log_likelihood_reference import LIKELIHOODS, reference, reference_gradients
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor

__all__ = ["CHECKS"]

#: [B, C, size]: below, at and beyond a tile; one row and many.
SHAPES = ((1, 1, 1), (3, 3, 5), (2, 1, 130), (5, 3, 37), (70, 1, 3), (2, 3, 1050))
COUNTS = ("negative_binomial", "zero_inflated_negative_binomial")
PLANES = {"gaussian": 2, "discretized_logistic": 2, "negative_binomial": 2, "zero_inflated_negative_binomial": 3}


def _inputs(
    c: Context,
    likelihood: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    samples: int | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(decoder_out, x)."""
    batch, channels, size = shape
    uniform = torch.rand(shape, generator=c.generator)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    out: tuple[int, ...]
    if likelihood == "categorical":
        x, out = (uniform * 5).long().clamp(max=4), (batch, 5, channels, size)
    elif likelihood.startswith("discretized"):
        x = (uniform * 380 - 60).clamp(0, 255).to(torch.uint8)
        mixture = 6 if channels == 1 else 20
        out = (batch, mixture if likelihood.endswith("mixture") else 2 * channels, size)
    else:
        x = (6 * uniform).floor().to(kept) if likelihood in COUNTS else uniform.to(kept)
        out = (batch, PLANES.get(likelihood, 1) * channels, size)
    lead = () if samples is None else (samples,)
    return c.normal(*lead, *out, dtype=dtype), x.to(c.device)


def _exact(out: Tensor, x: Tensor, likelihood: str, shared: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(values, gradients) in float64 on the CPU, in canonical shapes."""
    out, x = out.detach().cpu().double(), x.cpu()
    mixture = likelihood == "discretized_logistic_mixture"
    size = x[0, 0].numel() if mixture else x[0].numel()
    x = x.reshape(len(x), x.shape[1] if mixture else 1, size)
    x = x.double() if x.dtype.is_floating_point else x
    lead = out.dim() - (4 if likelihood == "categorical" else 3)
    rows = len(x) * (out.shape[0] if lead else 1)
    params = out.reshape(rows, out.numel() // (rows * size), size)
    return reference(params, shared, x, likelihood), reference_gradients(params, shared, x, likelihood).params


def _cases(c: Context) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    shapes = SHAPES[:4] if c.size_class == "tiny" else SHAPES
    for turn, shape in enumerate(shapes):
        for likelihood in LIKELIHOODS:
            if likelihood == "discretized_logistic_mixture" and shape[1] not in (1, 3):
                continue
            for dtype in c.dtypes_of(turn):
                yield likelihood, shape, dtype


def _where(likelihood: str, out: Tensor) -> str:
    return f"{likelihood}, decoder_out {tuple(out.shape)} {out.dtype}"


def values(c: Context) -> None:
    """All likelihoods, shapes and dtypes, without a gradient."""
    for likelihood, shape, dtype in _cases(c):
        out, x = _inputs(c, likelihood, shape, dtype)
        got = ops.log_likelihood(out, x, likelihood=likelihood)
        c.compare_norm("log p", got, _exact(out, x, likelihood)[0], where=_where(likelihood, out))
        c.ran(dtype, shape, likelihood)


def gradients(c: Context) -> None:
    """The gradient that the forward pass writes, and the value beside it."""
    for likelihood, shape, dtype in _cases(c):
        out, x = _inputs(c, likelihood, shape, dtype)
        leaf = out.requires_grad_()
        got = ops.log_likelihood(leaf, x, likelihood=likelihood)
        (slope,) = torch.autograd.grad(got.sum(), leaf)
        want, exact = _exact(out, x, likelihood)
        c.compare_norm("log p beside a gradient", got, want, where=_where(likelihood, out))
        c.compare_norm("gradient", slope, exact.reshape(slope.shape), where=_where(likelihood, out))
        c.ran(dtype, shape, likelihood, "gradients")


def cotangents(c: Context) -> None:
    """Rows scaled by the cotangent, in place and not; none of it where that is as expected; zero makes zero."""
    for dtype in c.dtypes:
        for shape in ((5, 1, 37), (3, 1, 1050)):
            out, x = _inputs(c, "bernoulli", shape, dtype)
            leaf = out.requires_grad_()
            exact = _exact(out, x, "bernoulli")[1].reshape(shape)
            weights = torch.tensor([1.0, 0.0, -2.5, 0.125, 3.0], dtype=torch.float64)[: shape[0]]
            value = ops.log_likelihood(leaf, x)
            for keep in (True, False):
                (got,) = torch.autograd.grad(value, leaf, weights.to(value), retain_graph=keep)
                c.compare_norm("scaled gradient", got, exact * weights.view(-1, 1, 1), where=f"{dtype}, kept={keep}")
                c.require(bool((got[1] == 0).all()), "a zero cotangent gave no zero gradient")
            c.ran(dtype, shape, "cotangents")


def samples(c: Context) -> None:
    """K samples of one target, which is not repeated."""
    for turn, likelihood in enumerate(LIKELIHOODS):
        for dtype in c.dtypes_of(turn):
            out, x = _inputs(c, likelihood, (3, 3, 37), dtype, 4)
            leaf = out.requires_grad_()
            got = ops.log_likelihood(leaf, x, likelihood=likelihood)
            want, exact = _exact(out, x, likelihood)
            c.compare_norm("log p of samples", got, want.reshape(4, 3), where=_where(likelihood, out))
            (slope,) = torch.autograd.grad(got.sum(), leaf)
            c.compare_norm("gradient of samples", slope, exact.reshape(slope.shape), where=_where(likelihood, out))
            c.ran(dtype, tuple(out.shape), likelihood, "samples")


def shared(c: Context) -> None:
    """A log variance that rows share, of one value, one a position, and one a row; a fixed one; a shared dispersion."""
    for dtype in c.dtypes:
        out, x = _inputs(c, "bernoulli", (4, 1, 37), dtype)
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        for shape in ((), (37,), (4, 1, 1)):
            logvar = c.normal(*shape, dtype=kept).requires_grad_()
            got = ops.log_likelihood(out, x, likelihood="gaussian", logvar=logvar)
            exact = logvar.detach().cpu().double().requires_grad_()
            z = (x.cpu().double() - out.cpu().double()) * torch.exp(-0.5 * exact)
            want = -0.5 * (z * z + exact + 1.8378770664093453).sum((1, 2))
            c.compare_norm("log p by a shared variance", got, want.detach(), where=f"logvar {shape}")
            (slope,) = torch.autograd.grad(got.sum(), logvar)
            (right,) = torch.autograd.grad(want.sum(), exact)
            c.compare_norm("gradient of a shared variance", slope, right, where=f"logvar {shape}")
        got = ops.log_likelihood(out, x, likelihood="gaussian", scale=0.5)
        z = (x.cpu().double() - out.cpu().double()) * 2
        c.compare_norm(
            "log p by a fixed scale", got, -0.5 * (z * z - 1.3862943611198906 + 1.8378770664093453).sum((1, 2))
        )
        for likelihood in COUNTS:
            planes = PLANES[likelihood] - 1
            params, targets = c.normal(4, planes, 37, dtype=dtype), (5 * x).round().to(torch.uint8)
            log_theta = c.normal(37, dtype=kept).requires_grad_()
            got = ops.log_likelihood(params, targets, likelihood=likelihood, log_theta=log_theta)
            rows = log_theta.detach().cpu().double().view(1, 37)
            want = reference(params.cpu().double(), rows, targets.cpu(), likelihood)
            c.compare_norm(f"log p by a shared dispersion, {likelihood}", got, want)
            (slope,) = torch.autograd.grad(got.sum(), log_theta)
            held = reference_gradients(params.cpu().double(), rows, targets.cpu(), likelihood).shared
            assert held is not None
            c.compare_norm(f"gradient of a shared dispersion, {likelihood}", slope, held.sum(0))
        c.ran(dtype, (4, 1, 37), "shared", "fixed scale")


def outside(c: Context) -> None:
    """Targets outside of the likelihood's set: an error on the CPU, a NaN row on a GPU."""
    for likelihood, wrong in (("bernoulli", 1.5), ("categorical", 5), ("discretized_logistic", 2.0)):
        out, x = _inputs(c, likelihood, (3, 1, 20), torch.float32)
        x = x.float() / 255 if likelihood == "discretized_logistic" else x
        x[1, 0, 7] = wrong
        if c.backend in ("cpp", "reference"):
            try:
                ops.log_likelihood(out, x, likelihood=likelihood)
            except ValueError:
                c.ran(out.dtype, (3, 1, 20), "targets outside")
                continue
            c.require(False, f"{likelihood}: a target of {wrong} raised nothing")
        got = ops.log_likelihood(out, x, likelihood=likelihood)
        c.require(torch.isnan(got).tolist() == [False, True, False], f"{likelihood}: a target of {wrong} gave {got}")
        c.ran(out.dtype, (3, 1, 20), "targets outside")


def layouts(c: Context) -> None:
    """Strided, expanded and misaligned parameters and targets."""
    for turn, likelihood in enumerate(LIKELIHOODS):
        for dtype in c.dtypes_of(turn):
            out, x = _inputs(c, likelihood, (4, 3, c.scaled(37, 5)), dtype)
            want = _exact(out, x, likelihood)[0]
            room = c.normal(out.numel() + 1, dtype=dtype)[1:].view(out.shape).copy_(out)
            for name, parameters, target in (
                ("transposed", out.transpose(0, -1).contiguous().transpose(0, -1), x),
                ("misaligned", room, x),
                ("strided target", out, x.transpose(0, -1).contiguous().transpose(0, -1)),
            ):
                got = ops.log_likelihood(parameters, target, likelihood=likelihood)
                c.compare_norm("log p", got, want, where=f"{name}, {_where(likelihood, out)}")
                c.ran(dtype, tuple(out.shape), name)


def extremes(c: Context) -> None:
    """Parameters to 1e4: never NaN, and right where the exact value can be held."""
    line = torch.tensor([0.0, 1e-4, -1.0, 20.0, -20.0, 88.0, -90.0, 100.0, -100.0, 1e4, -1e4], dtype=torch.float64)
    for turn, likelihood in enumerate(LIKELIHOODS):
        for dtype in c.dtypes_of(turn):
            out, x = _inputs(c, likelihood, (40, 1, 9), dtype)
            index = torch.randint(len(line), out.shape, generator=c.generator)
            out = line[index].clamp(
                -100 if likelihood == "gaussian" else -1e5, 100 if likelihood == "gaussian" else 1e5
            )
            leaf = out.to(dtype).to(c.device).requires_grad_()
            got = ops.log_likelihood(leaf, x, likelihood=likelihood)
            (slope,) = torch.autograd.grad(got.sum(), leaf)
            c.require(not bool(torch.isnan(got).any() | torch.isnan(slope).any()), f"NaN; {_where(likelihood, leaf)}")
            want = _exact(leaf, x, likelihood)[0]
            far = want.abs() >= 1e30  # infinite or nearly so in float32
            finite = torch.where(far, 0.0, want)
            held = torch.where(far.to(got.device), 0.0, got)
            c.compare("log p", held, finite, finite.abs() + 10.0, bound=1e-5, where=_where(likelihood, leaf))
            c.ran(dtype, tuple(out.shape), likelihood, "parameters to 1e4")


def derivatives(c: Context) -> None:
    """Double backward and forward mode beside the kernel's own gradient."""
    for likelihood in LIKELIHOODS:
        dtype = c.dtypes[0]
        out, x = _inputs(c, likelihood, (2, 3, 4), dtype)

        def second(leaf: Tensor, value: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            (first,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
            return first, torch.autograd.grad((first * w).sum(), leaf, allow_unused=True)[0]

        w = c.normal(*out.shape, dtype=dtype)
        leaf, wide = out.clone().requires_grad_(), out.cpu().double().requires_grad_()
        got = second(leaf, ops.log_likelihood(leaf, x, likelihood=likelihood), w)
        target = x.cpu().double() if x.dtype.is_floating_point else x.cpu()
        mixture = likelihood == "discretized_logistic_mixture"
        target = target.reshape(2, 3 if mixture else 1, -1)
        want = second(
            wide, reference(wide.reshape(2, -1, target.shape[-1]), None, target, likelihood), w.cpu().double()
        )
        (fused,) = torch.autograd.grad(ops.log_likelihood(leaf, x, likelihood=likelihood).sum(), leaf)
        c.compare_norm("gradient", fused, want[0].detach(), where=likelihood)
        for order, (left, right) in enumerate(zip(got, want, strict=True)):
            c.compare_norm(f"derivative {order + 1}", left, right.detach(), where=likelihood)
        call = lambda p: ops.log_likelihood(p, x, likelihood=likelihood)  # noqa: B023, E731
        tangent = torch.func.jvp(call, (out,), (w,))[1]
        c.compare_norm("tangent", tangent, (want[0] * w.cpu().double()).flatten(1).sum(1).detach(), where=likelihood)
        c.ran(dtype, tuple(out.shape), likelihood, "double backward", "jvp")


def zero_sizes(c: Context) -> None:
    """No rows or positions."""
    for dtype in c.dtypes:
        for shape in ((0, 1, 4), (2, 1, 0)):
            for likelihood in LIKELIHOODS:
                out, x = _inputs(c, likelihood, shape, dtype)
                leaf = out.requires_grad_()
                got = ops.log_likelihood(leaf, x, likelihood=likelihood)
                (slope,) = torch.autograd.grad(got.sum(), leaf)
                c.require(bool((got == 0).all()) and got.shape == shape[:1], f"{likelihood} {shape} gives {got}")
                c.require(slope.shape == out.shape, f"{likelihood} {shape}: the gradient is {tuple(slope.shape)}")
            c.ran(dtype, shape, "zero sizes")


def _call(first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    # The op draws nothing; where replays must differ, noise makes them.
    x = ops.bernoulli_sample(second, seed=seed)
    assert isinstance(x, Tensor)
    leaf = first.detach().requires_grad_()
    value = ops.log_likelihood(leaf, x)
    return value, *torch.autograd.grad(value, leaf, torch.full_like(value, 0.5))


def determinism(c: Context) -> None:
    """Bit for bit the same on every run."""
    for turn, likelihood in enumerate(LIKELIHOODS):
        for dtype in c.dtypes_of(turn):
            out, x = _inputs(c, likelihood, (3, 3, c.scaled(1501, 40)), dtype)
            first = ops.log_likelihood(out, x, likelihood=likelihood)
            for _ in range(3):
                c.same_bits("a repeated call", ops.log_likelihood(out, x, likelihood=likelihood), first, likelihood)
            c.ran(dtype, tuple(out.shape), "repeatable")


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (130, 65), _call)


def graphs(c: Context) -> None:
    """CUDA-graph capture and replay."""
    _gpu.captured(c, (63, 129), _call)


CHECKS = (
    Check("values", values),
    Check("gradients", gradients),
    Check("cotangents", cotangents),
    Check("samples", samples),
    Check("shared", shared),
    Check("outside", outside),
    Check("layouts", layouts),
    Check("extremes", extremes),
    Check("derivatives", derivatives),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
    Check("graphs", graphs, gpu_only=True),
)
