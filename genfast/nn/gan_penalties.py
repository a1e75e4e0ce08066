"""Penalties of GANs on gradients; docs/gan_training.md has the mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genfast import random
from genfast._checks import check_count, check_float_tensor, check_same, shape_of, wide
from genfast.nn._directional import check_method, of_input_gradient
from genfast.ops import _noise

__all__ = [
    "LazyAdam",
    "LazyRegularization",
    "PathLengthPenalty",
    "gradient_penalty",
    "lazy_optimizer_parameters",
    "path_length_penalty",
    "r1_penalty",
    "r2_penalty",
]

Network = Callable[[Tensor], Tensor]


def check_examples(op: str, name: str, x: Any) -> None:
    check_float_tensor(op, name, x)
    if x.dim() < 2 or x.shape[0] == 0:
        raise ValueError(f"{op}: {name} must be [batch, ...] with at least one example, got shape {shape_of(x)}")


def check_number(op: str, name: str, value: Any, least: float = 0.0) -> float:
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} must be a float, got {type(value).__name__}")
    if not least <= float(value) < math.inf:
        raise ValueError(f"{op}: {name} must be finite and at least {least:g}, got {value}")
    return float(value)


def _summed(op: str, network: Network) -> Network:
    def total(x: Tensor) -> Tensor:
        out = network(x)
        if not isinstance(out, Tensor):
            raise TypeError(f"{op}: the network must return a tensor of logits, got {type(out).__name__}")
        return out.sum(dtype=wide(out.dtype))

    return total


def _squares(gradient: Tensor) -> Tensor:
    """Squared norms [batch], in float32 or float64."""
    return gradient.to(wide(gradient.dtype)).square().flatten(1).sum(1)


def _norms(gradient: Tensor) -> Tensor:
    """Norms [batch], with zero derivatives, of every order, at zero."""
    squares = _squares(gradient)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def _zero_centered(op: str, network: Network, x: Tensor, gamma: float, method: str) -> Tensor:
    gamma = check_number(op, "gamma", gamma)
    check_method(op, method)

    def outer(gradient: Tensor) -> Tensor:
        return _squares(gradient).mean() * (0.5 * gamma)

    return of_input_gradient(_summed(op, network), x.detach(), outer, method)[0]


def r1_penalty(discriminator: Network, real: Tensor, *, gamma: float = 1.0, method: str = "double_backward") -> Tensor:
    """gamma/2 E |grad_x D(x)|^2 at real examples; the factor 1/2 is in here.

    ``method="jvp"`` replaces the double backward by one forward-mode pass along the detached gradient and one ordinary
    backward; value and parameter gradients are the same. Both compile with ``torch.compile(fullgraph=True)``. Forward
    mode computes the network once more, and so is rarely faster in eager mode; it serves where an operation's double
    backward is missing, slow or large. What ``"jvp"`` cannot take:

    - networks that draw noise at each call (dropout): it calls the network twice, and the two must agree;
    - batch normalization in training mode: its running statistics cannot be updated under forward mode. State that does
      not depend on the input, such as the power iteration of a spectral norm, is updated twice;
    - operations without a forward-mode derivative (``flash`` attention of PyTorch; genfast's attention has one).

    In a compiled region no penalty takes batch normalization in training mode.

    Args:
        discriminator: maps [batch, ...] to logits of any shape; conditions go into a closure. Examples of a batch
            may interact; the gradient is that of the sum of all logits.
        real: [batch, ...]; detached: the penalty differentiates by the discriminator's parameters.
        gamma: the weight; at least 0.
        method: ``"double_backward"`` or ``"jvp"``.

    Returns:
        One number; float64 for float64 and float32 otherwise.

    Raises:
        TypeError: for something else than floating-point tensors and numbers.
        ValueError: for an unknown method, a negative gamma or no examples.
        RuntimeError: for ``"jvp"`` where the network's output lacks a forward-mode derivative.

    Source: Mescheder, Geiger and Nowozin, "Which training methods for GANs do actually converge?", ICML 2018, eq. 9.

    Examples:
        >>> weight = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> for method in ("double_backward", "jvp"):
        ...     penalty = r1_penalty(lambda x: x @ weight, torch.randn(5, 2), gamma=2.0, method=method)
        ...     print(penalty.item(), *torch.autograd.grad(penalty, weight))  # |w|^2 and 2 w
        25.0 tensor([6., 8.])
        25.0 tensor([6., 8.])
    """
    check_examples("r1_penalty", "real", real)
    return _zero_centered("r1_penalty", discriminator, real, gamma, method)


def r2_penalty(discriminator: Network, fake: Tensor, *, gamma: float = 1.0, method: str = "double_backward") -> Tensor:
    """gamma/2 E |grad_x D(x)|^2 at generated examples: ``r1_penalty`` at other points.

    Examples:
        >>> r2_penalty(lambda x: (x * x).sum(1), torch.ones(5, 3), gamma=1.0).item()  # gradients 2 x
        6.0
    """
    check_examples("r2_penalty", "fake", fake)
    return _zero_centered("r2_penalty", discriminator, fake, gamma, method)


def gradient_penalty(
    discriminator: Network,
    real: Tensor,
    fake: Tensor,
    *,
    weight: float = 10.0,
    target: float = 1.0,
    one_sided: bool = False,
    seed: int | Tensor | None = None,
    offset: int = 0,
    method: str = "double_backward",
) -> Tensor:
    """weight E (|grad_x D(x)| - target)^2 at points between real and generated examples (WGAN-GP).

    The points are real + u (fake - real), u uniform in [0, 1) by genfast's noise: that of an example depends on the
    seed and its index in the whole batch. ``one_sided`` penalizes norms above the target alone. ``r1_penalty`` says
    what ``method`` does.

    Args:
        discriminator: maps [batch, ...] to logits.
        real: [batch, ...]; detached.
        fake: of the same shape and dtype; detached.
        weight: at least 0.
        target: the norm aimed at; at least 0.
        one_sided: max(0, |grad| - target)^2 instead.
        seed: of the points; None draws one.
        offset: index of the first example in the whole batch, under data parallelism.
        method: ``"double_backward"`` or ``"jvp"``.

    Returns:
        One number; float64 for float64 and float32 otherwise.

    Raises:
        TypeError, ValueError, RuntimeError: as ``r1_penalty``, and for examples of different shapes or dtypes.

    Source: Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017, eq. 3; Petzka, Fischer and
    Lukovnicov, "On the regularization of Wasserstein GANs", ICLR 2018 (one-sided).

    Examples:
        >>> weight = torch.tensor([3.0, 4.0])
        >>> gradient_penalty(lambda x: x @ weight, torch.zeros(5, 2), torch.ones(5, 2), weight=1.0)  # (5 - 1)^2
        tensor(16.)
    """
    op = "gradient_penalty"
    check_examples(op, "real", real)
    check_examples(op, "fake", fake)
    check_same(op, "fake", fake, "real", real)
    weight, target = check_number(op, "weight", weight), check_number(op, "target", target)
    check_method(op, method)
    offset = check_count(op, "offset", offset, 0, 2**62)
    u = _noise.uniform(random.as_seed(seed, real.device), real.shape[0], offset, 0).to(real.device)
    u = u.view(-1, *(1,) * (real.dim() - 1)).to(wide(real.dtype))
    between = torch.lerp(real.detach().to(u.dtype), fake.detach().to(u.dtype), u).to(real.dtype)

    def outer(gradient: Tensor) -> Tensor:
        excess = _norms(gradient) - target
        return (torch.relu(excess) if one_sided else excess).square().mean() * weight

    return of_input_gradient(_summed(op, discriminator), between, outer, method)[0]


def path_length_penalty(
    generator: Network,
    latents: Tensor,
    mean_length: Tensor,
    *,
    weight: float = 2.0,
    decay: float = 0.01,
    seed: int | Tensor | None = None,
    offset: int = 0,
    method: str = "double_backward",
) -> tuple[Tensor, Tensor]:
    """(weight E (|J^T y| - a)^2, a): the penalty and the running mean a of the lengths |J^T y|, updated.

    J is the Jacobian of an image by its latent, and y an image of normal noise divided by the square root of the number
    of pixels. ``nn.PathLengthPenalty`` keeps the mean; ``r1_penalty`` says what ``method`` does.

    Args:
        generator: maps latents [batch, ...] to images [batch, channels, ...].
        latents: [batch, ...]; the penalty differentiates by them too, and so by a mapping network before them.
            The length is the norm over all their dimensions but the first.
        mean_length: 0-d tensor, the running mean so far.
        weight: at least 0.
        decay: share of the batch's mean length in the new running mean, in [0, 1].
        seed: of y; None draws one.
        offset: index of the first example in the whole batch, under data parallelism.
        method: ``"double_backward"`` or ``"jvp"``.

    Returns:
        The penalty, and the new running mean, detached.

    Raises:
        TypeError, ValueError, RuntimeError: as ``r1_penalty``.

    Source: Karras et al., "Analyzing and improving the image quality of StyleGAN", CVPR 2020, section 3.2, eq. 4.

    Examples:
        >>> weight = torch.tensor([[2.0]], requires_grad=True)
        >>> penalty, mean = path_length_penalty(
        ...     lambda z: (z @ weight)[..., None, None], torch.ones(1000, 1), torch.tensor(0.0), decay=1.0, seed=0
        ... )
        >>> round(mean.item(), 1)  # 2 E |y| = 2 sqrt(2 / pi)
        1.6
    """
    op = "path_length_penalty"
    check_examples(op, "latents", latents)
    check_float_tensor(op, "mean_length", mean_length)
    if mean_length.dim() != 0 or mean_length.device != latents.device:
        raise ValueError(
            f"{op}: mean_length must be 0-d on {latents.device}, got shape {shape_of(mean_length)} on "
            f"{mean_length.device}"
        )
    weight, decay = check_number(op, "weight", weight), check_number(op, "decay", decay)
    if decay > 1.0:
        raise ValueError(f"{op}: decay must be in [0, 1], got {decay}")
    check_method(op, method)
    offset = check_count(op, "offset", offset, 0, 2**40)
    drawn = random.as_seed(seed, latents.device)

    def projected(z: Tensor) -> Tensor:
        images = generator(z)
        if not isinstance(images, Tensor) or images.dim() < 3:
            what = shape_of(images) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"{op}: the generator must return images [batch, channels, ...], got {what}")
        kept = wide(images.dtype)
        each = math.prod(images.shape[1:])
        y = _noise.normal(drawn, images.shape[0] * each, offset * each, 0).to(images.device).view(images.shape)
        return (images.to(kept) * (y * math.prod(images.shape[2:]) ** -0.5).to(kept)).sum()

    def new_mean(gradient: Tensor) -> Tensor:
        return torch.lerp(mean_length.detach().to(wide(gradient.dtype)), _norms(gradient.detach()).mean(), decay)

    def outer(gradient: Tensor) -> Tensor:
        return (_norms(gradient) - new_mean(gradient)).square().mean() * weight

    penalty, gradient = of_input_gradient(projected, latents, outer, method)
    return penalty, new_mean(gradient).to(mean_length.dtype)


class PathLengthPenalty(nn.Module):
    """``path_length_penalty`` with the running mean of the lengths as state.

    The mean moves at each call in training mode and is part of the ``state_dict``.

    Args:
        weight: at least 0.
        decay: share of a batch in the running mean.
        method: ``"double_backward"`` or ``"jvp"``; see ``r1_penalty``.

    Shape:
        latents: [batch, ...]; the result is 0-d.

    Examples:
        >>> penalty = PathLengthPenalty()
        >>> generator = torch.nn.Sequential(torch.nn.Linear(4, 12), torch.nn.Unflatten(1, (3, 2, 2)))
        >>> penalty(generator, torch.randn(8, 4)).shape, penalty.mean_length > 0
        (torch.Size([]), tensor(True))
    """

    mean_length: Tensor

    def __init__(self, weight: float = 2.0, decay: float = 0.01, method: str = "double_backward") -> None:
        super().__init__()
        self.weight, self.decay = check_number("PathLengthPenalty", "weight", weight), decay
        check_method("PathLengthPenalty", method)
        self.method = method
        self.register_buffer("mean_length", torch.zeros(()))

    def forward(self, generator: Network, latents: Tensor, *, seed: int | Tensor | None = None) -> Tensor:
        penalty, mean = path_length_penalty(
            generator, latents, self.mean_length, weight=self.weight, decay=self.decay, seed=seed, method=self.method
        )
        if self.training:
            self.mean_length.copy_(mean)
        return penalty

    def extra_repr(self) -> str:
        return f"weight={self.weight}, decay={self.decay}, method={self.method!r}"


class LazyRegularization:
    """Computes a penalty at every ``interval``-th step alone, times ``interval``, so that its mean stays.

    ``lazy_optimizer_parameters`` corrects Adam for it where penalties take optimizer steps of their own.

    Args:
        interval: at least 1.

    Raises:
        TypeError, ValueError: for another interval.

    Source: Karras et al., "Analyzing and improving the image quality of StyleGAN", CVPR 2020, section 3.1.

    Examples:
        >>> lazy = LazyRegularization(16)
        >>> [step for step in range(40) if lazy.due(step)]
        [0, 16, 32]
        >>> lazy(16, lambda: torch.tensor(0.5)), lazy(17, lambda: torch.tensor(0.5))
        (tensor(8.), None)
    """

    def __init__(self, interval: int = 16) -> None:
        self.interval = check_count("LazyRegularization", "interval", interval, 1)

    def due(self, step: int) -> bool:
        """Whether step ``step``, counted from 0, computes the penalty."""
        return check_count("LazyRegularization", "step", step, 0) % self.interval == 0

    def __call__(self, step: int, penalty: Callable[[], Tensor]) -> Tensor | None:
        """``interval`` times the penalty where it is due, else None; ``penalty`` is called only then."""
        return penalty() * self.interval if self.due(step) else None

    def __repr__(self) -> str:
        return f"LazyRegularization({self.interval})"


class LazyAdam(NamedTuple):
    """What ``lazy_optimizer_parameters`` gives."""

    lr: float
    betas: tuple[float, float]


def lazy_optimizer_parameters(lr: float, betas: tuple[float, float], interval: int) -> LazyAdam:
    """Adam's learning rate and betas where a penalty adds one optimizer step to every ``interval`` steps.

    With c = interval / (interval + 1) they are lr c and betas to the power c: over interval + 1 steps the optimizer
    then moves and forgets as it would over ``interval``.

    Args:
        lr: learning rate without lazy regularization.
        betas: Adam's.
        interval: at least 1.

    Raises:
        TypeError, ValueError: for an interval that is no positive integer, or betas outside [0, 1).

    Source: Karras et al., "Analyzing and improving the image quality of StyleGAN", CVPR 2020, appendix B.

    Examples:
        >>> lr, betas = lazy_optimizer_parameters(0.0017, (0.0, 0.99), 16)
        >>> round(lr, 5), betas[0], round(betas[1], 5)
        (0.0016, 0.0, 0.99059)
    """
    op = "lazy_optimizer_parameters"
    interval = check_count(op, "interval", interval, 1)
    lr = check_number(op, "lr", lr)
    first, second = (check_number(op, "betas", beta) for beta in betas)
    if first >= 1.0 or second >= 1.0:
        raise ValueError(f"{op}: betas must be in [0, 1), got {betas}")
    share = interval / (interval + 1)
    return LazyAdam(lr * share, (first**share, second**share))
