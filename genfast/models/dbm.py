"""Deep Boltzmann machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genfast import ops, random
from genfast._checks import shape_of, wide
from genfast.nn._rbm_chains import first_chain
from genfast.ops._rbm_common import HALF_STEPS, checked_precision

__all__ = ["DBM", "MeanField"]


class MeanField(NamedTuple):
    """What ``DBM.mean_field`` returns: means [B, H_l] of the hidden layers, from below, and how many passes it took."""

    means: list[Tensor]
    iterations: int


class DBM(nn.Module):
    """A deep Boltzmann machine: p(s_0, ..., s_L) ~ exp(sum_l s_l'b_l + sum_l s_l'W_l s_(l+1)), with s_0 = v, s_l = h_l.

    All units are Bernoulli units and all connections go both ways. Given the odd layers the even ones are independent
    and the reverse, so it is an RBM between the two sets, whose sampler, free energy and log Z serve here (``as_rbm``).

    The loss takes the data's statistics from a mean-field posterior and the model's from persistent chains.

    Args:
        visible: number of visible units V.
        hidden: numbers of units of the hidden layers, from below, at least two.
        precision: of the products that sample, see ``ops.rbm_half_step``.
        device: where the parameters live.
        dtype: their dtype.

    Attributes:
        weights: [V, H_1], [H_1, H_2], ..., initialized to N(0, 0.01^2).
        biases: [V], [H_1], ..., zeros.
        chains: states [N, V + H_2 + H_4 + ...] of the even layers of the persistent chains, a buffer, empty until they
            start. Their seed and half-step are in the ``state_dict`` too.

    Raises:
        TypeError, ValueError: for fewer than two hidden layers, or sizes below 1.

    Source: Salakhutdinov and Hinton, "Deep Boltzmann machines", AISTATS 2009.

    Examples:
        >>> dbm, v = DBM(6, [5, 4]), torch.ones(8, 6)
        >>> optimizer = torch.optim.SGD(dbm.parameters(), lr=0.05)
        >>> dbm.loss(v, k=2).backward()
        >>> optimizer.step()
        >>> dbm.transform(v).shape, dbm.sample(3, 10, seed=1).shape
        (torch.Size([8, 4]), torch.Size([3, 6]))
    """

    chains: Tensor

    def __init__(
        self,
        visible: int,
        hidden: Sequence[int],
        *,
        precision: str = "fp32",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.sizes = (visible, *hidden)
        if len(self.sizes) < 3 or min(self.sizes) < 1:
            raise ValueError(
                f"DBM: visible must be at least 1 and hidden name two layers or more, got {visible} and {list(hidden)}"
            )
        self.precision = checked_precision("DBM", precision)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        pairs = zip(self.sizes, self.sizes[1:], strict=False)
        self.weights = nn.ParameterList(torch.empty(below, above, **where) for below, above in pairs)
        self.biases = nn.ParameterList(torch.empty(size, **where) for size in self.sizes)
        self.register_buffer("chains", torch.empty(0, sum(self.sizes[::2]), **where))
        self.chain_seed = self.chain_step = 0
        self._ddp_params_and_buffers_to_ignore = ["chains"]  # each rank keeps its own
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights, zeroes the biases, forgets the chains."""
        for weight in self.weights:
            nn.init.normal_(weight, std=0.01)
        for bias in self.biases:
            nn.init.zeros_(bias)
        self.chains = self.chains.new_empty(0, sum(self.sizes[::2]))

    def as_rbm(self) -> tuple[Tensor, Tensor, Tensor]:
        """(W, b, c) of the equal RBM: its visible units are the even layers, v first, its hidden ones the odd layers.

        Differentiable. ``ops.rbm_ais(*dbm.as_rbm())`` estimates log Z, for instance.
        """
        rows = []
        for even in range(0, len(self.sizes), 2):
            blocks = []
            for odd in range(1, len(self.sizes), 2):
                if odd == even + 1:
                    blocks.append(self.weights[even])
                elif odd == even - 1:
                    blocks.append(self.weights[odd].T)
                else:
                    blocks.append(self.biases[0].new_zeros(self.sizes[even], self.sizes[odd]))
            rows.append(torch.cat(blocks, 1))
        biases = list(self.biases)
        return torch.cat(rows), torch.cat(biases[::2]), torch.cat(biases[1::2])

    # ---- inference ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def mean_field(self, v: Tensor, tolerance: float = 1e-4, max_iterations: int = 100) -> MeanField:
        """The factorized posterior q(h) of v that a fixed-point iteration finds; constants for autograd.

        It starts with a pass up with doubled weights, then sets the even hidden layers and the odd ones in turn, each
        to its best value given the others: the bound of ``lower_bound`` never falls.

        Args:
            v: visible states [B, V].
            tolerance: stop where no mean changes by more.
            max_iterations: stop after so many passes at the latest.

        Returns:
            ``MeanField(means, iterations)``.

        Raises:
            TypeError, ValueError: for states of another shape, or max_iterations below 1.
        """
        if max_iterations < 1:
            raise ValueError(f"DBM.mean_field: max_iterations must be at least 1, got {max_iterations}")
        states = [self._visible(v)]
        top = len(self.weights)
        for layer in range(1, top + 1):  # what comes from above is taken to be as much as what comes from below
            inputs = states[layer - 1] @ self.weights[layer - 1]
            states.append(torch.sigmoid((inputs if layer == top else 2 * inputs) + self.biases[layer]))
        for iteration in range(1, max_iterations + 1):
            change = torch.zeros((), dtype=states[0].dtype, device=states[0].device)
            for parity in (0, 1):
                for layer in range(2 - parity, top + 1, 2):
                    value = torch.sigmoid(self._inputs(states, layer))
                    if value.numel():
                        change = torch.maximum(change, (value - states[layer]).abs().max())
                    states[layer] = value
            if float(change) <= tolerance:
                return MeanField(states[1:], iteration)
        return MeanField(states[1:], max_iterations)

    def transform(self, v: Tensor, tolerance: float = 1e-4, max_iterations: int = 100) -> Tensor:
        """Means of the highest layer, [B, H_L]; see ``mean_field``."""
        return self.mean_field(v, tolerance, max_iterations).means[-1]

    def energy(self, states: Sequence[Tensor]) -> Tensor:
        """E of states, or the mean E of means, [B]: of v [B, V] and all hidden layers [B, H_l]; differentiable."""
        if len(states) != len(self.sizes) or any(
            state.dim() != 2 or state.shape[1] != size for state, size in zip(states, self.sizes, strict=False)
        ):
            raise ValueError(
                f"DBM.energy: states must be {len(self.sizes)} tensors [B, n] with n = {self.sizes}, got "
                f"{[shape_of(state) for state in states]}"
            )
        dtype = wide(self.biases[0].dtype)
        x = [state.to(dtype) for state in states]
        total = -sum(state @ bias.to(dtype) for state, bias in zip(x, self.biases, strict=True))
        for below, weight, above in zip(x, self.weights, x[1:], strict=False):
            total = total - ((below @ weight.to(dtype)) * above).sum(1)
        return total

    def lower_bound(
        self, v: Tensor, log_z: float | Tensor, tolerance: float = 1e-4, max_iterations: int = 100
    ) -> Tensor:
        """E_q[-E(v, h)] + H(q) - log Z, [B], nats: at most log p(v), with q of ``mean_field``.

        Args:
            v: visible states [B, V].
            log_z: log of the partition function: ``log_z_exact()``, or an estimate of it.
            tolerance: of ``mean_field``.
            max_iterations: of ``mean_field``.

        Examples:
            >>> dbm = DBM(3, [2, 2])
            >>> v = torch.tensor([[0.0, 1.0, 1.0]])
            >>> bool(dbm.lower_bound(v, dbm.log_z_exact()) < 0)
            True
        """
        means = self.mean_field(v, tolerance, max_iterations).means
        entropy = sum(torch.special.entr(q).sum(1) + torch.special.entr(1 - q).sum(1) for q in means)
        return entropy - self.energy([self._visible(v), *means]) - log_z

    def log_z_exact(self) -> Tensor:
        """log of the partition function, by enumeration of the even or the odd layers; see ``ops.rbm_log_z_exact``."""
        return ops.rbm_log_z_exact(*self.as_rbm())

    # ---- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def gibbs(
        self,
        states: Tensor,
        k: int,
        *,
        seed: int | Tensor | None = None,
        step: int = 0,
        row_offset: int | None = None,
        clamp_visible: bool = False,
    ) -> Tensor:
        """Runs k Gibbs steps: all odd layers given the even ones, then all even layers; a constant for autograd.

        Args:
            states: of the even layers, [N, V + H_2 + H_4 + ...].
            k: number of steps, at least 0.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            step: half-step to start from; k steps take 2k.
            row_offset: global index of the first row; None: see ``genfast.nn.RBM``.
            clamp_visible: keep v, to draw from the posterior.

        Returns:
            States of the even layers, [N, V + H_2 + H_4 + ...].
        """
        clamp = None
        if clamp_visible:
            clamp = torch.arange(sum(self.sizes[::2]), device=self.biases[0].device) < self.sizes[0]
        return ops.rbm_gibbs(
            states, *self.as_rbm(), k=k, seed=seed, step=step, clamp=clamp, precision=self.precision,
            chain_offset=first_chain(states, row_offset),
        ).visible  # fmt: skip

    def sample(self, n: int, k: int, *, seed: int | Tensor | None = None, row_offset: int | None = None) -> Tensor:
        """Draws v: k Gibbs steps from fair coins. [n, V]; the draws are the model's in the limit of many steps.

        Args:
            n: number of rows.
            k: number of steps, at least 0.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            row_offset: global index of the first row; None: see ``genfast.nn.RBM``.
        """
        seed = random.as_seed(seed, self.biases[0].device)
        start = self._coins(n, seed, row_offset)
        return self.gibbs(start, k, seed=seed, step=1, row_offset=row_offset)[:, : self.sizes[0]]

    # ---- training ----------------------------------------------------------------------------------------------------

    def loss(
        self,
        v: Tensor,
        k: int = 5,
        *,
        tolerance: float = 1e-4,
        max_iterations: int = 100,
        row_offset: int | None = None,
    ) -> Tensor:
        """Mean energy of v and its posterior's means, minus the mean free energy of the chains; minimize it.

        The gradient is that of the variational bound, with an estimate of log Z's by the persistent chains, which take
        k Gibbs steps in each call. They start at the first call, as many as v has rows, or by ``start_chains``. The
        value is no likelihood.

        Args:
            v: visible states [B, V], a constant.
            k: number of Gibbs steps, at least 0.
            tolerance: of ``mean_field``.
            max_iterations: of ``mean_field``.
            row_offset: global index of the first chain; None: see ``genfast.nn.RBM``.

        Returns:
            A scalar, float32, or float64 where the weights are.

        Raises:
            TypeError, ValueError: for states of another shape, a negative k, and (on the CPU) NaN or infinity.
        """
        v = self._visible(v).detach()
        if len(v) == 0:
            raise ValueError("DBM.loss: v must have at least one row")
        if len(self.chains) == 0:
            self.start_chains(len(v), row_offset=row_offset)
        if self.chain_step + 2 * k > HALF_STEPS:  # never the same counter twice: go on under the next seed
            self.chain_seed, self.chain_step = (self.chain_seed + 1) % 2**63, 0
        means = self.mean_field(v, tolerance, max_iterations).means
        self.chains = self.gibbs(self.chains, k, seed=self.chain_seed, step=self.chain_step, row_offset=row_offset)
        self.chain_step += 2 * k
        return self.energy([v, *means]).mean() - ops.rbm_free_energy(self.chains, *self.as_rbm()).mean()

    forward = loss

    def start_chains(self, n: int, *, seed: int | Tensor | None = None, row_offset: int | None = None) -> None:
        """(Re)starts n persistent chains at fair coins.

        Args:
            n: number of chains, at least 1.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            row_offset: global index of the first chain; None: see ``genfast.nn.RBM``.
        """
        if n < 1:
            raise ValueError(f"DBM.start_chains: n must be at least 1, got {n}")
        seed = random.as_seed(seed, self.biases[0].device)
        self.chains = self._coins(n, seed, row_offset)
        self.chain_seed, self.chain_step = int(seed), 1

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _coins(self, n: int, seed: Tensor, row_offset: int | None) -> Tensor:
        """Even layers at half-step 0."""
        zeros = self.biases[0].new_zeros(n, sum(self.sizes[::2]))
        coins = ops.bernoulli_sample(zeros, seed=seed, row_offset=first_chain(zeros, row_offset))
        assert isinstance(coins, Tensor)
        return coins

    def _inputs(self, states: list[Tensor], layer: int) -> Tensor:
        inputs = states[layer - 1] @ self.weights[layer - 1] + self.biases[layer]
        if layer < len(self.weights):
            inputs = inputs + states[layer + 1] @ self.weights[layer].T
        return inputs

    def _visible(self, v: Any) -> Tensor:
        if not isinstance(v, Tensor):
            raise TypeError(f"DBM: v must be a torch.Tensor, got {type(v).__name__}")
        if v.dim() != 2 or v.shape[1] != self.sizes[0]:
            raise ValueError(f"DBM: v must be [B, {self.sizes[0]}], got {shape_of(v)}")
        return v.to(self.biases[0].dtype)

    def get_extra_state(self) -> Tensor:
        """Seed and half-step of the persistent chains, int64 [2]."""
        return torch.tensor([self.chain_seed, self.chain_step], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """What ``get_extra_state`` returned."""
        self.chain_seed, self.chain_step = (int(value) for value in state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "chains")
        if isinstance(saved, Tensor) and saved.dim() == 2 and saved.shape[1] == sum(self.sizes[::2]):
            self.chains = self.chains.new_empty(saved.shape)  # any number of chains may have been running
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.sizes[0]}, {list(self.sizes[1:])}, precision={self.precision!r}"
