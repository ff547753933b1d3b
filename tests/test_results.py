"""The tables of RESULTS.md against the raw returns that they were made from."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_shift import continual_metrics
from rl_shift.life import phases as life_phases
from rl_shift.metrics import mean_interval
from rl_shift.ope import judge

ROOT = Path(__file__).parents[1]
RAW = ROOT / "docs" / "results"
TEXT = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def rows(head: str) -> Iterator[list[str]]:
    """The cells of the table whose first line begins with `head`."""
    _, found, rest = TEXT.partition(f"\n{head}")
    assert found, head
    for line in rest.splitlines()[2:]:
        if not line.startswith("|"):
            return
        yield [cell.strip().strip("*") for cell in line.strip("|").split("|")]


def raw(name: str) -> dict[str, Any]:
    return json.loads((RAW / f"{name}.json").read_text())


def check(cell: str, values: Sequence[float], digits: int = 1) -> None:
    """`mean ± half (each)` in a cell, to the last digit printed; `each` may be missing."""
    cell = cell.replace("**", "")
    printed = [float(x) for x in NUMBER.findall(cell)]
    mean, low, high = mean_interval(np.asarray(values))
    expected = [mean, (high - low) / 2, *(values if len(printed) > 2 else [])]
    assert printed == pytest.approx(expected, abs=0.51 * 10.0**-digits + 1e-9), cell


def curve(name: str) -> dict[int, list[float]]:
    """The scores of every evaluation of a run, by updates."""
    return {e["updates"]: e["score"] for e in raw(name)["evaluations"]}


def check_learner(file: str, cells: Sequence[str]) -> np.ndarray:
    """Scores after 50,000 and 80,000 updates and of the final evaluation; gives the last."""
    *on_the_way, last = cells
    scores = curve(f"{file}.results")
    for updates, cell in zip((50_000, 80_000), on_the_way, strict=True):
        check(cell, scores[updates])
    final = final_scores(file)
    check(last, list(final))
    return final


def final_scores(file: str) -> np.ndarray:
    """Of the 50 episodes after a run's last update, per seed."""
    return np.array(raw(f"{file}.final")["evaluations"][0]["score"])


# ---- offline agents ----------------------------------------------------------------------------


def test_base_agents() -> None:
    seen = 0
    for name, _, *cells in rows("| set | data | BC, 50,000 updates"):
        for agent, cell in zip(("bc", "td3_bc", "iql"), cells, strict=True):
            if cell == "–":
                continue
            check(cell.rstrip("*"), list(final_scores(f"{agent}.{name}")))
            seen += 1
    assert seen == 27


def test_values_that_cannot_be_true() -> None:
    name = "td3_bc.walker2d-medium"
    values, scores = raw(f"{name}.values"), curve(f"{name}.layer_norm.results")
    kinds = ("published", "published.seed0.highest", "published.seed1.highest", "layer_norm")
    seen = 0
    for updates, *cells, last in rows("| updates, walker2d-medium | value, published, 3 seeds |"):
        step = updates.replace(",", "")
        for kind, cell in zip(kinds, cells, strict=True):
            if cell == "–":
                assert step not in values[kind]
                continue
            assert float(cell.replace(",", "")) == pytest.approx(values[kind][step], abs=0.51)
            seen += 1
        assert [int(x) for x in last.split(", ")] == [round(x) for x in scores[int(step)]]
    assert seen == 6 + 5 + 4 + 6
    assert values["hopper-medium"]["100000"] == pytest.approx(242, abs=0.51)
    check("62.1 ± 31.8 (71.5, 47.5, 67.3)", list(final_scores(f"{name}.layer_norm")))


def test_the_sweep() -> None:
    seen = 0
    for name, _, *cells in rows("| set, 20,000 updates | data | BC |"):
        for agent, cell in zip(("bc", "bc10", "td3_bc", "iql"), cells, strict=True):
            run = raw(f"sweep/{agent}.{name}")
            assert run["status"] == "finished" and run["last"]["updates"] == 20_000
            check(cell, run["last"]["score"])
            seen += 1
    assert seen == 36


