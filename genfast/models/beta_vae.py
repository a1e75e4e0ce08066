"""The VAE whose KL term weighs more, or is steered to a capacity."""

from __future__ import annotations

from torch import Tensor, nn

from genfast.models.vae import VAE

__all__ = ["BetaVAE"]


class BetaVAE(VAE):
    """A VAE with ``beta`` on its KL term, or with a KL term that is held near a capacity.

    Args:
        encoder: as of ``VAE``.
        decoder: likewise.
        latent: likewise.
        likelihood: likewise.
        beta: weight of the KL term; with ``capacity`` of its distance to that.
        capacity: nats that the KL term is steered to; None for 0 without the absolute value. Set the attribute to raise
            it in training.

    Raises:
        ValueError: for a negative beta or capacity.

    Source: Higgins et al., "beta-VAE", ICLR 2017; Burgess et al., "Understanding disentangling in beta-VAE", 2018.

    Examples:
        >>> import torch
        >>> vae = BetaVAE.mlp(64, hidden=[32], latent=4, beta=4.0)
        >>> x = torch.bernoulli(torch.full((8, 64), 0.5))
        >>> torch.equal(vae.loss(x, seed=1), VAE.loss(vae, x, beta=4.0, seed=1))
        True
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent: int,
        *,
        likelihood: str = "bernoulli",
        beta: float = 4.0,
        capacity: float | None = None,
    ) -> None:
        super().__init__(encoder, decoder, latent, likelihood=likelihood)
        if beta < 0 or (capacity is not None and capacity < 0):
            raise ValueError(f"BetaVAE: beta and capacity must be at least 0, got {beta} and {capacity}")
        self.beta = beta
        self.capacity = capacity

    def loss(
        self,
        x: Tensor,
        beta: float | None = None,
        samples: int | None = None,
        seed: int | Tensor | None = None,
        free_bits: float = 0.0,
    ) -> Tensor:
        """As ``VAE.loss`` with the class's beta, or mean -log p(x|z) + beta |KL - capacity|.

        Args:
            x: [B, ...].
            beta: None for the class's.
            samples: draws a row.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            free_bits: not together with ``capacity``.

        Returns:
            A scalar.
        """
        beta = self.beta if beta is None else beta
        if self.capacity is None:
            return super().loss(x, beta, samples, seed, free_bits)
        if free_bits:
            raise ValueError("BetaVAE.loss: free_bits and a capacity exclude each other")
        self._samples("loss", samples)
        out = self(x, samples, seed)
        distance = (out.kl.mean() - self.capacity).abs()
        return beta * distance - self._log_px(out.decoder_out, x, averaged=True).mean()

    def extra_repr(self) -> str:
        return f"beta={self.beta}, capacity={self.capacity}"
