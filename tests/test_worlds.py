"""JellyBean and InfCartPole against the published rules, and exact continuation."""

import math
import warnings
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from gymnasium.utils.env_checker import check_env
from torch import Tensor

from rl_shift.agent import Agent
from rl_shift.buffer import Buffer, transition_spec
from rl_shift.collector import Collector
from rl_shift.envs import env_state, make, make_env, set_env_state
from rl_shift.envs.cartpole import InfCartPole
from rl_shift.envs.jellybean import AGENT_COLOUR, RADIUS, SCENT_STEPS, JellyBean, _diffusion
from rl_shift.errors import UserError
from rl_shift.evaluation import evaluate
from rl_shift.life import Life
from rl_shift.seeding import child

FORWARD, LEFT, RIGHT = 0, 1, 2


def jellybean(seed: int = 0, **options: Any) -> JellyBean:
    env = JellyBean(**options)
    env.reset(seed=seed)
    return env


def walk(env: JellyBean, actions: list[int]) -> list[Any]:
    return [env.step(action) for action in actions]


# ---- JellyBean ---------------------------------------------------------------------------------


def test_item_frequencies_are_those_of_the_independent_field() -> None:
    env = jellybean()
    patches = np.array([env.patch(px, py) for px in range(-12, 12) for py in range(-12, 12)])
    share = math.exp(-2) / (1 + 2 * math.exp(-2))
    assert share == pytest.approx(0.10651, abs=1e-5)
    error = math.sqrt(share * (1 - share) / patches.size)
    for item in (1, 2):
        assert abs((patches == item).mean() - share) < 4 * error


def test_the_world_does_not_depend_on_the_route() -> None:
    there, back = jellybean(3), jellybean(3)
    assert np.array_equal(there.patch(-2, 5), back.patch(-2, 5))
    walk(there, [FORWARD] * 100 + [LEFT] + [FORWARD] * 100)
    walk(back, [LEFT] + [FORWARD] * 100 + [RIGHT] + [FORWARD] * 100 + [LEFT])
    assert (there.x, there.y, there.heading) == (back.x, back.y, back.heading) == (-100, 100, 3)
    assert not np.array_equal(jellybean(4).patch(-2, 5), back.patch(-2, 5))
    assert jellybean(3).cells[64 + 0, 64 + 0] == 0  # the start is empty


def test_moving_and_turning_shift_and_turn_the_view() -> None:
    env = jellybean(1)
    rng = np.random.default_rng(0)
    old = env.reset(seed=1)[0].astype(int)
    centre = (RADIUS, RADIUS)
    for _ in range(300):
        action = int(rng.integers(3))
        new, reward, terminated, _, info = env.step(action)
        new = new.astype(int)
        assert not terminated
        assert np.array_equal(new[centre], AGENT_COLOUR)
        expected = {FORWARD: old, LEFT: np.rot90(old, 3), RIGHT: np.rot90(old, 1)}[action]
        seen, before = (new[:, :-1], expected[:, 1:]) if action == FORWARD else (new, expected)
        differs = (seen != before).any(-1)
        differs[RADIUS, RADIUS] = False  # the agent
        if action == FORWARD:
            differs[RADIUS, RADIUS - 1] = False  # where it came from
            ahead = old[RADIUS, RADIUS + 1]
            assert reward == ahead[1] - ahead[0]  # green is good, red is bad
            assert info["item"] == (1 if ahead[1] else 2 if ahead[0] else 0)
        assert not differs.any()
        old = new


def test_the_cell_to_the_right_lies_to_the_right() -> None:
    env = jellybean(5)
    before = env._observation()[RADIUS + 1, RADIUS].copy()
    reward = walk(env, [RIGHT, FORWARD])[-1][1]
    assert reward == int(before[1]) - int(before[0])


def test_collected_cells_stay_empty_far_beyond_what_is_held_in_memory() -> None:
    env = jellybean(2)
    walk(env, [FORWARD] * 60)
    counts = list(env.counts)
    assert sum(counts) > 0
    walk(env, [LEFT] + [FORWARD] * 200 + [LEFT, LEFT] + [FORWARD] * 200 + [RIGHT, FORWARD])
    assert (env.x, env.y) == (0, 59)
    counts = list(env.counts)
    walk(env, [FORWARD] * 59)  # down the first column again
    assert env.counts == counts
    assert env.cells.nbytes == 160 * 160


