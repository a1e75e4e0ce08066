"""The four raw ops of attention and their derivative rules; docs/kernels/attention.md has the mathematics.

Forward, backward, tangent (forward mode) and second (the gradient of the tangent) close under differentiation: the
rules of each call the others. ``out`` and ``lse``, and their tangents, count as functions of q, k, v, bias, table and
sinks wherever they are inputs, and have no gradient of their own.
"""

from __future__ import annotations

from typing import Any

import torch

from genfast._checks import wide
from genfast._op import Backend, Formula, Op, differentiable
from genfast.launch import _attention_cpu as cpu
from genfast.launch import _attention_triton as triton
from genfast.launch._common import heads_like
from genfast.ops._attention_checks import check_backward, check_forward, check_second, check_tangent
from genfast.ops._attention_reference import (
    reference_backward,
    reference_forward,
    reference_second,
    reference_tangent,
    reference_tangent_change,
)

__all__ = ["attend", "tangent"]

Tensor = torch.Tensor

_FIXED = (
    "Tensor? mask, Tensor? q_index, Tensor? k_index, Tensor? q_starts, Tensor? k_starts, Tensor? seed, float scale, "
    "float softcap, float dropout_p, SymInt left, SymInt right, SymInt shift, bool bottom_right, SymInt batch_offset"
)
_PRIMALS = "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? table, Tensor? sinks"
_TANGENTS = "Tensor q_t, Tensor k_t, Tensor v_t, Tensor? bias_t, Tensor? table_t, Tensor? sinks_t"
_OPTIONS, _KEPT = 14, 6  # of _FIXED, and the tensors among them


# ---- raw ops ----


def _fake_forward(q, k, v, *_):  # type: ignore[no-untyped-def]
    return heads_like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


def _fake_gradients(q, k, v, bias, table, sinks, need_bias, need_table):  # type: ignore[no-untyped-def]
    return (
        heads_like(q),
        heads_like(k),
        heads_like(v),
        bias.new_empty(bias.shape) if need_bias and bias is not None else q.new_empty(0),
        table.new_empty(table.shape) if need_table and table is not None else q.new_empty(0),
        q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape),
    )


def _fake_backward(dout, dlse, *rest):  # type: ignore[no-untyped-def]
    return _fake_gradients(*rest[:6], *rest[-2:])


def _backends(name: str, reference: Any, primals: int, fixed: int) -> dict[str, Backend]:
    """``primals`` and ``fixed`` say where q and mask stand among the raw op's arguments."""

    def triton_supports(*args: Any) -> str | None:
        need_bias = any(args[fixed + _OPTIONS : fixed + _OPTIONS + 1])
        return triton.supports(*args[primals : primals + 6], *args[fixed : fixed + _OPTIONS], need_bias=need_bias)

    return {
        "triton": Backend(getattr(triton, name), triton_supports),
        "cpp": Backend(getattr(cpu, name), getattr(cpu, f"{name}_supports")),
        "reference": Backend(reference),
    }


_forward_op = Op(
    f"attention({_PRIMALS}, {_FIXED}) -> (Tensor out, Tensor lse)",
    _backends("forward", reference_forward, 0, 6),
    _fake_forward,
    check=check_forward,
)
_backward_op = Op(
    f"attention_backward(Tensor dout, Tensor? dlse, {_PRIMALS}, Tensor out, Tensor lse, {_FIXED}, bool need_bias, "
    "bool need_table) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dtable, Tensor dsinks)",
    _backends("backward", reference_backward, 2, 10),
    _fake_backward,
    check=check_backward,
)
_tangent_op = Op(
    f"attention_tangent({_PRIMALS}, {_TANGENTS}, Tensor out, Tensor lse, {_FIXED}) -> (Tensor out_t, Tensor lse_t)",
    _backends("tangent", reference_tangent, 0, 14),
    _fake_forward,
    check=check_tangent,
)
_second_op = Op(
    f"attention_second(Tensor dout, Tensor? dlse, {_PRIMALS}, {_TANGENTS}, Tensor out, Tensor lse, Tensor out_t, "
    f"Tensor lse_t, {_FIXED}, bool need_bias, bool need_table) "
    "-> (Tensor gq, Tensor gk, Tensor gv, Tensor gbias, Tensor gtable, Tensor gsinks)",
    _backends("second", reference_second, 2, 18),
    _fake_backward,
    check=check_second,
)


