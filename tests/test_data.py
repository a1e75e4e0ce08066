"""Data readers: what they read, and what they say about files that are not what they should be."""

import gzip
import struct

import numpy as np
import pytest
import torch

from genfast import data


def idx(path, array, magic=None, packed=False, cut=0):
    kinds = {"uint8": 0x08, "int8": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}
    code = next(code for name, code in kinds.items() if np.dtype(name) == array.dtype)
    head = magic or bytes([0, 0, code, array.ndim])
    content = head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    content = content[: len(content) - cut]
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_idx_images_are_scaled_to_one(tmp_path, packed):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    images[0, 0, 0], images[0, 0, 1] = 0, 255
    found = data.read_idx(idx(tmp_path / "images", images, packed=packed))
    assert found.shape == (4, 3)
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values, torch.tensor(images.reshape(5, 12) / 255.0).float(), rtol=1e-7, atol=0)
    assert (found.values[0, 0], found.values[0, 1]) == (0, 1)


@pytest.mark.parametrize("dtype", ["int8", ">i2", ">i4", ">f4", ">f8"])
def test_idx_of_other_types_is_left_as_it_is(tmp_path, dtype):
    values = np.array([[-3, 7], [120, 0]], dtype=dtype)
    found = data.read_idx(idx(tmp_path / "values", values))
    assert found.shape == (2,)
    assert torch.equal(found.values, torch.tensor([[-3.0, 7.0], [120.0, 0.0]]))


@pytest.mark.parametrize(
    ("images", "labels", "packed"),
    [
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", False),
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", True),
        ("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte.gz", True),
        ("images.gz", "labels", False),
    ],
)
def test_idx_labels_lie_beside(tmp_path, images, labels, packed):
    source = f"idx:{idx(tmp_path / images, np.ones((3, 2, 2), np.uint8), packed=images.endswith('gz'))}"
    assert data.read_rows(source).labels is None
    idx(tmp_path / labels, np.array([7, 0, 7], np.uint8), packed=packed)
    for scale in (None, 2.0):
        found = data.read_rows(source, scale)
        assert found.labels.dtype == torch.int64
        assert found.labels.tolist() == [7, 0, 7]
    for wrong in (np.array([7, 0], np.uint8), np.array([[7, 0, 7]], np.uint8), np.array([7, 0, 7], np.int8)):
        idx(tmp_path / labels, wrong, packed=packed)
        with pytest.raises(ValueError, match=r"labels.* lies beside .*images.* 3 bytes"):
            data.read_rows(source)


def test_idx_errors(tmp_path):
    images = np.ones((2, 3, 3), np.uint8)
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data.read_idx(path)
    with pytest.raises(ValueError, match="not a file"):
        data.read_idx(tmp_path)
    with pytest.raises(ValueError, match="starts with 89 50 4e 47"):
        data.read_idx(idx(path, images, magic=b"\x89PNG"))
    with pytest.raises(ValueError, match="starts with 00 00 07"):
        data.read_idx(idx(path, images, magic=b"\0\0\x07\x03"))
    with pytest.raises(ValueError, match="labels"):
        data.read_idx(idx(path, np.ones(5, np.uint8)))
    with pytest.raises(ValueError, match="promises 2x3x3 values, 18 bytes, but holds 17"):
        data.read_idx(idx(path, images, cut=1))
    with pytest.raises(ValueError, match="ends within its header"):
        data.read_idx(idx(path, images, cut=20))
    with pytest.raises(ValueError, match="holds no values"):
        data.read_idx(idx(path, images[:0]))
    with pytest.raises(ValueError, match=r"example 1 .* NaN"):
        data.read_idx(idx(path, np.array([[0, 1], [2, np.nan]], dtype=">f4")))
    with pytest.raises(ValueError, match="too large"):
        data.read_idx(idx(path, np.array([[0, 1e300]], dtype=">f8")))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="starts with nothing"):
        data.read_idx(path)
    path.write_bytes(gzip.compress(b"\0" * 1000)[:20])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        data.read_idx(path)


