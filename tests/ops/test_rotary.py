"""rotary against complex multiplication in float64, on every CPU backend."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops
from genfast.ops.rotary import reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def tables(positions, half, *batch, dtype=torch.float32):
    angles = torch.randn(*batch, positions, half, dtype=torch.float64) * 4
    return angles.cos().to(dtype), angles.sin().to(dtype)


def exact(x, cos, sin, rows, interleaved=False):
    """Complex numbers times e^(i angle); ``rows`` [B, S] or [S] are the positions. x [B, ..., S, D]."""
    x, table = x.double(), torch.complex(cos.double(), sin.double())
    half = cos.shape[-1]
    if table.dim() == 3:
        batch = torch.arange(x.shape[0]).unsqueeze(-1) if table.shape[0] > 1 else 0
        turn = table[batch, rows]
    else:
        turn = table[rows]
    while turn.dim() < x.dim() and turn.dim() > 2:
        turn = turn.unsqueeze(1)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        pairs = torch.view_as_complex(turned.unflatten(-1, (half, 2)).contiguous())
        out = torch.view_as_real(pairs * turn).flatten(-2)
    else:
        out = torch.complex(turned[..., :half], turned[..., half:]) * turn
        out = torch.cat((out.real, out.imag), -1)
    return torch.cat((out, rest), -1)


def assert_close(got, want):
    bound = BOUND[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound * 4)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "half"),
    [
        ((1, 1, 1, 2), 1), ((2, 3, 5, 8), 4), ((1, 2, 70, 64), 32), ((2, 2, 3, 20), 6), ((3, 4, 6), 1), ((4, 12), 5),
        ((2, 3, 4, 80), 40), ((1, 3, 2, 75), 37), ((2, 2, 2, 3, 18), 9), ((2, 1, 2, 7), 0), ((3, 2, 1, 130), 65),
        ((2, 2, 3, 66), 17), ((1, 1, 5, 42), 21),
    ],
)  # fmt: skip
def test_matches_complex_numbers(isa, shape, half, dtype, interleaved):
    x = torch.randn(shape).to(dtype)
    cos, sin = tables(shape[-2] + 2, half, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    out = ops.rotary(x, cos, sin, offset=2, interleaved=interleaved, rotary_dim=2 * half)
    assert out.dtype == dtype
    assert_close(out, exact(x, cos, sin, torch.arange(shape[-2]) + 2, interleaved))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_starts_and_positions(isa, backend, interleaved):
    x = torch.randn(3, 2, 4, 10)
    starts, packed = torch.tensor([5, 0, 2]), torch.tensor([0, 1, 0, 8])
    each = torch.randint(9, (3, 4))
    with genfast.use_backend(backend):
        for cos, sin in (tables(9, 4), tables(9, 4, 3), tables(9, 4, 1)):
            for options, rows in (
                ({"offset": starts}, starts[:, None] + torch.arange(4)),
                ({"offset": starts.int()}, starts[:, None] + torch.arange(4)),
                ({"offset": torch.tensor(5)}, torch.arange(5, 9).expand(3, 4)),
                ({"offset": 5}, torch.arange(5, 9).expand(3, 4)),
                ({"positions": packed}, packed.expand(3, 4)),
                ({"positions": each}, each),
                ({"positions": each.T.contiguous().T}, each),
                ({"positions": each[:1]}, each[:1].expand(3, 4)),
            ):
                out = ops.rotary(x, cos, sin, interleaved=interleaved, **options)
                assert_close(out, exact(x, cos, sin, rows, interleaved))


def test_decoding_continues_the_sequence(isa):
    x, (cos, sin) = torch.randn(2, 3, 6, 8), tables(6, 4)
    whole = ops.rotary(x, cos, sin)
    for at in range(6):
        step = x[:, :, at : at + 1]
        assert torch.equal(ops.rotary(step, cos, sin, offset=at), whole[:, :, at : at + 1])
        assert torch.equal(ops.rotary(step, cos, sin, offset=torch.full((2,), at)), whole[:, :, at : at + 1])


def test_hugging_face_tables_hold_every_angle_twice():
    x, (cos, sin) = torch.randn(2, 3, 5, 8), tables(5, 4, 2)
    twice = [torch.cat((t, t), -1) for t in (cos, sin)]
    rotated = torch.cat((-x[..., 4:], x[..., :4]), -1)
    theirs = x * twice[0].unsqueeze(1) + rotated * twice[1].unsqueeze(1)
    torch.testing.assert_close(ops.rotary(x, *twice), theirs)
    assert torch.equal(ops.rotary(x, *twice), ops.rotary(x, cos, sin))
    wide = torch.randn(2, 3, 5, 16)
    assert torch.equal(ops.rotary(wide, *twice, rotary_dim=8), ops.rotary(wide, cos, sin))
    assert torch.equal(ops.rotary(wide, *twice), ops.rotary(wide, *twice, rotary_dim=16)), (
        "8 columns of 16: one an angle"
    )


def test_tables_of_other_dtypes_are_converted():
    x, (cos, sin) = torch.randn(2, 3, 5, 8), tables(5, 4, dtype=torch.float64)
    assert torch.equal(ops.rotary(x, cos, sin), ops.rotary(x, cos.float(), sin.float()))
    half = [t.bfloat16() for t in (cos, sin)]
    assert torch.equal(ops.rotary(x.bfloat16(), *half), ops.rotary(x.bfloat16(), *(t.float() for t in half)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts(isa, dtype, interleaved):
    cos, sin = tables(5, 3)
    base = torch.randn(2, 4, 5, 8).to(dtype)
    inputs = [
        base.transpose(1, 2).contiguous().transpose(1, 2),  # heads inside
        torch.stack((base, base), 1)[:, 1],
        torch.randn(2, 5, 3, 4, 8).to(dtype)[:, :, 1].transpose(1, 2),  # a slice of a projection
        base.mT.contiguous().mT,  # no unit stride
        base[:, :1, :1].expand(2, 4, 5, 8),
        base.flip(0)[..., 1:7].permute(1, 0, 2, 3),
        torch.randn(3, 2, 2, 5, 8).to(dtype).permute(1, 0, 2, 3, 4),
        torch.randn(5, 2, 3, 2, 8).to(dtype).permute(1, 2, 3, 0, 4),
        torch.randn(2 * 2 * 5 * 8 + 1).to(dtype)[1:].view(2, 2, 5, 8),
    ]
    for x in inputs:
        out = ops.rotary(x, cos, sin, interleaved=interleaved, rotary_dim=6)
        assert out.stride() == torch.empty_like(x).stride()
        assert_close(out, exact(x, cos, sin, torch.arange(5), interleaved))


@pytest.mark.parametrize("strided", [lambda t: t.mT.contiguous().mT, lambda t: torch.cat((t, t), -1)[..., 3:6]])
def test_strided_tables(isa, strided):
    x, (cos, sin) = torch.randn(2, 2, 5, 6), tables(5, 3)
    cos_view, sin_view = strided(cos), strided(sin)
    assert torch.equal(ops.rotary(x, cos_view, sin_view), ops.rotary(x, cos_view.clone(), sin_view.clone()))
    expanded = cos.expand(2, 5, 3), sin.expand(2, 5, 3)
    assert torch.equal(ops.rotary(x, *expanded), ops.rotary(x, cos, sin))


def test_threads_do_not_matter(isa):
    before = torch.get_num_threads()
    cos, sin = tables(300, 16)
    try:
        for x in (torch.randn(2, 5, 300, 32), torch.randn(2, 300, 5, 32).transpose(1, 2)):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(ops.rotary(x, cos, sin))
            assert_close(results[0], exact(x, cos, sin, torch.arange(300)))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


def test_scores_depend_on_distance_alone():
    """<R(m) q, R(n) k> = <R(m + t) q, R(n + t) k>, the property that the encoding is made for."""
    angles = torch.outer(torch.arange(40.0).double(), torch.tensor([1.0, 0.3, 0.01]).double())
    q, k = torch.randn(2, 1, 6, dtype=torch.float64)
    score = [
        (
            ops.rotary(q, angles.cos(), angles.sin(), offset=m) * ops.rotary(k, angles.cos(), angles.sin(), offset=n)
        ).sum()
        for m, n in ((3, 1), (30, 28), (3, 2))
    ]
    torch.testing.assert_close(score[0], score[1])
    assert (score[0] - score[2]).abs() > 1e-3


def test_nan_and_infinity_stay_in_their_pairs(isa):
    x = torch.ones(1, 1, 40)
    x[0, 0, 3], x[0, 0, 39] = torch.nan, torch.inf
    out = ops.rotary(x, *tables(1, 18), rotary_dim=36)
    assert out.isnan().nonzero()[:, 2].tolist() == [3, 21]
    assert out[0, 0, 39] == torch.inf


# ---- derivatives ----


@pytest.mark.parametrize(
    ("backend", "interleaved", "kind"),
    [
        ("cpp", False, "offset"), ("cpp", True, "starts"), ("cpp", False, "positions"), ("cpp", True, "batch tables"),
        ("reference", True, "offset"), ("reference", False, "batch tables"),
    ],
)  # fmt: skip
def test_gradcheck(backend, interleaved, kind):
    x = torch.randn(2, 2, 2, 5, dtype=torch.float64, requires_grad=True)
    cos, sin = (
        t.requires_grad_() for t in tables(4, 2, *((2,) if kind == "batch tables" else ()), dtype=torch.float64)
    )
    options = {
        "offset": {"offset": 1}, "starts": {"offset": torch.tensor([2, 0])},
        "positions": {"positions": torch.tensor([3, 3])}, "batch tables": {"offset": torch.tensor([1, 2])},
    }[kind]  # fmt: skip

    def call(x, c, s):
        return ops.rotary(x, c, s, interleaved=interleaved, **options)

    with genfast.use_backend(backend):
        assert gradcheck(call, (x, cos, sin), check_forward_ad=True, check_batched_grad=backend == "cpp")
        assert gradgradcheck(call, (x, cos, sin), check_fwd_over_rev=backend == "cpp")


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6), (2, 2, 2, 3, 6)])
def test_gradcheck_of_other_ranks(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    one = tables(4, 3, 1, dtype=torch.float64)
    for cos, sin in (tables(4, 3, dtype=torch.float64), one):
        leaves = (x, cos.requires_grad_(), sin.requires_grad_())
        assert gradcheck(lambda *a: ops.rotary(*a, offset=1), leaves, check_forward_ad=True)
        assert gradcheck(lambda *a: ops.rotary(*a, positions=torch.tensor([0, 3, 3])), leaves)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(isa, dtype, interleaved):
    x = torch.randn(2, 3, 50, 40).to(dtype).requires_grad_()
    dy = torch.randn(2, 3, 50, 40).to(dtype)
    cos, sin = (
        t.requires_grad_() for t in tables(52, 16, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    )
    got = torch.autograd.grad(ops.rotary(x, cos, sin, offset=2, interleaved=interleaved), (x, cos, sin), dy)
    leaves = [t.detach().double().requires_grad_() for t in (x, cos, sin)]
    want = torch.autograd.grad(exact(*leaves, torch.arange(2, 52), interleaved), leaves, dy.double())
    assert_close(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_gradients_of_odd_layouts():
    x = torch.randn(2, 5, 3, 8).transpose(1, 2).requires_grad_()
    cos, sin = tables(5, 4)
    ops.rotary(x, cos, sin).sum().backward()  # the cotangent is expanded
    want = exact(torch.ones(2, 3, 5, 8), cos, -sin, torch.arange(5))
    assert_close(x.grad, want)


def test_x_is_kept_only_for_learned_tables():
    x, (cos, sin) = torch.randn(1, 2, 3, 4, requires_grad=True), tables(3, 2)
    assert ops.rotary(x, cos, sin).grad_fn.saved_tensors[0] is None
    assert ops.rotary(x, cos.requires_grad_(), sin).grad_fn.saved_tensors[0] is not None


def test_learned_full_width_tables_get_all_of_their_gradient():
    x, (cos, sin) = torch.randn(1, 2, 3, 4), tables(3, 2)
    found = []
    for twice in (False, True):
        leaf = cos.clone().requires_grad_()
        table = torch.cat((leaf, leaf), -1) if twice else leaf
        sin_table = torch.cat((sin, sin), -1) if twice else sin
        found.append(torch.autograd.grad(ops.rotary(x, table, sin_table).square().mul(x).sum(), leaf)[0])
    assert torch.equal(*found)


def test_functional_transforms():
    x, (cos, sin) = torch.randn(2, 2, 3, 4, dtype=torch.float64), tables(3, 2, dtype=torch.float64)
    w = torch.randn_like(x)

    def loss(x, c, s):
        return (ops.rotary(x, c, s) * w).sin().sum()

    def plain(x, c, s):
        return (reference(x, c, s, None, 0, False, False, False) * w).sin().sum()

    torch.testing.assert_close(grad(loss, (0, 1, 2))(x, cos, sin), grad(plain, (0, 1, 2))(x, cos, sin))
    torch.testing.assert_close(hessian(loss, 1)(x, cos, sin), hessian(plain, 1)(x, cos, sin))
    torch.testing.assert_close(jacfwd(jacrev(loss, 2), 0)(x, cos, sin), jacfwd(jacrev(plain, 2), 0)(x, cos, sin))
    got = grad(lambda x: jvp(lambda c: loss(x, c, sin), (cos,), (sin,))[1])(x)
    torch.testing.assert_close(got, grad(lambda x: jvp(lambda c: plain(x, c, sin), (cos,), (sin,))[1])(x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, w)
        assert_close(forward_ad.unpack_dual(ops.rotary(dual, cos, sin)).tangent, exact(w, cos, sin, torch.arange(3)))


def test_vmap():
    x, (cos, sin) = torch.randn(4, 2, 3, 6), tables(4, 3)
    assert torch.equal(vmap(lambda x: ops.rotary(x, cos, sin))(x), ops.rotary(x, cos, sin))
    many = [torch.stack((t, -t)) for t in (cos, sin)]
    got = vmap(lambda x, c, s: ops.rotary(x, c, s), in_dims=(None, 0, 0))(x, *many)
    torch.testing.assert_close(got[1], -got[0])
    starts = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])
    got = vmap(lambda o: ops.rotary(x, cos, sin, offset=o))(starts)
    assert torch.equal(got[1], ops.rotary(x, cos, sin, offset=starts[1]))
    per_example = vmap(grad(lambda x: ops.rotary(x, cos, sin).square().sum()))(x)
    torch.testing.assert_close(per_example, 2 * x)  # a rotation keeps lengths


# ---- the framework ----


def test_opcheck():
    cos, sin = tables(5, 2)
    for x in (torch.randn(2, 2, 3, 6), torch.randn(2, 3, 2, 6).transpose(1, 2).requires_grad_(), torch.randn(3, 6)):
        for index, starts in ((None, False), (torch.tensor([1]), True), (torch.tensor([4, 0, 0]), False)):
            opcheck(
                torch.ops.genfast.rotary.default,
                (x, cos, sin, index, 1 - bool(starts or index is not None), starts, True, False),
            )
    leaves = [t.requires_grad_() for t in (torch.randn(2, 2, 3, 6), cos, sin)]
    opcheck(torch.ops.genfast.rotary.default, (*leaves, None, 1, False, False, False))


def test_compile():
    cos, sin = tables(9, 4)

    def trained(x, c, s, start):
        return ops.rotary(ops.rotary(x, c, s, offset=1), c, s, offset=start, interleaved=True).sin()

    start = torch.tensor([3, 0])
    x = torch.randn(2, 3, 5, 8)
    assert torch.equal(torch.compile(lambda x: ops.rotary(x, cos, sin), fullgraph=True)(x), ops.rotary(x, cos, sin))
    for learned in (False, True):
        leaves = [torch.randn(2, 3, 5, 8).requires_grad_(), *(t.clone().requires_grad_(learned) for t in (cos, sin))]
        compiled = torch.compile(trained, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*leaves, start), trained(*leaves, start))
        wanted = [t for t in leaves if t.requires_grad]
        torch.testing.assert_close(
            torch.autograd.grad(compiled(*leaves, start).sum(), wanted),
            torch.autograd.grad(trained(*leaves, start).sum(), wanted),
        )
    dynamic = torch.compile(
        lambda x, at: ops.rotary(x, cos, sin, offset=at), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows, at in ((3, 0), (4, 2), (5, 4)):
        x = torch.randn(2, rows, 8)
        assert torch.equal(dynamic(x, at), ops.rotary(x, cos, sin, offset=at))


def test_transforms_inside_a_compiled_region():
    x, (cos, sin) = torch.randn(2, 3, 4), tables(3, 2)
    compiled = torch.compile(
        lambda x, t: jvp(lambda x: ops.rotary(x, cos, sin), (x,), (t,))[1], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x, x), ops.rotary(x, cos, sin))


def test_autocast_leaves_the_dtype_of_x():
    cos, sin = tables(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.rotary(torch.randn(2, 3, 4), cos, sin).dtype == torch.float32
        projected = torch.nn.functional.linear(torch.randn(2, 3, 4), torch.randn(4, 4))
        out = ops.rotary(projected, cos, sin)
    assert out.dtype == torch.bfloat16
    assert_close(out, exact(projected, cos, sin, torch.arange(3)))


def test_explain_names_the_backend():
    x, (cos, sin) = torch.randn(2, 3, 4), tables(3, 2)
    assert genfast.explain("rotary", x, cos, sin).chosen == "cpp"
    assert "no cuda kernel" in genfast.explain("rotary", x, cos, sin).reasons["cuda"]


def test_meta_tensors_have_the_shape():
    x = torch.empty(2, 5, 3, 4, device="meta").transpose(1, 2)
    out = ops.rotary(x, torch.empty(5, 2, device="meta"), torch.empty(5, 2, device="meta"))
    assert out.shape == x.shape
    assert out.stride() == x.stride()


# ---- bad input ----

X, COS = torch.zeros(2, 3, 5, 8), torch.zeros(7, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.rotary("x", COS, COS), TypeError, "x must be a torch.Tensor, got str"),
        (lambda: ops.rotary(X.long(), COS, COS), TypeError, "x must be float32.*int64"),
        (lambda: ops.rotary(X, COS.int(), COS), TypeError, "cos must be float32.*int32"),
        (lambda: ops.rotary(X, COS, None), TypeError, "sin must be a torch.Tensor, got NoneType"),
        (lambda: ops.rotary(torch.zeros(8), COS, COS), ValueError, r"x must be \[.*got shape \(8,\)"),
        (lambda: ops.rotary(X, COS, COS[1:]), ValueError, r"cos has shape \(7, 4\), sin \(6, 4\)"),
        (lambda: ops.rotary(X, COS[0], COS[0]), ValueError, r"\[2, positions, width\].*got \(4,\)"),
        (lambda: ops.rotary(X, COS.expand(3, 7, 4), COS.expand(3, 7, 4)), ValueError, r"got \(3, 7, 4\)"),
        (lambda: ops.rotary(X, COS[:, None], COS[:, None]), ValueError, r"got \(7, 1, 4\)"),
        (lambda: ops.rotary(X[..., :6], COS, COS), ValueError, "of width 4 turn 8 of the 6.*rotary_dim=4"),
        (lambda: ops.rotary(X[..., :3], COS[:, :3], COS[:, :3]), ValueError, "an even number .* got 3"),
        (lambda: ops.rotary(X, COS, COS, rotary_dim=6), ValueError, r"must have 3 columns \(or 6.*got 4"),
        (lambda: ops.rotary(X, COS, COS, rotary_dim=10), ValueError, r"rotary_dim must be in \[0, 9\), got 10"),
        (lambda: ops.rotary(X, COS, COS, rotary_dim=3), ValueError, "an even number .* got 3"),
        (lambda: ops.rotary(X, COS, COS, rotary_dim=4.0), TypeError, "rotary_dim must be an int, got float"),
        (lambda: ops.rotary(X, COS, COS, offset=3), ValueError, "5 rows of x from position 3 on need 8 rows.*got 7"),
        (lambda: ops.rotary(X, COS, COS, offset=-1), ValueError, "offset must be at least 0, got -1"),
        (lambda: ops.rotary(X, COS, COS, offset=1.0), TypeError, "offset must be an int, got float"),
        (lambda: ops.rotary(X, COS, COS, offset=torch.tensor([0.0])), TypeError, "offset must be int64.*float32"),
        (lambda: ops.rotary(X, COS, COS, offset=torch.zeros(3).long()), ValueError, r"\(2,\) or \(\), got \(3,\)"),
        (lambda: ops.rotary(X, COS, COS, offset=torch.tensor([0, 3])), ValueError, "outside the 7 rows"),
        (lambda: ops.rotary(X, COS, COS, offset=torch.tensor([-1, 0])), ValueError, "outside the 7 rows"),
        (lambda: ops.rotary(X, COS, COS, positions=torch.tensor([0, 1, 2, 3, 7])), ValueError, "outside the 7 rows"),
        (lambda: ops.rotary(X, COS, COS, positions=torch.full((2, 5), 2**63 - 1)), ValueError, "outside the 7 rows"),
        (lambda: ops.rotary(X, COS, COS, positions=torch.arange(4)), ValueError, r"\(5,\) or \(2, 5\) or \(1, 5\)"),
        (lambda: ops.rotary(X, COS, COS, positions=[0]), TypeError, "positions must be an integer tensor, got list"),
        (lambda: ops.rotary(X, COS, COS, offset=1, positions=torch.arange(5)), ValueError, "not both"),
        (lambda: ops.rotary(X, COS.to("meta"), COS), ValueError, "x is on cpu, cos on meta"),
        (lambda: torch.ops.genfast.rotary(X, COS, COS, None, 3, False, False, False), ValueError, "got 7"),
        (lambda: torch.ops.genfast.rotary(X, COS.double(), COS, None, 0, False, False, False), TypeError, "float64"),
        (lambda: torch.ops.genfast.rotary(X[..., :6], COS, COS, None, 0, False, False, False), ValueError, "turn more"),
        (lambda: torch.ops.genfast.rotary(X, COS, COS, torch.arange(3), 0, True, False, False), ValueError, "starts"),
        (lambda: torch.ops.genfast.rotary(X, COS, COS, torch.zeros(2), 0, True, False, False), TypeError, "index"),
        (lambda: torch.ops.genfast.rotary(X, COS, COS, None, -1, False, False, False), ValueError, "offset"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_bad_input_is_refused(backend, call, error, message):
    with genfast.use_backend(backend), pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (0, 4), (3, 0)])
def test_empty_input(isa, shape):
    x = torch.zeros(shape, requires_grad=True)
    width = shape[-1] // 2
    cos = torch.zeros(3, width, requires_grad=True)
    for backend in ("cpp", "reference"):
        with genfast.use_backend(backend):
            out = ops.rotary(x, cos, cos)
            assert out.shape == shape
            dx, dcos = torch.autograd.grad(out.sum(), (x, cos))
            assert dx.shape == shape
            assert (dcos == 0).all()
