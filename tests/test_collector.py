"""The collector against environments that count: what is stored is what happened."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rl_shift.agent import Agent
from rl_shift.buffer import Buffer, transition_spec
from rl_shift.collector import Collector
from rl_shift.envs import make
from rl_shift.errors import UserError

FIRST_REWARD = 10.0


class Counting(gymnasium.Env):
    """obs = (episode, step); the reward of step t (from 1) is 10 + t; ends after `length` steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, length, truncates, secret=False):
        self.length, self.truncates = length, truncates
        self.episode, self.time = -1, 0
        if secret:
            self.secret = iter(())  # nothing that an export understands

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return self.where(), {}

    def where(self):
        return np.array([self.episode, self.time], np.float32)

    def step(self, action):
        self.time += 1
        ended = self.time == self.length
        reward = FIRST_REWARD + self.time
        return self.where(), reward, ended and not self.truncates, ended and self.truncates, {}


class Player(Agent):
    """Acts by a linear map, and with noise from the learner's stream when it explores."""

    def __init__(self, observation_space, action_space):
        super().__init__(observation_space, action_space, None)
        self.map = torch.nn.Linear(observation_space.shape[0], 1)

    @staticmethod
    def supports(observation_space, action_space):
        return None

    def act(self, obs, explore):
        assert obs.dtype == torch.float32 and not torch.is_grad_enabled()
        action = self.map(obs)
        if explore:
            action = action + torch.randn_like(action)
        discrete = isinstance(self.action_space, spaces.Discrete)
        return (action[:, 0] > 0).long() if discrete else action.clamp(-1, 1)


def player(source=None):
    """A player for the environment of `source`, or for `Counting`."""
    env = source.env.envs[0] if source else Counting
    return Player(env.observation_space, env.action_space)


def collector(lanes, capacity=1000, secret=False, **options):
    """`lanes` gives (length of an episode, whether it ends by truncation) per lane."""
    env = SyncVectorEnv(
        [lambda lane=lane: Counting(*lane, secret=secret) for lane in lanes],
        autoreset_mode=AutoresetMode.SAME_STEP,
    )
    spec = transition_spec(env.single_observation_space, env.single_action_space)
    buffer = Buffer(spec, capacity, len(lanes))
    return Collector(env, buffer, seed=3, **options)


LANES = [(3, False), (4, True), (1, False), (5, True)]


