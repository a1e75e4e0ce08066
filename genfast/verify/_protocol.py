"""``genfast verify``: runs every kernel's checks on a GPU, writes the ledger and the benchmarks' CSVs."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import pkgutil
import runpy
import secrets
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genfast import _dispatch, _ledger, collect_env
from genfast.verify import _sanitize
from genfast.verify._core import Check, CheckError, Context, Record, run_check

__all__ = ["checks_of", "ledger_entry", "main", "parse_kernel", "slug"]


def parse_kernel(kernel: str) -> tuple[str, str]:
    """A kernel's (backend, op stem): ``"cuda/vae/reparameterize"`` gives ``("cuda", "reparameterize")``."""
    backend, *_, op = kernel.split("/")
    return backend, op


def checks_of(kernel: str) -> tuple[Check, ...]:
    """The checks of a kernel of the ledger, by its op's stem: the same for every backend.

    Args:
        kernel: e.g. ``"cuda/vae/reparameterize"`` or ``"triton/reparameterize"``.

    Raises:
        LookupError: if the op has no checks.

    Examples:
        >>> [check.name for check in checks_of("triton/bernoulli_sample")][:2]
        ['samples', 'uniforms']
    """
    _, op = parse_kernel(kernel)
    try:
        module = importlib.import_module(f"genfast.verify.{op}")
    except ModuleNotFoundError:
        raise LookupError(f"kernel {kernel!r} has no checks: write genfast/verify/{op}.py") from None
    return module.CHECKS


def slug(device_name: str) -> str:
    """A folder name for a GPU.

    Examples:
        >>> slug("NVIDIA H200"), slug("NVIDIA A100-SXM4-80GB")
        ('h200', 'a100-sxm4-80gb')
    """
    return device_name.lower().removeprefix("nvidia ").replace(" ", "-")


def _root() -> Path | None:
    """The source tree that this package runs from, if it does."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "tools" / "kernel_manifest.py").is_file() else None


def _commit() -> str:
    root = _root()
    if root is None:
        return ""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def stale(kernel: str) -> str | None:
    """Why the hash in the compiled core is not that of the kernel that runs (an edited source tree), or None."""
    root = _root()
    if root is None or not kernel.startswith("triton/"):
        return None  # a CUDA kernel and its hash are compiled together
    tool = runpy.run_path(str(root / "tools" / "kernel_manifest.py"))
    if tool["manifest"](root, "")["kernels"].get(kernel) == _ledger.kernel_hashes().get(kernel):
        return None
    return "its source changed after genfast was built; rebuild with `pip install -e .`"


def ledger_entry(device: torch.device, kernels: dict[str, Record], **more: Any) -> dict[str, Any]:
    """What the ledger says of one device.

    Args:
        device: the GPU.
        kernels: those that passed, with what ran.
        **more: further facts, e.g. of the sanitizer.
    """
    major, minor = torch.cuda.get_device_capability(device)
    try:
        triton_version = importlib.import_module("triton").__version__
    except ImportError:
        triton_version = ""
    return {
        "device": torch.cuda.get_device_name(device),
        "compute_capability": f"{major}.{minor}",
        "driver": collect_env.driver_version() or "",
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda or "",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "kernels": {
            name: {
                "hash": _ledger.kernel_hashes()[name],
                "dtypes": sorted(record.dtypes),
                "sizes": sorted(record.sizes),
                "options": sorted(record.options),
                "max_error": {dtype: float(f"{error:.3g}") for dtype, error in sorted(record.max_error.items())},
                "seconds": round(record.seconds, 1),
            }
            for name, record in kernels.items()
        },
        **more,
    }


def _kept(path: Path, entry: dict[str, Any], ran: Sequence[str]) -> dict[str, Any]:
    """Earlier verified kernels of this device that this run did not touch and whose sources are the same."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    kept = {}
    for old in found if isinstance(found, list) else [found]:
        if old.get("device") == entry["device"] and old.get("compute_capability") == entry["compute_capability"]:
            for name, facts in old.get("kernels", {}).items():
                if name not in ran and _ledger.kernel_hashes().get(name) == facts.get("hash"):
                    kept[name] = facts
    return kept


