"""Evaluation: whole episodes with seeds of their own, no trace in the training."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn
from torch.func import functional_call, vmap

from rl_shift import evaluation, seeding
from rl_shift.envs import make_env
from rl_shift.errors import UserError
from rl_shift.evaluation import Evaluator, Result, evaluate

COUNT = "rl_shift_tests/Count-v0"
ENDLESS = "rl_shift_tests/Endless-v0"
SWITCH = "rl_shift_tests/Switch-v0"


class Count(gymnasium.Env):
    """Ends after a number of steps that the reset seed decides; rewards depend on the action."""

    observation_space = Box(-1e6, 1e6, (3,), np.float32)
    action_space = Box(-2.0, 2.0, (1,), np.float32)
    steps_taken = 0  # over all instances

    def __init__(self, endless=False):
        self.endless = endless

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.length = 0, int(self.np_random.integers(1, 30))
        self.offset = float(self.np_random.normal())
        return self._obs(), {}

    def step(self, action):
        assert self.endless or self.t < self.length, "stepped after its end"
        Count.steps_taken += 1
        self.t += 1
        reward = float(action[0]) * self.t + 100 * self.offset
        ended = not self.endless and self.t == self.length
        return self._obs(), reward, ended and self.length % 2 == 0, ended, {}

    def _obs(self):
        return np.array([self.t / 30, self.offset, self.t % 3], np.float32)


class Switch(Count):
    """The same with discrete actions."""

    action_space = Discrete(3)

    def step(self, action):
        assert type(action) is int
        return super().step([action])


@pytest.fixture(autouse=True)
def registered():
    gymnasium.register(COUNT, Count)
    gymnasium.register(ENDLESS, Count, kwargs={"endless": True})
    gymnasium.register(SWITCH, Switch)
    Count.steps_taken = 0
    yield
    for name in (COUNT, ENDLESS, SWITCH):
        del gymnasium.registry[name]


class Fake(nn.Module):
    """What evaluation needs of an agent; `weights` has a leading seed axis when stacked."""

    def __init__(self, weights, noise=0.0, discrete=False, width=3):
        super().__init__()
        self.weights = nn.Parameter(torch.as_tensor(weights, dtype=torch.float32))
        self.observation_space = Box(-1e6, 1e6, (width,), np.float32)
        self.seeds = len(weights) if self.weights.ndim == 2 else 1
        self.noise, self.discrete = noise, discrete
        self.dropout = nn.Dropout(0.5)
        self.shapes = []

    def act(self, obs, explore):
        assert not explore
        self.shapes.append(tuple(obs.shape))
        obs = self.dropout(obs)
        value = (obs * self.weights).sum(-1, keepdim=True).tanh()
        if self.noise:
            value = value + self.noise * torch.randn_like(value)
        return (1 + value[..., 0]).round().long() if self.discrete else value

    def forward(self, obs):
        return self.act(obs, False)

    def run(self, fn, *data):
        with torch.no_grad():
            if self.seeds == 1:
                return fn(*data)
            return vmap(lambda w, x: functional_call(self, {"weights": w}, (x,)))(
                self.weights, data[0]
            )


WEIGHTS = [0.7, -0.4, 0.2]


def played(agent, env_id, seed, episodes):
    """Return and length of each episode, one at a time with batches of one."""
    env, results = make_env(env_id), []
    agent.eval()
    for i in range(episodes):
        obs, total, length, ended = env.reset(seed=seeding.child(seed, "episode", i))[0], 0.0, 0, 0
        while not ended:
            action = agent.run(agent.act, torch.from_numpy(obs[None].copy()), False)[0]
            action = int(action) if agent.discrete else action.numpy()
            obs, reward, terminated, truncated, _ = env.step(action)
            total, length, ended = total + float(reward), length + 1, terminated or truncated
        results.append((total, length))
    env.close()
    return map(np.array, zip(*results, strict=True))


@pytest.mark.parametrize("env_id", [COUNT, SWITCH])
@pytest.mark.parametrize("lanes", [1, 3, 10, 40])
def test_equals_one_episode_at_a_time(env_id, lanes):
    agent = Fake(WEIGHTS, discrete=env_id == SWITCH)
    returns, lengths = played(agent, env_id, seed=5, episodes=23)
    Count.steps_taken = 0
    result = evaluate(agent, env_id, episodes=23, seed=5, lanes=lanes)
    np.testing.assert_allclose(result.returns, returns[None], rtol=1e-5)
    np.testing.assert_array_equal(result.lengths, lengths[None])
    assert result.returns.dtype == np.float64
    assert (result.env_id, result.seed, result.score) == (env_id, 5, None)
    # lanes at rest are not stepped, and all lanes share each forward pass
    assert Count.steps_taken == lengths.sum()
    batches = agent.shapes[lengths.sum() :]
    assert set(batches) == {(min(lanes, 23), 3)}
    assert len(batches) <= lengths.sum() / min(lanes, 23) + 2 * 30


@pytest.mark.parametrize("weights", [WEIGHTS, [WEIGHTS, [0.0, 1.0, 0.0]]])
def test_diagnostics_are_means_over_the_steps_that_were_played(weights):
    agent = Fake(weights)
    plain = evaluate(agent, COUNT, episodes=7, seed=1, lanes=3)
    agent.diagnostics = lambda obs: {"time": obs[..., 0] * 30}
    agent.forward = lambda obs: agent.diagnostics(obs) if told.pop(0) else agent.act(obs, False)
    told = [False, True] * 1000  # under vmap the fake cannot tell the two questions apart
    result = evaluate(agent, COUNT, episodes=7, seed=1, lanes=3, diagnose=True)
    assert np.array_equal(result.returns, plain.returns) and plain.diagnostics == {}
    lengths = result.lengths
    expected = (lengths * (lengths - 1) / 2).sum(axis=1) / lengths.sum(axis=1)
    assert np.allclose(result.diagnostics["time"], expected)


def test_short_episodes_are_not_preferred():
    """The first n to finish would be the shortest; ours are the n that were drawn."""
    agent = Fake(WEIGHTS)
    long = evaluate(agent, COUNT, episodes=60, lanes=60).lengths[0]
    np.testing.assert_array_equal(
        evaluate(agent, COUNT, episodes=20, lanes=7).lengths[0], long[:20]
    )


def test_stacked_seeds_equal_separate_ones():
    weights = [WEIGHTS, [-0.1, 0.9, 0.5]]
    stacked = evaluate(Fake(weights), COUNT, episodes=8, seed=2, lanes=3)
    for k, own in enumerate(weights):
        alone = evaluate(Fake(own), COUNT, episodes=8, seed=2, lanes=3)
        np.testing.assert_allclose(stacked.returns[k], alone.returns[0], rtol=1e-6)
        np.testing.assert_array_equal(stacked.lengths[k], alone.lengths[0])
    assert stacked.returns.shape == (2, 8)


def test_training_is_left_alone():
    agent = Fake(WEIGHTS, noise=0.3)
    agent.dropout.eval()
    agent.train(False)
    agent.training = True  # a mixture of modes
    torch.manual_seed(3)
    before = torch.get_rng_state()
    evaluate(agent, COUNT, episodes=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert agent.training and not agent.dropout.training

    agent.train()
    with pytest.raises(RuntimeError, match="broken"):
        agent.run = lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))
        evaluate(agent, COUNT, episodes=4)
    assert torch.equal(torch.get_rng_state(), before) and agent.dropout.training


@pytest.mark.parametrize("env_id", [COUNT, "Hopper-v4"])
def test_repeatable_whatever_came_before(env_id):
    width = make_env(env_id).observation_space.shape[0]
    agent = Fake([0.5] * width, noise=0.5, width=width)
    with Evaluator(env_id, lanes=3) as evaluator:
        first = evaluator.evaluate(agent, episodes=5, seed=1)
        other = evaluator.evaluate(agent, episodes=4, seed=2)
        torch.manual_seed(99)
        again = evaluator.evaluate(agent, episodes=5, seed=1)
    np.testing.assert_array_equal(first.returns, again.returns)
    assert not np.array_equal(first.returns[:, :4], other.returns)
    np.testing.assert_array_equal(
        first.returns, evaluate(agent, env_id, episodes=5, seed=1, lanes=3).returns
    )


def test_actions_are_rescaled_and_clipped_as_in_training():
    agent = Fake([3.0, -3.0, 3.0])  # Pendulum's box is [-2, 2]
    agent.act = lambda obs, explore: (obs * agent.weights).sum(-1, keepdim=True)
    returns, lengths = played(agent, "Pendulum-v1", seed=0, episodes=3)
    result = evaluate(agent, "Pendulum-v1", episodes=3)
    np.testing.assert_allclose(result.returns[0], returns, rtol=1e-4)
    np.testing.assert_array_equal(result.lengths[0], lengths)  # TimeLimit's 200


def test_discrete_gymnasium_environment():
    agent = Fake([0.1, 0.4, 2.0, 1.0], width=4)
    agent.act = lambda obs, explore: ((obs * agent.weights).sum(-1) > 0).long()
    result = evaluate(agent, "CartPole-v1", episodes=3)
    np.testing.assert_array_equal(result.returns, result.lengths)
    assert result.returns.min() > 50


def test_appended_zeros():
    agent = Fake([*WEIGHTS, 5.0, 5.0], width=5)
    padded = evaluate(agent, COUNT, episodes=3, obs_pad=2)
    plain = evaluate(Fake(WEIGHTS), COUNT, episodes=3)
    np.testing.assert_allclose(padded.returns, plain.returns, rtol=1e-6)
    with pytest.raises(UserError, match=r"\(3,\), the agent was built for \(5,\)"):
        evaluate(agent, COUNT, episodes=3)
    with pytest.raises(UserError, match="with 1 zeros appended"):
        evaluate(agent, COUNT, episodes=3, obs_pad=1)


def test_an_endless_environment_is_cut():
    evaluator = Evaluator(ENDLESS, lanes=2, max_steps=50)
    result = evaluator.evaluate(Fake(WEIGHTS), episodes=3)
    np.testing.assert_array_equal(result.lengths, [[50, 50, 50]])
    evaluator.close()


def test_shifted_environments_are_made_anew(monkeypatch):
    made = []

    def make(env_id, shift, obs_pad):
        made.append(shift)
        return make_env(env_id)

    monkeypatch.setattr(evaluation, "make_env", make)
    for shift, count in ((None, 3), ("ramp", 6)):
        made.clear()
        evaluator = Evaluator(COUNT, lanes=3, shift=shift)
        for _ in range(2):
            evaluator.evaluate(Fake(WEIGHTS), episodes=5)
        assert made == [shift] * count


def test_at_least_one_episode():
    with pytest.raises(UserError, match="at least one episode, got 0"):
        evaluate(Fake(WEIGHTS), COUNT, episodes=0)


def test_normalized_scores():
    hopper = (-20.272305, 3234.3)  # specs of D4RL
    assert evaluation.normalized_score(3234.3, *hopper) == 100
    assert evaluation.normalized_score(-20.272305, *hopper) == 0
    assert evaluation.normalized_fraction(1606.9, *hopper) == pytest.approx(0.5, abs=1e-4)
    returns = np.array([[100.0, 200.0], [300.0, 500.0]])
    assert evaluation.normalized_spread(returns.std(), *hopper) == pytest.approx(
        evaluation.normalized_score(returns, *hopper).std()
    )
    result = evaluate(Fake([WEIGHTS] * 2), COUNT, episodes=4, reference_scores=(-50.0, 150.0))
    np.testing.assert_allclose(result.score, (result.returns.mean(1) + 50) / 2)
    assert result.score.shape == (2,)


def test_differences_need_equal_episodes():
    one = Result(np.array([[3.0, 4.0]]), np.array([[1, 1]]), None, "A-v0", 7)
    two = replace(one, returns=np.array([[1.0, 5.0]]))
    np.testing.assert_array_equal(evaluation.differences(one, two), [[2.0, -1.0]])
    for other in (replace(two, seed=8), replace(two, env_id="B-v0")):
        with pytest.raises(UserError, match="cannot be paired"):
            evaluation.differences(one, other)
    with pytest.raises(UserError, match="cannot be paired"):
        evaluation.differences(one, replace(two, returns=np.zeros((1, 3))))
