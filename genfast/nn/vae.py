"""Layers of variational autoencoders."""

from __future__ import annotations

from torch import Tensor, nn

from genfast import ops
from genfast.nn._shard import shard_start

__all__ = ["Reparameterize"]


class Reparameterize(nn.Module):
    """The sampling layer of a VAE: z ~ N(mu, e^logvar), optionally with its KL divergence to N(0, 1), in one pass.

    It samples in eval mode too, because the bound that a VAE reports is an average over samples; ``deterministic_eval``
    returns the mean there instead.

    Inside an initialized ``torch.distributed`` process group, rank r draws the noise of elements r * mu.numel()
    onwards: ranks that share one seed (``torch.manual_seed`` alike on all of them) draw what one process would draw for
    the whole batch, and never the same noise twice. Where shards differ in size, or ranks must draw the same (tensor
    parallelism), pass ``offset``.

    Args:
        kl: return (z, kl) instead of z.
        event_dims: number of trailing dimensions that ``kl`` is summed over; None: all but the first.
        deterministic_eval: in eval mode, return mu for z.

    Source: Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014.

    Examples:
        >>> import torch
        >>> layer = Reparameterize(kl=True)
        >>> z, kl = layer(torch.ones(2, 3), torch.zeros(2, 3), samples=5)
        >>> z.shape, kl
        (torch.Size([5, 2, 3]), tensor([1.5000, 1.5000]))
    """

    def __init__(self, *, kl: bool = False, event_dims: int | None = None, deterministic_eval: bool = False) -> None:
        super().__init__()
        self.kl = kl
        self.event_dims = event_dims
        self.deterministic_eval = deterministic_eval

    def forward(
        self,
        mu: Tensor,
        logvar: Tensor,
        samples: int | None = None,
        seed: int | Tensor | None = None,
        offset: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draws z.

        Args:
            mu: mean, any shape; float32, float64, bfloat16 or float16.
            logvar: log of the variance, like ``mu``.
            samples: K adds a leading dimension of K independent draws to z.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            offset: index of mu's first element in the whole batch; None: see the class.

        Returns:
            z, or (z, kl) with ``kl=True``; kl in nats.

        Raises:
            TypeError: for something else than floating-point tensors of one dtype, or a seed that is no integer.
            ValueError: for unequal shapes or devices, negative samples or offset.
        """
        if self.deterministic_eval and not self.training:
            if samples is not None and samples < 0:
                raise ValueError(f"Reparameterize: samples must be at least 0, got {samples}")
            kl = ops.gaussian_kl(mu, logvar, self.event_dims)  # checks mu and logvar also where kl is not asked for
            z = mu if samples is None else mu.expand(samples, *mu.shape)
            return (z, kl) if self.kl else z
        if offset is None:
            offset = shard_start(mu.numel())
        if self.kl:
            return ops.reparameterize_kl(
                mu, logvar, samples=samples, seed=seed, offset=offset, event_dims=self.event_dims
            )
        return ops.reparameterize(mu, logvar, samples=samples, seed=seed, offset=offset)

    def extra_repr(self) -> str:
        return f"kl={self.kl}, event_dims={self.event_dims}, deterministic_eval={self.deterministic_eval}"
