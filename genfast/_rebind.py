"""Copies of functions and classes that call genfast's attention where the originals call PyTorch's."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from genfast.nn.functional import scaled_dot_product_attention

__all__ = ["SDPA", "is_sdpa", "rebound_class"]

SDPA = "scaled_dot_product_attention"
_ROOT = "_genfast_torch"  # the name under which copies of modules are imported in place of torch
_DEPTH = 2  # how far functions that a method calls are followed
_DISPATCH = ("diffusers.models.attention_dispatch", "dispatch_attention_fn")  # chooses among backends by a registry
_SCOPES = itertools.count()
_MODULES = ("torch", "torch.nn", "torch.nn.functional")


@functools.cache
def _stand_ins() -> dict[int, Any]:
    """By identity: PyTorch's function and the modules that lead to it, to copies that lead to genfast's."""

    def copy(module: types.ModuleType, **changed: Any) -> types.ModuleType:
        name = module.__name__.replace("torch", _ROOT, 1)
        made = sys.modules[name] = types.ModuleType(name)  # known, for imports inside of methods
        made.__dict__.update({**vars(module), **changed, "__name__": name})
        return made

    functional = copy(nn.functional, **{SDPA: scaled_dot_product_attention})
    layers = copy(nn, functional=functional)
    root = copy(torch, nn=layers)
    return {
        id(nn.functional.scaled_dot_product_attention): scaled_dot_product_attention,
        id(nn.functional): functional,
        id(nn): layers,
        id(torch): root,
    }


def is_sdpa(value: Any) -> bool:
    """Whether a value is PyTorch's function."""
    return value is nn.functional.scaled_dot_product_attention


# ---- functions -------------------------------------------------------------------------------------------------------


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _mentions(code: types.CodeType) -> bool:
    """Whether a function's own code reads the name, other than as an attribute of its first argument."""
    if SDPA not in code.co_names:
        return False
    found = list(dis.get_instructions(code))
    for i, instruction in enumerate(found):
        if instruction.argval != SDPA:
            continue
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_FROM"):
            return True
        if instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            continue
        before = found[i - 1]
        base = before.argval[-1] if isinstance(before.argval, tuple) else before.argval
        if not (before.opname.startswith("LOAD_FAST") and code.co_argcount and base == code.co_varnames[0]):
            return True
    return False


