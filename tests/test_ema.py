"""EMA against its recurrence, tensor by tensor."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from genfast.nn.utils import spectral_norm
from genfast.optim import EMA


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("shift", torch.zeros(4))
        self.register_buffer("none", None)

    def forward(self, x):
        return self.norm(self.layer(x)) + self.shift


def trained(net, steps=3, after=None):
    """Trains a little; ``after`` runs after each step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 3)).sin().sum().backward()
        optimizer.step()
        with torch.no_grad():
            net.shift.add_(torch.randn(4))
        if after is not None:
            after()


def test_is_the_recurrence_of_parameters_biases_and_buffers():
    net = Net()
    ema = EMA(net, 0.9)
    wanted = {key: value.clone() for key, value in net.state_dict().items()}

    def after():
        ema.update()
        for key, value in net.state_dict().items():
            wanted[key] = 0.9 * wanted[key] + 0.1 * value if value.is_floating_point() else value.clone()

    start = copy.deepcopy(wanted)
    trained(net, 4, after)
    found = ema.module.state_dict()
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, msg=key)
        assert not torch.equal(found[key], start[key]), f"{key} did not move"
    assert found["norm.num_batches_tracked"] == 4
    assert ema.updates == 4
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_buffers_may_be_copied():
    net = Net()
    ema = EMA(net, 0.9, update_buffers=False)
    trained(net, 2, ema.update)
    for (key, mine), theirs in zip(ema.module.named_buffers(), net.buffers(), strict=True):
        assert torch.equal(mine, theirs), key
    assert not torch.equal(ema.module.layer.bias, net.layer.bias)


def test_replaced_buffers_are_followed():
    net = Net()
    ema = EMA(net, 0.0)
    net.shift = torch.full((4,), 7.0)
    ema.update()
    assert ema.module.shift.tolist() == [7.0] * 4


def test_half_life_does_not_depend_on_the_batch_size():
    values = []
    for batch in (10, 50):
        net = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(net.weight)
        ema = EMA(net, half_life=100)
        nn.init.ones_(net.weight)
        for _ in range(100 // batch):
            ema.update(batch)
        values.append(ema.module.weight.item())
        assert ema.samples == 100
    assert values == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match="half_life counts samples"):
        ema.update()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"half_life": 1000, "samples_per_update": 10, "warmup": 0.05},
         [0.5 ** (10 / min(1000, 0.05 * 10 * n)) for n in range(1, 4)]),
        ({"decay": 0.5 ** (1 / 40), "warmup": 10.0}, [0.5 ** (1 / min(40, 10 * n)) for n in range(1, 6)]),
        ({"decay": 0.7}, [0.7] * 3),
        ({"decay": 0.25, "ramp": 10}, [1 / 10, 2 / 11, 3 / 12, 0.25, 0.25]),
        ({"decay": 0.0, "ramp": 10}, [0.0] * 2),
    ],
)  # fmt: skip
def test_decays_of_the_warm_up(options, wanted):
    ema, found = EMA(nn.Linear(1, 1), **options), []
    for _ in wanted:
        found.append(ema.decay_of())
        ema.update()
    assert found == pytest.approx(wanted)


def test_small_updates_of_low_precision_are_not_lost():
    for dtype in (torch.bfloat16, torch.float16):
        net = nn.Linear(2, 2).to(dtype)
        nn.init.ones_(net.weight)
        ema = EMA(net, 0.9999)
        nn.init.constant_(net.weight, 2.0)
        for _ in range(2000):
            ema.update()
        assert ema.module.weight.dtype == dtype
        assert ema.module.weight[0, 0].item() == pytest.approx(2 - 0.9999**2000, rel=8e-3)


def test_vectors_of_spectral_norms_are_copied():
    for wrap in (spectral_norm, torch.nn.utils.parametrizations.spectral_norm):
        net = wrap(nn.Linear(6, 5))
        ema = EMA(net, 0.5)
        with torch.no_grad():
            net.parametrizations.weight.original.copy_(torch.randn(5, 6))
        net(torch.randn(1, 6))
        ema.update()
        for mine, theirs in zip(ema.module.buffers(), net.buffers(), strict=True):
            assert torch.equal(mine, theirs)


def test_shared_parameters_move_once():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    ema = EMA(net, 0.5)
    nn.init.ones_(net[0].weight)
    before = ema.module[0].weight.clone()
    ema.update()
    assert ema.module[0].weight is ema.module[1].weight
    torch.testing.assert_close(ema.module[0].weight, 0.5 * before + 0.5)


