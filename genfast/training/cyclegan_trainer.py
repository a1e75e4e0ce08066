"""The training of CycleGANs: translation between two sets of images without pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genfast import random
from genfast._checks import check_count, check_float_tensor
from genfast.models.gan import evaluating
from genfast.nn.gan_losses import gan_discriminator_loss, gan_generator_loss
from genfast.optim import EMA
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

__all__ = ["CycleGANStep", "CycleGANTrainer", "ImagePool"]


class CycleGANStep(NamedTuple):
    """What a step of ``CycleGANTrainer`` measured, 0-d tensors that autograd does not see.

    discriminator_a, discriminator_b: their losses. generator_a, generator_b: the generators' adversarial losses, of
    images made for A and for B. cycle: mean absolute errors of both cycles, added. identity: of images that are
    already in the generator's set, added; NaN without that loss. None has its weight in it.
    """

    discriminator_a: Tensor
    discriminator_b: Tensor
    generator_a: Tensor
    generator_b: Tensor
    cycle: Tensor
    identity: Tensor


class ImagePool:
    """Generated images of earlier steps, so that a discriminator does not forget what generators once made.

    Until it is full the pool keeps every image and gives it back. Then for each image, with equal chances, either gives
    it back or gives back a kept one, in whose place it keeps the new one.

    Args:
        size: images that are kept; 0: none, and every image is given back.

    Raises:
        TypeError, ValueError: for a negative size.

    Source: Shrivastava et al., "Learning from simulated and unsupervised images through adversarial training", CVPR
    2017, section 2.3; Zhu et al. (CycleGAN), ICCV 2017, section 4.

    Examples:
        >>> pool = ImagePool(2)
        >>> pool.exchange(torch.tensor([1.0, 2.0]), seed=0)
        tensor([1., 2.])
        >>> sorted([*pool.exchange(torch.tensor([3.0]), seed=0).tolist(), *pool.images.tolist()])
        [1.0, 2.0, 3.0]
    """

    def __init__(self, size: int = 50) -> None:
        self.size = check_count("ImagePool", "size", size, 0)
        self.images: Tensor | None = None  # [kept, ...]

    @torch.no_grad()
    def exchange(self, images: Tensor, seed: int) -> Tensor:
        """Images [B, ...] as the discriminator is to see them; constants for autograd.

        Raises:
            ValueError: for images of another shape, dtype or device than the kept ones.
        """
        images = images.detach()
        if self.size == 0:
            return images
        if self.images is None:
            self.images = images[:0].clone()
        kept = self.images
        if (kept.shape[1:], kept.dtype, kept.device) != (images.shape[1:], images.dtype, images.device):
            raise ValueError(
                f"ImagePool: it keeps images of shape {tuple(kept.shape[1:])}, {kept.dtype} on {kept.device}, got "
                f"{tuple(images.shape[1:])}, {images.dtype} on {images.device}"
            )
        free = min(self.size - len(kept), len(images))
        if free:
            kept = self.images = torch.cat((kept, images[:free]))
        u = random.uniform(2 * len(images), random.as_seed(seed, torch.device("cpu"))).view(-1, 2).tolist()
        given = images.clone()
        for index in range(free, len(images)):
            if u[index][0] < 0.5:
                place = int(u[index][1] * self.size)
                given[index] = kept[place]
                kept[place] = images[index]
        return given

    def state_dict(self) -> dict[str, Tensor]:
        """The kept images."""
        return {} if self.images is None else {"images": self.images}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """Takes what ``state_dict`` gave.

        Raises:
            ValueError: for another tensor, or more images than ``size``.
        """
        self.check(state)
        self.images = state["images"].to(device, copy=True) if state else None

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Raises what ``load_state_dict`` would."""
        if set(state) - {"images"}:
            raise ValueError(f"the pool has no {', '.join(sorted(set(state) - {'images'}))}")
        if state and (state["images"].dim() == 0 or len(state["images"]) > self.size):
            raise ValueError(f"the pool keeps up to {self.size} images, not {tuple(state['images'].shape)}")


