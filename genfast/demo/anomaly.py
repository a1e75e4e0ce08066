"""The demo's anomaly detection: a VAE that never saw one of the ten digits scores held-out digits."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console
from torch import Tensor

from genfast.demo.train import Digits, make_vae, train_vae
from genfast.models import VAE

__all__ = ["LEFT_OUT", "Anomalies", "run"]

LEFT_OUT = 9


class Anomalies(NamedTuple):
    """scores: of the test digits, [360]; auroc: of telling the left-out digit by them; untrained: before training."""

    scores: Tensor
    auroc: float
    untrained: float
    seconds: float


def run(digits: Digits, epochs: int, console: Console) -> Anomalies:
    """Trains on the other nine digits, and scores all test digits by -log p(x)."""
    from sklearn.metrics import roc_auc_score

    def scores(vae: VAE) -> Tensor:
        return vae.anomaly_score(digits.test, samples=100, seed=5)

    unseen = digits.test_labels == LEFT_OUT
    before = scores(make_vae())
    others = digits.test[~unseen]
    trained = train_vae(digits.without(LEFT_OUT), others, epochs, console, f"VAE without {LEFT_OUT}s")
    after = scores(trained.model)
    auroc, untrained = (float(roc_auc_score(unseen.numpy(), values.numpy())) for values in (after, before))
    return Anomalies(after, auroc, untrained, trained.seconds)
