"""Benchmark results as a table, and as a picture from the CSV."""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from genfast.benchmarks.harness import Row

__all__ = ["machine", "plot", "print_rows", "show_time"]

WIN, LOSS, INK = "#2a78d6", "#d1495b", "#333333"


def machine(device: str) -> dict[str, Any]:
    """The facts that go with every result."""
    import genfast
    from genfast import collect_env

    is_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "cpu": collect_env.cpu_model(),
        "isa": collect_env.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "driver": collect_env.driver_version() or "",
        "genfast": genfast.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The commit of the sources that hold this file, or nothing in an installed genfast."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return ""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def show_time(microseconds: float | None) -> str:
    """A time in the unit that suits it."""
    if microseconds is None:
        return "-"
    for limit, unit, scale in ((1e3, "µs", 1.0), (1e6, "ms", 1e-3)):
        if microseconds < limit:
            return f"{microseconds * scale:.3g} {unit}"
    return f"{microseconds * 1e-6:.3g} s"


def _ratio(value: float | None, *, color: bool = False) -> str:
    if value is None:
        return "-"
    text = f"{value:.2f}x" if value < 10 else f"{value:.0f}x"
    return f"[{'green' if value >= 1 else 'bold red'}]{text}[/]" if color else text


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """One block a case, one line a contender; where genfast loses, its speed-up is red and below 1."""
    groups: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        title = " ".join(part for part in (row.op, row.variant, row.shape, row.dtype) if part)
        groups.setdefault(title, {}).setdefault(row.contender, {})[row.pages] = row
    any_kept = any(row.pages == "kept" for row in rows)
    kept = ", kept: with pages kept (see the harness)" if any_kept else ""
    console.print(f"speed-up: how many times faster genfast is than the line's contender{kept}", highlight=False)
    console.print(_block(any_kept, header=True))
    notes: list[str] = []
    for title, contenders in groups.items():
        table = _block(any_kept, header=False)
        for name, by_pages in contenders.items():
            table.add_row(*_cells(name, by_pages, contenders.get("genfast", {}), any_kept))
            for pages, row in by_pages.items():
                note = row.status if row.status != "ok" else row.targets
                if note:
                    notes.append(f"{title}, {name}{', pages kept' if pages == 'kept' else ''}: {note}")
        console.print(title, style="bold", highlight=False)
        console.print(table)
    for note in notes:
        bad = any(word in note for word in ("MISSED", "refused", "failed"))
        console.print(note, highlight=False, markup=False, style="red" if bad else "")


def _block(any_kept: bool, header: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=header)
    table.add_column("", width=26, no_wrap=True)
    columns = [("median", 8), ("spread", 6), ("speed-up", 8)]
    columns += [("kept", 8), ("speed-up", 8)] if any_kept else []
    for title, width in (*columns, ("x floor", 7)):
        table.add_column(title, justify="right", no_wrap=True, width=width)
    return table


def _cells(name: str, by_pages: dict[str, Row], ours: dict[str, Row], any_kept: bool) -> list[str]:
    default, kept = by_pages.get("default"), by_pages.get("kept")
    row = default or next(iter(by_pages.values()))
    if row.median_us is None:
        return [f"  {name}", row.status.split(":")[0]]
    spread = f"±{(row.high_us - row.low_us) / 2 / row.median_us:.0%}" if row.low_us and row.high_us else ""
    median = default.median_us if default else None
    cells = [f"  {name}", show_time(median), spread, _speedup(ours.get("default"), default)]
    if any_kept:
        cells += [show_time(kept.median_us) if kept else "", _speedup(ours.get("kept"), kept)]
    return [*cells, f"{row.vs_floor:.1f}" if row.vs_floor else ""]


def _speedup(ours: Row | None, other: Row | None) -> str:
    if ours is None or other is None or ours is other or ours.median_us is None or other.median_us is None:
        return ""
    return _ratio(other.median_us / ours.median_us, color=True)


def plot(csv_path: Path | str, png_path: Path | str) -> None:
    """Draws genfast's speed-up over eager and over the best rival, by op and size, from a CSV of ``write_csv``.

    Raises:
        ModuleNotFoundError: where matplotlib is missing.
        ValueError: if the CSV has no comparison to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with Path(csv_path).open(newline="") as file:
        found = list(csv.DictReader(file))
    lines = [row for row in found if row["contender"] == "genfast" and (row["vs_eager"] or row["vs_best_rival"])]
    if not lines:
        raise ValueError(f"{csv_path} holds no row of genfast with a rival beside it: nothing to draw")
    lines.reverse()
    labels = [
        f"{row['op']} {row['variant']}\n{row['shape']} {row['dtype']}{', pages kept' if row['pages'] == 'kept' else ''}"
        for row in lines
    ]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.55 * len(lines)), layout="constrained")
    for column, shift, alpha in (("vs_eager", 0.2, 1.0), ("vs_best_rival", -0.2, 0.55)):
        values = [float(row[column] or "nan") for row in lines]
        colors = [LOSS if value < 1 else WIN for value in values]
        axes.barh([i + shift for i in range(len(lines))], [v - 1 for v in values], 0.36, 1, color=colors, alpha=alpha)
        for i, (value, row) in enumerate(zip(values, lines, strict=True)):
            name = "eager" if column == "vs_eager" else row["best_rival"]
            if value == value:
                place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
                axes.annotate(f"{value:.2g}x {name}", (max(value, 1.0), i + shift), fontsize=8, color=INK, **place)
    axes.axvline(1.0, color=INK, linewidth=1)
    axes.margins(y=0.02)
    axes.set_xscale("log")
    axes.set_xlim(*_limits(lines))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(range(len(lines)), labels, fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    first = found[0]
    axes.set_title(
        f"Speed-up of genfast over eager (dark) and over the best rival (light); red: genfast is slower\n"
        f"{first['device']}, {first['cpu']}, {first['threads']} threads, torch {first['torch']}",
        fontsize=9, loc="left",
    )  # fmt: skip
    figure.savefig(png_path, dpi=130)
    pyplot.close(figure)


def _limits(lines: Iterable[dict[str, str]]) -> tuple[float, float]:
    values = [float(row[column]) for row in lines for column in ("vs_eager", "vs_best_rival") if row[column]]
    return min(0.7, 0.8 * min(values)), 2.5 * max(values)