def test_memory_is_one_bit_per_cell_of_the_patches_where_something_was_taken() -> None:
    env = jellybean(3)
    walk(env, [FORWARD] * 3200)
    assert len(env.collected) <= 101 and {len(b) for b in env.collected.values()} == {128}
    assert sum(b.bit_count() for b in map(int.from_bytes, env.collected.values())) == sum(
        env.counts
    )
    state = env.state()
    assert state["collected"].shape == (len(env.collected), 128)


def test_only_the_horizon_truncates_and_the_life_goes_on() -> None:
    env = jellybean(0, horizon=50)
    steps = walk(env, [FORWARD] * 100)
    assert [k + 1 for k, s in enumerate(steps) if s[3]] == [50, 100]
    last, counts = steps[-1][0], list(env.counts)
    obs, _ = env.reset()
    assert np.array_equal(obs, last) and env.counts == counts and env.y == 100
    env.reset(seed=0)
    assert (env.x, env.y, env.counts) == (0, 0, [0, 0, 0])


def test_random_and_greedy_walks_earn_what_is_known() -> None:
    rng = np.random.default_rng(0)
    random = jellybean(7)
    assert abs(np.mean([random.step(int(a))[1] for a in rng.integers(3, size=4000)])) < 0.03
    greedy = jellybean(7)
    total = sum(greedy.step(_towards_green(greedy))[1] for _ in range(1500))
    assert 0.2 < total / 1500 < 0.3  # 0.250 over 15,000 steps


def _towards_green(env: JellyBean) -> int:
    """First step of the shortest path to a visible banana around the onions."""
    view = env._observation()
    green, red = view[..., 1] == 1, view[..., 0] == 1
    # heading 0 in the view: axis 0 to the right, axis 1 ahead
    start = (RADIUS, RADIUS, 0)
    queue, first = deque([start]), {start: -1}
    while queue:
        i, j, h = state = queue.popleft()
        for action, turn in ((FORWARD, 0), (LEFT, 3), (RIGHT, 1)):
            dx, dy = ((0, 1), (1, 0), (0, -1), (-1, 0))[h] if action == FORWARD else (0, 0)
            following = (i + dx, j + dy, (h + turn) % 4)
            x, y, _ = following
            if not (0 <= x <= 10 and 0 <= y <= 10) or red[x, y] or following in first:
                continue
            first[following] = action if state == start else first[state]
            if green[x, y]:
                return first[following]
            queue.append(following)
    return FORWARD


def test_the_scent_of_one_item_is_the_diffusion_and_fades_when_taken() -> None:
    field = _diffusion()
    assert field[0, 0, 0] == 1 and field[0].sum() == 1
    assert field[1, 0, 0] == pytest.approx(1.4) and field[1, 0, 1] == pytest.approx(0.14)
    # the steady state solves (1 - 0.4) S = 0.14 (neighbours) + delta
    steady = field[SCENT_STEPS - 1]
    assert 0.6 * steady[0, 0] == pytest.approx(0.14 * 4 * steady[0, 1] + 1, abs=1e-9)
    env = jellybean(0, scent=True)
    env.cells[:] = 0
    i, j = env.x - env.origin[0], env.y - env.origin[1]
    env.cells[i, j + 1] = 1
    assert env._observation()["scent"] == pytest.approx([0, steady[0, 1], 0])
    smelt = walk(env, [FORWARD])[-1][0]["scent"]
    assert smelt == pytest.approx([0, steady[0, 0] - field[0, 0, 0], 0])
    assert walk(env, [LEFT] * 3)[-1][0]["scent"][1] < smelt[1]


@pytest.mark.parametrize("scent", [False, True])
def test_a_life_resumes_exactly(scent: bool) -> None:
    rng = np.random.default_rng(0)
    actions = [int(a) for a in rng.choice(3, size=600, p=[0.8, 0.1, 0.1])]
    whole = make_env("rl_shift/JellyBean-v0", scent=scent, horizon=70)
    whole.reset(seed=9)
    for action in actions[:400]:
        whole.step(action)
    fresh = make_env("rl_shift/JellyBean-v0", scent=scent, horizon=70)
    set_env_state(fresh, env_state(whole))
    for action in actions[400:]:
        left, right = whole.step(action), fresh.step(action)
        assert np.array_equal(left[0], right[0]) and left[1:4] == right[1:4]


def test_lanes_live_in_worlds_of_their_own() -> None:
    env = make("rl_shift/JellyBean-v0", lanes=2, seed=0)
    obs, _ = env.reset()
    assert obs.shape == (2, 11, 11, 3) and obs.dtype == np.uint8
    assert not np.array_equal(obs[0], obs[1])


