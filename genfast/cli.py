"""The ``genfast`` command."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["app"]

BENCHMARKS = ("reparameterize_kl", "bernoulli_sample", "overhead")

app = typer.Typer(
    help="genfast: fused kernels for generative models in PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()


def _stop(message: str) -> NoReturn:
    Console(stderr=True).print(f"genfast: {message}", style="red", highlight=False, markup=False)
    raise typer.Exit(2)


def _need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        _stop(f"this command needs {error.name}; install it with `pip install {package}`")


@app.command()
def info(
    plain: Annotated[bool, typer.Option(help="Plain text to paste into a bug report, compilers included.")] = False,
) -> None:
    """Shows versions, devices, backends (and why one is unavailable) and which kernels were verified where."""
    from genfast import collect_env

    if plain:
        typer.echo(collect_env.text())
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for section, facts in collect_env.collect(compilers=False).items():
        table.add_row(f"[bold]{section}[/]", "")
        for name, value in facts.items():
            color = "green" if value == "available" else "red" if name == "error" else ""
            table.add_row(f"  {name}", f"[{color}]{_escape(value)}[/]" if color else _escape(value))
    console.print(table)


def _escape(value: str) -> str:
    from rich.markup import escape

    return escape(value)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def verify(context: typer.Context) -> None:
    """Checks every kernel on this machine's GPU, so that the verified ones may be chosen automatically."""
    try:
        module = importlib.import_module("genfast.verify")
    except ModuleNotFoundError as error:
        if error.name != "genfast.verify":
            raise
        _stop("this installation has no genfast.verify; install a complete genfast")
    raise typer.Exit(module.main(context.args) or 0)


@app.command()
def bench(
    ops: Annotated[list[str] | None, typer.Argument(help=f"Any of {', '.join(BENCHMARKS)}; all by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller cases: about 40 seconds.")] = False,
    compiled: Annotated[bool, typer.Option(help="Let torch.compile take part.")] = True,
    seconds: Annotated[float | None, typer.Option(help="Time spent on each case.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    csv: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the CSV as a PNG beside it.")] = False,
) -> None:
    """Times genfast's ops against eager and compiled PyTorch and against the floor, losses included."""
    import torch

    for name in ops or ():
        if name not in BENCHMARKS:
            _stop(f"unknown benchmark {name!r}: choose among {', '.join(BENCHMARKS)}")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        _stop(str(error).splitlines()[0])
    if kind not in ("cpu", "cuda"):
        _stop(f"benchmarks run on cpu or cuda, not on {device}")
    if kind == "cuda" and not torch.cuda.is_available():
        _stop("torch finds no CUDA device here; choose --device cpu, or see `genfast info`")
    if plot and csv is None:
        _stop("--plot draws the CSV: give --csv PATH too")
    if plot:
        _need("matplotlib", "genfast[bench]")
    harness: Any = _need("genfast.benchmarks.harness", "genfast[bench]")
    report: Any = _need("genfast.benchmarks.report", "genfast[bench]")
    effort = seconds if seconds is not None else 0.8 if quick else 4.0
    settings = harness.Settings(device=device, quick=quick, compiled=compiled, seconds=effort, seed=seed)
    rows: list[Any] = []
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load > 0.5 * cores:
        console.print(
            f"other work keeps this machine busy (load {load:.1f} on {cores} cores): expect noise", style="yellow"
        )
    with console.status("measuring copy bandwidth") as status:
        bandwidth = harness.copy_bandwidth(device)
        for name in ops or BENCHMARKS:
            module = importlib.import_module(f"genfast.benchmarks.ops.{name}")
            rows += module.run(settings, bandwidth=bandwidth, progress=status.update)
    facts = report.machine(device)
    console.print(
        f"{facts['device']}, {facts['cpu']} ({facts['isa']}, {facts['threads']} threads), torch {facts['torch']}; "
        f"a large copy moves {bandwidth / 1e9:.1f} GB/s",
        highlight=False,
    )
    report.print_rows(rows, console)
    if csv is not None:
        harness.write_csv(rows, csv, device)
        console.print(f"wrote {csv}", highlight=False)
        if plot:
            report.plot(csv, csv.with_suffix(".png"))
            console.print(f"wrote {csv.with_suffix('.png')}", highlight=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out"),
    quick: Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes, for a smoke test.")] = False,
) -> None:
    """Trains a VAE and an RBM on small digits, draws what they learned, and times genfast's layers."""
    _need("sklearn", "genfast[examples]")
    _need("matplotlib", "genfast[examples]")
    from genfast.demo import run

    run(out, quick=quick, console=console)


if __name__ == "__main__":
    app()
