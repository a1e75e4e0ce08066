"""GANTrainer against steps written out in plain PyTorch, its penalties, and continuing bit for bit."""

import copy
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from genfast import ops
from genfast.demo.gan import make_gan, make_trainer
from genfast.models import DCGAN, GAN, MLPGAN, SNGAN, PackedDiscriminator, StyleGAN2
from genfast.nn import ada_augment, perturb_latents
from genfast.training import GANTrainer


def mlp(**options):
    torch.manual_seed(1)
    return MLPGAN((3,), latent=4, hidden=[8], output="linear", **options).double()


def batch(count=8, seed=0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(count=8):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tensors(trainer):
    return {name: tensor.clone() for name, tensor in trainer.state_dict().items()}


LOSSES = {
    "nonsaturating": (lambda r, f: functional.softplus(-r).mean() + functional.softplus(f).mean(),
                      lambda r, f: functional.softplus(-f).mean()),
    "hinge": (lambda r, f: (1 - r).relu().mean() + (1 + f).relu().mean(), lambda r, f: -f.mean()),
    "wasserstein": (lambda r, f: f.mean() - r.mean(), lambda r, f: -f.mean()),
    "relativistic": (lambda r, f: functional.softplus(f - r).mean(), lambda r, f: functional.softplus(r - f).mean()),
}  # fmt: skip


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_that_of_plain_pytorch(loss, fused):
    """Loss, R1, R2, both optimizers, the moving average: two steps written out."""
    gan = mlp()
    twin, x = copy.deepcopy(gan), batch()
    trainer = GANTrainer(
        gan, loss=loss, lr=1e-2, discriminator_lr=2e-2, betas=(0.3, 0.9), r1=0.5, r2=0.25, ema=0.6, fused=fused, seed=5
    )
    optimizers = [
        torch.optim.Adam(network.parameters(), lr, (0.3, 0.9))
        for network, lr in ((twin.generator, 1e-2), (twin.discriminator, 2e-2))
    ]
    average = copy.deepcopy(twin.generator)
    for index in range(2):
        seeds = [trainer._seed(purpose) for purpose in (0, 6)]
        measured = trainer.step(x)
        made = twin.generator(twin.noise(8, seeds[0])).detach()
        real_x, fake_x = x.clone().requires_grad_(), made.requires_grad_()
        real, fake = twin.judge(real_x), twin.judge(fake_x)
        by_real, by_fake = torch.autograd.grad(real.sum() + fake.sum(), (real_x, fake_x), create_graph=True)
        value = LOSSES[loss][0](real, fake)
        penalty = 0.5 * 0.5 * by_real.square().sum(1).mean() + 0.5 * 0.25 * by_fake.square().sum(1).mean()
        optimizers[1].zero_grad()
        (value + penalty).backward()
        optimizers[1].step()
        torch.testing.assert_close(measured.discriminator.double(), value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(measured.penalty, penalty)
        torch.testing.assert_close(measured.real, real.mean())
        value = LOSSES[loss][1](twin.judge(x), twin.judge(twin.generator(twin.noise(8, seeds[1]))))
        optimizers[0].zero_grad()
        value.backward()
        optimizers[0].step()
        torch.testing.assert_close(measured.generator.double(), value, rtol=1e-6, atol=1e-6)
        decay = min(0.6, (1 + index) / (10 + index))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), twin.generator.parameters(), strict=True):
                mean.mul_(decay).add_(now, alpha=1 - decay)
    for ours, theirs in ((gan, twin), (trainer.average, average)):
        for first, second in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-9)
    z = twin.noise(5, 3)
    torch.testing.assert_close(trainer.sample(5, seed=3), average(z), rtol=1e-6, atol=1e-8)


MODELS = {
    "mlp": (lambda: MLPGAN((3,), 4, [8], batch_norm=True, packed=2), {"loss": "relativistic", "r1": 0.1}),
    "wgan-gp": (lambda: MLPGAN((3,), 4, [8]), {"loss": "wasserstein", "gradient_penalty": 10, "n_critic": 2}),
    "dcgan": (lambda: DCGAN((1, 8, 8), [4], 4), {"betas": (0.5, 0.9), "weight_decay": 0.1}),
    "sngan": (lambda: SNGAN((1, 8, 8), [4], 4, classes=2), {"loss": "hinge", "betas": (0.0, 0.9), "n_critic": 2}),
    "ada": (
        lambda: DCGAN((1, 8, 8), [4], 4),
        {"augment": "ada", "ada_images": 40, "ada_target": -1.0, "ada_interval": 3, "consistency": 2},
    ),
    "zcr": (
        lambda: DCGAN((1, 8, 8), [4], 4), {"latent_consistency": 5.0, "latent_diversity": 0.5, "augment": "diff"}
    ),
    "stylegan2": (
        lambda: StyleGAN2((1, 8, 8), [4], 4, mixing=0.5),
        {"r1": 1.0, "penalty_every": 2, "path_length": 2.0, "path_every": 2},
    ),
}  # fmt: skip


