"""Attention over sequences that several processes hold in parts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from genfast._checks import wide
from genfast.ops._attention_arguments import arguments
from genfast.ops._attention_formula import _backward, attend
from genfast.ops._attention_relative import T5Bias, distance_table
from genfast.ops._attention_tensors import Extent
from genfast.ops.merge_attention import merge_attention

__all__ = ["ring_attention"]

Tensor = torch.Tensor

_OP = "ring_attention"


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: T5Bias | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """``attention`` of a sequence whose parts lie on the processes of a group, each with as many positions.

    Keys and values travel around the ring of processes, and each process merges what its queries see of them; no
    process holds more than two parts. All processes of the group must make the call, and its backward, together.
    Gradients of first order send the parts around again; those of higher order differentiate through all of it and keep
    every part that passed by. Gradients of ``alibi_slopes`` and of ``relative_bias`` are those of this process's
    queries: sum them over the group, as data parallelism does. Positions are those in the whole sequence.

    Args:
        q: queries [B, Hq, S, D] of this process, the positions rank * S to (rank + 1) * S - 1; or a ``DTensor``
            [B, Hq, S * processes, D] sharded in dimension 2 over a mesh of one dimension, which then is the group. All
            arguments not listed here are as in ``attention``.
        k: keys [B, Hkv, S, D], likewise.
        v: values [B, Hkv, S, Dv], likewise.
        group: a process group; None for the default one.

    Returns:
        out [B, Hq, S, Dv] of this process's queries, or (out, lse); ``DTensor`` for ``DTensor``.

    Raises:
        RuntimeError: without an initialized process group.
        TypeError, ValueError: as ``attention``; also for parts with other numbers of queries than keys, and
            for a ``DTensor`` that is not sharded so.

    Source: Liu et al., "Ring attention with blockwise transformers for near-infinite context", 2023.

    Examples:
        >>> import tempfile
        >>> store = tempfile.NamedTemporaryFile()
        >>> torch.distributed.init_process_group("gloo", init_method=f"file://{store.name}2", rank=0, world_size=1)
        >>> q, k, v = torch.randn(3, 1, 2, 6, 8)
        >>> out = ring_attention(q, k, v, causal=True)
        >>> torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-6)
        True
        >>> torch.distributed.destroy_process_group()
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(f"{_OP} needs a process group: call torch.distributed.init_process_group first")
    from torch.distributed.tensor import DTensor, Shard

    mesh = None
    if isinstance(q, DTensor):
        mesh = q.device_mesh
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, DTensor) or x.device_mesh != mesh or x.placements != (Shard(2),):
                raise ValueError(f"{_OP}: {name} must be a DTensor sharded in dimension 2 alone, over q's mesh")
        group = mesh.get_group()
        q, k, v = (x.to_local() for x in (q, k, v))  # type: ignore[attr-defined]
    if not isinstance(causal, bool):
        raise TypeError(f"{_OP}: causal must be a bool, got {type(causal).__name__}")
    if relative_bias is not None and not isinstance(relative_bias, T5Bias):
        raise TypeError(f"{_OP}: relative_bias must be a T5Bias, got {type(relative_bias).__name__}")
    checked = arguments(
        _OP, q, k, v, None, None, causal, window, None, None, softcap, None, 0.0, scale, None
    )  # fmt: skip
    q, k, v = checked[:3]
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"{_OP}: a process holds as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    ring = _Ring(group, checked[6:], alibi_slopes, relative_bias)
    parameters = () if alibi_slopes is None and relative_bias is None else ring.parameters()
    out, lse = _RingFunction.apply(ring, q, k, v, *parameters)
    if mesh is not None:
        out, lse = (DTensor.from_local(x, mesh, (Shard(2),)) for x in (out, lse))
    return (out, lse) if return_lse else out


