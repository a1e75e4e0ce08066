"""`genfast train` and `genfast sample` of autoencoders, and folders of images."""

import csv
import json
import math
import struct
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional
from typer.testing import CliRunner

from genfast import training
from genfast.cli import app
from genfast.data import Rows, digits, read_csv, read_images, read_rows

runner = CliRunner()


def run(*arguments, code=0):
    result = runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(tmp_path):
    """150 digits as bytes in an idx file."""
    levels = (digits().values[:150] * 255).round().to(torch.uint8)
    path = tmp_path / "digits.idx"
    path.write_bytes(struct.pack(">BBBBIII", 0, 0, 8, 3, 150, 8, 8) + levels.numpy().tobytes())
    return f"idx:{path}"


def contents(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["genfast"])  # noqa: SIM118


def log_of(path):
    with path.with_suffix(".log.csv").open(newline="") as file:
        return [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]


SMALL = {
    "vae": ("--hidden", 16, "--latent", 3),
    "iwae": ("--hidden", 16, "--latent", 3, "--samples", 4),
    "vqvae": ("--hidden", "4,6", "--codes", 8, "--dim", 3),
}


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("vae", ("--binarize", "sample", "--beta", 2, "--weight-decay", 0.1, "--samples", 2)),
        ("vae", ("--arch", "conv", "--hidden", "4,6", "--likelihood", "gaussian")),
        ("vae", ("--arch", "residual", "--hidden", "4,6", "--likelihood", "discretized_logistic")),
        ("iwae", ("--gradient", "dreg", "--likelihood", "continuous_bernoulli")),
        ("vqvae", ("--revive-below", 1.0)),
    ],
    ids=["vae", "conv", "residual", "iwae", "vqvae"],
)
def test_training_resumes_bit_for_bit(tmp_path, small, model, arguments):
    whole, parts, other = (tmp_path / f"{name}.safetensors" for name in ("whole", "parts", "other"))
    common = ("--data", small, *SMALL[model], *arguments, "--batch", 30)
    state = torch.get_rng_state()
    run("train", model, *common, "--epochs", 3, "--out", whole)
    run("train", model, *common, "--epochs", 1, "--out", parts)
    resumed = run("train", model, "--data", small, "--resume", "--epochs", 3, "--out", parts)
    assert torch.equal(torch.get_rng_state(), state)
    assert "goes on after epoch 1" in resumed
    (wanted, about), (found, also) = contents(whole), contents(parts)
    assert about == also
    assert about["class"] == {"vae": "genfast.models.VAE", "iwae": "genfast.models.IWAE"}.get(
        model, "genfast.models.VQVAE"
    )
    assert wanted.keys() == found.keys()
    assert {name for name in wanted if name.startswith("optimizer.")}
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name
    assert log_of(whole) == log_of(parts)
    assert [row["epoch"] for row in log_of(whole)] == ["1", "2", "3"]
    run("train", model, *common, "--epochs", 1, "--seed", 1, "--out", other)
    name = next(name for name in wanted if name.startswith("model.decoder"))
    assert not torch.equal(contents(other)[0][name], wanted[name])


def test_a_vae_learns_and_measures_what_it_says(tmp_path):
    path = tmp_path / "vae.safetensors"
    arguments = ("--data", "digits", "--hidden", 64, "--latent", 8, "--lr", 0.005, "--epochs", 8, "--out", path)
    assert "vae mlp 64-64-8" in run("train", "vae", *arguments)
    log = log_of(path)
    assert float(log[-1]["elbo"]) > float(log[0]["elbo"]) + 3
    assert float(log[-1]["training_loss"]) == pytest.approx(-float(log[-1]["elbo"]), abs=1.5)
    run_ = training.load(path)
    x = training.prepare(run_, digits()).held_out
    assert set(x.unique().tolist()) == {0.0, 1.0}
    mu, logvar = run_.model.encode(x)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
    assert float(log[-1]["kl"]) == pytest.approx(kl.mean().item(), abs=1e-4)
    z = mu + torch.randn(400, *mu.shape, generator=torch.Generator().manual_seed(0)) * torch.exp(0.5 * logvar)
    with torch.no_grad():
        logits = run_.model.decoder(z)
    likelihood = (x * logits - functional.softplus(logits)).sum(-1)
    # The log has one draw of each row's distribution: six standard deviations of their mean.
    spread = likelihood.var(0).sum().sqrt().item() / len(x)
    assert abs(float(log[-1]["reconstruction"]) - likelihood.mean().item()) < 6 * spread
    assert float(log[-1]["elbo"]) == pytest.approx(float(log[-1]["reconstruction"]) - float(log[-1]["kl"]), abs=1e-3)


