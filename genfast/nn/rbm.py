"""Restricted Boltzmann machines."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from genfast import ops, random
from genfast.nn._shard import shard_start

__all__ = ["RBM"]

_HALF_STEPS = 2**32  # the noise's step counter has 32 bits
_CHUNK_ELEMENTS = 2**22  # of pseudo_likelihood's [rows, units, hidden] intermediate


class RBM(nn.Module):
    """A restricted Boltzmann machine with binary visible and hidden units: p(v, h) ~ exp(v'b + h'c + v'W h).

    Every random number is a pure function of (seed, Gibbs half-step, global chain index, unit): hidden units of Gibbs
    step t take half-step 2t, visible ones 2t + 1. Chains that are split over calls or processes, with ``row_offset``
    for the index of the first one, draw the same noise as together. Their states then agree wherever the matrix product
    gives a row the same bits whatever the number of rows, which BLAS libraries do not promise: a unit whose probability
    is within rounding (about 1e-7) of its uniform can differ.

    Inside an initialized ``torch.distributed`` process group ``row_offset=None`` means rank * rows, elsewhere 0. Ranks
    need one seed in common: pass ``seed`` or call ``torch.manual_seed`` alike on all of them. ``forward`` is
    ``contrastive_divergence``, so ``DistributedDataParallel(rbm)(v, persistent=True).backward()`` trains on all ranks;
    each rank keeps (and saves) its own chains.

    Args:
        visible: number of visible units V.
        hidden: number of hidden units H.
        device: where the parameters live.
        dtype: their dtype.

    Attributes:
        W: weights [V, H], initialized to N(0, 0.01^2).
        b: visible bias [V], zeros.
        c: hidden bias [H], zeros.
        chains: the states [N, V] of persistent chains, a buffer; empty until they start. The ``state_dict`` also
            holds their seed and half-step, as ``_extra_state``, so a resumed run continues bit for bit.

    Raises:
        ValueError: for fewer than one visible or hidden unit.

    Source: Hinton, "Training products of experts by minimizing contrastive divergence", 2002; Tieleman, "Training
    restricted Boltzmann machines using approximations to the likelihood gradient", ICML 2008; Hinton, "A practical
    guide to training restricted Boltzmann machines", 2010 (initialization).

    Examples:
        >>> rbm = RBM(6, 4)
        >>> optimizer = torch.optim.SGD(rbm.parameters(), lr=0.1)
        >>> rbm.contrastive_divergence(torch.ones(8, 6), k=1).backward()
        >>> optimizer.step()
        >>> rbm.b.detach().min() > 0
        tensor(True)
    """

    chains: Tensor

    def __init__(
        self,
        visible: int,
        hidden: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if visible < 1 or hidden < 1:
            raise ValueError(f"RBM: visible and hidden must be at least 1, got {visible} and {hidden}")
        self.visible, self.hidden = visible, hidden
        self.W = nn.Parameter(torch.empty(visible, hidden, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(visible, device=device, dtype=dtype))
        self.c = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype))
        self.register_buffer("chains", torch.empty(0, visible, device=device, dtype=dtype))
        self.chain_seed = 0
        self.chain_step = 0
        self._ddp_params_and_buffers_to_ignore = ["chains"]  # DistributedDataParallel must not copy rank 0's over
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights, zeroes the biases and forgets the persistent chains."""
        nn.init.normal_(self.W, std=0.01)
        nn.init.zeros_(self.b)
        nn.init.zeros_(self.c)
        self.chains = self.chains.new_empty(0, self.visible)

    # ---- conditionals ------------------------------------------------------------------------------------------------

    def hidden_prob(self, v: Tensor) -> Tensor:
        """p(h = 1 | v), [..., H]; differentiable. ``v`` is [..., V] in [0, 1]."""
        return torch.sigmoid(self._states("v", v, self.visible) @ self.W + self.c)

    def visible_prob(self, h: Tensor) -> Tensor:
        """p(v = 1 | h), [..., V]; differentiable. ``h`` is [..., H] in [0, 1]."""
        return torch.sigmoid(self._states("h", h, self.hidden) @ self.W.T + self.b)

    @torch.no_grad()
    def sample_hidden(
        self, v: Tensor, *, seed: int | Tensor | None = None, step: int = 0, row_offset: int | None = None
    ) -> Tensor:
        """Draws h ~ p(h | v); a constant for autograd.

        Args:
            v: visible states [..., V], in [0, 1]; leading dimensions are flattened to chains.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            step: the half-step, below 2^32. Each (seed, step) is one set of draws: use it once.
            row_offset: global index of the first chain; None: see the class.

        Returns:
            0/1 states [..., H] in W's dtype.
        """
        v = self._states("v", v, self.visible)
        return self._sample(v @ self.W, self.c, seed, step, _row_offset(v, row_offset))

    @torch.no_grad()
    def sample_visible(
        self, h: Tensor, *, seed: int | Tensor | None = None, step: int = 1, row_offset: int | None = None
    ) -> Tensor:
        """Draws v ~ p(v | h); as ``sample_hidden``."""
        h = self._states("h", h, self.hidden)
        return self._sample(h @ self.W.T, self.b, seed, step, _row_offset(h, row_offset))

    @torch.no_grad()
    def gibbs(
        self,
        v: Tensor,
        k: int,
        *,
        seed: int | Tensor | None = None,
        step: int = 0,
        row_offset: int | None = None,
    ) -> Tensor:
        """Runs k Gibbs steps v -> h -> v; a constant for autograd.

        Args:
            v: visible states [..., V] to start from, in [0, 1].
            k: number of Gibbs steps, at least 0.
            seed: int or 0-d int64 tensor, one for the whole run; None draws it from torch's default generator.
            step: half-step to start from: a run of k steps uses ``step`` ... ``step + 2k - 1``, so it is continued with
                the same seed at ``step + 2k``.
            row_offset: global index of the first chain; None: see the class.

        Returns:
            Visible states [..., V] after k steps, in W's dtype.

        Raises:
            ValueError: for a negative k, a wrong number of units, or half-steps that pass 2^32.

        Examples:
            >>> rbm, v = RBM(6, 4), torch.zeros(3, 6)
            >>> whole = rbm.gibbs(v, 5, seed=7)
            >>> torch.equal(whole, rbm.gibbs(rbm.gibbs(v, 2, seed=7), 3, seed=7, step=4))
            True
        """
        v = self._states("v", v, self.visible)
        return self._gibbs(v, None, k, random.as_seed(seed, v.device), step, _row_offset(v, row_offset))

    # ---- measures ----------------------------------------------------------------------------------------------------

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v) = -v'b - sum_j softplus((v W + c)_j), in nats, so that p(v) ~ exp(-F(v)); differentiable.

        Args:
            v: visible states [..., V].

        Returns:
            [...], float32, or float64 where W is. It grows only linearly in the weights: nothing overflows.

        Examples:
            >>> RBM(3, 5).free_energy(torch.zeros(2, 3)).detach()  # 2^5 hidden states of zero energy: -5 log 2
            tensor([-3.4657, -3.4657])
        """
        v = self._states("v", v, self.visible)
        return self._free_energy(v, v @ self.W)

    def pseudo_likelihood(self, v: Tensor, units: int | None = None, *, seed: int | Tensor | None = None) -> Tensor:
        """Mean over rows of the log pseudo-likelihood sum_i log p(v_i | the other v), in nats.

        Exact over all units by default, at a cost of rows * V * H; with ``units`` it is the unbiased estimate from as
        many units a row, drawn with replacement. Differentiable; wrap it in ``torch.no_grad()`` to measure only, which
        keeps memory at about 50 MiB.

        Args:
            v: binary visible states [..., V].
            units: number of random units a row, at least 1, or None for all.
            seed: of the random units: int or 0-d int64 tensor; None draws it from torch's default generator.

        Returns:
            A scalar, float32, or float64 where W is. At zero weights and biases it is -V log 2.

        Raises:
            ValueError: if v is empty or holds something else than 0 and 1, or units is below 1.

        Source: Besag, "Statistical analysis of non-lattice data", 1975.

        Examples:
            >>> rbm = RBM(3, 2)
            >>> _ = torch.nn.init.zeros_(rbm.W)
            >>> round(rbm.pseudo_likelihood(torch.ones(4, 3)).item() / math.log(2), 5)
            -3.0
        """
        v = self._states("v", v, self.visible).reshape(-1, self.visible)
        if v.shape[0] == 0 or not bool(((v == 0) | (v == 1)).all()):
            raise ValueError("RBM.pseudo_likelihood: v must be binary with at least one row; round or sample it first")
        if units is None:
            drawn, scale = None, 1.0
        elif units < 1:
            raise ValueError(f"RBM.pseudo_likelihood: units must be at least 1, got {units}")
        else:
            uniforms = random.uniform(v.shape[0] * units, random.as_seed(seed, v.device).to(v.device))
            drawn = (uniforms * self.visible).long().view(-1, units).clamp(max=self.visible - 1)
            scale = self.visible / units
        count = self.visible if units is None else units
        rows = max(1, _CHUNK_ELEMENTS // (self.hidden * count))
        columns = max(1, _CHUNK_ELEMENTS // (self.hidden * min(rows, v.shape[0])))
        total = torch.zeros((), device=v.device, dtype=_wide(v.dtype))
        for first_row in range(0, v.shape[0], rows):
            part = v[first_row : first_row + rows]
            logits = part @ self.W + self.c
            for first in range(0, count, columns):
                chosen: Any = slice(first, first + columns)
                if drawn is not None:
                    chosen = drawn[first_row : first_row + rows, chosen]
                total = total + self._log_conditional(part, logits, chosen).sum()
        return total * (scale / v.shape[0])

    # ---- training ----------------------------------------------------------------------------------------------------

    def contrastive_divergence(
        self,
        v: Tensor,
        k: int = 1,
        persistent: bool = False,
        *,
        seed: int | Tensor | None = None,
        row_offset: int | None = None,
    ) -> Tensor:
        """Mean F(v) - mean F(v_k), whose gradient is the CD-k (or PCD-k) gradient exactly; minimize it.

        v_k comes from k Gibbs steps that start at v (CD), or at the persistent chains, which then move there (PCD; they
        start at the first batch, see ``start_chains``), and is a constant for autograd. The value is no likelihood and
        need not fall; follow ``pseudo_likelihood``.

        Args:
            v: visible states [B, V], in [0, 1].
            k: number of Gibbs steps, at least 1.
            persistent: continue the chains of the last call.
            seed: of this call's noise (CD), or of the chains' when they start here (PCD): int or 0-d int64 tensor; None
                draws it from torch's default generator.
            row_offset: global index of the first chain; None: see the class.

        Returns:
            A scalar, float32, or float64 where W is.

        Raises:
            ValueError: for a k below 1, a wrong number of units, or a seed where chains are already running.
        """
        v = self._states("v", v, self.visible)
        if v.dim() != 2 or v.shape[0] == 0:
            raise ValueError(f"RBM.contrastive_divergence: v must be [B, V], at least one row, got {tuple(v.shape)}")
        if k < 1:
            raise ValueError(f"RBM.contrastive_divergence: k must be at least 1, got {k}")
        logits = v @ self.W
        if persistent:
            if len(self.chains) == 0:
                self.start_chains(v, seed=seed)
            elif seed is not None:
                raise ValueError(
                    "RBM.contrastive_divergence: the chains have a seed already; start_chains sets another"
                )
            model_v = self._advance_chains(k, row_offset)
        else:
            offset = _row_offset(v, row_offset)
            with torch.no_grad():  # the first half-step reuses the product of the free energy
                model_v = self._gibbs(v, logits.detach(), k, random.as_seed(seed, v.device), 0, offset)
        return self._free_energy(v, logits).mean() - self.free_energy(model_v).mean()

    forward = contrastive_divergence

    def start_chains(self, v: Tensor, *, seed: int | Tensor | None = None) -> None:
        """(Re)starts the persistent chains at ``v`` [N, V], under a new noise seed."""
        v = self._states("v", v, self.visible)
        if v.dim() != 2 or v.shape[0] == 0:
            raise ValueError(f"RBM.start_chains: v must be [N, V] with at least one row, got {tuple(v.shape)}")
        self.chains = v.detach().clone()
        self.chain_seed = int(random.as_seed(seed, v.device))
        self.chain_step = 0

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _states(self, name: str, value: Any, units: int) -> Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(f"RBM: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.dim() == 0 or value.shape[-1] != units:
            raise ValueError(f"RBM: {name} must be [..., {units}], got {tuple(value.shape)}")
        return value.to(self.W.dtype)

    @staticmethod
    def _sample(logits: Tensor, bias: Tensor, seed: int | Tensor | None, step: int, row_offset: int) -> Tensor:
        sample = ops.bernoulli_sample(logits, bias, seed=seed, step=step, row_offset=row_offset, out_dtype=bias.dtype)
        assert isinstance(sample, Tensor)
        return sample

    def _gibbs(self, v: Tensor, logits: Tensor | None, k: int, seed: Tensor, step: int, row_offset: int) -> Tensor:
        """k Gibbs steps; ``logits`` is v @ W where the caller has it."""
        if k < 0 or step < 0 or step + 2 * k > _HALF_STEPS:
            raise ValueError(f"RBM.gibbs: k and step must be at least 0 with step + 2k <= 2^32, got k={k}, step={step}")
        for half_step in range(step, step + 2 * k, 2):
            logits = v @ self.W if logits is None else logits
            h = self._sample(logits, self.c, seed, half_step, row_offset)
            v = self._sample(h @ self.W.T, self.b, seed, half_step + 1, row_offset)
            logits = None
        return v

    # The step counter changes every time: compiled, this would be compiled again every time. torch.compiler.disable
    # would import torch._dynamo, over a second, with genfast; this one waits until somebody compiles.
    @torch._disable_dynamo
    @torch.no_grad()
    def _advance_chains(self, k: int, row_offset: int | None) -> Tensor:
        if self.chain_step + 2 * k > _HALF_STEPS:  # never the same counter twice: go on under the next seed
            self.chain_seed, self.chain_step = (self.chain_seed + 1) % 2**63, 0
        seed = random.as_seed(self.chain_seed, self.chains.device)
        offset = _row_offset(self.chains, row_offset)
        self.chains = self._gibbs(self.chains, None, k, seed, self.chain_step, offset)
        self.chain_step += 2 * k
        return self.chains

    def _free_energy(self, v: Tensor, logits: Tensor) -> Tensor:
        wide = _wide(v.dtype)
        softplus = _softplus(logits.to(wide) + self.c.to(wide)).sum(-1)
        return -(v.to(wide) @ self.b.to(wide)) - softplus

    def _log_conditional(self, v: Tensor, logits: Tensor, units: Any) -> Tensor:
        """log p(v_i | the other v) for a slice of the units, or for the units [rows, n] of each row."""
        wide = _wide(v.dtype)
        change = 1 - 2 * (v[:, units] if isinstance(units, slice) else v.gather(1, units))  # what a flip adds
        flipped = logits.unsqueeze(1) + change.unsqueeze(2) * self.W[units]  # [rows, n, H]
        before, after = _softplus(logits.to(wide)).sum(-1, keepdim=True), _softplus(flipped.to(wide)).sum(-1)
        return functional.logsigmoid(before - after - change * self.b[units])

    def get_extra_state(self) -> Tensor:
        """Seed and half-step of the persistent chains, int64 [2]."""
        return torch.tensor([self.chain_seed, self.chain_step], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """What ``get_extra_state`` returned."""
        self.chain_seed, self.chain_step = (int(value) for value in state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "chains")
        if isinstance(saved, Tensor) and saved.dim() == 2 and saved.shape[1] == self.visible:
            self.chains = self.chains.new_empty(saved.shape)  # any number of chains may have been running
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.visible}, {self.hidden}"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _softplus(x: Tensor) -> Tensor:
    return functional.softplus(x, threshold=50.0)  # the default threshold, 20, is only right to 2e-9


def _row_offset(states: Tensor, row_offset: int | None) -> int:
    return shard_start(math.prod(states.shape[:-1])) if row_offset is None else row_offset
