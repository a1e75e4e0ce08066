"""Swaps PyTorch's attention inside a model for genfast's, in place, and back."""

from __future__ import annotations

import dataclasses
import dis
import fnmatch
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from genfast.nn.functional import scaled_dot_product_attention
from genfast.nn.transformer import TWINS

__all__ = ["PatchReport", "patch", "unpatch"]

_SDPA = "scaled_dot_product_attention"
_BEFORE = "_genfast_unpatched_class"  # of a module: its class before
_REBOUND = "_genfast_rebound"  # of a class: made here


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """What ``patch`` did; it prints as a table.

    Attributes:
        swapped: (name of the module, its class, what it calls now).
        kept: (name of the module, its class, why it stays).
        max_error: largest difference of the outputs for ``sample`` over their largest value; None without a sample.
    """

    swapped: tuple[tuple[str, str, str], ...]
    kept: tuple[tuple[str, str, str], ...]
    max_error: float | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} modules swapped, {len(self.kept)} with attention kept"]
        for sign, rows in (("+", self.swapped), ("-", self.kept)):
            lines += [f"{sign} {name or '(the model)'}: {was}: {text}" for name, was, text in rows]
        if self.max_error is not None:
            lines.append(f"outputs of the sample differ by at most {self.max_error:.2g} of their largest value")
        return "\n".join(lines)


def patch(
    model: nn.Module,
    *,
    only: Iterable[str | type[nn.Module]] | None = None,
    exclude: Iterable[str | type[nn.Module]] = (),
    sample: tuple[Any, ...] | Mapping[str, Any] | None = None,
    tolerance: float = 1e-3,
) -> PatchReport:
    """Makes the attention inside a model run by genfast, in place.

    Swapped are ``torch.nn.MultiheadAttention``, ``torch.nn.Transformer`` and its layers and stacks, and every module
    with a method that calls ``torch.nn.functional.scaled_dot_product_attention``. Modules change their class alone:
    parameters, buffers, hooks, device and mode stay as they are, ``isinstance`` holds, and ``unpatch`` undoes it.

    A method that calls SDPA runs as before, with genfast's function under that name; globals of its file that change
    after the patch are not seen by it, and methods that it reaches by ``super()`` keep PyTorch's. A module so swapped
    is copied by ``copy.deepcopy`` but not pickled: save its ``state_dict``, which is that of the unpatched model, or
    unpatch first.

    Args:
        model: any module.
        only: swap these alone: patterns of module names as ``fnmatch`` takes them ("encoder.*"), or classes.
        exclude: leave these, likewise.
        sample: inputs of the model, a tuple or a mapping of names. The model runs on them before and after, in eval
            mode without gradients.
        tolerance: allowed difference of the outputs of ``sample``, over their largest value.

    Returns:
        A report of what was swapped, and of modules with attention that were not and why.

    Raises:
        TypeError: if ``model`` is not a module.
        RuntimeError: if the outputs of ``sample`` differ by more than ``tolerance``; the model is then unpatched.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True))
        >>> report = patch(model, sample=(torch.randn(2, 5, 16),))
        >>> [name for name, *_ in report.swapped]
        ['0', '0.self_attn']
        >>> unpatch(model)
        2
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = None if only is None else tuple(only)
    unwanted = tuple(exclude)
    before = None if sample is None else _outputs(model, sample)
    swapped, kept = [], []
    for name, module in model.named_modules():
        cls = type(module)
        twin, text = _twin(cls)
        if twin is None and not text:
            continue
        if twin is not None and wanted is not None and not _matches(name, module, wanted):
            twin, text = None, "not among only"
        elif twin is not None and _matches(name, module, unwanted):
            twin, text = None, "excluded"
        if twin is None:
            kept.append((name, cls.__qualname__, text))
            continue
        module.__dict__[_BEFORE] = cls
        module.__class__ = twin
        swapped.append((name, cls.__qualname__, text))
    error = None
    if before is not None and sample is not None:
        error = _difference(before, _outputs(model, sample))
        if not error <= tolerance:
            unpatch(model)
            raise RuntimeError(
                f"patch: the outputs of the sample differ by {error:.2g} of their largest value, more than "
                f"{tolerance:g}; the model was unpatched"
            )
    return PatchReport(tuple(swapped), tuple(kept), error)


def unpatch(model: nn.Module) -> int:
    """Undoes ``patch``; layers that were genfast's before stay. Returns how many modules changed back."""
    count = 0
    for module in model.modules():
        cls = module.__dict__.pop(_BEFORE, None)
        if cls is not None:
            module.__class__ = cls
            count += 1
    return count


