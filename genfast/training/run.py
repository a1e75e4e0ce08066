"""What every training run has: options, data and state."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from genfast.data import BINARIZE, Rows, binarize

__all__ = [
    "Column",
    "Options",
    "Progress",
    "Run",
    "Split",
    "batches",
    "generator",
    "prepare",
    "restored",
    "standardization",
]

Progress = Callable[[float], None]  # called after each batch with the finished fraction of the epoch


class Split(NamedTuple):
    """Rows for training [N, V] and to measure on [M, V]; rows of probabilities where they are sampled.

    labels: the training rows', [N], from 0 to their number - 1, where the data have some.
    """

    train: Tensor
    held_out: Tensor
    labels: Tensor | None = None


class Column(NamedTuple):
    """Of what is printed after an epoch: a field of the measures, its title, its format, and what is added to it.

    labelled: only for data with labels; ``{classes}`` in the title is how many there are.
    """

    field: str
    title: str
    format: str = ".3f"
    offset: int = 0
    labelled: bool = False


@dataclasses.dataclass(frozen=True)
class Options:
    """What the options of all models have in common; the fields are options of ``genfast train``.

    Attributes:
        model: which model, one of ``MODELS`` of the class.
        epochs: passes over the training rows.
        batch: rows a gradient; the rows that are left over at the end of an epoch wait for the next.
        lr: learning rate.
        weight_decay: of the optimizer.
        binarize: how values in [0, 1] become 0 and 1, see ``genfast.data.binarize``; samples are drawn anew in each
            epoch.
        scale: the data are divided by it, see ``genfast.data.read_rows``.
        size: (height, width) that images are read in, see ``genfast.data.read_images``.
        held_out: fraction of the rows to measure on.
        seed: of the weights, the split, the order of rows and all noise.

    Raises:
        ValueError: for values out of range or that do not go together.
    """

    MODELS: ClassVar[tuple[str, ...]] = ()
    FREE: ClassVar[frozenset[str]] = frozenset(("epochs", "batch", "lr", "weight_decay"))  # may change on resuming

    model: str = ""
    epochs: int = 10
    batch: int = 64
    lr: float = 0.05
    weight_decay: float = 0.0
    binarize: str = "threshold"
    scale: float | None = None
    size: tuple[int, int] | None = None
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        self._one_of("model", self.MODELS)
        self._one_of("binarize", BINARIZE)
        self._at_least(epochs=1, batch=1)
        self._finite("lr", "weight_decay")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")

    def _one_of(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def _at_least(self, **least: int) -> None:
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")

    def _finite(self, *names: str) -> None:
        for name in names:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a finite number, at least 0, got {getattr(self, name)}")

    @property
    def binary(self) -> bool:
        """Whether ``binarize`` acts on the data."""
        return False

    @property
    def standardized(self) -> bool:
        """Whether the data's columns are brought to mean 0 and deviation 1."""
        return False

    @property
    def bounded(self) -> str | None:
        """What it is that needs values in [0, 1], if anything does."""
        return None


@dataclasses.dataclass
class Run:
    """A model in training: all that its next epoch depends on, apart from the data.

    Attributes:
        options: see the class of options.
        model: what is trained.
        shape: of an example that is an image, or None.
        mean, std: what standardized the data, [columns]; None where nothing did.
        epoch: finished epochs.
        optimizer: the optimizer's tensors, by parameter name.
    """

    options: Any
    model: Any
    shape: tuple[int, ...] | None
    mean: Tensor | None
    std: Tensor | None
    epoch: int = 0
    optimizer: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    # What a family of models says of its runs.

    @classmethod
    def start(cls, options: Any, rows: Rows, device: torch.device | str) -> Run:
        """A run before its first epoch; torch's default generator stays as it is."""
        raise NotImplementedError

    @classmethod
    def restore(
        cls, options: Any, about: dict[str, Any], parts: dict[str, dict[str, Tensor]], device: torch.device | str
    ) -> Run:
        """A run from ``about()``, its options, and the tensors of a checkpoint; any exception for what does not fit."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """What a checkpoint says beside tensors and options."""
        return {"class": self.class_name, "visible": self.visible, "shape": self.shape, "epoch": self.epoch}

    @property
    def class_name(self) -> str:
        return f"genfast.models.{type(self.model).__name__}"

    @property
    def trained(self) -> Any:
        """The model as it is used after training."""
        return self.model

    @property
    def visible(self) -> int:
        """Values of an example that the model sees."""
        raise NotImplementedError

    @property
    def columns(self) -> int:
        """Values of an example in the data."""
        return self.visible

    @property
    def place(self) -> tuple[int, ...]:
        """How far training is: the first fields of the measures."""
        return (self.epoch,)

    @property
    def place_text(self) -> str:
        return f"epoch {self.epoch}"

    @property
    def finished(self) -> bool:
        return bool(self.epoch >= self.options.epochs)

    @property
    def sizes(self) -> str:
        """The model's, to print."""
        raise NotImplementedError

    @property
    def table(self) -> tuple[Column, ...]:
        """What to print after an epoch."""
        raise NotImplementedError

    def encode(self, values: Tensor) -> Tensor:
        """Data as what the model sees."""
        return values if self.mean is None or self.std is None else (values - self.mean) / self.std

    def decode(self, values: Tensor) -> Tensor:
        """What the model sees in the units of the data."""
        return values if self.mean is None or self.std is None else values * self.std + self.mean

    @property
    def device(self) -> torch.device:
        return next(iter(nn.Module.parameters(self.model))).device


