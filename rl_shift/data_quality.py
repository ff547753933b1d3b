"""What a dataset is like: returns, lengths, coverage, and how learnable its actions are.

Action variance and state similarity are the proxies that Belkhale, Cui and Sadigh, "Data Quality in
Imitation Learning" (2023), name for action divergence and for state coverage; transition diversity
is their second lever. The formulas are ours. Distances are Euclidean in observations (and actions)
that are normalised over all datasets that are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from rl_shift import datasets, seeding
from rl_shift.errors import UserError

Floats = NDArray[np.float64]
CELLS = 20  # of the map of states along each principal axis
_BLOCK = 200  # queries at a time: their distances to all rows are in memory


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on.

    Attributes:
        rows: of each dataset that are looked at, drawn at random.
        queries: of these, the states whose neighbours are looked at.
        k: neighbours, from other episodes.
        radius: of state similarity, in standard deviations.
        seed: of the draws.
    """

    rows: int = 20_000
    queries: int = 1500
    k: int = 20
    radius: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Quality:
    """One dataset.

    Attributes:
        id: its name.
        returns: (E,) undiscounted, of its episodes.
        lengths: (E,) steps of its episodes.
        transitions: in all.
        action_variance: E trace Cov(a of the k nearest states of other episodes); low: the action
            follows from the state, so that cloning it is easy.
        state_similarity: mean share of the other episodes' states within the radius.
        transition_diversity: E |s' - mean s' of the k nearest (s, a) of other episodes|^2.
        coverage: share of the cells of the common map of states that hold a row.
        map: (CELLS, CELLS) rows in each cell.
        score: D4RL-normalised mean return, where references are known.
    """

    id: str
    returns: Floats
    lengths: NDArray[np.int64]
    transitions: int
    action_variance: float
    state_similarity: float
    transition_diversity: float
    coverage: float
    map: Floats
    score: float | None


@dataclass(frozen=True)
class _Rows:
    obs: Floats
    action: Floats
    next_obs: Floats
    episode: NDArray[np.int64]


def qualities(ids: Sequence[str], settings: Settings = Settings()) -> list[Quality]:  # noqa: B008
    """Every dataset, on the scales and on the map that they have in common.

    Raises:
        UserError: a dataset of images, of discrete actions or of other widths than the first.
    """
    loaded = [datasets.load(id) for id in ids]
    for id, arrays in zip(ids, loaded, strict=True):
        if arrays["obs"].ndim != 2 or arrays["action"].ndim != 2:
            raise UserError(f"{id}: only vectors of numbers are described, not images or choices")
        for key in ("obs", "action"):
            if arrays[key].shape[1] != loaded[0][key].shape[1]:
                raise UserError(
                    f"{id} has an {key} of {arrays[key].shape[1]} numbers, {ids[0]} of "
                    f"{loaded[0][key].shape[1]}: compare datasets of one environment"
                )
    drawn = [_drawn(arrays, settings) for arrays in loaded]
    every = np.concatenate([part.obs for part in drawn])
    acted = np.concatenate([part.action for part in drawn])
    centre, scale = every.mean(axis=0), every.std(axis=0) + 1e-6
    spread = acted.std(axis=0) + 1e-6
    whole = (every - centre) / scale
    axes = np.linalg.eigh(np.cov(whole, rowvar=False).reshape(len(scale), -1))[1].T[::-1][:2]
    if len(axes) < 2:
        axes = np.concatenate([axes, np.zeros_like(axes)])  # one number makes a line, not a map
    seen = whole @ axes.T
    bounds = np.quantile(seen, [0.001, 0.999], axis=0)
    edges = [np.linspace(low, max(high, low + 1e-6), CELLS + 1) for low, high in bounds.T]
    made = []
    for id, arrays, rows in zip(ids, loaded, drawn, strict=True):
        unit = _Rows(
            (rows.obs - centre) / scale,
            rows.action / spread,
            (rows.next_obs - centre) / scale,
            rows.episode,
        )
        places = unit.obs @ axes.T
        inside = [np.clip(places[:, k], edges[k][0], edges[k][-1]) for k in range(2)]
        counts = np.histogram2d(inside[0], inside[1], bins=[edges[0], edges[1]])[0]
        returns = datasets.episode_returns(arrays)
        info = datasets.resolve(id)
        made.append(
            Quality(
                id=info.id,
                returns=returns,
                lengths=np.diff(datasets.episode_ends(arrays), prepend=-1),
                transitions=len(arrays["reward"]),
                action_variance=_action_variance(unit, rows.action, settings),
                state_similarity=_state_similarity(unit, settings),
                transition_diversity=_transition_diversity(unit, settings),
                coverage=float((counts > 0).mean()),
                map=counts,
                score=_score(info, float(returns.mean())),
            )
        )
    return made


