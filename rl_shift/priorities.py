"""Priorities of the rows of a ring, with draws in proportion to them (Schaul et al., 2015).

Two levels instead of a tree: block sums, and the rows of a block. A draw searches the cumulated
block sums, then the cumulated rows of one block; sums are recomputed from the rows they cover, so
they never drift. Our design.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Priorities:
    """Non-negative weights of `capacity` rows, 0 until they are set."""

    def __init__(self, capacity: int, device: torch.device | str = "cpu") -> None:
        self.block = max(1, math.isqrt(capacity))
        blocks = -(-capacity // self.block)
        self.rows = torch.zeros(blocks, self.block, dtype=torch.float64, device=device)
        self.sums = torch.zeros(blocks, dtype=torch.float64, device=device)
        self.largest = torch.ones((), dtype=torch.float64, device=device)  # so far, 1 at least

    def set(self, index: Tensor, priority: Tensor) -> None:
        """Give rows (n,) int64 their priorities, (n,) or a scalar."""
        block = index // self.block
        self.rows[block, index % self.block] = priority.to(self.rows.dtype)
        self.sums[block] = self.rows[block].sum(-1)
        self.largest = torch.maximum(self.largest, priority.max().to(self.rows.dtype))

    def state(self) -> dict[str, Tensor]:
        """What `restored` needs."""
        return {"rows": self.rows, "largest": self.largest}

    @classmethod
    def restored(cls, state: dict[str, Tensor], device: torch.device | str = "cpu") -> Priorities:
        """The priorities that `state` was taken of."""
        rows = state["rows"].to(device)
        found = cls(rows.numel(), device)
        found.block, found.rows, found.sums = rows.shape[1], rows, rows.sum(-1)
        found.largest = state["largest"].to(device)
        return found

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Rows (n,) int64 in proportion to their priorities, and their probabilities (n,)."""
        cumulated = self.sums.cumsum(0)
        total = cumulated[-1]
        point = torch.rand(n, dtype=torch.float64, device=self.sums.device) * total
        block = torch.searchsorted(cumulated, point, right=True).clamp(max=len(self.sums) - 1)
        inside = self.rows[block]
        rest = (point - cumulated[block] + self.sums[block])[:, None]
        column = torch.searchsorted(inside.cumsum(-1), rest, right=True)
        # rounding may point behind the last row that has a priority
        last = torch.arange(self.block, device=inside.device) * (inside > 0)
        column = torch.minimum(column, last.amax(-1, keepdim=True))
        chosen = inside.gather(-1, column).squeeze(-1)
        return block * self.block + column.squeeze(-1), chosen / total
