"""Training runs of RBMs and DBNs: options and state."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from genfast.data import Rows, one_hot
from genfast.models import DBN
from genfast.nn import RBM
from genfast.ops._rbm_common import PRECISIONS
from genfast.ops._rbm_units import parse_units
from genfast.training.run import Column, Options, Run, standardization

__all__ = ["METHODS", "RBMOptions", "RBMRun"]

METHODS = ("cd", "pcd", "fpcd", "pt")


@dataclasses.dataclass(frozen=True)
class RBMOptions(Options):
    """Of an RBM or a DBN.

    Attributes:
        model: ``"rbm"`` or ``"dbn"``, whose epochs are those of each layer.
        lr, weight_decay: of stochastic gradient descent; weights decay, biases do not.
        hidden: hidden units of each layer, from below; one number for an RBM.
        momentum: of the descent.
        method: ``"cd"``, ``"pcd"``, ``"fpcd"`` or ``"pt"``, see ``nn.RBM.contrastive_divergence``.
        k: Gibbs steps a gradient.
        temperatures: of method ``"pt"``, evenly spaced inverse temperatures from 0 to 1.
        visible: kind of the visible units.
        centered: whether an RBM trains by the centered gradient.
        precision: of the products that sample.

    The others are those of ``Options``.

    Raises:
        ValueError: for values out of range or that do not go together.

    Examples:
        >>> RBMOptions(hidden=(100,), method="pcd").epochs
        10
    """

    MODELS: ClassVar[tuple[str, ...]] = ("rbm", "dbn")
    FREE: ClassVar[frozenset[str]] = Options.FREE | {"momentum", "method", "k", "temperatures"}

    model: str = "rbm"
    hidden: tuple[int, ...] = (500,)
    momentum: float = 0.0
    method: str = "cd"
    k: int = 1
    temperatures: int = 10
    visible: str = "bernoulli"
    centered: bool = False
    precision: str = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("method", METHODS)
        self._one_of("precision", PRECISIONS)
        self._at_least(k=1, temperatures=2)
        self._finite("momentum")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must be positive numbers of units, got {self.hidden}")
        if self.model == "rbm" and len(self.hidden) > 1:
            raise ValueError(f"an rbm has one hidden layer, got hidden={self.hidden}; a dbn has several")
        if self.model == "dbn" and self.centered:
            raise ValueError("centered is for an rbm, not for a dbn")
        parse_units("train", "visible", self.visible, 0)

    @property
    def binary(self) -> bool:
        return self.visible == "bernoulli"

    @property
    def standardized(self) -> bool:
        return self.visible == "gaussian"

    @property
    def bounded(self) -> str | None:
        return "bernoulli units need" if self.visible == "bernoulli" else None

    @property
    def categories(self) -> int:
        """K of softmax:K, else 1; each number in the data is so many visible units."""
        return int(self.visible.partition(":")[2] or 1)


@dataclasses.dataclass
class RBMRun(Run):
    """An ``nn.RBM`` or a ``models.DBN`` in training.

    Attributes:
        layer: index of the layer in training, 0 for an RBM; ``epoch`` and ``optimizer`` are of that layer.

    The others are those of ``Run``.
    """

    layer: int = 0

    @classmethod
    def start(cls, options: RBMOptions, rows: Rows, device: torch.device | str) -> RBMRun:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = _make_model(options, rows.values.shape[1] * options.categories)
        return cls(options, model.to(device), rows.shape, *standardization(options, rows))

    @classmethod
    def restore(
        cls, options: RBMOptions, about: dict[str, Any], parts: dict[str, dict[str, Tensor]], device: torch.device | str
    ) -> RBMRun:
        visible, shape = about["visible"], about["shape"]
        widths = [visible, *options.hidden]
        name = "layers.{}.W" if options.model == "dbn" else "W"
        for index in range(len(widths) - 1):  # before memory is taken for the model
            try:
                found = tuple(parts["model"][name.format(index)].shape)
            except KeyError:
                raise KeyError(f"model.{name.format(index)}") from None
            if found != (widths[index], widths[index + 1]):
                raise ValueError(f"the weights of layer {index} are {found}, not {(widths[index], widths[index + 1])}")
        with torch.random.fork_rng(devices=[]):
            model = _make_model(options, visible)
        model.load_state_dict(parts["model"])
        layer = int(about["layer"])
        if not 0 <= layer < len(options.hidden):
            raise ValueError(f"it has no layer {layer}")
        data = parts["data"]
        run = cls(
            options, model.to(device), shape, data.get("mean"), data.get("std"), about["epoch"], parts["optimizer"],
            layer,
        )  # fmt: skip
        shapes = {name: parameter.shape for name, parameter in run.layers[layer].named_parameters()}
        if any(tensor.shape != shapes.get(name) for name, tensor in run.optimizer.items()):
            raise ValueError("the optimizer's buffers do not fit the model")
        return run

    def about(self) -> dict[str, Any]:
        return {**super().about(), "layer": self.layer}

    @property
    def class_name(self) -> str:
        return "genfast.nn.RBM" if isinstance(self.model, RBM) else super().class_name

    @property
    def layers(self) -> list[RBM]:
        return [self.model] if isinstance(self.model, RBM) else self.model._rbms

    @property
    def visible(self) -> int:
        return self.layers[0].visible

    @property
    def columns(self) -> int:
        return self.visible // self.options.categories

    @property
    def place(self) -> tuple[int, ...]:
        return self.layer, self.epoch

    @property
    def place_text(self) -> str:
        return super().place_text + (f" of layer {self.layer + 1}" if len(self.layers) > 1 else "")

    @property
    def finished(self) -> bool:
        return self.layer + 1 == len(self.layers) and super().finished

    @property
    def sizes(self) -> str:
        return "-".join(str(size) for size in (self.visible, *self.options.hidden))

    @property
    def table(self) -> tuple[Column, ...]:
        return (
            *((Column("layer", "layer", "d", 1),) if len(self.layers) > 1 else ()),
            Column("epoch", "epoch", "d"),
            Column("pseudo_likelihood", "pseudo-likelihood"),
            Column("free_energy_gap", "free-energy gap"),
            Column("reconstruction_error", "reconstruction error"),
            Column("seconds", "seconds", ".1f"),
        )

    def encode(self, values: Tensor) -> Tensor:
        return one_hot(values, self.options.categories) if self.options.categories > 1 else super().encode(values)


def _make_model(options: RBMOptions, visible: int) -> RBM | DBN:
    """The untrained model with so many visible units."""
    if options.model == "dbn":
        return DBN(visible, options.hidden, visible_units=options.visible, precision=options.precision)
    return RBM(
        visible, options.hidden[0], visible_units=options.visible, precision=options.precision,
        centered=options.centered,
    )  # fmt: skip
