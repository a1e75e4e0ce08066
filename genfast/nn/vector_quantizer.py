"""The codebook layer of vector-quantized autoencoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from genfast import ops, random
from genfast._checks import check_count, check_float_tensor, shape_of, wide
from genfast.ops.vector_quantize import VectorQuantized, checked_beta, perplexity

__all__ = ["VectorQuantizer"]

INITS = ("uniform", "kmeans")
_KMEANS_STEP = 2**32 - 1  # of the noise that picks first centers; updates count from 0


class VectorQuantizer(nn.Module):
    """Replaces vectors by their nearest of ``num_codes`` codes, and learns the codes.

    The codebook learns by gradients of the codebook loss (``decay=None``), or follows running means of the vectors that
    each code takes (a ``decay``): in training mode a call quantizes with the codebook as it is, then updates it. In
    eval mode nothing changes. All state is in the ``state_dict``: a run resumes bit for bit.

    A code whose running count falls below ``revive_below`` moves to a vector of the current batch, picked by
    counter-based noise from ``seed`` and the number of updates, the same on every backend; other dead codes take other
    vectors. It then keeps its place until its count has halved twice over.

    Inside an initialized ``torch.distributed`` process group counts, sums and picks are reduced over all ranks, so that
    they keep one codebook, that of one process with the whole batch. All ranks must make the training calls together.

    Args:
        num_codes: K.
        dim: D, of the vectors.
        beta: weight of the commitment loss.
        decay: of the running means, in [0, 1); None: the codebook is a parameter.
        eps: Laplace smoothing of the running counts: each is (count + eps) / (total + K eps) of the total.
        revive_below: running count below which a code is revived; 0: never.
        cosine: vectors and codes are compared, and z_q is given, scaled to length 1.
        init: "uniform" in [-1/K, 1/K], or "kmeans" of the first training batch.
        kmeans_iterations: of that.
        channel_last: vectors lie in the last dimension, [..., D]; False: in the second, [B, D, H, W].
        sync: reduce over the ranks of a process group, where there is one.
        seed: int or 0-d int64 tensor; None draws it from torch's default generator.
        device: of the codebook.
        dtype: of the codebook.

    Raises:
        TypeError: for arguments of other types.
        ValueError: for arguments outside their ranges.

    Source: van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning", 2017, section 3 and
    appendix A.1; revival of dead codes: Dhariwal et al., "Jukebox", 2020, section 3.1.

    Examples:
        >>> import torch
        >>> layer = VectorQuantizer(16, 4, channel_last=False, seed=0)
        >>> found = layer(torch.randn(2, 4, 8, 8))
        >>> found.z_q.shape, found.indices.shape
        (torch.Size([2, 4, 8, 8]), torch.Size([2, 8, 8]))
        >>> layer.lookup(found.indices).shape
        torch.Size([2, 4, 8, 8])
    """

    codebook: Tensor
    sums: Tensor | None
    counts: Tensor
    updates: Tensor
    seed: Tensor
    initialized: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        beta: float = 0.25,
        decay: float | None = 0.99,
        eps: float = 1e-5,
        revive_below: float = 0.0,
        cosine: bool = False,
        init: str = "uniform",
        kmeans_iterations: int = 10,
        channel_last: bool = True,
        sync: bool = True,
        seed: int | Tensor | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "VectorQuantizer"
        self.num_codes = check_count(name, "num_codes", num_codes, 1, 2**31)
        self.dim = check_count(name, "dim", dim, 1)
        checked_beta(name, beta)
        for argument, value, most in (("decay", decay, 1.0), ("eps", eps, None), ("revive_below", revive_below, None)):
            if value is None and argument == "decay":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}: {argument} must be a float, got {type(value).__name__}")
            if not 0 <= value < (float("inf") if most is None else most):
                bound = "at least 0 and finite" if most is None else "in [0, 1)"
                raise ValueError(f"{name}: {argument} must be {bound}, got {value}")
        if init not in INITS:
            raise ValueError(f"{name}: init must be one of {', '.join(map(repr, INITS))}, got {init!r}")
        self.kmeans_iterations = check_count(name, "kmeans_iterations", kmeans_iterations, 0)
        self.beta, self.decay, self.eps, self.revive_below = beta, decay, eps, revive_below
        self.cosine, self.init, self.channel_last, self.sync = cosine, init, channel_last, sync
        codebook = torch.empty(num_codes, dim, device=device, dtype=dtype)
        check_float_tensor(name, "the codebook", codebook)
        if decay is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.register_buffer("sums", None if decay is None else torch.empty_like(codebook, dtype=wide(codebook.dtype)))
        self.register_buffer("counts", torch.empty(num_codes, device=device, dtype=wide(codebook.dtype)))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("seed", random.as_seed(seed, codebook.device).clone().to(codebook.device))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the codebook anew from torch's default generator, and forgets what was counted."""
        with torch.no_grad():
            nn.init.uniform_(self.codebook, -1 / self.num_codes, 1 / self.num_codes)
            self._start(self.codebook)
            self.updates.zero_()
            self.initialized.fill_(self.init != "kmeans")
        self._ready = self.init != "kmeans"

    @torch.no_grad()
    def _start(self, codebook: Tensor) -> None:
        """Takes a codebook, each code counted once."""
        self.codebook.copy_(normalize(codebook, dim=-1) if self.cosine else codebook)
        self.counts.fill_(1.0)
        if self.sums is not None:
            self.sums.copy_(self.codebook)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = self.initialized.is_meta or bool(self.initialized)

    # ---- calls ----

    def _vectors(self, z: Any) -> Tensor:
        """z with its vectors last, in the codebook's dtype, scaled to length 1 with ``cosine``."""
        check_float_tensor("VectorQuantizer", "z", z)
        if not self.channel_last:
            if z.dim() < 2 or z.shape[1] != self.dim:
                raise ValueError(f"VectorQuantizer: z must be [B, {self.dim}, ...], got {shape_of(z)}")
            z = z.movedim(1, -1)
        elif z.dim() < 1 or z.shape[-1] != self.dim:
            raise ValueError(f"VectorQuantizer: z must be [..., {self.dim}], got {shape_of(z)}")
        z = z.to(self.codebook.dtype)
        return normalize(z, dim=-1) if self.cosine else z

    def _codes(self) -> Tensor:
        return normalize(self.codebook, dim=-1) if self.cosine else self.codebook

    def forward(self, z: Tensor) -> VectorQuantized:
        """Quantizes z and, in training mode, updates the codebook.

        Args:
            z: [..., D], or [B, D, ...] with ``channel_last=False``; any floating-point dtype.

        Returns:
            (z_q of z's shape and dtype, indices [...] int64, loss, codebook_loss, commitment_loss), losses being means
            over the elements of z. With a ``decay`` ``loss`` is beta times the commitment loss, for the codebook has no
            gradient.

        Raises:
            TypeError: for something else than a floating-point tensor.
            ValueError: for another D, another device; on the CPU for NaN or infinity in z.
        """
        vectors = self._vectors(z)
        if self.training and not self._ready:
            self._init_by_kmeans(vectors.detach())
        codes = self._codes()
        if self.training and not self.cosine:
            codes = codes.clone()  # what the backward needs; the codebook itself changes below
        found = ops.vector_quantize(vectors, codes, beta=self.beta)
        if self.training and (self.decay is not None or self.revive_below > 0):
            self._update(vectors.detach(), found.indices)
        z_q = found.z_q if self.channel_last else found.z_q.movedim(-1, 1)
        loss = found.loss if self.decay is None else self.beta * found.commitment_loss
        return found._replace(z_q=z_q.to(z.dtype), loss=loss)

    def encode(self, z: Tensor) -> Tensor:
        """The indices [...] of the codes nearest to z; changes nothing."""
        return ops.nearest_code(self._vectors(z).detach(), self._codes().detach()).indices

    def lookup(self, indices: Tensor) -> Tensor:
        """The codes at int64 indices [...]: [..., D], or [B, D, ...] with ``channel_last=False``."""
        codes = nn.functional.embedding(indices, self._codes())
        return codes if self.channel_last else codes.movedim(-1, 1)

    def perplexity(self) -> Tensor:
        """e^H of the running counts, 0-d float32: the number of codes evenly in use. 1 to K."""
        return perplexity(self.counts)

    # ---- updates ----

    def _reduce(self, total: Tensor) -> Tensor:
        if self._distributed():
            torch.distributed.all_reduce(total)
        return total

    def _distributed(self) -> bool:
        distributed = torch.distributed
        return self.sync and distributed.is_available() and distributed.is_initialized()

    def _placed(self, rows: Tensor) -> tuple[int | Tensor, int | Tensor]:
        """(number of rows over all ranks, index of this rank's first)."""
        count = rows.shape[0]
        if not self._distributed():
            return count, 0
        rank = torch.distributed.get_rank()
        sizes = torch.zeros(torch.distributed.get_world_size(), dtype=torch.int64, device=rows.device)
        sizes[rank] = count
        self._reduce(sizes)
        return sizes.sum(), sizes[:rank].sum()

    def _picked(self, rows: Tensor, step: int | Tensor) -> Tensor:
        """A row for each code, [K, D] float64, summed over ranks: no row twice where there are as many as codes.

        Code k takes a random one of rows floor(k N / K) ... floor((k + 1) N / K) - 1, of the N rows of all ranks.
        """
        codes, count = self.num_codes, rows.shape[0]
        total, first = self._placed(rows)
        code = torch.arange(codes, device=rows.device)
        low, high = code * total // codes, (code + 1) * total // codes
        uniform = random.uniform(codes, self.seed, step=step).to(device=rows.device, dtype=torch.float64)
        at = low + ((high - low) * uniform).to(torch.int64)
        if count == 0:
            return rows.new_zeros((codes, self.dim), dtype=torch.float64)
        local = at - first
        mine = (local >= 0) & (local < count)
        return rows[local.clamp(0, count - 1)].to(torch.float64) * mine.unsqueeze(-1)

    def _totals(self, rows: Tensor, indices: Tensor, picked: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(counts [K], sums [K, D], picked [K, D or 0]) of all ranks, float64."""
        sums, counts = ops.code_sums(rows, indices, self.num_codes)
        parts = [counts.to(torch.float64).unsqueeze(-1), sums.to(torch.float64)]
        parts.append(sums.new_zeros((self.num_codes, 0), dtype=torch.float64) if picked is None else picked)
        total = self._reduce(torch.cat(parts, dim=1))
        return total[:, 0], total[:, 1 : 1 + self.dim], total[:, 1 + self.dim :]

    @torch.no_grad()
    def _update(self, vectors: Tensor, indices: Tensor) -> None:
        rows, indices = vectors.reshape(-1, self.dim), indices.reshape(-1)
        if rows.shape[0] == 0 and not self._distributed():
            return
        picked = self._picked(rows, self.updates & 0xFFFFFFFF) if self.revive_below > 0 else None
        counts, sums, picked = self._totals(rows, indices, picked)
        decay = 0.99 if self.decay is None else self.decay
        counts = decay * self.counts.to(torch.float64) + (1 - decay) * counts
        codebook = self.codebook.to(torch.float64)
        if self.sums is not None:
            sums = decay * self.sums.to(torch.float64) + (1 - decay) * sums
            total = counts.sum()
            smoothed = (counts + self.eps) / (total + self.num_codes * self.eps) * total
            codebook = sums / smoothed.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
            if self.cosine:
                codebook = normalize(codebook, dim=-1)
        if self.revive_below > 0:
            dead = counts < self.revive_below
            restart = 2 * self.revive_below
            counts = counts.masked_fill(dead, restart)
            codebook = torch.where(dead.unsqueeze(-1), picked, codebook)
            sums = torch.where(dead.unsqueeze(-1), picked * restart, sums)
        self.codebook.copy_(codebook)
        self.counts.copy_(counts)
        if self.sums is not None:
            self.sums.copy_(sums)
        self.updates.add_(1)

    @torch.no_grad()
    def _init_by_kmeans(self, vectors: Tensor) -> None:
        """Lloyd's iterations from picked rows; a center that takes no row stays."""
        rows = vectors.reshape(-1, self.dim)
        if rows.shape[0] == 0 and not self._distributed():
            return
        centers = self._reduce(self._picked(rows, _KMEANS_STEP))
        for _ in range(self.kmeans_iterations):
            indices = ops.nearest_code(rows, centers.to(rows.dtype)).indices
            counts, sums, _ = self._totals(rows, indices)
            means = sums / counts.clamp(min=1).unsqueeze(-1)
            centers = torch.where((counts > 0).unsqueeze(-1), means, centers)
            if self.cosine:
                centers = normalize(centers, dim=-1)
        self._start(centers.to(self.codebook.dtype))
        self.initialized.fill_(True)
        self._ready = True

    def extra_repr(self) -> str:
        return (
            f"{self.num_codes}, {self.dim}, beta={self.beta}, decay={self.decay}, revive_below={self.revive_below}, "
            f"cosine={self.cosine}, channel_last={self.channel_last}"
        )
