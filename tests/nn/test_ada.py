"""ADA: its control of p, exact blitting, colors, derivatives, and DiffAugment's module."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from genfast import nn, ops, random
from genfast.nn import ADA, ada, ada_augment


def test_p_moves_by_the_images_seen():
    control = ADA(images=1000, interval=2, p=0.5)
    high, low = torch.ones(50, 1), -torch.ones(50, 1)
    control.update(high)
    assert control.p == 0.5
    control.update(high)
    assert control.p == pytest.approx(0.6)
    for logits in (high, low):  # r = 0 is below the target of 0.6
        control.update(logits)
    assert control.p == pytest.approx(0.5)
    for _ in range(4):  # r = 0.6: signs 4 of 5 and 1 of 5
        control.update(torch.tensor([1.0, 2.0, 3.0, 4.0, -1.0]))
    assert control.p == pytest.approx(0.5)
    for _ in range(100):
        control.update(high)
    assert control.p == 1.0
    for _ in range(300):
        control.update(low)
    assert control.p == 0.0


@pytest.mark.parametrize("logits", [(100, 1, 3, 3), (50,)])
def test_images_of_patches_and_packs_are_counted(logits):
    control = ADA(images=1000, interval=2, target=0.0)
    control.update(torch.ones(logits), images=100)
    control.update(-torch.ones(logits), images=50)
    assert control.p == pytest.approx(0.15)  # r = 1/3
    with pytest.raises(ValueError, match="images must be at least 1"):
        control.update(torch.ones(3), images=0)
    with pytest.raises(ValueError, match="no logits of the 4 images"):
        control.update(torch.ones(0), images=4)


def test_state_is_kept():
    first, second = ADA(images=1000, interval=3), ADA(images=1000, interval=3)
    first.update(torch.ones(30))
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        first.update(torch.ones(30))
        second.update(torch.ones(30))
    assert first.p == second.p == pytest.approx(0.09)
    assert first.eval()(x := torch.randn(2, 3, 4, 4)) is x


def test_mirrors_turns_and_shifts_are_exact():
    x = torch.randn(300, 3, 16, 16)
    out = ada_augment(x, 1.0, pipeline="blit", seed=5)
    u = random.uniform(20 * 300, torch.tensor(5)).view(300, 20)
    found = set()
    for image, got, draw in zip(x, out, u, strict=True):
        flip, quarter = bool(draw[1] < 0.5), int(4 * draw[3])
        image = image.flip(2) if flip else image
        image = torch.rot90(image, -quarter, (1, 2))
        across, down = (round(float((draw[i] * 0.25 - 0.125) * 16)) for i in (5, 6))
        doubled = torch.cat((image.flip(1), image, image.flip(1)), 1)
        doubled = torch.cat((doubled.flip(2), doubled, doubled.flip(2)), 2)
        want = doubled[:, 16 - down : 32 - down, 16 - across : 32 - across]
        assert torch.equal(got, want), (flip, quarter, across, down)
        found.add((flip, quarter))
    assert len(found) == 8


def test_geometry_is_a_rotation_about_the_center():
    """A linear ramp stays one: its slope turns and is scaled."""
    line = torch.arange(33, dtype=torch.float64) - 16
    x = torch.stack((line.expand(33, 33), line.view(-1, 1).expand(33, 33))).expand(40, 2, 33, 33)
    out = ada_augment(x, 1.0, pipeline="geometry", seed=2)
    u = random.uniform(20 * 40, torch.tensor(2)).view(40, 20).double()
    n = random.normal(4 * 40, torch.tensor(2)).view(40, 4)
    middle = slice(14, 19)
    for got, draw, normal in zip(out, u, n, strict=True):
        angle, size = (2 * draw[9] - 1) * math.pi, 2.0 ** (0.2 * float(normal[0]))
        across = (angle.cos() * line[middle] + angle.sin() * line[middle].view(-1, 1)) / size
        torch.testing.assert_close(got[0, middle, middle], across)
        assert got[0, 16, 16].abs() < 1e-9


def test_colors():
    x = torch.randn(64, 3, 4, 4, dtype=torch.float64)
    out = ada_augment(x, 1.0, pipeline="color", seed=3)
    u = random.uniform(20 * 64, torch.tensor(3)).view(64, 20).double()
    n = random.normal(4 * 64, torch.tensor(3)).view(64, 4)
    axis = torch.ones(3, dtype=torch.float64) / 3**0.5
    for image, got, draw, normal in zip(x, out, u, n, strict=True):
        pixels = (image + 0.2 * normal[1]) * 2 ** (0.5 * normal[2])
        pixels = pixels.permute(1, 2, 0)
        if draw[13] < 0.5:  # reflect at the plane across the grey axis
            pixels = pixels - 2 * (pixels @ axis).unsqueeze(-1) * axis
        angle = (2 * draw[15] - 1) * math.pi
        along = (pixels @ axis).unsqueeze(-1) * axis
        turned = (
            pixels * angle.cos()
            + torch.linalg.cross(axis.expand_as(pixels), pixels) * angle.sin()
            + along * (1 - angle.cos())
        )  # Rodrigues
        along = (turned @ axis).unsqueeze(-1) * axis
        want = along + (turned - along) * 2 ** normal[3]
        torch.testing.assert_close(got.permute(1, 2, 0), want)
    grey = torch.randn(64, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(
        ada_augment(grey, 1.0, pipeline="color", seed=3),
        ada_augment(grey.expand(-1, 3, -1, -1), 1.0, pipeline="color", seed=3)[:, :1],
    )


def test_p_is_the_share_of_changed_images():
    x = torch.randn(4000, 1, 2, 2)
    same = (ada_augment(x, 0.3, pipeline="geometry", seed=0) == x).flatten(1).all(1).float().mean()
    assert abs(float(same) - 0.7**2) < 0.03
    assert torch.equal(ada_augment(x, 0.0, seed=0), x)


def test_shards_and_seeds():
    x = torch.randn(8, 3, 6, 6)
    whole = ada_augment(x, 0.8, seed=9, offset=100)
    torch.testing.assert_close(ada_augment(x[3:], 0.8, seed=9, offset=103), whole[3:])
    torch.manual_seed(1)
    assert not torch.equal(ada_augment(x, 0.8), ada_augment(x, 0.8))


@pytest.mark.parametrize("channels", [1, 3])
def test_derivatives(channels):
    x = torch.randn(2, channels, 4, 5, dtype=torch.float64, requires_grad=True)

    def call(x):
        return ada_augment(x, 1.0, seed=6)

    assert gradcheck(call, x, check_forward_ad=True)
    assert gradgradcheck(lambda x: call(x).square(), x)


def test_compiles_with_penalties():
    control = ADA(p=0.7)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    x = torch.randn(5, 3, 4, 4)

    def penalty(x, method):
        return nn.r1_penalty(lambda x: network(control(x, seed=1)), x, method=method)

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: penalty(x, "jvp"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), penalty(x, "double_backward"))


def test_diff_augment_module():
    layer, x = nn.DiffAugment("cutout"), torch.randn(3, 3, 8, 8)
    assert torch.equal(layer(x, seed=3), ops.diff_augment(x, "cutout", seed=3))
    assert layer.eval()(x) is x
    assert "cutout" in repr(layer)
    with pytest.raises(ValueError, match="unknown policy"):
        nn.DiffAugment("blur")


def test_bad_input():
    x = torch.zeros(2, 3, 4, 4)
    for error, match, run in (
        (ValueError, "unknown part 'noise'", lambda: ADA(pipeline="noise")),
        (ValueError, "target", lambda: ADA(target=2.0)),
        (ValueError, "p must be", lambda: ADA(p=1.5)),
        (ValueError, "interval", lambda: ADA(interval=0)),
        (ValueError, "p must be", lambda: ada_augment(x, -0.1)),
        (ValueError, "1 or 3 channels", lambda: ada_augment(x[:, :2], 0.5)),
        (ValueError, "must be images", lambda: ada_augment(x[0], 0.5)),
        (TypeError, "uint8", lambda: ada_augment(x.byte(), 0.5)),
    ):
        with pytest.raises(error, match=match):
            run()
    assert ada.PARTS == ("blit", "geometry", "color")
