"""The noise as opaque ops, for formulas that a compiler traces: Philox in plain torch takes it minutes."""

from __future__ import annotations

import torch

from genfast import random
from genfast._op import Backend, Op

__all__ = ["normal", "rbm_normal", "rbm_uniform", "uniform"]

normal = Op(
    "philox_normal(Tensor seed, SymInt count, SymInt offset, SymInt step) -> Tensor",
    {"reference": Backend(lambda seed, count, offset, step: random.normal(count, seed, offset=offset, step=step))},
    lambda seed, count, offset, step: seed.new_empty(count, dtype=torch.float64),
    internal=True,
)
uniform = Op(
    "philox_uniform(Tensor seed, SymInt count, SymInt offset, SymInt step) -> Tensor",
    {"reference": Backend(lambda seed, count, offset, step: random.uniform(count, seed, offset=offset, step=step))},
    lambda seed, count, offset, step: seed.new_empty(count, dtype=torch.float32),
    internal=True,
)
rbm_uniform = Op(
    "philox_rbm_uniform(Tensor seed, SymInt chains, SymInt units, SymInt row_offset, SymInt col_offset, SymInt step) "
    "-> Tensor",
    {
        "reference": Backend(
            lambda seed, chains, units, row_offset, col_offset, step: random.rbm_uniform(
                chains, units, seed, row_offset=row_offset, col_offset=col_offset, step=step
            )
        )
    },
    lambda seed, chains, units, *_: seed.new_empty((chains, units), dtype=torch.float32),
    internal=True,
)
rbm_normal = Op(
    "philox_rbm_normal(Tensor seed, SymInt chains, SymInt units, SymInt row_offset, SymInt col_offset, SymInt step) "
    "-> Tensor",
    {
        "reference": Backend(
            lambda seed, chains, units, row_offset, col_offset, step: random.rbm_normal(
                chains, units, seed, row_offset=row_offset, col_offset=col_offset, step=step
            )
        )
    },
    lambda seed, chains, units, *_: seed.new_empty((chains, units), dtype=torch.float64),
    internal=True,
)