def test_cfpi_and_its_budgets() -> None:
    names = ("hopper-medium", "walker2d-medium")
    for name, bc, iql, cfpi in rows("| 20,000 updates | BC | IQL | CFPI, budget 0.5 |"):
        for agent, cell in zip(("bc", "iql", "cfpi"), (bc, iql, cfpi), strict=True):
            check(cell, raw(f"sweep/{agent}.{name}")["last"]["score"])
    found = {name: raw(f"cfpi/{name}.budgets")["evaluations"] for name in names}
    for k, (_, *cells) in enumerate(rows("| CFPI's budget log tau |")):
        for name, cell in zip(names, cells, strict=True):
            assert found[name][k]["agent"]["log_tau"] == [[0.0], [0.1], [0.5]][k]
            check(cell, found[name][k]["score"])
    for name, printed in zip(names, ("-9.9 ± 9.5", "-28.4 ± 27.1"), strict=True):
        first, _, last = (np.array(e["score"]) for e in found[name])
        assert printed in TEXT
        check(printed, list(last - first))


def test_rewards_known_on_a_few_trajectories() -> None:
    labels = {
        "left out": "none",
        "0": "zero",
        "the networks' mean": "mean",
        "lower bound": "lower",
    }
    seen = 0
    for name, *cells in rows("| rewards of the other 95 % |"):
        for data, cell in zip(("hopper-medium", "walker2d-medium"), cells, strict=True):
            if cell == "–":
                continue
            label = labels[name]
            if (data, label) == ("hopper-medium", "lower"):
                scores = raw("sweep/spl.hopper-medium")["last"]["score"]
            else:
                found = [raw(f"spl/{data}.{label}.{k}") for k in range(3)]
                assert all(run["last"]["updates"] == 20_000 for run in found)
                scores = [run["last"]["score"][0] for run in found]
            check(cell, scores)
            seen += 1
    assert seen == 7
    zero, lower = (
        [raw(f"spl/walker2d-medium.{label}.{k}")["last"]["score"][0] for k in range(3)]
        for label in ("zero", "lower")
    )
    check("31.3 ± 8.6", [a - b for a, b in zip(zero, lower, strict=True)])


def test_rewards_known_on_a_few_trajectories_choose_what_to_clone() -> None:
    def last(name: str) -> list[float]:
        found = [raw(f"spl/{name}.{k}")["last"] for k in range(3)]
        assert all(run["updates"] == 20_000 for run in found)
        return [run["score"][0] for run in found]

    zero, lower = (last(f"walker2d-medium.0.01.{label}") for label in ("zero", "lower"))
    assert "zeros 61.5 ± 5.0 (62.2, 63.1, 59.2)" in TEXT
    check("61.5 ± 5.0 (62.2, 63.1, 59.2)", zero)
    check("36.1 ± 17.2 (30.4, 43.8, 34.2)", lower)
    check("25.4 ± 15.5", list(np.subtract(zero, lower)))
    for label, cell in (
        ("none", "46.7 ± 36.5 (62.4, 44.3, 33.3)"),
        ("zero", "44.1 ± 16.5 (51.8, 40.2, 40.2)"),
        ("lower", "32.4 ± 24.7 (23.5, 30.5, 43.1)"),
    ):
        assert cell in TEXT
        check(cell, last(f"hopper-medium.0.01.{label}"))
    labels = {"left out": "none", "0": "zero", "lower bound": "lower"}
    scores = {}
    for name, *cells in rows("| rewards of the other trajectories, halfcheetah-mixed |"):
        for share, cell in zip(("0.01", "0.05", "0.1"), cells, strict=True):
            scores[name, share] = last(f"bc.halfcheetah-mixed.{share}.{labels[name]}")
            check(cell, scores[name, share])
    assert len(scores) == 9
    for share, cell in (("0.01", "28.6 ± 39.4"), ("0.05", "5.0 ± 3.7")):
        gain = np.subtract(scores["lower bound", share], scores["left out", share])
        check(cell, list(gain))


@pytest.mark.parametrize("judge", ["off", "value"])
def test_corrected_policies(judge: str) -> None:
    agents = {"IQL": "iql", "TD3+BC": "td3_bc", "ReBRAC": "rebrac", "CQL": "cql"}
    seen = 0
    for name, data, mode, without, corrected, paired, _, _ in rows("| base | data | judge |"):
        if mode != judge:
            continue
        found = [raw(f"cdsa.{agents[name]}.{data}.{k}.{judge}")["evaluations"] for k in range(3)]
        before, after = (np.array([e[i]["score"][0] for e in found]) for i in (0, 1))
        assert [e["agent"]["correction"] for e in found[0]] == ["off", "on"]
        check(without, list(before))
        check(corrected, list(after))
        check(paired, list(after - before))
        seen += 1
    assert seen == 22


