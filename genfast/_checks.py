"""Argument checks shared by the ops: messages say what was given and what is supported."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["FLOATS", "check_count", "check_float_tensor", "check_same", "check_seed", "shape_of", "wide"]

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def shape_of(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic, and of what is reported in it: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_float_tensor(op: str, name: str, value: Any) -> None:
    """``TypeError`` unless ``value`` is a dense float32, float64, bfloat16 or float16 tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16, got {value.dtype}; "
            "convert it, e.g. with .float()"
        )
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor, got {kind}")


def check_same(op: str, name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """``ValueError`` or ``TypeError`` unless two tensors share shape, device and dtype."""
    if value.shape != other.shape:
        raise ValueError(
            f"{op}: {name} has shape {shape_of(value)}, {other_name} {shape_of(other)}; they must be equal"
        )
    if value.device != other.device:
        raise ValueError(f"{op}: {name} is on {value.device}, {other_name} on {other.device}; move them to one device")
    if value.dtype != other.dtype:
        raise TypeError(
            f"{op}: {name} is {value.dtype}, {other_name} {other.dtype}; they must be equal outside autocast"
        )


def check_seed(op: str, seed: torch.Tensor | None) -> None:
    """``TypeError`` or ``ValueError`` unless ``seed`` is a 0-d int64 tensor or None."""
    if seed is not None and seed.dtype != torch.int64:
        raise TypeError(f"{op}: seed must be an int, None or a 0-d int64 tensor, got a {seed.dtype} tensor")
    if seed is not None and seed.dim() != 0:
        raise ValueError(f"{op}: seed must be 0-d, got shape {shape_of(seed)}")


def check_count(op: str, name: str, value: Any, low: int, high: int | None = None) -> Any:
    """``value`` if it is an integer in [low, high); ``TypeError`` or ``ValueError`` otherwise."""
    if type(value) is not int:
        if isinstance(value, torch.SymInt):
            return value
        if isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__index__"):
            raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
        value = value.__index__()
    if value < low or (high is not None and value >= high):
        bounds = f"at least {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"{op}: {name} must be {bounds}, got {value}")
    return value
