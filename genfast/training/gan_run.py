"""Training runs of GANs: options and state."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genfast.data import Rows
from genfast.models import DCGAN, MLPGAN, SNGAN, StyleGAN2
from genfast.models.gan import GAN
from genfast.nn.ada import check_pipeline
from genfast.ops._gan_loss_reference import KINDS
from genfast.ops.diff_augment import policy_code
from genfast.training.gan_trainer import AUGMENT, GANTrainer
from genfast.training.run import Column, Options, Run, restored
from genfast.training.vae_run import _image

__all__ = ["GANOptions", "GANRun"]

# What an architecture trains with where the options do not say.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mlp": {"lr": 1e-3, "loss": "relativistic", "r1": 0.1, "r2": 0.1, "beta1": 0.5},
    "dcgan": {"lr": 2e-4, "loss": "nonsaturating", "beta1": 0.5},
    "sngan": {"lr": 2e-4, "loss": "hinge", "beta1": 0.0, "n_critic": 2},
    "stylegan2": {"lr": 1e-3, "loss": "nonsaturating", "r1": 1.0, "penalty_every": 4, "beta1": 0.0},
}
_OTHERS: dict[str, Any] = {"r1": 0.0, "r2": 0.0, "penalty_every": 1, "n_critic": 1}
_WIDTHS = {"dcgan": (64, 512), "sngan": (64, 128), "stylegan2": (32, 256)}  # of the finest level, and the most


@dataclasses.dataclass(frozen=True)
class GANOptions(Options):
    """Of a ``models.GAN``. None and () stand for what the architecture usually has.

    Attributes:
        lr: learning rate of AdamW, for both networks; ``weight_decay`` likewise.
        discriminator_lr: the discriminator's learning rate; None for the same.
        beta1: of AdamW.
        hidden: widths of the hidden layers, for convolutions the channels of the levels, the finest first.
        arch: ``"mlp"``, ``"dcgan"``, ``"sngan"`` or ``"stylegan2"``.
        latent: size of z.
        loss: a kind of ``nn.GANLoss``.
        mixing: probability that samples of ``"stylegan2"`` in training mix the styles of two z.
        packed: samples that the discriminator of ``"mlp"`` or ``"dcgan"`` judges at once.

    The others are those of ``GANTrainer`` and of ``Options``; ``binarize`` is ``"none"``.

    Raises:
        ValueError: for values out of range or that do not go together.

    Examples:
        >>> options = GANOptions(arch="sngan")
        >>> options.loss, options.n_critic, options.beta1
        ('hinge', 2, 0.0)
    """

    MODELS: ClassVar[tuple[str, ...]] = ("gan",)
    FREE: ClassVar[frozenset[str]] = Options.FREE | {
        "discriminator_lr", "r1", "r2", "gradient_penalty", "penalty_every", "consistency", "path_length", "ema",
        "ada_target", "ada_images",
    }  # fmt: skip
    ARCHITECTURES: ClassVar[tuple[str, ...]] = tuple(_DEFAULTS)

    model: str = "gan"
    lr: float | None = None  # type: ignore[assignment]
    binarize: str = "none"
    hidden: tuple[int, ...] = ()
    arch: str = "mlp"
    latent: int = 64
    loss: str = ""
    discriminator_lr: float | None = None
    beta1: float | None = None
    r1: float | None = None
    r2: float | None = None
    gradient_penalty: float = 0.0
    penalty_every: int | None = None
    consistency: float = 0.0
    path_length: float = 0.0
    mixing: float = 0.0
    n_critic: int | None = None
    ema: float = 0.995
    augment: str = "none"
    policy: str = "color,translation,cutout"
    pipeline: str = "blit,geometry,color"
    ada_target: float = 0.6
    ada_images: int = 100_000
    packed: int = 1

    def __post_init__(self) -> None:
        self._one_of("arch", self.ARCHITECTURES)
        for name, value in {**_OTHERS, **_DEFAULTS[self.arch]}.items():
            if getattr(self, name) in (None, ""):
                object.__setattr__(self, name, value)
        super().__post_init__()
        self._one_of("binarize", ("none",))
        self._one_of("loss", KINDS)
        self._one_of("augment", ("none", *AUGMENT))
        self._at_least(latent=1, penalty_every=1, n_critic=1, packed=1, ada_images=1)
        self._finite(
            "r1", "r2", "gradient_penalty", "consistency", "path_length", "mixing", "beta1", "ema", "ada_target"
        )
        for name in ("beta1", "ema"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be below 1, got {getattr(self, name)}")
        if self.discriminator_lr is not None:
            self._finite("discriminator_lr")
        if self.hidden and min(self.hidden) < 1:
            raise ValueError(f"hidden must be positive numbers of units or channels, got {self.hidden}")
        if self.packed > 1 and self.arch not in ("mlp", "dcgan"):
            raise ValueError(f"packed is for arch mlp and dcgan, not for {self.arch}")
        if self.batch % self.packed:
            raise ValueError(f"packed must divide the batch of {self.batch}, got {self.packed}")
        if self.path_length and self.arch != "stylegan2":
            raise ValueError(f"path_length is for arch stylegan2, not for {self.arch}")
        if self.mixing and self.arch != "stylegan2":
            raise ValueError(f"mixing is for arch stylegan2, not for {self.arch}")
        if self.mixing > 1:
            raise ValueError(f"mixing is a probability, at most 1, got {self.mixing}")
        if self.augment != "none" and self.arch == "mlp":
            raise ValueError("augment is for images: for arch dcgan, sngan and stylegan2, not for mlp")
        if self.consistency and self.arch == "mlp":
            raise ValueError("consistency is for images: for arch dcgan, sngan and stylegan2, not for mlp")
        policy_code("policy", self.policy)
        check_pipeline("pipeline", self.pipeline)
        if self.ada_target > 1:
            raise ValueError(f"ada_target must be at most 1, got {self.ada_target}")

    @property
    def bounded(self) -> str | None:
        return "a gan needs"


@dataclasses.dataclass
class GANRun(Run):
    """A ``models.GAN`` in training; ``optimizer`` has all tensors of the trainer's but the two networks'.

    Attributes:
        inputs: values of an example.

    The others are those of ``Run``.
    """

    inputs: int = 0

    @classmethod
    def start(cls, options: GANOptions, rows: Rows, device: torch.device | str) -> GANRun:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = _make_model(options, rows.values.shape[1], rows.shape)
        return cls(options, model.to(device), rows.shape, None, None, inputs=rows.values.shape[1])

    @classmethod
    def restore(
        cls,
        options: GANOptions,
        about: dict[str, Any],
        parts: dict[str, dict[str, Tensor]],
        device: torch.device | str,
    ) -> GANRun:
        visible, shape = about["visible"], about["shape"]
        model = restored(lambda: _make_model(options, visible, shape), parts["model"])
        run = cls(options, model.to(device), shape, None, None, about["epoch"], parts["optimizer"], visible)
        run.trainer()  # whether its tensors fit
        return run

    def trainer(self) -> GANTrainer:
        """The run's trainer, at its place."""
        options: GANOptions = self.options
        trainer = GANTrainer(
            self.model, loss=options.loss, lr=options.lr or 0.0, discriminator_lr=options.discriminator_lr,
            betas=(options.beta1 or 0.0, 0.99), weight_decay=options.weight_decay, r1=options.r1 or 0.0,
            r2=options.r2 or 0.0, gradient_penalty=options.gradient_penalty, penalty_every=options.penalty_every or 1,
            consistency=options.consistency, path_length=options.path_length, n_critic=options.n_critic or 1,
            ema=options.ema, augment=None if options.augment == "none" else options.augment, policy=options.policy,
            pipeline=options.pipeline, ada_target=options.ada_target, ada_images=options.ada_images, seed=options.seed,
        )  # fmt: skip
        if self.optimizer:
            state = {f"gan.{name}": tensor for name, tensor in self.model.state_dict().items()}
            trainer.load_state_dict({**state, **self.optimizer})
        elif self.epoch:
            raise ValueError("the optimizer's buffers are missing")
        return trainer

    def keep(self, trainer: GANTrainer) -> None:
        """Takes the trainer's tensors."""
        self.optimizer = {name: t for name, t in trainer.state_dict().items() if not name.startswith("gan.")}

    @property
    def trained(self) -> GAN:
        """The discriminator beside the generator's moving average."""
        generator: nn.Module = copy.deepcopy(self.model.generator)
        average = {
            n.removeprefix("average.module."): t for n, t in self.optimizer.items() if n.startswith("average.module.")
        }
        if average:
            generator.load_state_dict(average)
        return GAN(generator, self.model.discriminator, self.model.latent, classes=self.model.classes)

    @property
    def class_name(self) -> str:
        return "genfast.models.GAN"

    @property
    def visible(self) -> int:
        return self.inputs

    @property
    def sizes(self) -> str:
        options: GANOptions = self.options
        widths = options.hidden or _widths(options, self.shape)
        return f"{options.arch} {'-'.join(map(str, (options.latent, *widths, self.visible)))}"

    @property
    def table(self) -> tuple[Column, ...]:
        found = [
            Column("epoch", "epoch", "d"), Column("discriminator_loss", "D loss"), Column("generator_loss", "G loss"),
            Column("penalty", "penalty"),
        ]  # fmt: skip
        if self.options.augment == "ada":
            found.append(Column("ada_p", "ADA p"))
        found += [
            Column("modes", "modes of {classes}", "d", labelled=True), Column("divergence", "KL", labelled=True)
        ]  # fmt: skip
        return *found, Column("precision", "precision"), Column("recall", "recall"), Column("seconds", "seconds", ".1f")

    def encode(self, values: Tensor) -> Tensor:
        return values * 2 - 1

    def decode(self, values: Tensor) -> Tensor:
        return ((values + 1) / 2).clamp(0, 1)

    def batch(self, rows: Tensor) -> Tensor:
        """Rows as the networks take them."""
        return rows if self.options.arch == "mlp" else rows.view(-1, *_image(self.shape))

    def rows(self, values: Tensor) -> Tensor:
        """What the generator gives, as rows in the units of the data, on the CPU."""
        return self.decode(values.flatten(1).float().cpu())


def _widths(options: GANOptions, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """Of the hidden layers, or of as many levels as leave sides of 4 or more."""
    if options.arch == "mlp":
        return (256, 256)
    _, height, width = _image(shape)
    count = 1
    while min(height, width) >> count + 1 >= 4 and not (height | width) & (1 << count + 1) - 1:
        count += 1
    first, most = _WIDTHS[options.arch]
    return tuple(min(most, first << level) for level in range(count))


def _make_model(options: GANOptions, columns: int, shape: tuple[int, ...] | None) -> GAN:
    """The untrained model."""
    widths = options.hidden or _widths(options, shape)
    if options.arch == "mlp":
        return MLPGAN((columns,), options.latent, widths, packed=options.packed)
    image = _image(shape)
    if options.arch == "dcgan":
        return DCGAN(image, widths, options.latent, batch_norm=not (options.r1 or options.r2), packed=options.packed)
    if options.arch == "sngan":
        return SNGAN(image, widths, options.latent)
    return StyleGAN2(image, widths, options.latent, mixing=options.mixing)
