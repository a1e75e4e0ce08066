"""The loss of a batch of discriminator logits; docs/kernels/gan_loss.md has the mathematics."""

from __future__ import annotations

from typing import Any

import torch

from genfast._checks import check_float_tensor, shape_of, wide
from genfast._op import Backend, Formula, Op, _is_legacy_batched, differentiable
from genfast.launch import gan_loss as native
from genfast.ops._gan_loss_reference import KINDS, PAIRED, SIDES, form_of, reference, reference_gradients

__all__ = ["gan_loss", "reference"]

Tensor = torch.Tensor


# ---- the raw op ----


def _run_reference(real, fake, kind, side, want_real, want_fake):  # type: ignore[no-untyped-def]
    to_real = to_fake = None
    if want_real or want_fake:
        to_real, to_fake = reference_gradients(real, fake, kind, side)
    return reference(real, fake, kind, side), to_real if want_real else None, to_fake if want_fake else None


def _fake_run(real, fake, kind, side, want_real, want_fake):  # type: ignore[no-untyped-def]
    kept, empty = wide(fake.dtype), fake.new_empty(0)
    to_real = fake.new_empty(real.shape, dtype=kept) if want_real else empty
    to_fake = fake.new_empty(fake.shape, dtype=kept) if want_fake else empty.clone()
    return fake.new_empty((), dtype=kept), to_real, to_fake


def _check_raw(real, fake, kind, side, want_real, want_fake):  # type: ignore[no-untyped-def]
    """What a direct call of the raw op must keep to; see ``Op``."""
    check_logits("genfast::gan_loss", real, fake, kind, side)
    if want_real and (real is None or not form_of(kind, side).real[0]):
        raise ValueError(f"genfast::gan_loss: the {kind} loss of the {side} has no gradient by real")


_op = Op(
    "gan_loss(Tensor? real, Tensor fake, str kind, str side, bool want_real, bool want_fake) "
    "-> (Tensor loss, Tensor to_real, Tensor to_fake)",
    {
        "triton": Backend(native.triton, native.triton_supports),
        "cpp": Backend(native.cpp),
        "reference": Backend(_run_reference),
    },
    _fake_run,
    check=_check_raw,
)


# ---- derivative rules ----


def _is_last_and_one(cotangent: Tensor) -> bool:
    """Whether the cotangent is 1, and nobody can need what the forward pass kept again."""
    return (
        type(cotangent) is Tensor
        and cotangent.is_cpu  # a GPU would have to be waited for
        and not torch.compiler.is_compiling()
        and not _is_legacy_batched(cotangent)
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and not torch._C._len_torch_dispatch_stack()
        and cotangent.item() == 1.0
    )


def _product(gradient: Any, cotangent: Tensor | None, dtype: torch.dtype) -> Tensor:
    product = gradient if cotangent is None else gradient * cotangent
    return product if product.dtype == dtype else product.to(dtype)


class _GanLoss(Formula):
    """The loss. In the lean path the kernel writes the gradients with it."""

    @staticmethod
    def forward(real, fake, kind, side):  # type: ignore[no-untyped-def]
        return _op(real, fake, kind, side, False, False)[0]

    @staticmethod
    def lean_forward(real, fake, kind, side):  # type: ignore[no-untyped-def]
        by_real = real is not None and real.requires_grad
        loss, to_real, to_fake = _op(real, fake, kind, side, by_real, fake.requires_grad)
        return loss, (to_real if by_real else None, to_fake if fake.requires_grad else None)

    @staticmethod
    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        real, fake, ctx.kind, ctx.side = inputs
        return real, fake

    @staticmethod
    def backward(ctx, cotangent):  # type: ignore[no-untyped-def]
        if cotangent is None:
            return None, None, None, None
        real, fake, *kept = ctx.saved_tensors
        if not kept or torch.is_grad_enabled():
            kept = reference_gradients(real, fake, ctx.kind, ctx.side)
        elif _is_last_and_one(cotangent):  # a loss by itself: what the forward pass wrote is the gradient
            cotangent = None
        by_real, by_fake = ctx.needs_input_grad[:2]
        to_real = _product(kept[0], cotangent, real.dtype) if by_real else None
        return to_real, _product(kept[1], cotangent, fake.dtype) if by_fake else None, None, None

    @staticmethod
    def jvp(ctx, real_tangent, fake_tangent, *_):  # type: ignore[no-untyped-def]
        real, fake = ctx.saved_tensors[:2]
        tangent = None
        for gradient, change in zip(
            reference_gradients(real, fake, ctx.kind, ctx.side), (real_tangent, fake_tangent), strict=True
        ):
            if gradient is not None and change is not None:
                part = (gradient * change.to(gradient.dtype)).sum()
                tangent = part if tangent is None else tangent + part
        return fake.new_zeros((), dtype=wide(fake.dtype)) if tangent is None else tangent


_call = differentiable(_GanLoss, reference)


