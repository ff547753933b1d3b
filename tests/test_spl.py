"""SPL: nothing hidden leaks, labels are lower bounds, baselines are what they say."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from rl_shift import agents, seeding, trainer
from rl_shift.buffer import Buffer
from rl_shift.config import RunConfig, Task
from rl_shift.errors import UserError
from rl_shift.trainer import Trainer

OBS, ACTION = Box(-np.inf, np.inf, (2,), np.float32), Box(-1.0, 1.0, (1,), np.float32)
EPISODES, LENGTH = 40, 10


def arrays_of() -> dict[str, np.ndarray]:
    """Rewards 2 a + noise of 0.1; episodes that end by truncation."""
    rng = seeding.numpy_generator(0, "spl data")
    rows = EPISODES * LENGTH
    action = rng.uniform(-1, 1, (rows, 1)).astype(np.float32)
    obs = rng.normal(size=(rows, 2)).astype(np.float32)
    reward = (2 * action[:, 0] + 0.1 * rng.normal(size=rows)).astype(np.float32)
    end = np.arange(rows) % LENGTH == LENGTH - 1
    return {
        "obs": obs,
        "action": action,
        "reward": reward,
        "next_obs": np.roll(obs, -1, 0),
        "terminated": np.zeros(rows, bool),
        "truncated": end,
        "task": np.zeros(rows, np.int64),
    }


def agent_of(base: str = "td3_bc", **changes: Any) -> Any:
    kind = agents.get("spl")
    inner = agents.get(base).Config(hidden=(8,), batch_size=16)
    settings = {"members": 4, "hidden": (16,), "labelled": 0.5, "reward_updates": 60}
    settings |= {"check_every": 20, "batch_size": 32, "base_config": vars(inner)} | changes
    with seeding.forked(1):
        return kind(OBS, ACTION, kind.Config(base=base, **settings))


def task_of(updates: int = 6, **changes: Any) -> Task:
    return Task(name="toy", dataset="toy", updates=updates, observation_space=OBS,
                action_space=ACTION, data=SimpleNamespace(), **changes)  # fmt: skip


def trained(
    monkeypatch: pytest.MonkeyPatch, arrays: dict[str, np.ndarray] | None = None, **changes: Any
) -> Any:
    """An agent after its stages under the trainer."""
    arrays = arrays_of() if arrays is None else arrays
    monkeypatch.setattr(trainer.datasets, "load", lambda info, columns, *a, **k: dict(arrays))
    agent, task = agent_of(**changes), task_of()
    run = RunConfig("spl", agent.config, (task,), save_every=0, data_memory="ram")
    with seeding.forked(2):
        Trainer(agent, [task], run).run()
    return agent


def base_of(agent: Any) -> dict[str, Tensor]:
    return {k: v for k, v in agent.state_dict().items() if k.startswith("base.")}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def begun(agent: Any, arrays: dict[str, np.ndarray] | None = None) -> Buffer:
    buffer = Buffer.from_arrays(arrays_of() if arrays is None else arrays, seeds=(3,))
    agent.begin_task(task_of(), buffer)
    return buffer


def learnt(agent: Any, buffer: Buffer, updates: int) -> None:
    """The reward networks, calibrated."""
    (stage, *_) = agent.stages(task_of())
    agent.stage = stage.name
    with seeding.forked(2):
        for k in range(1, updates + 1):
            agent.update(agent.sample(buffer))
            if k % 50 == 0 or k == updates:
                agent.check(SimpleNamespace(name="reward", updates=updates), k, buffer)
    agent.stage = "offline"


def test_a_second_task_s_networks_do_not_compete_with_the_first_one_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = agent_of(patience=2)
    for number, loss in ((1, 0.1), (2, 5.0)):  # easy data, then hard ones
        buffer = begun(agent)
        monkeypatch.setattr(agent, "errors", lambda batch, loss=loss: torch.full((4,), loss))
        stage = agent.stages(task_of())[0]
        first = next(agent.reward.parameters())
        first.data.fill_(number)
        assert not agent.check(stage, 20, buffer)  # the record of the first task is no record here
        first.data.fill_(-number)
        assert agent.best.stale.tolist() == [0] * 4
        assert [agent.check(stage, 40, buffer), agent.check(stage, 50, buffer)] == [False, True]
        assert (first == number).all()


def test_hidden_rewards_cannot_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    for labels in ("lower", "mean", "zero", "none"):
        plain = trained(monkeypatch, labels=labels, coverage=0.8)
        known = plain.split[1].known.numpy()
        assert known.sum() == EPISODES * LENGTH // 2
        for poison in (np.nan, 1e6):
            spoilt = arrays_of()
            spoilt["reward"][~known] = poison
            other = trained(monkeypatch, spoilt, labels=labels, coverage=0.8)
            assert_equal(plain.state_dict(), other.state_dict())


def test_a_kappa_of_zero_is_mean_imputation(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = trained(monkeypatch, labels="mean", kappa=5.0)
    assert_equal(base_of(trained(monkeypatch, labels="lower", kappa=0.0)), base_of(mean))
    lower = base_of(trained(monkeypatch, labels="lower", kappa=3.0))
    assert any(not torch.equal(v, lower[k]) for k, v in base_of(mean).items())


def test_all_rewards_known_is_the_plain_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws, the same updates; so is the reference that is given every true reward."""
    full = trained(monkeypatch, labelled=1.0)
    assert [s.name for s in full.stages(task_of())] == ["offline"]
    assert_equal(base_of(full), base_of(trained(monkeypatch, labels="all")))
    base = agent_of(labelled=1.0).base
    task = task_of()
    with seeding.forked(2):
        run = RunConfig("td3_bc", base.config, (task,), save_every=0, data_memory="ram")
        Trainer(base, [task], run).run()
    assert_equal(base_of(full), {f"base.{k}": v for k, v in base.state_dict().items()})


