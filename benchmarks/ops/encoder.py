"""A training step of ``torch.nn.TransformerEncoder`` with only its import swapped: 6 layers, width 512, 8 heads, 256
tokens, batch 8; as its defaults make it (dropout 0.1), and without dropout.

The floor is that of the matrix products, forward and backward. Under bfloat16 autocast it runs only where bfloat16
products have hardware: elsewhere the linear layers alone take minutes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import genfast
from genfast.benchmarks.harness import Case, Row, Settings
from genfast.benchmarks.ops import _attention as shared

__all__ = ["Step", "cases", "check", "run"]

LAYERS, WIDTH, HEADS, TOKENS, BATCH = 6, 512, 8, 256, 8
Loss = Callable[..., Tensor]


class Step:
    """One AdamW step of a copy of a model: (loss, gradients). Its rate is 0, so that every step does the same."""

    def __init__(self, model: nn.Module, loss: Loss, autocast: bool) -> None:
        self.model, self.loss, self.autocast = copy.deepcopy(model), loss, autocast
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.optimizer.zero_grad()
        kind = inputs[0].device.type
        with torch.autocast(kind, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            loss = self.loss(self.model, *inputs)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), *(p.grad for p in self.model.parameters() if p.grad is not None)


def check(exact: Step, bound: float, dropout: bool = False) -> Callable[[tuple[Tensor, ...], Any], str | None]:
    """The loss and all gradients together against those of a step in float32 without dropout.

    With dropout, the loss must be within a tenth and the gradient point the same way.
    """
    kept: list[Any] = []

    def compare(inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> str | None:
        if not kept or kept[0] is not inputs:
            kept[:] = [inputs, *(torch.cat([x.flatten() for x in part]) for part in _parts(exact(*inputs)))]
        loss, gradient = (torch.cat([x.flatten() for x in part]) for part in _parts(output))
        if gradient.shape != kept[2].shape:
            return f"the gradients have {gradient.numel()} numbers, not {kept[2].numel()}"
        loss_error = ((loss - kept[1]).norm() / kept[1].norm()).item()
        if not loss_error < (0.1 if dropout else bound):
            return f"the loss has a relative error of {loss_error:.1e}"
        if dropout:
            cosine = torch.nn.functional.cosine_similarity(gradient, kept[2], dim=0).item()
            return None if cosine > 0.5 else f"the gradient's cosine with the exact one is {cosine:.2f}"
        error = ((gradient - kept[2]).norm() / kept[2].norm()).item()
        return None if error < bound else f"the gradients have a relative error of {error:.1e}"

    return compare


def _parts(output: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return output[:1], output[1:]


def _loss(model: nn.Module, x: Tensor, wanted: Tensor) -> Tensor:
    return (model(x) - wanted).float().square().mean()


def _encoder(layers: Any, sizes: tuple[int, ...], dropout: float, device: str, seed: int) -> nn.Module:
    count, width, heads, *_ = sizes
    torch.manual_seed(seed)
    layer = layers.TransformerEncoderLayer(width, heads, 4 * width, dropout, batch_first=True)
    return layers.TransformerEncoder(layer, count, enable_nested_tensor=False).to(device)


def _case(sizes: tuple[int, ...], dropout: float, autocast: bool, settings: Settings) -> Case:
    layers, width, heads, tokens, batch = sizes
    models = {
        name: _encoder(module, sizes, dropout, settings.device, settings.seed)
        for name, module in (("genfast", genfast.nn), ("eager", nn))
    }
    exact = Step(_encoder(nn, sizes, 0.0, settings.device, settings.seed), _loss, autocast=False)
    options = [f"{layers} layers", f"dropout {dropout:g}" if dropout else "no dropout"]
    aim = 1.8 if autocast else 1.3
    return Case(
        op="encoder",
        variant=", ".join(["training step", *options, *(["bfloat16 autocast"] if autocast else [])]),
        shape=(batch, heads, tokens, width // heads),
        dtype=torch.bfloat16 if autocast else torch.float32,
        inputs=lambda: tuple(torch.randn(2, batch, tokens, width, device=settings.device)),
        contenders={name: Step(model, _loss, autocast) for name, model in models.items()},
        # float32 against float64 has 4e-5 to 9e-5: units of ReLU whose sign rounding decides count whole
        check=check(exact, 5e-2 if autocast else 1e-3, dropout > 0),
        floor_bytes=0,
        floor_flops=6 * layers * 12 * width**2 * batch * tokens + 14 * layers * tokens**2 * width * batch,
        targets={"default": {"eager": aim}} if torch.device(settings.device).type == "cpu" else {},
    )


def cases(settings: Settings) -> list[Case]:
    """The step in float32, and under autocast where that makes sense; ``quick`` shrinks it."""
    sizes = (2, 64, 4, 32, 2) if settings.quick else (LAYERS, WIDTH, HEADS, TOKENS, BATCH)
    dtypes = (False, True) if shared.has_fast_bf16(settings.device) else (False,)
    return [_case(sizes, dropout, autocast, settings) for autocast in dtypes for dropout in (0.1, 0.0)]


def run(settings: Settings, **options: Any) -> list[Row]:
    return shared.run_cases(cases(settings), settings, **options)


if __name__ == "__main__":
    import sys

    from genfast.cli import app

    app(["bench", "encoder", *sys.argv[1:]])
