"""What reproductions of many runs share: the options that choose runs, and the rows that an earlier call left."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["KernelsOption", "ResumeOption", "check_steps", "chosen", "kept", "sides"]

KERNELS = ("on", "off", "both")
KernelsOption = Annotated[str, typer.Option("--kernels", help="on, off (plain PyTorch) or both.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Keep what the folder has of such runs.")]


def kept(path: Path, kinds: Mapping[str, Callable[[str], Any]], wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run's file whose columns are as ``wanted``; of the columns those in ``kinds``."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [{key: kind(row[key]) for key, kind in kinds.items() if row.get(key)} for row in csv.DictReader(file)]
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def chosen(name: str, given: str, known: tuple[str, ...]) -> list[str]:
    """The parts of an option such as ``--methods``, all of them for ``all``.

    Raises:
        typer.BadParameter: for others than the known.
    """
    parts = list(known) if given == "all" else given.split(",")
    if not set(parts) <= set(known):
        raise typer.BadParameter(f"{name} must be of {', '.join(known)}, got {given}")
    return parts


def sides(kernels: str) -> tuple[str, ...]:
    """("on",), ("off",) or both.

    Raises:
        typer.BadParameter: for another word.
    """
    if kernels not in KERNELS:
        raise typer.BadParameter(f"--kernels must be one of {', '.join(KERNELS)}, got {kernels}")
    return ("on", "off") if kernels == "both" else (kernels,)


def check_steps(steps: int | None) -> None:
    """Raises ``typer.BadParameter`` for fewer than 1."""
    if steps is not None and steps < 1:
        raise typer.BadParameter(f"--steps must be at least 1, got {steps}")
