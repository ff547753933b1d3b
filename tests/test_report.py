"""Reports: what is averaged, what is refused and named, and what is written."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rl_shift import cli, config, datasets, evaluate_command, metrics, plotting, report, runs
from rl_shift.recording import record
from rl_shift.report_cells import Cell
from rl_shift.report_document import Block, Heading, Paragraph
from rl_shift.report_runs import Gathered, gather
from rl_shift.report_sections import chains, sections
from rl_shift.report_statistics import aggregate, bootstrapped, improvement, profile

ORIGIN = "D4RL-layout data regenerated from somewhere"
SCORES = (-20.0, 180.0)  # a return of 80 scores 50


def results(
    agent: str = "a",
    data: str = "one",
    score: float = 50.0,
    seeds: tuple[int, ...] = (0, 1, 2),
    **changes: Any,
) -> dict[str, Any]:
    """A results.json; the seeds' last scores are `score`, `score` + 1, ..., the best is 10 more."""
    task = {
        "name": data,
        "env": "Hopper-v4",
        "updates": 200,
        "env_steps": 0,
        "reward": "raw",
        "shift": None,
        "dataset": {"id": data, "origin": ORIGIN, "sha256": f"{data}-sha"},
        "reference_scores": list(SCORES),
    }
    for key in set(task) & set(changes):
        task[key] = changes.pop(key)
    evaluations = []
    for updates, gain in ((100, 10.0), (200, 0.0)):
        means = [score + gain + k for k in range(len(seeds))]
        returns = [[2 * (m + offset) - 20 for offset in (-5.0, 0.0, 5.0)] for m in means]
        evaluations.append(
            {
                "task": 0,
                "during": 0,
                "updates": updates,
                "env_steps": 0,
                "returns": returns,
                "lengths": [[9, 9, 9]] * len(seeds),
                "score": means,
            }
        )
    return {
        "format": 1,
        "status": "finished",
        "agent": agent,
        "agent_config": {"hidden": [8], "rate": 0.1},
        "tasks": [task],
        "seeds": list(seeds),
        "evaluations": evaluations,
        "last": evaluations[-1],
        "best": evaluations[0],
        "updates": 200,
        "env_steps": 0,
        "wall_time_s": 90.0,
        "updates_per_s": 12.5,
        "precision": "highest",
        "compile": "off",
        "threads": 1,
        "device": "cpu",
        "data_mode": "native",
        "versions": {"torch": "2.13.0", "git": "0123456789abcdef"},
        **changes,
    }


def write(folder: str, content: dict[str, Any] | str) -> Path:
    path = Path(folder, "results.json")
    path.parent.mkdir(parents=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path.parent


def write_grid() -> None:
    """Two agents on two datasets."""
    for agent, gain in (("a", 0.0), ("b", 0.5)):
        for data, score in (("one", 50.0), ("two", 20.0)):
            write(f"runs/{agent}.{data}", results(agent, data, score + gain))


def cell(*paths: str) -> Cell:
    (section,) = sections(gather(paths))
    ((_, only),) = section.cells.items()
    return only


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib is not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


pytestmark = pytest.mark.usefixtures("in_empty_folder")
Told = pytest.CaptureFixture[str]


# ---- one cell ----------------------------------------------------------------------------------


def test_a_cell_is_the_mean_over_seeds_with_its_interval() -> None:
    write("run", results())
    found = cell("run")
    assert found.interval() == pytest.approx(metrics.mean_interval([50, 51, 52]))
    assert found.risk() == pytest.approx([45, 46, 47])  # the worst of three episodes
    assert found.best() == pytest.approx(61)
    points, scores = found.curve()
    assert points == [100, 200]
    assert scores[1] == pytest.approx([50, 51, 52])


def test_seeds_may_come_from_several_runs() -> None:
    write("runs/x", results(seeds=(0, 1)))
    write("runs/y", results(seeds=(7,), score=80.0))
    found = cell("runs/x", "runs/y", "runs/x/results.json")  # the same run twice counts once
    assert found.seeds == [0, 1, 7]
    assert found.per_seed() == pytest.approx([50, 51, 80])
    assert found.counts


def test_a_task_without_reference_scores_shows_returns() -> None:
    write("run", results(reference_scores=None))
    (section,) = sections(gather(["run"]))
    assert section.unit == "return"
    assert cell("run").per_seed() == pytest.approx([80, 82, 84])
    assert aggregate(section) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"env": "Hopper-v5"}, "environment Hopper-v4 in x, but Hopper-v5 in y"),
        ({"reference_scores": [0, 1]}, "reference scores"),
        ({"dataset": {"id": "one", "origin": ORIGIN, "sha256": "other"}}, "sha256 of the data"),
        ({"updates": 300}, "budget of updates 200 in x, but 300 in y"),
        ({"data_mode": "legacy_qlearning"}, "data mode native in x"),
        ({"reward": "normalize"}, "reward raw in x"),
        ({"seeds": (2, 3)}, "seed 2 occurs more than once, in x, y"),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_what_is_not_comparable_is_not_averaged(
    changes: dict[str, Any], words: str, capsys: Told
) -> None:
    write("runs/x", results())
    write("runs/y", results(**{"seeds": (3, 4), **changes}))
    assert cli.main(["report", "runs"]) == 1
    out = capsys.readouterr().out
    assert "left out: a on one is not averaged: " in out
    assert words in out
    text = Path("report/report.md").read_text(encoding="utf-8")
    assert "| one | not averaged |" in text
    assert "**Left out**" in text