def test_attached_to_an_optimizer():
    net = Net()
    other = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters())
    ema, by_hand = EMA(net, 0.9), EMA(other, 0.9)
    handle = ema.attach(optimizer)
    x = torch.randn(5, 3)
    second = torch.optim.Adam(other.parameters())
    for _ in range(3):
        for module, steps in ((net, optimizer), (other, second)):
            steps.zero_grad()
            module(x).sin().sum().backward()
            steps.step()
        by_hand.update()
    torch.testing.assert_close(ema.module.state_dict(), by_hand.module.state_dict())
    handle.remove()
    optimizer.step()
    assert ema.updates == 3
    with pytest.raises(ValueError, match="half_life counts samples"):
        EMA(net, half_life=10.0).attach(optimizer)
    EMA(net, half_life=10.0).attach(optimizer, samples=4)


def test_swap_gives_the_module_its_averages_for_a_while():
    net = Net()
    ema = EMA(net, 0.9)
    trained(net, 3, ema.update)
    net.eval()
    x = torch.randn(4, 3)
    plain, averaged, parameters = net(x), ema.module(x), list(net.parameters())
    assert not torch.allclose(plain, averaged)
    with ema.swap():
        torch.testing.assert_close(net(x), averaged)
        torch.testing.assert_close(ema.module(x), plain)
        for call in (ema.update, ema.state_dict, ema.swap().__enter__):
            with pytest.raises(RuntimeError, match="swap"):
                call()
    torch.testing.assert_close(net(x), plain)
    torch.testing.assert_close(ema.module(x), averaged)
    assert all(map(lambda a, b: a is b, parameters, net.parameters()))
    with pytest.raises(KeyError), ema.swap():
        raise KeyError
    torch.testing.assert_close(net(x), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_where_it_ended(dtype):
    torch.manual_seed(0)
    net = nn.Linear(3, 2).to(dtype)
    ema = EMA(net, half_life=100, samples_per_update=5, warmup=0.5)

    def moved(net, ema, seed):
        torch.manual_seed(seed)
        for _ in range(3):
            nn.init.normal_(net.weight)
            ema.update()

    moved(net, ema, 1)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    second = copy.deepcopy(net)
    other = EMA(second, half_life=100, samples_per_update=5, warmup=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    moved(net, ema, 2)
    moved(second, other, 2)
    assert (ema.updates, ema.samples) == (other.updates, other.samples) == (6, 30.0)
    assert torch.equal(ema.module.weight, other.module.weight)
    with pytest.raises(ValueError, match="lacks samples, wide"):
        other.load_state_dict({"module": {}, "updates": 1})
    with pytest.raises(ValueError, match="float32 averages of"):
        other.load_state_dict({**ema.state_dict(), "wide": {"x": torch.ones(1)}})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: EMA(torch.ones(2)), TypeError, "module must be a torch.nn.Module, got Tensor"),
        (lambda: EMA(nn.ReLU(), 1.5), ValueError, "decay must be at least 0, at most 1; got 1.5"),
        (lambda: EMA(nn.ReLU(), "1"), TypeError, "decay must be a number, got str"),
        (lambda: EMA(nn.ReLU(), half_life=0), ValueError, "half_life must be above 0"),
        (lambda: EMA(nn.ReLU(), warmup=-1.0), ValueError, "warmup must be above 0"),
        (lambda: EMA(nn.ReLU(), ramp=0.5), ValueError, "ramp must be at least 1"),
        (lambda: EMA(nn.ReLU(), ramp=10, warmup=0.1), ValueError, "ramp goes with decay alone"),
        (lambda: EMA(nn.ReLU(), ramp=10, half_life=100), ValueError, "ramp goes with decay alone"),
        (lambda: EMA(nn.ReLU(), samples_per_update=0), ValueError, "samples_per_update must be above 0"),
        (lambda: EMA(nn.ReLU(), half_life=5.0).update(-1), ValueError, "samples must be at least 0"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_module_on_another_device_is_refused():
    net = nn.Linear(2, 2)
    ema = EMA(net)
    net.to("meta")
    with pytest.raises(ValueError, match=r"weight is \(2, 2\) on meta in the module and \(2, 2\) on cpu"):
        ema.update()
