"""Reactive Exploration: the mixture, true pairs, reactivity, reactions, presets, exact resume."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from rl_shift import agents, config, envs, seeding
from rl_shift.buffer import Buffer, transition_spec
from rl_shift.errors import UserError
from rl_shift.trainer import Trainer

VECTOR, DISCRETE, BOX = Box(-9, 9, (3,), np.float32), Discrete(3), Box(-1.0, 1.0, (2,), np.float32)
SMALL: dict[str, dict[str, Any]] = {
    "ppo": {"rollout": 32, "batch_size": 16, "epochs": 2, "hidden": (8,)},
    "dqn": {"batch_size": 8, "warmup_steps": 8, "hidden": (8,), "buffer_capacity": 64},
    "sac": {"batch_size": 8, "warmup_steps": 8, "hidden": (8,), "buffer_capacity": 64},
}


def agent_of(base: str = "ppo", spaces: Any = None, **changes: Any) -> Any:
    kind = agents.get("reactive")
    spaces = spaces or (VECTOR, BOX if base == "sac" else DISCRETE)
    settings = {"model_batch_size": 16, "model_epochs": 2, "latent": 8, **changes}
    base_config = SMALL[base] | settings.pop("base_config", {})
    with seeding.forked(3):
        return kind(*spaces, kind.Config(base=base, base_config=base_config, **settings))


def rollout(lanes: int = 2, length: int = 16) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    obs = torch.randn(lanes, length + 1, 3, generator=g)
    never = torch.zeros(lanes, length, dtype=torch.bool)
    return {
        "obs": obs[:, :-1],
        "action": torch.randint(3, (lanes, length), generator=g),
        "reward": torch.randn(lanes, length, generator=g),
        "next_obs": obs[:, 1:],
        "terminated": never,
        "truncated": never,
    }


def ring(agent: Any, rows: int = 40, lanes: int = 2) -> Buffer:
    g = torch.Generator().manual_seed(2)
    buffer = Buffer(transition_spec(agent.observation_space, agent.action_space), 64, lanes)
    box = isinstance(agent.action_space, Box)
    for k in range(rows // lanes):
        action = torch.rand(lanes, 2, generator=g) * 2 - 1 if box else torch.zeros(lanes).long()
        buffer.extend(
            {
                "obs": torch.randn(lanes, 3, generator=g),
                "action": action,
                "reward": torch.full((lanes,), float(k)),
                "next_obs": torch.randn(lanes, 3, generator=g),
                "terminated": torch.zeros(lanes, dtype=torch.bool),
                "truncated": torch.zeros(lanes, dtype=torch.bool),
                "task": torch.zeros(lanes, dtype=torch.int64),
            }
        )
    return buffer


# ---- the reward ------------------------------------------------------------------------------


def test_the_mixture_on_numbers_worked_out_by_hand() -> None:
    agent = agent_of(beta_state=0.15, beta_reward=0.25, eta_state=0.01, eta_reward=1.0)
    errors = {"state": torch.tensor([200.0, 0.0]), "reward": torch.tensor([4.0, 0.5])}
    mixed = agent.mixture(torch.tensor([1.0, -1.0]), errors)
    # 0.15 * 0.005 * 200 + 0.25 * 0.5 * 4 + 0.6;  0 + 0.25 * 0.5 * 0.5 - 0.6
    torch.testing.assert_close(mixed, torch.tensor([1.25, -0.5375]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta_state": 0.7, "beta_reward": 0.4}, "must not sum to more than 1"),
        ({"beta_state": -0.1}, "must not be negative"),
        ({"curiosity": "icn"}, "unknown curiosity 'icn'"),
        ({"base": "sac", "react_explore": True}, "sac cannot begin to explore anew"),
        (
            {"base": "dqn", "react_explore": True, "base_config": {"temperature": 0.1}},
            "dqn at a temperature cannot begin to explore anew",
        ),
        ({"recency": 1.5}, "recency must lie between 0 and 1"),
        ({"recency": float("nan")}, "recency must be a number, not nan"),
        ({"beta_state": float("nan")}, "beta_state must be a number, not nan"),
        ({"recent_rows": 0}, "recent_rows must be at least 1"),
        ({"model_batch_size": 0}, "model_batch_size must be at least 1"),
        ({"model_epochs": 0}, "model_epochs must be at least 1"),
        ({"react_steps": 0}, "react_steps must be at least 1"),
        ({"slow_rate": 0.0}, "slow_rate is the share .* more than 0"),
        ({"fast_rate": 1.5}, "fast_rate is the share .* at most 1"),
        ({"base_config": {"rollout": 0}}, "PPO: rollout must be at least 2, not 0"),
        (
            {"base": "dqn", "react_forget": True, "base_config": {"prioritized": True}},
            "set prioritized to false",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        agent_of(**changes)


@pytest.mark.parametrize("base", ["ppo", "dqn"])
def test_without_weights_and_curiosity_it_is_the_base(base: str) -> None:
    agent = agent_of(base, curiosity="none", beta_state=0.0, beta_reward=0.0)
    alone = copy.deepcopy(agent.base)
    for _ in range(3):
        batches = []
        for one in (agent, alone):
            with seeding.forked(7):
                batches.append(rollout() if base == "ppo" else one.sample(ring(agent)))
                one.update(batches[-1])
                one.advance()
    for key, value in alone.state_dict().items():
        assert torch.equal(agent.base.state_dict()[key], value), key


def test_the_base_sees_the_mixture_of_models_as_they_were_before_the_update() -> None:
    agent, batch, seen = agent_of(), rollout(), []
    errors = agent.run(agent.errors, agent.rows(batch))
    expected = agent.mixture(batch["reward"].flatten(), errors).view(2, 16)
    update = agent.base.update
    agent.base.__dict__["update"] = lambda b: (seen.append(b), update(b))[1]
    agent.update(batch)
    torch.testing.assert_close(seen[0]["reward"], expected)
    after = agent.run(agent.errors, agent.rows(batch))
    assert not torch.allclose(after["state"], errors["state"])
    assert torch.equal(batch["reward"], rollout()["reward"])  # nothing mixed is written back


def test_shuffling_a_sampled_batch_permutes_its_rewards() -> None:
    agent = agent_of("dqn")
    rows = agent.rows(agent.sample(ring(agent)))
    order = torch.randperm(8)
    errors = agent.run(agent.errors, rows)
    permuted = agent.run(agent.errors, {k: v[order] for k, v in rows.items()})
    for key in errors:
        torch.testing.assert_close(permuted[key], errors[key][order])


def test_normalised_rewards_are_divided_by_their_deviation_and_stay_positive() -> None:
    agent, batch = agent_of(normalize_rewards=True, beta_state=1.0, beta_reward=0.0), rollout()
    r = agent.intrinsic(agent.run(agent.errors, agent.rows(batch)))["state"]
    mixed = agent.update(batch)["reward/mixed"]
    torch.testing.assert_close(mixed, r.mean() / r.std(correction=0), rtol=1e-3, atol=0)
    assert float(mixed) > 0


def test_statistics_of_observations_move_after_the_update() -> None:
    agent, batch = agent_of(normalize=True), rollout()
    agent.update(batch)
    torch.testing.assert_close(agent.normalizer.mean, batch["obs"].flatten(0, 1).mean(0))
    far = {k: v.clone() for k, v in batch.items()}
    far["obs"][:] = 1e6
    assert float(agent.rows(far)["obs"].max()) == 5.0


# ---- the models ------------------------------------------------------------------------------


def circle(rows: int = 64) -> dict[str, Tensor]:
    """A deterministic world of eight places on a circle; the action says how far to go."""
    g = torch.Generator().manual_seed(0)
    place, action = torch.randint(8, (2, rows), generator=g)
    action = action % 3

    def seen(place: Tensor) -> Tensor:
        angle = place * (2 * np.pi / 8)
        return torch.stack([angle.cos(), angle.sin(), torch.ones(rows)], -1)

    batch = {"obs": seen(place), "action": action, "next_obs": seen(place + action)}
    return batch | {"reward": torch.zeros(rows)}


def test_true_pairs_teach_the_dynamics_and_the_published_pairing_does_not() -> None:
    left = {}
    for pairing in ("true", "shuffled"):
        agent = agent_of(pairing=pairing, forward_weight=0.5, latent=16, learning_rate=3e-3)
        for k in range(500):
            batch = circle()
            order = torch.randperm(64, generator=torch.Generator().manual_seed(k))
            agent.step({key: v[order] for key, v in batch.items()})
        rows = circle()
        error = agent.run(agent.errors, rows)["state"].mean()
        latent = agent.run(agent.curiosity.model.encoder, rows["next_obs"])
        left[pairing] = float(error / latent.var(0).sum())
    assert left["true"] < 0.1  # of the latent's variance
    assert left["shuffled"] > 0.5


@pytest.mark.parametrize("base", ["dqn", "sac"])
def test_replay_learners_also_train_on_the_newest_rows(base: str) -> None:
    agent = agent_of(base, recency=0.75, recent_rows=4)
    buffer = ring(agent)
    spaces = {"observation_space": VECTOR, "action_space": agent.action_space}
    agent.begin_task(config.Task("toy", "toy", env_steps=100, **spaces), buffer)
    batch = agent.sample(buffer)
    assert batch["recent_reward"].shape == (6,)
    assert set(batch["recent_reward"].tolist()) <= {18.0, 19.0}  # the last four of 40 rows
    new = agent.base.collect_every * 2
    torch.testing.assert_close(batch["new_reward"], buffer.take(buffer.newest(new))["reward"])
    seen: list[Tensor] = []
    agent.__dict__["step"] = lambda rows: (
        seen.append(rows["reward"]),
        type(agent).step(agent, rows),
    )[1]
    agent.update(batch)
    assert seen[0].shape == (8,)
    torch.testing.assert_close(seen[0][2:], batch["recent_reward"])


def test_without_recency_the_models_see_replayed_rows_only() -> None:
    agent, seen = agent_of("dqn", recency=0.0), []
    batch = agent.sample(ring(agent))
    assert len(batch["recent_reward"]) == 0
    agent.__dict__["step"] = lambda rows: (seen.append(rows), type(agent).step(agent, rows))[1]
    agent.update(batch)
    assert torch.equal(seen[0]["reward"], batch["reward"])
    assert len(agent_of("dqn", recency=0.01).sample(ring(agent))["recent_reward"]) == 1


# ---- shifts ----------------------------------------------------------------------------------


def walk(agent: Any, shift: str | None, steps: int, seed: int) -> dict[str, Tensor]:
    """A uniform walk over JellyBean, (1, T, ...)."""
    env = envs.make_env("rl_shift/JellyBean-v0", shift=shift)
    rng = seeding.numpy_generator(seed, "walk")
    obs, rows = env.reset(seed=seed)[0], []
    for _ in range(steps):
        action = int(rng.integers(3)) if rng.random() < 0.5 else 0
        following, reward, *_ = env.step(action)
        rows.append((obs, action, reward, following))
        obs = following
    names = ("obs", "action", "reward", "next_obs")
    columns = zip(*rows, strict=True)
    batch = {k: torch.from_numpy(np.array(v)) for k, v in zip(names, columns, strict=True)}
    return {k: (v.float() if k == "reward" else v)[None] for k, v in batch.items()}


def test_errors_wake_up_after_the_shift_that_concerns_them() -> None:
    env = envs.make_env("rl_shift/JellyBean-v0")
    spaces = env.observation_space, env.action_space
    agent = agent_of(spaces=spaces, latent=0, learning_rate=1e-3, model_batch_size=64)
    stationary = agent.rows(walk(agent, None, 1200, 1))
    for _ in range(3):
        agent.learn_models(stationary, {})
    same, colours, flipped = (
        agent.run(agent.errors, agent.rows(walk(agent, shift, 600, 2)))
        for shift in (None, "colour_swap", "reward_flip")
    )
    mean = {k: float(v.mean()) for k, v in same.items()}
    assert float(colours["state"].mean()) > 1.3 * mean["state"]
    assert float(flipped["reward"].mean()) > 1.5 * mean["reward"]
    torch.testing.assert_close(flipped["state"], same["state"])  # it cannot see the reward


def test_reactions_follow_a_detection() -> None:
    agent = agent_of("dqn", react_beta=0.5, react_steps=100, react_explore=True, react_forget=True)
    agent.begin_task(
        config.Task("toy", "toy", env_steps=1000, observation_space=VECTOR, action_space=DISCRETE),
        ring(agent),
    )
    agent.base.updates = 60
    buffer = ring(agent)
    agent.sample(buffer)
    assert agent.base.epsilon < 1 and agent.remembered == 0
    calm = {k: torch.ones(1) for k in ("state", "reward")}
    for detector in agent.detectors.values():
        detector.values["count"] = torch.tensor(1e6)
        detector.values["slow"] = detector.values["fast"] = torch.tensor(1.0)
        detector.values["square"] = torch.tensor(1e-6)
    agent.watch(calm | {"state": torch.full((1,), 50.0)}, torch.ones(1))
    agent.react()
    assert agent.base.epsilon == 1.0
    assert agent.remembered == 40 and float(agent.since) == 0
    reward = torch.ones(1)
    zero = {k: torch.zeros(1) for k in calm}
    assert float(agent.mixture(reward, zero)) == pytest.approx(0.2)  # beta_state is 0.65
    agent.watch(calm, torch.ones(1))
    assert float(agent.since) == 1
    for _ in range(99):
        agent.watch(calm, torch.ones(1))
    assert float(agent.mixture(reward, zero)) == pytest.approx(0.7)
    buffer.extend(ring(agent, 2).take(torch.arange(2)))
    kept = agent.sample(buffer)["index"]
    assert set(kept.tolist()) <= set(buffer.newest(1000).tolist())


def test_ppo_explores_anew_once_the_old_policys_actions_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = agent_of("ppo", react_explore=True)
    head = agent.base.actor_critic.head.linear
    seen: list[bool] = []
    update = agent.base.update
    monkeypatch.setattr(agent.base, "update", lambda b: seen.append(head.weight.any()) or update(b))
    agent.update(rollout())
    assert seen == [True] and head.weight.any()  # nothing was detected
    detected = {"detected": torch.tensor(1.0)}
    for detector in agent.detectors.values():
        monkeypatch.setattr(
            detector, "update", lambda *_, d=detector: d.values.update(detected) or torch.ones(())
        )
    agent.update(rollout())
    assert seen == [True, True] and not head.weight.any() and not head.bias.any()


def test_with_react_fall_a_detection_waits_for_the_reward_to_fall() -> None:
    agent = agent_of("ppo", react_explore=True, react_fall=2.0, react_steps=100)
    head = agent.base.actor_critic.head.linear
    calm = {k: torch.ones(1) for k in ("state", "reward")}
    surprise = calm | {"state": torch.full((1,), 50.0)}
    for detector in agent.detectors.values():
        detector.values["count"] = torch.tensor(1e6)
        detector.values["slow"] = detector.values["fast"] = torch.tensor(1.0)
        detector.values["square"] = torch.tensor(1e-2)
    good, bad = -torch.ones(1), torch.full((1,), -200.0)  # the detector sees minus the reward

    def seen(errors: Any, reward: Any) -> bool:
        agent.watch(errors, reward)
        agent.react()
        return not head.weight.any()

    assert not seen(surprise, good) and agent.pending
    assert seen(calm, bad) and not agent.pending  # the reward fell soon after
    torch.nn.init.ones_(head.weight)
    assert not seen(calm, bad)  # a fall alone is no reason
    agent.detectors["state"].values["score"] = torch.zeros(())
    agent.detectors["fall"].values["fast"] = torch.tensor(1.0)
    assert not seen(surprise, good) and agent.pending
    for _ in range(101):
        seen(calm, good)
    assert not seen(calm, bad) and not agent.pending  # too late


# ---- through the trainer ---------------------------------------------------------------------


def life(base: str, env_id: str, steps: int, state: Any = None, **changes: Any) -> Any:
    env = envs.make_env(env_id)
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    task = config.Task(
        "life", env_id, env_steps=steps, shift="reward_flip:part=all,period=20", **spaces
    )
    agent = agent_of(base, tuple(spaces.values()), **changes)
    run = config.RunConfig(
        "reactive", agent.config, (task,), lanes=2, eval_episodes=1, eval_every=0, save_every=64,
        log_every=32, life_every=2,
    )  # fmt: skip
    saved: list[Any] = []
    logged: list[dict[str, float]] = []
    trainer = Trainer(
        agent,
        [task],
        run,
        log=lambda clock, values: logged.append(values),
        save=lambda clock, state: saved.append(copy.deepcopy(state)),
    )
    if state is not None:
        trainer.load_state(state)
    with seeding.forked(0):
        trainer.run()
    return agent, saved, logged


@pytest.mark.parametrize("base", ["ppo", "dqn"])
def test_a_life_that_was_interrupted_goes_on_bit_for_bit(base: str) -> None:
    changes = {"curiosity": "ride", "normalize_rewards": True, "normalize": True}
    if base == "dqn":
        changes |= {"base_config": {"prioritized": True}}
    agent, saved, logged = life(base, "CartPole-v1", 128, **changes)
    again, _, _ = life(base, "CartPole-v1", 128, state=saved[0], **changes)
    assert saved[0]["clock"]["env_steps"] == 64
    for key, value in agent.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    for key, detector in agent.detectors.items():
        assert torch.equal(again.detectors[key].values["slow"], detector.values["slow"])
    names = {k.rpartition("/")[2] for values in logged for k in values}
    assert {"state_error", "reward_error", "shift_score", "mixed"} <= names


def test_every_base_learns_under_it() -> None:
    agent, _, logged = life("sac", "InvertedPendulum-v5", 64, normalize=True)
    assert agent.base.updates > 0 and agent.updates == agent.base.updates
    assert all(np.isfinite(v) for values in logged for v in values.values())


def test_presets_name_shifts_that_exist() -> None:
    for name in ("colour_swap", "rotation", "reward"):
        run = config.make(preset=f"reactive.{name}")
        task = run.tasks[0]
        assert task.env is not None
        env = envs.make(task.env, 1, shift=task.shift)
        period = 3750
        # three phases, without a rollout that reaches into a fourth
        assert 0 <= run.lanes * period * 3 - task.env_steps < 2048
        assert env.single_observation_space.shape == (11, 11, 3)
    cartpole = config.make(preset="reactive.cartpole").tasks[0]
    assert cartpole.env is not None
    assert envs.make(cartpole.env, 1, shift=cartpole.shift).single_action_space.n == 2  # type: ignore[attr-defined]
