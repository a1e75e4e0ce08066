"""Transformer layers: PyTorch's, with genfast's attention inside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from genfast.nn.attention import MultiheadAttention

__all__ = [
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]


def _constructor(theirs: type[nn.Module]) -> Callable[..., None]:
    """The constructor of a twin: PyTorch's, whose layers then change their class. Modules that it was given stay."""

    @functools.wraps(theirs.__init__)
    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        theirs.__init__(self, *args, **kwargs)
        adopt(self, given=[x for x in (*args, *kwargs.values()) if isinstance(x, torch.nn.Module)])

    return construct


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` with ``genfast.nn.MultiheadAttention``.

    Constructor, ``forward``, parameters, their initial values for a seed, and ``state_dict`` are PyTorch's. In eval
    mode without gradients, where PyTorch's runs one fused kernel for the whole layer, this one runs its submodules all
    the same, so that hooks fire and masks stay as they are; ``torch.backends.mha`` has no say. A nested tensor goes to
    PyTorch's implementation, under PyTorch's conditions.

    A query that sees no key takes 0 from its attention, never NaN.

    Takes the arguments of ``torch.nn.TransformerEncoderLayer``: d_model, nhead, dim_feedforward, dropout,
    activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype.

    Source: Vaswani et al., "Attention is all you need", 2017; ``norm_first``: Xiong et al., "On layer normalization in
    the transformer architecture", 2020.

    Examples:
        >>> theirs = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        >>> ours = TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        >>> ours.load_state_dict(theirs.state_dict())
        <All keys matched successfully>
        >>> x = torch.randn(2, 5, 16)
        >>> torch.allclose(ours(x), theirs(x), atol=1e-5)
        True
    """

    __init__ = _constructor(nn.TransformerEncoderLayer)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, of ``src``'s shape.

        Args:
            src: [L, N, E], [N, L, E] with ``batch_first``, or [L, E]; or a nested tensor.
            src_mask: [L, L] or [N * H, L, L]; bool, True hides; or added to the scores.
            src_key_padding_mask: [N, L] or [L], likewise.
            is_causal: query i sees the keys 0 ... i; a ``src_mask`` given with it is not read.
        """
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(x + self._ff_block(x))


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer`` with ``genfast.nn.MultiheadAttention``, and otherwise the same.

    Takes the arguments of ``torch.nn.TransformerDecoderLayer``: d_model, nhead, dim_feedforward, dropout,
    activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype.

    Source: Vaswani et al., "Attention is all you need", 2017.

    Examples:
        >>> layer = TransformerDecoderLayer(16, 4, 32, batch_first=True)
        >>> layer(torch.randn(2, 5, 16), torch.randn(2, 7, 16), tgt_is_causal=True).shape
        torch.Size([2, 5, 16])
    """

    __init__ = _constructor(nn.TransformerDecoderLayer)


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder``; copies of PyTorch's encoder layer become genfast's.

    In eval mode without gradients, with a padding mask and ``enable_nested_tensor``, PyTorch turns the batch into a
    nested tensor; this one leaves that to PyTorch's implementation and returns the same, zeros at the padding included.

    Takes the arguments of ``torch.nn.TransformerEncoder``: encoder_layer, num_layers, norm, enable_nested_tensor,
    mask_check.

    Examples:
        >>> encoder = TransformerEncoder(TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
        >>> mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
        >>> encoder(torch.randn(2, 5, 16), mask=mask).shape
        torch.Size([2, 5, 16])
    """

    __init__ = _constructor(nn.TransformerEncoder)


class TransformerDecoder(nn.TransformerDecoder):
    """``torch.nn.TransformerDecoder``; copies of PyTorch's decoder layer become genfast's.

    Takes the arguments of ``torch.nn.TransformerDecoder``: decoder_layer, num_layers, norm.

    Examples:
        >>> decoder = TransformerDecoder(TransformerDecoderLayer(16, 4, 32, batch_first=True), 2)
        >>> decoder(torch.randn(2, 5, 16), torch.randn(2, 7, 16)).shape
        torch.Size([2, 5, 16])
    """

    __init__ = _constructor(nn.TransformerDecoder)


class Transformer(nn.Transformer):
    """``torch.nn.Transformer`` of genfast's layers, and otherwise the same.

    Takes the arguments of ``torch.nn.Transformer``: d_model, nhead, num_encoder_layers, num_decoder_layers,
    dim_feedforward, dropout, activation, custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first,
    bias, device, dtype.

    Source: Vaswani et al., "Attention is all you need", 2017.

    Examples:
        >>> model = Transformer(16, 4, 1, 1, 32, batch_first=True)
        >>> model(torch.randn(2, 7, 16), torch.randn(2, 5, 16), tgt_is_causal=True).shape
        torch.Size([2, 5, 16])
    """

    __init__ = _constructor(nn.Transformer)


#: PyTorch's layers and those that take their place. A twin adds no state, so that a module changes its class alone.
TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
    nn.Transformer: Transformer,
}


def adopt(model: nn.Module, given: Iterable[nn.Module] = ()) -> None:
    """Turns PyTorch's layers inside ``model``, but not inside ``given``, into their twins.

    Parameters, hooks, device and mode stay as they are.
    """
    kept = {id(module) for root in given for module in root.modules()}
    for module in model.modules():
        twin = TWINS.get(type(module))
        if twin is not None and id(module) not in kept:
            module.__class__ = twin
