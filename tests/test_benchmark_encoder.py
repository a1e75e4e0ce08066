"""The benchmarks of whole training steps: contenders agree, checks refuse wrong ones, a missing library is said."""

import sys

import pytest
import torch

from genfast.benchmarks import harness
from genfast.benchmarks.ops import encoder, hf_bert, vae_step

QUICK = harness.Settings(quick=True, compiled=False, seconds=0.02)


def assert_check_finds_faults(made):
    inputs = made.inputs()
    for name, call in made.contenders.items():
        for _ in range(2):  # a step leaves the weights as they are
            assert made.check(inputs, call(*inputs)) is None, name
    loss, *gradients = made.contenders["genfast"](*inputs)
    assert "the loss" in made.check(inputs, (loss * 1.2, *gradients))
    assert "numbers" in made.check(inputs, (loss, *gradients[1:]))
    assert "gradient" in made.check(inputs, (loss, *(g.flip(0) for g in gradients)))
    return inputs, loss, gradients


def test_encoder():
    made = encoder.cases(QUICK)
    assert [c.variant for c in made[:2]] == [
        "training step, 2 layers, dropout 0.1", "training step, 2 layers, no dropout",
    ]  # fmt: skip
    for c in made[:2]:
        inputs, loss, gradients = assert_check_finds_faults(c)
        assert set(c.contenders) == {"genfast", "eager"}
        assert c.targets == {"default": {"eager": 1.3}}
    assert "the loss" in c.check(inputs, (loss * 1.003, *gradients))
    assert "relative error" in c.check(inputs, (loss, *(g * 1.01 for g in gradients)))


def test_hf_bert():
    pytest.importorskip("transformers")
    (made,) = hf_bert.cases(QUICK)
    assert set(made.contenders) == {"genfast", "sdpa", "eager"}
    implementations = [call.model.config._attn_implementation for call in made.contenders.values()]
    assert implementations == list(made.contenders)
    inputs, *_ = assert_check_finds_faults(made)
    unpadded = made.contenders["genfast"](inputs[0], torch.ones_like(inputs[1]))
    assert made.check(inputs, unpadded) is not None


def test_hf_bert_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (row,) = hf_bert.run(QUICK)
    assert row.status.startswith("skipped: transformers is not installed (pip install")


def test_vae_step():
    (made,) = vae_step.cases(QUICK)
    assert set(made.contenders) == {"genfast", "eager"}
    assert_check_finds_faults(made)
