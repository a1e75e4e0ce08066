"""Swaps PyTorch's attention inside a model for genfast's, in place, and back."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from genfast._rebind import SDPA, is_sdpa, rebound_class
from genfast.nn.functional import scaled_dot_product_attention
from genfast.nn.transformer import TWINS

__all__ = ["PatchReport", "patch", "unpatch"]

_BEFORE = "_genfast_unpatched"  # of a module: what it was before
_ALREADY = "genfast's already"


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

    Swapped are:

    - ``torch.nn.MultiheadAttention``, ``torch.nn.Transformer`` and its layers and stacks.
    - Modules with a method that calls ``torch.nn.functional.scaled_dot_product_attention``, by whatever name of its
      file, its closure or an import inside of it, by ``super()``, by an attribute of the module that holds the
      function, or through functions that it calls. Modules with a flag ``fused_attn``, as timm's have, get it set.
    - Hugging Face models: their attention implementation becomes ``"genfast"`` by ``set_attn_implementation`` (see
      ``genfast.integrations.transformers``).
    - The attention processors of diffusers' models, likewise by what their methods call.

    Modules change their class alone: parameters, buffers, hooks, device and mode stay as they are, ``isinstance``
    holds, and ``unpatch`` undoes it. A method that calls SDPA runs as before, with genfast's function under that name;
    globals of its file that change after the patch are not seen by it. A call of a base's method by the name of its
    class keeps PyTorch's. A module so swapped is copied by ``copy.deepcopy`` but not pickled: save its
    ``state_dict``, which is that of the unpatched model, or unpatch first.

    Args:
        model: any module.
        only: swap these alone: patterns of module names as ``fnmatch`` takes them ("encoder.*"), or classes.
        exclude: leave these, likewise. A Hugging Face model is switched as a whole, by its own name.
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
    others = [(name, module) for name, module in model.named_modules() if not _is_hugging_face(module)]
    for name, module in [*_hugging_face_models(model), *others]:
        cls = type(module)
        apply, text = _plan(module)
        if apply is None and not text:
            continue
        if apply is not None and wanted is not None and not _matches(name, module, wanted):
            apply, text = None, "not among only"
        elif apply is not None and _matches(name, module, unwanted):
            apply, text = None, "excluded"
        if apply is None:
            kept.append((name, cls.__qualname__, text))
            continue
        module.__dict__[_BEFORE] = apply()
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
        before = module.__dict__.pop(_BEFORE, None)
        if before is not None:
            before.restore(module)
            count += 1
    return count


def _matches(name: str, module: nn.Module, patterns: tuple[str | type[nn.Module], ...]) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern) if isinstance(pattern, str) else isinstance(module, pattern)
        for pattern in patterns
    )


# ---- what to do with a module ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Before:
    """What a module was before the patch."""

    cls: type[nn.Module]
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    implementation: dict[str, Any] | None = None  # of attention, of a Hugging Face model

    def restore(self, module: nn.Module) -> None:
        if self.implementation is not None:
            cast(Any, module).set_attn_implementation(self.implementation)
            return
        module.__class__ = self.cls
        module.__dict__.update(self.attributes)


def _plan(module: nn.Module) -> tuple[Callable[[], _Before] | None, str]:
    """What swaps a module's attention, and what to say of it; (None, "") for one without attention."""
    cls = type(module)
    if _BEFORE in module.__dict__:
        return None, _ALREADY
    if _is_hugging_face(module):
        return _plan_hugging_face(module)
    if cls in TWINS:
        return _changing(module, TWINS[cls]), f"genfast.nn.{TWINS[cls].__name__}"
    if issubclass(cls, tuple(TWINS.values())):
        return None, _ALREADY
    attributes: dict[str, Any] = {
        name: scaled_dot_product_attention for name, value in vars(module).items() if is_sdpa(value)
    }
    said = [f"genfast.nn.functional.{SDPA} as {name}" for name in attributes]
    twin, text = rebound_class(cast(Any, cls))
    processor = vars(module).get("processor")
    if processor is not None and not isinstance(processor, nn.Module) and not attributes and twin is None:
        processor_twin, found = rebound_class(cast(Any, type(processor)))
        if processor_twin is not None:
            attributes["processor"] = copied = copy.copy(processor)
            copied.__class__ = processor_twin
            said.append(f"{found} of {type(processor).__name__}")
        else:
            text = text or (found and f"{found} of {type(processor).__name__}")
    if twin is not None and vars(module).get("fused_attn") is False:
        attributes["fused_attn"] = True
        text += "; fused_attn set"
    if twin is not None or attributes:
        return _changing(module, twin, attributes), "; ".join([*said, text] if text else said)
    if text:
        return None, text
    if issubclass(cls, tuple(TWINS)):
        return None, "a class of its own, not PyTorch's"
    return None, ""


def _changing(
    module: nn.Module, twin: type[nn.Module] | None, attributes: dict[str, Any] | None = None
) -> Callable[[], _Before]:
    def change() -> _Before:
        before = _Before(type(module), {name: module.__dict__[name] for name in attributes or ()})
        if twin is not None:
            module.__class__ = twin
        module.__dict__.update(attributes or {})
        return before

    return change


# ---- Hugging Face's models -------------------------------------------------------------------------------------------


def _is_hugging_face(module: nn.Module) -> bool:
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(module, library.PreTrainedModel) and hasattr(module, "config")


def _hugging_face_models(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those that are not inside of another: they switch as a whole."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if _is_hugging_face(module) and not (inside and name.startswith(inside)):
            inside = (*inside, f"{name}." if name else "")
            yield name, module


def _implementations(config: Any) -> dict[str, Any]:
    parts: dict[str, Any] = {key: getattr(config, key, None) for key in getattr(config, "sub_configs", ())}
    found = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **found}


def _plan_hugging_face(module: Any) -> tuple[Callable[[], _Before] | None, str]:
    try:
        from genfast.integrations.transformers import NAME  # registers it
    except ImportError as error:
        return None, str(error)
    config = module.config
    before = _implementations(config)
    if before[""] == NAME:
        return None, _ALREADY
    if getattr(config, "output_attentions", False):
        return None, "its configuration asks for attention weights (output_attentions)"
    if not getattr(module, "_can_set_attn_implementation", lambda: True)():
        return None, "its attention does not go through transformers' AttentionInterface"

    def change() -> _Before:
        module.set_attn_implementation(NAME)
        return _Before(type(module), implementation=before)

    return change, f'attn_implementation "{NAME}" in place of "{before[""]}"'


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
