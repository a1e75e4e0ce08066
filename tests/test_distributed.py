"""Attention over several processes is attention of the whole; merge_attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import genfast
from genfast import ops
from genfast.distributed import ring_attention

Tensor = torch.Tensor

LENGTH = 12  # positions of a process
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (3, 5)},
    "narrow": {"causal": True, "window": (4, None), "softcap": 2.0},
    "alibi": {"causal": True, "alibi_slopes": True, "scale": 0.2},
    "t5": {"relative_bias": True},
}


def inputs(size: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """(q, k, v) of the whole sequence, and the parameters that options may have."""
    torch.manual_seed(0)
    shapes = ((2, 4, size * LENGTH, 8), (2, 2, size * LENGTH, 8), (2, 2, size * LENGTH, 12))
    return [torch.randn(shape) for shape in shapes], torch.rand(4), torch.randn(8, 4)


def options_of(case: str, slopes: Tensor, table: Tensor) -> dict[str, Any]:
    options = dict(CASES[case])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = slopes
    if "relative_bias" in options:
        options["relative_bias"] = ops.T5Bias(table, True, 20)
    return options


def everything(attention: Any, tensors: list[Tensor], parameters: list[Tensor], case: str, rows: slice) -> list[Tensor]:
    """Values, first gradients, and the gradients of a penalty on them; the loss weighs the positions of ``rows``."""
    leaves = [x.detach().clone().requires_grad_() for x in (*tensors, *parameters)]
    out, lse = attention(*leaves[:3], return_lse=True, **options_of(case, *leaves[3:]))
    positions = torch.arange(rows.start, rows.stop, dtype=out.dtype).view(-1, 1)
    loss = (out * torch.sin(positions)).sum() + (lse * torch.cos(positions[:, 0])).sum()
    first = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    again = torch.autograd.grad(loss, leaves[:3], create_graph=True)
    penalty = sum((g * torch.cos(3 * positions)).square().sum() for g in again)
    second = torch.autograd.grad(penalty, leaves[:3])
    zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, first, strict=True)]
    return [out.detach(), lse.detach(), *zeros, *second]


def _worker(rank: int, folder: str, size: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    tensors, *parameters = inputs(size)
    rows = slice(rank * LENGTH, (rank + 1) * LENGTH)
    own = [x[:, :, rows] for x in tensors]
    results = {case: everything(ring_attention, own, parameters, case, rows) for case in CASES}
    if size == 2:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (size,))
        q, k, v = (distribute_tensor(x.requires_grad_(), mesh, [Shard(2)]) for x in tensors)
        out = ring_attention(q, k, v, causal=True)
        assert isinstance(out, DTensor)
        assert out.shape == (2, 4, size * LENGTH, 12)
        assert out.placements == (Shard(2),)
        results["dtensor"] = [out.to_local().detach()]
        half = [x.detach()[:, :, rows].bfloat16() for x in tensors]
        results["bfloat16"] = [ring_attention(*half, causal=True)]
        with pytest.raises(ValueError, match="q must be a DTensor sharded in dimension 2"):
            ring_attention(distribute_tensor(tensors[0], mesh, [Shard(1)]), k, v)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_ring_is_one_process(size: int, tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path), size), nprocs=size)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    tensors, *parameters = inputs(size)
    for case in CASES:
        whole = everything(ops.attention, tensors, parameters, case, slice(0, size * LENGTH))
        for i, exact in enumerate(whole):
            parts = [rank[case][i] for rank in ranks]
            found = sum(parts) if i in (5, 6) else torch.cat(parts, 2)  # parameters: summed over processes
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=2e-5, msg=lambda m, i=i: f"{case} {i}: {m}")  # noqa: B023
    if size == 2:
        whole = ops.attention(*tensors, causal=True)
        torch.testing.assert_close(torch.cat([r["dtensor"][0] for r in ranks], 2), whole, rtol=1e-4, atol=1e-5)
        half = torch.cat([r["bfloat16"][0] for r in ranks], 2)
        torch.testing.assert_close(half.float(), whole, rtol=0.02, atol=0.02)


def test_a_ring_needs_a_group() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="init_process_group"):
        ring_attention(q, q, q)


# ---- merge_attention ----


def halves(q: Tensor, k: Tensor, v: Tensor, cut: int = 5) -> tuple[Tensor, ...]:
    first = ops.attention(q, k[:, :, :cut], v[:, :, :cut], return_lse=True)
    return (*first, *ops.attention(q, k[:, :, cut:], v[:, :, cut:], return_lse=True))


def test_merged_halves_are_the_whole() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 8, dtype=torch.float64).unbind()
    out, lse = ops.merge_attention(*halves(q, k, v))
    exact, exact_lse = ops.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(lse, exact_lse)
    out, lse = ops.merge_attention(*halves(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.double(), exact, rtol=0.03, atol=0.03)


def test_derivatives_of_a_merge() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ops.merge_attention(*halves(q, k, v, 1))

    assert torch.autograd.gradcheck(function, (q, k, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (q, k, v))


def test_queries_that_saw_nothing() -> None:
    """On one side, and on both: no NaN in values or gradients, and huge scores do not overflow."""
    out1 = torch.tensor([[1.0, 2], [0, 0], [3, 4]], requires_grad=True)
    out2 = torch.tensor([[0.0, 0], [0, 0], [5, 6]], requires_grad=True)
    lse1 = torch.tensor([0.5, -torch.inf, 1e4], requires_grad=True)
    lse2 = torch.tensor([-torch.inf, -torch.inf, 1e4], requires_grad=True)
    out, lse = ops.merge_attention(out1, lse1, out2, lse2)
    assert out.tolist() == [[1, 2], [0, 0], [4, 5]]
    assert lse.tolist() == [0.5, -torch.inf, pytest.approx(1e4 + 0.693, abs=1e-2)]
    gradients = torch.autograd.grad(out.sum() + lse[[0, 2]].sum(), (out1, lse1, out2, lse2))
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[1][0] == 1


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(2, 3, dtype=torch.int64), TypeError, "out1 must be float32"),
        (1, torch.zeros(3), ValueError, "lse"),
        (1, torch.zeros(2).double(), TypeError, "lse"),
        (2, torch.zeros(2, 4), ValueError, r"out2 has shape \(2, 4\), out1 \(2, 3\)"),
        (2, torch.zeros(2, 3).half(), TypeError, "out2 is torch.float16, out1 torch.float32"),
        (3, 1.0, TypeError, "lse2 must be a torch.Tensor"),
    ],
)
def test_bad_merges(position: int, value: Any, error: type[Exception], message: str) -> None:
    args: list[Any] = [torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 3), torch.zeros(2)]
    args[position] = value
    with pytest.raises(error, match=message):
        ops.merge_attention(*args)


def test_compiled_merge() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 8).unbind()
    compiled = torch.compile(lambda *x: ops.merge_attention(*halves(*x)), fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v)[0], genfast.ops.attention(q, k, v), rtol=1e-5, atol=1e-6)
