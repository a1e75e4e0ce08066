"""Parallel tempering of RBM chains, and the joint energy that its swaps compare; docs/kernels/rbm_tempering.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from genfast import random
from genfast._checks import check_count, check_float_tensor, shape_of, wide
from genfast._op import Backend, Op
from genfast.ops._rbm_common import checked_parameters, checked_position, checked_precision, checked_states
from genfast.ops._rbm_units import GAUSSIAN, RELU, Units, parse_units, visible_energy
from genfast.ops.rbm_gibbs import check_pair, rbm_gibbs
from genfast.ops.rbm_half_step import reference_logits
from genfast.ops.rbm_log_z_exact import checked_variance

__all__ = ["TemperingResult", "joint_energy", "rbm_tempering"]

Tensor = torch.Tensor


class TemperingResult(NamedTuple):
    """States after the last swap, [R, T, V], and the fraction of accepted swaps of each pair of neighbours, [T - 1]."""

    visible: Tensor
    swap_rate: Tensor


# opaque to a compiler, for the reason that genfast.ops._noise gives
_swap_uniforms = Op(
    "philox_rbm_swap(Tensor seed, SymInt replicas, SymInt pairs, SymInt row_offset, SymInt step) -> Tensor",
    {
        "reference": Backend(
            lambda seed, replicas, pairs, row_offset, step: random.rbm_uniform(
                replicas, pairs, seed, row_offset=row_offset, step=step, stream=random.RBM_SWAP
            ).contiguous()
        )
    },
    lambda seed, replicas, pairs, *_: seed.new_empty((replicas, pairs), dtype=torch.float32),
    internal=True,
)


def _energies(
    v: Tensor, h: Tensor, W: Tensor, b: Tensor, c: Tensor, logvar: Tensor | None,
    visible_units: Units, hidden_units: Units, precision: str,
) -> Tensor:  # fmt: skip
    """E(v, h), [rows], float64: the product W h in the arithmetic's dtype, all sums over units in float64."""
    inputs = reference_logits(h, W, None, logvar, False, precision).to(torch.float64)  # [rows, V]
    v, h, b, c = (t.to(torch.float64) for t in (v, h, b, c))
    logvar = None if logvar is None else logvar.to(torch.float64)
    scaled = v if logvar is None else v * torch.exp(-logvar)
    energy = visible_energy(v, b, visible_units, logvar) - (scaled * inputs).sum(-1) - h @ c
    if hidden_units.kind in (GAUSSIAN, RELU):
        energy = energy + 0.5 * h.square().sum(-1)
    return energy


def joint_energy(
    v: Tensor,
    h: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    logvar: Tensor | None = None,
    visible: str = "bernoulli",
    hidden: str = "bernoulli",
) -> Tensor:
    """The energy E(v, h) of joint states, so that p(v, h) is proportional to exp(-E(v, h)); differentiable.

    For bernoulli and softmax units it is -v'b - h'c - v'W h; ``rbm_free_energy`` is -log of the sum of exp(-E) over h.

    Args:
        v: visible states [..., V]; floating-point, uint8 or bool.
        h: hidden states [..., H], with the leading dimensions of ``v``.
        W: weights [V, H], float32, float64, bfloat16 or float16.
        b: visible bias [V], in W's dtype.
        c: hidden bias [H], in W's dtype.
        logvar: log variances [V] of Gaussian visible units; None for variance 1.
        visible: kind of the visible units, see ``rbm_gibbs``.
        hidden: kind of the hidden units.

    Returns:
        [...], nats, float32, or float64 where W is.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind or shape.

    Examples:
        >>> W, b, c = torch.ones(3, 2), torch.zeros(3), torch.ones(2)
        >>> joint_energy(torch.ones(1, 3), torch.tensor([[1.0, 0.0]]), W, b, c)
        tensor([-4.])
    """
    name = "joint_energy"
    V, H = checked_parameters(name, W, b, c, v if isinstance(v, Tensor) else None)
    v, h = checked_states(name, "v", v, V), checked_states(name, "h", h, H)
    if v.shape[:-1] != h.shape[:-1] or h.device != v.device:
        raise ValueError(
            f"{name}: v and h must share leading dimensions and device, got {shape_of(v)} on {v.device} and "
            f"{shape_of(h)} on {h.device}"
        )
    check_pair(name, visible, hidden, V, H)
    energies = _energies(
        v.reshape(-1, V), h.reshape(-1, H), W, b, c, checked_variance(name, logvar, W, visible),
        parse_units(name, "visible", visible, V), parse_units(name, "hidden", hidden, H), "fp32",
    )  # fmt: skip
    return energies.to(wide(W.dtype)).view(v.shape[:-1])


