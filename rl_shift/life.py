"""What a lane-long life earned, kept in points of a fixed number of environment steps. Our design.

`metrics.jsonl` holds what was logged when it fell due; lifelong metrics need every reward, so the
collector adds each of them to the point it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Life:
    """Mean extrinsic reward per environment step and the regime of the shift, point by point.

    Args:
        every: environment steps per point, all lanes together; a point holds at least one step of
            every lane.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.reward: list[float] = []
        self.regime: list[int] = []
        self._sum, self._count = 0.0, 0

    def add(self, reward: NDArray[Any], infos: Mapping[str, Any]) -> None:
        """One vector step: rewards (N,) as the environment gave them, and its infos."""
        if self._count == 0:
            shift = infos.get("shift")
            self.regime.append(0 if shift is None else int(shift["regime"][0]))
        self._sum += float(reward.sum())
        self._count += len(reward)
        if self._count >= self.every:
            self.reward.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0

    def rows(self, lanes: int) -> dict[str, Any]:
        """The finished points: `steps` each, mean `reward` and `regime` at their first step."""
        steps = -(-self.every // lanes) * lanes
        regime = self.regime[: len(self.reward)]
        return {"steps": steps, "reward": [round(r, 6) for r in self.reward], "regime": regime}

    def state(self) -> dict[str, Any]:
        """Everything, for the checkpoint."""
        import torch

        return {
            "reward": torch.tensor(self.reward, dtype=torch.float64),
            "regime": torch.tensor(self.regime, dtype=torch.int64),
            "sum": self._sum,
            "count": self._count,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self.reward, self.regime = state["reward"].tolist(), state["regime"].tolist()
        self._sum, self._count = float(state["sum"]), int(state["count"])


def phases(regime: NDArray[np.int64]) -> list[tuple[int, int]]:
    """First and one past the last point of every phase, (T,) regimes -> pairs."""
    cuts = [0, *(np.flatnonzero(np.diff(regime)) + 1).tolist(), len(regime)]
    return list(zip(cuts[:-1], cuts[1:], strict=True)) if len(regime) else []
