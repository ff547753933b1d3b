"""ReBRAC, AWAC, CQL, SAC-N and EDAC against numbers worked out in NumPy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from rl_shift import agents, networks
from rl_shift.buffer import Buffer
from rl_shift.compile import Updater
from rl_shift.config import Task
from rl_shift.errors import UserError

OBS, ACTION = Box(-np.inf, np.inf, (2,), np.float32), Box(-1.0, 1.0, (2,), np.float32)
ROWS = 5


def agent_of(name: str, **changes: Any) -> Any:
    kind = agents.get(name)
    torch.manual_seed(3)
    return kind(OBS, ACTION, kind.Config(hidden=(4,), **changes))


def batch_of() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "obs": torch.randn(ROWS, 2, generator=g),
        "action": torch.rand(ROWS, 2, generator=g) * 2 - 1,
        "reward": torch.randn(ROWS, generator=g),
        "next_obs": torch.randn(ROWS, 2, generator=g),
        "next_action": torch.rand(ROWS, 2, generator=g) * 2 - 1,
        "terminated": torch.tensor([False, True, False, False, True]),
    }


def arrays_of(batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in batch.items()}


def q_of(critic: Any, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    """(count, B): one member after the other, with a layer of four and LayerNorm where it is."""
    x = np.concatenate([obs, action], -1)
    (first, last), norm = critic.net.layers, critic.net.norms[0]
    values = []
    for k in range(len(first.weight)):
        h = np.maximum(x @ first.weight[k].detach().numpy() + first.bias[k].detach().numpy(), 0)
        if isinstance(norm, networks.EnsembleNorm):
            h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
            h = h * norm.weight[k].detach().numpy() + norm.bias[k].detach().numpy()
        values.append((h @ last.weight[k].detach().numpy() + last.bias[k].detach().numpy())[..., 0])
    return np.stack(values)


def same(loss: tuple[Tensor, Any], expected: Any) -> None:
    np.testing.assert_allclose(loss[0].item(), expected, rtol=2e-5)


# ---- the ensemble ------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_norm", [False, True])
def test_members_of_an_ensemble_are_independent_networks(layer_norm: bool) -> None:
    torch.manual_seed(0)
    critic = networks.EnsembleCritic(2, 2, (4,), 3, layer_norm)
    if layer_norm:
        for p in critic.net.norms[0].parameters():
            torch.nn.init.normal_(p)
    batch = batch_of()
    q = critic(batch["obs"], batch["action"])
    expected = q_of(critic, batch["obs"].numpy(), batch["action"].numpy())
    np.testing.assert_allclose(q.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    actions = torch.rand(ROWS, 4, 2) * 2 - 1
    several = critic.several(batch["obs"], actions)
    for k in range(4):
        torch.testing.assert_close(several[..., k], critic(batch["obs"], actions[:, k]))
    # each member begins as a layer of PyTorch does: within 1 / sqrt(inputs)
    bound = critic.net.layers[0].weight.abs().amax((1, 2))
    assert (bound <= 0.5).all() and (bound > 0.3).all()
    (gradient,) = torch.autograd.grad(q[1].sum(), critic.net.layers[0].weight)
    assert (gradient[1] != 0).any() and (gradient[[0, 2]] == 0).all()


def test_initialisations() -> None:
    torch.manual_seed(0)
    net = networks.EnsembleMLP(2, 6, (8, 8), 1)
    networks.initialise(net, hidden_bias=0.1, last=3e-3)
    assert (net.layers[0].bias == 0.1).all() and (net.layers[1].bias == 0.1).all()
    assert 0 < net.layers[2].weight.abs().max() <= 3e-3
    networks.initialise_orthogonal(net, last_gain=0.01)
    for weight in net.layers[1].weight.detach():
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(8), atol=1e-5, rtol=0)
    norms = net.layers[2].weight.detach().norm(dim=1).squeeze()
    torch.testing.assert_close(norms, torch.full((2,), 0.01))
    assert all((layer.bias == 0).all() for layer in net.layers)


# ---- ReBRAC ------------------------------------------------------------------------------------


def test_rebrac_losses() -> None:
    agent = agent_of("rebrac", policy_noise=0.0, actor_bc_coef=0.7, critic_bc_coef=0.3)
    batch = batch_of()
    torch.nn.init.normal_(agent.target_actor.net.layers[-1].weight)
    torch.nn.init.normal_(agent.actor.net.layers[-1].weight)
    x = arrays_of(batch)
    next_action = agent.target_actor(batch["next_obs"]).detach().numpy()
    penalty = ((next_action - x["next_action"]) ** 2).sum(1)  # a sum over dimensions
    worst = q_of(agent.target_critic, x["next_obs"], next_action).min(0)
    target = x["reward"] + 0.99 * (1.0 - x["terminated"]) * (worst - 0.3 * penalty)
    errors = q_of(agent.critic, x["obs"], x["action"]) - target
    same(agent.critic_loss(batch), (errors**2).mean(1).sum())

    action = agent.actor(batch["obs"]).detach().numpy()
    q = q_of(agent.critic, x["obs"], action).min(0)  # the smaller critic, not the first
    cloning = ((action - x["action"]) ** 2).sum(1).mean()
    same(agent.actor_loss(batch), 0.7 * cloning - q.mean() / np.abs(q).mean())


def test_rebrac_normalises_the_critics_only_and_moves_actor_and_targets_late() -> None:
    agent = agent_of("rebrac")
    kinds = {type(m) for m in agent.critic.modules()}
    assert networks.EnsembleNorm in kinds
    assert not any("norm" in name for name, _ in agent.actor.named_parameters())
    updater = Updater(agent)
    for k in range(1, 5):
        before = {n: p.clone() for n, p in agent.named_parameters()}
        updater(batch_of())
        moved = {n.partition(".")[0] for n, p in agent.named_parameters() if (p != before[n]).any()}
        late = {"actor", "target_actor", "target_critic"}
        assert moved == ({"critic"} | late if k % 2 == 0 else {"critic"})


# ---- AWAC --------------------------------------------------------------------------------------


def test_awac_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, batch = agent_of("awac", temperature=0.5), batch_of()
    agent.actor.log_std.data[:] = torch.tensor([0.3, -0.4])
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.full_like(like, 3.0))
    x, std = arrays_of(batch), np.exp([0.3, -0.4])

    def mean(key: str) -> np.ndarray:
        return agent.actor.net(batch[key]).detach().numpy()  # no tanh

    next_action = np.clip(mean("next_obs") + 3.0 * std, -1, 1)  # clamped where it is scored
    worst = q_of(agent.target_critic, x["next_obs"], next_action).min(0)
    target = x["reward"] + 0.99 * (1.0 - x["terminated"]) * worst
    same(agent.critic_loss(batch), ((q_of(agent.critic, x["obs"], x["action"]) - target) ** 2)
         .mean(1).sum())  # fmt: skip
    value = q_of(agent.critic, x["obs"], np.clip(mean("obs") + 3.0 * std, -1, 1)).min(0)
    advantage = q_of(agent.critic, x["obs"], x["action"]).min(0) - value
    z = (x["action"] - mean("obs")) / std
    log_prob = (-0.5 * z**2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(1)
    expected = -(np.minimum(np.exp(advantage / 0.5), 100.0) * log_prob).mean()
    same(agent.actor_loss(batch), expected)


def test_awac_weights_carry_no_gradient_and_its_action_is_the_clipped_mean() -> None:
    agent, batch = agent_of("awac", temperature=1e-6), batch_of()
    torch.manual_seed(0)
    value = agent.critic(batch["obs"], agent.actor.sample(batch["obs"])).amin(0)
    better = agent.critic(batch["obs"], batch["action"]).amin(0) > value
    assert better.any() and not better.all()
    weights = torch.where(better, 100.0, 0.0)
    expected = -(weights * agent.actor.log_prob(batch["obs"], batch["action"])).mean()
    torch.manual_seed(0)
    loss = agent.actor_loss(batch)[0]
    torch.testing.assert_close(loss, expected)
    own = list(agent.actor.parameters())
    for got, want in zip(
        torch.autograd.grad(loss, own), torch.autograd.grad(expected, own), strict=True
    ):
        torch.testing.assert_close(got, want)
    agent.actor.net.layers[-1].bias.data[:] = 7.0
    assert (agent.act(batch["obs"], False) == 1.0).all()
    assert (agent.actor(batch["obs"]) > 1.0).all()


# ---- CQL ---------------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that NumPy can repeat: cosines, and a third for uniform draws."""

    def wave(like: Tensor) -> Tensor:
        return torch.arange(math.prod(like.shape), dtype=like.dtype).cos().reshape(like.shape)

    monkeypatch.setattr(torch, "randn_like", wave)
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, 1 / 3))


