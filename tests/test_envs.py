"""Environments as agents see them, their errors, and exact export of their state."""

import logging
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from rl_shift.envs import env_state, make, make_env, set_env_state
from rl_shift.errors import UserError


class Probe(gymnasium.Env[Any, Any]):
    """Counts steps; remembers the actions it was given."""

    def __init__(self, observation_space: Any = None, action_space: Any = None) -> None:
        self.observation_space = observation_space or spaces.Box(-1, 1, (2,), np.float64)
        self.action_space = action_space or spaces.Box(
            np.array([-2.0, 0.0], np.float32), np.array([2.0, 4.0], np.float32)
        )
        self.count = 0
        self.given: Any = None

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.count = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        self.given = action
        return self.observation_space.sample(), 7.5, False, False, {}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Any:
    gymnasium.register("rl_shift_test/Probe-v0", entry_point=Probe, max_episode_steps=50)
    yield
    gymnasium.registry.pop("rl_shift_test/Probe-v0")


def rollout(env: gymnasium.Env[Any, Any], actions: list[Any]) -> list[Any]:
    rows: list[Any] = []
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((np.asarray(obs).tobytes(), reward, terminated, truncated))
        if terminated or truncated:
            rows.append(np.asarray(env.reset()[0]).tobytes())
    return rows


def test_float32_observations_unit_actions_and_raw_rewards() -> None:
    env = make_env("rl_shift_test/Probe-v0")
    obs, _ = env.reset(seed=0)
    assert obs.dtype == np.float32 and env.observation_space.dtype == np.float32
    assert isinstance(env.action_space, spaces.Box)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    for action, expected in (([-1, -1], [-2, 0]), ([1, 0.5], [2, 3]), ([9, -9], [2, 0])):
        _, reward, _, _, _ = env.step(np.array(action, np.float32))
        assert np.allclose(env.unwrapped.given, expected)  # type: ignore[attr-defined]
        assert reward == 7.5


def test_a_unit_box_passes_actions_through_bit_for_bit() -> None:
    env = make_env("rl_shift_test/Probe-v0", action_space=spaces.Box(-1, 1, (2,), np.float32))
    env.reset(seed=0)
    action = np.array([0.1, -0.7], np.float32)
    env.step(action)
    assert np.array_equal(env.unwrapped.given, action)  # type: ignore[attr-defined]


def test_dict_observations_are_flattened_and_images_stay() -> None:
    parts = spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": spaces.Discrete(4)})
    env = make_env("rl_shift_test/Probe-v0", observation_space=parts)
    assert env.observation_space.shape == (7,)
    assert env.reset(seed=0)[0].shape == (7,)
    image = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    env = make_env("rl_shift_test/Probe-v0", observation_space=image)
    assert env.observation_space == image and env.reset(seed=0)[0].dtype == np.uint8


def test_d4rl_ant_width() -> None:
    env = make_env("Ant-v4", obs_pad=84)
    obs, _ = env.reset(seed=0)
    assert env.observation_space.shape == obs.shape == (111,)
    assert (obs[27:] == 0).all() and (obs[:27] != 0).any() and obs.dtype == np.float32


def test_v4_ids_are_made_without_a_deprecation_warning(recwarn: Any) -> None:
    make_env("Hopper-v4").close()
    assert not recwarn.list


def test_an_id_can_name_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rl_shift_probe_module.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('ProbeTwo-v0', 'gymnasium.envs.classic_control:CartPoleEnv')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    env = make_env("rl_shift_probe_module:ProbeTwo-v0")
    assert env.observation_space.shape == (4,)
    gymnasium.registry.pop("ProbeTwo-v0")


@pytest.mark.parametrize(
    ("id", "words"),
    [
        ("Hoper-v4", ["unknown", "Hopper-v4"]),
        ("halfcheetah-v4", ["unknown", "HalfCheetah-v4"]),
        ("Hopper-v9", ["unknown", "Hopper-v5"]),
        ("Hopper-v3", ["mujoco-py", "Hopper-v4 or Hopper-v5"]),
        ("HalfCheetah-v2", ["mujoco-py", "HalfCheetah-v4 or HalfCheetah-v5"]),
        ("qqqqqqqq", ["unknown", "rl-shift list envs"]),
        ("no_such_module:Foo-v0", ["no_such_module", "install"]),
    ],
)
def test_bad_ids_say_what_to_do(id: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make_env(id)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in [id, *words])


