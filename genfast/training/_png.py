"""Grey pictures as PNG files, without other packages."""

from __future__ import annotations

import math
import struct
import zlib

import torch
from torch import Tensor

__all__ = ["grid", "png"]

_PICTURE_PIXELS = 56  # an image's longer side is enlarged to about this


def grid(images: Tensor) -> Tensor:
    """Images [N, rows, columns] of values in [0, 1] as one picture, uint8, 1 in black, with gaps between."""
    count, rows, columns = images.shape
    zoom = max(1, _PICTURE_PIXELS // max(rows, columns))
    across = math.ceil(math.sqrt(count))
    down = -(-count // across)
    ink = images.clamp(0, 1).mul(-255).add(255).round().to(torch.uint8)
    ink = ink.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    height, width, gap = rows * zoom, columns * zoom, max(2, zoom)
    picture = torch.full((down * (height + gap) + gap, across * (width + gap) + gap), 200, dtype=torch.uint8)
    for index, image in enumerate(ink):
        top, left = gap + index // across * (height + gap), gap + index % across * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def png(picture: Tensor) -> bytes:
    """A uint8 picture [rows, columns] as the contents of a PNG file. Source: the PNG specification, ISO/IEC 15948."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows, columns = picture.shape
    lines = torch.cat((torch.zeros(rows, 1, dtype=torch.uint8), picture.cpu()), 1).numpy().tobytes()
    header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines, 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
