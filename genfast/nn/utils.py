"""Spectral normalization of one layer, as ``torch.nn.utils.parametrizations.spectral_norm``, or of a whole network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize

from genfast._checks import check_count, check_float_tensor
from genfast.ops.spectral_normalize import spectral_normalize

__all__ = ["SpectralNorm", "spectral_norm", "spectral_norm_network"]

Layer = TypeVar("Layer", bound=nn.Module)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


class SpectralNorm(nn.Module):
    """The parametrization that ``spectral_norm`` registers; holds u and v as buffers ``_u`` and ``_v``.

    Args:
        weight: that it will be given.
        n_power_iterations: at each call in training mode; none in evaluation.
        dim: the dimension of the outputs.
        eps: see ``genfast.ops.spectral_normalize``.
        shared: the weight is normalized with those of other layers before the network's forward; see
            ``spectral_norm_network``.
    """

    _u: Tensor
    _v: Tensor

    def __init__(
        self, weight: Tensor, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12, *, shared: bool = False
    ) -> None:
        super().__init__()
        check_float_tensor("spectral_norm", "weight", weight)
        check_count("spectral_norm", "n_power_iterations", n_power_iterations, 1)
        if not -weight.dim() <= dim < weight.dim():
            raise IndexError(
                f"spectral_norm: dim must be in [{-weight.dim()}, {weight.dim() - 1}] with a weight of shape "
                f"{tuple(weight.shape)}, got {dim}"
            )
        self.n_power_iterations, self.eps, self.shared = n_power_iterations, eps, shared
        self.dim = dim % weight.dim()
        self.current: Tensor | None = None  # what the network's forward in progress uses
        self.depth = 0  # of forwards of the network inside its forward
        if weight.dim() > 1:
            rows = weight.shape[self.dim]
            u = weight.new_empty(rows).normal_()
            v = weight.new_empty(weight[0].numel() if self.dim == 0 else weight.numel() // max(rows, 1)).normal_()
            self.register_buffer("_u", normalize(u, dim=0, eps=eps))
            self.register_buffer("_v", normalize(v, dim=0, eps=eps))
            with torch.no_grad():
                self.keep(*self._normalized(weight, 15)[1:])

    def _normalized(self, weight: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
        found = spectral_normalize(
            [weight], [self._u], [self._v], dim=[self.dim], n_power_iterations=iterations, eps=self.eps
        )
        return found.weights[0], found.u[0], found.v[0]

    def keep(self, u: Tensor, v: Tensor) -> None:
        """Writes new vectors into the buffers."""
        with torch.no_grad():
            self._u.copy_(u)
            self._v.copy_(v)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight over its spectral norm; in training mode after the power iterations."""
        if weight.dim() == 1:
            return normalize(weight, dim=0, eps=self.eps)
        if self.current is not None:
            return self.current
        iterations = self.n_power_iterations if self.training and not self.shared else 0
        out, u, v = self._normalized(weight, iterations)
        if iterations:
            self.keep(u, v)
        return out

    def right_inverse(self, value: Tensor) -> Tensor:
        """What an assignment to the layer's weight stores."""
        return value

    def extra_repr(self) -> str:
        return f"n_power_iterations={self.n_power_iterations}, dim={self.dim}, eps={self.eps}"


def _default_dim(module: nn.Module) -> int:
    return 1 if isinstance(module, _TRANSPOSED) else 0


