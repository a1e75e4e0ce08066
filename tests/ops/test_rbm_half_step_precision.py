"""rbm_half_step: how exact its products are in each precision, with kernels of too few terms as negative controls."""

from __future__ import annotations

import pytest
import torch
from rbm_models import backends, check_means, exact_logits

import genfast
from genfast import ops

OP = "rbm_half_step"


def rounded_weights(x, W, bias, *, precision, **options):
    """A wrong kernel: the weights in one bfloat16 although three were asked for."""
    return ops.rbm_half_step(x, W.bfloat16().float(), bias, precision="fp32", **options)


def two_terms(x, W, bias, *, precision, **options):
    """A wrong kernel: high and middle part of the weights, without the low one."""
    high = W.bfloat16().float()
    return ops.rbm_half_step(x, high + (W - high).bfloat16().float(), bias, precision="fp32", **options)


def check_precision(call, x, W, bias, *, up, precision, factor):
    """The largest error in the inputs, which are the means of gaussian units, beside that of PyTorch's product."""
    to = "hidden" if up else "visible"
    mean = call(x, W, bias, to=to, units="gaussian", precision=precision, return_mean=True, seed=0)[1]
    exact = exact_logits(x, W, bias, up=up)[0]
    plain = (x @ (W if up else W.T) + bias).double()
    error = (mean.double() - exact).abs().max()
    assert error <= factor * (plain - exact).abs().max()


@pytest.mark.parametrize("scale", [0.05, 30.0])
@pytest.mark.parametrize("kind", ["0/1", "grayscale"])
@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize(("backend", "isa", "precision"), backends(OP, ["fp32", "split"]), indirect=["isa"])
def test_fp32_and_split_are_as_exact_as_a_float32_product(backend, isa, precision, up, kind, scale):
    """The largest error of 20,000 inputs is at most 4 times PyTorch's: one sum of 784 terms in sequence has 3 times.

    Weights rounded to bfloat16 have about 6,000 times, and the sum of two bfloat16 terms 8 times.
    """
    torch.manual_seed(3)
    W, bias = scale * torch.randn(784, 257), scale * torch.randn(257 if up else 784)
    x = torch.rand(80, 784 if up else 257)
    x = x.round() if kind == "0/1" else x
    with genfast.use_backend(backend):
        check_precision(ops.rbm_half_step, x, W, bias, up=up, precision=precision, factor=4)
    for wrong in (rounded_weights, two_terms):
        with pytest.raises(AssertionError):
            check_precision(wrong, x, W, bias, up=up, precision=precision, factor=4)


@pytest.mark.parametrize(("backend", "isa", "up"), backends(OP, [True, False]), indirect=["isa"])
def test_bf16_rounds_the_operands_and_nothing_else(backend, isa, up):
    W, bias = torch.randn(784, 129), torch.randn(129 if up else 784)
    x = torch.rand(40, 784 if up else 129)
    exact, bound = exact_logits(x, W, bias, up=up, precision="bf16")
    options = {"to": "hidden" if up else "visible", "units": "gaussian", "return_mean": True, "seed": 0}
    with genfast.use_backend(backend):
        check_means(ops.rbm_half_step(x, W, bias, precision="bf16", **options)[1], exact, bound, "gaussian")
        with pytest.raises(AssertionError):
            check_means(ops.rbm_half_step(x, W, bias, precision="fp32", **options)[1], exact, bound, "gaussian")
