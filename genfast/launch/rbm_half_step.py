"""Launches the half-step kernels."""

from __future__ import annotations

from typing import Any

import torch

from genfast.launch._common import device_guard
from genfast.ops._rbm_common import unpacked

Tensor = torch.Tensor


@unpacked
def triton(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    logvar: Tensor | None,
    beta: Tensor | None,
    seed: Tensor,
    up: bool,
    units: str,
    precision: str,
    chain_offset: int,
    step: int,
    sample_dtype: torch.dtype,
    return_mean: bool,
) -> Any:
    from genfast.kernels.triton import rbm_half_step as kernels

    kind = kernels.KINDS[units]
    with device_guard(W):
        result = kernels.half_step(
            kernels.states(x), kernels.scaled(W, logvar if up else None), None if bias is None else bias.contiguous(),
            up=up, kind=kind, precision=precision, beta=beta,
            sigma=None if up or kind != kernels.GAUSSIAN else kernels.sigma_of(logvar),
            seed=seed, chain_offset=chain_offset, step=step, state_dtype=sample_dtype,
            mean_dtype=W.dtype if return_mean else None,
        )  # fmt: skip
    return result.state, result.mean
