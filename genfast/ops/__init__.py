"""The ops: functions of tensors, each with its backends and derivatives."""

from genfast.ops.bernoulli_sample import bernoulli_sample
from genfast.ops.rbm_cd import RBMGradients, rbm_cd
from genfast.ops.rbm_free_energy import rbm_free_energy
from genfast.ops.rbm_gibbs import GibbsResult, rbm_gibbs
from genfast.ops.rbm_half_step import rbm_half_step
from genfast.ops.reparameterize import gaussian_kl, reparameterize, reparameterize_kl

__all__ = [
    "GibbsResult",
    "RBMGradients",
    "bernoulli_sample",
    "gaussian_kl",
    "rbm_cd",
    "rbm_free_energy",
    "rbm_gibbs",
    "rbm_half_step",
    "reparameterize",
    "reparameterize_kl",
]
