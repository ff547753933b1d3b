"""Which rows of a dataset to keep: model-based experience selection (MBES) and its rivals.

Every selector returns row numbers in order of priority: a smaller memory is a prefix. MBES (OER,
arXiv 2305.13804, known to us by its abstract) rolls the learnt policy out in a learnt model and
keeps the real rows nearest to what it visits; the procedure here is our design. Selections work in
steps and can be saved in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rl_shift.buffer import Batch, Buffer
from rl_shift.errors import UserError
from rl_shift.nearest import Nearest

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]
_BLOCK = 2**15  # rows given to a network at once
_VISITS = 20_000  # rows that all roll-outs together visit at most, or as many as are kept
_POOL = 20_000  # rows that greedy selectors look at, at least 4 times the budget


@dataclass(frozen=True)
class Sources:
    """What selectors may look at.

    Attributes:
        data: the finished task's dataset, flat.
        policy: (n, obs) raw -> (n, action), the policy that shall be remembered.
        model: (n, obs), (n, action), (n,) int64 members -> (n, obs) mean next observations.
        members: how many members of the model may be drawn.
        surprise: batch -> (n,) absolute temporal-difference errors.
        states: (n, obs) raw observations of the policy's own roll-outs (`oracle_onpolicy` only).
    """

    data: Buffer
    policy: Callable[[Tensor], Tensor] | None = None
    model: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    members: int = 1
    surprise: Callable[[Batch], Tensor] | None = None
    states: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RollOutSettings:
    """How MBES walks; our design.

    Attributes:
        lanes: roll-outs side by side.
        horizon: steps of one roll-out.
        reach: how far the nearest row may be, in units of the data's own neighbour distances (95th
            percentile). At 1 a roll-out inside the data ends after some 20 steps, and what is kept
            are the starts of episodes.
        action_weight: w of d = |M(s) - M(s_hat)|^2 + w |a - pi(s)|^2, which prefers rows whose
            action the policy would take.
        project: go on from the real state that was found; False: from the model's prediction.
    """

    lanes: int = 50
    horizon: int = 1000
    reach: float = 4.0
    action_weight: float = 0.0
    project: bool = True


class RollOuts:
    """MBES: lanes of model roll-outs whose nearest real rows are kept.

    Roll-outs visit up to `lanes * horizon` or 20,000 rows, each at most once, and an even share of
    them is kept, so that late states of an episode count as much as early ones. A lane begins anew
    at the start of a random episode after `horizon` steps, after a row that terminates, and where
    the nearest unused row is out of reach. Of a step's lanes the first chooses first.
    The number of roll-outs is capped; what is missing then is filled with the unused rows nearest
    to those found.

    Cost: a step of the model and a search (see `Nearest`) for every row visited and every roll-out
    begun, so hardly more for 5,000 rows than for 1,000.
    """

    def __init__(
        self,
        sources: Sources,
        budget: int,
        generator: np.random.Generator,
        settings: RollOutSettings,
    ) -> None:
        assert sources.policy is not None and sources.model is not None
        self.sources, self.settings, self.generator = sources, settings, generator
        self.policy, self.model = sources.policy, sources.model
        self.arrays = sources.data.arrays()
        rows = len(sources.data)
        self.budget = min(budget, rows)
        most = min(settings.lanes * settings.horizon, rows // 2, _VISITS)
        thinning = max(1, most // self.budget)
        self.wanted = self.budget * thinning
        self.most = 10 * settings.lanes + self.wanted // 4
        extra = None
        if settings.action_weight > 0:
            extra = math.sqrt(settings.action_weight) * disagreement(sources)
        self.nearest = Nearest(self.arrays["obs"], extra)
        self.starts = sources.data.episodes()[:, 0].cpu().numpy()
        self.obs = self.arrays["obs"].cpu().numpy()
        self.ends = self.arrays["terminated"].cpu().numpy()
        self.visited: list[int] = []
        self.kept: Indices | None = None
        self.begun, self.filled = 0, 0
        self.limit = settings.reach * self.nearest.neighbour_distance(0.95, generator)
        self.age = np.zeros(settings.lanes, dtype=np.int64)
        self.state = np.zeros((settings.lanes, self.obs.shape[1]), dtype=np.float32)
        for lane in range(settings.lanes):
            self._begin(lane)

    def _begin(self, lane: int) -> None:
        self.state[lane] = self.obs[self.generator.choice(self.starts)]
        self.age[lane] = 0
        self.begun += 1

    def advance(self, share: float) -> None:
        """Go on until this share of the rows is visited; 1 finishes, whatever is missing."""
        while len(self.visited) < share * self.wanted and self.begun < self.most:
            self._step()
        if share >= 1 and self.kept is None:
            self._fill()
            self.kept = self.generator.permutation(np.array(self.visited))[: self.budget]

    def _step(self) -> None:
        settings = self.settings
        state = torch.from_numpy(self.state).to(self.sources.data.device)
        members = self.generator.integers(self.sources.members, size=len(self.state))
        predicted = self.model(state, self.policy(state), torch.from_numpy(members))
        expected = predicted.double().cpu().numpy()
        rows, _ = self.nearest(expected, self.limit)
        for lane, row in enumerate(rows):
            if row < 0:  # out of reach, or the model gives NaN
                self._begin(lane)
                continue
            self.visited.append(int(row))
            self.age[lane] += 1
            if self.ends[row] or self.age[lane] >= settings.horizon:
                self._begin(lane)
            else:
                self.state[lane] = self.obs[row] if settings.project else expected[lane]

    def _fill(self) -> None:
        """The unused rows nearest to those visited; random ones where nothing was."""
        while (missing := self.budget - len(self.visited)) > 0:
            about = self.obs[
                self.visited[:missing] or self.generator.integers(len(self.obs), size=missing)
            ]
            rows, _ = self.nearest(about.astype(np.float64))
            self.visited += rows.tolist()
            self.filled += len(rows)

    def order(self) -> Indices:
        """An even share of the visited rows, shuffled: every prefix covers all of them."""
        self.advance(1.0)
        assert self.kept is not None
        return self.kept

    def save(self) -> dict[str, Any]:
        """What `load` needs, as plain values and tensors."""
        return {
            "visited": torch.tensor(self.visited, dtype=torch.int64),
            "kept": None if self.kept is None else torch.from_numpy(self.kept),
            "begun": self.begun,
            "filled": self.filled,
            "age": torch.from_numpy(self.age.copy()),
            "state": torch.from_numpy(self.state.copy()),
            "generator": self.generator.bit_generator.state,
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Go on where `save` was called; the sources must be the same."""
        self.visited = saved["visited"].tolist()
        self.nearest.mark(self.visited)
        self.kept = None if saved["kept"] is None else saved["kept"].numpy()
        self.begun, self.filled = saved["begun"], saved["filled"]
        self.age, self.state = saved["age"].numpy().copy(), saved["state"].numpy().copy()
        self.generator.bit_generator.state = saved["generator"]


