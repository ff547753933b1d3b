"""OER and ER: what replay, heads, normalisers and selection must and must not touch."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from rl_shift import config, runs, seeding
from rl_shift.agents.er import ER
from rl_shift.agents.oer import OER
from rl_shift.buffer import Buffer
from rl_shift.compile import Updater
from rl_shift.config import Task
from rl_shift.continual import MultiHead, replay_loss
from rl_shift.envs.families import SEQUENCES
from rl_shift.errors import UnsupportedSpace, UserError
from rl_shift.evaluate_command import EvaluationSettings, evaluated

FIRST, SECOND = (3, 2), (4, 1)  # sizes of observations and actions
SMALL = {
    "hidden": (16, 16), "batch_size": 16, "memory_batch": 9, "memory": 20, "select_updates": 5,
    "dynamics_updates": 5, "dynamics_hidden": (8,), "dynamics_members": 2, "horizon": 10,
    "roll_outs": 3,
}  # fmt: skip


def task_of(name: str, sizes: tuple[int, int] = FIRST, updates: int = 8) -> Task:
    obs, action = sizes
    return Task(
        name=name,
        dataset=name,
        updates=updates,
        observation_space=Box(-np.inf, np.inf, (obs,), np.float32),
        action_space=Box(-1.0, 1.0, (action,), np.float32),
    )


def data_of(sizes: tuple[int, int] = FIRST, shift: float = 0.0, rows: int = 200) -> Buffer:
    rng = seeding.numpy_generator(0, "data", int(shift))
    obs, action = sizes
    ends = np.arange(rows) % 20 == 19
    arrays = {
        "obs": rng.normal(shift, 1 + abs(shift), (rows, obs)),
        "next_obs": rng.normal(shift, 1 + abs(shift), (rows, obs)),
        "action": np.tanh(rng.normal(size=(rows, action))),
        "reward": rng.normal(size=rows),
    }
    arrays = {k: v.astype(np.float32) for k, v in arrays.items()}
    return Buffer.from_arrays({**arrays, "terminated": ends, "truncated": ~ends & False})


def make(kind: Any = OER, sizes: tuple[int, int] = FIRST, **settings: Any) -> Any:
    task = task_of("spaces", sizes)
    with seeding.forked(0):
        return kind(task.observation_space, task.action_space, kind.Config(**SMALL | settings))


def learn(agent: Any, task: Task, data: Buffer, end: bool = True) -> Any:
    """What the trainer does with a task."""
    agent.begin_task(task, data)
    for stage in agent.stages(task):
        agent.enter(stage.name)
        for _ in range(stage.updates):
            batch = agent.sample(data)
            agent.schedule()
            agent.update(batch)
            agent.advance()
    if end:
        agent.end_task(task, data)
    return agent


def learn_both(agent: Any, second: tuple[int, int] = FIRST, **kwargs: Any) -> Any:
    with seeding.forked(1):
        learn(agent, task_of("one"), data_of())
        between = kwargs.get("between")
        if between:
            between(agent)
        return learn(agent, task_of("two", second), data_of(second, shift=2.0))


def weights(agent: Any, of: str) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in agent.kept.state_dict().items() if k.startswith(of)}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], same: bool = True) -> None:
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[k], second[k]) for k in first) is same


def test_mbes_rolls_out_as_the_settings_say() -> None:
    agent = make(reach=3.0, action_weight=0.5)
    learn(agent, task_of("one"), data := data_of(), end=False)
    selection = agent.selection(data)
    assert vars(selection.settings) == {
        "lanes": 3, "horizon": 10, "reach": 3.0, "action_weight": 0.5, "project": True,
    }  # fmt: skip
    assert selection.limit > 0


# ---- acceptance checks -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OER, ER])
def test_coefficient_zero_is_bitwise_fine_tuning(kind: Any) -> None:
    """Whether old rows exist or not: neither selection nor replay shifts another stream."""
    tuned = learn_both(make(kind, coefficient=0.0))
    none = learn_both(make(kind, retention="none"))
    emptied = learn_both(
        make(kind, selector="random"), between=lambda agent: agent.memory.parts.clear()
    )
    replayed = learn_both(make(kind, selector="random"))
    assert_same(tuned.state_dict(), none.state_dict())
    assert_same(weights(tuned, ""), weights(emptied, ""))
    assert_same(weights(tuned, ""), weights(replayed, ""), same=False)


@pytest.mark.parametrize("kind", [OER, ER])
def test_without_memory_and_with_a_frozen_trunk_old_heads_stay(kind: Any) -> None:
    before: dict[str, Any] = {}

    def look(agent: Any) -> None:
        before.update({k: weights(agent, k) for k in ("heads.0", "inputs.0", "trunk")})

    frozen = learn_both(make(kind, retention="frozen"), between=look)
    for part in before:
        assert_same(before[part], weights(frozen, part))
    tuned = learn_both(make(kind, retention="none"), between=look)
    assert_same(before["heads.0"], weights(tuned, "heads.0"))
    assert_same(before["trunk"], weights(tuned, "trunk"), same=False)


def test_each_task_keeps_its_own_normaliser() -> None:
    agent = learn_both(make())
    data = data_of()
    mean, std = data.statistics("obs")
    obs = data.take(torch.arange(4))["obs"]
    agent.focus(task_of("one"))
    expected = agent.clone((obs - mean) / (std + 1e-3), 0)
    torch.testing.assert_close(agent.run(agent.act, obs, False), expected)
    agent.focus(task_of("two"))
    mean, std = data_of(shift=2.0).statistics("obs")
    expected = agent.clone((obs - mean) / (std + 1e-3), 1)
    torch.testing.assert_close(agent.run(agent.act, obs, False), expected)


def test_the_critic_never_sees_old_rewards() -> None:
    agent = learn_both(make())
    assert {k for part in agent.memory.parts.values() for k in part.keys} == {"obs", "target"}
    learners = []
    for selector in ("random", "reward"):
        agent = learn_both(make(selector=selector))
        learners.append(agent.learner.state_dict())
    assert_same(*learners)  # the learner is the same whatever is remembered


@pytest.mark.parametrize("kind", [OER, ER])
def test_an_interrupted_selection_goes_on_exactly(kind: Any) -> None:
    def run(stop: int | None) -> Any:
        agent, data, task = make(kind), data_of(), task_of("one")
        with seeding.forked(1):
            agent.begin_task(task, data)
            for stage in agent.stages(task):
                agent.enter(stage.name)
                for k in range(stage.updates):
                    if stage.name == "select" and k == stop:
                        state = copy.deepcopy(agent.state())
                        agent = make(kind)
                        agent.load_state(state)
                        agent.enter(stage.name)
                    agent.update(agent.sample(data))
                    agent.advance()
            agent.end_task(task, data)
        return agent

    whole, resumed = run(None), run(3)
    for key in ("obs", "target"):
        kept = [agent.memory.parts[0].arrays()[key] for agent in (whole, resumed)]
        assert torch.equal(*kept)
    assert len(whole.memory.parts[0]) == 20


# ---- parts -------------------------------------------------------------------------------------


def test_tasks_of_other_spaces_and_static_batches() -> None:
    agent = learn_both(make(), second=SECOND)
    with seeding.forked(2):
        third, data = task_of("three"), data_of(shift=3.0)
        agent.begin_task(third, data)
        agent.stage = "learner"
        shapes = [{k: v.shape for k, v in agent.sample(data).items()} for _ in range(40)]
    assert all(found == shapes[0] for found in shapes)
    assert shapes[0]["memory_obs_0"] == (4, 3) and shapes[0]["memory_obs_1"] == (4, 4)
    agent.focus(task_of("two", SECOND))
    assert agent.observation_space.shape == (4,) and agent.action_space.shape == (1,)
    assert agent.run(agent.act, torch.zeros(2, 4), False).shape == (2, 1)
    agent.focus(third)
    assert agent.run(agent.act, torch.zeros(2, 3), False).shape == (2, 2)


@pytest.mark.parametrize("shared_inputs", [False, True])
@pytest.mark.parametrize("sizes", [[(3, 2)] * 4, [(3, 2), (4, 2), (3, 1), (3, 2)]])
def test_tasks_side_by_side_are_those_one_by_one(
    sizes: list[tuple[int, int]], shared_inputs: bool
) -> None:
    policy = MultiHead((8, 8), shared_inputs)
    for size in sizes:
        policy.add(*size)
    parts = [(k, torch.randn(5, sizes[k][0])) for k in (3, 0, 2)]
    batch = {f"memory_obs_{k}": obs for k, obs in parts}
    batch |= {f"memory_target_{k}": torch.rand(5, sizes[k][1]) for k, _ in parts}
    alone = [policy(obs, k) for k, obs in parts]
    for action, expected in zip(policy.together(parts), alone, strict=True):
        torch.testing.assert_close(action, expected)
    errors = [
        (action - batch[f"memory_target_{k}"]).square().mean()
        for action, (k, _) in zip(alone, parts, strict=True)
    ]
    loss = replay_loss(policy, batch)
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    gradients = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
    used = [g is not None and bool(g.any()) for g in gradients]
    names = [name for name, _ in policy.named_parameters()]
    assert {n for n, u in zip(names, used, strict=True) if not u} == {
        n for n in names if n.startswith("heads.1.") or (n.startswith("inputs.1."))
    }


@pytest.mark.parametrize("retention", ["replay", "agem"])
def test_old_tasks_side_by_side_in_both_engines(
    retention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda unit, **_: unit)
    found = []
    for mode in ("off", "on"):
        agent = learn_both(make(retention=retention, selector="random"))
        with seeding.forked(2):
            agent.begin_task(task_of("three"), data := data_of(shift=3.0))
            agent.enter("learner")
            updater = Updater(agent, mode=mode)
            for _ in range(2):  # the clone's step is every second one
                updater(agent.sample(data))
        assert updater.mode == mode
        found.append(weights(agent, ""))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], msg=key)


def test_replay_keeps_the_old_policy() -> None:
    """The change of the old head's actions on its own states, with and without replay."""

    def moved(**settings: Any) -> float:
        agent = make(memory_batch=64, memory=100, learning_rate=1e-2, **settings)
        obs = data_of().take(torch.arange(100))["obs"]
        with seeding.forked(1):
            learn(agent, task_of("one", updates=20), data_of())
            before = agent.run(agent.act, obs, False)
            learn(agent, task_of("two", updates=40), data_of(shift=2.0))
        agent.focus(task_of("one", updates=20))
        return float((agent.run(agent.act, obs, False) - before).square().mean())

    tuned = moved(coefficient=0.0)
    assert moved(selector="random") < 0.5 * tuned
    assert moved(selector="random", retention="agem") < 0.9 * tuned
    assert moved(retention="ewc", coefficient=100.0) < 0.5 * tuned
    assert moved(retention="l2", coefficient=10.0) < 0.5 * tuned
    assert moved(retention="si", coefficient=10.0) < 0.5 * tuned
    assert moved(retention="none", anchor=1.0) < 0.9 * tuned
    assert moved(retention="frozen") == 0.0


