"""Launches the free-energy kernels."""

from __future__ import annotations

from typing import Any

import torch

from genfast.launch._common import device_guard

Tensor = torch.Tensor


def triton(v: Tensor, W: Tensor, b: Tensor, c: Tensor, logvar: Tensor | None, visible: str, hidden: str) -> Any:
    from genfast.kernels.triton import rbm_free_energy as kernels
    from genfast.kernels.triton.rbm_half_step import states

    with device_guard(W):
        return kernels.forward(
            states(v), W, b.contiguous(), c.contiguous(), logvar, visible == "gaussian", hidden == "gaussian"
        )
