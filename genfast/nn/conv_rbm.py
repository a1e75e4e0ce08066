"""Convolutional restricted Boltzmann machines, with probabilistic max pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from genfast import ops, random
from genfast._checks import shape_of, wide
from genfast.nn._rbm_chains import first_chain
from genfast.ops._rbm_units import GAUSSIAN, SOFTMAX, Units, mean, parse_units, sample, softplus, visible_energy

__all__ = ["ConvRBM"]


class ConvRBM(nn.Module):
    """An RBM of images whose hidden units share weights: E = -sum h * (W conv v) - c sum h - b sum v, over all places.

    Without ``pool`` the hidden units of a map are independent given v. With it the map is cut into pool x pool blocks
    of which at most one unit is on, by a softmax over them and "none" (probabilistic max pooling); a pooling unit is on
    where one of its block is.

    Args:
        channels: of the images.
        filters: number of hidden maps.
        kernel_size: of the filters, a number or (height, width). There is no padding: a map is smaller than the image
            by kernel_size - 1.
        pool: side of a pooling block, which divides the sides of a map; None for no pooling.
        visible_units: kind of the visible units: ``"bernoulli"`` or ``"gaussian"`` (of variance 1).
        device: where the parameters live.
        dtype: their dtype.

    Attributes:
        W: filters [filters, channels, height, width] as in ``torch.nn.Conv2d``, initialized to N(0, 0.01^2).
        b: visible bias [channels], zeros.
        c: hidden bias [filters], zeros.

    Raises:
        ValueError: for sizes below 1, or other kinds of units.

    Source: Lee, Grosse, Ranganath and Ng, "Convolutional deep belief networks for scalable unsupervised learning of
    hierarchical representations", ICML 2009.

    Examples:
        >>> rbm, v = ConvRBM(1, 4, kernel_size=3, pool=2), torch.ones(5, 1, 8, 8)
        >>> rbm.contrastive_divergence(v).backward()
        >>> rbm.hidden_mean(v).shape, rbm.pool_mean(v).shape
        (torch.Size([5, 4, 6, 6]), torch.Size([5, 4, 3, 3]))
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        kernel_size: int | Sequence[int],
        *,
        pool: int | None = None,
        visible_units: str = "bernoulli",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        if min(channels, filters, *sides, 1 if pool is None else pool) < 1 or len(sides) != 2:
            raise ValueError(
                "ConvRBM: channels, filters, pool and the one or two kernel sizes must be at least 1, got "
                f"{channels}, {filters}, {pool} and {kernel_size}"
            )
        if visible_units not in ("bernoulli", "gaussian"):
            raise ValueError(f"ConvRBM: visible_units must be 'bernoulli' or 'gaussian', got {visible_units!r}")
        self._visible_kind = parse_units("ConvRBM", "visible", visible_units, channels)
        self.channels, self.filters, self.pool, self.visible_units = channels, filters, pool, visible_units
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.W = nn.Parameter(torch.empty(filters, channels, *sides, **where))
        self.b = nn.Parameter(torch.empty(channels, **where))
        self.c = nn.Parameter(torch.empty(filters, **where))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new filters and zeroes the biases."""
        nn.init.normal_(self.W, std=0.01)
        nn.init.zeros_(self.b)
        nn.init.zeros_(self.c)

    # ---- conditionals ------------------------------------------------------------------------------------------------

    def hidden_mean(self, v: Tensor) -> Tensor:
        """p(h = 1 | v), [B, filters, H', W'], of images v [B, channels, H, W]; differentiable."""
        inputs = self._inputs(v)
        if self.pool is None:
            return torch.sigmoid(inputs)
        return self._places(mean(self._choices(inputs).flatten(1), self._block_units()), inputs.shape)

    def pool_mean(self, v: Tensor) -> Tensor:
        """p(a unit of the block is on | v), [B, filters, H' / pool, W' / pool]; differentiable.

        Raises:
            ValueError: without ``pool``.
        """
        if self.pool is None:
            raise ValueError("ConvRBM.pool_mean: the model has no pooling; pass pool= to ConvRBM")
        return torch.sigmoid(torch.logsumexp(self._blocks(self._inputs(v)), -1))

    def visible_mean(self, h: Tensor) -> Tensor:
        """E[v | h], [B, channels, H, W], of hidden maps h [B, filters, H', W']; differentiable."""
        return mean(self._visible_inputs(h), self._visible_kind)

    @torch.no_grad()
    def sample_hidden(
        self, v: Tensor, *, seed: int | Tensor | None = None, step: int = 0, row_offset: int | None = None
    ) -> Tensor:
        """Draws h ~ p(h | v), [B, filters, H', W']; a constant for autograd.

        Args:
            v: images [B, channels, H, W].
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            step: the half-step. Each (seed, step) is one set of draws.
            row_offset: global index of the first image; None: see ``genfast.nn.RBM``.
        """
        inputs = self._inputs(v)
        if self.pool is None:
            return _bernoulli(inputs, seed, step, self._first(inputs, row_offset))
        choices = self._choices(inputs).flatten(1).to(wide(inputs.dtype))
        h, _ = sample(
            choices, self._block_units(), 1.0, None, random.as_seed(seed, inputs.device),
            self._first(inputs, row_offset), step,
        )  # fmt: skip
        return self._places(h.to(inputs.dtype), inputs.shape)

    @torch.no_grad()
    def sample_visible(
        self, h: Tensor, *, seed: int | Tensor | None = None, step: int = 1, row_offset: int | None = None
    ) -> Tensor:
        """Draws v ~ p(v | h), [B, channels, H, W]; as ``sample_hidden``."""
        inputs = self._visible_inputs(h)
        first = self._first(inputs, row_offset)
        if self._visible_kind.kind != GAUSSIAN:
            return _bernoulli(inputs, seed, step, first)
        flat = inputs.flatten(1).to(wide(inputs.dtype))
        seed = random.as_seed(seed, inputs.device)
        return sample(flat, self._visible_kind, 1.0, None, seed, first, step)[0].to(inputs.dtype).view_as(inputs)

    def gibbs(
        self, v: Tensor, k: int, *, seed: int | Tensor | None = None, step: int = 0, row_offset: int | None = None
    ) -> Tensor:
        """Runs k Gibbs steps v -> h -> v; a constant for autograd.

        Args:
            v: images [B, channels, H, W] to start from.
            k: number of steps, at least 0.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            step: half-step to start from; k steps take 2k.
            row_offset: global index of the first image; None: see ``genfast.nn.RBM``.

        Returns:
            Images of v's shape in W's dtype.

        Examples:
            >>> rbm, v = ConvRBM(1, 4, kernel_size=3), torch.zeros(2, 1, 6, 6)
            >>> torch.equal(rbm.gibbs(v, 3, seed=1), rbm.gibbs(rbm.gibbs(v, 1, seed=1), 2, seed=1, step=2))
            True
        """
        if k < 0:
            raise ValueError(f"ConvRBM.gibbs: k must be at least 0, got {k}")
        v = self._images(v).detach()
        seed = random.as_seed(seed, v.device)
        for at in range(step, step + 2 * k, 2):
            h = self.sample_hidden(v, seed=seed, step=at, row_offset=row_offset)
            v = self.sample_visible(h, seed=seed, step=at + 1, row_offset=row_offset)
        return v

    # ---- training ----------------------------------------------------------------------------------------------------

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v) = -log sum_h exp(-E(v, h)), [B], nats, so that p(v) ~ exp(-F(v)); differentiable."""
        v, inputs = self._images(v), self._inputs(v)
        dtype = wide(v.dtype)
        inputs = inputs.to(dtype)
        if self.pool is not None:
            inputs = torch.logsumexp(self._blocks(inputs), -1)
        bias = self.b.to(dtype).repeat_interleave(v.shape[2] * v.shape[3])
        own = visible_energy(v.flatten(1).to(dtype), bias, self._visible_kind, None)
        return own - softplus(inputs).flatten(1).sum(1)

    def contrastive_divergence(
        self, v: Tensor, k: int = 1, *, seed: int | Tensor | None = None, row_offset: int | None = None
    ) -> Tensor:
        """Mean F(v) - mean F(v_k) after k Gibbs steps: its gradient is the CD-k gradient of the mean -log p(v).

        It is a sum over places, so a learning rate has to be smaller than that of an RBM.

        Args:
            v: images [B, channels, H, W], at least one.
            k: number of Gibbs steps, at least 1.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            row_offset: global index of the first image; None: see ``genfast.nn.RBM``.

        Returns:
            A scalar; it is no likelihood.

        Raises:
            TypeError, ValueError: for images of another shape, or that the filters or pooling do not fit.
        """
        if k < 1:
            raise ValueError(f"ConvRBM.contrastive_divergence: k must be at least 1, got {k}")
        if len(self._images(v)) == 0:
            raise ValueError("ConvRBM.contrastive_divergence: v must have at least one image")
        model = self.gibbs(v, k, seed=seed, row_offset=row_offset)
        return self.free_energy(v).mean() - self.free_energy(model).mean()

    forward = contrastive_divergence

    def sparsity_penalty(self, v: Tensor, target: float, strength: float = 1.0) -> Tensor:
        """strength * sum over filters of (target - q)^2, q the mean of p(h = 1 | v) over images and places.

        Add it to the loss: a model with more hidden than visible units needs one to learn more than copies.

        Args:
            v: images [B, channels, H, W].
            target: the mean that hidden units are to have.
            strength: factor of the penalty.

        Returns:
            A scalar; differentiable.

        Source: Lee, Ekanadham and Ng, "Sparse deep belief net model for visual area V2", NIPS 2007.
        """
        return strength * (target - self.hidden_mean(v).mean((0, 2, 3))).square().sum()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _images(self, v: Any) -> Tensor:
        if not isinstance(v, Tensor):
            raise TypeError(f"ConvRBM: v must be a torch.Tensor, got {type(v).__name__}")
        height, width = self.W.shape[2:]
        if v.dim() != 4 or v.shape[1] != self.channels or v.shape[2] < height or v.shape[3] < width:
            raise ValueError(
                f"ConvRBM: v must be [B, {self.channels}, H, W] with H at least {height} and W at least {width}, got "
                f"{shape_of(v)}"
            )
        p = self.pool or 1
        if (v.shape[2] - height + 1) % p or (v.shape[3] - width + 1) % p:
            raise ValueError(
                f"ConvRBM: maps of {v.shape[2] - height + 1} x {v.shape[3] - width + 1} do not divide into blocks of "
                f"{p} x {p}; crop or pad the images"
            )
        return v.to(self.W.dtype)

    def _inputs(self, v: Tensor) -> Tensor:
        return functional.conv2d(self._images(v), self.W, self.c)

    def _visible_inputs(self, h: Any) -> Tensor:
        if not isinstance(h, Tensor) or h.dim() != 4 or h.shape[1] != self.filters:
            kind = shape_of(h) if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(f"ConvRBM: h must be a tensor [B, {self.filters}, H', W'], got {kind}")
        return functional.conv_transpose2d(h.to(self.W.dtype), self.W, self.b)

    def _first(self, inputs: Tensor, row_offset: int | None) -> int:
        return first_chain(inputs.flatten(1), row_offset)

    def _block_units(self) -> Units:
        assert self.pool is not None
        return Units(SOFTMAX, self.pool**2 + 1)

    def _blocks(self, inputs: Tensor) -> Tensor:
        """Inputs by block, [B, filters, H' / p, W' / p, p p]."""
        assert self.pool is not None
        split = inputs.unflatten(3, (-1, self.pool)).unflatten(2, (-1, self.pool))  # [B, filters, H'/p, p, W'/p, p]
        return split.transpose(3, 4).flatten(4)

    def _choices(self, inputs: Tensor) -> Tensor:
        """Inputs by block, and 0 for "none is on", [B, filters, H' / p, W' / p, p p + 1]."""
        return functional.pad(self._blocks(inputs), (0, 1))

    def _places(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """What ``_choices`` and ``flatten(1)`` undo, without "none is on"."""
        assert self.pool is not None
        p = self.pool
        blocks = flat.view(*shape[:2], shape[2] // p, shape[3] // p, p * p + 1)[..., :-1]
        return blocks.unflatten(4, (p, p)).transpose(3, 4).reshape(shape)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, {self.filters}, kernel_size={tuple(self.W.shape[2:])}, pool={self.pool}, "
            f"visible_units={self.visible_units!r}"
        )


def _bernoulli(logits: Tensor, seed: Any, step: int, first: int) -> Tensor:
    drawn = ops.bernoulli_sample(logits.flatten(1), seed=seed, step=step, row_offset=first)
    assert isinstance(drawn, Tensor)
    return drawn.view_as(logits)