def test_mujoco_warnings_go_to_logging_not_into_the_folder(
    in_empty_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    env = make_env("Hopper-v5", terminate_when_unhealthy=False)
    env.reset(seed=0)
    env.unwrapped.data.qvel[:] = 1e12  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "rl_shift.mujoco"):
        env.step(np.zeros(3, np.float32))
    assert "MuJoCo" in caplog.text
    assert not list(in_empty_folder.iterdir())


# Ant reads body positions that lag behind qpos; CartPole is no MuJoCo task.
@pytest.mark.parametrize("id", ["HalfCheetah-v5", "Hopper-v5", "Ant-v5", "CartPole-v1"])
def test_a_restored_environment_continues_bitwise(id: str) -> None:
    first, second = make_env(id), make_env(id)
    first.action_space.seed(0)
    first.reset(seed=3)
    actions = [first.action_space.sample() for _ in range(160)]
    rollout(first, actions[:23])
    state = env_state(first)
    set_env_state(second, state)
    # The first goes on before the second starts: the state must be a copy.
    expected = rollout(first, actions[23:])
    assert rollout(second, actions[23:]) == expected
    assert (first.action_space.sample() == second.action_space.sample()).all()


def test_elapsed_steps_are_part_of_the_state() -> None:
    first, second = make_env("HalfCheetah-v5"), make_env("HalfCheetah-v5")
    first.reset(seed=0)
    action = np.zeros(6, np.float32)
    for _ in range(990):
        first.step(action)
    set_env_state(second, env_state(first))
    assert [second.step(action)[3] for _ in range(10)] == [False] * 9 + [True]


def test_state_holds_only_tensors_and_plain_values() -> None:
    import torch

    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert all(isinstance(key, str) and "/" not in key for key in value)
            for item in value.values():
                check(item)
        else:
            assert value is None or type(value) in (bool, int, float, str, torch.Tensor), value

    env = make("Hopper-v5", lanes=2, seed=1)
    env.reset()
    check(env_state(env))


def test_a_vector_environment_continues_bitwise() -> None:
    first, second = make("Hopper-v5", 3, seed=5), make("Hopper-v5", 3, seed=6)
    first.reset()
    generator = np.random.default_rng(0)
    actions = generator.uniform(-1, 1, (80, 3, 3)).astype(np.float32)
    for action in actions[:30]:
        first.step(action)
    set_env_state(second, env_state(first))
    ended = 0
    for action in actions[30:]:
        one, two = first.step(action), second.step(action)
        for left, right in zip(one[:4], two[:4], strict=True):
            assert np.array_equal(left, right)
        ended += int(one[2].sum())
    assert ended > 0, "no episode ended: the test would not see a reset"


def test_an_environment_may_speak_for_itself() -> None:
    class Clock(gymnasium.Wrapper[Any, Any, Any, Any]):
        time, unknown = 0, object()

        def __init__(self, env: Any) -> None:
            super().__init__(env)
            self.thing = object()

        def state(self) -> dict[str, Any]:
            return {"time": self.time}

        def load_state(self, state: dict[str, Any]) -> None:
            self.time = state["time"]

    first, second = Clock(make_env("CartPole-v1")), Clock(make_env("CartPole-v1"))
    first.reset(seed=0)
    first.time = 12
    set_env_state(second, env_state(first))
    assert second.time == 12


def test_unknown_objects_are_refused_by_name() -> None:
    env = make_env("rl_shift_test/Probe-v0")
    env.unwrapped.socket = object()  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match=r"Probe\.socket .*load_state"):
        env_state(env)
    with pytest.raises(ValueError, match="does not fit"):
        set_env_state(make_env("CartPole-v1"), env_state(make_env("Hopper-v5")))


def test_lanes_have_seeds_of_their_own_and_are_reproducible() -> None:
    one, two = make("Hopper-v5", 3, seed=1), make("Hopper-v5", 3, seed=1)
    (first, _), (second, _) = one.reset(), two.reset()
    assert np.array_equal(first, second) and first.dtype == np.float32
    assert len({row.tobytes() for row in first}) == 3
    other, _ = make("Hopper-v5", 3, seed=2).reset()
    assert not np.array_equal(first, other)
