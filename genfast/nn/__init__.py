"""Layers: ``torch.nn.Module``s over ``genfast.ops``."""

from genfast.nn import functional
from genfast.nn.attention import MultiheadAttention
from genfast.nn.classification_rbm import ClassificationRBM
from genfast.nn.conditional_rbm import ConditionalRBM
from genfast.nn.conv_rbm import ConvRBM
from genfast.nn.filtered_lrelu import FilteredLReLU
from genfast.nn.positions import (
    LearnedPositionalEncoding,
    RelativePositionBias,
    RelativePositionBias2d,
    SinusoidalPositionalEncoding,
    alibi_slopes,
    t5_buckets,
)
from genfast.nn.rbm import RBM
from genfast.nn.rotary import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RotaryEmbedding,
    RotaryEmbedding2d,
    YarnScaling,
)
from genfast.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from genfast.nn.upfirdn2d import Downsample2d, Upfirdn2d, Upsample2d
from genfast.nn.vae import ELBO, GaussianKL, Reparameterize
from genfast.nn.vector_quantizer import VectorQuantizer

__all__ = [
    "ClassificationRBM",
    "ConditionalRBM",
    "ConvRBM",
    "Downsample2d",
    "DynamicNTKScaling",
    "ELBO",
    "FilteredLReLU",
    "GaussianKL",
    "LearnedPositionalEncoding",
    "LinearScaling",
    "Llama3Scaling",
    "MultiheadAttention",
    "NTKScaling",
    "RBM",
    "RelativePositionBias",
    "RelativePositionBias2d",
    "Reparameterize",
    "RotaryEmbedding",
    "RotaryEmbedding2d",
    "SinusoidalPositionalEncoding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "Upfirdn2d",
    "Upsample2d",
    "VectorQuantizer",
    "YarnScaling",
    "alibi_slopes",
    "functional",
    "t5_buckets",
]
