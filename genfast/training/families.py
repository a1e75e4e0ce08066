"""The kinds of models that train, each with its options, its run and its loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from genfast.data import Rows
from genfast.training import gan_loop, rbm_loop, rbm_sampling, vae_loop
from genfast.training.gan_run import GANOptions, GANRun
from genfast.training.rbm_run import RBMOptions, RBMRun
from genfast.training.run import Options, Progress, Run, Split
from genfast.training.vae_run import AutoencoderRun, IWAEOptions, VAEOptions, VQVAEOptions

__all__ = ["MODELS", "Family", "family_of", "start", "train"]


class Family(NamedTuple):
    """What the command needs of a kind of model."""

    options: type[Options]
    run: type[Run]
    measures: type[Any]
    train: Callable[..., Any]
    sample: Callable[..., Any]
    sample_options: frozenset[str]  # beside n, seed and means
    pictures: str | None  # module that draws it


_CHAINS = frozenset(("steps", "beta", "clamp"))
_MACHINE = Family(RBMOptions, RBMRun, rbm_loop.RBMMeasures, rbm_loop.train, rbm_sampling.sample, _CHAINS, None)


def _autoencoder(options: type[Options], measures: type[Any]) -> Family:
    return Family(options, AutoencoderRun, measures, vae_loop.train, vae_loop.sample, frozenset(), "vae_pictures")


_FAMILIES = {
    "rbm": _MACHINE,
    "dbn": _MACHINE,
    "vae": _autoencoder(VAEOptions, vae_loop.VAEMeasures),
    "iwae": _autoencoder(IWAEOptions, vae_loop.IWAEMeasures),
    "vqvae": _autoencoder(VQVAEOptions, vae_loop.VQVAEMeasures),
    "gan": Family(
        GANOptions, GANRun, gan_loop.GANMeasures, gan_loop.train, gan_loop.sample, frozenset(), "gan_pictures"
    ),
}
MODELS = tuple(_FAMILIES)


def family_of(model: str) -> Family:
    """What belongs to a model's name.

    Raises:
        ValueError: for an unknown one.
    """
    if model not in _FAMILIES:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    return _FAMILIES[model]


def start(options: Options, rows: Rows, device: torch.device | str = "cpu") -> Run:
    """A run before its first epoch; torch's default generator stays as it is.

    Args:
        options: ``RBMOptions``, ``VAEOptions``, ``IWAEOptions``, ``VQVAEOptions`` or ``GANOptions``.
        rows: the data, whose columns give the size of what the model sees.
        device: where the model lives.

    Raises:
        ValueError: for data that the model cannot be made for.

    Examples:
        >>> from genfast.training import RBMOptions
        >>> run = start(RBMOptions(hidden=(4,)), Rows(torch.ones(5, 3), None))
        >>> run.model.W.shape
        torch.Size([3, 4])
    """
    return family_of(options.model).run.start(options, rows, device)


def train(run: Run, split: Split, progress: Progress | None = None) -> Iterator[Any]:
    """Trains up to the run's number of epochs, a DBN layer by layer; yields after each epoch, ``run`` being up to date.

    A run that is saved after an epoch and loaded goes on with the bits that it would have had without.

    Args:
        run: of ``start`` or ``load``; it changes.
        split: of ``prepare``.
        progress: called after each batch with the finished fraction of the epoch.

    Returns:
        An iterator over ``RBMMeasures``, ``VAEMeasures``, ``IWAEMeasures``, ``VQVAEMeasures`` or ``GANMeasures``.

    Raises:
        ValueError: where training diverges.

    Examples:
        >>> from genfast.training import RBMOptions, prepare
        >>> rows = Rows((torch.arange(60) % 3 > 0).float().view(20, 3), None)
        >>> run = start(RBMOptions(hidden=(4,), epochs=3, batch=6, lr=0.1), rows)
        >>> [measures.epoch for measures in train(run, prepare(run, rows))]
        [1, 2, 3]
    """
    return family_of(run.options.model).train(run, split, progress)  # type: ignore[no-any-return]
