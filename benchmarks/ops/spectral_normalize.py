"""Spectral normalization of a weight, and of all weights of a discriminator, forward and backward.

Floor of one power iteration: W is read once for it and once to be scaled, the result is written. Backward: the
cotangent is read twice, W once, the gradient written. The baseline is PyTorch's parametrization's formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import genfast
from genfast.benchmarks import harness
from genfast.benchmarks.harness import Case, Settings

__all__ = ["cases", "run"]

#: The layers of an SNGAN discriminator for 32 x 32 images with 128 maps, [out, in].
NETWORK = ((128, 27), *((128, 1152),) * 8, (128, 3), *((128, 128),) * 2, (1, 128))


def eager(weights: tuple[Tensor, ...], us: tuple[Tensor, ...], vs: tuple[Tensor, ...]) -> list[Tensor]:
    """As torch.nn.utils.parametrizations.spectral_norm, of each weight."""
    outs = []
    for weight, v in zip(weights, vs, strict=True):  # the new u depends on v alone
        with torch.no_grad():
            new_u = torch.nn.functional.normalize(torch.mv(weight, v), dim=0, eps=1e-12)
            new_v = torch.nn.functional.normalize(torch.mv(weight.H, new_u), dim=0, eps=1e-12)
        outs.append(weight / torch.vdot(new_u, torch.mv(weight, new_v)))
    return outs


def ours(weights: tuple[Tensor, ...], us: tuple[Tensor, ...], vs: tuple[Tensor, ...]) -> list[Tensor]:
    return genfast.ops.spectral_normalize(weights, us, vs).weights


def called(normalize: Callable[..., list[Tensor]], layers: int, backward: bool) -> Callable[..., list[Tensor]]:
    def call(*tensors: Tensor) -> list[Tensor]:
        weights, us, vs, douts = (tensors[k * layers : (k + 1) * layers] for k in range(4))
        outs = normalize(weights, us, vs)
        return [*outs, *torch.autograd.grad(outs, weights, douts)] if backward else outs

    return call


def exact(tensors: tuple[Tensor, ...], layers: int, backward: bool) -> list[Tensor]:
    """In float64, by autograd of the formula at constant vectors."""
    doubles = [t.detach().double() for t in tensors]
    weights, us, vs, douts = (doubles[k * layers : (k + 1) * layers] for k in range(4))
    weights = [w.requires_grad_() for w in weights]
    outs = eager(tuple(weights), tuple(us), tuple(vs))
    found = [*outs, *torch.autograd.grad(outs, weights, douts)] if backward else outs
    return [t.detach() for t in found]


def checker(layers: int, backward: bool) -> Callable[[tuple[Tensor, ...], Any], str | None]:
    def check(inputs: tuple[Tensor, ...], output: Any) -> str | None:
        for i, (got, want) in enumerate(zip(output, exact(inputs, layers, backward), strict=True)):
            what = f"{'the gradient' if i >= layers else 'the result'} of layer {i % layers}"
            if got.shape != want.shape:
                return f"{what} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
            error = float((got.detach().double() - want).norm() / want.norm())
            if not error < 2e-5:
                return f"{what} is off by {error:.2g} in norm"
        return None

    return check


def _case(shapes: tuple[tuple[int, int], ...], backward: bool, settings: Settings) -> Case:
    layers = len(shapes)

    def inputs() -> tuple[Tensor, ...]:
        weights = [torch.randn(shape, device=settings.device) for shape in shapes]
        us, vs = ([torch.randn(s[k], device=settings.device) for s in shapes] for k in (0, 1))
        unit = [torch.nn.functional.normalize(x, dim=0) for x in (*us, *vs)]
        douts = [torch.randn_like(w) for w in weights]
        return (*(w.requires_grad_(backward) for w in weights), *unit, *douts)

    contenders = {"genfast": called(ours, layers, backward), "eager": called(eager, layers, backward)}
    if settings.compiled:
        contenders["compiled"] = torch.compile(contenders["eager"], dynamic=False)
    elements = sum(rows * columns for rows, columns in shapes)
    one = layers == 1
    targets = {"default": {"eager": 2.3 if backward else 0.95}} if shapes == ((512, 4608),) else {}
    return Case(
        op="spectral_normalize",
        variant=("forward+backward" if backward else "forward") + ("" if one else f" of {layers} layers"),
        shape=shapes[0] if one else (elements,),
        dtype=torch.float32,
        inputs=inputs,
        contenders=contenders,
        check=checker(layers, backward),
        floor_bytes=4 * elements * (7 if backward else 3),
        targets=targets if settings.device == "cpu" else {},
    )


def cases(settings: Settings) -> list[Case]:
    """The workloads; ``quick`` leaves out the network."""
    layouts = (((512, 4608),),) if settings.quick else (((512, 4608),), NETWORK, ((1024, 16384),))
    return [_case(shapes, backward, settings) for shapes in layouts for backward in (False, True)]


def run(settings: Settings, **options: Any) -> list[harness.Row]:
    return harness.run_cases(cases, settings, "spectral_normalize", **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "spectral_normalize", *sys.argv[1:]])
