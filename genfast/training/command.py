"""What ``genfast train`` and ``genfast sample`` do once their arguments are parsed."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from genfast.data import read_csv, read_rows
from genfast.training import checkpoint, sampling
from genfast.training.loop import Measures
from genfast.training.loop import train as train_epochs
from genfast.training.run import Options, Run, prepare, start

__all__ = ["FIELDS", "sample", "train"]

FIELDS = frozenset(field.name for field in dataclasses.fields(Options))
_FREE = frozenset(("epochs", "batch", "lr", "momentum", "weight_decay", "method", "k", "temperatures"))
_COLUMNS = (*Measures._fields, "learning_rate")


def train(
    values: dict[str, Any],
    given: Iterable[str],
    data: str,
    device: str,
    out: Path,
    resume: bool,
    overwrite: bool,
    console: Console,
) -> None:
    """Trains, prints a line an epoch, and keeps a checkpoint and a log.

    Args:
        values: the fields of ``Options``.
        given: names of those that the user gave; with ``resume`` the others come from the checkpoint.
        data: see ``read_rows``.
        device: where to train.
        out: the checkpoint, a .safetensors file; the log has the same name and ends in .log.csv.
        resume: go on from ``out``.
        overwrite: replace ``out``.
        console: where to print.

    Raises:
        OSError, ValueError: with a message for the user.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {out}")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite do not go together")
    if not resume and not overwrite and out.exists():
        raise ValueError(f"{out} exists: pass --resume to go on from it, --overwrite to replace it, or another --out")
    if resume:
        run = checkpoint.load(out, device)
        run.options = _resumed(run, values, given, out)
        rows = read_rows(data, run.options.scale)
    else:
        options = Options(**values)
        rows = read_rows(data, options.scale)
        run = start(options, rows, device)
    split = prepare(run, rows)
    options = run.options
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    sizes = "-".join(str(size) for size in (run.layers[0].visible, *options.hidden))
    console.print(
        f"{options.model} {sizes}, {parameters:,} parameters; {len(split.train)} training rows, "
        f"{len(split.held_out)} held out" + (f"; goes on after {_place(run)}" if resume else ""),
        highlight=False,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log.csv")
    _start_log(log, run, resume)
    console.print(_header(run), style="bold", highlight=False)
    for measures in train_epochs(run, split):
        checkpoint.save(run, out)
        with log.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(_cells((*measures, options.lr)))
        console.print(_line(measures, run), highlight=False)
    console.print(f"wrote {out} and {log}", highlight=False)


def _resumed(run: Run, values: dict[str, Any], given: Iterable[str], out: Path) -> Options:
    saved = run.options
    changed = {name: values[name] for name in given if name in FIELDS and values[name] != getattr(saved, name)}
    for name in changed:
        if name not in _FREE:
            raise ValueError(f"{out} was trained with {name}={getattr(saved, name)}, not {values[name]}: start anew")
    if "pt" in (saved.method, changed.get("method")) and {"method", "temperatures"} & changed.keys():
        raise ValueError(f"{out}: its chains cannot change to or from {saved.temperatures} temperatures: start anew")
    options = dataclasses.replace(saved, **changed)
    if run.layer + 1 == len(options.hidden) and run.epoch >= options.epochs:
        raise ValueError(f"{out} has had its {run.epoch} epochs; give more with --epochs")
    return options


def _place(run: Run) -> str:
    return f"epoch {run.epoch}" + (f" of layer {run.layer + 1}" if len(run.layers) > 1 else "")


def _start_log(log: Path, run: Run, resume: bool) -> None:
    """A header, and on resuming the lines up to the checkpoint."""
    kept: list[list[str]] = []
    if resume and log.exists():
        with log.open(newline="") as file:
            found = list(csv.reader(file))
        if found and found[0] == list(_COLUMNS):
            kept = [row for row in found[1:] if _before(row, (run.layer, run.epoch))]
    with log.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([_COLUMNS, *kept])


def _before(row: list[str], place: tuple[int, int]) -> bool:
    return (
        len(row) == len(_COLUMNS) and row[0].isdecimal() and row[1].isdecimal() and (int(row[0]), int(row[1])) <= place
    )


def _cells(values: Iterable[Any]) -> list[Any]:
    return ["" if value is None else f"{value:.6g}" if isinstance(value, float) else value for value in values]


_TITLES = ("epoch", "pseudo-likelihood", "free-energy gap", "reconstruction error", "seconds")


def _header(run: Run) -> str:
    return "  ".join((*(("layer",) if len(run.layers) > 1 else ()), *_TITLES))


def _line(measures: Measures, run: Run) -> str:
    """The measures, each below its title."""
    likelihood = measures.pseudo_likelihood
    texts = (
        f"{measures.epoch}",
        "-" if likelihood is None else f"{likelihood:.3f}",
        f"{measures.free_energy_gap:.3f}",
        f"{measures.reconstruction_error:.3f}",
        f"{measures.seconds:.1f}",
    )
    cells = [text.rjust(len(title)) for text, title in zip(texts, _TITLES, strict=True)]
    return "  ".join([f"{measures.layer + 1:5}"] * (len(run.layers) > 1) + cells)


def sample(
    model: Path,
    n: int,
    steps: int,
    seed: int,
    beta: float,
    means: bool,
    clamp: Path | None,
    shape: str | None,
    device: str,
    out: Path,
) -> None:
    """Draws from the checkpoint ``model`` and writes ``out``; see ``sampling.sample``.

    Raises:
        OSError, ValueError: with a message for the user.
    """
    if out.suffix not in sampling.FORMATS:
        raise ValueError(f"--out must end in {', '.join(sampling.FORMATS)}, got {out}")
    run = checkpoint.load(model, device)
    columns = run.layers[0].visible // (1 if means else run.layers[0]._visible_kind.categories)
    picture = sampling.image_shape(run, columns, shape) if out.suffix == ".png" else None
    held = None if clamp is None else read_csv(clamp, missing=True)
    values = sampling.sample(run, n, steps, seed=seed, beta=beta, clamp=held, means=means)
    sampling.write(values, out, picture)