def test_shifts_are_tasks_of_their_own() -> None:
    write("runs/x", results())
    write("runs/y", results(shift={"gravity": 2}))
    (section,) = sections(gather(["runs"]))
    assert len(section.cells) == 2
    assert sum("gravity" in row for row, _ in section.cells) == 1


def test_seeds_around_seeds_of_another_run_are_averaged() -> None:
    for seed in (0, 1):
        base = {"learners": [f"runs/a#{seed}", f"runs/b#{seed}"], "score": f"c#{seed}"}
        write(f"runs/{seed}", results(seeds=(seed,), agent_config=base))
    (section,) = sections(gather(["runs"]))
    (found,) = section.cells.values()
    assert found.seeds == [0, 1] and found.counts


def test_agents_on_different_data_have_rows_of_their_own() -> None:
    write("runs/x", results("a"))
    other = {"id": "one", "origin": ORIGIN, "sha256": "another-file"}
    write("runs/y", results("b", dataset=other))
    found = gather(["runs"])
    (section,) = sections(found)
    assert section.rows == ["one (sha256 another-file)", "one (sha256 one-sha)"]
    assert "one is not the same for all agents (sha256)" in found.notes[0]


def test_data_of_different_origin_are_apart() -> None:
    write("runs/x", results("a"))
    write(
        "runs/y", results("a", "two", dataset={"id": "two", "origin": "D4RL (two)", "sha256": ""})
    )
    write("runs/z", results("c", "Hopper-v5", dataset=None))
    made = sections(gather(["runs"]))
    assert [section.regenerated for section in made] == [False, True, False]
    assert "Trained in the environment" in made[-1].origin


def test_variants_of_an_agent_are_told_apart() -> None:
    write("runs/x", results("mine:Agent"))
    write("runs/y", results("mine:Agent", agent_config={"hidden": [8], "rate": 0.2}))
    write("runs/z", results("mine:Agent", "two", agent_config={"hidden": [9], "rate": 0.1}))
    (section,) = sections(gather(["runs"]))
    assert section.labels == ["Agent rate=0.1", "Agent rate=0.2"]


# ---- over datasets -----------------------------------------------------------------------------


def test_aggregates_are_those_of_metrics() -> None:
    write_grid()
    write("runs/c.one", results("c", "one", 10.0, seeds=(0,)))
    write("runs/c.two", results("c", "two", 10.0, status="running"))
    write("runs/d", results("d", "three"))
    (section,) = sections(gather(["runs"]))
    found = aggregate(section)
    assert found is not None
    assert found.rows == ["one", "two"]
    assert list(found.scores) == ["a", "b"]
    assert found.notes == [
        f"{label} is left out of the aggregates: it shares {count} of the 2 datasets that the rest "
        "has in common"
        for label, count in (("d", 0), ("c", 1))
    ]
    table = np.array([[50, 20], [51, 21], [52, 22.0]])
    assert found.scores["a"] == pytest.approx(table)
    assert found.risks["b"] == pytest.approx(table - 4.5)
    expected = metrics.stratified_bootstrap_interval(table, metrics.iqm)
    assert bootstrapped(found.scores["a"], metrics.iqm) == pytest.approx(expected)


