"""Launches the kernels of contrastive divergence."""

from __future__ import annotations

from typing import Any

import torch

from genfast.launch._common import device_guard

Tensor = torch.Tensor


def triton(v: Tensor, *args: Any) -> Any:
    """Half-steps that also leave their share of the statistics, and the gradient as one sum of two products."""
    with device_guard(v):
        return _triton(v, *args)


def _triton(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    chains: Tensor | None,
    logvar: Tensor | None,
    visible_offset: Tensor | None,
    hidden_offset: Tensor | None,
    seed: Tensor,
    k: int,
    visible: str,
    hidden: str,
    precision: str,
    sample_hidden: bool,
    chain_offset: int,
    step: int,
) -> Any:
    from genfast.kernels.triton import rbm_free_energy as energies
    from genfast.kernels.triton import rbm_half_step as kernels

    dtype = W.dtype
    visible_kind, hidden_kind = kernels.KINDS[visible], kernels.KINDS[hidden]
    binary_v, binary_h = visible_kind == kernels.BERNOULLI, hidden_kind == kernels.BERNOULLI
    between = kernels.compact(hidden_kind, dtype)
    sigma = None if binary_v else kernels.sigma_of(logvar)
    W, W_up, b, c = W.contiguous(), kernels.scaled(W, logvar), b.contiguous(), c.contiguous()
    up: dict[str, Any] = {"up": True, "kind": hidden_kind}
    down: dict[str, Any] = {
        "up": False, "kind": visible_kind, "small_integers": binary_h, "sigma": sigma,
    }  # fmt: skip
    common: dict[str, Any] = {"precision": precision, "seed": seed, "chain_offset": chain_offset}
    # What the gradient takes of either phase: samples or means, in float32.
    taken = {"state_dtype": torch.float32} if sample_hidden else {"mean_dtype": torch.float32}
    persistent = chains is not None

    data = (v.to(dtype) if v.is_floating_point() else v).contiguous()
    positive_step = step + 2 * k + 1 if persistent else step
    wanted = taken if persistent or sample_hidden else {**taken, "state_dtype": between}
    first = kernels.half_step(data, W_up, c, step=positive_step, want_log_partition=True, **wanted, **up, **common)
    positive = first.state if sample_hidden else first.mean

    model: Any = data if chains is None else chains.to(dtype, copy=True, memory_format=torch.contiguous_format)
    h: Any = None if persistent else first.state.to(between)
    error = None
    for t in range(k):
        last = t == k - 1
        if h is None:
            h = kernels.half_step(
                model, W_up, c, small_integers=binary_v and t > 0, step=step + 2 * t, state_dtype=between,
                **up, **common,
            ).state  # fmt: skip
        drawn = kernels.half_step(
            h, W, b, step=step + 2 * t + 1, state_dtype=dtype if last else kernels.compact(visible_kind, dtype),
            want_error=last and not persistent, target=data if last and not persistent else None, **down, **common,
        )  # fmt: skip
        model, error, h = drawn.state, drawn.error, None
    final = kernels.half_step(
        model, W_up, c, small_integers=binary_v and k > 0, step=step + 2 * k, want_log_partition=True,
        **taken, **up, **common,
    )  # fmt: skip
    negative = final.state if sample_hidden else final.mean

    gap = energies.finish(data, b, logvar, first.log_partition, not binary_v).mean()
    gap = gap - energies.finish(model, b, logvar, final.log_partition, not binary_v).mean()
    mistakes = torch.zeros_like(gap) if error is None else error.sum(0).mean()
    gradients = _gradients(data, positive, model, negative, logvar, visible_offset, hidden_offset)
    statistics = torch.stack((mistakes, gap))
    return *(x.to(dtype) for x in gradients), model, statistics, positive.mean(0).to(dtype)


def _gradients(
    data: Tensor,
    positive: Tensor,
    model: Tensor,
    negative: Tensor,
    logvar: Tensor | None,
    visible_offset: Tensor | None,
    hidden_offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dW, db, dc) in float32, by products over the chains of both phases."""
    data, model = data.to(torch.float32), model.to(torch.float32)
    if logvar is not None:
        precision = torch.exp(-logvar.to(torch.float32))
        data, model = data * precision, model * precision
    dW = torch.mm(model.T, negative / model.shape[0])
    dW = torch.addmm(dW, data.T, positive, alpha=-1.0 / data.shape[0])
    db, dc = model.mean(0) - data.mean(0), negative.mean(0) - positive.mean(0)
    if visible_offset is not None:
        visible_offset = visible_offset.to(torch.float32)
        dW = torch.addr(dW, visible_offset, dc, alpha=-1.0)
    if hidden_offset is not None:
        hidden_offset = hidden_offset.to(torch.float32)
        dW = torch.addr(dW, db, hidden_offset, alpha=-1.0)
        db = db - dW @ hidden_offset
    if visible_offset is not None:
        dc = dc - dW.T @ visible_offset
    return dW, db, dc
