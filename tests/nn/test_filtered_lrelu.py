"""The filtered leaky ReLU as a layer: its op, sizes, bias, state and filters under conversions."""

from __future__ import annotations

import pytest
import torch

from genfast import nn, ops


def test_the_layer_is_its_op():
    x = torch.randn(2, 3, 8, 6)
    layer = nn.FilteredLReLU(
        3, up_taps=[1, 2, 1], down_taps=[1, 1], up=2, down=(1, 2), padding=3, gain=1.5, slope=0.1, clamp=0.5
    )
    torch.nn.init.normal_(layer.bias)
    fu, fd = ops.setup_filter([1, 2, 1]), ops.setup_filter([1, 1])
    want = ops.filtered_lrelu(
        x, fu, fd, layer.bias, up=2, down=(1, 2), padding=3, gain=1.5, slope=0.1, clamp=0.5
    )  # fmt: skip
    assert torch.equal(layer(x), want)
    (db,) = torch.autograd.grad(layer(x).sum(), layer.bias)
    assert db.abs().sum() > 0


@pytest.mark.parametrize("up_taps", [None, [1, 2, 1], [1, 3, 3, 1], list(range(1, 13))])
@pytest.mark.parametrize("down_taps", [None, [1, 2, 1], list(range(1, 13))])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 2), (4, 2), (2, (1, 4)), (3, 2)])
def test_the_size_is_kept(up_taps, down_taps, up, down):
    layer = nn.FilteredLReLU(up_taps=up_taps, down_taps=down_taps, up=up, down=down)
    dx, dy = (down, down) if isinstance(down, int) else down
    for h, w in ((8, 9), (7, 12)):
        assert layer(torch.zeros(1, 1, h, w)).shape == (1, 1, h * up // dy, w * up // dx)


def test_the_image_stays_centred():
    layer = nn.FilteredLReLU(up_taps=[1, 3, 3, 1], down_taps=[1, 3, 3, 1], gain=1.0, slope=1.0)
    ramp = torch.arange(12.0).expand(1, 1, 12, 12)
    torch.testing.assert_close(layer(ramp)[..., 3:-3, 3:-3], ramp[..., 3:-3, 3:-3])
    torch.testing.assert_close(layer(ramp.mT)[..., 3:-3, 3:-3], ramp.mT[..., 3:-3, 3:-3])


def test_state_and_conversions():
    layer = nn.FilteredLReLU(4, up_taps=[1, 2, 4])
    assert list(layer.state_dict()) == ["bias"]
    exact = layer.up_filter.clone()
    assert layer.bfloat16().bias.dtype == torch.bfloat16
    assert torch.equal(layer.up_filter, exact)
    assert layer(torch.randn(1, 4, 6, 6).bfloat16()).dtype == torch.bfloat16
    assert "clamp=None" in repr(layer)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.FilteredLReLU(-1), ValueError, "channels must be at least 0"),
        (lambda: nn.FilteredLReLU(up_taps=[]), ValueError, "at least one"),
        (lambda: nn.FilteredLReLU(clamp=-1)(torch.zeros(1, 1, 4, 4)), ValueError, "clamp must be positive"),
        (lambda: nn.FilteredLReLU(3)(torch.zeros(1, 2, 4, 4)), ValueError, "b must have shape"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
