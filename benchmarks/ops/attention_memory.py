"""Peak memory of attention beside PyTorch's, each call in a process of its own: how far it lifts the resident set.

python -m genfast.benchmarks.ops.attention_memory --csv memory.csv

Counts what the call allocates (outputs, gradients, work space), not its inputs. Linux only.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from genfast.benchmarks import report
from genfast.benchmarks.harness import Settings
from genfast.benchmarks.ops import _attention as shared
from genfast.benchmarks.ops._attention import Workload

__all__ = ["CELLS", "measure", "rise"]

LONG = 4096
CELLS: dict[str, tuple[Workload, str]] = {
    "plain": (Workload(1, 8, LONG, 64), "forward+backward"),
    "dropout": (Workload(1, 8, LONG, 64, dropout_p=0.1), "forward+backward"),
    "softcap": (Workload(1, 8, LONG, 64, softcap=30.0), "forward+backward"),
    "bias per key": (Workload(1, 8, LONG, 64, bias=(1, 8, 1, LONG)), "forward+backward"),
    "bias shared by heads": (Workload(1, 8, LONG, 64, bias=(1, 1, LONG, LONG)), "forward+backward"),
    "double backward": (Workload(1, 2, LONG, 64), "double backward"),
}


def _peak() -> int:
    """The largest resident set so far, in bytes; ru_maxrss would begin at that of the parent process."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("/proc/self/status has no VmHWM")
    return int(found[1]) * 1024


def rise(cell: str, contender: str) -> int:
    """Bytes by which one call lifts this process's peak; after a call on small tensors, which loads what is lazy."""
    w, variant = CELLS[cell]
    settings = Settings(compiled=False)
    small = Workload(1, 1, 32, 64, bias=None if w.bias is None else (1, 1, 1, 32), softcap=w.softcap)
    for workload in (small, w):
        made = shared.case(workload, variant, settings)
        inputs = made.inputs()
        before = _peak()
        made.contenders[contender](*inputs)
    return _peak() - before


def measure(cell: str, contender: str) -> int:
    """``rise`` in a new process."""
    command = [sys.executable, "-m", "genfast.benchmarks.ops.attention_memory", "--one", cell, contender]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the results here")
    parser.add_argument("--one", nargs=2, metavar=("CELL", "CONTENDER"), help="measure in this process")
    options = parser.parse_args()
    if options.one:
        print(rise(*options.one))
        return
    rows: list[dict[str, Any]] = []
    facts = report.machine("cpu")
    for cell, (w, variant) in CELLS.items():
        names = list(shared.case(w, variant, Settings(compiled=False)).contenders)
        taken = {name: measure(cell, name) for name in names}
        for name, size in taken.items():
            ratio = size / taken["genfast"]
            print(f"{cell:24} {variant:18} {name:8} {size / 2**20:10.1f} MiB {ratio:8.1f} x genfast's", flush=True)
            shape = "x".join(map(str, w.shape))
            rows.append(
                {"cell": cell, "variant": variant, "shape": shape, "contender": name, "bytes": size, "ratio": ratio}
            )
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *facts], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **facts} for row in rows)


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("peak memory is measured on Linux only")
    torch.manual_seed(0)
    main()