# ---- derivative rules ----
# In these, ``primals`` are (q, k, v, bias, table, sinks), ``fixed`` the options of _FIXED, and a gradient or a tangent
# that is not wanted or zero is None.

_Six = tuple[Any, ...]


def _any(tensors: Any) -> bool:
    return any(tensor is not None for tensor in tensors)


def _direction(primals: _Six, tangents: _Six) -> _Six:
    """Tangents as the raw ops take them: zeros for those of q, k and v that are missing."""
    filled = (torch.zeros_like(p) if t is None else t for p, t in zip(primals[:3], tangents[:3], strict=True))
    return *filled, *tangents[3:6]


def _cotangent(dout: Tensor | None, out: Tensor) -> Tensor:
    return torch.zeros_like(out) if dout is None else dout


def _present(primals: _Six, need_bias: bool, need_table: bool) -> tuple[bool, ...]:
    """Which of the six gradients exist."""
    *_, bias, table, sinks = primals
    return True, True, True, need_bias and bias is not None, need_table and table is not None, sinks is not None


def _packed(gradients: _Six, present: tuple[bool, ...]) -> _Six:
    return tuple(g for g, wanted in zip(gradients, present, strict=True) if wanted)


def _unpacked(gradients: _Six, present: tuple[bool, ...]) -> _Six:
    remaining = iter(gradients)
    return tuple(next(remaining) if wanted else None for wanted in present)


def _gradients(dout: Tensor, dlse: Tensor | None, primals: _Six, out, lse, fixed, need_bias, need_table) -> _Six:  # type: ignore[no-untyped-def]
    """The six gradients of <dout, out> + <dlse, lse>, differentiable."""
    flat = _backward(dout, dlse, *primals, out, lse, *fixed, need_bias, need_table)
    return _unpacked(flat, _present(primals, need_bias, need_table))


def _second_gradients(dout, dlse, primals, tangents, out, lse, out_t, lse_t, fixed, need_bias, need_table) -> _Six:  # type: ignore[no-untyped-def]
    """The six gradients of <dout, out'> + <dlse, lse'>, out' and lse' along ``tangents``, differentiable."""
    flat = _second(dout, dlse, *primals, *tangents, out, lse, out_t, lse_t, *fixed, need_bias, need_table)
    return _unpacked(flat, _present(primals, need_bias, need_table))


