"""log p(x | decoder_out) of a VAE's likelihoods; docs/kernels/log_likelihood.md has the mathematics."""

from __future__ import annotations

import math
from typing import Any

import torch

from genfast._checks import FLOATS, check_float_tensor, shape_of, wide
from genfast._op import Backend, Formula, Op, _is_legacy_batched, differentiable
from genfast.launch import log_likelihood as native
from genfast.ops._log_likelihood_reference import LIKELIHOODS, Gradients, reference, reference_gradients

__all__ = ["log_likelihood", "reference"]

Tensor = torch.Tensor

_UNIT = ("bernoulli", "continuous_bernoulli")
_LEVELS = ("discretized_logistic", "discretized_logistic_mixture")
_COUNTS = ("negative_binomial", "zero_inflated_negative_binomial")
#: Parameters of one position, where they are all the decoder's.
_PLANES = {
    "bernoulli": 1, "continuous_bernoulli": 1, "gaussian": 2, "discretized_logistic": 2, "negative_binomial": 2,
    "zero_inflated_negative_binomial": 3,
}  # fmt: skip


# ---- the raw op ----


def _check_targets(likelihood: str, params: Tensor, x: Tensor) -> None:
    """Raises for targets that the likelihood has not; a GPU's kernels make NaN of them instead."""
    if not x.numel() or likelihood == "gaussian":
        return
    if likelihood in _LEVELS and x.dtype.is_floating_point:
        scaled = x * 255.0
        bad = (x < -0.125 / 255) | (x > 1 + 0.125 / 255) | ((scaled - scaled.round()).abs() > 0.125)
    elif likelihood in _UNIT:
        bad = (x < 0) | (x > 1)
    elif likelihood == "categorical":
        bad = (x < 0) | (x >= params.shape[1])
    elif likelihood in _COUNTS and x.dtype.is_floating_point:
        bad = (x < 0) | torch.isinf(x)
    else:
        return
    if bool(bad.any()):
        raise native.bad_target(likelihood, params)


def _run_reference(params, shared, x, likelihood, logvar, factor, want_params, want_shared):  # type: ignore[no-untyped-def]
    if params.is_cpu:
        _check_targets(likelihood, params, x)
    value = reference(params, shared, x, likelihood, logvar)
    if not (want_params or want_shared):
        return value, None, None
    gradients = reference_gradients(params, shared, x, likelihood, logvar)
    to_params = (gradients.params * factor).to(params.dtype) if want_params else None
    to_shared = gradients.shared * factor if want_shared and gradients.shared is not None else None
    return value, to_params, to_shared


def _fake(params, shared, x, likelihood, logvar, factor, want_params, want_shared):  # type: ignore[no-untyped-def]
    kept = wide(params.dtype)
    value = params.new_empty(params.shape[0], dtype=kept)
    to_params = params.new_empty(params.shape if want_params else 0)
    shape = (params.shape[0], params.shape[2]) if want_shared else (0,)
    return value, to_params, params.new_empty(shape, dtype=kept)


