"""What the benchmarks of attention share: workloads, contenders, checks, and a way to time very slow contenders.

A contender is a function of a workload's input tensors. ``"eager"`` is the formula as written in plain PyTorch, which
holds every score; ``"SDPA"`` is ``torch.nn.functional.scaled_dot_product_attention``.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import genfast
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Row, Settings

__all__ = ["BEST", "PYTORCH", "Workload", "case", "checker", "has_fast_bf16", "plain", "run_cases"]

BEST = "PyTorch's best"
PYTORCH = ("eager", "SDPA", "compiled")
DROPOUT_SEED = 7
_PATIENCE = 4.0  # seconds of a call from which on a contender is timed by one call alone
_LAST_CHANCE = 15.0  # a first call that takes longer is not repeated
_CHECKED_ROWS = 64
# Products of [queries, depth] and [depth, keys] size that any implementation without S^2 memory computes.
_PRODUCTS = {"forward": 2, "forward+backward": 7, "backward": 5, "double backward": 15}


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes and options of one call."""

    batch: int
    heads: int
    queries: int
    depth: int
    dtype: torch.dtype = torch.float32
    causal: bool = False
    kv_heads: int = 0  # 0: as many as heads
    keys: int = 0  # 0: as many as queries
    softcap: float | None = None
    dropout_p: float = 0.0
    bias: tuple[int, ...] | None = None  # shape of a bias that needs its gradient

    @property
    def group(self) -> int:
        return self.heads // (self.kv_heads or self.heads)

    @property
    def key_count(self) -> int:
        return self.keys or self.queries

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.queries, self.depth

    @property
    def options(self) -> str:
        """For the variant's name."""
        found = ["causal"] if self.causal else []
        if self.keys or self.kv_heads:
            found.append(f"{self.heads // self.group} heads of {self.key_count} keys")
        if self.softcap is not None:
            found.append("softcap")
        if self.dropout_p:
            found.append("dropout")
        if self.bias is not None:
            found.append(f"bias {'x'.join(map(str, self.bias))}")
        return ", ".join(found)

    def inputs(self, variant: str, device: str) -> tuple[Tensor, ...]:
        """q, k, v and the bias; then the cotangent of the output; then those of the three gradients."""
        needs_grad = variant != "forward"
        kv = (self.batch, self.heads // self.group, self.key_count, self.depth)

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, device=device).to(self.dtype)

        made = [normal(shape).requires_grad_(needs_grad) for shape in (self.shape, kv, kv)]
        if self.bias is not None:
            made.append(normal(self.bias).requires_grad_(needs_grad))
        if needs_grad:
            made.append(normal(self.shape))
        if variant == "double backward":
            made[-1].requires_grad_()
            made += [normal(shape) for shape in (self.shape, kv, kv)]
        return tuple(made)


# ---- contenders ----


def plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, hidden: Tensor | None = None,
    softcap: float | None = None, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """The formula with all scores held; ``hidden`` is True where a query does not see a key.

    Heads that share keys are rows of one product, which saves copies of k and v (for one query, or without options).
    """
    shape = q.shape
    if q.shape[1] != k.shape[1]:
        q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    scores = (q * q.shape[3] ** -0.5) @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.softmax(scores, -1)
    if dropout_p:
        weights = functional.dropout(weights, dropout_p)
    return (weights @ v).view(shape)


def _hidden(w: Workload, device: Any) -> Tensor | None:
    return torch.ones(w.queries, w.key_count, dtype=torch.bool, device=device).triu(1) if w.causal else None


def _plain(w: Workload, device: Any) -> Callable[..., Tensor]:
    return functools.partial(plain, hidden=_hidden(w, device), softcap=w.softcap, dropout_p=w.dropout_p)


def _sdpa(w: Workload) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=w.dropout_p, is_causal=w.causal, enable_gqa=w.group > 1
        )

    return call


def _ours(w: Workload) -> Callable[..., Tensor]:
    seed = DROPOUT_SEED if w.dropout_p else None

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return genfast.ops.attention(
            q, k, v, bias=bias, causal=w.causal, softcap=w.softcap, dropout_p=w.dropout_p, seed=seed
        )

    return call


