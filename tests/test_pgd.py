"""Policy-Guided Diffusion: the spec's numbers for guidance, windows, generation and the agent."""

import copy
import dataclasses
import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rl_shift import agents, config, seeding
from rl_shift.agent import Policy
from rl_shift.buffer import Buffer
from rl_shift.config import Task
from rl_shift.diffusion import Sampler, noise_levels
from rl_shift.errors import UnsupportedSpace, UserError
from rl_shift.guidance import Guidance, log_likelihood, score, tuned
from rl_shift.networks import DeterministicActor
from rl_shift.trajectories import INSIDE, TrajectoryCodec, window_starts

OBS, ACTION = 3, 2
BOX = spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
ACTIONS = spaces.Box(-1.0, 1.0, (ACTION,), np.float32)


# ---- guidance ----------------------------------------------------------------------------------


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + sigma.square())


def toy(
    guidance: Guidance,
    coefficient: float,
    steps: int,
    shape: tuple[int, int] = (31, 6),
    churn: float = 0.0,
    squashed: bool = False,
    windows: int = 60,
) -> tuple[float, float]:
    """Mean and std of the actions of normal data guided towards 0.6 (of u itself if squashed)."""
    codec = TrajectoryCodec(1, shape[1], shape[0])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(windows, shape[0], codec.width, generator=generator)

    def policy(obs: Tensor) -> Policy:
        return Policy(torch.full((len(obs), shape[1]), 0.6), None, squashed)

    with seeding.forked(1):
        x = guidance.sample(
            Sampler(steps, churn=churn), gaussian, noise, codec, policy, torch.tensor(coefficient)
        )
    action = codec.latents(x)
    action = action if squashed else action.tanh()
    return float(action.mean()), float(action.std())


@pytest.mark.parametrize("kind", ["deterministic", "gaussian", "squashed"])
def test_the_closed_form_is_the_gradient(kind: str) -> None:
    torch.manual_seed(0)
    codec = TrajectoryCodec(OBS, ACTION, 5)
    codec.mean.normal_()
    codec.std.uniform_(0.5, 2.0)
    actor = DeterministicActor(OBS, (16,), ACTION)
    std = None if kind == "deterministic" else torch.tensor([0.3, 0.02])

    def policy(obs: Tensor) -> Policy:
        return Policy(actor(obs), std, kind == "squashed")

    def log_prob(u: Tensor, x: Tensor) -> Tensor:
        v = u * codec.std[codec.latent] + codec.mean[codec.latent]
        mean = actor(codec.observations(x)).detach()
        sigma = torch.ones(ACTION) if std is None else std.clamp(min=0.1)
        value = v if kind == "squashed" else v.tanh()
        return torch.distributions.Normal(mean, sigma).log_prob(value).sum()

    x = torch.randn(4, 5, codec.width)
    expected = torch.func.grad(log_prob)(x[..., codec.latent], x)
    with torch.no_grad():
        g, curvature = score(codec, policy, x)
    torch.testing.assert_close(g, expected, rtol=1e-5, atol=1e-5)
    assert (curvature > 0).all()


ADDITIVE = Guidance("additive", "frobenius", denoised=True)


def test_strength_does_not_depend_on_the_number_of_steps() -> None:
    few, many = toy(ADDITIVE, 0.25, 32), toy(ADDITIVE, 0.25, 128)
    assert few[0] == pytest.approx(0.565, abs=0.03)
    assert few[0] == pytest.approx(many[0], abs=0.03)
    published = dataclasses.replace(ADDITIVE, invariant=False)
    assert toy(published, 0.5, 32, churn=80.0)[0] == pytest.approx(0.10, abs=0.03)


def test_strength_does_not_depend_on_the_window() -> None:
    rms = dataclasses.replace(ADDITIVE, norm="rms")
    means = [toy(rms, 0.018, 32, shape)[0] for shape in ((31, 6), (31, 3), (128, 6))]
    assert max(means) - min(means) < 0.03
    assert means[0] == pytest.approx(0.56, abs=0.03)