def test_channels_of_the_joint_mode() -> None:
    seen = 0
    for data, channels, without, corrected, paired, size in rows("| TD3+BC on | channels |"):
        names = [f"cdsa.joint.{data}.{k}.{channels}" for k in range(3)]
        found = [raw(name)["evaluations"] for name in names]
        before, after = (np.array([e[i]["score"][0] for e in found]) for i in (0, 1))
        assert [e["agent"]["correction"] for e in found[0]] == ["off", "on"]
        check(without, list(before))
        check(corrected, list(after))
        check(paired, list(after - before))
        moved = [e[1]["diagnostics"]["correction/mean_abs"][0] for e in found]
        assert float(size) == pytest.approx(np.mean(moved), abs=0.00051)
        seen += 1
    assert seen == 6


def test_corrected_policies_under_shifts() -> None:
    columns = [
        *("iql.walker2d-medium", "iql.hopper-mixed"),
        *("td3_bc.walker2d-medium", "td3_bc.hopper-medium"),
    ]
    seen = less = 0
    for name, *cells in rows("| corrected under a shift |"):
        shift = "-".join(re.findall(r"^(?:observation )?(\w+) (\S+)", name)[0])
        shift = shift.replace("noise", "obs_noise")
        for column, cell in zip(columns, cells, strict=True):
            if cell == "–":
                continue
            plain, shifted = (
                np.array([[e["score"][0] for e in raw(name)["evaluations"]] for name in names]).T
                for names in (
                    [f"cdsa.{column}.{k}.off" for k in range(3)],
                    [f"shifts/cdsa.{column}.{k}.{shift}" for k in range(3)],
                )
            )
            scores, paired = cell.split(", ")
            printed = [float(x) for x in scores.split(" -> ")]
            assert printed == pytest.approx(list(shifted.mean(1)), abs=0.051)
            check(paired, list(shifted[1] - shifted[0]))
            off, on = plain.mean(1) - shifted.mean(1)
            less += int(on < off)
            seen += 1
    assert seen == 22
    assert f"loses less in {less} of these 22 cells" in TEXT


def test_what_guidance_trades() -> None:
    found = [raw(f"pgd/tradeoff.halfcheetah-medium.{s}") for s in range(3)]
    named = {"data": [r["data"] for r in found], "ensemble, one step": [r["model"] for r in found]}
    for k, strength in enumerate((0, 1, 4, 16, 64)):
        named[f"coefficient {strength}" if strength else "unguided"] = [
            r["guided"][k] for r in found
        ]
    keys = ("log_likelihood", "spread", "dynamics_mse", "dynamics_median", "distance")
    seen = 0
    for name, *cells in rows("| halfcheetah-medium, windows of 2 |"):
        for key, digits, cell in zip(keys, (3, 3, 4, 4, 3), cells, strict=True):
            check(cell, [row[key] for row in named[name]], digits)
        seen += 1
    assert seen == len(named)


def test_terminations_that_are_generated() -> None:
    files = {
        "commit 03af72f: listed twice, standardised": "before",
        "standardised (`null`)": "standardised",
        "a gap of 8": "gap8",
        "a gap of 4 (default)": "gap4",
        "a gap of 1": "gap1",
    }
    seen = set()
    for name, *cells in rows("| hopper-medium | transitions that end an episode |"):
        kept = raw(f"pgd/endings.{files.get(name, 'gap4')}")
        row = kept["data"] if name == "data" else kept["guided"][0]
        found = [row[key] for key in ("terminated", "ending", "dynamics_mse")]
        for cell, value, digits in zip(cells, found, (4, 2, 4), strict=True):
            assert float(cell) == pytest.approx(value, abs=0.51 * 10**-digits)
        seen.add(name)
    assert seen == {"data", *files}


def test_learners_on_generated_rows_of_the_small_set() -> None:
    seen = 0
    for name, first, last, whole in rows("| rows | 5,000 updates (seeds) |"):
        kind = name.removesuffix(", windows of 2, terminations as above")
        if kind not in ("unguided", "guided"):
            continue
        scores = [e["score"] for e in raw(f"pgd/windows2.corrected.{kind}")["evaluations"]]
        assert [float(x) for x in first.split(", ")] == pytest.approx(scores[0], abs=0.051)
        check(last, scores[-1])
        check(whole, list(np.mean(scores, 0)))
        seen += 1
    assert seen == 2