def test_targets_are_the_policy_or_the_data() -> None:
    data = data_of()
    for target in ("policy_action", "dataset_action"):
        agent = learn(make(target=target, selector="random"), task_of("one"), data)
        kept = agent.memory.parts[0].arrays()
        expected = agent.run(agent.act, kept["obs"], False)
        is_policy = torch.allclose(kept["target"], expected, atol=1e-6)
        assert is_policy is (target == "policy_action")
        rows = [(kept["obs"][:, None] == data.arrays()["obs"]).all(-1).float().argmax(1)][0]
        is_data = torch.equal(kept["target"], data.arrays()["action"][rows])
        assert is_data is (target == "dataset_action")


def test_the_total_budget_shrinks_old_memories_to_their_first_rows() -> None:
    kept: list[Tensor] = []
    agent = learn_both(
        make(memory=30, memory_total=40),
        between=lambda agent: kept.append(agent.memory.parts[0].arrays()["obs"].clone()),
    )
    assert [len(part) for part in agent.memory.parts.values()] == [20, 20]
    assert torch.equal(agent.memory.parts[0].arrays()["obs"], kept[0][:20])
    assert agent.memory.nbytes == 2 * 20 * (3 + 2) * 4
    with pytest.raises(UserError, match="memory_total 1 has no row for each of 2 tasks"):
        learn_both(make(memory_total=1))


