"""Restricted Boltzmann machines that classify."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from genfast import ops, random
from genfast._checks import shape_of, wide
from genfast.nn._rbm_chains import first_chain
from genfast.ops._rbm_common import checked_precision
from genfast.ops._rbm_units import parse_units, softplus, visible_energy

__all__ = ["ClassificationRBM"]


class ClassificationRBM(nn.Module):
    """An RBM over x and a class y: p(y, x, h) ~ exp(-E), for bernoulli units E = -x'b - h'c - x'W h - d_y - U_y h.

    p(y | x) has a closed form, so the model learns as a classifier (``loss`` with ``generative=0``), as a model of both
    x and y (``generative_loss``), or as a mixture (``loss``).

    Args:
        visible: number of units V of x.
        classes: number of classes C, at least 2.
        hidden: number of Bernoulli hidden units H.
        visible_units: kind of the units of x: ``"bernoulli"``, ``"gaussian"`` or ``"softmax:K"``.
        precision: of the products that sample, see ``ops.rbm_half_step``.
        device: where the parameters live.
        dtype: their dtype.

    Attributes:
        W: weights [V, H], uniform in +-1 / sqrt(max(V, H)).
        U: weights of the classes [C, H], likewise.
        b: bias of x [V], zeros.
        c: hidden bias [H], zeros.
        d: bias of the classes [C], zeros.

    Raises:
        TypeError, ValueError: for sizes that are too small, unknown kinds of units or precision.

    Source: Larochelle and Bengio, "Classification using discriminative restricted Boltzmann machines", ICML 2008.

    Examples:
        >>> rbm, x, y = ClassificationRBM(6, 3, 8), torch.ones(4, 6), torch.tensor([0, 1, 2, 1])
        >>> rbm.loss(x, y, generative=0.01).backward()
        >>> rbm(x).shape, torch.allclose(rbm.log_prob(x).exp().sum(1), torch.ones(4))
        (torch.Size([4, 3]), True)
    """

    def __init__(
        self,
        visible: int,
        classes: int,
        hidden: int,
        *,
        visible_units: str = "bernoulli",
        precision: str = "fp32",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if visible < 1 or hidden < 1 or classes < 2:
            raise ValueError(
                "ClassificationRBM: visible and hidden must be at least 1 and classes at least 2, got "
                f"{visible}, {hidden} and {classes}"
            )
        self._visible_kind = parse_units("ClassificationRBM", "visible", visible_units, visible)
        self.visible, self.classes, self.hidden, self.visible_units = visible, classes, hidden, visible_units
        self.precision = checked_precision("ClassificationRBM", precision)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.W = nn.Parameter(torch.empty(visible, hidden, **where))
        self.U = nn.Parameter(torch.empty(classes, hidden, **where))
        self.b = nn.Parameter(torch.empty(visible, **where))
        self.c = nn.Parameter(torch.empty(hidden, **where))
        self.d = nn.Parameter(torch.empty(classes, **where))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights and zeroes the biases."""
        for weight, size in ((self.W, self.visible), (self.U, self.classes)):
            bound = max(size, self.hidden) ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        for bias in (self.b, self.c, self.d):
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes: log p(y | x) up to a constant of each row; differentiable.

        Args:
            x: [..., V]; floating-point, uint8 or bool.

        Returns:
            d_y + sum_j softplus(c_j + U_yj + (x W)_j), [..., C].
        """
        inputs = (self._states(x) @ self.W + self.c).unsqueeze(-2) + self.U
        return softplus(inputs).sum(-1) + self.d

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(y | x) of every class y, [..., C]; differentiable."""
        return torch.log_softmax(self(x), -1)

    def predict(self, x: Tensor) -> Tensor:
        """The most probable class of each row of x [..., V], int64 [...]."""
        return self(x).argmax(-1)

    def free_energy(self, x: Tensor, y: Tensor) -> Tensor:
        """F(x, y) = -log sum_h exp(-E), [B], so that p(x, y) ~ exp(-F); differentiable. x is [B, V], y int64 [B]."""
        x, dtype = self._states(x), wide(self.W.dtype)
        self._labels(x, y)
        inputs = (x @ self.W + self.U[y] + self.c).to(dtype)
        own = visible_energy(x.to(dtype), self.b.to(dtype), self._visible_kind, None)
        return own - self.d[y].to(dtype) - softplus(inputs).sum(-1)

    # ---- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def gibbs(
        self,
        x: Tensor,
        y: Tensor,
        k: int,
        *,
        seed: int | Tensor | None = None,
        step: int = 0,
        row_offset: int | None = None,
        clamp_class: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Runs k Gibbs steps (x, y) -> h -> (x, y); constants for autograd.

        Args:
            x: [B, V].
            y: classes, int64 [B].
            k: number of steps, at least 0.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            step: half-step to start from; a Gibbs step takes three: h, x and y.
            row_offset: global index of the first row; None: see ``genfast.nn.RBM``.
            clamp_class: keep y, to draw x of given classes.

        Returns:
            (x [B, V] in W's dtype, y [B]).

        Raises:
            TypeError, ValueError: for arguments of the wrong kind, shape or range.
        """
        if k < 0:
            raise ValueError(f"ClassificationRBM.gibbs: k must be at least 0, got {k}")
        x = self._states(x)
        label, first = self._labels(x, y), first_chain(x, row_offset)
        seed = random.as_seed(seed, x.device)
        weights = torch.cat((self.W, self.U))

        def draw(states: Tensor, W: Tensor, bias: Tensor, at: int, **options: Any) -> Tensor:
            drawn = ops.rbm_half_step(
                states, W, bias, precision=self.precision, seed=seed, chain_offset=first, step=at, **options
            )
            assert isinstance(drawn, Tensor)
            return drawn

        for at in range(step, step + 3 * k, 3):
            h = draw(torch.cat((x, label), 1), weights, self.c, at)
            x = draw(h, self.W, self.b, at + 1, to="visible", units=self.visible_units)
            if not clamp_class:
                label = draw(h, self.U, self.d, at + 2, to="visible", units=f"softmax:{self.classes}")
        return x, label.argmax(1)

    # ---- training ----------------------------------------------------------------------------------------------------

    def loss(
        self,
        x: Tensor,
        y: Tensor,
        generative: float = 0.0,
        k: int = 1,
        *,
        seed: int | Tensor | None = None,
        row_offset: int | None = None,
    ) -> Tensor:
        """Mean over rows of -log p(y | x), plus ``generative`` times ``generative_loss``: the hybrid objective.

        Args:
            x: [B, V].
            y: classes, int64 [B].
            generative: weight of the generative part, at least 0; 0 leaves it out.
            k: its Gibbs steps.
            seed: of its noise: int or 0-d int64 tensor; None draws it from torch's default generator.
            row_offset: global index of the first row; None: see ``genfast.nn.RBM``.

        Returns:
            A scalar.

        Raises:
            TypeError, ValueError: for arguments of the wrong kind, shape or range.
        """
        if generative < 0:
            raise ValueError(f"ClassificationRBM.loss: generative must be at least 0, got {generative}")
        self._labels(self._states(x), y)
        loss = functional.cross_entropy(self(x), y)
        if generative > 0:
            loss = loss + generative * self.generative_loss(x, y, k, seed=seed, row_offset=row_offset)
        return loss

    def generative_loss(
        self, x: Tensor, y: Tensor, k: int = 1, *, seed: int | Tensor | None = None, row_offset: int | None = None
    ) -> Tensor:
        """Mean F(x, y) - mean F(x_k, y_k) after k Gibbs steps: its gradient is the CD-k gradient of -log p(x, y).

        Arguments as of ``loss``; the value is no likelihood.
        """
        if k < 1:
            raise ValueError(f"ClassificationRBM.generative_loss: k must be at least 1, got {k}")
        model = self.gibbs(x, y, k, seed=seed, row_offset=row_offset)
        return self.free_energy(x, y).mean() - self.free_energy(*model).mean()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _states(self, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"ClassificationRBM: x must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() == 0 or x.shape[-1] != self.visible:
            raise ValueError(f"ClassificationRBM: x must be [..., {self.visible}], got {shape_of(x)}")
        return x.to(self.W.dtype)

    def _labels(self, x: Tensor, y: Any) -> Tensor:
        """One-hot classes [B, C]."""
        if not isinstance(y, Tensor) or y.dtype != torch.int64:
            kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"ClassificationRBM: y must be an int64 tensor of classes, got {kind}")
        if x.dim() != 2 or len(x) == 0 or y.shape != x.shape[:1]:
            raise ValueError(
                f"ClassificationRBM: x must be [B, {self.visible}] with B at least 1 and y [B], got {shape_of(x)} and "
                f"{shape_of(y)}"
            )
        if y.is_cpu and not 0 <= int(y.min()) <= int(y.max()) < self.classes:
            raise ValueError(
                f"ClassificationRBM: classes must be in [0, {self.classes}), got {int(y.min())} to {int(y.max())}"
            )
        return functional.one_hot(y, self.classes).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.visible}, {self.classes} classes, {self.hidden}, visible_units={self.visible_units!r}, "
            f"precision={self.precision!r}"
        )