class _Ring:
    """A call: its processes, and the options of the raw op for each pair of parts."""

    def __init__(self, group: Any, fixed: tuple[Any, ...], slopes: Tensor | None, bias: T5Bias | None) -> None:
        self.group, self.fixed, self.slopes, self.bias = group, fixed, slopes, bias
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def parameters(self) -> tuple[Tensor | None, Tensor | None]:
        return self.slopes, None if self.bias is None else self.bias.table

    def source(self, step: int) -> int:
        """Whose keys are here after ``step`` moves."""
        return (self.rank - step) % self.size

    def options(self, step: int, length: int) -> tuple[Any, ...] | None:
        """The raw op's options, or None where no query sees a key of the part."""
        *rest, left, right, _, bottom_right, offset = self.fixed
        shift = (self.rank - self.source(step)) * length
        # Key j and query i are j - i - shift apart: from 1 - length - shift to length - 1 - shift.
        if (right >= 0 and 1 - length - shift > right) or (left >= 0 and length - 1 - shift < -left):
            return None
        return *rest, left, right, shift, bottom_right, offset

    def table(self, q: Tensor, step: int, parameters: tuple[Tensor | None, ...]) -> Tensor | None:
        if not parameters:
            return None
        slopes, entries = parameters
        length = q.shape[2]
        bias = None
        if entries is not None and self.bias is not None:
            bias = T5Bias(entries, self.bias.bidirectional, self.bias.max_distance)
        origin = length - 1 - (self.rank - self.source(step)) * length
        return distance_table(_OP, q, Extent.of(q, q), origin, slopes, bias)

    def rotate(self, tensors: tuple[Tensor, ...], by: int) -> tuple[Tensor, ...]:
        """What the process ``by`` places before holds; every process calls it."""
        if self.size == 1:
            return tensors
        ahead, behind = (self.rank + by) % self.size, (self.rank - by) % self.size
        received = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
        peers = (
            (ahead, behind)
            if self.group is None
            else tuple(dist.get_global_rank(self.group, peer) for peer in (ahead, behind))
        )
        work = []
        for tag, (x, y) in enumerate(zip(tensors, received, strict=True)):
            work.append(dist.P2POp(dist.isend, x.contiguous(), peers[0], self.group, tag))
            work.append(dist.P2POp(dist.irecv, y, peers[1], self.group, tag))
        for request in dist.batch_isend_irecv(work):
            request.wait()
        return received


class _Rotate(torch.autograd.Function):
    """Moves tensors around the ring; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, ring: _Ring, by: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ring, ctx.by = ring, by
        return tuple(x.view_as(x) if ring.size == 1 else x for x in ring.rotate(tensors, by))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, None, *_Rotate.apply(ctx.ring, -ctx.by, *gradients)


class _Zeros(torch.autograd.Function):
    """Zeros like a tensor, as a function of another."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, like: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return torch.zeros_like(like)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _Zeros.apply(gradient, *ctx.saved_tensors), None


class _Tied(torch.autograd.Function):
    """``out``, with a gradient of zero to k and v: all processes must take part in every move of the backward."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(k, v)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        k, v = ctx.saved_tensors
        return gradient, _Zeros.apply(gradient, k), _Zeros.apply(gradient, v)


def _unseen(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that see no key."""
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    return out, q.new_full(q.shape[:3], -torch.inf, dtype=wide(q.dtype))


def _composed(ring: _Ring, q: Tensor, k: Tensor, v: Tensor, parameters: tuple[Tensor | None, ...]) -> Any:
    """(out, lse) by differentiable steps, which keep every part."""
    out, lse = _unseen(q, v)
    for step in range(ring.size):
        if step:
            k, v = _Rotate.apply(ring, 1, k, v)
        options = ring.options(step, q.shape[2])
        if options is not None:
            part = attend(q, k, v, None, ring.table(q, step, parameters), None, *options)
            out, lse = part if step == 0 else merge_attention(out, lse, *part)
        else:
            out = _Tied.apply(out, k, v)
    return out, lse


class _RingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: _Ring, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor | None) -> Any:
        out, lse = _composed(ring, q, k, v, parameters)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, out, lse, *parameters)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None = None, dlse: Tensor | None = None) -> Any:
        ring = ctx.ring
        q, k, v, out, lse, *parameters = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            return None, *_composed_gradients(ring, q, k, v, tuple(parameters), dout, dlse)
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
        totals = [None if x is None else torch.zeros_like(x) for x in parameters]
        for step in range(ring.size):
            if step:
                k, v, dk, dv = ring.rotate((k, v, dk, dv), 1)
            options = ring.options(step, q.shape[2])
            if options is None:
                continue
            with torch.enable_grad():
                leaves = tuple(None if x is None else x.detach().requires_grad_() for x in parameters)
                table = ring.table(q, step, leaves)
            wanted = table is not None
            args = (dout, dlse, q, k, v, None, None if table is None else table.detach(), None, out, lse)
            own = _backward(*args, *options, False, wanted)
            dq, dk, dv = dq + own[0], dk + own[1], dv + own[2]
            if wanted:
                sums = [x for x in totals if x is not None]
                found = torch.autograd.grad(table, [x for x in leaves if x is not None], own[3])
                for total, part in zip(sums, found, strict=True):
                    total += part
        if ring.size > 1:  # home
            dk, dv = ring.rotate((dk, dv), 1)
        return None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *totals


def _composed_gradients(  # type: ignore[no-untyped-def]
    ring, q, k, v, parameters, dout, dlse
) -> tuple[Tensor | None, ...]:
    inputs = (q, k, v, *parameters)
    out, lse = _composed(ring, q, k, v, parameters)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    outputs = (out,) if dlse is None else (out, lse)
    gradients = iter(
        torch.autograd.grad(outputs, wanted, (dout, dlse)[: len(outputs)], create_graph=True, allow_unused=True)
    )
    return tuple(next(gradients) if x is not None and x.requires_grad else None for x in inputs)
