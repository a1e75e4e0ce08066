"""What the reproductions share: data, options, tables of published figures beside ours, CSV files and pictures."""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from genfast.benchmarks import report
from genfast.ops import rbm_free_energy, rbm_log_z_exact

__all__ = [
    "Digits", "Line", "OutOption", "DataOption", "QuickOption", "SeedsOption", "ThreadsOption", "binarize",
    "exact_log_likelihood", "finish", "images", "load_digits", "load_ratings", "mean_and_error", "parse_seeds",
    "pyplot", "read_idx", "start", "tile",
]  # fmt: skip

OutOption = Annotated[Path | None, typer.Option("--out", help="Folder for the CSV files and pictures.")]
DataOption = Annotated[Path | None, typer.Option("--data", help="Folder with the data; else $GENFAST_DATA.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="A run of seconds on small data, to see that it works.")]
SeedsOption = Annotated[str, typer.Option("--seeds", help="Seeds, as 0-9 or 0,3,5.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="Threads of torch; its own choice by default.")]

_IDX_DTYPES = {0x08: torch.uint8}  # the only type that MNIST has


@dataclass(frozen=True)
class Line:
    """One line of a table: a published figure, and ours as one value a seed.

    Attributes:
        quantity: what was measured.
        values: our figures, one a seed.
        published: the published figure, None where there is none.
        source: who published it, and where its setting differs.
    """

    quantity: str
    values: Sequence[float]
    published: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Digits:
    """Images of digits, rows of grey values in [0, 1], and their labels.

    ``note`` says which images these are and how that differs from the 60,000 and 10,000 of MNIST.
    """

    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor
    note: str
    name: str = field(default="mnist")

    @property
    def side(self) -> int:
        return math.isqrt(self.train.shape[1])


def parse_seeds(text: str) -> list[int]:
    """Seeds from ``"0-9"``, ``"0,3,5"`` or ``"0-2,7"``.

    Raises:
        ValueError: for anything else, or an empty range.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ValueError(f"seeds must look like 0-9 or 0,3,5, got {text!r}")
        seeds += range(int(first), int(last if dash else first) + 1)
    return seeds


def start(threads: int | None, seeds: str, quick: bool, quick_seeds: int = 2) -> list[int]:
    """Sets the threads; the seeds of this run, the first few in a quick one."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        chosen = parse_seeds(seeds)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return chosen[:quick_seeds] if quick else chosen


# ---- data --------------------------------------------------------------------------------------------------------


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def read_idx(path: Path | str) -> Tensor:
    """The array of an IDX file of unsigned bytes, gzip-compressed where its name ends in .gz.

    Raises:
        ValueError: if it is no such file, or is cut short.
    """
    path = Path(path)
    with _open(path) as file:
        head = file.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_DTYPES:
            raise ValueError(f"{path.name} is no IDX file of unsigned bytes: it begins with {head.hex()}")
        shape = [int.from_bytes(file.read(4), "big") for _ in range(head[3])]
        body = file.read()
    if len(body) != math.prod(shape):
        raise ValueError(f"{path.name} should hold {'x'.join(map(str, shape))} bytes after its header, not {len(body)}")
    return torch.frombuffer(bytearray(body), dtype=_IDX_DTYPES[head[2]]).view(shape)


def _find(folder: Path | None, stem: str) -> Path | None:
    if folder is None:
        return None
    return next((path for path in (folder / f"{stem}.gz", folder / stem) if path.exists()), None)


def _folder(data: Path | None) -> Path | None:
    if data is None and os.environ.get("GENFAST_DATA"):
        data = Path(os.environ["GENFAST_DATA"])
    return data


def load_digits(data: Path | None, quick: bool) -> Digits:
    """MNIST from a folder of its IDX files; in a quick run, scikit-learn's 8 x 8 digits, which need no folder.

    Without the 60,000 training images, the 10,000 test images are split: the first 8,000 train, the last 2,000 test.

    Raises:
        typer.BadParameter: if the folder has neither.
    """
    if quick:
        from sklearn.datasets import load_digits as small

        bundle = small()
        x, y = torch.tensor(bundle.data, dtype=torch.float32) / 16, torch.tensor(bundle.target)
        note = "quick: scikit-learn's 8 x 8 digits, 600 train, 200 test; the published figures are not for these"
        return Digits(x[:600], x[600:800], y[:600], y[600:800], note, "digits")
    folder = _folder(data)
    test, labels = _find(folder, "t10k-images-idx3-ubyte"), _find(folder, "t10k-labels-idx1-ubyte")
    if test is None or labels is None:
        raise typer.BadParameter(
            "needs MNIST: set GENFAST_DATA or --data to a folder with t10k-images-idx3-ubyte.gz and "
            "t10k-labels-idx1-ubyte.gz (and train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz where you have "
            "them), or pass --quick"
        )
    x, y = read_idx(test).flatten(1) / 255, read_idx(labels).long()
    train, train_labels = _find(folder, "train-images-idx3-ubyte"), _find(folder, "train-labels-idx1-ubyte")
    if train is not None and train_labels is not None:
        note = "MNIST: 60,000 training and 10,000 test images, as published"
        return Digits(read_idx(train).flatten(1) / 255, x, read_idx(train_labels).long(), y, note)
    cut = len(x) * 4 // 5
    note = (
        f"NOT the published data: the {len(x):,} MNIST test images alone, the first {cut:,} to train and the last "
        f"{len(x) - cut:,} to test; published figures train on 60,000 and test on 10,000"
    )
    return Digits(x[:cut], x[cut:], y[:cut], y[cut:], note)


def binarize(grey: Tensor, seed: int | None = None) -> Tensor:
    """0/1 pixels: on from half the range (PyDeep's rule), or with ``seed`` drawn once with the grey value's chance."""
    if seed is None:
        return (grey >= 0.5).float()
    return torch.bernoulli(grey, generator=torch.Generator().manual_seed(seed))


def load_ratings(data: Path | None, quick: bool) -> tuple[Tensor, Tensor, Tensor, str]:
    """(users, items, ratings, note), ids from 0: MovieLens-100k, or in a quick run made-up ratings of low rank.

    Raises:
        typer.BadParameter: if there is no movielens-100k.csv.gz in the folder.
        ValueError: if it lacks a column.
    """
    if quick:
        generator = torch.Generator().manual_seed(0)
        taste = torch.randn(60, 2, generator=generator) @ torch.randn(2, 40, generator=generator)
        likes = 3.5 + taste + torch.randn(40, generator=generator) * 0.5
        seen = torch.rand(60, 40, generator=generator) < 0.5
        users, items = seen.nonzero(as_tuple=True)
        return users, items, likes.round().clamp(1, 5)[seen], "quick: made-up ratings of 60 users and 40 items"
    path = _find(_folder(data), "movielens-100k.csv")
    if path is None:
        raise typer.BadParameter("needs movielens-100k.csv.gz in the folder GENFAST_DATA or --data; or pass --quick")
    users, items, ratings = read_ratings(path)
    note = f"MovieLens-100k: {len(ratings):,} ratings of {int(users.max()) + 1} users, {int(items.max()) + 1:,} items"
    return users, items, ratings, note


def read_ratings(path: Path | str) -> tuple[Tensor, Tensor, Tensor]:
    """(users, items, ratings) of a CSV with these columns and ids from 1; the ids returned count from 0."""
    path = Path(path)
    with _open(path) as packed, io.TextIOWrapper(packed, newline="") as file:
        reader = csv.DictReader(file)
        missing = {"user", "item", "rating"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path.name} has no column {', '.join(sorted(missing))}")
        rows = [(int(row["user"]), int(row["item"]), float(row["rating"])) for row in reader]
    users, items, ratings = zip(*rows, strict=True)
    return torch.tensor(users) - 1, torch.tensor(items) - 1, torch.tensor(ratings)


# ---- figures -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def exact_log_likelihood(rbm: Any, *sets: Tensor) -> tuple[float, ...]:
    """(log Z, mean log p(v) over each set) of a small bernoulli RBM, in nats, log Z by enumeration in float64."""
    log_z = rbm_log_z_exact(rbm.W, rbm.b, rbm.c).item()
    return log_z, *(mean_unnormalized(rbm, v) - log_z for v in sets)


@torch.no_grad()
def mean_unnormalized(rbm: Any, v: Tensor) -> float:
    """Mean of -F(v) over the rows, so that minus log Z it is the mean log-likelihood."""
    return -rbm_free_energy(v, rbm.W, rbm.b, rbm.c).double().mean().item()


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds, NaN for one."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def _show(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def finish(
    name: str,
    title: str,
    lines: Sequence[Line],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    out: Path | None,
    quick: bool,
    seeds: Sequence[int],
    note: str,
) -> Path:
    """Prints the table, writes it as table.csv and every other table as <name>.csv, and returns their folder.

    Args:
        name: of the reproduction.
        title: of the table.
        lines: its lines.
        tables: file stem to rows: what each seed gave, curves.
        out: the folder; None for ``benchmarks/results/reproduce/<name>`` of the checkout (``results/local`` in a quick
            run), or ``reproduce/<name>`` in the current folder where genfast is installed.
        quick: whether it was a quick run.
        seeds: of the run.
        note: on the data and where the setting differs from the published one.
    """
    place = output_folder(name, out, quick)
    facts = {**report.machine("cpu"), "seeds": " ".join(map(str, seeds)), "note": note, "command": _command(name)}
    rows = []
    for line in lines:
        mean, error = mean_and_error(line.values)
        rows.append(
            {
                "quantity": line.quantity, "published": line.published, "ours": mean, "standard_error": error,
                "runs": len(line.values), "source": line.source,
            }
        )  # fmt: skip
    write_csv(place / "table.csv", rows, facts)
    for stem, found in tables.items():
        write_csv(place / f"{stem}.csv", found, facts)
    _print(title, rows, note, place)
    return place


def output_folder(name: str, out: Path | None, quick: bool) -> Path:
    """Where a reproduction's files go, made if need be; see ``finish``."""
    place = out or _default_folder(name, quick)
    place.mkdir(parents=True, exist_ok=True)
    return place


def _command(name: str) -> str:
    hidden = {"--out", "--data"}  # paths of this machine
    words = [word for i, word in enumerate(sys.argv[1:]) if word not in hidden and sys.argv[i] not in hidden]
    return " ".join([f"python -m genfast.benchmarks.reproduce.{name}", *words])


def _default_folder(name: str, quick: bool) -> Path:
    benchmarks = Path(__file__).resolve().parents[1]
    if not (benchmarks.parent / ".git").exists():
        return Path("reproduce") / name
    return benchmarks / "results" / ("local/reproduce" if quick else "reproduce") / name


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Writes rows in the columns that any has, floats to six digits; the facts of the run stand in the first row."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, *facts])
        for index, row in enumerate(rows):
            cells = [_cell(row.get(column)) for column in columns]
            writer.writerow([*cells, *(facts.values() if index == 0 else [""] * len(facts))])


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _print(title: str, rows: Iterable[Mapping[str, Any]], note: str, place: Path) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 140
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), title_style="bold")
    table.add_column("", overflow="fold")
    for heading in ("published", "ours", "± s.e.", "runs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("published by", overflow="fold")
    for row in rows:
        figures = [_show(row[key]) for key in ("published", "ours", "standard_error")]
        table.add_row(row["quantity"], *figures, str(row["runs"]), row["source"])
    console.print(table)
    console.print(note, style="yellow", highlight=False, markup=False)
    console.print(f"written to {place}", highlight=False, markup=False, soft_wrap=True)


# ---- pictures ----------------------------------------------------------------------------------------------------


def pyplot() -> Any:
    """matplotlib.pyplot without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def tile(rows: Tensor, side: int, columns: int) -> Tensor:
    """Images [N, side * side] as one picture, ``columns`` a line, with a border of one pixel of NaN."""
    count = -(-len(rows) // columns)
    picture = torch.full((count * (side + 1) - 1, columns * (side + 1) - 1), math.nan)
    for index, row in enumerate(rows):
        top, left = (index // columns) * (side + 1), (index % columns) * (side + 1)
        picture[top : top + side, left : left + side] = row.view(side, side)
    return picture


def images(path: Path, pictures: Mapping[str, Tensor], *, symmetric: bool = False) -> None:
    """Saves pictures side by side; ``symmetric`` puts 0 at the middle of a diverging scale."""
    plot = pyplot()
    figure, axes = plot.subplots(
        1, len(pictures), figsize=(4 * len(pictures), 4.2), layout="constrained", squeeze=False
    )
    for axis, (title, picture) in zip(axes[0], pictures.items(), strict=True):
        limit = picture.nan_to_num().abs().max().item()
        scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if symmetric else {"cmap": "gray_r"}
        axis.imshow(picture.numpy(), interpolation="nearest", **scale)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(path, dpi=100)
    plot.close(figure)
