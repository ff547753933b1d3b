"""Ways to keep a network from forgetting, each a term of its loss or a change of its gradient.

The classes act on a `MultiHead` policy and never on critics (Continual World and arXiv 2402.02868
leave the critic alone). Replay and A-GEM (Chaudhry et al., 2019) need a memory; L2, EWC
(Kirkpatrick et al., 2017) and synaptic intelligence (Zenke et al., 2017) keep a weight per
parameter; `frozen` trains only a new task's own layers and forgets exactly nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from rl_shift.buffer import Batch
from rl_shift.continual import MultiHead, replay_loss
from rl_shift.learner import Gradients, Transform

_DAMPING = 1e-3  # xi of synaptic intelligence
_STATES = 512  # states that the Fisher information is averaged over
_CHUNK = 32  # states whose gradients are held at once


class Retention(nn.Module):
    """Nothing is kept but, where asked for, what old heads say about the new task's states.

    c_a mean_j E_{s ~ D_n} mean_d (pi_j(s) - pi_j^before(s))^2, learning without forgetting (Li and
    Hoiem, 2016) as a regression. Observations of another size are cut or padded to fit a head.

    Attributes:
        coefficient: weight of what a subclass adds.
        anchor: weight c_a.
        before: the policy as it was when the task began; absent in the first task.
        remembers: whether a memory of old tasks is needed.
    """

    remembers = False

    def __init__(self, coefficient: float, anchor: float = 0.0) -> None:
        super().__init__()
        self.coefficient, self.anchor = coefficient, anchor
        self.before: MultiHead | None = None

    def loss(self, policy: MultiHead, batch: Batch) -> Tensor:
        """The term added to the loss of the policy, (); `batch["state"]` is normalised."""
        if self.before is None or not self.anchor:
            return next(policy.parameters()).new_zeros(())
        return self.anchor * self.shift(policy, batch["state"])

    def shift(self, policy: MultiHead, state: Tensor) -> Tensor:
        """Mean squared change of the old heads' actions at these states since the task began."""
        changes = [
            (policy(policy.fitted(state, j), j) - self.before(policy.fitted(state, j), j))
            .square()
            .mean()
            for j in range(len(policy.heads))
            if self.before is not None and j != policy.current
        ]
        return torch.stack(changes).mean() if changes else state.new_zeros(())

    def transform(self, policy: MultiHead, batch: Batch) -> Transform | None:
        """The change of the policy's gradient, if any."""
        return None

    def extend(self, policy: MultiHead, old: int) -> None:
        """A task begins: `policy` has learnt `old` tasks, and its current head is for this one."""
        if old:
            self.before = copy.deepcopy(policy)

    def observe(self, policy: MultiHead, optimizer: torch.optim.Optimizer) -> None:
        """Look at the last step; called before every update, outside compiled units."""

    def finish(self, policy: MultiHead, obs: Tensor) -> None:
        """A task is learnt; `obs`, (N, obs), are normalised observations of it."""


class Replay(Retention):
    """c / (n - 1) sum_j E_{(s, y) ~ B_j} mean_d (pi_j(s) - y)^2."""

    remembers = True

    def loss(self, policy: MultiHead, batch: Batch) -> Tensor:
        """Regression on the memory; 0 for the first task."""
        loss = super().loss(policy, batch)
        if not any(key.startswith("memory") for key in batch):
            return loss
        return loss + self.coefficient * replay_loss(policy, batch)


class AGEM(Retention):
    """The gradient is projected where it would raise the loss on the memory."""

    remembers = True

    def transform(self, policy: MultiHead, batch: Batch) -> Transform | None:
        """Projects: g - (g . r) / (r . r) r where g . r < 0, r the gradient of the replay loss."""
        if not any(key.startswith("memory") for key in batch):
            return None
        return partial(_projected, policy, batch)


