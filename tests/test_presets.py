"""Values of single datasets in presets and files, and CORL's tables entry by entry."""

from pathlib import Path
from typing import Any

import pytest

from rl_shift import config
from rl_shift.errors import UserError

# dataset, actor_bc_coef, critic_bc_coef
REBRAC = """
antmaze-large-diverse-v2 0.002 0.002
antmaze-large-play-v2 0.002 0.001
antmaze-medium-diverse-v2 0.001 0.0
antmaze-medium-play-v2 0.001 0.0005
antmaze-umaze-diverse-v2 0.003 0.001
antmaze-umaze-v2 0.003 0.002
door-cloned-v1 0.01 0.1
door-expert-v1 0.05 0.01
door-human-v1 0.1 0.1
halfcheetah-expert-v2 0.01 0.01
halfcheetah-full-replay-v2 0.001 0.1
halfcheetah-medium-expert-v2 0.01 0.1
halfcheetah-medium-replay-v2 0.01 0.001
halfcheetah-medium-v2 0.001 0.01
halfcheetah-random-v2 0.001 0.1
hammer-cloned-v1 0.1 0.5
hammer-expert-v1 0.01 0.01
hammer-human-v1 0.01 0.5
hopper-expert-v2 0.1 0.1
hopper-full-replay-v2 0.01 0.01
hopper-medium-expert-v2 0.1 0.01
hopper-medium-replay-v2 0.05 0.5
hopper-medium-v2 0.01 0.01
hopper-random-v2 0.001 0.01
maze2d-large-v1 0.003 0.001
maze2d-medium-v1 0.003 0.001
maze2d-umaze-v1 0.003 0.001
pen-cloned-v1 0.05 0.5
pen-expert-v1 0.01 0.01
pen-human-v1 0.1 0.5
relocate-cloned-v1 0.1 0.01
relocate-expert-v1 0.05 0.01
relocate-human-v1 0.1 0.01
walker2d-expert-v2 0.01 0.5
walker2d-full-replay-v2 0.01 0.01
walker2d-medium-expert-v2 0.01 0.01
walker2d-medium-replay-v2 0.05 0.01
walker2d-medium-v2 0.05 0.1
walker2d-random-v2 0.01 0.0
"""
# dataset, critics of SAC-N, critics of EDAC, eta of EDAC
ENSEMBLES = """
antmaze-large-diverse-v2 25 10 1.0
antmaze-large-play-v2 25 10 1.0
antmaze-medium-diverse-v2 25 10 1.0
antmaze-medium-play-v2 25 10 1.0
antmaze-umaze-diverse-v2 25 10 1.0
antmaze-umaze-v2 25 10 1.0
door-cloned-v1 100 50 200.0
door-expert-v1 100 50 200.0
door-human-v1 100 50 200.0
halfcheetah-medium-expert-v2 10 10 5.0
halfcheetah-medium-replay-v2 10 10 1.0
halfcheetah-medium-v2 10 10 1.0
hammer-cloned-v1 100 50 200.0
hammer-expert-v1 100 50 200.0
hammer-human-v1 100 50 200.0
hopper-medium-expert-v2 200 50 1.0
hopper-medium-replay-v2 200 50 1.0
hopper-medium-v2 500 50 1.0
maze2d-large-v1 25 10 0.1
maze2d-medium-v1 25 10 0.1
maze2d-umaze-v1 25 10 0.1
pen-cloned-v1 100 20 10.0
pen-expert-v1 100 20 10.0
pen-human-v1 100 20 1000.0
relocate-cloned-v1 100 50 200.0
relocate-expert-v1 100 50 200.0
relocate-human-v1 100 50 200.0
walker2d-medium-expert-v2 20 10 5.0
walker2d-medium-replay-v2 20 10 1.0
walker2d-medium-v2 20 10 1.0
"""


def rows(table: str) -> list[tuple[str, list[float]]]:
    found = [line.split() for line in table.strip().splitlines()]
    return [(name, [float(x) for x in values]) for name, *values in found]


def suite(dataset: str) -> str:
    first = dataset.partition("-")[0]
    if first in ("maze2d", "antmaze"):
        return first
    return "adroit" if first in ("pen", "door", "hammer", "relocate") else "gym_mujoco"


def chosen(preset: str, dataset: str, *files: Path, **overrides: Any) -> Any:
    tasks = {"tasks.0.dataset": dataset} | overrides
    return config.make(preset=preset, files=files, overrides=tasks)


@pytest.mark.parametrize("where", ["gym_mujoco", "maze2d", "antmaze", "adroit"])
def test_rebrac_has_the_table(where: str) -> None:
    for dataset, (actor, critic) in [row for row in rows(REBRAC) if suite(row[0]) == where]:
        run = chosen(f"rebrac.{where}", dataset)
        agent = run.agent
        assert (agent.actor_bc_coef, agent.critic_bc_coef) == (actor, critic), dataset
        mujoco, maze = where == "gym_mujoco", where == "antmaze"
        assert agent.batch_size == (1024 if mujoco else 256)
        assert agent.actor_learning_rate == (1e-3 if mujoco else 3e-4)
        assert agent.critic_learning_rate == (1e-3 if mujoco else 5e-5 if maze else 3e-4)
        assert agent.discount == (0.999 if maze else 0.99)
        assert run.tasks[0].reward == ("100,0" if maze else "raw")


@pytest.mark.parametrize("where", ["gym_mujoco", "maze2d", "antmaze", "adroit"])
def test_sac_n_and_edac_have_the_table(where: str) -> None:
    for dataset, (many, fewer, eta) in [row for row in rows(ENSEMBLES) if suite(row[0]) == where]:
        agent = chosen(f"sac_n.{where}", dataset).agent
        assert (agent.critics, agent.eta) == (many, 0.0), dataset
        agent = chosen(f"sac_n.edac_{where}", dataset).agent
        assert (agent.critics, agent.eta) == (fewer, eta), dataset


