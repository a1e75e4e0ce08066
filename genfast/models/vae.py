"""Variational autoencoders with a Bernoulli likelihood."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from genfast import ops
from genfast.nn import Reparameterize

__all__ = ["VAE", "VAEOutput"]


class VAEOutput(NamedTuple):
    """What ``VAE.forward`` returns, for a batch of B rows and K = ``samples``.

    logits: of the reconstruction, [B, ...] as x, or [K, B, ...]; mu, logvar: [B, L]; z: [B, L] or [K, B, L];
    kl: [B], in nats.
    """

    logits: Tensor
    mu: Tensor
    logvar: Tensor
    z: Tensor
    kl: Tensor


class VAE(nn.Module):
    """A VAE: Gaussian posterior and prior, Bernoulli likelihood, any encoder and decoder.

    ``VAE.mlp`` and ``VAE.conv`` build the usual ones.

    Args:
        encoder: maps x [B, ...] to [B, 2L]: mu, then logvar.
        decoder: maps z [B, L] to logits of x's shape [B, ...].
        latent: L.

    Raises:
        ValueError: for a latent below 1.

    Source: Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014.

    Examples:
        >>> vae = VAE.mlp(64, hidden=[32], latent=4)
        >>> x = torch.bernoulli(torch.full((8, 64), 0.5))
        >>> vae.loss(x).backward()
        >>> vae.sample(3).shape, vae.reconstruct(x).shape
        (torch.Size([3, 64]), torch.Size([8, 64]))
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent: int) -> None:
        super().__init__()
        if latent < 1:
            raise ValueError(f"VAE: latent must be at least 1, got {latent}")
        self.encoder = encoder
        self.decoder = decoder
        self.latent = latent
        self.reparameterize = Reparameterize(kl=True)

    @classmethod
    def mlp(cls, features: int = 784, hidden: Sequence[int] = (400,), latent: int = 20) -> VAE:
        """Fully connected encoder and decoder with ReLU between.

        Args:
            features: size of a row of x [B, features].
            hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
            latent: size of z.

        Examples:
            >>> VAE.mlp(64, hidden=[32, 16], latent=2).decoder[0]
            Linear(in_features=2, out_features=16, bias=True)
        """
        return cls(
            _perceptron([features, *hidden, 2 * latent]),
            _perceptron([latent, *reversed(hidden), features]),
            latent,
        )

    @classmethod
    def conv(cls, shape: Sequence[int] = (1, 28, 28), channels: Sequence[int] = (32, 64), latent: int = 20) -> VAE:
        """Convolutional encoder and decoder: one 4 x 4 convolution of stride 2 a level, mirrored by transposed ones.

        Args:
            shape: of an image (channels, height, width); height and width divisible by 2^len(channels).
            channels: widths of the levels.
            latent: size of z.

        Raises:
            ValueError: for a shape that cannot be halved that often.

        Examples:
            >>> vae = VAE.conv((1, 8, 8), channels=[8, 16], latent=2)
            >>> vae(torch.zeros(5, 1, 8, 8)).logits.shape
            torch.Size([5, 1, 8, 8])
        """
        scale = 2 ** len(channels)
        if len(shape) != 3 or not channels or shape[1] % scale or shape[2] % scale:
            raise ValueError(
                f"VAE.conv: shape must be (channels, height, width) with sides divisible by 2^{len(channels)} "
                f"for {len(channels)} levels, got {tuple(shape)}"
            )
        height, width = shape[1] // scale, shape[2] // scale
        flat = channels[-1] * height * width
        widths = [shape[0], *channels]
        encoder: list[nn.Module] = []
        for narrow, wide in zip(widths, channels, strict=False):
            encoder += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.ReLU()]
        decoder: list[nn.Module] = [nn.Linear(latent, flat), nn.ReLU(), nn.Unflatten(1, (channels[-1], height, width))]
        for wide, narrow in zip(reversed(widths), reversed(widths[:-1]), strict=False):
            decoder += [nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1), nn.ReLU()]
        return cls(
            nn.Sequential(*encoder, nn.Flatten(), nn.Linear(flat, 2 * latent)),
            nn.Sequential(*decoder[:-1]),
            latent,
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of the posterior of x [B, ...], each [B, L]."""
        parameters = self.encoder(x)
        if parameters.shape[-1] != 2 * self.latent:
            raise ValueError(f"VAE: the encoder must return [B, {2 * self.latent}], got {tuple(parameters.shape)}")
        mu, logvar = parameters.chunk(2, dim=-1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Logits of x for z [B, L] or [K, B, L]."""
        logits = self.decoder(z.flatten(0, -2))
        return logits.unflatten(0, z.shape[:-1])

    def forward(self, x: Tensor, samples: int | None = None, seed: int | Tensor | None = None) -> VAEOutput:
        """Encodes x, draws z and decodes it.

        Args:
            x: [B, ...], in [0, 1].
            samples: K draws a row, which adds a leading dimension to logits and z; None: one draw without it.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.

        Returns:
            A ``VAEOutput``.
        """
        mu, logvar = self.encode(x)
        z, kl = self.reparameterize(mu, logvar, samples, seed)
        return VAEOutput(self.decode(z), mu, logvar, z, kl)

    def loss(
        self, x: Tensor, beta: float = 1.0, samples: int | None = None, seed: int | Tensor | None = None
    ) -> Tensor:
        """Mean over rows of the negative ELBO, E_q[-log p(x|z)] + beta KL(q(z|x) || p(z)), in nats a row.

        Args:
            x: [B, ...], in [0, 1]; the ELBO bounds log p(x) for binary x.
            beta: weight of the KL term (Higgins et al., "beta-VAE", ICLR 2017).
            samples: draws a row that the expectation is estimated with; None: one.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.

        Returns:
            A scalar.
        """
        if samples is not None and samples < 1:
            raise ValueError(f"VAE.loss: samples must be at least 1, got {samples}")
        out = self(x, samples, seed)
        logits = out.logits.float() if out.logits.dtype in (torch.bfloat16, torch.float16) else out.logits
        target = x.to(logits.dtype).expand_as(logits)
        rows = math.prod(out.z.shape[:-1])
        reconstruction = functional.binary_cross_entropy_with_logits(logits, target, reduction="sum") / rows
        return reconstruction + beta * out.kl.mean()

    @torch.no_grad()
    def sample(self, count: int, seed: int | Tensor | None = None) -> Tensor:
        """Pixel probabilities of ``count`` images drawn from the prior, [count, ...]; a constant for autograd."""
        like = next(self.decoder.parameters(), torch.empty(0))
        zeros = torch.zeros(count, self.latent, device=like.device, dtype=like.dtype)
        return torch.sigmoid(self.decode(ops.reparameterize(zeros, zeros, seed=seed)))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Pixel probabilities at the posterior's mean, of x's shape; a constant for autograd."""
        return torch.sigmoid(self.decode(self.encode(x)[0]))


def _perceptron(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
