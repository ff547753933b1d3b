"""Compiled updates: one real compilation of an agent, and what happens where none is possible."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from rl_shift import agents
from rl_shift.agent import Agent, Batch, Metrics
from rl_shift.compile import Updater
from rl_shift.networks import MLP

OBS, ACTION = Box(-np.inf, np.inf, (3,), np.float32), Box(-1.0, 1.0, (2,), np.float32)


def batches(count: int, rows: int = 8, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        {
            "obs": draw(rows, 3),
            "action": draw(rows, 2).tanh(),
            "reward": draw(rows),
            "next_obs": draw(rows, 3),
            "terminated": draw(rows) > 1.5,
        }
        for _ in range(count)
    ]


def largest_difference(a: Agent, b: Agent) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_update_is_the_eager_one() -> None:
    kind = agents.get("td3_bc")
    torch.manual_seed(0)
    eager = kind(OBS, ACTION, kind.Config(hidden=(16,), batch_size=8, policy_noise=0.0))
    compiled = copy.deepcopy(eager)
    off, on = Updater(eager, "off"), Updater(compiled, "on")
    torch._dynamo.utils.counters.clear()
    for batch in batches(10):
        left, right = off(batch), on(batch)
        assert left.keys() == right.keys()
    assert on.mode == "on"
    assert largest_difference(eager, compiled) < 1e-5
    assert eager.updates == compiled.updates == 10
    # one graph with the actor's step, one without, and no graph break
    assert len(on.units[""].variants) == 2
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    for batch in batches(20, seed=1):
        on(batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    # the state is that of the other mode: all step tensors of an optimiser agree
    steps = compiled.state()["agents"][""]["optimizers"]["critic"]["moments"].values()
    assert {float(moment["step"]) for moment in steps} == {30.0}


class Branching(Agent):
    """Its loss asks a tensor for its value, which no compiled graph can."""

    @dataclass(frozen=True)
    class Config:
        batch_size: int = 8

    def __init__(self, observation_space: Any, action_space: Any, config: Config) -> None:
        super().__init__(observation_space, action_space, config)
        self.net = MLP(3, (4,), 1)
        self.optimizer("net", lr=1e-2)

    def loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        loss = self.net(batch["obs"]).square().mean()
        if loss > 1e6:
            loss = loss * 0
        return loss, {"net/loss": loss}

    def update(self, batch: Batch) -> Metrics:
        return self.learn("net", self.loss, batch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_cannot_be_compiled_trains_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    agent = Branching(OBS, ACTION, Branching.Config())
    twin = copy.deepcopy(agent)
    updater, eager = Updater(agent, "on"), Updater(twin, "off")
    with caplog.at_level(logging.WARNING, logger="rl_shift.compile"):
        for batch in batches(3):
            updater(batch)
            eager(batch)
    assert sum("cannot be compiled" in record.message for record in caplog.records) == 1
    assert updater.mode == "off"
    assert agent.updates == 3
    assert largest_difference(agent, twin) == 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_graphs_without_a_gpu_fall_back(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rl_shift.compile"):
        updater = Updater(Branching(OBS, ACTION, Branching.Config()), "graphs")
    assert updater.mode == "on"
    assert "not available without a GPU" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_captured_update_is_the_eager_one() -> None:
    kind = agents.get("td3_bc")
    torch.manual_seed(0)
    eager = kind(OBS, ACTION, kind.Config(hidden=(16,), batch_size=8, policy_noise=0.0))
    captured = copy.deepcopy(eager).place("cuda")
    eager.place("cuda")
    off, graphs = Updater(eager, "off"), Updater(captured, "graphs")
    for batch in batches(12):
        batch = {k: v.cuda() for k, v in batch.items()}
        off(batch)
        graphs(batch)
    assert largest_difference(eager, captured) < 1e-5


def test_a_failed_update_is_not_counted() -> None:
    agent = Branching(OBS, ACTION, Branching.Config())
    updater = Updater(agent, "off")
    with pytest.raises(KeyError):
        updater({})
    assert agent.updates == 0
    updater(batches(1)[0])
    assert agent.updates == 1
