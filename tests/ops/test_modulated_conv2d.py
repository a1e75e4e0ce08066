"""modulated_conv2d against the paper's equations with weights of each image, and zeros inserted by hand."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp
from torch.nn.functional import conv2d, pad

import genfast
from genfast import ops


def filtered(x, f, gain=1.0, **_):
    """upfirdn2d without up, down and padding: a true convolution of each channel, valid positions alone."""
    f = torch.outer(f, f) if f.dim() == 1 else f
    f = (f * gain).to(x.dtype).flip(0, 1).expand(x.shape[1], 1, *f.shape)
    return conv2d(x, f, groups=x.shape[1])


@pytest.fixture(autouse=True)
def plain_filter(monkeypatch):
    monkeypatch.setattr(ops, "upfirdn2d", filtered, raising=False)


def exact(x, weight, styles, up=1, down=1, padding=0, f=None, demodulate=True, flip_weight=True, noise=None):
    out = []
    taps = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    for image, style in zip(x, styles, strict=True):
        w = weight * style[None, :, None, None]
        if demodulate:
            w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        w = w if flip_weight else w.flip(2, 3)
        z = image[None]
        if up > 1:
            wide = z.new_zeros(1, z.shape[1], z.shape[2] * up, z.shape[3] * up)
            wide[:, :, ::up, ::up] = z
            z = wide
        around = []
        for n in reversed(taps):
            if up > 1:
                around += [padding + (n + up - 1) // 2, padding + (n - up) // 2]
            elif down > 1:
                around += [padding + (n - down + 1) // 2, padding + (n - down) // 2]
            else:
                around += [padding, padding]
        z = pad(z, around)
        z = filtered(z, f, up * up) if f is not None else z * up * up
        out.append(conv2d(z, w)[:, :, ::down, ::down])
    out = torch.cat(out)
    return out if noise is None else out + noise


def drawn(size=3, inputs=4, outputs=5, batch=3, height=7, width=6, dtype=torch.float64):
    return (
        torch.randn(batch, inputs, height, width, dtype=dtype),
        torch.randn(outputs, inputs, size, size, dtype=dtype),
        torch.randn(batch, inputs, dtype=dtype) + 1,
    )


FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
OTHER = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("flip_weight", [True, False])
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_matches_the_equations(size, demodulate, flip_weight):
    x, weight, styles = drawn(size)
    for padding in (0, 1, 2):
        for up, down, f in (
            (1, 1, None), (2, 1, FILTER), (2, 1, OTHER), (3, 1, FILTER), (2, 1, None), (1, 2, FILTER), (1, 2, OTHER),
            (1, 2, None), (1, 3, FILTER),
        ):  # fmt: skip
            options = {"up": up, "down": down, "padding": padding, "demodulate": demodulate, "flip_weight": flip_weight}
            got = ops.modulated_conv2d(x, weight, styles, resample_filter=f, **options)
            torch.testing.assert_close(got, exact(x, weight, styles, f=f, **options))


def test_noise():
    x, weight, styles = drawn()
    noise = torch.randn(3, 1, 5, 4, dtype=torch.float64)
    got = ops.modulated_conv2d(x, weight, styles, noise=noise)
    torch.testing.assert_close(got, exact(x, weight, styles, noise=noise))


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_derivatives(up, down):
    tensors = [t.requires_grad_() for t in drawn(3, 2, 2, 2, 3, 3)]
    f = None if up == down else FILTER

    def call(*tensors):
        return ops.modulated_conv2d(*tensors, up=up, down=down, padding=1, resample_filter=f)

    assert gradcheck(call, tensors, check_forward_ad=True)
    assert gradgradcheck(call, tensors)
    primals, tangents = tuple(t.detach() for t in tensors), tuple(torch.randn_like(t) for t in tensors)
    got = jvp(call, primals, tangents)[1]
    want = jvp(lambda *t: exact(*t, up=up, down=down, padding=1, f=f), primals, tangents)[1]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-4])
def test_half_precision_keeps_its_range(dtype, scale):
    """Weights and styles of 1e4 overflow float16 many times over; demodulation takes their scale out again."""
    x, weight, styles = drawn(inputs=64, dtype=torch.float32)
    weight, styles = weight * scale, styles * scale
    leaves = [t.detach().clone().requires_grad_() for t in (weight, styles)]
    out = ops.modulated_conv2d(x.to(dtype), *leaves, padding=1)
    doubles = [t.detach().double().requires_grad_() for t in (weight, styles)]
    want = exact(x.to(dtype).double(), *doubles, padding=1)
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert float((out.double() - want).norm() / want.norm()) < 2 * eps
    cotangent = torch.randn_like(want)
    for got, right in zip(
        torch.autograd.grad(out, leaves, cotangent.to(dtype)),
        torch.autograd.grad(want, doubles, cotangent),
        strict=True,
    ):
        assert float((got.double() - right).norm() / right.norm()) < 8 * eps


def test_compiles():
    x, weight, styles = drawn(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: ops.modulated_conv2d(*t, padding=1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, styles), ops.modulated_conv2d(x, weight, styles, padding=1))


def test_layer():
    layer = genfast.nn.ModulatedConv2d(4, 6, 3, latent_size=8, up=2, resample_filter=FILTER.float())
    x, latents = torch.randn(5, 4, 8, 8), torch.randn(5, 8)
    out = layer(x, latents, seed=1)
    assert out.shape == (5, 6, 16, 16)
    styles = latents @ layer.affine_weight.T / 8**0.5 + 1
    torch.testing.assert_close(
        out, exact(x, layer.weight, styles, up=2, padding=1, f=FILTER.float()), rtol=1e-4, atol=1e-5
    )
    with torch.no_grad():
        layer.noise_strength.fill_(0.5)
    noisy = layer(x, latents, seed=1) - out
    assert 0.4 < float(noisy.std()) < 0.6
    assert torch.allclose(noisy[:, :1].expand_as(noisy), noisy, atol=1e-5), "one noise for all channels"
    torch.testing.assert_close(layer(x[3:], latents[3:], seed=1, offset=3) - out[3:], noisy[3:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x, latents, noise=torch.ones(1, 1, 16, 16)), out + 0.5)
    assert 0.5 < float(out.std()) < 2.0
    rgb = genfast.nn.ModulatedConv2d(64, 3, 1, latent_size=8, demodulate=False, noise=False)
    assert 0.5 < float(rgb(torch.randn(9, 64, 8, 8), torch.randn(9, 8)).std()) < 2.5


def test_bad_input():
    x, weight, styles = drawn()
    call = ops.modulated_conv2d
    for error, match, run in (
        (ValueError, "got .*and", lambda: call(x, weight[:, :2], styles)),
        (ValueError, "styles must be", lambda: call(x, weight, styles[:2])),
        (ValueError, "one of up and down", lambda: call(x, weight, styles, up=2, down=2)),
        (ValueError, "up must be at least 1", lambda: call(x, weight, styles, up=0)),
        (ValueError, "goes with up or down", lambda: call(x, weight, styles, resample_filter=FILTER)),
        (ValueError, "at least one tap", lambda: call(x, weight, styles, up=2, resample_filter=FILTER[:0])),
        (TypeError, "int64", lambda: call(x.long(), weight, styles)),
        (ValueError, "on meta", lambda: call(x, weight.to("meta"), styles)),
    ):
        with pytest.raises(error, match=match):
            run()
    with pytest.raises(ValueError, match="odd"):
        genfast.nn.ModulatedConv2d(4, 4, 2, 8)