class CycleGANTrainer:
    """Trains two translations and two discriminators on sets A and B of images; continues bit for bit.

    A step improves both generators, by least-squares losses, the errors of the cycles A to B to A and B to A to B, and
    the change of images that are already in the set; then both discriminators, who see generated images through a pool
    of earlier ones. Learning rates are ``optimizers[...].param_groups[0]["lr"]``; the paper's fall to zero, linearly,
    in the last half of the training.

    Args:
        a_to_b: a generator, maps images [B, channels, height, width] of A to those of B, in [-1, 1].
        b_to_a: the other one.
        discriminator_a: maps images of A, real and generated, to logits of any shape: one, or one for each patch.
        discriminator_b: the same for B.
        cycle: weight of the cycles' mean absolute errors.
        identity: weight of the mean absolute changes of images that are in the set already; both sets need as many
            channels. 0: left out.
        lr: the generators' learning rate.
        discriminator_lr: the discriminators'; None for the same.
        betas: of Adam.
        pool: generated images of each set that are kept, see ``ImagePool``.
        ema: decay of the generators' moving average, an ``optim.EMA`` that is shorter at first. 0: none.
        seed: of all noise.

    Raises:
        ValueError: for values out of range.

    Source: Zhu, Park, Isola and Efros, "Unpaired image-to-image translation using cycle-consistent adversarial
    networks", ICCV 2017. As there, the discriminators' losses have a factor 1/2 that the generators' have not.

    Examples:
        >>> from genfast.models import CycleGANGenerator, PatchDiscriminator
        >>> a_to_b, b_to_a = (CycleGANGenerator(3, width=4, blocks=1) for _ in range(2))
        >>> judges = [PatchDiscriminator(3, width=4, layers=1) for _ in range(2)]
        >>> trainer = CycleGANTrainer(a_to_b, b_to_a, *judges)
        >>> photos, paintings = torch.rand(2, 4, 3, 16, 16) * 2 - 1
        >>> for step in range(2):
        ...     for optimizer in trainer.optimizers.values():
        ...         optimizer.param_groups[0]["lr"] = 2e-4 * min(1.0, 2 * (1 - step / 2))
        ...     measured = trainer.step(photos, paintings)
        >>> trainer.steps, trainer.to_b(photos).shape
        (2, torch.Size([4, 3, 16, 16]))
    """

    def __init__(
        self,
        a_to_b: nn.Module,
        b_to_a: nn.Module,
        discriminator_a: nn.Module,
        discriminator_b: nn.Module,
        *,
        cycle: float = 10.0,
        identity: float = 5.0,
        lr: float = 2e-4,
        discriminator_lr: float | None = None,
        betas: tuple[float, float] = (0.5, 0.999),
        pool: int = 50,
        ema: float = 0.0,
        seed: int = 0,
    ) -> None:
        rates = {"generators": lr, "discriminators": lr if discriminator_lr is None else discriminator_lr}
        weights = {"cycle": cycle, "identity": identity, "lr": lr, "discriminator_lr": rates["discriminators"]}
        check_numbers("CycleGANTrainer", weights, ema, betas)
        check_count("CycleGANTrainer", "pool", pool, 0)
        self.generators = nn.ModuleDict({"a_to_b": a_to_b, "b_to_a": b_to_a})
        self.discriminators = nn.ModuleDict({"a": discriminator_a, "b": discriminator_b})
        self.cycle, self.identity, self.seed, self.steps = cycle, identity, seed, 0
        self.pools = {"a": ImagePool(pool), "b": ImagePool(pool)}
        self.ema: EMA[nn.Module] | None = None
        if ema:
            self.ema = EMA(self.generators, ema, ramp=RAMP, update_buffers=False)
        self.optimizers = {
            name: torch.optim.Adam(network.parameters(), rates[name], betas, fused=True)
            for name, network in self._networks()
        }

    def _networks(self) -> tuple[tuple[str, nn.ModuleDict], ...]:
        return ("generators", self.generators), ("discriminators", self.discriminators)

    # ---- a step ----

    def step(self, a: Tensor, b: Tensor) -> CycleGANStep:
        """One step of the generators and one of the discriminators.

        Args:
            a: images of A, [B, channels, height, width]; b: of B. They are no pairs, and need not be as many.

        Raises:
            TypeError: for images that are not floating point.
            ValueError: for none, or for sets of different channels with ``identity``.
        """
        for name, images in (("a", a), ("b", b)):
            check_float_tensor("CycleGANTrainer.step", name, images)
            if images.dim() != 4 or len(images) == 0:
                raise ValueError(
                    f"CycleGANTrainer.step: {name} must be images [B, channels, height, width], at least one, got "
                    f"shape {tuple(images.shape)}"
                )
        if self.identity and a.shape[1] != b.shape[1]:
            raise ValueError(
                f"CycleGANTrainer.step: identity needs sets of as many channels, got {a.shape[1]} and {b.shape[1]}; "
                "train with identity=0"
            )
        self.generators.train()
        self.discriminators.train()
        made_a, made_b, of_generators = self._generator_step(a, b)
        of_discriminators = self._discriminator_step(a, b, made_a, made_b)
        if self.ema is not None:
            self.ema.update()
        self.steps += 1
        return CycleGANStep(*of_discriminators, *of_generators)

    def _generator_step(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        a_to_b, b_to_a = self.generators["a_to_b"], self.generators["b_to_a"]
        self.discriminators.requires_grad_(False)
        made_b, made_a = a_to_b(a), b_to_a(b)
        # (D - 1)^2, of which the library's least squares are half
        by_a = 2 * gan_generator_loss("least_squares", self.discriminators["a"](made_a))
        by_b = 2 * gan_generator_loss("least_squares", self.discriminators["b"](made_b))
        cycle = (b_to_a(made_b) - a).abs().mean() + (a_to_b(made_a) - b).abs().mean()
        whole = by_a + by_b + self.cycle * cycle
        identity = torch.full_like(cycle, math.nan)
        if self.identity:
            identity = (a_to_b(b) - b).abs().mean() + (b_to_a(a) - a).abs().mean()
            whole = whole + self.identity * identity
        optimizer = self.optimizers["generators"]
        optimizer.zero_grad(set_to_none=True)
        whole.backward()
        optimizer.step()
        return made_a.detach(), made_b.detach(), [loss.detach() for loss in (by_a, by_b, cycle, identity)]

    def _discriminator_step(self, a: Tensor, b: Tensor, made_a: Tensor, made_b: Tensor) -> list[Tensor]:
        self.discriminators.requires_grad_(True)
        losses = []
        for purpose, (name, real, made) in enumerate((("a", a, made_a), ("b", b, made_b))):
            judge = self.discriminators[name]
            seen = self.pools[name].exchange(made, step_seed(self.seed, self.steps, purpose))
            losses.append(gan_discriminator_loss("least_squares", judge(real), judge(seen)))
        optimizer = self.optimizers["discriminators"]
        optimizer.zero_grad(set_to_none=True)
        (losses[0] + losses[1]).backward()
        optimizer.step()
        return [loss.detach() for loss in losses]

    # ---- use ----

    @property
    def average(self) -> nn.ModuleDict:
        """The generators' moving average; without ``ema`` the generators themselves."""
        found: Any = self.generators if self.ema is None else self.ema.module
        return found  # type: ignore[no-any-return]

    def to_b(self, a: Tensor) -> Tensor:
        """Images of A as the average translates them, in evaluation mode; constants for autograd."""
        return self._translated("a_to_b", a)

    def to_a(self, b: Tensor) -> Tensor:
        """Images of B as the average translates them, in evaluation mode; constants for autograd."""
        return self._translated("b_to_a", b)

    @torch.no_grad()
    def _translated(self, way: str, images: Tensor) -> Tensor:
        generator = self.average[way]
        with evaluating(generator):
            out: Tensor = generator(images)
        return out

    # ---- state ----

    def _networks_state(self) -> dict[str, Tensor]:
        return {
            f"{key}.{name}": tensor
            for key, network in self._networks()
            for name, tensor in network.state_dict().items()
        }  # fmt: skip

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next step depends on apart from the arguments and the data: tensors, ready for safetensors."""
        state = {f"networks.{name}": tensor for name, tensor in self._networks_state().items()}
        if self.ema is not None:
            state |= {f"average.{name}": tensor for name, tensor in average_state(self.ema).items()}
        for key, network in self._networks():
            state |= {f"{key}.{n}": tensor for n, tensor in optimizer_state(self.optimizers[key], network).items()}
        for name, pool in self.pools.items():
            state |= {f"pool_{name}.{n}": tensor for n, tensor in pool.state_dict().items()}
        return state | {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes what ``state_dict`` gave.

        Raises:
            KeyError, ValueError: for tensors that are missing, or of other networks; the trainer is then as it was.
        """
        parts = grouped(state, ("networks", "average", "pool_a", "pool_b", *self.optimizers))
        check_tensors("the trainer", {"steps": torch.tensor(self.steps)}, parts[""])
        steps = int(parts[""]["steps"])
        if steps < 0:
            raise ValueError(f"it has no step {steps}")
        check_tensors("the networks", self._networks_state(), parts["networks"])
        check_tensors("the average", {} if self.ema is None else average_state(self.ema), parts["average"])
        for key, network in self._networks():
            check_optimizer(f"the {key}", network, parts[key])
        for name, pool in self.pools.items():
            pool.check(parts[f"pool_{name}"])
        networks = grouped(parts["networks"], tuple(self.optimizers))
        for key, network in self._networks():
            network.load_state_dict(networks[key])
            load_optimizer(self.optimizers[key], network, parts[key])
        if self.ema is not None:
            load_average(self.ema, parts["average"])
        device = next(self.generators.parameters()).device
        for name, pool in self.pools.items():
            pool.load_state_dict(parts[f"pool_{name}"], device)
        self.steps = steps
