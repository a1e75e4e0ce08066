"""Adaptive discriminator augmentation; docs/gan_training.md has the transformations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from genfast import random
from genfast._checks import check_count, check_float_tensor, shape_of, wide
from genfast.ops import _noise

__all__ = ["ADA", "ada_augment"]

PARTS = ("blit", "geometry", "color")
_UNIFORMS, _NORMALS = 20, 4  # of an image


def check_pipeline(op: str, pipeline: Any) -> tuple[str, ...]:
    if not isinstance(pipeline, str):
        raise TypeError(f"{op}: pipeline must be a string, got {type(pipeline).__name__}")
    parts = tuple(filter(None, (name.strip() for name in pipeline.split(","))))
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"{op}: unknown part {part!r} of the pipeline; choose some of {', '.join(PARTS)}")
    return parts


def _rows(*rows: tuple[Any, ...]) -> Tensor:
    """Matrices [batch, rows, columns] of rows of numbers and of tensors [batch]."""
    like = next(entry for row in rows for entry in row if isinstance(entry, Tensor))
    full = [[e if isinstance(e, Tensor) else torch.full_like(like, e) for e in row] for row in rows]
    return torch.stack([torch.stack(row, -1) for row in full], -2)


def _linear(a: Any, b: Any, c: Any, d: Any) -> Tensor:
    return _rows((a, b, 0.0), (c, d, 0.0), (0.0, 0.0, 1.0))


def _source_of(u: Tensor, normal: Tensor, p: Tensor, parts: tuple[str, ...], height: Any, width: Any) -> Tensor:
    """Matrices [batch, 3, 3] from (x, y, 1) of the output, from its center, to where the image is read."""

    def chosen(gate: int, value: Tensor, neutral: float) -> Tensor:
        return torch.where(u[:, gate] < p, value, neutral)

    to_source = _linear(torch.ones_like(u[:, 0]), 0.0, 0.0, 1.0)
    if "blit" in parts:
        sign = chosen(0, 1.0 - 2.0 * (u[:, 1] < 0.5).to(u.dtype), 1.0)
        quarter = chosen(2, (4.0 * u[:, 3]).floor(), 0.0)
        # Exact cosine and sine of 0 to 3 quarters.
        cosine = 1.0 - torch.remainder(quarter, 2) - 2.0 * (quarter == 2).to(u.dtype)
        sine = torch.remainder(quarter, 2) * (2.0 - quarter)
        across = chosen(4, ((u[:, 5] * 0.25 - 0.125) * width).round(), 0.0)
        down = chosen(4, ((u[:, 6] * 0.25 - 0.125) * height).round(), 0.0)
        moved = _rows((1.0, 0.0, -across), (0.0, 1.0, -down), (0.0, 0.0, 1.0))
        to_source = _linear(sign, 0.0, 0.0, 1.0) @ _linear(cosine, sine, -sine, cosine) @ moved
    if "geometry" in parts:
        shrink = chosen(7, torch.exp2(-0.2 * normal[:, 0]), 1.0)
        angle = chosen(8, (2.0 * u[:, 9] - 1.0) * math.pi, 0.0)
        cosine, sine = angle.cos(), angle.sin()
        to_source = to_source @ _linear(shrink, 0.0, 0.0, shrink) @ _linear(cosine, sine, -sine, cosine)
    return to_source


def _sampled(x: Tensor, to_source: Tensor) -> Tensor:
    """Bilinear samples, images reflected at their borders: gathers and products, so that all derivatives exist."""
    batch, channels, height, width = x.shape
    row = torch.arange(height, device=x.device, dtype=to_source.dtype) - (height - 1) / 2
    column = torch.arange(width, device=x.device, dtype=to_source.dtype) - (width - 1) / 2
    at = to_source[:, :2, :, None, None]
    source = at[:, :, 0] * column + at[:, :, 1] * row[:, None] + at[:, :, 2]
    across, down = source[:, 0] + (width - 1) / 2, source[:, 1] + (height - 1) / 2
    left, top = across.floor(), down.floor()

    def reflected(index: Tensor, size: Any) -> Tensor:
        index = torch.remainder(index.to(torch.int64), 2 * size)
        return torch.where(index < size, index, 2 * size - 1 - index)

    flat = x.reshape(batch, channels, height * width)
    total = torch.zeros_like(x)
    for step_down in (0, 1):
        for step_across in (0, 1):
            by_row = down - top if step_down else 1.0 - (down - top)
            by_column = across - left if step_across else 1.0 - (across - left)
            index = reflected(top + step_down, height) * width + reflected(left + step_across, width)
            found = flat.gather(2, index.view(batch, 1, -1).expand(-1, channels, -1)).view(x.shape)
            total = total + found * (by_row * by_column).unsqueeze(1)
    return total


def _color_of(u: Tensor, normal: Tensor, p: Tensor) -> Tensor:
    """Matrices [batch, 4, 4] on (red, green, blue, 1)."""

    def chosen(gate: int, value: Tensor, neutral: float) -> Tensor:
        return torch.where(u[:, gate] < p, value, neutral)

    brightness = chosen(10, 0.2 * normal[:, 1], 0.0)
    contrast = chosen(11, torch.exp2(0.5 * normal[:, 2]), 1.0)
    flip = chosen(12, 1.0 - 2.0 * (u[:, 13] < 0.5).to(u.dtype), 1.0)
    hue = chosen(14, (2.0 * u[:, 15] - 1.0) * math.pi, 0.0)
    saturation = chosen(16, torch.exp2(normal[:, 3]), 1.0)
    luma = torch.full((3, 3), 1.0 / 3.0, device=u.device, dtype=u.dtype)  # the projection onto (1, 1, 1)
    rest = torch.eye(3, device=u.device, dtype=u.dtype) - luma
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], device=u.device, dtype=u.dtype)
    by = [t.view(-1, 1, 1) for t in (contrast, flip, saturation * hue.cos(), saturation * hue.sin() / math.sqrt(3.0))]
    # Contrast; the grey axis by the flip; what is orthogonal to it turned by the hue and stretched by the saturation.
    linear = by[0] * (by[1] * luma + by[2] * rest + by[3] * cross)
    offset = (brightness * contrast * flip).view(-1, 1, 1).expand(-1, 3, 1)
    last = torch.tensor([0.0, 0.0, 0.0, 1.0], device=u.device, dtype=u.dtype).expand(len(u), 1, 4)
    return torch.cat((torch.cat((linear, offset), 2), last), 1)


def _recolored(x: Tensor, color: Tensor) -> Tensor:
    if x.shape[1] == 3:
        flat = color[:, :3, :3] @ x.flatten(2) + color[:, :3, 3:]
        return flat.view(x.shape)
    scale, offset = color[:, :3, :3].sum((1, 2)) / 3.0, color[:, :3, 3].mean(1)  # of greys
    return x * scale.view(-1, 1, 1, 1) + offset.view(-1, 1, 1, 1)


def ada_augment(
    x: Tensor,
    p: float | Tensor,
    *,
    pipeline: str = "blit,geometry,color",
    seed: int | Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Transforms each image, each transformation with probability p: what ``nn.ADA`` does at its current p.

    =========== ==========================================================================================
    ``blit``    mirror; quarter turns; shifts by whole pixels, up to an eighth of the size
    ``geometry`` scaling by 2^(0.2 n); rotation by any angle; n standard normal
    ``color``   brightness + 0.2 n; contrast times 2^(0.5 n); light and dark swapped; hue; saturation times 2^n
    =========== ==========================================================================================

    All geometry is one bilinear sample of the image, reflected at its borders; mirrors, quarter turns and shifts alone
    are exact. All colors are one 4 x 4 matrix. The draws of an image depend on the seed and its index in the whole
    batch. Affine in x: derivatives of every order, reverse and forward.

    Args:
        x: images [batch, channels, height, width] with values around [-1, 1]; 3 channels, or 1, for ``color``.
        p: probability of each transformation, a float or a 0-d tensor.
        pipeline: parts with commas between.
        seed: an int, a 0-d int64 tensor, or None to draw one.
        offset: index of the first image in the whole batch.

    Returns:
        Images like x.

    Raises:
        TypeError: for something else than floating-point images and a string.
        ValueError: for other shapes, channels, parts or probabilities.

    Source: Karras et al., "Training generative adversarial networks with limited data", NeurIPS 2020, appendix B; here
    without the low-pass filters around the sampling, fractional shifts, uneven scaling, filtering and noise.

    Examples:
        >>> x = torch.rand(4, 3, 8, 8)
        >>> torch.equal(ada_augment(x, 0.0), x)
        True
    """
    op = "ada_augment"
    check_float_tensor(op, "x", x)
    parts = check_pipeline(op, pipeline)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be images [batch, channels, height, width], got shape {shape_of(x)}")
    if "color" in parts and x.shape[1] not in (1, 3):
        raise ValueError(f"{op}: color takes images of 1 or 3 channels, got {x.shape[1]}; leave it out of the pipeline")
    if not isinstance(p, Tensor):
        if not 0.0 <= float(p) <= 1.0:
            raise ValueError(f"{op}: p must be in [0, 1], got {p}")
        p = torch.full((), float(p), device=x.device)
    offset = check_count(op, "offset", offset, 0, 2**56)
    if x.numel() == 0 or not parts:
        return x.clone()
    kept, batch = wide(x.dtype), x.shape[0]
    drawn = random.as_seed(seed, x.device)
    u = _noise.uniform(drawn, _UNIFORMS * batch, _UNIFORMS * offset, 0).to(x.device, kept).view(batch, -1)
    normal = _noise.normal(drawn, _NORMALS * batch, _NORMALS * offset, 0).to(x.device, kept).view(batch, -1)
    p, out = p.to(x.device, kept), x.to(kept)
    with torch.autocast(x.device.type, enabled=False):
        if "blit" in parts or "geometry" in parts:
            out = _sampled(out, _source_of(u, normal, p, parts, x.shape[2], x.shape[3]))
        if "color" in parts:
            out = _recolored(out, _color_of(u, normal, p))
    return out.to(x.dtype)


