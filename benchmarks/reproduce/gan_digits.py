"""DCGAN and SNGAN on MNIST's images: precision, recall and Fréchet distance, with kernels on and off.

python -m genfast.benchmarks.reproduce.gan_digits [--data DIR] [--quick] [--models dcgan,sngan] [--kernels on|off|both]
    [--seeds 0-2] [--steps N] [--resume] [--fid WEIGHTS] [--threads 1] [--out DIR]

Images of 28 x 28, two levels. DCGAN (Radford, Metz and Chintala, ICLR 2016): 32 and 64 channels, non-saturating loss,
Adam at 2e-4 with betas (0.5, 0.999), batches of 64. SNGAN (Miyato et al., ICLR 2018): residual blocks of 16 and 32
channels, hinge loss, Adam at 5e-4 with betas (0, 0.9), batches of 32, as many steps of the discriminator as of the
generator (published: 2e-4, batches of 64, five steps to one). Both are narrower than published and train for minutes,
at rates that fall to zero in the second half; samples are those of the generator's moving average.

2,000 samples are measured against the training images, in the 64 features of a classifier of digits that is trained
here, see ``_digits``: improved precision and recall with 3 neighbors, and the Fréchet distance, on a scale of its own
that no published figure has. Rows of reference: the held-out images in place of samples, which other people wrote; and
some of the training images, drawn at random, against the rest. ``--fid`` takes the file of Inception's weights that
torch-fidelity uses, and adds FID by it; nothing is downloaded.

``--kernels off`` trains the same networks from the same weights on the same batches and noise by plain PyTorch.
Each run is saved as it ends, and ``--resume`` does what the folder lacks.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.progress import Progress
from torch import Tensor

from genfast.benchmarks.reproduce import _common as common
from genfast.benchmarks.reproduce import _digits, _runs
from genfast.metrics import fidelity, frechet_distance, precision_recall
from genfast.models import DCGAN, GAN, SNGAN
from genfast.training import GANTrainer

SAMPLES, SIDE, LATENT, EPOCHS = 2000, 28, 64, 4


class Kind(NamedTuple):
    """A model, its widths, its training and its length."""

    name: str
    build: Callable[..., GAN]
    channels: tuple[int, ...]
    batch: int
    steps: int
    options: dict[str, Any]


MODELS = {
    "dcgan": Kind("DCGAN", DCGAN, (32, 64), 64, 2400, {"lr": 2e-4, "betas": (0.5, 0.999), "ema": 0.995}),
    "sngan": Kind(
        "SNGAN", SNGAN, (16, 32), 32, 1200, {"loss": "hinge", "lr": 5e-4, "betas": (0.0, 0.9), "ema": 0.995}
    ),
}  # fmt: skip
MEASURES = {
    "precision": "precision", "recall": "recall", "frechet": "Fréchet distance of features", "fid": "FID",
}  # fmt: skip
# kernels on and off count as equal within it; set before the runs, from short ones
MARGIN = {"precision": 0.06, "recall": 0.08, "frechet": 25.0, "fid": 5.0}


class Run(NamedTuple):
    """One model to train."""

    kernels: str
    model: str
    seed: int


class Sizes(_digits.Sizes):
    """What a quick run makes smaller; 0 steps: those of the model."""

    @classmethod
    def of(cls, quick: bool, steps: int | None) -> Sizes:
        return cls(8, (8, 12), 8, steps or 20, 200, 8) if quick else cls(SIDE, (), LATENT, steps or 0, SAMPLES, EPOCHS)

    def steps_of(self, model: str) -> int:
        return self.steps or MODELS[model].steps


class Judge:
    """The data, and the classifier whose features measure samples.

    Args:
        digits: the data.
        sizes: of images, and of what the classifier learns from.
        weights: Inception's, for FID; None: none.
    """

    def __init__(self, digits: common.Digits, sizes: Sizes, weights: Path | None = None) -> None:
        self.train, self.test = (_digits.images_of(x, sizes.side) for x in (digits.train, digits.test))
        self.classifier = _digits.train_classifier(self.train, digits.train_labels, sizes.epochs)
        self.accuracy = _digits.accuracy(self.classifier, self.test, digits.test_labels)
        self.weights = weights
        mixed = self.train[torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))]
        count = min(sizes.samples, len(mixed) // 4)
        self.references = {
            "test images": self.measure(self.test[: sizes.samples]),
            f"{count} training images, of the rest": self.measure(mixed[:count], mixed[count:]),
        }

    def features(self, x: Tensor) -> Tensor:
        return _digits.in_parts(self.classifier.body, x)

    def measure(self, samples: Tensor, real: Tensor | None = None) -> dict[str, float]:
        """Precision, recall, Fréchet distance and, with weights, FID of images [N, 1, side, side]."""
        real = self.train if real is None else real
        known, found = self.features(real), self.features(samples)
        near = precision_recall(known, found)
        row = {"precision": near.precision, "recall": near.recall, "frechet": frechet_distance(known, found)}
        if self.weights is not None:
            row["fid"] = inception_distance(real, samples, self.weights)
        return row


def inception_distance(real: Tensor, samples: Tensor, weights: Path) -> float:
    """FID by torch-fidelity, of images written as PNG files."""
    plot = common.pyplot()
    with tempfile.TemporaryDirectory() as folder:
        places = []
        for name, x in (("real", real), ("samples", samples)):
            places.append(Path(folder) / name)
            places[-1].mkdir()
            for index, image in enumerate(((x + 1) / 2).clamp(0, 1)):
                plot.imsave(places[-1] / f"{index:05}.png", image[0].numpy(), cmap="gray", vmin=0, vmax=1)
        options = {"kid": False, "prc": False, "cuda": False, "feature_extractor_weights_path": str(weights)}
        return fidelity(*places, **options)["frechet_inception_distance"]


def make(which: Run, sizes: Sizes) -> GANTrainer:
    """The networks and their training."""
    kind, fused = MODELS[which.model], which.kernels == "on"
    build = partial(kind.build, (1, sizes.side, sizes.side), sizes.channels or kind.channels, sizes.latent)
    return GANTrainer(
        _digits.same_weights(build, which.seed, fused), seed=which.seed, fused=fused, **kind.options
    )  # fmt: skip


def run(which: Run, judge: Judge, sizes: Sizes, advance: Callable[[], None]) -> tuple[dict[str, Any], Tensor]:
    """One row, and the samples that it measures."""
    trainer, started = make(which, sizes), time.process_time()
    order, x, batch = torch.Generator().manual_seed(which.seed), judge.train, MODELS[which.model].batch
    steps = sizes.steps_of(which.model)
    _digits.fit(trainer, lambda: x[torch.randint(len(x), (batch,), generator=order)], steps, advance)
    minutes = (time.process_time() - started) / 60
    samples = trainer.sample(sizes.samples, seed=which.seed)
    row = {
        **which._asdict(), "steps": steps, "train": len(x), "samples": len(samples), **judge.measure(samples),
        "cpu_minutes": minutes,
    }  # fmt: skip
    return row, samples


def finished(path: Path, sizes: Sizes, judge: Judge) -> list[dict[str, Any]]:
    """The rows of an earlier run's file of as many steps, samples and digits, with FID where it is wanted."""
    kinds: dict[str, Callable[[str], Any]] = {
        "kernels": str, "model": str, "seed": int, "steps": int, "train": int, "samples": int, "precision": float,
        "recall": float, "frechet": float, "fid": float, "cpu_minutes": float,
    }  # fmt: skip
    rows = _runs.kept(path, kinds, {"train": len(judge.train), "samples": sizes.samples})
    return [
        row for row in rows
        if row["steps"] == sizes.steps_of(row["model"]) and (judge.weights is None or "fid" in row)
    ]  # fmt: skip


