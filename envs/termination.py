"""When Gymnasium's locomotion tasks end, as functions of tensors: what learnt models cannot say.

The rules of hopper and walker2d at their defaults (OfflineRL-Kit states the same); the cheetah's
episodes never end by themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Termination = Callable[[Tensor, Tensor, Tensor], Tensor]


def hopper(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    """Fallen, tilted, or no longer finite, (B, ...) -> (B,) bool."""
    healthy = next_obs.isfinite().all(-1) & (next_obs[..., 1:].abs() < 100).all(-1)
    return ~(healthy & (next_obs[..., 0] > 0.7) & (next_obs[..., 1].abs() < 0.2))


def walker2d(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    """Too low, too high, or tilted, (B, ...) -> (B,) bool."""
    height, angle = next_obs[..., 0], next_obs[..., 1]
    return ~((height > 0.8) & (height < 2.0) & (angle.abs() < 1.0))


def halfcheetah(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    """Never, (B,) bool."""
    return torch.zeros_like(next_obs[..., 0], dtype=torch.bool)


KNOWN: dict[str, Termination] = {
    "Hopper": hopper,
    "Walker2d": walker2d,
    "HalfCheetah": halfcheetah,
}


def of(env_id: str | None) -> Termination | None:
    """The rule of a Gymnasium id of any version, None where we know of none."""
    return KNOWN.get((env_id or "").partition("-")[0])
