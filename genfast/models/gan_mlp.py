"""GANs of fully connected networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from genfast._checks import check_count
from genfast.models._gan_layers import SLOPE, BatchNormAct, Dense
from genfast.models.gan import GAN, PackedDiscriminator

__all__ = ["MLPDiscriminator", "MLPGAN", "MLPGenerator"]

_OUTPUTS = ("tanh", "linear")


def _widths(what: str, shape: Sequence[int], hidden: Sequence[int]) -> None:
    if not shape or min(shape) < 1:
        raise ValueError(f"{what}: shape must be positive sizes, got {tuple(shape)}")
    if not hidden or min(hidden) < 1:
        raise ValueError(f"{what}: hidden must be positive numbers of units, got {tuple(hidden)}")


class MLPGenerator(nn.Module):
    """Fully connected: relu layers, then tanh or nothing.

    Args:
        latent: size of z.
        shape: of a sample.
        hidden: widths of the hidden layers.
        batch_norm: normalize the hidden layers.
        output: ``"tanh"`` for samples in [-1, 1], or ``"linear"``.
        fused: genfast's ops; False: plain PyTorch.

    Raises:
        ValueError: for sizes below 1 or another output.

    Examples:
        >>> MLPGenerator(8, (1, 4, 4), hidden=[16])(torch.zeros(3, 8)).shape
        torch.Size([3, 1, 4, 4])
    """

    def __init__(
        self, latent: int, shape: Sequence[int], hidden: Sequence[int] = (256, 256), *, batch_norm: bool = False,
        output: str = "tanh", fused: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        _widths("MLPGenerator", shape, hidden)
        check_count("MLPGenerator", "latent", latent, 1)
        if output not in _OUTPUTS:
            raise ValueError(f"MLPGenerator: output must be one of {', '.join(_OUTPUTS)}, got {output!r}")
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise([latent, *hidden]):
            if batch_norm:
                layers += [
                    Dense(narrow, wide, bias=False), BatchNormAct(wide, "relu", images=False, fused=fused)
                ]  # fmt: skip
            else:
                layers.append(Dense(narrow, wide, "relu", fused=fused))
        layers.append(Dense(hidden[-1], math.prod(shape), output, fused=fused))
        self.layers = nn.Sequential(*layers)
        self.shape = tuple(shape)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, latent] to samples [B, *shape]."""
        out: Tensor = self.layers(z)
        return out.view(-1, *self.shape)


