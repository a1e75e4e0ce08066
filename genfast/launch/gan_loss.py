"""Launches the kernels of a GAN's loss; csrc/gan/gan_loss.h has the calling convention."""

from __future__ import annotations

import torch

from genfast._native import DTYPE_CODES, C
from genfast.launch._common import device_guard, pointer
from genfast.ops._gan_loss_reference import form_of

Tensor = torch.Tensor

MOST = 2**20  # logits a side that the Triton kernel's one program walks through


def _outputs(like: Tensor, real, fake, want_real, want_fake):  # type: ignore[no-untyped-def]
    kept = torch.float64 if like.dtype == torch.float64 else torch.float32
    loss = like.new_empty((), dtype=kept)
    to_real = torch.empty_like(real, dtype=kept, memory_format=torch.contiguous_format) if want_real else None
    to_fake = torch.empty_like(fake, dtype=kept, memory_format=torch.contiguous_format) if want_fake else None
    return loss, to_real, to_fake


def cpp(real, fake, kind, side, want_real, want_fake):  # type: ignore[no-untyped-def]
    form = form_of(kind, side)
    real = real.contiguous() if real is not None and form.real[0] else None
    fake = fake.contiguous()
    loss, to_real, to_fake = _outputs(fake, real, fake, want_real, want_fake)
    C.cpu.gan_loss(
        DTYPE_CODES[fake.dtype], form.function, form.pairing, pointer(real), fake.data_ptr(), loss.data_ptr(),
        pointer(to_real), pointer(to_fake), 0 if real is None else real.numel(), fake.numel(), *form.real, *form.fake,
        form.scale,
    )  # fmt: skip
    return loss, to_real, to_fake


def triton(real, fake, kind, side, want_real, want_fake):  # type: ignore[no-untyped-def]
    from genfast.kernels.triton import gan_loss as kernels

    form = form_of(kind, side)
    real = real.contiguous() if real is not None and form.real[0] else None
    fake = fake.contiguous()
    loss, to_real, to_fake = _outputs(fake, real, fake, want_real, want_fake)
    with device_guard(fake):
        kernels.run(real, fake, loss, to_real, to_fake, form)
    return loss, to_real, to_fake


def triton_supports(real, fake, *rest):  # type: ignore[no-untyped-def]
    if fake.dtype == torch.float64:
        return "float64 runs on the cpp and reference backends"
    most = max(fake.numel(), 0 if real is None else real.numel())
    if most > MOST:
        return f"one program reads all logits, at most {MOST} a side; got {most}"
    return None
