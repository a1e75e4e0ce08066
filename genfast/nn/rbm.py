"""Restricted Boltzmann machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genfast import ops, random
from genfast.nn._rbm_chains import first_chain, move_offsets, persistent_gradients
from genfast.nn._rbm_loss import gap_loss, variance_gradient
from genfast.nn._rbm_measures import pseudo_likelihood, sparsity_penalty
from genfast.ops._rbm_common import checked_precision
from genfast.ops._rbm_units import BERNOULLI, GAUSSIAN, SOFTMAX, mean, parse_units
from genfast.ops.rbm_gibbs import check_pair

__all__ = ["RBM"]

_SMALLEST_MEAN = 1e-3  # of a visible unit, for the logarithm in its bias


class RBM(nn.Module):
    """A restricted Boltzmann machine: p(v, h) ~ exp(-E(v, h)), for bernoulli units E = -v'b - h'c - v'W h.

    Energies and conditionals of every kind of unit are those of ``genfast.ops``, which does the work.

    Every random number is a pure function of (seed, Gibbs half-step, global chain index, unit): hidden units of Gibbs
    step t take half-step 2t, visible ones 2t + 1. Chains that are split over calls or processes, with ``row_offset``
    for the index of the first one, draw the same noise as together. Their states then agree wherever the matrix product
    gives a row the same bits whatever the number of rows, which BLAS libraries do not promise: a unit whose probability
    is within rounding (about 1e-7) of its uniform can differ.

    Inside an initialized ``torch.distributed`` process group ``row_offset=None`` means rank * rows, elsewhere 0. Ranks
    need one seed in common: pass ``seed`` or call ``torch.manual_seed`` alike on all of them. ``forward`` is
    ``contrastive_divergence``, so ``DistributedDataParallel(rbm)(v, persistent=True).backward()`` trains on all ranks;
    each keeps (and saves) its own chains, while offsets and fast weights are averaged over them.

    Args:
        visible: number of visible units V.
        hidden: number of hidden units H.
        visible_units: kind of the visible units: ``"bernoulli"``, ``"gaussian"`` or ``"softmax:K"``.
        hidden_units: kind of the hidden units: ``"bernoulli"``, ``"softmax:K"``, ``"gaussian"`` or ``"relu"``, the last
            two not with Gaussian visible units.
        learn_variance: learn the variances of Gaussian visible units; without it they are 1.
        precision: of the products that sample and that give gradients: ``"fp32"``, ``"bf16"`` or ``"split"``, see
            ``ops.rbm_half_step``.
        centered: train by the centered gradient, whose offsets are moving averages of the units' means over the data.
        device: where the parameters live.
        dtype: their dtype.

    Attributes:
        W: weights [V, H], initialized to N(0, 0.01^2).
        b: visible bias [V], zeros; see ``init_visible_bias``.
        c: hidden bias [H], zeros.
        logvar: log variances [V] with ``learn_variance``, zeros; else None.
        visible_offset, hidden_offset: buffers [V] and [H] with ``centered``, else None. They start at the means of
            units without input, and move by 1% of the way at each training step in training mode.
        chains: the states [N, V] of persistent chains, a buffer; [N, T, V] where T temperatures run; empty until they
            start. The ``state_dict`` also holds their seed and half-step, as ``_extra_state``, so a resumed run
            continues bit for bit.
        fast_W, fast_b, fast_c: buffers, the fast weights of fast persistent contrastive divergence, else None.
        swap_rate: of the last tempered step, see ``ops.rbm_tempering``; None before.

    Raises:
        TypeError, ValueError: for fewer than one visible or hidden unit, or unknown kinds of units or precision.

    Source: Hinton, "Training products of experts by minimizing contrastive divergence", 2002; Hinton, "A practical
    guide to training restricted Boltzmann machines", 2010 (initialization); Melchior, Fischer and Wiskott, "How to
    center deep Boltzmann machines", JMLR 2016.

    Examples:
        >>> rbm = RBM(6, 4)
        >>> optimizer = torch.optim.SGD(rbm.parameters(), lr=0.1)
        >>> rbm.contrastive_divergence(torch.ones(64, 6), k=1).backward()
        >>> optimizer.step()
        >>> rbm.b.detach().min() > 0
        tensor(True)
    """

    chains: Tensor
    visible_offset: Tensor | None
    hidden_offset: Tensor | None
    fast_W: Tensor | None  # noqa: N815
    fast_b: Tensor | None
    fast_c: Tensor | None
    logvar: Tensor | None

    def __init__(
        self,
        visible: int,
        hidden: int,
        *,
        visible_units: str = "bernoulli",
        hidden_units: str = "bernoulli",
        learn_variance: bool = False,
        precision: str = "fp32",
        centered: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if visible < 1 or hidden < 1:
            raise ValueError(f"RBM: visible and hidden must be at least 1, got {visible} and {hidden}")
        check_pair("RBM", visible_units, hidden_units, visible, hidden)
        if learn_variance and visible_units != "gaussian":
            raise ValueError(f"RBM: learn_variance is for gaussian visible units, got visible_units={visible_units!r}")
        self.visible, self.hidden = visible, hidden
        self.visible_units, self.hidden_units = visible_units, hidden_units
        self.precision = checked_precision("RBM", precision)
        self._visible_kind = parse_units("RBM", "visible", visible_units, visible)
        self._hidden_kind = parse_units("RBM", "hidden", hidden_units, hidden)

        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.W = nn.Parameter(torch.empty(visible, hidden, **where))
        self.b = nn.Parameter(torch.empty(visible, **where))
        self.c = nn.Parameter(torch.empty(hidden, **where))
        self.register_parameter("logvar", nn.Parameter(torch.empty(visible, **where)) if learn_variance else None)
        self.register_buffer("visible_offset", torch.empty(visible, **where) if centered else None)
        self.register_buffer("hidden_offset", torch.empty(hidden, **where) if centered else None)
        self.register_buffer("chains", torch.empty(0, visible, **where))
        for name in ("fast_W", "fast_b", "fast_c"):
            self.register_buffer(name, None)
        self.chain_seed = self.chain_step = 0
        self.swap_rate: Tensor | None = None
        # DistributedDataParallel must not copy rank 0's chains over the others', and need not copy what is equal.
        self._ddp_params_and_buffers_to_ignore = ["chains", "fast_W", "fast_b", "fast_c"]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights, zeroes the biases and log variances, forgets chains, offsets and fast weights."""
        nn.init.normal_(self.W, std=0.01)
        nn.init.zeros_(self.b)
        nn.init.zeros_(self.c)
        if self.logvar is not None:
            nn.init.zeros_(self.logvar)
        if self.visible_offset is not None and self.hidden_offset is not None:
            self.visible_offset.copy_(mean(torch.zeros_like(self.visible_offset), self._visible_kind))
            self.hidden_offset.copy_(mean(torch.zeros_like(self.hidden_offset), self._hidden_kind))
        self.chains = self.chains.new_empty(0, self.visible)
        self.fast_W = self.fast_b = self.fast_c = None

    @torch.no_grad()
    def init_visible_bias(self, data_mean: Tensor) -> None:
        """Sets b so that the untrained model has the data's means; with ``centered`` the visible offset as well.

        It is log(p / (1 - p)) for bernoulli units, log p for softmax and p for Gaussian ones (Hinton 2010).

        Args:
            data_mean: mean p of each visible unit over the training data, [V]; a probability is kept in [0.001, 0.999].

        Examples:
            >>> rbm = RBM(3, 2)
            >>> rbm.init_visible_bias(torch.tensor([0.1, 0.5, 0.9]))
            >>> rbm.visible_mean(torch.zeros(2)).detach()
            tensor([0.1000, 0.5000, 0.9000])
        """
        if data_mean.shape != (self.visible,):
            raise ValueError(f"RBM.init_visible_bias: data_mean must be [{self.visible}], got {tuple(data_mean.shape)}")
        data_mean = data_mean.to(self.b)
        kept = data_mean.clamp(_SMALLEST_MEAN, 1 - _SMALLEST_MEAN)
        kind = self._visible_kind.kind
        self.b.copy_(data_mean if kind == GAUSSIAN else kept.log() if kind == SOFTMAX else kept.logit())
        if self.visible_offset is not None:
            self.visible_offset.copy_(data_mean)

    # ---- conditionals ------------------------------------------------------------------------------------------------

    def hidden_mean(self, v: Tensor) -> Tensor:
        """E[h | v], [..., H], for bernoulli units p(h = 1 | v); differentiable. ``v`` is [..., V]."""
        return mean(self._inputs(self._states("v", v, self.visible)), self._hidden_kind)

    def visible_mean(self, h: Tensor) -> Tensor:
        """E[v | h], [..., V], for bernoulli units p(v = 1 | h); differentiable. ``h`` is [..., H]."""
        return mean(self._states("h", h, self.hidden) @ self.W.T + self.b, self._visible_kind)

    @torch.no_grad()
    def sample_hidden(
        self, v: Tensor, *, seed: int | Tensor | None = None, step: int = 0, row_offset: int | None = None
    ) -> Tensor:
        """Draws h ~ p(h | v); a constant for autograd.

        Args:
            v: visible states [..., V]; leading dimensions are flattened to chains.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            step: the half-step, below 2^32. Each (seed, step) is one set of draws: use it once.
            row_offset: global index of the first chain; None: see the class.

        Returns:
            States [..., H] in W's dtype.

        """
        h = ops.rbm_half_step(
            v, self.W, self.c, to="hidden", units=self.hidden_units, logvar=self.logvar, precision=self.precision,
            seed=seed, chain_offset=first_chain(v, row_offset), step=step,
        )  # fmt: skip
        assert isinstance(h, Tensor)
        return h

    @torch.no_grad()
    def sample_visible(
        self, h: Tensor, *, seed: int | Tensor | None = None, step: int = 1, row_offset: int | None = None
    ) -> Tensor:
        """Draws v ~ p(v | h); as ``sample_hidden``."""
        v = ops.rbm_half_step(
            h, self.W, self.b, to="visible", units=self.visible_units, logvar=self.logvar, precision=self.precision,
            seed=seed, chain_offset=first_chain(h, row_offset), step=step,
        )  # fmt: skip
        assert isinstance(v, Tensor)
        return v

    @torch.no_grad()
    def gibbs(
        self,
        v: Tensor,
        k: int,
        *,
        seed: int | Tensor | None = None,
        step: int = 0,
        row_offset: int | None = None,
        beta: float | Tensor | None = None,
        clamp: Tensor | None = None,
    ) -> Tensor:
        """Runs k Gibbs steps v -> h -> v; a constant for autograd.

        Args:
            v: visible states [..., V] to start from.
            k: number of Gibbs steps, at least 0.
            seed: int or 0-d int64 tensor, one for the whole run; None draws it from torch's default generator.
            step: half-step to start from: a run of k steps uses ``step`` ... ``step + 2k - 1``, so it is continued with
                the same seed at ``step + 2k``.
            row_offset: global index of the first chain; None: see the class.
            beta: inverse temperature, a number or one a chain; None for 1.
            clamp: bool mask [V] or [..., V] of the visible units that keep the values of ``v``.

        Returns:
            Visible states [..., V] after k steps, in W's dtype.

        Raises:
            TypeError, ValueError: for a negative k, a wrong number of units, or half-steps that pass 2^32.

        Examples:
            >>> rbm, v = RBM(6, 4), torch.zeros(3, 6)
            >>> whole = rbm.gibbs(v, 5, seed=7)
            >>> torch.equal(whole, rbm.gibbs(rbm.gibbs(v, 2, seed=7), 3, seed=7, step=4))
            True
        """
        return ops.rbm_gibbs(
            v, self.W, self.b, self.c, k=k, seed=seed, beta=beta, clamp=clamp, logvar=self.logvar,
            visible=self.visible_units, hidden=self.hidden_units, precision=self.precision,
            chain_offset=first_chain(v, row_offset), step=step,
        ).visible  # fmt: skip

    def sample(self, n: int, k: int, *, seed: int | Tensor | None = None, row_offset: int | None = None) -> Tensor:
        """n fantasy particles from scratch: drawn from the visible biases alone, then k Gibbs steps.

        Args:
            n: number of chains, at least 0.
            k: number of Gibbs steps, at least 0.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            row_offset: global index of the first chain; None: see the class.

        Returns:
            Visible states [n, V] in W's dtype.

        Examples:
            >>> RBM(6, 4).sample(3, 10, seed=1).shape
            torch.Size([3, 6])
        """
        seed = random.as_seed(seed, self.W.device)
        start = self.sample_visible(self.W.new_zeros(n, self.hidden), seed=seed, row_offset=row_offset)
        return self.gibbs(start, k, seed=seed, step=2, row_offset=row_offset)

    # ---- measures ----------------------------------------------------------------------------------------------------

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v) = -log sum_h exp(-E(v, h)), in nats, so that p(v) ~ exp(-F(v)); differentiable.

        Args:
            v: visible states [..., V].

        Returns:
            [...], float32, or float64 where W is. For bernoulli units it grows only linearly in the weights: nothing
            overflows.

        Examples:
            >>> RBM(3, 5).free_energy(torch.zeros(2, 3)).detach()  # 2^5 hidden states of zero energy: -5 log 2
            tensor([-3.4657, -3.4657])
        """
        return ops.rbm_free_energy(
            v, self.W, self.b, self.c, logvar=self.logvar, visible=self.visible_units, hidden=self.hidden_units
        )

    def pseudo_likelihood(self, v: Tensor, units: int | None = None, *, seed: int | Tensor | None = None) -> Tensor:
        """Mean over rows of the log pseudo-likelihood sum_i log p(v_i | the other v), in nats.

        A unit i is one bernoulli unit, or one softmax unit of K categories. Exact over all units by default, at a cost
        of rows * V * H; with ``units`` it is the unbiased estimate from as many units a row, drawn with replacement.
        Differentiable; wrap it in ``torch.no_grad()`` to measure only, which keeps memory at about 50 MiB.

        Args:
            v: visible states [..., V], 0 and 1.
            units: number of random units a row, at least 1, or None for all.
            seed: of the random units: int or 0-d int64 tensor; None draws it from torch's default generator.

        Returns:
            A scalar, float32, or float64 where W is. At zero weights and biases it is -V log 2 for bernoulli units.

        Raises:
            ValueError: if v is empty or is no state of the units, units is below 1, or the visible units are Gaussian.

        Source: Besag, "Statistical analysis of non-lattice data", 1975.

        Examples:
            >>> rbm = RBM(3, 2)
            >>> _ = torch.nn.init.zeros_(rbm.W)
            >>> rbm.pseudo_likelihood(torch.ones(4, 3)).detach()  # -3 log 2
            tensor(-2.0794)
        """
        return pseudo_likelihood(
            self._states("v", v, self.visible),
            self.W,
            self.b,
            self.c,
            self._visible_kind,
            self._hidden_kind,
            units,
            seed,
        )

    def sparsity_penalty(self, v: Tensor, target: float, strength: float = 1.0) -> Tensor:
        """strength * sum_j KL(target || q_j), with q_j the mean over rows of p(h_j = 1 | v); add it to the loss.

        Where rows agree, its gradient to the input of hidden unit j is strength * (q_j - target). Under data
        parallelism q_j is the mean over one rank's rows.

        Args:
            v: visible states [..., V], at least one row.
            target: the mean that hidden units are to have, in (0, 1).
            strength: factor of the penalty.

        Returns:
            A scalar, at least 0, float32, or float64 where W is; differentiable to every order.

        Raises:
            ValueError: for other than bernoulli hidden units, or a target outside (0, 1).

        Source: Lee, Ekanadham and Ng, "Sparse deep belief net model for visual area V2", NIPS 2007; Hinton, "A
        practical guide to training restricted Boltzmann machines", 2010 (the cross-entropy form).

        Examples:
            >>> rbm = RBM(3, 2)
            >>> _ = torch.nn.init.zeros_(rbm.W)
            >>> rbm.sparsity_penalty(torch.ones(4, 3), 0.5).item()  # every unit is at 1/2
            0.0
        """
        if self._hidden_kind.kind != BERNOULLI:
            raise ValueError(f"RBM.sparsity_penalty: hidden_units must be bernoulli, got {self.hidden_units!r}")
        return sparsity_penalty(self._inputs(self._states("v", v, self.visible)), target, strength)

    # ---- training ----------------------------------------------------------------------------------------------------

    def contrastive_divergence(
        self,
        v: Tensor,
        k: int = 1,
        persistent: bool = False,
        *,
        fast_rate: float | None = None,
        fast_decay: float = 0.95,
        tempering: Sequence[float] | Tensor | None = None,
        seed: int | Tensor | None = None,
        row_offset: int | None = None,
    ) -> Tensor:
        """Mean F(v) - mean F(v_k), a loss whose ``backward`` gives the CD-k gradient; minimize it.

        v_k comes from k Gibbs steps that start at v (CD), or with ``persistent`` at the chains, which then move there
        (PCD; they start at the first batch, see ``start_chains``). Chains mix better

        - with ``fast_rate``: they follow the model plus fast weights, which learn from the same gradients at this rate
          and decay by ``fast_decay`` a call (FPCD);
        - with ``tempering``: each of them is a replica at several temperatures, which swap states.

        The gradients are computed with the value, in ``ops.rbm_cd``; with ``centered`` they are the centered ones. The
        value is no likelihood and need not fall; follow ``pseudo_likelihood``.

        Args:
            v: visible states [B, V], a constant: it gets no gradient.
            k: number of Gibbs steps, at least 1; for PCD also 0, which leaves the chains where they are.
            persistent: continue the chains of the last call.
            fast_rate: learning rate of the fast weights.
            fast_decay: factor of the fast weights at each call.
            tempering: inverse temperatures that increase to 1, as ``betas`` of ``ops.rbm_tempering``.
            seed: of this call's noise (CD), or of the chains' when they start here (PCD): int or 0-d int64 tensor; None
                draws it from torch's default generator.
            row_offset: global index of the first chain; None: see the class.

        Returns:
            A scalar, float32, or float64 where W is.

        Raises:
            RuntimeError: if v requires a gradient, and for derivatives of the loss past the first backward.
            TypeError, ValueError: for a wrong k or number of units, a seed where chains are already running, options
                that do not go together, and (on the CPU) NaN or infinity.

        Source: Tieleman, ICML 2008 (PCD); Tieleman and Hinton, "Using fast weights to improve persistent contrastive
        divergence", ICML 2009; Desjardins et al., "Tempered Markov chain Monte Carlo for training of restricted
        Boltzmann machines", AISTATS 2010.

        Examples:
            >>> rbm, v = RBM(6, 4), torch.ones(8, 6)
            >>> loss = rbm.contrastive_divergence(v, k=1, persistent=True, tempering=[0.0, 0.5, 1.0])
            >>> loss.backward()
            >>> rbm.chains.shape
            torch.Size([8, 3, 6])
        """
        name = "RBM.contrastive_divergence"
        if isinstance(v, Tensor) and v.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name}: v requires a gradient, but gets none; pass v.detach(), or use free_energy")
        if not persistent and (fast_rate is not None or tempering is not None):
            raise ValueError(f"{name}: fast_rate and tempering move persistent chains; pass persistent=True")
        logvar, variance = self.logvar, None
        with torch.no_grad():
            if persistent:
                result = persistent_gradients(self, v, k, fast_rate, fast_decay, tempering, seed, row_offset)
            else:
                result = self._gradients(v, None, k, seed, first_chain(v, row_offset), 0)
            if logvar is not None:
                variance = variance_gradient(v, result.chains, self.W, self.b, self.c, logvar, self._hidden_kind)
            if self.visible_offset is not None and self.training:
                move_offsets(self, v, result.hidden_mean)
        return gap_loss(
            result.free_energy_gap, self.W, self.b, self.c, logvar, result.dW, result.db, result.dc, variance
        )

    forward = contrastive_divergence

    def start_chains(self, v: Tensor, *, seed: int | Tensor | None = None) -> None:
        """(Re)starts the persistent chains at ``v`` under a new noise seed, and forgets fast weights.

        Args:
            v: visible states [N, V]; [N, T, V] for one state a temperature.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.

        Raises:
            TypeError, ValueError: for other than visible states of at least one chain.
        """
        v = self._states("v", v, self.visible)
        if v.dim() not in (2, 3) or v.numel() == 0:
            raise ValueError(f"RBM.start_chains: v must be [N, V] or [N, T, V], not empty, got {tuple(v.shape)}")
        self.chains = v.detach().clone()
        self.chain_seed = int(random.as_seed(seed, v.device))
        self.chain_step = 0
        self.fast_W = self.fast_b = self.fast_c = None

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _states(self, name: str, value: Any, units: int) -> Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(f"RBM: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.dim() == 0 or value.shape[-1] != units:
            raise ValueError(f"RBM: {name} must be [..., {units}], got {tuple(value.shape)}")
        return value.to(self.W.dtype)

    def _inputs(self, v: Tensor) -> Tensor:
        """Inputs of the hidden units, [..., H]."""
        return (v if self.logvar is None else v * torch.exp(-self.logvar)) @ self.W + self.c

    def _gradients(
        self, v: Tensor, chains: Tensor | None, k: int, seed: int | Tensor | None, first_chain: int, step: int
    ) -> ops.RBMGradients:
        return ops.rbm_cd(
            v, self.W, self.b, self.c, k=k, chains=chains, precision=self.precision, visible=self.visible_units,
            hidden=self.hidden_units, logvar=self.logvar, visible_offset=self.visible_offset,
            hidden_offset=self.hidden_offset, seed=seed, chain_offset=first_chain, step=step,
        )  # fmt: skip

    def get_extra_state(self) -> Tensor:
        """Seed and half-step of the persistent chains, int64 [2]."""
        return torch.tensor([self.chain_seed, self.chain_step], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """What ``get_extra_state`` returned."""
        self.chain_seed, self.chain_step = (int(value) for value in state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "chains")
        if isinstance(saved, Tensor) and saved.dim() in (2, 3) and saved.shape[-1] == self.visible:
            self.chains = self.chains.new_empty(saved.shape)  # any number of chains may have been running
        for name, like in (("fast_W", self.W), ("fast_b", self.b), ("fast_c", self.c)):
            setattr(self, name, torch.empty_like(like) if prefix + name in state_dict else None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        options = f"visible_units={self.visible_units!r}, hidden_units={self.hidden_units!r}"
        flags = f"learn_variance={self.logvar is not None}, centered={self.visible_offset is not None}"
        return f"{self.visible}, {self.hidden}, {options}, {flags}, precision={self.precision!r}"
