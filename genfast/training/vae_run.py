"""Training runs of autoencoders: options and state."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from genfast.data import Rows
from genfast.models import IWAE, VAE, VQVAE
from genfast.models._likelihoods import LIKELIHOODS
from genfast.ops.iwae_bound import GRADIENTS
from genfast.training.run import Column, Options, Run, restored, standardization

__all__ = ["AutoencoderOptions", "AutoencoderRun", "IWAEOptions", "VAEOptions", "VQVAEOptions"]

_ADAM = ("exp_avg", "exp_avg_sq", "step")
_HIDDEN = {"mlp": (400,), "conv": (32, 64), "residual": (32, 64)}


@dataclasses.dataclass(frozen=True)
class AutoencoderOptions(Options):
    """What the options of ``VAEOptions``, ``IWAEOptions`` and ``VQVAEOptions`` have in common.

    Attributes:
        lr, weight_decay: of AdamW.
        binarize: for the Bernoulli likelihood only, whose default is ``"threshold"``.
        hidden: widths of the encoder's hidden layers, for convolutions the channels of its levels, each of half the
            resolution; the decoder mirrors them. () for 400, or 32, 64.
        arch: ``"mlp"``, ``"conv"`` or ``"residual"``.
        likelihood: of x given z: ``"bernoulli"``, ``"continuous_bernoulli"``, ``"gaussian"`` (of standardized data,
            mean and variance predicted) or ``"discretized_logistic"``.

    The others are those of ``Options``.

    Raises:
        ValueError: for values out of range or that do not go together.
    """

    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("mlp", "conv", "residual")

    lr: float = 1e-3
    binarize: str = ""
    hidden: tuple[int, ...] = ()
    arch: str = "mlp"
    likelihood: str = "bernoulli"

    def __post_init__(self) -> None:
        self._one_of("arch", self.ARCHITECTURES)
        self._one_of("likelihood", tuple(LIKELIHOODS))
        if not self.hidden:
            object.__setattr__(self, "hidden", _HIDDEN[self.arch])
        if not self.binarize:
            object.__setattr__(self, "binarize", "threshold" if self.binary else "none")
        super().__post_init__()
        if self.binarize != "none" and not self.binary:
            raise ValueError(f"binarize={self.binarize} is for likelihood=bernoulli, not for {self.likelihood}")
        if min(self.hidden) < 1:
            raise ValueError(f"hidden must be positive numbers of units or channels, got {self.hidden}")

    @property
    def binary(self) -> bool:
        return self.likelihood == "bernoulli"

    @property
    def standardized(self) -> bool:
        return self.likelihood == "gaussian"

    @property
    def bounded(self) -> str | None:
        return None if self.standardized else f"a {self.likelihood} likelihood needs"

    @property
    def code(self) -> str:
        """The size of what lies between encoder and decoder, to print."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class VAEOptions(AutoencoderOptions):
    """Of a ``models.VAE``.

    Attributes:
        latent: size of z.
        beta: weight of the KL term.
        free_bits: nats that each latent dimension may spend for nothing, see ``ops.elbo``.
        samples: draws of z a row.

    The others are those of ``AutoencoderOptions``.

    Raises:
        ValueError: for values out of range or that do not go together.

    Examples:
        >>> VAEOptions(latent=2, beta=4.0).hidden
        (400,)
    """

    MODELS: ClassVar[tuple[str, ...]] = ("vae",)
    FREE: ClassVar[frozenset[str]] = Options.FREE | {"beta", "free_bits", "samples"}

    model: str = "vae"
    latent: int = 20
    beta: float = 1.0
    free_bits: float = 0.0
    samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(latent=1, samples=1)
        self._finite("beta", "free_bits")

    @property
    def code(self) -> str:
        return str(self.latent)


@dataclasses.dataclass(frozen=True)
class IWAEOptions(AutoencoderOptions):
    """Of a ``models.IWAE``.

    Attributes:
        latent: size of z.
        samples: K, draws of z a row.
        gradient: ``"iwae"``, ``"stl"``, ``"dreg"`` or ``"vae"``, see ``ops.iwae_objective``.

    The others are those of ``AutoencoderOptions``.

    Raises:
        ValueError: for values out of range or that do not go together.

    Examples:
        >>> IWAEOptions(gradient="dreg").samples
        50
    """

    MODELS: ClassVar[tuple[str, ...]] = ("iwae",)
    FREE: ClassVar[frozenset[str]] = Options.FREE | {"samples", "gradient"}

    model: str = "iwae"
    latent: int = 20
    samples: int = 50
    gradient: str = "iwae"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(latent=1, samples=1)
        self._one_of("gradient", tuple(GRADIENTS))

    @property
    def code(self) -> str:
        return str(self.latent)