def test_gymnasium_accepts_the_worlds() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises on spaces, which is a matter of taste
        for kind in (JellyBean, InfCartPole):
            check_env(kind(render_mode="rgb_array"))


def test_the_picture_shows_ahead_above() -> None:
    env = jellybean(11, render_mode="rgb_array")
    picture = env.render()
    assert picture is not None and picture.shape == (264, 264, 3)
    ahead = env._observation()[RADIUS, RADIUS + 1]
    cell = picture[4 * 24, 5 * 24]
    assert np.array_equal(cell > 0, ahead > 0) or not ahead.any() and (cell == 255).all()


def test_a_negative_horizon_is_refused() -> None:
    with pytest.raises(UserError, match="horizon"):
        JellyBean(horizon=-1)


# ---- InfCartPole -------------------------------------------------------------------------------


def cartpole(position: list[float], **parameters: Any) -> InfCartPole:
    env = InfCartPole(**parameters)
    env.reset(seed=0)
    env.position = list(position)
    return env


def test_the_equations_of_motion() -> None:
    env = cartpole([0.1, 0.2, 0.05, -0.3])
    obs, reward, *_ = env.step(1)
    sin, cos = math.sin(0.05), math.cos(0.05)
    tmp = (10 + 0.1 * 0.5 * 0.09 * sin) / 1.1
    theta_acc = (9.8 * sin - cos * tmp) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    x_acc = tmp - 0.1 * 0.5 * theta_acc * cos / 1.1
    expected = [0.104, 0.2 + 0.02 * x_acc, 0.05 - 0.006, -0.3 + 0.02 * theta_acc]
    np.testing.assert_allclose(obs, expected, rtol=1e-6)
    degrees = math.degrees(0.044)
    assert reward == pytest.approx(1 - 0.104**2 / 11.52 - degrees**2 / 288)


def test_it_never_ends_and_keeps_to_its_track() -> None:
    env, rng = cartpole([0, 0, 0, 0]), np.random.default_rng(0)
    fallen = 0
    for action in rng.integers(2, size=5000):
        obs, _, terminated, truncated, info = env.step(int(action))
        assert not terminated and truncated == info["hidden_reset"] and abs(obs[0]) <= 2.4 + 1e-6
        assert 0 <= obs[2] <= 2 * math.pi + 1e-6
        fallen += truncated
    assert fallen > 0
    env = cartpole([2.39, 3.0, 0.0, 0.0])
    obs = env.step(1)[0]
    assert obs[0] == pytest.approx(2.4) and obs[1] == 0.0


@pytest.mark.parametrize(("theta", "speed"), [(math.pi - 0.01, 2.0), (math.pi + 0.01, -2.0)])
def test_a_fallen_pole_starts_anew(theta: float, speed: float) -> None:
    env = cartpole([0.3, 0.0, theta, speed])
    obs, reward, terminated, truncated, info = env.step(0)
    assert truncated and not terminated and info["hidden_reset"]
    assert obs[2] == pytest.approx(theta + 0.02 * speed)  # true to the last
    assert obs[3] == pytest.approx(speed, abs=0.5)
    start, _ = env.reset()
    assert min(start[2], 2 * math.pi - start[2]) <= 0.05
    assert np.array_equal(start[:2], obs[:2])  # the cart goes on
    degrees = math.degrees(min(env.position[2], 2 * math.pi - env.position[2]))
    assert reward == pytest.approx(1 - start[0] ** 2 / 11.52 - degrees**2 / 288)
    assert env.time == 1
    env = cartpole([0.0, 0.0, theta, speed], horizon=1)
    *_, truncated, info = env.step(0)
    assert truncated and not info["hidden_reset"]  # the horizon ends an evaluation's episode


