"""Layers: ``torch.nn.Module``s over ``genfast.ops``."""

from genfast.nn.rbm import RBM
from genfast.nn.vae import Reparameterize

__all__ = ["RBM", "Reparameterize"]