@dataclasses.dataclass(frozen=True)
class VQVAEOptions(AutoencoderOptions):
    """Of a ``models.VQVAE``; its ``arch`` is ``"residual"``.

    Attributes:
        codes: in the codebook, which starts at k-means of the first batch.
        dim: of a code.
        commitment: weight of the commitment loss.
        decay: of the running means that the codebook follows.
        revive_below: codes whose running count falls below it move to a vector of the batch.

    The others are those of ``AutoencoderOptions``.

    Raises:
        ValueError: for values out of range or that do not go together.

    Examples:
        >>> VQVAEOptions(codes=64).hidden
        (32, 64)
    """

    MODELS: ClassVar[tuple[str, ...]] = ("vqvae",)
    ARCHITECTURES: ClassVar[tuple[str, ...]] = ("residual",)

    model: str = "vqvae"
    arch: str = "residual"
    codes: int = 128
    dim: int = 16
    commitment: float = 0.25
    decay: float = 0.99
    revive_below: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(codes=1, dim=1)
        self._finite("commitment", "decay", "revive_below")
        if self.decay >= 1:
            raise ValueError(f"decay must be below 1, got {self.decay}")

    @property
    def code(self) -> str:
        return f"{self.codes}x{self.dim}"


@dataclasses.dataclass
class AutoencoderRun(Run):
    """A ``models.VAE``, ``models.IWAE`` or ``models.VQVAE`` in training.

    Attributes:
        inputs: values of an example.

    The others are those of ``Run``.
    """

    inputs: int = 0

    @classmethod
    def start(cls, options: AutoencoderOptions, rows: Rows, device: torch.device | str) -> AutoencoderRun:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = _make_model(options, rows.values.shape[1], rows.shape)
        mean, std = standardization(options, rows)
        return cls(options, model.to(device), rows.shape, mean, std, inputs=rows.values.shape[1])

    @classmethod
    def restore(
        cls,
        options: AutoencoderOptions,
        about: dict[str, Any],
        parts: dict[str, dict[str, Tensor]],
        device: torch.device | str,
    ) -> AutoencoderRun:
        visible, shape = about["visible"], about["shape"]
        model = restored(lambda: _make_model(options, visible, shape), parts["model"])
        data = parts["data"]
        run = cls(
            options, model.to(device), shape, data.get("mean"), data.get("std"), about["epoch"], parts["optimizer"],
            visible,
        )  # fmt: skip
        run._check_optimizer()
        return run

    def _check_optimizer(self) -> None:
        shapes: dict[str, torch.Size] = {}
        for name, parameter in self.model.named_parameters():
            shapes |= {f"{name}.{key}": torch.Size() if key == "step" else parameter.shape for key in _ADAM}
        if self.optimizer and {name: tensor.shape for name, tensor in self.optimizer.items()} != shapes:
            raise ValueError("the optimizer's buffers do not fit the model")

    @property
    def visible(self) -> int:
        return self.inputs

    @property
    def sizes(self) -> str:
        options = self.options
        return f"{options.arch} {'-'.join(map(str, (self.visible, *options.hidden, options.code)))}"

    @property
    def table(self) -> tuple[Column, ...]:
        model = self.options.model
        first = Column("epoch", "epoch", "d"), Column("training_loss", "training loss")
        last = Column("seconds", "seconds", ".1f")
        if model == "vqvae":
            measures = (
                Column("reconstruction", "reconstruction"),
                Column("quantizer_loss", "quantizer loss", ".4f"),
                Column("perplexity", "perplexity", ".1f"),
                Column("codes_used", "codes used", "d"),
            )
        else:
            bound = (Column("bound", f"bound, K={self.options.samples}"),) if model == "iwae" else ()
            measures = (*bound, Column("elbo", "ELBO"), Column("reconstruction", "reconstruction"), Column("kl", "KL"))
        return *first, *measures, last

    def batch(self, rows: Tensor) -> Tensor:
        """Rows as the model's networks take them."""
        return rows if self.options.arch == "mlp" else rows.view(-1, *_image(self.shape))

    def rows(self, values: Tensor) -> Tensor:
        """What the model gives, as rows in the units of the data, on the CPU."""
        return self.decode(values.flatten(1).float().cpu())


def _image(shape: tuple[int, ...] | None) -> tuple[int, int, int]:
    """(channels, height, width)."""
    if shape is not None and len(shape) == 2:
        return 1, shape[0], shape[1]
    if shape is not None and len(shape) == 3:
        return shape[0], shape[1], shape[2]
    raise ValueError("convolutions need images, as of digits, idx or images; these rows are none: use --arch mlp")


def _make_model(options: AutoencoderOptions, columns: int, shape: tuple[int, ...] | None) -> VAE | VQVAE:
    """The untrained model."""
    likelihood: dict[str, Any] = {"likelihood": options.likelihood}
    if isinstance(options, VQVAEOptions):
        return VQVAE.conv(
            _image(shape), options.hidden, options.codes, options.dim, **likelihood, beta=options.commitment,
            decay=options.decay, revive_below=options.revive_below, init="kmeans",
        )  # fmt: skip
    assert isinstance(options, (VAEOptions, IWAEOptions))
    kind: type[VAE] = VAE
    if isinstance(options, IWAEOptions):
        kind = IWAE
        likelihood |= {"samples": options.samples, "gradient": options.gradient}
    model: VAE
    if options.arch == "mlp":
        model = kind.mlp(columns, options.hidden, options.latent, **likelihood)
    else:
        build = kind.conv if options.arch == "conv" else kind.residual
        model = build(_image(shape), options.hidden, options.latent, **likelihood)
    return model
