"""Hugging Face diffusers' autoencoders by genfast's posterior: draws and KL divergences as one kernel each."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders import vae
from torch import Tensor, nn

from genfast import ops
from genfast.integrations import _posteriors

__all__ = ["DiagonalGaussianDistribution", "restore_posterior", "swap_posterior"]


class DiagonalGaussianDistribution(vae.DiagonalGaussianDistribution):  # type: ignore[misc]
    """diffusers' posterior with genfast's draws and KL divergence; ``mean``, ``mode`` and ``nll`` are its own.

    Args:
        parameters: mean and logvar along dim 1, [B, 2C, H, W].
        deterministic: whether draws are the mean.

    Examples:
        >>> parameters = torch.randn(2, 8, 4, 4)
        >>> posterior = DiagonalGaussianDistribution(parameters)
        >>> theirs = vae.DiagonalGaussianDistribution(parameters)
        >>> torch.allclose(posterior.kl(), theirs.kl(), rtol=1e-5)
        True
        >>> posterior.sample(torch.Generator().manual_seed(0)).shape
        torch.Size([2, 4, 4, 4])
    """

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw, [B, C, H, W]; ``generator`` or torch's default one gives the seed."""
        if self.deterministic:
            return self.mean + torch.zeros_like(self.mean)
        seed = None
        if generator is not None:
            seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
            seed = seed.to(self.mean.device)
        return ops.reparameterize(self.mean, self.logvar, seed=seed)

    def kl(self, other: Any = None) -> Tensor:
        """KL divergence to N(0, 1), or to another posterior, summed over all but the batch; [B], float32 or float64."""
        if self.deterministic:
            return torch.zeros(1)
        if other is None:
            return ops.gaussian_kl(self.mean, self.logvar)
        return ops.gaussian_kl(self.mean, self.logvar, prior_mu=other.mean, prior_logvar=other.logvar)


class _Encoding:
    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        found = super().encode(x, return_dict=return_dict)  # type: ignore[misc]
        theirs = found.latent_dist if return_dict else found[0]
        ours = DiagonalGaussianDistribution(theirs.parameters, theirs.deterministic)
        if not return_dict:
            return (ours,)
        found.latent_dist = ours
        return found


def swap_posterior(model: nn.Module) -> int:
    """Makes the posteriors of diffusers' ``AutoencoderKL`` genfast's, in place.

    Parameters, hooks and ``state_dict`` stay; ``restore_posterior`` undoes it. Draws differ in their noise,
    not in their distribution.

    Args:
        model: an ``AutoencoderKL``, or a module that holds some.

    Returns:
        How many autoencoders changed.

    Raises:
        ValueError: if there is none.

    Examples:
        >>> model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
        >>> swap_posterior(model)
        1
        >>> type(model.encode(torch.randn(1, 3, 8, 8)).latent_dist) is DiagonalGaussianDistribution
        True
    """
    count = _posteriors.swap(model, AutoencoderKL, _Encoding)
    if not count and not any(isinstance(m, _Encoding) for m in model.modules()):
        raise ValueError(f"swap_posterior: {type(model).__name__} holds no AutoencoderKL")
    return count


def restore_posterior(model: nn.Module) -> int:
    """Undoes ``swap_posterior``; returns how many autoencoders changed back."""
    return _posteriors.restore(model, _Encoding)
