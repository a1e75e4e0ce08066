"""The tables of docs/kernels/attention.md from the CSV of ``genfast bench attention attention_gpt attention_sweep``.

python -m genfast.benchmarks.ops.attention_table benchmarks/results/cpu-epyc-zen3/attention.csv
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from genfast.benchmarks.report import show_time

__all__ = ["sweep_table", "table"]

NAMES = ("genfast", "eager", "SDPA", "compiled")
Rows = list[dict[str, str]]


def _cases(rows: Iterable[dict[str, str]]) -> dict[tuple[str, str, str], dict[str, dict[str, str]]]:
    found: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["shape"], row["dtype"], row["variant"]), {})[row["contender"]] = row
    return found


def _time(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    return show_time(float(row["median_us"])) if row["median_us"] else row["status"].split(":")[0]


def _speedup(row: dict[str, str]) -> str:
    return f"{float(row['vs_best_rival']):.2f} ({_shown(row['best_rival'])})" if row["vs_best_rival"] else ""


def _shown(contender: str) -> str:
    return contender.replace("eager", "plain")


def _aims(row: dict[str, str]) -> str:
    """What was aimed at and whether it was met, from "1.2x SDPA (target 1.5x: MISSED); ..."."""
    found = re.findall(r"x ([^;(]+) \(target (\S+)x: (\w+)\)", row["targets"])
    return "; ".join(f"{aim}x {_shown(name)}: {result.lower()}" for name, aim, result in found)


def table(rows: Rows) -> str:
    """One line a case of ``attention`` and ``attention_gpt``: times, speed-up over the best rival, aims, floor."""
    lines = [
        "| (B, H, S, D) | dtype | what | genfast | plain | SDPA | compiled | x best rival | aim | x floor |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (shape, dtype, variant), found in _cases(r for r in rows if r["op"] != "attention_sweep").items():
        ours = found["genfast"]
        floor = f"{float(ours['vs_floor']):.1f}" if ours["vs_floor"] else ""
        times = " | ".join(_time(found.get(name)) for name in NAMES)
        cells = (shape.replace("x", ", "), dtype, variant, times, _speedup(ours), _aims(ours), floor)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sweep_table(rows: Rows) -> str:
    """Speed-ups over the best of SDPA and the plain formula by length, the smallest over head dims; the worst cell."""
    ours = [r for r in rows if r["op"] == "attention_sweep" and r["contender"] == "genfast" and r["vs_best_rival"]]
    cells = [r for r in ours if not r["variant"].startswith("worst")]
    if not cells:
        return ""
    lengths = sorted({int(r["shape"].split("x")[2]) for r in cells})
    lines = [f"| | {' | '.join(map(str, lengths))} |", f"| --- |{' --- |' * len(lengths)}"]
    for dtype, variant in dict.fromkeys((r["dtype"], r["variant"]) for r in cells):
        line = [f"{dtype}, {variant}"]
        for length in lengths:
            some = [
                float(r["vs_best_rival"])
                for r in cells
                if (r["dtype"], r["variant"], int(r["shape"].split("x")[2])) == (dtype, variant, length)
            ]
            line.append(f"{min(some):.2f}" if some else "")
        lines.append(f"| {' | '.join(line)} |")
    low = min(cells, key=lambda r: float(r["vs_best_rival"]))
    lines += ["", f"Worst cell: {low['dtype']}, {low['variant']}, {low['shape']}: {_speedup(low)}."]
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(f"usage: {__doc__.splitlines()[2]}")
    rows: Rows = []
    for path in sys.argv[1:]:
        with Path(path).open(newline="") as file:
            rows += csv.DictReader(file)
    print(table(rows))
    print()
    print(sweep_table(rows))


if __name__ == "__main__":
    main()
