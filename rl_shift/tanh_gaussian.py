"""The exact action density of tanh-Gaussian behaviour policies, and its gradient, in float64.

a = tanh(u), u ~ N(mean, std^2) per dimension. A dataset that one such policy collected stores its
network under `metadata/policy`, so what a score model should have learnt is known.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rl_shift.errors import UserError
from rl_shift.policies import TanhGaussianPolicy

Floats = NDArray[np.float64]
EDGE = 1 - 1e-6  # the density is evaluated no nearer to the box's edge


def behaviour_policy(path: str | Path) -> TanhGaussianPolicy:
    """The policy that collected a dataset, out of its file.

    Raises:
        UserError: if the file holds none, as sets of several policies do.
    """
    import h5py

    layers = ("fc0", "fc1", "last_fc", "last_fc_log_std")
    with h5py.File(path, "r") as file:
        if any(f"metadata/policy/{layer}/weight" not in file for layer in layers):
            raise UserError(
                f"{path} holds no policy under metadata/policy: the exact density is known only "
                "for data that one tanh-Gaussian policy collected (medium or expert sets)"
            )
        weights = {
            f"{layer}.{part}": np.asarray(file[f"metadata/policy/{layer}/{part}"], np.float32)
            for layer in layers
            for part in ("weight", "bias")
        }
    return TanhGaussianPolicy(weights, Path(path).stem)


def moments(policy: TanhGaussianPolicy, obs: ArrayLike) -> tuple[Floats, Floats]:
    """Mean and standard deviation before the tanh at raw (B, obs), (B, action) each."""
    mean, log_std = policy.distribution(np.asarray(obs, np.float64))
    return np.asarray(mean, np.float64), np.exp(np.asarray(log_std, np.float64))


def log_density(action: ArrayLike, mean: Floats, std: Floats) -> Floats:
    """The log-density log p(a|s) of (B, action) in (-1, 1), (B,)."""
    a = np.clip(np.asarray(action, np.float64), -EDGE, EDGE)
    z = (np.arctanh(a) - mean) / std
    terms = -0.5 * z**2 - np.log(std) - 0.5 * np.log(2 * np.pi) - np.log1p(-(a**2))
    return np.asarray(terms.sum(-1))


def score(action: ArrayLike, mean: Floats, std: Floats) -> Floats:
    """Gradient of `log_density` with respect to the action, (B, action); huge near the edge."""
    a = np.clip(np.asarray(action, np.float64), -EDGE, EDGE)
    return np.asarray((2 * a - (np.arctanh(a) - mean) / std**2) / (1 - a**2))


def smoothed_score(
    action: ArrayLike, mean: Floats, std: Floats, sigma: float, nodes: int = 4001
) -> Floats:
    """Gradient of the log-density of a + N(0, sigma^2 I), (B, action).

    Dimensions are independent given the state: (E_w[tanh u] - a) / sigma^2 in each, with weights
    w(u) ~ exp(-((u - mean)/std)^2 / 2 - ((a - tanh u)/sigma)^2 / 2) on a uniform grid within 8 std.
    The grid's step in tanh u must lie well below sigma: 4001 nodes serve sigma >= 0.02 and std up
    to 1.6.
    """
    a = np.asarray(action, np.float64)
    grid = np.linspace(-8.0, 8.0, nodes)
    found = np.empty_like(a)
    block = max(1, 2**21 // (nodes * a.shape[-1]))  # rows whose grids are held at a time
    for at in range(0, len(a), block):
        rows = slice(at, at + block)
        value = np.tanh(mean[rows, :, None] + std[rows, :, None] * grid)
        logits = -0.5 * grid**2 - 0.5 * ((a[rows, :, None] - value) / sigma) ** 2
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        found[rows] = (weight * value).sum(-1) / weight.sum(-1)
    return np.asarray((found - a) / sigma**2)


def smoothed_log_density(
    action: ArrayLike, mean: Floats, std: Floats, sigma: float, nodes: int = 4001
) -> Floats:
    """The log-density that `smoothed_score` differentiates, up to a constant, (B,)."""
    a = np.asarray(action, np.float64)[..., None]
    grid = np.linspace(-8.0, 8.0, nodes)
    value = np.tanh(mean[..., None] + std[..., None] * grid)
    logits = -0.5 * grid**2 - 0.5 * ((a - value) / sigma) ** 2
    top = logits.max(-1, keepdims=True)
    return np.asarray((np.log(np.exp(logits - top).sum(-1)) + top[..., 0]).sum(-1))
