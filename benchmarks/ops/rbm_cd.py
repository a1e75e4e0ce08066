"""The gradient of contrastive divergence, and a whole PCD-1 update beside scikit-learn's.

Floor: the 2k + 3 products of V x H x B, 2 V H B (2k + 3) floating-point operations, at the rate of a large float32
product of PyTorch's.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import genfast
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Settings

__all__ = ["Rounded", "cases", "check", "check_update", "example", "ours", "plain", "run"]

RATE = 1e-3
PYTORCH = ("eager", "compiled", "eager bf16")
_CHECKED_COLUMNS = 64
_REPEATS = 2


class Rounded(tuple[Tensor, ...]):
    """The output of a contender whose products are rounded to bfloat16."""


def plain(v: Tensor, W: Tensor, b: Tensor, c: Tensor, k: int, chains: Tensor | None = None) -> tuple[Tensor, ...]:
    """(dW, db, dc, chains) as a PyTorch user writes them, with the faster of the two usual ways to draw."""
    positive = torch.sigmoid(v @ W + c)
    mean = positive if chains is None else torch.sigmoid(chains @ W + c)
    for _ in range(k):
        h = (torch.rand_like(mean) < mean).to(mean.dtype)
        down = torch.sigmoid(h @ W.T + b)
        state = (torch.rand_like(down) < down).to(mean.dtype)
        mean = torch.sigmoid(state @ W + c)
    dW = (state.T @ mean - v.T @ positive) / len(v)
    return dW, state.mean(0) - v.mean(0), mean.mean(0) - positive.mean(0), state


def _plain_bf16(v: Tensor, W: Tensor, b: Tensor, c: Tensor, k: int) -> Rounded:
    """The parameters are kept in float32, as their updates need, so they are rounded in every call."""
    return Rounded(plain(*(x.to(torch.bfloat16) for x in (v, W, b, c)), k))


def ours(v: Tensor, W: Tensor, b: Tensor, c: Tensor, k: int, precision: str = "fp32") -> tuple[Tensor, ...]:
    """The same by genfast."""
    found = genfast.ops.rbm_cd(v, W, b, c, k=k, precision=precision)
    output = found.dW, found.db, found.dc, found.chains
    return Rounded(output) if precision == "bf16" else output


def _products(v: Tensor, W: Tensor, b: Tensor, c: Tensor, k: int) -> tuple[Tensor, ...]:
    """The matrix products of CD-k and nothing else."""
    up = v @ W
    for _ in range(k):
        down = up @ W.T
        up = down @ W
    return v.T @ up, down.T @ up


def check(inputs: tuple[Tensor, ...], output: tuple[Tensor, ...], k: int) -> str | None:
    """The gradients against those of the returned chains, in float64; the chains against draws of the plain formula.

    Where the contender is right, each of the four tests of the chains fails by chance below 1e-6.
    """
    v, W, b, c = inputs
    dW, db, dc, state = (tensor.detach().double() for tensor in output)
    if state.shape != v.shape or not bool(((state == 0) | (state == 1)).all()):
        return "the chains are not as many rows of 0 and 1 as the data"
    some = torch.arange(0, W.shape[1], max(1, W.shape[1] // _CHECKED_COLUMNS), device=W.device)
    data, columns, bias = v.double(), W[:, some].double(), c[some].double()
    positive, negative = torch.sigmoid(data @ columns + bias), torch.sigmoid(state @ columns + bias)
    bound = 3e-2 if isinstance(output, Rounded) else 2e-5
    rows = len(v)
    for name, value, exact in (
        ("dW", dW[:, some], (state.T @ negative - data.T @ positive) / rows),
        ("db", db, state.mean(0) - data.mean(0)),
        ("dc", dc[some], negative.mean(0) - positive.mean(0)),
    ):
        error = ((value - exact).norm() / exact.norm()).item()
        if not error < bound:
            return f"{name} is not the gradient of its chains: relative error {error:.1e}"
    wanted = torch.cat([plain(v, W, b, c, k)[3] for _ in range(_REPEATS)]).double()
    likely = (wanted.sum(0) + 2) / (len(wanted) + 4)
    noise = (likely * (1 - likely) / rows * (1 + 1 / _REPEATS)).sqrt()
    off = (state.mean(0) - wanted.mean(0)) / noise
    worst, pooled = off.abs().max().item(), off.square().mean().item()
    if not (worst < 8 and pooled < 1 + 8 * (2 / len(off)) ** 0.5):
        return f"the means of the chains' units are up to {worst:.1f} sigma off, {pooled**0.5:.1f} on average"
    # One number a row: how much its chain resembles what the row leads to in mean-field, and how many units are on.
    up = torch.sigmoid(data @ W.double() + c.double())
    field = torch.sigmoid(up @ W.double().T + b.double())
    field = field - field.mean(0)
    for name, of in (
        ("resemblance to their rows of data", lambda x: (x * field.repeat(len(x) // rows, 1)).sum(1)),
        ("number of units on", lambda x: x.sum(1)),
    ):
        ours, theirs = of(state), of(wanted)
        sigma = (theirs.var() / rows * (1 + 1 / _REPEATS)).sqrt()
        worst = ((ours.mean() - theirs.mean()).abs() / sigma).item()
        if not worst < 6:
            return f"the chains' {name} is {worst:.1f} sigma off"
    return None


def example(visible: int, hidden: int, batch: int, device: str) -> tuple[Tensor, ...]:
    """A batch of structured rows and an RBM whose units are neither free nor frozen."""
    v = (torch.rand(batch, visible, device=device) < torch.rand(visible, device=device).square()).float()
    W = torch.randn(visible, hidden, device=device) * (3 / (visible + hidden) ** 0.5)
    return v, W, torch.randn(visible, device=device) * 0.5, torch.randn(hidden, device=device) * 0.5


def _reduced(device: str) -> tuple[str, ...]:
    """The precisions of genfast that are faster than float32 there: on tensor cores and AMX, or in pairs on vectors."""
    if torch.device(device).type == "cuda":
        return "split", "bf16"
    from genfast._native import C

    return ("split", "bf16") if C.cpu_isa() == "amx" else ("bf16",) if C.bfloat16_pairs() else ()


def _cd_case(
    sizes: tuple[int, int, int], k: int, settings: Settings, compiled: bool, bf16: bool = True, aim: float | None = None
) -> Case:
    visible, hidden, batch = sizes
    reduced = _reduced(settings.device)
    contenders: dict[str, Callable[..., Any]] = {
        "genfast": functools.partial(ours, k=k),
        "eager": functools.partial(plain, k=k),
    }
    if compiled and settings.compiled:
        contenders["compiled"] = torch.compile(functools.partial(plain, k=k), dynamic=False)
    if bf16:
        contenders["eager bf16"] = functools.partial(_plain_bf16, k=k)
    contenders |= {f"genfast {name}": functools.partial(ours, k=k, precision=name) for name in reduced}
    on_cpu = torch.device(settings.device).type == "cpu"
    return Case(
        op="rbm_cd",
        variant=f"CD-{k}, batch {batch}",
        shape=(visible, hidden),
        dtype=torch.float32,
        inputs=lambda: example(visible, hidden, batch, settings.device),
        contenders=contenders,
        check=functools.partial(check, k=k),
        floor_bytes=0,
        floor_flops=2 * visible * hidden * batch * (2 * k + 3),
        groups={"PyTorch's best": PYTORCH},
        yardsticks={"matmuls alone": functools.partial(_products, k=k)},
        targets={"default": {"PyTorch's best": aim}} if aim and on_cpu and "split" not in reduced else {},
    )


# ---- updates beside scikit-learn's ----


def _updates(inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor]]:
    """PCD-1 updates, each with chains and parameters of its own that go on from call to call; they return W."""
    v, W, b, c = inputs

    def by(gradient: Callable[..., tuple[Tensor, ...]]) -> Callable[[], Tensor]:
        parameters, chains = [x.clone() for x in (W, b, c)], [torch.zeros_like(v)]

        def call() -> Tensor:
            *gradients, chains[0] = gradient(v, *parameters, chains[0])
            for parameter, value in zip(parameters, gradients, strict=True):
                parameter.sub_(value, alpha=RATE)
            return parameters[0]

        return call

    def fused(v: Tensor, W: Tensor, b: Tensor, c: Tensor, chains: Tensor) -> tuple[Tensor, ...]:
        found = genfast.ops.rbm_cd(v, W, b, c, chains=chains)
        return found.dW, found.db, found.dc, found.chains

    def eager(v: Tensor, W: Tensor, b: Tensor, c: Tensor, chains: Tensor) -> tuple[Tensor, ...]:
        return plain(v, W, b, c, 1, chains)

    calls = {"genfast": by(fused), "eager": by(eager)}
    if v.is_cpu and importlib.util.find_spec("sklearn") is not None:
        from sklearn.neural_network import BernoulliRBM

        data = v.numpy()
        model = BernoulliRBM(W.shape[1], learning_rate=RATE, batch_size=len(v), random_state=0)
        model.partial_fit(data[:2])
        model.components_, model.h_samples_ = W.T.numpy().copy(order="C"), (data @ W.numpy() > 0).astype(data.dtype)
        model.intercept_hidden_[:], model.intercept_visible_[:] = 0, 0

        def sklearn() -> Tensor:
            model.partial_fit(data)
            return torch.as_tensor(model.components_.T)

        calls["scikit-learn"] = sklearn
    return calls


def _untrained(visible: int, hidden: int, batch: int, device: str) -> tuple[Tensor, ...]:
    """With weights near zero the mean update is known: every hidden unit, and every drawn pixel, is 1 half the time."""
    v = (torch.rand(batch, visible, device=device) < torch.rand(visible, device=device).square()).float()
    W = torch.randn(visible, hidden, device=device) * 1e-2
    return v, W, torch.zeros(visible, device=device), torch.zeros(hidden, device=device)


def check_update(inputs: tuple[Tensor, ...], output: Tensor) -> str | None:
    v, W, *_ = inputs
    known = RATE * (v.mean(0) * 0.5 - 0.25).unsqueeze(1)
    error = ((output - W - known).norm() / known.expand_as(W).norm()).item()
    return None if error < 0.4 else f"the first update is not that of PCD-1: relative error {error:.2f}"


def _update_case(sizes: tuple[int, int, int], settings: Settings) -> Case:
    visible, hidden, batch = sizes
    made = _untrained(visible, hidden, batch, settings.device)
    calls = _updates(made)
    return Case(
        op="rbm_cd",
        variant=f"PCD-1 update, batch {batch}",
        shape=(visible, hidden),
        dtype=torch.float32,
        inputs=lambda: made,
        contenders={name: functools.partial(_without_inputs, call) for name, call in calls.items()},
        check=check_update,
        floor_bytes=0,
        floor_flops=2 * visible * hidden * batch * 5,
        targets={"default": {"scikit-learn": 4.0}} if settings.device == "cpu" else {},
        rest=0.3 if "scikit-learn" in calls else 0.0,  # its threads slow the calls of the next 0.1 s, ours and eager
    )


def _without_inputs(call: Callable[[], Any], *_: Tensor) -> Any:
    return call()


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` leaves out the large ones and most compiled contenders."""
    if settings.quick:
        return [
            _cd_case((784, 500, 128), 1, settings, compiled=True, bf16=False, aim=1.35),
            _cd_case((256, 64, 64), 1, settings, compiled=False, bf16=False, aim=2.5),
            _update_case((784, 500, 128), settings),
        ]
    found = [
        _cd_case((784, 500, batch), k, settings, compiled=True, aim=1.35) for batch in (128, 1024) for k in (1, 10)
    ]
    found += [_cd_case((256, 64, 64), k, settings, compiled=True, aim=2.5) for k in (1, 10)]
    found.append(_cd_case((4096, 1024, 1024), 1, settings, compiled=True))
    return [*found, _update_case((784, 500, 128), settings), _update_case((784, 500, 1024), settings)]


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "rbm_cd", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "rbm_cd", *sys.argv[1:]])
