"""Derivatives of bias_act in every mode and order, and bias_act in the framework: compile, transforms, autocast."""

from __future__ import annotations

import pytest
import torch
from bias_act_cases import assert_close, drawn, theirs
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap
from torch.library import opcheck

import genfast
from genfast import ops
from genfast.ops._bias_act_reference import ACTIVATIONS, PIECEWISE, derivative, in_order, memory_order, pack, unpack
from genfast.ops.bias_act import reference


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck(backend, act):
    x = (torch.randn(3, 2, 2, dtype=torch.float64) * 1.5).requires_grad_()
    b, dy = (
        torch.randn(2, dtype=torch.float64).requires_grad_(),
        torch.randn(3, 2, 2, dtype=torch.float64).requires_grad_(),
    )
    for clamp in (None, 0.9):

        def call(x, b):
            return ops.bias_act(x, b, act=act, clamp=clamp, gain=1.3)  # noqa: B023

        def gradients(x, b, dy):
            return torch.autograd.grad(call(x, b), (x, b), dy, create_graph=True)

        with genfast.use_backend(backend):
            assert gradcheck(call, (x, b), check_forward_ad=True, check_batched_grad=True)
            assert gradgradcheck(call, (x, b), check_fwd_over_rev=True, check_rev_over_rev=True)
            if clamp is None:
                assert gradgradcheck(gradients, (x, b, dy))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_plain_derivatives_are_each_others(act):
    z = torch.linspace(-6, 6, 40, dtype=torch.float64).requires_grad_()
    for order in range(1 if act in PIECEWISE else 3):
        (want,) = torch.autograd.grad(derivative(z, act, 0.4, order).sum(), z)
        torch.testing.assert_close(derivative(z, act, 0.4, order + 1), want)
    if act in PIECEWISE:
        assert not derivative(z, act, 0.4, 2).any()


def test_second_derivatives_of_piecewise_linear_activations():
    """Zero for b, nothing for x, and the gradient's own slope for dy."""
    for act in ("linear", "relu", "lrelu"):
        for clamp in (None, 0.7):
            x, b = (t.requires_grad_() for t in drawn((2, 3, 40), torch.float64))
            dy, v, v_b = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 40), (2, 3, 40), 3))
            dy.requires_grad_()
            first = torch.autograd.grad(ops.bias_act(x, b, act=act, clamp=clamp), (x, b), dy, create_graph=True)
            to_x, to_b, to_dy = torch.autograd.grad(first, (x, b, dy), (v, v_b), allow_unused=True)
            assert to_x is None
            assert torch.equal(to_b, torch.zeros(3, dtype=torch.float64))
            z = (x.detach() + b.detach().reshape(3, 1)).requires_grad_()
            (slope,) = torch.autograd.grad(theirs(z, None, act, clamp=clamp).sum(), z)
            assert_close(to_dy, slope * (v + v_b.reshape(3, 1)))


def test_gradient_penalty_of_a_network():
    """R1 of two layers, with everything that double backward needs of both, against plain PyTorch."""
    for act in ("lrelu", "swish"):
        x, w1, w2 = torch.randn(5, 4).double(), torch.randn(6, 4).double(), torch.randn(3, 6).double()
        found = []
        for call in (ops.bias_act, theirs):
            leaves = [t.clone().requires_grad_() for t in (w1, w2, torch.ones(6).double(), torch.zeros(3).double())]
            inputs = x.clone().requires_grad_()
            out = call(call(inputs @ leaves[0].T, leaves[2], act=act) @ leaves[1].T, leaves[3], act=act)
            (slope,) = torch.autograd.grad(out.sum(), inputs, create_graph=True)
            found.append(torch.autograd.grad(slope.square().sum() + out.mean(), leaves))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)


def test_functional_transforms():
    for act in ("lrelu", "gelu"):
        x, b = drawn((2, 3, 4), torch.float64)
        t, t_b = drawn((2, 3, 4), torch.float64, seed=1)
        w = torch.randn(2, 3, 4, dtype=torch.float64)

        def loss(x, b, call=ops.bias_act, act=act, w=w):
            return (call(x, b, act=act) * w).sin().sum()

        def plain(x, b, loss=loss):
            return loss(x, b, theirs)

        torch.testing.assert_close(grad(loss, (0, 1))(x, b), grad(plain, (0, 1))(x, b))
        torch.testing.assert_close(hessian(loss, (0, 1))(x, b), hessian(plain, (0, 1))(x, b))
        torch.testing.assert_close(jvp(loss, (x, b), (t, t_b)), jvp(plain, (x, b), (t, t_b)))

        def directional(x, f):
            return jvp(f, (x, b), (t, t_b))[1]  # noqa: B023

        torch.testing.assert_close(grad(directional)(x, loss), grad(directional)(x, plain))
        mapped = vmap(lambda x: ops.bias_act(x, b, dim=0, act=act))(x)  # noqa: B023
        torch.testing.assert_close(mapped, ops.bias_act(x, b, act=act))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, t)
            tangent = forward_ad.unpack_dual(ops.bias_act(dual, b, act=act)).tangent
        torch.testing.assert_close(tangent, jvp(lambda x: theirs(x, b, act), (x,), (t,))[1])  # noqa: B023


