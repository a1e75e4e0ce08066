"""Consistency of GANs under augmentation and under small steps in z; docs/gan_training.md has the mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast import random
from genfast._checks import check_count, check_same, shape_of, wide
from genfast.nn.gan_penalties import Network, check_examples, check_number
from genfast.ops import _noise

__all__ = ["consistency_penalty", "latent_diversity_penalty", "perturb_latents"]


def consistency_penalty(
    discriminator: Network,
    x: Tensor,
    augmented: Tensor,
    *,
    weight: float = 10.0,
    logits: Tensor | None = None,
) -> Tensor:
    """weight E (D(x) - D(T(x)))^2: the discriminator should not see an augmentation T.

    At real examples this is CR-GAN; at real and at generated examples, two calls with weights of their own, bCR-GAN; of
    G(z) and G(T(z)) for ``perturb_latents`` T, with a weight of 5, the discriminator's half of zCR-GAN. The square is
    summed over an example's logits.

    No derivative by examples is in here. So there is one form of it, without the ``method`` of the gradient penalties:
    an ordinary backward, which compiles and works with every discriminator.

    Args:
        discriminator: maps [batch, ...] to logits [batch, ...]; a part of it up to a hidden layer works as well.
        x: [batch, ...].
        augmented: T(x), of the same shape and dtype, for instance ``ops.diff_augment(x)``.
        weight: at least 0.
        logits: D(x) where it is known, which saves a pass; not detached.

    Returns:
        One number; float64 for float64 and float32 otherwise.

    Raises:
        TypeError: for something else than floating-point tensors and numbers.
        ValueError: for examples of different shapes, logits that do not match, or a negative weight.

    Source: Zhang et al., "Consistency regularization for generative adversarial networks", ICLR 2020, eq. 2; Zhao et
    al., "Improved consistency regularization for GANs", AAAI 2021 (bCR, zCR).

    Examples:
        >>> consistency_penalty(lambda x: x.sum(1), torch.zeros(2, 3), torch.ones(2, 3), weight=1.0)
        tensor(9.)
    """
    op = "consistency_penalty"
    check_examples(op, "x", x)
    check_examples(op, "augmented", augmented)
    check_same(op, "augmented", augmented, "x", x)
    weight = check_number(op, "weight", weight)
    logits = discriminator(x) if logits is None else logits
    others = discriminator(augmented)
    if logits.shape != others.shape or logits.dim() == 0 or logits.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: logits of x and of the augmented must have one shape [{x.shape[0]}, ...], got "
            f"{shape_of(logits)} and {shape_of(others)}"
        )
    kept = wide(logits.dtype)
    return (logits.to(kept) - others.to(kept)).square().sum() * (weight / x.shape[0])


def perturb_latents(z: Tensor, deviation: float = 0.03, *, seed: int | Tensor | None = None, offset: int = 0) -> Tensor:
    """T(z) = z + deviation times normal noise, for latent consistency (zCR-GAN).

    The discriminator should not see the small step, the generator should show it: see the example. The noise of an
    example depends on the seed and its index in the whole batch, and is another than what the seed gives elsewhere.

    Args:
        z: latents [batch, ...].
        deviation: of the noise; at least 0.
        seed: an int, a 0-d int64 tensor, or None to draw one.
        offset: index of the first example in the whole batch, under data parallelism.

    Returns:
        Latents like z.

    Raises:
        TypeError: for something else than floating-point tensors and numbers.
        ValueError: for latents without a batch or a negative deviation.

    Source: Zhao et al., "Improved consistency regularization for GANs", AAAI 2021, section 3.2 (zCR).

    Examples:
        >>> generator, discriminator = torch.nn.Linear(4, 9), torch.nn.Linear(9, 1)
        >>> z = torch.randn(8, 4)
        >>> near = perturb_latents(z, seed=0)
        >>> of_discriminator = consistency_penalty(
        ...     discriminator, generator(z).detach(), generator(near).detach(), weight=5.0
        ... )
        >>> of_generator = latent_diversity_penalty(generator(z), generator(near))
        >>> bool(of_discriminator > 0), bool(of_generator < 0)
        (True, True)
    """
    op = "perturb_latents"
    check_examples(op, "z", z)
    deviation = check_number(op, "deviation", deviation)
    offset = check_count(op, "offset", offset, 0, 2**40)
    each = z[0].numel()
    noise = _noise.normal(random.as_seed(seed, z.device), z.shape[0] * each, offset * each, 1)
    return torch.add(z, noise.to(z.device, z.dtype).view(z.shape), alpha=deviation)


def latent_diversity_penalty(generated: Tensor, near: Tensor, *, weight: float = 0.5) -> Tensor:
    """-weight E (G(z) - G(T(z)))^2: the generator's half of zCR-GAN, which pushes what it makes of near z apart.

    The mean is over all values of the examples, so that the weight does not depend on their size. It has no lower
    bound: the generator's output should be bounded, as by tanh.

    Args:
        generated: G(z), [batch, ...].
        near: G(T(z)) of the same shape and dtype, T as ``perturb_latents``; where the generator draws noise of its own,
            with the same noise.
        weight: at least 0.

    Returns:
        One number, at most 0; float64 for float64 and float32 otherwise.

    Raises:
        TypeError: for something else than floating-point tensors and numbers.
        ValueError: for examples of different shapes or a negative weight.

    Source: Zhao et al., "Improved consistency regularization for GANs", AAAI 2021, section 3.2 (zCR).

    Examples:
        >>> latent_diversity_penalty(torch.zeros(2, 3), torch.full((2, 3), 2.0))
        tensor(-2.)
    """
    op = "latent_diversity_penalty"
    check_examples(op, "generated", generated)
    check_examples(op, "near", near)
    check_same(op, "near", near, "generated", generated)
    weight = check_number(op, "weight", weight)
    kept = wide(generated.dtype)
    return (generated.to(kept) - near.to(kept)).square().mean() * -weight
