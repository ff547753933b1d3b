"""What agents that learn task after task are made of: a policy with a head per task, and a memory.

Our design. Every task has an input layer and a head of its own, so tasks may differ in their
spaces; batches keep one entry per task, so their shapes never change within a task.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl_shift.buffer import Batch, Buffer
from rl_shift.seeding import child


class MultiHead(nn.Module):
    """pi_k(s) = tanh(head_k(trunk(input_k(s)))): a deterministic policy for every task.

    With `hidden` (256, 256) a task's path is as large as an actor of its own, and the layers
    between the hidden ones are shared. `shared_inputs` shares the first layer as well among tasks
    whose observations have the same size.

    Attributes:
        current: the head that `forward` uses unless told otherwise: that of the task in training.
    """

    def __init__(self, hidden: Sequence[int], shared_inputs: bool = False) -> None:
        super().__init__()
        self.width = hidden[0]
        self.shared_inputs = shared_inputs
        self.trunk = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(hidden))
        self.inputs, self.heads = nn.ModuleList(), nn.ModuleList()
        self.outputs = hidden[-1]
        self.entrance: list[int] = []  # task -> index of its first layer
        self.sizes: list[tuple[int, int]] = []
        self.current = -1

    def add(self, obs: int, action: int) -> None:
        """A path for a new task, which becomes the current one."""
        sizes = [size for size, _ in self.sizes]
        if self.shared_inputs and obs in sizes:
            self.entrance.append(self.entrance[sizes.index(obs)])
        else:
            self.inputs.append(nn.Linear(obs, self.width))
            self.entrance.append(len(self.inputs) - 1)
        self.heads.append(nn.Linear(self.outputs, action))
        self.sizes.append((obs, action))
        self.current = len(self.heads) - 1

    def copy_head(self, source: int, target: int) -> None:
        """Give one task's path the weights of another of equal sizes."""
        layers = [(self.heads[source], self.heads[target])]
        layers.append((self.inputs[self.entrance[source]], self.inputs[self.entrance[target]]))
        for theirs, mine in layers:
            mine.load_state_dict(theirs.state_dict())

    def start_from_best(self, obs: Tensor, action: Tensor) -> None:
        """The current path becomes that of the old task whose actions agree best with the data's.

        Args:
            obs: (B, obs) normalised observations of the current task.
            action: (B, action) of the data.
        """
        alike = [j for j in range(self.current) if self.sizes[j] == self.sizes[self.current]]
        with torch.no_grad():
            errors = [float((self(obs, j) - action).square().mean()) for j in alike]
        if alike:
            self.copy_head(alike[errors.index(min(errors))], self.current)

    def forward(self, obs: Tensor, task: int | None = None) -> Tensor:
        """(B, obs) normalised -> (B, action) in [-1, 1]."""
        return self.together([(self.current if task is None else task, obs)])[0]

    def together(self, parts: Sequence[tuple[int, Tensor]]) -> Sequence[Tensor]:
        """Actions of several tasks' observations, (task, (B, obs)) each, in one pass."""
        if len(parts) == 1:  # without row counts, which an exported policy would keep as constants
            ((task, obs),) = parts
            return [
                torch.tanh(self.heads[task](self.hidden(self.inputs[self.entrance[task]](obs))))
            ]
        alike = {(self.sizes[task], obs.shape) for task, obs in parts}
        if len(alike) == 1:
            tasks = [task for task, _ in parts]
            return self.side_by_side(tasks, torch.stack([obs for _, obs in parts])).unbind()
        x = torch.cat([self.inputs[self.entrance[task]](obs) for task, obs in parts])
        pieces = torch.split(self.hidden(x), [len(obs) for _, obs in parts])
        return [
            torch.tanh(self.heads[task](piece))
            for (task, _), piece in zip(parts, pieces, strict=True)
        ]

    def side_by_side(self, tasks: Sequence[int], obs: Tensor) -> Tensor:
        """Tasks of equal sizes, (K, B, obs) -> (K, B, action); the cost hardly grows with K."""
        entrances = [self.entrance[task] for task in tasks]
        if len(set(entrances)) == 1:
            x = self.inputs[entrances[0]](obs)
        else:
            x = _each_its_own([self.inputs[k] for k in entrances], obs)
        return torch.tanh(_each_its_own([self.heads[task] for task in tasks], self.hidden(x)))

    def hidden(self, x: Tensor) -> Tensor:
        """From the first layer's outputs, (..., width), to what the heads see."""
        for layer in self.trunk:
            x = layer(F.relu(x))
        return F.relu(x)

    def fitted(self, obs: Tensor, task: int) -> Tensor:
        """Observations of another task cut or padded with zeros to what `task` takes."""
        size = self.sizes[task][0]
        return F.pad(obs, (0, size - obs.shape[-1])) if size != obs.shape[-1] else obs