def test_learners_never_see_a_pair_that_straddles_a_fall() -> None:
    env = make("rl_shift/InfCartPole-v0", lanes=2, shift="parameters:force=-10,period=100")
    spec = transition_spec(env.single_observation_space, env.single_action_space)
    buffer, life = Buffer(spec, 2000, 2), Life(40)
    collector = Collector(env, buffer, seed=0, life=life)
    collector.collect(SimpleNamespace(seeds=1), 500, random=True)  # type: ignore[arg-type]
    rows = {k: v.numpy() for k, v in buffer.latest(500).items()}
    fell = rows["truncated"]
    assert fell.sum() > 6 and not rows["terminated"].any()
    follows = (rows["next_obs"][:, :-1] == rows["obs"][:, 1:]).all(-1)
    assert np.array_equal(follows, ~fell[:, :-1])
    last, start = rows["next_obs"][:, :-1][fell[:, :-1]], rows["obs"][:, 1:][fell[:, :-1]]
    assert (abs(last[:, 2] - math.pi) < 0.5).all() and (np.cos(start[:, 2]) > 0.99).all()
    moved = rows["next_obs"][..., 2] - rows["obs"][..., 2] - 0.02 * rows["obs"][..., 3]
    assert (abs((moved + math.pi) % (2 * math.pi) - math.pi) < 1e-4).all()  # Euler, in every row
    # The life and its shift go on: a regime for every 100 steps of a lane, and every reward counts.
    points = life.rows(2)
    assert points["regime"] == [t // 5 % 2 for t in range(25)]
    assert np.mean(points["reward"]) == pytest.approx(rows["reward"].mean(), abs=1e-4)


def test_an_evaluation_goes_on_where_a_pole_falls() -> None:
    class Left:
        """Pushes to the left whatever it sees."""

        seeds, observation_space = 1, Box(-np.inf, np.inf, (4,), np.float32)
        modules = parameters = buffers = list
        diagnostics = Agent.diagnostics

        def eval(self) -> None: ...

        def act(self, obs: Tensor, explore: bool) -> Tensor:
            return torch.zeros(len(obs), dtype=torch.int64)

        def run(self, fn: Any, *data: Any) -> Tensor:
            return fn(*data)

    agent: Any = Left()
    result = evaluate(agent, "rl_shift/InfCartPole-v0", episodes=1, seed=3)
    assert result.lengths.tolist() == [[10_000]]
    env = make_env("rl_shift/InfCartPole-v0")
    env.reset(seed=child(3, "episode", 0))
    total, falls = 0.0, 0
    for _ in range(10_000):
        _, reward, _, _, info = env.step(0)
        total, falls = total + float(reward), falls + info["hidden_reset"]
    assert falls > 10 and result.returns[0, 0] == pytest.approx(total)


def test_the_picture_shows_cart_and_pole() -> None:
    env = InfCartPole(render_mode="rgb_array")
    env.reset(seed=0)
    env.position = [1.0, 0.0, math.pi / 2, 0.0]
    picture = env.render()
    assert picture is not None and picture.shape == (480, 640, 3)
    assert (picture[248, 420] == 60).all()  # the cart, a metre to the right of the middle
    assert tuple(picture[240, 515]) == (202, 152, 101)  # the pole lies to the right
    assert (picture[100] == 255).all() and (picture[240, 100] == 0).all()
    assert InfCartPole().render() is None


def test_a_negative_force_swaps_the_actions() -> None:
    plain, inverted = cartpole([0, 0, 0.02, 0]), cartpole([0, 0, 0.02, 0], force=-10)
    for action in (0, 1, 1, 0, 1):
        assert np.array_equal(plain.step(action)[0], inverted.step(1 - action)[0])


def test_parameters_are_floats_and_unknown_ones_are_named() -> None:
    env = InfCartPole(length=1, cart_mass=2)
    assert env.parameters == {
        "gravity": 9.8, "cart_mass": 2.0, "pole_mass": 0.1, "length": 1.0, "force": 10.0
    }  # fmt: skip
    assert all(type(value) is float for value in env.parameters.values())
    with pytest.raises(UserError, match=r"no parameter 'forse', did you mean 'force'\?"):
        InfCartPole(forse=3)
    with pytest.raises(UserError, match="length must be more than 0"):
        InfCartPole(length=0)
    with pytest.raises(UserError, match="gravity must be a finite number"):
        InfCartPole(gravity=math.nan)
    with pytest.raises(UserError, match="raw or sincos"):
        InfCartPole(angle_obs="degrees")


def test_sine_and_cosine_do_not_jump() -> None:
    env = InfCartPole(angle_obs="sincos")
    obs, _ = env.reset(seed=0)
    assert obs.shape == (5,)
    assert obs[2] ** 2 + obs[3] ** 2 == pytest.approx(1)


def test_a_cart_pole_resumes_exactly() -> None:
    whole, fresh = make_env("rl_shift/InfCartPole-v0"), make_env("rl_shift/InfCartPole-v0")
    whole.reset(seed=1)
    rng = np.random.default_rng(0)
    for action in rng.integers(2, size=300):
        whole.step(int(action))
    set_env_state(fresh, env_state(whole))
    for action in rng.integers(2, size=300):
        left, right = whole.step(int(action)), fresh.step(int(action))
        assert np.array_equal(left[0], right[0]) and left[1] == right[1]
