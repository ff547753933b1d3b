"""The resolved configuration of a run, and how it is put together.

Precedence: dataclass defaults < preset < files < flags. A preset is a YAML file of
`rl_shift.configs`; files are further YAML files, later ones winning. Tasks are merged by their
index: `tasks: [{updates: 5}]` in a file says the same as the flag `--tasks.0.updates 5`. Under
`datasets`, a preset or a file holds values for single datasets: the keys are patterns such as
`hopper-medium-v?` (several are separated by spaces), and every entry that matches the first task's
dataset overrides the rest of that layer. Nothing here imports torch or gymnasium until an agent is
named.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from rl_shift import agents
from rl_shift.errors import UserError, nearest
from rl_shift.options import Option, Parser, build, options_of

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from torch import Tensor

    from rl_shift.datasets import DatasetInfo

Layer = tuple[str, Mapping[str, Any]]  # where it comes from, nested plain data


@dataclass(frozen=True)
class TaskSettings:
    """The part of a task that config.yaml holds."""

    name: str = ""  # default: the dataset's or environment's name
    env: str | None = None  # Gymnasium id; default: the dataset's
    dataset: str | None = None  # id or path
    updates: int = 0  # gradient updates on the dataset
    env_steps: int = 0  # environment steps, after the updates
    offline_fraction: float = 0.5  # share of the dataset in a batch once env steps are collected
    shift: str | dict[str, Any] | None = None  # distribution shift of the environment
    reward: str = "raw"  # raw, normalize or SCALE,SHIFT

    def __post_init__(self) -> None:
        """Refuses budgets and fractions that mean nothing."""
        which = f"task {self.name!r}: " if self.name else ""
        for name in ("updates", "env_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{which}{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.offline_fraction <= 1:
            raise UserError(f"{which}offline_fraction must lie between 0 and 1")


@dataclass(frozen=True)
class Task(TaskSettings):
    """One leg of a run; what is resolved before the start is no part of config.yaml."""

    observation_space: Space[Any] | None = field(default=None, compare=False)
    action_space: Space[Any] | None = field(default=None, compare=False)
    reference_scores: tuple[float, float] | None = field(default=None, compare=False)
    obs_pad: int = field(default=0, compare=False)  # zeros behind the environment's observations
    termination: Callable[[Tensor, Tensor, Tensor], Tensor] | None = field(
        default=None, compare=False
    )
    data: DatasetInfo | None = field(default=None, compare=False)

    def plain(self) -> dict[str, Any]:
        """Settings, spaces and scores as plain data, for checkpoints."""
        return {
            **self.settings(),
            "observation_space": _space_to_plain(self.observation_space),
            "action_space": _space_to_plain(self.action_space),
            "reference_scores": self.reference_scores,
            "obs_pad": self.obs_pad,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Task:
        """The task that `plain` came from."""
        spaces = {k: _space_from_plain(plain[k]) for k in ("observation_space", "action_space")}
        return cls(**{**plain, **spaces})

    def settings(self) -> dict[str, Any]:
        """The fields of config.yaml as plain data."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(TaskSettings)}


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on; `run_dir` and `overwrite` only say where it is kept."""

    agent_name: str
    agent: Any  # an instance of the agent's Config
    tasks: tuple[Task, ...]
    seed: int = 0  # first seed
    seeds: int = 1  # how many seeds, counted up from --seed
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    threads: int = 1  # CPU threads per process
    compile: Literal["off", "on", "graphs"] = "off"  # graphs: CUDA only
    precision: Literal["highest", "high", "medium"] = "highest"  # of float32 matrix products
    run_dir: str | None = field(default=None, compare=False)  # default: runs/AGENT.DATA.seedN.TIME
    overwrite: bool = field(default=False, compare=False)  # empty a run folder that is not empty
    log_every: int = 1000  # in updates; in env steps where a task has them; so are the next two
    eval_every: int = 5000  # 0: only at the end
    eval_episodes: int = 10  # episodes per evaluation and seed
    life_every: int = 0  # env steps per recorded reward of online tasks; 0: 100 if they shift
    lanes: int = 1  # environments that collect side by side in online tasks
    eval_lanes: int = 10  # environments that are evaluated side by side
    save_every: int = 50_000  # 0: only at the end
    keep_checkpoints: int = 2  # older ones are removed
    processes: int | None = None  # for seeds that cannot share one; default: the number of cores
    data_mode: Literal["native", "legacy_qlearning"] = "native"  # legacy: as D4RL cuts episodes
    data_memory: Literal["auto", "ram", "disk"] = field(
        default="auto", compare=False
    )  # disk: mapped

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        positive = ("seeds", "threads", "log_every", "eval_episodes", "eval_lanes", "lanes")
        least = dict.fromkeys(positive, 1) | {"keep_checkpoints": 1}
        least |= {"seed": 0, "eval_every": 0, "save_every": 0, "life_every": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"{name} must be at least {bound}, not {getattr(self, name)}")
        if self.seed >= 2**63:
            raise UserError(f"seed must be less than 2**63, not {self.seed}")
        if self.processes is not None and self.processes < 1:
            raise UserError(f"processes must be at least 1, not {self.processes}")


def make(
    agent: str | None = None,
    *,
    preset: str | None = None,
    files: Sequence[str | Path] = (),
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """A configuration from an agent's name, a preset, YAML files and overrides, in that order.

    `overrides` has dotted keys, as the flags have: `{"tasks.0.updates": 1000, "agent.alpha": 1}`.
    """
    layers = layers_of(preset, files)
    if overrides:
        layers.append(("overrides", nested(overrides)))
    return resolve(chosen_agent(agent, preset, layers), layers)


def load(path: str | Path) -> RunConfig:
    """The configuration of a run folder's config.yaml."""
    return make(files=[path])


