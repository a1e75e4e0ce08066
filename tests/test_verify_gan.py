"""The checks of the kernels of GANs find faults; the helpers are those of test_verify.py."""

from __future__ import annotations

import importlib

from test_verify import _broken, _fails, _module

from genfast.launch import bias_act as bias_act_launch
from genfast.launch import diff_augment as diff_augment_launch
from genfast.launch import filtered_lrelu as filtered_lrelu_launch
from genfast.launch import gan_loss as gan_loss_launch
from genfast.launch import upfirdn2d as upfirdn2d_launch


def test_wrong_loss_of_a_gan_is_found(monkeypatch):
    def mistaken(change):
        _broken(monkeypatch, _module("gan_loss")._op, gan_loss_launch, "cpp", lambda right, *args: change(right(*args)))
        return _fails(*(f"gan_loss-{name}" for name in ("values", "gradients", "extremes", "layouts")))

    assert mistaken(lambda out: (out[0] * (1 + 2**-12), *out[1:])) == [
        "gan_loss-values", "gan_loss-gradients", "gan_loss-extremes", "gan_loss-layouts",
    ]  # fmt: skip
    assert mistaken(lambda out: (*out[:2], None if out[2] is None else -out[2])) == ["gan_loss-gradients"]


def test_wrong_filtering_is_found(monkeypatch):
    names = ("forward", "channels last", "layouts", "gradients", "second order", "jvp")

    def mistaken(change):
        op = _module("upfirdn2d")._op
        _broken(monkeypatch, op, upfirdn2d_launch, "cpp", lambda right, *args: right(*change(*args)))
        return [name.removeprefix("upfirdn2d-") for name in _fails(*(f"upfirdn2d-{name}" for name in names))]

    assert mistaken(lambda *args: (*args[:10], not args[10], args[11])) == list(names)  # the filter turned
    assert mistaken(lambda *args: (*args[:8], args[8] + 1, *args[9:])) == list(names)  # a pixel to the side
    assert mistaken(lambda *args: (*args[:9], args[9] - 1, *args[10:])) == list(names)  # and upwards
    assert mistaken(lambda *args: (*args[:11], 1.0)) == ["forward", "channels last", "gradients", "second order", "jvp"]


def test_wrong_activations_are_found(monkeypatch):
    module = importlib.import_module("genfast.ops.bias_act")
    names = [f"bias_act-{name}" for name in ("forward", "activations", "gradients", "second order", "layouts", "jvp")]

    def mistaken(op, launcher, wrong):
        with monkeypatch.context() as patch:
            _broken(patch, op, bias_act_launch, launcher, wrong)
            return [name.removeprefix("bias_act-") for name in _fails(*names)]

    def unscaled(right, *args):  # gain forgotten in the second derivative
        return right(*args[:9], 1.0, *args[10:])

    def unclamped(right, dy, x, *rest):  # clamp forgotten where the gradient comes from x
        return right(dy, x, *rest[:7], rest[7] if x is None else None, *rest[8:])

    def other_channel(right, *args):  # the sums of the neighbour
        dx, db = right(*args)
        return dx, None if db is None else db.roll(1)

    def other_side(right, *args):  # the slope at zero and all others from the right
        y, bits = right(*args)
        return y, None if bits is None else ~bits

    assert mistaken(module._second_op, "cpp_second", unscaled) == ["second order"]
    assert mistaken(module._gradient_op, "cpp_gradient", unclamped) == ["gradients"]
    assert mistaken(module._gradient_op, "cpp_gradient", other_channel) == ["gradients"]
    assert mistaken(module._forward_op, "cpp_forward", other_side) == [
        "activations", "gradients", "second order", "layouts",
    ]  # fmt: skip


def test_wrong_augmentations_are_found(monkeypatch):
    names = ("forward", "gradients", "second order", "jvp", "layouts", "shards")

    def mistaken(change):
        op = _module("diff_augment")._op
        _broken(monkeypatch, op, diff_augment_launch, "cpp", lambda right, *args: change(right, *args))
        return [name.removeprefix("diff_augment-") for name in _fails(*(f"diff_augment-{name}" for name in names))]

    assert mistaken(lambda right, x, seed, offset, *rest: right(x, seed, offset + 1, *rest)) == list(names[:5])
    assert mistaken(lambda right, x, seed, offset, *rest: right(x, seed, 0, *rest)) == [
        "forward", "gradients", "second order", "jvp", "shards",
    ]  # fmt: skip
    assert mistaken(lambda right, *args: right(*args[:4], min(args[4], 1))) == ["gradients", "layouts"]  # no transpose
    assert mistaken(lambda right, *args: right(*args[:4], 0 if args[4] == 1 else args[4])) == ["second order", "jvp"]
    assert mistaken(lambda right, *args: right(*args) * (1 + 2**-12)) == list(names[:5])


def test_wrong_filtered_activations_are_found(monkeypatch):
    names = ("forward", "gradients", "second order", "jvp", "layouts", "tiles")

    def mistaken(change):
        op = _module("filtered_lrelu")._op
        _broken(monkeypatch, op, filtered_lrelu_launch, "cpp", lambda right, *args: right(*change(*args)))
        return [name.removeprefix("filtered_lrelu-") for name in _fails(*(f"filtered_lrelu-{name}" for name in names))]

    def option(index, change):  # of in_h ... clamp; v, biases, gate, filters and mode come first
        return lambda *args: (*args[: 7 + index], change(args[7 + index], args[6]), *args[8 + index :])

    assert mistaken(option(12, lambda correlate, mode: not correlate)) == list(names)
    assert mistaken(option(11, lambda pad, mode: pad + 1)) == list(names)
    assert mistaken(option(10, lambda pad, mode: pad - (mode == 2))) == ["gradients", "tiles"]
    assert mistaken(option(13, lambda gain, mode: 1.0 if mode == 1 else gain)) == ["second order", "jvp"]
    assert mistaken(option(14, lambda slope, mode: 0.2 if mode else slope)) == [
        "gradients",
        "second order",
        "jvp",
        "tiles",
    ]
    assert mistaken(option(15, lambda clamp, mode: -1.0 if mode else clamp)) == [
        "gradients",
        "second order",
        "jvp",
        "tiles",
    ]
    assert mistaken(lambda *args: (args[0], None, *args[2:])) == ["forward", "jvp", "layouts", "tiles"]  # no bias
    assert mistaken(lambda *args: (*args[:3], None, *args[4:])) == ["gradients", "second order", "jvp", "tiles"]
