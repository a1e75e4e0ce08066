"""The training behind ``genfast train``: options, the loops, and checkpoints that continue bit for bit."""

from genfast.training.checkpoint import load, load_model, save
from genfast.training.cyclegan_trainer import CycleGANStep, CycleGANTrainer, ImagePool
from genfast.training.families import MODELS, start, train
from genfast.training.gan_loop import GANMeasures
from genfast.training.gan_run import GANOptions
from genfast.training.gan_trainer import GANStep, GANTrainer
from genfast.training.rbm_loop import RBMMeasures
from genfast.training.rbm_run import METHODS, RBMOptions
from genfast.training.run import Run, Split, prepare
from genfast.training.sampling import sample
from genfast.training.vae_loop import IWAEMeasures, VAEMeasures, VQVAEMeasures
from genfast.training.vae_run import IWAEOptions, VAEOptions, VQVAEOptions

__all__ = [
    "METHODS",
    "MODELS",
    "CycleGANStep",
    "CycleGANTrainer",
    "GANMeasures",
    "GANOptions",
    "GANStep",
    "GANTrainer",
    "IWAEMeasures",
    "IWAEOptions",
    "ImagePool",
    "RBMMeasures",
    "RBMOptions",
    "Run",
    "Split",
    "VAEMeasures",
    "VAEOptions",
    "VQVAEMeasures",
    "VQVAEOptions",
    "load",
    "load_model",
    "prepare",
    "sample",
    "save",
    "start",
    "train",
]