def test_learners_on_generated_rows_of_the_hopper() -> None:
    files = {
        ("real", "0 to 2"): "td3_bc.hopper-medium",
        ("unguided", "0 to 2"): "pgd/hopper.unguided",
        ("guided", "0 to 2"): "pgd/hopper.guided",
        ("real", "3 to 5"): "pgd/hopper.real.b",
        ("unguided", "3 to 5"): "pgd/hopper.unguided.b",
    }
    seen, ends = set(), {}
    for name, seeds, *cells in rows("| rows, hopper-medium | seeds |"):
        ends[name, seeds] = list(check_learner(files[name, seeds], cells))
        seen.add((name, seeds))
    assert seen == set(files)
    check("35.2 ± 15.8", list(np.subtract(ends["unguided", "0 to 2"], ends["guided", "0 to 2"])))
    six = {name: ends[name, "0 to 2"] + ends[name, "3 to 5"] for name in ("real", "unguided")}
    check("81.9 ± 16.7", six["unguided"])
    check("68.1 ± 10.7", six["real"])
    check("13.7 ± 22.7", list(np.subtract(six["unguided"], six["real"])))


def test_learners_on_generated_rows_of_three_sets() -> None:
    ends = {}
    for data, name, *cells in rows("| set | rows | 50,000 updates |"):
        file = f"td3_bc.{data}" if name == "real" else f"pgd/{data}.{name}"
        ends[data, name] = check_learner(file, cells)
    assert len(ends) == 9
    for data, one, other, cell in (
        ("walker2d-mixed", "guided", "unguided", "38.0 ± 24.0"),
        ("walker2d-mixed", "guided", "real", "-4.6 ± 24.4"),
        ("walker2d-mixed", "real", "unguided", "42.6 ± 26.4"),
        ("hopper-mixed", "guided", "real", "14.8 ± 63.7"),
        ("hopper-mixed", "guided", "unguided", "7.4 ± 16.7"),
    ):
        assert cell in TEXT
        check(cell, list(ends[data, one] - ends[data, other]))
    files = {
        "real": "td3_bc.hopper-medium",
        **{k: f"pgd/hopper.{k}" for k in ("unguided", "guided")},
    }
    for name, file in files.items():
        ends["hopper-medium", name] = final_scores(file)
        (line,) = re.findall(r"Mean over the four sets: (.*?)\. ", TEXT)
        (cell,) = re.findall(rf"\b{name} ([^()]*\([^()]*\))", line)
        check(cell, list(np.mean([v for (_, arm), v in ends.items() if arm == name], 0)))
    kept = raw("pgd/learners")
    for data, *cells in rows("| set | cloning, unguided |"):
        found = [
            kept[data][arm][key] for key in ("cloning", "value") for arm in ("unguided", "guided")
        ]
        for cell, value, digits in zip(cells, found, (3, 3, 0, 0), strict=True):
            assert float(cell.replace(",", "")) == pytest.approx(value, abs=0.51 * 10.0**-digits)


def test_learners_whose_critics_have_layer_norm() -> None:
    files = {
        "real": "td3_bc.walker2d-medium.layer_norm",
        "unguided": "pgd/walker2d-medium.unguided.layer_norm",
        "guided": "pgd/walker2d-medium.guided.layer_norm",
    }
    ends = {}
    for name, *cells in rows("| rows, walker2d-medium, LayerNorm |"):
        ends[name] = check_learner(files[name], cells)
    assert set(ends) == set(files)
    check("-7.1 ± 65.9", list(ends["unguided"] - ends["real"]))
    check("-8.1 ± 79.7", list(ends["guided"] - ends["real"]))
    kept = raw("pgd/learners")["walker2d-medium, LayerNorm"]
    found = [kept[arm]["value"] for arm in ("unguided", "guided")]
    assert found == pytest.approx([283, 282], abs=0.51)
    cells = {"real": "52.1 ± 10.2", "unguided": "47.7 ± 22.0", "guided": "50.0 ± 15.4"}
    for name, cell in cells.items():
        others = [f"td3_bc.{data}" for data in ("hopper-medium", "hopper-mixed", "walker2d-mixed")]
        if name != "real":
            others = [f"pgd/{data}.{name}" for data in ("hopper", "hopper-mixed", "walker2d-mixed")]
        assert cell in TEXT
        check(cell, list(np.mean([*map(final_scores, others), ends[name]], 0)))


