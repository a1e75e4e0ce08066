"""Classes of models whose methods are other: swapped in place, and back."""

from __future__ import annotations

import functools
from typing import Any, cast

from torch import nn

__all__ = ["restore", "swap"]

_MARK = "_genfast_mixin"


@functools.cache
def _mixed(mixin: type, cls: Any) -> type[nn.Module]:
    return type(
        cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__, _MARK: cls}
    )


def swap(model: nn.Module, kind: type[nn.Module], mixin: type) -> int:
    """Puts ``mixin`` before the class of every module of a kind; how many changed."""
    found = [m for m in model.modules() if isinstance(m, kind) and not isinstance(m, mixin)]
    for module in found:
        module.__class__ = _mixed(mixin, cast(Any, type(module)))
    return len(found)


def restore(model: nn.Module, mixin: type) -> int:
    """Undoes ``swap``; how many changed back."""
    found: list[Any] = [m for m in model.modules() if isinstance(m, mixin) and _MARK in vars(type(m))]
    for module in found:
        module.__class__ = vars(type(module))[_MARK]
    return len(found)