def test_everything_that_keeps_old_tasks_is_counted() -> None:
    replay, weights = learn_both(make(selector="random")), learn_both(make(retention="ewc"))
    statistics = 2 * 2 * 3 * 4  # mean and std of three observations, two tasks
    copy_of_policy = sum(p.nbytes for p in replay.kept.parameters())
    expected = replay.memory.nbytes + statistics + copy_of_policy
    assert replay.resources()["memory_bytes"] == pytest.approx(expected, rel=0.1)
    assert weights.resources()["memory_bytes"] > statistics + 2 * copy_of_policy
    assert replay.resources()["policy_shift_1"] > 0


def test_a_repeated_task_gets_its_head_and_its_memory_back() -> None:
    agent = learn_both(make())
    with seeding.forked(2):
        learn(agent, task_of("one"), data_of())
    assert len(agent.known) == len(agent.kept.heads) == 2
    assert agent.kept.current == 0 and sorted(agent.memory.parts) == [0, 1]
    again = make()
    again.load_state(copy.deepcopy(agent.state()))
    assert again.kept.current == 0
    assert_same(agent.state_dict(), again.state_dict())


def test_a_new_head_may_start_from_the_one_that_fits() -> None:
    agent = learn(make(warm_start=True), task_of("one"), data_of())
    data = data_of()
    agent.begin_task(task_of("two"), data)
    assert_same(
        {k: v for k, v in agent.kept.heads[0].state_dict().items()},
        {k: v for k, v in agent.kept.heads[1].state_dict().items()},
    )


