"""What a training run is: its options, its data and its state."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from genfast.data import BINARIZE, Rows, binarize, one_hot
from genfast.models import DBN
from genfast.nn import RBM
from genfast.ops._rbm_common import PRECISIONS
from genfast.ops._rbm_units import BERNOULLI, GAUSSIAN, SOFTMAX, parse_units

__all__ = ["METHODS", "MODELS", "Options", "Run", "Split", "categories", "generator", "prepare", "start"]

MODELS = ("rbm", "dbn")
METHODS = ("cd", "pcd", "fpcd", "pt")


@dataclasses.dataclass(frozen=True)
class Options:
    """Of a training run; the fields are the options of ``genfast train``.

    Attributes:
        model: ``"rbm"`` or ``"dbn"``.
        hidden: hidden units of each layer, from below; one number for an RBM.
        epochs: passes over the training rows, for a DBN a layer.
        batch: rows a gradient; the rows that are left over at the end of an epoch wait for the next.
        lr: learning rate of stochastic gradient descent.
        momentum: its momentum.
        weight_decay: its weight decay, on W only.
        method: ``"cd"``, ``"pcd"``, ``"fpcd"`` or ``"pt"``, see ``nn.RBM.contrastive_divergence``.
        k: Gibbs steps a gradient.
        temperatures: of method ``"pt"``, evenly spaced inverse temperatures from 0 to 1.
        visible: kind of the visible units.
        centered: whether an RBM trains by the centered gradient.
        precision: of the products that sample.
        binarize: how values in [0, 1] become states of bernoulli units, see ``genfast.data.binarize``; samples are
            drawn anew in each epoch.
        scale: the data are divided by it, see ``genfast.data.read_rows``.
        held_out: fraction of the rows to measure on.
        seed: of the weights, the split, the order of rows and all noise.

    Raises:
        ValueError: for values out of range or that do not go together.

    Examples:
        >>> Options(hidden=(100,), method="pcd").epochs
        10
    """

    model: str = "rbm"
    hidden: tuple[int, ...] = (500,)
    epochs: int = 10
    batch: int = 64
    lr: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    method: str = "cd"
    k: int = 1
    temperatures: int = 10
    visible: str = "bernoulli"
    centered: bool = False
    precision: str = "fp32"
    binarize: str = "threshold"
    scale: float | None = None
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("model", MODELS), ("method", METHODS), ("precision", PRECISIONS), ("binarize", BINARIZE)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, least in (("epochs", 1), ("batch", 1), ("k", 1), ("temperatures", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "momentum", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a finite number, at least 0, got {getattr(self, name)}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must be positive numbers of units, got {self.hidden}")
        if self.model == "rbm" and len(self.hidden) > 1:
            raise ValueError(f"an rbm has one hidden layer, got hidden={self.hidden}; a dbn has several")
        if self.model == "dbn" and self.centered:
            raise ValueError("centered is for an rbm, not for a dbn")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
        parse_units("train", "visible", self.visible, 0)


class Split(NamedTuple):
    """Visible states for training [N, V] and to measure on [M, V]; rows of probabilities where they are sampled."""

    train: Tensor
    held_out: Tensor


@dataclasses.dataclass
class Run:
    """A model in training: all that its next epoch depends on, apart from the data.

    Attributes:
        options: see ``Options``.
        model: an ``nn.RBM`` or a ``models.DBN``.
        shape: of an example that is an image, or None.
        mean, std: what standardized Gaussian data, [V]; None for other units.
        layer: index of the layer in training, 0 for an RBM.
        epoch: finished epochs of that layer.
        momentum: buffers of the layer's optimizer, by parameter name.
    """

    options: Options
    model: RBM | DBN
    shape: tuple[int, ...] | None
    mean: Tensor | None
    std: Tensor | None
    layer: int = 0
    epoch: int = 0
    momentum: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def layers(self) -> list[RBM]:
        return [self.model] if isinstance(self.model, RBM) else self.model._rbms


def categories(visible: str) -> int:
    """K of softmax:K, else 1; each number in the data is so many visible units."""
    return int(visible.partition(":")[2] or 1)


def generator(*parts: int | str) -> torch.Generator:
    """A generator on the CPU whose seed depends on all parts, so that no state has to be kept."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def start(options: Options, rows: Rows, device: torch.device | str = "cpu") -> Run:
    """A run before its first epoch; torch's default generator stays as it is.

    Args:
        options: of the run.
        rows: the data, whose columns give the number of visible units.
        device: where the model lives.

    Examples:
        >>> run = start(Options(hidden=(4,)), Rows(torch.ones(5, 3), None))
        >>> run.model.W.shape
        torch.Size([3, 4])
    """
    visible = rows.values.shape[1] * categories(options.visible)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = make_model(options, visible)
    mean = std = None
    if options.visible == "gaussian":
        values = rows.values[_order(options, len(rows.values))[0]].double()
        mean, std = values.mean(0).float(), values.std(0, correction=0).float()
        std = torch.where(std > 0, std, 1.0)
    return Run(options, model.to(device), rows.shape, mean, std)


def make_model(options: Options, visible: int) -> RBM | DBN:
    """The untrained model with so many visible units."""
    if options.model == "dbn":
        return DBN(visible, options.hidden, visible_units=options.visible, precision=options.precision)
    return RBM(
        visible, options.hidden[0], visible_units=options.visible, precision=options.precision,
        centered=options.centered,
    )  # fmt: skip


def _order(options: Options, count: int) -> tuple[Tensor, Tensor]:
    """Indices of the rows to train on and of those held out."""
    if count < 2:
        raise ValueError(f"the data must have at least 2 rows, to train on one and to measure on one; got {count}")
    order = torch.randperm(count, generator=generator("split", options.seed))
    held_out = min(count - 1, max(1, round(count * options.held_out)))
    return order[held_out:], order[:held_out]


def prepare(run: Run, rows: Rows) -> Split:
    """The data as visible states of the run's model, on its device.

    Raises:
        ValueError: for data of another width than the model's, or that are no states of its units.

    Examples:
        >>> rows = Rows(torch.rand(10, 3), None)
        >>> train, held_out = prepare(start(Options(hidden=(4,), held_out=0.2), rows), rows)
        >>> train.shape, held_out.unique()
        (torch.Size([8, 3]), tensor([0., 1.]))
    """
    options, rbm = run.options, run.layers[0]
    units = parse_units("train", "visible", options.visible, 0)
    values = rows.values
    if values.shape[1] * units.categories != rbm.visible:
        raise ValueError(
            f"the data have {values.shape[1]} columns, the model was made for {rbm.visible // units.categories}"
        )
    if units.kind == BERNOULLI:
        low, high = values.min().item(), values.max().item()
        if low < 0 or high > 1:
            raise ValueError(
                f"bernoulli units need values in [0, 1], the data go from {low:g} to {high:g}; divide them by a scale, "
                "or use gaussian units"
            )
    elif units.kind == SOFTMAX:
        values = one_hot(values, units.categories)
    elif units.kind == GAUSSIAN:
        assert run.mean is not None
        assert run.std is not None
        values = (values - run.mean) / run.std
    first, second = _order(options, len(values))
    train, held_out = values[first], values[second]
    if units.kind == BERNOULLI:
        held_out = binarize(held_out, options.binarize, generator("held out", options.seed))
        if options.binarize == "threshold":
            train = binarize(train, "threshold")
    return Split(train.to(rbm.W.device), held_out.to(rbm.W.device))