def spectral_norm(
    module: Layer, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> Layer:
    """``torch.nn.utils.parametrizations.spectral_norm`` with genfast's kernel.

    The same arguments, ``state_dict`` keys and numbers, so that checkpoints go both ways. In training mode each reading
    of the weight runs the power iteration, in PyTorch's as here: for layers that a network uses several times, and to
    normalize all layers in one call, take ``spectral_norm_network``.

    Args:
        module: that has the weight.
        name: of the weight.
        n_power_iterations: at each reading of the weight in training mode, at least 1.
        eps: the least norm that vectors are divided by.
        dim: the dimension of the outputs; None: 1 for transposed convolutions, else 0.

    Returns:
        ``module``, parametrized.

    Raises:
        ValueError: where the module has no such tensor, or for less than one iteration.
        IndexError: for a dim that the weight does not have.

    Source: Miyato et al., "Spectral normalization for generative adversarial networks", ICLR 2018.

    Examples:
        >>> layer = spectral_norm(torch.nn.Linear(20, 40))
        >>> bool((torch.linalg.matrix_norm(layer.weight, 2) - 1).abs() < 0.1)
        True
        >>> [key for key in layer.state_dict() if key != "bias"]
        ['parametrizations.weight.original', 'parametrizations.weight.0._u', 'parametrizations.weight.0._v']
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"spectral_norm: {type(module).__name__} has no parameter or buffer named {name!r}")
    dim = _default_dim(module) if dim is None else dim
    parametrize.register_parametrization(module, name, SpectralNorm(weight, n_power_iterations, dim, eps))
    return module


def _parametrization(network: nn.Module, path: str, name: str) -> tuple[Tensor, SpectralNorm] | None:
    """(original weight, its parametrization), or None where it has been removed."""
    lists = getattr(network.get_submodule(path), "parametrizations", None)
    if lists is None or name not in lists:
        return None
    return lists[name].original, lists[name][0]


class _Before:
    """The hook that normalizes the layers; it knows their paths alone, so that copies of a network have their own."""

    def __init__(self, paths: Sequence[str], name: str) -> None:
        self.paths, self.name = tuple(paths), name

    def found(self, network: nn.Module) -> list[tuple[Tensor, SpectralNorm]]:
        pairs = [_parametrization(network, path, self.name) for path in self.paths]
        return [pair for pair in pairs if pair is not None]

    def __call__(self, network: nn.Module, args: Any) -> None:
        pairs = self.found(network)
        if not pairs:
            return
        if pairs[0][1].current is not None:
            pairs[0][1].depth += 1
            return
        groups: dict[Any, list[tuple[Tensor, SpectralNorm]]] = {}
        for weight, norm in pairs:
            iterations = norm.n_power_iterations if norm.training else 0
            groups.setdefault((weight.dtype, weight.device, iterations, norm.eps), []).append((weight, norm))
        for (_, _, iterations, eps), group in groups.items():
            out = spectral_normalize(
                [weight for weight, _ in group], [norm._u for _, norm in group], [norm._v for _, norm in group],
                dim=[norm.dim for _, norm in group], n_power_iterations=iterations, eps=eps,
            )  # fmt: skip
            for i, (_, norm) in enumerate(group):
                norm.current = out.weights[i]
                if iterations:
                    norm.keep(out.u[i], out.v[i])


class _After:
    """Lets go of the normalized weights."""

    def __init__(self, before: _Before) -> None:
        self.before = before

    def __call__(self, network: nn.Module, args: Any, output: Any) -> None:
        pairs = self.before.found(network)
        if pairs and pairs[0][1].depth > 0:
            pairs[0][1].depth -= 1
            return
        for _, norm in pairs:
            norm.current = None


def spectral_norm_network(
    network: Layer,
    *,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    layers: type[nn.Module] | tuple[type[nn.Module], ...] = _LAYERS,
) -> Layer:
    """Spectral normalization of all layers of a network, in one call before its forward.

    The power iteration runs once for each forward of the network in training mode, also for layers that it uses several
    times, which see one weight. Outside a forward of the network a layer's weight is normalized with u and v as they
    are. ``state_dict`` has the keys that ``spectral_norm`` of each layer would give. With activation checkpointing,
    run the backward before the next forward: recomputation reads the current u and v.

    Args:
        network: any module; its layers are parametrized in place.
        name: of the weights.
        n_power_iterations: at each forward of the network in training mode, at least 1.
        eps: the least norm that vectors are divided by.
        layers: the types of layers to normalize; by default linear layers, embeddings and (transposed) convolutions.

    Returns:
        ``network``, with its hooks.

    Raises:
        ValueError: where the network has no such layer, or one whose weight is parametrized already.

    Source: Miyato et al., "Spectral normalization for generative adversarial networks", ICLR 2018.

    Examples:
        >>> net = spectral_norm_network(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()))
        >>> net(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 8, 6, 6])
    """
    chosen = {}
    for path, layer in network.named_modules():
        weight = getattr(layer, name, None) if isinstance(layer, layers) else None
        if isinstance(weight, Tensor) and weight.dim() > 1:
            if parametrize.is_parametrized(layer, name):
                raise ValueError(f"spectral_norm_network: {name} of layer {path!r} is parametrized already")
            chosen[path] = layer
    if not chosen:
        raise ValueError(f"spectral_norm_network: {type(network).__name__} has no layer with a matrix {name!r}")
    for layer in chosen.values():
        norm = SpectralNorm(getattr(layer, name), n_power_iterations, _default_dim(layer), eps, shared=True)
        parametrize.register_parametrization(layer, name, norm)
    before = _Before(list(chosen), name)
    network.register_forward_pre_hook(before, prepend=True)
    network.register_forward_hook(_After(before), prepend=True, always_call=True)
    return network
