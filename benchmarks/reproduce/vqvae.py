"""A VQ-VAE on digits with the fused quantizer and with the plain formula: codes in use, perplexity, likelihood.

python -m genfast.benchmarks.reproduce.vqvae [--data DIR] [--quick] [--seeds 0-9] [--out DIR]

Both train the same network from the same weights on the same batches: the plain one takes the full matrix of distances,
argmin, an embedding and one-hot sums, as van den Oord, Vinyals and Kavukcuoglu ("Neural discrete representation
learning", NeurIPS 2017, section 3 and appendix A.1) write them. They published no figures on MNIST; what is compared is
the two. A third run is the fused one with dead codes revived.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import Progress
from torch import Tensor, nn

from genfast import ops
from genfast.benchmarks.reproduce import _common as common
from genfast.models import VQVAE
from genfast.nn import VectorQuantizer
from genfast.ops.vector_quantize import VectorQuantized

CODES, DIM, EPOCHS, BATCH = 64, 16, 5, 100
CHANNELS, BLOCKS = (16, 32), 1
REVIVE_BELOW = 1.0  # running count of a batch of 4,900 vectors
KINDS = ("genfast", "plain", "revived")


class PlainQuantizer(VectorQuantizer):
    """The textbook's layer, with the state of genfast's."""

    def forward(self, z: Tensor) -> VectorQuantized:
        vectors = z.movedim(1, -1)
        flat = vectors.reshape(-1, self.dim)
        codebook = self.codebook.detach().clone()
        distances = flat.square().sum(1, keepdim=True) - 2 * flat @ codebook.T + codebook.square().sum(1)
        indices = distances.argmin(1)
        codes = codebook[indices].view_as(vectors)
        if self.training:
            with torch.no_grad():
                one_hot = nn.functional.one_hot(indices, self.num_codes).to(flat.dtype)
                assert self.decay is not None
                assert self.sums is not None
                self.counts.mul_(self.decay).add_(one_hot.sum(0), alpha=1 - self.decay)
                self.sums.mul_(self.decay).add_(one_hot.T @ flat, alpha=1 - self.decay)
                total = self.counts.sum()
                smooth = (self.counts + self.eps) / (total + self.num_codes * self.eps) * total
                self.codebook.copy_(self.sums / smooth.unsqueeze(1))
        commitment = (vectors - codes).square().mean()
        z_q = (vectors + (codes - vectors).detach()).movedim(-1, 1)
        shaped = indices.view(vectors.shape[:-1])
        return VectorQuantized(z_q, shaped, self.beta * commitment, commitment.detach(), commitment)


def run(
    digits: common.Digits, seed: int, kind: str, epochs: int, advance: Callable[[], None]
) -> tuple[dict[str, Any], VQVAE]:
    """What the test images' codes look like after training."""
    side = digits.side
    channels = CHANNELS if side % 4 == 0 else CHANNELS[:1]
    torch.manual_seed(seed)
    revive_below = REVIVE_BELOW if kind == "revived" else 0.0
    model = VQVAE.conv((1, side, side), channels, CODES, DIM, blocks=BLOCKS, seed=seed, revive_below=revive_below)
    if kind == "plain":
        model.quantizer.__class__ = PlainQuantizer
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(seed)
    train, test = (common.binarize(x).view(-1, 1, side, side) for x in (digits.train, digits.test))
    for _ in range(epochs):
        for chosen in torch.randperm(len(train), generator=order).split(BATCH):
            optimizer.zero_grad()
            model.loss(train[chosen]).backward()
            optimizer.step()
        advance()
    model.eval()
    model.fit_prior(train)
    usage = ops.code_usage(model.encode(test), CODES)
    with torch.no_grad():
        reconstruction = -model._log_px(model.decode(model.encode(test)), test).mean().item()
    row = {
        "quantizer": kind,
        "seed": seed,
        "codes_in_use": int((usage.counts > 0).sum()),
        "perplexity": usage.perplexity.item(),
        "reconstruction": reconstruction,
        "negative_log_likelihood": -model.log_likelihood(test).mean().item(),
    }
    return row, model


def table(rows: list[dict[str, Any]]) -> list[common.Line]:
    lines = []
    for key, label in (
        ("codes_in_use", f"codes in use of {CODES}"),
        ("perplexity", "perplexity of the codes"),
        ("reconstruction", "-log p(x|codes), nats"),
        ("negative_log_likelihood", "-log p(x, codes) with independent codes, nats"),
    ):
        for quantizer in KINDS:
            found = [row[key] for row in rows if row["quantizer"] == quantizer]
            lines.append(common.Line(f"{label}: {quantizer}", found))
        pairs: dict[int, dict[str, float]] = {}
        for row in rows:
            pairs.setdefault(row["seed"], {})[row["quantizer"]] = row[key]
        lines.append(
            common.Line(f"{label}: genfast - plain", [p["genfast"] - p["plain"] for p in pairs.values()], 0.0, "equal")
        )
    return lines


def draw(folder: Path, digits: common.Digits, model: VQVAE) -> None:
    side = digits.side
    x = common.binarize(digits.test[:40]).view(-1, 1, side, side)
    shown = {"test images": x, "reconstructions": model.reconstruct(x), "samples": model.sample(40, seed=0)}
    common.images(
        folder / "images.png", {title: common.tile(rows.flatten(1), side, 8) for title, rows in shown.items()}
    )


def main(
    data: common.DataOption = None,
    out: common.OutOption = None,
    quick: common.QuickOption = False,
    seeds: common.SeedsOption = "0-9",
    threads: common.ThreadsOption = None,
) -> None:
    """Trains VQ-VAEs with genfast's quantizer, with the plain formula, and with dead codes revived."""
    chosen = common.start(threads, seeds, quick)
    digits = common.load_digits(data, quick)
    epochs = 2 if quick else EPOCHS
    rows: list[dict[str, Any]] = []
    first: VQVAE | None = None
    with Progress(transient=True) as progress:
        task = progress.add_task("VQ-VAE", total=len(KINDS) * len(chosen) * epochs)
        for seed in chosen:
            for kind in KINDS:
                row, model = run(digits, seed, kind, epochs, partial(progress.advance, task))
                rows.append(row)
                first = model if first is None else first
    assert first is not None
    folder = common.finish(
        "vqvae", "VQ-VAE on MNIST", table(rows), {"runs": rows}, out=out, quick=quick, seeds=chosen,
        note=f"{digits.note}. {epochs} epochs of batches of {BATCH}, {CODES} codes of {DIM} numbers",
    )  # fmt: skip
    draw(folder, digits, first)


if __name__ == "__main__":
    typer.run(main)
