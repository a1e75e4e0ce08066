"""The reproductions: readers of data, figures in tables, and each script from end to end on small data."""

import csv
import dataclasses
import gzip
import importlib
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genfast import ops
from genfast.nn import RBM

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from genfast.benchmarks.reproduce import _common as common
from genfast.benchmarks.reproduce import (
    bars_and_stripes,
    centering,
    dbn_features,
    gan_digits,
    mnist_rbm,
    mnist_rbm_large,
    movielens,
    ring_grid,
    stacked_digits,
)

SCRIPTS = (
    "bars_and_stripes", "mnist_rbm", "mnist_rbm_large", "centering", "dbn_features", "movielens", "linear_vae", "iwae",
    "vqvae", "ring_grid", "stacked_digits", "gan_digits",
)  # fmt: skip
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "reproduce"


def rows_of(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def idx(shape, body, kind=8):
    return bytes([0, 0, kind, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + bytes(body)


# ---- readers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_read_idx(tmp_path, packed):
    path = tmp_path / ("images.gz" if packed else "images")
    content = idx((2, 2, 3), range(12))
    path.write_bytes(gzip.compress(content) if packed else content)
    assert torch.equal(common.read_idx(path), torch.arange(12, dtype=torch.uint8).view(2, 2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx((2, 3), range(5)), "2x3 bytes after its header, not 5"),
        (idx((1,), [0], kind=13), "no IDX file"),
        (b"\x1f\x8b", "no IDX file"),
    ],
)
def test_read_idx_refuses(tmp_path, content, message):
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        common.read_idx(tmp_path / "broken")


def mnist_folder(folder, count, train=0):
    def write(stem, shape, body):
        (folder / f"{stem}.gz").write_bytes(gzip.compress(idx(shape, body)))

    for stem, number in (("t10k", count), ("train", train)):
        if number:
            write(f"{stem}-images-idx3-ubyte", (number, 2, 2), [i % 256 for i in range(4 * number)])
            write(f"{stem}-labels-idx1-ubyte", (number,), [i % 10 for i in range(number)])
    return folder


def test_ten_thousand_images_are_split_and_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("GENFAST_DATA", str(mnist_folder(tmp_path, 10)))
    digits = common.load_digits(None, quick=False)
    assert (len(digits.train), len(digits.test), digits.side) == (8, 2, 2)
    torch.testing.assert_close(digits.test, torch.arange(32.0, 40.0).view(2, 4) / 255)
    assert digits.test_labels.tolist() == [8, 9]
    assert "NOT the published data" in digits.note
    assert "60,000" in digits.note


def test_training_images_are_used_where_they_are(tmp_path):
    digits = common.load_digits(mnist_folder(tmp_path, 4, train=6), quick=False)
    assert (len(digits.train), len(digits.test)) == (6, 4)
    assert "as published" in digits.note


def test_without_data_the_message_says_what_to_do(monkeypatch):
    monkeypatch.delenv("GENFAST_DATA", raising=False)
    with pytest.raises(common.typer.BadParameter, match="GENFAST_DATA"):
        common.load_digits(None, quick=False)
    with pytest.raises(common.typer.BadParameter, match="GENFAST_DATA"):
        common.load_ratings(None, quick=False)


def test_read_ratings(tmp_path):
    path = tmp_path / "movielens-100k.csv.gz"
    path.write_bytes(gzip.compress(b"user,item,rating,timestamp\n1,2,5,0\n3,1,2,0\n"))
    users, items, ratings, note = common.load_ratings(tmp_path, quick=False)
    assert (users.tolist(), items.tolist(), ratings.tolist()) == ([0, 2], [1, 0], [5.0, 2.0])
    assert "2 ratings of 3 users, 2 items" in note
    (tmp_path / "other.csv").write_text("user,item\n1,2\n")
    with pytest.raises(ValueError, match="no column rating"):
        common.read_ratings(tmp_path / "other.csv")


def test_binarize():
    grey = torch.tensor([0.0, 0.49, 0.5, 1.0])
    assert common.binarize(grey).tolist() == [0, 0, 1, 1]
    drawn = common.binarize(torch.full((40_000,), 0.3), seed=1)
    assert torch.equal(drawn, common.binarize(torch.full((40_000,), 0.3), seed=1))
    assert abs(drawn.mean().item() - 0.3) < 5 * math.sqrt(0.21 / 40_000)


def test_parse_seeds():
    assert common.parse_seeds("0-3,7") == [0, 1, 2, 3, 7]
    for wrong in ("", "3-1", "a", "1-", "-1"):
        with pytest.raises(ValueError, match="seeds must look like"):
            common.parse_seeds(wrong)


# ---- figures -----------------------------------------------------------------------------------------------------


def test_mean_and_error():
    values = [1.0, 2.5, 4.0, 0.5]
    mean, error = common.mean_and_error(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / 2)
    assert math.isnan(common.mean_and_error([3.0])[1])


def test_the_bound_is_the_entropy_of_the_rows():
    for n, rows, distinct, best in ((3, 16, 14, -2.5993), (4, 32, 30, -108.131 / 32)):
        v = bars_and_stripes.bars_and_stripes(n)
        assert (len(v), len(v.unique(dim=0))) == (rows, distinct)
        assert bars_and_stripes.bound(v) == pytest.approx(best, abs=1e-4)
        images = v.view(-1, n, n)
        constant = (images == images[:, :1]).all((1, 2)) | (images == images[:, :, :1]).all((1, 2))
        assert constant.all()


def test_exact_log_likelihood():
    torch.manual_seed(0)
    rbm = RBM(5, 3, dtype=torch.float64)
    torch.nn.init.normal_(rbm.W)
    bits = [(torch.arange(2**n).unsqueeze(1) >> torch.arange(n) & 1).double() for n in (5, 3)]
    energies = -(bits[0] @ rbm.b).unsqueeze(1) - bits[0] @ rbm.W @ bits[1].T - bits[1] @ rbm.c
    joint = torch.log_softmax(-energies.flatten(), 0).view(32, 8).logsumexp(1)
    log_z, likelihood = common.exact_log_likelihood(rbm, bits[0][:7])
    assert log_z == pytest.approx((-energies).flatten().logsumexp(0).item(), abs=1e-10)
    assert likelihood == pytest.approx(joint[:7].mean().item(), abs=1e-10)


def test_log_z_of_the_centered_energy():
    torch.manual_seed(0)
    rbm = RBM(5, 3, centered=True, dtype=torch.float64)
    for tensor in (rbm.W, rbm.b, rbm.c):
        torch.nn.init.normal_(tensor)
    rbm.visible_offset.uniform_()
    rbm.hidden_offset.uniform_()
    v, h = ((torch.arange(2**n).unsqueeze(1) >> torch.arange(n) & 1).double() for n in (5, 3))
    m, offset = rbm.visible_offset, rbm.hidden_offset
    b, c = rbm.b + rbm.W @ offset, rbm.c + m @ rbm.W  # of the centered parametrization of the same p(v, h)
    scores = ((v - m) @ b).unsqueeze(1) + (v - m) @ rbm.W @ (h - offset).T + (h - offset) @ c
    expected = scores.flatten().logsumexp(0).item()
    log_z = ops.rbm_log_z_exact(rbm.W, rbm.b, rbm.c).item()
    assert mnist_rbm.centered_log_z(rbm, log_z) == pytest.approx(expected, abs=1e-10)


def test_the_bracket_holds_the_exact_value():
    torch.manual_seed(0)
    v = (torch.rand(200, 12) < 0.3).float()
    options = {"centered": True, "rate": 0.1, "updates": 200, "falling": True, "seed": 0, "batch": 20}
    *_, (updates, rbm) = mnist_rbm.train(v, 6, 1, True, **options)
    assert updates == 200
    log_z, exact = common.exact_log_likelihood(rbm, v)
    found = mnist_rbm.bracket(rbm, v, v, 500, 200, seed=1)
    for side in ("forward", "reverse"):  # 5 sigma: false alarms below 1e-6
        assert abs(found[f"log_z_{side}"] - log_z) < 5 * found[f"error_{side}"] + 1e-3
        assert found[f"test_{side}"] == pytest.approx(exact + log_z - found[f"log_z_{side}"], abs=1e-6)
    assert found["error_forward"] < 0.1
    wrong = RBM(12, 6)
    wrong.load_state_dict({**wrong.state_dict(), "W": 2 * rbm.W, "b": rbm.b, "c": rbm.c}, strict=False)
    other = mnist_rbm.bracket(wrong, v, v, 500, 200, seed=1)
    assert abs(other["log_z_forward"] - log_z) > 5 * other["error_forward"] + 1e-3


def test_batches_are_the_rows_once_a_pass():
    v = torch.arange(7.0).unsqueeze(1)
    stream = mnist_rbm.batches(v, 3, seed=0)
    first = torch.cat([next(stream), next(stream)]).flatten().tolist()
    assert len(set(first)) == 6
    assert torch.cat([next(stream), next(stream)]).flatten().tolist() != first


def test_bars_and_stripes_come_near_the_bound():
    """3 x 3, exact likelihood: within 0.3 nats a row after a fifth of the steps; an untrained RBM is 3.6 away."""
    best = bars_and_stripes.bound(bars_and_stripes.bars_and_stripes(3))
    curve = bars_and_stripes.train(3, "tempering", seed=0, steps=600)
    assert best - 0.3 < curve[-1]["log_likelihood"] <= best
    assert curve[-1]["step"] == 600
    assert best - common.exact_log_likelihood(RBM(9, 16), bars_and_stripes.bars_and_stripes(3))[1] > 3


# ---- ratings -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ratings():
    users, items, values, _ = common.load_ratings(None, quick=True)
    return movielens.Ratings(users, items, values)


def test_split_is_fixed_and_disjoint(ratings):
    train, test = movielens.split(ratings, 0.2, 0)
    again, _ = movielens.split(ratings, 0.2, 0)
    assert torch.equal(train.items, again.items)
    assert len(test) == round(0.2 * len(ratings))
    pairs = [set(zip(part.users.tolist(), part.items.tolist(), strict=True)) for part in (train, test)]
    assert not pairs[0] & pairs[1]
    assert len(pairs[0] | pairs[1]) == len(ratings)


def test_biases_solve_their_normal_equations(ratings):
    mean, by_user, by_item = movielens.biases(ratings, 60, 40, penalty=3.0, sweeps=200)
    left = ratings.values - mean - by_user[ratings.users] - by_item[ratings.items]
    for rows, bias in ((ratings.users, by_user), (ratings.items, by_item)):
        gradient = torch.zeros(len(bias)).index_add(0, rows, left) - 3.0 * bias
        assert gradient.abs().max() < 1e-3


def test_ridge_is_ridge(ratings):
    torch.manual_seed(0)
    x, y = torch.randn(len(ratings), 3), torch.randn(len(ratings))
    found = movielens._ridge(ratings.users, x, y, 60, 2.0)
    mine = ratings.users == 7
    augmented = torch.cat([x[mine], math.sqrt(2.0) * torch.eye(3)])
    expected = torch.linalg.lstsq(augmented, torch.cat([y[mine], torch.zeros(3)]).unsqueeze(1)).solution[:, 0]
    torch.testing.assert_close(found[7], expected, rtol=1e-4, atol=1e-5)


def test_rmse_and_item_means():
    assert movielens.rmse(torch.tensor([0.0, 4.0]), torch.tensor([1.0, 2.0])) == pytest.approx(math.sqrt(2))
    train = movielens.Ratings(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), torch.tensor([5.0, 3.0, 1.0]))
    torch.testing.assert_close(movielens.item_means(train, 3), torch.tensor([11 / 3, 2.0, 3.0]))


# ---- from end to end ---------------------------------------------------------------------------------------------


def run(name, folder, *options):
    environment = {key: value for key, value in os.environ.items() if key != "GENFAST_DATA"}
    command = [sys.executable, "-m", f"genfast.benchmarks.reproduce.{name}", "--out", str(folder), *options]
    return subprocess.run(
        command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, tmp_path):
    """A quick run without data: the table's figures are those of the rows beside it, and pictures are there."""
    done = run(name, tmp_path, "--quick", "--seeds", "3,5", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "published" in done.stdout
    table = rows_of(tmp_path / "table.csv")
    assert table[0]["torch"] == torch.__version__
    assert table[0]["seeds"] == "3 5"
    assert table[0]["date"]
    assert "--out" not in table[0]["command"]
    assert list(tmp_path.glob("*.png"))
    check_table(name, tmp_path)


def check_table(name, folder):
    """Recomputes the figures of a table that are plain means over seeds."""
    expected = recomputed(name, folder)
    assert expected
    table = {row["quantity"]: row for row in rows_of(folder / "table.csv")}
    for quantity, values in expected.items():
        row = table[quantity]
        assert float(row["ours"]) == pytest.approx(statistics.fmean(values), rel=1e-4, abs=1e-4), quantity
        assert int(row["runs"]) == len(values)
        if len(values) > 1:
            error = statistics.stdev(values) / math.sqrt(len(values))
            assert float(row["standard_error"]) == pytest.approx(error, rel=1e-2, abs=1e-4), quantity


def recomputed(name, folder):
    def column(stem, key, **where):
        rows = [row for row in rows_of(folder / f"{stem}.csv") if all(row[k] == str(v) for k, v in where.items())]
        return [float(row[key]) for row in rows]

    if name == "bars_and_stripes":
        found = {}
        for n in (3, 4):
            for method in ("tempering", "PCD-1"):
                last = max(int(row["step"]) for row in rows_of(folder / "curve.csv") if row["n"] == str(n))
                values = column("curve", "log_likelihood", n=n, method=method, step=last)
                found[f"{n} x {n}, {method}: log p(v), mean of {2 ** (n + 1)} rows"] = values
        return found
    if name == "mnist_rbm":
        labels = {"log_z_centered": "log Z of the centered energy", "test": "log p(test)", "train": "log p(train)"}
        return {f"16 hidden, PCD-1: {label}": column("runs", key) for key, label in labels.items()}
    if name == "mnist_rbm_large":
        return {
            f"{setting.name}: log p(test), {side} AIS": column(
                "runs", f"test_{side}", setting=setting.name, stage="end"
            )
            for setting in mnist_rbm_large.LARGE
            for side in ("forward", "reverse")
        }
    if name == "centering":
        last = max(int(row["updates"]) for row in rows_of(folder / "curve.csv"))
        return {
            f"{kind}, {data}: log p({key})": column("curve", key, model=kind, data=data, updates=last)
            for kind, data in centering.PUBLISHED
            for key in ("test", "train")
        }
    if name == "dbn_features":
        return {
            "DBN features (both layers), linear classifier": column("runs", "features"),
            "feed-forward network from the DBN's weights": column("runs", "tuned"),
        }
    if name == "linear_vae":
        return {"log p(x), exact": column("runs", "exact"), "estimate - exact": column("runs", "difference")}
    if name == "iwae":
        kinds = {(row["gradient"], row["samples"], row["kernels"]) for row in rows_of(folder / "runs.csv")}
        return {
            f"{gradient.upper()}, k = {samples}, kernels {kernels}": column(
                "runs", "negative_log_likelihood", gradient=gradient, samples=samples, kernels=kernels
            )
            for gradient, samples, kernels in kinds
        }
    if name == "vqvae":
        return {
            f"perplexity of the codes: {kind}": column("runs", "perplexity", quantizer=kind)
            for kind in ("genfast", "plain", "revived")
        }
    if name == "ring_grid":
        kinds = {(row["data"], row["method"], row["kernels"]) for row in rows_of(folder / "runs.csv")}
        return {
            f"{data}, {ring_grid.NAMES[method]}, kernels {kernels}: {title}": column(
                "runs", key, data=data, method=method, kernels=kernels
            )
            for data, method, kernels in kinds
            for key, title in (
                ("modes", f"modes of {len(ring_grid.DATA[data].centers)}"),
                ("quality", "high-quality share"),
            )
        }
    if name in ("stacked_digits", "gan_digits"):
        stacked = name == "stacked_digits"
        kind = "method" if stacked else "model"
        names = stacked_digits.METHODS if stacked else {key: found.name for key, found in gan_digits.MODELS.items()}
        titles = stacked_digits.MEASURES if stacked else {k: t for k, t in gan_digits.MEASURES.items() if k != "fid"}
        return {
            f"{names[model]}, kernels {kernels}: {title}": column("runs", key, **{kind: model, "kernels": kernels})
            for model, kernels in {(row[kind], row["kernels"]) for row in rows_of(folder / "runs.csv")}
            for key, title in titles.items()
        }
    return {f"RBM, {movielens.HIDDEN} hidden units": column("runs", "rbm")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_committed_results(name):
    """The committed tables agree with the committed runs and name their data; few and small files."""
    folder = RESULTS / name
    if not folder.exists():
        pytest.skip("no results here")
    check_table(name, folder)
    first = rows_of(folder / "table.csv")[0]
    assert "quick" not in first["note"]
    assert first["commit"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20


def test_wrong_seeds_are_refused(tmp_path):
    done = run("bars_and_stripes", tmp_path, "--quick", "--seeds", "9-1")
    assert done.returncode == 2
    assert "seeds must look like" in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_needs_no_data():
    for name in SCRIPTS:
        assert importlib.import_module(f"genfast.benchmarks.reproduce.{name}").main.__doc__


def test_untrained_network_shares_no_weights():
    dbn = dbn_features.DBN(4, (3,))
    net = dbn_features.random_network(dbn, seed=0)
    assert not torch.equal(net[0].weight, dbn.layers[0].W.T)
    assert [tuple(p.shape) for p in net.parameters()] == [(3, 4), (3,), (10, 3), (10,)]


def test_the_plain_bound_is_the_bound():
    """What trains without kernels is the same bound: averages over many draws agree."""
    from genfast.benchmarks.reproduce import iwae

    torch.manual_seed(0)
    for gradient in ("vae", "iwae"):
        model = iwae.make_model(6, gradient, 4, (5,), 2)
        x = torch.bernoulli(torch.full((3, 6), 0.5)).repeat(4000, 1)
        with torch.no_grad():
            plain, ours = (bound.view(-1, 3).double() for bound in (iwae.plain_bound(model, x), model.bound(x, seed=1)))
        error = ((plain.var(0) + ours.var(0)) / len(plain)).sqrt()
        assert ((plain.mean(0) - ours.mean(0)).abs() < 4.5 * error).all()  # six comparisons: false alarm below 1e-4


def test_the_rate_falls_by_ten_in_growing_steps():
    from genfast.benchmarks.reproduce import iwae

    rates = [iwae.rate(i / 3280, published=True) for i in range(3280)]
    lengths = [rates.count(rate) for rate in dict.fromkeys(rates)]
    assert lengths == [1, 3, 9, 27, 81, 243, 729, 2187]
    assert rates[0] == 1e-3
    assert rates[-1] == pytest.approx(1e-4)
    short = [iwae.rate(i / 20, published=False) for i in range(20)]
    assert short[:13] == [1e-3] * 13
    assert 1e-4 < short[-1] < 1.5e-4


def test_an_iwae_run_goes_on_where_it_ended(tmp_path):
    """Runs that the folder has are kept, others are added; of another schedule none is."""
    from genfast.benchmarks.reproduce import iwae

    options = {"quick": True, "out": tmp_path, "threads": 1, "seeds": "0"}
    iwae.main(**options, kernels="on", samples="1,5,50")
    first = rows_of(tmp_path / "runs.csv")
    iwae.main(**options, kernels="both", samples="1,5,50", resume=True)
    both = rows_of(tmp_path / "runs.csv")
    assert [row["kernels"] for row in first] == ["on", "on"]
    assert [row["kernels"] for row in both] == ["on", "on", "off", "off"]
    for old, new in zip(first, both, strict=False):
        assert old["negative_log_likelihood"] == new["negative_log_likelihood"]
    text = (tmp_path / "runs.csv").read_text().replace(",3,200,", ",4,200,")
    (tmp_path / "runs.csv").write_text(text)
    schedule, digits = iwae.Schedule.of(quick=True, full=False), common.load_digits(None, quick=True)
    assert iwae.finished(tmp_path / "runs.csv", schedule, digits) == []
    (tmp_path / "runs.csv").write_text(text.replace(",4,200,", ",3,200,"))
    assert len(iwae.finished(tmp_path / "runs.csv", schedule, digits)) == 4
    fewer = dataclasses.replace(digits, train=digits.train[1:])
    assert iwae.finished(tmp_path / "runs.csv", schedule, fewer) == []


def test_the_plain_quantizer_is_the_textbooks():
    """Codes, losses and running means against genfast's own layer, update by update."""
    from genfast.benchmarks.reproduce import vqvae
    from genfast.nn import VectorQuantizer

    torch.manual_seed(0)
    layers = [VectorQuantizer(8, 3, channel_last=False, seed=0) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].__class__ = vqvae.PlainQuantizer
    for _ in range(4):
        z = torch.randn(5, 3, 2, 2, requires_grad=True)
        found = [layer(z) for layer in layers]
        assert torch.equal(found[0].indices, found[1].indices)
        for name in ("z_q", "loss", "commitment_loss"):
            torch.testing.assert_close(getattr(found[0], name), getattr(found[1], name))
        gradients = [torch.autograd.grad(f.loss + f.z_q.square().sum(), z)[0] for f in found]
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(layers[0].codebook, layers[1].codebook)


def test_large_rbms_go_on_where_they_ended(tmp_path):
    """RBMs that the folder has are kept, others are added; of another training or number of images none is."""
    options = {"quick": True, "out": tmp_path, "threads": 1}
    mnist_rbm_large.main(**options, seeds="0")
    first = rows_of(tmp_path / "runs.csv")
    mnist_rbm_large.main(**options, seeds="0-1", resume=True)
    both = rows_of(tmp_path / "runs.csv")
    assert [row["seed"] for row in both if row["stage"] == "end"] == ["0", "1"] * 3
    for old, new in zip(first, [row for row in both if row["seed"] == "0"], strict=True):
        assert (old["stage"], old["test_forward"]) == (new["stage"], new["test_forward"])
    check_table("mnist_rbm_large", tmp_path)

    path, digits = tmp_path / "runs.csv", common.load_digits(None, quick=True)
    quick = mnist_rbm_large.Sizes(full=False, quick=True)
    assert len(mnist_rbm_large.finished(path, mnist_rbm_large.LARGE, quick, digits)) == 6
    assert mnist_rbm_large.finished(path, mnist_rbm_large.LARGE, quick._replace(quick=False), digits) == {}
    fewer = dataclasses.replace(digits, train=digits.train[1:])
    assert mnist_rbm_large.finished(path, mnist_rbm_large.LARGE, quick, fewer) == {}
