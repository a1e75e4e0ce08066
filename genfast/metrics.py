"""Measures of generated samples: modes, precision and recall, Fréchet distance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genfast._checks import check_count, check_float_tensor

__all__ = [
    "ModeCoverage",
    "PrecisionRecall",
    "fidelity",
    "frechet_distance",
    "label_coverage",
    "mode_coverage",
    "nearest_labels",
    "precision_recall",
]

_ROWS = 4096  # distances are taken for so many rows at a time


class ModeCoverage(NamedTuple):
    """modes: how many have a sample; quality: share of the samples that lie at one; counts: samples at each, [K]."""

    modes: int
    quality: float
    counts: Tensor


class PrecisionRecall(NamedTuple):
    """precision: share of the samples among real data; recall: share of the real data among samples."""

    precision: float
    recall: float


def _matrix(what: str, name: str, x: Any, rows: int = 1) -> Tensor:
    check_float_tensor(what, name, x)
    if x.dim() != 2 or len(x) < rows or x.shape[1] < 1:
        raise ValueError(f"{what}: {name} must be [N, D] with at least {rows} rows, got shape {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{what}: {name} has values that are not finite")
    return x.detach().double()


def _pair(what: str, names: tuple[str, str], a: Any, b: Any, rows: int = 1) -> tuple[Tensor, Tensor]:
    first, second = _matrix(what, names[0], a, rows), _matrix(what, names[1], b, rows)
    if first.shape[1] != second.shape[1] or first.device != second.device:
        raise ValueError(
            f"{what}: {names[0]} and {names[1]} must have one width and device, got {first.shape[1]} on {first.device} "
            f"and {second.shape[1]} on {second.device}"
        )
    return first, second


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def mode_coverage(samples: Tensor, centers: Tensor, sigma: float, within: float = 3.0) -> ModeCoverage:
    """Which modes of a mixture of Gaussians the samples reach.

    A sample is of high quality if its nearest center is at most ``within`` standard deviations away, and a mode is
    covered if it is the nearest one of such a sample.

    Args:
        samples: [N, D].
        centers: [K, D], the modes.
        sigma: standard deviation of each.
        within: how many of them count as near.

    Raises:
        TypeError, ValueError: for tensors that are no matrices of one width, values that are not finite, or a sigma or
            ``within`` that is not positive.

    Source: Srivastava et al., "VEEGAN: reducing mode collapse in GANs using implicit variational learning", NeurIPS
    2017; Lin et al., "PacGAN", NeurIPS 2018.

    Examples:
        >>> centers = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> mode_coverage(torch.tensor([[0.01, 0.0], [0.5, 0.0]]), centers, sigma=0.01)
        ModeCoverage(modes=1, quality=0.5, counts=tensor([1, 0]))
    """
    samples, centers = _pair("mode_coverage", ("samples", "centers"), samples, centers)
    for name, value in (("sigma", sigma), ("within", within)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"mode_coverage: {name} must be positive, got {value}")
    counts = torch.zeros(len(centers), dtype=torch.int64, device=samples.device)
    for part in samples.split(_ROWS):
        distance, nearest = _distances(part, centers).min(1)
        counts += torch.bincount(nearest[distance <= within * sigma], minlength=len(centers))
    return ModeCoverage(int((counts > 0).sum()), counts.sum().item() / len(samples), counts)


def label_coverage(labels: Tensor, classes: int, real: Tensor | None = None) -> tuple[int, float]:
    """Modes told by a classifier: how many classes the samples have, and KL(their shares || those of real data).

    Args:
        labels: [N], integers from 0, the classifier's of the samples.
        classes: how many there are.
        real: [M], the labels of real data; None: evenly spread.

    Returns:
        (modes, KL divergence in nats).

    Raises:
        TypeError, ValueError: for labels that are no integers in range, or samples of a class that the data lack.

    Source: Metz et al., "Unrolled generative adversarial networks", ICLR 2017, section 3.3.1; Lin et al., "PacGAN",
    NeurIPS 2018.

    Examples:
        >>> label_coverage(torch.tensor([0, 1, 1, 0]), classes=4)
        (2, 0.6931471805599453)
    """
    check_count("label_coverage", "classes", classes, 1)
    shares = []
    for name, given in (("labels", labels), ("real", real)):
        if given is None:
            shares.append(torch.full((classes,), 1 / classes, dtype=torch.float64))
            continue
        if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex():
            raise TypeError(
                f"label_coverage: {name} must be a tensor of integers, got {getattr(given, 'dtype', given)}"
            )
        if given.dim() != 1 or not len(given) or int(given.min()) < 0 or int(given.max()) >= classes:
            raise ValueError(f"label_coverage: {name} must be [N], from 0 to {classes - 1}, got {tuple(given.shape)}")
        shares.append(torch.bincount(given.long(), minlength=classes).double().cpu() / len(given))
    found, wanted = shares
    present = found > 0
    if bool((wanted[present] == 0).any()):
        raise ValueError("label_coverage: the samples have classes that the real data lack, so that KL is infinite")
    divergence = (found[present] * (found[present] / wanted[present]).log()).sum().item()
    return int(present.sum()), max(0.0, divergence)


def nearest_labels(samples: Tensor, real: Tensor, labels: Tensor, k: int = 5) -> Tensor:
    """Labels of samples by their nearest neighbors: a classifier that needs no training, for ``label_coverage``.

    A sample has the label that most of its k nearest real rows have; of equally frequent ones that of the nearest row.

    Args:
        samples: [M, D].
        real: [N, D], rows whose labels are known.
        labels: [N], integers from 0.
        k: at most N.

    Returns:
        [M], int64.

    Raises:
        TypeError, ValueError: for tensors that are no matrices of one width, values that are not finite, labels that do
            not fit, or a k out of range.

    Examples:
        >>> real, labels = torch.tensor([[0.0], [1.0], [5.0], [6.0]]), torch.tensor([0, 0, 1, 1])
        >>> nearest_labels(torch.tensor([[0.2], [4.0]]), real, labels, k=2)
        tensor([0, 1])
    """
    samples, real = _pair("nearest_labels", ("samples", "real"), samples, real)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"nearest_labels: labels must be a tensor of integers, got {getattr(labels, 'dtype', labels)}")
    if labels.shape != real.shape[:1] or labels.device != real.device or int(labels.min()) < 0:
        raise ValueError(
            f"nearest_labels: labels must be [{len(real)}] on {real.device}, from 0, got {tuple(labels.shape)} on "
            f"{labels.device}"
        )
    check_count("nearest_labels", "k", k, 1, len(real) + 1)
    labels, found = labels.long(), []
    samples, real = samples.float(), real.float()
    for part in samples.split(_ROWS):
        order = torch.cdist(part, real).topk(k, largest=False).indices
        near = labels[order]
        votes = (near.unsqueeze(2) == near.unsqueeze(1)).sum(2)
        found.append(near.gather(1, votes.argmax(1, keepdim=True)).squeeze(1))
    return torch.cat(found)


def precision_recall(real: Tensor, samples: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall: shares that lie within k-nearest-neighbor balls of the other set.

    Args:
        real: features of real data, [N, D].
        samples: features of samples, [M, D].
        k: the balls around each point reach to its k-th nearest neighbor in its own set.

    Raises:
        TypeError, ValueError: for tensors that are no matrices of one width, or sets of k points or fewer.

    Source: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", NeurIPS 2019.

    Examples:
        >>> real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
        >>> precision_recall(real, torch.tensor([[0.5], [1.5], [1.7]]), k=1)
        PrecisionRecall(precision=1.0, recall=0.5)
    """
    check_count("precision_recall", "k", k, 1)
    real, samples = _pair("precision_recall", ("real", "samples"), real, samples, k + 1)
    return PrecisionRecall(_covered(samples, real, k), _covered(real, samples, k))


