"""Attention layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, pad

from genfast._checks import check_float_tensor, shape_of
from genfast.nn.functional import attend

__all__ = ["MultiheadAttention"]


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` by ``genfast.ops.attention``, with the same parameters and ``state_dict``.

    Memory does not grow with L * S where ``need_weights=False``, in any derivative, with masks and dropout too. With
    ``need_weights=True`` the weights are computed beside the output (and with dropout, the output from them).

    Where it differs from PyTorch's:

    - A query that sees no key has output ``out_proj.bias`` and weights 0, never NaN.
    - ``is_causal=True`` needs no ``attn_mask``. The keys that ``add_bias_kv`` and ``add_zero_attn`` append are seen by
      every query; PyTorch hides them with ``is_causal=True`` and ``need_weights=False``.
    - ``key_padding_mask`` and ``attn_mask`` need not have one dtype.
    - Where both are bool, or ``is_causal=True``, they are not merged into a mask [N, L, S].

    Inside ``torch.nn.TransformerEncoderLayer`` it works as PyTorch's does. In eval mode without gradients that layer
    reads the parameters and runs PyTorch's own fused kernel instead of its submodules, with equal outputs, unless
    ``torch.backends.mha.set_fastpath_enabled(False)``. So does ``torch.nn.TransformerEncoder`` with the nested tensors
    that it makes of a padding mask. A nested tensor given to this module goes to PyTorch's implementation, under
    PyTorch's conditions.

    Args:
        embed_dim: width E of queries and outputs.
        num_heads: heads H, a divisor of ``embed_dim``.
        dropout: probability in [0, 1] that a weight is dropped in training mode.
        bias: add biases to the projections.
        add_bias_kv: append one learned key and value.
        add_zero_attn: append a key and value of zeros.
        kdim: width of keys; None for ``embed_dim``.
        vdim: width of values; None for ``embed_dim``.
        batch_first: tensors are [N, L, E] instead of [L, N, E].
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for widths or heads that are not positive, or where the heads do not divide the width; for a
            dropout outside [0, 1].

    Source: Vaswani et al., "Attention is all you need", 2017.

    Examples:
        >>> theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
        >>> ours = MultiheadAttention(16, 4, batch_first=True)
        >>> ours.load_state_dict(theirs.state_dict())
        <All keys matched successfully>
        >>> x = torch.randn(2, 5, 16)
        >>> padding = torch.arange(5) >= torch.tensor([[5], [3]])
        >>> out, weights = ours(x, x, x, key_padding_mask=padding)
        >>> expected_out, expected_weights = theirs(x, x, x, key_padding_mask=padding)
        >>> torch.allclose(out, expected_out, atol=1e-6), torch.allclose(weights, expected_weights, atol=1e-6)
        (True, True)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                "MultiheadAttention: embed_dim must be a positive multiple of num_heads, got "
                f"{embed_dim} and {num_heads}"
            )
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width is not None and width < 1:
                raise ValueError(f"MultiheadAttention: {name} must be at least 1 or None, got {width}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"MultiheadAttention: dropout must be in [0, 1], got {dropout}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from the queries to the keys.

        Args:
            query: [L, N, E], [N, L, E] with ``batch_first``, or [L, E] without a batch.
            key: [S, N, kdim], likewise.
            value: [S, N, vdim], likewise.
            key_padding_mask: [N, S], or [S] without a batch. bool, True hides the key; or floating point, added to the
                scores, with its gradient.
            need_weights: also return the weights. False is faster and takes less memory.
            attn_mask: [L, S] or [N * H, L, S]. bool, True hides; or floating point, added to the scores, with its
                gradient.
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: query i sees the keys 0 ... i. An ``attn_mask`` given with it must say just that; it is read
                only with ``need_weights`` or ``add_bias_kv``.

        Returns:
            (out, weights): out like query; weights [N, L, S], or [N, H, L, S] without average, each without N where
            there is no batch; S grows by the keys that ``add_bias_kv`` and ``add_zero_attn`` append. In training mode
            the weights are after dropout. None where they are not needed.

        Raises:
            TypeError: for something else than floating-point tensors, or a mask neither bool nor floating point.
            ValueError: for shapes that do not fit.
        """
        if isinstance(query, Tensor) and query.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        self._check(query, key, value, key_padding_mask, attn_mask)
        batched = query.dim() == 3
        q, k, v = self._projected(query, key, value)
        causal = is_causal and not need_weights and self.bias_k is None
        if causal:
            attn_mask = None
        elif is_causal and attn_mask is None:
            attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        mask, bias = self._masks(key_padding_mask, attn_mask, q.dtype)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = self._appended(k, self.bias_k), self._appended(v, self.bias_v)
        dropout_p = self.dropout if self.training else 0.0
        weights = self._weights(q, k, mask, bias, dropout_p) if need_weights else None
        if weights is None or dropout_p == 0.0:
            out = attend(
                q, k, v, dropout_p, mask=mask, bias=bias, causal="top_left" if causal else False,
                # a key and a value of zeros: one more column with score 0 that adds nothing
                sinks=q.new_zeros(self.num_heads) if self.add_zero_attn else None,
            )  # fmt: skip
        else:
            out = weights[..., : k.shape[2]] @ v
        out = linear(self._merged(out, batched), self.out_proj.weight, self.out_proj.bias)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return out, weights

    # ---- steps; q, k, v, out are [N, H, L or S, D] ----

    def _heads(self, x: Tensor) -> Tensor:
        """A projection [S, N, H, D], [N, S, H, D] or [S, H, D] as a view [N, H, S, D]."""
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merged(self, out: Tensor, batched: bool) -> Tensor:
        """[N, H, L, D] in query's layout, the heads side by side."""
        if not batched:
            return out.squeeze(0).transpose(0, 1).flatten(1)
        if self.batch_first:
            return out.transpose(1, 2).flatten(2)
        return out.permute(2, 0, 1, 3).flatten(2).contiguous()  # else linear adds its bias in a pass of its own

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (self.num_heads, self.head_dim)
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value and weight is not None:
            q, k, v = linear(query, weight, bias).unflatten(-1, (3, *heads)).unbind(-3)
            return self._heads(q), self._heads(k), self._heads(v)
        if key is value and weight is not None:
            sizes = (self.embed_dim, 2 * self.embed_dim)
            q_weight, kv_weight = weight.split(sizes)
            q_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
            k, v = linear(key, kv_weight, kv_bias).unflatten(-1, (2, *heads)).unbind(-3)
            return self._heads(linear(query, q_weight, q_bias).unflatten(-1, heads)), self._heads(k), self._heads(v)
        if weight is not None:
            weights = weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)  # type: ignore[assignment]
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (
            self._heads(linear(x, w, b).unflatten(-1, heads))
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v

    def _appended(self, x: Tensor, learned: Tensor) -> Tensor:
        learned = learned.to(x.dtype).view(1, self.num_heads, 1, self.head_dim)
        return torch.cat((x, learned.expand(x.shape[0], -1, -1, -1)), 2)

    def _masks(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """(mask, bias) of the op; a mask and a bias stay apart, so that neither takes the other's shape."""
        mask = bias = None
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
            if attn_mask.dtype == torch.bool:
                mask = ~attn_mask
            else:
                bias = attn_mask.to(dtype)
        if key_padding_mask is not None:
            padding = key_padding_mask[..., None, None, :]
            if padding.dtype != torch.bool:
                bias = padding.to(dtype) if bias is None else bias + padding.to(dtype)
            elif mask is None:
                mask = ~padding
            else:
                bias = torch.zeros_like(padding, dtype=dtype).masked_fill(padding, -torch.inf)
        if self.bias_k is not None:
            mask = None if mask is None else pad(mask, (0, 1), value=True)
            bias = None if bias is None else pad(bias, (0, 1))
        return mask, bias

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, dropout_p: float) -> Tensor:
        """[N, H, L, S], after dropout."""
        scores = (q * self.head_dim**-0.5) @ k.transpose(2, 3)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        if self.add_zero_attn:
            weights = torch.softmax(pad(scores, (0, 1)), -1)
        elif mask is None and bias is None:
            weights = torch.softmax(scores, -1)
        else:
            empty = (scores == -torch.inf).all(-1, keepdim=True)
            weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
        return dropout(weights, dropout_p) if dropout_p > 0.0 else weights

    # ---- checks ----

    def _check(
        self, query: Any, key: Any, value: Any, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        name = "MultiheadAttention"
        for what, x in (("query", query), ("key", key), ("value", value)):
            check_float_tensor(name, what, x)
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(
                f"{name}: query, key and value must all have 3 dimensions, or 2 without a batch, got shapes "
                f"{shape_of(query)}, {shape_of(key)} and {shape_of(value)}"
            )
        for what, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.shape[-1] != width:
                raise ValueError(f"{name}: {what}'s last dimension must be {width}, got shape {shape_of(x)}")
        sequence = 1 if query.dim() == 3 and self.batch_first else 0
        batch = None if query.dim() == 2 else query.shape[1 - sequence]
        if key.shape[:-1] != value.shape[:-1] or (batch is not None and key.shape[1 - sequence] != batch):
            raise ValueError(
                f"{name}: key and value must have one length, and the batch of query, got shapes {shape_of(query)}, "
                f"{shape_of(key)} and {shape_of(value)} with batch_first={self.batch_first}"
            )
        queries, keys = query.shape[sequence], key.shape[sequence]
        if key_padding_mask is not None:
            self._check_mask("key_padding_mask", key_padding_mask, [(keys,) if batch is None else (batch, keys)])
        if attn_mask is not None:
            rows = self.num_heads * (1 if batch is None else batch)
            self._check_mask("attn_mask", attn_mask, [(queries, keys), (rows, queries, keys)])

    @staticmethod
    def _check_mask(what: str, mask: Any, shapes: list[tuple[int, ...]]) -> None:
        if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
            given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"MultiheadAttention: {what} must be a bool or floating-point tensor, got {given}")
        if tuple(mask.shape) not in shapes:
            expected = " or ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"MultiheadAttention: {what} must have shape {expected}, got {shape_of(mask)}")
