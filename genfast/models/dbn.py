"""Deep belief networks: stacks of restricted Boltzmann machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from genfast import ops, random
from genfast._checks import wide
from genfast.nn import RBM
from genfast.nn._rbm_chains import first_chain
from genfast.nn._rbm_loss import gap_loss
from genfast.ops._rbm_common import HALF_STEPS
from genfast.ops._rbm_units import BERNOULLI, GAUSSIAN, mean

__all__ = ["DBN"]

# Half-steps of the passes up and down, far above those of the highest RBM's Gibbs steps, which share the seed.
_WAKE, _SLEEP = HALF_STEPS - 2**16, HALF_STEPS - 2**15


class DBN(nn.Module):
    """A deep belief network: an RBM between the two highest layers, sigmoid belief networks below it.

    p(v, h1, ..., hL) = p(v | h1) ... p(h(L-2) | h(L-1)) p(h(L-1), hL), the last factor an RBM's. ``layers[0]`` joins v
    to h1. Below the highest one, a layer's W and b generate the units beneath it, and its W and c recognize those above
    it; ``untie`` gives recognition weights of its own.

    Train it layer by layer (``pretrain``, or in a loop of your own, as in the example), then fine-tune it as a
    generative model (``untie``, ``up_down``) or as a classifier (``to_sequential``).

    Args:
        visible: number of visible units V.
        hidden: numbers of units of the hidden layers, from below, at least one.
        visible_units: kind of the visible units: ``"bernoulli"``, ``"gaussian"`` or ``"softmax:K"``; all others are
            Bernoulli units.
        learn_variance: learn the variances of Gaussian visible units.
        precision: of the products that sample, see ``ops.rbm_half_step``.
        device: where the parameters live.
        dtype: their dtype.

    Attributes:
        layers: the ``genfast.nn.RBM`` of each hidden layer, from below.
        recognition: recognition weights [V_l, H_l] of the layers below the highest one; empty until ``untie``.

    Raises:
        TypeError, ValueError: for no hidden layer, or what ``genfast.nn.RBM`` refuses.

    Source: Hinton, Osindero and Teh, "A fast learning algorithm for deep belief nets", Neural Computation 2006.

    Examples:
        >>> dbn, v = DBN(6, [5, 4]), torch.ones(8, 6)
        >>> for index, rbm in enumerate(dbn.layers):  # greedy training, one step a layer
        ...     optimizer = torch.optim.SGD(rbm.parameters(), lr=0.1)
        ...     rbm.contrastive_divergence(dbn.transform(v, index).detach()).backward()
        ...     optimizer.step()
        >>> dbn.transform(v).shape, dbn.sample(3, 10, seed=1).shape
        (torch.Size([8, 4]), torch.Size([3, 6]))
    """

    def __init__(
        self,
        visible: int,
        hidden: Sequence[int],
        *,
        visible_units: str = "bernoulli",
        learn_variance: bool = False,
        precision: str = "fp32",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = [visible, *hidden]
        if len(sizes) < 2:
            raise ValueError("DBN: hidden must name at least one layer, got none")
        options: dict[str, Any] = {"precision": precision, "device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            RBM(
                sizes[index], sizes[index + 1],
                visible_units="bernoulli" if index else visible_units, learn_variance=learn_variance and not index,
                **options,
            )
            for index in range(len(sizes) - 1)
        )  # fmt: skip
        self.recognition = nn.ParameterList()

    @property
    def _rbms(self) -> list[RBM]:
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def tied(self) -> bool:
        """Whether recognition uses the generative weights."""
        return len(self.recognition) == 0

    # ---- greedy training ---------------------------------------------------------------------------------------------

    def pretrain(
        self,
        data: Tensor | Iterable[Any],
        epochs: int = 10,
        *,
        lr: float = 0.1,
        momentum: float = 0.5,
        batch: int = 64,
        k: int = 1,
        persistent: bool = False,
        sample: bool = False,
        init_bias: bool = True,
        layers: Iterable[int] | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        callback: Callable[[int, int], None] | None = None,
        seed: int | None = None,
    ) -> None:
        """Trains the layers one after another by contrastive divergence, each on the output of those below it.

        Args:
            data: visible states [N, V], which are shuffled and cut into batches, or an iterable of batches, as a
                ``DataLoader``: tensors [B, ...] that flatten to [B, V], or tuples that begin with one. It is read once
                an epoch, and once more a layer for ``init_bias``.
            epochs: passes over the data a layer.
            lr: learning rate of stochastic gradient descent.
            momentum: its momentum.
            batch: rows of a batch, where ``data`` is a tensor.
            k: Gibbs steps of a gradient.
            persistent: continue each layer's chains from batch to batch (PCD).
            sample: a layer learns from samples of the layer below instead of means.
            init_bias: start each layer's visible bias at its data's mean, see ``RBM.init_visible_bias``.
            layers: indices of the layers to train; None for all.
            optimizer: makes the optimizer from the parameters of one layer, in place of ``lr`` and ``momentum``.
            callback: called with the layer's index and the number of finished epochs after each epoch.
            seed: of the order of rows and of the noise; None draws it from torch's default generator.

        Raises:
            RuntimeError: if the weights are untied and a layer below the highest is to be trained.
            TypeError: for data that can be read only once, such as a generator.
            ValueError: for data without rows, or of another width.

        Examples:
            >>> dbn = DBN(6, [5, 4])
            >>> dbn.pretrain(torch.ones(32, 6), epochs=5, seed=0)
            >>> dbn.sample(100, 20, seed=0).mean() > 0.9
            tensor(True)
        """
        if not isinstance(data, Tensor) and isinstance(data, Iterator):
            raise TypeError(
                "DBN.pretrain: data must be a tensor or an iterable that can be read more than once, such as a "
                f"DataLoader, got {type(data).__name__}"
            )
        generator = torch.Generator().manual_seed(int(random.as_seed(seed, torch.device("cpu"))))

        def draw() -> int:
            return int(torch.randint(2**63 - 1, (), generator=generator))

        for index in range(len(self._rbms)) if layers is None else layers:
            rbm = self._rbms[index]
            if not self.tied and rbm is not self._rbms[-1]:
                raise RuntimeError(
                    "DBN.pretrain: the weights are untied; train layers below the highest before untie()"
                )
            if init_bias:
                rbm.init_visible_bias(self._mean_input(index, data, batch))
            chosen = (
                torch.optim.SGD(rbm.parameters(), lr=lr, momentum=momentum)
                if optimizer is None
                else optimizer(rbm.parameters())
            )
            if persistent:
                rbm.chains = rbm.chains.new_empty(0, rbm.visible)
            for epoch in range(1, epochs + 1):
                for v in self._batches(data, batch, generator):
                    with torch.no_grad():
                        x = self.transform(v, index, sample=sample, seed=draw())
                    if persistent and rbm.chains.shape[0] == 0:
                        rbm.start_chains(x, seed=draw())
                    chosen.zero_grad()
                    rbm.contrastive_divergence(x, k, persistent, seed=None if persistent else draw()).backward()
                    chosen.step()
                if callback is not None:
                    callback(index, epoch)

    def _batches(self, data: Any, batch: int, generator: torch.Generator | None) -> Iterator[Tensor]:
        if isinstance(data, Tensor):
            order = torch.arange(len(data)) if generator is None else torch.randperm(len(data), generator=generator)
            rows = data
            data = (rows[chosen.to(rows.device)] for chosen in order.split(batch))
        for item in data:
            v = item[0] if isinstance(item, (tuple, list)) else item
            yield v.flatten(1).to(self._rbms[0].W)

    @torch.no_grad()
    def _mean_input(self, index: int, data: Any, batch: int) -> Tensor:
        total, count = self._rbms[index].b.new_zeros(self._rbms[index].visible, dtype=torch.float64), 0
        for v in self._batches(data, batch, None):
            total += self.transform(v, index).sum(0)
            count += len(v)
        if count == 0:
            raise ValueError("DBN.pretrain: data must have at least one row")
        return total / count

    @torch.no_grad()
    def unroll(self, index: int) -> None:
        """Starts layer ``index`` as the layer below it turned around, which leaves the network's p(v) as it was.

        Its W is the transpose of that layer's, its b that layer's c and its c that layer's b; greedy training from
        there improves a bound on the likelihood. (That p(v) is the one of the network that ends with either layer.)

        Args:
            index: of the layer, at least 1; it has as many hidden units as the layer below it has visible ones.

        Raises:
            ValueError: if the sizes differ, or the layer below has other than Bernoulli visible units.

        Source: Hinton, Osindero and Teh 2006, section 4.

        Examples:
            >>> dbn = DBN(6, [4, 6])
            >>> dbn.unroll(1)
            >>> torch.equal(dbn.layers[1].W, dbn.layers[0].W.T)
            True
        """
        if not 1 <= index < len(self._rbms):
            raise ValueError(f"DBN.unroll: index must be in [1, {len(self._rbms)}), got {index}")
        below, rbm = self._rbms[index - 1], self._rbms[index]
        if rbm.hidden != below.visible or below._visible_kind.kind != BERNOULLI:
            raise ValueError(
                f"DBN.unroll: layer {index} must have {below.visible} hidden units and layer {index - 1} bernoulli "
                f"visible units, got {rbm.hidden} and {below.visible_units}"
            )
        rbm.W.copy_(below.W.T)
        rbm.b.copy_(below.c)
        rbm.c.copy_(below.b)

    # ---- recognition -------------------------------------------------------------------------------------------------

    def transform(
        self,
        v: Tensor,
        layers: int | None = None,
        *,
        sample: bool = False,
        seed: int | Tensor | None = None,
        row_offset: int | None = None,
    ) -> Tensor:
        """The units of a hidden layer given v, from below upwards: their means, or samples.

        Args:
            v: visible states [..., V].
            layers: how many layers to go up, 0 (v itself) to L; None for all.
            sample: draw each layer's states instead of taking means, layer l at half-step l; a constant for autograd.
            seed: of the samples: int or 0-d int64 tensor; None draws it from torch's default generator.
            row_offset: global index of the first row of v; None: see ``genfast.nn.RBM``.

        Returns:
            [..., H] of that layer in W's dtype; means are differentiable.

        Raises:
            ValueError: for a wrong number of units or layers.

        Examples:
            >>> dbn = DBN(6, [5, 4])
            >>> dbn.transform(torch.ones(2, 6), layers=1).shape
            torch.Size([2, 5])
        """
        count = len(self._rbms) if layers is None else layers
        if not 0 <= count <= len(self._rbms):
            raise ValueError(f"DBN.transform: layers must be in [0, {len(self._rbms)}], got {layers}")
        x = self._rbms[0]._states("v", v, self._rbms[0].visible)
        if sample:
            seed = random.as_seed(seed, x.device)
        for index in range(count):
            if sample:
                x = self._sample_up(index, x, seed, row_offset, index)
            else:
                x = mean(self._up(index, x), self._rbms[index]._hidden_kind)
        return x

    def forward(self, v: Tensor) -> Tensor:
        """The means of the highest layer, ``transform(v)``."""
        return self.transform(v)

    def _recognition_weights(self, index: int) -> Tensor:
        """[V_l, H_l], the inverse variances of Gaussian visible units included."""
        if index < len(self.recognition):
            return self.recognition[index]
        rbm = self._rbms[index]
        return rbm.W if rbm.logvar is None else rbm.W * torch.exp(-rbm.logvar).unsqueeze(1)

    def _up(self, index: int, x: Tensor) -> Tensor:
        return x @ self._recognition_weights(index) + self._rbms[index].c

    @torch.no_grad()
    def _sample_up(self, index: int, x: Tensor, seed: Any, row_offset: int | None, step: int) -> Tensor:
        rbm = self._rbms[index]
        h = ops.rbm_half_step(
            x, self._recognition_weights(index), rbm.c, to="hidden", precision=rbm.precision, seed=seed,
            chain_offset=first_chain(x, row_offset), step=step,
        )  # fmt: skip
        assert isinstance(h, Tensor)
        return h

    @torch.no_grad()
    def to_sequential(self, num_classes: int | None = None) -> nn.Sequential:
        """A feed-forward network that starts at the recognition weights, for discriminative fine-tuning.

        Args:
            num_classes: units of a last ``Linear`` layer, initialized as torch does; None for none.

        Returns:
            ``Linear``, ``Sigmoid`` a hidden layer, then the last ``Linear``; copies, so that training it leaves the DBN
            alone. Without the last layer it computes ``transform``.

        Examples:
            >>> network = DBN(6, [5, 4]).to_sequential(num_classes=3)
            >>> network(torch.ones(2, 6)).shape
            torch.Size([2, 3])
        """
        where: dict[str, Any] = {"device": self._rbms[0].W.device, "dtype": self._rbms[0].W.dtype}
        modules: list[nn.Module] = []
        for index, rbm in enumerate(self._rbms):
            linear = nn.utils.skip_init(nn.Linear, rbm.visible, rbm.hidden, **where)
            linear.weight.copy_(self._recognition_weights(index).T)
            linear.bias.copy_(rbm.c)
            modules += [linear, nn.Sigmoid()]
        if num_classes is not None:
            modules.append(nn.Linear(self._rbms[-1].hidden, num_classes, **where))
        return nn.Sequential(*modules)

    # ---- generation --------------------------------------------------------------------------------------------------

    def sample(
        self, n: int, k: int, *, seed: int | Tensor | None = None, row_offset: int | None = None, mean: bool = False
    ) -> Tensor:
        """Draws v: k Gibbs steps of the highest RBM from scratch, then one pass down with noise in every layer.

        Args:
            n: number of rows.
            k: number of Gibbs steps, at least 0; the draws are the model's in the limit of many.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            row_offset: global index of the first row; None: see ``genfast.nn.RBM``.
            mean: return E[v | h1] of the drawn h1 in place of v.

        Returns:
            Visible states [n, V] in W's dtype, or their means.

        Examples:
            >>> dbn = DBN(6, [5, 4])
            >>> torch.equal(dbn.sample(3, 10, seed=1)[1:], dbn.sample(2, 10, seed=1, row_offset=1))
            True
        """
        bottom = self._rbms[0]
        seed = random.as_seed(seed, bottom.W.device)
        top = self._rbms[-1].sample(n, k, seed=seed, row_offset=row_offset)
        if not mean:
            return self._down(top, seed, row_offset)[0]
        if len(self._rbms) == 1:
            h = bottom.sample_hidden(top, seed=seed, step=_SLEEP, row_offset=row_offset)
        else:
            h = self._down(top, seed, row_offset, stop=1)[0]
        with torch.no_grad():
            return bottom.visible_mean(h)

    def _down(self, states: Tensor, seed: Any, row_offset: int | None, stop: int = 0) -> list[Tensor]:
        """Draws of the layers below ``states`` of the highest RBM's visible side: [layer stop, ..., states]."""
        found = [states]
        for index in range(len(self._rbms) - 2, stop - 1, -1):
            x = self._rbms[index].sample_visible(found[0], seed=seed, step=_SLEEP + index, row_offset=row_offset)
            found.insert(0, x)
        return found

    # ---- generative fine-tuning --------------------------------------------------------------------------------------

    @torch.no_grad()
    def untie(self) -> None:
        """Gives the layers below the highest recognition weights of their own, which start at W, for ``up_down``.

        Make the optimizer after it, because it adds parameters. A second call changes nothing.
        """
        if self.tied:
            weights = [self._recognition_weights(index).detach().clone() for index in range(len(self._rbms) - 1)]
            self.recognition.extend(nn.Parameter(weight) for weight in weights)

    def up_down(
        self,
        v: Tensor,
        k: int = 1,
        persistent: bool = False,
        *,
        seed: int | Tensor | None = None,
        row_offset: int | None = None,
    ) -> Tensor:
        """A loss whose ``backward`` gives the gradients of the up-down algorithm (contrastive wake-sleep); minimize it.

        It is the mean over rows of three parts, each with the drawn states as constants:

        - wake: states drawn upwards from v; -log p(layer | layer above), for the generative weights;
        - ``contrastive_divergence`` of the highest RBM, whose chains start at the states drawn upwards;
        - sleep: states drawn downwards from its chains' end; -log q(layer | layer below), for the recognition weights.

        The value is no likelihood and need not fall.

        Args:
            v: visible states [B, V], a constant.
            k: number of Gibbs steps of the highest RBM.
            persistent: continue its chains from call to call.
            seed: int or 0-d int64 tensor; None draws it from torch's default generator.
            row_offset: global index of the first row of v; None: see ``genfast.nn.RBM``.

        Returns:
            A scalar, float32, or float64 where W is.

        Raises:
            RuntimeError: if the weights are tied.
            TypeError, ValueError: as ``RBM.contrastive_divergence``.

        Source: Hinton, Osindero and Teh 2006, section 5 and appendix B.

        Examples:
            >>> dbn = DBN(6, [5, 4])
            >>> dbn.untie()
            >>> optimizer = torch.optim.SGD(dbn.parameters(), lr=0.1)
            >>> dbn.up_down(torch.ones(8, 6), k=3, seed=0).backward()
            >>> optimizer.step()
            >>> dbn.layers[0].b.min() > 0
            tensor(True)
        """
        top, below = self._rbms[-1], len(self._rbms) - 1
        if below and self.tied:
            raise RuntimeError("DBN.up_down: recognition shares the generative weights; call untie() first")
        seed = random.as_seed(seed, top.W.device)
        states = [self._rbms[0]._states("v", v, self._rbms[0].visible).detach()]
        for index in range(below):
            states.append(self._sample_up(index, states[-1], seed, row_offset, _WAKE + index))

        if persistent:
            if top.chains.shape[0] == 0:
                top.start_chains(states[-1], seed=seed)
            loss = top.contrastive_divergence(states[-1], k, persistent=True, row_offset=row_offset)
            dreams = top.chains
        elif below:
            with torch.no_grad():
                result = top._gradients(states[-1], None, k, seed, first_chain(states[-1], row_offset), 0)
            loss = gap_loss(
                result.free_energy_gap, top.W, top.b, top.c, None, result.dW, result.db, result.dc, None
            )  # fmt: skip
            dreams = result.chains
        else:
            return top.contrastive_divergence(states[0], k, seed=seed, row_offset=row_offset)

        fantasies = self._down(dreams, seed, row_offset)
        for index in range(below):
            rbm = self._rbms[index]
            loss = loss + _negative_log_likelihood(rbm, states[index], states[index + 1] @ rbm.W.T + rbm.b)
            logits = self._up(index, fantasies[index])
            loss = loss + _bernoulli_loss(logits, fantasies[index + 1])
        return loss

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        untied = f"{prefix}recognition.0" in state_dict
        if untied and self.tied:
            self.untie()
        elif not untied and not self.tied:
            self.recognition = nn.ParameterList()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _bernoulli_loss(logits: Tensor, x: Tensor) -> Tensor:
    """Mean over rows of -log p(x), p with these logits."""
    logits = logits.to(wide(logits.dtype))
    target = x.to(logits.dtype)
    return functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1).mean()


def _negative_log_likelihood(rbm: RBM, x: Tensor, inputs: Tensor) -> Tensor:
    """Mean over rows of -log p(x | inputs) of an RBM's visible units, without constants."""
    kind = rbm._visible_kind
    if kind.kind == BERNOULLI:
        return _bernoulli_loss(inputs, x)
    inputs = inputs.to(wide(inputs.dtype))
    target = x.to(inputs.dtype)
    if kind.kind == GAUSSIAN:
        squares = 0.5 * (target - inputs).square()
        if rbm.logvar is not None:
            logvar = rbm.logvar.to(inputs.dtype)
            squares = squares * torch.exp(-logvar) + 0.5 * logvar
        return squares.sum(-1).mean()
    log_prob = torch.log_softmax(inputs.unflatten(-1, (-1, kind.categories)), -1).flatten(-2)
    return -(target * log_prob).sum(-1).mean()