def _check_raw(params, shared, x, likelihood, logvar, factor, want_params, want_shared):  # type: ignore[no-untyped-def]
    """What a direct call of the raw op must keep to; see ``Op``."""
    op = "genfast::log_likelihood"
    check_float_tensor(op, "params", params)
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"{op}: unknown likelihood {likelihood!r}")
    if params.dim() != 3 or x.dim() != 3 or x.shape[2] != params.shape[2] or x.device != params.device:
        raise ValueError(
            f"{op}: params must be [R, Q, S] and x [B, X, S] on one device, got {shape_of(params)} on {params.device} "
            f"and {shape_of(x)} on {x.device}"
        )
    rows, planes, size = params.shape
    batch, targets = x.shape[:2]
    if rows % batch if batch else rows:
        raise ValueError(f"{op}: {rows} rows of params are no multiple of the {batch} of x")
    if likelihood == "discretized_logistic_mixture":
        fits = targets in (1, 3) and planes > 0 and planes % (3 if targets == 1 else 10) == 0
    elif likelihood == "categorical":
        fits = targets == 1 and planes > 0
    else:
        own = _PLANES[likelihood] - (shared is not None)
        fits = targets == 1 and (planes == own or (likelihood == "gaussian" and planes == 1)) and own > 0
    if not fits or (shared is not None and likelihood not in ("gaussian", *_COUNTS)):
        raise ValueError(f"{op}: {planes} parameters for {targets} targets do not fit {likelihood}")
    if x.dtype not in _x_dtypes(likelihood, params.dtype):
        raise TypeError(f"{op}: x may not be {x.dtype} with {likelihood} and params of {params.dtype}")
    if shared is not None and (
        shared.shape not in ((1, size), (batch, size))
        or shared.dtype != wide(params.dtype)
        or shared.device != params.device
    ):
        raise ValueError(f"{op}: shared must be {wide(params.dtype)} of shape (1 or {batch}, {size})")
    if want_shared and shared is None:
        raise ValueError(f"{op}: there is no shared parameter to differentiate by")
    if not math.isfinite(logvar) or not math.isfinite(factor) or factor == 0:
        raise ValueError(f"{op}: logvar and factor must be finite and factor not 0, got {logvar} and {factor}")


