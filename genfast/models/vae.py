"""Variational autoencoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genfast import ops, random
from genfast._checks import check_count
from genfast.models import _likelihoods
from genfast.models import _vae_networks as networks
from genfast.nn import Reparameterize
from genfast.ops.log_likelihood import mean_factor, rows_log_likelihood

__all__ = ["VAE", "VAEOutput"]

_ELEMENTS, _DRAWS = 2**23, 100  # in ``log_likelihood``: values of x decoded at a time, and draws a row among them


class VAEOutput(NamedTuple):
    """What ``VAE.forward`` returns, for a batch of B rows and K = ``samples``.

    decoder_out: parameters of p(x|z), [B, ...] or [K, B, ...]; mu, logvar: [B, L]; z: [B, L] or [K, B, L]; kl: [B], in
    nats.
    """

    decoder_out: Tensor
    mu: Tensor
    logvar: Tensor
    z: Tensor
    kl: Tensor


class VAE(nn.Module):
    """A VAE: Gaussian posterior and prior, any encoder and decoder.

    ``VAE.mlp``, ``VAE.conv`` and ``VAE.residual`` build the usual ones.

    Args:
        encoder: maps x [B, ...] to [B, 2L]: mu, then logvar.
        decoder: maps z [B, L] to the parameters of p(x|z), as ``genfast.ops.log_likelihood`` takes them: for
            ``"bernoulli"`` and ``"continuous_bernoulli"`` logits of x's shape, for ``"gaussian"`` mean and logvar along
            dim 1, for ``"discretized_logistic"`` mean and log scale along dim 1.
        latent: L.
        likelihood: of x given z. Bernoulli ones and discretized logistics take x in [0, 1].

    Raises:
        ValueError: for a latent below 1 or an unknown likelihood.

    Source: Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014.

    Examples:
        >>> vae = VAE.mlp(64, hidden=[32], latent=4)
        >>> x = torch.bernoulli(torch.full((8, 64), 0.5))
        >>> vae.loss(x).backward()
        >>> vae.sample(3).shape, vae.reconstruct(x).shape, vae.log_likelihood(x, samples=10).shape
        (torch.Size([3, 64]), torch.Size([8, 64]), torch.Size([8]))
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent: int, *, likelihood: str = "bernoulli") -> None:
        super().__init__()
        if latent < 1:
            raise ValueError(f"{type(self).__name__}: latent must be at least 1, got {latent}")
        self.encoder = encoder
        self.decoder = decoder
        self.latent = latent
        self.likelihood = _likelihoods.check_likelihood(type(self).__name__, likelihood)
        self.reparameterize = Reparameterize(kl=True)

    # ---- builders ----

    @classmethod
    def mlp(
        cls,
        features: int = 784,
        hidden: Sequence[int] = (400,),
        latent: int = 20,
        *,
        likelihood: str = "bernoulli",
        activation: type[nn.Module] = nn.ReLU,
        **options: Any,
    ) -> Any:
        """Fully connected encoder and decoder.

        Args:
            features: size of a row of x [B, features].
            hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
            latent: size of z.
            likelihood: see the class.
            activation: between the layers.
            options: for the class itself.

        Examples:
            >>> VAE.mlp(64, hidden=[32, 16], latent=2).decoder[0]
            Linear(in_features=2, out_features=16, bias=True)
        """
        _likelihoods.check_likelihood(f"{cls.__name__}.mlp", likelihood)
        return cls(
            networks.perceptron([features, *hidden, 2 * latent], activation),
            networks.perceptron(
                [latent, *reversed(hidden), features * _likelihoods.parameters(likelihood)], activation
            ),
            latent,
            likelihood=likelihood,
            **options,
        )

    @classmethod
    def conv(
        cls,
        shape: Sequence[int] = (1, 28, 28),
        channels: Sequence[int] = (32, 64),
        latent: int = 20,
        *,
        likelihood: str = "bernoulli",
        **options: Any,
    ) -> Any:
        """Convolutional encoder and decoder: one 4 x 4 convolution of stride 2 a level, mirrored by transposed ones.

        Args:
            shape: of an image (channels, height, width); height and width divisible by 2^len(channels).
            channels: widths of the levels.
            latent: size of z.
            likelihood: see the class.
            options: for the class itself.

        Raises:
            ValueError: for a shape that cannot be halved that often.

        Examples:
            >>> vae = VAE.conv((1, 8, 8), channels=[8, 16], latent=2)
            >>> vae(torch.zeros(5, 1, 8, 8)).decoder_out.shape
            torch.Size([5, 1, 8, 8])
        """
        return cls._of_images("conv", shape, channels, latent, likelihood, None, options)

    @classmethod
    def residual(
        cls,
        shape: Sequence[int] = (3, 32, 32),
        channels: Sequence[int] = (64, 128),
        latent: int = 64,
        *,
        blocks: int = 2,
        likelihood: str = "discretized_logistic",
        **options: Any,
    ) -> Any:
        """As ``conv``, with ``blocks`` residual blocks at the coarsest level of encoder and decoder.

        Args:
            shape: of an image (channels, height, width); height and width divisible by 2^len(channels).
            channels: widths of the levels.
            latent: size of z.
            blocks: residual blocks on each side.
            likelihood: see the class.
            options: for the class itself.

        Raises:
            ValueError: for a shape that cannot be halved that often.

        Examples:
            >>> vae = VAE.residual((3, 8, 8), channels=[8, 16], latent=2)
            >>> vae(torch.zeros(5, 3, 8, 8)).decoder_out.shape
            torch.Size([5, 6, 8, 8])
        """
        return cls._of_images("residual", shape, channels, latent, likelihood, blocks, options)

    @classmethod
    def _of_images(cls, name, shape, channels, latent, likelihood, blocks, options):  # type: ignore[no-untyped-def]
        what = f"{cls.__name__}.{name}"
        _likelihoods.check_likelihood(what, likelihood)
        height, width = networks.image_levels(what, shape, channels)
        flat = channels[-1] * height * width
        outputs = shape[0] * _likelihoods.parameters(likelihood)
        if blocks is None:
            down, up = networks.conv_encoder(shape[0], channels), networks.conv_decoder(outputs, channels)
            first: list[nn.Module] = [nn.Linear(latent, flat), nn.ReLU()]
        else:
            down = networks.residual_encoder(shape[0], channels, blocks)
            up = networks.residual_decoder(outputs, channels, blocks)
            first = [nn.Linear(latent, flat)]
        return cls(
            nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, 2 * latent)),
            nn.Sequential(*first, nn.Unflatten(1, (channels[-1], height, width)), *up),
            latent,
            likelihood=likelihood,
            **options,
        )

    # ---- the model ----

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of the posterior of x [B, ...], each [B, L]."""
        parameters = self.encoder(x)
        if parameters.shape[-1] != 2 * self.latent:
            raise ValueError(
                f"{type(self).__name__}: the encoder must return [B, {2 * self.latent}], got {tuple(parameters.shape)}"
            )
        mu, logvar = parameters.chunk(2, dim=-1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Parameters of p(x|z) for z [B, L] or [K, B, L]."""
        if z.dim() == 2:
            return self.decoder(z)
        return self.decoder(z.flatten(0, -2)).unflatten(0, z.shape[:-1])

    def forward(self, x: Tensor, samples: int | None = None, seed: int | Tensor | None = None) -> VAEOutput:
        """Encodes x, draws z and decodes it.

        Args:
            x: [B, ...].
            samples: K draws a row, which adds a leading dimension to decoder_out and z; None: one draw without it.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.

        Returns:
            A ``VAEOutput``.
        """
        mu, logvar = self.encode(x)
        z, kl = self.reparameterize(mu, logvar, samples, seed)
        return VAEOutput(self.decode(z), mu, logvar, z, kl)

    def loss(
        self,
        x: Tensor,
        beta: float = 1.0,
        samples: int | None = None,
        seed: int | Tensor | None = None,
        free_bits: float = 0.0,
    ) -> Tensor:
        """Mean over rows of the negative ELBO, E_q[-log p(x|z)] + beta KL(q(z|x) || p(z)), in nats a row.

        Args:
            x: [B, ...].
            beta: weight of the KL term (Higgins et al., "beta-VAE", ICLR 2017).
            samples: draws a row that the expectation is estimated with; None: one.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            free_bits: nats that each latent dimension may spend for nothing, see ``genfast.ops.elbo``.

        Returns:
            A scalar.
        """
        self._samples("loss", samples)
        if free_bits:
            mu, logvar = self.encode(x)
            z = ops.reparameterize(mu, logvar, samples=samples, seed=seed)
            return ops.elbo(
                self.decode(z), x, mu, logvar, likelihood=self.likelihood, beta=beta, free_bits=free_bits
            ).loss
        out = self(x, samples, seed)
        kl = out.kl if beta == 1.0 else beta * out.kl
        return (kl - self._log_px(out.decoder_out, x, averaged=True)).mean()

    def _log_px(self, decoder_out: Tensor, x: Tensor, averaged: bool = False) -> Tensor:
        """log p(x|z) of each row; ``averaged``: minus the mean of all rows is what will be differentiated."""
        factor = mean_factor(decoder_out, x, self.likelihood) if averaged else 1.0
        return rows_log_likelihood("log_likelihood", decoder_out, x, self.likelihood, None, None, None, factor)

    def _samples(self, what: str, samples: int | None) -> None:
        if samples is not None:
            check_count(f"{type(self).__name__}.{what}", "samples", samples, 1)

    # ---- use ----

    @torch.no_grad()
    def sample(self, count: int, seed: int | Tensor | None = None) -> Tensor:
        """Means of p(x|z) at ``count`` draws of z from the prior, [count, ...]; a constant for autograd."""
        like = next(self.decoder.parameters(), torch.empty(0))
        zeros = torch.zeros(count, self.latent, device=like.device, dtype=like.dtype)
        return self._mean(self.decode(ops.reparameterize(zeros, zeros, seed=seed)))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Means of p(x|z) at the posterior's mean, of x's shape; a constant for autograd."""
        return self._mean(self.decode(self.encode(x)[0]))

    @torch.no_grad()
    def interpolate(self, x: Tensor, other: Tensor, steps: int = 8) -> Tensor:
        """Means of p(x|z) on the straight line between the posterior means of two batches.

        Args:
            x: [B, ...], where the line starts.
            other: [B, ...], where it ends.
            steps: points, both ends included; at least 2.

        Returns:
            [steps, B, ...]; a constant for autograd.
        """
        check_count(f"{type(self).__name__}.interpolate", "steps", steps, 2)
        start, end = self.encode(x)[0], self.encode(other)[0]
        share = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device).view(-1, 1, 1)
        return self._mean(self.decode(torch.lerp(start, end, share)), 2)

    def _mean(self, decoder_out: Tensor, dim: int = 1) -> Tensor:
        return _likelihoods.mean(decoder_out, self.likelihood, dim)

    def log_likelihood(self, x: Tensor, samples: int = 5000, seed: int | Tensor | None = None) -> Tensor:
        """log p(x) of each row by importance sampling from the posterior, in nats.

        The log of the mean of p(x, z) / q(z|x) over draws of z: in expectation a bound on log p(x) from below, which
        rises with ``samples``. Memory does not grow with them.

        Args:
            x: [B, ...].
            samples: draws a row.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.

        Returns:
            [B] float64; a constant for autograd.

        Raises:
            ValueError: for samples below 1.

        Source: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.
        """
        return self._importance(x, samples, seed)

    @torch.no_grad()
    def _importance(self, x: Tensor, samples: int, seed: int | Tensor | None, *given: Tensor) -> Tensor:
        """What ``log_likelihood`` returns; ``given`` has a row for each of x that encoder and decoder see too."""
        check_count(f"{type(self).__name__}.log_likelihood", "samples", samples, 1)
        draw = torch.Generator().manual_seed(int(random.as_seed(seed, torch.device("cpu"))))
        rows = max(1, _ELEMENTS // (_DRAWS * max(1, x[0].numel()))) if len(x) else 1
        found = []
        for part in zip(*(tensor.split(rows) for tensor in (x, *given)), strict=True):
            seeds = torch.randint(2**62, (-(-samples // _DRAWS),), generator=draw).tolist()
            counts = [min(_DRAWS, samples - _DRAWS * i) for i in range(len(seeds))]
            weights = self._log_weights(counts, seeds, *part)
            found.append(ops.importance_log_likelihood(weights).log_likelihood)
        return torch.cat(found) if found else x.new_zeros(0, dtype=torch.float64)

    def _log_weights(self, counts: list[int], seeds: list[int], x: Tensor, *given: Tensor) -> Iterator[Tensor]:
        """log p(x, z) / q(z|x) in chunks of so many draws a row, each [draws, B]."""
        mu, logvar = self.encode(x, *given)
        for count, seed in zip(counts, seeds, strict=True):
            z, log_ratio = ops.reparameterize_log_ratio(mu, logvar, samples=count, seed=seed)
            yield self._log_px(self.decode(z, *given), x) + log_ratio

    def anomaly_score(self, x: Tensor, samples: int = 100, seed: int | Tensor | None = None) -> Tensor:
        """-log p(x) of each row as ``log_likelihood`` estimates it, [B] in nats: the greater, the less expected."""
        return -self.log_likelihood(x, samples, seed)
