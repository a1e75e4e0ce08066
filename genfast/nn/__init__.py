"""Layers: ``torch.nn.Module``s over ``genfast.ops``."""

from genfast.nn import functional, utils
from genfast.nn.adain import AdaIN, InstanceNorm2d
from genfast.nn.attention import MultiheadAttention
from genfast.nn.classification_rbm import ClassificationRBM
from genfast.nn.conditional_rbm import ConditionalRBM
from genfast.nn.conv_rbm import ConvRBM
from genfast.nn.minibatch_stddev import MinibatchStdDev
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
from genfast.nn.vae import ELBO, GaussianKL, Reparameterize
from genfast.nn.vector_quantizer import VectorQuantizer

__all__ = [
    "AdaIN",
    "ClassificationRBM",
    "ConditionalRBM",
    "ConvRBM",
    "DynamicNTKScaling",
    "ELBO",
    "GaussianKL",
    "InstanceNorm2d",
    "LearnedPositionalEncoding",
    "LinearScaling",
    "Llama3Scaling",
    "MinibatchStdDev",
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
    "VectorQuantizer",
    "YarnScaling",
    "alibi_slopes",
    "functional",
    "t5_buckets",
    "utils",
]
