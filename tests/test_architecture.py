"""What must stay true of the whole: names, import direction, generators; sizes are reported."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rl_shift import agents
from rl_shift.agent import Agent

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "rl_shift").glob("*.py"))  # not recursive: the rest are links
AGENTS = sorted((ROOT / "agents").glob("*.py"))
ENVS = sorted((ROOT / "envs").glob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))

# Agent names that are ordinary words of the core's vocabulary, each with its reason.
EXEMPT: dict[str, str] = {
    "dt": "the time step of a simulator",
    "spl": "the weight of a reward, in success weighted by path length",
    "reactive": "an adjective",
}

# What a module of the core may import of ours; modules that are not named are free.
CORE_MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "seeding": {"errors"},
    "networks": {"errors"},
    "metrics": {"errors"},
    "buffer": {"errors", "seeding"},
    "running": set(),
    "online_networks": {"networks"},
    "priorities": set(),
    "rollouts": set(),
    "curiosity": {"networks", "online_networks", "running"},
    "diffusion": {"errors", "networks"},
    "dynamics": {"errors", "networks", "seeding"},
    "score": set(),
    "held_out": {"errors", "buffer"},
    "improvement": {"networks"},
    "quantiles": {"networks"},
    "inverse_dynamics": {"networks", "buffer"},
    # config: begun tasks of a checkpoint become Task again; agents: a wrapper names its base
    "learner": set(),
    "agent": {"errors", "seeding", "networks", "buffer", "learner", "config", "agents"},
    "options": {"errors"},
    "cli": {"errors"},
}
AGENTS_MAY_IMPORT = {
    "agent", "agents", "buffer", "continual", "curiosity", "denoisers", "diffusion", "dynamics",
    "errors", "guidance", "held_out", "improvement", "inverse_dynamics", "networks",
    "online_networks", "priorities", "quantiles", "retention", "rollouts", "running",
    "score", "seeding", "selectors", "synthetic", "trajectories",
}  # fmt: skip
ENVS_MAY_IMPORT = {"envs", "errors", "seeding"}
COMMANDS = {"cli", "commands", "data_commands", "demo", "evaluate_command", "ope_command", "worker"}

LINES = {"agents": 250, "envs": 220, "rl_shift": 300, "scripts": 120}  # aims, not limits
DEPTH = 2  # classes between an agent and Agent, itself included


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """First name below `rl_shift` of every import that runs, with its line number."""

    def visit(node: ast.AST) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                yield from visit(child)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "rl_shift" and len(parts) > 1:
                    yield parts[1], node.lineno
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            if parts[0] == "rl_shift":
                names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
                yield from ((name, node.lineno) for name in names if name != "__version__")
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_names_no_agent(path: Path) -> None:
    names = [name for name in agents.names() if name not in EXEMPT]
    # As registered, in lower case: "SAC" in a citation or in a file's metadata is no dependency.
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", [*CORE, *AGENTS, *ENVS], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_import_direction(path: Path) -> None:
    if path.parent.name == "agents":
        allowed: set[str] | None = AGENTS_MAY_IMPORT
    elif path.parent.name == "envs":
        allowed = ENVS_MAY_IMPORT
    else:
        allowed = CORE_MAY_IMPORT.get(path.stem)
    for name, line in imported(path):
        assert allowed is None or name in allowed, f"{path}:{line} imports rl_shift.{name}"
        if path.stem not in COMMANDS | {"__main__", "worker"}:
            assert name not in COMMANDS, f"{path}:{line} imports the command line"


GLOBAL_GENERATORS = (
    r"^\s*(import|from) random\b",
    r"\b(np|numpy)\.random\.(?!default_rng\b|Generator\b|SeedSequence\b|PCG64\b|BitGenerator\b)",
    r"\bnumpy\.random import (?!default_rng|Generator|SeedSequence)",
)


@pytest.mark.parametrize(
    "path", [*CORE, *AGENTS, *ENVS, *SCRIPTS], ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_no_global_generator(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for pattern in GLOBAL_GENERATORS:
        found = re.search(pattern, text, re.MULTILINE)
        assert found is None, f"{path} draws from a global generator: {found}"


def test_only_seeding_seeds_torch() -> None:
    pattern = re.compile(r"\btorch\.(cuda\.)?(manual_seed|seed)\w*\(")
    for path in [*CORE, *AGENTS, *ENVS]:
        if path.stem != "seeding":
            assert not pattern.search(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("path", [*CORE, *AGENTS, *ENVS, *SCRIPTS], ids=lambda p: p.stem)
def test_file_names_say_what_is_inside(path: Path) -> None:
    assert not {"utils", "util", "common", "helpers", "misc"} & set(path.stem.split("_"))


@pytest.mark.parametrize("name", agents.names())
def test_inheritance_is_shallow(name: str) -> None:
    between = [c for c in agents.get(name).__mro__ if issubclass(c, Agent) and c is not Agent]
    assert len(between) <= DEPTH, f"{name}: {' -> '.join(c.__name__ for c in between)} -> Agent"


def test_sizes_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """Aims that guard against sprawl: a reasoned excess is fine."""
    long = []
    for path in [*CORE, *AGENTS, *ENVS, *SCRIPTS]:
        lines, aim = len(path.read_text(encoding="utf-8").splitlines()), LINES[path.parent.name]
        if lines > aim:
            long.append(f"{path.parent.name}/{path.name}: {lines} lines (aim {aim})")
    with capsys.disabled():
        for line in long:
            print(f"\nwarning: {line}", end="")
        print()
