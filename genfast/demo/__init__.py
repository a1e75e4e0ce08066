"""``genfast demo``: trains a VAE, a GAN and an RBM on scikit-learn's 8 x 8 digits, draws them, and times genfast's
layers and attention."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

__all__ = ["run"]


def run(out: Path | str = "out", *, quick: bool = False, console: Console | None = None) -> dict[str, float]:
    """Runs the demo; the same seed gives the same models every time on one machine.

    Args:
        out: folder for the pictures, made where it is missing.
        quick: a few epochs only and no torch.compile, for a smoke test.
        console: where to print; a new one by default.

    Returns:
        ``elbo_start``, ``elbo_end``, ``pseudo_likelihood_start``, ``pseudo_likelihood_end``: nats a held-out digit;
        ``auroc_start``, ``auroc_end``: of telling a digit that training left out; ``modes_start``, ``modes_end``:
        digits among a GAN's samples.

    Raises:
        ModuleNotFoundError: without scikit-learn and matplotlib (``pip install genfast[examples]``).
    """
    from genfast.demo import anomaly, attention, gan, plots, timing, train

    console = console or Console()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    digits = train.load_digits()
    with torch.random.fork_rng(devices=[]), _one_thread():
        vae_run = train.train_vae(digits.train, digits.test, epochs=3 if quick else 100, console=console)
        found = anomaly.run(digits, epochs=3 if quick else 60, console=console)
        rbm_run = train.train_rbm(digits, epochs=3 if quick else 150, console=console)
        gan_run = gan.run(digits, steps=60 if quick else 4000, console=console)
        plots.draw_all(out, digits, vae_run, found, rbm_run, gan_run, gibbs_steps=50 if quick else 2000)
    _print_results(vae_run, rbm_run, console)
    _print_epochs(vae_run, console)
    console.print(
        f"a VAE trained without {anomaly.LEFT_OUT}s tells them from the others by -log p(x): AUROC "
        f"{found.auroc:.3f}, untrained {found.untrained:.3f} ({found.seconds:.1f} s)",
        highlight=False,
    )
    after, before = gan_run.trained, gan_run.untrained
    console.print(
        f"a GAN's {gan.SAMPLES} samples: {after.modes} of 10 digits, {after.sure:.0%} told with a "
        f"probability over {gan.SURE:.0%} by a classifier that is right on {gan_run.accuracy:.1%}, KL of their shares "
        f"{after.divergence:.3f}; precision {after.precision:.2f}, recall {after.recall:.2f}; "
        f"untrained: {before.modes} digits, KL {before.divergence:.2f} ({gan_run.seconds:.1f} s)",
        highlight=False,
    )
    console.print(f"pictures in {out}/: {', '.join(plots.NAMES)}", highlight=False)
    with torch.random.fork_rng(devices=[]):
        timing.print_table(quick=quick, console=console)
        attention.print_table(quick=quick, console=console)
    console.print(f"{time.perf_counter() - start:.0f} s in total", highlight=False)
    return {
        "elbo_start": vae_run.held_out[0],
        "elbo_end": vae_run.held_out[-1],
        "pseudo_likelihood_start": rbm_run.held_out[0],
        "pseudo_likelihood_end": rbm_run.held_out[-1],
        "auroc_start": found.untrained,
        "auroc_end": found.auroc,
        "modes_start": float(gan_run.untrained.modes),
        "modes_end": float(gan_run.trained.modes),
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The models are too small for two threads to help, and waiting for each other on a busy machine is very slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _print_results(vae_run, rbm_run, console: Console) -> None:  # type: ignore[no-untyped-def]
    table = Table(title="held-out digits, nats a digit (higher is better)", title_justify="left")
    table.add_column("model")
    table.add_column("measure")
    for title in ("untrained", "trained", "seconds"):
        table.add_column(title, justify="right")
    for model, measure, result in (
        ("VAE", "ELBO, 16 samples", vae_run),
        ("RBM", "pseudo-likelihood, exact", rbm_run),
    ):
        first, last = result.held_out[0], result.held_out[-1]
        table.add_row(model, measure, f"{first:.2f}", f"{last:.2f}", f"{result.seconds:.1f}")
    console.print(table)


def _print_epochs(vae_run, console: Console) -> None:  # type: ignore[no-untyped-def]
    last = len(vae_run.epochs) - 1
    chosen = sorted({round(last * part / 5) for part in range(6)})
    table = Table(title="VAE: ELBO by epoch, nats a held-out digit", title_justify="left")
    for index in chosen:
        table.add_column(f"{vae_run.epochs[index]}", justify="right")
    table.add_row(*(f"{vae_run.held_out[index]:.2f}" for index in chosen))
    console.print(table)
