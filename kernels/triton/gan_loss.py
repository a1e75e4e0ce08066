"""The loss of a batch of discriminator logits and its gradient; docs/kernels/gan_loss.md has the mathematics.

    y = sign (x - other) + shift      loss = scale (mean F(y of real) + mean F(y of fake))

other: zero (APART), the other side's logit of the same index (PAIRED, one term, of the real side), or the other side's
mean (AVERAGE). F: softplus, max(y, 0), y^2 / 2 or y.

Floor: one launch; logits are a few thousand numbers.

Tiling: one program walks both sides in blocks of BLOCK: first their sums (AVERAGE), then values and gradients, and
(AVERAGE) again the gradients, which then take the share of the other side's mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from genfast.kernels.triton import noise
from genfast.kernels.triton.log_likelihood import _log1p_unit

BLOCK = 1024
WARPS = 4


@triton.jit
def _evaluate(y, FUNCTION: tl.constexpr):
    """(F(y), F'(y))."""
    if FUNCTION == 0:
        e = noise.exp(noise.clamp(-tl.abs(y), -87.0, 0.0))
        value = tl.where(y != y, y, tl.maximum(y, 0.0)) + _log1p_unit(e)
        slope = tl.where(y < 0.0, e, 1.0) / (1.0 + e)
        slope = tl.where(y != y, y, slope)
    elif FUNCTION == 1:
        value = tl.where(y < 0.0, 0.0, y)
        slope = tl.where(y > 0.0, 1.0, tl.where(y != y, y, 0.0))
    elif FUNCTION == 2:
        value = y * y * 0.5
        slope = y
    else:
        value = y
        slope = tl.full(y.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def _mean(x_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    return tl.sum(total, 0) / count


@triton.jit
def _term(
    x_ptr, other_ptr, to_ptr, against_ptr, count, mean, sign, shift, factor,
    FUNCTION: tl.constexpr, PAIRED: tl.constexpr, WANT: tl.constexpr, WANT_AGAINST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(mean F(y), sum of the gradients); writes the gradients, and their negatives to the paired side."""
    values = tl.zeros((BLOCK,), tl.float32)
    gradients = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < count
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean
        if PAIRED:
            x -= tl.load(other_ptr + at, mask=inside, other=0.0).to(tl.float32)
        value, slope = _evaluate(sign * x + shift, FUNCTION)
        gradient = slope * factor
        values += tl.where(inside, value, 0.0)
        gradients += tl.where(inside, gradient, 0.0)
        if WANT:
            tl.store(to_ptr + at, gradient, mask=inside)
        if WANT_AGAINST:
            tl.store(against_ptr + at, -gradient, mask=inside)
    return tl.sum(values, 0) / count, tl.sum(gradients, 0)


@triton.jit
def _shift_by(to_ptr, count, value, BLOCK: tl.constexpr):
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        held = tl.load(to_ptr + at, mask=at < count, other=0.0)
        tl.store(to_ptr + at, held + value, mask=at < count)


@triton.jit
def gan_loss_kernel(
    real_ptr,
    fake_ptr,
    loss_ptr,
    to_real_ptr,
    to_fake_ptr,
    reals,
    fakes,
    REAL_SIGN: tl.constexpr,
    REAL_SHIFT: tl.constexpr,
    FAKE_SIGN: tl.constexpr,
    FAKE_SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    FUNCTION: tl.constexpr,
    PAIRING: tl.constexpr,
    HAS_REAL: tl.constexpr,
    WANT_REAL: tl.constexpr,
    WANT_FAKE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    real_mean = 0.0
    fake_mean = 0.0
    if PAIRING == 2:
        real_mean = _mean(real_ptr, reals, BLOCK)
        fake_mean = _mean(fake_ptr, fakes, BLOCK)
    loss = 0.0
    real_sum = 0.0
    fake_sum = 0.0
    if HAS_REAL:
        value, real_sum = _term(
            real_ptr, fake_ptr, to_real_ptr, to_fake_ptr, reals, fake_mean, REAL_SIGN, REAL_SHIFT,
            SCALE * REAL_SIGN / reals, FUNCTION, PAIRING == 1, WANT_REAL, WANT_FAKE and PAIRING == 1, BLOCK,
        )  # fmt: skip
        loss += value
    if PAIRING != 1:
        value, fake_sum = _term(
            fake_ptr, real_ptr, to_fake_ptr, to_real_ptr, fakes, real_mean, FAKE_SIGN, FAKE_SHIFT,
            SCALE * FAKE_SIGN / fakes, FUNCTION, False, WANT_FAKE, False, BLOCK,
        )  # fmt: skip
        loss += value
    tl.store(loss_ptr, loss * SCALE)
    if PAIRING == 2:
        tl.debug_barrier()  # gradients of other threads are read
        if WANT_REAL:
            _shift_by(to_real_ptr, reals, -fake_sum / reals, BLOCK)
        if WANT_FAKE:
            _shift_by(to_fake_ptr, fakes, -real_sum / fakes, BLOCK)


def run(
    real: torch.Tensor | None,
    fake: torch.Tensor,
    loss: torch.Tensor,
    to_real: torch.Tensor | None,
    to_fake: torch.Tensor | None,
    form: Any,
) -> None:
    """Writes the loss, and the gradients that are not None; ``form`` is a Form of genfast/ops."""
    gan_loss_kernel[(1,)](
        fake if real is None else real,
        fake,
        loss,
        loss if to_real is None else to_real,
        loss if to_fake is None else to_fake,
        0 if real is None else real.numel(),
        fake.numel(),
        REAL_SIGN=form.real[0],
        REAL_SHIFT=form.real[1],
        FAKE_SIGN=form.fake[0],
        FAKE_SHIFT=form.fake[1],
        SCALE=form.scale,
        FUNCTION=form.function,
        PAIRING=form.pairing,
        HAS_REAL=real is not None,
        WANT_REAL=to_real is not None,
        WANT_FAKE=to_fake is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def aot_variants() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], int, str]]:
    """(kernel, signature, constexprs, attrs, num_warps, label) of shipped configurations, for test_aot.py."""
    names = gan_loss_kernel.arg_names
    for dtype, function, pairing in (("fp32", 0, 0), ("bf16", 0, 1), ("fp16", 0, 2), ("fp32", 1, 0), ("bf16", 2, 0)):
        types = dict.fromkeys(("real_ptr", "fake_ptr"), f"*{dtype}")
        types |= dict.fromkeys(("loss_ptr", "to_real_ptr", "to_fake_ptr"), "*fp32")
        types |= {"reals": "i32", "fakes": "i32"}
        constexprs = {
            "REAL_SIGN": -1.0, "REAL_SHIFT": 1.0, "FAKE_SIGN": 1.0, "FAKE_SHIFT": 1.0, "SCALE": 1.0,
            "FUNCTION": function, "PAIRING": pairing, "HAS_REAL": True, "WANT_REAL": True, "WANT_FAKE": True,
            "BLOCK": BLOCK,
        }  # fmt: skip
        attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in types}
        label = f"gan_loss-{dtype}-{function}-{pairing}-aligned"
        yield gan_loss_kernel, {n: types.get(n, "constexpr") for n in names}, constexprs, attrs, WARPS, label
