"""How an op is declared: a raw operator with one implementation per backend, and its derivative rules.

``Op`` is the raw operator ``torch.ops.genfast.<name>``: schema, fake, and backends picked below the operator boundary.
``Formula`` holds the rules (forward, what to save, backward, jvp) from which ``differentiable`` makes the three paths
of a call, each the cheapest that is right:

1. nothing needs a gradient: the raw op;
2. a gradient is needed, eager or compiling: a lean autograd Function;
3. a torch.func transform or forward-mode AD is active: a Function with ``jvp`` and ``vmap`` as well.

Rules call other differentiable formulas, so derivatives of every order and every mixture of modes exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._functorch import _unwrap_for_grad, _wrap_for_grad
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from genfast import _dispatch
from genfast._dispatch import Backend

__all__ = ["Formula", "Op", "differentiable", "transformed"]

_library = torch.library.Library("genfast", "DEF")
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def _is_plain(tensor: torch.Tensor) -> bool:
    """Neither a subclass, nor lazily negated or zero, nor batched by torch.autograd.grad(is_grads_batched=True)."""
    return type(tensor) in (_Tensor, _Parameter) and not (
        _is_legacy_batched(tensor) or tensor.is_neg() or tensor._is_zerotensor()
    )


class Op:
    """A raw operator of the ``genfast`` namespace.

    Args:
        schema: torch schema without the namespace, e.g. ``"scale(Tensor x, float s) -> Tensor"``. It may not alias.
        backends: backend name to ``Backend``; each ``run`` takes the schema's arguments. Where the schema returns
            several tensors, ``run`` returns a tuple that may hold None for an output that was not asked for.
        fake: the same signature on fake tensors; no None.
        kernels: name of the GPU kernel in the ledger (``family/op``) that the cuda backend runs.
        internal: the op is part of another's formula: it always runs its reference, whatever backend is forced.
        check: raises where a direct call of ``torch.ops.genfast.<name>`` has arguments that the kernels must not see;
            genfast's own functions have checked theirs.

    ``tie``, set by the op's module, takes the same arguments and differentiates: it serves gradients through
    ``torch.ops.genfast.<name>`` itself.
    """

    def __init__(
        self,
        schema: str,
        backends: dict[str, Backend],
        fake: Callable[..., Any],
        kernels: str = "",
        *,
        internal: bool = False,
        check: Callable[..., None] | None = None,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.backends = backends
        self.fake = fake
        self.kernels = kernels
        self.internal = internal
        self.check = check
        self.tie: Callable[..., Any] | None = None
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._implementation, "CompositeExplicitAutograd")
        _library.impl(self.name, self._autograd, "Autograd")
        torch.library.register_fake(f"genfast::{self.name}", fake, lib=_library)
        self.overload = getattr(torch.ops.genfast, self.name).default
        arguments = self.overload._schema.arguments
        self._tensors = tuple(i for i, argument in enumerate(arguments) if "Tensor" in str(argument.type))

    def __call__(self, *args: Any) -> Any:
        """Runs the op without autograd, past PyTorch's dispatcher where tensors are plain and nobody is watching."""
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
            or torch.autograd.profiler._is_profiler_enabled
            or torch._C._get_tracing_state() is not None
        ):
            return self.overload(*args)
        for i in self._tensors:
            arg = args[i]
            if type(arg) is list:
                if not all(map(_is_plain, arg)):
                    return self.overload(*args)
            elif arg is not None:
                # Subclasses, tensors whose sign or zeros are only flagged, and the batched cotangents that
                # torch.autograd.grad(is_grads_batched=True) hands a backward without a transform.
                kind = type(arg)
                if (
                    (kind is not _Tensor and kind is not _Parameter)
                    or _is_legacy_batched(arg)
                    or arg.is_neg()
                    or arg._is_zerotensor()
                ):
                    return self.overload(*args)
        return self.run(args)

    def run(self, args: tuple[Any, ...]) -> Any:
        """Runs the chosen backend directly."""
        if self.internal:
            return self.backends["reference"].run(*args)
        first = next_tensor(args)
        if _dispatch._state.explaining:
            calls = _dispatch.recorder()
            if calls is not None:
                calls.append((self, args))
                return self.fake(*args)
        if first.is_meta:
            return self.fake(*args)
        return _dispatch.select(self, first, args)(*args)

    def _implementation(self, *args: Any) -> Any:
        """What the dispatcher calls: as ``run``, with an empty tensor for each output that was not asked for."""
        if self.check is not None:
            self.check(*args)
        out = self.run(args)
        if not isinstance(out, tuple):
            return out
        like = next_tensor(args)
        return tuple(like.new_empty(0) if tensor is None else tensor for tensor in out)

    def _autograd(self, *args: Any) -> Any:
        if self.tie is not None:
            if torch.is_grad_enabled() and _requires_grad(args):
                return self.tie(*args)
            if _has_tangent(args):
                raise RuntimeError(
                    f"torch.ops.genfast.{self.name} has no forward-mode derivative; the functions of genfast.ops do"
                )
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)


