"""Stacked digits: three images of digits as the colours of one, 1,000 modes, and how many of them GANs recover.

python -m genfast.benchmarks.reproduce.stacked_digits [--data DIR] [--quick] [--methods gan,dcgan,relativistic]
    [--kernels on|off|both] [--seeds 0-2] [--steps N] [--resume] [--threads 1] [--out DIR]

Each colour of a generated image is told by a classifier of digits that is trained here, see ``_digits``; the three
digits are the mode. Of 25,600 samples the script counts the modes and takes KL(their shares || those of the data),
where the data's are products of the shares of the ten digits among the training images, as the classifier tells them.
As many samples of the data themselves have KL 0.02 by chance alone.

Three models of the same two networks: ``gan``, a plain GAN; ``dcgan``, whose discriminator has batch normalization, as
published; ``relativistic``, the plain one's networks with the relativistic loss, R1 and R2, whose samples are those of
the generator's moving average. The first two have the published rate of 2e-4 and beta1 of 0.5, the last 1e-3 and 0.

Published: DCGAN and PacGAN2 (Lin et al., "PacGAN", NeurIPS 2018), relativistic + R1 + R2 (Huang et al., "The GAN is
dead; long live the GAN!", NeurIPS 2024). What differs here: images of 16 x 16 pixels, means of 2 x 2 of the padded
ones, in place of 28 x 28 or 32 x 32; stacks of 8,000 digits of MNIST drawn anew for every batch, in place of 60,000;
two levels of 32 and 64 channels, 64 latent values; minutes of training; rates that fall to zero in the second half; and
of Huang et al. residual blocks without normalization, where the generator here has batch normalization.

``--kernels off`` trains the same networks from the same weights on the same batches and noise by plain PyTorch.
Each run is saved as it ends, and ``--resume`` does what the folder lacks.
"""

from __future__ import annotations

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
from genfast.metrics import label_coverage
from genfast.models import DCGAN
from genfast.training import GANTrainer

SAMPLES = 25_600
CHANNELS, LATENT, BATCH, SIDE = (32, 64), 64, 64, 16
STEPS = 2400
EPOCHS = 8  # of the classifier
METHODS = {"gan": "GAN", "dcgan": "DCGAN", "relativistic": "relativistic + R1 + R2"}
OPTIONS: dict[str, dict[str, Any]] = {
    "gan": {"lr": 2e-4, "betas": (0.5, 0.999), "ema": 0.0},
    "dcgan": {"lr": 2e-4, "betas": (0.5, 0.999), "ema": 0.0},
    "relativistic": {"loss": "relativistic", "lr": 1e-3, "betas": (0.0, 0.99), "r1": 1.0, "r2": 1.0, "ema": 0.995},
}
PUBLISHED = {
    "dcgan": (99.0, 3.40, "Lin et al. 2018"), "relativistic": (1000.0, 0.078, "Huang et al. 2024"),
}  # fmt: skip
ELSEWHERE = (("PacGAN2", 1000.0, 0.06, "Lin et al. 2018; not trained here"),)
MEASURES = {"modes": "modes of 1,000", "kl": "KL to the data's modes, nats"}
MARGINS = {  # kernels on and off count as equal within them; set before the runs, from short ones
    "gan": {"modes": 40.0, "kl": 0.6}, "dcgan": {"modes": 30.0, "kl": 0.2}, "relativistic": {"modes": 15.0, "kl": 0.15},
}  # fmt: skip


class Run(NamedTuple):
    """One model to train."""

    kernels: str
    method: str
    seed: int


class Sizes(_digits.Sizes):
    """What a quick run makes smaller."""

    @classmethod
    def of(cls, quick: bool, steps: int | None) -> Sizes:
        if quick:
            return cls(8, (8, 12), 8, steps or 20, 2000, 8)
        return cls(SIDE, CHANNELS, LATENT, steps or STEPS, SAMPLES, EPOCHS)