def test_the_learning_rate_warms_up_in_every_task() -> None:
    agent = make(lr_warmup=4, learning_rate=1.0)
    for name in ("one", "two"):
        data = data_of()
        agent.begin_task(task_of(name), data)
        rates = []
        agent.enter("learner")
        for _ in range(6):
            agent.schedule()
            rates.append(float(agent.optimizers["clone"].param_groups[0]["lr"]))
            agent.update(agent.sample(data))
            agent.advance()
        assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_the_policy_shift_is_zero_until_something_moves() -> None:
    agent = learn_both(make(retention="frozen"))
    assert agent.shifts == [0.0, 0.0]
    agent = learn_both(make(retention="none"))
    assert agent.shifts[0] == 0.0 and agent.shifts[1] > 0


def test_a_task_without_a_head_is_played_by_one_that_fits_or_refused() -> None:
    agent = learn_both(make(), second=SECOND)
    agent.focus(task_of("unseen"))
    assert agent.head == 0
    agent = learn_both(make())
    first = task_of("one")
    for changed in ({"shift": "obs_noise:std=0.1"}, {"updates": 99}):  # the same task all the same
        agent.focus(Task(**{**vars(first), **changed}))
        assert agent.head == 0
    agent = learn_both(make(), second=SECOND)
    with pytest.raises(UserError, match="no head fits task 'unseen'"):
        agent.focus(task_of("unseen", (7, 2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": 0}, "keeps nothing"),
        ({"coefficient": -1.0}, "agent.coefficient must not be negative"),
        ({"clone_updates": -1}, "agent.clone_updates must not be negative"),
        ({"reach": 0.0}, "agent.reach 0 lets no roll-out go on"),
        ({"reach": -1.0}, "agent.reach -1 lets"),
        ({"reach": float("nan")}, "reach must be a number, not nan"),
        ({"roll_outs": 0}, "agent.roll_outs and agent.horizon must be 1 or more"),
        ({"horizon": 0}, "agent.roll_outs and agent.horizon must be 1 or more"),
        ({"selector": "mebs"}, "'mebs' is none of mbes"),
        ({"selector": "oracle_onpolicy"}, "is none of"),
        ({"hidden": ()}, "at least one width"),
        ({"learner": "pgd"}, "stages of its own"),
        ({"learner": "dqn"}, "cannot be used here"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        learn(make(**settings), task_of("one"), data_of())


def test_a_selector_that_the_learner_cannot_serve_is_refused_before_training() -> None:
    agent = make(learner="bc", selector="surprise")
    with pytest.raises(UserError, match="surprise needs a learner with a critic"):
        agent.begin_task(task_of("one"), data_of())
    for name, value, message in (("alhpa", 1, "alhpa"), ("alpha", "x", "alpha")):
        overrides = {"agent.learner_config": {name: value}}
        with pytest.raises(UserError, match=message):
            config.make(preset="oer.triplet", overrides=overrides)


@pytest.mark.parametrize("settings", [{"learner": "bc"}, {"clone_updates": 3}])
def test_er_trains_its_own_learner(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="ER trains td3_bc itself"):
        make(ER, **settings)


def test_cloning_can_wait_for_the_learner() -> None:
    agent, data = make(clone_updates=6, lr_warmup=4), data_of(shift=2.0)
    joint = learn_both(make())
    rates: list[float] = []
    replayed: dict[str, set[bool]] = {"learner": set(), "clone": set()}
    with seeding.forked(1):
        learn(agent, task_of("one"), data_of())
        agent.begin_task(task_of("two"), data)
        stages = agent.stages(task_of("two"))
        assert [(s.name, s.updates, s.counted) for s in stages[:2]] == [
            ("learner", 8, True), ("clone", 6, True),
        ]  # fmt: skip
        for stage in stages[:2]:
            agent.enter(stage.name)
            for _ in range(stage.updates):
                batch = agent.sample(data)
                replayed[stage.name].add("memory_obs_0" in batch)
                agent.schedule()
                rates.append(float(agent.optimizers["clone"].param_groups[0]["lr"]))
                before = copy.deepcopy(agent.state_dict())
                agent.update(batch)
                agent.advance()
                after = agent.state_dict()
                changed = {k.split(".")[0] for k in after if not torch.equal(after[k], before[k])}
                assert changed == {stage.name}
    assert replayed == {"learner": {False}, "clone": {True}}
    top = agent.config.learning_rate
    assert rates[7:] == pytest.approx([0.0, *(top * k / 4 for k in (1, 2, 3, 4, 4, 4))])
    assert_same(agent.learner.state_dict(), joint.learner.state_dict())


def test_interaction_is_refused() -> None:
    task = Task(**{**vars(task_of("one")), "env_steps": 5})
    with pytest.raises(UserError, match="leave env_steps out"):
        make().stages(task)


def test_any_agent_may_be_the_learner() -> None:
    agent = learn_both(make(learner="iql", learner_config={"expectile": 0.6}))
    assert agent.learner.config.expectile == 0.6
    assert agent.learner.config.hidden == (16, 16)


def test_the_presets_are_sequences() -> None:
    for name, family, order in (
        ("cheetah_vel", "CheetahVel", "cugro"),
        ("cheetah_vel_ten", "CheetahVel", "ten"),
        ("ant_dir", "AntDir", "cod-4"),
        ("walker_rand_params", "WalkerRandParams", "four"),
    ):
        run = config.make(preset=f"oer.{name}")
        members = SEQUENCES[f"{family}/{order}"]
        sets = [f"rlshift-{family.lower()}-{k}-expert-v0" for k in members]
        assert [task.dataset for task in run.tasks] == sets
    for name in ("oer.triplet", "oer.data_incremental"):
        run = config.make(preset=name)
        assert len(run.tasks) == 3
        assert run.agent_name == "oer"


def test_a_later_task_that_no_head_can_serve_is_refused_before_training() -> None:
    from gymnasium.spaces import Discrete

    run = config.make("oer", overrides={"tasks.0.dataset": "a.hdf5", "tasks.0.updates": 1})
    discrete = Task(**{**vars(task_of("clicks")), "action_space": Discrete(3)})
    with pytest.raises(UnsupportedSpace, match="clicks"):
        runs.make_agent(run, [task_of("one"), discrete])


def test_the_settings_of_the_documents_are_settings(tmp_path: Path) -> None:
    sequence = tmp_path / "sequence.yaml"
    sequence.write_text(
        "agent: {memory: 1000, selector: mbes}\n"
        "tasks:\n"
        "- {dataset: deep-ope-hopper-medium-500k, updates: 100000}\n"
        "- {dataset: my_walker.hdf5, env: Walker2d-v4, updates: 100000}\n"
    )
    for agent in ("oer", "er"):
        run = config.make(agent, files=[sequence])
        assert [task.env for task in run.tasks] == [None, "Walker2d-v4"]
    for change in (
        {"agent.coefficient": 0.0},
        {"agent.selector": "random"},
        {"agent.retention": "ewc", "agent.coefficient": 5000.0},
        {"agent.learners": ["a#0", "b#0", "c#0"]},
    ):
        assert config.make(preset="oer.triplet", overrides=change).agent_name == "oer"


def test_finished_runs_are_cloned_one_per_task(in_empty_folder: Path) -> None:
    """From the data to evaluations: the learners are not trained, the clone comes near them."""
    data = "rl_shift/hopper-replay-v0"
    quick = {"seed": 0, "eval_every": 0, "eval_episodes": 1, "save_every": 0, "log_every": 10}
    small = {"agent.hidden": [16, 16], "tasks.0.dataset": data}
    for name in ("first", "second"):
        run = config.make(
            "td3_bc",
            overrides={**quick, **small, "tasks.0.updates": 4, "run_dir": name},
        )
        runs.train(run, progress=False)
    settings = {f"agent.{key}": value for key, value in SMALL.items() if key != "hidden"}
    overrides = {
        **quick, **small, **settings, "agent.learners": ["first", "second"],
        "agent.learning_rate": 3e-3, "run_dir": "clone",
        "tasks.0.updates": 80, "tasks.0.name": "one",
        "tasks.1.dataset": data, "tasks.1.updates": 80, "tasks.1.name": "two",
    }  # fmt: skip
    folder = runs.train(config.make("oer", overrides=overrides), progress=False)
    results = json.loads((folder / "results.json").read_text())
    matrix = {(e["during"], e["task"]) for e in results["evaluations"]}
    assert matrix == {(0, 0), (1, 0), (1, 1)}
    assert results["resources"]["memory_rows"] == 40
    agent, _, tasks = runs.load_agent(folder)
    teacher, _, _ = runs.load_agent("second")
    obs = torch.randn(50, 11)
    agent.focus(tasks[1])
    before = float(teacher.run(teacher.act, obs, False).square().mean())
    error = agent.run(agent.act, obs, False) - teacher.run(teacher.act, obs, False)
    assert float(error.square().mean()) < 0.5 * before
    state = teacher.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in agent.learner.state_dict().items())
    for other, message in (
        ({"agent.hidden": [8, 8]}, "does not fit this agent's settings"),
        ({"agent.learner": "bc"}, "is a run of TD3BC, agent.learner is bc"),
    ):
        with pytest.raises(UserError, match=message):
            runs.train(config.make("oer", overrides={**overrides, **other, "run_dir": "no"}))
    played = [(e["during"], e["task"]) for e in results["evaluations"]]
    assert len(played) == len(matrix)  # once per task, not once more after the selection
    shifted = EvaluationSettings(episodes=1, shift="mass:scale=1.0")
    same = evaluated("clone", {}, EvaluationSettings(episodes=1))
    for (_, plain), (_, moved) in zip(same, evaluated("clone", {}, shifted), strict=True):
        np.testing.assert_array_equal(plain.returns, moved.returns)
    with pytest.raises(UserError, match="names 1 runs for 2 tasks"):
        one = {**overrides, "agent.learners": ["first"], "run_dir": "other"}
        runs.train(config.make("oer", overrides=one), progress=False)
