"""Schedules and shifts: exact at their boundaries and when resumed; at alpha 0 nothing is."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from rl_shift import cli
from rl_shift.envs import env_state, make, make_env, set_env_state
from rl_shift.envs.schedules import BLOCK, make_schedule
from rl_shift.envs.shift import KINDS, parse
from rl_shift.errors import UserError

CHEETAH, CARTPOLE, JELLYBEAN = "HalfCheetah-v5", "CartPole-v1", "rl_shift/JellyBean-v0"


def alphas(times: list[int], **spec: Any) -> list[float]:
    schedule = make_schedule(spec, "test")
    return [schedule.alpha(t) for t in times]


def actions(env: gymnasium.Env[Any, Any], count: int) -> list[Any]:
    rng = np.random.default_rng(0)
    space: Any = env.action_space
    if isinstance(space, spaces.Discrete):
        return [int(a) for a in rng.integers(space.n, size=count)]
    return list(rng.uniform(-1, 1, (count, *space.shape)).astype(np.float32))


def life(env: gymnasium.Env[Any, Any], given: list[Any], seed: int = 0) -> list[Any]:
    rows: list[Any] = [env.reset(seed=seed)[0]]
    for action in given:
        obs, reward, terminated, truncated, _ = env.step(action)
        rows += [obs, reward, terminated, truncated]
        if terminated or truncated:
            rows.append(env.reset()[0])
    return rows


def same(first: list[Any], second: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# ---- schedules ---------------------------------------------------------------------------------


def test_schedules_at_their_boundaries() -> None:
    assert alphas([0, 9, 10, 19, 20, 30], period=10) == [0, 0, 1, 1, 0, 1]
    assert alphas([0, 4, 5, 6, 1000], start=5) == [0, 0, 1, 1, 1]
    assert alphas([0, 10, 15, 20, 99], start=10, end=20) == [0, 0, 0.5, 1, 1]
    assert alphas([0, 5, 10, 15, 20, 25], type="triangle", period=10) == [0, 0.5, 1, 0.5, 0, 0.5]
    assert alphas([0, 2, 4, 8], type="sine", period=8) == pytest.approx([0, 0.5, 1, 0])
    assert alphas([0, 3, 4, 9], points=[[3, 0.25], [9, 1]]) == [0, 0.25, 0.25, 1]
    assert alphas([0, 10**9]) == [1, 1]


def test_a_random_walk_may_be_asked_in_any_order() -> None:
    times = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7]
    walk = alphas(times, sigma=0.01, seed=4)
    assert walk[0] == 0 and all(0 <= a <= 1 for a in walk)
    assert alphas(times[::-1], sigma=0.01, seed=4) == walk[::-1]
    assert alphas(times, sigma=0.01, seed=5) != walk
    schedule = make_schedule({"sigma": 0.01}, "test")
    steps = np.diff([schedule.alpha(t) for t in range(BLOCK - 50, BLOCK + 50)])
    assert np.abs(steps).max() < 0.06  # no jump where two blocks meet


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"period": 0}, "period must be positive"),
        ({"type": "triangle", "period": -3}, "period must be positive"),
        ({"type": "stepp", "period": 3}, "did you mean 'step'"),
        ({"type": "step"}, "needs period"),
        ({"period": 3, "sigma": 1}, "no field 'sigma'"),
        ({"start": 5, "end": 5}, "ends after it starts"),
        ({"sigma": 0}, "sigma must be positive"),
        ({"points": [[5, 1], [3, 0]]}, "growing"),
        ({"points": [[5, 2]]}, r"\[0, 1\]"),
        ({"period": "often"}, "period must be a finite number, not 'often'"),
        ({"period": "inf"}, "period must be a finite number"),
        ({"period": 2.7}, "period must be a whole number"),
        ({"period": True}, "period must be a finite number"),
        ({"start": "nan"}, "start must be a finite number"),
        ({"sigma": math.inf}, "sigma must be a finite number"),
        ({"sigma": 0.1, "seed": -1}, "seed must be at least 0"),
        ({"points": 5}, "list of pairs"),
        ({"points": [[0.5, 1]]}, "a step must be a whole number"),
        ({"points": [[0, math.nan]]}, "an alpha must be a finite number"),
    ],
)
def test_schedules_that_mean_nothing(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_schedule(spec, "test")


# ---- the wrapper -------------------------------------------------------------------------------

NEVER = "start=1000000"
EVERYWHERE = {
    CHEETAH: [
        "reward_flip", "reward_scale:scale=3", "target_velocity:value=2", "obs_permute",
        "obs_negate", "obs_scale:scale=2", "obs_bias:value=1", "obs_noise:std=0.1",
        "obs_dropout:p=0.5", "action_flip", "action_gain:scale=0.5", "action_permute",
        "action_delay:steps=2", "gravity:scale=2", "mass:scale=1.5", "friction:scale=0.5",
        "damping:scale=2", "gear:scale=0.8", "wind:x=5", "push:x=20",
    ],
    JELLYBEAN: ["colour_swap", "rotation", "green_white", "reward_flip", "action_flip"],
    CARTPOLE: ["parameters:length=2", "gravity:scale=2", "action_permute"],
}  # fmt: skip
CASES = [(env, shift) for env, shifts in EVERYWHERE.items() for shift in shifts]


def joined(shift: str, timing: str) -> str:
    return f"{shift}{',' if ':' in shift else ':'}{timing}"


def test_every_kind_is_tried() -> None:
    assert {shift.partition(":")[0] for _, shift in CASES} == set(KINDS)


@pytest.mark.parametrize(("env_id", "shift"), CASES)
def test_a_shift_acts_and_is_the_bare_environment_before(env_id: str, shift: str) -> None:
    bare = make_env(env_id)
    given = actions(bare, 100 if env_id == JELLYBEAN else 24)
    never = make_env(env_id, shift=joined(shift, NEVER))
    assert never.observation_space == bare.observation_space
    assert never.action_space == bare.action_space
    target_velocity = "target_velocity" in shift  # its base is a target of 0, not the bare reward
    if not target_velocity:
        assert same(life(never, given), life(bare, given))
    later = make_env(env_id, shift=joined(shift, "start=12"))
    before, after = life(later, given), life(bare, given)
    if not target_velocity:
        assert same(before[:44], after[:44])
    assert not same(before, after)
    assert same(life(later, given), before)  # a new life from the same seed


@pytest.mark.parametrize(("env_id", "shift"), CASES)
def test_a_life_resumes_exactly_under_every_shift(env_id: str, shift: str) -> None:
    spec = joined(shift, "type=triangle,period=15")
    whole, fresh = make_env(env_id, shift=spec), make_env(env_id, shift=spec)
    given = actions(whole, 40)
    life(whole, given[:20])
    set_env_state(fresh, env_state(whole))
    for action in given[20:]:
        left, right = whole.step(action), fresh.step(action)
        assert np.array_equal(left[0], right[0]) and left[1:4] == right[1:4]
        assert left[4]["shift"] == right[4]["shift"]
        if left[2] or left[3]:
            assert np.array_equal(whole.reset()[0], fresh.reset()[0])


@pytest.mark.parametrize(("env_id", "shift"), CASES)
def test_gymnasium_accepts_every_shift(env_id: str, shift: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises on spaces and on wrappers
        check_env(make_env(env_id, shift=shift), skip_render_check=True)


def test_the_truth_is_told_in_the_order_of_the_specification() -> None:
    env = make_env(CHEETAH, shift="reward_flip:period=3+mass:scale=2,start=4+gravity:scale=3")
    told = [env.reset(seed=0)[1]["shift"], *(env.step(a)[4]["shift"] for a in actions(env, 6))]
    assert [s["alpha"] for s in told] == [0, 0, 0, 0, 1, 1, 1]  # of the flip; the reset is step 0
    assert [s["regime"] for s in told] == [4, 4, 4, 4, 5, 7, 7]
    assert list(told[0]["params"]) == ["sign", "mass", "gravity"]


def test_the_truth_marks_the_boundaries_and_the_clock_survives_resets() -> None:
    env = make_env(CARTPOLE, shift="action_flip:period=10")
    env.reset(seed=0)
    seen = []
    for _ in range(35):
        _, _, terminated, truncated, info = env.step(0)
        seen.append(info["shift"])
        if terminated or truncated:
            env.reset()
    assert [s["t"] for s in seen] == list(range(35))
    assert [s["t"] for s in seen if s["changed"]] == [10, 20, 30]
    assert [s["regime"] for s in seen] == [0] * 10 + [1] * 10 + [0] * 10 + [1] * 5
    assert seen[9]["params"] == {"action_sign": 1.0} and seen[10]["params"] == {"action_sign": -1.0}
    assert env.reset(seed=0)[1]["shift"]["t"] == 0


def test_the_reset_shows_what_the_step_before_showed() -> None:
    env = make_env(JELLYBEAN, shift="rotation:period=10", horizon=10)
    env.reset(seed=0)
    obs = [env.step(0)[0] for _ in range(10)][-1]
    assert np.array_equal(env.reset()[0], obs)  # both at step 10, in the new regime


def test_lanes_have_clocks_of_their_own() -> None:
    env = make(CARTPOLE, lanes=2, shift="obs_noise:std=0.1,period=3")
    obs, _ = env.reset()
    for t in range(7):
        obs, *_, infos = env.step(np.array([0, 1]))
        assert infos["shift"]["t"].tolist() == [t, t]
        assert infos["shift"]["regime"].tolist() == [t // 3 % 2] * 2
    assert not np.array_equal(obs[0], obs[1])


def test_shifts_compose_in_one_order() -> None:
    one = make_env(CHEETAH, shift="obs_scale:scale=2+mass:scale=1.5+action_flip")
    other = make_env(CHEETAH, shift="action_flip+obs_scale:scale=2+mass:scale=1.5")
    given = actions(one, 5)
    assert same(life(one, given), life(other, given))
    listed = {"shifts": ["mass:scale=1.5", {"kind": "action_flip"}, "obs_scale:scale=2"]}
    assert same(life(make_env(CHEETAH, shift=listed), given), life(one, given))
    named = {"obs_scale": 2, "action_flip": True, "mass": {"scale": 1.5}}
    assert same(life(make_env(CHEETAH, shift=named), given), life(one, given))


# ---- single kinds ------------------------------------------------------------------------------


def test_the_reward_flip_leaves_the_rest_of_the_reward() -> None:
    bare, flipped = make_env(CHEETAH), make_env(CHEETAH, shift="reward_flip")
    for env in (bare, flipped):
        env.reset(seed=0)
    for action in actions(bare, 5):
        _, reward, _, _, info = bare.step(action)
        assert flipped.step(action)[1] == pytest.approx(float(reward) - 2 * info["reward_forward"])
    jelly, other = make_env(JELLYBEAN), make_env(JELLYBEAN, shift="reward_flip")
    for env in (jelly, other):
        env.reset(seed=0)
    assert [jelly.step(0)[1] for _ in range(30)] == [-float(other.step(0)[1]) for _ in range(30)]


def test_a_mass_shift_moves_nothing_and_alpha_0_restores_the_model() -> None:
    env = make_env(CHEETAH, shift="mass:scale=1.7,body=torso,type=triangle,period=4")
    env.reset(seed=0)
    model, data = env.unwrapped.model, env.unwrapped.data  # type: ignore[attr-defined]
    nominal = (model.body_mass.copy(), model.body_inertia.copy(), model.body_subtreemass.copy())
    torso = model.body("torso").id
    [shift] = env.shifts  # type: ignore[attr-defined]
    state = data.qpos.copy(), data.qvel.copy()
    shift.kind.prepare(1.0)
    assert np.array_equal(data.qpos, state[0]) and np.array_equal(data.qvel, state[1])
    assert model.body_mass[torso] == pytest.approx(1.7 * nominal[0][torso])
    assert model.body_inertia[torso] == pytest.approx(1.7 * nominal[1][torso])
    assert model.body_subtreemass[0] > nominal[2][0]  # MuJoCo's derived constants know
    others = np.arange(model.nbody) != torso
    assert np.array_equal(model.body_mass[others], nominal[0][others])
    for alpha in (0.3, 0.9, 0.0):
        shift.kind.prepare(alpha)
    now = model.body_mass, model.body_inertia, model.body_subtreemass
    assert all(np.array_equal(a, b) for a, b in zip(now, nominal, strict=True))


def test_cart_poles_parameters_mix_as_numbers() -> None:
    spec = "parameters:force=20/5,length=1,type=triangle,period=10"
    env = make_env("rl_shift/InfCartPole-v0", shift=spec)
    env.reset(seed=0)
    seen = [env.step(0)[4]["shift"]["params"] for _ in range(11)]
    assert seen[0] == {"force": 20.0, "length": 0.5}
    assert seen[5] == {"force": 12.5, "length": 0.75}
    assert seen[10] == {"force": 5.0, "length": 1.0}
    assert env.unwrapped.parameters["force"] == 5.0  # type: ignore[attr-defined]
    cart = make_env(CARTPOLE, shift="parameters:masspole=0.4")
    cart.reset(seed=0)
    assert cart.unwrapped.total_mass == pytest.approx(1.4)  # type: ignore[attr-defined]


def test_the_colour_swap_is_the_published_table() -> None:
    letters = {"W": "000", "G": "010", "R": "100", "K": "111", "C": "011", "Y": "110", "M": "101"}
    table = {(0, 0): "GRW", (1, 0): "RKG", (0, 1): "CYM", (1, 1): "KRC"}  # W, G, R become
    env = make_env(JELLYBEAN, shift="colour_swap")
    [shift] = env.shifts  # type: ignore[attr-defined]
    view = np.random.default_rng(0).integers(0, 3, (11, 11))
    pixels = np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0]], np.uint8)[view]
    pixels[5, 5] = [0, 0, 1]
    swapped = shift.kind.observation(pixels, 1.0, None)
    for i in range(11):
        for j in range(11):
            code = "".join(str(bit) for bit in swapped[i, j])
            if (i, j) == (5, 5):
                assert code == "001"
            else:
                assert code == letters[table[i >= 5, j >= 5]["WGR".index("WGR"[view[i, j]])]]
    assert all(len(set(targets)) == 3 for targets in table.values())


def test_relative_noise_is_in_units_of_the_states_deviation() -> None:
    std = np.linspace(0.1, 2, 17)
    spec = {"kind": "obs_noise", "std": 0.5, "relative": True, "state_std": std.tolist()}
    env, bare = make_env(CHEETAH, shift=spec), make_env(CHEETAH)
    noise = np.array([env.reset(seed=s)[0] - bare.reset(seed=s)[0] for s in range(400)])
    np.testing.assert_allclose(noise.std(0), 0.5 * std, rtol=0.2)
    with pytest.raises(UserError, match="state_std, 17 numbers"):
        make_env(CHEETAH, shift="obs_noise:std=0.1,relative=true")


def test_the_context_is_appended() -> None:
    spec = {"gravity": {"scale": 3, "start": 1, "end": 3}, "context": True}
    env = make_env(CHEETAH, shift=spec)
    assert env.observation_space.shape == (18,)
    seen = [env.reset(seed=0)[0][-1], *(env.step(a)[0][-1] for a in actions(env, 3))]
    assert seen == [1, 1, 2, 3]
    with pytest.raises(UserError, match="context is appended to vectors"):
        make_env(JELLYBEAN, shift={"rotation": {}, "context": True})


def test_an_endless_life_has_no_terminal_transition() -> None:
    env = make_env(CARTPOLE, shift={"action_flip": {"period": 30}, "endless": True})
    bare = make_env(CARTPOLE)
    env.reset(seed=0)
    bare.reset(seed=0)
    ended, info = 0, {}
    for _ in range(60):
        obs, _, terminated, truncated, info = env.step(1)
        assert not terminated
        if not ended:
            assert np.array_equal(obs, bare.step(1)[0])  # the true last observation included
        if truncated:
            ended += 1
            env.reset()
    assert ended > 3 and info["shift"]["t"] == 59
    assert make_env(CARTPOLE, shift={"endless": True}).reset(seed=0)[1]["shift"]["regime"] == 0


def test_a_clock_may_start_anew_with_every_episode() -> None:
    env = make_env(CARTPOLE, shift="parameters:length=2,start=4+episodic")
    env.reset(seed=0)
    seen = [env.step(0)[4]["shift"] for _ in range(6)]
    assert [s["t"] for s in seen if s["changed"]] == [4]
    assert env.unwrapped.length == 2.0
    shift = env.reset()[1]["shift"]
    assert (shift["t"], shift["regime"], shift["changed"]) == (0, 0, False)
    assert env.unwrapped.length == 0.5
    assert env.step(0)[4]["shift"]["t"] == 0


def test_the_forward_part_is_looked_for_without_a_trace() -> None:
    bare, flipped = make_env("Hopper-v5"), make_env("Hopper-v5", shift="reward_flip:start=999")
    assert flipped.unwrapped._np_random is None
    given = actions(bare, 30)
    assert same(life(flipped, given), life(bare, given))
    whole = make_env("HalfCheetah-v4", shift="reward_flip:part=all")
    twin = make_env("HalfCheetah-v4")
    for env in (whole, twin):
        env.reset(seed=0)
    action = actions(twin, 1)[0]
    assert whole.step(action)[1] == -float(twin.step(action)[1])


def test_words_of_other_suites_are_understood() -> None:
    def alphas_of(text: Any) -> list[float]:
        [shift] = parse(text).shifts
        return [shift.schedule.alpha(t) for t in (0, 10, 100_000)]

    assert alphas_of("reward_flip:period=1e+5") == [0, 0, 1]
    assert alphas_of("obs_bias:value=1,points=[[0,0.5],[10,1]]") == [0.5, 1, 1]
    schedule = {"type": "step", "period": 100_000}
    flip = {"target": "reward", "kind": "sign_flip", "schedule": schedule}
    assert parse(flip).shifts[0].name == "reward_flip" and alphas_of(flip) == [0, 0, 1]
    negated = make_env(CARTPOLE, shift="obs_negate:dims=[0, 3]")
    assert negated.shifts[0].kind.signs.tolist() == [-1, 1, 1, -1]
    plan = parse("mass_torso:scale=2+gear:scale=0.5,start=3+context+endless")
    assert plan.context and plan.endless and [s.name for s in plan.shifts] == ["mass", "gear"]
    heavy = make_env(CHEETAH, shift="mass_torso:scale=2")
    assert list(heavy.reset(seed=0)[1]["shift"]["params"].items()) == [("mass_torso", 2.0)]


def test_what_a_mass_shift_derives_is_restored_bit_for_bit() -> None:
    env = make_env("Humanoid-v5", shift="mass:scale=1.5")
    model, [shift] = env.unwrapped.model, env.shifts

    def everything() -> dict[str, Any]:
        names = (n for n in dir(model) if isinstance(getattr(model, n, None), np.ndarray))
        found = {n: getattr(model, n).copy() for n in names}
        return found | {"stat": np.array([model.stat.meaninertia, model.stat.extent])}

    nominal = everything()
    shift.kind.prepare(1.0)
    changed = {n for n, values in everything().items() if not np.array_equal(values, nominal[n])}
    assert {"body_mass", "body_inertia", "dof_invweight0", "body_subtreemass"} <= changed
    shift.kind.prepare(0.0)
    assert all(np.array_equal(values, nominal[n]) for n, values in everything().items())


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "spec", "words"),
    [
        (CHEETAH, "gravty:scale=2", "did you mean 'gravity'"),
        (CHEETAH, "gravity:scale=2,period=0", "period must be positive"),
        (CHEETAH, "gravity", "needs scale"),
        (CHEETAH, "gravity:scale=heavy", "must be a finite number"),
        (CHEETAH, "gravity:2", "expected field=value"),
        (CHEETAH, "mass:scale=2,geom=torso", "no field 'geom'"),
        (CHEETAH, "mass:scale=2,body=trso", "did you mean 'torso'.*it has world, torso"),
        (CHEETAH, "parameters:length=2", "use gravity, mass"),
        (CHEETAH, "rotation", "square images"),
        (CHEETAH, "obs_negate:dims=99", "dims must lie in 0..16"),
        (CARTPOLE, "mass:scale=2", "no MuJoCo environment and has no 'mass'.*it has .*masscart"),
        (CARTPOLE, "wind:x=1", "CartPole-v1 is no MuJoCo environment"),
        (CARTPOLE, "push:x=1", "no MuJoCo environment"),
        (CARTPOLE, "action_gain:scale=2", "actions that are a vector"),
        (CARTPOLE, "target_velocity:value=1", "gives no x_velocity"),
        (JELLYBEAN, "mass:scale=2", "no MuJoCo environment.*it has no parameters"),
        ("HalfCheetah-v4", "reward_flip", "part=all.*no reward_forward"),
        ("InvertedPendulum-v5", "reward_flip", "gives no reward_forward"),
        (CARTPOLE, "reward_flip:part=some", "part is forward or all"),
        (CARTPOLE, "obs_negate:dims=[0", "is no list such as"),
        (CARTPOLE, {"kind": "sign_flip"}, "needs a target: reward"),
        (CHEETAH, "mass_trso:scale=2", "did you mean 'torso'"),
        (CARTPOLE, "action_delay:steps=0", "steps must be at least 1"),
        (CARTPOLE, {"kind": "obs_bias", "value": 1, "target": "reward"}, "not the reward"),
        (CARTPOLE, {"shifts": []}, "a list `shifts`"),
        (CARTPOLE, {"shifts": [5]}, "a mapping, not 5"),
        (CARTPOLE, {"action_flip": False}, "takes fields or true, not False"),
        (CARTPOLE, {"kind": "action_flip", "schedule": 5}, "schedule holds fields"),
        (CARTPOLE, "action_flip:period=inf", "period must be a finite number"),
        (CARTPOLE, "action_delay:steps=inf", "steps must be a finite number"),
        (CARTPOLE, "action_delay:steps=1.5", "steps must be a whole number"),
        (CARTPOLE, "obs_permute:seed=nan", "seed must be a finite number"),
        (CARTPOLE, "obs_permute:seed=-1", "seed must be at least 0"),
        (CARTPOLE, "action_permute:seed=1e30", "seed must be less than"),
        (CARTPOLE, "obs_negate:dims=abc", "dims must be a finite number, not 'abc'"),
        (CARTPOLE, "obs_negate:dims=[0.5]", "dims must be a whole number, not 0.5"),
        (CARTPOLE, "obs_negate:dims=[]", "dims names no dimension"),
        (CARTPOLE, "parameters:values=5", "name the parameters"),
        (CARTPOLE, "parameters:gravity=nan", "gravity must be a finite number"),
        (CARTPOLE, "parameters:length=0", "length must be more than 0"),
        (CARTPOLE, "parameters:masscart=1/-1", "masscart must be more than 0"),
        (CHEETAH, "mass:scale=0", "scale must be more than 0"),
        (CHEETAH, "mass:scale=-1", "scale must be more than 0"),
        (CHEETAH, "friction:scale=-1", "scale must be at least 0"),
        (CHEETAH, "damping:scale=-0.1", "scale must be at least 0"),
        (CHEETAH, "gravity:scale=nan", "scale must be a finite number"),
        (CHEETAH, "push:x=nan", "x must be a finite number"),
        (CHEETAH, "wind:x=1,density=-1", "density must be at least 0"),
        (CHEETAH, "obs_noise:std=nan", "std must be a finite number"),
        (CHEETAH, "obs_noise:std=-1", "std must be at least 0"),
        (CHEETAH, {"obs_scale": True}, "scale must be a finite number"),
        (CHEETAH, "obs_permute:period=10+context", "obs_permute has no numbers that a context"),
        (CHEETAH, {"shifts": [], "endless": True, "context": True}, "leave `context` out"),
    ],
)
def test_what_cannot_be_is_refused(env_id: str, spec: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_env(env_id, shift=spec)


def test_targets_are_named() -> None:
    targets = {parse(shift).shifts[0].kind.target for _, shift in CASES}
    assert targets == {"observation", "action", "reward", "dynamics", "disturbance"}


# ---- from the command line ---------------------------------------------------------------------


def test_training_and_evaluating_under_a_shift(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--eval-episodes", "1", "--eval-every", "0", "--log-every", "100"]
    run = str(tmp_path / "run")
    argv = ["train", "sac", "--env", "Pendulum-v1", "--env-steps", "220", "--agent.hidden", "[8]"]
    argv += ["--agent.warmup_steps", "210", "--shift", "action_flip:period=50", "--run-dir", run]
    assert cli.main([*argv, *few]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["tasks"][0]["shift"] == "action_flip:period=50"
    out = str(tmp_path / "noise.json")
    capsys.readouterr()
    evaluate = ["evaluate", run, "--episodes", "2"]
    assert cli.main([*evaluate, "--shift", "obs_noise:std=0.3", "--json", out]) == 0
    noisy = json.loads(Path(out).read_text())
    assert noisy["shift"] == "obs_noise:std=0.3"
    assert cli.main([*evaluate, "--shift", "none", "--json", out]) == 0
    calm = json.loads(Path(out).read_text())
    assert noisy["evaluations"][0]["returns"] != calm["evaluations"][0]["returns"]
    assert cli.main([*evaluate, "--shift", "mass:scale=2"]) == 2
    assert "no 'mass'" in capsys.readouterr().err
    assert math.isfinite(np.mean(calm["evaluations"][0]["returns"]))
