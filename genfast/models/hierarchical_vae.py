"""VAEs with two stochastic layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genfast import ops, random
from genfast._checks import check_count
from genfast.models import _likelihoods
from genfast.models import _vae_networks as networks
from genfast.models.vae import VAE

__all__ = ["HierarchicalVAE", "HierarchicalVAEOutput"]


class HierarchicalVAEOutput(NamedTuple):
    """What ``HierarchicalVAE.forward`` returns, for K draws of each of B rows.

    decoder_out: parameters of p(x|z1), [K, B, ...]; z1: [K, B, L1]; z2: [K, B, L2]; log_weights: log of
    p(x, z1, z2) / q(z1, z2|x), [K, B], in nats.
    """

    decoder_out: Tensor
    z1: Tensor
    z2: Tensor
    log_weights: Tensor


class HierarchicalVAE(VAE):
    """A VAE of two stochastic layers: x to z1 to z2 by the encoders, z2 to z1 to x by the decoders.

    p(z2) = N(0, 1), p(z1|z2) and both posteriors are diagonal Gaussians with networks for mean and logvar.

    Args:
        encoder: maps x [B, ...] to [B, 2 L1], mean and logvar of q(z1|x).
        top_encoder: maps z1 [B, L1] to [B, 2 L2], of q(z2|z1).
        top_decoder: maps z2 [B, L2] to [B, 2 L1], of p(z1|z2).
        decoder: maps z1 [B, L1] to the parameters of p(x|z1), as of ``VAE``.
        latents: (L1, L2).
        likelihood: as of ``VAE``.
        samples: K, draws a row in training.
        gradient: ``"iwae"`` for the importance-weighted bound, ``"vae"`` for the ELBO.

    Raises:
        ValueError: for latents or samples below 1, an unknown gradient or likelihood.

    Source: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016, whose two-layer models
    ``HierarchicalVAE.mlp`` builds.

    Examples:
        >>> model = HierarchicalVAE.mlp(64, hidden=[[32], [16]], latents=(8, 4), samples=5)
        >>> x = torch.bernoulli(torch.full((8, 64), 0.5))
        >>> model.loss(x).backward()
        >>> model.sample(3).shape, model.log_likelihood(x, samples=10).shape
        (torch.Size([3, 64]), torch.Size([8]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        top_encoder: nn.Module,
        top_decoder: nn.Module,
        decoder: nn.Module,
        latents: tuple[int, int],
        *,
        likelihood: str = "bernoulli",
        samples: int = 1,
        gradient: str = "iwae",
    ) -> None:
        super().__init__(encoder, decoder, latents[0], likelihood=likelihood)
        self.top_encoder = top_encoder
        self.top_decoder = top_decoder
        self.top_latent = check_count("HierarchicalVAE", "the second of latents", latents[1], 1)
        self.samples = check_count("HierarchicalVAE", "samples", samples, 1)
        if gradient not in ("iwae", "vae"):
            raise ValueError(f"HierarchicalVAE: gradient must be iwae or vae, got {gradient!r}")
        self.gradient = gradient

    @classmethod
    def mlp(  # type: ignore[override]
        cls,
        features: int = 784,
        hidden: Sequence[Sequence[int]] = ((200, 200), (100, 100)),
        latents: tuple[int, int] = (100, 50),
        *,
        likelihood: str = "bernoulli",
        activation: type[nn.Module] = nn.Tanh,
        **options: Any,
    ) -> HierarchicalVAE:
        """Fully connected networks.

        Args:
            features: size of a row of x [B, features].
            hidden: widths of the hidden layers below z1 and between z1 and z2; decoders have them in reverse.
            latents: sizes of z1 and z2.
            likelihood: see the class.
            activation: between the layers.
            options: for the class itself.

        Examples:
            >>> HierarchicalVAE.mlp(64).top_decoder[-1]
            Linear(in_features=100, out_features=200, bias=True)
        """
        _likelihoods.check_likelihood("HierarchicalVAE.mlp", likelihood)
        below, above = ([*widths] for widths in hidden)
        low, high = latents
        outputs = features * _likelihoods.parameters(likelihood)
        return cls(
            networks.perceptron([features, *below, 2 * low], activation),
            networks.perceptron([low, *above, 2 * high], activation),
            networks.perceptron([high, *reversed(above), 2 * low], activation),
            networks.perceptron([low, *reversed(below), outputs], activation),
            latents,
            likelihood=likelihood,
            **options,
        )

    @classmethod
    def _of_images(cls, name, shape, channels, latent, likelihood, blocks, options):  # type: ignore[no-untyped-def]
        raise NotImplementedError(f"HierarchicalVAE.{name}: pass networks of your own, or use mlp")

    def _gaussian(self, network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
        parameters = network(inputs.flatten(0, -2)).unflatten(0, inputs.shape[:-1])
        mu, logvar = parameters.chunk(2, -1)
        return mu, logvar

    def forward(self, x: Tensor, samples: int | None = None, seed: int | Tensor | None = None) -> HierarchicalVAEOutput:  # type: ignore[override]
        """Draws z1 and z2 from the posteriors and weighs them.

        Args:
            x: [B, ...].
            samples: K; None for the class's.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.

        Returns:
            A ``HierarchicalVAEOutput``.
        """
        samples = self.samples if samples is None else check_count("HierarchicalVAE", "samples", samples, 1)
        seeds = _two(seed, x.device)
        mu, logvar = self.encode(x)
        z1, to_prior = ops.reparameterize_log_ratio(mu, logvar, samples=samples, seed=seeds[0])
        z2, log_ratio = ops.reparameterize_log_ratio(
            *self._gaussian(self.top_encoder, z1), samples=1, seed=seeds[1], event_dims=1
        )
        z2, log_ratio = z2.squeeze(0), log_ratio.squeeze(0)
        # The first ratio is of N(0, 1) where p(z1|z2) is meant.
        change = (_log_density(z1, *self._gaussian(self.top_decoder, z2)) + 0.5 * z1.square()).sum(-1)
        decoder_out = self.decode(z1)
        log_weights = self._log_px(decoder_out, x) + to_prior + change + log_ratio
        return HierarchicalVAEOutput(decoder_out, z1, z2, log_weights)

    def bound(self, x: Tensor, samples: int | None = None, seed: int | Tensor | None = None) -> Tensor:
        """The bound on log p(x) of each row that training maximizes, [B]; arguments as of ``forward``."""
        log_weights = self(x, samples, seed).log_weights
        return log_weights.mean(0) if self.gradient == "vae" else ops.iwae_bound(log_weights)

    def loss(self, x: Tensor, samples: int | None = None, seed: int | Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Mean over rows of the negative bound, in nats a row; arguments as of ``forward``."""
        return -self.bound(x, samples, seed).mean()

    def _log_weights(self, counts: list[int], seeds: list[int], x: Tensor, *given: Tensor) -> Iterator[Tensor]:
        for count, seed in zip(counts, seeds, strict=True):
            yield self(x, count, seed).log_weights

    @torch.no_grad()
    def sample(self, count: int, seed: int | Tensor | None = None) -> Tensor:
        """Means of p(x|z1) at ``count`` draws of z2 and z1 from the prior, [count, ...]; a constant for autograd."""
        like = next(self.decoder.parameters(), torch.empty(0))
        seeds = _two(seed, like.device)
        zeros = torch.zeros(count, self.top_latent, device=like.device, dtype=like.dtype)
        z2 = ops.reparameterize(zeros, zeros, seed=seeds[0])
        z1 = ops.reparameterize(*self._gaussian(self.top_decoder, z2), seed=seeds[1])
        return self._mean(self.decode(z1))

    def extra_repr(self) -> str:
        return f"samples={self.samples}, gradient={self.gradient!r}"


def _two(seed: int | Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Seeds of the two layers."""
    first = random.as_seed(seed, device)
    return first, first ^ 0x5DEECE66D


def _log_density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; mu, e^logvar) without its constant."""
    return -0.5 * ((z - mu).square() * torch.exp(-logvar) + logvar)