@pytest.mark.parametrize(
    "text",
    [
        "1,2\n3,-4.5e1\n",
        "a,b\n1,2\n3,-45\n",
        "\ufeffa,b\r\n1,2\r\n\r\n3,-45\r\n",
        '"width";"height"\n1;2\n3;-45',
        '"1"\t"2"\n3\t"-45"\n',
        "1 2\n3  -45\n",
    ],
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("missing", [False, True])
def test_csv_dialects(tmp_path, text, packed, missing):
    path = tmp_path / "table"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert torch.equal(data.read_csv(path, missing=missing), torch.tensor([[1.0, 2.0], [3.0, -45.0]]))


def test_csv_of_one_column(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("x\n1\n2\n")
    assert torch.equal(data.read_csv(path), torch.tensor([[1.0], [2.0]]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,b\n", "a header and no numbers"),
        ("1,2\n3,4,5\n", "line 2: 3 columns, the lines before have 2"),
        ("a,b\n1,2\n\n3\n", "line 4: 1 columns, the lines before have 2"),
        ("1,x\n3,4\n", "line 1, column 2: 'x' is no number"),  # with a number in it, the line is no header
        ("a,b\n1,2\n3,1_0\n", "line 3, column 2: '1_0' is no number"),
        ("1,2\n3,\n", "line 2, column 2: the cell is empty"),
        ("1,2\nnan,4\n", "line 2, column 1: nan is not a finite"),
        ("1,2\n3,inf\n", "line 2, column 2: inf is not a finite"),
        ("1,2\n3,1e39\n", "line 2, column 2: 1e39 is not a finite"),
    ],
)
def test_csv_errors_name_the_place(tmp_path, text, message):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        data.read_csv(path)


def test_csv_that_is_no_text(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="not text"):
        data.read_csv(path)


def test_csv_with_missing_cells(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b,c\n1,,nan\n,2,3\n")
    found = data.read_csv(path, missing=True)
    wanted = torch.tensor([[1, float("nan"), float("nan")], [float("nan"), 2, 3]])
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_sources(tmp_path):
    found = data.read_rows("digits")
    assert found.values.shape == (1797, 64)
    assert found.shape == (8, 8)
    assert (found.values.min(), found.values.max()) == (0, 1)
    assert found.values[0].view(8, 8)[0].tolist() == [0, 0, 5 / 16, 13 / 16, 9 / 16, 1 / 16, 0, 0]
    path = tmp_path / "table.csv"
    path.write_text("2,4\n")
    assert torch.equal(data.read_rows(f"csv:{path}", scale=4).values, torch.tensor([[0.5, 1.0]]))
    assert torch.equal(
        data.read_rows(f"idx:{idx(tmp_path / 'i', np.ones((1, 2), np.uint8))}").values, torch.full((1, 2), 1 / 255)
    )
    for source in ("mnist", "idx:", "csv", "digits:8"):
        with pytest.raises(ValueError, match="choose digits, idx:PATH, csv:PATH or images:DIR"):
            data.read_rows(source)
    for scale in (0.0, float("nan")):
        with pytest.raises(ValueError, match="scale"):
            data.read_rows("digits", scale=scale)


def test_binarize():
    values = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]).repeat(20_000, 1)
    assert torch.equal(data.binarize(values, "threshold")[0], torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]))
    assert data.binarize(values, "none") is values
    drawn = data.binarize(values, "sample", torch.Generator().manual_seed(0))
    assert torch.equal(drawn, data.binarize(values, "sample", torch.Generator().manual_seed(0)))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    # Five standard deviations on three means: a false alarm in 600,000 seeds.
    sigma = (values[0] * (1 - values[0]) / len(values)).sqrt()
    assert bool(((drawn.mean(0) - values[0]).abs() <= 5 * sigma).all())
    assert not bool(((data.binarize(values, "threshold").mean(0) - values[0]).abs() <= 5 * sigma).all())
    with pytest.raises(ValueError, match="threshold, sample, none"):
        data.binarize(values, "round")


def test_one_hot():
    found = data.one_hot(torch.tensor([[1.0, float("nan")], [0.0, 2.0]]), 3)
    wanted = torch.tensor([[0, 1, 0, *[float("nan")] * 3], [1, 0, 0, 0, 0, 1]])
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    for value in (3.0, -1.0, 0.5):
        with pytest.raises(ValueError, match=f"row 0, column 1 .* is {value:g}"):
            data.one_hot(torch.tensor([[0.0, value]]), 3)
