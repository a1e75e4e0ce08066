"""What a deep belief network's features are worth: errors of a linear classifier on them and on the pixels of MNIST.

python -m genfast.benchmarks.reproduce.dbn_features [--data DIR] [--quick] [--seeds 0-2] [--out DIR]

A DBN learns two layers without labels; logistic regression (scikit-learn) then classifies the means of its units, and
for comparison the pixels and the units of an untrained DBN. Then the DBN's weights start a feed-forward network that
learns the labels by backpropagation, beside the same network from random weights.

The published 1.25% (Hinton, Osindero and Teh, "A fast learning algorithm for deep belief nets", 2006) is another
experiment: 500-500-2000 units on 60,000 images, labels part of the highest RBM, up-down fine-tuning of the whole, and
classification by free energy. It is shown for scale. The published linear classifier (LeCun, Bottou, Bengio and
Haffner, "Gradient-based learning applied to document recognition", 1998) is a one-layer network on 60,000 images.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import track
from torch import Tensor, nn

from genfast.benchmarks.reproduce import _common as common
from genfast.models import DBN

LAYERS, EPOCHS, TUNING_EPOCHS, BATCH = (500, 500), 20, 20, 100
PENALTIES = (0.01, 0.1, 1.0)  # scikit-learn's C, chosen on the last fifth of the training images


def _error(classifier: Any, x: Tensor, labels: Tensor) -> float:
    return 100.0 * float((classifier.predict(x.numpy()) != labels.numpy()).mean())


def linear_error(x: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> tuple[float, float]:
    """(test error in percent, chosen C) of logistic regression."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    cut = len(x) * 4 // 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at the largest C; validation judges it

        def fit(C: float, rows: int) -> Any:
            return LogisticRegression(C=C, max_iter=200).fit(x[:rows].numpy(), labels[:rows].numpy())

        errors = {C: _error(fit(C, cut), x[cut:], labels[cut:]) for C in PENALTIES}
        chosen = min(errors, key=lambda C: errors[C])
        return _error(fit(chosen, len(x)), test, test_labels), chosen


def tuned_error(net: nn.Sequential, digits: common.Digits, epochs: int, seed: int) -> float:
    """Test error in percent after backpropagation of the cross-entropy, by Adam at a falling rate."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(digits.train) // BATCH)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(digits.train), generator=generator).split(BATCH):
            optimizer.zero_grad()
            logits = net(digits.train[chosen])
            nn.functional.cross_entropy(logits, digits.train_labels[chosen]).backward()
            optimizer.step()
            falling.step()
    with torch.no_grad():
        return 100 * (net(digits.test).argmax(1) != digits.test_labels).float().mean().item()


def random_network(dbn: DBN, seed: int) -> nn.Sequential:
    """The network that ``dbn.to_sequential(10)`` is, from torch's own initialization."""
    torch.manual_seed(seed)
    net = dbn.to_sequential(10)
    for module in net:
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return net


@torch.no_grad()
def features(dbn: DBN, v: Tensor) -> Tensor:
    """Means of the units of all layers side by side."""
    return torch.cat([dbn.transform(v, layers) for layers in range(1, len(dbn.layers) + 1)], 1)


def run(digits: common.Digits, seed: int, quick: bool) -> tuple[dict[str, Any], DBN]:
    """Errors in percent for one seed, and the pretrained DBN."""
    epochs, tuning = (30, 30) if quick else (EPOCHS, TUNING_EPOCHS)
    layers = (32, 32) if quick else LAYERS
    torch.manual_seed(seed)
    dbn = DBN(digits.train.shape[1], layers)
    sets = digits.train_labels, digits.test_labels

    def linear(extract: Any) -> float:
        return linear_error(extract(digits.train), sets[0], extract(digits.test), sets[1])[0]

    row: dict[str, Any] = {"seed": seed, "untrained_features": linear(lambda v: features(dbn, v))}
    dbn.pretrain(digits.train, epochs, lr=0.05, momentum=0.5, batch=BATCH, seed=seed)
    row["features"] = linear(lambda v: features(dbn, v))
    row["highest_layer"] = linear(lambda v: dbn.transform(v).detach())
    torch.manual_seed(seed)
    row["tuned"] = tuned_error(dbn.to_sequential(10), digits, tuning, seed)
    row["tuned_from_random"] = tuned_error(random_network(dbn, seed), digits, tuning, seed)
    return row, dbn


def table(rows: list[dict[str, Any]], pixels: float) -> list[common.Line]:
    """The lines of the table; ``pixels`` is the error of the linear classifier on them."""
    hinton = "Hinton et al. 2006: 60,000 images, up-down: see the script"
    lines = [common.Line("pixels, linear classifier", [pixels], 12.0, "LeCun et al. 1998: 60,000 images, one layer")]
    for key, label, published, source in (
        ("untrained_features", "units of an untrained DBN, linear classifier", None, ""),
        ("features", "DBN features (both layers), linear classifier", None, ""),
        ("highest_layer", "DBN features (highest layer), linear classifier", None, ""),
        ("tuned_from_random", "feed-forward network from random weights", None, ""),
        ("tuned", "feed-forward network from the DBN's weights", 1.25, hinton),
    ):
        lines.append(common.Line(label, [row[key] for row in rows], published, source))
    return lines


def draw(path: Path, lines: list[common.Line]) -> None:
    """The errors as bars."""
    plot = common.pyplot()
    figure, axis = plot.subplots(figsize=(8, 3.2), layout="constrained")
    for place, line in enumerate(reversed(lines)):
        mean, error = common.mean_and_error(line.values)
        axis.barh(place, mean, 0.6, xerr=None if error != error else error, color="#2a78d6", capsize=3)
        axis.annotate(
            f"{mean:.2f}%", (mean, place), xytext=(12, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.set_yticks(range(len(lines)), [line.quantity for line in reversed(lines)], fontsize=8)
    axis.set(xlabel="test error, percent")
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plot.close(figure)


def main(
    data: common.DataOption = None,
    out: common.OutOption = None,
    quick: common.QuickOption = False,
    seeds: common.SeedsOption = "0-2",
    threads: common.ThreadsOption = None,
) -> None:
    """Classifies MNIST by a DBN's features and by its pixels."""
    chosen = common.start(threads, seeds, quick)
    digits = common.load_digits(data, quick)
    pixels, _ = linear_error(digits.train, digits.train_labels, digits.test, digits.test_labels)
    rows, first = [], None
    for seed in track(chosen, "seeds", transient=True):
        row, dbn = run(digits, seed, quick)
        rows.append({**row, "pixels": pixels})
        first = dbn if first is None else first
    assert first is not None
    lines = table(rows, pixels)
    folder = common.finish(
        "dbn_features", "Test error on MNIST, percent", lines, {"runs": rows},
        out=out, quick=quick, seeds=chosen, note=digits.note,
    )  # fmt: skip
    draw(folder / "errors.png", lines)
    dreams = first.sample(100, 20 if quick else 1000, seed=0, mean=True)
    filters = first.layers[0].W.detach().T  # type: ignore[union-attr]
    shown = {"first layer's filters": common.tile(filters[:100], digits.side, 10)}
    common.images(folder / "filters.png", shown, symmetric=True)
    common.images(folder / "samples.png", {"samples of the DBN": common.tile(dreams, digits.side, 10)})


if __name__ == "__main__":
    typer.run(main)
