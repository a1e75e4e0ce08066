"""The evidence lower bound of a VAE: reconstruction less KL divergence; docs/kernels/log_likelihood.md."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from genfast._checks import check_float_tensor, shape_of
from genfast.ops.log_likelihood import mean_factor, rows_log_likelihood
from genfast.ops.reparameterize import gaussian_kl

__all__ = ["ELBOTerms", "elbo"]

Tensor = torch.Tensor

REDUCTIONS = ("mean", "sum", "none")
KL_KINDS = ("analytic", "monte_carlo")


class ELBOTerms(NamedTuple):
    """What ``elbo`` returns, in nats, all reduced alike.

    Attributes:
        loss: what to minimise: beta times the KL (under free bits) minus the reconstruction.
        elbo: the bound on log p(x) itself, to be as large as possible: reconstruction - kl, without beta or free bits.
        reconstruction: log p(x|z), the mean over samples.
        kl: KL(q(z|x) || p(z)), without beta or free bits.
    """

    loss: Tensor
    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor


def check_weight(op: str, name: str, value: Any) -> float:
    """A finite number that is not negative."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} must be a float, got {type(value).__name__}")
    value = float(value)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{op}: {name} must be finite and at least 0, got {value}")
    return value


def check_choice(op: str, name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _squared(difference: Tensor, logvar: Tensor) -> Tensor:
    """(difference / sigma)^2; no product of infinity and zero."""
    root = torch.exp((-0.25 * logvar).clamp(max=709.0 if logvar.dtype == torch.float64 else 88.0))
    return (difference * root * root).square()


def _monte_carlo(z: Tensor, mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None) -> Tensor:
    """log q(z|x) - log p(z) of every latent, [B, ...], the mean over samples."""
    dtype = torch.float64 if mu.dtype == torch.float64 else torch.float32
    wide = [None if t is None else t.to(dtype) for t in (z, mu, logvar, prior_mu, prior_logvar)]
    z, mu, logvar = (t for t in wide[:3] if t is not None)
    from_prior = z if wide[3] is None else z - wide[3]
    energy = from_prior.square() if wide[4] is None else _squared(from_prior, wide[4]) + wide[4]
    terms = 0.5 * (energy - _squared(z - mu, logvar) - logvar)
    return terms if z.dim() == mu.dim() else terms.mean(0)


def _check_latents(mu: Tensor, logvar: Tensor, z: Any, kl: str, rows: int) -> None:
    check_float_tensor("elbo", "mu", mu)
    if mu.dim() == 0 or mu.shape[0] != rows:
        raise ValueError(f"elbo: mu must be [B, ...] with the B = {rows} of x, got shape {shape_of(mu)}")
    if kl == "analytic":
        if z is not None:
            raise ValueError('elbo: z is used with kl="monte_carlo" alone')
        return
    check_float_tensor("elbo", "logvar", logvar)
    if z is None:
        raise ValueError('elbo: kl="monte_carlo" needs the sample z')
    check_float_tensor("elbo", "z", z)
    if logvar.shape != mu.shape or z.shape not in (mu.shape, (*z.shape[:1], *mu.shape)):
        raise ValueError(
            f"elbo: logvar must have the shape of mu, and z too or [K, *mu.shape]; got mu {shape_of(mu)}, logvar "
            f"{shape_of(logvar)}, z {shape_of(z)}"
        )


def elbo(
    decoder_out: Tensor,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    likelihood: str = "bernoulli",
    beta: float = 1.0,
    free_bits: float = 0.0,
    reduction: str = "mean",
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    kl: str = "analytic",
    z: Tensor | None = None,
    scale: float | None = None,
    x_logvar: Tensor | None = None,
    log_theta: Tensor | None = None,
) -> ELBOTerms:
    """The evidence lower bound log p(x) >= E[log p(x|z)] - KL(q(z|x) || p(z)) and the loss to train by.

    **Signs:** ``elbo`` is the bound, to be maximised; ``loss`` is to be minimised. With ``beta=1`` and no free bits
    ``loss = -elbo``. The gradient of the loss by decoder_out is written in the forward pass; ``loss.backward()`` after
    ``reduction="mean"`` or ``"sum"`` passes it on as it is.

    Free bits are per latent dimension (Kingma et al. 2016): the KL of dimension j, averaged over this call's batch,
    counts as ``free_bits`` where it is less, and has no gradient there. Under data parallelism each rank averages over
    its own shard.

    Args:
        decoder_out: the likelihood's parameters [B, ...], or [K, B, ...] for K samples of z; see ``log_likelihood``.
        x: targets [B, ...].
        mu: mean of q(z|x), [B, ...].
        logvar: log variance of q(z|x), like ``mu``.
        likelihood: one of ``log_likelihood``'s.
        beta: weight of the KL in the loss (Higgins et al. 2017), finite, at least 0.
        free_bits: nats per latent dimension, at least 0.
        reduction: "mean" or "sum" over the batch, or "none" for [B].
        prior_mu: mean of the prior, broadcasting to ``mu``; None: 0.
        prior_logvar: log variance of the prior, broadcasting to ``mu``; None: 0.
        kl: "analytic", or "monte_carlo" for log q(z|x) - log p(z) at ``z``.
        z: the sample, like ``mu`` or [K, *mu.shape]; with ``kl="monte_carlo"`` alone.
        scale: the fixed standard deviation of a gaussian likelihood.
        x_logvar: the shared log variance of a gaussian likelihood, broadcasting to x (``log_likelihood``'s logvar).
        log_theta: the shared log inverse dispersion of a negative binomial, broadcasting to x.

    Returns:
        ``ELBOTerms`` (loss, elbo, reconstruction, kl) in nats, float64 for float64 inputs and float32 otherwise.
        Differentiable to every order, in reverse and forward mode.

    Raises:
        TypeError: for something else than tensors of the supported dtypes, or weights that are no numbers.
        ValueError: for shapes that do not fit, an unknown likelihood, reduction or kl, negative weights, a z without
            ``kl="monte_carlo"`` or the reverse, and what ``log_likelihood`` raises for.

    Source: Kingma and Welling, ICLR 2014; Kingma et al., "Improved variational inference with inverse autoregressive
    flow", NeurIPS 2016, appendix C.8.

    Examples:
        >>> logits, x = torch.zeros(2, 3), torch.ones(2, 3)
        >>> terms = elbo(logits, x, mu=torch.ones(2, 4), logvar=torch.zeros(2, 4))
        >>> terms.reconstruction, terms.kl, terms.loss
        (tensor(-2.0794), tensor(2.), tensor(4.0794))
    """
    beta = check_weight("elbo", "beta", beta)
    free_bits = check_weight("elbo", "free_bits", free_bits)
    check_choice("elbo", "reduction", reduction, REDUCTIONS)
    check_choice("elbo", "kl", kl, KL_KINDS)
    check_float_tensor("elbo", "decoder_out", decoder_out)
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise TypeError(f"elbo: x must be a torch.Tensor [B, ...], got {type(x).__name__}")
    _check_latents(mu, logvar, z, kl, x.shape[0])

    factor = mean_factor(decoder_out, x, likelihood)
    if reduction != "mean":  # of a sum over rows, still the mean over samples
        factor *= max(x.shape[0], 1) if factor < 0.0 else 1.0
    found = rows_log_likelihood("elbo", decoder_out, x, likelihood, scale, x_logvar, log_theta, factor)

    latent_dims = mu.dim() - 1
    if kl == "monte_carlo":
        by_latent = _monte_carlo(z, mu, logvar, prior_mu, prior_logvar)  # type: ignore[arg-type]
    elif free_bits > 0.0:
        by_latent = gaussian_kl(mu, logvar, 0, prior_mu=prior_mu, prior_logvar=prior_logvar)
    else:
        by_latent = gaussian_kl(mu, logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)
        latent_dims = 0
    divergence = by_latent.flatten(1).sum(1) if latent_dims else by_latent
    counted = divergence
    if free_bits > 0.0:
        # Row by row, so that the batch's mean is sum_j max(free_bits, mean_b KL_bj) whatever the reduction.
        above = by_latent.detach().mean(0) > free_bits
        kept = torch.where(above, by_latent, free_bits)
        counted = kept.flatten(1).sum(1) if latent_dims else kept

    reconstruction = found if reduction == "mean" or found.dim() == 1 else found.mean(0)
    if reduction != "none":
        reduce = torch.mean if reduction == "mean" else torch.sum
        same = counted is divergence
        reconstruction, divergence = reduce(reconstruction), reduce(divergence)
        counted = divergence if same else reduce(counted)
    bound = reconstruction - divergence
    plain = counted is divergence and beta == 1.0
    return ELBOTerms(-bound if plain else beta * counted - reconstruction, bound, reconstruction, divergence)
