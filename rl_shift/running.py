"""Running mean and variance of a stream, merged exactly batch by batch (Chan et al.)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RunningStatistics(nn.Module):
    """Mean and population variance over everything seen so far; saved with the weights.

    Args:
        shape: of one row.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, shape: Sequence[int] = ()) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(tuple(shape)))
        self.register_buffer("variance", torch.ones(tuple(shape)))

    @property
    def std(self) -> Tensor:
        """Standard deviation; 1 before the first row."""
        return self.variance.sqrt()

    def update(self, rows: Tensor) -> None:
        """Take in rows (B, *shape)."""
        added = float(rows.shape[0])
        with torch.no_grad():
            total = self.count + added
            difference = rows.mean(0) - self.mean
            spread = self.count * self.variance + added * rows.var(0, correction=0)
            spread = spread + difference.square() * self.count * added / total
            self.mean += difference * added / total
            self.variance.copy_(spread / total)
            self.count.copy_(total)