def next_tensor(args: Sequence[Any]) -> torch.Tensor:
    """The first tensor of the arguments."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor):
            return arg[0]
    raise TypeError("a genfast op takes at least one tensor")


def _requires_grad(args: Sequence[Any]) -> bool:
    for arg in args:
        if isinstance(arg, _Tensor):
            if arg.requires_grad:
                return True
        elif type(arg) in (list, tuple) and _requires_grad(arg):
            return True
    return False


def _tangent(tensor: torch.Tensor) -> torch.Tensor | None:
    """The forward-mode tangent that a tensor carries at the outermost level."""
    return torch._VF._unpack_dual(tensor, level=0)[1] if forward_ad._current_level >= 0 else None


def _has_tangent(args: Sequence[Any]) -> bool:
    return any(
        _tangent(arg) is not None if isinstance(arg, _Tensor) else type(arg) in (list, tuple) and _has_tangent(arg)
        for arg in args
    )


def _distinct(args: Sequence[Any]) -> list[Any]:
    """The arguments with a view in place of a repeated tensor, which Dynamo does not take."""
    distinct: list[Any] = []
    for arg in args:
        repeated = isinstance(arg, torch.Tensor) and any(arg is other for other in distinct)
        distinct.append(arg.view_as(arg) if repeated else arg)
    return distinct


def transformed() -> bool:
    """Whether a torch.func transform or a forward-mode level is active."""
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


class Formula:
    """The derivative rules of one op; all static. Cotangents and tangents may be None, for zero."""

    #: Where set, what the lean path runs instead of ``forward``: (output, tensors that only its backward has, after
    #: those of ``save``). For a gradient that the forward pass writes.
    lean_forward: Callable[..., tuple[Any, tuple[torch.Tensor | None, ...]]] | None = None

    @staticmethod
    def forward(*args: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[torch.Tensor | None, ...]:
        """Keeps plain values on ``ctx`` and returns the tensors to find in ``ctx.saved_tensors``."""
        raise NotImplementedError

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError


class _Context:
    """A Function's context with other saved tensors."""

    def __init__(self, ctx: Any, saved: tuple[Any, ...]) -> None:
        self._ctx, self.saved_tensors = ctx, saved

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _transformed_jvp(rule: Callable[..., Any], ctx: Any, tangents: tuple[Any, ...]) -> Any:
    """A jvp rule run below the level of torch.func.jvp that asks for it.

    PyTorch runs the rule with forward mode switched off, and torch operations carry that down to the levels below,
    whose tangents would silently be zero.
    """
    interpreter = retrieve_current_functorch_interpreter()
    level = interpreter.level()

    def unwrapped(tensors: Any) -> tuple[Any, ...]:
        return tuple(_unwrap_for_grad(x, level) if isinstance(x, _Tensor) else x for x in tensors)

    below = _Context(ctx, unwrapped(ctx.saved_tensors))
    with forward_ad._set_fwd_grad_enabled(True), interpreter.lower():
        outputs = rule(below, *unwrapped(tangents))
    if isinstance(outputs, _Tensor):
        return _wrap_for_grad(outputs, level)
    return tuple(_wrap_for_grad(x, level) if isinstance(x, _Tensor) else x for x in outputs)


