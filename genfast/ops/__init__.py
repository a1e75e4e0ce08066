"""The ops: functions of tensors, each with its backends and derivatives."""

from genfast.ops.adain import adain, instance_norm
from genfast.ops.attention import T5Bias, WindowBias2d, attention
from genfast.ops.attention_decode import attention_decode
from genfast.ops.attention_jvp import attention_jvp
from genfast.ops.attention_varlen import attention_varlen
from genfast.ops.bernoulli_sample import bernoulli_sample
from genfast.ops.bias_act import bias_act
from genfast.ops.diff_augment import diff_augment
from genfast.ops.elbo import ELBOTerms, elbo
from genfast.ops.filtered_lrelu import filtered_lrelu
from genfast.ops.gan_loss import gan_loss
from genfast.ops.iwae_bound import ImportanceEstimate, importance_log_likelihood, iwae_bound, iwae_objective
from genfast.ops.log_likelihood import log_likelihood
from genfast.ops.log_ratio import reparameterize_log_ratio
from genfast.ops.merge_attention import merge_attention
from genfast.ops.minibatch_stddev import minibatch_stddev
from genfast.ops.modulated_conv2d import modulated_conv2d
from genfast.ops.pack_bits import pack_bits, unpack_bits
from genfast.ops.rbm_ais import AISBracket, AISResult, ais_schedule, rbm_ais, rbm_ais_bracket
from genfast.ops.rbm_cd import RBMGradients, rbm_cd
from genfast.ops.rbm_cd_sgd import RBMUpdate, rbm_cd_sgd_
from genfast.ops.rbm_free_energy import rbm_free_energy
from genfast.ops.rbm_gibbs import GibbsResult, rbm_gibbs
from genfast.ops.rbm_half_step import rbm_half_step
from genfast.ops.rbm_log_z_exact import rbm_log_z_exact
from genfast.ops.rbm_tempering import TemperingResult, joint_energy, rbm_tempering
from genfast.ops.reparameterize import gaussian_kl, reparameterize, reparameterize_kl
from genfast.ops.rotary import rotary
from genfast.ops.spectral_normalize import SpectralNormalized, spectral_normalize
from genfast.ops.upfirdn2d import downsample2d, setup_filter, upfirdn2d, upsample2d
from genfast.ops.vector_quantize import (
    CodeSums,
    CodeUsage,
    NearestCode,
    VectorQuantized,
    code_sums,
    code_usage,
    nearest_code,
    vector_quantize,
)

__all__ = [
    "AISBracket",
    "AISResult",
    "CodeSums",
    "CodeUsage",
    "ELBOTerms",
    "GibbsResult",
    "ImportanceEstimate",
    "NearestCode",
    "RBMGradients",
    "RBMUpdate",
    "SpectralNormalized",
    "T5Bias",
    "TemperingResult",
    "VectorQuantized",
    "WindowBias2d",
    "adain",
    "ais_schedule",
    "attention",
    "attention_decode",
    "attention_jvp",
    "attention_varlen",
    "bernoulli_sample",
    "bias_act",
    "code_sums",
    "code_usage",
    "downsample2d",
    "diff_augment",
    "elbo",
    "gan_loss",
    "filtered_lrelu",
    "gaussian_kl",
    "importance_log_likelihood",
    "instance_norm",
    "iwae_bound",
    "iwae_objective",
    "joint_energy",
    "log_likelihood",
    "merge_attention",
    "minibatch_stddev",
    "modulated_conv2d",
    "nearest_code",
    "pack_bits",
    "rbm_ais",
    "rbm_ais_bracket",
    "rbm_cd",
    "rbm_cd_sgd_",
    "rbm_free_energy",
    "rbm_gibbs",
    "rbm_half_step",
    "rbm_log_z_exact",
    "rbm_tempering",
    "reparameterize",
    "reparameterize_kl",
    "reparameterize_log_ratio",
    "rotary",
    "spectral_normalize",
    "setup_filter",
    "unpack_bits",
    "upfirdn2d",
    "upsample2d",
    "vector_quantize",
]
