"""Recommends items by a restricted Boltzmann machine over ratings, most of which are missing.

python examples/recommend.py                            # made-up tastes for made-up films
python examples/recommend.py --ratings ml-100k/u.data   # lines of "user item rating", as in MovieLens 100K
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from genfast.models import CollaborativeRBM, RatingTable

GENRES = ("comedy", "drama", "horror", "western", "romance")


def made_up(users: int = 600, films: int = 80) -> Tensor:
    """(user, item, rating) rows [R, 3]: film i is of genre i % 5; users rate more of what they like."""
    generator = torch.Generator().manual_seed(0)
    taste = torch.randn(users, len(GENRES), generator=generator)
    quality = 0.5 * torch.randn(films, generator=generator)
    liking = taste[:, torch.arange(films) % len(GENRES)] + quality
    ratings = (3.3 + liking + 0.4 * torch.randn(users, films, generator=generator)).round().clamp(1, 5).long()
    seen = torch.rand(users, films, generator=generator) < 0.5 * torch.sigmoid(liking)
    user, item = seen.nonzero(as_tuple=True)
    return torch.stack((user, item, ratings[user, item]), 1)


def read(path: str) -> Tensor:
    """Rows [R, 3] of a file whose lines begin with user, item and an integer rating; users and items are renumbered."""
    with open(path, encoding="utf-8") as lines:
        rows = torch.tensor([[int(field) for field in line.split()[:3]] for line in lines if line.strip()])
    for column in (0, 1):
        rows[:, column] = rows[:, column].unique(return_inverse=True)[1]
    return rows


def rmse(prediction: Tensor, truth: Tensor) -> float:
    return float((prediction - truth)[truth > 0].square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratings", help="file of ratings; without it they are made up")
    parser.add_argument("--hidden", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--conditional", action="store_true", help="learn from what was rated, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    rows = read(options.ratings) if options.ratings else made_up()
    rows = rows[torch.randperm(len(rows))]
    users, items, categories = (int(n) for n in rows.max(0).values + torch.tensor([1, 1, 0]))
    split = len(rows) * 9 // 10
    train, test = (RatingTable(*part.T, shape=(users, items)) for part in (rows[:split], rows[split:]))
    print(f"{len(rows)} ratings of {items} items by {users} users; a tenth is held out")

    rbm = CollaborativeRBM(items, categories, options.hidden, conditional=options.conditional).to(options.device)
    rbm.init_bias(train)
    optimizer = torch.optim.SGD(rbm.parameters(), lr=options.learning_rate, momentum=0.9, weight_decay=1e-4)
    truth, start = test[:].to(options.device), time.perf_counter()
    for epoch in range(options.epochs + 1):
        if epoch > 0:
            k = 1 + 2 * (epoch * 3 // options.epochs)  # more Gibbs steps as the model becomes good
            for _, ratings in train.batches(options.batch):
                optimizer.zero_grad()
                rbm.contrastive_divergence(ratings.to(options.device), k=k).backward()
                optimizer.step()
        if epoch % 10 == 0 or epoch == options.epochs:
            with torch.no_grad():
                error = rmse(rbm.predict(train[:].to(options.device)), truth)
            name = "the items' means" if epoch == 0 else f"epoch {epoch:3d}"
            print(f"{name:>16}   held-out error {error:.3f}   {time.perf_counter() - start:5.1f} s")

    user = train[0].to(options.device)
    with torch.no_grad():
        expected = rbm.predict(user.unsqueeze(0), method="exact")[0].masked_fill(user > 0, 0.0)
    print("user 0 gave", ", ".join(f"{describe(int(i), options)} {int(user[i])}" for i in user.nonzero()[:8, 0]))
    best = expected.topk(min(3, items))
    print("and may like", ", ".join(f"{describe(int(i), options)} ({expected[i]:.1f})" for i in best.indices))


def describe(item: int, options: argparse.Namespace) -> str:
    return f"item {item}" if options.ratings else f"{GENRES[item % len(GENRES)]} {item}"


if __name__ == "__main__":
    main()
