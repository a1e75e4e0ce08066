"""Ratings of MovieLens-100k predicted by an RBM, beside the usual baselines: RMSE on held-out ratings.

python -m genfast.benchmarks.reproduce.movielens [--data DIR] [--quick] [--seeds 0-2] [--out DIR]

Salakhutdinov, Mnih and Hinton, "Restricted Boltzmann machines for collaborative filtering" (ICML 2007), found RBMs as
good as matrix factorization on Netflix. One fifth of the ratings, the same ones for every seed, is held out; a tenth of
the others chooses each model's settings among a few, before it learns from all of them. Seeds differ in the initial
weights and the noise. The RBM's rate, epochs and batches were found on that tenth too, by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import track
from torch import Tensor

from genfast.benchmarks.reproduce import _common as common
from genfast.models import CollaborativeRBM, RatingTable

HIDDEN, BATCH, MOMENTUM, EPOCHS, RATE, SCALE = 50, 10, 0.9, 30, 0.1, 0.1  # SCALE: of the RBM's initial weights
DECAYS = (5e-3, 1e-2, 2e-2)  # of the RBM's weights
RANKS, FACTOR_PENALTIES, BIAS_PENALTIES = (10, 20), (8.0, 16.0, 24.0), (1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Ratings:
    """(user, item, rating) triples, columns [R]."""

    users: Tensor
    items: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, chosen: Tensor) -> Ratings:
        return Ratings(self.users[chosen], self.items[chosen], self.values[chosen])


def split(ratings: Ratings, share: float, seed: int) -> tuple[Ratings, Ratings]:
    """(the others, a random share), the same for the same seed."""
    order = torch.randperm(len(ratings), generator=torch.Generator().manual_seed(seed))
    count = round(len(ratings) * share)
    return ratings.rows(order[count:]), ratings.rows(order[:count])


def rmse(prediction: Tensor, truth: Tensor) -> float:
    """Root mean squared error, predictions kept in [1, 5]."""
    return (prediction.double().clamp(1, 5) - truth.double()).square().mean().sqrt().item()


def item_means(train: Ratings, items: int, smoothing: float = 1.0) -> Tensor:
    """Mean rating of each item, [items], pulled to the global mean by ``smoothing`` ratings' worth."""
    mean = train.values.mean()
    total = torch.zeros(items).index_add(0, train.items, train.values)
    return (total + smoothing * mean) / (torch.bincount(train.items, minlength=items) + smoothing)


def biases(train: Ratings, users: int, items: int, penalty: float, sweeps: int = 20) -> tuple[float, Tensor, Tensor]:
    """(m, b_u, b_i) that minimize sum (r - m - b_u - b_i)^2 + penalty (|b_u|^2 + |b_i|^2), m the mean rating."""
    mean = train.values.mean().item()
    by_user, by_item = torch.zeros(users), torch.zeros(items)
    counts_u, counts_i = torch.bincount(train.users, minlength=users), torch.bincount(train.items, minlength=items)
    for _ in range(sweeps):
        left = train.values - mean - by_user[train.users]
        by_item = torch.zeros(items).index_add(0, train.items, left) / (counts_i + penalty)
        left = train.values - mean - by_item[train.items]
        by_user = torch.zeros(users).index_add(0, train.users, left) / (counts_u + penalty)
    return mean, by_user, by_item


