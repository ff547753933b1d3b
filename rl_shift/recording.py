"""Roll policies out and write the transitions as an HDF5 file in D4RL's v2 layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rl_shift import __version__, atomic
from rl_shift.dataset_table import reference_scores_of
from rl_shift.envs import make_env
from rl_shift.errors import UserError
from rl_shift.policies import Policy, TanhGaussianPolicy, load_policy
from rl_shift.seeding import child, forked

Arrays = dict[str, np.ndarray]


@dataclass
class _Episode:
    """One episode in the making: a list per column, packed into arrays when it ends."""

    number: int
    generator: np.random.Generator
    rows: dict[str, list[Any]] = field(default_factory=dict)
    columns: Arrays = field(default_factory=dict)
    length: int = 0

    def add(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            self.rows.setdefault(key, []).append(value)
        self.length += 1

    def pack(self) -> None:
        """Lists to arrays; simulators compute in float64, the file holds float32."""
        for key, values in self.rows.items():
            column = np.asarray(values)
            wide = column.dtype == np.float64
            self.columns[key] = column.astype(np.float32) if wide else column
        self.rows = {}


def record(
    policies: Sequence[str | Path],
    env_id: str,
    steps: int,
    out: str | Path,
    noise: float = 0.0,
    seed: int = 0,
    *,
    lanes: int = 16,
    origin: str = "recorded by rl-shift data collect",
    reference_scores: tuple[float, float] | None = None,
    compression: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Rolls out `policies`, which share the steps evenly, and writes one D4RL v2 file.

    Episode i of a policy has seeds of its own and episodes are written in that order, so the file
    has no bias towards short episodes. Each policy's last episode is cut where its share ends and
    flagged as a timeout. Equal arguments give an equal file on the same machine.

    Args:
        policies: "random", npz files of the Deep OPE layout, or run folders; a run that observes
            the environment's goal too (its `context`) is told it.
        env_id: a Gymnasium id; actions are recorded in [-1, 1].
        steps: transitions in all.
        out: the file to write; an existing one is replaced.
        noise: standard deviation of Gaussian noise added to actions, which are then clipped.
        seed: seeds environments and noise.
        lanes: environments stepped side by side by one batched forward pass.
        origin: where the data comes from, kept in the file.
        reference_scores: (random, expert) returns kept in the file; by default the family's.
        compression: an HDF5 filter such as "gzip"; by default none, which loads fastest.
        progress: called with the number of transitions gathered so far.
    """
    out = Path(out)
    if steps < len(policies) or not policies:
        raise UserError(f"--steps {steps} is too small for {len(policies)} policies; raise it")
    if noise < 0:
        raise UserError(f"--noise {noise} is negative; give a standard deviation")
    atomic.check_writable(Path(out), "choose another --out")
    envs = [make_env(env_id) for _ in range(lanes)]
    context = getattr(envs[0].unwrapped, "context", None)
    loaded = [load_policy(policy, *_widths(envs[0], env_id), context) for policy in policies]
    shares = [steps // len(loaded) + (k < steps % len(loaded)) for k in range(len(loaded))]
    parts: list[Arrays] = []
    for k, (policy, share) in enumerate(zip(loaded, shares, strict=True)):
        before = sum(shares[:k])
        report = None if progress is None else lambda n, b=before: progress(b + n)
        stream = child(seed, "record", k)
        with forked(stream):  # the noise of trained agents comes from torch's own generator
            parts.append(_rollout(policy, envs, share, noise, stream, report))
    for env in envs:
        env.close()
    common = set.intersection(*(set(part) for part in parts))
    arrays = {
        key: np.concatenate([part[key] for part in parts]) for key in parts[0] if key in common
    }
    spec = envs[0].spec
    attributes: dict[str, Any] = {
        "env_id": env_id,
        "origin": origin,
        "policies": [policy.name for policy in loaded],
        "steps_per_policy": shares,
        "noise": noise,
        "seed": seed,
        "lanes": lanes,
        "rl_shift": __version__,
    }
    if spec is not None and spec.max_episode_steps is not None:
        attributes["horizon"] = spec.max_episode_steps
    scores = reference_scores or reference_scores_of(env_id)
    if scores is not None:
        attributes["reference_min"], attributes["reference_max"] = scores
    if len(loaded) == 1 and isinstance(loaded[0], TanhGaussianPolicy):
        arrays |= _density(loaded[0])
    return write_hdf5(out, arrays, attributes, compression)


def write_hdf5(
    path: str | Path,
    arrays: Mapping[str, Any],
    attributes: Mapping[str, Any],
    compression: str | None = None,
) -> Path:
    """Writes arrays (key names may contain "/") and file attributes under a temporary name."""
    import h5py

    path = Path(path)
    try:
        with (
            atomic.replacing(path, "choose another --out") as partial,
            h5py.File(partial, "w") as file,
        ):
            for key, value in arrays.items():
                filters = {"compression": compression} if np.ndim(value) else {}
                file.create_dataset(key, data=value, **filters)
            for key, value in attributes.items():
                file.attrs[key] = value
    except ValueError as error:  # an unknown compression
        raise UserError(f"cannot write {path}: {error}; choose another") from error
    return path


def _rollout(
    policy: Policy,
    envs: list[gymnasium.Env[Any, Any]],
    steps: int,
    noise: float,
    seed: int,
    progress: Callable[[int], None] | None,
) -> Arrays:
    """`steps` transitions of one policy as whole episodes in the order of their numbers."""
    lanes = len(envs)
    episodes: list[_Episode] = []
    running: list[_Episode | None] = [None] * lanes
    obs = np.zeros((lanes, *_shape(envs[0])), dtype=envs[0].observation_space.dtype)
    draws = np.zeros((lanes, policy.noise_width))
    gathered = 0

    def start(lane: int) -> None:
        """Gives a free lane the next episode, unless those under way already cover the share."""
        if gathered >= steps:
            running[lane] = None
            return
        number = len(episodes)
        episode_seed = child(seed, "episode", number)
        generator = np.random.default_rng(child(seed, "action", number))
        episodes.append(_Episode(number, generator))
        running[lane] = episodes[-1]
        obs[lane] = envs[lane].reset(seed=episode_seed)[0]

    for lane in range(lanes):
        start(lane)
    simulators = [_simulator(env) for env in envs]
    draw = np.random.Generator.random if policy.uniform else np.random.Generator.standard_normal
    while any(episode is not None for episode in running):
        for lane, episode in enumerate(running):
            if episode is not None and policy.noise_width:
                draws[lane] = draw(episode.generator, policy.noise_width)
        actions, log_density = policy.act(obs, draws)
        for lane, episode in enumerate(running):
            if episode is None:
                continue
            action = actions[lane]
            row: dict[str, Any] = {"observations": obs[lane].copy()}
            if noise:
                added = noise * episode.generator.standard_normal(action.shape)
                action = np.clip(action + added, -1, 1).astype(np.float32)
            elif log_density is not None:
                row["infos/action_log_probs"] = log_density[lane]
            if simulators[lane] is not None:
                row["infos/qpos"] = simulators[lane].qpos.copy()
                row["infos/qvel"] = simulators[lane].qvel.copy()
            after, reward, terminated, truncated, _ = envs[lane].step(action)
            row |= {"actions": action, "rewards": float(reward), "next_observations": after}
            row |= {"terminals": terminated, "timeouts": truncated and not terminated}
            episode.add(row)
            obs[lane] = after
            gathered += 1
            if terminated or truncated:
                episode.pack()
                start(lane)
        if gathered >= steps:
            _drop_surplus(episodes, running, steps)
        if progress is not None:
            progress(min(gathered, steps))
    return _joined(episodes, steps)


def _drop_surplus(episodes: list[_Episode], running: list[_Episode | None], steps: int) -> None:
    """Frees the lanes that have gone beyond the share, counted in the order of the episodes."""
    ends = np.cumsum([episode.length for episode in episodes])
    last = int(np.searchsorted(ends, steps))  # the episode that fills the share, once it has
    filled = last < len(episodes)
    for lane, episode in enumerate(running):
        if episode is not None and filled and episode.number >= last:
            running[lane] = None


def _joined(episodes: list[_Episode], steps: int) -> Arrays:
    """Columns of the first `steps` rows; the cut episode ends in a timeout."""
    for episode in episodes:
        if episode.rows:
            episode.pack()
    # The last ones may have been freed before their first step.
    begun = [episode for episode in episodes if episode.length]
    columns = {
        key: np.concatenate([episode.columns[key] for episode in begun])[:steps]
        for key in episodes[0].columns
    }
    columns["timeouts"][-1] = not columns["terminals"][-1]
    return columns


def _widths(env: gymnasium.Env[Any, Any], env_id: str) -> tuple[int, int]:
    if not isinstance(env.action_space, spaces.Box) or len(_shape(env)) != 1:
        raise UserError(
            f"environment {env_id!r} has observations {env.observation_space} and actions "
            f"{env.action_space}; only flat observations and continuous actions can be recorded"
        )
    return _shape(env)[0], int(np.prod(env.action_space.shape))


def _shape(env: gymnasium.Env[Any, Any]) -> tuple[int, ...]:
    assert env.observation_space.shape is not None
    return env.observation_space.shape


def _simulator(env: gymnasium.Env[Any, Any]) -> Any:
    """MuJoCo's data where there is one: its qpos and qvel belong to the current observation."""
    data = getattr(env.unwrapped, "data", None)
    return data if hasattr(data, "qpos") and hasattr(data, "qvel") else None


def _density(policy: TanhGaussianPolicy) -> dict[str, Any]:
    """The behaviour policy itself, as D4RL v2 keeps it: the exact density of the actions."""
    arrays: dict[str, Any] = {
        f"metadata/policy/{key.replace('.', '/')}": weight for key, weight in policy.weights.items()
    }
    arrays["metadata/policy/nonlinearity"] = "relu"
    arrays["metadata/policy/output_distribution"] = "tanh_gaussian"
    arrays["metadata/algorithm"] = "SAC"
    return arrays
