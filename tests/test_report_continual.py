"""The chapter about sequences of tasks, made from results.json files."""

import json
from pathlib import Path

import pytest

from rl_shift import report, report_continual
from rl_shift.report_document import Picture, Table
from rl_shift.report_runs import gather
from rl_shift.report_sections import chains

MATRIX = [[50.0], [40.0, 60.0], [20.0, 55.0, 70.0]]


def write_run(folder: Path, drop: float = 0.0, seed: int = 0) -> Path:
    """A finished run on three tasks whose references make returns scores."""
    folder.mkdir(parents=True)
    evaluations = [
        {
            "task": j, "during": i, "updates": 100 * (i + 1), "env_steps": 0,
            "returns": [[score - drop * (j < i) + seed] * 2], "lengths": [[1, 1]],
            "score": [score - drop * (j < i) + seed],
        }
        for i, row in enumerate(MATRIX)
        for j, score in enumerate(row)
    ]  # fmt: skip
    task = {"env": "E-v0", "updates": 100, "env_steps": 0, "reward": "raw", "shift": None}
    task |= {"dataset": None, "reference_scores": [0.0, 100.0]}
    results = {
        "format": 1, "status": "finished", "agent": "keeper", "agent_config": {"drop": drop},
        "tasks": [{**task, "name": name} for name in ("a-medium", "b-medium", "c-medium")],
        "seeds": [seed], "evaluations": evaluations, "last": None, "best": None, "updates": 300,
        "env_steps": 0, "wall_time_s": 60.0, "updates_per_s": 5.0, "precision": "highest",
        "compile": "off", "threads": 1, "device": "cpu", "data_mode": "native", "versions": {},
        "resources": {
            "parameters": 1000.0, "memory_rows": 30.0, "memory_bytes": 600.0,
            "policy_shift_0": 0.0, "policy_shift_1": 0.1, "policy_shift_2": 0.1 * drop,
        },
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_the_chapter_holds_metrics_and_pictures(in_empty_folder: Path) -> None:
    pytest.importorskip("matplotlib")
    for drop in (0.0, 5.0):
        for seed in (0, 1):
            write_run(Path(f"runs/{drop}.{seed}"), drop, seed)
    found = gather(["runs"])
    blocks = report_continual.chapter(found, Path())
    (table,) = [block for block in blocks if isinstance(block, Table)]
    rows = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}
    plain, worse = rows["keeper drop=0.0"], rows["keeper drop=5.0"]
    assert plain["seeds"] == "2"
    assert plain["PER"].startswith("48.8 ±")  # (20 + 55 + 70) / 3, and half a point of seeds
    assert plain["BWT"] == "-17.5 ± 0.0"
    assert plain["forgetting (Continual World)"] == "11.7 ± 0.0"
    assert worse["BWT"] == "-22.5 ± 0.0"
    assert plain["memory bytes"] == "600" and plain["parameters"] == "1,000"
    assert plain["wall time"] == "02:00"
    pictures = [block.path for block in blocks if isinstance(block, Picture)]
    names = ["task-matrix.png", "task-curves.png", "razor.png"]
    assert [path.name for path in pictures] == names
    (chain,) = (one for one in chains(found) if "5.0" in one.label)
    assert report_continual.razor_points(chain) == [pytest.approx((0.3, 22.5))] * 2
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_the_command_writes_the_chapter(
    in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(Path("runs/one"))
    assert report.report(["runs", "--out", "out"]) == 0
    assert "Continual learning: a-medium, b-medium, c-medium" in Path("out/report.md").read_text()
    assert "Continual metrics" in capsys.readouterr().out


def test_no_sequence_no_chapter(in_empty_folder: Path) -> None:
    folder = write_run(Path("runs/one"))
    results = json.loads((folder / "results.json").read_text())
    results["tasks"], results["evaluations"] = results["tasks"][:1], results["evaluations"][:1]
    (folder / "results.json").write_text(json.dumps(results))
    assert report_continual.chapter(gather(["runs"]), None) == []


def test_short_names() -> None:
    names = ["ope-hopper-medium", "ope-walker-medium"]
    assert report_continual._short(names) == ["hopper", "walker"]
    assert report_continual._short(["a", "b-c"]) == ["a", "b-c"]
