"""Selectors on a linear system whose policy is known: what MBES keeps looks like its roll-outs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from rl_shift import seeding, selectors
from rl_shift.buffer import Buffer
from rl_shift.errors import UserError
from rl_shift.selectors import RollOutSettings, Sources

GOAL = torch.tensor([1.0, -0.5])


def move(obs: Tensor, action: Tensor) -> Tensor:
    return 0.9 * obs + 0.2 * action


def policy(obs: Tensor) -> Tensor:
    return (GOAL - obs).clamp(-1, 1)


def model(obs: Tensor, action: Tensor, members: Tensor) -> Tensor:
    return move(obs, action)


def linear_data(episodes: int = 60, length: int = 40) -> Buffer:
    """Random actions from random starts around 0: states of the policy are rare."""
    rng = seeding.numpy_generator(0, "linear data")
    parts: dict[str, list[np.ndarray]] = {"obs": [], "action": [], "next_obs": []}
    obs = torch.from_numpy(rng.normal(size=(episodes, 2)).astype(np.float32))
    for _ in range(length):
        action = torch.from_numpy(rng.uniform(-1, 1, (episodes, 2)).astype(np.float32))
        for key, value in (("obs", obs), ("action", action), ("next_obs", move(obs, action))):
            parts[key].append(value.numpy())
        obs = move(obs, action)
    arrays = {k: np.stack(v, axis=1).reshape(-1, 2) for k, v in parts.items()}
    ends = np.arange(episodes * length) % length == length - 1
    return Buffer.from_arrays(
        {
            **arrays,
            "reward": rng.normal(size=len(ends)).astype(np.float32),
            "terminated": np.zeros(len(ends), bool),
            "truncated": ends,
        }
    )


DATA = linear_data()
SOURCES = Sources(
    DATA, policy, model, surprise=lambda rows: rows["reward"].abs(), states=GOAL.expand(50, 2)
)
SETTINGS = RollOutSettings(lanes=4, horizon=30)


def chosen(name: str, budget: int = 100, seed: int = 0, sources: Sources = SOURCES) -> np.ndarray:
    generator = seeding.numpy_generator(seed, "select")
    selection = selectors.make(name, sources, budget, generator, SETTINGS)
    selection.advance(1.0)
    return selection.order()


@pytest.mark.parametrize("name", selectors.NAMES)
def test_rows_are_unique_in_range_and_reproducible(name: str) -> None:
    rows = chosen(name)
    assert rows.dtype == np.int64
    assert len(rows) == len(set(rows.tolist())) == 100
    assert 0 <= rows.min() and rows.max() < len(DATA)
    np.testing.assert_array_equal(rows, chosen(name))
    if name in ("mbes", "mbes_free", "random", "matching", "coverage"):
        assert set(rows) != set(chosen(name, seed=1))


@pytest.mark.parametrize("name", selectors.NAMES)
def test_a_budget_above_the_data_takes_every_row(name: str) -> None:
    assert sorted(chosen(name, 10**6)) == list(range(len(DATA)))


@pytest.mark.parametrize("name", selectors.MODEL_BASED)
@pytest.mark.parametrize("budget", [1, 3, 2399])
def test_model_based_selectors_keep_exactly_the_budget(name: str, budget: int) -> None:
    """Down to a single row, and up to all rows but one, most of which roll-outs do not meet."""
    rows = chosen(name, budget)
    assert len(rows) == len(set(rows.tolist())) == budget
    assert 0 <= rows.min() and rows.max() < len(DATA) == 2400


def on_policy_mean() -> Tensor:
    obs = torch.from_numpy(seeding.numpy_generator(3, "starts").normal(size=(500, 2))).float()
    visited = []
    for _ in range(SETTINGS.horizon):
        obs = move(obs, policy(obs))
        visited.append(obs)
    return torch.cat(visited).mean(0)


def test_mbes_keeps_what_the_policy_visits() -> None:
    expected, data = on_policy_mean(), linear_data(episodes=300)
    obs, sources = data.arrays()["obs"], Sources(data, policy, model)
    distance = {
        name: float((obs[chosen(name, 60, sources=sources)].mean(0) - expected).norm())
        for name in ("mbes", "mbes_free", "random")
    }
    assert distance["mbes"] < 0.2
    assert distance["mbes"] < 0.5 * distance["random"]
    assert distance["mbes_free"] < 0.5 * distance["random"]


def test_mbes_fills_up_what_its_roll_outs_cannot() -> None:
    """A model that leaves the data at once ends every roll-out; so does one that gives NaN."""
    for away in (100.0, float("nan")):
        sources = Sources(DATA, policy, lambda obs, action, members, d=away: obs + d)
        selection = selectors.make(
            "mbes", sources, 200, seeding.numpy_generator(0, "select"), SETTINGS
        )
        selection.advance(1.0)
        assert selection.filled == 200
        rows = selection.order()
        assert len(set(rows.tolist())) == 200
        spread = DATA.arrays()["obs"][rows].std(0) / DATA.arrays()["obs"].std(0)
        assert (spread > 0.5).all()  # from all over the data, not around one row
        assert isinstance(selection, selectors.RollOuts)
        assert selection.begun <= selection.most + SETTINGS.lanes


def test_a_selection_goes_on_where_it_was_saved() -> None:
    whole = selectors.make("mbes", SOURCES, 100, seeding.numpy_generator(0, "select"), SETTINGS)
    saved = []
    for step in range(1, 6):
        whole.advance(step / 5)
        saved.append(whole.save())
    for k, state in enumerate(saved):
        other = selectors.make("mbes", SOURCES, 100, seeding.numpy_generator(0, "select"), SETTINGS)
        other.load(state)
        for step in range(k + 2, 6):
            other.advance(step / 5)
        np.testing.assert_array_equal(other.order(), whole.order())


def test_every_prefix_of_mbes_covers_its_roll_outs() -> None:
    """A memory may be shrunk later: rows are not in the order in which roll-outs met them."""
    obs = DATA.arrays()["obs"]
    rows = chosen("mbes", 60)
    whole, half = obs[rows], obs[rows[:30]]
    assert float((whole.mean(0) - half.mean(0)).norm()) < 0.3


def test_rankings_by_hand() -> None:
    arrays = DATA.arrays()
    reward = arrays["reward"].numpy()
    np.testing.assert_array_equal(chosen("reward", 5), np.argsort(-reward)[:5])
    np.testing.assert_array_equal(chosen("surprise", 5), np.argsort(-np.abs(reward))[:5])
    returns = reward.reshape(60, 40).sum(1)
    best = int(returns.argmax()) * 40
    np.testing.assert_array_equal(chosen("return", 40), np.arange(best, best + 40))
    error = (arrays["action"] - policy(arrays["obs"])).norm(dim=-1)
    np.testing.assert_array_equal(chosen("policy_match", 5), error.argsort()[:5])
    on = arrays["obs"][chosen("oracle_onpolicy", 20)]
    assert (
        float((on - GOAL).norm(dim=-1).max())
        <= float((arrays["obs"] - GOAL).norm(dim=-1).sort().values[19]) + 1e-6
    )


def test_coverage_spreads_and_herding_keeps_the_mean() -> None:
    obs = DATA.arrays()["obs"]
    spread = {name: float(obs[chosen(name, 50)].std(0).sum()) for name in ("coverage", "random")}
    assert spread["coverage"] > 1.3 * spread["random"]
    for budget in (10, 50):
        off = (obs[chosen("herding", budget)].mean(0) - obs.mean(0)).norm()
        assert float(off) < 0.1


def test_the_action_weight_prefers_rows_that_agree() -> None:
    def mean_error(weight: float) -> float:
        settings = RollOutSettings(lanes=4, horizon=30, action_weight=weight)
        selection = selectors.make(
            "mbes", SOURCES, 60, seeding.numpy_generator(0, "select"), settings
        )
        rows = DATA.take(torch.from_numpy(selection.order()))
        return float((rows["action"] - policy(rows["obs"])).norm(dim=-1).mean())

    assert mean_error(4.0) < 0.7 * mean_error(0.0)


def test_mistakes_are_named() -> None:
    generator = seeding.numpy_generator(0)
    with pytest.raises(UserError, match="unknown selector 'mebs'"):
        selectors.make("mebs", SOURCES, 10, generator)
    with pytest.raises(UserError, match="keeps nothing"):
        selectors.make("random", SOURCES, 0, generator)
    with pytest.raises(UserError, match="for analysis only"):
        chosen("oracle_onpolicy", sources=Sources(DATA, policy, model))
