"""Shared by the tests of attention: a plain formula that shares only the noise with genfast, and random cases."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

import genfast
from genfast import ops, random
from genfast._native import C
from genfast.ops import _attention_formula as formula
from genfast.ops._attention_arguments import arguments

Tensor = torch.Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("q", "k", "v", "bias", "alibi_slopes", "relative_bias", "sinks")
RAW = {
    "forward": formula._forward_op,
    "backward": formula._backward_op,
    "tangent": formula._tangent_op,
    "second": formula._second_op,
}


# ---- the plain formula ----


@functools.cache
def t5_bucket(offset: int, buckets: int, bidirectional: bool, max_distance: int) -> int:
    """The bucket of one offset (key minus query) by the definition, in float32."""
    start = 0
    if bidirectional:
        buckets //= 2
        start = buckets if offset > 0 else 0
        distance = abs(offset)
    else:
        distance = max(-offset, 0)
    exact = buckets // 2
    if distance < exact:
        return start + distance
    share = torch.log(torch.tensor(float(distance)) / exact) / math.log(max_distance / exact)
    return start + min(exact + int(share * (buckets - exact)), buckets - 1)


def materialised(relative_bias: Any, queries: int, keys: int, shift: int) -> Tensor:
    """A relative bias [Hq, Sq, Skv], looked up one pair of positions after the other."""
    table = relative_bias.table
    rows = []
    for i in range(queries):
        for j in range(keys):
            if isinstance(relative_bias, ops.T5Bias):
                entry = t5_bucket(
                    j - i - shift, table.shape[0], relative_bias.bidirectional, relative_bias.max_distance
                )
            else:
                high, across = relative_bias.window
                (yq, xq), (yk, xk) = divmod(i, across), divmod(j, across)
                entry = (yq - yk + high - 1) * (2 * across - 1) + (xq - xk + across - 1)
            rows.append(entry)
    return table[torch.tensor(rows)].T.reshape(-1, queries, keys)


def plain(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Any = None, mask: Any = None, causal: Any = False, window: Any = None,
    alibi_slopes: Any = None, relative_bias: Any = None, softcap: Any = None, sinks: Any = None,
    dropout_p: float = 0.0, scale: Any = None, seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) with every score held, in the dtype of q."""
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    shift = 0 if causal == "top_left" else keys - queries
    distance = torch.arange(keys) - torch.arange(queries).unsqueeze(1) - shift
    if bias is not None:
        scores = scores + bias
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.dtype)[..., None, None] * distance.abs()
    if relative_bias is not None:
        scores = scores + materialised(relative_bias, queries, keys, shift).to(q.dtype)
    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if mask is not None:
        visible = visible & mask
    left, right = window or (None, None)
    if causal:
        right = 0
    if left not in (None, -1):
        visible = visible & (distance >= -left)
    if right not in (None, -1):
        visible = visible & (distance <= right)
    empty = ~visible.any(-1, keepdim=True) if sinks is None else torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    # rows that see nothing: any finite scores, and then zeros
    scores = torch.where(visible, scores, torch.where(empty, 0.0, -math.inf).to(q.dtype))
    columns = scores
    if sinks is not None:
        columns = torch.cat((sinks.to(q.dtype).view(-1, 1, 1).expand(batch, heads, queries, 1), scores), -1)
    weights = torch.softmax(columns, -1)[..., columns.shape[-1] - keys :]
    weights = torch.where(empty, 0.0, weights)
    if dropout_p:
        keep = random.attention_keep(batch, heads, queries, keys, torch.tensor(seed), dropout_p)
        weights = weights * keep / (1.0 - dropout_p)
    lse = torch.where(empty.squeeze(-1), -math.inf, torch.logsumexp(columns, -1))
    return weights @ v, lse


# ---- cases ----

#: What an option may be, by a short name; several names make one case.
OPTIONS = (
    "bias-full", "bias-head", "bias-key", "bias-query", "bias-scalar", "mask", "mask-rows", "causal", "top-left",
    "window", "window-left", "alibi", "alibi-batch", "t5", "t5-causal", "swin", "softcap", "sinks", "dropout", "scale",
)  # fmt: skip
_KIND = {"top-left": "causal", "t5-causal": "t5", "alibi-batch": "alibi", "window-left": "window", "mask-rows": "mask"}


def kind(option: str) -> str:
    return _KIND.get(option, option.split("-")[0])


def compatible(options: Any) -> bool:
    """Whether a call can have these options together."""
    kinds = [kind(option) for option in options]
    return len(set(kinds)) == len(kinds) and ("swin" not in kinds or not {"t5", "alibi"} & set(kinds))