class Judge:
    """Tells the modes: the classifier, its accuracy on test images, and the modes of the data.

    Args:
        digits: the data.
        sizes: of images, and of what the classifier learns from.
    """

    def __init__(self, digits: common.Digits, sizes: Sizes) -> None:
        self.train, test = (_digits.images_of(x, sizes.side) for x in (digits.train, digits.test))
        self.classifier = _digits.train_classifier(self.train, digits.train_labels, sizes.epochs)
        self.accuracy = _digits.accuracy(self.classifier, test, digits.test_labels)
        self.data = modes_of_stacks(self.tell(self.train))
        self.reference = self.measure(stacks(test, sizes.samples, torch.Generator().manual_seed(1)))

    def tell(self, x: Tensor) -> Tensor:
        """Digits of images [N, 1, side, side]."""
        return _digits.in_parts(self.classifier, x).argmax(1)

    def measure(self, samples: Tensor) -> tuple[int, float]:
        """(modes, KL) of images [N, 3, side, side]."""
        colours = self.tell(samples.reshape(-1, 1, *samples.shape[2:]))
        return label_coverage(mode_of(colours.view(-1, 3)), 1000, self.data)


def mode_of(digits: Tensor) -> Tensor:
    """The number from 0 to 999 of three digits [N, 3]."""
    return digits @ digits.new_tensor([100, 10, 1])


def modes_of_stacks(digits: Tensor) -> Tensor:
    """A million modes, within rounding, in the shares that stacks of three of these digits have; each at least once."""
    share = torch.bincount(digits, minlength=10).double() / len(digits)
    shares = share[:, None, None] * share[:, None] * share
    return torch.arange(1000).repeat_interleave((1e6 * shares.flatten()).round().long().clamp(min=1))


