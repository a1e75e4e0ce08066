"""Times contenders side by side and refuses those whose output is wrong.

A ``Case`` is one workload: inputs, contenders, a check of their outputs, and the bytes that any implementation must
move or the arithmetic that it must do: the floor is the longer of the two times. ``run_case`` checks every contender
first, then times them interleaved, so that a change of the machine's speed meets all alike. On a GPU it times with CUDA
events over rotating inputs that together exceed the caches.

On the CPU, glibc maps fresh pages for every tensor over 32 MiB, which can cost more than the op; large cases are
therefore also timed with pages kept (in a process whose ``MALLOC_*`` settings keep them), in rows of their own.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from genfast.benchmarks import report

__all__ = ["Case", "Row", "Settings", "copy_bandwidth", "matmul_rate", "run_case", "run_cases", "write_csv"]

PAGES_KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}
_ROTATION_BYTES = 512 * 2**20  # several times a GPU's L2 cache


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` ...
        quick: fewer and smaller cases.
        compiled: whether torch.compile'd contenders take part.
        seconds: spent on timing each case.
        seed: of the inputs.
        pages: ``"kept"`` in the process that the harness starts with ``PAGES_KEPT``.
        large_bytes: cases with tensors from this size on are timed with pages kept too; glibc's threshold.
    """

    device: str = "cpu"
    quick: bool = False
    compiled: bool = True
    seconds: float = 4.0
    seed: int = 0
    pages: str = "default"
    large_bytes: int = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        op: the op's stem.
        variant: ``"forward"``, ``"forward+backward"`` ...
        shape: of the input, for the report.
        dtype: of the input.
        inputs: makes one set of inputs, never zeros.
        contenders: name to function of the inputs. ``"genfast"`` is ours, ``"eager"`` the baseline in plain PyTorch,
            ``"compiled"`` or ``"compiled ..."`` are torch.compile'd; ``"genfast ..."`` are ours with other options;
            any other is a rival.
        check: says what is wrong with a contender's output for given inputs, or None.
        floor_bytes: what any implementation must read and write.
        targets: pages setting (``"default"``, ``"kept"``) to baseline, or group, to the speed-up aimed at.
        floor_flops: floating-point operations of the matrix products that any implementation must compute, in
            ``dtype``.
        groups: name to contenders of which a target means the fastest.
        yardsticks: functions that do a part of the work, timed beside the contenders for comparison, not checked.
        items: steps in one call; the times of the rows, floors included, are those of one.
        rest: seconds to wait before each sample, where a contender's idle threads spin on and would slow the next one;
            a call that is not timed follows, as cores that rested are slow at first.
    """

    op: str
    variant: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    contenders: dict[str, Callable[..., Any]]
    check: Callable[[tuple[torch.Tensor, ...], Any], str | None]
    floor_bytes: int
    targets: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    floor_flops: int = 0
    groups: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    yardsticks: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    items: int = 1
    rest: float = 0.0

    @property
    def tensor_bytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclasses.dataclass
class Row:
    """One contender's result in one case, a line of the CSV: microseconds; ``vs_x`` is x's time over this one's."""

    op: str
    variant: str
    shape: str
    dtype: str
    pages: str
    contender: str
    status: str = "ok"
    median_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    rounds: int = 0
    vs_eager: float | None = None
    vs_compiled: float | None = None
    vs_best_rival: float | None = None
    best_rival: str = ""
    floor_us: float | None = None
    vs_floor: float | None = None
    targets: str = ""
    seed: int = 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sample_cpu(function: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def _sample_cuda(function: Callable[[], Any], repeats: int) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(repeats):
        function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e-3 / repeats


def time_interleaved(
    functions: dict[str, Callable[[], Any]], device: torch.device, seconds: float, rounds: int = 5, rest: float = 0.0
) -> dict[str, list[float]]:
    """Seconds a call, one sample a round for each function, the rounds interleaved.

    Args:
        functions: what to time; each has been warmed up.
        device: CUDA times with events.
        seconds: time to spend on all of them together.
        rounds: the least number of samples each.
        rest: seconds to wait before each sample and the untimed call that then precedes it.
    """
    sample = _sample_cuda if device.type == "cuda" else _sample_cpu
    repeats = {name: max(1, min(10_000, int(2e-3 / max(sample(call, 1), 1e-7)))) for name, call in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    done = 0
    while done < rounds or (time.perf_counter() < end and done < 2000):
        for name, call in functions.items():
            if rest:
                time.sleep(rest)
                call()  # after 50 ms of rest even a bare product may take twice its time
            times[name].append(sample(call, repeats[name]))
        done += 1
    return times


def copy_bandwidth(device: str | torch.device, megabytes: int = 256) -> float:
    """Bytes a second, read and written, that copying a large tensor moves on this device; the floor's yardstick."""
    device = torch.device(device)
    source = torch.randn(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = time_interleaved({"copy": lambda: target.copy_(source)}, device, seconds=0.3)["copy"]
    return 2 * source.nbytes / statistics.median(times)


@functools.lru_cache(maxsize=8)
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a large product of PyTorch's, measured once: the floor's other yardstick.

    A product of our own, or one in a lower precision, can beat it: its time is then below the floor.
    """
    where = torch.device(device)
    size = 1024 if where.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=where, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=where, dtype=dtype)
    torch.mm(a, b, out=out)
    times = time_interleaved({"product": lambda: torch.mm(a, b, out=out)}, where, seconds=0.3)["product"]
    return 2 * size**3 / statistics.median(times)


def _new_row(case: Case, settings: Settings, name: str) -> Row:
    shape, dtype = "x".join(map(str, case.shape)), str(case.dtype).removeprefix("torch.")
    return Row(case.op, case.variant, shape, dtype, settings.pages, name, seed=settings.seed)


def _refusal(case: Case, inputs: tuple[torch.Tensor, ...], call: Callable[..., Any]) -> str | None:
    """Why a contender is not timed."""
    try:
        wrong = case.check(inputs, call(*inputs))
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
    return None if wrong is None else f"refused: {wrong}"


def run_case(case: Case, settings: Settings, bandwidth: float) -> list[Row]:
    """Checks and times one case.

    Args:
        case: the workload.
        settings: device and effort.
        bandwidth: of ``copy_bandwidth``.

    Returns:
        One row a contender. One whose output is wrong, or that raises, has no times and says so in ``status``.
    """
    device = torch.device(settings.device)
    torch.manual_seed(settings.seed)
    sets = [case.inputs()]
    if device.type == "cuda":
        size = sum(tensor.nbytes for tensor in sets[0])
        sets += [case.inputs() for _ in range(min(64, _ROTATION_BYTES // max(size, 1)))]
    contenders = {**case.contenders, **case.yardsticks}
    rows = {name: _new_row(case, settings, name) for name in contenders}
    functions: dict[str, Callable[[], Any]] = {}
    for name, call in contenders.items():
        wrong = _refusal(case, sets[0], call) if name in case.contenders else None
        if wrong is not None:
            rows[name].status = wrong
            continue
        turn = iter(_endless(sets))
        functions[name] = lambda call=call, turn=turn: call(*next(turn))  # type: ignore[misc]
        for _ in range(8 if settings.pages == "kept" else 2):  # the heap takes some calls to settle
            functions[name]()
    _synchronize(device)
    times = time_interleaved(functions, device, settings.seconds, rest=case.rest)
    floor_us = _floor_us(case, settings, bandwidth)
    for name, samples in times.items():
        row, quartiles = rows[name], statistics.quantiles(samples, n=4)
        row.low_us, row.median_us, row.high_us = (round(value * 1e6 / case.items, 3) for value in quartiles)
        row.rounds, row.floor_us = len(samples), floor_us
    _compare(list(rows.values()), case, settings)
    return list(rows.values())


def _floor_us(case: Case, settings: Settings, bandwidth: float) -> float | None:
    seconds = case.floor_bytes / bandwidth
    if case.floor_flops:
        seconds = max(seconds, case.floor_flops / matmul_rate(settings.device, case.dtype))
    return seconds / case.items * 1e6 if seconds else None


def _endless(sets: Sequence[tuple[torch.Tensor, ...]]) -> Iterable[tuple[torch.Tensor, ...]]:
    while True:
        yield from sets


def _compare(rows: list[Row], case: Case, settings: Settings) -> None:
    timed = {row.contender: row.median_us for row in rows if row.median_us is not None}
    rivals = {
        name: value
        for name, value in timed.items()
        if name.partition(" ")[0] != "genfast" and name not in case.yardsticks
    }
    groups = {group: [timed[name] for name in names if name in timed] for group, names in case.groups.items()}
    baselines = {**timed, **{group: min(values) for group, values in groups.items() if values}}
    compiled = min((value for name, value in timed.items() if name.startswith("compiled")), default=None)
    for row in rows:
        if not row.median_us:  # not timed, or below what the clock tells apart
            continue
        others = {name: value for name, value in rivals.items() if name != row.contender}
        best = min(others, key=lambda name: others[name], default=None)
        row.vs_eager = timed["eager"] / row.median_us if "eager" in timed else None
        row.vs_compiled = compiled / row.median_us if compiled is not None else None
        row.vs_best_rival = others[best] / row.median_us if best is not None else None
        row.best_rival = best or ""
        row.vs_floor = row.median_us / row.floor_us if row.floor_us else None
        if row.contender == "genfast":
            aims = case.targets.get(settings.pages, {})
            row.targets = "; ".join(
                f"{baselines[name] / row.median_us:.3g}x {name} (target {aim:g}x: "
                f"{'met' if baselines[name] >= aim * row.median_us else 'MISSED'})"
                for name, aim in aims.items()
                if name in baselines
            )


def run_cases(
    cases: Callable[[Settings], list[Case]],
    settings: Settings,
    module: str,
    bandwidth: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Runs an op's cases, and on the CPU its large ones once more with pages kept.

    Args:
        cases: makes the cases for some settings.
        settings: device and effort.
        module: name of the op's module under ``genfast.benchmarks.ops``, for the process with pages kept.
        bandwidth: of ``copy_bandwidth``; None measures it.
        progress: told the name of each case as it starts.
    """
    bandwidth = copy_bandwidth(settings.device) if bandwidth is None else bandwidth
    chosen = cases(settings)
    large = [case for case in chosen if case.tensor_bytes >= settings.large_bytes]
    if settings.pages == "kept":
        chosen = large
    rows: list[Row] = []
    for case in chosen:
        progress(f"{case.op} {case.variant} {'x'.join(map(str, case.shape))} {str(case.dtype).removeprefix('torch.')}")
        rows += run_case(case, settings, bandwidth)
        torch._dynamo.reset()
    if settings.device == "cpu" and settings.pages == "default" and large:
        progress(f"{module}, pages kept")
        rows += _in_process_with_pages_kept(module, settings, bandwidth)
    return rows


def _in_process_with_pages_kept(module: str, settings: Settings, bandwidth: float) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        kept = dataclasses.replace(settings, pages="kept")
        request = json.dumps([module, dataclasses.asdict(kept), bandwidth, str(path)])
        done = subprocess.run(
            [sys.executable, "-m", "genfast.benchmarks.harness", request],
            env={**os.environ, **PAGES_KEPT},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not path.exists():
            tail = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return [Row(module, "", "", "", "kept", "genfast", status=f"failed: {tail}"[:160])]
        return [Row(**row) for row in json.loads(path.read_text())]


def write_csv(rows: Sequence[Row], path: Path | str, device: str) -> None:
    """Writes rows with the facts of the machine and the moment: device, CPU, versions, commit, date."""
    facts = report.machine(device)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        names = [field.name for field in dataclasses.fields(Row)] + list(facts)
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = {key: _rounded(value) for key, value in dataclasses.asdict(row).items()}
            writer.writerow({**values, **facts})


def _rounded(value: Any) -> Any:
    return "" if value is None else float(f"{value:.5g}") if isinstance(value, float) else value


def _worker(request: str) -> None:
    module, settings, bandwidth, path = json.loads(request)
    import importlib

    from genfast.benchmarks import harness  # the classes of the package, not those of __main__

    workload = importlib.import_module(f"genfast.benchmarks.ops.{module}")
    rows = harness.run_cases(workload.cases, harness.Settings(**settings), module, bandwidth)
    Path(path).write_text(json.dumps([dataclasses.asdict(row) for row in rows]))


if __name__ == "__main__":
    _worker(sys.argv[1])