def test_two_agents_are_compared_where_they_meet() -> None:
    write("runs/x", results("a", "one"))
    for name in ("two", "three"):
        write(f"runs/{name}", results("a", name))
    write("runs/y", results("b", "one"))
    (section,) = sections(gather(["runs"]))
    found = aggregate(section)
    assert found is not None and not found.notes
    assert (found.rows, list(found.scores)) == (["one"], ["a", "b"])
    del section.cells["one", "a"]  # now they meet nowhere
    found = aggregate(section)
    assert found is not None and list(found.scores) == ["a"]


def test_unequal_numbers_of_seeds_are_cut_and_named() -> None:
    write("runs/x", results("a", "one"))
    write("runs/y", results("a", "two", seeds=(0, 1)))
    (section,) = sections(gather(["runs"]))
    found = aggregate(section)
    assert found is not None and found.scores["a"].shape == (2, 2)
    assert "the first 2 seeds" in found.notes[0]


def test_improvement_redraws_both_agents() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(1, 1, (8, 5)), generator.normal(0, 1, (6, 5))
    value, low, high = improvement(first, second)
    assert value == metrics.probability_of_improvement(first, second)
    assert low < value < high
    draws = [
        metrics.probability_of_improvement(
            *(np.stack([generator.choice(t[:, k], len(t)) for k in range(5)], 1) for t in pair)
        )
        for pair in [(first, second)] * 400
    ]
    assert (low, high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.04)
    assert np.isnan(improvement(first[:1], second).low)
    assert np.isnan(bootstrapped(first[:1], metrics.mean).low)


def test_the_profile_and_its_band() -> None:
    table = np.array([[50, 20], [51, 21], [52, 22.0]])
    share, low, high = profile(table, np.array([0.0, 20.5, 100.0]))
    assert share == pytest.approx([1, 5 / 6, 0])
    assert (low <= share).all() and (share <= high).all()
    assert low[1] < high[1]
    assert low[0] == high[0] == 1


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: "{",
        lambda r: "[]",
        lambda r: json.dumps({**r, "format": 2}),
        lambda r: json.dumps({k: v for k, v in r.items() if k != "agent_config"}),
        lambda r: json.dumps({**r, "seeds": [0, 1]}),
        lambda r: json.dumps({**r, "tasks": []}),
        lambda r: json.dumps(r).replace("80.0", "NaN"),
        lambda r: json.dumps(r).replace("80.0", '"many"'),
    ],
)
def test_a_corrupt_file_is_named_and_skipped(
    damage: Callable[[dict[str, Any]], str], no_pictures: None, capsys: Told
) -> None:
    write("runs/good", results("b"))
    write("runs/bad", damage(results("a")))
    Path("runs/new").mkdir()
    Path("runs/new/config.yaml").touch()
    assert cli.main(["report", "runs"]) == 1
    out = capsys.readouterr().out
    assert f"left out: {Path('runs/bad/results.json')} is corrupt and was skipped" in out
    assert "new has no results.json yet" in out
    assert "| one | 51.0 ± 2.5 |" in Path("report/report.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_pictures")
def test_unfinished_runs_are_marked(capsys: Told) -> None:
    write("runs/x", results("a", status="running", updates=100))
    write("runs/y", results("b", status="failed", errors={"seed3": "no such luck"}))
    write("runs/z", results("c", evaluations=[], status="stopped"))
    path = Path("runs/x/results.json")  # `updates` above is the budget
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"updates": 50}), "utf-8")
    assert cli.main(["report", "runs"]) == 0
    out = capsys.readouterr().out
    assert "a on one is unfinished: running at 50 of 100 updates" in out
    assert "y/seed3 failed: no such luck" in out
    assert "z has no evaluation (stopped at 200 of 200 updates)" in out
    text = Path("report/report.md").read_text(encoding="utf-8")
    assert "51.0 ± 2.5 †" in text
    assert "Over the common datasets" not in text