def test_learners_on_batches_that_are_half_real() -> None:
    ends = {}
    for data, name, *cells in rows("| half real | rows |"):
        data, _, norm = data.partition(", ")
        end = ".layer_norm" if norm else ""
        file = f"td3_bc.{data}{end}" if name == "real" else f"pgd/{data}.{name}.half{end}"
        ends[data, name] = check_learner(file, cells)
    assert len(ends) == 15
    mean = {
        arm: np.mean([v for (_, name), v in ends.items() if name == arm], 0)
        for arm in ("real", "unguided", "guided")
    }
    (line,) = re.findall(r"mean over the five sets: (.*?);", TEXT)
    for arm, found in mean.items():
        (cell,) = re.findall(rf"\b{arm} ([^()]*\([^()]*\))", line)
        check(cell, list(found))
    for cell, one, other in (
        ("6.4 ± 23.4", "guided", "real"),
        ("3.9 ± 8.6", "unguided", "real"),
        ("2.5 ± 17.8", "guided", "unguided"),
    ):
        assert cell in TEXT
        check(cell, list(mean[one] - mean[other]))
    before = final_scores("pgd/walker2d-mixed.unguided")
    check("52.9 ± 26.9", list(ends["walker2d-mixed", "unguided"] - before))
    gains = []
    for data, *cells, difference in rows("| half real, seeds 3 to 5 |"):
        real = "pgd/hopper.real.b" if data == "hopper-medium" else f"td3_bc.{data}.b"
        other = [final_scores(file) for file in (real, f"pgd/{data}.guided.half.b")]
        for cell, found in zip(cells, other, strict=True):
            check(cell, list(found))
        six = [
            np.concatenate([ends[data, n], v])
            for n, v in zip(("real", "guided"), other, strict=True)
        ]
        gains.append(six[1] - six[0])
        check(difference, list(gains[-1]))
    assert len(gains) == 3
    check("8.8 ± 10.5", list(np.mean(gains, 0)))


def test_iql_on_generated_rows() -> None:
    files = {
        "real": "sweep/iql.halfcheetah-medium",
        "unguided": "pgd/halfcheetah-medium.iql.c0",
        "guided, coefficient 1": "pgd/halfcheetah-medium.iql.c1",
        "half real, unguided": "pgd/halfcheetah-medium.iql.half.c0",
        "half real, guided, coefficient 1": "pgd/halfcheetah-medium.iql.half.c1",
    }
    last = {}
    for name, *cells in rows("| rows, halfcheetah-medium, IQL |"):
        scores = curve(files[name])
        for updates, cell in zip((10_000, 15_000, 20_000), cells, strict=True):
            check(cell, scores[updates])
        last[name] = np.array(scores[20_000])
    assert set(last) == set(files)
    check("6.4 ± 4.3", list(last["real"] - last["unguided"]))
    check("19.3 ± 19.1", list(last["unguided"] - last["guided, coefficient 1"]))
    half = last["half real, guided, coefficient 1"]
    check("25.0 ± 12.8", list(half - last["guided, coefficient 1"]))
    check("-0.7 ± 3.7", list(half - last["real"]))
    files = {
        "real": "iql.hopper-medium",
        "unguided": "pgd/hopper-medium.iql.unguided",
        "guided, coefficient 1": "pgd/hopper-medium.iql.guided",
    }
    last = {
        name: check_learner(files[name], c) for name, *c in rows("| rows, hopper-medium, IQL |")
    }
    check("-16.3 ± 96.5", list(last["unguided"] - last["real"]))
    check("-41.7 ± 125.1", list(last["guided, coefficient 1"] - last["real"]))