def _tie(real, fake, kind, side, want_real, want_fake):  # type: ignore[no-untyped-def]
    """Gradients through torch.ops.genfast.gan_loss itself."""
    loss = _call(real if form_of(kind, side).real[0] else None, fake, kind, side)
    empty = fake.new_empty(0)
    to_real, to_fake = reference_gradients(real, fake, kind, side) if want_real or want_fake else (None, None)
    return loss, to_real if want_real else empty, to_fake if want_fake else empty


_op.tie = _tie


# ---- public ----


def check_logits(op: str, real: Any, fake: Any, kind: Any, side: Any) -> None:
    check_float_tensor(op, "fake", fake)
    if side not in SIDES:
        raise ValueError(f"{op}: side must be 'discriminator' or 'generator', got {side!r}")
    if kind not in KINDS:
        raise ValueError(f"{op}: unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    form = form_of(kind, side)
    if fake.numel() == 0:
        raise ValueError(f"{op}: fake has no logits, its shape is {shape_of(fake)}; a mean needs at least one")
    if real is None:
        if form.real[0]:
            raise ValueError(f"{op}: the {kind} loss of the {side} needs the real logits, got None")
        return
    check_float_tensor(op, "real", real)
    if real.device != fake.device:
        raise ValueError(f"{op}: real is on {real.device}, fake on {fake.device}; move them to one device")
    if real.dtype != fake.dtype:
        raise TypeError(f"{op}: real is {real.dtype}, fake {fake.dtype}; they must be equal outside autocast")
    if real.numel() == 0:
        raise ValueError(f"{op}: real has no logits, its shape is {shape_of(real)}; a mean needs at least one")
    if form.pairing == PAIRED and real.shape != fake.shape:
        raise ValueError(
            f"{op}: the {kind} loss pairs real with fake logits, so that their shapes must be equal; got "
            f"{shape_of(real)} and {shape_of(fake)}"
        )


def promoted(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast, logits of two floating-point dtypes in their common one."""
    if torch.is_autocast_enabled(fake.device.type) and real.is_floating_point() and fake.is_floating_point():
        common = torch.promote_types(real.dtype, fake.dtype)
        return real.to(common), fake.to(common)
    return real, fake


def gan_loss(real: Tensor | None, fake: Tensor, kind: str, side: str) -> Tensor:
    """The loss of a discriminator or of a generator, from logits; the gradient is written in the same pass.

    With r real and f fake logits, sp = softplus, and means over all logits:

    ====================== ======================================= =========================================
    kind                   discriminator                           generator
    ====================== ======================================= =========================================
    ``minimax``            mean sp(-r) + mean sp(f)                -mean sp(f)
    ``nonsaturating``      mean sp(-r) + mean sp(f)                mean sp(-f)
    ``hinge``              mean max(0, 1 - r) + mean max(0, 1 + f) -mean f
    ``least_squares``      mean (r - 1)^2 / 2 + mean f^2 / 2       mean (f - 1)^2 / 2
    ``wasserstein``        mean f - mean r                         -mean f
    ``relativistic``       mean sp(-(r - f))                       mean sp(-(f - r))
    ``relativistic_``      mean sp(-(r - mean f))                  mean sp(-(f - mean r))
    ``average``            + mean sp(f - mean r)                   + mean sp(r - mean f)
    ====================== ======================================= =========================================

    Args:
        real: logits of real examples, any shape; needed where the formula has r, otherwise ignored and may be None.
        fake: logits of generated examples, of real's dtype and device; of real's shape for ``relativistic``, which
            pairs them. float32, float64, bfloat16 or float16; the arithmetic is float32, or float64 for float64.
        kind: one of those above.
        side: ``"discriminator"`` or ``"generator"``.

    Returns:
        One number; float64 for float64 and float32 otherwise. Differentiable to every order in reverse and forward
        mode; safe at logits of any size that the dtype holds.

    Raises:
        TypeError: for something else than tensors of the dtypes above, or of two dtypes outside autocast.
        ValueError: for an unknown kind or side, no logits, missing real logits, shapes that do not pair, or tensors on
            two devices.

    Source: Goodfellow et al. 2014 (minimax, nonsaturating); Lim and Ye 2017, Miyato et al. 2018 (hinge); Mao et al.
    2017 (least squares, a = 0, b = c = 1); Arjovsky et al. 2017 (wasserstein); Jolicoeur-Martineau 2018 (relativistic).

    Examples:
        >>> real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0])
        >>> gan_loss(real, fake, "hinge", "discriminator")  # mean of 0, 0 and mean of 0, 1
        tensor(0.5000)
        >>> gan_loss(None, fake, "wasserstein", "generator")
        tensor(0.5000)
    """
    if isinstance(real, Tensor) and isinstance(fake, Tensor) and real.dtype != fake.dtype:
        real, fake = promoted(real, fake)
    check_logits("gan_loss", real, fake, kind, side)
    return _call(real if real is not None and form_of(kind, side).real[0] else None, fake, kind, side)
