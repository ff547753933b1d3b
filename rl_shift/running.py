"""Statistics of a stream: mean and variance over everything, and a detector of sudden rises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class RunningStatistics(nn.Module):
    """Mean and population variance over everything seen so far; saved with the weights.

    Batches are merged exactly (Chan et al., 1979).

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


class Detector:
    """Score of a sudden rise of a stream: its fast average against its slow one. Our design.

    score = (fast - slow) / std,  std: root of the slow average of (fast - slow)^2

    Both averages are exponential and corrected for their start; slow and std are those from before
    the rows that are being judged. There is no score until 1 / slow rows have been seen.

    Args:
        fast: rate of the fast average, per row.
        slow: rate of the slow average, per row.
        threshold: a score that rises above it is a detection.
    """

    def __init__(self, fast: float = 0.01, slow: float = 0.0001, threshold: float = 4.0) -> None:
        self.fast, self.slow, self.threshold = fast, slow, threshold
        self.values: dict[str, Tensor] = {
            name: torch.zeros(())
            for name in ("count", "fast", "slow", "square", "score", "detected")
        }

    def update(self, rows: Tensor, repeats: float = 1.0) -> Tensor:
        """Take in rows (B,) in time order; the score after the last one, ().

        Args:
            rows: the newest part of the stream.
            repeats: how often each row is handed in; it then counts for a part of one.
        """
        old = {k: v.to(rows.device, rows.dtype) for k, v in self.values.items()}
        age = torch.arange(len(rows) - 1, -1, -1, device=rows.device) / repeats
        length = len(rows) / repeats
        count = old["count"] + length

        def averaged(name: str, rate: float, values: Tensor, ages: Tensor) -> Tensor:
            weight = (1 - rate) ** ages
            keep = (1 - rate) ** length
            return old[name] * keep + (1 - keep) * (weight * values).sum() / weight.sum()

        def corrected(value: Tensor, rate: float, count: Tensor) -> Tensor:
            return value / (1 - (1 - rate) ** count).clamp(min=1e-12)

        fast = averaged("fast", self.fast, rows, age)
        baseline = corrected(old["slow"], self.slow, old["count"])
        rise = corrected(fast, self.fast, count) - baseline
        deviation = corrected(old["square"], self.slow, old["count"]).clamp(min=1e-12).sqrt()
        score = torch.where(old["count"] >= 1 / self.slow, rise / deviation, 0.0)
        self.values = {
            "count": count,
            "fast": fast,
            "slow": averaged("slow", self.slow, rows, age),
            "square": averaged("square", self.slow, rise.square(), age[-1:]),
            "score": score,
            "detected": ((score > self.threshold) & (old["score"] <= self.threshold)).to(
                old["score"]
            ),
        }
        return score

    def state(self) -> dict[str, Tensor]:
        """What `load_state` takes back."""
        return dict(self.values)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue where `state` was taken."""
        self.values = dict(state)
