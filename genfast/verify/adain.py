"""Checks of the instance normalization kernels: forward, backward and forward mode, through the public ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from genfast import ops
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor

__all__ = ["CHECKS"]

#: One position, odd widths, many planes a program, several blocks, other ranks.
SHAPES = (
    (1, 1, 1, 2),
    (2, 3, 5, 7),
    (3, 2, 4, 4),
    (1, 3, 17),
    (2, 2, 3, 4, 5),
    (2, 1, 1, 1),
    (2, 2, 33, 31),
    (1, 2, 70, 71),
)


def _cpu(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _exact(x: Tensor, std: Tensor | None, mean: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Differentiable; x in float64, std and mean [N, C]."""
    dims = tuple(range(2, x.dim()))
    out = (x - x.mean(dims, keepdim=True)) / (x.var(dims, correction=0, keepdim=True) + eps).sqrt()
    shape = (*x.shape[:2], *(1 for _ in dims))
    out = out if std is None else out * std.reshape(shape)
    return out if mean is None else out + mean.reshape(shape)


def _cases(c: Context) -> Iterator[tuple[torch.dtype, Tensor, Tensor, Tensor, str]]:
    for turn, shape in enumerate(SHAPES[:6] if c.size_class == "tiny" else SHAPES):
        for dtype in c.dtypes_of(turn):
            kept = torch.float64 if dtype == torch.float64 else torch.float32
            std, mean = (c.normal(*shape[:2], dtype=kept) for _ in range(2))
            yield dtype, c.normal(*shape, dtype=dtype), std, mean, f"x {shape} {dtype}"


def forward(c: Context) -> None:
    """With and without a style's moments."""
    for dtype, x, std, mean, where in _cases(c):
        out, plain = ops.adain(x, mean, std), ops.instance_norm(x)
        for name, got, want in (
            ("adain", out, _exact(_cpu(x), _cpu(std), _cpu(mean))),
            ("instance_norm", plain, _exact(_cpu(x), None, None)),
        ):
            c.compare(name, got, want, want.abs() + 3, where=where)
        c.require(out.stride() == torch.empty_like(x).stride(), f"strides {out.stride()}; {where}")
        c.ran(dtype, tuple(x.shape), "adain", "instance_norm")


def affine(c: Context) -> None:
    """Weights and biases of channels, alone and together."""
    for dtype in c.dtypes:
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        x, weight, bias = c.normal(3, 4, 5, 6, dtype=dtype), c.normal(4, dtype=kept), c.normal(4, dtype=kept)
        for w, b in ((weight, None), (None, bias), (weight, bias)):
            out = ops.instance_norm(x, w, b)
            scale, shift = (None if v is None else _cpu(v).expand(3, 4) for v in (w, b))
            want = _exact(_cpu(x), scale, shift)
            c.compare("instance_norm", out, want, want.abs() + 3, where=f"{w is None} {b is None}")
            c.ran(dtype, tuple(x.shape), "affine")


def large_means(c: Context) -> None:
    """A mean that is large beside the deviations costs no digits."""
    x = (torch.randint(-64, 64, (2, 3, 33, 7), generator=c.generator) / 64.0 + 4096.0).to(c.device)
    want = _exact(_cpu(x), None, None)
    c.compare("instance_norm", ops.instance_norm(x), want, want.abs() + 1)
    c.ran(x.dtype, tuple(x.shape), "large mean")


def gradients(c: Context) -> None:
    """Gradients of x, the mean and the standard deviation."""
    for dtype, x, std, mean, where in _cases(c):
        if x[0, 0].numel() == 2:  # what is left of the gradient is rounding
            continue
        leaves, dout = [t.requires_grad_() for t in (x, std, mean)], c.normal(*x.shape, dtype=dtype)
        got = torch.autograd.grad(ops.adain(x, mean, std), leaves, dout)
        exact = [_cpu(t).requires_grad_() for t in leaves]
        want = torch.autograd.grad(_exact(exact[0], exact[1], exact[2]), exact, _cpu(dout))
        for name, left, right in zip(("x", "std", "mean"), got, want, strict=True):
            c.compare_norm(f"gradient of {name}", left, right, where=where)
        c.ran(dtype, tuple(x.shape), "gradients")