def table(rows: list[dict[str, Any]], judge: Judge) -> list[common.Line]:
    lines = [common.Line("accuracy of the classifier on test images", [judge.accuracy])]
    for key, title in MEASURES.items():
        for name, measured in judge.references.items():
            if key in measured:
                lines.append(common.Line(f"{name}: {title}", [measured[key]]))
        for model, kind in MODELS.items():
            values = {
                kernels: {
                    r["seed"]: r[key] for r in rows if key in r and (r["kernels"], r["model"]) == (kernels, model)
                }
                for kernels in ("on", "off")
            }
            for kernels, found in values.items():
                if found:
                    lines.append(common.Line(f"{kind.name}, kernels {kernels}: {title}", list(found.values())))
            pairs = [value - values["off"][seed] for seed, value in values["on"].items() if seed in values["off"]]
            if pairs:
                label = f"{kind.name}, kernels on - off: {title}"
                lines.append(common.Line(label, pairs, 0.0, f"equal within {MARGIN[key]:g}"))
    return lines


def main(
    data: common.DataOption = None,
    out: common.OutOption = None,
    quick: common.QuickOption = False,
    models: Annotated[str, typer.Option("--models", help="Of dcgan, sngan.")] = "all",
    kernels: _runs.KernelsOption = "both",
    steps: Annotated[int | None, typer.Option("--steps", help="Of the discriminator in each run.")] = None,
    resume: _runs.ResumeOption = False,
    fid: Annotated[
        Path | None, typer.Option("--fid", help="Inception's weights, for FID by torch-fidelity.", exists=True)
    ] = None,
    seeds: common.SeedsOption = "0-2",
    threads: common.ThreadsOption = None,
) -> None:
    """Trains DCGAN and SNGAN on images of digits and measures their samples."""
    sides = _runs.sides(kernels)
    wanted = _runs.chosen("--models", models, tuple(MODELS))
    _runs.check_steps(steps)
    if fid is not None and importlib.util.find_spec("torch_fidelity") is None:
        raise typer.BadParameter("--fid needs torch-fidelity; install it with `pip install torch-fidelity`")
    picked = common.start(threads, seeds, quick)
    digits, sizes = common.load_digits(data, quick), Sizes.of(quick, steps)
    judge = Judge(digits, sizes, fid)

    folder = common.output_folder("gan_digits", out, quick)
    rows = finished(folder / "runs.csv", sizes, judge) if resume else []
    done = {tuple(row[key] for key in Run._fields) for row in rows}
    runs = [Run(side, model, seed) for seed in picked for model in wanted for side in sides]
    runs = [which for which in runs if which not in done]
    with Progress(transient=True) as progress:
        task = progress.add_task("GAN", total=sum(sizes.steps_of(which.model) for which in runs))
        for which in runs:
            row, samples = run(which, judge, sizes, partial(progress.advance, task))
            rows.append(row)
            if which.seed == picked[0]:
                title = f"{MODELS[which.model].name}, seed {which.seed}"
                grids = {"training images": judge.train[:64], title: samples[:64]}
                shown = {name: common.tile(x.flatten(1), sizes.side, 8) for name, x in grids.items()}
                common.images(folder / f"{which.model}.png", shown)
            common.write_csv(folder / "runs.csv", rows, {})
    lengths = ", ".join(f"{MODELS[m].name} {sizes.steps_of(m)} steps of {MODELS[m].batch}" for m in wanted)
    common.finish(
        "gan_digits", "samples of GANs on MNIST against its training images", table(rows, judge), {"runs": rows},
        out=out, quick=quick, seeds=sorted({row["seed"] for row in rows}),
        note=f"{digits.note}. {lengths}; {sizes.samples} samples. There are no published figures in these features",
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