def test_cql_awac_and_iql() -> None:
    for where, alpha, lagrange, gap, rate, layers, reward, normalize in (
        ("gym_mujoco", 10, False, 5.0, 3e-5, 3, "raw", True),
        ("maze2d", 10, True, 5.0, 3e-5, 3, "raw", True),
        ("antmaze", 5, True, 0.8, 1e-4, 5, "10,-5", False),
        ("adroit", 1, False, 5.0, 1e-4, 3, "raw", True),
    ):
        run = chosen(f"cql.{where}", "some-set")
        agent = run.agent
        found = (agent.cql_alpha, agent.lagrange, agent.gap, agent.actor_learning_rate)
        assert found == (alpha, lagrange, gap, rate)
        assert len(agent.critic_hidden or agent.hidden) == layers
        assert (run.tasks[0].reward, agent.normalize) == (reward, normalize)
        assert agent.max_backup == (where == "antmaze")
        assert agent.difference_min == (-200 if where == "antmaze" else float("-inf"))
        assert agent.critic_learning_rate == 3e-4
        temperature = chosen(f"awac.{where}", "some-set").agent.temperature
        assert temperature == (0.3333 if where == "gym_mujoco" else 0.1)
    assert chosen("cql.gym_mujoco", "hopper-medium-v2").tasks[0].reward == "normalize"
    plain = chosen("iql.gym_mujoco", "walker2d-medium-v2").agent
    assert (plain.expectile, plain.beta, plain.deterministic) == (0.7, 3.0, False)
    for name in ("hopper-medium-v2", "hopper-medium-replay-v2"):
        run = chosen("iql.gym_mujoco", name)
        assert (run.agent.deterministic, run.agent.tau) == (True, 0.001)
        assert run.tasks[0].reward == "normalize"
    expert = chosen("iql.gym_mujoco", "hopper-medium-expert-v2").agent
    assert (expert.expectile, expert.beta) == (0.5, 6.0)
    maze, hand = chosen("iql.antmaze", "x"), chosen("iql.adroit", "x").agent
    assert (maze.agent.expectile, maze.agent.beta, maze.tasks[0].reward) == (0.9, 10.0, "1,-1")
    assert (hand.expectile, hand.beta, hand.dropout) == (0.8, 3.0, 0.1)
    kitchen = chosen("iql.kitchen", "x").agent
    assert (kitchen.expectile, kitchen.beta, kitchen.dropout) == (0.7, 0.5, 0.1)


FAMILIES = ("gym_mujoco", "maze2d", "antmaze", "adroit", "kitchen")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("agent", ["awac", "bc", "cfpi", "cql", "iql", "rebrac", "sac_n", "spl"])
def test_every_offline_agent_has_a_preset_of_every_family(agent: str, family: str) -> None:
    run = chosen(f"{agent}.{family}", "some-set")
    assert run.tasks[0].updates >= 500_000
    if agent == "spl":  # its learner is set as it is without SPL
        own = chosen(f"iql.{family}", "some-set")
        given = dict(run.agent.base_config)
        assert given == {k: getattr(own.agent, k) for k in given}
        assert run.tasks[0].reward == own.tasks[0].reward


# ---- the mechanism -----------------------------------------------------------------------------


def test_a_dataset_is_matched_by_pattern_and_by_the_stem_of_its_path() -> None:
    for name in ("deep-ope-hopper-mixed-500k", "/data/deep-ope-hopper-mixed-50k.hdf5"):
        assert chosen("rebrac.gym_mujoco", name).agent.critic_bc_coef == 0.5
    # no entry: the family's values
    assert chosen("rebrac.gym_mujoco", "my-own-set").agent.batch_size == 1024


def test_entries_lie_between_their_own_layer_and_the_next(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(
        "agent: {alpha: 1}\nlog_every: 7\n"
        "datasets:\n  set-?  other: {agent: {alpha: 2}, log_every: 8}\n"
        "  set-b: {agent: {alpha: 3}, tasks: [{reward: normalize}]}\n"
    )
    second.write_text("log_every: 9\n")

    def of(dataset: str, *files: Path, **overrides: Any) -> tuple[Any, ...]:
        run = chosen("td3_bc.gym_mujoco", dataset, *files, **overrides)
        return run.agent.alpha, run.log_every, run.tasks[0].reward

    assert of("elsewhere", first) == (1, 7, "raw")
    assert of("set-a", first) == of("other", first) == (2, 8, "raw")
    assert of("set-b", first) == (3, 8, "normalize")  # a later entry before an earlier one
    assert of("set-b", first, second) == (3, 9, "normalize")
    assert of("set-b", first, **{"agent.alpha": 4}) == (4, 8, "normalize")
    # the dataset may come from a file as well, and what is resolved needs no entries
    second.write_text("tasks: [{dataset: set-b}]\n")
    run = config.make("td3_bc", files=[first, second], overrides={"tasks.0.updates": 1})
    assert run.agent.alpha == 3
    assert "datasets" not in config.dump(run)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ("{other: {agent: {alpho: 2}}}", "alpho.*datasets 'other'"),  # though it is not chosen
        ("{other: 3}", "datasets 'other' must hold keys and values"),
        ("[1]", "datasets in .* must hold a pattern"),
    ],
)
def test_bad_entries_are_refused(entries: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"datasets: {entries}\n")
    with pytest.raises(UserError, match=told):
        chosen("td3_bc.gym_mujoco", "some-set", file)
