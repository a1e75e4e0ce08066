"""Grey and color pictures as PNG files, without other packages."""

from __future__ import annotations

import math
import struct
import zlib

import torch
from torch import Tensor

__all__ = ["grid", "png"]

_PICTURE_PIXELS = 56  # an image's longer side is enlarged to about this


def grid(images: Tensor, across: int | None = None) -> Tensor:
    """Images of values in [0, 1] as one picture, uint8, with gaps between.

    Args:
        images: [N, rows, columns] with 1 in black, or [N, channels, rows, columns] of 1 or 3 channels with 1 in white.
        across: images side by side; None for a square of images.

    Returns:
        [rows, columns], or [rows, columns, 3] for three channels.
    """
    levels = images.clamp(0, 1).mul(255).round().to(torch.uint8)
    levels = 255 - levels.unsqueeze(-1) if images.dim() == 3 else levels.movedim(1, -1)
    count, rows, columns, channels = levels.shape
    zoom = max(1, _PICTURE_PIXELS // max(rows, columns))
    across = math.ceil(math.sqrt(count)) if across is None else across
    down = -(-count // across)
    levels = levels.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    height, width, gap = rows * zoom, columns * zoom, max(2, zoom)
    picture = torch.full((down * (height + gap) + gap, across * (width + gap) + gap, channels), 200, dtype=torch.uint8)
    for index, image in enumerate(levels):
        top, left = gap + index // across * (height + gap), gap + index % across * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture.squeeze(-1)


def png(picture: Tensor) -> bytes:
    """A uint8 picture [rows, columns] or [rows, columns, 3] as the contents of a PNG file.

    Source: the PNG specification, ISO/IEC 15948.
    """

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows, columns = picture.shape[:2]
    color = 2 if picture.dim() == 3 else 0
    lines = torch.cat((torch.zeros(rows, 1, dtype=torch.uint8), picture.cpu().flatten(1)), 1).numpy().tobytes()
    header = struct.pack(">IIBBBBB", columns, rows, 8, color, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines, 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
