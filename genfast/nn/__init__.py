"""Layers: ``torch.nn.Module``s over ``genfast.ops``."""

from genfast.nn import functional
from genfast.nn.attention import MultiheadAttention
from genfast.nn.classification_rbm import ClassificationRBM
from genfast.nn.conditional_rbm import ConditionalRBM
from genfast.nn.conv_rbm import ConvRBM
from genfast.nn.rbm import RBM
from genfast.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from genfast.nn.vae import Reparameterize

__all__ = [
    "ClassificationRBM",
    "ConditionalRBM",
    "ConvRBM",
    "MultiheadAttention",
    "RBM",
    "Reparameterize",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "functional",
]
