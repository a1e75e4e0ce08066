"""Losses of discriminators and generators from logits; docs/gan_training.md has the mathematics."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from genfast._checks import check_float_tensor, shape_of, wide
from genfast.ops._gan_loss_reference import AVERAGE, KINDS, PAIRED, form_of, reference
from genfast.ops.gan_loss import check_logits, gan_loss, promoted

__all__ = ["GANLoss", "gan_discriminator_loss", "gan_generator_loss"]


def _weights(op: str, name: str, weights: Any, logits: Tensor) -> Tensor:
    """Weights of the logits' shape whose sum is 1."""
    check_float_tensor(op, name, weights)
    if weights.device != logits.device:
        raise ValueError(f"{op}: {name} is on {weights.device}, its logits on {logits.device}; move it there")
    if weights.dim() > logits.dim() or any(
        a not in (1, b) for a, b in zip(reversed(weights.shape), reversed(logits.shape), strict=False)
    ):
        raise ValueError(f"{op}: {name} must broadcast to the logits {shape_of(logits)}, got shape {shape_of(weights)}")
    weights = weights.to(wide(logits.dtype)).expand(logits.shape)
    return weights / weights.sum()


def _weighted(
    op: str, kind: str, side: str, real: Tensor | None, fake: Tensor, real_weights: Any, fake_weights: Any
) -> Tensor:
    """The loss with weighted means, in PyTorch's operations."""
    if isinstance(real, Tensor) and isinstance(fake, Tensor) and real.dtype != fake.dtype:
        real, fake = promoted(real, fake)
    check_logits(op, real, fake, kind, side)
    form = form_of(kind, side)
    if form.pairing == PAIRED and fake_weights is not None:
        raise ValueError(f"{op}: the {kind} loss has one weight a pair; give real_weights alone")
    if real_weights is not None and (real is None or not form.real[0]):
        raise ValueError(f"{op}: the {kind} loss of the {side} has no real logits to weight")
    if real_weights is not None and real is not None:
        real_weights = _weights(op, "real_weights", real_weights, real)
    if fake_weights is not None:
        fake_weights = _weights(op, "fake_weights", fake_weights, fake)
    return reference(real, fake, kind, side, real_weights, fake_weights)


def gan_discriminator_loss(
    kind: str,
    real_logits: Tensor,
    fake_logits: Tensor,
    *,
    real_weights: Tensor | None = None,
    fake_weights: Tensor | None = None,
) -> Tensor:
    """The discriminator's loss; ``genfast.ops.gan_loss`` has the formulas of all kinds.

    Args:
        kind: ``"minimax"``, ``"nonsaturating"``, ``"hinge"``, ``"least_squares"``, ``"wasserstein"``,
            ``"relativistic"`` or ``"relativistic_average"``.
        real_logits: D(x), any shape.
        fake_logits: D(G(z)), of the same dtype; ``relativistic`` pairs the two, index by index.
        real_weights: weights that broadcast to real_logits: each mean over them becomes sum(w l) / sum(w), as for
            masked patches or importance weights. ``relativistic`` takes these for its pairs. Weighted losses are made
            of PyTorch's operations, and differentiate by the weights too.
        fake_weights: the same for fake_logits.

    Returns:
        One number, float64 for float64 and float32 otherwise.

    Raises:
        TypeError, ValueError: as ``genfast.ops.gan_loss``, and for weights that do not broadcast to their logits.

    Examples:
        >>> import torch
        >>> real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-2.0, -0.5])
        >>> gan_discriminator_loss("hinge", real, fake)
        tensor(0.5000)
        >>> gan_discriminator_loss("hinge", real, fake, real_weights=torch.tensor([0.0, 1.0]))
        tensor(0.2500)
    """
    if real_weights is None and fake_weights is None:
        return gan_loss(real_logits, fake_logits, kind, "discriminator")
    return _weighted(
        "gan_discriminator_loss", kind, "discriminator", real_logits, fake_logits, real_weights, fake_weights
    )


def gan_generator_loss(
    kind: str,
    fake_logits: Tensor,
    real_logits: Tensor | None = None,
    *,
    fake_weights: Tensor | None = None,
    real_weights: Tensor | None = None,
) -> Tensor:
    """The generator's loss; ``genfast.ops.gan_loss`` has the formulas of all kinds.

    Args:
        kind: as for ``gan_discriminator_loss``.
        fake_logits: D(G(z)).
        real_logits: D(x), which the two relativistic kinds need and the others ignore. Detached or not: a generator's
            step has no use for its gradient, unless the batch of x depends on the generator.
        fake_weights: as for ``gan_discriminator_loss``.
        real_weights: the same, for the relativistic kinds.

    Returns:
        One number, float64 for float64 and float32 otherwise.

    Raises:
        TypeError, ValueError: as ``gan_discriminator_loss``.

    Examples:
        >>> import torch
        >>> gan_generator_loss("nonsaturating", torch.tensor([0.0, 0.0]))  # log 2
        tensor(0.6931)
    """
    if real_weights is None and fake_weights is None:
        return gan_loss(real_logits, fake_logits, kind, "generator")
    return _weighted("gan_generator_loss", kind, "generator", real_logits, fake_logits, real_weights, fake_weights)


class GANLoss(nn.Module):
    """Both losses of one kind of GAN.

    Args:
        kind: ``"minimax"``, ``"nonsaturating"``, ``"hinge"``, ``"least_squares"``, ``"wasserstein"``,
            ``"relativistic"`` or ``"relativistic_average"``; formulas at ``genfast.ops.gan_loss``.

    Raises:
        ValueError: for another kind.

    Examples:
        >>> import torch
        >>> loss = GANLoss("relativistic")
        >>> real, fake = torch.randn(8, 1), torch.randn(8, 1, requires_grad=True)
        >>> loss.discriminator(real, fake).shape, loss.generator(fake, real).shape
        (torch.Size([]), torch.Size([]))
        >>> loss.needs_real  # its generator's loss compares with real logits
        True
    """

    def __init__(self, kind: str = "nonsaturating") -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"GANLoss: unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
        self.kind = kind

    @property
    def needs_real(self) -> bool:
        """Whether the generator's loss needs the logits of real examples."""
        return form_of(self.kind, "generator").pairing in (PAIRED, AVERAGE)

    def discriminator(
        self,
        real_logits: Tensor,
        fake_logits: Tensor,
        real_weights: Tensor | None = None,
        fake_weights: Tensor | None = None,
    ) -> Tensor:
        """The discriminator's loss; see ``gan_discriminator_loss``."""
        return gan_discriminator_loss(
            self.kind, real_logits, fake_logits, real_weights=real_weights, fake_weights=fake_weights
        )

    def generator(
        self,
        fake_logits: Tensor,
        real_logits: Tensor | None = None,
        fake_weights: Tensor | None = None,
        real_weights: Tensor | None = None,
    ) -> Tensor:
        """The generator's loss; see ``gan_generator_loss``."""
        return gan_generator_loss(
            self.kind, fake_logits, real_logits, fake_weights=fake_weights, real_weights=real_weights
        )

    def forward(self, real_logits: Tensor | None, fake_logits: Tensor, side: str = "discriminator") -> Tensor:
        """The loss of ``side``."""
        return gan_loss(real_logits, fake_logits, self.kind, side)

    def extra_repr(self) -> str:
        return repr(self.kind)
