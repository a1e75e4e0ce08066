"""Restricted Boltzmann machines over the ratings that users gave items, most of which are missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genfast import ops, random
from genfast._checks import shape_of
from genfast.nn._rbm_chains import first_chain
from genfast.nn._rbm_loss import gap_loss
from genfast.ops._rbm_common import HALF_STEPS, checked_precision
from genfast.ops._rbm_units import softplus

__all__ = ["CollaborativeRBM", "RatingTable"]

_CHUNK_ELEMENTS = 2**22  # of the [rows, items, ratings, hidden] intermediate of exact predictions


class RatingTable:
    """Ratings by user, built from (user, item, rating) triples; a batch of users comes out as a dense matrix.

    Holds five bytes a rating and eight a user, on the CPU.

    Args:
        users: user of each rating, integers [R] from 0 on, in any order.
        items: its item, integers [R] from 0 on.
        ratings: its value, integers [R] from 1 to 255.
        shape: (users, items) of the table; None: one more than the highest of each.

    Raises:
        TypeError: for other than integers.
        ValueError: for different lengths, numbers out of range, or two ratings of one item by one user.

    Examples:
        >>> table = RatingTable([0, 2, 0], [1, 0, 3], [5, 1, 2])
        >>> table[[0, 2]]
        tensor([[0, 5, 0, 2],
                [1, 0, 0, 0]], dtype=torch.uint8)
        >>> len(table), table.shape
        (3, (3, 4))
    """

    def __init__(
        self,
        users: Tensor | Sequence[int],
        items: Tensor | Sequence[int],
        ratings: Tensor | Sequence[int],
        shape: tuple[int, int] | None = None,
    ) -> None:
        columns = []
        for name, values in (("users", users), ("items", items), ("ratings", ratings)):
            column = torch.as_tensor(values).cpu()
            if column.numel() and (column.is_floating_point() or column.is_complex() or column.dtype == torch.bool):
                raise TypeError(f"RatingTable: {name} must be integers, got {column.dtype}")
            columns.append(column.long())
        user, item, rating = columns
        if user.dim() != 1 or user.shape != item.shape or user.shape != rating.shape:
            shapes = ", ".join(shape_of(column) for column in columns)
            raise ValueError(f"RatingTable: users, items and ratings must be [R] each, got {shapes}")
        if shape is None:
            shape = (int(user.max()) + 1, int(item.max()) + 1) if user.numel() else (0, 0)
        bounds = (("users", user, 0, shape[0]), ("items", item, 0, shape[1]), ("ratings", rating, 1, 256))
        for name, column, low, high in bounds:
            if bool(((column < low) | (column >= high)).any()):
                raise ValueError(
                    f"RatingTable: {name} must be in [{low}, {high}), got {int(column.min())} to {int(column.max())}"
                )
        order = torch.argsort(user * shape[1] + item)
        user, item = user[order], item[order]
        again = (user[1:] == user[:-1]) & (item[1:] == item[:-1])
        if bool(again.any()):
            first = int(again.nonzero()[0])
            raise ValueError(f"RatingTable: user {int(user[first])} rates item {int(item[first])} more than once")
        self.shape = int(shape[0]), int(shape[1])
        self._starts = torch.zeros(self.shape[0] + 1, dtype=torch.int64)
        self._starts[1:] = torch.bincount(user, minlength=self.shape[0]).cumsum(0)
        self._items, self._ratings = item.to(torch.int32), rating[order].to(torch.uint8)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, users: Any) -> Tensor:
        """Ratings [B, items] of some users (a tensor or list of indices, a slice or an int), uint8, 0 where missing."""
        chosen = torch.arange(self.shape[0])[users.cpu() if isinstance(users, Tensor) else users]
        shape = chosen.shape
        chosen = chosen.reshape(-1)
        lengths = self._starts[chosen + 1] - self._starts[chosen]
        row = torch.arange(len(chosen)).repeat_interleave(lengths)
        shift = self._starts[chosen] - (lengths.cumsum(0) - lengths)
        position = torch.arange(len(row)) + shift[row]
        dense = torch.zeros(len(chosen), self.shape[1], dtype=torch.uint8)
        dense[row, self._items[position].long()] = self._ratings[position]
        return dense.view(*shape, self.shape[1])

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(users [B], ratings [B, items]) of all users once, in random order.

        Args:
            size: users of a batch.
            seed: of the order; None draws it from torch's default generator.

        Examples:
            >>> table = RatingTable([0, 1, 2], [0, 0, 1], [3, 1, 2])
            >>> sum(int(ratings.sum()) for users, ratings in table.batches(2, seed=0))
            6
        """
        generator = torch.Generator().manual_seed(int(random.as_seed(seed, torch.device("cpu"))))
        for users in torch.randperm(len(self), generator=generator).split(size):
            yield users, self[users]

    def counts(self, categories: int) -> Tensor:
        """How often each item got each rating from 1 to ``categories``, int64 [items, categories]."""
        if self._ratings.numel() and int(self._ratings.max()) > categories:
            raise ValueError(f"RatingTable: there are ratings up to {int(self._ratings.max())}, above {categories}")
        index = self._items.long() * categories + self._ratings.long() - 1
        return torch.bincount(index, minlength=self.shape[1] * categories).view(self.shape[1], categories)