def _swaps(energies: Tensor, betas: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """(order, accepted): the index [R, T] of the state that each temperature takes, and the swaps made [R, T - 1].

    Pairs (0, 1), (2, 3), ... come first, then (1, 2), (3, 4), ... with the states where the first ones left them.
    """
    replicas, temperatures = energies.shape
    order = torch.arange(temperatures, device=energies.device).expand(replicas, -1).clone()
    accepted = torch.zeros_like(uniforms, dtype=torch.bool)
    for parity in (0, 1):
        low = torch.arange(parity, temperatures - 1, 2, device=energies.device)
        first, second = order[:, low], order[:, low + 1]
        gap = energies.gather(1, first) - energies.gather(1, second)
        chance = torch.exp(((betas[low] - betas[low + 1]) * gap).clamp(max=0.0))
        accept = uniforms[:, low] < chance
        order[:, low] = torch.where(accept, second, first)
        order[:, low + 1] = torch.where(accept, first, second)
        accepted[:, low] = accept
    return order, accepted


def rbm_tempering(
    v: Tensor,
    W: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    betas: Sequence[float] | Tensor,
    k: int = 1,
    seed: int | Tensor | None = None,
    logvar: Tensor | None = None,
    visible: str = "bernoulli",
    hidden: str = "bernoulli",
    precision: str = "fp32",
    replica_offset: int = 0,
    step: int = 0,
) -> TemperingResult:
    """Runs k sweeps of parallel tempering: a Gibbs step at every temperature, then swaps of neighbours. **Not
    differentiable.**

    Temperature t samples exp(-betas[t] E(v, h)). A swap of neighbours i and j is accepted with probability
    min(1, exp((beta_i - beta_j) (E_i - E_j))), E the joint energy of each visible state with the hidden state that it
    was drawn from. (Free energies would not do: beta F(v) is not the free energy at beta.) Each sweep tries every pair
    once, even ones first.

    Args:
        v: visible states [R, T, V] of R independent replicas at T temperatures; floating-point, uint8 or bool.
        W: weights [V, H].
        b: visible bias [V], in W's dtype.
        c: hidden bias [H], in W's dtype.
        betas: inverse temperatures [T], increasing, the last 1; at least 0, or above 0 with Gaussian or rectified
            units. Rounded to float32 unless W is float64.
        k: number of sweeps, at least 1.
        seed: int or 0-d int64 tensor; None draws it from torch's default generator.
        logvar: log variances [V] of Gaussian visible units; None for variance 1.
        visible: kind of the visible units, see ``rbm_gibbs``.
        hidden: kind of the hidden units.
        precision: of the products, see ``rbm_half_step``.
        replica_offset: global index of the first replica: replicas split over calls draw what the whole would.
        step: half-step to start from; a run is continued with the same seed at ``step + 2k``.

    Returns:
        ``TemperingResult(visible [R, T, V], swap_rate [T - 1])``; ``visible[:, -1]`` are the model's samples. Rates far
        below 0.2 call for more temperatures.

    Raises:
        RuntimeError: when a derivative is asked for.
        TypeError, ValueError: for arguments of the wrong kind, shape or range, and (on the CPU) NaN or infinity.

    Source: Swendsen and Wang, 1986; Desjardins et al., "Tempered Markov chain Monte Carlo for training of restricted
    Boltzmann machines", AISTATS 2010; Cho, Raiko and Ilin, "Parallel tempering is efficient for learning restricted
    Boltzmann machines", IJCNN 2010.

    Examples:
        >>> W, b, c = torch.randn(6, 4), torch.zeros(6), torch.zeros(4)
        >>> result = rbm_tempering(torch.zeros(50, 3, 6), W, b, c, betas=[0.2, 0.6, 1.0], k=10, seed=1)
        >>> samples = result.visible[:, -1]  # [50, 6]
        >>> bool((result.swap_rate > 0).all())
        True
    """
    name = "rbm_tempering"
    V, H = checked_parameters(name, W, b, c, v if isinstance(v, Tensor) else None)
    v = checked_states(name, "v", v, V)
    if v.dim() != 3:
        raise ValueError(f"{name}: v must be [R, T, {V}], replicas by temperatures, got {shape_of(v)}")
    check_pair(name, visible, hidden, V, H)
    visible_units = parse_units(name, "visible", visible, V)
    hidden_units = parse_units(name, "hidden", hidden, H)
    replicas, temperatures = v.shape[:2]
    continuous = visible_units.kind == GAUSSIAN or hidden_units.kind in (GAUSSIAN, RELU)
    scale = _checked_betas(name, betas, temperatures, W, continuous)
    k = check_count(name, "k", k, 1)
    logvar = checked_variance(name, logvar, W, visible)
    precision = checked_precision(name, precision)
    replica_offset = check_count(name, "replica_offset", replica_offset, 0)
    rows = v.reshape(-1, V)
    if (replica_offset + replicas) * temperatures > 2**32:
        raise ValueError(
            f"{name}: chains (replica * {temperatures} + temperature) are numbered below 2^32; {replicas} replicas "
            f"from {replica_offset} on pass it"
        )
    _, step = checked_position(name, rows.shape[0], replica_offset * temperatures, step, 2 * k)
    seed = random.as_seed(seed, W.device)
    swap_seed, row_betas = seed.to(W.device), scale.repeat(replicas)
    swaps = torch.zeros(temperatures - 1, dtype=torch.float64, device=W.device)
    for half_step in range(step, step + 2 * k, 2):
        rows, h = rbm_gibbs(
            rows, W, b, c, k=1, seed=seed, beta=row_betas, logvar=logvar, visible=visible, hidden=hidden,
            precision=precision, chain_offset=replica_offset * temperatures, step=half_step,
        )  # fmt: skip
        if temperatures == 1:
            continue
        assert h is not None
        with torch.no_grad():
            energies = _energies(rows, h, W, b, c, logvar, visible_units, hidden_units, precision)
            uniforms = _swap_uniforms(swap_seed, replicas, temperatures - 1, replica_offset, half_step + 1)
            order, accepted = _swaps(energies.view(replicas, temperatures), scale.to(torch.float64), uniforms)
            swaps += accepted.sum(0)
        states = rows.view(replicas, temperatures, V)
        rows = states.gather(1, order.unsqueeze(-1).expand_as(states)).view(-1, V)
    return TemperingResult(rows.view(replicas, temperatures, V), (swaps / (replicas * k)).to(wide(W.dtype)))


def _checked_betas(op: str, betas: Any, temperatures: int, W: Tensor, continuous: bool) -> Tensor:
    """The inverse temperatures [T] in the arithmetic's dtype, on W's device."""
    if not isinstance(betas, Tensor):
        if isinstance(betas, (str, bytes)) or not hasattr(betas, "__iter__"):
            raise TypeError(f"{op}: betas must be a sequence or tensor of floats, got {type(betas).__name__}")
        betas = torch.tensor([float(beta) for beta in betas], dtype=torch.float64, device="cpu")
    check_float_tensor(op, "betas", betas)
    if betas.dim() != 1 or betas.shape[0] == 0 or betas.shape[0] != temperatures:
        raise ValueError(
            f"{op}: betas must have shape ({temperatures},), one a temperature of v, got {shape_of(betas)}"
        )
    betas = betas.detach()
    hidden = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if not hidden and not (betas.is_cuda and torch.cuda.is_current_stream_capturing()):
        values = betas.to(device="cpu", dtype=torch.float64)
        least = values[0].item()
        if not (values[-1] == 1 and bool((values.diff() > 0).all()) and (least > 0 or (least == 0 and not continuous))):
            bound = "above 0" if continuous else "at least 0"
            raise ValueError(f"{op}: betas must increase from a value {bound} to 1, got {values.tolist()}")
    return betas.to(device=W.device, dtype=wide(W.dtype))