def _loop_vmap(function: Any) -> Callable[..., Any]:
    """A vmap rule that runs the examples one after the other: right for every seed and shape, and rarely hot."""

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        def example(index: int) -> tuple[Any, ...]:
            return tuple(a if d is None else a.select(d, index) for a, d in zip(args, in_dims, strict=True))

        if info.batch_size == 0:  # one example of zeros has the shapes
            zeros = (a if d is None else a.new_zeros(a.shape[:d] + a.shape[d + 1 :]) for a, d in zip(args, in_dims))  # noqa: B905
            out = function.apply(*zeros)
            if not isinstance(out, tuple):
                return out.new_empty((0, *out.shape)), 0
            empty = tuple(None if t is None else t.new_empty((0, *t.shape)) for t in out)
            return empty, tuple(None if t is None else 0 for t in empty)
        outputs = [function.apply(*example(index)) for index in range(info.batch_size)]
        if not isinstance(outputs[0], tuple):
            return torch.stack(outputs), 0
        stacked = tuple(None if column[0] is None else torch.stack(column) for column in zip(*outputs, strict=True))
        return stacked, tuple(None if column is None else 0 for column in stacked)

    return vmap


class Differentiable:
    """Calls a formula by the cheapest path that is right; see the module's docstring.

    ``composite``, the same in differentiable torch operations, serves torch.func transforms inside a compiled region,
    where a Function's jvp is ignored.
    """

    def __init__(self, formula: type[Formula], composite: Callable[..., Any] | None = None) -> None:
        forward, save, backward = formula.forward, formula.save, formula.backward
        lean_forward = formula.lean_forward

        class Lean(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output, kept = (forward(*args), ()) if lean_forward is None else lean_forward(*args)
                ctx.save_for_backward(*save(ctx, args, output), *kept)
                ctx.set_materialize_grads(False)
                return output

        class Full(torch.autograd.Function):
            @staticmethod
            def forward(*args: Any) -> Any:
                return forward(*args)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                saved = save(ctx, inputs, output)
                ctx.save_for_backward(*saved)
                ctx.save_for_forward(*saved)
                ctx.set_materialize_grads(False)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                # A pullback that runs after its transform ended finds the transform's wrappers.
                return backward(_Context(ctx, unwrap_dead_wrappers(ctx.saved_tensors)), *grads)

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                if torch._C._are_functorch_transforms_active():
                    return _transformed_jvp(formula.jvp, ctx, tangents)
                # A dual level (not a transform) is still on here, and the saved tensors are dual: take them as plain.
                with forward_ad._set_fwd_grad_enabled(False):
                    return formula.jvp(ctx, *tangents)

        Lean.backward = staticmethod(backward)  # type: ignore[method-assign]
        Full.vmap = staticmethod(_loop_vmap(Full))  # type: ignore[method-assign]
        Lean.__name__ = Lean.__qualname__ = f"{formula.__name__}Function"
        Full.__name__ = Full.__qualname__ = f"{formula.__name__}TransformableFunction"
        self.forward, self.lean, self.full, self.composite = forward, Lean, Full, composite
        # Function.apply looks for transforms and for wrappers that outlived theirs; here that has been done.
        self._lean_apply = super(torch.autograd.Function, Lean).apply

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            if self.composite is not None and transformed():
                return self.composite(*args)
            # In a traced backward grad mode is off: a compiled graph has no second backward.
            if torch.is_grad_enabled() and _requires_grad(args):
                return self.lean.apply(*_distinct(args))
        elif transformed():
            return self.full.apply(*args)
        elif torch.is_grad_enabled() and _requires_grad(args):
            return self._lean_apply(*args)
        return self.forward(*args)


def differentiable(formula: type[Formula], composite: Callable[..., Any] | None = None) -> Differentiable:
    """Makes a formula callable; see ``Differentiable``."""
    return Differentiable(formula, composite)