def test_the_other_forms_have_the_spec_s_strengths() -> None:
    none = dataclasses.replace(ADDITIVE, norm="none")
    assert toy(none, 0.02, 32) == pytest.approx((0.32, 0.47), abs=0.03)
    bounded = Guidance("bounded")
    assert toy(bounded, 1.0, 32, squashed=True) == pytest.approx((0.43, 0.62), abs=0.03)
    assert toy(bounded, 1.0, 32) == pytest.approx((0.30, 0.50), abs=0.03)
    exact = Guidance("curvature")
    assert toy(exact, 1.0, 32, squashed=True) == pytest.approx((0.304, 0.716), abs=0.02)
    assert toy(exact, 4.0, 32) == pytest.approx((0.403, 0.380), abs=0.03)
    assert toy(exact, 16.0, 32) == pytest.approx((0.537, 0.209), abs=0.03)


@pytest.mark.parametrize("form", ["additive", "bounded", "curvature"])
@pytest.mark.parametrize("churn", [0.0, 80.0])
def test_no_coefficient_is_no_guidance(form: Any, churn: float) -> None:
    codec = TrajectoryCodec(1, 2, 4)
    noise, sampler = torch.randn(8, 4, codec.width), Sampler(8, churn=churn)
    with seeding.forked(3):
        plain = sampler(gaussian, noise)
    with seeding.forked(3):
        guided = Guidance(form).sample(
            sampler,
            gaussian,
            noise,
            codec,
            lambda obs: Policy(torch.ones(len(obs), 2)),
            torch.zeros(()),
        )
    assert torch.equal(plain, guided)


def test_a_zero_gradient_pushes_nothing() -> None:
    codec, noise = TrajectoryCodec(1, 2, 4), torch.randn(3, 4, 5)
    x = noise * noise_levels(2)[0]
    for norm in ("none", "frobenius", "rms"):
        guidance = Guidance("additive", norm)
        latent = codec.latents(x)

        def policy(obs: Tensor, latent: Tensor = latent) -> Policy:
            return Policy(latent.tanh().flatten(0, 1))

        first: list[Tensor] = []

        def keeps(x: Tensor, sigma: Tensor, first: list[Tensor] = first) -> Tensor:
            first.append(x)
            return x

        guidance.sample(Sampler(2), keeps, noise, codec, policy, torch.ones(()))
        assert torch.equal(first[0], x)


@pytest.mark.parametrize("form", ["additive", "bounded", "curvature"])
def test_only_actions_are_moved(form: Any) -> None:
    codec = TrajectoryCodec(OBS, ACTION, 6)
    actor = DeterministicActor(OBS, (8,), ACTION)
    noise = torch.randn(4, 6, codec.width)
    # An element-wise denoiser: what guidance does to actions cannot reach other channels.
    plain = Sampler(8)(gaussian, noise)
    guided = Guidance(form).sample(
        Sampler(8), gaussian, noise, codec, lambda obs: Policy(actor(obs)), torch.tensor(0.5)
    )
    action = codec.latent
    assert not torch.equal(guided[..., action], plain[..., action])
    assert torch.equal(guided[..., : action.start], plain[..., : action.start])
    assert torch.equal(guided[..., action.stop :], plain[..., action.stop :])


