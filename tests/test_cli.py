"""The genfast command, run in this process."""

import csv
import dataclasses
import itertools
import json
import pickle
import subprocess
import sys
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import genfast
from genfast import _ledger, collect_env, training
from genfast.cli import app
from genfast.data import Rows, digits

runner = CliRunner()


def run(*arguments, code=0):
    result = runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_info_shows_what_is_and_why_the_rest_is_not():
    shown = " ".join(run("info").split())
    assert genfast.__version__ in shown
    assert torch.__version__ in shown
    assert genfast._native.C.cpu_isa() in shown
    for name, state in collect_env.backends().items():
        assert name in shown
        assert " ".join(state.split())[:60] in shown
    for kernel in _ledger.pending():
        assert kernel in shown


def test_info_plain_has_every_fact():
    lines = run("info", "--plain").splitlines()
    for section, facts in collect_env.collect().items():
        assert f"[{section}]" in lines
        for name, value in facts.items():
            assert f"{name}: {value}" in lines


def test_info_never_fails(monkeypatch):
    def broken(*_):
        raise RuntimeError("the driver fell over")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    monkeypatch.setattr(_ledger, "ledgers", broken)
    found = collect_env.collect()
    assert found["machine"] == {"error": "RuntimeError: the driver fell over"}
    assert found["kernels"] == {"error": "RuntimeError: the driver fell over"}
    assert found["versions"]["torch"] == torch.__version__
    assert "the driver fell over" in run("info")


def test_info_lists_verified_kernels(monkeypatch):
    kernels = {"a/b": {"hash": "1"}, "c/d": {"hash": "2"}}
    ledger = {"device": "NVIDIA Test", "compute_capability": "9.0", "kernels": kernels}
    monkeypatch.setattr(_ledger, "ledgers", lambda: (ledger,))
    monkeypatch.setattr(_ledger, "kernel_hashes", lambda: {"a/b": "1", "c/d": "3"})
    assert collect_env.kernels() == {"verified on NVIDIA Test (9.0)": "a/b", "no verified run": "c/d"}


def test_verify_passes_its_arguments_on(monkeypatch):
    module = types.ModuleType("genfast.verify")
    module.main = lambda arguments: print(json.dumps(arguments)) or 3
    monkeypatch.setitem(sys.modules, "genfast.verify", module)
    assert json.loads(run("verify", "--kernel", "vae", code=3)) == ["--kernel", "vae"]


def test_bench_writes_a_csv_and_a_picture(tmp_path):
    path = tmp_path / "rows.csv"
    shown = run("bench", "bernoulli_sample", "--quick", "--no-compiled", "--seconds", "0.02", "--csv", path, "--plot")
    assert "rand < p" in shown
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["contender"] for row in rows} == {"genfast", "eager", "rand < p"}
    assert {row["status"] for row in rows} == {"ok"}
    assert all(float(row["median_us"]) > 0 for row in rows)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convolution"], "unknown benchmark 'convolution'"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "cpu or cuda"),
        (["--plot"], "--csv"),
    ],
)
def test_bench_explains_bad_arguments(arguments, message):
    assert message in run("bench", *arguments, code=2)


def test_bench_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in run("bench", "--device", "cuda", code=2)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "pip install genfast[examples]" in run("demo", code=2)


@pytest.mark.slow
def test_demo_learns_and_draws(tmp_path):
    state = torch.get_rng_state()
    shown = run("demo", "--quick", "--out", tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)
    lines = [line.split("│") for line in shown.splitlines() if "ELBO, 16" in line or "exact" in line]
    rows = {cells[1].strip(): cells for cells in lines}
    assert "tells them from the others by -log p(x): AUROC 0." in " ".join(shown.split())
    for model in ("VAE", "RBM"):
        untrained, trained = float(rows[model][3]), float(rows[model][4])
        assert untrained == pytest.approx(-64 * torch.log(torch.tensor(2.0)).item(), abs=1)  # coin flips
        assert trained > untrained + 8
    assert "samples: " in shown
    assert " of 10 digits" in " ".join(shown.split())
    from genfast.demo.plots import NAMES

    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "scikit-learn" in shown


# ---- train and sample ----


@pytest.fixture
def one_thread():
    """Models this small gain nothing from threads, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_command_loads_nothing_heavy():
    code = """
