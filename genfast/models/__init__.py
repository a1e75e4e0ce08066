"""Whole models, thin over ``genfast.nn``."""

from genfast.models.collaborative_rbm import CollaborativeRBM, RatingTable
from genfast.models.dbm import DBM, MeanField
from genfast.models.dbn import DBN
from genfast.models.vae import VAE, VAEOutput

__all__ = ["DBM", "DBN", "CollaborativeRBM", "MeanField", "RatingTable", "VAE", "VAEOutput"]