class Ranking:
    """A selector that needs no steps: the whole order is found in the first one."""

    begun = filled = 0

    def __init__(self, rank: Rank, sources: Sources, budget: int, generator: Any) -> None:
        self._rank: Callable[[], Indices] = lambda: rank(
            sources, min(budget, len(sources.data)), generator
        )
        self._order: Indices | None = None

    def advance(self, share: float) -> None:
        """Nothing is found in parts."""
        if self._order is None:
            self._order = self._rank()

    def order(self) -> Indices:
        """Row numbers in order of priority."""
        self.advance(1.0)
        assert self._order is not None
        return self._order

    def save(self) -> dict[str, Any]:
        """The order, once it is known."""
        return {"order": None if self._order is None else torch.from_numpy(self._order)}

    def load(self, saved: dict[str, Any]) -> None:
        """Take back what `save` gave."""
        self._order = None if saved["order"] is None else saved["order"].numpy()


Selection = RollOuts | Ranking
Rank = Callable[[Sources, int, np.random.Generator], Indices]


# ---- selectors that rank ---------------------------------------------------------------------


def random(sources: Sources, budget: int, generator: np.random.Generator) -> Indices:
    """Uniform rows."""
    return generator.permutation(len(sources.data))[:budget]


def best_return(sources: Sources, budget: int, generator: np.random.Generator) -> Indices:
    """Whole episodes, the highest return first; the last one is cut."""
    reward = sources.data.arrays()["reward"].double().cpu().numpy()
    episodes = sources.data.episodes().cpu().numpy()
    totals = np.array([reward[start:end].sum() for start, end in episodes])
    ranked = episodes[np.argsort(-totals, kind="stable")]
    return np.concatenate([np.arange(start, end) for start, end in ranked])[:budget]


def reward(sources: Sources, budget: int, generator: np.random.Generator) -> Indices:
    """The highest rewards."""
    return _largest(sources.data.arrays()["reward"].double().cpu().numpy(), budget)


def surprise(sources: Sources, budget: int, generator: np.random.Generator) -> Indices:
    """The largest absolute temporal-difference errors."""
    assert sources.surprise is not None
    return _largest(_blocked(sources.data, sources.surprise), budget)


def policy_match(sources: Sources, budget: int, generator: np.random.Generator) -> Indices:
    """Rows whose action is nearest to the policy's: tells whether the model matters."""
    return _largest(-disagreement(sources), budget)


def coverage(sources: Sources, budget: int, generator: np.random.Generator) -> Indices:
    """Greedy k-center: each row is the farthest from those before it, within a random pool."""
    pool, points = _pool(sources, budget, generator)
    chosen, distance = [0], ((points - points[0]) ** 2).sum(1)
    while len(chosen) < budget:
        chosen.append(int(distance.argmax()))
        np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(1), out=distance)
    return pool[chosen]


