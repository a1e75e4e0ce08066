"""Whole models, thin over ``genfast.nn``."""

from genfast.models.vae import VAE, VAEOutput

__all__ = ["VAE", "VAEOutput"]
