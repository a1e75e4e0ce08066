"""The checks of spectral_normalize, minibatch_stddev and adain find faults; the helpers are those of test_verify.py."""

from __future__ import annotations

import pytest
from test_verify import _broken, _fails, _module

from genfast.launch import adain as adain_launch
from genfast.launch import minibatch_stddev as stddev_launch
from genfast.launch import spectral_normalize as spectral_launch


@pytest.mark.parametrize(
    ("op", "launcher", "change", "names"),
    [
        (
            "_op",
            "cpp",
            lambda right, *args: right(*args[:4], 2 * args[4], args[5]),
            {"forward", "small", "layouts", "gradients"},
        ),
        ("_op", "cpp", lambda right, *args: right(*args[:5], 1e-12), {"small"}),
        ("_backward_op", "cpp_backward", lambda right, *args: right(*args[:5], None, args[6]), {"gradients"}),
    ],
)
def test_wrong_spectral_norms_are_found(monkeypatch, op, launcher, change, names):
    _broken(monkeypatch, getattr(_module("spectral_normalize"), op), spectral_launch, launcher, change)
    tried = ("forward", "small", "gradients", "second order", "jvp", "layouts")
    assert set(_fails(*(f"spectral_normalize-{n}" for n in tried))) == {f"spectral_normalize-{n}" for n in names}


@pytest.mark.parametrize(
    ("op", "launcher", "change", "names"),
    [
        ("_op", "cpp", lambda right, x, *rest: right(x.flip(1), *rest), {"forward", "jvp", "layouts"}),
        ("_op", "cpp", lambda right, x, size, features, eps: right(x, 1, features, eps),
         {"forward", "large means", "layouts"}),
        ("_backward_op", "cpp_backward", lambda right, dout, x, *rest: right(dout, x + 1, *rest), set()),
        ("_backward_op", "cpp_backward", lambda right, dout, x, *rest: right(2 * dout, x, *rest) / 2, set()),
        ("_backward_op", "cpp_backward", lambda right, dout, x, *rest: right(dout, 2 * x, *rest), set()),
        ("_backward_op", "cpp_backward", lambda right, dout, x, *rest: right(dout, -x, *rest), {"gradients"}),
    ],
)  # fmt: skip
def test_wrong_deviations_are_found(monkeypatch, op, launcher, change, names):
    """Some changes are none: the gradient does not depend on a shift or the scale of x, and is linear in dout."""
    _broken(monkeypatch, getattr(_module("minibatch_stddev"), op), stddev_launch, launcher, change)
    found = set(_fails(*(f"minibatch_stddev-{n}" for n in ("forward", "large means", "gradients", "layouts"))))
    assert found == {f"minibatch_stddev-{n}" for n in names if n != "jvp"}


@pytest.mark.parametrize(
    ("op", "launcher", "change", "names"),
    [
        ("_op", "cpp", lambda right, x, scale, shift, eps: right(x, shift, scale, eps), {"forward", "affine"}),
        ("_op", "cpp", lambda right, x, *rest: right(x * 1.001, *rest[:2], 1e-2), {"forward", "affine", "large means",
                                                                                "layouts"}),
        ("_backward_op", "cpp_backward", lambda right, *args: (right(*args)[0], *right(*args)[:0:-1]), {"gradients"}),
        ("_backward_op", "cpp_backward", lambda right, dout, x, scale, *rest: right(dout, x, None, *rest),
         {"gradients"}),
    ],
)  # fmt: skip
def test_wrong_instance_norms_are_found(monkeypatch, op, launcher, change, names):
    _broken(monkeypatch, getattr(_module("adain"), op), adain_launch, launcher, change)
    found = set(_fails(*(f"adain-{n}" for n in ("forward", "affine", "large means", "layouts", "gradients"))))
    assert {f"adain-{n}" for n in names} <= found
