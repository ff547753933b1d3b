"""Off-policy evaluation: what a policy would earn, from a dataset that others collected.

Fitted Q evaluation (Le, Voloshin and Yue, "Batch Policy Learning under Constraints", 2019), as a
benchmark of it by Fu et al. ("Benchmarks for Deep Off-Policy Evaluation", 2021) runs it: a critic
is regressed on r + gamma Q'(s', pi(s')) and read off at the initial states. The agent is trained by
the ordinary trainer; several policies may be stacked as its seeds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Space
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from rl_shift import config, datasets, runs, seeding
from rl_shift.agent import Agent, Batch, Metrics
from rl_shift.envs import make_env
from rl_shift.errors import UserError
from rl_shift.networks import Critic, TanhGaussianActor
from rl_shift.policies import TanhGaussianPolicy
from rl_shift.trainer import Trainer

Floats = NDArray[np.float64]


class FQE(Agent):
    """Action values of a fixed policy.

    L(critic) = sum_i E (Q_i(s, a) - y)^2,  y = r + gamma (1 - terminated) Q'_i(s', pi(s'))
    estimate  = E Q(s_0, pi(s_0)), the mean over both critics

    The critics' networks hold (1 - gamma) Q / (root mean square of the rewards), which is of
    order 1 whatever the discount, and targets are clipped to what the rewards of the data allow.
    """

    scale: Tensor
    bounds: Tensor

    @dataclass(frozen=True)
    class Config:
        """Settings; ours where no source is named."""

        policy: str = ""  # RUN_DIR[#k], which acts without exploring, or a tanh-Gaussian npz file
        batch_size: int = 256  # Fu et al.
        hidden: tuple[int, ...] = (256, 256)  # Fu et al.
        learning_rate: float = 3e-4  # Adam; ours, for a tenth of their updates
        discount: float = 0.995  # Fu et al.
        tau: float = 0.05  # target averaging; ours: a backup in 20 updates, 0.005 needs 10 x more
        weight_decay: float = 0.0  # decoupled
        normalize: bool = True  # observations

    def __init__(
        self, observation_space: Space[Any], action_space: Space[Any], config: Config
    ) -> None:
        super().__init__(observation_space, action_space, config)
        obs, action = observation_space.shape[0], action_space.shape[0]  # type: ignore[index]
        self.target_policy = policy_module(config.policy, obs, action)
        self.critic = Critic(obs, action, config.hidden)
        self.target_critic = copy.deepcopy(self.critic)
        self.register_buffer("scale", torch.ones(()))  # of the rewards
        self.register_buffer("bounds", torch.tensor([-torch.inf, torch.inf]))  # of scaled rewards
        self.optimizer("critic", lr=config.learning_rate, weight_decay=config.weight_decay)

    def begin_task(self, task: Any, buffer: Any) -> None:
        """Also read the scale and the range of the rewards off the data."""
        super().begin_task(task, buffer)
        reward = buffer.arrays()["reward"]
        scale = reward.square().mean().sqrt().clamp(min=1e-6)
        self.scale.copy_(scale)
        self.bounds.copy_(torch.stack([reward.min(), reward.max()]) / scale)

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Squared error of one backup under the policy; `raw_next_obs` is what the policy sees."""
        gamma = self.config.discount
        following = self.target_critic(batch["next_obs"], self.target_policy(batch["raw_next_obs"]))
        reward = batch["reward"] / self.scale
        target = (1 - gamma) * reward + gamma * ~batch["terminated"] * following
        low, high = self.bounds.clamp(max=0.0)[0], self.bounds.clamp(min=0.0)[1]
        target = torch.minimum(torch.maximum(target, low), high)
        q = self.critic(batch["obs"], batch["action"])
        loss = (q - target).square().mean(-1).sum()
        return loss, {"critic/loss": loss, "critic/q": self._unscaled(q).mean()}

    def _unscaled(self, q: Tensor) -> Tensor:
        return q * self.scale / (1 - self.config.discount)

    def value(self, obs: Tensor) -> Tensor:
        """(N, obs) raw -> (N,) discounted value of acting with the policy from there."""
        return self._unscaled(self.critic(self.normalizer(obs), self.target_policy(obs))).mean(0)

    def act(self, obs: Tensor, explore: bool) -> Tensor:
        """The evaluated policy's action, (N, action)."""
        action: Tensor = self.target_policy(obs)
        return action

    def update(self, batch: Batch) -> Metrics:
        """One backup."""
        batch = self.normalizer.batch(batch) | {"raw_next_obs": batch["next_obs"]}
        metrics = self.learn("critic", self.critic_loss, batch)
        self.polyak("critic", "target_critic", self.config.tau)
        return metrics


# ---- policies ----------------------------------------------------------------------------------


class _Sampled(nn.Module):
    """Actions drawn from a tanh-Gaussian network."""

    def __init__(self, actor: TanhGaussianActor) -> None:
        super().__init__()
        self.actor = actor

    def forward(self, obs: Tensor) -> Tensor:
        action, _ = self.actor.sample(obs)
        return action


class _Acting(nn.Module):
    """An agent that does not explore."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, obs: Tensor) -> Tensor:
        return self.agent.act(obs, False)


def policy_module(spec: str, obs: int, action: int) -> nn.Module:
    """(N, obs) -> (N, action) of a policy file or run; a tanh-Gaussian file's actions are drawn.

    Args:
        spec: RUN_DIR[#k] or FILE.npz.
        obs: width of the observations it must take.
        action: width of the actions it must give.

    Raises:
        UserError: no such policy, several seeds, or other widths.
    """
    if not spec:
        raise UserError("say which policy to evaluate: RUN_DIR or FILE.npz")
    if Path(spec).suffix != ".npz":
        agent, _, _ = runs.load_one(spec)
        widths = agent.observation_space.shape, agent.action_space.shape
        if widths != ((obs,), (action,)):
            raise UserError(f"policy {spec} maps {widths[0]} to {widths[1]}, not {obs} to {action}")
        return _Acting(agent.eval())
    loaded = TanhGaussianPolicy.load(Path(spec))
    if (loaded.obs_width, loaded.noise_width) != (obs, action):
        raise UserError(
            f"policy {spec} maps {loaded.obs_width} numbers to {loaded.noise_width}, the dataset "
            f"has observations of {obs} and actions of {action}: choose a dataset of its kind"
        )
    weights = {key: torch.from_numpy(value) for key, value in loaded.weights.items()}
    hidden = [len(weights[f"{layer}.bias"]) for layer in ("fc0", "fc1")]
    actor = TanhGaussianActor(obs, hidden, action)
    heads = ("last_fc", "last_fc_log_std")
    with torch.no_grad():
        for part in ("weight", "bias"):
            last = torch.cat([weights[f"{head}.{part}"] for head in heads])
            given = [weights[f"fc0.{part}"], weights[f"fc1.{part}"], last]
            for layer, value in zip(actor.net.layers, given, strict=True):
                getattr(layer, part).copy_(value)
    return _Sampled(actor)


# ---- estimates ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What a policy is thought to earn.

    Attributes:
        policy: its RUN_DIR[#k] or file.
        value: discounted, the mean over the initial states of the data's episodes.
        spread: standard error over these states; it knows nothing of the critic's own error.
        loss: of the last batch, in scaled units.
        updates: that were made.
    """

    policy: str
    value: float
    spread: float
    loss: float
    updates: int


def estimate(
    policies: Sequence[str],
    dataset: str,
    updates: int,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    compile: str = "off",
) -> list[Estimate]:
    """Fit a critic to each policy; the policies are stacked as the seeds of one agent.

    Args:
        policies: RUN_DIR[#k]s, or npz files, of equal networks where there are several.
        dataset: id or path.
        updates: gradient updates.
        settings: fields of `FQE.Config`.
        seed: of the critics' initial weights and of the batches.
        compile: see `rl-shift train`.

    Raises:
        UserError: data or policies that do not fit; TrainingDiverged.
    """
    overrides = {f"agent.{key}": value for key, value in (settings or {}).items()}
    overrides |= {"tasks.0.dataset": dataset, "tasks.0.updates": updates, "seed": seed}
    overrides |= {"compile": compile, "seeds": len(policies), "eval_every": 0}
    overrides["agent.policy"] = policies[0]
    run = config.make(f"{__name__}:FQE", overrides=overrides)
    task = runs.resolve(run)[0]
    task = replace(task, env=None)  # nothing is played
    made = []
    for policy in policies:
        with seeding.forked(seeding.child(seed, "init")):
            settings_of = replace(run.agent, policy=policy)
            made.append(FQE(task.observation_space, task.action_space, settings_of))  # type: ignore[arg-type]
    agent = FQE.stacked(made)
    trainer = Trainer(agent, [task], run)
    trainer.run()
    starts = torch.from_numpy(initial_states(dataset))
    with seeding.forked(seeding.child(seed, "evaluation")):
        many = starts.expand(len(policies), *starts.shape) if len(policies) > 1 else starts
        values = agent.run(agent.value, many).double().reshape(len(policies), -1)
    loss = trainer.metrics["critic/loss"].reshape(-1)
    return [
        Estimate(policy, float(v.mean()), float(v.std() / len(v) ** 0.5), float(loss[k]), updates)
        for k, (policy, v) in enumerate(zip(policies, values, strict=True))
    ]


def initial_states(dataset: str) -> NDArray[np.float32]:
    """(E, obs) first observations of the data's episodes."""
    arrays = datasets.load(dataset)
    ends = datasets.episode_ends(arrays)
    states: NDArray[np.float32] = arrays["obs"][np.concatenate([[0], ends[:-1] + 1])]
    return states


def discounted_returns(
    policy: str, env_id: str, discount: float, episodes: int, seed: int = 0
) -> tuple[Floats, Floats]:
    """Monte-Carlo truth: (E,) discounted and (E,) undiscounted returns of whole episodes.

    Args:
        policy: RUN_DIR[#k] or FILE.npz, acting as it does in `FQE`.
        env_id: a Gymnasium id.
        discount: per step.
        episodes: that are played, side by side.
        seed: of the environment and of the policy's noise.
    """
    envs = [make_env(env_id) for _ in range(episodes)]
    space, actions = envs[0].observation_space.shape, envs[0].action_space.shape
    assert space is not None and actions is not None
    act = policy_module(policy, space[0], actions[0]).eval()
    rows = np.stack([e.reset(seed=seeding.child(seed, k))[0] for k, e in enumerate(envs)])
    sums, plain, weight = np.zeros(episodes), np.zeros(episodes), 1.0
    active = list(range(episodes))
    with seeding.forked(seeding.child(seed, "evaluation")), torch.no_grad():
        while active:
            chosen = act(torch.from_numpy(rows[active])).numpy()
            for k, action in zip(list(active), chosen, strict=True):
                rows[k], reward, terminated, truncated, _ = envs[k].step(action)
                sums[k] += weight * float(reward)
                plain[k] += float(reward)
                if terminated or truncated:
                    active.remove(k)
            weight *= discount
    for env in envs:
        env.close()
    return sums, plain


# ---- judging estimates -------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """How well estimates tell policies apart (Fu et al., section 3).

    Attributes:
        rank_correlation: Spearman's, over the policies.
        absolute_error: mean over the policies, in units of the truth.
        regret: truth of the best policy - truth of the one the estimates call best.
        relative_regret: the same as a share of (best - worst).
    """

    rank_correlation: float
    absolute_error: float
    regret: float
    relative_regret: float


def judge(estimates: Sequence[float], truth: Sequence[float]) -> Judgement:
    """Estimates against true values of the same policies, (P,) and (P,), in the same unit."""
    guess, true = np.asarray(estimates, float), np.asarray(truth, float)
    if guess.shape != true.shape or guess.ndim != 1 or len(guess) < 2:
        raise ValueError(
            f"estimates {guess.shape} and truth {true.shape}: give two or more of each"
        )
    regret = float(true.max() - true[guess.argmax()])
    width = float(true.max() - true.min())
    constant = len(set(guess)) == 1 or width == 0
    return Judgement(
        rank_correlation=0.0
        if constant
        else float(np.corrcoef(rankdata(guess), rankdata(true))[0, 1]),
        absolute_error=float(np.abs(guess - true).mean()),
        regret=regret,
        relative_regret=regret / width if width else 0.0,
    )
