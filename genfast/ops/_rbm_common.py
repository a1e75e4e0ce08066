"""What the RBM ops share: argument checks, the precision of products, and ops whose results have no derivative."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from genfast._checks import check_count, check_float_tensor, shape_of
from genfast._op import Differentiable, Formula, Op, differentiable
from genfast.ops.pack_bits import pack_bits, unpack_bits

Tensor = torch.Tensor

__all__ = [
    "HALF_STEPS", "PRECISIONS", "checked_beta", "checked_logvar", "checked_parameters", "checked_position",
    "checked_precision", "checked_states", "constant", "product", "unpacked",
]  # fmt: skip

HALF_STEPS = 2**32  # the noise's step counter has 32 bits
PRECISIONS = ("fp32", "bf16", "split")
STATE_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool))


def product(x: Tensor, W: Tensor, precision: str) -> Tensor:
    """x @ W in W's dtype; in bf16 both are rounded to bfloat16, sums stay in W's dtype."""
    x = x.to(W.dtype)
    if precision == "bf16":
        x, W = x.to(torch.bfloat16).to(W.dtype), W.to(torch.bfloat16).to(W.dtype)
    return x @ W


def unpacked(run: Callable[..., Any]) -> Callable[..., Any]:
    """The raw op ``rbm_half_step`` by ``run``, which knows no bit-packed states and lacks the arguments for them."""

    @functools.wraps(run)
    def half_step(x: Tensor, W: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
        *rest, x_packed, out_packed = args
        if x_packed:
            up = rest[4]
            x = unpack_bits(x, W.shape[0 if up else 1])
        state, mean = run(x, W, *rest)
        return (pack_bits(state) if out_packed else state), mean

    return half_step


def constant(op: Op, what: str) -> Differentiable:
    """Calls ``op``, whose results are random draws or gradients: asking for a derivative through them raises."""
    message = (
        f"{op.name}: {what} has no derivative. Call it under torch.no_grad(), or detach its results; "
        "rbm_free_energy is differentiable"
    )

    class Constant(Formula):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Tensor | None, ...]:
            return ()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(message)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(message)

    Constant.__name__ = Constant.__qualname__ = "".join(part.title() for part in op.name.split("_"))

    def composite(*args: Any) -> Any:
        raise RuntimeError(message)

    call = differentiable(Constant, composite)
    op.tie = call
    return call


# ---- argument checks ----


def checked_states(op: str, name: str, value: Any, units: int, *, rank: int | None = None) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in STATE_DTYPES:
        raise TypeError(f"{op}: {name} must be a floating-point, uint8 or bool tensor, got {value.dtype}")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{op}: {name} must be a dense (strided) tensor; call .to_dense() first")
    if value.dim() == 0 or value.shape[-1] != units or (rank is not None and value.dim() != rank):
        wanted = f"[B, {units}]" if rank == 2 else f"[..., {units}]"
        raise ValueError(f"{op}: {name} must be {wanted}, got {shape_of(value)}")
    return value


def checked_parameters(
    op: str, W: Any, b: Any, c: Any, like: Tensor | None = None, *, optional: bool = False
) -> tuple[int, int]:
    """(V, H) of W [V, H], b [V], c [H], which share dtype and device (and the device of ``like``)."""
    check_float_tensor(op, "W", W)
    shape = W.shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{op}: W must be [V, H] with at least one unit on each side, got {shape_of(W)}")
    on_cpu = W.is_cpu
    for name, bias, size in (("b", b, shape[0]), ("c", c, shape[1])):
        if bias is None and optional:
            continue
        check_float_tensor(op, name, bias)
        if bias.shape != (size,):
            raise ValueError(f"{op}: {name} must have shape ({size},) beside W {shape_of(W)}, got {shape_of(bias)}")
        if bias.dtype is not W.dtype:
            raise TypeError(f"{op}: {name} is {bias.dtype}, W {W.dtype}; they must be equal")
        if not (on_cpu and bias.is_cpu) and bias.device != W.device:
            raise ValueError(f"{op}: {name} is on {bias.device}, W on {W.device}; move them to one device")
    if like is not None and not (on_cpu and like.is_cpu) and like.device != W.device:
        raise ValueError(f"{op}: the states are on {like.device}, W on {W.device}; move them to one device")
    return shape[0], shape[1]


def checked_logvar(op: str, logvar: Any, W: Tensor, visible: str = "gaussian") -> Tensor | None:
    if logvar is None:
        return None
    check_float_tensor(op, "logvar", logvar)
    if logvar.shape != W.shape[:1]:
        raise ValueError(
            f"{op}: logvar must have shape ({W.shape[0]},), one value a visible unit, got {shape_of(logvar)}"
        )
    if logvar.dtype != W.dtype or logvar.device != W.device:
        raise TypeError(f"{op}: logvar must be {W.dtype} on {W.device} like W, got {logvar.dtype} on {logvar.device}")
    if visible != "gaussian":
        raise ValueError(f"{op}: logvar belongs to gaussian visible units; here they are {visible!r}")
    return logvar


def checked_precision(op: str, precision: Any) -> str:
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    return str(precision)


def checked_beta(op: str, beta: Any, rows: int, W: Tensor) -> Tensor | None:
    """None for 1, else the inverse temperatures as a tensor [rows] or [1] in the arithmetic's dtype."""
    if beta is None or (type(beta) in (float, int) and beta == 1):
        return None
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    if isinstance(beta, Tensor):
        if beta.dim() > 1 or (beta.dim() == 1 and beta.shape[0] != rows):
            raise ValueError(f"{op}: beta must be a number or have shape ({rows},), one a chain, got {shape_of(beta)}")
        return beta.detach().to(device=W.device, dtype=dtype).reshape(-1)
    if isinstance(beta, bool) or not hasattr(beta, "__float__"):
        raise TypeError(f"{op}: beta must be a float or a tensor of one float a chain, got {type(beta).__name__}")
    value = float(beta)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{op}: beta must be finite and not negative, got {value}")
    return torch.full((1,), value, dtype=dtype, device=W.device)


def checked_position(op: str, chains: Any, offset: Any, step: Any, half_steps: Any) -> tuple[Any, Any]:
    """(chain_offset, step) whose chains and half-steps stay below 2^32."""
    offset = check_count(op, "chain_offset", offset, 0, 2**32)
    step = check_count(op, "step", step, 0, HALF_STEPS)
    if offset + chains > 2**32:
        raise ValueError(f"{op}: chains are numbered below 2^32; {chains} chains from {offset} on pass it")
    if step + half_steps > HALF_STEPS:
        raise ValueError(
            f"{op}: half-steps are numbered below 2^32; {half_steps} from step {step} on pass it; take another seed"
        )
    return offset, step
