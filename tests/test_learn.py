"""The kernel: gradients of named submodules, Adam, clipping, schedules, containment, structure.

`compile=on` is run without the compiler here, which leaves the functional engine as it stands;
`test_compile.py` compiles.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.func import grad, vmap

from rl_shift import agents, seeding
from rl_shift.agent import Agent, Batch, Metrics, Wrapper
from rl_shift.buffer import Buffer
from rl_shift.compile import Updater
from rl_shift.config import Task
from rl_shift.networks import MLP, Critic, Scalar

OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACT = spaces.Box(-1.0, 1.0, (2,), np.float32)
MODES = ("off", "on")
RUNS = [(mode, seeds) for mode in MODES for seeds in (1, 2)]
each_mode_and_seeds = pytest.mark.parametrize(("mode", "seeds"), RUNS)


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)


@dataclasses.dataclass(frozen=True)
class Empty:
    """A configuration without fields."""


class Toy(Agent):
    """Two networks and a number; subclasses say what is learnt."""

    Config = Empty

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args)
        self.actor, self.critic = MLP(3, (4,), 2), MLP(3, (4,), 1)
        self.scale = Scalar(0.5)
        self.optimizer("actor", "critic", "scale", **({"lr": 1e-2} | options))

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        loss = (self.actor(batch["obs"]) - batch["action"]).square().mean()
        loss = loss + 0.1 * self.critic(batch["obs"]).mean() * self.scale()
        return loss, {"actor/loss": loss}

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        q = self.scale() * self.critic(batch["obs"]).squeeze(-1)
        loss = (q - self.actor(batch["obs"]).sum(-1) - batch["reward"]).square().mean()
        return loss, {"critic/loss": loss, "critic/q": q}

    def update(self, batch: Batch) -> Metrics:
        metrics = self.learn(("critic", "scale"), self.critic_loss, batch)
        return metrics | self.learn("actor", self.actor_loss, batch)


def make(kind: Any = Toy, seeds: int = 1, config: Any = None, **options: Any) -> Any:
    """S stacked seeds, in float64 except learning rates and step counts."""
    made = []
    for seed in range(seeds):
        with seeding.forked(seed):
            made.append(kind(OBS, ACT, kind.Config() if config is None else config, **options))
    return double(kind.stacked(made))


def double(agent: Agent) -> Agent:
    for tensor in agent._all_tensors():
        tensor.data = tensor.data.double()
    return agent


def batches(count: int, seeds: int = 1, rows: int = 8) -> list[Batch]:
    """Batches in float64, (S, rows, ...) for several seeds; the first seed's are the same."""
    found = []
    for k in range(count):
        each = []
        for seed in range(seeds):
            rng = seeding.numpy_generator(seed, "batch", k)
            batch: Batch = {}
            for key, shape in (("obs", 3), ("next_obs", 3), ("action", 2)):
                batch[key] = torch.from_numpy(rng.normal(size=(rows, shape)))
            batch["action"] = batch["action"].tanh()
            batch["reward"] = torch.from_numpy(rng.normal(size=rows))
            batch["terminated"] = torch.from_numpy(rng.random(rows) < 0.2)
            each.append(batch)
        stacked = {key: torch.stack([b[key] for b in each]) for key in each[0]}
        found.append(each[0] if seeds == 1 else stacked)
    return found


def train(agent: Agent, data: Sequence[Batch], mode: Any = "off") -> list[Metrics]:
    updater = Updater(agent, mode)
    with seeding.forked(1):
        metrics = [updater(dict(batch)) for batch in data]
    assert updater.mode == mode
    agent.sync_steps()
    return metrics


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for key, x in first.items():
        torch.testing.assert_close(x, second[key], rtol=tolerance, atol=tolerance, msg=key)