class Maxout(nn.Linear):
    """The largest of ``pieces`` linear units for each output.

    Source: Goodfellow et al., "Maxout networks", ICML 2013.
    """

    def __init__(self, inputs: int, outputs: int, pieces: int) -> None:
        super().__init__(inputs, pieces * outputs)
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(-1, (self.pieces, -1)).amax(-2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pieces={self.pieces}"


class MLPDiscriminator(nn.Module):
    """Fully connected: leaky relu or maxout layers, then one logit.

    Args:
        shape: of a sample.
        hidden: widths of the hidden layers.
        maxout: linear pieces of a maxout unit; None for leaky relus.
        fused: genfast's ops; False: plain PyTorch.

    Raises:
        ValueError: for sizes below 1.

    Examples:
        >>> MLPDiscriminator((1, 4, 4), hidden=[16])(torch.zeros(3, 1, 4, 4)).shape
        torch.Size([3])
    """

    independent = True

    def __init__(
        self, shape: Sequence[int], hidden: Sequence[int] = (256, 256), *, maxout: int | None = None, fused: bool = True
    ) -> None:
        super().__init__()
        _widths("MLPDiscriminator", shape, hidden)
        if maxout is not None:
            check_count("MLPDiscriminator", "maxout", maxout, 1)
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise([math.prod(shape), *hidden]):
            layers.append(
                Dense(narrow, wide, "lrelu", fused=fused) if maxout is None else Maxout(narrow, wide, maxout)
            )  # fmt: skip
        self.layers = nn.Sequential(*layers, Dense(hidden[-1], 1))
        self.bends = fused and maxout is None  # whether ``judged`` serves

    def judged(self, x: Tensor) -> JudgedRows:
        """A pass outside of autograd, with its derivatives in closed form; of leaky relus."""
        return JudgedRows(self.layers, x.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """Samples [B, ...] to logits [B]."""
        out: Tensor = self.layers(x.flatten(1))
        return out.squeeze(1)


class JudgedRows:
    """A pass of an ``MLPDiscriminator`` with leaky relus, and what follows from it without a graph.

    With a_l = h_(l-1) W_l^T + b_l and h_l = lrelu(a_l), the slopes of a row's logit by its a_l are
    s_l = (s_(l+1) W_(l+1)) lrelu'(a_l), and by x they are g = s_1 W_1. As lrelu is linear in pieces, the tangent of the
    logit along v, t_l = (t_(l-1) W_l^T) lrelu'(a_l) with t_0 = v, has the derivative s_l^T t_(l-1) by W_l, and so, with
    v = weight g held fixed, has half the squared slopes. A loss with the gradient c by the logits and a penalty share
    one product a layer: dW_l = s_l^T (c h_(l-1) + t_(l-1)), db_l = s_l^T c.

    Args:
        layers: the discriminator's.
        x: rows [N, features].
    """

    def __init__(self, layers: nn.Sequential, x: Tensor) -> None:
        parts: list[Any] = list(layers)
        *hidden, last = parts
        self.weights: list[Tensor] = [layer.weight.detach() for layer in hidden]
        self.last: Tensor = last.weight.detach()
        self.before: list[Tensor] = []
        self.inputs = [x]
        for layer, weight in zip(hidden, self.weights, strict=True):
            self.before.append(torch.addmm(layer.bias.detach(), self.inputs[-1], weight.T))
            self.inputs.append(functional.leaky_relu(self.before[-1], SLOPE))
        bias: Tensor = last.bias.detach()
        self.logits = torch.addmv(bias.expand(len(x)), self.inputs[-1], self.last[0])
        self.slopes: list[Tensor] = []

    def _bend(self, x: Tensor, level: int) -> Tensor:
        """Times lrelu'(a)."""
        return torch.ops.aten.leaky_relu_backward(x, self.before[level], SLOPE, False)

    def by_inputs(self, rows: slice = slice(None)) -> Tensor:
        """Slopes of each row's logit by the row; keeps those by the layers."""
        before = [a[rows] for a in self.before]
        found = self.last.expand(len(before[-1]), -1)
        self.slopes = []
        for a, weight in zip(reversed(before), reversed(self.weights), strict=True):
            found = torch.ops.aten.leaky_relu_backward(found, a, SLOPE, False)
            self.slopes.insert(0, found)
            found = found @ weight
        return found

    def by_parameters(self, by_logits: Tensor, moves: Tensor | None) -> list[Tensor]:
        """Gradients of sum(by_logits * logits) + sum of the logits' tangents along ``moves``, slopes held fixed.

        In the order of ``parameters()``; after ``by_inputs()`` of all rows.
        """
        if not self.slopes:
            self.by_inputs()
        column, found = by_logits.unsqueeze(1), []
        for level, (slope, weight) in enumerate(zip(self.slopes, self.weights, strict=True)):
            share = self.inputs[level] * column
            if moves is not None:
                share += moves
                moves = self._bend(moves @ weight.T, level)
            found += [slope.T @ share, slope.T @ by_logits]
        share = by_logits @ self.inputs[-1]
        if moves is not None:
            share = share + moves.sum(0)
        return [*found, share.unsqueeze(0), by_logits.sum().unsqueeze(0)]


class MLPGAN(GAN):
    """A GAN of fully connected networks.

    Args:
        shape: of a sample; (64,) for rows of 64 values.
        latent: size of z.
        hidden: widths of the generator's hidden layers.
        discriminator_hidden: of the discriminator's; None for the same.
        batch_norm: normalize the generator's hidden layers.
        maxout: linear pieces of the discriminator's units; None for leaky relus.
        output: of the generator, ``"tanh"`` for samples in [-1, 1], or ``"linear"``.
        packed: samples that the discriminator judges at once, see ``PackedDiscriminator``.
        fused: genfast's ops; False: plain PyTorch, with the same ``state_dict``.

    Raises:
        ValueError: for sizes below 1 or another output.

    Source: Goodfellow et al., "Generative adversarial nets", NeurIPS 2014.

    Examples:
        >>> gan = MLPGAN((64,), latent=8, hidden=[32])
        >>> gan.sample(3, seed=0).shape
        torch.Size([3, 64])
    """

    def __init__(
        self, shape: Sequence[int] = (784,), latent: int = 64, hidden: Sequence[int] = (256, 256), *,
        discriminator_hidden: Sequence[int] | None = None, batch_norm: bool = False, maxout: int | None = None,
        output: str = "tanh", packed: int = 1, fused: bool = True,
    ) -> None:  # fmt: skip
        check_count("MLPGAN", "packed", packed, 1)
        generator = MLPGenerator(latent, shape, hidden, batch_norm=batch_norm, output=output, fused=fused)
        judged = (packed * shape[0], *shape[1:])
        discriminator: nn.Module = MLPDiscriminator(
            judged, hidden if discriminator_hidden is None else discriminator_hidden, maxout=maxout, fused=fused
        )
        super().__init__(generator, PackedDiscriminator(discriminator, packed) if packed > 1 else discriminator, latent)