@pytest.mark.parametrize("random", [False, True])
def test_stored_transitions_are_the_ones_that_happened(random):
    source = collector(LANES, task=6)
    finished = {"returns": [], "lengths": []}
    for steps in (1, 7, 30):
        for key, values in source.collect(player(), steps, random=random).items():
            finished[key] += values
    batch = source.buffer.latest(38)
    assert len(source.buffer) == 38 * len(LANES)
    for lane, (length, truncates) in enumerate(LANES):
        time = torch.arange(38) % length
        episode = torch.arange(38) // length
        obs, next_obs = batch["obs"][lane], batch["next_obs"][lane]
        assert torch.equal(obs, torch.stack([episode, time], 1).float())
        # The terminal observation, never the next episode's first: no row joins two episodes.
        assert torch.equal(next_obs, torch.stack([episode, time + 1], 1).float())
        assert torch.equal(batch["reward"][lane], FIRST_REWARD + time + 1)
        ended = time == length - 1
        assert torch.equal(batch["terminated"][lane], ended & (not truncates))
        assert torch.equal(batch["truncated"][lane], ended & truncates)
    assert (batch["task"] == 6).all()
    assert finished["lengths"].count(4) == 38 // 4
    assert sum(finished["lengths"]) == sum(38 // length * length for length, _ in LANES)
    for value, length in zip(finished["returns"], finished["lengths"], strict=True):
        assert value == sum(FIRST_REWARD + k + 1 for k in range(length))


def test_stored_reward_is_transformed_and_the_returns_are_raw():
    source = collector([(2, False)], reward=(0.5, -1.0))
    finished = source.collect(player(), 4)
    assert source.buffer.latest(4)["reward"].tolist() == [[4.5, 5.0, 4.5, 5.0]]
    assert finished == {"returns": [23.0, 23.0], "lengths": [2, 2]}


def test_vector_environment_that_reuses_its_arrays():
    env = SyncVectorEnv(
        [lambda: Counting(3, False)] * 2, copy=False, autoreset_mode=AutoresetMode.SAME_STEP
    )
    spec = transition_spec(env.single_observation_space, env.single_action_space)
    source = Collector(env, Buffer(spec, 100, 2), seed=0)
    source.collect(player(), 10)
    batch = source.buffer.latest(10)
    assert torch.equal(batch["obs"][0, :, 1], (torch.arange(10) % 3).float())
    assert torch.equal(batch["next_obs"][..., 1], batch["obs"][..., 1] + 1)


def test_exploration_and_random_actions():
    torch.manual_seed(0)
    agent, source = player(), collector([(9, False)] * 3)
    source.collect(agent, 5, explore=False)
    batch = source.buffer.latest(5)
    expected = agent.map(batch["obs"]).clamp(-1, 1)
    assert torch.allclose(batch["action"], expected)
    state = torch.get_rng_state()
    source.collect(agent, 200, random=True)
    assert torch.equal(state, torch.get_rng_state())  # random actions are the collector's own
    action = source.buffer.latest(200)["action"].flatten()
    assert action.abs().max() <= 1 and action.abs().mean() == pytest.approx(0.5, abs=0.05)
    source.collect(agent, 1, explore=True)
    assert not torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("lanes", [1, 3])
def test_state_continues_exactly(lanes):
    def begin():
        env = make("CartPole-v1", lanes=lanes, seed=5)
        spec = transition_spec(env.single_observation_space, env.single_action_space)
        return Collector(env, Buffer(spec, 64 * lanes, lanes), seed=5)

    torch.manual_seed(0)
    source = begin()
    agent = player(source)
    source.collect(agent, 20, random=True)
    source.collect(agent, 33)
    saved, rows, noise = source.state(), source.buffer.state(), torch.get_rng_state()

    def onward(source):
        torch.set_rng_state(noise)
        ended = [source.collect(agent, 15, random=True), source.collect(agent, 60)]
        return ended, source.buffer.arrays(), source.steps

    ended, arrays, steps = onward(source)
    resumed = begin()
    resumed.collect(agent, 2)  # a state of its own, to be replaced
    resumed.buffer.load_state(rows)
    assert resumed.load_state(saved) is True
    ended_again, arrays_again, steps_again = onward(resumed)
    assert ended == ended_again and ended[1]["returns"] and steps == steps_again == 128
    assert all(torch.equal(arrays[key], arrays_again[key]) for key in arrays)
    assert arrays["action"].dtype == torch.int64 and set(arrays["action"].tolist()) == {0, 1}
    # The first rows too: seeds alone decide where episodes begin.
    assert torch.equal(first_obs(begin()), first_obs(begin()))


def first_obs(source):
    source.reset()
    return torch.from_numpy(source._obs)


def test_environment_without_export_begins_new_episodes():
    source = collector([(5, False), (7, True)], secret=True)
    source.collect(player(), 3)
    state, rows = source.state(), source.buffer.state()
    resumed = collector([(5, False), (7, True)], secret=True)
    resumed.buffer.load_state(rows)
    assert resumed.load_state(state) is False
    resumed.collect(player(), 4)
    batch = resumed.buffer.latest(7)
    assert batch["obs"][..., 1].tolist() == [[0, 1, 2, 0, 1, 2, 3]] * 2
    assert batch["next_obs"][:, 2, 1].tolist() == [3, 3]
    # No window may run from the interrupted episode into the new one.
    assert batch["truncated"][:, 2].all()
    time = resumed.buffer.windows(200, 3)["obs"][..., 1]
    assert torch.equal(time, time[:, :1] + torch.arange(3))


def test_episodes_of_lanes_begin_differently():
    env = make("CartPole-v1", lanes=2, seed=0)
    spec = transition_spec(env.single_observation_space, env.single_action_space)
    source = Collector(env, Buffer(spec, 10, 2), seed=0)
    first = first_obs(source)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, first_obs(source))  # nothing has happened in between


def test_wrong_pairs_are_refused():
    env = SyncVectorEnv([lambda: Counting(3, False)] * 2)
    spec = transition_spec(env.single_observation_space, env.single_action_space)
    with pytest.raises(ValueError, match="SAME_STEP"):
        Collector(env, Buffer(spec, 10, 2), seed=0)
    env = make("CartPole-v1", lanes=2)
    with pytest.raises(ValueError, match="2 environments write into a buffer of 3 lanes"):
        Collector(env, Buffer(spec, 12, 3), seed=0)
    stacked = player()
    stacked.seeds = 2
    with pytest.raises(UserError, match="--seeds K"):
        collector([(3, False)]).collect(stacked, 1)