def _read(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """(name, value) of the globals that a function reads."""
    for code in _codes(function.__code__):
        for instruction in dis.get_instructions(code):
            if instruction.opname == "LOAD_GLOBAL" and instruction.argval in function.__globals__:
                yield instruction.argval, function.__globals__[instruction.argval]


def _held(function: types.FunctionType) -> Iterator[tuple[int, Any]]:
    """(place, value) of what a function's closure holds."""
    for i, cell in enumerate(function.__closure__ or ()):
        try:
            yield i, cell.cell_contents
        except ValueError:  # empty as yet
            continue


def _imports_replaced(code: types.CodeType) -> types.CodeType:
    """The code with the imports of torch's modules inside of it led to the copies."""
    other = {
        i.argval for i in dis.get_instructions(code) if i.opname != "IMPORT_NAME" and isinstance(i.argval, str)
    } - set(code.co_varnames + code.co_cellvars)
    names = tuple(
        name.replace("torch", _ROOT, 1) if name in _MODULES and name not in other else name for name in code.co_names
    )
    constants = tuple(_imports_replaced(c) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    changed = names != code.co_names or any(a is not b for a, b in zip(constants, code.co_consts, strict=True))
    return code.replace(co_names=names, co_consts=constants) if changed else code


def _writes_globals(function: types.FunctionType) -> bool:
    return any(
        i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
        for code in _codes(function.__code__)
        for i in dis.get_instructions(code)
    )


@functools.cache
def _rebound(function: types.FunctionType, depth: int = _DEPTH) -> tuple[types.FunctionType | None, bool]:
    """A copy that finds genfast's function where it looked for PyTorch's, None where it looks elsewhere; and whether
    it looks for PyTorch's at all."""
    mentions = any(_mentions(code) for code in _codes(function.__code__))

    def replacement(value: Any) -> Any:
        if is_sdpa(value) or (mentions and id(value) in _stand_ins()):
            return _stand_ins()[id(value)]
        if type(value) is not types.FunctionType or value is function or not _may_be_followed(value):
            return None
        if (value.__module__, value.__name__) == _DISPATCH:
            from genfast.integrations.diffusers import dispatch_attention

            return dispatch_attention
        return _rebound(value, depth - 1)[0] if depth else None

    made_globals = {name: made for name, value in _read(function) if (made := replacement(value)) is not None}
    made_cells = {i: types.CellType(made) for i, value in _held(function) if (made := replacement(value)) is not None}
    code = function.__code__
    if mentions:
        _stand_ins()
        code = _imports_replaced(code)
    if not made_globals and not made_cells and code is function.__code__:
        return None, mentions
    if _writes_globals(function):
        return None, True
    closure = None
    if function.__closure__ is not None:
        closure = tuple(made_cells.get(i, cell) for i, cell in enumerate(function.__closure__))
    scope = _scope({**function.__globals__, **made_globals})
    made = types.FunctionType(code, scope, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    made.__doc__, made.__annotations__ = function.__doc__, function.__annotations__
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    return made, True


def _scope(names: dict[str, Any]) -> dict[str, Any]:
    """The names as the globals of a module: torch.compile looks there for those of functions that it inlines."""
    name = f"_genfast_scope_{next(_SCOPES)}"
    module = sys.modules[name] = types.ModuleType(name)
    module.__dict__.update({**names, "__name__": name})
    return module.__dict__


def _may_be_followed(function: types.FunctionType) -> bool:
    return str(function.__module__).partition(".")[0] not in ("torch", "genfast")


# ---- classes ---------------------------------------------------------------------------------------------------------


def _rebound_members(base: type) -> tuple[dict[str, Any], list[str]]:
    """The rebound methods of a class itself, and the names of those that look for PyTorch's function elsewhere."""
    made: dict[str, Any] = {}
    missed: list[str] = []
    if base.__module__.partition(".")[0] == "torch":
        return made, missed
    for name, member in vars(base).items():
        kind = type(member) if isinstance(member, (staticmethod, classmethod)) else None
        function = member.__func__ if kind is not None else member
        if type(function) is not types.FunctionType or name == "__init__":  # which has run
            continue
        copy, mentions = _rebound(function)
        if copy is not None:
            made[name] = copy if kind is None else kind(copy)
        elif mentions:
            missed.append(name)
    return made, missed


@functools.cache
def rebound_class(cls: Any) -> tuple[Any, str]:
    """A class as ``cls`` but for the methods that call SDPA, and what to say of it; None where there is none to make,
    with "" where nothing looks for SDPA.

    A base with such methods gets a subclass of its own, right before it in the order in which methods are looked up,
    so that ``super()`` finds it.
    """
    bases, own = [cls], {}
    swapped: list[str] = []
    missed: list[str] = []
    for base in cls.__mro__:
        made, lost = _rebound_members(base)
        if base is cls:
            own = made
        elif made:
            bases.append(type(base.__name__, (base,), {"__module__": base.__module__, **made}))
        for names, into in ((made, swapped), (lost, missed)):
            into += [
                name if inspect.getattr_static(cls, name) is vars(base)[name] else f"{base.__qualname__}.{name}"
                for name in names
            ]
    not_reached = f"{SDPA} is not reached by a name in {', '.join(missed)}"
    if not swapped:
        return None, not_reached if missed else ""
    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, **own}
    text = f"genfast.nn.functional.{SDPA} in {', '.join(swapped)}"
    return type(cls.__name__, tuple(bases), members), f"{text}; {not_reached}" if missed else text
