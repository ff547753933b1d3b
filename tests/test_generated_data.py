"""SynthER and MOPO: what they generate, how much of it is kept, and what a batch is made of."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rl_shift import agents, seeding
from rl_shift.buffer import Buffer
from rl_shift.config import Task
from rl_shift.envs import termination
from rl_shift.errors import UserError
from rl_shift.synthetic import share
from rl_shift.trajectories import TransitionCodec

OBS, ACTION = 11, 3  # of the hopper
BOX = spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
ACTIONS = spaces.Box(-1.0, 1.0, (ACTION,), np.float32)


def data(rows: int = 200) -> Buffer:
    """Rows whose first observation, a healthy height, is a multiple of 1/64."""
    rng = np.random.default_rng(0)
    obs = rng.normal(0, 0.05, (rows, OBS)).astype(np.float32)
    obs[:, 0] = 1.0 + rng.integers(0, 16, rows) / 64
    ends = np.arange(rows) % 50 == 49
    arrays: dict[str, Any] = {
        "obs": obs,
        "next_obs": np.roll(obs, -1, 0),
        "action": rng.uniform(-1, 1, (rows, ACTION)).astype(np.float32),
        "reward": rng.normal(size=rows).astype(np.float32),
        "terminated": ends & (np.arange(rows) < 100),
        "truncated": ends & (np.arange(rows) >= 100),
        "task": np.zeros(rows, np.int64),
        "next_obs_known": (np.arange(rows) != 7).astype(np.float32),
    }
    return Buffer.from_arrays(arrays)


def task(ends: Any = None) -> Task:
    return Task(
        "toy",
        dataset="toy",
        updates=3000,
        observation_space=BOX,
        action_space=ACTIONS,
        termination=ends,
        data=SimpleNamespace(),  # type: ignore[arg-type]
    )


def made(name: str, buffer: Buffer, ends: Any = None, **changes: Any) -> Any:
    kind = agents.get(name)
    with seeding.forked(0):
        agent = kind(BOX, ACTIONS, kind.Config(base_config={"hidden": (8,)}, **changes))
    agent.begin_task(task(ends), buffer)
    return agent


def stage(agent: Any, name: str) -> None:
    agent.enter(name)


# ---- SynthER -----------------------------------------------------------------------------------


def test_transitions_are_encoded_and_decoded() -> None:
    buffer = data()
    codec = TransitionCodec(OBS, ACTION)
    codec.fit(buffer)
    x = codec.encode(buffer.arrays())
    assert x.shape == (200, 2 * OBS + ACTION + 2)
    torch.testing.assert_close(x[:, :-1].mean(0), torch.zeros(26), rtol=0.0, atol=1e-4)
    assert x[:, -1].unique().tolist() == [0.0, 1.0]  # terminations stay as they are
    rows = codec.decode(x)
    for key in ("obs", "action", "reward", "next_obs"):
        torch.testing.assert_close(rows[key], buffer.arrays()[key], rtol=1e-4, atol=1e-4)
    assert torch.equal(rows["terminated"], buffer.arrays()["terminated"])
    assert codec.decode(torch.full_like(x, 100.0))["action"].abs().max() == 1.0


def test_stacked_seeds_are_standardised_alike() -> None:
    buffer = data()
    one, two = TransitionCodec(OBS, ACTION), TransitionCodec(OBS, ACTION)
    one.fit(buffer)
    two.mean, two.std = two.mean.expand(3, -1).clone(), two.std.expand(3, -1).clone()
    two.fit(buffer)
    for k in range(3):
        assert torch.equal(two.mean[k], one.mean) and torch.equal(two.std[k], one.std)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *(("synther", f) for f in ("samples", "denoiser_batch", "synthesis_updates")),
        *(("mopo", f) for f in ("starts", "horizon", "rounds", "rollout_updates", "penalty")),
    ],
)
def test_sizes_that_make_nothing_are_refused(name: str, field: str) -> None:
    with pytest.raises(UserError, match=f"{field} must be at least"):
        made(name, data(), **{field: -1})


def test_blocks_add_up() -> None:
    for total, parts in ((100, 8), (12, 3), (7, 7)):
        sizes = [share(total, parts, k) for k in range(parts)]
        assert sum(sizes) == total and max(sizes) - min(sizes) <= 1
    assert [share(2, 4, k) for k in range(4)] == [1] * 4  # an update makes something


def test_a_model_of_other_rewards_is_refused() -> None:
    agent, other = (made("synther", data(), width=8, depth=1) for _ in range(2))
    agent.reuse("denoiser", other)
    agent.begin_task(task(), data())
    with pytest.raises(UserError, match="rewards under `reward: raw`, .* has `reward: 1000,-5`"):
        agent.begin_task(dataclasses.replace(task(), reward="1000,-5"), data())


def test_synther_learns_from_generated_rows_alone() -> None:
    buffer = data()
    agent = made(
        "synther", buffer, width=8, depth=1, samples=60, synthesis_updates=3, sampler_steps=3
    )
    names = [(s.name, s.updates, s.counted) for s in agent.stages(task())]
    expected = [("denoiser", 100_000, False), ("synthesise", 3, False), ("offline", 3000, True)]
    assert names == expected
    stage(agent, "synthesise")
    for _ in range(3):
        rows = agent.sample(buffer)
        assert rows["terminated"].dtype == torch.bool and rows["action"].abs().max() <= 1
    assert len(agent.synthetic.rings[0]) == 60
    stage(agent, "offline")
    batch = agent.sample(buffer)
    assert batch["obs"].shape == (256, OBS)
    assert not torch.isin(batch["obs"][:, 0], buffer.arrays()["obs"][:, 0]).any()


# ---- MOPO --------------------------------------------------------------------------------------


SMALL: dict[str, Any] = {"model_hidden": (8,), "members": 3, "elites": 2, "starts": 10}
SMALL |= {"horizon": 2, "rollout_updates": 2, "rounds": 5}


def test_the_ring_keeps_the_last_rounds() -> None:
    buffer = data()
    agent = made("mopo", buffer, **SMALL)
    stage(agent, "rollout")
    rounds: list[Tensor] = []
    kept = torch.zeros(0, OBS)
    for k in range(6):
        rounds.append(torch.cat([agent.sample(buffer)["obs"] for _ in range(2)]))
        kept = agent.synthetic.rings[0].arrays()["obs"]
        assert len(kept) == min(k + 1, 5) * 20
        assert kept.any(1).all()  # no row of zeros
    rows = {tuple(row) for row in kept.tolist()}
    first, *others = ({tuple(row) for row in part.tolist()} for part in rounds)
    assert set().union(*others) <= rows
    fresh = [row for row in first if row[0] * 64 != round(row[0] * 64)]  # not a state of the data
    assert fresh and not set(fresh) & rows


def test_uncertainty_is_a_penalty_and_batches_have_their_share() -> None:
    buffer = data()
    stage_name, rewards = "rollout", []
    for penalty in (0.0, 2.0):
        agent = made("mopo", buffer, **SMALL, penalty=penalty)
        stage(agent, stage_name)
        rows = agent.sample(buffer)
        rewards.append(rows["reward"][:5])
    unsure = agent.run(agent.dynamics.predict, rows["obs"][:5], rows["action"][:5]).std
    expected = rewards[0] - 2.0 * unsure.norm(dim=-1).amax(0)
    torch.testing.assert_close(rewards[1], expected)
    stage(agent, "offline")
    real = agent.sample(buffer)["obs"][-13:, 0] * 64
    assert torch.equal(real, real.round())  # 5 % of 256


def test_rollouts_end_by_the_task_s_rule_and_begin_anew() -> None:
    buffer = data()

    def low(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        return torch.ones_like(next_obs[:, 0], dtype=torch.bool)

    agent = made("mopo", buffer, low, **SMALL)
    stage(agent, "rollout")
    rows = agent.sample(buffer)
    assert rows["terminated"].all()
    states = buffer.arrays()["obs"]
    assert all((states == row).all(1).any() for row in rows["obs"])  # each from the data
    agent.focus(task(termination.hopper))
    assert agent.termination is termination.hopper


def test_the_model_never_sees_unknown_next_observations() -> None:
    buffer = data()
    agent = made("mopo", buffer, **SMALL)
    train, held = agent.split(buffer)
    assert 7 not in torch.cat([train, held])
    assert len(train) + len(held) == 199
    stage(agent, "dynamics")
    batch = agent.sample(buffer)
    assert batch["obs"].shape == (3, 256, OBS)
    (model, *_) = agent.stages(task())
    assert not agent.check(model, 1000, buffer)
    assert float(agent.dynamics.best.min()) > 0
    with pytest.raises(UserError, match="elites"):
        made("mopo", buffer, members=2, elites=3)