def test_learners_on_generated_rows_of_the_cheetah() -> None:
    files = {
        "real": "td3_bc.halfcheetah-medium.results",
        "guided, ring of 14,336 windows": "pgd/halfcheetah.guided",
        "unguided, ring of 14,336 windows": "pgd/halfcheetah.unguided",
        "unguided, ring of 500,000": "pgd/halfcheetah.unguided500k.0",
        "guided, ring of 500,000": "pgd/halfcheetah.guided500k.0",
        "guided, ring of 14,336, short denoiser": "pgd/halfcheetah.short.guided.0",
        "guided, ring of 143,360, short denoiser": "pgd/halfcheetah.short.guided143k.0",
    }
    seen = set()
    for name, *cells in rows("| rows, halfcheetah-medium | 30,000 updates |"):
        scores = curve(files[name])
        for updates, cell in zip((30_000, 50_000, 70_000, 100_000), cells, strict=True):
            if len(scores[updates]) > 1:
                check(cell, scores[updates])
            else:
                assert float(cell) == pytest.approx(scores[updates][0], abs=0.051)
        seen.add(name)
    assert seen == set(files)
    guided, unguided = (curve(f"pgd/halfcheetah.{arm}")[100_000] for arm in ("guided", "unguided"))
    assert "(2.5 ± 8.7 from unguided ones)" in TEXT
    check("2.5 ± 8.7", list(np.subtract(guided, unguided)))
    kept = raw("pgd/tradeoff.halfcheetah-medium.long.0")
    longer = raw("pgd/tradeoff.halfcheetah-medium.long.ensemble.0")
    found = [kept["data"], *kept["guided"], kept["model"], longer["model"]]
    keys = ("log_likelihood", "spread", "dynamics_mse", "dynamics_median", "distance")
    table = list(rows("| halfcheetah-medium, longer training |"))
    for row, (_, *cells) in zip(found, table, strict=True):
        assert [float(x) for x in cells] == pytest.approx([row[k] for k in keys], abs=0.00051)


# ---- sequences ---------------------------------------------------------------------------------


def matrix(name: str) -> np.ndarray:
    """Scores after every task in every task, the last evaluation of each; NaN before it."""
    evaluations = raw(name)["evaluations"]
    size = 1 + max(e["task"] for e in evaluations)
    found = np.full((size, size), np.nan)
    for e in evaluations:
        found[e["during"], e["task"]] = e["score"][0]
    return found


def kept(names: Sequence[str]) -> tuple[list[float], list[float], np.ndarray]:
    """PER and BWT of every seed, mean scores after the last task."""
    found = [matrix(name) for name in names]
    lost = [m[-1, :-1] - np.diagonal(m)[:-1] for m in found]
    last = np.array([m[-1] for m in found])
    return list(last.mean(1)), [float(x.mean()) for x in lost], last.mean(0)


VARIANTS = {
    "fine-tuning": "finetune", "OER, random rows": "random", "OER, MBES": "mbes",
    "OER, 5,000 random rows": "random5000", "OER, MBES, 5,000 rows": "mbes5000",
    "OER, random rows, the data's actions": "random_data",
    "OER, MBES, the data's actions": "mbes_data",
    "all 100,000 rows kept": "all", "A-GEM, random rows": "agem", "EWC": "ewc", "SI": "si",
    "L2": "l2", "LwF, no memory": "lwf", "frozen trunk, layers per task": "frozen",
    "all at once, the data's actions for four": "multitask",
    "OER, 20 random rows": "random20", "OER, MBES, 20 rows": "mbes20",
    "ER, one network": "er", "OER, MBES, cloned afterwards": "mbes",
    "OER, MBES, cloned along the way": "joint",
    "whole episodes, best first": "return", "highest rewards": "reward",
    "largest TD errors": "surprise", "k-center": "coverage", "reservoir": "matching",
    "herding": "herding", "nearest to the policy's actions": "policy_match",
}  # fmt: skip


@pytest.mark.parametrize(
    ("head", "files", "count", "digits"),
    [
        ("| variant | flags | seeds | PER |", "cheetah_vel", 12, 0),
        ("| five velocities, own learners |", "own_velocities", 2, 0),
        ("| ten velocities |", "ten_velocities", 3, 0),
        ("| four directions |", "ant_dir", 11, 0),
        ("| four directions, rows chosen by |", "ant_dir", 7, 0),
        ("| four directions, own learners |", "ant_dir_whole", 1, 0),
        ("| four walkers |", "walkers", 6, 0),
        ("| triplet of medium sets |", "triplet_medium", 6, 1),
        ("| triplet, own learners |", "triplet_whole", 2, 1),
        ("| triplet of expert sets |", "triplet_expert", 5, 1),
    ],
)
def test_sequences(head: str, files: str, count: int, digits: int) -> None:
    seen = set()
    for name, _, seeds, per, bwt, scores in rows(head):
        found = kept([f"oer/{files}.{VARIANTS[name]}.{s}" for s in range(int(seeds))])
        check(per, found[0])
        if bwt != "–":  # nothing was learnt in turn
            check(bwt, found[1])
        within = 0.51 * 10.0**-digits
        assert [float(x) for x in NUMBER.findall(scores)] == pytest.approx(found[2], abs=within)
        seen.add(name)
    assert len(seen) == count


