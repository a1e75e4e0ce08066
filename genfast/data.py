"""Readers of data for training: scikit-learn's digits, idx files (MNIST's format), CSV, folders of images.

Nothing is unpickled.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "BINARIZE", "Rows", "binarize", "digits", "one_hot", "parse_size", "read_csv", "read_idx", "read_idx_labels",
    "read_images", "read_rows",
]  # fmt: skip

BINARIZE = ("threshold", "sample", "none")

_IMAGES = (".jpeg", ".jpg", ".png")
_LARGEST = float(np.finfo(np.float32).max)
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class Rows(NamedTuple):
    """Data, one row an example."""

    values: Tensor  # [N, V], float32
    shape: tuple[int, ...] | None  # of an example that is an image, with V elements; None for a plain row
    labels: Tensor | None = None  # [N], int64, where the data have some


def digits() -> Rows:
    """scikit-learn's 1,797 handwritten 8 x 8 digits, scaled to [0, 1], and their labels.

    Raises:
        ModuleNotFoundError: without scikit-learn (``pip install genfast[examples]``).

    Examples:
        >>> digits().values.shape
        torch.Size([1797, 64])
    """
    from sklearn import datasets

    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)
    return Rows(images.flatten(1) / 16, (8, 8), torch.tensor(found.target, dtype=torch.int64))


def read_rows(source: str, scale: float | None = None, size: tuple[int, int] | None = None) -> Rows:
    """Reads ``digits``, ``idx:PATH``, ``csv:PATH`` or ``images:DIR``; of ``idx`` also labels that lie beside the file.

    Args:
        source: what to read.
        scale: divide the values by this; None for 1, and for what ``digits``, ``read_idx`` and ``read_images`` do
            themselves.
        size: (height, width) of images, see ``read_images``.

    Raises:
        FileNotFoundError: for a file that is not there.
        ModuleNotFoundError: for ``digits`` without scikit-learn, and ``images`` without Pillow.
        ValueError: for another kind of source, or a file that is not what it should be.

    Examples:
        >>> read_rows("digits", scale=0.5).values.max()
        tensor(2.)
    """
    kind, _, path = source.partition(":")
    if size is not None and kind != "images":
        raise ValueError(f"a size is for images:DIR, not for {source}")
    if source == "digits":
        rows = digits()
    elif kind == "idx" and path:
        rows = read_idx(path)
        rows = rows._replace(labels=read_idx_labels(path, len(rows.values)))
    elif kind == "csv" and path:
        rows = Rows(read_csv(path), None)
    elif kind == "images" and path:
        rows = read_images(path, size)
    else:
        raise ValueError(f"data {source!r} is unknown; choose digits, idx:PATH, csv:PATH or images:DIR")
    if scale is None:
        return rows
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"scale must be a finite number other than 0, got {scale:g}")
    return rows._replace(values=rows.values / scale)


def _read_bytes(path: Path | str) -> bytes:
    """The file's contents, unpacked if it is a gzip file, whatever its name."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def read_idx(path: Path | str) -> Rows:
    """Reads an idx file, the format of MNIST's images, gzipped or not.

    Args:
        path: of a file with at least two dimensions, the first of which counts the examples. Unsigned bytes are divided
            by 255, other types are left as they are.

    Returns:
        The examples, flat, and the shape of one of them; values are finite.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: for a file of another format or length, without examples, or with NaN or infinity.

    Source: the format's description with the MNIST database, http://yann.lecun.com/exdb/mnist.
    """
    content = _read_bytes(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_TYPES:
        raise ValueError(
            f"{path} is not an idx file: it starts with {content[:4].hex(' ') or 'nothing'}, not with 00 00, a type "
            "(08 for bytes) and the number of dimensions"
        )
    dtype, rank = np.dtype(_IDX_TYPES[content[2]]), content[3]
    if rank < 2:
        raise ValueError(f"{path} has {rank} dimension(s): it holds labels, not images; labels are not needed")
    start = 4 + 4 * rank
    if len(content) < start:
        raise ValueError(f"{path} ends within its header")
    shape = struct.unpack(f">{rank}I", content[4:start])
    wanted, found = math.prod(shape) * dtype.itemsize, len(content) - start
    if wanted != found:
        raise ValueError(f"{path} promises {'x'.join(map(str, shape))} values, {wanted} bytes, but holds {found}")
    if math.prod(shape) == 0:
        raise ValueError(f"{path} holds no values: its shape is {'x'.join(map(str, shape))}")
    stored = np.frombuffer(content, dtype, offset=start).reshape(shape[0], -1)
    with np.errstate(over="ignore"):
        values = torch.from_numpy(stored.astype(np.float32))
    if content[2] == 0x08:
        values /= 255
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        raise ValueError(f"{path}: example {int(bad[0, 0])} (from 0) has a value that is NaN or too large for float32")
    return Rows(values, tuple(shape[1:]))


def read_idx_labels(path: Path | str, count: int) -> Tensor | None:
    """Labels of an idx file of images, from the file beside it that is named as MNIST's are.

    Args:
        path: of the images, e.g. ``train-images-idx3-ubyte``; the labels are then in ``train-labels-idx1-ubyte``, with
            or without ``.gz``.
        count: how many images there are.

    Returns:
        [count], int64; None where the name has no ``images`` or there is no such file.

    Raises:
        ValueError: for labels that are no idx file of as many bytes.
    """
    path = Path(path)
    before, images, after = path.name.rpartition("images")
    if not images:
        return None
    name = before + "labels" + after.replace("idx3", "idx1")
    names = (name, name.removesuffix(".gz"), f"{name}.gz")
    beside = next((path.with_name(found) for found in names if path.with_name(found).is_file()), None)
    if beside is None:
        return None
    content = _read_bytes(beside)
    wanted = b"\0\0\x08\1" + struct.pack(">I", count)
    if content[:8] != wanted or len(content) != 8 + count:
        raise ValueError(
            f"{beside} lies beside {path.name} and should hold its labels, {count} bytes in an idx file of one "
            "dimension, but does not; move it away to go without"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=8).astype(np.int64))


