"""Lightning and accelerate train models with genfast's layers as a plain loop trains PyTorch's."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import genfast
import genfast.nn as gnn

STEPS, BATCH, LENGTH, VOCABULARY = 4, 3, 7, 11
warnings.filterwarnings("ignore", message=".*jit.script.*")


class Tagger(nn.Module):
    """A tiny encoder; ``layers`` is torch.nn or genfast.nn."""

    def __init__(self, layers, depth=2):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        layer = layers.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
        self.encoder = layers.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, tokens):
        hidden = self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0)
        return self.head(hidden)

    def loss(self, tokens):
        logits = self(tokens).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=0)


def tagger(kind, depth=2):
    torch.manual_seed(0)
    model = Tagger(gnn if kind == "layers" else nn, depth)
    if kind == "patch":
        assert len(genfast.patch(model).swapped) == 1 + 2 * depth
    return model


def data():
    tokens = torch.randint(1, VOCABULARY, (STEPS * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens[::2, -2:] = 0
    return tokens


def loader():
    return torch.utils.data.DataLoader(data(), batch_size=BATCH)


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def plain_losses(model, autocast=False, epochs=1):
    optimizer, losses = optimizer_of(model), []
    for _ in range(epochs):
        for batch in data().split(BATCH):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


KINDS = ("layers", "patch")
NEAR = {"rel": 2e-5}
NEAR_BFLOAT16 = {"rel": 2e-2}


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_loop(kind):
    expected = plain_losses(tagger("torch"))
    assert expected[0] - expected[-1] > 0.2
    assert plain_losses(tagger(kind)) == pytest.approx(expected, **NEAR)
    low = plain_losses(tagger(kind), autocast=True)
    assert low != expected
    assert low == pytest.approx(expected, **NEAR_BFLOAT16)


# ---- accelerate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate(kind, tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def run(precision, resume_at=None):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        model = tagger(kind)
        model, optimizer, batches = accelerator.prepare(model, optimizer_of(model), loader())
        losses = []
        if resume_at is not None:
            accelerator.load_state(tmp_path)
        for step, batch in enumerate(batches):
            if resume_at is not None and step < resume_at:
                continue
            with accelerator.autocast():
                loss = model.loss(batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if resume_at is None and step == 1:
                accelerator.save_state(tmp_path)
        return losses

    plain = plain_losses(tagger(kind))
    found = run("no")
    assert found == plain  # bit for bit
    assert found == pytest.approx(plain_losses(tagger("torch")), **NEAR)
    assert run("no", resume_at=2) == found[2:]
    assert run("bf16") == plain_losses(tagger(kind), autocast=True)


# ---- Lightning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_lightning(kind, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = tagger(kind), []

        def training_step(self, batch, _):
            loss = self.model.loss(batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return optimizer_of(self.model)

    def fit(task, epochs, precision="32-true", resume=None):
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, precision=precision, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(task, loader(), ckpt_path=resume)
        return trainer

    task = Task()
    trainer = fit(task, 1)
    assert task.losses == plain_losses(tagger(kind))  # bit for bit
    assert task.losses == pytest.approx(plain_losses(tagger("torch")), **NEAR)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=False)["state_dict"]
    assert state.keys() == {f"model.{name}" for name in tagger("torch").state_dict()}
    resumed = Task()
    fit(resumed, 2, resume=path)
    assert resumed.losses == plain_losses(tagger(kind), epochs=2)[STEPS:]
    low = Task()
    fit(low, 1, "bf16-mixed")
    assert low.losses == plain_losses(tagger(kind), autocast=True)


# ---- graphs ----------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, torch, genfast
program = torch.export.load(sys.argv[1])
tokens, expected = torch.load(sys.argv[2])
assert "genfast.attention" in str(program.graph)
print((program.module()(tokens) - expected).abs().max().item())
"""


def test_an_exported_program_runs_in_a_new_process(tmp_path):
    model = tagger("patch", 1).eval()
    tokens = data()[:BATCH]
    with torch.no_grad():
        expected = tagger("torch", 1).eval()(tokens)
        program = torch.export.export(model, (tokens,))
    assert str(program.graph).count("genfast.attention") == 1
    assert (program.module()(tokens) - expected).abs().max() < 1e-5
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((tokens, expected), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "program.pt2"), str(tmp_path / "expected.pt")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-5


def test_a_whole_graph_has_the_gradients():
    expected, model = tagger("torch", 1), tagger("patch", 1)
    tokens = data()[:BATCH]
    expected.loss(tokens).backward()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(tokens)
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=0).backward()
    for (name, got), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-3, atol=1e-5, msg=name)
    torch._dynamo.reset()


def test_a_copy_of_a_patched_model_trains_alike():
    model = tagger("patch")
    assert plain_losses(copy.deepcopy(model)) == plain_losses(model)
