"""Persistent chains of an RBM: the samplers that move them, and what data-parallel ranks average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genfast import ops, random
from genfast.nn._shard import shard_start
from genfast.ops._rbm_common import HALF_STEPS

if TYPE_CHECKING:
    from genfast.nn.rbm import RBM

__all__ = ["first_chain", "move_offsets", "persistent_gradients"]

_OFFSET_RATE = 0.01  # of the moving averages that center the gradient


def first_chain(states: Any, row_offset: int | None) -> int:
    """Global index of the first of the chains ``states`` [..., units]."""
    if row_offset is not None:
        return row_offset
    return shard_start(math.prod(states.shape[:-1]) if isinstance(states, Tensor) else 0)


def persistent_gradients(*args: Any) -> ops.RBMGradients:
    """Moves the chains and takes the gradients there; a call that raises leaves the chains as they were."""
    return (_outside_the_graph if torch.compiler.is_compiling() else _persistent_gradients)(*args)


def _persistent_gradients(
    rbm: RBM,
    v: Tensor,
    k: int,
    fast_rate: float | None,
    fast_decay: float,
    tempering: Sequence[float] | Tensor | None,
    seed: int | Tensor | None,
    row_offset: int | None,
) -> ops.RBMGradients:
    name = "RBM.contrastive_divergence"
    if fast_rate is not None and tempering is not None:
        raise ValueError(f"{name}: fast_rate and tempering do not go together")
    chains = rbm.chains
    if chains.shape[0] == 0:
        chains = rbm._states("v", v, rbm.visible)
        used, step = int(random.as_seed(seed, chains.device)), 0
    elif seed is not None:
        raise ValueError(f"{name}: the chains have a seed already; start_chains sets another")
    else:
        used, step = rbm.chain_seed, rbm.chain_step
    if step + 2 * k > HALF_STEPS:  # never the same counter twice: go on under the next seed
        used, step = (used + 1) % 2**63, 0
    if tempering is not None and chains.dim() == 2:
        chains = chains.unsqueeze(1).expand(-1, len(tempering), -1)
    elif tempering is None and chains.dim() != 2:
        raise ValueError(f"{name}: the chains run at {chains.shape[1]} temperatures; pass tempering or restart them")
    first = shard_start(chains.shape[0]) if row_offset is None else row_offset

    options: dict[str, Any] = {
        "k": k, "seed": used, "step": step, "logvar": rbm.logvar, "visible": rbm.visible_units,
        "hidden": rbm.hidden_units, "precision": rbm.precision,
    }  # fmt: skip
    if tempering is not None:
        chains, rbm.swap_rate = ops.rbm_tempering(
            chains, rbm.W, rbm.b, rbm.c, betas=tempering, replica_offset=first, **options
        )
        result = rbm._gradients(v, chains[:, -1], 0, used, first, step)
    elif fast_rate is not None:
        chains, result = _follow_fast_weights(rbm, v, chains, fast_rate, fast_decay, first, options)
    else:
        result = rbm._gradients(v, chains, k, used, first, step)
        chains = result.chains
    rbm._buffers["chains"] = chains  # past Module.__setattr__, which takes 4 us
    rbm.__dict__.update(chain_seed=used, chain_step=step + 2 * k)
    return result


# The step counter changes every time: compiled, it would be compiled again every time. torch.compiler.disable would
# import torch._dynamo, over a second, with genfast; this one waits until somebody compiles.
_outside_the_graph = torch._disable_dynamo(_persistent_gradients)


def _follow_fast_weights(
    rbm: RBM, v: Tensor, chains: Tensor, rate: float, decay: float, first: int, options: dict[str, Any]
) -> tuple[Tensor, ops.RBMGradients]:
    fast = rbm.fast_W, rbm.fast_b, rbm.fast_c
    pairs = zip((rbm.W, rbm.b, rbm.c), fast, strict=True)
    W, b, c = (slow if quick is None else slow + quick for slow, quick in pairs)
    chains = ops.rbm_gibbs(chains, W, b, c, chain_offset=first, **options).visible
    result = rbm._gradients(v, chains, 0, options["seed"], first, 0)
    gradients = _mean_over_ranks(result.dW, result.db, result.dc)
    rbm.fast_W, rbm.fast_b, rbm.fast_c = (
        -rate * gradient if quick is None else decay * quick - rate * gradient
        for quick, gradient in zip(fast, gradients, strict=True)
    )
    return chains, result


def move_offsets(rbm: RBM, v: Tensor, hidden_mean: Tensor) -> None:
    """Moves the offsets of the centered gradient towards the means of this batch, alike on all ranks."""
    assert rbm.visible_offset is not None
    assert rbm.hidden_offset is not None
    data_mean, hidden_mean = _mean_over_ranks(v.to(rbm.W.dtype).mean(0), hidden_mean)
    rbm.visible_offset.lerp_(data_mean, _OFFSET_RATE)  # in place: DistributedDataParallel holds these tensors
    rbm.hidden_offset.lerp_(hidden_mean, _OFFSET_RATE)


def _mean_over_ranks(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors averaged over the ranks of the process group, in one message; themselves without one."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return tuple(part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True))
