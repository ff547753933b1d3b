"""The contract of `Agent`, for every registered agent: a new one is tested as it is.

Two toys stand for what no agent has to use: pixels and discrete actions, a preparatory stage, a
head per task, data of its own.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional as F

from rl_shift import agents, checkpoint, seeding, separate_seeds, trainer
from rl_shift.agent import Agent, Batch, Metrics, Stage, Wrapper
from rl_shift.agents.pgd import PGD
from rl_shift.agents.synther import SynthER
from rl_shift.buffer import Buffer, Mixture, transition_spec
from rl_shift.compile import Updater
from rl_shift.config import RunConfig, Task
from rl_shift.errors import UnsupportedSpace, UserError
from rl_shift.networks import MLP
from rl_shift.trainer import Clock, Trainer

SPACES: dict[str, tuple[Any, Any]] = {
    "vector": (
        spaces.Box(-np.inf, np.inf, (5,), np.float32),
        spaces.Box(-1.0, 1.0, (2,), np.float32),
    ),
    "image": (spaces.Box(0, 255, (11, 11, 3), np.uint8), spaces.Discrete(3)),
}
NO_AGENT_TAKES = (spaces.Dict(text=spaces.Text(4)), spaces.MultiDiscrete([2, 3]))
# What makes an agent small, where it has such a field; so are the budgets of preparatory stages.
SMALL: dict[str, Any] = {"hidden": (8,), "batch_size": 8, "warmup_steps": 4, "buffer_capacity": 64}
SMALL |= {"features": 8, "rollout": 16, "epochs": 1, "latent": 8, "model_epochs": 1}
SMALL |= {"dynamics_hidden": (8,), "dynamics_members": 2}
SMALL |= {"window": 8, "windows": 14, "width": 8, "depth": 1, "sampler_steps": 3}
SMALL |= {"denoiser_batch": 4, "network": "mlp", "samples": 21, "refresh_updates": 100}
SMALL |= {"model_hidden": (8,), "model_batch": 4, "starts": 14, "horizon": 2}  # of models
BUDGET = 7


class Pixels(Agent):
    """An encoder learnt in a stage of its own, then a classifier of actions for each task."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        batch_size: int = 256
        prepare_updates: int = 10_000

    def __init__(self, observation_space: Any, action_space: Any, config: Config) -> None:
        super().__init__(observation_space, action_space, config)
        self.encoder, self.decoder = MLP(363, (8,), 4), MLP(4, (8,), 363)
        self.optimizer("encoder", "decoder", lr=1e-3)
        self.head = -1

    @staticmethod
    def supports(observation_space: Any, action_space: Any) -> str | None:
        pixels = isinstance(observation_space, spaces.Box) and observation_space.dtype == np.uint8
        return None if pixels and isinstance(action_space, spaces.Discrete) else "it needs pixels"

    def encoding_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        x = batch["obs"].flatten(1)
        loss = (self.decoder(self.encoder(x)) - x).square().mean()
        return loss, {"encoder/loss": loss}

    def head_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        loss = F.cross_entropy(self.scores(batch["obs"]), batch["action"])
        return loss, {"head/loss": loss}

    def scores(self, obs: Tensor) -> Tensor:
        return self.get_submodule(f"head_{self.head}")(self.encoder(obs.flatten(1)))

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        if self.head < 0:  # before the first task
            return torch.zeros_like(obs[:, 0, 0, 0], dtype=torch.int64)
        return self.scores(self.normalizer(obs)).argmax(-1)

    def build(self, task: Task) -> None:
        self.head += 1
        self.add_module(f"head_{self.head}", MLP(4, (8,), 3))
        self.optimizer(f"head_{self.head}", lr=1e-3)

    def stages(self, task: Task) -> list[Stage]:
        prepare = Stage("prepare", updates=self.config.prepare_updates, counted=False)
        return [prepare, *super().stages(task)]

    def focus(self, task: Task) -> None:
        self.head = self.begun.index(task)

    def variant(self) -> tuple[Any, ...]:
        return (self.stage, self.head)

    def extra_state(self) -> dict[str, Any]:
        return {"head": self.head}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self.head = extra["head"]

    def update(self, batch: Batch) -> Metrics:
        batch = self.normalizer.batch(batch)
        if self.stage == "prepare":
            return self.learn(("encoder", "decoder"), self.encoding_loss, batch)
        return self.learn(f"head_{self.head}", self.head_loss, batch)