import sys, genfast.cli
heavy = ("sklearn", "matplotlib", "safetensors", "triton", "genfast.training", "genfast.data", "genfast.benchmarks")
print([name for name in heavy if name in sys.modules])
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def contents(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["genfast"])  # noqa: SIM118


def log_without_seconds(path):
    with path.with_suffix(".log.csv").open(newline="") as file:
        return [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def train(path, *arguments, hidden=20, **kwargs):
    return run("train", "rbm", "--data", "digits", "--hidden", hidden, "--out", path, *arguments, **kwargs)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--method", "cd", "--binarize", "sample"),
        ("--method", "pcd", "--centered", "--momentum", 0.5),
        ("--method", "fpcd", "--momentum", 0.9, "--weight-decay", 1e-3),
        ("--method", "pt", "--temperatures", 3, "--k", 2),
        ("--visible", "gaussian", "--lr", 0.001, "--momentum", 0.5),
    ],
    ids=lambda arguments: arguments[1],
)
def test_training_resumes_bit_for_bit(tmp_path, arguments):
    whole, parts, other = (tmp_path / f"{name}.safetensors" for name in ("whole", "parts", "other"))
    state = torch.get_rng_state()
    train(whole, *arguments, "--epochs", 3)
    train(parts, *arguments, "--epochs", 1)
    resumed = run("train", "rbm", "--data", "digits", "--out", parts, "--resume", "--epochs", 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert "goes on after epoch 1" in " ".join(resumed.split())  # lines wrap
    (wanted, about), (found, also) = contents(whole), contents(parts)
    assert about == also
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name
    assert ("optimizer.W" in wanted) == ("--momentum" in arguments)
    assert log_without_seconds(whole) == log_without_seconds(parts)
    assert [row["epoch"] for row in log_without_seconds(whole)] == ["1", "2", "3"]
    train(other, *arguments, "--epochs", 1, "--seed", 1)
    assert not torch.equal(contents(other)[0]["model.W"], wanted["model.W"])


@pytest.mark.usefixtures("one_thread")
def test_a_dbn_resumes_within_a_layer(tmp_path):
    options = training.RBMOptions(model="dbn", hidden=(12, 8), epochs=2, method="pcd", momentum=0.5, lr=0.02)
    rows = digits()

    def after(epochs):
        started = training.start(options, rows)
        found = list(itertools.islice(training.train(started, training.prepare(started, rows)), epochs))
        return started, found

    wanted, measures = after(4)
    assert [(m.layer, m.epoch) for m in measures] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    for stop in (1, 2, 3):
        part, _ = after(stop)
        training.save(part, tmp_path / "dbn.safetensors")
        part = training.load(tmp_path / "dbn.safetensors")
        rest = list(training.train(part, training.prepare(part, rows)))
        assert [m._replace(seconds=0) for m in rest] == [m._replace(seconds=0) for m in measures[stop:]]
        for name, tensor in wanted.model.state_dict().items():
            assert torch.equal(tensor, part.model.state_dict()[name]), (stop, name)
    shown = run("sample", tmp_path / "dbn.safetensors", "--n", 4, "--steps", 2, "--out", tmp_path / "dbn.png")
    assert "wrote" in shown


@pytest.mark.usefixtures("one_thread")
def test_a_dbn_trains_from_the_command(tmp_path):
    path = tmp_path / "dbn.safetensors"
    shown = run("train", "dbn", "--data", "digits", "--hidden", "12,8", "--epochs", 1, "--out", path)
    assert "dbn 64-12-8" in shown
    assert [(row["layer"], row["epoch"]) for row in log_without_seconds(path)] == [("0", "1"), ("1", "1")]
    assert contents(path)[1]["class"] == "genfast.models.DBN"
    assert training.load_model(path).sample(3, 1, seed=0).shape == (3, 64)
    assert "for an rbm" in run("sample", path, "--beta", 0.5, code=2)


@pytest.mark.usefixtures("one_thread")
def test_training_learns_and_measures_what_it_says(tmp_path):
    path = tmp_path / "model.safetensors"
    shown = train(path, "--epochs", 20, "--method", "pcd", "--lr", 0.1, hidden=64)
    assert "1617 training rows, 180 held out" in shown
    log = log_without_seconds(path)
    first, last = (float(log[index]["pseudo_likelihood"]) for index in (0, -1))
    assert first < -24  # little better than the biases alone
    assert last > first + 3
    run_ = training.load(path)
    rows, held_out, _ = training.prepare(run_, digits())
    rbm = run_.model.double()
    rows, held_out = rows.double(), held_out.double()
    assert rbm.pseudo_likelihood(held_out).item() == pytest.approx(last, abs=1e-3)
    gap = rbm.free_energy(held_out).mean() - rbm.free_energy(rows[:180]).mean()
    assert gap.item() == pytest.approx(float(log[-1]["free_energy_gap"]), abs=1e-3)
    h = (torch.rand(400, 180, 64, dtype=torch.float64) < rbm.hidden_mean(held_out)).double()
    errors = (held_out - rbm.visible_mean(h)).square().sum(-1).mean(1)
    # One draw among its distribution: six standard deviations.
    assert abs(float(log[-1]["reconstruction_error"]) - errors.mean().item()) < 6 * errors.std().item()


@pytest.mark.usefixtures("one_thread")
def test_weight_decay_is_for_the_weights():
    rows = Rows((torch.arange(240) % 7 < 3).float().view(40, 6), None)
    moved = {}
    for decay in (0.0, 0.5):
        options = training.RBMOptions(hidden=(4,), epochs=1, batch=36, lr=0.1, weight_decay=decay)
        started = training.start(options, rows)
        W = started.model.W.detach().clone()
        list(training.train(started, training.prepare(started, rows)))
        moved[decay] = started.model
    torch.testing.assert_close(moved[0.5].W, moved[0.0].W - 0.1 * 0.5 * W, rtol=1e-5, atol=1e-7)
    for name in ("b", "c"):
        assert torch.equal(getattr(moved[0.5], name), getattr(moved[0.0], name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flow"], "model must be one of rbm, dbn, vae, iwae, vqvae, gan"),
        (["rbm", "--data", "csv:nowhere.csv"], "nowhere.csv does not exist"),
        (["rbm", "--data", "mnist"], "choose digits, idx:PATH, csv:PATH or images:DIR"),
        (["rbm", "--hidden", "20,x"], "numbers separated by commas"),
        (["rbm", "--hidden", "20,30"], "one hidden layer"),
        (["rbm", "--hidden", "0"], "hidden must be positive"),
        (["rbm", "--method", "gibbs"], "method must be one of cd, pcd, fpcd, pt"),
        (["rbm", "--visible", "relu"], "hidden units"),
        (["rbm", "--visible", "softmax:4"], "is 0.3125"),
        (["rbm", "--scale", "0.5"], "bernoulli units need values in [0, 1], the data go from 0 to 2"),
        (["rbm", "--batch", "0"], "batch must be at least 1"),
        (["rbm", "--held-out", "1.5"], "held_out must be between 0 and 1"),
        (["rbm", "--lr", "nan"], "lr must be a finite number"),
        (["rbm", "--device", "abacus"], "abacus"),
        (["rbm", "--out", "model.pt"], "must end in .safetensors"),
        (["rbm", "--resume"], "does not exist"),
        (["rbm", "--resume", "--overwrite"], "do not go together"),
        (["dbn", "--hidden", "9,9", "--centered"], "for an rbm"),
    ],
)
def test_train_explains_bad_arguments(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = arguments if "--data" in arguments else [*arguments, "--data", "digits"]
    assert message in " ".join(run("train", *arguments, code=2).split())
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("one_thread")
def test_train_keeps_what_exists_and_what_was_chosen(tmp_path):
    path = tmp_path / "model.safetensors"
    train(path, "--epochs", 1)
    before = path.read_bytes()
    assert "--overwrite to replace it" in " ".join(train(path, "--epochs", 1, code=2).split())
    for changed, message in (
        (("--hidden", 30), "trained with hidden=(20,)"),
        (("--seed", 3), "trained with seed=0, not 3"),
        (("--epochs", 1), "has had its 1 epochs"),
        (("--epochs", 2, "--method", "pt"), "cannot change"),
        (("--epochs", 2, "--scale", 3), "trained with scale=None, not 3.0"),
    ):
        arguments = ("--data", "digits", "--out", path, "--resume", *changed)
        assert message in " ".join(run("train", "rbm", *arguments, code=2).split())
    assert path.read_bytes() == before
    table = tmp_path / "table.csv"
    table.write_text("1,0\n0,1\n1,1\n")
    refused = run("train", "rbm", "--data", f"csv:{table}", "--out", path, "--resume", "--epochs", 2, code=2)
    assert "the data have 2 columns, the model was made for 64" in " ".join(refused.split())
    train(path, "--epochs", 1, "--overwrite")
    assert path.read_bytes() == before


@pytest.mark.usefixtures("one_thread")
def test_training_that_diverges_says_so(tmp_path):
    shown = train(tmp_path / "model.safetensors", "--lr", 1e38, "--momentum", 0.9, code=2)
    assert "lower the learning rate" in shown


class Executed:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "model.safetensors"
    for write in (lambda: path.write_bytes(pickle.dumps(Executed())), lambda: torch.save(Executed(), path)):
        write()
        assert "no safetensors file" in " ".join(run("sample", path, code=2).split())


@pytest.mark.usefixtures("one_thread")
def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    assert "does not exist" in run("sample", path, code=2)
    save_file({"W": torch.zeros(3, 2)}, path)
    assert "not written by `genfast train`" in " ".join(run("sample", path, code=2).split())
    train(path, "--epochs", 1, "--momentum", 0.5, "--overwrite")
    tensors, about = contents(path)

    def refused(tensors, **changes):
        save_file(tensors, path, metadata={"genfast": json.dumps({**about, **changes})})
        return " ".join(run("sample", path, code=2).split())

    assert "'model.W'" in refused({name: t for name, t in tensors.items() if name != "model.W"})
    assert "model.W" not in refused({**tensors, "model.b": torch.zeros(3)})
    assert "weights of layer 0 are (64, 20), not (10000000000, 20)" in refused(tensors, visible=10**10)
    assert "buffers" in refused({**tensors, "optimizer.W": torch.zeros(3)})
    assert "damaged" in refused({**tensors, "loader.code": torch.zeros(3)})
    assert "no layer 5" in refused(tensors, layer=5)
    assert "reads 1" in refused(tensors, format=2)
    assert "damaged" in refused(tensors, options={**about["options"], "command": "ls"})


def known(visible=3, hidden=2, **options):
    """A run whose RBM has weights large enough to matter."""
    rows = Rows(torch.rand(10, visible, generator=torch.Generator().manual_seed(5)), None)
    made = training.start(training.RBMOptions(hidden=(hidden,), **options), rows)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def chi_square(samples, probabilities):
    index = (samples.long() * 2 ** torch.arange(samples.shape[1])).sum(1)
    counts = torch.bincount(index, minlength=len(probabilities)).double()
    wanted = len(samples) * probabilities
    return ((counts - wanted).square() / wanted).sum().item()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_samples_follow_the_model(beta):
    made = known()
    rbm = made.model
    states = torch.tensor([[(i >> j) & 1 for j in range(3)] for i in range(8)]).double()
    hidden = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]).double()
    W, b, c = (x.detach().double() for x in (rbm.W, rbm.b, rbm.c))
    energies = -(states @ b).unsqueeze(1) - hidden @ c - states @ W @ hidden.T
    p = torch.softmax(torch.logsumexp(-beta * energies, 1), 0)
    found = training.sample(made, 20_000, 30, seed=1, beta=beta)
    # Seven degrees of freedom: a false alarm in 100,000 seeds.
    assert chi_square(found, p) < 36
    assert chi_square(training.sample(made, 20_000, 30, seed=1, beta=2 * beta), p) > 100
    assert chi_square(training.sample(made, 20_000, 0, seed=1, beta=beta), p) > 100
    means = training.sample(made, 20_000, 30, seed=1, beta=beta, means=True)
    error = (means.double().mean(0) - p @ states).abs() / (means.double().std(0) / 20_000**0.5)
    assert error.max() < 5

    clamp = torch.tensor([[1.0, float("nan"), 0.0]])
    found = training.sample(made, 20_000, 30, seed=2, beta=beta, clamp=clamp)
    assert torch.equal(found[:, [0, 2]], torch.tensor([1.0, 0.0]).expand(20_000, 2))
    on = p[3] / (p[1] + p[3])
    assert abs(found[:, 1].double().mean() - on) < 5 * (on * (1 - on) / 20_000).sqrt()