def test_labels_are_lower_bounds_within_the_observed_range() -> None:
    agent = agent_of()
    buffer = begun(agent)
    learnt(agent, buffer, 60)
    known = agent.revealed(buffer).known
    rewards = buffer.arrays()["reward"][known]
    last = torch.full((len(buffer),), 1e9)
    for kappa in (0.0, 0.5, 1.0, 2.0, 50.0):
        agent.kappa.fill_(kappa)
        label = agent.label(buffer)
        assert (label <= last + 1e-6).all()
        assert (label >= rewards.min()).all() and (label <= rewards.max()).all()
        last = label
    assert (last == rewards.min()).float().mean() > 0.9
    agent.kappa.fill_(1.0)
    seen = agent.labelled(buffer)
    assert torch.equal(seen.arrays()["reward"][known], rewards)
    assert torch.equal(seen.arrays()["reward"][~known], agent.label(buffer)[~known])
    assert torch.equal(seen.episodes(), buffer.episodes())
    everywhere = agent_of(everywhere=True)
    other = begun(everywhere)
    seen = everywhere.with_rewards(other, torch.full((len(other),), 7.0))
    assert (seen.arrays()["reward"] == 7.0).all()


def test_labelled_only_keeps_whole_labelled_trajectories() -> None:
    agent = agent_of(labels="none", labelled=0.1)
    buffer = begun(agent)
    agent.stage = "offline"
    kept = agent.labelled(buffer)
    assert len(kept) == 4 * LENGTH and len(kept.episodes()) == 4
    known = agent.revealed(buffer).known
    assert torch.equal(kept.arrays()["obs"], buffer.arrays()["obs"][known])
    assert sorted(agent.trajectories.tolist()) == sorted(
        {int(row) // LENGTH for row in known.nonzero()}
    )


def test_bags_and_checks_share_no_trajectory_with_each_other_or_the_held_out() -> None:
    for labelled in (0.025, 0.05, 0.5):
        agent = agent_of(labelled=labelled)
        buffer = begun(agent)
        split = agent.revealed(buffer)
        for k in range(4):
            bag = set(split.bags[k, : split.sizes[k]].tolist())
            checks, held = set(split.checks[k].tolist()), set(split.held_out.tolist())
            assert not bag & checks and not bag & held and not checks & held
            assert all(bool(split.known[row]) for row in bag | checks | held)
        again = agent_of(labelled=labelled)
        assert torch.equal(again_split(again).bags, split.bags)  # the same for the same seed
    bags = [set(split.bags[k, : split.sizes[k]].tolist()) for k in range(4)]
    assert bags[0] != bags[1]


def again_split(agent: Any) -> Any:
    return agent.revealed(begun(agent))


def test_conformal_scale_covers_exchangeable_rows() -> None:
    """Rows of the toy are independent: coverage lies within binomial error of what was asked."""
    agent = agent_of(coverage=0.8, labelled=0.5, held_out=0.6)
    buffer = begun(agent)
    learnt(agent, buffer, 100)
    unknown = buffer.take((~agent.revealed(buffer).known).nonzero()[:, 0])
    mean, std = agent.run(agent.moments, unknown)
    covered = (agent.lower(mean, std) <= unknown["reward"]).double().mean().item()
    held = len(agent.revealed(buffer).held_out)
    error = np.sqrt(0.8 * 0.2 * (1 / held + 1 / len(mean)))
    assert abs(covered - 0.8) < 3 * error
    assert agent.report[0].item() == pytest.approx(0.8, abs=2 / held)
    few = agent_of(coverage=0.999, labelled=0.05)  # more than ten rows can promise
    buffer = begun(few)
    learnt(few, buffer, 2)
    assert few.kappa.isinf() and (few.label(buffer) == few.low).all()


def line(width: float) -> dict[str, np.ndarray]:
    """Observations in [-width, width] only, reward 1 - x^2."""
    arrays = arrays_of()
    rng = seeding.numpy_generator(0, "line")
    arrays["obs"] = rng.uniform(-width, width, arrays["obs"].shape).astype(np.float32)
    arrays["obs"][:, 1] = 0
    arrays["reward"] = (1 - arrays["obs"][:, 0] ** 2).astype(np.float32)
    return arrays


def test_spread_grows_with_distance_from_labelled_data() -> None:
    agent = agent_of(normalize=False, members=8)
    buffer = begun(agent, line(1.0))
    learnt(agent, buffer, 150)
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0], [8.0, 0.0]])
    std = agent.moments({"obs": x, "next_obs": x, "action": torch.zeros(4, 1)})[1]
    assert (std[1:] > std[:-1]).all() and std[2] > 5 * std[0]


