"""The training of generative adversarial networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genfast import random
from genfast._checks import check_count
from genfast.models.gan import GAN
from genfast.nn import gan_losses
from genfast.nn._directional import check_method
from genfast.nn.gan_penalties import consistency_penalty, gradient_penalty, r1_penalty, r2_penalty
from genfast.ops import _gan_loss_reference as plain_losses
from genfast.ops.diff_augment import diff_augment, policy_code

__all__ = ["AUGMENT", "GANStep", "GANTrainer"]

AUGMENT = ("diff", "ada")

_ADAM = ("exp_avg", "exp_avg_sq", "step")
_MASK = 2**64 - 1


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
        path_length: weight of the penalty of the generator's path lengths, which ``mapping`` and ``synthesis`` need.
        path_every: as ``penalty_every``, in the generator's steps.
        n_critic: steps of the discriminator to one of the generator.
        ema: decay of the generator's moving average ``average``; it is shorter at first. 0: the generator itself.
        augment: None, ``"diff"`` (always) or ``"ada"`` (as often as overfitting demands): ``policy`` augments what the
            discriminator sees.
        policy: of the augmentation, from color, translation and cutout, separated by commas.
        ada_target: ``overfitting`` that ``"ada"`` steers to.
        ada_images: real samples over which its probability may go from 0 to 1.
        seed: of all noise.
        fused: genfast's losses; False: the plain PyTorch formulas, for comparison.

    Raises:
        ValueError: for values out of range or that do not go together.

    Source: Goodfellow et al., NeurIPS 2014; Heusel et al. (TTUR), NeurIPS 2017; Gulrajani et al. (WGAN-GP), NeurIPS
    2017; Mescheder, Geiger and Nowozin (R1, R2), ICML 2018; Zhang et al. (consistency), ICLR 2020; Karras et al. (path
    lengths, lazy regularization), CVPR 2020; Karras et al. (ADA), NeurIPS 2020; Zhao et al. (DiffAugment), NeurIPS
    2020; Huang et al. (relativistic with R1 and R2), NeurIPS 2024.

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
        path_length: float = 0.0,
        path_every: int = 4,
        n_critic: int = 1,
        ema: float = 0.999,
        augment: str | None = None,
        policy: str = "color,translation,cutout",
        ada_target: float = 0.6,
        ada_images: int = 100_000,
        seed: int = 0,
        fused: bool = True,
    ) -> None:
        gan_losses.GANLoss(loss)
        weights = {
            "r1": r1, "r2": r2, "gradient_penalty": gradient_penalty, "consistency": consistency, "lr": lr,
            "path_length": path_length, "weight_decay": weight_decay,
            "discriminator_lr": lr if discriminator_lr is None else discriminator_lr,
        }  # fmt: skip
        for name, value in weights.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"GANTrainer: {name} must be a finite number, at least 0, got {value}")
        for name, value in (("ema", ema), ("betas", betas[0]), ("betas", betas[1])):
            if not 0 <= value < 1:
                raise ValueError(f"GANTrainer: {name} must be in [0, 1), got {value}")
        counts = (("penalty_every", penalty_every), ("path_every", path_every), ("n_critic", n_critic))
        for name, count in (*counts, ("ada_images", ada_images)):
            check_count("GANTrainer", name, count, 1)
        check_method("GANTrainer", penalty_method)
        if augment is not None and augment not in AUGMENT:
            raise ValueError(f"GANTrainer: augment must be None, {' or '.join(map(repr, AUGMENT))}, got {augment!r}")
        policy_code("GANTrainer", policy)
        if not -1 <= ada_target <= 1:
            raise ValueError(f"GANTrainer: ada_target must be in [-1, 1], the range of a mean sign, got {ada_target}")
        if path_length and not (hasattr(gan.generator, "mapping") and hasattr(gan.generator, "synthesis")):
            raise ValueError("GANTrainer: path_length needs a generator with mapping and synthesis, as of StyleGAN2")
        self.gan, self.loss, self.fused, self.seed = gan, loss, fused, seed
        self.r1, self.r2, self.gradient_penalty, self.consistency = r1, r2, gradient_penalty, consistency
        self.penalty_method, self.penalty_every = penalty_method, penalty_every
        self.path_length, self.path_every = path_length, path_every
        self.n_critic, self.ema = n_critic, ema
        self.steps = 0
        self.average = copy.deepcopy(gan.generator).eval().requires_grad_(False)
        self.augment, self.policy, self.ada_target, self.ada_images = augment, policy, ada_target, ada_images
        self.path_mean = torch.zeros((), device=next(gan.parameters()).device)
        self.p = torch.zeros_like(self.path_mean)  # how often "ada" augments
        self.optimizers = {
            name: torch.optim.AdamW(network.parameters(), rate, betas, weight_decay=weight_decay, fused=True)
            for name, network, rate in (
                ("generator", gan.generator, lr), ("discriminator", gan.discriminator, weights["discriminator_lr"])
            )
        }  # fmt: skip
        self._needs_real = gan_losses.GANLoss(loss).needs_real

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
        overfitting = ((real - fake) if self._needs_real and real.shape == fake.shape else real).sign().mean()
        if self.augment == "ada":
            move = torch.sign(overfitting - self.ada_target) * (len(x) / self.ada_images)
            self.p = (self.p + move.to(self.p.dtype)).clamp_(0, 1)
        generator, path = nothing, nothing
        if (self.steps + 1) % self.n_critic == 0:
            generator, path = self._generator_step(x, labels, nothing)
            self._follow()
        self.steps += 1
        return GANStep(
            loss, generator, nothing if penalty is None else penalty, path, real.mean(), fake.mean(), overfitting
        )

    def _seed(self, purpose: int) -> int:
        """A seed for one use in this step: splitmix64 of all three numbers."""
        mixed = self.seed & _MASK
        for part in (self.steps, purpose):
            mixed = (mixed ^ part) + 0x9E3779B97F4A7C15 & _MASK
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
            mixed ^= mixed >> 31
        return mixed >> 1

    def _seen(self, x: Tensor, purpose: int, always: bool = False) -> Tensor:
        """What the discriminator sees of samples: augmented, with ``"ada"`` a sample with the current probability."""
        if self.augment is None and not always:
            return x
        augmented = diff_augment(x, self.policy, seed=self._seed(purpose))
        if always or self.augment != "ada":
            return augmented
        seed = random.as_seed(self._seed(purpose + 100), torch.device("cpu"))
        chosen = random.uniform(len(x), seed).to(x.device) < self.p
        return torch.where(chosen.view(-1, *(1,) * (x.dim() - 1)), augmented, x)

    def _discriminator_step(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        gan, optimizer = self.gan, self.optimizers["discriminator"]
        gan.discriminator.requires_grad_(True)
        with torch.no_grad():
            made = gan.generate(gan.noise(len(x), self._seed(0)), labels, self._seed(1))
            samples = [self._seen(x, 2), self._seen(made, 3)]
        due = self.steps % self.penalty_every == 0
        weights = [self.r1, self.r2] if due else [0.0, 0.0]
        if self._closed():
            return self._closed_discriminator_step(samples, weights)
        shared = self.penalty_method == "double_backward"  # the gradients are taken of the pass that the loss has
        leaves = [
            part.detach().requires_grad_(shared and weight > 0) for part, weight in zip(samples, weights, strict=True)
        ]
        if getattr(gan.discriminator, "independent", False):
            logits = gan.judge(torch.cat(leaves), None if labels is None else labels.repeat(2))
            real, fake = logits.chunk(2)
        else:
            real, fake = (gan.judge(part, labels) for part in leaves)
        loss = self._loss("discriminator", real, fake)
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
            parts.append(
                consistency_penalty(judge, leaves[0], self._seen(x, 4, True), weight=self.consistency, logits=real)
            )
        penalty = sum(parts[1:], parts[0]) if parts else None
        whole = loss if penalty is None else torch.add(loss, penalty, alpha=self.penalty_every)
        optimizer.zero_grad(set_to_none=True)
        whole.backward()
        optimizer.step()
        return loss.detach(), None if penalty is None else penalty.detach(), real.detach(), fake.detach()

    # Fully connected discriminators with leaky relus need no graph: ``JudgedRows`` has the formulas.

    def _closed(self) -> bool:
        return (
            getattr(self.gan.discriminator, "bends", False)
            and not (self.gradient_penalty or self.consistency)
            and self.penalty_method == "double_backward"
            and not self.gan.discriminator._forward_hooks
            and not torch.is_autocast_enabled(next(self.gan.discriminator.parameters()).device.type)
        )

    def _by_logits(self, side: str, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the logits of real and generated samples, one below the other, and its gradient."""
        leaf = logits.detach().requires_grad_()
        loss = self._loss(side, *leaf.chunk(2))
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    @torch.no_grad()
    def _closed_discriminator_step(
        self, samples: list[Tensor], weights: list[float]
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        discriminator: Any = self.gan.discriminator
        count, penalty, moves = len(samples[0]), None, None
        rows = discriminator.judged(torch.cat(samples))
        with torch.enable_grad():
            loss, by_logits = self._by_logits("discriminator", rows.logits)
        if any(weights):
            slopes = rows.by_inputs()
            moves = slopes * (weights[0] / count)
            if weights[0] != weights[1]:
                moves[count:] = slopes[count:] * (weights[1] / count)
            penalty = 0.5 * torch.dot(slopes.flatten(), moves.flatten())
            if self.penalty_every != 1:
                moves = moves * self.penalty_every
        for parameter, gradient in zip(
            discriminator.parameters(), rows.by_parameters(by_logits, moves), strict=True
        ):  # fmt: skip
            parameter.grad = gradient
        self.optimizers["discriminator"].step()
        real, fake = rows.logits.chunk(2)
        return loss, penalty, real, fake

    def _closed_generator_step(self, x: Tensor, made: Tensor) -> Tensor:
        """Leaves the generator's gradients; returns the loss."""
        discriminator: Any = self.gan.discriminator
        with torch.no_grad():
            rows = discriminator.judged(torch.cat((x, made)) if self._needs_real else made.detach())
        if self._needs_real:
            loss, by_logits = self._by_logits("generator", rows.logits)
            by_logits = by_logits[len(x) :]
        else:
            leaf = rows.logits.requires_grad_()
            loss = self._loss("generator", None, leaf)
            (by_logits,) = torch.autograd.grad(loss, leaf)
        with torch.no_grad():
            slopes = rows.by_inputs(slice(len(x) if self._needs_real else 0, None))
        made.backward((slopes * by_logits.unsqueeze(1)).view_as(made))
        return loss.detach()

    def _loss(self, side: str, real: Tensor | None, fake: Tensor) -> Tensor:
        if not self.fused:
            return plain_losses.reference(real, fake, self.loss, side)
        if side == "generator":
            return gan_losses.gan_generator_loss(self.loss, fake, real)
        assert real is not None
        return gan_losses.gan_discriminator_loss(self.loss, real, fake)

    def _generator_step(self, x: Tensor, labels: Tensor | None, nothing: Tensor) -> tuple[Tensor, Tensor]:
        gan, optimizer = self.gan, self.optimizers["generator"]
        gan.discriminator.requires_grad_(False)
        made = self._seen(gan.generate(gan.noise(len(x), self._seed(6)), labels, self._seed(7)), 8)
        if self._closed() and not self.path_length:
            optimizer.zero_grad(set_to_none=True)
            loss = self._closed_generator_step(self._seen(x, 9), made)
            optimizer.step()
            return loss, nothing
        real = None
        if self._needs_real:
            with torch.no_grad():
                real = gan.judge(self._seen(x, 9), labels)
        loss = self._loss("generator", real, gan.judge(made, labels))
        whole, path = loss, nothing
        if self.path_length and self.steps // self.n_critic % self.path_every == 0:
            added = self.path_length * self._path(max(1, len(x) // 2), labels)
            whole, path = torch.add(loss, added, alpha=self.path_every), added.detach()
        optimizer.zero_grad(set_to_none=True)
        whole.backward()
        optimizer.step()
        return loss.detach(), path

    def _path(self, count: int, labels: Tensor | None) -> Tensor:
        """Mean squared difference of the lengths |J_w^T y|, y normal noise on images, to their running mean."""
        generator: Any = self.gan.generator
        w = generator.mapping(self.gan.noise(count, self._seed(10)), *(() if labels is None else (labels[:count],)))
        w = w if w.requires_grad else w.requires_grad_()
        images = generator.synthesis(w, self._seed(11))
        y = self.gan.noise(count * images[0].numel(), self._seed(12)).flatten()[: images.numel()].view_as(images)
        y = y / math.sqrt(images.shape[-2] * images.shape[-1])
        (slope,) = torch.autograd.grad((images * y).sum(), w, create_graph=True)
        lengths = slope.square().sum(-1).sqrt()
        with torch.no_grad():
            self.path_mean.lerp_(lengths.mean().to(self.path_mean.dtype), 0.01)
        return (lengths - self.path_mean.detach()).square().mean()

    @torch.no_grad()
    def _follow(self) -> None:
        """The moving average of the generator's parameters; its buffers are the generator's."""
        done = self.steps // self.n_critic
        decay = min(self.ema, (1 + done) / (10 + done)) if self.ema else 0.0
        pairs = list(zip(self.average.parameters(), self.gan.generator.parameters(), strict=True))
        torch._foreach_lerp_([mean for mean, _ in pairs], [now for _, now in pairs], 1 - decay)
        for mean, now in zip(self.average.buffers(), self.gan.generator.buffers(), strict=True):
            mean.copy_(now)

    # ---- use ----

    def sample(
        self, count: int, seed: int | Tensor | None = None, *, labels: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Samples of the generator's moving average; see ``GAN.sample``."""
        gan = GAN(self.average, nn.Identity(), self.gan.latent, classes=self.gan.classes)
        return gan.sample(count, seed, labels=labels, **options)

    @property
    def augmentation_probability(self) -> float | None:
        """How often the discriminator's samples are augmented; None where they never are."""
        return None if self.augment is None else 1.0 if self.augment == "diff" else self.p.item()

    # ---- state ----

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next step depends on apart from the arguments and the data: tensors, ready for safetensors."""
        state = {f"gan.{name}": tensor for name, tensor in self.gan.state_dict().items()}
        state |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for key, name, parameter in self._parameters():
            found = self.optimizers[key].state.get(parameter, {})
            state |= {f"{key}.{name}.{part}": found[part] for part in _ADAM if part in found}
        return state | {"steps": torch.tensor(self.steps), "path_mean": self.path_mean, "p": self.p}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes what ``state_dict`` gave.

        Raises:
            KeyError, ValueError, RuntimeError: for tensors that are missing, or of another model.
        """
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in ("gan", "average", "generator", "discriminator")}
        for name, tensor in state.items():
            part, _, rest = name.partition(".")
            if rest:
                parts[part][rest] = tensor
        wanted: dict[str, dict[str, torch.Size]] = {key: {} for key in self.optimizers}
        for key, name, parameter in self._parameters():
            wanted[key] |= {f"{name}.{p}": torch.Size() if p == "step" else parameter.shape for p in _ADAM}
        for key, shapes in wanted.items():
            if parts[key] and {name: tensor.shape for name, tensor in parts[key].items()} != shapes:
                raise ValueError(f"the {key}'s optimizer has buffers that do not fit the model")
        steps = int(state["steps"])
        if steps < 0:
            raise ValueError(f"it has no step {steps}")
        path_mean, p = state["path_mean"].to(self.path_mean, copy=True), state["p"].to(self.p, copy=True)
        self.gan.load_state_dict(parts["gan"])
        self.average.load_state_dict(parts["average"])
        for key, optimizer in self.optimizers.items():
            optimizer.state.clear()
            for found, name, parameter in self._parameters():
                if found == key and parts[key]:
                    optimizer.state[parameter] = {
                        part: parts[key][f"{name}.{part}"].to(parameter.device, copy=True) for part in _ADAM
                    }
        self.steps, self.path_mean, self.p = steps, path_mean, p

    def _parameters(self) -> list[tuple[str, str, nn.Parameter]]:
        return [
            (key, name, parameter)
            for key, network in (("generator", self.gan.generator), ("discriminator", self.gan.discriminator))
            for name, parameter in network.named_parameters()
        ]
