"""CycleGANTrainer against steps written out, its pool, a task that it learns, and continuing bit for bit."""

import copy
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from genfast.models import CycleGANGenerator, PatchDiscriminator
from genfast.training import CycleGANTrainer, ImagePool


def translation(inputs=3, outputs=3):
    return nn.Sequential(nn.Conv2d(inputs, 16, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, outputs, 1), nn.Tanh())


def judge(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 16, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 3, 1, 1))


def small(seed=0, **options):
    torch.manual_seed(seed)
    return CycleGANTrainer(translation(), translation(), judge(), judge(), **options)


def images(count, seed, dtype=torch.float32):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def tensors(trainer):
    return {name: tensor.clone() for name, tensor in trainer.state_dict().items()}


@pytest.mark.parametrize("identity", [0.0, 3.0])
def test_a_step_is_that_of_plain_pytorch(identity):
    """Losses, weights, both optimizers, the moving average: two steps written out, without a pool."""
    torch.manual_seed(0)
    networks = [translation().double(), translation().double(), judge().double(), judge().double()]
    twins = copy.deepcopy(networks)
    trainer = CycleGANTrainer(
        *networks, cycle=7.0, identity=identity, lr=1e-2, discriminator_lr=2e-2, betas=(0.3, 0.9), pool=0, ema=0.15
    )
    g, f, judge_a, judge_b = twins
    optimizers = [
        torch.optim.Adam([*one.parameters(), *two.parameters()], lr, (0.3, 0.9))
        for one, two, lr in ((g, f, 1e-2), (judge_a, judge_b, 2e-2))
    ]
    average = copy.deepcopy(g)
    for index in range(2):
        a, b = images(4, index, torch.float64), images(3, index + 9, torch.float64)
        measured = trainer.step(a, b)
        made_a, made_b = f(b), g(a)
        by_a, by_b = (judge_a(made_a) - 1).square().mean(), (judge_b(made_b) - 1).square().mean()
        cycle = (f(made_b) - a).abs().mean() + (g(made_a) - b).abs().mean()
        same = (g(b) - b).abs().mean() + (f(a) - a).abs().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        (by_a + by_b + 7 * cycle + identity * same).backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        losses = [
            ((network(real) - 1).square().mean() + network(made.detach()).square().mean()) / 2
            for network, real, made in ((judge_a, a, made_a), (judge_b, b, made_b))
        ]
        (losses[0] + losses[1]).backward()
        optimizers[1].step()
        for got, want in zip(measured, (*losses, by_a, by_b, cycle), strict=False):
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-8)
        assert math.isnan(measured.identity) if identity == 0 else measured.identity == pytest.approx(same.item())
        decay = min(0.15, (1 + index) / (10 + index))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), g.parameters(), strict=True):
                mean.mul_(decay).add_(now, alpha=1 - decay)
    for ours, theirs in zip((*networks, trainer.average["a_to_b"]), (*twins, average), strict=True):
        for first, second in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(trainer.to_b(a), average(a), rtol=1e-7, atol=1e-9)
    assert not trainer.to_b(a).requires_grad


def rectangles(count, channel, seed):
    """Rectangles of one color on black, anywhere."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.full((count, 3, 8, 8), -1.0)
    for image in found:
        top, left = torch.randint(0, 4, (2,), generator=draw).tolist()
        height, width = torch.randint(3, 5, (2,), generator=draw).tolist()
        image[channel, top : top + height, left : left + width] = 1.0
    return found


def test_colors_are_swapped_without_pairs():
    """Red rectangles become blue ones and back, from sets that show each other's colors alone; pixel by pixel."""
    trainer = small(1, lr=1e-2, ema=0.9)
    red, blue, unseen = rectangles(256, 0, 1), rectangles(256, 2, 2), rectangles(64, 0, 3)

    def contrast(made, channel):
        inside = unseen[:, 0] > 0
        return (made[:, channel][inside].mean() - made[:, channel][~inside].mean()).item()

    assert abs(contrast(trainer.to_b(unseen), 2)) < 0.5
    draw = torch.Generator().manual_seed(0)
    for _ in range(120):
        chosen = torch.randint(256, (2, 8), generator=draw)
        measured = trainer.step(red[chosen[0]], blue[chosen[1]])
    made = trainer.to_b(unseen)
    assert contrast(made, 2) > 1.5  # of 2
    assert abs(contrast(made, 0)) < 0.2
    assert (made - unseen.flip(1)).abs().mean() < 0.1
    assert (trainer.to_a(made) - unseen).abs().mean() < 0.1
    assert measured.cycle < 0.2


def networks(seed):
    torch.manual_seed(seed)
    return [
        *(CycleGANGenerator(3, width=4, blocks=1) for _ in range(2)),
        *(PatchDiscriminator(3, width=4, layers=1) for _ in range(2)),
    ]


OPTIONS = {"averaged": {"ema": 0.9, "pool": 5, "seed": 4}, "plain": {"pool": 50, "identity": 0.0}}