def test_mistakes_of_the_command_line(capsys: Told) -> None:
    write("runs/x", results())
    Path("empty").mkdir()
    for argv, words in (
        ([], "give at least one RUN_DIR"),
        (["missing"], "is no folder"),
        (["empty"], "is no run folder and holds none"),
        (["runs", "--baseline", "b"], "--baseline 'b' is none of the agents"),
        (["runs", "--outt", "b"], "did you mean"),
        (["runs", "--evaluations"], "needs a value"),
    ):
        assert cli.main(["report", *argv]) == 2
        assert words in capsys.readouterr().err
    write("bad", "{")
    assert cli.main(["report", "bad"]) == 2
    assert "nothing to report" in capsys.readouterr().err
    assert cli.main(["report", "--help"]) == 0
    assert "--evaluations" in capsys.readouterr().out


# ---- final evaluations -------------------------------------------------------------------------


def evaluation(run: str, score: float, seeds: int = 3, **changes: Any) -> dict[str, Any]:
    """A file of `rl-shift evaluate --json`."""
    made = {
        "task": "one",
        "env": "Hopper-v4",
        "agent": {},
        "returns": [[2 * score - 20] * 4] * seeds,
        "lengths": [[9] * 4] * seeds,
        "score": [score] * seeds,
        "reference_scores": list(SCORES),
    }
    made |= {key: changes.pop(key) for key in set(made) & set(changes)}
    return {"format": 1, "run": run, "episodes": 4, "seed": 1000, "evaluations": [made], **changes}


@pytest.mark.usefixtures("no_pictures")
def test_a_final_evaluation_takes_the_place_of_the_last_one(capsys: Told) -> None:
    write("runs/x", results())
    write("runs/y", results("b"))
    files = {
        "x.json": evaluation("elsewhere/runs/x", 70.0),  # moved: found by its name
        "y0.json": evaluation("runs/y#0", 30.0, 1),
        "y1.json": evaluation("runs/y#1", 31.0, 1),
        "y2.json": evaluation("runs/y#2", 32.0, 1),
        "other.json": evaluation("runs/z", 1.0),
        "shape.json": evaluation("runs/y", 1.0, 2),
        "twice.json": evaluation("runs/x", 1.0),
        "changed.json": evaluation("runs/y", 1.0, agent={"rate": 2}),
        "env.json": evaluation("runs/y", 1.0, env="Hopper-v5"),
    }
    for name, content in files.items():
        Path(name).write_text(json.dumps(content), encoding="utf-8")
    assert cli.main(["report", "runs", "--evaluations", *files, "missing.json"]) == 1
    out = capsys.readouterr().out
    assert "other.json was made from runs/z, which is not in this report" in out
    assert "shape.json is corrupt and was skipped: returns of shape (2, 4) for 3 seeds" in out
    assert "twice.json was skipped" in out
    assert "changed.json was skipped: it holds 0 evaluations of one with unchanged" in out
    assert "env.json was skipped: it was played in Hopper-v5" in out
    assert "missing.json cannot be read" in out
    text = Path("report/report.md").read_text(encoding="utf-8")
    assert "| one | **70.0** ± 0.0 | 31.0 ± 2.5 |" in text
    assert "after, seed 1000" in text


def test_one_seed_alone_is_not_the_whole_run() -> None:
    from rl_shift.report_runs import add_evaluations

    write("runs/x", results())
    Path("x.json").write_text(json.dumps(evaluation("runs/x#0", 1.0, 1)), encoding="utf-8")
    found = gather(["runs"])
    add_evaluations(found, ["x.json"])
    assert found.runs[0].final is None
    assert "must be of all seeds" in found.notes[0]


# ---- several tasks -----------------------------------------------------------------------------


