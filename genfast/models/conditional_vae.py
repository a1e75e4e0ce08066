"""VAEs of data given a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genfast import ops
from genfast._checks import check_count, shape_of
from genfast.models import _likelihoods
from genfast.models import _vae_networks as networks
from genfast.models.vae import VAE, VAEOutput

__all__ = ["ConditionalVAE"]


class ConditionalVAE(VAE):
    """A VAE of p(x|y): encoder and decoder see y beside x and z.

    Every method of ``VAE`` takes y after its first argument.

    Args:
        encoder: maps [B, V + classes], flat x beside y, to [B, 2L].
        decoder: maps [B, L + classes], z beside y, to the parameters of p(x|z, y).
        latent: L.
        classes: of y; for a y of numbers [B, classes], how many.
        likelihood: as of ``VAE``.

    Source: Sohn, Lee and Yan, "Learning structured output representation using deep conditional generative models",
    NeurIPS 2015.

    Examples:
        >>> vae = ConditionalVAE.mlp(64, hidden=[32], latent=4, classes=10)
        >>> x, y = torch.bernoulli(torch.full((8, 64), 0.5)), torch.arange(8)
        >>> vae.loss(x, y).backward()
        >>> vae.sample(torch.tensor([3, 3, 7])).shape
        torch.Size([3, 64])
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, latent: int, *, classes: int, likelihood: str = "bernoulli"
    ) -> None:
        super().__init__(encoder, decoder, latent, likelihood=likelihood)
        self.classes = check_count("ConditionalVAE", "classes", classes, 1)

    @classmethod
    def mlp(
        cls,
        features: int = 784,
        hidden: Sequence[int] = (400,),
        latent: int = 20,
        *,
        likelihood: str = "bernoulli",
        activation: type[nn.Module] = nn.ReLU,
        classes: int = 10,
        **options: Any,
    ) -> Any:
        """Fully connected encoder and decoder; arguments as of ``VAE.mlp``, and ``classes`` as of the class.

        Examples:
            >>> ConditionalVAE.mlp(64, hidden=[32], latent=2, classes=10).decoder[0]
            Linear(in_features=12, out_features=32, bias=True)
        """
        _likelihoods.check_likelihood("ConditionalVAE.mlp", likelihood)
        outputs = features * _likelihoods.parameters(likelihood)
        return cls(
            networks.perceptron([features + classes, *hidden, 2 * latent], activation),
            networks.perceptron([latent + classes, *reversed(hidden), outputs], activation),
            latent,
            likelihood=likelihood,
            classes=classes,
            **options,
        )

    @classmethod
    def _of_images(cls, name, shape, channels, latent, likelihood, blocks, options):  # type: ignore[no-untyped-def]
        raise NotImplementedError(f"ConditionalVAE.{name}: pass an encoder and a decoder of your own, or use mlp")

    def _given(self, y: Tensor, like: Tensor) -> Tensor:
        """y as [B, classes] in the dtype of what stands beside it."""
        if not y.is_floating_point():
            if y.dim() != 1:
                raise ValueError(f"ConditionalVAE: classes must be [B], got shape {shape_of(y)}")
            if y.is_cpu and y.numel() and not (int(y.min()) >= 0 and int(y.max()) < self.classes):
                raise ValueError(
                    f"ConditionalVAE: y must be in [0, {self.classes}), got {int(y.min())}..{int(y.max())}"
                )
            y = torch.nn.functional.one_hot(y.long(), self.classes)
        if y.dim() != 2 or y.shape[1] != self.classes:
            raise ValueError(f"ConditionalVAE: y must be [B] classes or [B, {self.classes}], got shape {shape_of(y)}")
        return y.to(device=like.device, dtype=like.dtype)

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(mu, logvar) of the posterior of x [B, ...] given y, each [B, L]."""
        return super().encode(torch.cat((x.flatten(1), self._given(y, x)), 1))

    def decode(self, z: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """Parameters of p(x|z, y) for z [B, L] or [K, B, L]."""
        given = self._given(y, z)
        return super().decode(torch.cat((z, given.expand(*z.shape[:-1], -1)), -1))

    def forward(  # type: ignore[override]
        self, x: Tensor, y: Tensor, samples: int | None = None, seed: int | Tensor | None = None
    ) -> VAEOutput:
        mu, logvar = self.encode(x, y)
        z, kl = self.reparameterize(mu, logvar, samples, seed)
        return VAEOutput(self.decode(z, y), mu, logvar, z, kl)

    def loss(  # type: ignore[override]
        self,
        x: Tensor,
        y: Tensor,
        beta: float = 1.0,
        samples: int | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Mean over rows of the negative ELBO of log p(x|y), in nats a row."""
        self._samples("loss", samples)
        out = self(x, y, samples, seed)
        return (beta * out.kl - self._log_px(out.decoder_out, x, averaged=True)).mean()

    @torch.no_grad()
    def sample(self, y: Tensor, seed: int | Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Means of p(x|z, y) at a draw of z from the prior for each of y, [B, ...]; a constant for autograd."""
        like = next(self.decoder.parameters(), torch.empty(0))
        zeros = torch.zeros(len(y), self.latent, device=like.device, dtype=like.dtype)
        return self._mean(self.decode(ops.reparameterize(zeros, zeros, seed=seed), y))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """Means of p(x|z, y) at the posterior's mean; a constant for autograd."""
        return self._mean(self.decode(self.encode(x, y)[0], y))

    @torch.no_grad()
    def interpolate(  # type: ignore[override]
        self, x: Tensor, y: Tensor, other: Tensor, other_y: Tensor, steps: int = 8
    ) -> Tensor:
        """Means of p(x|z, y) on the line between two posterior means and their classes, [steps, B, ...]."""
        check_count("ConditionalVAE.interpolate", "steps", steps, 2)
        ends = (self.encode(x, y)[0], self._given(y, x)), (self.encode(other, other_y)[0], self._given(other_y, other))
        shares = torch.linspace(0, 1, steps).tolist()
        points = [[torch.lerp(a, b, share) for a, b in zip(*ends, strict=True)] for share in shares]
        return torch.stack([self._mean(self.decode(z, given)) for z, given in points])

    def log_likelihood(  # type: ignore[override]
        self, x: Tensor, y: Tensor, samples: int = 5000, seed: int | Tensor | None = None
    ) -> Tensor:
        """log p(x|y) of each row by importance sampling, [B]; see ``VAE.log_likelihood``."""
        return self._importance(x, samples, seed, self._given(y, x))

    def anomaly_score(  # type: ignore[override]
        self, x: Tensor, y: Tensor, samples: int = 100, seed: int | Tensor | None = None
    ) -> Tensor:
        """-log p(x|y) of each row, [B]."""
        return -self.log_likelihood(x, y, samples, seed)

    def extra_repr(self) -> str:
        return f"classes={self.classes}"