def stacks(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` images of three channels, each any of x [N, 1, side, side]."""
    picked = torch.randint(len(x), (3 * count,), generator=generator)
    return x[picked].view(count, 3, *x.shape[2:])


def make(which: Run, sizes: Sizes) -> GANTrainer:
    """The networks and their training."""
    fused = which.kernels == "on"
    build = partial(
        DCGAN, (3, sizes.side, sizes.side), sizes.channels, sizes.latent, batch_norm=which.method == "dcgan"
    )
    gan = _digits.same_weights(build, which.seed, fused)
    return GANTrainer(gan, seed=which.seed, fused=fused, **OPTIONS[which.method])


def run(which: Run, judge: Judge, sizes: Sizes, advance: Callable[[], None]) -> tuple[dict[str, Any], Tensor]:
    """One row, and the samples that it measures."""
    trainer, started = make(which, sizes), time.process_time()
    order = torch.Generator().manual_seed(which.seed)
    _digits.fit(trainer, lambda: stacks(judge.train, BATCH, order), sizes.steps, advance)
    minutes = (time.process_time() - started) / 60
    samples = trainer.sample(sizes.samples, seed=which.seed)
    modes, divergence = judge.measure(samples)
    row = {
        **which._asdict(), "steps": sizes.steps, "train": len(judge.train), "samples": sizes.samples, "modes": modes,
        "kl": divergence, "cpu_minutes": minutes,
    }  # fmt: skip
    return row, samples


def finished(path: Path, sizes: Sizes, judge: Judge) -> list[dict[str, Any]]:
    """The rows of an earlier run's file of as many steps, samples and digits."""
    kinds: dict[str, Callable[[str], Any]] = {
        "kernels": str, "method": str, "seed": int, "steps": int, "train": int, "samples": int, "modes": int,
        "kl": float, "cpu_minutes": float,
    }  # fmt: skip
    wanted = {"steps": sizes.steps, "train": len(judge.train), "samples": sizes.samples}
    return _runs.kept(path, kinds, wanted)


def table(rows: list[dict[str, Any]], judge: Judge) -> list[common.Line]:
    lines = [common.Line("accuracy of the classifier on test images", [judge.accuracy])]
    for index, (key, title) in enumerate(MEASURES.items()):
        lines.append(common.Line(f"stacks of test images: {title}", [float(judge.reference[index])]))
        for method, name in METHODS.items():
            values = {
                kernels: {r["seed"]: r[key] for r in rows if (r["kernels"], r["method"]) == (kernels, method)}
                for kernels in ("on", "off")
            }
            published = PUBLISHED.get(method)
            for kernels, found in values.items():
                if found:
                    lines.append(
                        common.Line(
                            f"{name}, kernels {kernels}: {title}", list(found.values()),
                            published[index] if published else None, published[2] if published else "",
                        )
                    )  # fmt: skip
            pairs = [value - values["off"][seed] for seed, value in values["on"].items() if seed in values["off"]]
            if pairs:
                label = f"{name}, kernels on - off: {title}"
                lines.append(common.Line(label, pairs, 0.0, f"equal within {MARGINS[method][key]:g}"))
    return lines


def draw(path: Path, shown: dict[str, Tensor]) -> None:
    """The first 64 of each set of images side by side."""
    plot = common.pyplot()
    figure, axes = plot.subplots(1, len(shown), figsize=(3 * len(shown), 3.2), layout="constrained", squeeze=False)
    for axis, (title, x) in zip(axes[0], shown.items(), strict=True):
        side = x.shape[-1]
        grid = ((x[:64] + 1) / 2).clamp(0, 1).view(8, 8, 3, side, side).permute(0, 3, 1, 4, 2)
        axis.imshow(grid.reshape(8 * side, 8 * side, 3).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=110)
    plot.close(figure)


def main(
    data: common.DataOption = None,
    out: common.OutOption = None,
    quick: common.QuickOption = False,
    methods: Annotated[str, typer.Option("--methods", help="Of gan, dcgan, relativistic.")] = "all",
    kernels: _runs.KernelsOption = "both",
    steps: Annotated[int | None, typer.Option("--steps", help="Of each run.")] = None,
    resume: _runs.ResumeOption = False,
    seeds: common.SeedsOption = "0-2",
    threads: common.ThreadsOption = None,
) -> None:
    """Trains GANs on stacked digits and counts the 1,000 modes that they recover."""
    sides = _runs.sides(kernels)
    wanted = _runs.chosen("--methods", methods, tuple(METHODS))
    _runs.check_steps(steps)
    picked = common.start(threads, seeds, quick)
    digits, sizes = common.load_digits(data, quick), Sizes.of(quick, steps)
    judge = Judge(digits, sizes)

    folder = common.output_folder("stacked_digits", out, quick)
    rows = finished(folder / "runs.csv", sizes, judge) if resume else []
    done = {tuple(row[key] for key in Run._fields) for row in rows}
    runs = [Run(side, method, seed) for seed in picked for method in wanted for side in sides]
    runs = [which for which in runs if which not in done]
    real = stacks(judge.train, 64, torch.Generator().manual_seed(0))
    with Progress(transient=True) as progress:
        task = progress.add_task("stacked digits", total=len(runs) * sizes.steps)
        for which in runs:
            row, samples = run(which, judge, sizes, partial(progress.advance, task))
            rows.append(row)
            if which.seed == picked[0]:
                shown = {"stacked digits": real, f"{METHODS[which.method]}, seed {which.seed}": samples}
                draw(folder / f"{which.method}.png", shown)
            common.write_csv(folder / "runs.csv", rows, {})
    elsewhere = "; ".join(f"{name}: {modes:g} modes, KL {kl:g} ({who})" for name, modes, kl, who in ELSEWHERE)
    common.finish(
        "stacked_digits", "modes of stacked digits", table(rows, judge), {"runs": rows}, out=out, quick=quick,
        seeds=sorted({row["seed"] for row in rows}),
        note=f"{digits.note}. {sizes.steps} steps of batches of {BATCH}, {sizes.side} x {sizes.side} pixels, "
        f"{sizes.samples} samples. Published elsewhere: {elsewhere}",
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
