"""CDSA: what a correction may change, what its models see, and how runs share them."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from rl_shift import cli, config, runs, seeding
from rl_shift.agents.cdsa import CDSA
from rl_shift.agents.td3_bc import TD3BC
from rl_shift.buffer import Buffer
from rl_shift.config import Task
from rl_shift.errors import UserError
from rl_shift.held_out import Best, split_by_episode
from rl_shift.networks import MLP

OBS, ACTION = Box(-np.inf, np.inf, (3,), np.float32), Box(-1.0, 1.0, (2,), np.float32)
SMALL: dict[str, Any] = {
    "hidden": (8,), "model_hidden": (8,), "batch_size": 16, "model_batch_size": 16,
    "score_updates": 12, "inverse_updates": 12, "forward_updates": 12, "check_every": 4,
    "base_config": {"hidden": (8,)}, "judge": "off",
}  # fmt: skip


def flat_data(rows: int = 400, controllable: bool = True) -> Buffer:
    """Episodes of ten rows in turn terminated and truncated; s' = s + a, unless it is noise."""
    rng = seeding.numpy_generator(0, "cdsa")
    obs = rng.normal(size=(rows, 3)).astype(np.float32)
    action = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    moved = (
        np.concatenate([action, action[:, :1]], -1) if controllable else rng.normal(size=(rows, 3))
    )
    last = np.arange(rows) % 10 == 9
    odd = np.arange(rows) // 10 % 2 == 1
    return Buffer.from_arrays(
        {
            "obs": obs, "action": action, "next_obs": (obs + moved).astype(np.float32),
            "reward": np.zeros(rows, np.float32), "terminated": last & odd,
            "truncated": last & ~odd,
            "task": np.zeros(rows, np.int64),
        }
    )  # fmt: skip


def made(**changes: Any) -> CDSA:
    with seeding.forked(0):
        return CDSA(OBS, ACTION, CDSA.Config(**{**SMALL, **changes}))


def prepared(data: Buffer | None = None, **changes: Any) -> CDSA:
    """Every preparatory stage run to its end, as the trainer does."""
    agent, data = made(**changes), data or flat_data()
    task = Task(name="toy", dataset="toy", updates=1, observation_space=OBS, action_space=ACTION)
    with seeding.forked(1):
        agent.begin_task(task, data)
        for stage in agent.stages(task):
            agent.stage = stage.name
            for done in range(1, stage.updates + 1):
                agent.update(agent.sample(data))
                agent.advance()
                if not stage.counted and (done % stage.check_every == 0 or done == stage.updates):
                    if agent.check(stage, done, data):
                        break
    agent.stage = ""
    return agent


@pytest.fixture(scope="module")
def agent() -> CDSA:
    trained = prepared(learning_rate=1e-2, inverse_updates=150, forward_updates=40, patience=0)
    assert bool(trained.inverse.usable)  # what the state channel needs
    return trained


def with_fields(agent: CDSA, **changes: Any) -> CDSA:
    """The same models with other evaluation-time values."""
    settings = dataclasses.replace(agent.config, **changes)
    other = CDSA(OBS, ACTION, settings)
    other.load_state(agent.state())
    return other


def observations(rows: int = 50) -> Tensor:
    with seeding.forked(2):
        return torch.randn(rows, 3)


def test_zero_steps_are_the_base_bit_by_bit(agent: CDSA) -> None:
    obs = observations()
    expected = agent.run(agent.base.act, obs, False)
    for changes in (
        {"eta_action": 0.0, "weight": 0.0}, {"correction": "off"},
        {"eta_action": 0.0, "eta_state": 0.0}, {"channels": "state", "eta_state": 0.0},
    ):  # fmt: skip
        other = with_fields(agent, **changes)
        assert torch.equal(other.run(other.act, obs, False), expected), changes
    assert not torch.equal(agent.run(agent.act, obs, False), expected)
    torch.manual_seed(0)
    explored = agent.run(agent.act, obs, True)  # exploration is the base's own
    torch.manual_seed(0)
    assert torch.equal(explored, agent.run(agent.base.act, obs, True))


def test_without_a_displacement_the_action_channel_alone_is_left(agent: CDSA) -> None:
    obs = observations()
    alone = with_fields(agent, channels="action")
    still = with_fields(agent, eta_state=0.0)
    assert torch.equal(still.run(still.act, obs, False), alone.run(alone.act, obs, False))
    both = agent.run(agent.act, obs, False)
    assert not torch.equal(both, alone.run(alone.act, obs, False))
    for target in ("forward", "state"):
        convex = with_fields(agent, output="convex", weight=1.0, target=target)
        assert not torch.equal(convex.run(convex.act, obs, False), both)