class _Attention(Formula):
    """(out, lse)."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return _forward_op(*args)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Tensor | None, ...]:
        ctx.options = inputs[6 + _KEPT :]
        return *inputs[: 6 + _KEPT], *output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None = None, dlse: Tensor | None = None) -> Any:
        if dout is None and dlse is None:
            return (None,) * (6 + _OPTIONS)
        *saved, out, lse = ctx.saved_tensors
        primals, fixed = tuple(saved[:6]), (*saved[6:], *ctx.options)
        needs = ctx.needs_input_grad
        gradients = _gradients(_cotangent(dout, out), dlse, primals, out, lse, fixed, needs[3], needs[4])
        return *gradients, *(None,) * _OPTIONS

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        *saved, out, lse = ctx.saved_tensors
        primals, fixed = tuple(saved[:6]), (*saved[6:], *ctx.options)
        return tangent(*primals, *_direction(primals, tangents), out, lse, *fixed)


class _Backward(Formula):
    """The gradients that exist, of dq, dk, dv, dbias, dtable and dsinks."""

    @staticmethod
    def forward(dout, dlse, *rest):  # type: ignore[no-untyped-def]
        return _packed(_backward_op(dout, dlse, *rest), _present(rest[:6], *rest[-2:]))

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Tensor | None, ...]:
        ctx.options, ctx.wanted = inputs[10 + _KEPT : -2], inputs[-2:]
        return inputs[: 10 + _KEPT]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if not _any(grads):
            return (None,) * (12 + _OPTIONS)
        dout, dlse, *saved = ctx.saved_tensors
        primals, out, lse, fixed = tuple(saved[:6]), saved[6], saved[7], (*saved[8:], *ctx.options)
        tangents = _direction(primals, _unpacked(grads, _present(primals, *ctx.wanted)))
        out_t, lse_t = tangent(*primals, *tangents, out, lse, *fixed)
        needs = ctx.needs_input_grad
        to_primals: _Six = (None,) * 6
        if any(needs[2:8]):
            to_primals = _second_gradients(
                dout, dlse, primals, tangents, out, lse, out_t, lse_t, fixed, needs[5], needs[6]
            )
        return out_t, None if dlse is None else lse_t, *to_primals, *(None,) * (4 + _OPTIONS)

    @staticmethod
    def jvp(ctx: Any, dout_tangent: Any, dlse_tangent: Any, *rest: Any) -> Any:
        dout, dlse, *saved = ctx.saved_tensors
        primals, out, lse, fixed = tuple(saved[:6]), saved[6], saved[7], (*saved[8:], *ctx.options)
        moved, present = rest[:6], _present(primals, *ctx.wanted)
        terms = []
        if dout_tangent is not None or dlse_tangent is not None:
            cotangent = _cotangent(dout_tangent, dout)
            terms.append(_gradients(cotangent, dlse_tangent, primals, out, lse, fixed, *ctx.wanted))
        if _any(moved):
            tangents = _direction(primals, moved)
            out_t, lse_t = rest[6:8]
            if out_t is None or lse_t is None:
                out_t, lse_t = tangent(*primals, *tangents, out, lse, *fixed)
            # The Hessian of <dout, out> + <dlse, lse> is symmetric.
            terms.append(_second_gradients(dout, dlse, primals, tangents, out, lse, out_t, lse_t, fixed, *ctx.wanted))
        if not terms:
            return _packed(tuple(None if p is None else torch.zeros_like(p) for p in primals), present)
        if len(terms) == 1:
            return _packed(terms[0], present)
        return tuple(a + b for a, b in zip(_packed(terms[0], present), _packed(terms[1], present), strict=True))


class _Tangent(Formula):
    """(out', lse'), linear in the tangents."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return _tangent_op(*args)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Tensor | None, ...]:
        ctx.options = inputs[14 + _KEPT :]
        return *inputs[: 14 + _KEPT], *output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None = None, dlse: Tensor | None = None) -> Any:
        if dout is None and dlse is None:
            return (None,) * (14 + _OPTIONS)
        *saved, out_t, lse_t = ctx.saved_tensors
        primals, tangents, out, lse = tuple(saved[:6]), tuple(saved[6:12]), saved[12], saved[13]
        fixed = (*saved[14:], *ctx.options)
        dout = _cotangent(dout, out)
        needs = ctx.needs_input_grad
        to_primals: _Six = (None,) * 6
        if any(needs[:6]):
            to_primals = _second_gradients(
                dout, dlse, primals, tangents, out, lse, out_t, lse_t, fixed, needs[3], needs[4]
            )
        to_tangents: _Six = (None,) * 6
        if any(needs[6:12]):
            gradients = _gradients(dout, dlse, primals, out, lse, fixed, needs[9], needs[10])
            to_tangents = tuple(None if t is None else g for t, g in zip(tangents, gradients, strict=True))
        return *to_primals, *to_tangents, *(None,) * (2 + _OPTIONS)

    @staticmethod
    def jvp(ctx: Any, *moved: Any) -> Any:
        *saved, _, _ = ctx.saved_tensors
        primals, tangents, out, lse = tuple(saved[:6]), tuple(saved[6:12]), saved[12], saved[13]
        fixed = (*saved[14:], *ctx.options)
        terms = []
        if _any(moved[6:12]):
            terms.append(tangent(*primals, *_direction(primals, moved[6:12]), out, lse, *fixed))
        if _any(moved[:6]):
            changes = _direction(primals, moved[:6])
            terms.append(reference_tangent_change(*primals, *tangents, *changes, *fixed))
        if not terms:
            return torch.zeros_like(out), torch.zeros_like(lse)
        return terms[0] if len(terms) == 1 else tuple(a + b for a, b in zip(*terms, strict=True))


