"""FineTune: what it keeps, against hand-worked values; the two-stage cheetah; the CLI."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch.distributions import Normal, kl_divergence

from rl_shift import agents, cli, envs, runs, seeding
from rl_shift.agents.finetune import standardised
from rl_shift.buffer import Buffer, Mixture
from rl_shift.config import Task
from rl_shift.errors import UserError
from rl_shift.retention import fisher_diagonal, gaussian_divergence

OBS, ACTION = Box(-np.inf, np.inf, (2,), np.float32), Box(-1.0, 1.0, (2,), np.float32)
SMALL = ["--agent.hidden", "[16]", "--agent.batch_size", "16", "--agent.buffer_capacity", "500"]
FEW = ["--eval-every", "0", "--eval-episodes", "1", "--log-every", "10"]


def agent_of(**changes: Any) -> Any:
    kind = agents.get("finetune")
    with seeding.forked(3):
        return kind(OBS, ACTION, kind.Config(hidden=(4,), batch_size=8, kept_batch=6, **changes))


def rows(place: float = 0.0, n: int = 32) -> Buffer:
    rng = np.random.default_rng(0)
    return Buffer.from_arrays(
        {
            "obs": rng.normal(size=(n, 2)).astype(np.float32) + np.float32(place),
            "action": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
            "reward": rng.normal(size=n).astype(np.float32),
            "next_obs": rng.normal(size=(n, 2)).astype(np.float32),
            "terminated": np.zeros(n, bool),
            "truncated": np.zeros(n, bool),
        },
        seeds=(0,),
    )


def begun(data: Buffer, tasks: int = 2, dataset: str | None = "old", **changes: Any) -> Any:
    """An agent in its second task, in which the first one's actor is kept."""
    agent = agent_of(**changes)
    for k in range(tasks):
        agent.begin_task(Task(name=f"{k}", dataset=dataset, env="new", env_steps=100), data)
    agent.stage = "online"
    return agent


def test_divergence_of_gaussians() -> None:
    g = torch.Generator().manual_seed(0)
    mean, log_std, new_mean, new_log_std = torch.randn(4, 5, 3, generator=g)
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(new_mean, new_log_std.exp())).sum(
        -1
    )
    found = gaussian_divergence((mean, log_std), (new_mean, new_log_std))
    torch.testing.assert_close(found, expected)


def test_fisher_information_is_the_mean_square_of_the_score() -> None:
    actor = agent_of().actor.double()
    obs = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = fisher_diagonal(actor, standardised, obs)
    draws, names = 60_000, [name for name, _ in actor.named_parameters()]
    total = {name: torch.zeros_like(p) for name, p in actor.named_parameters()}
    g = torch.Generator().manual_seed(2)
    for state in obs:  # by hand: squared scores of sampled actions
        mean, log_std = actor.gaussian(state[None])
        jacobians = [
            torch.autograd.grad(out, list(actor.parameters()), retain_graph=True)
            for out in (*mean[0], *log_std[0])
        ]
        z = torch.randn(draws, 2, generator=g, dtype=torch.float64)
        weight = torch.cat([z / log_std.detach().exp(), z.square() - 1], 1)  # d log p / d output
        for i, name in enumerate(names):
            per_output = torch.stack([j[i].flatten() for j in jacobians])
            scores = weight @ per_output
            total[name] += scores.square().mean(0).reshape(total[name].shape) / len(obs)
    for name in names:
        torch.testing.assert_close(found[name], total[name], rtol=0.05, atol=1e-3)


def test_a_first_task_without_start_keeps_nothing() -> None:
    data = rows()
    assert "weight" not in begun(data, tasks=1).sample(data)
    assert "weight" in begun(data).sample(data)


@pytest.mark.parametrize("keep", ["bc", "kl", "ewc", "memory", "none"])
def test_where_rows_come_from(keep: str) -> None:
    old, new = rows(100), rows(-100)
    agent = begun(old, keep=keep, coefficient=3.0, decay=0.5)
    agent.updates += 2
    batch = agent.sample(Mixture([(old, 0.25), (new, 0.75)]))
    kept = (batch["obs"] > 0).all(-1)
    assert kept.sum() == (2 if keep == "memory" else 0)
    assert ("kept_obs" in batch) == (keep == "bc")
    if keep == "bc":
        assert batch["kept_obs"].shape == (6, 2) and (batch["kept_obs"] > 0).all()
    assert ("weight" in batch) == (keep in ("bc", "kl", "ewc"))
    if "weight" in batch:
        assert batch["weight"] == pytest.approx(0.75)