def _covered(points: Tensor, among: Tensor, k: int) -> float:
    """Share of the points that lie in some ball of ``among``."""
    radii = torch.cat([_distances(part, among).kthvalue(k + 1, 1).values for part in among.split(_ROWS)])
    inside = sum(int((_distances(part, among) <= radii).any(1).sum()) for part in points.split(_ROWS))
    return inside / len(points)


def frechet_distance(real: Tensor, samples: Tensor) -> float:
    """Fréchet distance between Gaussians of the features' means and covariances; of Inception's features, FID.

    Args:
        real: features of real data, [N, D].
        samples: features of samples, [M, D].

    Returns:
        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), covariances with N - 1, float64.

    Raises:
        ModuleNotFoundError: without scipy.
        TypeError, ValueError: for tensors that are no matrices of one width, or sets of one row.

    Source: Dowson and Landau, 1982; Heusel et al., "GANs trained by a two time-scale update rule converge to a local
    Nash equilibrium", NeurIPS 2017.

    Examples:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
        >>> round(frechet_distance(x, x + torch.tensor([3.0, 4.0])), 4)
        25.0
    """
    from scipy.linalg import sqrtm

    real, samples = _pair("frechet_distance", ("real", "samples"), real, samples, 2)
    width = real.shape[1]
    covariances = [torch.cov(x.T).reshape(width, width).cpu().numpy() for x in (real, samples)]
    shift = (real.mean(0) - samples.mean(0)).square().sum().item()
    root = sqrtm(covariances[0] @ covariances[1]).real
    return max(0.0, float(shift + covariances[0].trace() + covariances[1].trace() - 2 * root.trace()))


def fidelity(real: Path | str, samples: Path | str, **options: Any) -> dict[str, float]:
    """FID, KID, precision and recall in Inception's features, by torch-fidelity.

    Args:
        real: folder of images.
        samples: folder of images.
        options: for ``torch_fidelity.calculate_metrics``, such as ``cuda=False``.

    Returns:
        Name to value, with torch-fidelity's names.

    Raises:
        ModuleNotFoundError: without torch-fidelity (``pip install torch-fidelity``).
    """
    try:
        from torch_fidelity import calculate_metrics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"genfast.metrics.fidelity needs {error.name}; install it with `pip install torch-fidelity`",
            name=error.name,
        ) from None
    wanted = {"fid": True, "kid": True, "prc": True, "verbose": False}
    found: dict[str, float] = calculate_metrics(input1=str(samples), input2=str(real), **{**wanted, **options})
    return found
