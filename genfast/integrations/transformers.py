"""Hugging Face transformers by genfast's attention: ``attn_implementation="genfast"``, once this module is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from genfast.nn.functional import attend

try:
    from transformers import masking_utils
    from transformers.modeling_utils import AttentionInterface

    AttentionMaskInterface = masking_utils.AttentionMaskInterface
except (ImportError, AttributeError) as error:
    raise ImportError(
        "genfast.integrations.transformers needs transformers 5.10 or newer: pip install 'genfast[hf]'"
    ) from error

try:  # where a model's decorators collect what is asked of its layers
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None  # type: ignore[assignment]

__all__ = ["NAME", "attention_forward", "attention_mask", "register"]

NAME = "genfast"
_STRUCTURE = "_genfast_structure"  # of a mask: what it is made of
_REFUSED = {  # arguments of attention functions that change the result and are not known here
    "head_mask": "a mask of heads",
    "indices": "attention to chosen keys",
    "block_indices": "attention to chosen blocks",
    "sinks": "sinks that depend on the query",
}


def register() -> None:
    """Makes ``attn_implementation="genfast"`` known to transformers. Importing this module does it.

    Both the attention and its masks are registered: to an attention whose masks it does not know, transformers gives no
    mask at all, and padding would be attended to without a word.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> register()
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...     num_attention_heads=4, num_key_value_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> tokens, padding = torch.randint(32, (2, 6)), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
        >>> expected = model(tokens, attention_mask=padding).logits
        >>> model.set_attn_implementation("genfast")
        >>> torch.allclose(model(tokens, attention_mask=padding).logits[padding.bool()], expected[padding.bool()],
        ...     atol=1e-5)
        True
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers' models call it; ``register`` makes it known to them.

    Args:
        module: the attention layer; only its ``training`` and ``is_causal`` are read.
        query: [B, Hq, L, D].
        key: [B, Hkv, S, D], Hq a multiple of Hkv.
        value: [B, Hkv, S, Dv].
        attention_mask: bool, True keeps, or added to the scores; broadcasts to [B, Hq, L, S]. None: no mask, but for a
            causal module with more than one query, whose query i sees the keys 0 ... i.
        dropout: of the weights, in training mode.
        scaling: of the scores; None for 1 / sqrt(D).
        is_causal: None for ``module.is_causal``.
        softcap: of the scores.
        s_aux: sinks [Hq].
        position_bias: added to the scores, broadcasts to [B, Hq, L, S], with its gradient.
        kwargs: what else models pass. Sliding windows are in the mask.

    Returns:
        (out [B, L, Hq, Dv], None): weights are not returned.

    Raises:
        ValueError: for ``output_attentions=True``, and for options of which genfast knows nothing.
    """
    _refuse(kwargs)
    if query.shape[0] != key.shape[0] and query.shape[0] == 1:  # learned queries
        query = query.expand(key.shape[0], -1, -1, -1)
    options: dict[str, Any] = {}
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and query.shape[2] > 1:  # the first query at the first key: a static cache has room after the last
            options["causal"] = "top_left"
    else:
        options = _mask_options(attention_mask, query, key)
    if position_bias is not None:
        bias = options.get("bias")
        options["bias"] = (position_bias if bias is None else position_bias + bias).to(query.dtype)
    out = attend(
        query, key, value, float(dropout) if module.training else 0.0,
        scale=scaling, softcap=softcap, sinks=s_aux, **options,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _refuse(kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions") or _weights_are_asked_for():
        raise ValueError(
            "genfast computes no attention weights, so output_attentions=True is not possible; "
            'call model.set_attn_implementation("eager") first'
        )
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f'attn_implementation="{NAME}" does not support {what} ({name}=...), which this model uses; '
                'call model.set_attn_implementation("eager")'
            )
    if type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
        raise ValueError(f'attn_implementation="{NAME}" does not support continuous batching; use "sdpa" for it')


def _weights_are_asked_for() -> bool:
    """Whether the running model was called with ``output_attentions=True`` and keeps it from its layers."""
    if _active_collector is None or torch.compiler.is_compiling():
        return False
    return any(key.endswith("attentions") for key in _active_collector.get() or ())


def _mask_options(mask: Tensor, query: Tensor, key: Tensor) -> dict[str, Any]:
    """The mask as options of the op: by what it is made of, where that is known and holds."""
    structure = _structure_of(mask)
    if structure is not None and structure.lengths == (query.shape[2], key.shape[2]):
        return {"mask": structure.padding, "causal": structure.causal, "window": structure.window}
    if mask.shape[-1] > key.shape[2]:
        mask = mask[..., : key.shape[2]]
    if mask.dtype == torch.bool:
        return {"mask": mask}
    if not mask.is_floating_point():
        raise TypeError(f"{NAME}: attention_mask must be bool or floating point, got {mask.dtype}")
    return {"bias": mask.to(query.dtype)}


# ---- masks -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Structure:
    """What a mask is made of: a band, and keys hidden from all queries of an example."""

    causal: bool | str
    window: tuple[int | None, int | None] | None
    padding: Tensor | None  # [B, 1, 1, S], True keeps
    lengths: tuple[int, int]
    version: int  # of the mask, which no one may have changed since


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that transformers gives to its SDPA attention, and with it the band and the padding that it is made of.

    The attention takes these in place of the mask [B, 1, L, S], and passes over the tiles that a band hides. A model
    that changes the mask, or a compiled graph, takes the mask.

    Takes the arguments of ``transformers.masking_utils.sdpa_mask``.

    Returns:
        None where the mask would be a causal one or empty; otherwise [B, 1, L, S], bool, True keeps.
    """
    mask = masking_utils.sdpa_mask(*args, **kwargs)
    if mask is None or "q_length" not in kwargs:  # transformers 4 gives tensors of positions
        return mask
    if torch.compiler.is_compiling() or mask.is_inference() or mask.dim() != 4:
        return mask
    structure = _structure(mask, **kwargs)
    if structure is not None:
        setattr(mask, _STRUCTURE, structure)
    return mask


