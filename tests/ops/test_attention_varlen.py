"""Attention over packed sequences is that over each of them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import genfast
from genfast import ops

Tensor = torch.Tensor

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 8, 12
Q_STARTS, K_STARTS = [0, 9, 9, 10, 30, 37], [0, 20, 26, 26, 46, 60]  # one without queries, one without keys
SEQUENCES, MOST_Q, MOST_K = 5, 20, 20
OPTIONS = (
    "plain", "causal", "top-left", "window", "bias", "bias-shared", "bias-keys", "bias-queries", "mask", "mask-keys",
    "alibi", "alibi-own", "t5", "softcap", "sinks", "dropout", "scale",
)  # fmt: skip


def qkv(dtype: torch.dtype, rows: int = 0) -> list[Tensor]:
    torch.manual_seed(3)
    shapes = ((37 + rows, HEADS, WIDTH), (60 + rows, KV_HEADS, WIDTH), (60 + rows, KV_HEADS, VALUE_WIDTH))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def option(name: str, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def bias(*shape: int) -> dict[str, Any]:
        return {"bias": torch.randn(shape, dtype=dtype, requires_grad=True)}

    def slopes(*shape: int) -> dict[str, Any]:
        return {"alibi_slopes": torch.rand(shape, dtype=wide).requires_grad_()}

    made: dict[str, Any] = {
        "plain": lambda: {},
        "causal": lambda: {"causal": True},
        "top-left": lambda: {"causal": "top_left", **slopes(HEADS)},
        "window": lambda: {"window": (5, 2)},
        "bias": lambda: bias(SEQUENCES, HEADS, MOST_Q, MOST_K),
        "bias-shared": lambda: bias(HEADS, MOST_Q + 3, MOST_K + 1),
        "bias-keys": lambda: {**bias(SEQUENCES, 1, 1, MOST_K), "seed": 3, "dropout_p": 0.2},
        "bias-queries": lambda: {**bias(1, HEADS, MOST_Q, 1), **slopes(SEQUENCES, HEADS)},
        "mask": lambda: {"mask": torch.rand(SEQUENCES, 1, MOST_Q, MOST_K) < 0.7},
        "mask-keys": lambda: {"mask": torch.rand(SEQUENCES, 1, 1, MOST_K + 5) < 0.7},
        "alibi": lambda: {**slopes(HEADS), "causal": True},
        "alibi-own": lambda: slopes(SEQUENCES, HEADS),
        "t5": lambda: {"relative_bias": ops.T5Bias(torch.randn(8, HEADS, dtype=wide).requires_grad_(), True, 9)},
        "softcap": lambda: {"softcap": 1.5, "causal": True},
        "sinks": lambda: {"sinks": torch.randn(HEADS, dtype=wide).requires_grad_(), "window": (3, None)},
        "dropout": lambda: {"dropout_p": 0.4, "seed": 5, "causal": True},
        "scale": lambda: {"scale": 0.1},
    }
    return made[name]()


def leaves(options: dict[str, Any]) -> list[Tensor]:
    found = [x.table if isinstance(x, ops.T5Bias) else x for x in options.values()]
    return [x for x in found if isinstance(x, Tensor) and x.requires_grad]


def starts(dtype: torch.dtype = torch.int64) -> list[Tensor]:
    return [torch.tensor(x, dtype=dtype) for x in (Q_STARTS, K_STARTS)]


def packed(tensors: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return ops.attention_varlen(*tensors, *starts(), return_lse=True, **options)


def looped(tensors: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same, one sequence after the other."""
    q, k, v = tensors
    outs, lses = [], []
    for n in range(SEQUENCES):
        rows, columns = slice(*Q_STARTS[n : n + 2]), slice(*K_STARTS[n : n + 2])
        own: dict[str, Any] = {"batch_offset": n, **options}
        for name in ("bias", "mask"):
            if name in own:
                x = own[name]
                x = x[(None,) * (4 - x.dim())]
                x = x if x.shape[0] == 1 else x[n : n + 1]
                x = x if x.shape[2] == 1 else x[:, :, : rows.stop - rows.start]
                own[name] = x if x.shape[3] == 1 else x[..., : columns.stop - columns.start]
        if "alibi_slopes" in own and own["alibi_slopes"].dim() == 2:
            own["alibi_slopes"] = own["alibi_slopes"][n : n + 1]
        parts = (x.transpose(0, 1).unsqueeze(0) for x in (q[rows], k[columns], v[columns]))
        out, lse = ops.attention(*parts, return_lse=True, **own)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def derivatives(function: Any, tensors: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """(what has rows, what belongs to options): values, gradients, tangents and gradients of the tangents."""
    inputs = tensors + leaves(options)
    torch.manual_seed(6)
    directions = [torch.randn_like(x) for x in inputs]
    out, lse = function(tensors, options)
    weights = [torch.randn(x.shape, dtype=x.dtype) for x in (out, lse)]
    seen = torch.where(lse.isneginf(), 0.0, lse)
    first = torch.autograd.grad((out * weights[0]).sum() + (seen * weights[1]).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum((g * d).sum() for g, d in zip(first, directions, strict=True)), inputs)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), d) for x, d in zip(inputs, directions, strict=True)]
        remaining = iter(duals[3:])
        moved = dict(options)
        for name, x in options.items():
            if isinstance(x, ops.T5Bias):
                moved[name] = ops.T5Bias(next(remaining), x.bidirectional, x.max_distance)
            elif isinstance(x, Tensor) and x.requires_grad:
                moved[name] = next(remaining)
        tangents = [forward_ad.unpack_dual(x).tangent for x in function(duals[:3], moved)]
    rows = [out, lse, *first[:3], *second[:3], *tangents]
    return [x.detach() for x in rows], [x.detach() for x in (*first[3:], *second[3:])]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_bits_of_each_sequence_alone(name: str) -> None:
    """C++, float32: values, first and second derivatives and tangents."""
    options = option(name, torch.float32)
    rows, sums = derivatives(packed, qkv(torch.float32), options)
    alone, alone_sums = derivatives(looped, qkv(torch.float32), options)
    for i, (x, y) in enumerate(zip(rows, alone, strict=True)):
        assert torch.equal(x, y), (i, (x - y).abs().max())
    for x, y in zip(sums, alone_sums, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_plain_formula(name: str) -> None:
    """float64: all pairs of rows in one matrix, against the sequences one after the other."""
    options = option(name, torch.float64)
    found = derivatives(packed, qkv(torch.float64), options)
    exact = derivatives(looped, qkv(torch.float64), options)
    for x, y in zip((*found[0], *found[1]), (*exact[0], *exact[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_swin_windows_in_a_row() -> None:
    table = torch.randn(15, HEADS, requires_grad=True)
    bias = ops.WindowBias2d(table, (2, 3))
    q, k, v = torch.randn(3, 18, HEADS, WIDTH)
    cu = torch.tensor([0, 6, 12, 18])
    out = ops.attention_varlen(q, k, v, cu, relative_bias=bias)
    dense = [x.view(3, 6, HEADS, WIDTH).transpose(1, 2) for x in (q, k, v)]
    exact = ops.attention(*dense, relative_bias=bias)
    assert torch.equal(out, exact.transpose(1, 2).flatten(0, 1))
    (found,), (wanted,) = (torch.autograd.grad(x.square().sum(), table) for x in (out, exact))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a 2 x 3 window has 6 positions, a sequence has other"):
        ops.attention_varlen(q, k, v, torch.tensor([0, 5, 12, 18]), relative_bias=bias)


def test_half_precision_is_that_of_each_sequence(half: torch.dtype) -> None:
    for name in ("causal", "alibi", "bias-shared"):
        options = option(name, half)
        rows, sums = derivatives(packed, qkv(half), options)
        alone, alone_sums = derivatives(looped, qkv(half), options)
        assert all(torch.equal(x, y) for x, y in zip(rows, alone, strict=True))
        for x, y in zip(sums, alone_sums, strict=True):
            torch.testing.assert_close(x.float(), y.float(), rtol=0.05, atol=0.02 * float(y.abs().max()))


def test_rows_after_the_last_sequence_are_zero() -> None:
    q, k, v = qkv(torch.float32, rows=4)
    for backend in ("cpp", "reference"):
        with genfast.use_backend(backend):
            out, lse = packed([q, k, v], {"causal": True})
            gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert not out[37:].any()
        assert lse[37:].isneginf().all()
        assert not gradients[0][37:].any()
        assert not gradients[1][60:].any()
        assert not gradients[2][60:].any()
    same, _ = packed([x[:-4] for x in (q, k, v)], {"causal": True})
    assert torch.equal(same, packed([q, k, v], {"causal": True})[0][:37])


def test_rows_after_the_last_sequence_have_no_sink() -> None:
    for backend in ("cpp", "reference"):
        with genfast.use_backend(backend):
            options = option("sinks", torch.float32)
            inputs = [*qkv(torch.float32, rows=4), options["sinks"]]
            exact = [x.detach()[: len(x) - 4].requires_grad_() for x in inputs[:3]] + inputs[3:]
            rows, sums = derivatives(packed, inputs[:3], options)
            wanted, wanted_sums = derivatives(packed, exact[:3], options)
        assert rows[1][37:].isneginf().all()
        for x, y in zip(rows[:2], wanted[:2], strict=True):
            torch.testing.assert_close(x[:37], y)
        for x in sums:
            assert x.isfinite().all()
        assert [x.shape for x in sums] == [x.shape for x in wanted_sums]
        loss = [packed(x, options)[0].square().sum() for x in (inputs[:3], exact[:3])]
        found = [torch.autograd.grad(x, options["sinks"])[0] for x in loss]
        torch.testing.assert_close(*found)


def test_derivatives_by_finite_differences() -> None:
    torch.manual_seed(0)
    cu_q, cu_k = torch.tensor([0, 3, 4]), torch.tensor([0, 2, 5])
    tensors = [torch.randn(n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5)]
    bias = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention_varlen(q, k, v, cu_q, cu_k, bias=bias, softcap=2.0, return_lse=True)

    assert torch.autograd.gradcheck(function, (*tensors, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (*tensors, bias), check_fwd_over_rev=True)


def test_functional_transforms() -> None:
    q, k, v = (x.detach() for x in qkv(torch.float64))
    cu = starts()

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention_varlen(q, k, v, *cu, causal=True).square().sum()

    found = torch.func.grad(loss, (0, 1, 2))(q, k, v)
    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(looped(tensors, {"causal": True})[0].square().sum(), tensors)
    torch.testing.assert_close(found, exact)
    several = torch.func.vmap(lambda q: ops.attention_varlen(q, k, v, *cu))(torch.stack((q, 2 * q)))
    torch.testing.assert_close(several[1], ops.attention_varlen(2 * q, k, v, *cu))


@pytest.mark.parametrize("name", ["causal", "alibi", "mask", "dropout"])
def test_compiled_without_a_break(name: str) -> None:
    options = option(name, torch.float32)
    tensors = qkv(torch.float32)

    @torch.compile(fullgraph=True)
    def step(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        return ops.attention_varlen(q, k, v, cu_q, cu_k, **options)

    out = step(*tensors, *starts())
    exact, _ = packed(tensors, options)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)
    inputs = tensors + leaves(options)
    for x, y in zip(
        torch.autograd.grad(out.square().sum(), inputs), torch.autograd.grad(exact.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="q_starts must rise from 0"):  # values are looked at when the graph runs
        step(*tensors, torch.tensor([0, 12, 9, 10, 30, 37]), starts()[1])


def test_operator_check() -> None:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in qkv(torch.float32))
    fixed = (None, None, None, *starts(), None, 0.3, 0.0, 0.0, -1, 0, 0, True, 0)
    torch.library.opcheck(torch.ops.genfast.attention.default, (q, k, v, None, None, None, *fixed))


def test_nested_tensors() -> None:
    """Jagged in, jagged out, with gradients."""
    torch.manual_seed(1)
    parts = [torch.randn(n, HEADS, WIDTH, requires_grad=True) for n in (4, 1, 9)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    out, lse = ops.attention_varlen(nested, nested, nested, causal=True, return_lse=True)
    assert out.is_nested
    assert lse.is_nested
    assert out.offsets() is nested.offsets()
    flat = nested.values().detach().requires_grad_()
    exact = ops.attention_varlen(flat, flat, flat, torch.tensor([0, 4, 5, 14]), causal=True)
    assert torch.equal(out.values(), exact)
    (found,) = torch.autograd.grad(out.values().square().sum(), nested)
    (wanted,) = torch.autograd.grad(exact.square().sum(), flat)
    assert torch.equal(found.values(), wanted)
    with pytest.raises(ValueError, match="leave cu_seqlens_q and cu_seqlens_k out"):
        ops.attention_varlen(nested, nested, nested, torch.tensor([0, 14]))
    with pytest.raises(TypeError, match="k must be a jagged nested tensor too"):
        ops.attention_varlen(nested, flat, flat)


def test_no_sequences_and_no_rows() -> None:
    empty = torch.zeros(0, 2, 4)
    assert ops.attention_varlen(empty, empty, empty, torch.tensor([0])).shape == (0, 2, 4)
    assert ops.attention_varlen(empty, empty, empty, torch.tensor([0, 0, 0])).shape == (0, 2, 4)
    rows = torch.ones(3, 2, 4)
    assert not ops.attention_varlen(rows, rows, rows, torch.tensor([0])).any()


def test_autocast_and_int32() -> None:
    q, k, v = qkv(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention_varlen(q, k, v, *starts(torch.int32))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), packed([q, k, v], {})[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens_q": [0, 9, 8, 10, 30, 37]}, ValueError, "cu_seqlens_q must rise from 0 to at most the 37 rows"),
        ({"cu_seqlens_q": [1, 9, 9, 10, 30, 37]}, ValueError, "cu_seqlens_q must rise from 0"),
        ({"cu_seqlens_k": [0, 20, 26, 26, 46, 61]}, ValueError, "cu_seqlens_k must rise from 0 to at most the 60 rows"),
        ({"cu_seqlens_k": [0, 60]}, ValueError, "one length, got 6 and 2"),
        ({"cu_seqlens_q": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"\[sequences \+ 1\], got shape \(2, 3\)"),
        ({"cu_seqlens_q": torch.zeros(6)}, TypeError, "int32 or int64 tensor, got a torch.float32"),
        ({"cu_seqlens_q": None}, TypeError, "int32 or int64 tensor, got NoneType"),
        ({"cu_seqlens_q": torch.zeros(6, dtype=torch.int64, device="meta")}, ValueError, "on meta, q on cpu"),
        ({"q": torch.zeros(1, 4, 37, 8)}, ValueError, r"q must be \[rows, heads, head dim\]"),
        ({"max_seqlen_q": 19}, ValueError, "max_seqlen_q is 19, but a sequence has 20 rows"),
        ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be at least 0"),
        ({"mask": torch.ones(5, 1, 19, 20, dtype=torch.bool)}, ValueError, "or longer sequences"),
        ({"mask": torch.ones(4, 1, 1, 20, dtype=torch.bool)}, ValueError, r"does not broadcast to \(5, 4, 20, 20\)"),
        ({"batch_offset": -1}, ValueError, "batch_offset must be in"),
        ({"alibi_slopes": torch.ones(1, 4)}, ValueError, r"\(4,\) or \(5, 4\)"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = qkv(torch.float32)
    args: dict[str, Any] = {"q": q, "k": k, "v": v, "cu_seqlens_q": Q_STARTS, "cu_seqlens_k": K_STARTS, **change}
    args = {name: torch.tensor(x) if isinstance(x, list) else x for name, x in args.items()}
    with pytest.raises(error, match=message):
        ops.attention_varlen(**args)


def test_masks_reach_the_bound_where_lengths_are_out_of_sight() -> None:
    q, k, v = (x.detach().to("meta") for x in qkv(torch.float32))
    starts = [torch.tensor(x, device="meta") for x in (Q_STARTS, K_STARTS)]
    bias = torch.zeros(5, 1, 1, 20, device="meta")
    assert ops.attention_varlen(q, k, v, *starts, bias=bias, max_seqlen_k=20).shape[:2] == q.shape[:2]
    with pytest.raises(ValueError, match="or longer sequences"):
        ops.attention_varlen(q, k, v, *starts, bias=bias, max_seqlen_k=21)
    with pytest.raises(ValueError, match="or longer sequences"):
        ops.attention_varlen(q, k, v, *starts, bias=bias)


def test_raw_op_looks_at_its_starts() -> None:
    q, k, v = (x.detach().transpose(0, 1).unsqueeze(0) for x in qkv(torch.float32))

    def call(q_starts: Any, k_starts: Any, bias: Tensor | None = None) -> None:
        fixed = (None, None, None, q_starts, k_starts, None, 0.3, 0.0, 0.0, -1, -1, 0, False, 0)
        torch.ops.genfast.attention(q, k, v, bias, None, None, *fixed)

    q_starts, k_starts = starts()
    call(q_starts, k_starts)
    with pytest.raises(ValueError, match="q_starts must rise"):
        call(torch.tensor([0, 9, 9, 10, 30, 38]), k_starts)
    with pytest.raises(ValueError, match="go together"):
        call(q_starts, None)
    with pytest.raises(ValueError, match="k_starts must be"):
        call(q_starts, k_starts[:-1])
    with pytest.raises(ValueError, match="does not broadcast"):
        call(q_starts, k_starts, torch.zeros(5, 4, 19, 20))


def test_dropout_of_a_shard_is_that_of_the_whole() -> None:
    """A batch over two devices drops what one would: the second half with batch_offset=2."""
    q, k, v = torch.randn(3, 4, 2, 20, 8)
    for backend in ("cpp", "reference"):
        with genfast.use_backend(backend):
            whole = ops.attention(q, k, v, dropout_p=0.5, seed=3)
            half = ops.attention(q[2:], k[2:], v[2:], dropout_p=0.5, seed=3, batch_offset=2)
            wrong = ops.attention(q[2:], k[2:], v[2:], dropout_p=0.5, seed=3)
        torch.testing.assert_close(half, whole[2:])
        assert not torch.allclose(wrong, whole[2:])


def test_memory_does_not_grow_with_the_square() -> None:
    """65,536 rows of 64 sequences: all pairs would take 16 GiB."""
    code = """
import resource, torch, genfast
q = torch.randn(65536, 1, 8, requires_grad=True)
cu = torch.arange(0, 65537, 1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
genfast.ops.attention_varlen(q, q, q, cu, causal=True).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200, done.stdout
