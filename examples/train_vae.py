"""Trains a VAE on 8 x 8 digits: genfast's sampling layer inside an ordinary PyTorch model and training loop.

python examples/train_vae.py --epochs 50 --architecture conv --compile
"""

from __future__ import annotations

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from genfast.nn import Reparameterize


class DigitVAE(nn.Module):
    """Any encoder and decoder; the sampling and its KL divergence are one fused layer."""

    def __init__(self, architecture: str, latent: int) -> None:
        super().__init__()
        if architecture == "mlp":
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2 * latent))
            self.decoder = nn.Sequential(
                nn.Linear(latent, 256), nn.ReLU(), nn.Linear(256, 64), nn.Unflatten(1, (1, 8, 8))
            )
        else:
            self.encoder = nn.Sequential(
                nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 2 * latent)
            )
            self.decoder = nn.Sequential(
                nn.Linear(latent, 512), nn.ReLU(), nn.Unflatten(1, (32, 4, 4)),
                nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
            )  # fmt: skip
        self.reparameterize = Reparameterize(kl=True)

    def forward(self, x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=-1)
        z, kl = self.reparameterize(mu, logvar, seed=seed)
        return self.decoder(z), kl


def negative_elbo(model: nn.Module, x: Tensor, seed: int | None = None) -> Tensor:
    logits, kl = model(x, seed)
    return functional.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x) + kl.mean()


def digits(device: str) -> tuple[Tensor, Tensor]:
    images = torch.tensor(load_digits().images, dtype=torch.float32, device=device).unsqueeze(1)
    images = (images >= 8).float()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:1437]], images[order[1437:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=("mlp", "conv"), default="mlp")
    parser.add_argument("--latent", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile(fullgraph=True)")
    parser.add_argument("--save", help="write the weights here (safetensors)")
    options = parser.parse_args()

    torch.manual_seed(0)
    train, test = digits(options.device)
    model = DigitVAE(options.architecture, options.latent).to(options.device)
    loss_function = torch.compile(negative_elbo, fullgraph=True) if options.compile else negative_elbo
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    start = time.perf_counter()
    for epoch in range(1, options.epochs + 1):
        for batch in torch.randperm(len(train), device=options.device).split(options.batch):
            optimizer.zero_grad()
            loss_function(model, train[batch]).backward()
            optimizer.step()
        if epoch == 1 or epoch % 10 == 0 or epoch == options.epochs:
            with torch.no_grad():
                elbo = -negative_elbo(model, test, seed=1)
            print(f"epoch {epoch:4d}   held-out ELBO {elbo:8.2f} nats   {time.perf_counter() - start:6.1f} s")
    if options.save:
        from safetensors.torch import save_model

        save_model(model, options.save)
        print(f"wrote {options.save}")


if __name__ == "__main__":
    main()