@pytest.mark.parametrize("keep", ["bc", "kl", "ewc"])
def test_the_term_is_zero_at_the_start_and_pulls_back(keep: str) -> None:
    data = rows()
    agent = begun(data, keep=keep, coefficient=1e3)
    free = begun(data, keep="none")
    batch = agent.sample(Mixture([(data, 0.5), (data, 0.5)]))
    batch.setdefault("kept_obs", batch["obs"])
    assert agent.kept_loss(batch).detach() == 0.0
    for one in (agent, free):
        torch.manual_seed(0)
        for _ in range(40):
            one.update(one.sample(Mixture([(data, 0.5), (data, 0.5)])))
            one.advance()
    obs = data.take(torch.arange(32))["obs"]
    moved = [
        gaussian_divergence(a.origin.gaussian(obs), a.actor.gaussian(obs)).mean().item()
        for a in (agent, free)
    ]
    assert moved[0] < 0.2 * moved[1]


def test_what_is_kept_needs_data() -> None:
    with pytest.raises(UserError, match=r"agent.keep bc needs states.*--dataset"):
        begun(rows(), dataset=None)
    begun(rows(), dataset=None, keep="kl")


def test_two_stages() -> None:
    env = envs.make_env("rl_shift/CheetahRetrieval-v0", distance=0.2)
    inner: Any = env.unwrapped
    obs, _ = env.reset(seed=0)
    assert obs.shape == (18,) and obs[-1] == -1.0
    for _ in range(2):
        before, back = inner.data.qpos[0], inner.back
        obs, reward, terminated, _, info = env.step(np.zeros(6, np.float32))
        velocity = (inner.data.qpos[0] - before) / 0.05
        assert reward == pytest.approx(-velocity if back else velocity, abs=1e-5)
        assert not terminated and not info["back"]
        inner.data.qpos[0] = 0.3
        obs, _, _, _, info = env.step(np.zeros(6, np.float32))
        assert info["back"] and obs[-1] == 1.0
        obs, _ = env.reset()
        assert obs[-1] == -1.0
    env = envs.make_env("rl_shift/CheetahRetrievalFar-v0")
    obs, _ = env.reset(seed=0)
    assert obs[-1] == 1.0 and env.unwrapped.data.qpos[0] > 2  # type: ignore[attr-defined]


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env, far = "rl_shift/CheetahRetrieval-v0", "rl_shift/CheetahRetrievalFar-v0"
    old, data = str(tmp_path / "old"), str(tmp_path / "far.hdf5")
    start = ["train", "sac", "--env", far, "--env-steps", "60", "--run-dir", old, *SMALL, *FEW]
    assert cli.main([*start, "--agent.warmup_steps", "20"]) == 0
    collect = ["data", "collect", "--policy", old, "--env", far, "--steps", "200", "--out", data]
    assert cli.main(collect) == 0
    task = ["--env", env, "--env-steps", "30", "--agent.start", old, *SMALL, *FEW]
    for keep in ("bc", "ewc", "memory"):
        run = str(tmp_path / keep)
        more = ["--dataset", data, "--agent.keep", keep, "--run-dir", run]
        assert cli.main(["train", "finetune", *task, *more]) == 0
        assert json.loads((tmp_path / keep / "results.json").read_text())["status"] == "finished"
    assert cli.main(["train", "finetune", *task, "--run-dir", str(tmp_path / "no")]) == 2
    assert "needs states of what shall be kept" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "bc"), "--env", far, "--episodes", "1"]) == 0
    source, tuned = (runs.load_agent(str(tmp_path / name))[0] for name in ("old", "bc"))
    for name, p in source.get_submodule("actor").named_parameters():
        assert torch.equal(p, tuned.get_parameter(f"origin.{name}"))
        assert not torch.equal(p, tuned.get_parameter(f"actor.{name}"))