def test_options_reach_training():
    rows = Rows(digits().values[:80], (8, 8))

    def trained(options):
        made = training.start(options, rows)
        (measures,) = training.train(made, training.prepare(made, rows))
        return measures, torch.cat([p.detach().flatten() for p in made.model.parameters()])

    def different(kind, common, **changed):
        plain, other = trained(kind(**common)), trained(kind(**common, **changed))
        assert plain[0]._fields == other[0]._fields
        return not torch.equal(plain[1], other[1])

    small = {"hidden": (8,), "epochs": 1, "batch": 16, "lr": 0.01}
    assert not different(training.VAEOptions, small, latent=20)
    for changed in ({"beta": 3.0}, {"samples": 3}, {"free_bits": 0.5}, {"weight_decay": 0.5}, {"binarize": "none"}):
        assert different(training.VAEOptions, small, **changed), changed
    for changed in ({"samples": 3}, {"gradient": "dreg"}, {"gradient": "stl"}, {"gradient": "vae"}):
        assert different(training.IWAEOptions, small, **changed), changed
    small = {**small, "hidden": (4, 6), "codes": 8, "dim": 3}
    for changed in ({"commitment": 2.0}, {"decay": 0.5}, {"revive_below": 2.0}):
        assert different(training.VQVAEOptions, small, **changed), changed


def test_noise_is_new_in_every_epoch():
    rows = Rows(digits().values[:80], (8, 8))
    made = training.start(training.VAEOptions(hidden=(8,), epochs=2, lr=0.0, batch=72), rows)
    losses = [measures.training_loss for measures in training.train(made, training.prepare(made, rows))]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=1)


def test_an_iwae_reports_its_bound(tmp_path):
    path = tmp_path / "iwae.safetensors"
    run("train", "iwae", "--data", "digits", *SMALL["iwae"][:4], "--samples", 20, "--epochs", 2, "--out", path)
    last = log_of(path)[-1]
    run_ = training.load(path)
    x = training.prepare(run_, digits()).held_out
    # Many draws: both estimate the same expectation, the log with one draw of it a row.
    found = torch.stack([run_.model.bound(x, 20, seed).detach() for seed in range(40)])
    spread = found.var(0).sum().sqrt().item() / len(x)
    assert abs(float(last["bound"]) - found.mean().item()) < 6 * spread
    assert float(last["bound"]) > float(last["elbo"])


def test_a_vqvae_reports_its_codes_and_samples_its_prior(tmp_path, small):
    path, out = tmp_path / "vq.safetensors", tmp_path / "out.csv"
    run("train", "vqvae", "--data", small, *SMALL["vqvae"], "--lr", 0.01, "--epochs", 4, "--out", path)
    run_ = training.load(path)
    split = training.prepare(run_, read_rows(small))
    model = run_.model.eval()
    indices = model.encode(run_.batch(split.held_out)).flatten()
    shares = torch.bincount(indices, minlength=8).double() / len(indices)
    perplexity = torch.exp(-torch.special.xlogy(shares, shares).sum()).item()
    last = log_of(path)[-1]
    assert float(last["perplexity"]) == pytest.approx(perplexity, abs=1e-3)
    assert int(last["codes_used"]) == int((shares > 0).sum())
    z = model.encoder(run_.batch(split.held_out))
    distance = (z.movedim(1, -1).reshape(-1, 3) - model.quantizer.codebook[indices]).square().mean().item()
    assert float(last["quantizer_loss"]) == pytest.approx(distance, rel=1e-4)
    counts = torch.stack([(model.encode(run_.batch(split.train)) == code).sum(0) for code in range(8)], -1)
    assert torch.equal(model.prior_counts, counts + 1)

    run("sample", path, "--n", 300, "--out", out)
    found = read_csv(out)
    assert found.shape == (300, 64)
    possible = model.decode(torch.multinomial(model.prior_counts.view(-1, 8).double(), 2000, True).T.view(2000, 2, 2))
    torch.testing.assert_close(found.mean(0), torch.sigmoid(possible).mean(0).flatten(), rtol=0, atol=0.1)

    stopped = training.start(run_.options, read_rows(small))
    next(training.train(stopped, split))
    training.save(stopped, path)
    assert "--resume" in run("sample", path, "--out", out, code=2)