class CollaborativeRBM(nn.Module):
    """An RBM over ratings: one softmax unit of K categories an item, of which each user has only those that they rated.

    For a user with rated items R, p(v, h) ~ exp(sum_{i in R} (b_i + W_i h)[v_i] + h'c), and with ``conditional``
    another sum_{i in R} D_i h: that a user rated an item tells something whatever the rating. Missing ratings take no
    part: each user has an RBM of their own, and all share weights.

    Args:
        items: number of items.
        categories: K, the number of ratings 1, ..., K; 2 to 255.
        hidden: number of hidden units H.
        conditional: learn D.
        precision: of the products that sample and that give gradients, see ``ops.rbm_half_step``.
        device: where the parameters live.
        dtype: their dtype.

    Attributes:
        W: weights [items * K, H], initialized to N(0, 0.01^2); row i K + r - 1 is of rating r of item i.
        b: their biases [items * K], zeros; see ``init_bias``.
        c: hidden bias [H], zeros.
        D: weights [items, H] of what was rated, zeros; None without ``conditional``.
        chains: the ratings [users, items] of persistent chains, a uint8 buffer, 0 where a chain has not started or the
            rating is missing; empty until ``start_chains``. Their seed and half-step are in the ``state_dict`` too.

    Raises:
        TypeError, ValueError: for sizes below 1, or K out of range.

    Source: Salakhutdinov, Mnih and Hinton, "Restricted Boltzmann machines for collaborative filtering", ICML 2007.

    Examples:
        >>> rbm, ratings = CollaborativeRBM(4, 5, 3), torch.tensor([[5, 0, 1, 0], [0, 2, 0, 4]])
        >>> rbm.init_bias(ratings)
        >>> optimizer = torch.optim.SGD(rbm.parameters(), lr=0.05, momentum=0.9)
        >>> rbm.contrastive_divergence(ratings, k=1).backward()
        >>> optimizer.step()
        >>> rbm.predict(ratings).shape, rbm.predict(ratings, items=[1, 3]).shape
        (torch.Size([2, 4]), torch.Size([2, 2]))
    """

    chains: Tensor
    D: Tensor | None

    def __init__(
        self,
        items: int,
        categories: int,
        hidden: int,
        *,
        conditional: bool = False,
        precision: str = "fp32",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if items < 1 or hidden < 1:
            raise ValueError(f"CollaborativeRBM: items and hidden must be at least 1, got {items} and {hidden}")
        if not 2 <= categories <= 255:
            raise ValueError(f"CollaborativeRBM: categories must be in [2, 255], got {categories}")
        self.items, self.categories, self.hidden = items, categories, hidden
        self.precision = checked_precision("CollaborativeRBM", precision)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.W = nn.Parameter(torch.empty(items * categories, hidden, **where))
        self.b = nn.Parameter(torch.empty(items * categories, **where))
        self.c = nn.Parameter(torch.empty(hidden, **where))
        self.register_parameter("D", nn.Parameter(torch.empty(items, hidden, **where)) if conditional else None)
        self.register_buffer("chains", torch.empty(0, items, device=device, dtype=torch.uint8))
        self.chain_seed = self.chain_step = 0
        self._ddp_params_and_buffers_to_ignore = ["chains"]  # each rank keeps its own
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights, zeroes the biases and D, forgets the chains."""
        nn.init.normal_(self.W, std=0.01)
        for parameter in (self.b, self.c, self.D):
            if parameter is not None:
                nn.init.zeros_(parameter)
        self.chains = self.chains.new_empty(0, self.items)

    @torch.no_grad()
    def init_bias(self, ratings: Tensor | RatingTable, smoothing: float = 1.0) -> None:
        """Sets b to the log frequencies of each item's ratings, so that the untrained model predicts the items' means.

        Args:
            ratings: integers [users, items], 0 where missing, or a ``RatingTable``.
            smoothing: how many ratings with the frequencies of all items together are added to each item's.
        """
        if isinstance(ratings, RatingTable):
            if ratings.shape[1] != self.items:
                raise ValueError(f"CollaborativeRBM: the table has {ratings.shape[1]} items, the model {self.items}")
            counts = ratings.counts(self.categories).double()
        else:
            given = self._checked(ratings)
            counts = torch.stack([(given == r).sum(0) for r in range(1, self.categories + 1)], 1).double()
        overall = (counts.sum(0) + 1) / (counts.sum() + self.categories)
        frequencies = (counts + smoothing * overall) / (counts.sum(1, keepdim=True) + smoothing)
        self.b.copy_(frequencies.clamp(min=1e-6).log().flatten())

    # ---- energies and conditionals -----------------------------------------------------------------------------------

    def hidden_mean(self, ratings: Tensor, *, rated: Tensor | None = None) -> Tensor:
        """p(h = 1 | ratings), [B, H]; differentiable. Arguments as of ``contrastive_divergence``."""
        return torch.sigmoid(self._inputs(self._states(ratings, rated)[0]))

    def free_energy(self, ratings: Tensor, *, rated: Tensor | None = None) -> Tensor:
        """F of each user's ratings in their own RBM, [B], nats, so that p(ratings | what is rated) ~ exp(-F).

        Differentiable; arguments as of ``contrastive_divergence``.
        """
        W, b = self._extended()
        return ops.rbm_free_energy(self._states(ratings, rated)[0], W, b, self.c, visible=self._units)

    def probabilities(
        self,
        ratings: Tensor,
        items: Tensor | Sequence[int] | None = None,
        *,
        method: str = "mean_field",
        rated: Tensor | None = None,
    ) -> Tensor:
        """p(rating of an item = 1, ..., K | the given ratings); differentiable.

        Args:
            ratings: given ratings [B, items], integers, 0 where missing.
            items: indices of the items, [n] for the same ones for all users, [B, n] for some of each; None for all.
            method: ``"mean_field"``: from the means of the hidden units, one product; ``"exact"``: with the hidden
                units summed out, at a cost of B * n * K * H. For an item that is given itself, the exact answer leaves
                its own rating out, mean field does not.
            rated: what was rated, with ``conditional``: see ``contrastive_divergence``.

        Returns:
            [B, n, K].

        Raises:
            TypeError, ValueError: for arguments of the wrong kind, shape or range.
        """
        if method not in ("mean_field", "exact"):
            raise ValueError(f"CollaborativeRBM: method must be 'mean_field' or 'exact', got {method!r}")
        states, _ = self._states(ratings, rated)
        inputs, K = self._inputs(states), self.categories
        index = self._items(items, len(inputs))
        if method == "mean_field":
            logits = (torch.sigmoid(inputs) @ self.W.T + self.b).view(-1, self.items, K)
            if index.dim() == 1:
                logits = logits if items is None else logits[:, index]
            else:
                logits = logits.gather(1, index.unsqueeze(2).expand(-1, -1, K))
            return torch.softmax(logits, -1)
        weights, biases = self.W.view(self.items, K, -1), self.b.view(self.items, K)
        given = states[:, : self.items * K].view(-1, self.items, K)
        n = max(1, _CHUNK_ELEMENTS // max(1, K * self.hidden * len(inputs)))
        parts = [inputs.new_empty(len(inputs), 0, K)]
        for chosen in index.split(n, -1):
            if chosen.dim() == 1:
                own = given[:, chosen].unsqueeze(2) @ weights[chosen]  # [B, n, 1, H]
            else:
                own = given.gather(1, chosen.unsqueeze(2).expand(-1, -1, K)).unsqueeze(2) @ weights[chosen]
            flipped = inputs[:, None, None] - own + weights[chosen]  # [B, n, K, H]
            parts.append(torch.softmax(softplus(flipped).sum(-1) + biases[chosen], -1))
        return torch.cat(parts, 1)

    def predict(
        self,
        ratings: Tensor,
        items: Tensor | Sequence[int] | None = None,
        *,
        method: str = "mean_field",
        rated: Tensor | None = None,
    ) -> Tensor:
        """The expected rating of items given some ratings, [B, n], in [1, K]; arguments as of ``probabilities``.

        Examples:
            >>> rbm = CollaborativeRBM(2, 3, 4)
            >>> _ = torch.nn.init.zeros_(rbm.W)
            >>> rbm.predict(torch.tensor([[3, 0]])).detach()  # the mean of 1, 2 and 3
            tensor([[2., 2.]])
        """
        p = self.probabilities(ratings, items, method=method, rated=rated)
        return p @ torch.arange(1, self.categories + 1, dtype=p.dtype, device=p.device)

    # ---- training ----------------------------------------------------------------------------------------------------

    def contrastive_divergence(
        self,
        ratings: Tensor,
        k: int = 1,
        *,
        users: Tensor | None = None,
        rated: Tensor | None = None,
        seed: int | Tensor | None = None,
        row_offset: int | None = None,
    ) -> Tensor:
        """Mean over users of F(ratings) - F(ratings after k Gibbs steps), whose ``backward`` gives the CD-k gradient.

        The steps redraw the given ratings of a user and no others. The gradients are computed with the value, which is
        no likelihood.

        Args:
            ratings: [B, items], integers from 1 to K, 0 where missing.
            k: number of Gibbs steps, at least 1.
            users: indices [B] of these users among the persistent chains (see ``start_chains``), which they continue
                instead of starting at the ratings (PCD). A user's chain starts at the first ratings seen of them.
            rated: what was rated, bool [B, items], with ``conditional``: given ratings and more, such as items known to
                be rated by an unknown value; None: the given ratings.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator. Persistent chains have their
                own.
            row_offset: global index of the first row; None: see ``genfast.nn.RBM``.

        Returns:
            A scalar, float32, or float64 where W is.

        Raises:
            RuntimeError: for derivatives past the first backward.
            TypeError, ValueError: for arguments of the wrong kind, shape or range.

        Source: Salakhutdinov, Mnih and Hinton 2007, sections 2.1 to 2.3 and 3.

        Examples:
            >>> rbm, ratings = CollaborativeRBM(3, 5, 2), torch.tensor([[5, 0, 1]])
            >>> rbm.contrastive_divergence(ratings, seed=0).backward()
            >>> rbm.W.grad[5:10].abs().sum()  # the second item was not rated
            tensor(0.)
        """
        name = "CollaborativeRBM.contrastive_divergence"
        if k < 1:
            raise ValueError(f"{name}: k must be at least 1, got {k}")
        data, clamp = self._states(ratings, rated)
        if len(data) == 0:
            raise ValueError(f"{name}: ratings must have at least one row")
        if users is not None and seed is not None:
            raise ValueError(f"{name}: the chains have a seed already; start_chains sets another")
        W, b = self._extended()
        first = first_chain(ratings, row_offset)
        with torch.no_grad():
            options: dict[str, Any] = {"visible": self._units, "precision": self.precision, "chain_offset": first}
            if users is None:
                chains = ops.rbm_gibbs(data, W, b, self.c, k=k, seed=seed, clamp=clamp, **options).visible
            else:
                chains = self._move_chains(users, ratings, data, clamp, W, b, k, options)
            result = ops.rbm_cd(data, W, b, self.c, k=0, chains=chains, seed=0, **options)
        return gap_loss(result.free_energy_gap, W, b, self.c, None, result.dW, result.db, result.dc, None)

    forward = contrastive_divergence

    def start_chains(self, users: int, *, seed: int | Tensor | None = None) -> None:
        """Makes room for the persistent chains of so many users, users * items bytes, and forgets earlier ones.

        Args:
            users: number of users.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
        """
        self.chains = torch.zeros(users, self.items, dtype=torch.uint8, device=self.W.device)
        self.chain_seed, self.chain_step = int(random.as_seed(seed, self.W.device)), 0

    def _move_chains(
        self, users: Tensor, ratings: Tensor, data: Tensor, clamp: Tensor, W: Tensor, b: Tensor, k: int, options: Any
    ) -> Tensor:
        users = torch.as_tensor(users, device=self.chains.device)
        if users.shape != ratings.shape[:1] or users.is_floating_point():
            raise ValueError(
                f"CollaborativeRBM: users must be {len(ratings)} indices, got {users.dtype} {shape_of(users)}"
            )
        if users.numel() and not 0 <= int(users.min()) <= int(users.max()) < len(self.chains):
            raise ValueError(
                f"CollaborativeRBM: there are {len(self.chains)} persistent chains, got users {int(users.min())} to "
                f"{int(users.max())}; call start_chains with the number of users"
            )
        if self.chain_step + 2 * k > HALF_STEPS:  # never the same counter twice: go on under the next seed
            self.chain_seed, self.chain_step = (self.chain_seed + 1) % 2**63, 0
        held, given = self.chains[users], ratings.to(self.chains.device) > 0
        start = torch.where(given & (held > 0), held, ratings.to(held))
        states = torch.cat((self._one_hot(start), data[:, self.items * self.categories :]), 1)
        moved = ops.rbm_gibbs(
            states, W, b, self.c, k=k, seed=self.chain_seed, step=self.chain_step, clamp=clamp, **options
        ).visible
        groups = moved[:, : self.items * self.categories].view(-1, self.items, self.categories)
        self.chains[users] = torch.where(given, groups.argmax(-1) + 1, 0).to(torch.uint8)
        self.chain_step += 2 * k
        return moved

    # ---- inside ------------------------------------------------------------------------------------------------------

    @property
    def _units(self) -> str:
        return f"softmax:{self.categories}"

    def _extended(self) -> tuple[Tensor, Tensor]:
        """(W, b) of an RBM whose visible units also hold what was rated; these are clamped, whatever their kind."""
        if self.D is None:
            return self.W, self.b
        padding = -self.items % self.categories
        return (
            torch.cat((self.W, self.D, self.D.new_zeros(padding, self.hidden))),
            torch.cat((self.b, self.b.new_zeros(self.items + padding))),
        )

    def _inputs(self, states: Tensor) -> Tensor:
        return states @ self._extended()[0] + self.c

    def _checked(self, ratings: Any) -> Tensor:
        if not isinstance(ratings, Tensor):
            raise TypeError(f"CollaborativeRBM: ratings must be a torch.Tensor, got {type(ratings).__name__}")
        if ratings.is_floating_point() or ratings.is_complex() or ratings.dtype == torch.bool:
            raise TypeError(f"CollaborativeRBM: ratings must be integers, 0 where missing, got {ratings.dtype}")
        if ratings.dim() != 2 or ratings.shape[1] != self.items:
            raise ValueError(f"CollaborativeRBM: ratings must be [B, {self.items}], got {shape_of(ratings)}")
        if ratings.numel() and not 0 <= int(ratings.min()) <= int(ratings.max()) <= self.categories:
            raise ValueError(
                f"CollaborativeRBM: ratings must be 1 to {self.categories}, or 0 where missing, got "
                f"{int(ratings.min())} to {int(ratings.max())}"
            )
        return ratings.to(self.W.device)

    def _one_hot(self, ratings: Tensor) -> Tensor:
        """[B, items * K], all zero where a rating is missing."""
        values = torch.arange(1, self.categories + 1, device=ratings.device, dtype=ratings.dtype)
        return (ratings.unsqueeze(2) == values).to(self.W.dtype).flatten(1)

    def _states(self, ratings: Any, rated: Any) -> tuple[Tensor, Tensor]:
        """(visible states, mask of those that no Gibbs step may change)."""
        ratings = self._checked(ratings)
        given = ratings > 0
        states, missing = self._one_hot(ratings), ~given.repeat_interleave(self.categories, 1)
        if self.D is None:
            if rated is not None:
                raise ValueError("CollaborativeRBM: rated is for conditional=True")
            return states, missing
        if rated is not None:
            if not isinstance(rated, Tensor) or rated.dtype != torch.bool or rated.shape != ratings.shape:
                kind = f"{rated.dtype} {shape_of(rated)}" if isinstance(rated, Tensor) else type(rated).__name__
                raise ValueError(f"CollaborativeRBM: rated must be a bool tensor {shape_of(ratings)}, got {kind}")
            given = given | rated.to(given.device)
        given = nn.functional.pad(given, (0, -self.items % self.categories))
        return torch.cat((states, given.to(states.dtype)), 1), torch.cat((missing, torch.ones_like(given)), 1)

    def _items(self, items: Any, rows: int) -> Tensor:
        if items is None:
            return torch.arange(self.items, device=self.W.device)
        index = torch.as_tensor(items, device=self.W.device)
        if index.numel() and (index.dtype.is_floating_point or index.dtype == torch.bool):
            raise TypeError(f"CollaborativeRBM: items must be integers, got {index.dtype}")
        if index.dim() not in (1, 2) or (index.dim() == 2 and len(index) != rows):
            raise ValueError(f"CollaborativeRBM: items must be [n] or [{rows}, n], got {shape_of(index)}")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.items:
            raise ValueError(
                f"CollaborativeRBM: items must be in [0, {self.items}), got {int(index.min())} to {int(index.max())}"
            )
        return index.long()

    def get_extra_state(self) -> Tensor:
        """Seed and half-step of the persistent chains, int64 [2]."""
        return torch.tensor([self.chain_seed, self.chain_step], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """What ``get_extra_state`` returned."""
        self.chain_seed, self.chain_step = (int(value) for value in state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "chains")
        if isinstance(saved, Tensor) and saved.dim() == 2 and saved.shape[1] == self.items:
            self.chains = self.chains.new_empty(saved.shape)  # any number of users may have been there
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"{self.items} items, {self.categories} categories, {self.hidden} hidden, "
            f"conditional={self.D is not None}, precision={self.precision!r}"
        )