def dump(config: RunConfig) -> str:
    """The text of config.yaml; `load` gives an equal RunConfig."""
    skipped = ("agent_name", "agent", "tasks", "run_dir", "overwrite")
    data: dict[str, Any] = {"agent_name": config.agent_name}
    data["agent"] = plain(config.agent)
    data["tasks"] = [task.settings() for task in config.tasks]
    for f in dataclasses.fields(config):
        if f.name not in skipped:
            data[f.name] = getattr(config, f.name)
    try:
        return yaml.safe_dump(_plain(data), sort_keys=False)
    except yaml.YAMLError as error:
        raise UserError(
            f"a setting of {config.agent_name} cannot be written to config.yaml: "
            f"{' '.join(map(str, error.args))}; use numbers, words, booleans, lists and mappings"
        ) from error


def plain(agent_config: Any) -> dict[str, Any]:
    """An agent's Config as plain data."""
    result: dict[str, Any] = _plain(dataclasses.asdict(agent_config))
    return result


def run_folder(config: RunConfig) -> Path:
    """The run folder: the one asked for, else runs/AGENT.DATA.seedN.TIME."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    task = config.tasks[0]
    agent = config.agent_name.rpartition(":")[2]
    what = re.sub(r"[^\w.-]+", "-", task.name)
    return Path("runs", f"{agent}.{what}.seed{config.seed}.{time.strftime('%Y%m%d-%H%M%S')}")


def evaluation_fields(config_class: type) -> tuple[str, ...]:
    """The fields marked `field(metadata=EVALUATION)`: `evaluate` may change them."""
    return tuple(o.key for o in options_of(config_class) if o.evaluation)


def evaluation_overrides(config_class: type, values: Mapping[str, str]) -> dict[str, Any]:
    """Typed values for evaluation-time fields, given as text; any other field is refused."""
    allowed = evaluation_fields(config_class)
    for name in values:
        if name not in allowed:
            listed = ", ".join(allowed) or "none"
            raise UserError(
                f"agent.{name} cannot be changed at evaluation; this agent's evaluation-time "
                f"fields: {listed}"
            )
    parser = Parser(options_of(config_class, "agent."))
    flags = [f"--agent.{name}={value}" for name, value in values.items()]
    return {k.removeprefix("agent."): v for k, v in parser.flags(flags).items()}


# ---- presets -----------------------------------------------------------------------------------


def presets() -> list[str]:
    """Names of the presets: `<agent>.<suite>`."""
    folder = files("rl_shift.configs")
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def validated(preset: str) -> str:
    """What the preset says it was validated on."""
    return str(_read_preset(preset).get("validated", "no"))


def _read_preset(name: str) -> dict[str, Any]:
    known = presets()
    if name not in known:
        raise UserError(
            f"unknown preset {name!r}{nearest(name, known)}; `rl-shift list presets` shows all, "
            "and a file of your own is given with --config"
        )
    text = files("rl_shift.configs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return _mapping(text, f"preset {name}")


# ---- layers ------------------------------------------------------------------------------------


def layers_of(preset: str | None, paths: Sequence[str | Path]) -> list[Layer]:
    """The preset and the files as plain data."""
    layers: list[Layer] = []
    if preset is not None:
        data = _read_preset(preset)
        data.pop("validated", None)
        layers.append((f"preset {preset}", data))
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            hint = " (a preset is given with --preset)" if str(path) in presets() else ""
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(f"cannot read config file {path}: {reason}{hint}") from error
        layers.append((str(path), _mapping(text, str(path))))
    return layers


def chosen_agent(name: str | None, preset: str | None, layers: Sequence[Layer]) -> str:
    """The one agent that AGENT, preset and files agree on; AGENT may descend from the preset's."""
    said = [("AGENT", name)] if name is not None else []
    if preset is not None:
        parent = preset.partition(".")[0]
        if name in (None, parent) or not issubclass(agents.get(str(name)), agents.get(parent)):
            said.append((f"preset {preset}", parent))
    said += [(where, str(data["agent_name"])) for where, data in layers if "agent_name" in data]
    if not said:
        raise UserError(
            f"say which agent to train: AGENT ({', '.join(agents.names())}, or module:Class), "
            "--preset, or a --config file with agent_name"
        )
    first_where, first = said[0]
    for where, other in said[1:]:
        if other != first:
            raise UserError(f"{first_where} names agent {first}, but {where} is for agent {other}")
    return first