def parse_size(text: str, what: str = "size") -> tuple[int, int]:
    """(rows, columns) of ``"28x28"``, or of ``"28"`` for a square.

    Raises:
        ValueError: for anything else; it names ``what``.

    Examples:
        >>> parse_size("28x20"), parse_size("64")
        ((28, 20), (64, 64))
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"{what} must be ROWSxCOLUMNS, as 28x28, got {text!r}")
    return int(sides[0]), int(sides[-1])


def read_images(folder: Path | str, size: tuple[int, int] | None = None) -> Rows:
    """Reads the PNG and JPEG files of a folder and of those within, in the order of their names, by Pillow.

    Args:
        folder: where they are.
        size: (height, width): each image is scaled to it, and where its proportions are others cut at the edges evenly.
            None: as they are, which must be of one size.

    Returns:
        The images, flat, in [0, 1] with 0 for black, and their shape (channels, height, width): one channel if all are
        grey, else red, green and blue. Transparent parts are white.

    Raises:
        FileNotFoundError: if the folder is not there.
        ModuleNotFoundError: without Pillow (``pip install genfast[examples]``).
        ValueError: for a folder without images, images of several sizes, or a file that is no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist" if not folder.exists() else f"{folder} is not a folder")
    from PIL import Image, ImageOps

    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES and path.is_file())
    if not paths:
        raise ValueError(f"{folder} holds no images: files that end in {', '.join(_IMAGES)}")
    if size is not None and min(size) < 1:
        raise ValueError(f"size must be at least 1 x 1, got {size[0]} x {size[1]}")

    def opened(path: Path, mode: str) -> Any:
        image: Any = ImageOps.exif_transpose(Image.open(path))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode.startswith("I"):  # 16 bits
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        image = image.convert(mode)
        return image if size is None else ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)

    found: Any = None
    path = paths[0]
    try:
        grey = True
        for path in paths:
            with Image.open(path) as image:
                grey = grey and image.mode in ("1", "L", "LA", "I", "I;16")
        for index, path in enumerate(paths):
            pixels = np.asarray(opened(path, "L" if grey else "RGB"), np.float32)
            if found is None:
                found = np.empty((len(paths), *pixels.shape), np.float32)
            if pixels.shape != found.shape[1:]:
                sizes = " and ".join(f"{shape[0]} x {shape[1]}" for shape in (found.shape[1:], pixels.shape))
                raise ValueError(f"its size is not that of the images before it: {sizes}; give a size to scale them to")
            found[index] = pixels
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {error}") from None
    images = torch.from_numpy(found).div_(255)
    images = images.unsqueeze(1) if images.dim() == 3 else images.movedim(-1, 1)
    return Rows(images.flatten(1), tuple(images.shape[1:]))


