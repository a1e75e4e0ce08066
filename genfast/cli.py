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

BENCHMARKS = (
    "reparameterize_kl", "elbo", "iwae_bound", "vector_quantize", "vae_step", "bernoulli_sample", "rotary", "attention",
    "attention_gpt", "attention_varlen", "attention_decode", "encoder", "hf_bert", "rbm_cd", "rbm_ais", "gemm",
    "overhead", "gan_loss", "gan_penalty", "spectral_normalize", "minibatch_stddev", "adain", "upfirdn2d",
    "filtered_lrelu", "bias_act", "diff_augment", "gan_step",
)  # fmt: skip
LONG_BENCHMARKS = ("attention_sweep",)  # only on request
BENCHMARKS_HELP = f"Any of {', '.join(BENCHMARKS)}, all by default; or {', '.join(LONG_BENCHMARKS)}."
MACHINES, AUTOENCODERS, ADVERSARIES = "Of rbm and dbn", "Of vae, iwae and vqvae", "Of gan"  # panels

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


def _check_device(what: str, device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        _stop(str(error).splitlines()[0])
    if kind not in ("cpu", "cuda"):
        _stop(f"{what} on cpu or cuda, not on {device}")
    if kind == "cuda" and not torch.cuda.is_available():
        _stop("torch finds no CUDA device here; choose --device cpu, or see `genfast info`")


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
    ops: Annotated[list[str] | None, typer.Argument(help=BENCHMARKS_HELP)] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller cases: about a minute.")] = False,
    compiled: Annotated[bool, typer.Option(help="Let torch.compile take part.")] = True,
    seconds: Annotated[float | None, typer.Option(help="Time spent on each case.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    csv: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the CSV as a PNG beside it.")] = False,
) -> None:
    """Times genfast's ops against eager and compiled PyTorch and against the floor, losses included."""
    for name in ops or ():
        if name not in BENCHMARKS + LONG_BENCHMARKS:
            _stop(f"unknown benchmark {name!r}: choose among {', '.join(BENCHMARKS + LONG_BENCHMARKS)}")
    _check_device("benchmarks run", device)
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
    """Trains VAEs, a GAN and an RBM on small digits, draws what they learned, and times layers and attention."""
    _need("sklearn", "genfast[examples]")
    _need("matplotlib", "genfast[examples]")
    from genfast.demo import run

    run(out, quick=quick, console=console)