@pytest.mark.usefixtures("one_thread")
def test_samples_are_in_the_units_of_the_data(tmp_path):
    table = tmp_path / "table.csv"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 2, generator=generator) * torch.tensor([3.0, 0.1]) + torch.tensor([50.0, -2.0])
    table.write_text("height,weight\n" + "".join(f"{a},{b}\n" for a, b in rows.tolist()))
    model, out = tmp_path / "model.safetensors", tmp_path / "new" / "out.csv"
    common = ("--data", f"csv:{table}", "--out", model, "--epochs", 1, "--hidden", 3, "--overwrite")
    run("train", "rbm", *common, "--visible", "gaussian", "--lr", 1e-4)
    run("sample", model, "--n", 2000, "--steps", 5, "--out", out)
    found = genfast.data.read_csv(out)
    torch.testing.assert_close(found.mean(0), rows.mean(0), rtol=0, atol=0.5)
    torch.testing.assert_close(found.std(0), rows.std(0), rtol=0.15, atol=0)
    clamp = tmp_path / "clamp.csv"
    clamp.write_text("height,weight\n48.5,\n")
    run("sample", model, "--n", 3, "--steps", 5, "--out", out, "--clamp", clamp)
    torch.testing.assert_close(genfast.data.read_csv(out)[:, 0], torch.full((3,), 48.5))

    table.write_text("".join(f"{a},{b}\n" for a in range(3) for b in range(3)) * 4)
    run("train", "rbm", *common, "--visible", "softmax:3")
    assert contents(model)[0]["model.W"].shape == (6, 3)
    run("sample", model, "--n", 50, "--steps", 5, "--out", out)
    assert set(genfast.data.read_csv(out).unique().tolist()) == {0.0, 1.0, 2.0}
    clamp.write_text("2,nan\n")
    run("sample", model, "--n", 50, "--steps", 5, "--out", out, "--clamp", clamp)
    found = genfast.data.read_csv(out)
    assert (found[:, 0] == 2).all()
    assert set(found[:, 1].unique().tolist()) == {0.0, 1.0, 2.0}
    assert "is 7" in run("sample", model, "--clamp", _written(clamp, "7,nan\n"), "--out", out, code=2)


