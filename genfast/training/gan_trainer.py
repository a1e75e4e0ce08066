"""The training of generative adversarial networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genfast._checks import check_count
from genfast.models.gan import GAN
from genfast.nn import ADA, gan_losses
from genfast.nn._directional import check_method
from genfast.nn.gan_consistency import consistency_penalty, latent_diversity_penalty, perturb_latents
from genfast.nn.gan_penalties import gradient_penalty, path_length_penalty, r1_penalty, r2_penalty
from genfast.ops import _gan_loss_reference as plain_losses
from genfast.ops.diff_augment import diff_augment, policy_code
from genfast.optim import EMA
from genfast.training import _gan_closed
from genfast.training._adversarial import (
    RAMP,
    average_state,
    check_numbers,
    check_optimizer,
    check_tensors,
    grouped,
    load_average,
    load_optimizer,
    optimizer_state,
    step_seed,
)

__all__ = ["AUGMENT", "GANStep", "GANTrainer"]

AUGMENT = ("diff", "ada")


class GANStep(NamedTuple):
    """What a step of ``GANTrainer`` measured, 0-d tensors that autograd does not see; NaN where it did not happen.

    discriminator: its loss, without penalties. generator: its loss. penalty: what penalties and consistency added to
    the discriminator's loss, without the factor of lazy ones. path: what the path lengths added to the generator's.
    real, fake: mean logits. overfitting: mean sign of the real logits, of relativistic losses of the differences.
    """

    discriminator: Tensor
    generator: Tensor
    penalty: Tensor
    path: Tensor
    real: Tensor
    fake: Tensor
    overfitting: Tensor


class GANTrainer:
    """Trains the two networks of a GAN in turns; every state and all noise continue bit for bit.

    Noise comes from counters keyed by ``seed`` and the number of steps, so that ``state_dict`` needs none: a trainer
    that loads it goes on with the bits that the first would have had.

    Args:
        gan: the two networks; both train.
        loss: a kind of ``genfast.nn.GANLoss``: ``"nonsaturating"``, ``"minimax"``, ``"hinge"``, ``"least_squares"``,
            ``"wasserstein"``, ``"relativistic"`` or ``"relativistic_average"``.
        lr: the generator's learning rate.
        discriminator_lr: the discriminator's; None for the same. Two rates are TTUR.
        betas: of Adam, for both networks.
        weight_decay: of Adam, decoupled.
        r1: weight of half the mean squared gradient of the logits by real samples.
        r2: the same by generated ones.
        gradient_penalty: weight of the mean of (|gradient| - 1)^2 between real and generated samples (WGAN-GP).
        penalty_method: ``"double_backward"``, or ``"jvp"`` for discriminators that lack one, see
            ``genfast.nn.r1_penalty``.
        penalty_every: penalties are taken every so many steps, with so many times their weight (lazy regularization).
        consistency: weight of the mean squared change of the logits of real samples by ``policy``.
        latent_consistency: weight of the mean squared change of the logits of generated samples by a small step in z
            (zCR), see ``nn.perturb_latents``.
        latent_diversity: weight of the mean squared change of generated samples by such a step, which the generator
            makes large; of the size of a tenth of ``latent_consistency``.
        latent_deviation: standard deviation of the step.
        path_length: weight of the penalty of the generator's path lengths, which ``mapping`` and ``synthesis`` need.
        path_every: as ``penalty_every``, in the generator's steps.
        n_critic: steps of the discriminator to one of the generator.
        ema: decay of the generator's moving average, an ``optim.EMA`` whose buffers are the generator's; it is shorter
            at first. 0: the generator itself.
        augment: of what the discriminator sees. None; ``"diff"``: always, by ``policy``; ``"ada"``: by ``pipeline``,
            each transformation as often as overfitting demands, see ``nn.ADA``.
        policy: of ``ops.diff_augment``, from color, translation and cutout, separated by commas.
        pipeline: of ``nn.ada_augment``, from blit, geometry and color, separated by commas.
        ada_target: ``overfitting`` that ``"ada"`` steers to.
        ada_images: real samples over which its probability may go from 0 to 1.
        ada_interval: the discriminator's steps from one change of the probability to the next.
        seed: of all noise.
        fused: genfast's losses; False: the plain PyTorch formulas, for comparison.

    Raises:
        ValueError: for values out of range or that do not go together.

    Source: Goodfellow et al., NeurIPS 2014; Heusel et al. (TTUR), NeurIPS 2017; Gulrajani et al. (WGAN-GP), NeurIPS
    2017; Mescheder, Geiger and Nowozin (R1, R2), ICML 2018; Zhang et al. (consistency), ICLR 2020; Zhao et al. (zCR),
    AAAI 2021; Karras et al. (path lengths, lazy regularization), CVPR 2020; Karras et al. (ADA), NeurIPS 2020; Zhao et
    al. (DiffAugment), NeurIPS 2020; Huang et al. (relativistic with R1 and R2), NeurIPS 2024.

    Examples:
        >>> from genfast.models import MLPGAN
        >>> gan = MLPGAN((2,), latent=2, hidden=[16], output="linear")
        >>> trainer = GANTrainer(gan, loss="relativistic", r1=0.1, r2=0.1, lr=1e-3)
        >>> for _ in range(3):
        ...     measured = trainer.step(torch.randn(32, 2))
        >>> trainer.steps, trainer.sample(5, seed=0).shape
        (3, torch.Size([5, 2]))
    """

    def __init__(
        self,
        gan: GAN,
        *,
        loss: str = "nonsaturating",
        lr: float = 2e-4,
        discriminator_lr: float | None = None,
        betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 0.0,
        r1: float = 0.0,
        r2: float = 0.0,
        gradient_penalty: float = 0.0,
        penalty_method: str = "double_backward",
        penalty_every: int = 1,
        consistency: float = 0.0,
        latent_consistency: float = 0.0,
        latent_diversity: float = 0.0,
        latent_deviation: float = 0.03,
        path_length: float = 0.0,
        path_every: int = 4,
        n_critic: int = 1,
        ema: float = 0.999,
        augment: str | None = None,
        policy: str = "color,translation,cutout",
        pipeline: str = "blit,geometry,color",
        ada_target: float = 0.6,
        ada_images: int = 100_000,
        ada_interval: int = 4,
        seed: int = 0,
        fused: bool = True,
    ) -> None:
        gan_losses.GANLoss(loss)
        weights = {
            "r1": r1, "r2": r2, "gradient_penalty": gradient_penalty, "consistency": consistency, "lr": lr,
            "path_length": path_length, "weight_decay": weight_decay, "latent_consistency": latent_consistency,
            "latent_diversity": latent_diversity, "latent_deviation": latent_deviation,
            "discriminator_lr": lr if discriminator_lr is None else discriminator_lr,
        }  # fmt: skip
        check_numbers("GANTrainer", weights, ema, betas)
        counts = (("penalty_every", penalty_every), ("path_every", path_every), ("n_critic", n_critic))
        for name, count in counts:
            check_count("GANTrainer", name, count, 1)
        check_method("GANTrainer", penalty_method)
        if augment is not None and augment not in AUGMENT:
            raise ValueError(f"GANTrainer: augment must be None, {' or '.join(map(repr, AUGMENT))}, got {augment!r}")
        policy_code("GANTrainer", policy)
        control = ADA(target=ada_target, images=ada_images, interval=ada_interval, pipeline=pipeline)
        if path_length and not (hasattr(gan.generator, "mapping") and hasattr(gan.generator, "synthesis")):
            raise ValueError("GANTrainer: path_length needs a generator with mapping and synthesis, as of StyleGAN2")
        self.gan, self.loss, self.fused, self.seed = gan, loss, fused, seed
        self.r1, self.r2, self.gradient_penalty, self.consistency = r1, r2, gradient_penalty, consistency
        self.latent_consistency, self.latent_diversity = latent_consistency, latent_diversity
        self.latent_deviation = latent_deviation
        self.penalty_method, self.penalty_every = penalty_method, penalty_every
        self.path_length, self.path_every = path_length, path_every
        self.n_critic, self.steps = n_critic, 0
        self.ema: EMA[nn.Module] = EMA(gan.generator, ema, ramp=RAMP, update_buffers=False)
        self.path_mean = torch.zeros((), device=next(gan.parameters()).device)
        self.augment, self.policy = augment, policy
        self.ada = control.to(self.path_mean.device) if augment == "ada" else None
        self.optimizers = {
            name: torch.optim.AdamW(network.parameters(), rate, betas, weight_decay=weight_decay, fused=True)
            for name, network, rate in (
                ("generator", gan.generator, lr), ("discriminator", gan.discriminator, weights["discriminator_lr"])
            )
        }  # fmt: skip
        self.needs_real = gan_losses.GANLoss(loss).needs_real

    # ---- a step ----

    def step(self, x: Tensor, labels: Tensor | None = None) -> GANStep:
        """One step of the discriminator, and every ``n_critic`` of them one of the generator.

        Args:
            x: real samples [B, ...], as the generator's.
            labels: [B], of a model with classes; generated samples get the same.

        Raises:
            TypeError: for samples that are not floating point.
            ValueError: for an empty batch.
        """
        if not x.is_floating_point():
            raise TypeError(
                f"GANTrainer.step: x must be floating point, got {x.dtype}; scale integer images to [-1, 1]"
            )
        if len(x) == 0:
            raise ValueError(f"GANTrainer.step: x has no samples, its shape is {tuple(x.shape)}")
        self.gan.train()
        nothing = x.new_full((), math.nan, dtype=torch.float32)
        loss, penalty, real, fake = self._discriminator_step(x, labels)
        judged = real - fake if self.needs_real and real.shape == fake.shape else real
        overfitting = judged.sign().mean()
        if self.ada is not None:
            self.ada.update(judged, images=len(x))
        generator, path = nothing, nothing
        if (self.steps + 1) % self.n_critic == 0:
            generator, path = self._generator_step(x, labels, nothing)
            self.ema.update()
        self.steps += 1
        return GANStep(
            loss, generator, nothing if penalty is None else penalty, path, real.mean(), fake.mean(), overfitting
        )

    def _seed(self, purpose: int) -> int:
        """A seed for one use in this step."""
        return step_seed(self.seed, self.steps, purpose)

    def _made(self, count: int, labels: Tensor | None, purpose: int, *, step: bool = False) -> Tensor:
        """Generated samples of this step; ``step``: those a small step in z beside them, with the same noise."""
        z = self.gan.noise(count, self._seed(purpose))
        if step:
            z = perturb_latents(z, self.latent_deviation, seed=self._seed(purpose))
        return self.gan.generate(z, labels, self._seed(purpose + 1))

    def _seen(self, x: Tensor, purpose: int) -> Tensor:
        """What the discriminator sees of samples."""
        if self.augment is None:
            return x
        if self.ada is None:
            return diff_augment(x, self.policy, seed=self._seed(purpose))
        augmented: Tensor = self.ada(x, seed=self._seed(purpose))
        return augmented

    def _discriminator_step(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        gan, optimizer = self.gan, self.optimizers["discriminator"]
        gan.discriminator.requires_grad_(True)
        with torch.no_grad():
            made = self._made(len(x), labels, 0)
            samples = [self._seen(x, 2), self._seen(made, 3)]
        due = self.steps % self.penalty_every == 0
        weights = [self.r1, self.r2] if due else [0.0, 0.0]
        if _gan_closed.serves(self):
            return _gan_closed.discriminator_step(self, samples, weights)
        shared = self.penalty_method == "double_backward"  # the gradients are taken of the pass that the loss has
        leaves = [
            part.detach().requires_grad_(shared and weight > 0) for part, weight in zip(samples, weights, strict=True)
        ]
        if getattr(gan.discriminator, "independent", False):
            logits = gan.judge(torch.cat(leaves), None if labels is None else labels.repeat(2))
            real, fake = logits.chunk(2)
        else:
            real, fake = (gan.judge(part, labels) for part in leaves)
        loss = self.measure("discriminator", real, fake)
        parts = []
        if shared and any(weights):
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            slopes = torch.autograd.grad(real.sum() + fake.sum(), wanted, create_graph=True)
            for weight, slope in zip((weight for weight in weights if weight > 0), slopes, strict=True):
                parts.append(slope.square().sum() * (0.5 * weight / len(x)))

        def judge(samples: Tensor) -> Tensor:
            return gan.judge(samples, labels)

        for penalize, weight, leaf in zip((r1_penalty, r2_penalty), weights, leaves, strict=True):
            if weight > 0 and not shared:
                parts.append(penalize(judge, leaf, gamma=weight, method=self.penalty_method))
        if due and self.gradient_penalty:
            weight = self.gradient_penalty
            parts.append(
                gradient_penalty(judge, *leaves, weight=weight, seed=self._seed(5), method=self.penalty_method)
            )
        if due and self.consistency:
            moved = diff_augment(x, self.policy, seed=self._seed(4))
            parts.append(consistency_penalty(judge, leaves[0], moved, weight=self.consistency, logits=real))
        if due and self.latent_consistency:
            with torch.no_grad():
                near = self._seen(self._made(len(x), labels, 0, step=True), 3)
            parts.append(consistency_penalty(judge, samples[1], near, weight=self.latent_consistency, logits=fake))
        penalty = sum(parts[1:], parts[0]) if parts else None
        whole = loss if penalty is None else torch.add(loss, penalty, alpha=self.penalty_every)
        optimizer.zero_grad(set_to_none=True)
        whole.backward()
        optimizer.step()
        return loss.detach(), None if penalty is None else penalty.detach(), real.detach(), fake.detach()

    def measure(self, side: str, real: Tensor | None, fake: Tensor) -> Tensor:
        if not self.fused:
            return plain_losses.reference(real, fake, self.loss, side)
        if side == "generator":
            return gan_losses.gan_generator_loss(self.loss, fake, real)
        assert real is not None
        return gan_losses.gan_discriminator_loss(self.loss, real, fake)

    def _generator_step(self, x: Tensor, labels: Tensor | None, nothing: Tensor) -> tuple[Tensor, Tensor]:
        gan, optimizer = self.gan, self.optimizers["generator"]
        gan.discriminator.requires_grad_(False)
        samples = self._made(len(x), labels, 6)
        made = self._seen(samples, 8)
        if _gan_closed.serves(self) and not (self.path_length or self.latent_diversity):
            optimizer.zero_grad(set_to_none=True)
            loss = _gan_closed.generator_step(self, self._seen(x, 9), made)
            optimizer.step()
            return loss, nothing
        real = None
        if self.needs_real:
            with torch.no_grad():
                real = gan.judge(self._seen(x, 9), labels)
        loss = self.measure("generator", real, gan.judge(made, labels))
        whole, path = loss, nothing
        if self.latent_diversity:
            near = self._made(len(x), labels, 6, step=True)
            whole = whole + latent_diversity_penalty(samples, near, weight=self.latent_diversity)
        if self.path_length and self.steps // self.n_critic % self.path_every == 0:
            added = self._path(max(1, len(x) // 2), labels)
            whole, path = torch.add(whole, added, alpha=self.path_every), added.detach()
        optimizer.zero_grad(set_to_none=True)
        whole.backward()
        optimizer.step()
        return loss.detach(), path

    def _path(self, count: int, labels: Tensor | None) -> Tensor:
        """The penalty of the path lengths, whose running mean moves."""
        generator: Any = self.gan.generator
        w = generator.mapping(self.gan.noise(count, self._seed(10)), *(() if labels is None else (labels[:count],)))
        penalty, self.path_mean = path_length_penalty(
            lambda w: generator.synthesis(w, self._seed(11)), w, self.path_mean, weight=self.path_length,
            seed=self._seed(12), method=self.penalty_method,
        )  # fmt: skip
        return penalty

    # ---- use ----

    def sample(
        self, count: int, seed: int | Tensor | None = None, *, labels: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Samples of the generator's moving average; see ``GAN.sample``."""
        gan = GAN(self.average, nn.Identity(), self.gan.latent, classes=self.gan.classes)
        return gan.sample(count, seed, labels=labels, **options)

    @property
    def average(self) -> nn.Module:
        """The generator's moving average, in evaluation mode."""
        return self.ema.module

    @property
    def augmentation_probability(self) -> float | None:
        """How often the discriminator's samples are augmented; None where they never are."""
        return None if self.augment is None else 1.0 if self.ada is None else self.ada.p.item()

    # ---- state ----

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next step depends on apart from the arguments and the data: tensors, ready for safetensors."""
        state = {f"gan.{name}": tensor for name, tensor in self.gan.state_dict().items()}
        state |= {f"average.{name}": tensor for name, tensor in average_state(self.ema).items()}
        for key, network in self._networks():
            state |= {f"{key}.{n}": tensor for n, tensor in optimizer_state(self.optimizers[key], network).items()}
        if self.ada is not None:
            state |= {f"ada.{name}": tensor for name, tensor in self.ada.state_dict().items()}
        return state | {"steps": torch.tensor(self.steps), "path_mean": self.path_mean}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes what ``state_dict`` gave.

        Raises:
            KeyError, ValueError, RuntimeError: for tensors that are missing, or of another model; the trainer is then
                as it was.
        """
        parts = grouped(state, ("gan", "average", "ada", *self.optimizers))
        own = {"steps": torch.tensor(self.steps), "path_mean": self.path_mean}
        check_tensors("the trainer", own, parts[""])
        steps, path_mean = int(parts[""]["steps"]), parts[""]["path_mean"].to(self.path_mean, copy=True)
        if steps < 0:
            raise ValueError(f"it has no step {steps}")
        check_tensors("the networks", self.gan.state_dict(), parts["gan"])
        check_tensors("the average", average_state(self.ema), parts["average"])
        check_tensors("the augmentation", {} if self.ada is None else self.ada.state_dict(), parts["ada"])
        for key, network in self._networks():
            check_optimizer(f"the {key}", network, parts[key])
        self.gan.load_state_dict(parts["gan"])
        load_average(self.ema, parts["average"])
        if self.ada is not None:
            self.ada.load_state_dict(parts["ada"])
        for key, network in self._networks():
            load_optimizer(self.optimizers[key], network, parts[key])
        self.steps, self.path_mean = steps, path_mean

    def _networks(self) -> tuple[tuple[str, nn.Module], ...]:
        return ("generator", self.gan.generator), ("discriminator", self.gan.discriminator)
