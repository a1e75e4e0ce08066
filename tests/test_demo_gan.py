"""The demo's GAN: its measures, and that training helps."""

from io import StringIO

import pytest
import torch
from rich.console import Console

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from genfast.demo import gan, train


@pytest.fixture
def digits():
    return train.load_digits()


@pytest.mark.slow
def test_training_finds_the_digits(digits):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = gan.run(digits, steps=600, console=Console(file=StringIO()))
    finally:
        torch.set_num_threads(threads)
    assert found.accuracy > 0.9
    assert found.trained.modes >= max(6, found.untrained.modes + 3)
    assert found.trained.divergence < found.untrained.divergence
    assert found.trained.precision > found.untrained.precision + 0.2
    assert found.trainer.steps == 600
    assert found.trainer.optimizers["generator"].param_groups[0]["lr"] < 2e-5


def test_measures_are_those_of_the_digits_themselves(digits):
    """A generator that repeats training digits has all ten, and a precision near that of held-out ones."""

    class Copies:
        def sample(self, count, seed):
            return digits.train[:count] * 2 - 1

    found = gan._measure(Copies(), gan._classifier(digits), digits)
    assert found.modes == 10
    assert found.divergence < 0.01
    assert found.sure > 0.9
    assert min(found.precision, found.recall) > 0.6

    class Ones:
        def sample(self, count, seed):
            return digits.train[digits.train_labels == 1][:1].expand(count, -1) * 2 - 1

    found = gan._measure(Ones(), gan._classifier(digits), digits)
    assert found.modes <= 1
    assert found.divergence > 2
    assert found.recall < 0.1
