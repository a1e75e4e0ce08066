"""Trains an RBM on 8 x 8 digits by persistent contrastive divergence, with any torch optimizer, and resumes exactly.

python examples/train_rbm.py --epochs 50 --save rbm.safetensors
python examples/train_rbm.py --epochs 50 --load rbm.safetensors   # goes on with the same chains and noise
"""

from __future__ import annotations

import argparse
import time

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor

from genfast.nn import RBM


def digits(device: str) -> tuple[Tensor, Tensor]:
    images = torch.tensor(load_digits().images, dtype=torch.float32, device=device).flatten(1)
    images = (images >= 8).float()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:1437]], images[order[1437:]]


@torch.no_grad()
def fantasies(rbm: RBM, count: int, steps: int) -> str:
    """A row of digits dreamt by chains that start at noise, as text."""
    noise = torch.rand(count, rbm.visible, device=rbm.W.device).round()
    v = rbm.gibbs(noise, steps)
    images = v.view(count, 8, 8).cpu()
    return "\n".join("  ".join("".join(" #"[int(p)] for p in image[row]) for image in images) for row in range(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--gibbs-steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--load", help="continue from these weights and chains")
    parser.add_argument("--save", help="write weights and chains here")
    options = parser.parse_args()

    torch.manual_seed(0)
    train, test = digits(options.device)
    rbm = RBM(64, options.hidden).to(options.device)
    if options.load:
        rbm.load_state_dict(load_file(options.load, device=options.device))
    optimizer = torch.optim.SGD(rbm.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=options.epochs)
    start = time.perf_counter()
    for epoch in range(1, options.epochs + 1):
        for batch in torch.randperm(len(train), device=options.device).split(options.batch):
            optimizer.zero_grad()
            # The value is no likelihood; its gradient is that of contrastive divergence.
            rbm.contrastive_divergence(train[batch], k=options.gibbs_steps, persistent=True).backward()
            optimizer.step()
        schedule.step()
        if epoch == 1 or epoch % 10 == 0 or epoch == options.epochs:
            with torch.no_grad():
                likelihood = rbm.pseudo_likelihood(test)
            seconds = time.perf_counter() - start
            print(f"epoch {epoch:4d}   held-out pseudo-likelihood {likelihood:8.2f} nats   {seconds:6.1f} s")
    print(fantasies(rbm, 8, 1000))
    if options.save:
        save_file(rbm.state_dict(), options.save)
        print(f"wrote {options.save}")


if __name__ == "__main__":
    main()