def herding(sources: Sources, budget: int, generator: np.random.Generator) -> Indices:
    """Welling's herding as in iCaRL: every prefix has nearly the pool's mean."""
    pool, points = _pool(sources, budget, generator)
    mean, total = points.mean(0), np.zeros(points.shape[1])
    norms, free = (points**2).sum(1), np.ones(len(points), dtype=bool)
    chosen: list[int] = []
    for k in range(1, budget + 1):
        error = norms - 2 * points @ (k * mean - total)  # |k mean - total - x|^2 up to a constant
        best = int(np.where(free, error, np.inf).argmin())
        chosen.append(best)
        free[best] = False
        total += points[best]
    return pool[chosen]


def matching(sources: Sources, budget: int, generator: np.random.Generator) -> Indices:
    """Vitter's reservoir over the stream of rows: matches the distribution of the data."""
    rows = len(sources.data)
    kept = np.arange(budget)
    stream = np.arange(budget, rows)
    places = generator.integers(0, stream + 1)
    for row, place in zip(stream[places < budget], places[places < budget], strict=True):
        kept[place] = row
    return generator.permutation(kept)


def oracle_onpolicy(sources: Sources, budget: int, generator: np.random.Generator) -> Indices:
    """Rows nearest to the policy's real roll-outs: an upper bound, it looks at the environment."""
    if sources.states is None:
        raise UserError(
            "oracle_onpolicy needs the states of real roll-outs and is for analysis only: use "
            "another selector for training"
        )
    nearest = Nearest(sources.data.arrays()["obs"])
    states = generator.permutation(sources.states.double().cpu().numpy())
    found: list[int] = []
    while len(found) < budget:
        rows, _ = nearest(states[: budget - len(found)])
        found += rows.tolist()
    return np.array(found, dtype=np.int64)


RANKINGS: dict[str, Rank] = {
    "random": random,
    "return": best_return,
    "reward": reward,
    "surprise": surprise,
    "coverage": coverage,
    "matching": matching,
    "herding": herding,
    "policy_match": policy_match,
    "oracle_onpolicy": oracle_onpolicy,
}
MODEL_BASED = ("mbes", "mbes_free")
NAMES = (*MODEL_BASED, *RANKINGS)


def make(
    name: str,
    sources: Sources,
    budget: int,
    generator: np.random.Generator,
    settings: RollOutSettings | None = None,
) -> Selection:
    """The selection of at most `budget` rows; all rows where the data has no more.

    Raises:
        UserError: an unknown selector, or a budget that keeps nothing.
    """
    if name not in NAMES:
        raise UserError(f"unknown selector {name!r}: choose {', '.join(NAMES)}")
    if budget < 1:
        raise UserError(f"a memory of {budget} transitions keeps nothing: give 1 or more")
    if name in MODEL_BASED and budget < len(sources.data):
        settings = settings or RollOutSettings()
        settings = RollOutSettings(**{**vars(settings), "project": name == "mbes"})
        return RollOuts(sources, budget, generator, settings)
    rank = random if budget >= len(sources.data) else RANKINGS[name]
    return Ranking(rank, sources, budget, generator)


class InSteps:
    """A selection divided into steps, which a checkpoint may interrupt.

    Attributes:
        steps: done so far.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.selection: Selection | None = None
        self._saved: dict[str, Any] = {}

    def open(self, begin: Callable[[], Selection]) -> Selection:
        """The selection; where there is none yet, `begin` makes it and what was saved goes on."""
        if self.selection is None:
            self.selection = begin()
            if self._saved:
                self.selection.load(self._saved)
        return self.selection

    def save(self) -> dict[str, Any]:
        """What `load` needs."""
        inner = self.selection.save() if self.selection is not None else self._saved
        return {"steps": self.steps, "selection": inner}

    def load(self, saved: dict[str, Any]) -> None:
        """Go on where `save` was called, once `open` brings the data."""
        self.steps, self._saved, self.selection = saved["steps"], saved["selection"], None


# ---- parts -------------------------------------------------------------------------------------


def disagreement(sources: Sources) -> Floats:
    """|a - pi(s)| of every row, (rows,)."""
    policy = sources.policy
    assert policy is not None
    return _blocked(
        sources.data, lambda rows: (rows["action"] - policy(rows["obs"])).square().sum(-1).sqrt()
    )


def _blocked(data: Buffer, fn: Callable[[Batch], Tensor]) -> Floats:
    """`fn` on blocks of rows, (rows,)."""
    blocks = torch.split(torch.arange(len(data), device=data.device), _BLOCK)
    return torch.cat([fn(data.take(block)) for block in blocks]).double().cpu().numpy()


def _largest(values: Floats, budget: int) -> Indices:
    return np.argsort(-values, kind="stable")[:budget]


def _pool(sources: Sources, budget: int, generator: np.random.Generator) -> tuple[Indices, Floats]:
    """Random rows and their whitened observations, (pool,) and (pool, obs)."""
    obs = sources.data.arrays()["obs"]
    size = min(len(obs), max(_POOL, 4 * budget))
    pool = generator.permutation(len(obs))[:size]
    points = obs[torch.from_numpy(pool).to(obs.device)].double().cpu().numpy()
    spread = points.std(axis=0)
    return pool, (points - points.mean(0)) / np.where(spread > 1e-8, spread, 1.0)