def _matches(name: str, module: nn.Module, patterns: tuple[str | type[nn.Module], ...]) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern) if isinstance(pattern, str) else isinstance(module, pattern)
        for pattern in patterns
    )


def _twin(cls: type[nn.Module]) -> tuple[type[nn.Module] | None, str]:
    """What takes the place of a class and what to say of it; (None, "") for one without attention."""
    if cls in TWINS:
        return TWINS[cls], f"genfast.nn.{TWINS[cls].__name__}"
    if issubclass(cls, tuple(TWINS.values())) or _REBOUND in cls.__dict__:
        return None, "genfast's already"
    mentioning = _mentioning(cls)
    rebound = {name: method for name, method in map(_rebound, mentioning.items()) if method is not None}
    if rebound:
        return _subclass(cast(Any, cls), tuple(rebound)), f"genfast.nn.functional.{_SDPA} in {', '.join(rebound)}"
    if mentioning:
        return None, f"{_SDPA} is not reached by a global name in {', '.join(mentioning)}"
    if issubclass(cls, tuple(TWINS)):
        return None, "a class of its own, not PyTorch's"
    return None, ""


# ---- methods that call SDPA ------------------------------------------------------------------------------------------


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _mentioning(cls: type[nn.Module]) -> dict[str, types.FunctionType]:
    """The methods of a class, PyTorch's own left out, that mention SDPA."""
    found: dict[str, types.FunctionType] = {}
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == "torch":
            continue
        for name, method in vars(base).items():
            own: Any = method if getattr(cls, name, None) is method else None  # not one that a subclass replaces
            if isinstance(own, types.FunctionType) and any(_SDPA in code.co_names for code in _codes(own.__code__)):
                found[name] = own
    return found


@functools.cache
def _stand_ins() -> dict[int, Any]:
    """By identity: PyTorch's function and the modules that lead to it, to copies that lead to genfast's."""

    def copy(module: types.ModuleType, **changed: Any) -> types.ModuleType:
        made = types.ModuleType(module.__name__)
        made.__dict__.update({**vars(module), **changed})
        return made

    functional = copy(nn.functional, **{_SDPA: scaled_dot_product_attention})
    layers = copy(nn, functional=functional)
    return {
        id(nn.functional.scaled_dot_product_attention): scaled_dot_product_attention,
        id(nn.functional): functional,
        id(nn): layers,
        id(torch): copy(torch, nn=layers),
    }


def _rebound(item: tuple[str, types.FunctionType]) -> tuple[str, types.FunctionType | None]:
    """A method that finds genfast's function where it looked for PyTorch's; None where it looks elsewhere."""
    method_name, method = item
    read = (
        i.argval for code in _codes(method.__code__) for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"
    )
    found = {name: method.__globals__[name] for name in read if name in method.__globals__}
    changed = {name: _stand_ins()[id(value)] for name, value in found.items() if id(value) in _stand_ins()}
    if not changed:
        return method_name, None
    made = types.FunctionType(
        method.__code__, {**method.__globals__, **changed}, method_name, method.__defaults__, method.__closure__
    )
    made.__kwdefaults__ = method.__kwdefaults__
    made.__doc__, made.__annotations__, made.__qualname__ = method.__doc__, method.__annotations__, method.__qualname__
    return method_name, made


@functools.cache
def _subclass(cls: Any, names: tuple[str, ...]) -> Any:
    """A class as ``cls`` but for the rebound methods."""
    methods = _mentioning(cls)
    members = {name: _rebound((name, methods[name]))[1] for name in names}
    return type(
        cls.__name__,
        (cls,),
        {"__module__": cls.__module__, "__qualname__": cls.__qualname__, _REBOUND: True, **members},
    )


# ---- the sample ------------------------------------------------------------------------------------------------------


def _outputs(model: nn.Module, sample: tuple[Any, ...] | Mapping[str, Any]) -> list[torch.Tensor]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            out = model(**sample) if isinstance(sample, Mapping) else model(*sample)
    finally:
        for module, training in modes:
            module.training = training
    return [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]


def _difference(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    errors = [
        (a - b).abs().max().double().cpu() / a.abs().max().double().cpu().clamp_min(1e-30)
        for a, b in zip(before, after, strict=True)
        if a.numel() and a.is_floating_point()
    ]
    return float(torch.stack(errors).max()) if errors else 0.0  # torch's maximum keeps NaN