def test_what_carries_the_gain() -> None:
    sequences = {
        "triplet_medium": 3, "triplet_expert": 3, "walkers": 3, "cheetah_vel": 5,
        "ten_velocities": 3, "ant_dir": 5,
    }  # fmt: skip

    def paired(first: str, second: str, counts: dict[str, int]) -> list[list[float]]:
        both = [
            [kept([f"oer/{files}.{name}.{s}" for s in range(count)]) for name in (first, second)]
            for files, count in counts.items()
        ]
        return [
            [a - b for one, other in both for a, b in zip(one[i], other[i], strict=True)]
            for i in (0, 1)
        ]

    targets = dict.fromkeys(("triplet_medium", "walkers", "cheetah_vel", "ant_dir"), 3)
    per, bwt = paired("random", "random_data", targets)
    assert len(per) == 12 and min(per) > 0
    (found,) = re.findall(r"own actions end (.*) points of PER above .*; BWT (.*)\), MBES", TEXT)
    check(found[0], per)
    check(found[1], bwt)
    per, bwt = paired("mbes", "random", sequences)
    (found,) = re.findall(r"MBES\n(\S+ ± \S+) from random rows \(22 pairs, BWT (.*?);", TEXT)
    assert len(per) == 22
    check(found[0], per)
    check(found[1], bwt)


def test_forgetting_as_a_sequence_grows() -> None:
    seen = 0
    for name, *cells in rows("| BWT after |"):
        found = [matrix(f"oer/ten_velocities.{VARIANTS[name]}.{s}") for s in range(3)]
        for tasks, cell in zip((2, 4, 6, 8, 10), cells, strict=True):
            old = range(tasks - 1)
            check(cell, [float(np.mean([m[tasks - 1, j] - m[j, j] for j in old])) for m in found])
        seen += 1
    assert seen == 3


def test_the_stability_gap() -> None:
    variants = {**VARIANTS, "the same with controls": "controls"}
    keys = ["PER", "BWT", "min-ACC", "min-ACC (3-point medians)", "WC-ACC", "WF^10", "WP^10"]
    seen = 0
    for name, _, *cells in rows("| stability gap | flags |"):
        found = [
            continual_metrics.Row(e["updates"], e["during"], e["task"], seed, float(e["score"][0]))
            for seed in range(3)
            for e in raw(f"oer/cheetah_gap.{variants[name]}.{seed}")["evaluations"]
        ]
        numbers = continual_metrics.summary(found)
        for key, cell in zip(keys, cells, strict=True):
            check(cell, list(numbers[key]))
        seen += 1
    assert seen == 3


# ---- lives -------------------------------------------------------------------------------------


def lives(start: str) -> list[dict[str, Any]]:
    paths = sorted((RAW / "lives").glob(f"{start}.json"))
    paths += sorted((RAW / "lives").glob(f"{start}.?-?.json"))
    return [life for path in paths for life in json.loads(path.read_text())["lives"]]


def phase_means(found: Sequence[dict[str, Any]]) -> np.ndarray:
    """Mean reward of every phase over lives under the same shift."""
    bounds = life_phases(np.asarray(found[0]["regime"]))
    return np.array([np.mean([np.mean(x["reward"][a:b]) for x in found]) for a, b in bounds])


def test_lives() -> None:
    agents = {
        "ppo": "ppo", "dqn": "dqn", "reactive, published": "reactive", "ICM alone": "icm",
        "reactive, reacting": "reacting", "the same with RND": "reacting_rnd",
        "the reset alone": "reset", "dqn with ICM": "dqnicm",
        "reacting once the reward fell": "fall",
    }  # fmt: skip
    kinds = {
        "reward flip": "reward_flip", "rotation": "rotation", "colour swap": "colour_swap",
        "none": "stationary",
    }  # fmt: skip
    seen = 0
    for kind, agent, seeds, lifetime, phases, *_ in rows("| kind | agent | seeds | lifetime"):
        if kind not in kinds:
            continue
        found = lives(f"{agents[agent]}.{kinds[kind]}")
        assert len(found) == int(seeds), (kind, agent)
        rewards = [np.asarray(life["reward"]) for life in found]
        check(lifetime, [float(r.mean()) for r in rewards], digits=4)
        third = np.mean([[part.mean() for part in np.split(r, (625, 1250))] for r in rewards], 0)
        printed = [float(x) for x in NUMBER.findall(phases.replace("**", ""))]
        assert printed == pytest.approx(third, abs=1.1e-3), (kind, agent)
        seen += 1
    assert seen == 24


