"""Whole models, thin over ``genfast.nn``."""

from genfast.models.beta_vae import BetaVAE
from genfast.models.collaborative_rbm import CollaborativeRBM, RatingTable
from genfast.models.conditional_vae import ConditionalVAE
from genfast.models.cyclegan import CycleGANGenerator, PatchDiscriminator
from genfast.models.dbm import DBM, MeanField
from genfast.models.dbn import DBN
from genfast.models.dcgan import DCGAN, DCGANDiscriminator, DCGANGenerator
from genfast.models.gan import GAN, PackedDiscriminator
from genfast.models.gan_mlp import MLPGAN, MLPDiscriminator, MLPGenerator
from genfast.models.hierarchical_vae import HierarchicalVAE, HierarchicalVAEOutput
from genfast.models.iwae import IWAE
from genfast.models.sngan import SNGAN, SNGANDiscriminator, SNGANGenerator
from genfast.models.stylegan2 import StyleGAN2, StyleGAN2Discriminator, StyleGAN2Generator
from genfast.models.vae import VAE, VAEOutput
from genfast.models.vqvae import VQVAE, VQVAEOutput

__all__ = [
    "DBM",
    "DBN",
    "DCGAN",
    "GAN",
    "IWAE",
    "MLPGAN",
    "SNGAN",
    "VAE",
    "VQVAE",
    "BetaVAE",
    "CollaborativeRBM",
    "ConditionalVAE",
    "CycleGANGenerator",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "HierarchicalVAE",
    "HierarchicalVAEOutput",
    "MLPDiscriminator",
    "MLPGenerator",
    "MeanField",
    "PackedDiscriminator",
    "PatchDiscriminator",
    "RatingTable",
    "SNGANDiscriminator",
    "SNGANGenerator",
    "StyleGAN2",
    "StyleGAN2Discriminator",
    "StyleGAN2Generator",
    "VAEOutput",
    "VQVAEOutput",
]