def _say(text: str = "") -> None:
    print(text, flush=True)


def check_kernel(kernel: str, device: torch.device, seed: int) -> tuple[Record, list[str]]:
    """Runs a kernel's checks, printing each; (what ran, the failures)."""
    backend, _ = parse_kernel(kernel)
    total, failures = Record(), []
    for index, check in enumerate(checks_of(kernel)):
        start = time.perf_counter()
        try:
            record = run_check(check, Context(backend, device, seed=seed + index))
        except Exception as error:
            message = str(error) if isinstance(error, CheckError) else traceback.format_exc(limit=-3)
            failures.append(f"{check.name}: {message}")
            _say(f"  {check.name:<14} FAILED after {time.perf_counter() - start:.1f} s\n    {message}")
            if not _usable(device):
                failures.append("the CUDA context is lost, so nothing after this ran")
                break
            continue
        total.merge(record)
        errors = ", ".join(f"{name} {error:.1e}" for name, error in sorted(record.max_error.items()))
        _say(f"  {check.name:<14} ok  {record.cases:>4} cases {record.seconds:6.1f} s  {errors}")
    return total, failures


def _usable(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _benchmarks(folder: Path, device: str) -> None:
    """Writes one CSV an op; whatever goes wrong is printed and does not undo the verification."""
    try:
        harness = importlib.import_module("genfast.benchmarks.harness")
        package = importlib.import_module("genfast.benchmarks.ops")
    except ImportError as error:
        _say(f"benchmarks: not run, this installation has none ({error})")
        return
    settings = harness.Settings(device=device, quick=True, seconds=0.5)
    bandwidth = harness.copy_bandwidth(device)
    _say(f"benchmarks: a large copy moves {bandwidth / 1e9:.0f} GB/s")
    for module in pkgutil.iter_modules(package.__path__):
        start = time.perf_counter()
        try:
            workload = importlib.import_module(f"genfast.benchmarks.ops.{module.name}")
            harness.write_csv(workload.run(settings, bandwidth=bandwidth), folder / f"{module.name}.csv", device)
        except Exception as error:
            _say(f"  {module.name}: failed: {type(error).__name__}: {error}")
            continue
        _say(f"  {module.name}: {folder / f'{module.name}.csv'} ({time.perf_counter() - start:.0f} s)")


def _table(results: dict[str, tuple[str, Record]]) -> None:
    lines = []
    for name, (state, record) in results.items():
        errors = ", ".join(f"{dtype} {error:.1e}" for dtype, error in sorted(record.max_error.items()))
        lines.append((name, state, str(record.cases), errors, f"{record.seconds:.0f} s"))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for line in lines:
            _say("  ".join(line))
        return
    table = Table("kernel", "result", "cases", "largest error", "time", box=None)
    for line in lines:
        color = "green" if line[1] == "verified" else "red" if line[1].startswith("failed") else "yellow"
        table.add_row(line[0], f"[{color}]{line[1]}[/]", *line[2:])
    Console(width=140 if not sys.stdout.isatty() else None).print(table)


def _arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="genfast verify",
        description="Checks genfast's GPU kernels on this machine's GPU and records which passed.",
    )
    parser.add_argument("--results", type=Path, help="write DIR/<device>/verified.json and CSVs, not the user's ledger")
    parser.add_argument("--device", default="cuda:0", help="the GPU to use (default: cuda:0)")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--no-bench", action="store_true", help="with --results: no benchmarks")
    parser.add_argument("--no-sanitizer", action="store_true", help="do not run compute-sanitizer")
    parser.add_argument("--seed", type=int, help="of the inputs (default: a new one, which is printed)")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the protocol.

    Args:
        args: command-line arguments; None: those of the process.

    Returns:
        The exit code: 0 if every kernel that can run here passed and at least one did, 1 otherwise.
    """
    options = _arguments(args)
    if not torch.cuda.is_available():
        _say(
            "genfast verify: torch finds no CUDA GPU here, and this command checks GPU kernels. Run it on a machine "
            "with an NVIDIA GPU, a driver and a CUDA build of torch; `genfast info` shows what was found."
        )
        return 1
    try:
        device = torch.device(options.device)
        valid = device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    except RuntimeError:
        valid = False
    if not valid:
        last = torch.cuda.device_count() - 1
        _say(f"genfast verify: no such GPU: {options.device!r}; this machine has cuda:0 to cuda:{last}")
        return 1
    known = _ledger.kernel_hashes()
    unknown = [name for name in options.kernels or () if name not in known]
    if unknown:
        _say(f"genfast verify: unknown kernel {unknown[0]!r}; the kernels are {', '.join(known)}")
        return 1
    return _verify(options, torch.device("cuda", device.index or 0), list(options.kernels or known))


def _verify(options: argparse.Namespace, device: torch.device, names: list[str]) -> int:
    start = time.perf_counter()
    torch.cuda.set_device(device)
    seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    _say(f"genfast verify: {torch.cuda.get_device_name(device)}, torch {torch.__version__}, seed {seed}")
    results: dict[str, tuple[str, Record]] = {}
    for name in names:
        backend, _ = parse_kernel(name)
        obstacle = _dispatch._device_obstacle(backend, "cuda") or stale(name)
        if obstacle is None and not _usable(device):
            obstacle = "an earlier kernel broke the CUDA context; run this one alone with --kernels"
        if obstacle is not None:
            _say(f"{name}: not run: {obstacle}")
            results[name] = (f"not run: {obstacle}", Record())
            continue
        _say(name)
        record, failures = check_kernel(name, device, seed)
        results[name] = (f"failed: {len(failures)} checks" if failures else "verified", record)
    passed = [name for name, (state, _) in results.items() if state == "verified"]
    sanitizer = {} if options.no_sanitizer else _sanitized(passed, device, results)
    passed = [name for name in passed if results[name][0] == "verified"]
    failed = [name for name, (state, _) in results.items() if state.startswith("failed")]
    if passed or failed:
        _record(options, device, {name: results[name][1] for name in passed}, failed, sanitizer, seed)
    if options.results is not None and not options.no_bench and passed and not failed:
        _benchmarks(options.results / slug(torch.cuda.get_device_name(device)), str(device))
    _table(results)
    skipped = len(results) - len(passed) - len(failed)
    _say(f"{len(passed)} verified, {len(failed)} failed, {skipped} not run, in {time.perf_counter() - start:.0f} s")
    explicit = options.kernels is not None and skipped
    return 0 if passed and not failed and not explicit else 1


def _sanitized(passed: list[str], device: torch.device, results: dict[str, tuple[str, Record]]) -> dict[str, str]:
    """Runs compute-sanitizer for the backends that passed; an error fails all of their kernels."""
    backends = sorted({parse_kernel(name)[0] for name in passed})
    told: dict[str, str] = {}
    torch.cuda.empty_cache()
    for tool in _sanitize.TOOLS if backends else ():
        begin = time.perf_counter()
        told[tool], found = _sanitize.sanitize(tool, backends, str(device))
        _say(f"{tool}: {told[tool]} ({time.perf_counter() - begin:.0f} s)")
        if found:
            for name in passed:
                results[name] = (f"failed: {tool}", results[name][1])
    return told


def _record(
    options: argparse.Namespace,
    device: torch.device,
    passed: dict[str, Record],
    failed: list[str],
    sanitizer: dict[str, str],
    seed: int,
) -> None:
    """Writes the ledger: what passed now, and what an earlier run verified and this one left alone."""
    entry = ledger_entry(device, passed, sanitizer=sanitizer, seed=seed)
    if options.results is None:
        path = _ledger.user_ledger_path()
    else:
        path = options.results / slug(entry["device"]) / "verified.json"
    entry["kernels"] = {**_kept(path, entry, [*passed, *failed]), **entry["kernels"]}
    if entry["kernels"] or path.exists():
        _ledger.write_ledger(path, entry, as_list=options.results is None)
        _say(f"wrote {path}")
