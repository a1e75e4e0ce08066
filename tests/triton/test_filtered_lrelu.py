"""The filtered_lrelu kernel under Triton's interpreter against the formula in float64, and compiled ahead of time."""

from __future__ import annotations

import re

import pytest
import torch
from test_aot import compile_variants
from torch.autograd import forward_ad

pytest.importorskip("triton")
import triton

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

import genfast
from genfast import ops
from genfast.kernels.triton import filtered_lrelu as kernels
from genfast.launch import filtered_lrelu as launch

BOUND = {torch.float32: 2e-6, torch.float16: 2e-3}
CASES = [
    # taps up, taps down, up, down, padding
    (4, 4, 2, 2, (3, 2, 3, 2)), (12, 12, 2, 2, (10, 11, 10, 11)), (None, None, 1, 1, 0), (3, 5, 2, 1, 3),
    (5, 4, 1, 2, 2), (6, 3, 3, 2, (4, 5, 3, 6)), (4, 2, 4, 2, (1, 2, 3, 4)), (2, 6, (2, 1), (1, 3), 3), (1, 1, 2, 3, 0),
    (4, 4, 2, 2, (-1, 4, 3, -1)), (7, 8, 1, 1, 6), (2, 2, 2, 5, (9, 0, 0, 9)), (24, 12, 4, 2, (20, 21, 22, 19)),
    (32, 31, 4, 4, (40, -3, 3, 31)), (4, 4, 2, 2, (-5, -4, -2, -7)),
]  # fmt: skip


def eighths(*shape):
    """Multiples of 1/8 up to 2: products of a few of them are exact in float32, so that signs are those of float64."""
    return torch.randint(-16, 17, shape) / 8


def options_of(index, dtype=torch.float32):
    up_taps, down_taps, up, down, padding = CASES[index]
    fu, fd = (None if taps is None else (eighths(taps) / 4).to(dtype) for taps in (up_taps, down_taps))
    return {
        "fu": fu, "fd": fd, "up": up, "down": down, "padding": padding, "gain": 1.25,
        "slope": (0.25, -0.5, 0.0)[index % 3], "clamp": (None, 0.4)[index % 2], "flip_filter": index % 3 == 1,
    }  # fmt: skip


def double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def assert_near(got, want, dtype):
    """Within the roundings of sums of the size of ``want``, and of a store in ``dtype``."""
    assert got.dtype == (dtype if got.dim() == 4 else torch.float32)
    bound = BOUND[dtype]
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound * max(1.0, float(want.abs().max())))


def check(x, b, options, with_gradient=True):
    """Values, gradients by x and b; returns the output."""
    found = []
    dy = None
    for backend in ("triton", "reference"):
        leaves = [t.detach().clone().requires_grad_() for t in (x, b) if t is not None]
        if backend == "reference":
            leaves = [t.detach().double().requires_grad_() for t in leaves]
            options = {k: double(v) for k, v in options.items()}
        else:
            leaves[0] = x.detach().requires_grad_()  # strides are x's own
        with genfast.use_backend(backend):
            out = ops.filtered_lrelu(leaves[0], b=leaves[1] if len(leaves) > 1 else None, **options)
            dy = eighths(*out.shape) if dy is None else dy
            grads = torch.autograd.grad(out, leaves, dy.to(out.dtype)) if with_gradient else ()
        found.append((out.detach(), *grads))
    assert found[0][0].stride() == ops.filtered_lrelu(x.detach(), b=b, **options_like(options)).stride()
    for got, want in zip(*found, strict=True):
        assert_near(got, want, x.dtype)
    return found[0][0]


