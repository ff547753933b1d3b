"""Precedence of the four layers, dump and reload, and what bad input is told."""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from rl_shift import agents, config
from rl_shift.agent import Agent
from rl_shift.config import RunConfig, Task
from rl_shift.errors import UserError
from rl_shift.options import Parser, build, options_of, split

TINY: dict[str, Any] = {"tasks.0.dataset": "some-set", "tasks.0.updates": 10}


def parsed(*argv: str) -> RunConfig:
    """What `rl-shift train` makes of a command line with AGENT, --preset, --config and flags."""
    from rl_shift.commands import configured

    return configured(list(argv))


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---- precedence --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["agent.alpha", "eval_every", "tasks.0.updates", "tasks.0.offline_fraction"]
)
def test_defaults_then_preset_then_files_then_flags(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults, preset, first, second, flag = (0.5, 0.1, 0.2, 0.3, 0.4)
    if key in ("eval_every", "tasks.0.updates"):
        defaults, preset, first, second, flag = (5000, 1, 2, 3, 4)
    if key == "tasks.0.updates":
        defaults = 0
    if key == "agent.alpha":
        defaults = 2.5

    def text(value: float) -> str:
        top, _, rest = key.partition(".")
        inner = {"tasks": f"tasks:\n- {key[8:]}: {value}", "agent": f"agent: {{{rest}: {value}}}"}
        return inner.get(top, f"{key}: {value}") + "\n"

    presets = tmp_path / "presets"
    presets.mkdir()
    written(presets / "td3_bc.layers.yaml", 'validated: "no"\n' + text(preset))
    monkeypatch.setattr(config, "files", lambda package: presets)
    stacked = ["--config", written(tmp_path / "a.yaml", text(first))]
    stacked += ["--config", written(tmp_path / "b.yaml", text(second))]
    base = ["--dataset", "some-set", "--env-steps", "7"]

    def value(*argv: str) -> Any:
        found: Any = parsed(*argv, *base)
        for part in key.split("."):
            found = found[int(part)] if part.isdecimal() else getattr(found, part)
        return found

    flag_name = "--" + key if "." in key else "--" + key.replace("_", "-")
    assert value("td3_bc") == defaults
    assert value("--preset", "td3_bc.layers") == preset
    assert value("--preset", "td3_bc.layers", *stacked[:2]) == first
    assert value("--preset", "td3_bc.layers", *stacked) == second
    assert value(flag_name, str(flag), "--preset", "td3_bc.layers", *stacked) == flag


def test_a_preset_needs_no_agent() -> None:
    run = parsed("--preset", "iql.gym_mujoco", "--dataset", "some-set")
    assert run.agent_name == "iql"
    assert run.tasks[0].updates == 1_000_000
    assert run.tasks[0].dataset == "some-set"


def test_an_agent_takes_the_presets_of_the_class_it_descends_from() -> None:
    run = parsed("er", "--preset", "oer.cheetah_vel")
    assert run.agent_name == "er"
    assert run.agent == dataclasses.replace(  # the same values, in a Config of its own
        run.agent, **dataclasses.asdict(parsed("--preset", "oer.cheetah_vel").agent)
    )
    with pytest.raises(UserError, match=r"AGENT names agent oer, but preset iql\.gym_mujoco"):
        parsed("oer", "--preset", "iql.gym_mujoco")


def test_short_flags_set_the_first_task() -> None:
    run = parsed("iql", "--dataset", "d", "--env", "E-v0", "--updates=3", "--env-steps", "4",
                 "--shift", "{gravity: 2}")  # fmt: skip
    task = run.tasks[0]
    assert (task.dataset, task.env, task.updates, task.env_steps) == ("d", "E-v0", 3, 4)
    assert task.shift == {"gravity": 2}


def test_one_entry_of_a_base_is_set_and_the_preset_keeps_the_others() -> None:
    run = parsed("--preset", "reactive.reward", "--agent.base_config.entropy_coefficient", "1e-2")
    assert run.agent.base_config["entropy_coefficient"] == 0.01
    assert run.agent.base_config["batch_size"] == 256
    for flag, message in {
        "clipp=1": "did you mean 'clip'", "clip=x": "must be float", "hidden=[1": "is not YAML",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            parsed("--preset", "reactive.reward", f"--agent.base_config.{flag}")


def test_further_tasks_by_flags_and_files(tmp_path: Path) -> None:
    file = written(tmp_path / "two.yaml", "tasks:\n- {dataset: a, updates: 1}\n- {dataset: b}\n")
    run = parsed("bc", "--config", file, "--tasks.1.updates", "20", "--tasks.2.env=E-v0",
                 "--tasks.2.env_steps", "30")  # fmt: skip
    assert [task.name for task in run.tasks] == ["a", "b", "E-v0"]
    assert [task.updates for task in run.tasks] == [1, 20, 0]
    assert run.tasks[2].env_steps == 30


def test_switches_and_spellings() -> None:
    run = parsed("--overwrite", "td3_bc", "--dataset", "d", "--updates", "1_000", "--eval_every",
                 "7", "--agent.normalize", "false", "--agent.hidden", "[32, 16]")  # fmt: skip
    assert run.overwrite
    assert run.agent_name == "td3_bc"
    assert run.tasks[0].updates == 1000
    assert run.agent.normalize is False
    assert run.agent.hidden == (32, 16)
    assert run.eval_every == 7


# ---- dump and reload ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", agents.names())
def test_dump_and_reload_give_an_equal_configuration(name: str, tmp_path: Path) -> None:
    overrides = {"compile": "on", "seed": 3, "processes": 2, "tasks.1.env": "E-v0"}
    overrides |= {"tasks.1.env_steps": 5, "tasks.1.shift": {"step": [1, 2]}, "run_dir": "x"}
    run = config.make(name, overrides=TINY | overrides)
    text = config.dump(run)
    again = config.load(written(tmp_path / "config.yaml", text))
    assert again == run
    assert config.dump(again) == text
    # where a run is kept is no part of it: the file can be given back for a second run
    assert again.run_dir is None
    assert parsed("--config", str(tmp_path / "config.yaml")) == run


def test_resolved_task_fields_stay_out_of_the_file() -> None:
    run = config.make("bc", overrides=TINY)
    task = dataclasses.replace(run.tasks[0], reference_scores=(0.0, 1.0), obs_pad=84)
    resolved = dataclasses.replace(run, tasks=(task,))
    assert config.dump(resolved) == config.dump(run)
    assert resolved == run


@pytest.mark.parametrize("name", config.presets())
def test_every_preset_parses_and_says_what_it_was_validated_on(name: str) -> None:
    run = config.make(preset=name, overrides={"tasks.0.dataset": "some-set"})
    assert run.agent_name == name.partition(".")[0]
    assert config.validated(name).partition(":")[0] in ("yes", "no")


def test_configurations_are_frozen() -> None:
    run = config.make("bc", overrides=TINY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seed = 1  # type: ignore[misc]


def test_run_folder_names_agent_data_seed_and_time() -> None:
    run = config.make("bc", overrides={"tasks.0.dataset": "/data/my set.hdf5"} | {"seed": 4,
                      "tasks.0.updates": 1})  # fmt: skip
    folder = config.run_folder(run)
    assert folder.parent == Path("runs")
    assert folder.name.startswith("bc.my-set.seed4.20")
    assert config.run_folder(dataclasses.replace(run, run_dir="there")) == Path("there")


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["td3_bd", "--dataset", "d", "--updates", "1"], "'td3_bd', did you mean 'td3_bc'?"),
        (["--dataset", "d"], "say which agent to train"),
        (["bc"], "give --dataset ID|PATH or --env ID"),
        (["bc", "--dataset", "d"], "--updates N"),
        (["bc", "--env", "E-v0"], "--env-steps N"),
        (["bc", "--env", "E-v0", "--updates", "1"], "give --dataset"),
        (["bc", "extra"], "unexpected argument 'extra'"),
        (["bc", "--updats", "1"], "--updats, did you mean '--updates'?"),
        (["bc", "--learning_rate", "1"], "did you mean '--agent.learning_rate'?"),
        (["bc", "--agent.learning_rat", "1"], "did you mean '--agent.learning_rate'?"),
        (["bc", "--updates", "many"], "--updates in the command line must be int, not 'many'"),
        (["bc", "--updates", "1.5"], "must be int"),
        (["bc", "--agent.batch_size", "x"], "--agent.batch_size in the command line must be int"),
        (["bc", "--compile", "maybe"], "one of off, on, graphs"),
        (["bc", "--updates"], "--updates needs a value (int)"),
        (["bc", "--preset", "iql.gym_mujoco"], "AGENT names agent bc, but preset iql.gym_mujoco"),
        (["--preset", "iql.gym_mujocco"], "did you mean 'iql.gym_mujoco'?"),
        (["--config", "td3_bc.gym_mujoco"], "a preset is given with --preset"),
        (["--config", "missing.yaml"], "cannot read config file missing.yaml"),
        (["bc", "--seeds", "0", "--dataset", "d", "--updates", "1"], "seeds must be at least 1"),
        (["bc", "--dataset", "d", "--updates=-1"], "must not be negative"),
        (["no.such_module:Agent"], "no module named 'no.such_module'"),
        (["dataclasses:Agnt"], "module 'dataclasses' has no class 'Agnt'"),
        (["dataclasses:Field"], "is not a class deriving from rl_shift.agent.Agent"),
    ],
)
def test_command_line_mistakes_are_one_line(
    argv: list[str], message: str, in_empty_folder: Path
) -> None:
    with pytest.raises(UserError) as caught:
        parsed(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agent: {alpah: 1}", "unknown key 'agent.alpah' in {path}, did you mean 'agent.alpha'?"),
        ("updates: 5", "did you mean 'tasks.0.updates'?"),
        ("tasks: [{updtes: 5}]", "unknown key 'tasks.0.updtes' in {path}, did you mean"),
        ("agnt: {alpha: 1}", "unknown key 'agnt'"),
        ("agent: 3", "agent in {path} must hold keys and values, not 3"),
        ("agent: {alpha: x}", "agent.alpha in {path} must be float, not 'x'"),
        ("agent: {normalize: 1}", "agent.normalize in {path} must be bool, not 1"),
        ("seed: 1.5", "seed in {path} must be int, not 1.5"),
        ("tasks: 5", "tasks in {path} must be a list of tasks"),
        ("compile: maybe", "compile in {path} must be one of off, on, graphs, not 'maybe'"),
        ("- 1", "{path} must hold keys and values"),
        ("a: [", "{path} line 1 is not valid YAML"),
        ("agent_name: iql", "{path} is for agent iql"),
    ],
)
def test_file_mistakes_name_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "mine.yaml", text)
    with pytest.raises(UserError) as caught:
        config.make("td3_bc", files=[path], overrides=TINY)
    assert message.replace("{path}", path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words_that_yaml_reads_as_booleans_and_floats(tmp_path: Path) -> None:
    path = written(tmp_path / "a.yaml", "compile: on\nagent: {alpha: 1e-3}\nthreads: 2\n")
    run = config.make("td3_bc", files=[path], overrides=TINY)
    assert (run.compile, run.agent.alpha, run.threads) == ("on", 1e-3, 2)


# ---- options of nested dataclasses, evaluation-time fields -------------------------------------


@dataclass(frozen=True)
class Correction:
    """Nested settings."""

    steps: int = 5  # how many
    scale: float = field(default=1.0, metadata={"evaluation": True})  # how far


@dataclass(frozen=True)
class Corrected:
    """Settings of a made-up agent."""

    rate: float
    kind: Literal["a", "b"] = field(default="a", metadata={"evaluation": True})
    correction: Correction = Correction(steps=7)
    widths: tuple[int, ...] = field(default_factory=lambda: (8, 8))


def test_nested_dataclasses_flatten_and_build() -> None:
    parser = Parser(options_of(Corrected))
    assert parser.options["correction.steps"].help == "how many"
    values = parser.defaults() | parser.layer({"rate": "1e-4", "correction": {"scale": 2}}, "x")
    built = build(Corrected, values)
    assert built == Corrected(1e-4, correction=Correction(7, 2.0))
    with pytest.raises(UserError, match="rate has no default"):
        build(Corrected, parser.defaults())


def test_only_evaluation_time_fields_may_change_at_evaluation() -> None:
    assert config.evaluation_fields(Corrected) == ("kind", "correction.scale")
    assert config.evaluation_overrides(Corrected, {"correction.scale": "0"}) == {
        "correction.scale": 0.0
    }
    with pytest.raises(UserError, match=r"agent\.rate .* fields: kind, correction\.scale"):
        config.evaluation_overrides(Corrected, {"rate": "1"})
    with pytest.raises(UserError, match="one of a, b"):
        config.evaluation_overrides(Corrected, {"kind": "c"})


def test_split_keeps_values_with_their_flags() -> None:
    words, flags = split(["a", "--x", "-1", "--y_z=2", "--on", "--g.b_c", "3", "b"], ["--on"])
    assert words == ["a", "b"]
    assert flags == ["--x=-1", "--y-z=2", "--on", "--g.b_c=3"]


# ---- agents ------------------------------------------------------------------------------------


def test_agents_are_found_by_file_name() -> None:
    assert {"bc", "iql", "sac", "td3_bc"} <= set(agents.names())
    assert agents.get("td3_bc").__name__ == "TD3BC"
    assert agents.get("rl_shift.agents.td3_bc:TD3BC") is agents.get("td3_bc")
    for name in agents.names():
        assert issubclass(agents.get(name), Agent)


PLUG_IN = """
from dataclasses import dataclass
from rl_shift.agent import Agent
class Mine(Agent):
    @dataclass(frozen=True)
    class Config:
        lr: float = 1.0  # ours
"""


def test_an_agent_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plug_in_agent.py").write_text(PLUG_IN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    run = parsed("plug_in_agent:Mine", "--dataset", "d", "--updates", "1", "--agent.lr", "2")
    assert run.agent_name == "plug_in_agent:Mine"
    assert run.agent.lr == 2.0
    assert config.load(written(tmp_path / "c.yaml", config.dump(run))) == run
    del sys.modules["plug_in_agent"]


def test_an_agent_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    point = EntryPoint("theirs", "rl_shift.agents.bc:BC", agents.ENTRY_POINT_GROUP)
    monkeypatch.setattr(agents, "entry_points", lambda group: [point])
    assert "theirs" in agents.names()
    assert agents.get("theirs") is agents.get("bc")


def test_a_module_missing_inside_the_users_agent_is_their_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_agent.py").write_text("import no_such_thing\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
        agents.get("broken_agent:Mine")


def test_task_checks_its_numbers() -> None:
    with pytest.raises(UserError, match="offline_fraction"):
        Task(name="x", offline_fraction=1.5)
