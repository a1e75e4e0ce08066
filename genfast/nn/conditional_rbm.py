"""Restricted Boltzmann machines whose biases depend on a condition, such as the frames before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genfast import ops, random
from genfast._checks import shape_of, wide
from genfast.nn._rbm_chains import first_chain
from genfast.ops._rbm_common import checked_precision
from genfast.ops._rbm_units import GAUSSIAN, log_partition, mean, parse_units
from genfast.ops.rbm_gibbs import check_pair

__all__ = ["ConditionalRBM"]


class ConditionalRBM(nn.Module):
    """An RBM of v given a condition u: p(v, h | u) ~ exp(-E) with the biases b + u A and c + u B.

    With u the frames before v it is a model of sequences: ``windows`` cuts them, ``generate`` continues them.

    Args:
        visible: number of visible units V.
        condition: size N of u; n * V for n earlier frames.
        hidden: number of hidden units H.
        visible_units: kind of the visible units: ``"bernoulli"``, ``"gaussian"`` (of variance 1) or ``"softmax:K"``.
        hidden_units: kind of the hidden units: ``"bernoulli"``, ``"softmax:K"``, ``"gaussian"`` or ``"relu"``, the last
            two not with Gaussian visible units.
        precision: of the products that sample, see ``ops.rbm_half_step``.
        device: where the parameters live.
        dtype: their dtype.

    Attributes:
        W: weights [V, H], initialized to N(0, 0.01^2).
        A: from the condition to the visible units [N, V] (autoregressive weights), likewise.
        B: from the condition to the hidden units [N, H], likewise.
        b: visible bias [V], zeros.
        c: hidden bias [H], zeros.

    Raises:
        TypeError, ValueError: for sizes below 1, or unknown kinds of units or precision.

    Source: Taylor, Hinton and Roweis, "Modeling human motion using binary latent variables", NIPS 2006; Taylor and
    Hinton, "Factored conditional restricted Boltzmann machines for modeling motion style", ICML 2009.

    Examples:
        >>> rbm = ConditionalRBM(4, condition=8, hidden=5, visible_units="gaussian")
        >>> v, u = rbm.windows(torch.randn(20, 4))  # two frames before each
        >>> v.shape, u.shape
        (torch.Size([18, 4]), torch.Size([18, 8]))
        >>> rbm.contrastive_divergence(v, u).backward()
        >>> rbm.generate(torch.randn(2, 4), frames=3, seed=0).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        visible: int,
        condition: int,
        hidden: int,
        *,
        visible_units: str = "bernoulli",
        hidden_units: str = "bernoulli",
        precision: str = "fp32",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if visible < 1 or condition < 1 or hidden < 1:
            raise ValueError(
                "ConditionalRBM: visible, condition and hidden must be at least 1, got "
                f"{visible}, {condition} and {hidden}"
            )
        check_pair("ConditionalRBM", visible_units, hidden_units, visible, hidden)
        self._visible_kind = parse_units("ConditionalRBM", "visible", visible_units, visible)
        self._hidden_kind = parse_units("ConditionalRBM", "hidden", hidden_units, hidden)
        self.visible, self.condition, self.hidden = visible, condition, hidden
        self.visible_units, self.hidden_units = visible_units, hidden_units
        self.precision = checked_precision("ConditionalRBM", precision)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.W = nn.Parameter(torch.empty(visible, hidden, **where))
        self.A = nn.Parameter(torch.empty(condition, visible, **where))
        self.B = nn.Parameter(torch.empty(condition, hidden, **where))
        self.b = nn.Parameter(torch.empty(visible, **where))
        self.c = nn.Parameter(torch.empty(hidden, **where))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights and zeroes the biases."""
        for weight in (self.W, self.A, self.B):
            nn.init.normal_(weight, std=0.01)
        nn.init.zeros_(self.b)
        nn.init.zeros_(self.c)

    def hidden_mean(self, v: Tensor, u: Tensor) -> Tensor:
        """E[h | v, u], [B, H], of v [B, V] and u [B, N]; differentiable."""
        v, u = self._states(v, u)
        return mean(v @ self.W + u @ self.B + self.c, self._hidden_kind)

    def visible_mean(self, h: Tensor, u: Tensor) -> Tensor:
        """E[v | h, u], [B, V], of h [B, H] and u [B, N]; differentiable."""
        h, u = self._states(h, u, "h", self.hidden)
        return mean(h @ self.W.T + u @ self.A + self.b, self._visible_kind)

    def free_energy(self, v: Tensor, u: Tensor) -> Tensor:
        """F(v | u) = -log sum_h exp(-E(v, h | u)), [B], nats, so that p(v | u) ~ exp(-F); differentiable.

        Its constant in v depends on u.
        """
        v, u = self._states(v, u)
        dtype = wide(v.dtype)
        hidden = (v @ self.W + u @ self.B + self.c).to(dtype)
        v, bias = v.to(dtype), (u @ self.A + self.b).to(dtype)
        own = 0.5 * (v - bias).square() if self._visible_kind.kind == GAUSSIAN else -v * bias
        return own.sum(-1) - log_partition(hidden, self._hidden_kind)

    @torch.no_grad()
    def gibbs(
        self,
        v: Tensor,
        u: Tensor,
        k: int,
        *,
        seed: int | Tensor | None = None,
        step: int = 0,
        row_offset: int | None = None,
        mean_field: bool = False,
    ) -> Tensor:
        """Runs k Gibbs steps v -> h -> v with u held; a constant for autograd.

        Args:
            v: visible states [B, V] to start from.
            u: conditions [B, N].
            k: number of steps, at least 0.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            step: half-step to start from; a run of k steps takes 2k.
            row_offset: global index of the first row; None: see ``genfast.nn.RBM``.
            mean_field: return E[v | h, u] of the last h instead of a draw.

        Returns:
            [B, V] in W's dtype.

        Raises:
            TypeError, ValueError: for arguments of the wrong kind, shape or range.
        """
        if k < 0:
            raise ValueError(f"ConditionalRBM.gibbs: k must be at least 0, got {k}")
        v, u = self._states(v, u)
        seed, first = random.as_seed(seed, v.device), first_chain(v, row_offset)
        up, down = torch.cat((self.W, self.B)), torch.cat((self.W, self.A.T), 1)  # u as further units of either side

        def draw(x: Tensor, W: Tensor, bias: Tensor, at: int, to: str, units: str) -> Tensor:
            drawn = ops.rbm_half_step(
                torch.cat((x, u), 1), W, bias, to=to, units=units, precision=self.precision, seed=seed,
                chain_offset=first, step=at,
            )  # fmt: skip
            assert isinstance(drawn, Tensor)
            return drawn

        for t in range(k):
            h = draw(v, up, self.c, step + 2 * t, "hidden", self.hidden_units)
            if mean_field and t == k - 1:
                return self.visible_mean(h, u)
            v = draw(h, down, self.b, step + 2 * t + 1, "visible", self.visible_units)
        return v

    def contrastive_divergence(
        self, v: Tensor, u: Tensor, k: int = 1, *, seed: int | Tensor | None = None, row_offset: int | None = None
    ) -> Tensor:
        """Mean F(v | u) - mean F(v_k | u) after k Gibbs steps: its gradient is the CD-k gradient of -log p(v | u).

        Args:
            v: visible states [B, V].
            u: conditions [B, N].
            k: number of Gibbs steps, at least 1.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            row_offset: global index of the first row; None: see ``genfast.nn.RBM``.

        Returns:
            A scalar; it is no likelihood.

        Raises:
            TypeError, ValueError: for arguments of the wrong kind, shape or range.
        """
        if k < 1:
            raise ValueError(f"ConditionalRBM.contrastive_divergence: k must be at least 1, got {k}")
        model = self.gibbs(v, u, k, seed=seed, row_offset=row_offset)
        return (self.free_energy(v, u) - self.free_energy(model, u)).mean()

    forward = contrastive_divergence

    # ---- sequences ---------------------------------------------------------------------------------------------------

    def windows(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """(v [T - n, V], u [T - n, n V]) of a sequence [T, V]: each frame but the first n, and the n before it.

        The oldest of these comes first.

        Raises:
            ValueError: if the condition is no whole number of frames, or the sequence has no more than n.
        """
        n = self._order()
        if sequence.dim() != 2 or sequence.shape[1] != self.visible or len(sequence) <= n:
            raise ValueError(
                f"ConditionalRBM: sequence must be [T, {self.visible}] with T above {n}, got {shape_of(sequence)}"
            )
        return sequence[n:], sequence.unfold(0, n, 1)[:-1].transpose(1, 2).flatten(1)

    @torch.no_grad()
    def generate(
        self, history: Tensor, frames: int, k: int = 30, *, seed: int | Tensor | None = None, mean_field: bool = True
    ) -> Tensor:
        """Continues a sequence: each frame takes k Gibbs steps that start at the frame before.

        Args:
            history: the last n frames [n, V], oldest first, or [B, n, V] for many sequences.
            frames: number of frames to generate.
            k: Gibbs steps a frame, at least 1.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            mean_field: frames are means given the last draw of the hidden units; False: draws.

        Returns:
            [frames, V] or [B, frames, V].

        Raises:
            ValueError: if the condition is no whole number of frames, or for a history of another shape.
        """
        n = self._order()
        if history.dim() not in (2, 3) or history.shape[-2:] != (n, self.visible) or k < 1:
            raise ValueError(
                f"ConditionalRBM.generate: history must be [n, V] = [{n}, {self.visible}] or [B, n, V] and k at least "
                f"1, got {shape_of(history)} and {k}"
            )
        seed = random.as_seed(seed, self.W.device)
        recent = (history if history.dim() == 3 else history.unsqueeze(0)).to(self.W.dtype)
        made = [recent.new_empty(len(recent), 0, self.visible)]
        for frame in range(frames):
            v = self.gibbs(
                recent[:, -1], recent.flatten(1), k, seed=seed, step=2 * k * frame, mean_field=mean_field
            ).unsqueeze(1)
            made.append(v)
            recent = torch.cat((recent[:, 1:], v), 1)
        result = torch.cat(made, 1)
        return result if history.dim() == 3 else result[0]

    def _order(self) -> int:
        if self.condition % self.visible:
            raise ValueError(
                f"ConditionalRBM: a condition of size {self.condition} is no whole number of frames of {self.visible}"
            )
        return self.condition // self.visible

    def _states(self, v: Any, u: Any, name: str = "v", size: int | None = None) -> tuple[Tensor, Tensor]:
        for label, value, units in ((name, v, self.visible if size is None else size), ("u", u, self.condition)):
            if not isinstance(value, Tensor):
                raise TypeError(f"ConditionalRBM: {label} must be a torch.Tensor, got {type(value).__name__}")
            if value.dim() != 2 or value.shape[1] != units:
                raise ValueError(f"ConditionalRBM: {label} must be [B, {units}], got {shape_of(value)}")
        if len(v) != len(u):
            raise ValueError(f"ConditionalRBM: {name} has {len(v)} rows, u {len(u)}; they must be equal")
        return v.to(self.W.dtype), u.to(self.W.dtype)

    def extra_repr(self) -> str:
        options = f"visible_units={self.visible_units!r}, hidden_units={self.hidden_units!r}"
        return f"{self.visible}, condition={self.condition}, {self.hidden}, {options}, precision={self.precision!r}"
