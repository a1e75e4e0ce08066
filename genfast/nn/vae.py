"""Layers of variational autoencoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genfast import ops
from genfast.nn._shard import shard_start
from genfast.ops.elbo import KL_KINDS, REDUCTIONS, check_choice, check_weight
from genfast.ops.log_likelihood import LIKELIHOODS, scale_logvar

__all__ = ["ELBO", "GaussianKL", "Reparameterize"]


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


class GaussianKL(nn.Module):
    """KL(N(mu, e^logvar) || prior) in nats, summed over the event dims; never negative, exact near 0.

    Args:
        event_dims: number of trailing dimensions to sum over; None: all but the first.
        reduction: "none" for one value a row, "mean" or "sum" over all rows.

    Raises:
        ValueError: for an unknown reduction.

    Source: Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014, appendix B.

    Examples:
        >>> import torch
        >>> GaussianKL()(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([1.5000, 1.5000])
    """

    def __init__(self, *, event_dims: int | None = None, reduction: str = "none") -> None:
        super().__init__()
        self.event_dims = event_dims
        self.reduction = check_choice("GaussianKL", "reduction", reduction, REDUCTIONS)

    def forward(
        self, mu: Tensor, logvar: Tensor, prior_mu: Tensor | None = None, prior_logvar: Tensor | None = None
    ) -> Tensor:
        """The divergence.

        Args:
            mu: mean, any shape; float32, float64, bfloat16 or float16.
            logvar: log of the variance, like ``mu``.
            prior_mu: mean of the prior, broadcasting to ``mu``; None: 0.
            prior_logvar: log of the prior's variance, broadcasting to ``mu``; None: 0.

        Returns:
            kl of the shape of mu's leading dimensions, or one value.

        Raises:
            TypeError: for something else than floating-point tensors of one dtype.
            ValueError: for unequal shapes or devices, a prior that does not broadcast.
        """
        kl = ops.gaussian_kl(mu, logvar, self.event_dims, prior_mu=prior_mu, prior_logvar=prior_logvar)
        return kl if self.reduction == "none" else kl.mean() if self.reduction == "mean" else kl.sum()

    def extra_repr(self) -> str:
        return f"event_dims={self.event_dims}, reduction={self.reduction!r}"


class ELBO(nn.Module):
    """The evidence lower bound of a VAE as a training loss; ``genfast.ops.elbo`` has the definitions.

    Args:
        likelihood: one of ``genfast.ops.log_likelihood``'s.
        beta: weight of the KL in the loss; an attribute that schedules may change.
        free_bits: nats per latent dimension; likewise.
        reduction: "mean" or "sum" over the batch, or "none" for one value a row.
        kl: "analytic" or "monte_carlo".
        scale: the fixed standard deviation of a gaussian likelihood.
        learned_logvar: own one scalar log variance, shared by all of x, and learn it (Rybkin et al. 2021); gaussian
            alone. It starts at 2 log scale.

    Raises:
        TypeError: for weights that are no numbers.
        ValueError: for an unknown likelihood, reduction or kl, or negative weights.

    Source: Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014; Rybkin et al., "Simple and effective VAE
    training with calibrated decoders", ICML 2021.

    Examples:
        >>> import torch
        >>> terms = ELBO(beta=4.0)(torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 4), torch.zeros(2, 4))
        >>> terms.loss, terms.elbo
        (tensor(10.0794), tensor(-4.0794))
    """

    def __init__(
        self,
        likelihood: str = "bernoulli",
        *,
        beta: float = 1.0,
        free_bits: float = 0.0,
        reduction: str = "mean",
        kl: str = "analytic",
        scale: float | None = None,
        learned_logvar: bool = False,
    ) -> None:
        super().__init__()
        self.likelihood = check_choice("ELBO", "likelihood", likelihood, LIKELIHOODS)
        self.beta = check_weight("ELBO", "beta", beta)
        self.free_bits = check_weight("ELBO", "free_bits", free_bits)
        self.reduction = check_choice("ELBO", "reduction", reduction, REDUCTIONS)
        self.kl = check_choice("ELBO", "kl", kl, KL_KINDS)
        if likelihood != "gaussian" and (scale is not None or learned_logvar):
            raise ValueError(f"ELBO: scale and learned_logvar are of the gaussian likelihood, not of {likelihood}")
        start = scale_logvar("ELBO", 1.0 if scale is None else scale)
        self.scale = None if learned_logvar else scale
        self.x_logvar = nn.Parameter(torch.tensor(start)) if learned_logvar else None

    def forward(
        self,
        decoder_out: Tensor,
        x: Tensor,
        mu: Tensor,
        logvar: Tensor,
        *,
        z: Tensor | None = None,
        prior_mu: Tensor | None = None,
        prior_logvar: Tensor | None = None,
        log_theta: Tensor | None = None,
    ) -> ops.ELBOTerms:
        """The bound and its terms.

        Args:
            decoder_out: the likelihood's parameters [B, ...], or [K, B, ...] for K samples of z.
            x: targets [B, ...].
            mu: mean of q(z|x), [B, ...].
            logvar: log variance of q(z|x), like ``mu``.
            z: the sample, with ``kl="monte_carlo"`` alone.
            prior_mu: mean of the prior, broadcasting to ``mu``; None: 0.
            prior_logvar: log variance of the prior, broadcasting to ``mu``; None: 0.
            log_theta: the shared log inverse dispersion of a negative binomial, broadcasting to x.

        Returns:
            ``ops.ELBOTerms`` (loss, elbo, reconstruction, kl).

        Raises:
            TypeError: as ``genfast.ops.elbo``.
            ValueError: as ``genfast.ops.elbo``.
        """
        return ops.elbo(
            decoder_out, x, mu, logvar, likelihood=self.likelihood, beta=self.beta, free_bits=self.free_bits,
            reduction=self.reduction, prior_mu=prior_mu, prior_logvar=prior_logvar, kl=self.kl, z=z, scale=self.scale,
            x_logvar=self.x_logvar, log_theta=log_theta,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{self.likelihood!r}, beta={self.beta}, free_bits={self.free_bits}, reduction={self.reduction!r}, "
            f"kl={self.kl!r}" + ("" if self.scale is None else f", scale={self.scale}")
        )
