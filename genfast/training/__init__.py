"""The training behind ``genfast train``: options, the loop, and checkpoints that continue bit for bit."""

from genfast.training.checkpoint import load, load_model, save
from genfast.training.loop import Measures, train
from genfast.training.run import METHODS, MODELS, Options, Run, Split, prepare, start
from genfast.training.sampling import sample

__all__ = [
    "METHODS",
    "MODELS",
    "Measures",
    "Options",
    "Run",
    "Split",
    "load",
    "load_model",
    "prepare",
    "sample",
    "save",
    "start",
    "train",
]