def _structure(
    mask: Tensor,
    q_length: Any = None,
    kv_length: Any = None,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> _Structure | None:
    band = _band(mask_function)
    if band is None or not all(type(x) is int for x in (q_length, kv_length, q_offset, kv_offset)):
        return None
    padding = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.dtype != torch.bool:
            return None
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        padding = padding[:, None, None, kv_offset : kv_offset + kv_length]
    causal, left, right = band
    where: bool | str = causal
    bounded = causal or left is not None or right is not None
    if bounded and q_offset - kv_offset != kv_length - q_length:  # the last query is not at the last key
        if q_offset != kv_offset or not causal:
            return None
        where = "top_left"
    return _Structure(where, (left, right), padding, (q_length, kv_length), mask._version)


def _band(function: Any) -> tuple[bool, int | None, int | None] | None:
    """(causal, left, right) of a function that says which keys a query sees; None for one that is not known."""
    if function is masking_utils.causal_mask_function:
        return True, None, None
    if function is masking_utils.bidirectional_mask_function:
        return False, None, None
    code = getattr(function, "__code__", None)
    if code is None or not function.__closure__ or len(function.__closure__) != 1:
        return None
    held = function.__closure__[0].cell_contents
    if code is masking_utils.and_masks().__code__ and isinstance(held, tuple):
        parts = [_band(part) for part in held]
        if not parts or None in parts:
            return None
        found = [part for part in parts if part is not None]
        return any(c for c, _, _ in found), _least(x for _, x, _ in found), _least(x for _, _, x in found)
    if type(held) is not int or held < 1:
        return None
    if code is masking_utils.sliding_window_overlay(1).__code__:
        return False, held - 1, None
    both_sides = getattr(masking_utils, "sliding_window_bidirectional_overlay", None)
    if both_sides is not None and code is both_sides(1).__code__:
        return False, held, held
    return None


def _least(sizes: Any) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


def _structure_of(mask: Tensor) -> _Structure | None:
    if torch.compiler.is_compiling():
        return None
    structure = getattr(mask, _STRUCTURE, None)
    if structure is None or mask.is_inference() or mask._version != structure.version:
        return None
    return structure


register()
