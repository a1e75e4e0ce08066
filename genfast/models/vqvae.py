"""Autoencoders whose latents are codes of a codebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genfast import ops, random
from genfast._checks import check_count
from genfast.models import _likelihoods
from genfast.models import _vae_networks as networks
from genfast.nn import VectorQuantizer

__all__ = ["VQVAE", "VQVAEOutput"]


class VQVAEOutput(NamedTuple):
    """What ``VQVAE.forward`` returns for B rows.

    decoder_out: parameters of p(x|codes), [B, ...]; indices: of the codes, [B, ...]; quantizer_loss: a scalar.
    """

    decoder_out: Tensor
    indices: Tensor
    quantizer_loss: Tensor


class VQVAE(nn.Module):
    """A vector-quantized autoencoder: each position of the encoder's output is replaced by its nearest code.

    ``fit_prior`` counts how often each position has each code; ``sample`` and ``log_likelihood`` need it. A model of
    the codes' joint distribution, trained on ``encode``, draws better samples: pass its indices to ``decode``.

    Args:
        encoder: maps x [B, ...] to what the quantizer takes, e.g. [B, D, H, W].
        decoder: maps quantized codes of that shape to the parameters of p(x|codes), as of ``VAE``.
        quantizer: a ``nn.VectorQuantizer``.
        likelihood: as of ``VAE``.

    Raises:
        ValueError: for an unknown likelihood.

    Source: van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning", NeurIPS 2017.

    Examples:
        >>> model = VQVAE.conv((1, 8, 8), channels=[8, 16], codes=32, dim=4)
        >>> x = torch.bernoulli(torch.full((5, 1, 8, 8), 0.5))
        >>> model.loss(x).backward()
        >>> model.encode(x).shape, model.reconstruct(x).shape
        (torch.Size([5, 2, 2]), torch.Size([5, 1, 8, 8]))
        >>> model.fit_prior(x)
        >>> model.sample(3).shape
        torch.Size([3, 1, 8, 8])
    """

    prior_counts: Tensor | None

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, quantizer: VectorQuantizer, *, likelihood: str = "bernoulli"
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.quantizer = quantizer
        self.likelihood = _likelihoods.check_likelihood("VQVAE", likelihood)
        self.register_buffer("prior_counts", None)

    @classmethod
    def conv(
        cls,
        shape: Sequence[int] = (1, 28, 28),
        channels: Sequence[int] = (32, 64),
        codes: int = 128,
        dim: int = 32,
        *,
        blocks: int = 2,
        likelihood: str = "bernoulli",
        **options: Any,
    ) -> VQVAE:
        """Convolutions of stride 2, residual blocks and a 1 x 1 convolution to the codes; the decoder mirrors them.

        Args:
            shape: of an image (channels, height, width); height and width divisible by 2^len(channels).
            channels: widths of the levels.
            codes: in the codebook.
            dim: of a code.
            blocks: residual blocks on each side.
            likelihood: see the class.
            options: for ``nn.VectorQuantizer``.

        Raises:
            ValueError: for a shape that cannot be halved that often.

        Examples:
            >>> VQVAE.conv((3, 32, 32)).encode(torch.zeros(2, 3, 32, 32)).shape
            torch.Size([2, 8, 8])
        """
        _likelihoods.check_likelihood("VQVAE.conv", likelihood)
        networks.image_levels("VQVAE.conv", shape, channels)
        outputs = shape[0] * _likelihoods.parameters(likelihood)
        return cls(
            nn.Sequential(*networks.residual_encoder(shape[0], channels, blocks), nn.Conv2d(channels[-1], dim, 1)),
            nn.Sequential(nn.Conv2d(dim, channels[-1], 1), *networks.residual_decoder(outputs, channels, blocks)),
            VectorQuantizer(codes, dim, channel_last=False, **options),
            likelihood=likelihood,
        )

    def encode(self, x: Tensor) -> Tensor:
        """Indices of the codes of x [B, ...]: [B, ...], int64; changes nothing."""
        indices: Tensor = self.quantizer.encode(self.encoder(x))
        return indices

    def decode(self, indices: Tensor) -> Tensor:
        """Parameters of p(x|codes) for the codes' indices [B, ...]."""
        out: Tensor = self.decoder(self.quantizer.lookup(indices))
        return out

    def forward(self, x: Tensor) -> VQVAEOutput:
        """Encodes x [B, ...], quantizes (and, in training mode, updates a codebook of running means) and decodes."""
        found = self.quantizer(self.encoder(x))
        return VQVAEOutput(self.decoder(found.z_q), found.indices, found.loss)

    def loss(self, x: Tensor) -> Tensor:
        """Mean over rows of -log p(x|codes) in nats, plus the quantizer's loss for each of a row's values of x.

        Args:
            x: [B, ...].

        Returns:
            A scalar.
        """
        out = self(x)
        return out.quantizer_loss * (x[0].numel() if len(x) else 1) - self._log_px(out.decoder_out, x).mean()

    def _log_px(self, decoder_out: Tensor, x: Tensor) -> Tensor:
        return ops.log_likelihood(decoder_out, x, likelihood=self.likelihood)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Means of p(x|codes) at the codes of x, of x's shape; a constant for autograd."""
        return self._mean(self.decode(self.encode(x)))

    @torch.no_grad()
    def interpolate(self, x: Tensor, other: Tensor, steps: int = 8) -> Tensor:
        """Means of p(x|codes) at the codes nearest to the line between two encoder outputs.

        Args:
            x: [B, ...], where the line starts.
            other: [B, ...], where it ends.
            steps: points, both ends included; at least 2.

        Returns:
            [steps, B, ...]; a constant for autograd.
        """
        check_count("VQVAE.interpolate", "steps", steps, 2)
        start, end = self.encoder(x), self.encoder(other)
        points = (torch.lerp(start, end, share) for share in torch.linspace(0, 1, steps).tolist())
        return torch.stack([self._mean(self.decode(self.quantizer.encode(z))) for z in points])

    def _mean(self, decoder_out: Tensor) -> Tensor:
        return _likelihoods.mean(decoder_out, self.likelihood, 1)

    # ---- the prior over codes, each position by itself ----

    @torch.no_grad()
    def fit_prior(self, x: Tensor, batch: int = 256) -> None:
        """Counts the codes of x [B, ...] at each position, one count more for each; replaces an earlier prior.

        Args:
            x: [B, ...].
            batch: rows encoded at a time.

        Raises:
            ValueError: for no rows.
        """
        if not len(x):
            raise ValueError("VQVAE.fit_prior: x has no rows")
        counts: Tensor | None = None
        for part in x.split(batch):
            one_hot = nn.functional.one_hot(self.encode(part), self.quantizer.num_codes).sum(0)
            counts = one_hot if counts is None else counts + one_hot
        assert counts is not None
        self.prior_counts = counts + 1

    def _prior(self, what: str) -> Tensor:
        if self.prior_counts is None:
            raise ValueError(f"VQVAE.{what} needs a prior over the codes: call fit_prior(x) first")
        counts = self.prior_counts.double()
        return torch.log(counts / counts.sum(-1, keepdim=True))

    @torch.no_grad()
    def sample(self, count: int, seed: int | Tensor | None = None) -> Tensor:
        """Means of p(x|codes) at ``count`` draws of codes from the fitted prior; a constant for autograd.

        Raises:
            ValueError: without ``fit_prior``.
        """
        prior = self._prior("sample")
        draw = random.as_seed(seed, prior.device)
        uniforms = random.uniform(count * prior[..., 0].numel(), draw).to(prior).view(count, *prior.shape[:-1], 1)
        indices = (uniforms > prior.exp().cumsum(-1)).sum(-1).clamp(max=prior.shape[-1] - 1)
        return self._mean(self.decode(indices))

    @torch.no_grad()
    def log_likelihood(self, x: Tensor) -> Tensor:
        """log of p(codes of x) p(x|codes of x) for each row, [B] float64, in nats: a bound on log p(x) from below.

        Raises:
            ValueError: without ``fit_prior``.
        """
        prior, indices = self._prior("log_likelihood"), self.encode(x)
        log_codes = prior.expand(len(x), *prior.shape).gather(-1, indices.unsqueeze(-1)).flatten(1).sum(1)
        return self._log_px(self.decode(indices), x).double() + log_codes

    def anomaly_score(self, x: Tensor) -> Tensor:
        """-``log_likelihood`` of each row, [B]: the greater, the less expected."""
        return -self.log_likelihood(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(prefix + "prior_counts")
        self.prior_counts = None if found is None else torch.zeros_like(found, device=self.quantizer.codebook.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
