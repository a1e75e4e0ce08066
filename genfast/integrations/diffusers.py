"""Hugging Face diffusers by genfast's attention: a processor for ``Attention`` modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfast._checks import shape_of
from genfast.nn.functional import scaled_dot_product_attention
from genfast.ops.attention import attention

__all__ = ["GenfastAttnProcessor", "dispatch_attention"]


class GenfastAttnProcessor:
    """A processor of diffusers' ``Attention`` modules, in place of ``AttnProcessor`` and ``AttnProcessor2_0``.

    It holds no scores, reads masks as they come instead of repeated for every head, and takes grouped heads, norms of
    queries and keys, and the module's own scale. Arithmetic is in float32, whatever ``upcast_attention`` says.
    Derivatives of every order exist.

    Modules with added projections of keys and values have processors of their own; ``genfast.patch`` swaps the
    attention inside of these.

    Examples:
        >>> from diffusers import PixArtTransformer2DModel
        >>> model = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1,
        ...     sample_size=8, cross_attention_dim=16, caption_channels=12, norm_num_groups=1).eval()
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([3]), "added_cond_kwargs": {},
        ...     "encoder_hidden_states": torch.randn(1, 5, 12)}
        >>> expected = model(**inputs).sample
        >>> model.set_attn_processor(GenfastAttnProcessor())
        >>> torch.allclose(model(**inputs).sample, expected, atol=1e-5)
        True
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """What ``attn`` computes; diffusers calls it.

        Args:
            attn: the ``Attention`` module.
            hidden_states: [B, L, C], or an image [B, C, H, W].
            encoder_hidden_states: [B, S, C'] to attend to; None for ``hidden_states``.
            attention_mask: [B, 1 or L, S], [B * heads, 1 or L, S] or [B, S]; added to the scores, or bool, True keeps.
            temb: for the module's spatial norm.
        """
        if getattr(attn, "add_k_proj", None) is not None:
            raise ValueError(
                "GenfastAttnProcessor: this module has added projections of keys and values and needs a processor of "
                "its own; leave that, and call genfast.patch(model)"
            )
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        image = x.shape[2:] if x.dim() == 4 else None
        if image is not None:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
        q = attn.to_q(x).unflatten(-1, (attn.heads, -1))
        k, v = (project(context).unflatten(-1, (-1, q.shape[-1])) for project in (attn.to_k, attn.to_v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        options: dict[str, Any] = {}
        if attention_mask is not None:
            mask = _four(attn, attention_mask, *context.shape[:2])
            options = {"mask": mask} if mask.dtype == torch.bool else {"bias": mask.to(q.dtype)}
        out = attention(q, k, v, scale=attn.scale, **options).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        if image is not None:
            out = out.transpose(1, 2).unflatten(2, image)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


def _four(attn: Any, mask: Tensor, batch: int, keys: int) -> Tensor:
    """A mask as diffusers has them, as a view that broadcasts to [B, heads, L, S]."""
    if mask.shape[-1] != keys:  # a shorter one is extended as diffusers does
        mask = attn.prepare_attention_mask(mask, keys, batch)
    if mask.dim() == 2:
        mask = mask[:, None]
    if mask.dim() == 3 and mask.shape[0] == batch * attn.heads:
        return mask.unflatten(0, (batch, attn.heads))
    if mask.dim() == 3 and mask.shape[0] in (1, batch):
        return mask[:, None]
    if mask.dim() == 4:
        return mask
    raise ValueError(
        f"GenfastAttnProcessor: attention_mask must be [{batch}, 1 or queries, {keys}], or one for each of "
        f"{batch} x {attn.heads} heads, got shape {shape_of(mask)}"
    )


def dispatch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """What newer models of diffusers call: ``genfast.patch`` puts it in the place of their ``dispatch_attention_fn``.

    Args:
        query: [B, L, Hq, D].
        key: [B, S, H, D].
        value: [B, S, H, Dv].
        attn_mask: as of ``genfast.nn.functional.scaled_dot_product_attention``.
        dropout_p: likewise.
        is_causal: likewise.
        scale: likewise.
        enable_gqa: likewise.
        attention_kwargs: options of a backend; with any, the call goes to diffusers.
        backend: not read.
        parallel_config: of context parallelism; with it, the call goes to diffusers.

    Returns:
        [B, L, Hq, Dv].
    """
    if parallel_config is not None or attention_kwargs:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs, backend=backend,
            parallel_config=parallel_config,
        )  # fmt: skip
    if attn_mask is not None and attn_mask.dim() == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out.transpose(1, 2)