def read_csv(path: Path | str, *, missing: bool = False) -> Tensor:
    """Reads a table of numbers separated by commas, semicolons, tabs or spaces, gzipped or not.

    Args:
        path: of the file, UTF-8. A first line without any number is a header, and is skipped, as are empty lines.
        missing: allow empty cells and ``nan``, and return NaN for them.

    Returns:
        [rows, columns], float32.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: for a file without numbers, a line of another length than the first, or a cell that is empty, no
            number, NaN or infinite; it names the line and the column.

    Examples:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.csv"
        >>> _ = path.write_text("a,b\\n1,2\\n3,4.5\\n")
        >>> read_csv(path)
        tensor([[1.0000, 2.0000],
                [3.0000, 4.5000]])
    """
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8; is it a CSV file?") from None
    lines = [(number, line) for number, line in enumerate(io.StringIO(text), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty")
    first = lines[0][1]
    delimiter = max(",;\t", key=first.count)
    if delimiter not in first:
        delimiter = " "
    if not any(_is_number(cell) for cell in _cells(first, delimiter)):
        del lines[0]
    if not lines:
        raise ValueError(f"{path} holds a header and no numbers")
    if not missing:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                values = torch.from_numpy(
                    np.loadtxt(
                        (line for _, line in lines), np.float32, comments=None, ndmin=2, quotechar='"',
                        delimiter=None if delimiter == " " else delimiter,
                    )
                )  # fmt: skip
            if bool(torch.isfinite(values).all()):
                return values
        except (ValueError, Warning):
            pass
    return torch.tensor(_parse(path, lines, delimiter, missing), dtype=torch.float32)


def _cells(line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        return line.split()
    return [cell.strip() for cell in next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter), [])]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _parse(path: Path | str, lines: list[tuple[int, str]], delimiter: str, missing: bool) -> list[list[float]]:
    """The slow way, which says what is wrong and where."""
    rows: list[list[float]] = []
    for number, line in lines:
        cells = _cells(line, delimiter)
        if rows and len(cells) != len(rows[0]):
            raise ValueError(f"{path}, line {number}: {len(cells)} columns, the lines before have {len(rows[0])}")
        row = []
        for column, cell in enumerate(cells, 1):
            where = f"{path}, line {number}, column {column}"
            if not cell and missing:
                cell = "nan"
            if not cell:
                raise ValueError(f"{where}: the cell is empty")
            if not _is_number(cell):
                raise ValueError(f"{where}: {cell[:40]!r} is no number")
            value = float(cell)
            if abs(value) > _LARGEST or (math.isnan(value) and not missing):
                raise ValueError(f"{where}: {cell[:40]} is not a finite float32 number")
            row.append(value)
        rows.append(row)
    return rows


def binarize(values: Tensor, how: str, generator: torch.Generator | None = None) -> Tensor:
    """Makes 0 and 1 of values in [0, 1].

    Args:
        values: any shape.
        how: ``"threshold"``: 1 from 0.5 on; ``"sample"``: 1 with the value as its probability; ``"none"``: as it is.
        generator: of the samples, on the CPU; None for torch's default one.

    Raises:
        ValueError: for another ``how``.

    Examples:
        >>> binarize(torch.tensor([0.2, 0.5, 1.0]), "threshold")
        tensor([0., 1., 1.])
    """
    if how == "threshold":
        return (values >= 0.5).to(values.dtype)
    if how == "sample":
        uniforms = torch.rand(values.shape, generator=generator, device="cpu")
        return (uniforms.to(values.device) < values).to(values.dtype)
    if how == "none":
        return values
    raise ValueError(f"binarize must be one of {', '.join(BINARIZE)}, got {how!r}")


def one_hot(values: Tensor, categories: int) -> Tensor:
    """Category numbers [N, V] as softmax states [N, V * categories]; NaN gives a group of NaN.

    Raises:
        ValueError: if a value is no integer from 0 to categories - 1.

    Examples:
        >>> one_hot(torch.tensor([[2.0, 0.0]]), 3)
        tensor([[0., 0., 1., 1., 0., 0.]])
    """
    known = ~torch.isnan(values)
    chosen = torch.where(known, values, 0)
    bad = ((chosen != chosen.round()) | (chosen < 0) | (chosen >= categories)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(
            f"softmax:{categories} units hold integers from 0 to {categories - 1}; row {row}, column {column} (from 0) "
            f"is {values[row, column].item():g}"
        )
    states = torch.nn.functional.one_hot(chosen.long(), categories).to(values.dtype)
    return states.masked_fill(~known.unsqueeze(-1), math.nan).flatten(1)
