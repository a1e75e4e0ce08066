"""The genfast command, run in this process."""

import csv
import json
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

import genfast
from genfast import _ledger, collect_env
from genfast.cli import app

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
    lines = [line.split("│") for line in shown.splitlines() if "ELBO" in line or "exact" in line]
    rows = {cells[1].strip(): cells for cells in lines}
    for model in ("VAE", "RBM"):
        untrained, trained = float(rows[model][3]), float(rows[model][4])
        assert untrained == pytest.approx(-64 * torch.log(torch.tensor(2.0)).item(), abs=1)  # coin flips
        assert trained > untrained + 8
    from genfast.demo.plots import NAMES

    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "scikit-learn" in shown