def second_order(c: Context) -> None:
    """The derivative of a gradient, by x, the cotangent and the standard deviation."""
    for dtype, x, std, mean, where in _cases(c):
        if x[0, 0].numel() <= 2:
            continue
        dout, along = c.normal(*x.shape, dtype=dtype), c.normal(*x.shape, dtype=dtype)
        found = []
        for native in (True, False):
            tensors = (x, std, mean, dout, along) if native else [_cpu(t) for t in (x, std, mean, dout, along)]
            leaf, scale, shift, cotangent = (t.detach().requires_grad_() for t in tensors[:4])
            out = ops.adain(leaf, shift, scale) if native else _exact(leaf, scale, shift)
            (first,) = torch.autograd.grad(out, leaf, cotangent, create_graph=True)
            found.append(torch.autograd.grad(first, (leaf, cotangent, scale), tensors[4]))
        for name, got, want in zip(("x", "dout", "std"), *found, strict=True):
            c.compare_norm(f"second derivative, of {name}", got, want, where=where)
        c.ran(dtype, tuple(x.shape), "double backward")


def jvp(c: Context) -> None:
    """Forward mode by all tensors."""
    for dtype, x, std, mean, where in _cases(c):
        if x[0, 0].numel() == 2:
            continue
        primals, tangents = (x, std, mean), tuple(c.normal(*t.shape, dtype=t.dtype) for t in (x, std, mean))
        got = torch.func.jvp(lambda x, s, m: ops.adain(x, m, s), primals, tangents)[1]
        want = torch.func.jvp(_exact, tuple(map(_cpu, primals)), tuple(map(_cpu, tangents)))[1]
        c.compare_norm("tangent", got, want, where=where)
        c.ran(dtype, tuple(x.shape), "jvp")


def layouts(c: Context) -> None:
    """channels_last, transposed, expanded and misaligned."""
    for dtype in c.main_dtypes:
        base = c.normal(4, 6, 5, 3, dtype=dtype)
        for name, x in (
            ("channels_last", base.contiguous(memory_format=torch.channels_last)),
            ("transposed", base.transpose(1, 2).contiguous().transpose(1, 2)),
            ("expanded", base[:1].expand(4, 6, 5, 3)),
            ("misaligned", c.normal(4 * 90 + 1, dtype=dtype)[1:].view(4, 6, 5, 3)),
        ):
            want = _exact(_cpu(x), None, None)
            c.compare("instance_norm", ops.instance_norm(x), want, want.abs() + 3, where=name)
            c.ran(dtype, tuple(x.shape), name)


def zero_sizes(c: Context) -> None:
    """No samples, no channels."""
    for dtype in c.dtypes:
        for shape in ((0, 3, 2, 2), (2, 0, 2, 2)):
            x = torch.zeros(shape, dtype=dtype, device=c.device, requires_grad=True)
            out = ops.instance_norm(x)
            (dx,) = torch.autograd.grad(out.sum(), x)
            c.require(out.shape == dx.shape == shape, f"{shape}")
            c.ran(dtype, shape, "zero sizes")


def _call(first: Tensor, second: Tensor, seed: object) -> tuple[Tensor, ...]:
    """The op and its gradients of matrices of one plane a row; nothing is drawn."""
    x = first.detach().unsqueeze(0).requires_grad_()
    std = second[None, :, 0].detach().requires_grad_()
    out = ops.adain(x, second[None, :, 1], std)
    return out, *torch.autograd.grad(out, (x, std), second.unsqueeze(0))


def determinism(c: Context) -> None:
    """Bit for bit the same on every run."""
    _gpu.repeats(c, (513, 1300), (7, 20), _call)


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one."""
    _gpu.on_side_stream(c, (130, 64), _call)


CHECKS = (
    Check("forward", forward),
    Check("affine", affine),
    Check("large means", large_means),
    Check("gradients", gradients),
    Check("second order", second_order),
    Check("jvp", jvp),
    Check("layouts", layouts),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
)
