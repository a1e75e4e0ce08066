"""The ops: functions of tensors, each with its backends and derivatives."""

from genfast.ops.bernoulli_sample import bernoulli_sample
from genfast.ops.reparameterize import gaussian_kl, reparameterize, reparameterize_kl

__all__ = ["bernoulli_sample", "gaussian_kl", "reparameterize", "reparameterize_kl"]