def _written(path, text):
    path.write_text(text)
    return path


@pytest.mark.usefixtures("one_thread")
def test_sample_formats(tmp_path):
    from matplotlib import image

    model = tmp_path / "model.safetensors"
    made = dataclasses.replace(known(visible=6), shape=(2, 3))
    training.save(made, model)
    wanted = training.sample(made, 5, 7, seed=3)
    paths = [tmp_path / f"out{suffix}" for suffix in (".png", ".csv", ".safetensors")]
    for path in paths:
        run("sample", model, "--n", 5, "--steps", 7, "--seed", 3, "--out", path)
    assert torch.equal(genfast.data.read_csv(paths[1]), wanted)
    assert torch.equal(load_file(paths[2])["samples"], wanted)
    picture = torch.tensor(image.imread(paths[0]))
    zoom = 56 // 3
    gap = zoom
    assert picture.shape == (2 * (2 * zoom + gap) + gap, 3 * (3 * zoom + gap) + gap)
    for index in range(5):
        top, left = gap + index // 3 * (2 * zoom + gap), gap + index % 3 * (3 * zoom + gap)
        cells = picture[top : top + 2 * zoom, left : left + 3 * zoom]
        assert torch.equal(cells, (1 - wanted[index].view(2, 3)).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1))
    run("sample", model, "--shape", "3x2", "--n", 1, "--out", paths[0])
    assert image.imread(paths[0]).shape[0] > image.imread(paths[0]).shape[1]
    for arguments, message in (
        (("--shape", "4x2"), "no picture of 4 x 2"),
        (("--shape", "six"), "ROWSxCOLUMNS"),
        (("--out", "samples.jpg"), "must end in .png, .csv, .safetensors"),
        (("--n", 0), "n must be at least 1"),
        (("--beta", 0), "beta must be"),
        (("--clamp", _written(tmp_path / "c.csv", "1,2\n")), "1 or 64 rows of 6 columns, got 1 x 2"),
        (("--clamp", _written(tmp_path / "d.csv", "2,,,,,\n")), "values in [0, 1]"),
    ):
        assert message in " ".join(run("sample", model, *arguments, code=2).split())
    training.save(dataclasses.replace(known(visible=6), shape=None), model)
    assert "give its shape" in " ".join(run("sample", model, code=2).split())