def options_like(options):
    return {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def launched(monkeypatch):
    """Counts runs of the kernel."""
    counted = []
    real = kernels.run
    monkeypatch.setattr(kernels, "run", lambda *args: (counted.append(args[7]), real(*args)))
    return counted


@pytest.mark.parametrize("index", range(len(CASES)))
def test_values_and_gradients(index, monkeypatch):
    counted = launched(monkeypatch)
    for turn, shape in enumerate(((2, 2, 9, 11), (1, 1, 14, 40))):
        dtype = (torch.float32, torch.float16)[(turn + index) % 2]
        check(eighths(*shape).to(dtype), eighths(shape[1]) if turn == 0 else None, options_of(index))
    assert counted == [0, 2, 0, 2]


def test_several_tiles_and_layouts():
    f = eighths(4) / 4
    options = {"fu": f, "fd": f, "up": 2, "down": 2, "padding": (3, 2, 3, 2)}
    for x in (
        eighths(1, 1, 33, 37),
        eighths(1, 3, 18, 20).contiguous(memory_format=torch.channels_last),
        eighths(2, 6, 8, 9)[:, ::2, 1:, ::2],
        eighths(2, 3, 9, 8).mT,
        eighths(1, 1, 8, 9).expand(2, 3, 8, 9),
        eighths(2 * 3 * 63 + 1)[1:].view(2, 3, 7, 9),
    ):
        check(x, eighths(9)[::3][: x.shape[1]], options)
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
        with genfast.use_backend("triton"):
            out = ops.filtered_lrelu(torch.zeros(shape, requires_grad=True), f, f, padding=5)
            (dx,) = (
                torch.autograd.grad(out.sum(), out.grad_fn.next_functions[0][0].variable) if out.numel() else (None,)
            )
        assert not out.any()
        assert dx is None or dx.shape == shape


@pytest.mark.parametrize("tile", ["wide", "tall", "one column", "one row"])
def test_images_of_odd_extents(tile):
    f = eighths(12) / 4
    shape = {"wide": (1, 1, 3, 150), "tall": (1, 1, 150, 3), "one column": (1, 2, 33, 1), "one row": (1, 2, 1, 33)}[
        tile
    ]
    check(eighths(*shape), None, {"fu": f, "fd": f, "up": 2, "down": 2, "padding": (10, 11, 11, 10), "clamp": 1.5})


@pytest.mark.parametrize("index", [0, 4, 7, 9])
def test_second_derivatives_and_tangents(index, monkeypatch):
    counted, options = launched(monkeypatch), options_of(index)
    x, b, w = eighths(2, 2, 7, 10), eighths(2), eighths(2, 2, 7, 10)
    dy = tangent_of = None
    found = []
    for backend in ("triton", "reference"):
        if backend == "reference":
            x, b, w, options = x.double(), b.double(), w.double(), {k: double(v) for k, v in options.items()}
        with genfast.use_backend(backend):

            def call(x, b):
                return ops.filtered_lrelu(x, b=b, **options)  # noqa: B023 - called in this turn

            leaves = [x.clone().requires_grad_(), b.clone().requires_grad_()]
            out = call(*leaves)
            dy = eighths(*out.shape) if dy is None else dy
            cotangent = dy.to(x.dtype).requires_grad_()
            dx, db = torch.autograd.grad(out, leaves, cotangent, create_graph=True)
            second = torch.autograd.grad((dx * w).sum() + db.sum(), (cotangent, *leaves), allow_unused=True)
            tangent_of = eighths(2) if tangent_of is None else tangent_of
            tangents = (w, tangent_of.to(x.dtype))
            forward = torch.func.jvp(call, (x, b), tangents)[1]
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, w), b)).tangent.clone()
            over = torch.func.grad(lambda w: torch.func.jvp(call, (x, b), (w, tangents[1]))[1].square().sum())(w)  # noqa: B023
        found.append([dx, db, *(t for t in second if t is not None), forward, dual, over])
        assert backend == "reference" or set(counted) == {0, 1, 2}
    for got, want in zip(*found, strict=True):
        assert_near(got.detach(), want.detach(), torch.float32)


def test_filters_that_the_kernel_leaves_to_upfirdn2d(monkeypatch):
    counted = launched(monkeypatch)
    x = torch.randn(1, 2, 9, 9)
    for fu, fd in ((torch.randn(9), None), (None, torch.randn(3, 2)), (torch.randn(3, requires_grad=True), None)):
        with genfast.use_backend("triton"):
            got = ops.filtered_lrelu(x, fu, fd, padding=8)
        want = ops.filtered_lrelu(
            x.double(), *(None if f is None else f.detach().double() for f in (fu, fd)), padding=8
        )
        torch.testing.assert_close(got.detach().double(), want, rtol=1e-5, atol=1e-5)
    assert counted == []
    with genfast.use_backend("triton"), pytest.raises(RuntimeError, match="8 times their factor"):
        torch.ops.genfast.filtered_lrelu(
            x,
            None,
            None,
            None,
            torch.ones(9),
            torch.ones(1),
            0,
            9,
            9,
            1,
            1,
            1,
            1,
            1,
            1,
            1,
            1,
            0,
            0,
            False,
            1.0,
            0.2,
            -1.0,
        )


@pytest.mark.parametrize("mode", [0, 2])
def test_rows_beyond_the_given_sizes_are_zeros(mode):
    """Sizes of direct calls need not fit together: what lies outside the upsampled image counts for nothing."""
    f, x = eighths(4), eighths(1, 1, 6, 5)
    sizes = (6, 5, 7, 6, 6, 5)  # of the input, the upsampled image and the output, which wants more rows of it
    arguments = (x, None, None if mode == 0 else eighths(1, 1, 6, 5), None, f, f, mode, *sizes, 2, 2, 2, 2, 1, 2, False)
    found = []
    for backend in ("triton", "reference"):
        with genfast.use_backend(backend):
            found.append(torch.ops.genfast.filtered_lrelu(*arguments, 1.0, 0.25, -1.0))
    torch.testing.assert_close(*found)


def test_every_allowed_filter_has_a_tile():
    for up in (1, 3, 4, 65536):
        for down in (1, 2, 4, 65536):
            for up_taps in {1, 2, min(32, 8 * up)}:
                for down_taps in {1, 3, min(32, 8 * down)}:
                    assert not launch.too_wide(torch.ones(up_taps), torch.ones(down_taps), (up, up), (down, down))
                    for size in (1, 500):
                        forward = ((size, size), (down, down), down_taps, (up, up), up_taps, (0, 0), 1, False)
                        back = ((size, size), (up, up), up_taps, (down, down), down_taps, (up, up), up_taps, False)
                        for y, x in (kernels.tile_of(*forward), kernels.tile_of(*back)):
                            assert max(*y[2:], *x[2:]) <= 64
    assert launch.too_wide(torch.ones(9), torch.ones(1), (1, 2), (1, 1))
    assert launch.too_wide(torch.ones(1), torch.ones(33), (1, 1), (5, 5))


@pytest.mark.parametrize("capability", [80, *(pytest.param(c, marks=pytest.mark.exhaustive) for c in (90, 100, 120))])
def test_compiles_without_spills(capability, tmp_path):
    variants = compile_variants("filtered_lrelu", capability, "" if capability > 80 else "-2-2-4-4$", tmp_path)
    assert len(variants) == (8 if capability > 80 else 2)
    for label, found in variants.items():
        assert not any(re.match("LDL|STL", i) for i in found["instructions"]), label
        assert all(s == 0 for s in found["stack"]), label