@pytest.mark.parametrize(
    ("head", "shift", "published", "agents", "seeds", "digits", "count", "within"),
    [
        ("| agent in a gradual change |", "slow_gradual", "reactive", 2, 5, 4, 4, 6e-4),
        ("| agent on the mirrored cheetah |", "cheetah_action_flip", "published", 2, 3, 3, 3, 6e-4),
        ("| agent on the flipped cheetah |", "cheetah_reward_flip", "published", 3, 3, 3, 3, 6e-4),
        ("| agent | seeds | lifetime reward per step", "cartpole", "reactive", 3, 3, 2, 4, 0.051),
    ],
    ids=["gradual", "mirrored cheetah", "flipped cheetah", "cart"],
)
def test_lives_of_one_shift(
    head: str,
    shift: str,
    published: str,
    agents: int,
    seeds: int,
    digits: int,
    count: int,
    within: float,
) -> None:
    files = {"ppo": "ppo", "reactive, published": published, "reactive, reacting": "reacting"}
    files["reacting once the reward fell"] = "fall"
    seen = 0
    for agent, printed_seeds, lifetime, phases in rows(head):
        found = lives(f"{files[agent]}.{shift}")
        assert len(found) == int(printed_seeds) == seeds
        check(lifetime, [float(np.mean(life["reward"])) for life in found], digits)
        means = phase_means(found)[:count]
        assert [float(x) for x in NUMBER.findall(phases)] == pytest.approx(means, abs=within)
        seen += 1
    assert seen == agents


def test_ppo_on_the_unchanged_cheetah() -> None:
    evaluations = raw("lives/ppo.cheetah_stationary")["evaluations"]
    ((*cells,),) = rows("| env steps | 102,400 |")
    for evaluation, cell in zip(evaluations, cells[1:], strict=True):
        printed = [float(x.replace(",", "")) for x in cell.split("; ")]
        assert printed == pytest.approx(np.mean(evaluation["returns"], 1), abs=0.51)


# ---- off-policy evaluation ---------------------------------------------------------------------


def test_off_policy_evaluation() -> None:
    found = {name: raw(f"ope/{name}-mixed")["policies"] for name in ("walker2d", "halfcheetah")}
    for policy, *cells in rows("| policy | walker2d | halfcheetah |"):
        for cell, policies in zip(cells, found.values(), strict=True):
            one = policies[int(policy)]
            assert one["policy"].endswith(f"_online_{policy}.npz")
            values = [one[k] for k in ("value", "discounted_return", "published_return")]
            printed = [float(x.replace(",", "")) for x in cell.split("/")]
            assert printed == pytest.approx(values, abs=0.51)
    for name, *cells in rows("| ladder | against own episodes"):
        value, own, given = (
            np.array([one[k] for one in found[name]])
            for k in ("value", "discounted_return", "published_return")
        )
        printed = [float(NUMBER.findall(cell)[0]) for cell in cells]
        judged = [judge(value, own), judge(value * (1 - 0.995) * 1000, given)]
        expected = [x for j in judged for x in (j.rank_correlation, j.absolute_error, j.regret)]
        assert printed[::3] == pytest.approx(expected[::3], abs=0.0051)
        assert printed == pytest.approx(expected, abs=0.051)


# ---- fine-tuning -------------------------------------------------------------------------------


def test_fine_tuning() -> None:
    names = {"none": "none.0", "kl, c = 1": "kl.1", "ewc, c = 100": "ewc.100", "bc, c = 1": "bc.1"}
    names["memory, share 0.1"] = "memory.0"
    seen = 0
    for name, seeds, whole, far in rows("| keep | seeds | return on the whole task"):
        if int(seeds) < 2:
            continue
        runs = [f"finetune/{names[name]}.{s}" for s in range(int(seeds))]
        check(whole, [float(np.mean(raw(run)["last"]["returns"])) for run in runs], digits=0)
        last = [raw(f"{run}.far")["evaluations"][0]["returns"] for run in runs]
        check(far, [float(np.mean(returns)) for returns in last], digits=0)
        seen += 1
    assert seen >= 4
