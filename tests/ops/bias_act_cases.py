"""What the tests of bias_act share: the formula with PyTorch's own activations, inputs and bounds."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 6e-4}
#: PyTorch's own.
THEIRS = {
    "linear": lambda z: z, "relu": torch.relu, "lrelu": lambda z: functional.leaky_relu(z, 0.2), "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "elu": functional.elu, "selu": functional.selu,
    "softplus": lambda z: functional.softplus(z, threshold=50), "swish": functional.silu, "gelu": functional.gelu,
}  # fmt: skip
GAIN = {"relu": math.sqrt(2.0), "lrelu": math.sqrt(2.0), "swish": math.sqrt(2.0)}
SHAPES = [
    (2, 3, 5, 7), (2, 64, 8, 8), (3, 5), (4, 17, 40), (2, 3, 33, 33), (5, 1, 3), (1, 3), (70, 300), (2, 2, 20000),
    (40, 3, 31), (33, 530, 2),
]  # fmt: skip


def theirs(x, b, act, dim=1, gain=None, clamp=None):
    """The formula with PyTorch's activations, in x's dtype."""
    z = x if b is None else x + b.reshape([-1 if i == dim else 1 for i in range(x.dim())])
    y = THEIRS[act](z) * (GAIN.get(act, 1.0) if gain is None else gain)
    return y if clamp is None else y.clamp(-clamp, clamp)


def drawn(shape, dtype, dim=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    b = torch.randn(shape[dim], generator=generator).to(dtype)
    spread = b.reshape([-1 if i == dim else 1 for i in range(len(shape))])
    return torch.where(x.double() + spread.double() == 0, 2.0, x), b  # not at a kink


def assert_close(got, want, dtype=None, scale=1.0):
    bound = BOUND[dtype or got.dtype]
    torch.testing.assert_close(got.double() / scale, want.double() / scale, rtol=bound, atol=2 * bound)
