"""Checks of the kernels of vector quantization: indices, sums, and derivatives through the public ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from genfast import ops
from genfast.ops.vector_quantize import reference
from genfast.verify import _gpu
from genfast.verify._core import Check, Context, Tensor

__all__ = ["CHECKS"]

#: (rows, codes, dim)
SHAPES = (
    (1, 1, 1), (3, 5, 2), (70, 90, 17), (17, 130, 64), (129, 3, 40), (66, 257, 96), (5, 64, 128), (40, 65, 300),
    (513, 512, 64), (2, 1025, 33),
)  # fmt: skip


def _cases(c: Context) -> Iterator[tuple[torch.dtype, tuple[int, int, int]]]:
    shapes = SHAPES[:5] if c.size_class == "tiny" else SHAPES
    if c.size_class in ("full", "some"):
        shapes = (*shapes, (4099, 2000, 64))
    for turn, shape in enumerate(shapes):
        for dtype in c.dtypes_of(turn):
            yield dtype, shape


def _compare(c: Context, z: Tensor, codebook: Tensor, note: str) -> Tensor:
    found = ops.vector_quantize(z, codebook, reduction="none")
    where = f"z {tuple(z.shape)} {z.dtype}, {len(codebook)} codes, {note}"
    flat, codes = z.detach().cpu().reshape(-1, z.shape[-1]), codebook.detach().cpu()
    want = reference(flat, codes)
    got = found.indices.cpu().reshape(-1)
    c.require(
        torch.equal(got, want), f"{int((got != want).sum())} of {len(want)} indices are not the nearest's; {where}"
    )
    chosen = codes[want]
    c.same_bits("z_q", found.z_q.detach().cpu().reshape(chosen.shape), chosen, where)
    distance = (flat.double() - chosen.double()).square().sum(1)
    for name, error in (("codebook", found.codebook_loss), ("commitment", found.commitment_loss)):
        c.compare(f"{name} error", error.reshape(-1), distance, distance, where=where)
    c.ran(z.dtype, (len(flat), *codes.shape), note)
    return found.indices


def indices(c: Context) -> None:
    """All sizes and dtypes, of random vectors."""
    for dtype, (rows, codes, dim) in _cases(c):
        _compare(c, c.normal(rows, dim, dtype=dtype), c.normal(codes, dim, dtype=dtype), "random")


def ties(c: Context) -> None:
    """Equal codes, more than are kept; all codes equally far: the lowest index."""
    for dtype in c.dtypes:
        distinct = c.normal(9, 6, dtype=dtype)
        copies = distinct[torch.arange(200, device=c.device) % 9]
        _compare(c, c.normal(40, 6, dtype=dtype), copies, "equal codes")
        _compare(c, c.normal(3, 6, dtype=dtype), torch.zeros(70, 6, dtype=dtype, device=c.device), "zero codes")


def near_ties(c: Context) -> None:
    """Codes that differ in their last bits, where the screening cannot tell."""
    for dtype in c.dtypes:
        for offset in (0.0, 100.0):
            center = c.normal(8, dtype=torch.float64) + offset
            step = torch.finfo(dtype).eps * center.abs()
            # exact in float64 but for float64 itself, where the reference has more digits
            around = [step * torch.randint(-2, 3, (n, 8), generator=c.generator).to(c.device) for n in (70, 30)]
            codebook, z = ((center + change).to(dtype) for change in around)
            if dtype != torch.float64 or c.backend in ("cpp", "reference"):
                _compare(c, z, codebook, "near ties")


def magnitudes(c: Context) -> None:
    """Numbers whose products overflow or vanish."""
    for scale in (1e-42, 1e-25, 1e-12, 1e12, 1e18, 1e25):
        z, codebook = ((c.normal(20, 5, dtype=torch.float64) * scale).float() for _ in range(2))
        got = ops.nearest_code(z, codebook).indices.cpu()
        c.require(torch.equal(got, reference(z.cpu(), codebook.cpu())), f"wrong indices at magnitude {scale}")
        c.ran(z.dtype, (20, 20, 5), "magnitudes")


def layouts(c: Context) -> None:
    """Transposed, expanded, misaligned and batched vectors; a strided codebook."""
    for dtype in c.main_dtypes:
        codebook = c.normal(12, 6, dtype=dtype)
        for name, z in (
            ("channels first", c.normal(2, 6, 5, 3, dtype=dtype).movedim(1, -1)),
            ("expanded", c.normal(1, 6, dtype=dtype).expand(5, 6)),
            ("misaligned", c.normal(31, dtype=dtype)[1:].view(5, 6)),
            ("one vector", c.normal(6, dtype=dtype)),
        ):
            _compare(c, z, codebook, name)
            _compare(c, z, codebook.T.contiguous().T, "strided codebook")


def sums(c: Context) -> None:
    """Sums and counts of each code's rows, codes without rows, and a code with nearly all."""
    for dtype, (rows, codes, dim) in _cases(c):
        x = c.normal(rows, dim, dtype=dtype)
        chosen = torch.randint(codes, (rows,), generator=c.generator)
        chosen[: rows // 2] = codes - 1
        total, counts = ops.code_sums(x, chosen.to(c.device), codes)
        zeros = torch.zeros(codes, dim, dtype=torch.float64)
        exact = zeros.index_add(0, chosen, x.cpu().double())
        scale = zeros.index_add(0, chosen, x.cpu().double().abs())
        c.compare("sums", total, exact, scale, where=f"x {tuple(x.shape)}, {codes} codes")
        c.same_bits("counts", counts.cpu(), chosen.bincount(minlength=codes))
        c.ran(dtype, (rows, codes, dim), "sums")


def _formula(z: Tensor, codebook: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    codes = codebook[at]
    loss = (z.detach() - codes).square().sum() + 0.25 * (z - codes.detach()).square().sum()
    return z + (codes - z).detach(), loss


def gradients(c: Context) -> None:
    """First and second derivatives of the straight-through formula and its losses."""
    for dtype in c.dtypes:
        primals = c.normal(33, 10, dtype=dtype), c.normal(7, 10, dtype=dtype)
        weight, v, w = c.normal(33, 10, dtype=dtype), c.normal(33, 10, dtype=dtype), c.normal(7, 10, dtype=dtype)

        def derivatives(out: Any, z: Tensor, codebook: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            z_q, loss = out(z, codebook)
            weight, v, w = rest
            first = torch.autograd.grad((z_q * weight).sum() + loss, (z, codebook), create_graph=True)
            second = torch.autograd.grad((first[0] * v).sum() + (first[1] * w).sum(), (z, codebook))
            return *first, *second

        def ours(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
            found = ops.vector_quantize(z, codebook, reduction="sum")
            return found.z_q, found.loss

        got = derivatives(ours, *(p.clone().requires_grad_() for p in primals), weight, v, w)
        at = reference(*(p.cpu() for p in primals))
        exact = [t.cpu().double() for t in (*primals, weight, v, w)]
        leaves = [t.requires_grad_() for t in exact[:2]]
        want = derivatives(lambda z, codes: _formula(z, codes, at), *leaves, *exact[2:])  # noqa: B023 - called now
        names = ("gradient of z", "gradient of the codebook", "second derivative of z", "second of the codebook")
        for name, left, right in zip(names, got, want, strict=True):
            c.compare_norm(name, left, right.detach(), where=str(dtype))
        c.ran(dtype, (33, 7, 10), "double backward")


def jvp(c: Context) -> None:
    """Forward mode: z_q moves as z does, the losses as their formulas."""
    for dtype in c.dtypes:
        z, codebook = c.normal(20, 10, dtype=dtype), c.normal(7, 10, dtype=dtype)
        v, w = c.normal(20, 10, dtype=dtype), c.normal(7, 10, dtype=dtype)

        def call(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
            found = ops.vector_quantize(z, codebook, reduction="sum")
            return found.z_q, found.loss

        moved, change = torch.func.jvp(call, (z, codebook), (v, w))[1]
        c.same_bits("tangent of z_q", moved, v)
        at = reference(z.cpu(), codebook.cpu())
        exact = [t.cpu().double() for t in (z, codebook, v, w)]
        gap = exact[0] - exact[1][at]
        terms = torch.stack((-2 * gap * exact[3][at], 0.5 * gap * exact[2]))
        c.compare("tangent of the loss", change, terms.sum(), terms.abs().sum(), where=str(dtype))
        c.ran(dtype, (20, 7, 10), "jvp")


def zero_sizes(c: Context) -> None:
    """No vectors."""
    for dtype in c.dtypes:
        z, codebook = torch.zeros(0, 3, dtype=dtype, device=c.device), c.normal(4, 3, dtype=dtype)
        found = ops.vector_quantize(z, codebook)
        c.require(found.z_q.shape == (0, 3) and found.indices.shape == (0,), "no vectors give vectors")
        total, counts = ops.code_sums(z, found.indices, 4)
        c.require(not bool(total.any()) and not bool(counts.any()), "no vectors have sums")
        c.ran(dtype, (0, 4, 3), "zero sizes")


def _call(first: Tensor, second: Tensor, seed: Any) -> tuple[Tensor, ...]:
    """The op and its gradients; nothing is drawn."""
    z, codebook = first.detach().requires_grad_(), second[: max(1, len(second) // 2)].detach().requires_grad_()
    found = ops.vector_quantize(z, codebook)
    return found.z_q.detach(), found.indices, *torch.autograd.grad(found.loss, (z, codebook))


def determinism(c: Context) -> None:
    """Bit for bit the same on every run."""
    _gpu.repeats(c, (4099, 64), (70, 20), _call)


def streams(c: Context) -> None:
    """Runs on the current stream, not on the default one; and on a device that is not the current one."""
    _gpu.on_side_stream(c, (130, 64), _call)


CHECKS = (
    Check("indices", indices),
    Check("ties", ties),
    Check("near ties", near_ties),
    Check("magnitudes", magnitudes),
    Check("layouts", layouts),
    Check("sums", sums),
    Check("gradients", gradients),
    Check("jvp", jvp),
    Check("zero sizes", zero_sizes),
    Check("determinism", determinism),
    Check("streams", streams, gpu_only=True),
)
