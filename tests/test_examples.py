"""Every example runs from the command line, in a process of its own and with little work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LITTLE = {
    "gan_transformer_gradient_penalty.py": ["--steps", "3", "--penalty", "wgan-gp"],
    "meanflow_digits.py": ["--steps", "3", "--save", "samples.png"],
    "recommend.py": ["--epochs", "2", "--hidden", "8"],
    "train_dbn.py": ["--epochs", "1", "--hidden", "16", "16"],
    "train_rbm.py": ["--epochs", "1", "--hidden", "16"],
    "train_vae.py": ["--epochs", "1", "--latent", "2"],
}


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(LITTLE)


@pytest.mark.slow
@pytest.mark.parametrize("name", LITTLE)
def test_example_runs(name, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), "--device", "cpu", *LITTLE[name]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert any(character.isdigit() for character in done.stdout), "it reports no figure"