def test_a_sequence_of_tasks_has_a_matrix(no_pictures: None) -> None:
    made = results(score=0.0)
    first, second = ({**made["tasks"][0], "name": name} for name in ("left", "right"))
    rows = [(0, 0, 50.0), (0, 1, 40.0), (1, 1, 60.0), (0, 1, 45.0)]
    template = made["evaluations"][0]
    made["tasks"] = [first, second]
    made["evaluations"] = [
        {**template, "task": t, "during": d, "returns": [[2 * (score + k) - 20] for k in range(3)]}
        for t, d, score in rows
    ]
    write("runs/x", made)
    (chain,) = chains(gather(["runs"]))
    assert chain.matrix()[:, :, 0] == pytest.approx(np.array([[50, np.nan], [45, 60]]), nan_ok=True)
    assert cli.main(["report", "runs"]) == 0
    text = Path("report/report.md").read_text(encoding="utf-8")
    assert "| right | 46.0 ± 2.5 | 61.0 ± 2.5 |" in text


# ---- the whole ---------------------------------------------------------------------------------


def test_the_report_is_complete_and_self_contained(capsys: Told) -> None:
    write_grid()
    write("runs/<i>.one", results("m:<i>", "one", 30.0))
    write("runs/<i>.two", results("m:<i>", "two", 30.0))
    assert (
        cli.main(["report", "runs", "--out", "docs/r", "--baseline", "b", "--title", "T & U"]) == 0
    )
    assert "one       30.0" not in capsys.readouterr().out
    out = Path("docs/r")
    names = sorted(path.name for path in out.iterdir())
    pictures = ["aggregates.png", "learning-curves.png", "performance-profile.png"]
    assert names == [*pictures, "report.html", "report.md"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<title>T &amp; U</title>" in page
    assert page.count(' src="data:image/png;base64,') == page.count("<img ") == 3
    assert "http" not in page
    assert "<i>" not in page
    assert "&lt;i&gt;" in page
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "<i>" not in text
    for words in (
        f"## {ORIGIN}",
        "not with published D4RL results",
        "P(better than b)",
        "With 3 seeds to redraw from, these intervals are too narrow",
        "![Learning curves: mean over the seeds",
        "| a | 2 | 6 | 12 | 03:00 | off | highest | 1 | cpu |",
        "| git | 0123456789ab |",
        "`one-sha`",
    ):
        assert words in text, words
    assert f"{ORIGIN}: D4RL-normalised score of the last policy" in text


def chapter(found: Gathered, pictures: Path | None) -> list[Block]:
    """A chapter about runs that say how tall they are."""
    tall = [run for run in found.runs if "height" in run.extra]
    told = [Paragraph(f"{run.agent} is {run.extra['height']} tall") for run in tall]
    return [Heading("Heights"), *told] if told else []


def test_chapters_say_more_about_runs_of_their_kind(
    capsys: Told, monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    monkeypatch.setitem(sys.modules, "chapters_of_a_test", SimpleNamespace(chapter=chapter))
    monkeypatch.setattr(report, "CHAPTERS", ("chapters_of_a_test:chapter",))
    write("plain", results("a"))
    assert cli.main(["report", "plain"]) == 0
    assert "Heights" not in Path("report/report.md").read_text(encoding="utf-8")
    write("tall", results("b", height=7))
    assert cli.main(["report", "plain", "tall"]) == 0
    text = Path("report/report.md").read_text(encoding="utf-8")
    assert text.count("## Heights") == 1
    assert "b is 7 tall" in text
    assert "a is" not in text


@pytest.mark.parametrize("width", [5.5, 12.6])
@pytest.mark.parametrize("letters", [4, 40, 150])
def test_a_legend_stays_inside_the_picture(width: float, letters: int) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = plotting.figure(width, 4.0)
    axes = figure.subplots()
    names = [f"{k} " + "word " * (letters // 5) for k in range(7)]
    plotting.legend(figure, {name: axes.plot([0, 1])[0] for name in names})
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert (legend._ncols > 1) == (letters == 4 or (letters == 40 and width > 6))


@pytest.mark.usefixtures("no_pictures")
def test_without_matplotlib_the_tables_are_written(capsys: Told) -> None:
    write_grid()
    assert cli.main(["report", "runs"]) == 0
    assert 'pip install "rl_shift[report]"' in capsys.readouterr().out
    assert sorted(p.name for p in Path("report").iterdir()) == ["report.html", "report.md"]
    assert "![" not in Path("report/report.md").read_text(encoding="utf-8")
    Path("file").touch()
    assert cli.main(["report", "runs", "--out", "file"]) == 2


@pytest.mark.usefixtures("no_pictures")
def test_a_real_run_beside_its_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = record(["random"], "Pendulum-v1", 400, tmp_path / "data" / "pendulum.hdf5", seed=0)
    given = {"tasks.0.dataset": str(path), "tasks.0.updates": 4, "agent.hidden": [8], "seeds": 2}
    given |= {"agent.batch_size": 8, "eval_episodes": 2, "eval_lanes": 2, "run_dir": "run"}
    runs.train(config.make("bc", overrides=given), progress=False)
    evaluate_command.evaluate(["run", "--episodes", "3", "--lanes", "3", "--json", "final.json"])
    assert cli.main(["report", "run", "--evaluations", "final.json", "--out", "blank"]) == 0
    assert "the data |" not in Path("blank/report.md").read_text("utf-8").split("Every dataset")[0]

    monkeypatch.setenv("RL_SHIFT_DATA", str(path.parent))
    assert cli.main(["report", "run", "--evaluations", "final.json", "--out", "known"]) == 0
    text = Path("known/report.md").read_text(encoding="utf-8")
    mean = datasets.statistics(datasets.load(datasets.resolve("pendulum")))["return_mean"]
    assert f"| pendulum | {mean:.1f} | " in text
    assert "| 2 | 4 | 3 | after, seed 0 | finished |" in text


# ---- scripts/reproduce.py ----------------------------------------------------------------------


@pytest.mark.usefixtures("no_pictures")
def test_reproduce_goes_on_with_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    path = Path(__file__).parents[1] / "scripts" / "reproduce.py"
    spec = importlib.util.spec_from_file_location("reproduce", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    small = {"compile": "off", "eval_every": 0, "agent.hidden": [8], "eval_episodes": 1}
    monkeypatch.setattr(script, "SETTINGS", small)
    monkeypatch.delenv("RL_SHIFT_DATA", raising=False)
    name = script.dataset("hopper-medium", 300)
    assert script.dataset("hopper-medium", 500_000) == "deep-ope-hopper-medium-500k"
    record(["random"], "Hopper-v4", 300, Path("datasets", f"{name}.hdf5"), seed=0)
    given = {"tasks.0.dataset": f"datasets/{name}.hdf5", "tasks.0.updates": 3, "seeds": 2}
    run = config.make("bc", overrides=small | given | {"run_dir": "results/bc.hopper-medium"})
    runs.train(run, progress=False)
    text = Path("results/bc.hopper-medium/config.yaml")  # as `--dataset ID` writes it
    text.write_text(text.read_text("utf-8").replace(f"datasets/{name}.hdf5", name), "utf-8")

    command = ["reproduce.py", "baselines", "--sets", "hopper-medium", "--agents", "bc"]
    command += ["--updates=3", "--seeds=2", "--steps=300", "--episodes=2"]
    monkeypatch.setattr(sys, "argv", command)
    assert script.main() == 0
    out = capsys.readouterr().out
    assert "1 runs, 1 processes in all: 1 finished" in out
    final = Path("results/bc.hopper-medium.final.json")
    made = final.stat().st_mtime_ns
    report = Path("results/report/report.md").read_text(encoding="utf-8")
    assert "| 2 | 3 | 2 | after, seed 1000 | finished |" in report
    assert script.main() == 0  # nothing is left to do
    assert final.stat().st_mtime_ns == made

    asked: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", [*command, "--steps=301"])
    monkeypatch.setattr(
        script.subprocess,
        "run",
        lambda command, check: asked.append(command) or SimpleNamespace(returncode=2),
    )
    assert script.main() == 2
    assert asked[0][1].endswith("make_datasets.py")
    assert asked[0][2:7] == ["deep-ope", "--env", "hopper", "--set", "medium"]
    assert "could not be made" in capsys.readouterr().err