def _each_its_own(layers: Sequence[Any], x: Tensor) -> Tensor:
    """K linear layers on (K, B, in) in one product, (K, B, out)."""
    weights = torch.stack([layer.weight for layer in layers])
    biases = torch.stack([layer.bias for layer in layers])
    return torch.baddbmm(biases[:, None], x, weights.mT)


class Memory:
    """What is kept of finished tasks: rows in order of priority, one flat Buffer for each task.

    Rows hold the raw `obs` and the `target` to be reproduced; rewards are not kept. Every task
    draws from a random stream of its own, so replay never shifts another stream.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.parts: dict[int, Buffer] = {}

    def store(self, task: int, rows: Batch) -> None:
        """Keep rows, (rows, ...) in order of priority, in the place of what is kept of `task`."""
        device = next(iter(rows.values())).device
        seed = child(self.seed, "memory", task)
        self.parts[task] = Buffer.from_arrays(rows, device, (seed,), stream="memory")

    def shrink(self, most: int) -> None:
        """Drop the rows of lowest priority until no task has more than `most`."""
        for task, part in list(self.parts.items()):
            if len(part) > most:
                self.store(task, {key: rows[:most] for key, rows in part.arrays().items()})

    def sample(self, n: int, without: int = -1) -> Batch:
        """About `n` rows of all tasks but `without`: memory_obs_K, memory_target_K.

        All tasks give the same number of rows, one at least.
        """
        tasks = [task for task in self.parts if task != without]
        batch: Batch = {}
        for task in tasks:
            count = max(1, n // len(tasks))
            rows = self.parts[task].sample(count)
            batch[f"memory_obs_{task}"] = rows["obs"]
            batch[f"memory_target_{task}"] = rows["target"]
        return batch

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(part.nbytes for part in self.parts.values())

    def save(self) -> dict[str, Any]:
        """Rows and streams, for a checkpoint."""
        return {
            str(task): {"rows": part.arrays(), "streams": part.state()}
            for task, part in self.parts.items()
        }

    def load(self, saved: dict[str, Any], device: torch.device) -> None:
        """Take back what `save` gave."""
        self.parts = {}
        for task, part in saved.items():
            self.store(int(task), {key: rows.to(device) for key, rows in part["rows"].items()})
            self.parts[int(task)].load_state(part["streams"])


def some_rows(buffer: Buffer, most: int = 2000) -> Tensor:
    """Row numbers spread evenly over the data, without drawing from any stream."""
    step = max(1, len(buffer) // most)
    return torch.arange(0, len(buffer), step, device=buffer.device)[:most]


def td_error(learner: Any, rows: Batch) -> Tensor:
    """|r + gamma min Q'(s', mu(s')) - mean Q(s, a)| of an actor-critic's twin critics, (B,).

    Args:
        learner: an agent with `critic`, `target_critic` and `config.discount`.
        rows: raw transitions, (B, ...).
    """
    batch = learner.normalizer.batch(rows)
    value = learner.target_critic(batch["next_obs"], learner.act(rows["next_obs"], False))
    target = rows["reward"] + learner.config.discount * ~rows["terminated"] * value.amin(0)
    error: Tensor = (learner.critic(batch["obs"], rows["action"]).mean(0) - target).abs()
    return error


def has_td_error(learner: Any) -> bool:
    """Whether `td_error` can be asked of this agent."""
    return all(hasattr(learner, name) for name in ("critic", "target_critic"))


def replayed(batch: Batch) -> list[tuple[int, Tensor, Tensor]]:
    """(task, obs, target) of every old task in a batch that `Memory.sample` gave."""
    prefix = "memory_obs_"
    tasks = [int(key.removeprefix(prefix)) for key in batch if key.startswith(prefix)]
    return [(k, batch[f"{prefix}{k}"], batch[f"memory_target_{k}"]) for k in tasks]


def replay_loss(policy: MultiHead, batch: Batch) -> Tensor:
    """1 / (n - 1) sum_j E_{(s, y) ~ B_j} mean_d (pi_j(s) - y)^2; observations are normalised."""
    old = replayed(batch)
    actions = policy.together([(task, obs) for task, obs, _ in old])
    targets = [target for _, _, target in old]
    if len({target.shape for target in targets}) == 1:
        return (torch.stack(tuple(actions)) - torch.stack(targets)).square().mean()
    errors = [
        (action - target).square().mean() for action, target in zip(actions, targets, strict=True)
    ]
    return torch.stack(errors).mean()