@pytest.mark.parametrize("kind", OPTIONS)
def test_training_continues_bit_for_bit(kind):
    def trained(steps, state=None):
        trainer = CycleGANTrainer(*networks(1 if state is None else 2), **OPTIONS[kind], lr=1e-3)
        if state is not None:
            trainer.load_state_dict(state)
        while trainer.steps < steps:
            trainer.step(images(3, trainer.steps), images(2, 100 + trainer.steps))
        return trainer

    whole, stopped = trained(5), trained(3)
    stopped.to_a(images(1, 0))
    rest = trained(5, load(save({name: t.contiguous() for name, t in stopped.state_dict().items()})))
    first, second = whole.state_dict(), rest.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.isfinite(tensor).all(), name
    start = tensors(trained(0))
    assert not any(name.startswith(("pool", "generators")) for name in start)
    moved = {name for name in start if name.startswith("networks") and not torch.equal(start[name], first[name])}
    assert {n for n in start if n.startswith("networks") and n.endswith("weight")} <= moved
    assert len(first["pool_a.images"]) == (5 if kind == "averaged" else 10)
    assert len(first["pool_b.images"]) == (5 if kind == "averaged" else 15)


def test_the_pool_keeps_half_of_what_it_sees():
    pool, kept, age = ImagePool(50), set(), []
    for step in range(400):
        given = pool.exchange(torch.arange(8.0).view(8, 1) + 8 * step, seed=step)
        assert given.shape == (8, 1)
        if step < 6:
            assert given.flatten().tolist() == [8.0 * step + i for i in range(8)]
        new = {8.0 * step + i for i in range(8)}
        assert set(given.flatten().tolist()) <= new | kept
        gone = kept - set(pool.images.flatten().tolist())
        assert gone <= set(given.flatten().tolist()), "what leaves is given"
        kept = set(pool.images.flatten().tolist())
        assert len(kept) == min(50, 8 * (step + 1))
        if step >= 50:
            age += [8 * step - value for value in given.flatten().tolist() if value < 8 * step]
    assert len(age) / (350 * 8) == pytest.approx(0.5, abs=0.04)
    assert sum(age) / len(age) == pytest.approx(100, rel=0.15)  # each of 50 leaves with 1 in 100
    again = ImagePool(50)
    again.load_state_dict(pool.state_dict())
    new = torch.randn(8, 1)
    assert torch.equal(again.exchange(new, 7), pool.exchange(new, 7))
    assert not torch.equal(again.exchange(new, 8), ImagePool(50).exchange(new, 8))
    assert torch.equal(ImagePool(0).exchange(new, 1), new)
    with pytest.raises(ValueError, match=r"keeps images of shape \(1,\)"):
        pool.exchange(torch.randn(8, 2), 0)


def test_discriminators_see_the_pool():
    trainer = small(0, pool=2, lr=0.0)
    seen = []
    trainer.discriminators["b"].register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    for step in range(6):
        trainer.step(images(1, step), images(1, 50 + step))
    given = seen[2::3]  # made for the generators, real, from the pool
    made = [trainer.generators["a_to_b"](images(1, step)).detach() for step in range(6)]
    assert not all(torch.equal(x, y) for x, y in zip(given, made, strict=True))
    assert all(any(torch.equal(x, y) for y in made[: step + 1]) for step, x in enumerate(given))


def test_sets_may_differ():
    torch.manual_seed(0)
    trainer = CycleGANTrainer(translation(3, 1), translation(1, 3), judge(3), judge(1), identity=0.0)
    trainer.step(images(2, 0), torch.rand(3, 1, 4, 4))
    assert trainer.to_b(images(2, 0)).shape == (2, 1, 8, 8)
    trainer = CycleGANTrainer(translation(3, 1), translation(1, 3), judge(3), judge(1))
    with pytest.raises(ValueError, match="as many channels, got 3 and 1; train with identity=0"):
        trainer.step(images(2, 0), torch.rand(3, 1, 4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cycle": -1.0}, "cycle must be a finite number, at least 0, got -1"),
        ({"identity": math.nan}, "identity must be"),
        ({"lr": math.inf}, "lr must be"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"betas": (0.5, 1.0)}, "betas must be in"),
        ({"pool": -1}, "pool must be at least 0"),
    ],
)
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_batches_and_states_are_explained():
    trainer = small(ema=0.9, pool=4)
    with pytest.raises(TypeError, match="uint8"):
        trainer.step(images(2, 0).byte(), images(2, 0))
    for bad in (images(2, 0)[:0], images(2, 0)[0]):
        with pytest.raises(ValueError, match="b must be images"):
            trainer.step(images(2, 0), bad)
    trainer.step(images(3, 0), images(3, 1))
    state, before = tensors(trainer), tensors(trainer)
    state["networks.generators.a_to_b.0.weight"] += 1
    for wrong in (
        {name: t for name, t in state.items() if name != "steps"},
        {**state, "steps": torch.tensor(-1)},
        {name: t for name, t in state.items() if name != "generators.a_to_b.0.weight.exp_avg"},
        {name: t for name, t in state.items() if not name.startswith("average")},
        {**state, "networks.discriminators.a.0.bias": torch.zeros(2)},
        {**state, "pool_a.images": torch.zeros(5, 3, 8, 8)},
        {**state, "pool_b.more": torch.zeros(2)},
        {**state, "other.more": torch.zeros(2)},
    ):
        with pytest.raises((KeyError, ValueError)):
            trainer.load_state_dict(wrong)
    for name, tensor in tensors(trainer).items():
        assert torch.equal(tensor, before[name]), name
    trainer.load_state_dict(state)
    assert not torch.equal(
        tensors(trainer)["networks.generators.a_to_b.0.weight"], before["networks.generators.a_to_b.0.weight"]
    )