class ADA(nn.Module):
    """Augmentation whose probability p adapts to the discriminator's overfitting.

    ``update`` takes the discriminator's logits of real training images. Every ``interval`` calls, r = E sign(D(real))
    is compared with the target: p moves up where r is above it (overfitting), else down, by such a step that it goes
    from 0 to 1 over ``images`` images. p, the counts and the sums are buffers, in the ``state_dict``; nothing waits for
    the device.

    Under data parallelism give ``update`` the logits of all processes, so that p is the same on each.

    Args:
        target: of r.
        images: over which p can go from 0 to 1.
        interval: calls of ``update`` between changes of p.
        p: to start from.
        pipeline: parts of ``ada_augment``.

    Raises:
        TypeError, ValueError: for numbers out of range and unknown parts.

    Source: Karras et al., "Training generative adversarial networks with limited data", NeurIPS 2020, section 3.

    Examples:
        >>> ada = ADA(images=1000, interval=1)
        >>> for _ in range(5):
        ...     ada.update(torch.ones(100))  # all real images are found out
        >>> round(ada.p.item(), 3)
        0.5
        >>> ada(torch.rand(4, 3, 8, 8), seed=0).shape
        torch.Size([4, 3, 8, 8])
    """

    p: Tensor
    sign_sum: Tensor
    sign_count: Tensor
    updates: Tensor

    def __init__(
        self,
        *,
        target: float = 0.6,
        images: int = 500_000,
        interval: int = 4,
        p: float = 0.0,
        pipeline: str = "blit,geometry,color",
    ) -> None:
        super().__init__()
        if not -1.0 <= float(target) <= 1.0:
            raise ValueError(f"ADA: target must be in [-1, 1], got {target}")
        if not 0.0 <= float(p) <= 1.0:
            raise ValueError(f"ADA: p must be in [0, 1], got {p}")
        check_pipeline("ADA", pipeline)
        self.target, self.pipeline = float(target), pipeline
        self.images = check_count("ADA", "images", images, 1)
        self.interval = check_count("ADA", "interval", interval, 1)
        self.register_buffer("p", torch.tensor(float(p)))
        self.register_buffer("sign_sum", torch.zeros(()))
        self.register_buffer("sign_count", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, real_logits: Tensor, *, images: int | None = None) -> None:
        """Counts the signs of the logits of real images, and changes p where it is due.

        Args:
            real_logits: of any shape; of relativistic losses the differences of real and generated ones.
            images: that they are of, where an image has several logits (patches) or several have one (packs); None:
                as many as logits.

        Raises:
            TypeError, ValueError: for something else than floating-point logits, or no positive number of images.
        """
        check_float_tensor("ADA.update", "real_logits", real_logits)
        signs = real_logits.detach().float().sign()
        count = signs.numel()
        if images is not None:
            images = check_count("ADA.update", "images", images, 1)
            if count == 0:
                raise ValueError(f"ADA.update: there are no logits of the {images} images")
        self.sign_sum += signs.sum() if images is None else signs.mean() * images
        self.sign_count += count if images is None else images
        self.updates += 1
        due = self.updates % self.interval == 0
        r = self.sign_sum / self.sign_count.clamp_min(1.0)
        step = (r - self.target).sign() * self.sign_count / self.images
        self.p.copy_(torch.where(due, (self.p + step).clamp(0.0, 1.0), self.p))
        self.sign_sum.masked_fill_(due, 0.0)
        self.sign_count.masked_fill_(due, 0.0)

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None, offset: int = 0) -> Tensor:
        """Augmented images; x itself in evaluation mode."""
        if not self.training:
            return x
        return ada_augment(x, self.p, pipeline=self.pipeline, seed=seed, offset=offset)

    def extra_repr(self) -> str:
        return f"target={self.target}, images={self.images}, interval={self.interval}, pipeline={self.pipeline!r}"
