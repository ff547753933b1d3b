"""Published scores stand beside our own on D4RL's own files, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest

from rl_shift.report_document import Listing, Table
from rl_shift.report_published import chapter, published, table
from rl_shift.report_runs import Episodes, Gathered, Leg, Run


def run(agent: str, origin: str, data: str = "hopper-medium-v2", **changes: Any) -> Run:
    import numpy as np

    leg = Leg(data, "Hopper-v4", 10, 0, "raw", "null", (0.0, 100.0), data, origin, "sha")
    episodes = Episodes(np.array([[40.0, 60.0], [60.0, 80.0]]), updates=10)
    given: dict[str, Any] = {
        "folder": Path(agent), "status": "finished", "agent": agent, "settings": {},
        "legs": (leg,), "seeds": (0, 1), "evaluations": (episodes,), "updates": 10,
        "env_steps": 0, "cost": {}, "data_mode": "native", "versions": {}, "errors": {},
    }  # fmt: skip
    return Run(**given | changes)


def test_the_table_is_whole() -> None:
    assert len(table()["last"]) == len(table()["best"]) == 30
    assert all(len(row) == 10 for which in ("last", "best") for row in table()[which].values())
    # averages that CORL prints below its own rows
    for which, agent, mean in (("last", "TD3+BC", 76.45), ("best", "IQL", 86.28)):
        names = [name for name in table()[which] if name.endswith("-v2") and "ant" not in name]
        values = [value for n in names if (value := published(n, agent, which)) is not None]
        assert len(values) == 9
        assert sum(value for value, _ in values) / 9 == pytest.approx(mean, abs=0.006)


def test_names_are_folded() -> None:
    assert published("hopper-medium-v2", "td3_bc") == (60.37, 3.49)
    assert published("hopper-medium-v2", "sac_n", "best") == (101.79, 0.20)
    assert published("hopper-medium-v2", "bc") == (53.51, 1.76)
    assert published("hopper-medium-v2", "unheard_of") is None
    assert published("hopper-medium-v9", "bc") is None


def test_only_files_of_d4rl_are_compared() -> None:
    own = run("bc", "D4RL (hopper-medium-v2)")
    named = run("iql", "named like D4RL's hopper-medium-v2, but of another size")
    blocks = chapter(Gathered([own, named]), None)
    (shown,) = [block for block in blocks if isinstance(block, Table)]
    (row,) = shown.rows
    assert row[:3] == ["hopper-medium-v2", "bc", "60.0"]
    assert row[4:6] == ["53.5 ± 1.8", "+6.5"]
    (listed,) = [block for block in blocks if isinstance(block, Listing)]
    assert listed.items == [
        "iql on hopper-medium-v2: named like D4RL's hopper-medium-v2, but of another size"
    ]


def test_unfinished_runs_and_other_data_are_not_compared() -> None:
    going = run("bc", "D4RL (hopper-medium-v2)", status="running")
    assert not [b for b in chapter(Gathered([going]), None) if isinstance(b, Table)]
    other = run("bc", "recorded", data="mine")
    assert chapter(Gathered([other]), None) == []
