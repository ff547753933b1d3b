"""The Python interface: the page that describes it, callbacks, the trainer as an iterator."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import rl_shift
from rl_shift import checkpoint, config, runs
from rl_shift.errors import UserError
from rl_shift.trainer import Trainer

ROOT = Path(__file__).parents[1]
DATA = "rl_shift/hopper-replay-v0"
SMALL = {"agent_config": {"hidden": [8], "batch_size": 8}}
SHORT: dict[str, Any] = {"dataset": DATA, "eval_every": 0, "eval_episodes": 1, "log_every": 10}


def blocks(text: str) -> str:
    """The Python blocks of a page, one after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def section(title: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("page", ["docs/python.md", "README.md"])
def test_the_page_runs_as_it_stands(
    page: str, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8") if page.startswith("docs") else ""
    code = blocks(text or section("From Python"))
    if not code:
        pytest.skip("README has no section From Python")
    module = ModuleType("page_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, page, "exec"), module.__dict__)
    assert json.loads(Path("runs/python/results.json").read_text())["status"] == "finished"
    told = capsys.readouterr().out
    if page.startswith("docs"):
        assert json.loads(Path("runs/own/results.json").read_text())["updates"] == 100
        assert "150 " in told and "200 0." not in told


def test_a_callback_stops_and_saves(in_empty_folder: Path) -> None:
    seen: list[tuple[int, bool]] = []

    def stop(moment: runs.Moment) -> bool:
        seen.append((moment.updates, "train/actor/loss" in moment.values))
        return moment.updates < 30

    folder = rl_shift.train(
        "bc", **SMALL, **SHORT, updates=1000, run_dir="run", callbacks=[stop], progress=False
    )
    assert seen == [(10, True), (20, True), (30, True)]
    results = json.loads((folder / "results.json").read_text())
    assert (results["status"], results["updates"]) == ("stopped", 30)
    runs.resume(folder, progress=False)
    assert json.loads((folder / "results.json").read_text())["updates"] == 1000


def test_every_callback_is_asked(in_empty_folder: Path) -> None:
    asked = []
    callbacks = [lambda moment: False, lambda moment: asked.append(moment.updates)]
    rl_shift.train("bc", **SMALL, **SHORT, updates=50, run_dir="run", callbacks=callbacks)
    assert asked == [10]


def test_a_loop_that_is_left_continues_bitwise(in_empty_folder: Path) -> None:
    whole = rl_shift.train("td3_bc", **SMALL, **SHORT, updates=40, run_dir="whole", progress=False)
    for moment in rl_shift.iterate("td3_bc", **SMALL, **SHORT, updates=40, run_dir="left"):
        if moment.updates == 20:
            break
    runs.resume("left", progress=False)
    one, other = (
        checkpoint.load(checkpoint.latest(Path(f)))[0]["agent"] for f in (whole, Path("left"))
    )
    for name, tensor in one["module"].items():
        assert torch.equal(tensor, other["module"][name]), name


def test_the_iterator_gives_the_last_evaluation(in_empty_folder: Path) -> None:
    moments = list(rl_shift.iterate("bc", **SMALL, **SHORT, updates=20, run_dir="run"))
    assert [m.updates for m in moments] == [10, 20, 20]
    assert "eval/mean_reward" in moments[-1].values
    assert len(moments[-1].trainer.evaluations) == 1


def test_the_trainer_steps_once_per_update(in_empty_folder: Path) -> None:
    run = rl_shift.configure("bc", **SMALL, **SHORT, updates=7)
    tasks = runs.resolve(run)
    saved = []
    trainer = Trainer(
        runs.make_agent(run, tasks), tasks, run, save=lambda clock, _: saved.append(clock.updates)
    )
    steps = trainer.steps()
    counts = [next(steps).updates for _ in range(3)]
    assert counts == [1, 2, 3]
    assert float(trainer.metrics["actor/loss"]) > 0
    steps.close()
    assert saved == [3]


def test_seeds_in_processes_of_their_own_cannot_be_watched(in_empty_folder: Path) -> None:
    settings: dict[str, Any] = {"env": "Pendulum-v1", "env_steps": 10, "seeds": 2}
    with pytest.raises(UserError, match="cannot be watched"):
        next(rl_shift.iterate("sac", **settings))
    assert not Path("runs").exists()


def test_settings_are_those_of_the_command_line() -> None:
    run = rl_shift.configure(
        "iql", dataset=Path("a.hdf5"), updates=5, seed=3, agent_config={"beta": 1.0}
    )
    same = config.make(
        "iql",
        overrides={
            "tasks.0.dataset": "a.hdf5",
            "tasks.0.updates": 5,
            "seed": 3,
            "agent.beta": 1.0,
        },
    )
    assert run == same
    two = rl_shift.configure(
        "bc", tasks=[{"dataset": "a", "updates": 1}, {"env": "b", "env_steps": 2}]
    )
    assert [task.name for task in two.tasks] == ["a", "b"]
    with pytest.raises(UserError, match="updatez"):
        rl_shift.configure("bc", dataset="a", updatez=5)