def trained(kind, steps, state=None):
    build, options = MODELS[kind]
    torch.manual_seed(1 if state is None else 2)
    trainer = GANTrainer(build(), **options, seed=3)
    if state is not None:
        trainer.load_state_dict(state)
    while trainer.steps < steps:
        x = (
            torch.randn(8, 3, generator=torch.Generator().manual_seed(trainer.steps))
            if kind in ("mlp", "wgan-gp")
            else images()
        )
        trainer.step(x, None if trainer.gan.classes is None else torch.arange(8) % 2)
    return trainer


@pytest.mark.parametrize("kind", MODELS)
def test_training_continues_bit_for_bit(kind):
    whole = trained(kind, 5)
    stopped = trained(kind, 2)
    stopped.sample(3)
    rest = trained(kind, 5, load(save({name: t.contiguous() for name, t in stopped.state_dict().items()})))
    first, second = whole.state_dict(), rest.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.isfinite(tensor).all(), name
    before = tensors(trained(kind, 0))
    moved = [name for name in before if name.startswith("gan.") and not torch.equal(before[name], first[name])]
    free = {name for name, _ in whole.gan.named_parameters() if not name.endswith("discriminator.layers.1.bias")}
    assert {f"gan.{name}" for name in free} <= set(moved)  # differences of logits have no bias


def test_the_seed_decides():
    found = []
    for seed in (0, 0, 1):
        trainer = GANTrainer(mlp(), seed=seed)
        trainer.step(batch())
        found.append(tensors(trainer))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])
    trainer = GANTrainer(mlp())
    seeds = {trainer._seed(purpose) for purpose in range(13)}
    trainer.steps = 1
    assert len(seeds | {trainer._seed(purpose) for purpose in range(13)}) == 26


