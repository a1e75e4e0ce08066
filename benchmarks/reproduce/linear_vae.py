"""``VAE.log_likelihood`` where log p(x) is known: a linear decoder with Gaussian noise, whose marginal is Gaussian.

python -m genfast.benchmarks.reproduce.linear_vae [--quick] [--seeds 0-9] [--out DIR]

p(z) = N(0, 1), p(x|z) = N(W z + b, s^2), so log p(x) = log N(x; b, W W' + s^2). The encoder gives the exact posterior's
mean and a diagonal in place of its covariance. Reported, a run: the mean over 200 rows of the estimate less the exact
value, in nats and in its standard errors, at 5,000 samples, and the importance-weighted bound at K = 1, 10, 100 and
1,000, which must rise to the exact value.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import track
from torch import Tensor, nn

from genfast import ops
from genfast.benchmarks.reproduce import _common as common
from genfast.models import VAE

FEATURES, LATENT, ROWS, NOISE = 20, 4, 200, 0.8
BOUNDS = (1, 10, 100, 1000)


class Decoder(nn.Module):
    """z to mean and logvar of x."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.W = torch.randn(FEATURES, LATENT, dtype=torch.float64, generator=draw) / math.sqrt(LATENT)
        self.b = torch.randn(FEATURES, dtype=torch.float64, generator=draw)

    def forward(self, z: Tensor) -> Tensor:
        mean = z @ self.W.T + self.b
        return torch.cat((mean, torch.full_like(mean, 2 * math.log(NOISE))), -1)

    def exact(self, x: Tensor) -> Tensor:
        covariance = self.W @ self.W.T + NOISE**2 * torch.eye(FEATURES, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(self.b, covariance).log_prob(x)


class Encoder(nn.Module):
    """The posterior's mean, and the inverse of its precision's diagonal."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        precision = torch.eye(LATENT, dtype=torch.float64) + decoder.W.T @ decoder.W / NOISE**2
        self.gain = decoder.W @ torch.linalg.inv(precision) / NOISE**2
        self.b = decoder.b
        self.logvar = -torch.log(torch.diagonal(precision))

    def forward(self, x: Tensor) -> Tensor:
        mean = (x - self.b) @ self.gain
        return torch.cat((mean, self.logvar.expand_as(mean)), -1)


def run(seed: int, samples: int) -> dict[str, Any]:
    decoder = Decoder(seed)
    vae = VAE(Encoder(decoder), decoder, LATENT, likelihood="gaussian")
    draw = torch.Generator().manual_seed(1000 + seed)
    z = torch.randn(ROWS, LATENT, dtype=torch.float64, generator=draw)
    x = decoder(z)[:, :FEATURES] + NOISE * torch.randn(ROWS, FEATURES, dtype=torch.float64, generator=draw)
    exact = decoder.exact(x)
    mu, logvar = vae.encode(x)
    z, ratio = ops.reparameterize_log_ratio(mu, logvar, samples=samples, seed=seed)
    weights = ops.log_likelihood(vae.decode(z), x, likelihood="gaussian") + ratio
    estimate = ops.importance_log_likelihood(weights)
    difference = vae.log_likelihood(x, samples, seed=seed) - exact
    row = {
        "seed": seed,
        "exact": exact.mean().item(),
        "difference": difference.mean().item(),
        "standard_error": (estimate.standard_error.square().sum().sqrt() / ROWS).item(),
        "largest_in_errors": ((estimate.log_likelihood - exact) / estimate.standard_error).abs().max().item(),
    }
    for k in BOUNDS:
        chunks = weights[: samples // k * k].unflatten(0, (-1, k)).transpose(0, 1)
        row[f"gap_{k}"] = (exact - ops.iwae_bound(chunks).mean(0)).mean().item() if k <= samples else math.nan
    return row


def table(rows: list[dict[str, Any]]) -> list[common.Line]:
    lines = [
        common.Line("log p(x), exact", [row["exact"] for row in rows]),
        common.Line("estimate - exact", [row["difference"] for row in rows], 0.0, "exact"),
        common.Line("standard error of the estimate", [row["standard_error"] for row in rows]),
        common.Line("|estimate - exact|, in standard errors", [
            abs(row["difference"]) / row["standard_error"] for row in rows
        ]),
    ]  # fmt: skip
    lines += [common.Line(f"exact - bound of K = {k}", [row[f"gap_{k}"] for row in rows]) for k in BOUNDS]
    return lines


def draw_gaps(path: Path, rows: list[dict[str, Any]]) -> None:
    plot = common.pyplot()
    figure, axis = plot.subplots(figsize=(5, 3.4), layout="constrained")
    for row in rows:
        axis.plot(BOUNDS, [row[f"gap_{k}"] for k in BOUNDS], color="#2a78d6", marker="o", markersize=3, alpha=0.5)
    axis.set(xscale="log", yscale="log", xlabel="K", ylabel="log p(x) - bound, nats")
    figure.savefig(path, dpi=110)
    plot.close(figure)


def main(
    out: common.OutOption = None,
    quick: common.QuickOption = False,
    seeds: common.SeedsOption = "0-9",
    threads: common.ThreadsOption = None,
) -> None:
    """Compares importance-sampled log-likelihoods with exact ones."""
    chosen = common.start(threads, seeds, quick)
    rows = [run(seed, 1000 if quick else 5000) for seed in track(chosen, "seeds", transient=True)]
    folder = common.finish(
        "linear_vae", "log-likelihood of a linear Gaussian VAE, nats", table(rows), {"runs": rows}, out=out,
        quick=quick, seeds=chosen,
        note=f"{FEATURES} values, {LATENT} latents, {ROWS} rows, {1000 if quick else 5000} samples, float64",
    )  # fmt: skip
    draw_gaps(folder / "gaps.png", rows)


if __name__ == "__main__":
    typer.run(main)