# ---- the framework ----


def test_opcheck():
    x, b = drawn((2, 3, 40), torch.float32)
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    names = torch.ops.genfast
    for act, clamp in (("lrelu", None), ("lrelu", 0.5), ("gelu", None), ("linear", 1.0)):
        gain, alpha = ACTIVATIONS[act]
        for tensor in (x, x.clone().requires_grad_(), channels_last):
            options = (memory_order(tensor), 1, act, alpha, gain, clamp)
            piecewise = act in PIECEWISE
            opcheck(names.bias_act.default, (tensor, b, *options, piecewise))
            bits = names.bias_act(tensor.detach(), b, *options, True)[1] if piecewise else None
            dy = torch.randn_like(tensor)
            kept = None if piecewise else tensor
            opcheck(names.bias_act_gradient.default, (dy, kept, b, bits, *options, True, True))
            opcheck(names.bias_act_gradient.default, (dy, kept, b, bits, *options, False, True))
            if not piecewise:
                v, v_b = torch.randn_like(tensor), torch.randn(3)
                opcheck(names.bias_act_second.default, (tensor, b, dy, v, v_b, *options, True, True, True))
                opcheck(names.bias_act_second.default, (tensor, None, dy, v, None, *options, False, True, False))


@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_compile(act):
    def call(x, b):
        return ops.bias_act(ops.bias_act(x, b, act=act, clamp=2.0), act="tanh", gain=2.0)

    for x in (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        leaves = [x.requires_grad_(), torch.randn(3, requires_grad=True)]
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        out = compiled(*leaves)
        assert torch.equal(out, call(*leaves))
        assert out.stride() == x.stride()
        got, want = (torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, call))
        torch.testing.assert_close(got, want)
    dynamic = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 40, 50):
        x, b = torch.randn(2, 3, rows, requires_grad=True), torch.randn(3)
        assert torch.equal(dynamic(x, b), call(x, b))
        torch.testing.assert_close(
            torch.autograd.grad(dynamic(x, b).sum(), x), torch.autograd.grad(call(x, b).sum(), x)
        )


@pytest.mark.slow
def test_compile_with_inductor():
    x, b = torch.randn(2, 3, 33, requires_grad=True), torch.randn(3, requires_grad=True)
    call = lambda x, b: ops.bias_act(x * 2, b, act="lrelu", clamp=1.0) + 1  # noqa: E731
    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(compiled(x, b), call(x, b))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, b).sum(), (x, b)), torch.autograd.grad(call(x, b).sum(), (x, b))
    )


def test_transforms_inside_a_compiled_region():
    x, b = drawn((2, 3, 4), torch.float32)
    compiled = torch.compile(
        lambda x: jvp(lambda x: ops.bias_act(x, b, act="gelu"), (x,), (x,))[1], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), jvp(lambda x: theirs(x, b, "gelu"), (x,), (x,))[1])


def test_autocast_keeps_the_layers_dtype():
    layer, b = torch.nn.Conv2d(2, 3, 3, bias=False), torch.nn.Parameter(torch.ones(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.bias_act(layer(torch.randn(1, 2, 6, 6)), b, act="lrelu")
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert b.grad.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float32


def test_explain_and_meta():
    x = torch.zeros(2, 3, 4, 5)
    assert genfast.explain("bias_act", x, act="gelu").chosen == "cpp"
    assert "no cuda kernel" in genfast.explain("bias_act", x).reasons["cuda"]
    meta = torch.empty(2, 5, 3, 4, device="meta").permute(0, 3, 1, 2)
    out = ops.bias_act(meta, torch.empty(4, device="meta"))
    assert (out.shape, out.stride()) == (meta.shape, meta.stride())


def test_packed_bits_come_back():
    for outer, channels, inner in ((3, 2, 40), (4, 5, 3), (1, 1, 70), (5, 1, 7), (0, 2, 40)):
        masks = [torch.rand(outer * channels * inner) > 0.5 for _ in range(2)]
        found = unpack(pack(masks, outer, channels, inner), outer, channels, inner) if outer else masks
        assert all(torch.equal(a, b) for a, b in zip(masks, found, strict=True))
    x = torch.randn(2, 3, 4).permute(2, 0, 1)
    assert in_order(x, memory_order(x)).data_ptr() == x.data_ptr()


def test_reference_is_differentiable():
    x, b = (t.requires_grad_() for t in drawn((2, 3, 2), torch.float64))
    for act, (gain, alpha) in ACTIVATIONS.items():
        assert gradcheck(lambda x, b: reference(x, b, 1, act, alpha, gain, 2.0), (x, b))  # noqa: B023
