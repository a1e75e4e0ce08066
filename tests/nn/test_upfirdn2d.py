"""The resampling layers: what they compute, their filters under conversions, state and compilation."""

from __future__ import annotations

import pytest
import torch

from genfast import nn, ops


def test_layers_are_their_ops():
    x, f = torch.randn(2, 3, 8, 6), ops.setup_filter([1, 3, 3, 1])
    assert torch.equal(nn.Upsample2d((2, 3))(x), ops.upsample2d(x, f, factor=(2, 3)))
    assert torch.equal(nn.Downsample2d(2, gain=2.0)(x), ops.downsample2d(x, f, gain=2.0))
    layer = nn.Upfirdn2d([1, 2], up=2, down=3, padding=(1, 2, 3, 4), flip_filter=True, gain=3.0)
    want = ops.upfirdn2d(x, torch.tensor([1.0, 2]) / 3, up=2, down=3, padding=(1, 2, 3, 4), flip_filter=True, gain=3.0)
    torch.testing.assert_close(layer(x), want)
    square = nn.Upsample2d(taps=[1, 3, 3, 1], separable=False)
    assert square.filter.shape == (4, 4)
    torch.testing.assert_close(square(x), nn.Upsample2d()(x))


@pytest.mark.parametrize("kind", [nn.Upfirdn2d, nn.Upsample2d, nn.Downsample2d])
def test_filters_are_never_rounded_nor_saved(kind):
    layer = kind(taps=[1, 2, 4])
    assert list(layer.state_dict()) == []
    assert list(layer.parameters()) == []
    exact = layer.filter.clone()
    assert torch.equal(layer.bfloat16().filter, exact)
    assert layer(torch.randn(1, 2, 8, 8).bfloat16()).dtype == torch.bfloat16
    doubled = layer.double()
    torch.testing.assert_close(doubled.filter.double().sum(), torch.ones(()).double(), rtol=1e-7, atol=0)
    with torch.device("meta"):
        empty = kind(taps=[1, 2, 4])
    empty = empty.to_empty(device="cpu")
    empty.reset_parameters()
    assert torch.equal(empty.filter, exact)
    assert "3 taps" in repr(layer)


def test_double_backward_through_a_compiled_and_an_eager_layer():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    block = torch.nn.Sequential(nn.Upsample2d(), torch.nn.Tanh(), nn.Downsample2d())
    (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    assert second.abs().sum() > 0
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x)[0], dx.detach())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.Upfirdn2d([]), ValueError, "at least one"),
        (lambda: nn.Upsample2d(2, [1, -1]), ValueError, "sum to zero"),
        (lambda: nn.Downsample2d(2, [[1]], separable=True), ValueError, "separable"),
        (lambda: nn.Upsample2d(0)(torch.zeros(1, 1, 2, 2)), ValueError, "factor"),
        (lambda: nn.Upsample2d()(torch.zeros(1, 1, 2, 2).int()), TypeError, "x must be"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