def plain_training(
    agent: Toy,
    data: Sequence[Batch],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    clip: float | None = None,
) -> None:
    """The same updates written by hand, with torch's default optimisers."""
    parts = {n: list(agent.get_submodule(n).parameters()) for n in ("critic", "scale", "actor")}
    optimizers = {name: make_optimizer(p) for name, p in parts.items()}
    for batch in data:
        for names, loss in (
            (("critic", "scale"), agent.critic_loss),
            (("actor",), agent.actor_loss),
        ):
            for p in agent.parameters():
                p.requires_grad_(True)
                p.grad = None
            loss(batch)[0].backward()
            for name in names:
                if clip is not None:
                    nn.utils.clip_grad_norm_(parts[name], clip)
                optimizers[name].step()


# ---- gradients ---------------------------------------------------------------------------------


@each_mode_and_seeds
def test_a_joint_loss_moves_every_named_submodule(mode: str, seeds: int) -> None:
    agent = make(seeds=seeds)
    before = {k: v.clone() for k, v in agent.named_parameters()}
    train(agent, batches(1, seeds), mode)
    for key, value in agent.named_parameters():
        assert not torch.equal(value, before[key]), key


@each_mode_and_seeds
def test_metrics_are_detached_and_per_seed(mode: str, seeds: int) -> None:
    (metrics,) = train(make(seeds=seeds), batches(1, seeds), mode)
    lead = () if seeds == 1 else (seeds,)
    assert metrics["critic/loss"].shape == lead
    assert metrics["critic/q"].shape == (*lead, 8)
    for value in metrics.values():
        assert not value.requires_grad
        assert value.grad_fn is None


class Unused(Toy):
    """The actor's loss stops using the actor after the first update of every two."""

    delay = 2

    def no_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        return self.critic(batch["obs"]).mean(), {}

    def update(self, batch: Batch) -> Metrics:
        loss = self.actor_loss if self.updates % 2 == 0 else self.no_loss
        return self.learn("actor", loss, batch)