def _projected(policy: MultiHead, batch: Batch, gradients: Gradients) -> Gradients:
    parameters = {k: p.detach() for k, p in policy.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(_Called(policy, replay_loss), _below(values), (batch,))
        return found

    reference = grad(loss)(parameters).values()
    pairs = list(zip(gradients.values(), reference, strict=True))
    dot = torch.stack([(g * r).sum() for g, r in pairs]).sum()
    norm = torch.stack([r.square().sum() for _, r in pairs]).sum()
    scale = (dot / (norm + 1e-12)).clamp(max=0.0)
    return {k: g - scale * r for k, (g, r) in zip(gradients, pairs, strict=True)}


class _Called(nn.Module):
    """A function of a policy as a module: the door that `functional_call` needs."""

    def __init__(self, policy: nn.Module, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.policy, self.fn = policy, fn

    def forward(self, *data: object) -> Tensor:
        return self.fn(self.policy, *data)


def _below(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"policy.{k}": v for k, v in values.items()}


class Frozen(Retention):
    """From the second task on only the layers that the task does not share are trained."""

    def transform(self, policy: MultiHead, batch: Batch) -> Transform | None:
        """Zero gradients for the trunk, and for an input layer that an older task uses."""
        if len(policy.heads) < 2:
            return None
        entrance = policy.entrance[policy.current]
        own = [f"heads.{policy.current}."]
        if policy.entrance.count(entrance) == 1:
            own.append(f"inputs.{entrance}.")

        def masked(gradients: Gradients) -> Gradients:
            return {
                k: g if any(f".{name}" in k for name in own) else torch.zeros_like(g)
                for k, g in gradients.items()
            }

        return masked


class Quadratic(Retention):
    """1/2 c sum_i w_i (theta_i - theta*_i)^2, theta* as the last task left it.

    Here w grows by 1 with every task: L2.
    """

    def loss(self, policy: MultiHead, batch: Batch) -> Tensor:
        """The penalty; 0 for the first task."""
        terms = [
            (self._kept("weight", k) * (p - self._kept("value", k)).square()).sum()
            for k, p in policy.named_parameters()
            if hasattr(self, _name("weight", k))
        ]
        loss = super().loss(policy, batch)
        if not terms:
            return loss
        return loss + 0.5 * self.coefficient * torch.stack(terms).sum()

    def extend(self, policy: MultiHead, old: int) -> None:
        """Weights and values of the parameters of the old tasks; 0 until `finish` sets them."""
        super().extend(policy, old)
        if old:
            new = f"heads.{policy.current}."
            entrance = policy.entrance[policy.current]
            fresh = f"inputs.{entrance}." if policy.entrance.count(entrance) == 1 else new
            for k, p in policy.named_parameters():
                if not k.startswith((new, fresh)) or policy.current < old:
                    self._ensure("weight", k, p)
                    self._ensure("value", k, p)

    def finish(self, policy: MultiHead, obs: Tensor) -> None:
        """Add this task's weights and take the values as they are now."""
        weights = self.weights(policy, obs)
        for k, p in policy.named_parameters():
            for kind in ("weight", "value"):
                self._ensure(kind, k, p)
            self._kept("weight", k).add_(weights[k])
            self._kept("value", k).copy_(p.detach())

    def weights(self, policy: MultiHead, obs: Tensor) -> dict[str, Tensor]:
        """Importance of every parameter for the task just learnt."""
        return {k: torch.ones_like(p, requires_grad=False) for k, p in policy.named_parameters()}

    def _ensure(self, kind: str, key: str, like: Tensor) -> None:
        if not hasattr(self, _name(kind, key)):
            self.register_buffer(_name(kind, key), torch.zeros_like(like, requires_grad=False))

    def _kept(self, kind: str, key: str) -> Tensor:
        found: Tensor = getattr(self, _name(kind, key))
        return found


def _name(kind: str, key: str) -> str:
    return f"{kind}_{key.replace('.', '_')}"


class EWC(Quadratic):
    """w = diagonal Fisher information of a Gaussian policy of variance 1: E_s sum_d (dpi_d)^2."""

    def weights(self, policy: MultiHead, obs: Tensor) -> dict[str, Tensor]:
        """Squared gradients of every action dimension, averaged over states."""
        return fisher_diagonal(policy, MultiHead.__call__, obs[:_STATES])


class SI(Quadratic):
    """w = path integral of -gradient times step, over the squared distance travelled.

    The gradient of the last step is read from Adam's first moment, m = b m' + (1 - b) g, so it is
    that of the whole loss, as in the paper's own code, and is known in every mode of execution.
    """

    def extend(self, policy: MultiHead, old: int) -> None:
        """Also the path of the current task, from where it starts."""
        super().extend(policy, old)
        for k, p in policy.named_parameters():
            for kind in ("path", "start", "before", "moment"):
                self._ensure(kind, k, p)
            for kind in ("path", "moment"):
                self._kept(kind, k).zero_()
            for kind in ("start", "before"):
                self._kept(kind, k).copy_(p.detach())

    def observe(self, policy: MultiHead, optimizer: torch.optim.Optimizer) -> None:
        """Add the last step to the path."""
        decay = optimizer.param_groups[0]["betas"][0]
        with torch.no_grad():
            for k, p in policy.named_parameters():
                moment, before = optimizer.state[p]["exp_avg"], self._kept("before", k)
                gradient = (moment - decay * self._kept("moment", k)) / (1 - decay)
                self._kept("path", k).sub_(gradient * (p - before))
                before.copy_(p)
                self._kept("moment", k).copy_(moment)

    def weights(self, policy: MultiHead, obs: Tensor) -> dict[str, Tensor]:
        """max(path, 0) / (distance^2 + damping)."""
        return {
            k: self._kept("path", k).clamp(min=0.0)
            / ((p.detach() - self._kept("start", k)).square() + _DAMPING)
            for k, p in policy.named_parameters()
        }


def fisher_diagonal(
    policy: nn.Module, outputs: Callable[..., Tensor], obs: Tensor
) -> dict[str, Tensor]:
    """E_s sum_k (d outputs_k / d theta_i)^2 for every parameter of `policy`, by its name.

    Args:
        policy: the network.
        outputs: gives (B, K) from the policy and (B, obs).
        obs: states that are averaged over, (B, obs).
    """
    called = _Called(policy, outputs)
    parameters = {k: p.detach() for k, p in policy.named_parameters()}

    def output(values: dict[str, Tensor], state: Tensor, k: int) -> Tensor:
        found: Tensor = functional_call(called, _below(values), (state[None],))
        return found[0, k]

    with torch.no_grad():
        width = outputs(policy, obs[:1]).shape[-1]
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for k in range(width):
        per_state = vmap(grad(partial(output, k=k)), in_dims=(None, 0))
        for chunk in torch.split(obs, _CHUNK):
            for name, g in per_state(parameters, chunk).items():
                total[name] += g.square().sum(0) / len(obs)
    return total


def gaussian_divergence(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Tensor:
    """KL(before || after) of diagonal Gaussians given as (mean, log_std), (B, action) each: (B,).

    The same for both behind one tanh, which is invertible.
    """
    (mean, log_std), (new_mean, new_log_std) = before, after
    ratio = (2 * (log_std - new_log_std)).exp()
    distance = ((mean - new_mean) / new_log_std.exp()).square()
    return (new_log_std - log_std + 0.5 * (ratio + distance - 1)).sum(-1)


KINDS: dict[str, type[Retention]] = {
    "none": Retention,
    "replay": Replay,
    "agem": AGEM,
    "l2": Quadratic,
    "ewc": EWC,
    "si": SI,
    "frozen": Frozen,
}
