"""Layers: ``torch.nn.Module``s over ``genfast.ops``."""

from genfast.nn import functional, utils
from genfast.nn.ada import ADA, ada_augment
from genfast.nn.adain import AdaIN, InstanceNorm2d
from genfast.nn.attention import MultiheadAttention
from genfast.nn.bias_act import BiasAct
from genfast.nn.classification_rbm import ClassificationRBM
from genfast.nn.conditional_rbm import ConditionalRBM
from genfast.nn.conv_rbm import ConvRBM
from genfast.nn.diff_augment import DiffAugment
from genfast.nn.filtered_lrelu import FilteredLReLU
from genfast.nn.gan_consistency import consistency_penalty, latent_diversity_penalty, perturb_latents
from genfast.nn.gan_losses import GANLoss, gan_discriminator_loss, gan_generator_loss
from genfast.nn.gan_penalties import (
    LazyAdam,
    LazyRegularization,
    PathLengthPenalty,
    gradient_penalty,
    lazy_optimizer_parameters,
    path_length_penalty,
    r1_penalty,
    r2_penalty,
)
from genfast.nn.minibatch_stddev import MinibatchStdDev
from genfast.nn.modulated_conv2d import ModulatedConv2d
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
    "BiasAct",
    "AdaIN",
    "ADA",
    "ClassificationRBM",
    "ConditionalRBM",
    "ConvRBM",
    "Downsample2d",
    "DiffAugment",
    "DynamicNTKScaling",
    "ELBO",
    "GANLoss",
    "FilteredLReLU",
    "GaussianKL",
    "LazyAdam",
    "LazyRegularization",
    "InstanceNorm2d",
    "LearnedPositionalEncoding",
    "LinearScaling",
    "Llama3Scaling",
    "MinibatchStdDev",
    "ModulatedConv2d",
    "MultiheadAttention",
    "NTKScaling",
    "PathLengthPenalty",
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
    "ada_augment",
    "alibi_slopes",
    "consistency_penalty",
    "functional",
    "gan_discriminator_loss",
    "gan_generator_loss",
    "gradient_penalty",
    "latent_diversity_penalty",
    "lazy_optimizer_parameters",
    "path_length_penalty",
    "perturb_latents",
    "r1_penalty",
    "r2_penalty",
    "t5_buckets",
    "utils",
]