@each_mode_and_seeds
def test_an_unused_parameter_gets_a_zero_gradient(mode: str, seeds: int) -> None:
    """Which is not "no change": the momentum moves it on."""
    agent = make(Unused, seeds)
    train(agent, batches(1, seeds), mode)
    before = {k: v.clone() for k, v in agent.tensors().items()}
    Updater(agent, mode)(batches(1, seeds)[0])
    key = "actor.layers.0.weight"
    after = agent.tensors()
    torch.testing.assert_close(after[f"@m.{key}"], 0.9 * before[f"@m.{key}"])
    assert not torch.equal(after[key], before[key])
    assert torch.equal(after["critic.layers.0.weight"], before["critic.layers.0.weight"])


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("mode", MODES)
def test_fifty_updates_equal_plain_torch(mode: str, decay: float, clip: float | None) -> None:
    data = batches(50)
    agent = make(lr=1e-2, weight_decay=decay, clip=clip, betas=(0.8, 0.99))
    plain = copy.deepcopy(agent)
    kind = torch.optim.AdamW if decay else torch.optim.Adam
    settings = {"lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": decay}
    plain_training(plain, data, lambda p: kind(p, foreach=False, fused=False, **settings), clip)
    train(agent, data, mode)
    # 1e-7: the learning rate is a float32 number
    assert_close(dict(agent.named_parameters()), dict(plain.named_parameters()), 1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_clipping_uses_one_norm_per_seed(mode: str) -> None:
    """A parameter of one number is part of it."""
    (data,) = batches(1, 2)
    data["reward"][1] *= 100.0  # the second seed's gradient is far longer
    stacked = make(seeds=2, clip=0.05)
    separate = [make(config=None, clip=0.05) for _ in range(2)]
    for k, agent in enumerate(separate):
        agent.load_state_dict(stacked.select(k).state_dict())
        train(agent, [{key: value[k] for key, value in data.items()}], mode)
    train(stacked, [data], mode)
    for k, agent in enumerate(separate):
        assert_close(stacked.select(k).tensors(), agent.tensors(), 1e-12)
        norm = sum(float(m.square().sum()) for n, m in agent.tensors().items() if "@m.critic" in n)
        assert math.sqrt(norm) == pytest.approx(0.1 * 0.05, rel=1e-4)


class Transposed(Toy):
    """Its gradients arrive with swapped strides."""

    def turned(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        turned = {k: g.mT.contiguous().mT if g.dim() > 1 else g for k, g in gradients.items()}
        assert not turned["actor.layers.0.weight"].is_contiguous()
        return turned

    def update(self, batch: Batch) -> Metrics:
        return self.learn("actor", self.actor_loss, batch, transform=self.turned)


@each_mode_and_seeds
def test_a_transposed_gradient_is_the_same_gradient(mode: str, seeds: int) -> None:
    """torch's fused Adam for CPUs ignores the strides of a gradient."""
    agent, plain = make(Transposed, seeds), make(seeds=seeds)
    plain.update = lambda batch: plain.learn("actor", plain.actor_loss, batch)
    data = batches(5, seeds)
    train(agent, data, mode)
    for batch in data:
        plain.update(batch)
    keys = [k for k in agent.tensors() if "actor" in k and "step" not in k]
    assert_close(*({k: a.tensors()[k] for k in keys} for a in (agent, plain)), 1e-9)


class Masked(Toy):
    """A transform that reads a buffer of the agent and mixes all gradients of a seed."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("mask", (torch.rand(4, 3) > 0.5).float())

    def masked(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = sum(g.square().sum() for g in gradients.values()).sqrt()
        gradients = {k: g / norm for k, g in gradients.items()}
        key = "actor.layers.0.weight"
        return gradients | {key: gradients[key] * self.mask}  # pyright: ignore[reportOperatorIssue]

    def update(self, batch: Batch) -> Metrics:
        return self.learn("actor", self.actor_loss, batch, transform=self.masked)


@pytest.mark.parametrize("mode", MODES)
def test_a_transform_sees_one_seed(mode: str) -> None:
    stacked = make(Masked, 2)
    alone = [stacked.select(k) for k in range(2)]
    assert not torch.equal(alone[0].mask, alone[1].mask)
    data = batches(5, 2)
    train(stacked, data, mode)
    for k, agent in enumerate(alone):
        frozen = agent.mask == 0
        before = agent.actor.layers[0].weight.detach().clone()
        train(agent, [{key: value[k] for key, value in batch.items()} for batch in data])
        assert_close(stacked.select(k).tensors(), agent.tensors(), 1e-10)
        assert torch.equal(agent.actor.layers[0].weight[frozen], before[frozen])


# ---- data gradients (EDAC) ---------------------------------------------------------------------


class Diverse(Agent):
    """An ensemble whose members' gradients with respect to the action shall differ."""

    Config = Empty

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.critic = Critic(3, 2, (16,), count=3)
        self.optimizer("critic", lr=1e-2)

    def slopes(self, obs: Tensor, action: Tensor) -> Tensor:
        """Unit gradients of every member, (count, B, action)."""

        def value(action: Tensor, member: int) -> Tensor:
            return self.critic(obs, action)[member].sum()

        each = [grad(functools.partial(value, member=i))(action) for i in range(3)]
        return nn.functional.normalize(torch.stack(each), dim=-1)

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        g = self.slopes(batch["obs"], batch["action"])
        similar = torch.einsum("ibd,jbd->bij", g, g).sum((1, 2)) - 3
        q = self.critic(batch["obs"], batch["action"])
        loss = (q - batch["reward"]).square().mean() + similar.mean() / 2
        return loss, {"critic/similar": similar.mean()}

    def update(self, batch: Batch) -> Metrics:
        return self.learn("critic", self.critic_loss, batch)


@each_mode_and_seeds
def test_a_gradient_with_respect_to_data_inside_a_loss(mode: str, seeds: int) -> None:
    agent = make(Diverse, seeds)
    alone = [agent.select(k) for k in range(seeds)]
    data = batches(4, seeds)
    train(agent, data, mode)
    for k, one in enumerate(alone):
        optimizer = torch.optim.Adam(one.critic.parameters(), lr=1e-2, foreach=False)
        for batch in data:
            obs, action, reward = (
                batch[key] if seeds == 1 else batch[key][k] for key in ("obs", "action", "reward")
            )
            action = action.clone().requires_grad_(True)
            q = one.critic(obs, action)
            g = [torch.autograd.grad(q[i].sum(), action, create_graph=True)[0] for i in range(3)]
            g = [x / x.norm(dim=-1, keepdim=True) for x in g]
            similar = sum((g[i] * g[j]).sum(-1) for i in range(3) for j in range(3) if i != j)
            loss = (q - reward).square().mean() + similar.mean() / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # 1e-7: the learning rate is a float32 number
        chosen = dict(agent.select(k).critic.named_parameters())
        assert_close(chosen, dict(one.critic.named_parameters()), 1e-7)


# ---- a learnt number ---------------------------------------------------------------------------


class Temperature(Toy):
    """Learns the number first and uses it in the same update, as an agent with a dual may."""

    def scale_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        return self.scale() * batch["reward"].mean(), {}

    def update(self, batch: Batch) -> Metrics:
        self.learn("scale", self.scale_loss, batch)
        if self.live is not None:
            assert self.live[self.prefix + "scale.value"].dtype == batch["reward"].dtype
        return self.learn("actor", self.actor_loss, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seeds", [1, 2])
def test_a_learnt_number_keeps_its_type(seeds: int, dtype: torch.dtype) -> None:
    data = [{k: v.to(dtype) for k, v in batch.items()} for batch in batches(5, seeds)]
    trained = []
    for mode in MODES:
        agent = make(Temperature, seeds)
        for tensor in agent._all_tensors():
            tensor.data = tensor.data.to(dtype)
        train(agent, data, mode)
        trained.append(agent.tensors())
    assert trained[0]["scale.value"].dtype == dtype
    assert trained[0]["scale.value"].shape == (() if seeds == 1 else (2,))
    assert_close(*trained, 1e-9 if dtype == torch.float64 else 1e-6)


def test_sac_learns_its_temperature_in_both_engines() -> None:
    """Same noise, so the noisy agent compares too; towards the target entropy, from both sides."""
    kind = agents.get("sac")
    for target, sign in ((-50.0, -1.0), (50.0, 1.0)):
        settings = kind.Config(hidden=(4,), batch_size=8, target_entropy=target, learning_rate=1e-2)
        trained = []
        for mode in MODES:
            agent = make(kind, config=settings)
            train(agent, batches(5), mode)
            trained.append(agent)
        assert_close(trained[0].tensors(), trained[1].tensors(), 1e-9)
        assert trained[0].state_dict()["log_alpha.value"] * sign > 0.03


# ---- schedules and counters --------------------------------------------------------------------


def iql(**changes: Any) -> Any:
    kind = agents.get("iql")
    return make(kind, config=kind.Config(hidden=(4,), batch_size=8, **changes))


def rates(agent: Agent) -> dict[str, float]:
    return {k: float(o.param_groups[0]["lr"]) for k, o in agent.optimizers.items()}


@pytest.mark.parametrize("mode", MODES)
def test_the_cosine_ends_at_zero_and_leaves_the_others_alone(mode: Any) -> None:
    agent = iql(schedule_updates=6, learning_rate=1e-3)
    updater = Updater(agent, mode)
    for k, batch in enumerate(batches(6)):
        updater(batch)
        expected = 1e-3 * 0.5 * (1 + math.cos(math.pi * k / 6))
        assert rates(agent)["actor"] == pytest.approx(expected)
    before = {k: v.clone() for k, v in agent.named_parameters()}
    updater(batches(1)[0])
    assert rates(agent)["actor"] == 0.0
    for name in ("critic", "value"):
        assert rates(agent)[name] == pytest.approx(1e-3)
    for key, value in agent.named_parameters():
        if not key.startswith("target"):
            assert torch.equal(value, before[key]) == key.startswith("actor"), key


def test_a_schedule_without_length_takes_the_first_tasks_budget() -> None:
    agent, data = iql(), Buffer.from_arrays(batches(1)[0])
    for updates in (50, 70):
        agent.begin_task(task("toy", updates), data)
        assert agent.schedules == {"actor": 50}
    other = iql()
    other.load_state(agent.state())
    assert other.schedules == {"actor": 50}


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'linear': choose cosine or none"):
        make(schedule="linear")


class Failing(Toy):
    def update(self, batch: Batch) -> Metrics:
        if bool((batch["reward"] > 90).any()):
            raise RuntimeError("a sensor broke")
        return super().update(batch)


def test_a_failed_update_is_not_counted() -> None:
    agent = make(Failing)
    updater = Updater(agent)
    (batch,) = batches(1)
    updater(batch)
    with pytest.raises(RuntimeError, match="sensor"):
        updater(batch | {"reward": batch["reward"] + 100})
    updater(batch)
    assert agent.updates == 2


# ---- containment -------------------------------------------------------------------------------


class Curious(Wrapper):
    """A base agent and one more network, which reads the base's critic."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        base: str = "td3_bc"
        base_config: dict[str, Any] = dataclasses.field(
            default_factory=lambda: {"hidden": (4,), "policy_noise": 0.0}
        )

    delay = 3

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.predictor = MLP(3, (4,), 1)
        self.optimizer("predictor", lr=1e-3)

    def predictor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        q = self.base.critic.first(batch["obs"], self.base.act(batch["obs"], False))
        loss = (self.predictor(batch["obs"]).squeeze(-1) - q).square().mean()
        return loss, {"predictor/loss": loss}

    def update(self, batch: Batch) -> Metrics:
        metrics = self.learn("predictor", self.predictor_loss, batch)
        if self.updates % 3 != 2:
            metrics |= self.base.update(batch)
        return metrics


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_wrapper_with_a_network_of_its_own(seeds: int) -> None:
    trained = []
    for mode in MODES:
        agent = make(Curious, seeds)
        assert agent.delay == 6
        plain = copy.deepcopy(agent.base)
        data = batches(12, seeds)
        metrics = train(agent, data, mode)
        assert agent.updates == 12 and agent.base.updates == 8
        assert {"predictor/loss", "critic/loss", "actor/loss"} <= metrics[1].keys()
        train(plain, [batch for k, batch in enumerate(data) if k % 3 != 2], mode)
        inside = {k[5:]: v for k, v in agent.state_dict().items() if k.startswith("base.")}
        assert_close(inside, dict(plain.state_dict()), 0.0)
        trained.append(agent.tensors())
    assert "@m.predictor.layers.0.weight" in trained[0]
    assert "@m.base.critic.members.0.layers.0.weight" in trained[0]
    assert_close(*trained, 1e-10)


class Borrowing(Curious):
    """Learns its own network with a loss of its base, which reads nothing of it."""

    def update(self, batch: Batch) -> Metrics:
        return self.learn("predictor", self.base.critic_loss, batch)


@each_mode_and_seeds
def test_methods_of_a_contained_agent(mode: str, seeds: int) -> None:
    """As losses and in `run`: whatever method it is, not one of the same name."""
    agent = make(Borrowing, seeds)
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    (metrics,) = train(agent, batches(1, seeds), mode)
    assert "critic/loss" in metrics
    assert_close(dict(agent.state_dict()), before, 0.0)  # zero gradients

    class Opposite(Curious):
        def act(self, obs: Tensor, explore: bool) -> Tensor:
            return -self.base.act(obs, explore)

    agent = make(Opposite, seeds)
    obs = batches(1, seeds)[0]["obs"]
    action = agent.run(agent.act, obs, False)
    assert torch.equal(action, -agent.run(agent.base.act, obs, False))
    assert action.shape == (*obs.shape[:-1], 2)


@pytest.mark.parametrize("seeds", [1, 2])
def test_run_maps_over_seeds_and_gives_no_gradients(seeds: int) -> None:
    agent = make(seeds=seeds)
    obs = batches(1, seeds)[0]["obs"]

    def shifted(batch: Batch, factor: float) -> Tensor:
        assert batch["obs"].shape == (8, 3)
        return factor * agent.actor(batch["obs"])

    found = agent.run(shifted, {"obs": obs}, 2.0)
    assert not found.requires_grad
    for k in range(seeds):
        one = agent.select(k)
        mine = found if seeds == 1 else found[k]
        torch.testing.assert_close(mine, 2 * one.actor(obs if seeds == 1 else obs[k]).detach())


class Asking(Toy):
    """Its actor's loss needs the critic as the first half of the update left it."""

    def update(self, batch: Batch) -> Metrics:
        metrics = self.learn(("critic", "scale"), self.critic_loss, batch)
        q = self.run(lambda b: self.critic(b["obs"]).squeeze(-1), batch)
        return metrics | {"asked/q": q}


@each_mode_and_seeds
def test_run_inside_an_update_sees_what_the_update_changed(mode: str, seeds: int) -> None:
    agent, data = make(Asking, seeds, lr=0.1), batches(1, seeds)
    asked = train(agent, data, mode)[0]["asked/q"]
    now = agent.run(lambda b: agent.critic(b["obs"]).squeeze(-1), data[0])
    torch.testing.assert_close(asked, now)


# ---- targets -----------------------------------------------------------------------------------


class Averaging(Toy):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.critic.register_buffer("count", torch.tensor(3))  # no parameter: stays as it is
        self.target_critic = copy.deepcopy(self.critic)

    def update(self, batch: Batch) -> Metrics:
        metrics = self.learn("critic", self.critic_loss, batch)
        self.polyak("critic", "target_critic", 0.25)
        return metrics


@each_mode_and_seeds
def test_polyak_averages_parameters(mode: str, seeds: int) -> None:
    agent = Averaging.stacked([Averaging(OBS, ACT, Empty()) for _ in range(seeds)])
    before = {k: v.clone() for k, v in agent.target_critic.named_parameters()}
    data = [{k: v.float() for k, v in batches(1, seeds)[0].items()}]
    train(agent, data, mode)
    for key, target in agent.target_critic.named_parameters():
        online = agent.critic.get_parameter(key)
        torch.testing.assert_close(target, 0.75 * before[key] + 0.25 * online)
        assert not torch.equal(target, before[key])
    assert (agent.target_critic.count == 3).all()


# ---- heads that come with tasks ----------------------------------------------------------------


class Heads(Agent):
    """A shared encoder and a head for each task; the second starts as a copy of the first."""

    Config = Empty

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.encoder = MLP(3, (4,), 4)
        self.optimizer("encoder", lr=1e-2)
        self.count = 0

    def head(self) -> nn.Module:
        return self.get_submodule(f"head_{self.count - 1}")

    def build(self, task: Task) -> None:
        name = f"head_{self.count}"
        copied = task.name == "copied"
        self.add_module(name, copy.deepcopy(self.head()) if copied else MLP(4, (4,), 2))
        self.optimizer(name, lr=1e-2)
        self.count += 1

    def variant(self) -> tuple[Any, ...]:
        return (self.stage, self.count)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        loss = (self.head()(self.encoder(batch["obs"])) - batch["action"]).square().mean()
        return loss, {"loss": loss}

    def update(self, batch: Batch) -> Metrics:
        return self.learn(("encoder", f"head_{self.count - 1}"), self.loss, batch)


def task(name: str, updates: int = 10) -> Task:
    return Task(name=name, dataset="toy", updates=updates, observation_space=OBS, action_space=ACT)


def heads(seeds: int) -> Heads:
    made = []
    for seed in range(seeds):
        with seeding.forked(seed):
            made.append(Heads(OBS, ACT, Empty()))
    return Heads.stacked(made)


@each_mode_and_seeds
def test_a_head_is_added_between_tasks(mode: Any, seeds: int) -> None:
    """The updater is older than the heads, as in the trainer; the run is resumed in task two."""
    data = [{k: v.float() for k, v in batch.items()} for batch in batches(6, seeds)]
    rows = Buffer.from_arrays({"obs": torch.zeros(2, 3)})
    agent = heads(seeds)
    updater = Updater(agent, mode)
    with seeding.forked(3):
        agent.begin_task(task("first"), rows)
    lead = () if seeds == 1 else (seeds,)
    weight = agent.head_0.layers[0].weight
    assert weight.shape == (*lead, 4, 4)
    if seeds == 2:
        assert not torch.equal(weight[0], weight[1])  # each seed draws its own
    start = weight.detach().clone()
    for batch in data[:2]:
        updater(batch)
    assert not torch.equal(weight, start)
    first = {k: v.clone() for k, v in agent.tensors().items() if "head_0" in k}
    agent.begin_task(task("second"), rows)
    for batch in data[2:4]:
        updater(batch)
    saved = copy.deepcopy(agent.state())
    for batch in data[4:]:
        updater(batch)
    for key, value in first.items():
        assert torch.equal(agent.tensors()[key], value), key
    assert not torch.equal(agent.head_1.layers[0].weight, start)
    assert agent.updates == 6

    resumed = heads(seeds)
    updater = Updater(resumed, mode)
    resumed.load_state(saved)
    assert [t.name for t in resumed.begun] == ["first", "second"]
    for batch in data[4:]:
        updater(batch)
    agent.sync_steps(), resumed.sync_steps()
    assert_close(agent.tensors(), resumed.tensors(), 0.0)


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_head_may_start_as_a_copy(seeds: int) -> None:
    agent = heads(seeds)
    rows = Buffer.from_arrays({"obs": torch.zeros(2, 3)})
    for name in ("first", "copied"):
        agent.begin_task(task(name), rows)
    for p, q in zip(agent.head_0.parameters(), agent.head_1.parameters(), strict=True):
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()
    (batch,) = batches(1, seeds)
    obs = batch["obs"].float()
    found = agent.run(lambda obs: agent.head()(agent.encoder(obs)), obs)
    assert found.shape == (*obs.shape[:-1], 2)


# ---- stacking ----------------------------------------------------------------------------------


def test_stacking_and_selecting_are_inverse() -> None:
    separate = [make() for _ in range(3)]
    for k, agent in enumerate(separate):
        train(agent, batches(k + 1)[-1:])
    stacked = Toy.stacked(separate)
    assert stacked.seeds == 3
    for k, agent in enumerate(separate):
        one = stacked.select(k)
        assert one.seeds == 1
        assert_close(one.tensors(), agent.tensors(), 0.0)
    train(stacked.select(0), batches(1))  # it is an agent like any other
    assert_close(stacked.select(2).tensors(), separate[2].tensors(), 0.0)


def test_step_counts_agree_after_compiled_updates() -> None:
    """A compiled unit advances one of them; `state` and `select` give the others its value."""
    agent = make()
    updater = Updater(agent, "on")
    for batch in batches(3):
        updater(batch)
    for found in (agent.select(0), agent):
        found.state()
        for optimizer in found.optimizers.values():
            assert {float(s["step"]) for s in optimizer.state.values()} == {3.0}


def test_noise_differs_between_seeds() -> None:
    agent = make(seeds=2)
    noise = agent.run(lambda obs: torch.randn_like(obs), torch.zeros(2, 4, 3))
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.gpu
def test_placing_moves_everything() -> None:
    agent = make()
    assert agent.place("cuda") is agent
    assert {t.device.type for t in agent.tensors().values()} == {"cuda"}
    agent = heads(1).place("cuda")
    agent.begin_task(task("first"), Buffer.from_arrays({"obs": torch.zeros(2, 3)}))
    assert {t.device.type for t in agent.tensors().values()} == {"cuda"}


def test_vmap_is_not_needed_for_adam() -> None:
    """One optimiser over stacked leaves is S optimisers: Adam is elementwise."""
    stacked = make(seeds=2)
    alone = [stacked.select(k) for k in range(2)]
    data = batches(3, 2)
    train(stacked, data)
    for k, agent in enumerate(alone):
        train(agent, [{key: value[k] for key, value in batch.items()} for batch in data])
    moments = vmap(lambda m: m.square().sum())(stacked.tensors()["@v.actor.layers.0.weight"])
    for k, agent in enumerate(alone):
        torch.testing.assert_close(
            moments[k], agent.tensors()["@v.actor.layers.0.weight"].square().sum()
        )
