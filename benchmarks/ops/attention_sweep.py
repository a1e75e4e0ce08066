"""Attention over all lengths and head dims, to find where it is slowest beside the best of SDPA and the plain formula.

320 cells: lengths x head dims x {full, causal} x {float32, bfloat16} x {forward, forward and backward}. The last row
repeats the worst cell. A contender that was ``_HOPELESS`` times slower than the best at one length is left out at the
next: on a CPU without bfloat16 products that is the plain formula.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch

from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Row, Settings
from genfast.benchmarks.ops import _attention as shared
from genfast.benchmarks.ops._attention import BEST, Workload

__all__ = ["LENGTHS", "WIDTHS", "cases", "run", "series", "workload", "worst"]

LENGTHS = (16, 64, 128, 197, 256, 333, 512, 1024, 2048, 4096)
WIDTHS = (32, 64, 80, 128)
AIM = 0.95
_HOPELESS = 8.0
_SHARE = 0.25  # of the seconds that a case of other benchmarks takes


def workload(length: int, width: int, dtype: torch.dtype, causal: bool) -> Workload:
    """Fewer examples and heads where they are long."""
    return Workload(max(1, min(8, 1024 // length)), 8 if length < 2048 else 4, length, width, dtype, causal=causal)


def series(settings: Settings) -> Iterator[list[Case]]:
    """For each combination of the rest, the cases of all lengths; ``quick`` takes two lengths of one head dim."""
    lengths, widths = ((64, 197), (64,)) if settings.quick else (LENGTHS, WIDTHS)
    dtypes = (torch.float32,) if settings.quick else (torch.float32, torch.bfloat16)
    for width, causal, dtype, variant in itertools.product(
        widths, (False, True), dtypes, ("forward", "forward+backward")
    ):
        yield [
            dataclasses.replace(
                shared.case(workload(length, width, dtype, causal), variant, settings, targets={BEST: AIM}),
                op="attention_sweep",
            )
            for length in lengths
        ]


def cases(settings: Settings) -> list[Case]:
    return list(itertools.chain.from_iterable(series(settings)))


def _hopeless(rows: list[Row]) -> set[str]:
    times = {row.contender: row.median_us for row in rows if row.median_us is not None}
    best = min((time for name, time in times.items() if name != "genfast"), default=0.0)
    return {name for name, time in times.items() if name != "genfast" and time > _HOPELESS * best}


def worst(rows: list[Row]) -> list[Row]:
    """genfast's row with the smallest speed-up, once more, named as such; and one if a cell has no time of genfast."""
    ours = [row for row in rows if row.contender == "genfast"]
    failed = [row for row in ours if row.median_us is None]
    timed = [row for row in ours if row.vs_best_rival is not None]
    found = failed[:1] + sorted(timed, key=lambda row: row.vs_best_rival or 0.0)[:1]
    return [dataclasses.replace(row, variant=f"worst of {len(ours)} cells: {row.variant}") for row in found]


def run(
    settings: Settings, bandwidth: float | None = None, progress: Callable[[str], None] = lambda _: None
) -> list[Row]:
    bandwidth = harness.copy_bandwidth(settings.device) if bandwidth is None else bandwidth
    shorter = dataclasses.replace(settings, seconds=settings.seconds * _SHARE)
    rows: list[Row] = []
    for line in series(shorter):
        left_out: set[str] = set()
        for case in line:
            some = {name: call for name, call in case.contenders.items() if name not in left_out}
            found = shared.run_cases([dataclasses.replace(case, contenders=some)], shorter, bandwidth, progress)
            left_out |= _hopeless(found)
            rows += found
    return rows + worst(rows)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "attention_sweep", *sys.argv[1:]])
