"""Functions of a network's input gradient, differentiable by its parameters: by double backward or by forward mode.

With g(theta) the gradient of the sum of f_theta(x) by x, and a function phi,

    d phi(g) / d theta = w^T dg / d theta = d (w^T g) / d theta,    w = d phi / d g held constant,

and w^T g is the directional derivative of the sum of f_theta along w: one forward-mode pass, whose backward is an
ordinary one. For phi = |g|^2 / 2 the direction w is g.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["METHODS", "check_method", "of_input_gradient"]

METHODS = ("double_backward", "jvp")

Function = Callable[[Tensor], Tensor]


def check_method(op: str, method: Any) -> None:
    if method not in METHODS:
        raise ValueError(f"{op}: method must be 'double_backward' or 'jvp', got {method!r}")


def _by_transforms() -> bool:
    """Where ``torch.autograd.grad`` and dual levels cannot be used, and ``torch.func`` can."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _gradient(function: Function, x: Tensor) -> Tensor:
    """The gradient, without a graph."""
    if _by_transforms():
        with torch.no_grad():
            return torch.func.grad(function)(x.detach())
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]


def _differentiable_gradient(function: Function, x: Tensor) -> Tensor:
    if _by_transforms():
        return torch.func.grad(function)(x)
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaf = x if graph and x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, create_graph=graph)[0]


def _normalized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _layer_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    *_: Any,
) -> Tensor:  # fmt: skip
    out = _normalized(x, tuple(range(-len(normalized_shape), 0)), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _instance_norm(
    x: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5, *_: Any,
) -> Tensor:  # fmt: skip
    if not use_input_stats or running_mean is not None:
        raise RuntimeError("method='jvp' takes no instance normalization with running statistics")
    out, shape = _normalized(x, tuple(range(2, x.dim())), eps), (1, -1, *(1,) * (x.dim() - 2))
    out = out if weight is None else out * weight.view(shape)
    return out if bias is None else out + bias.view(shape)


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    first, second = x.chunk(2, dim)
    return first * torch.sigmoid(second)


#: Operations of PyTorch whose forward-mode derivative has no, or a wrong, reverse-mode derivative by parameters (layer
#: normalization's takes the saved statistics for constants); in operations that have a right one.
_REPLACED: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch.nn.functional.instance_norm: _instance_norm,
    torch.instance_norm: lambda x, weight, bias, mean, var, *rest: _instance_norm(x, mean, var, weight, bias, *rest),
    torch.nn.functional.glu: _glu,
}
_BATCH_NORMS = (torch.nn.functional.batch_norm, torch.batch_norm)


class _Replaced(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _BATCH_NORMS and (args[5] if len(args) > 5 else kwargs.get("training", False)):
            raise RuntimeError(
                "method='jvp': batch normalization in training mode has no right forward-mode derivative; use "
                "method='double_backward', evaluation mode, or another normalization"
            )
        if getattr(func, "__name__", "") == "unflatten":  # Dynamo does not trace the method of this name here
            return torch.unflatten(*args, **kwargs)
        if func in _REPLACED:
            if "input" in kwargs:  # by keyword
                kwargs = {"x": kwargs["input"], **{k: v for k, v in kwargs.items() if k != "input"}}
            return _REPLACED[func](*args, **kwargs)
        return func(*args, **kwargs)


def _directional(function: Function, x: Tensor, direction: Tensor) -> Tensor:
    """The derivative of ``function`` along ``direction``, with a graph to all that ``function`` uses."""
    with _Replaced():
        return torch.func.jvp(function, (x,), (direction,))[1]


def of_input_gradient(
    function: Function, x: Tensor, outer: Callable[[Tensor], Tensor], method: str
) -> tuple[Tensor, Tensor]:
    """(outer(g), g) of the gradient g by x of the scalar ``function``; g is detached."""
    if method == "double_backward":
        gradient = _differentiable_gradient(function, x)
        return outer(gradient), gradient.detach()
    gradient = _gradient(function, x)
    if _by_transforms():
        direction, value = torch.func.grad_and_value(outer)(gradient)
    else:
        with torch.enable_grad():
            leaf = gradient.requires_grad_()
            value = outer(leaf)
            (direction,) = torch.autograd.grad(value, leaf)
            gradient, value = leaf.detach(), value.detach()
    if not torch.is_grad_enabled():
        return value, gradient
    along = _directional(function, x, direction.detach())
    return value.detach() + (along - along.detach()).to(value.dtype), gradient