def test_the_uncertain_action_is_refused_at_two_and_taken_at_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bandit: action -0.5 is worth 1 and well labelled, 0.5 looks better but nobody knows."""

    def moments(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        far = batch["action"][:, 0] > 0
        return torch.where(far, 1.2, 1.0), torch.where(far, 0.3, 0.01)

    arrays = arrays_of()
    rows = len(arrays["action"])
    probe = agent_of()
    begun(probe, arrays)
    known = probe.split[1].known.numpy()
    far = ~known & (np.arange(rows) % 2 == 0)
    arrays["action"] = np.where(far, 0.5, -0.5).astype(np.float32)[:, None]
    arrays["reward"] = np.where(far, 0.0, np.arange(rows) % 3).astype(np.float32)  # mean 1
    for kappa, better in ((0.0, True), (2.0, False)):
        agent = agent_of(kappa=kappa)
        buffer = begun(agent, arrays)
        monkeypatch.setattr(agent, "moments", moments)
        reward = agent.labelled(buffer).arrays()["reward"]
        worth = reward[torch.from_numpy(far)].mean(), reward[torch.from_numpy(~far)].mean()
        assert bool(worth[0] > worth[1]) == better


def test_the_best_tenth_is_chosen_by_labels_where_rewards_are_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cloning of the best episodes: returns of labels find them, zeros find what is labelled."""
    arrays, good = arrays_of(), np.arange(EPISODES) % 4 == 1
    arrays["action"] = arrays["action"] / 2 + np.where(good, 0.5, -0.5).repeat(LENGTH)[:, None]
    arrays["action"] = arrays["action"].astype(np.float32)
    arrays["reward"] = 2 * arrays["action"][:, 0]
    share = {}
    for labels in ("lower", "zero"):
        agent = trained(monkeypatch, arrays, labels=labels, base="bc",
                        base_config={"hidden": (8,), "batch_size": 16, "fraction": 0.2},
                        labelled=0.25, reward_updates=200, learning_rate=0.01)  # fmt: skip
        chosen = agent.base.kept.numpy() // LENGTH
        assert len(np.unique(chosen)) == EPISODES // 5
        share[labels] = good[chosen].mean()
    assert share["lower"] == 1.0 and share["zero"] < 0.6


def test_bad_settings_are_refused() -> None:
    for changes in ({"labelled": 0.0}, {"coverage": 1.0}, {"members": 1}):
        with pytest.raises(UserError, match="labelled"):
            agent_of(**changes)
    buffer = Buffer.from_arrays(arrays_of(), seeds=(3,))
    with pytest.raises(UserError, match="no env steps"):
        agent_of().begin_task(task_of(env_steps=5), buffer)
    with pytest.raises(UserError, match="hidden rewards"):
        agent_of().begin_task(task_of(reward="normalize"), buffer)