def _x_dtypes(likelihood: str, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Target dtypes that the kernels read."""
    if likelihood == "categorical":
        return (torch.int64,)
    bytes_ = (torch.uint8, torch.bool) if likelihood not in _LEVELS else (torch.uint8,)
    if dtype == torch.float64:
        return (torch.float64, *bytes_)
    if likelihood in _LEVELS:
        return (torch.float32, torch.float16, *bytes_)
    return (torch.float32, torch.bfloat16, torch.float16, *bytes_)


_op = Op(
    "log_likelihood(Tensor params, Tensor? shared, Tensor x, str likelihood, float logvar, float factor, "
    "bool want_params, bool want_shared) -> (Tensor value, Tensor to_params, Tensor to_shared)",
    {
        "triton": Backend(native.triton, native.triton_supports),
        "cpp": Backend(native.cpp),
        "reference": Backend(_run_reference),
    },
    _fake,
    check=_check_raw,
)


# ---- derivative rules ----


def _scaled(cotangent: Tensor, held: Tensor, factor: float) -> Tensor:
    """held [R, ...] times cotangent [R] / factor; zero where the cotangent is, whatever is held."""
    rows = cotangent.reshape(-1, *(1,) * (held.dim() - 1))
    ratio = rows if factor == 1.0 else rows / factor
    return torch.where(rows == 0, 0.0, held * ratio).to(held.dtype)


def _may_overwrite(cotangent: Tensor, held: Tensor) -> bool:
    """Whether nobody can need what the forward pass kept again: it may become the gradient."""
    return (
        type(cotangent) is Tensor
        and type(held) is Tensor
        and native.can_scale(held)
        and not _is_legacy_batched(cotangent)
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and not torch._C._len_torch_dispatch_stack()
        and held.is_contiguous()
    )


def _no_derivative_by_x(likelihood: str) -> RuntimeError:
    return RuntimeError(
        f"log_likelihood ({likelihood}): the target x is discrete, there is no derivative by it; detach x"
    )


def _of_x(gradient: Tensor | None, weights: Tensor, likelihood: str) -> Tensor:
    """Of x [K, B, X, S] to [B, X, S], weighted by rows."""
    if gradient is None:
        raise _no_derivative_by_x(likelihood)
    samples, batch = gradient.shape[:2]
    rows = weights.reshape(samples, batch, 1, 1)
    return torch.where(rows == 0, 0.0, gradient * rows).sum(0)


def _of_shared(gradient: Tensor, rows: int) -> Tensor:
    """[R, S] to the shape of the shared parameter."""
    if rows == gradient.shape[0]:
        return gradient
    return gradient.reshape(-1, rows, gradient.shape[-1]).sum(0)


class _LogLikelihood(Formula):
    """The rows' values. In the lean path the kernel writes the gradient with them, times ``factor``."""

    @staticmethod
    def forward(params, shared, x, likelihood, logvar, factor):  # type: ignore[no-untyped-def]
        return _op(params, shared, x, likelihood, logvar, 1.0, False, False)[0]

    @staticmethod
    def lean_forward(params, shared, x, likelihood, logvar, factor):  # type: ignore[no-untyped-def]
        by_shared = shared is not None and shared.requires_grad
        value, *kept = _op(params, shared, x, likelihood, logvar, factor, params.requires_grad, by_shared)
        if not params.requires_grad:
            kept[0] = None
        if not by_shared:
            kept[1] = None
        return value, tuple(kept)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        params, shared, x, ctx.likelihood, ctx.logvar, ctx.factor = inputs
        return params, shared, x

    @staticmethod
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        if cotangent is None:
            return (None,) * 6
        params, shared, x, *kept = ctx.saved_tensors
        by_params, by_shared, by_x = ctx.needs_input_grad[:3]
        to_params = to_shared = to_x = None
        if kept and not torch.is_grad_enabled() and not by_x:
            held, held_shared = kept
            if by_params:
                if not torch.compiler.is_compiling() and _may_overwrite(cotangent, held):
                    to_params = native.scale_rows_(held, cotangent, ctx.factor)
                else:
                    to_params = _scaled(cotangent, held, ctx.factor)
            if by_shared:
                to_shared = _of_shared(_scaled(cotangent, held_shared, ctx.factor), shared.shape[0])
            return to_params, to_shared, None, None, None, None
        gradients = reference_gradients(params, shared, x, ctx.likelihood, ctx.logvar)
        if by_params:
            to_params = _scaled(cotangent, gradients.params, 1.0).to(params.dtype)
        if by_shared and gradients.shared is not None:
            to_shared = _of_shared(_scaled(cotangent, gradients.shared, 1.0), shared.shape[0])
        if by_x:
            to_x = _of_x(gradients.x, cotangent, ctx.likelihood).to(x.dtype)
        return to_params, to_shared, to_x, None, None, None

    @staticmethod
    def jvp(ctx, params_tangent, shared_tangent, x_tangent, *_):  # type: ignore[no-untyped-def]
        params, shared, x = ctx.saved_tensors[:3]
        gradients: Gradients = reference_gradients(params, shared, x, ctx.likelihood, ctx.logvar)
        tangent = gradients.params.new_zeros(params.shape[0])
        if params_tangent is not None:
            tangent = tangent + _dot(gradients.params, params_tangent)
        if shared_tangent is not None and gradients.shared is not None:
            repeats = params.shape[0] // shared.shape[0] if shared.shape[0] else 0
            tangent = tangent + _dot(gradients.shared, shared_tangent.repeat(repeats, 1))
        if x_tangent is not None:
            if gradients.x is None:
                raise _no_derivative_by_x(ctx.likelihood)
            tangent = tangent + _dot(gradients.x, x_tangent.unsqueeze(0)).reshape(tangent.shape)
        return tangent


def _dot(gradient: Tensor, tangent: Tensor) -> Tensor:
    """Row by row; a zero tangent counts as zero whatever the gradient. The rows of x are [K, B]."""
    product = torch.where(tangent == 0, 0.0, gradient * tangent.to(gradient.dtype))
    dims = 2 if product.dim() == 4 else product.dim() - 1
    return product.flatten(-dims).sum(-1)


def _composite(params, shared, x, likelihood, logvar, factor):  # type: ignore[no-untyped-def]
    return reference(params, shared, x, likelihood, logvar)


_call = differentiable(_LogLikelihood, _composite)


def _tie(params, shared, x, likelihood, logvar, factor, want_params, want_shared):  # type: ignore[no-untyped-def]
    """Gradients through torch.ops.genfast.log_likelihood itself."""
    value = _call(params, shared, x, likelihood, logvar, 1.0)
    empty, kept = params.new_empty(0), wide(params.dtype)
    to_params, to_shared = empty, empty.to(kept)
    if want_params or want_shared:
        gradients = reference_gradients(params, shared, x, likelihood, logvar)
        if want_params:
            to_params = (gradients.params * factor).to(params.dtype)
        if want_shared and gradients.shared is not None:
            to_shared = gradients.shared * factor
    return value, to_params, to_shared


_op.tie = _tie


# ---- public ----


def scale_logvar(op: str, scale: Any) -> float:
    if isinstance(scale, (bool, Tensor)) or not hasattr(scale, "__float__"):
        raise TypeError(f"{op}: scale must be a float (a tensor goes to logvar=, as 2 log scale), got {_kind(scale)}")
    scale = float(scale)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"{op}: scale must be positive and finite, got {scale}")
    return 2.0 * math.log(scale)


