"""`genfast train gan` and `genfast sample` of it."""

import csv
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from genfast import training
from genfast.cli import app
from genfast.data import digits, read_csv, read_rows
from genfast.metrics import precision_recall
from genfast.training import GANOptions, gan_run

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


KINDS = {
    "mlp": ("--arch", "mlp", "--hidden", "16,8", "--packed", 2, "--loss", "nonsaturating"),
    "dcgan": ("--arch", "dcgan", "--hidden", 6, "--r1", 0.1, "--weight-decay", 0.01),
    "sngan": ("--arch", "sngan", "--hidden", 6, "--discriminator-lr", 0.001),
    "ada": ("--arch", "dcgan", "--hidden", 6, "--augment", "ada", "--ada-images", 500, "--pipeline", "blit",
            "--consistency", 1),
    "stylegan2": ("--arch", "stylegan2", "--hidden", 6, "--path-length", 1, "--penalty-every", 2, "--mixing", 0.9),
    "wgan-gp": ("--loss", "wasserstein", "--r1", 0, "--r2", 0, "--gradient-penalty", 10, "--n-critic", 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_training_resumes_bit_for_bit(tmp_path, small, kind):
    whole, parts, out = (tmp_path / name for name in ("whole.safetensors", "parts.safetensors", "samples.csv"))
    common = ("--data", small, "--latent", 4, *KINDS[kind], "--batch", 30)
    state = torch.get_rng_state()
    shown = run("train", "gan", *common, "--epochs", 3, "--out", whole)
    assert "D loss" in shown
    run("train", "gan", *common, "--epochs", 1, "--out", parts)
    assert "goes on after epoch 1" in run("train", "gan", "--data", small, "--resume", "--epochs", 3, "--out", parts)
    assert torch.equal(torch.get_rng_state(), state)
    (first, about), (second, also) = contents(whole), contents(parts)
    assert about == also
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    rows = log_of(whole)
    assert rows == log_of(parts)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    run("sample", whole, "--n", 20, "--out", out)
    found = read_csv(out)
    assert found.shape == (20, 64)
    assert 0 <= found.min() < found.max() <= 1


def test_measures_are_means_and_those_of_the_average(tmp_path, small):
    path = tmp_path / "gan.safetensors"
    run("train", "gan", "--data", small, "--hidden", 16, "--r2", 0, "--batch", 30, "--epochs", 2, "--out", path)
    run_ = training.load(path)
    split = training.prepare(run_, read_rows(small))
    assert split.train.min() == -1
    last = log_of(path)[-1]
    held_out = (split.held_out + 1) / 2
    found = precision_recall(held_out, training.sample(run_, len(held_out)))
    assert float(last["precision"]) == pytest.approx(found.precision, abs=1e-5)
    assert float(last["recall"]) == pytest.approx(found.recall, abs=1e-5)
    assert last["path"] == last["ada_p"] == ""

    again = training.start(run_.options, read_rows(small))
    measures = list(training.train(again, split))
    assert measures[-1].discriminator_loss == pytest.approx(float(last["discriminator_loss"]), rel=1e-5)
    other = training.start(run_.options, read_rows(small))
    trainer = other.trainer()
    steps = []
    order = training.run.batches(run_.options, len(split.train), training.run.generator("epoch", 0, 0))
    for chosen in order:
        steps.append(trainer.step(split.train[chosen]))
    mean = torch.stack([step.discriminator for step in steps]).double().mean().item()
    assert measures[0].discriminator_loss == pytest.approx(mean)
    mean = torch.stack([step.penalty for step in steps]).double().mean().item()
    assert measures[0].penalty == pytest.approx(mean)


def test_modes_are_those_of_labels(tmp_path):
    """Labels beside the data: their classes, and KL, by the majority of five neighbors, in print and in the log."""
    rows = digits()
    chosen = (rows.labels % 2 == 0).nonzero().flatten()[:300]  # 5 classes
    levels = (rows.values[chosen] * 255).round().to(torch.uint8)
    images, path = tmp_path / "even-images-idx3-ubyte", tmp_path / "gan.safetensors"
    images.write_bytes(struct.pack(">BBBBIII", 0, 0, 8, 3, 300, 8, 8) + levels.numpy().tobytes())
    command = ("train", "gan", "--data", f"idx:{images}", "--hidden", 32, "--batch", 30, "--out", path)
    assert "modes of" not in run(*command, "--epochs", 1)
    assert [row["modes"] for row in log_of(path)] == [""]
    labels = rows.labels[chosen].to(torch.uint8).numpy().tobytes()
    (tmp_path / "even-labels-idx1-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 300) + labels)
    shown = run(*command, "--resume", "--epochs", 3)
    assert "modes of 5 KL precision" in shown
    last = log_of(path)[-1]
    run_ = training.load(path)
    split = training.prepare(run_, read_rows(f"idx:{images}"))
    assert split.labels.unique().tolist() == [0, 1, 2, 3, 4]
    distance = torch.cdist(training.sample(run_, 1000), (split.train + 1) / 2)
    near = split.labels[distance.argsort(1)[:, :5]]
    votes = torch.nn.functional.one_hot(near, 5).sum(1)
    shares = votes.argmax(1).bincount(minlength=5) / 1000
    assert abs(int(last["modes"]) - int((shares > 0).sum())) <= 1  # votes may tie
    wanted = split.labels.bincount() / len(split.labels)
    divergence = (shares * (shares.clamp(min=1e-9) / wanted).log()).sum().item()
    assert float(last["divergence"]) == pytest.approx(divergence, abs=0.1)
    assert divergence > 0.01


def test_the_digits_are_found(tmp_path):
    path = tmp_path / "gan.safetensors"
    shown = run("train", "gan", "--data", "digits", "--epochs", 8, "--lr", 0.002, "--out", path)
    assert "modes of 10" in shown
    first, *_, last = log_of(path)
    assert int(last["modes"]) >= 9
    assert float(last["divergence"]) < min(1.0, float(first["divergence"]))


def test_the_loaded_model_samples_its_average(tmp_path, small):
    path = tmp_path / "gan.safetensors"
    run("train", "gan", "--data", small, "--arch", "dcgan", "--hidden", 4, "--epochs", 1, "--out", path)
    tensors, _ = contents(path)
    model = training.load_model(path)
    for name, tensor in model.generator.state_dict().items():
        assert torch.equal(tensor, tensors[f"optimizer.average.module.{name}"]), name
    weight = "generator.layers.0.weight"
    assert not torch.equal(tensors[f"model.{weight}"], model.state_dict()[weight])
    assert model.sample(3, seed=0).shape == (3, 1, 8, 8)


def test_default_widths_leave_sides_of_four():
    for side, count in ((8, 1), (28, 2), (32, 3), (64, 4), (48, 3)):
        widths = gan_run._widths(GANOptions(arch="dcgan"), (1, side, side))
        assert widths == tuple(min(512, 64 * 2**level) for level in range(count))
    assert gan_run._widths(GANOptions(arch="stylegan2"), (3, 64, 64)) == (32, 64, 128, 256)
    assert gan_run._widths(GANOptions(arch="dcgan"), (1, 28, 32)) == (64, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "conv"], "arch must be one of mlp, dcgan, sngan, stylegan2"),
        (["--loss", "kl"], "loss must be one of minimax"),
        (["--beta1", "1"], "beta1 must be below 1"),
        (["--ema", "1"], "ema must be below 1"),
        (["--r1", "-1"], "r1 must be a finite number"),
        (["--hidden", "0"], "hidden must be positive"),
        (["--packed", "3"], "packed must divide the batch of 64"),
        (["--packed", "2", "--arch", "sngan"], "packed is for arch mlp and dcgan"),
        (["--path-length", "1"], "path_length is for arch stylegan2"),
        (["--mixing", "0.5"], "mixing is for arch stylegan2"),
        (["--mixing", "1.5", "--arch", "stylegan2"], "mixing is a probability"),
        (["--augment", "diff"], "augment is for images"),
        (["--augment", "maybe", "--arch", "dcgan"], "augment must be one of none, diff, ada"),
        (["--consistency", "1"], "consistency is for images"),
        (["--policy", "blur", "--arch", "dcgan"], "blur"),
        (["--pipeline", "blur", "--arch", "dcgan"], "unknown part 'blur' of the pipeline"),
        (["--ada-target", "2", "--arch", "dcgan"], "ada_target must be at most 1"),
        (["--n-critic", "0"], "n_critic must be at least 1"),
        (["--codes", "9"], "--codes is for vqvae, not for gan"),
        (["--binarize", "sample"], "binarize must be one of none"),
        (["--scale", "0.5"], "a gan needs values in [0, 1], the data go from 0 to 2"),
        (["--arch", "dcgan", "--hidden", "4,4,4,4"], "divisible by 2^4"),
    ],
)
def test_train_explains_bad_arguments(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in run("train", "gan", *arguments, "--data", "digits", code=2)
    assert not list(tmp_path.glob("*.safetensors"))


def test_convolutions_need_images(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("0,1\n1,0\n1,1\n")
    for arch in ("dcgan", "sngan", "stylegan2"):
        assert "use --arch mlp" in run("train", "gan", "--arch", arch, "--data", f"csv:{table}", code=2)


def test_resuming_keeps_what_was_chosen(tmp_path, small):
    path = tmp_path / "model.safetensors"
    run("train", "gan", "--data", small, "--hidden", 8, "--epochs", 1, "--out", path)
    for changed, message in (
        (("--latent", 5), "trained with latent=64, not 5"),
        (("--loss", "hinge"), "trained with loss=relativistic, not hinge"),
        ((), "has had its 1 epochs"),
    ):
        assert message in run("train", "gan", "--data", small, "--out", path, "--resume", *changed, code=2)
    run("train", "gan", "--data", small, "--out", path, "--resume", "--epochs", 2, "--lr", 0.01, "--r1", 0.5)
    assert contents(path)[1]["options"]["r1"] == 0.5
    assert [row["learning_rate"] for row in log_of(path)] == ["0.001", "0.01"]


def test_training_that_diverges_says_so(tmp_path, small):
    arguments = ("--data", small, "--hidden", 8, "--lr", 1e30, "--epochs", 3, "--out", tmp_path / "m.safetensors")
    assert "lower the learning rate" in run("train", "gan", *arguments, code=2)


def test_damaged_checkpoints_are_refused(tmp_path, small):
    path = tmp_path / "model.safetensors"
    run("train", "gan", "--data", small, "--hidden", 8, "--epochs", 1, "--out", path)
    tensors, about = contents(path)

    def refused(tensors, **changes):
        save_file(tensors, path, metadata={"genfast": json.dumps({**about, **changes})})
        return run("sample", path, code=2)

    first = "model.generator.layers.0.weight"
    assert f"'{first}'" in refused({name: t for name, t in tensors.items() if name != first})
    assert first in refused({**tensors, first: torch.zeros(3)})
    buffer = "optimizer.generator.layers.0.weight.exp_avg"
    assert "do not fit" in refused({name: t for name, t in tensors.items() if name != buffer})
    assert "damaged" in refused({name: t for name, t in tensors.items() if name != "optimizer.steps"})
    assert "missing" in refused({name: t for name, t in tensors.items() if not name.startswith("optimizer.")})
    huge = {**about["options"], "hidden": [10**9]}
    assert "not (1000000000" in refused(tensors, options=huge)  # before it is made


def test_pictures(tmp_path, small):
    from matplotlib import image

    folder, path = tmp_path / "pictures", tmp_path / "gan.safetensors"
    run("train", "gan", "--data", small, "--lr", 0.02, "--epochs", 2, "--pictures", folder, "--out", path)
    names = {"samples", "held_out", "interpolations", "curve", "epoch_0001", "epoch_0002"}
    assert {file.name for file in folder.iterdir()} == {f"{name}.png" for name in names}
    run_ = training.load(path)

    def cell(name, line, column):
        picture = torch.tensor(image.imread(folder / f"{name}.png"))
        zoom = gap = 56 // 8
        top, left = (gap + index * (8 * zoom + gap) for index in (line, column))
        return 1 - picture[top : top + 8 * zoom : zoom, left : left + 8 * zoom : zoom].flatten()

    samples = training.sample(run_, 64)
    torch.testing.assert_close(cell("samples", 3, 2), samples[26], rtol=0, atol=0.003)
    torch.testing.assert_close(cell("epoch_0002", 3, 2), samples[26], rtol=0, atol=0.003)
    assert (cell("epoch_0001", 3, 2) - samples[26]).abs().max() > 0.01
    rows = training.prepare(run_, read_rows(small)).held_out
    torch.testing.assert_close(cell("held_out", 0, 5), (rows[5] + 1) / 2, rtol=0, atol=0.003)