def _drawn(arrays: datasets.Arrays, settings: Settings) -> _Rows:
    """Rows at random, in float64; not terminated ones, whose successor may be a placeholder."""
    ends = datasets.episode_ends(arrays)
    episode = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=-1))
    generator = seeding.numpy_generator(settings.seed, "quality")
    pool = np.flatnonzero(~arrays["terminated"])
    if len(pool) < settings.k + 2:
        raise UserError(f"a dataset of {len(arrays['reward'])} rows is too small to be described")
    chosen = generator.permutation(pool)[: settings.rows]
    obs, action, next_obs = (
        arrays[key][chosen].astype(np.float64) for key in ("obs", "action", "next_obs")
    )
    return _Rows(obs, action, next_obs, episode[chosen])


def _neighbours(
    points: Floats, episode: NDArray[np.int64], settings: Settings
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Query rows (Q,) and the (Q, k) rows nearest to them, none of the same episode."""
    queries, found = [], []
    for block in _blocks(len(points), settings):
        distance = cdist(points[block], points, "sqeuclidean")
        distance[episode[block, None] == episode] = np.inf
        nearest = np.argpartition(distance, settings.k - 1, axis=1)[:, : settings.k]
        fine = np.isfinite(np.take_along_axis(distance, nearest, axis=1)).all(axis=1)
        queries.append(np.arange(block.start, block.stop)[fine])
        found.append(nearest[fine])
    if not sum(map(len, queries)):
        raise UserError(
            f"no state has {settings.k} neighbours in other episodes: give a dataset of more "
            "episodes, or a smaller --k"
        )
    return np.concatenate(queries), np.concatenate(found)


def _blocks(rows: int, settings: Settings) -> list[slice]:
    last = min(settings.queries, rows)
    return [slice(start, min(start + _BLOCK, last)) for start in range(0, last, _BLOCK)]


def _action_variance(rows: _Rows, action: Floats, settings: Settings) -> float:
    """In the actions' own units."""
    _, nearest = _neighbours(rows.obs, rows.episode, settings)
    return float(action[nearest].var(axis=1).sum(axis=-1).mean())


def _transition_diversity(rows: _Rows, settings: Settings) -> float:
    both = np.concatenate([rows.obs, rows.action], axis=1)
    queries, nearest = _neighbours(both, rows.episode, settings)
    centre = rows.next_obs[nearest].mean(axis=1)
    return float(np.square(rows.next_obs[queries] - centre).sum(axis=1).mean())


def _state_similarity(rows: _Rows, settings: Settings) -> float:
    shares = []
    for block in _blocks(len(rows.obs), settings):
        other = rows.episode[block, None] != rows.episode
        near = cdist(rows.obs[block], rows.obs) <= settings.radius
        shares.append((near & other).sum(axis=1) / np.maximum(other.sum(axis=1), 1))
    return float(np.concatenate(shares).mean())


def _score(info: datasets.DatasetInfo, mean: float) -> float | None:
    from rl_shift.evaluation import normalized_score

    if info.reference_scores is None:
        return None
    return float(normalized_score(mean, *info.reference_scores))