def factors(train: Ratings, left: Tensor, users: int, items: int, rank: int, penalty: float, seed: int) -> Any:
    """(P, Q) of P_u . Q_i for what the biases leave, [R], by alternating least squares; ridge ``penalty`` each."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.randn(items, rank, generator=generator) * 0.1
    P = torch.zeros(users, rank)
    for _ in range(15):
        P = _ridge(train.users, Q[train.items], left, users, penalty)
        Q = _ridge(train.items, P[train.users], left, items, penalty)
    return P, Q


def _ridge(rows: Tensor, x: Tensor, y: Tensor, count: int, penalty: float) -> Tensor:
    """Ridge regression of y on x for each group of ``rows``, [count, rank]."""
    rank = x.shape[1]
    squares = (x.unsqueeze(2) * x.unsqueeze(1)).flatten(1)
    gram = torch.zeros(count, rank * rank).index_add(0, rows, squares).view(count, rank, rank)
    moment = torch.zeros(count, rank).index_add(0, rows, x * y.unsqueeze(1))
    return torch.linalg.solve(gram + penalty * torch.eye(rank), moment)


def rbm_errors(
    train: Ratings, test: Ratings, shape: tuple[int, int], decay: float, epochs: int, seed: int
) -> tuple[list[float], Tensor]:
    """RMSE on ``test`` after each epoch of CD-1 at a rate that falls to 0, and the last predictions."""
    torch.manual_seed(seed)
    table = RatingTable(train.users, train.items, train.values.long(), shape)
    rbm = CollaborativeRBM(shape[1], 5, HIDDEN)
    rbm.init_bias(table)
    torch.nn.init.normal_(rbm.W, std=SCALE)
    weights = [{"params": [rbm.W], "weight_decay": decay}, {"params": [rbm.b, rbm.c]}]
    optimizer = torch.optim.SGD(weights, lr=RATE, momentum=MOMENTUM)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch / epochs)
    given = table[:]
    errors = []
    for epoch in range(epochs):
        for _, ratings in table.batches(BATCH, seed=seed * 1000 + epoch):
            optimizer.zero_grad()
            rbm.contrastive_divergence(ratings, 1).backward()
            optimizer.step()
        falling.step()
        with torch.no_grad():
            prediction = rbm.predict(given)[test.users, test.items]
        errors.append(rmse(prediction, test.values))
    return errors, prediction


def run_baselines(train: Ratings, test: Ratings, shape: tuple[int, int], seeds: list[int]) -> dict[str, Any]:
    """RMSE of each baseline, of matrix factorization one a seed; its predictions, and the settings chosen."""
    users, items = shape
    part, held_out = split(train, 0.1, 1)
    found: dict[str, Any] = {
        "global mean": [rmse(train.values.mean().expand(len(test)), test.values)],
        "item means": [rmse(item_means(train, items)[test.items], test.values)],
    }

    def bias_model(data: Ratings, on: Ratings, penalty: float) -> tuple[Tensor, Tensor]:
        mean, by_user, by_item = biases(data, users, items, penalty)
        predict = [mean + by_user[rows.users] + by_item[rows.items] for rows in (data, on)]
        return predict[0], predict[1]

    errors = {p: rmse(bias_model(part, held_out, p)[1], held_out.values) for p in BIAS_PENALTIES}
    penalty = min(errors, key=lambda p: errors[p])
    found["user and item biases"] = [rmse(bias_model(train, test, penalty)[1], test.values)]

    def factorized(data: Ratings, on: Ratings, rank: int, ridge: float, seed: int) -> Tensor:
        inside, outside = bias_model(data, on, penalty)
        P, Q = factors(data, data.values - inside, users, items, rank, ridge, seed)
        return outside + (P[on.users] * Q[on.items]).sum(1)

    grid = [(rank, ridge) for rank in RANKS for ridge in FACTOR_PENALTIES]
    tried = {pair: rmse(factorized(part, held_out, *pair, 0), held_out.values) for pair in grid}
    rank, ridge = min(tried, key=lambda pair: tried[pair])
    predictions = [factorized(train, test, rank, ridge, seed) for seed in seeds]
    found["biases and matrix factorization (ALS)"] = [rmse(prediction, test.values) for prediction in predictions]
    found["chosen"] = {"bias_penalty": penalty, "rank": rank, "factor_penalty": ridge}
    found["predictions"] = predictions
    return found


def draw(path: Path, curves: list[dict[str, Any]], baselines: dict[str, float]) -> None:
    """The RBM's error on the held-out ratings by epoch, with the baselines as lines."""
    plot = common.pyplot()
    figure, axis = plot.subplots(figsize=(6.4, 4), layout="constrained")
    for seed in sorted({row["seed"] for row in curves}):
        line = [row for row in curves if row["seed"] == seed]
        axis.plot([row["epoch"] for row in line], [row["rmse"] for row in line], color="#2a78d6", alpha=0.6)
    axis.plot([], [], color="#2a78d6", label="RBM, a line a seed")
    for (name, value), style in zip(list(baselines.items())[1:], (":", "--", "-."), strict=True):
        axis.axhline(value, color="#333333", linestyle=style, linewidth=1, label=name)
    axis.set(xlabel="epoch", ylabel="RMSE on held-out ratings")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plot.close(figure)


def main(
    data: common.DataOption = None,
    out: common.OutOption = None,
    quick: common.QuickOption = False,
    seeds: common.SeedsOption = "0-2",
    threads: common.ThreadsOption = None,
) -> None:
    """Predicts ratings of MovieLens-100k by an RBM and by baselines."""
    chosen = common.start(threads, seeds, quick)
    users, items, values, note = common.load_ratings(data, quick)
    shape = int(users.max()) + 1, int(items.max()) + 1
    train, test = split(Ratings(users, items, values), 0.2, 0)
    found = run_baselines(train, test, shape, chosen)

    part, held_out = split(train, 0.1, 1)
    epochs = 5 if quick else EPOCHS
    trials = []
    for decay in track(DECAYS, "settings", transient=True):
        errors, _ = rbm_errors(part, held_out, shape, decay, epochs, seed=0)
        trials.append({"decay": decay, "epochs": epochs, "validation_rmse": errors[-1]})
    setting = min(trials, key=lambda trial: trial["validation_rmse"])

    curves: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for index, seed in enumerate(track(chosen, "seeds", transient=True)):
        errors, prediction = rbm_errors(train, test, shape, setting["decay"], epochs, seed)
        curves += [{"seed": seed, "epoch": epoch + 1, "rmse": error} for epoch, error in enumerate(errors)]
        both = rmse(0.5 * (prediction + found["predictions"][index]), test.values)
        factorized = found["biases and matrix factorization (ALS)"][index]
        runs.append({"seed": seed, "rbm": errors[-1], "factorization": factorized, "average_of_both": both})

    simple = ("global mean", "item means", "user and item biases")
    lines = [common.Line(name, found[name]) for name in (*simple, "biases and matrix factorization (ALS)")]
    lines.append(common.Line(f"RBM, {HIDDEN} hidden units", [row["rbm"] for row in runs]))
    lines.append(common.Line("mean of RBM and factorization", [row["average_of_both"] for row in runs]))
    gap = [row["rbm"] - found["user and item biases"][0] for row in runs]
    lines.append(common.Line("RBM minus biases", gap))
    settings = {**found["chosen"], **{key: setting[key] for key in ("decay", "epochs")}}
    told = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in settings.items())
    folder = common.finish(
        "movielens", "RMSE on held-out ratings", lines, {"runs": runs, "curve": curves, "settings": trials},
        out=out, quick=quick, seeds=chosen,
        note=f"{note}; {len(train):,} to train, {len(test):,} held out. Chosen on a tenth of the former: {told}",
    )  # fmt: skip
    draw(folder / "curve.png", curves, {name: found[name][0] for name in (*simple, lines[3].quantity)})


if __name__ == "__main__":
    typer.run(main)