@app.command()
def train(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="rbm, dbn, vae, iwae, vqvae or gan.")],
    data: Annotated[str, typer.Option(help="digits, idx:PATH (MNIST's format), csv:PATH or images:DIR.")],
    hidden: Annotated[
        str | None,
        typer.Option(help="Hidden units; several layers as 500,500,2000; of convolutions the channels of each level."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training rows; for a dbn, a layer.")] = 10,
    batch: Annotated[int, typer.Option(help="Rows a gradient.")] = 64,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate: 0.05, of autoencoders 0.001, of gans by arch.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Of an rbm or dbn on the weights, not on the biases.")] = 0.0,
    binarize: Annotated[
        str | None, typer.Option(help="threshold, sample or none, for bernoulli units and likelihoods.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Divide the data by this.")] = None,
    size: Annotated[str | None, typer.Option(help="Of images:DIR, as 64x64: scaled and cut to it.")] = None,
    held_out: Annotated[float, typer.Option(help="Fraction of the rows to measure on.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of weights, split, order and noise.")] = 0,
    momentum: Annotated[float, typer.Option(help="Of stochastic gradient descent.", rich_help_panel=MACHINES)] = 0.0,
    method: Annotated[
        str, typer.Option(help="cd, pcd, fpcd (fast weights) or pt (parallel tempering).", rich_help_panel=MACHINES)
    ] = "cd",
    k: Annotated[int, typer.Option("--k", help="Gibbs steps a gradient.", rich_help_panel=MACHINES)] = 1,
    temperatures: Annotated[int, typer.Option(help="Of method pt.", rich_help_panel=MACHINES)] = 10,
    visible: Annotated[
        str, typer.Option(help="bernoulli, gaussian or softmax:K.", rich_help_panel=MACHINES)
    ] = "bernoulli",
    centered: Annotated[
        bool, typer.Option("--centered/--no-centered", help="The centered gradient.", rich_help_panel=MACHINES)
    ] = False,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or split.", rich_help_panel=MACHINES)] = "fp32",
    arch: Annotated[
        str | None,
        typer.Option(
            help="mlp, conv or residual; a vqvae is residual; of a gan mlp, dcgan, sngan or stylegan2.",
            rich_help_panel=AUTOENCODERS,
        ),
    ] = None,
    likelihood: Annotated[
        str | None,
        typer.Option(
            help="bernoulli, continuous_bernoulli, gaussian or discretized_logistic (8-bit images).",
            rich_help_panel=AUTOENCODERS,
        ),
    ] = None,
    latent: Annotated[
        int, typer.Option(help="Size of z: 20, of a gan 64; vae, iwae, gan.", rich_help_panel=AUTOENCODERS)
    ] = 20,
    beta: Annotated[float, typer.Option(help="Weight of the KL term; vae.", rich_help_panel=AUTOENCODERS)] = 1.0,
    free_bits: Annotated[
        float, typer.Option(help="Nats that each latent dimension has for nothing; vae.", rich_help_panel=AUTOENCODERS)
    ] = 0.0,
    samples: Annotated[
        int | None, typer.Option(help="Draws of z a row: of a vae 1, of an iwae 50.", rich_help_panel=AUTOENCODERS)
    ] = None,
    gradient: Annotated[str, typer.Option(help="iwae, stl, dreg or vae; iwae.", rich_help_panel=AUTOENCODERS)] = "iwae",
    codes: Annotated[int, typer.Option(help="In the codebook; vqvae.", rich_help_panel=AUTOENCODERS)] = 128,
    dim: Annotated[int, typer.Option(help="Of a code; vqvae.", rich_help_panel=AUTOENCODERS)] = 16,
    commitment: Annotated[
        float, typer.Option(help="Weight of the commitment loss; vqvae.", rich_help_panel=AUTOENCODERS)
    ] = 0.25,
    decay: Annotated[
        float, typer.Option(help="Of the means that codes follow; vqvae.", rich_help_panel=AUTOENCODERS)
    ] = 0.99,
    revive_below: Annotated[
        float, typer.Option(help="Mean count below which a code moves; vqvae.", rich_help_panel=AUTOENCODERS)
    ] = 0.1,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder to draw the trained model in; a gan too.", rich_help_panel=AUTOENCODERS)
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="nonsaturating, minimax, hinge, least_squares, wasserstein, relativistic or relativistic_average; by "
            "arch.",
            rich_help_panel=ADVERSARIES,
        ),
    ] = None,
    discriminator_lr: Annotated[
        float | None, typer.Option(help="The discriminator's rate, where another.", rich_help_panel=ADVERSARIES)
    ] = None,
    beta1: Annotated[float | None, typer.Option(help="Of Adam; by arch.", rich_help_panel=ADVERSARIES)] = None,
    r1: Annotated[
        float | None,
        typer.Option("--r1", help="Weight of R1, of slopes at real examples; by arch.", rich_help_panel=ADVERSARIES),
    ] = None,
    r2: Annotated[
        float | None, typer.Option("--r2", help="Weight of R2, at generated ones.", rich_help_panel=ADVERSARIES)
    ] = None,
    gradient_penalty: Annotated[
        float, typer.Option(help="Weight of WGAN-GP's penalty, between the two.", rich_help_panel=ADVERSARIES)
    ] = 0.0,
    penalty_every: Annotated[
        int | None, typer.Option(help="Steps from one penalty to the next.", rich_help_panel=ADVERSARIES)
    ] = None,
    consistency: Annotated[
        float, typer.Option(help="Weight of the logits' change by augmentation.", rich_help_panel=ADVERSARIES)
    ] = 0.0,
    path_length: Annotated[
        float, typer.Option(help="Weight of the generator's path lengths; stylegan2.", rich_help_panel=ADVERSARIES)
    ] = 0.0,
    mixing: Annotated[
        float, typer.Option(help="Probability of mixed styles in training; stylegan2.", rich_help_panel=ADVERSARIES)
    ] = 0.0,
    n_critic: Annotated[
        int | None, typer.Option(help="The discriminator's steps to one of the generator.", rich_help_panel=ADVERSARIES)
    ] = None,
    ema: Annotated[
        float, typer.Option(help="Decay of the generator's moving average.", rich_help_panel=ADVERSARIES)
    ] = 0.995,
    augment: Annotated[
        str, typer.Option(help="none, diff (always) or ada (as overfitting demands).", rich_help_panel=ADVERSARIES)
    ] = "none",
    policy: Annotated[
        str, typer.Option(help="Parts of diff, and of consistency.", rich_help_panel=ADVERSARIES)
    ] = "color,translation,cutout",
    pipeline: Annotated[str, typer.Option(help="Parts of ada.", rich_help_panel=ADVERSARIES)] = "blit,geometry,color",
    ada_target: Annotated[
        float, typer.Option(help="Mean sign of the real logits that ada steers to.", rich_help_panel=ADVERSARIES)
    ] = 0.6,
    ada_images: Annotated[
        int, typer.Option(help="Examples over which ada's p may go from 0 to 1.", rich_help_panel=ADVERSARIES)
    ] = 100_000,
    packed: Annotated[
        int,
        typer.Option(help="Samples that the discriminator judges at once; mlp, dcgan.", rich_help_panel=ADVERSARIES),
    ] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="The checkpoint; its log ends in .log.csv.")] = Path("model.safetensors"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from --out, with its options.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew though --out exists.")] = False,
) -> None:
    """Trains a restricted Boltzmann machine, a deep belief network layer by layer, an autoencoder, or a GAN."""
    _check_device("training runs", device)
    _need("safetensors", "safetensors")
    if data == "digits":
        _need("sklearn", "genfast[examples]")
    if data.startswith("images:"):
        _need("PIL", "genfast[examples]")
    if pictures is not None:
        _need("matplotlib", "genfast[examples]")
    from genfast.data import parse_size
    from genfast.training import command

    others = {"model", "data", "device", "out", "resume", "overwrite", "pictures"}
    given = {name: value for name, value in context.params.items() if name not in others and _was_given(context, name)}
    try:
        if "hidden" in given:
            given["hidden"] = _numbers("--hidden", given["hidden"])
        if "size" in given:
            given["size"] = parse_size(given["size"], "--size")
        command.train(model, given, data, device, out, resume, overwrite, pictures, console)
    except (OSError, TypeError, ValueError) as error:
        _stop(str(error))


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} takes numbers separated by commas, got {text!r}") from None


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="A checkpoint of `genfast train`.")],
    n: Annotated[int, typer.Option("--n", help="Number of samples.")] = 64,
    seed: Annotated[int, typer.Option(help="Of all noise.")] = 0,
    shape: Annotated[str | None, typer.Option(help="Of a picture, as 28x28, where the data do not say.")] = None,
    steps: Annotated[int | None, typer.Option(help="Gibbs steps: 1000.", rich_help_panel=MACHINES)] = None,
    beta: Annotated[float | None, typer.Option(help="Inverse temperature: 1.", rich_help_panel=MACHINES)] = None,
    means: Annotated[
        bool,
        typer.Option("--means", help="Means of the visible units in place of draws.", rich_help_panel=MACHINES),
    ] = False,
    clamp: Annotated[
        Path | None,
        typer.Option(
            help="CSV of 1 or N rows of values to keep; empty cells and nan are free.", rich_help_panel=MACHINES
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="A .png, .csv or .safetensors file.")] = Path("samples.png"),
) -> None:
    """Draws from a trained model: fantasy particles, what an autoencoder decodes from its prior, or a GAN's samples."""
    _check_device("sampling runs", device)
    _need("safetensors", "safetensors")
    from genfast.training import command

    try:
        command.sample(model, n, steps, seed, beta, means, clamp, shape, device, out)
    except (OSError, TypeError, ValueError) as error:
        _stop(str(error))
    console.print(f"wrote {out}", highlight=False)


if __name__ == "__main__":
    app()
