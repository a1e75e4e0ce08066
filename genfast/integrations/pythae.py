"""pythae's autoencoders by genfast's sampling: ``swap_sampling`` replaces their Gaussian draws."""

from __future__ import annotations

import torch
from pythae.models import VAE
from torch import Tensor, nn

from genfast import ops
from genfast.integrations import _posteriors

__all__ = ["restore_sampling", "swap_sampling"]


class _Sampling:
    """pythae's draw, in one kernel that keeps no noise for the backward pass."""

    def _sample_gauss(self, mu: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        z = ops.reparameterize(mu, 2.0 * torch.log(std))
        return z, (z - mu) / std


def swap_sampling(model: nn.Module) -> int:
    """Makes the Gaussian draws of pythae's models genfast's, in place.

    Means, deviations and gradients are as before; the noise is that of ``genfast.ops.reparameterize``, governed by
    ``torch.manual_seed``. Parameters, hooks and ``state_dict`` stay; ``restore_sampling`` undoes it.

    Args:
        model: a model of pythae with a Gaussian posterior, or a module that holds some.

    Returns:
        How many models changed.

    Raises:
        ValueError: if there is none.

    Examples:
        >>> from pythae.models import VAEConfig
        >>> model = VAE(VAEConfig(input_dim=(1, 8, 8), latent_dim=4))
        >>> swap_sampling(model)
        1
        >>> bool(torch.isfinite(model({"data": torch.rand(2, 1, 8, 8)}).loss))
        True
    """
    count = _posteriors.swap(model, VAE, _Sampling)
    if not count and not any(isinstance(m, _Sampling) for m in model.modules()):
        raise ValueError(f"swap_sampling: {type(model).__name__} holds no model of pythae with a Gaussian posterior")
    return count


def restore_sampling(model: nn.Module) -> int:
    """Undoes ``swap_sampling``; returns how many models changed back."""
    return _posteriors.restore(model, _Sampling)