def _kind(value: Any) -> str:
    return type(value).__name__


def _target(op: str, x: Any, likelihood: str, out: Tensor) -> Tensor:
    """x in a dtype that the kernels read, its values kept."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a torch.Tensor, got {_kind(x)}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{op}: x must be a dense (strided) tensor")
    if x.device != out.device:
        raise ValueError(f"{op}: x is on {x.device}, decoder_out on {out.device}; move them to one device")
    dtype = x.dtype
    if likelihood == "categorical":
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise TypeError(f"{op} (categorical): x must hold integer classes (int64), got {dtype}")
        return x.to(torch.int64)
    if dtype in _x_dtypes(likelihood, out.dtype):
        return x
    if likelihood in _LEVELS and dtype == torch.bfloat16:
        raise TypeError(f"{op} ({likelihood}): bfloat16 cannot hold k / 255; pass x as uint8 levels or in float32")
    if dtype not in FLOATS and (dtype.is_complex or dtype.is_floating_point or dtype == torch.bool):
        raise TypeError(f"{op} ({likelihood}): x may not be {dtype}")
    if likelihood in _LEVELS and not dtype.is_floating_point:  # levels too; the floating-point form is k / 255
        if x.is_cpu and x.numel() and not torch.compiler.is_compiling() and bool(((x < 0) | (x > 255)).any()):
            raise native.bad_target(likelihood, out)
        return x.to(torch.uint8)
    return x.to(wide(out.dtype))


def _channels(op: str, out: Tensor, x: Tensor, likelihood: str, given: bool) -> tuple[int, int | None]:
    """(planes, K or None) after a check of decoder_out's shape."""
    classes = likelihood == "categorical"
    extra = out.dim() - x.dim() - classes
    if extra not in (0, 1) or x.dim() == 0:
        wanted = "[B, classes, ...] for x [B, ...]" if classes else "[B, C, ...] like x"
        raise ValueError(
            f"{op} ({likelihood}): decoder_out must be {wanted}, with or without a leading dimension of samples; "
            f"got {shape_of(out)} for x {shape_of(x)}"
        )
    samples = out.shape[0] if extra else None
    shape = out.shape[extra:]
    if classes:
        fits, planes, wanted = shape[:1] + shape[2:] == x.shape and shape[1] > 0, shape[1], "one more dimension"
    elif likelihood in _UNIT or (likelihood == "gaussian" and (given or shape == x.shape)):
        fits, planes, wanted = shape == x.shape, 1, "the shape of x"
    elif x.dim() < 2:
        fits, planes, wanted = False, 0, "an x with channels in dimension 1"
    else:
        mine, theirs = shape[1], x.shape[1]
        rest = shape[:1] + shape[2:] == x.shape[:1] + x.shape[2:]
        if likelihood == "discretized_logistic_mixture":
            per = 3 if theirs == 1 else 10
            fits = rest and theirs in (1, 3) and mine > 0 and mine % per == 0
            planes, wanted = mine, "3 M channels for x with 1 channel, or 10 M for 3"
        else:
            planes = _PLANES[likelihood] - given
            fits = rest and mine == planes * theirs
            wanted = f"{planes} times the channels of x"
    if not fits:
        raise ValueError(
            f"{op} ({likelihood}): decoder_out must have {wanted}; got {shape_of(out)} for x {shape_of(x)}"
            + (", or its shape with a fixed or shared variance" if likelihood == "gaussian" and not given else "")
        )
    return planes, samples