def test_lazy_penalties_have_their_weight():
    """Every third step a penalty of three times the weight; between, none."""
    trainer, other = (GANTrainer(mlp(), r1=0.3, penalty_every=every, lr=0.0) for every in (3, 1))
    measured = [trainer.step(batch()) for _ in range(4)]
    assert [math.isnan(m.penalty) for m in measured] == [False, True, True, False]
    torch.testing.assert_close(measured[0].penalty, other.step(batch()).penalty)
    gradients = []
    for every, weight in ((3, 0.3), (1, 0.9)):
        trainer = GANTrainer(mlp(), r1=weight, penalty_every=every, lr=0.0)
        trainer.step(batch())
        gradients.append([p.grad.clone() for p in trainer.gan.discriminator.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_wgan_gp_is_zero_for_a_critic_of_slope_one():
    direction = torch.tensor([[0.6, 0.0, 0.8]], dtype=torch.float64)
    for length in (1.0, 3.0):
        critic = nn.Linear(3, 1, bias=False).double()
        with torch.no_grad():
            critic.weight.copy_(length * direction)
        gan = GAN(nn.Linear(2, 3).double(), critic, 2)
        measured = GANTrainer(gan, loss="wasserstein", gradient_penalty=5.0).step(batch())
        assert measured.penalty.item() == pytest.approx(5 * (length - 1) ** 2, abs=1e-9)


def test_path_lengths_of_a_linear_generator_are_known():
    """images = w A for fixed A: the mean squared length of A y is |A|^2 / pixels."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.A = nn.Parameter(torch.randn(4, 48, dtype=torch.float64))

        def mapping(self, z):
            return z

        def synthesis(self, w, seed=None):
            return (w @ self.A).view(-1, 3, 4, 4)

        def forward(self, z):
            return self.synthesis(z)

    torch.manual_seed(0)
    gan = GAN(Linear(), nn.Sequential(nn.Flatten(), nn.Linear(48, 1)).double(), 4)
    trainer = GANTrainer(gan, path_length=1.0, lr=0.0)
    values = []
    for trainer.steps in range(200):
        trainer.path_mean.zero_()
        values.append(trainer._path(16, None).item())  # squared lengths, around a running mean near 0
    exact = gan.generator.A.square().sum().item() / 16
    assert sum(values) / 200 == pytest.approx(exact * 0.99**2, rel=0.05)


@pytest.mark.parametrize("option", [{"r1": 0.3}, {"r1": 0.2, "r2": 0.5}, {"gradient_penalty": 2.0}])
def test_both_methods_of_penalties_agree(option):
    found = []
    for method in ("double_backward", "jvp"):
        trainer = GANTrainer(mlp(), penalty_method=method, **option)
        penalty = trainer.step(batch()).penalty
        found.append([penalty, *(p.grad for p in trainer.gan.discriminator.parameters())])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("augment", [None, "diff"])
def test_latent_consistency_is_that_of_small_steps(augment):
    torch.manual_seed(0)
    gan = GAN(
        nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), 4,
    )  # fmt: skip
    options = {"augment": augment, "lr": 0.0}
    trainer = GANTrainer(gan, latent_consistency=3.0, latent_diversity=0.7, latent_deviation=0.5, **options)
    seeds = [trainer._seed(purpose) for purpose in (0, 6)]
    seen = (lambda x: ops.diff_augment(x, seed=trainer_seed)) if augment else (lambda x: x)
    trainer_seed = trainer._seed(3)
    measured = trainer.step(images())
    z = gan.noise(8, seeds[0])
    near = perturb_latents(z, 0.5, seed=seeds[0])
    gap = gan.judge(seen(gan.generate(z))) - gan.judge(seen(gan.generate(near)))
    torch.testing.assert_close(measured.penalty, 3.0 * gap.square().mean())
    slopes = [p.grad.clone() for p in gan.generator.parameters()]
    plain = GANTrainer(gan, **options)
    plain.step(images())
    z = gan.noise(8, seeds[1])
    near = perturb_latents(z, 0.5, seed=seeds[1])
    wanted = torch.autograd.grad(
        -0.7 * (gan.generate(z) - gan.generate(near)).square().mean(), list(gan.generator.parameters())
    )
    for got, other, added in zip(slopes, [p.grad for p in gan.generator.parameters()], wanted, strict=True):
        torch.testing.assert_close(got, other + added, rtol=1e-4, atol=1e-6)
        assert added.abs().max() > 1e-5


@pytest.mark.parametrize("option", ["latent_consistency", "latent_diversity"])
def test_latent_consistency_of_fully_connected_networks(option):
    """These options take the graph's way, not that of closed forms."""
    found = []
    for weight in (0.0, 5.0):
        trainer = GANTrainer(mlp(), lr=1e-2, **{option: weight})
        trainer.step(batch())
        found.append(tensors(trainer))
    side = "discriminator" if option == "latent_consistency" else "generator"
    name = f"gan.{side}.layers.0.weight"
    assert not torch.equal(found[0][name], found[1][name])
    assert (found[0][f"{side}.layers.0.weight.exp_avg"] - found[1][f"{side}.layers.0.weight.exp_avg"]).abs().max() > 0


def test_augmentation_is_what_the_discriminator_sees():
    """ "diff": both real and generated images, with noise of their own; the generator's gradients pass through it."""
    seen = []

    class Judge(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            seen.append(x)
            return self.weight * x.flatten(1).mean(1)

    torch.manual_seed(0)
    gan = GAN(nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8))), Judge(), 4)
    trainer = GANTrainer(gan, augment="diff", policy="translation", lr=0.0)
    x = images()
    made = gan.generate(gan.noise(8, trainer._seed(0)))
    seeds = [trainer._seed(purpose) for purpose in (2, 3, 8)]
    again = gan.generate(gan.noise(8, trainer._seed(6)))
    trainer.step(x)
    for got, images_, seed in zip(seen, (x, made, again), seeds, strict=True):
        torch.testing.assert_close(got, ops.diff_augment(images_, "translation", seed=seed))
    assert not torch.equal(seen[0], x)
    assert gan.generator[0].weight.grad.abs().max() > 0
    assert trainer.augmentation_probability == 1.0


def test_ada_steers_by_the_signs_of_real_logits():
    class Judge(nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(float(sign)))

        def forward(self, x):
            return self.weight * (1 + x.flatten(1).square().mean(1))

    for sign, interval, path in (
        (1, 1, [0.08, 0.16, 0.24]), (-1, 1, [0.0, 0.0, 0.0]), (1, 2, [0.0, 0.16, 0.16])
    ):  # fmt: skip
        gan = GAN(nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8))), Judge(sign), 4)
        trainer = GANTrainer(gan, augment="ada", ada_images=100, ada_interval=interval, lr=0.0)
        found = []
        for _ in range(3):
            assert trainer.step(images()).overfitting == sign
            found.append(trainer.augmentation_probability)
        assert found == pytest.approx(path)


