"""Trains a deep belief network on 8 x 8 digits: layer by layer, as a generative model, then as a classifier.

python examples/train_dbn.py
python examples/train_dbn.py --hidden 256 256 256 --epochs 50 --save dbn.safetensors
"""

from __future__ import annotations

import argparse
import time

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from genfast.models import DBN


def digits(device: str) -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).flatten(1)
    return (images >= 8).float()[order].to(device), torch.tensor(data.target)[order].to(device)


def show(images: Tensor) -> str:
    """A row of digits as text."""
    pictures = images.view(-1, 8, 8).cpu()
    return "\n".join("  ".join("".join(" #"[int(p)] for p in image[row]) for image in pictures) for row in range(8))


def classify(network: nn.Module, v: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(v), device=v.device).split(32):
            optimizer.zero_grad()
            functional.cross_entropy(network(v[rows]), labels[rows]).backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 128])
    parser.add_argument("--epochs", type=int, default=30, help="of each layer, and of the fine-tuning")
    parser.add_argument("--labels", type=int, default=200, help="labelled digits for the classifier")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", help="write the network here before it becomes a classifier")
    options = parser.parse_args()

    torch.manual_seed(0)
    v, labels = digits(options.device)
    train, test = v[:1437], v[1437:]
    dbn = DBN(64, options.hidden).to(options.device)
    start = time.perf_counter()
    dbn.pretrain(train, options.epochs, lr=0.1, momentum=0.8, batch=32, seed=0)
    print(f"pretrained {len(dbn.layers)} layers in {time.perf_counter() - start:.1f} s")

    dbn.untie()
    optimizer = torch.optim.SGD(dbn.parameters(), lr=0.02)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(train), device=train.device).split(32):
            optimizer.zero_grad()
            dbn.up_down(train[rows], k=3).backward()
            optimizer.step()
    print(f"fine-tuned by up-down after {time.perf_counter() - start:.1f} s; what it dreams:")
    print(show(dbn.sample(8, 500, seed=0)))
    if options.save:
        save_file(dbn.state_dict(), options.save)
        print(f"wrote {options.save}")

    networks = {
        "from the DBN": dbn.to_sequential(num_classes=10),
        "from scratch": DBN(64, options.hidden).to(options.device).to_sequential(num_classes=10),
    }
    for name, network in networks.items():
        classify(network, train[: options.labels], labels[: options.labels], options.epochs)
        accuracy = (network(test).argmax(1) == labels[1437:]).float().mean()
        print(f"classifier {name}, {options.labels} labels: {accuracy:.1%} of held-out digits right")


if __name__ == "__main__":
    main()
