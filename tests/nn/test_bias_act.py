"""genfast.nn.BiasAct against PyTorch's layers."""

import pickle

import pytest
import torch
from torch import nn

from genfast.nn import BiasAct


def test_is_a_bias_and_an_activation():
    layer = BiasAct(4, act="lrelu", alpha=0.1, gain=1.0)
    assert layer.bias.shape == (4,)
    assert (layer.bias == 0).all()
    nn.init.normal_(layer.bias)
    x = torch.randn(3, 4, 5)
    want = nn.functional.leaky_relu(x + layer.bias.view(4, 1), 0.1)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(BiasAct(5, act="gelu", dim=-1)(x), nn.functional.gelu(x))
    torch.testing.assert_close(BiasAct(4, act="relu", clamp=1.0)(x), (x.relu() * 2**0.5).clamp(max=1.0))
    torch.testing.assert_close(BiasAct(9, act="tanh", bias=False)(x), x.tanh())


def test_trains_like_a_convolution_with_its_own_bias():
    theirs = nn.Sequential(nn.Conv2d(2, 6, 3), nn.SiLU()).double()
    ours = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), BiasAct(6, act="swish", gain=1.0)).double()
    ours[0].weight.data.copy_(theirs[0].weight.data)
    ours[1].bias.data.copy_(theirs[0].bias.data)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (theirs, ours)]
    for _ in range(3):
        x = torch.randn(2, 2, 7, 7, dtype=torch.float64)
        for net, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            inputs = x.clone().requires_grad_()
            out = net(inputs)
            (slope,) = torch.autograd.grad(out.sum(), inputs, create_graph=True)
            (out.square().mean() + slope.square().mean()).backward()
            optimizer.step()
    torch.testing.assert_close(ours[1].bias, theirs[0].bias)
    torch.testing.assert_close(ours[0].weight, theirs[0].weight)


def test_state_and_repr():
    layer = BiasAct(3, act="elu", clamp=2.0, dim=-1, dtype=torch.float64)
    assert list(layer.state_dict()) == ["bias"]
    assert layer.bias.dtype == torch.float64
    assert repr(layer) == "BiasAct(3, act='elu', gain=1, dim=-1, alpha=1, clamp=2)"
    assert repr(BiasAct(3, act="relu", bias=False)) == "BiasAct(3, act='relu', gain=1.414, bias=False)"
    nn.init.ones_(layer.bias)
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(again(x), layer(x))
    layer.reset_parameters()
    assert (layer.bias == 0).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BiasAct(3, act="none"), ValueError, "BiasAct: unknown activation 'none'"),
        (lambda: BiasAct(-1), ValueError, "channels must be at least 0, got -1"),
        (lambda: BiasAct(3.0), TypeError, "channels must be an int"),
        (lambda: BiasAct(3, act="tanh", alpha=1.0), ValueError, "alpha is of lrelu and elu"),
        (lambda: BiasAct(3, clamp=-1), ValueError, "clamp must be None or at least 0"),
        (lambda: BiasAct(3)(torch.zeros(2, 4)), ValueError, r"b must have shape \(4,\)"),
        (lambda: BiasAct(3)(torch.zeros(2, 3).int()), TypeError, "x must be float32"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
