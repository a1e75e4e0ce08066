"""What the trainers of adversarial networks share: seeds by counters, and states as flat dictionaries of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from genfast.optim import EMA

__all__ = [
    "RAMP", "average_state", "check_numbers", "check_optimizer", "check_tensors", "grouped", "load_average",
    "load_optimizer", "optimizer_state", "step_seed",
]  # fmt: skip

RAMP = 10  # of moving averages: their decay is at most (1 + n) / (10 + n) after n updates
_ADAM = ("exp_avg", "exp_avg_sq", "step")
_MASK = 2**64 - 1


def check_numbers(what: str, weights: Mapping[str, float], ema: float, betas: tuple[float, float]) -> None:
    """Raises a ValueError for weights and rates that are not finite or negative, or decays outside [0, 1)."""
    for name, value in weights.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{what}: {name} must be a finite number, at least 0, got {value}")
    for name, value in (("ema", ema), ("betas", betas[0]), ("betas", betas[1])):
        if not 0 <= value < 1:
            raise ValueError(f"{what}: {name} must be in [0, 1), got {value}")


def step_seed(seed: int, step: int, purpose: int) -> int:
    """A seed for one use in one step: splitmix64 of all three numbers."""
    mixed = seed & _MASK
    for part in (step, purpose):
        mixed = (mixed ^ part) + 0x9E3779B97F4A7C15 & _MASK
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
        mixed ^= mixed >> 31
    return mixed >> 1


def grouped(state: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """The entries of each group ``name.``, without it, and under ``""`` those of no group.

    Raises:
        KeyError: for an entry of another group.
    """
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in ("", *names)}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        parts[part if rest else ""][rest or name] = tensor
    return parts


def optimizer_state(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """Adam's tensors as ``parameter.part``; parameters that have had no step have none."""
    state: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        found = optimizer.state.get(parameter, {})
        state |= {f"{name}.{part}": found[part] for part in _ADAM if part in found}
    return state


def check_tensors(what: str, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises a ValueError where the state has not the wanted names and shapes."""
    shapes, found = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (wanted, state))
    for name in sorted(shapes.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{what} lacks the tensor {name}")
        if name not in shapes:
            raise ValueError(f"{what} has no tensor {name}")
        if shapes[name] != found[name]:
            raise ValueError(f"{what} has {name} of shape {tuple(shapes[name])}, not {tuple(found[name])}")


def check_optimizer(what: str, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises a ValueError where the state is neither empty nor that of an optimizer of the network."""
    wanted = {
        f"{name}.{part}": torch.Size() if part == "step" else parameter.shape
        for name, parameter in network.named_parameters()
        for part in _ADAM
    }
    if state and {name: tensor.shape for name, tensor in state.items()} != wanted:
        raise ValueError(f"{what}'s optimizer has buffers that do not fit the model")


def load_optimizer(optimizer: torch.optim.Optimizer, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Takes what ``optimizer_state`` gave and ``check_optimizer`` let pass."""
    optimizer.state.clear()
    if state:
        for name, parameter in network.named_parameters():
            optimizer.state[parameter] = {
                part: state[f"{name}.{part}"].to(parameter.device, copy=True) for part in _ADAM
            }  # fmt: skip


def average_state(ema: EMA[nn.Module]) -> dict[str, Tensor]:
    """``module.`` and what else ``EMA.state_dict`` has, all of it tensors."""
    state = ema.state_dict()
    flat = {f"module.{name}": tensor for name, tensor in state["module"].items()}
    flat |= {f"wide.{name}": tensor for name, tensor in state["wide"].items()}
    return flat | {
        "updates": torch.tensor(state["updates"]), "samples": torch.tensor(state["samples"], dtype=torch.float64)
    }  # fmt: skip


def load_average(ema: EMA[nn.Module], state: Mapping[str, Tensor]) -> None:
    """Takes what ``average_state`` gave and ``check_tensors`` let pass."""
    parts = grouped(state, ("module", "wide"))
    counts = {"updates": int(state["updates"]), "samples": float(state["samples"])}
    ema.load_state_dict({"module": parts["module"], "wide": parts["wide"], **counts})
