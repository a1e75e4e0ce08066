"""What ``genfast train`` and ``genfast sample`` do once their arguments are parsed."""

from __future__ import annotations

import csv
import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from genfast.data import read_csv, read_rows
from genfast.training import checkpoint, sampling
from genfast.training.families import MODELS, Family, family_of, start
from genfast.training.families import train as train_epochs
from genfast.training.run import Column, Options, Run, Split, prepare

__all__ = ["sample", "train"]


def train(
    model: str,
    given: Mapping[str, Any],
    data: str,
    device: str,
    out: Path,
    resume: bool,
    overwrite: bool,
    pictures: Path | None,
    console: Console,
) -> None:
    """Trains, prints a line an epoch, and keeps a checkpoint and a log.

    Args:
        model: one of ``MODELS``.
        given: the fields of its options that the user gave; with ``resume`` the others come from the checkpoint.
        data: see ``read_rows``.
        device: where to train.
        out: the checkpoint, a .safetensors file; the log has the same name and ends in .log.csv.
        resume: go on from ``out``.
        overwrite: replace ``out``.
        pictures: folder to draw an autoencoder or a GAN in at the end, a GAN also after each epoch; it is made where it
            is missing.
        console: where to print.

    Raises:
        OSError, ValueError: with a message for the user.
    """
    family = family_of(model)
    _check_given(model, family, given)
    if pictures is not None and family.pictures is None:
        raise ValueError(
            f"--pictures is for {', '.join(_models_where(lambda other: other.pictures is not None))}, not for {model}"
        )
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {out}")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite do not go together")
    if not resume and not overwrite and out.exists():
        raise ValueError(f"{out} exists: pass --resume to go on from it, --overwrite to replace it, or another --out")
    if resume:
        run = checkpoint.load(out, device)
        run.options = _resumed(run, {"model": model, **given}, out)
        rows = read_rows(data, run.options.scale, run.options.size)
    else:
        if data.startswith("images:") and "likelihood" in _fields(family):
            given = {"likelihood": "discretized_logistic", **given}
        options: Any = family.options(**{"model": model, **given})
        rows = read_rows(data, options.scale, options.size)
        run = start(options, rows, device)
    split = prepare(run, rows)
    shape = None if pictures is None else sampling.image_shape(run, run.columns)
    artist: Any = None if pictures is None else importlib.import_module(f"genfast.training.{family.pictures}")
    options = run.options
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    console.print(
        f"{model} {run.sizes}, {parameters:,} parameters; {len(split.train)} training rows, "
        f"{len(split.held_out)} held out" + (f"; goes on after {run.place_text}" if resume else ""),
        highlight=False,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log.csv")
    columns = [*family.measures._fields, "learning_rate"]
    _start_log(log, columns, run.place if resume else None)
    table = _table(run, split)
    console.print("  ".join(column.title for column in table), style="bold", highlight=False)
    with _progress(console) as progress:
        bar = progress.add_task("", total=1.0)

        def show(part: float) -> None:
            progress.update(bar, completed=part, description=f"epoch {run.epoch + 1} of {options.epochs}")

        for measures in train_epochs(run, split, show if console.is_terminal else None):
            checkpoint.save(run, out)
            with log.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(_cells((*measures, options.lr)))
            console.print(_line(measures, table), highlight=False)
            if pictures is not None and hasattr(artist, "draw_epoch"):
                artist.draw_epoch(run, shape, pictures)
            progress.reset(bar)
    console.print(f"wrote {out} and {log}", highlight=False)
    if pictures is not None:
        with log.open(newline="") as file:
            names = artist.draw(run, split, list(csv.DictReader(file)), shape, pictures)
        console.print(f"pictures in {pictures}/: {', '.join(names)}", highlight=False)


def _fields(family: Family) -> set[str]:
    return {field.name for field in dataclasses.fields(family.options)}


def _models_where(holds: Callable[[Family], bool]) -> list[str]:
    return [name for name in MODELS if holds(family_of(name))]


def _check_given(model: str, family: Family, given: Iterable[str]) -> None:
    for name in given:
        if name not in _fields(family):
            fitting = _models_where(lambda other, name=name: name in _fields(other))  # type: ignore[misc]
            raise ValueError(f"--{name.replace('_', '-')} is for {', '.join(fitting)}, not for {model}")


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(30), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _resumed(run: Run, values: Mapping[str, Any], out: Path) -> Options:
    saved: Any = run.options
    changed = {name: value for name, value in values.items() if value != getattr(saved, name, None)}
    if "model" in changed:
        raise ValueError(f"{out} was trained with model={saved.model}, not {values['model']}: start anew")
    for name in changed:
        if name not in saved.FREE:
            raise ValueError(f"{out} was trained with {name}={getattr(saved, name)}, not {values[name]}: start anew")
    methods = getattr(saved, "method", None), changed.get("method")
    if "pt" in methods and {"method", "temperatures"} & changed.keys():
        raise ValueError(f"{out}: its chains cannot change to or from {saved.temperatures} temperatures: start anew")
    run.options = dataclasses.replace(saved, **changed)
    if run.finished:
        raise ValueError(f"{out} has had its {run.epoch} epochs; give more with --epochs")
    options: Options = run.options
    return options


def _start_log(log: Path, columns: list[str], place: tuple[int, ...] | None) -> None:
    """A header, and on resuming the lines up to the checkpoint's place."""
    kept: list[list[str]] = []
    if place is not None and log.exists():
        with log.open(newline="") as file:
            found = list(csv.reader(file))
        if found and found[0] == columns:
            kept = [row for row in found[1:] if len(row) == len(columns) and _before(row, place)]
    with log.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([columns, *kept])


def _before(row: list[str], place: tuple[int, ...]) -> bool:
    cells = row[: len(place)]
    return all(cell.isdecimal() for cell in cells) and tuple(map(int, cells)) <= place


def _cells(values: Iterable[Any]) -> list[Any]:
    return ["" if value is None else f"{value:.6g}" if isinstance(value, float) else value for value in values]


def _table(run: Run, split: Split) -> list[Column]:
    """What to print of these data."""
    classes = 0 if split.labels is None else int(split.labels.max()) + 1
    return [
        column._replace(title=column.title.format(classes=classes))
        for column in run.table
        if classes or not column.labelled
    ]


def _line(measures: Any, table: list[Column]) -> str:
    """The measures, each below its title."""
    cells = []
    for column in table:
        value = getattr(measures, column.field)
        text = "-" if value is None else format(value + column.offset, column.format)
        cells.append(text.rjust(len(column.title)))
    return "  ".join(cells)


def sample(
    model: Path,
    n: int,
    steps: int | None,
    seed: int,
    beta: float | None,
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
    picture = sampling.image_shape(run, run.visible if means else run.columns, shape) if out.suffix == ".png" else None
    held = None if clamp is None else read_csv(clamp, missing=True)
    values = sampling.sample(run, n, steps, seed=seed, beta=beta, clamp=held, means=means)
    sampling.write(values, out, picture)