def resolve(agent_name: str, layers: Sequence[Layer], flags: Sequence[str] = ()) -> RunConfig:
    """Merges defaults, layers and flags (`--key=value`) for a known agent; checks every key."""
    config_class = config_class_of(agent_name)
    indexed = [(where, _with_indexed_tasks(data, where)) for where, data in layers]
    named = [int(index) for _, data in indexed for index in data.get("tasks") or ()]
    count = max([0, *named, *_task_indices(flags)]) + 1
    parser = run_parser(config_class, count)

    own = [parser.layer(_without_datasets(data), where) for where, data in indexed]
    whole, parts = parser.parts(flags)
    from_flags = parser.flags(whole)
    named_last = [v["tasks.0.dataset"] for v in (*own, from_flags) if "tasks.0.dataset" in v]
    dataset = Path(str(named_last[-1])).stem if named_last else ""
    values = parser.defaults()
    for (where, data), plain_values in zip(indexed, own, strict=True):
        values |= plain_values | _values_for(dataset, parser, data.get("datasets") or {}, where)
    values |= from_flags
    values |= {key: {**(values.get(key) or {}), **entries} for key, entries in parts.items()}
    tasks = [build(TaskSettings, values, f"tasks.{i}.") for i in range(count)]
    run = {o.key: values[o.key] for o in _run_options()}
    agent = _with_inner(build(config_class, values, "agent."))
    agents.get(agent_name).check_numbers(agent)  # now, so that a grid is checked before it starts
    idle = bool(getattr(agent, "base_run", ""))  # a frozen base needs no budget
    return RunConfig(
        agent_name=agent_name,
        agent=agent,
        tasks=tuple(_named(task, i, idle) for i, task in enumerate(tasks)),
        **run,
    )


def _without_datasets(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "datasets"}


def _values_for(dataset: str, parser: Parser, entries: Any, where: str) -> dict[str, Any]:
    """Values of a layer's `datasets` for this one; the keys of all entries are checked."""
    if not isinstance(entries, Mapping):
        raise UserError(f"datasets in {where} must hold a pattern and values, not {entries!r}")
    values: dict[str, Any] = {}
    for patterns, entry in entries.items():
        place = f"{where}, datasets {patterns!r}"
        if not isinstance(entry, Mapping):
            raise UserError(f"{place} must hold keys and values, not {entry!r}")
        entry = _with_indexed_tasks(entry, place)
        parser.check(entry, place)
        if any(fnmatchcase(dataset, pattern) for pattern in str(patterns).split()):
            values |= parser.layer(entry, place)
    return values


def _with_inner(agent: Any) -> Any:
    """Settings of an agent around another one, the inner one's checked.

    A wrapper's base is spelt out, so that it needs no other run's folder: `base` may be an agent's
    name, or `RUN_DIR[#k]`: then `base` and `base_config` become what that
    run's configuration says, and `base_run` remembers where the weights come from.
    """
    fields = {f.name for f in dataclasses.fields(agent)}
    if {"learner", "learner_config"} <= fields:
        parser = Parser(options_of(config_class_of(agent.learner)))
        return dataclasses.replace(
            agent, learner_config=parser.layer(agent.learner_config, "agent.learner_config")
        )
    if not {"base", "base_config"} <= fields:
        return agent
    base = str(agent.base)
    if ":" in base or base in agents.names():
        config_class = config_class_of(base)
        parser = Parser(options_of(config_class))
        values = parser.defaults() | parser.layer(agent.base_config, "agent.base_config")
        inner = _with_inner(build(config_class, values))
        return dataclasses.replace(agent, base_config=dataclasses.asdict(inner))
    folder = Path(base.partition("#")[0])
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"agent.base {base!r} is neither an agent{nearest(base, agents.names())} "
            f"({', '.join(agents.names())}) nor a run folder: {folder} has no config.yaml"
        )
    if "base_run" not in fields:
        raise UserError(f"this agent cannot take a finished run as its base: name an agent, {base}")
    if agent.base_config:
        raise UserError(f"agent.base_config comes from the run {folder}: leave it out")
    run = load(folder / "config.yaml")
    if run.seeds > 1 and "#" not in base:
        raise UserError(
            f"agent.base {base} holds {run.seeds} seeds: name one, {folder}#0 to "
            f"{folder}#{run.seeds - 1}"
        )
    return dataclasses.replace(
        agent, base=run.agent_name, base_config=dataclasses.asdict(run.agent), base_run=base
    )