def with_backward(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """(out, the gradients of q, k, v and the bias)."""

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        *leaves, dout = inputs
        out = forward(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)

    return call


def backward_alone(forward: Callable[..., Tensor], order: int) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients of the output (order 1), or of its gradients (order 2), of a graph built at the first call."""
    graphs: dict[int, tuple[Any, ...]] = {}

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves, dout, directions = inputs[:3], inputs[3], inputs[4:]
        if id(inputs[0]) not in graphs:
            out = forward(*leaves)
            first = torch.autograd.grad(out, leaves, dout, create_graph=True) if order == 2 else ()
            graphs[id(inputs[0])] = (out, first)
        out, first = graphs[id(inputs[0])]
        if order == 1:
            return torch.autograd.grad(out, leaves, dout, retain_graph=True)
        return torch.autograd.grad(first, (*leaves, dout), directions, retain_graph=True)

    return call


# ---- checks ----


def _exact(w: Workload, inputs: tuple[Tensor, ...], variant: str) -> list[tuple[str, int, Any, Tensor]]:
    """(name, place in the output, index, value) in float64, for the heads of the last group of the last example.

    A bias that all heads share is checked in some rows, over all heads.
    """
    kv = w.heads // w.group - 1
    q_part = (slice(w.batch - 1, w.batch), slice(kv * w.group, (kv + 1) * w.group))
    kv_part = (slice(w.batch - 1, w.batch), slice(kv, kv + 1))
    parts: list[Any] = [q_part, kv_part, kv_part]
    of_head = w.bias is not None and w.batch == 1 and w.bias[1] == w.heads
    if w.bias is not None:
        parts.append((slice(None), q_part[1]) if of_head else (slice(None), slice(None)))
    leaves = [x.detach()[part].double().requires_grad_() for x, part in zip(inputs[: len(parts)], parts, strict=True)]
    formula = functools.partial(plain, hidden=_hidden(w, leaves[0].device), softcap=w.softcap)
    out = formula(*leaves)
    if variant == "forward":
        return [("out", 0, q_part, out.detach())]
    dout = inputs[len(parts)].detach()[q_part].double().requires_grad_()
    names = ["dq", "dk", "dv", "dbias"][: len(parts)]
    if variant == "double backward":
        first = torch.autograd.grad(out, leaves, dout, create_graph=True)
        directions = [x[part].double() for x, part in zip(inputs[4:], parts, strict=True)]
        values = torch.autograd.grad(first, (*leaves, dout), directions)
        names = [f"second {name}" for name in (*names, "ddout")]
        parts.append(q_part)
        return [(name, i, parts[i], value) for i, (name, value) in enumerate(zip(names, values, strict=True))]
    values = torch.autograd.grad(out, leaves, dout)
    found = [(name, i + 1, parts[i], x) for i, (name, x) in enumerate(zip(names, values, strict=True))]
    if w.bias is not None and not of_head:
        found[-1] = _exact_shared_bias(w, inputs)
    return [("out", 0, q_part, out.detach()), *found]


def _exact_shared_bias(w: Workload, inputs: tuple[Tensor, ...]) -> tuple[str, int, Any, Tensor]:
    rows = torch.arange(0, w.queries, max(1, w.queries // _CHECKED_ROWS), device=inputs[0].device)
    q, k, v, bias, dout = (x.detach().double() for x in inputs)
    some = bias[:, :, rows].requires_grad_()
    (value,) = torch.autograd.grad(plain(q[:, :, rows], k, v, some, softcap=w.softcap), some, dout[:, :, rows])
    return "dbias", 4, (slice(None), slice(None), rows), value


def checker(w: Workload, variant: str) -> Callable[[tuple[Tensor, ...], Any], str | None]:
    """A check against the formula in float64, by the norm of the difference.

    Contenders draw dropout in their own ways, so there the output must be the exact one plus noise of the size that
    dropout has: with p dropped, sqrt(p / (1 - p)) of the exact value's norm for many nearly equal weights.
    """
    kept: list[Any] = []

    def check(inputs: tuple[Tensor, ...], output: Any) -> str | None:
        if not kept or kept[0] is not inputs:
            kept[:] = [inputs, _exact(w, inputs, variant)]
        values = output if isinstance(output, tuple) else (output,)
        for name, place, index, exact in kept[1]:
            value = values[place].detach()[index].double()
            wrong = _dropped(value, exact, w.dropout_p) if w.dropout_p else _off(value, exact, w.dtype)
            if wrong is not None:
                return f"{name} {wrong}"
        return None

    return check


def _off(value: Tensor, exact: Tensor, dtype: torch.dtype) -> str | None:
    bound = 3e-2 if dtype in (torch.bfloat16, torch.float16) else 2e-5
    error = ((value - exact).norm() / exact.norm()).item()
    return None if error < bound else f"has a relative error of {error:.1e}"


def _dropped(value: Tensor, exact: Tensor, p: float) -> str | None:
    share = ((value * exact).sum() / exact.square().sum()).item()
    if not abs(share - 1) < 0.06:
        return f"is {share:.2f} times the exact one on average"
    noise = ((value - exact).norm() / exact.norm()).item() / (p / (1 - p)) ** 0.5
    return None if 0.7 < noise < 1.4 else f"has {noise:.2f} times the noise of dropout"


# ---- cases ----


def case(
    w: Workload, variant: str, settings: Settings, *, compiled: bool = False, eager: bool = True,
    targets: dict[str, float] | None = None,
) -> Case:  # fmt: skip
    """The workload as a case of the harness.

    Args:
        w: the workload.
        variant: ``"forward"``, ``"forward+backward"`` or ``"double backward"`` (without what comes before it).
        settings: device and effort.
        compiled: whether the compiled formula takes part, if the settings let it.
        eager: whether the formula itself does.
        targets: speed-ups aimed at, on a CPU.
    """
    device = settings.device
    forwards: dict[str, Callable[..., Any]] = {"genfast": _ours(w)}
    if eager:
        forwards["eager"] = _plain(w, device)
    if w.softcap is None and variant != "double backward":  # SDPA has neither
        forwards["SDPA"] = _sdpa(w)
    if compiled and settings.compiled and variant != "double backward":
        forwards["compiled"] = torch.compile(_plain(w, device), dynamic=False)
    yardsticks: dict[str, Callable[..., Any]] = {}
    contenders = forwards
    if variant == "forward+backward":
        contenders = {name: with_backward(call) for name, call in forwards.items()}
    elif variant == "double backward":
        contenders = {name: backward_alone(call, 2) for name, call in forwards.items()}
        yardsticks["genfast backward"] = backward_alone(forwards["genfast"], 1)
    kv_bytes = 2 * w.batch * (w.heads // w.group) * w.key_count * w.depth * w.dtype.itemsize
    pairs = w.queries * (w.queries + 1) // 2 if w.causal else w.queries * w.key_count
    return Case(
        op="attention",
        variant=f"{variant}, {w.options}" if w.options else variant,
        shape=w.shape,
        dtype=w.dtype,
        inputs=lambda: w.inputs(variant, device),
        contenders=contenders,
        check=checker(w, variant),
        floor_bytes=kv_bytes if variant == "forward" else 2 * kv_bytes,
        floor_flops=_PRODUCTS[variant] * 2 * w.batch * w.heads * pairs * w.depth,
        groups={BEST: PYTORCH},
        yardsticks=yardsticks,
        targets={"default": targets} if targets and torch.device(device).type == "cpu" else {},
    )


# ---- slow contenders ----


def has_fast_bf16(device: str) -> bool:
    """Whether products of bfloat16 run in hardware; where they do not, PyTorch's take seconds."""
    if torch.device(device).type == "cuda":
        return True
    from genfast import collect_env

    return bool({"amx_bf16", "avx512_bf16"} & set(collect_env._cpuinfo("flags").split()))


def run_case(made: Case, settings: Settings, bandwidth: float) -> list[Row]:
    """As ``harness.run_case``, but a contender whose call takes seconds is timed by a single one.

    The floor counts products at the rate of float32 where bfloat16 has no hardware.
    """
    if torch.device(settings.device).type != "cpu":
        return harness.run_case(made, settings, bandwidth)
    torch.manual_seed(settings.seed)
    inputs = made.inputs()
    rows = {name: harness._new_row(made, settings, name) for name in made.contenders}
    soon: dict[str, Callable[..., Any]] = {}
    for name, call in made.contenders.items():
        seconds, wrong = _first_call(made, inputs, call, again=name.startswith("compiled"))
        if wrong is not None:
            rows[name].status = wrong
        elif seconds > _PATIENCE:
            rows[name].median_us = rows[name].low_us = rows[name].high_us = round(seconds * 1e6 / made.items, 3)
            rows[name].rounds = 1
        else:
            soon[name] = call
    quick = dataclasses.replace(made, inputs=lambda: inputs, contenders=soon, floor_flops=0)
    rows |= {row.contender: row for row in harness.run_case(quick, settings, bandwidth)}
    dtype = made.dtype if has_fast_bf16(settings.device) else torch.float32
    floor_us = harness._floor_us(dataclasses.replace(made, dtype=dtype), settings, bandwidth)
    for row in rows.values():
        if row.median_us is not None:
            row.floor_us = floor_us
    harness._compare(list(rows.values()), made, settings)
    return list(rows.values())


def _first_call(
    made: Case, inputs: tuple[Tensor, ...], call: Callable[..., Any], again: bool
) -> tuple[float, str | None]:
    """Seconds of the first call that is not a warm-up, and why the contender is not timed."""
    taken: list[float] = []

    def timed(*args: Tensor) -> Any:
        start = time.perf_counter()
        output = call(*args)
        taken.append(time.perf_counter() - start)
        return output

    wrong = harness._refusal(made, inputs, timed)
    if wrong is None and (again or _PATIENCE < taken[-1] < _LAST_CHANCE):
        timed(*inputs)
    return (taken or [0.0])[-1], wrong


def run_cases(
    cases: list[Case],
    settings: Settings,
    bandwidth: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """The rows of all cases; none has inputs so large that glibc's pages matter."""
    bandwidth = harness.copy_bandwidth(settings.device) if bandwidth is None else bandwidth
    rows: list[Row] = []
    for made in cases:
        progress(f"{made.op} {'x'.join(map(str, made.shape))} {str(made.dtype).removeprefix('torch.')} {made.variant}")
        rows += run_case(made, settings, bandwidth)
        torch._dynamo.reset()
    return rows