def generator(*parts: int | str) -> torch.Generator:
    """A generator on the CPU whose seed depends on all parts, so that no state has to be kept."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def batches(options: Options, count: int, noise: torch.Generator) -> Tensor:
    """Indices of an epoch's rows, [batches, batch]."""
    batch = min(options.batch, count)
    return torch.randperm(count, generator=noise)[: count // batch * batch].view(-1, batch)


def _order(options: Options, count: int) -> tuple[Tensor, Tensor]:
    """Indices of the rows to train on and of those held out."""
    if count < 2:
        raise ValueError(f"the data must have at least 2 rows, to train on one and to measure on one; got {count}")
    order = torch.randperm(count, generator=generator("split", options.seed))
    held_out = min(count - 1, max(1, round(count * options.held_out)))
    return order[held_out:], order[:held_out]


def standardization(options: Options, rows: Rows) -> tuple[Tensor | None, Tensor | None]:
    """Mean and deviation of each column of the training rows, where the options standardize."""
    if not options.standardized:
        return None, None
    values = rows.values[_order(options, len(rows.values))[0]].double()
    mean, std = values.mean(0).float(), values.std(0, correction=0).float()
    return mean, torch.where(std > 0, std, 1.0)


def prepare(run: Run, rows: Rows) -> Split:
    """The data as the run's model sees them, on its device.

    Args:
        run: of ``start`` or ``load``.
        rows: the data.

    Raises:
        ValueError: for data of another width than the model's, or outside what it can represent.

    Examples:
        >>> from genfast.training import RBMOptions, start
        >>> rows = Rows((torch.arange(30.0) % 2).view(10, 3), None)
        >>> train, held_out, _ = prepare(start(RBMOptions(hidden=(4,), held_out=0.2), rows), rows)
        >>> train.shape, held_out.unique()
        (torch.Size([8, 3]), tensor([0., 1.]))
    """
    options, values = run.options, rows.values
    if values.shape[1] != run.columns:
        raise ValueError(f"the data have {values.shape[1]} columns, the model was made for {run.columns}")
    if options.bounded:
        low, high = values.min().item(), values.max().item()
        if low < 0 or high > 1:
            raise ValueError(
                f"{options.bounded} values in [0, 1], the data go from {low:g} to {high:g}; divide them by a scale, "
                "or use gaussian ones"
            )
    values = run.encode(values)
    first, second = _order(options, len(values))
    train, held_out = values[first], values[second]
    if options.binary:
        held_out = binarize(held_out, options.binarize, generator("held out", options.seed))
        if options.binarize == "threshold":
            train = binarize(train, "threshold")
    labels = None if rows.labels is None else rows.labels[first].unique(return_inverse=True)[1].to(run.device)
    return Split(train.to(run.device), held_out.to(run.device), labels)


def restored(make: Callable[[], nn.Module], found: dict[str, Tensor]) -> nn.Module:
    """``make()`` with the tensors of a checkpoint; a KeyError or ValueError names the first that does not fit."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # takes no memory
        wanted = make().state_dict()
    for name, tensor in wanted.items():
        if name not in found:
            raise KeyError(f"model.{name}")
        if found[name].shape != tensor.shape:
            raise ValueError(f"model.{name} is {tuple(found[name].shape)}, not {tuple(tensor.shape)}")
    with torch.random.fork_rng(devices=[]):
        model = make()
    model.load_state_dict(found)
    return model