@pytest.mark.parametrize("form", ["additive", "bounded", "curvature"])
def test_generation_builds_no_graph(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither through the policy nor through the denoiser, whose parameters do want gradients."""
    buffer = episodes([40, 40], [False, False])
    agent = made(buffer, guidance=form)
    for p in agent.parameters():
        p.requires_grad_(True)
    seen: list[Tensor] = []
    asked: list[str] = []
    for module in (agent.averaged, agent.base.actor):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for place, name in ((torch.autograd, "grad"), (torch.autograd, "backward"),
                        (torch.func, "grad"), (torch.func, "vjp")):  # fmt: skip
        monkeypatch.setattr(place, name, lambda *a, name=name, **k: asked.append(name))
    stage(agent, "guided")
    rows = agent.sample(buffer)
    assert len(seen) > 8 and asked == []
    assert not any(x.requires_grad for x in [*seen, *rows.values()])


def test_the_schedule_of_strengths() -> None:
    ours, published = Guidance().strengths(32), Guidance(invariant=False).strengths(32)
    assert published[0] == pytest.approx(1 + 0.3 * math.sin(math.pi / 32))
    assert ours[0] == pytest.approx(8 * published[0])
    assert ours[-1] == published[-1] == 0.0
    assert len(ours) == 32


@pytest.mark.parametrize(("target", "coefficient"), [(0.25, 0.259), (0.5, 0.149)])
def test_the_strength_tunes_itself(target: float, coefficient: float) -> None:
    value = spread = torch.tensor(0.1)
    for _ in range(10):
        mean, std = toy(ADDITIVE, float(value), 32, windows=40)
        spread = torch.tensor(math.sqrt(std**2 + (mean - 0.6) ** 2))
        value = tuned(value, spread, target)
    assert float(spread) == pytest.approx(target, rel=0.1)
    assert float(value) == pytest.approx(coefficient, rel=0.15)
    assert float(tuned(torch.tensor(1e-4), torch.tensor(0.0), 1.0)) == pytest.approx(1e-4)


def test_real_actions_on_the_edge_have_a_likelihood_too() -> None:
    at = Policy(torch.zeros(3, 1), torch.ones(1), squashed=True)
    value = log_likelihood(at, torch.tensor([[1.0], [-1.0], [INSIDE]]))
    assert value.isfinite().all()
    assert float(value[0]) == float(value[1]) == float(value[2])
    inner = torch.tensor([[0.99999]])  # what generated actions were given is what it was
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(inner.atanh())
    torch.testing.assert_close(log_likelihood(at, inner.expand(3, 1))[0], expected[0, 0])


def test_likelihood_by_hand() -> None:
    action = torch.tensor([[0.5, -0.2]])
    unit = log_likelihood(Policy(torch.tensor([[0.0, -0.2]])), action)
    assert float(unit) == pytest.approx(-0.125 - math.log(2 * math.pi))
    narrow = log_likelihood(Policy(torch.tensor([[0.5, -0.2]]), torch.tensor([0.01, 0.2])), action)
    assert float(narrow) == pytest.approx(-math.log(0.1 * 0.2) - math.log(2 * math.pi))


# ---- windows -----------------------------------------------------------------------------------


def episodes(
    lengths: list[int], terminated: list[bool], seed: int = 0, seeds: tuple[int, ...] = (0,)
) -> Buffer:
    """Episodes whose rows are numbered in obs[0]; the reward is half of it, obs[2] is constant."""
    rng = np.random.default_rng(seed)
    rows = sum(lengths)
    ends = np.cumsum(lengths) - 1
    arrays: dict[str, Any] = {
        "obs": rng.normal(size=(rows, OBS)).astype(np.float32),
        "action": np.tanh(rng.normal(0, 1.5, (rows, ACTION))).astype(np.float32),
        "reward": (np.arange(rows) / 2).astype(np.float32),
        "terminated": np.zeros(rows, bool),
        "truncated": np.zeros(rows, bool),
        "task": np.zeros(rows, np.int64),
    }
    arrays["obs"][:, 0], arrays["obs"][:, 2] = np.arange(rows), 4.0
    arrays["next_obs"] = np.roll(arrays["obs"], -1, 0)
    for end, final in zip(ends, terminated, strict=True):
        arrays["terminated" if final else "truncated"][end] = True
    return Buffer.from_arrays(arrays, seeds=seeds)


def test_window_rules() -> None:
    lengths, final = [40, 33, 5, 60, 32], [True, False, True, True, True]
    buffer = episodes(lengths, final)
    starts, dropped = window_starts(buffer, 32, 8)
    assert dropped == pytest.approx(5 / 170)
    chosen = set(starts.tolist())
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    for start in chosen:
        k = int(np.searchsorted(bounds, start, side="right")) - 1
        assert start + 32 <= bounds[k + 1]  # within one episode
        assert final[k] or start + 32 < bounds[k + 1]  # never ending on a truncation
    whole = [k for k, length in enumerate(lengths) if length >= 32]
    assert {int(bounds[k]) for k in whole} <= chosen  # every start
    assert {int(bounds[k + 1]) - 32 for k in whole if final[k]} <= chosen  # every termination
    inner = [s for k in whole for s in range(bounds[k], bounds[k + 1] - 31)]
    assert {s for s in inner[::8] if not (s + 31 in bounds - 1 and s == 41)} <= chosen | {41}
    assert 41 not in chosen
    batch = buffer.windows(64, 32, starts)
    assert (batch["obs"][:, 1:, 0] - batch["obs"][:, :-1, 0] == 1).all()
    assert not batch["terminated"][:, :-1].any()


def test_windows_that_fit_nowhere_name_the_longest() -> None:
    with pytest.raises(UserError, match="the longest usable window has 19; choose a shorter one"):
        window_starts(episodes([10, 20, 19], [True, False, True]), 32, 8)
    starts, _ = window_starts(episodes([10, 20, 19], [True, False, True]), 19, 8)
    assert starts.tolist() == [10, 30, 30]  # 18 moves, every 8th: the terminating one twice


def test_a_truncated_episode_needs_one_row_more() -> None:
    buffer = episodes([8, 8, 8, 40], [False] * 4)
    starts, dropped = window_starts(buffer, 8, 1)
    assert int(starts.min()) == 24 and dropped == pytest.approx(24 / 64)
    buffer = episodes([8, 9, 8, 7, 40], [True, False, False, True, True])
    starts, dropped = window_starts(buffer, 8, 1)
    assert {0, 8} <= set(starts.tolist()) and dropped == pytest.approx(15 / 72)


def test_windows_that_terminate_are_listed_once_as_published() -> None:
    buffer = episodes([40, 40], [True, False])
    starts, _ = window_starts(buffer, 8, 2, repeat=False)
    assert len(starts) == len(set(starts.tolist()))
    ours, _ = window_starts(buffer, 8, 2)
    assert sorted(set(ours.tolist())) == starts.tolist()
    assert ours.tolist().count(32) == 4
    assert made(buffer, repeat_endings=False).starts.tolist() == starts.tolist()


@pytest.mark.parametrize(("length", "stride"), [(2, 1), (8, 1), (8, 2), (32, 8)])
def test_terminations_are_as_frequent_in_windows_as_in_the_data(length: int, stride: int) -> None:
    buffer = episodes([400] * 20, [True] * 20)
    starts, _ = window_starts(buffer, length, stride)
    ends = buffer.take(starts + length - 1)["terminated"]
    moves = len(starts) * (length - 1)  # transitions that generated windows of this kind give
    assert float(ends.sum()) / (moves + float(ends.sum())) == pytest.approx(1 / 400, rel=0.17)


def test_encoding_and_back() -> None:
    buffer = episodes([40, 40], [False, False])
    codec = TrajectoryCodec(OBS, ACTION, 8)
    starts, _ = window_starts(buffer, 8, 3)
    codec.fit(buffer, starts)
    everything = buffer.take(starts[:, None] + torch.arange(8))
    x = codec.encode(everything)
    assert x.shape == (len(starts), 8, OBS + ACTION + 2)
    varies = [0, 1, 3, 4, 5]
    torch.testing.assert_close(x.mean((0, 1)), torch.zeros(7), rtol=0.0, atol=1e-5)
    std = x.std((0, 1), correction=0)
    torch.testing.assert_close(std[varies], torch.ones(5), rtol=1e-4, atol=1e-4)
    assert std[[2, 6]].tolist() == [0.0, 0.0]  # a constant observation, no termination
    rows = codec.decode(x)
    for key in ("obs", "action", "reward"):
        torch.testing.assert_close(rows[key], everything[key], rtol=1e-3, atol=1.1e-3)
    assert not rows["terminated"].any()


def test_actions_stay_inside_and_edges_survive() -> None:
    codec = TrajectoryCodec(OBS, ACTION, 2)
    edge = {
        "obs": torch.zeros(1, 2, OBS),
        "action": torch.tensor([[[1.0, -1.0], [0.0, 1.0]]]),
        "reward": torch.zeros(1, 2),
        "terminated": torch.tensor([[False, True]]),
    }
    rows = codec.decode(codec.encode(edge))
    assert (rows["action"] - edge["action"]).abs().max() < 0.0011
    assert rows["terminated"].tolist() == [[False, True]]
    extreme = codec.decode(torch.full((1, 2, codec.width), 1e4))
    assert (extreme["action"].abs() < 1).all()


@pytest.mark.parametrize("gap", [None, 4.0])
def test_a_termination_lies_as_far_from_none_as_is_asked(gap: float | None) -> None:
    buffer = episodes([400] * 5, [True] * 5)
    codec = TrajectoryCodec(OBS, ACTION, 2, gap)
    starts, _ = window_starts(buffer, 2, 1)
    codec.fit(buffer, starts)
    windows = buffer.take(starts[:, None] + torch.arange(2))
    x = codec.encode(windows)
    apart = x[..., -1].max() - x[..., -1].min()
    if gap is None:
        assert apart > 15  # standard deviations: one row in four hundred
    else:
        assert apart == gap and x[..., -1].min() == 0
    assert torch.equal(codec.decode(x)["terminated"], windows["terminated"])


def test_windows_become_transitions() -> None:
    codec, x = TrajectoryCodec(OBS, ACTION, 4), torch.randn(3, 4, OBS + ACTION + 2)
    x[..., -1] = 0.0
    x[1, -1, -1] = 1.0  # the second window ends with a termination
    rows = codec.transitions(x)
    assert all(len(value) == 3 * 3 for value in rows.values())
    obs = codec.observations(x)
    assert torch.equal(rows["next_obs"].view(3, 3, OBS), obs[:, 1:])
    assert torch.equal(rows["obs"].view(3, 3, OBS), obs[:, :-1])
    assert not rows["terminated"].any()
    last = codec.last(x)
    assert last["terminated"].tolist() == [False, True, False]
    assert torch.equal(last["obs"], obs[:, -1])


# ---- the agent ---------------------------------------------------------------------------------


def task(updates: int = 20) -> Task:
    return Task(
        "toy",
        dataset="toy",
        updates=updates,
        observation_space=BOX,
        action_space=ACTIONS,
        data=SimpleNamespace(),  # type: ignore[arg-type]
    )


def made(buffer: Buffer | None = None, **changes: Any) -> Any:
    """A tiny agent that has begun its task."""
    kind = agents.get("pgd")
    base: dict[str, Any] = {"hidden": (8,)}
    fields = {"network": "mlp", "width": 16, "depth": 1, "window": 8, "windows": 12, "stride": 2}
    fields |= {"synthesis_updates": 3, "sampler_steps": 4, "denoiser_batch": 8}
    settings = kind.Config(base_config=base, **{**fields, **changes})
    with seeding.forked(0):
        agent = kind(BOX, ACTIONS, settings)
    if buffer is not None:
        agent.begin_task(task(), buffer)
    return agent


def stage(agent: Any, name: str) -> None:
    agent.enter(name)


def test_a_million_updates_generate_a_hundred_times() -> None:
    agent = made(refresh_updates=10_000, denoiser_updates=5)
    stages = agent.stages(task(1_000_000))
    assert [s.name for s in stages[:4]] == ["denoiser", "unguided", "offline", "guided"]
    assert sum(s.name == "guided" for s in stages) == 99
    assert sum(s.name == "unguided" for s in stages) == 1
    assert sum(s.updates for s in stages if s.counted) == 1_000_000
    assert {s.updates for s in stages if s.counted} == {10_000}
    unguided = made(coefficient=0.0).stages(task(50_000))
    assert {s.name for s in unguided} == {"denoiser", "unguided", "offline"}
    part = made(refresh_fraction=0.34, synthesis_updates=3).stages(task(30_000))
    assert [s.updates for s in part if s.name in ("unguided", "guided")] == [3, 1, 1]
    part = made(refresh_fraction=0.34, synthesis_updates=3, coefficient=0.0).stages(task(30_000))
    assert [s.updates for s in part if s.name == "unguided"] == [3, 1, 1]
    with pytest.raises(UserError, match="no --env-steps"):
        agent.stages(dataclasses.replace(task(), env_steps=5, env="Hopper-v5"))


def test_batches_have_sixteen_real_rows() -> None:
    buffer = episodes([40, 40], [True, False])
    agent = made(buffer)
    stage(agent, "unguided")
    report: dict[str, Tensor] = {}
    for _ in range(3):
        report = agent.update(agent.sample(buffer))
    assert set(report) >= {"log_likelihood", "terminated", "saturated", "coefficient"}
    assert len(agent.synthetic.rings[0]) == 12 * 7
    stage(agent, "offline")
    batch = agent.sample(buffer)
    assert len(batch["obs"]) == 256
    real = batch["obs"][-16:, 0]
    assert (real == real.round()).all()  # rows of the data are numbered
    assert not (batch["obs"][:-16, 0] == batch["obs"][:-16, 0].round()).any()


@pytest.mark.parametrize("coefficient", [0.0, 4.0])
def test_a_part_is_refreshed_and_the_rest_stays(coefficient: float) -> None:
    buffer = episodes([40, 40], [False, False])
    agent = made(buffer, refresh_fraction=0.34, coefficient=coefficient)
    stage(agent, "unguided")
    for _ in range(3):
        agent.sample(buffer)
    before = agent.synthetic.rings[0].arrays()["obs"].clone()
    stage(agent, "guided" if coefficient else "unguided")
    agent.sample(buffer)
    after = agent.synthetic.rings[0].arrays()["obs"]
    changed = int((before != after).any(1).sum())
    assert 4 * 7 <= changed <= 4 * 7 + 4  # windows that terminate have one row more


def test_every_task_s_denoiser_learns_at_the_full_rate() -> None:
    buffer = episodes([40, 40], [False, False])
    agent = made(buffer, denoiser_updates=4)
    rates = []
    for begins in (False, True):
        if begins:
            agent.begin_task(task(), buffer)
        stage(agent, "denoiser")
        for _ in range(4):
            agent.schedule()
            rates.append(float(agent.optimizers["behaviour"].param_groups[0]["lr"]))
            agent.update(agent.sample(buffer))
            agent.advance()
        stage(agent, "unguided")
        agent.update(agent.sample(buffer))
        agent.advance()
    assert rates[:4] == rates[4:] and rates[0] == pytest.approx(1e-3)
    other = made(denoiser_updates=4)
    other.load_state(agent.state())
    assert other.schedule_starts == {"behaviour": 5}


def test_generation_leaves_the_training_s_noise_and_data_alone() -> None:
    buffer = episodes([40, 40], [False, False])
    agent = made(buffer, spread=0.3)
    untouched = copy.deepcopy(buffer.state())
    noise = torch.default_generator.get_state()
    weights = {k: v.clone() for k, v in agent.base.state_dict().items()}
    for name in (*["unguided"] * 3, "guided"):  # tuned at the first block of a regeneration
        stage(agent, name)
        agent.sample(buffer)
    assert torch.equal(noise, torch.default_generator.get_state())
    assert untouched["generators"]["0"].equal(buffer.state()["generators"]["0"])
    assert all(torch.equal(v, weights[k]) for k, v in agent.base.state_dict().items())
    assert float(agent.coefficient) != agent.config.coefficient  # tuned


@pytest.mark.parametrize("base", ["td3_bc", "iql", "bc", "sac", "awac"])
def test_guidance_raises_the_likelihood_of_any_base(base: str) -> None:
    """With the base's own normalisation of observations, and whatever its policy is."""
    buffer = episodes([40, 40], [False, False])
    agent = made(buffer, base=base, sampler_steps=16, windows=30, synthesis_updates=1)
    agent.base.normalizer.fit(torch.full((OBS,), 5.0), torch.full((OBS,), 3.0))
    found = []
    for name in ("unguided", "guided"):
        stage(agent, name)
        agent.synthetic.blocks = 0  # the same noise
        rows = agent.sample(buffer)
        found.append(float(rows["log_likelihood"].mean()))
    assert found[1] > found[0] + 0.05
    seen: list[Tensor] = []
    agent.base.actor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    agent.base.distribution(torch.full((1, OBS), 8.0)) if base != "sac" else None
    if base in ("iql", "sac", "awac"):  # their own width, not the unit variance of the others
        assert agent.base.distribution(torch.zeros(1, OBS)).std is not None
    assert base == "sac" or torch.allclose(seen[0], torch.full((1, OBS), 3 / 3.001), atol=1e-5)


def test_a_denoiser_of_another_window_is_refused() -> None:
    agent, other = made(window=8, denoiser="there"), made(window=4)
    with pytest.raises(UserError, match="windows of 4 rows: give --agent.window 4 instead of 8"):
        agent.reuse("denoiser", other)
    same = made(window=8)
    same.codec.mean.fill_(3.0)
    agent.reuse("denoiser", same)
    assert torch.equal(agent.codec.mean, same.codec.mean)
    assert [s.name for s in agent.stages(task())] == ["unguided", "offline"]
    kept = agent.codec.mean.clone()
    agent.begin_task(task(), episodes([40, 40], [True, True]))
    assert torch.equal(agent.codec.mean, kept)  # its own statistics, not the data's


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("window", (1, 0, 9)), ("stride", (0,)), ("windows", (0,)), ("synthesis_updates", (0,)),
        ("coefficient", (-1.0, math.nan)), ("spread", (-0.1,)),
        ("refresh_fraction", (0.0, 1.5, math.nan)), ("real_fraction", (-0.1, 1.1, math.nan)),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(field: str, values: tuple[Any, ...]) -> None:
    told = f"PGD: {field} must " if field in agents.get("pgd").limits else f"agent.{field} .*give "
    for value in values:
        with pytest.raises(UserError, match=told):
            made(**{field: value})
    made(real_fraction=0.0, refresh_fraction=1.0, stride=1, windows=1, synthesis_updates=1)
    made(real_fraction=1.0, window=2)


def test_long_windows_are_refused_before_a_network_is_built() -> None:
    with pytest.raises(UserError, match="windows of up to 8 rows; give --agent.network unet"):
        made(window=2000)  # layers of 14,000 x 14,000
    with pytest.raises(UserError, match="at least 4 rows for network unet"):
        made(network="unet", width=8, window=3)
    with pytest.raises(UserError, match="longest usable window has 39"):
        made(episodes([40, 40], [False, False]), network="unet", width=8, window=2000)
    agent = made(network="unet", width=8, window=4)
    assert agent.run(agent.generate, 2, False).shape == (2, 4, OBS + ACTION + 2)


@pytest.mark.parametrize("name", ["synther", "mopo"])
def test_other_generators_check_their_mixture_too(name: str) -> None:
    with pytest.raises(UserError, match=": real_fraction must lie between 0 and 1, not 1.5"):
        agents.get(name)(BOX, ACTIONS, agents.get(name).Config(real_fraction=1.5))


def test_the_strength_is_tuned_once_per_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = episodes([40, 40], [False, False])
    agent = made(buffer, spread=0.3, refresh_fraction=0.67)
    tuned_at: list[int] = []
    monkeypatch.setattr(agent, "tune", lambda: tuned_at.append(agent.synthetic.blocks))
    again = 0
    for leg in agent.stages(task(30_000)):
        stage(agent, leg.name)
        again += leg.name == "guided"
        for _ in range(0 if leg.counted or leg.name == "denoiser" else leg.updates):
            agent.sample(buffer)
    assert again == 2 and agent.synthetic.blocks == 3 + 2 * 2
    assert tuned_at == [4, 6]  # counted from 1: the first block of each regeneration


def test_short_episodes_are_said(caplog: pytest.LogCaptureFixture) -> None:
    made(episodes([40, 5, 35], [True, True, True]))
    assert "6.2 % of the rows lie in episodes too short for a window of 8 rows" in caplog.text


def test_bad_bases_and_spaces_are_refused() -> None:
    with pytest.raises(UnsupportedSpace, match="continuous actions"):
        agents.get("pgd")(BOX, spaces.Discrete(3), agents.get("pgd").Config())
    with pytest.raises(UserError, match="next_action"):
        agents.get("pgd")(BOX, ACTIONS, agents.get("pgd").Config(base="rebrac"))


def test_presets_read_as_the_spec_s() -> None:
    read = functools.partial(config.make, overrides={"tasks.0.dataset": "hopper-medium-v2"})
    cpu, gpu, paper = (read(preset=f"pgd.{name}").agent for name in ("td3_bc", "gpu", "paper"))
    assert (paper.width, paper.sampler_steps, paper.churn, paper.windows) == (1024, 256, 80, 8192)
    assert Sampler(paper.sampler_steps, paper.solver, paper.churn).calls == 511
    assert not paper.repeat_endings and gpu.repeat_endings
    assert (gpu.width, Sampler(gpu.sampler_steps, gpu.solver).calls) == (128, 63)
    assert Sampler(cpu.sampler_steps, cpu.solver).calls == 32


def test_loading_gives_the_same_samples(tmp_path: Path) -> None:
    from rl_shift import checkpoint

    agent = made(episodes([40, 40], [False, False]), network="unet", width=8)
    folder = checkpoint.save(tmp_path / "saved", {"agent": agent.state()}, "", {})
    loaded, _ = checkpoint.load(folder)
    other = made(network="unet", width=8)
    other.averaged.net.head.weight.data.fill_(1.0)
    other.load_state(loaded["agent"])
    made_twice = []
    for one in (agent, other):
        with seeding.forked(4):
            made_twice.append(one.run(one.generate, 3, True))
    assert torch.equal(*made_twice)
    assert torch.equal(agent.codec.std, other.codec.std)


def test_a_resumed_guided_generation_is_bitwise_the_one_that_did_not_stop() -> None:
    buffer = episodes([40, 40], [True, False])
    fields: dict[str, Any] = {"spread": 0.3, "refresh_fraction": 0.67}

    def goes_on(agent: Any, legs: list[tuple[str, int]]) -> None:
        with seeding.forked(7):
            for name, updates in legs:
                stage(agent, name)
                for _ in range(updates):
                    agent.update(agent.sample(buffer))
                    agent.advance()

    agent = made(buffer, **fields)
    goes_on(agent, [("denoiser", 3), ("unguided", 3), ("offline", 4), ("guided", 1)])
    saved, real = copy.deepcopy(agent.state()), copy.deepcopy(buffer.state())
    rest = [("guided", 1), ("offline", 3), ("guided", 2), ("denoiser", 1)]
    goes_on(agent, rest)
    other = made(**fields)
    other.load_state(saved)
    buffer.load_state(real)
    goes_on(other, rest)
    first, second = agent.state(), other.state()
    assert all(torch.equal(v, second["module"][k]) for k, v in first["module"].items())
    rows = [state["agents"][""]["extra"] for state in (first, second)]
    assert rows[0]["blocks"] == rows[1]["blocks"] == 7
    assert torch.equal(*(row["rings"]["0"]["rows"]["packed"] for row in rows))


def test_stacked_seeds_keep_what_their_own_policies_are_given() -> None:
    """Each seed's ring holds its own rows and terminations, and travels with the checkpoint."""
    buffer = episodes([40, 40], [True, False], seeds=(0, 1))
    agent: Any = agents.get("pgd").stacked([made(spread=0.3) for _ in range(2)])
    agent.begin_task(task(), buffer)
    assert [ring.seeds for ring in agent.synthetic.rings] == [(0,), (1,)]
    report: dict[str, Tensor] = {}
    for name in (*["unguided"] * 3, "guided"):
        stage(agent, name)
        report = agent.update(agent.sample(buffer))
    assert all(value.shape == (2,) for value in report.values())
    first, second = (ring.arrays()["obs"] for ring in agent.synthetic.rings)
    assert not torch.isin(first, second).any()
    stage(agent, "offline")
    batch = agent.sample(buffer)
    assert batch["obs"].shape == (2, 256, OBS)
    for k, ring in enumerate(agent.synthetic.rings):
        assert torch.isin(batch["obs"][k, :240], ring.arrays()["obs"]).all()
        assert (batch["obs"][k, 240:, 0] == batch["obs"][k, 240:, 0].round()).all()  # real
    other: Any = agents.get("pgd").stacked([made(spread=0.3) for _ in range(2)])
    other.load_state(copy.deepcopy(agent.state()))
    for mine, theirs in zip(agent.synthetic.rings, other.synthetic.rings, strict=True):
        assert torch.equal(mine.arrays()["obs"], theirs.arrays()["obs"])
    again: list[Tensor] = []
    for each in (agent, other):
        stage(each, "guided")
        again.append(each.sample(buffer)["obs"])
    assert torch.equal(*again) and again[0].shape[0] == 2


def test_terminating_last_rows_go_to_the_ring_of_their_seed() -> None:
    agent: Any = agents.get("pgd").stacked([made() for _ in range(2)])
    agent.begin_task(task(), episodes([40, 40], [True, False], seeds=(0, 1)))
    rows = {
        "obs": torch.zeros(2, 3, OBS),
        "action": torch.zeros(2, 3, ACTION),
        "reward": torch.zeros(2, 3),
        "terminated": torch.zeros(2, 3, dtype=torch.bool),
    }
    rows["next_obs"] = rows["obs"]
    last = {key: value[:, :2].clone() for key, value in rows.items()}
    last["obs"][1] += 7.0
    last["terminated"][1, 1] = True
    agent.synthetic.extend(rows, last)
    first, second = (ring.arrays() for ring in agent.synthetic.rings)
    assert len(first["obs"]) == 3 and len(second["obs"]) == 4
    assert second["terminated"].tolist() == [False, False, False, True]
    assert (second["obs"][3] == 7.0).all()
