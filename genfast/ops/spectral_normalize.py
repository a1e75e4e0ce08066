"""Spectral normalization of many weights in one call; docs/kernels/spectral_normalize.md has the mathematics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from genfast._checks import check_count, check_float_tensor, shape_of, wide
from genfast._op import Backend, Formula, Op, differentiable, transformed
from genfast.launch import spectral_normalize as native

__all__ = ["SpectralNormalized", "reference", "spectral_normalize"]

Tensor = torch.Tensor
_NAME = "spectral_normalize"
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


class SpectralNormalized(NamedTuple):
    """What ``spectral_normalize`` returns.

    Attributes:
        weights: the weights over their largest singular values.
        u: the left vectors after the power iteration, without a derivative.
        v: the right vectors, likewise.
        sigma: [weights], the estimates u^T W v.
    """

    weights: list[Tensor]
    u: list[Tensor]
    v: list[Tensor]
    sigma: Tensor


# ---- reference ----


def _matrix(weight: Tensor, dim: int) -> Tensor:
    """[rows, columns], in the dtype of the arithmetic."""
    moved = weight.movedim(dim, 0)
    return moved.reshape(moved.shape[0], math.prod(moved.shape[1:])).to(wide(weight.dtype))


def _like(matrix: Tensor, weight: Tensor, dim: int) -> Tensor:
    """The inverse of ``_matrix``."""
    return matrix.reshape(weight.movedim(dim, 0).shape).movedim(0, dim).to(weight.dtype)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix * vector).sum(1)  # a product of matrices would change its dtype under autocast


def _unit(x: Tensor, eps: float) -> Tensor:
    return x / torch.linalg.vector_norm(x).clamp_min(eps)


def _given(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], dims: Sequence[int]) -> Any:
    """(W / sigma of each, sigma) at constant u and v; differentiable by the weights."""
    outs, sigmas = [], []
    for weight, u, v, dim in zip(weights, us, vs, dims, strict=True):
        matrix = _matrix(weight, dim)
        sigma = (u * _times(matrix, v)).sum()
        outs.append((weight.to(sigma.dtype) / sigma).to(weight.dtype))
        sigmas.append(sigma)
    return outs, torch.stack(sigmas)


def reference(
    weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], dims: Sequence[int], iterations: int,
    eps: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """The formula in plain PyTorch; differentiable by the weights, with the vectors as constants."""
    us, vs = [u.detach() for u in us], [v.detach() for v in vs]
    for i, (weight, dim) in enumerate(zip(weights, dims, strict=True)):
        matrix = _matrix(weight.detach(), dim)
        for _ in range(iterations):
            us[i] = _unit(_times(matrix, vs[i]), eps)
            vs[i] = _unit(_times(matrix.T, us[i]), eps)
    outs, sigma = _given(weights, us, vs, dims)
    return outs, us, vs, sigma


def _gradients(
    douts: Sequence[Tensor], dsigma: Tensor | None, weights: Sequence[Tensor], us: Sequence[Tensor],
    vs: Sequence[Tensor], dims: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """dW of each weight, in differentiable torch operations."""
    found = []
    for i, (dout, weight, u, v, dim) in enumerate(zip(douts, weights, us, vs, dims, strict=True)):
        matrix, cotangent = _matrix(weight, dim), _matrix(dout, dim)
        sigma = (u * _times(matrix, v)).sum()
        along = (cotangent * matrix).sum() / sigma
        if dsigma is not None:
            along = along - dsigma[i] * sigma
        found.append(_like((cotangent - along * u.unsqueeze(1) * v) / sigma, weight, dim))
    return found


# ---- raw ops ----


def _contiguous_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t) for t in tensors]


def _run_reference(weights, us, vs, dims, iterations, eps):  # type: ignore[no-untyped-def]
    outs, new_us, new_vs, sigma = reference(weights, us, vs, dims, iterations, eps)
    outs = [like.copy_(out) for out, like in zip(outs, _contiguous_like(weights), strict=True)]
    return outs, [u.clone() for u in new_us], [v.clone() for v in new_vs], sigma


def _run_reference_backward(douts, weights, us, vs, sigma, dsigma, dims):  # type: ignore[no-untyped-def]
    found = _gradients(douts, dsigma, weights, us, vs, dims)
    return [like.copy_(dw) for dw, like in zip(found, _contiguous_like(weights), strict=True)]


def _fake(weights, us, vs, dims, iterations, eps):  # type: ignore[no-untyped-def]
    vectors = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*us, *vs)]
    return _contiguous_like(weights), vectors[: len(us)], vectors[len(us) :], us[0].new_empty(len(us))


def _fake_backward(douts, weights, us, vs, sigma, dsigma, dims):  # type: ignore[no-untyped-def]
    return _contiguous_like(weights)


def _check_layers(op: str, weights: Any, us: Any, vs: Any, dims: Any) -> None:
    if not len(weights) == len(us) == len(vs) == len(dims) or not weights:
        raise ValueError(
            f"{op}: needs at least one weight, and a u, a v and a dim for each; got {len(weights)} weights, "
            f"{len(us)} u, {len(vs)} v and {len(dims)} dims"
        )
    first = weights[0]
    for i, (weight, u, v, dim) in enumerate(zip(weights, us, vs, dims, strict=True)):
        check_float_tensor(op, f"weights[{i}]", weight)
        if weight.dtype != first.dtype or weight.device != first.device:
            raise TypeError(
                f"{op}: weights must share dtype and device, got {first.dtype} on {first.device} and {weight.dtype} "
                f"on {weight.device}; call it once for each"
            )
        if weight.dim() < 2:
            raise ValueError(
                f"{op}: weights[{i}] must have at least 2 dimensions, got shape {shape_of(weight)}; divide a vector by "
                "its norm"
            )
        check_count(op, f"dim of weights[{i}]", dim, 0, weight.dim())
        rows = weight.shape[dim]
        columns = weight.shape[:dim].numel() * weight.shape[dim + 1 :].numel()
        for name, vector, length in ((f"u[{i}]", u, rows), (f"v[{i}]", v, columns)):
            check_float_tensor(op, name, vector)
            if tuple(vector.shape) != (length,):
                raise ValueError(
                    f"{op}: {name} must have shape ({length},) with a weight of shape {shape_of(weight)} and dim "
                    f"{dim}, got {shape_of(vector)}"
                )
            if vector.device != weight.device:
                raise ValueError(f"{op}: {name} is on {vector.device}, its weight on {weight.device}")


def _check_wide(op: str, weights: Any, vectors: Any) -> None:
    for vector in vectors:
        if vector is not None and vector.dtype != wide(weights[0].dtype):
            raise TypeError(f"{op}: u, v and sigma must be {wide(weights[0].dtype)}, got {vector.dtype}")


def _check_raw(weights, us, vs, dims, iterations, eps):  # type: ignore[no-untyped-def]
    """What a direct call of the raw op must keep to; see ``Op``."""
    op = f"genfast::{_NAME}"
    _check_layers(op, weights, us, vs, dims)
    _check_wide(op, weights, (*us, *vs))
    check_count(op, "iterations", iterations, 0, 2**31)
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")


def _check_backward(douts, weights, us, vs, sigma, dsigma, dims):  # type: ignore[no-untyped-def]
    op = f"genfast::{_NAME}_backward"
    _check_layers(op, weights, us, vs, dims)
    _check_wide(op, weights, (*us, *vs, sigma, dsigma))
    for name, value in (("sigma", sigma), ("dsigma", dsigma)):
        if value is not None and (tuple(value.shape) != (len(weights),) or value.device != weights[0].device):
            raise ValueError(f"{op}: {name} must have shape ({len(weights)},) on {weights[0].device}")
    if len(douts) != len(weights):
        raise ValueError(f"{op}: got {len(douts)} cotangents for {len(weights)} weights")
    for dout, weight in zip(douts, weights, strict=True):
        if (dout.shape, dout.dtype, dout.device) != (weight.shape, weight.dtype, weight.device):
            raise ValueError(
                f"{op}: a cotangent is {dout.dtype} of shape {shape_of(dout)} on {dout.device}, its weight "
                f"{weight.dtype} of shape {shape_of(weight)} on {weight.device}"
            )


def _no_float64(*args):  # type: ignore[no-untyped-def]
    return "float64 runs on the cpp and reference backends" if args[1][0].dtype == torch.float64 else None


_op = Op(
    f"{_NAME}(Tensor[] weights, Tensor[] u, Tensor[] v, int[] dims, int iterations, float eps) "
    "-> (Tensor[] out, Tensor[] new_u, Tensor[] new_v, Tensor sigma)",
    {
        "triton": Backend(native.triton, _no_float64),
        "cpp": Backend(native.cpp),
        "reference": Backend(_run_reference),
    },
    _fake,
    check=_check_raw,
)
_backward_op = Op(
    f"{_NAME}_backward(Tensor[] dout, Tensor[] weights, Tensor[] u, Tensor[] v, Tensor sigma, Tensor? dsigma, "
    "int[] dims) -> Tensor[]",
    {
        "triton": Backend(native.triton_backward, _no_float64),
        "cpp": Backend(native.cpp_backward),
        "reference": Backend(_run_reference_backward),
    },
    _fake_backward,
    check=_check_backward,
)


# ---- derivative rules: u and v are constants, so that W / (u^T W v) is a ratio of linear functions ----


class _SpectralNormalize(Formula):
    """Takes (*weights, *u, *v, *dims, iterations, eps) and returns (*out, *new_u, *new_v, sigma)."""

    @staticmethod
    def forward(*args):  # type: ignore[no-untyped-def]
        n = len(args) // 4
        lists = (list(args[k * n : (k + 1) * n]) for k in range(4))
        outs, us, vs, sigma = _op(*lists, *args[4 * n :])
        return *outs, *us, *vs, sigma

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        n = len(inputs) // 4
        ctx.dims = inputs[3 * n : 4 * n]
        return *inputs[:n], *output[n:]

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        n, dims, saved = len(ctx.dims), ctx.dims, ctx.saved_tensors
        douts, dsigma = grads[:n], grads[-1]
        found: list[Tensor | None] = [None] * n
        # Layers that nothing used have no gradient.
        wanted = [i for i in range(n) if ctx.needs_input_grad[i] and (douts[i] is not None or dsigma is not None)]
        if wanted:
            weights, us, vs = ([saved[k * n + i] for i in wanted] for k in range(3))
            cotangents = [torch.zeros_like(saved[i]) if douts[i] is None else douts[i] for i in wanted]
            chosen = [dims[i] for i in wanted]
            whole = len(wanted) == n
            dsigma = dsigma if dsigma is None or whole else dsigma[wanted]
            # torch.autograd.grad(is_grads_batched=True) hands over batched cotangents, which no list of tensors takes.
            batched = not torch.compiler.is_compiling() and any(x is not None and _is_legacy_batched(x) for x in grads)
            if torch.is_grad_enabled() or transformed() or batched:
                gradients = _gradients(cotangents, dsigma, weights, us, vs, chosen)
            else:
                sigma = saved[-1] if whole else saved[-1][wanted]
                gradients = _backward_op(cotangents, weights, us, vs, sigma, dsigma, chosen)
            for i, gradient in zip(wanted, gradients, strict=True):
                found[i] = gradient
        return *found, *(None,) * (3 * n + 2)

    @staticmethod
    def jvp(ctx, *tangents):  # type: ignore[no-untyped-def]
        n, saved = len(ctx.dims), ctx.saved_tensors
        outs, sigmas = [], []
        for i, (tangent, dim) in enumerate(zip(tangents[:n], ctx.dims, strict=True)):
            weight, u, v = saved[i], saved[n + i], saved[2 * n + i]
            tangent = torch.zeros_like(weight) if tangent is None else tangent
            sigma, moved = ((u * _times(_matrix(x, dim), v)).sum() for x in (weight, tangent))
            outs.append(((tangent.to(sigma.dtype) - moved / sigma * weight.to(sigma.dtype)) / sigma).to(weight.dtype))
            sigmas.append(moved)
        return *outs, *(torch.zeros_like(x) for x in saved[n:-1]), torch.stack(sigmas)


def _composite(*args):  # type: ignore[no-untyped-def]
    n = len(args) // 4
    weights, us, vs, dims = (args[k * n : (k + 1) * n] for k in range(4))
    outs, new_us, new_vs, sigma = reference(weights, us, vs, dims, *args[4 * n :])
    return *outs, *new_us, *new_vs, sigma


_call = differentiable(_SpectralNormalize, _composite)


def _tied(weights, us, vs, dims, iterations, eps):  # type: ignore[no-untyped-def]
    """Gradients through torch.ops.genfast.spectral_normalize itself."""
    n = len(weights)
    found = _call(*weights, *(x.detach() for x in (*us, *vs)), *dims, iterations, eps)
    constants = [x.detach() for x in found[n : 3 * n]]
    return list(found[:n]), constants[:n], constants[n:], found[-1]


_op.tie = _tied
_backward_op.tie = lambda douts, weights, us, vs, sigma, dsigma, dims: _gradients(
    douts, dsigma, weights, [u.detach() for u in us], [v.detach() for v in vs], dims
)


# ---- public ----


def _listed(name: str, value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor) or not isinstance(value, Sequence):
        kind = type(value).__name__
        raise TypeError(f"{_NAME}: {name} must be a list with an entry for each weight, got {kind}")
    return list(value)


def spectral_normalize(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    dim: int | Sequence[int] = 0,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> SpectralNormalized:
    """Divides weights by their largest singular values, estimated by power iteration: all layers in one call.

    A weight is a matrix whose rows are its dimension ``dim``. n times u = unit(W v), v = unit(W^T u), with unit(x) =
    x / max(|x|, eps); then sigma = u^T W v and W / sigma. An iteration reads W once, not twice.
    ``genfast.nn.utils.spectral_norm`` and ``spectral_norm_network`` keep u and v for a layer or a network.

    Args:
        weights: tensors of at least 2 dimensions; float32, float64, bfloat16 or float16, of one dtype and device.
        u: a vector [rows] for each weight. Arithmetic is float32, float64 for float64; vectors are converted.
        v: a vector [columns] for each weight; columns are the other dimensions in their order.
        dim: the dimension of the outputs, one for all weights or one for each: 1 for transposed convolutions.
        n_power_iterations: n; 0 takes u and v as they are.
        eps: at least 0.

    Returns:
        ``SpectralNormalized``: the weights, of their shapes and layouts; new u and v; sigma. Weights and sigma are
        differentiable to every order by the weights, in reverse and forward mode, with u and v as constants. The first
        backward is fused; derivatives of it, and forward mode, are plain PyTorch.

    Raises:
        TypeError: for something else than lists of floating-point tensors of one dtype.
        ValueError: for shapes or devices that do not fit, no weight at all, a vector as weight, a dim outside the
            weight, a negative number of iterations or eps.

    Source: Miyato et al., "Spectral normalization for generative adversarial networks", ICLR 2018.

    Examples:
        >>> weight = torch.diag(torch.tensor([3.0, 2.0]))
        >>> u, v = torch.ones(2), torch.ones(2)
        >>> out = spectral_normalize([weight], [u], [v], n_power_iterations=20)
        >>> out.sigma, out.weights[0].diagonal()
        (tensor([3.]), tensor([1.0000, 0.6667]))
    """
    weights, us, vs = _listed("weights", weights), _listed("u", u), _listed("v", v)
    dims = [dim] * len(weights) if isinstance(dim, int) else _listed("dim", dim)
    for i, (weight, d) in enumerate(zip(weights, dims, strict=False)):
        check_float_tensor(_NAME, f"weights[{i}]", weight)
        if type(d) is int and -weight.dim() <= d < 0:
            dims[i] = d + weight.dim()
    _check_layers(_NAME, weights, us, vs, dims)
    n_power_iterations = check_count(_NAME, "n_power_iterations", n_power_iterations, 0, 2**31)
    if isinstance(eps, (bool, torch.Tensor)) or not isinstance(eps, (int, float)):
        raise TypeError(f"{_NAME}: eps must be a float, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"{_NAME}: eps must be at least 0, got {eps}")
    dtype, n = wide(weights[0].dtype), len(weights)
    us, vs = ([x.detach().to(dtype) for x in vectors] for vectors in (us, vs))
    found = _call(*weights, *us, *vs, *dims, n_power_iterations, float(eps))
    constants = [x.detach() for x in found[n : 3 * n]]
    return SpectralNormalized(list(found[:n]), constants[:n], constants[n:], found[-1])
