"""Importance-weighted autoencoders."""

from __future__ import annotations

from torch import Tensor, nn

from genfast import ops
from genfast._checks import check_count
from genfast.models.vae import VAE
from genfast.ops.iwae_bound import GRADIENTS

__all__ = ["IWAE"]


class IWAE(VAE):
    """A VAE trained on the importance-weighted bound of K samples.

    Args:
        encoder: as of ``VAE``.
        decoder: likewise.
        latent: likewise.
        likelihood: likewise.
        samples: K.
        gradient: ``"iwae"``, ``"stl"``, ``"dreg"``, or ``"vae"`` for the ELBO; see ``genfast.ops.iwae_objective``.

    Raises:
        ValueError: for samples below 1 or an unknown gradient.

    Source: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.

    Examples:
        >>> import torch
        >>> model = IWAE.mlp(64, hidden=[32], latent=4, samples=5, gradient="dreg")
        >>> x = torch.bernoulli(torch.full((8, 64), 0.5))
        >>> model.loss(x).backward()
        >>> model.bound(x, samples=50).shape
        torch.Size([8])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent: int,
        *,
        likelihood: str = "bernoulli",
        samples: int = 50,
        gradient: str = "iwae",
    ) -> None:
        super().__init__(encoder, decoder, latent, likelihood=likelihood)
        self.samples = check_count("IWAE", "samples", samples, 1)
        if gradient not in GRADIENTS:
            raise ValueError(f"IWAE: gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
        self.gradient = gradient

    def bound(self, x: Tensor, samples: int | None = None, seed: int | Tensor | None = None) -> Tensor:
        """The bound on log p(x) of each row that training maximizes, with its gradient estimator.

        Args:
            x: [B, ...].
            samples: K; None for the class's.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.

        Returns:
            [B], in nats.
        """
        samples = self.samples if samples is None else check_count("IWAE.bound", "samples", samples, 1)
        mu, logvar = self.encode(x)

        def log_px(z: Tensor) -> Tensor:
            return self._log_px(self.decode(z), x)

        return ops.iwae_objective(mu, logvar, log_px, samples=samples, gradient=self.gradient, seed=seed)

    def loss(self, x: Tensor, samples: int | None = None, seed: int | Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Mean over rows of the negative bound, in nats a row; arguments as of ``bound``."""
        return -self.bound(x, samples, seed).mean()

    def extra_repr(self) -> str:
        return f"samples={self.samples}, gradient={self.gradient!r}"