class Case:
    """A random call: tensors and options of ``genfast.ops.attention``.

    ``tensors`` are the differentiable ones, in the order of NAMES; ``relative_bias`` stands there as its table.
    """

    def __init__(
        self, options: Any = (), *, batch: int = 2, heads: int = 2, groups: int = 1, queries: int = 5, keys: int = 5,
        width: int = 3, v_width: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0,
        rows: bool = False,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        if "swin" in options:
            queries = keys = 6 if queries < 60 else 60
        v_width = width if v_width is None else v_width

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

        def in_rows(count: int, positions: int, size: int) -> Tensor:
            x = normal(batch, positions, count, size).transpose(1, 2)
            return x if rows else x.contiguous()

        full = (batch, heads, queries, keys)
        self.dtype, self.options, self.make = dtype, {}, None
        self.tensors = {
            "q": in_rows(heads, queries, width),
            "k": in_rows(heads // groups, keys, width),
            "v": in_rows(heads // groups, keys, v_width),
        }
        for option in options:
            if kind(option) == "bias":
                kept = {"full": (0, 1, 2, 3), "head": (1, 2, 3), "key": (0, 3), "query": (1, 2), "scalar": ()}
                dims = kept[option.split("-")[1]]
                shape = tuple(full[d] if d in dims else 1 for d in range(4))
                self.tensors["bias"] = normal(*(shape[1:] if option == "bias-head" else shape))
            elif option == "alibi":
                self.tensors["alibi_slopes"] = normal(heads, scale=0.3)
            elif option == "alibi-batch":
                self.tensors["alibi_slopes"] = normal(batch, heads, scale=0.3)
            elif kind(option) == "t5":
                self.tensors["relative_bias"] = normal(8, heads)
                self.make = lambda table, both=option == "t5": ops.T5Bias(table, both, 16)
            elif option == "swin":
                window = (2, 3) if queries == 6 else (6, 10)
                self.tensors["relative_bias"] = normal((2 * window[0] - 1) * (2 * window[1] - 1), heads)
                self.make = lambda table, window=window: ops.WindowBias2d(table, window)
            elif option == "sinks":
                self.tensors["sinks"] = normal(heads)
            elif option in ("mask", "mask-rows"):
                shape = full if option == "mask" else (batch, 1, queries, keys)
                mask = torch.rand(shape, generator=generator) > 0.25
                if option == "mask-rows":
                    mask[0, 0, :: max(queries // 3, 1)] = False
                self.options["mask"] = mask
            else:
                self.options |= {
                    "causal": {"causal": True}, "top-left": {"causal": "top_left"},
                    "window": {"window": (max(keys // 3, 1), 1 + keys // 40)}, "window-left": {"window": (2, None)},
                    "softcap": {"softcap": 1.5}, "dropout": {"dropout_p": 0.25, "seed": 11}, "scale": {"scale": 0.3},
                }[option]  # fmt: skip
        self.names = tuple(name for name in NAMES if name in self.tensors)
        self.generator = generator

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """The differentiable tensors as fresh leaves; those that are float32 anyway stay what they are."""
        return tuple(self.tensors[name].detach().to(dtype or self.dtype).requires_grad_() for name in self.names)

    def like(self) -> tuple[Tensor, ...]:
        """Random tensors like the differentiable ones."""
        return tuple(self.normal_like(self.tensors[name]) for name in self.names)

    def normal_like(self, x: Tensor) -> Tensor:
        wide = torch.randn(x.shape, generator=self.generator, dtype=torch.float64).to(x.dtype)
        return wide if x.is_contiguous() else torch.empty_like(x).copy_(wide)

    def keywords(self, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        named = dict(zip(self.names, tensors, strict=True))
        if "relative_bias" in named:
            named["relative_bias"] = self.make(named["relative_bias"])  # type: ignore[misc]
        return named | self.options

    def fused(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(**self.keywords(tensors), return_lse=True)

    def jvp(self, tensors: Any, tangents: Any) -> tuple[Tensor, ...]:
        """(out, tangent, lse, lse_tangent) of ``attention_jvp``."""
        directions = {f"d{name}": t for name, t in zip(self.names, tangents, strict=True)}
        return ops.attention_jvp(**self.keywords(tensors), **directions, return_lse=True)

    def plain(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return plain(**self.keywords(tensors))

    def finite_plain(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """``plain`` with 0 for the -inf of rows that see nothing, so that it differentiates."""
        out, lse = self.plain(*tensors)
        return out, torch.where(lse == -math.inf, 0.0, lse)

    def raw(self, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        """The arguments of the raw op, the tensors' values those of this case in ``dtype``."""
        named: dict[str, Any] = dict.fromkeys(
            ("bias", "mask", "window", "alibi_slopes", "relative_bias", "softcap", "sinks", "scale", "seed")
        )
        named |= {"causal": False, "dropout_p": 0.0}
        tensors = tuple(self.tensors[name].to(dtype or self.dtype) for name in self.names)
        named |= self.keywords(tensors)
        return arguments("attention", *(named[n] for n in (
            "q", "k", "v", "bias", "mask", "causal", "window", "alibi_slopes", "relative_bias", "softcap", "sinks",
            "dropout_p", "scale", "seed",
        )))  # fmt: skip


# ---- numbers against float64 ----

#: "cpp-<instruction set>" for each of this machine, and the plain formula.
BACKENDS = [*(f"cpp-{isa}" for isa in C.cpu_isas()), "reference"]


@contextlib.contextmanager
def running(backend: str) -> Iterator[str]:
    """Forces a backend, and for C++ an instruction set; yields the backend's name for ``Op.backends``."""
    name, _, isa = backend.partition("-")
    before = C.cpu_isa()
    with genfast.use_backend(name):
        C.set_cpu_isa(isa or before)
        try:
            yield name
        finally:
            C.set_cpu_isa(before)


def orders(case: Case, name: str) -> dict[str, tuple[Any, ...]]:
    """The outputs of the four raw ops, each as ``name`` runs them from its own out and lse."""
    raw = case.raw()
    primals, fixed = raw[:6], raw[6:]
    generator = torch.Generator().manual_seed(77)

    def like(x: Any) -> Any:
        return None if x is None else torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

    runs = {key: op.backends[name].run for key, op in RAW.items()}
    out, lse = runs["forward"](*raw)
    dout, dlse, tangents = like(out), like(lse), tuple(like(x) for x in primals)
    out_t, lse_t = runs["tangent"](*primals, *tangents, out, lse, *fixed)
    wanted = (True, True)
    return {
        "forward": (out, lse),
        "backward": runs["backward"](dout, dlse, *primals, out, lse, *fixed, *wanted),
        "tangent": (out_t, lse_t),
        "second": runs["second"](
            dout, dlse, *primals, *tangents, out, lse, out_t, lse_t, *fixed, *wanted
        ),
    }  # fmt: skip


def exact_orders(case: Case) -> dict[str, tuple[Any, ...]]:
    """The same in float64 by the plain formula, of the same values."""
    wide = Case.__new__(Case)
    wide.__dict__ |= case.__dict__
    wide.dtype = torch.float64
    wide.tensors = {key: x.double() for key, x in case.tensors.items()}
    return orders(wide, "reference")


def error(got: Tensor, exact: Tensor, floor: float) -> float:
    """The largest error relative to the largest value, or to ``floor`` where all should be 0 or nearly."""
    assert got.shape == exact.shape
    infinite = exact.isinf()
    assert torch.equal(got.double()[infinite], exact[infinite])
    difference = torch.where(infinite, 0.0, got.double() - exact).abs()
    return float(difference.max() / exact[~infinite].abs().max().clamp(min=floor)) if exact.numel() else 0.0


def assert_orders_match(case: Case, backends: Iterable[str] = BACKENDS, bound: float = 1e-5) -> None:
    """Each output of each raw op against float64. Gradients are differences of numbers of order 1 and more."""
    exact = exact_orders(case)
    for backend in backends:
        with running(backend) as name:
            found = orders(case, name)
        for key, outputs in found.items():
            for position, (got, right) in enumerate(zip(outputs, exact[key], strict=True)):
                assert (got is None) == (right is None), (key, position)
                if got is not None:
                    measured = error(got, right, 0.1 if key in ("forward", "tangent") else 1.0)
                    assert measured <= bound, f"{backend}: {key}, output {position}: {measured:.2g}"


def half_orders(case: Case, function: Any, dtype: torch.dtype | None = None) -> dict[str, tuple[Tensor, ...]]:
    """out, its gradients, its tangent, and the gradients of the tangent, of (out, lse) = function(*tensors)."""
    tensors = case.leaves(dtype)
    generator = torch.Generator().manual_seed(78)
    directions = tuple(torch.randn(t.shape, generator=generator).to(case.dtype).to(t.dtype) for t in tensors)
    out = function(*tensors)[0]
    dout = torch.randn(out.shape, generator=generator).to(case.dtype).to(out.dtype)
    gradients = torch.autograd.grad(out, tensors, dout)

    def tangent(*t: Tensor) -> Tensor:
        return torch.func.jvp(lambda *x: function(*x)[0], t, directions)[1]

    primals = tuple(t.detach() for t in tensors)
    along, pull = torch.func.vjp(tangent, *primals)
    return {"out": (out.detach(),), "gradients": gradients, "tangent": (along,), "second": pull(dout)}


def assert_half_matches(case: Case, backends: Iterable[str] = ("cpp", "reference")) -> None:
    """Output error at most twice, gradient errors three times those of the plain formula in the same dtype."""
    exact = half_orders(case, case.finite_plain, torch.float64)
    theirs = half_orders(case, case.finite_plain)
    unit = torch.finfo(case.dtype).eps / 2  # what rounding the exact result costs
    for backend in backends:
        with running(backend):
            ours = half_orders(case, case.fused)
        for key, outputs in ours.items():
            factor = 2.0 if key in ("out", "tangent") else 3.0
            names = ("out",) if len(outputs) == 1 else case.names
            for name, got, other, right in zip(names, outputs, theirs[key], exact[key], strict=True):
                assert got.dtype == other.dtype
                measured, plain_error = error(got, right, 0.1), error(other, right, 0.1)
                assert measured <= factor * max(plain_error, unit), (
                    f"{backend}: {key}, {name}: {measured:.2g}, the plain formula {plain_error:.2g}"
                )