def _shared(op: str, name: str, value: Any, out: Tensor, x: Tensor) -> Tensor:
    """A parameter that broadcasts against x, as [1 or B, S]."""
    check_float_tensor(op, name, value)
    if value.device != out.device:
        raise ValueError(f"{op}: {name} is on {value.device}, decoder_out on {out.device}; move them to one device")
    if value.dim() > x.dim() or any(
        a not in (1, b) for a, b in zip(reversed(value.shape), reversed(x.shape), strict=False)
    ):
        raise ValueError(f"{op}: {name} must broadcast to x {shape_of(x)}, got shape {shape_of(value)}")
    rows = x.shape[0] if value.dim() == x.dim() and value.shape[0] != 1 else 1
    return value.to(wide(out.dtype)).expand(rows, *x.shape[1:]).reshape(rows, math.prod(x.shape[1:]))


def mean_factor(decoder_out: Tensor, x: Tensor, likelihood: str) -> float:
    """The cotangent of a row where minus the mean over all rows is differentiated: ``rows_log_likelihood``'s factor."""
    if decoder_out.dtype == torch.float16 or decoder_out.dim() == 0 or x.dim() == 0:
        return 1.0  # float16 holds gradients unscaled, because the scaled are too small
    sampled = decoder_out.dim() - x.dim() - (likelihood == "categorical") == 1
    return -1.0 / max(x.shape[0] * (decoder_out.shape[0] if sampled else 1), 1)


def rows_log_likelihood(
    op: str,
    decoder_out: Tensor,
    x: Tensor,
    likelihood: str,
    scale: float | None,
    logvar: Tensor | None,
    log_theta: Tensor | None,
    factor: float,
) -> Tensor:
    """``log_likelihood`` whose gradient the forward pass writes times ``factor``, the cotangent to be expected."""
    check_float_tensor(op, "decoder_out", decoder_out)
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"{op}: unknown likelihood {likelihood!r}; choose one of {', '.join(LIKELIHOODS)}")
    if likelihood != "gaussian" and (scale is not None or logvar is not None):
        raise ValueError(f"{op}: scale and logvar are of the gaussian likelihood, not of {likelihood}")
    if likelihood not in _COUNTS and log_theta is not None:
        raise ValueError(f"{op}: log_theta is of the negative binomials, not of {likelihood}")
    if scale is not None and logvar is not None:
        raise ValueError(f"{op}: give either scale or logvar, not both")
    fixed = 0.0 if scale is None else scale_logvar(op, scale)
    x = _target(op, x, likelihood, decoder_out)
    given = logvar is not None or log_theta is not None
    planes, samples = _channels(op, decoder_out, x, likelihood, given or scale is not None)
    common = None
    if given:
        name = "logvar" if log_theta is None else "log_theta"
        common = _shared(op, name, logvar if log_theta is None else log_theta, decoder_out, x)
    batch = x.shape[0]
    if likelihood == "discretized_logistic_mixture":
        targets, size = x.shape[1], math.prod(x.shape[2:])
    else:
        targets, size = 1, math.prod(x.shape[1:])
    params = decoder_out.reshape(batch * (1 if samples is None else samples), planes, size)
    value = _call(params, common, x.reshape(batch, targets, size), likelihood, fixed, factor)
    return value if samples is None else value.reshape(samples, batch)


