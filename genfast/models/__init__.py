"""Whole models, thin over ``genfast.nn``."""

from genfast.models.beta_vae import BetaVAE
from genfast.models.collaborative_rbm import CollaborativeRBM, RatingTable
from genfast.models.conditional_vae import ConditionalVAE
from genfast.models.dbm import DBM, MeanField
from genfast.models.dbn import DBN
from genfast.models.hierarchical_vae import HierarchicalVAE, HierarchicalVAEOutput
from genfast.models.iwae import IWAE
from genfast.models.vae import VAE, VAEOutput
from genfast.models.vqvae import VQVAE, VQVAEOutput

__all__ = [
    "DBM",
    "DBN",
    "IWAE",
    "VAE",
    "VQVAE",
    "BetaVAE",
    "CollaborativeRBM",
    "ConditionalVAE",
    "HierarchicalVAE",
    "HierarchicalVAEOutput",
    "MeanField",
    "RatingTable",
    "VAEOutput",
    "VQVAEOutput",
]
