"""Generative adversarial networks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from genfast._checks import check_count
from genfast.models._gan_layers import normals

__all__ = ["GAN", "PackedDiscriminator"]


class GAN(nn.Module):
    """A generator and a discriminator, any two modules; ``genfast.training.GANTrainer`` trains them.

    ``MLPGAN``, ``DCGAN``, ``SNGAN`` and ``StyleGAN2`` build the usual ones.

    Args:
        generator: maps z [B, latent], and with classes labels [B], to samples [B, ...]. One with an attribute
            ``noisy`` that is True also takes ``seed=`` for noise of its own.
        discriminator: maps samples, and with classes labels [B], to logits: high for real ones. An attribute
            ``independent`` that is True says that a sample's logit (of a packed one, a pack's) depends on no other
            sample, so that real and generated ones may share a call.
        latent: size of z, which is standard normal.
        classes: number of classes, None for a model without.

    Raises:
        ValueError: for a latent or classes below 1.

    Source: Goodfellow et al., "Generative adversarial nets", NeurIPS 2014.

    Examples:
        >>> gan = GAN(nn.Linear(2, 3), nn.Linear(3, 1), latent=2)
        >>> samples = gan.sample(5, seed=0)
        >>> samples.shape, gan.judge(samples).shape
        (torch.Size([5, 3]), torch.Size([5, 1]))
    """

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, latent: int, *, classes: int | None = None
    ) -> None:
        super().__init__()
        check_count(type(self).__name__, "latent", latent, 1)
        if classes is not None:
            check_count(type(self).__name__, "classes", classes, 1)
        self.generator = generator
        self.discriminator = discriminator
        self.latent = latent
        self.classes = classes

    def noise(self, count: int, seed: int | Tensor | None = None) -> Tensor:
        """z for ``count`` samples, [count, latent]: the same for a seed on every device."""
        like = next(self.generator.parameters(), torch.empty(0))
        return normals((count, self.latent), like, seed)

    def generate(
        self, z: Tensor, labels: Tensor | None = None, seed: int | Tensor | None = None, **options: Any
    ) -> Tensor:
        """The generator's samples for z; ``seed`` is that of its own noise, where it has any.

        Raises:
            ValueError: for labels where the model has no classes, or none where it has.
        """
        given = self._labels(labels)
        if getattr(self.generator, "noisy", False):
            options["seed"] = seed
        samples: Tensor = self.generator(z, *given, **options)
        return samples

    def judge(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The discriminator's logits for x [B, ...]: high for real ones.

        Raises:
            ValueError: for labels where the model has no classes, or none where it has.
        """
        logits: Tensor = self.discriminator(x, *self._labels(labels))
        return logits

    def _labels(self, labels: Tensor | None) -> tuple[Tensor, ...]:
        if (labels is None) != (self.classes is None):
            wanted = "has no classes" if self.classes is None else f"has {self.classes} classes"
            given = "no labels" if labels is None else "labels"
            raise ValueError(f"{type(self).__name__}: the model {wanted}, got {given}")
        if labels is None:
            return ()
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"{type(self).__name__}: labels must be integers [B], got {labels.dtype} {tuple(labels.shape)}"
            )
        return (labels,)

    def forward(self, z: Tensor, labels: Tensor | None = None, seed: int | Tensor | None = None) -> Tensor:
        """``generate``."""
        return self.generate(z, labels, seed)

    @torch.no_grad()
    def sample(
        self, count: int, seed: int | Tensor | None = None, *, labels: Tensor | None = None, **options: Any
    ) -> Tensor:
        """``count`` samples of the generator in evaluation mode, a constant for autograd.

        Args:
            count: number of samples.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            labels: [count], of a model with classes; drawn evenly from the seed where there are none.
            options: for the generator, such as ``truncation`` of ``StyleGAN2``.

        Returns:
            [count, ...], images in [-1, 1].

        Raises:
            ValueError: for a count below 1.
        """
        check_count(f"{type(self).__name__}.sample", "count", count, 1)
        z = self.noise(count, seed)
        if self.classes is not None and labels is None:
            labels = torch.arange(count, device=z.device) % self.classes
        with evaluating(self.generator):
            return self.generate(z, labels, None if seed is None else _own(seed), **options)

    @torch.no_grad()
    def interpolate(self, start: Tensor, end: Tensor, steps: int = 8, seed: int = 0, **options: Any) -> Tensor:
        """Samples on the great circles between two batches of z, in evaluation mode.

        Args:
            start: z of one end, [B, latent].
            end: of the other.
            steps: points, both ends included; at least 2.
            seed: of the generator's own noise, the same at every point.
            options: for the generator, and ``labels`` [B].

        Returns:
            [steps, B, ...]; a constant for autograd.

        Raises:
            ValueError: for fewer than 2 steps.
        """
        check_count(f"{type(self).__name__}.interpolate", "steps", steps, 2)
        lengths = start.norm(dim=1, keepdim=True), end.norm(dim=1, keepdim=True)
        cosine = (start / lengths[0] * (end / lengths[1])).sum(1, keepdim=True).clamp(-1, 1)
        angle = cosine.acos().clamp(min=1e-4)
        with evaluating(self.generator):
            points = []
            for share in torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device):
                z = (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / angle.sin()
                points.append(self.generate(z, seed=seed, **options))
        return torch.stack(points)


def _own(seed: int | Tensor) -> int | Tensor:
    """The seed of the generator's noise, another than that of z."""
    return seed + 0x5851F42D4C957F2D if isinstance(seed, Tensor) else (seed + 0x5851F42D4C957F2D) & (2**63 - 1)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each part's mode as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class PackedDiscriminator(nn.Module):
    """Judges m samples at once, joined along dim 1, which makes a lack of variety visible (PacGAN).

    Args:
        discriminator: for samples with m times as many features or channels.
        m: samples that it sees at once.

    Raises:
        ValueError: for m below 1; in ``forward`` for a batch that m does not divide.

    Source: Lin, Khetan, Fanti and Oh, "PacGAN: the power of two samples in generative adversarial networks", NeurIPS
    2018.

    Examples:
        >>> packed = PackedDiscriminator(nn.Linear(6, 1), m=2)
        >>> packed(torch.zeros(8, 3)).shape
        torch.Size([4, 1])
    """

    def __init__(self, discriminator: nn.Module, m: int = 2) -> None:
        super().__init__()
        check_count("PackedDiscriminator", "m", m, 1)
        self.discriminator = discriminator
        self.independent = getattr(discriminator, "independent", False)
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the rows of x [B, C, ...] in groups of m: [B / m, ...]."""
        if len(x) % self.m:
            raise ValueError(f"PackedDiscriminator: the batch must be divisible by m = {self.m}, got {len(x)} samples")
        logits: Tensor = self.discriminator(x.reshape(len(x) // self.m, self.m * x.shape[1], *x.shape[2:]))
        return logits

    def extra_repr(self) -> str:
        return f"m={self.m}"