def log_likelihood(
    decoder_out: Tensor,
    x: Tensor,
    *,
    likelihood: str = "bernoulli",
    scale: float | None = None,
    logvar: Tensor | None = None,
    log_theta: Tensor | None = None,
) -> Tensor:
    """log p(x | decoder_out) in nats, one value a row; the gradient is written in the same pass.

    The backward pass is one multiplication by a row's cotangent: it reads neither x nor decoder_out again, and writes
    in place where the graph is used once.

    =================================== ============================================= ==============================
    likelihood                          decoder_out, for x [B, C, ...]                x
    =================================== ============================================= ==============================
    ``bernoulli``                       logits, like x                                [0, 1]
    ``continuous_bernoulli``            logits, like x                                [0, 1]
    ``gaussian``                        mean, like x; or 2 C: means, log variances    any
    ``categorical``                     logits [B, classes, ...] for x [B, ...]       integers
    ``discretized_logistic``            2 C: means, log scales                        8-bit levels
    ``discretized_logistic_mixture``    3 M (C = 1) or 10 M (C = 3)                   8-bit levels
    ``negative_binomial``               2 C: log means, log theta; or C: log means    counts
    ``zero_inflated_negative_binomial`` 3 C: log means, log theta, logits; or 2 C     counts
    =================================== ============================================= ==============================

    Parameters lie on dimension 1, in the order named. 8-bit levels are integers in [0, 255] or k / 255 in floating
    point; means and log scales are of 2 k / 255 - 1, in [-1, 1], the outer bins are open to infinity, and log scales
    below -7 act as -7. A mixture's parameters are PixelCNN++'s: M weights (logits), then for each channel M means,
    M log scales and, for three channels, M couplings, whose tanh are the weights of red in green, of red in blue and
    of green in blue. Of the negative binomials theta is the inverse dispersion, the variance is mean + mean^2 / theta,
    and sigmoid(logits) the probability of an extra zero.

    Args:
        decoder_out: [B, ...], or [K, B, ...] for K samples of each x; float32, float64, bfloat16 or float16.
        x: targets [B, ...], never repeated in memory; floating point, uint8 or (Bernoulli) bool; integers for classes.
        likelihood: one of those above.
        scale: of ``gaussian``: the fixed standard deviation, positive; with neither this nor ``logvar`` it is 1, or
            predicted where decoder_out has twice the channels of x.
        logvar: of ``gaussian``: log of a variance that broadcasts to x, such as one learned scalar.
        log_theta: of the negative binomials: a log inverse dispersion that broadcasts to x, such as one a feature;
            decoder_out then has no theta.

    Returns:
        [B] or [K, B], summed over all other dimensions; float64 for float64 and float32 otherwise. Differentiable to
        every order in reverse and forward mode by decoder_out, logvar and log_theta, and by x where x is continuous.

    Raises:
        TypeError: for something else than tensors of the dtypes above, or a scale that is no number.
        ValueError: for an unknown likelihood, shapes that do not fit, a scale that is not positive and finite, tensors
            on several devices; on the CPU also for targets outside of the likelihood's (on a GPU their rows are NaN).
        RuntimeError: when a derivative by a discrete x is asked for.

    Source: Kingma and Welling 2014; Loaiza-Ganem and Cunningham, "The continuous Bernoulli", NeurIPS 2019; Salimans et
    al., "PixelCNN++", ICLR 2017; Lopez et al., "Deep generative modeling for single-cell transcriptomics", 2018.

    Examples:
        >>> logits, x = torch.zeros(2, 3), torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.5]])
        >>> log_likelihood(logits, x)  # 3 log(1/2)
        tensor([-2.0794, -2.0794])
        >>> levels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
        >>> log_likelihood(torch.zeros(5, 4, 100, 8, 8), levels, likelihood="discretized_logistic_mixture").shape
        torch.Size([5, 4])
    """
    return rows_log_likelihood("log_likelihood", decoder_out, x, likelihood, scale, logvar, log_theta, 1.0)