def test_ada_augments_by_its_pipeline_and_the_step():
    gan = GAN(nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8))), nn.Conv2d(1, 1, 8), 4)
    trainer, x = GANTrainer(gan, augment="ada", pipeline="blit,color", seed=3), images()
    assert torch.equal(trainer._seen(x, 2), x)
    trainer.ada.p.fill_(0.6)
    found = []
    for trainer.steps in (0, 1, 0):
        found.append(trainer._seen(x, 2))
        assert torch.equal(found[-1], ada_augment(x, 0.6, pipeline="blit,color", seed=trainer._seed(2)))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], trainer._seen(x, 3))


def test_ada_counts_images_where_logits_are_of_packs():
    torch.manual_seed(0)
    judge = nn.Linear(128, 1)
    nn.init.zeros_(judge.weight)
    nn.init.ones_(judge.bias)
    gan = GAN(
        nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8))),
        PackedDiscriminator(nn.Sequential(nn.Flatten(), judge), 2), 4,
    )  # fmt: skip
    trainer = GANTrainer(gan, augment="ada", ada_images=100, ada_interval=1, lr=0.0)
    trainer.step(images())
    assert trainer.augmentation_probability == pytest.approx(0.08)


def test_a_step_of_the_demo_makes_few_calls():
    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            Counting.calls += 1
            return function(*arguments, **(options or {}))

    trainer = make_trainer(make_gan())
    x = torch.randn(16, 64).sign()
    trainer.step(x)
    with Counting():
        trainer.step(x)
    assert Counting.calls < 180  # 173 with torch 2.13; about 950 in plain PyTorch


def test_n_critic_and_the_average():
    trainer = GANTrainer(mlp(), n_critic=3, ema=0.0, lr=1e-2)
    start = tensors(trainer)
    for index in range(3):
        measured = trainer.step(batch())
        same = all(torch.equal(start[n], t) for n, t in tensors(trainer).items() if n.startswith("gan.generator"))
        assert same == (index < 2) == math.isnan(measured.generator)
    for first, second in zip(trainer.average.parameters(), trainer.gan.generator.parameters(), strict=True):
        assert torch.equal(first, second)


def test_buffers_follow_the_average():
    torch.manual_seed(0)
    trainer = GANTrainer(MLPGAN((3,), 4, [8], batch_norm=True), lr=1e-2)
    for _ in range(3):
        trainer.step(batch().float())
    for first, second in zip(trainer.average.buffers(), trainer.gan.generator.buffers(), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(next(iter(trainer.average.buffers())), torch.zeros(8))
    assert not trainer.average.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "kl"}, "unknown kind 'kl'"),
        ({"r1": -1.0}, "r1 must be a finite number, at least 0, got -1"),
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"betas": (0.5, 1.0)}, "betas must be in"),
        ({"n_critic": 0}, "n_critic must be at least 1"),
        ({"penalty_every": 0}, "penalty_every must be at least 1"),
        ({"penalty_method": "triple"}, "method"),
        ({"augment": "often"}, "augment must be None"),
        ({"policy": "blur"}, "blur"),
        ({"latent_diversity": -1.0}, "latent_diversity must be a finite number"),
        ({"ada_target": 2.0}, "target must be in"),
        ({"ada_images": 0}, "images must be at least 1"),
        ({"ada_interval": 0}, "interval must be at least 1"),
        ({"pipeline": "blur"}, "unknown part 'blur' of the pipeline"),
        ({"path_length": 1.0}, "path_length needs a generator with mapping and synthesis"),
    ],
)
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        GANTrainer(mlp(), **options)


def test_bad_batches_and_states_are_explained():
    trainer = GANTrainer(mlp())
    with pytest.raises(TypeError, match=r"must be floating point, got torch\.uint8"):
        trainer.step(torch.zeros(4, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="x has no samples"):
        trainer.step(torch.zeros(0, 3))
    trainer.step(batch())
    state = tensors(trainer)
    before = tensors(trainer)
    for wrong in (
        {name: t for name, t in state.items() if name != "steps"},
        {name: t for name, t in state.items() if not name.endswith("0.weight.exp_avg")},
        {name: t for name, t in state.items() if name != "average.updates"},
        {name: t for name, t in state.items() if name != "gan.discriminator.layers.1.bias"},
        {**state, "gan.generator.layers.0.weight": state["gan.generator.layers.0.weight"] + 1, "more": torch.zeros(2)},
        {**state, "ada.p": torch.zeros(())},
        {**state, "steps": torch.tensor(-1)},
        {**state, "gan.more": torch.zeros(2)},
    ):
        with pytest.raises((KeyError, ValueError, RuntimeError)):
            trainer.load_state_dict(wrong)
    for name, tensor in tensors(trainer).items():
        assert torch.equal(tensor, before[name])
