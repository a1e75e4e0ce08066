"""The reproductions of GANs: the classifier of digits, modes of stacks, kernels on and off, runs that go on."""

import csv
import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from genfast.benchmarks.reproduce import _common as common
from genfast.benchmarks.reproduce import _digits, gan_digits, ring_grid, stacked_digits
from genfast.metrics import label_coverage


def rows_of(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def digits():
    return common.load_digits(None, quick=True)


# ---- images and the classifier -----------------------------------------------------------------------------------


def test_images_of_a_size_are_means_of_the_padded_ones():
    rows = torch.rand(3, 28 * 28)
    x = _digits.images_of(rows, 16)
    assert x.shape == (3, 1, 16, 16)
    padded = torch.zeros(3, 32, 32)
    padded[:, 2:-2, 2:-2] = rows.view(3, 28, 28)
    torch.testing.assert_close((x[:, 0, 5, 9] + 1) / 2, padded[:, 10:12, 18:20].mean((1, 2)))
    assert (x[:, 0, 0] == -1).all()
    torch.testing.assert_close(_digits.images_of(rows, 28), rows.view(3, 1, 28, 28) * 2 - 1)
    torch.testing.assert_close(_digits.images_of(rows, 14).mean(), rows.mean() * 2 - 1)
    for side in (13, 22, 29):
        with pytest.raises(ValueError, match=f"have no means of {side} x {side}"):
            _digits.images_of(rows, side)


def test_the_classifier_learns_and_its_accuracy_is_that_of_images_it_has_not_seen(digits):
    x, y = _digits.images_of(digits.train, 8), digits.train_labels
    torch.manual_seed(3)
    state = torch.get_rng_state()
    classifier = _digits.train_classifier(x, y, 12)
    assert torch.equal(torch.get_rng_state(), state)
    test = _digits.images_of(digits.test, 8)
    found = _digits.accuracy(classifier, test, digits.test_labels)
    assert found > 0.85  # by chance 0.1
    right = [classifier(image[None]).argmax().item() for image in test] == digits.test_labels.numpy()
    assert found == pytest.approx(right.mean())
    assert _digits.accuracy(classifier, test, (digits.test_labels + 1) % 10) < 0.1
    again = _digits.train_classifier(x, y, 1, seed=1), _digits.train_classifier(x, y, 1, seed=1)
    for first, second in zip(*(c.parameters() for c in again), strict=True):
        assert torch.equal(first, second)


def test_parts_are_the_whole():
    x = torch.arange(2 * _digits.ROWS + 5.0).unsqueeze(1)
    assert torch.equal(_digits.in_parts(lambda part: part * 2, x), x * 2)


# ---- modes -------------------------------------------------------------------------------------------------------


def test_modes_are_the_three_digits_in_their_order(digits):
    judge = stacked_digits.Judge(digits, stacked_digits.Sizes.of(True, None))
    x, y = judge.train, judge.tell(judge.train)
    picked = torch.randint(len(x), (50, 3), generator=torch.Generator().manual_seed(0))
    samples = torch.cat([x[picked[:, k]] for k in range(3)], 1)
    labels = 100 * y[picked[:, 0]] + 10 * y[picked[:, 1]] + y[picked[:, 2]]
    assert judge.measure(samples) == label_coverage(labels, 1000, judge.data)
    modes, divergence = judge.measure(samples[:1].expand(9, -1, -1, -1))
    share = math.prod((y == y[index]).double().mean().item() for index in picked[0])
    assert modes == 1
    assert divergence == pytest.approx(-math.log(share), abs=0.01)
    assert judge.reference[0] > 700  # 2,000 stacks of held-out images, of 1,000 modes
    assert judge.reference[1] < 0.6


def test_the_modes_of_the_data_are_products_of_shares():
    y = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    modes = stacked_digits.modes_of_stacks(y)
    counts = torch.bincount(modes, minlength=1000)
    assert counts.min() == 1  # so that no sample has an infinite divergence
    assert counts[12] == 30_000  # 0, 1, 2: 0.5 x 0.3 x 0.2
    assert counts[211] == 18_000
    assert label_coverage(torch.tensor([999]), 1000, modes)[1] > 10


def test_stacks_are_any_three_images():
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    drawn = stacked_digits.stacks(x, 3000, torch.Generator().manual_seed(0))
    assert drawn.shape == (3000, 3, 2, 2)
    assert (drawn == drawn[:, :, :1, :1]).all()
    kinds = (drawn[:, :, 0, 0] @ torch.tensor([16.0, 4.0, 1.0])).long()
    assert torch.bincount(kinds, minlength=64).min() > 10  # of 47 expected


# ---- kernels on and off ------------------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """Names of genfast's ops that run."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "genfast":
            self.found.add(function._opname.split(".")[0])
        return function(*args, **(kwargs or {}))


CASES = [(stacked_digits, name) for name in stacked_digits.METHODS] + [(gan_digits, name) for name in gan_digits.MODELS]


@pytest.mark.parametrize(("script", "name"), CASES, ids=[name for _, name in CASES])
def test_kernels_off_is_the_same_training_by_plain_pytorch(script, name):
    """Weights, steps and samples agree; without kernels no op of genfast runs but the noise."""
    sizes = script.Sizes.of(True, None)
    channels = 3 if script is stacked_digits else 1
    x = torch.rand(16, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    measured, used = [], []
    for kernels in ("on", "off"):
        trainer = script.make(script.Run(kernels, name, 2), sizes)
        start = {key: tensor.clone() for key, tensor in trainer.gan.state_dict().items()}
        for network in (trainer.gan, trainer.average):
            network.double()  # Adam magnifies the rounding of small gradients
        with Ops() as ops:
            steps = [[value.nan_to_num().item() for value in trainer.step(x.double())] for _ in range(4)]
        measured.append((start, steps, trainer.sample(6, seed=1)))
        used.append(ops.found)
    torch.testing.assert_close(measured[0][0], measured[1][0], rtol=0, atol=0)
    torch.testing.assert_close(measured[0][1], measured[1][1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(measured[0][2], measured[1][2], rtol=1e-6, atol=1e-8)
    assert used[1] == {"reparameterize_kl"}
    assert {"bias_act", "gan_loss"} <= used[0]
    other = script.make(script.Run("on", name, 3), sizes).gan.state_dict()
    assert any(not torch.equal(tensor, other[key]) for key, tensor in measured[0][0].items())


def test_the_relativistic_method_has_its_penalties_and_the_plain_one_none():
    sizes = stacked_digits.Sizes.of(True, None)
    trainers = {m: stacked_digits.make(stacked_digits.Run("on", m, 0), sizes) for m in stacked_digits.METHODS}
    found = {m: (t.loss, t.r1 > 0, t.r2 > 0, t.ema.decay > 0) for m, t in trainers.items()}
    plain = ("nonsaturating", False, False, False)
    assert found == {"gan": plain, "dcgan": plain, "relativistic": ("relativistic", True, True, True)}
    norms = {
        m: any("BatchNorm" in type(p).__name__ for p in t.gan.discriminator.modules()) for m, t in trainers.items()
    }
    assert norms == {"gan": False, "dcgan": True, "relativistic": False}
    shapes = [[p.shape for p in trainers[m].gan.parameters()] for m in ("gan", "relativistic")]
    assert shapes[0] == shapes[1]


def test_rates_fall_in_the_second_half():
    class Trainer:
        def __init__(self):
            self.optimizers = {"generator": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)}
            self.rates = []

        def step(self, x):
            self.rates.append((x, self.optimizers["generator"].param_groups[0]["lr"]))

    trainer, advanced = Trainer(), []
    _digits.fit(trainer, iter(range(8)).__next__, 8, lambda: advanced.append(1))
    assert [x for x, _ in trainer.rates] == list(range(8))
    assert [rate for _, rate in trainer.rates] == pytest.approx([0.4] * 5 + [0.3, 0.2, 0.1])
    assert len(advanced) == 8


# ---- runs that go on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "option", "kinds"), [
    (stacked_digits, "methods", "gan,relativistic"), (gan_digits, "models", "dcgan,sngan"),
], ids=["stacked_digits", "gan_digits"])  # fmt: skip
def test_runs_go_on_where_they_ended(script, option, kinds, tmp_path):
    """Rows of as many steps stay, others are added."""
    options = {"out": tmp_path, "quick": True, option: kinds, "threads": 1, "steps": 2, "seeds": "4"}
    script.main(**options, kernels="on")
    first = rows_of(tmp_path / "runs.csv")
    script.main(**options, kernels="both", resume=True)
    rows = rows_of(tmp_path / "runs.csv")
    assert [row["kernels"] for row in first] == ["on", "on"]
    assert [row["kernels"] for row in rows] == ["on", "on", "off", "off"]
    assert [row["cpu_minutes"] for row in rows[:2]] == [row["cpu_minutes"] for row in first]
    assert {f"{kind}.png" for kind in kinds.split(",")} == {path.name for path in tmp_path.glob("*.png")}
    table = {row["quantity"]: row for row in rows_of(tmp_path / "table.csv")}
    pairs = [row for quantity, row in table.items() if "on - off" in quantity]
    assert len(pairs) == 2 * (2 if script is stacked_digits else 3)
    assert all(row["source"].startswith("equal within") for row in pairs)
    digits = common.load_digits(None, quick=True)
    sizes = script.Sizes.of(True, 2)
    judge = script.Judge(digits, sizes)
    assert len(script.finished(tmp_path / "runs.csv", sizes, judge)) == 4
    assert script.finished(tmp_path / "runs.csv", sizes._replace(steps=3), judge) == []
    assert script.finished(tmp_path / "runs.csv", sizes._replace(samples=199), judge) == []
    judge.train = judge.train[1:]
    assert script.finished(tmp_path / "runs.csv", sizes, judge) == []
    assert script.finished(tmp_path / "none.csv", sizes, judge) == []


def test_differences_are_by_seed(digits):
    judge = stacked_digits.Judge(digits, stacked_digits.Sizes.of(True, None)._replace(epochs=1))
    made = (("on", 0, 900, 0.5), ("on", 1, 700, 0.25), ("on", 2, 1, 9.0), ("off", 1, 690, 0.125), ("off", 0, 920, 0.25))
    rows = [{"kernels": k, "method": "gan", "seed": seed, "modes": m, "kl": kl} for k, seed, m, kl in made]
    lines = {line.quantity: line for line in stacked_digits.table(rows, judge)}
    assert lines["GAN, kernels on - off: modes of 1,000"].values == [-20, 10]
    assert lines["GAN, kernels on - off: KL to the data's modes, nats"].values == [0.25, 0.125]
    assert lines["GAN, kernels on: modes of 1,000"].values == [900, 700, 1]
    assert lines["accuracy of the classifier on test images"].values == [judge.accuracy]
    rows = [{**row, "method": "dcgan"} for row in rows]
    lines = {line.quantity: line for line in stacked_digits.table(rows, judge)}
    assert lines["DCGAN, kernels off: modes of 1,000"].published == 99
    assert lines["DCGAN, kernels off: KL to the data's modes, nats"].published == 3.40


# ---- measures of samples -----------------------------------------------------------------------------------------


def test_references_lie_on_the_data_and_noise_does_not(digits):
    judge = gan_digits.Judge(digits, gan_digits.Sizes.of(True, None))
    same = judge.measure(judge.train)
    assert (same["precision"], same["recall"]) == (1.0, 1.0)
    assert same["frechet"] == pytest.approx(0, abs=1e-3)
    assert "fid" not in same
    noise = judge.measure(torch.rand(150, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    for reference in judge.references.values():
        assert reference["precision"] > 0.6 > noise["precision"]
        assert reference["recall"] > 0.5
        assert reference["frechet"] < 0.2 * noise["frechet"]
    assert list(judge.references) == ["test images", "150 training images, of the rest"]


def test_fid_takes_weights_and_torch_fidelity(digits, tmp_path, monkeypatch):
    weights = tmp_path / "inception.pth"
    weights.write_bytes(b"")
    monkeypatch.setattr(gan_digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(common.typer.BadParameter, match="needs torch-fidelity"):
        gan_digits.main(out=tmp_path / "out", quick=True, fid=weights)
    assert not (tmp_path / "out").exists()
    asked = []

    def fidelity(real, samples, **options):
        plot = common.pyplot()
        pictures = [plot.imread(path)[..., :3] for path in sorted(samples.glob("*.png"))]
        asked.append((len(list(real.glob("*.png"))), pictures, options))
        return {"frechet_inception_distance": 7.5}

    monkeypatch.setattr(gan_digits, "fidelity", fidelity)
    sizes = gan_digits.Sizes.of(True, 1)
    judge = gan_digits.Judge(digits, sizes._replace(epochs=1), weights)
    x = judge.train[:5]
    assert judge.measure(x)["fid"] == 7.5
    count, pictures, options = asked[-1]
    assert count == len(judge.train)
    assert options["feature_extractor_weights_path"] == str(weights)
    assert options["cuda"] is False
    for picture, image in zip(pictures, x, strict=True):
        grey = torch.from_numpy(picture).double().permute(2, 0, 1)
        torch.testing.assert_close(grey, ((image.double() + 1) / 2).expand(3, -1, -1), rtol=0, atol=1 / 255)
    row = {
        "kernels": "on", "model": "dcgan", "seed": 0, "steps": 1, "train": len(judge.train), "samples": 200,
        "precision": 0.5, "recall": 0.5, "frechet": 1.0, "cpu_minutes": 0.1,
    }  # fmt: skip
    path = tmp_path / "runs.csv"
    common.write_csv(path, [row, {**row, "seed": 1, "fid": 7.5}], {})
    assert [r["seed"] for r in gan_digits.finished(path, sizes, judge)] == [1]
    lines = {line.quantity: line.values for line in gan_digits.table([row, {**row, "seed": 1, "fid": 7.5}], judge)}
    assert lines["DCGAN, kernels on: FID"] == [7.5]
    assert lines["test images: FID"] == [7.5]
    judge.weights = None
    assert [r["seed"] for r in gan_digits.finished(path, sizes, judge)] == [0, 1]


@pytest.mark.parametrize("script", [stacked_digits, gan_digits], ids=["stacked_digits", "gan_digits"])
def test_wrong_options_are_explained(script, tmp_path):
    kind = "methods" if script is stacked_digits else "models"
    for options, message in (
        ({"kernels": "maybe"}, "--kernels must be one of on, off, both, got maybe"),
        ({kind: "gan,vae"}, f"--{kind} must be of"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
    ):
        with pytest.raises(common.typer.BadParameter, match=message):
            script.main(out=tmp_path, quick=True, **options)
    assert not list(tmp_path.iterdir())


# ---- mixtures ----------------------------------------------------------------------------------------------------


def test_rings_and_grids_go_on_where_they_ended(tmp_path):
    """Rows of as many steps stay, kernels on and off see the same data, and intervals are Student's."""
    options = {"out": tmp_path, "quick": True, "data": "ring", "methods": "gan,relativistic", "threads": 1, "steps": 4}
    ring_grid.main(**options, kernels="on", seeds="0-1")
    first = rows_of(tmp_path / "runs.csv")
    ring_grid.main(**options, kernels="both", seeds="0-1", resume=True)
    rows = rows_of(tmp_path / "runs.csv")
    assert len(first) == 4
    assert [row["minutes"] for row in rows[:4]] == [row["minutes"] for row in first]
    assert len(rows) == 8
    assert ring_grid.finished(tmp_path / "runs.csv", {"ring": 5, "grid": 4}) == []
    shown = ring_grid.drawn(tmp_path / "samples.csv")
    assert [len(shown["ring", method]) for method in ("gan", "relativistic")] == [ring_grid.SHOWN] * 2
    which = [ring_grid.Run(kernels, "ring", "relativistic", 0) for kernels in ("on", "off")]
    trainers = [ring_grid.make(run, True) for run in which]
    x = ring_grid.DATA["ring"].draw(100, torch.Generator().manual_seed(0))
    for on, off in zip(*(trainer.step(x)[:3] for trainer in trainers), strict=True):
        torch.testing.assert_close(on, off, rtol=1e-4, atol=1e-7)
    ring_grid.fit(trainers[0], which[0], 10, lambda: None)
    assert trainers[0].r1 == trainers[0].r2 == pytest.approx(1e-3)
    assert trainers[0].optimizers["generator"].param_groups[0]["lr"] == pytest.approx(1e-3 * 2 * 0.1)
    assert ring_grid.interval([1.0, 2.0, 4.0]) == pytest.approx(4.302653 * 1.527525 / 3**0.5)  # t of 2 at 97.5%
    centers = ring_grid.DATA["grid"].centers
    assert len(centers) == 25
    assert sorted(set(centers.flatten().tolist())) == [-2, -1, 0, 1, 2]
    drawn = ring_grid.DATA["ring"].draw(4000, torch.Generator().manual_seed(0))
    distance = torch.cdist(drawn, ring_grid.DATA["ring"].centers).min(1).values
    assert distance.square().mean().item() == pytest.approx(2 * 0.01**2, rel=0.1)