@pytest.mark.parametrize("gate", ["off", "soft", "hard"])
@pytest.mark.parametrize("output", ["difference", "convex"])
def test_actions_stay_in_the_box_one_by_one_or_together(
    agent: CDSA, gate: str, output: str
) -> None:
    wild = with_fields(agent, eta_action=80.0, eta_state=50.0, weight=5.0, gate=gate, output=output)
    obs = 3 * observations(30)
    together = wild.run(wild.act, obs, False)
    assert (together.abs() <= 1).all() and (together.abs() == 1).any()
    single = torch.cat([wild.run(wild.act, obs[i : i + 1], False) for i in range(30)])
    torch.testing.assert_close(together, single, atol=1e-4, rtol=1e-4)


def test_the_judge_keeps_what_the_bases_critic_does_not_mind(agent: CDSA) -> None:
    obs = observations(200)
    judged = with_fields(agent, judge="value")
    free, base = agent.run(agent.act, obs, False), agent.run(agent.base.act, obs, False)
    found = judged.run(judged.act, obs, False)
    value = [judged.run(judged.action_value, obs, a) for a in (base, free)]
    kept = value[1] >= value[0]
    assert kept.any() and not kept.all()
    assert torch.equal(found, torch.where(kept[:, None], free, base))
    critic = agent.base.critic(agent.base.normalizer(obs), free)
    assert torch.equal(value[1], critic.amin(0)) and critic.shape == (2, 200)


@pytest.mark.parametrize("base", ["cql", "rebrac", "sac_n", "cfpi", "iql"])
def test_every_kind_of_critic_may_judge(base: str) -> None:
    settings = {"critics": 2} if base == "sac_n" else {}
    judged = made(base=base, base_config={"hidden": (8,), **settings}, judge="value")
    obs = observations()
    value = judged.run(judged.action_value, obs, torch.zeros(50, 2))
    critic = judged.base.critic(judged.base.normalizer(obs), torch.zeros(50, 2))
    assert torch.equal(value, critic.amin(0))


def test_a_base_without_a_critic_is_corrected_without_a_judge() -> None:
    blind = made(base="bc", judge="value")
    free = CDSA(OBS, ACTION, dataclasses.replace(blind.config, judge="off"), blind.base)
    free.load_state_dict(blind.state_dict())
    obs = observations()
    assert blind.run(blind.action_value, obs, torch.zeros(50, 2)) is None
    assert torch.equal(blind.run(blind.act, obs, False), free.run(free.act, obs, False))


def test_acting_draws_nothing_and_preparing_leaves_the_base_alone() -> None:
    base = TD3BC(OBS, ACTION, TD3BC.Config(hidden=(8,)))
    before = {k: v.clone() for k, v in base.tensors().items()}
    settings = {**SMALL, "base_run": "given"}
    wrapper = CDSA(OBS, ACTION, CDSA.Config(**settings), base)
    data, task = flat_data(), Task(name="toy", dataset="toy", updates=1)
    wrapper.begin_task(task, data)
    for stage in wrapper.stages(task):
        wrapper.stage = stage.name
        for done in range(stage.updates):
            wrapper.update(wrapper.sample(data))
            state = torch.default_generator.get_state()
            wrapper.check(stage, done + 1, data)
            assert torch.equal(state, torch.default_generator.get_state())
    state = torch.default_generator.get_state()
    wrapper.run(wrapper.act, observations(), False)
    assert torch.equal(state, torch.default_generator.get_state())
    assert base.updates == 0 and before.keys() == base.tensors().keys()
    assert all(torch.equal(v, base.tensors()[k]) for k, v in before.items())


@pytest.mark.parametrize("mode", ["joint", "state"])
def test_the_end_of_an_episode_never_reaches_models_of_transitions(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Tensor]] = {}
    original = Buffer.take

    def take(self: Buffer, index: Tensor) -> Any:
        seen.setdefault(watched.stage if watched else "", []).append(index.flatten())
        return original(self, index)

    watched: CDSA | None = None
    monkeypatch.setattr(Buffer, "take", take)
    data, watched = flat_data(), made(mode=mode)
    task = Task(name="toy", dataset="toy", updates=1)
    watched.begin_task(task, data)
    assert (torch.cat(seen.pop("")) % 10 != 9).all()  # statistics
    for stage in watched.stages(task)[:3]:
        watched.stage = stage.name
        for _ in range(30):
            watched.sample(data)
        watched.check(stage, stage.updates, data)
        ends = torch.cat(seen[stage.name]) % 10 == 9
        assert bool(ends.any()) == (stage.name == "score" and mode == "joint")
    assert set(seen) == {"score", "inverse", "forward"}


