"""The losses of a GAN in plain PyTorch; docs/gan_training.md has the mathematics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from genfast._checks import wide

__all__ = ["KINDS", "SIDES", "Form", "form_of", "reference", "reference_gradients"]

Tensor = torch.Tensor

SIDES = ("discriminator", "generator")
SOFTPLUS, HINGE, SQUARE, LINEAR = range(4)
APART, PAIRED, AVERAGE = range(3)


class Form(NamedTuple):
    """scale * (mean F(sign (x - other) + shift) of the real logits + the same of the fake ones); scale is 1 or -1.

    ``other`` is nothing (APART), the other side's logit (PAIRED, one term) or its mean (AVERAGE). A sign of 0: the
    side is not used.
    """

    function: int
    pairing: int
    real: tuple[float, float]
    fake: tuple[float, float]
    scale: float = 1.0


_NONE = (0.0, 0.0)
_FORMS = {
    ("minimax", "discriminator"): Form(SOFTPLUS, APART, (-1.0, 0.0), (1.0, 0.0)),
    ("minimax", "generator"): Form(SOFTPLUS, APART, _NONE, (1.0, 0.0), -1.0),
    ("nonsaturating", "discriminator"): Form(SOFTPLUS, APART, (-1.0, 0.0), (1.0, 0.0)),
    ("nonsaturating", "generator"): Form(SOFTPLUS, APART, _NONE, (-1.0, 0.0)),
    ("hinge", "discriminator"): Form(HINGE, APART, (-1.0, 1.0), (1.0, 1.0)),
    ("hinge", "generator"): Form(LINEAR, APART, _NONE, (-1.0, 0.0)),
    ("least_squares", "discriminator"): Form(SQUARE, APART, (1.0, -1.0), (1.0, 0.0)),
    ("least_squares", "generator"): Form(SQUARE, APART, _NONE, (1.0, -1.0)),
    ("wasserstein", "discriminator"): Form(LINEAR, APART, (-1.0, 0.0), (1.0, 0.0)),
    ("wasserstein", "generator"): Form(LINEAR, APART, _NONE, (-1.0, 0.0)),
    ("relativistic", "discriminator"): Form(SOFTPLUS, PAIRED, (-1.0, 0.0), (1.0, 0.0)),
    ("relativistic", "generator"): Form(SOFTPLUS, PAIRED, (1.0, 0.0), (-1.0, 0.0)),
    ("relativistic_average", "discriminator"): Form(SOFTPLUS, AVERAGE, (-1.0, 0.0), (1.0, 0.0)),
    ("relativistic_average", "generator"): Form(SOFTPLUS, AVERAGE, (1.0, 0.0), (-1.0, 0.0)),
}
KINDS = tuple(dict.fromkeys(kind for kind, _ in _FORMS))


def form_of(kind: str, side: str) -> Form:
    return _FORMS[kind, side]


def _value(function: int, y: Tensor) -> Tensor:
    if function == SOFTPLUS:
        return -logsigmoid(-y)
    if function == HINGE:
        return torch.relu(y)
    return 0.5 * y * y if function == SQUARE else y


def _slope(function: int, y: Tensor) -> Tensor:
    if function == SOFTPLUS:
        return torch.sigmoid(y)
    if function == HINGE:
        return torch.where(y > 0, 1.0, torch.where(y.isnan(), y, 0.0))
    return y if function == SQUARE else torch.ones_like(y)


def _mean(x: Tensor, weights: Tensor | None) -> Tensor:
    """The mean, or that with weights whose sum is 1."""
    return x.mean() if weights is None else (x * weights).sum()


class _Sides(NamedTuple):
    real: Tensor | None
    fake: Tensor | None


def _signed(x: Tensor, sign: float, shift: float = 0.0) -> Tensor:
    """sign x + shift without a product: forward mode in a compiled region makes one of a 0-d tensor float64."""
    x = x if sign > 0 else -x
    return x + shift if shift else x


def _arguments(
    real: Tensor | None, fake: Tensor | None, form: Form, real_weights: Tensor | None, fake_weights: Tensor | None
) -> _Sides:
    """y of the real and of the fake logits, in the dtype of the arithmetic."""
    real, fake = (None if x is None else x.to(wide(x.dtype)) for x in (real, fake))
    if form.pairing == PAIRED:
        assert real is not None
        assert fake is not None
        return _Sides(_signed(real - fake, *form.real), None)
    if form.pairing == AVERAGE:
        assert real is not None
        assert fake is not None
        real, fake = real - _mean(fake, fake_weights), fake - _mean(real, real_weights)
    return _Sides(
        None if real is None or not form.real[0] else _signed(real, *form.real),
        None if fake is None or not form.fake[0] else _signed(fake, *form.fake),
    )


def reference(
    real: Tensor | None,
    fake: Tensor | None,
    kind: str,
    side: str,
    real_weights: Tensor | None = None,
    fake_weights: Tensor | None = None,
) -> Tensor:
    """The formula in plain PyTorch; differentiable. Weights, where given, sum to 1; a pair's are those of real."""
    form = form_of(kind, side)
    y = _arguments(real, fake, form, real_weights, fake_weights)
    terms = [
        _mean(_value(form.function, x), weights)
        for x, weights in ((y.real, real_weights), (y.fake, fake_weights))
        if x is not None
    ]
    return _signed(terms[0] if len(terms) == 1 else terms[0] + terms[1], form.scale)


def reference_gradients(
    real: Tensor | None, fake: Tensor | None, kind: str, side: str
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by real and fake, differentiable, in the dtype of the arithmetic."""
    form = form_of(kind, side)
    y = _arguments(real, fake, form, None, None)

    def part(x: Tensor | None, sign: float) -> Tensor | None:
        return None if x is None else _slope(form.function, x) * (form.scale * sign / x.numel())

    to_real, to_fake = part(y.real, form.real[0]), part(y.fake, form.fake[0])
    if form.pairing == PAIRED:
        return to_real, None if to_real is None else -to_real
    if form.pairing == AVERAGE:
        assert to_real is not None
        assert to_fake is not None
        return to_real - (to_fake / to_real.numel()).sum(), to_fake - (to_real / to_fake.numel()).sum()
    return to_real, to_fake
