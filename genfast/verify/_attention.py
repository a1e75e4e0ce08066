"""Checks of the attention kernels: each raw op against the plain formulas in float64."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from genfast import random
from genfast.ops import _attention_formula as formula
from genfast.ops import _attention_reference as plain
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor

__all__ = ["checks"]

_OPS = {
    "forward": (formula._forward_op, plain.reference_forward, ("out", "lse")),
    "tangent": (formula._tangent_op, plain.reference_tangent, ("out'", "lse'")),
    "backward": (formula._backward_op, plain.reference_backward, ("dq", "dk", "dv", "dbias", "dtable", "dsinks")),
    "second": (formula._second_op, plain.reference_second, ("gq", "gk", "gv", "gbias", "gtable", "gsinks")),
}


class _Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    depth: int
    value_depth: int


_SMALL = (_Shape(1, 2, 1, 17, 20, 16, 16), _Shape(2, 2, 2, 1, 9, 8, 24))
_LARGE = (
    _Shape(2, 4, 2, 200, 333, 64, 64),
    _Shape(1, 2, 2, 128, 128, 128, 128),
    _Shape(1, 2, 1, 130, 70, 80, 96),
    _Shape(1, 1, 1, 65, 129, 256, 256),
    _Shape(3, 2, 2, 1, 1024, 64, 64),
    _Shape(1, 1, 1, 1, 1, 3, 5),
)
_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"right": 0},
    {"left": 5, "right": 2},
    {"mask": True, "softcap": 3.0},
    {"sinks": True, "right": 0},
    {"bias": "1111", "dropout_p": 0.25, "batch_offset": 3},
    {"bias": "0111", "softcap": 4.0},
    {"bias": "1001", "sinks": True},
    {"bias": "0010", "sinks": True},
    {"table": "difference", "right": 0},
    {"table": "index", "mask": True},
    {"packed": True, "right": 0, "sinks": True, "table": "index"},
    {"packed": True, "left": 9, "right": 3, "mask": True, "softcap": 3.0, "dropout_p": 0.25, "batch_offset": 3},
    {"packed": True, "bias": "1011", "table": "index"},
)


class _Problem(NamedTuple):
    primals: tuple[Any, ...]
    tangents: tuple[Any, ...]
    cotangents: tuple[Tensor, Tensor]
    fixed: tuple[Any, ...]


def _problem(c: Context, dtype: torch.dtype, shape: _Shape, options: dict[str, Any]) -> _Problem:
    B, H, H_kv, S, K, D, Dv = shape
    new = functools.partial(c.normal, dtype=dtype)
    packed = "packed" in options
    q_starts = k_starts = None
    sequences = B
    if packed:  # four sequences in the rows of one, one without queries, one without keys, and rows after the last
        B, sequences = 1, 4
        q_starts = torch.tensor((0, S // 3, S // 3, S // 2, S - S // 8), device=c.device)
        k_starts = torch.tensor((0, K // 4, K // 2, K // 2, K - K // 9), device=c.device)
    sizes = ((B, H, S, D), (B, H_kv, K, D), (B, H_kv, K, Dv))
    primals: list[Any] = [new(*size) for size in sizes]
    tangents: list[Any] = [new(*size) for size in sizes]
    q_index = k_index = mask = None
    bias = options.get("bias")
    full = (sequences, H, S, K)
    bias_shape = None if bias is None else tuple(n if own == "1" else 1 for n, own in zip(full, bias, strict=True))
    length = S + K - 1
    if options.get("table") == "index":
        length = 40
        q_index = torch.arange(S, dtype=torch.int32, device=c.device) * 7 % 20 + 20
        k_index = torch.arange(K, dtype=torch.int32, device=c.device) * 5 % 20
    for group in (primals, tangents):
        group.append(None if bias_shape is None else new(*bias_shape))
        group.append(c.normal(1, H, length) if "table" in options else None)
        group.append(c.normal(H) if "sinks" in options else None)
    if "mask" in options:
        mask = c.normal(sequences, 1, S, K) > -0.5
        mask[:, :, 0] = False
    seed = torch.tensor(c.new_seed())
    numbers = (options.get("softcap", 0.0), options.get("dropout_p", 0.0), options.get("left", -1))
    fixed = (
        mask, q_index, k_index, q_starts, k_starts, seed, 1 / math.sqrt(D), *numbers, options.get("right", -1),
        0 if packed else K - S, packed, options.get("batch_offset", 0),
    )  # fmt: skip
    return _Problem(tuple(primals), tuple(tangents), (new(B, H, S, Dv), c.normal(B, H, S)), fixed)


def _exact(args: tuple[Any, ...]) -> list[Any]:
    """The arguments on the CPU, floating-point tensors in float64."""
    moved = [x.cpu() if isinstance(x, Tensor) else x for x in args]
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in moved]


def _arguments(name: str, x: _Problem, run: Any) -> tuple[Any, ...]:
    """What the op ``name`` takes; ``run(name, *args)`` gives the outputs of those that come before it."""
    if name == "forward":
        return *x.primals, *x.fixed
    out, lse = run("forward", *x.primals, *x.fixed)
    needs = x.fixed[3] is None, True  # not every backend has the gradient of a bias of packed sequences
    if name == "backward":
        return *x.cotangents, *x.primals, out, lse, *x.fixed, *needs
    tangent = (*x.primals, *x.tangents, out, lse, *x.fixed)
    if name == "tangent":
        return tangent
    return (*x.cotangents, *x.primals, *x.tangents, out, lse, *run("tangent", *tangent), *x.fixed, *needs)


def _check(c: Context, name: str, x: _Problem, where: str) -> tuple[Any, ...]:
    op, _, names = _OPS[name]
    dtype = x.primals[0].dtype  # sums of float32 depend on outputs that were rounded to it
    bound = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    got = op(*_arguments(name, x, lambda other, *args: _OPS[other][0](*args)))
    exact = _Problem(*(tuple(_exact(part)) for part in x))  # type: ignore[arg-type]
    references: dict[str, Any] = {other: reference for other, (_, reference, _) in _OPS.items()}
    want = references[name](*_arguments(name, exact, lambda other, *args: references[other](*args)))
    first = want[0].abs().max()  # terms of small gradients, as those of biases, are of this size
    for label, value, right in zip(names, got, want, strict=True):
        if value is not None and value.numel():
            largest = torch.maximum(first, right[right.isfinite()].abs().max())
            c.compare(label, value, right, largest, bound=bound, where=where)
    return got


def _allowed(c: Context, turn: int | None = None) -> tuple[torch.dtype, ...]:
    found = c.dtypes if turn is None else c.dtypes_of(turn)
    return tuple(x for x in found if x != torch.float64 or c.backend == "reference") or (torch.float32,)


def _shapes(c: Context, name: str) -> None:
    """All shapes and dtypes, with and without a causal bound."""
    tiny = c.size_class == "tiny"
    for turn, shape in enumerate(_SMALL if tiny else _SMALL + _LARGE):
        for dtype in _allowed(c, turn):
            options = _OPTIONS[turn % 2]
            _check(c, name, _problem(c, dtype, shape, options), f"{shape} {dtype} {options}")
            c.ran(dtype, shape, *options)


def _options(c: Context, name: str) -> None:
    """Every option, some in pairs."""
    shape = _SMALL[0] if c.size_class == "tiny" else _Shape(2, 4, 2, 70, 101, 32, 48)
    for turn, options in enumerate(_OPTIONS):
        for dtype in _allowed(c, turn):
            _check(c, name, _problem(c, dtype, shape, options), f"{shape} {dtype} {options}")
            c.ran(dtype, shape, *options)


def _repeats(c: Context, name: str) -> None:
    """The same bits on every run."""
    shape = _SMALL[0] if c.size_class == "tiny" else _Shape(2, 4, 2, 200, 300, 64, 64)
    x = _problem(c, torch.float32, shape, {"bias": "0011", "table": "difference", "right": 0})
    first, op = _check(c, name, x, "first"), _OPS[name][0]
    args = _arguments(name, x, lambda other, *args: _OPS[other][0](*args))
    for _ in range(c.scaled(20, 2)):
        for label, one, other in zip(_OPS[name][2], first, op(*args), strict=True):
            if one is not None:
                c.same_bits(label, one, other)
    c.ran(torch.float32, shape, "repeats")


def _layouts(c: Context, name: str) -> None:
    """Heads inside rows, as projections leave them, and expanded tensors."""
    shape = _SMALL[0] if c.size_class == "tiny" else _Shape(2, 4, 2, 70, 101, 32, 32)
    for dtype in _allowed(c, 0):
        x = _problem(c, dtype, shape, {})
        turned = tuple(None if t is None else t.transpose(1, 2).contiguous().transpose(1, 2) for t in x.primals)
        expanded = x.cotangents[0][:, :, :1, :1].expand_as(x.cotangents[0])
        _check(c, name, x._replace(primals=turned, cotangents=(expanded, x.cotangents[1])), "heads inside rows")
        c.ran(dtype, shape, "heads inside rows", "expanded")


def _zero_sizes(c: Context, name: str) -> None:
    """No batch, no queries, no keys: zeros, and log-sums of minus infinity."""
    op = _OPS[name][0]
    for shape in (_Shape(0, 2, 1, 5, 6, 8, 8), _Shape(1, 2, 1, 0, 6, 8, 8), _Shape(1, 2, 1, 5, 0, 8, 8)):
        for dtype in _allowed(c, 0):
            args = _arguments(name, _problem(c, dtype, shape, {}), lambda other, *args: _OPS[other][0](*args))
            for label, got in zip(_OPS[name][2], op(*args), strict=True):
                empty = got is None or bool(((got == 0) | (got == -math.inf)).all())
                c.require(empty, f"{label} of {shape} {dtype} is not empty, zero or minus infinity")
            c.ran(dtype, shape, "zero sizes")


def _device_call(name: str, first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    """The op of two matrices [S, D], with dropout, for the checks of streams and graphs."""
    q, k = first[None, None], second[None, None]
    primals, tangents = (q, k, k, None, None, None), (k, q, q, None, None, None)
    drawn = random.as_seed(seed, first.device)
    x = _Problem(primals, tangents, (q, q.float().sum(-1)), (None, None, None, drawn, 0.125, 0.0, 0.25, -1, 0, 0))
    got = _OPS[name][0](*_arguments(name, x, lambda other, *args: _OPS[other][0](*args)))
    return tuple(t for t in got if t is not None)


def _streams(c: Context, name: str) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (130, 64), functools.partial(_device_call, name))


def _graphs(c: Context, name: str) -> None:
    """CUDA-graph capture and replay, with the seed of the dropout drawn on the device."""
    _gpu.captured(c, (130, 64), functools.partial(_device_call, name))


def checks(name: str) -> tuple[Check, ...]:
    """The checks of ``"forward"``, ``"backward"``, ``"tangent"`` or ``"second"``."""
    runs = {
        "shapes": _shapes, "options": _options, "repeats": _repeats, "layouts": _layouts, "zero sizes": _zero_sizes,
        "streams": _streams, "graphs": _graphs,
    }  # fmt: skip
    return tuple(
        Check(label, functools.partial(run, name=name), gpu_only=label in ("streams", "graphs"))
        for label, run in runs.items()
    )
