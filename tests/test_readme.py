"""The README's own code runs as it stands, and its commands are ones that exist."""

import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import pytest

from rl_shift import cli, commands

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
# the sections that are executed
RUN = ("Change the world", "Plug in your own environment", "Add an agent")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """The text below a heading."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def command_lines(text: str) -> Iterator[list[str]]:
    """The arguments of every `rl-shift` in the shell blocks."""
    for language, body in FENCE.findall(text):
        for line in body.splitlines() if language == "sh" else []:
            words = shlex.split(re.sub(r"\s#.*", "", line))
            if words[:1] == ["rl-shift"]:
                yield words[1:]


def files(text: str) -> dict[str, str]:
    """Python blocks by the name of the file that is given right before them."""
    found = {}
    for match in FENCE.finditer(text):
        if match[1] == "python":
            name = re.findall(r"`(\w+\.py)`:\s*$", text[: match.start()])
            assert len(name) == 1, f"say what this file is called: {match[2][:60]}"
            found[name[0]] = match[2]
    return found


def test_the_examples_run_exactly_as_they_stand(
    in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(in_empty_folder))
    written: dict[str, str] = {}
    lines: list[list[str]] = []
    try:
        for title in RUN:
            written |= files(section(title))
            for name, code in written.items():
                Path(name).write_text(code, encoding="utf-8")
            lines = list(command_lines(section(title)))
            assert lines
            for argv in lines:
                assert cli.main(argv) == 0, (argv, capsys.readouterr().err)
    finally:
        for name in written:
            sys.modules.pop(name.removesuffix(".py"), None)
        gymnasium.registry.pop("Corridor-v0", None)
    assert sorted(written) == ["corridor.py", "weighted.py", "world.py"]
    results = json.loads(Path("runs/weighted/results.json").read_text())
    assert results["seeds"] == [0, 1]
    assert results["last"]["updates"] == 300
    assert "weighted#1" in str(lines[-1])
    assert "return " in capsys.readouterr().out
    runpy.run_path("world.py")
    first, second = capsys.readouterr().out.splitlines()
    assert "'params': {'length': 0.5}" in first and "'params': {'gear': 1.0}" in second
    monkeypatch.undo()


@pytest.mark.parametrize("title", RUN)
def test_the_examples_are_short(title: str) -> None:
    for name, code in files(section(title)).items():
        assert len(code.splitlines()) <= 45, name


def test_every_command_line_is_understood() -> None:
    text = README
    for title in RUN:
        text = text.replace(section(title), "")
    lines = list(command_lines(text))
    assert len(lines) > 10
    for argv in lines:
        assert argv[0] in cli.COMMANDS, argv
        if "--agent.base" in argv:  # a run that is not there: any agent stands for it
            argv[argv.index("--agent.base") + 1] = "td3_bc"
        if argv[0] == "train" and "--resume" not in argv:
            assert commands.configured(argv[1:]).agent_name, argv
