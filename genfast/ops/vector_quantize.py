"""Vector quantization; docs/kernels/vector_quantize.md has the mathematics."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from genfast._checks import check_count, check_float_tensor, shape_of, wide
from genfast._op import Backend, Formula, Op, differentiable
from genfast.launch import vector_quantize as native
from genfast.ops import _vector_quantize_reference as plain

__all__ = [
    "CodeSums", "CodeUsage", "NearestCode", "VectorQuantized", "code_sums", "code_usage", "nearest_code", "reference",
    "vector_quantize",
]  # fmt: skip

Tensor = torch.Tensor

reference = plain.nearest
REDUCTIONS = ("mean", "sum", "none")


class NearestCode(NamedTuple):
    """indices [...], int64, and squared distances [...], float64 for float64 and float32 otherwise."""

    indices: Tensor
    distances: Tensor


class CodeSums(NamedTuple):
    """sums [K, D] and counts [K], int64."""

    sums: Tensor
    counts: Tensor


class CodeUsage(NamedTuple):
    """counts [K], int64, and the perplexity of the distribution that they are of, 0-d float32."""

    counts: Tensor
    perplexity: Tensor


class VectorQuantized(NamedTuple):
    """z_q, indices and the losses, of which ``loss`` is the codebook loss and beta times the commitment loss."""

    z_q: Tensor
    indices: Tensor
    loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


# ---- the raw ops ----


def _same(op: str, z: Tensor, codebook: Tensor) -> None:
    if codebook.dim() != 2 or 0 in codebook.shape:
        raise ValueError(f"{op}: codebook must be [K, D] with K and D at least 1, got {shape_of(codebook)}")
    if z.dim() < 1 or z.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"{op}: z must be [..., {codebook.shape[1]}] beside a codebook {shape_of(codebook)}, got {shape_of(z)}"
        )
    if z.device != codebook.device:
        raise ValueError(f"{op}: z is on {z.device}, codebook on {codebook.device}; move them to one device")
    if z.dtype != codebook.dtype:
        raise TypeError(f"{op}: z is {z.dtype}, codebook {codebook.dtype}; they must be equal outside autocast")


def _check_nearest(z, codebook, want_distances, want_codes):  # type: ignore[no-untyped-def]
    op = "genfast::nearest_code"
    check_float_tensor(op, "z", z)
    check_float_tensor(op, "codebook", codebook)
    _same(op, z, codebook)
    if z.dim() != 2:
        raise ValueError(f"{op}: z must be [N, D], got {shape_of(z)}")


def _fake_nearest(z, codebook, want_distances, want_codes):  # type: ignore[no-untyped-def]
    rows = z.shape[0]
    distances = z.new_empty((rows,) if want_distances else (0,), dtype=wide(z.dtype) if want_distances else z.dtype)
    codes = z.new_empty(tuple(z.shape)) if want_codes else z.new_empty(0)
    return distances, codes, z.new_empty((rows,), dtype=torch.int64)


def _no_float64(x, *rest):  # type: ignore[no-untyped-def]
    return "float64 runs on the cpp and reference backends" if x.dtype == torch.float64 else None


_nearest_op = Op(
    "nearest_code(Tensor z, Tensor codebook, bool want_distances, bool want_codes) "
    "-> (Tensor distances, Tensor codes, Tensor indices)",
    {
        "triton": Backend(native.nearest_triton, _no_float64),
        "cpp": Backend(native.nearest_cpp),
        "reference": Backend(plain.run_nearest),
    },
    _fake_nearest,
    check=_check_nearest,
)


def _check_indices(op: str, x: Tensor, indices: Any, codes: Any) -> None:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        found = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"{op}: indices must be an int64 tensor, got {found}")
    if x.dim() < 1 or indices.shape != x.shape[:-1]:
        raise ValueError(f"{op}: indices must have one index a row of x {shape_of(x)}, got {shape_of(indices)}")
    if indices.device != x.device:
        raise ValueError(f"{op}: indices are on {indices.device}, x on {x.device}; move them to one device")
    check_count(op, "codes", codes, 1, 2**31)


def _check_sums(x, indices, codes):  # type: ignore[no-untyped-def]
    op = "genfast::code_sums"
    check_float_tensor(op, "x", x)
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: x must be [N, D], float32 or float64, got {shape_of(x)}, {x.dtype}")
    _check_indices(op, x, indices, codes)


def _fake_sums(x, indices, codes):  # type: ignore[no-untyped-def]
    return x.new_empty((codes, x.shape[1])), indices.new_empty((codes,))


_sums_op = Op(
    "code_sums(Tensor x, Tensor indices, SymInt codes) -> (Tensor sums, Tensor counts)",
    {
        "triton": Backend(native.sums_triton, _no_float64),
        "cpp": Backend(native.sums_cpp),
        "reference": Backend(plain.sums),
    },
    _fake_sums,
    check=_check_sums,
)


# ---- derivative rules ----
# A gather of rows and the sums of rows of a code are each other's transpose.


class _Gather(Formula):
    @staticmethod
    def forward(codebook, indices):  # type: ignore[no-untyped-def]
        return codebook.index_select(0, indices)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.codes = inputs[0].shape[0]
        return (inputs[1],)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        if dout is None:
            return None, None
        return _sums(dout.to(wide(dout.dtype)), ctx.saved_tensors[0], ctx.codes)[0].to(dout.dtype), None

    @staticmethod
    def jvp(ctx, codebook_tangent, _):  # type: ignore[no-untyped-def]
        return _gather(codebook_tangent, ctx.saved_tensors[0])


class _Sums(Formula):
    @staticmethod
    def forward(x, indices, codes):  # type: ignore[no-untyped-def]
        return _sums_op(x, indices, codes)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.codes = inputs[2]
        return (inputs[1],)

    @staticmethod
    def backward(ctx, dsums, _):  # type: ignore[no-untyped-def]
        return None if dsums is None else _gather(dsums, ctx.saved_tensors[0]), None, None

    @staticmethod
    def jvp(ctx, x_tangent, *_):  # type: ignore[no-untyped-def]
        return _sums(x_tangent, ctx.saved_tensors[0], ctx.codes)[0], None


def _sums_composite(x, indices, codes):  # type: ignore[no-untyped-def]
    counts = indices.new_zeros((codes,)).index_add(0, indices, torch.ones_like(indices))
    return x.new_zeros((codes, x.shape[1])).index_add(0, indices, x), counts


_gather = differentiable(_Gather, lambda codebook, indices: codebook.index_select(0, indices))
_sums = differentiable(_Sums, _sums_composite)


def _tied_sums(x: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    _check_sums(x, indices, codes)
    return _sums(x, indices, codes)  # type: ignore[no-any-return]


_sums_op.tie = _tied_sums


def _rows(codebook: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    return _gather(codebook, indices).to(dtype)


class _Nearest(Formula):
    """(indices, distances): where indices do not change, distances have the derivatives of the formula."""

    @staticmethod
    def forward(z, codebook):  # type: ignore[no-untyped-def]
        distances, _, indices = _nearest_op(z, codebook, True, False)
        return indices, distances

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        return (*inputs, output[0])

    @staticmethod
    def backward(ctx, _, ddistances):  # type: ignore[no-untyped-def]
        if ddistances is None:
            return None, None
        z, codebook, indices = ctx.saved_tensors
        slope = 2 * ddistances.unsqueeze(-1) * (z.to(ddistances.dtype) - _rows(codebook, indices, ddistances.dtype))
        dcodebook = None
        if ctx.needs_input_grad[1]:
            dcodebook = -_sums(slope, indices, codebook.shape[0])[0].to(codebook.dtype)
        return slope.to(z.dtype), dcodebook

    @staticmethod
    def jvp(ctx, z_tangent, codebook_tangent):  # type: ignore[no-untyped-def]
        z, codebook, indices = ctx.saved_tensors
        dtype = wide(z.dtype)
        gap = z.to(dtype) - _rows(codebook, indices, dtype)
        moved = torch.zeros_like(gap) if z_tangent is None else z_tangent.to(dtype)
        if codebook_tangent is not None:
            moved = moved - _rows(codebook_tangent, indices, dtype)
        return None, 2 * (gap * moved).sum(-1)


class _Quantize(Formula):
    """(z_q, indices, codebook error [N], commitment error [N]), with the derivatives of the formula

    z_q = sg(c) + z - sg(z), ||sg(z) - c||^2, ||z - sg(c)||^2 with c = codebook[indices], sg cutting derivatives.
    """

    @staticmethod
    def forward(z, codebook):  # type: ignore[no-untyped-def]
        errors, codes, indices = _nearest_op(z, codebook, True, True)
        return codes, indices, errors, errors.clone()

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        return (*inputs, output[1])

    @staticmethod
    def backward(ctx, dz_q, _, dcodebook_error, dcommitment_error):  # type: ignore[no-untyped-def]
        z, codebook, indices = ctx.saved_tensors
        dtype = wide(z.dtype)
        needs = ctx.needs_input_grad
        to_z = dcommitment_error is not None and needs[0]
        to_codebook = dcodebook_error is not None and needs[1]
        dz, dcodebook = dz_q, None
        if to_z or to_codebook:
            codes = _rows(codebook, indices, dtype)
        if to_z:
            pull = (2 * dcommitment_error).unsqueeze(-1) * (z.to(dtype) - codes.detach())
            dz = (pull if dz_q is None else pull + dz_q).to(z.dtype)
        if to_codebook:
            pull = (2 * dcodebook_error).unsqueeze(-1) * (codes - z.detach().to(dtype))
            dcodebook = _sums(pull, indices, codebook.shape[0])[0].to(codebook.dtype)
        return dz, dcodebook

    @staticmethod
    def jvp(ctx, z_tangent, codebook_tangent):  # type: ignore[no-untyped-def]
        z, codebook, indices = ctx.saved_tensors
        dtype = wide(z.dtype)
        codes = _rows(codebook, indices, dtype)
        zero = torch.zeros_like(codes[:, 0])
        codebook_error = commitment_error = zero
        if z_tangent is not None:
            commitment_error = 2 * ((z.to(dtype) - codes.detach()) * z_tangent.to(dtype)).sum(-1)
        if codebook_tangent is not None:
            moved = _rows(codebook_tangent, indices, dtype)
            codebook_error = 2 * ((codes - z.detach().to(dtype)) * moved).sum(-1)
        return torch.zeros_like(z) if z_tangent is None else z_tangent, None, codebook_error, commitment_error


# ---- the same in plain operations, for transforms inside a compiled region ----


def _plain_indices(z: Tensor, codebook: Tensor) -> Tensor:
    z, codebook = z.detach().double(), codebook.detach().double()
    return (z.unsqueeze(1) - codebook).square().sum(-1).argmin(1)


def _nearest_composite(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    indices, dtype = _plain_indices(z, codebook), wide(z.dtype)
    return indices, (z.to(dtype) - codebook.to(dtype).index_select(0, indices)).square().sum(-1)


def _quantize_composite(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    indices, dtype = _plain_indices(z, codebook), wide(z.dtype)
    codes = codebook.index_select(0, indices)
    codebook_error = (z.detach().to(dtype) - codes.to(dtype)).square().sum(-1)
    commitment_error = (z.to(dtype) - codes.detach().to(dtype)).square().sum(-1)
    return codes.detach() + (z - z.detach()), indices, codebook_error, commitment_error


_nearest = differentiable(_Nearest, _nearest_composite)
_quantize = differentiable(_Quantize, _quantize_composite)


def _tied(z: Tensor, codebook: Tensor, want_distances: bool, want_codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_nearest(z, codebook, want_distances, want_codes)
    indices, distances = _nearest(z, codebook)
    codes = _gather(codebook, indices) if want_codes else z.new_empty(0)
    return distances if want_distances else z.new_empty(0), codes, indices


_nearest_op.tie = _tied


# ---- public ----


def _prepared(op: str, z: Any, codebook: Any) -> tuple[Tensor, Tensor]:
    check_float_tensor(op, "z", z)
    check_float_tensor(op, "codebook", codebook)
    if z.dtype != codebook.dtype and torch.is_autocast_enabled(z.device.type):
        together = torch.promote_types(z.dtype, codebook.dtype)
        z, codebook = z.to(together), codebook.to(together)
    _same(op, z, codebook)
    return z, codebook


def nearest_code(z: Tensor, codebook: Tensor) -> NearestCode:
    """The nearest row of a codebook for each vector, without the matrix of distances.

    indices[n] is the lowest k with the smallest ||z_n - c_k||^2, compared as real numbers on the CPU: rounding never
    decides. On a GPU the comparison is in float64.

    Args:
        z: vectors [..., D]; float32, float64, bfloat16 or float16.
        codebook: codes [K, D], K and D at least 1, of z's dtype and device. Under autocast both take the wider dtype.

    Returns:
        (indices [...] int64, distances [...]), the squared distances in float32, float64 for float64. Distances are
        differentiable to every order, with the indices held where they are.

    Raises:
        TypeError: for something else than floating-point tensors of one dtype.
        ValueError: for an empty codebook, unequal D or devices; on the CPU also for NaN or infinity. On a GPU a vector
            with one takes index 0, and a code with one is never nearest while there is another.

    Examples:
        >>> codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        >>> nearest_code(torch.tensor([[0.9, 0.5], [0.5, 7.0]]), codebook).indices  # of equals the lowest
        tensor([1, 0])
    """
    z, codebook = _prepared("nearest_code", z, codebook)
    indices, distances = _nearest(z.reshape(-1, z.shape[-1]), codebook)
    return NearestCode(indices.reshape(z.shape[:-1]), distances.reshape(z.shape[:-1]))


def code_sums(x: Tensor, indices: Tensor, codes: int) -> CodeSums:
    """Sums and counts of the rows of x that belong to each code, in one order whatever the number of threads.

    Args:
        x: [..., D]; float32, float64, bfloat16 or float16.
        indices: int64 [...], each in [0, codes).
        codes: K, at least 1.

    Returns:
        (sums [K, D], counts [K] int64); sums in float32, float64 for float64, summed in float64 on the CPU.
        Differentiable to every order by x.

    Raises:
        TypeError: if x is no floating-point tensor, indices no int64 tensor, codes no int.
        ValueError: for shapes or devices that do not fit, codes below 1, and, on the CPU, an index outside [0, codes).

    Examples:
        >>> code_sums(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 2]), 3).sums.T
        tensor([[2., 0., 5.]])
    """
    check_float_tensor("code_sums", "x", x)
    _check_indices("code_sums", x, indices, codes)
    flat = x.reshape(indices.numel(), x.shape[-1]).to(wide(x.dtype))
    return CodeSums(*_sums(flat, indices.reshape(-1), codes))


def code_usage(indices: Tensor, codes: int) -> CodeUsage:
    """How often each code is used, and the perplexity e^H of that distribution: the number of codes evenly in use.

    Args:
        indices: int64, any shape, each in [0, codes).
        codes: K, at least 1.

    Returns:
        (counts [K] int64, perplexity), which is 1 where one code takes all, K where all take as many; 1 for no indices.

    Raises:
        TypeError: if indices is no int64 tensor, codes no int.
        ValueError: for codes below 1.

    Examples:
        >>> code_usage(torch.tensor([0, 0, 3, 3]), 4)
        CodeUsage(counts=tensor([2, 0, 0, 2]), perplexity=tensor(2.))
    """
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        found = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"code_usage: indices must be an int64 tensor, got {found}")
    check_count("code_usage", "codes", codes, 1, 2**31)
    flat = indices.reshape(-1)
    counts = flat.new_zeros(codes).scatter_add_(0, flat, torch.ones_like(flat))
    return CodeUsage(counts, perplexity(counts))


def perplexity(counts: Tensor) -> Tensor:
    """e^H of counts, float32."""
    share = counts.to(torch.float64)
    share = share / share.sum().clamp(min=1e-300)
    return torch.exp(-torch.special.xlogy(share, share).sum()).to(torch.float32)


def vector_quantize(z: Tensor, codebook: Tensor, *, beta: float = 0.25, reduction: str = "mean") -> VectorQuantized:
    """Replaces each vector by its nearest code, with the losses of a vector-quantized VAE, in one pass.

    With c = codebook[indices] and sg cutting derivatives: z_q has the value c and the derivatives of z (straight
    through: identity to z, none to the codebook), codebook_loss is ||sg(z) - c||^2, commitment_loss is
    ||z - sg(c)||^2, and loss = codebook_loss + beta commitment_loss. Second derivatives are those of these formulas
    too, so z and the codebook have no mixed ones. Indices are those of ``nearest_code``; no matrix of N x K distances
    is made.

    Args:
        z: vectors [..., D]; float32, float64, bfloat16 or float16. Images keep channels last.
        codebook: codes [K, D], K and D at least 1, of z's dtype and device. Under autocast both take the wider dtype.
        beta: weight of the commitment loss.
        reduction: "mean" over all elements of z, "sum", or "none" for a sum a vector, [...].

    Returns:
        (z_q [..., D], indices [...] int64, loss, codebook_loss, commitment_loss); losses in float32, float64 for
        float64, 0 for no vectors. Differentiable to every order, in reverse and forward mode.

    Raises:
        TypeError: for something else than floating-point tensors of one dtype.
        ValueError: for an empty codebook, unequal D or devices, an unknown reduction, a beta that is negative or not
            finite; NaN and infinity as in ``nearest_code``.

    Source: van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning", 2017, equation 3.

    Examples:
        >>> codebook = torch.tensor([[0.0, 0.0], [2.0, 0.0]], requires_grad=True)
        >>> z = torch.tensor([[1.5, 0.0]], requires_grad=True)
        >>> found = vector_quantize(z, codebook, reduction="sum")
        >>> found.z_q, found.indices, found.loss
        (tensor([[2., 0.]], grad_fn=...), tensor([1]), tensor(0.3125, grad_fn=...))
        >>> torch.autograd.grad(found.z_q.sum() + found.loss, (z, codebook))
        (tensor([[0.7500, 1.0000]]), tensor([[0., 0.],
                [1., 0.]]))
    """
    op = "vector_quantize"
    z, codebook = _prepared(op, z, codebook)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    checked_beta(op, beta)
    codes, indices, codebook_loss, commitment_loss = _quantize(z.reshape(-1, z.shape[-1]), codebook)
    if reduction == "none":
        codebook_loss, commitment_loss = codebook_loss.reshape(z.shape[:-1]), commitment_loss.reshape(z.shape[:-1])
    else:
        codebook_loss, commitment_loss = codebook_loss.sum(), commitment_loss.sum()
        if reduction == "mean":
            count = max(z.numel(), 1)
            codebook_loss, commitment_loss = codebook_loss / count, commitment_loss / count
    loss = torch.add(codebook_loss, commitment_loss, alpha=beta)  # beta * x has a float64 tangent under torch.func.jvp
    return VectorQuantized(codes.reshape(z.shape), indices.reshape(z.shape[:-1]), loss, codebook_loss, commitment_loss)


def checked_beta(op: str, beta: Any) -> None:
    if isinstance(beta, (bool, Tensor)) or not hasattr(beta, "__float__"):
        raise TypeError(f"{op}: beta must be a float, got {type(beta).__name__}")
    if not math.isfinite(beta) or beta < 0:
        raise ValueError(f"{op}: beta must be finite and not negative, got {beta}")
