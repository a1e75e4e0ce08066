"""The demo's benchmark: genfast's layers beside plain PyTorch, compiled PyTorch and scikit-learn."""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from genfast.nn import RBM, Reparameterize

__all__ = ["print_table"]

LEARNING_RATE = 0.05
CONTENDERS = ("genfast", "PyTorch", "compiled", "scikit-learn")


def _vae_layer(rows: int, columns: int, compiled: bool) -> tuple[dict[str, Callable[[], Any]], str]:
    """z and kl of one batch and their gradients."""
    from genfast.benchmarks.ops import reparameterize_kl as workload

    mu, logvar = torch.randn(rows, columns), torch.randn(rows, columns) * 0.7
    inputs = (mu.requires_grad_(), logvar.requires_grad_(), torch.randn(rows, columns), torch.rand(rows))
    forwards: dict[str, Callable[..., Any]] = {"genfast": Reparameterize(kl=True), "PyTorch": workload.textbook}
    if compiled:
        forwards["compiled"] = torch.compile(workload.textbook, dynamic=False)
    calls: dict[str, Callable[[], Any]] = {}
    for name, forward in forwards.items():
        call = workload.with_backward(forward)
        wrong = workload.check(inputs, call(*inputs))
        if wrong is None:
            calls[name] = functools.partial(call, *inputs)
    return calls, f"VAE sampling + KL, forward and backward, {rows} x {columns}"


def _rbm_gradient(visible: int, hidden: int, batch: int, compiled: bool) -> tuple[dict[str, Callable[[], Any]], str]:
    """The gradients of one batch by CD-1."""
    from genfast.benchmarks.ops import rbm_cd as workload

    inputs = workload.example(visible, hidden, batch, "cpu")
    contenders = {"genfast": workload.ours, "PyTorch": workload.plain}
    if compiled:
        contenders["compiled"] = torch.compile(workload.plain, dynamic=False)
    calls: dict[str, Callable[[], Any]] = {}
    for name, contender in contenders.items():
        call = functools.partial(contender, *inputs, k=1)
        if workload.check(inputs, call(), k=1) is None:
            calls[name] = call
    return calls, f"RBM gradient, CD-1, {visible} x {hidden}, batch {batch}"


def _plain_update(v: Tensor, W: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One CD-1 update as usually written; returns the new parameters."""
    hidden = torch.sigmoid(v @ W + c)
    model_v = torch.bernoulli(torch.sigmoid(torch.bernoulli(hidden) @ W.T + b))
    model_hidden = torch.sigmoid(model_v @ W + c)
    rate = LEARNING_RATE / len(v)
    return (
        W + rate * (v.T @ hidden - model_v.T @ model_hidden),
        b + rate * (v - model_v).sum(0),
        c + rate * (hidden - model_hidden).sum(0),
    )


def _rbm_updates(visible: int, hidden: int, batch: int) -> tuple[dict[str, Callable[[], Any]], str]:
    """One CD-1 update (scikit-learn: PCD-1, the same work) with plain SGD."""
    from sklearn.neural_network import BernoulliRBM

    v = torch.bernoulli(torch.rand(visible).square().expand(batch, visible))
    rbm = RBM(visible, hidden)
    W0 = rbm.W.detach().clone()
    optimizer = torch.optim.SGD(rbm.parameters(), lr=LEARNING_RATE)

    def genfast_update() -> Tensor:
        optimizer.zero_grad()
        rbm.contrastive_divergence(v).backward()
        optimizer.step()
        return rbm.W.detach()

    def plain(update: Callable[..., Any]) -> Callable[[], Tensor]:
        state = [(W0.clone(), torch.zeros(visible), torch.zeros(hidden))]

        def call() -> Tensor:
            state[0] = update(v, *state[0])
            return state[0][0]

        return call

    sklearn_rbm = BernoulliRBM(hidden, learning_rate=LEARNING_RATE, batch_size=batch, random_state=0)
    sklearn_rbm.partial_fit(v.numpy())
    sklearn_rbm.components_[:] = W0.T.numpy()
    sklearn_rbm.intercept_hidden_[:] = 0
    sklearn_rbm.intercept_visible_[:] = 0

    def sklearn_update() -> Tensor:
        sklearn_rbm.partial_fit(v.numpy())
        return torch.as_tensor(sklearn_rbm.components_.T)

    updates = {"genfast": genfast_update, "PyTorch": plain(_plain_update), "scikit-learn": sklearn_update}
    # From weights near zero the mean update is known: every hidden unit and reconstructed pixel is 1 half of the time.
    known = LEARNING_RATE * (v.mean(0) * 0.5 - 0.25).unsqueeze(1).expand(visible, hidden)
    calls = {}
    for name, update in updates.items():
        if (update() - W0 - known).norm() < 0.4 * known.norm():
            calls[name] = update
    return calls, f"RBM update, {visible} x {hidden}, batch {batch}"


def print_table(quick: bool, console: Console) -> None:
    """Median times, and genfast's speed-up over each contender: below 1 (red) it is slower."""
    from genfast.benchmarks import harness, report

    torch.manual_seed(0)
    compiled = not quick
    shapes = [(128, 20)] if quick else [(128, 20), (1024, 512)]
    table = Table(title="median time, and how many times faster genfast is", title_justify="left")
    table.add_column("layer")
    for name in CONTENDERS:
        table.add_column(name, justify="right")
    with console.status("timing genfast, PyTorch, compiled PyTorch and scikit-learn"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        workloads = [_vae_layer(*shape, compiled) for shape in shapes]
        sizes = (64, 32, 16) if quick else (784, 500, 128)
        workloads += [_rbm_gradient(*sizes, compiled), _rbm_updates(*sizes)]
        for calls, title in workloads:
            for call in calls.values():
                call()
            times = harness.time_interleaved(calls, torch.device("cpu"), 0.1 if quick else 1.5)
            medians = {name: statistics.median(samples) * 1e6 for name, samples in times.items()}
            table.add_row(title, *(_cell(name, medians, report.show_time, title) for name in CONTENDERS))
    console.print(table)


def _cell(name: str, medians: dict[str, float], show: Callable[[float], str], title: str) -> str:
    if name not in medians:
        return "-"
    if name == "genfast" or "genfast" not in medians:
        return show(medians[name])
    ratio = medians[name] / medians["genfast"]
    return f"{show(medians[name])}\n[{'green' if ratio >= 1 else 'bold red'}]{ratio:.2f}x[/]"