def test_the_split_keeps_episodes_whole() -> None:
    data = flat_data()
    train, held = split_by_episode(data)
    assert set(train.tolist()) | set(held.tolist()) == set(range(400))
    assert set((held // 10).tolist()) == {19, 39}
    assert not set((held // 10).tolist()) & set((train // 10).tolist())
    train, held = split_by_episode(flat_data(10))
    assert (train.tolist(), held.tolist()) == ([*range(9)], [9])  # a single episode: its end
    with pytest.raises(UserError, match="cannot be split"):
        split_by_episode(data, usable=torch.zeros(400, dtype=torch.bool))


def test_best_weights_are_kept_per_seed() -> None:
    net = MLP(1, (), 1)
    for p in net.parameters():
        p.data = torch.stack([p.data, p.data])  # two stacked seeds
    best = Best(net)
    best.loss, best.stale = best.loss.repeat(2), best.stale.repeat(2)
    offers = [(1.0, 3.0), (2.0, 2.0), (0.5, 4.0), (0.6, 5.0)]
    for number, losses in enumerate(offers):
        net.layers[0].weight.data.fill_(float(number))
        best.offer(net, torch.tensor(losses))
        assert not best.exhausted(0)
    assert best.loss.tolist() == [0.5, 2.0] and best.stale.tolist() == [1, 2]
    assert best.exhausted(1) and not best.exhausted(2)
    best.restore(net)
    assert net.layers[0].weight.flatten().tolist() == [2.0, 1.0]


def test_a_stage_ends_with_the_best_weights_after_its_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent, data = made(patience=2), flat_data()
    task = Task(name="toy", dataset="toy", updates=1)
    agent.begin_task(task, data)
    stage = agent.stages(task)[0]
    agent.stage, losses = "score", iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(agent, "held_out_loss", lambda batch: torch.tensor(next(losses)))
    ended = []
    for number in range(4):
        agent.average.layers[0].bias.data.fill_(float(number))
        ended.append(agent.check(stage, number + 1, data))
    assert ended == [False, False, False, True]
    assert (agent.average.layers[0].bias == 1.0).all() and agent.quantiles.known


def test_a_second_task_s_models_do_not_compete_with_the_first_one_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = made(patience=2)
    task = Task(name="toy", dataset="toy", updates=1)
    networks = {"score": agent.average, "inverse": agent.inverse.net, "forward": agent.dynamics}
    losses = iter([0.1, 0.2, 5.0, 4.0, 4.5, 4.6] * 3)  # of each model: easy data, then hard ones
    monkeypatch.setattr(agent, "held_out_loss", lambda batch: torch.tensor(next(losses)))
    for name, network in networks.items():
        for number, checks in ((1, 2), (2, 4)):
            data = flat_data()
            agent.begin_task(task, data)
            assert not agent.quantiles.known and not bool(agent.inverse.usable)
            [leg] = [leg for leg in agent.stages(task) if leg.name == name]
            agent.stage, ended = name, []
            for check in range(checks):
                next(network.parameters()).data.fill_(10.0 * number + check)
                ended.append(agent.check(leg, leg.updates if number == 1 else check + 1, data))
            if number == 2:  # after its own patience, with its own best weights
                assert ended == [False, False, False, True]
                assert (next(network.parameters()) == 21.0).all(), name


def test_unusable_inverse_dynamics_switch_the_state_channel_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    noisy = prepared(flat_data(controllable=False))
    assert "the state channel stays off" in caplog.text
    assert not bool(noisy.inverse.usable)
    obs, alone = observations(), with_fields(noisy, channels="action")
    assert torch.equal(noisy.run(noisy.act, obs, False), alone.run(alone.act, obs, False))


def test_what_a_mode_offers(caplog: pytest.LogCaptureFixture) -> None:
    names = lambda agent: [s.name for s in agent.stages(Task(name="x", updates=1))]  # noqa: E731
    assert names(made(mode="conditional")) == ["score", "offline"]
    assert names(made()) == ["score", "inverse", "forward", "offline"]
    assert names(made(forward_updates=0)) == ["score", "inverse", "offline"]
    plain = prepared(forward_updates=0)
    assert "the action channel alone corrects" in caplog.text
    obs, alone = observations(), with_fields(plain, channels="action")
    assert torch.equal(plain.run(plain.act, obs, False), alone.run(alone.act, obs, False))
    state_only = prepared(mode="state")
    still = with_fields(state_only, weight=0.0)
    expected = still.run(still.base.act, obs, False)
    assert torch.equal(still.run(still.act, obs, False), expected)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("level_count", (0, -1)), ("sigma_min", (0.0, -0.1, 0.6, math.nan)),
        ("sigma_max", (0.0, math.inf)), ("steps", ((), (0.2, 0.0), (-0.1,), (0.6,), (0.01,))),
        ("state_step", (0.0, 0.6)), ("eta_action", (-0.5,)), ("eta_state", (-0.5,)),
        ("weight", (-1.0,)), ("gate_quantile", (-0.1, 1.5, math.nan)),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(field: str, values: tuple[Any, ...]) -> None:
    told = f"CDSA: {field} must " if field in CDSA.limits else f"agent.{field} .*: give "
    for value in values:
        with pytest.raises(UserError, match=told):
            made(**{field: value})
    made(sigma_max=0.3, steps=(0.3, 0.02), gate_quantile=1.0)
    made(mode="conditional", state_step=0.9)  # nothing uses it
    made(level_count=1, steps=(0.5,), state_step=0.5)


def test_settings_that_would_correct_nothing_are_refused() -> None:
    for changes, message in (
        ({"mode": "state", "gate": "hard"}, "agent.gate hard looks at scores of actions"),
        ({"mode": "conditional", "channels": "state"}, r"offers the channels \[action\]"),
        ({"mode": "state", "channels": "action"}, r"offers the channels \[state\]"),
        ({"forward_updates": 0, "channels": "state"}, r"offers the channels \[action\]"),
        ({"mode": "state", "forward_updates": 0}, r"offers the channels \[\]"),
    ):
        with pytest.raises(UserError, match=message):
            made(**changes)
        made(**changes, correction="off")
    made(forward_updates=0, target="state", channels="state")


def test_only_what_was_measured_is_shown(agent: CDSA) -> None:
    obs = observations()
    state_only = made(mode="state")
    assert set(state_only.run(state_only.diagnostics, obs)) == {
        "correction/norm", "correction/mean_abs", "corrected/share"
    }  # fmt: skip
    found = agent.run(agent.diagnostics, obs)
    assert (found["score/before"] > 0).all() and (found["score/after"] > 0).all()


def test_models_are_reused_whatever_their_budget_was(agent: CDSA) -> None:
    other = made(score="elsewhere", forward_updates=7)
    other.reuse("score", agent)
    assert torch.equal(other.dynamics.weights[0], agent.dynamics.weights[0])
    with pytest.raises(UserError, match="has a forward model: give --agent.forward_updates 40"):
        made(score="elsewhere", forward_updates=0).reuse("score", agent)


# ---- from the command line ---------------------------------------------------------------------

FEW = ["--eval-episodes", "1", "--eval-lanes", "1", "--eval-every", "0", "--log-every", "10"]
TINY = ["--agent.hidden", "[8]", "--agent.batch_size", "16", "--agent.score_updates", "12",
        "--agent.check_every", "4", "--agent.mode", "conditional"]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A dataset, a base of two seeds, and a run of CDSA on its second seed."""
    folder = tmp_path_factory.mktemp("cdsa")
    paths = {name: str(folder / name) for name in ("data.hdf5", "base", "cdsa")}
    data = paths["data.hdf5"]
    assert cli.main(["data", "collect", "--policy", "random", "--env", "Pendulum-v1",
                     "--steps", "600", "--out", data]) == 0  # fmt: skip
    assert cli.main(["train", "td3_bc", "--dataset", data, "--updates", "5", "--seeds", "2",
                     "--processes", "1", "--agent.hidden", "[8]", "--run-dir", paths["base"],
                     *FEW]) == 0  # fmt: skip
    assert cli.main(["train", "cdsa", "--dataset", data, "--agent.base", paths["base"] + "#1",
                     "--run-dir", paths["cdsa"], *TINY, *FEW]) == 0  # fmt: skip
    return paths


def test_one_score_module_serves_every_base(files: dict[str, str], tmp_path: Path) -> None:
    second = str(tmp_path / "second")
    argv = ["train", "cdsa", "--dataset", files["data.hdf5"], "--agent.base", files["base"] + "#0"]
    assert cli.main([*argv, "--agent.score", files["cdsa"], "--run-dir", second, *TINY, *FEW]) == 0
    first, other = runs.load_agent(files["cdsa"])[0], runs.load_agent(second)[0]
    for name in ("average", "quantiles", "normalizer"):
        mine, theirs = (a.get_submodule(name).state_dict() for a in (first, other))
        assert all(torch.equal(v, theirs[k]) for k, v in mine.items())
    assert other.updates == 0 and first.updates == 12
    assert not torch.equal(first.base.actor.net.layers[0].bias, other.base.actor.net.layers[0].bias)


@pytest.mark.parametrize("updates", [12, 10])
def test_the_inverse_dynamics_are_reported_per_dimension(
    files: dict[str, str], tmp_path: Path, updates: int
) -> None:
    """Also where the last update of the stage is logged anyway."""
    argv = ["train", "cdsa", "--dataset", files["data.hdf5"], "--agent.base", files["base"] + "#0",
            "--agent.model_hidden", "[8]", "--agent.inverse_updates", f"{updates}",
            "--agent.forward_updates", "2", "--run-dir", str(tmp_path / "run"), *TINY]  # fmt: skip
    assert cli.main([*argv, "--agent.mode", "joint", *FEW]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    [found] = [line for line in map(json.loads, lines) if "inverse/mse/0" in line]
    inverse = runs.load_agent(tmp_path / "run")[0].inverse
    assert found["inverse/mse/0"] == pytest.approx(float(inverse.error[0]))
    assert found["inverse/variance/0"] == pytest.approx(float(inverse.variance[0]))
    assert float(inverse.error[0]) > 0 and "inverse/mse/1" not in found


def test_a_budget_that_trains_nothing_is_said(
    files: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    argv = ["train", "cdsa", "--dataset", files["data.hdf5"], "--agent.base", files["base"] + "#0"]
    argv += ["--agent.score", files["cdsa"], *TINY, *FEW]
    assert cli.main([*argv, "--run-dir", str(tmp_path / "none")]) == 0
    assert "are not made" not in caplog.text
    assert cli.main([*argv, "--updates", "100", "--run-dir", str(tmp_path / "some")]) == 0
    assert "stays as it is: the 100 updates of this task are not made" in caplog.text


def test_evaluation_with_and_without(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", files["cdsa"], "--episodes", "2", "--json", str(tmp_path / "r.json")]
    assert cli.main([*argv, "--compare", "agent.correction=off,on"]) == 0
    out = capsys.readouterr().out
    assert "correction=on minus correction=off: return" in out
    assert "CVaR 10 %" in out and "correction/norm" in out
    off, on = json.loads((tmp_path / "r.json").read_text())["evaluations"]
    assert (
        off["diagnostics"]["correction/norm"] == [0.0] and on["diagnostics"]["correction/norm"][0]
    )
    plain = [
        "evaluate",
        files["base"] + "#1",
        "--episodes",
        "2",
        "--json",
        str(tmp_path / "b.json"),
    ]
    assert cli.main(plain) == 0
    [base] = json.loads((tmp_path / "b.json").read_text())["evaluations"]
    assert off["returns"] == base["returns"]  # the frozen base is the one that was named


def test_mistakes_are_explained(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--dataset", files["data.hdf5"], "--agent.base", files["base"] + "#0"]
    cases = [
        ([*base, "--agent.score", files["cdsa"], *TINY, "--agent.level_count", "4"], "level_count"),
        ([*base, "--agent.score", files["base"] + "#0", *TINY], "a run of TD3BC, not of CDSA"),
        (["--env", "Pendulum-v1", "--env-steps", "50", *TINY], "learnt from a dataset"),
    ]  # fmt: skip
    for number, (flags, message) in enumerate(cases):
        argv = ["train", "cdsa", *flags, "--run-dir", str(tmp_path / f"{number}"), *FEW]
        assert cli.main(argv) == 2
        assert message in capsys.readouterr().err


def test_models_of_other_data_and_uncalibrated_gates_are_refused(files: dict[str, str]) -> None:
    source, _, [task] = runs.load_agent(files["cdsa"])
    settings = dataclasses.replace(source.config, score="elsewhere")
    other = CDSA(source.observation_space, source.action_space, settings)
    other.reuse("score", source)
    run = config.load(Path(files["cdsa"], "config.yaml"))
    data = Buffer.from_arrays(
        {k: v + (k == "obs") for k, v in _arrays(run).items() if k in ("obs", "action")}
    )
    with pytest.raises(UserError, match="another mean observation"):
        other.begin_task(task, data)
    fresh = CDSA(source.observation_space, source.action_space,
                 dataclasses.replace(source.config, gate="hard"))  # fmt: skip
    with pytest.raises(UserError, match="no gate quantiles"):
        fresh.focus(task)
    with pytest.raises(UserError, match="did not end"):
        other.reuse("score", fresh)


def _arrays(run: config.RunConfig) -> dict[str, Any]:
    from rl_shift import datasets

    return datasets.load(datasets.resolve(str(run.tasks[0].dataset)))
