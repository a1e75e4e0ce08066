"""Decoding over a cache is attention over the keys in use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import genfast
from genfast import ops

Tensor = torch.Tensor

BATCH, HEADS, KV_HEADS, WIDTH, VALUE_WIDTH, CAPACITY, PAGE = 3, 4, 2, 8, 12, 64, 16
LENGTHS = [40, 0, 17]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not causal": {"causal": False},
    "window": {"window": (9, None)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.linspace(-1, 1, HEADS)},
    "scale": {"scale": 0.2},
    "mask": {"mask": torch.arange(CAPACITY) % 3 != 1},
    "bias": {"bias": "random"},
    "alibi": {"alibi_slopes": torch.linspace(0.1, 0.4, HEADS)},
    "t5": {"relative_bias": ops.T5Bias(torch.linspace(-2, 2, 8 * HEADS).view(8, HEADS), False, 20)},
}


def new_rows(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(count)
    shapes = ((HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, VALUE_WIDTH))
    return [torch.randn(BATCH, heads, count, width).to(dtype) for heads, width in shapes]


class Cache:
    """The rows of each sequence in one piece, and the same in pages; what is not used is NaN."""

    def __init__(self, dtype: torch.dtype = torch.float32, page: int = PAGE) -> None:
        torch.manual_seed(0)
        pages = CAPACITY // page
        self.k = torch.full((BATCH, KV_HEADS, CAPACITY, WIDTH), torch.nan, dtype=dtype)
        self.v = torch.full((BATCH, KV_HEADS, CAPACITY, VALUE_WIDTH), torch.nan, dtype=dtype)
        for b, length in enumerate(LENGTHS):
            for x in (self.k, self.v):
                x[b, :, :length] = torch.randn(KV_HEADS, length, x.shape[3]).to(dtype)
        self.table = torch.randperm(BATCH * pages + 2)[: BATCH * pages].view(BATCH, pages)
        self.paged = []
        for x in (self.k, self.v):
            paged = torch.full((BATCH * pages + 2, KV_HEADS, page, x.shape[3]), torch.nan, dtype=dtype)
            paged[self.table] = x.unflatten(2, (pages, page)).transpose(1, 2)
            self.paged.append(paged)

    def rows(self) -> list[Tensor]:
        """The pages put together."""
        return [x[self.table].transpose(1, 2).flatten(2, 3) for x in self.paged]


def exact(q: Tensor, cache: Cache, lengths: list[int], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Attention of each sequence over its keys, in float64 by the plain formula."""
    outs, lses = [], []
    for b, length in enumerate(lengths):
        own = dict(options)
        for name in ("mask", "bias"):
            if name in own:
                x = own[name]
                x = x[(None,) * (4 - x.dim())]
                own[name] = (x if x.shape[0] == 1 else x[b : b + 1])[..., :length]
        if own.pop("causal", True):
            own["causal"] = True
        own = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in own.items()}
        if "relative_bias" in own:
            own["relative_bias"] = ops.T5Bias(own["relative_bias"].table.double(), False, 20)
        parts = (
            q[b : b + 1].double(),
            cache.k[b : b + 1, :, :length].double(),
            cache.v[b : b + 1, :, :length].double(),
        )
        out, lse = ops.attention(*parts, return_lse=True, **own)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_over_the_keys_in_use(name: str, backend: str) -> None:
    """Appending 1 and 5 rows, in one piece and in pages."""
    options = dict(OPTIONS[name])
    for count in (1, 5):
        if "bias" in options:
            options["bias"] = torch.randn(BATCH, HEADS, count, CAPACITY)
        q, k_new, v_new = new_rows(count)
        whole, paged = Cache(), Cache()
        with genfast.use_backend(backend):
            given = {"k_new": k_new, "v_new": v_new, "return_lse": True, **options}
            lengths = torch.tensor(LENGTHS, dtype=torch.int32)
            found = ops.attention_decode(q, whole.k, whole.v, lengths, **given)
            in_pages = ops.attention_decode(q, *paged.paged, lengths, block_table=paged.table, **given)
        total = [n + count for n in LENGTHS]
        for b, length in enumerate(total):
            assert torch.equal(whole.k[b, :, length - count : length], k_new[b])
            assert torch.equal(whole.v[b, :, length - count : length], v_new[b])
            assert whole.k[b, :, length:].isnan().all()
        for x, y in zip((whole.k, whole.v), paged.rows(), strict=True):
            assert torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0))
        want = exact(q, whole, total, options)
        for x in (found, in_pages):
            torch.testing.assert_close(x[0].double(), want[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(x[1].double(), want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("page", [1, 7, 64])
def test_dtypes_and_page_sizes(dtype: torch.dtype, page: int) -> None:
    if CAPACITY % page:
        page = 4
    q, k_new, v_new = new_rows(2, dtype)
    cache, whole = Cache(dtype, page), Cache(dtype)
    lengths = torch.tensor(LENGTHS)
    given = {"k_new": k_new, "v_new": v_new}
    found = ops.attention_decode(q, *cache.paged, lengths, block_table=cache.table, **given)
    ops.attention_decode(q, whole.k, whole.v, lengths, **given)
    want = exact(q, whole, [n + 2 for n in LENGTHS], {})[0]
    assert found.dtype == dtype
    bound = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found.double(), want, rtol=bound, atol=bound)


def test_few_heads_over_a_long_cache_share_their_keys() -> None:
    """One head of one sequence: its keys are split, and the parts put together; the bits do not depend on threads."""
    torch.manual_seed(2)
    q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 1, 9000, 64), torch.randn(1, 1, 9000, 64)
    want = ops.attention(q, k, v)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(ops.attention_decode(q, k, v, 9000))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[0], want, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_generated_sequence_is_causal_attention() -> None:
    """Prefill of 5, then one by one, with a view of a larger cache whose heads lie inside rows."""
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    room = torch.zeros(2, 2, 20, 2, 8)
    k_cache, v_cache = room[0].transpose(1, 2), room[1].transpose(1, 2)
    parts = [(0, 5), *((i, i + 1) for i in range(5, 12))]
    steps = []
    for a, b in parts:
        steps.append(ops.attention_decode(q[:, :, a:b], k_cache, v_cache, a, k_new=k[:, :, a:b], v_new=v[:, :, a:b]))
    torch.testing.assert_close(torch.cat(steps, 2), ops.attention(q, k, v, causal=True), rtol=1e-5, atol=1e-6)
    assert torch.equal(room[0][:, :12], k.transpose(1, 2))
    assert not room[:, :, 12:].any()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_queries_and_new_keys_to_their_positions(interleaved: bool) -> None:
    """Step by step as the whole turned at once, with partly turned heads; beyond the tables nothing is written."""
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    angles = torch.outer(torch.arange(9.0), torch.tensor([1.0, 0.3, 0.1]))
    tables = angles.cos(), angles.sin()
    turned = [ops.rotary(x, *tables, interleaved=interleaved) for x in (q, k)]
    want = ops.attention(*turned, v, causal=True)
    k_cache, v_cache = torch.zeros(2, 2, 2, 16, 8)
    steps = []
    for a, b in ((0, 4), (4, 5), (5, 8), (8, 9)):
        new = {"k_new": k[:, :, a:b], "v_new": v[:, :, a:b]}
        rotary = (*tables, interleaved) if interleaved else tables
        steps.append(ops.attention_decode(q[:, :, a:b], k_cache, v_cache, a, rotary=rotary, **new))
    torch.testing.assert_close(torch.cat(steps, 2), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(k_cache[:, :, :9], turned[1])
    again = ops.attention_decode(q[:, :, 7:9], k_cache, v_cache, 9, rotary=rotary)  # the last two, nothing new
    torch.testing.assert_close(again, want[:, :, 7:], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="rotary"):
        ops.attention_decode(q[:, :, :1], k_cache, v_cache, 9, rotary=tables, k_new=k[:, :, :1], v_new=v[:, :, :1])
    assert not k_cache[:, :, 9:].any()
    with pytest.raises(TypeError, match=r"rotary must be \(cos, sin\)"):
        ops.attention_decode(q[:, :, :1], k_cache, v_cache, 8, rotary=angles)


def test_sequences_may_share_pages_they_do_not_fill() -> None:
    """A common prompt of one page; each sequence goes on in a page of its own."""
    torch.manual_seed(1)
    pages_k, pages_v = torch.randn(2, 3, KV_HEADS, PAGE, WIDTH)
    table = torch.tensor([[0, 1], [0, 2]])
    q, k_new, v_new = torch.randn(2, HEADS, 1, WIDTH), *torch.randn(2, 2, KV_HEADS, 1, WIDTH)
    lengths = torch.tensor([16, 20])
    out = ops.attention_decode(q, pages_k, pages_v, lengths, k_new=k_new, v_new=v_new, block_table=table)
    for b in range(2):
        k, v = (torch.cat((x[0], x[1 + b]), 1)[:, : int(lengths[b]) + 1].unsqueeze(0) for x in (pages_k, pages_v))
        torch.testing.assert_close(out[b : b + 1], ops.attention(q[b : b + 1], k, v), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="two new rows would go to the same place"):
        ops.attention_decode(
            q, pages_k, pages_v, torch.tensor([3, 3]), k_new=k_new, v_new=v_new, block_table=table
        )  # fmt: skip


def test_compiled_step_writes_to_the_cache() -> None:
    cache, eager = Cache(), Cache()
    q, k_new, v_new = new_rows(1)
    lengths = torch.tensor(LENGTHS)

    @torch.compile(fullgraph=True)
    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        out = ops.attention_decode(q, k, v, lengths, k_new=k_new, v_new=v_new)
        return out, lengths + 1

    with torch.no_grad():
        out, after = step(q, cache.k, cache.v, lengths)
        want = ops.attention_decode(q, eager.k, eager.v, lengths, k_new=k_new, v_new=v_new)
        torch.testing.assert_close(out, want)
        assert torch.equal(cache.k.nan_to_num(7.0), eager.k.nan_to_num(7.0))
        assert after.tolist() == [n + 1 for n in LENGTHS]
        with pytest.raises(ValueError, match="cache_lens must be in"):
            step(q, cache.k, cache.v, lengths + CAPACITY)


def test_operator_check() -> None:
    q, k_new, v_new = new_rows(1)
    cache = Cache()
    cache.k.nan_to_num_()
    cache.v.nan_to_num_()
    args = (
        q, cache.k, cache.v, torch.tensor(LENGTHS), k_new, v_new, None, None, None, None, None, None, None, 0.3, 0.0,
        -1, 0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.genfast.attention_decode.default, args)


def test_caches_of_inference_mode_and_version_counters() -> None:
    q, k_new, v_new = new_rows(1)
    cache = Cache()
    before = cache.k._version
    ops.attention_decode(q, cache.k, cache.v, torch.tensor(LENGTHS), k_new=k_new, v_new=v_new)
    assert cache.k._version > before
    with torch.inference_mode():
        cache = Cache()
        ops.attention_decode(q, cache.k, cache.v, torch.tensor(LENGTHS), k_new=k_new, v_new=v_new)


def test_explain_does_not_write() -> None:
    q, k_new, v_new = new_rows(1)
    cache = Cache()
    text = str(
        genfast.explain(ops.attention_decode, q, cache.k, cache.v, torch.tensor(LENGTHS), k_new=k_new, v_new=v_new)
    )
    assert "cpp" in text
    assert cache.k[1].isnan().all()


def test_empty_batches_and_queries() -> None:
    cache = Cache()
    none = torch.zeros(0, HEADS, 1, WIDTH)
    out = ops.attention_decode(none, cache.k[:0], cache.v[:0], torch.zeros(0, dtype=torch.int64))
    assert out.shape == (0, HEADS, 1, VALUE_WIDTH)
    queries = torch.zeros(BATCH, HEADS, 0, WIDTH)
    assert ops.attention_decode(queries, cache.k, cache.v, torch.tensor(LENGTHS)).shape == (BATCH, HEADS, 0, 12)
    q = torch.ones(BATCH, HEADS, 1, WIDTH)
    out, lse = ops.attention_decode(q, cache.k, cache.v, 0, return_lse=True)
    assert not out.any()
    assert lse.isneginf().all()


def bad_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    q, _, v_new = new_rows(1)
    table = Cache().table
    far = table.clone()
    far[0, 0] = 14
    return {
        "long": ({"cache_lens": torch.tensor([64, 0, 0])}, ValueError, r"cache_lens must be in \[0, 63\].*got 0 to 64"),
        "negative": ({"cache_lens": torch.tensor([-1, 0, 0])}, ValueError, "got -1 to 0"),
        "count": ({"cache_lens": torch.tensor([1, 2])}, ValueError, r"cache_lens must have shape \(3,\)"),
        "floats": ({"cache_lens": torch.zeros(3)}, TypeError, "int32 or int64 tensor, got a torch.float32"),
        "bool": ({"cache_lens": True}, TypeError, "int32 or int64 tensor, got bool"),
        "device": ({"cache_lens": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "on meta, q on cpu"),
        "k device": ({"k_cache": torch.zeros(3, 2, 64, 8, device="meta")}, ValueError, "k_cache is on meta"),
        "k dtype": (
            {"k_cache": torch.zeros(3, 2, 64, 8).half()},
            TypeError,
            "k_cache is torch.float16, q torch.float32",
        ),
        "k width": ({"k_cache": torch.zeros(3, 2, 64, 9)}, ValueError, r"k_cache must have shape \(3, any, any, 8\)"),
        "v rows": ({"v_cache": torch.zeros(3, 2, 63, 12)}, ValueError, r"v_cache must have shape \(3, 2, 64, any\)"),
        "heads": ({"q": torch.zeros(3, 3, 1, 8)}, ValueError, "q's heads must be a multiple"),
        "stride": ({"k_cache": torch.zeros(3, 2, 8, 64).mT}, ValueError, "must be contiguous"),
        "alone": ({"v_new": None}, ValueError, "k_new and v_new go together"),
        "new": ({"v_new": v_new[:, :1]}, ValueError, r"v_new must have shape \(3, 2, 1, 12\)"),
        "page": ({"block_table": far}, ValueError, r"pages in \[0, 14\), got \d+ to 14"),
        "below": ({"block_table": far - 14}, ValueError, "got -1"),
        "pages": ({"block_table": table[:2]}, ValueError, r"block_table must have shape \(3, pages\)"),
        "page dtype": ({"block_table": table.float()}, TypeError, "block_table must be an int32 or int64"),
        "shared": ({"block_table": table[:1].expand(3, -1), "cache_lens": 5}, ValueError, "two new rows would go"),
        "causal": ({"causal": "top_left"}, TypeError, "causal must be a bool"),
        "mask": ({"mask": torch.ones(63, dtype=torch.bool)}, ValueError, "mask of shape"),
        "grad": ({"q": q.requires_grad_()}, RuntimeError, "has no derivative"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input_writes_nothing(name: str) -> None:
    change, error, message = bad_calls()[name]
    q, k_new, v_new = new_rows(1)
    cache = Cache()
    k, v = cache.paged if "block_table" in change else (cache.k, cache.v)
    args = {
        "q": q, "k_cache": k, "v_cache": v, "cache_lens": torch.tensor(LENGTHS), "k_new": k_new, "v_new": v_new,
        **change,
    }  # fmt: skip
    before = [x.clone() for x in (k, v)]
    with pytest.raises(error, match=message):
        ops.attention_decode(**args)
    for x, y in zip((k, v), before, strict=True):
        assert torch.equal(x.nan_to_num(5.0), y.nan_to_num(5.0))


def test_transforms_are_refused() -> None:
    q, _, _ = new_rows(1)
    cache = Cache()
    with pytest.raises(RuntimeError, match="has no derivative"):
        torch.func.jvp(lambda q: ops.attention_decode(q, cache.k, cache.v, torch.tensor(LENGTHS)), (q,), (q,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [3, 16, 33, 64, 80, 111, 128, 203, 256])
@pytest.mark.parametrize("page", [0, 1, 5, 64])
def test_few_queries_of_any_depth(isa, page, depth, dtype):
    """Keys and values are read where they lie: columns beyond whole vectors, runs that end with their page."""
    keys, value_depth = 130, depth + 7 if depth < 240 else depth
    for queries in (1, 3, 7):
        q = torch.randn(2, 2, queries, depth).to(dtype)
        k, v = torch.randn(2, 2, keys, depth).to(dtype), torch.randn(2, 2, keys, value_depth).to(dtype)
        want = ops.attention(q.double(), k.double(), v.double(), causal=True)
        if page:
            count = -(-keys // page)
            table, pages = torch.randperm(2 * count).view(2, count), []
            for x in (k, v):
                padded = torch.nn.functional.pad(x, (0, 0, 0, count * page - keys), value=torch.nan)
                paged = padded.new_empty(2 * count, 2, page, x.shape[3])
                paged[table] = padded.unflatten(2, (count, page)).transpose(1, 2)
                pages.append(paged)
            got = ops.attention_decode(q, *pages, torch.full((2,), keys), block_table=table)
        else:
            got = ops.attention(q, k, v, causal=True)
        bound = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)