class Memory(Wrapper):
    """Keeps rows of finished tasks and mixes them in, so its seeds cannot share a process."""

    stackable = False

    @dataclasses.dataclass(frozen=True)
    class Config:
        base: str = agents.names()[0]
        base_config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept: Batch = {}

    def sample(self, buffer: Buffer | Mixture) -> Batch:
        batch = super().sample(buffer)
        for key, rows in self.kept.items():
            batch[key] = torch.cat([rows, batch[key][4:]])
        return batch

    def end_task(self, task: Task, buffer: Buffer) -> None:
        super().end_task(task, buffer)
        self.kept = buffer.take(torch.arange(4))

    def extra_state(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self.kept = extra["kept"]


TOYS: dict[str, Any] = {"toy pixels": Pixels, "toy memory": Memory}
registered = agents.get


def class_of(name: str) -> Any:
    return TOYS.get(name) or registered(name)


def config_of(kind: Any) -> Any:
    """A small configuration of an agent class."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(kind.Config):
        if f.name in SMALL:
            values[f.name] = SMALL[f.name]
        elif f.name.endswith("_updates") and isinstance(f.default, int) and f.default > 0:
            values[f.name] = BUDGET
    if issubclass(kind, Wrapper):
        base = agents.get(kind.Config().base)
        values["base_config"] = dataclasses.asdict(config_of(base))
    return kind.Config(**values)


def make(name: str, on: str, seeds: int = 1, first: int = 0) -> Agent:
    """S stacked seeds of a small agent, each initialised under a generator of its own."""
    kind = class_of(name)
    made = []
    for seed in range(first, first + seeds):
        with seeding.forked(seed):
            made.append(kind(*SPACES[on], config_of(kind)))
    return kind.stacked(made)


def is_supported(name: str, on: str) -> bool:
    try:
        make(name, on)
    except UnsupportedSpace:
        return False
    return True


NAMES = [*agents.names(), *TOYS]
PAIRS = [(name, on) for name in NAMES for on in SPACES if is_supported(name, on)]
STACKABLE = [(name, on) for name, on in PAIRS if make(name, on).stackable]

each_agent = pytest.mark.parametrize(("name", "on"), PAIRS)
each_stackable = pytest.mark.parametrize(("name", "on"), STACKABLE)
each_agent_and_seeds = pytest.mark.parametrize(
    ("name", "on", "seeds"), [(*p, 1) for p in PAIRS] + [(*p, 2) for p in STACKABLE]
)


# ---- a toy task --------------------------------------------------------------------------------


def arrays(on: str, columns: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Four episodes of 16 rows, two of which terminate; every column an agent may ask for."""
    observation, action = SPACES[on]
    rng = seeding.numpy_generator(0, "toy data")
    end = np.arange(64) % 16 == 15
    found: dict[str, np.ndarray] = {
        "reward": rng.normal(size=64).astype(np.float32),
        "terminated": end & (np.arange(64) < 32),
        "truncated": end & (np.arange(64) >= 32),
        "task": np.zeros(64, np.int64),
        "next_obs_known": np.ones(64, np.float32),
        "reward_mask": np.ones(64, np.float32),
        "mc_return": rng.normal(size=64).astype(np.float32),
    }
    for key, space in (
        ("obs", observation),
        ("next_obs", observation),
        ("action", action),
        ("next_action", action),
    ):
        if isinstance(space, spaces.Discrete):
            found[key] = rng.integers(space.n, size=64)
        elif space.dtype == np.uint8:
            found[key] = rng.integers(256, size=(64, *space.shape)).astype(np.uint8)
        else:
            found[key] = np.tanh(rng.normal(1.0, 2.0, (64, *space.shape))).astype(np.float32)
    return {key: found[key] for key in (*transition_spec(observation, action), *columns)}


def data_for(agent: Agent, on: str, seeds: tuple[int, ...] = (0,)) -> Buffer:
    return Buffer.from_arrays(arrays(on, agent.columns), seeds=seeds)


def toy_task(on: str, updates: int = BUDGET, name: str = "toy", **changes: Any) -> Task:
    observation_space, action_space = SPACES[on]
    return Task(
        name=name,
        dataset="toy",
        updates=updates,
        observation_space=observation_space,
        action_space=action_space,
        data=SimpleNamespace(),
        **changes,
    )


def accepted(agent: Agent, task: Task) -> Task:
    """The toy task as the agent takes it: where it refuses datasets, the rows stand for its own."""
    try:
        agent.stages(task)
    except UserError as error:
        assert "dataset" in str(error)
        return dataclasses.replace(task, dataset=None)
    return task


def begin(agent: Agent, on: str, data: Buffer) -> Task:
    """Begin the next toy task; what it builds is initialised alike for every caller."""
    task = accepted(agent, toy_task(on, name=f"toy {len(agent.begun)}"))
    with seeding.forked(6):
        agent.begin_task(task, data)
    return task


def learn(
    agent: Agent,
    on: str,
    data: Buffer,
    updates: int = BUDGET,
    mode: Any = "off",
    change: Callable[[Batch], Batch] = lambda batch: batch,
) -> None:
    """Every stage of the begun task, `updates` each, with the same noise for every caller."""
    updater = Updater(agent, mode)
    with seeding.forked(5):
        for stage in agent.stages(agent.begun[-1]):
            agent.enter(stage.name)
            for _ in range(updates):
                updater(change(agent.sample(data)))
    assert updater.mode == mode


def learn_toy(agent: Agent, on: str, updates: int = BUDGET, mode: Any = "off") -> None:
    """Begin and learn the next toy task."""
    data = data_for(agent, on, tuple(range(agent.seeds)))
    begin(agent, on, data)
    learn(agent, on, data, updates, mode)


def flat(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested plain data by path."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in items:
            yield from flat(value, f"{path}/{key}")
    else:
        yield path, state


def assert_equal(first: Any, second: Any, without: tuple[str, ...] = ()) -> None:
    """Bitwise equality of nested plain data."""
    a, b = dict(flat(first)), dict(flat(second))
    assert a.keys() == b.keys()
    for path, x in a.items():
        if path in without:
            continue
        same = torch.equal(x, b[path]) if isinstance(x, Tensor) else x == b[path]
        assert same, f"{path}: {x} and {b[path]}"


def assert_close(first: Agent, second: Agent, tolerance: float) -> None:
    """Parameters, buffers and Adam moments."""
    first.sync_steps(), second.sync_steps()
    a, b = first.tensors(), second.tensors()
    assert a.keys() == b.keys()
    for key, x in a.items():
        torch.testing.assert_close(x, b[key], rtol=tolerance, atol=tolerance, msg=key)


def snapshot(agent: Agent) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in agent.state_dict().items()}


def double(agent: Agent) -> Agent:
    """In float64, except learning rates and step counts, which are no part of the arithmetic."""
    for tensor in agent._all_tensors():
        if tensor.is_floating_point():
            tensor.data = tensor.data.double()
    return agent


def double_batch(batch: Batch) -> Batch:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile=on` without the compiler: the functional engine, run as it stands."""
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)


@pytest.fixture
def still_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that is the same for every seed, so that stacked and separate seeds compare."""

    def still(like: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wave = torch.arange(math.prod(like.shape), dtype=like.dtype).cos()
        return wave.reshape(like.shape)

    monkeypatch.setattr(torch, "randn_like", still)
    monkeypatch.setattr(torch, "rand_like", lambda like: 0.5 + 0.5 * still(like))


# ---- 1: actions and spaces ---------------------------------------------------------------------


@each_agent_and_seeds
@pytest.mark.parametrize("explore", [False, True])
def test_actions_have_the_shape_and_range_of_the_space(
    name: str, on: str, seeds: int, explore: bool
) -> None:
    agent = make(name, on, seeds)
    obs = torch.from_numpy(arrays(on)["obs"][:3])
    lead = (3,) if seeds == 1 else (seeds, 3)
    before = snapshot(agent)
    action = agent.run(agent.act, obs.expand(*lead, *obs.shape[1:]), explore)
    space = SPACES[on][1]
    assert action.shape == (*lead, *space.shape)
    assert not action.requires_grad
    if isinstance(space, spaces.Discrete):
        assert action.dtype == torch.int64
        assert ((action >= 0) & (action < space.n)).all()
    else:
        assert action.dtype == torch.float32
        assert (action.abs() <= 1).all()
    assert_equal(before, snapshot(agent))  # `act` is pure
    if not explore:
        again = agent.run(agent.act, obs.expand(*lead, *obs.shape[1:]), explore)
        assert torch.equal(action, again)


@pytest.mark.parametrize("name", NAMES)
def test_an_unsupported_space_is_refused_by_name(name: str) -> None:
    kind = class_of(name)
    refused = [SPACES[on] for on in SPACES if (name, on) not in PAIRS]
    for pair in [*refused, NO_AGENT_TAKES]:
        with pytest.raises(UnsupportedSpace, match="cannot be used here: .*observations"):
            kind(*pair, config_of(kind))


@each_agent
def test_the_policy_is_the_distribution_behind_the_actions(name: str, on: str) -> None:
    agent = make(name, on)
    agent.begin_task(accepted(agent, toy_task(on)), data_for(agent, on))
    obs = torch.from_numpy(arrays(on)["obs"][:3])
    action, policy = agent.run(agent.act, obs, False), agent.run(agent.distribution, obs)
    greedy = policy.mean.tanh() if policy.squashed else policy.mean
    assert torch.equal(action, greedy)
    assert policy.std is None or (policy.std > 0).all()


# ---- 2, 9: an update ---------------------------------------------------------------------------


@each_agent_and_seeds
def test_an_update_gives_finite_tensors_and_never_waits_for_the_device(
    name: str, on: str, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make(name, on, seeds)
    data = data_for(agent, on, tuple(range(seeds)))
    task = accepted(agent, toy_task(on))
    agent.begin_task(task, data)

    def read(*args: Any) -> None:
        raise AssertionError("an update reads a value of a tensor: the device must wait for it")

    for stage in agent.stages(task):
        agent.enter(stage.name)
        for _ in range(2 * agent.delay):
            batch = agent.sample(data)
            agent.schedule()
            with monkeypatch.context() as patch:
                for method in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__"):
                    patch.setattr(Tensor, method, read)
                metrics = agent.update(batch)
            agent.advance()
            assert metrics
            for key, value in metrics.items():
                assert isinstance(value, Tensor) and not value.requires_grad, key
                assert value.isfinite().all(), key
    assert agent.updates == 2 * agent.delay * len(agent.stages(task))
    for key, value in agent.state_dict().items():
        assert value.isfinite().all(), key


# ---- 3, 4: what changes ------------------------------------------------------------------------


@each_agent_and_seeds
@pytest.mark.parametrize("mode", ["off", "on"])
def test_learn_changes_what_it_names_and_polyak_its_target_and_nothing_else_changes(
    name: str, on: str, seeds: int, mode: str, monkeypatch: pytest.MonkeyPatch, uncompiled: None
) -> None:
    agent = make(name, on, seeds)
    calls = {"learn": 0, "polyak": 0}
    last: dict[str, Tensor] = {}

    def current() -> dict[str, Tensor]:
        values = snapshot(agent)
        for prefix, inner in agent.prefixed():  # the unit may be an inner agent's step
            if inner.live is not None:
                own = {prefix + k: v for k, v in inner.live.items()}
                return values | {k: v.detach().clone() for k, v in own.items() if k in values}
        return values

    def spy(method: str, declared: Callable[..., tuple[str, ...]]) -> None:
        original = getattr(Agent, method)

        @functools.wraps(original)
        def watched(self: Agent, *args: Any, **kwargs: Any) -> Any:
            before = current()
            if last:
                assert_equal(last, before)  # since the last call nothing has changed
            result = original(self, *args, **kwargs)
            after = current()
            prefix = next(p for p, a in agent.prefixed() if a is self)
            changing = tuple(f"{prefix}{n}." for n in declared(*args))
            changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
            assert changed <= {k for k in after if k.startswith(changing)}
            last.clear()
            last.update(after)
            calls[method] += 1
            return result

        monkeypatch.setattr(Agent, method, watched)

    spy("learn", lambda names, *rest: (names,) if isinstance(names, str) else names)
    spy("polyak", lambda source, target, tau: (target,))
    data = data_for(agent, on, tuple(range(seeds)))
    begin(agent, on, data)
    start = snapshot(agent)
    learn(agent, on, data, 2 * agent.delay, mode)
    assert calls["learn"] > 0
    assert_equal(last, snapshot(agent))
    learnt = {p + n for p, a in agent.prefixed() for n in a.optimizers}
    parameters = dict(agent.named_parameters())
    for key in start:
        owned = key in parameters and any(key.startswith(n + ".") for n in learnt)
        if owned and seeds == 1 and mode == "off":
            assert not torch.equal(start[key], last[key]), f"{key} has an optimiser and stays"


@each_agent_and_seeds
@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_head_that_no_loss_names_stays_as_it_is(
    name: str, on: str, seeds: int, mode: str, uncompiled: None
) -> None:
    agent = make(name, on)
    agent.spare = MLP(3, (4,), 2)
    agent.optimizer("spare", lr=1.0)
    agent = type(agent).stacked([agent] * seeds)
    before = copy.deepcopy({k: v for k, v in flat(agent.state()) if "/spare" in k})
    assert len(before) > 8
    learn_toy(agent, on, 100, mode)
    assert_equal(before, {k: v for k, v in flat(agent.state()) if "/spare" in k})


# ---- 5, 6: state and resume --------------------------------------------------------------------


@each_agent_and_seeds
def test_state_round_trip(name: str, on: str, seeds: int, tmp_path: Path) -> None:
    agent = make(name, on, seeds)
    learn_toy(agent, on)
    state = copy.deepcopy(agent.state())
    folder = checkpoint.save(tmp_path / "saved", {"agent": state}, "", {})
    loaded, _ = checkpoint.load(folder)
    other = make(name, on, seeds, first=50)
    addresses = {k: v.data_ptr() for k, v in other.tensors().items()}
    other.load_state(loaded["agent"])
    assert_equal(state, other.state())
    for key, address in addresses.items():  # compiled units and CUDA graphs hold on to them
        assert other.tensors()[key].data_ptr() == address, key
    obs = torch.from_numpy(arrays(on)["obs"][: 2 * seeds])
    obs = obs if seeds == 1 else obs.reshape(seeds, 2, *obs.shape[1:])
    assert torch.equal(agent.run(agent.act, obs, False), other.run(other.act, obs, False))


def toy_run(
    name: str,
    on: str,
    seeds: int,
    tasks: list[Task],
    monkeypatch: pytest.MonkeyPatch,
    state: dict[str, Any] | None = None,
    save_every: int = 0,
) -> tuple[list[dict[str, Any]], list[dict[str, float]], Agent]:
    """A run of the trainer on toy data; gives its checkpoints, its logs and the agent."""

    def load(info: Any, columns: tuple[str, ...], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return arrays(on, columns)

    monkeypatch.setattr(trainer.datasets, "load", load)
    agent = make(name, on, seeds, first=0 if state is None else 50)
    tasks = [accepted(agent, task) for task in tasks]
    run = RunConfig(
        name,
        agent.config,
        tuple(tasks),
        seeds=seeds,
        save_every=save_every,
        log_every=1,
        data_memory="ram",
    )
    saved: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []

    def save(clock: Clock, state: dict[str, Any]) -> None:
        saved.append(copy.deepcopy(state))

    loop = Trainer(agent, tasks, run, lambda clock, values: logged.append(values), save)
    if state is not None:
        loop.load_state(state)
    with seeding.forked(0):
        loop.run()
    return saved, logged, agent


@each_agent_and_seeds
def test_a_resumed_run_is_bitwise_the_run_that_did_not_stop(
    name: str, on: str, seeds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From inside every stage, in the first and in the second of two tasks."""
    tasks = [toy_task(on), toy_task(on, name="toy 2")]
    saved, _, agent = toy_run(name, on, seeds, tasks, monkeypatch, save_every=3)
    inside = [state for state in saved if state["clock"]["updates"] == 3]
    assert len(inside) == 2 * len(agent.stages(accepted(agent, tasks[0])))
    assert saved[-1]["clock"]["task"] == 1
    for k, state in enumerate(inside):
        folder = checkpoint.save(tmp_path / str(k), state, "", {})
        loaded, _ = checkpoint.load(folder)
        monkeypatch.setattr(Agent, "begin_task", _begins_only_at(state, Agent.begin_task))
        resumed, _, _ = toy_run(name, on, seeds, tasks, monkeypatch, loaded, save_every=3)
        monkeypatch.undo()
        assert_equal(resumed[-1], saved[-1], without=("/seconds",))


def _begins_only_at(state: dict[str, Any], begin: Callable[..., None]) -> Callable[..., None]:
    """`begin_task` of a resumed run: not for the task that the state lies in."""

    def checked(self: Agent, task: Task, buffer: Buffer) -> None:
        assert state["clock"]["task"] == 0 and task.name == "toy 2"
        begin(self, task, buffer)

    return checked


# ---- 7: stacked seeds --------------------------------------------------------------------------


@each_stackable
def test_stacked_seeds_are_the_separate_ones(name: str, on: str, still_noise: None) -> None:
    """In float64; each seed draws the batches that it draws alone."""
    seeds = (3, 4)
    separate = []
    for seed in seeds:
        alone = make(name, on, 1, first=seed)
        begin(alone, on, data_for(alone, on, (seed,)))
        separate.append(double(alone))
    stacked = type(separate[0]).stacked(separate)
    generator, data = torch.default_generator.get_state(), data_for(stacked, on, seeds)
    if isinstance(stacked, PGD | SynthER):  # a ring for each seed
        stacked.synthetic.begin(stacked.synthetic.rings[0].capacity, data, stacked.begun[-1])
    learn(stacked, on, data, 10, change=double_batch)
    for k, (seed, alone) in enumerate(zip(seeds, separate, strict=True)):
        learn(alone, on, data_for(alone, on, (seed,)), 10, change=double_batch)
        assert_close(stacked.select(k), alone, 1e-9)
        assert stacked.select(k).updates == alone.updates
        obs = double_batch({"obs": torch.from_numpy(arrays(on)["obs"])})["obs"]
        mine = stacked.run(stacked.act, obs.expand(2, *obs.shape), False)[k]
        torch.testing.assert_close(mine, alone.run(alone.act, obs, False), rtol=1e-9, atol=1e-9)
    assert torch.equal(generator, torch.default_generator.get_state())


# ---- 8: the trainer ----------------------------------------------------------------------------


@each_agent
def test_two_hundred_updates_under_the_trainer(
    name: str, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = toy_task(on, 200)
    saved, logged, agent = toy_run(name, on, 1, [task], monkeypatch)
    stages = agent.stages(accepted(agent, task))
    assert saved[-1]["clock"]["counted_updates"] == sum(s.updates for s in stages if s.counted)
    assert saved[-1]["clock"]["counted_updates"] == 200
    assert len(logged) == sum(stage.updates for stage in stages)
    for values in logged:
        assert all(np.isfinite(value) for value in values.values())
    assert all(v.isfinite().all() for v in agent.tensors().values())


# ---- 10: the two engines -----------------------------------------------------------------------


def halved_and_projected(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Uses a dot product over all parameters, as A-GEM does: per seed, so it must see one."""
    dot = sum((g * g.sign()).sum() for g in gradients.values())
    return {k: 0.5 * g - 0.01 * dot * g.cos() for k, g in gradients.items()}


@pytest.mark.parametrize("change", ["plain", "transform", "clip"])
@each_agent_and_seeds
def test_the_functional_engine_equals_the_eager_one(
    name: str,
    on: str,
    seeds: int,
    change: str,
    monkeypatch: pytest.MonkeyPatch,
    uncompiled: None,
) -> None:
    if change == "transform":
        changed = functools.partialmethod(Agent.learn, transform=halved_and_projected)
        monkeypatch.setattr(Agent, "learn", changed)
    trained = []
    for mode in ("off", "on"):
        agent = make(name, on, seeds)
        data = data_for(agent, on, tuple(range(seeds)))
        begin(agent, on, data)
        double(agent)
        if change == "clip":
            for inner in agent.contained():
                inner.clips = dict.fromkeys(inner.optimizers, 1e-3)
        learn(agent, on, data, 6, mode, double_batch)
        trained.append(agent)
    assert_close(*trained, 1e-9)


# ---- 11: focus ---------------------------------------------------------------------------------


@each_agent_and_seeds
def test_focus_changes_nothing_that_is_trained(name: str, on: str, seeds: int) -> None:
    agent = make(name, on, seeds)
    tasks = [toy_task(on), toy_task(on, name="toy 2")]
    data = data_for(agent, on, tuple(range(seeds)))
    for task in tasks:
        agent.begin_task(task, data)
    before = copy.deepcopy({k: v for k, v in agent.tensors().items()})
    for task in (*tasks, tasks[0], tasks[1]):
        agent.focus(task)
        assert_equal(before, agent.tensors())


# ---- 12: several seeds -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_seeds_share_a_process_only_offline_and_where_the_agent_allows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = class_of(name)
    monkeypatch.setattr(separate_seeds.agents, "get", class_of)
    on = next(on for agent, on in PAIRS if agent == name)
    run = RunConfig(name, config_of(kind), (toy_task(on),), seeds=2)
    assert separate_seeds.stacks(run) == ((name, on) in STACKABLE)
    assert separate_seeds.apart(run) == ((name, on) not in STACKABLE)
    online = dataclasses.replace(run, tasks=(toy_task(on, env_steps=10),))
    assert separate_seeds.apart(online)


# ---- 13: a wrapper that changes nothing --------------------------------------------------------


class Empty(Wrapper):
    @dataclasses.dataclass(frozen=True)
    class Config:
        base: str
        base_config: dict[str, Any]


def wrapped(base: Agent) -> Empty:
    config = Empty.Config("", {})
    made = []
    for k in range(base.seeds):
        made.append(Empty(base.observation_space, base.action_space, config, base.select(k)))
    return Empty.stacked(made)


def base_state(agent: Agent) -> dict[str, Any]:
    """The state of a wrapper's base, named as if it stood alone."""
    state = agent.state()
    return {
        "module": {k[5:]: v for k, v in state["module"].items() if k.startswith("base.")},
        "agents": {k[5:]: v for k, v in state["agents"].items() if k.startswith("base.")},
    }


@each_agent_and_seeds
@pytest.mark.parametrize("mode", ["off", "on"])
def test_an_empty_wrapper_is_bitwise_its_base(
    name: str, on: str, seeds: int, mode: str, uncompiled: None
) -> None:
    agent = make(name, on, seeds)
    wrapper = wrapped(agent)
    for attribute in ("seeds", "stackable", "delay", "columns"):
        assert getattr(wrapper, attribute) == getattr(agent, attribute)
    for attribute in (
        "collect_every",
        "updates_per_collect",
        "warmup_steps",
        "buffer_capacity",
    ):
        assert getattr(wrapper, attribute) == getattr(agent, attribute)
    for one in (agent, wrapper):
        learn_toy(one, on, mode=mode)
    assert wrapper.updates == agent.updates > 0
    assert_equal(base_state(wrapper), agent.state())
    obs = torch.from_numpy(arrays(on)["obs"][: 2 * seeds])
    obs = obs if seeds == 1 else obs.reshape(seeds, 2, *obs.shape[1:])
    for explore in (False, True):
        actions = []
        for one in (agent, wrapper):
            with seeding.forked(9):
                actions.append(one.run(one.act, obs, explore))
        assert torch.equal(*actions)
    again = wrapped(make(name, on, seeds, first=50))
    again.load_state(copy.deepcopy(wrapper.state()))
    for one in (agent, again):
        learn_toy(one, on, mode=mode)
    assert_equal(base_state(again), agent.state())


def test_an_empty_wrapper_finds_its_base_by_name() -> None:
    name, on = PAIRS[0]
    settings = dataclasses.asdict(config_of(agents.get(name)))
    wrapper = Empty(*SPACES[on], Empty.Config(name, settings))
    assert type(wrapper.base) is agents.get(name)
    with pytest.raises(UnsupportedSpace, match=type(wrapper.base).__name__):
        Empty(*NO_AGENT_TAKES, Empty.Config(name, settings))


# ---- 14: normalisation -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, on in PAIRS if on == "vector"])
def test_observations_are_normalised_once(name: str) -> None:
    """Every network sees the same values for the same raw observation, in `act` and `update`."""
    agent = make(name, "vector")
    data = data_for(agent, "vector")
    task = accepted(agent, toy_task("vector"))
    agent.begin_task(task, data)
    for inner in agent.contained():
        inner.normalizer.fit(torch.arange(5.0), torch.full((5,), 3.0), epsilon=1.0)
    raw = torch.tensor([2.0, -1.0, 0.5, 7.0, 1.0])
    expected = (raw - torch.arange(5.0)) / 4.0
    seen: list[Tensor] = []

    def record(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0] if inputs else None
        if isinstance(x, Tensor) and x.dim() > 1 and x.shape[-1] in (5, 7):  # 7: with the action
            seen.append(x[..., :5].detach())

    for path, module in agent.named_modules():
        if "normalizer" not in path and not isinstance(module, Agent):
            module.register_forward_pre_hook(record)

    agent.run(agent.act, raw.expand(4, 5), False)
    assert seen
    for x in seen:
        assert torch.allclose(x, expected.expand_as(x))
    for stage in agent.stages(task):
        agent.enter(stage.name)
        batch = agent.sample(data)
        seen.clear()
        for key in {"obs", "next_obs"} & batch.keys():
            batch[key] = raw.expand_as(batch[key])
        for _ in range(agent.delay):
            agent.update(dict(batch))
            agent.advance()
        assert seen or not stage.counted  # a preparation may see other things than observations
        for x in seen:
            assert torch.allclose(x, expected.expand_as(x))