def config_class_of(agent_name: str) -> type:
    """The dataclass of the agent's hyper-parameters."""
    config_class = getattr(agents.get(agent_name), "Config", None)
    if not (isinstance(config_class, type) and dataclasses.is_dataclass(config_class)):
        raise UserError(f"agent {agent_name} needs a nested frozen dataclass called Config")
    return config_class


def run_parser(config_class: type | None, tasks: int = 1, **kwargs: Any) -> Parser:
    """The parser of `train`; the agent's fields are known once its class is."""
    options = [*_task_options(0), *_run_options()]
    for i in range(1, tasks):
        options += _task_options(i)
    if config_class is not None:
        options += options_of(config_class, "agent.")
    return Parser(options, **kwargs)


SHORT_FLAGS = ("dataset", "env", "updates", "env_steps", "shift")  # of task 0


def _task_options(index: int) -> list[Option]:
    options = options_of(TaskSettings, f"tasks.{index}.")
    if index > 0:
        return options
    return [
        dataclasses.replace(o, alias="--" + name.replace("_", "-")) if name in SHORT_FLAGS else o
        for o in options
        for name in [o.key.rpartition(".")[2]]
    ]


def _run_options() -> list[Option]:
    return [o for o in options_of(RunConfig) if o.key not in ("agent_name", "agent", "tasks")]


def _with_indexed_tasks(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`tasks: [a, b]` as `tasks: {"0": a, "1": b}`, without agent_name."""
    result = {key: value for key, value in data.items() if key != "agent_name"}
    tasks = result.get("tasks")
    if isinstance(tasks, list):
        tasks = dict(enumerate(tasks))
    if tasks is not None:
        if not isinstance(tasks, dict) or not all(str(index).isdecimal() for index in tasks):
            raise UserError(f"tasks in {where} must be a list of tasks, not {tasks!r}")
        result["tasks"] = {str(index): task for index, task in tasks.items()}
    return result


def _task_indices(flags: Sequence[str]) -> list[int]:
    found = (re.match(r"--tasks\.(\d{1,3})\.", flag) for flag in flags)
    return [int(match[1]) for match in found if match]


def _named(task: TaskSettings, index: int, idle: bool) -> Task:
    where = "" if index == 0 else f"tasks.{index}: "
    if task.dataset is None and task.env is None:
        raise UserError(f"{where}nothing to learn from: give --dataset ID|PATH or --env ID")
    if task.updates == 0 and task.env_steps == 0 and not idle:
        budget = "--env-steps N" if task.dataset is None else "--updates N"
        raise UserError(f"{where}say how long to train: give {budget}")
    if task.updates and task.dataset is None:
        raise UserError(f"{where}--updates counts updates on a dataset: give --dataset ID|PATH")
    name = task.name or (Path(task.dataset).stem if task.dataset else str(task.env))
    return Task(**{**vars(task), "name": name})


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"tasks.0.updates": 5}` as `{"tasks": {"0": {"updates": 5}}}`."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        inner = result
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return result


class _UniqueKeys(yaml.SafeLoader):
    """A key that is given twice would lose its first value without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise UserError(f"{where}{line} is not valid YAML: {problem}") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{where} must hold keys and values, such as `seed: 1`")
    return data


def _plain(value: Any) -> Any:
    """Tuples as lists, at any depth: YAML knows no tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value


def _space_to_plain(space: Space[Any] | None) -> dict[str, Any] | None:
    """A Box or Discrete space as plain data; bounds that are all equal become one number."""
    import numpy as np
    from gymnasium.spaces import Box, Discrete

    if space is None:
        return None
    if isinstance(space, Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, Box):
        bounds = {
            name: float(bound.flat[0]) if np.all(bound == bound.flat[0]) else bound.tolist()
            for name, bound in (("low", space.low), ("high", space.high))
        }
        return {"kind": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    raise UserError(f"tasks have Box or Discrete spaces, not {space}")


def _space_from_plain(plain: Mapping[str, Any] | None) -> Space[Any] | None:
    import numpy as np
    from gymnasium.spaces import Box, Discrete

    if plain is None:
        return None
    if plain["kind"] == "Discrete":
        return Discrete(plain["n"], start=plain["start"])
    dtype: Any = np.dtype(plain["dtype"])
    low, high = (
        np.broadcast_to(np.asarray(plain[name], dtype=dtype), plain["shape"])
        for name in ("low", "high")
    )
    return Box(low, high, tuple(plain["shape"]), dtype)
