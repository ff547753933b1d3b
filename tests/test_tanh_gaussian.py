"""The exact oracle of CDSA: closed-form scores of tanh-Gaussian behaviour policies (O1 to O6)."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from rl_shift import tanh_gaussian
from rl_shift.agents.cdsa import CDSA
from rl_shift.errors import UserError
from rl_shift.score import correct_action, geometric_levels, nearest_level

Floats = np.ndarray[Any, np.dtype[np.float64]]


def drawn(rows: int, std: tuple[float, float] = (0.1, 1.6)) -> tuple[Floats, Floats, Floats]:
    """Means, deviations and actions of their densities, (rows, 3) each."""
    rng = np.random.default_rng(0)
    mean = rng.normal(0, 1, (rows, 3))
    deviation = rng.uniform(*std, (rows, 3))
    action = np.tanh(mean + deviation * rng.normal(size=(rows, 3)))
    return np.clip(action, -0.999, 0.999), mean, deviation


def numerical(function: Any, action: Floats, step: float) -> Floats:
    """Central differences in each dimension, (rows, 3)."""
    columns = []
    for j in range(action.shape[-1]):
        shift = np.zeros(action.shape[-1])
        shift[j] = step
        columns.append((function(action + shift) - function(action - shift)) / (2 * step))
    return np.stack(columns, -1)


def single_policy_sets(folder: Path) -> list[Path]:
    found = sorted((folder / "datasets").glob("*-regen50k.hdf5"))
    return [path for path in found if "medium" in path.name or "expert" in path.name]


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Real single-policy sets; skips where `$RL_SHIFT_DATA` has none."""
    import os

    places = [Path(p) for p in os.environ.get("RL_SHIFT_DATA", "").split(os.pathsep) if p]
    found = [path for place in places for path in single_policy_sets(place)]
    if not found:
        pytest.skip("RL_SHIFT_DATA names no folder with datasets/*-medium-regen50k.hdf5")
    return found


def rows_of(path: Path, rows: slice) -> dict[str, Floats]:
    with h5py.File(path) as file:
        keys = ("observations", "actions", "infos/action_log_probs")
        return {key: np.asarray(file[key][rows], np.float64) for key in keys}


def test_o1_recomputed_densities_are_those_of_the_file(files: list[Path]) -> None:
    for path in files:
        data = rows_of(path, slice(0, 20_000, 4))
        known = tanh_gaussian.moments(tanh_gaussian.behaviour_policy(path), data["observations"])
        found = tanh_gaussian.log_density(data["actions"], *known)
        off = np.abs(found - data["infos/action_log_probs"])
        assert np.median(off) <= 2e-4, path
        assert np.quantile(off, 0.95) <= 1e-3, path


def test_o2_closed_form_is_the_derivative_of_the_density() -> None:
    action, mean, std = drawn(200)
    by_hand = numerical(lambda a: tanh_gaussian.log_density(a, mean, std), action, 1e-7)
    found = tanh_gaussian.score(action, mean, std)
    assert (np.abs(found - by_hand) <= 1e-5 * np.abs(found) + 1e-4).all()
    inside = np.abs(action).max(-1) < 0.95
    wide = numerical(lambda a: tanh_gaussian.log_density(a, mean, std), action, 1e-5)
    relative = np.abs(found - wide) / (1 + np.abs(found))
    assert relative[inside].max() < 1e-5


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5])
def test_o3_smoothed_score_is_the_derivative_of_the_smoothed_density(sigma: float) -> None:
    action, mean, std = drawn(100)
    action = action + sigma * np.random.default_rng(1).normal(size=action.shape)
    by_hand = numerical(
        lambda a: tanh_gaussian.smoothed_log_density(a, mean, std, sigma), action, 1e-5
    )
    found = tanh_gaussian.smoothed_score(action, mean, std, sigma)
    assert np.abs(sigma * (found - by_hand)).max() < 1e-6


def test_o4_smoothing_vanishes_with_sigma() -> None:
    action, mean, std = drawn(30, (0.1, 1.0))
    inside = np.abs(action).max(-1) <= 0.9
    action, mean, std = action[inside], mean[inside], std[inside]
    exact = tanh_gaussian.score(action, mean, std)
    smooth = tanh_gaussian.smoothed_score(action, mean, std, 1e-3, nodes=200_001)
    assert len(action) > 5
    assert (np.abs(smooth - exact) / (1 + np.abs(exact))).max() <= 0.01


class Oracle:
    """The exact conditional score as a denoiser; `obs` holds means and deviations."""

    state_scale = 0.5

    def __init__(self, sigmas: tuple[float, ...]) -> None:
        self.sigmas = torch.tensor(sigmas, dtype=torch.float64)

    def __call__(self, obs: Tensor, action: Tensor, level: int) -> tuple[Tensor, Tensor]:
        mean, std = obs.numpy()[:, :3], obs.numpy()[:, 3:]
        sigma = float(self.sigmas[level])
        found = tanh_gaussian.smoothed_score(action.numpy(), mean, std, sigma, nodes=1001)
        return torch.zeros_like(obs), -sigma * torch.from_numpy(found)


def test_o6_correcting_a_perturbed_action_raises_its_exact_density(files: list[Path]) -> None:
    path = next(path for path in files if "hopper-medium" in path.name)
    data = rows_of(path, slice(45_000, 50_000, 10))
    mean, std = tanh_gaussian.moments(tanh_gaussian.behaviour_policy(path), data["observations"])
    noise = 0.3 * np.random.default_rng(0).normal(size=data["actions"].shape)
    perturbed = np.clip(data["actions"] + noise, -1, 1)
    c = CDSA.Config()
    sigmas = geometric_levels(c.sigma_min, c.sigma_max, c.level_count)
    levels = [nearest_level(sigmas, sigma) for sigma in c.steps]
    known = torch.from_numpy(np.concatenate([mean, std], -1))
    start = torch.from_numpy(perturbed)
    moved = correct_action(Oracle(sigmas), known, start, levels, c.eta_action).numpy()
    before, after = (tanh_gaussian.log_density(a, mean, std) for a in (perturbed, moved))
    assert (after > before).mean() >= 0.97


def test_data_of_several_policies_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "mixed.hdf5", "w") as file:
        file["actions"] = np.zeros((3, 2))
    with pytest.raises(UserError, match="one tanh-Gaussian policy"):
        tanh_gaussian.behaviour_policy(tmp_path / "mixed.hdf5")
