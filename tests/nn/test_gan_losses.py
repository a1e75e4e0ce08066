"""GANLoss and its functions: the same numbers as the op, weighted means, errors."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from genfast import nn, ops
from genfast.ops._gan_loss_reference import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_module_and_functions_agree_with_the_op(kind):
    loss = nn.GANLoss(kind)
    real, fake = torch.randn(5, 1), torch.randn(5, 1)
    want = ops.gan_loss(real, fake, kind, "discriminator")
    assert loss.discriminator(real, fake) == want == loss(real, fake) == nn.gan_discriminator_loss(kind, real, fake)
    want = ops.gan_loss(real, fake, kind, "generator")
    assert loss.generator(fake, real) == want == nn.gan_generator_loss(kind, fake, real)
    assert loss.needs_real == ("relativistic" in kind)
    if not loss.needs_real:
        assert loss.generator(fake) == want
    assert not loss.state_dict()
    assert kind in repr(loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["discriminator", "generator"])
def test_weights_are_repetitions(kind, side):
    """Integer weights are those examples as often."""
    real, fake = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    counts, others = torch.tensor([2, 0, 1, 3]), torch.tensor([1, 4, 0, 2])
    weights: dict = {"real_weights": counts.double(), "fake_weights": others.double()}
    many = [real.repeat_interleave(counts), fake.repeat_interleave(others)]
    if kind == "relativistic":
        weights["fake_weights"], many[1] = None, fake.repeat_interleave(counts)
    elif side == "generator" and kind != "relativistic_average":
        weights["real_weights"] = None
    want = ops.gan_loss(*many, kind, side)
    loss = nn.GANLoss(kind)
    if side == "discriminator":
        got = loss.discriminator(real, fake, **weights)
    else:
        got = loss.generator(fake, real, **weights)
    torch.testing.assert_close(got, want)


def test_weights_differentiate_and_broadcast():
    real, fake, weights = (torch.randn(3, 2, dtype=torch.float64).requires_grad_() for _ in range(3))
    assert gradcheck(
        lambda r, f, w: nn.gan_discriminator_loss("relativistic_average", r, f, real_weights=w.exp()),
        (real, fake, weights),
    )
    row = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    got = nn.gan_discriminator_loss("hinge", real, fake, real_weights=row)
    torch.testing.assert_close(got, ops.gan_loss(real[:1], fake, "hinge", "discriminator"))


def test_errors():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="unknown kind 'wgan'"):
        nn.GANLoss("wgan")
    with pytest.raises(ValueError, match="broadcast"):
        nn.gan_discriminator_loss("hinge", x, x, real_weights=torch.ones(4))
    with pytest.raises(ValueError, match="one weight a pair"):
        nn.gan_discriminator_loss("relativistic", x, x, fake_weights=torch.ones(3))
    with pytest.raises(ValueError, match="no real logits to weight"):
        nn.gan_generator_loss("hinge", x, x, real_weights=torch.ones(3))
    with pytest.raises(TypeError, match="real_weights must be a"):
        nn.gan_discriminator_loss("hinge", x, x, real_weights=[1.0])
