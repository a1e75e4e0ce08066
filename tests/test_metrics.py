"""Measures of samples against brute force and known values."""

import math
import sys
import types

import pytest
import torch

from genfast.metrics import (
    fidelity,
    frechet_distance,
    label_coverage,
    mode_coverage,
    nearest_labels,
    precision_recall,
)


def ring(modes=8):
    angle = torch.arange(modes) * 2 * math.pi / modes
    return torch.stack((angle.cos(), angle.sin()), 1)


def test_mode_coverage_counts_what_is_near():
    centers, generator = ring(), torch.Generator().manual_seed(0)
    samples = centers[:6].repeat(500, 1) + 0.01 * torch.randn(3000, 2, generator=generator)
    found = mode_coverage(samples, centers, 0.01)
    near = (samples - centers[:6].repeat(500, 1)).norm(dim=1) <= 0.03
    assert found.modes == 6
    assert found.quality == near.double().mean().item()
    assert found.quality == pytest.approx(1 - math.exp(-4.5), abs=0.005)  # a Rayleigh variable below 3
    assert torch.equal(found.counts, torch.cat((near.view(500, 6).sum(0), torch.zeros(2, dtype=torch.int64))))
    assert mode_coverage(samples, centers, 0.01, within=1e-6).modes == 0
    edge = torch.tensor([[1.0 + 0.0299, 0.0], [1.0 + 0.0301, 0.0]])
    assert mode_coverage(edge, centers, 0.01).counts.tolist() == [1, *[0] * 7]
    many = samples.repeat(4, 1)
    assert torch.equal(mode_coverage(many, centers, 0.01).counts, 4 * found.counts)


@pytest.mark.parametrize("k", [1, 4, 5])
def test_nearest_labels_are_those_of_the_majority(k):
    generator = torch.Generator().manual_seed(k)
    real, samples = torch.randn(60, 3, generator=generator), torch.randn(200, 3, generator=generator)
    labels = torch.randint(5, (60,), generator=generator)
    found, ties = nearest_labels(samples, real, labels, k).tolist(), 0
    for sample, label in zip(samples, found, strict=True):
        near = labels[(real - sample).square().sum(1).argsort()[:k]].tolist()
        counts = [near.count(other) for other in near]
        assert label == next(other for other, count in zip(near, counts, strict=True) if count == max(counts))
        ties += len({other for other, count in zip(near, counts, strict=True) if count == max(counts)}) > 1
    assert (ties > 0) == (k > 1)
    for bad, message in (
        ((samples, real, labels[1:], k), r"labels must be \[60\]"), ((samples, real, labels, 61), "k must be in"),
        ((samples, real, labels - 1, k), "from 0"), ((samples[:, 1:], real, labels, k), "one width"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            nearest_labels(*bad)
    with pytest.raises(TypeError, match="integers"):
        nearest_labels(samples, real, labels.float(), k)


def test_label_coverage_is_kl():
    labels, real = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 1, 2, 3, 3, 3, 3])
    modes, divergence = label_coverage(labels, 4, real)
    assert modes == 3
    wanted = 0.5 * math.log(0.5 / 0.125) + 0.25 * math.log(0.25 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert divergence == pytest.approx(wanted)
    assert label_coverage(torch.arange(10), 10) == (10, 0.0)
    with pytest.raises(ValueError, match="real data lack"):
        label_coverage(torch.tensor([2]), 3, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="from 0 to 2"):
        label_coverage(torch.tensor([3]), 3)
    with pytest.raises(TypeError, match="integers"):
        label_coverage(torch.tensor([1.0]), 3)


def brute(points, among, k):
    inside = 0
    for point in points:
        for center in among:
            radius = sorted((center - other).norm().item() for other in among)[k]
            if (point - center).norm().item() <= radius:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_brute_force(k):
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    samples = 0.5 * torch.randn(30, 3, generator=generator, dtype=torch.float64) + 0.5
    found = precision_recall(real, samples, k)
    assert found == (brute(samples, real, k), brute(real, samples, k))
    assert found.recall < found.precision


def test_precision_and_recall_of_one_distribution_and_of_two_apart():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 4, generator=generator)
    assert min(precision_recall(x, torch.randn(600, 4, generator=generator))) > 0.9
    assert precision_recall(x, x + 100) == (0.0, 0.0)
    collapsed = precision_recall(x, x[:1] + 0.01 * torch.randn(300, 4, generator=generator))
    assert collapsed.precision == 1.0
    assert collapsed.recall < 0.01


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 0.0, -2.0])
    wanted = shift.square().sum() + (1 - scale).square().sum()  # commuting covariances
    assert frechet_distance(x, x * scale + shift) == pytest.approx(wanted.item(), rel=0.02)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    a, b = torch.randn(50, 3, generator=generator), 2 * torch.randn(60, 3, generator=generator) + 1
    first, second = (torch.cov(y.double().T) for y in (a, b))
    eigenvalues = torch.linalg.eigvals(first @ second).real.clamp(min=0)
    shift = (a.double().mean(0) - b.double().mean(0)).square().sum()
    wanted = shift + first.trace() + second.trace() - 2 * eigenvalues.sqrt().sum()
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-8)
    a, b = a[:, :1].double(), b[:, :1].double()
    wanted = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(wanted.item())


def test_torch_fidelity_is_asked_where_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch-fidelity"):
        fidelity("a", "b")
    module = types.ModuleType("torch_fidelity")
    module.calculate_metrics = lambda **options: options
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    found = fidelity("real", "made", cuda=False)
    assert (found["input1"], found["input2"], found["fid"], found["kid"], found["cuda"]) == (
        "made", "real", True, True, False
    )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: mode_coverage(x, x, 0.0), "sigma must be positive"),
        (lambda x: mode_coverage(x, x[:, :1], 1.0), "one width and device"),
        (lambda x: mode_coverage(x[:0], x, 1.0), "samples must be"),
        (lambda x: mode_coverage(x, x * math.nan, 1.0), "centers has values that are not finite"),
        (lambda x: precision_recall(x, x[:3], 3), "at least 4 rows"),
        (lambda x: precision_recall(x, x, 0), "k must be at least 1"),
        (lambda x: frechet_distance(x, x[:1]), "at least 2 rows"),
        (lambda x: frechet_distance(x, x[0]), "samples must be"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(10, 2))
    with pytest.raises(TypeError):
        mode_coverage(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(2, 2), 1.0)