class _Second(Formula):
    """The gradients that exist, of gq, gk, gv, gbias, gtable and gsinks. Derivatives run the plain formula."""

    @staticmethod
    def forward(dout, dlse, *rest):  # type: ignore[no-untyped-def]
        return _packed(_second_op(dout, dlse, *rest), _present(rest[:6], *rest[-2:]))

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Tensor | None, ...]:
        ctx.options, ctx.wanted = inputs[18 + _KEPT : -2], inputs[-2:]
        return inputs[: 18 + _KEPT]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if not _any(grads):
            return (None,) * (20 + _OPTIONS)
        needed = [i for i in range(14) if ctx.needs_input_grad[i] and ctx.saved_tensors[i] is not None]
        function, inputs = _second_of(ctx, needed)
        outputs, pull = torch.func.vjp(function, *inputs)  # type: ignore[misc]
        filled = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grads, strict=True))
        found = dict(zip(needed, pull(filled), strict=True))
        return tuple(found.get(i) for i in range(20 + _OPTIONS))

    @staticmethod
    def jvp(ctx: Any, *moved: Any) -> Any:
        needed = [i for i in range(14) if moved[i] is not None]
        function, inputs = _second_of(ctx, needed)
        outputs, pull = torch.func.vjp(function, *inputs)  # type: ignore[misc]
        # The tangent is the transpose of the transpose: it also works where a dual level is on, unlike torch.func.jvp.
        _, transpose = torch.func.vjp(pull, tuple(torch.zeros_like(o) for o in outputs))  # type: ignore[misc]
        (change,) = transpose(tuple(moved[i] for i in needed))
        return change


def _second_of(ctx: Any, positions: list[int]) -> tuple[Any, tuple[Tensor, ...]]:
    """The plain formula of ``_Second`` as a function of the saved tensors at ``positions``, and those."""
    saved = ctx.saved_tensors
    present = _present(saved[2:8], *ctx.wanted)

    def function(*inputs: Tensor) -> Any:
        args = list(saved)
        for position, value in zip(positions, inputs, strict=True):
            args[position] = value
        return _packed(reference_second(*args, *ctx.options, *ctx.wanted), present)

    return function, tuple(saved[i] for i in positions)


def _composite_backward(dout, dlse, *rest):  # type: ignore[no-untyped-def]
    return _packed(reference_backward(dout, dlse, *rest), _present(rest[:6], *rest[-2:]))


def _composite_second(dout, dlse, *rest):  # type: ignore[no-untyped-def]
    return _packed(reference_second(dout, dlse, *rest), _present(rest[:6], *rest[-2:]))


attend = differentiable(_Attention, reference_forward)
tangent = differentiable(_Tangent, reference_tangent)
_backward = differentiable(_Backward, _composite_backward)
_second = differentiable(_Second, _composite_second)


def _tie(function: Any) -> Any:
    """A formula's gradients as the raw op's outputs: an empty tensor for each that does not exist."""

    def tie(dout: Tensor, dlse: Tensor | None, *rest: Any) -> Any:
        present = _present(rest[:6], *rest[-2:])
        gradients = _unpacked(function(dout, dlse, *rest), present)
        return tuple(dout.new_empty(0) if g is None else g for g in gradients)

    return tie


# Gradients through torch.ops.genfast.* itself.
_forward_op.tie = attend
_tangent_op.tie = tangent
_backward_op.tie = _tie(_backward)
_second_op.tie = _tie(_second)