def drawn(agent: Any, obs: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` actions of the actor and their log-densities, from the textbook's formula."""
    raw = agent.actor.net(obs).detach().numpy()
    mean, log_std = raw[:, None, :2], np.clip(agent_scale(agent, raw[:, None, 2:]), -20, 2)
    noise = np.cos(np.arange(len(obs) * count * 2, dtype=np.float32)).reshape(len(obs), count, 2)
    u = mean + np.exp(log_std) * noise
    log_prob = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - np.log(1 - np.tanh(u) ** 2)
    return np.tanh(u), log_prob.sum(-1)


def agent_scale(agent: Any, raw: np.ndarray) -> np.ndarray:
    if agent.actor.scale is None:
        return raw
    return agent.actor.scale().item() * raw + agent.actor.offset().item()


def several(critic: Any, obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
    return q_of(critic, np.repeat(obs[:, None], actions.shape[1], 1), actions)


def worked_out(agent: Any, batch: dict[str, Tensor], k: int, backup: int) -> tuple[Any, Any]:
    """Target (B,) and unclamped conservative differences (2, B) of CQL."""
    x = arrays_of(batch)
    here, here_log = drawn(agent, batch["obs"], k)
    there, there_log = drawn(agent, batch["next_obs"], k + backup)
    next_q = several(agent.target_critic, x["next_obs"], there[:, k:]).min(0).max(1)
    target = x["reward"] + 0.99 * (1.0 - x["terminated"]) * next_q
    uniform = np.full((ROWS, k, 2), 2 / 3 - 1, np.float32)
    obs = x["obs"]
    weighted = np.concatenate(
        [
            several(agent.critic, obs, uniform) - np.log(0.5**2),
            several(agent.critic, obs, there[:, :k]) - there_log[:, :k],  # at the present state
            several(agent.critic, obs, here) - here_log,
        ],
        -1,
    )
    data = q_of(agent.critic, obs, x["action"])
    return target, np.log(np.exp(weighted).sum(-1)) - data


@pytest.mark.parametrize(("max_backup", "clamped"), [(False, False), (True, True)])
def test_cql_critic_loss(max_backup: bool, clamped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    low = 2.85 if clamped else -math.inf
    agent = agent_of("cql", actions=3, max_backup=max_backup, difference_min=low, cql_alpha=7.0)
    agent.critic.net.layers[-1].weight.data.mul_(100)
    batch = batch_of()
    scripted(monkeypatch)
    target, difference = worked_out(agent, batch, 3, 3 if max_backup else 1)
    assert not clamped or ((difference < low).any() and (difference > low).any())
    errors = q_of(agent.critic, batch["obs"].numpy(), batch["action"].numpy()) - target
    expected = (errors**2).mean(1).sum() + 7.0 * np.maximum(difference, low).mean(1).sum()
    same(agent.critic_loss(batch), expected)


def test_cql_with_a_learnt_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, batch = agent_of("cql", actions=2, lagrange=True, gap=0.5, cql_alpha=3.0), batch_of()
    scripted(monkeypatch)
    _, difference = worked_out(agent, batch, 2, 1)
    excess = 3.0 * (difference.mean(1) - 0.5)  # cql_alpha still multiplies
    weight = math.exp(1.0)
    d = torch.tensor(difference.mean(1), requires_grad=True)
    loss = agent.conservative(d)
    parameter = agent.log_weight.value
    by_weight, by_difference = torch.autograd.grad(loss, [parameter, d])
    # alpha' descends -0.5 sum(penalty), the critics alpha' cql_alpha sum(difference)
    np.testing.assert_allclose(by_weight.item(), -0.5 * weight * excess.sum(), rtol=1e-5)
    np.testing.assert_allclose(by_difference.numpy(), np.full(2, weight * 3.0), rtol=1e-5)
    Updater(agent)(batch)
    assert agent.log_weight().item() > 1.0  # the difference is above the gap


def test_cql_samples_and_log_density(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, batch = agent_of("cql"), batch_of()
    agent.actor.scale.value.data.fill_(0.8)
    scripted(monkeypatch)
    action, log_prob = agent.actor.samples(batch["obs"], 3)
    expected, expected_log = drawn(agent, batch["obs"], 3)
    np.testing.assert_allclose(action.detach().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(log_prob.detach().numpy(), expected_log, rtol=1e-4)
    # the density of an action that is given is that action's, not a fresh sample's
    for k in range(3):
        given = agent.actor.log_prob(batch["obs"], action[:, k])
        torch.testing.assert_close(given, log_prob[:, k], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(agent.actor.log_prob(batch["obs"], -action[:, 0]), log_prob[:, 0])


def test_the_logsumexp_estimates_the_integral_over_actions() -> None:
    """exp(mean importance-weighted term) is log of int exp Q over the box, whatever the actor."""
    torch.manual_seed(0)
    agent = agent_of("cql")
    agent.critic.net.layers[-1].weight.data.mul_(100)
    agent.actor.offset.value.data.fill_(0.3)  # wide enough to reach the box's corners
    obs = torch.zeros(1, 2)
    line = torch.linspace(-1, 1, 201)
    grid = torch.cartesian_prod(line, line)
    q = agent.critic(obs.expand(len(grid), 2), grid)[0]
    exact = (q.exp().mean() * 4).log()
    here, density = agent.actor.samples(obs, 200_000)
    weighted = (agent.critic.several(obs, here)[0] - density).logsumexp(-1) - math.log(200_000)
    assert abs(weighted.item() - exact.item()) < 0.05


def test_cql_steps_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    for lagrange in (False, True):
        agent = agent_of("cql", lagrange=lagrange)
        assert order_of(agent, monkeypatch) == [
            "log_alpha", "actor", ("critic", "log_weight") if lagrange else ("critic",)
        ]  # fmt: skip
    rates = {n: float(o.param_groups[0]["lr"]) for n, o in agent.optimizers.items()}
    assert rates["actor"] == rates["log_alpha"] == pytest.approx(3e-5)
    assert rates["critic"] == rates["log_weight"] == pytest.approx(3e-4)


def order_of(agent: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    order: list[Any] = []
    learn = agent.learn
    monkeypatch.setattr(agent, "learn", lambda names, *a: order.append(names) or learn(names, *a))
    Updater(agent)(batch_of())
    return order


# ---- SAC-N and EDAC ----------------------------------------------------------------------------


def test_sac_n_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, batch = agent_of("sac_n", critics=4), batch_of()
    agent.log_alpha.value.data.fill_(-0.5)
    scripted(monkeypatch)
    x, alpha = arrays_of(batch), math.exp(-0.5)
    next_action, log_prob = (y.detach().numpy() for y in agent.actor.sample(batch["next_obs"]))
    worst = q_of(agent.target_critic, x["next_obs"], next_action).min(0) - alpha * log_prob
    target = x["reward"] + 0.99 * (1.0 - x["terminated"]) * worst
    errors = q_of(agent.critic, x["obs"], x["action"]) - target
    same(agent.critic_loss(batch), (errors**2).mean(1).sum())  # the sum over critics
    action, log_prob = (y.detach().numpy() for y in agent.actor.sample(batch["obs"]))
    same(agent.actor_loss(batch), (alpha * log_prob - q_of(agent.critic, x["obs"], action).min(0))
         .mean())  # fmt: skip
    same(agent.alpha_loss(batch), 0.5 * (log_prob - 2.0).mean())
    assert order_of(agent, monkeypatch) == ["log_alpha", "actor", "critic"]


def test_diversity_of_critics_whose_gradients_are_known() -> None:
    """Linear critics: unit gradients w_i / |w_i|, the same for every row."""
    agent, batch = agent_of("sac_n", critics=3, eta=2.0), batch_of()
    directions = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]])

    class Linear(torch.nn.Module):
        def forward(self, obs: Tensor, action: Tensor) -> Tensor:
            return (action * directions[:, None]).sum(-1)

    agent.critic = Linear()
    unit = (directions / directions.norm(dim=1, keepdim=True)).numpy()
    pairs = sum(unit[i] @ unit[j] for i in range(3) for j in range(3) if i != j)
    np.testing.assert_allclose(agent.alignment(batch).item(), pairs / 2, rtol=1e-5)


def test_edac_adds_eta_times_the_alignment_and_differentiates_it() -> None:
    agent, batch = agent_of("sac_n", critics=3, eta=2.0), batch_of()
    torch.nn.init.normal_(agent.critic.net.layers[-1].weight)
    x = batch["action"].clone().requires_grad_(True)
    unit = []
    for k in range(3):
        (g,) = torch.autograd.grad(agent.critic(batch["obs"], x)[k].sum(), x)
        unit.append((g / (g.norm(dim=1, keepdim=True) + 1e-10)).detach())
    expected = sum((unit[i] * unit[j]).sum(1).mean() for i in range(3) for j in range(3) if i != j)
    torch.testing.assert_close(agent.alignment(batch), expected / 2)
    plain = agent_of("sac_n", critics=3)
    plain.load_state_dict(agent.state_dict())
    torch.manual_seed(0)
    with_term, metrics = agent.critic_loss(batch)
    torch.manual_seed(0)
    torch.testing.assert_close(
        with_term, plain.critic_loss(batch)[0] + 2.0 * metrics["critic/alignment"]
    )
    parameters = list(agent.critic.parameters())
    gradients = torch.autograd.grad(metrics["critic/alignment"], parameters, allow_unused=True)
    assert any(g is not None and (g != 0).any() for g in gradients)


def test_ranges_of_log_std() -> None:
    """[-5, 2] in SAC-N, [-20, 2] in CQL and AWAC."""
    for name, low in (("sac_n", -5.0), ("cql", -20.0)):
        agent = agent_of(name)
        for bias, bound in ((-1e3, low), (1e3, 2.0)):
            agent.actor.net.layers[-1].bias.data[2:] = bias
            assert (agent.actor.gaussian(torch.zeros(1, 2))[1] == bound).all()
    assert agent_of("awac").actor.log_std_range == (-20.0, 2.0)


def test_sac_n_adds_to_the_slope_inside_the_logarithm() -> None:
    agent = agent_of("sac_n")
    agent.actor.net.layers[-1].bias.data[:] = torch.tensor([50.0, 50.0, -5.0, -5.0])
    _, log_prob = agent.actor.sample(torch.zeros(1, 2))
    noise = -0.5 * math.log(2 * math.pi) + 5.0 - math.log(1e-6)
    assert log_prob.item() < 2 * noise + 1e-3  # bounded, where the exact density grows with u


def test_what_only_datasets_have_is_refused_online() -> None:
    buffer = Buffer.from_arrays(batch_of() | {"task": torch.zeros(ROWS, dtype=torch.int64)})
    with pytest.raises(UserError, match="ReBRAC needs next_action.*leave out --env-steps"):
        agent_of("rebrac").begin_task(Task(name="t", env="E-v0", env_steps=5), buffer)
    agent_of("cql").begin_task(Task(name="t", env="E-v0", env_steps=5), buffer)