def test_samples_are_in_the_units_of_the_data(tmp_path):
    table, model, out = tmp_path / "table.csv", tmp_path / "model.safetensors", tmp_path / "out.csv"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 1, generator=generator) * torch.tensor([3.0, -0.1]) + torch.tensor([50.0, -2.0])
    table.write_text("height,weight\n" + "".join(f"{a},{b}\n" for a, b in rows.tolist()))
    common = ("--likelihood", "gaussian", "--latent", 1, "--hidden", 32, "--lr", 0.01, "--epochs", 40)
    run("train", "vae", "--data", f"csv:{table}", *common, "--out", model)
    run("sample", model, "--n", 1000, "--out", out)
    found = read_csv(out)
    torch.testing.assert_close(found.mean(0), rows.mean(0), rtol=0.02, atol=0.05)
    torch.testing.assert_close(found.std(0), rows.std(0), rtol=0.3, atol=0)
    assert torch.corrcoef(found.T)[0, 1] < -0.9
    assert "2 values an example are no picture" in run("sample", model, "--out", tmp_path / "a.png", code=2)
    before = out.read_bytes()
    run("sample", model, "--n", 1000, "--out", out)
    assert out.read_bytes() == before
    run("sample", model, "--n", 1000, "--seed", 1, "--out", out)
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vae", "--method", "pcd"], "--method is for rbm, dbn, not for vae"),
        (["vae", "--gradient", "dreg"], "--gradient is for iwae, not for vae"),
        (["vae", "--codes", "9"], "--codes is for vqvae, not for vae"),
        (["iwae", "--beta", "2"], "--beta is for vae, not for iwae"),
        (["iwae", "--free-bits", "1"], "--free-bits is for vae, not for iwae"),
        (["vqvae", "--latent", "9"], "--latent is for vae, iwae, gan, not for vqvae"),
        (["vqvae", "--arch", "mlp"], "arch must be one of residual"),
        (["rbm", "--latent", "9"], "--latent is for vae, iwae, gan, not for rbm"),
        (["rbm", "--pictures", "out"], "--pictures is for vae, iwae, vqvae, gan, not for rbm"),
        (["vae", "--arch", "unet"], "arch must be one of mlp, conv, residual"),
        (["vae", "--likelihood", "poisson"], "likelihood must be one of bernoulli"),
        (["vae", "--likelihood", "gaussian", "--binarize", "sample"], "is for likelihood=bernoulli"),
        (["iwae", "--gradient", "reinforce"], "gradient must be one of"),
        (["iwae", "--samples", "0"], "samples must be at least 1"),
        (["vae", "--beta", "-1"], "beta must be a finite number"),
        (["vqvae", "--decay", "1"], "decay must be below 1"),
        (["vae", "--hidden", "0"], "hidden must be positive"),
        (["vae", "--arch", "conv", "--hidden", "4,4,4,4"], "divisible by 2^4"),
        (["vae", "--scale", "0.5"], "a bernoulli likelihood needs values in [0, 1], the data go from 0 to 2"),
        (["vae", "--size", "8x8"], "a size is for images:DIR"),
        (["vae", "--size", "8x8x8"], "--size must be ROWSxCOLUMNS"),
        (["vae", "--likelihood", "discretized_logistic"], "8-bit levels"),
    ],
)
def test_train_explains_bad_arguments(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in run("train", *arguments, "--data", "digits", code=2)
    assert not list(tmp_path.glob("*.safetensors"))


def test_convolutions_need_images(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("0,1\n1,0\n1,1\n")
    out = tmp_path / "model.safetensors"
    for arguments in (("vqvae",), ("vae", "--arch", "conv")):
        assert "use --arch mlp" in run("train", *arguments, "--data", f"csv:{table}", "--out", out, code=2)
    found = run("train", "vae", "--data", f"csv:{table}", "--pictures", tmp_path / "p", "--out", out, code=2)
    assert "2 values an example are no picture" in found
    assert not out.exists()


def test_resuming_keeps_what_was_chosen(tmp_path, small):
    path = tmp_path / "model.safetensors"
    run("train", "vae", "--data", small, *SMALL["vae"], "--epochs", 1, "--out", path)
    before = path.read_bytes()
    for model, changed, message in (
        ("iwae", (), "trained with model=vae, not iwae"),
        ("rbm", (), "trained with model=vae, not rbm"),
        ("vae", ("--latent", 5), "trained with latent=3, not 5"),
        ("vae", ("--likelihood", "gaussian"), "trained with likelihood=bernoulli"),
        ("vae", (), "has had its 1 epochs"),
    ):
        assert message in run("train", model, "--data", small, "--out", path, "--resume", *changed, code=2)
    assert path.read_bytes() == before
    run("train", "vae", "--data", small, "--out", path, "--resume", "--epochs", 2, "--lr", 0.01, "--beta", 0.5)
    assert contents(path)[1]["options"]["beta"] == 0.5
    assert [row["learning_rate"] for row in log_of(path)] == ["0.001", "0.01"]


def test_training_that_diverges_says_so(tmp_path, small):
    for model in ("vae", "vqvae"):
        arguments = ("--data", small, *SMALL[model], "--lr", 1e30, "--epochs", 3, "--out", tmp_path / "m.safetensors")
        assert "lower the learning rate" in run("train", model, *arguments, "--overwrite", code=2)


@pytest.mark.parametrize("model", ["vae", "vqvae"])
def test_damaged_checkpoints_are_refused(tmp_path, small, model):
    path = tmp_path / "model.safetensors"
    run("train", model, "--data", small, *SMALL[model], "--epochs", 1, "--out", path)
    tensors, about = contents(path)
    first = next(name for name in tensors if name.startswith("model.encoder"))
    buffer = next(name for name in tensors if name.startswith("optimizer."))

    def refused(tensors, **changes):
        save_file(tensors, path, metadata={"genfast": json.dumps({**about, **changes})})
        return run("sample", path, code=2)

    assert f"'{first}'" in refused({name: t for name, t in tensors.items() if name != first})
    assert first in refused({**tensors, first: torch.zeros(3)})
    assert "damaged" in refused({**tensors, "model.more": torch.zeros(3)})
    assert "optimizer's buffers" in refused({name: t for name, t in tensors.items() if name != buffer})
    assert "optimizer's buffers" in refused({**tensors, "optimizer.code": torch.zeros(3)})
    huge = [10**9] if model == "vae" else [10**9, 6]
    assert "not (1000000000" in refused(tensors, options={**about["options"], "hidden": huge})  # before it is made
    assert "means and deviations" in refused({**tensors, "data.mean": torch.zeros(64)})
    assert "model must be one of" in refused(tensors, options={**about["options"], "model": "flow"})


# ---- pictures ----


def test_pictures(tmp_path, small):
    from matplotlib import image

    folder = tmp_path / "pictures"
    common = ("--data", small, "--epochs", 2, "--pictures", folder)
    run("train", "vae", *common, "--hidden", 16, "--latent", 2, "--out", tmp_path / "vae.safetensors")
    names = {"reconstructions", "samples", "interpolations", "curve", "latent", "latent_map"}
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in names}
    run_ = training.load(tmp_path / "vae.safetensors")
    x = training.prepare(run_, read_rows(small)).held_out  # 15 rows: lines of 8 and of 7

    def cell(name, line, column):
        picture = torch.tensor(image.imread(folder / f"{name}.png"))
        zoom = gap = 56 // 8
        top, left = (gap + index * (8 * zoom + gap) for index in (line, column))
        return 1 - picture[top : top + 8 * zoom : zoom, left : left + 8 * zoom : zoom].flatten()

    rebuilt = run_.model.reconstruct(x)
    for index in (0, 7, 8, 14):
        line, column = 2 * (index // 8), index % 8
        torch.testing.assert_close(cell("reconstructions", line, column), x[index])
        torch.testing.assert_close(cell("reconstructions", line + 1, column), rebuilt[index], rtol=0, atol=0.003)
    assert cell("reconstructions", 2, 7).max() == 0
    samples = training.sample(run_, 64)
    torch.testing.assert_close(cell("samples", 3, 2), samples[26], rtol=0, atol=0.003)
    corner = torch.special.ndtri(torch.tensor([0.5 / 16, 15.5 / 16]))  # low across, high up
    corner = torch.sigmoid(run_.model.decode(corner.view(1, 2))).flatten()
    torch.testing.assert_close(cell("latent_map", 0, 0), corner.detach(), rtol=0, atol=0.003)


def painted(folder, count=12):
    """PNG files of two colors, the upper half red in the first."""
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture = image.new("RGB", (12, 16), (0, 20 * index, 255))
        picture.paste((255, 0, 0), (0, 0, 12, 8))
        picture.save(folder / f"{index:02}.png")
    return image


def test_images_are_read(tmp_path):
    image = painted(tmp_path / "a" / "b")
    values, shape, labels = read_images(tmp_path / "a")
    assert shape == (3, 16, 12)
    assert labels is None
    pictures = values.view(12, *shape)
    assert torch.equal(pictures[3, :, 0, 0], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(pictures[3, :, 15, 11], torch.tensor([0, 60 / 255, 1.0]), rtol=0, atol=0)
    values, shape, _ = read_rows(f"images:{tmp_path / 'a'}", size=(4, 4))
    assert shape == (3, 4, 4)
    assert values.view(12, 3, 4, 4)[:, 0, 0].min() > 0.9  # red stays above
    assert values.view(12, 3, 4, 4)[:, 0, 3].max() < 0.1

    grey = tmp_path / "grey"
    grey.mkdir()
    image.new("L", (3, 2), 51).save(grey / "a.png")
    image.new("LA", (3, 2), (51, 0)).save(grey / "b.png")
    image.new("I;16", (3, 2), 51 * 257).save(grey / "c.png")
    image.new("1", (3, 2), 1).save(grey / "d.png")
    image.new("L", (3, 2), 102).save(grey / "e.JPG", quality=95)
    found, shape, _ = read_images(grey)
    assert shape == (1, 2, 3)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.2, 1.0, 0.2, 1.0, 0.4]), rtol=0, atol=0.01)
    image.new("L", (4, 2)).save(grey / "z.png")
    with pytest.raises(ValueError, match="give a size"):
        read_images(grey)
    (grey / "z.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"z\.png: cannot identify"):
        read_images(grey)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no images"):
        read_images(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_images(tmp_path / "nowhere")


def test_training_on_a_folder_of_images(tmp_path):
    from matplotlib import image

    painted(tmp_path / "images")
    data, out = f"images:{tmp_path / 'images'}", tmp_path / "model.safetensors"
    arguments = ("--arch", "conv", "--hidden", "4,4", "--size", "8x8", "--epochs", 1, "--batch", 4)
    run("train", "vae", "--data", data, *arguments, "--out", out, "--pictures", tmp_path / "pictures")
    options = contents(out)[1]["options"]
    assert options["likelihood"] == "discretized_logistic"
    assert options["size"] == [8, 8]
    run("train", "vae", "--data", data, "--out", out, "--resume", "--epochs", 2)
    picture = image.imread(tmp_path / "pictures" / "reconstructions.png")
    assert picture.shape[2] == 3
    assert picture[10, 10, 0] > 0.9  # a held-out original: red above
    assert picture[10, 10, 2] < 0.1
    run("sample", out, "--n", 2, "--out", tmp_path / "samples.png")
    assert image.imread(tmp_path / "samples.png").shape == (8 * 7 + 14, 2 * 8 * 7 + 21, 3)


def test_without_pillow_the_command_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install genfast[examples]" in run("train", "vae", "--data", "images:here", code=2)


def test_the_demo_leaves_one_digit_out():
    from io import StringIO

    from rich.console import Console

    from genfast.demo import anomaly, train

    found = train.load_digits()
    kept = found.without(anomaly.LEFT_OUT)
    assert len(kept) == (found.train_labels != anomaly.LEFT_OUT).sum() < len(found.train)
    result = anomaly.run(found, epochs=4, console=Console(file=StringIO()))
    unseen = found.test_labels == anomaly.LEFT_OUT
    above, below = result.scores[unseen].unsqueeze(1), result.scores[~unseen]
    assert result.auroc == pytest.approx((above > below).double().mean().item(), abs=1e-9)
    assert math.isfinite(result.untrained)
