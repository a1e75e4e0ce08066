"""Launches the log-likelihood kernels; csrc/vae/log_likelihood.h has the calling convention."""

from __future__ import annotations

import torch

from genfast import _dispatch
from genfast._checks import wide
from genfast._native import DTYPE_CODES, C, execution
from genfast.launch._common import device_guard, pointer
from genfast.ops._log_likelihood_reference import LIKELIHOODS

Tensor = torch.Tensor

_CODES = {name: code for code, name in enumerate(LIKELIHOODS)}
_X_CODES = DTYPE_CODES | {torch.int64: 6}

BAD_TARGET = {
    "bernoulli": "x must be in [0, 1]",
    "continuous_bernoulli": "x must be in [0, 1]",
    "categorical": "x must be classes in [0, {planes})",
    "discretized_logistic": "x must be 8-bit levels: integers in [0, 255], or k / 255 in floating point",
    "discretized_logistic_mixture": "x must be 8-bit levels: integers in [0, 255], or k / 255 in floating point",
    "negative_binomial": "x must be counts, finite and at least 0",
    "zero_inflated_negative_binomial": "x must be counts, finite and at least 0",
}


def bad_target(likelihood: str, params: Tensor) -> ValueError:
    text = BAD_TARGET[likelihood].format(planes=params.shape[1])
    return ValueError(f"log_likelihood ({likelihood}): {text}; got values outside")


def cpp(params, shared, x, likelihood, logvar, factor, want_params, want_shared):  # type: ignore[no-untyped-def]
    params, x = params.contiguous(), x.contiguous()
    rows, planes, size = params.shape
    kept = wide(params.dtype)
    value = params.new_empty(rows, dtype=kept)
    to_params = torch.empty_like(params) if want_params else None
    to_shared = params.new_empty((rows, size), dtype=kept) if want_shared else None
    if shared is not None:
        shared = shared.contiguous()
    valid = C.cpu.log_likelihood(
        _CODES[likelihood], DTYPE_CODES[params.dtype], _X_CODES[x.dtype], params.data_ptr(), pointer(shared),
        x.data_ptr(), value.data_ptr(), pointer(to_params), pointer(to_shared), rows, planes, size, x.shape[1],
        x.shape[0], 1 if shared is None else shared.shape[0], logvar, factor, execution(params),
    )  # fmt: skip
    if not valid:
        raise bad_target(likelihood, params)
    return value, to_params, to_shared


def triton(params, shared, x, likelihood, logvar, factor, want_params, want_shared):  # type: ignore[no-untyped-def]
    from genfast.kernels.triton import log_likelihood as kernels

    params, x = params.contiguous(), x.contiguous()
    rows, _, size = params.shape
    to_params = torch.empty_like(params) if want_params else None
    to_shared = params.new_empty((rows, size), dtype=torch.float32) if want_shared else None
    if params.numel() == 0:
        return params.new_zeros(rows, dtype=torch.float32), to_params, to_shared
    shared = None if shared is None else shared.contiguous()
    with device_guard(params):
        value = kernels.run(params, shared, x, likelihood, logvar, factor, to_params, to_shared)
    return value, to_params, to_shared


def triton_supports(params: Tensor, *rest: object) -> str | None:
    if params.dtype == torch.float64:
        return "float64 runs on the cpp and reference backends"
    return None


def can_scale(values: Tensor) -> bool:
    """Whether the backend in force has ``scale_rows_`` for this tensor."""
    backend = _dispatch.current_backend()
    if values.is_cpu and backend in ("auto", "cpp"):
        return True
    return (
        (values.is_cuda or values.is_cpu)
        and backend in ("auto", "triton")
        and values.dtype != torch.float64
        and _dispatch.is_available("triton")
    )


def scale_rows_(values: Tensor, cotangent: Tensor, held: float) -> Tensor:
    """values [R, ...] times cotangent [R] / held, in place; a zero cotangent makes zeros."""
    if not values.numel():
        return values
    cotangent = cotangent.contiguous()
    if values.is_cpu and _dispatch.current_backend() != "triton":
        rows = cotangent.shape[0]
        C.cpu.scale_rows(
            DTYPE_CODES[values.dtype], values.data_ptr(), cotangent.data_ptr(), rows, values.numel() // rows, held,
            execution(values),
        )  # fmt: skip
        return values
    from genfast.kernels.triton import log_likelihood as kernels

    with device_guard(values):
        kernels.scale_rows_(values, cotangent, held)
    return values
